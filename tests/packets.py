"""Packets by hand for the attack tests: many probes at once, frames that no honest stack sends, ears on a wire."""

import contextlib
import errno
import os
import select
import socket
import struct
import threading
import time

from support import LONG, checksum, entered, listener, run, socket_in

TCP, UDP, ICMP = 6, 17, 1
GRACE = 0.25      # for a last packet behind the last awaited one
BROADCAST = "ff:ff:ff:ff:ff:ff"


# ---- many probes at once ----

class Probe:
    """One attempt: from a namespace (name, pid or None) by tcp, udp or icmp; `ok` says whether it should get through."""

    def __init__(self, ok, ns, protocol, target, port=7, source=None):
        self.ok, self.ns, self.protocol, self.target, self.port = ok, ns, protocol, target, port
        self.source, self.sock, self.answer, self.ident = source, None, None, 0

    def __str__(self):
        return "%s: %s %s:%s%s -> %s, expected %s" % (
            self.ns, self.protocol, self.target, self.port, " as " + self.source if self.source else "",
            self.answer, "open" if self.ok else "nothing")

    def start(self):
        """Send the first packet."""
        try:
            if self.protocol == "icmp":
                self.sock = socket_in(self.ns, socket.SOCK_RAW, socket.IPPROTO_ICMP)
                self.ident = id(self) >> 4 & 0xffff
                self.sock.setblocking(False)
                self.sock.sendto(echo_request(self.ident), (self.target, 0))
                return
            self.sock = socket_in(self.ns, socket.SOCK_STREAM if self.protocol == "tcp" else socket.SOCK_DGRAM)
            self.sock.setblocking(False)
            if self.source:
                self.sock.bind((self.source, 0))
            try:
                self.sock.connect((self.target, self.port))
            except BlockingIOError:
                pass
            if self.protocol == "udp":
                self.sock.send(b"hello\n")
        except OSError as error:
            self.answer = errno.errorcode.get(error.errno, str(error))

    def look(self):
        """Something came: what?"""
        try:
            if self.protocol == "tcp":
                code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                self.answer = errno.errorcode[code] if code else "open"
                return
            data, sender = self.sock.recvfrom(2048)
            if self.protocol == "udp":
                self.answer = "open"
                return
            body = data[(data[0] & 15) * 4:]
            if body[0] == 0 and struct.unpack("!H", body[4:6])[0] == self.ident and sender[0] == self.target:
                self.answer = "open"
        except BlockingIOError:
            return
        except OSError as error:
            self.answer = errno.errorcode.get(error.errno, str(error))


def echo_request(ident, kind=8, data=b"v" * 24):
    """Return an ICMP packet that asks for an echo."""
    body = struct.pack("!BBHHH", kind, 0, 0, ident, 1) + data
    return body[:2] + struct.pack("!H", checksum(body)) + body[4:]


def fire(probes, grace=GRACE, patience=LONG):
    """Send all probes, those that should get through last, and fill in the answers.

    Waits until each that should be open has answered (or `patience` passes), then a moment longer for the others:
    they were sent before, so whatever would have got through is there by then.
    """
    for probe in sorted(probes, key=lambda probe: probe.ok):
        probe.start()
    end, last = time.time() + patience, None
    while True:
        waiting = [probe for probe in probes if probe.answer is None]
        if not any(probe.ok for probe in waiting) and last is None:
            last = end = time.time() + grace
        if not waiting or time.time() >= end:
            break
        readers = [probe.sock for probe in waiting if probe.protocol != "tcp"]
        writers = [probe.sock for probe in waiting if probe.protocol == "tcp"]
        ready = sum(select.select(readers, writers, [], max(0, end - time.time()))[:2], [])
        for probe in waiting:
            if probe.sock in ready:
                probe.look()
    for probe in probes:
        if probe.sock:
            probe.sock.close()
    return probes


def check(test, probes, what=""):
    """Fire the probes and fail with every one whose answer is not the expected one."""
    wrong = [str(probe) for probe in fire(probes) if (probe.answer == "open") != probe.ok]
    if wrong:      # a loaded machine may lose the race of a control once; a hole stays open
        again = [Probe(probe.ok, probe.ns, probe.protocol, probe.target, probe.port, probe.source)
                 for probe in probes]
        holes = [probe for probe in probes if not probe.ok and probe.answer == "open"]
        wrong = [str(probe) for probe in holes] + [
            str(probe) for probe in fire(again) if (probe.answer == "open") != probe.ok]
    test.assertEqual(wrong, [], "%s\n%s" % (what, "\n".join(wrong)))


def ways(ok, ns, target, port=7):
    """Return a probe for each of tcp, udp and icmp."""
    return [Probe(ok, ns, protocol, target, port) for protocol in ("tcp", "udp", "icmp")]


@contextlib.contextmanager
def echoing(*places, **options):
    """Echo servers on tcp and udp in each namespace meanwhile; yields (namespace, kind) -> addresses of clients."""
    port = options.get("port", 7)
    with contextlib.ExitStack() as stack:
        yield {(ns, kind): stack.enter_context(listener(ns, port, kind=kind))
               for ns in places for kind in ("tcp", "udp")}


# ---- frames ----

def mac_bytes(mac):
    """A hardware address as bytes."""
    return bytes(int(part, 16) for part in mac.split(":"))


def ether(dst, src, payload, kind=0x0800):
    """An Ethernet frame."""
    return mac_bytes(dst) + mac_bytes(src) + struct.pack("!H", kind) + payload


def ipv4(src, dst, protocol, payload, ident=0x1234, fragment=0, options=b"", ttl=64):
    """An IPv4 packet; `fragment` is the field of flags and offset."""
    words = 5 + len(options) // 4
    head = struct.pack("!BBHHHBBH4s4s", 0x40 | words, 0, words * 4 + len(payload), ident, fragment, ttl, protocol, 0,
                       socket.inet_aton(src), socket.inet_aton(dst)) + options
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def udp(src, dst, sport, dport, data, sum_offset=0):
    """A UDP datagram for between these addresses; sum_offset falsifies its checksum."""
    head = struct.pack("!HHHH", sport, dport, 8 + len(data), 0)
    pseudo = socket.inet_aton(src) + socket.inet_aton(dst) + struct.pack("!BBH", 0, UDP, len(head + data))
    total = (checksum(pseudo + head + data) + sum_offset) & 0xffff or 0xffff
    return head[:6] + struct.pack("!H", total) + data


def tcp(src, dst, sport, dport, flags, data=b"", seq=1000, ack=0):
    """A TCP segment for between these addresses; flags: FIN 1, SYN 2, RST 4, PSH 8, ACK 16, URG 32."""
    head = struct.pack("!HHIIBBHHH", sport, dport, seq, ack, 0x50, flags, 65535, 0, 0)
    pseudo = socket.inet_aton(src) + socket.inet_aton(dst) + struct.pack("!BBH", 0, TCP, len(head + data))
    total = checksum(pseudo + head + data)
    return head[:16] + struct.pack("!H", total) + head[18:] + data


def datagram(src, dst, token, sport=4000, dport=7):
    """A whole IPv4 packet with a UDP datagram that carries a token."""
    return ipv4(src, dst, UDP, udp(src, dst, sport, dport, token))


def arp(operation, sender_mac, sender_ip, target_mac, target_ip):
    """An ARP message (1 asks, 2 answers), without its frame; padded, so that a token can be told from others."""
    return struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation) + mac_bytes(sender_mac) + socket.inet_aton(
        sender_ip) + mac_bytes(target_mac) + socket.inet_aton(target_ip)


def send_frames(ns, device, frames):
    """Put frames on a wire, as root in the namespace can."""
    with contextlib.closing(socket_in(ns, socket.SOCK_RAW, 0, socket.AF_PACKET)) as sock:
        sock.bind((device, 0))
        for frame in frames:
            sock.send(frame)


class Ear:
    """Hears every frame that arrives on a device of a namespace (before any firewall), until the block ends."""

    def __init__(self, ns, device, outgoing=False):
        self.ns, self.device, self.outgoing, self.frames = ns, device, outgoing, []

    def __enter__(self):
        self.sock = socket_in(self.ns, socket.SOCK_RAW, 0, socket.AF_PACKET)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self.sock.bind((self.device, 3))      # ETH_P_ALL
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()
        return self

    def _listen(self):
        while not self.stop.is_set():
            if not select.select([self.sock], [], [], 0.05)[0]:
                continue
            data, where = self.sock.recvfrom(65536)
            if self.outgoing or where[2] != 4:      # PACKET_OUTGOING
                self.frames.append(data)

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()
        self.sock.close()

    def heard(self, token):
        """How many frames hold these bytes."""
        return sum(token in frame for frame in list(self.frames))

    def wait(self, token, seconds=LONG):
        """Wait for a frame with these bytes; whether it came."""
        end = time.time() + seconds
        while not self.heard(token):
            if time.time() > end:
                return False
            time.sleep(0.01)
        return True


# ---- the machine ----

def settle(*argv):
    """Run a command that has to work."""
    result = run(list(argv))
    if result.code:
        raise AssertionError(str(result))
    return result.out


def switch(key, value=None):
    """Read or (with a value) write a kernel switch here: a path below /proc/sys."""
    path = "/proc/sys/" + key
    if value is None:
        with open(path) as handle:
            return handle.read().strip()
    with open(path, "w") as handle:
        handle.write(str(value))


def switch_in(ns, key, value):
    """Write a kernel switch in a namespace: /proc/sys/net is that of the thread that opens it."""
    with entered(ns):
        switch(key, value)


def counter(device, name):
    """A statistics counter of a device here."""
    with open("/sys/class/net/%s/statistics/%s" % (device, name)) as handle:
        return int(handle.read())


def mac_of(device, ns=None):
    """The hardware address of a device."""
    words = settle(*(["ip"] + (["-n", ns] if ns else []) + ["link", "show", device])).split()
    return words[words.index("link/ether") + 1]


def neighbour_net(name, address, host_address, length="24"):
    """Make a namespace beside the host, on a network of its own; returns its device on the host's side."""
    device = name + "0"
    settle("ip", "netns", "add", name)
    settle("ip", "link", "add", device, "type", "veth", "peer", "name", "eth0", "netns", name)
    settle("ip", "address", "add", "%s/%s" % (host_address, length), "dev", device)
    settle("ip", "link", "set", device, "up")
    for words in ("link set lo up", "address add %s/%s dev eth0" % (address, length), "link set eth0 up",
                  "route add default via %s" % host_address):
        settle(*(["ip", "-n", name] + words.split()))
    return device


def no_file(path):
    """Whether there is no such file."""
    return not os.path.lexists(path)
