"""Between two hosts: which address the collectives use, whether TCP passes, and how far apart the clocks are."""

import contextlib
import os
import secrets
import socket
import struct
import threading
import time
from dataclasses import dataclass

import psutil

from pipeline.placement.clocks import ROUNDS, Offset, offset_of

_TIME = struct.Struct("!d")


@dataclass(frozen=True)
class Address:
    """What a communication library binds to on this host, and how it came to choose it."""

    address: str
    chosen_by: str
    problem: str | None = None  # why it cannot work between hosts


def backend_address(library: str, towards: str) -> Address:
    """The address of `library` (gloo, nccl or another name) on this host.

    gloo takes GLOO_SOCKET_IFNAME's interface, else what the host's own name resolves to; nccl takes the interfaces of
    NCCL_SOCKET_IFNAME, else (an approximation of its search) the one on the way `towards` rank 0.
    """
    variable = f"{library.upper()}_SOCKET_IFNAME"
    wanted = os.environ.get(variable, "")
    interfaces = _addresses()
    if wanted:
        name = _matching(wanted, list(interfaces)) if library == "nccl" else wanted.split(",")[0]
        if name not in interfaces:
            there = ", ".join(sorted(interfaces)) or "none with an address"
            return Address("", variable, f"{variable}={wanted}: this host has no such interface; it has {there}")
        return Address(interfaces[name], f"{variable}={wanted}")
    if library == "gloo":
        try:
            return Address(socket.gethostbyname(socket.gethostname()), "host name")
        except OSError:
            problem = f"its own name {socket.gethostname()} is unknown to it; set {variable} or add it to /etc/hosts"
            return Address("", "host name", problem)
    return Address(_towards(towards), "route")


def is_loopback(address: str) -> bool:
    """Whether an address means its own host only."""
    return address.startswith("127.") or address == "::1"


def _addresses() -> dict[str, str]:
    """Interface -> its first address, IPv4 preferred; those without one left out."""
    found: dict[str, str] = {}
    for family in (socket.AF_INET, socket.AF_INET6):
        for name, addresses in psutil.net_if_addrs().items():
            for entry in addresses:
                if entry.family == family:
                    found.setdefault(name, entry.address)
    return found


def _matching(wanted: str, names: list[str]) -> str | None:
    """The first interface that a pattern of NCCL's allows: `eth`, `=eth0`, `^docker,lo`."""
    exact, excluded = wanted.startswith(("=", "^=")), wanted.startswith("^")
    parts = wanted.lstrip("^=").split(",")
    for name in names:
        hit = name in parts if exact else any(name.startswith(part) for part in parts)
        if hit != excluded and (name != "lo" or not excluded):
            return name
    return None


def _towards(address: str) -> str:
    """This host's address on the way to another one; nothing is sent."""
    with contextlib.suppress(OSError):
        info = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(info[0], socket.SOCK_DGRAM) as probe:
            probe.connect(info[4])
            return probe.getsockname()[0]
    return "127.0.0.1"


class Echo:
    """A listener on one address that answers every byte with this host's time."""

    def __init__(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._server = socket.create_server((address, 0), family=family)
        self.address, self.port = address, self._server.getsockname()[1]
        self.secret = secrets.token_hex(8)  # a caller that does not know it gets no answer
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Listen no more."""
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(caller,), daemon=True).start()

    def _answer(self, caller: socket.socket) -> None:
        with caller, contextlib.suppress(OSError):
            caller.settimeout(10)
            caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if _exactly(caller, len(self.secret)) != self.secret.encode():
                return
            while caller.recv(1):
                caller.sendall(_TIME.pack(time.time()))


@dataclass(frozen=True)
class Call:
    """What came of calling another host's `Echo`."""

    seconds: float | None = None  # until connected; None: not within the limit
    offset: Offset | None = None  # of our clock against the other's
    problem: str = ""


def call(source: str, target: str, port: int, secret: str, limit: float) -> Call:
    """Connect from an address of this host to another host's `Echo` and compare the clocks, in `limit` seconds."""
    begin = time.monotonic()
    try:
        with socket.create_connection((target, port), timeout=limit, source_address=(source, 0)) as line:
            seconds = time.monotonic() - begin
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            line.sendall(secret.encode())
            trips = []
            for _ in range(ROUNDS):
                sent = time.time()
                line.sendall(b"t")
                there = _TIME.unpack(_exactly(line, _TIME.size))[0]
                trips.append((sent, there, time.time()))
            return Call(seconds, offset_of(trips))
    except TimeoutError:
        return Call(problem=f"no answer in {limit:g} s")
    except OSError as error:
        return Call(problem=error.strerror or str(error))


def _exactly(line: socket.socket, number: int) -> bytes:
    data = b""
    while len(data) < number:
        piece = line.recv(number - len(data))
        if not piece:
            raise ConnectionResetError(0, "the other side closed the connection")
        data += piece
    return data
