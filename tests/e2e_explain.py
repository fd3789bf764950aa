"""explain against packets: random topologies, planted faults, and the remedies, run as they are printed."""

import os
import random
import sys
import tempfile
import threading
import unittest

from support import INTERNET, LONG, VPCCTL, SandboxTest, run, vpcctl as cli

sys.path.insert(0, os.path.dirname(VPCCTL))
import vpcctl  # noqa: E402

ECHO = ("import socket as k; s = k.socket(2, 2); s.bind(('', %d))\n"
        "while 1: s.sendto(*s.recvfrom(2048))")
PORTS = {"tcp": (22, 80, 8080, 9000), "udp": (53, 5000), "icmp": (None,)}
PATIENCE = 0.5
# What a packet comes to where explain says that it stops: nothing else may happen to it.
ENDS = {"egress policy": ("silence",), "ingress policy": ("silence",), "peering": ("silence",),
        "listening": ("refused",), "route table": ("no way", "silence"), "host": ("silence",),
        "address": ("no way", "silence", "refused"), "packet": ("no way", "silence", "refused")}


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
            answers[number] = vpcctl.probe(target, port, protocol, patience)
    threads = [threading.Thread(target=work, args=pair) for pair in by_space.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def disagreement(world, question, answer, truth):
    """Return what explain says and the packet does not do, or ''."""
    hops = vpcctl.explain_path(world, *question, listening=truth)
    stop = next((hop for hop in hops if hop.ok is False), None)
    story = "%s: %s\n  %s" % (question, answer, "\n  ".join(vpcctl.render_explain(hops)))
    if stop:
        return "" if answer in ENDS[stop.where] else story
    if any(hop.ok is None for hop in hops):       # outside: what is there is in no record, but here it is known
        known = question[2] == INTERNET and question[3:] in ((80, "tcp"), (None, "icmp"))
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

        def truth(vpc, subnet, port, protocol):
            known = (vpc["name"], subnet["name"], port, protocol) in ears
            self.assertIn(vpcctl.app_recorded(vpc, subnet, port, protocol), (known, None))
            return known
        questions = some_questions(random.Random(seed), world, count)
        answers = probe_all(world, questions)
        odd = [number for number, question in enumerate(questions)
               if disagreement(world, question, answers[number], truth)]
        again = [questions[number] for number in odd]    # a busy machine may have been too slow: once more, with patience
        found = [disagreement(world, question, answer, truth)
                 for question, answer in zip(again, probe_all(world, again, LONG))]
        self.assertEqual([text for text in found if text], [], "seed %d" % seed)
        return len(questions), answers.count("open"), answers.count("refused")

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


class FaultsTest(SandboxTest):

    def probe(self, words, patience=PATIENCE):
        options = dict(zip(words[3::2], words[4::2]))
        world, protocol = world_now(), options.get("--protocol", "tcp")
        port = int(options["--port"]) if "--port" in options else None
        address = vpcctl.resolve_target(world, *words[:3])
        space = vpcctl.find_subnet(world, *words[:2])[1]["ns"]
        return vpcctl.in_namespace(space, lambda: vpcctl.probe(address, port, protocol, patience))

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

    def test_probe_sees_what_the_records_do_not(self):
        cli("apply", self.file("sound.json", two_vpcs()))
        answer = cli("explain", *WEB_DB, "--probe")
        os.kill(world_now()["blog"]["apps"][1]["pid"], 9)
        answer = cli("explain", *WEB_DB, "--probe", code=1)
        self.assertIn("yes: ", answer.out)
        self.assertIn("probe: refused", answer.out)
        self.assertIn("turned back (RST), last seen in at blog/db's card", answer.out.splitlines()[-2])
        self.assertIn("nothing listens on tcp/5432 there: `vpcctl restore` starts", answer.out.splitlines()[-1])
        self.assertIn("app on port 5432", cli("verify", code=1).out)
        cli("restore")
        cli("explain", *WEB_DB, "--probe")

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


if __name__ == "__main__":
    unittest.main()
