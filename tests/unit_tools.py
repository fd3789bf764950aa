"""Tools of many versions: recorded answers say the same, old ones are helped, too old ones named. No root."""

import glob
import json
import os
import sys
import unittest
from unittest import mock

from support import HERE, VPCCTL

sys.path.insert(0, os.path.dirname(VPCCTL))
import vpcctl as tool  # noqa: E402

DATA = os.path.join(HERE, "data", "tools")
MORE = os.path.join(os.path.dirname(os.path.dirname(VPCCTL)), "shared", "old-tools")
SPACE = "ns-blog-web"


def recorded(path):
    """What tools answered on one and the same host: question -> answer."""
    found, question = {}, ""
    with open(path) as handle:
        for line in handle:
            if line.startswith("$ "):
                question = line[2:].strip()
                found[question] = ""
            elif question:
                found[question] += line
    return found


def seen(answers, flags, here="lookout"):
    """What vpcctl sees where tools give these answers, and the kernel says this of its ports."""
    def call(argv, text=None):
        question = " ".join(argv)
        inside = question.replace("ip ", "ip -n %s " % SPACE)
        return 0, answers[inside if here == "inside" else question], ""
    found = tool.Seen()
    with mock.patch.object(tool, "call", call), mock.patch.object(tool, "port_flags", lambda: flags), \
            mock.patch.object(tool, "is_namespace", lambda name: True):
        if here == "inside":
            with mock.patch.object(tool, "saved_rules", str), mock.patch.object(tool, "rtnetlink", lambda *_: []):
                found.facts.update(tool.look_inside(SPACE)[0])
        else:
            tool.see_links(found, set())
            tool.see_addresses(found)
            tool.see_routes(found)
    return found


def kernel_says(answers):
    """The flags of bridge ports as a newer `ip` reports them."""
    links = json.loads(answers["ip -j -d link show"])
    ports = {link["ifname"]: link["linkinfo"]["info_slave_data"] for link in links
             if "info_slave_data" in link.get("linkinfo", {})}
    return {name: {flag: port[flag] for flag in tool.PORT_FLAGS} for name, port in ports.items()}


class RecordedTest(unittest.TestCase):

    def same(self, folder):
        """All recordings of a folder are of one host: the same is seen in each."""
        newest = recorded(os.path.join(folder, "iproute2-6.1.txt"))
        flags = kernel_says(newest)
        self.assertTrue(flags)
        for here in ("lookout", "inside"):
            expected = seen(newest, {}, here)
            self.assertGreater(len(expected.facts), 5)
            for path in sorted(glob.glob(os.path.join(folder, "iproute2-*.txt"))):
                with self.subTest(os.path.basename(path), here=here):
                    found = seen(recorded(path), flags, here)
                    self.assertEqual(found.facts, expected.facts)
                    self.assertEqual(found.foreign, expected.foreign)
                    undo = lambda look: {fact: (vpc, step.undo) for fact, (vpc, step) in look.owned.items()}
                    self.assertEqual(undo(found), undo(expected))

    def test_the_same_is_seen(self):
        self.assertEqual(len(glob.glob(os.path.join(DATA, "iproute2-*.txt"))), 4)
        self.same(DATA)

    @unittest.skipUnless(os.path.isdir(MORE), "there are no recordings in ../shared/old-tools")
    def test_the_same_is_seen_in_more(self):
        self.same(MORE)

    def test_everything_is_there(self):
        """The records of that host, and what its tools answered: nothing is missing, nothing is too much."""
        world = {}
        for name in ("blog", "shop"):
            with open(os.path.join(DATA, "vpc_%s.json" % name)) as handle:
                world[name] = json.load(handle)
        kinds = ("ns", "ours", "link", "alias", "mac", "up", "master", "port", "fdb", "address", "neighbour",
                 "route", "lookup")
        later = {step.fact for step in tool.plan_unrouted()}      # vpcctl makes these since the answers were recorded
        steps = {fact: step for fact, step in tool.plan(world).items() if fact[0] in kinds and fact not in later}
        self.assertEqual({fact[0] for fact in steps}, set(kinds))
        flags = kernel_says(recorded(os.path.join(DATA, "iproute2-6.1.txt")))
        for path in glob.glob(os.path.join(DATA, "iproute2-*.txt")):
            with self.subTest(os.path.basename(path)):
                found = seen(recorded(path), flags)
                self.assertEqual([fact for fact, step in steps.items() if not found.holds(step)], [])
                other_end = {("link", "pv-blog-shop-b")}
                self.assertEqual(set(found.owned) - set(steps), other_end)

    def test_a_kernel_without_the_flag(self):
        """What may be missing is not called missing, and said to be so; what must be there is."""
        answers = recorded(os.path.join(DATA, "iproute2-5.5.txt"))
        found = seen(answers, {name: dict.fromkeys(tool.PORT_FLAGS)
                               for name in ("v-blog-web-b", "pv-blog-shop-a")})
        step = lambda *fact, optional="": tool.Step(tool.WIRE, fact, "true", optional=optional)
        self.assertTrue(found.holds(step("port", "v-blog-web-b", "locked", True, optional="a pity")))
        self.assertFalse(found.holds(step("port", "pv-blog-shop-a", "bcast_flood", False)))
        vpc = {"subnets": [{"veth": "v-blog-web"}]}
        self.assertIn("cannot lock", tool.capability_notes({"blog": vpc}, found)[0])
        able = seen(answers, {"v-blog-web-b": {"locked": False, "bcast_flood": True}})
        self.assertFalse(able.holds(step("port", "v-blog-web-b", "locked", True, optional="a pity")))
        self.assertNotIn("cannot lock", str(tool.capability_notes({"blog": vpc}, able)))


class AnswerTest(unittest.TestCase):

    def ask(self, out, code=0, said=""):
        with mock.patch.object(tool, "call", lambda argv, text=None: (code, out, said)):
            return tool.ask("ip", "-j", "-4", "route", "show", has="dst")

    def test_read_all_the_same(self):
        self.assertEqual(self.ask('[{"unreachable","dst":"10.0.0.0/8","flags":[]},{},{"dst":"default"}]'),
                         [{"type": "unreachable", "dst": "10.0.0.0/8", "flags": []}, {"dst": "default"}])
        self.assertEqual(self.ask('[{"dst":"a","to_tbl":"blackhole"}]'),
                         [{"dst": "a", "action": "blackhole"}])
        text = r'[{"dst":"{\"unreachable\",\"to_tbl\":"}]'
        self.assertEqual(self.ask(text), json.loads(text))
        self.assertEqual(self.ask(""), [])
        self.assertEqual(self.ask("[ ]"), [])

    def test_what_cannot_be_read(self):
        for out in ("<html>" + "y" * 100, '[{"dst":"a"', "[7]", '{"dst": 1}', '["text"]', "null", "7", "\0",
                    "[" * 100000, '[{"other":1}]', '[{"dst":[]}]', '[{"dst":7}]', '[["dst"]]',
                    "default via 192.0.2.1 dev eth0"):
            with self.subTest(out[:20]), self.assertRaises(tool.Failure) as caught:
                self.ask(out)
            self.assertEqual(caught.exception.said, "this is no JSON that can be read: " + out[:80])
            self.assertEqual(caught.exception.argv, ("ip", "-j", "-4", "route", "show"))


class AgeTest(unittest.TestCase):

    def problem(self, said, version, argv=("ip", "-j", "link")):
        """What becomes of a failure, and what was asked about it."""
        asked = []

        def call(words, text=None):
            asked.append(words)
            return 0, version, ""
        with mock.patch.object(tool, "call", call):
            return tool.refusal(tool.Failure(argv, said), "as before"), asked

    def test_too_old(self):
        refusal = 'Option "-j" is unknown, try "ip -help".'
        ip, inside = ("ip", "-j", "link"), ("ip", "netns", "exec", "x", "iptables", "-N", "x")
        for argv, said, version, text in (
                (ip, refusal, "ip utility, iproute2-ss170905\n", "`ip` is too old: it is iproute2-ss170905;"),
                (ip, tool.NO_JSON + "default", "ip utility, iproute2-ss180129", "it is iproute2-ss180129;"),
                (ip, "ip: unrecognized option: j", "BusyBox v1.36.1", "it is no iproute2: BusyBox v1.36.1;"),
                (("bridge", "-j"), refusal, "ip utility, iproute2-ss080725", "needs iproute2 4.19 or later"),
                (("ip", "-n", "x", "link"), 'unknown option "isolated"?', "iproute2-ss180813", "ss180813"),
                (("iptables", "-N", "x"), "iptables-restore: invalid option -- 'w'", "iptables v1.6.1",
                 "`iptables` is too old: it is v1.6.1; vpcctl needs iptables 1.6.2 or later"),
                (inside, "unrecognized option", "iptables v1.4.21", "v1.4.21")):
            with self.subTest(version):
                problem, asked = self.problem(said, version, argv)
                self.assertIn(text, str(problem))
                self.assertEqual((problem.code, len(asked)), (4, 1))
                self.assertIn("as before", problem.hint)

    def test_old_enough_is_another_reason(self):
        for program, version in (("ip", "iproute2-ss181023"), ("ip", "iproute2-ss190107"),
                                 ("ip", "iproute2-5.8.0"), ("ip", "ip utility, iproute2-6.15.0, libbpf 1.5.0"), ("iptables", "v1.6.2"),
                                 ("iptables", "iptables v1.8.11 (nf_tables)")):
            argv = (program, "link")
            with self.subTest(version):
                problem, asked = self.problem("unknown option", version, argv)
                self.assertEqual((problem.code, str(problem)), (3, "`%s link` failed: unknown option" % program))
                self.assertEqual(len(asked), 1)

    def test_not_asked_without_need(self):
        for argv, said in ((("ip", "link"), "RTNETLINK answers: File exists"),
                           (("mkdir", "-p", "/x"), "unknown option"),
                           (("sysctl", "-w", "x=1"), "No such file or directory"),
                           (("ip", "link"), "Operation not permitted")):
            problem, asked = self.problem(said, "ip utility, iproute2-ss170905", argv)
            self.assertEqual((problem.code, asked), (3, []))


class BatchTest(unittest.TestCase):
    """An `ip` that knows only the interfaces that were there when its batch began."""

    def batch(self, lines, absent=(), killed=None):
        """Run lines with such an `ip` -> (what came of it, how many lines each process was given)."""
        there, sizes = set(), []

        def call(argv, text=None):
            given = [" ".join(argv[1:])] if text is None else text.splitlines()
            known = set(there)
            sizes.append(len(given))
            if len(sizes) == killed:
                return -9, "", "ended by signal 9"
            for number, line in enumerate(given, 1):
                words = line.split()
                if words[1] == "add":
                    there.add(words[2])
                elif words[2] not in known or words[2] in absent:
                    return 1, "", 'Cannot find device "%s"\nCommand failed -:%d\n' % (words[2], number)
            return 0, "", ""
        with mock.patch.object(tool, "call", call):
            return tool.ip_batch([tuple(("ip " + line).split()) for line in lines]), sizes

    def test_it_goes_on(self):
        lines = ["link add a", "link set a up", "link set a alias x", "link add b", "link add c",
                 "link set c up", "link set b up"]
        self.assertEqual(self.batch(lines), ((7, ""), [7, 6, 2]))

    def test_it_ends(self):
        self.assertEqual(self.batch(["link add a", "link set a up", "link set b up", "link set a up"], {"b"}),
                         ((2, 'Cannot find device "b"\n'), [4, 3, 2]))
        self.assertEqual(self.batch(["link set b up"], {"b"})[0][0], 0)
        self.assertEqual(self.batch(["link add a", "link set b up"]),
                         ((1, 'Cannot find device "b"\nCommand failed -:1\n'), [2, 1]))

    def test_it_is_killed(self):
        done, said = self.batch(["link add a", "link set a up", "link set a up"], killed=2)[0]
        self.assertEqual((done, said), (tool.UNKNOWN, "ended by signal 9"))

    def test_iptables_that_has_read_nothing(self):
        """Of two tables the first may be done when the second is refused, but not if the tool did not begin."""
        commands = [("iptables", "-N", "x"), ("iptables", "-t", "nat", "-A", "POSTROUTING", "-j", "x")]
        for said, done in (("iptables-restore: invalid option -- 'w'", 0), ("unrecognized option '-w'", 0),
                           ('unknown option "--ctdir"', tool.UNKNOWN), ("line 4 failed", tool.UNKNOWN)):
            with mock.patch.object(tool, "call", lambda argv, text=None: (1, "", said)):
                self.assertEqual(tool.iptables_batch(commands), (done, said))

    def test_words_that_ip_lacks(self):
        argv = ("ip", "link", "set", "p", "type", "bridge_slave", "locked", "on")
        self.assertEqual(tool.by_netlink(argv, 'bridge_slave: unknown option "locked"?'),
                         ("netlink", "RTM_SETLINK", "p", "locked", "on"))
        self.assertIsNone(tool.by_netlink(argv, "RTNETLINK answers: Operation not supported"))
        argv = argv[:-2] + ("isolated", "on")
        self.assertIsNone(tool.by_netlink(argv, 'bridge_slave: unknown option "isolated"?'))


class GoneTest(unittest.TestCase):
    """Whether what was to be removed is gone, where iptables-restore (before 1.8.8) does not say what failed."""

    SAVED = "*filter\n:INPUT ACCEPT [0:0]\n:vpc-a - [0:0]\n-A INPUT -i br-a -j vpc-a\nCOMMIT\n*raw\nCOMMIT\n"

    def test_it_is_looked_at(self):
        for words, gone in (("-D INPUT -i br-a -j vpc-a", False), ("-D INPUT -j vpc-a -i br-a", False),
                            ("-D INPUT -i br-b -j vpc-a", True), ("-t raw -D INPUT -i br-a -j vpc-a", True),
                            ("-F INPUT", False), ("-F vpc-a", True), ("-X vpc-a", False), ("-X vpc-b", True),
                            ("-A INPUT -j vpc-b", False)):
            with mock.patch.object(tool, "saved_rules", return_value=self.SAVED):
                said = tool.is_gone(("iptables",) + tuple(words.split()), "iptables-restore: line 3 failed")
            self.assertEqual(said, gone, words)

    def test_other_tools_say_it(self):
        self.assertTrue(tool.is_gone(("ip", "link", "del", "x"), "Cannot find device"))
        self.assertFalse(tool.is_gone(("ip", "link", "del", "x"), "line 3 failed"))


if __name__ == "__main__":
    unittest.main()
