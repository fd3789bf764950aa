"""Attacks on the isolation, each from the attacker's side, with the allowed way tried at the same moment."""

import os
import socket
import struct
import unittest

from packets import (BROADCAST, ICMP, Ear, Probe, arp, check, checksum, counter, datagram, echoing, ether, ipv4, mac_of,
                     neighbour_net, send_frames, settle, switch, switch_in, ways)
from support import (INTERNET, SandboxTest, assert_same, entered, internet_pid, port_command, record, run, snapshot,
                     socket_in, subnet, vpcctl)

NF = "net/bridge/bridge-nf-call-iptables"


class World(SandboxTest):
    """One machine for all tests of a class: three VPCs, two networks beside the host, and the internet.

        blue 10.1/16 (b1, b2), NAT for b1 only, b1 published      side1 192.168.71.2
        red  10.2/16 (r1, r2), peered with blue: b1 - r1          side2 192.168.72.2
        green 10.3/16 (g1),    peered with red:  r1 - g1          the internet, with a route to all of them
    """

    @classmethod
    def setUpClass(cls):
        SandboxTest.setUpClass()
        cls.first = snapshot()
        cls.net = internet_pid()
        with entered(cls.net):
            settle("ip", "route", "add", "10.0.0.0/8", "via", "192.0.2.2")
            settle("ip", "route", "add", "192.168.0.0/16", "via", "192.0.2.2")
        neighbour_net("side1", "192.168.71.2", "192.168.71.1")
        neighbour_net("side2", "192.168.72.2", "192.168.72.1")
        cls.build()

    @classmethod
    def build(cls):
        """Make the VPCs."""
        for number, name, subnets in ((1, "blue", ("b1", "b2")), (2, "red", ("r1", "r2")), (3, "green", ("g1",))):
            vpcctl("create", name, "--cidr", "10.%d.0.0/16" % number)
            for place, sub in enumerate(subnets, 1):
                vpcctl("add-subnet", name, sub, "--cidr", "10.%d.%d.0/24" % (number, place))
        vpcctl("peer", "blue", "red", "--allow-cidrs", "10.1.1.0/24,10.2.1.0/24")
        vpcctl("peer", "red", "green", "--allow-cidrs", "10.2.1.0/24,10.3.1.0/24")
        vpcctl("enable-nat", "blue", "--interface", "eth0", "--subnet-filter", "b1")
        vpcctl("publish", "blue", "b1", "--port", "8080:7", "--interface", "eth0")

    @classmethod
    def tearDownClass(cls):
        vpcctl("cleanup-all")
        for name in ("side1", "side2"):
            run(["ip", "netns", "delete", name])
            run(["ip", "link", "delete", name + "0"])
        assert_same(cls.first, snapshot())

    def setUp(self):
        pass

    def tearDown(self):
        pass

    def nothing_amiss(self):
        """verify finds nothing."""
        self.assertEqual(vpcctl("verify").code, 0)

    def core(self, what, without=()):
        """The promises of the README's table, each way tried by tcp, udp and icmp, all at the same time."""
        probes = [probe for name, probes in self.promises() if name not in without for probe in probes]
        with echoing("ns-blue-b1", "ns-blue-b2", "ns-red-r1", "ns-red-r2", "ns-green-g1", "side1", "side2", None):
            check(self, probes, what)

    def promises(self):
        """(name, probes) of every row."""
        b1, b2, r1, r2, g1 = "ns-blue-b1", "ns-blue-b2", "ns-red-r1", "ns-red-r2", "ns-green-g1"
        net = self.net
        return [
            ("siblings", ways(True, b1, "10.1.2.2") + ways(True, b2, "10.1.1.2")),
            ("gateway", [Probe(True, b1, "icmp", "10.1.1.1"), Probe(True, b1, "icmp", "10.1.0.1")]),
            ("peers", ways(True, b1, "10.2.1.2") + ways(True, r1, "10.1.1.2") + ways(True, r1, "10.3.1.2")),
            ("nat", [Probe(True, b1, "tcp", INTERNET, 80), Probe(True, b1, "icmp", INTERNET)]),
            ("published", [Probe(True, net, "tcp", "192.0.2.2", 8080)]),
            ("host", ways(True, None, "10.1.2.2") + ways(True, None, "10.3.1.2")),
            ("beside", ways(True, "side1", "192.168.71.1") + [Probe(True, net, "tcp", "192.0.2.2", 7)]),

            ("unlisted", ways(False, b2, "10.2.1.2") + ways(False, r1, "10.1.2.2") + ways(False, b1, "10.2.2.2")
             + ways(False, r2, "10.1.1.2") + ways(False, r2, "10.3.1.2")),
            ("unpeered", ways(False, b1, "10.3.1.2") + ways(False, b2, "10.3.1.2") + ways(False, g1, "10.1.1.2")
             + ways(False, g1, "10.1.2.2")),
            ("gateways", sum([ways(False, b1, address) for address in ("10.2.0.1", "10.2.1.1", "10.3.0.1")], [])
             + [Probe(False, b1, "tcp", "10.1.1.1"), Probe(False, b1, "udp", "10.1.0.1"),
                Probe(False, b2, "tcp", "10.1.1.1")]),
            ("services", ways(False, b1, "192.0.2.2") + ways(False, b1, "192.168.71.1")
             + ways(False, g1, "192.0.2.2") + [Probe(False, b1, "tcp", "192.0.2.2", 8080),
                                               Probe(False, g1, "tcp", "192.0.2.2", 8080)]),
            ("unmasqueraded", [Probe(False, b2, "tcp", INTERNET, 80), Probe(False, b2, "icmp", INTERNET),
                               Probe(False, g1, "tcp", INTERNET, 80), Probe(False, g1, "icmp", INTERNET)]),
            ("inward", ways(False, net, "10.1.1.2") + ways(False, net, "10.1.2.2") + ways(False, net, "10.2.1.2")),
            ("side", ways(False, "side1", "10.1.1.2") + ways(False, "side1", "10.3.1.2")
             + ways(False, b1, "192.168.71.2") + ways(False, r1, "192.168.71.2")),
            ("router", ways(False, "side1", "192.168.72.2") + ways(False, net, "192.168.71.2")
             + [Probe(False, "side1", "tcp", INTERNET, 80)]),
        ]

    # -- packets by hand

    def wire(self, vpc, name):
        """A subnet's namespace, inner device, hardware address, and that of its gateway."""
        found = subnet(vpc, name)
        return found["ns"], found["veth"] + "-a", found["mac"], mac_of("br-" + vpc)

    def forged(self, what, siblings=("10.1.1.2", "10.1.9.9")):
        """A workload sends with every address that is not its own; only its own gets through."""
        ns, device, own, gate = self.wire("blue", "b2")
        b1 = subnet("blue", "b1")["mac"]
        frames, number = [], 0
        targets = ("10.2.1.2", "10.2.2.2", "10.1.1.2", "10.3.1.2", "198.51.100.7")
        for mac in (own, b1, gate, mac_of("br-red")):
            for source in siblings + ("10.1.1.1", "10.1.2.1", "10.1.0.1", "10.2.1.2", "10.2.1.9", "10.3.1.2", "192.0.2.2",
                                      "127.0.0.1", "0.0.0.0", "255.255.255.255", "203.0.113.1"):
                for target in targets:
                    packet = datagram(source, target, b"<forged %03d>" % number)
                    frames.append(ether(gate, mac, packet))
                    # dies at the gateway, whose error would carry it to the forged address
                    frames.append(ether(gate, mac, ipv4(source, target, 17, packet[20:], ttl=1)))
                    number += 1
        for mac in (b1, gate) if siblings else ():      # its own address, but another's hardware address
            frames.append(ether(gate, mac, datagram("10.1.2.2", "10.1.1.2", b"<forged mac>")))
        control = [ether(gate, own, datagram("10.1.2.2", "10.1.1.2", b"<control>"))]
        red = self.wire("red", "r1")
        ears = [Ear(*self.wire(*place)[:2]) for place in (("red", "r1"), ("red", "r2"), ("blue", "b1"), ("green", "g1"))]
        with ears[0], ears[1], ears[2], ears[3], Ear(self.net, "eth0") as outside:
            send_frames(ns, device, frames + control)
            self.assertTrue(ears[2].wait(b"<control>"), "the control did not arrive")
            send_frames(red[0], red[1], [ether(red[3], red[2], datagram("10.2.1.2", "10.3.1.2", b"<control>"))])
            self.assertTrue(ears[3].wait(b"<control>"), "the control did not arrive")
            for ear in ears + [outside]:
                # in its own VPC the gateway's error (icmp) may quote it: siblings may talk anyway
                self.assertEqual([frame for frame in ear.frames if b"<forged" in frame and (
                    frame[23] != ICMP or ear is not ears[2])], [], "%s: %s" % (what, ear.ns))

    def strange_targets(self):
        """Addresses that are the host's in another way: loopback, broadcast, multicast, source routes, fragments."""
        ns, device, own, gate = self.wire("blue", "b1")
        hop = struct.pack("!BBB4sB", 0x83, 7, 4, socket.inet_aton("10.2.2.2"), 0)      # loose source route
        frames = [ether(to, own, datagram("10.1.1.2", target, b"<strange>", dport=9))
                  for to in (gate, BROADCAST, "01:00:5e:00:00:01")
                  for target in ("127.0.0.1", "127.0.0.53", "255.255.255.255", "10.1.255.255", "10.1.1.255", "224.0.0.1",
                                 "10.1.0.0", "0.0.0.0", "10.1.0.1", "10.1.1.1", "10.1.2.1", "10.2.0.1", "192.0.2.2",
                                 "192.0.2.255", "192.168.71.1")]
        for target in ("10.1.0.1", "10.1.1.1", "10.1.2.2"):
            packet = datagram("10.1.1.2", target, b"<routed>")
            frames.append(ether(gate, own, ipv4("10.1.1.2", target, 17, packet[20:], options=hop)))
        whole = datagram("10.1.1.2", "10.2.2.2", b"<frag>" * 20)[20:]
        frames += [ether(gate, own, ipv4("10.1.1.2", "10.2.2.2", 17, whole[:64], 99, 0x2000)),
                   ether(gate, own, ipv4("10.1.1.2", "10.2.2.2", 17, whole[64:], 99, 8))]
        with socket_in(None, socket.SOCK_DGRAM) as host, Ear(*self.wire("red", "r2")[:2]) as r2, \
                Ear(*self.wire("blue", "b2")[:2]) as b2:
            host.bind(("0.0.0.0", 9))
            host.settimeout(5)
            send_frames(ns, device, frames + [ether(gate, own, datagram("10.1.1.2", "10.1.2.2", b"<control>"))])
            self.assertTrue(b2.wait(b"<control>"))
            with socket_in("side1", socket.SOCK_DGRAM) as other:
                other.sendto(b"control", ("192.168.71.1", 9))
            self.assertEqual(host.recv(100), b"control", "the host heard a VPC")
            self.assertEqual(r2.heard(b"<routed>") + r2.heard(b"<frag>") + r2.heard(b"<strange>"), 0)


class MatrixTest(World):
    """The same answers whatever the host's settings, and with either layer gone."""

    def every(self, key, values):
        """Set a switch to each value in turn, and back; a switch that is not there is left out."""
        try:
            before = switch(key)
        except OSError:
            yield "absent"
            return
        try:
            for value in values:
                switch(key, value)
                yield value
        finally:
            switch(key, before)

    def test_bridge_nf_and_forward_policy(self):
        try:
            for nf in self.every(NF, ("0", "1")):
                for policy in ("ACCEPT", "DROP"):
                    settle("iptables", "-P", "FORWARD", policy)
                    self.core("bridge-nf-call-iptables %s, FORWARD %s" % (nf, policy))
            self.nothing_amiss()
        finally:
            settle("iptables", "-P", "FORWARD", "ACCEPT")

    def test_a_careless_host(self):
        """Switches that other programs turn on for all interfaces (kube-proxy: route_localnet) change nothing."""
        loose = {"rp_filter": "2", "route_localnet": "1", "accept_source_route": "1", "accept_redirects": "1",
                 "send_redirects": "1", "secure_redirects": "0", "proxy_arp": "1", "log_martians": "0"}
        before = {name: switch("net/ipv4/conf/all/" + name) for name in loose}
        try:
            for name, value in loose.items():
                switch("net/ipv4/conf/all/" + name, value)
            self.core("all.rp_filter=2, route_localnet, source_route, redirects, proxy_arp")
            self.forged("careless host")
            self.strange_targets()
        finally:
            for name, value in before.items():
                switch("net/ipv4/conf/all/" + name, value)

    def test_firewall_flushed(self):
        """iptables -F: the routing tables still isolate. Not the host's own addresses, nor NAT's way back in."""
        settle("iptables", "-F")
        settle("iptables", "-t", "raw", "-F")
        self.core("iptables -F", without=("gateways", "services", "inward", "published"))
        self.forged("iptables -F", siblings=())
        found = vpcctl("verify", code=1).out
        for text in ("-I FORWARD 1 -i br-red -j vpc-red", "-I FORWARD 1 -o br-red -j vpc-red", "-j vpc-in-green",
                     "vpc-src-blue", "vpc-peer-blue-red", "vpcctl-guard"):
            with self.subTest(text):
                self.assertIn(text, found)
        vpcctl("restore")
        self.nothing_amiss()
        self.core("restored after iptables -F")

    def test_chains_deleted(self):
        """iptables -F and -X, as a firewall that starts anew: restore makes the chains again."""
        settle("iptables", "-F")
        settle("iptables", "-X")
        self.assertIn("chain vpc-src-red", vpcctl("verify", code=1).out)
        vpcctl("restore")
        self.nothing_amiss()
        self.core("restored after iptables -X")

    def test_routing_rules_flushed(self):
        """As systemd-networkd does with rules that it did not make: the firewall still isolates."""
        count = 0
        for line in settle("ip", "rule").splitlines():
            if "proto 118" in line or line.startswith("700"):
                settle("ip", "rule", "del", "pref", line.split(":")[0])
                count += 1
        self.assertGreater(count, 12)
        self.core("routing rules gone")
        found = vpcctl("verify", code=1).out
        for text in ("iif br-blue lookup 7001", "iif br-red from 10.2.0.0/16 lookup 7000", "from 10.1.1.0/24 lookup main",
                     "iif eth0 to 10.1.0.0/16", "to 10.3.0.0/16 blackhole"):
            with self.subTest(text):
                self.assertIn(text, found)
        settle("ip", "route", "flush", "table", "7002")
        self.assertIn("table 7002", vpcctl("verify", code=1).out)
        vpcctl("restore")
        self.nothing_amiss()
        self.core("routing rules restored")

    def test_another_program_puts_its_rules_first(self):
        """Docker, started later, stands before our jumps and accepts what its own network sends anywhere."""
        first = [("-i", "side10", "!", "-o", "side10"), ("-o", "side10")]
        for words in first:
            settle("iptables", "-I", "FORWARD", *words + ("-j", "ACCEPT"))
        try:
            switch("net/ipv4/conf/side10/forwarding", 1)
            with echoing("ns-blue-b1", "ns-green-g1", "side1", "ns-blue-b2", "ns-red-r1"):
                check(self, ways(False, "side1", "10.1.1.2") + ways(False, "side1", "10.3.1.2")
                      + ways(False, "ns-blue-b1", "192.168.71.2") + ways(False, "ns-red-r1", "192.168.71.2")
                      + ways(True, "ns-blue-b1", "10.1.2.2") + [Probe(True, "ns-blue-b1", "tcp", INTERNET, 80)])
            self.assertIn("-i br-blue -j vpc-blue", vpcctl("verify", code=1).out)
            vpcctl("restore")
            self.nothing_amiss()
            self.assertEqual(settle("iptables", "-S", "FORWARD").splitlines()[-2], "-A FORWARD -i side10 ! -o side10 -j ACCEPT")
        finally:
            for words in first:
                settle("iptables", "-D", "FORWARD", *words + ("-j", "ACCEPT"))
        self.core("after restore")


class ForgeryTest(World):
    """A hostile root in b2 (and b1), with frames of its own making."""

    def test_forged_senders(self):
        self.forged("forged senders")
        with echoing("ns-red-r1"):
            check(self, [Probe(True, "ns-blue-b1", "tcp", "10.2.1.2"), Probe(False, "ns-blue-b2", "tcp", "10.2.1.2")])

    def test_borrowed_address_with_an_honest_stack(self):
        """b2 gives itself b1's address, and then b1's hardware address as well, to pass red's list."""
        ns, device, own, _ = self.wire("blue", "b2")
        with echoing("ns-red-r1", "ns-blue-b1", "ns-green-g1"):
            try:
                settle("ip", "-n", ns, "address", "add", "10.1.1.2/32", "dev", device)
                settle("ip", "-n", ns, "address", "add", "10.2.1.9/32", "dev", device)
                probes = [Probe(False, ns, kind, target, source=source) for kind in ("tcp", "udp")
                          for source in ("10.1.1.2", "10.2.1.9") for target in ("10.2.1.2", "10.3.1.2")]
                check(self, probes + ways(True, "ns-blue-b1", "10.2.1.2"))
                for mac in (subnet("blue", "b1")["mac"], mac_of("br-blue")):
                    settle("ip", "-n", ns, "link", "set", device, "address", mac)
                    check(self, probes + ways(True, "ns-blue-b1", "10.2.1.2") + ways(False, ns, "10.2.1.2"))
            finally:
                settle("ip", "-n", ns, "link", "set", device, "address", own)
                settle("ip", "-n", ns, "address", "del", "10.1.1.2/32", "dev", device)
                settle("ip", "-n", ns, "address", "del", "10.2.1.9/32", "dev", device)
            check(self, ways(True, ns, "10.1.1.2") + ways(False, ns, "10.2.1.2"))

    def test_on_link_routes_and_foreign_hardware_addresses(self):
        """Frames straight to a sibling, to the peer's switch and subnets, to the cable: layer 2 reaches the gateway only."""
        ns, device, own, gate = self.wire("blue", "b1")
        far = [subnet("blue", "b2")["mac"], subnet("red", "r1")["mac"], subnet("red", "r2")["mac"], mac_of("br-red"),
               subnet("green", "g1")["mac"], mac_of("br-green"), BROADCAST, "01:00:5e:00:00:01", "33:33:00:00:00:01",
               "01:80:c2:00:00:00", "02:00:00:00:00:99"]
        frames = [ether(mac, own, datagram("10.1.1.2", target, b"<onlink>"))
                  for mac in far for target in ("10.2.2.2", "10.3.1.2", "10.1.2.2", "10.2.1.2", "10.1.9.9")]
        frames += [ether(mac, own, struct.pack("!HH", tag, 0x0800) + datagram("10.1.1.2", "10.2.2.2", b"<onlink>"), 0x8100)
                   for mac in far + [gate] for tag in (0, 1, 7)]
        ears = [Ear(*self.wire(*place)[:2]) for place in (("blue", "b2"), ("red", "r1"), ("red", "r2"), ("green", "g1"))]
        with ears[0], ears[1], ears[2], ears[3]:
            send_frames(ns, device, frames + [ether(gate, own, datagram("10.1.1.2", target, b"<control>"))
                                              for target in ("10.1.2.2", "10.2.1.2")])
            self.assertTrue(ears[0].wait(b"<control>") and ears[1].wait(b"<control>"), "the control did not arrive")
            # broadcast frames are the gateway's, too: it may route those that are allowed anyway
            self.assertEqual([(ear.ns, frame) for ear in ears[2:] for frame in ear.frames if b"<onlink>" in frame], [])
            for ear in ears[:2]:
                self.assertEqual({frame[6:12] for frame in ear.frames if b"<onlink>" in frame} - {
                    bytes.fromhex(mac_of("br-blue").replace(":", "")), bytes.fromhex(mac_of("br-red").replace(":", ""))},
                    set(), "a frame came around the gateway")

    def test_on_link_routes_with_an_honest_stack(self):
        """The same by typing it: routes without a gateway, neighbours by hand, the peer's gateway as one's own."""
        ns, device = self.wire("blue", "b1")[:2]
        for words in ("10.2.2.0/24 dev %s", "10.3.1.0/24 via 10.2.1.1 dev %s onlink", "10.1.2.0/24 dev %s"):
            settle("ip", "-n", ns, "route", "add", *(words % device).split())
        for address, mac in (("10.2.2.2", subnet("red", "r2")["mac"]), ("10.2.1.1", mac_of("br-red")),
                             ("10.1.2.2", subnet("blue", "b2")["mac"])):
            settle("ip", "-n", ns, "neigh", "replace", address, "lladdr", mac, "dev", device)
        try:
            with echoing("ns-red-r2", "ns-red-r1", "ns-green-g1", "ns-blue-b2"):
                check(self, ways(False, ns, "10.2.2.2") + ways(False, ns, "10.3.1.2") + ways(False, ns, "10.1.2.2")
                      + ways(True, ns, "10.2.1.2"))
        finally:
            for block in ("10.2.2.0/24", "10.3.1.0/24", "10.1.2.0/24"):
                settle("ip", "-n", ns, "route", "del", block)
        with echoing("ns-blue-b2"):
            check(self, ways(True, ns, "10.1.2.2"))

    def test_forged_arp(self):
        """b2 says that b1's address, the gateway and red's are at its own: nobody believes it, nobody even hears it."""
        ns, device, own, gate = self.wire("blue", "b2")
        nobody = "00:00:00:00:00:00"
        claims = ("10.1.1.2", "10.1.1.1", "10.1.0.1", "10.2.1.2", "10.1.2.1")
        frames = [ether(to, own, arp(operation, own, claim, nobody, asked), 0x0806) for to in (BROADCAST, gate)
                  for operation in (1, 2) for claim in claims for asked in (claim, "10.1.2.1", "10.1.1.2", "10.2.0.1")]
        with Ear(*self.wire("blue", "b1")[:2]) as b1, Ear(*self.wire("red", "r1")[:2]) as r1, Ear(ns, device) as mine, \
                echoing("ns-blue-b1", "ns-blue-b2", "ns-red-r1"):
            send_frames(ns, device, frames * 3)
            check(self, ways(True, None, "10.1.1.2") + ways(True, "ns-red-r1", "10.1.1.2")
                  + ways(True, "ns-blue-b1", "10.2.1.2") + ways(True, "ns-blue-b1", "10.1.2.2"), "after forged ARP")
            heard = [frame for ear in (b1, r1) for frame in ear.frames if frame[12:14] == b"\x08\x06"
                     and frame[6:12] == bytes.fromhex(own.replace(":", ""))]
            self.assertEqual(heard, [])
            answers = {socket.inet_ntoa(frame[28:32]) for frame in mine.frames
                       if frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\2"}
            self.assertNotIn("10.2.0.1", answers, "the host answers for another VPC's gateway")
            self.assertIn("10.1.2.1", answers, "the control: it answers for this VPC's")
        table = settle("ip", "neigh", "show", "10.1.1.2", "dev", "br-blue")
        self.assertIn(subnet("blue", "b1")["mac"], table)
        self.assertIn("PERMANENT", table)

    def test_redirects(self):
        """A sibling's ICMP redirects do not arrive, the gateway sends none, and a subnet would follow none."""
        ns, device, own, gate = self.wire("blue", "b2")
        victim, inside = self.wire("blue", "b1")[:2]
        quoted = ipv4("10.1.1.2", "10.1.2.2", ICMP, b"<quoted>")[:28]
        frames = []
        for source in ("10.1.1.1", "10.1.2.2", "10.1.0.1"):
            body = struct.pack("!BBH4s", 5, 1, 0, socket.inet_aton("10.1.2.2")) + quoted
            body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
            for to in (subnet("blue", "b1")["mac"], BROADCAST, gate):
                frames.append(ether(to, own, ipv4(source, "10.1.1.2", ICMP, body)))
        with Ear(victim, inside) as ear, echoing("ns-blue-b2"):
            send_frames(ns, device, frames)
            for _ in range(3):
                check(self, ways(True, victim, "10.1.2.2"))
            redirects = [socket.inet_ntoa(frame[26:30]) for frame in ear.frames
                         if frame[12:14] == b"\x08\0" and frame[23] == ICMP and frame[34] == 5]
            # with its own address a sibling may send what it likes by the gateway; it is not the victim's gateway
            self.assertEqual(set(redirects) - {"10.1.2.2"}, set())
        with entered(victim):
            for name in os.listdir("/proc/sys/net/ipv4/conf"):
                if name != "lo":
                    self.assertEqual(switch("net/ipv4/conf/%s/accept_redirects" % name), "0", name)

    def test_strange_targets(self):
        self.strange_targets()

    @unittest.skipUnless(os.path.exists("/proc/sys/net/ipv6"), "no IPv6 here")
    def test_ipv6_turned_on_again(self):
        """Link-local addresses, router advertisements and solicitations of a hostile root reach nobody."""
        for device in os.listdir("/sys/class/net"):
            if device.startswith(("br-", "v-", "pv-")):
                self.assertEqual(switch("net/ipv6/conf/%s/disable_ipv6" % device), "1", device)
        places = [self.wire("blue", "b1"), self.wire("blue", "b2"), self.wire("red", "r1")]
        for number, (ns, device, _, _) in enumerate(places, 1):
            switch_in(ns, "net/ipv6/conf/all/disable_ipv6", 0)
            switch_in(ns, "net/ipv6/conf/%s/disable_ipv6" % device, 0)
            switch_in(ns, "net/ipv6/conf/%s/accept_dad" % device, 0)
            settle("ip", "-n", ns, "address", "replace", "fd00::%d/64" % number, "dev", device, "nodad")
        try:
            ns, device, own, gate = places[0]
            source = socket.inet_pton(socket.AF_INET6, "fd00::1")
            frames = []
            for to, target in ((BROADCAST, "ff02::1"), ("33:33:00:00:00:01", "ff02::1"), (places[1][2], "fd00::2"),
                               (gate, "fd00::2"), (places[2][2], "fd00::3"), (gate, "ff02::2")):
                far = socket.inet_pton(socket.AF_INET6, target)
                for kind in (128, 134, 135, 136, 137):      # echo, router advertisement, neighbours, redirect
                    body = struct.pack("!BBH", kind, 0, 0) + b"<sixth><sixth><sixth>" + bytes(3)
                    pseudo = source + far + struct.pack("!II", len(body), 58)
                    body = body[:2] + struct.pack("!H", checksum(pseudo + body)) + body[4:]
                    frames.append(ether(to, own, struct.pack("!IHBB", 6 << 28, len(body), 58, 255) + source + far + body,
                                        0x86dd))
            with Ear(*places[1][:2]) as b2, Ear(*places[2][:2]) as r1, Ear(ns, device) as mine:
                send_frames(ns, device, frames + [ether(gate, own, datagram("10.1.1.2", "10.1.2.2", b"<control>"))])
                self.assertTrue(b2.wait(b"<control>"))
                for ear in (b2, r1):
                    self.assertEqual([frame for frame in ear.frames if frame[12:14] == b"\x86\xdd" and
                                      frame[6:12] == bytes.fromhex(own.replace(":", ""))], [])
                self.assertEqual([frame for frame in mine.frames if frame[12:14] == b"\x86\xdd"], [], "somebody answered")
            self.assertEqual(settle("ip", "-6", "address", "show", "dev", "br-blue"), "")
            for name in ("all", "v-blue-b1-a"):
                self.assertIn("disable_ipv6", vpcctl("verify", code=1).out)
        finally:
            vpcctl("restore")
        self.nothing_amiss()

    def test_strangers_on_a_port(self):
        """What is unplugged, unlocked or taught by somebody is named by verify and put right by restore."""
        port = subnet("blue", "b2")["veth"] + "-b"
        changes = [("ip link set %s type bridge_slave isolated off" % port, "port %s: isolated" % port),
                   ("ip link set %s type bridge_slave learning on" % port, "port %s: isolated" % port),
                   ("bridge fdb del %s dev %s master" % (subnet("blue", "b2")["mac"], port), "port %s: forwarding" % port),
                   ("ip neigh del 10.1.1.2 dev br-blue", "neighbour entry for 10.1.1.2"),
                   ("echo 0 >/proc/sys/net/ipv4/conf/br-blue/rp_filter", "br-blue.rp_filter"),
                   ("echo 0 >/proc/sys/net/ipv4/conf/br-blue/arp_ignore", "br-blue.arp_ignore"),
                   ("echo 0 >/proc/sys/net/ipv6/conf/br-blue/disable_ipv6", "br-blue.disable_ipv6"),
                   ("echo 1 >/proc/sys/net/ipv4/conf/side10/forwarding", "side10.forwarding"),
                   (port_command("pv-blue-red-a", "bcast_flood", "on"), "pv-blue-red-a: bcast_flood"),
                   ("iptables -D vpc-src-blue -s 10.1.2.0/24 -m mac --mac-source %s -m comment --comment vpcctl:blue "
                    "-j RETURN" % subnet("blue", "b2")["mac"], "vpc-src-blue 1 -s 10.1.2.0/24"),
                   ("ip route del unreachable 10.3.0.0/16 table 7000", "table 7000: the way to 10.3.0.0/16"),
                   ("ip netns exec ns-blue-b2 sh -c 'echo 1 >/proc/sys/net/ipv4/conf/all/accept_redirects'", "accept_redirects"),
                   ("ip netns exec ns-blue-b2 iptables -F INPUT", "ns-blue-b2: policy")]
        if not record("blue").get("unlocked"):
            changes.append((port_command(port, "locked", "off"), "port %s: locked" % port))
        if not os.path.exists("/proc/sys/net/ipv6"):
            changes = [item for item in changes if "ipv6" not in item[0]]
        for do, _ in changes:
            settle(*(["sh", "-c", do] if isinstance(do, str) else do))
        found = vpcctl("verify", code=1).out
        for do, text in changes:
            with self.subTest(do):
                self.assertIn(text, found)
        vpcctl("restore")
        self.nothing_amiss()
        self.core("restored")


class TriangleTest(World):
    """Three VPCs, each peered with each: in public tools one broadcast circles for ever."""

    @classmethod
    def build(cls):
        for number, name in ((1, "blue"), (2, "red"), (3, "green")):
            vpcctl("create", name, "--cidr", "10.%d.0.0/16" % number)
            vpcctl("add-subnet", name, "s", "--cidr", "10.%d.1.0/24" % number)
        for a, b in ((1, 2), (2, 3), (1, 3)):
            names = ("", "blue", "red", "green")
            vpcctl("peer", names[a], names[b], "--allow-cidrs", "10.%d.1.0/24,10.%d.1.0/24" % (a, b))

    def test_broadcast_stays(self):
        ns, device, own, gate = self.wire("blue", "s")
        cables = sorted(name for name in os.listdir("/sys/class/net") if name.startswith("pv-"))
        self.assertEqual(len(cables), 6)
        port = subnet("blue", "s")["veth"] + "-b"
        count = 50
        frames = []
        for number in range(count):
            frames += [ether(BROADCAST, own, arp(1, own, "10.1.1.2", "00:00:00:00:00:00", "10.%d.1.2" % (number % 3 + 1)), 0x0806),
                       ether(BROADCAST, own, datagram("10.1.1.2", "255.255.255.255", b"<storm>")),
                       ether("01:00:5e:00:00:fb", own, datagram("10.1.1.2", "224.0.0.251", b"<storm>")),
                       ether("02:00:00:00:00:77", own, datagram("10.1.1.2", "10.2.1.77", b"<storm>"))]
        before = {name: counter(name, "rx_packets") for name in cables + [port]}
        with Ear(*self.wire("red", "s")[:2]) as red, Ear(*self.wire("green", "s")[:2]) as green, \
                echoing("ns-red-s", "ns-green-s"):
            send_frames(ns, device, frames)
            with socket_in(None, socket.SOCK_DGRAM) as host:      # which asks for addresses that nobody has
                for number in range(1, 21):
                    host.sendto(b"<storm>", ("10.1.9.%d" % number, 9))
            check(self, ways(True, ns, "10.2.1.2") + ways(True, ns, "10.3.1.2") + ways(True, "ns-red-s", "10.3.1.2"))
            self.assertEqual(red.heard(b"<storm>") + green.heard(b"<storm>"), 0)
            blue = bytes.fromhex(gate.replace(":", ""))
            self.assertEqual([frame for ear in (red, green) for frame in ear.frames if blue in frame[:28]], [])
        after = {name: counter(name, "rx_packets") for name in cables + [port]}
        self.assertGreaterEqual(after[port] - before[port], 4 * count)
        for name in cables:
            # the host's own questions go to the other end of the cable, which is the host again; nothing else does
            self.assertLessEqual(after[name] - before[name], 22, "%s carried frames" % name)
        with Ear(None, "br-red") as switch_of_red:
            send_frames(ns, device, frames[:4])
            with echoing("ns-red-s"):
                check(self, [Probe(True, ns, "udp", "10.2.1.2")])
            self.assertEqual(switch_of_red.heard(b"<storm>"), 0)


if __name__ == "__main__":
    unittest.main()
