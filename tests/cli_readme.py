"""The README agrees with the program: its table of commands, its JSON, its picture, what it says of the kernel.

    python3 tests/cli_readme.py      prints the table of commands as the README must have it
"""

import json
import os
import re
import sys
import unittest
import xml.etree.ElementTree

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
sys.dont_write_bytecode = True

import vpcctl  # noqa: E402

# What the section on troubleshooting quotes.
MESSAGES = ("this needs root: it works on the machine's network", "Cannot find required command: ", " exists already with ",
            "only: no other subnet reaches it", "ending process ",
            " in namespace ", " is in use already in ", "record unreadable: vpcctl delete --force ", "down: vpcctl restore",
            "this machine does not let ordinary users make namespaces")
README = os.path.join(os.path.dirname(HERE), "README.md")


def row(name):
    """The line of a command in the README's table."""
    cells = "`%s`" % vpcctl.synopsis(name).replace("\u2026", "..."), vpcctl.COMMANDS[name]["handler"].__doc__.strip()
    return "| %s |" % " | ".join(cell.replace("|", "\\|") for cell in cells)


def table():
    """The README's table of commands."""
    return ["| Command | What it does |", "|---|---|"] + [
        row(name) for name, entry in vpcctl.COMMANDS.items() if not entry["hidden"]]


class ReadmeTest(unittest.TestCase):
    maxDiff = None

    @classmethod
    def setUpClass(cls):
        with open(README, encoding="utf-8") as handle:
            cls.text = handle.read()
        cls.lines = cls.text.splitlines()

    def blocks(self, language):
        return re.findall(r"(?ms)^```%s\n(.*?)^```$" % language, self.text)

    def test_every_command_stands_in_the_table(self):
        wanted = table()
        start = self.lines.index(wanted[0])
        found = self.lines[start:start + len(wanted)]
        self.assertEqual(found, wanted, "python3 tests/cli_readme.py prints the table")
        self.assertFalse(self.lines[start + len(wanted)].startswith("|"), "a command that is no more")

    def test_commands_in_the_text_exist(self):
        """What is written as `vpcctl NAME ...` or typed in a session parses as far as the command's name."""
        typed = re.findall(r"(?:`|\$ |sudo |&& )(?:\./)?vpcctl(?:\.py)? ((?:--?[a-z-]+ )*)([a-z][a-z-]+)", self.text)
        names = {name for _, name in typed}
        self.assertGreater(len(names), 10)
        self.assertEqual(sorted(names - set(vpcctl.COMMANDS)), [])

    def test_json_is_accepted(self):
        kinds = set()
        for text in self.blocks("json"):
            value = json.loads(text)
            if "vpcs" in value:
                vpcctl.check_topology(value, "README.md")
                kinds.add("topology")
            else:
                self.assertIsInstance(value.pop("subnet"), str)
                vpcctl.check_policy(value, "README.md")
                kinds.add("policy")
        self.assertEqual(kinds, {"policy", "topology"})

    def test_global_options(self):
        for flags, _ in vpcctl.GLOBAL_OPTIONS:
            self.assertIn("`%s" % flags[0], self.text)

    def test_kernel_numbers(self):
        prefs = [int(value) for key, value in vars(vpcctl).items() if key.startswith("PREF_")]
        self.assertIn("7001 to %d" % max(prefs), self.text)
        self.assertEqual((min(prefs), vpcctl.FIRST_TABLE, vpcctl.FENCE_TABLE, vpcctl.PROTOCOL), (7001, 7001, "7000", "118"))
        self.assertIn("protocol %s" % vpcctl.PROTOCOL, self.text)

    def test_messages_are_the_programs_own(self):
        with open(vpcctl.__file__, encoding="utf-8") as handle:
            source = re.sub(r'"\s*\n\s*"', "", handle.read())
        for message in MESSAGES:
            self.assertIn(message, source)
            self.assertIn(message, self.text)

    def test_tests_it_names_are_there(self):
        """What a table gives as its proof: `e2e_module.Class`, `e2e_module`, `test_name`."""
        source = {}
        for name in os.listdir(HERE):
            if re.match(r"(unit|cli|e2e|faults)_\w+\.py\Z", name):
                with open(os.path.join(HERE, name), encoding="utf-8") as handle:
                    source[name[:-3]] = handle.read()
        rows = "\n".join(line for line in self.lines if line.startswith("|"))
        named = re.findall(r"`((?:unit|cli|e2e|faults)_\w+)(?:\.(\w+))?(?:\.(\w+))?`", rows)
        for module, case, method in named:
            self.assertIn("class %s(" % case if case else "class ", source.get(module, ""), module)
            self.assertIn("def %s(" % method if method else "", source[module])
        methods = re.findall(r"`(test_\w+)`", rows)
        everything = "\n".join(source.values())
        self.assertEqual([name for name in methods if "def %s(" % name not in everything], [])
        self.assertGreater(len(methods), 10)

    def test_files_it_speaks_of_are_there(self):
        top = os.path.dirname(README)
        paths = set(re.findall(r"(?:tests|policies)/[\w/.-]+\w", self.text)) | {"LICENSE"}
        self.assertIn("tests/data/three-vpcs.svg", paths)
        self.assertEqual([path for path in paths if not os.path.exists(os.path.join(top, path))], [])
        xml.etree.ElementTree.parse(os.path.join(top, "tests/data/three-vpcs.svg"))

    def test_plain_characters(self):
        odd = sorted({letter for letter in self.text if ord(letter) > 126} - set("\u2713\u2717"))
        self.assertEqual(odd, [])


if __name__ == "__main__":
    print("\n".join(table()))
