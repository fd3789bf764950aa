"""The README's sessions, typed again in the sandbox: what it prints is what vpcctl prints."""

import os
import re
import shutil
import sys
import tempfile

from support import HERE, SandboxTest, run, vpcctl

TOP = os.path.dirname(HERE)
# A curl for machines without one: it fetches a page, as the README's sessions do.
CURL = """#!%s
import sys, urllib.request
sys.stdout.write(urllib.request.urlopen(sys.argv[-1], timeout=10).read().decode())
""" % sys.executable


def sessions(text):
    """The README's sessions -> a list of [(command, expected lines)]."""
    found = []
    for block in re.findall(r"(?ms)^```console\n(.*?)^```$", text):
        session = []
        for line in block.splitlines():
            if line.startswith("$ "):
                session.append((line[2:], []))
            else:
                session[-1][1].append(line)
        found.append(session)
    return found


def steady(line):
    """A line without the numbers that differ from run to run."""
    line = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME", line.rstrip())
    line = re.sub(r"\d+\.\d{3} ms", "0.000 ms", line)
    return re.sub(r"PID=\d+|kill \d+|process \d+|PID +(?=STATE)|\d+ +(?=running since)", "PID", line)


def pattern(lines):
    """Expected lines as a regular expression; `...` alone on a line stands for any lines, also none."""
    return "".join("(?:.*\n)*?" if line == "..." else re.escape(steady(line)) + "\n" for line in lines)


class ReadmeTest(SandboxTest):

    def setUp(self):
        super().setUp()
        self.here = tempfile.mkdtemp(prefix="vpcctl-")
        self.addCleanup(shutil.rmtree, self.here)
        for name in ("policies", "tests"):
            os.symlink(os.path.join(TOP, name), os.path.join(self.here, name))
        self.env = {}
        if not shutil.which("curl"):
            with open(os.path.join(self.here, "curl"), "w") as program:
                program.write(CURL)
            os.chmod(program.name, 0o755)
            self.env["PATH"] = self.here + ":" + os.environ["PATH"]

    def test_sessions(self):
        with open(os.path.join(TOP, "README.md"), encoding="utf-8") as handle:
            found = sessions(handle.read())
        self.assertGreater(len(found), 2)
        for session in found:
            for command, expected in session:
                result = run(["sh", "-c", command], env=self.env, cwd=self.here)
                out = "".join(steady(line) + "\n" for line in (result.out + result.err).splitlines())
                if not re.search("\\A%s\\Z" % pattern(expected), out):
                    self.fail("$ %s\n--- the README says\n%s\n--- it printed\n%s" % (command, "\n".join(expected), out))
            run(["vpcctl", "--quiet", "cleanup-all"])

    def test_the_picture(self):
        """tests/data/three-vpcs.svg is what `graph` draws: scenario 3, where prod also reaches the internet."""
        for words in ("apply %s/data/scenario-3-peering.json" % HERE, "enable-nat prod", "publish prod web --port 80:8080"):
            vpcctl("--quiet", *words.split())
        with open(os.path.join(HERE, "data", "three-vpcs.svg"), encoding="utf-8") as handle:
            self.assertEqual(vpcctl("graph", "--format", "svg").out, handle.read())

    def test_the_comparison_can_fail(self):
        """`...` stands for lines, not for a part of one, and what is not left out must be there."""
        for out, lines, same in (("a\nb\nc\n", ["a", "...", "c"], True), ("a\nc\n", ["a", "...", "c"], True),
                                 ("a\nb\nd\n", ["a", "...", "c"], False), ("a\nb\n", ["a"], False),
                                 ("App, PID=7\n", ["App, PID=12"], True), ("", [], True)):
            self.assertEqual(bool(re.search("\\A%s\\Z" % pattern(lines), "".join(
                steady(line) + "\n" for line in out.splitlines()))), same, (out, lines))
