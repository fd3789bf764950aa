"""NAT and published ports: only masqueraded sources go out, nothing comes in, the host's own forwarding is as it was."""

import contextlib
import errno
import socket
import struct
import unittest

from packets import (ICMP, TCP, Ear, Probe, check, datagram, echo_request, echoing, ether, ipv4, mac_of, neighbour_net,
                     send_frames, settle, switch, tcp, udp, ways)
from support import (INTERNET, LONG, SandboxTest, checksum, entered, http_get, internet_pid, listener, run, socket_in, subnet,
                     vpcctl, wait_until)

FORWARD = "net/ipv4/ip_forward"


def icmp_error(code, source, target, quoted, mtu=0):
    """A "destination unreachable" (3: port, 4: too big) from source to target about a packet."""
    body = struct.pack("!BBHHH", 3, code, 0, 0, mtu) + quoted
    return ipv4(source, target, ICMP, body[:2] + struct.pack("!H", checksum(body)) + body[4:])


def sources(ear):
    """The IPv4 senders that an ear has heard."""
    return {socket.inet_ntoa(frame[26:30]) for frame in ear.frames if frame[12:14] == b"\x08\0"}


class NatTest(SandboxTest):
    """blue has b1 and b2, red has r1; the internet has a route to all of them, which an honest one would not have."""

    def setUp(self):
        SandboxTest.setUp(self)
        self.net = internet_pid()
        for number, vpc, names in ((1, "blue", ("b1", "b2")), (2, "red", ("r1",))):
            vpcctl("create", vpc, "--cidr", "10.%d.0.0/16" % number)
            for place, name in enumerate(names, 1):
                vpcctl("add-subnet", vpc, name, "--cidr", "10.%d.%d.0/24" % (number, place))
        with entered(self.net):
            settle("ip", "route", "add", "10.0.0.0/8", "via", "192.0.2.2")
        self.addCleanup(self.forget_routes)

    def forget_routes(self):
        with entered(self.net):
            run(["ip", "route", "del", "10.0.0.0/8"])

    def tearDown(self):
        self.forget_routes()
        for name in ("side1", "side2"):
            run(["ip", "netns", "del", name])
            run(["ip", "link", "del", name + "0"])
        SandboxTest.tearDown(self)

    def wire(self, vpc, name):
        found = subnet(vpc, name)
        return found["ns"], found["veth"] + "-a", found["mac"], mac_of("br-" + vpc)

    def test_only_masqueraded_sources_go_out(self):
        vpcctl("enable-nat", "blue", "--interface", "eth0", "--subnet-filter", "b1")
        with Ear(self.net, "eth0") as outside:
            check(self, [Probe(True, "ns-blue-b1", "tcp", INTERNET, 80), Probe(True, "ns-blue-b1", "icmp", INTERNET),
                         Probe(False, "ns-blue-b2", "tcp", INTERNET, 80), Probe(False, "ns-blue-b2", "icmp", INTERNET),
                         Probe(False, "ns-red-r1", "tcp", INTERNET, 80), Probe(False, "ns-red-r1", "udp", "192.0.2.1", 53)])
            self.assertIn("You came from 192.0.2.2<", http_get("ns-blue-b1", INTERNET))
            for place in (("blue", "b1"), ("blue", "b2"), ("red", "r1")):
                self.spoof(outside, *self.wire(*place))
        self.assertEqual(sources(outside), {"192.0.2.2"})

    def spoof(self, outside, ns, device, own, gate):
        """All that conntrack does not take for a connection, and senders from everywhere; then one honest packet."""
        mine = settle("ip", "-n", ns, "-4", "-o", "address", "show", "dev", device).split()[3].split("/")[0]
        frames = []
        for target in (INTERNET, "192.0.2.1"):
            for number, flags in enumerate((0, 1, 3, 4, 6, 8, 20, 32, 41, 63, 255)):
                packet = ipv4(mine, target, TCP, tcp(mine, target, 6000 + number, 80, flags, b"<bad>"))
                frames += [ether(gate, own, packet)] * 2
            frames.append(ether(gate, own, ipv4(mine, target, 17, udp(mine, target, 6000, 80, b"<bad>", 9))))
            frames += [ether(gate, own, ipv4(mine, target, ICMP, echo_request(1, kind, b"<bad>")))
                       for kind in (0, 3, 4, 5, 9, 10, 11, 12, 14, 16, 18, 42, 255)]
            frames += [ether(gate, own, ipv4(source, target, 17, udp(source, target, 6000, 80, b"<bad>")))
                       for source in ("10.1.2.2", "10.1.1.2", "10.1.9.9", "10.2.1.2", "198.51.100.1", "192.0.2.7", "127.0.0.1",
                                      "0.0.0.0", "224.0.0.1", "10.1.0.1", "10.1.1.1") if source != mine]
            whole = udp(mine, target, 6001, 80, b"<bad>" * 30)
            frames += [ether(gate, own, ipv4(mine, target, 17, whole[24:], 7, 3)),
                       ether(gate, own, ipv4(mine, target, 17, whole[:24], 8, 0x2000))]
        send_frames(ns, device, frames)
        honest = self.wire("blue", "b1")
        token = b"<control %s>" % mine.encode()
        send_frames(honest[0], honest[1], [ether(honest[3], honest[2], datagram("10.1.1.2", INTERNET, token))])
        self.assertTrue(outside.wait(token), "the control did not arrive")

    def test_nothing_comes_in(self):
        vpcctl("enable-nat", "blue", "--interface", "eth0")
        host = mac_of("eth0")
        with entered(self.net):
            own = mac_of("eth0")
        with echoing("ns-blue-b1", "ns-blue-b2", "ns-red-r1"), Ear(*self.wire("blue", "b1")[:2]) as b1, \
                Ear(*self.wire("red", "r1")[:2]) as r1:
            check(self, ways(False, self.net, "10.1.1.2") + ways(False, self.net, "10.1.2.2") + ways(False, self.net, "10.2.1.2")
                  + [Probe(True, "ns-blue-b1", "tcp", INTERNET, 80)] + ways(True, "ns-blue-b2", "10.1.1.2"))
            # as an answer to nothing, as a sibling, as the gateway, as the host
            frames = [ether(host, own, ipv4(source, target, TCP, tcp(source, target, 80, 40000, flags, b"<in>")))
                      for source in (INTERNET, "10.1.2.2", "10.1.1.1", "10.2.1.2", "192.0.2.2", "127.0.0.1")
                      for target in ("10.1.1.2", "10.2.1.2") for flags in (2, 16, 18, 4)]
            frames += [ether(host, own, datagram(source, target, b"<in>", 80, 40000))
                       for source in (INTERNET, "10.1.2.2", "10.1.1.1", "10.2.1.2") for target in ("10.1.1.2", "10.2.1.2")]
            # dies at the host, whose error would carry it to the forged address
            frames += [ether(host, own, ipv4(source, target, 17, udp(source, target, 80, 40000, b"<in>"), ttl=1))
                       for source in ("10.1.1.2", "10.2.1.2") for target in ("10.1.2.2", "10.1.9.9", "10.2.9.9")]
            send_frames(self.net, "eth0", frames)
            check(self, [Probe(True, "ns-blue-b1", "icmp", INTERNET), Probe(True, None, "udp", "10.2.1.2")])
            self.assertEqual([frame for ear in (b1, r1) for frame in ear.frames if b"<in>" in frame], [])

    def test_a_published_port_and_no_other(self):
        vpcctl("publish", "blue", "b1", "--port", "8080:7", "--interface", "eth0")
        vpcctl("publish", "blue", "b1", "--port", "5353:7", "--protocol", "udp", "--interface", "eth0")
        net, host = self.net, mac_of("eth0")
        with entered(net):
            own = mac_of("eth0")
        neighbour_net("side1", "192.168.71.2", "192.168.71.1")
        switch("net/ipv4/conf/side10/forwarding", 1)
        with entered(net):
            settle("ip", "route", "add", "192.168.71.0/24", "via", "192.0.2.2")
        try:
            with echoing("ns-blue-b1", "ns-blue-b2", "side1"), listener("side1", 8080), listener(None, 7), \
                    listener("ns-blue-b1", 8080), Ear(*self.wire("blue", "b1")[:2]) as b1:
                check(self, [Probe(True, net, "tcp", "192.0.2.2", 8080), Probe(True, net, "udp", "192.0.2.2", 5353),
                             Probe(False, net, "udp", "192.0.2.2", 8080), Probe(False, net, "tcp", "192.0.2.2", 5353)]
                      + ways(False, net, "10.1.1.2") + ways(False, net, "10.1.2.2") + [Probe(False, net, "tcp", "10.1.1.2", 8080)]
                      # its own way out is not opened by it, nor is it a door for other VPCs
                      + [Probe(False, "ns-blue-b1", "tcp", INTERNET, 80), Probe(False, "ns-red-r1", "tcp", "192.0.2.2", 8080),
                         Probe(False, "ns-blue-b2", "tcp", "192.0.2.2", 8080)])
                # the published port's number on another machine behind the host is that machine's
                send_frames(net, "eth0", [ether(host, own, ipv4("192.0.2.1", "192.168.71.2", 17, udp(
                    "192.0.2.1", "192.168.71.2", 999, 5353, b"<transit>")))])
                # a sibling's address from outside is forged
                send_frames(net, "eth0", [ether(host, own, datagram(source, "192.0.2.2", b"<forged>", 999, 5353))
                                          for source in ("10.1.2.2", "10.1.9.9", "10.1.1.1", "10.2.1.2")])
                send_frames(net, "eth0", [ether(host, own, datagram("192.0.2.1", "192.0.2.2", b"<control>", 999, 5353))])
                self.assertTrue(b1.wait(b"<control>"))
                self.assertEqual(b1.heard(b"<transit>") + b1.heard(b"<forged>"), 0)
        finally:
            with entered(net):
                settle("ip", "route", "del", "192.168.71.0/24")

    def test_the_host_is_no_router_for_others(self):
        """Two networks of the host's own, before, during and after NAT; and after somebody has switched it off."""
        neighbour_net("side1", "192.168.71.2", "192.168.71.1")
        neighbour_net("side2", "192.168.72.2", "192.168.72.1")
        with entered(self.net):
            settle("ip", "route", "add", "192.168.0.0/16", "via", "192.0.2.2")
        never = (ways(False, "side1", "192.168.72.2") + ways(False, "side2", "192.168.71.2") + ways(False, self.net, "192.168.71.2")
                 + [Probe(False, "side1", "tcp", INTERNET, 80)] + ways(False, "side1", "10.1.1.2")
                 + ways(False, "ns-blue-b1", "192.168.71.2"))

        def again():
            return [Probe(probe.ok, probe.ns, probe.protocol, probe.target, probe.port) for probe in never] + ways(
                True, "side1", "192.168.71.1")
        out = lambda: [Probe(True, "ns-blue-b1", "tcp", INTERNET, 80)]
        try:
            with echoing("side1", "side2", "ns-blue-b1", None):
                check(self, again(), "before")
                vpcctl("enable-nat", "blue", "--interface", "eth0")
                self.assertEqual(switch(FORWARD), "1")
                check(self, again() + out(), "with NAT")
                switch(FORWARD, 0)      # sysctl --system, or a reboot
                self.assertIn("ip_forward", vpcctl("verify", code=1).out)
                vpcctl("restore")
                check(self, again() + out(), "restored")
                vpcctl("enable-nat", "red", "--interface", "side10")      # a second way out
                check(self, [Probe(True, "ns-red-r1", "tcp", "192.168.71.2"), Probe(True, "ns-red-r1", "icmp", "192.168.71.2"),
                             Probe(False, "ns-red-r1", "tcp", INTERNET, 80), Probe(False, "side1", "tcp", INTERNET, 80)]
                      + ways(False, "side1", "192.168.72.2") + ways(False, "side1", "10.2.1.2")
                      + ways(False, self.net, "192.168.71.2") + out(), "two ways out")
                vpcctl("disable-nat", "blue")
                check(self, [Probe(True, "ns-red-r1", "tcp", "192.168.71.2"), Probe(False, "ns-blue-b1", "tcp", INTERNET, 80)])
                vpcctl("disable-nat", "red")
                self.assertEqual(switch(FORWARD), "0")
                check(self, again() + ways(True, "ns-blue-b1", "10.1.2.2")[2:], "after")
                self.assertEqual(vpcctl("verify").code, 0)
        finally:
            with entered(self.net):
                settle("ip", "route", "del", "192.168.0.0/16")

    def test_a_host_that_is_a_router(self):
        """ip_forward is 1 already, and stays; what it routed, it routes, during and after."""
        neighbour_net("side1", "192.168.71.2", "192.168.71.1")
        neighbour_net("side2", "192.168.72.2", "192.168.72.1")
        switch(FORWARD, 1)
        try:
            with echoing("side1", "side2", "ns-blue-b1"):
                routed = lambda: ways(True, "side1", "192.168.72.2")
                closed = lambda: ways(False, "side1", "10.1.1.2") + ways(False, "ns-blue-b1", "192.168.71.2")
                check(self, routed() + closed(), "before")
                vpcctl("enable-nat", "blue", "--interface", "eth0")
                check(self, routed() + closed() + [Probe(True, "ns-blue-b1", "tcp", INTERNET, 80)], "with NAT")
                vpcctl("disable-nat", "blue")
                self.assertEqual(switch(FORWARD), "1")
                check(self, routed() + closed(), "after")
                vpcctl("enable-nat", "blue", "--interface", "eth0")
                vpcctl("delete", "blue")
                self.assertEqual(switch(FORWARD), "1")
                check(self, routed())
        finally:
            vpcctl("cleanup-all")
            switch(FORWARD, 0)

    def test_interfaces_that_come_later(self):
        """Two networks that were not there when forwarding was switched on: apart, unless somebody's rule says else."""
        vpcctl("enable-nat", "blue", "--interface", "eth0")
        for number in (1, 2):
            neighbour_net("side%d" % number, "192.168.7%d.2" % number, "192.168.7%d.1" % number)
        self.assertEqual(switch("net/ipv4/conf/side10/forwarding"), "1")
        apart = lambda: ways(False, "side1", "192.168.72.2") + ways(False, "side2", "192.168.71.2") + [
            Probe(False, "side1", "tcp", INTERNET, 80)] + ways(False, "side1", "10.1.1.2")
        out = lambda: ways(True, "side1", "192.168.71.1") + [Probe(True, "ns-blue-b1", "tcp", INTERNET, 80)]
        rules = [["-i", "side10", "-o", "side20"], ["-i", "side20", "-o", "side10"]]
        with echoing("side1", "side2", "ns-blue-b1", None):
            check(self, apart() + out(), "strangers")
            try:
                for rule in rules:
                    settle("iptables", "-I", "FORWARD", *rule + ["-j", "ACCEPT"])
                check(self, ways(True, "side1", "192.168.72.2") + ways(False, "side1", "10.1.1.2"), "by their own rules")
                for rule in rules:
                    settle("iptables", "-D", "FORWARD", *rule + ["-j", "ACCEPT"])
                    settle("iptables", "-A", "FORWARD", *rule + ["-j", "ACCEPT"])
                self.assertIn('FORWARD: our rule "-j vpcctl-rest" stands before', vpcctl("verify", code=1).out)
                vpcctl("restore")
                self.assertEqual(settle("iptables", "-S", "FORWARD").splitlines()[-1].split()[-1], "vpcctl-rest")
                check(self, ways(True, "side1", "192.168.72.2") + out(), "last again")
            finally:
                for rule in rules:
                    run(["iptables", "-D", "FORWARD"] + rule + ["-j", "ACCEPT"])
            self.assertEqual(vpcctl("verify").code, 0)
            vpcctl("disable-nat", "blue")
            self.assertNotIn("vpcctl-rest", settle("iptables-save"))

    def test_single_switches_of_others_work_on(self):
        """Networks that passed packets on by their own switches go on doing so while VPCs have NAT."""
        for number in (1, 2):
            neighbour_net("side%d" % number, "192.168.7%d.2" % number, "192.168.7%d.1" % number)
            switch("net/ipv4/conf/side%d0/forwarding" % number, 1)
        with echoing("side2"):
            check(self, ways(True, "side1", "192.168.72.2"), "before")
            vpcctl("enable-nat", "blue", "--interface", "eth0")
            check(self, ways(True, "side1", "192.168.72.2") + [Probe(True, "ns-blue-b1", "tcp", INTERNET, 80)], "with NAT")

    def test_addresses_of_no_network(self):
        """Link-local (a cloud host's metadata service), reserved: not by NAT, by either layer; private ranges are."""
        never, private = ("169.254.169.254", "240.1.2.3"), ("192.168.99.9", "100.64.9.9")
        with entered(self.net):
            for address in never + private:
                settle("ip", "address", "add", address + "/32", "dev", "lo")
        probes = lambda: [Probe(False, ns, kind, address) for ns in ("ns-blue-b1", "ns-red-r1") for address in never
                          for kind in ("tcp", "udp", "icmp")] + [
            Probe(True, where, "tcp", address) for where, found in (("ns-blue-b1", private), (None, never)) for address in found]
        try:
            vpcctl("enable-nat", "blue", "--interface", "eth0")
            with echoing(self.net):
                check(self, probes(), "with NAT")
                settle("iptables", "-t", "mangle", "-F")
                check(self, probes(), "by routing alone")
                self.assertIn("-t mangle", vpcctl("verify", code=1).out)
                vpcctl("restore")
                settle("ip", "route", "flush", "table", "7000")
                check(self, probes(), "by the firewall alone")
                self.assertIn("169.254.0.0/16", vpcctl("verify", code=1).out)
                vpcctl("restore")
                vpcctl("delete", "red")
                check(self, probes()[:6] + [Probe(True, "ns-blue-b1", "tcp", private[0])], "restored")
            self.assertEqual(vpcctl("verify").code, 0)
            said = vpcctl("explain", "blue", "b1", never[0], "--port", "80", code=1).out
            self.assertIn("169.254.0.0/16", said)
        finally:
            with entered(self.net):
                for address in never + private:
                    run(["ip", "address", "del", address + "/32", "dev", "lo"])

    def talking(self, stack, ns, address, port):
        """A connected UDP socket that has had an answer -> (socket, its port)."""
        sock = stack.enter_context(contextlib.closing(socket_in(ns, socket.SOCK_DGRAM)))
        sock.settimeout(LONG)
        sock.connect((address, port))
        sock.send(b"one")
        self.assertEqual(sock.recv(9), b"one")
        return sock, sock.getsockname()[1]

    def test_forged_errors_about_the_hosts_own_connections(self):
        """ICMP errors from a VPC count for what the host opened to it, and for nothing else."""
        ns, device, own, gate = self.wire("blue", "b1")
        for nat in (False, True):
            if nat:
                vpcctl("enable-nat", "blue", "--interface", "eth0")
            with contextlib.ExitStack() as stack:
                stack.enter_context(listener(self.net, 5300, INTERNET, "udp"))
                sock, port = self.talking(stack, None, INTERNET, 5300)
                quoted = ipv4("192.0.2.2", INTERNET, 17, udp("192.0.2.2", INTERNET, port, 5300, b"<quoted>"))
                send_frames(ns, device, [
                    ether(gate, own, icmp_error(code, "10.1.1.2", target, quoted, 600))
                    for code in (3, 4) for target in ("192.0.2.2", "10.1.1.1", "10.1.0.1")])
                near = stack.enter_context(contextlib.closing(socket_in(None, socket.SOCK_DGRAM)))
                near.settimeout(LONG)
                near.connect(("10.1.1.2", 9))
                near.send(b"nobody listens")
                with self.assertRaises(ConnectionRefusedError, msg="the control: a true error arrives"):
                    near.recv(9)
                self.assertEqual(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), 0, "the query was ended")
                self.assertEqual(sock.getsockopt(socket.IPPROTO_IP, 14), 1500, "IP_MTU was lowered")
                sock.send(b"two")
                self.assertEqual(sock.recv(9), b"two")

    def test_forged_errors_about_another_vpcs_connections(self):
        """Out by NAT go errors about one's own connections only."""
        for vpc in ("blue", "red"):
            vpcctl("enable-nat", vpc, "--interface", "eth0")
        ns, device, own, gate = self.wire("blue", "b1")
        with contextlib.ExitStack() as stack:
            stack.enter_context(listener(self.net, 5300, INTERNET, "udp"))
            outside = stack.enter_context(Ear(self.net, "eth0"))
            frames = []
            for place, address, token in (("ns-red-r1", "10.2.1.2", b"<other>"), (ns, "10.1.1.2", b"<own>")):
                _, port = self.talking(stack, place, INTERNET, 5300)
                quoted = ipv4(INTERNET, address, 17, udp(INTERNET, address, 5300, port, token))
                frames.append(ether(gate, own, icmp_error(3, "10.1.1.2", INTERNET, quoted)))
            send_frames(ns, device, frames)
            self.assertTrue(outside.wait(b"<own>"), "the control: an error about an own connection leaves")
            self.assertEqual(outside.heard(b"<other>"), 0)

    def test_errors_do_not_carry_strangers_in(self):
        """From outside, an ICMP error about a connection of the host's own is no ticket to another network of it (Linux
        5.1 and later see to that themselves); those about a subnet's connections arrive."""
        neighbour_net("side1", "192.168.71.2", "192.168.71.1")
        vpcctl("enable-nat", "blue", "--interface", "eth0")
        settle("iptables", "-A", "FORWARD", "-o", "side10", "-j", "ACCEPT")
        host = mac_of("eth0")
        with entered(self.net):
            own = mac_of("eth0")
        with contextlib.ExitStack() as stack:
            stack.callback(run, ["iptables", "-D", "FORWARD", "-o", "side10", "-j", "ACCEPT"])
            stack.enter_context(listener(self.net, 5300, INTERNET, "udp"))
            side = stack.enter_context(Ear("side1", "eth0"))
            _, port = self.talking(stack, None, INTERNET, 5300)
            quoted = ipv4("192.0.2.2", INTERNET, 17, udp("192.0.2.2", INTERNET, port, 5300, b"<stranger>"))
            send_frames(self.net, "eth0", [ether(host, own, icmp_error(3, "192.0.2.1", "192.168.71.2", quoted))])
            sock = stack.enter_context(contextlib.closing(socket_in("ns-blue-b1", socket.SOCK_DGRAM)))
            sock.connect((INTERNET, 5999))
            sock.send(b"nobody listens")
            self.assertEqual(wait_until(lambda: sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), LONG, "a true error"),
                             errno.ECONNREFUSED)
            self.assertEqual(side.heard(b"<stranger>"), 0)

    def test_single_switches_of_others_come_back(self):
        """An interface that forwarded by its own switch does so again after the last NAT."""
        neighbour_net("side1", "192.168.71.2", "192.168.71.1")
        neighbour_net("side2", "192.168.72.2", "192.168.72.1")
        switch("net/ipv4/conf/side10/forwarding", 1)
        vpcctl("enable-nat", "blue", "--interface", "eth0")
        self.assertEqual(switch("net/ipv4/conf/side20/forwarding"), "0")
        vpcctl("disable-nat", "blue")
        self.assertEqual((switch("net/ipv4/conf/side10/forwarding"), switch("net/ipv4/conf/side20/forwarding"),
                          switch("net/ipv4/conf/br-red/forwarding")), ("1", "0", "1"))

    def test_the_default_route_changes(self):
        """NAT goes on by the same interface when the host's default route is another one there."""
        vpcctl("enable-nat", "blue", "--interface", "eth0")
        with entered(self.net):
            settle("ip", "address", "add", "192.0.2.9/24", "dev", "eth0")
        try:
            settle("ip", "route", "replace", "default", "via", "192.0.2.9")
            check(self, [Probe(True, "ns-blue-b1", "tcp", INTERNET, 80), Probe(False, "ns-red-r1", "tcp", INTERNET, 80)]
                  + ways(False, "ns-blue-b1", "10.2.1.2"))
            settle("ip", "route", "del", "default")
            check(self, [Probe(False, "ns-blue-b1", "tcp", INTERNET, 80), Probe(True, "ns-blue-b1", "icmp", "10.1.2.2")])
        finally:
            settle("ip", "route", "replace", "default", "via", "192.0.2.1")
            with entered(self.net):
                settle("ip", "address", "del", "192.0.2.9/24", "dev", "eth0")


if __name__ == "__main__":
    unittest.main()
