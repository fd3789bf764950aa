"""The sandbox from the outside: it passes on what it should, and leaves nothing."""

import glob
import os
import re
import signal
import subprocess
import sys
import time
import unittest

from support import LONG, VPCCTL, run, vpcctl, wait_until


def processes():
    """Return {pid: (parent, state, arguments)} of all processes in sight."""
    found = {}
    for path in glob.glob("/proc/[0-9]*/stat"):
        try:
            with open(path, errors="replace") as handle:
                stat = handle.read()
            with open(os.path.dirname(path) + "/cmdline", errors="replace") as handle:
                args = handle.read().split("\0")
        except OSError:
            continue
        fields = stat.rsplit(")", 1)[1].split()
        found[int(stat.split(" ", 1)[0])] = (int(fields[1]), fields[0], args)
    return found


def family(top):
    """Return the pids of a process and all its descendants, the eldest first."""
    everyone, found = processes(), [top]
    for pid in found:
        found += sorted(child for child, (parent, _, _) in everyone.items() if parent == pid)
    return found


def net_of(pid):
    """Return the network namespace of a process, '' if it is gone."""
    try:
        return os.readlink("/proc/%d/ns/net" % pid)
    except OSError:
        return ""


@unittest.skipIf("VPCCTL_SANDBOX" in os.environ, "from outside of a sandbox only")
class OutsideTest(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        trial = vpcctl("sandbox", "--", "true", ok=False)
        if trial.code == 4:
            raise unittest.SkipTest("no sandbox to be had here: " + trial.err.strip())

    def test_its_own_namespaces(self):
        """Network, mounts, processes, host name, and shared memory; the host name that is set in there stays there."""
        kinds, name = ("net", "mnt", "pid", "uts", "ipc"), os.uname()[1]
        told = vpcctl("sandbox", "--", sys.executable, "-c", "import os\nfor kind in %r:\n    print(os.readlink("
                      "'/proc/self/ns/' + kind))\nprint(os.uname()[1])" % (kinds,)).out.split()
        self.assertEqual((told.pop(), os.uname()[1]), ("sandbox", name))
        for kind, found in zip(kinds, told):
            self.assertNotEqual(found, os.readlink("/proc/self/ns/" + kind))

    def start(self, script):
        """Start a shell script in a sandbox, wait for its `sleep 301`; returns the process and its family."""
        child = subprocess.Popen([sys.executable, VPCCTL, "sandbox", "--", "sh", "-c", script],
                                 stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                 stderr=subprocess.DEVNULL)
        self.addCleanup(lambda: (child.poll() is None and child.kill(), child.wait()))
        return child, wait_until(lambda: self.members(child.pid), 10, "the sandbox's command runs")

    @staticmethod
    def members(top):
        everyone, pids = processes(), family(top)
        arguments = [everyone[pid][2][:2] for pid in pids if pid in everyone]
        return pids if ["sleep", "301"] in arguments else None

    def assert_gone(self, pids, spaces):
        """No process of the sandbox lives (one that waits to be reaped does not), and no namespace."""
        def left():
            everyone = processes()
            alive = [pid for pid in pids[1:] if pid in everyone and everyone[pid][1] not in "ZX"]
            return alive + [pid for pid in everyone if net_of(pid) in spaces]
        wait_until(lambda: not left(), LONG, "everything of the sandbox is gone")

    def test_exit_code_and_streams(self):
        result = vpcctl("sandbox", "--", "sh", "-c", "cat; echo bad >&2; exit 7", input="good\n", code=7)
        self.assertEqual((result.out, result.err), ("good\n", "bad\n"))
        self.assertEqual(vpcctl("sandbox", "--", "sh", "-c", "kill -TERM $$", ok=False).code, 143)
        # unshare of util-linux 2.36 lets its children ignore these
        for name, code in (("TERM", 143), ("INT", 130)):
            argv = [sys.executable, VPCCTL, "sandbox", "--", "sh", "-c", "kill -%s $$" % name]
            ignored = run(["sh", "-c", "trap '' TERM INT; exec \"$@\"", "sh"] + argv)
            self.assertEqual(ignored.code, code, str(ignored))
        missing = vpcctl("sandbox", "--", "no-such-program", code=127)
        self.assertIn("no-such-program", missing.err)

    def test_shell(self):
        result = run([sys.executable, VPCCTL, "sandbox"], input="echo it is $VPCCTL_SANDBOX\nexit 3\n")
        self.assertEqual(result.code, 3, str(result))
        self.assertIn("it is 1", result.out)
        self.assertIn("203.0.113.1", result.err)
        self.assertEqual(len(result.err.splitlines()), 4, str(result))

    def test_arguments_arrive_as_they_are(self):
        result = vpcctl("sandbox", "--", "printf", "%s|", "a b", "", "--dry-run", "$HOME", "-k")
        self.assertEqual(result.out, "a b||--dry-run|$HOME|-k|")

    def test_dry_run_shows_the_command(self):
        result = vpcctl("--dry-run", "sandbox")
        self.assertTrue(re.match(r">>> unshare --net --mount --uts --ipc --pid ", result.out), result.out)

    def test_gone_after_exit(self):
        mark = "300.%d" % os.getpid()      # other sandboxes may come and go meanwhile
        out = vpcctl("sandbox", "--", "sh", "-c",
                     "sleep %s & setsid sleep %s & ip netns add left; cd /proc; "
                     "readlink self/ns/net $(cat /run/vpcctl-sandbox/internet.pid)/ns/net" % (mark, mark)).out
        self.assertEqual(len(set(out.split())), 2, out)
        everyone = processes()
        self.assertFalse([args for _, _, args in everyone.values() if mark in args])
        self.assertFalse([pid for pid in everyone if net_of(pid) in out.split()])
        self.assertFalse(os.path.exists("/run/netns/left"))

    def test_gone_after_kill(self):
        names = ("the sandbox itself", "unshare", "its first process")
        for place, name in enumerate(names):
            with self.subTest(name):
                child, pids = self.start("ip netns add left; setsid sleep 300 & sleep 301; true")
                spaces = {net_of(pid) for pid in pids} - {net_of(os.getpid())} - {""}
                os.kill(pids[place], signal.SIGKILL)
                child.wait(timeout=30)
                self.assert_gone(pids, spaces)

    def test_signals_are_passed_on(self):
        child, pids = self.start("trap 'kill $!; exit 42' TERM; sleep 301 & wait")
        spaces = {net_of(pid) for pid in pids} - {net_of(os.getpid())} - {""}
        began = time.time()
        child.send_signal(signal.SIGTERM)
        self.assertEqual(child.wait(timeout=30), 42)
        self.assertLess(time.time() - began, 5)
        self.assert_gone(pids, spaces)


class RefusalTest(unittest.TestCase):

    def test_missing_program_is_named(self):
        with_nothing = run([sys.executable, VPCCTL, "sandbox", "--", "true"], env={"PATH": "/nonexistent"})
        if with_nothing.code == 0:
            self.skipTest("the programs are in /usr/sbin here")
        self.assertEqual(with_nothing.code, 4, str(with_nothing))
        self.assertIn("util-linux", with_nothing.err)

    def test_inner_entry_is_not_for_users(self):
        result = run([sys.executable, VPCCTL, "__sandbox-init", "--", "true"])
        self.assertEqual(result.code, 2, str(result))
        self.assertNotIn("Traceback", result.err)


if __name__ == "__main__":
    unittest.main()
