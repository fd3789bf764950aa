"""The sandbox from the inside: what is there, and that it is this sandbox's own."""

import os
import shutil
import unittest

from support import (INTERNET, LONG, SandboxTest, assert_same, entered, http_get, in_ns, internet_pid, ping, run,
                     snapshot, tcp_ask, tcp_listener, tcp_open, udp_answers, udp_listener, vpcctl)


class InsideTest(SandboxTest):

    def test_uplink(self):
        self.assertIn("192.0.2.2/24", run(["ip", "address", "show", "dev", "eth0"]).out)
        self.assertIn("default via 192.0.2.1 dev eth0", run(["ip", "route"]).out)
        self.assertEqual(sorted(os.listdir("/sys/class/net")), ["eth0", "lo"])

    def test_internet_answers(self):
        self.assert_ping(None, INTERNET)
        page = http_get(None, INTERNET)
        self.assertIn("200 OK", page)
        self.assertIn("You came from 192.0.2.2<", page)
        self.assert_refused(None, INTERNET, 81)

    def test_internet_has_no_name_and_no_way_into_private_ranges(self):
        self.assertEqual(run(["ip", "netns", "list"]).out, "")
        with entered(internet_pid()):
            routes = run(["ip", "route"]).out
            self.assertNotEqual(run(["ip", "route", "get", "10.20.1.2"]).code, 0)
        self.assertEqual(routes.split()[0], "192.0.2.0/24")
        self.assertEqual(len(routes.splitlines()), 1, routes)

    def test_its_own_run_and_etc_netns(self):
        self.assertEqual(os.listdir("/etc/netns"), [])
        self.assertEqual(os.listdir("/run/netns"), [])
        os.mkdir("/etc/netns/one")
        try:
            with open("/etc/netns/one/hosts", "w") as handle:
                handle.write("10.9.8.7 only-in-one\n")
            run(["ip", "netns", "add", "one"])
            self.assertEqual(in_ns("one", ["cat", "/etc/hosts"]).out, "10.9.8.7 only-in-one\n")
            with open("/etc/hosts") as handle:
                self.assertNotIn("only-in-one", handle.read())
            self.assertEqual(in_ns("one", ["ls", "/sys/class/net"]).out.split(), ["lo"])
        finally:
            run(["ip", "netns", "delete", "one"])
            shutil.rmtree("/etc/netns/one")

    def test_commands_and_data_folder(self):
        self.assertEqual(os.environ["VPCCTL_DATA"], "/run/vpcctl-data")
        self.assertEqual(os.stat("/run/vpcctl-data").st_mode & 0o777, 0o755)
        self.assertEqual(shutil.which("vpcctl"), "/run/vpcctl-sandbox/bin/vpcctl")
        self.assertEqual(run(["sudo", "ANSWER=42", "printenv", "ANSWER"]).out, "42\n")
        self.assertEqual(run(["sudo", "vpcctl", "--version"]).out, vpcctl("--version").out)

    def test_sudo(self):
        """Root already; another user where there are others; nothing that it does not know."""
        self.assertEqual(run(["sudo", "-E", "-u", "root", "--", "id", "-u"]).out, "0\n")
        for words, said in ((["-Z", "true"], "-Z"), (["-u"], "needs a user"), (["-u", "no-such-user", "true"], "no-such-user"),
                            (["-E"], "command")):
            refused = run(["sudo"] + words)
            self.assertEqual(refused.code, 1, refused)
            self.assertIn(said, refused.err)
        with open("/proc/self/uid_map") as handle:
            alone = handle.read().split()[2] == "1"
        for words in (["-u", "nobody"], ["-unobody"], ["--user=nobody"], ["-n", "--user", "nobody"]):
            with self.subTest(words):
                done = run(["sudo"] + words + ["sh", "-c", "id -u; : 2>/dev/null >/run/vpcctl-data/mine"])
                if alone:
                    self.assertEqual((done.code, done.out), (1, ""), done)
                    self.assertIn("no other user", done.err)
                else:
                    self.assertEqual(done.out, run(["id", "-u", "nobody"]).out)
                    self.assertNotEqual(done.code, 0, "it wrote where only root may")
        self.assertFalse(os.path.exists("/run/vpcctl-data/mine"))

    def test_host_name(self):
        self.assertEqual(os.uname()[1], "sandbox")

    def test_a_sandbox_in_the_sandbox(self):
        inner = vpcctl("sandbox", "--", "sh", "-c",
                       "mkdir /etc/netns/inner; ip -br address show dev eth0; head -c 4 /etc/passwd; exit 9",
                       code=9)
        self.assertIn("192.0.2.2/24", inner.out)
        self.assertIn("root", inner.out)
        self.assertEqual(os.listdir("/etc/netns"), [])


class HelpersTest(SandboxTest):
    """The helpers tell apart what they are trusted to tell apart."""

    def setUp(self):
        SandboxTest.setUp(self)
        for argv in (["ip", "netns", "add", "far"],
                     ["ip", "link", "add", "near0", "type", "veth", "peer", "name", "far0", "netns", "far"],
                     ["ip", "address", "add", "10.77.0.1/24", "dev", "near0"],
                     ["ip", "link", "set", "near0", "up"],
                     ["ip", "-n", "far", "address", "add", "10.77.0.2/24", "dev", "far0"],
                     ["ip", "-n", "far", "link", "set", "far0", "up"]):
            self.assertEqual(run(argv).code, 0, argv)
        self.addCleanup(self.assert_as_before)
        self.addCleanup(run, ["ip", "netns", "delete", "far"])

    def tearDown(self):
        pass

    def test_probes(self):
        self.assert_ping(None, "10.77.0.2")
        self.assert_ping("far", "10.77.0.1")
        self.assert_refused("far", "10.77.0.1", 7)
        with tcp_listener(None, 7) as seen:
            self.assert_open("far", "10.77.0.1", 7)
            self.assertEqual(tcp_ask("far", "10.77.0.1", 7, b"abc"), b"abc")
            self.assertEqual(seen, ["10.77.0.2"] * 2)
        self.assertFalse(udp_answers("far", "10.77.0.1", 7))
        with udp_listener("far", 7):
            self.assertTrue(udp_answers(None, "10.77.0.2", 7, LONG))
        in_ns("far", ["iptables", "-A", "INPUT", "-j", "DROP"])
        self.assert_dropped(None, "10.77.0.2", 7)
        self.assert_no_ping(None, "10.77.0.2")
        self.assertEqual(tcp_open("far", "198.51.100.1", 7), "dropped")
        self.assertFalse(ping("far", "198.51.100.1"))

    def test_snapshot_sees(self):
        before = snapshot()
        assert_same(before, snapshot())
        for section, do, undo in (
                ("links", ["ip", "link", "set", "near0", "alias", "x"],
                 ["ip", "link", "set", "near0", "alias", ""]),
                ("routes", ["ip", "route", "add", "10.78.0.0/24", "via", "10.77.0.2", "table", "78"],
                 ["ip", "route", "flush", "table", "78"]),
                ("rules", ["ip", "rule", "add", "iif", "near0", "lookup", "78"],
                 ["ip", "rule", "delete", "iif", "near0", "lookup", "78"]),
                ("iptables", ["iptables", "-N", "mine"], ["iptables", "-X", "mine"]),
                ("iptables", ["iptables", "-t", "nat", "-A", "POSTROUTING", "-j", "MASQUERADE"],
                 ["iptables", "-t", "nat", "-F"]),
                ("iptables", ["iptables", "-P", "FORWARD", "DROP"], ["iptables", "-P", "FORWARD", "ACCEPT"]),
                ("neighbours",
                 ["ip", "neigh", "add", "10.77.0.9", "lladdr", "02:00:00:00:00:09", "dev", "near0"],
                 ["ip", "neigh", "delete", "10.77.0.9", "dev", "near0"]),
                ("sysctls", ["sh", "-c", "echo 1 > /proc/sys/net/ipv4/conf/near0/forwarding"],
                 ["sh", "-c", "echo 0 > /proc/sys/net/ipv4/conf/near0/forwarding"]),
                ("namespaces", ["ip", "netns", "add", "more"], ["ip", "netns", "delete", "more"]),
                ("data", ["touch", "/run/vpcctl-data/vpc_x.json"], ["rm", "/run/vpcctl-data/vpc_x.json"])):
            with self.subTest(" ".join(do)):
                self.assertEqual(run(do).code, 0)
                with self.assertRaisesRegex(AssertionError, section):
                    assert_same(before, snapshot())
                self.assertEqual(run(undo).code, 0)
                assert_same(before, snapshot())


if __name__ == "__main__":
    unittest.main()
