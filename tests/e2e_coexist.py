"""Other programs on the same host, and hosts on which something is missing."""

import os
import unittest

from packets import Ear, Probe, check, datagram, echoing, ether, mac_of, send_frames, settle, switch, ways
from support import INTERNET, SandboxTest, internet_pid, record, run, subnet, vpcctl

FORWARD = "net/ipv4/ip_forward"


def docker_up():
    """What Docker does to a host: bridge, forwarding, FORWARD DROP, its chains, NAT, and two containers."""
    settle("ip", "link", "add", "docker0", "type", "bridge")
    settle("ip", "address", "add", "172.17.0.1/16", "dev", "docker0")
    settle("ip", "link", "set", "docker0", "up")
    for number in (2, 3):
        name = "box%d" % number
        settle("ip", "netns", "add", name)
        settle("ip", "link", "add", "veth%d" % number, "type", "veth", "peer", "name", "eth0", "netns", name)
        settle("ip", "link", "set", "veth%d" % number, "master", "docker0")
        settle("ip", "link", "set", "veth%d" % number, "up")
        for words in ("link set lo up", "address add 172.17.0.%d/16 dev eth0" % number, "link set eth0 up",
                      "route add default via 172.17.0.1"):
            settle(*(["ip", "-n", name] + words.split()))
    if switch(FORWARD) == "0":
        switch(FORWARD, 1)
    docker_firewall()


def docker_firewall():
    """Docker puts its jumps on top of FORWARD, at its start and after each firewalld reload."""
    rules = """*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-USER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
-I FORWARD -i docker0 -o docker0 -j ACCEPT
-I FORWARD -i docker0 ! -o docker0 -j ACCEPT
-I FORWARD -o docker0 -j DOCKER
-I FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-I FORWARD -j DOCKER-ISOLATION-STAGE-1
-I FORWARD -j DOCKER-USER
-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 7 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
-A DOCKER-USER -j RETURN
COMMIT
*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8081 -j DNAT --to-destination 172.17.0.2:7
COMMIT
"""
    result = run(["iptables-restore", "--noflush"], input=rules)
    if result.code:
        raise AssertionError(str(result))


def docker_down():
    """Take it all away again."""
    for name in ("box2", "box3"):
        run(["ip", "netns", "del", name])
    run(["ip", "link", "del", "docker0"])
    lines = run(["iptables-save"]).out.splitlines()
    table = ""
    for line in lines:
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith("-A") and ("docker0" in line or "DOCKER" in line):
            run(["iptables", "-t", table, "-D"] + line.split()[1:])
    for chain in ("DOCKER", "DOCKER-USER", "DOCKER-ISOLATION-STAGE-1", "DOCKER-ISOLATION-STAGE-2"):
        run(["iptables", "-X", chain])
    run(["iptables", "-t", "nat", "-X", "DOCKER"])
    run(["iptables", "-P", "FORWARD", "ACCEPT"])


class DockerTest(SandboxTest):
    """A Docker-like network and two VPCs: both work, and neither reaches the other."""

    def tearDown(self):
        vpcctl("cleanup-all")
        docker_down()
        switch(FORWARD, 0)
        self.assert_as_before()

    def build(self):
        for number, vpc in ((1, "blue"), (2, "red")):
            vpcctl("create", vpc, "--cidr", "10.%d.0.0/16" % number)
            for place in (1, 2):
                vpcctl("add-subnet", vpc, "s%d" % place, "--cidr", "10.%d.%d.0/24" % (number, place))
        vpcctl("enable-nat", "blue", "--interface", "eth0")
        vpcctl("publish", "blue", "s1", "--port", "8080:7", "--interface", "eth0")

    def docker_alone(self):
        net = internet_pid()
        return ways(True, "box2", "172.17.0.3") + [
            Probe(True, "box2", "tcp", INTERNET, 80), Probe(True, "box3", "icmp", INTERNET),
            Probe(True, net, "tcp", "192.0.2.2", 8081), Probe(False, net, "tcp", "172.17.0.3", 7)]

    def vpcs(self):
        net, s1, s2, red = internet_pid(), "ns-blue-s1", "ns-blue-s2", "ns-red-s1"
        return (ways(True, s1, "10.1.2.2") + ways(True, red, "10.2.2.2")
                + [Probe(True, s1, "tcp", INTERNET, 80), Probe(True, s2, "icmp", INTERNET), Probe(True, net, "tcp", "192.0.2.2", 8080),
                   Probe(False, red, "tcp", INTERNET, 80)]
                + ways(False, s1, "10.2.1.2") + ways(False, red, "10.1.1.2") + ways(False, net, "10.1.2.2")
                # neither reaches the other; not its gateway, and not what it published, either
                + ways(False, s1, "172.17.0.2") + ways(False, s1, "172.17.0.3") + ways(False, red, "172.17.0.2")
                + ways(False, s1, "172.17.0.1") + ways(False, "box2", "10.1.1.2") + ways(False, "box2", "10.2.1.2")
                + ways(False, "box3", "10.1.2.2") + [Probe(False, s1, "tcp", "192.0.2.2", 8081), Probe(False, red, "tcp", "192.0.2.2", 8081),
                                                     Probe(False, "box2", "tcp", "192.0.2.2", 8080)])

    def listen(self, vpcs=True):
        places = ["box2", "box3"] + (["ns-blue-s1", "ns-blue-s2", "ns-red-s1", "ns-red-s2"] if vpcs else [])
        return echoing(*places)

    def test_docker_before(self):
        docker_up()
        with self.listen(vpcs=False):
            check(self, self.docker_alone(), "Docker alone")
        foreign = [line for line in settle("iptables-save").splitlines() if not line.startswith(("#", ":"))]
        self.build()
        with self.listen():
            check(self, self.docker_alone() + self.vpcs(), "Docker, then VPCs")
        self.assertNotIn("vpcctl-guard", settle("iptables-save"))
        self.assertEqual(vpcctl("verify").code, 0)
        vpcctl("cleanup-all")
        self.assertEqual(switch(FORWARD), "1", "it was 1 before")
        self.assertEqual([line for line in settle("iptables-save").splitlines() if not line.startswith(("#", ":"))
                          and line not in ("*raw", "*nat", "*filter", "*mangle", "COMMIT")],
                         [line for line in foreign if line not in ("*raw", "*nat", "*filter", "*mangle", "COMMIT")])
        with self.listen(vpcs=False):
            check(self, self.docker_alone(), "Docker after vpcctl has gone")

    def test_docker_after(self):
        """Docker puts its jumps before ours: until `restore`, the routing rules keep the two apart."""
        self.build()
        docker_up()
        with self.listen():
            check(self, self.docker_alone() + self.vpcs(), "VPCs, then Docker")
            self.assertIn("-j vpc-blue", vpcctl("verify", code=1).out)
            vpcctl("restore")
            self.assertEqual(vpcctl("verify").code, 0)
            check(self, self.docker_alone() + self.vpcs(), "restored")
            docker_firewall_again()
            check(self, self.docker_alone() + self.vpcs(), "Docker restarted")

    def test_a_bridge_that_looks_like_ours(self):
        """Docker names its networks br- and 12 hex digits: never touched, and refused as a name."""
        settle("ip", "link", "add", "br-0123456789ab", "type", "bridge")
        self.addCleanup(run, ["ip", "link", "del", "br-0123456789ab"])
        settle("ip", "address", "add", "172.20.0.1/16", "dev", "br-0123456789ab")
        vpcctl("create", "0123456789ab", "--cidr", "10.1.0.0/16")
        self.assertNotEqual(record("0123456789ab")["bridge"], "br-0123456789ab")
        refused = vpcctl("create", "x", "--cidr", "172.20.0.0/16", code=2)
        self.assertIn("172.20.0.0/16", refused.err)
        vpcctl("delete", "0123456789ab")
        self.assertIn("172.20.0.1/16", settle("ip", "address", "show", "dev", "br-0123456789ab"))
        settle("ip", "link", "del", "br-0123456789ab")


def docker_firewall_again():
    """A restarted Docker finds its chains and puts its jumps on top once more."""
    for words in ("-i docker0 -o docker0 -j ACCEPT", "-i docker0 ! -o docker0 -j ACCEPT", "-o docker0 -j DOCKER",
                  "-o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", "-j DOCKER-USER"):
        run(["iptables", "-D", "FORWARD"] + words.split())
        settle("iptables", "-I", "FORWARD", *words.split())


SHIM = """#!/bin/sh
# an `ip` of a kernel that knows no locked ports
for word in "$@"; do [ "$word" = locked ] && { echo 'RTNETLINK answers: Invalid argument' >&2; exit 2; }; done
if [ "$1" = -batch ]; then
    number=0
    while IFS= read -r line; do
        number=$((number + 1))
        case "$line" in *' locked '*) echo 'RTNETLINK answers: Invalid argument' >&2; echo "Command failed -:$number" >&2; exit 1;; esac
        REAL $line || { echo "Command failed -:$number" >&2; exit 1; }
    done
    exit 0
fi
exec REAL "$@"
"""


class MissingTest(SandboxTest):
    """Where an optional feature is missing, vpcctl works without it and verify says what that means."""

    def build(self, env=None):
        said = ""
        for words in ("create blue --cidr 10.1.0.0/16", "add-subnet blue b1 --cidr 10.1.1.0/24",
                      "add-subnet blue b2 --cidr 10.1.2.0/24", "create red --cidr 10.2.0.0/16",
                      "add-subnet red r1 --cidr 10.2.1.0/24", "peer blue red --allow-cidrs 10.1.1.0/24,10.2.1.0/24"):
            said += vpcctl(*words.split(), env=env).err
        return said

    def promises(self):
        with echoing("ns-blue-b1", "ns-blue-b2", "ns-red-r1"):
            check(self, ways(True, "ns-blue-b1", "10.1.2.2") + ways(True, "ns-blue-b1", "10.2.1.2") + ways(False, "ns-blue-b2", "10.2.1.2")
                  + ways(False, "ns-red-r1", "10.1.2.2") + ways(False, "ns-blue-b2", "10.2.0.1"))

    def test_no_locked_ports(self):
        real = run(["sh", "-c", "command -v ip"]).out.strip()
        path = self.file("ip", SHIM.replace("REAL", real))
        os.chmod(path, 0o755)
        env = {"PATH": os.path.dirname(path) + ":" + os.environ["PATH"]}
        said = self.build(env)
        self.assertIn("cannot lock ports", said)
        self.assertTrue(record("blue")["unlocked"])
        self.assertNotIn("locked on", settle("bridge", "-d", "link"))
        self.promises()
        verified = vpcctl("verify", env=env)
        self.assertIn("cannot lock bridge ports", verified.out)
        self.assertIn("hardware address", verified.out)
        self.assertEqual(vpcctl("restore", env=env).code, 0)
        # what that means: with its sibling's address alone b2 still does not pass, with both addresses it does
        b1, b2 = subnet("blue", "b1"), subnet("blue", "b2")
        gate, red = mac_of("br-blue"), subnet("red", "r1")
        with Ear(red["ns"], red["veth"] + "-a") as ear:
            send_frames(b2["ns"], b2["veth"] + "-a", [
                ether(gate, b2["mac"], datagram("10.1.1.2", "10.2.1.2", b"<address only>")),
                ether(gate, b1["mac"], datagram("10.1.1.2", "10.2.1.2", b"<both>"))])
            self.assertTrue(ear.wait(b"<both>"), "this is what verify warns of")
            self.assertEqual(ear.heard(b"<address only>"), 0)

    def test_no_br_netfilter(self):
        """Its switch at 0 is the same as its absence; verify says that nothing depends on it where it is absent."""
        key = "net/bridge/bridge-nf-call-iptables"
        if not os.path.exists("/proc/sys/" + key):
            self.build()
            self.promises()
            self.assertIn("br_netfilter is not loaded: nothing depends on it", vpcctl("verify").out)
            return
        before = switch(key)
        switch(key, 0)
        self.addCleanup(switch, key, before)
        self.build()
        self.promises()
        self.assertNotIn("br_netfilter", vpcctl("verify").out)
        self.hide("/proc/sys/net/bridge")
        self.assertIn("br_netfilter is not loaded: nothing depends on it", vpcctl("verify").out)
        settle("umount", "/proc/sys/net/bridge")
        switch(key, before)

    def hide(self, folder):
        """An empty folder over a folder of /proc/sys, for as long as the test runs."""
        empty = os.path.dirname(self.file("nothing", "")) + "/empty"
        os.mkdir(empty)
        settle("mount", "--bind", empty, folder)
        self.addCleanup(run, ["umount", folder])

    @unittest.skipUnless(os.path.exists("/proc/sys/net/ipv6/conf"), "there is none to hide")
    def test_no_ipv6(self):
        self.hide("/proc/sys/net/ipv6")
        self.build()
        vpcctl("enable-nat", "blue", "--interface", "eth0")
        self.promises()
        self.assertIn("no IPv6: there is none to switch off", vpcctl("verify").out)
        settle("ip", "link", "del", "br-red")
        vpcctl("restore")
        self.promises()
        vpcctl("cleanup-all")
        settle("umount", "/proc/sys/net/ipv6")


if __name__ == "__main__":
    unittest.main()
