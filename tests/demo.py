#!/usr/bin/env python3
"""The tutorial in a throw-away sandbox: each command, its output, and whether it did what it should.

    make demo          (or: python3 tests/demo.py)

Exit code 0 only if everything held.
"""

import json
import os
import shutil
import sys
import time

sys.dont_write_bytecode = True
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path.insert(0, HERE)

from support import INTERNET, LONG, VPCCTL, difference, http_get, run, snapshot, tcp_open  # noqa: E402

WEB, DB = "ns-blog-webserver", "ns-blog-database"
DATABASE_POLICY = {
    "subnet": "10.20.2.0/24",
    "ingress": [{"port": 5432, "protocol": "tcp", "action": "allow"},
                {"port": 22, "protocol": "tcp", "action": "deny"}],
    "egress": [{"port": 80, "protocol": "tcp", "action": "allow"},
               {"port": 443, "protocol": "tcp", "action": "allow"}]}
STRICT_POLICY = dict(DATABASE_POLICY, ingress=DATABASE_POLICY["ingress"][:1])
MOST_LINES = 16


def can_print(text):
    """Return whether stdout's encoding has these characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
        return True
    except (UnicodeError, LookupError):
        return False


class Demo:
    """Prints the steps, runs their commands and counts what held."""

    def __init__(self):
        self.held = self.broken = 0
        self.yes, self.no = ("\u2713", "\u2717") if can_print("\u2713\u2717") else ("ok  ", "FAIL")
        self.colour = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"

    def say(self, text="", style=""):
        codes = {"title": "1", "command": "36", "yes": "32", "no": "31;1", "dim": "2"}
        encoding = sys.stdout.encoding or "ascii"
        text = text.encode(encoding, "replace").decode(encoding)
        print("\033[%sm%s\033[0m" % (codes[style], text) if self.colour and style else text)
        sys.stdout.flush()

    def step(self, number, title):
        self.say("\nStep %s: %s" % (number, title), "title")

    def type(self, line, expect=0):
        """Run a shell line, print it and its output; returns the output. `expect` None: any exit code."""
        self.say("  $ " + (line), "command")
        result = run(["sh", "-c", line])
        lines = (result.out + result.err).splitlines()
        if len(lines) > MOST_LINES:
            left = len(lines) - MOST_LINES
            lines[MOST_LINES - 2:-2] = ["... (%d more lines)" % left]
        for text in lines:
            self.say("    " + text, "dim" if text.startswith(">>>") else "")
        if expect is not None and result.code != expect:
            self.check("exit code %s, expected %s" % (result.code, expect), False)
        return result.out + result.err

    def check(self, what, held):
        """Print ✓ or ✗ with what was seen."""
        self.say("  %s %s" % (self.yes if held else self.no, what), "yes" if held else "no")
        if held:
            self.held += 1
        else:
            self.broken += 1

    def fetch(self, ns, url, seconds=5):
        """Fetch a page from a namespace as the guide does, with curl; where there is none, with Python."""
        line = "sudo ip netns exec %s curl -s --max-time %d %s" % (ns, seconds, url)
        if shutil.which("curl"):
            return self.type(line + " | head -n 5")
        host, _, port = url[len("http://"):].partition(":")
        self.say("  $ %s | head -n 5     (no curl here: Python asks)" % line, "command")
        page = http_get(ns, host, int(port or 80), seconds).partition("\r\n\r\n")[2]
        for text in page.splitlines()[:5]:
            self.say("    " + text)
        return page


def write(name, policy):
    """Write a policy file in the current directory, one rule a line."""
    rows = ['  "subnet": %s' % json.dumps(policy["subnet"])]
    for way in ("ingress", "egress"):
        rules = ",\n    ".join(json.dumps(rule) for rule in policy[way])
        rows.append('  "%s": [\n    %s\n  ]' % (way, rules))
    with open(name, "w") as handle:
        handle.write("{\n%s\n}\n" % ",\n".join(rows))


def build(demo):
    """Steps 1 to 5: a VPC, two subnets, two apps, and one reaches the other."""
    demo.step(1, "create the VPC")
    out = demo.type("sudo vpcctl create blog --cidr 10.20.0.0/16")
    demo.check("a switch (bridge) br-blog with 10.20.0.1/16 is there",
               "Created VPC: blog (10.20.0.0/16, bridge: br-blog)" in out
               and "10.20.0.1/16" in run(["ip", "address", "show", "dev", "br-blog"]).out)
    demo.step(2, "a subnet for the web server")
    out = demo.type("sudo vpcctl add-subnet blog webserver --cidr 10.20.1.0/24")
    demo.check("a namespace %s with 10.20.1.2" % WEB,
               "Added subnet webserver (10.20.1.0/24) to VPC blog" in out
               and "10.20.1.2/24" in run(["ip", "-n", WEB, "address"]).out)
    demo.step(3, "a subnet for the database")
    demo.type("sudo vpcctl add-subnet blog database --cidr 10.20.2.0/24")
    demo.check("a namespace %s with 10.20.2.2" % DB, "10.20.2.2/24" in run(["ip", "-n", DB, "address"]).out)
    demo.step(4, "an app in each")
    for name, port, ip in (("webserver", 8080, "10.20.1.2"), ("database", 5432, "10.20.2.2")):
        out = demo.type("sudo vpcctl deploy-app blog %s --port %d" % (name, port))
        demo.check("it listens on %s:%d" % (ip, port),
                   "Deployed app in subnet %s" % name in out and tcp_open(None, ip, port, LONG) == "open")
    demo.step(5, "does the web server reach the database?")
    page = demo.fetch(WEB, "http://10.20.2.2:5432")
    demo.check("yes: a page from the database's subnet", "<" in page)
    demo.type("sudo vpcctl test-connectivity blog webserver 10.20.2.2 --port 5432")
    demo.type("sudo vpcctl test-connectivity blog webserver 10.20.2.2")


def nat(demo):
    """Steps 6 and 7: no internet, then NAT, then internet."""
    demo.step(6, "the internet, through NAT")
    demo.type("sudo vpcctl test-connectivity blog webserver %s --port 80" % INTERNET, expect=1)
    demo.check("without NAT the internet is out of reach", tcp_open(WEB, INTERNET, 80) == "dropped")
    demo.type("ip route | grep default")
    demo.type("sudo vpcctl enable-nat blog --interface eth0")
    demo.step(7, "does the web server reach the internet now?")
    page = demo.fetch(WEB, "http://" + INTERNET)
    demo.check("yes, and the internet saw the machine's address, 192.0.2.2, not the subnet's",
               "You came from 192.0.2.2<" in page)


def policies(demo):
    """Step 8: the guide's policy, then a strict one."""
    demo.step(8, "security policies")
    demo.check("before: port 22 of the web server is closed by the default policy, port 8000 is not",
               tcp_open(DB, "10.20.1.2", 22) == "dropped" and tcp_open(DB, "10.20.1.2", 8000, LONG) == "refused")
    write("database_policy.json", DATABASE_POLICY)
    demo.type("cat database_policy.json")
    demo.type("sudo vpcctl apply-policy blog database_policy.json")
    demo.type("sudo vpcctl test-connectivity blog webserver 10.20.2.2 --port 22", expect=1)
    demo.check("SSH to the database is dropped", tcp_open(WEB, "10.20.2.2", 22) == "dropped")
    demo.check("PostgreSQL's port is still open", tcp_open(WEB, "10.20.2.2", 5432, LONG) == "open")
    demo.check("a port that the list does not name is let through (refused: nothing listens there)",
               tcp_open(WEB, "10.20.2.2", 8000, LONG) == "refused")
    demo.check("the database may ask the internet on port 80, and on no other",
               tcp_open(DB, INTERNET, 80, LONG) == "open" and tcp_open(DB, INTERNET, 81) == "dropped")
    write("strict_policy.json", STRICT_POLICY)
    demo.say("  A list of nothing but allows is an allow-list: the rest is dropped.")
    demo.type("grep -A2 ingress strict_policy.json")
    demo.type("sudo vpcctl apply-policy blog strict_policy.json")
    demo.type("sudo vpcctl test-connectivity blog webserver 10.20.2.2 --port 8000", expect=1)
    demo.check("the same port is dropped now", tcp_open(WEB, "10.20.2.2", 8000) == "dropped")
    demo.check("PostgreSQL's port is still open", tcp_open(WEB, "10.20.2.2", 5432, LONG) == "open")


def look_and_delete(demo, before):
    """Steps 9 to 11: list, inspect, delete; nothing stays."""
    demo.step(9, "list the VPCs")
    demo.check("it is listed", demo.type("sudo vpcctl list") == "VPCs:\n- blog\n")
    demo.step(10, "inspect it")
    demo.type("sudo vpcctl inspect blog")
    try:
        seen = json.loads(run(["vpcctl", "inspect", "blog"]).out)
    except ValueError:
        seen = {}
    demo.check("JSON with two subnets, two apps and NAT by eth0",
               [len(seen.get(key) or []) for key in ("subnets", "apps")] == [2, 2]
               and (seen.get("nat") or {}).get("interface") == "eth0")
    demo.step(11, "delete it")
    out = demo.type("sudo vpcctl delete blog")
    demo.check("deleted", "Deleted VPC: blog" in out)
    left = difference(before, snapshot())
    demo.check("nothing is left: links, namespaces, addresses, routes, firewall rules, settings, processes, "
               "records are as before", not left)
    for line in left.splitlines():
        demo.say("    " + line)


def main():
    """Go into a sandbox, or, in it, run the steps; returns the exit code."""
    if not os.environ.get("VPCCTL_SANDBOX"):
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, VPCCTL, "sandbox", "--",
                                  sys.executable, os.path.realpath(__file__)])
    os.chdir("/run")                 # the sandbox's own: the policy files go with it
    demo, began, before = Demo(), time.time(), snapshot()
    demo.say("vpcctl: the tutorial, in a throw-away sandbox (your network is not touched)", "title")
    build(demo)
    nat(demo)
    policies(demo)
    look_and_delete(demo, before)
    demo.say("\n%d held, %d did not (%.0f s)" % (demo.held, demo.broken, time.time() - began),
             "no" if demo.broken else "yes")
    if not demo.broken:
        demo.say("Try it yourself: ./vpcctl.py sandbox")
    return 1 if demo.broken or not demo.held else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:          # make demo | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
