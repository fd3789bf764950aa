"""The pictures: every format says it all, and in the SVG nothing lies over anything else. No root."""
import os
import random
import re
import sys
import unittest
import xml.etree.ElementTree as ElementTree

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import vpcctl  # noqa: E402

SVG = "{http://www.w3.org/2000/svg}"


def make_vpc(name, second, subnets, **more):
    """A record with subnets (names) in 10.<second>.0.0/16."""
    net = "10.%d.%%d.%%s" % second
    return dict({
        "name": name, "cidr": "10.%d.0.0/16" % second, "bridge": "br-" + name, "chain": "vpc-" + name,
        "table": 7000 + second, "apps": [], "peers": [], "nat": None, "published": [],
        "subnets": [{"name": s, "cidr": net % (i, "0/24"), "gw": net % (i, "1"), "host_ip": net % (i, "2"),
                     "policy": {"ingress": [], "egress": []}} for i, s in enumerate(subnets, 1)]}, **more)


def join(world, a, b, allowed):
    """Peer two VPCs of a world."""
    for one, other, side in ((a, b, "a"), (b, a, "b")):
        world[one]["peers"].append({"peer_vpc": other, "chain": "vpc-peer-%s-%s" % (a, b),
                                    "allowed": allowed, "side": side})


def published(subnet, host_port, port, protocol="tcp", interface="eth0"):
    """A published port."""
    return {"subnet": subnet, "host_port": host_port, "port": port, "protocol": protocol,
            "interface": interface}


def three_vpcs():
    """blog - shop - shared, NAT for two of them, three published ports."""
    world = {
        "blog": make_vpc("blog", 20, ["web", "db"], apps=[{"subnet": "web", "port": 8080}],
                         nat={"interface": "eth0", "subnets": ["web"]},
                         published=[published("web", 80, 8080)]),
        "shop": make_vpc("shop", 30, ["web", "api"], apps=[{"subnet": "api", "port": 9000}],
                         nat={"interface": "eth0", "subnets": None},
                         published=[published("api", 443, 9000), published("api", 53, 53, "udp", "wlan0")]),
        "shared": make_vpc("shared", 40, ["logs"])}
    join(world, "blog", "shop", ["10.20.1.0/24", "10.30.2.0/24"])
    join(world, "shop", "shared", ["10.30.0.0/16", "10.40.1.0/24"])
    return world


def some_world(seed):
    """A random world: up to six VPCs of 0 to 30 subnets, long names, many blocks."""
    dice, world = random.Random(seed), {}
    for i in range(dice.randint(1, 6)):
        name = "v%d" % i + "x" * dice.choice([0, 3, 30])
        subnets = ["s%d" % j + "y" * dice.choice([0, 5, 29]) for j in range(dice.choice([0, 1, 2, 3, 5, 30]))]
        vpc = world[name] = make_vpc(name, 60 + i, subnets)
        vpc["apps"] = [{"subnet": s, "port": 8000 + p} for s in subnets for p in range(dice.randint(0, 4))]
        if dice.random() < 0.6:
            vpc["nat"] = {"interface": "eth%d" % dice.randint(0, 1), "subnets": subnets[:1] or None}
        vpc["published"] = [published(s, 30000 + j, 65535, interface=dice.choice(["eth0", "enp0s31f6", None]))
                            for j, s in enumerate(subnets) if dice.random() < 0.3]
    names = sorted(world)
    for a in names:
        for b in names:
            if a < b and dice.random() < 0.5:
                allowed = [s["cidr"] for v in (a, b) for s in world[v]["subnets"][:dice.randint(0, 9)]]
                join(world, a, b, allowed)
    return world, dice.sample(names, dice.randint(1, len(names)))


def boxes_of(text):
    """([(x, y, right, bottom)] of the rectangles, the same of the texts, the size of the page)."""
    root, rects, texts = ElementTree.fromstring(text), [], []
    for rect in root.iter(SVG + "rect"):
        if rect.get("class") != "page":
            x, y, w, h = (float(rect.get(key)) for key in ("x", "y", "width", "height"))
            rects.append((x, y, x + w, y + h))
    for t in root.iter(SVG + "text"):
        x, y, size = (float(t.get(key)) for key in ("x", "y", "font-size"))
        texts.append((x, y - size * 0.93, x + len(t.text) * size * 0.603, y + size * 0.24))
    return rects, texts, (float(root.get("width")), float(root.get("height")))


def overlap(a, b):
    """Whether two boxes share any place."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def inside(a, b):
    """Whether a lies in b."""
    return a[0] >= b[0] and a[1] >= b[1] and a[2] <= b[2] and a[3] <= b[3]


class Svg(unittest.TestCase):
    def check(self, world, names):
        """Well-formed; boxes apart or one in the other; texts apart, each in a box; all on the page."""
        rects, texts, (width, height) = boxes_of(vpcctl.graph_svg(world, names))
        for box in rects + texts:
            self.assertTrue(inside(box, (0, 0, width, height)), box)
        for i, one in enumerate(rects):
            wide = (one[0] - 8, one[1] - 8, one[2] + 8, one[3] + 8)
            for other in rects[i + 1:]:
                apart = not overlap(wide, other) or inside(one, other) or inside(other, one)
                self.assertTrue(apart, (one, other))
        for i, one in enumerate(texts):
            self.assertFalse([other for other in texts[i + 1:] if overlap(one, other)], one)
            self.assertTrue(any(inside(one, rect) for rect in rects), one)
            for rect in rects:  # no edge of a box through a text
                self.assertTrue(inside(one, rect) or not overlap(one, rect), (one, rect))

    def test_one_to_thirty_subnets(self):
        for count in range(0, 31):
            names = ["service-%d" % i for i in range(count)]
            vpc = make_vpc("mesh", 50, names, apps=[{"subnet": s, "port": 8080} for s in names[::3]],
                           nat={"interface": "eth0", "subnets": None})
            with self.subTest(count=count):
                self.check({"mesh": vpc}, ["mesh"])

    def test_several_vpcs(self):
        world = three_vpcs()
        for names in (["blog", "shop", "shared"], ["shop"], ["blog", "shared"], []):
            with self.subTest(names=names):
                self.check(world, names)

    def test_random_worlds(self):
        for seed in range(40):
            with self.subTest(seed=seed):
                self.check(*some_world(seed))

    def test_curves_stay_in_the_channels(self):
        for seed in range(40):
            text = vpcctl.graph_svg(*some_world(seed))
            texts = boxes_of(text)[1]
            for numbers in re.findall(r'class="line[^>]* d="M(.*?)"/>', text):
                x1, y1, _, _, _, _, x2, y2 = (int(n) for n in re.findall(r"-?\d+", numbers))
                curve = (min(x1, x2), min(y1, y2) - 1, max(x1, x2), max(y1, y2) + 1)
                self.assertFalse([t for t in texts if overlap(curve, t)], (seed, curve))

    def test_says_it_all_and_needs_nothing_else(self):
        text = vpcctl.graph_svg(three_vpcs(), ["blog", "shop", "shared"])
        root = ElementTree.fromstring(text)
        words = [t.text for t in root.iter(SVG + "text")]
        for word in ("blog 10.20.0.0/16", "10.30.2.2", "app tcp/8080", "eth0 tcp/80 -> 8080", "uplink wlan0",
                     "NAT for shop", "blog - shop", "shop 10.30.0.0/16", "shared 10.40.1.0/24"):
            self.assertIn(word, words)
        self.assertEqual(root.get("role"), "img")
        self.assertEqual(root[0].tag, SVG + "title")
        self.assertTrue(all(group[0].tag == SVG + "title" for group in root.iter(SVG + "g")))
        self.assertIn("prefers-color-scheme:dark", text)
        self.assertNotRegex(text.replace("http://www.w3.org/2000/svg", ""), r"https?:|@import|<script|<image")

    def test_escapes(self):
        world = {"a": make_vpc("a", 50, ['<b>&"'])}
        root = ElementTree.fromstring(vpcctl.graph_svg(world, ["a"]))
        self.assertIn('<b>&"', [element.text for element in root.iter()])


class Text(unittest.TestCase):
    def test_tree(self):
        self.assertEqual(vpcctl.graph_tree(three_vpcs(), ["blog", "shared"], ascii_only=True), (
            "blog 10.20.0.0/16\n"
            "|- web            10.20.1.0/24       app tcp/8080, eth0 tcp/80 -> 8080, NAT by eth0\n"
            "|- db             10.20.2.0/24\n"
            "`- peer shop (not shown): 10.20.1.0/24 <-> 10.30.2.0/24\n"
            "shared 10.40.0.0/16\n"
            "|- logs           10.40.1.0/24\n"
            "`- peer shop (not shown): 10.40.1.0/24 <-> 10.30.0.0/16\n"))
        self.assertEqual(vpcctl.graph_tree({}, []), "no VPC yet\n")
        self.assertIn("└─ no subnet yet\n", vpcctl.graph_tree({"a": make_vpc("a", 50, [])}, ["a"]))

    def test_what_does_not_run(self):
        world = three_vpcs()
        world["blog"]["apps"][0]["ended"] = True
        for style in ("tree", "mermaid", "dot", "svg"):
            text = getattr(vpcctl, "graph_" + style)(world, sorted(world))
            self.assertIn("app tcp/8080 (not running)", text)
            self.assertNotIn("app tcp/9000 (not running)", text)

    def test_a_peering_is_seen_from_each_side(self):
        tree = vpcctl.graph_tree(three_vpcs(), ["blog", "shop"])
        self.assertIn("peer shop: 10.20.1.0/24 <-> 10.30.2.0/24", tree)
        self.assertIn("peer blog: 10.30.2.0/24 <-> 10.20.1.0/24", tree)

    def test_same_subnet_names_do_not_collide(self):
        for draw, pattern in ((vpcctl.graph_mermaid, r"^ +(vpc\w+)\[\"web<"),
                              (vpcctl.graph_dot, r"(\w+) \[label=\"web\\n")):
            ids = re.findall(pattern, draw(three_vpcs(), ["blog", "shop", "shared"]), re.M)
            self.assertEqual(len(ids), 2)
            self.assertEqual(len(set(ids)), 2)

    def test_every_format_says_it_all(self):
        for draw in (vpcctl.graph_tree, vpcctl.graph_mermaid, vpcctl.graph_dot):
            text = draw(three_vpcs(), ["blog", "shop", "shared"])
            for word in ("blog 10.20.0.0/16", "10.20.2.0/24", "app tcp/9000", "eth0 tcp/443 -> 9000", "NAT",
                         "10.30.0.0/16", "10.40.1.0/24"):
                self.assertIn(word, text, draw.__name__)

    def test_peerings_once_and_peers_outside(self):
        for draw, arrow in ((vpcctl.graph_mermaid, "<-->"), (vpcctl.graph_dot, "dir=both")):
            self.assertEqual(draw(three_vpcs(), ["blog", "shop", "shared"]).count(arrow), 2)
            text = draw(three_vpcs(), ["blog"])
            self.assertEqual((text.count(arrow), text.count("not shown")), (1, 1))

    def test_escapes(self):
        world = {"a": make_vpc("a", 50, ['q"#\\'])}
        self.assertIn('vpc0_0["q#34;#35;#92;<br/>', vpcctl.graph_mermaid(world, ["a"]))
        self.assertIn('[label="q\\"#\\\\\\n10.50.1.0/24"]', vpcctl.graph_dot(world, ["a"]))


if __name__ == "__main__":
    unittest.main()
