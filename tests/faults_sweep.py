"""Every changing command with a fault at every point: the full sweep (`make test-faults`)."""

import os
import shutil
import tempfile

from support import SandboxTest
from sweep import SCENARIOS, Sweep, every, missing_scenarios


def tried(name, points):
    """Tell the runner how many fault points were tried: its last line says so."""
    folder = os.environ.get("VPCCTL_RESULTS")
    if folder:
        with open(os.path.join(folder, "points.%s.%d" % (name, os.getpid())), "a") as handle:
            handle.write("%d\n" % points)


class SweepTest(SandboxTest):
    scenarios = ()
    choose = staticmethod(every)

    def test_faults(self):
        folder = tempfile.mkdtemp(prefix="vpcctl-sweep-")
        self.addCleanup(shutil.rmtree, folder)
        sweep = Sweep(folder)
        try:
            for scenario in self.scenarios:
                with self.subTest(scenario.title):
                    troubles = sweep.run(scenario, self.choose)
                    self.assertFalse(troubles, "\n\n".join(troubles))
        finally:
            sweep.close()
            tried(type(self).__name__, sweep.injector.points)


class CoverageTest(SandboxTest):

    def test_every_changing_command_is_disturbed(self):
        self.assertEqual(missing_scenarios(), [], "add a scenario to tests/sweep.py")


for scenario in SCENARIOS:
    title = "".join(word.capitalize() for word in scenario.title.replace("-", " ").split())
    globals()[title + "SweepTest"] = type(title + "SweepTest", (SweepTest,), {"scenarios": (scenario,), "__module__": __name__})
del SweepTest, scenario
