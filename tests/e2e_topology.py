"""apply, plan and export, end to end: what a file says is there, and a second look finds nothing to do."""

import fcntl
import json
import os
import re
import shutil
import tempfile
import unittest

from injection import load_vpcctl
from support import (HERE, INTERNET, LONG, SandboxTest, assert_same, http_get, in_ns, internet_pid, record, run,
                     snapshot, subnet, udp_answers, VPCCTL, vpcctl, wait_until)

DATA = os.path.join(HERE, "data")
NOTHING = "Nothing to do\n"


def data(name):
    """Return a topology of the tests' data."""
    with open(os.path.join(DATA, name)) as handle:
        return json.load(handle)


def commands(text):
    """Return the echoed commands; the random half of a namespace's mark is left out."""
    return [re.sub(r"^(>>> ip netns set \S+) \d+$", r"\1", line) for line in text.splitlines()
            if line.startswith(">>> ")]


def vpc_of(topology, name):
    """Return a VPC of a topology."""
    return [vpc for vpc in topology["vpcs"] if vpc["name"] == name][0]


def subnet_of(topology, vpc, name):
    """Return a subnet of a topology."""
    return [found for found in vpc_of(topology, vpc)["subnets"] if found["name"] == name][0]


def lasting(state):
    """Return a snapshot without what is new in things that were made anew: random hardware addresses and ids, PIDs, and
    the order of rules that do not depend on each other."""
    state = dict(state, processes=[], rules=sorted(state["rules"]))
    state["data"] = [line for line in state["data"] if not re.search(r'"(pid|start)":', line)]
    state["links"] = [line for line in state["links"] if not re.match(r"\S+ link_netnsid=|p?v-\S+ address=", line)]
    state["fdb"] = [line for line in state["fdb"] if not re.search(r"dev p?v-.* permanent$", line)]
    state["iptables"] = sorted(state["iptables"])
    return state


class ScenariosTest(SandboxTest):
    """The guide's three scenarios, each one file."""

    def check(self, name):
        path = os.path.join(DATA, name)
        planned = vpcctl("plan", path, code=1)
        self.assertTrue(all(line.startswith(("+ ", "~ policy ")) for line in planned.out.splitlines()), planned)
        done = vpcctl("apply", path)
        self.assertEqual(done.out.splitlines()[-len(planned.out.splitlines()) - 1:-1], planned.out.splitlines())
        self.assertEqual(vpcctl("plan", path).out, NOTHING)
        self.assertEqual(vpcctl("plan", "-", input=vpcctl("export").out).out, NOTHING)
        vpcctl("verify")

    def test_1_webapp(self):
        self.check("scenario-1-webapp.json")
        self.assertIn("appservers", http_get("ns-webapp-loadbalancer", "10.30.2.2", 8080))
        self.assertIn("database", http_get("ns-webapp-appservers", "10.30.3.2", 5432))
        self.assert_dropped("ns-webapp-appservers", "10.30.3.2", 80)
        self.assertIn("192.0.2.2", http_get("ns-webapp-database", INTERNET))
        self.assert_dropped("ns-webapp-database", "10.30.2.2", 8080)     # its egress: 80 and 443 only

    def test_2_microservices(self):
        self.check("scenario-2-microservices.json")
        self.assertIn("user-service", http_get("ns-microservices-api-gateway", "10.40.2.2", 8081))
        self.assertIn("shared-db", http_get("ns-microservices-order-service", "10.40.10.2", 5432))
        self.assertIn("192.0.2.2", http_get("ns-microservices-payment-service", INTERNET))

    def test_3_peering(self):
        self.check("scenario-3-peering.json")
        for name in ("dev", "prod"):
            self.assertIn("logging", http_get("ns-%s-web" % name, "10.70.1.2", 9200))
            self.assert_dropped("ns-%s-db" % name, "10.70.1.2", 9200)
        self.assertIn("prod", http_get(None, "10.60.1.2", 8080))
        self.assert_dropped("ns-dev-web", "10.60.1.2", 8080)


class RoundTripTest(SandboxTest):

    def test_everything(self):
        path = os.path.join(DATA, "everything.json")
        preview = vpcctl("--dry-run", "apply", path)
        assert_same(self.before, snapshot())
        planned = vpcctl("plan", path, code=1)
        done = vpcctl("apply", path)
        self.assertEqual(commands(done.out), commands(preview.out))
        self.assertEqual(vpcctl("plan", path).out, NOTHING)
        self.assertEqual(vpcctl("plan", path, "--prune").out, NOTHING)
        self.see_everything()
        exported = vpcctl("export")
        self.assertEqual(exported.err, "")
        self.assertEqual(vpcctl("plan", "-", input=exported.out).out, NOTHING)
        vpcctl("cleanup-all")
        assert_same(self.before, snapshot())
        again = vpcctl("apply", "-", input=exported.out)
        self.assertEqual(again.out.splitlines()[-1],
                         "Applied standard input: %d changes" % len(planned.out.splitlines()))
        self.assertEqual(vpcctl("export").out, exported.out)
        self.assertEqual(vpcctl("plan", path).out, NOTHING)
        self.see_everything()

    def see_everything(self):
        self.assertIn("blog / web", http_get("ns-blog-tiny", "10.20.1.1"))
        self.assertTrue(udp_answers(internet_pid(), "192.0.2.2", 7000, LONG))
        self.assertIn("blog / web", http_get(internet_pid(), "192.0.2.2", 8080))
        self.assertIn("default via 10.20.1.254", in_ns("ns-blog-web", ["ip", "route"]).out)
        self.assertIn("blog / db", http_get("ns-blog-web", "10.20.2.2", 5432))
        self.assert_dropped("ns-blog-tiny", "10.20.2.2", 5432)
        self.assert_ping("ns-blog-web", "10.20.3.6")
        self.assert_no_ping("ns-blog-tiny", "10.20.1.1")
        self.assertIn("192.0.2.2", http_get("ns-blog-web", INTERNET))
        self.assert_dropped("ns-blog-db", INTERNET, 80)
        self.assertIn("192.0.2.2", http_get("ns-shop-api", INTERNET))
        self.assertIn("blog / web", http_get("ns-shop-api", "10.20.1.1"))
        self.assert_dropped("ns-shop-api", "10.20.2.2", 5432)
        vpcctl("verify")

    def test_some_vpcs(self):
        vpcctl("apply", os.path.join(DATA, "scenario-3-peering.json"))
        only = json.loads(vpcctl("export", "dev", "shared").out)
        self.assertEqual([vpc["name"] for vpc in only["vpcs"]], ["dev", "shared"])
        self.assertEqual([sorted(peer["vpcs"]) for peer in only["peers"]], [["dev", "shared"]])
        self.assertEqual(vpcctl("plan", "-", input=json.dumps(only)).out, NOTHING)
        self.assertEqual(json.loads(vpcctl("export", "dev").out)["peers"], [])
        self.assertIn("did you mean 'prod'", vpcctl("export", "prdo", code=2).err)


# What is changed in the base topology, and the lines of `plan` that say so.
def _base():
    return {"vpcs": [
        {"name": "a", "cidr": "10.20.0.0/16", "subnets": [
            {"name": "web", "cidr": "10.20.1.0/24"}, {"name": "db", "cidr": "10.20.2.0/24"}]},
        {"name": "b", "cidr": "10.30.0.0/16", "subnets": [{"name": "api", "cidr": "10.30.1.0/24"}]},
        {"name": "c", "cidr": "10.40.0.0/16", "subnets": []}],
        "peers": [{"vpcs": ["a", "b"], "allow": ["10.20.1.0/24", "10.30.1.0/24"]}]}


def _change(function, *lines):
    def build():
        topology = _base()
        function(topology)
        return topology
    return build, list(lines)


def _set(vpc, name=None, **values):
    def change(topology):
        (subnet_of(topology, vpc, name) if name else vpc_of(topology, vpc)).update(values)
    return change


SLEEPER = ["python3", "-m", "http.server", "81"]
# One after the other, each from the state that the one before has left.
CHANGES = (
    _change(lambda t: vpc_of(t, "a")["subnets"].append({"name": "cache", "cidr": "10.20.3.0/24"}),
            "+ subnet a/cache 10.20.3.0/24"),
    _change(lambda t: None, "- subnet a/cache"),
    _change(_set("a", "db", cidr="10.20.5.0/24"), "-/+ subnet a/db: 10.20.2.0/24 -> 10.20.5.0/24; ends open connections"),
    _change(_set("a", "web", gw="10.20.1.9"), "-/+ subnet a/web: 10.20.1.0/24 -> 10.20.1.0/24 gw 10.20.1.9; ends open connections",
            "-/+ subnet a/db: 10.20.5.0/24 -> 10.20.2.0/24; ends open connections"),
    _change(_set("a", "db", policy={"ingress": [{"port": 5432, "protocol": "tcp", "action": "allow"}]}),
            "-/+ subnet a/web: 10.20.1.0/24 gw 10.20.1.9 -> 10.20.1.0/24; ends open connections",
            "~ policy a/db: ingress tcp/80, tcp/443, deny tcp/22 -> tcp/5432"),
    _change(_set("a", "db", policy={"ingress": [{"port": 6000, "protocol": "tcp", "action": "allow"}],
                                    "egress": [{"protocol": "udp", "action": "deny", "to": "web"}],
                                    "default": {"ingress": "allow"}}),
            "~ policy a/db: ingress tcp/5432 -> tcp/6000, default allow",
            "~ policy a/db: egress nothing -> deny udp to web"),
    _change(_set("a", nat={"interface": "eth0"}),
            "~ policy a/db: ingress tcp/6000, default allow -> tcp/80, tcp/443, deny tcp/22",
            "~ policy a/db: egress deny udp to web -> nothing", "+ nat a eth0"),
    _change(_set("a", nat={"interface": "eth0", "subnets": ["web"]}), "~ nat a: eth0 -> eth0 for web"),
    _change(_set("a", "web", apps=[{"port": 81}]), "- nat a", "+ app a/web 81 (page)"),
    _change(_set("a", "web", apps=[{"port": 81, "cmd": SLEEPER}]),
            "-/+ app a/web 81: (page) -> python3 -m http.server 81; ends the program that runs"),
    _change(_set("a", "web", publish=[{"host_port": 8081, "port": 81}]), "- app a/web 81",
            "+ published a/web 8081 tcp/81 by eth0"),
    _change(_set("a", "web", publish=[{"host_port": 8081, "port": 82}]),
            "-/+ published a/web 8081: tcp/81 by eth0 -> tcp/82 by eth0; ends open connections through it"),
    _change(_set("a", "web", publish=[{"host_port": 8081, "port": 82, "protocol": "udp"}]),
            "- published a/web 8081", "+ published a/web 8081 udp/82 by eth0"),
    _change(lambda t: t.update(peers=[]), "- published a/web 8081", "- peer a b"),
    _change(lambda t: t.update(peers=[{"vpcs": ["b", "a"], "allow": ["10.20.0.0/16", "10.30.1.0/24"]}]),
            "+ peer b a 10.20.0.0/16,10.30.1.0/24"),
    _change(lambda t: t["peers"][0]["allow"].append("10.20.2.0/24"),
            "-/+ peer b a: 10.20.0.0/16,10.30.1.0/24 -> 10.20.1.0/24,10.30.1.0/24,10.20.2.0/24; "
            "ends open connections between the two"),
    _change(lambda t: None, "-/+ peer a b: 10.20.1.0/24,10.30.1.0/24,10.20.2.0/24 -> 10.20.1.0/24,10.30.1.0/24; "
            "ends open connections between the two"),
    _change(_set("c", cidr="10.41.0.0/16", subnets=[{"name": "x", "cidr": "10.41.1.0/24"}]),
            "-/+ vpc c: 10.40.0.0/16 -> 10.41.0.0/16; ends open connections", "+ subnet c/x 10.41.1.0/24"),
    _change(lambda t: t["vpcs"].append({"name": "d", "cidr": "10.50.0.0/16"}),
            "-/+ vpc c: 10.41.0.0/16 -> 10.40.0.0/16; ends subnet x, open connections", "+ vpc d 10.50.0.0/16"),
    _change(lambda t: None, "- vpc d 10.50.0.0/16"),
)


class ChangesTest(SandboxTest):

    def test_one_by_one(self):
        vpcctl("apply", self.file("base.json", _base()))
        base = snapshot()
        for build, lines in CHANGES:
            with self.subTest(lines):
                path = self.file("next.json", build())
                self.assertEqual(sorted(vpcctl("plan", path, "--prune", code=1).out.splitlines()), sorted(lines))
                done = vpcctl("apply", path, "--prune").out.splitlines()
                self.assertEqual(sorted(done[-len(lines) - 1:-1]), sorted(lines))
                self.assertEqual(vpcctl("plan", path, "--prune").out, NOTHING)
                vpcctl("verify")
        self.assertEqual(vpcctl("plan", self.file("base.json", _base()), "--prune").out, NOTHING)
        assert_same(lasting(base), lasting(snapshot()))

    def test_another_range_and_everything_in_it(self):
        vpcctl("apply", self.file("one.json", _base()))
        self.assert_ping("ns-a-web", "10.30.1.2")
        text = json.dumps(_base()).replace("10.30.", "172.16.")
        path = self.file("two.json", text)
        planned = vpcctl("plan", path, code=1).out
        self.assertIn("-/+ vpc b: 10.30.0.0/16 -> 172.16.0.0/16; ends subnet api, peering with a, open connections\n", planned)
        vpcctl("apply", path)
        self.assertEqual(subnet("b", "api")["host_ip"], "172.16.1.2")
        self.assertEqual([record("b")[key] for key in ("bridge", "chain", "chain_in")], ["br-b", "vpc-b", "vpc-in-b"])
        self.assertEqual(record("b")["peers"][0]["veth_a"], "pv-a-b-a")
        self.assert_ping("ns-a-web", "172.16.1.2")
        self.assert_no_ping("ns-a-web", "10.30.1.2")
        self.assertNotIn("10.30.", run(["ip", "route", "show", "table", "all"]).out)
        vpcctl("verify")
        vpcctl("apply", path.replace("two", "one"))
        self.assert_ping("ns-a-web", "10.30.1.2")

    def test_what_stays_is_not_touched(self):
        topology = _base()
        subnet_of(topology, "a", "web")["apps"] = [{"port": 80}]
        vpcctl("apply", self.file("one.json", topology))
        pid = record("a")["apps"][0]["pid"]
        subnet_of(topology, "a", "db")["policy"] = {"ingress": [], "default": {"ingress": "deny"}}
        vpc_of(topology, "a")["nat"] = {"interface": "eth0"}
        vpc_of(topology, "a")["subnets"].append({"name": "cache", "cidr": "10.20.3.0/24"})
        done = vpcctl("apply", self.file("two.json", topology))
        self.assertEqual(record("a")["apps"][0]["pid"], pid)
        self.assertNotIn("netns add ns-a-web", done.out)
        self.assertIn("netns add ns-a-cache", done.out)
        self.assertIn("a / web", http_get("ns-a-cache", "10.20.1.2"))

    def test_others_are_left_alone_unless_pruned(self):
        vpcctl("apply", self.file("base.json", _base()))
        state = snapshot()
        small = _base()
        small["vpcs"] = [vpc_of(small, "a")]
        small["peers"] = []
        path = self.file("small.json", small)
        self.assertEqual(vpcctl("plan", path).out, NOTHING)
        self.assertIn("matches", vpcctl("apply", path).out)
        assert_same(state, snapshot())
        self.assert_ping("ns-a-web", "10.30.1.2")
        self.assertEqual(sorted(vpcctl("plan", path, "--prune", code=1).out.splitlines()),
                         ["- peer a b", "- vpc b 10.30.0.0/16", "- vpc c 10.40.0.0/16"])
        vpcctl("apply", path, "--prune")
        self.assertEqual(vpcctl("list").out, "VPCs:\n- a\n")
        vpcctl("verify")

    def test_a_peer_that_the_file_names_must_be_there(self):
        vpcctl("apply", self.file("base.json", _base()))
        one = {"vpcs": [{"name": "n", "cidr": "10.50.0.0/16"}],
               "peers": [{"vpcs": ["n", "b"], "allow": ["10.50.0.0/16", "10.30.1.0/24"]}]}
        vpcctl("apply", self.file("one.json", one))          # b is not in the file, but it is there
        self.assertEqual(sorted(peer["peer_vpc"] for peer in record("b")["peers"]), ["a", "n"])
        self.assertIn("did you mean", vpcctl("plan", "-", code=2, input=json.dumps(one).replace('["n"', '["nn"')).err)
        vpcctl("verify")


FAILING = {"port": 9999, "cmd": ["sh", "-c", "echo out of luck; exit 1"]}
TOOL = """#!/bin/sh
# stands in for %(tool)s, and fails at call number %(at)d
echo x >> %(folder)s/calls
if [ $(wc -l < %(folder)s/calls) = %(at)d ]; then echo "%(tool)s is tired" >&2; exit 1; fi
exec %(real)s "$@"
"""


class FailureTest(SandboxTest):
    """What this run did is taken back, all of it."""

    def setUp(self):
        SandboxTest.setUp(self)
        self.one, self.two = _base(), _base()
        subnet_of(self.one, "a", "db")["apps"] = [{"port": 5432}]
        subnet_of(self.one, "a", "web")["publish"] = [{"host_port": 8080, "port": 80}]
        vpc_of(self.one, "a")["nat"] = {"interface": "eth0", "subnets": ["web"]}
        vpc_of(self.two, "a")["subnets"] = [
            {"name": "web", "cidr": "10.20.1.0/24", "apps": [{"port": 80}],
             "policy": {"ingress": [{"port": 80, "protocol": "tcp", "action": "allow"}]}},
            {"name": "cache", "cidr": "10.20.3.0/24"}]
        vpc_of(self.two, "c")["cidr"] = "10.41.0.0/16"
        self.two["vpcs"].append({"name": "d", "cidr": "10.50.0.0/16", "subnets": [
            {"name": "x", "cidr": "10.50.1.0/24"}], "nat": {"interface": "eth0"}})
        self.two["peers"] = [{"vpcs": ["a", "d"], "allow": ["10.20.3.0/24", "10.50.1.0/24"]}]
        vpcctl("apply", self.file("one.json", self.one))

    def check_same(self, state):
        assert_same(lasting(state), lasting(snapshot()))
        self.assertIn("a / db", http_get("ns-a-web", "10.20.2.2", 5432))
        self.assertEqual(vpcctl("plan", self.file("one.json", self.one), "--prune").out, NOTHING)
        vpcctl("verify")

    def test_an_app_that_does_not_listen(self):
        subnet_of(self.two, "a", "cache")["apps"] = [FAILING]
        state = snapshot()
        failed = vpcctl("apply", self.file("two.json", self.two), "--prune", code=3)
        self.assertIn("subnet cache does not listen on port 9999: out of luck", failed.err)
        self.check_same(state)

    def apply_with(self, tool, at):
        """Apply the second file with a tool that fails at its at-th call -> (Result, number of calls)."""
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o777)
            with open(os.path.join(folder, tool), "w") as handle:
                handle.write(TOOL % {"tool": tool, "at": at, "folder": folder, "real": shutil.which(tool)})
            os.chmod(os.path.join(folder, tool), 0o755)
            done = vpcctl("apply", self.file("two.json", self.two), "--prune", ok=False,
                          env={"PATH": folder + ":" + os.environ["PATH"]})
            with open(os.path.join(folder, "calls")) as handle:
                return done, len(handle.read().splitlines())

    def test_a_command_that_fails(self):
        state = snapshot()
        for tool in ("iptables-restore", "ip"):
            done, calls = self.apply_with(tool, 0)
            self.assertEqual(done.code, 0, done)
            vpcctl("verify")
            vpcctl("apply", self.file("one.json", self.one), "--prune")
            self.check_same(state)
            fired = 0
            for at in (calls // 2, calls - 1, calls):
                with self.subTest("%s call %d of %d" % (tool, at, calls)):
                    done = self.apply_with(tool, at)[0]
                    self.assertIn(done.code, (0, 3), done)
                    if done.code:
                        fired += 1
                        self.assertIn("%s is tired" % tool, done.err)
                    else:                         # while removing, a batch that fails is done one by one
                        vpcctl("apply", self.file("one.json", self.one), "--prune")
                    self.check_same(state)
            self.assertTrue(fired, tool)

    def test_refused_before_the_first_change(self):
        state = snapshot()
        for change, said in (
                (_set("a", "web", cidr="10.20.2.0/25"), "overlap"),
                (_set("a", "web", cidr="10.99.1.0/24"), "not inside"),
                (_set("b", cidr="10.20.0.0/16", subnets=[]), "overlaps VPC a"),
                (_set("c", cidr="192.0.2.0/25"), "already has"),
                (_set("a", nat={"interface": "eth7"}), "eth7"),
                (_set("a", nat={"interface": "br-b"}), "not a way out"),
                (_set("a", "web", publish=[{"host_port": 80, "port": 1}, {"host_port": 80, "port": 2}]), "published already")):
            with self.subTest(said):
                topology = _base()
                change(topology)
                self.assertIn(said, vpcctl("apply", self.file("odd.json", topology), code=2).err)
        assert_same(state, snapshot())


class AgainTest(SandboxTest):

    def test_twice_and_after_drift(self):
        topology = _base()
        subnet_of(topology, "a", "web")["apps"] = [{"port": 80}]
        vpc_of(topology, "a")["nat"] = {"interface": "eth0"}
        path = self.file("base.json", topology)
        vpcctl("apply", path)
        state = snapshot()
        again = vpcctl("apply", path)
        self.assertEqual(again.out, "The host matches %s already\n" % path)
        assert_same(state, snapshot())
        pid = record("a")["apps"][0]["pid"]
        os.kill(pid, 9)
        for argv in (["ip", "link", "del", "br-b"], ["iptables", "-F", "FORWARD"], ["ip", "rule", "del", "pref", "7001"],
                     ["ip", "netns", "exec", "ns-a-db", "iptables", "-F"],
                     ["ip", "netns", "del", "ns-b-api"], ["iptables", "-t", "nat", "-F"]):
            self.assertEqual(run(argv).code, 0, argv)
        wait_until(lambda: not os.path.exists("/proc/%d" % pid) or open("/proc/%d/stat" % pid).read().split()[2] == "Z",
                   LONG, "the app ends")
        vpcctl("verify", code=1)
        planned = vpcctl("plan", path, code=1).out
        for line in ("a: missing: app on port 80 in subnet web", "b: missing: interface br-b, and ",
                     'a: missing: firewall rule: iptables -I FORWARD 1 -i br-a -j vpc-a\n',
                     "a: missing: namespace ns-a-db: policy rules\n"):
            self.assertIn("! repair vpc " + line, planned)
        self.assertIn("put right", vpcctl("apply", path).out)
        vpcctl("verify")
        assert_same(lasting(state), lasting(snapshot()))
        self.assertIn("a / web", http_get("ns-b-api", "10.20.1.2"))
        self.assert_ping("ns-a-db", INTERNET)

    def drift(self):
        """Damage of each sort, in both VPCs of the base topology."""
        app = record("a")["apps"][0]["pid"]
        os.kill(app, 9)
        for argv in (["ip", "link", "set", "br-a", "down"], ["iptables", "-F", "vpc-a"], ["ip", "link", "del", "v-b-api-b"],
                     ["sh", "-c", "echo 0 >/proc/sys/net/ipv4/conf/br-b/rp_filter"],
                     ["ip", "netns", "exec", "ns-a-db", "iptables", "-F", "INPUT"]):
            self.assertEqual(run(argv).code, 0, argv)
        wait_until(lambda: not os.path.exists("/proc/%d" % app) or open("/proc/%d/stat" % app).read().split()[2] == "Z",
                   LONG, "the app ends")

    def test_a_change_repairs_as_well(self):
        """plan, apply, plan: 1, 0, 0, with a change and damage that has nothing to do with it; nothing is left."""
        topology = _base()
        subnet_of(topology, "a", "web")["apps"] = [{"port": 80}]
        vpcctl("apply", self.file("base.json", topology))
        vpcctl("create", "other", "--cidr", "10.90.0.0/16")
        run(["ip", "link", "set", "br-other", "down"])                   # the file does not name it
        self.drift()
        vpc_of(topology, "a")["subnets"].append({"name": "cache", "cidr": "10.20.3.0/24"})
        path = self.file("next.json", topology)
        before = snapshot()
        with open(os.path.join(os.environ["VPCCTL_DATA"], "lock"), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)                             # plan waits for nobody
            planned = vpcctl("plan", path, code=1).out
            answer = json.loads(vpcctl("plan", path, "--json", code=1).out)
        assert_same(before, snapshot())
        self.assertIn("+ subnet a/cache 10.20.3.0/24\n", planned)
        for line in ("a: changed: interface br-a is down, not up", "a: missing: app on port 80 in subnet web",
                     "a: missing: firewall rule: iptables -A vpc-a -j DROP", "b: missing: interface v-b-api-b, and ",
                     "b: changed: kernel switch net.ipv4.conf.br-b.rp_filter is 0, not 1",
                     "a: changed: namespace ns-a-db: policy rules lacks policy-ingress-loopback"):
            self.assertIn("! repair vpc " + line, planned)
        self.assertNotIn("other", planned)
        self.assertEqual([(change["sign"], change["what"]) for change in answer["changes"]], [("+", "subnet a/cache")])
        self.assertEqual(len(answer["repairs"]), planned.count("! repair "))
        self.assertEqual((answer["ok"], answer["unseen"]), (False, []))
        self.assertIn("1 change; put right what was missing\n", vpcctl("apply", path).out)
        self.assertEqual(vpcctl("plan", path).out, NOTHING)
        self.assertEqual(json.loads(vpcctl("plan", path, "--json").out),
                         {"ok": True, "changes": [], "repairs": [], "unseen": []})
        self.assertIn("a / web", http_get("ns-a-cache", "10.20.1.2"))
        self.assert_ping("ns-b-api", "10.20.1.2")
        self.assertIn("other: changed: interface br-other is down", vpcctl("verify", code=1).out)
        vpcctl("restore")

    def test_what_goes_is_not_repaired_first(self):
        topology = _base()
        subnet_of(topology, "a", "web")["apps"] = [FAILING]
        subnet_of(topology, "a", "db")["apps"] = [{"port": 5432}]
        path = self.file("base.json", dict(topology, vpcs=_base()["vpcs"]))
        vpcctl("apply", path)
        vpcctl("deploy-app", "a", "db", "--port", "5432")
        self.drift()
        planned = vpcctl("plan", path, code=1).out
        self.assertIn("- app a/db 5432\n", planned)
        self.assertNotIn("app on port", planned)
        self.assertNotIn("http.server", vpcctl("apply", path).out)
        self.assertEqual(vpcctl("plan", path).out, NOTHING)

    @unittest.skipUnless(load_vpcctl().app_users(), "one user only: nobody here is not root")
    def test_an_ordinary_user_sees_some_of_it(self):
        """Without root: what can be seen is told, and what cannot be is named."""
        topology = _base()
        subnet_of(topology, "a", "web")["apps"] = [{"port": 80}]
        path = self.file("base.json", topology)
        os.chmod(os.path.dirname(path), 0o755)
        vpcctl("apply", path)
        nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", VPCCTL]
        plan = lambda: run(nobody + ["plan", path])
        if plan().code == 2:
            self.skipTest("nobody may not read the records here")
        self.assertRegex(plan().out, r"\A\? without root, .* cannot be seen\nNothing to do\n\Z")
        self.drift()
        self.assertEqual(plan().code, 1)
        lines = [line for line in plan().out.splitlines() if line[0] == "!"]
        self.assertEqual(sorted(lines), [
            "! repair vpc a: changed: interface br-a is down, not up", "! repair vpc a: missing: app on port 80 in subnet web",
            "! repair vpc b: changed: kernel switch net.ipv4.conf.br-b.rp_filter is 0, not 1",
            "! repair vpc b: missing: interface v-b-api-b, and 2 more"])
        run(["ip", "link", "del", "br-b"])
        self.assertIn("! repair vpc b: missing: interface br-b, and ", plan().out)
        vpcctl("restore")
        self.assertEqual(plan().code, 0)

    def test_dry_run_of_a_change(self):
        vpcctl("apply", self.file("base.json", _base()))
        state, topology = snapshot(), _base()
        subnet_of(topology, "a", "db").update(cidr="10.20.6.0/24", apps=[{"port": 80}])
        topology["peers"] = []
        path = self.file("next.json", topology)
        preview = vpcctl("--dry-run", "apply", path, "--prune")
        assert_same(state, snapshot())
        self.assertEqual(commands(preview.out), commands(vpcctl("apply", path, "--prune").out))
        self.assertIn("# ", vpcctl("--dry-run", "--why", "apply", self.file("base.json", _base())).out)


if __name__ == "__main__":
    unittest.main()
