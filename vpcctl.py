#!/bin/sh
# The shell reads the next two statements, which Python takes for texts without a meaning. It leaves folders
# out of PATH that depend on where one is, and starts Python on this file as a module, whose compiled form Python
# keeps in __pycache__: half of a short command's time is compiling. Not where others than the file's owner can
# write beside it: what lies there is then neither read nor run. The umask is set before Python writes that form:
# root's own may be open to everybody, or closed to what apps must read.
"eval" 'p=; set -f; IFS=:; for d in $PATH; do case $d in /*) p=$p$d:;; esac; done; unset IFS; set +f; '\
'PATH=${p:-/usr/bin:/bin:}/usr/sbin:/sbin'
"exec" "python3" "-ISc" "import sys, os, os.path as o; u = os.umask(18); p = o.realpath(sys.argv[1]);"\
" d = o.dirname(p); sys.argv[:] = [p] + sys.argv[2:]; sys.path.append(d);"\
" near = map(os.stat, filter(o.exists, (d, d + '/__pycache__'))); own = {0, os.getuid(), os.stat(p).st_uid};"\
" safe = all(s.st_uid in own and not s.st_mode & 18 for s in near);"\
" __import__('vpcctl').start(u) if p.endswith('/vpcctl.py') and safe else"\
" __import__('runpy').run_path(p, {'umask': u}, '__main__')" "$0" "$@"
__doc__ = """vpcctl - a cloud network (VPC) on the machine in front of you, from Linux's own parts.

        VPC blog 10.20.0.0/16                               the host
    +-- namespace ns-blog-web ---+
    |  10.20.1.2  v-blog-web-a   |==veth==+
    +----------------------------+        |   bridge br-blog      routing table of blog     eth0
                                          +== 10.20.1.1      ---> chain vpc-blog       ---> NAT ---> internet
    +-- namespace ns-blog-db ----+        |   10.20.2.1           (iptables FORWARD)
    |  10.20.2.2  v-blog-db-a    |==veth==+
    +----------------------------+

A subnet is a network namespace, a VPC is a bridge, and the host is the router between them. Each thing in the
kernel is described once, as a Step: the command that makes it, the command that takes it back, the fact by which
one sees it, and the reason. Plans are lists of steps; create, delete, restore, verify and --dry-run only read them.

Exit codes: 0 done, or the answer is yes; 1 the answer is no; 2 refused input; 3 a command failed and what was
done was taken back; 4 the machine lacks something; 130/143 stopped by a signal.
"""
import os
import sys
if __name__ == "__main__":        # called as `python3 vpcctl.py`: what lies beside it is no part of it
    sys.path[:] = [folder for folder in sys.path
                   if os.path.realpath(folder) != os.path.dirname(os.path.realpath(__file__))]
import argparse
import errno
import json
import re
import stat
from collections import namedtuple
from functools import lru_cache
from contextlib import contextmanager

VERSION = "1.0.0"
ALIAS = "vpcctl:"                 # our mark on links, followed by the VPC's name
PROTOCOL = "118"                  # our mark on routes and routing rules
FENCE_TABLE = "7000"              # unreachable for every VPC's range: read by VPCs with NAT, after their own table
FIRST_TABLE = 7001                # route tables of VPCs
PREF_OWN, PREF_FENCE, PREF_OUT, PREF_END, PREF_VOID, PREF_IN, PREF_SHUT = (str(7000 + n) for n in range(1, 8))
# Where no router sends anything. (A cloud host's metadata service is link-local.)
UNROUTED = {"0.0.0.0/8": "unspecified", "127.0.0.0/8": "loopback", "169.254.0.0/16": "link-local",
            "224.0.0.0/3": "multicast or reserved"}
GUARD, REST = "vpcctl-guard", "vpcctl-rest"       # chains of the host, of no VPC
MARK_BITS, MARK_SALT = 12, (1 << 12) - 1
NETNS_DIR, ETC_NETNS, RUN_DIR = "/run/netns", "/etc/netns", "/run/vpcctl"
NOBODY = 65534
# Who shares a user id may read another's memory, take its sockets, and end it; so each app has an id of its
# own, and is found by it wherever it goes. The first range lies above what SSSD and FreeIPA make up for a
# directory's accounts (up to 2000200000), and below systemd's ids of foreign images (2147352576) and what old
# tools read as negative. The second is for containers with 65,536 ids: what systemd leaves free below those
# of DynamicUser. The id before each is nobody's, see `signal_user`.
APP_USERS = (2100000001, 2147000000), (60579, 61183)
UMASK = 0o022                     # others read what we make (apps, `list` without root), and nobody else writes
LOCK_WAIT, APP_WAIT, STOP_WAIT, LOG_LIMIT, PROBE_SIZE = 60.0, 10.0, 5.0, 1 << 20, 1 << 16
SETTLE_WAIT = 0.1                 # a server that goes into the background may listen before it does
TOOL_WAIT = 30.0                  # a tool has this long, and a batch a little more for each line
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}\Z")
PROTOCOLS = ("tcp", "udp", "icmp", "all")     # of a policy's rules; of all others but these three, rules cannot speak
DEFAULT_POLICY = {"ingress": [{"port": 80, "protocol": "tcp", "action": "allow"},
                              {"port": 443, "protocol": "tcp", "action": "allow"},
                              {"port": 22, "protocol": "tcp", "action": "deny"}],
                  "egress": []}
# In a namespace, before its link comes up: no IPv6 (the rules speak IPv4), no redirects, low ports for user nobody.
NS_SYSCTLS = (("net.ipv6.conf.all.disable_ipv6", "1", "the rules speak IPv4 only"),
              ("net.ipv6.conf.default.disable_ipv6", "1", "the rules speak IPv4 only"),
              ("net.ipv4.conf.all.accept_redirects", "0", "nobody may redirect traffic around the gateway"),
              ("net.ipv4.conf.default.accept_redirects", "0", "nobody may redirect traffic around the gateway"),
              ("net.ipv4.ip_unprivileged_port_start", "0", "apps without root may use port 80"))


# ------------------------------------------------------------------------------------------------ values

class Problem(Exception):
    """What the user is told: what is wrong, what to do about it, and the exit code."""

    def __init__(self, message, hint="", code=2):
        super().__init__(message)
        self.hint, self.code = hint, code


class Interrupted(Exception):
    """A signal asked us to stop; raised between two commands, never inside one."""


# The order in which things of different kinds are made; they are taken back the other way round. It also decides how
# many processes are started: neighbours in this order that one tool can do ride in one batch.
FLOWS, SPACE, LINK, SYSCTL, WIRE, ROUTE, NEIGHBOUR, ENTRY, INSIDE, FIREWALL, PLUG, FILE = range(12)


class Step:
    """One thing in the kernel: how to make it, how to take it back, how to see it, and why it is there.

    `do` and `undo` are tuples of argument lists. Without `undo` it goes when its `holder` (a fact) goes. `key` says
    which thing it is when its content may change (a policy); `optional` names what is lost where a kernel cannot.
    `whys`: a reason for each command of `do`, where they differ.
    """
    __slots__ = ("phase", "fact", "do", "undo", "why", "holder", "key", "optional", "whys")

    def __init__(self, phase, fact, do, undo=(), why="", holder=None, key=None, optional="", whys=()):
        self.phase, self.fact, self.why, self.holder, self.optional = phase, fact, why, holder, optional
        self.do = _commands(do)
        self.undo = _commands(undo)
        self.key = key or fact
        self.whys = whys or (why,) * len(self.do)


# A step to make, the one (or None) that is taken out before, and what was Wrong (None: it is a new thing).
Change = namedtuple("Change", "undo make because")


class Wrong(namedtuple("Wrong", "kind found")):
    """What is wrong with a thing: "missing", "changed", "not ours" or "unseen", and what was found, in words."""
    __slots__ = ()

    def __str__(self):
        return f"{self.kind} ({self.found})" if self.found else self.kind


def _commands(given):
    """One command as a string without odd characters, or a tuple of argument lists -> tuple of argument lists."""
    if isinstance(given, str):
        return (tuple(given.split()),)
    return tuple(given)


def sysctl_path(key):
    """The file behind a sysctl key. In our keys a dot in an interface's name is written as a slash, as sysctl does."""
    return "/proc/sys/" + key.replace(".", "\0").replace("/", ".").replace("\0", "/")


def sysctl_step(key, value, why, undo=(), optional="", phase=SYSCTL, holder=None):
    """A kernel switch of the host."""
    return Step(phase, ("sysctl", key, value), "sysctl -w %s=%s" % (key, value), undo, why, holder, None, optional)


def link_conf(family, device, switch):
    """The sysctl key of an interface's switch."""
    return "net.%s.conf.%s.%s" % (family, device.replace(".", "/"), switch)


def rule_step(chain, rule, why, table="filter", place=None, mark="vpcctl", holder=None):
    """A firewall rule of the host; place: None (anywhere), "first" or "last" in its chain.

    Rules that may stand anywhere go in behind the first one, so that "last" stays last; "third": behind two.
    """
    at = {"first": ("-I", chain, "1"), "last": ("-A", chain), None: ("-I", chain, "2"), "third": ("-I", chain, "3"),
          "append": ("-A", chain), "prepend": ("-I", chain, "1")}[place]
    place = place if place in ("first", "last") else None
    do = rule_argv(at, rule, mark, table)
    return Step(FIREWALL, ("rule", table, chain, rule_key(do[do.index(chain) + len(at) - 1:]), place), (do,),
                (rule_argv(("-D", chain), rule, mark, table),), why, holder)


def rule_argv(at, rule, mark, table="filter"):
    """The command that puts a rule in, or takes it out: `at` is like ("-I", "FORWARD", "1")."""
    return ("iptables",) + (("-t", table) if table != "filter" else ()) + at + tuple(rule) + (
        "-m", "comment", "--comment", mark)


def chain_step(chain, why, table="filter"):
    """A firewall chain of our own; its rules go with it."""
    tool = ("iptables",) + ("-t", table) * (table != "filter")
    return Step(FIREWALL, ("chain", table, chain), (tool + ("-N", chain),),
                (tool + ("-F", chain), tool + ("-X", chain)), why)


def flows_step(words, holder=None):
    """Tracked connections that end with what they ran through: a step with nothing to make. It is taken back
    last, when nothing new can come. (A successor with these addresses would get the answers to old questions.)"""
    return Step(FLOWS, ("flows", words), (), "conntrack -D " + words, "open connections end with it", holder)


RULE_ALIASES = {"--icmp-type": {"echo-request": "8", "any": "255"}}


def rule_key(tokens):
    """A rule's meaning, whatever the order and spelling in which iptables prints it: a sorted tuple of pairs."""
    pairs, negated, position = [], "", 0
    while position < len(tokens):
        option, position = tokens[position], position + 1
        if option == "!":
            negated = "!"
            continue
        value = ""
        if position < len(tokens) and not tokens[position].startswith("-") and tokens[position] != "!":
            value, position = tokens[position], position + 1
        if option != "-m":
            value = RULE_ALIASES.get(option, {}).get(value, value)
            if option in ("-s", "-d") and value.endswith("/32"):
                value = value[:-3]
            if option == "--mac-source":
                value = value.lower()
            if option == "--ctstate":
                value = ",".join(sorted(value.split(",")))
            if option in ("--dport", "--sport") and value.partition(":")[0] == value.partition(":")[2]:
                value = value.partition(":")[0]
            if negated or (option, value) not in (("--icmp-type", "255"), ("-s", "0.0.0.0/0"), ("-d", "0.0.0.0/0")):
                pairs.append((negated + option, value))
        negated = ""
    return tuple(sorted(pairs))


# A value is written in one way, or refused: where Python reads 010 as ten, iptables reads eight, and where Python's
# int() takes " 80", "8_0" and Arabic digits, iptables takes none. What a user wrote becomes a number here, at the
# border (command line, policies, topologies, records), and rules are made from the number.
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_ADDRESS = _OCTET + (r"\." + _OCTET) * 3
_BLOCK = _ADDRESS + r"/(?:3[0-2]|[12]?[0-9])"
_PORTS = r"[1-9][0-9]{0,4}-[1-9][0-9]{0,4}"


@lru_cache(None)
def whole(pattern):
    """A function that tells whether a text is, as a whole, what a pattern says."""
    return re.compile(f"(?:{pattern})\\Z").match


def told(value):
    """A value that is refused, as JSON has it, cut to what fits on a line."""
    try:
        text = json.dumps(value)
    except RecursionError:
        return "nested too deeply"
    return text if len(text) <= 80 else text[:80] + "…"


@lru_cache(4096)
def address_number(text):
    """An IPv4 address -> its number; Problem otherwise."""
    if not whole(_ADDRESS)(text):
        raise Problem(f"'{text:.80}' is not an IPv4 address", "write it like 10.20.1.1, without leading zeros")
    first, second, third, fourth = map(int, text.split("."))
    return first << 24 | second << 16 | third << 8 | fourth


@lru_cache(4096)
def bounds(block):
    """An IPv4 block without host bits -> its first and last address as numbers; Problem otherwise. (A record may hold
    hundreds of blocks, and ipaddress takes ten times as long for each.)"""
    if not whole(_BLOCK)(block):
        alone = f"; this address alone is {block}/32" if whole(_ADDRESS)(block) else ""
        raise Problem(f"'{block:.80}' is not an IPv4 block", "write it like 10.20.0.0/16, without leading zeros" + alone)
    address, _, length = block.partition("/")
    number, size = address_number(address), 1 << 32 - int(length)
    if number % size:
        raise Problem(f"'{block}' has host bits set",
                      f"the block that holds it is {dotted(number - number % size)}/{length}")
    return number, number + size - 1


@lru_cache(4096)
def as_network(text):
    """An IPv4 block without host bits -> ipaddress.IPv4Network; Problem otherwise."""
    import ipaddress
    bounds(text)
    return ipaddress.IPv4Network(text)


def dotted(number):
    """An address from its number."""
    return ".".join(str(number >> shift & 255) for shift in (24, 16, 8, 0))


@lru_cache(4096)
def block_text(block):
    """A block, written from its numbers."""
    first, last = bounds(block)
    return f"{dotted(first)}/{32 - (last - first).bit_length()}"


def ports(value):
    """The ports that a rule names, a number or a text like "8000-8100" -> (lowest, highest); Problem otherwise."""
    low = high = value
    if isinstance(value, str) and whole(_PORTS)(value):
        low, high = map(int, value.split("-"))
    if isinstance(low, bool) or not isinstance(low, int) or not 1 <= low <= high <= 65535:
        raise Problem(f"port is {told(value)}", 'a number from 1 to 65535, or "8000-8100"')
    return low, high


# What moves a terminal's cursor, changes what it does, turns the direction of writing, or is half a character.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# Begins a colour of our own in a line that is to be printed. Nobody can guess it, so no other text can hold it.
_PAINT = "\ufdd0" + os.urandom(8).hex()


def spelled(text):
    """A text as one line for people: what a terminal would obey rather than show is spelled out."""
    return _UNPRINTABLE.sub(lambda found: ascii(found.group())[1:-1], str(text)).replace(_PAINT, "\033[")


def inside(inner, outer):
    """Whether block `inner` lies in block `outer` (subnet_of came only with Python 3.7)."""
    return (outer.network_address <= inner.network_address and inner.broadcast_address <= outer.broadcast_address)


def name_type(text):
    """argparse type: a VPC's or subnet's name."""
    if not NAME.match(text):
        raise argparse.ArgumentTypeError(
            "'%s' is not a name: 1 to 32 letters, digits, '-' or '_', starting with a letter or digit" % text)
    return text


def network_type(text):
    """argparse type: an IPv4 block."""
    return _checked(block_text, text)


def _checked(check, text):
    """What check(text) returns; a Problem becomes argparse's kind of error."""
    try:
        return check(text)
    except Problem as problem:
        raise argparse.ArgumentTypeError(f"{problem}; {problem.hint}") from None


def networks_type(text):
    """argparse type: comma-separated IPv4 blocks."""
    blocks = [network_type(part.strip(" ")) for part in text.split(",") if part.strip(" ")]
    if not blocks:
        raise argparse.ArgumentTypeError("no block given; write them like 10.10.1.0/24,10.20.1.0/24")
    return sorted(set(blocks), key=blocks.index)


def address_type(text):
    """argparse type: an IPv4 address."""
    return dotted(_checked(address_number, text))


def port_type(text):
    """argparse type: a port, 1 to 65535."""
    if not whole(r"[1-9][0-9]{0,4}")(text) or int(text) > 65535:
        raise argparse.ArgumentTypeError("'%s' is not a port: a number from 1 to 65535" % text)
    return int(text)


def interface_type(text):
    """argparse type: the name of a network interface."""
    if not re.match(r"[A-Za-z0-9][A-Za-z0-9_.@:-]{0,14}\Z", text):
        raise argparse.ArgumentTypeError("'%s' is not an interface name; `ip link` lists them" % text)
    return text


def names_type(text):
    """argparse type: comma-separated names."""
    names = [name_type(part.strip(" ")) for part in text.split(",") if part.strip(" ")]
    if not names:
        raise argparse.ArgumentTypeError("no name given; write them like web,db")
    return names


def publish_type(text):
    """argparse type: HOSTPORT[:PORT] -> (host port, port)."""
    outer, colon, inner = text.partition(":")
    return port_type(outer), port_type(inner if colon else outer)


def path_type(text):
    """argparse type: a file's or folder's name."""
    if not text:
        raise argparse.ArgumentTypeError("the name of a file or folder is empty")
    return _checked(word, text)


def word(text):
    """A text that may be an argument or a file's name, as it is; Problem if the kernel takes it as neither."""
    try:
        if b"\0" not in os.fsencode(text):
            return text
    except (TypeError, ValueError):               # no text, or half of a surrogate pair
        pass
    raise Problem(f"{told(text)} cannot be an argument or a file's name", "write a text without NUL")


def folder(text):
    """A folder's name, as it is; Problem if it depends on where one is."""
    if not word(text).startswith("/"):
        raise Problem(f"the folder is {told(text)}", "write where it is from the top: /srv/site")
    return text


def folder_type(text):
    """argparse type: a folder for a program to run in."""
    return _checked(folder, text)


def variable(name, value):
    """A variable for a program -> (name, value); a Problem does not tell the value: it may be a secret."""
    if not isinstance(name, str) or not whole("[A-Za-z_][A-Za-z0-9_]{0,79}")(name) or name == "VPCCTL_APP":
        raise Problem(f"{told(name)} is no name for a variable",
                      "take letters, digits and _ (VPCCTL_APP is vpcctl's)")
    if not isinstance(value, str) or not whole("[^\0\ud800-\udfff]*")(value):
        raise Problem(f"the value of {name} is no text", "write a text without NUL, in quotes")
    return name, value


def variable_type(text):
    """argparse type: KEY=VALUE."""
    name, given, value = text.partition("=")
    if not given:
        raise argparse.ArgumentTypeError(f"there is no = behind {told(name)}: write it like KEY=VALUE")
    return _checked(lambda _: variable(name, value), text)


# ------------------------------------------------------------------------------------------------ the executor

class Failure(Exception):
    """A command failed: the command as one would type it, and what it said."""

    def __init__(self, argv, said):
        said = "; ".join(line.strip() for line in said.splitlines() if line.strip())
        super().__init__(said)
        self.argv, self.said = argv, said


GONE = re.compile(r"Cannot find device|No such (file|process|device)|does not exist|Cannot assign requested address|"
                  r"does a matching rule exist|No chain/target/match|Invalid argument: remove|RULE_DELETE failed|"
                  r"Cannot remove namespace file|not exist|Address not found", re.I)


def shown(argv):
    """A command as one would type it; a long file's content is cut."""
    if argv[0] == "tee" and len(argv) > 2:
        text = argv[2].replace("\n", "\\n")
        return "printf '%s' | tee %s" % (text if len(text) <= 200 else text[:200] + "…", argv[1])
    if argv[-1] == "&" and len(argv) > 1:
        return shown(argv[:-1]) + " &"
    if all(re.match(r"[\w@%+=:,./-]+\Z", word) for word in argv):
        return " ".join(argv)
    import shlex
    return " ".join(shlex.quote(word) for word in argv)


def popen(argv, **options):
    """Start a system tool in a session of its own, so that a terminal's Ctrl-C reaches only vpcctl, which then
    finishes the command at hand and takes back what was done. Problem 4 if the tool is missing."""
    import subprocess
    options.setdefault("stdin", subprocess.DEVNULL)
    try:
        return subprocess.Popen(argv, start_new_session=True, **options)
    except FileNotFoundError:
        raise missing_tool(argv[0]) from None


def call(argv, text=None):
    """Run a system tool to its end -> (exit code, stdout, stderr).

    It inherits the lock: if we are killed meanwhile, nobody starts repairing before it has ended. One that does
    not end in its time is killed, with what it started. Below 0, the exit code is a signal's: nobody knows how far
    it got.
    """
    import signal
    import subprocess
    child = popen(argv, stdin=subprocess.PIPE if text is not None else subprocess.DEVNULL,
                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, close_fds=False)
    limit = TOOL_WAIT + (text or "").count("\n") / 20
    try:
        out, err = child.communicate(text.encode() if text is not None else None, timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return -signal.SIGKILL, "", f"no end within {limit:.0f} s, so it was killed"
    if child.returncode < 0:
        err = b"ended by signal %d" % -child.returncode
    return child.returncode, out.decode("utf-8", "replace"), err.decode("utf-8", "replace")


PACKAGES = {"ip": "iproute2 (RHEL: iproute)", "bridge": "iproute2 (RHEL: iproute)", "iptables": "iptables",
            "iptables-save": "iptables", "iptables-restore": "iptables", "unshare": "util-linux",
            "setpriv": "util-linux", "nsenter": "util-linux"}


def find_tool(tool):
    """Where a system tool is, or None; also where an ordinary user's PATH does not look. (shutil's own `which` comes
    with compressors and archives: 3 ms of every change.)"""
    if "/" in tool:
        return tool if os.access(tool, os.X_OK) else None
    for folder in search_path():
        path = os.path.join(folder, tool)
        if os.access(path, os.X_OK) and not os.path.isdir(path):
            return path
    return None


def search_path():
    """Where programs are looked for: PATH without folders that depend on where one is, and the system's own."""
    folders = [folder for folder in os.environ.get("PATH", os.defpath).split(":") if folder.startswith("/")]
    return folders + [folder for folder in ("/usr/sbin", "/sbin") if folder not in folders]


def missing_tool(tool):
    """The Problem for a system tool that is not installed."""
    return Problem("Cannot find required command: %s" % tool,
                   "install the package %s, for example: sudo apt install -y %s"
                   % (PACKAGES.get(tool, tool), PACKAGES.get(tool, tool).split()[0]), 4)


# Of a package: the program that tells its version, how it does, the oldest that will do, and its number.
# (Before 5.8 an iproute2 told the date of its release, as ss181023.)
OLDEST = {"iproute2": ("ip", r"iproute2-([0-9s.]+)", "4.19", (0, 181023)),
          "iptables": ("iptables", r"v([0-9.]+)", "1.6.2", (1, 6, 2))}
NO_JSON = "this is no JSON that can be read: "
# What a tool says of an option that it does not know, and what `ip` of before 4.17 prints in spite of `-j`.
UNHEARD = re.compile("option|usage|" + NO_JSON, re.I)


def too_old(failure):
    """The Problem for a command that failed because its tool is too old, or None."""
    argv = inner(failure.argv) if lane(failure.argv)[0] == "ns" else failure.argv
    package = PACKAGES.get(argv[0], "").partition(" ")[0]
    if package not in OLDEST or not UNHEARD.search(failure.said):
        return None
    tool, pattern, needed, least = OLDEST[package]
    told = "".join(call([tool, "-V"])[1:])
    found = re.search(pattern, told)
    if found and tuple(int(part) for part in found.group(1).replace("ss", "0.").split(".") if part) >= least:
        return None
    version = found.group() if found else f"no {package}: {told.strip()[:80]}"
    return Problem(f"`{tool}` is too old: it is {version}; vpcctl needs {package} {needed} or later",
                   f"install a newer {package}", 4)


def refusal(failure, hint=""):
    """The Problem for a command that failed."""
    old = too_old(failure)
    if old:
        old.hint += hint and "; " + hint
        return old
    return Problem(f"`{shown(failure.argv)}` failed: {failure.said.strip() or 'no reason given'}", hint, 3)


def enter_namespace(name):
    """Move the calling thread (only it) into a network namespace."""
    handle = os.open(os.path.join(NETNS_DIR, name), os.O_RDONLY)
    try:
        if hasattr(os, "setns"):
            os.setns(handle, 0x40000000)
        else:
            import ctypes
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(handle, 0x40000000):
                raise OSError(ctypes.get_errno(), "setns: " + os.strerror(ctypes.get_errno()))
    finally:
        os.close(handle)


def in_namespaces(names, work):
    """Run work(name) for each namespace, each in a thread that has entered it, a few at a time: mostly they wait for
    the kernel.

    Returns name -> result; an exception is a result too. Children of such a thread live in the namespace as well.
    """
    import threading
    queue, results = list(reversed(list(names))), {}

    def worker():
        """Take names until none is left."""
        while True:
            try:
                name = queue.pop()
            except IndexError:
                return
            try:
                enter_namespace(name)
                results[name] = work(name)
            except Exception as error:            # handed to the caller, who knows what it means
                results[name] = error
    threads = [threading.Thread(target=worker) for _ in range(min(len(queue), 2 * (os.cpu_count() or 1)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def in_namespace(name, work):
    """Run work() inside one namespace and return its result; exceptions come through."""
    result = in_namespaces([name], lambda _: work())[name]
    if isinstance(result, Exception):
        raise result
    return result


def lane(argv):
    """Which batch a command can ride in: consecutive commands of one lane become one process."""
    if argv[:2] == ("ip", "neigh"):
        return "file", ""
    if argv[:2] == ("ip", "-n"):
        return "ns", argv[2]
    if argv[:3] == ("ip", "netns", "exec"):
        return "ns", argv[3]
    if argv[0] == "iptables":
        return "iptables", ""
    return ("file" if argv[0] in FILE_WORKS and argv[0] != "ip" else argv[0]), ""


def inner(argv):
    """A command for a namespace, as it is typed inside it."""
    return ("ip",) + argv[3:] if argv[1] == "-n" else argv[4:]


def quoted(word):
    """An argument as iptables-restore reads it."""
    return '"%s"' % word if re.search(r"[\s']", word) or not word else word


UNKNOWN = -1                      # how many of a batch were done, if the tool was killed over it


def one_call(argv):
    """Run one command -> how many were done, error text."""
    code, _, said = call(list(argv))
    return (1, "") if code == 0 else (0 if code > 0 else UNKNOWN, said)


def ip_batch(commands):
    """Run commands of ip in as few processes as it can -> how many were done, error text.

    A batch of ip 4.20 may know only the interfaces that were there when it began: from the line that names
    another, a new one goes on. That ends, since each must have done something.
    """
    done, count, said = 0, 1, STRANGER
    while STRANGER in said and count > 0:
        count, said = one_ip_batch(commands[done:])
        done = done + count if count != UNKNOWN else UNKNOWN
    return done, said


STRANGER = "Cannot find device"


def one_ip_batch(commands):
    """Run commands of ip in one process -> how many were done, error text."""
    if len(commands) == 1:
        return one_call(commands[0])
    code, _, said = call(["ip", "-batch", "-"], "".join(" ".join(argv[1:]) + "\n" for argv in commands))
    if code == 0:
        return len(commands), ""
    if code < 0:
        return UNKNOWN, said
    failed = re.search(r"Command failed -:(\d+)", said)
    return (int(failed.group(1)) - 1 if failed else 0), re.sub(r"Command failed.*\n?", "", said)


def by_table(argv):
    """A command of iptables -> (its table, the words after that)."""
    return (argv[2], argv[3:]) if argv[1] == "-t" else ("filter", argv[1:])


def iptables_restore(commands):
    """Put firewall commands in, as one transaction for each table -> exit code, error text, number of tables."""
    tables = {}
    for argv in commands:
        table, words = by_table(argv)
        tables.setdefault(table, []).append(" ".join(quoted(word) for word in words))
    code, _, said = call(["iptables-restore", "-w", "5", "--noflush"], "".join(
        "*%s\n%s\nCOMMIT\n" % (table, "\n".join(lines)) for table, lines in tables.items()))
    return code, said or f"iptables-restore: exit code {code}", len(tables)


def iptables_batch(commands):
    """Put firewall commands in, all or none of a table's -> how many were done, error text."""
    if len(commands) > PIECE and not app_users():
        return iptables_pieces(commands)          # a sandbox of an ordinary user: it would be refused as a whole
    code, said, tables = iptables_restore(commands)
    if code == 0:
        return len(commands), ""
    if code > 0 and TOO_LONG in said:
        return iptables_pieces(commands)
    untouched = tables == 1 or ITS_OWN_OPTION.search(said)
    return (0 if code > 0 and untouched else UNKNOWN), said


# What a tool says of an option of its own that it does not know: it has done nothing then.
ITS_OWN_OPTION = re.compile("(invalid|unrecognized) option")
PIECE, TOO_LONG = 200, "Message too long"


def iptables_pieces(commands):
    """Without real root, a transaction must fit into a socket's buffer (208 KB): put it in piece by piece. What is let
    through meanwhile is less, never more: a policy's rules stand behind a DROP until all are there."""
    held = sorted({argv[2] for argv in commands if argv[1] == "-A"} & {"INPUT", "OUTPUT"})
    hold = [("iptables", verb, chain) + at + ("-j", "DROP", "-m", "comment", "--comment", "policy-being-replaced")
            for verb, at in (("-I", ("1",)), ("-D", ())) for chain in held]
    first = [argv for argv in commands if held and argv[1] in ("-F", "-D")]
    rest = [argv for argv in commands if argv[1] not in ("-F", "-D")] if held else list(commands)
    pieces = [first + hold[:len(held)]] + [rest[at:at + PIECE] for at in range(0, len(rest), PIECE)] + [hold[len(held):]]
    while pieces:
        piece = pieces.pop(0)
        code, said, _ = iptables_restore(piece) if piece else (0, "", 0)
        if code > 0 and TOO_LONG in said and len(piece) > 1:
            pieces[:0] = [piece[:len(piece) // 2], piece[len(piece) // 2:]]
        elif code:
            return UNKNOWN, said
    return len(commands), ""


def file_batch(commands):
    """Small works on files and switches, done here rather than by a process each -> how many were done, error."""
    for done, argv in enumerate(commands):
        try:
            FILE_WORKS[argv[0]](*argv[1:])
        except OSError as error:
            return done, "%s: %s" % (error.filename or argv[-1], error.strerror)
    return len(commands), ""


def _write_sysctl(_, setting):
    key, value = setting.split("=", 1)
    if key.startswith("net.ipv6.") and not os.path.exists("/proc/sys/net/ipv6/conf"):
        return                                    # this kernel has no IPv6 to switch off
    with open(sysctl_path(key), "w") as switch:
        switch.write(value)


def _unlink(*paths):
    for path in paths:
        if path != "-f" and os.path.lexists(path) and (is_our_link(path) or not path.startswith(ETC_NETNS + "/")):
            os.unlink(path)                       # in /etc/netns there may be a file of somebody else's


def _symlink(*words):
    if is_our_link(words[-1]):
        os.unlink(words[-1])
    if not os.path.lexists(words[-1]):            # somebody else's file in /etc/netns is left as it is
        os.symlink(*words[-2:])


def _rmdir(*paths):
    try:
        os.rmdir(paths[-1])
    except OSError as error:                      # absent, or somebody else's file is in it: leave it
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EBUSY):
            raise


def remove_tree(folder):
    """Remove a folder of ours with all in it, and the folder above if that is then empty."""
    import shutil
    if os.path.isdir(folder) and not os.path.islink(folder):
        shutil.rmtree(folder)
    _rmdir(os.path.dirname(folder))


def _tee(path, text):
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    with os.fdopen(handle, "w") as opened:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink > 1:
            raise OSError(errno.EPERM, "it is not a file of vpcctl's: remove it", path)
        opened.truncate()                         # in place: running programs have this very file mounted
        opened.write(text)
        os.fchmod(handle, 0o644)


def _mkdir(*words):
    os.makedirs(words[-1], 0o755, exist_ok=True)
    close_folder(words[-1])


def close_folder(path, deep=False):
    """See that nobody else can write in a folder of ours, and (`deep`) in those in it. OSError if it is a
    link, is another's, or holds what is another's: it may have been open, and what others put there must not
    lead us astray."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        mode, owner = os.fstat(handle).st_mode, os.fstat(handle).st_uid
        if owner == os.geteuid() and mode & 0o022:
            os.fchmod(handle, mode & 0o755)
    finally:
        os.close(handle)
    if owner != os.geteuid():
        raise OSError(errno.EPERM, "it belongs to user %d, not to root: remove it" % owner, path)
    for entry in os.listdir(path) if deep else ():
        inner = os.path.join(path, entry)
        found = os.lstat(inner)
        if stat.S_ISDIR(found.st_mode):
            close_folder(inner, deep)
        elif found.st_uid != os.geteuid():
            raise OSError(errno.EPERM, "it belongs to user %d, not to root: remove it" % found.st_uid, inner)


def attribute(kind, value):
    """A netlink attribute, padded to four bytes."""
    import struct
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def attributes(data, at=0):
    """The netlink attributes in some bytes: kind -> value."""
    import struct
    found = {}
    while at + 4 <= len(data):
        size, kind = struct.unpack_from("=HH", data, at)
        found[kind & 0x3fff] = data[at + 4:at + size]
        at += max(4, size + 3 & ~3)
    return found


ONE, ALL = 0x004, 0x300           # flags of a question: NLM_F_ACK, NLM_F_DUMP
ROUTING, NETFILTER = 0, 12        # whom: NETLINK_ROUTE (links, neighbours, namespaces), NETLINK_NETFILTER


def netlink_socket(family=ROUTING):
    """A socket to the kernel."""
    import socket
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, family)


def netlink(kernel, kind, flags, body):
    """Send the kernel a message and yield its answers, without their heads. OSError if it refuses."""
    import struct
    kernel.send(struct.pack("=IHHII", 16 + len(body), kind, 1 | flags, 1, 0) + body)
    while True:
        data, at = kernel.recv(1 << 16), 0
        while at < len(data):
            size, found = struct.unpack_from("=IH", data, at)
            if found in (2, 3):                   # NLMSG_ERROR (0: all is well), NLMSG_DONE
                code = -struct.unpack_from("=i", data, at + 16)[0]
                if code:
                    raise OSError(code, os.strerror(code))
                return
            yield data[at + 16:at + size]
            at += size + 3 & ~3


def rtnetlink(kind, flags, body, device=""):
    """Send the kernel's routing side one message -> its answers, without their heads. OSError, of the device, if it
    refuses."""
    try:
        with netlink_socket() as kernel:
            return list(netlink(kernel, kind, flags, body))
    except OSError as error:
        raise OSError(error.errno, error.strerror, device) from None


def _neighbour(table, verb, target, *words):
    """What `ip neigh replace|del ADDRESS lladdr MAC dev DEVICE …` and `bridge fdb replace MAC dev DEVICE …` do: one
    message to the kernel. Both tools first read all links, twice 8 ms with 200 subnets."""
    import socket
    import struct
    named = dict(zip(words[::2], words[1::2]))
    if table == "neigh":
        family, state, flags = socket.AF_INET, 0x80, 0                        # NUD_PERMANENT
        more = attribute(1, socket.inet_aton(target))                         # NDA_DST
    else:
        family, state, flags, more = AF_BRIDGE, 0x40, 0x04, b""              # NUD_NOARP, NTF_MASTER
        named["lladdr"] = target
    if "lladdr" in named:
        more += attribute(2, bytes.fromhex(named["lladdr"].replace(":", "")))     # NDA_LLADDR
    body = struct.pack("=BxxxiHBB", family, socket.if_nametoindex(named["dev"]), state, flags, 0) + more
    kind, how = (28, 0x500 | ONE) if verb == "replace" else (29, ONE)         # RTM_NEWNEIGH, RTM_DELNEIGH
    rtnetlink(kind, how, body, named["dev"])


def permanent_neighbours():
    """The permanent neighbour entries of the calling thread's namespace -> list of (interface, address, MAC). (To ask
    `ip` would be a process more for each namespace.)"""
    import socket
    import struct
    found = []
    for answer in rtnetlink(30, ALL, struct.pack("=BxxxiHBB", socket.AF_INET, 0, 0, 0, 0)):   # RTM_GETNEIGH
        index, state = struct.unpack_from("=iH", answer, 4)
        told = attributes(answer, 12)
        if state & 0x80 and len(told.get(2, b"")) == 6:                       # NUD_PERMANENT, NDA_LLADDR
            mac = ":".join("%02x" % byte for byte in told[2])
            found.append((socket.if_indextoname(index), socket.inet_ntoa(told[1]), mac))
    return found


AF_BRIDGE = 7
# Switches of a bridge's port for which `ip` got its words only with 5.18: IFLA_BRPORT_….
PORT_FLAGS = {"bcast_flood": 30, "locked": 39}


def by_netlink(argv, said):
    """A command for a port's switch that this `ip` does not know -> the message that does it, or None."""
    if "bridge_slave" in argv and argv[-2] in PORT_FLAGS and "unknown option" in said:
        return ("netlink", "RTM_SETLINK", argv[3]) + argv[-2:]
    return None


def _set_port(_, port, flag, value):
    """Switch a port's flag. A kernel that does not know it says nothing, so it is read back."""
    import socket
    import struct
    body = struct.pack("=BxHiII", AF_BRIDGE, 0, socket.if_nametoindex(port), 0, 0)
    body += struct.pack("=HHHHBxxx", 12, 0x8000 | 12, 5, PORT_FLAGS[flag], value == "on")     # IFLA_PROTINFO
    rtnetlink(19, ONE, body, port)                # RTM_SETLINK
    if port_flags().get(port, {}).get(flag) != (value == "on"):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), port)


def port_flags():
    """Every bridge port's switches: port -> {flag: True, False, or None if this kernel has no such flag}."""
    import struct
    found = {}
    for answer in rtnetlink(18, ALL, struct.pack("=BxHiII", AF_BRIDGE, 0, 0, 0, 0)):          # RTM_GETLINK
        told = attributes(answer, 16)
        name, port = told[3].rstrip(b"\0").decode("utf-8", "replace"), attributes(told.get(12, b""))
        found[name] = {flag: bool(port[number][0]) if number in port else None
                       for flag, number in PORT_FLAGS.items()}
    return found


IPV4_FLOWS = b"\2\0\0\0"        # struct nfgenmsg: AF_INET, version 0


def flow_count():
    """How many connections the host tracks; None if this kernel cannot end them (it has no ctnetlink)."""
    import struct
    try:
        with netlink_socket(NETFILTER) as kernel:
            answer = list(netlink(kernel, 0x105, ONE, IPV4_FLOWS))[0]         # IPCTNL_MSG_CT_GET_STATS
    except OSError:
        return None
    return struct.unpack(">I", attributes(answer, 4)[1])[0]


def end_flows(commands):
    """What `conntrack -D …` does for each of the commands, in one look at all tracked connections -> how many
    were done, error text. Where the kernel cannot, they end by their own time limits; `verify` says so."""
    if not flow_count():
        return len(commands), ""                  # a look takes 5 ms even then: it is a walk through a table
    filters = flow_filters(commands)
    try:
        with netlink_socket(NETFILTER) as kernel, netlink_socket(NETFILTER) as second:
            for entry in netlink(kernel, 0x101, ALL, IPV4_FLOWS):             # IPCTNL_MSG_CT_GET
                if is_named(entry, filters):
                    end_flow(second, attributes(entry, 4))
    except OSError as error:
        return 0, f"conntrack: {error.strerror}"
    return len(commands), ""


def flow_filters(commands):
    """What `conntrack -D -s|-r BLOCK …` commands name, so that the number of blocks costs nothing:
    (which address, how many bits are left out of it) -> what is left of it -> further conditions."""
    filters = {}
    for argv in commands:
        block, more = argv[3], argv[4:]
        shift = 32 - int(block.split("/")[1])
        blocks = filters.setdefault((argv[2], shift), {})
        blocks.setdefault(bounds(block)[0] >> shift, []).append(dict(zip(more[::2], more[1::2] + ("",))))
    return filters


def is_named(entry, filters):
    """Whether a tracked connection is one that the filters name. The kernel writes the original direction
    first (CTA_TUPLE_ORIG), then the reply's, and in each the source: most are told by these alone."""
    import struct
    reply = 4 + (struct.unpack_from("=H", entry, 4)[0] + 3 & ~3)
    sources = {"-s": struct.unpack_from(">I", entry, 16)[0],
               "-r": struct.unpack_from(">I", entry, reply + 12)[0]}
    for (end, shift), blocks in filters.items():
        for more in blocks.get(sources[end] >> shift, ()):
            if not more or is_flow(attributes(entry, 4), more):
                return True
    return False


def is_flow(flow, named):
    """Whether a tracked connection fits the further words of a `conntrack` command."""
    import struct
    protocol = attributes(attributes(flow[1])[2])                             # CTA_TUPLE_PROTO
    target, = struct.unpack(">I", attributes(attributes(flow[1])[1])[2])      # CTA_IP_V4_DST
    low, high = bounds(named.get("-d", "0.0.0.0/0"))
    status, = struct.unpack(">I", flow[3])                                    # CTA_STATUS: IPS_SRC_NAT
    return (low <= target <= high and named.get("-p") in (None, {6: "tcp", 17: "udp"}.get(protocol[1][0]))
            and ("--dport" not in named or protocol.get(3) == struct.pack(">H", int(named["--dport"])))
            and ("-n" not in named or bool(status & 0x10)))


def end_flow(kernel, flow):
    """End one tracked connection: it is named by its original direction, its id and its zone."""
    body = IPV4_FLOWS + attribute(1 | 0x8000, flow[1])
    for kind in (12, 18):
        body += attribute(kind, flow[kind]) if kind in flow else b""
    try:
        list(netlink(kernel, 0x102, ONE, body))                               # IPCTNL_MSG_CT_DELETE
    except FileNotFoundError:
        return                                    # it has ended meanwhile


def link_mark(kernel, name):
    """The alias of a network interface; None if there is no such interface."""
    import errno
    # IFLA_IFNAME, IFLA_EXT_MASK (no statistics)
    body = bytes(16) + attribute(3, name.encode() + b"\0") + attribute(29, b"\x08\0\0\0")
    try:
        answer = list(netlink(kernel, 18, ONE, body))[0]                      # RTM_GETLINK
    except OSError as error:
        if error.errno == errno.ENODEV:
            return None
        raise
    return attributes(answer, 16).get(20, b"").rstrip(b"\0").decode("utf-8", "replace")     # IFLA_IFALIAS


def space_id(kernel, name):
    """The id of a namespace, -1 if it has none; None if there is no such namespace."""
    import struct
    try:
        handle = os.open(os.path.join(NETNS_DIR, name), os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    body = bytes(4) + attribute(3, struct.pack("=i", handle))                 # NETNSA_FD
    try:
        answer = list(netlink(kernel, 90, ONE, body))[0]                      # RTM_GETNSID
    except OSError:
        return None                               # a file where the namespace was mounted
    finally:
        os.close(handle)
    return struct.unpack("=i", attributes(answer, 4)[1])[0]


FILE_WORKS = {"sysctl": _write_sysctl, "tee": _tee, "mkdir": _mkdir, "ln": _symlink, "rm": _unlink,
              "rmdir": _rmdir, "ip": _neighbour, "bridge": _neighbour, "netlink": _set_port}


def run_lane(kind, commands):
    """Run commands that share a lane -> how many were done, error text."""
    if kind == "ip":
        return ip_batch(commands)
    if kind == "iptables":
        return iptables_batch(commands)
    if kind == "file":
        return file_batch(commands)
    if kind == "conntrack":
        return end_flows(commands)
    return one_call(commands[0])


def split_lanes(commands):
    """Group consecutive commands by lane -> list of (kind, where, commands)."""
    groups = []
    for argv in commands:
        kind, where = lane(argv)
        if groups and groups[-1][:2] == (kind, where):
            groups[-1][2].append(argv)
        else:
            groups.append((kind, where, [argv]))
    return groups


def run_inside(commands):
    """Run one namespace's commands; the calling thread is in it -> how many were done, error text."""
    done = 0
    for kind, _, group in split_lanes([inner(argv) for argv in commands]):
        count, said = run_lane(kind, group)
        if count == UNKNOWN:
            return UNKNOWN, said
        done += count
        if said or count < len(group):
            return done, said
    return done, ""


# What tools and kernels say of what they do not know.
INCAPABLE = re.compile(r"not supported|Invalid argument|Unknown|unknown|wrong|garbage|No such file")


def begun(commands):
    """The changes that a batch would have made: it is unknown how far it got, and taking back is tolerant."""
    changes = []
    for change, _, _ in commands:
        if change not in changes:
            changes.append(change)
    return changes


def in_order(changes):
    """Changes in the order in which things of their kinds are made."""
    return sorted(changes, key=lambda change: change.make.phase)


def change_reasons(change, count):
    """The reason of each of a change's `count` commands, for --why: first what was wrong, then what it is for."""
    undone = f"undo: {change.undo.why}" if change.undo and change.undo.why else ""
    reasons = [undone] * (count - len(change.make.do)) + list(change.make.whys)
    if change.because and reasons:
        reasons[0] = f"{change.because}: {reasons[0]}" if reasons[0] else str(change.because)
    return reasons


def half_done(trouble):
    """Mark an exception: the machine is neither as before nor as wanted, so the intent stays."""
    trouble.half_done = True
    return trouble


class Executor:
    """The one place that changes the machine: echoes each command, batches them, and takes back what was done."""

    def __init__(self, dry_run=False, quiet=False, why=False, out=None):
        self.dry_run, self.quiet, self.why = dry_run, quiet, why
        self.out = out or sys.stdout
        self.stopped_by = 0                       # the signal that asked us to stop
        self.changing = False                     # a change has begun: it must end, one way or the other
        self.patient = False                      # what is done now is finished in spite of a signal
        self.lost = []                            # what optional steps could not do on this kernel
        self.commands = 0

    def watch_signals(self):
        """From here on a signal is noted and obeyed between two commands."""
        import signal
        self.changing = True
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note_signal)

    def _note_signal(self, number, _frame):
        self.stopped_by = number

    def heed(self):
        """Raise Interrupted if a signal asked us to stop."""
        if self.stopped_by and not self.patient:
            raise Interrupted(self.stopped_by)

    @contextmanager
    def patience(self):
        """Meanwhile, signals are noted and not obeyed."""
        before, self.patient = self.patient, True
        try:
            yield
        finally:
            self.patient = before

    def echo(self, argv, why=""):
        """Print a command before it runs, as one would type it."""
        if not self.quiet or self.dry_run:
            self.say(">>> %s%s" % (shown(argv), "   # " + why if self.why and why else ""))

    def say(self, text):
        """Print a line; a reader who has gone away, or a full disk, never stops a change midway."""
        try:
            self.out.write(spelled(text) + "\n")
        except OSError:
            if not self.changing:
                raise
            self.out = open(os.devnull, "w")
            os.dup2(self.out.fileno(), sys.stdout.fileno())

    def transact(self, removes, makes, then=None, adopt=()):
        """Take back the steps of `removes`, then make the changes of `makes`; `then` completes it. What is there without our mark stays (`adopt`: names that are ours all the same).

        If one cannot be made, or a signal comes in between, what this run did is taken back, newest first, and what
        it had removed is put there again. Raises Problem (code 3) or Interrupted then; with `half_done` if the
        machine is now neither as before nor as wanted. A change that removes is finished in spite of a signal.
        """
        makes = in_order(makes)
        removes = without_strangers(removes, [change.make for change in makes], adopt)
        try:
            left = self.take_back(removes)
        except Exception as trouble:
            trouble.half_done = True
            raise
        if left:
            raise half_done(Problem("could not remove: " + "; ".join(left),
                                    "run the same command again, or `vpcctl verify`", 3))
        made = []
        try:
            self.make(makes, made, patient=bool(removes))
            if then:
                then()
        except (Failure, Interrupted, Problem, OSError) as trouble:
            if getattr(trouble, "half_done", False):
                raise
            left = self._roll_back(made, removes)
            if isinstance(trouble, Failure):
                trouble = refusal(trouble, "what was done has been taken back" if not left else "")
            if left:
                say_error("could not take back: " + "; ".join(left) + "; `vpcctl restore` repairs it")
                trouble.half_done = True
            raise trouble

    def _roll_back(self, made, removed):
        """Newest first, undo the changes of `made` and make `removed` again -> what could not be."""
        if made or removed:
            self.say("taking back what was done:")
        # What had nothing in its place goes; a rule that was moved stays where it belongs.
        found = lambda step: as_found(step, blindly=True)
        going = [found(new) if old else new
                 for old, new, _ in made
                 if not old or not (old.do or old.key[0] == "moved")]
        left = self.take_back(going)
        try:
            swapped = [Change(found(new), old, None) for old, new, _ in made if old and old.do]
            self.make(swapped + in_order([Change(None, step, None) for step in removed]), [], patient=True)
        except (Failure, OSError) as trouble:
            left.append("%s: %s" % (shown(trouble.argv), trouble) if isinstance(trouble, Failure) else str(trouble))
        return left

    def make(self, changes, made, patient=False):
        """Make changes in order; `made` receives each that was begun and is (at least partly) there. Signals are
        obeyed between two commands and at the end, unless `patient`."""
        commands, reasons = [], []                # commands: (change, command, is it the change's last)
        for change in changes:
            own = (change.undo.undo if change.undo and change.undo.key[0] != "file" else ()) + change.make.do
            commands.extend((change, argv, position == len(own) - 1) for position, argv in enumerate(own))
            reasons.extend(change_reasons(change, len(own)) if self.why else [""] * len(own))
        position = told = 0
        while position < len(commands):
            if not patient:
                self.heed()
            end = self._end_of_lane(commands, position)
            for number in range(max(position, told), end):
                self.echo(commands[number][1], reasons[number])
            told = end
            self.progress(position, len(commands))
            position = self._run_slice(commands, position, end, made)
        self.progress(0, 0)
        if not patient:
            self.heed()

    def progress(self, done, total):
        """On a terminal that does not see the commands go by, show how far long work has come; 0 of 0 wipes that."""
        if self.dry_run or not sys.stderr.isatty() or (sys.stdout.isatty() and not self.quiet):
            return
        if total > 500 or not total:
            sys.stderr.write("\r%d of %d commands … " % (done, total) if total else "\r\033[K")
            sys.stderr.flush()

    @staticmethod
    def _end_of_lane(commands, start):
        """Where the batch that begins at `start` ends: one lane, or any number of namespaces side by side."""
        kind, where = lane(commands[start][1])
        end = start + 1
        while end < len(commands):
            next_kind, next_where = lane(commands[end][1])
            if next_kind != kind or (kind != "ns" and next_where != where):
                break
            end += 1
        return end

    def _run_slice(self, commands, start, end, made):
        """Run one batch; returns where to go on. A failed optional step is noted and passed over."""
        if self.dry_run:
            return end
        self._flush()
        kind, where = lane(commands[start][1])
        if kind == "ns":
            self._run_namespaces(commands[start:end], made)
            return end
        done, said = run_lane(kind, [argv for _, argv, _ in commands[start:end]])
        if done == UNKNOWN:
            made.extend(begun(commands[start:end]))
            raise Failure(commands[start][1], said)
        self.commands += done
        made.extend(change for change, _, last in commands[start:start + done] if last)
        if done == end - start:
            return end
        change, argv, last = commands[start + done]
        other, managed = by_netlink(argv, said), 0
        if other:
            if not self.quiet:
                self.say(f"    {shown(other)}: this ip has no word for it")
            managed, said = run_lane("file", [other])
        if managed:
            self.commands += 1
            made.extend([change] if last else [])
        elif change.make.optional and INCAPABLE.search(said):
            self.lost.append((change.make, said.strip()))
        else:
            if not last:
                made.append(change)               # begun, perhaps: taking back is tolerant of what is not there
            raise Failure(argv, said)
        return start + done + 1

    def _run_namespaces(self, commands, made):
        """Run each namespace's commands in a thread of its own."""
        groups = {}
        for item in commands:
            groups.setdefault(lane(item[1])[1], []).append(item)
        finished = []

        def work(name):
            finished.append(len(groups[name]))
            self.progress(sum(finished), len(commands))
            return run_inside([argv for _, argv, _ in groups[name]])
        results = in_namespaces(groups, work)
        trouble = None
        for name, result in results.items():
            done, said = result if isinstance(result, tuple) else (0, str(result))
            if done == UNKNOWN:
                made.extend(begun(groups[name]))
                trouble = trouble or Failure(groups[name][0][1], said)
                continue
            self.commands += done
            made.extend(change for change, _, last in groups[name][:done] if last)
            if done < len(groups[name]):
                change, argv, _ = groups[name][done]
                if change.undo:
                    made.append(change)
                trouble = trouble or Failure(argv, said)
        if trouble:
            raise trouble

    def take_back(self, steps):
        """Undo steps, newest kind first, tolerant of what is gone -> list of what could not be undone.

        What goes with its holder needs no command of its own.
        """
        going = {step.fact for step in steps}
        commands = []
        for step in sorted(reversed(list(steps)), key=lambda step: -step.phase):
            if step.holder not in going:
                commands.extend((step, argv) for argv in step.undo)
        # A chain can go only when no rule of another chain jumps to it any more.
        commands.sort(key=lambda item: (-item[0].phase, "-X" in item[1]))
        for step, argv in commands:
            self.echo(argv, "undo: " + (step.why or "it is in no record"))
        if self.dry_run or not commands:
            return []
        self._flush()
        return take_back_lanes(split_lanes([argv for _, argv in commands]))

    def _flush(self):
        try:
            self.out.flush()
        except OSError:
            self.say("")


def without_strangers(removes, makes, adopt=()):
    """The steps of `removes` without what somebody else has put in place of ours, and what is in or on it: that
    is named and stays. Problem if a step of `makes` would work on such a thing."""
    marks, going, made = {}, {step.fact for step in removes}, {step.fact for step in makes}
    for step in removes:
        if step.fact[0] == "alias":
            marks[("link", step.fact[1])] = {step.fact[2]}
        elif step.fact[0] == "rule":
            marks.setdefault(step.holder, set()).add(comment_of(step.undo[0]))
    made.update(step.holder for step in makes if step.fact[0] in ("alias", "ours"))     # it gets its mark now
    held = {step.holder for step in removes + makes if step.holder and step.holder[0] != "chain"} - made
    tables = parse_rules(saved_rules()) if any(fact[0] == "chain" for fact in going) else {}
    foreign = strangers([fact for fact in going | held if fact[1] not in adopt], marks, tables)
    for step in makes if foreign else ():
        if step.fact in foreign or step.holder in foreign:
            fact = step.fact if step.fact in foreign else step.holder
            raise Problem(f"{named(fact)} exists already and is not vpcctl's",
                          "remove or rename it; vpcctl does not touch what it did not make", 3)
    for fact in sorted(foreign):
        say_error(f"note: {named(fact)} is not vpcctl's: left alone")
    # Routes and connections are no part of the thing: they go all the same.
    ours = [step for step in removes if step.fact not in foreign
            and (step.holder not in foreign or step.fact[0] in ("route", "flows"))]
    return ours + other_rules(ours, tables)


def other_rules(steps, tables):
    """Steps for rules of ours that must go with the steps, though none says so: doubles (of a save that was put
    in again) and jumps to chains that go (for an edited record, others are planned). No chain goes before."""
    chains = {step.fact for step in steps if step.fact[0] == "chain"}
    planned, first, found = {step.fact[:4] for step in steps if step.fact[0] == "rule"}, set(), []
    for table, (_, rules) in tables.items():
        for chain, rule in rules:
            if ("chain", table, chain) in chains or not is_our_comment(comment_of(rule), True):
                continue
            fact = ("rule", table, chain, rule_key(rule))
            if fact in planned and fact not in first:
                first.add(fact)                   # its own step takes it out
            elif fact in planned or ("chain", table, target_of(rule)) in chains:
                found.append(found_rule(table, chain, rule))
    return found


def found_rule(table, chain, rule, more=()):
    """The step that takes out a rule as it was found; `more`: commands for its doubles."""
    where = ("-t", table) if table != "filter" else ()
    return Step(FIREWALL, ("rule", table, chain, rule_key(rule), None), (),
                (("iptables", *where, "-D", chain, *rule),) + more, holder=("chain", table, chain))


def strangers(facts, marks=None, tables=None):
    """Which of these links, namespaces and chains (in `tables`) are there without our mark. `marks`: fact ->
    the marks that count, where another VPC's does not. One message to the kernel for each, and no process."""
    marks, found = marks or {}, set()
    with netlink_socket() as kernel:
        for fact in facts:
            if fact[0] == "link":
                alias = link_mark(kernel, fact[1])
                known = alias in marks[fact] if fact in marks else (alias or "").startswith(ALIAS)
                if alias is not None and not known:
                    found.add(fact)
            elif fact[0] == "ns":
                number = space_id(kernel, fact[1])
                if number is not None and not is_marked(fact[1], number):
                    found.add(fact)
    comments = {}
    for table, (_, rules) in (tables or {}).items():
        for chain, rule in rules:
            comments.setdefault(("chain", table, chain), set()).add(comment_of(rule))
    # An empty chain is ours by its name: nothing is lost with it.
    filled = [fact for fact in facts if fact in comments]
    return found.union(fact for fact in filled if not comments[fact] & marks.get(fact, set()))


def take_back_lanes(groups):
    """Run groups of commands that remove things, one after the other, but the firewall's beside what comes after it:
    they are of two parts of the kernel that do not wait for each other -> what could not be removed."""
    import threading
    left, beside = [], []

    def firewall(group):
        try:
            left.extend(take_back_lane(*group))
        except Problem as problem:                # the tool is gone
            left.append("%s: %s" % (shown(group[2][0]), problem))
    for group in groups:
        if group[0] == "iptables" and group is not groups[-1]:
            beside.append(threading.Thread(target=firewall, args=(group,)))
            beside[-1].start()
        else:
            left.extend(take_back_lane(*group))
    for thread in beside:
        thread.join()
    return left


def take_back_lane(kind, where, group):
    """Run commands that remove things -> what could not be removed. A batch that fails is run one by one."""
    if kind == "ns":
        result = in_namespaces([where], lambda _: run_inside(group))[where]
        said = "" if isinstance(result, tuple) and result[0] == len(group) else str(result)
        return [] if not said or not os.path.exists(os.path.join(NETNS_DIR, where)) else [shown(group[0]) + ": " + said]
    links = [argv[3] for argv in group if argv[:3] == ("ip", "link", "del")]
    batch = together(links) + [argv for argv in group if argv[:3] != ("ip", "link", "del")] if links[1:] else group
    done, _ = run_lane(kind, batch) if kind != "file" else (0, "")
    if done == len(batch):
        return []
    left = []
    for argv in group:
        done, said = run_lane(kind, [argv])
        if done < 1 and not is_gone(argv, said):
            left.append("%s: %s" % (shown(argv), said.strip()))
    return left


def is_gone(argv, said):
    """Whether what a command was to remove is not there, by what was said. iptables-restore before 1.8.8 says only
    that some line failed, so its table is looked at."""
    if GONE.search(said) or argv[0] != "iptables":
        return bool(GONE.search(said))
    table, (verb, chain, *rule) = by_table(argv)
    try:
        chains, rules = parse_rules(saved_rules()).get(table, ((), ()))
    except Failure:
        return False
    own = [rule_key(words) for name, words in rules if name == chain]
    return {"-D": rule_key(rule) not in own, "-F": not own, "-X": chain not in dict(chains)}.get(verb, False)


def together(links):
    """Commands that remove many links at once: the kernel waits once per command, not once per link (measured:
    50 links 1.7 s one by one, 0.05 s as a group). The group's number is random, so nobody else's link is in it."""
    group = str(0x40000000 | int.from_bytes(os.urandom(4), "big") >> 2)
    return [("ip", "link", "set", link, "group", group) for link in links] + [("ip", "link", "del", "group", group)]


def say_error(text):
    """Print a line on stderr, whatever has become of it."""
    try:
        sys.stderr.write(spelled(text) + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        sys.stderr = open(os.devnull, "w")


# ------------------------------------------------------------------------------------------------ the store

_DEVICE = r"[A-Za-z0-9][A-Za-z0-9_.@:-]{0,14}"
_LABEL = r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}"
_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}"
_MAC = r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}"
_PORT = (1, 65535)
# What a record may hold: a pattern, ranges of numbers, a type, a text that a function does not refuse, a list of one
# kind, or keys (with "?" = may be absent).
RECORD_SHAPE = {
    "format": (1, 1), "name": _NAME, "cidr": bounds, "bridge": _DEVICE, "chain": r"[A-Za-z0-9_-]{1,28}",
    "chain_in": r"[A-Za-z0-9_-]{1,28}", "chain_src": r"[A-Za-z0-9_-]{1,28}", "table": (FIRST_TABLE, 1 << 31),
    "mac": _MAC, "iptables": r"[a-z_]{1,20}", "unlocked?": bool,
    "subnets": [{"name": _NAME, "cidr": bounds, "ns": _LABEL, "gw": address_number, "host_ip": address_number,
                 "veth": _DEVICE, "mac": _MAC, "policy": dict}],
    "host_iptables": [[str]],
    "apps": [{"subnet": _NAME, "ns": _LABEL, "port": _PORT, "pid": (0, 1 << 31), "cmd": [word], "start": word,
              "command?": [word], "protocol?": r"udp", "user?": APP_USERS, "log": str, "workdir?": folder,
              "env?": {"id": r"[0-9a-f]{16}", "names": [r"[A-Za-z_][A-Za-z0-9_]{0,79}"]}}],
    "peers": [{"peer_vpc": _NAME, "veth_a": _DEVICE, "veth_b": _DEVICE, "chain": r"[A-Za-z0-9_-]{1,28}",
               "allowed": [bounds], "side": r"[ab]"}],
    "nat?": {"interface": _DEVICE, "subnets?": [_NAME], "dns": [address_number]},
    "forward?": {"was": r"[01]", "kept_off": [_DEVICE], "kept_on?": [_DEVICE]},
    "published": [{"subnet": _NAME, "host_port": _PORT, "port": _PORT, "protocol": r"tcp|udp", "interface": _DEVICE}],
}


def check_shape(value, shape, place="the record"):
    """Raise ValueError if a record read from a file is not what vpcctl writes: what it says is data, not commands."""
    if isinstance(shape, str):
        if not isinstance(value, str) or not whole(shape)(value):
            raise ValueError("%s is %.60r" % (place, value))
    elif isinstance(shape, tuple):
        ranges = shape if isinstance(shape[0], tuple) else (shape,)
        if isinstance(value, bool) or not isinstance(value, int) or not any(
                first <= value <= last for first, last in ranges):
            raise ValueError("%s is %.60r" % (place, value))
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ValueError("%s is %.60r" % (place, value))
        if isinstance(shape[0], type) and all(isinstance(item, shape[0]) for item in value):
            return                                # thousands of words of rules
        for number, item in enumerate(value):
            check_shape(item, shape[0], "%s[%d]" % (place, number))
    elif isinstance(shape, dict):
        _check_keys(value, shape, place)
    elif not isinstance(value, shape if isinstance(shape, type) else str):
        raise ValueError("%s is %.60r" % (place, value))
    elif not isinstance(shape, type):
        try:
            shape(value)
        except Problem as problem:
            raise ValueError(f"{place}: {problem}") from None


def _check_keys(value, shape, place):
    if not isinstance(value, dict):
        raise ValueError("%s is %.60r" % (place, value))
    known = {key.rstrip("?"): key for key in shape}
    for key in value:
        if key not in known:
            raise ValueError("%s has an unknown key %.60r" % (place, key))
    for key, spelled in known.items():
        if value.get(key) is not None:
            check_shape(value[key], shape[spelled], "%s.%s" % (place, key))
        elif not spelled.endswith("?"):
            raise ValueError("%s lacks '%s'" % (place, key))


def check_record(record, name):
    """Raise ValueError unless `record` is a sound record of VPC `name`."""
    try:
        check_shape(record, RECORD_SHAPE)
        if record["name"] != name:
            raise ValueError("it says it is of '%s'" % record["name"])
        first, last = bounds(record["cidr"])
        for subnet in record["subnets"]:
            low, high = bounds(subnet["cidr"])
            if not first <= low <= high <= last:
                raise ValueError("subnet %s is outside of %s" % (subnet["name"], record["cidr"]))
            for key in ("gw", "host_ip"):
                if not low < address_number(subnet[key]) < high:
                    raise ValueError(f"subnet {subnet['name']}: {key} is not in {subnet['cidr']}: {subnet[key]}")
            check_policy(subnet["policy"], "subnet %s" % subnet["name"])
            policy_names(subnet, record)
    except Problem as problem:
        raise ValueError(str(problem)) from None
    known = {subnet["name"]: subnet["ns"] for subnet in record["subnets"]}
    used = [item["subnet"] for item in record["apps"] + record["published"]]
    strange = [name for name in used + ((record.get("nat") or {}).get("subnets") or []) if name not in known]
    if strange or len(known) != len(record["subnets"]):
        raise ValueError("it names subnet %s, which it does not hold" % (strange or "twice"))
    if (record.get("nat") or record["published"]) and not record.get("forward"):
        raise ValueError("it lacks 'forward', which goes with NAT and published ports")
    for app in record["apps"]:
        for key, wanted in (("ns", known[app["subnet"]]), ("log", app_log(app["ns"], app["port"]))):
            if app[key] != wanted:
                raise ValueError(f"the app on port {app['port']} of {app['subnet']}: {key} is '{app[key]}', not '{wanted}'")


def open_private(path, flags):
    """Open a file that is for root alone, and make it if it is missing -> descriptor."""
    handle = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    if os.fstat(handle).st_mode & 0o077:
        os.fchmod(handle, 0o600)
    return handle


def take(handle):
    """Lock an open file, if nobody has locked it -> whether that was so."""
    import fcntl
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def is_file(path, handle):
    """Whether a path is the file that is open."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


class Store:
    """The records: one JSON file per VPC, and while a change is under way the intended record beside it.

    vpc_<name>.json is what was last finished; vpc_<name>.intent is what a change that has begun will lead to (`null`:
    the VPC is to go). An intent that outlives its command was left by a kill, and is finished by the next one.
    """

    def __init__(self, folder):
        self.folder = folder
        self.patience = lock_patience()           # for how many seconds a change waits for another
        self._lock = None

    def path(self, name, kind="json"):
        """The file of a VPC's record."""
        return os.path.join(self.folder, "vpc_%s.%s" % (name, kind))

    def check_folder(self):
        """Problem if the folder is a link or open to others: what is in it decides what root does."""
        try:
            found = os.lstat(self.folder)
        except OSError:
            return
        if stat.S_ISLNK(found.st_mode):
            raise Problem("the data folder %s is a symbolic link" % self.folder, "name the real folder with --data-dir")
        if not stat.S_ISDIR(found.st_mode):
            raise Problem("the data folder %s is not a folder" % self.folder)
        if found.st_uid not in (0, os.geteuid()) and os.geteuid() == 0:
            raise Problem("the data folder %s belongs to user %d, not to root" % (self.folder, found.st_uid),
                          "if you trust what is in it: sudo chown -R root %s" % self.folder)
        if found.st_mode & 0o022:
            raise Problem("others may write in the data folder %s" % self.folder, "sudo chmod go-w %s" % self.folder)

    def prepare(self, title, heed):
        """Make the folder, take the lock, and see that it can be written before the kernel is touched."""
        self.check_folder()
        try:
            os.makedirs(self.folder, 0o755, exist_ok=True)
            self.lock(title, heed)
            self._sweep()
            probe = os.path.join(self.folder, "vpc_probe.new")
            handle = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
            try:
                if os.write(handle, b"\0" * PROBE_SIZE) < PROBE_SIZE:
                    raise OSError(28, os.strerror(28))
            finally:
                os.close(handle)
                os.unlink(probe)
        except OSError as error:
            raise Problem("cannot write in the data folder %s: %s" % (self.folder, error.strerror),
                          "free some space, or name another folder with --data-dir", 3) from None

    def _sweep(self):
        """Remove what a kill left between writing a file and putting it in place; close open logs."""
        for entry in os.listdir(self.folder):
            path = os.path.join(self.folder, entry)
            mode = os.lstat(path).st_mode
            if entry.startswith("vpc_") and entry.endswith(".new") and not stat.S_ISDIR(mode):
                os.unlink(path)
            if re.search(r"\.log(\.1)?\Z", entry) and stat.S_ISREG(mode) and mode & 0o077:
                os.chmod(path, 0o600)

    def lock(self, title, heed=lambda: None):
        """Let one change happen at a time; waits, says for whom, and gives up after a minute (VPCCTL_WAIT seconds).
        `heed` is called while waiting."""
        import time
        begun, warned = time.monotonic(), False
        while not self._try_lock():
            waited = time.monotonic() - begun
            if waited >= self.patience:
                raise Problem("another vpcctl is at work: " + self._holder,
                              "try again when it has finished", 3)
            if waited > 1 and not warned:
                warned = say_error("waiting for another vpcctl: %s" % self._holder) or True
            heed()
            time.sleep(0.02)
        os.set_inheritable(self._lock, True)      # see `call`
        try:
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, spelled(f"process {os.getpid()}, {title}").encode(), 0)
        except OSError:
            pass                                  # the disk is full: the name of the holder is a courtesy

    def _try_lock(self):
        """Take the lock, if nobody has it -> whether it was taken; else `_holder` says who has it."""
        path = os.path.join(self.folder, "lock")
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        taken, found = take(self._lock), os.fstat(self._lock)
        ours = found.st_uid == os.geteuid() and not found.st_mode & 0o077
        if taken and ours and is_file(path, self._lock):
            return True
        self._holder = os.pread(self._lock, 200, 0).decode("utf-8", "replace") or "an unknown process"
        replaced = not ours and (taken or not self._is_at_work()) and self._replace_lock(path)
        if not taken or ours:                     # else an older vpcctl that has it open waits for us
            os.close(self._lock)
        return replaced and self._try_lock()

    def _is_at_work(self):
        """Whether a process of root's has the lock, as the kernel says. (A lock that others could open may be
        held by anybody: an app did that, and no change was possible any more.)"""
        known, end = processes(), b":%d" % os.fstat(self._lock).st_ino
        rows = [row.split() for row in read_bytes("/proc/locks").splitlines()]
        holders = [int(row[-4]) for row in rows if b"FLOCK" in row and row[-3].endswith(end)]
        return any(pid in known and known[pid].user == os.geteuid() for pid in holders)

    def _replace_lock(self, path):
        """Put a new file that is root's alone in place of a lock that others could open: who has the new
        file's lock may, if the old one still stands there -> whether it was done."""
        new = os.open(path + ".new", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        free = take(new) and is_file(path + ".new", new) and is_file(path, self._lock)
        if free:
            os.rename(path + ".new", path)
        os.close(new)
        return free

    def names(self, kind="json"):
        """Names of the VPCs that have a file of this kind."""
        try:
            found = sorted(os.listdir(self.folder))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise Problem("cannot read the data folder %s: %s" % (self.folder, error.strerror), "use sudo", 4) from None
        return [entry[4:-len(kind) - 1] for entry in found
                if entry.startswith("vpc_") and entry.endswith("." + kind) and NAME.match(entry[4:-len(kind) - 1])]

    def _read(self, name, kind):
        handle = os.open(self.path(name, kind), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(handle, encoding="utf-8") as opened:
            if os.fstat(handle).st_mode & 0o022:
                raise ValueError("others may write in it: sudo chmod go-w")
            record = parse_json(opened.read())
        if kind == "intent":
            check_shape(record, {"last": _NAME, "becomes?": dict}, "the note")
            if not os.path.exists(self.path(record["last"], "intent")):
                raise ValueError("the change had not begun")
            record = record["becomes"]
        if record is not None:
            check_record(record, name)
        return record

    def load(self):
        """Read everything -> (finished records, intents, damaged: name -> what is wrong)."""
        self.check_folder()
        world, intents, damaged = {}, {}, {}
        for kind, into in (("json", world), ("intent", intents)):
            for name in self.names(kind):
                try:
                    into[name] = self._read(name, kind)
                except (OSError, ValueError, RecursionError) as error:
                    if kind == "json":
                        damaged[name] = "%s: %s" % (self.path(name), error)
        return world, intents, damaged

    def _put(self, path, text, durable, staged=False):
        scratch = path + ".new"
        try:
            handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
            with os.fdopen(handle, "w", encoding="utf-8") as opened:
                opened.write(text)
                opened.flush()
                if durable:
                    os.fsync(handle)
            if not staged:
                os.replace(scratch, path)
        except OSError as error:
            try:
                os.unlink(scratch)
            except OSError:
                pass                              # it was never made
            raise Problem("cannot save %s: %s" % (path, error.strerror),
                          "free some space; the record is as it was", 3) from None

    def save(self, records):
        """Write VPCs' finished records: temporary files, flushed to disk, and only when all are there put in place."""
        try:
            for record in records:
                record["host_iptables"] = recorded_rules(record)
                self._put(self.path(record["name"]), record_text(record), True, True)
        except Problem:
            for record in records:
                _unlink(self.path(record["name"]) + ".new")
            raise
        for record in records:
            path = self.path(record["name"])
            try:
                os.replace(path + ".new", path)
            except OSError as error:
                raise half_done(Problem("cannot save %s: %s" % (path, error.strerror), "`vpcctl restore` finishes it", 3))

    def intend(self, name, record, last):
        """Write what a change will lead to (None: the VPC goes). `last` is the VPC of the change whose intent is written
        and dropped last: while it is missing, the change has not begun. It means nothing after a power cut, when the
        kernel has forgotten everything, so it need not reach the disk."""
        self._put(self.path(name, "intent"), json.dumps({"last": last, "becomes": record}) + "\n", False)

    def drop(self, name, kind="json"):
        """Remove a VPC's file; absent is fine."""
        try:
            os.unlink(self.path(name, kind))
        except FileNotFoundError:
            return

    def log(self, command, outcome):
        """Append a change to vpcctl.log; at 1 MiB the older half of the story moves to vpcctl.log.1."""
        import time
        path = os.path.join(self.folder, "vpcctl.log")
        line = spelled(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {command} -> {outcome}") + "\n"
        try:
            if os.path.exists(path) and os.path.getsize(path) > LOG_LIMIT:
                os.replace(path, path + ".1")
            with os.fdopen(open_private(path, os.O_WRONLY | os.O_APPEND), "w", encoding="utf-8") as opened:
                opened.write(line)
        except OSError as error:
            say_error("note: cannot write %s: %s" % (path, error.strerror))


def record_text(record):
    """A record as JSON that people can read: a line for each subnet, app, rule. (Indented throughout, it would be
    written by Python's slow encoder.)"""
    # There may be hundreds of these, and no text of a user's in them: quicker than one by one.
    many = {"host_iptables": ("], [", "],\n  ["), "subnets": ("}}, {", "}},\n  {")}
    lines = ["%s: %s" % (json.dumps(key), json.dumps(value).replace(*many[key])) if key in many else
             "%s: [\n  %s\n ]" % (json.dumps(key), ",\n  ".join(json.dumps(item) for item in value))
             if isinstance(value, list) and value else "%s: %s" % (json.dumps(key), json.dumps(value))
             for key, value in record.items()]
    return "{\n %s\n}\n" % ",\n ".join(lines)


# -- names

def short_name(prefix, name, suffix, limit, taken):
    """A kernel name of at most `limit` characters: cut so that the suffix stays; if taken(name), a hash for a tail."""
    import zlib
    whole = prefix + name
    found = whole[:limit - len(suffix)]
    for salt in range(100):
        if not taken(found + suffix):
            return found
        tail = "%04x" % (zlib.crc32(("%s %d" % (whole, salt) if salt else whole).encode()) & 0xffff)
        found = (whole[:limit - len(suffix) - 4] if len(whole) > limit - len(suffix) - 5 else whole + "-") + tail
    raise Problem("no free name for %s" % whole)


def record_names(world):
    """Every kernel name that the records use."""
    names = set()
    for vpc in world.values():
        names.update((vpc["bridge"], vpc["chain"], vpc["chain_in"], vpc["chain_src"]))
        for subnet in vpc["subnets"]:
            names.update((subnet["ns"], subnet["veth"] + "-a", subnet["veth"] + "-b"))
        for peer in vpc["peers"]:
            names.update((peer["veth_a"], peer["veth_b"], peer["chain"]))
    return names


def host_interfaces():
    """Names of the network interfaces in the calling thread's namespace, without asking anyone."""
    with open("/proc/thread-self/net/dev", "rb") as table:
        return [os.fsdecode(line.split(b":")[0].strip()) for line in list(table)[2:]]


def iptables_kind():
    """Which of the two firewalls `iptables` speaks to here: nft or legacy. Problem 4 if it is not installed."""
    path = find_tool("iptables")
    if not path:
        raise missing_tool("iptables")
    real = os.path.basename(os.path.realpath(path))
    if "nft" in real or "legacy" in real:
        return "nft" if "nft" in real else "legacy"
    code, out, said = call(["iptables", "--version"])
    if code:
        raise Failure(("iptables", "--version"), said)
    return "nft" if "nf_tables" in out else "legacy"


# ------------------------------------------------------------------------------------------------ the command table

COMMANDS = {}


def arg(*flags, **options):
    """An argument of a command, as argparse takes it; `complete` says what the shell may offer for it."""
    return flags, options


def command(name, example, *arguments, **traits):
    """Register a handler. Its docstring is the help; `example` is parsed by flag-check; changes=True: needs root
    and the lock; hidden=True: not listed; `more`: what the help and the manual say beside."""
    def register(handler):
        COMMANDS[name] = {"handler": handler, "example": example.split(), "arguments": arguments,
                          "changes": traits.get("changes", False), "root": traits.get("root", False),
                          "hidden": traits.get("hidden", False), "more": traits.get("more", "").strip()}
        return handler
    return register


VPC = arg("vpc", type=name_type, metavar="VPC", help="name of the VPC", complete="vpc")
SUBNET = arg("subnet", type=name_type, metavar="SUBNET", help="name of the subnet", complete="subnet")


class Control:
    """What a command works with: the options, the records, the executor, and the way to change a VPC."""

    def __init__(self, options, executor=None, store=None, umask=UMASK):
        self.options = options
        self.umask = umask                        # the user's own, for programs that are the user's (exec, sandbox)
        self.dry_run = options.dry_run
        self.run = executor or Executor(options.dry_run, options.quiet, options.why)
        self.store = store or Store(data_folder(options.data_dir))
        self._loaded = None
        self.variables = {}                       # of apps that are to be started, by the number of their file

    def say(self, text):
        """Print a line of an answer; --quiet leaves out what only reports progress."""
        self.run.say(text)

    def show(self, text):
        """Print an answer of many lines."""
        for line in text.split("\n"):
            self.run.say(line)

    def report(self, text):
        """Print what a change came to, unless --quiet."""
        if not self.run.quiet and not self.dry_run:
            self.run.say(text)

    def note(self, text):
        """Print a note on stderr."""
        say_error("note: " + text)

    def _load(self):
        if self._loaded is None:
            self._loaded = self.store.load()
        return self._loaded

    @property
    def world(self):
        """The finished records: name -> record."""
        return self._load()[0]

    @property
    def intents(self):
        """What changes that were cut short were to lead to: name -> record, or None for a VPC that was to go."""
        return self._load()[1]

    @property
    def damaged(self):
        """Unreadable records: name -> what is wrong."""
        return self._load()[2]

    def vpc(self, name, world=None):
        """The record of a VPC. Problem (with the nearest name) if there is none."""
        world = self.world if world is None else world
        if name in world:
            return world[name]
        if name in self.damaged:
            raise Problem("the record of VPC %s is unreadable: %s" % (name, self.damaged[name]),
                          "`vpcctl delete --force %s` clears it away" % name)
        raise Problem("there is no VPC named '%s'" % name,
                      nearest(name, world) or "`vpcctl list` shows the VPCs; `vpcctl create %s --cidr …` makes it" % name)

    def subnet(self, vpc, name):
        """The record of a subnet. Problem (with the nearest name) if there is none."""
        for subnet in vpc["subnets"]:
            if subnet["name"] == name:
                return subnet
        names = [subnet["name"] for subnet in vpc["subnets"]]
        raise Problem("VPC %s has no subnet named '%s'" % (vpc["name"], name), nearest(name, names) or (
            "its subnets: " + ", ".join(names) if names else "`vpcctl add-subnet %s %s` makes it" % (vpc["name"], name)))

    def copy(self):
        """A world of its own to edit, for `change`."""
        return duplicate(self.world)

    def begin(self):
        """Before a change: folder, lock, signals. Not in a dry run."""
        if self.dry_run:
            return
        self.run.watch_signals()
        self.store.prepare(" ".join(typed())[:150], self.run.heed)
        self._loaded = None
        if os.path.lexists(RUN_DIR):
            close_folder(RUN_DIR, deep=True)
        for name in set(self.store.names("intent")) - set(self.intents):
            self.note("forgot a change of VPC %s that was cut short before it began" % name)
            self.store.drop(name, "intent")

    def begin_again(self):
        """Forget what was read: the records on disk have changed."""
        self._loaded = None

    def pretend(self, world):
        """For a dry run: go on as if these were the records."""
        self._loaded = (world, {}, {})

    def is_unsound(self, names):
        """Which of these VPCs are not as today's plans have them, as far as files can tell: an interrupted change
        or a restart has left them in pieces, or an earlier version has made them."""
        interfaces = host_interfaces()
        return [name for name in names if name in self.intents or (name in self.world and (
                    is_down(self.world[name], interfaces) or is_outdated(self.world[name])))]

    def change(self, new, before=None, after=None):
        """Make the machine and the records match the world `new`.

        `before` runs when the intents are written (stop programs); `after` when the kernel is ready (start them):
        what it raises takes everything back. Only VPCs whose record differs are looked at.
        """
        old = self.world
        touched = [name for name in sorted(set(old) | set(new)) if old.get(name) != new.get(name)]
        removes, makes = difference(old, new)
        if not self.dry_run:
            check_firewall_kind(new, touched)
            makes = [change._replace(undo=as_found(change.undo)) for change in makes]
        if self.dry_run:
            makes = [change._replace(undo=as_planned(change.undo)) for change in makes]
            if before:
                before()
            self.run.take_back(removes)
            self.run.make(in_order(makes), [])
            if after:
                after(new)
            return
        self.run.heed()
        self._write_intents(touched, new)
        ran = [(name, app) for name in touched if name in old for app in old[name]["apps"] if is_alive(app)]
        try:
            if before:
                before()
            self.run.transact(removes, makes, lambda: self._complete(touched, new, after))
        except (Problem, Failure, Interrupted, OSError) as trouble:
            if not getattr(trouble, "half_done", False):
                self._settle_back(touched, old, ran)
            raise

    def _write_intents(self, touched, new):
        written = []
        try:
            for name in touched:
                self.store.intend(name, new.get(name), touched[-1])
                written.append(name)
        except Problem:
            for name in reversed(written):
                self.store.drop(name, "intent")
            raise

    def _complete(self, touched, new, after):
        """When the kernel is ready: start programs, then write the records. If that fails, no new program is left."""
        note_lost(self, new)
        try:
            if after:
                after(new)
            self.finish(touched, new)
        except (Problem, Interrupted, OSError):
            known = [app for vpc in self.world.values() for app in vpc["apps"]]
            stop_programs(self, [app for vpc in new.values() for app in vpc["apps"] if app not in known])
            tidy_apps(self, touched, self.world, keep_logs=True)
            raise

    def finish(self, touched, new):
        """The change has happened: records first, so that a full disk is noticed while it can be taken back."""
        self.store.save([new[name] for name in sorted(touched) if name in new])
        try:
            tidy_apps(self, touched, new)
            for name in sorted(touched):
                if name not in new:
                    remove_tree("%s/%s" % (RUN_DIR, name))
                    self.store.drop(name)
                self.store.drop(name, "intent")
        except OSError as error:
            raise half_done(Problem("cannot remove %s: %s" % (error.filename, error.strerror),
                                    "`vpcctl restore` finishes it", 3))
        self._loaded = (new, {}, self.damaged)

    def _settle_back(self, touched, old, ran):
        """After a failure that was taken back: no intent is left; what `ran` before runs again, nothing else."""
        for name in reversed(touched):
            self.store.drop(name, "intent")
        try:
            with self.run.patience():
                if revive_apps(self, ran):
                    self.store.save([old[name] for name in touched if name in old])
        except (Problem, Failure, OSError) as trouble:
            self.note("%s; `vpcctl restore` starts it again" % trouble)


def as_found(step, blindly=False):
    """A policy's step that is to be replaced, with the rules that are really there (somebody may have changed them).
    `blindly`: as it was planned, if nobody can tell."""
    if step is None or step.key[0] != "policy":
        return step
    try:
        return seen_policy(step.key[1], in_namespace(step.key[1], seen_rules))
    except (Failure, OSError):
        if blindly:
            return step
        raise


def as_planned(step):
    """The same for a dry run, which asks nobody: as if nobody had changed the rules."""
    if step is None or step.key[0] != "policy":
        return step
    return seen_policy(step.key[1], [(rule[6:], True) for rule in step.do])


def check_firewall_kind(world, names):
    """Problem if a VPC's rules were made with the other of the two iptables: each sees only its own rules."""
    kinds = {world[name]["iptables"] for name in names if name in world}
    here = iptables_kind() if kinds else ""
    if kinds and kinds != {here}:
        raise Problem("the VPCs' rules were made with iptables (%s), but this is iptables (%s)" % (
            ", ".join(sorted(kinds)), here), "switch back, for example: sudo update-alternatives --config iptables", 4)


def duplicate(data):
    """A copy of plain data, down to the last list (marshal is the fastest that the standard library has)."""
    import marshal
    return marshal.loads(marshal.dumps(data))


def nearest(name, names):
    """A hint with the name that was probably meant, or an empty string."""
    import difflib
    close = difflib.get_close_matches(name, list(names), 1, 0.6)
    return "did you mean '%s'?" % close[0] if close else ""


def lock_patience():
    """How many seconds VPCCTL_WAIT says, or LOCK_WAIT. Problem if it is no number."""
    text = os.environ.get("VPCCTL_WAIT") or str(LOCK_WAIT)
    if not whole(r"(?:0|[1-9][0-9]{0,5})(?:\.[0-9]{1,6})?")(text):
        raise Problem(f"VPCCTL_WAIT is {told(text)}", "a number of seconds, like 60 or 0.5")
    return float(text)


def data_folder(chosen):
    """The data folder: --data-dir, VPCCTL_DATA, or .vpcctl_data beside the real script."""
    chosen = chosen or word(os.environ.get("VPCCTL_DATA") or "")
    return os.path.abspath(chosen or os.path.join(os.path.dirname(os.path.realpath(__file__)), ".vpcctl_data"))


# -- from records to steps

def resources(world, compared=None):
    """Every resource of a world: key -> (what it is made from, a function that plans it).

    Resources made from equal data are equal, so that only those that differ are planned: adding the 200th subnet
    plans one subnet. Subnets that are the same in the world `compared` are left out.
    """
    found = {}
    ways = {}
    for name, vpc in world.items():
        base = vpc_base(vpc)
        found["vpc", name] = base, (plan_vpc, (vpc,))
        for subnet in changed_subnets(vpc, (compared or {}).get(name)):
            key = subnet["name"]
            wire = {field: subnet[field] for field in ("cidr", "ns", "gw", "host_ip", "veth", "mac")}
            found["subnet", name, key] = (base, wire), (plan_subnet, (vpc, subnet))
            found["policy", name, key] = ((base, wire, subnet["policy"], policy_names(subnet, vpc)),
                                          (plan_policy, (vpc, subnet)))
        if vpc.get("nat"):
            found["nat", name] = (base, vpc["nat"], nat_sources(vpc)), (plan_nat, (vpc,))
            ways.setdefault("forwarding", []).append(vpc)
        for published in vpc["published"]:
            found["published", name, published["protocol"], published["host_port"]] = (
                (base, published), (plan_published, (vpc, published)))
            ways.setdefault("forwarding", []).append(vpc)
        for peer in vpc["peers"]:
            other = world.get(peer["peer_vpc"])
            if other and peer["side"] == "a":
                found["peer", name, peer["peer_vpc"]] = (
                    (base, vpc_base(other), peer), (plan_peering, (vpc, other, peer)))
        found["names", name] = (name_data(world, vpc), render_resolv(vpc)), (plan_names, (world, vpc))
    if world:
        found["unrouted", ""] = UNROUTED, (plan_unrouted, ())
    if ways:
        found["forwarding", ""] = forwarding_data(world, ways["forwarding"]), (plan_forwarding, (world, ways["forwarding"]))
    return {key: found[key] for key in sorted(found, key=lambda key: RANK.index(key[0]))}


# A resource comes after those it stands on: a peering's rules go into chains of both VPCs.
RANK = ("unrouted", "vpc", "subnet", "policy", "forwarding", "nat", "published", "peer", "names")


def changed_subnets(vpc, other):
    """A VPC's subnets, without those that are the same in another version of it. (What a policy makes of the names in
    it depends on the siblings.)"""
    if not other or vpc_base(vpc) != vpc_base(other):
        return vpc["subnets"]
    known = {subnet["name"]: subnet for subnet in other["subnets"] if subnet["policy"] == DEFAULT_POLICY}
    return [subnet for subnet in vpc["subnets"] if known.get(subnet["name"]) != subnet]


def vpc_base(vpc):
    """The fields of a VPC on which everything in it depends."""
    return [vpc[field] for field in ("cidr", "bridge", "chain", "chain_in", "chain_src", "table", "mac")]


def plan(world, names=None):
    """Every step of a world, or of what belongs to some VPCs of it: fact -> step."""
    steps = {}
    for key, (_, (function, arguments)) in resources(world).items():
        far = key[0] == "peer" and key[2]
        if names is not None and key[1] and key[1] not in names and far not in names:
            continue                              # what is of no VPC is of all
        for step in function(*arguments):
            steps.setdefault(step.fact, step)
    return steps


# What can be changed where it is; anything else that differs is taken back and made anew.
IN_PLACE = ("policy", "forwarding", "nat", "names")


def difference(old, new):
    """What leads from one world to another -> (steps to take back, changes to make)."""
    before, after = resources(old, new), resources(new, old)
    gone, come, anew = {}, {}, set()
    for key in before:
        if key not in after or before[key][0] != after[key][0]:
            steps = [(step.fact, step) for step in before[key][1][0](*before[key][1][1])]
            gone.update(steps)
            if key in after and key[0] not in IN_PLACE:
                anew.update(fact for fact, _ in steps)
    for key in after:
        if key not in before or before[key][0] != after[key][0]:
            come.update((step.fact, step) for step in after[key][1][0](*after[key][1][1]))
    # Rules that are replaced in place; not those of a namespace that is made anew.
    by_key = {step.key: step for step in gone.values() if step.key != step.fact and step.holder not in anew}
    makes = [Change(by_key.get(step.key), step, None)
             for fact, step in come.items()
             if fact not in gone or fact in anew or step.holder in anew]
    swapped = {change.undo.key for change in makes if change.undo}
    removes = [step for fact, step in gone.items()
               if (fact not in come or fact in anew or step.holder in anew) and step.key not in swapped]
    return removes, makes


def compare(steps, seen):
    """What is wrong with the things of these steps (fact -> step), as far as it was looked at -> a Change for each.

    Something that is there, but not as it should be, is replaced.
    """
    found = [(step, seen.wrong(step)) for step in steps.values()]
    return [Change(seen.replaced(step), step, wrong)
            for step, wrong in found
            if wrong and wrong.kind != "unseen"]


def mending(steps, stale, seen):
    """What brings the kernel to `steps`, from what was seen in it -> (steps to take back, changes to make).

    `stale` are steps that are no longer wanted.
    """
    makes = compare(steps, seen)
    foreign = [change.make for change in makes if change.because.kind == "not ours"]
    if foreign:
        names = " and ".join(named(step.fact) for step in foreign)
        raise Problem(f"{names} exists already and is not vpcctl's",
                      "remove or rename it; vpcctl does not touch what it did not make", 3)
    wanted = {step.key for step in steps.values()}         # the same thing with another content is replaced below
    removes = [step for step in stale.values() if step.key not in wanted and seen.can_undo(step)]
    if any(change.make.fact == ("sysctl", "net.ipv4.ip_forward", "1") for change in makes):
        # Writing it sets the switch of every interface: those that are to stay off have to be written after it.
        made = {change.make.fact for change in makes}
        makes += [Change(None, step, None) for fact, step in steps.items()
                  if step.phase == PLUG and fact[0] == "sysctl" and fact not in made]
    return removes, makes


# ------------------------------------------------------------------------------------------------ what there is to make
# Pure functions from records to steps. Read a plan aloud and you have explained the feature.

def plan_vpc(vpc):
    """A VPC: its switch, its routing table, its firewall chains."""
    return plan_switch(vpc) + plan_chains(vpc)


def plan_switch(vpc):
    """A VPC's bridge, and the routing that everything which comes in by it obeys."""
    name, bridge, cidr, table = vpc["name"], vpc["bridge"], vpc["cidr"], vpc["table"]
    link = ("link", bridge)
    gateway = "%s/%s" % (first_address(cidr), cidr.split("/")[1])
    conf = lambda family, switch, value, why: sysctl_step(link_conf(family, bridge, switch), value, why, holder=link)
    return [
        Step(LINK, link, "ip link add %s type bridge" % bridge, "ip link del " + bridge, "the VPC's switch"),
        Step(LINK, ("alias", bridge, ALIAS + name), "ip link set %s alias %s" % (bridge, ALIAS + name), (),
             "marks it as ours", link),
        Step(LINK, ("mac", bridge, vpc["mac"]), "ip link set %s address %s" % (bridge, vpc["mac"]), (),
             "an address that stays when ports come and go", link),
        conf("ipv6", "disable_ipv6", "1", "the rules speak IPv4 only"),
        Step(WIRE, ("address", bridge, gateway), "ip addr add %s dev %s" % (gateway, bridge), (),
             "the VPC's gateway", link),
        Step(WIRE, ("up", bridge), "ip link set %s up" % bridge, (), "switch it on", link),
        conf("ipv4", "forwarding", "1", "the host routes for this switch, and for no other interface"),
        conf("ipv4", "rp_filter", "1", "no sender with an address from elsewhere"),
        conf("ipv4", "arp_ignore", "1", "answer only for addresses of this switch"),
        # The kernel sends them if either switch says so. Where they come, isolated ports make them moot.
        conf("ipv4", "send_redirects", "0", "no redirects, unless the host's switch for all sends them"),
        route_step(cidr, bridge, table, "the VPC's own range, in its own routing table", link),
        fence_step(cidr, "no way here for other VPCs"),
        lookup_step(PREF_OWN, bridge, "lookup %d" % table, "what comes from this VPC asks this VPC's table"),
        lookup_step(PREF_FENCE, bridge, "lookup " + FENCE_TABLE, "other VPCs stay out of reach", "from " + cidr),
        lookup_step(PREF_END, bridge, "unreachable", "and where no table knows a way, there is none", "from " + cidr),
        # The ICMP error would go to the address that was forged, with what the forger wrote.
        lookup_step(PREF_VOID, bridge, "blackhole", "a forged sender gets no answer"),
        lookup_step(PREF_IN, "lo", "lookup main", "the host itself may go to the VPC", "to " + cidr),
        # Without it, another program's rules put before ours in FORWARD (Docker's) would let its networks in.
        lookup_step(PREF_SHUT, "", "blackhole", "no other network of the host may", "to " + cidr),
        flows_step("-s " + cidr), flows_step("-r " + cidr),
    ]


def plan_chains(vpc):
    """A VPC's firewall chains: who may send, what may pass, what may be asked of the host."""
    bridge, cidr, mark = vpc["bridge"], vpc["cidr"], ALIAS + vpc["name"]
    chain, guard, sources = vpc["chain"], vpc["chain_in"], vpc["chain_src"]
    held = {chosen: ("chain", "filter", chosen) for chosen in (chain, guard, sources)}
    return [
        # Before routing: "time exceeded" is sent, to the forged address, before FORWARD is asked.
        rule_step("PREROUTING", ("!", "-s", cidr, "-i", bridge, "-j", "DROP"), "no sender with an address from elsewhere",
                  "raw", "prepend", mark),
        chain_step(sources, "who may send: each subnet's addresses from its own port"),
        rule_step(sources, ("-j", "DROP"), "any other sender is forged", place="last", mark=mark, holder=held[sources]),
        chain_step(chain, "what may pass through the VPC"),
        rule_step(chain, ("-j", "DROP"), "everything else in or out of the VPC", place="last", mark=mark,
                  holder=held[chain]),
        rule_step(chain, ("-i", bridge, "-j", sources), "senders are who they say they are", place="first", mark=mark,
                  holder=held[chain]),
        rule_step(chain, ("-s", cidr, "-d", cidr, "-i", bridge, "-o", bridge, "-j", "ACCEPT"),
                  "subnets of one VPC may talk", mark=mark, holder=held[chain]),
        chain_step(guard, "what the VPC may ask of the host itself"),
        rule_step(guard, ("-j", "DROP"), "nothing else", place="last", mark=mark, holder=held[guard]),
        rule_step(guard, ("-j", sources), "senders are who they say they are", place="first", mark=mark,
                  holder=held[guard]),
        # An ICMP error counts as a reply of the connection that it quotes: not of one with somebody else.
        rule_step(guard, REPLIES + ("--ctorigdst", cidr, "-j", "ACCEPT"),
                  "answers to what the host opened to the VPC", mark=mark, holder=held[guard]),
        rule_step(guard, ("-s", cidr, "-d", cidr, "-p", "icmp", "--icmp-type", "8", "-j", "ACCEPT"),
                  "a gateway answers ping", mark=mark, holder=held[guard]),
        jump_step("FORWARD", ("-o", bridge, "-j", chain), "what goes to the VPC", mark),
        jump_step("FORWARD", ("-i", bridge, "-j", chain), "what comes from the VPC", mark),
        jump_step("INPUT", ("-i", bridge, "-j", guard), "what the VPC sends to the host", mark),
    ]


# Replies only: the direction that opened a connection is judged by today's rules, so taking a permission ends it.
REPLIES = ("-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED", "--ctdir", "REPLY")
ANSWERS = ("-m", "conntrack", "--ctstate", "ESTABLISHED", "--ctdir", "REPLY")
# Errors about a connection ("packet too big") come from either side.
ERRORS = ("-p", "icmp", "-m", "conntrack", "--ctstate", "RELATED")


def jump_step(builtin, rule, why, mark):
    """A jump from a built-in chain, before everybody else's rules: isolation must not lean on their policies."""
    step = rule_step(builtin, rule, why, place="prepend", mark=mark)
    step.fact = step.key = step.fact[:4] + ("first",)
    return step


def route_step(block, device, table, why, holder):
    """A route in a VPC's own table. It goes with the device it points to."""
    return Step(ROUTE, ("route", str(table), block, device),
                "ip route add %s dev %s table %s proto %s" % (block, device, table, PROTOCOL),
                "ip route del %s dev %s table %s proto %s" % (block, device, table, PROTOCOL), why, holder)


def fence_step(block, why):
    """A block that no VPC with NAT reaches by the host's own routes."""
    words = f"unreachable {block} table {FENCE_TABLE} proto {PROTOCOL}"
    fact = ("route", FENCE_TABLE, block, "unreachable")
    return Step(ROUTE, fact, "ip route add " + words, "ip route del " + words, why)


def plan_unrouted():
    """What no VPC reaches outside, whatever the host's default route is."""
    return [fence_step(block, "no address of a network out there") for block in UNROUTED]


def lookup_step(pref, device, action, why, selector=""):
    """A routing rule for what comes in by a device ("" is any; "lo" is what the host sends itself)."""
    words = "pref %s %s%s%s protocol %s" % (pref, device and "iif %s " % device, selector and selector + " ", action,
                                           PROTOCOL)
    return Step(ROUTE, ("lookup", pref, device, selector, action), "ip rule add " + words, "ip rule del " + words, why)


def plan_subnet(vpc, subnet):
    """A subnet: its namespace, its cable to the switch, its addresses, what its programs see in /etc."""
    space, port = subnet["ns"], subnet["veth"] + "-b"
    return plan_cable(vpc, subnet) + plan_gateway(vpc, subnet) + plan_inside(vpc, subnet) + [
        source_rule(vpc, subnet),
        Step(PLUG, ("up", port), "ip link set %s up" % port, (), "switch the cable on, now that all rules stand",
             ("link", port)),
        Step(FILE, ("folder", etc_folder(space)), "mkdir -p " + etc_folder(space), "rmdir " + etc_folder(space),
             "what programs in the subnet see in /etc"),
        link_step(space, "hosts", vpc["name"], "names of siblings and peers"),
        link_step(space, "resolv.conf", vpc["name"], "which name server to ask"),
        flows_step("-s " + subnet["cidr"], ("link", vpc["bridge"])),
        flows_step("-r " + subnet["cidr"], ("link", vpc["bridge"])),
    ]


def plan_cable(vpc, subnet):
    """A subnet's namespace, and the cable from it to the switch."""
    bridge, space, mark = vpc["bridge"], subnet["ns"], ALIAS + vpc["name"]
    inner_end, port = subnet["veth"] + "-a", subnet["veth"] + "-b"
    held, cable = ("ns", space), ("link", port)
    steps = [
        Step(SPACE, held, "ip netns add " + space, "ip netns del " + space, "a network stack of its own"),
        Step(SPACE, ("ours", space), "ip netns set %s %d" % (space, space_mark(space)), (), "marks it as ours", held),
        Step(LINK, cable, "ip link add %s address %s netns %s type veth peer name %s"
             % (inner_end, subnet["mac"], space, port), "ip link del " + port, "a cable from the subnet to the switch"),
        Step(LINK, ("alias", port, mark), "ip link set %s alias %s" % (port, mark), (), "marks it as ours", cable),
        sysctl_step(link_conf("ipv6", port, "disable_ipv6"), "1", "the rules speak IPv4 only", holder=cable),
        Step(WIRE, ("master", port, bridge), "ip link set %s master %s" % (port, bridge), (), "plug it in", cable),
    ] + port_steps(port, cable, "siblings are reached through the gateway only")
    if not vpc.get("unlocked"):
        steps.append(Step(WIRE, ("port", port, "locked", True), "ip link set %s type bridge_slave locked on" % port, (),
                          "only the subnet's own hardware address may send", cable, None,
                          "a workload can use a sibling's hardware address (needs Linux 5.18)"))
    return steps + [Step(ENTRY, ("fdb", port, subnet["mac"]), "bridge fdb replace %s dev %s master static"
                         % (subnet["mac"], port), (), "where that hardware address is", cable)]


def plan_gateway(vpc, subnet):
    """A subnet's gateway, on the switch, and where the host finds the subnet."""
    bridge, own = vpc["bridge"], ("link", vpc["bridge"])
    gateway = "%s/%s" % (subnet["gw"], subnet["cidr"].split("/")[1])
    neighbour = Step(NEIGHBOUR, ("neighbour", bridge, subnet["host_ip"], subnet["mac"]),
                     "ip neigh replace %s lladdr %s dev %s nud permanent" % (subnet["host_ip"], subnet["mac"], bridge),
                     "ip neigh del %s dev %s" % (subnet["host_ip"], bridge), "no forged ARP answer counts", own)
    if gateway == "%s/%s" % (first_address(vpc["cidr"]), vpc["cidr"].split("/")[1]):
        return [neighbour]                        # one subnet fills the VPC: the gateway is the VPC's own
    return [Step(WIRE, ("address", bridge, gateway), "ip addr add %s dev %s" % (gateway, bridge),
                 "ip addr del %s dev %s" % (gateway, bridge), "the subnet's gateway", own), neighbour]


def plan_inside(vpc, subnet):
    """What is set inside of a subnet's namespace."""
    space, inner_end, held = subnet["ns"], subnet["veth"] + "-a", ("ns", subnet["ns"])
    address = "%s/%s" % (subnet["host_ip"], subnet["cidr"].split("/")[1])
    step = lambda fact, words, why: Step(INSIDE, ("inside", space) + fact, words, (), why, held)
    return [step(("sysctl", key, value), "ip netns exec %s sysctl -w %s=%s" % (space, key, value), why)
            for key, value, why in NS_SYSCTLS] + [
        step(("up", "lo"), "ip -n %s link set lo up" % space, "127.0.0.1"),
        step(("address", inner_end, address), "ip -n %s addr add %s dev %s" % (space, address, inner_end),
             "the subnet's address"),
        step(("up", inner_end), "ip -n %s link set %s up" % (space, inner_end), "switch it on"),
        step(("route", "default", subnet["gw"]), "ip -n %s route add default via %s" % (space, subnet["gw"]),
             "everything else through the gateway"),
        # Asked for while the bridge was down, it would be unknown for seconds after that, and the first packets lost.
        step(("neighbour", inner_end, subnet["gw"], vpc["mac"]),
             "ip -n %s neigh replace %s lladdr %s dev %s nud permanent" % (space, subnet["gw"], vpc["mac"], inner_end),
             "where the gateway is, without asking"),
    ]


def source_words(subnet):
    """The rule that knows a subnet's packets by address and hardware address."""
    return "-s", subnet["cidr"], "-m", "mac", "--mac-source", subnet["mac"], "-j", "RETURN"


def source_rule(vpc, subnet):
    """The rule by which a subnet's addresses are believed: they must come with its hardware address."""
    return rule_step(vpc["chain_src"], source_words(subnet), "these addresses come from this subnet", place="prepend", mark=ALIAS + vpc["name"],
                     holder=("chain", "filter", vpc["chain_src"]))


def port_steps(port, cable, why):
    """How every port of our bridges is set: isolated, so that frames go to the gateway only (or the kernel sends
    redirects and siblings talk around the firewall), deaf to unknown hardware addresses, and learning none."""
    return [Step(WIRE, ("port", port, "isolated", True),
                 "ip link set %s type bridge_slave isolated on learning off flood off mcast_flood off" % port, (), why, cable)]


def link_step(space, name, vpc_name, why):
    """A file of a namespace's /etc, shared by the VPC: it is mounted over the real one by `ip netns exec`."""
    path, target = "%s/%s" % (etc_folder(space), name), "%s/%s/%s" % (RUN_DIR, vpc_name, name)
    return Step(FILE, ("symlink", path, target), "ln -s %s %s" % (target, path), "rm -f " + path, why)


def etc_folder(space):
    """Where `ip netns exec` looks for files to show in place of /etc's."""
    return "%s/%s" % (ETC_NETNS, space)


def space_mark(space, salt=None):
    """The id by which a namespace of ours is known: half a hash of its name, half random. It is kept by the kernel on
    the host's side, so nobody inside can take it off, and one that is just dying does not stand in the way."""
    import zlib
    salt = int.from_bytes(os.urandom(2), "big") & MARK_SALT if salt is None else salt
    return 0x40000000 | (zlib.crc32(space.encode()) & 0x3ffff) << MARK_BITS | salt


def is_marked(space, number):
    """Whether a namespace's id says that it is ours."""
    return isinstance(number, int) and number | MARK_SALT == space_mark(space, MARK_SALT)


# -- NAT and published ports

def nat_sources(vpc):
    """The blocks that may go out: the whole VPC, or the chosen subnets."""
    chosen = vpc["nat"].get("subnets")
    return [vpc["cidr"]] if chosen is None else [s["cidr"] for s in vpc["subnets"] if s["name"] in chosen]


def plan_nat(vpc):
    """NAT: masqueraded sources go out by the uplink, their replies come back, and nothing else."""
    bridge, uplink, chain, name = vpc["bridge"], vpc["nat"]["interface"], vpc["chain"], vpc["name"]
    held, mark = ("chain", "filter", chain), "vpcctl:" + name
    steps = []
    for block in nat_sources(vpc):
        steps += [
            lookup_step(PREF_OUT, bridge, "lookup main", "where the host's own packets go", "from " + block),
            rule_step("POSTROUTING", ("-s", block, "-o", uplink, "-j", "MASQUERADE"), "leave with the host's address",
                      "nat", "append", "vpcctl-nat-" + name),
            # SNAT: already masqueraded. What conntrack calls INVALID is never, and would leave with its own address.
            # An ICMP error counts as of the connection that it quotes: it must be one of these sources.
            rule_step(chain, ("-s", block, "-i", bridge, "-o", uplink, "-m", "conntrack", "--ctstate", "NEW,SNAT",
                              "--ctorigsrc", block, "-j", "ACCEPT"),
                      "out to the internet", mark=mark, holder=held),
            rule_step(chain, ("-d", block, "-i", uplink, "-o", bridge) + REPLIES + ("-j", "ACCEPT"),
                      "and the answers back", mark=mark, holder=held),
            flows_step("-s %s -n" % block),
        ]
    # The fence has them, too; here they are asked for whatever the order of the rules in FORWARD.
    return steps + [rule_step("FORWARD", ("-d", block, "-i", bridge, "-j", "DROP"),
                              "no address of a network out there", "mangle", "append", mark)
                    for block in UNROUTED]


def file_step(vpc_name, file, text, why):
    """A file that the subnets of a VPC share."""
    path = "%s/%s/%s" % (RUN_DIR, vpc_name, file)
    return Step(FILE, ("file", path, text), (("tee", path, text),), (("rm", "-f", path),), why, None, ("file", path))


def forwarding_data(world, vpcs):
    """On what the host's own part in NAT depends: the uplinks of each range, all ranges, and how the host was before."""
    ways = {(vpc["cidr"], vpc["nat"]["interface"]) for vpc in vpcs if vpc.get("nat")}
    ways |= {(vpc["cidr"], published["interface"]) for vpc in vpcs for published in vpc["published"]}
    return sorted(ways), sorted((vpc["name"], vpc["cidr"]) for vpc in world.values()), vpcs[0]["forward"]


def plan_forwarding(world, vpcs):
    """The host as a router: on for as long as some VPC has NAT. If it was off before, then only for our packets."""
    ways, ranges, forward = forwarding_data(world, vpcs)
    uplinks = sorted({uplink for _, uplink in ways})
    steps = [lookup_step(PREF_IN, uplink, "lookup main", "answers, and what was published", "to " + cidr)
             for cidr, uplink in ways]
    steps += [rule_step("PREROUTING", ("-s", cidr, "-i", uplink, "-j", "DROP"), "a VPC's address from outside is forged",
                        "raw", "prepend", ALIAS + name) for uplink in uplinks for name, cidr in ranges]
    if forward["was"] != "0":
        return steps + [forward_step("net.ipv4.ip_forward", "1", "the host passes packets on")]
    # Writing 0 clears the switch of every interface, so those of our bridges and those that were on are set again.
    back = [("sysctl", "-w", "net.ipv4.ip_forward=0")] + [
        ("sysctl", "-w", link_conf("ipv4", device, "forwarding") + "=1")
        for device in [vpc["bridge"] for vpc in world.values()] + forward.get("kept_on", [])]
    steps.append(forward_step("net.ipv4.ip_forward", "1", "the host passes packets on", back))
    for device in forward["kept_off"]:
        key, absent = link_conf("ipv4", device, "forwarding"), "the interface is not there"
        steps.append(forward_step(key, "1", "the way out", [("sysctl", "-w", key + "=0")], absent) if device in uplinks
                     else forward_step(key, "0", "as before: only the uplink passes packets on", (), absent))
    return steps + plan_guard(uplinks) + plan_rest(forward, uplinks)


def plan_guard(uplinks):
    """Before everybody's rules in FORWARD: strangers do not enter by an uplink."""
    held = ("chain", "filter", GUARD)
    steps = [chain_step(GUARD, "the host was no router before: strangers do not get through it")]
    for uplink in uplinks:
        steps += [
            # Translated, not RELATED: an ICMP error about a connection of the host's own would pass as that.
            rule_step(GUARD, ("-i", uplink, "-m", "conntrack", "--ctstate", "ESTABLISHED,SNAT,DNAT",
                              "-j", "RETURN"),
                      "answers, and what was published", place="prepend", holder=held),
            rule_step(GUARD, ("-i", uplink, "-j", "DROP"), "nothing else enters by the uplink", place="append",
                      holder=held)]
    return steps + [jump_step("FORWARD", ("-j", GUARD), "the host was no router before", "vpcctl")]


def plan_rest(forward, uplinks):
    """Behind everybody's rules in FORWARD: what none of them has accepted is dropped, so that an interface that
    comes later passes packets on only where its own program says so."""
    held = ("chain", "filter", REST)
    before = [("-i", device) for device in forward.get("kept_on", ())]
    # With br_netfilter, frames that only cross a bridge are asked here, too.
    before += [("-i", device, "-o", device) for device in forward["kept_off"]]
    steps = [chain_step(REST, "what no rule has accepted"),
             rule_step(REST, ("-j", "DROP"), "the host was no router before", place="last", holder=held)]
    steps += [rule_step(REST, words + ("-j", "RETURN"), "as before", place="prepend", holder=held)
              for words in before
              if words[1] not in uplinks and words[1] != "lo"]
    return steps + [rule_step("FORWARD", ("-j", REST), "what no rule has accepted", place="last")]


def forward_step(key, value, why, undo=(), optional=""):
    """A switch of the host's forwarding: on when all rules stand, off before they go: nothing slips between."""
    return sysctl_step(key, value, why, undo, optional, PLUG)


def plan_published(vpc, published):
    """A published port: from outside to this port of this subnet, the answers back, and nothing else."""
    subnet = next(s for s in vpc["subnets"] if s["name"] == published["subnet"])
    bridge, uplink, chain = vpc["bridge"], published["interface"], vpc["chain"]
    protocol, address, port = published["protocol"], subnet["host_ip"], str(published["port"])
    held, mark = ("chain", "filter", chain), "vpcctl:" + vpc["name"]
    steps = [
        rule_step("PREROUTING", ("-i", uplink, "-p", protocol, "--dport", str(published["host_port"]), "-m", "addrtype",
                                 "--dst-type", "LOCAL", "-j", "DNAT", "--to-destination", "%s:%s" % (address, port)),
                  "this port of the host is the subnet's", "nat", "append", "vpcctl-publish-" + vpc["name"]),
        rule_step(chain, ("-d", address, "-i", uplink, "-o", bridge, "-p", protocol, "--dport", port, "-m", "conntrack",
                          "--ctstate", "DNAT", "--ctorigdstport", str(published["host_port"]), "-j", "ACCEPT"),
                  "in by the published port", mark=mark, holder=held),
        rule_step(chain, ("-s", address, "-i", bridge, "-o", uplink, "-p", protocol, "--sport", port) + REPLIES
                  + ("-j", "ACCEPT"), "and the answers back", mark=mark, holder=held)]
    return steps + [lookup_step(PREF_OUT, bridge, "lookup main", "the answers' way out",
                                "from %s ipproto %s sport %s" % (address, protocol, port)),
                    flows_step("-r %s/32 -p %s --dport %d" % (address, protocol, published["host_port"]))]


# -- peering

def sides(a, b, allowed):
    """The allowed blocks by VPC -> (blocks of a, blocks of b)."""
    own, other = as_network(a["cidr"]), as_network(b["cidr"])
    return ([block for block in allowed if inside(as_network(block), own)],
            [block for block in allowed if inside(as_network(block), other)])


def plan_peering(a, b, peer):
    """A peering: a cable between the switches, and the routed way that packets take."""
    ends, chain = (peer["veth_a"], peer["veth_b"]), peer["chain"]
    cable, held = ("link", ends[0]), ("chain", "filter", peer["chain"])
    of_a, of_b = sides(a, b, peer["allowed"])
    steps = [Step(LINK, cable, "ip link add %s type veth peer name %s" % ends, "ip link del " + ends[0],
                  "a cable between the two switches"), chain_step(chain, "what may pass between the two VPCs")]
    for end, vpc in zip(ends, (a, b)):
        steps += [Step(LINK, ("alias", end, ALIAS + vpc["name"]), "ip link set %s alias %s" % (end, ALIAS + vpc["name"]), (),
                       "marks it as ours", cable),
                  sysctl_step(link_conf("ipv6", end, "disable_ipv6"), "1", "the rules speak IPv4 only", holder=cable),
                  Step(WIRE, ("master", end, vpc["bridge"]), "ip link set %s master %s" % (end, vpc["bridge"]), (),
                       "plug it in", cable)]
        steps += port_steps(end, cable, "the cable merges nothing: packets take the routed way")
        steps += [Step(WIRE, ("port", end, "bcast_flood", False), "ip link set %s type bridge_slave bcast_flood off" % end,
                       (), "no broadcast from one VPC to the other", cable),
                  Step(PLUG, ("up", end), "ip link set %s up" % end, (), "switch it on", cable)]
    for here, there, blocks in ((a, b, of_b), (b, a, of_a)):
        steps += [route_step(block, there["bridge"], here["table"], "the way to the peer's block", ("link", there["bridge"]))
                  for block in blocks]
        steps += [rule_step(chain, ("-i", here["bridge"], "-o", there["bridge"], "-j", "DROP"),
                            "nothing else between the two", place="append", holder=held),
                  flows_step("-s %s -d %s" % (here["cidr"], there["cidr"]))]
    # First of all: a sender may pass only with its own address (the chain may be entered from either VPC's side). What
    # is allowed stands behind these two, also when one of them was lost and is put in again.
    steps += [rule_step(chain, ("-i", vpc["bridge"], "-j", vpc["chain_src"]), "senders are who they say they are",
                        place="prepend", mark="peer-source", holder=held) for vpc in (a, b)]
    for near, far, near_vpc, far_vpc in ((of_a, of_b, a, b), (of_b, of_a, b, a)):
        steps += [rule_step(chain, ("-s", source, "-d", target, "-i", near_vpc["bridge"], "-o", far_vpc["bridge"],
                                    "-j", "ACCEPT"), "these may talk", place="third", mark="peer-allow", holder=held)
                  for source in near for target in far]
    return steps + [rule_step(here["chain"], ("-j", chain), "the peering decides",
                              mark="peer-%s-%s" % (there["name"], ",".join(peer["allowed"]))[:240],
                              holder=("chain", "filter", here["chain"])) for here, there in ((a, b), (b, a))]


# -- policies

def policy_default(policy, direction):
    """What happens to traffic that no rule names -> ("allow" or "deny", why)."""
    given = (policy.get("default") or {}).get(direction)
    if given:
        return given, "its default says so"
    rules = policy.get(direction) or []
    if rules and all(rule["action"] == "allow" for rule in rules):
        return "deny", "a list of only allows is an allow-list"
    return "allow", "a list with a deny passes what it does not name" if rules else "an empty list passes everything"


def policy_names(subnet, vpc):
    """The siblings that a policy names -> name: block. Problem if there is no such subnet."""
    named, blocks = {}, None
    for direction, key in (("ingress", "from"), ("egress", "to")):
        for rule in subnet["policy"].get(direction) or []:
            if key in rule and not is_block(rule[key]):
                blocks = blocks or {other["name"]: other["cidr"] for other in vpc["subnets"]}
                if rule[key] not in blocks:
                    raise Problem("the policy of %s names subnet '%s', which VPC %s does not have"
                                  % (subnet["name"], rule[key], vpc["name"]), nearest(rule[key], blocks))
                named[rule[key]] = blocks[rule[key]]
    return named


def render_policy(policy, vpc, names=None):
    """A policy -> the firewall rules that say it, in order: loopback, replies, denies, allows, the rest.

    A reply is judged by today's rules for the direction that opened the connection, so that a new deny ends both ways
    of it: a program that only sends would else go on for as long as it likes.
    """
    return [rule for rule, _ in reasoned_policy(policy, vpc, names)]


def reasoned_policy(policy, vpc, names=None):
    """The rules of `render_policy`, each with its reason -> list of (rule, reason)."""
    names = policy_names({"name": "?", "policy": policy}, vpc) if names is None else names
    rules = []
    for direction, opener, chain, way, here, there in (("ingress", "egress", "INPUT", "-i", "in", "out"),
                                                       ("egress", "ingress", "OUTPUT", "-o", "out", "in")):
        note = lambda text: ("-m", "comment", "--comment", "policy-%s-%s" % (direction, text))
        strict = policy_default(policy, opener)[0] == "deny"
        others = (("-A", chain) + ANSWERS + ("-j", "DROP") + note("replies"), "no other replies")
        if not strict:
            others = (("-A", chain) + REPLIES + ("-j", "ACCEPT") + note("replies"), f"replies to what was let {there}")
        rules.append((("-A", chain, way, "lo", "-j", "ACCEPT") + note("loopback"), "what the subnet says to itself"))
        rules += [(("-A", chain) + words + ANSWERS + ("-j", target) + note("replies-%s" % label),
                   f"{'no replies' if target == 'DROP' else 'replies'} to {reason}")
                  for words, target, label, reason in judgements(policy, opener, chain, "--sport", names)
                  if strict or target == "DROP"]
        rules += [others,
                  (("-A", chain) + ERRORS + ("-j", "ACCEPT") + note("errors"), 'errors, such as "packet too big"')]
        rules += [(("-A", chain) + words + ("-j", target) + note(label), reason)
                  for words, target, label, reason in judgements(policy, direction, chain, "--dport", names)]
        action, because = policy_default(policy, direction)
        if action == "deny":
            rules.append((("-A", chain, "-j", "DROP") + note("default-deny"), f"everything else {here}: dropped, since {because}"))
    return rules


def judgements(policy, direction, chain, end, names):
    """A direction's rules, denies first -> list of (what it matches in that chain, target, label, which rule it is)."""
    side, key = "-s" if chain == "INPUT" else "-d", "from" if direction == "ingress" else "to"
    found = []
    for action, target in (("deny", "DROP"), ("allow", "ACCEPT")):
        for number, rule in enumerate(policy.get(direction) or [], 1):
            if rule["action"] == action:
                words, label = (), rule["protocol"]
                if key in rule:
                    words += side, block_text(names.get(rule[key], rule[key]))
                if rule["protocol"] != "all":
                    words += "-p", rule["protocol"]
                if "port" in rule:
                    low, high = ports(rule["port"])
                    label = f"{low}-{high}" if low < high else str(low)
                    words += end, label.replace("-", ":")
                found.append((words, target, f"{action}-{label}", f"{direction} rule {number}, {rule_text(rule)}"))
    return found


def plan_policy(vpc, subnet):
    """A subnet's policy: one step, because it is put in by one transaction, as a whole, and replaced as a whole."""
    space, prefix = subnet["ns"], ("ip", "netns", "exec", subnet["ns"], "iptables")
    rules, reasons = zip(*reasoned_policy(subnet["policy"], vpc))
    return [Step(INSIDE, ("policy", space, rules),
                 tuple(prefix + rule for rule in rules), tuple(prefix + ("-D",) + rule[1:] for rule in rules),
                 "the subnet's policy", ("ns", space), ("policy", space), whys=reasons)]


# -- names

def name_data(world, vpc):
    """The names that a VPC's subnets answer to and know -> list of (address, names)."""
    lines = [(s["host_ip"], (s["name"], "%s.%s" % (s["name"], vpc["name"]), "%s.%s.internal" % (s["name"], vpc["name"])))
             for s in vpc["subnets"]]
    for peer in vpc["peers"]:
        other = world.get(peer["peer_vpc"])
        if not other:
            continue
        blocks = [as_network(block) for block in sides(vpc, other, peer["allowed"])[1]]
        lines += [(s["host_ip"], ("%s.%s" % (s["name"], other["name"]), "%s.%s.internal" % (s["name"], other["name"])))
                  for s in other["subnets"] if any(as_network(s["host_ip"] + "/32").overlaps(block) for block in blocks)]
    return lines


def plan_names(world, vpc):
    """The hosts file that a VPC's subnets share."""
    known, host = name_data(world, vpc), os.uname()[1]
    text = "# vpcctl:%s\n127.0.0.1 localhost\n" % vpc["name"]
    if whole(r"[A-Za-z0-9._-]+")(host) and not any(host in names for _, names in known):
        text += "127.0.1.1 %s\n" % host           # programs that ask for their own name need not wait for a name server
    text += "".join("%s %s\n" % (address, " ".join(names)) for address, names in known)
    folder = "%s/%s" % (RUN_DIR, vpc["name"])
    return [Step(ROUTE, ("folder", folder), "mkdir -p " + folder, (("rmdir", folder), ("rmdir", RUN_DIR)),
                 "what the VPC's subnets share"),
            file_step(vpc["name"], "hosts", text, "names of siblings and peers"),
            file_step(vpc["name"], "resolv.conf", render_resolv(vpc), "a name server that is reached from here")]


def render_resolv(vpc):
    """The resolv.conf of a VPC: with NAT, name servers that can be reached; without, none, so that nobody waits."""
    servers = (vpc.get("nat") or {}).get("dns") or []
    return "# vpcctl:%s\n%s" % (vpc["name"], "".join("nameserver %s\n" % address for address in servers))


def recorded_rules(vpc):
    """The host's firewall rules of one VPC, as commands: for people who read the record, never run from it; and to
    tell whether an earlier version has made them."""
    steps = plan_chains(vpc) + (plan_nat(vpc) if vpc.get("nat") else [])
    rules = [argv for step in steps for argv in step.do if argv[0] == "iptables"]
    rules += [rule_argv(("-I", vpc["chain_src"], "1"), source_words(subnet), ALIAS + vpc["name"])
              for subnet in vpc["subnets"]]
    return [list(argv) for argv in rules]


def first_address(cidr):
    """The first usable address of a block."""
    return dotted(bounds(cidr)[0] + 1)


def hardware_address(address):
    """The MAC address that belongs to an IPv4 address: locally administered, so no card has it."""
    return "02:76:" + ":".join("%02x" % int(part) for part in address.split("."))


# ------------------------------------------------------------------------------------------------ the kernel as it is

class Seen:
    """What is in the kernel now, in the words of the plans: `facts`. Names that exist but are not ours are `foreign`;
    `owned` are things with our mark: fact -> (VPC or None, a step that can take it back)."""

    def __init__(self):
        self.facts, self.foreign, self.owned = set(), set(), {}
        self.policies = {}                        # namespace -> [(rule as printed, is it ours)]
        self.broken = {}                          # namespace -> why it could not be looked into
        self.stale = set()                        # namespaces and cables that lead nowhere, or elsewhere
        self.lookups, self.routes = [], {}        # others' routing rules; table -> others' routes in it
        self.rules = {}                           # (None or namespace, table, chain) -> [(rule, is it ours)]
        self.blind = {"inside", "policy"}         # kinds of facts that were not looked at
        self._values, self._counted = {}, 0

    def holds(self, step):
        """Whether a step's thing is there, as it should be."""
        return self.wrong(step) is None

    def wrong(self, step):
        """What is wrong with a step's thing -> Wrong, or None."""
        fact, kind = step.fact, step.fact[0]
        if fact in self.facts or kind == "flows":
            return None                           # connections: whatever of them there is
        if kind in self.blind or (kind in ("inside", "policy") and fact[1] in self.broken):
            return Wrong("unseen", "")
        if fact in self.foreign:
            return Wrong("not ours", "")
        if kind == "sysctl":
            value, wanted = sysctl_value(fact[1]), fact[2]
        elif kind in ("file", "symlink", "folder"):
            return file_wrong(fact)
        elif kind == "rule":
            return self._rule_wrong(fact)
        elif kind == "policy":
            return policy_wrong([rule for rule, own in self.policies.get(fact[1], ()) if own], fact[2])
        elif kind_of(fact) == "up":
            value, wanted = "down" if self._is_there(fact) else None, "up"
        else:
            value, wanted = self._value(fact), fact[-1]
        if value == wanted or (value is None and step.optional and self._is_unable(fact)):
            return None
        return Wrong("changed", f"is {spoken_value(value)}, not {spoken_value(wanted)}") if value is not None else MISSING

    def _value(self, fact):
        """What is seen in place of the last field of a fact, where that is the one value of what stands before."""
        if self._counted != len(self.facts):
            self._values = {other[:-1]: other[-1] for other in self.facts}
            self._counted = len(self.facts)
        return self._values.get(fact[:-1]) if kind_of(fact) in VALUED else None

    def _is_there(self, fact):
        """Whether the interface is there that a fact wants to be up."""
        return (("inside", fact[1], "card", fact[3]) if fact[0] == "inside" else ("link", fact[1])) in self.facts

    def _is_unable(self, fact):
        """Whether this kernel, or this host, has no such switch."""
        return fact[0] == "sysctl" or fact[:-1] + (None,) in self.facts

    def _rule_wrong(self, fact):
        """What is wrong with a rule that is not there, or does not stand where it should."""
        if fact[:4] + (None,) not in self.facts:
            return MISSING
        rules = self.rules[None, fact[1], fact[2]]
        if fact[4] == "last":
            return Wrong("changed", f'stands before "{rule_alone(rules[-1][0])}"')
        before = []
        for rule, ours in rules:
            if rule_key(rule) == fact[3]:
                break
            before.append((rule, ours))
        other = next((rule for rule, ours in before if not ours), before[0][0])
        return Wrong("changed", f'stands behind "{rule_alone(other)}"')

    def can_undo(self, step):
        """Whether something is there that a step's undo takes away, whatever its content and place."""
        if step.fact[0] == "symlink":
            return is_our_link(step.fact[1])
        wrong = self.wrong(step)
        return not wrong or wrong.kind in ("changed", "not ours")

    def replaced(self, step):
        """What must be taken out before a step's thing can be put in: a step, or None."""
        fact, found = step.fact, step.fact[:-1] + (self._value(step.fact),)
        if fact[0] == "policy":
            return seen_policy(fact[1], self.policies.get(fact[1], ()))
        if fact[0] == "rule" and fact[4] and fact[:4] + (None,) in self.facts:
            return Step(step.phase, fact[:4] + (None,), (), step.undo, step.why, key=("moved",) + fact)
        if found[0] in ("route", "lookup") and found in self.owned:
            return self.owned[found][1]
        if found[:1] + found[2:3] == ("inside", "route") and found in self.facts:
            return Step(step.phase, found, (), f"ip -n {fact[1]} route del {fact[3]}", "it leads elsewhere")
        return None


# Kinds of facts whose last field is the one value of what stands before: another one there is a change.
VALUED = frozenset(("alias", "mac", "master", "port", "neighbour", "route", "lookup", "sysctl"))
MISSING = Wrong("missing", "")


def spoken_value(value):
    """A value of a fact, in words."""
    return ("off", "on")[value] if isinstance(value, bool) else value


def sysctl_value(key):
    """A kernel switch's value, or None if there is no such switch."""
    try:
        with open(sysctl_path(key)) as switch:
            return switch.read().strip()
    except OSError:
        return "1" if key.startswith("net.ipv6.") and not os.path.exists("/proc/sys/net/ipv6/conf") else None


def file_wrong(fact):
    """What is wrong with a file, symlink or folder of a plan -> Wrong, or None."""
    kind, path = fact[:2]
    if kind == "folder":
        if not os.path.isdir(path):
            return MISSING
        return Wrong("changed", "can be written by others") if os.lstat(path).st_mode & 0o022 else None
    if kind == "symlink":
        found = os.readlink(path) if os.path.islink(path) else None
        if is_our_link(path):
            return Wrong("changed", f"leads to {found}, not {fact[2]}") if found != fact[2] else None
        return None if os.path.lexists(path) else MISSING        # somebody else's: it stays
    try:
        with open(path) as handle:
            return None if handle.read() == fact[2] else Wrong("changed", "has another content")
    except ValueError:
        return Wrong("changed", "has another content")
    except OSError:
        return MISSING


def is_our_link(path):
    """Whether a path is a symlink into vpcctl's run folder; anything else there is somebody else's, and stays."""
    return os.path.islink(path) and os.readlink(path).startswith(RUN_DIR + "/")


def ask(*argv, has):
    """Ask a tool that prints JSON -> its entries that are not empty, each of which has the key `has`, with a text (a
    number, if that is the priority).

    Raises Failure if the tool failed, or printed something else.
    """
    code, out, said = call(list(argv))
    if code < 0 or (code and not out):
        raise Failure(argv, said)
    # Before 5.0, ip told a route's type without a key, which is no JSON, and a rule's action by another key.
    fixed = re.sub(r'\{"(\w+)",', r'{"type":"\1",', out.replace('"to_tbl":', '"action":'))
    try:                                          # a name may hold any character: ip prints some as they are
        entries = [entry for entry in json.loads(fixed or "[]", strict=False) if entry]
        if any(type(entry[has]) is not (int if has == "priority" else str) for entry in entries):
            raise ValueError(has)
        return entries
    except (ValueError, TypeError, LookupError, RecursionError):
        raise Failure(argv, NO_JSON + out[:80]) from None


def ask_links():
    """Every interface in detail. What this `ip` does not say of a bridge's port is asked of the kernel."""
    links = ask("ip", "-j", "-d", "link", "show", has="ifname")
    ports = {link["ifname"]: link["linkinfo"]["info_slave_data"] for link in links
             if link.get("linkinfo", {}).get("info_slave_kind") == "bridge"}
    if any(flag not in port for port in ports.values() for flag in PORT_FLAGS):
        for name, flags in port_flags().items():
            ports.get(name, {}).update(flags)
    return links


def observe(world, inside_too=True, adopt=()):
    """Look at the machine with a dozen questions -> Seen. `adopt`: names that an interrupted change of ours may have
    made without coming to mark them; they count as ours."""
    seen = Seen()
    see_links(seen, set(adopt))
    see_addresses(seen)
    see_routes(seen)
    see_firewall(seen)
    if inside_too:
        see_inside(seen, [subnet for vpc in world.values() for subnet in vpc["subnets"]])
    return seen


def see_links(seen, adopt):
    """Interfaces, bridge ports and namespaces."""
    by_id = {}
    for entry in ask("ip", "-j", "netns", "list", has="name"):
        name, number = entry["name"], entry.get("id")
        by_id[number] = name
        fact = ("ns", name)
        if is_marked(name, number):
            seen.facts.update((fact, ("ours", name)))
            seen.owned[fact] = None, Step(SPACE, fact, (), "ip netns del " + name)
        elif not is_namespace(name):
            seen.stale.add(fact)
        elif name in adopt:
            seen.facts.add(fact)
        else:
            seen.foreign.add(fact)
    for link in ask_links():
        see_link(seen, link, adopt, by_id)
    for entry in ask("bridge", "-j", "fdb", "show", has="mac"):
        if entry.get("state") == "static" and "master" in entry:
            seen.facts.add(("fdb", entry["ifname"], entry["mac"]))


def is_namespace(name):
    """Whether a name in /run/netns is a living namespace: a mount, rather than the file left under it."""
    try:
        return os.stat(os.path.join(NETNS_DIR, name)).st_dev == os.stat("/proc/self/ns/net").st_dev
    except OSError:
        return False


def see_link(seen, link, adopt, by_id):
    """One interface's facts."""
    name, alias = link["ifname"], link.get("ifalias", "")
    fact = ("link", name)
    if alias.startswith(ALIAS) and "link_netnsid" in link and link["link_netnsid"] not in by_id:
        seen.stale.add(fact)                      # its namespace has lost its name: both are about to go
        return
    if not alias.startswith(ALIAS) and name not in adopt:
        seen.foreign.add(fact)
        return
    vpc = alias[len(ALIAS):] if alias.startswith(ALIAS) else None
    seen.facts.update((fact, ("alias", name, alias), ("mac", name, link.get("address"))))
    if vpc:
        seen.owned[fact] = vpc, Step(LINK, fact, (), "ip link del " + name)
        space = ("ns", by_id.get(link.get("link_netnsid")))
        if space in seen.owned:
            seen.owned[space] = vpc, seen.owned[space][1]
    if "UP" in link.get("flags", ()):
        seen.facts.add(("up", name))
    if "master" in link:
        seen.facts.add(("master", name, link["master"]))
    port = link.get("linkinfo", {}).get("info_slave_data", {})
    if "isolated" in port:                        # one command sets these four
        loud = [flag for flag in ("learning", "flood", "mcast_flood") if port.get(flag)]
        isolated = port["isolated"] if not loud else f"{spoken_value(port['isolated'])} with {', '.join(loud)}"
        seen.facts.add(("port", name, "isolated", isolated))
    for flag in ("locked", "bcast_flood"):
        if flag in port:
            seen.facts.add(("port", name, flag, port[flag]))


def see_addresses(seen):
    """Addresses of interfaces and permanent neighbours."""
    for link in ask("ip", "-j", "-4", "addr", "show", has="ifname"):
        for address in link.get("addr_info", ()):
            seen.facts.add(("address", link["ifname"], "%s/%s" % (address.get("local"), address.get("prefixlen"))))
    for entry in ask("ip", "-j", "neigh", "show", "nud", "permanent", has="dst"):
        seen.facts.add(("neighbour", entry["dev"], entry["dst"], entry.get("lladdr")))


def see_routes(seen):
    """Routing rules and routes: ours carry our protocol number."""
    for entry in ask("ip", "-j", "-4", "rule", "show", has="priority"):
        if str(entry.get("protocol")) != PROTOCOL:
            seen.lookups.append(entry)
            continue
        source = entry.get("src", "all")
        selector = "" if source == "all" else "from %s%s" % (source, "/%s" % entry["srclen"] if "srclen" in entry else "")
        if "dst" in entry:
            selector += "to %s/%s" % (entry["dst"], entry.get("dstlen", 32))
        if "ipproto" in entry:
            selector += " ipproto %s sport %s" % (entry["ipproto"], entry.get("sport", ""))
        action = entry.get("action") or "lookup %s" % entry.get("table")
        step = lookup_step(str(entry["priority"]), entry.get("iif", "").split(" ")[0], action, "", selector)
        seen.facts.add(step.fact)
        seen.owned[step.fact] = bridge_owner(seen, step.fact[2]), step
    for entry in ask("ip", "-j", "-4", "route", "show", "table", "all", has="dst"):
        kind = entry.get("type", "")
        table, block = str(entry.get("table", "main")), entry["dst"]
        if str(entry.get("protocol")) != PROTOCOL:
            seen.routes.setdefault(table, []).append(entry)
            continue
        block = block if "/" in block or block == "default" else block + "/32"
        fact = ("route", table, block, "unreachable" if kind == "unreachable" else entry.get("dev", "?"))
        seen.facts.add(fact)
        where = "unreachable " + block if kind == "unreachable" else "%s dev %s" % (block, entry.get("dev"))
        seen.owned[fact] = (bridge_owner(seen, fact[3]),
                            Step(ROUTE, fact, (), "ip route del %s table %s proto %s" % (where, table, PROTOCOL)))


def bridge_owner(seen, bridge):
    """The VPC that a bridge of ours belongs to, or None."""
    return seen.owned.get(("link", bridge), (None,))[0]


def see_firewall(seen):
    """Chains and rules of the host."""
    for table, (chains, rules) in parse_rules(saved_rules()).items():
        see_table(seen, table, chains, rules)


def saved_rules(*options):
    """What iptables-save prints of all tables. Without real root, iptables-legacy may not list their names, so it is
    asked for those that we use."""
    code, out, said = call(["iptables-save", *options])
    if code and "Permission denied" in said:
        answers = [call(["iptables-save", *options, "-t", table]) for table in ("filter", "nat", "raw", "mangle")]
        code, out, said = max(code for code, _, _ in answers), "".join(out for _, out, _ in answers), answers[0][2]
    if code:
        raise Failure(("iptables-save",) + options, said)
    return out


def parse_rules(text):
    """What iptables-save prints -> table -> (chains, list of (chain, tuple of words)). Failure if it says that it
    cannot print a table: somebody has put rules of nft there."""
    tables, table = {}, None
    for line in printed_lines(text):
        if line.startswith("*"):
            table = tables.setdefault(line[1:].strip(), ([], []))
        elif line.startswith(":") and table:
            table[0].append(tuple(line[1:].split(" ")[:2]))
        elif line.startswith("-A") and table:
            words = rule_words(line)
            table[1].append((words[1], tuple(words[2:])))
        elif line.startswith("# Table") and "is incompatible" in line:
            raise Failure(("iptables-save",), line.lstrip("# "))
    return tables


def printed_lines(text):
    """The lines of what iptables-save prints: a comment in quotes may hold any character, line ends too."""
    lines = iter(text.split("\n"))
    for line in lines:
        while '"' in line and re.sub(r"\\.", "", line, flags=re.S).count('"') % 2:
            more = next(lines, None)
            if more is None:
                break
            line += "\n" + more
        yield line


def rule_words(line):
    """A printed rule's words. Only a blank divides them, since names may hold what else counts as white space."""
    simple = re.sub(r'"([^" \\]+)"', r"\1", line)
    if '"' not in simple:
        return [word for word in simple.split(" ") if word]
    found = re.findall(r'"((?:[^"\\]|\\.)*)"|([^ ]+)', line, re.S)
    return [word or re.sub(r"\\(.)", r"\1", quoted, flags=re.S) for quoted, word in found]


OUR_CHAIN = re.compile(f"(?:vpc-[A-Za-z0-9_-]{{1,24}}|{GUARD}|{REST})\\Z").match


def comment_of(rule):
    """A rule's comment, or an empty string."""
    return rule[rule.index("--comment") + 1] if "--comment" in rule else ""


def see_table(seen, table, chains, rules):
    """One table's chains and rules. "first" means: none of somebody else's stands before it."""
    by_chain = {}
    for chain, rule in rules:
        by_chain.setdefault(chain, []).append(rule)
    for chain, policy in chains:
        fact, own = ("chain", table, chain), by_chain.get(chain, [])
        ours = [is_our_comment(comment_of(rule), policy == "-") for rule in own]
        seen.rules[None, table, chain] = list(zip(own, ours))
        seen.facts.add(fact)
        head = True
        for number, rule in enumerate(own):
            base = ("rule", table, chain, rule_key(rule))
            head = head and (ours[number] if policy != "-" else number == 0)
            seen.facts.add(base + (None,))
            if head:
                seen.facts.add(base + ("first",))
            if number == len(own) - 1:
                seen.facts.add(base + ("last",))
            if ours[number]:
                vpc, twin = seen.owned.get(base + (None,), (comment_vpc(comment_of(rule)), None))
                seen.owned[base + (None,)] = vpc, found_rule(table, chain, rule, twin.undo if twin else ())
        if policy == "-" and all(ours) and (own or is_forgotten(chain, rules)):
            owner = {comment_vpc(comment_of(rule)) for rule in own} - {None}
            seen.owned[fact] = owner.pop() if len(owner) == 1 else None, chain_step(chain, "", table)
        elif policy == "-" and own and not any(ours):
            seen.foreign.add(fact)


def is_forgotten(chain, rules):
    """Whether an empty chain is ours: by its name. That is enough, as it does nothing for anybody else who might
    have made it; no rule but ours may jump to it. (They come from `iptables -F`: ours always hold a rule.)"""
    jumps = [rule for _, rule in rules if target_of(rule) == chain]
    return bool(OUR_CHAIN(chain)) and all(is_our_comment(comment_of(rule), True) for rule in jumps)


def is_our_comment(comment, in_chain):
    """Whether a rule's comment is one of vpcctl's."""
    return comment.startswith("vpcctl") or (in_chain and comment.startswith("peer-"))


def comment_vpc(comment):
    """The VPC that a comment names, or None."""
    found = re.match(r"vpcctl(?::|-nat-|-publish-)(.+)", comment)
    return found.group(1) if found else None


def see_inside(seen, subnets):
    """Look into the namespaces of subnets, those that are ours, side by side."""
    seen.blind = ()
    subnets = [subnet for subnet in subnets if ("ns", subnet["ns"]) in seen.facts]
    found = in_namespaces([subnet["ns"] for subnet in subnets], look_inside)
    for subnet in subnets:
        space, port, result = subnet["ns"], ("link", subnet["veth"] + "-b"), found[subnet["ns"]]
        if isinstance(result, Exception):
            asked = f"`{shown(result.argv)}`: " if isinstance(result, Failure) else ""
            seen.broken[space] = asked + str(result)
            continue
        facts, tables = result
        seen.facts.update(facts)
        seen.policies[space] = policy_rules(tables)
        for table, (_, rules) in tables.items():
            for chain, rule in rules:
                ours = is_policy_rule(rule)
                seen.rules.setdefault((space, table, chain), []).append((rule, ours))
        if port in seen.facts and ("inside", space, "card", subnet["veth"] + "-a") not in facts:
            seen.stale.add(port)                  # somebody inside has given the other end another name


def policy_meaning(rules):
    """What rules (chain, words…) mean, chain by chain, whatever their spelling."""
    meant = [(rule[0], rule_key(rule[1:])) for rule in rules]
    return [pair for chain in ("INPUT", "OUTPUT") for pair in meant if pair[0] == chain]


def policy_wrong(have, want):
    """What is wrong with a policy's rules as printed, beside those that are planned -> Wrong, or None."""
    have, want = policy_meaning(have), policy_meaning(rule[1:] for rule in want)
    if have == want or not have:
        return None if have else MISSING
    faults = []
    for verb, some, others in (("lacks", want, have), ("holds a changed or additional", have, want)):
        labels = [dict(meaning)["--comment"] for chain, meaning in some if (chain, meaning) not in others]
        if labels:
            faults.append(f"{verb} {', '.join(labels[:3])}" + (f" and {len(labels) - 3} more" if labels[3:] else ""))
    return Wrong("changed", "; ".join(faults) or "stands in another order")


def look_inside(space):
    """Called in a namespace -> (its facts, its firewall as parse_rules has it)."""
    facts = {("inside", space, "card", name) for name in host_interfaces()}
    for link in ask("ip", "-j", "-4", "addr", "show", has="ifname"):
        if "UP" in link.get("flags", ()):
            facts.add(("inside", space, "up", link["ifname"]))
        for address in link.get("addr_info", ()):
            block = f"{address.get('local')}/{address.get('prefixlen')}"
            facts.add(("inside", space, "address", link["ifname"], block))
    for route in ask("ip", "-j", "-4", "route", "show", has="dst"):
        facts.add(("inside", space, "route", route["dst"], route.get("gateway")))
    facts.update(("inside", space, "neighbour") + entry for entry in permanent_neighbours())
    for key, _, _ in NS_SYSCTLS:
        facts.add(("inside", space, "sysctl", key, sysctl_value(key)))
    return facts, parse_rules(saved_rules())


def seen_rules():
    """Called in a namespace -> the rules of INPUT and OUTPUT: [((chain, words…), is it of the policy)]."""
    return policy_rules(parse_rules(saved_rules()))


def policy_rules(tables):
    """Of a namespace's firewall, the rules of INPUT and OUTPUT: [((chain, words…), is it of the policy)]."""
    return [((chain,) + rule, is_policy_rule(rule))
            for chain, rule in tables.get("filter", ((), ()))[1]
            if chain in ("INPUT", "OUTPUT")]


def is_policy_rule(rule):
    """Whether a rule in a namespace is of its policy; what could not be put in again as it was printed is not."""
    plain = all(re.match(r"[\w./:,!-]+\Z", word, re.A) for word in rule)
    return plain and comment_of(rule).startswith("policy-")


def seen_policy(space, rules):
    """The step that takes a policy out as it was found (whole chains where all is ours, else rule by rule), and that
    puts it in again."""
    prefix, undo = ("ip", "netns", "exec", space, "iptables"), []
    for chain in ("INPUT", "OUTPUT"):
        own = [(rule, ours) for rule, ours in rules if rule[0] == chain]
        if own and all(ours for _, ours in own):
            undo.append(prefix + ("-F", chain))
        else:
            undo.extend(prefix + ("-D",) + rule for rule, ours in own if ours)
    again = tuple(prefix + ("-A",) + rule for rule, ours in rules if ours)
    return Step(INSIDE, ("policy", space, None), again, tuple(undo), "the policy before", key=("policy", space))


WORDS = {"ns": "namespace %s", "ours": "mark of namespace %s", "link": "interface %s", "alias": "mark of interface %s",
         "mac": "hardware address of interface %s", "up": "interface %s", "master": "bridge of cable %s",
         "port": "port %s: %s", "fdb": "port %s: forwarding entry for %s", "address": "interface %s: address %s",
         "neighbour": "interface %s: neighbour entry for %s", "route": "routing table %s: the way to %s",
         "sysctl": "kernel switch %s", "policy": "namespace %s: policy rules", "file": "file %s",
         "symlink": "link %s", "folder": "folder %s", "chain": "firewall table %s: chain %s",
         "flows": "tracked connections: %s"}


def kind_of(fact):
    """The kind of a fact, or of what it says of the inside of a namespace."""
    return fact[2] if fact[0] == "inside" else fact[0]


def named(fact):
    """A thing in words, if its fact is enough to tell it, without its value."""
    if fact[0] == "inside":
        return f"namespace {fact[1]}: " + named((fact[2], "main") + fact[3:] if fact[2] == "route" else fact[2:])
    words = WORDS[fact[0]]
    return words % tuple(fact[1:1 + words.count("%s")])


def rule_alone(rule):
    """A rule's words without its comment, as one would type them."""
    words = list(rule)
    if "--comment" in words:
        at = words.index("--comment")
        del words[at - 2:at + 2]
    return shown(words)


def describe(step, wrong=MISSING):
    """A step's thing in words, and what was found of it."""
    fact = step.fact
    if fact[0] == "rule" and wrong.found:
        words = step.undo[0]                      # iptables -D CHAIN and the rule
        return f'{fact[2]}: our rule "{rule_alone(words[words.index(fact[2]) + 1:])}" {wrong.found}'
    if fact[0] in ("rule", "lookup"):
        kind = "firewall rule" if fact[0] == "rule" else "routing rule"
        thing = f"{kind}: {rule_alone((step.do or step.undo)[0])}"
    else:
        thing = named(fact)
    if wrong.found:
        return f"{thing} {wrong.found}"
    value = {"up": "up", "lookup": None}.get(kind_of(fact), fact[-1] if kind_of(fact) in VALUED else None)
    return thing if value is None else f"{thing} ({spoken_value(value)})"


# ------------------------------------------------------------------------------------------------ VPCs

@command("create", "create blog --cidr 10.20.0.0/16",
         arg("vpc", type=name_type, metavar="VPC", help="a name of your choice"),
         arg("--cidr", type=network_type, required=True, metavar="BLOCK", help="its range, for example 10.20.0.0/16"),
         changes=True)
def create(ctl, args):
    """make a VPC: a switch, a routing table and firewall chains of its own"""
    known = ctl.world.get(args.vpc)
    if known:
        if known["cidr"] != args.cidr:
            raise Problem("VPC %s exists already with %s, not %s" % (args.vpc, known["cidr"], args.cidr),
                          "use another name, or `vpcctl delete %s` first" % args.vpc)
        return already(ctl, [args.vpc], "VPC %s (%s) exists already" % (args.vpc, args.cidr))
    if args.vpc in ctl.damaged:
        ctl.vpc(args.vpc)
    clear_orphans(ctl, args.vpc)
    new = ctl.copy()
    new[args.vpc] = new_vpc(ctl, args.vpc, args.cidr, new)
    ctl.change(new)
    ctl.report("Created VPC: %s (%s, bridge: %s)" % (args.vpc, args.cidr, new[args.vpc]["bridge"]))


def new_vpc(ctl, name, cidr, world, used=None):
    """Check a new VPC against everything -> its record. `used`: kernel names in use, if the caller has them."""
    block = as_network(cidr)
    if not 8 <= block.prefixlen <= 29:
        raise Problem("%s: a VPC's range is from /8 to /29" % cidr, "10.20.0.0/16 is a good size")
    for reserved, what in UNROUTED.items():
        if block.overlaps(as_network(reserved)):
            raise Problem(f"{cidr} is {what}, which cannot be a VPC's range",
                          "take a private range: 10.0.0.0/8, 172.16.0.0/12 or 192.168.0.0/16")
    for other in world.values():
        if block.overlaps(as_network(other["cidr"])):
            raise Problem("%s overlaps VPC %s (%s)" % (cidr, other["name"], other["cidr"]),
                          "take a range that no other VPC has")
    table, chains = free_on_host(ctl, block, world)
    used = record_names(world) | kernel_names(ctl) if used is None else used
    bridge = short_name("br-", name, "", 15, used.__contains__)
    names = [short_name(prefix, name, "", 28, lambda found: found in used or found in chains)
             for prefix in ("vpc-", "vpc-in-", "vpc-src-")]
    used.update([bridge] + names)
    return {"format": 1, "name": name, "cidr": cidr, "bridge": bridge, "chain": names[0], "chain_in": names[1],
            "chain_src": names[2], "table": table, "mac": hardware_address(first_address(cidr)),
            "iptables": "nft" if ctl.dry_run else iptables_kind(), "subnets": [], "host_iptables": [], "apps": [],
            "peers": [], "nat": None, "published": []}


def host_chains():
    """Names of the host's firewall chains."""
    return {name for chains, _ in parse_rules(saved_rules()).values() for name, _ in chains}


def free_on_host(ctl, block, world):
    """Check a range against the host's own networks -> (a free route table, names of the host's firewall chains)."""
    tables = {vpc["table"] for vpc in world.values()}
    chains = set()
    if not ctl.dry_run:
        ours = {vpc["bridge"] for vpc in world.values()}
        for route in ask("ip", "-j", "-4", "route", "show", "table", "all", has="dst"):
            table = str(route.get("table", "main"))
            tables.add(int(table) if table.isdigit() else 0)
            target = route["dst"]
            if target == "default" or route.get("dev") in ours or str(route.get("protocol")) == PROTOCOL:
                continue
            if table == FENCE_TABLE or block.overlaps(as_network(target if "/" in target else target + "/32")):
                raise Problem("%s overlaps a network that this host already has: %s%s" % (
                    block, target, " on " + route["dev"] if "dev" in route else ""), "take a range that is not in use here")
        chains = other_chains(ctl)
    table = FIRST_TABLE
    while table in tables:
        table += 1
    return table, chains


def other_chains(ctl):
    """The host's firewall chains that are not in our records: what is made anew may have its name again."""
    return host_chains() - record_names(ctl.world)


def kernel_names(ctl):
    """Names that are taken in the kernel: interfaces and namespaces. A dry run looks at nothing."""
    if ctl.dry_run:
        return set()
    spaces = os.listdir(NETNS_DIR) if os.path.isdir(NETNS_DIR) else []
    return set(host_interfaces()) | set(spaces)


@command("delete", "delete blog", VPC,
         arg("--force", action="store_true", help="also a VPC whose record is unreadable"), changes=True)
def delete(ctl, args):
    """remove a VPC with everything in it"""
    if args.force and args.vpc in ctl.damaged:
        drop_unreadable(ctl, [args.vpc])
        if ctl.dry_run:
            return None
        ctl.begin_again()
        forget_peer(ctl, args.vpc)
        clear_orphans(ctl, args.vpc)
        remove_tree("%s/%s" % (RUN_DIR, args.vpc))
        tidy_apps(ctl, (), ctl.world)
        return ctl.report("Deleted VPC: %s" % args.vpc)
    if not any(args.vpc in known for known in (ctl.world, ctl.intents, ctl.damaged)) and clear_orphans(ctl, args.vpc):
        forget_peer(ctl, args.vpc)
        return ctl.report("Deleted VPC: %s (it had no record)" % args.vpc)
    if args.vpc not in ctl.intents:
        ctl.vpc(args.vpc)
    delete_vpcs(ctl, [args.vpc])


def drop_unreadable(ctl, names):
    """Remove records that cannot be read; a directory of that name is not ours and stays."""
    for name in names:
        path = ctl.store.path(name)
        ctl.run.echo(("rm", "-f", path), "the record is unreadable")
        if ctl.dry_run:
            continue
        try:
            ctl.store.drop(name, "intent")
            ctl.store.drop(name)
        except OSError as error:
            raise Problem("cannot remove %s: %s" % (path, error.strerror), "remove it by hand", 3) from None
        ctl.note("removed the unreadable record %s" % path)


def delete_vpcs(ctl, names):
    """Delete VPCs together: programs, then all the rest in one go."""
    if ctl.is_unsound(names) and not ctl.dry_run:
        mend(ctl, names, names, strict=False)     # look first: what is there is not what the records say
        return [ctl.report("Deleted VPC: %s" % name) for name in names]
    new = ctl.copy()
    apps = [app for name in names for app in new[name]["apps"]]
    spaces = [subnet["ns"] for name in names for subnet in new[name]["subnets"]]
    for name in names:
        del new[name]
    for vpc in new.values():
        vpc["peers"] = [peer for peer in vpc["peers"] if peer["peer_vpc"] not in names]
    ctl.change(new, before=lambda: stop_programs(ctl, apps, spaces))
    for name in names:
        ctl.report("Deleted VPC: %s" % name)


def forget_peer(ctl, name):
    """Take a VPC that is gone out of its peers' records."""
    new = ctl.copy()
    for vpc in new.values():
        vpc["peers"] = [peer for peer in vpc["peers"] if peer["peer_vpc"] != name]
    changed = [other for other in new if new[other] != ctl.world[other]]
    if changed:
        ctl.change(new)
        mend(ctl, changed, strict=False)          # the peer could not be read, so its part in this was not known


@command("cleanup-all", "cleanup-all", changes=True)
def cleanup_all(ctl, _args):
    """delete every VPC, and what is ours without a record"""
    names = sorted(set(ctl.world) | set(ctl.intents))
    drop_unreadable(ctl, sorted(ctl.damaged))
    if names:
        delete_vpcs(ctl, names)
    if not ctl.dry_run:
        ctl.begin_again()
        left = clear_orphans(ctl, None) + clear_files(ctl)
        if not names and not left:
            ctl.report("Nothing to clean up")


def clear_orphans(ctl, name):
    """Remove what carries our mark but is in no record: of one VPC, or (None) all -> how many things went."""
    if ctl.dry_run:
        return 0
    if name is not None and not orphan_suspected(ctl, name):
        return 0
    seen = observe(ctl.world, inside_too=False)
    steps = orphans(ctl, seen, name)
    if name and steps:
        ctl.note("clearing away what is left of an earlier VPC %s without a record" % name)
    if any(step.fact == ("chain", "filter", GUARD) for step in steps):
        back = (("sysctl", "-w", "net.ipv4.ip_forward=0"),) + tuple(     # it clears those of our bridges, too
            ("sysctl", "-w", link_conf("ipv4", vpc["bridge"], "forwarding") + "=1") for vpc in ctl.world.values())
        steps.append(Step(WIRE, ("sysctl", "net.ipv4.ip_forward", "1"), (), back, "the guard says that it was off before"))
    stop_programs(ctl, (), [step.fact[1] for step in steps if step.fact[0] == "ns"])
    folders = [step.fact[1] for step in steps if step.fact[0] == "ns"]
    if name is None:
        folders += lost_folders(ctl, folders)
    steps += [Step(FILE, ("folder", etc_folder(space)), (), "rmdir " + etc_folder(space)) for space in folders]
    steps += [left_file(space, file) for space in folders for file in ("hosts", "resolv.conf")
              if is_our_link("%s/%s" % (etc_folder(space), file))]       # taken back newest first: files, then folders
    if steps:
        ctl.run.transact(steps, [])
    return len(steps)


def clear_files(ctl):
    """Remove what is left in our run folder of VPCs that are in no record -> how many."""
    folders = ["%s/%s" % (RUN_DIR, entry) for entry in os.listdir(RUN_DIR)] if os.path.isdir(RUN_DIR) else []
    folders = [folder for folder in folders if os.path.basename(folder) not in ctl.world]
    for folder in folders:
        remove_tree(folder)
    tidy_apps(ctl, (), ctl.world)
    return len(folders)


def lost_folders(ctl, known):
    """Namespaces for which a file of ours is left in /etc/netns, without a record: after a restart, for example."""
    kept = {subnet["ns"] for vpc in ctl.world.values() for subnet in vpc["subnets"]} | set(known)
    found = os.listdir(ETC_NETNS) if os.path.isdir(ETC_NETNS) else []
    return [space for space in found if space not in kept
            and any(is_our_link("%s/%s" % (etc_folder(space), file)) for file in ("hosts", "resolv.conf"))]


def left_file(space, file):
    """The step that removes one of our links in a namespace's /etc."""
    return link_step(space, file, "-", "")


def orphan_suspected(ctl, name):
    """A cheap look before `create`: is there a bridge, namespace or chain that a VPC of this name would have made?"""
    if ("br-" + name)[:15] in host_interfaces():
        return True
    if os.path.isdir(NETNS_DIR) and any(entry.startswith("ns-%s-" % name) for entry in os.listdir(NETNS_DIR)):
        return True
    return ALIAS + name in saved_rules()


def orphans(ctl, seen, name=None):
    """Steps for things that are ours but in no record; of one VPC, and those that belong to nobody, or all."""
    planned = plan(dict(ctl.world, **{key: value for key, value in ctl.intents.items() if value}))
    known = {fact[:4] + (None,) if fact[0] == "rule" else fact for fact in planned}
    known.update(("link", other) for vpc in ctl.world.values() for peer in vpc["peers"]
                 for other in (peer["veth_a"], peer["veth_b"]))
    tables = {FENCE_TABLE} | {str(vpc["table"]) for vpc in ctl.world.values()}
    found = []
    for fact, (vpc, step) in seen.owned.items():
        if fact[0] == "route" and fact[1] not in tables:
            vpc = None                            # the way to a peer, in the table of a VPC that is gone
        if fact in known or (vpc in ctl.damaged and name is None) or (vpc in ctl.intents):
            continue
        if (name is not None and vpc not in (name, None)) or (vpc is None and ctl.damaged):
            continue                              # what says no name may be of a VPC whose record is unreadable
        found.append(step)
    return found


def already(ctl, names, text):
    """Doing the same again is harmless: say so, after putting right what is missing."""
    if ctl.dry_run:
        return ctl.note(text)
    mended = mend(ctl, names)
    ctl.report("%s%s" % (text, "; put right what was missing" if mended else ""))


# ------------------------------------------------------------------------------------------------ mending

@command("restore", "restore blog",
         arg("vpcs", nargs="*", type=name_type, metavar="VPC", help="which ones (default: all)", complete="vpc"),
         changes=True)
def restore(ctl, args):
    """bring the kernel back to what the records say, after a reboot or a loss"""
    for name in args.vpcs:
        if name not in ctl.intents:
            ctl.vpc(name)
    for name, why in ctl.damaged.items():
        if name in args.vpcs or not args.vpcs:
            ctl.note("%s; left alone, `vpcctl delete --force %s` clears it away" % (why, name))
    names = args.vpcs or sorted(set(ctl.world) | set(ctl.intents))
    if ctl.dry_run:
        return ctl.run.make(in_order([Change(None, step, None) for step in plan(ctl.world, set(names)).values()]), [])
    done = clear_strays(ctl, names) + mend(ctl, names) if names else 0
    ctl.report("Restored: %s" % ", ".join(names) if done else "Nothing to restore")


def clear_strays(ctl, names):
    """Remove what says it is of one of these VPCs, but is not in its record, and rules of ours that are of no VPC
    and in no record (of an earlier version's guard) -> how many things went."""
    seen = observe(ctl.world, inside_too=False)
    owners = {step: seen.owned[step.fact][0] for step in orphans(ctl, seen)}
    strays = [step for step, owner in owners.items() if owner in names or (step.fact[0] == "rule" and not owner)]
    ctl.run.transact(strays, [])
    return len(strays)


def is_down(vpc, interfaces=None):
    """Whether a VPC has no switch in the kernel: after a reboot, for example. Asks nobody."""
    return vpc["bridge"] not in (host_interfaces() if interfaces is None else interfaces)


def is_outdated(vpc):
    """Whether a VPC's rules were made by an earlier version, whose plans were others."""
    return vpc["host_iptables"] != recorded_rules(vpc)


def heal_first(ctl, names):
    """Before a change: finish what was cut short in the VPCs that it is about, bring up those that are down, and
    bring up to date what an earlier version has made."""
    unsound = sorted(set(ctl.is_unsound(names)) | set(ctl.intents))
    if unsound:
        ctl.note("first putting right what an interrupted change, a restart or an earlier version has left: "
                 + ", ".join(unsound))
        clear_strays(ctl, unsound)
        mend(ctl, unsound, strict=False)


def mend(ctl, names, gone=(), strict=True, staying=None):
    """Make the kernel match the records of some VPCs, finishing intents; `gone` are to go -> how much was amiss.
    With `staying` (a world), only what is in that as well: the rest is about to go, and may be somebody else's by now.

    The host's part is mended first, for all of them, before anybody looks into a namespace: nothing in there can
    keep it from that. What could not be put right of a subnet is raised in the end as a Problem, or is a note if
    not `strict`.
    """
    new, broken_off = ctl.copy(), ctl.intents
    for name in broken_off:
        new[name] = broken_off[name]
    intended = {name: record for name, record in new.items() if record}
    new = {name: record for name, record in intended.items() if name not in gone}
    settle_peers(new, ctl.damaged)
    names = set(names) | set(broken_off) | {name for name in new if new[name] != ctl.world.get(name)}
    steps = plan(new, names)
    stale = plan(ctl.world, names)
    stale.update(plan(intended, names))
    for fact in set(steps) - set(steps if staying is None else plan(staying, names)):
        del steps[fact]
        stale.pop(fact, None)
    adopt = record_names({name: vpc for name, vpc in broken_off.items() if vpc})
    look = lambda inside_too: observe({name: vpc for name, vpc in new.items() if name in names}, inside_too, adopt)
    seen = look(False)
    if seen.stale:
        ctl.run.transact(leftovers(seen, set(steps) | set(stale)), [])
        seen = look(False)
    removes, makes = mending(steps, stale, seen)
    stop_programs(ctl, not_staying(names, (ctl.world, intended), new),
                  [step.fact[1] for step in removes if step.fact[0] == "ns"])
    host, _ = parted(makes, new, seen)
    ctl.run.transact(removes, host, adopt=adopt)
    with ctl.run.patience():
        see_inside(seen, [subnet for name in names if name in new for subnet in new[name]["subnets"]])
        if seen.stale:
            ctl.run.transact(leftovers(seen, steps), [])
            seen = look(True)
        _, parts = parted(mending(steps, {}, seen)[1], new, seen)
        troubles = mend_subnets(ctl, parts) + unseen(new, seen)
        started, touched = mend_records(ctl, new, names, troubles, new if staying is None else staying)
    if strict and troubles:
        raise Problem("; ".join(map(str, troubles)), troubles[0].hint, 3)
    for problem in troubles:
        ctl.note(f"{problem}; {problem.hint}" if problem.hint else str(problem))
    return len(removes) + len(host) + sum(map(len, parts.values())) + started + touched


def parted(makes, world, seen):
    """Changes to make -> (those of the host, name of a subnet -> those of its namespace and its cable). Of a
    namespace that could not be looked into only the cable, and that is not switched on."""
    owners, host, parts = {}, [], {}
    for vpc in world.values():
        for subnet in vpc["subnets"]:
            owner = f"{vpc['name']}/{subnet['name']}", subnet["ns"]
            owners["ns", subnet["ns"]] = owners["link", subnet["veth"] + "-b"] = owner
    for change in makes:
        step = change.make
        name, space = owners.get(step.fact) or owners.get(step.holder) or (None, None)
        if not name:
            host.append(change)
        elif space not in seen.broken or step.phase not in (INSIDE, PLUG):
            parts.setdefault(name, []).append(change)
    return host, parts


ANEW = "all else was put right; deleting and adding that subnet makes it anew, and ends what runs in it"


def unseen(world, seen):
    """A Problem for each subnet whose namespace could not be looked into. It is not made anew: that would end the
    programs in it, and what somebody has put there may be meant."""
    names = {subnet["ns"]: f"{vpc['name']}/{subnet['name']}" for vpc in world.values() for subnet in vpc["subnets"]}
    return [Problem(f"could not look into subnet {names[space]}: {why}", ANEW, 3)
            for space, why in sorted(seen.broken.items())]


def mend_subnets(ctl, parts):
    """Make what is missing of subnets: side by side, or, if that fails, each by itself -> a Problem for each that
    cannot be put right."""
    try:
        ctl.run.transact([], [change for part in parts.values() for change in part])
        return []
    except (Problem, OSError) as trouble:
        if len(parts) == 1:
            return [Problem(f"could not put right subnet {name}: {trouble}", ANEW, 3) for name in parts]
        ctl.note(f"{trouble}; once more, each subnet by itself")
    return [problem for name in parts for problem in mend_subnets(ctl, {name: parts[name]})]


def mend_records(ctl, new, names, troubles, staying):
    """When the kernel matches: programs that are `staying`, then records; `troubles` receives a Problem for each
    program that does not start -> (how many were started, how many records changed)."""
    note_lost(ctl, new)
    silent, kept = [], [app for vpc in staying.values() for app in vpc["apps"]]
    apps = [(name, app) for name in sorted(set(names) & set(new)) for app in new[name]["apps"] if app in kept]
    started = revive_apps(ctl, apps, silent)
    for name, app, problem in silent:
        if app["start"]:
            troubles.append(problem)
        else:                                     # its deployment was cut short, and it never ran
            new[name]["apps"].remove(app)
            ctl.note("%s; taken out of the record" % problem)
    for name in names:
        if name in new:
            new[name]["host_iptables"] = recorded_rules(new[name])
    touched = [name for name in sorted(set(new) | set(ctl.world)) if new.get(name) != ctl.world.get(name)]
    ctl.finish(set(touched) | set(ctl.intents), new)
    return started, len(touched)


def not_staying(names, worlds, new):
    """Apps of some VPCs of these worlds that do not go on running: they are not in the world `new`, or not as
    they were started (gone, in a namespace that has lost its name, or never written down)."""
    staying = {(app["pid"], app["start"]) for vpc in new.values() for app in vpc["apps"]}
    return [app for world in worlds for name in sorted(names) if name in world for app in world[name]["apps"]
            if (app["pid"], app["start"]) not in staying or not is_alive(app)]


def settle_peers(world, damaged=()):
    """A peering stands in two records; if a kill came between, the other half is filled in, or a lost end taken out."""
    for name, vpc in world.items():
        for peer in list(vpc["peers"]):
            other = world.get(peer["peer_vpc"])
            if peer["peer_vpc"] in damaged:
                continue
            if other is None:
                vpc["peers"].remove(peer)
            elif not any(back["peer_vpc"] == name for back in other["peers"]):
                other["peers"].append(dict(peer, peer_vpc=name, side="ab"[peer["side"] == "a"]))


def leftovers(seen, steps):
    """What is to be made, but whose name is taken by a mount or a cable that leads nowhere any more."""
    return [Step(SPACE if fact[0] == "ns" else LINK, fact, (),
                 ("ip netns del " if fact[0] == "ns" else "ip link del ") + fact[1], "a name that leads nowhere")
            for fact in sorted(seen.stale) if fact in steps]


def note_lost(ctl, world):
    """Say what this kernel could not do, and keep it in the record so that it is not tried again."""
    for step, said in ctl.run.lost:
        if step.fact[0] == "port" and step.fact[2] == "locked":
            for vpc in world.values():
                if any(subnet["veth"] + "-b" == step.fact[1] for subnet in vpc["subnets"]) and not vpc.get("unlocked"):
                    vpc["unlocked"] = True
                    ctl.note("this kernel cannot lock ports: %s" % step.optional)
    del ctl.run.lost[:]


# ------------------------------------------------------------------------------------------------ subnets

@command("add-subnet", "add-subnet blog web --cidr 10.20.1.0/24", VPC,
         arg("subnet", type=name_type, metavar="SUBNET", help="a name of your choice"),
         arg("--cidr", type=network_type, metavar="BLOCK", help="its range (default: the first free block)"),
         arg("--gw", type=address_type, metavar="ADDRESS", help="its gateway (default: the first address)"),
         changes=True)
def add_subnet(ctl, args):
    """add a subnet: a network namespace, plugged into the VPC's switch"""
    new = ctl.copy()
    if ctl.dry_run and args.vpc not in new and args.vpc not in ctl.damaged and args.cidr:
        ctl.note("there is no VPC %s yet; this is what would run if there were" % args.vpc)
        new[args.vpc] = new_vpc(ctl, args.vpc, str(as_network(args.cidr).supernet(new_prefix=16)), {})
        ctl.pretend(new)
        new = ctl.copy()
    vpc = ctl.vpc(args.vpc, new)
    known = [subnet for subnet in vpc["subnets"] if subnet["name"] == args.subnet]
    if known:
        for what, given in (("cidr", args.cidr), ("gw", args.gw)):
            if given and given != known[0][what]:
                raise Problem("subnet %s exists already with %s %s, not %s" % (args.subnet, what, known[0][what], given),
                              "use another name, or `vpcctl delete-subnet %s %s` first" % (args.vpc, args.subnet))
        return already(ctl, [args.vpc], "subnet %s (%s) exists already" % (args.subnet, known[0]["cidr"]))
    subnet = new_subnet(ctl, vpc, args.subnet, args.cidr, args.gw, new)
    vpc["subnets"].append(subnet)
    ctl.change(new)
    ctl.report("Added subnet %s (%s) to VPC %s" % (args.subnet, subnet["cidr"], args.vpc))


def new_subnet(ctl, vpc, name, cidr, gateway, world, used=None):
    """Check a new subnet against its VPC -> its record. `used`: kernel names in use, if the caller has them (and has
    seen to it that no two subnets overlap)."""
    import ipaddress
    block = as_network(cidr or first_free_block(vpc))
    if not inside(block, as_network(vpc["cidr"])):
        raise Problem("%s is not inside of VPC %s (%s)" % (block, vpc["name"], vpc["cidr"]),
                      "a subnet's range is a part of its VPC's, for example %s" % first_free_block(vpc))
    if block.prefixlen > 30:
        raise Problem("%s is too small for a subnet" % block, "the smallest is a /30: a gateway and one address")
    first, last = bounds(str(block))
    for other in vpc["subnets"] if used is None else ():
        low, high = bounds(other["cidr"])
        if first <= high and low <= last:
            raise Problem("%s overlaps subnet %s (%s)" % (block, other["name"], other["cidr"]),
                          "a free block: %s" % first_free_block(vpc))
    own = ipaddress.IPv4Address(first_address(vpc["cidr"]))
    gate = ipaddress.IPv4Address(gateway) if gateway else block[1]
    if gate not in block or gate in (block.network_address, block.broadcast_address):
        raise Problem("the gateway %s is not a usable address of %s" % (gate, block), "usable: %s to %s" % (block[1], block[-2]))
    address = next((ip for ip in (block[1], block[2], block[3]) if ip not in (gate, own)
                    and ip != block.broadcast_address), None)
    if address is None:
        raise Problem("%s has no address left for the subnet itself" % block, "take a larger block")
    used = record_names(world) | kernel_names(ctl) if used is None else used
    veth = short_name("v-", "%s-%s" % (vpc["name"], name), "-b", 15,
                      lambda found: found in used or found[:-1] + "a" in used)
    space = short_name("ns-", "%s-%s" % (vpc["name"], name), "", 80, used.__contains__)
    used.update((space, veth + "-a", veth + "-b"))
    return {"name": name, "cidr": str(block), "ns": space, "gw": str(gate), "host_ip": str(address), "veth": veth,
            "mac": hardware_address(str(address)), "policy": duplicate(DEFAULT_POLICY)}


def first_free_block(vpc):
    """The first free /24 of a VPC, or the largest smaller block that fits. Arithmetic: a /8 has 65,536 of them."""
    taken = sorted(bounds(subnet["cidr"]) for subnet in vpc["subnets"])
    start, end = bounds(vpc["cidr"])
    for length in range(max(24, int(vpc["cidr"].split("/")[1])), 31):
        size, at = 1 << (32 - length), start
        for low, high in taken + [(end + 1, end + 1)]:
            if at + size <= low:
                return "%s/%d" % (dotted(at), length)
            at = max(at, -(-(high + 1) // size) * size)
    raise Problem("VPC %s (%s) is full" % (vpc["name"], vpc["cidr"]), "delete a subnet, or make another VPC")


@command("delete-subnet", "delete-subnet blog web", VPC, SUBNET, changes=True)
def delete_subnet(ctl, args):
    """remove a subnet with its programs and published ports"""
    new = ctl.copy()
    vpc = ctl.vpc(args.vpc, new)
    subnet = ctl.subnet(vpc, args.subnet)
    apps = [app for app in vpc["apps"] if app["subnet"] == args.subnet]
    remove_subnet(vpc, subnet)
    ctl.change(new, before=lambda: stop_programs(ctl, apps, [subnet["ns"]]))
    ctl.report("Deleted subnet %s from VPC %s" % (args.subnet, args.vpc))


def remove_subnet(vpc, subnet):
    """Take a subnet out of a record, with all that hangs on it. Problem if a sibling's policy names it."""
    name = subnet["name"]
    for other in vpc["subnets"]:
        if other is not subnet and name in policy_names(other, vpc):
            raise Problem("the policy of subnet %s names %s" % (other["name"], name),
                          "`vpcctl reset-policy %s %s`, or apply another policy first" % (vpc["name"], other["name"]))
    vpc["subnets"].remove(subnet)
    vpc["apps"] = [app for app in vpc["apps"] if app["subnet"] != name]
    vpc["published"] = [published for published in vpc["published"] if published["subnet"] != name]
    if vpc.get("nat") and name in (vpc["nat"].get("subnets") or ()):
        vpc["nat"]["subnets"].remove(name)
        if not vpc["nat"]["subnets"]:
            vpc["nat"] = None
    settle_forward(vpc)


# ------------------------------------------------------------------------------------------------ NAT, published ports

@command("enable-nat", "enable-nat blog --interface eth0", VPC,
         arg("--interface", type=interface_type, metavar="INTERFACE",
             help="the host's way out (default: the default route's)", complete="interface"),
         arg("--subnet-filter", type=names_type, metavar="SUBNET,…", help="only these subnets (default: all)"),
         changes=True)
def enable_nat(ctl, args):
    """let a VPC reach the internet with the host's address"""
    new = ctl.copy()
    vpc = ctl.vpc(args.vpc, new)
    wanted = new_nat(ctl, vpc, args.interface, args.subnet_filter)
    if vpc.get("nat"):
        known = vpc["nat"]
        same = known["interface"] == wanted["interface"] and known.get("subnets") == wanted["subnets"]
        if not same:
            raise Problem("NAT of VPC %s is on already: by %s, for %s" % (
                args.vpc, known["interface"], ", ".join(known.get("subnets") or ["all subnets"])),
                "`vpcctl disable-nat %s` first" % args.vpc)
        return already(ctl, [args.vpc], "NAT of VPC %s is on already" % args.vpc)
    vpc["nat"] = wanted
    settle_forward(vpc, new_forward(new, wanted["interface"]))
    ctl.change(new)
    ctl.report("Enabled NAT for VPC %s via %s (%s)" % (args.vpc, wanted["interface"], ", ".join(nat_sources(vpc))))


def new_nat(ctl, vpc, interface, subnets):
    """Check a NAT -> its record."""
    interface = interface or default_interface()
    if not interface:
        raise Problem("this host has no default route", "name the way out with --interface")
    check_uplink(ctl, interface)
    for name in subnets or ():
        ctl.subnet(vpc, name)
    chosen = [subnet["name"] for subnet in vpc["subnets"] if subnet["name"] in subnets] if subnets else None
    return {"interface": interface, "subnets": chosen, "dns": name_servers()}


def check_uplink(ctl, interface):
    """Problem unless an interface is there and is not one of ours."""
    ours = record_names(ctl.world)
    if interface == "lo" or interface in ours:
        raise Problem("%s is not a way out" % interface, "`ip route | grep default` shows the interface")
    if interface not in host_interfaces():
        text = "there is no network interface '%s' here" % interface
        if ctl.dry_run:
            return ctl.note(text)
        raise Problem(text, "there are: %s; `ip route | grep default` shows which leads out"
                      % ", ".join(name for name in host_interfaces() if name != "lo" and name not in ours))


def default_interface():
    """The interface of the host's default route, or None. Asks nobody."""
    with open("/proc/net/route", "rb") as table:
        rows = [os.fsdecode(line).split() for line in list(table)[1:]]
    ways = [(int(row[6]), row[0]) for row in rows if row[1] == "00000000" and row[7] == "00000000"]
    return min(ways)[1] if ways else None


def name_servers():
    """Name servers that can be reached from a namespace: the host's, but not a stub on its loopback."""
    for path in ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"):
        try:
            with open(path) as handle:
                found = re.findall(r"(?m)^\s*nameserver\s+(%s)\s*$" % _ADDRESS, handle.read())
        except (OSError, ValueError):
            continue
        found = [address for address in found if not address.startswith("127.")]
        if found:
            return found[:3]
    return ["1.1.1.1", "9.9.9.9"]


def new_forward(world, uplink, before=()):
    """What the host's own forwarding was before the first NAT: kept, so that the last one can put it back.
    `before`: records that are about to be replaced, and may be those that know."""
    for vpc in list(before) + list(world.values()):
        if vpc.get("forward"):
            return vpc["forward"]
    ours = record_names(world) | {"lo", uplink}
    was = sysctl_value("net.ipv4.ip_forward") or "0"
    if was != "0":
        return {"was": was, "kept_off": []}
    switches = {name: sysctl_value(link_conf("ipv4", name, "forwarding")) for name in host_interfaces()}
    return {"was": was, "kept_off": [name for name in switches if name not in ours and switches[name] == "0"],
            "kept_on": [name for name in switches if name not in record_names(world) and switches[name] == "1"]}


def settle_forward(vpc, forward=None):
    """Keep the note on the host's forwarding for as long as this VPC needs it."""
    if not vpc.get("nat") and not vpc["published"]:
        vpc.pop("forward", None)
    elif forward and not vpc.get("forward"):
        vpc["forward"] = forward


@command("disable-nat", "disable-nat blog", VPC, changes=True)
def disable_nat(ctl, args):
    """take the internet away again"""
    new = ctl.copy()
    vpc = ctl.vpc(args.vpc, new)
    if not vpc.get("nat"):
        return ctl.report("NAT of VPC %s is off already" % args.vpc)
    vpc["nat"] = None
    settle_forward(vpc)
    ctl.change(new)
    ctl.report("Disabled NAT for VPC %s" % args.vpc)


@command("publish", "publish blog web --port 8080:80", VPC, SUBNET,
         arg("--port", type=publish_type, required=True, metavar="HOSTPORT[:PORT]", help="the host's port, the subnet's"),
         arg("--protocol", choices=("tcp", "udp"), default="tcp", help="tcp (default) or udp"),
         arg("--interface", type=interface_type, metavar="INTERFACE",
             help="where requests come in (default: the default route's)", complete="interface"), changes=True)
def publish(ctl, args):
    """make a port of a subnet reachable from outside"""
    new = ctl.copy()
    vpc = ctl.vpc(args.vpc, new)
    ctl.subnet(vpc, args.subnet)
    if add_published(ctl, new, vpc, args.subnet, args.interface, args.protocol, *args.port):
        return already(ctl, [args.vpc], "port %d is published already" % args.port[0])
    settle_forward(vpc, new_forward(new, vpc["published"][-1]["interface"]))
    ctl.change(new)
    ctl.report("Published %s port %d of %s as port %d" % (args.protocol, args.port[1], args.subnet, args.port[0]))


def add_published(ctl, world, vpc, subnet_name, interface, protocol, host_port, port):
    """Check a published port and write it into the record -> whether it was there already."""
    uplink = interface or default_interface()
    if not uplink:
        raise Problem("this host has no default route", "name the way in with --interface")
    check_uplink(ctl, uplink)
    wanted = {"subnet": subnet_name, "host_port": host_port, "port": port, "protocol": protocol, "interface": uplink}
    for name, other in world.items():
        for known in other["published"]:
            if (known["protocol"], known["host_port"]) == (protocol, host_port):
                if name == vpc["name"] and known == wanted:
                    return True
                raise Problem("%s port %d is published already: for %s %s, port %d" % (
                    protocol, host_port, name, known["subnet"], known["port"]), "take another host port")
    vpc["published"].append(wanted)
    return False


@command("unpublish", "unpublish blog web --port 8080", VPC, SUBNET,
         arg("--port", type=publish_type, required=True, metavar="HOSTPORT", help="the host's port"),
         arg("--protocol", choices=("tcp", "udp"), default="tcp", help="tcp (default) or udp"), changes=True)
def unpublish(ctl, args):
    """take a published port back"""
    new = ctl.copy()
    vpc = ctl.vpc(args.vpc, new)
    ctl.subnet(vpc, args.subnet)
    left = [published for published in vpc["published"] if
            (published["subnet"], published["host_port"], published["protocol"]) != (args.subnet, args.port[0], args.protocol)]
    if left == vpc["published"]:
        raise Problem("%s port %d is not published for subnet %s" % (args.protocol, args.port[0], args.subnet),
                      "`vpcctl inspect %s` shows what is" % args.vpc)
    vpc["published"] = left
    settle_forward(vpc)
    ctl.change(new)
    ctl.report("Unpublished %s port %d of %s" % (args.protocol, args.port[0], args.subnet))


# ------------------------------------------------------------------------------------------------ peering

@command("peer", "peer blog shop --allow-cidrs 10.20.1.0/24,10.30.1.0/24",
         arg("vpc1", type=name_type, metavar="VPC1", help="one VPC", complete="vpc"),
         arg("vpc2", type=name_type, metavar="VPC2", help="the other", complete="vpc"),
         arg("--allow-cidrs", type=networks_type, required=True, metavar="BLOCK,…",
             help="blocks of either VPC that may talk with each other"), changes=True)
def peer(ctl, args):
    """connect two VPCs: the blocks named may talk, nothing else"""
    new = ctl.copy()
    a, b = ctl.vpc(args.vpc1, new), ctl.vpc(args.vpc2, new)
    for known in a["peers"]:
        if known["peer_vpc"] == args.vpc2:
            if sorted(known["allowed"]) != sorted(args.allow_cidrs):
                raise Problem("%s and %s are peered already, for %s" % (args.vpc1, args.vpc2, ", ".join(known["allowed"])),
                              "`vpcctl unpeer %s %s` first" % (args.vpc1, args.vpc2))
            return already(ctl, [args.vpc1, args.vpc2], "%s and %s are peered already" % (args.vpc1, args.vpc2))
    add_peering(ctl, new, a, b, args.allow_cidrs)
    ctl.change(new)
    ctl.report("Peered VPC %s with %s (allowed: %s)" % (args.vpc1, args.vpc2, ", ".join(args.allow_cidrs)))


def add_peering(ctl, world, a, b, allowed, used=None):
    """Check a peering and write it into both records. `used`: kernel names in use, if the caller has them."""
    if a is b:
        raise Problem("a VPC cannot be peered with itself: %s" % a["name"], "subnets of one VPC may talk as they are")
    of_a, of_b = sides(a, b, allowed)
    for block in allowed:
        if block not in of_a + of_b:
            raise Problem("%s is neither in %s (%s) nor in %s (%s)" % (block, a["name"], a["cidr"], b["name"], b["cidr"]),
                          "name blocks of the two VPCs")
    for vpc, blocks in ((a, of_a), (b, of_b)):
        if not blocks:
            raise Problem("no block of VPC %s is named, so nothing could talk" % vpc["name"],
                          "add one, for example %s" % (vpc["subnets"][0]["cidr"] if vpc["subnets"] else vpc["cidr"]))
    used = record_names(world) | kernel_names(ctl) if used is None else used
    pair = "%s-%s" % (a["name"], b["name"])
    base = short_name("pv-", pair, "-a", 15, lambda found: found in used or found[:-1] + "b" in used)
    chains = used if ctl.dry_run else used | other_chains(ctl)
    chain = short_name("vpc-peer-", pair, "", 28, chains.__contains__)
    used.update((base + "-a", base + "-b", chain))
    entry = {"veth_a": base + "-a", "veth_b": base + "-b", "chain": chain, "allowed": list(allowed)}
    a["peers"].append(dict(entry, peer_vpc=b["name"], side="a"))
    b["peers"].append(dict(entry, peer_vpc=a["name"], side="b"))


@command("unpeer", "unpeer blog shop",
         arg("vpc1", type=name_type, metavar="VPC1", help="one VPC", complete="vpc"),
         arg("vpc2", type=name_type, metavar="VPC2", help="the other", complete="peer"), changes=True)
def unpeer(ctl, args):
    """take a peering back; open connections end"""
    new = ctl.copy()
    a, b = ctl.vpc(args.vpc1, new), ctl.vpc(args.vpc2, new)
    if not remove_peering(a, b):
        raise Problem("VPC %s and VPC %s are not peered" % (args.vpc1, args.vpc2),
                      "`vpcctl inspect %s` shows its peers" % args.vpc1)
    ctl.change(new)
    ctl.report("Unpeered VPC %s and %s" % (args.vpc1, args.vpc2))


def remove_peering(a, b):
    """Take a peering out of both records -> whether there was one."""
    found = False
    for vpc, other in ((a, b), (b, a)):
        left = [peer for peer in vpc["peers"] if peer["peer_vpc"] != other["name"]]
        found = found or left != vpc["peers"]
        vpc["peers"] = left
    return found


# ------------------------------------------------------------------------------------------------ policies

@command("apply-policy", "apply-policy blog policies/web.json", VPC,
         arg("file", type=path_type, metavar="FILE", help="the policy, as JSON; - reads standard input", complete="file"), changes=True)
def apply_policy(ctl, args):
    """put a subnet's firewall rules in place of those it has"""
    new = ctl.copy()
    vpc = ctl.vpc(args.vpc, new)
    subnet, policy = read_policy(ctl, vpc, args.file)
    set_policy(ctl, new, vpc, subnet, policy)


def set_policy(ctl, new, vpc, subnet, policy):
    """Give a subnet a policy, and say what its two directions do with what no rule names."""
    subnet["policy"] = policy
    policy_names(subnet, vpc)
    if new == ctl.world:
        already(ctl, [vpc["name"]], "subnet %s has this policy already" % subnet["name"])
    else:
        ctl.change(new)
        ctl.report("Applied policy to subnet %s (%s)" % (subnet["name"], subnet["cidr"]))
    for direction in ("ingress", "egress"):
        action, why = policy_default(policy, direction)
        ctl.report("  %s: %s; everything else is %s (%s)" % (
            direction, counted(len(policy.get(direction) or ()), "rule"), "dropped" if action == "deny" else "let through", why))


@command("reset-policy", "reset-policy blog web", VPC, SUBNET, changes=True)
def reset_policy(ctl, args):
    """give a subnet the default policy again"""
    new = ctl.copy()
    vpc = ctl.vpc(args.vpc, new)
    set_policy(ctl, new, vpc, ctl.subnet(vpc, args.subnet), duplicate(DEFAULT_POLICY))


def parse_json(text):
    """JSON -> what it holds; ValueError if it is none, or if an object has a key twice."""
    def once(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = sorted(key for key, _ in pairs)
            twice = next(key for key, following in zip(keys, keys[1:]) if key == following)
            raise ValueError(f"the key '{twice:.80}' is given twice")
        return found
    return json.loads(text, object_pairs_hook=once)


def read_json(path, what):
    """Read a JSON file (- is standard input). Problem names the file and the line. A key given twice is refused."""
    try:
        if path == "-":
            return parse_json(sys.stdin.read())
        with open(path, encoding="utf-8") as handle:
            return parse_json(handle.read())
    except OSError as error:
        raise Problem("cannot read the %s %s: %s" % (what, path, error.strerror)) from None
    except (ValueError, RecursionError) as error:
        raise Problem("%s is not JSON: %s" % (spoken(path), error), "the README shows the format") from None


def spoken(path):
    """A file's name for people."""
    return "standard input" if path == "-" else path


def read_policy(ctl, vpc, path):
    """A policy file -> (the subnet it is for, the policy). Problem names file, direction and rule number."""
    policy, path = read_json(path, "policy file"), spoken(path)
    if not isinstance(policy, dict):
        raise Problem("%s: a policy is an object with subnet, ingress, egress" % path)
    target = policy.get("subnet")
    if not isinstance(target, str):
        raise Problem("%s: 'subnet' is missing; it names the subnet or its range" % path)
    found = [subnet for subnet in vpc["subnets"] if target in (subnet["name"], subnet["cidr"])]
    if not found:
        raise Problem("%s: VPC %s has no subnet '%.80s'" % (path, vpc["name"], target), "its subnets: %s" % (", ".join(
            "%s (%s)" % (subnet["name"], subnet["cidr"]) for subnet in vpc["subnets"]) or "none"))
    body = {key: value for key, value in policy.items() if key != "subnet"}
    return found[0], check_policy(body, path)


def check_policy(policy, place):
    """Check a policy strictly -> the policy with both lists. A typo must never become another rule."""
    if not isinstance(policy, dict):
        raise Problem("%s: a policy is an object with ingress and egress" % place)
    for key in policy:
        if key not in ("ingress", "egress", "default"):
            raise Problem("%s: unknown key '%.80s'" % (place, key), "known: subnet, ingress, egress, default")
    default = policy.get("default")
    if default is not None:
        if not isinstance(default, dict) or any(key not in ("ingress", "egress") or value not in ("allow", "deny")
                                                for key, value in default.items()):
            raise Problem("%s: default is %s" % (place, told(default)),
                          'write it like {"ingress": "deny", "egress": "allow"}')
    checked = {"ingress": [], "egress": []}
    for direction in checked:
        rules = policy.get(direction, [])
        if not isinstance(rules, list):
            raise Problem("%s: %s is not a list" % (place, direction))
        for number, rule in enumerate(rules, 1):
            check_rule(rule, direction, "%s: %s rule %d" % (place, direction, number))
            checked[direction].append(rule)
    if default:
        checked["default"] = default
    return checked


def check_rule(rule, direction, place):
    """Problem unless a policy rule says one thing, in known words."""
    side = "from" if direction == "ingress" else "to"
    if not isinstance(rule, dict):
        raise Problem("%s is not an object" % place, 'write it like {"port": 80, "protocol": "tcp", "action": "allow"}')
    for key in rule:
        if key not in ("port", "protocol", "action", side):
            raise Problem("%s has an unknown key '%.80s'" % (place, key), "known: port, protocol, action, %s" % side)
    if rule.get("action") not in ("allow", "deny"):
        raise Problem("%s: action is %s" % (place, told(rule.get("action"))), "allow or deny")
    if rule.get("protocol") not in PROTOCOLS:
        raise Problem("%s: protocol is %s" % (place, told(rule.get("protocol"))), "tcp, udp, icmp or all")
    if "port" in rule and rule["protocol"] not in ("tcp", "udp"):
        raise Problem(f"{place}: {rule['protocol']} has no port")
    peer = rule.get(side, "any")
    if not isinstance(peer, str) or not (is_block(peer) or NAME.match(peer)):
        raise Problem(f"{place}: {side} is {told(peer)}", "a block or a subnet of this VPC")
    try:
        if "port" in rule:
            ports(rule["port"])
        if is_block(peer):
            bounds(peer)
    except Problem as problem:
        raise Problem(f"{place}: {problem}", problem.hint) from None


def is_block(peer):
    """Whether the other side of a rule is meant as a block; no subnet's name has a dot or a slash."""
    return "/" in peer or "." in peer


# ------------------------------------------------------------------------------------------------ programs

@command("deploy-app", "deploy-app blog web --port 8080", VPC, SUBNET,
         arg("--port", type=port_type, required=True, metavar="PORT", help="where it listens"),
         arg("--env", action="append", type=variable_type, metavar="KEY=VALUE",
             help="a variable for the program; may be given again; root alone can read it later"),
         arg("--workdir", type=folder_type, metavar="FOLDER", help="where it runs (default: a folder of its own)"),
         arg("program", nargs="*", metavar="-- COMMAND…", help="a program of your own (default: a web page)"),
         changes=True, more="""
How it runs: as a user of its own without any right, in a folder of its own with one page in it (or --workdir),
with PATH, HOME=/, LANG=C.UTF-8, PYTHONUNBUFFERED=1 and what --env says, and with no input; `vpcctl logs` shows
what it prints. A program without a / is looked for in PATH. It may stay in the foreground or go into the
background: whoever listens on the port 10 seconds later at most is the app.""")
def deploy_app(ctl, args):
    """start a program in a subnet: a small web server, or one of your own"""
    new = ctl.copy()
    vpc = ctl.vpc(args.vpc, new)
    subnet = ctl.subnet(vpc, args.subnet)
    wanted, variables = new_app(vpc, subnet, args.port, args.program, args.workdir), dict(args.env or ())
    for app in vpc["apps"]:
        if (app["subnet"], app["port"]) == (args.subnet, args.port):
            other = difference_of_apps(ctl, app, wanted, variables)
            if other:
                raise Problem(f"{other} is deployed there on port {args.port}: {program_text(app)}",
                              f"`vpcctl stop-app {args.vpc} {args.subnet} --port {args.port}` first")
            return already(ctl, [args.vpc], "the app in subnet %s on port %d is there already" % (args.subnet, args.port))
    give_variables(ctl, wanted, variables)
    vpc["apps"].append(wanted)
    prepare_apps(ctl, [wanted])
    ctl.change(new, after=lambda _: start_apps(ctl, [(args.vpc, wanted)]))
    ctl.report("Deployed app in subnet %s (%s) on port %d, PID=%d" % (
        args.subnet, subnet["ns"], args.port, wanted["pid"]))


def new_app(vpc, subnet, port, program, workdir=None):
    """The record of an app that is to be started; `prepare_apps` completes it."""
    app = {"subnet": subnet["name"], "ns": subnet["ns"], "port": port, "pid": 0, "start": "", "cmd": [],
           "log": app_log(subnet["ns"], port)}
    given = {"command": list(program or ()), "workdir": workdir}
    return dict(app, **{key: value for key, value in given.items() if value})


def program_text(app):
    """What an app runs, on one line."""
    folder = f" in {app['workdir']}" if app.get("workdir") else ""
    names = " with " + ", ".join(app["env"]["names"]) if app.get("env") else ""
    return (shown(app["command"]) if app.get("command") else "(page)") + folder + names


def difference_of_apps(ctl, app, wanted, variables):
    """What an app that is deployed is, compared with one that is wanted with some variables; empty if the same."""
    if app.get("command") != wanted.get("command"):
        return "another program"
    if app.get("workdir") != wanted.get("workdir"):
        return "a program in another folder"
    known = variables_of(ctl, app)
    same = known == variables if known is not None else app["env"]["names"] == sorted(variables)
    return "" if same else "a program with other variables"


# A record can be read by everybody, so it holds the names of an app's variables, and the number of the file with
# their values: another file for each deployment, so that a failed one leaves the old values as they were.

def give_variables(ctl, app, variables):
    """Give an app that is to be started its variables: `open_variables` writes them."""
    if variables:
        app["env"] = {"id": os.urandom(8).hex(), "names": sorted(variables)}
        ctl.variables[app["env"]["id"]] = variables


def variables_file(app):
    """The name of the file with an app's variables, or None."""
    return f"app_{app['ns']}_{app['port']}_{app['env']['id']}.env" if app.get("env") else None


def open_variables(ctl, app):
    """Open what an app reads first: its variables, or nothing -> descriptor. Problem if they are lost."""
    if not app.get("env"):
        return os.open(os.devnull, os.O_RDONLY)
    path, values = os.path.join(ctl.store.folder, variables_file(app)), ctl.variables.get(app["env"]["id"])
    if values is not None:
        with os.fdopen(open_private(path, os.O_WRONLY | os.O_TRUNC), "w", encoding="utf-8") as handle:
            json.dump(values, handle)
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        raise Problem(f"the variables of the app in subnet {app['subnet']} on port {app['port']} are lost: {path}: "
                      f"{error.strerror}", "deploy it again with --env", 3) from None


def variables_of(ctl, app):
    """An app's variables; None if we may not look, or if they are lost."""
    if not app.get("env"):
        return {}
    try:
        return json.loads(read_bytes(os.path.join(ctl.store.folder, variables_file(app))).decode())
    except (OSError, ValueError):
        return None


def app_log(space, port):
    """The name of the file that an app's output goes to."""
    return f"app_{space}_{port}.log"


def prepare_apps(ctl, apps):
    """Before apps are started: each gets a user id of its own, unless it can keep one, and its command."""
    apps, users = list(apps), app_users()
    held = [vpc for vpc in list(ctl.world.values()) + list(ctl.intents.values()) if vpc]
    taken = {app.get("user") for vpc in held for app in vpc["apps"]} | {app.get("user") for app in apps}
    if users and apps and not ctl.dry_run:
        taken |= {process.user for process in processes().values()}
    for app in apps:
        if not users:
            app.pop("user", None)
        elif not users[0] <= (own_user(app) or 0) <= users[1]:
            app["user"] = free_user(users, taken, "%s %s %d" % (ctl.store.folder, app["ns"], app["port"]))
            taken.add(app["user"])
        app["cmd"] = list(app_command(app))


def free_user(users, taken, place):
    """A user id for an app. It comes from its place, so that a dry run says what will be, and from the
    namespace of processes: a sandbox has its own, but from outside its processes are seen. Problem if none
    is left."""
    import zlib
    first, last = users
    begin = zlib.crc32(("%s %d" % (place, os.stat("/proc/self/ns/pid").st_ino)).encode())
    for number in range(last - first + 1):
        user = first + (begin + number) % (last - first + 1)
        if user not in taken and not is_account(user):
            return user
    raise Problem("no user id from %d to %d is free for another app" % users, "stop an app", 3)


def app_users():
    """The user ids that apps get here: (first, last). None in an ordinary user's sandbox: it has but one."""
    try:
        maps = []
        for kind in ("uid", "gid"):
            with open("/proc/self/%s_map" % kind) as table:
                maps.append([[int(word) for word in row.split()] for row in table])
    except OSError:
        return APP_USERS[0]                       # a kernel without user namespaces
    for first, last in APP_USERS:
        if all(any(low < first and last < low + count for low, _, count in rows) for rows in maps):
            return first, last
    return None


def is_app_user(user):
    """Whether a user id is one that apps get, and no account has it (or the unused one before its range)."""
    return any(first <= user <= last and not is_account(user) and not is_account(first - 1)
               for first, last in APP_USERS)


def own_user(app):
    """The user id that an app has to itself, or None: an older vpcctl, or one in a sandbox of an ordinary
    user, gave it none, or an account has been made with it since, whose programs are not ours to end."""
    user = app.get("user")
    return user if user and not is_account(user) else None


def is_account(user):
    """Whether an account or a group of this machine has an id, or may use it in its containers."""
    return any(first <= user <= last for first, last in accounts())


@lru_cache(None)
def accounts():
    """The ids of this machine's accounts and groups, and of their containers: [(first, last)]."""
    found = []
    for name, pattern in (("passwd", rb"(\d+):(\d+):"), ("group", rb"(\d+):()"),
                          ("subuid", b""), ("subgid", b"")):
        try:
            table = read_bytes("/etc/" + name)
        except OSError:
            continue
        if pattern:                               # NAME:PASSWORD:ID…, and an account's own group
            ids = re.findall(rb"(?m)^[^:\n]*:[^:\n]*:" + pattern, table)
            found += [(int(one), int(one)) for pair in ids for one in pair if one]
        else:                                     # NAME:FIRST:COUNT
            found += [(int(first), int(first) + int(count) - 1)
                      for first, count in re.findall(rb"(?m)^[^:\n]*:(\d+):(\d+)", table)]
    return found


# Variables are set when all rights are given up (`ip` loads what some of them name), and in no process's arguments.
WITH_VARIABLES = ("import json, os, sys; os.environ.update(json.load(sys.stdin)); "
                  "sys.excepthook = lambda _, error, at: print(sys.argv[1] + ':', error.strerror); "
                  "os.dup2(os.open(os.devnull, 0), 0); os.execvp(sys.argv[1], sys.argv[1:])")


def app_command(app):
    """The command that starts an app in its namespace: as its user, if it has one, without any capability."""
    user = ()
    if app.get("user"):
        user = ("--reuid=%d" % app["user"], "--regid=%d" % app["user"], "--clear-groups")
    program = tuple(app.get("command") or (app_python(), "-m", "http.server", str(app["port"])))
    if app.get("env"):
        program = (app_python(), "-ISc", WITH_VARIABLES) + program
    return ("ip", "netns", "exec", app["ns"], "setpriv") + user + ("--bounding-set=-all", "--inh-caps=-all",
                                                                   "--no-new-privs") + program


def app_python():
    """A Python that an app's user may run: the system's, or ours if every folder on its way is open."""
    for path in ("/usr/bin/python3", "/usr/local/bin/python3", os.path.realpath(sys.executable)):
        folder = os.path.realpath(path)
        if os.path.exists(folder) and not app_users():
            return path
        while os.path.exists(folder) and os.stat(folder).st_mode & 0o001 and folder != "/":
            folder = os.path.dirname(folder)
        if folder == "/":
            return path
    return "python3"


def start_apps(ctl, apps):
    """Start programs, side by side, and wait until all listen; apps: [(VPC name, app record)].

    Problem 3, with the last lines of its log, if one does not; all of them are ended then.
    """
    children = []
    try:
        for vpc_name, app in apps:
            ctl.run.echo(tuple(app["cmd"]) + ("&",), "a program in the subnet")
            if not ctl.dry_run:
                children.append((app, spawn_app(ctl, vpc_name, app)))
        await_apps(ctl, children)
        for app, child in children:
            child.returncode = 0                  # it outlives us on purpose: no warning that it was not waited for
    except BaseException:
        stop_programs(ctl, [app for app, _ in children])
        for app, child in children:
            child.returncode, app["pid"] = None, 0
            if child.poll() is None:              # it was about to become the app, and still root
                child.kill()
                child.wait()
                stop_programs(ctl, [app])
        raise


def await_apps(ctl, children):
    """Wait until programs listen, and write down who does; children: [(app record, child process)]. Problem 3 if one
    does not: at once when all that it started has ended."""
    import time
    deadline, waiting, seen = time.monotonic() + APP_WAIT, list(children), {}
    while waiting:
        for app, child in list(waiting):
            ended = child.poll() is not None      # asked first: what it has left behind is there by now
            pid = app["pid"] = found_app(app)
            now = time.monotonic()
            if pid and now > seen.setdefault(pid, now) + SETTLE_WAIT:
                app["start"] = process_start(pid)
                waiting.remove((app, child))
                note_listeners(ctl, app)
            elif not pid and (now > deadline or (ended and not app_processes(app))):
                raise silent_app(ctl, app, child)
        ctl.run.heed()
        time.sleep(0.01)


def found_app(app):
    """Which process of an app that was just started listens on its port -> its PID; 0 if none does yet. The port was
    free before, so with one user for all apps it is whoever has it: a program that goes into the background may
    have left its parents, and some overwrite the environment by which it is known."""
    if not listeners_on(app):
        return 0                                  # a quick look first: most take a while until they listen
    user = app.get("user", os.geteuid())
    found = holders(app, {pid: process for pid, process in processes().items() if process.user == user})
    return found[0] if found else 0


def note_listeners(ctl, app):
    """When an app listens: by which protocol, and whether others can reach it."""
    found = listeners_on(app)
    app.pop("protocol", None)
    if found and not any(one.kind.startswith("tcp") for one in found):
        app["protocol"] = "udp"                   # what `explain` and `graph` say of it
    where = sorted({one.address for one in found})
    if where and all(is_loopback(address) for address in where):
        ctl.note(f"the app in subnet {app['subnet']} on port {app['port']} listens on {' and '.join(where)} only: "
                 "no other subnet reaches it; let it listen on every address (0.0.0.0)")


def is_loopback(address):
    """Whether only programs in the same namespace reach an address."""
    return address.startswith("127.") or address == "::1"


def silent_app(ctl, app, child):
    """The Problem for a program that does not listen: what it said, and what to do."""
    said = last_lines(os.path.join(ctl.store.folder, app["log"])) or "it said nothing"
    left, inside = app_processes(app), set()
    if left:
        held = set().union(*map(sockets_of, left))
        inside = {one.port for one in in_namespace(app["ns"], listeners) if one.inode in held}
    hint = "is the command right?"
    if inside:
        hint = f"it listens on {', '.join(map(str, sorted(inside)))} instead: name that with --port"
    elif left and child.returncode is not None:
        hint = "it went into the background: its own option to stay in the foreground may tell why " \
               "(nginx: -g 'daemon off;')"
    return Problem(f"the app in subnet {app['subnet']} does not listen on port {app['port']}: {said}", hint, 3)


def spawn_app(ctl, vpc_name, app):
    """Start a program in its namespace -> the child process."""
    import subprocess
    if app["port"] in in_namespace(app["ns"], listening):
        raise Problem("port %d is in use already in %s" % (app["port"], app["ns"]),
                      "take another --port; `vpcctl exec %s %s -- ss -lnp` shows who" % (vpc_name, app["subnet"]), 3)
    folder = app.get("workdir") or prepare_page(vpc_name, app)
    if not os.path.isdir(folder):
        raise Problem(f"the app in subnet {app['subnet']} on port {app['port']} is to run in {folder}: "
                      "there is no such folder", "make it, or deploy the app with another --workdir", 3)
    environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/", "LANG": "C.UTF-8",
                   "PYTHONUNBUFFERED": "1", "VPCCTL_APP": app_tag(app)}
    variables = open_variables(ctl, app)
    log = open_private(os.path.join(ctl.store.folder, app["log"]), os.O_WRONLY | os.O_TRUNC | os.O_APPEND)
    try:
        return popen(app["cmd"], stdin=variables, stdout=log, stderr=subprocess.STDOUT, cwd=folder, env=environment)
    finally:
        os.close(log)
        os.close(variables)


def prepare_page(vpc_name, app):
    """An empty folder of its own for each app, with one page that says where it is; never the current folder."""
    folder = page_folder(vpc_name, app)
    os.makedirs(folder, 0o755, exist_ok=True)
    _tee(folder + "/index.html", "<!doctype html><title>%(subnet)s</title><h1>%(vpc)s / %(subnet)s</h1>\n"
         "<p>Hello from subnet %(subnet)s of VPC %(vpc)s, port %(port)d.</p>\n" % dict(app, vpc=vpc_name))
    return folder


def tidy_apps(ctl, names, new, keep_logs=False):
    """Remove pages, logs and variables of apps of these VPCs that are in no record. What is on the disk counts,
    rather than what an older record says: so nothing is forgotten if a kill comes in between."""
    for name in names:
        folder = "%s/%s/www" % (RUN_DIR, name)
        kept = {page_folder(name, app) for app in (new.get(name) or {"apps": ()})["apps"]}
        for entry in os.listdir(folder) if os.path.isdir(folder) else ():
            if "%s/%s" % (folder, entry) not in kept:
                remove_tree("%s/%s" % (folder, entry))
        if not kept:
            _rmdir(folder)
    if ctl.damaged:
        return
    kept = {name for vpc in new.values() for app in vpc["apps"] for name in (app["log"], variables_file(app))}
    for entry in os.listdir(ctl.store.folder):
        if re.match(r"app_.+\.env\Z" if keep_logs else r"app_.+\.(log|env)\Z", entry) and entry not in kept:
            _unlink(os.path.join(ctl.store.folder, entry))


def page_folder(vpc_name, app):
    """Where an app's page is."""
    return "%s/%s/www/%s-%d" % (RUN_DIR, vpc_name, app["subnet"], app["port"])


def app_tag(app):
    """What an app carries in its environment: by it one is found that has no user id of its own."""
    return "%s/%d" % (app["ns"], app["port"])


Listener = namedtuple("Listener", "kind address port inode")    # kind: tcp, tcp6, udp, udp6


def listeners(table="thread-self", kinds=("tcp", "tcp6", "udp", "udp6")):
    """Sockets that take what comes, in the calling thread's namespace (or that of a process) -> Listeners."""
    found = []
    for kind in kinds:
        try:
            with open(f"/proc/{table}/net/{kind}") as rows:
                fields = [row.split() for row in list(rows)[1:]]
        except OSError:
            continue                              # this kernel has no IPv6
        for row in fields:
            if row[3] == ("0A" if kind.startswith("tcp") else "07"):
                address, _, port = row[1].rpartition(":")
                found.append(Listener(kind, printed_address(address), int(port, 16), int(row[9])))
    return found


def printed_address(digits):
    """An address as /proc/net prints it (words in this machine's byte order) -> as people write it; an IPv4
    address that an IPv6 socket holds is written as IPv4."""
    import ipaddress
    words = [int(digits[place:place + 8], 16).to_bytes(4, sys.byteorder) for place in range(0, len(digits), 8)]
    address = ipaddress.ip_address(b"".join(words))
    return str(getattr(address, "ipv4_mapped", None) or address)


def listening(table="thread-self", kinds=("tcp", "tcp6", "udp", "udp6")):
    """Ports with a listener in the calling thread's namespace (or that of a process)."""
    return {found.port for found in listeners(table, kinds)}


def sockets_of(pid):
    """The inodes of the sockets that a process holds; none if it has ended."""
    look = lambda path: [os.readlink(os.path.join(path, number)) for number in os.listdir(path)]
    try:
        return {int(name[8:-1]) for name in by_threads(pid, "fd", look) if name.startswith("socket:[")}
    except OSError:
        return set()


def socket_owner(inode, space):
    """The short name of the process in a namespace that holds a socket; an empty string if none is found."""
    known = processes()
    return next((known[pid].name for pid in processes_in([space], known) if inode in sockets_of(pid)), "")


def process_start(pid):
    """A process's identity beside its number: boot id and start time; empty if it has ended."""
    try:
        fields = read_bytes("/proc/%d/stat" % pid).rpartition(b")")[2].split()
        boot = read_bytes("/proc/sys/kernel/random/boot_id").decode().strip()
    except OSError:
        return ""
    ended = fields[0] in b"ZX" and int(fields[17]) <= 1           # not only the first of its threads
    return "" if ended else "%s/%d" % (boot, int(fields[19]))


def is_process(app):
    """Whether the process that was written down runs: PID, start time, boot and network namespace must all match.
    (Others than root cannot see the namespace.)"""
    if app["pid"] <= 1 or not app["start"] or process_start(app["pid"]) != app["start"]:
        return False
    try:
        return bool(os.geteuid()) or network_of(app["pid"]) == os.stat(os.path.join(NETNS_DIR, app["ns"])).st_ino
    except OSError:
        return False


def is_alive(app):
    """Whether an app runs."""
    return pid_of(app) > 0


def pid_of(app):
    """The PID of a running app; 0 if it has ended. One that goes into the background may leave to its successor
    after we have looked, as some servers do when they start anew: that is found by what it holds."""
    if is_process(app) or not app["start"]:
        return app["pid"] if app["start"] else 0
    return next(iter(holders(app, app_processes(app))), 0)


def app_processes(app):
    """All processes that are an app's, wherever they went -> {pid: Process}."""
    known = processes()
    if own_user(app):
        return {pid: process for pid, process in known.items() if process.user == own_user(app)}
    return {pid: known[pid] for pid in kin(app, known)}


def holders(app, known):
    """Which of these processes have a socket that listens on an app's port, in its namespace -> PIDs, the eldest
    first. Others than root cannot see whose a socket is: for them, those in whose namespace there is one."""
    if os.geteuid():
        found = [pid for pid in known if app["port"] in listening(pid)]
    else:
        wanted = {one.inode for one in listeners_on(app)}
        inside = processes_in([app["ns"]], known) if wanted else ()
        found = [pid for pid in inside if wanted & sockets_of(pid)]
    return sorted(found, key=lambda pid: (int(process_start(pid).rpartition("/")[2] or 0), pid))


def listeners_on(app):
    """What listens on an app's port in its namespace -> list of Listeners."""
    try:
        return [one for one in in_namespace(app["ns"], listeners) if one.port == app["port"]]
    except OSError:
        return []                                 # there is no such namespace


def by_threads(pid, name, look):
    """What look(path) says of a process's file in /proc. OSError if it has ended; if its first thread has,
    and others go on, only theirs have something in it."""
    for thread in os.listdir("/proc/%d/task" % pid):
        try:
            found = look("/proc/%d/task/%s/%s" % (pid, thread, name))
        except OSError:
            continue
        if found:
            return found
    raise OSError(errno.ESRCH, os.strerror(errno.ESRCH), "/proc/%d/%s" % (pid, name))


def network_of(pid):
    """The inode of a process's network namespace. OSError if it has ended."""
    return by_threads(pid, "ns/net", lambda path: os.stat(path).st_ino)


Process = namedtuple("Process", "name parent user session")
# The kernel spells out a newline in a name. Of a zombie with more than one thread only the first thread has
# ended.
STATUS = re.compile(rb"Name:\t(.*)\n(?:.*\n)*?State:\t(.).*\n(?:.*\n)*?PPid:\t(\d+)\n(?:.*\n)*?"
                    rb"Uid:\t(\d+)\t.*\n(?:.*\n)*?NSsid:\t(\d+).*\n(?:.*\n)*?Threads:\t(\d+)\n")


def processes():
    """All processes that have not ended, but the first and this one -> {pid: Process}."""
    found = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) in (1, os.getpid()):
            continue
        try:
            facts = STATUS.match(read_bytes("/proc/%s/status" % entry))
        except OSError:
            continue                              # it has just ended
        if facts and (facts.group(2) not in b"ZX" or int(facts.group(6)) > 1):
            name, _, parent, user, session, _ = facts.groups()
            found[int(entry)] = Process(name.decode("utf-8", "replace"), int(parent), int(user), int(session))
    return found


def processes_in(spaces, pids):
    """Which of these processes are in namespaces -> {pid: namespace name}."""
    wanted, found = {}, {}
    for space in spaces:
        try:
            wanted[os.stat(os.path.join(NETNS_DIR, space)).st_ino] = space
        except OSError:
            continue
    wanted.pop(os.stat("/proc/self/ns/net").st_ino, None)
    for pid in pids if wanted else ():
        try:
            inode = network_of(pid)
        except OSError:
            continue
        if inode in wanted:
            found[pid] = wanted[inode]
    return found


def to_be_stopped(apps, spaces):
    """All that runs in these namespaces, and all that these apps have started, wherever it went ->
    {pid: (Process, app or None, namespace or None)}.

    An app cannot change its user id, nor can anything that it starts: where it has its own, that says it all.
    """
    known = processes()
    inside = processes_in(spaces, known)
    owners = {own_user(app): app for app in apps if own_user(app)}
    homes = {known[pid].user: space for pid, space in inside.items() if is_app_user(known[pid].user)}
    found = {}
    for pid, process in known.items():
        space = inside.get(pid) or homes.get(process.user)        # the rest of an app that is in no record
        if space or process.user in owners:
            found[pid] = process, owners.get(process.user), space
    for app in apps:
        if not own_user(app):
            found.update({pid: (known[pid], app, None) for pid in kin(app, known)})
    return found


def kin(app, known):
    """Which of the processes are of an app without a user id of its own -> PIDs: the one that was started,
    those with its tag, and their descendants and sessions. One that has left its parents, its session and its
    environment is not found."""
    user = app.get("user") or (NOBODY if app_users() else os.geteuid())
    alike = {pid: process for pid, process in known.items() if process.user == user}
    found = {pid for pid in alike if (pid == app["pid"] and is_process(app)) or tagged(pid, app_tag(app))}
    more = found
    while more:
        more = {pid for pid, process in alike.items()
                if pid not in found and (process.parent in found or process.session in found)}
        found |= more
    return found


def tagged(pid, tag):
    """Whether a process carries an app's tag in its environment."""
    try:
        return ("VPCCTL_APP=" + tag).encode() in by_threads(pid, "environ", read_bytes).split(b"\0")
    except OSError:
        return False


def read_bytes(path):
    """All of a file."""
    with open(path, "rb") as handle:
        return handle.read()


def signal_user(user, number):
    """Send a signal to all that an app's user runs -> whether it was sent.

    A child does it that becomes this user, so that nobody else can be hit; in one call, which a program that
    forks without end cannot outrun. Its real and saved ids are those that no app has: it cannot be hit
    itself."""
    unused = [first - 1 for first, last in APP_USERS if first <= user <= last][0]
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setresgid(unused, unused, unused)
            os.setresuid(unused, user, unused)
            powerless = re.search(rb"(?m)^CapEff:\t0+$", read_bytes("/proc/thread-self/status"))
            if powerless and os.getresuid() == (unused, user, unused):
                os.kill(-1, number)
                os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def send_signal(found, number):
    """Send a signal to processes that are to be stopped -> PIDs of those that got it."""
    users, told = {}, set()
    for pid, (process, _, _) in found.items():
        try:
            if is_app_user(process.user):
                if process.user not in users:
                    users[process.user] = signal_user(process.user, number)
                if not users[process.user]:
                    continue
            else:
                os.kill(pid, number)
        except ProcessLookupError:
            pass
        told.add(pid)
    return told


def stop_programs(ctl, apps, spaces=()):
    """End apps with all that they have started, and what else runs in namespaces that are to go (it is
    named): TERM, and if that does not do, KILL."""
    import signal
    import time
    if ctl.dry_run:
        for app in apps:
            ctl.run.echo(("kill", str(app["pid"])), "ends the app on port %d" % app["port"])
    if ctl.dry_run or not (apps or spaces):
        return
    foreign = strangers([("ns", space) for space in spaces])
    spaces = [space for space in spaces if ("ns", space) not in foreign]
    found = to_be_stopped(apps, spaces)
    for pid in sorted(found):
        process, app, space = found[pid]
        where = "of the app on port %d" % app["port"] if app else "in %s" % space
        ctl.run.echo(("kill", str(pid)), "ends %s %s" % (process.name, where))
        if not app:
            ctl.note("ending process %d (%s) in namespace %s" % (pid, process.name, space))
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline, told = time.monotonic() + STOP_WAIT, set()
        while found and time.monotonic() < deadline:
            told |= send_signal({pid: found[pid] for pid in found if pid not in told}, number)
            time.sleep(0.005)
            found = to_be_stopped(apps, spaces)
    for pid in sorted(found):
        ctl.note("process %d (%s) could not be ended" % (pid, found[pid][0].name))


def revive_apps(ctl, apps, troubles=None):
    """Start those of these apps, [(VPC name, app record)], that are gone -> how many. With `troubles` (a list), one
    that cannot be started does not stop the others, and (VPC name, app, Problem) goes there."""
    gone = []
    for name, app in apps:
        pid = pid_of(app)
        if not pid:
            gone.append((name, app))
        elif pid != app["pid"]:
            app.update(pid=pid, start=process_start(pid))
    stop_programs(ctl, [app for _, app in gone])  # something may be left, or its PID was never written down
    prepare_apps(ctl, [app for _, app in gone])
    try:
        start_apps(ctl, gone)
    except Problem:
        if troubles is None:
            raise
        for vpc_name, app in gone:
            try:
                start_apps(ctl, [(vpc_name, app)])
            except Problem as problem:
                troubles.append((vpc_name, app, problem))
    return len(gone)


def app_place(app):
    """An app in words, for what is missing."""
    return f"app on port {app['port']} in subnet {app['subnet']}"


def last_lines(path, count=5):
    """The last lines of a file that say something, on one line."""
    with open(path, "rb") as handle:
        handle.seek(max(0, os.fstat(handle.fileno()).st_size - 2000))
        lines = map(str.strip, handle.read(2000).decode("utf-8", "replace").splitlines())
    return " | ".join([line for line in lines if line][-count:])


@command("stop-app", "stop-app blog web", VPC, SUBNET,
         arg("--port", type=port_type, metavar="PORT", help="only the one on this port (default: all of the subnet)"),
         changes=True)
def stop_app(ctl, args):
    """stop what deploy-app started in a subnet"""
    new = ctl.copy()
    vpc = ctl.vpc(args.vpc, new)
    ctl.subnet(vpc, args.subnet)
    chosen = [app for app in vpc["apps"] if app["subnet"] == args.subnet and args.port in (None, app["port"])]
    if not chosen:
        return ctl.report("No app is deployed in subnet %s%s" % (args.subnet, " on port %d" % args.port if args.port else ""))
    vpc["apps"] = [app for app in vpc["apps"] if app not in chosen]
    for app in chosen:
        if not ctl.dry_run and not is_alive(app):
            ctl.note("the app on port %d was gone already" % app["port"])
    ctl.change(new, before=lambda: stop_programs(ctl, chosen))
    for app in chosen:
        ctl.report("Stopped app in subnet %s on port %d, PID=%d" % (args.subnet, app["port"], app["pid"]))


@command("logs", "logs blog web", VPC, SUBNET,
         arg("-f", "--follow", action="store_true", help="go on printing what is added, until interrupted"),
         arg("--port", type=port_type, metavar="PORT", help="of the app on this port (default: of all)"))
def logs(ctl, args):
    """print what a subnet's apps wrote"""
    import time
    vpc = ctl.vpc(args.vpc)
    ctl.subnet(vpc, args.subnet)
    apps = [app for app in vpc["apps"] if app["subnet"] == args.subnet and args.port in (None, app["port"])]
    if not apps:
        raise Problem("no app is deployed in subnet %s" % args.subnet,
                      "`vpcctl deploy-app %s %s --port 8080` starts one" % (args.vpc, args.subnet))
    try:
        handles = [open(os.path.join(ctl.store.folder, app["log"]), errors="replace") for app in apps]
    except PermissionError:
        raise Problem("what apps write is for root alone", "use sudo", 4) from None
    while True:
        for handle in handles:
            text = handle.read()
            if sys.stdout.isatty():               # to a file or a pipe it goes as it is
                text = "\n".join(spelled(line.expandtabs()) for line in text.split("\n"))
            sys.stdout.write(text)
        sys.stdout.flush()
        if not args.follow:
            return
        time.sleep(0.2)


@command("exec", "exec blog web -- ip addr", VPC, SUBNET,
         arg("program", nargs="*", metavar="-- COMMAND…", help="what to run"), root=True)
def exec_command(ctl, args):
    """run a command in a subnet; its output and exit code are passed through"""
    subnet = ctl.subnet(ctl.vpc(args.vpc), args.subnet)
    program = args.program
    if not program:
        raise Problem("no command is given", "for example: vpcctl exec %s %s -- ip addr" % (args.vpc, args.subnet))
    enter_and_run(ctl, subnet, program)


@command("shell", "shell blog web", VPC, SUBNET, root=True)
def shell(ctl, args):
    """open a shell in a subnet"""
    subnet = ctl.subnet(ctl.vpc(args.vpc), args.subnet)
    os.environ["PS1"] = "(%s/%s) # " % (args.vpc, args.subnet)
    enter_and_run(ctl, subnet, ["sh"])


def enter_and_run(ctl, subnet, program):
    """Become a program in a namespace. Problem if the namespace or the program is not there."""
    argv = ["ip", "netns", "exec", subnet["ns"]] + list(program)
    if ctl.dry_run:
        return ctl.run.echo(tuple(argv))
    if not os.path.exists(os.path.join(NETNS_DIR, subnet["ns"])):
        raise Problem("subnet %s is down: there is no namespace %s" % (subnet["name"], subnet["ns"]),
                      "`vpcctl restore` brings it up", 3)
    if not find_tool(program[0]):
        raise Problem("there is no command '%s'" % program[0], code=127)
    sys.stdout.flush()
    os.umask(ctl.umask)
    os.execvp("ip", argv)


# ------------------------------------------------------------------------------------------------ topologies

TOPOLOGY = arg("file", type=path_type, metavar="FILE", help="the topology, as JSON; - reads standard input", complete="file")
PRUNE = arg("--prune", action="store_true", help="also delete VPCs that the file does not name")


@command("apply", "apply topology.json", TOPOLOGY, PRUNE, changes=True)
def apply(ctl, args):
    """make the host match a topology file: create, change, remove and repair what differs"""
    source = spoken(args.file)
    topology = check_topology(read_json(args.file, "topology file"), source)
    names = [vpc["name"] for vpc in topology["vpcs"]]
    if not ctl.dry_run:
        heal_first(ctl, names)
    new = desired_world(ctl, topology, args.prune)
    lines = plan_lines(ctl.world, new)
    if not lines:
        return already(ctl, names, "The host matches %s already" % source)
    mended, known = 0, [name for name in names if name in ctl.world]
    if known and not ctl.dry_run:                 # first: what is missing may be what the change stands on
        mended = mend(ctl, known, strict=False, staying=new)
        new = desired_world(ctl, topology, args.prune) if mended else new
    change_world(ctl, new)
    for line in lines:
        ctl.report(str(line))
    ctl.report("Applied %s: %s%s" % (source, counted(len(lines), "change"),
                                     "; put right what was missing" if mended else ""))


@command("plan", "plan topology.json", TOPOLOGY, PRUNE,
         arg("--json", action="store_true", help="the same as JSON: changes, repairs, unseen, ok"))
def plan_command(ctl, args):
    """show what apply would do, repairs too: exit code 0 nothing, 1 something"""
    topology = check_topology(read_json(args.file, "topology file"), spoken(args.file))
    ctl.dry_run = True                            # nothing is changed, and nobody is waited for
    new = desired_world(ctl, topology, args.prune)
    lines = plan_lines(ctl.world, new)
    repairs, unseen = plan_repairs(ctl, new, {vpc["name"] for vpc in topology["vpcs"]})
    idle = not lines and not repairs
    if args.json:
        ctl.show(json.dumps({
            "ok": idle, "changes": [line._asdict() for line in lines], "unseen": unseen,
            "repairs": [{"vpc": vpc, "what": kind, "object": text} for vpc, kind, text in repairs]}, indent=2))
        return 0 if idle else 1
    for vpc, kind, text in repairs:
        ctl.say(paint(f"! {'blocked' if kind == 'not ours' else 'repair'} vpc {vpc}: {kind}: {text}", 33))
    for line in lines:
        ctl.say(paint(str(line), {"+": 32, "-": 31}.get(line.sign, 33)))
    for text in unseen:
        ctl.say(f"? {text}")
    if idle:
        ctl.say("Nothing to do")
    return 0 if idle else 1


def plan_repairs(ctl, new, names):
    """What `apply` would repair in these VPCs, of what the world `new` keeps -> (findings: (VPC, kind, thing), what
    could not be looked at)."""
    findings = [(name, "unfinished", "a change was cut short") for name in sorted(ctl.intents)]
    world = {name: vpc for name, vpc in ctl.world.items() if name in names}
    if not world:
        return findings, []
    root = os.geteuid() == 0
    seen = observe(world) if root else glimpse()
    anew = {change.make.fact for change in difference(ctl.world, new)[1]}
    kept, told = plan(new, names), set(anew)
    staying = [app for vpc in new.values() for app in vpc["apps"]]
    unseen = [f"namespace {space}: {why}" for space, why in sorted(seen.broken.items())]
    runs = is_alive
    if not root:
        unseen = ["without root, firewall rules, routes, addresses, ports and what is in the namespaces cannot be seen"]
        runs = lambda app: process_start(app["pid"]) == app["start"]
    if not os.path.exists("/proc/1"):             # mounted with hidepid
        unseen.append("without root, this machine shows nobody's programs but one's own")
        runs = lambda app: True
    for name in sorted(world):
        steps = {fact: step for fact, step in plan(ctl.world, {name}).items() if fact in kept and fact not in told}
        told.update(steps)
        findings += [(name, kind, text) for kind, text in folded(world[name], compare(steps, seen))]
        findings += [(name, "missing", app_place(app))
                     for app in world[name]["apps"]
                     if app in staying and not runs(app)]
    return findings, unseen


def folded(vpc, changes):
    """Findings (kind, thing) of one VPC: what goes with something that is missing is only counted there, and with
    a bridge that is missing all that is of the VPC."""
    missing = {change.make.fact for change in changes if change.because.kind == "missing"}
    bridge, more, heads = ("link", vpc["bridge"]), {}, []
    for change in changes:
        holder = bridge if bridge in missing and change.make.fact != bridge else change.make.holder
        if holder in missing:
            more[holder] = more.get(holder, 0) + 1
        else:
            heads.append(change)
    return [(change.because.kind, describe(change.make, change.because) + (
        f", and {more[change.make.fact]} more" if change.make.fact in more else ""))
            for change in heads]


def glimpse():
    """What an ordinary user sees of the machine, asking nobody -> Seen: interfaces, namespaces, switches, files."""
    import fcntl
    import socket
    import struct
    seen = Seen()
    seen.blind = (set(WORDS) | {"rule", "lookup", "inside"}) - {"ns", "link", "up", "sysctl", "file", "symlink", "folder"}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        for name in host_interfaces():
            answer = fcntl.ioctl(asker, 0x8913, os.fsencode(name).ljust(40, b"\0"))      # SIOCGIFFLAGS
            seen.facts.update([("link", name)] + [("up", name)] * (struct.unpack_from("H", answer, 16)[0] & 1))
    spaces = os.listdir(NETNS_DIR) if os.path.isdir(NETNS_DIR) else []
    seen.facts.update(("ns", name) for name in spaces if is_namespace(name))
    return seen


@command("export", "export blog",
         arg("vpcs", nargs="*", type=name_type, metavar="VPC", help="which ones (default: all)", complete="vpc"))
def export(ctl, args):
    """print VPCs as a topology file for apply"""
    names = args.vpcs or sorted(ctl.world)
    vpcs = [export_vpc(ctl.vpc(name)) for name in names]
    peers = [{"vpcs": [name, peer["peer_vpc"]], "allow": peer["allowed"]} for name in names
             for peer in ctl.world[name]["peers"] if peer["side"] == "a" and peer["peer_vpc"] in names]
    ctl.show(json.dumps({"vpcs": vpcs, "peers": peers}, indent=2))
    for name in names:
        for app in ctl.world[name]["apps"]:
            if app.get("env"):
                names_of_env = ", ".join(app["env"]["names"])
                ctl.note(f"the app in subnet {name}/{app['subnet']} on port {app['port']} is given without its "
                         f"variables ({names_of_env}): an \"env\" in the file sets them")


def export_vpc(vpc):
    """One VPC as in a topology file; what is as by default is left out."""
    subnets = []
    for subnet in vpc["subnets"]:
        entry = {"name": subnet["name"], "cidr": subnet["cidr"]}
        if subnet["gw"] != first_address(subnet["cidr"]):
            entry["gw"] = subnet["gw"]
        if subnet["policy"] != DEFAULT_POLICY:
            entry["policy"] = subnet["policy"]
        for key, value in (("apps", [app_entry(app) for app in vpc["apps"] if app["subnet"] == subnet["name"]]),
                           ("publish", [{key: published[key] for key in ("host_port", "port", "protocol", "interface")}
                                        for published in vpc["published"] if published["subnet"] == subnet["name"]])):
            if value:
                entry[key] = value
        subnets.append(entry)
    entry = {"name": vpc["name"], "cidr": vpc["cidr"], "subnets": subnets}
    if vpc.get("nat"):
        entry["nat"] = {"interface": vpc["nat"]["interface"]}
        if vpc["nat"].get("subnets") is not None:
            entry["nat"]["subnets"] = vpc["nat"]["subnets"]
    return entry


def app_entry(app):
    """An app as in a topology file."""
    entry = {"port": app["port"], "cmd": app.get("command"), "workdir": app.get("workdir")}
    return {key: value for key, value in entry.items() if value}


# What a topology may hold: a check for each key; "!" marks those that must be there.
def _typed(kind):
    def check(value, place):
        if not isinstance(value, str):
            raise Problem("%s is %s" % (place, told(value)), "a text in quotes is meant")
        try:
            return kind(value)
        except argparse.ArgumentTypeError as error:
            raise Problem("%s: %s" % (place, error)) from None
    return check


def _port(value, place):
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 65535:
        raise Problem("%s is %s" % (place, told(value)), "a number from 1 to 65535")
    return value


def _words(value, place):
    if not isinstance(value, list) or not value:
        raise Problem("%s is %s" % (place, told(value)), 'write it like ["python3", "server.py"]')
    with placed(place):
        return [word(item) for item in value]


def _choice(value, place):
    if value not in ("tcp", "udp"):
        raise Problem("%s is %s" % (place, told(value)), "tcp or udp")
    return value


def _folder(value, place):
    with placed(place):
        return folder(value)


def _variables(value, place):
    if not isinstance(value, dict):
        raise Problem("%s is not an object" % place, 'write it like {"KEY": "VALUE"}')
    with placed(place):
        return dict(variable(*pair) for pair in value.items())


TOPOLOGY_SHAPE = {
    "vpcs!": [{"name!": _typed(name_type), "cidr!": _typed(network_type),
               "subnets": [{"name!": _typed(name_type), "cidr!": _typed(network_type), "gw": _typed(address_type),
                            "policy": lambda value, place: check_policy(value, place),
                            "apps": [{"port!": _port, "cmd": _words, "env": _variables, "workdir": _folder}],
                            "publish": [{"host_port!": _port, "port": _port, "protocol": _choice,
                                         "interface": _typed(interface_type)}]}],
               "nat": {"interface": _typed(interface_type), "subnets": [_typed(name_type)]}}],
    "peers": [{"vpcs!": [_typed(name_type)], "allow!": [_typed(network_type)]}],
}


def check_part(value, shape, place):
    """Check a part of a topology strictly; a Problem names the place. Returns the part."""
    if callable(shape):
        return shape(value, place)
    if isinstance(shape, list):
        if not isinstance(value, list):
            raise Problem("%s is not a list" % place)
        return [check_part(item, shape[0], "%s[%d]" % (place, number)) for number, item in enumerate(value)]
    here = place.rstrip(": ")
    if not isinstance(value, dict):
        raise Problem("%s is not an object" % here)
    known = {key.rstrip("!"): key for key in shape}
    for key in value:
        if key not in known:
            raise Problem("%s: unknown key '%.80s'" % (here, key), nearest(key, known) or "known: " + ", ".join(known))
    for key, spelled in known.items():
        if spelled.endswith("!") and key not in value:
            raise Problem("%s: '%s' is missing" % (here, key))
    return {key: check_part(value[key], shape[known[key]], place + "." * (place == here) + key) for key in value}


def check_topology(value, path):
    """Check a topology file -> the topology. A Problem names file and place; a name given twice is refused."""
    topology = check_part(value, TOPOLOGY_SHAPE, path + ": ")
    topology.setdefault("peers", [])
    unique([vpc["name"] for vpc in topology["vpcs"]], "%s: VPC" % path)
    for number, vpc in enumerate(topology["vpcs"]):
        place = "%s: vpcs[%d]" % (path, number)
        unique([subnet["name"] for subnet in vpc.get("subnets", ())], "%s: subnet" % place)
        for subnet in vpc.get("subnets", ()):
            unique([app["port"] for app in subnet.get("apps", ())], "%s, subnet %s: app on port" % (place, subnet["name"]))
        known = [subnet["name"] for subnet in vpc.get("subnets", ())]
        filtered = vpc.get("nat", {}).get("subnets")
        if filtered == []:
            raise Problem("%s.nat.subnets is empty" % place, "name the subnets, or leave it out: that means all")
        for name in filtered or ():
            if name not in known:
                raise Problem("%s.nat.subnets: there is no subnet '%s'" % (place, name), nearest(name, known))
    for number, entry in enumerate(topology["peers"]):
        if len(entry["vpcs"]) != 2:
            raise Problem("%s: peers[%d].vpcs: a peering has two VPCs" % (path, number))
    unique([" and ".join(sorted(entry["vpcs"])) for entry in topology["peers"]], "%s: peering of" % path)
    return topology


def unique(names, what):
    """Problem if a name is given twice."""
    seen = set()
    for name in names:
        if name in seen:
            raise Problem("%s %s is given twice" % (what, name))
        seen.add(name)


@contextmanager
def placed(place):
    """What is refused inside is told with the place in the file to which it belongs."""
    try:
        yield
    except Problem as problem:
        raise Problem("%s: %s" % (place, problem), problem.hint, problem.code) from None


def desired_world(ctl, topology, prune=False):
    """The records as a topology wants them: what fits is kept as it is, down to its kernel names."""
    new = ctl.copy()
    wanted = {vpc["name"]: vpc for vpc in topology["vpcs"]}
    for name in list(new):
        if (name in wanted and new[name]["cidr"] != wanted[name]["cidr"]) or (prune and name not in wanted):
            del new[name]
    for vpc in new.values():
        vpc["peers"] = [peer for peer in vpc["peers"] if peer["peer_vpc"] in new]
    used = record_names(new) | (kernel_names(ctl) - record_names(ctl.world))
    for name, entry in wanted.items():
        if name in ctl.damaged:
            ctl.vpc(name)
        with placed("VPC %s" % name):
            if name not in new:
                new[name] = new_vpc(ctl, name, entry["cidr"], new, used)
            set_subnets(ctl, new[name], entry, new, used)
    for name, entry in wanted.items():
        with placed("VPC %s" % name):
            set_outside(ctl, new, new[name], entry)
    set_peers(ctl, new, topology, wanted, used)
    return new


def set_subnets(ctl, vpc, entry, world, used):
    """Make a record's subnets, policies and apps those of a topology's VPC."""
    have = {subnet["name"]: subnet for subnet in vpc["subnets"]}
    wanted = entry.get("subnets", [])
    vpc["subnets"], apps = [], {(app["subnet"], app["port"]): app for app in vpc["apps"]}
    vpc["apps"] = []
    no_overlap(wanted)
    for given in wanted:
        subnet = have.get(given["name"])
        gateway = given.get("gw") or first_address(given["cidr"])
        if not subnet or (subnet["cidr"], subnet["gw"]) != (given["cidr"], gateway):
            if subnet:
                used.difference_update((subnet["ns"], subnet["veth"] + "-a", subnet["veth"] + "-b"))
            with placed("subnet %s" % given["name"]):
                subnet = new_subnet(ctl, vpc, given["name"], given["cidr"], given.get("gw"), world, used)
        vpc["subnets"].append(subnet)
        subnet["policy"] = given.get("policy") or duplicate(DEFAULT_POLICY)
        vpc["apps"] += [wanted_app(ctl, vpc, subnet, app, apps.get((given["name"], app["port"])))
                        for app in given.get("apps", ())]
    for subnet in vpc["subnets"]:
        policy_names(subnet, vpc)


def wanted_app(ctl, vpc, subnet, given, known):
    """The record of a topology's app: that of the one that is deployed, if it is the same."""
    wanted = new_app(vpc, subnet, given["port"], given.get("cmd"), given.get("workdir"))
    variables = given.get("env", {})
    if known and known["ns"] == subnet["ns"] and not difference_of_apps(ctl, known, wanted, variables):
        return known
    give_variables(ctl, wanted, variables)
    return wanted


def no_overlap(subnets):
    """Problem if two subnets of a topology overlap. Sorted, so that 500 take 500 looks and not 125,000."""
    blocks = sorted((as_network(subnet["cidr"]), subnet["name"]) for subnet in subnets)
    for (low, first), (high, second) in zip(blocks, blocks[1:]):
        if low.overlaps(high):
            raise Problem("subnets %s (%s) and %s (%s) overlap" % (first, low, second, high))


def set_outside(ctl, world, vpc, entry):
    """Make a record's NAT and published ports those of a topology's VPC."""
    if "nat" in entry:
        known = vpc.get("nat")
        wanted = new_nat(ctl, vpc, entry["nat"].get("interface"), entry["nat"].get("subnets"))
        same = known and (known["interface"], known.get("subnets")) == (wanted["interface"], wanted["subnets"])
        vpc["nat"] = known if same else wanted
    else:
        vpc["nat"] = None
    vpc["published"] = []
    for subnet in entry.get("subnets", ()):
        for given in subnet.get("publish", ()):
            add_published(ctl, world, vpc, subnet["name"], given.get("interface"), given.get("protocol", "tcp"),
                          given["host_port"], given.get("port", given["host_port"]))
    outside = vpc.get("nat") or (vpc["published"] or [None])[0]
    settle_forward(vpc, outside and new_forward(dict(ctl.world, **world), outside["interface"], ctl.world.values()))


def set_peers(ctl, new, topology, wanted, used):
    """Make the peerings those of a topology; those with VPCs that it does not name are left alone."""
    pairs = {}
    for entry in topology["peers"]:
        a, b = (ctl.vpc(name, new) for name in entry["vpcs"])
        pairs[frozenset(entry["vpcs"])] = a, b, entry["allow"]
    for name in wanted:
        for peer in list(new[name]["peers"]):
            found = pairs.get(frozenset((name, peer["peer_vpc"])))
            if (not found and peer["peer_vpc"] in wanted) or (found and sorted(found[2]) != sorted(peer["allowed"])):
                remove_peering(new[name], new[peer["peer_vpc"]])
                used.difference_update((peer["veth_a"], peer["veth_b"], peer["chain"]))
    for a, b, allowed in pairs.values():
        if not any(peer["peer_vpc"] == b["name"] for peer in a["peers"]):
            add_peering(ctl, new, a, b, allowed, used)


def change_world(ctl, new):
    """Change to a world with apps that come and go, as one change."""
    old_apps = {(name, app["ns"], app["port"]): app for name, vpc in ctl.world.items() for app in vpc["apps"]}
    spaces = {subnet["ns"]: subnet for vpc in ctl.world.values() for subnet in vpc["subnets"]}
    kept = {subnet["ns"]: subnet for vpc in new.values() for subnet in vpc["subnets"]}
    wire = lambda subnet: subnet and {key: value for key, value in subnet.items() if key != "policy"}
    gone = [space for space in spaces if wire(spaces[space]) != wire(kept.get(space))]
    fresh = []
    for name, vpc in new.items():
        for app in vpc["apps"]:
            if app["ns"] in gone:
                app["pid"] = 0
            if not app["pid"]:
                fresh.append((name, app))
    staying = {(name, app["ns"], app["port"]) for name, vpc in new.items() for app in vpc["apps"] if app["pid"]}
    ended = [app for key, app in old_apps.items() if key not in staying]
    prepare_apps(ctl, [app for _, app in fresh])
    ctl.change(new, before=lambda: stop_programs(ctl, ended, gone), after=lambda _: start_apps(ctl, fresh))


class PlanLine(namedtuple("PlanLine", "sign what text ends")):
    """A difference between two worlds: + comes, - goes, ~ changes, -/+ is made anew, which `ends` other things."""
    __slots__ = ()

    def __str__(self):
        colon = ":" if self.sign in ("~", "-/+") else ""
        ends = f"; ends {', '.join(self.ends)}" if self.ends else ""
        return f"{self.sign} {self.what}{colon} {self.text}".rstrip() + ends


def plan_lines(old, new):
    """The differences between two worlds -> list of PlanLine."""
    lines = []
    for name in sorted(set(old) | set(new)):
        before, after = old.get(name), new.get(name)
        if not after:
            lines.append(PlanLine("-", f"vpc {name}", before["cidr"], []))
        else:
            lines += change_line(f"vpc {name}", before and before["cidr"], after["cidr"], before and ended(before))
            same = before and before["cidr"] == after["cidr"]
            lines += vpc_lines(before if same else {"subnets": [], "apps": [], "published": [], "peers": []}, after)
    peers = [{(name, peer["peer_vpc"]): peer["allowed"] for name, vpc in world.items() for peer in vpc["peers"]
              if peer["side"] == "a"} for world in (old, new)]
    peers[1] = {pair[::-1] if pair[::-1] in peers[0] else pair: peers[1][pair] for pair in peers[1]}
    for pair in sorted(set(peers[0]) | set(peers[1])):
        lines += change_line("peer %s %s" % pair, *[",".join(side[pair]) if pair in side else None for side in peers],
                             ends=["open connections between the two"])
    return lines


def change_line(what, before, after, ends=()):
    """A line for something that came, went or changed; none if it is the same. With `ends`, what changes is made
    anew, and that ends these."""
    if before == after:
        return []
    if before is None or after is None:
        return [PlanLine("+" if before is None else "-", what, after or "", [])]
    return [PlanLine("-/+" if ends else "~", what, f"{before} -> {after}", list(ends))]


def ended(vpc, subnet=None):
    """What ends when a VPC, or one subnet of it, is made anew -> list of texts."""
    names = [each["name"] for each in vpc["subnets"] if subnet in (None, each["name"])]
    apps = [f"{app['subnet']}:{app['port']}" for app in vpc["apps"] if app["subnet"] in names]
    published = [str(port["host_port"]) for port in vpc["published"] if port["subnet"] in names]
    peers = [peer["peer_vpc"] for peer in vpc["peers"]]
    parts = [("subnet%s", [] if subnet else names), ("app%s", apps), ("published port%s", published),
             ("peering%s with", [] if subnet else peers)]
    return [f"{word % ('s' * bool(found[1:]))} {', '.join(found)}" for word, found in parts if found] + ["open connections"]


def vpc_lines(before, after):
    """The differences inside of one VPC."""
    name, lines = after["name"], []
    text = lambda subnet: subnet and subnet["cidr"] + (" gw " + subnet["gw"] if subnet["gw"] != first_address(
        subnet["cidr"]) else "")
    old, new = ({subnet["name"]: subnet for subnet in vpc["subnets"]} for vpc in (before, after))
    for key in list(old) + [key for key in new if key not in old]:
        lines += change_line("subnet %s/%s" % (name, key), text(old.get(key)), text(new.get(key)), ended(before, key))
        if key in new:
            had = old[key]["policy"] if key in old else DEFAULT_POLICY
            lines += policy_lines("policy %s/%s" % (name, key), had, new[key]["policy"])
    nat = lambda vpc: vpc.get("nat") and "%s%s" % (vpc["nat"]["interface"], " for " + ",".join(
        vpc["nat"]["subnets"]) if vpc["nat"].get("subnets") is not None else "")
    lines += change_line("nat %s" % name, nat(before), nat(after))
    for kind, key, value, ends in (
            ("apps", lambda app: (app["subnet"], app["port"]), program_text, ["the program that runs"]),
            ("published", lambda port: (port["subnet"], port["host_port"], port["protocol"]),
             lambda port: "%s/%d by %s" % (port["protocol"], port["port"], port["interface"]),
             ["open connections through it"])):
        had, have = ({key(item): value(item) for item in vpc[kind]} for vpc in (before, after))
        known = [app.get("env") for app in before["apps"]]
        for app in after[kind] if kind == "apps" else ():         # another file of variables: other values
            if had.get(key(app)) == have[key(app)] and app.get("env") not in known:
                have[key(app)] += ", other values"
        for item in sorted(set(had) | set(have)):
            lines += change_line("%s %s/%s %d" % ((kind.rstrip("s"), name) + item[:2]), had.get(item), have.get(item), ends)
    return lines


def policy_lines(what, before, after):
    """The differences between two policies, a line for each direction."""
    lines = []
    for direction in ("ingress", "egress"):
        texts = []
        for policy in (before, after):
            rules = [re.sub("^allow ", "", rule_text(rule)) for rule in policy.get(direction) or ()]
            default = (policy.get("default") or {}).get(direction)
            texts.append(", ".join(rules + (["default " + default] if default else [])) or "nothing")
        if texts[0] != texts[1]:
            lines.append(PlanLine("~", what, f"{direction} {texts[0]} -> {texts[1]}", []))
    return lines


# ------------------------------------------------------------------------------------------------ inspection

@command("list", "list",
         arg("--long", action="store_true", help="a table with ranges, subnets, apps, peers, NAT"),
         arg("--json", action="store_true", help="the same as JSON"))
def list_vpcs(ctl, args):
    """list the VPCs; those that are down are marked"""
    rows = [list_row(ctl, name) for name in sorted(set(ctl.world) | set(ctl.intents) | set(ctl.damaged))]
    if args.json:
        return ctl.show(json.dumps(rows, indent=2))
    if args.long:
        return print_table(ctl, ("VPC", "RANGE", "STATE", "SUBNETS", "APPS", "PEERS", "NAT", "PUBLISHED"), [
            (row["name"], row["cidr"], row["state"], len(row["subnets"]),
             f"{row['apps_up']} of {row['apps']} up" if row["apps"] else "-", ",".join(row["peers"]) or "-",
             row["nat"] or "-", ",".join(map(str, row["published"])) or "-") for row in rows])
    if not rows:
        return ctl.say("VPCs: none yet; `vpcctl create blog --cidr 10.20.0.0/16` makes one")
    ctl.say("VPCs:")
    for row in rows:
        ctl.say("- %s%s" % (row["name"], "" if row["state"] == "up" else "   (%s)" % paint(row["state"], 33)))


def list_row(ctl, name):
    """One VPC for `list`."""
    vpc = ctl.world.get(name) or ctl.intents.get(name)
    if name in ctl.damaged or not vpc:
        state = "record unreadable: vpcctl delete --force %s" % name if name in ctl.damaged else "unfinished"
        return {"name": name, "cidr": "?", "state": state, "subnets": [], "apps": 0, "apps_up": 0, "peers": [],
                "nat": None, "published": []}
    state = "unfinished: vpcctl restore" if name in ctl.intents else "down: vpcctl restore" if is_down(vpc) else "up"
    return {"name": name, "cidr": vpc["cidr"], "state": state, "subnets": [subnet["name"] for subnet in vpc["subnets"]],
            "apps": len(vpc["apps"]), "apps_up": sum(map(is_alive, vpc["apps"])),
            "peers": [peer["peer_vpc"] for peer in vpc["peers"]],
            "nat": vpc["nat"]["interface"] if vpc.get("nat") else None,
            "published": [published["host_port"] for published in vpc["published"]]}


def print_table(ctl, heads, rows):
    """Print rows under heads, in columns."""
    rows = [tuple(str(cell) for cell in row) for row in [heads] + rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    for number, row in enumerate(rows):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
        ctl.say(paint(line, 1) if number == 0 else line)


def counted(number, word):
    """A number of things, in words."""
    return "%d %s%s" % (number, word, "" if number == 1 else "s")


def paint(text, code):
    """Colour, on a terminal that wants it (NO_COLOR is honoured)."""
    wanted = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return f"{_PAINT}{code}m{text}{_PAINT}0m" if wanted else text


@command("ps", "ps blog",
         arg("vpc", nargs="?", type=name_type, metavar="VPC", help="of this VPC (default: of all)", complete="vpc"),
         arg("--json", action="store_true", help="the same as JSON"))
def list_apps(ctl, args):
    """list the apps: what runs, on which addresses it listens, and why another has exited"""
    vpcs = [ctl.vpc(args.vpc)] if args.vpc else [ctl.world[name] for name in sorted(ctl.world)]
    for name, why in sorted(ctl.damaged.items()) if not args.vpc else ():
        ctl.note(f"the record of VPC {name} is unreadable: {why}")
    apps = [app_state(ctl, vpc["name"], app) for vpc in vpcs for app in vpc["apps"]]
    if args.json:
        return ctl.show(json.dumps({"apps": apps}, indent=2))
    if not apps:
        return ctl.say("Apps: none yet; `vpcctl deploy-app VPC SUBNET --port 8080` starts one")
    print_table(ctl, ("VPC", "SUBNET", "PORT", "PROGRAM", "PID", "STATE", "LISTENS ON"), [
        (app["vpc"], app["subnet"], f"{app['protocol']}/{app['port']}", cut(app["program"]), app["pid"] or "-",
         state_text(app), listens_text(app)) for app in apps])
    for app in apps:
        if app["state"] == "exited":
            ctl.say(f"{app['vpc']}/{app['subnet']} {app['protocol']}/{app['port']}: {last_word(app)}")


def app_state(ctl, vpc_name, app):
    """What can be known of an app, as `ps --json` prints it: null is what cannot."""
    import time
    pid, path = pid_of(app), os.path.join(ctl.store.folder, app["log"])
    said = written = None
    try:
        written = local_time(os.stat(path).st_mtime)
        said = last_lines(path, 1)
    except OSError:
        pass                                      # there is none, or it is root's alone
    return {"vpc": vpc_name, "subnet": app["subnet"], "port": app["port"], "protocol": app.get("protocol", "tcp"),
            "program": program_text(app), "pid": pid or None, "state": "running" if pid else "exited",
            "since": local_time(time.time() - age(pid)) if pid else None,
            "listens": listen_addresses(app, pid) if pid else [], "log": {"written": written, "last": said}}


def local_time(seconds):
    """A time as ISO 8601 writes it, here."""
    import time
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))


def plain_time(moment):
    """The same for people."""
    return moment[:19].replace("T", " ")


def age(pid):
    """For how many seconds a process has been there."""
    started = int(process_start(pid).rpartition("/")[2] or 0) / os.sysconf("SC_CLK_TCK")
    return float(read_bytes("/proc/uptime").split()[0]) - started


def listen_addresses(app, pid):
    """On which addresses an app's port is open; None if we may not look."""
    try:
        if os.geteuid():
            read_bytes(f"/proc/{pid}/net/tcp")
            found = [one for one in listeners(pid) if one.port == app["port"]]
        else:
            found = listeners_on(app)
    except OSError:
        return None
    return sorted({one.address for one in found})


def state_text(app):
    """Whether an app runs, for people."""
    return f"{app['state']} since {plain_time(app['since'])}" if app["since"] else app["state"]


def listens_text(app):
    """Where an app listens, for people."""
    where = app["listens"]
    if where:
        return ", ".join(where) + " only" * all(map(is_loopback, where))
    if app["state"] == "exited":
        return "-"
    return "?" if where is None else "nothing"


def last_word(app):
    """Why an app has exited, as far as its log tells."""
    written, said = app["log"]["written"], app["log"]["last"]
    if written is None:
        return "it has no log"
    told = f"ends with: {said}" if said else {None: "is root's alone to read", "": "is empty"}[said]
    return f"its log, last written {plain_time(written)}, {told}"


def cut(text, width=40):
    """A text that fits into a column."""
    return text if len(text) <= width else text[:width - 1] + "…"


@command("inspect", "inspect blog", VPC,
         arg("subnet", nargs="?", type=name_type, metavar="SUBNET", help="only this one, in words", complete="subnet"),
         arg("--json", action="store_true", help="a subnet's part of the record, as JSON too"))
def inspect(ctl, args):
    """print the record of a VPC, as JSON, or what is to be known of one subnet"""
    if args.vpc in ctl.intents and args.vpc not in ctl.world:
        raise Problem("VPC %s is unfinished: a change was cut short" % args.vpc, "`vpcctl restore` finishes it")
    vpc = ctl.vpc(args.vpc)
    if args.subnet:
        part = subnet_part(vpc, ctl.subnet(vpc, args.subnet))
        return ctl.show(json.dumps(part, indent=2)) if args.json else inspect_subnet(ctl, vpc, part)
    rules = ",\n    ".join(json.dumps(argv) for argv in vpc["host_iptables"])     # a line each, not a line a word
    ctl.show(json.dumps(dict(vpc, host_iptables="@"), indent=2).replace('"@"', "[\n    %s\n  ]" % rules, 1))


def has_nat(vpc, name):
    """Whether a subnet reaches the internet by NAT."""
    nat = vpc.get("nat")
    return bool(nat) and (nat.get("subnets") is None or name in nat["subnets"])


def subnet_part(vpc, subnet):
    """What a VPC's record says of one subnet."""
    name, address = subnet["name"], subnet["host_ip"]
    return {"vpc": vpc["name"], "subnet": subnet, "apps": [app for app in vpc["apps"] if app["subnet"] == name],
            "published": [published for published in vpc["published"] if published["subnet"] == name],
            "nat": vpc["nat"] if has_nat(vpc, name) else None,
            "peers": [peer for peer in vpc["peers"] if any(ip_inside(address, block) for block in peer["allowed"])]}


def inspect_subnet(ctl, vpc, part):
    """Print what is to be known of one subnet: a line each, what it is about in front."""
    subnet, nat = part["subnet"], part["nat"]
    cable = f"its cable {subnet['veth']}-a to {subnet['veth']}-b on the bridge {vpc['bridge']}"
    rows = [("subnet", f"{vpc['name']}/{subnet['name']}, {subnet['cidr']}"),
            ("address", f"{subnet['host_ip']}, by way of the gateway {subnet['gw']}"),
            ("namespace", f"{subnet['ns']}, {cable}{'; down: vpcctl restore' if is_down(vpc) else ''}")]
    rows += [(direction, policy_text(subnet["policy"], direction)) for direction in ("ingress", "egress")]
    rows += [("app", app_text(app_state(ctl, vpc["name"], app))) for app in part["apps"]]
    rows += [("published", f"{port['protocol']}/{port['host_port']} of {port['interface']} leads to "
              f"{port['protocol']}/{port['port']}") for port in part["published"]]
    rows.append(("NAT", f"by {nat['interface']}" if nat else "none: the internet is out of reach"))
    for peer in part["peers"]:
        far = [block for block in peer["allowed"] if not ip_inside(block.split("/")[0], vpc["cidr"])]
        rows.append(("peer", f"{peer['peer_vpc']}: {', '.join(far)}"))
    for what, value in rows:
        ctl.say(f"{what:<10} {value}")


def app_text(app):
    """An app on one line: what it runs, and how it goes."""
    state = f"runs as PID {app['pid']}, listens on {listens_text(app)}" if app["pid"] else f"exited; {last_word(app)}"
    return f"{app['protocol']}/{app['port']} {app['program']}: {state}"


def policy_text(policy, direction):
    """What a policy says of one direction, in words."""
    rules = policy.get(direction) or []
    action, why = policy_default(policy, direction)
    fate = "dropped" if action == "deny" else "let through"
    return "; ".join([rule_text(rule) for rule in rules] + [f"everything{' else' if rules else ''} is {fate} ({why})"])


@command("verify", "verify", arg("--json", action="store_true", help="the findings as JSON"))
def verify(ctl, args):
    """check the tools, then every object of every VPC: missing, changed, or without a record"""
    checks = [("root", os.geteuid() == 0, "run it with sudo")] + [
        (tool, bool(find_tool(tool)), missing_tool(tool).hint)
        for tool in ("ip", "bridge", "iptables", "setpriv")]
    lacking = [(what, hint) for what, found, hint in checks if not found]
    if not args.json:
        for what, found, hint in checks:
            ctl.say("%s %s%s" % (mark(found), what, "" if found else ": missing; " + hint))
    if lacking:
        if args.json:
            ctl.show(json.dumps({"ok": False, "lacking": [what for what, _ in lacking]}, indent=2))
        return 4
    findings, notes = look_for_drift(ctl)
    if args.json:
        ctl.show(json.dumps({"ok": not findings, "vpcs": sorted(ctl.world), "notes": notes, "findings": [
            {"vpc": vpc, "what": kind, "object": text} for vpc, kind, text in findings]}, indent=2))
        return 1 if findings else 0
    for name in sorted(set(ctl.world) | set(ctl.damaged)):
        own = sum(1 for vpc, _, _ in findings if vpc == name)
        ctl.say("%s VPC %s%s" % (mark(not own), name, ": " + counted(own, "finding") if own else ""))
    for vpc, kind, text in findings:
        ctl.say("  %s%s: %s" % (vpc + ": " if vpc else "", paint(kind, 31), text))
    for text in notes:
        ctl.say("note: " + text)
    if findings:
        unreadable = [vpc for vpc, kind, _ in findings if kind == "unreadable"]
        ctl.say("".join("`vpcctl delete --force %s` clears it away; " % vpc for vpc in unreadable)
                + "`vpcctl restore` repairs what is missing or changed, `vpcctl delete NAME` what a VPC left without a record, "
                "`vpcctl cleanup-all` removes everything")
    return 1 if findings else 0


def mark(good):
    """A tick or a cross, in ASCII where the terminal has no better."""
    encoding = (getattr(sys.stdout, "encoding", "") or "").lower().replace("-", "")
    tick, cross = ("\u2713", "\u2717") if encoding.startswith("utf") else ("ok", "NO")
    return paint(tick, 32) if good else paint(cross, 31)


def look_for_drift(ctl):
    """Compare the records with the kernel -> (findings: (vpc, "missing"/"changed"/…, object), notes)."""
    findings = [(name, "unreadable", why) for name, why in ctl.damaged.items()]
    findings += [(name, "unfinished", "a change was cut short") for name in ctl.intents]
    world = {name: vpc for name, vpc in ctl.world.items()}
    seen = observe(world)
    told = set()
    for name in sorted(world):
        steps = {fact: step for fact, step in plan(world, {name}).items() if fact not in told}
        told.update(steps)
        findings += [(name, change.because.kind, describe(change.make, change.because))
                     for change in compare(steps, seen)]
        findings += [(name, "missing", app_place(app))
                     for app in world[name]["apps"] if not is_alive(app)]
    findings += [("", "in no record", describe(step)) for step in orphans(ctl, seen)]
    owners = {subnet["ns"]: name for name, vpc in world.items() for subnet in vpc["subnets"]}
    findings += [(owners[space], "cannot look into", f"{space}: {why}") for space, why in seen.broken.items()]
    foreign = foreign_routing(seen, world) + foreign_rules(seen, world)
    findings += [(name, "foreign", text) for name, text, harms in foreign if harms]
    notes = [f"foreign: {name + ': ' if name else ''}{text}" for name, text, harms in foreign if not harms]
    return findings, notes + capability_notes(world, seen)


# -- what others have put in our way: a finding where it takes isolation or a policy away, else a note

def foreign_routing(seen, world):
    """Others' routes in our tables, and routing rules before ours -> [(VPC or "", text, does it harm)]."""
    ranges = [bounds(vpc["cidr"]) for vpc in world.values()]
    tables = {str(vpc["table"]): name for name, vpc in world.items()}
    if world:
        tables[FENCE_TABLE] = ""
    found = [(tables[table], f"route in table {table}: {route_text(entry)}", leads_to(entry, ranges, True))
             for table in sorted(tables)
             for entry in seen.routes.get(table, ())]
    for entry in seen.lookups if world else ():
        if entry["priority"] > int(PREF_SHUT) or entry.get("table") == "local" or "oif" in entry:
            continue                              # after ours, for the host's addresses, not for forwarding
        source = overlap(entry.get("src", "all"), entry.get("srclen", 32), ranges)
        bridges = [vpc["bridge"] for vpc in world.values()]
        ours = source and entry.get("iif", bridges[0]).split(" ")[0] in bridges
        harms = any(leads_to(route, ranges, ours) for route in seen.routes.get(str(entry.get("table")), ()))
        if (ours or harms) and entry.get("iif") != "lo":
            found.append(("", f"routing rule before ours: {lookup_text(entry)}",
                          harms and not CONDITIONS.intersection(entry)))
    return found


# Of a routing rule: it is not asked about every packet.
CONDITIONS = frozenset(("fwmark", "tos", "dst", "uid_start", "ipproto", "sport", "dport", "not"))


def overlap(address, length, ranges):
    """Whether a block touches one of some ranges (of numbers). "all" and "default" touch each. That of a routing
    rule may have host bits, which the kernel passes over."""
    if address in ("all", "default"):
        return True
    address, _, own_length = address.partition("/")
    size = 1 << 32 - int(own_length or length)
    first = address_number(address) // size * size
    return any(first <= high and low < first + size for low, high in ranges)


def leads_to(route, ranges, default):
    """Whether a route leads to one of the ranges, or (`default`) anywhere."""
    if route.get("type", "unicast") not in ("unicast", "local"):
        return False
    return default if route["dst"] == "default" else overlap(route["dst"], 32, ranges)


def route_text(entry):
    """A route as `ip route` prints it, short."""
    words = [entry["type"]] if "type" in entry else []
    words.append(entry["dst"])
    for key, word in (("gateway", "via"), ("dev", "dev")):
        words += [word, entry[key]] if key in entry else []
    return " ".join(words)


def lookup_text(entry):
    """A routing rule as `ip rule` prints it, short."""
    words = [str(entry["priority"]) + ":"]
    for key, length, word in (("src", "srclen", "from"), ("dst", "dstlen", "to"), ("iif", "", "iif"),
                              ("fwmark", "fwmask", "fwmark"), ("ipproto", "", "ipproto")):
        if key in entry:
            words += [word, f"{entry[key]}/{entry[length]}" if length in entry else str(entry[key])]
    return " ".join(words + [entry.get("action") or f"lookup {entry.get('table')}"])


def foreign_rules(seen, world):
    """Others' firewall rules in our chains and in our namespaces -> [(VPC, text, does it harm)]."""
    places = {("filter", GUARD): "", ("filter", REST): ""}
    for name, vpc in world.items():
        chains = [vpc["chain"], vpc["chain_in"], vpc["chain_src"]] + [peer["chain"] for peer in vpc["peers"]]
        places.update((("filter", chain), name) for chain in chains)
    spaces = {subnet["ns"]: name for name, vpc in world.items() for subnet in vpc["subnets"]}
    found = []
    for (space, table, chain), rules in seen.rules.items():
        if space is None and (table, chain) not in places or all(ours for _, ours in rules):
            continue
        name = places.get((table, chain), "") if space is None else spaces.get(space, "")
        drops = max((number for number, (rule, ours) in enumerate(rules) if ours and target_of(rule) == "DROP"),
                    default=-1)                   # our last one
        for number, (rule, ours) in enumerate(rules):
            if not ours:
                tool = f"ip netns exec {space} iptables" if space else "iptables"
                table_words = f" -t {table}" if table != "filter" else ""
                found.append((name, f"firewall rule: {tool}{table_words} -A {chain} {shown(rule)}",
                              number < drops and opens(seen, (space, table), rule)))
    return found


def target_of(rule):
    """Where a rule sends a packet that it matches: ACCEPT, DROP, a chain…; "" if it only counts."""
    return next((rule[number + 1] for number, word in enumerate(rule[:-1]) if word in ("-j", "-g")), "")


def opens(seen, place, rule, depth=0):
    """Whether a rule can let a packet past the rules after it: by itself, or by a chain that it jumps to."""
    target = target_of(rule)
    if target in ("ACCEPT", "QUEUE", "NFQUEUE") or (target == "RETURN" and not depth) or "-g" in rule:
        return True
    return depth < 9 and any(opens(seen, place, inner_rule, depth + 1)
                             for inner_rule, _ in seen.rules.get(place + (target,), ()))


def capability_notes(world, seen):
    """What this kernel cannot do, and what that means."""
    notes = []
    unlocked = sorted(name for name, vpc in world.items() if vpc.get("unlocked") or any(
        ("port", subnet["veth"] + "-b", "locked", None) in seen.facts for subnet in vpc["subnets"]))
    if unlocked:
        notes.append("this kernel cannot lock bridge ports (Linux 5.18 can): a workload of %s could send with a sibling's "
                     "address and hardware address" % ", ".join(unlocked))
    if flow_count() is None:
        notes.append("this kernel cannot end tracked connections (no nf_conntrack_netlink): answers to those of "
                     "a VPC that is gone reach the next one with its range, until they time out")
    if not os.path.exists("/proc/sys/net/bridge/bridge-nf-call-iptables"):
        notes.append("br_netfilter is not loaded: nothing depends on it")
    if not os.path.exists("/proc/sys/net/ipv6/conf"):
        notes.append("this kernel has no IPv6: there is none to switch off")
    return notes


@command("test-connectivity", "test-connectivity blog web 10.20.2.2 --port 5432", VPC,
         arg("subnet", type=name_type, metavar="SUBNET", help="where the test starts", complete="subnet"),
         arg("target", metavar="TARGET", help="an address, VPC/SUBNET, or a name", complete="target"),
         arg("--port", type=port_type, metavar="PORT", help="try this port (default: ping)"),
         arg("--protocol", choices=("tcp", "udp", "icmp"), help="tcp (default with --port), udp, icmp (ping)"),
         arg("--expect", choices=("open", "blocked", "refused"), default="open",
             help="what is to come of it, for the exit code: 0 if it does (default: open)"),
         arg("--json", action="store_true", help="the answer as JSON"), root=True)
def test_connectivity(ctl, args):
    """send a packet from a subnet and say what came of it"""
    subnet = ctl.subnet(ctl.vpc(args.vpc), args.subnet)
    protocol = args.protocol or ("tcp" if args.port else "icmp")
    flow = path_flow(ctl.world, args.vpc, args.subnet, args.target, args.port, protocol)
    if ctl.dry_run:
        return ctl.say(f">>> {shown(probe_words(flow))}")
    hops, reply = list(explained(flow, Sight(ctl.world))), send(flow)
    answer = verdict(flow, reply, hops)
    good = answer in EXPECTED[args.expect]
    reasons = answer_reasons(flow, answer, hops)
    if args.json:
        ctl.show(json.dumps({"from": end_name(flow.home, flow.source),
                             "to": end_name(flow.far, flow.host) or flow.address, "address": flow.address,
                             "protocol": protocol, "port": flow.port, "answer": answer,
                             "expected": args.expect, "ok": good, "why": (reasons or [None])[0]}, indent=2))
        return 0 if good else 1
    goal = f"{end_name(flow.far, flow.host)} ({flow.address})" if flow.host else flow.address
    ctl.say(f"{mark(good)} {end_name(flow.home, flow.source)} -> {goal} {flow.what}: {answer}")
    for line in reasons:
        ctl.say("  " + line)
    return 0 if good else 1


EXPECTED = {"open": ("open",), "refused": ("refused",), "blocked": ("rejected", "no route", "no answer")}
# What came back, and who sent it (an address, or "": nobody); number: the port it was sent from, or the ping's number.
Reply = namedtuple("Reply", "kind sender number")
Reply.__new__.__defaults__ = (0,)
NO_REPLY = Reply("silence", "")


def end_name(vpc, subnet):
    """VPC/SUBNET, or an empty string where no record knows the end."""
    return f"{vpc['name']}/{subnet['name']}" if subnet else ""


def send(flow, patience=2.0):
    """Send the packet of a flow from its namespace -> Reply."""
    need_up([(flow.home, flow.source)])
    question = flow.address, flow.port, flow.protocol
    return in_namespace(flow.source["ns"], lambda: probe([question], patience)[0])


def need_up(ends):
    """A Problem unless the namespaces of these subnets, with their VPCs, are there."""
    for vpc, subnet in ends:
        if not is_namespace(subnet["ns"]):
            raise Problem(f"subnet {subnet['name']} is down: there is no namespace {subnet['ns']}",
                          f"`vpcctl restore {vpc['name']}` brings it up", 3)


def probe_words(flow):
    """The command that sends the packet of a flow by hand."""
    words = {"tcp": ("nc", "-z", "-w", "3", flow.address, str(flow.port)),
             "udp": ("nc", "-zu", "-w", "3", flow.address, str(flow.port)),
             "icmp": ("ping", "-c", "1", "-W", "3", flow.address)}
    return ("ip", "netns", "exec", flow.source["ns"]) + words[flow.protocol]


def blocking(hops):
    """The hop that blocks, or None."""
    return next((hop for hop in hops if hop.ok is False), None)


def is_heard(hops):
    """Whether something was seen that listens at the end of the way."""
    return any(hop.where == "listening" and hop.ok for hop in hops)


def verdict(flow, reply, hops):
    """What came of a packet, in one word for one cause -> open, refused, rejected, no route or no answer.

    Where the hops know what stops it, that decides: the kernel limits how many ICMP errors it sends, so that one
    and the same cause is told at one time and not at another.
    """
    block = blocking(hops)
    far_end = reply.kind == "reset" or (
        (reply.kind, reply.sender, flow.protocol) == ("port", flow.address, "udp"))
    if reply.kind == "open":
        return "open"
    if block and not (far_end and block.answer == "no answer"):
        return block.answer
    if far_end:                                   # where something listens, a rule has forged that answer
        return "rejected" if is_heard(hops) else "refused"
    return {"port": "rejected", "prohibited": "rejected", "unreachable": "no route"}.get(reply.kind, "no answer")


def answer_reasons(flow, answer, hops):
    """Why a packet had that answer, as lines of text, the reason first."""
    block = blocking(hops)
    if answer == "open":
        return [f"although {block.where} should stop it: {block.text}"] if block else []
    if block:
        return render_end(block)
    if flow.protocol == "udp" and answer == "no answer" and is_heard(hops):
        return ["something listens there, and need not answer what it does not understand"]
    unknown = [f"? {hop.where}: {hop.text}" for hop in hops if hop.ok is None]
    return (unknown or ["nothing is seen that would stop it"]) + [
        f"to see where it is lost: vpcctl explain {flow.home['name']} {flow.source['name']} {flow.address}"
        f"{flow.options} --trace"]


def probe(questions, patience=2.0):
    """Called in a namespace: send a packet for each (address, port, protocol), all at once -> their Replies."""
    import select
    import time
    probes, poll = [Probe(*question) for question in questions], select.poll()
    waiting = {one.socket.fileno(): one for one in probes if one.send()}
    for number, one in waiting.items():
        poll.register(number, one.events)
    deadline = time.monotonic() + patience
    while waiting and time.monotonic() < deadline:
        for number, _ in poll.poll(max(1, (deadline - time.monotonic()) * 1000)):
            if waiting[number].look():
                poll.unregister(number)
                del waiting[number]
    for one in probes:
        one.socket.close()
    return [one.reply._replace(number=one.number) for one in probes]


class Probe:
    """One packet, and what came of it: `reply`. It carries something of its own: so it is known behind NAT."""

    def __init__(self, address, port, protocol):
        import select
        import socket
        self.target, self.protocol, self.reply = (address, port or 0), protocol, NO_REPLY
        kind, number = {"tcp": (socket.SOCK_STREAM, 0), "udp": (socket.SOCK_DGRAM, 0),
                        "icmp": (socket.SOCK_RAW, socket.IPPROTO_ICMP)}[protocol]
        self.socket = socket.socket(socket.AF_INET, kind, number)
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_IP, 11, 1)                  # IP_RECVERR: who sent the error, too
        self.events = select.POLLIN | (select.POLLOUT if protocol == "tcp" else 0)
        self.packet = echo_request() if protocol == "icmp" else b"vpcctl" + os.urandom(6)
        if protocol == "icmp":
            self.number = int.from_bytes(self.packet[4:6], "big")
        else:
            self.socket.bind(("", 0))
            self.number = self.socket.getsockname()[1]

    def send(self):
        """Send it -> whether there is something to wait for."""
        try:
            self.socket.connect(self.target)
            if self.protocol != "tcp":
                self.socket.send(self.packet)
        except BlockingIOError:
            pass
        except OSError as error:
            return not self.failed(error.errno)
        return True

    def look(self):
        """Something came -> whether it is the answer."""
        import socket
        try:
            if self.protocol == "tcp":
                number = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if number:
                    self.failed(number)
                else:
                    self.reply = Reply("open", self.target[0])
                return True
            answer = self.socket.recv(1500)
        except BlockingIOError:
            return self.failed(0)
        except OSError as error:
            return self.failed(error.errno)
        body = answer[(answer[0] & 15) * 4:] if self.protocol == "icmp" else b""
        if self.protocol == "icmp" and (body[0] or body[4:6] != self.packet[4:6]):
            return False                          # an answer to somebody else's ping, or our own to ourselves
        self.reply = Reply("open", self.target[0])
        return True

    def failed(self, number):
        """An error came: what it was, from the error queue if it is an ICMP message -> whether it counts."""
        import errno
        import socket
        import struct
        kinds = {errno.ECONNREFUSED: "reset", errno.ECONNRESET: "reset", errno.EACCES: "prohibited",
                 errno.EPERM: "silence", errno.ETIMEDOUT: "silence"}
        try:
            sent, notes, _, _ = self.socket.recvmsg(512, 512, 0x2000)                   # MSG_ERRQUEUE
            if self.protocol == "icmp" and sent[4:6] != self.packet[4:6]:
                return False
            for level, kind, data in notes:
                origin, what, code = struct.unpack_from("=4xBBB", data)
                if (level, kind, origin, what) == (socket.IPPROTO_IP, 11, 2, 3):        # it is an ICMP "unreachable"
                    word = {2: "port", 3: "port", 9: "prohibited", 10: "prohibited", 13: "prohibited"}
                    self.reply = Reply(word.get(code, "unreachable"), socket.inet_ntoa(data[20:24]))
                    return True
        except OSError:
            pass                                  # the queue is empty: this machine's own error, or a reset
        if number:
            self.reply = Reply(kinds.get(number, "unreachable"), "")
        return bool(number)


def echo_request():
    """A ping, by hand: `ping` is not installed everywhere."""
    import struct
    number = int.from_bytes(os.urandom(2), "big")     # others may be pinging here as well
    body = struct.pack("!BBHHH", 8, 0, 0, number, 1) + b"vpcctl" + os.urandom(6)
    total = sum(struct.unpack(f"!{len(body) // 2}H", body))
    total = (total & 0xffff) + (total >> 16)
    return body[:2] + struct.pack("!H", ~(total + (total >> 16)) & 0xffff) + body[4:]


# ------------------------------------------------------------------------------------------------ explain: why is it blocked?

@command("explain", "explain blog web db --port 5432", VPC, SUBNET,
         arg("target", metavar="TARGET", help="an address, VPC/SUBNET, or a name", complete="target"),
         arg("--port", type=port_type, metavar="PORT", help="the target's port (default: its first app's, or 80)"),
         arg("--protocol", choices=PROTOCOLS, default="tcp",
             help="tcp (default), udp, icmp (ping) or all: any but these three, of which only rules for all speak"),
         arg("--probe", action="store_true", help="also send the packet, and say if it disagrees (needs root)"),
         arg("--trace", action="store_true", help="also send the packet, and show where it is seen (needs root)"),
         arg("--policy", action="store_true", help="print the policy that would let it pass, for apply-policy"),
         arg("--json", action="store_true", help="the hops as JSON"))
def explain(ctl, args):
    """walk the way of a packet, hop by hop, and say what blocks it and which command would allow it"""
    ctl.subnet(ctl.vpc(args.vpc), args.subnet)
    asked = (ctl.world, args.vpc, args.subnet, args.target, args.port, args.protocol)
    if (args.probe or args.trace) and args.protocol == "all":
        raise Problem("a probe speaks tcp, udp or icmp", "leave --probe and --trace out, or name one of these")
    if args.policy:
        found = path_policy(*asked)
        if not found:
            raise Problem("no policy is in the way", "`vpcctl explain` without --policy shows what is", 1)
        return ctl.show(json.dumps(found[1], indent=2))
    if (args.probe or args.trace) and not ctl.dry_run:
        need_root()
    flow = path_flow(*asked)
    sight = Records() if ctl.dry_run else Sight(ctl.world)
    hops = list(explained(flow, sight))
    if not args.json:
        say_signed(ctl, render_explain(hops, "ok" in mark(True)))
    answer, found = sent(ctl, flow, hops, args, sight)
    blocked = blocking(hops) is not None
    if args.json:
        passes = False if blocked else all(hop.ok for hop in hops) or None
        told = [{key: getattr(hop, key) for key in ("ok", "where", "text", "remedy")} for hop in hops]
        ctl.show(json.dumps({"from": end_name(flow.home, flow.source),
                             "to": end_name(flow.far, flow.host) or flow.address,
                             "protocol": flow.protocol, "port": flow.port, "passes": passes,
                             "hops": told, "probe": answer, "trace": found and trace_data(found)}, indent=2))
    elif found:
        say_signed(ctl, trace_lines(found, "ok" in mark(True)))
    return 1 if blocked or (answer or "open") != "open" or (found and not is_answered(found)) else 0


def sent(ctl, flow, hops, args, sight):
    """Send the packet if that was asked for -> (its answer or None, its Trace or None). Where the answer is not
    what the hops say, it is traced, too. A dry run shows how to do it by hand."""
    answer, found = None, None
    if ctl.dry_run:
        for argv in [*taps_by_hand(flow)] * args.trace + [shown(probe_words(flow))] * (args.probe or args.trace):
            ctl.say(f">>> {argv}")
        return answer, found
    if args.probe:
        answer = verdict(flow, send(flow), hops)
    differs = answer and (answer == "open") == (blocking(hops) is not None)
    if args.trace or differs:
        found = trace(sight, flow)
    if answer and not args.json:
        ctl.say(f"probe: {answer}")
    if differs and not args.json:
        ctl.say("probe and hops disagree; where the packet is seen:")
    return answer, found


def say_signed(ctl, lines):
    """Print lines; a sign at the beginning has its colour."""
    colours = {"\u2713": 32, "ok": 32, "\u2717": 31, "NO": 31, "?": 33, "??": 33}
    for line in lines:
        sign, _, rest = line.partition(" ")
        ctl.say(f"{paint(sign, colours[sign])} {rest}" if sign in colours else line)


# ok: True, False, or None where nobody can tell; answer: what a packet comes to that is stopped there.
Hop = namedtuple("Hop", "ok where text remedy answer")
Hop.__new__.__defaults__ = (None, "no answer")
Flow = namedtuple("Flow", "world home source far host address protocol port what options")


def ip_inside(address, cidr):
    """Whether an address lies in a block."""
    import ipaddress
    return ipaddress.ip_address(address) in ipaddress.ip_network(cidr)


def find_subnet(world, vpc, subnet):
    """(VPC record, subnet record) by names; a Problem names what is missing."""
    if vpc not in world:
        raise Problem("there is no VPC '%s'" % vpc, nearest(vpc, world) or "vpcctl list shows the VPCs")
    for record in world[vpc]["subnets"]:
        if record["name"] == subnet:
            return world[vpc], record
    raise Problem("VPC '%s' has no subnet '%s'" % (vpc, subnet), nearest(subnet, [
        known["name"] for known in world[vpc]["subnets"]]) or "vpcctl inspect %s shows them" % vpc)


def resolve_target(world, vpc, subnet, text):
    """The address that TARGET (an address, vpc/subnet, or a name seen from there) means, or a Problem."""
    if whole(r"[0-9]+(?:\.[0-9]+){3}")(text):
        return dotted(address_number(text))
    known = name_data(world, find_subnet(world, vpc, subnet)[0])
    for address, names in known:
        if text in names:
            return address
    if "/" in text:
        return find_subnet(world, *text.split("/", 1))[1]["host_ip"]
    raise Problem("%s/%s knows no name '%s'" % (vpc, subnet, text), nearest(text, [
        name for _, names in known for name in names]) or (
        "names are those of its own VPC (db, db.%s.internal) and what a peering allows (api.shop); "
        "vpc/subnet works for any" % vpc))


def rule_text(rule):
    """A policy rule in words: allow tcp/80 from web."""
    other = "".join(" %s %s" % (key, rule[key]) for key in ("from", "to") if rule.get(key))
    port = "/%s" % rule["port"] if rule.get("port") else ""
    return "%s %s%s%s" % (rule["action"], rule["protocol"], port, other)


def rule_matches(rule, direction, protocol, port, other_ip, siblings):
    """Whether a policy rule speaks of this packet; other_ip is the far end, siblings the VPC's subnets."""
    if rule["protocol"] not in (protocol, "all"):
        return False
    low, high = ports(rule["port"]) if "port" in rule else (None, None)
    if low and not low <= port <= high:
        return False
    other = rule.get("from" if direction == "ingress" else "to")
    if other is None:
        return True
    other = {s["name"]: s["cidr"] for s in siblings}.get(other, other)
    return is_block(other) and ip_inside(other_ip, other)  # a name of no subnet: nobody


def policy_decision(policy, direction, protocol, port, other_ip, siblings):
    """(allowed, reason, index of the deciding rule or None) in the order of the kernel: denies, allows, default."""
    rules = policy.get(direction) or []
    for action in ("deny", "allow"):
        for index, rule in enumerate(rules):
            if rule["action"] == action and rule_matches(rule, direction, protocol, port, other_ip, siblings):
                return action == "allow", "%s rule %d, %s" % (direction, index + 1, rule_text(rule)), index
    default, why = policy_default(policy, direction)
    return default == "allow", "no %s rule names it; %s" % (direction, why), None


def cut_out(rule, direction, protocol, port, other_ip, siblings):
    """The rules that are left of a rule when one flow is taken out of it. What is left of a rule for all protocols names
    tcp, udp and icmp for that one host, since no rule names the others."""
    import ipaddress
    key, rest = ("from" if direction == "ingress" else "to"), []
    named = {s["name"]: s for s in siblings}.get(rule.get(key))
    alone = named and named["host_ip"] == other_ip     # one host lives in a subnet: nobody else is meant
    if rule["protocol"] == "all":
        for kind in PROTOCOLS[:3]:
            own = dict(rule, protocol=kind, **({} if alone else {key: other_ip + "/32"}))
            rest += cut_out(own, direction, protocol, port, other_ip, siblings) if kind == protocol else [own]
    elif protocol != "icmp":
        rest = outside(rule, [(port, port)])
        rule = dict(rule, port=port)
    if alone:
        return rest
    whole = ipaddress.ip_network(named["cidr"] if named else rule.get(key) or "0.0.0.0/0")
    other = next((s["cidr"] for s in siblings if s["host_ip"] == other_ip), other_ip + "/32")
    if not inside(as_network(other), whole):
        other = other_ip + "/32"
    blocks = sorted(whole.address_exclude(as_network(other)))
    return rest + [dict(rule, **{key: str(block)}) for block in blocks]


def outside(rule, spans):
    """What is left of a rule without some ranges of ports: rules."""
    low, high = ports(rule["port"]) if "port" in rule else (1, 65535)
    left, rest = [], low
    for first, last in sorted(spans):
        left.append((rest, min(high, first - 1)))
        rest = max(rest, last + 1)
    left.append((rest, high))
    if left == [(low, high)]:
        return [rule]
    return [dict(rule, port=first if first == last else f"{first}-{last}")
            for first, last in left
            if first <= last]


def allows_instead(rules, denies, protocol, default):
    """Rules that say, with "deny" as default, what these rules and denies (of everybody, one protocol) say: to
    except one flow from "deny everybody" takes 32 denies. Protocols that no rule can name are let in no more."""
    spans = [ports(rule["port"]) if "port" in rule else (1, 65535) for rule in denies]
    if default == "allow":
        rules = rules + [{"protocol": "all", "action": "allow"}]
    left = []
    for rule in rules:
        kinds = PROTOCOLS[:3] if (rule["action"], rule["protocol"]) == ("allow", "all") else [rule["protocol"]]
        for own in [dict(rule, protocol=kind) for kind in kinds]:
            touched = (own["action"], own["protocol"]) == ("allow", protocol)
            left += outside(own, spans) if touched else [own]
    return left


def allowing_policy(subnet, direction, protocol, port, other_ip, siblings):
    """A policy as for apply-policy: that of a subnet, changed so that this one flow passes and no other."""
    policy, key = subnet["policy"], "from" if direction == "ingress" else "to"
    new = {"subnet": subnet["cidr"], "ingress": list(policy.get("ingress") or []),
           "egress": list(policy.get("egress") or [])}
    flow, others = (direction, protocol, port, other_ip, siblings), (direction, "all", None, other_ip, siblings)
    default = policy_default(policy, direction)[0]
    # denies stand before allows, so an exception has to be cut out of the deny
    hit = [rule for rule in new[direction] if rule["action"] == "deny" and rule_matches(rule, *flow)]
    of_all = [rule for rule in hit if rule.get(key, "0.0.0.0/0") == "0.0.0.0/0"]
    if protocol != "all" and any(rule["protocol"] == "all" for rule in hit):
        # Protocols that no rule names went with that deny. Now the default has to keep them out, for this host only.
        new[direction] += [{"protocol": "all", "action": "allow"}] * (default == "allow")
        hit += [rule for rule in new[direction] if rule["action"] == "allow" and rule_matches(rule, *others)]
        default, of_all = "deny", []
    rules = []
    for rule in new[direction]:
        if protocol == "all" or rule not in of_all:
            rules += cut_out(rule, *(flow if rule["action"] == "deny" else others)) if rule in hit else [rule]
    if of_all and protocol != "all":
        rules, default = allows_instead(rules, of_all, protocol, default), "deny"
    if default == "deny" and not any(r["action"] == "allow" and rule_matches(r, *flow) for r in rules):
        name = [s["name"] for s in siblings if s["host_ip"] == other_ip]
        rule = {"protocol": protocol, "action": "allow", key: name[0] if name else other_ip + "/32"}
        rules.append(rule if port is None else dict(rule, port=port))
    new[direction] = rules
    if policy.get("default"):
        new["default"] = dict(policy["default"])
    if policy_default(new, direction)[0] != default:
        new["default"] = dict(new.get("default", {}), **{direction: default})
    return new


def explain_path(world, vpc, subnet, target, port=None, protocol="tcp", sight=None):
    """The hops of a packet from a subnet to TARGET and back, up to the first that blocks.

    tcp without a port: the target's first app, else 80. `sight` is what can be seen beside the records (default:
    nothing, see Records). A Problem if a name means nothing.
    """
    return list(explained(path_flow(world, vpc, subnet, target, port, protocol), sight or Records()))


def explained(flow, sight):
    """Yield the hops of a flow, up to the first that blocks, or from which nobody can follow it."""
    for hop in walk(flow, sight):
        yield hop
        if hop.ok is False or hop.where == "elsewhere":
            return


def path_flow(world, vpc, subnet, target, port, protocol):
    """What is asked: home and source are the sending records, far and host the receiving ones or None."""
    home, source = find_subnet(world, vpc, subnet)
    address = resolve_target(world, vpc, subnet, target)
    address = "127.0.0.1" if address == "0.0.0.0" else address
    far = next((v for _, v in sorted(world.items()) if ip_inside(address, v["cidr"])), None)
    host = next((s for s in far["subnets"] if s["host_ip"] == address), None) if far else None
    if address.startswith("127."):
        far, host = home, source
    if protocol in ("icmp", "all"):
        if port is not None:
            raise Problem(f"{protocol} has no port", "leave --port out, or name tcp or udp")
        what = "icmp" if protocol == "icmp" else "a protocol other than tcp, udp, icmp"
        return Flow(world, home, source, far, host, address, protocol, None, what, f" --protocol {protocol}")
    if port is None and protocol == "udp":
        raise Problem("which udp port?", hint="add --port P")
    if port is None:
        apps = far.get("apps", []) if host else []
        port = next((app["port"] for app in apps if app["subnet"] == host["name"] and app.get("protocol") != "udp"), 80)
    options = f" --port {port}{' --protocol udp' if protocol == 'udp' else ''}"
    return Flow(world, home, source, far, host, address, protocol, port, f"{protocol}/{port}", options)


def walk(flow, sight):
    """Yield the hops; whoever reads stops at the first that blocks."""
    goal = f"{end_name(flow.far, flow.host)} ({flow.address})" if flow.host else flow.address
    start = f"{end_name(flow.home, flow.source)} ({flow.source['host_ip']})"
    yield Hop(True, "packet", f"{flow.what} from {start} to {goal}")
    yield from sight.amiss(flow)
    if flow.host is flow.source:
        yield Hop(True, "loopback", "its own address: no policy and no router is asked")
        yield from sight.checked(flow, "itself")
        yield listening_hop(flow, sight)
        return
    yield from sight.checked(flow, "out", policy_hop(flow, "egress"))
    owner = next((v for v in flow.world.values() if flow.address in router_addresses(v)), None)
    device = sight.host_device(flow.address)
    if owner or device:
        yield from sight.checked(flow, "host", router_hop(flow, owner) if owner else own_hop(flow, device))
    else:
        yield from sight.routed(flow, route_hop(flow, sight))
        yield from sight.checked(flow, "through", chain_hop(flow))
        if not flow.far:
            yield Hop(None, "beyond", "no record tells what answers there")
        else:
            yield host_hop(flow)
            yield from sight.checked(flow, "in", policy_hop(flow, "ingress"))
            yield unheard(listening_hop(flow, sight), flow, sight)
    yield from sight.way_back(flow, Hop(True, "way back", "replies to it pass every policy, and only they do"))


def unheard(hop, flow, sight):
    """The listening hop: a refusal, too, has to come back to be heard."""
    if hop.ok is False and any(back.ok is False for back in sight.way_back(flow, hop._replace(ok=True))):
        return hop._replace(answer="no answer")
    return hop


def policy_hop(flow, direction):
    """The source's egress or the target's ingress policy."""
    vpc, subnet = (flow.home, flow.source) if direction == "egress" else (flow.far, flow.host)
    other = flow.address if direction == "egress" else flow.source["host_ip"]
    ok, why, index = policy_decision(subnet["policy"], direction, flow.protocol, flow.port, other, vpc["subnets"])
    place = f"{vpc['name']}-{subnet['name']}.json"
    remedy = None if ok else (
        f"vpcctl explain {flow.home['name']} {flow.source['name']} {flow.address}{flow.options} --policy > {place}"
        f" && vpcctl apply-policy {vpc['name']} {place}")
    if remedy and index is not None:
        remedy += f"   # or remove or narrow {direction} rule {index + 1} yourself"
    return Hop(ok, direction + " policy", f"{vpc['name']}/{subnet['name']}: {why}", remedy)


def path_policy(world, vpc, subnet, target, port=None, protocol="tcp"):
    """(VPC name, policy for apply-policy) that opens the first policy in the way; None if none is."""
    flow = path_flow(world, vpc, subnet, target, port, protocol)
    ends = [("egress", flow.home, flow.source, flow.address),
            ("ingress", flow.far, flow.host, flow.source["host_ip"])]
    for direction, owner, record, other in ends:
        if record and flow.host is not flow.source:
            asked = (direction, flow.protocol, flow.port, other, owner["subnets"])
            if not policy_decision(record["policy"], *asked)[0]:
                return owner["name"], allowing_policy(record, *asked)
    return None


def router_addresses(vpc):
    """The addresses of a VPC that are the host's own: the bridge's and the subnets' gateways."""
    import ipaddress
    return [str(ipaddress.ip_network(vpc["cidr"])[1])] + [s["gw"] for s in vpc["subnets"]]


def router_hop(flow, owner):
    """A gateway's address: the host takes ping from the VPC it is the gateway of, and nothing else."""
    if owner is flow.home and flow.protocol == "icmp":
        return Hop(True, "host", f"{flow.address} is this VPC's gateway, which answers ping")
    if owner is flow.home:
        remedy = "nothing does, by design; ping it: vpcctl explain %s %s %s --protocol icmp" % (
            flow.home["name"], flow.source["name"], flow.address)
    else:
        remedy = "nothing does, by design; aim at a subnet of %s instead" % owner["name"]
    text = "%s is a gateway of %s, that is this host: it answers only ping, only to %s" % (
        flow.address, owner["name"], owner["name"])
    return Hop(False, "host", text, remedy)


def own_hop(flow, device):
    """Another address of the host's: with and without NAT, the host takes nothing there from a VPC."""
    text = f"{flow.address} is this host itself ({device}): a VPC gets answers only to ping, only from its gateways"
    return Hop(False, "host", text, f"nothing does, by design; ping the gateway instead: vpcctl explain "
               f"{flow.home['name']} {flow.source['name']} {flow.source['gw']} --protocol icmp")


def peering_with(vpc, name):
    """The record of a peering, or None."""
    return next((p for p in vpc.get("peers", []) if p["peer_vpc"] == name), None)


def peer_remedy(flow):
    """The command that lets source and target talk over a peering, new or made wider."""
    a, b = flow.home["name"], flow.far["name"]
    peer = peering_with(flow.home, b)
    allowed = list(peer["allowed"]) if peer else []
    ends = [(flow.source["host_ip"], flow.source["cidr"]),
            (flow.address, flow.host["cidr"] if flow.host else flow.address + "/32")]
    allowed += [cidr for ip, cidr in ends if not any(ip_inside(ip, block) for block in allowed)]
    if peer and peer.get("side") == "b":
        a, b = b, a
    undo = "vpcctl unpeer %s %s && " % (a, b) if peer else ""
    return "%svpcctl peer %s %s --allow-cidrs %s" % (undo, a, b, ",".join(allowed))


def route_hop(flow, sight):
    """The route table of the source's VPC: its own range, the listed blocks of peers, with NAT the rest."""
    home, address, nat = flow.home, flow.address, flow.home.get("nat")
    table = "table %s: " % home["table"]

    def hop(ok, text, remedy=None):
        return Hop(ok, "route table", table + text, remedy, "no route")
    if flow.far is home:
        return hop(True, "%s is in its own range %s" % (address, home["cidr"]))
    if flow.far:
        peer = peering_with(home, flow.far["name"])
        block = next((b for b in peer["allowed"] if ip_inside(address, b)), None) if peer else None
        if block:
            return hop(True, "%s is a listed block of peer %s" % (block, flow.far["name"]))
        why = "no listed block of peer %s holds %s" if peer else "not peered with %s, whose range holds %s"
        return hop(False, why % (flow.far["name"], address) + ": unreachable", peer_remedy(flow))
    block = next((block for block in UNROUTED if ip_inside(address, block)), None)
    if block:
        return hop(False, f"{address} is in {block}, which is no network out there: unreachable",
                   "nothing does, by design")
    if not nat:
        return hop(False, f"{address} is outside and there is no NAT: unreachable", nat_remedy(flow, sight))
    if nat.get("subnets") is not None and flow.source["name"] not in nat["subnets"]:
        remedy = "vpcctl disable-nat %s && vpcctl enable-nat %s --interface %s --subnet-filter %s" % (
            home["name"], home["name"], nat["interface"], ",".join(nat["subnets"] + [flow.source["name"]]))
        return hop(False, "NAT serves only %s: unreachable" % ", ".join(nat["subnets"]), remedy)
    return hop(True, "%s is outside: the host's default route" % address)


def nat_remedy(flow, sight):
    """The command that gives a VPC the way out to an address; None where the host itself has none."""
    uplink, usual = sight.uplink(flow.address)
    if uplink == "none":
        return None
    return f"vpcctl enable-nat {flow.home['name']}" + f" --interface {uplink}" * (uplink != usual)


def chain_hop(flow):
    """The firewall chain of the source's VPC."""
    home, source = flow.home, flow.source["host_ip"]
    if flow.far is home:
        return Hop(True, "firewall", "chain %s: within %s" % (home["chain"], home["cidr"]))
    if not flow.far:
        return Hop(True, "firewall", "chain %s: out by %s, as the host's address (NAT)" % (
            home["chain"], home["nat"]["interface"]))
    peer = peering_with(home, flow.far["name"])
    block = next((b for b in peer["allowed"] if ip_inside(source, b)), None)
    if block:
        far = next(b for b in peer["allowed"] if ip_inside(flow.address, b))
        return Hop(True, "peering", "chain %s: %s and %s may talk" % (peer["chain"], block, far))
    return Hop(False, "peering", "chain %s: no listed block holds the source %s" % (peer["chain"], source),
               peer_remedy(flow))


def host_hop(flow):
    """Whether anybody has the address."""
    import ipaddress
    far, number = flow.far, int(ipaddress.ip_address(flow.address))
    if flow.host:
        return Hop(True, "address", "%s is subnet %s" % (flow.address, flow.host["name"]))
    near = next((s for s in far["subnets"] if ip_inside(flow.address, s["cidr"])), None)
    if near:
        return Hop(False, "address", "nobody has %s" % flow.address, "nothing does; subnet %s answers at %s: "
                   "vpcctl explain %s %s %s%s" % (near["name"], near["host_ip"], flow.home["name"],
                                                  flow.source["name"], near["host_ip"], flow.options))
    # a subnet's host is the second address of its block: .2
    blocks = (ipaddress.ip_network((number - 2, prefix), strict=False)
              for prefix in range(max(24, ipaddress.ip_network(far["cidr"]).prefixlen), 31))
    fitting = next((b for b in blocks if int(b[2]) == number and not any(
        b.overlaps(ipaddress.ip_network(s["cidr"])) for s in far["subnets"])), None)
    remedy = "vpcctl add-subnet %s net-%s" % (far["name"], flow.address.replace(".", "-"))
    remedy += " --cidr %s" % fitting if fitting else "  # at another address"
    text = "nobody has %s, no subnet of %s holds it" % (flow.address, far["name"])
    return Hop(False, "address", text, remedy)


def app_on(flow):
    """The record of the app that a packet is for, or None."""
    return next((app for app in flow.far.get("apps", []) if app["subnet"] == flow.host["name"]
                 and app["port"] == flow.port and app.get("protocol", "tcp") == flow.protocol), None)


def listening_hop(flow, sight):
    """Whether anything takes the packet at its end."""
    if flow.protocol == "icmp":
        return Hop(True, "listening", "the kernel answers ping")
    if flow.protocol == "all":
        return Hop(None, "listening", f"no record tells who takes it in {end_name(flow.far, flow.host)}")
    place, found, app = end_name(flow.far, flow.host), sight.listeners(flow.host, flow.far), app_on(flow)
    hop = lambda ok, text, remedy=None: Hop(ok, "listening", text, remedy, "refused")
    if found is None:
        return hop(*sight.guess(flow, app))
    own = [one for one in found if one.port == flow.port and one.kind.startswith(flow.protocol)]
    for one in own:
        taken = sight.takes_ipv4(flow, one) if one.address == "::" else one.address in ("0.0.0.0", flow.address)
        if taken is not False:
            return hop(taken, f"{flow.what} on {place}: {sight.program(one, flow.host)} listens"
                       + ("" if taken else " by IPv6; whether it takes IPv4 is not seen"))
    if own:
        where = " and ".join(sorted({one.address for one in own}))
        name = sight.program(own[0], flow.host)
        return hop(False, f"{name} listens on {where} only: no other subnet reaches it",
                   f"let it listen on {flow.host['host_ip']}, or on every address (0.0.0.0)")
    text = f"nothing listens on {flow.what} in {place}"
    if app and not sight.runs(app):
        return hop(False, f"{text}: deploy-app's program is not running",
                   f"vpcctl restore {flow.far['name']}   # why it ended: vpcctl logs {flow.far['name']} "
                   f"{flow.host['name']} --port {flow.port}")
    if app:
        return hop(False, f"{text}, although deploy-app's program runs",
                   f"vpcctl logs {flow.far['name']} {flow.host['name']} --port {flow.port}   # what does it do?")
    if any(one.port == flow.port for one in found):       # deploy-app would refuse
        return hop(False, f"{text}, only by {'udp' if flow.protocol == 'tcp' else 'tcp'}")
    return hop(False, text, deploy_remedy(flow))


def deploy_remedy(flow):
    """The command that puts an answer on a port."""
    remedy = f"vpcctl deploy-app {flow.far['name']} {flow.host['name']} --port {flow.port}"
    if flow.protocol == "udp":
        remedy += (f" -- python3 -c \"import socket as k; s = k.socket(2, 2); s.bind(('', {flow.port})); "
                   "[s.sendto(*s.recvfrom(2048)) for _ in iter(int, 1)]\"")
    return remedy


# -- what is seen of a packet's way, beside the records

class Records:
    """Nothing is seen: the records alone speak. It is what `walk` asks, and what Sight answers better."""

    def amiss(self, _flow):
        """Hops for what is recorded, but is not there."""
        return ()

    def checked(self, _flow, _place, hop=None):
        """A hop of the records, with what the firewall of that place does."""
        return (hop,) if hop else ()

    def routed(self, _flow, hop):
        """The routing hop of the records, with what the kernel's own routing says."""
        return (hop,)

    def way_back(self, _flow, hop):
        """The last hop, after whatever stops the replies."""
        return (hop,)

    def host_device(self, _address):
        """The interface of the host that has an address; None if none is known."""
        return None

    def uplink(self, _address):
        """(interface by which the host reaches an address, the one that enable-nat takes); "none": no way."""
        return None, None

    def listeners(self, _subnet, _vpc):
        """The Listeners in a subnet; None if they cannot be seen."""
        return None

    def guess(self, flow, app):
        """(ok, text, remedy) for the listening hop by the records alone. By udp anybody may be listening."""
        if app:
            return True, f"{flow.what} on {end_name(flow.far, flow.host)}"
        if flow.protocol == "tcp":
            place = end_name(flow.far, flow.host)
            return False, f"nothing listens on {flow.what} in {place}", deploy_remedy(flow)
        return None, f"no record tells who is on {flow.what} in {end_name(flow.far, flow.host)}"


OUT_CHAINS = (("raw", "OUTPUT"), ("mangle", "OUTPUT"), ("nat", "OUTPUT"), ("filter", "OUTPUT"),
              ("mangle", "POSTROUTING"), ("nat", "POSTROUTING"))
IN_CHAINS = (("raw", "PREROUTING"), ("mangle", "PREROUTING"), ("nat", "PREROUTING"), ("mangle", "INPUT"),
             ("filter", "INPUT"), ("nat", "INPUT"))
PLACES = {"out": OUT_CHAINS, "in": IN_CHAINS, "host": IN_CHAINS, "from host": OUT_CHAINS,
          "itself": OUT_CHAINS + IN_CHAINS,
          "through": IN_CHAINS[:3] + (("mangle", "FORWARD"), ("filter", "FORWARD")) + OUT_CHAINS[4:]}
BACK = {"out": "in", "in": "out", "through": "through", "host": "from host"}     # where a place's replies pass
HARMLESS = ("LOG", "NFLOG", "ULOG", "TRACE", "MARK", "CONNMARK", "CONNSECMARK", "SECMARK", "TCPMSS", "CLASSIFY",
            "CHECKSUM", "DSCP", "TOS", "TTL")
DIVERTING = ("DNAT", "REDIRECT", "NETMAP", "SNAT", "MASQUERADE", "TPROXY", "QUEUE", "NFQUEUE")
SOME_PORT = (32768, 60999)                        # where a client's own port lies
# What looks whole although the record's step is not there stops every packet; other steps may.
VITAL = {"ns": "there is no namespace {}", "link": "there is no interface {}", "up": "interface {} is off",
         "master": "cable {} is not plugged into {}"}

Packet = namedtuple("Packet", "source target protocol sport dport entry exit mac states back")
Finding = namedtuple("Finding", "sure target table chain rule ours")
# The routing rule and the route that decide a packet's way, or None; passed: tables that know none.
Decision = namedtuple("Decision", "sure rule route passed")


class Sight(Records):
    """What can be seen of this machine: links and routes by everybody; with root also rules, and into namespaces.
    What was looked at once is not looked at again."""

    def __init__(self, world):
        self.world, self.root, self.trouble = world, os.geteuid() == 0, ""
        self.routing, self.steps, self.unread = {}, {}, {}
        self.subnets = [subnet for vpc in world.values() for subnet in vpc["subnets"]]
        self.seen, self.rules = Seen(), {}        # namespace (None: the host) -> table -> chain -> (policy, rules)
        try:
            self._look()
        except (Failure, Problem, OSError) as trouble:
            self.root, self.trouble = False, str(trouble)

    def _look(self):
        see_links(self.seen, set())
        see_addresses(self.seen)
        see_routes(self.seen)
        if self.root:
            tables = parse_rules(saved_rules())
            for table, (chains, rules) in tables.items():
                see_table(self.seen, table, chains, rules)
            self.rules[None], self.unread[None] = by_chain(tables), nft_tables()
        for key, (_, (function, arguments)) in resources(self.world).items():
            self.steps[key] = (function, arguments)

    def inside(self, space):
        """A namespace's rules by table and chain, None if it cannot be looked into; its facts go to `seen`."""
        if space not in self.rules:
            self.rules[space] = None
            if self.root and is_namespace(space):
                see_inside(self.seen, [subnet for subnet in self.subnets if subnet["ns"] == space])
                try:
                    tables, self.unread[space] = in_namespace(space, lambda: (parse_rules(saved_rules()), nft_tables()))
                    self.rules[space] = by_chain(tables)
                except (Failure, OSError):
                    pass                          # one that cannot be looked into: see `amiss`
        return self.rules[space]

    # -- what is recorded

    def amiss(self, flow):
        if self.trouble:
            yield Hop(None, "machine", f"could not look at it: {self.trouble}")
            return
        lost = []
        for name, step in self.lost(flow):
            fact = step.fact[2:] if step.fact[0] == "inside" else step.fact
            if step.fact in self.seen.foreign:
                yield Hop(False, "machine", f"{describe(step)} is not vpcctl's",
                          f"remove it, then vpcctl restore {name}")
                return
            if fact[0] in VITAL or (step.fact[0] == "inside" and fact[0] in ("address", "route")):
                text = VITAL.get(fact[0], "there is no " + " ".join(str(word) for word in fact)).format(*fact[1:])
                place = f" in {step.fact[1]}" if step.fact[0] == "inside" else ""
                text = f"VPC {name} is not whole: {text}{place}"
                yield Hop(False, "machine", text, f"vpcctl restore {name}")
                return
            lost.append((name, step))
        for space in (flow.source["ns"], flow.host and flow.host["ns"]):
            if space in self.seen.broken:
                yield Hop(None, "machine", f"cannot look into namespace {space}: {self.seen.broken[space]}")
        if lost:
            names = " ".join(sorted({name for name, _ in lost}))
            more = f" (and {counted(len(lost) - 1, 'thing')} more)" if len(lost) > 1 else ""
            text = f"missing or changed: {describe(lost[0][1])}{more}; `vpcctl restore {names}` repairs it"
            yield Hop(None, "machine", text)

    def lost(self, flow):
        """(VPC, step) of a flow that is recorded and not there, as far as it can be seen, in order of making."""
        spaces = [subnet["ns"] for subnet in (flow.source, flow.host) if subnet]
        for space in spaces:
            self.inside(space)
        keys = [("subnet", flow.home["name"], flow.source["name"])]
        if flow.host is not flow.source:
            keys += [("vpc", flow.home["name"]), ("policy", flow.home["name"], flow.source["name"]),
                     ("nat", flow.home["name"])]
        if flow.host is not flow.source and flow.far:
            keys += [("vpc", flow.far["name"]), ("peer", flow.home["name"], flow.far["name"]),
                     ("peer", flow.far["name"], flow.home["name"])]
        if flow.host and flow.host is not flow.source:
            keys += [(kind, flow.far["name"], flow.host["name"]) for kind in ("subnet", "policy")]
        found = []
        for key in dict.fromkeys(keys):
            function, arguments = self.steps.get(key, (tuple, ()))
            found += [(key[1], step)
                      for step in function(*arguments)
                      if self._looked_at(step, key) and not self.seen.holds(step)]
        if flow.host is flow.source:
            found = [pair for pair in found if pair[1].fact[0] in ("ns", "inside")]
        return sorted(found, key=lambda pair: pair[1].phase)

    def _looked_at(self, step, key):
        """Whether a step's thing is on a packet's way, and could have been seen."""
        fact = step.fact
        if step.phase == FILE or fact[0] in ("alias", "ours"):
            return False
        if key[0] == "peer":                      # packets take the routed way, not the cable
            return fact[0] in ("route", "rule", "chain") and (self.root or fact[0] == "route")
        if fact[0] in ("inside", "policy"):
            return self.rules.get(fact[1]) is not None and fact[2:4] != ("up", "lo")
        return self.root or fact[0] not in ("rule", "chain")

    def host_device(self, address):
        return next((fact[1] for fact in self.seen.facts if fact[0] == "address"
                     and fact[2].split("/")[0] == address), None)

    def uplink(self, address):
        kind, device = self.route(None, address)
        if not kind:
            return None, None
        return device if kind == "unicast" else "none", default_interface()

    # -- routing

    def route(self, space, target, *words):
        """What the kernel says of a way -> (kind, device): unicast, local, blackhole, prohibit, unreachable;
        ("", "") if it cannot be asked."""
        argv = ("ip", "-j") + (("-n", space) if space else ()) + ("route", "get", target) + words
        if self.trouble:
            return "", ""
        if argv not in self.routing:
            try:
                entry = ask(*argv, has="dst")[0]
                self.routing[argv] = entry.get("type", "unicast"), entry.get("dev", "")
            except Failure as failure:
                known = {"Invalid argument": "blackhole", "Permission denied": "prohibit"}
                said = re.search(r"RTNETLINK answers: (.*)", failure.said)
                self.routing[argv] = (known.get(said.group(1), "unreachable") if said else ""), ""
        return self.routing[argv]

    def kernel_way(self, space, packet):
        """The kernel's way for a packet that comes in by its `entry`, or is of the namespace's own -> as `route`."""
        if not packet.entry:
            return self.route(space, packet.target)
        words = ("from", packet.source, "iif", packet.entry)
        if packet.protocol == "all":
            return self.route(space, packet.target, *words)
        ports = ("sport", str(packet.sport[0]), "dport", str(packet.dport[0])) * (packet.protocol != "icmp")
        found = self.route(space, packet.target, *words, "ipproto", packet.protocol, *ports)
        return found if found[0] else self.route(space, packet.target, *words)      # an old `ip` knows no ports

    def routed(self, flow, hop):
        packet = self.packet(flow, "through")
        kind, device = self.kernel_way(None, packet)
        if hop.ok is False:
            opened = flow.far and kind == "unicast" and device == flow.far["bridge"]
            yield hop._replace(ok=None, text=hop.text + "; but the kernel has a way") if opened else hop
            return
        yield hop
        if kind in ("", "local", "broadcast", "multicast") or (kind, device) == ("unicast", packet.exit):
            return
        yield self._astray(flow, None, packet, kind, device)

    def _astray(self, flow, space, packet, kind, device):
        """The hop for a packet that the kernel does not send where the records say."""
        decided = self.decider(space, packet)
        words, remedy = route_words(space, decided)
        there = f" in {space}" if space else ""
        if kind != "unicast":
            answer = {"prohibit": "rejected", "blackhole": "no answer"}.get(kind, "no route")
            if space and kind == "blackhole":     # the kernel tells the sender itself
                answer = "no route"
            if words and decided.sure:
                return Hop(False, "foreign route", f"{words}{there}", remedy, answer)
            text = f"the kernel says {kind} for {packet.target}{there}" + f", perhaps by {words}" * bool(words)
            return Hop(False, "route table", text, f"vpcctl restore {flow.home['name']}", answer)
        text = f"the way to {packet.target}{there} is by {device}, not {packet.exit}" + f": {words}" * bool(words)
        found = [] if space else self.findings(None, "through", packet._replace(exit=device))
        if not any(one.sure and one.target in ("DROP", "REJECT") for one in found):
            return Hop(None, "elsewhere", text)
        if not flow.far:
            remedy = (f"vpcctl disable-nat {flow.home['name']} && vpcctl enable-nat {flow.home['name']} "
                      f"--interface {device}")
        return Hop(False, "foreign route" if flow.far else "route table", text + "; dropped there", remedy)

    def decider(self, space, packet):
        """Decision on a packet's way."""
        words = ("ip", "-j", "-4") + (("-n", space) if space else ())
        if (words, packet.target) not in self.routing:
            self.routing[words, packet.target] = (
                ask(*words, "rule", "show", has="priority"),
                ask(*words, "route", "show", "table", "all", "match", packet.target, has="dst"))
        rules, routes = self.routing[words, packet.target]
        sure, passed = True, []
        for rule in sorted(rules, key=lambda rule: rule["priority"]):
            hit = selects(rule, packet)
            if hit is False:
                continue
            if rule.get("action", "lookup") not in ("lookup", "to_tbl"):
                return Decision(sure and hit, rule, None, passed)
            fitting = [route for route in routes if str(route.get("table", "main")) == str(rule.get("table"))]
            best = max(fitting, key=lambda route: prefix_length(route["dst"]), default={"type": "throw", "dst": "default"})
            if best.get("type") != "throw" and prefix_length(best["dst"]) > rule.get("suppress_prefixlen", -1):
                return Decision(sure and hit, rule, best, passed)
            passed += [str(rule.get("table"))] * (rule["priority"] > 0)
            sure = sure and hit is not None
        return Decision(sure, None, None, passed)

    # -- the firewall

    def packet(self, flow, place, back=False):
        """The packet of a flow, or its reply, as it is at a place."""
        ports = [SOME_PORT, (flow.port or 0,) * 2]
        ends = [flow.source["host_ip"], flow.address]
        near = flow.home["bridge"]
        far = flow.far["bridge"] if flow.far else (flow.home.get("nat") or {}).get("interface")
        cards = [flow.source["veth"] + "-a", flow.host["veth"] + "-a" if flow.host else ""]
        mac, states = flow.source["mac"], ("NEW",)
        if place == "itself":
            ends[0], cards, far = flow.address, ["lo", "lo"], "lo"
        if back:
            ports.reverse(), ends.reverse(), cards.reverse()
            near, far, mac = far, near, flow.host["mac"] if flow.host else None
            states = ("ESTABLISHED",) if flow.far else ("ESTABLISHED", "SNAT")
        entry, exit = {"out": ("", cards[0]), "in": (cards[1], ""), "through": (near, far),
                       "host": (near, ""), "from host": ("", far), "itself": ("lo", "lo")}[place]
        return Packet(ends[0], ends[1], flow.protocol, ports[0], ports[1], entry, exit,
                      mac if place in ("through", "host") else None, states, back)

    def findings(self, space, place, packet):
        """What rules of a place may decide about a packet -> Findings in order, the last one sure if any is."""
        rules, found = self.inside(space) if space else self.rules.get(None), []
        for table, chain in PLACES[place] if rules else ():
            if packet.back and table == "nat":
                continue                          # translated as the flow's first packet was
            if place == "itself":                 # in by lo, or out by lo: never both
                packet = packet._replace(entry="" if chain in ("OUTPUT", "POSTROUTING") else "lo",
                                         exit="lo" if chain in ("OUTPUT", "POSTROUTING") else "")
            chains = rules.get(table, {})
            passed = traverse(chains, table, chain, packet, found)
            if not passed and chain in chains and chains[chain][0] == "DROP":
                found.append(Finding(is_sure(found), "DROP", table, chain, (), False))
            if found and found[-1].sure and found[-1].target in ("DROP", "REJECT"):
                return found
        if self.unread.get(space) and not packet.back:
            found.append(Finding(False, "nft", self.unread[space], "", (), False))
        return found

    def checked(self, flow, place, hop=None):
        space = {"out": flow.source, "itself": flow.source, "in": flow.host}.get(place, {}).get("ns")
        packet = self.packet(flow, place)
        found = self.findings(space, place, packet)
        if hop and hop.ok is False:
            yield self._opened(flow, place, space, hop, found)
            return
        if hop:
            yield hop
        if place == "out" and is_namespace(flow.source["ns"]) and self.root:
            kind, device = self.kernel_way(space, packet)
            if kind and (kind, device) != ("unicast", packet.exit) and kind not in ("broadcast", "multicast"):
                yield self._astray(flow, space, packet, kind, device)
        yield from judged(found, space, flow.far["name"] if place == "in" else flow.home["name"])

    def _opened(self, flow, place, space, hop, found):
        """A hop that blocks; `?` where somebody else's rule lets the packet pass before, and its replies too."""
        opening = [one for one in found if (one.target, one.ours, one.table) == ("ACCEPT", False, "filter")]
        replies = self.findings(space, BACK[place], self.packet(flow, BACK[place], True)) if opening else ()
        if not opening or any(one.ours and one.sure and one.target == "DROP" for one in replies):
            return hop
        return hop._replace(ok=None, text=f"{hop.text}; but {finding_text(opening[0], space)} stands before it")

    def way_back(self, flow, hop):
        near, home = ("from host", None), flow.home["name"]
        if flow.host:
            near = "out", flow.host["ns"]
            if self.root and is_namespace(flow.host["ns"]):
                packet = self.packet(flow, "out", True)
                kind, device = self.kernel_way(flow.host["ns"], packet)
                if kind and (kind, device) != ("unicast", packet.exit):
                    yield self._astray(flow, flow.host["ns"], packet, kind, device)
        ways = [near] if flow.host or self.host_device(flow.address) else []
        ways += [("through", None)] if flow.host or not ways else []
        for place, space in ways + [("in", flow.source["ns"])]:
            packet = self.packet(flow, place, True)
            if place == "through" and packet.entry:
                kind, device = self.kernel_way(None, packet) if flow.far else ("", "")
                if kind and (kind, device) != ("unicast", packet.exit):
                    yield self._astray(flow, None, packet, kind, device)
            for found in judged(self.findings(space, place, packet), space, home):
                yield found._replace(text="on the way back: " + found.text)
        if not self.root:
            yield Hop(None, "others", "rules of others were not looked at: that needs root")
        yield hop

    # -- programs

    def listeners(self, subnet, vpc):
        if self.root and is_namespace(subnet["ns"]):
            return in_namespace(subnet["ns"], listeners)
        for app in vpc["apps"]:
            pid = pid_of(app) if app["subnet"] == subnet["name"] else 0
            if pid:
                try:
                    with open(f"/proc/{pid}/net/dev") as table:
                        if subnet["veth"] + "-a:" in table.read():
                            return listeners(pid)
                except OSError:
                    continue                      # it has just ended, or /proc is closed to others
        return None

    def guess(self, flow, app):
        place = end_name(flow.far, flow.host)
        if app and not self.runs(app):
            return None, (f"deploy-app's program for {flow.what} in {place} is not running; "
                          "whether another is, root can see")
        return None, f"who listens on {flow.what} in {place} cannot be seen without root"

    def program(self, listener, subnet):
        """The name of the program that has a socket."""
        return (socket_owner(listener.inode, subnet["ns"]) if self.root else "") or "a program"

    def runs(self, app):
        """Whether deploy-app's program is there."""
        return is_alive(app)

    def takes_ipv4(self, flow, listener):
        """Whether an IPv6 socket takes IPv4 too -> True, False, or None if it cannot be tried. It holds the port of
        every IPv4 address then; this one is nobody's, so that no packet goes astray."""
        import errno
        import socket

        def held():
            """Try to take the port."""
            kind = socket.SOCK_STREAM if listener.kind == "tcp6" else socket.SOCK_DGRAM
            with socket.socket(socket.AF_INET, kind) as trial:
                try:
                    trial.bind(("127.9.9.9", listener.port))
                except OSError as error:
                    return True if error.errno == errno.EADDRINUSE else None
            return False
        return in_namespace(flow.host["ns"], held) if self.root else None


def nft_tables():
    """Called in a place: the names of nft tables there that iptables does not show; "" without `nft`."""
    if not find_tool("nft"):
        return ""
    known = re.compile(r"table (ip (filter|nat|mangle|raw|security)|ip6 .*|arp .*)\Z")
    tables = call(["nft", "list", "tables"])[1].splitlines()
    return ", ".join(line[6:] for line in tables if line.startswith("table ") and not known.match(line))


def by_chain(tables):
    """Parsed rules -> table -> chain -> (policy, its rules)."""
    found = {}
    for table, (chains, rules) in tables.items():
        found[table] = {chain: (policy, []) for chain, policy in chains}
        for chain, rule in rules:
            found[table].setdefault(chain, ("-", []))[1].append(rule)
    return found


def is_sure(found):
    """Whether nothing before may have decided already."""
    return all(one.sure for one in found)


def traverse(chains, table, chain, packet, found, sure=True):
    """Follow a packet through a chain, adding what may decide to `found` -> whether one surely does."""
    for rule in chains.get(chain, ("", ()))[1]:
        hit = rule_hits(rule, packet)
        option = "-g" if "-g" in rule else "-j"
        target = rule[rule.index(option) + 1] if option in rule else ""
        if hit is False or not target or target in HARMLESS:
            continue
        certain = bool(hit) and sure and is_sure(found)
        if target in chains:
            if traverse(chains, table, target, packet, found, certain):
                return True
            if option == "-g" and certain:
                return False
            continue
        if target == "RETURN" and certain:
            return False
        comment = comment_of(rule)
        ours = is_our_comment(comment, True) or comment.startswith("policy-")
        found.append(Finding(certain, target, table, chain, rule, ours))
        if certain and target in ("ACCEPT", "DROP", "REJECT") + DIVERTING:
            return True
    return False


def together_true(answers):
    """Whether all answers are yes -> False if one is no, else None if one is not known, else True."""
    if False in answers:
        return False
    return None if None in answers else True


def rule_hits(rule, packet):
    """Whether a rule matches a packet -> True, False, or None if it asks what is not known here."""
    ends = [rule.index(option) for option in ("-j", "-g") if option in rule]
    answers = []
    for option, value in rule_key(rule[:ends[0]] if ends else rule):
        negated = option.startswith("!")
        answer = match_hits(option.lstrip("!"), value, packet)
        answers.append(answer if answer is None or not negated else not answer)
    return together_true(answers)


def match_hits(option, value, packet):
    """Whether one condition of a rule is met -> True, False or None (not known)."""
    if option == "--comment":
        return True
    if option in ("-s", "-d"):
        block = whole_block(value)
        known = re.match(r"[0-9.]+/[0-9]+\Z", block)
        return ip_inside(packet.source if option == "-s" else packet.target, block) if known else None
    if option == "-p":
        return value == packet.protocol
    if option in ("-i", "-o"):
        name = packet.entry if option == "-i" else packet.exit
        return name.startswith(value[:-1]) if value.endswith("+") else name == value
    if option in ("--sport", "--dport", "--sports", "--dports"):
        return ports_hit(value, packet.sport if option.startswith("--sp") else packet.dport)
    if option == "--icmp-type":
        return value.split("/")[0] == ("0" if packet.back else "8") if value[0].isdigit() else None
    if option in ("--ctstate", "--state"):
        return any(state in packet.states for state in value.split(","))
    if option == "--ctdir":
        return value == ("REPLY" if packet.back else "ORIGINAL")
    if option == "--dst-type" and value == "LOCAL":
        return packet.exit in ("", "lo")
    if option == "--mac-source" and packet.mac:
        return value.lower() == packet.mac.lower()
    return None


def ports_hit(text, ports):
    """Whether ports like "80,1000:2000" hold all of a range -> True; None if they hold a part of it."""
    spans = []
    for part in text.split(","):
        low, colon, high = part.partition(":")
        spans.append((int(low or 0), int((high or 65535) if colon else low)))
    if any(low <= ports[0] and ports[1] <= high for low, high in spans):
        return True
    return None if any(low <= ports[1] and ports[0] <= high for low, high in spans) else False


def judged(found, space, vpc_name):
    """Hops for what is not as the records have it, from what was found on a way they let pass."""
    for one in found:
        text = finding_text(one, space)
        stops = one.target in ("DROP", "REJECT")
        if one.ours and stops and one.sure:
            yield Hop(False, "firewall", f"{text} stops it: a rule that lets it pass is missing or changed",
                      f"vpcctl restore {vpc_name}")
            return
        if one.ours or one.target in ("ACCEPT", "RETURN"):
            continue
        if one.sure and stops:
            yield Hop(False, "foreign rule", f"{text} stops it", finding_remedy(one, space),
                      "rejected" if one.target == "REJECT" else "no answer")
            return
        if one.sure and one.target in DIVERTING:
            yield Hop(None, "elsewhere", f"{text} sends it elsewhere")
            return
        yield Hop(None, "foreign rule", f"{text} may {'stop it' if stops else 'change what becomes of it'}")


def finding_text(one, space):
    """A rule, for people."""
    if one.target == "nft":
        return f"nft table {one.table} of {space or 'the host'}, which iptables does not show,"
    table = "" if one.table == "filter" else f"{one.table} "
    words = shown(one.rule) if one.rule else f"-P {one.chain} {one.target}"
    return f"`{words}` in {table}{one.chain} of {space or 'the host'}"


def finding_remedy(one, space):
    """The command that takes a rule of somebody else's out."""
    words = ("-D", one.chain) + one.rule if one.rule else ("-P", one.chain, "ACCEPT")
    return shown((("ip", "netns", "exec", space) if space else ()) + ("iptables",)
                 + (("-t", one.table) if one.table != "filter" else ()) + words)


def whole_block(text):
    """A rule's address as a block."""
    return text if "/" in text else text + "/32"


def prefix_length(block):
    """The length of a block as `ip` prints it."""
    return 0 if block == "default" else int(block.partition("/")[2] or 32)


def selects(rule, packet):
    """Whether a routing rule is for a packet, one without a mark -> True, False or None (it asks what is not known
    here)."""
    known = {"priority", "src", "srclen", "dst", "dstlen", "iif", "ipproto", "sport", "dport", "table", "action",
             "protocol", "fwmark", "fwmask", "not", "suppress_prefixlen"}
    # Since 6.15, ip tells the mask of a port as well: all of it, unless somebody has typed another.
    whole_ports = {(key, "0xffff") for key in ("sport_mask", "dport_mask")}
    answers = [None] if {(key, str(rule[key])) for key in set(rule) - known} - whole_ports else []
    for field, address in (("src", packet.source), ("dst", packet.target)):
        if rule.get(field, "all") != "all":
            answers.append(ip_inside(address, f"{rule[field]}/{rule.get(field + 'len', 32)}"))
    if "iif" in rule:
        answers.append(rule["iif"].split(" ")[0] == (packet.entry or "lo"))
    if "ipproto" in rule:
        answers.append(rule["ipproto"] == packet.protocol)
    answers += [ports_hit(str(rule[field]).replace("-", ":"), getattr(packet, field))
                for field in ("sport", "dport")
                if field in rule]
    answers.append(int(rule.get("fwmark", "0"), 0) == 0)
    hit = together_true(answers)
    return hit if hit is None or "not" not in rule else not hit


def is_usual(rule):
    """Whether a routing rule is vpcctl's, or the kernel's own."""
    return str(rule.get("protocol")) == PROTOCOL or rule["priority"] in (0, 32766, 32767)


def route_words(space, decided):
    """What is not vpcctl's of a Decision -> (in words, the command that takes it out), or ("", None)."""
    prefix, rule, route = ("ip",) + (("-n", space) if space else ()), decided.rule, decided.route
    if rule and not is_usual(rule):
        words = ["pref", rule["priority"]]
        for key, name in (("src", "from"), ("dst", "to")):
            if rule.get(key, "all") != "all":
                words += [name, f"{rule[key]}/{rule.get(key + 'len', 32)}"]
        for key in ("iif", "ipproto", "sport", "dport"):
            words += [key, rule[key]] if key in rule else []
        words += [rule["action"]] if "action" in rule else ["lookup", rule.get("table")]
        words = tuple(str(word) for word in words)
        return "routing rule " + " ".join(words), shown(prefix + ("rule", "del") + words)
    if not route or str(route.get("protocol")) in (PROTOCOL, "kernel"):
        return "", None
    kind, table = route.get("type", ""), str(route.get("table", rule.get("table", "main")))
    words = ((kind,) if kind else ()) + (route["dst"],) + (("dev", route["dev"]) if "dev" in route else ())
    words += ("table", table) if table != "main" else ()
    return "route " + " ".join(words), shown(prefix + ("route", "del") + words)


def decision_words(decided, target):
    """A Decision on the way to an address, in words."""
    rule, route, passed = decided.rule, decided.route, ", ".join(decided.passed)
    if not rule:
        return f"no rule and no table knows a way to {target}"
    words = f"rule {rule['priority']}{'' if is_usual(rule) else FOREIGN}"
    if not route:
        return f"no way to {target} in table {passed}; " * bool(passed) + f"{words} says {rule['action']}"
    foreign = FOREIGN * (route.get("type") in DEAD_ENDS and str(route.get("protocol")) != PROTOCOL)
    return f"{words}, table {rule['table']}: {route_text(route)}{foreign}"


def render_explain(hops, ascii_only=False):
    """The hops as lines of text, the last ones the answer and what would change it."""
    marks = {True: "ok", False: "NO", None: "??"} if ascii_only else {True: "✓", False: "✗", None: "?"}
    lines = [f"{marks[hop.ok]} {hop.where:14} {hop.text}" for hop in hops]
    last = hops[-1]
    if last.ok is False:
        end = render_end(last)
        return lines + ["no: " + end[0]] + end[1:]
    if last.where == "elsewhere":
        return lines + [f"nobody can tell: {last.text}"]
    known = all(hop.ok for hop in hops)
    return lines + [f"yes{'' if known else ', as far as can be told'}: {hops[0].text}"]


def render_end(hop):
    """The hop that blocks -> why, and what would allow it, as lines of text."""
    cause = "" if hop.where in ("address", "listening", "machine") else f"blocked by {hop.where}: "
    return [cause + hop.text] + ([f"to allow it: {hop.remedy}"] if hop.remedy else [])


# ------------------------------------------------------------------------------------------------ trace: where was it seen?
# Raw sockets in the source's and the target's namespace and on the host see what every card takes in, before
# any rule is asked, and what it sends, after all of them, with the kernel's time.

HOST = ""                         # the host, among the namespaces in which a packet is seen
COPIES = 3                        # a lost packet is sent so often again: what drops it counts as many
ICMP, TCP, UDP = 1, 6, 17
# Python's socket module does not name these.
SO_ATTACH_FILTER, SO_RCVBUFFORCE, SO_TIMESTAMPNS, SOL_PACKET, PACKET_STATISTICS = 26, 33, 35, 263, 6
PACKET_OUTGOING, TAP_BUFFER = 4, 1 << 23
ICMP_ERRORS = {(3, 0): "net unreachable", (3, 1): "host unreachable", (3, 2): "protocol unreachable",
               (3, 3): "port unreachable", (3, 4): "fragmentation needed", (3, 9): "net prohibited",
               (3, 10): "host prohibited", (3, 13): "administratively prohibited", (11, 0): "time exceeded"}
DEAD_ENDS = ("blackhole", "unreachable", "prohibit")
ENDS_WAY = re.compile(r" -j (DROP|REJECT|DNAT|REDIRECT|TPROXY|NFQUEUE|TARPIT)\b")
FOREIGN = " (not vpcctl's)"
BEFORE_ROUTING = "; PREROUTING of raw, mangle, nat"
ANSWERS_YES = ("SYN-ACK", "datagram", "echo reply")
Frame = namedtuple("Frame", "ends mark kind quoted")    # ends: (protocol, source, port, target, port)
Sighting = namedtuple("Sighting", "time space device out answer packet")
Trace = namedtuple("Trace", "flow outcome seen missed causes here")    # here: the target is the host itself


def taps_by_hand(flow):
    """The commands that show where a packet is seen, by hand."""
    for space, device in dict.fromkeys(place[:2] for place in way(flow)):
        enter = ("ip", "netns", "exec", space) if space else ()
        yield shown(enter + ("tcpdump", "-n", "-i", device, "host", flow.address)) + " &"


def trace(sight, flow):
    """Send a packet and look where it is seen -> Trace, with causes if the right answer does not come."""
    need_up(flow_ends(flow))
    need_tools()
    taps = []
    try:
        for space in sorted({HOST} | {subnet["ns"] for subnet in (flow.source, flow.host) if subnet}):
            taps.append((space, in_place(space, lambda: open_tap(flow))))
        found = look(flow, taps, sight.host_device(flow.address) is not None)
    finally:
        for _, tap in taps:
            tap.close()
    try:
        if not is_answered(found):
            find_causes(sight, found)
    except Failure as failure:
        found.causes.append(f"could not look further: `{shown(failure.argv)}` failed: {failure.said}")
    return found


def look(flow, taps, here=False):
    """Send a packet and read where the taps heard it -> Trace, without causes.

    Asked for times, the kernel begins to note them a moment later (a busy machine: a second), and until then
    gives the time of reading. That is later than the end of sending: all is done again."""
    import time
    deadline = time.monotonic() + 5.0
    while True:
        reply = send(flow, 1.0 if flow.far else 2.0)       # beyond the host it may be a long way
        end = time.time() * 10 ** 9
        heard = [sight for space, tap in taps for sight in read_tap(space, tap)]
        seen = ours(heard, flow, reply.number)
        if not seen or seen[0].time < end or time.monotonic() > deadline:
            missed = sum(lost_frames(tap) for _, tap in taps)
            return Trace(flow, reply.kind, seen, missed, [], here)
        time.sleep(0.02)


def open_tap(flow):
    """Called in a namespace -> a socket that hears the flow's packets on all interfaces, with times."""
    import array
    import socket
    import struct
    tap = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
    tap.setblocking(False)
    program = tap_filter(bounds(flow.source["host_ip"] + "/32")[0], bounds(flow.address + "/32")[0])
    code = array.array("B", b"".join(struct.pack("HBBI", *line) for line in program))
    attached = struct.pack("HP", len(program), code.buffer_info()[0])
    tap.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, attached)
    tap.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    try:
        tap.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, TAP_BUFFER)
    except OSError:                               # only real root may have more than others
        tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, TAP_BUFFER)
    return tap


def tap_filter(source, target):
    """What the kernel hands us of a busy card, as its filter machine reads it: ICMP, and what has one of the
    two addresses at an end; of TCP only what opens or refuses a connection."""
    yes, no = 14, 15
    lines = [(0x28, 0, 0, 0xfffff000), (0x15, 0, no, 0x0800),                      # IPv4?
             (0x30, 0, 0, 9), (0x15, yes, 0, ICMP), (0x15, 0, 8, TCP),
             (0xb1, 0, 0, 0), (0x50, 0, 0, 13), (0x45, 0, no, 0x06),               # TCP: with SYN or RST?
             (0x20, 0, 0, 12), (0x15, yes, 0, source), (0x15, yes, 0, target),
             (0x20, 0, 0, 16), (0x15, yes, 0, source), (0x15, yes, no, target),
             (0x06, 0, 0, 512), (0x06, 0, 0, 0)]
    # Jumps are written here as the line they lead to; the kernel counts the lines to skip.
    return [(code, then and then - at - 1, other and other - at - 1, value)
            for at, (code, then, other, value) in enumerate(lines)]


def read_tap(space, tap):
    """What a socket has heard so far, as sights."""
    import struct
    found = []
    while True:
        try:
            data, extra, _, (device, _, kind, *_) = tap.recvmsg(512, 64)
        except BlockingIOError:
            return found
        packet = read_packet(data)
        if packet:
            seconds, parts = struct.unpack("ll", extra[0][2])
            time, out = seconds * 10 ** 9 + parts, kind == PACKET_OUTGOING
            found.append(Sighting(time, space, device, out, False, packet))


def lost_frames(tap):
    """How many frames the kernel could not keep for us."""
    import struct
    return struct.unpack("II", tap.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))[1]


def read_packet(data):
    """The bytes of a packet -> Frame; None if it neither opens a connection nor answers."""
    ends = read_ends(data)
    if not ends:
        return None
    body = data[(data[0] & 15) * 4:]
    if ends[0] == TCP and len(body) > 13:
        kind = {0x02: "SYN", 0x12: "SYN-ACK"}.get(body[13] & 0x16) or ("RST" if body[13] & 4 else None)
        return Frame(ends, body[4:8], kind, None) if kind else None
    if ends[0] == UDP:
        return Frame(ends, body[8:], "datagram", None)
    if ends[0] == ICMP and body[0] in (0, 8):
        return Frame(ends, body[8:], "echo request" if body[0] else "echo reply", None)
    if ends[0] == ICMP and body[0] in (3, 11, 12):
        what = ICMP_ERRORS.get((body[0], body[1]), f"type {body[0]} code {body[1]}")
        return Frame(ends, None, f"ICMP {what} from {ends[1]}", read_ends(body[8:]))
    return None


def read_ends(data):
    """(protocol, source, port, target, port) of a packet of which 8 bytes or more follow the header, or None.
    A ping's number counts as both ports."""
    import struct
    start = (data[0] & 15) * 4 if data else 0
    if len(data) < max(start, 20) + 8 or data[0] >> 4 != 4 or data[9] not in (ICMP, TCP, UDP):
        return None
    if data[6] & 31 or data[7]:                   # a later fragment
        return None
    source, target = struct.unpack("!II", data[12:20])
    one, other = struct.unpack("!HH", data[start:start + 4])
    if data[9] == ICMP:
        one = other = struct.unpack("!H", data[start + 4:start + 6])[0]
    return data[9], dotted(source), one, dotted(target), other


def ours(sights, flow, number):
    """The sights of the packet that was sent from a port (a ping: with a number) and of its answer, in order,
    each place once. NAT changes the ends: the packet is known by what it carries, the answer by its ends."""
    protocol = {"tcp": TCP, "udp": UDP, "icmp": ICMP}[flow.protocol]
    mark, known, found = None, set(), {}
    for sight in sorted(sights, key=lambda sight: sight.time):
        packet, (kind, source, port, target, far_port) = sight.packet, sight.packet.ends
        sent = (protocol, number, flow.address, number if flow.port is None else flow.port)
        if mark is None and sight.space == flow.source["ns"] and (kind, port, target, far_port) == sent:
            mark = packet.mark
        answer = (kind, target, far_port, source, port) in known or packet.quoted in known
        if not answer:
            if mark is None or packet.mark != mark or packet.kind in ("SYN-ACK", "RST", "echo reply"):
                continue
            known.add(packet.ends)
        found.setdefault((sight.space, sight.device, sight.out, answer), sight._replace(answer=answer))
    return list(found.values())


def way(flow):
    """The places on the way there and back, in order: (namespace, interface, out of it, is it the answer)."""
    source, host, nat = flow.source, flow.host, flow.home.get("nat")
    if host is source:
        there = [(source["ns"], "lo", True), (source["ns"], "lo", False)]
    else:
        there = [(source["ns"], source["veth"] + "-a", True), (HOST, source["veth"] + "-b", False),
                 (HOST, flow.home["bridge"], False)]
    if host and host is not source:
        there += [(HOST, flow.far["bridge"], True), (HOST, host["veth"] + "-b", True),
                  (host["ns"], host["veth"] + "-a", False)]
    elif nat and not flow.far:
        there.append((HOST, nat["interface"], True))
    return [place + (False,) for place in there] + [
        (space, device, not out, True) for space, device, out in reversed(there)]


def flow_ends(flow):
    """The subnets at the two ends, with their VPCs."""
    return [(vpc, subnet) for vpc, subnet in ((flow.home, flow.source), (flow.far, flow.host)) if subnet]


def arrival(flow):
    """The place where the packet comes to the target's namespace, as in `way`; None if it has none."""
    space = flow.host and flow.host["ns"]
    return next((place for place in way(flow) if place[0] == space and not place[2]), None)


def place_of(sight):
    """A sight's place, as in `way`."""
    return sight.space, sight.device, sight.out, sight.answer


def is_answered(found):
    """Whether an answer came, and from where the packet was to go: a rule may have sent it elsewhere."""
    if found.outcome != "open" or found.missed:
        return found.outcome == "open"
    if found.flow.host:
        return any(place_of(sight) == arrival(found.flow) for sight in found.seen)
    left = any((sight.space, sight.out, sight.answer) == (HOST, True, False) for sight in found.seen)
    return found.here or left


def last_seen(found):
    """Where the packet was lost or turned back: the last sight before; None if it never left.

    A refusal that came back is not lost: what counts is where it began."""
    refused = any(place_of(sight) == way(found.flow)[-1] and (
        found.outcome == "open" or sight.packet.kind not in ANSWERS_YES) for sight in found.seen)
    kept = [sight for sight in found.seen if not (refused and sight.answer)]
    return kept[-1] if kept else None


def gap_space(found):
    """The namespace in which the packet was lost or turned back."""
    last = last_seen(found)
    if not last:
        return found.flow.source["ns"]
    return HOST if last.out else last.space


def in_place(space, work):
    """Run work() in a namespace, or on the host."""
    return in_namespace(space, work) if space else work()


# -- why was it not seen any further?

def find_causes(sight, found):
    """Fill in the causes: send again and look what moves, then compare what is there with the records."""
    flow, space, last, causes = found.flow, gap_space(found), last_seen(found), found.causes
    before = in_place(space, rule_counters)
    again = [send(flow, 0.1).kind for _ in range(COPIES)]
    causes.extend(moved_rules(before, in_place(space, rule_counters)))
    for look_for in (route_causes, hardware_causes, neighbour_causes, source_causes):
        causes.extend(look_for(sight, found))
    causes.extend(f"not as recorded: {describe(step)}; `vpcctl restore {name}` repairs it"
                  for name, step in sight.lost(flow))
    if not causes and last and place_of(last) == arrival(flow) and flow.protocol != "icmp":
        hop = listening_hop(flow, sight)
        causes.extend([f"{hop.text}, but does not answer"] if hop.ok else render_end(hop))
    if not causes:
        causes.extend([f"perhaps {rule}: it has no counter" for rule in before if before[rule] is None][:5])
    if found.outcome != "open" and "open" in again:
        causes.append(f"of {COPIES} sent again, {again.count('open')} were answered: not each is lost")


def rule_counters():
    """Called in a namespace: what ends a packet's way -> {rule in words: packets, or None: not counted}."""
    text = saved_rules("-c")
    found = counted_rules(text)
    if find_tool("nft"):
        found.update(counted_nft(call(["nft", "list", "ruleset"])[1], set(parse_rules(text))))
    return found


def counted_rules(text):
    """What `iptables-save -c` prints -> {rule in words: packets}, of what ends a packet's way or turns it."""
    found, table = {}, ""
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:]
        policy = re.match(r":(\S+) DROP \[(\d+):", line)
        rule = re.match(r"\[(\d+):\d+\] -A (\S+)(.*)", line)
        if policy:
            found[f"table {table}, chain {policy.group(1)}: its policy DROP"] = int(policy.group(2))
        elif rule and ENDS_WAY.search(rule.group(3)):
            comment = comment_of(rule_words(line))
            own = is_our_comment(comment, True) or comment.startswith("policy-")
            words = f"table {table}, chain {rule.group(2)}:{rule.group(3)}{'' if own else FOREIGN}"
            found[words] = found.get(words, 0) + int(rule.group(1))
    return found


def counted_nft(text, known):
    """What `nft list ruleset` prints -> {rule in words: packets or None}, without the tables of iptables."""
    found, table, chain, own = {}, "", "", {"ip " + table for table in known}
    for line in (line.strip() for line in text.splitlines()):
        head = re.match(r"(table|chain) (.*) \{\Z", line)
        if head and head.group(1) == "table":
            table = head.group(2)
        elif head:
            chain = head.group(2)
        elif table not in own and re.search(r"\b(drop|reject|queue|dnat|redirect|tproxy)\b", line):
            counter = re.search(r"counter packets (\d+) bytes \d+ ?", line)
            rule = line.replace(counter.group(), "") if counter else line
            words = f"nft table {table}, chain {chain}: {rule}{FOREIGN}"
            found[words] = int(counter.group(1)) if counter else None
    return found


def moved_rules(before, after):
    """Which rules counted the packets that were sent in between -> lines. Others may send as well: what
    counted just as many comes before what counted more."""
    moved = {rule: number - (before.get(rule) or 0) for rule, number in after.items() if number is not None}
    least = min([number for number in moved.values() if number >= COPIES], default=None)
    return [f"rule: {rule}: counted {least} packets when {COPIES} were sent again"
            for rule, number in moved.items()
            if number == least]


def route_causes(sight, found):
    """What routing makes of the packet where it was lost, if that is not the next place on its way."""
    flow, last, places = found.flow, last_seen(found), way(found.flow)
    if not last:
        return routing(sight, flow.source["ns"], sight.packet(flow, "out")._replace(exit=places[0][1]))
    if last.space == HOST and last.out and place_of(last) not in places:      # out where it should not be
        last = next((sight for sight in reversed(found.seen) if sight.space == HOST and not sight.out), last)
    if last.out or last.device in ["lo"] + [subnet["veth"] + "-b" for _, subnet in flow_ends(flow)]:
        return []                                 # no place where a way is chosen
    after = places[places.index(place_of(last)) + 1:][:1] if place_of(last) in places else []
    wanted = after[0][1] if after and after[0][2:] == (True, last.answer) else ""
    packet = sight.packet(flow, "through", last.answer)._replace(entry=last.device, exit=wanted)
    causes = routing(sight, last.space, packet)
    if place_of(last) == arrival(flow):
        causes += routing(sight, last.space, sight.packet(flow, "out", True)._replace(exit=last.device))
    return causes


def routing(sight, space, packet):
    """What the kernel makes of a packet's way -> lines, if there is none or not by the packet's `exit` ("": any)."""
    kind, device = sight.kernel_way(space, packet)
    if not kind or (kind not in DEAD_ENDS and packet.exit in ("", device)):
        return []
    decided = sight.decider(space, packet)
    route, words = decided.route, decision_words(decided, packet.target)
    if kind not in DEAD_ENDS:
        return [f"routing: out by {device}: {words}"]
    if not route or route.get("type") in DEAD_ENDS:
        return [f"routing: {words}"]
    switch, reason = link_conf("ipv4", packet.entry or "all", "forwarding"), kind
    if packet.entry and route.get("type") != "local" and in_place(space, lambda: sysctl_value(switch)) == "0":
        reason = f"{packet.target} is no address here, and {packet.entry} forwards nothing (forwarding is 0)"
    elif packet.entry:
        # The kernel looks for the way back as if the packet came in where it is to go out.
        back = packet._replace(source=packet.target, target=packet.source, entry=route.get("dev"),
                               sport=packet.dport, dport=packet.sport)
        reason = (f"{packet.source} may not come in by {packet.entry} (rp_filter), as the way back to it is another: "
                  + decision_words(sight.decider(space, back), back.target))
    return [f"routing: {reason}; the way on is {words}"]


def hardware_causes(_sight, found):
    """What is amiss between cards and bridges: hardware addresses that are not the recorded ones, ports."""
    flow, causes = found.flow, []
    for vpc, subnet in flow_ends(flow):
        name, card = f"{vpc['name']}/{subnet['name']}", subnet["veth"] + "-a"
        for entry in in_place(subnet["ns"], lambda: ask("ip", "-j", "-4", "neigh", "show", has="dst")):
            if entry["dst"] == subnet["gw"] and entry.get("lladdr", vpc["mac"]) != vpc["mac"]:
                causes.append(f"neighbour entry in {name}: {entry['dst']} is at {entry['lladdr']}, but "
                              f"bridge {vpc['bridge']} has {vpc['mac']}")
        for link in in_place(subnet["ns"], lambda: ask("ip", "-j", "link", "show", has="ifname")):
            if link["ifname"] == card and link.get("address") != subnet["mac"]:
                causes.append(f"{name}'s card has hardware address {link['address']}, not {subnet['mac']}")
    devices = {device for _, device, _, _ in way(flow)}
    for link in ask_links():
        state = link.get("linkinfo", {}).get("info_slave_data", {}).get("state", "forwarding")
        if link["ifname"] in devices and state != "forwarding" and "UP" in link["flags"]:
            causes.append(f"port {link['ifname']} is {state}, not forwarding")
    return causes


def neighbour_causes(_sight, found):
    """Next stations that do not answer ARP, where the packet was lost."""
    flow = found.flow
    hops = {address for sight in found.seen for address in sight.packet.ends[1::2]}
    hops |= {flow.source["gw"], flow.address}
    hops |= {route.get("gateway") for route in ask("ip", "-j", "-4", "route", "show", "default", has="dst")}
    devices = {device for _, device, _, _ in way(flow)}
    return [f"nobody answers ARP for {entry['dst']} on {entry['dev']}"
            for entry in in_place(gap_space(found), lambda: ask("ip", "-j", "-4", "neigh", "show", has="dst"))
            if set(entry.get("state", ())) & {"FAILED", "INCOMPLETE"}
            if entry["dst"] in hops and entry["dev"] in devices]


def source_causes(sight, found):
    """Whether the packet left the host with an address that answers do not find: what NAT is for."""
    last = last_seen(found)
    if not last or last.answer or found.flow.far or place_of(last)[:3] != (HOST, last.device, True):
        return []
    source = last.packet.ends[1]
    if sight.host_device(source):
        return []
    return [f"it left with {source}, no address of this host: no answer finds back"]


# -- the tale

def place_words(flow, sight):
    """Where a sight was, in words."""
    names = {}
    for vpc, subnet in flow_ends(flow):
        card, port, bridge = subnet["veth"] + "-a", subnet["veth"] + "-b", vpc["bridge"]
        names[subnet["ns"], card] = f"{vpc['name']}/{subnet['name']}'s card {card}"
        names.update({(HOST, port): f"port {port}", (HOST, bridge): f"bridge {bridge}"})
    name = names.get((sight.space, sight.device), sight.device)
    return f"{'out of' if sight.out else 'in at'} {name}"


def sight_words(flow, sight, last):
    """A sight as a line says it: the answer's kind, the place, and what NAT has changed since the last."""
    protocol, *ends = sight.packet.ends
    _, *before = last.packet.ends
    if sight.answer != last.answer:
        before = before[2:] + before[:2]
    changed = ""
    for word, now, then in (("from", ends[:2], before[:2]), ("to", ends[2:], before[2:])):
        if now != then and not sight.packet.quoted:
            changed += f", {word} {now[0]}" + ("" if protocol == ICMP else f":{now[1]}")
    answer = f"answer ({sight.packet.kind}) " if sight.answer else ""
    return f"{answer}{place_words(flow, sight)}{changed}"


def next_words(found):
    """What comes next where the packet was last seen: where to look."""
    flow, last = found.flow, last_seen(found)
    if not last:
        return (f"in {flow.home['name']}/{flow.source['name']} itself: its routes; OUTPUT of raw, mangle, "
                f"nat, filter; the hardware address of its gateway {flow.source['gw']}; its cable")
    for vpc, subnet in flow_ends(flow):
        card, port = subnet["veth"] + "-a", subnet["veth"] + "-b"
        if last.device in (card, "lo") and not last.out:
            return (f"in {vpc['name']}/{subnet['name']} itself{BEFORE_ROUTING}; INPUT of mangle, filter; its "
                    "address; who listens; the way back: its routes, OUTPUT")
        if last.device in (card, port) and last.out:
            return f"the other end of the cable: {port if last.device == card else card}"
        if last.device == port:
            bridged = sysctl_value("net.bridge.bridge-nf-call-iptables") == "1"
            return (f"bridge {vpc['bridge']}: is it on, is the port, is the packet for its hardware address "
                    f"{vpc['mac']}; tc, ebtables{BEFORE_ROUTING if bridged else ''}")
        if last.device == vpc["bridge"] and last.out:
            return f"bridge {vpc['bridge']}: entry (fdb) of the subnet's hardware address; its port"
    if last.out:
        return f"beyond {last.device}: nobody there answers, or not to this address"
    vpc = flow.far if flow.far and last.answer else flow.home
    after = f"INPUT -> {vpc['chain_in']}" if found.here else f"FORWARD -> {vpc['chain']}; POSTROUTING"
    return f"the host{BEFORE_ROUTING}; routing rules {PREF_OWN} to {PREF_SHUT}, table {vpc['table']}; {after}"


def trace_verdict(found):
    """What it came to, in a line."""
    flow, last = found.flow, last_seen(found)
    answers = [sight for sight in found.seen if sight.answer]
    if is_answered(found):
        after = f" after {milliseconds(answers[-1], found.seen[0])} ms" if answers else ""
        return f"yes: answered{' (' + answers[-1].packet.kind + ')' if answers else ''}{after}"
    goal = f"{flow.far['name']}/{flow.host['name']}" if flow.host else flow.address
    if not last:
        return f"no: it never left {flow.home['name']}/{flow.source['name']}"
    place = place_words(flow, last)
    if found.outcome == "open":
        return f"no: answered, but not by {goal}: last seen {place}, somebody answers in its place"
    if answers and not last.answer:
        return f"no: turned back ({answers[0].packet.kind}), last seen {place}"
    return f"no: {'the answer was ' if last.answer else ''}last seen {place}"


def milliseconds(sight, first):
    """The time since the first sight."""
    return f"{(sight.time - first.time) / 1e6:.3f}"


def trace_lines(found, ascii_only=False):
    """A trace as lines of text: where it was seen, what it came to, and why."""
    yes = is_answered(found)
    sign = (("\u2717", "\u2713"), ("NO", "ok"))[ascii_only][yes]
    lines = [f"{milliseconds(sight, found.seen[0]):>9} ms  {sight_words(found.flow, sight, last)}"
             for sight, last in zip(found.seen, found.seen[:1] + found.seen)]
    lines.append(f"{sign} {trace_verdict(found)}")
    if not yes:
        refused = found.causes and any(place_of(sight) == way(found.flow)[-1] for sight in found.seen)
        lines += [f"  next there: {next_words(found)}"] * (not refused)
        lines += [f"  {cause}" for cause in found.causes]
    if found.missed:
        lines.append(f"note: the interfaces are busy: {found.missed} packets could not be looked at")
    return lines


def trace_data(found):
    """A trace as plain data, for JSON."""
    yes = is_answered(found)
    seen = [{"ms": float(milliseconds(sight, found.seen[0])), "namespace": sight.space or None,
             "interface": sight.device, "direction": "out" if sight.out else "in", "answer": sight.answer,
             "kind": sight.packet.kind, "source": sight.packet.ends[1], "target": sight.packet.ends[3]}
            for sight in found.seen]
    return {"answered": yes, "verdict": trace_verdict(found), "next": None if yes else next_words(found),
            "causes": found.causes, "missed": found.missed, "seen": seen}


# ------------------------------------------------------------------------------------------------ graph: the picture of it all

@command("graph", "graph blog --format tree",
         arg("vpcs", nargs="*", type=name_type, metavar="VPC", help="which ones (default: all)", complete="vpc"),
         arg("--format", choices=("tree", "mermaid", "dot", "svg"), default="tree", help="tree (default), mermaid, dot, svg"),
         arg("-o", "--output", type=path_type, metavar="FILE", help="where to write it (default: standard output)", complete="file"))
def graph(ctl, args):
    """draw VPCs, subnets, apps, peers, NAT and published ports; what does not run is marked"""
    for name in args.vpcs:
        ctl.vpc(name)
    draw = {"tree": graph_tree, "mermaid": graph_mermaid, "dot": graph_dot, "svg": graph_svg}[args.format]
    more = {"ascii_only": "ok" in mark(True)} if args.format == "tree" else {}
    names = args.vpcs or sorted(ctl.world)
    world = ctl.copy()
    for app in (app for name in names for app in world[name]["apps"]):
        app["ended"] = not is_alive(app)
    text = draw(world, names, **more)
    if not args.output:
        return ctl.show(text.rstrip("\n"))
    if ctl.dry_run:
        return ctl.run.echo(("tee", args.output))
    try:
        with open(args.output, "w", encoding="utf-8") as handle:
            handle.write(text)
    except OSError as error:
        raise Problem("cannot write %s: %s" % (args.output, error.strerror)) from None
    ctl.report("Wrote %s" % args.output)


Peering = namedtuple("Peering", "a b blocks_a blocks_b")  # names of two VPCs, the blocks of each
Uplink = namedtuple("Uplink", "interface nat published")  # [VPC names], [(VPC, text)]


def graph_parts(world, names):
    """(VPC records, names of peers that are not among them, peerings once each, uplinks)."""
    vpcs, peerings, uplinks = [world[name] for name in names], {}, {}
    for vpc in vpcs:
        for peer in vpc.get("peers", []):
            own = [block for block in peer["allowed"] if ip_inside(block.split("/")[0], vpc["cidr"])]
            rest = [block for block in peer["allowed"] if block not in own]
            if (peer["peer_vpc"], vpc["name"]) not in peerings:
                peerings[vpc["name"], peer["peer_vpc"]] = Peering(vpc["name"], peer["peer_vpc"], own, rest)
        if vpc.get("nat"):
            name = vpc["nat"]["interface"]
            uplinks.setdefault(name, Uplink(name, [], [])).nat.append(vpc["name"])
        for p in vpc.get("published", []):
            name = p.get("interface") or "any interface"
            text = "%s/%s on %s/%d" % (vpc["name"], p["subnet"], p["protocol"], p["host_port"])
            uplinks.setdefault(name, Uplink(name, [], [])).published.append((vpc["name"], text))
    outside = sorted({p.b for p in peerings.values()} - set(names))
    return vpcs, outside, list(peerings.values()), [uplinks[key] for key in sorted(uplinks)]


def subnet_notes(vpc, subnet):
    """What is to be said of a subnet beside its name and range: apps, published ports, NAT."""
    name = subnet["name"]
    notes = ["app %s/%d%s" % (app.get("protocol", "tcp"), app["port"], " (not running)" * app.get("ended", False))
             for app in vpc.get("apps", [])
             if app["subnet"] == name]
    notes += ["%s %s/%d -> %d" % (p.get("interface") or "any", p["protocol"], p["host_port"], p["port"])
              for p in vpc.get("published", []) if p["subnet"] == name]
    if has_nat(vpc, name):
        notes.append("NAT by %s" % vpc["nat"]["interface"])
    return notes


def peering_text(peering):
    """Both lists of a peering, on one line."""
    return "%s <-> %s" % tuple(", ".join(blocks) or "nothing" for blocks in peering[2:])


def graph_tree(world, names, ascii_only=False):
    """The VPCs as a tree of text."""
    branch, last = ("|- ", "`- ") if ascii_only else ("├─ ", "└─ ")
    vpcs, outside, peerings, _ = graph_parts(world, names)
    lines = []
    for vpc in vpcs:
        rows = [("%-14s %-18s %s" % (s["name"], s["cidr"], ", ".join(subnet_notes(vpc, s)))).rstrip()
                for s in vpc["subnets"]]
        for p in peerings:
            if vpc["name"] in p[:2]:
                if vpc["name"] == p.b:
                    p = Peering(p.b, p.a, p.blocks_b, p.blocks_a)  # its own side first
                shown = " (not shown)" if p.b in outside else ""
                rows.append("peer %s%s: %s" % (p.b, shown, peering_text(p)))
        lines.append("%s %s" % (vpc["name"], vpc["cidr"]))
        rows = rows or ["no subnet yet"]
        lines += [branch + row for row in rows[:-1]] + [last + rows[-1]]
    return "\n".join(lines or ["no VPC yet"]) + "\n"


def graph_mermaid(world, names):
    """The VPCs as a Mermaid flowchart, which GitHub draws inside a ```mermaid block."""
    def label(*lines):
        quoted = [re.sub(r'[#"&<`\\]', lambda m: "#%d;" % ord(m.group()), line) for line in lines if line]
        return '["%s"]' % "<br/>".join(quoted)
    vpcs, outside, peerings, uplinks = graph_parts(world, names)
    ids = {name: "vpc%d" % number for number, name in enumerate(list(names) + outside)}
    lines = ["flowchart LR"]
    for vpc in vpcs:
        lines.append("  subgraph %s%s" % (ids[vpc["name"]], label("%s %s" % (vpc["name"], vpc["cidr"]))))
        for number, s in enumerate(vpc["subnets"]):
            box = label(s["name"], s["cidr"], *subnet_notes(vpc, s))
            lines.append("    %s_%d%s" % (ids[vpc["name"]], number, box))
        lines.append("  end")
    lines += ["  %s%s" % (ids[name], label(name, "not shown")) for name in outside]
    for p in peerings:  # on a line, unlike in a box, Mermaid shows an escaped "<" as rubbish
        lines.append('  %s <-->|"%s"| %s' % (ids[p.a], peering_text(p).replace("<->", "with"), ids[p.b]))
    for number, uplink in enumerate(uplinks):
        lines.append("  up%d%s" % (number, label("uplink %s" % uplink.interface)))
        lines += ["  %s -->|NAT| up%d" % (ids[name], number) for name in uplink.nat]
        lines += ['  up%d -->|"%s"| %s' % (number, text, ids[name]) for name, text in uplink.published]
    return "\n".join(lines) + "\n"


def graph_dot(world, names):
    """The VPCs for Graphviz: dot -Tsvg."""
    def label(*lines):
        return '[label="%s"]' % "\\n".join(
            line.replace("\\", "\\\\").replace('"', '\\"') for line in lines if line)
    vpcs, outside, peerings, uplinks = graph_parts(world, names)
    ids = {name: "vpc%d" % number for number, name in enumerate(list(names) + outside)}
    lines = ["digraph vpcctl {", "  rankdir=LR; compound=true; node [shape=box];"]
    for vpc in vpcs:
        router = ids[vpc["name"]]
        head = label("%s %s" % (vpc["name"], vpc["cidr"]))
        lines.append("  subgraph cluster_%s { graph %s;" % (router, head))
        lines.append("    %s %s;" % (router, label("router", vpc["bridge"])))
        for number, s in enumerate(vpc["subnets"]):
            box = label(s["name"], s["cidr"], *subnet_notes(vpc, s))
            node = "%s_%d" % (router, number)
            lines.append("    %s %s; %s -> %s [dir=none];" % (node, box, router, node))
        lines.append("  }")
    lines += ["  %s %s;" % (ids[name], label(name, "not shown")) for name in outside]
    lines += ['  %s -> %s [dir=both, label="%s"];' % (ids[p.a], ids[p.b], peering_text(p)) for p in peerings]
    for number, uplink in enumerate(uplinks):
        nat = ["NAT for %s" % name for name in uplink.nat]
        box = label("uplink %s" % uplink.interface, *nat + [text for _, text in uplink.published])
        lines.append("  up%d %s;" % (number, box))
        lines += ["  %s -> up%d [style=dashed];" % (ids[name], number) for name in uplink.nat]
        lines += ["  up%d -> %s;" % (number, ids[name]) for name in sorted({p[0] for p in uplink.published})]
    return "\n".join(lines + ["}"]) + "\n"


SVG_STYLE = """
text{font-family:ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;fill:#1f2328}
.page{fill:#fff}.vpc{fill:#f3f6fa;stroke:#8b97a5}.card{fill:#fff;stroke:#c3ccd6}
.away{fill:none;stroke:#8b97a5;stroke-dasharray:5 4}.dim{fill:#57606a}.app,.fill-pub{fill:#1a7f37}
.out,.fill-nat{fill:#9a5b00}.line{fill:none;stroke-width:1.6}.nat{stroke:#9a5b00}.pub{stroke:#1a7f37}
.c0{stroke:#0969da}.c1{stroke:#8250df}.c2{stroke:#bf3989}.c3{stroke:#1b7c83}
@media (prefers-color-scheme:dark){text{fill:#e6edf3}.page{fill:#0d1117}.vpc{fill:#161b22;stroke:#6e7681}
.card{fill:#21262d;stroke:#444c56}.away{stroke:#6e7681}.dim{fill:#9ea7b3}.app,.fill-pub{fill:#56d364}
.out,.fill-nat{fill:#e3b341}.nat{stroke:#e3b341}.pub{stroke:#56d364}
.c0{stroke:#58a6ff}.c1{stroke:#bc8cff}.c2{stroke:#f778ba}.c3{stroke:#39c5cf}}
"""
SVG_GAP, SVG_LINE, SVG_HEAD, SVG_CHANNEL = 16, 18, 40, 110  # between boxes, lines, head of a VPC, curves


def svg_size(lines):
    """(width, height) of a box around [(text, class)]: letters are 0.6 em wide, the first line has 14 px."""
    widest = [len(text) * (8.6 if i == 0 else 7.4) for i, (text, _) in enumerate(lines)]
    return int(max(widest)) + 24, len(lines) * SVG_LINE + 16


def svg_box(x, y, width, height, kind, lines):
    """A rectangle with its lines of text."""
    from html import escape
    parts = ['<g><title>%s</title><rect class="%s" x="%d" y="%d" width="%d" height="%d" rx="6"/>' % (
        escape(", ".join(text for text, _ in lines)), kind, x, y, width, height)]
    for i, (text, look) in enumerate(lines):
        size = 'font-size="14" font-weight="bold"' if i == 0 else 'font-size="12"'
        parts.append('<text x="%d" y="%d" %s class="%s">%s</text>' % (
            x + 12, y + 21 + i * SVG_LINE, size, look, escape(text)))
    return "".join(parts) + "</g>"


def svg_subnet(vpc, subnet):
    """The lines of a subnet's card."""
    notes = [(note, "out" if re.match(r"NAT|.*\(not running\)\Z", note) else "app")
             for note in subnet_notes(vpc, subnet)]
    return [(subnet["name"], ""), (subnet["cidr"], "dim"), (subnet["host_ip"], "dim")] + notes


def svg_head(vpc):
    """The head line of a VPC."""
    return [("%s %s%s" % (vpc["name"], vpc["cidr"], "" if vpc["subnets"] else " no subnet yet"), "")]


def svg_vpc(vpc, x, y, columns, cell):
    """(parts, height) of a VPC: its head, then its subnets row by row."""
    parts, top, cards = [], y + SVG_HEAD, [svg_subnet(vpc, s) for s in vpc["subnets"]]
    for start in range(0, len(cards), columns):
        row = cards[start:start + columns]
        height = max(svg_size(lines)[1] for lines in row)
        parts += [svg_box(x + SVG_GAP + i * (cell + SVG_GAP), top, cell, height, "card", lines)
                  for i, lines in enumerate(row)]
        top += height + SVG_GAP
    box = svg_box(x, y, columns * (cell + SVG_GAP) + SVG_GAP, top - y, "vpc", svg_head(vpc))
    return [box] + parts, top - y


def svg_stack(x, cards, links, boxes):
    """(parts, {card: (y, height)}) of cards in a column, each near its VPCs, none over another."""
    parts, places, y = [], {}, SVG_GAP
    width = max([svg_size(lines)[0] for lines in cards] or [0])
    for number, lines in enumerate(cards):
        height = svg_size(lines)[1]
        middles = [boxes[link[0]][0] + boxes[link[0]][1] / 2 for link in links if link[1] == number]
        y = max(y, int(sum(middles) / len(middles) - height / 2))
        parts.append(svg_box(x, y, width, height, "card", lines))
        places[number] = y, height
        y += height + SVG_GAP
    return parts, places


def svg_curves(links, boxes, places, near, far):
    """Curves from VPCs at x=near to cards at x=far; a link is (vpc, card, class). Nothing else is between."""
    def height(ends, place, link):
        return place[0] + place[1] * (ends.index(link) + 1) // (len(ends) + 1)
    links, parts = sorted(links, key=lambda link: (places[link[1]], boxes[link[0]], link[2])), []
    for link in links:
        start = height([other for other in links if other[0] == link[0]], boxes[link[0]], link)
        end = height([other for other in links if other[1] == link[1]], places[link[1]], link)
        ends = {"nat": ' marker-end="url(#nat)"', "pub": ' marker-start="url(#pub)"'}.get(link[2], "")
        parts.append('<path class="line %s"%s d="M%d %dC%d %d %d %d %d %d"/>' % (
            link[2], ends, near, start, (near + far) // 2, start, (near + far) // 2, end, far, end))
    return parts


def svg_cards(peerings, uplinks):
    """((cards, links) of the uplinks, (cards, links) of the peerings)."""
    left = [[("uplink %s" % u.interface, "")] + [("NAT for %s" % name, "out") for name in u.nat]
            + [(text, "app") for _, text in u.published] for u in uplinks]
    links = {(name, i, "nat") for i, u in enumerate(uplinks) for name in u.nat}
    links |= {(name, i, "pub") for i, u in enumerate(uplinks) for name, _ in u.published}
    right = [[("%s - %s" % (p.a, p.b), "")] + [("%s %s" % (name, block), "dim") for name, blocks in (
        (p.a, p.blocks_a), (p.b, p.blocks_b)) for block in blocks] for p in peerings]
    ends = {(name, i, "c%d" % (i % 4)) for i, p in enumerate(peerings) for name in (p.a, p.b)}
    return (left, links), (right, ends)


def graph_svg(world, names):
    """A picture in SVG: uplinks on the left, VPCs in the middle, peerings on the right; light and dark."""
    vpcs, outside, peerings, uplinks = graph_parts(world, names)
    (left, left_links), (right, right_links) = svg_cards(peerings, uplinks)
    most = max([len(vpc["subnets"]) for vpc in vpcs] or [1])
    columns = most if most < 4 else 3 if most < 10 else 4 if most < 17 else 5
    heads = [svg_head(v) for v in vpcs] + [[("%s not shown" % name, "")] for name in outside]
    cell = max([150] + [svg_size(svg_subnet(v, s))[0] for v in vpcs for s in v["subnets"]]
               + [svg_size(head)[0] // max(columns, 1) for head in heads])
    columns, far = max(columns, 1), max([svg_size(lines)[0] for lines in left] or [0])
    x, y = SVG_GAP + (far + SVG_CHANNEL if left else 0), SVG_GAP
    edge, body, boxes = x + columns * (cell + SVG_GAP) + SVG_GAP, [], {}
    for vpc in vpcs:
        parts, height = svg_vpc(vpc, x, y, columns, cell)
        body, boxes[vpc["name"]], y = body + parts, (y, height), y + height + 2 * SVG_GAP
    for name in outside:
        body.append(svg_box(x, y, edge - x, SVG_HEAD, "away", [("%s not shown" % name, "dim")]))
        boxes[name], y = (y, SVG_HEAD), y + SVG_HEAD + 2 * SVG_GAP
    bottoms = [y - 2 * SVG_GAP]
    for cards, links, near, x, at in ((left, left_links, x, SVG_GAP, SVG_GAP + far),
                                      (right, right_links, edge, edge + SVG_CHANNEL, edge + SVG_CHANNEL)):
        parts, places = svg_stack(x, cards, links, boxes)
        body += parts + svg_curves(links, boxes, places, near, at)
        bottoms += [top + height for top, height in places.values()]
    width = edge + (SVG_CHANNEL + max(svg_size(lines)[0] for lines in right) if right else 0) + SVG_GAP
    title = "vpcctl: " + (", ".join(names) or "no VPC yet")
    return svg_page(title, width, max(bottoms) + SVG_GAP, body)


def svg_page(title, width, height, body):
    """The whole document."""
    from html import escape
    arrow = ('<marker id="%s" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" '
             'orient="auto-start-reverse"><path class="fill-%s" d="M0 0L10 5L0 10z"/></marker>')
    head = ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img">'
            % (width, height, width, height))
    return "\n".join([head, "<title>%s</title>" % escape(title), "<style>%s</style>" % SVG_STYLE,
                      "<defs>%s%s</defs>" % (arrow % ("nat", "nat"), arrow % ("pub", "pub")),
                      '<rect class="page" width="100%" height="100%"/>'] + body + ["</svg>"]) + "\n"


# ------------------------------------------------------------------------------------------------ sandbox

SANDBOX_RUN = "/run/vpcctl-sandbox"
SANDBOX_SIGNALS = ("SIGINT", "SIGQUIT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGIO")
SANDBOX_GREETING = """\
This is a throw-away machine: root, an uplink eth0, nothing of it is connected to yours.
Try:   vpcctl create blog --cidr 10.20.0.0/16     (add --why to learn what each command does)
The "internet" is 203.0.113.1: it answers ping and HTTP. You may type sudo, but need not.
Type   exit   to end it: every VPC, process and network in it is gone then.
"""
SANDBOX_SUDO = """\
#!/bin/sh
# in the sandbox one is root already, and can be another user where there are others
user=root group=
refuse() { echo "sudo: in the sandbox, $*" >&2; exit 1; }
while case "$1" in
    -u|--user) [ $# -gt 1 ] || refuse "$1 needs a user"; user=$2; shift;;
    -g|--group) [ $# -gt 1 ] || refuse "$1 needs a group"; group=$2; shift;;
    --user=*) user=${1#*=};;
    --group=*) group=${1#*=};;
    -u*) user=${1#-u};;
    -g*) group=${1#-g};;
    -E|-H|-n|--preserve-env|--set-home|--non-interactive) ;;
    --) shift; false;;
    -*) refuse "the option $1 is not known; -u USER, -g GROUP, -E, -H and -n are";;
    *) false;;
esac; do shift; done
[ $# -gt 0 ] || refuse "a command is missing: sudo [-u USER] [-g GROUP] COMMAND"
[ "$user$group" = root ] && exec env "$@"
uid=$(id -u "$user" 2>/dev/null) || refuse "there is no user '$user'"
gid=$(id -g "$user")
[ -z "$group" ] || gid=$(getent group "$group" | cut -d: -f3)
[ -n "$gid" ] || refuse "there is no group '$group'"
setpriv --reuid="$uid" --regid="$gid" --init-groups true 2>/dev/null ||
    refuse "there is no other user than root, since an ordinary user started it (sudo vpcctl sandbox has all)"
exec setpriv --reuid="$uid" --regid="$gid" --init-groups env "$@"
"""


@command("sandbox", "sandbox -- vpcctl list",
         arg("program", nargs="*", metavar="-- COMMAND…", help="what to run in it (default: a shell)"))
def sandbox(ctl, args):
    """open a shell, or run a command, in a throw-away machine: nothing of yours is touched, no root needed"""
    program, script = args.program, os.path.realpath(__file__)
    if ctl.dry_run:
        return ctl.run.echo(tuple(sandbox_argv(script, program, os.geteuid() == 0)))
    return enter_sandbox(script, program, ctl.umask)


@command("__sandbox-init", "__sandbox-init -- true",
         arg("program", nargs="*", metavar="-- COMMAND…", help="what to run"), hidden=True)
def sandbox_first(ctl, args):
    """be the first process of a sandbox"""
    return sandbox_init(args.program, ctl.umask)


def sandbox_argv(script, command, root):
    """Return the command line that starts `command` (empty: a shell) in new namespaces."""
    argv = ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if not root:
        argv += ["--user", "--map-root-user"]   # root in there, and nothing but oneself outside
    return argv + own_command(script) + ["__sandbox-init", "--"] + command


def own_command(script):
    """Return the command line that starts this very file again, with the Python that runs it now."""
    python, folder = sys.executable or "python3", os.path.dirname(script)
    if __name__ != "vpcctl":                      # it was not started as a module, and perhaps for a reason
        return [python, "-IS", script]
    return [python, "-ISc", "import os, sys; u = os.umask(18); sys.path.append(%r); import vpcctl; vpcctl.start(u)"
            % folder]


def enter_sandbox(script, command, umask):
    """Run `command` in a sandbox, with the user's umask, and wait; returns its exit code, raises Problem (4) if it
    cannot be had.

    One end of a socket pair is here, the other with the sandbox's first process. It says there that the
    namespaces exist, carries signals in, and its closing ends the sandbox, however this process dies.
    (unshare itself blocks SIGTERM while it waits.)
    """
    import signal
    import socket
    import subprocess
    check_sandbox_tools()
    wanted = {getattr(signal, name) for name in SANDBOX_SIGNALS}
    ours, theirs = socket.socketpair()
    env = dict(os.environ, VPCCTL_SANDBOX_FD=str(theirs.fileno()))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, wanted)

    def as_typed():
        """What the sandbox's first process gets from whoever typed the command."""
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.umask(umask)
    try:
        child = subprocess.Popen(sandbox_argv(script, command, os.geteuid() == 0), env=env,
                                 pass_fds=[theirs.fileno()], preexec_fn=as_typed)
        theirs.close()
        while child.poll() is None:
            info = signal.sigwaitinfo(wanted)
            if info.si_signo not in (signal.SIGCHLD, signal.SIGIO) and info.si_code <= 0:
                try:                       # si_code > 0: the terminal sent it, to the command as well
                    ours.send(bytes([info.si_signo]))
                except OSError:
                    pass                   # it is just ending
        take_terminal_back()
        started = ours.recv(1, socket.MSG_DONTWAIT) if child.returncode else b"+"
    except (BlockingIOError, ConnectionError):
        started = b""
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        ours.close()
    if not started and child.returncode > 0:
        raise sandbox_refused()
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def take_terminal_back():
    """Make this process group the terminal's foreground again; the sandbox's shell cannot name it."""
    import signal
    try:
        if os.isatty(0) and os.tcgetpgrp(0) != os.getpgrp():
            ignored = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
            os.tcsetpgrp(0, os.getpgrp())
            signal.signal(signal.SIGTTOU, ignored)
    except OSError:
        pass                               # no terminal of ours


def check_sandbox_tools():
    """Raise Problem (4) with the package's name if a program that the sandbox needs is missing."""
    for program, package in (("unshare", "util-linux"), ("mount", "util-linux or mount"),
                             ("ip", "iproute2 (on RHEL: iproute)")):
        if not find_tool(program):
            raise Problem("the sandbox needs '%s', which is not installed" % program,
                          hint="install the package %s" % package, code=4)


def sandbox_refused():
    """Return the Problem that says why the kernel gave no namespaces, as far as one can see it."""
    def setting(path):
        try:
            with open(path) as handle:
                return handle.read().strip()
        except OSError:
            return ""
    if os.geteuid() == 0:
        return Problem("the kernel refuses new namespaces, although you are root (a container?)",
                       hint="use the machine itself, or a container started with --privileged", code=4)
    for path, closed, remedy in (
            ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1",
             "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0"),
            ("/proc/sys/kernel/unprivileged_userns_clone", "0",
             "sudo sysctl kernel.unprivileged_userns_clone=1"),
            ("/proc/sys/user/max_user_namespaces", "0", "sudo sysctl user.max_user_namespaces=15000")):
        if setting(path) == closed:
            return Problem("this machine does not let ordinary users make namespaces (%s is %s)"
                           % (path[len("/proc/sys/"):].replace("/", "."), closed),
                           hint="run it with sudo, or allow it: %s" % remedy, code=4)
    return Problem("the kernel refuses new namespaces to you (its reason stands above)",
                   hint="run it with sudo; in a container, start that with --privileged", code=4)


def sandbox_init(command, umask):
    """First process of the sandbox: set it up, run `command` (empty: a shell); returns the exit code."""
    import signal
    import socket
    if os.getpid() != 1 or "VPCCTL_SANDBOX_FD" not in os.environ:
        raise Problem("this entry is the sandbox's own", hint="type: vpcctl sandbox", code=2)
    line = socket.socket(fileno=int(os.environ.pop("VPCCTL_SANDBOX_FD")))
    line.set_inheritable(False)
    line.send(b"+")
    wanted = {getattr(signal, name) for name in SANDBOX_SIGNALS}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, wanted)
    socket.sethostname("sandbox")
    sandbox_mounts()
    sandbox_internet(before)
    argv = sandbox_environment(command)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.umask(umask)
        sandbox_exec(argv, before)
    return mind_sandbox(child, line, wanted)


def sandbox_exec(argv, mask):
    """Become the sandbox's command (in its forked process); never returns."""
    import signal
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    # Python ignores SIGPIPE, unshare of util-linux 2.36 the others, and exec would pass that on
    for number in (signal.SIGPIPE, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        # a PATH folder that one may not read gives "Permission denied" for a program that is nowhere
        found = "/" in argv[0] and not isinstance(error, FileNotFoundError)
        reason = error.strerror if found else "not found"
        say_error(f"Error: cannot run {argv[0]}: {reason}")
        os._exit(126 if found else 127)


def mind_sandbox(child, line, wanted):
    """Reap what dies, pass signals on to `child`, until it ends or the line breaks; returns the exit code."""
    import fcntl
    import signal
    line.setblocking(False)
    fcntl.fcntl(line, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(line, fcntl.F_SETFL, fcntl.fcntl(line, fcntl.F_GETFL) | os.O_ASYNC)   # news comes as SIGIO
    signo, sent = signal.SIGIO, True       # something may have come before that
    while True:
        if signo == signal.SIGCHLD:
            while True:
                try:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    return 137
                if pid == child:           # when this process, pid 1, ends the kernel kills all others here
                    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
                if pid == 0:
                    break
        elif signo == signal.SIGIO:
            try:
                data = line.recv(64)
            except BlockingIOError:
                data = None
            except OSError:
                data = b""
            if data == b"":                # whoever typed `vpcctl sandbox` is gone
                return 137
            for number in data or b"":
                os.kill(child, number)
        elif sent:
            os.kill(child, signo)
        info = signal.sigwaitinfo(wanted)
        signo, sent = info.si_signo, info.si_code <= 0


def sandbox_step(*argv):
    """Run a set-up command; Problem (4) with its own words if it fails."""
    sandbox_steps([argv])


def sandbox_ip(*lines):
    """Switch loopback on, and run set-up commands of ip."""
    sandbox_steps([tuple(line.split()) for line in ("ip link set lo up",) + lines])


def sandbox_steps(commands):
    """Run one set-up command, or several of ip."""
    done, said = ip_batch(commands)
    if done < len(commands):
        failed = shown(commands[max(done, 0)])
        raise Problem(f"the sandbox cannot be set up: `{failed}` failed: {said.strip()}",
                      "run it with sudo; in a container, start that with --privileged", 4)


def sandbox_mounts():
    """Give this mount namespace its own /run, /sys, and an /etc in which /etc/netns can be made."""
    sandbox_step("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    os.makedirs("/run/netns")
    # a mounted sysfs keeps showing the network namespace in which it was mounted
    sandbox_step("mount", "-t", "sysfs", "sysfs", "/sys")
    # /etc: a folder of links into the real one, so that new entries stay in here
    new = SANDBOX_RUN + "/etc"
    os.makedirs(new)
    sandbox_step("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", new)
    os.makedirs(new + "/.real")
    sandbox_step("mount", "--rbind", "/etc", new + "/.real")
    for entry in os.listdir("/etc"):
        path = os.path.join("/etc", entry)
        if entry not in ("netns", ".real"):
            # a link such as mtab -> ../proc/self/mounts means the same from the new folder
            target = os.readlink(path) if os.path.islink(path) else ".real/" + entry
            os.symlink(target, os.path.join(new, entry))
    os.makedirs(new + "/netns")
    sandbox_step("mount", "--rbind", new, "/etc")


def sandbox_environment(command):
    """Make the sandbox's programs and settings; returns the command line to run."""
    import shlex
    folder = SANDBOX_RUN + "/bin"
    os.makedirs(folder)
    os.makedirs("/run/vpcctl-data")
    own = own_command(os.path.realpath(__file__))
    wrapper = "#!/bin/sh\nexec %s \"$@\"\n" % " ".join(shlex.quote(word) for word in own)
    for name, text in (("vpcctl", wrapper), ("sudo", SANDBOX_SUDO)):
        with open(os.path.join(folder, name), "w") as handle:
            handle.write(text)
        os.chmod(os.path.join(folder, name), 0o755)
    os.environ.update({"VPCCTL_SANDBOX": "1", "VPCCTL_DATA": "/run/vpcctl-data",
                       "PATH": folder + ":" + os.environ.get("PATH", os.defpath)})
    if command:
        return command
    sys.stderr.write(SANDBOX_GREETING)
    # the user's own prompt and history file are left alone
    os.environ.update({"PS1": "(sandbox) # ", "HISTFILE": SANDBOX_RUN + "/history"})
    bash = find_tool("bash")
    return [bash, "--norc", "--noprofile"] if bash else [os.environ.get("SHELL") or "/bin/sh"]


def sandbox_internet(mask):
    """Start the internet: a process in a nameless network namespace at the other end of eth0."""
    import signal
    here, there = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)       # Ctrl-C is meant for the command
            new_network_namespace()
            os.write(here[1], b"+")
            if os.read(there[0], 1):
                serve_internet(here[1])
        except (Problem, OSError) as error:
            say_error(f"Error: {error}")
        finally:
            os._exit(1)
    os.close(here[1])
    if os.read(here[0], 1):
        sandbox_ip(f"ip link add eth0 type veth peer name eth0 netns {pid}", *sandbox_uplink("192.0.2.2/24"),
                   "ip route add default via 192.0.2.1")
        os.write(there[1], b"+")
    for end in (there[0], there[1]):
        os.close(end)
    if not os.read(here[0], 1):
        raise Problem("the sandbox's internet did not start", hint="its reason stands above", code=4)
    os.close(here[0])
    with open(SANDBOX_RUN + "/internet.pid", "w") as handle:
        handle.write("%d\n" % pid)


def sandbox_uplink(address):
    """The commands that give eth0 its address; no IPv6 one appears by itself some seconds later."""
    quiet = ["ip link set dev eth0 addrgenmode none"] if os.path.exists("/proc/sys/net/ipv6/conf/lo") else []
    return quiet + [f"ip address add {address} dev eth0", "ip link set dev eth0 up"]


def new_network_namespace():
    """Move this process into a network namespace of its own; Python itself can from 3.12 on."""
    if hasattr(os, "unshare"):
        return os.unshare(os.CLONE_NEWNET)
    import ctypes
    if ctypes.CDLL(None, use_errno=True).unshare(0x40000000):
        raise OSError(ctypes.get_errno(), "unshare: " + os.strerror(ctypes.get_errno()))


def serve_internet(ready):
    """Be 203.0.113.1: answer ping (the kernel does) and HTTP, with a page that names the client.

    Never returns. It has no route but to 192.0.2.0/24: a packet that was not masqueraded gets no answer.
    """
    import socket
    import threading
    sandbox_ip("ip address add 203.0.113.1/32 dev lo", *sandbox_uplink("192.0.2.1/24"))
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("0.0.0.0", 80))
    server.listen(64)
    os.write(ready, b"+")
    os.close(ready)

    def answer(client, address):
        body = ("<html><head><title>The internet</title></head>\n<body>\n"
                "<p>Hello from 203.0.113.1, the internet of this sandbox.</p>\n"
                "<p>You came from %s</p>\n</body></html>\n" % address).encode()
        try:
            client.settimeout(5)
            client.recv(65536)
            client.sendall(b"HTTP/1.0 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n"
                           b"Content-Length: %d\r\n\r\n" % len(body) + body)
        except OSError:
            pass
        client.close()
    while True:
        client, address = server.accept()
        threading.Thread(target=answer, args=(client, address[0]), daemon=True).start()


# ------------------------------------------------------------------------------------------------ shells and manual

COMPLETIONS = {
    "bash": """\
# vpcctl: completion for bash; `source` it, or put it into /usr/share/bash-completion/completions/vpcctl
_vpcctl() {
    local IFS=$'\\n' word=${COMP_WORDS[COMP_CWORD]}
    COMPREPLY=($(vpcctl __complete -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
    if [ "${COMPREPLY[0]}" = :file ]; then COMPREPLY=($(compgen -f -- "$word")); fi
}
complete -o filenames -F _vpcctl vpcctl
""",
    "zsh": """\
#compdef vpcctl
_vpcctl() {
    local -a found
    found=("${(@f)$(vpcctl __complete -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ ${found[1]} == :file ]]; then _files; else compadd -- ${found:#}; fi
}
compdef _vpcctl vpcctl
""",
    "fish": """\
# vpcctl: completion for fish; put it into ~/.config/fish/completions/vpcctl.fish
function __vpcctl_complete
    set -l words (commandline -opc) (commandline -ct)
    set -l found (vpcctl __complete -- $words[2..-1] 2>/dev/null)
    if test "$found[1]" = :file
        __fish_complete_path (commandline -ct)
    else
        printf '%s\\n' $found
    end
end
complete -c vpcctl -f -a '(__vpcctl_complete)'
""",
}


@command("completion", "completion bash",
         arg("shell", choices=sorted(COMPLETIONS), help="bash, fish or zsh"))
def completion(ctl, args):
    """print the shell's completion script; it knows commands, options and the names in the records"""
    ctl.show(COMPLETIONS[args.shell].rstrip("\n"))


@command("__complete", "__complete -- create", arg("program", nargs="*", metavar="-- WORD…", help="what is typed so far"),
         hidden=True)
def complete(ctl, args):
    """print what the last word may become, one a line; ":file" stands for a file's name"""
    words = args.program or [""]
    for candidate in candidates(ctl, words[:-1]):
        if candidate.startswith(words[-1]) or candidate == ":file":
            ctl.say(candidate)


def candidates(ctl, words):
    """What may stand after these words, from the command table and the records."""
    name = named_command(words)
    if name is None:
        return [known for known in COMMANDS if not COMMANDS[known]["hidden"]] + [flags[0] for flags, _ in GLOBAL_OPTIONS]
    if name not in COMMANDS or "--" in words:
        return []
    arguments = COMMANDS[name]["arguments"] + GLOBAL_OPTIONS
    options = {flag: more for flags, more in arguments for flag in flags if flag.startswith("-")}
    if words[-1] in options and "action" not in options[words[-1]]:
        return values(ctl, options[words[-1]], [])
    placed, skip = [], False
    for word in words[words.index(name) + 1:]:
        if not skip and not word.startswith("-"):
            placed.append(word)
        skip = word in options and "action" not in options[word]
    slots = [more for flags, more in arguments if not flags[0].startswith("-")]
    slot = slots[len(placed)] if len(placed) < len(slots) else slots[-1] if slots and slots[-1].get("nargs") else {}
    return values(ctl, slot, placed) + [flag for flag in options if flag.startswith("--")]


def values(ctl, options, placed):
    """What an argument may be; `placed` are the words before it."""
    kind = options.get("complete")
    if kind == "file":
        return [":file"]
    if kind == "interface":
        ours = record_names(ctl.world) | {"lo"}
        return [name for name in host_interfaces() if name not in ours]
    if "choices" in options:
        return list(options["choices"])
    vpc = ctl.world.get(placed[0]) if placed else None
    subnets = [subnet["name"] for subnet in vpc["subnets"]] if vpc else []
    if kind == "target":
        return subnets + ["%s/%s" % (name, subnet["name"]) for name in sorted(ctl.world)
                          for subnet in ctl.world[name]["subnets"]]
    return {"vpc": sorted(ctl.world), "subnet": subnets, "peer": [peer["peer_vpc"] for peer in vpc["peers"]] if vpc else [],
            None: []}[kind]


@command("man", "man")
def manual(ctl, _args):
    """print the manual page (vpcctl man | man -l -)"""
    plain = lambda text: text.replace("\\", "\\e").replace("-", "\\-").replace("\u2026", "...").replace("\n.", "\n\\&.")
    parser = build_parser()
    lines = [".TH VPCCTL 8 \"\" \"vpcctl %s\"" % VERSION, ".SH NAME", "vpcctl \\- a cloud network (VPC) on this machine",
             ".SH SYNOPSIS", ".B vpcctl", "[OPTIONS] COMMAND ...", ".SH DESCRIPTION", plain(parser.description), ".SH OPTIONS"]
    for flags, options in GLOBAL_OPTIONS:
        lines += [".TP", ".B " + plain(" ".join(filter(None, [", ".join(flags), options.get("metavar")]))), plain(options["help"])]
    lines.append(".SH COMMANDS")
    for name, entry in COMMANDS.items():
        if entry["hidden"]:
            continue
        lines += [".SS " + plain(synopsis(name)), plain((entry["handler"].__doc__ or "").strip()) + ".",
                  plain(entry["more"]) or ".br", ".PP", "Example:",
                  ".B vpcctl " + plain(shown(entry["example"]))]
        for flags, options in entry["arguments"]:
            words = [", ".join(flags) if flags[0].startswith("-") else "", options.get("metavar") or (
                "" if "action" in options else "|".join(options.get("choices", ())) or flags[0].upper())]
            lines += [".TP", ".B " + plain(" ".join(filter(None, words))), plain(options["help"])]
    lines += [".SH EXIT STATUS", "0 done, or the answer is yes; 1 the answer is no; 2 refused input; 3 a command failed and",
              "what was done was taken back; 4 the machine lacks something; 130, 143 stopped by a signal.",
              ".SH FILES", ".TP", ".B " + plain(".vpcctl_data"),
              plain("the records, one JSON file per VPC, and vpcctl.log; beside vpcctl.py, or as --data-dir or VPCCTL_DATA say"),
              ".SH ENVIRONMENT", ".TP", ".B VPCCTL_DATA", "the data folder", ".TP", ".B VPCCTL_WAIT",
              "how many seconds to wait while another vpcctl is at work (60)", ".TP", ".B NO_COLOR", "no colour, if it is set"]
    ctl.show("\n".join(lines))


# ------------------------------------------------------------------------------------------------ the parser

@command("flag-check", "flag-check")
def flag_check(ctl, _args):
    """check the parser itself: every command has an example that parses, a handler, and help for every option"""
    faults = parser_faults()
    for fault in faults:
        ctl.say("FAULT: " + fault)
    if not faults:
        ctl.say("Parser check OK")
    return 1 if faults else 0


def is_handler(thing):
    """Whether something looks like a command's handler: a function of (ctl, args)."""
    code = getattr(thing, "__code__", None)
    return code is not None and [word.lstrip("_") for word in code.co_varnames[:code.co_argcount]] == ["ctl", "args"]


def parser_faults():
    """What is wrong with the command table -> list of texts."""
    faults = ["the option %s has no help" % flags[0] for flags, options in GLOBAL_OPTIONS if not options.get("help")]
    parser = build_parser()
    handlers = {entry["handler"] for entry in COMMANDS.values()}
    faults += ["the handler %s has no command" % name for name, thing in sorted(globals().items())
               if is_handler(thing) and thing not in handlers]
    handlers = set()
    for name, entry in COMMANDS.items():
        if entry["handler"] in handlers:
            faults.append("two commands share the handler of %s" % name)
        handlers.add(entry["handler"])
        if not callable(entry["handler"]) or not (entry["handler"].__doc__ or "").strip():
            faults.append("%s has no handler with help" % name)
        for flags, options in entry["arguments"]:
            if not options.get("help"):
                faults.append("%s: %s has no help" % (name, flags[0]))
        before = len(faults)
        if entry["example"][:1] != [name]:
            faults.append("the example of %s is of another command" % name)
            continue
        try:                                      # its own example, with options of everybody's before and after the name
            parsed = parse(["--dry-run", name, "--quiet"] + entry["example"][1:], parser)
        except Problem as problem:
            faults.append("%s: %s" % (shown(entry["example"]), problem))
            continue
        if COMMANDS.get(parsed.command, {}).get("handler") is not entry["handler"] and len(faults) == before:
            faults.append("%s leads to another command" % name)
    return faults


class Parser(argparse.ArgumentParser):
    """argparse, with errors in our words: what is wrong, what was probably meant, exit code 2."""
    words, example = (), ""

    def parse_known_args(self, args=None, namespace=None):
        """Each command refuses for itself what it does not know, since it knows which of its options was meant."""
        self.words = list(args or ())
        options, odd = super().parse_known_args(args, namespace)
        if odd:
            self.error("unrecognized arguments: " + " ".join(odd))
        return options, odd

    def error(self, message):
        """Refuse a command line, in our words."""
        known, usual = self._option_string_actions, "`%s --help` shows how" % self.prog
        surplus, lack = message.startswith("unrecognized"), message.startswith("the following arguments are required")
        typed = message.split() if surplus else self.words if lack else ()
        odd = [word.partition("=")[0] for word in typed if word.startswith("--") and word.partition("=")[0] not in known]
        meant = [hint for hint in (nearest(word, known) for word in odd) if hint]
        if meant:
            raise Problem("unrecognized arguments: " + odd[0] if lack else message, meant[0])
        if surplus and any(action.dest == "program" for action in self._actions):
            example = self.example if " -- " in self.example else self.example + " -- COMMAND"
            usual = "a command with options of its own stands behind `--`: vpcctl " + example
        elif (surplus or lack) and self.example:
            usual = "for example: vpcctl %s (`%s --help` says more)" % (self.example, self.prog)
        raise Problem(message, usual)


GLOBAL_OPTIONS = (
    arg("--dry-run", action="store_true", help="show the commands; run nothing, change nothing, no root"),
    arg("--why", action="store_true", help="end each command shown in a reason"),
    arg("--quiet", action="store_true", help="show neither the commands nor what a change came to"),
    arg("--data-dir", type=path_type, metavar="FOLDER", help="where the records are (default: .vpcctl_data beside vpcctl.py)"),
)


def synopsis(name):
    """A command as one types it, without the options that all commands have: `create VPC --cidr BLOCK`."""
    words = []
    for flags, options in COMMANDS[name]["arguments"]:
        value = options.get("metavar") or "|".join(options.get("choices") or ())
        if not flags[0].startswith("-"):
            program, many = value.startswith("-- "), options.get("nargs")
            value += "…" * (many == "*" and not program)
            words.append((2 * program, "[%s]" % value if many else value))
        else:
            text = flags[0] + (" " + value if value else "")
            words.append((1, text if options.get("required") else "[%s]" % text))
    return " ".join([name] + [text for _, text in sorted(words, key=lambda word: word[0])])


def add_arguments(parser, arguments, **more):
    """Give a parser arguments of the command table."""
    for flags, options in arguments:
        options = {key: value for key, value in options.items() if key != "complete"}
        parser.add_argument(*flags, **dict(options, **more))


def build_parser(only=None):
    """The whole command line; `only`: of one command, when its name is known already (the others are just names)."""
    parser = Parser(prog="vpcctl", allow_abbrev=False, description="A cloud network (VPC) on this machine: subnets are network namespaces, "
                    "a VPC is a bridge, the host is the router between them.", formatter_class=argparse.RawTextHelpFormatter,
                    epilog="Start with:  vpcctl sandbox      a throw-away machine to try things in\n"
                           "             vpcctl create blog --cidr 10.20.0.0/16\n"
                           "Exit codes:  0 done or yes, 1 no, 2 refused input, 3 failed and taken back, 4 something is missing")
    parser.add_argument("--version", action="version", version="vpcctl " + VERSION)
    add_arguments(parser, GLOBAL_OPTIONS)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, entry in COMMANDS.items():
        text = (entry["handler"].__doc__ or "").strip()
        if only and name != only:
            continue
        listed = {} if entry["hidden"] else {"help": text}
        own = commands.add_parser(name, allow_abbrev=False, description=text[:1].upper() + text[1:] + ".",
                                  usage="vpcctl " + synopsis(name).replace(name, name + " [OPTIONS]", 1),
                                  epilog=(entry["more"] + "\n\nExample:  vpcctl " + shown(entry["example"])).strip(),
                                  formatter_class=argparse.RawDescriptionHelpFormatter, **listed)
        own.example = shown(entry["example"])
        add_arguments(own, entry["arguments"])
        own.add_argument("--version", action="version", version="vpcctl " + VERSION)
        # The same options again, so that they may stand before or after the command's name.
        add_arguments(own, GLOBAL_OPTIONS, default=argparse.SUPPRESS)
    return parser


def named_command(words):
    """The first word that is no option and no option's value, or None."""
    value = False
    for word in words:
        if not value and not re.match(r"-[^\d]", word):
            return word
        value = not value and word == "--data-dir"
    return None


# What people are used to type elsewhere.
HABITS = {"ls": "list", "show": "inspect", "rm": "delete", "remove": "delete", "destroy": "delete",
          "down": "delete", "up": "apply", "status": "verify", "add": "add-subnet", "nat": "enable-nat",
          "policy": "apply-policy", "run": "deploy-app", "ssh": "shell", "ping": "test-connectivity",
          "version": "--version"}


def parse(words, parser=None):
    """The command line -> options. Only the parser of the command that is called is built. What stands behind `--`
    is a program's own command line, never read as options."""
    words, program = (words[:words.index("--")], words[words.index("--") + 1:]) if "--" in words else (words, None)
    if words[:1] == ["help"]:
        words = words[1:2] + ["--help"]
    named = named_command(words)
    if named is not None and named not in COMMANDS:
        known = [name for name, entry in COMMANDS.items() if not entry["hidden"]]
        raise Problem("there is no command '%s'" % named,
                      "vpcctl calls it '%s'" % HABITS[named] if named in HABITS else
                      nearest(named, known) or "`vpcctl --help` lists the commands")
    options = (parser or build_parser(only=named)).parse_args(words)
    if not options.command:
        build_parser().print_help()
        raise SystemExit(2)
    if program is not None:
        if not hasattr(options, "program") or options.program:
            raise Problem("`--` and a command cannot stand there", "`vpcctl %s --help` shows how" % options.command)
        options.program = program
    return options


# ------------------------------------------------------------------------------------------------ main

def main(words=None, umask=UMASK):
    """Run one command line, and see that its output got out -> exit code. `umask`: what the user's programs get."""
    os.environ["PATH"] = ":".join(search_path())
    try:
        code = obey(sys.argv[1:] if words is None else words, umask)
    except SystemExit as end:                     # argparse, after --help and --version
        code = end.code or 0
    return code or hush()


def obey(words, umask=UMASK):
    """Run one command line -> exit code."""
    try:
        options = parse(words)
        entry = COMMANDS[options.command]
        ctl = Control(options, umask=umask)
        return dispatch(ctl, entry, options) or 0
    except Problem as problem:
        return complain(problem)
    except Failure as failure:
        return complain(refusal(failure))
    except Interrupted as stop:
        say_error("stopped by signal %d; %s" % (stop.args[0], "the change had been finished" if len(stop.args) > 1
                                                else "nothing is left half done"))
        return 128 + stop.args[0]
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
    except OSError as error:
        return complain(Problem("%s: %s" % (error.filename or "cannot write the output", error.strerror or error), "", 3))


def dispatch(ctl, entry, options):
    """Run a command's handler, with lock, healing and log if it changes something."""
    if not entry["changes"] or ctl.dry_run:
        if entry["root"] and not ctl.dry_run:
            need_root()
        return entry["handler"](ctl, options)
    need_root()
    need_tools()
    ctl.begin()
    outcome = "failed"
    try:
        if options.command not in ("delete", "cleanup-all", "restore"):
            heal_first(ctl, [getattr(options, field) for field in ("vpc", "vpc1", "vpc2") if getattr(options, field, None)])
        code = entry["handler"](ctl, options)
        outcome = "done"
        if ctl.run.stopped_by:
            raise Interrupted(ctl.run.stopped_by, "finished")
        return code
    except Problem as problem:
        outcome = "refused: %s" % problem if problem.code == 2 else "failed: %s" % problem
        raise
    except Interrupted as stop:
        outcome += ", signal %d" % stop.args[0]
        raise
    finally:
        ctl.store.log(shown(typed())[:500] if typed() else "", outcome[:500])


def typed():
    """The words of the command line, as others may read them: without the values of variables."""
    words, end = sys.argv[1:], (sys.argv[1:] + ["--"]).index("--")
    return [re.sub(r"(?s)\A((?:--env=)?[^=]*=).*", r"\1…", word)
            if number < end and (word.startswith("--env=") or words[number - 1:number] == ["--env"]) else word
            for number, word in enumerate(words)]


def need_root():
    """Problem 4 without root."""
    if os.geteuid():
        raise Problem("this needs root: it works on the machine's network",
                      "sudo vpcctl …, or try it in `vpcctl sandbox`, which needs no root", 4)


def need_tools():
    """Problem 4 if a system tool is missing."""
    for tool in ("ip", "bridge", "iptables", "iptables-restore"):
        if not find_tool(tool):
            raise missing_tool(tool)


def complain(problem):
    """Print a Problem on stderr -> its exit code."""
    say_error(f"vpcctl: {problem}")
    if problem.hint:
        say_error(f"  {problem.hint}")
    return problem.code


def hush():
    """Flush the output -> exit code: 141 if the reader has gone away (as a shell has it), 3 if it cannot be written."""
    try:
        sys.stdout.flush()
        return 0
    except (OSError, ValueError) as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141 if isinstance(error, BrokenPipeError) else complain(Problem("cannot write the output: %s" % error, "", 3))


def open_streams():
    """Make sure of the three standard streams: where one is closed, the next file opened would take its number, and
    what a terminal cannot show must not end a change midway."""
    import io
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name, number in (("stdout", 1), ("stderr", 2)):
        old = getattr(sys, name)
        setattr(sys, name, io.TextIOWrapper(old.detach() if old else open(number, "wb", closefd=False), old and old.encoding,
                                            "replace", line_buffering=name == "stderr" or os.isatty(number)))


def start(umask=None):
    """Be the command `vpcctl`; never returns. `umask`: the user's, if it has been changed already."""
    import gc
    gc.disable()                                  # it looks through hundreds of records in vain: the process is short
    ours = os.umask(UMASK)
    open_streams()
    sys.exit(main(umask=ours if umask is None else umask))


if __name__ == "__main__":
    start(globals().get("umask"))
