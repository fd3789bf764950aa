"""The sweep: every changing command of vpcctl, with a fault at every point, and what must be true afterwards.

The commands come from vpcctl's own table; one without a scenario here fails `missing_scenarios`.
"""

import json
import os

from injection import FAILURES, FILE_MODES, KILLS, SIGNALS, TOOL_MODES, Injector, load_vpcctl, state
from support import assert_same, difference, run

POLICY = {"subnet": "web", "ingress": [{"port": 80, "protocol": "tcp", "action": "allow"},
                                       {"port": 22, "protocol": "tcp", "action": "deny", "from": "db"}],
          "egress": [{"port": 53, "protocol": "udp", "action": "deny"}]}
TOPOLOGY = {"vpcs": [{"name": "blog", "cidr": "10.20.0.0/16", "subnets": [
    {"name": "web", "cidr": "10.20.1.0/24", "policy": {key: POLICY[key] for key in ("ingress", "egress")}},
    {"name": "api", "cidr": "10.20.3.0/24", "apps": [{"port": 8080}]},
    {"name": "db", "cidr": "10.20.2.0/24"}], "nat": {"interface": "eth0"}},
    {"name": "shop", "cidr": "10.30.0.0/16", "subnets": [{"name": "web", "cidr": "10.30.1.0/24"}]}],
    "peers": [{"vpcs": ["blog", "shop"], "allow": ["10.20.1.0/24", "10.30.1.0/24"]}]}
BLOG = ["create blog --cidr 10.20.0.0/16", "add-subnet blog web --cidr 10.20.1.0/24"]
TWO = BLOG + ["add-subnet blog db --cidr 10.20.2.0/24"]
SHOP = ["create shop --cidr 10.30.0.0/16", "add-subnet shop web --cidr 10.30.1.0/24"]
PEER = "peer blog shop --allow-cidrs 10.20.1.0/24,10.30.1.0/24"
NAT = "enable-nat blog --interface eth0"
APP = "deploy-app blog web --port 80"
PUBLISH = "publish blog web --port 8080:80 --interface eth0"
ALL = TWO + SHOP + [PEER, NAT, PUBLISH, APP]
BREAK = ["!ip link del br-blog", "!ip netns del ns-blog-db", "!ip link del v-blog-db-b"]


class Scenario:
    """A command to disturb: what stands before, the words, what undoes it (None: set up anew), and whether it may
    leave a removal to be finished after tools failed for good."""

    def __init__(self, title, setup, words, back=None, removes=False):
        self.title, self.setup, self.words, self.back, self.removes = title, setup, words, back, removes
        self.command = words.split()[0]

    def __repr__(self):
        return self.title


SCENARIOS = [
    Scenario("create", [], "create blog --cidr 10.20.0.0/16", ["delete blog"]),
    Scenario("create beside NAT", SHOP + ["enable-nat shop --interface eth0"], "create blog --cidr 10.20.0.0/16",
             ["delete blog"]),
    Scenario("add-subnet", BLOG + [NAT], "add-subnet blog db --cidr 10.20.2.0/24", ["delete-subnet blog db"]),
    Scenario("delete-subnet", TWO + [APP, PUBLISH], "delete-subnet blog web", removes=True),
    Scenario("delete", TWO + SHOP + [PEER, APP], "delete blog", removes=True),
    Scenario("cleanup-all", ALL, "cleanup-all", removes=True),
    Scenario("restore", TWO + SHOP + [PEER, APP, NAT] + BREAK, "restore blog", BREAK),
    Scenario("enable-nat", TWO, "enable-nat blog --interface eth0 --subnet-filter web,db", ["disable-nat blog"]),
    Scenario("disable-nat", TWO + [NAT], "disable-nat blog", [NAT], removes=True),
    Scenario("publish", BLOG, PUBLISH, ["unpublish blog web --port 8080"]),
    Scenario("unpublish", BLOG + [PUBLISH], "unpublish blog web --port 8080", [PUBLISH], removes=True),
    Scenario("peer", BLOG + SHOP, PEER, ["unpeer blog shop"]),
    Scenario("unpeer", BLOG + SHOP + [PEER], "unpeer blog shop", [PEER], removes=True),
    Scenario("apply-policy", TWO, "apply-policy blog {policy}", ["reset-policy blog web"]),
    Scenario("reset-policy", TWO + ["apply-policy blog {policy}"], "reset-policy blog web", ["apply-policy blog {policy}"]),
    Scenario("deploy-app", BLOG, APP, ["stop-app blog web"]),
    Scenario("stop-app", BLOG + [APP], "stop-app blog web", [APP], removes=True),
    Scenario("apply", TWO + [APP, PUBLISH, NAT], "apply {topology} --prune", removes=True),
]


def missing_scenarios():
    """Return the changing commands that no scenario disturbs."""
    known = {scenario.command for scenario in SCENARIOS}
    return sorted(name for name, entry in load_vpcctl().COMMANDS.items() if entry["changes"] and name not in known)


class Sweep:
    """One scenario's faults, one after the other."""

    def __init__(self, folder):
        self.injector = Injector()
        self.files = {"policy": os.path.join(folder, "policy.json"), "topology": os.path.join(folder, "topology.json")}
        for name, value in (("policy", POLICY), ("topology", TOPOLOGY)):
            with open(self.files[name], "w") as handle:
                json.dump(value, handle)
        self.empty = state()

    def close(self):
        """Take the shims away."""
        self.injector.close()

    def words(self, text):
        """A command line as words."""
        return text.format(**self.files).split() if "{" in text else text.split()

    def obey(self, text, codes=(0,)):
        """Run a command without a fault; "!" starts a command that is not vpcctl's."""
        if text.startswith("!"):
            return run(text[1:].split())
        outcome = self.injector.vpcctl(self.words(text), shims=False)
        if outcome.code not in codes:
            raise AssertionError("unexpected exit code %s\n%s" % (outcome.code, outcome))
        return outcome

    def build(self, scenario):
        """Make the state in which the scenario's command is given; returns it."""
        self.obey("cleanup-all")
        assert_same(self.empty, state(), "cleanup-all left something")
        for text in scenario.setup:
            self.obey(text)
        return state()

    def count(self, scenario):
        """Run the command undisturbed -> (calls of tools, works on files, the state afterwards)."""
        outcome = self.injector.vpcctl(self.words(scenario.words))
        if outcome.code:
            raise AssertionError(str(outcome))
        return len(outcome.calls), len(outcome.works), state()

    def run(self, scenario, choose):
        """Try the points that `choose` picks of all points -> list of what went wrong, as texts."""
        before = self.build(scenario)
        calls, works, after = self.count(scenario)
        points = [("tool", at, mode) for at in range(1, calls + 1) for mode in TOOL_MODES]
        points += [("file", at, mode) for at in range(1, works + 1) for mode in FILE_MODES]
        clean, troubles = False, []
        for number, point in enumerate(choose(points)):
            try:
                clean = clean or self.back(scenario, before)
                clean = self.strike(scenario, point, number, before, after)
            except AssertionError as error:
                clean = False
                troubles.append("%s, %s work %d, %s:\n%s" % (scenario.title, point[0], point[1], point[2], error))
                if len(troubles) >= int(os.environ.get("VPCCTL_TROUBLES", "3")):
                    break
        self.obey("cleanup-all")
        if not troubles:
            assert_same(self.empty, state(), "cleanup-all left something")
        return troubles

    def back(self, scenario, before):
        """Bring the state before back: by the opposite command if that does it, else from the start."""
        if scenario.back:
            try:
                for text in scenario.back:
                    self.obey(text, (0, 2))
                if not difference(before, state()):
                    return True
            except AssertionError:
                pass
        assert_same(before, self.build(scenario), "the same commands lead to another state")
        return True

    def strike(self, scenario, point, number, before, after):
        """One fault, and what must be true then -> whether the state is now the one before."""
        outcome = self.injector.vpcctl(self.words(scenario.words), *point)
        mode = point[2]
        try:
            if outcome.code == -9:
                if mode not in KILLS:
                    raise AssertionError("killed without a reason")
                self.heal(scenario, number, before, after)
                return False
            now = state()
            if mode in KILLS and outcome.fired and outcome.code == 0 and point[0] == "tool":
                assert_same(after, now, "it ended before the kill came")
                return False
            return self.judge(scenario, mode, outcome, number, before, after, now)
        except AssertionError as error:
            raise AssertionError("%s\n%s" % (error, outcome))

    def judge(self, scenario, mode, outcome, number, before, after, now):
        """A command that ended by itself: all or nothing, and its exit code says which."""
        if outcome.code == 0:
            assert_same(after, now, "exit code 0, but")
            return False
        if outcome.code in (129, 130, 143):
            if mode not in SIGNALS:
                raise AssertionError("a signal that was not sent")
            done = "had been finished" in outcome.err
            assert_same(after if done else before, now, "stopped by a signal, but")
            return not done
        if outcome.code not in (3, 4):
            raise AssertionError("unexpected exit code")
        if mode in ("fail", "fail-on") and "injected" not in outcome.err and "Input/output error" not in outcome.err:
            raise AssertionError("the error does not say what failed")
        half = "could not" in outcome.err or "finishes it" in outcome.err
        if half and (scenario.removes or mode in ("fail-on", "fail")):
            self.heal(scenario, number, before, after)
            return False
        if scenario.removes and not difference(after, now):
            return False                          # what was to go has gone; the look round afterwards failed
        assert_same(before, now, "it failed, but")
        return True

    def heal(self, scenario, number, before, after):
        """After a kill: the same command again, restore, delete or cleanup-all lead to a clean state."""
        way = ("again", "restore", "delete", "cleanup-all")[number % 4]
        if way == "again":
            self.obey(scenario.words, (0, 2))
            now = state()
            assert_same(after, now, "after a kill and the same command again")
        elif way == "restore":
            self.obey("restore")
            now = state()
            healthy = self.healthy(scenario, before)
            if difference(after, now) and difference(healthy, now):
                assert_same(after, now, "after a kill and restore, neither as before nor")
        else:
            for text in ["delete blog", "delete shop"] if way == "delete" else ["cleanup-all"]:
                self.obey(text, (0, 2))
            assert_same(self.empty, state(), "after a kill and " + way)
        self.obey("verify")

    def healthy(self, scenario, before):
        """The state before, mended: for `restore`, whose state before is a broken one."""
        return before


def every(points):
    """All points."""
    return points


def sample(count, offset=0):
    """A chooser of about `count` points, spread over the calls and going through the modes."""
    def choose(points):
        if len(points) <= count:
            return points
        # a step that has no factor in common with the number of modes meets each mode
        step = len(points) / float(count)
        return [points[int(number * step + offset) % len(points)] for number in range(count)]
    return choose


__all__ = ["FAILURES", "SCENARIOS", "Sweep", "every", "missing_scenarios", "sample"]
