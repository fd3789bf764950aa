"""What iptables makes of rules, told apart from vpcctl: a small reader of rules, strict, with iptables' own numbers."""

import re
from functools import lru_cache

BUILTIN = {"ingress": "INPUT", "egress": "OUTPUT"}
OTHER = "132"     # SCTP: no rule can name it


def number(text):
    """A number as iptables reads it: octal with a leading zero. ValueError for what it would not take."""
    if not re.match(r"[0-9]+\Z", text):
        raise ValueError("iptables takes no %r" % text)
    return int(text, 8) if re.match("0.", text) else int(text)


@lru_cache(None)
def address(text):
    """An address as a number."""
    parts = [number(part) for part in text.split(".")]
    if len(parts) != 4 or max(parts) > 255:
        raise ValueError("iptables takes no %r" % text)
    return int.from_bytes(bytes(parts), "big")


def in_block(packet_address, block):
    """Whether an address lies in what stands behind -s or -d."""
    base, _, length = block.partition("/")
    shift = 32 - (number(length) if length else 32)
    return address(packet_address) >> shift == address(base) >> shift


def in_ports(port, text):
    """Whether a port lies in what stands behind --sport or --dport."""
    low, _, high = text.partition(":")
    return port is not None and number(low) <= port <= number(high or low)


MATCHES = {
    "-i": lambda packet, value: packet.get("in") == value,
    "-o": lambda packet, value: packet.get("out") == value,
    "-s": lambda packet, value: in_block(packet["source"], value),
    "-d": lambda packet, value: in_block(packet["target"], value),
    "-p": lambda packet, value: packet["protocol"] == value,
    "--sport": lambda packet, value: in_ports(packet["sport"], value),
    "--dport": lambda packet, value: in_ports(packet["dport"], value),
    "--ctstate": lambda packet, value: packet["state"] in value.split(","),
    "--ctdir": lambda packet, value: packet["way"] == value,
    "--comment": lambda packet, value: True,
}


def target(words, packet):
    """Where a rule (its words behind the chain's name) sends a packet; None if it does not speak of it."""
    chosen, fits = None, True
    for option, value in zip(words[::2], words[1::2]):
        if option == "-j":
            chosen = value
        elif option != "-m":
            fits = MATCHES[option](packet, value) and fits
    if len(words) % 2 or chosen is None:
        raise ValueError("no rule: %r" % (words,))
    return chosen if fits else None


def passes(rules, chain, packet):
    """Whether rules (-A, chain, words…) let a packet through; a chain's own policy is ACCEPT."""
    for rule in rules:
        found = target(rule[2:], packet) if rule[1] == chain else None
        if found:
            return found == "ACCEPT"
    return True


def flow_passes(rules, direction, protocol, port, own, other):
    """What rules of one subnet do with a flow between it (`own`) and `other` -> (its first packet passes, an answer
    passes)."""
    way, back = ("in", "out") if direction == "ingress" else ("out", "in")
    ends = (other, own) if direction == "ingress" else (own, other)
    protocol = OTHER if protocol == "all" else protocol
    first = {way: "eth0", "source": ends[0], "target": ends[1], "protocol": protocol, "sport": port and 40000,
             "dport": port, "state": "NEW", "way": "ORIGINAL"}
    answer = {back: "eth0", "source": ends[1], "target": ends[0], "protocol": protocol, "sport": port,
              "dport": port and 40000, "state": "ESTABLISHED", "way": "REPLY"}
    chain, against = BUILTIN[direction], BUILTIN["egress" if direction == "ingress" else "ingress"]
    return passes(rules, chain, first), passes(rules, against, answer)


def flows(policy, blocks):
    """Flows at the edges of what a policy names: (direction, protocol, port, other). `blocks`: a name's block."""
    for direction, key in (("ingress", "from"), ("egress", "to")):
        numbers, others = {1, 22, 80, 65535}, {"10.20.1.2", "192.0.2.1"}
        for rule in policy.get(direction) or ():
            for edge in str(rule.get("port", 80)).split("-"):
                numbers.update((int(edge) - 1, int(edge), int(edge) + 1))
            block = blocks.get(rule.get(key), rule.get(key, "10.0.0.0/8"))
            base, _, length = block.partition("/")
            first = int.from_bytes(bytes(map(int, base.split("."))), "big")
            for edge in (first - 1, first, first + (1 << 32 - int(length)) - 1, first + (1 << 32 - int(length))):
                others.add(".".join(map(str, (edge % (1 << 32)).to_bytes(4, "big"))))
        for other in sorted(others):
            for protocol in ("tcp", "udp"):
                for port in sorted(numbers):
                    if 1 <= port <= 65535:
                        yield direction, protocol, port, other
            yield direction, "icmp", None, other
            yield direction, "all", None, other
