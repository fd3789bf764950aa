"""What the end-to-end tests share: running vpcctl, probing a namespace, comparing before and after."""

import contextlib
import difflib
import errno
import glob
import json
import os
import re
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest

HERE = os.path.dirname(os.path.realpath(__file__))
VPCCTL = os.path.join(os.path.dirname(HERE), "vpcctl.py")
INTERNET = "203.0.113.1"
SHORT = 0.6       # for "nothing comes": the kernel sends its second SYN after 1 s
LONG = 15.0       # for "it comes": only a failure waits that long


# ---- commands ----

class Result:
    """A finished command: .code .out .err"""

    def __init__(self, argv, code, out, err):
        self.argv, self.code, self.out, self.err = argv, code, out, err

    def __str__(self):
        return "$ %s\nexit code %s\n--- stdout\n%s--- stderr\n%s" % (
            " ".join(self.argv), self.code, self.out, self.err)


def run(argv, input=None, env=None, timeout=60, cwd=None):
    """Run a command to its end and return its Result; nothing is checked."""
    full = dict(os.environ, PYTHONIOENCODING="utf-8", PYTHONDONTWRITEBYTECODE="1")
    full.update(env or {})
    full = {key: value for key, value in full.items() if value is not None}
    child = subprocess.Popen(argv, stdin=subprocess.PIPE if input is not None else subprocess.DEVNULL,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=full, cwd=cwd)
    try:
        out, err = child.communicate(input.encode() if input is not None else None, timeout=timeout)
    except subprocess.TimeoutExpired:
        child.kill()
        out, err = child.communicate()
        raise AssertionError("no end after %s s:\n%s" % (timeout, Result(
            argv, "none", out.decode(errors="replace"), err.decode(errors="replace"))))
    return Result(argv, child.returncode, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"))


def vpcctl(*args, **options):
    """Run the real script with this Python. Exit code 0 is expected, or `code=N`; `ok=False` accepts any.

    Further options: input (text), env (None removes a variable), timeout, cwd.
    """
    ok, code = options.pop("ok", True), options.pop("code", None)
    result = run([sys.executable, VPCCTL] + [str(word) for word in args], **options)
    expected = code if code is not None else (0 if ok else result.code)
    if result.code != expected:
        raise AssertionError("exit code %s, expected %s\n%s" % (result.code, expected, result))
    if "Traceback (most recent call last)" in result.err:
        raise AssertionError("a traceback\n%s" % result)
    return result


def in_ns(ns, argv, **options):
    """Run a command in a namespace (None: here) and return its Result."""
    return run((["ip", "netns", "exec", ns] if ns else []) + list(argv), **options)


def find_program(name):
    """Return the path of a program, also where an ordinary user's PATH does not look, or None."""
    return shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")


def record(vpc):
    """Return the VPC's metadata, as written."""
    with open(os.path.join(os.environ["VPCCTL_DATA"], "vpc_%s.json" % vpc)) as handle:
        return json.load(handle)


def subnet(vpc, name):
    """Return a subnet's entry of the VPC's metadata."""
    return [entry for entry in record(vpc)["subnets"] if entry["name"] == name][0]


def wait_until(predicate, seconds, what):
    """Call `predicate` until it is true and return its value; AssertionError after `seconds`."""
    end = time.time() + seconds
    while True:
        value = predicate()
        if value:
            return value
        if time.time() > end:
            raise AssertionError("not within %s s: %s" % (seconds, what))
        time.sleep(0.02)


def port_command(port, flag, value):
    """Return a command that sets a switch of a bridge's port; `ip` has words for these two only since 5.18."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import vpcctl; vpcctl._set_port(None, *sys.argv[2:])"
    return [sys.executable, "-c", code, os.path.dirname(VPCCTL), port, flag, value]


# ---- sockets in a namespace: a socket stays in the namespace in which it was made ----

def _setns(fd):
    if hasattr(os, "setns"):
        return os.setns(fd, 0x40000000)
    import ctypes
    if ctypes.CDLL(None, use_errno=True).setns(fd, 0x40000000):
        raise OSError(ctypes.get_errno(), "setns: " + os.strerror(ctypes.get_errno()))


def ns_path(ns):
    """Return the file of a namespace: a name, a pid (int), or None for the sandbox's own."""
    if ns is None:
        return "/proc/self/ns/net"
    return "/proc/%d/ns/net" % ns if isinstance(ns, int) else "/run/netns/" + ns


def internet_pid():
    """Return the pid of the sandbox's internet; as a namespace it can be given to every probe."""
    with open("/run/vpcctl-sandbox/internet.pid") as handle:
        return int(handle.read())


@contextlib.contextmanager
def entered(ns):
    """Let this thread be in a network namespace meanwhile."""
    if ns is None:
        yield
        return
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        there = os.open(ns_path(ns), os.O_RDONLY)
        try:
            _setns(there)
        finally:
            os.close(there)
        try:
            yield
        finally:
            _setns(home)
    finally:
        os.close(home)


def socket_in(ns, kind=socket.SOCK_STREAM, proto=0, family=socket.AF_INET):
    """Return a new socket that belongs to the namespace."""
    with entered(ns):
        return socket.socket(family, kind, proto)


CLOSED = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EPERM, errno.EACCES)


def tcp_open(ns, ip, port, timeout=SHORT, source=None):
    """Try a TCP connection from the namespace; returns 'open', 'refused' or 'dropped'."""
    with contextlib.closing(socket_in(ns)) as sock:
        sock.settimeout(timeout)
        try:
            if source:
                sock.bind((source, 0))
            sock.connect((ip, port))
        except ConnectionRefusedError:
            return "refused"
        except socket.timeout:
            return "dropped"
        except OSError as error:
            if error.errno in CLOSED:
                return "dropped"
            raise
        return "open"


def tcp_ask(ns, ip, port, data=b"hello\n", timeout=LONG):
    """Send `data` over TCP from the namespace and return all that comes back until the end or a full echo."""
    with contextlib.closing(socket_in(ns)) as sock:
        sock.settimeout(timeout)
        sock.connect((ip, port))
        sock.sendall(data)
        answer = b""
        while True:
            part = sock.recv(65536)
            answer += part
            if not part or answer == data:
                return answer


def http_get(ns, ip, port=80, timeout=LONG):
    """Fetch / from the namespace; returns the page's text, or '' if there is no answer."""
    try:
        return tcp_ask(ns, ip, port, b"GET / HTTP/1.0\r\nHost: x\r\n\r\n", timeout).decode("utf-8", "replace")
    except (socket.timeout, OSError):
        return ""


def udp_answers(ns, ip, port, timeout=SHORT, source=None):
    """Send a datagram from the namespace; returns whether an answer comes."""
    with contextlib.closing(socket_in(ns, socket.SOCK_DGRAM)) as sock:
        sock.settimeout(timeout)
        try:
            if source:
                sock.bind((source, 0))
            sock.connect((ip, port))
            sock.send(b"hello\n")
            return sock.recv(4096) == b"hello\n"
        except (socket.timeout, OSError):
            return False


def checksum(data):
    """Return the internet checksum of some bytes."""
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    while total >> 16:
        total = (total & 0xffff) + (total >> 16)
    return ~total & 0xffff


def ping(ns, ip, timeout=SHORT, size=56):
    """Send one ICMP echo request from the namespace; returns whether the reply comes."""
    ident = int(time.time() * 1e6) & 0xffff
    body = struct.pack("!BBHHH", 8, 0, 0, ident, 1) + b"v" * size
    packet = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
    with contextlib.closing(socket_in(ns, socket.SOCK_RAW, socket.IPPROTO_ICMP)) as sock:
        try:
            sock.sendto(packet, (ip, 0))
        except OSError:
            return False
        end = time.time() + timeout
        while True:
            left = end - time.time()
            if left <= 0 or not select.select([sock], [], [], left)[0]:
                return False
            data, sender = sock.recvfrom(65536)
            answer = data[(data[0] & 15) * 4:]
            if answer[0] == 0 and struct.unpack("!H", answer[4:6])[0] == ident and sender[0] == ip:
                return True


@contextlib.contextmanager
def listener(ns, port, ip="0.0.0.0", kind="tcp"):
    """Run an echo server in the namespace (None: the host); yields a list of the clients' addresses."""
    sock = socket_in(ns, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
    seen, stop = [], threading.Event()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((ip, port))
    if kind == "tcp":
        sock.listen(64)
    clients = []

    def serve():
        while not stop.is_set():
            ready = select.select([sock] + clients, [], [], 0.05)[0]
            for one in ready:
                try:
                    if one is sock and kind == "tcp":
                        client, address = sock.accept()
                        seen.append(address[0])
                        clients.append(client)
                    elif one is sock:
                        data, address = sock.recvfrom(65536)
                        seen.append(address[0])
                        sock.sendto(data, address)
                    else:
                        data = one.recv(65536)
                        if data:
                            one.sendall(data)
                        else:
                            clients.remove(one)
                            one.close()
                except OSError:
                    if one in clients:
                        clients.remove(one)
                        one.close()
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()
        for one in clients + [sock]:      # a forgotten socket would keep a deleted namespace alive
            one.close()


def tcp_listener(ns, port, ip="0.0.0.0"):
    """Run a TCP echo server in the namespace while the block lasts."""
    return listener(ns, port, ip, "tcp")


def udp_listener(ns, port, ip="0.0.0.0"):
    """Run a UDP echo server in the namespace while the block lasts."""
    return listener(ns, port, ip, "udp")


# ---- the machine as text ----

VOLATILE = re.compile(r"(^|\.)(ifindex|link_index|operstate|stats.*|.*_timer|bridge_id|root_id|root_port|"
                      r"root_path_cost|topology_change.*|designated_.*|port_id|no|id|state|config_pending|"
                      r"num_tx_queues|num_rx_queues|gso_.*|gro_.*|tso_.*|qdisc|min_mtu|max_mtu|allmulti|"
                      r"promiscuity|message_age.*|parentbus|parentdev|mcast_querier_.*|linkmode)$")
FLAGS_VOLATILE = ("LOWER_UP", "NO-CARRIER", "M-DOWN")
SYSCTLS = ("net/ipv4/ip_forward",
           "net/ipv4/conf/*/forwarding", "net/ipv4/conf/*/rp_filter", "net/ipv4/conf/*/arp_ignore",
           "net/ipv4/conf/*/arp_announce", "net/ipv4/conf/*/route_localnet", "net/ipv4/conf/*/proxy_arp",
           "net/ipv4/conf/*/send_redirects", "net/ipv4/conf/*/accept_redirects",
           "net/ipv6/conf/*/disable_ipv6", "net/ipv6/conf/*/forwarding", "net/bridge/*")


def _lines(*argv):
    return [line.rstrip() for line in run(list(argv)).out.splitlines() if line.strip()]


def _flatten(name, value):
    if isinstance(value, dict):
        for key in sorted(value):
            for item in _flatten(name + "." + key if name else key, value[key]):
                yield item
    else:
        yield name, json.dumps(value)


def snapshot_links():
    """Return each link's settings, one line each, without what moves by itself."""
    found = []
    for link in json.loads(run(["ip", "-d", "-j", "link"]).out or "[]"):
        link["flags"] = sorted(flag for flag in link.get("flags", []) if flag not in FLAGS_VOLATILE)
        found += ["%s %s=%s" % (link["ifname"], key, value) for key, value in _flatten("", link)
                  if not VOLATILE.search(key)]
    return sorted(found)


def snapshot_addresses():
    """Return the addresses, one line each."""
    found = []
    for link in json.loads(run(["ip", "-j", "address"]).out or "[]"):
        for entry in link.get("addr_info", []):
            if entry.get("local"):
                found.append("%s %s/%s scope %s" % (link["ifname"], entry["local"], entry["prefixlen"],
                                                    entry.get("scope")))
    return sorted(found)


def snapshot_iptables():
    """Return the rules of all tables; an empty chain of the kernel's own that accepts is the same as none."""
    found = []
    for program in ("iptables-save", "ip6tables-save"):
        try:
            lines = _lines(program)
        except OSError:
            continue
        table = ""
        for line in lines:
            line = re.sub(r"\s*\[\d+:\d+\]\s*", " ", line).strip()
            if line.startswith("*"):
                table = line[1:]
            elif line[:1] in ("#", "") or line == "COMMIT" or (line[0] == ":" and line.endswith(" ACCEPT")):
                continue
            else:
                found.append("%s %s %s" % (program[:-5], table, line))
    # chains come in no certain order, the rules of one chain do
    return sorted(line for line in found if " :" in line) + sorted(
        (line for line in found if " :" not in line), key=lambda line: line.split(" ")[:4])


def snapshot_sysctls():
    """Return the kernel settings that vpcctl touches."""
    found = []
    for pattern in SYSCTLS:
        for path in glob.glob("/proc/sys/" + pattern):
            try:
                with open(path) as handle:
                    found.append("%s = %s" % (path[len("/proc/sys/"):], handle.read().strip()))
            except OSError:
                pass
    return sorted(found)


def snapshot_files(top, skip=r"$^"):
    """Return the files under a folder with their content, except those whose name fits `skip`."""
    found = []
    for folder, folders, names in os.walk(top):
        found += [os.path.join(folder, name) + "/" for name in folders]
        for name in names:
            path = os.path.join(folder, name)
            if re.search(skip, name):
                continue
            if os.path.islink(path):
                found.append("%s -> %s" % (path, os.readlink(path)))
                continue
            try:
                with open(path, errors="replace") as handle:
                    found += ["%s: %s" % (path, line) for line in handle.read().splitlines() or [""]]
            except OSError as error:
                found.append("%s: %s" % (path, error.strerror))
    return sorted(found)


def snapshot_processes():
    """Return the sandbox's processes but its first, its internet, this one and what started it."""
    skip, pid = {1, internet_pid() if os.environ.get("VPCCTL_SANDBOX") else 0}, os.getpid()
    found, parents = [], {}
    for path in glob.glob("/proc/[0-9]*/stat"):
        try:
            with open(path, errors="replace") as handle:
                stat = handle.read()
            with open(os.path.dirname(path) + "/cmdline", errors="replace") as handle:
                args = handle.read().replace("\0", " ").strip()
        except OSError:
            continue
        number, fields = int(stat.split(" ", 1)[0]), stat.rsplit(")", 1)[1].split()
        parents[number] = int(fields[1])
        if fields[0] not in "ZX":
            found.append((number, "%d %s" % (number, args)))
    while pid in parents:
        skip.add(pid)
        pid = parents[pid]
    return sorted(text for number, text in found if number not in skip)


def snapshot():
    """Return the machine's state as a dict of sections, each a list of lines."""
    routes = [re.sub(r" expires \S+", "", line) for line in
              ["inet  " + line for line in _lines("ip", "-4", "route", "show", "table", "all")]
              + ["inet6 " + line for line in _lines("ip", "-6", "route", "show", "table", "all")]]
    # these follow from a link's own IPv6 address, a second or two after it
    derived = re.compile(r"inet6 ((local|anycast) )?(fe80|multicast ff00)")
    routes = [line for line in routes if not derived.match(line)]
    netns = sorted(os.listdir("/run/netns")) if os.path.isdir("/run/netns") else []
    return {
        "links": snapshot_links(),
        "addresses": snapshot_addresses(),
        "routes": sorted(re.sub(r"\s+(linkdown|dead)\b", "", line) for line in routes),
        "rules": ["inet  " + line for line in _lines("ip", "-4", "rule")]
                 + ["inet6 " + line for line in _lines("ip", "-6", "rule")],
        "neighbours": sorted(_lines("ip", "neigh", "show", "nud", "permanent")),
        "fdb": sorted(line for line in _lines("bridge", "fdb", "show")
                      if "permanent" in line or "static" in line),
        "iptables": snapshot_iptables(),
        "sysctls": snapshot_sysctls(),
        "namespaces": netns,
        "etc": snapshot_files("/etc/netns"),
        "processes": snapshot_processes(),
        "data": snapshot_files(os.environ.get("VPCCTL_DATA", "/nonexistent"), r"\.log(\.\d+)?$|lock"),
    }


def difference(before, after):
    """Return the differences of two snapshots as text, '' if there is none."""
    found = []
    for section in before:
        lines = list(difflib.unified_diff(before[section], after[section], lineterm="", n=0))
        if lines:
            found.append("%s:\n  %s" % (section, "\n  ".join(
                line for line in lines[2:] if not line.startswith("@@"))))
    return "\n".join(found)


def assert_same(before, after, what="the machine is not as it was"):
    """Raise AssertionError with a readable difference unless both snapshots are the same."""
    text = difference(before, after)
    if text:
        raise AssertionError("%s (- before, + after)\n%s" % (what, text))


# ---- the base class ----

class SandboxTest(unittest.TestCase):
    """A test in the sandbox: whatever it made, `cleanup-all` must leave the machine as it was found."""

    longMessage = True
    maxDiff = None

    @classmethod
    def setUpClass(cls):
        if not os.environ.get("VPCCTL_SANDBOX"):
            raise unittest.SkipTest("needs the sandbox; type: python3 tests/run.py --e2e -k %s"
                                    % cls.__name__)

    def setUp(self):
        self.before = snapshot()
        self._folder = None

    def tearDown(self):
        vpcctl("cleanup-all")
        self.assert_as_before()

    def assert_as_before(self, seconds=5.0):
        """The machine is as it was when the test began (what is just ending may take a moment)."""
        end = time.time() + seconds
        while difference(self.before, snapshot()) and time.time() < end:
            time.sleep(0.1)
        assert_same(self.before, snapshot())

    def file(self, name, content):
        """Write a file (text, or JSON from anything else) into the test's own folder; returns its path."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="vpcctl-")
            self.addCleanup(self._folder.cleanup)
        path = os.path.join(self._folder.name, name)
        with open(path, "w") as handle:
            handle.write(content if isinstance(content, str) else json.dumps(content, indent=2))
        return path

    def assert_open(self, ns, ip, port, **options):
        """A TCP connection from the namespace is answered."""
        options.setdefault("timeout", LONG)
        self.assertEqual(tcp_open(ns, ip, port, **options), "open", "%s -> %s:%s" % (ns, ip, port))

    def assert_refused(self, ns, ip, port, **options):
        """The packet arrives and nothing listens."""
        options.setdefault("timeout", LONG)
        self.assertEqual(tcp_open(ns, ip, port, **options), "refused", "%s -> %s:%s" % (ns, ip, port))

    def assert_dropped(self, ns, ip, port, **options):
        """No answer comes to a TCP connection."""
        self.assertEqual(tcp_open(ns, ip, port, **options), "dropped", "%s -> %s:%s" % (ns, ip, port))

    def assert_ping(self, ns, ip):
        """A ping from the namespace is answered."""
        self.assertTrue(ping(ns, ip, LONG), "%s cannot ping %s" % (ns, ip))

    def assert_no_ping(self, ns, ip):
        """A ping from the namespace is not answered."""
        self.assertFalse(ping(ns, ip), "%s can ping %s" % (ns, ip))
