"""Faults on purpose: a shim in front of every tool, and counted works on files, both for a vpcctl in a forked child.

A fault point is (where, at, mode): `where` is "tool" (the at-th start of ip, bridge, iptables…, seen by a stand-in that
is first on PATH) or "file" (the at-th open for writing, rename, unlink, … that vpcctl does itself). The product has no
hooks for this: it is imported once, and each run is a forked child whose `os` is wrapped.
"""

import builtins
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback

from support import VPCCTL, entered, run, snapshot, snapshot_files, snapshot_processes, wait_until

TOOLS = ("ip", "bridge", "iptables", "iptables-restore", "iptables-save", "setpriv")
KILLS = ("kill-before", "kill-after", "kill-late")
SIGNALS = ("TERM-before", "INT-after", "HUP-before", "TERM-after", "INT-before")
FAILURES = ("fail", "fail-on", "die-after")
TOOL_MODES = FAILURES + SIGNALS + KILLS
FILE_MODES = ("kill-before", "kill-after", "fail", "TERM-after")
FILE_WORKS = ("replace", "unlink", "symlink", "makedirs", "rmdir", "kill", "fork", "fsync")

SHIM = r"""#!/bin/sh
# stands in for %(tool)s: counts the call, and at the chosen one fails, dies, or stops vpcctl
real=%(real)s
call=1
set -C
until { echo "%(tool)s $*" > %(folder)s/call.$call; } 2>/dev/null; do call=$((call + 1)); done
set +C
read at mode < %(folder)s/plan
if [ "$mode" = fail-on ] && [ "$call" -ge "$at" ]; then echo "injected: no $mode today" >&2; exit 1; fi
[ "$call" = "$at" ] || exec $real "$@"
echo "$mode" > %(folder)s/fired
parent=$PPID
case "$mode %(tool)s $*" in
*-after*setpriv*|*-late*setpriv*) ( sleep 0.05; kill -${mode%%-*} $parent ) 2>/dev/null & exec $real "$@";;
die-after*setpriv*) exit 1;;
esac
case "$mode" in
fail) echo "injected: %(tool)s did not run" >&2; exit 1;;
die-after) $real "$@"; kill -9 $$;;
kill-before) kill -9 $parent; exit 1;;
kill-after) $real "$@"; kill -9 $parent; exit 1;;
kill-late) kill -9 $parent; sleep 0.05; exec $real "$@";;
*-before) kill -${mode%%-*} $parent; exec $real "$@";;
*-after) $real "$@"; code=$?; kill -${mode%%-*} $parent; exit $code;;
esac
"""


def load_vpcctl():
    """Return vpcctl as a module, loaded once."""
    if "vpcctl" not in sys.modules:
        spec = importlib.util.spec_from_file_location("vpcctl", VPCCTL)
        module = importlib.util.module_from_spec(spec)
        sys.modules["vpcctl"] = module
        spec.loader.exec_module(module)
    return sys.modules["vpcctl"]


class Outcome:
    """How a forked vpcctl ended: .code (negative: by that signal) .out .err .calls (tools) .works (on files) .fired"""

    def __init__(self, words, code, out, err):
        self.words, self.code, self.out, self.err = words, code, out, err
        self.calls, self.works, self.fired = [], [], False

    def __str__(self):
        return "$ vpcctl %s\nexit code %s\n--- stdout\n%s--- stderr\n%s--- calls\n%s\n" % (
            " ".join(self.words), self.code, self.out, self.err, "\n".join(
                "%d %s" % (number + 1, text[:150]) for number, text in enumerate(self.calls + self.works)))


class Injector:
    """Runs vpcctl with at most one fault."""

    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix="vpcctl-faults-")
        self.bin = os.path.join(self.folder, "bin")
        os.mkdir(self.bin)
        os.chmod(self.folder, 0o755)
        real_path = os.environ["PATH"] + ":/usr/sbin:/sbin"
        for tool in TOOLS:
            real = shutil.which(tool, path=real_path)
            if real:
                path = os.path.join(self.bin, tool)
                with open(path, "w") as handle:
                    handle.write(SHIM % {"tool": tool, "real": real, "folder": self.folder})
                os.chmod(path, 0o755)
        # programs get a PATH of their own from vpcctl; its first folder is the shims' too (in this mount namespace)
        self.mounted = os.path.isdir("/usr/local/sbin") and not os.listdir("/usr/local/sbin")
        if self.mounted:
            self.mounted = run(["mount", "--bind", self.bin, "/usr/local/sbin"]).code == 0
        self.path = os.environ["PATH"]
        os.environ["PATH"] = ":".join(part for part in self.path.split(":") if part != "/usr/local/sbin")
        self.points = 0

    def close(self):
        """Take the shims away."""
        os.environ["PATH"] = self.path
        if self.mounted:
            run(["umount", "/usr/local/sbin"])
        shutil.rmtree(self.folder)

    def arm(self, at, mode):
        """Forget earlier calls; the at-th call from now on meets its fate."""
        for name in os.listdir(self.folder):
            if name != "bin":
                os.unlink(os.path.join(self.folder, name))
        with open(os.path.join(self.folder, "plan"), "w") as handle:
            handle.write("%d %s\n" % (at, mode))

    def vpcctl(self, words, where="tool", at=0, mode="none", shims=True):
        """Run vpcctl in a forked child with one fault (at=0: none); returns its Outcome."""
        words = [str(word) for word in words]
        load_vpcctl()
        self.arm(at if where == "tool" else 0, mode)
        path = lambda name: os.path.join(self.folder, name)
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            code = 70
            try:
                code = self._child(words, path, where, at, mode, shims)
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(code & 0xff)
        result = Outcome(words, wait_for(child), slurp(path("out")), slurp(path("err")))
        number = 1
        while os.path.exists(path("call.%d" % number)):
            result.calls.append(slurp(path("call.%d" % number)).strip())
            number += 1
        result.works = slurp(path("works")).splitlines()
        result.fired = os.path.exists(path("fired")) or mode == "fail-on" and number > at
        self.points += bool(at and result.fired)
        wait_until(lambda: not any(self.bin in line or "/usr/local/sbin/" in line for line in snapshot_processes()),
                   5, "the stand-ins have ended")
        self.arm(0, "none")
        if "Traceback (most recent call last)" in result.err:
            raise AssertionError("a traceback\n%s" % result)
        return result

    def _child(self, words, path, where, at, mode, shims):
        module = load_vpcctl()
        for number, name in ((1, "out"), (2, "err")):
            handle = os.open(path(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(handle, number)
            os.close(handle)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if shims:
            os.environ["PATH"] = self.bin + ":" + os.environ["PATH"]
        sys.argv = ["vpcctl"] + words
        wrap_files(path("works"), path("fired"), at if where == "file" else 0, mode)
        code = module.main(words)
        sys.stdout.flush()
        sys.stderr.flush()
        return code or 0


def slurp(path):
    """Return a file's text, '' if it is not there."""
    try:
        with open(path, errors="replace") as handle:
            return handle.read()
    except OSError:
        return ""


def wait_for(child, seconds=90):
    """Wait for a child; returns its exit code, negative if a signal ended it."""
    end = time.time() + seconds
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
        if time.time() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError("no end after %d s" % seconds)
        time.sleep(0.002)


def wrap_files(works, fired, at, mode):
    """In the child: count what vpcctl does to files (and processes) itself, and strike at the at-th work."""
    real_open, real_os_open, real_kill, vpcctl = builtins.open, os.open, os.kill, os.getpid()
    log = real_os_open(works, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    count = [0]

    def counted(name, work):
        def wrapper(*args, **options):
            if os.getpid() != vpcctl:             # a child that signals an app's processes
                return work(*args, **options)
            count[0] += 1
            number = count[0]
            os.write(log, ("%s %.100s\n" % (name, args[:1])).encode())
            if number != at:
                return work(*args, **options)
            os.close(real_os_open(fired, os.O_WRONLY | os.O_CREAT, 0o644))
            if mode == "kill-before":
                real_kill(os.getpid(), signal.SIGKILL)
            if mode == "fail" and name not in ("kill", "fork"):
                raise OSError(5, os.strerror(5), args[0])
            result = work(*args, **options)
            if os.getpid() != vpcctl:
                return result
            if mode == "kill-after":
                real_kill(os.getpid(), signal.SIGKILL)
            if mode == "TERM-after":
                real_kill(os.getpid(), signal.SIGTERM)
            return result
        return wrapper

    def open_file(path, how="r", *args, **options):
        if isinstance(path, str) and set(how) & set("wax+"):
            return counted_open(path, how, *args, **options)
        return real_open(path, how, *args, **options)

    def open_handle(path, flags, *args, **options):
        if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR) and path != os.devnull:
            return counted_handle(path, flags, *args, **options)
        return real_os_open(path, flags, *args, **options)
    counted_open, counted_handle = counted("open", real_open), counted("os.open", real_os_open)
    builtins.open, os.open = open_file, open_handle
    for name in FILE_WORKS:
        setattr(os, name, counted(name, getattr(os, name)))


# ---- what is compared ----

VOLATILE_KEYS = ("pid", "start")
# the kernel's own choice for the host's end of a cable; the half of a namespace's mark that is
RANDOM = re.compile(r"(?<=link_netnsid=)\d+|(?!02:76:|01:00:5e|33:33:|ff:ff:|00:00:)\b[0-9a-f]{2}(:[0-9a-f]{2}){5}")


def steady(value):
    """A record without what differs from run to run: the numbers of processes."""
    if isinstance(value, dict):
        return {key: steady(item) for key, item in sorted(value.items()) if key not in VOLATILE_KEYS}
    if isinstance(value, list):
        return [steady(item) for item in value]
    return value


def weight(line):
    """What a rule of ours is, where it matters: the check of senders first, the drops last, all between of equal worth."""
    target = re.search(r" -j (\S+)", line)
    target = target.group(1) if target else ""
    return "source" if target.startswith("vpc-src-") else "drop" if target == "DROP" else "between"


def unordered(lines):
    """Rules with those of equal worth sorted: jumps of different VPCs side by side, and what a chain of ours accepts."""
    found = []
    for _, own in itertools.groupby(lines, lambda line: line.split()[:4]):
        own = list(own)
        ours = own[0].split()[2:4][-1:][0].startswith("vpc-")
        for kind, part in itertools.groupby(own, weight if ours else lambda line: "vpcctl" in line):
            found += sorted(part) if ours or kind else list(part)
    return found


def inside_of(space):
    """What is in a namespace: addresses, routes, rules, switches."""
    found = []
    for argv in (["ip", "-o", "address"], ["ip", "route"], ["iptables-save"]):
        text = run(["ip", "netns", "exec", space] + argv).out
        found += ["%s %s" % (space, re.sub(r"^\d+: |@\S+|\s*\[\d+:\d+\]", "", line)) for line in text.splitlines()
                  if line[:1] != "#"]
    if os.path.exists("/run/netns/" + space):
        try:
            with entered(space):
                for key, _, _ in load_vpcctl().NS_SYSCTLS:
                    found.append("%s %s=%s" % (space, key, load_vpcctl().sysctl_value(key)))
        except OSError as error:
            found.append("%s %s" % (space, error))
    return found


def state(deep=True):
    """The machine as `snapshot` sees it, plus what is inside of the namespaces and in /run/vpcctl, without numbers of
    processes: what two runs of the same commands have in common."""
    found = snapshot()
    data = os.environ["VPCCTL_DATA"]
    found["processes"] = sorted(re.sub(r"^\d+ ", "", line) for line in found["processes"])
    for part in ("links", "fdb"):
        found[part] = sorted(RANDOM.sub("random", line) for line in found[part]
                             if not line.startswith(("33:33:", "01:00:5e:")))     # groups joined by and by
    found["iptables"] = unordered(found["iptables"])
    found["rules"] = sorted(found["rules"])       # those of one pref are of equal worth
    found["run"] = snapshot_files("/run/vpcctl")
    found["data"] = []
    for name in sorted(os.listdir(data)) if os.path.isdir(data) else ():
        if name.startswith("vpc_") and name != "vpc_probe.new":
            text = slurp(os.path.join(data, name))
            try:
                text = json.dumps(steady(json.loads(text)), indent=1)
            except ValueError:
                pass
            found["data"] += ["%s: %s" % (name, line) for line in text.splitlines() or [""]]
        elif name not in ("lock", "vpc_probe.new") and not re.match(r"vpcctl\.log(\.1)?$|app_.*\.log$", name):
            found["data"].append(name)
    found["inside"] = [line for space in found["namespaces"] for line in inside_of(space)] if deep else []
    return found
