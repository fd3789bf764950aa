"""Stand-ins for the `ip` and `bridge` of older systems: they refuse what those refuse, answer as those do, and let
the real ones do the rest. `install` writes them into a folder, which is then put first on PATH.

As a program: oldtools.py VERSION TOOL REAL WORDS…
"""

import os
import re
import shutil
import subprocess
import sys

TOOLS = ("ip", "bridge")
UNKNOWN = ("bcast_flood", "locked")               # both came with 5.18
SCRIPT = '#!/bin/sh\nexec "%s" -IS "%s" %s %s "%s" "$@"\n'


def install(folder, version):
    """Write the stand-ins of iproute2 4.20 or 5.5 into a folder."""
    for tool in TOOLS:
        path = os.path.join(folder, tool)
        real = shutil.which(tool, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
        with open(path, "w") as handle:
            handle.write(SCRIPT % (sys.executable, os.path.realpath(__file__), version, tool, real))
        os.chmod(path, 0o755)


def refused(tool, words):
    """What the old tool says of a command that it does not know, or an empty text."""
    for word in UNKNOWN:
        if word in words and tool == "ip" and "bridge_slave" in words:
            return 'bridge_slave: unknown option "%s"?\nUsage: ... bridge_slave [ fdb_flush ]\n' % word
        if word in words and tool == "bridge" and words[:2] == ["link", "set"]:
            return "Command line is not complete. Try option \"help\"\n"
    return ""


def unheard_of(words, new):
    """What ip 4.20 says of an interface that was made since its batch began, or an empty text."""
    for name in new:
        if name in words and words[:2] != ["link", "add"]:
            return 'Cannot find device "%s"\n' % name
    return ""


def batch(version, real, lines):
    """Run a batch up to the first line that the old `ip` refuses."""
    good, said, new = [], "", set()
    for line in lines:
        words = line.split()
        said = refused("ip", words) or (unheard_of(words, new) if version == "4.20" else "")
        if said:
            break
        if words[:2] == ["link", "add"]:
            new.add(words[2])
            if "peer" in words:
                new.add(words[words.index("peer") + 2])
        good.append(line)
    child = subprocess.Popen([real, "-batch", "-"], stdin=subprocess.PIPE)
    child.communicate("".join(good).encode())
    if said and not child.returncode:
        sys.stderr.write(said + "Command failed -:%d\n" % (len(good) + 1))
    return child.returncode or (1 if said else 0)


def as_then(version, answer):
    """JSON as the old tool prints it."""
    answer = re.sub(r',"(bcast_flood|locked|mab)":(true|false)', "", answer)
    if version == "4.20":
        answer = re.sub(r'\{"type":"(\w+)","dst"', r'{"\1","dst"', answer)
        answer = re.sub(r'"action":"(unreachable|blackhole)"', r'"to_tbl":"\1"', answer)
    return answer


def main(version, tool, real, *words):
    """Be the old tool -> exit code."""
    words = list(words)
    if words == ["-V"]:
        print("%s utility, iproute2-ss%s" % (tool, {"4.20": "190107", "5.5": "200127"}[version]))
        return 0
    if tool == "ip" and "-batch" in words:
        return batch(version, real, sys.stdin.readlines())
    said = refused(tool, words)
    if said:
        sys.stderr.write(said)
        return 255
    if "-j" in words:
        child = subprocess.Popen([real] + words, stdout=subprocess.PIPE)
        sys.stdout.write(as_then(version, child.communicate()[0].decode()))
        return child.returncode
    os.execv(real, [real] + words)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
