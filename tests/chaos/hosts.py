"""Three hosts in network namespaces of this machine, joined by a switch of our own (man 8 ip-netns).

The switch reads every packet that a host sends and hands it on, unless it is told to lose or to delay some: tc-netem
does the same, where the kernel has it.
"""

import fcntl
import heapq
import os
import random
import selectors
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

NETWORK = "10.77.0"
PORT = 6379
WAIT_S = 120
TUN = "/dev/net/tun"
RAY = Path(sys.executable).parent / "ray"


def why_not() -> str | None:
    """What is missing here for namespaces; None where nothing is."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip"):
        return "iproute2 (ip) is not installed"
    if not os.access(TUN, os.R_OK | os.W_OK):
        return f"no {TUN}"
    probe = f"metadist-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"ip netns add: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


class Switch:
    """Hands packets on between hosts by the last number of their address."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._ports: dict[int, int] = {}
        self.unplugged: set[int] = set()
        self.loss: dict[int, float] = {}
        """Of the packets that a host sends, by host: the share that is lost."""
        self.delay_s: dict[int, float] = {}
        self.lost = self.delayed = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="switch")

    def plug_in(self, host: int, device: str) -> None:
        """Makes the network device whose packets are a host's; it lives as long as the switch."""
        port = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
        # TUNSETIFF with IFF_TUN | IFF_NO_PI (linux/if_tun.h): IP packets, and nothing before them.
        fcntl.ioctl(port, 0x400454CA, struct.pack("16sH", device.encode(), 0x0001 | 0x1000))
        self._ports[host] = port

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        for port in self._ports.values():
            os.close(port)

    def _run(self) -> None:
        waiting: list[tuple[float, int, bytes]] = []
        with selectors.DefaultSelector() as selector:
            for host, port in self._ports.items():
                selector.register(port, selectors.EVENT_READ, host)
            while not self._ended.is_set():
                pause = max(0.0, min(0.1, waiting[0][0] - time.monotonic() if waiting else 0.1))
                for key, _ in selector.select(pause):
                    self._take(key.data, os.read(key.fd, 65536), waiting)
                while waiting and waiting[0][0] <= time.monotonic():
                    self._hand_on(heapq.heappop(waiting)[2])

    def _take(self, host: int, packet: bytes, waiting: list[tuple[float, int, bytes]]) -> None:
        if host in self.unplugged or self._random.random() < self.loss.get(host, 0.0):
            self.lost += 1
        elif host in self.delay_s:
            self.delayed += 1
            heapq.heappush(waiting, (time.monotonic() + self.delay_s[host], self.delayed, packet))
        else:
            self._hand_on(packet)

    def _hand_on(self, packet: bytes) -> None:
        # Byte 19 of an IPv4 header is the last one of its destination.
        to = packet[19] if packet[0] >> 4 == 4 else None
        if to in self._ports and to not in self.unplugged:
            try:
                os.write(self._ports[to], packet)
            except OSError:
                self.lost += 1  # The host is full, or gone.


class Hosts:
    """Numbered from 1; the first runs Ray's head. Each has an address of its own, and sees the others by the switch."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._prefix = f"md{os.getpid()}"
        self.switch = Switch()

    def address(self, host: int) -> str:
        return f"{NETWORK}.{host}"

    def command(self, host: int, *command: str) -> list[str]:
        """A command line that runs within a host."""
        return ["ip", "netns", "exec", f"{self._prefix}h{host}", *command]

    @contextmanager
    def up(self, count: int) -> Iterator[None]:
        """So many hosts, with Ray on each of them."""
        with ExitStack() as stack:
            for host in range(1, count + 1):
                place, device = self._namespace(stack, f"h{host}"), f"{self._prefix}p{host}"
                self.switch.plug_in(host, device)
                _run("ip", "link", "set", device, "netns", place)
                _run("ip", "-n", place, "addr", "add", f"{self.address(host)}/24", "dev", device)
                for name in ("lo", device):
                    _run("ip", "-n", place, "link", "set", name, "up")
            stack.callback(self.switch.end)
            self.switch.start()
            # A short path: Ray's sockets lie there, and their names may have 107 characters.
            session = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True))
            head = ["--head", f"--port={PORT}", f"--temp-dir={session}", "--include-dashboard=false"]
            self._start_ray(stack, 1, head)
            for host in range(2, count + 1):
                self._start_ray(stack, host, [f"--address={self.address(1)}:{PORT}"])
            yield

    def _namespace(self, stack: ExitStack, name: str) -> str:
        full = self._prefix + name
        _run("ip", "netns", "add", full)
        stack.callback(_run, "ip", "netns", "del", full)
        return full

    def _start_ray(self, stack: ExitStack, host: int, arguments: list[str]) -> None:
        # With --block, so that ending this one process ends this node and no other Ray of the machine.
        common = ["start", "--block", "--num-cpus=1", f"--node-ip-address={self.address(host)}"]
        process = subprocess.Popen(
            self.command(host, str(RAY), *common, *arguments),
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        stack.callback(_end, process)
        deadline = time.monotonic() + WAIT_S
        assert process.stdout is not None
        for line in process.stdout:
            if "Ray runtime started" in line:
                return
            assert time.monotonic() < deadline, f"Ray did not start on host {host}"
        raise AssertionError(f"Ray ended on host {host}")


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
