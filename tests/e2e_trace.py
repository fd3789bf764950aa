"""explain --trace against planted faults: it names the place where the packet was last seen, and what took it."""

import contextlib
import os
import socket
import sys
import threading
import unittest

from support import INTERNET, LONG, VPCCTL, SandboxTest, record, run, socket_in, tcp_listener, \
    udp_listener, wait_until, vpcctl as cli

sys.path.insert(0, os.path.dirname(VPCCTL))
import vpcctl  # noqa: E402

TOPOLOGY = {"vpcs": [
    {"name": "blog", "cidr": "10.20.0.0/16", "nat": {"interface": "eth0"}, "subnets": [
        {"name": "web", "cidr": "10.20.1.0/24", "apps": [{"port": 80}]},
        {"name": "db", "cidr": "10.20.2.0/24", "apps": [{"port": 5432}]}]},
    {"name": "shop", "cidr": "10.30.0.0/16", "subnets": [
        {"name": "api", "cidr": "10.30.1.0/24", "apps": [{"port": 8080}]}]}],
    "peers": [{"vpcs": ["blog", "shop"], "allow": ["10.20.1.0/24", "10.30.1.0/24"]}]}
WEB_DB = ("blog", "web", "db", "--port", "5432")
WEB_API = ("blog", "web", "shop/api", "--port", "8080")
OUT = ("blog", "web", INTERNET, "--port", "80")
PING = ("blog", "web", "db", "--protocol", "icmp")
WEB, DB, API = "-n ns-blog-web ", "-n ns-blog-db ", "-n ns-shop-api "
WRONG = "02:00:00:00:00:99"
NOT_OURS = " (not vpcctl's)"


def rules(table, chain, words, space=None):
    """A fault: a firewall rule, first in its chain, on the host or in a namespace -> (plant, undo)."""
    enter = f"ip netns exec {space} " if space else ""
    return ([f"{enter}iptables -t {table} -I {chain} {words}"], [f"{enter}iptables -t {table} -D {chain} {words}"])


def routes(words, where=""):
    """A fault: a route -> (plant, undo)."""
    return [f"ip {where}route add {words}"], [f"ip {where}route del {words}"]


def lookup(words):
    """A fault: a routing rule -> (plant, undo)."""
    return [f"ip rule add {words}"], [f"ip rule del {words}"]


def links(device, where=""):
    """A fault: an interface that is down -> (plant, undo: what is lost with it is restored)."""
    return [f"ip {where}link set {device} down"], ["vpcctl restore --quiet"]


def broken(*commands):
    """A fault in what is recorded -> (plant, undo)."""
    return list(commands), ["vpcctl restore --quiet"]


AT_BRIDGE, AT_EITHER = "last seen in at bridge br-blog", ("last seen in at bridge br-blog", "last seen in at port v-blog-web-b")
AT_DB, NEVER = "last seen in at blog/db's card v-blog-db-a", "it never left blog/web"
# (question, (plant, undo), where it was last seen, what the causes say)
RULES = (
    (WEB_DB, rules("raw", "PREROUTING", "-s 10.20.1.2 -j DROP"), AT_EITHER,
     "table raw, chain PREROUTING: -s 10.20.1.2/32 -j DROP" + NOT_OURS),
    (WEB_DB, rules("raw", "PREROUTING", "-s 10.20.2.2 -j DROP"), "the answer was last seen in at ",
     "table raw, chain PREROUTING: -s 10.20.2.2/32 -j DROP" + NOT_OURS),
    (WEB_DB, rules("mangle", "FORWARD", "-d 10.20.2.2 -p tcp -j DROP"), AT_BRIDGE, "table mangle, chain FORWARD: -d 10.20.2.2"),
    (WEB_DB, rules("filter", "FORWARD", "-d 10.20.2.2 -j DROP"), AT_BRIDGE, "table filter, chain FORWARD: -d 10.20.2.2/32 -j DROP"),
    (WEB_DB, rules("filter", "vpc-blog", "-p tcp --dport 5432 -j DROP"), AT_BRIDGE, "table filter, chain vpc-blog: -p tcp"),
    (WEB_DB, rules("nat", "PREROUTING", "-p tcp --dport 5432 -j DNAT --to-destination 10.20.2.99"), AT_EITHER,
     "table nat, chain PREROUTING: -p tcp -m tcp --dport 5432 -j DNAT --to-destination 10.20.2.99"),
    (WEB_DB, rules("nat", "PREROUTING", "-p tcp --dport 5432 -j REDIRECT --to-ports 9"), AT_EITHER, "-j REDIRECT --to-ports 9"),
    (WEB_DB, rules("raw", "PREROUTING", "-p tcp -j DROP", "ns-blog-db"), AT_DB, "table raw, chain PREROUTING: -p tcp -j DROP"),
    (WEB_DB, rules("filter", "INPUT", "-p tcp -j DROP", "ns-blog-db"), AT_DB, "table filter, chain INPUT: -p tcp -j DROP"),
    (WEB_DB, rules("filter", "OUTPUT", "-p tcp --sport 5432 -j DROP", "ns-blog-db"), AT_DB, "table filter, chain OUTPUT: -p tcp"),
    (PING, rules("mangle", "INPUT", "-p icmp -j DROP", "ns-blog-db"), AT_DB, "table mangle, chain INPUT: -p icmp -j DROP"),
    (WEB_DB, rules("filter", "OUTPUT", "-d 10.20.2.2 -j DROP", "ns-blog-web"), NEVER, "table filter, chain OUTPUT: -d 10.20.2.2"),
    (PING, rules("raw", "OUTPUT", "-d 10.20.2.2 -j DROP", "ns-blog-web"), NEVER, "table raw, chain OUTPUT: -d 10.20.2.2/32"),
    (WEB_DB, rules("raw", "PREROUTING", "-s 10.20.2.2 -j DROP", "ns-blog-web"),
     "the answer was last seen in at blog/web's card", "table raw, chain PREROUTING: -s 10.20.2.2/32 -j DROP"),
    (WEB_DB, (["iptables -t mangle -P FORWARD DROP"], ["iptables -t mangle -P FORWARD ACCEPT"]), AT_BRIDGE,
     "table mangle, chain FORWARD: its policy DROP"),
    (WEB_DB, rules("filter", "FORWARD", "-d 10.20.2.2 -j REJECT"), AT_BRIDGE, "table filter, chain FORWARD: -d 10.20.2.2/32 -j REJECT"),
    (WEB_DB, rules("filter", "INPUT", "-p tcp --dport 5432 -j REJECT --reject-with tcp-reset", "ns-blog-db"), AT_DB,
     "table filter, chain INPUT: -p tcp -m tcp --dport 5432 -j REJECT"),
    (WEB_API, rules("filter", "vpc-peer-blog-shop", "-p tcp -j DROP"), AT_BRIDGE, "table filter, chain vpc-peer-blog-shop: -p tcp"),
    (OUT, rules("filter", "FORWARD", "-o eth0 -j DROP"), AT_BRIDGE, "table filter, chain FORWARD: -o eth0 -j DROP"),
    (OUT, rules("raw", "PREROUTING", "-i eth0 -p tcp -j DROP"), "the answer was last seen in at eth0",
     "table raw, chain PREROUTING: -i eth0 -p tcp -j DROP"),
    (OUT, rules("nat", "POSTROUTING", "-p tcp -j SNAT --to-source 192.0.2.77"), "last seen out of eth0",
     "it left with 192.0.2.77, no address of this host"),
)
ROUTES = (
    (WEB_DB, routes("blackhole 10.20.2.0/24 table 7001"), AT_BRIDGE, "rule 7001, table 7001: blackhole 10.20.2.0/24"),
    (WEB_DB, routes("prohibit 10.20.2.2 table 7001"), AT_BRIDGE, "rule 7001, table 7001: prohibit 10.20.2.2"),
    (WEB_DB, routes("unreachable 10.20.2.0/25 table 7001"), AT_BRIDGE, "rule 7001, table 7001: unreachable 10.20.2.0/25"),
    (WEB_DB, routes("10.20.2.2 dev eth0 table 7001"), AT_BRIDGE, "out by eth0: rule 7001, table 7001: 10.20.2.2 dev eth0"),
    (OUT, routes("blackhole 203.0.113.0/24"), AT_BRIDGE, "rule 7003, table main: blackhole 203.0.113.0/24"),
    (WEB_DB, routes("blackhole 10.20.2.0/24", WEB), NEVER, "rule 32766, table main: blackhole 10.20.2.0/24"),
    (WEB_DB, routes("prohibit 10.20.2.0/24", WEB), NEVER, "rule 32766, table main: prohibit 10.20.2.0/24"),
    (WEB_DB, routes("unreachable 10.20.1.0/25", DB), AT_DB, "rule 32766, table main: unreachable 10.20.1.0/25"),
    (WEB_DB, routes("10.20.1.2 dev eth0 table 7001"), AT_BRIDGE, "rp_filter"),
    (WEB_DB, broken("ip route del 10.20.0.0/16 table 7001"), AT_BRIDGE, "rule 7002, table 7000: unreachable 10.20.0.0/16"),
    (WEB_DB, lookup("pref 100 from 10.20.1.0/24 blackhole"), AT_BRIDGE, f"rule 100{NOT_OURS} says blackhole"),
    (WEB_DB, lookup("pref 100 from 10.20.1.0/24 iif br-blog prohibit"), AT_BRIDGE, f"rule 100{NOT_OURS} says prohibit"),
    (WEB_DB, lookup("pref 100 to 10.20.2.0/24 lookup 7000"), AT_BRIDGE,
     f"rule 100{NOT_OURS}, table 7000: unreachable 10.20.0.0/16"),
)
LINKS = (
    (WEB_DB, broken(f"ip neigh replace 10.20.2.2 lladdr {WRONG} dev br-blog nud permanent"), "last seen out of bridge br-blog",
     "br-blog: neighbour entry for 10.20.2.2"),
    (WEB_DB, ([f"ip {WEB}neigh replace 10.20.1.1 lladdr {WRONG} dev v-blog-web-a nud permanent"],
              [f"ip {WEB}neigh del 10.20.1.1 dev v-blog-web-a"]), "last seen in at port v-blog-web-b",
     f"neighbour entry in blog/web: 10.20.1.1 is at {WRONG}"),
    (WEB_DB, broken("bridge fdb del MAC dev v-blog-db-b master"), "last seen out of bridge br-blog",
     "port v-blog-db-b: forwarding entry for"),
    (WEB_DB, (["bridge link set dev v-blog-web-b state 0"], ["bridge link set dev v-blog-web-b state 3"]),
     "last seen in at port v-blog-web-b", "port v-blog-web-b is disabled, not forwarding"),
    (WEB_DB, ([f"ip {DB}link set v-blog-db-a address {WRONG}"], [f"ip {DB}link set v-blog-db-a address MAC"]), AT_DB,
     f"blog/db's card has hardware address {WRONG}"),
    (WEB_DB, links("v-blog-db-b"), "last seen out of bridge br-blog", "interface v-blog-db-b (up)"),
    (WEB_DB, links("v-blog-web-b"), NEVER, "interface v-blog-web-b (up)"),
    (WEB_DB, links("br-blog"), (NEVER, "last seen in at port v-blog-web-b"), "interface br-blog (up)"),
    (WEB_DB, links("v-blog-db-a", DB), "last seen out of bridge br-blog", "namespace ns-blog-db: interface v-blog-db-a (up)"),
    (WEB_DB, broken(f"ip {DB}address flush dev v-blog-db-a"), AT_DB, "namespace ns-blog-db: interface v-blog-db-a: address 10.20.2.2/24"),
    (WEB_DB, broken("ip link set v-blog-db-b nomaster"), "last seen out of bridge br-blog", "bridge of cable v-blog-db-b (br-blog)"),
    (OUT, (["ip link set eth0 down"], ["ip link set eth0 up", "ip route add default via 192.0.2.1"]), AT_BRIDGE,
     "no way to 203.0.113.1 in table 7001"),
    (OUT, broken("iptables -t nat -F POSTROUTING"), "last seen out of eth0", "it left with 10.20.1.2, no address of this host"),
)


class TraceTest(SandboxTest):
    """Each planted fault stands between two traces that say yes."""

    def setUp(self):
        super().setUp()
        cli("apply", self.file("sound.json", TOPOLOGY), "--quiet")

    def trace(self, words):
        """Trace in process: 40 faults are a lot of processes otherwise -> (yes?, lines)."""
        options = dict(zip(words[3::2], words[4::2]))
        world = vpcctl.Store(os.environ["VPCCTL_DATA"]).load()[0]
        port = int(options["--port"]) if "--port" in options else None
        found = vpcctl.trace(vpcctl.Sight(world), vpcctl.path_flow(world, *(words[:3] + (port, options.get("--protocol", "tcp")))))
        return vpcctl.is_answered(found), vpcctl.trace_lines(found)

    def run_all(self, commands):
        mac = record("blog")["subnets"][1]["mac"]
        for command in commands:
            done = run(command.replace("MAC", mac).split())
            self.assertEqual(done.code, 0, done)

    def assert_yes(self, words):
        """It says yes, perhaps a moment later: neighbours that could not be reached are not asked again at once."""
        wait_until(lambda: self.trace(words)[0], LONG, "yes to " + " ".join(words))

    def assert_named(self, words, place, cause):
        """The trace says no, was last seen there, and names this cause."""
        yes, lines = self.trace(words)
        text = "\n".join(lines)
        self.assertFalse(yes, text)
        verdict = next(line for line in lines if line.startswith("✗ no: "))
        self.assertTrue(any(one in verdict for one in ((place,) if isinstance(place, str) else place)), f"{place}\n{text}")
        causes = lines[lines.index(verdict) + 1:]
        self.assertTrue(any(cause in line for line in causes), f"{cause}\n{text}")
        return text

    def check(self, faults):
        self.assert_yes(WEB_API)
        for words, (plant, undo), place, cause in faults:
            with self.subTest(" ".join(plant)):
                self.assert_yes(words)
                try:
                    self.run_all(plant)
                    self.assert_named(words, place, cause)
                finally:
                    self.run_all(undo)
        self.assert_yes(WEB_DB)
        self.assert_yes(OUT)


class CommandTest(TraceTest):
    """The command itself, and what is no fault of the network."""

    def test_answers_and_exit_codes(self):
        for words in (WEB_API, PING, ("blog", "web", "10.20.1.1", "--protocol", "icmp"), ("blog", "db", "db", "--port", "5432")):
            self.assert_yes(words)
        told = cli("explain", *WEB_DB, "--trace").out.splitlines()
        self.assertRegex(told[-1], r"\A✓ yes: answered \(SYN-ACK\) after \d+\.\d{3} ms\Z")
        times = [float(line.split()[0]) for line in told[-13:-1]]
        self.assertEqual((times[0], sorted(times)), (0.0, times))
        lines = cli("explain", *OUT, "--trace", env={"PYTHONIOENCODING": "ascii"}).out.splitlines()
        self.assertRegex(lines[-6], r"\A +\d+\.\d{3} ms  out of eth0, from 192\.0\.2\.2:\d+\Z")
        self.assertRegex(lines[-1], r"\Aok yes: answered \(SYN-ACK\) after")
        self.run_all(["bridge fdb del MAC dev v-blog-db-b master"])
        cli("explain", *WEB_DB, "--trace", code=1)
        cli("restore")

    def test_who_listens(self):
        with tcp_listener("ns-blog-db", 6000, "127.0.0.1"):
            self.assert_named(("blog", "web", "db", "--port", "6000"), AT_DB, " listens on 127.0.0.1 only: no other subnet reaches it")
        with tcp_listener("ns-blog-db", 6000, "10.20.2.2"):
            self.assert_yes(("blog", "web", "db", "--port", "6000"))
        self.assert_named(("blog", "web", "db", "--port", "6000"), AT_DB, "nothing listens on tcp/6000 in blog/db")
        asked = ("blog", "web", "db", "--port", "6000", "--protocol", "udp")
        with udp_listener("ns-blog-db", 6000):
            self.assert_yes(asked)
        self.assertIn("ICMP port unreachable from 10.20.2.2", self.assert_named(asked, AT_DB, "nothing listens on udp/6000"))

    def test_what_the_records_know(self):
        """A policy of ours and a gateway's guard are named like any other rule, but as ours."""
        policy = {"subnet": "db", "ingress": [{"protocol": "tcp", "port": 5432, "action": "deny"}]}
        cli("apply-policy", "blog", self.file("policy.json", policy))
        self.assertNotIn(NOT_OURS, self.assert_named(WEB_DB, AT_DB, "--comment policy-ingress-deny-5432 -j DROP"))
        cli("reset-policy", "blog", "db")
        self.assert_yes(WEB_DB)
        self.assert_yes(("shop", "api", "blog/web", "--port", "80"))
        self.assert_named(("blog", "db", "shop/api", "--port", "8080"), AT_BRIDGE, "rp_filter")
        self.assert_named(("blog", "web", "10.20.1.1", "--port", "22"), AT_BRIDGE, "table filter, chain vpc-in-blog")
        self.assert_named(("blog", "web", "10.20.2.77", "--port", "22"), AT_BRIDGE, "nobody answers ARP for 10.20.2.77")

    def test_an_address_of_the_host(self):
        asked, (plant, undo) = ("blog", "web", "192.0.2.2", "--port", "6000"), rules("filter", "INPUT", "-p tcp -j ACCEPT")
        with tcp_listener(None, 6000):
            self.assert_named(asked, AT_BRIDGE, "table filter, chain vpc-in-blog: ")
            self.run_all(plant)
            self.assert_yes(asked)
            self.run_all(undo)

    def test_probe_shows_it_when_it_disagrees(self):
        self.assertNotIn(" ms", cli("explain", *WEB_DB, "--probe").out)
        # the hops do not understand this condition; the packet knows
        plant, undo = rules("raw", "PREROUTING", "-s 10.20.1.2 -m length --length 0:2000 -j DROP")
        self.run_all(plant)
        told = cli("explain", *WEB_DB, "--probe", code=1).out
        self.run_all(undo)
        self.assertIn("probe and hops disagree; where the packet is seen:\n    0.000 ms  out of blog/web's card", told)
        self.assertIn("chain PREROUTING: -s 10.20.1.2/32 -m length --length 0:2000 -j DROP", told.splitlines()[-1])

    def test_a_subnet_that_is_down(self):
        cli("explain", *WEB_DB, "--trace")
        for name in ("web", "db"):
            self.run_all([f"ip netns del ns-blog-{name}"])
            told = cli("explain", *WEB_DB, "--trace", code=3)
            self.assertIn(f"subnet {name} is down: there is no namespace ns-blog-{name}", told.err)
            self.assertNotIn(" ms", told.out)
            cli("restore", "--quiet")
        self.assert_yes(WEB_DB)

    def test_a_dry_run_sends_nothing(self):
        with tcp_listener("ns-blog-db", 6000) as seen:
            told = cli("--dry-run", "explain", "blog", "web", "db", "--port", "6000", "--trace", code=1).out
            self.assertIn(">>> ip netns exec ns-blog-web tcpdump -n -i v-blog-web-a host 10.20.2.2 &\n", told)
            self.assertTrue(told.endswith(">>> ip netns exec ns-blog-web nc -z -w 3 10.20.2.2 6000\n"), told)
            self.assertEqual(seen, [])
            self.assert_yes(("blog", "web", "db", "--port", "6000"))
            self.assertEqual(set(seen), {"10.20.1.2"})

    def test_others_who_are_dropped_meanwhile(self):
        """A rule that counts other packets all the time is not taken for the one that counts ours."""
        plant, undo = rules("filter", "FORWARD", "-d 10.20.2.2 -p tcp -j DROP")
        noisy, quiet = rules("filter", "FORWARD", "-d 10.20.2.2 -p udp -j DROP")
        self.run_all(plant + noisy)
        stop = threading.Event()

        def noise():
            with contextlib.closing(socket_in("ns-blog-web", socket.SOCK_DGRAM)) as sender:
                while not stop.wait(0.005):
                    sender.sendto(b"noise", ("10.20.2.2", 9))
        thread = threading.Thread(target=noise)
        thread.start()
        try:
            text = self.assert_named(WEB_DB, AT_BRIDGE, "-d 10.20.2.2/32 -p tcp -j DROP")
        finally:
            stop.set()
            thread.join()
        self.assertNotIn("-p udp", text)
        self.run_all(undo + quiet)
        self.assert_yes(WEB_DB)

    def test_a_tool_that_fails(self):
        """What was seen is told, also where the rules cannot be looked at."""
        path = os.path.dirname(self.file("iptables-save", "#!/bin/sh\necho no rules today >&2\nexit 1\n"))
        os.chmod(os.path.join(path, "iptables-save"), 0o755)
        plant, undo = rules("raw", "PREROUTING", "-s 10.20.1.2 -j DROP")
        self.run_all(plant)
        told = cli("explain", *WEB_DB, "--trace", code=1, env={"PATH": path + ":" + os.environ["PATH"]}).out
        self.run_all(undo)
        self.assertIn(" ms  in at port v-blog-web-b\n", told)
        self.assertIn("could not look further: `iptables-save -c` failed: no rules today", told)

    @unittest.skipUnless(vpcctl.find_tool("nft"), "needs nft")
    def test_rules_that_iptables_does_not_show(self):
        for words, told in (("counter drop", "chain stop: ip daddr 10.20.2.2 drop" + NOT_OURS + ": counted 3 packets"),
                            ("drop", "perhaps nft table inet guard, chain stop: ip daddr 10.20.2.2 drop")):
            ruleset = ("table inet guard { chain stop { type filter hook forward priority -5; policy accept; "
                       f"ip daddr 10.20.2.2 {words}; }}\n}}")
            self.assert_yes(WEB_DB)
            self.assertEqual(run(["nft", "-f", "-"], input=ruleset).code, 0)
            try:
                self.assert_named(WEB_DB, AT_BRIDGE, told)
            finally:
                self.run_all(["nft delete table inet guard"])
        self.assert_yes(WEB_DB)


class RulesTest(TraceTest):

    def test_rules_that_drop(self):
        self.check(RULES)


class RoutesTest(TraceTest):

    def test_routes_and_routing_rules(self):
        self.check(ROUTES)


class LinksTest(TraceTest):

    def test_cards_ports_and_entries(self):
        self.check(LINKS)
