"""The guide, typed as printed: its tutorial, its scenarios, its troubleshooting, with real packets."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

from support import (INTERNET, LONG, SandboxTest, assert_same, http_get, in_ns, record, run, snapshot,
                     snapshot_processes, tcp_listener, tcp_open, vpcctl, wait_until)

POLICIES = os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(__file__))), "policies")
DATABASE_POLICY = """{
  "subnet": "10.20.2.0/24",
  "ingress": [
    {"port": 5432, "protocol": "tcp", "action": "allow"},
    {"port": 22, "protocol": "tcp", "action": "deny"}
  ],
  "egress": [
    {"port": 80, "protocol": "tcp", "action": "allow"},
    {"port": 443, "protocol": "tcp", "action": "allow"}
  ]
}
"""
DB_POLICY = """{
  "subnet": "10.30.3.0/24",
  "ingress": [
    {"port": 5432, "protocol": "tcp", "action": "allow"}
  ],
  "egress": [
    {"port": 80, "protocol": "tcp", "action": "allow"},
    {"port": 443, "protocol": "tcp", "action": "allow"}
  ]
}
"""


class GuideTest(SandboxTest):
    """Types shell lines as the guide prints them."""

    def type(self, line, code=0, cwd=None):
        """Run a shell line; returns its Result."""
        line = re.sub(r"\bsudo curl|\bcurl", "curl --noproxy '*'", line) if shutil.which("curl") else line
        result = run(["sh", "-c", line], cwd=cwd, timeout=120)
        self.assertEqual(result.code, code, str(result))
        self.assertNotIn("Traceback", result.err)
        return result

    def lines(self, *lines):
        """Type several lines; all must succeed."""
        for line in lines:
            self.type(line)

    def curl(self, ns, url):
        """The guide's `ip netns exec NS curl URL`; where there is no curl, the same request by hand."""
        if shutil.which("curl"):
            return self.type("sudo ip netns exec %s curl -s --max-time 20 %s" % (ns, url)).out
        host, _, port = url[len("http://"):].partition(":")
        return http_get(ns, host, int(port or 80)).partition("\r\n\r\n")[2]

    def page(self, ns, url, subnet, vpc):
        """A page of a deployed app comes, and it is this subnet's."""
        self.assertIn("Hello from subnet %s of VPC %s" % (subnet, vpc), self.curl(ns, url))

    def ends_with(self, result, text):
        """The last line of the output."""
        self.assertEqual(result.out.splitlines()[-1:], [text], str(result))

    def in_order(self, result, expected):
        """These lines are printed, in this order."""
        at, found = 0, result.out.splitlines()
        for line in expected:
            self.assertIn(line, found[at:], "not (or not in this order)\n%s" % result)
            at = found.index(line, at) + 1


class TutorialTest(GuideTest):

    def test_steps_1_to_11(self):
        web, db = "ns-blog-webserver", "ns-blog-database"
        # 1 to 3
        result = self.type("sudo vpcctl create blog --cidr 10.20.0.0/16")
        self.in_order(result, [">>> ip link add br-blog type bridge", ">>> ip addr add 10.20.0.1/16 dev br-blog",
                               ">>> ip link set br-blog up", "Created VPC: blog (10.20.0.0/16, bridge: br-blog)"])
        self.ends_with(result, "Created VPC: blog (10.20.0.0/16, bridge: br-blog)")
        result = self.type("sudo vpcctl add-subnet blog webserver --cidr 10.20.1.0/24")
        self.in_order(result, [">>> ip netns add " + web, ">>> ip link set v-blog-webser-b master br-blog"])
        self.assertRegex(result.out, r"\n>>> ip link add v-blog-webser-a .*type veth peer name v-blog-webser-b\n")
        self.ends_with(result, "Added subnet webserver (10.20.1.0/24) to VPC blog")
        result = self.type("sudo vpcctl add-subnet blog database --cidr 10.20.2.0/24")
        self.ends_with(result, "Added subnet database (10.20.2.0/24) to VPC blog")
        # 4
        result = self.type("sudo vpcctl deploy-app blog webserver --port 8080")
        self.ends_with(result, "Deployed app in subnet webserver (%s) on port 8080, PID=%d"
                       % (web, record("blog")["apps"][0]["pid"]))
        self.type("sudo vpcctl deploy-app blog database --port 5432")
        # 5
        self.page(web, "http://10.20.2.2:5432", "database", "blog")
        self.page(None, "http://10.20.1.2:8080", "webserver", "blog") if not shutil.which("curl") else self.assertIn(
            "Hello", self.type("curl -s http://10.20.1.2:8080").out)
        # 6 and 7
        self.assert_dropped(web, INTERNET, 80)
        self.assertIn("dev eth0", self.type("ip route | grep default").out)
        result = self.type("sudo vpcctl enable-nat blog --interface eth0")
        self.in_order(result, [">>> iptables -t nat -A POSTROUTING -s 10.20.0.0/16 -o eth0 -j MASQUERADE "
                               "-m comment --comment vpcctl-nat-blog"])
        self.assertIn(">>> sysctl -w net.ipv4.ip_forward=1\n", result.out)
        self.page(web, "http://10.20.1.2:8080", "webserver", "blog")
        for space in (web, db):
            self.assertIn("You came from 192.0.2.2", self.curl(space, "http://" + INTERNET))
        self.step_8(web, db)
        # 9 and 10
        self.assertEqual(self.type("sudo vpcctl list").out, "VPCs:\n- blog\n")
        seen = json.loads(self.type("sudo vpcctl inspect blog").out)
        self.assertEqual([(s["name"], s["ns"], s["gw"], s["host_ip"]) for s in seen["subnets"]],
                         [("webserver", web, "10.20.1.1", "10.20.1.2"), ("database", db, "10.20.2.1", "10.20.2.2")])
        self.assertEqual([(app["ns"], app["port"]) for app in seen["apps"]], [(web, 8080), (db, 5432)])
        # 11
        self.ends_with(self.type("sudo vpcctl delete blog"), "Deleted VPC: blog")
        self.assert_as_before()

    def step_8(self, web, db):
        """The policy: SSH is dropped, PostgreSQL passes, what is not named passes; egress is an allow-list."""
        self.assert_refused(web, "10.20.2.2", 8000)
        path = self.file("database_policy.json", DATABASE_POLICY)
        result = self.type("sudo vpcctl apply-policy blog " + os.path.basename(path), cwd=os.path.dirname(path))
        for chain, port, target, comment in (("INPUT", 5432, "ACCEPT", "policy-ingress-allow-5432"),
                                             ("INPUT", 22, "DROP", "policy-ingress-deny-22"),
                                             ("OUTPUT", 80, "ACCEPT", "policy-egress-allow-80"),
                                             ("OUTPUT", 443, "ACCEPT", "policy-egress-allow-443")):
            self.assertIn(">>> ip netns exec %s iptables -A %s -p tcp --dport %d -j %s -m comment --comment %s\n"
                          % (db, chain, port, target, comment), result.out)
        self.assertIn("Applied policy to subnet database (10.20.2.0/24)\n", result.out)
        with tcp_listener(db, 22), tcp_listener(db, 8000):
            self.assert_dropped(web, "10.20.2.2", 22)
            self.assert_open(web, "10.20.2.2", 5432)
            self.assert_open(web, "10.20.2.2", 8000)
        self.assert_open(db, INTERNET, 80)
        self.assert_dropped(db, INTERNET, 81)
        result = self.type("sudo vpcctl apply-policy blog %s/database.json" % POLICIES)
        self.assertIn("has this policy already", result.out)
        self.assertNotIn(">>>", result.out)
        self.type("sudo vpcctl apply-policy blog %s/strict-database.json" % POLICIES)
        self.assert_dropped(web, "10.20.2.2", 8000)
        self.assert_open(web, "10.20.2.2", 5432)
        self.type("sudo vpcctl apply-policy blog %s/database-from-web.json" % POLICIES)
        self.assert_open(web, "10.20.2.2", 5432)
        self.assert_dropped(None, "10.20.2.2", 5432)
        self.type("sudo vpcctl apply-policy blog %s/web.json" % POLICIES)


class ScenarioTest(GuideTest):

    def test_1_multi_tier(self):
        self.lines("sudo vpcctl create webapp --cidr 10.30.0.0/16",
                   "sudo vpcctl add-subnet webapp loadbalancer --cidr 10.30.1.0/24",
                   "sudo vpcctl add-subnet webapp appservers --cidr 10.30.2.0/24",
                   "sudo vpcctl add-subnet webapp database --cidr 10.30.3.0/24",
                   "sudo vpcctl deploy-app webapp loadbalancer --port 80",
                   "sudo vpcctl deploy-app webapp appservers --port 8080",
                   "sudo vpcctl deploy-app webapp database --port 5432",
                   "sudo vpcctl enable-nat webapp --interface eth0")
        self.assert_refused("ns-webapp-appservers", "10.30.3.2", 8000)
        path = self.file("db_policy.json", DB_POLICY)
        self.type("sudo vpcctl apply-policy webapp db_policy.json", cwd=os.path.dirname(path))
        self.page("ns-webapp-loadbalancer", "http://10.30.2.2:8080", "appservers", "webapp")
        self.page("ns-webapp-appservers", "http://10.30.3.2:5432", "database", "webapp")
        self.page("ns-webapp-appservers", "http://10.30.1.2", "loadbalancer", "webapp")
        self.assert_dropped("ns-webapp-appservers", "10.30.3.2", 8000)
        self.assert_open("ns-webapp-database", INTERNET, 80)
        self.assert_dropped("ns-webapp-database", "10.30.2.2", 8080)
        self.type("sudo vpcctl apply-policy webapp %s/strict-database.json" % POLICIES)

    def test_2_microservices(self):
        """Its names are longer than the kernel's: cables get hash tails, everything else is as printed."""
        self.lines("sudo vpcctl create microservices --cidr 10.40.0.0/16",
                   "sudo vpcctl add-subnet microservices api-gateway --cidr 10.40.1.0/24",
                   "sudo vpcctl add-subnet microservices user-service --cidr 10.40.2.0/24",
                   "sudo vpcctl add-subnet microservices order-service --cidr 10.40.3.0/24",
                   "sudo vpcctl add-subnet microservices payment-service --cidr 10.40.4.0/24",
                   "sudo vpcctl add-subnet microservices shared-db --cidr 10.40.10.0/24",
                   "sudo vpcctl deploy-app microservices api-gateway --port 8080",
                   "sudo vpcctl deploy-app microservices user-service --port 8081",
                   "sudo vpcctl deploy-app microservices order-service --port 8082",
                   "sudo vpcctl deploy-app microservices payment-service --port 8083",
                   "sudo vpcctl deploy-app microservices shared-db --port 5432",
                   "sudo vpcctl enable-nat microservices --interface eth0")
        self.page("ns-microservices-api-gateway", "http://10.40.2.2:8081", "user-service", "microservices")
        self.page("ns-microservices-order-service", "http://10.40.10.2:5432", "shared-db", "microservices")
        self.assertIn("You came from 192.0.2.2", self.curl("ns-microservices-shared-db", "http://" + INTERNET))
        self.assert_open("ns-microservices-api-gateway", "10.40.4.2", 8083)
        self.type("sudo vpcctl apply-policy microservices %s/payment-service.json" % POLICIES)
        self.assert_open("ns-microservices-order-service", "10.40.4.2", 8083)
        self.assert_dropped("ns-microservices-api-gateway", "10.40.4.2", 8083)
        self.assertEqual(vpcctl("verify", ok=False).code, 0)

    def test_3_peering(self):
        self.lines("sudo vpcctl create dev --cidr 10.50.0.0/16",
                   "sudo vpcctl add-subnet dev web --cidr 10.50.1.0/24",
                   "sudo vpcctl add-subnet dev db --cidr 10.50.2.0/24",
                   "sudo vpcctl create prod --cidr 10.60.0.0/16",
                   "sudo vpcctl add-subnet prod web --cidr 10.60.1.0/24",
                   "sudo vpcctl add-subnet prod db --cidr 10.60.2.0/24",
                   "sudo vpcctl create shared --cidr 10.70.0.0/16",
                   "sudo vpcctl add-subnet shared logging --cidr 10.70.1.0/24",
                   "sudo vpcctl add-subnet shared monitoring --cidr 10.70.2.0/24")
        self.assert_dropped("ns-dev-web", "10.70.1.2", 9200)
        self.lines("sudo vpcctl peer dev shared --allow-cidrs 10.50.1.0/24,10.70.1.0/24",
                   "sudo vpcctl peer prod shared --allow-cidrs 10.60.1.0/24,10.70.1.0/24",
                   "sudo vpcctl deploy-app dev web --port 8080",
                   "sudo vpcctl deploy-app prod web --port 8080",
                   "sudo vpcctl deploy-app shared logging --port 9200")
        self.page("ns-dev-web", "http://10.70.1.2:9200", "logging", "shared")
        self.page("ns-prod-web", "http://10.70.1.2:9200", "logging", "shared")
        self.assert_open("ns-prod-db", "10.60.1.2", 8080)
        if shutil.which("curl"):
            self.ends_with(self.type('sudo ip netns exec ns-dev-web curl --max-time 5 http://10.60.1.2:8080 '
                                     '|| echo "Correctly blocked!"'), "Correctly blocked!")
        self.assert_dropped("ns-dev-web", "10.60.1.2", 8080)
        self.assert_dropped("ns-dev-db", "10.70.1.2", 9200)
        self.assert_dropped("ns-dev-web", "10.70.2.2", 9200)
        self.type("sudo vpcctl apply-policy dev %s/quarantine.json" % POLICIES)
        self.assert_dropped("ns-dev-web", "10.70.1.2", 9200)
        self.type("sudo vpcctl apply-policy dev %s/web-hardened.json" % POLICIES)


class RecipeTest(GuideTest):
    """The troubleshooting section."""

    def setUp(self):
        GuideTest.setUp(self)
        for words in ("create myapp --cidr 10.10.0.0/16", "add-subnet myapp web --cidr 10.10.1.0/24",
                      "add-subnet myapp database --cidr 10.10.2.0/24"):
            vpcctl(*words.split())

    def works(self, source="ns-myapp-web", target="10.10.2.2", space="ns-myapp-database"):
        """Packets pass between two subnets, and verify finds nothing."""
        with tcp_listener(space, 7000):
            self.assert_open(source, target, 7000)
        self.assertEqual(vpcctl("verify", ok=False).code, 0)

    def test_issue_3_exists_already(self):
        before = snapshot()
        self.assertIn("exists already", self.type("sudo vpcctl create myapp --cidr 10.10.0.0/16").out)
        assert_same(before, snapshot())
        self.type("sudo vpcctl create myapp2 --cidr 10.10.0.0/16", code=2)       # the guide's option A overlaps
        self.lines("sudo vpcctl create myapp2 --cidr 10.11.0.0/16", "sudo vpcctl delete myapp",
                   "sudo vpcctl create myapp --cidr 10.10.0.0/16")
        self.assertEqual(record("myapp")["subnets"], [])

    def test_issue_4_no_internet(self):
        self.assert_dropped("ns-myapp-web", INTERNET, 80)
        self.type("sudo vpcctl enable-nat myapp --interface eth0")
        self.assertIn("MASQUERADE", self.type("sudo iptables -t nat -L POSTROUTING -n -v | grep MASQUERADE").out)
        self.lines("sudo iptables -t nat -L -n -v", "sudo mkdir -p /etc/netns/ns-myapp-web",
                   "sudo cp /etc/resolv.conf /etc/netns/ns-myapp-web/")
        with open("/etc/resolv.conf") as handle:
            self.assertEqual(in_ns("ns-myapp-web", ["cat", "/etc/resolv.conf"]).out, handle.read())
        self.assertIn("You came from 192.0.2.2", self.curl("ns-myapp-web", "http://" + INTERNET))
        self.type("sudo vpcctl delete myapp")
        self.assert_as_before()

    def test_issue_5_subnets_cannot_communicate(self):
        self.lines("sudo vpcctl inspect myapp", "sudo vpcctl inspect myapp | grep apps",
                   "sudo ip netns exec ns-myapp-database iptables -L -n -v")
        self.assertIn("default via 10.10.1.1", self.type("sudo ip netns exec ns-myapp-web ip route").out)
        self.assert_ping("ns-myapp-web", "10.10.2.2")
        if shutil.which("ping"):
            self.type("sudo ip netns exec ns-myapp-web ping -c 1 10.10.2.2")
        self.type("sudo vpcctl deploy-app myapp database --port 5432")
        if shutil.which("netstat"):
            self.assertIn(":5432", self.type("sudo ip netns exec ns-myapp-database netstat -tlnp").out)
        self.page("ns-myapp-web", "http://10.10.2.2:5432", "database", "myapp")

    def test_issue_6_bridge_is_busy(self):
        vpcctl("deploy-app", "myapp", "web", "--port", "8080")
        # the guide's `pkill -f "ip netns exec ns-myapp"` finds nothing: the app is the server itself
        self.assertEqual([line for line in snapshot_processes() if "ip netns exec ns-myapp" in line], [])
        self.assert_open(None, "10.10.1.2", 8080)
        self.ends_with(self.type("sudo vpcctl delete myapp"), "Deleted VPC: myapp")
        self.assert_as_before()
        self.type("sudo vpcctl cleanup-all")

    def test_issue_7_peering(self):
        self.lines("sudo vpcctl create vpc1 --cidr 10.12.0.0/16", "sudo vpcctl create vpc2 --cidr 10.20.0.0/16",
                   "sudo vpcctl add-subnet vpc1 web --cidr 10.12.1.0/24",
                   "sudo vpcctl add-subnet vpc2 web --cidr 10.20.1.0/24",
                   "sudo vpcctl peer vpc1 vpc2 --allow-cidrs 10.12.1.0/24,10.20.1.0/24",
                   "sudo vpcctl deploy-app vpc2 web --port 8080",
                   "sudo vpcctl inspect vpc1 | grep peers", "sudo vpcctl inspect vpc2 | grep peers")
        chain = self.type("sudo iptables -L vpc-vpc1 -n -v").out
        self.assertIn("vpc-peer-vpc1-vpc2", chain)
        self.assertRegex(chain, r"peer-vpc2-10\.12\.1\.0/24,10\.20\.1\.0/24")
        self.assertRegex(self.type("sudo iptables -L vpc-peer-vpc1-vpc2 -n -v").out,
                         r"ACCEPT .*10\.12\.1\.0/24 +10\.20\.1\.0/24")
        self.page("ns-vpc1-web", "http://10.20.1.2:8080", "web", "vpc2")

    def test_issue_9_address_in_use(self):
        with tcp_listener("ns-myapp-web", 8080):
            before = snapshot()
            result = self.type("sudo vpcctl deploy-app myapp web --port 8080", code=3)
            self.assertIn("port 8080 is in use already in ns-myapp-web", result.err)
            assert_same(before, snapshot())
            self.assertEqual(record("myapp")["apps"], [])
            self.type("sudo vpcctl deploy-app myapp web --port 8081")
            self.page("ns-myapp-database", "http://10.10.1.2:8081", "web", "myapp")
        self.lines("sudo vpcctl deploy-app myapp web --port 8080", "sudo vpcctl stop-app myapp web",
                   "sudo vpcctl deploy-app myapp web --port 8080")

    def remove_record(self, text=None):
        path = os.path.join(os.environ["VPCCTL_DATA"], "vpc_myapp.json")
        if text is None:
            os.unlink(path)
        else:
            with open(path, "w") as handle:
                handle.write(text)

    def test_issue_10_record_damaged(self):
        vpcctl("deploy-app", "myapp", "web", "--port", "8080")
        vpcctl("enable-nat", "myapp", "--interface", "eth0")
        self.remove_record('{"name": "myapp", ')
        self.assertIn("- myapp   (record unreadable", self.type("sudo vpcctl list").out)
        result = self.type("sudo vpcctl create myapp --cidr 10.10.0.0/16", code=2)
        self.assertIn("vpc_myapp.json", result.err)
        self.assertIn("--force", result.err)
        self.remove_record()
        self.lines("sudo vpcctl create myapp --cidr 10.10.0.0/16", "sudo vpcctl add-subnet myapp web --cidr 10.10.1.0/24",
                   "sudo vpcctl add-subnet myapp database --cidr 10.10.2.0/24")
        self.assertEqual(tcp_open(None, "10.10.1.2", 8080, LONG), "refused", "the old app is gone with its namespace")
        self.works()

    def test_issue_10_by_force(self):
        self.remove_record("{")
        self.ends_with(self.type("sudo vpcctl delete --force myapp"), "Deleted VPC: myapp")
        self.assert_as_before()

    def test_issue_10_option_2(self):
        self.lines("sudo ip netns del ns-myapp-web", "sudo ip link del br-myapp")
        self.remove_record()
        self.lines("sudo vpcctl create myapp --cidr 10.10.0.0/16", "sudo vpcctl add-subnet myapp web --cidr 10.10.1.0/24",
                   "sudo vpcctl add-subnet myapp database --cidr 10.10.2.0/24")
        self.works()

    def test_issue_10_option_2_and_nothing_after(self):
        """What vpcctl had made beside, without a record, goes with cleanup-all."""
        self.lines("sudo ip netns del ns-myapp-web", "sudo ip netns del ns-myapp-database", "sudo ip link del br-myapp")
        self.remove_record()
        self.type("sudo vpcctl cleanup-all")
        self.assert_as_before()

    def test_debugging_tips(self):
        folder = os.path.dirname(self.file("x", ""))
        out = self.type("sudo vpcctl create other --cidr 10.11.0.0/16 2>&1 | tee debug.log", cwd=folder).out
        with open(os.path.join(folder, "debug.log")) as handle:
            self.assertEqual(handle.read(), out)
        self.assertIn(">>> iptables -N vpc-other", out)
        for line, text in (("ip link show type bridge", "br-myapp"), ("bridge link show", "v-myapp-web-b"),
                           ("sudo ip netns list", "ns-myapp-web"),
                           ("sudo ip netns exec ns-myapp-web ip addr", "inet 10.10.1.2/24"),
                           ("sudo iptables -L -n -v", "vpc-myapp"),
                           ("sudo iptables -L vpc-myapp -n -v", "10.10.0.0/16")):
            self.assertIn(text, self.type(line).out, line)


class PreviewTest(GuideTest):
    """What --dry-run shows is what then runs; the same again is harmless; other values are refused."""

    @staticmethod
    def commands(text):
        """The echoed commands, without what is new each time: the random half of a namespace's id."""
        return [re.sub(r"(ip netns set \S+) \d+$", r"\1 ID", line) for line in text.splitlines() if line.startswith(">>> ")]

    def both(self, line):
        """Preview a command, then run it: the same commands, and the preview changes nothing."""
        before = snapshot()
        preview = vpcctl("--dry-run", *shlex.split(line))
        assert_same(before, snapshot(), "the preview of %s changed something" % line)
        done = vpcctl(*shlex.split(line))
        self.assertEqual(self.commands(preview.out), self.commands(done.out), line)
        self.assertTrue(self.commands(done.out), line)
        self.assertEqual([text for text in preview.out.splitlines() if not text.startswith(">>> ")], [])
        return done

    def test_every_change(self):
        policy = self.file("p.json", DATABASE_POLICY)
        self.maxDiff = None
        for line in ("create blog --cidr 10.20.0.0/16", "add-subnet blog web --cidr 10.20.1.0/24",
                     "add-subnet blog database --cidr 10.20.2.0/24", "create shop --cidr 10.30.0.0/16",
                     "add-subnet shop api --gw 10.30.0.9", "deploy-app blog web --port 8080",
                     "deploy-app shop api --port 80 -- %s -m http.server 80" % sys.executable,
                     "enable-nat blog", "enable-nat shop --interface eth0 --subnet-filter api",
                     "peer blog shop --allow-cidrs 10.20.1.0/24,10.30.0.0/24", "apply-policy blog " + policy,
                     "publish blog web --port 8000:8080", "unpublish blog web --port 8000", "reset-policy blog database",
                     "stop-app blog web", "unpeer blog shop", "disable-nat shop", "delete-subnet blog database",
                     "disable-nat blog", "delete blog", "cleanup-all"):
            with self.subTest(line):
                self.both(line)
        self.assert_as_before()

    def test_why_and_quiet(self):
        done = vpcctl("--why", "create", "blog", "--cidr", "10.20.0.0/16")
        for line in done.out.splitlines()[:-1]:
            self.assertRegex(line, r"^>>> \S.*   # \w")
        self.assertEqual(vpcctl("add-subnet", "blog", "web", "--quiet").out, "")
        self.assertEqual(vpcctl("list").out, "VPCs:\n- blog\n")

    def test_nobody_reads_the_output(self):
        """A reader who has gone, a full disk, a closed stdout: a change is finished all the same."""
        for number, end in enumerate(("2>/dev/null | head -n 1", "2>/dev/null | true", ">/dev/full", ">&-", ">&- 2>&- <&-")):
            name = "x%d" % number
            run(["sh", "-c", "vpcctl create %s --cidr 10.%d.0.0/16 %s" % (name, 40 + number, end)])
            self.assertEqual(record(name)["name"], name)
        self.assertEqual(vpcctl("verify", ok=False).code, 0)

    def test_again_and_otherwise(self):
        policy = self.file("p.json", DATABASE_POLICY)
        steps = (("create blog --cidr 10.20.0.0/16", "create blog --cidr 10.21.0.0/16",
                  "VPC blog exists already with 10.20.0.0/16, not 10.21.0.0/16"),
                 ("add-subnet blog database --cidr 10.20.2.0/24", "add-subnet blog database --cidr 10.20.3.0/24",
                  "exists already with cidr 10.20.2.0/24, not 10.20.3.0/24"),
                 ("create shop --cidr 10.30.0.0/16", "create mall --cidr 10.30.0.0/24", "overlaps VPC shop"),
                 ("enable-nat blog --interface eth0", "enable-nat blog --interface eth0 --subnet-filter database",
                  "NAT of VPC blog is on already: by eth0, for all subnets"),
                 ("peer blog shop --allow-cidrs 10.20.2.0/24,10.30.1.0/24",
                  "peer blog shop --allow-cidrs 10.20.2.0/24,10.30.2.0/24",
                  "blog and shop are peered already, for 10.20.2.0/24, 10.30.1.0/24"),
                 ("deploy-app blog database --port 5432", "deploy-app blog database --port 5432 -- /bin/sleep 9",
                  "another program is deployed there on port 5432"),
                 ("apply-policy blog " + policy, "apply-policy blog /nonexistent", "cannot read"))
        for line, other, text in steps:
            vpcctl(*line.split())
            before = snapshot()
            again = vpcctl(*line.split())
            self.assertNotIn(">>>", again.out, "nothing is to be done")
            self.assertIn("already", again.out)
            refused = vpcctl(*other.split(), code=2)
            self.assertIn(text, refused.err)
            self.assertEqual(refused.out, "")
            assert_same(before, snapshot(), "after %s again, and %s" % (line, other))
        vpcctl("stop-app", "blog", "database")
        self.assertIn("No app is deployed", vpcctl("stop-app", "blog", "database").out)
        vpcctl("disable-nat", "blog")
        self.assertIn("off already", vpcctl("disable-nat", "blog").out)

    def test_refused_by_the_machine(self):
        """What only the real machine can tell; nothing is changed by a refusal."""
        run(["ip", "link", "add", "br-taken", "type", "bridge"])
        try:
            self.refusals()
        finally:
            run(["ip", "link", "del", "br-taken"])

    def refusals(self):
        vpcctl("create", "blog", "--cidr", "10.20.0.0/16")
        before = snapshot()
        for line, text, hint in (
                ("create x --cidr 192.0.2.0/25", "192.0.2.0/25 overlaps a network that this host already has", "not in use"),
                ("enable-nat blog --interface nope0", "there is no network interface 'nope0' here",
                 "there are: eth0, br-taken; "),
                ("enable-nat blog --interface br-blog", "br-blog is not a way out", "ip route")):
            result = vpcctl(*line.split(), code=2)
            self.assertIn(text, result.err)
            self.assertIn(hint, result.err)
            self.assertEqual(result.out, "")
        assert_same(before, snapshot())
        created = vpcctl("create", "taken", "--cidr", "10.22.0.0/16").out
        self.assertRegex(created, r"Created VPC: taken \(10\.22\.0\.0/16, bridge: br-taken-[0-9a-f]{4}\)")
        vpcctl("delete", "taken")
        assert_same(before, snapshot())

    def test_missing_programs(self):
        """A machine without ip, or without iptables: exit code 4, and the package's name."""
        folder = os.path.dirname(self.file("x", ""))
        real = [path for path in ("/usr/sbin", "/sbin") if not os.path.islink(path)]
        if real != ["/usr/sbin"]:
            self.skipTest("/sbin is a folder of its own here")
        os.mkdir(os.path.join(folder, "sbin"))
        script = ("mount --bind %s/sbin /usr/sbin && PATH=%s/bin exec %s %s create x --cidr 10.9.0.0/16"
                  % (folder, folder, sys.executable, os.path.join(os.path.dirname(POLICIES), "vpcctl.py")))
        os.mkdir(os.path.join(folder, "bin"))
        for missing, present in ((("ip", "iproute2"), ()), (("iptables", "iptables"), ("ip", "bridge"))):
            for name in present:
                shutil.copy(shutil.which(name), os.path.join(folder, "bin", name))
            before = snapshot()
            result = run(["unshare", "--mount", "sh", "-c", script])
            self.assertEqual(result.code, 4, str(result))
            self.assertIn("Cannot find required command: " + missing[0], result.err)
            self.assertIn("install the package " + missing[1], result.err)
            assert_same(before, snapshot())


class AnswerTest(GuideTest):
    """test-connectivity tells open, refused and dropped apart."""

    def test_three_answers(self):
        for words in ("create blog --cidr 10.20.0.0/16", "add-subnet blog web", "add-subnet blog db",
                      "deploy-app blog db --port 5432"):
            vpcctl(*words.split())
        address = record("blog")["subnets"][1]["host_ip"]

        def ask(*words, code):
            return vpcctl("test-connectivity", "blog", "web", *words, code=code).out.splitlines()[0]
        self.assertRegex(ask(address, "--port", 5432, code=0), r"open$")
        self.assertRegex(ask(address, "--port", 8000, code=1), r"refused$")
        with tcp_listener("ns-blog-db", 22):
            self.assertRegex(ask(address, "--port", 22, code=1), r"no answer$")
        self.assertRegex(ask(address, code=0), r"icmp: open$")
        self.assertNotRegex(ask("10.99.0.1", "--port", 80, code=1), r"open|refused")
        run(["ip", "netns", "exec", "ns-blog-db", "iptables", "-I", "INPUT", "-p", "icmp", "-j", "DROP"])
        self.assertRegex(ask(address, code=1), r"no answer$")


class AppTest(GuideTest):
    """What deploy-app serves, as whom, and what stop-app may end."""

    def setUp(self):
        GuideTest.setUp(self)
        vpcctl("create", "blog", "--cidr", "10.20.0.0/16")
        vpcctl("add-subnet", "blog", "web", "--cidr", "10.20.1.0/24")

    @contextlib.contextmanager
    def server(self, ns, port):
        """Somebody's own `python3 -m http.server` (the very words that deploy-app runs) in a namespace."""
        folder = os.path.dirname(self.file("x", ""))
        argv = [sys.executable, "-m", "http.server", str(port)]
        child = subprocess.Popen((["ip", "netns", "exec", ns] if ns else []) + argv, cwd=folder,
                                 stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: tcp_open(ns, "127.0.0.1", port) == "open", 15, "the other server listens")
            yield child
        finally:
            child.kill()
            child.wait()

    def test_page_user_and_folder(self):
        folder = os.path.dirname(self.file("secret.txt", "the folder in which the command was typed\n"))
        vpcctl("deploy-app", "blog", "web", "--port", "80", cwd=folder)
        pid = record("blog")["apps"][0]["pid"]
        self.assertIn("Hello from subnet web of VPC blog, port 80.", http_get(None, "10.20.1.2"))
        with open("/proc/%d/status" % pid) as handle:
            status = dict(line.split(":\t", 1) for line in handle.read().splitlines() if ":\t" in line)
        for key in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb"):
            self.assertEqual(int(status[key], 16), 0, key)
        self.assertEqual(status["NoNewPrivs"].strip(), "1")
        with open("/proc/self/uid_map") as handle:
            mapped = [line.split() for line in handle]
        if mapped and int(mapped[0][2]) > 65534:
            self.assertEqual(set(status["Uid"].split() + status["Gid"].split()), {str(record("blog")["apps"][0]["user"])})
            self.assertEqual(status["Groups"].strip(), "")
        self.assertEqual(os.readlink("/proc/%d/cwd" % pid), "/run/vpcctl/blog/www/web-80")
        self.assertEqual(os.listdir("/run/vpcctl/blog/www/web-80"), ["index.html"])
        asked = run([sys.executable, "-c", "import urllib.request as u; u.urlopen('http://10.20.1.2/secret.txt')"],
                    env={"no_proxy": "*"})
        self.assertIn("404", asked.err)

    def test_stop_app_ends_only_its_own(self):
        vpcctl("deploy-app", "blog", "web", "--port", "8080")
        with self.server("ns-blog-web", 9000) as beside, self.server(None, 9001) as host:
            done = vpcctl("stop-app", "blog", "web")
            self.assertRegex(done.out, r"Stopped app in subnet web on port 8080, PID=\d+\n\Z")
            self.assert_refused(None, "10.20.1.2", 8080)
            self.assertIsNone(beside.poll())
            self.assertIsNone(host.poll())
            self.assert_open(None, "10.20.1.2", 9000)
            self.assert_open(None, "127.0.0.1", 9001)
            self.assertIn("No app is deployed", vpcctl("stop-app", "blog", "web").out)
            self.assertIsNone(beside.poll())
            # the namespace goes: whoever is in it goes too, and is named; the host's own does not
            done = vpcctl("delete", "blog")
            beside.wait(timeout=30)
            self.assertIn("ending process %d" % beside.pid, done.err)
            self.assert_open(None, "127.0.0.1", 9001)

    def test_a_recorded_pid_that_is_another_s(self):
        """PIDs come again: the number alone is never enough."""
        vpcctl("deploy-app", "blog", "web", "--port", "8080")
        vpcctl("add-subnet", "blog", "db")
        path = os.path.join(os.environ["VPCCTL_DATA"], "vpc_blog.json")
        with self.server("ns-blog-web", 9000) as beside, self.server(None, 9001) as host:
            found = record("blog")
            mine = found["apps"][0]["pid"]
            boot = found["apps"][0]["start"].rsplit("/", 1)[0]
            for victim, start in ((beside, found["apps"][0]["start"]),        # another start time
                                  (host, "%s/%s" % (boot, self.started(host.pid)))):      # another namespace
                found["apps"][0].update(pid=victim.pid, start=start)
                with open(path, "w") as handle:
                    json.dump(found, handle)
                done = vpcctl("stop-app", "blog", "web")
                self.assertNotIn(">>> kill %d\n" % victim.pid, done.out)
                self.assertEqual("gone already" in done.err, victim is host)      # before, it was still there
                self.assertIsNone(victim.poll())
                self.assert_open("ns-blog-web" if victim is beside else None, "127.0.0.1", 9000 if victim is beside else 9001)
            for pid in (0, 1):
                found["apps"][0].update(pid=pid)
                with open(path, "w") as handle:
                    json.dump(found, handle)
                vpcctl("stop-app", "blog", "web")
            self.assertIsNone(beside.poll())
            self.assert_refused(None, "10.20.1.2", 8080)
            self.assertFalse(os.path.isdir("/proc/%d" % mine), "it is found without its number")

    @staticmethod
    def started(pid):
        """A process's start time in ticks since boot."""
        with open("/proc/%d/stat" % pid) as handle:
            return handle.read().rpartition(")")[2].split()[19]

    def test_an_app_that_does_not_start(self):
        before = snapshot()
        for line, text in (("-- %s -c 'import sys; sys.exit(\"no such table\")'" % sys.executable, "no such table"),
                           ("-- /nonexistent/program", "nonexistent")):
            result = vpcctl("deploy-app", "blog", "web", "--port", "8080", *shlex.split(line), code=3)
            self.assertIn("does not listen on port 8080", result.err)
            self.assertIn(text, result.err)
            self.assertEqual(record("blog")["apps"], [])
        assert_same(before, snapshot())


if __name__ == "__main__":
    import unittest
    unittest.main()
