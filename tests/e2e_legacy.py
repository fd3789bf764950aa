"""The other of the two firewalls: everything works with iptables-legacy as well, and the two are never mixed."""

import os
import shutil
import unittest

from support import SandboxTest, http_get, run, tcp_listener, vpcctl


class Legacy(SandboxTest):
    """A host whose `iptables` speaks to the older of the kernel's two firewalls."""

    def setUp(self):
        program = shutil.which("xtables-legacy-multi", path=os.environ["PATH"] + ":/usr/sbin:/sbin")
        if not program:
            raise unittest.SkipTest("this machine has no iptables-legacy")
        super().setUp()
        self.folder = os.path.dirname(self.file("README", "iptables-legacy under the plain names"))
        for name in ("iptables", "iptables-save", "iptables-restore"):
            os.symlink(program, os.path.join(self.folder, name))
        self.plain_path = os.environ["PATH"]
        os.environ["PATH"] = self.folder + ":" + self.plain_path
        answer = run(["iptables", "-t", "raw", "-S"])
        if answer.code:
            self.skipTest("this kernel does not do iptables-legacy: %s" % answer.err.strip())

    def tearDown(self):
        os.environ["PATH"] = self.folder + ":" + self.plain_path
        vpcctl("cleanup-all")
        os.environ["PATH"] = self.plain_path
        super().tearDown()

    def test_everything_and_back(self):
        vpcctl("create", "blog", "--cidr", "10.20.0.0/16")
        vpcctl("add-subnet", "blog", "web", "--cidr", "10.20.1.0/24")
        vpcctl("add-subnet", "blog", "db", "--cidr", "10.20.2.0/24")
        vpcctl("create", "shop", "--cidr", "10.30.0.0/16")
        vpcctl("add-subnet", "shop", "api", "--cidr", "10.30.1.0/24")
        vpcctl("peer", "blog", "shop", "--allow-cidrs", "10.20.1.0/24,10.30.1.0/24")
        vpcctl("enable-nat", "blog")
        vpcctl("apply-policy", "blog", self.file("db.json", '{"subnet": "db", "egress": [], "ingress": '
                                                 '[{"port": 5432, "protocol": "tcp", "action": "allow"}]}'))
        self.assertIn("blog", run(["iptables", "-S", "FORWARD"]).out)
        with tcp_listener("ns-blog-db", 5432), tcp_listener("ns-blog-db", 6000), tcp_listener("ns-shop-api", 80):
            self.assert_open("ns-blog-web", "10.20.2.2", 5432)
            self.assert_dropped("ns-blog-web", "10.20.2.2", 6000)
            self.assert_open("ns-blog-web", "10.30.1.2", 80)
            self.assert_dropped("ns-blog-db", "10.30.1.2", 80)
            self.assertIn("You came from 192.0.2.2", http_get("ns-blog-web", "203.0.113.1"))
            vpcctl("verify")
            run(["iptables", "-F"])
            self.assertIn("missing", vpcctl("verify", code=1).out)
            vpcctl("restore")
            vpcctl("verify")
            self.assert_open("ns-blog-web", "10.20.2.2", 5432)
            self.assert_dropped("ns-blog-web", "10.20.2.2", 6000)

    def test_the_other_one_is_refused(self):
        vpcctl("create", "blog", "--cidr", "10.20.0.0/16")
        os.environ["PATH"] = self.plain_path
        if "legacy" in run(["iptables", "--version"]).out:
            raise unittest.SkipTest("this machine has but one iptables")
        said = vpcctl("add-subnet", "blog", "web", code=4).err
        self.assertIn("made with iptables (legacy), but this is iptables (nft)", said)
        os.environ["PATH"] = self.folder + ":" + self.plain_path
        vpcctl("add-subnet", "blog", "web")


if __name__ == "__main__":
    unittest.main()
