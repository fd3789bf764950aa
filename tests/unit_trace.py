"""Where was the packet seen: reading packets, telling ours from others', routes, counters, words. No root."""
import os
import socket
import struct
import sys
import time
import unittest
from unittest import mock

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import vpcctl  # noqa: E402

WEB, DB, OUTSIDE, UPLINK = "10.20.1.2", "10.20.2.2", "203.0.113.1", "192.0.2.2"
SYN, SYN_ACK, ACK, RST = 0x02, 0x12, 0x10, 0x14
SEQUENCE = 0x01020304


def header(protocol, source, target, body, fragment=0):
    """An IPv4 packet."""
    return struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(body), 1, fragment, 64, protocol, 0,
                       socket.inet_aton(source), socket.inet_aton(target)) + body


def tcp(source, port, target, far_port, flags, sequence=SEQUENCE, acknowledged=0):
    """A TCP segment."""
    return header(6, source, target, struct.pack("!HHIIBBHHH", port, far_port, sequence, acknowledged, 0x50, flags, 0, 0, 0))


def udp(source, port, target, far_port, text):
    """A datagram."""
    return header(17, source, target, struct.pack("!HHHH", port, far_port, 8 + len(text), 0) + text)


def icmp(source, target, kind, code=0, number=0, text=b""):
    """An echo request or reply, or an error (`text`: the packet that it is about)."""
    return header(1, source, target, struct.pack("!BBHHH", kind, code, 0, number, 1) + text)


def make_flow(target=DB, port=5432, protocol="tcp"):
    """A flow from blog/web to blog/db, or to the outside."""
    subnets = [{"name": name, "ns": "ns-blog-" + name, "veth": "v-blog-" + name, "gw": f"10.20.{number}.1",
                "host_ip": f"10.20.{number}.2", "cidr": f"10.20.{number}.0/24"}
               for number, name in ((1, "web"), (2, "db"))]
    vpc = {"name": "blog", "cidr": "10.20.0.0/16", "bridge": "br-blog", "chain": "vpc-blog", "chain_in": "vpc-in-blog",
           "mac": "02:76:0a:14:00:01", "table": 7001, "nat": {"interface": "eth0"}, "subnets": subnets}
    near = target.startswith("10.20.")
    host = next((subnet for subnet in subnets if subnet["host_ip"] == target), None)
    return vpcctl.Flow({"blog": vpc}, vpc, subnets[0], vpc if near else None, host, target, protocol, port, f"{protocol}/{port}", "")


def sights(*seen):
    """Sights from (place, "out" or "in", bytes), a millisecond apart; what is no packet for us is left out."""
    found = []
    for number, (device, way, data) in enumerate(seen):
        packet = vpcctl.read_packet(data)
        space = "ns-" + device[2:-2] if device.endswith("-a") else ""
        if packet:
            found.append(vpcctl.Sighting(number * 10 ** 6, space, device, way == "out", False, packet))
    return found


ASKED = tcp(WEB, 4000, DB, 5432, SYN)
ANSWERED = tcp(DB, 5432, WEB, 4000, SYN_ACK, 9, SEQUENCE + 1)
THERE = [("v-blog-web-a", "out", ASKED), ("v-blog-web-b", "in", ASKED), ("br-blog", "in", ASKED),
         ("br-blog", "out", ASKED), ("v-blog-db-b", "out", ASKED), ("v-blog-db-a", "in", ASKED)]
BACK = [("v-blog-db-a", "out", ANSWERED), ("v-blog-db-b", "in", ANSWERED), ("br-blog", "in", ANSWERED),
        ("br-blog", "out", ANSWERED), ("v-blog-web-b", "out", ANSWERED), ("v-blog-web-a", "in", ANSWERED)]


def tale(seen, outcome="silence", flow=None, number=4000, causes=(), missed=0):
    """A trace of what was seen."""
    flow = flow or make_flow()
    here = bool(flow.far) and flow.address in vpcctl.router_addresses(flow.far)
    return vpcctl.Trace(flow, outcome, vpcctl.ours(sights(*seen), flow, number), missed, list(causes), here)


class PacketTest(unittest.TestCase):

    def test_what_opens_or_answers(self):
        for data, kind in ((ASKED, "SYN"), (ANSWERED, "SYN-ACK"), (tcp(DB, 5432, WEB, 4000, RST), "RST"),
                           (udp(WEB, 5, DB, 53, b"x"), "datagram"), (icmp(WEB, DB, 8), "echo request"),
                           (icmp(DB, WEB, 0), "echo reply"),
                           (icmp("10.20.1.1", WEB, 3, 3, text=ASKED[:28]), "ICMP port unreachable from 10.20.1.1"),
                           (icmp("10.20.1.1", WEB, 11, 0, text=ASKED[:28]), "ICMP time exceeded from 10.20.1.1"),
                           (icmp("10.20.1.1", WEB, 3, 77, text=ASKED[:28]), "ICMP type 3 code 77 from 10.20.1.1")):
            self.assertEqual(vpcctl.read_packet(data).kind, kind)

    def test_what_does_not(self):
        """The rest of a connection, redirects, later fragments, what is cut off, other protocols."""
        for data in (tcp(WEB, 4000, DB, 5432, ACK), icmp("10.20.1.1", WEB, 5, text=ASKED), b"", b"\x45", ASKED[:27],
                     header(17, WEB, DB, b"8 bytes.", fragment=100), header(47, WEB, DB, b"8 bytes."), b"\x60" + bytes(60),
                     b"\x4f" + ASKED[1:30]):
            self.assertIsNone(vpcctl.read_packet(data), data)

    def test_an_error_quotes_the_packet(self):
        error = vpcctl.read_packet(icmp("10.20.1.1", WEB, 3, 1, text=ASKED[:28]))
        self.assertEqual(error.quoted, (6, WEB, 4000, DB, 5432))
        self.assertIsNone(vpcctl.read_packet(icmp("10.20.1.1", WEB, 3, 1, text=ASKED[:20])).quoted)

    def test_the_filter_jumps_inside_itself(self):
        program = vpcctl.tap_filter(1, 2)
        for at, (code, then, other, _) in enumerate(program):
            self.assertEqual(at + 1 + max(then, other) < len(program), code != 6 or at < len(program) - 1)


class OursTest(unittest.TestCase):

    def test_there_and_back(self):
        found = tale(THERE + BACK, "open")
        self.assertEqual([vpcctl.place_of(sight) for sight in found.seen], vpcctl.way(found.flow))
        self.assertTrue(vpcctl.is_answered(found))

    def test_others_are_left_out(self):
        """Another client of the same port, the same client's older connection, an error about another packet."""
        others = [("br-blog", "in", tcp("10.20.3.2", 4000, DB, 5432, SYN, 5)), ("br-blog", "in", tcp(WEB, 4001, DB, 5432, SYN, 6)),
                  ("br-blog", "out", tcp(DB, 5432, WEB, 4001, SYN_ACK, 7)),
                  ("br-blog", "out", icmp("10.20.1.1", WEB, 3, 1, text=tcp(WEB, 4001, DB, 5432, SYN)[:28]))]
        self.assertEqual(len(tale(THERE[:1] + others + THERE[1:] + others + BACK).seen), 12)

    def test_sent_again_counts_once(self):
        self.assertEqual(len(tale(THERE[:3] + THERE[:3]).seen), 3)

    def test_nat_changes_address_and_port(self):
        sent, left = tcp(WEB, 4000, OUTSIDE, 80, SYN), tcp(UPLINK, 61000, OUTSIDE, 80, SYN)
        came, back = tcp(OUTSIDE, 80, UPLINK, 61000, SYN_ACK, 8), tcp(OUTSIDE, 80, WEB, 4000, SYN_ACK, 8)
        other = tcp(UPLINK, 61001, OUTSIDE, 80, SYN, 77)
        found = tale([("v-blog-web-a", "out", sent), ("v-blog-web-b", "in", sent), ("br-blog", "in", sent), ("eth0", "out", other),
                      ("eth0", "out", left), ("eth0", "in", tcp(OUTSIDE, 80, UPLINK, 61001, SYN_ACK)), ("eth0", "in", came),
                      ("br-blog", "out", back), ("v-blog-web-b", "out", back), ("v-blog-web-a", "in", back)],
                     "open", make_flow(OUTSIDE, 80))
        self.assertEqual([vpcctl.place_of(sight) for sight in found.seen], vpcctl.way(found.flow))
        lines = vpcctl.trace_lines(found)
        self.assertTrue(lines[3].endswith("out of eth0, from 192.0.2.2:61000"), lines[3])
        self.assertTrue(lines[4].endswith("answer (SYN-ACK) in at eth0"), lines[4])
        self.assertTrue(lines[5].endswith("answer (SYN-ACK) out of bridge br-blog, to 10.20.1.2:4000"), lines[5])

    def test_an_echo_comes_back_with_the_same_text(self):
        flow, text = make_flow(port=53, protocol="udp"), b"vpcctl 1234"
        there, back = udp(WEB, 4000, DB, 53, text), udp(DB, 53, WEB, 4000, text)
        found = tale([(device, way, there) for device, way, _ in THERE] + [(device, way, back) for device, way, _ in BACK],
                     "open", flow)
        self.assertEqual([sight.answer for sight in found.seen], [False] * 6 + [True] * 6)

    def test_ping(self):
        flow = make_flow(port=None, protocol="icmp")
        there, back = icmp(WEB, DB, 8, 0, 77, b"vpcctl!"), icmp(DB, WEB, 0, 0, 77, b"vpcctl!")
        found = tale([(device, way, there) for device, way, _ in THERE] + [(device, way, back) for device, way, _ in BACK],
                     "open", flow, 77)
        self.assertEqual([sight.answer for sight in found.seen], [False] * 6 + [True] * 6)

    def test_a_proxy_in_the_middle(self):
        """REDIRECT: an answer comes, but the packet was never at its target."""
        found = tale(THERE[:3] + BACK[3:], "open")
        self.assertFalse(vpcctl.is_answered(found))
        self.assertIn("answered, but not by blog/db: last seen in at bridge br-blog", vpcctl.trace_verdict(found))
        outside = [(device, way, tcp(WEB, 4000, OUTSIDE, 80, SYN)) for device, way, _ in THERE[:3]]
        self.assertFalse(vpcctl.is_answered(tale(outside, "open", make_flow(OUTSIDE, 80))))
        self.assertTrue(vpcctl.is_answered(tale(outside, "open", make_flow("10.20.1.1", 80))))

    def test_what_could_not_be_looked_at_proves_nothing(self):
        self.assertTrue(vpcctl.is_answered(tale(THERE[:3] + BACK[3:], "open", missed=9)))


class LookTest(unittest.TestCase):

    def look(self, *readings):
        """What `look` makes of readings, each seconds later or earlier than the end of sending -> (trace, sent)."""
        sent, now = [], time.time()

        def send(flow, _patience):
            sent.append(flow)
            return vpcctl.Reply("open", DB, 4000)

        def read(space, tap):
            late = readings[len(sent) - 1]
            return [sight._replace(time=sight.time // 1000 + int((now + late) * 10 ** 9)) for sight in sights(*THERE + BACK)]
        tap = mock.Mock(getsockopt=lambda *_: struct.pack("II", 24, 0))
        with mock.patch.multiple(vpcctl, send=send, read_tap=read):
            return vpcctl.look(make_flow(), [("", tap)]), len(sent)

    def test_times_of_reading_are_no_times(self):
        found, sent = self.look(-1)
        self.assertEqual((len(found.seen), sent), (12, 1))
        found, sent = self.look(5, 5, -1)
        self.assertEqual((len(found.seen), sent), (12, 3))


class WordsTest(unittest.TestCase):

    def test_yes(self):
        lines = vpcctl.trace_lines(tale(THERE + BACK, "open"))
        self.assertEqual(lines[0], "    0.000 ms  out of blog/web's card v-blog-web-a")
        self.assertEqual(lines[6], "    6.000 ms  answer (SYN-ACK) out of blog/db's card v-blog-db-a")
        self.assertEqual(lines[12:], ["\u2713 yes: answered (SYN-ACK) after 11.000 ms"])
        self.assertEqual(vpcctl.trace_lines(tale(THERE + BACK, "open"), True)[12:], ["ok yes: answered (SYN-ACK) after 11.000 ms"])

    def test_each_place_where_it_can_be_lost(self):
        for count, place, following in (
                (0, "it never left blog/web", "in blog/web itself: its routes; OUTPUT"),
                (1, "last seen out of blog/web's card v-blog-web-a", "the other end of the cable: v-blog-web-b"),
                (2, "last seen in at port v-blog-web-b", "bridge br-blog: is it on"),
                (3, "last seen in at bridge br-blog", "the host; PREROUTING of raw, mangle, nat; routing rules 7001 to 7007"),
                (4, "last seen out of bridge br-blog", "bridge br-blog: entry (fdb)"),
                (5, "last seen out of port v-blog-db-b", "the other end of the cable: v-blog-db-a"),
                (6, "last seen in at blog/db's card v-blog-db-a", "in blog/db itself; PREROUTING"),
                (7, "the answer was last seen out of blog/db's card v-blog-db-a", "the other end of the cable: v-blog-db-b"),
                (9, "the answer was last seen in at bridge br-blog", "the host; PREROUTING"),
                (12, "the answer was last seen in at blog/web's card v-blog-web-a", "in blog/web itself; PREROUTING")):
            found = tale((THERE + BACK)[:count], causes=["rule: -j DROP"])
            lines = vpcctl.trace_lines(found)[count:]
            self.assertEqual((lines[0], lines[-1]), (f"\u2717 no: {place}", "  rule: -j DROP"))
            self.assertTrue(count == 12 or lines[1].startswith(f"  next there: {following}"), lines)
            self.assertEqual(vpcctl.trace_lines(found, True)[count], f"NO no: {place}")

    def test_turned_back(self):
        error = icmp("10.20.1.1", WEB, 3, 3, text=ASKED)
        found = tale(THERE[:3] + [(device, way, error) for device, way, _ in BACK[3:]], "refused", causes=["rule: -j REJECT"])
        self.assertEqual(vpcctl.trace_lines(found)[6:], [
            "\u2717 no: turned back (ICMP port unreachable from 10.20.1.1), last seen in at bridge br-blog", "  rule: -j REJECT"])
        self.assertEqual(vpcctl.gap_space(found), vpcctl.HOST)
        reset = tcp(DB, 5432, WEB, 4000, RST)
        found = tale(THERE + [(device, way, reset) for device, way, _ in BACK], "refused")
        self.assertEqual(vpcctl.gap_space(found), "ns-blog-db")

    def test_data(self):
        data = vpcctl.trace_data(tale(THERE[:3], causes=["rule: -j DROP"]))
        self.assertEqual((data["answered"], data["verdict"], data["causes"], data["missed"]),
                         (False, "no: last seen in at bridge br-blog", ["rule: -j DROP"], 0))
        self.assertEqual(data["seen"][1], {"ms": 1.0, "namespace": None, "interface": "v-blog-web-b", "direction": "in",
                                           "answer": False, "kind": "SYN", "source": WEB, "target": DB})

    def test_busy(self):
        self.assertEqual(vpcctl.trace_lines(tale(THERE, missed=7))[-1],
                         "note: the interfaces are busy: 7 packets could not be looked at")


class RouteTest(unittest.TestCase):
    RULES = [{"priority": 0, "src": "all", "table": "local"},
             {"priority": 7001, "src": "all", "iif": "br-blog", "table": "7001", "protocol": "118"},
             {"priority": 7002, "src": "10.20.0.0", "srclen": 16, "iif": "br-blog", "action": "unreachable", "protocol": "118"},
             {"priority": 32766, "src": "all", "table": "main"}]
    OWN = {"dst": "10.20.0.0/16", "dev": "br-blog", "table": "7001"}

    def decide(self, routes, rules=(), target=DB, device="br-blog", source=WEB):
        packet = vpcctl.Packet(source or WEB, target, "tcp", vpcctl.SOME_PORT, (5432, 5432), device or "", "", None, ("NEW",), False)
        sight = mock.Mock(routing={(("ip", "-j", "-4"), target): (list(rules) + self.RULES, routes)})
        decided = vpcctl.Sight.decider(sight, None, packet)
        kind = decided.route.get("type", "unicast") if decided.route else (decided.rule or {}).get("action")
        return kind, vpcctl.decision_words(decided, target)

    def test_longest_block_wins(self):
        self.assertEqual(self.decide([self.OWN]), ("unicast", "rule 7001, table 7001: 10.20.0.0/16 dev br-blog"))
        for block in ("10.20.2.0/24", "10.20.2.2"):
            dead = {"type": "blackhole", "dst": block, "table": "7001"}
            self.assertEqual(self.decide([self.OWN, dead]), ("blackhole", f"rule 7001, table 7001: blackhole {block} (not vpcctl's)"))
        own = {"type": "unreachable", "dst": "10.20.2.0/24", "table": "7001", "protocol": "118"}
        self.assertEqual(self.decide([own])[1], "rule 7001, table 7001: unreachable 10.20.2.0/24")
        self.assertEqual(self.decide([{"dst": "default", "gateway": "192.0.2.1", "dev": "eth0"}], device=None),
                         ("unicast", "rule 32766, table main: default via 192.0.2.1 dev eth0"))

    def test_no_way(self):
        self.assertEqual(self.decide([]), ("unreachable", "no way to 10.20.2.2 in table 7001; rule 7002 says unreachable"))
        self.assertEqual(self.decide([], device="eth1"), (None, "no rule and no table knows a way to 10.20.2.2"))
        self.assertEqual(self.decide([dict(self.OWN, type="throw")])[0], "unreachable")

    def test_rules_in_front(self):
        for selector, hits in (({"src": "10.20.1.0", "srclen": 24}, True), ({"src": "10.20.1.2"}, True), ({"src": "10.20.2.2"}, False),
                               ({"src": "all", "dst": "10.20.2.0", "dstlen": 24}, True), ({"src": "all", "dst": "10.20.3.2"}, False),
                               ({"src": "all", "iif": "br-blog"}, True), ({"src": "all", "iif": "lo"}, False),
                               ({"src": "all", "ipproto": "tcp", "dport": 5432}, True), ({"src": "all", "ipproto": "udp"}, False),
                               ({"src": "all", "dport": 80}, False), ({"src": "all", "fwmark": "0x1"}, False),
                               ({"src": "all", "not": None, "fwmark": "0x1"}, True), ({"src": "10.20.1.2", "not": None}, False)):
            rule = dict(selector, priority=100, action="prohibit")
            self.assertEqual(self.decide([self.OWN], [rule])[0] == "prohibit", hits, selector)
        self.assertEqual(self.decide([], [{"priority": 100, "src": "all", "action": "blackhole"}])[1],
                         "rule 100 (not vpcctl's) says blackhole")

    def test_suppressed(self):
        rule = {"priority": 100, "src": "all", "table": "main", "suppress_prefixlen": 0}
        default = {"dst": "default", "dev": "wg0"}
        self.assertEqual(self.decide([self.OWN, default], [rule])[1], "rule 7001, table 7001: 10.20.0.0/16 dev br-blog")


SAVED = """# Generated by iptables-save
*raw
:PREROUTING ACCEPT [90:900]
[%d:180] -A PREROUTING -s 10.20.1.2/32 -j DROP
COMMIT
*filter
:FORWARD DROP [%d:60]
:vpc-blog - [0:0]
[%d:9] -A FORWARD -j vpc-blog
[%d:9] -A vpc-blog -m comment --comment "vpcctl:blog" -j DROP
[1:2] -A vpc-blog -m comment --comment policy-ingress-deny-22 -j REJECT
COMMIT
"""
RULESET = """table ip filter {
	chain FORWARD {
		type filter hook forward priority filter; policy drop;
		counter packets 3 bytes 180 drop
	}
}
table inet guard {
	chain forward {
		type filter hook forward priority filter; policy accept;
		ip saddr 10.20.1.2 counter packets %d bytes 180 drop
		tcp dport 22 accept
		ip daddr 10.20.2.2 reject
	}
}
"""


class CounterTest(unittest.TestCase):

    def test_what_iptables_counts(self):
        self.assertEqual(vpcctl.counted_rules(SAVED % (3, 4, 5, 6)), {
            "table raw, chain PREROUTING: -s 10.20.1.2/32 -j DROP (not vpcctl's)": 3,
            "table filter, chain FORWARD: its policy DROP": 4,
            'table filter, chain vpc-blog: -m comment --comment "vpcctl:blog" -j DROP': 6,
            "table filter, chain vpc-blog: -m comment --comment policy-ingress-deny-22 -j REJECT": 1})

    def test_what_nft_counts(self):
        self.assertEqual(vpcctl.counted_nft(RULESET % 3, {"filter"}), {
            "nft table inet guard, chain forward: ip saddr 10.20.1.2 drop (not vpcctl's)": 3,
            "nft table inet guard, chain forward: ip daddr 10.20.2.2 reject (not vpcctl's)": None})

    def test_what_moved(self):
        moved = lambda *counts: vpcctl.moved_rules(vpcctl.counted_rules(SAVED % (10, 10, 10, 10)), vpcctl.counted_rules(SAVED % counts))
        self.assertEqual(moved(12, 12, 99, 10), [])
        self.assertEqual(moved(13, 40, 10, 12), [
            "rule: table raw, chain PREROUTING: -s 10.20.1.2/32 -j DROP (not vpcctl's): counted 3 packets when 3 were sent again"])
        self.assertEqual(moved(10, 15, 10, 40), [
            "rule: table filter, chain FORWARD: its policy DROP: counted 5 packets when 3 were sent again"])


if __name__ == "__main__":
    unittest.main()
