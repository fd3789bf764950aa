"""The tools of other systems: the guide with older ones; too old ones and answers that are none are named."""

import json
import os
import shutil
import tempfile
import unittest

import e2e_faults
import e2e_guide
import e2e_isolation
import oldtools
from support import SandboxTest, assert_same, run, snapshot, vpcctl


class OldTools(SandboxTest):
    """Everything of the class is done with the `ip` and `bridge` of an older iproute2."""

    version = ""

    @classmethod
    def setUpClass(cls):
        SandboxTest.setUpClass()
        cls.path, cls.older = os.environ["PATH"], tempfile.TemporaryDirectory(prefix="vpcctl-")
        oldtools.install(cls.older.name, cls.version)
        os.environ["PATH"] = cls.older.name + ":" + cls.path
        super().setUpClass()

    @classmethod
    def tearDownClass(cls):
        super().tearDownClass()
        os.environ["PATH"] = cls.path
        cls.older.cleanup()

    def real(self, *argv):
        """Run a command with the tools of this machine."""
        result = run(list(argv), env={"PATH": self.path})
        self.assertEqual(result.code, 0, str(result))
        return result.out


class FlagTest:
    """What an older `ip` has no words for is the same in the kernel, and verify and restore know it."""

    def flags(self):
        """Port -> whether it is locked and floods broadcasts, as a new `bridge` says."""
        found = {}
        for link in json.loads(self.real("bridge", "-j", "-d", "link")):
            if "locked" not in link:
                self.skipTest("this machine's own bridge is as old, and cannot tell")
            found[link["ifname"]] = (link["locked"], link["bcast_flood"])
        return found

    def test_ports(self):
        vpcctl("create", "blog", "--cidr", "10.20.0.0/16")
        made = vpcctl("add-subnet", "blog", "web", "--cidr", "10.20.1.0/24").out
        self.assertIn("\n    netlink RTM_SETLINK v-blog-web-b locked on: this ip has no word for it\n", made)
        vpcctl("add-subnet", "blog", "db", "--cidr", "10.20.2.0/24")
        vpcctl("create", "shop", "--cidr", "10.30.0.0/16")
        vpcctl("add-subnet", "shop", "api", "--cidr", "10.30.1.0/24")
        made = vpcctl("peer", "blog", "shop", "--allow-cidrs", "10.20.1.0/24,10.30.1.0/24").out
        for end in ("a", "b"):
            said = ">>> ip link set pv-blog-shop-%s type bridge_slave bcast_flood off\n" % end
            self.assertEqual(made.count(said), 1)
            self.assertIn("    netlink RTM_SETLINK pv-blog-shop-%s bcast_flood off: " % end, made)
        self.assertNotIn("netlink", vpcctl("--quiet", "add-subnet", "shop", "db").out)
        port, cable = (True, True), (False, False)
        whole = {"v-blog-web-b": port, "v-blog-db-b": port, "v-shop-api-b": port, "v-shop-db-b": port,
                 "pv-blog-shop-a": cable, "pv-blog-shop-b": cable}
        self.assertEqual(self.flags(), whole)
        self.assertNotIn("lock", vpcctl("verify").out)
        before = snapshot()
        for name, flag, value in (("v-blog-web-b", "locked", "off"), ("pv-blog-shop-b", "bcast_flood", "on")):
            self.real("bridge", "link", "set", "dev", name, flag, value)
            self.assertIn("port %s: %s" % (name, flag), vpcctl("verify", code=1).out)
            vpcctl("restore")
            vpcctl("verify")
        self.real("ip", "link", "del", "br-blog")
        vpcctl("restore")
        vpcctl("verify")
        self.assertEqual(self.flags(), whole)
        assert_same(before, snapshot(), "restored, but")

    def test_what_the_kernel_refuses(self):
        """A failure behind a message to the kernel takes that back as well."""
        vpcctl("create", "blog", "--cidr", "10.20.0.0/16")
        before = snapshot()
        self.real("ip", "addr", "add", "10.20.1.1/24", "dev", "br-blog")
        said = vpcctl("add-subnet", "blog", "web", "--cidr", "10.20.1.0/24", code=3)
        self.assertIn("netlink RTM_SETLINK v-blog-web-b locked on", said.out)
        self.assertIn("`ip addr add 10.20.1.1/24 dev br-blog` failed", said.err)
        self.real("ip", "addr", "del", "10.20.1.1/24", "dev", "br-blog")
        assert_same(before, snapshot())


class Iproute420Test(OldTools, FlagTest, e2e_guide.TutorialTest, e2e_guide.ScenarioTest):
    version = "4.20"


class Iproute420RestartTest(OldTools, e2e_faults.RebootTest):
    version = "4.20"


class Iproute55Test(OldTools, FlagTest, e2e_guide.TutorialTest, e2e_guide.ScenarioTest):
    version = "5.5"


class Iproute55IsolationTest(OldTools, e2e_isolation.TriangleTest):
    version = "5.5"


TOO_OLD_IP = """#!/bin/sh
[ "$1" = -V ] && { echo "ip utility, iproute2-ss170905"; exit 0; }
for word in "$@"; do [ "$word" = -j ] && { echo 'Option "-j" is unknown, try "ip -help".' >&2; exit 1; }; done
exec REAL "$@"
"""
HALF_OLD_IP = """#!/bin/sh
[ "$1" = -V ] && { echo "ip utility, iproute2-ss180129"; exit 0; }
case "$*" in *" route "*) echo "default via 192.0.2.1 dev eth0"; exit 0;; esac
exec REAL "$@"
"""
TOO_OLD_RESTORE = """#!/bin/sh
[ "$1" = -V ] && { echo "iptables v1.6.1"; exit 0; }
for word in "$@"; do [ "$word" = -w ] && { echo "iptables-restore: invalid option -- 'w'" >&2; exit 1; }; done
exec REAL "$@"
"""
OTHER_IP = """#!/bin/sh
[ "$1" = -V ] && { echo "ip: invalid option -- 'V'" >&2; echo "BusyBox v1.36.1" >&2; exit 1; }
for word in "$@"; do [ "$word" = -j ] && { echo "ip: unrecognized option: j" >&2; exit 1; }; done
exec REAL "$@"
"""
ODD = """#!/bin/sh
case "$*" in *"WHAT"*) printf '%s' 'ANSWER'; exit 0;; esac
exec REAL "$@"
"""


class UselessTest(SandboxTest):
    """Tools that cannot be worked with: named, and nothing is left half done."""

    def stand_in(self, script, *tools):
        """Put a script in front of tools -> the environment in which it is found."""
        for tool in tools:
            real = shutil.which(tool, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
            path = self.file(tool, script.replace("REAL", real))
            os.chmod(path, 0o755)
        return {"PATH": os.path.dirname(path) + ":" + os.environ["PATH"]}

    def refused(self, env, text, code, *lines):
        """Commands fail with a code and a text, and change nothing."""
        before = snapshot()
        for line in lines:
            with self.subTest(line):
                said = vpcctl(*line.split(), env=env, code=code)
                self.assertIn(text, said.err)
                assert_same(before, snapshot())
        vpcctl("verify")

    def world(self):
        for line in ("create blog --cidr 10.20.0.0/16", "add-subnet blog web --cidr 10.20.1.0/24"):
            vpcctl(*line.split())

    def test_ip_too_old(self):
        self.world()
        env = self.stand_in(TOO_OLD_IP, "ip")
        self.refused(env, "`ip` is too old: it is iproute2-ss170905; vpcctl needs iproute2 4.19 or later", 4,
                     "create shop --cidr 10.30.0.0/16", "verify", "restore")

    def test_ip_that_knows_json_in_part(self):
        self.world()
        self.refused(self.stand_in(HALF_OLD_IP, "ip"), "`ip` is too old: it is iproute2-ss180129", 4,
                     "create shop --cidr 10.30.0.0/16", "verify", "restore")

    def test_another_program_of_that_name(self):
        self.world()
        env = self.stand_in(OTHER_IP, "ip")
        self.refused(env, "`ip` is too old: it is no iproute2: ip: invalid option", 4, "create shop --cidr 10.30.0.0/16", "verify", "restore")

    def test_iptables_too_old(self):
        self.world()
        env = self.stand_in(TOO_OLD_RESTORE, "iptables", "iptables-restore")
        self.refused(env, "`iptables` is too old: it is v1.6.1; vpcctl needs iptables 1.6.2 or later", 4,
                     "create shop --cidr 10.30.0.0/16", "add-subnet blog db", "enable-nat blog")

    def test_answers_that_are_none(self):
        self.world()
        vpcctl("create", "shop", "--cidr", "10.30.0.0/16")
        answer = "<html>" + "y" * 100
        for tool, what in (("ip", "netns list"), ("ip", "link show"), ("ip", "addr show"),
                           ("ip", "neigh show"), ("ip", "rule show"), ("ip", "route show"), ("bridge", "fdb show")):
            env = self.stand_in(ODD.replace("WHAT", what).replace("ANSWER", answer), tool)
            with self.subTest(what):
                said = vpcctl("verify", env=env, code=3).err
                self.assertRegex(said, "`%s -j .*%s.*` failed: this is no JSON" % (tool, what))
                self.assertIn(" that can be read: " + answer[:80] + "\n", said)
            os.unlink(self.file(tool, ""))
        env = self.stand_in(ODD.replace("WHAT", "route show").replace("ANSWER", "<html>"), "ip")
        self.refused(env, "show table all` failed: this is no JSON that can be read: <html>", 3,
                     "create more --cidr 10.40.0.0/16")
        self.refused(env, "` failed: this is no JSON that can be read: <html>", 3, "restore")


if __name__ == "__main__":
    unittest.main()
