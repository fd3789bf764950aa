#!/usr/bin/env python3
"""Run the tests: python3 tests/run.py [--unit] [--e2e] [--faults] [-k PATTERN]

unit_*.py    plans, rules and values as text; no root
cli_*.py     the command line, in process or as a process; no root
e2e_*.py     real packets; each test class has a sandbox of its own (`vpcctl.py sandbox -- ...`)
faults_*.py  as e2e, with failures injected; only with --faults

Without a choice: unit, cli and e2e. The last line is `N passed, N failed`; the exit code is 1 if any failed.
"""

import argparse
import fnmatch
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unittest

sys.dont_write_bytecode = True
HERE = os.path.dirname(os.path.realpath(__file__))
VPCCTL = os.path.join(os.path.dirname(HERE), "vpcctl.py")
DEADLINE = 480


def modules(prefixes):
    """Return the names of the test modules of these kinds, in order."""
    names = sorted(name[:-3] for name in os.listdir(HERE) if name.endswith(".py"))
    return [name for prefix in prefixes for name in names if name.startswith(prefix + "_")]


def tests_of(name, pattern):
    """Return the test cases of MODULE or MODULE.Class whose id fits the pattern."""
    module, _, wanted = name.partition(".")
    sys.path.insert(0, HERE)
    try:
        suite = unittest.defaultTestLoader.loadTestsFromModule(importlib.import_module(module))
    finally:
        sys.path.remove(HERE)
    found = []

    def walk(part):
        for item in part:
            if isinstance(item, unittest.TestSuite):
                walk(item)
            elif not wanted or type(item).__name__ == wanted:
                if not pattern or pattern in item.id() or fnmatch.fnmatch(item.id(), pattern):
                    found.append(item)
    walk(suite)
    return found


# ---- the child: one module or class, results to a file, one JSON line each ----

class Recorder(unittest.TestResult):
    """Writes each result at once, so that a kill loses nothing but the test that hung."""

    def __init__(self, handle):
        unittest.TestResult.__init__(self)
        self.handle = handle
        self.texts = []
        self.outcome = "passed"

    def say(self, **fields):
        self.handle.write(json.dumps(fields) + "\n")
        self.handle.flush()

    def startTest(self, test):
        unittest.TestResult.startTest(self, test)
        self.texts, self.outcome = [], "passed"
        self.say(start=test.id())

    def stopTest(self, test):
        unittest.TestResult.stopTest(self, test)
        self.say(id=test.id(), outcome=self.outcome, text="\n".join(self.texts))

    def fail(self, test, text):
        self.outcome = "failed"
        self.texts.append("%s\n%s" % (test.id(), text))
        if not isinstance(test, unittest.TestCase) and not hasattr(test, "test_case"):
            # a class or module fixture: no stopTest comes
            self.say(id=str(test), outcome="failed", text=self.texts.pop())

    def addError(self, test, err):
        unittest.TestResult.addError(self, test, err)
        self.fail(test, self.errors[-1][1])

    def addFailure(self, test, err):
        unittest.TestResult.addFailure(self, test, err)
        self.fail(test, self.failures[-1][1])

    def addSubTest(self, test, subtest, err):
        unittest.TestResult.addSubTest(self, test, subtest, err)
        if err is not None:
            self.fail(subtest, self._exc_info_to_string(err, test))

    def addSkip(self, test, reason):
        unittest.TestResult.addSkip(self, test, reason)
        if not isinstance(test, unittest.TestCase):
            return self.say(id=str(test), outcome="skipped", text=reason)
        if self.outcome == "passed":
            self.outcome = "skipped"
            self.texts.append(reason)

    def addUnexpectedSuccess(self, test):
        unittest.TestResult.addUnexpectedSuccess(self, test)
        self.fail(test, "passed, although it is marked as an expected failure")


def run_inside(name, pattern, path):
    """Run one module or class here and write its results to `path`; returns the exit code."""
    with open(path, "w") as handle:
        result = Recorder(handle)
        try:
            suite = unittest.TestSuite(tests_of(name, pattern))
        except unittest.SkipTest as skip:
            result.say(id=name, outcome="skipped", text=str(skip))
        except BaseException:
            result.say(id=name, outcome="failed", text="cannot be loaded\n" + traceback.format_exc())
        else:
            suite.run(result)
        result.say(done=True)
    return 0


# ---- the parent: jobs, two at a time ----

class Job:
    """One module (unit, cli) or test class (e2e, faults) and what came of it."""

    def __init__(self, name, sandboxed, count):
        self.name, self.sandboxed, self.count = name, sandboxed, count
        self.passed = self.failed = self.skipped = 0
        self.texts = []
        self.seconds = 0.0
        self.points = 0

    def fail(self, text):
        self.failed += 1
        self.texts.append(text)


def run_job(job, options, folder):
    """Run one job in a child (e2e: in a sandbox of its own) within its deadline and read its results."""
    result = os.path.join(folder, job.name + ".json")
    output = os.path.join(folder, job.name + ".out")
    argv = [sys.executable, os.path.join(HERE, "run.py"), "--inside", job.name, "--result", result]
    argv += ["-k", options.k] if options.k else []
    if job.sandboxed:
        argv = [sys.executable, VPCCTL, "sandbox", "--"] + argv
    env = dict(os.environ, PYTHONDONTWRITEBYTECODE="1", VPCCTL_RESULTS=folder)
    began = time.time()
    late = False
    with open(output, "wb") as sink:
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT,
                                 env=env, start_new_session=True)
        try:
            code = child.wait(timeout=options.deadline)
        except subprocess.TimeoutExpired:
            late = True
            os.killpg(child.pid, signal.SIGKILL)      # the sandbox ends with it
            code = child.wait()
    job.seconds = time.time() - began
    job.points = read_points(folder, job)
    read_results(job, result, output, code, "no end after %d s: killed" % options.deadline if late else "")


def read_points(folder, job):
    """Return how many fault points the job says that it tried (files points.CLASS.PID, a number a line)."""
    total = 0
    for name in os.listdir(folder):
        if name.startswith("points.%s." % job.name.rpartition(".")[2]):
            with open(os.path.join(folder, name)) as handle:
                total += sum(int(line) for line in handle)
    return total


def read_results(job, result, output, code, late):
    """Fill the job's counts from what its child wrote; a child that did not finish is a failure."""
    running, done = "", False
    try:
        with open(result) as handle:
            lines = handle.read().splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            item = json.loads(line)
        except ValueError:
            continue                                  # cut off by the kill
        done = done or "done" in item
        running = item.get("start", "" if "id" in item else running)
        if item.get("outcome") == "passed":
            job.passed += 1
        elif item.get("outcome") == "skipped":
            job.skipped += 1
            job.texts.append("skipped: %s: %s" % (item["id"], item["text"]))
        elif item.get("outcome") == "failed":
            job.fail(item["text"])
    if not done:
        with open(output, errors="replace") as handle:
            tail = handle.read()[-4000:]
        job.fail("%s%s; its output:\n%s" % (late or "ended early with exit code %d" % code,
                                          " in " + running if running else "", tail))


def plan_jobs(options):
    """Return the jobs that the options ask for."""
    kinds = (["unit", "cli"] if options.unit else []) + (["e2e"] if options.e2e else [])
    kinds = kinds or ([] if options.faults else ["unit", "cli", "e2e"])
    jobs = []
    for name in modules(kinds + (["faults"] if options.faults else [])):
        sandboxed = name.startswith(("e2e_", "faults_"))
        try:
            tests = tests_of(name, options.k)
        except BaseException:                         # the child says what is wrong with it
            jobs.append(Job(name, False, 1))
            continue
        groups = [name]
        if sandboxed:
            groups = []
            for test in tests:
                group = "%s.%s" % (name, type(test).__name__)
                if group not in groups:
                    groups.append(group)
        if tests:
            jobs += [Job(group, sandboxed, len(tests)) for group in groups]
    return jobs


def sandbox_trouble():
    """Return why no sandbox can be had here ('' if it can)."""
    if not os.path.exists(VPCCTL):
        return "there is no %s" % VPCCTL
    child = subprocess.Popen([sys.executable, VPCCTL, "sandbox", "--", "true"], stdin=subprocess.DEVNULL,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        text = child.communicate(timeout=60)[0].decode(errors="replace").strip()
    except subprocess.TimeoutExpired:
        child.kill()
        return "`vpcctl sandbox -- true` did not end within 60 s"
    return "" if child.returncode == 0 else text or "exit code %d" % child.returncode


def run_all(jobs, options, folder):
    """Run the jobs on `options.j` threads, printing a line as each ends."""
    waiting, lock = list(jobs), threading.Lock()

    def work():
        while True:
            with lock:
                if not waiting:
                    return
                job = waiting.pop(0)
            try:
                run_job(job, options, folder)
            except Exception:
                job.fail("the runner failed\n" + traceback.format_exc())
            with lock:
                print("%-4s %-44s %3d passed%s%s  %.1f s" % (
                    "FAIL" if job.failed else "ok", job.name, job.passed,
                    ", %d failed" % job.failed if job.failed else "",
                    ", %d skipped" % job.skipped if job.skipped else "", job.seconds))
                sys.stdout.flush()
    threads = [threading.Thread(target=work, daemon=True) for _ in range(options.j)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main():
    """Parse the options, run, print the total; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unit", action="store_true", help="the tests that need no root")
    parser.add_argument("--e2e", action="store_true", help="the tests with real packets, in sandboxes")
    parser.add_argument("--faults", action="store_true", help="the tests with injected failures")
    parser.add_argument("-k", metavar="PATTERN", default="", help="only tests whose name holds this")
    parser.add_argument("-j", metavar="N", type=int, default=2, help="jobs at a time (2)")
    parser.add_argument("--deadline", metavar="S", type=int, default=DEADLINE, help="seconds per job (480)")
    parser.add_argument("--inside", metavar="MODULE", help=argparse.SUPPRESS)
    parser.add_argument("--result", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        return run_inside(options.inside, options.k, options.result)
    began = time.time()
    jobs = plan_jobs(options)
    if any(job.sandboxed for job in jobs):
        trouble = sandbox_trouble()
        if trouble:
            lost = Job("end to end", False, 1)
            lost.fail("NOT RUN: %d test classes need a sandbox, and none is to be had here:\n%s"
                      % (sum(job.sandboxed for job in jobs), trouble))
            jobs = [job for job in jobs if not job.sandboxed]
        else:
            lost = None
    else:
        lost = None
    # the sandbox has a /run of its own: results must lie elsewhere
    base = None if not os.path.realpath(tempfile.gettempdir()).startswith("/run") else "/tmp"
    with tempfile.TemporaryDirectory(prefix="vpcctl-tests-", dir=base) as folder:
        run_all(jobs, options, folder)
    jobs += [lost] if lost else []
    for job in jobs:
        for text in job.texts:
            if text.startswith("skipped: "):
                print(text)
    for job in jobs:
        for text in job.texts:
            if not text.startswith("skipped: "):
                print("\n==== FAILED in %s\n%s" % (job.name, text.rstrip()))
    passed, failed = sum(job.passed for job in jobs), sum(job.failed for job in jobs)
    points = sum(job.points for job in jobs)
    skipped = sum(job.skipped for job in jobs)
    if not passed and not failed:
        print("nothing ran%s" % (": no test fits %r" % options.k if options.k else ""))
    print("(%.0f s, Python %s, %s)" % (time.time() - began, sys.version.split()[0],
                                      "root" if os.geteuid() == 0 else "ordinary user"))
    print("%d passed, %d failed%s%s" % (passed, failed, ", %d skipped" % skipped if skipped else "",
                                        ", %d fault points tried" % points if points else ""))
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
