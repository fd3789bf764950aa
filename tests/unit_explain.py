"""Why is it blocked: every kind of hop, both answers, and what would allow it. No root."""
import copy
import os
import random
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


def ask(world, start, target, port=None, protocol="tcp", listening=None):
    """The hops from "vpc/subnet"."""
    vpc, subnet = start.split("/")
    return vpcctl.explain_path(world, vpc, subnet, target, port, protocol, listening)


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
                     " && vpcctl apply-policy shop shop-api.json")

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
        self.passes(ask(world, "blog/web", "db", 81, "tcp", lambda *_: True), *self.INTRA)
        hops = ask(world, "blog/web", "db", 53, "udp", lambda *_: False)
        self.assertTrue(hops[-1].remedy.startswith("vpcctl deploy-app blog db --port 53 -- python3 -c \"import socket"))
        compile(hops[-1].remedy.split('"')[1], "remedy", "exec")
        self.passes(ask(world, "blog/web", "db", None, "icmp", lambda *_: False), *self.INTRA)

    def test_another_protocol(self):
        world = make_world()
        hops = ask(world, "blog/web", "db", None, "all")
        self.passes(hops, *self.INTRA)
        self.assertTrue(hops[0].text.startswith("a protocol other than tcp, udp, icmp from blog/web"), hops[0].text)
        self.assertIsNone(hops[-2].ok)
        world["blog"]["subnets"][1]["policy"]["ingress"] = [{"protocol": "all", "action": "deny"}]
        self.blocked(ask(world, "blog/web", "db", None, "all"), "ingress policy", "ingress rule 1, deny all",
                     "vpcctl explain blog web 10.20.2.2 --protocol all --policy > blog-db.json"
                     " && vpcctl apply-policy blog blog-db.json")
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
                self.assertEqual(now, was or other == probe, (policy, probe, other, new))
                changed += now != was
        self.assertGreater(changed, 50)


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
        self.assertTrue(lines[-1].startswith("yes, as far as the records tell: udp/53 "))
        self.assertTrue(any(line.startswith("? listening") for line in lines))


if __name__ == "__main__":
    unittest.main()
