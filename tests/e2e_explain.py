"""explain against packets: random topologies, planted faults, and the remedies, run as they are printed."""

import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import unittest

from support import (INTERNET, LONG, SHORT, VPCCTL, SandboxTest, listener, ping, run, tcp_open, udp_answers,
                     vpcctl as cli, wait_until)

sys.path.insert(0, os.path.dirname(VPCCTL))
import vpcctl  # noqa: E402

ECHO = ("import socket as k; s = k.socket(2, 2); s.bind(('', %d))\n"
        "while 1: s.sendto(*s.recvfrom(2048))")
PORTS = {"tcp": (22, 80, 8080, 9000), "udp": (53, 5000), "icmp": (None,)}
PATIENCE = 0.5
# What comes back where a hop with that answer stops a packet: nothing else may. (The kernel limits its ICMP errors.)
ENDS = {"no answer": ("silence", "unreachable"), "no route": ("unreachable", "silence"), "refused": ("reset", "port"),
        "rejected": ("port", "prohibited", "reset", "unreachable", "silence")}


def world_now():
    """Return the records, as a command would read them."""
    return vpcctl.Store(os.environ["VPCCTL_DATA"]).load()[0]


def echo_app(port):
    """Return a topology's app that answers datagrams on a port."""
    return {"port": port, "cmd": ["python3", "-c", ECHO % port]}


def some_rules(dice, side, blocks):
    """Return a few random policy rules; `blocks` are siblings' names and blocks."""
    rules = []
    for _ in range(dice.choice((0, 0, 1, 2, 3))):
        protocol = dice.choice(("tcp", "tcp", "udp", "icmp"))
        rule = {"protocol": protocol, "action": dice.choice(("allow", "deny"))}
        port = dice.choice({"tcp": (22, 80, 8080, "8000-9000", "80-80", None), "udp": (53, "1-5000", "1-65535", None), "icmp": (None,)}[protocol])
        if port:
            rule["port"] = port
        if dice.random() < 0.5:
            rule[side] = dice.choice(blocks)
        rules.append(rule)
    return rules


def some_policy(dice, names, blocks):
    """Return a random policy."""
    policy = {"ingress": some_rules(dice, "from", names + blocks), "egress": some_rules(dice, "to", names + blocks)}
    default = {way: dice.choice(("allow", "deny")) for way in ("ingress", "egress") if dice.random() < 0.15}
    return dict(policy, default=default) if default else policy


def some_topology(seed):
    """Return a random topology: three or four VPCs of one to three subnets, with peers, NAT, policies and apps."""
    dice, vpcs = random.Random(seed), []
    for number in range(dice.choice((3, 4))):
        subnets = []
        for place in range(dice.choice((1, 2, 2, 3))):
            low, length = dice.choice(((0, 24), (64, 26), (16, 28)))
            subnet = {"name": "s%d" % place, "cidr": "10.%d.%d.%d/%d" % (90 + number, place, low, length)}
            if dice.random() < 0.3:
                subnet["gw"] = "10.%d.%d.%d" % (90 + number, place, low + 9)
            subnet["apps"] = [{"port": 8080}] * dice.choice((0, 1, 1)) + [echo_app(53)] * dice.choice((0, 1))
            subnets.append(subnet)
        vpc = {"name": "v%d" % number, "cidr": "10.%d.0.0/16" % (90 + number), "subnets": subnets}
        nat = dice.choice((None, {"interface": "eth0"}, {"interface": "eth0", "subnets": ["s0"]}))
        vpcs.append(dict(vpc, nat=nat) if nat else vpc)
    blocks = [subnet["cidr"] for vpc in vpcs for subnet in vpc["subnets"]] + [vpc["cidr"] for vpc in vpcs]
    blocks.append("0.0.0.0/0")
    for vpc in vpcs:
        for subnet in vpc["subnets"]:
            if dice.random() < 0.6:
                subnet["policy"] = some_policy(dice, [other["name"] for other in vpc["subnets"]], blocks)
    peers = []
    for a in range(len(vpcs)):
        for b in range(a):
            if dice.random() < 0.7:
                peers.append({"vpcs": [vpcs[a]["name"], vpcs[b]["name"]],
                              "allow": some_blocks(dice, vpcs[a]) + some_blocks(dice, vpcs[b])})
    return {"vpcs": vpcs, "peers": peers}


def some_blocks(dice, vpc):
    """Return some of a VPC's blocks for a peering: whole subnets, one address, or all of it."""
    found = []
    for subnet in vpc["subnets"]:
        base = subnet["cidr"].split("/")[0]
        found.append(dice.choice((subnet["cidr"], subnet["cidr"],
                                  "%s%d/32" % (base[:base.rindex(".") + 1], int(base.rsplit(".", 1)[1]) + 2))))
    return dice.choice(([vpc["cidr"]], found[:1], found[-1:], found))


def some_questions(dice, world, count):
    """Return random questions: (VPC, subnet, target, port, protocol)."""
    ends = [(vpc, subnet) for vpc in world.values() for subnet in vpc["subnets"]]
    targets = [subnet["host_ip"] for _, subnet in ends] * 6 + [subnet["gw"] for _, subnet in ends]
    targets += [vpc["cidr"].replace(".0.0/16", tail) for vpc in world.values() for tail in (".0.1", ".0.7", ".77.7")]
    targets += ["203.0.113.1"] * 6 + ["198.51.100.7", "192.0.2.1", "192.0.2.2", "127.0.0.1", "10.200.0.2"]
    questions = []
    for _ in range(count):
        vpc, subnet = dice.choice(ends)
        protocol = dice.choice(("tcp", "tcp", "tcp", "udp", "icmp"))
        target = dice.choice(targets + [other["host_ip"] for other in vpc["subnets"]] * 4)
        questions.append((vpc["name"], subnet["name"], target, dice.choice(PORTS[protocol]), protocol))
    return questions


def probe_all(world, questions, patience=PATIENCE):
    """Send all the packets, a thread for each namespace -> answers, in order."""
    answers, by_space = [None] * len(questions), {}
    for number, (vpc, subnet, _, _, _) in enumerate(questions):
        by_space.setdefault(vpcctl.find_subnet(world, vpc, subnet)[1]["ns"], []).append(number)

    def work(space, numbers):
        vpcctl.enter_namespace(space)
        for number in numbers:
            _, _, target, port, protocol = questions[number]
            answers[number] = vpcctl.probe([(target, port, protocol)], patience)[0].kind
    threads = [threading.Thread(target=work, args=pair) for pair in by_space.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


class Truth(vpcctl.Records):
    """Sees nothing but who listens, as a test knows it: sockets on every address."""

    def __init__(self, ears):
        self.ears = ears

    def listeners(self, subnet, vpc):
        return [vpcctl.Listener(kind, "0.0.0.0", port, 0) for name, where, port, kind in self.ears
                if (name, where) == (vpc["name"], subnet["name"])]

    def program(self, _listener, _subnet):
        return "it"

    def runs(self, _app):
        return True


def disagreement(world, question, answer, sight):
    """Return what explain says and the packet does not do, or ''."""
    hops = vpcctl.explain_path(world, *question, sight=sight)
    stop = next((hop for hop in hops if hop.ok is False), None)
    story = "%s: %s\n  %s" % (question, answer, "\n  ".join(vpcctl.render_explain(hops)))
    if stop and (None in [hop.ok for hop in hops] or (stop.where, stop.answer) == ("listening", "no answer")):
        # something may stop it sooner, or stops the refusal
        return story if answer == "open" else ""
    if stop:
        return "" if answer in ENDS[stop.answer] else story
    if any(hop.ok is None for hop in hops):       # outside: what is there is in no record, but here it is known
        known = question[2] == INTERNET and question[3:] in ((80, "tcp"), (None, "icmp"))
        known = known and [hop.where for hop in hops if hop.ok is None] == ["beyond"]
        return story if known and answer != "open" else ""
    return story if answer != "open" else ""


class PacketsTest(SandboxTest):

    def check(self, seed, count):
        topology = some_topology(seed)
        path = self.file("topology.json", topology)
        cli("apply", path, "--prune", "--quiet")
        self.assertEqual(cli("plan", path, "--prune").out, "Nothing to do\n")
        cli("verify")
        world = world_now()
        ears = {(name, app["subnet"], app["port"], "udp" if app.get("command") else "tcp")
                for name, vpc in world.items() for app in vpc["apps"]}

        questions, truth = some_questions(random.Random(seed), world, count), Truth(ears)
        answers = probe_all(world, questions)
        odd = [number for number, question in enumerate(questions)
               if disagreement(world, question, answers[number], truth)]
        again = [questions[number] for number in odd]    # a busy machine may have been too slow: once more, with patience
        found = [disagreement(world, question, answer, truth)
                 for question, answer in zip(again, probe_all(world, again, LONG))]
        self.assertEqual([text for text in found if text], [], "seed %d" % seed)
        return len(questions), answers.count("open"), answers.count("reset") + answers.count("port")

    def test_random_pairs(self):
        asked = opened = refused = 0
        for seed in range(7):
            counts = self.check(seed, 50)
            asked, opened, refused = asked + counts[0], opened + counts[1], refused + counts[2]
        self.assertGreaterEqual(asked, 200)
        self.assertGreater(opened, asked // 9)            # the questions are not all of one kind
        self.assertGreater(refused, asked // 30)
        self.assertLess(opened + refused, asked * 3 // 4)


def two_vpcs():
    """Return the topology that the faults are planted in: everything in it can be reached."""
    return {"vpcs": [
        {"name": "blog", "cidr": "10.20.0.0/16", "nat": {"interface": "eth0"}, "subnets": [
            {"name": "web", "cidr": "10.20.1.0/24", "apps": [{"port": 80}]},
            {"name": "db", "cidr": "10.20.2.0/24", "apps": [{"port": 5432}]}]},
        {"name": "shop", "cidr": "10.30.0.0/16", "subnets": [
            {"name": "api", "cidr": "10.30.1.0/24", "apps": [{"port": 8080}, echo_app(53)]}]}],
        "peers": [{"vpcs": ["blog", "shop"], "allow": ["10.20.1.0/24", "10.30.1.0/24"]}]}


def rule(action, protocol, port=None, **more):
    """Return a policy rule."""
    return dict(more, action=action, protocol=protocol, **({"port": port} if port else {}))


def policy(where, **directions):
    """Return a fault: a policy for VPC/SUBNET."""
    vpc, _, name = where.partition("/")

    def plant(topology):
        for found in topology["vpcs"]:
            for subnet in found["subnets"]:
                if (found["name"], subnet["name"]) == (vpc, name):
                    subnet["policy"] = directions
    return plant


def peers(*allow):
    """Return a fault: the peering's blocks; none: no peering."""
    return lambda topology: topology.update(peers=[{"vpcs": ["blog", "shop"], "allow": list(allow)}] if allow else [])


def nat(value):
    """Return a fault: the NAT of blog."""
    def plant(topology):
        topology["vpcs"][0].pop("nat")
        topology["vpcs"][0].update({"nat": value} if value else {})
    return plant


def no_app(vpc, number):
    """Return a fault: no app in a subnet."""
    return lambda topology: topology["vpcs"][vpc]["subnets"][number].pop("apps")


def nothing(_topology):
    """Plant no fault: what is asked is wrong."""


WEB_DB = ("blog", "web", "db", "--port", "5432")
WEB_API = ("blog", "web", "shop/api", "--port", "8080")
OUT = ("blog", "db", INTERNET, "--port", "80")
# (question, what is wrong, hops that block: the first, and the next ones as remedies are carried out)
FAULTS = (
    (WEB_DB, [policy("blog/db", ingress=[rule("deny", "tcp", 5432)])], ["ingress policy"]),
    (WEB_DB, [policy("blog/db", ingress=[rule("deny", "tcp")])], ["ingress policy"]),
    (WEB_DB, [policy("blog/db", ingress=[rule("deny", "tcp", "5000-6000"), rule("allow", "tcp", 5432)])],
     ["ingress policy"]),
    (WEB_DB, [policy("blog/db", ingress=[rule("allow", "tcp", 80)])], ["ingress policy"]),
    (WEB_DB, [policy("blog/db", ingress=[rule("allow", "udp", 5432)])], ["ingress policy"]),
    (WEB_DB, [policy("blog/db", default={"ingress": "deny"})], ["ingress policy"]),
    (WEB_DB, [policy("blog/db", ingress=[rule("deny", "tcp", 5432, **{"from": "web"})])], ["ingress policy"]),
    (WEB_DB, [policy("blog/db", ingress=[rule("deny", "tcp", **{"from": "10.20.0.0/16"})])], ["ingress policy"]),
    (WEB_DB, [policy("blog/db", ingress=[rule("allow", "tcp", 5432, **{"from": "10.20.9.0/24"})])], ["ingress policy"]),
    (WEB_DB, [policy("blog/web", egress=[rule("deny", "tcp", 5432)])], ["egress policy"]),
    (WEB_DB, [policy("blog/web", egress=[rule("allow", "tcp", 80)])], ["egress policy"]),
    (WEB_DB, [policy("blog/web", egress=[rule("deny", "tcp", to="db")])], ["egress policy"]),
    (WEB_DB, [policy("blog/web", default={"egress": "deny"}), policy("blog/db", ingress=[rule("deny", "tcp", 5432)])],
     ["egress policy", "ingress policy"]),
    (WEB_DB, [no_app(0, 1)], ["listening"]),
    (("blog", "web", "db", "--port", "9999"), [nothing], ["listening"]),
    (("blog", "web", "db", "--protocol", "icmp"), [policy("blog/db", ingress=[rule("deny", "icmp")])], ["ingress policy"]),
    (("blog", "web", "10.20.7.2", "--port", "80"), [nothing], ["address", "listening"]),
    (WEB_API, [peers()], ["route table"]),
    (WEB_API, [peers("10.20.2.0/24", "10.30.1.0/24")], ["peering"]),
    (WEB_API, [peers("10.20.1.0/24", "10.30.2.0/24")], ["route table"]),
    (WEB_API, [peers("10.20.1.128/25", "10.30.1.128/25")], ["route table"]),
    (WEB_API, [peers(), policy("shop/api", ingress=[rule("allow", "tcp", 80)]), no_app(1, 0)],
     ["route table", "ingress policy", "listening"]),
    (("blog", "web", "shop/api", "--port", "53", "--protocol", "udp"),
     [policy("shop/api", ingress=[rule("deny", "udp", "1-100")])], ["ingress policy"]),
    (OUT, [nat(None)], ["route table"]),
    (OUT, [nat({"interface": "eth0", "subnets": ["web"]})], ["route table"]),
    (OUT, [nat(None), policy("blog/db", egress=[rule("deny", "tcp", 80)])], ["egress policy", "route table"]),
)


class DisturbedTest(SandboxTest):
    """Random worlds in which somebody has been: programs by hand, died, on 127.0.0.1 only, rules and routes of others,
    bridges and ports that are off. What is said without a `?` is what the packets do."""

    def setUp(self):
        super().setUp()
        self.undo = []

    def tearDown(self):
        self.put_back()
        super().tearDown()

    def put_back(self):
        while self.undo:
            run(self.undo.pop())

    def plant(self, do, undo):
        """Run a command; what takes it back is run when the world ends."""
        if run(do).code == 0:
            self.undo.append(undo)

    def some_rule(self, dice, world):
        """Put in a rule of somebody else's, of the kinds that are understood or not."""
        vpc = dice.choice(sorted(world.values(), key=lambda vpc: vpc["name"]))
        space = dice.choice([subnet["ns"] for subnet in vpc["subnets"]] * 2 + [None])
        chains = [("filter", "INPUT"), ("filter", "OUTPUT"), ("raw", "PREROUTING"), ("raw", "OUTPUT"), ("mangle", "INPUT")]
        if not space:
            chains = [("filter", "FORWARD"), ("filter", vpc["chain"]), ("filter", vpc["chain_in"]), ("raw", "PREROUTING"),
                      ("mangle", "FORWARD"), ("nat", "PREROUTING")]
        table, chain = dice.choice(chains + [("nat", "PREROUTING")])
        words = dice.choice(([], ["-s", vpc["cidr"]], ["-d", dice.choice(vpc["subnets"])["host_ip"]],
                             ["!", "-s", dice.choice(vpc["subnets"])["cidr"]]))
        words = words + dice.choice((["-p", "tcp"], ["-p", "tcp", "--dport", "8080"], ["-p", "udp", "--dport", "53"],
                                     ["-p", "icmp"], ["-p", "tcp", "--dport", "1:100"], ["-p", "tcp", "--sport", "8080"],
                                     ["-p", "udp", "-m", "length", "--length", "0:1000"]))
        targets = [["DROP"], ["DROP"], ["ACCEPT"]]
        if table == "filter":
            targets += [["REJECT"], ["REJECT", "--reject-with", "icmp-admin-prohibited"]]
        if table == "nat":
            targets = [["REDIRECT", "--to-ports", "8080"]] if "tcp" in words or "udp" in words else [["ACCEPT"]]
        words += ["-j"] + dice.choice(targets)
        tool = (["ip", "netns", "exec", space] if space else []) + ["iptables", "-t", table]
        self.plant(tool + ["-I", chain] + words, tool + ["-D", chain] + words)

    def some_route(self, dice, world):
        """Put in a route or a routing rule of somebody else's."""
        vpc = dice.choice(sorted(world.values(), key=lambda vpc: vpc["name"]))
        near, far = dice.choice(vpc["subnets"]), dice.choice(dice.choice(list(world.values()))["subnets"])
        kind = dice.choice(("blackhole", "prohibit", "unreachable"))
        words = dice.choice((
            ["route", "add", kind, far["host_ip"], "table", str(vpc["table"])],
            ["-n", near["ns"], "route", "add", kind, far["cidr"]],
            ["route", "add", kind, INTERNET],
            ["rule", "add", "pref", "50", "iif", vpc["bridge"], "to", far["cidr"], kind],
            ["rule", "add", "pref", "60", "from", near["cidr"], "ipproto", "tcp", "dport", "8080", kind]))
        self.plant(["ip"] + words, ["ip"] + ["del" if word == "add" else word for word in words])

    def some_switch(self, dice, world):
        """Switch something off."""
        vpc = dice.choice(sorted(world.values(), key=lambda vpc: vpc["name"]))
        subnet = dice.choice(vpc["subnets"])
        words = dice.choice(([vpc["bridge"]], [subnet["veth"] + "-b"], ["-n", subnet["ns"], subnet["veth"] + "-a"]))
        space, device = words[:-1], words[-1]
        self.plant(["ip"] + space + ["link", "set", device, "down"], ["ip"] + space + ["link", "set", device, "up"])

    def check(self, seed, count):
        dice = random.Random(seed)
        path = self.file("topology.json", some_topology(seed))
        cli("apply", path, "--prune", "--quiet")
        world = world_now()
        with contextlib.ExitStack() as stack:
            for vpc in world.values():
                for subnet in vpc["subnets"]:
                    for kind, port in (("tcp", 9000), ("tcp", 80), ("udp", 5000)):
                        ear = dice.choice(("0.0.0.0", "127.0.0.1", subnet["host_ip"], None))
                        if ear:
                            stack.enter_context(listener(subnet["ns"], port, ear, kind))
            for app in [app for vpc in world.values() for app in vpc["apps"] if dice.random() < 0.3]:
                os.kill(app["pid"], 9)
                wait_until(lambda: not vpcctl.is_alive(app), LONG, "the app is dead")
            for _ in range(dice.randint(0, 5)):
                self.some_rule(dice, world)
            for _ in range(dice.randint(0, 2)):
                self.some_route(dice, world)
            if dice.random() < 0.3:
                self.some_switch(dice, world)
            sight, questions = vpcctl.Sight(world), some_questions(dice, world, count)
            answers = probe_all(world, questions)
            odd = [number for number, question in enumerate(questions)
                   if disagreement(world, question, answers[number], sight)]
            again = [questions[number] for number in odd]
            found = [disagreement(world, question, answer, sight)
                     for question, answer in zip(again, probe_all(world, again, LONG))]
            self.assertEqual([text for text in found if text], [], "seed %d, planted: %s" % (
                seed, "\n".join(" ".join(words) for words in self.undo)))
            known = [None not in [hop.ok for hop in vpcctl.explain_path(world, *question, sight=sight)]
                     for question in questions]
        self.put_back()
        return answers.count("open"), sum(known)

    def test_no_disagreement_without_a_question_mark(self):
        opened, known = map(sum, zip(*(self.check(seed, 40) for seed in range(100, 107))))
        self.assertGreater(opened, 20)
        self.assertGreater(known, 7 * 40 // 2)            # a `?` is for what cannot be known, not for everything


class FaultsTest(SandboxTest):

    def probe(self, words, patience=PATIENCE):
        options = dict(zip(words[3::2], words[4::2]))
        world, protocol = world_now(), options.get("--protocol", "tcp")
        port = int(options["--port"]) if "--port" in options else None
        address = vpcctl.resolve_target(world, *words[:3])
        space = vpcctl.find_subnet(world, *words[:2])[1]["ns"]
        return vpcctl.in_namespace(space, lambda: vpcctl.probe([(address, port, protocol)], patience)[0].kind)

    def hops(self, words):
        """Walk the hops in process: 30 faults are a lot of processes otherwise."""
        options = dict(zip(words[3::2], words[4::2]))
        port = int(options["--port"]) if "--port" in options else None
        return vpcctl.explain_path(world_now(), *(words[:3] + (port, options.get("--protocol", "tcp"))))

    def remedy(self, words, where):
        """The first hop that blocks must be this one; returns the command that is suggested."""
        hops = self.hops(words)
        lines = vpcctl.render_explain(hops)
        self.assertEqual((hops[-1].ok, hops[-1].where), (False, where), "\n".join(lines))
        self.assertTrue(lines[-1].startswith("to allow it: vpcctl "), "\n".join(lines))
        return lines[-1][len("to allow it: "):]

    def test_each_is_named_and_its_remedy_works(self):
        with tempfile.TemporaryDirectory() as folder:
            for words, plants, hops in FAULTS:
                with self.subTest("%s %s" % (" ".join(words), hops)):
                    topology = two_vpcs()
                    for plant in plants:
                        plant(topology)
                    cli("apply", self.file("faulty.json", topology), "--prune")
                    for hop in hops:
                        self.assertNotEqual(self.probe(words), "open")
                        done = run(["sh", "-c", self.remedy(words, hop)], cwd=folder)
                        self.assertEqual(done.code, 0, done)
                    self.assertNotIn(False, [hop.ok for hop in self.hops(words)])
                    self.assertEqual(self.probe(words, LONG), "open")

    def test_without_a_fault(self):
        cli("apply", self.file("sound.json", two_vpcs()))
        for words in (WEB_DB, WEB_API, OUT, ("shop", "api", "blog/web", "--port", "80"),
                      ("blog", "web", "api.shop", "--protocol", "icmp"),
                      ("blog", "web", "10.20.1.1", "--protocol", "icmp")):
            answer = cli("explain", *words, "--probe")
            self.assertIn("probe: open", answer.out)
            self.assertNotIn("disagree", answer.out)

    def test_what_no_command_allows(self):
        cli("apply", self.file("sound.json", two_vpcs()))
        for words, hop, said in (
                (("blog", "web", "10.20.1.1", "--port", "80"), "host", "--protocol icmp"),
                (("blog", "web", "10.30.1.1", "--protocol", "icmp"), "host", "by design"),
                (("blog", "web", "10.20.2.77", "--port", "80"), "address", "answers at 10.20.2.2"),
                (("blog", "web", "224.0.0.5", "--protocol", "icmp"), "route table", "by design")):
            with self.subTest(words):
                answer = cli("explain", *words, "--probe", code=1)
                self.assertIn("\n\u2717 %s " % hop, answer.out)
                self.assertIn(said, answer.out)
                self.assertNotIn("disagree", answer.out)

    def test_probe_sees_what_nobody_else_does(self):
        cli("apply", self.file("sound.json", two_vpcs()))
        cli("explain", *WEB_DB, "--probe")
        # a condition that is not understood makes a `?`; the packet knows
        run(["ip", "netns", "exec", "ns-blog-db", "iptables", "-I", "INPUT", "-p", "tcp", "-m", "length", "--length",
             "0:2000", "-j", "DROP"])
        answer = cli("explain", *WEB_DB, "--probe", code=1)
        self.assertIn("\n? foreign rule   `-p tcp -m length --length 0:2000 -j DROP` in INPUT of ns-blog-db may stop it\n",
                      answer.out)
        self.assertIn("yes, as far as can be told: ", answer.out)
        self.assertIn("probe: no answer", answer.out)
        self.assertIn("\n\u2717 no: last seen in at blog/db's card v-blog-db-a\n", answer.out)
        self.assertIn("table filter, chain INPUT: -p tcp -m length --length 0:2000 -j DROP", answer.out.splitlines()[-1])
        self.assertIsNone(json.loads(cli("explain", *WEB_DB, "--json").out)["passes"])
        data = json.loads(cli("explain", *WEB_DB, "--probe", "--json", code=1).out)
        self.assertEqual((data["probe"], data["trace"]["answered"], data["trace"]["seen"][-1]["interface"]),
                         ("no answer", False, "v-blog-db-a"))
        self.assertIn("vpcctl explain blog web 10.20.2.2 --port 5432 --trace",
                      cli("test-connectivity", "blog", "web", "db", "--port", 5432, code=1).out)

    def test_test_connectivity_names_the_hop(self):
        topology = two_vpcs()
        policy("blog/db", ingress=[rule("allow", "tcp", 80)])(topology)
        cli("apply", self.file("faulty.json", topology))
        told = cli("test-connectivity", "blog", "web", "db", "--port", 5432, code=1)
        self.assertIn("ingress policy", told.out)
        with tempfile.TemporaryDirectory() as folder:
            command = [line for line in told.out.splitlines() if "to allow it: " in line][0].split("to allow it: ")[1]
            self.assertEqual(run(["sh", "-c", command], cwd=folder).code, 0)
        self.assertIn("open", cli("test-connectivity", "blog", "web", "db", "--port", 5432).out)

    def test_refusals(self):
        cli("apply", self.file("sound.json", two_vpcs()))
        for words, said in ((("blog", "wbe", "db"), "did you mean 'web'"), (("blgo", "web", "db"), "did you mean 'blog'"),
                            (("blog", "web", "dbb"), "did you mean 'db'"), (("blog", "web", "shop/apii"), "did you mean 'api'"),
                            (("blog", "web", "till.shop"), "knows no name"), (("blog", "web", "10.20.1.300"), "is not an IPv4 address"),
                            (("blog", "web", "10.20.1.02"), "leading zeros"), (("blog", "web", "db", "--protocol", "all", "--port", 80), "no port"),
                            (("blog", "web", "db", "--protocol", "all", "--probe"), "a probe speaks tcp"),
                            (("blog", "web", "db", "--protocol", "all", "--trace"), "a probe speaks tcp"),
                            (("blog", "web", "db", "--protocol", "udp"), "--port"),
                            (("blog", "web", "db", "--port", "0"), "not a port"),
                            (("blog", "web", "db", "--protocol", "sctp"), "sctp"),
                            (("blog", "web", "nowhere/db"), "nowhere")):
            with self.subTest(words):
                answer = cli("explain", *words, code=2)
                self.assertIn(said, answer.err)
                self.assertEqual(answer.out, "")
        answer = cli("explain", *(WEB_DB + ("--policy",)), code=1)
        self.assertIn("no policy is in the way", answer.err)
        self.assertEqual(answer.out, "")


HAND = """import socket as k, sys, time
open('/proc/self/comm', 'wb').write(b'my\\xff\\x1bserver')
s = k.socket(); s.setsockopt(1, 2, 1); s.bind((sys.argv[1], 7000)); s.listen(9); u = k.socket(2, 2); u.bind((sys.argv[1], 7000))
while 1: u.sendto(*u.recvfrom(99))
"""
NS_DB, NS_WEB = ("ip", "netns", "exec", "ns-blog-db"), ("ip", "netns", "exec", "ns-blog-web")
# What somebody else may put in the way of blog/web -> blog/db tcp/5432: (command, where, what test-connectivity says).
PLANTS = tuple((tool + ("iptables", "-t", table, "-I", chain) + rule + ("-j",) + target, "foreign rule", answer)
               for tool, table, chain, rule, target, answer in (
    (NS_DB, "filter", "INPUT", ("-p", "tcp"), ("DROP",), "no answer"),
    (NS_DB, "filter", "INPUT", ("-p", "tcp", "--dport", "5432"), ("REJECT",), "rejected"),
    (NS_DB, "filter", "INPUT", ("-p", "tcp"), ("REJECT", "--reject-with", "tcp-reset"), "rejected"),
    (NS_DB, "filter", "INPUT", ("-s", "10.20.1.0/24"), ("REJECT", "--reject-with", "icmp-host-prohibited"), "rejected"),
    (NS_DB, "raw", "PREROUTING", ("-i", "v-blog-db-a"), ("DROP",), "no answer"),
    (NS_DB, "mangle", "INPUT", ("!", "-s", "10.20.2.0/24"), ("DROP",), "no answer"),
    (NS_DB, "filter", "OUTPUT", ("-p", "tcp", "--sport", "5432"), ("DROP",), "no answer"),
    (NS_WEB, "filter", "OUTPUT", ("-d", "10.20.2.2"), ("DROP",), "no answer"),
    (NS_WEB, "filter", "OUTPUT", ("-p", "tcp"), ("REJECT",), "rejected"),
    (NS_WEB, "filter", "INPUT", ("-s", "10.20.2.2"), ("DROP",), "no answer"),
    ((), "filter", "FORWARD", ("-p", "tcp", "--dport", "5432"), ("DROP",), "no answer"),
    ((), "filter", "FORWARD", ("-p", "tcp"), ("REJECT",), "rejected"),
    ((), "filter", "FORWARD", ("-i", "br-blog"), ("REJECT", "--reject-with", "icmp-admin-prohibited"), "rejected"),
    ((), "filter", "vpc-blog", ("-s", "10.20.1.2", "-d", "10.20.2.2"), ("DROP",), "no answer"),
    ((), "raw", "PREROUTING", ("-s", "10.20.1.2"), ("DROP",), "no answer"),
    ((), "mangle", "FORWARD", ("-d", "10.20.1.2"), ("DROP",), "no answer"))) + tuple(
    (("ip",) + tuple(words.split()), "foreign route", answer) for words, answer in (
        ("route add blackhole 10.20.2.2 table 7001", "no answer"), ("route add prohibit 10.20.2.0/25 table 7001", "rejected"),
        ("route add unreachable 10.20.2.2 table 7001", "no route"), ("rule add pref 40 iif br-blog prohibit", "rejected"),
        ("rule add pref 41 to 10.20.2.2 ipproto tcp dport 5432 blackhole", "no answer"),
        ("-n ns-blog-web route add blackhole 10.20.2.2", "no route"), ("-n ns-blog-web route add prohibit 10.20.2.0/24", "rejected"),
        ("-n ns-blog-db route add unreachable 10.20.1.2", "no route")))
UNTIL_READY = 3 * LONG


class SeenCase(SandboxTest):
    """What records do not tell: each is seen, said, and as the packet has it; what is suggested helps."""

    def setUp(self):
        super().setUp()
        cli("apply", self.file("sound.json", two_vpcs()), "--quiet")

    def ask(self, words, patience=SHORT, sight=None):
        """In process: (the hops, what test-connectivity says); as processes it takes minutes."""
        options = dict(zip(words[3::2], words[4::2]))
        protocol = options.get("--protocol", "tcp" if "--port" in options else "icmp")
        port = int(options["--port"]) if "--port" in options else None
        world = world_now()
        flow = vpcctl.path_flow(world, *words[:3], port=port, protocol=protocol)
        hops = list(vpcctl.explained(flow, sight or vpcctl.Sight(world)))
        question = [(flow.address, flow.port, flow.protocol)]
        reply = vpcctl.in_namespace(flow.source["ns"], lambda: vpcctl.probe(question, patience)[0])
        return hops, vpcctl.verdict(flow, reply, hops)

    def says(self, words, where, text="", answer=None):
        """explain stops at this hop, and test-connectivity says the same; returns the remedy."""
        hops, told = self.ask(words)
        self.assertEqual((hops[-1].ok, hops[-1].where), (False, where), hops)
        self.assertIn(text, hops[-1].text)
        self.assertEqual(told, answer or told, hops)
        self.assertNotEqual(told, "open", hops)
        return hops[-1].remedy

    def passes(self, words):
        """explain says yes, and the packet is answered; returns the hops."""
        hops, told = self.ask(words, LONG)
        self.assertEqual((told, [hop for hop in hops if not hop.ok]), ("open", []))
        return hops


class SeenTest(SeenCase):
    """Programs, what is off, the host itself."""

    @contextlib.contextmanager
    def by_hand(self, address):
        """A program that somebody starts in blog/db, on tcp and udp port 7000, with bytes for a name."""
        import subprocess
        path = self.file("hand.py", HAND)
        child = subprocess.Popen([sys.executable, VPCCTL, "exec", "blog", "db", "--", sys.executable, path, address])
        try:
            wait_until(lambda: 7000 in vpcctl.in_namespace("ns-blog-db", vpcctl.listening), UNTIL_READY, "it listens")
            yield
        finally:
            child.kill()
            child.wait()

    def test_a_server_started_by_hand(self):
        for protocol in ("tcp", "udp"):
            words = ("blog", "web", "db", "--port", 7000, "--protocol", protocol)
            self.says(words, "listening", "nothing listens", "refused")
            with self.by_hand("0.0.0.0"):
                hop = [hop for hop in self.passes(words) if hop.where == "listening"][0]
                self.assertRegex(hop.text, "^%s/7000 on blog/db: my.*server listens$" % protocol)
                self.assertNotIn("\x1b", cli("explain", *words).out)
            with self.by_hand("127.0.0.1"):
                remedy = self.says(words, "listening", "listens on 127.0.0.1 only: no other subnet reaches it", "refused")
                self.assertNotIn("deploy-app", remedy)
                self.passes(("blog", "db", "127.0.0.1") + words[3:])
                self.says(("blog", "db", "db") + words[3:], "listening", "127.0.0.1 only")
            with self.by_hand("10.20.2.2"):
                self.passes(words)

    def test_a_port_that_is_taken_is_not_offered(self):
        with listener("ns-blog-db", 7001, kind="udp"):
            remedy = self.says(("blog", "web", "db", "--port", 7001), "listening", "only by udp", "refused")
            self.assertIsNone(remedy)

    def test_an_app_that_died(self):
        os.kill(world_now()["blog"]["apps"][1]["pid"], 9)
        remedy = self.says(WEB_DB, "listening", "deploy-app's program is not running", "refused")
        self.assertEqual(run(["sh", "-c", remedy]).code, 0)
        self.passes(WEB_DB)

    def test_what_is_off_or_gone(self):
        for command, text in (
                ("ip link set br-blog down", "interface br-blog is off"), ("ip link del br-blog", "there is no interface br-blog"),
                ("ip link set v-blog-db-b down", "interface v-blog-db-b is off"),
                ("ip link set v-blog-web-b nomaster", "cable v-blog-web-b is not plugged"),
                ("ip -n ns-blog-web link set v-blog-web-a down", "interface v-blog-web-a is off in ns-blog-web"),
                ("ip -n ns-blog-db addr flush dev v-blog-db-a", "there is no address v-blog-db-a 10.20.2.2/24 in ns-blog-db"),
                ("ip -n ns-blog-db route del default", "there is no route default 10.20.2.1 in ns-blog-db")):
            with self.subTest(command):
                self.assertEqual(run(command.split()).code, 0)
                remedy = self.says(WEB_DB, "machine", text, "no answer")
                self.assertEqual(remedy, "vpcctl restore blog")
                self.assertEqual(run(["sh", "-c", remedy]).code, 0)
                wait_until(lambda: tcp_open("ns-blog-web", "10.20.2.2", 5432) == "open", LONG, "it is whole again")
                self.passes(WEB_DB)

    def test_what_is_seen_without_root(self):
        if not vpcctl.app_users():
            self.skipTest("there is no other user in this sandbox")
        folder = tempfile.mkdtemp(prefix="vpcctl-")
        self.addCleanup(run, ["rm", "-r", folder])
        script = shutil.copy(VPCCTL, folder)              # the checkout may lie where others cannot look
        other = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", vpcctl.app_python(), script, "explain"]
        other += [str(word) for word in WEB_DB] + ["--json"]
        for name in os.listdir(os.environ["VPCCTL_DATA"]):
            if name.endswith(".json"):
                with open(os.path.join(os.environ["VPCCTL_DATA"], name)) as handle:
                    self.copy(os.path.join(folder, name), handle.read())
        os.chmod(folder, 0o755)

        def asked():
            return json.loads(run(other, env={"VPCCTL_DATA": folder}).out)
        told = asked()
        self.assertIsNone(told["passes"])                 # rules of others it does not see
        self.assertEqual([hop["ok"] for hop in told["hops"] if hop["where"] == "listening"], [True], told)
        os.kill(world_now()["blog"]["apps"][1]["pid"], 9)
        self.assertIsNone(wait_until(lambda: [hop for hop in asked()["hops"] if hop["where"] == "listening" and hop["ok"] is not True],
                                     LONG, "the end of the app is seen")[0]["ok"])
        run(["ip", "link", "set", "br-blog", "down"])
        told = asked()
        self.assertEqual((told["passes"], told["hops"][-1]["where"]), (False, "machine"))
        self.assertIn("br-blog is off", told["hops"][-1]["text"])

    @staticmethod
    def copy(path, content):
        with open(path, "w") as handle:
            handle.write(content)
        os.chmod(path, 0o644)

    def test_the_hosts_own_addresses(self):
        with listener(None, 7000), listener(None, 7000, kind="udp"):
            self.assertEqual(tcp_open(None, "192.0.2.2", 7000, LONG), "open")
            self.assertTrue(udp_answers(None, "192.0.2.2", 7000, LONG))
            self.assertTrue(ping(None, "192.0.2.2", LONG))
            for subnet, nat in (("blog web", True), ("shop api", False)):
                for options in (("--port", 7000), ("--port", 7000, "--protocol", "udp"), ("--protocol", "icmp")):
                    with self.subTest("%s, NAT %s: %s" % (subnet, nat, options)):
                        words = tuple(subnet.split()) + ("192.0.2.2",) + options
                        remedy = self.says(words, "host", "192.0.2.2 is this host itself (eth0)", "no answer")
                        self.assertNotIn("enable-nat", remedy)
                        self.assertEqual(run(["sh", "-c", remedy.split("instead: ")[1] + " --probe"]).code, 0)


class OthersTest(SeenCase):
    """Rules and routes of others, and the answers."""

    def test_what_others_put_in_the_way(self):
        self.passes(WEB_DB)
        for command, where, answer in PLANTS:
            with self.subTest(" ".join(command)):
                self.assertEqual(run(list(command)).code, 0)
                remedy = self.says(WEB_DB, where, "", answer)
                self.assertEqual(run(["sh", "-c", remedy]).code, 0, remedy)
                self.passes(WEB_DB)

    def test_a_policy_of_a_chain_is_somebody_elses(self):
        run(list(NS_DB) + ["iptables", "-P", "INPUT", "DROP"])
        remedy = self.says(WEB_DB, "foreign rule", "-P INPUT DROP", "no answer")
        self.assertEqual(run(["sh", "-c", remedy]).code, 0)
        self.passes(WEB_DB)

    def test_a_table_of_nft_that_iptables_does_not_show(self):
        if not vpcctl.find_tool("nft"):
            self.skipTest("there is no nft here")
        self.addCleanup(run, ["nft", "delete", "table", "inet", "theirs"])
        self.passes(WEB_DB)
        for words in ("table inet theirs", "chain inet theirs c { type filter hook forward priority -9 ; policy drop ; }"):
            done = run(["nft", "add " + words])
            self.assertEqual(done.code, 0, done)
        hops, told = self.ask(WEB_DB)
        self.assertEqual((told, [hop.ok for hop in hops if "nft table inet theirs of the host" in hop.text]), ("no answer", [None]))
        run(["nft", "delete", "table", "inet", "theirs"])

    def test_a_redirect_is_followed_by_nobody(self):
        run(list(NS_DB) + ["iptables", "-t", "nat", "-I", "PREROUTING", "-p", "tcp", "--dport", "81", "-j", "REDIRECT",
                           "--to-ports", "5432"])
        told = json.loads(cli("explain", "blog", "web", "db", "--port", 81, "--json", "--probe").out)
        self.assertEqual((told["passes"], told["hops"][-1]["where"], told["probe"]), (None, "elsewhere", "open"))
        self.says(("blog", "web", "db", "--port", 82), "listening", "nothing listens", "refused")

    def test_a_rule_that_lets_in_what_the_policy_denies(self):
        cli("apply-policy", "blog", self.file("deny.json", {"subnet": "db", "ingress": [rule("deny", "tcp", 5432)]}))
        self.says(WEB_DB, "ingress policy", "ingress rule 1, deny tcp/5432", "no answer")
        run(list(NS_DB) + ["iptables", "-I", "INPUT", "-p", "tcp", "-j", "ACCEPT"])
        self.says(WEB_DB, "ingress policy", "ingress rule 1", "no answer")      # a policy stops the replies, too
        run(list(NS_DB) + ["iptables", "-I", "OUTPUT", "-p", "tcp", "-j", "ACCEPT"])
        hops, told = self.ask(WEB_DB, LONG)
        self.assertEqual((told, [hop.where for hop in hops if not hop.ok]), ("open", ["ingress policy"]))

    def test_one_cause_has_one_answer(self):
        """The kernel sends only so many ICMP errors; what is said does not depend on it."""
        for words, plant, answer in (
                (("shop", "api", INTERNET, "--port", 80), None, "no route"), (("shop", "api", INTERNET), None, "no route"),
                (("shop", "api", INTERNET, "--port", 53, "--protocol", "udp"), None, "no route"),
                (WEB_DB, ["iptables", "-I", "FORWARD", "-p", "tcp", "-j", "REJECT"], "rejected"),
                (WEB_DB, ["ip", "route", "add", "prohibit", "10.20.2.2", "table", "7001"], "rejected"),
                (("blog", "web", "10.20.7.7", "--port", 80), None, "no answer")):
            if plant:
                run(plant)
            sight = vpcctl.Sight(world_now())
            told = {self.ask(words, 0.2, sight)[1] for _ in range(9)}     # of six errors at once, one each second is left
            self.assertEqual(told, {answer}, words)
            if plant:
                run(["-D" if word == "-I" else "del" if word == "add" else word for word in plant])

    def test_expect(self):
        cli("apply-policy", "blog", self.file("deny.json", {"subnet": "db", "ingress": [rule("deny", "tcp", 22)]}))
        for words, answer in ((("db", "--port", 5432), "open"), (("shop/api", "--port", 53, "--protocol", "udp"), "open"),
                              (("db", "--port", 9, "--protocol", "udp"), "refused"),
                              (("db", "--port", 22), "blocked"), (("shop/nobody",), None), (("dbb",), None),
                              (("db", "--port", 9, "--protocol", "icmp"), None), (("db", "--protocol", "udp"), None)):
            for expected in {answer or "blocked", "open", "refused" if answer == "blocked" else "blocked"}:
                code = 2 if answer is None else 0 if answer == expected else 1
                cli("test-connectivity", "blog", "web", *words, "--expect", expected, code=code)
        cli("test-connectivity", "blog", "web", "db", "--expect", "closed", code=2)
        run(["ip", "netns", "del", "ns-blog-web"])
        cli("test-connectivity", "blog", "web", "db", "--expect", "blocked", code=3)      # nothing was tried

    def test_json_and_line(self):
        self.assertEqual(cli("test-connectivity", "blog", "web", "db", "--port", 5432).out,
                         "\u2713 blog/web -> blog/db (10.20.2.2) tcp/5432: open\n")
        self.assertEqual(json.loads(cli("test-connectivity", "blog", "web", "shop/api", "--json").out), {
            "from": "blog/web", "to": "shop/api", "address": "10.30.1.2", "protocol": "icmp", "port": None, "answer": "open",
            "expected": "open", "ok": True, "why": None})
        told = json.loads(cli("explain", *WEB_DB, "--json").out)
        self.assertEqual(list(told), ["from", "to", "protocol", "port", "passes", "hops", "probe", "trace"])
        self.assertEqual({key for hop in told["hops"] for key in hop}, {"ok", "where", "text", "remedy"})


if __name__ == "__main__":
    unittest.main()
