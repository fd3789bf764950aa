"""What one reaches for next: exec and shell, the ways back, programs and logs, published ports, names, the shell's help."""

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
import unittest

from support import (INTERNET, LONG, VPCCTL, SandboxTest, assert_same, http_get, in_ns, internet_pid, record, run,
                     snapshot, subnet, tcp_ask, tcp_listener, udp_answers, udp_listener, vpcctl, wait_until)

PUBLIC = "192.0.2.2"                              # the sandbox's own address on its uplink
ECHO = ["python3", "-c", "import socket as k\ns = k.socket(2, 2); s.bind(('', 5353))\nwhile 1: s.sendto(*s.recvfrom(2048))"]


def words(text):
    """Return a command line's words."""
    return text.split()


def blog():
    """Make VPC blog with web and db."""
    for line in ("create blog --cidr 10.20.0.0/16", "add-subnet blog web --cidr 10.20.1.0/24",
                 "add-subnet blog db --cidr 10.20.2.0/24"):
        vpcctl(*words(line))


def shop():
    """Make VPC shop with api and till."""
    for line in ("create shop --cidr 10.30.0.0/16", "add-subnet shop api --cidr 10.30.1.0/24",
                 "add-subnet shop till --cidr 10.30.2.0/24"):
        vpcctl(*words(line))


class Terminal:
    """A program on a terminal of its own: what it prints is read as text, what is typed is sent."""

    def __init__(self, argv, env=None):
        self.master, slave = pty.openpty()

        def own_terminal():
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        self.child = subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave, preexec_fn=own_terminal,
                                      env=dict(dict(os.environ, TERM="xterm"), **(env or {})))
        os.close(slave)
        self.text = ""

    def expect(self, pattern, seconds=3 * LONG):
        """Read on until the pattern is there."""
        end = time.time() + seconds
        while not re.search(pattern, self.text):
            if time.time() > end or not self.read(0.2):
                raise AssertionError("%r is not in %r" % (pattern, self.text))

    def read(self, patience):
        """Read what is there; returns whether more may come."""
        if not select.select([self.master], [], [], patience)[0]:
            return True
        try:
            data = os.read(self.master, 65536)
        except OSError:                               # the other end is closed
            data = b""
        self.text += data.decode("utf-8", "replace")
        return bool(data)

    def type(self, text):
        """Type something."""
        os.write(self.master, text.encode())

    def end(self):
        """Read to the end -> (exit code, all the text)."""
        end = time.time() + 4 * LONG
        while self.read(0.2) and time.time() < end:
            pass
        if time.time() >= end:
            self.child.kill()
        os.close(self.master)
        return self.child.wait(), self.text


def on_terminal(*argv, **options):
    """Run vpcctl on a terminal -> (exit code, text)."""
    return Terminal([sys.executable, VPCCTL] + [str(word) for word in argv], **options).end()


class UmaskTest(SandboxTest):

    def test_it_does_not_matter(self):
        copy = tempfile.mkdtemp(prefix="vpcctl-")
        self.addCleanup(shutil.rmtree, copy)
        os.chmod(copy, 0o755)
        for number, mask in enumerate((0o000, 0o027, 0o077)):
            script = os.path.join(copy, "%o" % mask, "vpcctl.py")
            os.mkdir(os.path.dirname(script), 0o755)
            shutil.copy(VPCCTL, script)
            name, made = "vpc%d" % number, {"/run/vpcctl": 0o755, "/run/vpcctl/vpc%d/hosts" % number: 0o644,
                                            os.path.dirname(script) + "/__pycache__": 0o755}
            before = os.umask(mask)
            try:
                env = {"PYTHONDONTWRITEBYTECODE": None}
                for line in ("create %s --cidr 10.2%d.0.0/16" % (name, number), "add-subnet %s web" % name,
                             "deploy-app %s web --port 80" % name):
                    self.assertEqual(run([script] + words(line), env=env).code, 0, line)
                seen = run([script, "exec", name, "web", "--", "sh", "-c", "umask"], env=env).out
            finally:
                os.umask(before)
            self.assertEqual(int(seen, 8), mask)          # the user's programs are the user's
            self.assertIn("Hello", http_get(None, "10.2%d.0.2" % number))
            self.assertIn("web.%s" % name, in_ns("ns-%s-web" % name, ["cat", "/etc/hosts"]).out)
            self.assertEqual({path: os.stat(path).st_mode & 0o777 for path in made}, made)
            vpcctl("delete", name)
            self.assertFalse(os.path.exists("/run/vpcctl"))


class ExecTest(SandboxTest):

    def setUp(self):
        SandboxTest.setUp(self)
        blog()

    def test_streams_and_exit_code(self):
        done = vpcctl("exec", "blog", "web", "--", "sh", "-c", "cat; echo to-stderr >&2; exit 7", input="from stdin\n", code=7)
        self.assertEqual((done.out, done.err), ("from stdin\n", "to-stderr\n"))
        self.assertIn("10.20.1.2/24", vpcctl("exec", "blog", "web", "--", "ip", "-br", "address").out)
        self.assertEqual(vpcctl("exec", "blog", "web", "--", "printf", "%s|", "a b", "--why", "", "*").out, "a b|--why||*|")
        for number, name in ((9, "KILL"), (15, "TERM")):
            done = run(["sh", "-c", '"$@"; echo $?', "sh", sys.executable, VPCCTL, "exec", "blog", "web", "--",
                        "sh", "-c", "kill -%s $$" % name])
            self.assertEqual(done.out, "%d\n" % (128 + number))
        data = os.urandom(300000)
        child = subprocess.Popen([sys.executable, VPCCTL, "exec", "blog", "web", "--", "cat"], stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE)
        self.assertEqual(child.communicate(data, timeout=60)[0], data)

    def test_the_network_inside(self):
        with tcp_listener("ns-blog-db", 7) as seen:
            vpcctl("exec", "blog", "web", "--", "python3", "-c",
                   "import socket; socket.create_connection(('db', 7), 5)")
            self.assertEqual(seen, ["10.20.1.2"])
        self.assert_open(None, INTERNET, 80)
        self.assertEqual(vpcctl("exec", "blog", "web", "--", "python3", "-c", "import socket\n"
                                "try: socket.create_connection(('%s', 80), 1); print('in')\n"
                                "except OSError: print('not in')" % INTERNET).out, "not in\n")

    def test_terminal(self):
        self.assertEqual(on_terminal("exec", "blog", "web", "--", "sh", "-c", "test -t 0 && test -t 1 && tty")[0], 0)
        self.assertEqual(vpcctl("exec", "blog", "web", "--", "test", "-t", "1", code=1).out, "")
        shell = Terminal([sys.executable, VPCCTL, "shell", "blog", "db"])
        shell.expect(r"\(blog/db\)")
        shell.type("ip -br address show dev v-blog-db-a | cat; echo $((40 + 2))\n")
        shell.expect(r"10\.20\.2\.2/24[\s\S]*\n42")
        shell.type("echo $((6 * 7))x; sleep 50\n")
        shell.expect("42x")
        shell.text = ""
        for _ in range(10):       # Ctrl-C ends what runs in the shell, not the shell; it may come before `sleep` has the terminal
            shell.type("\x03")
            with contextlib.suppress(AssertionError):
                shell.expect(r"\(blog/db\)", 2)
                break
        shell.type("exit 7\n")
        self.assertEqual(shell.end()[0], 7)

    def test_shell_without_a_terminal(self):
        self.assertEqual(vpcctl("shell", "blog", "web", input="ip address | grep -c 10.20.1.2/24; exit 5\n", code=5).out, "1\n")

    def test_refusals(self):
        self.assertIn("exec blog web -- ip addr", vpcctl("exec", "blog", "web", code=2).err)
        self.assertIn("nosuchprogram", vpcctl("exec", "blog", "web", "--", "nosuchprogram", code=127).err)
        self.assertIn("did you mean 'web'", vpcctl("exec", "blog", "wbe", "--", "true", code=2).err)
        self.assertIn("did you mean 'blog'", vpcctl("shell", "bolg", "web", code=2).err)
        self.assertIn("--", vpcctl("exec", "blog", "web", "ls", "-l", code=2).err)
        before = snapshot()
        self.assertEqual(vpcctl("--dry-run", "exec", "blog", "web", "--", "touch", "/run/x").out,
                         ">>> ip netns exec ns-blog-web touch /run/x\n")
        assert_same(before, snapshot())
        run(["ip", "netns", "del", "ns-blog-web"])
        self.assertIn("vpcctl restore", vpcctl("exec", "blog", "web", "--", "true", code=3).err)
        self.assertIn("vpcctl restore", vpcctl("shell", "blog", "web", code=3).err)


class BackTest(SandboxTest):
    """After taking back what was given, the machine is as before."""

    def there_and_back(self, there, back, said, between=lambda: None):
        state = snapshot()
        for line in there:
            vpcctl(*words(line))
        self.assertNotEqual(state["data"], snapshot()["data"], there)
        between()
        vpcctl("verify")
        done = vpcctl(*words(back))
        self.assertIn(said, done.out)
        assert_same(state, snapshot(), back)
        vpcctl("verify")

    def test_each_way_back(self):
        blog()
        shop()
        self.there_and_back(["add-subnet blog cache --cidr 10.20.3.0/24 --gw 10.20.3.77"],
                            "delete-subnet blog cache", "Deleted subnet cache")
        self.there_and_back(["add-subnet blog cache", "deploy-app blog cache --port 80", "publish blog cache --port 8080:80"],
                            "delete-subnet blog cache", "Deleted subnet cache",
                            lambda: self.assertIn("cache", http_get(internet_pid(), PUBLIC, 8080)))
        self.there_and_back(["peer blog shop --allow-cidrs 10.20.1.0/24,10.30.1.0/24"], "unpeer shop blog",
                            "Unpeered VPC shop and blog", lambda: self.assert_ping("ns-blog-web", "10.30.1.2"))
        self.assert_no_ping("ns-blog-web", "10.30.1.2")
        self.there_and_back(["enable-nat blog --interface eth0 --subnet-filter web"], "disable-nat blog", "Disabled NAT",
                            lambda: self.assert_ping("ns-blog-web", INTERNET))
        self.assert_no_ping("ns-blog-web", INTERNET)
        policy = self.file("policy.json", {"subnet": "db", "ingress": [{"protocol": "icmp", "action": "deny"}]})
        self.there_and_back(["apply-policy blog " + policy], "reset-policy blog db", "everything else",
                            lambda: self.assert_no_ping("ns-blog-web", "10.20.2.2"))
        self.assert_ping("ns-blog-web", "10.20.2.2")
        self.there_and_back(["publish blog web --port 8080:80"], "unpublish blog web --port 8080", "Unpublished tcp port 8080")
        self.there_and_back(["deploy-app blog web --port 80"], "stop-app blog web", "Stopped app")

    def test_a_process_inside_ends_and_is_named(self):
        blog()
        child = subprocess.Popen(["ip", "netns", "exec", "ns-blog-db", "sleep", "60"])
        done = vpcctl("delete-subnet", "blog", "db")
        self.assertEqual(child.wait(timeout=20), -signal.SIGTERM)
        self.assertIn("sleep", done.err)

    def test_refusals(self):
        blog()
        shop()
        policy = self.file("policy.json", {"subnet": "db", "ingress": [{"protocol": "tcp", "action": "allow", "from": "web"}]})
        vpcctl("apply-policy", "blog", policy)
        state = snapshot()
        for line, code, said in (
                ("delete-subnet blog web", 2, "reset-policy blog db"), ("delete-subnet blog dbb", 2, "did you mean 'db'"),
                ("unpeer blog shop", 2, "not peered"), ("unpeer blog shpo", 2, "did you mean 'shop'"),
                ("reset-policy blog wbe", 2, "did you mean 'web'"), ("disable-nat bolg", 2, "did you mean 'blog'"),
                ("unpublish blog web --port 8080", 2, "not published"), ("unpublish blog web", 2, "--port"),
                ("delete-subnet blog", 2, "SUBNET"), ("stop-app blog wbe", 2, "did you mean 'web'")):
            with self.subTest(line):
                self.assertIn(said, vpcctl(*words(line), code=code).err)
        for line, said in (("disable-nat blog", "off already"), ("stop-app blog web", "No app"), ("reset-policy blog web", "already")):
            with self.subTest(line):
                self.assertIn(said, vpcctl(*words(line)).out)
        assert_same(state, snapshot())

    def test_dry_runs_change_nothing(self):
        blog()
        vpcctl("enable-nat", "blog")
        vpcctl("deploy-app", "blog", "web", "--port", 80)
        state = snapshot()
        for line, said in (("delete-subnet blog web", "ip netns del ns-blog-web"), ("disable-nat blog", "MASQUERADE"),
                           ("publish blog web --port 80", "DNAT"), ("add-subnet blog more", "10.20.0.0/24"),
                           ("stop-app blog web", ">>> kill "), ("deploy-app blog db --port 9 -- nc -l 9", "nc -l 9 &")):
            with self.subTest(line):
                self.assertIn(said, vpcctl("--dry-run", *words(line)).out)
        assert_same(state, snapshot())


class BlocksTest(SandboxTest):
    """add-subnet without a range takes the first free block."""

    def test_first_free(self):
        vpcctl(*words("create blog --cidr 10.20.0.0/22"))
        vpcctl(*words("add-subnet blog a --cidr 10.20.1.0/25"))
        for name, block in (("b", "10.20.0.0/24"), ("c", "10.20.2.0/24"), ("d", "10.20.3.0/24"), ("e", "10.20.1.128/25")):
            self.assertIn("(%s)" % block, vpcctl("add-subnet", "blog", name).out)
            self.assertEqual(subnet("blog", name)["cidr"], block)
        self.assert_ping("ns-blog-b", subnet("blog", "e")["host_ip"])
        self.assertIn("is full", vpcctl("add-subnet", "blog", "f", code=2).err)
        vpcctl("delete-subnet", "blog", "c")
        self.assertIn("(10.20.2.0/24)", vpcctl("add-subnet", "blog", "f").out)
        self.assertIn("exists already", vpcctl("add-subnet", "blog", "f").out)
        vpcctl("verify")


class ProgramsTest(SandboxTest):

    def setUp(self):
        SandboxTest.setUp(self)
        blog()

    def test_a_program_of_ones_own(self):
        script = ("import http.server, os, sys; print('I am', os.getuid(), os.getcwd(), flush=True); "
                  "http.server.HTTPServer(('', 8000), http.server.SimpleHTTPRequestHandler).serve_forever()")
        done = vpcctl("deploy-app", "blog", "web", "--port", 8000, "--", "python3", "-c", script)
        self.assertIn("Deployed app in subnet web (ns-blog-web) on port 8000, PID=", done.out)
        self.assertIn("blog / web", http_get("ns-blog-db", "10.20.1.2", 8000))
        app = record("blog")["apps"][0]
        self.assertEqual(app["command"], ["python3", "-c", script])
        with open("/proc/%d/status" % app["pid"]) as handle:
            status = handle.read()
        for name in ("CapEff", "CapBnd"):
            self.assertRegex(status, r"%s:\s+0+\n" % name)
        self.assertRegex(status, r"NoNewPrivs:\s+1")
        log = vpcctl("logs", "blog", "web")
        self.assertRegex(log.out, r"^I am \d+ /run/vpcctl/blog/www/web-8000\n")
        self.assertIn("GET / ", log.out)
        self.assertEqual(log.err, "")
        pid = app["pid"]
        self.assertIn("already", vpcctl("deploy-app", "blog", "web", "--port", 8000, "--", "python3", "-c", script).out)
        self.assertEqual(record("blog")["apps"][0]["pid"], pid)
        self.assertIn("another program", vpcctl("deploy-app", "blog", "web", "--port", 8000, code=2).err)
        vpcctl("deploy-app", "blog", "web", "--port", 81)
        self.assertIn("Serving HTTP", vpcctl("logs", "blog", "web", "--port", 81).out)
        self.assertNotIn("I am", vpcctl("logs", "blog", "web", "--port", 81).out)
        vpcctl("stop-app", "blog", "web", "--port", 8000)
        self.assert_refused("ns-blog-db", "10.20.1.2", 8000)
        self.assert_open("ns-blog-db", "10.20.1.2", 81)

    def test_udp(self):
        vpcctl("deploy-app", "blog", "db", "--port", 5353, "--", *ECHO)
        self.assertTrue(udp_answers("ns-blog-web", "10.20.2.2", 5353, LONG))
        self.assertIn("app udp/5353", vpcctl("graph").out)
        self.assertIn("yes: ", vpcctl("explain", "blog", "web", "db", "--port", 5353, "--protocol", "udp", "--probe").out)
        vpcctl("explain", "blog", "web", "db", "--port", 5353, "--probe", code=1)

    def test_what_does_not_start(self):
        state = snapshot()
        for program, said in ((["sh", "-c", "echo no luck today; exit 4"], "no luck today"), (["nosuchprogram"], "nosuchprogram"),
                              (["true"], "it said nothing")):
            with self.subTest(program):
                failed = vpcctl("deploy-app", "blog", "web", "--port", 80, "--", *program, code=3)
                self.assertIn("does not listen on port 80: ", failed.err)
                self.assertIn(said, failed.err)
                assert_same(state, snapshot())
        with tcp_listener("ns-blog-web", 80):
            self.assertIn("in use already", vpcctl("deploy-app", "blog", "web", "--port", 80, code=3).err)

    def test_follow(self):
        vpcctl("deploy-app", "blog", "web", "--port", 80)
        child = subprocess.Popen([sys.executable, VPCCTL, "logs", "-f", "blog", "web"], stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE)
        self.addCleanup(child.stdout.close)
        self.addCleanup(child.stderr.close)
        seen = b""

        def read_until(text):
            nonlocal seen
            if select.select([child.stdout], [], [], 0.05)[0]:
                seen += os.read(child.stdout.fileno(), 65536)
            return text in seen
        try:
            wait_until(lambda: read_until(b"Serving HTTP"), 4 * LONG, "the beginning")
            self.assertNotIn(b"GET /", seen)
            http_get("ns-blog-db", "10.20.1.2")
            wait_until(lambda: read_until(b"GET / "), 4 * LONG, "what is added")
        finally:
            child.send_signal(signal.SIGINT)
        self.assertIn(child.wait(timeout=20), (130, -signal.SIGINT))
        self.assertEqual(child.stderr.read(), b"")

    def test_refusals(self):
        state = snapshot()
        for line, code, said in (
                ("logs blog web", 2, "deploy-app blog web"), ("logs blog wbe", 2, "did you mean 'web'"),
                ("deploy-app blog web", 2, "--port"), ("deploy-app blog web --port 0", 2, "not a port"),
                ("deploy-app blog wbe --port 80", 2, "did you mean 'web'")):
            with self.subTest(line):
                self.assertIn(said, vpcctl(*words(line), code=code).err)
        assert_same(state, snapshot())


class PublishTest(SandboxTest):

    def setUp(self):
        SandboxTest.setUp(self)
        blog()

    def lan(self):
        """Give the host a second interface, with a machine behind it."""
        for line in ("ip netns add far", "ip link add lan0 type veth peer name far0 netns far",
                     "ip address add 10.77.0.1/24 dev lan0", "ip link set lan0 up",
                     "ip -n far address add 10.77.0.2/24 dev far0", "ip -n far link set far0 up",
                     "ip -n far route add default via 10.77.0.1"):
            self.assertEqual(run(words(line)).code, 0, line)

    def tearDown(self):
        run(["ip", "netns", "del", "far"])
        run(["ip", "link", "del", "lan0"])
        SandboxTest.tearDown(self)

    def both(self, check):
        """Check without NAT, and with it."""
        check()
        vpcctl("enable-nat", "blog")
        check()
        self.assert_ping("ns-blog-db", INTERNET)
        vpcctl("disable-nat", "blog")
        check()

    def test_tcp(self):
        outside = internet_pid()
        vpcctl(*words("publish blog web --port 8080:80"))

        def check():
            with tcp_listener("ns-blog-web", 80) as seen:
                self.assertEqual(tcp_ask(outside, PUBLIC, 8080), b"hello\n")
                self.assertEqual(seen, ["192.0.2.1"])                     # the client's own address
                with tcp_listener("ns-blog-web", 81), tcp_listener("ns-blog-web", 8080):
                    self.assert_refused(outside, PUBLIC, 80)              # the host's own ports are its own
                    self.assert_refused(outside, PUBLIC, 81)
                    self.assert_refused(outside, PUBLIC, 8081)
                    with_route = run(["nsenter", "-t", str(outside), "-n", "ip", "route", "add", "10.20.0.0/16", "via", PUBLIC])
                    self.assertEqual(with_route.code, 0, with_route)
                    try:                                                  # and not by the subnet's address
                        for port in (80, 81, 8080):
                            self.assert_dropped(outside, "10.20.1.2", port)
                        self.assert_no_ping(outside, "10.20.1.2")
                    finally:
                        run(["nsenter", "-t", str(outside), "-n", "ip", "route", "del", "10.20.0.0/16"])
            self.assert_refused(outside, PUBLIC, 8080)                    # it arrives, and nothing listens
        self.both(check)
        vpcctl("verify")
        self.assertIn("tcp/8080 -> 80", vpcctl("graph").out)

    def test_udp(self):
        outside = internet_pid()
        vpcctl(*words("publish blog db --port 5300:53 --protocol udp"))

        def check():
            with udp_listener("ns-blog-db", 53) as seen, udp_listener("ns-blog-db", 54), tcp_listener("ns-blog-db", 53):
                self.assertTrue(udp_answers(outside, PUBLIC, 5300, LONG))
                self.assertEqual(seen, ["192.0.2.1"])
                self.assertFalse(udp_answers(outside, PUBLIC, 53))
                self.assert_refused(outside, PUBLIC, 5300)
        self.both(check)

    def test_the_policy_applies(self):
        outside = internet_pid()
        vpcctl(*words("publish blog web --port 8080:80"))
        with tcp_listener("ns-blog-web", 80):
            self.assert_open(outside, PUBLIC, 8080)
            for source, opened in (("192.0.2.0/24", True), ("10.20.0.0/16", False)):
                path = self.file("policy.json", {"subnet": "web", "ingress": [
                    {"port": 80, "protocol": "tcp", "action": "allow", "from": source}]})
                vpcctl("apply-policy", "blog", path)
                (self.assert_open if opened else self.assert_dropped)(outside, PUBLIC, 8080)
            vpcctl("reset-policy", "blog", "web")
            self.assert_open(outside, PUBLIC, 8080)
            vpcctl(*words("unpublish blog web --port 8080"))
            self.assert_refused(outside, PUBLIC, 8080)

    def test_only_by_its_interface(self):
        self.lan()
        vpcctl(*words("publish blog web --port 8080:80"))
        with tcp_listener("ns-blog-web", 80) as seen:
            self.assert_open(internet_pid(), PUBLIC, 8080)
            self.assert_refused("far", "10.77.0.1", 8080)
            self.assert_dropped("far", "10.20.1.2", 80)
            vpcctl(*words("unpublish blog web --port 8080"))
            vpcctl(*words("publish blog web --port 8080:80 --interface lan0"))
            self.assert_open("far", "10.77.0.1", 8080)
            wait_until(lambda: seen[-1:] == ["10.77.0.2"], LONG, "the client's own address")
            self.assert_refused(internet_pid(), PUBLIC, 8080)
        vpcctl("verify")

    def test_refusals(self):
        vpcctl(*words("publish blog web --port 8080:80"))
        state = snapshot()
        self.assertIn("already", vpcctl(*words("publish blog web --port 8080:80")).out)
        for line, said in (
                ("publish blog db --port 8080", "published already: for blog web"),
                ("publish blog web --port 8080:81", "published already"), ("publish blog web --port 8080:", "port"),
                ("publish blog web --port x", "not a port"), ("publish blog web", "--port"),
                ("publish blog web --port 99 --interface eth9", "eth9"), ("publish blog web --port 99 --interface br-blog", "br-blog"),
                ("publish blog wbe --port 99", "did you mean 'web'"), ("publish blog web --port 99 --protocol icmp", "icmp"),
                ("unpublish blog db --port 8080", "not published"), ("unpublish blog web --port 8080 --protocol udp", "not published")):
            with self.subTest(line):
                self.assertIn(said, vpcctl(*words(line), code=2).err)
        assert_same(state, snapshot())


def known_names(ns):
    """Return what a namespace's hosts file says: name -> address."""
    found = {}
    for line in in_ns(ns, ["cat", "/etc/hosts"]).out.splitlines():
        address, *names = line.split("#")[0].split() or [""]
        found.update((name, address) for name in names if address.startswith("10."))
    return found


class NamesTest(SandboxTest):

    def all_of(self, name, vpc, address, short=True):
        return dict([("%s.%s" % (name, vpc), address), ("%s.%s.internal" % (name, vpc), address)]
                    + ([(name, address)] if short else []))

    def test_names_come_and_go(self):
        blog()
        shop()
        own = dict(self.all_of("web", "blog", "10.20.1.2"), **self.all_of("db", "blog", "10.20.2.2"))
        self.assertEqual(known_names("ns-blog-web"), own)
        self.assertEqual(in_ns("ns-blog-web", ["getent", "hosts", "db.blog.internal"]).out.split()[0], "10.20.2.2")
        vpcctl(*words("peer blog shop --allow-cidrs 10.20.1.0/24,10.30.1.0/24"))
        peers = self.all_of("api", "shop", "10.30.1.2", short=False)     # till is not allowed: it has no name here
        self.assertEqual(known_names("ns-blog-db"), dict(own, **peers))
        self.assertEqual(known_names("ns-shop-till"), dict(
            self.all_of("api", "shop", "10.30.1.2"), **dict(self.all_of("till", "shop", "10.30.2.2"),
                                                            **self.all_of("web", "blog", "10.20.1.2", short=False))))
        vpcctl(*words("exec blog web -- ping -c 1 -W 5 api.shop") if shutil.which("ping") else words("list"))
        with open("/etc/hosts") as handle:
            self.assertNotIn("api.shop", handle.read())
        vpcctl(*words("add-subnet blog cache --cidr 10.20.3.0/24"))
        more = self.all_of("cache", "blog", "10.20.3.2")
        for ns in ("ns-blog-web", "ns-blog-cache"):
            self.assertEqual(known_names(ns), dict(own, **dict(peers, **more)))
        vpcctl(*words("delete-subnet shop api"))
        self.assertEqual(known_names("ns-blog-web"), dict(own, **more))
        vpcctl(*words("delete-subnet blog cache"))
        vpcctl(*words("unpeer blog shop"))
        self.assertEqual(known_names("ns-blog-web"), own)
        self.assertFalse(os.path.exists("/etc/netns/ns-blog-cache"))

    def test_a_running_program_sees_new_names(self):
        blog()
        script = "read x; getent hosts cache | cut -d' ' -f1"
        child = subprocess.Popen([sys.executable, VPCCTL, "exec", "blog", "web", "--", "sh", "-c", script],
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        wait_until(lambda: "sh" == open("/proc/%d/comm" % child.pid).read().strip(), 4 * LONG, "the program runs")
        vpcctl(*words("add-subnet blog cache --cidr 10.20.3.0/24"))
        self.assertEqual(child.communicate(b"go\n", timeout=20)[0], b"10.20.3.2\n")

    def test_resolv_conf(self):
        blog()
        self.assertNotIn("nameserver", in_ns("ns-blog-web", ["cat", "/etc/resolv.conf"]).out)
        vpcctl("enable-nat", "blog")
        servers = re.findall(r"(?m)^nameserver (\S+)$", in_ns("ns-blog-web", ["cat", "/etc/resolv.conf"]).out)
        self.assertTrue(servers)
        self.assertEqual([server for server in servers if server.startswith("127.")], [])
        vpcctl("disable-nat", "blog")
        self.assertNotIn("nameserver", in_ns("ns-blog-web", ["cat", "/etc/resolv.conf"]).out)

    def test_files_of_somebody_else(self):
        os.makedirs("/etc/netns/ns-blog-web")
        self.addCleanup(shutil.rmtree, "/etc/netns/ns-blog-web")
        with open("/etc/netns/ns-blog-web/hosts", "w") as handle:
            handle.write("10.9.9.9 mine\n")
        blog()
        self.assertEqual(known_names("ns-blog-web"), {"mine": "10.9.9.9"})
        self.assertIn("db.blog", known_names("ns-blog-db"))
        vpcctl("verify")
        vpcctl(*words("add-subnet blog cache"))
        vpcctl("restore")
        vpcctl("delete", "blog")
        with open("/etc/netns/ns-blog-web/hosts") as handle:
            self.assertEqual(handle.read(), "10.9.9.9 mine\n")
        self.assertEqual(os.listdir("/etc/netns"), ["ns-blog-web"])
        self.assertEqual(os.listdir("/etc/netns/ns-blog-web"), ["hosts"])

    def tearDown(self):
        vpcctl("cleanup-all")
        self.doCleanups()
        self.assert_as_before()


BASH = """\
source <(vpcctl completion bash)
for line in "$@"; do
    read -r -a COMP_WORDS <<< "$line"
    [ "${line% }" = "$line" ] || COMP_WORDS+=("")
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _vpcctl
    echo "$line= ${COMPREPLY[*]}"
done
complete -p vpcctl
"""


class HelpTest(SandboxTest):

    def setUp(self):
        SandboxTest.setUp(self)
        blog()
        shop()
        vpcctl(*words("peer blog shop --allow-cidrs 10.20.1.0/24,10.30.1.0/24"))

    def offers(self, *lines):
        done = run(["bash", "-c", BASH, "bash"] + list(lines))
        self.assertEqual((done.code, done.err), (0, ""), done)
        self.assertIn("_vpcctl vpcctl", done.out)
        return {line.partition("= ")[0]: line.partition("= ")[2].split() for line in done.out.splitlines() if "= " in line}

    @unittest.skipUnless(shutil.which("bash"), "bash is not installed")
    def test_bash(self):
        found = self.offers("vpcctl exp", "vpcctl explain ", "vpcctl explain b", "vpcctl explain blog ", "vpcctl explain blog w",
                            "vpcctl unpeer blog ", "vpcctl explain blog web --protocol ", "vpcctl delete-subnet shop t",
                            "vpcctl completion ", "vpcctl --dry", "vpcctl __", "vpcctl enable-nat blog --interface e",
                            "vpcctl graph --format s", "vpcctl export blog ", "vpcctl nosuch ", "vpcctl create ")
        self.assertEqual(sorted(found["vpcctl exp"]), ["explain", "export"])
        self.assertEqual(set(found["vpcctl explain "]) & {"blog", "shop"}, {"blog", "shop"})
        self.assertEqual(found["vpcctl explain b"], ["blog"])
        self.assertEqual(set(found["vpcctl explain blog "]) & {"web", "db", "api"}, {"web", "db"})
        self.assertEqual(found["vpcctl explain blog w"], ["web"])
        self.assertIn("shop", found["vpcctl unpeer blog "])
        self.assertNotIn("blog", found["vpcctl unpeer blog "])
        self.assertEqual(found["vpcctl explain blog web --protocol "], ["tcp", "udp", "icmp", "all"])
        self.assertEqual(found["vpcctl delete-subnet shop t"], ["till"])
        self.assertEqual(set(found["vpcctl completion "]) & {"bash", "zsh", "fish"}, {"bash", "zsh", "fish"})
        self.assertEqual(found["vpcctl --dry"], ["--dry-run"])
        self.assertEqual(found["vpcctl __"], [])
        self.assertEqual(found["vpcctl enable-nat blog --interface e"], ["eth0"])
        self.assertEqual(found["vpcctl graph --format s"], ["svg"])
        self.assertIn("shop", found["vpcctl export blog "])
        self.assertEqual(found["vpcctl nosuch "], [])
        self.assertNotIn("blog", found["vpcctl create "])

    @unittest.skipUnless(shutil.which("bash"), "bash is not installed")
    def test_bash_offers_files(self):
        path = self.file("topology.json", "{}")
        found = self.offers("vpcctl apply %s" % path[:-5])
        self.assertEqual(list(found.values()), [[path]])

    def test_other_shells(self):
        for name in ("zsh", "fish"):
            script = vpcctl("completion", name).out
            self.assertIn("vpcctl __complete -- ", script)
            if shutil.which(name):
                done = run([name, "-n", self.file("script", script)])
                self.assertEqual((done.code, done.err), (0, ""))
        self.assertIn("bash", vpcctl("completion", "tcsh", code=2).err)

    def test_manual(self):
        page = vpcctl("man").out
        for name in ("explain", "publish", "apply", "deploy\\-app"):
            self.assertRegex(page, r"(?m)^\.S[SH] \"?%s" % re.escape(name))
        if shutil.which("groff"):
            done = run(["groff", "-man", "-ww", "-Tutf8"], input=page)
            self.assertEqual((done.code, done.err), (0, ""))
            self.assertIn("EXIT STATUS", re.sub(r".\x08|\x1b\[[0-9;]*m", "", done.out))
        if shutil.which("man"):
            done = run(["man", "--warnings", "-l", self.file("vpcctl.8", page)], env={"MANPAGER": "cat", "LC_ALL": "C.UTF-8"})
            self.assertEqual((done.code, done.err), (0, ""))
            self.assertIn("blog", done.out)

    def test_did_you_mean(self):
        for line, said in (("lst", "'list'"), ("add-subnte blog x", "'add-subnet'"), ("explain bolg web db", "'blog'"),
                           ("explain blog wbe db", "'web'"), ("apply-polcy blog x", "'apply-policy'"),
                           ("list --jsno", "'--json'"), ("delete bl0g", "'blog'"), ("graph shpo", "'shop'")):
            with self.subTest(line):
                self.assertIn("did you mean %s" % said, vpcctl(*words(line), code=2).err)
        self.assertNotIn("did you mean", vpcctl("xyzzy", code=2).err)

    def test_colour_only_on_a_terminal_that_wants_it(self):
        for line in ("verify", "list --long", "explain blog web db --port 22", "explain blog web api.shop"):
            with self.subTest(line):
                self.assertNotIn("\033", vpcctl(*words(line), ok=False).out)
                code, text = on_terminal(*words(line))
                self.assertIn(code, (0, 1))
                self.assertIn("\033[", text)
                self.assertNotIn("\033", on_terminal(*words(line), env={"NO_COLOR": "1"})[1])
                self.assertNotIn("\033", on_terminal(*words(line), env={"TERM": "dumb"})[1])
                self.assertEqual(re.sub(r"\033\[\d+m", "", text).replace("\r", ""), vpcctl(*words(line), ok=False).out)
        self.assertNotIn("\033", on_terminal("list", "--json")[1])

    def test_json_on_stdout_is_only_json(self):
        vpcctl("enable-nat", "blog")
        vpcctl("deploy-app", "blog", "web", "--port", 80)
        vpcctl(*words("publish blog web --port 8080:80"))
        rows = json.loads(vpcctl("list", "--json").out)
        self.assertEqual([(row["name"], row["cidr"], row["state"], row["subnets"], row["peers"]) for row in rows], [
            ("blog", "10.20.0.0/16", "up", ["web", "db"], ["shop"]), ("shop", "10.30.0.0/16", "up", ["api", "till"], ["blog"])])
        self.assertEqual(json.loads(vpcctl("inspect", "blog").out)["bridge"], "br-blog")
        self.assertEqual(json.loads(vpcctl("export").out)["vpcs"][0]["name"], "blog")
        found = json.loads(vpcctl("verify", "--json").out)
        self.assertEqual((found["ok"], found["vpcs"], found["findings"]), (True, ["blog", "shop"], []))
        run(["ip", "link", "del", "br-blog"])
        found = json.loads(vpcctl("verify", "--json", code=1).out)
        self.assertFalse(found["ok"])
        self.assertIn("br-blog", json.dumps(found["findings"]))
        self.assertNotEqual(json.loads(vpcctl("list", "--json").out)[0]["state"], "up")
        policy = json.loads(vpcctl(*words("explain blog web db --port 22 --policy")).out)
        self.assertEqual(policy["subnet"], "10.20.2.0/24")
        path = os.path.join(os.environ["VPCCTL_DATA"], "vpc_shop.json")
        with open(path) as handle:
            text = handle.read()
        with open(path, "w") as handle:
            handle.write(text[:50])
        rows = json.loads(vpcctl("list", "--json").out)
        self.assertIn("unreadable", rows[1]["state"])
        with open(path, "w") as handle:
            handle.write(text)

    def test_list(self):
        self.assertEqual(vpcctl("list").out, "VPCs:\n- blog\n- shop\n")
        rows = vpcctl("list", "--long").out.splitlines()
        self.assertEqual(rows[0].split()[:3], ["VPC", "RANGE", "STATE"])
        self.assertEqual(rows[1].split()[:4], ["blog", "10.20.0.0/16", "up", "2"])
        self.assertEqual(vpcctl("list", "--long").out.splitlines(), rows)      # the same again: nothing in it moves

    def test_graph(self):
        for name, mark in (("tree", "blog 10.20.0.0/16"), ("mermaid", "flowchart"), ("dot", "digraph"), ("svg", "<svg ")):
            path = self.file("graph." + name, "")
            self.assertIn(mark, vpcctl("graph", "--format", name).out)
            self.assertIn("Wrote", vpcctl("graph", "blog", "--format", name, "-o", path).out)
            with open(path, encoding="utf-8") as handle:
                text = handle.read()
            self.assertIn(mark, text)
            self.assertNotIn("till", text)
        self.assertIn("cannot write", vpcctl("graph", "-o", "/nonexistent/x", code=2).err)
        self.assertIn("svg", vpcctl("graph", "--format", "png", code=2).err)


if __name__ == "__main__":
    unittest.main()
