"""Policies with real packets: a model against the kernel, open connections, and no window while rules change."""

import contextlib
import importlib.util
import io
import ipaddress
import json
import os
import random
import select
import socket
import sys
import threading
import time
import unittest

from packets import Probe, check, echoing, fire, settle, ways
from support import (LONG, VPCCTL, SandboxTest, in_ns, internet_pid, socket_in, subnet, udp_answers, vpcctl, wait_until)


def load_vpcctl():
    """Import the script as a module, to run it without a process for each command."""
    spec = importlib.util.spec_from_loader("vpcctl_under_test", importlib.machinery.SourceFileLoader(
        "vpcctl_under_test", VPCCTL))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    take = module.Store.lock

    def lock(store, *args):
        take(store, *args)
        module.held = store._lock
    module.Store.lock = lock      # a process gives the lock back by ending
    return module


# ---- a model of the rules, from the guide's words alone ----

def model(policy, direction, protocol, port, other, names):
    """Whether a policy lets a new connection through."""
    rules = policy.get(direction, [])
    key = {"ingress": "from", "egress": "to"}[direction]

    def speaks(rule):
        if rule["protocol"] not in (protocol, "all"):
            return False
        if "port" in rule:
            low, _, high = str(rule["port"]).partition("-")
            if not int(low) <= port <= int(high or low):
                return False
        if key not in rule:
            return True
        return ipaddress.ip_address(other) in ipaddress.ip_network(names.get(rule[key], rule[key]))
    said = {rule["action"] for rule in rules if speaks(rule)}
    if "deny" in said:
        return False
    if "allow" in said:
        return True
    chosen = policy.get("default", {}).get(direction)
    if chosen:
        return chosen == "allow"
    return not rules or any(rule["action"] == "deny" for rule in rules)


PORTS = {"tcp": (22, 80, 8000, 8050, 8101), "udp": (53, 8000, 8050)}
RANGES = (22, 53, 80, 8000, 8050, 8101, "8000-8100", "8050-8050", "1-1023", "8001-65535", "1-65535", "8051-9000")


def random_policy(dice, own, others):
    """A policy that somebody might write, or nobody would."""
    policy = {"subnet": own["cidr"] if dice.random() < .5 else own["name"]}
    for direction, key in (("ingress", "from"), ("egress", "to")):
        if dice.random() < .15:
            continue
        rules = []
        for _ in range(dice.choice((0, 1, 1, 2, 2, 3, 5))):
            rule = {"protocol": dice.choice(("tcp", "tcp", "udp", "udp", "icmp", "all")),
                    "action": dice.choice(("allow", "allow", "allow", "deny", "deny"))}
            if rule["protocol"] in ("tcp", "udp") and dice.random() < .75:
                rule["port"] = dice.choice(RANGES)
            if dice.random() < .5:
                rule[key] = dice.choice(others)
            rules.append(rule)
        policy[direction] = rules
    if dice.random() < .35:
        policy["default"] = {direction: dice.choice(("allow", "deny"))
                             for direction in dice.sample(("ingress", "egress"), dice.choice((1, 2)))}
    return policy


@contextlib.contextmanager
def udp_echoes(spaces, ports):
    """One thread that answers on UDP ports of many namespaces."""
    socks, stop = [], threading.Event()
    for ns in spaces:
        for port in ports:
            sock = socket_in(ns, socket.SOCK_DGRAM)
            sock.bind(("0.0.0.0", port))
            sock.setblocking(False)
            socks.append(sock)

    def serve():
        while not stop.is_set():
            for sock in select.select(socks, [], [], 0.05)[0]:
                try:
                    data, sender = sock.recvfrom(2048)
                    sock.sendto(data, sender)
                except OSError:
                    pass      # the policy forbids the answer, or an error of an earlier one came back
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        for sock in socks:
            sock.close()


class GeneratedTest(SandboxTest):
    """At least 300 random policies: what the model says is what the packets do."""

    ROUNDS, SEED = 80, 20240

    def test_model_and_packets_agree(self):
        module = load_vpcctl()
        ends = self.build()
        siblings = [end for end in ends if end["vpc"] == "one"]
        dice = random.Random(self.SEED)
        policies, applied, tried, opened = {}, 0, 0, 0
        with udp_echoes([end["ns"] for end in ends], PORTS["udp"]):
            for number in range(self.ROUNDS):
                for place, end in enumerate(ends):
                    others = ["10.91.1.0/24", "10.91.2.2/32", "10.91.0.0/16", "10.92.1.2/32", "0.0.0.0/0", "192.0.2.0/24",
                              "10.91.2.0/23", "10.88.0.0/13"]
                    if end["vpc"] == "one":
                        others += [sibling["name"] for sibling in siblings] * 2
                    policies[end["ns"]] = random_policy(dice, end, others)
                    self.apply(module, end, policies[end["ns"]], by_process=(number * len(ends) + place) % 32 == 0)
                    applied += 1
                probes = self.probes(module, ends, policies)
                wrong = self.mismatches(probes)
                tried += len(probes)
                opened += sum(probe.ok for probe in probes)
                if wrong:
                    self.fail("round %d of seed %d:\n%s\n%s" % (number, self.SEED, "\n".join(wrong), json.dumps(policies, indent=1)))
        self.assertGreaterEqual(applied, 300)
        self.assertGreater(opened, tried // 10, "hardly anything was allowed: the test says nothing")
        self.assertGreater(tried - opened, tried // 10, "hardly anything was denied: the test says nothing")

    def build(self):
        vpcctl("create", "one", "--cidr", "10.91.0.0/16")
        vpcctl("create", "two", "--cidr", "10.92.0.0/16")
        for vpc, name, block in (("one", "x", "10.91.1.0/24"), ("one", "y", "10.91.2.0/24"), ("one", "z", "10.91.3.0/24"),
                                 ("two", "w", "10.92.1.0/24")):
            vpcctl("add-subnet", vpc, name, "--cidr", block)
        vpcctl("peer", "one", "two", "--allow-cidrs", "10.91.0.0/16,10.92.1.0/24")
        return [dict(subnet(vpc, name), vpc=vpc) for vpc, name in (("one", "x"), ("one", "y"), ("one", "z"), ("two", "w"))]

    def apply(self, module, end, policy, by_process):
        path = self.file("policy.json", policy)
        if by_process:
            return vpcctl("--quiet", "apply-policy", end["vpc"], path)
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = module.main(["--quiet", "apply-policy", end["vpc"], path])
        os.close(module.held)
        self.assertEqual(code, 0, said.getvalue())

    def probes(self, module, ends, policies):
        names = {end["name"]: end["cidr"] for end in ends}
        by_vpc = {vpc: [end for end in ends if end["vpc"] == vpc] for vpc in ("one", "two")}
        found = []
        for source in ends:
            for target in ends:
                if source is target:
                    continue
                for protocol, port in [(kind, port) for kind in PORTS for port in PORTS[kind]] + [("icmp", 0)]:
                    sides = ((source, "egress", target["host_ip"]), (target, "ingress", source["host_ip"]))
                    ok = all(model(policies[end["ns"]], direction, protocol, port, other, names) for end, direction, other in sides)
                    own = all(module.policy_decision(policies[end["ns"]], direction, protocol, port, other,
                                                     by_vpc[end["vpc"]])[0] for end, direction, other in sides)
                    self.assertEqual(own, ok, "vpcctl explains it otherwise: %s -> %s %s/%s\n%s" % (
                        source["ns"], target["ns"], protocol, port, json.dumps(policies, indent=1)))
                    found.append(Probe(ok, source["ns"], protocol, target["host_ip"], port))
        return found

    @staticmethod
    def mismatches(probes):
        """Those that went otherwise than expected. Nothing listens on tcp, so refused means that it got through."""
        wrong = [probe for probe in fire(probes, 0.06, 2.0)
                 if (probe.answer in ("open", "ECONNREFUSED")) != probe.ok]
        if wrong:      # on a loaded machine an answer may come late
            wrong = [probe for probe in fire([Probe(probe.ok, probe.ns, probe.protocol, probe.target, probe.port)
                                              for probe in wrong], 0.3) if (probe.answer in ("open", "ECONNREFUSED")) != probe.ok]
        return [str(probe) for probe in wrong]


# ---- open connections ----

class Flow:
    """An open connection between two namespaces: ask() goes with the opener's direction, push() against it."""

    def __init__(self, kind, client_ns, server_ns, address, port, through=None):
        self.kind, self.count = kind, 0
        style = socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM
        server, self.client = socket_in(server_ns, style), socket_in(client_ns, style)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("0.0.0.0", port))
        self.client.settimeout(LONG)
        server.settimeout(LONG)
        if kind == "tcp":
            server.listen(1)
            self.client.connect((address, through or port))
            self.server, self.peer = server.accept()
            server.close()
        else:
            self.client.connect((address, through or port))
            self.client.send(b"hello")
            self.server = server
            self.peer = server.recvfrom(100)[1]
            server.connect(self.peer)

    def _carry(self, sender, receiver, seconds):
        self.count += 1
        token = b"<%d>" % self.count
        end, got = time.time() + seconds, b""
        try:
            sender.send(token)
        except OSError:
            return False      # a policy on the way out, or an error that came back
        while token not in got and time.time() < end:
            receiver.settimeout(max(0.01, end - time.time()))
            try:
                got += receiver.recv(4096) or b""
            except OSError:
                pass
        return token in got

    def ask(self, seconds=LONG):
        """Send with the opener's direction; whether it arrives."""
        return self._carry(self.client, self.server, seconds)

    def push(self, seconds=LONG):
        """Send against it; whether it arrives."""
        return self._carry(self.server, self.client, seconds)

    def close(self):
        self.client.close()
        self.server.close()


class FlowTest(SandboxTest):
    """A permission that is taken away ends what it had opened, in both directions, within a second."""

    def setUp(self):
        SandboxTest.setUp(self)
        for vpc, number in (("one", 91), ("two", 92)):
            vpcctl("create", vpc, "--cidr", "10.%d.0.0/16" % number)
        for vpc, name, block in (("one", "x", "10.91.1.0/24"), ("one", "y", "10.91.2.0/24"), ("two", "w", "10.92.1.0/24")):
            vpcctl("add-subnet", vpc, name, "--cidr", block)

    def policy(self, vpc, name, ingress=(), egress=(), default=None):
        policy = {"subnet": name, "ingress": list(ingress), "egress": list(egress)}
        if default:
            policy["default"] = default
        vpcctl("apply-policy", vpc, self.file("policy.json", policy))

    def ends(self, flows, *command):
        """After the command, nothing goes in either direction of the flows, and nobody had to wait."""
        for flow in flows:
            self.addCleanup(flow.close)
            self.assertTrue(flow.ask() and flow.push(), "the %s flow does not work before" % flow.kind)
        if command:
            vpcctl(*command)
        for flow in flows:
            self.assertFalse(flow.push(0.2), "%s: against the opener, after %s" % (flow.kind, command))
            self.assertFalse(flow.ask(0.2), "%s: with the opener, after %s" % (flow.kind, command))

    def pair(self, client, server, address, port, through=None):
        return [Flow(kind, client, server, address, port, through) for kind in ("tcp", "udp")]

    def rule(self, kind, action, **more):
        return dict({"protocol": kind, "action": action}, **more)

    def test_new_deny_at_the_server(self):
        flows = self.pair("ns-one-x", "ns-one-y", "10.91.2.2", 5000)
        other = self.pair("ns-one-x", "ns-one-y", "10.91.2.2", 5001)
        for flow in flows + other:
            self.assertTrue(flow.ask() and flow.push())
        deny = self.file("deny.json", {"subnet": "y", "ingress": [self.rule("tcp", "deny", port=5000),
                                                                  self.rule("udp", "deny", port="4990-5000")]})
        self.ends(flows, "apply-policy", "one", deny)
        for flow in other:
            self.addCleanup(flow.close)
            self.assertTrue(flow.ask() and flow.push(), "the other flow has ended, too")
        self.ends(other, "apply-policy", "one", self.file("list.json", {
            "subnet": "y", "ingress": [self.rule("tcp", "allow", port=80)]}))

    def test_new_deny_at_the_client(self):
        flows = self.pair("ns-one-x", "ns-one-y", "10.91.2.2", 5000)
        back = self.pair("ns-one-y", "ns-one-x", "10.91.1.2", 5000)
        deny = self.file("deny.json", {"subnet": "x", "egress": [self.rule("tcp", "deny", to="y"),
                                                                 self.rule("udp", "deny", to="10.91.2.0/24", port=5000)]})
        self.ends(flows, "apply-policy", "one", deny)
        for flow in back:
            self.addCleanup(flow.close)
            self.assertTrue(flow.ask() and flow.push(), "what y opened to x is not denied")

    def test_allow_list_made_narrower(self):
        self.policy("one", "y", [self.rule("tcp", "allow", port=5000), self.rule("udp", "allow")])
        flows = self.pair("ns-one-x", "ns-one-y", "10.91.2.2", 5000)
        self.ends(flows, "apply-policy", "one", self.file("narrow.json", {
            "subnet": "y", "ingress": [self.rule("tcp", "allow", port=5001), self.rule("icmp", "allow")]}))
        self.assertTrue(gets_through("ns-one-x", "icmp", "10.91.2.2"))

    def test_stateful(self):
        """Replies pass a policy that forbids to open anything; opening is another matter."""
        self.policy("one", "y", [self.rule("tcp", "allow", port=5000), self.rule("udp", "allow", port=5000)],
                    default={"egress": "deny"})
        flows = self.pair("ns-one-x", "ns-one-y", "10.91.2.2", 5000)
        for flow in flows:
            self.addCleanup(flow.close)
            self.assertTrue(flow.ask() and flow.push())
        with echoing("ns-one-x", "ns-one-y"):
            check(self, ways(False, "ns-one-y", "10.91.1.2") + ways(False, "ns-one-x", "10.91.2.2"))
            # from the port of an allowed service, to a client that had asked it
            port = flows[1].peer[1]
            self.assertFalse(udp_answers("ns-one-y", "10.91.1.2", port + 1, source="10.91.2.2"))

    def test_unpeer_and_delete(self):
        vpcctl("peer", "one", "two", "--allow-cidrs", "10.91.1.0/24,10.92.1.0/24")
        flows = self.pair("ns-one-x", "ns-two-w", "10.92.1.2", 5000) + self.pair("ns-two-w", "ns-one-x", "10.91.1.2", 5000)
        self.ends(flows, "unpeer", "one", "two")
        vpcctl("peer", "two", "one", "--allow-cidrs", "10.91.1.0/24,10.92.1.0/24")
        with echoing("ns-one-x", "ns-two-w"):
            check(self, ways(True, "ns-one-x", "10.92.1.2"))
        self.ends(self.pair("ns-one-x", "ns-two-w", "10.92.1.2", 5003), "delete", "two")

    def test_nat_and_published(self):
        vpcctl("enable-nat", "one", "--interface", "eth0")
        vpcctl("publish", "one", "y", "--port", "9000:5000", "--interface", "eth0")
        vpcctl("publish", "one", "y", "--port", "9000:5000", "--protocol", "udp", "--interface", "eth0")
        net = internet_pid()
        inward = self.pair(net, "ns-one-y", "192.0.2.2", 5000, 9000)
        outward = self.pair("ns-one-x", net, "192.0.2.1", 5002)
        self.ends(inward[:1], "unpublish", "one", "y", "--port", "9000")
        self.assertTrue(inward[1].ask() and inward[1].push())
        self.ends(outward, "disable-nat", "one")
        self.assertTrue(inward[1].ask() and inward[1].push(), "udp is published still")
        self.ends(inward[1:], "unpublish", "one", "y", "--port", "9000", "--protocol", "udp")


def gets_through(ns, protocol, target):
    """Whether one probe gets an answer."""
    return fire([Probe(True, ns, protocol, target)])[0].answer == "open"


# ---- no window while rules change ----

class Stream:
    """Datagrams without pause from one namespace to ports of another; `got` counts them by port."""

    def __init__(self, source, target, address, ports, far=True):
        self.ports, self.sent, self.stop = ports, 0, threading.Event()
        self.out = socket_in(source, socket.SOCK_DGRAM)
        self.address, self.got, self.ins = address, {port: 0 for port in ports}, {}
        for port in ports if far else ():
            sock = socket_in(target, socket.SOCK_DGRAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            sock.bind(("0.0.0.0", port))
            self.ins[sock] = port

    def __enter__(self):
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._send, self._receive)]
        for thread in self.threads:
            thread.start()
        return self

    def _send(self):
        while not self.stop.wait(0.0005):
            for port in self.ports:
                try:
                    self.out.sendto(b"x", (self.address, port))
                except OSError:
                    pass      # the router said that there is no way
            self.sent += 1

    def _receive(self):
        while True:
            ready = select.select(list(self.ins), [], [], 0.05)[0]
            for sock in ready:
                sock.recv(100)
                self.got[self.ins[sock]] += 1
            if not ready and self.stop.is_set():
                return

    def __exit__(self, *_):
        self.stop.set()
        for thread in self.threads:
            thread.join()
        for sock in list(self.ins) + [self.out]:
            sock.close()


class WindowTest(SandboxTest):
    """While rules are replaced, what is denied before and after is denied in between, and what is allowed passes."""

    def test_apply_policy_under_fire(self):
        vpcctl("create", "one", "--cidr", "10.91.0.0/16")
        vpcctl("add-subnet", "one", "x", "--cidr", "10.91.1.0/24")
        vpcctl("add-subnet", "one", "y", "--cidr", "10.91.2.0/24")
        rule = lambda port, action: {"protocol": "udp", "port": port, "action": action}
        policies = [{"ingress": [rule(7001, "allow")]},
                    {"ingress": [rule(7002, "deny"), rule(7001, "allow")]},
                    {"ingress": [rule("7002-7010", "deny")], "egress": [rule(53, "deny")]},
                    {"ingress": [rule("7000-7001", "allow"), rule("1-6999", "allow")], "default": {"ingress": "deny"}}]
        paths = [self.file("p%d.json" % number, dict(policy, subnet="y")) for number, policy in enumerate(policies)]
        vpcctl("apply-policy", "one", paths[0])
        with Stream("ns-one-x", "ns-one-y", "10.91.2.2", (7001, 7002)) as stream:
            for number in range(1, 9):
                vpcctl("apply-policy", "one", paths[number % 4])
            # with a rule of the user's own among ours, they are taken out one by one, still in one transaction
            in_ns("ns-one-y", ["iptables", "-I", "INPUT", "1", "-p", "udp", "--dport", "9999", "-j", "ACCEPT"])
            for number in range(1, 9):
                vpcctl("apply-policy", "one", paths[number % 4])
            in_ns("ns-one-y", ["iptables", "-D", "INPUT", "-p", "udp", "--dport", "9999", "-j", "ACCEPT"])
            vpcctl("restore", "one")
        self.assertGreater(stream.sent, 200)
        self.assertEqual(stream.got[7002], 0, "%d of %d denied datagrams got through" % (stream.got[7002], stream.sent))
        self.assertGreaterEqual(stream.got[7001], stream.sent - 1, "allowed ones were lost")

    def test_every_change_under_fire(self):
        """Whatever is changed around them, two VPCs that are not peered never hear of each other."""
        for vpc, number in (("one", 91), ("two", 92), ("three", 93)):
            vpcctl("create", vpc, "--cidr", "10.%d.0.0/16" % number)
            vpcctl("add-subnet", vpc, "s", "--cidr", "10.%d.1.0/24" % number)
        net = internet_pid()
        with Stream("ns-one-s", "ns-two-s", "10.92.1.2", (7001,)) as across, \
                Stream("ns-one-s", None, "192.0.2.2", (7003,)) as host, \
                Stream("ns-one-s", None, "10.92.1.1", (7004,)) as gateway, \
                Stream(net, "ns-one-s", "10.91.1.2", (7005,)) as inward, \
                Stream("ns-two-s", net, "203.0.113.1", (7006,)) as outward, \
                Stream("ns-three-s", "ns-three-s", "10.93.1.2", (7007,)) as control:
            with contextlib.ExitStack() as stack:
                stack.callback(settle, "nsenter", "-t", str(net), "-n", "ip", "route", "del", "10.0.0.0/8")
                settle("nsenter", "-t", str(net), "-n", "ip", "route", "add", "10.0.0.0/8", "via", "192.0.2.2")
                for words in ("peer one three --allow-cidrs 10.91.1.0/24,10.93.1.0/24",
                              "peer two three --allow-cidrs 10.92.1.0/24,10.93.1.0/24",
                              "enable-nat one --interface eth0", "publish one s --port 80:80 --interface eth0",
                              "add-subnet one more", "add-subnet two more", "reset-policy one s", "unpeer one three",
                              "disable-nat one", "unpublish one s --port 80", "delete-subnet one more", "delete three"):
                    vpcctl(*words.split())
                # the host's own addresses are the firewall's alone: counted up to here
                self.assertEqual(host.got[7003] + gateway.got[7004], 0, "the host was reached")
                self.assertGreater(host.sent, 100)
                settle("iptables", "-F")
                settle("iptables", "-X")
                wait_until(lambda before=across.sent: across.sent > before + 5, LONG, "more datagrams")
                vpcctl("restore")
                wait_until(lambda before=across.sent: across.sent > before + 5, LONG, "more datagrams")
        self.assertGreater(across.sent, 100)
        self.assertGreater(control.got[7007], 100, "the control heard nothing")
        for stream in (across, inward, outward):
            self.assertEqual(set(stream.got.values()), {0}, stream.address)


class LargeTest(SandboxTest):
    """A policy of a thousand rules holds, also where the kernel takes only small transactions (without real root)."""

    def test_a_thousand_rules(self):
        for words in ("create blog --cidr 10.20.0.0/16", "add-subnet blog web --cidr 10.20.1.0/24",
                      "add-subnet blog db --cidr 10.20.2.0/24"):
            vpcctl(*words.split())
        for ports in (range(2000, 3000), range(4000, 4010), range(2500, 3500)):
            vpcctl("apply-policy", "blog", self.file("large.json", {"subnet": "db", "egress": [], "ingress": [
                {"port": port, "protocol": "tcp", "action": "allow"} for port in ports]}))
            vpcctl("verify")
            for port in (2000, 2999, 4000, 4009, 3499):
                if port in ports:
                    self.assert_refused("ns-blog-web", "10.20.2.2", port)      # the way is free, nobody listens
                else:
                    self.assert_dropped("ns-blog-web", "10.20.2.2", port)


if __name__ == "__main__":
    unittest.main()
