"""Nothing lost, nothing left: faults, kills, full disks, damaged records, restarts, and other people's things.

The sweep here takes a sample of the fault points; `make test-faults` takes them all.
"""

import fcntl
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time

from injection import Injector, load_vpcctl, state
from packets import settle
from support import (VPCCTL, SandboxTest, assert_same, in_ns, port_command, record, run, snapshot, vpcctl, wait_until)
from sweep import ALL, APP, BLOG, NAT, PEER, PUBLISH, SCENARIOS, SHOP, TWO, Sweep, missing_scenarios, sample

POINTS = 7        # per scenario
DATA = lambda *names: os.path.join(os.environ["VPCCTL_DATA"], *names)


def tried(name, points):
    """Tell the runner how many fault points were tried: its last line says so."""
    folder = os.environ.get("VPCCTL_RESULTS")
    if folder:
        with open(os.path.join(folder, "points.%s.%d" % (name, os.getpid())), "a") as handle:
            handle.write("%d\n" % points)


def sweep_some(test, scenarios, choose):
    """Disturb the commands of these scenarios; each trouble fails the test."""
    folder = tempfile.mkdtemp(prefix="vpcctl-sweep-")
    test.addCleanup(shutil.rmtree, folder)
    sweep = Sweep(folder)
    try:
        for scenario in scenarios:
            with test.subTest(scenario.title):
                troubles = sweep.run(scenario, choose)
                test.assertFalse(troubles, "\n\n".join(troubles))
    finally:
        sweep.close()
        tried(type(test).__name__, sweep.injector.points)


class SweepOneTest(SandboxTest):

    def test_faults(self):
        sweep_some(self, SCENARIOS[0::2], sample(POINTS, 1))

    def test_every_changing_command_is_disturbed(self):
        self.assertEqual(missing_scenarios(), [], "add a scenario to tests/sweep.py")


class SweepTwoTest(SandboxTest):

    def test_faults(self):
        sweep_some(self, SCENARIOS[1::2], sample(POINTS, 2))


class FaultTest(SandboxTest):
    """Commands run in forked children, which saves the start of a Python each."""

    def setUp(self):
        self.injector = Injector()
        self.addCleanup(self.injector.close)
        SandboxTest.setUp(self)
        self.empty = state()

    def obey(self, *lines, **options):
        """Run commands (text); exit code 0 is expected, or `code`; returns the last Outcome."""
        code = options.get("code", 0)
        for line in lines:
            outcome = self.injector.vpcctl(line.split() if isinstance(line, str) else line, shims=False)
            self.assertIn(outcome.code, code if isinstance(code, tuple) else (code,), str(outcome))
        return outcome


# ---- each object of ours taken away or altered in turn ----

def set_switch(key, value):
    """The command that sets a kernel switch; not every machine has a sysctl program."""
    return ["sh", "-c", "echo %d >'%s'" % (value, load_vpcctl().sysctl_path(key))]


def tamper(fact):
    """The commands that take away or alter the thing of a fact, as argument lists; None: it cannot be done.

    An unknown kind of fact is an error here: a new kind of step needs an entry.
    """
    kind = fact[0]
    words = {
        "ns": "ip netns del {1}", "link": "ip link del {1}", "mac": "ip link set {1} address 02:00:00:00:00:09",
        "address": "ip addr del {2} dev {1}", "up": "ip link set {1} down", "master": "ip link set {1} nomaster",
        "fdb": "bridge fdb del {2} dev {1} master", "neighbour": "ip neigh del {2} dev {1}", "folder": "rm -r {1}",
        "symlink": "rm {1}", "file": "rm {1}"}
    if kind == "folder" and fact[1].startswith("/run"):
        return None                               # apps stand in it; test_foreign_objects… takes it away
    if kind in words:
        return [words[kind].format(*fact).split()]
    if kind in ("ours", "alias", "flows"):
        return None                               # cannot be taken off; has a test of its own; there are none
    if kind == "sysctl":
        return [set_switch(fact[1], 1 - int(fact[2]))]
    if kind == "port" and fact[2] != "isolated":
        return [port_command(fact[1], fact[2], "off" if fact[3] else "on")]
    if kind == "port":
        return [["ip", "link", "set", fact[1], "type", "bridge_slave", fact[2], "off" if fact[3] else "on"]]
    if kind == "chain":
        return [["iptables", "-t", fact[1], "-F", fact[2]]]
    if kind == "policy":
        return [["ip", "netns", "exec", fact[1], "iptables", "-F", "OUTPUT"]]
    if kind in ("route", "lookup", "rule"):
        return "undo"
    if kind == "inside":
        inside = {"up": "link set {3} down", "address": "addr del {4} dev {3}", "route": "route del {3}",
                  "neighbour": "neigh del {4} dev {3}"}
        if fact[2] == "sysctl":
            return [["ip", "netns", "exec", fact[1]] + set_switch(fact[3], 1 - int(fact[4] != "0"))]
        return [["ip", "-n", fact[1]] + inside[fact[2]].format(*fact).split()]
    raise AssertionError("tests/e2e_faults.py does not know how to take away %r" % (fact,))


ALTERED = ("mac", "up", "sysctl", "port", "policy")       # tamper alters these; all others it takes away
# What is altered (an argument list; S: a kernel switch), and how `verify` says it.
PLANTED = (
    (["S", "net.ipv4.conf.br-blog.rp_filter", 0], "changed: kernel switch net.ipv4.conf.br-blog.rp_filter is 0, not 1"),
    ("ip link set br-blog address 02:00:00:00:00:09",
     "changed: hardware address of interface br-blog is 02:00:00:00:00:09, not 02:76:0a:14:00:01"),
    ("ip link set br-blog alias vpcctl:other", "changed: mark of interface br-blog is vpcctl:other, not vpcctl:blog"),
    ("ip link set br-shop down", "changed: interface br-shop is down, not up"),
    ("ip link set v-blog-web-b master br-shop", "changed: bridge of cable v-blog-web-b is br-shop, not br-blog"),
    ("ip link set v-blog-db-b type bridge_slave isolated off", "changed: port v-blog-db-b: isolated is off, not on"),
    ("ip link set v-blog-db-b type bridge_slave learning on flood on",
     "changed: port v-blog-db-b: isolated is on with learning, flood, not on"),
    ("ip route replace 10.20.0.0/16 dev br-shop table 7001 proto 118",
     "changed: routing table 7001: the way to 10.20.0.0/16 is br-shop, not br-blog"),
    ("ip neigh replace 10.20.1.2 lladdr 02:00:00:00:00:07 dev br-blog nud permanent",
     "changed: interface br-blog: neighbour entry for 10.20.1.2 is 02:00:00:00:00:07, not 02:76:0a:14:01:02"),
    ("iptables -I FORWARD 1 -s 110.1.1.0/24 -j ACCEPT",
     'changed: FORWARD: our rule "-i br-blog -j vpc-blog" stands behind "-s 110.1.1.0/24 -j ACCEPT"'),
    ("iptables -A vpc-blog -s 110.1.1.0/24 -j ACCEPT",
     'changed: vpc-blog: our rule "-j DROP" stands before "-s 110.1.1.0/24 -j ACCEPT"'),
    ("ip netns exec ns-blog-web iptables -D INPUT 3", "changed: namespace ns-blog-web: policy rules lacks policy-ingress-"),
    ("ip -n ns-blog-web route replace default via 10.20.1.9",
     "changed: namespace ns-blog-web: routing table main: the way to default is 10.20.1.9, not 10.20.1.1"),
    ("ip -n ns-blog-web link set v-blog-web-a down", "changed: namespace ns-blog-web: interface v-blog-web-a is down, not up"),
    ("chmod o+w /etc/netns/ns-blog-web", "changed: folder /etc/netns/ns-blog-web can be written by others"),
    ("cp /dev/null /run/vpcctl/blog/hosts", "changed: file /run/vpcctl/blog/hosts has another content"),
    ("ln -sf /run/vpcctl/shop/hosts /etc/netns/ns-blog-web/hosts",
     "changed: link /etc/netns/ns-blog-web/hosts leads to /run/vpcctl/shop/hosts, not /run/vpcctl/blog/hosts"),
    ("ip -n ns-blog-web neigh replace 10.20.1.1 lladdr 02:00:00:00:00:07 dev v-blog-web-a nud permanent",
     "changed: namespace ns-blog-web: interface v-blog-web-a: neighbour entry for 10.20.1.1 is 02:00:00:00:00:07, not "
     "02:76:0a:14:00:01"))


def owned_steps():
    """Every step of the world that is recorded: fact -> step."""
    module = load_vpcctl()
    return module.plan({name: record(name) for name in ("blog", "shop")})


class DriftTest(FaultTest):
    every = 6

    def test_each_object_lost_is_named_and_repaired(self):
        self.obey(*ALL)
        module, whole, count = load_vpcctl(), state(), 0
        steps = [(fact, step) for fact, step in owned_steps().items() if tamper(fact)]
        kinds = set()
        for number, (fact, step) in enumerate(steps):
            kind = fact[0] if fact[0] != "inside" else fact[2]
            if number % self.every and kind in kinds:
                continue
            kinds.add(kind)
            count += 1
            with self.subTest(module.describe(step)):
                commands = tamper(fact)
                for argv in step.undo if commands == "undo" else commands:
                    self.assertEqual(run(list(argv)).code, 0, argv)
                found = self.obey("verify", code=1)
                if fact[0] != "chain":
                    thing = module.describe(step) if fact[0] in ("rule", "lookup") else module.named(fact)
                    word = "changed" if kind in ALTERED else "missing"
                    self.assertRegex(found.out, f"{word}: {re.escape(thing)}", str(found))
                self.obey("restore", "verify")
                assert_same(whole, state(), "restored, but")
        tried(type(self).__name__, count)

    def test_what_was_found_is_said_everywhere(self):
        """verify, plan, and restore and apply with --why say the same of each: what there is in place of what was wanted."""
        self.obey(*TWO + SHOP + [NAT, APP])
        path, whole = self.file("as-it-is.json", self.obey("export").out), state()
        for number, (command, text) in enumerate(PLANTED):
            with self.subTest(text):
                argv = set_switch(*command[1:]) if command[0] == "S" else command.split()
                self.assertEqual(run(argv).code, 0, argv)
                self.assertIn(text, self.obey("verify", code=1).out)
                self.assertIn(f"! repair vpc {'shop' if 'br-shop is' in text else 'blog'}: {text}",
                              self.obey(["plan", path], code=1).out)
                # restore first takes away what is in no record: a route elsewhere, and then ours is missing.
                apply = number % 2 or "routing table 7001" in text
                repaired = self.obey(["--why", "apply", path] if apply else "restore --why").out
                found = re.search(r"(is \S+, not|is on with|lacks|stands|has another|can be|leads to) .*", text).group()
                self.assertRegex(repaired, f"# changed \\({re.escape(found)}", repaired)
                for words in (["iptables", "-D", "FORWARD"], ["iptables", "-D", "vpc-blog"]):
                    run(words + ["-s", "110.1.1.0/24", "-j", "ACCEPT"])
                self.assertEqual(self.obey(["plan", path]).out, "Nothing to do\n")
                self.obey("verify")
                assert_same(whole, state(), "restored, but")

    def test_the_first_connection_after_a_restore_works(self):
        """Also where a program asked for its gateway while the bridge (or the cable) was down."""
        self.obey(*TWO + [APP])
        ask_slowly = load_vpcctl().sysctl_path("net.ipv4.neigh.v-blog-db-a.retrans_time_ms")
        self.assertEqual(in_ns("ns-blog-db", ["sh", "-c", f"echo 60000 >{ask_slowly}"]).code, 0)
        self.assert_open("ns-blog-db", "10.20.1.2", 80)
        for words in ("link set br-blog down", "link set v-blog-db-b down", "link del br-blog",
                      "-n ns-blog-db link set v-blog-db-a down"):
            with self.subTest(words):
                run(["ip"] + words.split())
                run(["ip", "-n", "ns-blog-db", "neigh", "flush", "all"])
                self.assert_dropped("ns-blog-db", "10.20.1.2", 80)
                self.obey("restore", "verify")
                self.assert_open("ns-blog-db", "10.20.1.2", 80)

    def test_a_flushed_firewall(self):
        self.obey(*TWO + [NAT])
        whole = state()
        for table in ("filter", "nat", "raw", "mangle"):
            run(["iptables", "-t", table, "-F"])
            run(["iptables", "-t", table, "-X"])
        found = self.obey("verify", code=1)
        self.assertIn("chain vpc-blog", found.out)
        self.obey("restore", "verify")
        assert_same(whole, state(), "restored, but")

    def test_a_rule_in_front_of_ours_is_seen(self):
        self.obey(*BLOG)
        run(["iptables", "-I", "FORWARD", "1", "-s", "110.1.1.0/24", "-j", "ACCEPT"])
        self.assertIn("changed", self.obey("verify", code=1).out)
        self.obey("restore", "verify")
        rules = run(["iptables-save", "-t", "filter"]).out
        self.assertLess(rules.index("-j vpc-blog"), rules.index("110.1.1.0/24"))
        run(["iptables", "-D", "FORWARD", "-s", "110.1.1.0/24", "-j", "ACCEPT"])

    def test_without_its_mark_an_interface_is_not_ours(self):
        self.obey(*BLOG)
        run(["ip", "link", "set", "br-blog", "alias", ""])
        self.assertIn("not ours", self.obey("verify", code=1).out)
        refused = self.obey("restore", code=3)
        self.assertIn("br-blog", refused.err)
        run(["ip", "link", "set", "br-blog", "alias", "vpcctl:blog"])
        self.obey("verify")


# ---- saving ----

class SaveTest(FaultTest):
    """The folder of the records cannot be written, at several levels of fullness."""

    def on(self, options, folder="small"):
        """Mount a small file system and make it the data folder."""
        path = os.path.join(tempfile.mkdtemp(prefix="vpcctl-"), folder)
        self.addCleanup(shutil.rmtree, os.path.dirname(path))
        os.mkdir(path)
        self.assertEqual(run(["mount", "-t", "tmpfs", "-o", "mode=755," + options, "tmpfs", path]).code, 0)
        self.addCleanup(run, ["umount", path])
        before = os.environ["VPCCTL_DATA"]
        os.environ["VPCCTL_DATA"] = path
        self.addCleanup(os.environ.__setitem__, "VPCCTL_DATA", before)
        return path

    def test_full_disk(self):
        path = self.on("size=256k")
        self.obey(*TWO + SHOP)
        commands = ("create more --cidr 10.40.0.0/16", "add-subnet blog api --cidr 10.20.3.0/24", PEER, APP,
                    "reset-policy blog web", "delete-subnet blog db", "stop-app blog web")
        refused = 0
        for free in (0, 1, 2, 3, 16, 17, 18, 19, 20):
            filler = os.path.join(path, "filler")
            handle = os.open(filler, os.O_WRONLY | os.O_CREAT)
            try:
                while os.write(handle, b"\0" * 4096):
                    pass
            except OSError:
                pass
            os.close(handle)
            os.truncate(filler, max(0, os.path.getsize(filler) - 4096 * free))
            for line in commands[free % 4::4] if free else commands:
                before = state()
                outcome = self.injector.vpcctl(line.split(), shims=False)
                if outcome.code == 3:
                    refused += 1
                    assert_same(before, state(), "%s: refused, but\n%s" % (line, outcome))
                    self.assertRegex(outcome.err, "No space left|cannot save")
                else:
                    self.assertEqual(outcome.code, 0, str(outcome))
            os.unlink(filler)
            self.obey("verify")
        self.assertGreaterEqual(refused, 5)
        self.obey("add-subnet blog last --cidr 10.20.9.0/24", "verify", "cleanup-all")

    def test_read_only_folder(self):
        self.obey(*BLOG)
        self.assertEqual(run(["mount", "--bind", DATA(), DATA()]).code, 0)
        self.assertEqual(run(["mount", "-o", "remount,ro,bind", DATA()]).code, 0)
        try:
            before = state()
            for line in ("create shop --cidr 10.30.0.0/16", "delete blog", "cleanup-all", "delete-subnet blog web"):
                outcome = self.obey(line, code=3)
                self.assertIn("Read-only", outcome.err)
                assert_same(before, state(), "%s: refused, but" % line)
            self.obey("list", "verify", "inspect blog")
        finally:
            run(["umount", DATA()])
        self.obey("delete-subnet blog web", "delete blog")

    def test_file_size_limit(self):
        self.obey(*TWO)
        for blocks in (0, 1, 8, 127, 129):            # of 512 bytes; a record here has about 10 KiB
            before = state()
            done = run(["sh", "-c", "ulimit -f %d; exec \"$@\"" % blocks, "sh", sys.executable, VPCCTL,
                        "add-subnet", "blog", "api", "--cidr", "10.20.3.0/24"])
            self.assertNotIn("Traceback", done.err)
            if done.code:
                self.assertEqual(done.code, 3, str(done))
                assert_same(before, state(), str(done))
            else:
                self.obey("verify", "delete-subnet blog api")
        self.obey("verify")


# ---- records ----

class RecordTest(FaultTest):

    def test_cut_and_mutated_records(self):
        self.obey(*SHOP)
        alone = state()
        self.obey(*BLOG + [PEER])
        with open(DATA("vpc_blog.json")) as handle:
            sound = handle.read()
        with open(DATA("vpc_shop.json")) as handle:
            shop = handle.read()
        damaged = 0
        for number in range(25):
            at = number * len(sound) // 25
            for text in (sound[:at], sound[:at] + "}\x00{[\"9"[number % 6] + sound[at + 1:]):
                with open(DATA("vpc_blog.json"), "w") as handle:
                    handle.write(text)
                listed = self.obey("list")
                self.assertIn("- blog", listed.out)
                self.assertIn("- shop\n", listed.out)
                if "unreadable" not in listed.out:
                    continue
                damaged += 1
                if number % 4 == 0:
                    self.assertIn("vpc_blog.json", self.obey("verify", code=1).out)
                    self.assertIn("delete --force blog", self.obey("add-subnet blog api", code=2).err)
                    self.assertIn("vpc_blog.json", self.obey("delete blog", code=2).err)
                    self.obey("restore shop", "add-subnet shop more --cidr 10.30.2.0/24", "delete-subnet shop more")
                    with open(DATA("vpc_shop.json")) as handle:
                        self.assertEqual(handle.read(), shop)
        self.assertGreater(damaged, 35)
        tried("RecordTest", damaged)
        with open(DATA("vpc_blog.json"), "w") as handle:
            handle.write(sound)
        self.obey("restore", "verify")            # shop's names of its peer's subnets come back
        with open(DATA("vpc_blog.json"), "w") as handle:
            handle.write(sound[:1000])
        self.obey("--dry-run delete --force blog", "--dry-run cleanup-all")
        self.assertTrue(os.path.exists(DATA("vpc_blog.json")), "a dry run writes nothing")
        self.obey("delete --force blog", "verify")
        assert_same(alone, state(), "delete --force left something")

    def test_planted_records(self):
        self.obey(*BLOG)
        other = self.file("elsewhere.json", record("blog"))
        before = state()
        os.symlink(other, DATA("vpc_link.json"))
        os.mkfifo(DATA("vpc_fifo.json"))
        os.mkdir(DATA("vpc_folder.json"))
        shutil.copy(DATA("vpc_blog.json"), DATA("vpc_copy.json"))
        with open(DATA("vpc_deep.json"), "w") as handle:
            handle.write("[" * 100000)
        shutil.copy(DATA("vpc_blog.json"), DATA("vpc_open.json"))
        os.chmod(DATA("vpc_open.json"), 0o666)
        with open(DATA("vpc_rule.json"), "w") as handle:
            json.dump(dict(record("blog"), name="rule", chain="x -j ACCEPT; reboot"), handle)
        try:
            found = self.obey("verify", code=1)
            for name in ("link", "fifo", "folder", "copy", "deep", "open", "rule"):
                self.assertIn("vpc_%s.json" % name, found.out)
            self.obey("restore")
        finally:
            os.rmdir(DATA("vpc_folder.json"))
            for name in ("link", "fifo", "copy", "deep", "open", "rule"):
                os.unlink(DATA("vpc_%s.json" % name))
        assert_same(before, state())
        self.obey("verify")

    def test_an_unsafe_data_folder_is_refused(self):
        folder = tempfile.mkdtemp(prefix="vpcctl-")
        self.addCleanup(shutil.rmtree, folder)
        os.mkdir(os.path.join(folder, "data"), 0o755)
        os.symlink("data", os.path.join(folder, "link"))
        words = ["create", "blog", "--cidr", "10.20.0.0/16"]
        self.assertIn("symbolic link", self.obey(["--data-dir", folder + "/link"] + words, code=2).err)
        os.chmod(folder + "/data", 0o777)
        self.assertIn("others may write", self.obey(["--data-dir", folder + "/data"] + words, code=2).err)
        self.assertEqual(os.listdir(folder + "/data"), [])
        os.chmod(folder + "/data", 0o755)
        self.obey(["--data-dir", folder + "/data"] + words, ["--data-dir", folder + "/data", "delete", "blog"])

    def test_a_lost_record(self):
        for way in ("cleanup-all", "create"):
            self.obey(*TWO + [NAT, APP])
            before = state()
            os.unlink(DATA("vpc_blog.json"))
            self.assertIn("in no record", self.obey("verify", code=1).out)
            if way == "create":
                note = self.obey("create blog --cidr 10.20.0.0/16")
                self.assertIn("without a record", note.err)
                self.obey(*[line for line in TWO[1:] + [NAT, APP]])
                assert_same(before, state(), "made again after its record was lost")
            self.obey("verify", code=(0, 1))
            self.obey("cleanup-all", "verify")
            assert_same(self.empty, state(), "cleanup-all left something")


# ---- two at once ----

class ManyTest(FaultTest):

    def at_once(self, lines):
        """Start all commands together; returns their (exit code, stderr)."""
        children = [subprocess.Popen([sys.executable, VPCCTL] + line.split(), stdin=subprocess.DEVNULL,
                                     stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for line in lines]
        return [(child.communicate(timeout=90)[1].decode(), child.returncode) for child in children]

    def test_sixteen_at_once_are_as_one_after_the_other(self):
        lines = ["add-subnet blog s%d --cidr 10.20.%d.0/24" % (number, number + 1) for number in range(16)]

        def result():
            found = state()
            found["data"] = sorted(found["data"])     # the order of the subnets is that of their coming
            for part in ("run", "iptables"):
                found[part] = sorted(found[part])
            return found
        self.obey("create blog --cidr 10.20.0.0/16")
        self.obey(*lines)
        serial = result()
        self.obey("cleanup-all", "create blog --cidr 10.20.0.0/16")
        for err, code in self.at_once(lines):
            self.assertEqual(code, 0, err)
        assert_same(serial, result(), "sixteen at once")
        self.obey("verify")

    def test_the_same_sixteen_times(self):
        for err, code in self.at_once(["create blog --cidr 10.20.0.0/16"] * 16):
            self.assertEqual(code, 0, err)
        self.obey("verify")
        results = self.at_once(["delete blog"] * 16)
        self.assertEqual(sorted(code for _, code in results), [0] + [2] * 15, results)
        assert_same(self.empty, state())

    def test_the_wait_is_bounded_and_names_the_holder(self):
        os.makedirs(DATA(), exist_ok=True)
        with open(DATA("lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.write("process 4242, delete shop")
            lock.flush()
            before = state()
            begun = time.time()
            refused = vpcctl("create", "blog", "--cidr", "10.20.0.0/16", env={"VPCCTL_WAIT": "1.2"}, code=3)
            self.assertLess(time.time() - begun, 30)
            self.assertIn("process 4242, delete shop", refused.err)
            self.assertIn("VPCs", vpcctl("list").out)             # who only reads does not wait
            child = subprocess.Popen([sys.executable, VPCCTL, "create", "blog", "--cidr", "10.20.0.0/16"],
                                     stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            self.assertIn(b"waiting for another vpcctl: process 4242", child.stderr.readline())
            child.send_signal(signal.SIGTERM)
            child.communicate(timeout=30)
            self.assertEqual(child.returncode, 143)
            assert_same(before, state())

    def test_a_closed_pipe_stops_nothing(self):
        for line in ("create blog --cidr 10.20.0.0/16", "delete blog"):
            reading, writing = os.pipe()
            child = subprocess.Popen([sys.executable, VPCCTL] + line.split(), stdin=subprocess.DEVNULL, stdout=writing,
                                     stderr=subprocess.PIPE)
            os.close(writing)
            os.close(reading)
            err = child.communicate(timeout=60)[1].decode()
            self.assertNotIn("Traceback", err)
            self.assertIn(child.returncode, (0, 141), err)
            self.obey("verify")
            self.assertEqual(os.path.exists(DATA("vpc_blog.json")), line.startswith("create"))


# ---- a restart of the machine ----

AFTER_BOOT = r"""
set -e
cp -a /etc/.real/netns/. /etc/netns/
echo 00000000-1111-2222-3333-444444444444 > /run/boot_id
mount --bind /run/boot_id /proc/sys/kernel/random/boot_id
vpcctl() { "%(python)s" "%(vpcctl)s" --data-dir "$DATA" "$@"; }
echo "== list"; vpcctl list
echo "== verify"; vpcctl verify && exit 9
if [ "$1" = restore ]; then
    echo "== restore"; vpcctl restore; vpcctl verify; vpcctl list
    ip netns exec ns-blog-web "%(python)s" -c 'import urllib.request
print(urllib.request.urlopen("http://10.20.1.2/", timeout=20).read().decode())'
fi
echo "== delete"; vpcctl delete blog; vpcctl delete shop; vpcctl verify
ls -A /etc/netns /run/netns; ip -br link
"""


class RebootTest(FaultTest):

    def boot(self, what):
        """The same records on a machine that has just started: a sandbox in the sandbox, without any of our things."""
        folder = tempfile.mkdtemp(prefix="vpcctl-")
        self.addCleanup(shutil.rmtree, folder)
        shutil.copytree(DATA(), folder + "/data")
        script = AFTER_BOOT % {"python": sys.executable, "vpcctl": VPCCTL}
        done = run([sys.executable, VPCCTL, "sandbox", "--", "sh", "-c", script, "sh", what],
                   env={"DATA": folder + "/data"}, timeout=120)
        self.assertEqual(done.code, 0, str(done))
        self.assertRegex(done.out, r"== list\nVPCs:\n- blog +\(down.*\n- shop +\(down")
        self.assertRegex(done.out, r"(?s)== verify\n.*missing: interface br-blog")
        end = done.out.split("== delete\n")[1]
        self.assertNotIn("br-", end.split("\n/etc/netns")[-1].split("/run/netns")[-1], str(done))
        self.assertNotIn("ns-", end.split("Deleted VPC: shop")[-1], str(done))
        return done

    def test_restore_after_a_restart(self):
        self.obey(*ALL)
        before = state()
        done = self.boot("restore")
        self.assertIn("Hello from subnet web of VPC blog", done.out)
        self.assertIn("Restored: blog, shop", done.out)
        assert_same(before, state(), "another machine's restart")

    def test_delete_after_a_restart(self):
        self.obey(*ALL)
        self.boot("delete")


# ---- what an earlier version has made ----

class EarlierVersionTest(FaultTest):

    def age(self, name):
        """Make a VPC look as one whose rules an earlier version made: without vpcctl-rest, and with another rule."""
        for words in ("-D FORWARD -j vpcctl-rest -m comment --comment vpcctl", "-F vpcctl-rest", "-X vpcctl-rest"):
            settle("iptables", *words.split())
        found = record(name)
        rule = ["-i", found["bridge"], "-p", "tcp", "-m", "comment", "--comment", "vpcctl:" + name, "-j", "ACCEPT"]
        settle("iptables", "-I", found["chain_in"], "2", *rule)
        found["host_iptables"].append(["iptables", "-I", found["chain_in"], "2"] + rule)
        with open(DATA("vpc_%s.json" % name), "w") as opened:
            json.dump(found, opened)

    def test_a_change_brings_it_up_to_date(self):
        settle(*"ip link add far0 type veth peer name far1".split())
        settle(*"ip link set far0 up".split())
        self.obey(*BLOG + SHOP + [NAT, "enable-nat shop --interface far0"])
        before = state()
        for change, back in (("disable-nat shop", "enable-nat shop --interface far0"),
                             ("deploy-app shop web --port 8080", "stop-app shop web --port 8080")):
            self.age("shop")
            self.assertIn("an earlier version", self.obey(change).err)
            self.obey("verify")
            self.assertNotIn("an earlier version", self.obey(back).err)
            assert_same(before, state(), change)
        self.age("shop")
        self.obey("delete shop", "verify", "cleanup-all")
        settle("ip", "link", "del", "far0")


# ---- what is not ours ----

class ForeignTest(FaultTest):

    def test_foreign_objects_with_our_names(self):
        for line in ("ip link add br-blog type bridge", "ip link set br-blog up", "ip link add br-shop type bridge",
                     "ip link set br-shop alias vpcctl", "ip netns add ns-blog-web", "ip -n ns-blog-web link set lo up",
                     "ip link add v-blog-web-a netns ns-blog-web type veth peer name v-blog-web-b",
                     "ip link add pv-blog-shop-a type bridge", "iptables -N vpc-blog",
                     "iptables -A vpc-blog -s 110.20.1.0/24 -j ACCEPT", "iptables -A FORWARD -s 110.20.0.0/16 -j vpc-blog",
                     "iptables -N vpc-in-blog", "iptables -A OUTPUT -d 110.1.1.1 -j vpc-in-blog",
                     "iptables -N vpc-peer-blog-shop", "iptables -A vpc-peer-blog-shop -d 110.1.1.1 -j DROP",
                     "iptables -A INPUT -s 110.20.1.0/24 -m comment --comment blog -j DROP",
                     "iptables -t nat -A POSTROUTING -s 110.20.0.0/16 -o eth0 -j MASQUERADE",
                     "iptables -t nat -A POSTROUTING -s 10.20.0.0/16 -o eth0 -j MASQUERADE",
                     "ip netns exec ns-blog-web iptables -A INPUT -p tcp --dport 80 -j DROP",
                     "ip route add 198.51.100.0/24 dev br-blog table 7001", "ip rule add pref 7001 from 110.20.1.0/24 lookup 7001",
                     "ip neigh add 10.99.1.2 lladdr 02:76:0a:14:01:02 dev br-blog nud permanent"):
            self.assertEqual(run(line.split()).code, 0, line)
        os.makedirs("/etc/netns/ns-blog-web", exist_ok=True)
        os.makedirs("/etc/netns/ns-shop-web", exist_ok=True)
        for path, text in (("/etc/netns/ns-blog-web/hosts", "1.2.3.4 mine\n"), ("/etc/netns/ns-shop-web/hosts", "mine too\n")):
            with open(path, "w") as handle:
                handle.write(text)
        sleeper = subprocess.Popen(["ip", "netns", "exec", "ns-blog-web", "sleep", "1000"], stdin=subprocess.DEVNULL)
        outside = subprocess.Popen(["sleep", "1001"], stdin=subprocess.DEVNULL)
        try:
            wait_until(lambda: any("sleep 1000" in line for line in state()["processes"]), 10, "the sleeper runs")
            theirs = state()
            self.obey(*TWO + SHOP + [PEER, NAT, PUBLISH, APP, "reset-policy blog web", "verify", "restore"])
            blog = record("blog")
            self.assertNotIn("br-blog", (blog["bridge"], record("shop")["bridge"]))
            self.assertNotEqual(blog["chain"], "vpc-blog")
            self.assertNotEqual(blog["subnets"][0]["ns"], "ns-blog-web")
            self.obey("delete-subnet blog web", "unpeer blog shop", "delete blog")
            self.obey(*BLOG + ["delete blog", "delete shop"])
            assert_same(theirs, state(), "somebody else's things")
            self.obey(*ALL)
            shutil.rmtree("/run/vpcctl")
            self.obey("restore", "verify")
            for name in ("blog", "shop"):
                os.unlink(DATA("vpc_%s.json" % name))
            self.obey("cleanup-all")
            assert_same(theirs, state(), "somebody else's things, after cleanup-all without records")
            self.assertIsNone(sleeper.poll())
            self.assertIsNone(outside.poll())
        finally:
            for child in (sleeper, outside):
                child.kill()
                child.wait()
            for line in ("ip rule del pref 7001 from 110.20.1.0/24 lookup 7001", "ip link del br-blog", "ip link del br-shop",
                         "ip link del pv-blog-shop-a", "ip link del v-blog-web-b", "ip netns del ns-blog-web",
                         "iptables -F", "iptables -X", "iptables -t nat -F", "rm -r /etc/netns/ns-blog-web /etc/netns/ns-shop-web"):
                run(line.split())

    def test_a_stale_namespace_file(self):
        self.obey(*BLOG)
        run(["ip", "netns", "del", "ns-blog-web"])
        with open("/run/netns/ns-blog-web", "w"):
            pass
        self.obey("verify", code=1)
        self.obey("restore", "verify")
        self.assertIn("v-blog-web-a", in_ns("ns-blog-web", ["ip", "link"]).out)
        run(["ip", "netns", "del", "ns-blog-web"])
        with open("/run/netns/ns-blog-web", "w"):
            pass
        self.obey("cleanup-all")
        if os.path.exists("/run/netns/ns-blog-web"):  # nothing says whose that empty file is
            os.unlink("/run/netns/ns-blog-web")

    def test_another_process_with_the_recorded_number(self):
        other = subprocess.Popen(["sleep", "1002"], stdin=subprocess.DEVNULL)
        try:
            for line in ("stop-app blog web", "delete-subnet blog web", "delete blog", "cleanup-all"):
                self.obey(*BLOG + [APP])
                changed = record("blog")
                os.kill(changed["apps"][0]["pid"], 9)
                changed["apps"][0]["pid"] = other.pid
                with open(DATA("vpc_blog.json"), "w") as handle:
                    json.dump(changed, handle)
                self.assertIn("app on port 80", self.obey("verify", code=1).out)
                self.obey(line)
                self.assertIsNone(other.poll(), line)
                changed["apps"][0]["pid"] = 1
                self.obey("cleanup-all")
        finally:
            other.kill()
            other.wait()

    def test_programs_in_a_namespace_that_goes_are_named(self):
        self.obey(*BLOG)
        guest = subprocess.Popen(["ip", "netns", "exec", "ns-blog-web", "sleep", "1003"], stdin=subprocess.DEVNULL)
        try:
            wait_until(lambda: any("sleep 1003" in line for line in state()["processes"]), 10, "it runs")
            told = self.obey("delete blog")
            self.assertIn("process %d (sleep)" % guest.pid, told.err)
            self.assertEqual(guest.wait(timeout=30), -signal.SIGTERM)
        finally:
            guest.poll() is None and guest.kill()


# ---- the log, and what adds up ----

class LogTest(FaultTest):

    def test_each_change_is_logged(self):
        self.obey("create blog --cidr 10.20.0.0/16")
        self.obey("create blog --cidr 10.99.0.0/16", code=2)
        self.obey("list")
        with open(DATA("vpcctl.log")) as handle:
            lines = handle.read().splitlines()[-2:]
        time_of = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} "
        self.assertRegex(lines[0], time_of + "create blog --cidr 10.20.0.0/16 -> done$")
        self.assertRegex(lines[1], time_of + "create blog --cidr 10.99.0.0/16 -> refused: VPC blog exists already")

    def test_the_log_is_bounded(self):
        with open(DATA("vpcctl.log"), "w") as handle:
            handle.write("x" * (1 << 20) + "\n")
        self.obey("create blog --cidr 10.20.0.0/16")
        self.assertLess(os.path.getsize(DATA("vpcctl.log")), 1000)
        self.assertLessEqual(os.path.getsize(DATA("vpcctl.log.1")), (1 << 20) + 2000)
        self.assertEqual(stat.S_IMODE(os.stat(DATA("vpcctl.log")).st_mode) & 0o022, 0)
        os.unlink(DATA("vpcctl.log.1"))


def resources():
    """How much of what could add up there is: links, namespaces, chains, mounts, files, open files."""
    with open("/proc/self/mountinfo") as handle:
        mounts = len(handle.readlines())
    now = snapshot()
    files = sum(len(names) for folder in ("/run/vpcctl", "/etc/netns", DATA()) for _, _, names in os.walk(folder))
    with open("/proc/sys/fs/file-nr") as handle:
        handle.read()
    return {"mounts": mounts, "files": files, "links": len(now["links"]), "namespaces": len(now["namespaces"]),
            "firewall": len(now["iptables"]), "routes": len(now["routes"]), "processes": len(now["processes"])}


class SoakTest(FaultTest):
    vpcs, subnets = 5, 4

    def test_nothing_adds_up(self):
        counts = []
        for _ in range(2):
            for number in range(self.vpcs):
                self.obey("create soak%d --cidr 10.%d.0.0/16" % (number, 100 + number))
                self.obey(*["add-subnet soak%d net%d --cidr 10.%d.%d.0/24" % (number, part, 100 + number, part + 1)
                            for part in range(self.subnets)])
            self.obey("verify")
            for number in range(self.vpcs):
                if number % 2:
                    self.obey("delete-subnet soak%d net0" % number)
                self.obey("delete soak%d" % number)
            assert_same(self.empty, state(), "the soak left something")
            counts.append(resources())
        self.assertEqual(counts[0], counts[1])


