"""Only what is ours goes, what ended has ended, and `verify` names what others have put in our way."""

import contextlib
import json
import os
import socket
import subprocess
import unittest

from injection import load_vpcctl
from packets import check, echoing, settle, ways
from support import (INTERNET, LONG, SHORT, SandboxTest, internet_pid, record, run, socket_in, vpcctl,
                     wait_until)

HOST = "192.0.2.2"


def obey(*lines):
    """Run commands of vpcctl; returns the last one's Result."""
    for line in lines:
        result = vpcctl(*line.split())
    return result


def edit(vpc, **fields):
    """Change a record by hand, as somebody who can write in the data folder might."""
    path = os.path.join(os.environ["VPCCTL_DATA"], "vpc_%s.json" % vpc)
    changed = dict(record(vpc), **fields)
    with open(path, "w") as handle:
        json.dump(changed, handle)


def has_record(vpc):
    """Whether the VPC has a file in the data folder."""
    return any(entry.startswith("vpc_%s." % vpc) for entry in os.listdir(os.environ["VPCCTL_DATA"]))


def things():
    """What the kernel holds that has a name: text to look into."""
    rules = [line.split(" [")[0] + "\n" for line in settle("iptables-save").splitlines() if line[:1] != "#"]
    asked = ("-4 -o addr", "-br link", "netns list", "rule", "-4 route show table all")
    return "".join([settle("ip", *words.split()) for words in asked] + rules)


def bridge_text(name):
    """What somebody else has put on a bridge: addresses and neighbours."""
    return (settle("ip", "-4", "-o", "addr", "show", name),
            settle("ip", "neigh", "show", "dev", name, "nud", "permanent"))


class OwnershipTest(SandboxTest):
    """Somebody has put a thing of theirs in place of ours: it is named and stays, and the rest goes."""

    def setUp(self):
        SandboxTest.setUp(self)
        self.undo = []                            # what takes their things away again
        obey("create blog --cidr 10.20.0.0/16", "add-subnet blog web --cidr 10.20.1.0/24",
             "add-subnet blog db --cidr 10.20.2.0/24", "create shop --cidr 10.30.0.0/16",
             "add-subnet shop web --cidr 10.30.1.0/24")

    def tearDown(self):
        for work in reversed(self.undo):
            run(work.split()) if isinstance(work, str) else work()
        SandboxTest.tearDown(self)

    def theirs(self, *lines):
        """Run commands of the other program."""
        for line in lines:
            settle(*line.split())

    def sleeper(self, space):
        """A process of theirs in a namespace."""
        child = subprocess.Popen(["ip", "netns", "exec", space, "sleep", "1000"], stdin=subprocess.DEVNULL)
        self.undo += [child.wait, child.kill]
        there = lambda: str(child.pid) in settle("ip", "netns", "pids", space).split()
        wait_until(there, LONG, "it is in " + space)
        return child

    def assert_gone(self, vpc, but=()):
        """Nothing of the VPC is left but the names in `but`; there is no record, and the other VPC works."""
        self.assertFalse(has_record(vpc))
        left = [line for line in things().splitlines() if vpc in line]
        self.assertEqual([line for line in left if not any(name in line for name in but)], [], vpc)
        self.assert_ping("ns-shop-web", "10.30.0.1")

    def foreign_bridge(self, name="br-blog"):
        self.theirs("ip link add %s type bridge" % name, "ip addr add 10.20.1.1/24 dev %s" % name,
                    "ip neigh add 10.20.1.2 lladdr 02:00:00:00:00:07 dev %s nud permanent" % name,
                    "ip link set %s up" % name)
        self.undo.append("ip link del " + name)

    def foreign_namespace(self):
        """One in place of ns-blog-web, with a process in it."""
        self.theirs("ip netns del ns-blog-web", "ip netns add ns-blog-web")
        self.undo.append("ip netns del ns-blog-web")
        return self.sleeper("ns-blog-web")

    def test_a_bridge(self):
        self.theirs("ip link del br-blog")
        self.foreign_bridge()
        before = bridge_text("br-blog")
        refused = vpcctl("add-subnet", "blog", "api", code=3)
        self.assertIn("br-blog exists already and is not vpcctl's", refused.err)
        self.assertEqual(before, bridge_text("br-blog"))
        obey("add-subnet shop api")               # a bridge of ours takes one at the same moment
        self.assertIn("interface br-blog is not vpcctl's: left alone", obey("delete-subnet blog web").err)
        self.assertEqual(before, bridge_text("br-blog"))
        self.assertIn("interface br-blog is not vpcctl's: left alone", obey("delete blog").err)
        self.assertEqual(before, bridge_text("br-blog"))
        self.assert_gone("blog", ["br-blog"])
        self.assertNotIn("left alone", obey("delete shop").err)
        self.assertNotIn("br-shop", things())

    def test_a_record_that_names_another_interface(self):
        self.foreign_bridge("docker0")
        before = bridge_text("docker0")
        edit("blog", bridge="docker0")
        self.assertIn("interface docker0 is not vpcctl's: left alone", obey("delete blog").err)
        self.assertEqual(before, bridge_text("docker0"))
        self.assertFalse(has_record("blog"))
        obey("delete blog")                       # it has no record, but what carries its mark
        self.assert_gone("blog")
        edit("shop", bridge="docker0")
        obey("cleanup-all")
        self.assertEqual(before, bridge_text("docker0"))
        obey("cleanup-all")                       # what carries the mark of a VPC without a record
        self.assertNotIn("br-shop", things())

    def test_a_record_that_names_things_of_another_vpc(self):
        """Our mark alone is not enough: it must be this VPC's."""
        self.names_things_of_another(lambda made: load_vpcctl().recorded_rules(made))

    def test_a_record_that_names_them_and_is_of_an_earlier_version(self):
        self.names_things_of_another(lambda made: made["host_iptables"])

    def names_things_of_another(self, rules):
        chain, whole = record("shop")["chain"], settle("iptables-save", "-t", "filter")
        edit("blog", bridge="br-shop", chain=chain)
        edit("blog", host_iptables=rules(record("blog")))
        said = obey("delete blog").err
        self.assertIn("br-shop", said)
        self.assertIn("chain " + chain, said)
        rules = [line for line in whole.splitlines() if line.startswith("-A %s " % chain)]
        self.assertTrue(rules)
        self.assertLessEqual(set(rules), set(settle("iptables-save", "-t", "filter").splitlines()))
        obey("add-subnet shop api --cidr 10.30.2.0/24")
        with echoing("ns-shop-api"):
            check(self, ways(True, "ns-shop-web", "10.30.2.2"))
        self.assertEqual([line for line in obey("cleanup-all").err.splitlines() if "left alone" in line], [])

    def test_a_namespace_and_who_is_in_it(self):
        theirs, ours = self.foreign_namespace(), self.sleeper("ns-blog-db")
        obey("delete-subnet blog db")
        self.assertIsNotNone(ours.wait(LONG))
        self.assertIn("namespace ns-blog-web is not vpcctl's: left alone", obey("delete-subnet blog web").err)
        self.assertIsNone(theirs.poll())
        obey("delete blog")
        self.assertIsNone(theirs.poll())
        self.assertIn("ns-blog-web", os.listdir("/run/netns"))
        self.assert_gone("blog", ["ns-blog-web"])

    def test_a_namespace_while_the_bridge_is_lost(self):
        """Then `delete` looks at everything first; what it finds is treated alike."""
        theirs = self.foreign_namespace()
        self.theirs("ip link del br-blog")
        self.assertIn("namespace ns-blog-web is not vpcctl's: left alone", obey("delete blog").err)
        self.assertIsNone(theirs.poll())
        self.assert_gone("blog", ["ns-blog-web"])

    def test_cleanup_all(self):
        theirs = self.foreign_namespace()
        self.assertIn("namespace ns-blog-web is not vpcctl's: left alone", obey("cleanup-all").err)
        self.assertIsNone(theirs.poll())
        self.assertIn("ns-blog-web", os.listdir("/run/netns"))
        self.assertNotIn("br-", things())

    def test_a_port_and_a_peering(self):
        obey("peer blog shop --allow-cidrs 10.20.1.0/24,10.30.1.0/24")
        cable, chain = record("blog")["peers"][0]["veth_a"], record("blog")["peers"][0]["chain"]
        self.theirs("ip link del " + cable, "ip link add %s type bridge" % cable, "ip link del v-blog-web-b",
                    "ip link add v-blog-web-b type bridge", "iptables -F " + chain,
                    "iptables -A %s -s 110.20.1.0/24 -j ACCEPT" % chain,
                    "iptables -A OUTPUT -d 110.1.1.1 -j " + chain)
        self.undo += ["iptables -X " + chain, "iptables -D OUTPUT -d 110.1.1.1 -j " + chain,
                      "iptables -F " + chain, "ip link del " + cable, "ip link del v-blog-web-b"]
        said = obey("unpeer blog shop").err
        for name in (cable, chain):
            self.assertIn(name + " is not vpcctl's: left alone", said)
            self.assertIn(name, things())
        self.assertIn("110.20.1.0/24", settle("iptables", "-S", chain))
        self.assertIn("v-blog-web-b is not vpcctl's: left alone", obey("delete-subnet blog web").err)
        self.assertNotIn("left alone", obey("delete-subnet blog db").err)
        obey("delete blog")
        self.assert_gone("blog", [cable, "v-blog-web-b", chain])

    def test_apply(self):
        """What would be made anew in place of theirs is refused; what only goes, goes without theirs."""
        theirs, whole = self.foreign_namespace(), record("blog")
        moved = {"vpcs": [{"name": "blog", "cidr": "10.20.0.0/16", "subnets": [
            {"name": "web", "cidr": "10.20.9.0/24"}, {"name": "db", "cidr": "10.20.2.0/24"}]}]}
        refused = vpcctl("apply", self.file("moved.json", moved), code=3)
        self.assertIn("namespace ns-blog-web exists already and is not vpcctl's", refused.err)
        self.assertEqual(record("blog"), whole)
        del moved["vpcs"][0]["subnets"][0]
        done = vpcctl("apply", "--prune", self.file("less.json", moved))
        self.assertIn("namespace ns-blog-web is not vpcctl's: left alone", done.err)
        self.assertIsNone(theirs.poll())
        self.assertEqual([entry["name"] for entry in record("blog")["subnets"]], ["db"])
        self.assert_ping("ns-blog-db", "10.20.0.1")

    def test_restore(self):
        self.theirs("ip link del br-blog")
        self.foreign_bridge()
        before = things()
        self.assertIn("br-blog exists already and is not vpcctl's", vpcctl("restore", code=3).err)
        self.assertEqual(before, things())
        self.theirs("ip link del br-blog")
        obey("restore")
        self.assert_ping("ns-blog-web", "10.20.0.1")

    def test_empty_chains(self):
        """A flush leaves chains that no rule marks as ours; those that somebody else uses stay."""
        obey("enable-nat blog --interface eth0")
        run(["iptables", "-F"])
        run(["iptables", "-t", "raw", "-F"])
        self.undo += ["iptables -X theirs", "iptables -X vpc-theirs",
                      "iptables -D FORWARD -s 110.1.1.1 -j vpc-theirs"]
        self.theirs("iptables -N vpc-theirs", "iptables -A FORWARD -s 110.1.1.1 -j vpc-theirs",
                    "iptables -N theirs")
        for name in ("blog", "shop"):
            os.unlink(os.path.join(os.environ["VPCCTL_DATA"], "vpc_%s.json" % name))
        obey("cleanup-all")
        left = [line.split()[1] for line in settle("iptables", "-S").splitlines() if line.startswith("-N")]
        self.assertEqual(left, ["theirs", "vpc-theirs"])

    def test_a_chain_of_ours_in_another_table(self):
        self.theirs("iptables -t raw -N vpc-blog",
                    "iptables -t raw -A vpc-blog -m comment --comment vpcctl:blog -j RETURN")
        self.assertIn("firewall table raw: chain vpc-blog", vpcctl("verify", code=1).out)
        obey("restore", "verify")
        self.assertNotIn(":vpc-blog", settle("iptables-save", "-t", "raw"))
        self.assertIn(":vpc-blog", settle("iptables-save", "-t", "filter"))

    def test_a_save_that_is_put_in_again(self):
        """iptables-restore --noflush doubles our rules: the doubles are ours as well."""
        obey("enable-nat blog", "peer blog shop --allow-cidrs 10.20.1.0/24,10.30.1.0/24")
        saved = settle("iptables-save")
        again = lambda: self.assertEqual(run(["iptables-restore", "--noflush"], input=saved).code, 0)
        again()
        obey("unpeer blog shop", "delete blog")
        self.assert_gone("blog")
        obey("cleanup-all")
        self.assert_as_before()
        again()                                   # all of it, although there is no VPC any more
        obey("create blog --cidr 10.20.0.0/16", "delete blog", "cleanup-all")
        self.assert_as_before()


# ---- tracked connections ----

class Flow:
    """A UDP flow from a namespace to a server: told by the server, which learns where answers go to."""

    def __init__(self, ns, server, source, target):
        self.server = server
        self.client = socket_in(ns, socket.SOCK_DGRAM)
        self.client.bind(("0.0.0.0", source))
        self.client.settimeout(SHORT)
        self.client.sendto(b"hello", target)
        server.settimeout(LONG)
        self.back = server.recvfrom(100)[1]

    def close(self):
        self.client.close()


def hears(sock, data, seconds=SHORT):
    """Whether a datagram with this text comes to a socket; others before it are thrown away."""
    sock.settimeout(seconds)
    with contextlib.suppress(socket.timeout):
        while True:
            if sock.recv(100) == data:
                return True
    return False


def tracked():
    """The host's tracked connections -> list of (source, destination) of what opened them."""
    module = load_vpcctl()
    with module.netlink_socket(module.NETFILTER) as kernel:
        entries = [module.attributes(entry, 4) for entry in
                   module.netlink(kernel, 0x101, module.ALL, module.IPV4_FLOWS)]
    ends = [module.attributes(module.attributes(entry[1])[1]) for entry in entries]
    return sorted((socket.inet_ntoa(end[1]), socket.inet_ntoa(end[2])) for end in ends)


class EndedTest(SandboxTest):
    """What was connected through a thing ends with it: its successor does not get the answers."""

    @classmethod
    def setUpClass(cls):
        SandboxTest.setUpClass()
        if load_vpcctl().flow_count() is None:
            raise unittest.SkipTest("this kernel has no ctnetlink")

    def server(self, ns, address, port):
        sock = socket_in(ns, socket.SOCK_DGRAM)
        sock.bind((address, port))
        self.addCleanup(sock.close)
        return sock

    def flow(self, *words):
        flow = Flow(*words)
        self.addCleanup(flow.close)
        return flow

    def build(self, *more):
        obey("create blog --cidr 10.20.0.0/16", "add-subnet blog web --cidr 10.20.1.0/24", *more)

    def assert_ended(self, flow, old, new_flow):
        """An answer to the old flow does not come to where its address is now; one to a new flow does."""
        flow.server.sendto(b"old", flow.back)
        new_flow.server.sendto(b"new", new_flow.back)
        self.assertTrue(hears(new_flow.client, b"new", LONG), "the control")
        self.assertFalse(hears(old, b"old"), "an answer from before")

    def heir(self, ns):
        """Whoever now sits at the port from which the old flow came."""
        sock = socket_in(ns, socket.SOCK_DGRAM)
        sock.bind(("0.0.0.0", 5000))
        self.addCleanup(sock.close)
        return sock

    def successor(self, *between):
        self.build("enable-nat blog")
        net = internet_pid()
        flow = self.flow("ns-blog-web", self.server(net, INTERNET, 4444), 5000, (INTERNET, 4444))
        flow.server.sendto(b"first", flow.back)
        self.assertTrue(hears(flow.client, b"first", LONG), "the flow works")
        stranger = self.flow(None, self.server(net, INTERNET, 4445), 5002, (INTERNET, 4445))
        flow.close()
        obey(*between)
        fresh = self.flow("ns-blog-web", self.server(net, INTERNET, 4446), 5001, (INTERNET, 4446))
        self.assert_ended(flow, self.heir("ns-blog-web"), fresh)
        self.assertIn((HOST, INTERNET), tracked(), "the host's own connection is not touched")
        stranger.server.sendto(b"yours", stranger.back)
        self.assertTrue(hears(stranger.client, b"yours", LONG))

    def test_delete(self):
        self.successor("delete blog", "create blog --cidr 10.20.0.0/16",
                       "add-subnet blog web --cidr 10.20.1.0/24", "enable-nat blog")

    def test_cleanup_all(self):
        self.successor("cleanup-all", "create blog --cidr 10.20.0.0/16",
                       "add-subnet blog web --cidr 10.20.1.0/24", "enable-nat blog")

    def test_delete_subnet(self):
        self.successor("delete-subnet blog web", "add-subnet blog web --cidr 10.20.1.0/24")

    def test_disable_nat(self):
        self.successor("disable-nat blog", "enable-nat blog")

    def test_disable_nat_leaves_other_connections(self):
        self.build("add-subnet blog db --cidr 10.20.2.0/24", "enable-nat blog")
        with echoing("ns-blog-db"):
            check(self, ways(True, "ns-blog-web", "10.20.2.2"))
        self.flow("ns-blog-web", self.server(internet_pid(), INTERNET, 4444), 5000, (INTERNET, 4444))
        self.assertIn(("10.20.1.2", INTERNET), tracked())
        obey("disable-nat blog")
        self.assertNotIn(("10.20.1.2", INTERNET), tracked())
        self.assertIn(("10.20.1.2", "10.20.2.2"), tracked())
        obey("delete-subnet blog web")
        self.assertNotIn(("10.20.1.2", "10.20.2.2"), tracked())

    def test_unpublish(self):
        """A client that goes on sending reaches the port's new owner, not the old one."""
        self.build("add-subnet blog db --cidr 10.20.2.0/24")
        web, db, nine = (self.server(ns, "0.0.0.0", port) for ns, port in (
            ("ns-blog-web", 7), ("ns-blog-db", 7), ("ns-blog-web", 9)))
        obey("publish blog web --port 8080:7 --protocol udp", "publish blog web --port 8081:9 --protocol udp")
        net = internet_pid()
        client, control = self.flow(net, web, 6000, (HOST, 8080)), self.flow(net, nine, 6001, (HOST, 8081))
        other = self.server(net, "0.0.0.0", 6002)
        obey("unpublish blog web --port 8080 --protocol udp", "publish blog db --port 8080:7 --protocol udp")
        other.sendto(b"fresh", (HOST, 8080))
        self.assertTrue(hears(db, b"fresh", LONG), "the control")
        client.client.sendto(b"again", (HOST, 8080))
        self.assertTrue(hears(db, b"again", LONG), "the old connection still leads elsewhere")
        control.client.sendto(b"stays", (HOST, 8081))
        self.assertTrue(hears(nine, b"stays", LONG), "another published port")

    def test_unpeer(self):
        self.build("create shop --cidr 10.30.0.0/16", "add-subnet shop web --cidr 10.30.1.0/24",
                   "add-subnet blog db --cidr 10.20.2.0/24",
                   "peer blog shop --allow-cidrs 10.20.1.0/24,10.30.1.0/24")
        with echoing("ns-shop-web", "ns-blog-web"):
            check(self, ways(True, "ns-blog-web", "10.30.1.2") + ways(True, "ns-shop-web", "10.20.1.2")
                  + ways(True, "ns-blog-db", "10.20.1.2"))
        pairs = {("10.20.1.2", "10.30.1.2"), ("10.30.1.2", "10.20.1.2")}
        self.assertLessEqual(pairs, set(tracked()))
        obey("unpeer blog shop")
        self.assertFalse(pairs & set(tracked()))
        self.assertIn(("10.20.2.2", "10.20.1.2"), tracked())

    def test_a_changed_policy(self):
        """It needs no more than its rules: they judge the answers, too."""
        self.build("add-subnet blog db --cidr 10.20.2.0/24")
        db = self.server("ns-blog-db", "0.0.0.0", 7)
        flow, other = (self.flow("ns-blog-web", db, port, ("10.20.2.2", 7)) for port in (5000, 5001))
        self.assertNotEqual(flow.back, other.back)
        for kind, rules in (("ingress", [{"port": 7, "protocol": "udp", "action": "deny"}]), ("egress", [])):
            policy = {"subnet": "db", "ingress": [], "egress": []}
            policy[kind] = rules
            vpcctl("apply-policy", "blog", self.file("policy.json", policy))
            flow.client.sendto(b"more", ("10.20.2.2", 7))
            with contextlib.suppress(PermissionError):
                db.sendto(b"back", flow.back)
            self.assertEqual((hears(db, b"more"), hears(flow.client, b"back")), (not rules, not rules), kind)

    def test_what_is_shown(self):
        self.build("enable-nat blog", "publish blog web --port 8080:7")
        shown = obey("delete blog").out
        for words in ("-s 10.20.0.0/16", "-r 10.20.0.0/16", "-s 10.20.0.0/16 -n",
                      "-r 10.20.1.2/32 -p tcp --dport 8080"):
            self.assertIn(">>> conntrack -D %s\n" % words, shown)
        self.assertNotIn("10.20.1.0/24", "".join(line for line in shown.splitlines() if "conntrack" in line))


# ---- what verify sees ----

class ForeignTest(SandboxTest):
    """What others put in our way: a finding where it takes isolation or a policy away, else a note."""

    def setUp(self):
        SandboxTest.setUp(self)
        obey("create blog --cidr 10.20.0.0/16", "add-subnet blog web --cidr 10.20.1.0/24",
             "create shop --cidr 10.30.0.0/16", "add-subnet shop web --cidr 10.30.1.0/24",
             "peer blog shop --allow-cidrs 10.20.1.0/24,10.30.1.0/24")

    def foreign(self, code):
        """What verify says is foreign -> (texts of findings, texts of notes)."""
        answer = json.loads(vpcctl("verify", "--json", code=code).out)
        return ([entry["object"] for entry in answer["findings"] if entry["what"] == "foreign"],
                [text for text in answer["notes"] if text.startswith("foreign: ")])

    def look(self, notes, findings, silent=()):
        """Make things, each given as (command, command that undoes it, what verify calls it): those that are
        only noted, with those of which nothing is said, then those that are findings as well."""
        for makes, _, _ in notes + list(silent):
            settle(*makes.split())
        harm, said = self.foreign(0)
        self.assertEqual((harm, len(said)), ([], len(notes)), said)
        for makes, _, _ in findings:
            settle(*makes.split())
        harm, said = self.foreign(1)
        for found, things in ((harm, findings), (said, notes)):
            for _, _, name in things:
                self.assertTrue(any(name in text for text in found), "%s\n%s\n%s" % (name, harm, said))
            self.assertEqual(len(found), len(things), found)
        shown = vpcctl("verify", code=1).out
        self.assertIn("foreign: " + harm[0], shown)
        self.assertIn("note: " + said[0], shown)
        for _, undo, _ in notes + findings + list(silent):
            settle(*undo.split())
        self.assertEqual(self.foreign(0), ([], []))

    def test_routing_rules(self):
        routes = (("default", "52"), ("100.64.0.0/10", "53"), ("10.0.0.0/8", "54"))
        for block, table in routes:
            settle("ip", "route", "add", block, "via", "192.0.2.1", "dev", "eth0", "table", table)
        rule = lambda words: ("ip rule add pref " + words, "ip rule del pref " + words,
                              "routing rule before ours: %s: " % words.split()[0])
        self.look([rule("5301 from all lookup 53"), rule("5210 fwmark 0x80000/0xff0000 lookup 52")],
                  [rule(words) for words in (
                      "5270 from all lookup 52", "5271 from all lookup 54", "100 from all lookup main",
                      "101 iif br-blog lookup 52", "102 from 10.20.1.0/24 lookup 52",
                      "109 from 10.20.1.7/8 lookup 52", "103 iif eth0 lookup 54")],
                  [rule(words) for words in (
                      "104 from 192.0.2.2 lookup 52", "105 iif lo lookup 52", "9000 from all lookup 52",
                      "106 from all lookup local", "107 from all oif eth0 lookup 52",
                      "108 iif eth0 lookup 52")])
        for block, table in routes:
            settle("ip", "route", "del", block, "table", table)

    def test_routes(self):
        route = lambda words, table: ("ip route add %s table %s" % (words, table),
                                      "ip route del %s table %s" % (words, table),
                                      "route in table %s: %s" % (table, words))
        table = record("blog")["table"]
        self.look([route("198.51.100.0/24 via 192.0.2.1", table), route("blackhole 10.30.9.0/24", table)],
                  [route("10.30.0.0/16 dev br-shop", table), route("default via 192.0.2.1", table),
                   route("10.30.1.0/24 dev br-shop", "7000")])

    def test_rules_in_our_chains(self):
        settle("iptables", "-N", "f2b")
        settle("iptables", "-A", "f2b", "-j", "RETURN")
        settle("iptables", "-N", "opens")
        settle("iptables", "-A", "opens", "-s", "110.1.1.0/24", "-j", "ACCEPT")
        obey("enable-nat blog --interface eth0")
        blog, notes, findings = record("blog"), [], []
        for chain in (blog["chain"], blog["chain_in"], blog["peers"][0]["chain"], "vpcctl-guard", "vpcctl-rest"):
            for into, words in ((notes, "-s 110.1.2.0/24 -j DROP"), (notes, "-s 110.1.3.0/24"), (notes, "-j f2b"),
                                (findings, "-s 110.1.4.0/24 -j ACCEPT"), (findings, "-j opens"),
                                (findings, "-s 110.1.5.0/24 -j RETURN")):
                place = 1 if chain == "vpcctl-rest" else 2
                into.append(("iptables -I %s %d %s" % (chain, place, words), "iptables -D %s %s" % (chain, words),
                             "iptables -A %s %s" % (chain, words)))
        self.look(notes, findings)
        for words in ("-F f2b", "-X f2b", "-F opens", "-X opens"):
            settle("iptables", *words.split())

    def test_rules_in_our_namespaces(self):
        def rule(table, at, words):
            tool, chain = "ip netns exec ns-blog-web iptables" + table, at.split()[1]
            return (" ".join((tool, at, words)), " ".join((tool, "-D", chain, words)),
                    "%s -A %s " % (tool, chain))
        self.look([rule("", "-A INPUT", "-p tcp -j ACCEPT"), rule("", "-I INPUT", "-s 110.1.1.1/32 -j DROP"),
                   rule(" -t nat", "-A PREROUTING", "-p tcp -j REDIRECT --to-ports 80"),
                   rule(" -t raw", "-A OUTPUT", "-p udp -j ACCEPT"),
                   rule(" -t mangle", "-A INPUT", "-j MARK --set-mark 7")],
                  [rule("", "-I INPUT", "-p udp -j ACCEPT"),
                   rule("", "-I OUTPUT", "-d 110.1.1.1/32 -j ACCEPT")])


if __name__ == "__main__":
    unittest.main()
