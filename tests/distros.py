#!/usr/bin/env python3
"""Run `make demo` and `make test` on systems made from nothing: python3 tests/distros.py [SYSTEM...]

Each system is what `debootstrap --variant=minbase` makes, with git, make and python3 added and nothing else,
in a folder of its own under $TMPDIR. The work tree is copied into it as it is, uncommitted changes included.
There it runs as the root of mount and process namespaces of its own (in a plain chroot, /proc would say outer
paths); packages come by the machine's own network, and vpcctl runs in its sandboxes only, as always.

One line for each system, then the total: `N passed, N failed` (`make demo` counts as one test). The log of a
failed one is kept. What cannot be had is named and counts as failed. An interrupt ends and removes all of it.
"""

import argparse
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

sys.dont_write_bytecode = True
HERE = os.path.dirname(os.path.realpath(__file__))
TREE = os.path.dirname(HERE)
DEBIAN, UBUNTU = "http://deb.debian.org/debian", "http://archive.ubuntu.com/ubuntu"
SYSTEMS = {"10": ("Debian 10", "buster", "http://archive.debian.org/debian"),
           "11": ("Debian 11", "bullseye", DEBIAN),
           "12": ("Debian 12", "bookworm", DEBIAN),
           "13": ("Debian 13", "trixie", DEBIAN),
           "20.04": ("Ubuntu 20.04", "focal", UBUNTU),
           "22.04": ("Ubuntu 22.04", "jammy", UBUNTU),
           "24.04": ("Ubuntu 24.04", "noble", UBUNTU)}
USUAL = ["11", "12", "13"]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DEADLINE = 2400                   # seconds for a system, from nothing to the last test
INSIDE = "/root/vpcctl"           # where the work tree lies in a system
RESULT = "/root/result.json"
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
# what apt must know of the machine's way to a mirror; other settings may name programs that a system lacks
APT_SETTINGS = re.compile(r"Acquire::(Check-|Force|Retries|http::(?!Proxy-Auto))")


# ---- in the namespaces: the first process ----

def hold_on_to_parent():
    """End this process, and with it all in its namespaces, when the parent closes our stdin or dies."""
    def wait():
        os.read(0, 1)
        os._exit(1)
    threading.Thread(target=wait, daemon=True).start()


def obey(*argv):
    """Run a command to its end and return its exit code; reap, as the first process must, what else ends."""
    print("\n$ " + " ".join(argv))
    sys.stdout.flush()
    child = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    while True:
        pid, status = os.wait()
        if pid == child.pid:
            return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def must(*argv):
    """Run a command that has to succeed."""
    code = obey(*argv)
    if code:
        sys.exit("%s: exit code %d" % (argv[0], code))


def build(suite, mirror, root):
    """Make the system, move into it, and go on there with its own Python; does not return."""
    hold_on_to_parent()
    must("mount", "--bind", root, root)
    if obey("debootstrap", "--variant=minbase", "--include=git,make,python3", suite, root, mirror):
        sys.exit(obey("tail", root + "/debootstrap/debootstrap.log") or 1)
    if shutil.which("apt-config"):
        settings = subprocess.check_output(["apt-config", "dump", "Acquire"]).decode().splitlines()
        with open(root + "/etc/apt/apt.conf.d/90machine", "w") as conf:
            conf.writelines(line + "\n" for line in settings if APT_SETTINGS.match(line))
    shutil.copytree(TREE, root + INSIDE, symlinks=True,
                    ignore=shutil.ignore_patterns(".git", ".vpcctl_data", "__pycache__"))
    mount_system(root)
    os.chdir(root)
    must("pivot_root", ".", ".")
    if ctypes.CDLL(None).umount2(b".", 2):               # 2: MNT_DETACH; the old root lies over the new one
        sys.exit("the old root cannot be unmounted")
    os.chdir(INSIDE)
    os.execv("/usr/bin/python3", ["python3", "tests/distros.py", "--inside"])


def mount_system(root):
    """Give the system its own /proc, /sys, /dev, /run and /tmp."""
    for folder in ("proc", "sys"):
        while os.path.ismount(os.path.join(root, folder)):         # debootstrap's
            must("umount", os.path.join(root, folder))
    for kind, folder, mode in (("proc", "proc", "nosuid"), ("sysfs", "sys", "nosuid"),
                               ("tmpfs", "dev", "mode=755"), ("tmpfs", "run", "mode=755"),
                               ("tmpfs", "tmp", "mode=1777")):
        must("mount", "-t", kind, "-o", mode, kind, os.path.join(root, folder))
    dev = root + "/dev/"
    for name in DEVICES:
        open(dev + name, "w").close()
        must("mount", "--bind", "/dev/" + name, dev + name)
    for folder in ("pts", "shm"):
        os.mkdir(dev + folder)
    must("mount", "-t", "devpts", "-o", "newinstance,ptmxmode=666,mode=620", "devpts", dev + "pts")
    must("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", dev + "shm")
    for name, target in (("ptmx", "pts/ptmx"), ("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"),
                         ("stderr", "fd/2")):
        os.symlink(target, dev + name)


def test_inside():
    """In the system: run what a user would type; leave the exit codes and the tools' versions in a file."""
    hold_on_to_parent()
    result = {target: obey("make", "--no-print-directory", target) for target in ("demo", "test")}
    result["tools"] = ", ".join(map(version, (["python3", "-V"], ["ip", "-V"], ["iptables", "-V"])))
    with open(RESULT, "w") as handle:
        json.dump(result, handle)
    return 0


def version(argv):
    """Return a program's name and version, as it says them."""
    said = subprocess.check_output(argv).decode().strip() if shutil.which(argv[0]) else "missing"
    found = re.search(r"\d+\.\d[\d.]*( \(\w+\))?", said)
    return "%s %s" % (argv[0], found.group() if found else said)


# ---- outside ----

class System:
    """One system and what came of it: `lack` says why it could not be had."""

    def __init__(self, number, mirror=None):
        self.title, self.suite, self.mirror = SYSTEMS[number]
        self.mirror = mirror or self.mirror
        self.passed = self.failed = self.skipped = 0
        self.lack = ""


def environment():
    """Return what a system's programs find in their environment: of this machine's only the proxies."""
    kept = {name: value for name, value in os.environ.items() if re.match(r"(https?|no)_proxy$", name, re.I)}
    return dict(kept, PATH="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", HOME="/root")


def try_system(system, folder):
    """Build a system, run the tests in it, and fill in what came of it; returns its log's path."""
    root, log = os.path.join(folder, system.suite), os.path.join(folder, system.suite + ".log")
    os.mkdir(root)
    argv = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable,
            os.path.realpath(__file__), "--build", system.suite, system.mirror, root]
    with open(log, "wb") as sink:
        child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=sink, stderr=subprocess.STDOUT,
                                 env=environment(), start_new_session=True)
        try:
            child.wait(timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            sink.write(b"\nno end after %d s\n" % DEADLINE)
        finally:
            child.stdin.close()       # ends its first process; all others and the mounts go with it
            child.wait()
    judge(system, root, log)
    shutil.rmtree(root)
    return log


def judge(system, root, log):
    """Read what a system has left."""
    with open(log, errors="replace") as handle:
        lines = [line.strip() for line in handle if line.strip()]
    if not os.path.exists(root + INSIDE + "/Makefile"):
        errors = [line for line in lines if line.startswith("E: ")]
        system.lack = (errors or lines or ["it ended without a word"])[-1]
        return
    try:
        with open(root + RESULT) as handle:
            result = json.load(handle)
    except (OSError, ValueError):
        result = {"demo": 1, "test": 1, "tools": "it did not come to its end"}
    counts = [re.match(r"(\d+) passed, (\d+) failed(?:, (\d+) skipped)?", line) for line in lines]
    counts = [[int(number or 0) for number in match.groups()] for match in counts if match] or [[0, 0, 0]]
    system.passed, system.failed, system.skipped = counts[-1]
    system.failed += result["test"] != 0 and not system.failed
    system.passed += result["demo"] == 0
    system.failed += result["demo"] != 0
    system.tools = result["tools"]


def no_way():
    """Return why no system can be made here, or ''."""
    if os.geteuid() != 0:
        return "only root can make such systems"
    tools = subprocess.Popen(["sh", os.path.join(HERE, "packages.sh"), "--distros"], stdin=subprocess.DEVNULL)
    return "debootstrap cannot be installed" if tools.wait() else ""


def counted(passed, failed, skipped):
    """Return the counts as a line."""
    return "%d passed, %d failed%s" % (passed, failed, ", %d skipped" % skipped if skipped else "")


def report(system, log, seconds):
    """Print a system's line; where it failed, the end of its log, which is kept."""
    if system.lack:
        print("%-12s not had: %s" % (system.title, system.lack))
    else:
        print("%-12s %s: %s  %d s" % (system.title, system.tools, counted(
            system.passed, system.failed, system.skipped), seconds))
    if log and (system.failed or system.lack):
        with open(log, errors="replace") as handle:
            print("".join("    | " + line for line in handle.readlines()[-100:]).rstrip())
        handle, kept = tempfile.mkstemp(prefix="vpcctl-%s-" % system.suite, suffix=".log")
        os.close(handle)
        shutil.copyfile(log, kept)
        print("the whole log: " + kept)
    sys.stdout.flush()


def interrupted(signo, _frame):
    """On a signal: end, through all `finally`; a second signal changes nothing."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + signo)


def try_all(systems, lack):
    """Try the systems one after the other, and report each as it ends."""
    with tempfile.TemporaryDirectory(prefix="vpcctl-distros-") as folder:
        os.chmod(folder, 0o755)                # user nobody must find its way
        for system in systems:
            system.lack, log, began = lack, None, time.time()
            if not lack:
                log = try_system(system, folder)
            report(system, log, time.time() - began)


def parse():
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", metavar="SYSTEM",
                        help="some of %s (%s)" % (", ".join(SYSTEMS), " ".join(USUAL)))
    parser.add_argument("--mirror", metavar="URL", help="where the packages are, if not at the usual place")
    parser.add_argument("--if-possible", action="store_true", help="what cannot be had counts as skipped")
    parser.add_argument("--build", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = set(options.systems) - set(SYSTEMS)
    if unknown:
        parser.error("unknown: %s; known are %s" % (", ".join(sorted(unknown)), ", ".join(SYSTEMS)))
    return options


def main():
    """Try the systems and print the total; returns the exit code. (Or be the first process of one.)"""
    options = parse()
    if options.build:
        return build(*options.build)
    if options.inside:
        return test_inside()
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:                 # nohup
            signal.signal(number, interrupted)
    os.umask(0o022)
    systems = [System(number, options.mirror) for number in options.systems or USUAL]
    try_all(systems, no_way())
    for system in systems:
        if system.lack and options.if_possible:
            system.skipped += 1
        elif system.lack:
            system.failed += 1
    passed, failed, skipped = (sum(getattr(system, count) for system in systems)
                               for count in ("passed", "failed", "skipped"))
    print(counted(passed, failed, skipped))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
