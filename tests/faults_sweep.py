"""The long runs: every changing command with a fault at every point, every object lost, a soak (`make test-faults`)."""

import e2e_faults
from e2e_faults import FaultTest, sweep_some
from support import SandboxTest
from sweep import SCENARIOS, every


class SweepTest(SandboxTest):
    scenario = None

    def test_faults(self):
        sweep_some(self, [self.scenario], every)


for scenario in SCENARIOS:
    title = "Sweep" + "".join(word.capitalize() for word in scenario.title.replace("-", " ").split()) + "Test"
    globals()[title] = type(title, (SweepTest,), {"scenario": scenario, "__module__": __name__})


class EveryObjectTest(FaultTest):
    every = 1
    test_each_object_lost_is_named_and_repaired = e2e_faults.DriftTest.test_each_object_lost_is_named_and_repaired


class LongSoakTest(FaultTest):
    vpcs, subnets = 20, 10
    test_nothing_adds_up = e2e_faults.SoakTest.test_nothing_adds_up


del SweepTest, SandboxTest, FaultTest, scenario
