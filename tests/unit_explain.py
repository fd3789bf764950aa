"""Why is it blocked: every kind of hop, both answers, and what would allow it. No root."""
import copy
import os
import random
import socket
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import vpcctl  # noqa: E402

ALLOW_80 = {"port": 80, "protocol": "tcp", "action": "allow"}
DENY_22 = {"port": 22, "protocol": "tcp", "action": "deny"}


def make_vpc(name, second, subnets, **more):
    """A record with subnets (names) in 10.<second>.0.0/16, without policies."""
    net = "10.%d.%%d.%%s" % second
    return dict({
        "name": name, "cidr": "10.%d.0.0/16" % second, "bridge": "br-" + name, "chain": "vpc-" + name,
        "table": 7000 + second, "apps": [], "peers": [], "nat": None, "published": [],
        "subnets": [{"name": s, "cidr": net % (i, "0/24"), "gw": net % (i, "1"), "host_ip": net % (i, "2"),
                     "policy": {"ingress": [], "egress": []}} for i, s in enumerate(subnets, 1)]}, **more)


def make_world(allowed=("10.20.1.0/24", "10.30.1.0/24")):
    """blog (web, db) peered with shop (api, orders) unless allowed is None; lone beside them."""
    world = {"blog": make_vpc("blog", 20, ["web", "db"], apps=[{"subnet": "db", "port": 5432}]),
             "shop": make_vpc("shop", 30, ["api", "orders"],
                              apps=[{"subnet": "api", "port": 80}, {"subnet": "orders", "port": 80}]),
             "lone": make_vpc("lone", 40, ["web"], apps=[{"subnet": "web", "port": 80}])}
    for one, other, side in (("blog", "shop", "a"), ("shop", "blog", "b")):
        if allowed:
            world[one]["peers"].append({"peer_vpc": other, "chain": "vpc-peer-blog-shop",
                                        "allowed": list(allowed), "side": side})
    return world


def ask(world, start, target, port=None, protocol="tcp", sight=None):
    """The hops from "vpc/subnet"."""
    vpc, subnet = start.split("/")
    return vpcctl.explain_path(world, vpc, subnet, target, port, protocol, sight)


class Ears(vpcctl.Records):
    """Sees nothing but who listens: (kind, address, port)."""

    def __init__(self, *listeners, running=True):
        self.found, self.running = [vpcctl.Listener(*one, inode=0) for one in listeners], running

    def listeners(self, _subnet, _vpc):
        return self.found

    def program(self, _listener, _subnet):
        return "nginx"

    def runs(self, _app):
        return self.running

    def takes_ipv4(self, _flow, listener):
        return {443: True, 444: False, 445: None}[listener.port]


class Explain(unittest.TestCase):
    def blocked(self, hops, where, text, remedy):
        """The last hop blocks, alone, with that name, words and remedy."""
        self.assertEqual([hop.ok is False for hop in hops].index(True), len(hops) - 1, hops)
        self.assertEqual((hops[-1].where, hops[-1].remedy), (where, remedy))
        self.assertIn(text, hops[-1].text)

    def passes(self, hops, *wheres):
        """Nothing blocks; the hops have those names."""
        self.assertEqual([hop for hop in hops if hop.ok is False], [])
        self.assertEqual(tuple(hop.where for hop in hops), ("packet",) + wheres)

    INTRA = ("egress policy", "route table", "firewall", "address", "ingress policy", "listening", "way back")

    def test_sibling(self):
        hops = ask(make_world(), "blog/web", "db")
        self.passes(hops, *self.INTRA)
        self.assertEqual(hops[0].text, "tcp/5432 from blog/web (10.20.1.2) to blog/db (10.20.2.2)")

    def test_itself(self):
        world = make_world()
        world["blog"]["subnets"][1]["policy"] = {"ingress": [], "egress": [], "default": {
            "ingress": "deny", "egress": "deny"}}
        for target in ("10.20.2.2", "db", "127.0.0.1", "0.0.0.0"):
            self.passes(ask(world, "blog/db", target), "loopback", "listening")
        self.blocked(ask(world, "blog/db", "db", 81), "listening", "nothing listens on tcp/81",
                     "vpcctl deploy-app blog db --port 81")

    def test_egress_policy(self):
        world = make_world()
        world["blog"]["subnets"][0]["policy"]["egress"] = [ALLOW_80]
        self.blocked(ask(world, "blog/web", "db"), "egress policy",
                     "blog/web: no egress rule names it; a list of only allows is an allow-list",
                     "vpcctl explain blog web 10.20.2.2 --port 5432 --policy > blog-web.json"
                     " && vpcctl apply-policy blog blog-web.json")

    def test_ingress_policy(self):
        world = make_world()
        world["shop"]["subnets"][0]["policy"]["ingress"] = [ALLOW_80, DENY_22]
        self.blocked(ask(world, "blog/web", "api.shop", 22), "ingress policy",
                     "shop/api: ingress rule 2, deny tcp/22",
                     "vpcctl explain blog web 10.30.1.2 --port 22 --policy > shop-api.json"
                     " && vpcctl apply-policy shop shop-api.json   # or remove or narrow ingress rule 2 yourself")

    def test_not_peered(self):
        self.blocked(ask(make_world(None), "blog/web", "shop/api"), "route table",
                     "table 7020: not peered with shop, whose range holds 10.30.1.2",
                     "vpcctl peer blog shop --allow-cidrs 10.20.1.0/24,10.30.1.0/24")

    def test_peered(self):
        wheres = tuple("peering" if where == "firewall" else where for where in self.INTRA)
        self.passes(ask(make_world(), "blog/web", "api.shop"), *wheres)
        self.passes(ask(make_world(), "shop/api", "blog/web", None, "icmp"), *wheres)

    def test_peering_without_the_target(self):
        self.blocked(ask(make_world(), "blog/web", "shop/orders"), "route table",
                     "no listed block of peer shop holds 10.30.2.2",
                     "vpcctl unpeer blog shop && "
                     "vpcctl peer blog shop --allow-cidrs 10.20.1.0/24,10.30.1.0/24,10.30.2.0/24")

    def test_peering_without_the_source(self):
        self.blocked(ask(make_world(), "shop/orders", "blog/web", 80), "peering",
                     "chain vpc-peer-blog-shop: no listed block holds the source 10.30.2.2",
                     "vpcctl unpeer blog shop && "
                     "vpcctl peer blog shop --allow-cidrs 10.20.1.0/24,10.30.1.0/24,10.30.2.0/24")

    def test_peering_is_not_transitive(self):
        world = make_world()
        world["shop"]["peers"].append({"peer_vpc": "lone", "chain": "c", "allowed": [
            "10.30.0.0/16", "10.40.0.0/16"], "side": "a"})
        self.blocked(ask(world, "blog/web", "lone/web"), "route table", "not peered with lone",
                     "vpcctl peer blog lone --allow-cidrs 10.20.1.0/24,10.40.1.0/24")

    def test_outside(self):
        world = make_world()
        self.blocked(ask(world, "blog/web", "192.0.2.1", 443), "route table", "there is no NAT",
                     "vpcctl enable-nat blog")
        world["blog"]["nat"] = {"interface": "eth0", "subnets": ["web"]}
        hops = ask(world, "blog/web", "192.0.2.1", 443)
        self.passes(hops, "egress policy", "route table", "firewall", "beyond", "way back")
        self.assertIsNone(hops[-2].ok)
        self.blocked(ask(world, "blog/db", "192.0.2.1", 443), "route table", "NAT serves only web",
                     "vpcctl disable-nat blog && "
                     "vpcctl enable-nat blog --interface eth0 --subnet-filter web,db")
        world["blog"]["nat"]["subnets"] = None
        self.assertTrue(all(hop.ok is not False for hop in ask(world, "blog/db", "192.0.2.1", 443)))
        self.blocked(ask(world, "blog/web", "lone/web"), "route table", "not peered",
                     "vpcctl peer blog lone --allow-cidrs 10.20.1.0/24,10.40.1.0/24")
        for address in ("224.0.0.1", "255.255.255.255", "169.254.169.254", "240.0.0.1", "0.1.2.3"):
            hops = ask(world, "blog/web", address)
            self.blocked(hops, "route table", "no network out there", "nothing does, by design")

    def test_gateways(self):
        for address in ("10.20.0.1", "10.20.1.1", "10.20.2.1"):
            hops = ask(make_world(), "blog/web", address, None, "icmp")
            self.passes(hops, "egress policy", "host", "way back")
        self.blocked(ask(make_world(), "blog/web", "10.20.1.1", 22), "host", "answers only ping",
                     "nothing does, by design; ping it: vpcctl explain blog web 10.20.1.1 --protocol icmp")
        self.blocked(ask(make_world(), "blog/web", "10.30.1.1", None, "icmp"), "host", "a gateway of shop",
                     "nothing does, by design; aim at a subnet of shop instead")

    def test_nobody_has_the_address(self):
        world = make_world(("10.20.0.0/16", "10.30.0.0/16"))
        self.blocked(ask(world, "blog/web", "10.20.2.9", 5432), "address", "nobody has 10.20.2.9",
                     "nothing does; subnet db answers at 10.20.2.2: "
                     "vpcctl explain blog web 10.20.2.2 --port 5432")
        self.blocked(ask(world, "blog/web", "10.30.9.2"), "address", "no subnet of shop holds it",
                     "vpcctl add-subnet shop net-10-30-9-2 --cidr 10.30.9.0/24")
        self.blocked(ask(world, "blog/web", "10.20.9.18"), "address", "nobody",
                     "vpcctl add-subnet blog net-10-20-9-18 --cidr 10.20.9.16/28")
        self.blocked(ask(world, "blog/web", "10.20.9.3"), "address", "nobody",
                     "vpcctl add-subnet blog net-10-20-9-3  # at another address")

    def test_listening(self):
        world = make_world()
        self.blocked(ask(world, "blog/web", "db", 81), "listening", "nothing listens on tcp/81 in blog/db",
                     "vpcctl deploy-app blog db --port 81")
        hops = ask(world, "blog/web", "db", 53, "udp")
        self.passes(hops, *self.INTRA)
        self.assertEqual([hop.ok for hop in hops if hop.where == "listening"], [None])
        self.passes(ask(world, "blog/web", "db", 81, "tcp", Ears(("tcp", "0.0.0.0", 81))), *self.INTRA)
        hops = ask(world, "blog/web", "db", 53, "udp", Ears())
        self.assertTrue(hops[-1].remedy.startswith("vpcctl deploy-app blog db --port 53 -- python3 -c \"import socket"))
        compile(hops[-1].remedy.split('"')[1], "remedy", "exec")
        self.passes(ask(world, "blog/web", "db", None, "icmp", Ears()), *self.INTRA)

    def test_who_listens_where(self):
        for port, ears, ok, text, remedy in (
                (81, Ears(("tcp", "0.0.0.0", 81)), True, "tcp/81 on blog/db: nginx listens", None),
                (81, Ears(("tcp", "10.20.2.2", 81)), True, "nginx listens", None),
                (443, Ears(("tcp6", "::", 443)), True, "nginx listens", None),
                (444, Ears(("tcp6", "::", 444)), False, "nginx listens on :: only", "let it listen on 10.20.2.2"),
                (445, Ears(("tcp6", "::", 445)), None, "whether it takes IPv4 is not seen", None),
                (81, Ears(("tcp", "127.0.0.1", 81)), False, "nginx listens on 127.0.0.1 only: no other subnet reaches it",
                 "let it listen on 10.20.2.2"),
                (81, Ears(("tcp", "0.0.0.0", 82)), False, "nothing listens on tcp/81", "vpcctl deploy-app blog db --port 81"),
                (81, Ears(("udp", "0.0.0.0", 81)), False, "nothing listens on tcp/81 in blog/db, only by udp", None),
                (5432, Ears(running=False), False, "deploy-app's program is not running", "vpcctl restore blog "),
                (5432, Ears(), False, "although deploy-app's program runs", "vpcctl logs blog db --port 5432 ")):
            with self.subTest(text):
                hop = [hop for hop in ask(make_world(), "blog/web", "db", port, "tcp", ears) if hop.where == "listening"][0]
                self.assertEqual(hop.ok, ok)
                self.assertIn(text, hop.text)
                self.assertEqual((hop.remedy or "")[:len(remedy or "")], remedy or "")
        self.passes(ask(make_world(), "blog/db", "127.0.0.1", 81, "tcp", Ears(("tcp", "127.0.0.1", 81))), "loopback",
                    "listening")
        self.assertFalse(ask(make_world(), "blog/db", "db", 81, "tcp", Ears(("tcp", "127.0.0.1", 81)))[-1].ok)

    def test_the_hosts_own_addresses(self):
        class Host(vpcctl.Records):
            def host_device(self, address):
                return "eth0" if address == "192.0.2.2" else None
        for nat in (None, {"interface": "eth0", "subnets": None}):
            world = make_world()
            world["blog"]["nat"] = nat
            for port, protocol in ((80, "tcp"), (53, "udp"), (None, "icmp")):
                hop = ask(world, "blog/web", "192.0.2.2", port, protocol, Host())[-1]
                self.assertEqual((hop.ok, hop.where), (False, "host"))
                self.assertIn("192.0.2.2 is this host itself (eth0)", hop.text)
                self.assertNotIn("enable-nat", hop.remedy)
            self.assertNotEqual(ask(world, "blog/web", "192.0.2.3", 80, "tcp", Host())[-1].where, "host")

    def test_a_way_out_that_helps(self):
        class Ways(vpcctl.Records):
            def uplink(self, address):
                return {"192.0.2.1": ("eth0", "eth0"), "192.0.2.2": ("eth1", "eth0"), "192.0.2.3": ("none", None)}[address]
        for address, remedy in (("192.0.2.1", "vpcctl enable-nat blog"), ("192.0.2.2", "vpcctl enable-nat blog --interface eth1"),
                                ("192.0.2.3", None)):
            self.assertEqual(ask(make_world(), "blog/web", address, 80, "tcp", Ways())[-1].remedy, remedy)

    def test_another_protocol(self):
        world = make_world()
        hops = ask(world, "blog/web", "db", None, "all")
        self.passes(hops, *self.INTRA)
        self.assertTrue(hops[0].text.startswith("a protocol other than tcp, udp, icmp from blog/web"), hops[0].text)
        self.assertIsNone(hops[-2].ok)
        world["blog"]["subnets"][1]["policy"]["ingress"] = [{"protocol": "all", "action": "deny"}]
        self.blocked(ask(world, "blog/web", "db", None, "all"), "ingress policy", "ingress rule 1, deny all",
                     "vpcctl explain blog web 10.20.2.2 --protocol all --policy > blog-db.json"
                     " && vpcctl apply-policy blog blog-db.json   # or remove or narrow ingress rule 1 yourself")
        self.assertEqual(ask(world, "blog/web", "10.20.1.1", None, "all")[-1].where, "host")
        for protocol in ("icmp", "all"):
            with self.assertRaises(vpcctl.Problem):
                ask(world, "blog/web", "db", 80, protocol)

    def test_the_port_that_is_meant(self):
        self.assertEqual(ask(make_world(), "blog/web", "db")[0].text.split()[0], "tcp/5432")
        self.assertEqual(ask(make_world(), "blog/db", "web")[0].text.split()[0], "tcp/80")
        with self.assertRaises(vpcctl.Problem):
            ask(make_world(), "blog/web", "db", None, "udp")


class Names(unittest.TestCase):
    def resolve(self, text, subnet="web"):
        return vpcctl.resolve_target(make_world(), "blog", subnet, text)

    def test_known(self):
        for text in ("db", "db.blog", "db.blog.internal", "blog/db", "10.20.2.2"):
            self.assertEqual(self.resolve(text), "10.20.2.2", text)
        for text in ("api.shop", "api.shop.internal", "shop/api"):
            self.assertEqual(self.resolve(text), "10.30.1.2", text)
        self.assertEqual(self.resolve("shop/orders"), "10.30.2.2")
        self.assertEqual(self.resolve("198.51.100.7"), "198.51.100.7")

    def test_unknown(self):
        for text in ("api", "orders.shop", "web.lone", "web.lone.internal", "nobody", "blog/nobody",
                     "nobody/web", "10.20.1.0/24", "10.20.1", "::1", "", "/"):
            with self.assertRaises(vpcctl.Problem, msg=text):
                self.resolve(text)
        for vpc, subnet in (("nobody", "web"), ("blog", "nobody")):
            with self.assertRaises(vpcctl.Problem):
                vpcctl.explain_path(make_world(), vpc, subnet, "10.20.1.2")

    def test_seen(self):
        world = make_world()
        self.assertEqual(vpcctl.name_data(world, world["shop"]), [
            ("10.30.1.2", ("api", "api.shop", "api.shop.internal")),
            ("10.30.2.2", ("orders", "orders.shop", "orders.shop.internal")),
            ("10.20.1.2", ("web.blog", "web.blog.internal"))])


SIBLINGS = make_vpc("blog", 20, ["web", "db"])["subnets"]


class Policy(unittest.TestCase):
    def decide(self, rules, protocol="tcp", port=80, other="10.20.1.2", direction="ingress", **more):
        policy = dict({direction: rules}, **more)
        return vpcctl.policy_decision(policy, direction, protocol, port, other, SIBLINGS)

    def test_defaults(self):
        why = "no ingress rule names it; an empty list passes everything"
        self.assertEqual(self.decide([]), (True, why, None))
        self.assertFalse(self.decide([ALLOW_80], port=81)[0])
        self.assertTrue(self.decide([ALLOW_80, DENY_22], port=81)[0])
        self.assertFalse(self.decide([DENY_22], port=81, default={"ingress": "deny"})[0])
        self.assertTrue(self.decide([ALLOW_80], port=81, default={"ingress": "allow"})[0])
        self.assertFalse(self.decide([ALLOW_80], port=81, default={"egress": "allow"})[0])
        self.assertFalse(self.decide([ALLOW_80], "icmp", None)[0])

    def test_denies_first(self):
        rules = [ALLOW_80, {"port": "1-100", "protocol": "tcp", "action": "deny", "from": "web"}]
        self.assertEqual(self.decide(rules), (False, "ingress rule 2, deny tcp/1-100 from web", 1))
        self.assertEqual(self.decide(rules, other="10.20.2.2"), (True, "ingress rule 1, allow tcp/80", 0))

    def test_narrowed(self):
        for other, answer in (("web", True), ("10.20.0.0/16", True), ("10.20.1.2/32", True), ("db", False),
                              ("10.30.0.0/16", False), ("gone", False)):
            rules = [{"protocol": "tcp", "action": "allow", "to": other}]
            self.assertEqual(self.decide(rules, direction="egress")[0], answer, other)

    def test_icmp_has_no_port(self):
        self.assertFalse(self.decide([{"protocol": "icmp", "action": "deny"}], "icmp", None)[0])
        self.assertTrue(self.decide([{"protocol": "tcp", "action": "deny"}], "icmp", None)[0])

    def test_all(self):
        """A rule for all speaks of every flow; a flow of another protocol is named by such rules only."""
        deny = {"protocol": "all", "action": "deny", "from": "web"}
        for flow in (("tcp", 80), ("udp", 53), ("icmp", None), ("all", None)):
            self.assertEqual(self.decide([ALLOW_80, deny], *flow), (False, "ingress rule 2, deny all from web", 1))
            self.assertTrue(self.decide([ALLOW_80, deny], *flow, other="10.20.2.2")[0])
            self.assertTrue(self.decide([{"protocol": "all", "action": "allow"}], *flow)[0])
        named = [{"protocol": protocol, "action": "deny"} for protocol in ("tcp", "udp", "icmp")]
        self.assertTrue(self.decide(named, "all", None)[0])
        self.assertFalse(self.decide([ALLOW_80], "all", None)[0])

    def test_allowing_policy_is_a_guide_policy(self):
        db = dict(SIBLINGS[1], policy={"ingress": [ALLOW_80], "egress": [DENY_22]})
        new = vpcctl.allowing_policy(db, "ingress", "tcp", 5432, "10.20.1.2", SIBLINGS)
        self.assertEqual(new, {"subnet": "10.20.2.0/24", "egress": [DENY_22], "ingress": [
            ALLOW_80, {"port": 5432, "protocol": "tcp", "action": "allow", "from": "web"}]})

    def test_allowing_policy_allows_that_flow_and_no_other(self):
        dice = random.Random(6)
        others = ["10.20.1.2", "10.20.2.2", "10.20.1.3", "10.30.1.2", "192.0.2.1"]
        probes = [(p, n, o) for p in ("tcp", "udp") for n in (1, 21, 22, 23, 80, 99, 65535) for o in others]
        probes += [(p, None, o) for p in ("icmp", "all") for o in others]
        changed = 0
        for _ in range(300):
            direction = dice.choice(["ingress", "egress"])
            policy = {"ingress": [], "egress": []}
            for _ in range(dice.randint(0, 4)):
                rule = {"protocol": dice.choice(["tcp", "udp", "icmp", "all"]),
                        "action": dice.choice(["allow", "deny"])}
                other = dice.choice([None, None, "web", "10.20.0.0/16", "10.30.1.2/32", "0.0.0.0/0"])
                port = dice.choice([None, 22, 80, "20-90", "22-23"])
                if other:
                    rule["from" if direction == "ingress" else "to"] = other
                if port and rule["protocol"] in ("tcp", "udp"):
                    rule["port"] = port
                policy[direction].append(rule)
            if dice.random() < 0.3:
                policy["default"] = {dice.choice(["ingress", "egress"]): dice.choice(["allow", "deny"])}
            probe = dice.choice(probes)
            old, subnet = copy.deepcopy(policy), dict(SIBLINGS[1], policy=policy)
            new = vpcctl.allowing_policy(subnet, direction, *probe, siblings=SIBLINGS)
            self.assertEqual(policy, old)
            for other in probes:
                if probe[0] == "all" and other[2] == probe[2]:
                    continue  # what lets all protocols through lets these through, too
                if other[2] == "10.20.1.3" and probe[2] == "10.20.1.2":
                    continue  # beside a subnet's one host: a rule by name speaks of its block
                was = vpcctl.policy_decision(old, direction, *other, siblings=SIBLINGS)[0]
                now = vpcctl.policy_decision(new, direction, *other, siblings=SIBLINGS)[0]
                if other[0] == "all" and not now:
                    continue  # protocols that no rule names are let in no more where allows stand for a deny of all
                self.assertEqual(now, was or other == probe, (policy, probe, other, new))
                changed += now != was
        self.assertGreater(changed, 50)


    def test_allowing_policy_stays_small(self):
        for rules, most in (([DENY_22], 5), ([ALLOW_80, DENY_22], 6), ([{"protocol": "tcp", "action": "deny"}], 4),
                            ([{"protocol": "tcp", "action": "deny", "from": "10.20.0.0/16"}], 10),
                            ([{"protocol": "tcp", "action": "deny", "from": "web"}], 2)):
            db = dict(SIBLINGS[1], policy={"ingress": rules, "egress": []})
            new = vpcctl.allowing_policy(db, "ingress", "tcp", 22, "10.20.1.2", SIBLINGS)
            self.assertLessEqual(len(new["ingress"]), most, new)


def tables(*lines):
    """Rules as iptables-save prints them -> table -> chain -> (policy, rules)."""
    return vpcctl.by_chain(vpcctl.parse_rules("*filter\n:INPUT ACCEPT [0:0]\n" + "\n".join(lines) + "\nCOMMIT\n"))


PACKET = vpcctl.Packet("10.20.1.2", "10.20.2.2", "tcp", vpcctl.SOME_PORT, (5432, 5432), "br-blog", "", "02:76:0a:14:01:02",
                       ("NEW",), False)


class Rules(unittest.TestCase):
    """What somebody else's rule does to a packet: yes, no, or not known."""

    def test_conditions(self):
        for words, packet, answer in (
                ("-s 10.20.1.2/32", PACKET, True), ("-s 10.20.0.0/16 -d 10.20.2.2", PACKET, True), ("-d 10.20.1.2", PACKET, False),
                ("! -s 10.20.1.2/32", PACKET, False), ("! -s 10.30.0.0/16", PACKET, True), ("-s 10.0.0.2/255.0.0.255", PACKET, None),
                ("-p tcp -m tcp --dport 5432", PACKET, True), ("-p udp -m udp --dport 5432", PACKET, False),
                ("-p tcp --dport 5000:6000", PACKET, True), ("-p tcp ! --dport 5432", PACKET, False),
                ("-p tcp --sport 80", PACKET, False), ("-p tcp --sport 1024:65535", PACKET, True),
                ("-p tcp --sport 40000", PACKET, None), ("-p tcp -m multiport --dports 80,5432", PACKET, True),
                ("-p tcp -m multiport --dports 80,6000:7000", PACKET, False), ("-i br-blog", PACKET, True), ("-i br-+", PACKET, True),
                ("-i eth0", PACKET, False), ("! -i eth0", PACKET, True), ("-m conntrack --ctstate NEW,SNAT", PACKET, True),
                ("-m conntrack --ctstate RELATED,ESTABLISHED", PACKET, False),
                ("-m conntrack --ctstate ESTABLISHED --ctdir REPLY", PACKET._replace(states=("ESTABLISHED",), back=True), True),
                ("-m mac --mac-source 02:76:0A:14:01:02", PACKET, True), ("-m mac --mac-source 02:76:0a:14:01:03", PACKET, False),
                ("-m mac --mac-source 02:76:0a:14:01:02", PACKET._replace(mac=None), None),
                ("-m comment --comment x", PACKET, True), ("-m string --string x --algo bm", PACKET, None),
                ("-m string --string x -s 10.30.0.0/16", PACKET, False),
                ("-p icmp -m icmp --icmp-type 8", PACKET._replace(protocol="icmp"), True),
                ("-p icmp -m icmp --icmp-type 8", PACKET._replace(protocol="icmp", back=True), False),
                ("-m addrtype --dst-type LOCAL", PACKET, True), ("-m addrtype --dst-type LOCAL", PACKET._replace(exit="br-a"), False)):
            with self.subTest(words):
                self.assertEqual(vpcctl.rule_hits(tuple(words.split()) + ("-j", "DROP"), packet), answer)

    def decided(self, *lines):
        """(verdict, found) of chain INPUT."""
        found = []
        passed = vpcctl.traverse(tables(*lines)["filter"], "filter", "INPUT", PACKET, found)
        return passed, [(one.sure, one.target) for one in found]

    def test_chains(self):
        drop, perhaps = "-A INPUT -p tcp -j DROP", "-A INPUT -m string --string x -j %s"
        for lines, decided in (
                ((drop,), (True, [(True, "DROP")])), (("-A INPUT -j ACCEPT", drop), (True, [(True, "ACCEPT")])),
                ((perhaps % "ACCEPT", drop), (False, [(False, "ACCEPT"), (False, "DROP")])),
                ((perhaps % "RETURN", drop), (False, [(False, "RETURN"), (False, "DROP")])),
                (("-A INPUT -j RETURN", drop), (False, [])), (("-A INPUT -j LOG --log-prefix x",), (False, [])),
                ((":OWN - [0:0]", "-A INPUT -j OWN", "-A OWN -s 10.20.1.2 -j RETURN", "-A OWN -j DROP"), (False, [])),
                ((":OWN - [0:0]", "-A INPUT -j OWN", "-A OWN -j DROP"), (True, [(True, "DROP")])),
                ((":OWN - [0:0]", "-A INPUT -g OWN", drop, "-A OWN -j LOG"), (False, [])),
                ((":OWN - [0:0]", perhaps % "OWN", "-A OWN -j DROP"), (False, [(False, "DROP")]))):
            with self.subTest(lines):
                self.assertEqual(self.decided(*lines), decided)

    def test_hops(self):
        def hops(*lines):
            found = []
            vpcctl.traverse(tables(*lines)["filter"], "filter", "INPUT", PACKET, found)
            return [(hop.ok, hop.where, hop.remedy, hop.answer) for hop in vpcctl.judged(found, "ns-x", "blog")]
        self.assertEqual(hops("-A INPUT -p tcp -j REJECT --reject-with tcp-reset"), [
            (False, "foreign rule", "ip netns exec ns-x iptables -D INPUT -p tcp -j REJECT --reject-with tcp-reset", "rejected")])
        self.assertEqual(hops("-A INPUT -m string --string x -j DROP"), [(None, "foreign rule", None, "no answer")])
        self.assertEqual(hops("-A INPUT -p tcp -j REDIRECT --to-ports 1"), [(None, "elsewhere", None, "no answer")])
        self.assertEqual(hops('-A INPUT -p tcp -m comment --comment policy-ingress-deny-22 -j DROP'), [
            (False, "firewall", "vpcctl restore blog", "no answer")])
        self.assertEqual(hops("-A INPUT -p tcp -j ACCEPT"), [])

    def test_routing_rules(self):
        packet = PACKET._replace(exit="br-blog")
        for rule, answer in (({"priority": 1, "src": "all"}, True), ({"priority": 1, "src": "10.20.0.0", "srclen": 16}, True),
                             ({"priority": 1, "dst": "10.20.2.2"}, True), ({"priority": 1, "dst": "10.20.2.3"}, False),
                             ({"priority": 1, "iif": "br-blog [detached]"}, True), ({"priority": 1, "iif": "lo"}, False),
                             ({"priority": 1, "ipproto": "udp"}, False), ({"priority": 1, "dport": 5432}, True),
                             ({"priority": 1, "fwmark": "0x1"}, False), ({"priority": 1, "fwmark": "0x1", "not": None}, True),
                             ({"priority": 1, "tos": "0x10"}, None), ({"priority": 1, "odd": []}, None),
                             ({"priority": 1, "dport": 5432, "dport_mask": "0xffff"}, True),
                             ({"priority": 1, "dport": 5432, "dport_mask": "0xff00"}, None)):
            self.assertEqual(vpcctl.selects(rule, packet), answer, rule)


class Answers(unittest.TestCase):
    """One word for one cause."""

    def test_verdict(self):
        flow = vpcctl.path_flow(make_world(), "blog", "web", "db", 5432, "tcp")
        udp = flow._replace(protocol="udp")
        heard, none = vpcctl.Hop(True, "listening", ""), vpcctl.Hop(False, "listening", "", None, "refused")
        policy, way = vpcctl.Hop(False, "ingress policy", ""), vpcctl.Hop(False, "route table", "", None, "no route")
        reset, far, near = vpcctl.Reply("reset", ""), vpcctl.Reply("port", "10.20.2.2"), vpcctl.Reply("port", "10.20.1.1")
        refusal, nobody, lost = vpcctl.Reply("prohibited", "10.20.1.1"), vpcctl.NO_REPLY, vpcctl.Reply("unreachable", "10.20.1.1")
        for asked, reply, hops, answer in (
                (flow, vpcctl.Reply("open", ""), [policy], "open"), (flow, reset, [none], "refused"), (flow, reset, [], "refused"),
                (flow, reset, [heard], "rejected"), (flow, far, [heard], "rejected"), (flow, far, [], "rejected"),
                (udp, far, [], "refused"), (udp, far, [heard], "rejected"), (udp, near, [], "rejected"),
                (flow, refusal, [heard], "rejected"), (flow, lost, [], "no route"), (flow, nobody, [heard], "no answer"),
                (flow, nobody, [policy], "no answer"), (flow, refusal, [policy], "no answer"), (flow, lost, [way], "no route"),
                (flow, nobody, [way], "no route"), (flow, reset, [policy], "refused")):
            self.assertEqual(vpcctl.verdict(asked, reply, hops), answer, (reply, hops))

    def test_every_answer_is_expected_by_one_word(self):
        self.assertEqual(sorted(sum(vpcctl.EXPECTED.values(), ())), ["no answer", "no route", "open", "refused", "rejected"])

    def test_addresses_as_proc_prints_them(self):
        for address, family, text in (("127.0.0.1", socket.AF_INET, "127.0.0.1"), ("0.0.0.0", socket.AF_INET, "0.0.0.0"),
                                      ("::", socket.AF_INET6, "::"), ("::1", socket.AF_INET6, "::1"),
                                      ("::ffff:10.20.1.2", socket.AF_INET6, "10.20.1.2")):
            packed = socket.inet_pton(family, address)
            digits = "".join("%08X" % int.from_bytes(packed[place:place + 4], sys.byteorder) for place in range(0, len(packed), 4))
            self.assertEqual(vpcctl.printed_address(digits), text)


class Remedies(unittest.TestCase):
    def test_policies_one_after_the_other(self):
        world = make_world()
        blog, api = world["blog"]["subnets"][0], world["shop"]["subnets"][0]
        blog["policy"]["egress"], api["policy"]["ingress"] = [ALLOW_80], [ALLOW_80, DENY_22]
        world["shop"]["apps"].append({"subnet": "api", "port": 22})
        seen = []
        for _ in range(2):
            vpc, policy = vpcctl.path_policy(world, "blog", "web", "api.shop", 22)
            record = {"10.20.1.0/24": blog, "10.30.1.0/24": api}[policy.pop("subnet")]
            seen.append((vpc, record["name"]))
            record["policy"] = policy
        self.assertEqual(seen, [("blog", "web"), ("shop", "api")])
        self.assertIsNone(vpcctl.path_policy(world, "blog", "web", "api.shop", 22))
        self.assertTrue(all(hop.ok for hop in ask(world, "blog/web", "api.shop", 22)))
        self.assertFalse(ask(world, "shop/orders", "api", 22)[-1].ok)

    def test_no_policy_in_the_way(self):
        self.assertIsNone(vpcctl.path_policy(make_world(), "blog", "web", "192.0.2.1", 80))
        self.assertIsNone(vpcctl.path_policy(make_world(), "blog", "db", "db"))

    def test_peering(self):
        for old in (None, ["10.20.2.0/24", "10.30.2.0/24"], ["10.20.1.0/24", "10.30.2.0/24"]):
            hop = ask(make_world(old), "blog/web", "shop/api")[-1]
            world = make_world(hop.remedy.split("--allow-cidrs ")[1].split(","))
            self.assertTrue(all(hop.ok for hop in ask(world, "blog/web", "shop/api")), hop)


class Render(unittest.TestCase):
    def test_yes(self):
        lines = vpcctl.render_explain(ask(make_world(), "blog/web", "db"))
        self.assertEqual(lines[1], "✓ egress policy  "
                         "blog/web: no egress rule names it; an empty list passes everything")
        self.assertEqual(lines[-1], "yes: tcp/5432 from blog/web (10.20.1.2) to blog/db (10.20.2.2)")

    def test_no(self):
        lines = vpcctl.render_explain(ask(make_world(), "blog/web", "db", 81), ascii_only=True)
        self.assertTrue(lines[0].startswith("ok packet "))
        self.assertEqual(lines[-3:], ["NO listening      nothing listens on tcp/81 in blog/db",
                                      "no: nothing listens on tcp/81 in blog/db",
                                      "to allow it: vpcctl deploy-app blog db --port 81"])
        "\n".join(lines).encode("ascii")

    def test_perhaps(self):
        lines = vpcctl.render_explain(ask(make_world(), "blog/web", "db", 53, "udp"))
        self.assertTrue(lines[-1].startswith("yes, as far as can be told: udp/53 "))
        self.assertTrue(any(line.startswith("? listening") for line in lines))


if __name__ == "__main__":
    unittest.main()
