"""Protocol `all`, and what iptables makes of policies: as it prints them, and what real packets do."""

import concurrent.futures
import contextlib
import errno
import io
import os
import random
import select
import socket
import sys
import unittest
from unittest import mock

import netfilter
from cli_values import mutated, random_policy
from e2e_policy import load_vpcctl
from support import (LONG, SHORT, SandboxTest, in_ns, ping, socket_in, subnet, tcp_listener, tcp_open, udp_answers,
                     udp_listener, vpcctl)
from unit_core import tool

EXPERIMENT = 253     # a protocol number that nobody else uses (RFC 3692)
UDPLITE = 136


@contextlib.contextmanager
def raw_listener(ns):
    """A socket that takes the protocol EXPERIMENT."""
    with contextlib.closing(socket_in(ns, socket.SOCK_RAW, EXPERIMENT)) as sock:
        yield sock


def arrives(sock, ns, address, timeout=SHORT):
    """Whether a packet of the protocol EXPERIMENT, sent in `ns`, arrives at a listener."""
    text = b"vpcctl %s" % os.urandom(8).hex().encode()
    with contextlib.closing(socket_in(ns, socket.SOCK_RAW, EXPERIMENT)) as sender:
        try:
            sender.sendto(text, (address, 0))
        except PermissionError:
            return False
        while select.select([sock], [], [], timeout)[0]:
            if text in sock.recv(2048):
                return True
    return False


class AllTest(SandboxTest):
    """A rule for `all` speaks of every protocol, also of those that no rule can name."""

    def setUp(self):
        SandboxTest.setUp(self)
        vpcctl("create", "blog", "--cidr", "10.20.0.0/16")
        self.ends = {}
        for number, name in enumerate(("web", "db", "other"), 1):
            vpcctl("add-subnet", "blog", name, "--cidr", "10.20.%d.0/24" % number)
            self.ends[name] = subnet("blog", name)

    def policy(self, target, **more):
        vpcctl("--quiet", "apply-policy", "blog", self.file("policy.json", dict(more, subnet=target)))

    def ways(self, source, sock):
        """What of tcp, udp, icmp and another protocol gets from a subnet to db."""
        ns, address = self.ends[source]["ns"], self.ends["db"]["host_ip"]
        tries = {"tcp": lambda: tcp_open(ns, address, 5432) == "open", "udp": lambda: udp_answers(ns, address, 53),
                 "icmp": lambda: ping(ns, address), "all": lambda: arrives(sock, ns, address)}
        with concurrent.futures.ThreadPoolExecutor(len(tries)) as pool:      # a thread is in a namespace by itself
            found = {protocol: pool.submit(call) for protocol, call in tries.items()}
            return {protocol: answer.result() for protocol, answer in found.items()}

    def check(self, sock, web, other):
        """Packets from web and from other to db do as wanted, and `explain` says the same."""
        world = tool.Store(os.environ["VPCCTL_DATA"]).load()[0]
        for source, wanted in (("web", web), ("other", other)):
            self.assertEqual(self.ways(source, sock), wanted, source)
            for protocol, port in (("tcp", 5432), ("udp", 53), ("icmp", None), ("all", None)):
                hops = tool.explain_path(world, "blog", source, "db", port, protocol)
                blocking = [hop for hop in hops if hop.ok is False and hop.where != "listening"]
                self.assertEqual(not blocking, wanted[protocol], hops)

    def test_packets(self):
        every = dict.fromkeys(("tcp", "udp", "icmp", "all"), True)
        none = dict.fromkeys(every, False)
        db = self.ends["db"]["ns"]
        with tcp_listener(db, 5432), udp_listener(db, 53), raw_listener(db) as sock:
            self.policy("db")
            self.check(sock, every, every)
            # what could be named before passes by nothing but its own rules
            self.policy("db", ingress=[{"protocol": kind, "action": "deny", "from": "web"} for kind in ("tcp", "udp", "icmp")])
            self.check(sock, dict(none, all=True), every)
            self.policy("db", ingress=[{"protocol": "all", "action": "deny", "from": "web"}])
            self.check(sock, none, every)
            self.policy("db", ingress=[{"protocol": "all", "action": "allow", "from": "other"}])
            self.check(sock, none, every)
            self.policy("db", ingress=[{"protocol": "all", "action": "allow"},
                                       {"protocol": "tcp", "port": 5432, "action": "deny", "from": "web"}])
            self.check(sock, dict(every, tcp=False), every)
            self.policy("db")
            self.policy("web", egress=[{"protocol": "all", "action": "deny", "to": "10.20.2.0/24"}])
            self.check(sock, none, every)
            self.assertEqual(vpcctl("verify").code, 0)

    def test_remedy(self):
        """The way out of a deny of everything opens what was asked for, and nothing else."""
        db, web = self.ends["db"]["ns"], {"tcp": True, "udp": False, "icmp": False, "all": False}
        with tcp_listener(db, 5432), tcp_listener(db, 5433), udp_listener(db, 53), raw_listener(db) as sock:
            self.policy("db", ingress=[{"protocol": "all", "action": "deny"}])
            self.check(sock, dict.fromkeys(web, False), dict.fromkeys(web, False))
            text = vpcctl("explain", "blog", "web", "db", "--port", 5432, "--policy").out
            vpcctl("--quiet", "apply-policy", "blog", "-", input=text)
            self.check(sock, web, dict.fromkeys(web, False))
            self.assertEqual(tcp_open(self.ends["web"]["ns"], self.ends["db"]["host_ip"], 5433), "dropped")

    def test_answers_and_errors(self):
        """A deny of everything that goes out leaves what answers: replies, and "nothing listens there"."""
        db, web = self.ends["db"], self.ends["web"]
        self.policy("db", egress=[{"protocol": "all", "action": "deny"}])
        with tcp_listener(db["ns"], 5432), contextlib.closing(socket_in(web["ns"], socket.SOCK_DGRAM)) as sock:
            self.assertEqual(tcp_open(web["ns"], db["host_ip"], 5432, LONG), "open")
            sock.settimeout(LONG)
            sock.connect((db["host_ip"], 9999))
            sock.send(b"x")
            self.assertRaises(ConnectionRefusedError, sock.recv, 1)
            self.assertFalse(ping(db["ns"], web["host_ip"]))

    def test_open_flows_end(self):
        """A new deny of everything ends what is open, in both directions."""
        db, web = self.ends["db"], self.ends["web"]
        with raw_listener(db["ns"]) as near, raw_listener(web["ns"]) as far:
            self.policy("db")
            self.assertTrue(arrives(near, web["ns"], db["host_ip"], LONG))
            self.assertTrue(arrives(far, db["ns"], web["host_ip"], LONG))
            self.policy("db", ingress=[{"protocol": "all", "action": "deny", "from": "web"}],
                        egress=[{"protocol": "all", "action": "deny", "to": "web"}])
            self.assertFalse(arrives(near, web["ns"], db["host_ip"]))
            self.assertFalse(arrives(far, db["ns"], web["host_ip"]))
            self.assertTrue(arrives(near, self.ends["other"]["ns"], db["host_ip"], LONG))

    def test_udp_lite(self):
        """A protocol that any user may speak, and that passes a list of denies of tcp, udp and icmp."""
        db, web = self.ends["db"], self.ends["web"]
        try:
            taker = socket_in(db["ns"], socket.SOCK_DGRAM, UDPLITE)
        except OSError as error:
            if error.errno in (errno.EPROTONOSUPPORT, errno.EINVAL):
                self.skipTest("this kernel has no UDP-Lite")
            raise
        taker.bind(("0.0.0.0", 53))
        self.addCleanup(taker.close)
        sender = socket_in(web["ns"], socket.SOCK_DGRAM, UDPLITE)
        self.addCleanup(sender.close)

        def passes(timeout):
            with contextlib.suppress(PermissionError):
                sender.sendto(b"x", (db["host_ip"], 53))
            found = bool(select.select([taker], [], [], timeout)[0])
            if found:
                taker.recv(100)
            return found
        for rules, wanted in (([{"protocol": kind, "action": "deny"} for kind in ("tcp", "udp", "icmp")], True),
                              ([{"protocol": "all", "action": "deny"}], False)):
            self.policy("web", egress=rules)
            self.assertEqual(passes(LONG if wanted else SHORT), wanted)


class PrintedTest(SandboxTest):
    """A fixed sample of generated policies: what iptables prints of them decides as `explain` does, and is known again."""

    ROUNDS, SEED = 40, 77

    @staticmethod
    def apply(module, text):
        """Apply a policy in process -> (exit code, what was printed)."""
        said = io.StringIO()
        with mock.patch.object(sys, "stdin", io.StringIO(text)):
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                code = module.main(["apply-policy", "blog", "-"])
        os.close(module.held)
        return code, said.getvalue()

    def test_printed_rules(self):
        dice, done, compared = random.Random(self.SEED), 0, 0
        vpcctl("create", "blog", "--cidr", "10.20.0.0/16")
        for name, block in (("web", "10.20.1.0/24"), ("db", "10.20.2.0/24")):
            vpcctl("add-subnet", "blog", name, "--cidr", block)
        siblings = [subnet("blog", "web"), subnet("blog", "db")]
        blocks = {one["name"]: one["cidr"] for one in siblings}
        module = load_vpcctl()
        while done < self.ROUNDS:
            text = mutated(dice, random_policy(dice), (0, 0, 1))
            before = subnet("blog", "web")["policy"]
            code, said = self.apply(module, text)
            if code:
                self.assertEqual(code, 2, said)
                self.assertEqual(subnet("blog", "web")["policy"], before)
                continue
            done += 1
            ends = [one for one in (subnet("blog", "web"), subnet("blog", "db")) if one["policy"] != tool.DEFAULT_POLICY]
            for end in ends:
                printed = in_ns(end["ns"], ["iptables-save", "-t", "filter"])
                self.assertEqual(printed.code, 0, str(printed))
                rules = [tuple(word.strip('"') for word in line.split()) for line in printed.out.splitlines() if line.startswith("-A")]
                flows = list(netfilter.flows(end["policy"], blocks))
                for flow in dice.sample(flows, min(len(flows), 60)):
                    said = tool.policy_decision(end["policy"], *flow, siblings=siblings)[0]
                    self.assertEqual(netfilter.flow_passes(rules, *flow[:3], own=end["host_ip"], other=flow[3]), (said, said),
                                     "%s\n%s\n%s" % (text, flow, printed.out))
                    compared += 1
            if done % 10 == 0:
                vpcctl("verify")
            self.assertIn("has this policy already", self.apply(module, text)[1])
        self.assertGreater(compared, 1000)


if __name__ == "__main__":
    unittest.main()
