#!/usr/bin/env python3
"""Measure vpcctl beside what else could build the same network.

    python3 tests/bench.py [--quick] [--json FILE] [PART...]      (make bench)

Runs itself in `vpcctl sandbox`: it needs no root and touches nothing. Every time is that of a whole process;
sides that are compared take turns, so that noise hits them alike; the table has medians.

The stock batch is made from the very commands that `vpcctl --dry-run apply` prints, put together as a
practised hand would: for the host two `ip -batch` with the sysctls in between, one `bridge -batch`, one
`iptables-restore`; then, one namespace after the other, one `sysctl`, one `ip -n NS -batch`, one
`iptables-restore`. The other script has the same commands, a process each. That all three build the same
network is looked at too. Files that only names need (mkdir, ln, tee) are left out of both.

Exit code: 0 all that is required is met; 1 something is missed.
"""
import argparse
import collections
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from statistics import median

HERE = os.path.dirname(os.path.abspath(__file__))
VPCCTL = [os.path.join(os.path.dirname(HERE), "vpcctl.py")]   # by its first line; main sees to the Python
BASELINE = [sys.executable, "-c", "import argparse, json, ipaddress, subprocess"]
PARTS = ["apply", "small", "grow", "big", "policy", "throughput", "others"]
Row = collections.namedtuple("Row", "what ours beside theirs ratio limit ok")


# ---- running and timing ----------------------------------------------------------------------------------
def timed(argv):
    """Run one process to its end; return its seconds and peak MB. One that fails ends the bench."""
    with tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=err)
        _, child.returncode, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        if child.returncode:
            err.seek(0)
            raise SystemExit("bench: failed: %s\n%s" % (" ".join(argv), err.read().decode(errors="replace")))
    return seconds, usage.ru_maxrss / 1024.0


def written(folder, text):
    """Write text to a new file; return its path."""
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as handle:
        handle.write(text)
    return handle.name


def vpcctl(*words):
    """Run vpcctl; return its seconds."""
    return timed(VPCCTL + list(words))[0]


def answer(*argv):
    """Return what a command prints; one that fails is an error."""
    return subprocess.check_output(argv, stdin=subprocess.DEVNULL).decode()


def settle(deadline=60):
    """Wait until the kernel has taken down the namespaces deleted so far.

    It does that after `ip netns del` has returned, oldest first, and takes a namespace's links along: when
    the cable of the one deleted last is gone, so are all before it."""
    answer("ip", "netns", "add", "bench-last")
    answer("ip", "link", "add", "bench-last", "type", "veth", "peer", "name", "far", "netns", "bench-last")
    answer("ip", "netns", "del", "bench-last")
    for _ in range(deadline * 20):
        time.sleep(0.05)
        with open("/proc/net/dev") as handle:
            if "bench-last:" not in handle.read():
                return


def remove():
    """Delete the VPC that was built, and let the kernel come to rest."""
    vpcctl("delete", "bench")
    settle()


# ---- the same network, three ways ------------------------------------------------------------------------
def topology(count, folder):
    """Write a topology of one VPC with this many subnets of the default policy; return the file's path."""
    subnets = [{"name": "s%d" % i, "cidr": "10.%d.%d.0/24" % (20 + i // 256, i % 256)}
               for i in range(1, count + 1)]
    vpc = {"name": "bench", "cidr": "10.20.0.0/14", "subnets": subnets}
    return written(folder, json.dumps({"vpcs": [vpc]}))


def inside(words):
    """Split a command into the namespace that it runs in (or None) and its words there."""
    if words[:3] == ["ip", "netns", "exec"]:
        return words[3], words[4:]
    return (words[2], ["ip"] + words[3:]) if words[:2] == ["ip", "-n"] else (None, words)


def batch(plan):
    """Return commands (lists of words) as the input of an `ip -batch`."""
    return "".join(" ".join('"%s"' % word if " " in word else word for word in words[1:]) + "\n"
                   for words in plan)


def restore(plan):
    """Return iptables commands (lists of words) as the input of one `iptables-restore --noflush`."""
    tables = collections.OrderedDict()
    for words in plan:
        line = re.sub(r"^(-w \d+|-w|--wait) ", "", batch([words]))
        table = re.search(r"(?:^| )-t (\w+) ", line)
        line = line.replace(table.group(0), "", 1) if table else line
        chains, rules = tables.setdefault(table.group(1) if table else "filter", ([], []))
        if line.startswith("-N "):
            chains.append(":%s - [0:0]\n" % line.split()[1])
        else:
            rules.append(line)
    return "".join("*%s\n%sCOMMIT\n" % (name, "".join(chains + rules))
                   for name, (chains, rules) in tables.items())


class Stock:
    """The stock scripts for a topology, from what vpcctl would do: run `make`, `delete` or `singly`."""

    def __init__(self, path, folder):
        self.folder, spaces, singly = folder, collections.OrderedDict(), []
        lines = answer(*(VPCCTL + ["--dry-run", "apply", path])).splitlines()
        plan = [shlex.split(line[4:]) for line in lines if re.match(">>> (?!mkdir |ln |tee |printf )", line)]
        for space, words in map(inside, plan):
            spaces.setdefault(space, []).append(words)
            words = ["ip", "netns", "exec", space] + words if space else words    # as the guide prints it
            singly.append(" ".join(map(shlex.quote, words)))
        make = sum([self.lines(space, spaces[space]) for space in spaces], [])
        self.make, self.delete, self.singly = [["sh", "-e", written(folder, "\n".join(script))]
                                               for script in (make, self.removal(plan), singly)]

    def lines(self, space, plan):
        """Return the shell lines for one namespace, or the host (None); what needs a link up is late."""
        kinds = {"ip": [], "late": [], "bridge": [], "iptables": [], "sysctl": []}
        for words in plan:
            late = words[0] == "ip" and (space or "up" in words or words[1] in ("route", "neigh", "rule"))
            kinds["late" if late else words[0]].append(words)
        run, ip = ("ip netns exec %s " % space, "ip -n " + space) if space else ("", "ip")
        values = [word for words in kinds["sysctl"] for word in words if "=" in word]
        ways = (("ip", ip + " -batch ", batch), ("sysctl", run + "sysctl -q -w ", None),
                ("late", ip + " -batch ", batch), ("bridge", "bridge -batch ", batch),
                ("iptables", run + "iptables-restore --noflush < ", restore))
        return [line + (written(self.folder, text(kinds[kind])) if text else " ".join(values))
                for kind, line, text in ways if kinds[kind]]

    def removal(self, plan):
        """Return the script that takes the network down: rules in one go, links in one go, the rest."""
        links, rest, tables, rules, chains = [], [], set(), [], []
        for words in plan:
            if words[:3] == ["ip", "link", "add"]:
                name = words[-1 if words[-2] == "name" else 3]       # of a pair, the end that is on the host
                links.append(["ip", "link", "set", "dev", name, "group", "4711"])
            elif words[:3] in (["ip", "rule", "add"], ["ip", "netns", "add"]):
                rest.append(words[:2] + ["del"] + words[3:])
            elif words[:2] == ["ip", "route"] and "table" in words:
                tables.add(words[words.index("table") + 1])
            elif words[0] == "iptables" and "-N" in words:
                chains.append(words[words.index("-N") + 1])
            elif words[0] == "iptables" and set(words) & {"FORWARD", "INPUT", "OUTPUT"}:
                at = words.index("-I" if "-I" in words else "-A")
                rules.append(words[:at] + ["-D", words[at + 1]] + words[at + 2 + words[at + 2].isdigit():])
        rules += [["iptables", flag, name] for flag in ("-F", "-X") for name in chains]
        flush = [["ip", "route", "flush", "table", table] for table in sorted(tables)]
        steps = batch(flush + links + [["ip", "link", "del", "group", "4711"]] + rest)
        return ["iptables-restore --noflush < " + written(self.folder, restore(rules)),
                "ip -batch " + written(self.folder, steps)]


def fingerprint():
    """Return the lines that describe the network as it is, without what differs by chance."""
    spaces = sorted(line.split()[0] for line in answer("ip", "netns", "list").splitlines())
    lines = {"namespaces: " + " ".join(spaces)}
    both = "ip -o link;ip -o -4 addr;ip -4 route show table all;iptables-save"
    host = both + ";ip rule;ip -4 neigh show nud permanent;bridge -d link;bridge fdb show"
    chance = re.compile(r"#.*|\[\d+:\d+\]|^\d+: |@[\w-]+|link-netns\S* \S+|state \w+|cost \d+", re.M)
    for space in [""] + ["ip netns exec %s " % name for name in spaces[:2]]:
        for question in (both if space else host).split(";"):
            text = chance.sub("", answer(*(space + question).split()))
            text = re.sub(r"(?!02:76)([0-9a-f]{2}:){5}[0-9a-f]{2}", "MAC", text)
            lines |= {space + question + ": " + " ".join(line.split()) for line in text.splitlines()}
    return lines


# ---- what is measured ------------------------------------------------------------------------------------
class Bench:
    """One run: its folder, and the rows found so far."""

    def __init__(self, quick, folder):
        self.quick, self.folder, self.rows = quick, folder, []

    def rounds(self, what, many, few):
        """Yield the numbers of the rounds, and say them."""
        count = few if self.quick else many
        for number in range(count):
            print("bench: %s, round %d of %d" % (what, number + 1, count), file=sys.stderr, flush=True)
            yield number

    def row(self, what, ours, beside="", theirs=None, limit=None, unit="s", faster=False):
        """Add a row. limit ("<= 1.2") is for ours / theirs, theirs / ours if `faster`, or ours alone."""
        ratio = (theirs / ours if faster else ours / theirs) if theirs else None
        value, (sense, bound) = ratio or ours, (limit or "- 0").split()
        good = None if not limit else value >= float(bound) if sense == ">=" else value <= float(bound)
        self.rows.append(Row(what, (ours, unit), beside, (theirs, unit), ratio, limit, good))

    def apply(self):
        """apply and delete of 50 subnets, beside the stock batch and one process per command."""
        path, took, prints = topology(50, self.folder), collections.defaultdict(list), {}
        stock = Stock(path, self.folder)
        sides = [("vpcctl", VPCCTL + ["apply", path], VPCCTL + ["delete", "bench"]),
                 ("stock", stock.make, stock.delete), ("singly", stock.singly, stock.delete)]
        for number in self.rounds("apply and delete of 50 subnets", 9, 3):
            for name, make, delete in sides[:3 if number < 3 else 2][::-1 if number % 2 else 1]:
                took[name].append(timed(make)[0])
                prints[name] = prints.get(name) or fingerprint()
                took[name + " delete"].append(timed(delete)[0])
                settle()
        took = {name: median(values) for name, values in took.items()}
        self.row("apply, 50 subnets", took["vpcctl"], "stock batch", took["stock"], "<= 1.2")
        self.row("  times faster", took["vpcctl"], "a process each", took["singly"], ">= 5", faster=True)
        self.row("delete, 50 subnets", took["vpcctl delete"], "stock batch", took["stock delete"], "<= 2")
        odd = [("vpcctl" if line in prints["vpcctl"] else name, line)
               for name in ("stock", "singly") for line in sorted(prints["vpcctl"] ^ prints[name])]
        sys.stderr.writelines("bench: only in the network of %s: %s\n" % pair for pair in odd[:40])
        self.row("  networks differ by", len(odd), limit="<= 0", unit="lines")

    def small(self):
        """Commands that answer at once, beside a Python that imports what such a tool needs."""
        took, words = collections.defaultdict(list), ["flag-check", "list", "--help"]
        vpcctl("apply", topology(50, self.folder))
        for _ in self.rounds("small commands", 21, 9):
            for word in words:
                took["python"].append(timed(BASELINE)[0])
                took[word].append(vpcctl(word))
        for word in words:
            self.row(word, median(took[word]), "python imports", median(took["python"]), "<= 1.6")
        remove()

    def grow(self):
        """add-subnet as the first and as the 201st; verify of 200."""
        took, path = collections.defaultdict(list), topology(200, self.folder)
        for _ in self.rounds("add-subnet to an empty VPC and to 200 subnets, verify", 5, 2):
            for _ in range(3):
                vpcctl("create", "bench", "--cidr", "10.20.0.0/14")
                took["python"].append(timed(BASELINE)[0])
                took["first"].append(vpcctl("add-subnet", "bench", "m0", "--cidr", "10.22.0.0/24"))
                remove()
            vpcctl("apply", path)
            for more in range(3):
                name, cidr = "m%d" % more, "10.22.%d.0/24" % more
                took["python"].append(timed(BASELINE)[0])
                took["more"].append(vpcctl("add-subnet", "bench", name, "--cidr", cidr))
            took["verify"].append(vpcctl("verify"))
            remove()
        took = {name: median(values) for name, values in took.items()}
        self.row("add-subnet, the first", took["first"], "python imports", took["python"], "<= 2.2")
        self.row("add-subnet, the 201st", took["more"], "the first", took["first"], "<= 1.3")
        self.row("verify, 200 subnets", took["verify"], limit="<= 10")

    def big(self):
        """apply of 500 subnets beside that of 50, and its memory."""
        took, paths = collections.defaultdict(list), {n: topology(n, self.folder) for n in (50, 500)}
        for _ in self.rounds("apply of 50 and 500 subnets", 2, 1):
            for count in (50, 500, 50):
                seconds, memory = timed(VPCCTL + ["apply", paths[count]])
                took[count].append(seconds)
                took["memory"].append(memory)
                remove()
        self.row("apply, 500 subnets", median(took[500]), "apply of 50", median(took[50]), "<= 11")
        self.row("  its peak memory", max(took["memory"]), limit="<= 60", unit="MB")

    def policy(self):
        """apply-policy with 2,000 rules beside one with 20."""
        took, paths = collections.defaultdict(list), {}
        for count in (20, 2000):
            rules = [{"port": 1000 + i, "protocol": "tcp", "action": "allow"} for i in range(count)]
            paths[count] = written(
                self.folder, json.dumps({"subnet": "10.20.1.0/24", "ingress": rules, "egress": []}))
        vpcctl("apply", topology(1, self.folder))
        for _ in self.rounds("apply-policy of 20 and 2,000 rules", 7, 3):
            for count in sorted(paths):
                took[count].append(vpcctl("apply-policy", "bench", paths[count]))
        remove()
        self.row("apply-policy, 2,000 rules", median(took[2000]), "20 rules", median(took[20]), "<= 3")

    def throughput(self):
        """TCP between two subnets, beside two namespaces with nothing but a cable between them."""
        vpcctl("apply", topology(2, self.folder))
        for line in ("netns add bench-a", "netns add bench-b",
                     "link add end-a netns bench-a type veth peer name end-b netns bench-b",
                     "-n bench-a addr add 10.99.0.1/30 dev end-a", "-n bench-a link set end-a up",
                     "-n bench-b addr add 10.99.0.2/30 dev end-b", "-n bench-b link set end-b up"):
            answer("ip", *line.split())
        took = {("ns-bench-s1", "ns-bench-s2", "10.20.2.2"): [], ("bench-a", "bench-b", "10.99.0.2"): []}
        for number in self.rounds("throughput", 15, 7):
            for way in sorted(took, reverse=number % 2):
                took[way].append(stream(*way))
        for name in ("bench-a", "bench-b"):
            answer("ip", "netns", "del", name)
        remove()
        bare, ours = [median(took[way]) for way in sorted(took)]
        self.row("throughput, two subnets", ours, "bare veth pair", bare, ">= 0.85", "Gbit/s")

    def others(self):
        """Other tools that build namespaces on a bridge, where they are installed; nothing is required."""
        ours = [row.ours[0] for row in self.rows if row.what == "apply, 50 subnets"]
        mininet = "mn --topo single,50 --switch lxbr --controller none --test none".split()
        folders = os.environ.get("CNI_PATH", "/opt/cni/bin") + ":/opt/cni/bin:/usr/lib/cni:/usr/libexec/cni"
        plugin = shutil.which("bridge", path=folders)
        for what, found, measure in (("Mininet, up and down", shutil.which("mn"), lambda: timed(mininet)[0]),
                                     ("CNI bridge plugin", plugin, lambda: cni(plugin, self.folder))):
            if found and ours:
                took = [measure() for _ in self.rounds(what, 3, 1)]
                self.row("apply, 50 subnets", ours[0], what, median(took))
                settle()
            else:
                self.row(what, None, "skipped: " + ("no apply" if found else "not installed"))


def stream(source, target, address, seconds=0.8):
    """Send TCP from one namespace to an address in another; return Gbit/s."""
    me = [sys.executable, os.path.abspath(__file__), "--stream"]
    receiver = subprocess.Popen(["ip", "netns", "exec", target] + me + ["receive"], stdout=subprocess.PIPE)
    receiver.stdout.readline()
    answer("ip", "netns", "exec", source, *(me + [address, str(seconds)]))
    count, took = receiver.communicate()[0].split()
    return int(count) * 8 / float(took) / 1e9


def stream_side(words):
    """Be one end of `stream`: "receive", or an address and for how long to send to it."""
    if words[0] != "receive":
        link = socket.create_connection((words[0], 5201), 10)
        block, end = bytes(1 << 20), time.time() + float(words[1])
        while time.time() < end:
            link.sendall(block)
        return
    listener = socket.socket()
    listener.bind(("", 5201))
    listener.listen(1)
    print("ready", flush=True)
    link, block = listener.accept()[0], bytearray(1 << 20)
    start = time.perf_counter()
    print(sum(iter(lambda: link.recv_into(block), 0)), time.perf_counter() - start)


def cni(plugin, folder):
    """Let the CNI bridge plugin connect 50 new namespaces; return the seconds. They are removed again."""
    ipam = {"type": "host-local", "subnet": "10.77.0.0/24", "dataDir": folder + "/ipam"}
    config = {"cniVersion": "0.4.0", "name": "bench", "type": "bridge", "bridge": "bench-cni", "ipam": ipam}
    script = "set -e; export CNI_COMMAND=ADD CNI_IFNAME=eth0 CNI_PATH=%s\n" % os.path.dirname(plugin)
    script += "for i in $(seq 50); do ip netns add bench-$i\n"
    script += "CNI_CONTAINERID=bench-$i CNI_NETNS=/run/netns/bench-$i %s < %s; done\n" % (
        plugin, written(folder, json.dumps(dict(config, isGateway=True))))
    seconds = timed(["sh", written(folder, script)])[0]
    for words in ["netns del bench-%d" % i for i in range(1, 51)] + ["link del bench-cni"]:
        answer("ip", *words.split())
    return seconds


# ---- the table -------------------------------------------------------------------------------------------
def shown(number, unit):
    """Return a number and its unit as text of about three figures."""
    if unit == "s" and number and number < 1:
        number, unit = number * 1000, "ms"
    digits = 2 if unit == "s" else 1 if unit == "Gbit/s" else 0
    return "" if number is None else "%.*f %s" % (digits, number, unit)


def table(rows):
    """Return the rows as a text table that is also Markdown."""
    lines = [("what", "vpcctl", "beside", "takes", "ratio", "required", "")]
    for row in rows:
        required = (row.limit or "") + (" " + row.ours[1] if row.limit and row.ratio is None else "")
        ratio, good = "%.2f" % row.ratio if row.ratio else "", {True: "ok", False: "MISSED", None: ""}[row.ok]
        lines.append((row.what, shown(*row.ours), row.beside, shown(*row.theirs), ratio, required, good))
    widths = [max(len(line[i]) for line in lines) for i in range(7)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| %s |" % " | ".join(map(str.ljust, line, widths)) for line in lines)


def main():
    """Run the bench in the sandbox; return the exit code."""
    if sys.argv[1:2] == ["--stream"]:
        return stream_side(sys.argv[2:])
    parser = argparse.ArgumentParser(description="Measure vpcctl in its sandbox.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", metavar="FILE", type=os.path.abspath, help="write the rows to FILE as well")
    parser.add_argument("parts", nargs="*", metavar="PART", choices=PARTS + ["all"], default="all",
                        help="only these of: " + ", ".join(PARTS))
    args = parser.parse_args()
    os.environ["PATH"] = os.path.dirname(sys.executable) + ":" + os.environ["PATH"]
    if not os.environ.get("VPCCTL_SANDBOX"):
        argv = VPCCTL + ["sandbox", "--", sys.executable, os.path.abspath(__file__)] + sys.argv[1:]
        os.execv(argv[0], argv + (["--json", args.json] if args.json else []))
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args.quick, folder)
        for part in PARTS if "all" in args.parts else args.parts:
            getattr(bench, part)()
    where = "Linux %s, Python %s, %d cores" % (os.uname().release, sys.version.split()[0], os.cpu_count())
    print("%s\n\n%s; medians" % (table(bench.rows), where))
    if args.json:
        with open(args.json, "w") as handle:
            json.dump({"where": where, "rows": [row._asdict() for row in bench.rows]}, handle, indent=1)
    return 1 if any(row.ok is False for row in bench.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
