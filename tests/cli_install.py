"""`make install` and what it puts in place: the command, the manual, and the unit that brings VPCs back after a restart."""

import os
import re
import shlex
import shutil
import sys
import tempfile
import unittest

from support import HERE, VPCCTL, run, vpcctl

ROOT = os.path.dirname(HERE)
UP = """\
%(vpcctl)s create blog --cidr 10.20.0.0/16 && %(vpcctl)s add-subnet blog web && %(vpcctl)s deploy-app blog web --port 80
"""
BOOT = """\
%(vpcctl)s list
%(start)s || exit
%(vpcctl)s verify >&2 || exit
%(vpcctl)s exec blog web -- %(python)s -c "import urllib.request as u; print(u.urlopen('http://web.blog').read())"
"""


class InstallTest(unittest.TestCase):

    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix="vpcctl install-")     # with a blank: paths are quoted where they must be
        self.addCleanup(shutil.rmtree, self.folder)
        self.data = os.path.join(self.folder, "the data")

    def make(self, target, **variables):
        """Run make with DESTDIR, as one who makes a package; returns its Result."""
        values = dict({"DESTDIR": os.path.join(self.folder, "root"), "VPCCTL_DATA": self.data,
                       "PYTHON": sys.executable}, **variables)
        return run(["make", "-C", ROOT, "--no-print-directory", target] + ["%s=%s" % pair for pair in values.items()])

    def installed(self, **variables):
        """`make install` -> the Result, and the unit's settings: name -> value."""
        done = self.make("install", **variables)
        self.assertEqual(done.code, 0, str(done))
        path = re.search(r"Installed: (.*vpcctl\.service):", done.out).group(1)
        with open(path) as handle:
            lines = [line.partition("=") for line in handle.read().splitlines() if "=" in line]
        return path, {key: value for key, _, value in lines}

    def test_everything_goes_again(self):
        path, _ = self.installed()
        root = path[:path.index("/etc/")]
        files = sorted(name for _, _, names in os.walk(root) for name in names)
        self.assertEqual(files, ["vpcctl", "vpcctl", "vpcctl.8", "vpcctl.service", "vpcctl.service"])
        self.assertTrue(os.path.samefile(root + "/usr/local/bin/vpcctl", VPCCTL))
        wanted = os.path.join(os.path.dirname(path), "multi-user.target.wants", "vpcctl.service")
        self.assertTrue(os.path.samefile(wanted, path))
        self.assertEqual(self.make("uninstall").code, 0)
        self.assertEqual([names for _, _, names in os.walk(root) if names], [])

    def test_a_folder_in_which_others_write_is_named(self):
        copy = os.path.join(self.folder, "copy")
        os.makedirs(copy + "/tests", 0o755)
        for name in ("Makefile", "vpcctl.py", "tests/packages.sh"):
            shutil.copy(os.path.join(ROOT, name), os.path.join(copy, name))
        for mode, said in ((0o755, False), (0o775, True), (0o777, True), (0o1777, False)):
            os.chmod(copy, mode)
            done = run(["make", "-C", copy, "--no-print-directory", "install", "PYTHON=" + sys.executable,
                        "DESTDIR=" + os.path.join(self.folder, "root")])
            self.assertEqual(done.code, 0, str(done))
            self.assertEqual("note: %s is d" % copy in done.out, said, "%o: %s" % (mode, done))

    def test_without_systemd_one_line_says_what_to_add(self):
        prefix = os.path.join(self.folder, "prefix")
        if os.path.isdir("/run/systemd/system") and os.geteuid() == 0:
            self.skipTest("this machine runs systemd")
        done = self.make("install", DESTDIR="", PREFIX=prefix)
        self.assertEqual(done.code, 0, str(done))
        self.assertIn("After a restart: sudo %s/bin/vpcctl restore" % prefix, done.out)
        self.assertFalse(os.path.exists("/etc/systemd/system/vpcctl.service"))

    def test_systemd_takes_the_unit(self):
        if not shutil.which("systemd-analyze"):
            self.skipTest("systemd-analyze is not installed")
        path, _ = self.installed()
        done = run(["systemd-analyze", "verify", path])
        self.assertEqual((done.code, done.out + done.err), (0, ""), str(done))
        with open(path, "a") as handle:
            handle.write("[Service]\nExecStart=relative/path\n")
        self.assertNotEqual(run(["systemd-analyze", "verify", path]).code, 0)

    def test_an_odd_folder_is_quoted(self):
        _, unit = self.installed(VPCCTL_DATA=self.data + "%n$$x\"\\y")
        self.assertIn('--data-dir "%s%%%%n$$x\\"\\\\y"' % self.data, unit["ExecStart"])

    @unittest.skipIf("VPCCTL_SANDBOX" in os.environ, "from outside of a sandbox only")
    def test_the_vpcs_are_back_after_a_restart(self):
        if vpcctl("sandbox", "--", "true", ok=False).code == 4:
            self.skipTest("no sandbox to be had here")
        _, unit = self.installed()
        words = {"python": shlex.quote(sys.executable), "start": unit["ExecStart"].replace("%%", "%"),
                 "vpcctl": "%s %s --data-dir %s" % tuple(map(shlex.quote, (sys.executable, VPCCTL, self.data)))}
        vpcctl("sandbox", "--", "sh", "-ec", UP % words)
        done = vpcctl("sandbox", "--", "sh", "-c", BOOT % words, timeout=120)
        self.assertIn("- blog   (down", done.out)
        self.assertIn("Hello from subnet web of VPC blog", done.out)
        self.assertEqual(unit["ExecReload"], unit["ExecStart"])
        self.assertTrue(unit["ConditionPathExistsGlob"].startswith(self.data + "/vpc_"))


if __name__ == "__main__":
    unittest.main()
