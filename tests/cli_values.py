"""Values: written in one way or refused, printed without moving a terminal. Thousands of odd policies, topologies, records
and command lines. No root, no process started."""

import contextlib
import copy
import io
import json
import os
import random
import re
import sys
import unittest
from unittest import mock

import netfilter
from cli_commands import CliTest
from unit_core import TextTest, blog, make_vpc, tool

TEXTS = ("", " ", "0", "022", "+80", "-1", " 80", "80 ", "8_0", "1e3", "0x50", "\u0668\u0660", "80\n", "80-", "-80", "022-022",
         "1-022", " 1-80", "8000-8100", "80-80", "90-80", "0-80", "1-70000", "8\u0660-90", "10.0.0.0/010", "10.0.0.0/08",
         "10.0.0.0/8 ", " 10.0.0.0/8", "10.0.0.0/+8", "010.0.0.0/8", "10.0.0.00/8", "1.2.3.04", "1.2.3.04/32", "10.1.2.3",
         "10.1.2.3/32", "0.0.0.0/0", "10.20.1.0/24", "10.20.1.9/24", "10.0.0.0/33", "10.0/8", "\u0661\u0660.0.0.0/8", "::/0", "::1",
         "10.0.0.256/32", "web", "db", "Web", "web ", "tcp", "all", "TCP", "icmp", "sctp", "allow", "deny", "--x", "-j", "--dport",
         "../web", "/etc/passwd", "a/b", "..", "x" * 500, "\x1b[2J", "a\x07b", "\0", "\u202e", "\ud800", "\udcff", "caf\u00e9", "%s",
         "{0}", "$(id)", "NaN", "null", "eth0", "eth0 ", "br-blog", "lo")
VALUES = TEXTS + (0, -1, 1, 22, 80, 65535, 65536, 1 << 31, 10 ** 30, 80.0, 80.5, float("nan"), float("inf"), True, False, None,
                  [], {}, [80], ["web"], {"port": 80}, [[[[]]]])
# What would fit, but for how it is written: by the start of the key.
ALMOST = {"port": ("022-022", "1-022", "08000-8100", "0-80", "+1-80", "1_0-80", "8000-08100", "80-80", "1-65535", 22, 65535),
          "from": ("10.0.0.0/010", "10.0.0.0/08", "010.0.0.0/8", "1.2.3.04/32", "10.1.2.3", "10.20.0.0/016", "10.20.1.0/24", "web"),
          "cidr": ("10.20.0.0/016", "10.020.0.0/16", "10.20.1.0/024", "10.20.3.0/24", "10.20.1.0/25"),
          "gw": ("10.20.1.05", "010.20.1.5", "10.20.1.5", "10.20.2.1")}
ALMOST.update(to=ALMOST["from"], host_port=ALMOST["port"], host_ip=ALMOST["gw"])
DEEP = "@deep@"


def places(value, path=()):
    """Every place in a JSON value, as a path of keys."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        for found in places(item, path + (key,)):
            yield found


def misspelled(dice, value):
    """A value written a bit differently: the same number, and perhaps not for everybody who reads it."""
    text = str(value)
    at = dice.choice([found.start() for found in re.finditer("[0-9]+", text)] or [0])
    if dice.random() < .4:
        return text[:at] + "0" + text[at:]
    return dice.choice((
        text[:at] + "+" + text[at:], text[:at] + " " + text[at:], " " + text, text + " ", text + "\n",
        text[:at + 1] + "_" + text[at + 1:], text.translate({48 + n: 0x660 + n for n in range(10)}), text + "\0", text.upper(),
        text + "\u200e", "--" + text, "/" + text, text + text, text[:-1], text))


def mutated(dice, value, times=(1, 1, 1, 2, 3)):
    """A JSON text with some places of a value changed."""
    value = copy.deepcopy(value)
    for _ in range(dice.choice(times)):
        path = dice.choice([path for path in places(value) if path])
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        old, kind = holder[path[-1]], dice.random()
        if kind < .3 and path[-1] in ALMOST:
            holder[path[-1]] = dice.choice(ALMOST[path[-1]])
        elif kind < .5 and isinstance(old, (str, int)):
            holder[path[-1]] = misspelled(dice, old)
        elif kind < .8:
            holder[path[-1]] = dice.choice(VALUES)
        elif kind < .85:
            holder[path[-1]] = DEEP
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(old))
        elif kind < .95:
            del holder[path[-1]]
        else:
            holder[dice.choice(TEXTS)] = old
    text = json.dumps(value)
    depth = dice.choice((30, 900, 990, 5000))
    text = text.replace(json.dumps(DEEP), "[" * depth + "]" * depth)
    if dice.random() < .05:
        text = re.sub(r'"(\w+)": ', r'"\1": 1, "\1": ', text, 1)          # a key twice
    return text


POLICY = {"subnet": "web", "ingress": [
    {"port": 22, "protocol": "tcp", "action": "deny"},
    {"port": "8000-8100", "protocol": "tcp", "action": "allow", "from": "10.0.0.0/8"},
    {"protocol": "udp", "action": "deny", "from": "db"}],
    "egress": [{"protocol": "udp", "action": "allow", "to": "10.20.2.2/32"}, {"protocol": "icmp", "action": "deny"}],
    "default": {"ingress": "allow", "egress": "deny"}}
TOPOLOGY = {"vpcs": [
    {"name": "blog", "cidr": "10.20.0.0/16", "nat": {"interface": "eth0", "subnets": ["web"]}, "subnets": [
        {"name": "web", "cidr": "10.20.1.0/24", "gw": "10.20.1.9",
         "policy": {key: POLICY[key] for key in ("ingress", "egress", "default")},
         "apps": [{"port": 8080}, {"port": 81, "cmd": ["sleep", "1"]}],
         "publish": [{"host_port": 8080, "port": 80, "protocol": "tcp", "interface": "eth0"}]},
        {"name": "db", "cidr": "10.20.2.0/24"}]},
    {"name": "shop", "cidr": "10.30.0.0/16", "subnets": [{"name": "api", "cidr": "10.30.1.0/24"}]}],
    "peers": [{"vpcs": ["blog", "shop"], "allow": ["10.20.1.0/24", "10.30.1.0/24"]}]}


def random_policy(dice):
    """A sound policy."""
    policy = {"subnet": "web"}
    for direction, key in (("ingress", "from"), ("egress", "to")):
        policy[direction] = []
        for _ in range(dice.randrange(5)):
            rule = {"protocol": dice.choice(("tcp", "udp", "icmp", "all")), "action": dice.choice(("allow", "deny"))}
            if rule["protocol"] in ("tcp", "udp") and dice.random() < .7:
                rule["port"] = dice.choice((22, 80, 65535, "1-1023", "8000-8100", "80-80"))
            if dice.random() < .5:
                rule[key] = dice.choice(("db", "10.20.1.0/24", "10.0.0.0/8", "192.0.2.1/32", "0.0.0.0/0"))
            policy[direction].append(rule)
    if dice.random() < .4:
        policy["default"] = {dice.choice(("ingress", "egress")): dice.choice(("allow", "deny"))}
    return policy


class GeneratedTest(CliTest):
    """Whatever is written: it is refused, with exit code 2 and its place, or the kernel does what `explain` says. Nothing
    is changed by what is refused, or in a dry run."""

    SEED = 1202

    def setUp(self):
        CliTest.setUp(self)
        self.dice = random.Random(self.SEED)
        self.records()
        self.vpc = tool.Store(self.data).load()[0]["blog"]
        self.count = self.refusals = self.compared = 0

    def judge(self, what, call, place, *words, input=""):
        """What the parser `call` makes of it; None if it was refused, with its place. Each tenth time the whole command is
        run, too: it says the same, and changes nothing."""
        try:
            found, said = call(), ""
        except tool.Problem as problem:
            found, said = None, str(problem)
            self.refusals += 1
            self.assertEqual(problem.code, 2, what)
            self.assertRegex(said, place, what)
            self.assertLess(len(said), 2000, what)
        self.count += 1
        if self.count % 10 == 1:
            before = self.tree()
            answer = self.cli(*words, code=None, input=input)
            self.assertEqual(self.tree(), before, what)
            self.assertEqual(answer.code == 2, found is None, f"{what}\n{answer}")
            if found is None:
                self.assert_clear(answer)
                self.assertIn("vpcctl: " + re.split("[^ -~]", said)[0], answer.err)
            elif words[0] == "--dry-run":
                self.plain(what, answer.out)
        return found

    def agree(self, what, policy, vpc, own):
        """What `explain` decides on flows at a policy's edges is what its rules do, as iptables reads them."""
        rules = tool.render_policy(policy, vpc)
        found = list(netfilter.flows(policy, {subnet["name"]: subnet["cidr"] for subnet in vpc["subnets"]}))
        for flow in self.dice.sample(found, min(len(found), 25)):
            said = tool.policy_decision(policy, *flow, siblings=vpc["subnets"])[0]
            done = netfilter.flow_passes(rules, *flow[:3], own=own, other=flow[3])
            self.assertEqual(done, (said, said), f"{what}\n{flow}")
            self.compared += 1

    def plain(self, what, text):
        """No number in a plan is written in a way that tools read differently. (Interfaces may have any name.)"""
        for token in re.findall(r" (?:-[sd]|--[sd]port|--to-destination|--ctorigdstport|via|from|to|sport|table|pref|lookup|"
                                r"unreachable|(?:addr|route) (?:add|del)|neigh (?:replace|del)) ([0-9]\S*)", text):
            self.assertIsNone(re.search(r"(?:^|[./:])0[0-9]", token), f"{what}\n{token}")
            self.assertRegex(token, r"\A[0-9./:]+\Z", what)

    def test_policies(self):
        for _ in range(1000):
            text = mutated(self.dice, random_policy(self.dice), (0, 1, 1, 1, 2))

            def read():
                with mock.patch.object(sys, "stdin", io.StringIO(text)):
                    subnet, policy = tool.read_policy(None, self.vpc, "-")
                return subnet, policy, tool.policy_names(dict(subnet, policy=policy), self.vpc)
            found = self.judge(text, read, "standard input|the policy of web", "--dry-run", "apply-policy", "blog", "-", input=text)
            if found:
                self.agree(text, found[1], self.vpc, found[0]["host_ip"])
        self.assertGreater(self.refusals, 400)
        self.assertGreater(self.compared, 3000)

    def test_topologies(self):
        control = tool.Control(mock.Mock(dry_run=True, data_dir=self.data))
        control.note = lambda text: None
        for _ in range(400):
            topology = copy.deepcopy(TOPOLOGY)
            topology["vpcs"][0]["subnets"][0]["policy"] = policy = random_policy(self.dice)
            del policy["subnet"]
            text = mutated(self.dice, topology, (0, 1, 1, 1, 2))

            def read():
                with mock.patch.object(sys, "stdin", io.StringIO(text)):
                    return tool.desired_world(control, tool.check_topology(tool.read_json("-", "file"), "standard input"))
            world = self.judge(text, read, r"standard input|VPC \S|overlap|peer|is not a way out", "--dry-run", "apply", "-",
                               input=text)
            for vpc in (world or {}).values():
                self.plain_steps(text, world)
                for subnet in vpc["subnets"]:
                    if subnet["policy"] != tool.DEFAULT_POLICY:
                        self.agree(text, subnet["policy"], vpc, subnet["host_ip"])
        self.assertGreater(self.refusals, 200)
        self.assertGreater(self.compared, 1500)

    def plain_steps(self, what, world):
        """The commands of a world's plan hold plain numbers only."""
        self.plain(what, "\n".join(" ".join(argv) for step in tool.plan(world).values() for argv in step.do
                                   if argv[0] != "tee"))

    def record(self):
        """A record with something of everything."""
        world = {}
        vpc = make_vpc(world, "blog", "10.20.0.0/16", ("web", "10.20.1.0/24"), ("db", "10.20.2.0/24"))
        make_vpc(world, "shop", "10.30.0.0/16", ("api", "10.30.1.0/24"))
        vpc["subnets"][0]["policy"] = {key: POLICY[key] for key in ("ingress", "egress", "default")}
        tool.add_peering(mock.Mock(dry_run=True), world, vpc, world["shop"], ["10.20.1.0/24", "10.30.1.0/24"])
        vpc["nat"] = {"interface": "eth0", "subnets": ["web"], "dns": ["192.0.2.53"]}
        vpc["forward"] = {"was": "0", "kept_off": ["wlan0"]}
        vpc["published"].append({"subnet": "web", "host_port": 8080, "port": 80, "protocol": "tcp", "interface": "eth0"})
        vpc["apps"].append(dict(tool.new_app(vpc, vpc["subnets"][0], 8080, ["sleep", "1"]), pid=4242, start="boot/123"))
        return vpc

    def test_records(self):
        sound, path, store = self.record(), os.path.join(self.data, "vpc_blog.json"), tool.Store(self.data)
        for _ in range(500):
            text = mutated(self.dice, sound, (0, 1, 1, 1, 1, 2))
            with open(path, "w") as handle:
                handle.write(text)

            def read():
                return tool.Control(mock.Mock(data_dir=self.data)).vpc("blog") and store.load()[0]
            world = self.judge(text, read, "the record of VPC blog is unreadable: " + path, "inspect", "blog")
            if world:
                self.plain_steps(text, world)
                for subnet in world["blog"]["subnets"][:1]:
                    self.agree(text, subnet["policy"], world["blog"], subnet["host_ip"])
        self.assertGreater(self.refusals, 200)
        self.assertGreater(self.compared, 1500)

    def test_command_lines(self):
        lines = [list(entry["example"]) for name, entry in sorted(tool.COMMANDS.items())
                 if len(entry["example"]) > 1 and not entry["hidden"] and name != "logs"]
        before, refusals = self.tree(), 0
        for _ in range(300):
            words = self.dice.choice(lines)[:]
            place = self.dice.randrange(1, len(words))
            words[place] = misspelled(self.dice, words[place]) if self.dice.random() < .6 else self.dice.choice(TEXTS)
            answer = self.cli("--dry-run", *words, code=None, input="{}")
            self.assertIn(answer.code, (0, 1, 2, 4), str(answer))
            if answer.code == 2:
                self.assert_clear(answer)
                refusals += 1
            elif answer.code == 0 and words[0] not in ("graph", "explain", "exec", "sandbox", "completion"):
                self.plain(words, answer.out)
        self.assertEqual(self.tree(), before)
        self.assertGreater(refusals, 100)


class CanonicalTest(TextTest):
    """One way to write a value."""

    def test_blocks(self):
        for good in ("0.0.0.0/0", "10.0.0.0/8", "10.1.2.3/32", "255.255.255.255/32", "10.20.9.128/25"):
            self.assertEqual(tool.block_text(good), good)
            self.assertEqual(str(tool.as_network(good)), good)
            self.assertEqual(tool.network_type(good), good)
        for bad in ("10.0.0.0/010", "10.0.0.0/08", "010.0.0.0/8", "10.0.0.00/8", "10.0.0.0/8 ", " 10.0.0.0/8", "10.0.0.0/+8",
                    "10.0.0.0/8\n", "1_0.0.0.0/8", "\u0661\u0660.0.0.0/8", "10.0.0.0/\u0668", "10.1.2.3", "10.0.0.0/255.0.0.0", "", "/",
                    "10.0.0.1/8"):
            for call in (tool.bounds, tool.block_text):
                with self.assertRaises(tool.Problem, msg=repr(bad)):
                    call(bad)
        self.assert_problem("'10.1.2.3' is not an IPv4 block", tool.bounds, "10.1.2.3", hint="10.1.2.3/32")

    def test_addresses(self):
        self.assertEqual([tool.address_type(text) for text in ("0.0.0.0", "10.20.1.1")], ["0.0.0.0", "10.20.1.1"])
        for bad in ("1.2.3.04", "01.2.3.4", "1.2.3.4 ", " 1.2.3.4", "1.2.3", "1.2.3.4.5", "1.2.3.256", "1.2.3.\u0664", "1.2.3.+4"):
            self.assert_problem("is not an IPv4 address", tool.address_number, bad)
            with self.assertRaises(tool.argparse.ArgumentTypeError, msg=bad):
                tool.address_type(bad)
        vpc = blog()
        self.assert_problem("'10.20.1.02' is not an IPv4 address", tool.resolve_target, vpc, "blog", "web", "10.20.1.02")

    def test_ports(self):
        self.assertEqual([tool.ports(port) for port in (1, 65535, "1-65535", "80-80")],
                         [(1, 1), (65535, 65535), (1, 65535), (80, 80)])
        for bad in ("022-022", "1-022", "80", "+1-80", " 1-80", "1-80 ", "1-80\n", "8_0-90", "1-\u0668\u0660", "0-80", "90-80", "1-65536", 0, -1,
                    80.0, True, None, [80], float("nan"), 10 ** 30):
            self.assert_problem("port is", tool.ports, bad, hint='"8000-8100"')
        for bad in ("022", "+80", " 80", "80 ", "8_0", "\u0668\u0660", "80\n", "65536", "0"):
            with self.assertRaises(tool.argparse.ArgumentTypeError, msg=bad):
                tool.port_type(bad)
        for bad in ("8080:", "8080:080", ":80"):
            with self.assertRaises(tool.argparse.ArgumentTypeError, msg=bad):
                tool.publish_type(bad)

    def test_rules_are_made_from_numbers(self):
        """Also where a policy has not been checked: what is no number makes no rule."""
        for rule in ({"port": "022-022"}, {"from": "10.0.0.0/010"}, {"port": "80; x"}, {"from": "10.0.0.0/8 -j ACCEPT"}):
            policy = {"ingress": [dict({"protocol": "tcp", "action": "deny"}, **rule)]}
            with self.assertRaises(tool.Problem, msg=rule):
                tool.render_policy(policy, blog()["blog"])

    def test_all(self):
        """Protocol all: a rule of iptables that names none, and is known again as iptables prints it."""
        policy = tool.check_policy({"ingress": [{"protocol": "all", "action": "deny"},
                                                {"protocol": "all", "action": "allow", "from": "10.1.2.3/32"}]}, "p")
        own = [rule for rule in tool.render_policy(policy, blog()["blog"]) if "-all" in rule[-1] and "replies" not in rule[-1]]
        self.assertEqual(own, [("-A", "INPUT", "-j", "DROP", "-m", "comment", "--comment", "policy-ingress-deny-all"),
                               ("-A", "INPUT", "-s", "10.1.2.3/32", "-j", "ACCEPT", "-m", "comment", "--comment",
                                "policy-ingress-allow-all")])
        printed = "-A INPUT -m comment --comment policy-ingress-deny-all -j DROP"
        self.assertEqual(tool.rule_key(printed.split()[2:]), tool.rule_key(own[0][2:]))
        self.assert_problem("p: ingress rule 1: all has no port", tool.check_policy,
                            {"ingress": [{"protocol": "all", "action": "deny", "port": 80}]}, "p")


class TamperedTest(CliTest):
    """A record in which somebody has put something else."""

    def test_log(self):
        """The name of a log is what this app's log is called: another would be emptied at the next start."""
        world = self.records()
        world["blog"]["apps"].append(dict(tool.new_app(world["blog"], world["blog"]["subnets"][0], 8080, []), pid=4242, start="b/1"))
        tool.check_record(world["blog"], "blog")
        for key, value in (("log", "vpc_shop.json"), ("log", "lock"), ("log", "vpcctl.log"), ("log", "app_ns-shop-api_80.log"),
                           ("log", "app_ns-blog-web_08080.log"), ("ns", "ns-shop-api"), ("ns", "ns-blog-db")):
            record = copy.deepcopy(world["blog"])
            record["apps"][0][key] = value
            with self.assertRaises(ValueError, msg=value) as caught:
                tool.check_record(record, "blog")
            self.assertIn("app on port 8080", str(caught.exception))

    def test_addresses_outside(self):
        for key, value in (("gw", "10.20.2.1"), ("host_ip", "10.30.1.2"), ("host_ip", "10.20.1.0"), ("gw", "10.20.1.255")):
            world = blog()
            world["blog"]["subnets"][0][key] = value
            with self.assertRaises(ValueError, msg=value) as caught:
                tool.check_record(world["blog"], "blog")
            self.assertIn(f"{key} is not in 10.20.1.0/24", str(caught.exception))


class EnvironmentTest(CliTest):

    def test_wait(self):
        """Seconds, or a refusal before anything is made."""
        for text in ("abc", "nan", "inf", "-1", "1e3", "0x10", "9999999", " 1", "1 ", "\u0661", "1.", ".5", "010", "\udcff", "\x1b[2J"):
            with mock.patch.dict(os.environ, {"VPCCTL_WAIT": text}):
                self.refused("create", "x", "--cidr", "10.9.0.0/16", text="VPCCTL_WAIT is ", hint="a number of seconds")
        self.assertFalse(os.path.exists(self.data))
        for text, seconds in (("0", 0), ("1.2", 1.2), ("60", 60), ("", 60)):
            with mock.patch.dict(os.environ, {"VPCCTL_WAIT": text}):
                self.assertEqual(tool.Store(self.data).patience, seconds)

    def test_folder(self):
        """What the kernel takes in no file's name; no environment and no argument of a process holds a NUL."""
        for name in ("\ud800", "a\0b", ""):
            self.refused("--data-dir", name, "list", text="--data-dir")
            self.refused("plan", name, text="FILE")
        with mock.patch.object(tool.os, "environ", {"VPCCTL_DATA": "a\0b"}), self.assertRaises(tool.Problem):
            tool.data_folder(None)
        self.assertEqual(self.cli("--data-dir", self.top + "/\udcff\x1b[2J", "list").code, 0)

    def test_columns(self):
        for text in ("abc", "-5", "0", "1", "9" * 30, "\u0661"):
            with mock.patch.dict(os.environ, {"COLUMNS": text}):
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    self.assertEqual(tool.main(["explain", "--help"]), 0)
                self.assertIn("usage: vpcctl explain", out.getvalue())


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self):
        return True


class TerminalTest(CliTest):
    """What others have written is spelled out, whoever prints it; our own colours stay."""

    EVIL = "a\x1b[2J\x1b]0;x\x07\x9b1m\rb\nc\u202e\udcff\ud800\0"
    SHOWN = r"a\x1b[2J\x1b]0;x\x07\x9b1m\rb\nc\u202e\udcff\ud800\x00"

    def test_lines(self):
        out, err = io.StringIO(), io.StringIO()
        run = tool.Executor(out=out, why=True)
        control = tool.Control(mock.Mock(dry_run=False, data_dir=self.data), executor=run)
        with mock.patch.object(sys, "stderr", err):
            control.say(self.EVIL)
            control.report(self.EVIL)
            run.echo(("kill", "1"), self.EVIL)
            control.note(self.EVIL)
            tool.say_error(self.EVIL)
            tool.complain(tool.Problem(self.EVIL, self.EVIL))
        shown = self.SHOWN
        self.assertEqual(out.getvalue().splitlines(), [shown, shown, ">>> kill 1   # " + shown])
        self.assertEqual(err.getvalue().splitlines(), ["note: " + shown, shown, "vpcctl: " + shown, "  " + shown])

    def test_colours(self):
        """Ours are shown; what looks like them in a text of somebody else's is not."""
        screen = Screen()
        with mock.patch.object(sys, "stdout", screen), mock.patch.dict(os.environ, {"TERM": "xterm"}):
            os.environ.pop("NO_COLOR", None)
            tool.Executor().say(tool.paint("\x1b[31mx", 32) + tool._PAINT[:5])
        self.assertEqual(screen.getvalue(), "\x1b[32m\\x1b[31mx\x1b[0m" + tool._PAINT[:5] + "\n")

    def test_answers(self):
        """A record, a topology and a command line full of them: text is spelled out, JSON stays JSON."""
        world = self.records()
        world["blog"]["apps"].append(dict(tool.new_app(world["blog"], world["blog"]["subnets"][0], 8080, [self.EVIL[:-2]]),
                                          pid=4242, start="b/1"))
        with open(os.path.join(self.data, "vpc_blog.json"), "w") as handle:
            json.dump(world["blog"], handle)
        self.assertEqual(json.loads(self.cli("inspect", "blog").out)["apps"][0]["command"], [self.EVIL[:-2]])
        exported = self.cli("export", "blog").out
        self.assertEqual(json.loads(exported)["vpcs"][0]["subnets"][0]["apps"][0]["cmd"], [self.EVIL[:-2]])
        changed = exported.replace("8080", "8081")
        for answer in (self.cli("plan", "-", code=1, input=changed, root=False), self.cli("--dry-run", "apply", "-", input=changed),
                       self.cli("graph"), self.cli("--dry-run", "stop-app", "blog", "web"),
                       self.cli("--dry-run", "exec", "blog", "web", "--", self.EVIL),
                       self.cli("--dry-run", "deploy-app", "blog", "web", "--port", 99, "--", self.EVIL)):
            self.assertFalse(re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", answer.out + answer.err), repr(answer.out))
        self.assertIn("\\x1b[2J", self.cli("plan", "-", code=1, input=changed, root=False).out)

    def test_logs(self):
        """On a terminal what a program wrote is spelled out; to a pipe it goes as it is."""
        world = self.records()
        world["blog"]["apps"].append(dict(tool.new_app(world["blog"], world["blog"]["subnets"][0], 8080, []), pid=4242, start="b/1"))
        with open(os.path.join(self.data, "vpc_blog.json"), "w") as handle:
            json.dump(world["blog"], handle)
        with open(os.path.join(self.data, world["blog"]["apps"][0]["log"]), "w") as handle:
            handle.write("one\n\ttwo\x1b[2J\n\x07")
        self.assertEqual(self.cli("logs", "blog", "web").out, "one\n\ttwo\x1b[2J\n\x07")
        screen = Screen()
        with mock.patch.object(sys, "stdout", screen), mock.patch.dict(os.environ, {"VPCCTL_DATA": self.data}):
            self.assertEqual(tool.main(["logs", "blog", "web"]), 0)
        self.assertEqual(screen.getvalue(), "one\n        two\\x1b[2J\n\\x07")

    def test_log_of_changes(self):
        """One line, whatever was typed; half a character is no traceback."""
        os.mkdir(self.data, 0o755)
        store = tool.Store(self.data)
        store.log(self.EVIL, self.EVIL)
        store.lock(self.EVIL)
        os.close(store._lock)
        with open(os.path.join(self.data, "vpcctl.log")) as handle:
            self.assertRegex(handle.read(), r"\A\S+ %s -> %s\n\Z" % (re.escape(self.SHOWN), re.escape(self.SHOWN)))
        with open(os.path.join(self.data, "lock")) as handle:
            self.assertTrue(handle.read().endswith(", " + self.SHOWN))

    def test_a_program_called_and(self):
        """A program that is called as the sign with which we show what runs in the background."""
        vpcs = [{"name": "x", "cidr": "10.9.0.0/16", "subnets": [{"name": "a", "cidr": "10.9.1.0/24", "apps": [
            {"port": 80, "cmd": ["&"]}]}]}]
        self.assertIn("+ app x/a 80 '&'\n", self.cli("plan", "-", code=1, input=json.dumps({"vpcs": vpcs})).out)

    def test_half_a_character_in_a_topology(self):
        text = json.dumps(dict(TOPOLOGY, vpcs=[{"name": "x", "cidr": "10.9.0.0/16", "subnets": [
            {"name": "a", "cidr": "10.9.1.0/24", "apps": [{"port": 80, "cmd": ["\ud800"]}]}]}], peers=[]))
        for words in (("plan", "-"), ("--dry-run", "apply", "-")):
            self.refused(*words, input=text, text=r'vpcs[0].subnets[0].apps[0].cmd: "\ud800" cannot be an argument')


if __name__ == "__main__":
    unittest.main()
