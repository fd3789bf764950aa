"""A hostile root inside a subnet makes a mess of its own namespace: everybody else is put right in spite of it."""

import importlib.util
import marshal
import os
import shutil
import struct
import sys
import unittest

from packets import Probe, check, echoing, settle, ways
from support import SandboxTest, VPCCTL, find_program, in_ns, run, subnet, vpcctl

SPACE = "ns-blue-b1"


def inside(*argv, **options):
    """Run a command in the hostile namespace; it has to work."""
    result = in_ns(SPACE, argv, **options)
    if result.code:
        raise AssertionError(str(result))


class Hostile(SandboxTest):
    """blue has b1 (hostile) and b2, red has r1 and r2; the host has a service on port 7."""

    def setUp(self):
        SandboxTest.setUp(self)
        for number, vpc in ((1, "blue"), (2, "red")):
            vpcctl("create", vpc, "--cidr", "10.%d.0.0/16" % number)
            for place in (1, 2):
                vpcctl("add-subnet", vpc, "%s%d" % (vpc[0], place), "--cidr", "10.%d.%d.0/24" % (number, place))
        self.card = subnet("blue", "b1")["veth"] + "-a"

    def ways(self, host_is_open):
        """Everybody but b1, in and between VPCs, and whether a subnet gets at the host's service."""
        return (ways(True, "ns-red-r1", "10.2.2.2") + ways(True, None, "10.1.2.2")
                + [Probe(host_is_open, "ns-red-r1", "tcp", "192.0.2.2"), Probe(host_is_open, "ns-blue-b2", "tcp", "192.0.2.2")]
                + ways(False, "ns-red-r1", "10.1.2.2") + ways(False, "ns-blue-b2", "10.2.1.2"))

    def survives(self, made_anew):
        """The host's firewall is lost: `restore` brings it back, names b1 (unless that could be put right, too), and
        nobody else is held up."""
        for table in ("filter", "raw"):
            settle("iptables", "-t", table, "-F")
        with echoing(None, "ns-blue-b2", "ns-red-r1", "ns-red-r2"):
            check(self, self.ways(True), "without a firewall")
            restored = vpcctl("restore", code=0 if made_anew else 3)
            check(self, self.ways(False), "restored")
        found = vpcctl("verify", code=0 if made_anew else 1).out
        if made_anew:
            with echoing(SPACE):
                check(self, ways(True, "ns-blue-b2", "10.1.1.2"), "b1 itself")
        else:
            self.assertIn("blue/b1", restored.err)
            self.assertEqual([line for line in found.splitlines() if line.startswith("  ") and "blue-b1" not in line], [], found)
        vpcctl("add-subnet", "red", "r3", "--cidr", "10.2.3.0/24")
        vpcctl("add-subnet", "blue", "b3", "--cidr", "10.1.3.0/24")
        settle("ip", "link", "del", "br-red")           # healed before a change, in spite of b1
        vpcctl("add-subnet", "red", "r4", "--cidr", "10.2.4.0/24")
        vpcctl("delete-subnet", "blue", "b1")
        vpcctl("add-subnet", "blue", "b1", "--cidr", "10.1.1.0/24")
        self.assertEqual(vpcctl("verify").code, 0)

    def goes(self):
        """What the mess leaves of the VPC can be deleted."""
        settle("iptables", "-F")
        vpcctl("delete", "blue")
        vpcctl("cleanup-all")
        self.assert_as_before()

    def rename(self):
        """Give b1's card another name."""
        for words in ("set %s down" % self.card, "set %s name evil0" % self.card, "set evil0 up"):
            settle("ip", "-n", SPACE, "link", *words.split())


class HostileCardTest(Hostile):

    def test_a_renamed_card(self):
        self.rename()
        self.survives(made_anew=True)

    def test_a_deleted_card(self):
        settle("ip", "-n", SPACE, "link", "del", self.card)
        self.survives(made_anew=True)

    def test_a_card_in_another_namespace(self):
        settle("ip", "netns", "add", "away")
        try:
            settle("ip", "-n", SPACE, "link", "set", self.card, "netns", "away")
            self.survives(made_anew=True)
        finally:
            settle("ip", "netns", "del", "away")

    def test_another_interface_with_the_cards_name(self):
        """A cable cannot be put in: it is named, and nothing else is."""
        self.rename()
        settle("ip", "-n", SPACE, "link", "add", self.card, "type", "bridge")
        settle("ip", "link", "del", subnet("blue", "b1")["veth"] + "-b")
        self.survives(made_anew=False)


class HostileRulesTest(Hostile):

    def test_names_and_comments_with_odd_characters(self):
        inside("iptables", "-I", "INPUT", "-m", "comment", "--comment", "one\n-A INPUT \"two'\\\x1c\u2028", "-s", "10.77.0.1", "-j",
               "DROP")
        inside("iptables", "-A", "INPUT", "-i", "a'b", "-m", "comment", "--comment", "policy-a b", "-j", "ACCEPT")
        inside("iptables", "-A", "OUTPUT", "-o", b"a\xff\xc2\x85", "-j", "ACCEPT")
        inside("iptables", "-N", b"chain\xff\xc2\x85")
        inside("ip", "link", "add", b"w\xff\x01\"", "type", "bridge")
        inside("ip", "addr", "add", "10.99.0.1/24", "dev", b"w\xff\x01\"")
        inside("ip", "link", "set", b"w\xff\x01\"", "up")
        self.survives(made_anew=True)

    def test_thirty_thousand_rules(self):
        filled = in_ns(SPACE, ["iptables-restore", "--noflush"], input="*filter\n%sCOMMIT\n" % "".join(
            '-A INPUT -s 10.9.%d.%d -m comment --comment "policy- %d" -j DROP\n' % (number >> 8, number & 255, number)
            for number in range(30000)))
        if "too long" in filled.err:
            self.skipTest("without real root the kernel does not take so many at once")
        self.assertEqual(filled.code, 0, filled)
        self.survives(made_anew=True)

    @unittest.skipUnless(find_program("nft"), "nft is not installed")
    @unittest.skipIf(os.path.realpath(find_program("iptables") or "").endswith("legacy-multi"), "iptables-legacy sees no rules of nft")
    def test_native_rules(self):
        """What iptables cannot print cannot be compared: it is named, and left."""
        inside("nft", "add rule ip filter INPUT numgen inc mod 2 0 drop")
        self.survives(made_anew=False)

    def test_the_host_comes_first(self):
        """Whatever a namespace makes of the questions that are asked in it: the host's firewall stands by then."""
        real, folder = find_program("iptables-save"), os.path.dirname(self.file("said", ""))
        with open(folder + "/iptables-save", "w") as handle:
            handle.write('#!/bin/sh\nif [ "$(readlink /proc/self/ns/net)" = "$(readlink /proc/1/ns/net)" ]; then exec %s "$@"; fi\n'
                         'nsenter --net=/proc/1/ns/net %s | grep -c "INPUT -i br-" >>%s/said\nkill -9 $$\n' % (real, real, folder))
        os.chmod(folder + "/iptables-save", 0o755)
        settle("iptables", "-F")
        restored = vpcctl("restore", code=3, env={"PATH": folder + ":" + os.environ["PATH"]})
        with open(folder + "/said") as handle:
            self.assertEqual(handle.read().split(), ["2"] * 4)
        for name in ("blue/b1", "blue/b2", "red/r1", "red/r2"):
            self.assertIn("could not look into subnet %s: `iptables-save`: ended by signal 9" % name, restored.err)
        self.assertEqual(vpcctl("verify").code, 0)

    def test_deleted_with_all_its_mess(self):
        self.rename()
        inside("iptables", "-I", "INPUT", "-m", "comment", "--comment", "one\ntwo", "-j", "ACCEPT")
        if find_program("nft"):
            inside("nft", "add rule ip filter INPUT numgen inc mod 2 0 drop")
        self.goes()


class FolderTest(SandboxTest):
    """What others may write decides nothing: the script's folder, its __pycache__, PATH with folders that depend on
    where one is."""

    def setUp(self):
        SandboxTest.setUp(self)
        self.marker = self.file("marker", "")
        self.folder = os.path.join(os.path.dirname(self.marker), "copy")
        self.script = os.path.join(self.folder, "vpcctl.py")
        os.mkdir(self.folder, 0o755)
        shutil.copy(VPCCTL, self.script)
        os.chmod(self.script, 0o755)
        self.evil = "open(%r, 'a').write('planted')\n" % self.marker
        # so that the script starts the Python whose compiled form is planted
        self.env = {"PATH": os.path.dirname(sys.executable) + ":/usr/sbin:/usr/bin:/sbin:/bin"}

    def planted(self):
        """Whether something planted has run since last asked."""
        with open(self.marker, "r+") as handle:
            found = handle.read()
            handle.truncate(0)
        return bool(found)

    def plant_compiled(self):
        """A compiled form that Python takes for the script's own."""
        cache, stat = importlib.util.cache_from_source(self.script), os.stat(self.script)
        os.makedirs(os.path.dirname(cache), 0o755, exist_ok=True)
        code = compile(self.evil + "def start(*_):\n    raise SystemExit(0)\n", self.script, "exec")
        with open(cache, "wb") as handle:
            handle.write(importlib.util.MAGIC_NUMBER + bytes(4 if sys.version_info >= (3, 7) else 0)
                         + struct.pack("<LL", int(stat.st_mtime), stat.st_size) + marshal.dumps(code))

    def call(self, *argv):
        """Run the copy, as a command or otherwise, and see that it does its work."""
        result = run(list(argv or [self.script]) + ["--version"], env=self.env)
        self.assertEqual((result.code, result.err), (0, ""), result)
        return result.out

    def test_modules_beside_the_script(self):
        for name in ("json.py", "argparse.py", "re.py", "collections.py", "functools.py", "runpy.py", "gc.py"):
            with open(os.path.join(self.folder, name), "w") as handle:
                handle.write(self.evil)
        for mode in (0o755, 0o777):
            os.chmod(self.folder, mode)
            for argv in ([self.script], [sys.executable, self.script], [sys.executable, "-I", self.script]):
                with self.subTest(mode=oct(mode), argv=argv):
                    self.assertIn("vpcctl", self.call(*argv))
                    self.assertFalse(self.planted())

    def test_a_planted_compiled_form(self):
        self.plant_compiled()
        self.call()
        self.assertTrue(self.planted(), "the control: Python takes it, where nobody but the owner can have put it there")
        for path in (self.folder, os.path.join(self.folder, "__pycache__")):
            for mode in (0o777, 0o775, 0o1777):
                with self.subTest(path=path, mode=oct(mode)):
                    os.chmod(path, mode)
                    self.assertIn("vpcctl", self.call())
                    self.assertFalse(self.planted())
            os.chmod(path, 0o755)
        self.call()
        self.assertTrue(self.planted())

    @unittest.skipIf(os.path.exists("/proc/self/uid_map") and open("/proc/self/uid_map").read().split()[2] == "1",
                     "there is no other user here")
    def test_somebody_elses_folder(self):
        self.plant_compiled()
        os.chown(self.folder, 65534, 65534)
        self.assertIn("vpcctl", self.call())
        self.assertFalse(self.planted())
        os.chown(self.script, 65534, 65534)           # who may write the script need not plant anything
        self.call()
        self.assertTrue(self.planted())

    def test_no_compiled_form_is_left_where_others_write(self):
        os.chmod(self.folder, 0o777)
        self.call()
        self.assertEqual(os.listdir(self.folder), ["vpcctl.py"])
        os.chmod(self.folder, 0o755)
        self.call()
        self.assertIn("__pycache__", os.listdir(self.folder))

    def test_programs_where_one_is(self):
        """With "", "." or "bin" on PATH, no program of the current folder is run."""
        here = os.path.join(os.path.dirname(self.marker), "here")
        os.makedirs(here + "/bin")
        for folder in (here, here + "/bin"):
            for name in ("python3", "ip", "iptables", "iptables-save", "iptables-restore", "bridge", "setpriv"):
                with open(os.path.join(folder, name), "w") as handle:
                    handle.write("#!/bin/sh\necho planted >>%s\nexit 1\n" % self.marker)
                os.chmod(os.path.join(folder, name), 0o755)
        usual = self.env["PATH"]
        for path in (":" + usual, ".:" + usual, "bin:" + usual, "./bin::" + usual):
            for argv in ([self.script], [sys.executable, self.script]):
                with self.subTest(path=path, argv=argv):
                    for words in (["create", "blog", "--cidr", "10.20.0.0/16"], ["verify"], ["delete", "blog"]):
                        result = run(argv + words, env={"PATH": path}, cwd=here)
                        self.assertEqual(result.code, 0, result)
                    self.assertFalse(self.planted())
        with self.subTest("the control: an absolute one is used"):
            run([sys.executable, self.script, "verify"], env={"PATH": here + ":" + usual}, cwd=here)
            self.assertTrue(self.planted())


if __name__ == "__main__":
    unittest.main()
