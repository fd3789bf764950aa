"""Plans, names, addresses, policies and records as text: no root, no process, milliseconds."""

import ast
import glob
import io
import itertools
import json
import os
import re
import socket
import struct
import sys
import tempfile
import time
import types
import unittest
from unittest import mock

from support import VPCCTL

sys.path.insert(0, os.path.dirname(VPCCTL))
import vpcctl as tool  # noqa: E402

DESK = types.SimpleNamespace(dry_run=True)      # asks the host nothing
PLANS = os.path.join(os.path.dirname(os.path.realpath(__file__)), "plans.txt")
POLICIES = os.path.join(os.path.dirname(VPCCTL), "policies")


def make_vpc(world, name, cidr, *subnets):
    """Put a VPC with subnets (name, block) into a world; returns its record."""
    vpc = world[name] = tool.new_vpc(DESK, name, cidr, world)
    for subnet, block in subnets:
        make_subnet(world, name, subnet, block)
    return vpc


def make_subnet(world, vpc, name, block=None, gateway=None):
    """Put a subnet into a VPC of a world; returns its record."""
    made = tool.new_subnet(DESK, world[vpc], name, block, gateway, world)
    world[vpc]["subnets"].append(made)
    return made


def blog():
    """The tutorial's VPC and a second one."""
    world = {}
    make_vpc(world, "blog", "10.20.0.0/16", ("web", "10.20.1.0/24"))
    make_vpc(world, "shop", "10.30.0.0/16", ("api", "10.30.1.0/24"))
    return world


def as_text(text):
    """Echoed commands without the marks; the random half of a namespace's id is left out."""
    return re.sub(r"(ip netns set \S+) \d+", r"\1 ID", text.replace(">>> ", "")).splitlines()


def made(steps):
    """The commands that make steps, in the order in which they run."""
    out = io.StringIO()
    changes = tool.in_order([tool.Change(None, step, None) for step in steps])
    tool.Executor(dry_run=True, out=out).make(changes, [])
    return as_text(out.getvalue())


def unmade(steps):
    """The commands that take steps back, in the order in which they run."""
    out = io.StringIO()
    tool.Executor(dry_run=True, out=out).take_back(steps)
    return as_text(out.getvalue())


class TextTest(unittest.TestCase):
    """Compares commands line by line."""

    maxDiff = None

    def assert_problem(self, text, call, *args, hint="", code=2):
        """The call is refused with a message that holds `text` (and a hint that holds `hint`)."""
        with self.assertRaises(tool.Problem) as caught:
            call(*args)
        self.assertIn(text, str(caught.exception))
        self.assertIn(hint, caught.exception.hint)
        self.assertEqual(caught.exception.code, code)


def peered():
    """Two VPCs with a peering."""
    world = blog()
    tool.add_peering(DESK, world, world["blog"], world["shop"], ["10.20.1.0/24", "10.30.1.0/24"])
    return world


def with_nat(subnets=None, was="0"):
    """The VPC blog with NAT, on a host that was no router before."""
    vpc = blog()["blog"]
    vpc["nat"] = {"interface": "eth0", "subnets": subnets, "dns": ["192.0.2.53"]}
    vpc["forward"] = {"was": was, "kept_off": ["wlan0"]}
    return vpc


def plans():
    """Every plan by name, as it is to be found in plans.txt, on a host that is called desk."""
    world, both, nat = blog(), peered(), with_nat()
    vpc = world["blog"]
    published = {"subnet": "web", "host_port": 8080, "port": 80, "protocol": "tcp", "interface": "eth0"}
    with mock.patch.object(tool.os, "uname", return_value=("Linux", "desk")):
        named = tool.plan_names(world, vpc)
    return {"a VPC": tool.plan_vpc(vpc),
            "a subnet": tool.plan_subnet(vpc, vpc["subnets"][0]),
            "its default policy": tool.plan_policy(vpc, vpc["subnets"][0]),
            "a peering": tool.plan_peering(both["blog"], both["shop"], both["blog"]["peers"][0]),
            "NAT": tool.plan_nat(nat),
            "the host as a router": tool.plan_forwarding(dict(world, blog=nat), [nat]),
            "a published port": tool.plan_published(vpc, published),
            "names": named}


def plans_as_text():
    """All plans as one readable text; `# word` stands for `-m comment --comment word`."""
    text = "# What each plan runs, and what takes it back. After a change on purpose: python3 tests/unit_core.py --write\n"
    for name, steps in plans().items():
        for title, lines in ((name, made(steps)), (name + ", taken back", unmade(steps))):
            text += "\n== %s\n" % title
            text += "".join(re.sub(r" -m comment --comment (\S+)$", r"   # \1", line) + "\n" for line in lines)
    return text


class PlanTest(TextTest):
    """What the plans say, as one would type it."""

    def test_plans(self):
        with open(PLANS) as handle:
            expected, found = handle.read(), plans_as_text()
        for one, other in zip(expected.split("\n== "), found.split("\n== ")):
            self.assertEqual(one.splitlines(), other.splitlines(), "see %s" % PLANS)
        self.assertEqual(expected, found)

    def test_nat_of_one_subnet_names_only_its_block(self):
        lines = made(tool.plan_nat(with_nat(["web"])))
        self.assertEqual(len(lines), len(made(tool.plan_nat(with_nat()))))
        for line in lines:
            if "-t mangle" not in line:           # what is never let out is of no block
                self.assertIn("10.20.1.0/24", line)

    def test_forwarding_is_put_back_if_it_was_off(self):
        for was, expected in (("0", True), ("1", False)):
            vpc = with_nat(was=was)
            steps = tool.plan_forwarding({"blog": vpc}, [vpc])
            self.assertIn("sysctl -w net.ipv4.ip_forward=1", made(steps))
            self.assertEqual("sysctl -w net.ipv4.ip_forward=0" in unmade(steps), expected)

    def test_every_step_has_a_reason_and_a_description(self):
        world = dict(peered(), blog=dict(peered()["blog"], **{key: with_nat()[key] for key in ("nat", "forward")}))
        world["blog"]["published"].append({"subnet": "web", "host_port": 8080, "port": 80, "protocol": "tcp",
                                           "interface": "eth0"})
        steps = tool.plan(world)
        self.assertGreater(len(steps), 100)
        for fact, step in steps.items():
            self.assertEqual(fact, step.fact)
            self.assertTrue(step.why, step.do)
            self.assertEqual(len(step.whys), len(step.do))
            for why in (step.why,) + step.whys:
                self.assertLess(len(why.split()), 16, why)
            self.assertTrue(tool.describe(step))
            for argv in step.do + step.undo:
                self.assertTrue(argv and all(isinstance(word, str) for word in argv), argv)

    def test_what_has_a_holder_is_not_taken_back_twice(self):
        """A chain's rules go with the chain, a namespace's settings with the namespace."""
        vpc = blog()["blog"]
        removed = unmade(list(tool.plan({"blog": vpc}).values()))
        self.assertIn("iptables -X vpc-blog", removed)
        self.assertFalse([line for line in removed if line.startswith(("iptables -D vpc-", "ip netns exec"))])
        self.assertFalse([line for line in removed if "addr del" in line])

    def test_order_of_making_and_taking_back(self):
        world = blog()
        steps = list(tool.plan({"blog": world["blog"]}).values())
        lines = made(steps)
        place = {key: next(i for i, line in enumerate(lines) if line.startswith(key)) for key in (
            "ip netns add", "ip link add br-blog", "ip link set v-blog-web-b up", "iptables -I FORWARD",
            "ip netns exec ns-blog-web iptables")}
        self.assertLess(place["ip netns add"], place["ip link add br-blog"])
        for key in ("iptables -I FORWARD", "ip netns exec ns-blog-web iptables"):
            self.assertLess(place[key], place["ip link set v-blog-web-b up"], "no packet passes before the rules stand")
        lines = unmade(steps)
        flushes = [i for i, line in enumerate(lines) if " -F " in line]
        deletes = [i for i, line in enumerate(lines) if " -X " in line]
        self.assertLess(max(flushes), min(deletes), "a chain goes when nothing jumps to it any more")


class NameTest(TextTest):
    """Kernel names: short enough, never shared, chosen once."""

    def names(self, world):
        """Every link, namespace and chain of a world: each once."""
        found = []
        for vpc in world.values():
            found += [("link", vpc["bridge"])] + [("chain", vpc[key]) for key in ("chain", "chain_in", "chain_src")]
            for subnet in vpc["subnets"]:
                found += [("ns", subnet["ns"]), ("link", subnet["veth"] + "-a"), ("link", subnet["veth"] + "-b")]
            for peer in vpc["peers"]:
                if peer["side"] == "a":
                    found += [("link", peer["veth_a"]), ("link", peer["veth_b"]), ("chain", peer["chain"])]
        for kind, name in found:
            self.assertLessEqual(len(name), {"link": 15, "chain": 28, "ns": 80}[kind], name)
        self.assertEqual(len(set(found)), len(found), sorted(found))
        return found

    def test_the_guide_s_names(self):
        world = {}
        vpc = make_vpc(world, "blog", "10.20.0.0/16", ("webserver", "10.20.1.0/24"), ("database", "10.20.2.0/24"))
        self.assertEqual([vpc[key] for key in ("bridge", "chain")], ["br-blog", "vpc-blog"])
        self.assertEqual([(s["ns"], s["veth"]) for s in vpc["subnets"]],
                         [("ns-blog-webserver", "v-blog-webser"), ("ns-blog-database", "v-blog-databa")])
        make_vpc(world, "shop", "10.30.0.0/16")
        tool.add_peering(DESK, world, vpc, world["shop"], ["10.20.1.0/24", "10.30.1.0/24"])
        self.assertEqual([vpc["peers"][0][key] for key in ("veth_a", "veth_b", "chain")],
                         ["pv-blog-shop-a", "pv-blog-shop-b", "vpc-peer-blog-shop"])

    def test_scenario_2(self):
        """Five subnets whose cables are all called v-microservic-… when cut: the second gets a hash for a tail."""
        world = {}
        vpc = make_vpc(world, "microservices", "10.40.0.0/16")
        for name in ("api-gateway", "user-service", "order-service", "payment-service", "shared-db"):
            make_subnet(world, "microservices", name)
        self.assertEqual(vpc["bridge"], "br-microservice")
        self.assertEqual(vpc["subnets"][0]["ns"], "ns-microservices-api-gateway")
        self.assertEqual(vpc["subnets"][0]["veth"], "v-microservic")
        for subnet in vpc["subnets"][1:]:
            self.assertRegex(subnet["veth"], r"^v-microse[0-9a-f]{4}$")
        self.names(world)

    def test_same_front_of_a_long_name(self):
        world, allowed = {}, []
        for number, tail in enumerate("abc"):
            name = "a-very-long-name-of-32-letters-" + tail
            self.assertEqual(len(name), 32)
            make_vpc(world, name, "10.%d.0.0/16" % number, ("a-very-long-subnet-name-as-well-x", "10.%d.1.0/24" % number))
            allowed.append("10.%d.1.0/24" % number)
        for one, two in itertools.combinations(sorted(world), 2):
            tool.add_peering(DESK, world, world[one], world[two],
                             [world[name]["subnets"][0]["cidr"] for name in (one, two)])
        self.names(world)

    def test_two_ways_to_read_ns_a_b_c(self):
        world = {}
        make_vpc(world, "a-b", "10.1.0.0/16", ("c", "10.1.1.0/24"))
        make_vpc(world, "a", "10.2.0.0/16", ("b-c", "10.2.1.0/24"))
        spaces = [world[name]["subnets"][0]["ns"] for name in ("a-b", "a")]
        self.assertEqual(spaces[0], "ns-a-b-c")
        self.assertRegex(spaces[1], r"^ns-a-b-c-[0-9a-f]{4}$")
        self.names(world)

    def test_chains_of_a_vpc_named_like_another_s_chain(self):
        """VPC "in-x" would have chain vpc-in-x, which is VPC x's guard chain; and so for src- and peer-."""
        world = {}
        for number, name in enumerate(("x", "in-x", "src-x", "peer-x-y", "y")):
            make_vpc(world, name, "10.%d.0.0/16" % number)
        tool.add_peering(DESK, world, world["x"], world["y"], ["10.0.0.0/16", "10.4.0.0/16"])
        self.names(world)

    def test_a_name_is_chosen_once(self):
        world = {}
        vpc = make_vpc(world, "microservices", "10.40.0.0/16")
        first, second = make_subnet(world, "microservices", "one"), make_subnet(world, "microservices", "two")
        kept = second["veth"]
        vpc["subnets"].remove(first)
        self.assertEqual(tool.plan_subnet(vpc, second)[2].fact, ("link", kept + "-b"))
        self.assertEqual(make_subnet(world, "microservices", "three")["veth"], first["veth"])
        self.names(world)

    def test_short_name(self):
        self.assertEqual(tool.short_name("v-", "blog-webserver", "-b", 15, lambda _: False), "v-blog-webser")
        for limit in (15, 28):
            for length in range(1, 70):
                taken = set()
                for _ in range(4):
                    name = tool.short_name("v-", "x" * length, "-b", limit, taken.__contains__) + "-b"
                    self.assertLessEqual(len(name), limit)
                    self.assertNotIn(name, taken)
                    taken.add(name)
        self.assertEqual(tool.short_name("v-", "x" * 30, "-b", 15, {"v-" + "x" * 11 + "-b"}.__contains__),
                         tool.short_name("v-", "x" * 30, "-b", 15, {"v-" + "x" * 11 + "-b"}.__contains__))
        self.assert_problem("no free name", tool.short_name, "v-", "x", "", 15, lambda _: True)

    def test_many(self):
        world = {}
        for number in range(12):
            make_vpc(world, "tenant-number-%d" % number, "10.%d.0.0/16" % number)
            for part in range(12):
                make_subnet(world, "tenant-number-%d" % number, "application-%d" % part)
        self.assertEqual(len(self.names(world)), 12 * 4 + 144 * 3)

    def test_what_is_a_name(self):
        for good in ("a", "0", "test_vpc", "api-gateway", "A" * 32):
            self.assertEqual(tool.name_type(good), good)
        for bad in ("", "-a", "_a", "a/b", "..", "a b", "a.b", "a\n", "\na", "A" * 33, "caf\u00e9", "a;b", "$(x)", "a\0"):
            with self.assertRaises(tool.argparse.ArgumentTypeError, msg=repr(bad)):
                tool.name_type(bad)


class AddressTest(TextTest):

    def subnet(self, vpc, block, gateway=None):
        world = {}
        make_vpc(world, "x", vpc)
        found = make_subnet(world, "x", "s", block, gateway)
        return found["gw"], found["host_ip"], found["mac"]

    def test_gateway_and_address(self):
        for vpc, block, gateway, expected in (
                ("10.20.0.0/16", "10.20.1.0/24", None, ("10.20.1.1", "10.20.1.2")),
                ("10.20.0.0/16", "10.20.1.0/24", "10.20.1.254", ("10.20.1.254", "10.20.1.1")),
                ("10.20.0.0/16", "10.20.1.0/24", "10.20.1.2", ("10.20.1.2", "10.20.1.1")),
                # the subnet holds the bridge's own address 10.20.0.1
                ("10.20.0.0/16", "10.20.0.0/24", None, ("10.20.0.1", "10.20.0.2")),
                ("10.20.0.0/16", "10.20.0.0/24", "10.20.0.2", ("10.20.0.2", "10.20.0.3")),
                ("10.20.0.0/16", "10.20.0.0/16", None, ("10.20.0.1", "10.20.0.2")),
                ("192.168.100.0/24", "192.168.100.0/24", None, ("192.168.100.1", "192.168.100.2")),
                ("10.0.0.0/29", "10.0.0.0/29", None, ("10.0.0.1", "10.0.0.2")),
                ("10.0.0.0/29", "10.0.0.4/30", None, ("10.0.0.5", "10.0.0.6")),
                ("10.0.0.0/29", "10.0.0.0/30", None, ("10.0.0.1", "10.0.0.2")),
                ("10.0.0.0/8", "10.255.255.252/30", "10.255.255.254", ("10.255.255.254", "10.255.255.253"))):
            self.assertEqual(self.subnet(vpc, block, gateway)[:2], expected, (vpc, block, gateway))
        self.assertEqual(self.subnet("10.20.0.0/16", "10.20.1.0/24")[2], "02:76:0a:14:01:02")

    def test_a_vpc_sized_subnet_leaves_the_vpc_s_address_alone(self):
        world = {}
        vpc = make_vpc(world, "x", "10.20.0.0/16", ("all", "10.20.0.0/16"))
        lines = made(tool.plan_subnet(vpc, vpc["subnets"][0])) + unmade(tool.plan_subnet(vpc, vpc["subnets"][0]))
        self.assertFalse([line for line in lines if re.search(r"ip addr .* dev br-x", line)])
        self.assertIn("ip -n ns-x-all addr add 10.20.0.2/16 dev v-x-all-a", lines)

    def test_refused(self):
        for block, gateway, text, hint in (
                ("10.21.0.0/24", None, "10.21.0.0/24 is not inside of VPC x (10.20.0.0/16)", "10.20.0.0/24"),
                ("10.0.0.0/8", None, "is not inside of VPC x", ""),
                ("10.20.1.0/31", None, "too small", "/30"),
                ("10.20.1.4/32", None, "too small", "/30"),
                ("10.20.1.0/24", "10.20.2.1", "gateway 10.20.2.1 is not a usable address", "10.20.1.1 to 10.20.1.254"),
                ("10.20.1.0/24", "10.20.1.0", "not a usable address", ""),
                ("10.20.1.0/24", "10.20.1.255", "not a usable address", ""),
                ("10.20.0.0/30", "10.20.0.2", "no address left", "larger")):
            self.assert_problem(text, self.subnet, "10.20.0.0/16", block, gateway, hint=hint)
        world = {}
        make_vpc(world, "x", "10.20.0.0/16", ("one", "10.20.1.0/24"))
        for block in ("10.20.1.0/24", "10.20.0.0/16", "10.20.1.128/25"):
            self.assert_problem("overlaps subnet one (10.20.1.0/24)", make_subnet, world, "x", "two", block,
                                hint="10.20.0.0/24")
        self.assertEqual([s["name"] for s in world["x"]["subnets"]], ["one"])

    def test_vpc_ranges(self):
        for good in ("10.0.0.0/8", "172.16.0.0/12", "192.168.100.0/24", "100.64.0.0/10", "10.0.0.8/29", "8.8.8.0/24"):
            make_vpc({}, "x", good)
        for bad, text in (("10.0.0.0/30", "from /8 to /29"), ("0.0.0.0/0", "from /8 to /29"), ("8.0.0.0/7", "from /8"),
                          ("127.0.0.0/8", "is loopback"), ("224.0.0.0/8", "is multicast"),
                          ("169.254.0.0/16", "is link-local"), ("0.0.0.0/8", "is unspecified"),
                          ("240.0.0.0/8", "or reserved"),
                          ("0.1.0.0/16", "is unspecified"), ("169.0.0.0/8", "is link-local")):
            self.assert_problem(text, make_vpc, {}, "x", bad)
        make_vpc(blog(), "x", "10.21.0.0/16")
        self.assert_problem("10.0.0.0/8 overlaps VPC blog", make_vpc, blog(), "x", "10.0.0.0/8")
        self.assert_problem("10.20.128.0/24 overlaps VPC blog (10.20.0.0/16)", make_vpc, blog(), "x", "10.20.128.0/24")

    def test_first_free_block(self):
        vpc = {"name": "x", "cidr": "10.20.0.0/16", "subnets": []}
        for expected in ("10.20.0.0/24", "10.20.1.0/24", "10.20.2.0/24"):
            self.assertEqual(tool.first_free_block(vpc), expected)
            vpc["subnets"].append({"cidr": expected})
        del vpc["subnets"][1]
        self.assertEqual(tool.first_free_block(vpc), "10.20.1.0/24")
        vpc["subnets"] = [{"cidr": "10.20.0.64/28"}, {"cidr": "10.20.128.0/17"}]
        self.assertEqual(tool.first_free_block(vpc), "10.20.1.0/24")
        vpc = {"name": "x", "cidr": "10.0.0.0/24", "subnets": [{"cidr": "10.0.0.0/26"}]}
        self.assertEqual(tool.first_free_block(vpc), "10.0.0.128/25")
        vpc["subnets"].append({"cidr": "10.0.0.128/25"})
        self.assertEqual(tool.first_free_block(vpc), "10.0.0.64/26")
        vpc["subnets"].append({"cidr": "10.0.0.64/26"})
        self.assert_problem("VPC x (10.0.0.0/24) is full", tool.first_free_block, vpc)
        self.assertEqual(tool.first_free_block({"name": "x", "cidr": "10.0.0.0/29", "subnets": []}), "10.0.0.0/29")

    def test_a_large_range_is_arithmetic(self):
        began = time.time()
        world = {}
        vpc = make_vpc(world, "big", "10.0.0.0/8", ("low", "10.0.0.0/9"), ("next", "10.128.0.0/10"))
        for expected in ("10.192.0.0/24", "10.192.1.0/24"):
            self.assertEqual(make_subnet(world, "big", "s" + expected[7], None)["cidr"], expected)
        vpc["subnets"].append({"name": "rest", "cidr": "10.192.4.0/22", "ns": "n", "veth": "v"})
        self.assertEqual(tool.first_free_block(vpc), "10.192.2.0/24")
        self.assertLess(time.time() - began, 0.5, "no list of 16 million hosts")

    def test_what_is_a_block(self):
        self.assertEqual(str(tool.as_network("10.20.0.0/16")), "10.20.0.0/16")
        self.assert_problem("'10.20.0.5/16' has host bits set", tool.as_network, "10.20.0.5/16", hint="10.20.0.0/16")
        for bad in ("", "10.20.0.0", "10.20.0.0/33", "10.20.0/16", "10.20.0.256/32", "::/0", "a", "10.20.0.0/16 ",
                    "10.20.0.0/16\n", " 10.20.0.0/16", "10.20.0.0/255.255.0.0", "10.20.0.0/-1", "1" * 400 + "/8",
                    "10.20.0.0/" + "9" * 50, "\u0661\u0660.0.0.0/8"):
            self.assert_problem("is not an IPv4 block", tool.as_network, bad, hint="like 10.20.0.0/16")

    def test_other_values(self):
        self.assertEqual(tool.networks_type("10.1.0.0/24, 10.2.0.0/24,10.1.0.0/24"), ["10.1.0.0/24", "10.2.0.0/24"])
        self.assertEqual(tool.publish_type("8080:80"), (8080, 80))
        self.assertEqual(tool.publish_type("53"), (53, 53))
        self.assertEqual(tool.interface_type("wlp2s0.100"), "wlp2s0.100")
        for call, values in ((tool.port_type, ("0", "65536", "-1", "", "8 0", "1e3", "080000", "\u0663", "x")),
                             (tool.interface_type, ("", "-o", "a" * 16, "eth0;x", "../x", "a b", "eth0\n")),
                             (tool.networks_type, ("", ",", "10.0.0.1/8", "x,10.0.0.0/8")),
                             (tool.names_type, ("a b", "a,-b")),
                             (tool.publish_type, ("", ":", "80:", "0:80", "80:0", "a:b", "1:2:3")),
                             (tool.address_type, ("", "10.0.0", "10.0.0.0/8", "::1", "10.0.0.256"))):
            for value in values:
                if call is tool.publish_type and value == "80:":
                    continue
                with self.assertRaises(tool.argparse.ArgumentTypeError, msg=repr((call.__name__, value))):
                    call(value)


class RuleTest(TextTest):

    def test_rule_key(self):
        same = (
            "-s 10.0.0.2/32 -d 10.1.0.0/16 -p tcp -m tcp --dport 80 -j ACCEPT",
            "-p tcp -m tcp --dport 80 -d 10.1.0.0/16 -s 10.0.0.2 -j ACCEPT",
            "-j ACCEPT -s 10.0.0.2 -d 10.1.0.0/16 -p tcp --dport 80")
        self.assertEqual(len({tool.rule_key(rule.split()) for rule in same}), 1)
        self.assertEqual(tool.rule_key("-p icmp --icmp-type echo-request".split()),
                         tool.rule_key("-p icmp -m icmp --icmp-type 8".split()))
        self.assertEqual(tool.rule_key("--ctstate RELATED,ESTABLISHED".split()),
                         tool.rule_key("--ctstate ESTABLISHED,RELATED".split()))
        self.assertEqual(tool.rule_key("-m mac --mac-source 02:76:0A:00:00:02".split()),
                         tool.rule_key("-m mac --mac-source 02:76:0a:00:00:02".split()))

    def test_rule_key_tells_apart(self):
        """Rules that look alike: 110.1.1.0/24 holds the letters of 10.1.1.0/24."""
        different = ("-s 10.1.1.0/24 -j ACCEPT", "-s 110.1.1.0/24 -j ACCEPT", "-d 10.1.1.0/24 -j ACCEPT",
                     "! -s 10.1.1.0/24 -j ACCEPT", "-s 10.1.1.0/24 -j DROP", "-s 10.1.1.0/25 -j ACCEPT",
                     "-s 10.1.1.0/24 -i br-a -j ACCEPT", "-s 10.1.1.0/24 ! -i br-a -j ACCEPT", "-j ACCEPT",
                     "-s 10.1.1.0/24 -j ACCEPT -m comment --comment vpcctl:a")
        self.assertEqual(len({tool.rule_key(rule.split()) for rule in different}), len(different))

    def test_printed_rules_are_read_back(self):
        text = ('# Generated\n*filter\n:INPUT ACCEPT [3:4]\n:vpc-blog - [0:0]\n[1:2] -A x\n'
                '-A INPUT -i br-blog -m comment --comment "vpcctl:blog" -j vpc-in-blog\n'
                '-A vpc-blog -m comment --comment "two words" -j DROP\nCOMMIT\n*nat\n:POSTROUTING ACCEPT [0:0]\nCOMMIT\n')
        tables = tool.parse_rules(text)
        self.assertEqual(tables["filter"][0], [("INPUT", "ACCEPT"), ("vpc-blog", "-")])
        self.assertEqual([chain for chain, _ in tables["filter"][1]], ["INPUT", "vpc-blog"])
        self.assertEqual([tool.comment_of(rule) for _, rule in tables["filter"][1]], ["vpcctl:blog", "two words"])
        self.assertEqual(tables["nat"][1], [])

    def test_printed_rules_of_a_joker(self):
        """A comment may hold line ends, quotes and what looks like rules; names may hold odd white space."""
        text = ('*filter\n:INPUT ACCEPT [0:0]\n:a\u2028b - [0:0]\n'
                '-A INPUT -m comment --comment "x\n-A INPUT \\"y\\\\ \x1c" -j ACCEPT\n'
                '-A INPUT -i a\'b\u2003c -m comment --comment "two words" -j DROP\n'
                '-A INPUT -m comment --comment "" -j DROP\nCOMMIT\n*nat\n:POSTROUTING ACCEPT [0:0]\nCOMMIT\n')
        tables = tool.parse_rules(text)
        self.assertEqual(tables["filter"][0], [("INPUT", "ACCEPT"), ("a\u2028b", "-")])
        self.assertEqual([rule for _, rule in tables["filter"][1]], [
            ("-m", "comment", "--comment", 'x\n-A INPUT "y\\ \x1c', "-j", "ACCEPT"),
            ("-i", "a'b\u2003c", "-m", "comment", "--comment", "two words", "-j", "DROP"),
            ("-m", "comment", "--comment", "", "-j", "DROP")])
        self.assertEqual(tables["nat"][0], [("POSTROUTING", "ACCEPT")])
        tool.parse_rules(text[:-60])                  # cut off within quotes or not: no error
        with self.assertRaises(tool.Failure):
            tool.parse_rules("# Table `filter' is incompatible, use 'nft' tool.\n")
        plain = ("-m", "comment", "--comment", "policy-ingress-allow-80", "-j", "ACCEPT")
        self.assertTrue(tool.is_policy_rule(plain))
        self.assertFalse(tool.is_policy_rule(plain + ("-i", "a\nCOMMIT")))
        self.assertFalse(tool.is_policy_rule(plain[:3] + ("policy-x\ny", "-j", "ACCEPT")))

    def test_own_rules_by_their_comment(self):
        self.assertEqual([tool.comment_vpc(text) for text in
                          ("vpcctl:blog", "vpcctl-nat-blog", "vpcctl-publish-blog", "vpcctl", "docker", "xvpcctl:blog")],
                         ["blog", "blog", "blog", None, None, None])

    def test_sysctl_path(self):
        """An interface eth0.100 has a dot in its name, which is no level of the tree."""
        self.assertEqual(tool.sysctl_path(tool.link_conf("ipv4", "eth0.100", "forwarding")),
                         "/proc/sys/net/ipv4/conf/eth0.100/forwarding")


class ToolTest(unittest.TestCase):
    """A tool that does not end is killed, with what it started, and nobody takes its work for done."""

    def setUp(self):
        for name, value in (("TOOL_WAIT", 0.2), ("say_error", lambda _: None)):
            patch = mock.patch.object(tool, name, value)
            patch.start()
            self.addCleanup(patch.stop)
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.path = os.path.join(self.folder.name, "slow")
        with open(self.path, "w") as handle:          # its child holds the pipe, too
            handle.write("#!/bin/sh\nsleep 300 &\necho [1]\nsleep 300\n")
        os.chmod(self.path, 0o755)

    def test_it_is_killed_and_named(self):
        self.assertEqual(tool.call(["sh", "-c", "echo done"]), (0, "done\n", ""))
        code, out, said = tool.call([self.path])
        self.assertEqual((code, out), (-9, ""))
        self.assertIn("killed", said)
        with self.assertRaises(tool.Failure) as caught:
            tool.ask(self.path, has="ifname")
        self.assertIn("killed", str(caught.exception))
        self.assertEqual(caught.exception.argv, (self.path,))

    def test_how_far_it_got_is_unknown(self):
        self.assertEqual(tool.one_call((self.path,))[0], tool.UNKNOWN)
        left = tool.take_back_lane(self.path, "", [(self.path,)])
        self.assertEqual(len(left), 1, "what was not taken back is said")
        self.assertIn("killed", left[0])

    def test_an_answer_with_odd_characters(self):
        self.assertEqual(tool.ask("printf", "%s", '[{"ifname":"a\x01"}]', has="ifname"), [{"ifname": "a\x01"}])
        with self.assertRaises(tool.Failure):
            tool.ask("printf", "%s", '[{"ifname":"a"', has="ifname")


class PieceTest(unittest.TestCase):
    """Where the kernel takes only small transactions (without real root): in pieces, never letting more through."""

    LIMIT = 120

    def run_batch(self, commands):
        texts = []

        def call(argv, text=None):
            if text.count("\n") > self.LIMIT:
                return 1, "", "sendmsg() failed: Message too long"
            texts.append(text.splitlines())
            return 0, "", ""
        with mock.patch.object(tool, "call", call):
            return tool.iptables_batch(commands), texts

    def test_small_ones_are_one_transaction(self):
        answer, texts = self.run_batch([("iptables", "-F", "INPUT"), ("iptables", "-A", "INPUT", "-j", "ACCEPT")])
        self.assertEqual(answer, (2, ""))
        self.assertEqual(texts, [["*filter", "-F INPUT", "-A INPUT -j ACCEPT", "COMMIT"]])

    def test_a_policy_is_replaced_behind_a_drop(self):
        rules = [("iptables", "-A", "INPUT", "-p", "tcp", "--dport", str(port), "-j", "ACCEPT") for port in range(1, 251)]
        answer, texts = self.run_batch([("iptables", "-F", "INPUT")] + rules)
        self.assertEqual(answer, (251, ""))
        drop = "-j DROP -m comment --comment policy-being-replaced"
        self.assertEqual(texts[0], ["*filter", "-F INPUT", "-I INPUT 1 " + drop, "COMMIT"])
        self.assertEqual([len(lines) - 2 for lines in texts], [2, 100, 100, 50, 1])
        self.assertEqual(texts[-1], ["*filter", "-D INPUT " + drop, "COMMIT"])
        put_in = [line for lines in texts[1:-1] for line in lines[1:-1]]
        self.assertEqual(put_in, ["-A INPUT -p tcp --dport %d -j ACCEPT" % port for port in range(1, 251)])

    def test_the_host_keeps_its_order(self):
        commands = [("iptables", "-N", "vpc-x")] + [("iptables", "-I", "vpc-x", "1", "-s", "10.0.%d.0/24" % number)
                                                    for number in range(150)]
        answer, texts = self.run_batch(commands)
        self.assertEqual(answer, (151, ""))
        self.assertEqual([line for lines in texts for line in lines[1:-1]], [" ".join(argv[1:]) for argv in commands])


class FlowTest(unittest.TestCase):
    """Which tracked connections a `conntrack -D` line names, without a kernel."""

    @staticmethod
    def entry(source, target, replier, protocol=6, port=80, status=0):
        """A tracked connection as the kernel writes it."""
        part = lambda kind, *more: tool.attribute(kind | 0x8000, b"".join(more))
        address = lambda kind, text: tool.attribute(kind, socket.inet_aton(text))
        ends = lambda kind, one, other: part(
            kind, part(1, address(1, one), address(2, other)),
            part(2, tool.attribute(1, bytes([protocol])), tool.attribute(2, struct.pack(">H", 4000)),
                 tool.attribute(3, struct.pack(">H", port))))
        return (tool.IPV4_FLOWS + ends(1, source, target) + ends(2, replier, source)
                + tool.attribute(3, struct.pack(">I", status)))

    def test_which_are_named(self):
        out = self.entry("10.20.1.2", "9.9.9.9", "9.9.9.9", status=0x10)
        into = self.entry("9.9.9.9", "192.0.2.2", "10.20.1.2", 17, 8080)
        peer = self.entry("10.20.1.2", "10.30.1.2", "10.30.1.2")
        for words, named in (
                ("-s 10.20.0.0/16", [out, peer]), ("-s 10.20.1.2/32", [out, peer]), ("-s 10.20.2.0/24", []),
                ("-r 10.20.0.0/16", [into]), ("-s 10.20.0.0/16 -n", [out]), ("-s 0.0.0.0/0", [out, into, peer]),
                ("-s 10.20.0.0/16 -d 10.30.0.0/16", [peer]), ("-s 10.30.0.0/16 -d 10.20.0.0/16", []),
                ("-r 10.20.1.2/32 -p udp --dport 8080", [into]), ("-r 10.20.1.2/32 -p tcp --dport 8080", []),
                ("-r 10.20.1.2/32 -p udp --dport 8081", [])):
            filters = tool.flow_filters([("conntrack", "-D") + tuple(words.split())])
            found = [flow for flow in (out, into, peer) if tool.is_named(flow, filters)]
            self.assertEqual(found, named, words)

    def test_many_at_once(self):
        commands = [("conntrack", "-D", "-s", "10.20.%d.0/24" % number) for number in range(200)]
        filters = tool.flow_filters(commands)
        self.assertEqual(len(filters), 1)
        self.assertTrue(tool.is_named(self.entry("10.20.199.9", "9.9.9.9", "9.9.9.9"), filters))
        self.assertFalse(tool.is_named(self.entry("10.20.200.9", "9.9.9.9", "9.9.9.9"), filters))

    def test_a_kernel_that_cannot(self):
        with mock.patch.object(tool, "netlink_socket", side_effect=OSError(93, "Protocol not supported")):
            self.assertEqual(tool.end_flows([("conntrack", "-D", "-s", "10.20.0.0/16")]), (1, ""))
            self.assertIn("cannot end tracked connections", "".join(tool.capability_notes({}, tool.Seen())))
        with mock.patch.object(tool, "flow_count", return_value=0):
            notes = "".join(tool.capability_notes({}, tool.Seen()))
            self.assertNotIn("cannot end tracked connections", notes)

    def test_a_refusal_is_told(self):
        with mock.patch.object(tool, "flow_count", return_value=7), mock.patch.object(
                tool, "netlink", side_effect=OSError(1, "Operation not permitted")):
            self.assertEqual(tool.end_flows([("conntrack", "-D", "-s", "10.20.0.0/16")]),
                             (0, "conntrack: Operation not permitted"))


class PeeredDifferenceTest(TextTest):
    """Subnets that stay as they are cost nothing, whatever else changes, in whichever VPC."""

    def test_a_peering_touches_no_subnet(self):
        for count in (1, 2):
            world = self.world_of(count)
            new = tool.duplicate(world)
            entry = {"veth_a": "pv-a-b-a", "veth_b": "pv-a-b-b", "chain": "vpc-peer-a-b",
                     "allowed": [new[name]["subnets"][0]["cidr"] for name in "ab"]}
            new["a"]["peers"].append(dict(entry, peer_vpc="b", side="a"))
            new["b"]["peers"].append(dict(entry, peer_vpc="a", side="b"))
            for old_world, new_world in ((world, new), (new, world)):
                removes, makes = tool.difference(old_world, new_world)
                touched = {step.fact[0] for step in removes + [change.make for change in makes]}
                self.assertFalse(touched & {"ns", "policy", "inside", "fdb", "neighbour"}, touched)
                self.assertTrue(removes + makes)

    @staticmethod
    def world_of(count):
        world = {}
        for number, name in enumerate("ab"):
            make_vpc(world, name, "10.%d.0.0/16" % (20 + number))
            for index in range(count):
                world[name]["subnets"].append(tool.new_subnet(DESK, world[name], "s%d" % index, None, None, world))
        return world


class DifferenceTest(TextTest):
    """What leads from one world to another."""

    def texts(self, old, new):
        removes, makes = tool.difference(old, new)
        return unmade(removes), made([change.make for change in makes if not change.undo]), [
            change.make for change in makes if change.undo]

    def test_nothing(self):
        world = blog()
        self.assertEqual(tool.difference(world, json.loads(json.dumps(world))), ([], []))

    def test_a_vpc_comes_and_goes(self):
        removed, come, swapped = self.texts({}, {"blog": blog()["blog"]})
        self.assertEqual((removed, swapped), ([], []))
        self.assertIn("ip link add br-blog type bridge", come)
        removed, come, swapped = self.texts({"blog": blog()["blog"]}, {})
        self.assertEqual((come, swapped), ([], []))
        self.assertIn("ip link del br-blog", removed)
        self.assertIn("ip netns del ns-blog-web", removed)

    def test_a_subnet_touches_only_itself(self):
        old, new = blog(), blog()
        make_subnet(new, "blog", "db", "10.20.2.0/24")
        removed, come, swapped = self.texts(old, new)
        self.assertEqual(removed, [])
        self.assertEqual([step.fact[:2] for step in swapped], [("file", "/run/vpcctl/blog/hosts")])
        self.assertTrue(come)
        for line in come:
            self.assertRegex(line, r"10\.20\.2\.|ns-blog-db|v-blog-db|02:76:0a:14:02")
        removed, come, _ = self.texts(new, old)
        self.assertEqual(come, [])
        for line in removed:
            self.assertRegex(line, r"10\.20\.2\.|ns-blog-db|v-blog-db")

    def test_a_policy_is_replaced_not_removed(self):
        old, new = blog(), blog()
        new["blog"]["subnets"][0]["policy"] = {"ingress": [{"port": 5432, "protocol": "tcp", "action": "allow"}],
                                               "egress": []}
        removed, come, swapped = self.texts(old, new)
        self.assertEqual((removed, come), ([], []))
        self.assertEqual([step.fact[:2] for step in swapped], [("policy", "ns-blog-web")])

    def test_nat_and_peering_leave_the_rest_alone(self):
        old, new = blog(), blog()
        new["blog"]["nat"] = {"interface": "eth0", "subnets": None, "dns": []}
        new["blog"]["forward"] = {"was": "0", "kept_off": []}
        tool.add_peering(DESK, new, new["blog"], new["shop"], ["10.20.1.0/24", "10.30.1.0/24"])
        removed, come, _ = self.texts(old, new)
        self.assertEqual(removed, [])
        back, again, _ = self.texts(new, old)
        self.assertEqual(again, [])
        for text in ("MASQUERADE", "pv-blog-shop", "net.ipv4.ip_forward"):
            self.assertTrue([line for line in come if text in line], text)
            self.assertTrue([line for line in back if text in line], text)
        self.assertFalse([line for line in come + back if "v-blog-web" in line or "link add br-" in line])

    def test_the_last_nat_puts_forwarding_back(self):
        both, one = blog(), blog()
        for world, names in ((both, ("blog", "shop")), (one, ("shop",))):
            for name in names:
                world[name]["nat"] = {"interface": "eth0", "subnets": None, "dns": []}
                world[name]["forward"] = {"was": "0", "kept_off": []}
        switch = "sysctl -w net.ipv4.ip_forward=0"
        self.assertNotIn(switch, self.texts(both, one)[0])
        self.assertIn(switch, self.texts(one, blog())[0])


class PolicyTest(TextTest):

    def rules(self, policy):
        """A policy's own rules as short texts, without those for replies at the head of each chain."""
        vpc = blog()["blog"]
        found = []
        for rule in tool.render_policy(dict({"ingress": [], "egress": []}, **policy), vpc):
            text = " ".join(rule[2:rule.index("-m") if "-m" in rule and rule[rule.index("-m") + 1] == "comment"
                                 else len(rule)])
            if rule[-1].split("-")[2] not in ("loopback", "replies", "errors"):
                found.append("%s %s" % ({"INPUT": "in", "OUTPUT": "out"}[rule[1]], text))
        return found

    def test_denies_first(self):
        self.assertEqual(self.rules({"ingress": [
            {"port": 80, "protocol": "tcp", "action": "allow"}, {"port": 22, "protocol": "tcp", "action": "deny"}]}),
            ["in -p tcp --dport 22 -j DROP", "in -p tcp --dport 80 -j ACCEPT"])

    def test_only_allows_is_an_allow_list(self):
        rule = {"port": 5432, "protocol": "tcp", "action": "allow"}
        self.assertEqual(self.rules({"ingress": [rule]}), ["in -p tcp --dport 5432 -j ACCEPT", "in -j DROP"])
        self.assertEqual(self.rules({"egress": [rule]}), ["out -p tcp --dport 5432 -j ACCEPT", "out -j DROP"])

    def test_empty_passes_everything(self):
        self.assertEqual(self.rules({}), [])

    def test_default_overrides(self):
        rule = {"port": 5432, "protocol": "tcp", "action": "allow"}
        self.assertEqual(self.rules({"ingress": [rule], "default": {"ingress": "allow"}})[-1],
                         "in -p tcp --dport 5432 -j ACCEPT")
        self.assertEqual(self.rules({"default": {"ingress": "deny", "egress": "deny"}}), ["in -j DROP", "out -j DROP"])
        self.assertEqual(self.rules({"egress": [dict(rule, action="deny")], "default": {"egress": "deny"}}),
                         ["out -p tcp --dport 5432 -j DROP", "out -j DROP"])

    def test_kinds_of_rules(self):
        self.assertEqual(self.rules({"ingress": [
            {"port": "8000-8100", "protocol": "tcp", "action": "deny"},
            {"protocol": "udp", "action": "allow"},
            {"protocol": "icmp", "action": "allow"},
            {"port": 80, "protocol": "tcp", "action": "allow", "from": "web"},
            {"port": 81, "protocol": "tcp", "action": "allow", "from": "192.0.2.0/24"}],
            "egress": [{"protocol": "tcp", "action": "deny", "to": "10.20.9.0/24"}]}),
            ["in -p tcp --dport 8000:8100 -j DROP", "in -p udp -j ACCEPT", "in -p icmp -j ACCEPT",
             "in -s 10.20.1.0/24 -p tcp --dport 80 -j ACCEPT", "in -s 192.0.2.0/24 -p tcp --dport 81 -j ACCEPT",
             "out -d 10.20.9.0/24 -p tcp -j DROP"])

    def test_the_guide_s_comments(self):
        comments = [rule[-1] for rule in tool.render_policy(self.sample("database.json"), blog()["blog"])]
        for text in ("policy-ingress-allow-5432", "policy-ingress-deny-22", "policy-egress-allow-80",
                     "policy-egress-allow-443"):
            self.assertIn(text, comments)

    @staticmethod
    def sample(name):
        with open(os.path.join(POLICIES, name)) as handle:
            policy = json.load(handle)
        del policy["subnet"]
        return policy

    def test_default_in_words(self):
        for policy, expected in ((tool.DEFAULT_POLICY, ("allow", "allow")),
                                 (self.sample("web.json"), ("allow", "allow")),
                                 (self.sample("database.json"), ("allow", "deny")),
                                 (self.sample("strict-database.json"), ("deny", "deny")),
                                 (self.sample("quarantine.json"), ("deny", "deny"))):
            self.assertEqual(tuple(tool.policy_default(policy, way)[0] for way in ("ingress", "egress")), expected)

    def refused(self, policy, text, hint=""):
        self.assert_problem(text, tool.check_policy, policy, "p.json", hint=hint)

    def test_refusals(self):
        good = {"port": 80, "protocol": "tcp", "action": "allow"}
        self.assertEqual(tool.check_policy({"ingress": [good]}, "p.json"), {"ingress": [good], "egress": []})
        self.refused([], "p.json: a policy is an object")
        self.refused({"igress": []}, "p.json: unknown key 'igress'", "subnet, ingress, egress, default")
        self.refused({"ingress": {}}, "p.json: ingress is not a list")
        self.refused({"egress": None}, "p.json: egress is not a list")
        for default in ({"ingress": "drop"}, {"in": "deny"}, "deny", [], {"egress": None}):
            self.refused({"default": default}, "p.json: default is " + json.dumps(default), '"deny"')
        for changed, text, hint in (
                ({"action": "Allow"}, 'action is "Allow"', "allow or deny"),
                ({"action": None}, "action is null", ""),
                ({"protocol": "TCP"}, 'protocol is "TCP"', "tcp, udp, icmp or all"),
                ({"protocol": "sctp"}, 'protocol is "sctp"', ""),
                ({"protocol": "icmp"}, "icmp has no port", ""),
                ({"port": 0}, "port is 0", "1 to 65535"),
                ({"port": 65536}, "port is 65536", ""),
                ({"port": "80"}, 'port is "80"', ""),
                ({"port": True}, "port is true", ""),
                ({"port": 80.0}, "port is 80.0", ""),
                ({"port": None}, "port is null", ""),
                ({"port": "90-80"}, 'port is "90-80"', ""),
                ({"port": "1-70000"}, 'port is "1-70000"', ""),
                ({"port": "80;x"}, 'port is "80;x"', ""),
                ({"port": [80]}, "port is [80]", ""),
                ({"prot": "tcp"}, "has an unknown key 'prot'", "port, protocol, action, from"),
                ({"to": "10.0.0.0/8"}, "has an unknown key 'to'", "from"),
                ({"from": 5}, "from is 5", ""),
                ({"from": "10.0.0.1/8"}, "has host bits set", "10.0.0.0/8"),
                ({"from": "10.0.0.0"}, "is not an IPv4 block", ""),
                ({"from": "a b"}, 'from is "a b"', ""),
                ({"from": "-j"}, 'from is "-j"', "")):
            rule = dict(good, **changed)
            self.refused({"ingress": [good, rule]}, "p.json: ingress rule 2", "")
            self.refused({"ingress": [good, rule]}, text, hint)
        self.refused({"egress": [dict(good, **{"from": "web"})]}, "p.json: egress rule 1 has an unknown key 'from'", "to")
        self.refused({"ingress": ["x"]}, "p.json: ingress rule 1 is not an object", '"port": 80')
        self.refused({"ingress": [{"port": 80, "protocol": "tcp"}]}, "action is null")
        self.refused({"ingress": [{"port": 80, "action": "allow"}]}, "protocol is null")

    def test_an_unknown_sibling_is_named(self):
        vpc = blog()["blog"]
        policy = {"ingress": [{"protocol": "tcp", "action": "allow", "from": "wbe"}]}
        self.assert_problem("names subnet 'wbe', which VPC blog does not have", tool.render_policy, policy, vpc,
                            hint="did you mean 'web'?")


class SampleTest(TextTest):
    """Every file in policies/ fits a VPC of the guide, as it is."""

    WORLDS = (("blog", "10.20.0.0/16", (("webserver", "10.20.1.0/24"), ("database", "10.20.2.0/24"))),
              ("webapp", "10.30.0.0/16", (("loadbalancer", "10.30.1.0/24"), ("appservers", "10.30.2.0/24"),
                                          ("database", "10.30.3.0/24"))),
              ("microservices", "10.40.0.0/16", (("order-service", "10.40.3.0/24"), ("payment-service", "10.40.4.0/24"),
                                                 ("shared-db", "10.40.10.0/24"))),
              ("dev", "10.50.0.0/16", (("web", "10.50.1.0/24"), ("db", "10.50.2.0/24"))))

    def fits(self, path):
        """The guide's VPCs in which a policy file can be applied, with the subnet that it finds."""
        found = {}
        for name, cidr, subnets in self.WORLDS:
            vpc = make_vpc({}, name, cidr, *subnets)
            try:
                subnet, policy = tool.read_policy(None, vpc, path)
                self.assertTrue(tool.render_policy(policy, vpc))
            except tool.Problem as problem:
                self.assertRegex(str(problem), "has no subnet|which VPC \\S+ does not have")
            else:
                found[name] = subnet["name"]
        return found

    def test_all(self):
        expected = {"web.json": {"blog": "webserver"},
                    "web-hardened.json": {"dev": "web"},
                    "database.json": {"blog": "database", "webapp": "database"},
                    "strict-database.json": {"blog": "database", "webapp": "database"},
                    "database-from-web.json": {"blog": "database"},
                    "payment-service.json": {"microservices": "payment-service"},
                    "quarantine.json": {"dev": "web"}}
        files = {os.path.basename(path): self.fits(path) for path in glob.glob(POLICIES + "/*.json")}
        self.assertEqual(files, expected)


class RecordTest(TextTest):
    """A record is data that vpcctl wrote: anything else is refused before it can do something."""

    def full(self):
        world = blog()
        vpc = world["blog"]
        tool.add_peering(DESK, world, vpc, world["shop"], ["10.20.1.0/24", "10.30.1.0/24"])
        vpc["nat"] = {"interface": "eth0", "subnets": ["web"], "dns": ["192.0.2.53"]}
        vpc["forward"] = {"was": "0", "kept_off": ["wlan0"]}
        vpc["published"].append({"subnet": "web", "host_port": 8080, "port": 80, "protocol": "tcp", "interface": "eth0"})
        vpc["apps"].append(dict(tool.new_app(vpc, vpc["subnets"][0], 8080, []), pid=4242, start="boot/123"))
        vpc["host_iptables"] = tool.recorded_rules(vpc)
        return json.loads(json.dumps(vpc))

    def test_a_sound_record(self):
        tool.check_record(self.full(), "blog")

    def test_the_guide_s_keys(self):
        record = self.full()
        self.assertLessEqual({"name", "cidr", "bridge", "chain", "subnets", "host_iptables", "apps", "peers", "nat"},
                             set(record))
        self.assertLessEqual({"name", "cidr", "ns", "gw", "host_ip", "veth"}, set(record["subnets"][0]))
        self.assertLessEqual({"ns", "port", "pid", "cmd"}, set(record["apps"][0]))
        self.assertLessEqual({"peer_vpc", "veth_a", "veth_b", "allowed"}, set(record["peers"][0]))
        self.assertEqual(record["nat"]["interface"], "eth0")
        self.assertTrue(all(argv[0] == "iptables" for argv in record["host_iptables"]))

    def test_refused(self):
        for path, value in (
                ("name", "shop"), ("name", "../blog"), ("format", 2), ("format", True), ("cidr", "10.20.0.1/16"),
                ("cidr", "10.20.0.0/16; rm"), ("bridge", "-x"), ("bridge", "a/b"), ("bridge", "x" * 16),
                ("chain", "a b"), ("table", 254), ("table", "7001"), ("mac", "zz"), ("surprise", 1), ("subnets", {}),
                ("subnets.0.ns", "../../x"), ("subnets.0.ns", "-n"), ("subnets.0.cidr", "10.99.0.0/24"),
                ("subnets.0.gw", "x"), ("subnets.0.policy", []), ("subnets.0.policy", {"ingress": [{"action": "x"}]}),
                ("subnets.0.policy", {"ingress": [{"protocol": "tcp", "action": "deny", "from": "nobody"}]}),
                # equal to the default policy, for Python
                ("subnets.0.policy.ingress.0.port", 80.0), ("subnets.0.cidr", "10.20.1.0/024"), ("peers.0.allowed", ["10.20.1.9/24"]),
                ("subnets.0.extra", 1), ("apps.0.pid", -1), ("apps.0.pid", "1"), ("apps.0.port", 0),
                ("apps.0.log", "../../etc/passwd"), ("apps.0.cmd", "reboot"), ("apps.0.subnet", "nobody"),
                ("peers.0.side", "c"), ("peers.0.allowed", ["x"]), ("peers.0.peer_vpc", "../x"),
                ("nat.interface", "eth0 -j ACCEPT"), ("nat.subnets", ["nobody"]), ("nat.dns", ["x"]),
                ("forward.was", "2"), ("published.0.host_port", 70000), ("published.0.protocol", "icmp")):
            record = self.full()
            place, keys = record, path.split(".")
            for key in keys[:-1]:
                place = place[int(key)] if key.isdigit() else place[key]
            place[keys[-1]] = value
            with self.assertRaises(ValueError, msg="%s = %r" % (path, value)) as caught:
                tool.check_record(record, "blog")
            self.assertNotIsInstance(caught.exception, KeyError)
        for key in self.full():
            record = self.full()
            del record[key]
            if key == "nat":
                tool.check_record(record, "blog")
            else:
                with self.assertRaises(ValueError, msg=key):
                    tool.check_record(record, "blog")
        record = self.full()
        record["nat"], record["published"] = None, []
        del record["forward"]
        tool.check_record(record, "blog")
        for whole in ([], None, 5, "x", {}):
            with self.assertRaises(ValueError):
                tool.check_record(whole, "blog")
        record = self.full()
        record["subnets"].append(record["subnets"][0])
        with self.assertRaises(ValueError):
            tool.check_record(record, "blog")


class FlagCheckTest(TextTest):
    """flag-check finds what it is there to find: the command table is broken on purpose, in memory."""

    def setUp(self):
        kept = {name: dict(entry) for name, entry in tool.COMMANDS.items()}

        def put_back():
            tool.COMMANDS.clear()
            tool.COMMANDS.update(kept)
        self.addCleanup(put_back)

    def faults(self, *words):
        found = tool.parser_faults()
        self.assertTrue([text for text in found if all(word in text for word in words)], found)

    def test_sound(self):
        self.assertEqual(tool.parser_faults(), [])

    def test_option_without_help(self):
        flags, options = tool.COMMANDS["create"]["arguments"][1]
        tool.COMMANDS["create"]["arguments"] = (tool.COMMANDS["create"]["arguments"][0],
                                                (flags, dict(options, help="")))
        self.faults("create: --cidr has no help")

    def test_example_that_does_not_parse(self):
        for example in ("create blog", "create blog --cidr 10.20.0.5/16", "create blog --cdir 10.20.0.0/16"):
            tool.COMMANDS["create"]["example"] = example.split()
            self.faults("create blog")

    def test_example_of_another_command(self):
        tool.COMMANDS["create"]["example"] = ["delete", "blog"]
        self.faults("the example of create is of another command")

    def test_no_handler(self):
        for handler in (None, lambda ctl, args: None):
            tool.COMMANDS["delete"]["handler"] = handler
            self.faults("delete has no handler with help")

    def test_shared_handler(self):
        tool.COMMANDS["delete"]["handler"] = tool.COMMANDS["create"]["handler"]
        self.faults("two commands share the handler")

    def test_handler_without_command(self):
        del tool.COMMANDS["delete-subnet"]
        self.faults("the handler delete_subnet has no command")

    def test_global_option_without_help(self):
        kept = tool.GLOBAL_OPTIONS
        self.addCleanup(setattr, tool, "GLOBAL_OPTIONS", kept)
        tool.GLOBAL_OPTIONS = kept[:1] + ((kept[1][0], dict(kept[1][1], help="")),) + kept[2:]
        self.faults("--why has no help")

    def test_what_the_command_answers(self):
        out = io.StringIO()
        ctl = types.SimpleNamespace(say=lambda text: out.write(text + "\n"))
        self.assertFalse(tool.COMMANDS["flag-check"]["handler"](ctl, None))
        self.assertEqual(out.getvalue(), "Parser check OK\n")
        tool.COMMANDS["create"]["example"] = ["create"]
        self.assertEqual(tool.COMMANDS["flag-check"]["handler"](ctl, None), 1)
        self.assertIn("FAULT: ", out.getvalue())


class OnceTest(unittest.TestCase):

    def test_each_name_is_given_once(self):
        """A second function of a name would silently stand in for the first."""
        with open(VPCCTL, encoding="utf-8") as source:
            names = [node.name for node in ast.parse(source.read()).body if hasattr(node, "name")
                     and not (isinstance(node, ast.ClassDef) and node.bases and isinstance(node.bases[0], ast.Call))]
        self.assertEqual(sorted(name for name in set(names) if names.count(name) > 1), [])


class FloorTest(unittest.TestCase):
    """Python 3.6 is the floor: what came later is not in the file, whatever Python runs this."""

    def test_no_later_words(self):
        with open(VPCCTL, encoding="utf-8") as handle:
            source = handle.read()
        for pattern in (r":=", r"capture_output", r"\btext=True", r"\.su(b|per)net_of", r"dataclass",
                        r"from __future__", r"^\s*match .*:$", r"removeprefix|removesuffix", r"missing_ok",
                        r"shell=True", r"\bos\.system\(", r"\beval\(|\bexec\("):
            found = [line for line in source.splitlines() if re.search(pattern, line)]
            self.assertEqual(found, [], pattern)

    def test_only_the_standard_library(self):
        import ast
        with open(VPCCTL, encoding="utf-8") as handle:
            tree = ast.parse(handle.read())
        top = {name.name for node in tree.body if isinstance(node, ast.Import) for name in node.names}
        self.assertLessEqual(top, {"argparse", "errno", "json", "os", "re", "stat", "sys"})
        used = {(name.name if isinstance(node, ast.Import) else node.module).split(".")[0]
                for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for name in node.names}
        for name in sorted(used):
            __import__(name)
        self.assertLessEqual(used, set(getattr(sys, "stdlib_module_names", used)))


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        with open(PLANS, "w") as sink:
            sink.write(plans_as_text())
        sys.exit()
    unittest.main()
