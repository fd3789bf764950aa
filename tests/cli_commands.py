"""The command line in process: what is printed, what is refused, with which exit code. No root, no process started."""

import contextlib
import io
import json
import os
import random
import re
import sys
import tempfile
import unittest
from unittest import mock

from support import VPCCTL, run
from unit_core import POLICIES, make_vpc, tool


# What these do is to look: --dry-run does not keep them from it, and `logs -f` never ends.
ASKS = ("verify", "logs")


class Answer:
    """What a command line came to."""

    def __init__(self, words, code, out, err):
        self.words, self.code, self.out, self.err = words, code, out, err

    def __str__(self):
        return "$ vpcctl %s\nexit code %s\n--- stdout\n%s--- stderr\n%s" % (" ".join(self.words), self.code, self.out,
                                                                         self.err)


class CliTest(unittest.TestCase):
    """Calls main() with a data folder of its own; whatever would start a process fails the test."""

    maxDiff = None

    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="vpcctl-cli-")
        self.addCleanup(folder.cleanup)
        self.top = os.path.realpath(folder.name)
        self.data = os.path.join(self.top, "data")

    def records(self):
        """Write the records of two VPCs: blog (web, db) and shop (api)."""
        world = {}
        make_vpc(world, "blog", "10.20.0.0/16", ("web", "10.20.1.0/24"), ("db", "10.20.2.0/24"))
        make_vpc(world, "shop", "10.30.0.0/16", ("api", "10.30.1.0/24"))
        os.mkdir(self.data, 0o755)
        self.write(world)
        return world

    def write(self, world):
        """Write records."""
        for vpc in world.values():
            with open(os.path.join(self.data, "vpc_%s.json" % vpc["name"]), "w") as handle:
                json.dump(vpc, handle)

    def cli(self, *words, code=0, input="", root=True):
        """Run a command line; returns its Answer. A process, or another exit code, fails the test."""
        def forbidden(*args, **_):
            raise AssertionError("a process was started: %r" % (args,))
        words = [str(word) for word in words]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.ExitStack() as stack:
            for target, name, value in (
                    (tool, "popen", forbidden), (tool, "call", forbidden), (os, "execvp", forbidden),
                    (os, "execv", forbidden), (os, "fork", forbidden), (os, "system", forbidden),
                    (sys, "stdin", io.StringIO(input)), (sys, "stdout", out), (sys, "stderr", err)):
                stack.enter_context(mock.patch.object(target, name, value))
            # who is not root goes on as if: the folder is then the caller's own
            stack.enter_context(mock.patch.object(tool, "need_root", lambda: None) if root else
                                mock.patch.object(os, "geteuid", lambda: 1000))
            stack.enter_context(mock.patch.dict(os.environ, {"VPCCTL_DATA": self.data, "COLUMNS": "80"}))
            try:
                found = tool.main(words)
            except Exception as error:
                raise AssertionError("a traceback: %r for %r" % (error, words)) from error
        answer = Answer(words, found, out.getvalue(), err.getvalue())
        if code is not None and found != code:
            raise AssertionError("exit code %s, expected %s\n%s" % (found, code, answer))
        return answer

    def refused(self, *words, text, hint="", code=2, **options):
        """Refused in one clear line that holds `text`, and perhaps a second with what to do; nothing was run."""
        answer = self.cli(*words, code=code, **options)
        self.assertEqual(answer.out, "", str(answer))
        self.assert_clear(answer)
        self.assertIn(text, answer.err.splitlines()[0], str(answer))
        if hint:
            self.assertIn(hint, answer.err, str(answer))
        return answer

    def assert_clear(self, answer):
        """stderr is one line `vpcctl: what`, and at most one more, indented, with what to do; notes may stand before."""
        lines = [line for line in answer.err.split("\n")[:-1] if not line.startswith("note: ")]
        self.assertTrue(1 <= len(lines) <= 2 and lines[0].startswith("vpcctl: "), str(answer))
        self.assertTrue(len(lines) < 2 or re.match(r"  \S", lines[1]), str(answer))
        self.assertFalse(re.search(r"[\x00-\x09\x0b-\x1f\x7f]", answer.err), repr(answer.err))
        self.assertNotIn("Traceback", answer.err)

    def tree(self):
        """Every file under the test's folder with its content."""
        found = {}
        for folder, folders, files in os.walk(self.top):
            found.update((os.path.join(folder, name), None) for name in folders)
            for name in files:
                with open(os.path.join(folder, name)) as handle:
                    found[os.path.join(folder, name)] = handle.read()
        return found

    def assert_in_order(self, lines, expected):
        """Each pattern is found in a line of its own, in this order."""
        at = 0
        for pattern in expected:
            while at < len(lines) and not re.match(pattern + r"\Z", lines[at]):
                at += 1
            self.assertLess(at, len(lines), "not (or not in this order): %s\n%s" % (pattern, "\n".join(lines)))
            at += 1


class WhyTest(CliTest):
    """--why: each rule of a policy has a reason of its own."""

    def reasons(self, policy):
        """The reasons of the rules that a policy of subnet db of VPC blog leads to."""
        path = os.path.join(self.top, "policy.json")
        with open(path, "w") as handle:
            json.dump(dict(policy, subnet="db"), handle)
        lines = self.cli("--dry-run", "--why", "apply-policy", "blog", path, root=False).out.splitlines()
        rules = [re.search(r" -A (\S+) .* --comment (\S+)   # (.*)", line) for line in lines]
        return [found.groups() for found in rules if found]

    def test_each_rule(self):
        self.records()
        found = self.reasons({"ingress": [{"port": 22, "protocol": "tcp", "action": "deny"},
                                          {"port": 5432, "protocol": "tcp", "action": "allow", "from": "web"}],
                              "egress": [{"port": 80, "protocol": "tcp", "action": "allow"}]})
        for chain, comment, reason in (
                ("INPUT", "policy-ingress-deny-22", "ingress rule 1, deny tcp/22"),
                ("INPUT", "policy-ingress-allow-5432", "ingress rule 2, allow tcp/5432 from web"),
                ("INPUT", "policy-ingress-replies-allow-80", "replies to egress rule 1, allow tcp/80"),
                ("INPUT", "policy-ingress-replies", "no other replies"),
                ("OUTPUT", "policy-egress-replies-deny-22", "no replies to ingress rule 1, deny tcp/22"),
                ("OUTPUT", "policy-egress-replies", "replies to what was let in"),
                ("OUTPUT", "policy-egress-allow-80", "egress rule 1, allow tcp/80"),
                ("OUTPUT", "policy-egress-default-deny",
                 "everything else out: dropped, since a list of only allows is an allow-list")):
            self.assertIn((chain, comment, reason), found)
        self.assertNotIn("policy-ingress-default-deny", [comment for _, comment, _ in found])
        found = self.reasons({"ingress": [], "egress": [], "default": {"ingress": "deny"}})
        self.assertIn(("INPUT", "policy-ingress-default-deny", "everything else in: dropped, since its default says so"), found)

    def test_of_a_new_subnet(self):
        self.records()
        out = self.cli("--dry-run", "--why", "add-subnet", "blog", "new", "--cidr", "10.20.9.0/24", root=False).out
        self.assertIn("   # ingress rule 3, deny tcp/22\n", out)
        self.assertIn("   # replies to what was let out\n", out)


class DryRunTest(CliTest):
    """--dry-run: the guide's commands in the guide's order; nothing is written, nothing started, no root needed."""

    def test_create(self):
        answer = self.cli("--dry-run", "create", "blog", "--cidr", "10.20.0.0/16", root=False)
        self.assertEqual(answer.err, "")
        self.assert_in_order(answer.out.splitlines(), [
            r">>> ip link add br-blog type bridge",
            r">>> ip addr add 10\.20\.0\.1/16 dev br-blog",
            r">>> ip link set br-blog up",
            r">>> iptables -N vpc-blog"])
        for line in answer.out.splitlines():
            self.assertRegex(line, r"^>>> (ip|bridge|iptables|sysctl|mkdir|printf|ln) ")

    def test_add_subnet(self):
        self.records()
        answer = self.cli("add-subnet", "blog", "webserver", "--cidr", "10.20.7.0/24", "--dry-run", root=False)
        self.assertEqual(answer.err, "")
        self.assert_in_order(answer.out.splitlines(), [
            r">>> ip netns add ns-blog-webserver",
            r">>> ip link add v-blog-webser-a .*type veth peer name v-blog-webser-b",
            r">>> ip link set v-blog-webser-b master br-blog",
            r">>> ip -n ns-blog-webserver addr add 10\.20\.7\.2/24 dev v-blog-webser-a",
            r">>> ip -n ns-blog-webserver link set v-blog-webser-a up",
            r">>> ip netns exec ns-blog-webserver iptables -A INPUT -p tcp --dport 22 -j DROP .*",
            r">>> ip netns exec ns-blog-webserver iptables -A INPUT -p tcp --dport 80 -j ACCEPT .*",
            r">>> ip link set v-blog-webser-b up"])

    def test_the_guide_s_previews_without_a_vpc(self):
        self.cli("--dry-run", "create", "test", "--cidr", "10.99.0.0/16", root=False)
        answer = self.cli("--dry-run", "add-subnet", "test", "web", "--cidr", "10.99.1.0/24", root=False)
        self.assertIn(">>> ip netns add ns-test-web\n", answer.out)
        self.assertNotIn("ip link add br-test", answer.out)
        self.assertEqual(answer.err, "note: there is no VPC test yet; this is what would run if there were\n")
        self.assertFalse(os.path.exists(self.data))

    def test_other_commands(self):
        self.records()
        for words, expected in (
                ("enable-nat blog --interface eth0", [
                    r">>> iptables -t nat -A POSTROUTING -s 10\.20\.0\.0/16 -o eth0 -j MASQUERADE "
                    r"-m comment --comment vpcctl-nat-blog",
                    r">>> sysctl -w net\.ipv4\.ip_forward=1"]),
                ("peer blog shop --allow-cidrs 10.20.1.0/24,10.30.1.0/24", [
                    r">>> ip link add pv-blog-shop-a type veth peer name pv-blog-shop-b",
                    r">>> ip link set pv-blog-shop-a master br-blog",
                    r">>> ip link set pv-blog-shop-b master br-shop",
                    r">>> iptables -N vpc-peer-blog-shop",
                    r">>> iptables .*vpc-peer-blog-shop .*-s 10\.20\.1\.0/24 -d 10\.30\.1\.0/24 .*-j ACCEPT "
                    r"-m comment --comment peer-allow",
                    r">>> ip link set pv-blog-shop-a up"]),
                ("deploy-app blog web --port 8080", [
                    r">>> ip netns exec ns-blog-web setpriv .*python3 -m http\.server 8080 &"]),
                ("delete blog", [r">>> ip link del v-blog-web-b", r">>> ip link del br-blog",
                                 r">>> ip netns del ns-blog-(web|db)"])):
            answer = self.cli("--dry-run", *words.split(), root=False)
            with self.subTest(words):
                self.assert_in_order(answer.out.splitlines(), expected)
                self.assertNotIn("ed VPC: ", answer.out, "it says that it was done, but it was not")

    def test_apply_policy(self):
        world = self.records()
        path = os.path.join(self.top, "p.json")
        with open(os.path.join(POLICIES, "database.json")) as handle:
            policy = dict(json.load(handle), subnet=world["blog"]["subnets"][1]["cidr"])
        with open(path, "w") as handle:
            json.dump(policy, handle)
        lines = self.cli("--dry-run", "apply-policy", "blog", path, root=False).out.splitlines()
        expected = [r">>> ip netns exec ns-blog-db iptables -A %s -p tcp --dport %s -j %s -m comment --comment policy-%s"
                    % rule for rule in (("INPUT", "22", "DROP", "ingress-deny-22"),
                                        ("INPUT", "5432", "ACCEPT", "ingress-allow-5432"),
                                        ("OUTPUT", "80", "ACCEPT", "egress-allow-80"),
                                        ("OUTPUT", "443", "ACCEPT", "egress-allow-443"))]
        self.assert_in_order(lines, expected)
        self.assertEqual(self.cli("--dry-run", "apply-policy", "blog", "-", input=json.dumps(policy),
                                  root=False).out.splitlines(), lines)

    def test_every_command_leaves_no_trace(self):
        """Each command's own example, without root: no process, no file, no traceback."""
        for records in (False, True):
            if records:
                self.records()
            before = self.tree()
            for name, entry in sorted(tool.COMMANDS.items()):
                if name in ASKS:
                    continue
                answer = self.cli("--dry-run", *entry["example"], code=None, root=False)
                self.assertIn(answer.code, (0, 1, 2, 4), str(answer))
                if answer.code == 2:
                    self.assert_clear(answer)
                self.assertEqual(self.tree(), before, str(answer))

    def test_why(self):
        plain = self.cli("--dry-run", "create", "x", "--cidr", "10.9.0.0/16").out.splitlines()
        lines = self.cli("--dry-run", "--why", "create", "x", "--cidr", "10.9.0.0/16").out.splitlines()
        self.assertEqual([line.partition("   # ")[0] for line in lines], plain)
        for line in lines:
            self.assertRegex(line, r"^>>> \S.*\S   # \w[^#]{3,90}$")

    def test_global_options_before_and_after(self):
        expected = self.cli("--dry-run", "--why", "create", "x", "--cidr", "10.9.0.0/16").out
        for words in ("create --dry-run --why x --cidr 10.9.0.0/16", "create x --cidr 10.9.0.0/16 --why --dry-run",
                      "--why create x --cidr 10.9.0.0/16 --dry-run", "--dry-run create x --why --cidr=10.9.0.0/16"):
            self.assertEqual(self.cli(*words.split()).out, expected, words)
        self.records()
        other = os.path.join(self.top, "other")
        for words in (("--data-dir", other, "list"), ("list", "--data-dir", other), ("list", "--data-dir=" + other)):
            self.assertIn("none yet", self.cli(*words).out)
        self.assertFalse(os.path.exists(other))
        self.assertIn("- blog", self.cli("list").out)

    def test_an_option_s_value_that_is_a_command_s_name(self):
        for folder in ("list", "create", "peer"):
            answer = self.cli("--data-dir", os.path.join(self.top, folder), "--dry-run", "create", "list",
                              "--cidr", "10.9.0.0/16")
            self.assertIn("br-list", answer.out)
        here = os.getcwd()
        self.addCleanup(os.chdir, here)
        os.chdir(self.top)
        self.assertIn("br-x", self.cli("--data-dir", "list", "--dry-run", "create", "x", "--cidr", "10.9.0.0/16").out)

    def test_version_and_help(self):
        for words in (["--version"], ["list", "--version"], ["create", "--version"]):
            self.assertRegex(self.cli(*words, root=False).out, r"\Avpcctl \d+\.\d+\.\d+\n\Z")
        text = self.cli("--help", root=False).out
        for name, entry in tool.COMMANDS.items():
            if entry["hidden"]:
                self.assertNotIn(name, text)
                continue
            self.assertIn("\n    %s" % name, text)
            own = self.cli(name, "--help", root=False).out
            self.assertIn("vpcctl " + name, own)
            self.assertIn("Example:  vpcctl " + name, re.sub(r"\s+vpcctl", "  vpcctl", own))

    def test_no_command(self):
        answer = self.cli(code=2)
        self.assertIn("usage: vpcctl", answer.out + answer.err)


class ReadTest(CliTest):
    """list, inspect: only their answer, no root."""

    def test_list(self):
        self.records()
        with mock.patch.object(tool, "host_interfaces", lambda: ["lo", "br-blog", "br-shop"]):
            self.assertEqual(self.cli("list", root=False).out, "VPCs:\n- blog\n- shop\n")
        with mock.patch.object(tool, "host_interfaces", lambda: ["lo", "br-blog"]):
            self.assertEqual(self.cli("list", root=False).out, "VPCs:\n- blog\n- shop   (down: vpcctl restore)\n")

    def test_list_of_none(self):
        answer = self.cli("list", root=False)
        self.assertRegex(answer.out, r"\AVPCs: none yet; `vpcctl create .*\n\Z")
        self.assertFalse(os.path.exists(self.data))

    def test_inspect(self):
        self.records()
        seen = json.loads(self.cli("inspect", "blog", root=False).out)
        self.assertEqual((seen["name"], seen["cidr"], seen["bridge"]), ("blog", "10.20.0.0/16", "br-blog"))
        self.assertEqual([(s["name"], s["ns"], s["gw"], s["host_ip"]) for s in seen["subnets"]],
                         [("web", "ns-blog-web", "10.20.1.1", "10.20.1.2"), ("db", "ns-blog-db", "10.20.2.1", "10.20.2.2")])
        self.assertEqual(seen["apps"], [])

    def test_inspect_a_subnet(self):
        world = self.records()
        web = world["blog"]["subnets"][0]
        web["policy"] = {"ingress": [{"port": 80, "protocol": "tcp", "action": "allow", "from": "db"}], "egress": []}
        world["blog"]["apps"].append(dict(tool.new_app(world["blog"], web, 80, ["x\033[1m"]), pid=0))
        world["blog"].update(nat={"interface": "eth0", "subnets": ["db"], "dns": []}, forward={"was": "0", "kept_off": []},
                             published=[{"subnet": "web", "host_port": 8080, "port": 80, "protocol": "tcp", "interface": "eth0"}])
        for one, other, side in (("blog", "shop", "a"), ("shop", "blog", "b")):
            world[one]["peers"].append({"peer_vpc": other, "veth_a": "pv-a", "veth_b": "pv-b", "chain": "vpc-peer-blog-shop",
                                        "allowed": ["10.20.1.0/24", "10.30.0.0/16"], "side": side})
        self.write(world)
        rows = [line.split(None, 1) for line in self.cli("inspect", "blog", "web", root=False).out.splitlines()]
        self.assertEqual([row for row in rows if row[0] not in ("namespace", "app")], [
            ["subnet", "blog/web, 10.20.1.0/24"], ["address", "10.20.1.2, by way of the gateway 10.20.1.1"],
            ["ingress", "allow tcp/80 from db; everything else is dropped (a list of only allows is an allow-list)"],
            ["egress", "everything is let through (an empty list passes everything)"],
            ["published", "tcp/8080 of eth0 leads to tcp/80"], ["NAT", "none: the internet is out of reach"],
            ["peer", "shop: 10.30.0.0/16"]])
        self.assertEqual(dict(rows)["app"], "tcp/80 'x\\x1b[1m': exited; it has no log")
        self.assertTrue(dict(rows)["namespace"].endswith("; down: vpcctl restore"))
        rows = [line.split(None, 1) for line in self.cli("inspect", "blog", "db", root=False).out.splitlines()]
        self.assertEqual([row[0] for row in rows], ["subnet", "address", "namespace", "ingress", "egress", "NAT"])
        self.assertEqual(dict(rows)["NAT"], "by eth0")
        part = json.loads(self.cli("inspect", "blog", "web", "--json").out)
        self.assertEqual((part["vpc"], part["subnet"], len(part["apps"]), part["nat"]), ("blog", web, 1, None))
        self.assertEqual((part["published"], part["peers"]), (world["blog"]["published"], world["blog"]["peers"]))
        self.refused("inspect", "blog", "wbe", text="no subnet named 'wbe'", hint="'web'")

    def test_ps(self):
        self.assertIn("Apps: none yet", self.cli("ps", root=False).out)
        world = self.records()
        self.assertEqual(json.loads(self.cli("ps", "--json").out), {"apps": []})
        blog = world["blog"]
        for number, program in ((8080, []), (81, ["sleep\033[1m", "1" * 50])):
            blog["apps"].append(dict(tool.new_app(blog, blog["subnets"][0], number, program), pid=4242, start="b/1"))
        self.write(world)
        with open(os.path.join(self.data, blog["apps"][0]["log"]), "w") as handle:
            handle.write("first\n\033]0;last\007\n\n")
        lines = self.cli("ps", root=False).out.splitlines()
        self.assertEqual(lines[0].split(), ["VPC", "SUBNET", "PORT", "PROGRAM", "PID", "STATE", "LISTENS", "ON"])
        self.assertEqual(lines[1].split(), ["blog", "web", "tcp/8080", "(page)", "-", "exited", "-"])
        self.assertIn("sleep\\x1b[1m", lines[2])
        self.assertLess(len(lines[2]), 100)
        self.assertRegex(lines[3], r"^blog/web tcp/8080: its log, last written .*, ends with: \\x1b\]0;last\\x07$")
        self.assertEqual(lines[4:], ["blog/web tcp/81: it has no log"])
        self.assertEqual(len(self.cli("ps", "shop").out.splitlines()), 1)
        self.refused("ps", "blgo", text="no VPC named 'blgo'", hint="'blog'")
        with open(os.path.join(self.data, "vpc_shop.json"), "w") as handle:
            handle.write("{")
        self.assertIn("record of VPC shop is unreadable", self.cli("ps").err)
        self.assertIn(" 0 of 2 up ", self.cli("list", "--long").out)

    def test_completion_of_subnets(self):
        self.records()
        self.assertEqual(self.cli("__complete", "inspect", "blog", "").out.splitlines()[:2], ["web", "db"])
        self.assertEqual(self.cli("__complete", "ps", "").out.splitlines()[:2], ["blog", "shop"])

    def test_how_an_app_runs(self):
        for text in (self.cli("deploy-app", "--help").out, self.cli("man").out.replace("\\-", "-")):
            for word in ("user of its own", "--env", "--workdir", "HOME=/", "foreground", "background"):
                self.assertIn(word, text)

    def test_flag_check(self):
        self.assertEqual(self.cli("flag-check", root=False).out, "Parser check OK\n")

    def test_a_damaged_record_does_not_hide_the_others(self):
        self.records()
        for text in ("{", "", "[]", '{"name": "blog"}', "\x00\xff", "9" * 5000, "[" * 100000):
            with open(os.path.join(self.data, "vpc_blog.json"), "w", encoding="latin-1") as handle:
                handle.write(text)
            self.assertRegex(self.cli("list").out, r"- blog   \(record unreadable: .*\)\n- shop")
            self.refused("inspect", "blog", text="the record of VPC blog is unreadable: " + self.data,
                         hint="delete --force blog")
            self.assertEqual(json.loads(self.cli("inspect", "shop").out)["name"], "shop")


class RefusalTest(CliTest):
    """Bad input: one clear line, exit code 2, nothing run, nothing written."""

    def setUp(self):
        CliTest.setUp(self)
        self.records()
        before = self.tree()
        self.addCleanup(lambda: self.assertEqual(self.tree(), before))

    def dry(self, line, text, hint=""):
        return self.refused("--dry-run", *line.split(), text=text, hint=hint)

    def test_names(self):
        for name in ("", "-", "../x", "a b", "a/b", "a.b", "_x", "x" * 33, "caf\u00e9", "a;reboot", "$(reboot)", "a\nb",
                     "\x1b[31m", "\udcff", "%s", "{0}", "'", '"', "`x`"):
            for words in (["create", name, "--cidr", "10.9.0.0/16"], ["add-subnet", "blog", name], ["delete", name],
                          ["inspect", name]):
                self.refused("--dry-run", *words, text="vpcctl: ", hint="--help")
        self.dry("create a/b --cidr 10.9.0.0/16", "'a/b' is not a name: 1 to 32 letters, digits")

    def test_ranges(self):
        self.dry("create x --cidr 10.9.0.5/16", "'10.9.0.5/16' has host bits set; the block that holds it is 10.9.0.0/16")
        for block in ("10.9.0.0", "x", "10.9.0.0/99", "::/64", "10.9.0.0/16,10.8.0.0/16", "-1"):
            self.dry("create x --cidr " + block, "is not an IPv4 block", "10.20.0.0/16")
        self.dry("create x --cidr 127.0.0.0/8", "127.0.0.0/8 is loopback", "10.0.0.0/8")
        self.dry("create x --cidr 10.0.0.0/30", "from /8 to /29")
        self.dry("create x --cidr 10.20.128.0/24", "10.20.128.0/24 overlaps VPC blog (10.20.0.0/16)")
        self.dry("create x", "--cidr", "create --help")
        self.dry("add-subnet blog x --cidr 10.30.5.0/24", "10.30.5.0/24 is not inside of VPC blog (10.20.0.0/16)")
        self.dry("add-subnet blog x --cidr 10.20.1.0/25", "overlaps subnet web (10.20.1.0/24)", "10.20.0.0/24")
        self.dry("add-subnet blog x --cidr 10.20.9.0/31", "too small")
        self.dry("add-subnet blog x --cidr 10.20.9.0/24 --gw 10.20.8.1", "gateway 10.20.8.1 is not a usable address")
        self.dry("add-subnet blog x --cidr 10.20.9.0/24 --gw x", "'x' is not an IPv4 address")

    def test_ports(self):
        for port in ("0", "65536", "-1", "http", "", "80.5", "0x50"):
            self.refused("--dry-run", "deploy-app", "blog", "web", "--port", port,
                         text="'%s' is not a port: a number from 1 to 65535" % port)
            self.refused("--dry-run", "test-connectivity", "blog", "web", "10.20.2.2", "--port", port, text="is not a port")
        self.dry("deploy-app blog web", "--port")
        self.dry("publish blog web --port 80:0", "is not a port")

    def test_variables_and_folders(self):
        """What is refused does not tell the value: it may be a secret."""
        start = ("deploy-app", "blog", "web", "--port", "80")
        for given in ("SECRET", "=SECRET", "1A=SECRET", "A-B=SECRET", "VPCCTL_APP=SECRET", "A=SECRET\ud800", "A=SECRET\0"):
            with self.subTest(given):
                answer = self.refused(*start, "--env", given, text="argument --env: ")
                self.assertFalse("SECRET" in answer.err and "=" in given, str(answer))
        for given in ("", "here", "./here", "~"):
            self.refused(*start, "--workdir", given, text="argument --workdir: ")
        answer = self.cli("--dry-run", *start, "--env", "A=SECRET", "--env=B=x", "--workdir", "/", "--", "true")
        self.assertTrue(answer.out.endswith(" true &\n"))
        self.assertNotIn("SECRET", answer.out)

    def test_what_others_may_read_of_a_command_line(self):
        typed = ["deploy-app", "--env", "A=one", "--env=B=two\nlines", "--port", "80", "--", "x", "--env", "C=three"]
        with mock.patch.object(sys, "argv", ["vpcctl"] + typed):
            self.assertEqual(tool.typed(), ["deploy-app", "--env", "A=…", "--env=B=…", "--port", "80", "--", "x", "--env", "C=three"])

    def test_interfaces(self):
        for name in ("-x", "a b", "x" * 16, "eth0;reboot", "../eth0"):
            self.refused("--dry-run", "enable-nat", "blog", "--interface=" + name, text="is not an interface name")
        self.dry("enable-nat blog --interface lo", "lo is not a way out", "ip route")
        self.dry("enable-nat blog --interface br-blog", "br-blog is not a way out")
        self.dry("enable-nat blog --interface eth0 --subnet-filter web,nope", "VPC blog has no subnet named 'nope'",
                 "web, db")

    def test_an_interface_that_is_not_there(self):
        """A preview notes it; the real thing refuses it."""
        answer = self.cli("--dry-run", "enable-nat", "blog", "--interface", "nope0")
        self.assertEqual(answer.err, "note: there is no network interface 'nope0' here\n")

    def test_help_as_a_word(self):
        self.assertEqual(self.cli("help").out, self.cli("--help").out)
        answer = self.cli("help", "create")
        self.assertEqual(answer.out.splitlines()[0], "usage: vpcctl create [OPTIONS] VPC --cidr BLOCK")
        self.assertEqual((answer.code, answer.out), (0, self.cli("create", "--help").out))
        self.refused("help", "crate", text="there is no command 'crate'", hint="did you mean 'create'?")

    def test_vpc_subnet_command(self):
        for words in ("delete blgo", "inspect blgo", "add-subnet blgo x", "enable-nat blgo", "peer blgo shop --allow-cidrs "
                      "10.20.1.0/24", "apply-policy blgo p.json", "deploy-app blgo web --port 80", "stop-app blgo web",
                      "test-connectivity blgo web 10.20.2.2", "restore blgo"):
            self.dry(words, "there is no VPC named 'blgo'", "did you mean 'blog'?")
        self.dry("inspect something-else", "there is no VPC named 'something-else'", "vpcctl list")
        for words in ("deploy-app blog wbe --port 80", "stop-app blog wbe", "delete-subnet blog wbe",
                      "test-connectivity blog wbe 10.20.2.2", "exec blog wbe -- true", "shell blog wbe"):
            self.dry(words, "VPC blog has no subnet named 'wbe'", "did you mean 'web'?")
        self.dry("stop-app blog something", "no subnet named 'something'", "its subnets: web, db")
        self.dry("crate blog --cidr 10.9.0.0/16", "there is no command 'crate'", "did you mean 'create'?")
        self.dry("add-subent blog x", "there is no command 'add-subent'", "did you mean 'add-subnet'?")
        self.dry("frobnicate", "there is no command 'frobnicate'", "--help")
        self.dry("list --dryrun", "unrecognized arguments: --dryrun", "did you mean '--dry-run'?")
        self.dry("remove blog", "there is no command 'remove'", "vpcctl calls it 'delete'")
        self.dry("enable-nat blog --interace eth0", "unrecognized arguments: --interace", "did you mean '--interface'?")
        self.dry("create x --cird 10.9.0.0/16", "unrecognized arguments: --cird", "did you mean '--cidr'?")
        self.dry("create x 10.9.0.0/16", "required: --cidr", "for example: vpcctl create blog --cidr 10.20.0.0/16")
        self.dry("exec blog web id -u", "unrecognized arguments: -u", "stands behind `--`: vpcctl exec blog web -- ")
        self.dry("deploy-app blog web --port 80 python3 -m http.server", "-m", "--port 8080 -- COMMAND")
        self.dry("list surplus", "surplus")
        self.dry("list -- true", "cannot stand there", "list --help")

    def test_peerings(self):
        self.dry("peer blog blog --allow-cidrs 10.20.1.0/24", "cannot be peered with itself")
        self.dry("peer blog shop --allow-cidrs 10.99.0.0/24,10.20.1.0/24", "10.99.0.0/24 is neither in blog (10.20.0.0/16)")
        self.dry("peer blog shop --allow-cidrs 10.20.1.0/24", "no block of VPC shop is named", "10.30.1.0/24")
        self.dry("peer blog shop --allow-cidrs ,", "no block given")
        self.dry("peer blog shop", "--allow-cidrs")
        self.dry("unpeer blog shop", "VPC blog and VPC shop are not peered")

    def test_policies(self):
        good = {"port": 80, "protocol": "tcp", "action": "allow"}
        for content, text, hint in (
                ("", "is not JSON", ""), ("{", "is not JSON", "README"), ("[]", "a policy is an object", ""),
                ('{"subnet": "web", "subnet": "db"}', "the key 'subnet' is given twice", ""),
                ({}, "'subnet' is missing", ""), ({"subnet": 5}, "'subnet' is missing", ""),
                ({"subnet": "wbe"}, "VPC blog has no subnet 'wbe'", "web (10.20.1.0/24), db (10.20.2.0/24)"),
                ({"subnet": "web", "igress": []}, "unknown key 'igress'", "ingress"),
                ({"subnet": "web", "ingress": [good, dict(good, port="x")]}, 'ingress rule 2: port is "x"', "1 to 65535"),
                ({"subnet": "web", "egress": [dict(good, action="ALLOW")]}, 'egress rule 1: action is "ALLOW"', "allow or deny"),
                ({"subnet": "web", "ingress": [dict(good, **{"from": "wbe"})]}, "names subnet 'wbe'", "did you mean 'web'?")):
            content = content if isinstance(content, str) else json.dumps(content)
            answer = self.refused("--dry-run", "apply-policy", "blog", "-", input=content, text=text, hint=hint)
            if not text.startswith("names"):
                self.assertIn("vpcctl: standard input", answer.err, "the file is named")
        self.dry("apply-policy blog /nonexistent.json", "cannot read the policy file /nonexistent.json: No such file")
        self.dry("apply-policy blog /", "cannot read the policy file /")
        path = os.path.join(os.path.dirname(VPCCTL), "vpcctl.py")
        self.dry("apply-policy blog " + path, path + " is not JSON")

    def test_other_values_for_the_same_name(self):
        self.dry("create blog --cidr 10.21.0.0/16", "VPC blog exists already with 10.20.0.0/16, not 10.21.0.0/16",
                 "vpcctl delete blog")
        self.dry("add-subnet blog web --cidr 10.20.9.0/24",
                 "subnet web exists already with cidr 10.20.1.0/24, not 10.20.9.0/24", "delete-subnet blog web")
        self.dry("add-subnet blog web --gw 10.20.1.9", "exists already with gw 10.20.1.1, not 10.20.1.9")
        for words in ("create blog --cidr 10.20.0.0/16", "add-subnet blog web --cidr 10.20.1.0/24", "add-subnet blog web"):
            answer = self.cli("--dry-run", *words.split())
            self.assertRegex(answer.err, r"\Anote: .* exists already\n\Z")
            self.assertEqual(answer.out, "")

    def test_odd_words(self):
        """Words from a bag of odd ones: an answer or a refusal, never a traceback, never a process."""
        bag = ["", "-", "--", "---", "-1", "-0", "--x", "--port", "--cidr", "--dry-run", "--quiet", "--why", "--data-dir",
               "--interface", "--allow-cidrs", "--gw", "--json", "--force", "--help", "--version", "blog", "shop", "web",
               "db", "x" * 5000, "\u2713", "\u202e", "\x1b[2J", "a\nb", "\udcff\udc80", "%s%n", "{}", "$(id)", "`id`",
               "10.20.0.0/16", "10.20.1.0/24", "10.20.2.2", "0", "80", "99999999999999999999", "1e9", "eth0", "lo", "/",
               "/dev/null", "blog/web", "NaN", "null", "*", "~", "@file", "-h", "--cidr=", "--port=x", "=", "\t", " "]
        dice = random.Random(20)
        names = [name for name in tool.COMMANDS if name not in ASKS] + ["nope", ""]
        for _ in range(800):
            words = ["--dry-run"] + dice.sample(bag, dice.randint(0, 1)) + [dice.choice(names)]
            words += [dice.choice(bag) for _ in range(dice.randint(0, 6))]
            answer = self.cli(*words, code=None, input="{}")
            self.assertIn(answer.code, (0, 1, 2, 4), str(answer))
            if answer.code == 2 and not answer.out.startswith("usage"):
                self.assert_clear(answer)

    def test_odd_options_of_examples(self):
        """Each command's own example with one word replaced by an odd one."""
        odd = ["", "-", "--", "-1", "\u2713", "\x1b[2J", "a\nb", "\udcff", "x" * 5000, "../../etc/passwd", "-rf", "0", "/", "~"]
        for name, entry in sorted(tool.COMMANDS.items()):
            if name in ASKS or entry["hidden"]:
                continue
            for place in range(1, len(entry["example"])):
                for word in odd:
                    words = list(entry["example"])
                    words[place] = word
                    answer = self.cli("--dry-run", *words, code=None, input="{}")
                    self.assertIn(answer.code, (0, 1, 2, 4), str(answer))
                    if answer.code == 2:
                        self.assert_clear(answer)


class MachineTest(CliTest):
    """What the machine lacks: exit code 4, and which package has it."""

    CHANGES = ("create x --cidr 10.9.0.0/16", "delete blog", "cleanup-all", "restore", "add-subnet blog x",
               "enable-nat blog --interface eth0", "peer blog shop --allow-cidrs 10.20.1.0/24,10.30.1.0/24",
               "apply-policy blog -", "deploy-app blog web --port 80", "stop-app blog web")

    def test_no_root(self):
        self.records()
        before = self.tree()
        for line in self.CHANGES + ("exec blog web -- true", "shell blog web", "test-connectivity blog web 10.20.2.2",
                                    "explain blog web 10.20.2.2 --trace", "explain blog web 10.20.2.2 --probe"):
            self.refused(*line.split(), code=4, root=False, text="root", hint="sudo")
        self.assertEqual(self.tree(), before)
        self.assertEqual(self.cli("list", root=False).code, 0)

    def test_missing_tools(self):
        self.records()
        before = self.tree()
        for tools, package in ((("ip", "bridge"), "iproute2"), (("iptables",), "iptables"),
                               (("iptables-restore",), "iptables")):
            with mock.patch("vpcctl.find_tool", lambda name: None if name in tools else "/sbin/" + name):
                for line in self.CHANGES:
                    self.refused(*line.split(), code=4, text="Cannot find required command: " + tools[0],
                                 hint="install the package " + package)
        with mock.patch("vpcctl.find_tool", lambda name: None):
            self.assertIn("Cannot find required command: ip",
                          self.cli("create", "x", "--cidr", "10.9.0.0/16", code=4).err)
            answer = self.cli("verify", code=4)
            self.assertIn("iproute2", answer.out)
        self.assertEqual(self.tree(), before)

    def test_verify_without_root(self):
        answer = self.cli("verify", code=4, root=False)
        self.assertRegex(answer.out, r"root: missing; run it with sudo")


class FolderTest(CliTest):
    """The data folder: what is in it decides what root does, so nobody else may write there."""

    def both(self, text, hint=""):
        """Refused for questions and changes alike."""
        self.refused("list", text=text, hint=hint)
        self.refused("create", "x", "--cidr", "10.9.0.0/16", text=text, hint=hint)

    def test_symlink(self):
        self.records()
        os.rename(self.data, self.data + ".real")
        os.symlink(self.data + ".real", self.data)
        self.both("is a symbolic link", "--data-dir")
        self.cli("--data-dir", self.data + ".real", "list")

    def test_writable_by_others(self):
        self.records()
        for mode in (0o777, 0o775, 0o757, 0o1777):
            os.chmod(self.data, mode)
            self.both("others may write in the data folder", "chmod go-w " + self.data)
        os.chmod(self.data, 0o755)
        self.cli("list")

    @unittest.skipIf(os.geteuid() != 0 or not tool.app_users(), "only root of the whole machine can give a folder away")
    def test_somebody_else_s(self):
        self.records()
        os.chown(self.data, 65534, 65534)
        self.both("belongs to user 65534, not to root", "chown")

    def test_not_a_folder(self):
        with open(self.data, "w"):
            pass
        self.both("is not a folder")

    def test_a_link_in_the_folder_is_not_followed(self):
        self.records()
        os.rename(os.path.join(self.data, "vpc_blog.json"), os.path.join(self.top, "elsewhere"))
        os.symlink(os.path.join(self.top, "elsewhere"), os.path.join(self.data, "vpc_blog.json"))
        self.assertIn("- blog   (record unreadable", self.cli("list").out)

    def test_other_files_are_not_records(self):
        self.records()
        for name in ("vpc_.json", "vpc_-x.json", "vpc_a b.json", "vpc_x.json.new", "xvpc_x.json", "vpc_\u00e9.json"):
            with open(os.path.join(self.data, name), "w"):
                pass
        self.assertEqual(re.findall(r"(?m)^- (\S+)", self.cli("list").out), ["blog", "shop"])

    def test_where_it_is(self):
        beside = os.path.join(os.path.dirname(os.path.realpath(VPCCTL)), ".vpcctl_data")
        with mock.patch.dict(os.environ):
            os.environ.pop("VPCCTL_DATA", None)
            self.assertEqual(tool.data_folder(None), beside)
            os.environ["VPCCTL_DATA"] = "/one"
            self.assertEqual(tool.data_folder(None), "/one")
            self.assertEqual(tool.data_folder("/two"), "/two")
            self.assertEqual(tool.data_folder("relative"), os.path.join(os.getcwd(), "relative"))


class StreamTest(CliTest):
    """Closed, full and narrow outputs, as real processes."""

    def shell(self, line, **env):
        """Run a shell line in which $V is vpcctl."""
        # an ordinary user has no sbin on PATH; V is expanded by the shell
        return run(["sh", "-c", "V=\"$0 $1\"\n" + line, sys.executable, VPCCTL], env=dict(env, VPCCTL_DATA=self.data))

    def test_closed_stdout(self):
        for line, code in (("$V list >&-", 0), ("$V --help >&-", 0), ("$V list >&- 2>&- <&-", 0), ("$V nope >&- 2>&-", 2)):
            result = self.shell(line)
            self.assertEqual((result.code, result.out, result.err), (code, "", ""), line)

    def test_reader_has_gone(self):
        result = self.shell("{ $V --dry-run create x --cidr 10.9.0.0/16; echo $? >&2; } | true")
        self.assertIn(result.err.strip(), ("0", "141"), str(result))

    def test_full_disk(self):
        result = self.shell("$V list >/dev/full")
        self.assertEqual((result.code, result.err), (3, "vpcctl: cannot write the output: [Errno 28] No space left on "
                                                        "device\n"), str(result))

    def test_a_terminal_that_knows_only_ascii(self):
        for words in ("enable-nat --help", "deploy-app --help", "--help", "--dry-run create x --cidr 10.9.0.0/16"):
            result = self.shell("$V " + words, PYTHONIOENCODING="ascii", LC_ALL="C")
            self.assertEqual((result.code, result.err), (0, ""), str(result))

    def test_bytes_that_are_no_text(self):
        result = self.shell("$V inspect \"$(printf '\\377\\376')\"")
        self.assertEqual(result.code, 2, str(result))
        self.assertNotIn("Traceback", result.err)


if __name__ == "__main__":
    unittest.main()
