"""Topology files, read strictly: a mistake is named with its place, and nothing happens. No root."""

import copy
import json
import os
import unittest

import cli_commands
from support import HERE

DATA = os.path.join(HERE, "data")
FILES = ("everything.json", "scenario-1-webapp.json", "scenario-2-microservices.json", "scenario-3-peering.json")


def sound():
    """Return a topology in which nothing is wrong."""
    return {"vpcs": [
        {"name": "blog", "cidr": "10.20.0.0/16", "subnets": [
            {"name": "web", "cidr": "10.20.1.0/24", "apps": [{"port": 80}], "policy": {"ingress": [], "egress": []}},
            {"name": "db", "cidr": "10.20.2.0/24"}], "nat": {"interface": "eth0", "subnets": ["web"]}},
        {"name": "shop", "cidr": "10.30.0.0/16"}],
        "peers": [{"vpcs": ["blog", "shop"], "allow": ["10.20.1.0/24", "10.30.0.0/16"]}]}


def at(topology, path):
    """Return (what holds the last key of a path such as vpcs.0.name, that key)."""
    keys = [int(key) if key.isdigit() else key for key in path.split(".")]
    for key in keys[:-1]:
        topology = topology[key]
    return topology, keys[-1]


RULE = {"port": 80, "protocol": "tcp", "action": "allow"}
# (where, what is written there, the place that is named, what else is said); None: the key is taken away
MISTAKES = (
    ("vpcs", None, "", "'vpcs' is missing"),
    ("vpcs", {}, "vpcs", "not a list"),
    ("vpcs.0", "blog", "vpcs[0]", "not an object"),
    ("vpc", [], "", "did you mean 'vpcs'"),
    ("vpcs.0.name", None, "vpcs[0]", "'name' is missing"),
    ("vpcs.0.name", "-x", "vpcs[0].name", "not a name"),
    ("vpcs.0.name", 7, "vpcs[0].name", "text in quotes"),
    ("vpcs.0.cidr", None, "vpcs[0]", "'cidr' is missing"),
    ("vpcs.0.cidr", "10.20.0.1/16", "vpcs[0].cidr", "10.20.0.0/16"),
    ("vpcs.0.cidr", "10.20.0.0", "vpcs[0].cidr", "not an IPv4 block"),
    ("vpcs.0.cidr", "127.0.0.0/8", "VPC blog", "loopback"),
    ("vpcs.0.cidr", "10.20.0.0/30", "VPC blog", "/8 to /29"),
    ("vpcs.0.subnet", [], "vpcs[0]", "did you mean 'subnets'"),
    ("vpcs.0.subnets", {}, "vpcs[0].subnets", "not a list"),
    ("vpcs.0.subnets.1.name", "web", "vpcs[0]", "subnet web is given twice"),
    ("vpcs.0.subnets.1.cidr", "10.20.1.128/25", "VPC blog", "overlap"),
    ("vpcs.0.subnets.1.cidr", "10.21.2.0/24", "VPC blog: subnet db", "not inside"),
    ("vpcs.0.subnets.1.cidr", "10.20.2.0/31", "VPC blog: subnet db", "too small"),
    ("vpcs.0.subnets.1.gw", "10.20.9.1", "VPC blog: subnet db", "gateway 10.20.9.1"),
    ("vpcs.0.subnets.1.gw", "10.20.2.300", "vpcs[0].subnets[1].gw", "not an IPv4 address"),
    ("vpcs.0.subnets.1.gateway", "10.20.2.1", "vpcs[0].subnets[1]", "unknown key 'gateway'"),
    ("vpcs.0.subnets.1.apps", [{"prot": 80}], "vpcs[0].subnets[1].apps[0]", "did you mean 'port'"),
    ("vpcs.0.subnets.1.apps", [{"port": "80"}], "vpcs[0].subnets[1].apps[0].port", "1 to 65535"),
    ("vpcs.0.subnets.1.apps", [{"port": 0}], ".apps[0].port", "1 to 65535"),
    ("vpcs.0.subnets.1.apps", [{"port": True}], ".apps[0].port", "1 to 65535"),
    ("vpcs.0.subnets.1.apps", [{"port": 80, "cmd": "python3 x.py"}], ".apps[0].cmd", "python3"),
    ("vpcs.0.subnets.1.apps", [{"port": 80, "cmd": []}], ".apps[0].cmd", "python3"),
    ("vpcs.0.subnets.1.apps", [{"port": 80, "env": ["A=1"]}], ".apps[0].env", '{"KEY": "VALUE"}'),
    ("vpcs.0.subnets.1.apps", [{"port": 80, "env": {"A": 1}}], ".apps[0].env", "value of A is no text"),
    ("vpcs.0.subnets.1.apps", [{"port": 80, "env": {"A=B": ""}}], ".apps[0].env", "no name for a variable"),
    ("vpcs.0.subnets.1.apps", [{"port": 80, "workdir": "srv"}], ".apps[0].workdir", "from the top"),
    ("vpcs.0.subnets.1.apps", [{"port": 80}, {"port": 80}], "subnet db", "port 80 is given twice"),
    ("vpcs.0.subnets.1.policy", [], "vpcs[0].subnets[1].policy", "a policy is an object"),
    ("vpcs.0.subnets.1.policy", {"ingres": []}, "vpcs[0].subnets[1].policy", "unknown key 'ingres'"),
    ("vpcs.0.subnets.1.policy", {"ingress": [RULE, dict(RULE, action="permit")]},
     "vpcs[0].subnets[1].policy: ingress rule 2", "permit"),
    ("vpcs.0.subnets.1.policy", {"egress": [dict(RULE, port="9000-8000")]}, "egress rule 1", "9000-8000"),
    ("vpcs.0.subnets.1.policy", {"ingress": [dict(RULE, **{"from": "wbe"})]}, "db", "did you mean 'web'"),
    ("vpcs.0.subnets.1.policy", {"default": {"ingress": "drop"}}, ".policy", "default"),
    ("vpcs.0.subnets.1.publish", [{"port": 80}], ".publish[0]", "'host_port' is missing"),
    ("vpcs.0.subnets.1.publish", [{"host_port": 80, "protocol": "icmp"}], ".publish[0].protocol", "tcp or udp"),
    ("vpcs.0.subnets.1.publish", [{"host_port": 80, "interface": "a b"}], ".publish[0].interface", "not an interface name"),
    ("vpcs.0.nat.subnets.0", "wbe", "vpcs[0].nat.subnets", "did you mean 'web'"),
    ("vpcs.0.nat.subnets", [], "vpcs[0].nat.subnets", "that means all"),
    ("vpcs.0.nat.interface", 5, "vpcs[0].nat.interface", "text in quotes"),
    ("vpcs.0.nat", "eth0", "vpcs[0].nat", "not an object"),
    ("vpcs.1.name", "blog", "", "VPC blog is given twice"),
    ("vpcs.1.cidr", "10.20.128.0/17", "VPC shop", "overlaps VPC blog"),
    ("peers", {}, "peers", "not a list"),
    ("peers.0.vpcs", ["blog"], "peers[0].vpcs", "two VPCs"),
    ("peers.0.vpcs", ["blog", "blog"], "blog", "with itself"),
    ("peers.0.vpcs", ["blog", "shpo"], "", "did you mean 'shop'"),
    ("peers.0.allow", None, "peers[0]", "'allow' is missing"),
    ("peers.0.allow", ["10.20.1.0/24"], "shop", "no block of VPC shop"),
    ("peers.0.allow", ["10.20.1.0/24", "10.99.0.0/16"], "10.99.0.0/16", "neither in"),
    ("peers.0.allow.0", "10.20.1.1/24", "peers[0].allow[0]", "10.20.1.0/24"),
    ("peers.0.allowed", [], "peers[0]", "did you mean 'allow'"),
)


class TopologyTest(cli_commands.CliTest):

    def file(self, name, content):
        path = os.path.join(self.top, name)
        with open(path, "w") as handle:
            handle.write(content if isinstance(content, str) else json.dumps(content))
        return path

    def test_mistakes(self):
        for where, value, place, said in MISTAKES:
            with self.subTest("%s = %s" % (where, value)):
                topology = copy.deepcopy(sound())
                holder, key = at(topology, where)
                if value is None:
                    del holder[key]
                else:
                    holder[key] = value
                path = self.file("odd.json", topology)
                answer = self.refused("plan", path, root=False, text="", hint=said)
                if place.startswith(("vpcs", "peers")):
                    place = "%s: %s" % (path, place)
                self.assertIn(place, answer.err)
                again = self.refused("--dry-run", "apply", path, root=False, text="", hint=said)
                self.assertEqual(again.err, answer.err)
        self.assertFalse(os.path.exists(self.data))

    def test_what_is_no_topology(self):
        for text, said in (("", "not JSON"), ("{", "line 1"), ("[]", "not an object"), ("5", "not an object"),
                           ('{"vpcs": [], "vpcs": []}', "given twice"), ('{"vpcs": [] ', "not JSON"), ("[" * 5000, "not JSON")):
            with self.subTest(text[:20]):
                self.refused("plan", self.file("odd.json", text), text=said, root=False)
        self.refused("plan", os.path.join(self.top, "none.json"), text="No such file", root=False)
        self.refused("plan", self.top, text="Is a directory", root=False)
        self.refused("plan", text="FILE", root=False)
        self.assertIn("standard input", self.refused("plan", "-", text="JSON", input="x", root=False).err)

    def test_sound_files(self):
        for name in FILES:
            with self.subTest(name), open(os.path.join(DATA, name)) as handle:
                text = handle.read().replace('"nat": {}', '"nat": {"interface": "eth0"}').replace(
                    '"protocol": "udp"}', '"protocol": "udp", "interface": "eth0"}')
                path = self.file(name, text)
                planned = self.cli("plan", path, code=1, root=False)
                self.assertEqual(self.cli("plan", "-", code=1, root=False, input=text).out, planned.out)
                for vpc in json.loads(text)["vpcs"]:
                    self.assertIn("+ vpc %s %s\n" % (vpc["name"], vpc["cidr"]), planned.out)
                    for subnet in vpc.get("subnets", ()):
                        self.assertIn("+ subnet %s/%s %s" % (vpc["name"], subnet["name"], subnet["cidr"]), planned.out)
                self.assertIn(">>> ip link add", self.cli("--dry-run", "apply", path, root=False).out)
        self.assertFalse(os.path.exists(self.data))

    def test_an_empty_one(self):
        self.assertEqual(self.cli("plan", self.file("empty.json", '{"vpcs": []}'), root=False).out, "Nothing to do\n")
        self.assertEqual(json.loads(self.cli("export", root=False).out), {"vpcs": [], "peers": []})
        self.records()
        self.assertEqual(self.cli("plan", self.file("empty.json", '{"vpcs": []}'), root=False).out, "Nothing to do\n")
        pruned = self.cli("plan", self.file("empty.json", '{"vpcs": []}'), "--prune", code=1, root=False)
        self.assertEqual(pruned.out, "- vpc blog 10.20.0.0/16\n- vpc shop 10.30.0.0/16\n")

    def test_export_and_plan_ask_for_no_root(self):
        self.records()
        before = self.tree()
        text = self.cli("export", root=False).out
        # No such bridges are here: an ordinary user sees that, and not what only root can look at.
        down = ["! repair vpc blog: missing: interface br-blog, and 23 more",
                "! repair vpc shop: missing: interface br-shop, and 16 more"]
        planned = self.cli("plan", "-", code=1, input=text, root=False).out.splitlines()
        self.assertEqual(planned[:2], down)
        self.assertRegex(planned[2], r"^\? without root, firewall rules.* cannot be seen$")
        answer = json.loads(self.cli("plan", "-", "--json", code=1, input=text, root=False).out)
        self.assertEqual(sorted(answer), ["changes", "ok", "repairs", "unseen"])
        self.assertEqual((answer["ok"], answer["changes"], len(answer["unseen"])), (False, [], 1))
        self.assertEqual(answer["repairs"][0], {"vpc": "blog", "what": "missing", "object": "interface br-blog, and 23 more"})
        changed = text.replace("10.20.2.0/24", "10.20.9.0/24")
        lines = self.cli("plan", "-", input=changed, code=1, root=False).out.splitlines()
        self.assertIn("-/+ subnet blog/db: 10.20.2.0/24 -> 10.20.9.0/24; ends open connections", lines)
        answer = json.loads(self.cli("plan", "-", "--json", code=1, input=changed, root=False).out)
        self.assertEqual(answer["changes"], [{"sign": "-/+", "what": "subnet blog/db", "ends": ["open connections"],
                                              "text": "10.20.2.0/24 -> 10.20.9.0/24"}])
        self.assertEqual(self.tree(), before)
        self.refused("apply", self.file("t.json", text), code=4, root=False, text="root")
        self.refused("export", "blgo", text="blgo", hint="did you mean 'blog'", root=False)


if __name__ == "__main__":
    unittest.main()
