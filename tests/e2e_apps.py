"""Apps are strangers to each other and to the host, are ended wherever they went, and hold nobody up."""

import fcntl
import json
import os
import re
import shutil
import stat
import subprocess
import tempfile
import unittest

from injection import load_vpcctl
from support import LONG, VPCCTL, SandboxTest, http_get, record, run, snapshot, socket_in, vpcctl, wait_until

NOBODY = 65534
DATA = lambda *names: os.path.join(os.environ["VPCCTL_DATA"], *names)
MANY_USERS = load_vpcctl().app_users() is not None
ONE_USER = "in a sandbox of an ordinary user there is but one user"

# Programs of hostile apps. Each obeys whoever connects: a line comes in, a line goes out.
BASE = r"""
import ctypes, json, os, signal, socket, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)

def serve(answer):
    while True:
        client = server.accept()[0]
        client.sendall(json.dumps(answer(client.makefile().readline().split())).encode() + b"\n")
        client.close()

server = socket.socket()
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
server.bind(("", int(sys.argv[1])))
server.listen(8)
"""
# Tries what one process can do to another, and says what came through.
THIEF = BASE + r"""
PIDFD_OPEN, PIDFD_GETFD = 434, 438
secret = ctypes.create_string_buffer(b"it is a secret")

def attempts(pid, address, handle):
    done = []
    def attempt(name, work):
        try:
            done.append(name) if work() else None
        except OSError:
            pass
    def memory():
        with open("/proc/%d/mem" % pid, "rb", 0) as found:
            found.seek(address)
            return found.read(14) == b"it is a secret"
    def socket_of():
        known = libc.syscall(PIDFD_OPEN, pid, 0)
        return known >= 0 and libc.syscall(PIDFD_GETFD, known, handle, 0) >= 0
    attempt("kill", lambda: os.kill(pid, 0) is None)
    attempt("environ", lambda: open("/proc/%d/environ" % pid, "rb").read())
    attempt("memory", memory)
    attempt("socket", socket_of)
    return done

def answer(words):
    if words[0] == "where":
        return [os.getpid(), ctypes.addressof(secret), server.fileno(),
                os.getuid(), os.getgid(), os.getgroups()]
    if words[0] == "read":
        try:
            return len(open(words[1], "rb").read(100))
        except OSError as error:
            return error.errno
    if words[0] == "child":
        child = os.fork()
        if not child:
            time.sleep(60)
        try:
            return attempts(child, ctypes.addressof(secret), server.fileno())
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)
    return attempts(*map(int, words[1:]))
serve(answer)
"""
# Leaves: its children go where nobody looks, and when it is told it changes its name and its namespace.
STRAY = BASE + r"""
clean = {}
if not os.getuid():                               # with one user for all, it is found by this
    clean["VPCCTL_APP"] = os.environ["VPCCTL_APP"]
NEWUSER_NEWNET = 0x50000000
ready = os.pipe()
for number in range(3):
    if not os.fork():
        os.setsid()
        if not os.fork():
            server.close()
            libc.unshare(NEWUSER_NEWNET)
            os.write(ready[1], b"+")
            os.execve(sys.executable, [b"\xff) S 1 1 (", "-c", "import time; time.sleep(7000)"], clean)
        os._exit(0)
    os.wait()
    os.read(ready[0], 1)

def answer(words):
    libc.prctl(15, b"\xff\n) Z 1 (", 0, 0, 0)
    if "ignore" in words:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return libc.unshare(NEWUSER_NEWNET) if "leave" in words else 0
serve(answer)
"""
# Its first thread ends, and another goes on: the kernel shows a zombie.
GHOST = BASE + r"""
import platform, threading
told = threading.Event()
threading.Thread(target=serve, args=(lambda words: told.set() or os.getpid(),)).start()
told.wait()
libc.syscall({"x86_64": 60, "aarch64": 93}[platform.machine()], 0)
"""
# Forks without end, each child in a session of its own.
BOMB = BASE + r"""
import resource
resource.setrlimit(resource.RLIMIT_NPROC, (20, 20))
if not os.fork():
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        try:
            if not os.fork():
                os.setsid()
        except OSError:
            time.sleep(0.01)
    os._exit(0)
serve(lambda words: 0)
"""


def ask(ip, port, *words):
    """Tell an app something -> its answer."""
    with socket_in(None) as sock:
        sock.settimeout(LONG)
        sock.connect((ip, port))
        sock.sendall((" ".join(map(str, words)) + "\n").encode())
        return json.loads(sock.makefile().readline())


def as_user(user, *argv):
    """A command line as another user."""
    return ["setpriv", "--reuid=%d" % user, "--regid=%d" % user, "--clear-groups"] + list(argv)


def runs_as(pid):
    """The user id of a process, or None."""
    process = load_vpcctl().processes().get(pid)
    return process and process.user


def deploy(vpc, subnet, port, program):
    """Deploy one of the programs above; returns its record."""
    vpcctl("deploy-app", vpc, subnet, "--port", port, "--", "python3", "-c", program, port)
    return [app for app in record(vpc)["apps"] if (app["subnet"], app["port"]) == (subnet, port)][0]


def mode(path):
    """A file's mode."""
    return stat.S_IMODE(os.stat(path).st_mode)


def rewrite(vpc, change):
    """Change a record by hand: `change` is called with it."""
    found = record(vpc)
    change(found)
    with open(DATA("vpc_%s.json" % vpc), "w") as handle:
        json.dump(found, handle)


class AppsTest(SandboxTest):

    def setUp(self):
        SandboxTest.setUp(self)
        for line in ("create blog --cidr 10.20.0.0/16", "add-subnet blog web --cidr 10.20.1.0/24",
                     "create shop --cidr 10.30.0.0/16", "add-subnet shop api --cidr 10.30.1.0/24"):
            vpcctl(*line.split())


# ---- strangers ----

@unittest.skipUnless(MANY_USERS, ONE_USER)
class StrangersTest(AppsTest):

    def test_no_app_reaches_another(self):
        apps = {"10.20.1.2 80": deploy("blog", "web", 80, THIEF),
                "10.20.1.2 81": deploy("blog", "web", 81, THIEF),
                "10.30.1.2 80": deploy("shop", "api", 80, THIEF)}
        users = {app["user"] for app in apps.values()}
        self.assertEqual(len(users), 3)
        known = {place: ask(place.split()[0], int(place.split()[1]), "where") for place in apps}
        for place, (pid, _, _, user, group, groups) in known.items():
            app = apps[place]
            self.assertEqual((pid, user, group, groups), (app["pid"], app["user"], app["user"], []))
        for thief in apps:
            ip, port = thief.split()
            everything = ask(ip, int(port), "child")
            self.assertEqual(everything[:3], ["kill", "environ", "memory"])      # a child of its own: it can
            if "socket" not in everything:
                print("pidfd_getfd: this kernel has none")
            for victim, (pid, address, handle, _, _, _) in known.items():
                got = ask(ip, int(port), "try", pid, address, handle)
                self.assertEqual(got, everything if victim == thief else [], "%s -> %s" % (thief, victim))
            got = ask(ip, int(port), "try", os.getpid(), 0, 0)
            self.assertEqual(got, [], "%s -> the host" % thief)
            self.assertEqual(ask(ip, int(port), "read", DATA("vpc_blog.json")), 100)
            for name in ("lock", "vpcctl.log", apps[thief]["log"]):
                self.assertEqual(ask(ip, int(port), "read", DATA(name)), 13, name)

    def test_ids_are_nobody_else_s_and_come_back(self):
        tool = load_vpcctl()
        first = deploy("blog", "web", 80, THIEF)["user"]
        self.assertTrue(tool.is_app_user(first))
        self.assertFalse(tool.is_account(first))
        self.assertTrue(tool.is_account(0) and tool.is_account(os.stat("/").st_uid))
        vpcctl("stop-app", "blog", "web")
        plan = vpcctl("--dry-run", "deploy-app", "blog", "web", "--port", 80).out
        self.assertIn("--reuid=%d --regid=%d " % (first, first), plan)
        # somebody else's program has it meanwhile
        guest = subprocess.Popen(as_user(first, "sleep", "1000"))
        self.addCleanup(lambda: (guest.kill(), guest.wait()))
        wait_until(lambda: runs_as(guest.pid) == first, LONG, "it runs")
        second = deploy("blog", "web", 80, THIEF)["user"]
        self.assertNotEqual(second, first)
        vpcctl("stop-app", "blog", "web")
        self.assertIsNone(guest.poll())
        rewrite("shop", lambda found: found["apps"].append(dict(load_vpcctl().new_app(
            found, found["subnets"][0], 9, []), user=second)))
        self.assertNotIn(deploy("blog", "web", 80, THIEF)["user"], (first, second))
        guest.kill()
        guest.wait()

    def test_an_account_made_later(self):
        """Its programs are not ours to end."""
        tool = load_vpcctl()
        deploy("blog", "web", 80, THIEF)
        for path, line in (("/etc/passwd", "late:x:%d:%d::/:/bin/sh\n"), ("/etc/subuid", "late:%d:%d\n")):
            with self.subTest(path):
                app = record("blog")["apps"][0]
                number = (app["user"], app["user"]) if path == "/etc/passwd" else (app["user"] - 100, 1000)
                folder = tempfile.mkdtemp()
                copy = os.path.join(folder, "copy")
                with open(copy, "w") as handle:
                    if os.path.exists(path):
                        with open(path) as old:
                            handle.write(old.read())
                    handle.write(line % number)
                if not os.path.exists(path):
                    with open(path, "w"):
                        pass
                    self.addCleanup(os.unlink, path)
                guest = subprocess.Popen(as_user(app["user"], "sleep", "1000"))
                run(["mount", "--bind", copy, os.path.realpath(path)])
                try:
                    wait_until(lambda: runs_as(guest.pid) == app["user"], LONG, "it runs")
                    vpcctl("stop-app", "blog", "web")
                    self.assertEqual(tool.process_start(app["pid"]), "")
                    self.assertIsNone(guest.poll())
                    deploy("blog", "web", 80, THIEF)
                    self.assertNotEqual(record("blog")["apps"][0]["user"], app["user"])
                finally:
                    run(["umount", os.path.realpath(path)])
                    guest.kill()
                    guest.wait()
                    shutil.rmtree(folder)
                self.assertEqual(ask("10.20.1.2", 80, "where")[0], record("blog")["apps"][0]["pid"])

    def test_a_record_of_an_older_version(self):
        app = deploy("blog", "web", 80, THIEF)
        vpcctl("deploy-app", "shop", "api", "--port", 80)
        old = {key: app[key] for key in app if key != "user"}
        rewrite("blog", lambda found: found.update(apps=[old]))
        vpcctl("verify")
        vpcctl("add-subnet", "blog", "db")
        self.assertEqual(record("blog")["apps"], [old])
        os.kill(app["pid"], 9)
        wait_until(lambda: not load_vpcctl().process_start(app["pid"]), LONG, "it has ended")
        vpcctl("restore")
        new = record("blog")["apps"][0]
        self.assertEqual(ask("10.20.1.2", 80, "where")[3], new["user"])
        self.assertNotEqual(new["user"], record("shop")["apps"][0]["user"])

    def test_an_impossible_user(self):
        deploy("blog", "web", 80, THIEF)
        for user in (0, -1, 1000, NOBODY, 1 << 31, "1", True):
            rewrite("blog", lambda found: found["apps"][0].update(user=user))
            self.assertIn("unreadable", vpcctl("stop-app", "blog", "web", code=2).err)
        vpcctl("delete", "--force", "blog")


# ---- ended, wherever it went ----

class LeavingTest(AppsTest):

    def deploy_stray(self, how):
        """Deploy what leaves; it is told to, and goes on serving."""
        state = snapshot()
        app = deploy("blog", "web", 80, STRAY)
        self.assertEqual(len(snapshot()["processes"]), len(state["processes"]) + 4)
        self.assertEqual(ask("10.20.1.2", 80, how), 0)
        return state, app

    def gone(self, state):
        """All that the app had started has ended."""
        self.assertEqual(snapshot()["processes"], state["processes"])

    def test_each_way_to_end_it(self):
        for line in ("stop-app blog web", "delete-subnet blog web", "delete blog", "cleanup-all"):
            with self.subTest(line):
                state, _ = self.deploy_stray("leave")
                self.assertEqual(ask("10.20.1.2", 80, "x"), 0)           # it does serve
                vpcctl(*line.split())
                self.gone(state)
                vpcctl("cleanup-all")
                for again in ("create blog --cidr 10.20.0.0/16", "add-subnet blog web --cidr 10.20.1.0/24"):
                    vpcctl(*again.split())

    def test_one_that_does_not_want_to(self):
        state, _ = self.deploy_stray("leave ignore")
        vpcctl("stop-app", "blog", "web")
        self.gone(state)

    def test_one_that_apply_takes_away(self):
        topology = json.loads(vpcctl("export").out)
        state, _ = self.deploy_stray("leave")
        vpcctl("apply", self.file("without.json", topology))
        self.gone(state)

    def test_a_failed_deployment(self):
        state = snapshot()
        program = STRAY.replace("server.listen(8)", "").rpartition("serve(answer)")[0] + "sys.exit('no luck')"
        failed = vpcctl("deploy-app", "blog", "web", "--port", 80, "--", "python3", "-c", program, 80, code=3)
        self.assertIn("no luck", failed.err)
        self.gone(state)

    def test_restore_starts_it_anew(self):
        state, app = self.deploy_stray("leave")
        vpcctl("verify", code=1)
        vpcctl("restore")
        self.assertNotEqual(record("blog")["apps"][0]["pid"], app["pid"])
        self.assertEqual(len(snapshot()["processes"]), len(state["processes"]) + 4)
        run(["ip", "netns", "del", "ns-blog-web"])                       # its namespace has lost its name
        vpcctl("restore")
        self.assertEqual(len(snapshot()["processes"]), len(state["processes"]) + 4)
        vpcctl("stop-app", "blog", "web")
        self.gone(state)

    @unittest.skipUnless(os.uname()[4] in ("x86_64", "aarch64"), "the number of a system call is needed")
    def test_without_its_first_thread(self):
        state = snapshot()
        app = deploy("blog", "web", 80, GHOST)
        ask("10.20.1.2", 80, "x")
        with open("/proc/%d/status" % app["pid"]) as handle:
            wait_until(lambda: handle.seek(0) == 0 and "State:\tZ" in handle.read(), LONG, "a thread ends")
        self.assertEqual(ask("10.20.1.2", 80, "x"), app["pid"])
        vpcctl("verify")
        vpcctl("stop-app", "blog", "web")
        self.gone(state)
        self.assert_refused(None, "10.20.1.2", 80)

    def test_one_that_forks_without_end(self):
        state = snapshot()
        deploy("blog", "web", 80, BOMB)
        if MANY_USERS:
            wait_until(lambda: len(snapshot()["processes"]) > len(state["processes"]) + 10, LONG, "it forks")
        vpcctl("stop-app", "blog", "web")
        self.gone(state)

    def test_its_neighbours_go_on(self):
        state = snapshot()
        deploy("blog", "web", 81, STRAY)
        deploy("shop", "api", 80, STRAY)
        others = snapshot()["processes"]
        deploy("blog", "web", 80, STRAY)
        vpcctl("stop-app", "blog", "web", "--port", 80)
        self.assertEqual(snapshot()["processes"], others)
        self.assertEqual((ask("10.20.1.2", 81, "x"), ask("10.30.1.2", 80, "x")), (0, 0))
        vpcctl("stop-app", "blog", "web")
        vpcctl("stop-app", "shop", "api")
        self.gone(state)


# ---- in the background ----

# Goes into the background by two forks, before or after it listens; arguments: port, address, "late" if after.
DAEMON = r"""
import os, socket, sys, time
server = socket.socket()
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
def listen():
    server.bind((sys.argv[2], int(sys.argv[1])))
    server.listen(8)
if "late" not in sys.argv:
    listen()
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
if "late" in sys.argv:
    while os.getppid() != 1:
        time.sleep(0.01)
    listen()
if not os.fork():
    server.close()
    time.sleep(7000)
print("ready", flush=True)
while True:
    client = server.accept()[0]
    client.sendall(b"%d" % os.getpid())
    client.close()
"""
# The same, with another program in its place that has lost the environment.
NAMELESS = DAEMON.replace("if not os.fork()", """if len(sys.argv) < 5:
    server.set_inheritable(True)
    code = "import os, socket, sys, time; server = socket.socket(fileno=%d)" % server.fileno()
    os.execve(sys.executable, [sys.executable, "-c", code + chr(10) + LOOP], {})
if not os.fork()""").replace("def listen", "LOOP = 'if not' + %r\ndef listen" % DAEMON.rpartition("if not")[2])
# Passes its port on to a child and ends, when it is told to.
HEIR = BASE.replace("def serve", """
def leave():
    if os.fork():
        os._exit(0)
    return os.getpid()
def serve""") + "serve(lambda words: leave() if words == ['leave'] else os.getpid())"


def said_by(ip, port):
    """All that a server says to who connects."""
    with socket_in(None) as sock:
        sock.settimeout(LONG)
        sock.connect((ip, port))
        return sock.makefile().read()


def states(vpc=None):
    """What `ps --json` says: (subnet, port) -> app."""
    found = json.loads(vpcctl("ps", "--json", *([vpc] if vpc else [])).out)["apps"]
    return {(app["subnet"], app["port"]): app for app in found}


class BackgroundTest(AppsTest):

    def deploy_daemon(self, *more, program=DAEMON, port=80):
        """Deploy it; who serves is who was written down."""
        done = vpcctl("deploy-app", "blog", "web", "--port", port, "--", "python3", "-c", program, port, *more)
        pid = [app["pid"] for app in record("blog")["apps"] if app["port"] == port][0]
        self.assertIn("PID=%d\n" % pid, done.out)
        return pid, done

    def test_it_is_kept_as_any_other(self):
        state = snapshot()
        for program, more in ((DAEMON, ("0.0.0.0",)), (DAEMON, ("0.0.0.0", "late")), (NAMELESS, ("0.0.0.0",))):
            with self.subTest(more, nameless=program == NAMELESS):
                pid, _ = self.deploy_daemon(*more, program=program)
                self.assertEqual(said_by("10.20.1.2", 80), str(pid))
                self.assertEqual(states()["web", 80]["pid"], pid)
                self.assertEqual(states()["web", 80]["listens"], ["0.0.0.0"])
                self.assertEqual(vpcctl("logs", "blog", "web").out, "ready\n")
                self.assertIn("is there already", vpcctl("deploy-app", "blog", "web", "--port", 80, "--", "python3",
                                                         "-c", program, 80, *more).out)
                vpcctl("verify")
                os.kill(pid, 9)
                wait_until(lambda: not load_vpcctl().process_start(pid), LONG, "it has ended")
                self.assertEqual(states()["web", 80]["state"], "exited")
                vpcctl("verify", code=1)
                vpcctl("restore")
                self.assertEqual(said_by("10.20.1.2", 80), str(record("blog")["apps"][0]["pid"]))
                vpcctl("stop-app", "blog", "web")
                self.assert_refused(None, "10.20.1.2", 80)
                if program == DAEMON or MANY_USERS:
                    self.assertEqual(snapshot()["processes"], state["processes"])

    def test_a_shell_s_background(self):
        state = snapshot()
        line = "python3 -c '%s' 80 0.0.0.0 stay & python3 -m http.server 81 &" % DAEMON.replace("if os.fork():", "if 0:")
        vpcctl("deploy-app", "blog", "web", "--port", 80, "--", "sh", "-c", line)
        self.assertEqual(said_by("10.20.1.2", 80), str(record("blog")["apps"][0]["pid"]))
        vpcctl("stop-app", "blog", "web")
        self.assertEqual(snapshot()["processes"], state["processes"])

    def test_elsewhere(self):
        """It listens on another port: it is ended with its children, and the message says where it listened."""
        state = snapshot()
        failed = vpcctl("deploy-app", "blog", "web", "--port", 80, "--", "python3", "-c", DAEMON, 81, "0.0.0.0", code=3)
        self.assertIn("does not listen on port 80: ready\n  it listens on 81 instead", failed.err)
        self.assertEqual(snapshot()["processes"], state["processes"])
        self.assert_refused(None, "10.20.1.2", 81)
        failed = vpcctl("deploy-app", "blog", "web", "--port", 80, "--", "sh", "-c", "sleep 5000 &", code=3)
        self.assertIn("went into the background", failed.err)
        self.assertEqual(snapshot()["processes"], state["processes"])

    def test_a_successor(self):
        """A server that starts anew is the same app."""
        pid = deploy("blog", "web", 80, HEIR)["pid"]
        self.assertEqual(ask("10.20.1.2", 80, "who"), pid)
        heir = ask("10.20.1.2", 80, "leave")
        wait_until(lambda: not load_vpcctl().process_start(pid), LONG, "the first one has ended")
        self.assertEqual(states()["web", 80]["pid"], heir)
        vpcctl("verify")
        vpcctl("restore")
        self.assertEqual((ask("10.20.1.2", 80, "who"), record("blog")["apps"][0]["pid"]), (heir, heir))
        vpcctl("stop-app", "blog", "web")
        self.assert_refused(None, "10.20.1.2", 80)

    def test_on_the_loopback_only(self):
        for address, heard in (("0.0.0.0", True), ("10.20.1.2", True), ("127.0.0.1", False)):
            with self.subTest(address):
                _, done = self.deploy_daemon(address)
                told = "listens on 127.0.0.1 only: no other subnet reaches it"
                self.assertEqual(told in done.err, not heard, str(done))
                self.assertEqual("127.0.0.1 only" in vpcctl("ps").out, not heard)
                (self.assert_open if heard else self.assert_refused)(None, "10.20.1.2", 80)
                if not heard:
                    self.assert_open("ns-blog-web", "127.0.0.1", 80)
                vpcctl("stop-app", "blog", "web")


# ---- failures ----

class FailureTest(AppsTest):

    def test_a_failure_touches_no_other_app(self):
        dead, pid = deploy("blog", "web", 81, THIEF), deploy("blog", "web", 82, THIEF)["pid"]
        os.kill(dead["pid"], 9)
        wait_until(lambda: not load_vpcctl().process_start(dead["pid"]), LONG, "it has ended")
        before = record("blog")
        failed = vpcctl("deploy-app", "blog", "web", "--port", 80, "--", "sh", "-c", "echo no luck; exit 1", code=3)
        self.assertIn("no luck", failed.err)
        self.assertEqual(record("blog"), before)
        self.assert_refused(None, "10.20.1.2", 81)
        self.assertEqual(ask("10.20.1.2", 82, "where")[0], pid)
        topology = json.loads(vpcctl("export").out)                      # but what the change itself had ended comes back
        apps = topology["vpcs"][0]["subnets"][0]["apps"]
        apps[:] = [dict(apps[1], cmd=["false"])]
        vpcctl("apply", self.file("failing.json", topology), code=3)
        self.assert_refused(None, "10.20.1.2", 81)
        self.assertNotEqual(ask("10.20.1.2", 82, "where")[0], pid)
        self.assertEqual(record("blog")["apps"][1]["pid"], ask("10.20.1.2", 82, "where")[0])

    def test_its_own_words(self):
        script = self.file("script", "#!/bin/sh\n")
        os.chmod(os.path.dirname(script), 0o755)
        for mode_, held, said in ((0o755, True, "Text file busy"), (0o644, False, "Permission denied")):
            os.chmod(script, mode_)
            handle = os.open(script, os.O_WRONLY) if held else None
            failed = vpcctl("deploy-app", "blog", "web", "--port", 80, "--", script, code=3)
            self.assertRegex(failed.err, "does not listen on port 80: .*%s: %s\n" % (script, said))
            if held:
                os.close(handle)
        failed = vpcctl("deploy-app", "blog", "web", "--port", 80, "--env", "A=b", "--", "nosuch", code=3)
        self.assertIn("does not listen on port 80: nosuch: No such file or directory\n", failed.err)


# ---- variables, a folder ----

SHOWS = BASE + "serve(lambda words: [dict(os.environ), os.getcwd(), sys.stdin.read()])"
SECRET = "it's a \"secret\"\nof two lines, $HOME \u00e4"


class VariablesTest(AppsTest):

    def deploy_it(self, *options, **more):
        """Deploy a program that shows its environment -> it, the folder, its input."""
        done = vpcctl("deploy-app", "blog", "web", "--port", 80, *(options + ("--", "python3", "-c", SHOWS, 80)), **more)
        return (done.err or done.out) if more else ask("10.20.1.2", 80, "x")

    def variables(self):
        """Names of the files with variables."""
        return [name for name in os.listdir(DATA()) if name.endswith(".env")]

    def test_what_it_gets(self):
        folder = os.path.dirname(self.file("x", ""))
        os.chmod(folder, 0o755)
        seen, where, text = self.deploy_it("--env", "SECRET=" + SECRET, "--env=PATH=/usr/bin:/bin:/x", "--env", "LD_X==",
                                           "--workdir", folder)
        self.assertEqual((seen["SECRET"], seen["PATH"], seen["LD_X"], seen["HOME"]), (SECRET, "/usr/bin:/bin:/x", "=", "/"))
        self.assertEqual((where, text), (folder, ""))
        name, = self.variables()
        self.assertEqual(mode(DATA(name)), 0o600)
        for other in set(os.listdir(DATA())) - {name}:
            with open(DATA(other), encoding="utf-8") as handle:
                self.assertFalse(re.search(r"two lines|\\u00e4", handle.read()), other)
        with open("/proc/%d/cmdline" % record("blog")["apps"][0]["pid"], "rb") as handle:
            self.assertNotIn(b"two lines", handle.read())
        self.assertIn("SECRET", vpcctl("export").err)
        self.assertNotIn("two lines", vpcctl("export").out)
        os.kill(record("blog")["apps"][0]["pid"], 9)
        vpcctl("restore")
        self.assertEqual(ask("10.20.1.2", 80, "x")[0]["SECRET"], SECRET)
        vpcctl("stop-app", "blog", "web")
        self.assertEqual(self.variables(), [])
        seen, where, _ = self.deploy_it()
        self.assertNotIn("SECRET", seen)
        self.assertEqual(where, "/run/vpcctl/blog/www/web-80")

    def test_with_others(self):
        self.deploy_it("--env", "A=1", "--env", "B=2")
        self.assertIn("is there already", self.deploy_it("--env", "B=2", "--env", "A=1", code=0))
        for options, told in ((("--env", "A=1"), "with other variables"), ((), "with other variables"),
                              (("--env", "A=1", "--env", "B=3"), "with other variables"),
                              (("--env", "A=1", "--env", "B=2", "--workdir", "/"), "in another folder")):
            self.assertIn("a program %s is deployed there" % told, self.deploy_it(*options, code=2))
        self.assertEqual(len(self.variables()), 1)

    def test_failures_leave_the_old_ones(self):
        self.deploy_it("--env", "A=1")
        for command in (["false"], ["nosuch"]):
            vpcctl("deploy-app", "blog", "web", "--port", 81, "--env", "A=2", "--", *command, code=3)
        told = vpcctl("deploy-app", "blog", "web", "--port", 81, "--workdir", "/nonexistent", code=3).err
        self.assertIn("there is no such folder", told)
        topology = json.loads(vpcctl("export").out)
        app, = topology["vpcs"][0]["subnets"][0]["apps"]
        app["env"] = {"A": "2"}
        topology["vpcs"][0]["subnets"][0]["apps"].append({"port": 81, "cmd": ["false"], "env": {"A": "3"}})
        vpcctl("apply", self.file("failing.json", topology), code=3)
        self.assertEqual(len(self.variables()), 1)
        self.assertEqual(ask("10.20.1.2", 80, "x")[0]["A"], "1")
        os.unlink(DATA(self.variables()[0]))
        os.kill(record("blog")["apps"][0]["pid"], 9)
        self.assertIn("are lost", vpcctl("restore", code=3).err)

    def test_in_a_topology(self):
        self.deploy_it("--env", "A=1")
        topology = json.loads(vpcctl("export").out)
        app, = topology["vpcs"][0]["subnets"][0]["apps"]
        app["env"] = {"A": "1"}
        path = self.file("topology.json", topology)
        vpcctl("plan", path)
        pid = record("blog")["apps"][0]["pid"]
        vpcctl("apply", path)
        self.assertEqual(record("blog")["apps"][0]["pid"], pid)
        app["env"]["A"], app["workdir"] = "2", "/"
        path = self.file("topology.json", topology)
        self.assertRegex(vpcctl("plan", path, code=1).out, r"^~ app blog/web 80: .* with A -> .* in / with A\n")
        vpcctl("apply", path)
        vpcctl("plan", path)
        app["env"]["A"] = "3"
        path = self.file("topology.json", topology)
        self.assertTrue(vpcctl("plan", path, code=1).out.endswith(" in / with A, other values\n"))
        vpcctl("apply", path)
        vpcctl("plan", path)
        seen, where, _ = ask("10.20.1.2", 80, "x")
        self.assertEqual((seen["A"], where, len(self.variables())), ("3", "/", 1))

    def test_what_a_variable_names_is_nothing_to_root(self):
        """`ip` would look in this folder for programs, and load this library."""
        self.deploy_it("--env", "PATH=/nonexistent", "--env", "LD_PRELOAD=/nonexistent.so", code=3)
        vpcctl("deploy-app", "blog", "web", "--port", 80, "--env", "PATH=/nonexistent", "--env", "LD_PRELOAD=/nonexistent.so",
               "--", load_vpcctl().app_python(), "-c", SHOWS, 80)
        self.assertEqual(ask("10.20.1.2", 80, "x")[0]["LD_PRELOAD"], "/nonexistent.so")


# ---- what ps and the others say ----

class StateTest(AppsTest):

    def test_what_runs_and_what_does_not(self):
        app = deploy("blog", "web", 80, THIEF)
        vpcctl("deploy-app", "blog", "web", "--port", 81, "--", "sh", "-c", "python3 -m http.server 81; echo 'out of \033[1m luck'")
        vpcctl("deploy-app", "shop", "api", "--port", 82)
        self.assertEqual({key: (one["state"], one["listens"]) for key, one in states().items()}, {
            ("web", 80): ("running", ["0.0.0.0"]), ("web", 81): ("running", ["0.0.0.0"]),
            ("api", 82): ("running", ["0.0.0.0"])})
        self.assertEqual(states("shop").keys(), {("api", 82)})
        self.assertNotIn("not running", vpcctl("graph").out)
        ended = [one["pid"] for one in record("blog")["apps"] if one["port"] == 81][0]
        os.kill(ended, 15)
        wait_until(lambda: "luck" in vpcctl("logs", "blog", "web", "--port", 81).out, LONG, "it has ended")
        found = states()
        self.assertEqual({key: (one["pid"], one["state"]) for key, one in found.items() if key[0] == "web"},
                         {("web", 80): (app["pid"], "running"), ("web", 81): (None, "exited")})
        self.assertEqual(found["web", 81]["log"]["last"], "out of \033[1m luck")
        self.assertEqual((found["web", 81]["since"], found["web", 81]["listens"]), (None, []))
        rows = vpcctl("ps", "blog").out.splitlines()
        self.assertRegex(rows[1], r"^blog +web +tcp/80 .* %d +running since \d{4}-\S+ \S+  0\.0\.0\.0$" % app["pid"])
        self.assertRegex(rows[2], r"^blog +web +tcp/81 .* -  +exited +-$")
        self.assertRegex(rows[3], r"^blog/web tcp/81: its log, last written \d.*, ends with: out of \\x1b\[1m luck$")
        self.assertIn(" 1 of 2 up ", vpcctl("list", "--long").out)
        self.assertIn(" 1 of 1 up ", vpcctl("list", "--long").out)
        self.assertEqual([(row["apps"], row["apps_up"]) for row in json.loads(vpcctl("list", "--json").out)], [(2, 1), (1, 1)])
        for style in ("tree", "mermaid", "dot", "svg"):
            text = vpcctl("graph", "--format", style).out
            self.assertIn("app tcp/81 (not running)", text)
            self.assertNotIn("app tcp/80 (not running)", text)
        told = vpcctl("inspect", "blog", "web").out
        self.assertRegex(told, r"\napp +tcp/80 python3 .*: runs as PID %d, listens on 0\.0\.0\.0\n" % app["pid"])
        self.assertRegex(told, r"\napp +tcp/81 sh .*: exited; its log, .* luck\n")

    @unittest.skipUnless(MANY_USERS, ONE_USER)
    def test_to_an_ordinary_user(self):
        app = deploy("blog", "web", 80, THIEF)
        dead = deploy("blog", "web", 81, THIEF)
        heir = deploy("shop", "api", 80, HEIR)
        heir, old = ask("10.30.1.2", 80, "leave"), heir["pid"]
        os.kill(dead["pid"], 9)
        wait_until(lambda: not (load_vpcctl().process_start(dead["pid"]) or load_vpcctl().process_start(old)), LONG,
                   "both have ended")
        folder = tempfile.mkdtemp(prefix="vpcctl-")
        self.addCleanup(shutil.rmtree, folder)
        os.chmod(folder, 0o755)
        shutil.copy(VPCCTL, folder)
        as_nobody = lambda *words: run(as_user(NOBODY, load_vpcctl().app_python(), folder + "/vpcctl.py", *words))
        found = {(one["vpc"], one["port"]): one for one in json.loads(as_nobody("ps", "--json").out)["apps"]}
        self.assertEqual({key: (one["pid"], one["state"], one["listens"], one["log"]["last"]) for key, one in found.items()}, {
            ("blog", 80): (app["pid"], "running", ["0.0.0.0"], None), ("blog", 81): (None, "exited", [], None),
            ("shop", 80): (heir, "running", ["0.0.0.0"], None)})
        self.assertIn("is root's alone to read", as_nobody("ps").out)
        self.assertIn(" 1 of 2 up ", as_nobody("list", "--long").out)
        self.assertIn("app tcp/81 (not running)", as_nobody("graph").out)

    def test_a_vpc_that_is_down(self):
        deploy("blog", "web", 80, THIEF)
        run(["ip", "netns", "del", "ns-blog-web"])
        run(["ip", "link", "del", "br-blog"])
        self.assertEqual(states()["web", 80]["state"], "exited")
        self.assertIn("down: vpcctl restore", vpcctl("inspect", "blog", "web").out)
        self.assertIn(" 0 of 1 up ", vpcctl("list", "--long").out)
        vpcctl("restore")
        self.assertEqual(states()["web", 80]["state"], "running")


class NamesOfProcessesTest(AppsTest):

    def test_an_odd_name_holds_nobody_up(self):
        state = snapshot()
        deploy("blog", "web", 80, STRAY)
        ask("10.20.1.2", 80, "name")
        with open("/proc/%d/comm" % record("blog")["apps"][0]["pid"], "rb") as handle:
            self.assertIn(b"\xff", handle.read())
        vpcctl("verify")
        vpcctl("restore")
        vpcctl("add-subnet", "shop", "till")
        vpcctl("deploy-app", "shop", "till", "--port", 80)
        self.assertIn("Hello", http_get(None, "10.30.0.2"))
        for line in ("delete-subnet shop till", "delete shop", "delete blog"):
            vpcctl(*line.split())
        self.assertEqual(snapshot()["processes"], state["processes"])


# ---- files ----

HOLDER = ("import fcntl, os, sys; handle = os.open(sys.argv[1], os.O_RDONLY); "
          "fcntl.flock(handle, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()")


class FilesTest(AppsTest):

    def hold(self, path, nobody):
        """Start a process that opens the lock and keeps it; it ends with its returned function."""
        argv = [load_vpcctl().app_python(), "-c", HOLDER, path]
        argv = as_user(NOBODY, *argv) if nobody else argv
        child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.assertEqual(child.stdout.readline(), b"held\n")

        def end():
            child.stdin.close()
            child.stdout.close()
            child.wait()
        return child, end

    def test_modes(self):
        vpcctl("deploy-app", "blog", "web", "--port", 80)
        log = record("blog")["apps"][0]["log"]
        private = ("lock", "vpcctl.log", "vpcctl.log.1", log)
        for again in (False, True):
            if again:                                                    # as an older version made them
                with open(DATA("vpcctl.log.1"), "w"):
                    pass
                for name in private:
                    os.chmod(DATA(name), 0o666)
                vpcctl("reset-policy", "blog", "web")
            there = [name for name in private if os.path.exists(DATA(name))]
            self.assertEqual({name: mode(DATA(name)) for name in there}, {name: 0o600 for name in there})
            self.assertEqual(mode(DATA("vpc_blog.json")), 0o644)
        os.unlink(DATA("vpcctl.log.1"))

    def test_a_lock_that_others_could_open(self):
        for nobody in (True, False):
            with self.subTest(nobody=nobody):
                if nobody and not MANY_USERS:
                    self.skipTest(ONE_USER)
                os.chmod(DATA("lock"), 0o644)
                child, end = self.hold(DATA("lock"), nobody)
                try:
                    with open(DATA("lock"), "w") as handle:
                        handle.write("process %d, create x" % child.pid)
                    env = {"VPCCTL_WAIT": "2"}
                    done = vpcctl("add-subnet", "blog", "more", env=env, code=0 if nobody else 3)
                    if not nobody:                # an older vpcctl that is at work has it: that counts
                        self.assertIn("process %d" % child.pid, done.err)
                finally:
                    end()
                vpcctl("delete-subnet", "blog", "more") if nobody else vpcctl("reset-policy", "blog", "web")
                self.assertEqual(mode(DATA("lock")), 0o600)

    def test_an_older_version_that_waits(self):
        """It has the old file open, and goes on only when the new one has ended."""
        os.chmod(DATA("lock"), 0o644)
        store = load_vpcctl().Store(DATA())
        with open(DATA("lock")) as old:
            store.lock("test")
            try:
                with self.assertRaises(BlockingIOError):
                    fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
                vpcctl("reset-policy", "blog", "web", env={"VPCCTL_WAIT": "0.2"}, code=3)
            finally:
                os.close(store._lock)
        vpcctl("reset-policy", "blog", "web")

    @unittest.skipUnless(MANY_USERS, ONE_USER)
    def test_what_an_ordinary_user_can_see(self):
        vpcctl("deploy-app", "blog", "web", "--port", 80)
        folder = tempfile.mkdtemp(prefix="vpcctl-")
        self.addCleanup(shutil.rmtree, folder)
        os.chmod(folder, 0o755)
        shutil.copy(VPCCTL, folder)
        python, path = load_vpcctl().app_python(), self.file("x.json", json.loads(vpcctl("export").out))
        os.chmod(path, 0o644)
        os.chmod(os.path.dirname(path), 0o755)
        for line, code in (("list", 0), ("list --long", 0), ("inspect blog", 0), ("graph", 0), ("export", 0),
                           ("plan " + path, 0), ("explain blog web 10.30.1.2", 1),
                           ("logs blog web", 4), ("stop-app blog web", 4)):
            with self.subTest(line):
                done = run(as_user(NOBODY, python, os.path.join(folder, "vpcctl.py"), *line.split()))
                self.assertEqual(done.code, code, str(done))
                self.assertNotIn("Traceback", done.err)
                self.assertEqual("sudo" in done.err, code == 4, str(done))
        self.assertIn("Serving", vpcctl("logs", "blog", "web").out)

    def test_a_run_folder_that_was_open(self):
        os.chmod("/run/vpcctl", 0o777)
        os.chmod("/run/vpcctl/blog", 0o777)
        vpcctl("verify", code=1)
        vpcctl("add-subnet", "blog", "db")
        self.assertEqual((mode("/run/vpcctl"), mode("/run/vpcctl/blog")), (0o755, 0o755))
        vpcctl("verify")

    @unittest.skipUnless(MANY_USERS, ONE_USER)
    def test_links_of_other_users(self):
        target = tempfile.mkdtemp(prefix="vpcctl-")
        self.addCleanup(shutil.rmtree, target)
        victim = os.path.join(target, "www")
        os.mkdir(victim)
        with open(os.path.join(target, "hosts"), "w") as handle:
            handle.write("precious")
        for name, leads in (("new", target), ("blog/www", victim), ("blog/hosts", target + "/hosts")):
            with self.subTest(name):
                path = os.path.join("/run/vpcctl", name)
                os.chmod("/run/vpcctl", 0o777)
                kept = os.path.lexists(path) and os.rename(path, path + ".kept") is None
                os.symlink(leads, path)
                os.lchown(path, NOBODY, NOBODY)
                for line in ("create new --cidr 10.40.0.0/16", "deploy-app blog web --port 80",
                             "add-subnet blog db", "delete blog", "cleanup-all"):
                    refused = vpcctl(*line.split(), code=3).err
                    self.assertIn("%s: it belongs to user %d" % (path, NOBODY), refused)
                os.unlink(path)
                if kept:
                    os.rename(path + ".kept", path)
                self.assertEqual(sorted(os.listdir(target)), ["hosts", "www"])
                self.assertEqual(os.listdir(victim), [])
        with open(os.path.join(target, "hosts")) as handle:
            self.assertEqual(handle.read(), "precious")
        vpcctl("deploy-app", "blog", "web", "--port", 80)
        self.assertIn("Hello", http_get(None, "10.20.1.2"))

    def test_a_file_is_written_in_place_but_never_elsewhere(self):
        tool, folder = load_vpcctl(), tempfile.mkdtemp(prefix="vpcctl-")
        self.addCleanup(shutil.rmtree, folder)
        inside = lambda name: os.path.join(folder, name)
        tool._tee(inside("hosts"), "one")
        number = os.stat(inside("hosts")).st_ino
        tool._tee(inside("hosts"), "2")
        with open(inside("hosts")) as handle:
            self.assertEqual((handle.read(), os.fstat(handle.fileno()).st_ino), ("2", number))
        os.symlink(inside("hosts"), inside("link"))
        os.link(inside("hosts"), inside("same"))
        os.mkfifo(inside("pipe"))
        os.mkdir(inside("folder"))
        for name in ("link", "same", "pipe", "folder"):
            with self.assertRaises(OSError):
                tool._tee(inside(name), "gone")
        with open(inside("hosts")) as handle:
            self.assertEqual(handle.read(), "2")
