"""The watchdogs of a job's hosts in touch: each tells that of rank 0's host how its ranks are, and hears from it.

Standard library alone. TCP, one JSON object a line. Each line carries an HMAC-SHA256 over a number of this connection,
who speaks, the line's number and its text, with a token that only the job's ranks know: a stranger can neither end a
job nor speak for a host. Nothing is secret in what is said.

A state says: `stop` (why the job is to stop, or null), `verdict` (why the job ends, or null), `waiting` (its ranks, all
of which wait for others, or null), `ended` (exit codes, once all ranks are through, or null).
"""

import hmac
import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.watch.judge import EXIT_STOPPED, FOUND

BEAT_SECONDS = 1.0  # between two states that say the same
APART_SECONDS = 10.0  # after a connection was closed and did not come back
LAST_SECONDS = 3.0  # that a host which has ended waits for one that was never heard
HELLO_SECONDS = 5.0  # in which a new connection shows that it knows the token
LONGEST = 1 << 16  # bytes of a line, and of what waits to be sent


class Wire:
    """One connection, never waited for. `mine` and `theirs` tell the two directions apart."""

    def __init__(self, connection: socket.socket, token: bytes, mine: bytes, theirs: bytes, nonce: bytes = b"") -> None:
        connection.setblocking(False)
        self.open = True
        self.age = 0.0
        self._socket, self._token, self._names, self._nonce = connection, token, (mine, theirs), nonce
        self._in, self._out = b"", nonce + b"\n" if nonce else b""
        self._counts = [0, 0]  # lines sent, received

    @property
    def greeted(self) -> bool:
        """Whether states can be sent."""
        return bool(self._nonce)

    @property
    def fresh(self) -> bool:
        """Whether nothing was said yet."""
        return self._counts[0] == 0

    def send(self, state: Mapping[str, object]) -> None:
        """Have a state sent; nothing before the other side's greeting has come."""
        if self._nonce and self.open and len(self._out) < LONGEST:
            text = json.dumps(state, separators=(",", ":")).encode()
            self._out += self._mac(0, text) + b" " + text + b"\n"
            self._counts[0] += 1
        self._flush()

    def receive(self) -> list[dict]:
        """The states that have come. The connection is closed at its end and at the first line that is not genuine."""
        self._flush()
        try:
            while self.open and len(self._in) < LONGEST:
                data = self._socket.recv(LONGEST)
                self.open = bool(data)
                self._in += data
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self.open = False
        *lines, self._in = self._in.split(b"\n")
        states = []
        for line in lines:
            if not self._nonce:
                self._nonce = line
                continue
            mac, _, text = line.partition(b" ")
            if not hmac.compare_digest(mac, self._mac(1, text)):
                self.close()
                break
            self._counts[1] += 1
            states.append(json.loads(text))
        if len(self._in) >= LONGEST:
            self.close()
        return states

    def last_words(self, state: Mapping[str, object]) -> None:
        """Send a state and wait for it to leave, then close."""
        self.send(state)
        with suppress(OSError):
            self._socket.settimeout(1.0)
            self._socket.sendall(self._out)
        self.close()

    def close(self) -> None:
        self.open = False
        self._socket.close()

    def _flush(self) -> None:
        try:
            while self.open and self._out:
                self._out = self._out[self._socket.send(self._out) :]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self.open = False

    def _mac(self, direction: int, text: bytes) -> bytes:
        number = str(self._counts[direction]).encode()
        signed = b"\n".join((self._nonce, self._names[direction], number, text))
        return hmac.new(self._token, signed, "sha256").hexdigest().encode()


@dataclass
class Peer:
    """Another host's watchdog. Times are seconds as this watchdog lived through them."""

    name: str  # the host and its ranks
    wire: Wire | None = None
    says: dict = field(default_factory=dict)  # empty: never heard
    silent_for: float = 0.0
    apart_for: float = 0.0  # without a connection
    ended_for: float = 0.0

    @property
    def ended(self) -> bool:
        return self.says.get("ended") is not None

    def live(self, seconds: float) -> None:
        """Time passes; take in what has come."""
        self.silent_for += seconds
        self.ended_for = self.ended_for + seconds if self.ended else 0.0
        if self.wire is not None:
            self.wire.age += seconds
            for state in self.wire.receive():
                self.says, self.silent_for = state, 0.0
            if not self.wire.greeted and self.wire.age > HELLO_SECONDS:
                self.wire.close()
            if not self.wire.open:
                self.wire.close()
                self.wire = None
        together = self.wire is not None and self.wire.greeted
        self.apart_for = 0.0 if together else self.apart_for + seconds

    def fault(self, limit: float | None, grace: float) -> str | None:
        """Why the job cannot go on because of this host, if it cannot."""
        if self.ended:
            failed = [code for code in self.says["ended"] if code not in (0, EXIT_STOPPED)]
            if failed and self.ended_for >= grace:
                return f"host {self.name} ended with exit code {failed[0]} and the others did not follow"
        elif self.says and limit is not None:
            patience = FOUND * limit
            if self.silent_for >= patience or self.apart_for >= min(APART_SECONDS, patience):
                return f"host {self.name} is cut off or gone, last heard {self.silent_for:.0f} s ago"
        return None


class Link:
    """This host's end. `record` is what `join_watchdogs` wrote: token, hosts (name and ranks of each), own (this one's
    number) and, but for rank 0's host, address and port.
    """

    def __init__(self, record: dict, folder: Path) -> None:
        self._token = record["token"].encode()
        self._own = record["own"]
        self._beat, self._sent = BEAT_SECONDS, {}
        self._hello: list[Wire] = []
        names = dict(enumerate(record["hosts"]))
        if self._own == 0:
            names.pop(0)
            self._server, port = _listen()
            (folder / "port.new").write_text(str(port))
            os.replace(folder / "port.new", folder / "port")
        else:
            names = {0: names[0]}
            self._server = None
            self._address = (record["address"], record["port"])
            self._resolved: tuple | None = None
        self.peers = {number: Peer(name) for number, name in names.items()}

    def tick(self, seconds: float, state: dict) -> None:
        """Say how this host is, hear how the others are. Waits for nothing."""
        if self._server is not None:
            self._accept(seconds)
        self._beat += seconds
        due = self._beat >= BEAT_SECONDS or state != self._sent
        if due:
            self._beat, self._sent = 0.0, dict(state)
        for peer in self.peers.values():
            if due and peer.wire is None and self._server is None and not peer.ended:
                peer.wire = self._connect()
            peer.live(seconds)
            if peer.wire is not None and (due or peer.wire.fresh):
                peer.wire.send(state | {"host": self._own})

    def close(self, state: dict) -> None:
        """Say the last, also to those who have not been heard yet: a rank may fail before the hosts are in touch."""
        end = time.monotonic() + LAST_SECONDS
        while time.monotonic() < end and not all(peer.says for peer in self.peers.values()):
            time.sleep(0.05)
            self.tick(0.05, state)
        for peer in self.peers.values():
            if peer.wire is not None:
                peer.wire.last_words(state | {"host": self._own})
        for wire in self._hello:
            wire.close()
        if self._server is not None:
            self._server.close()

    @property
    def stop(self) -> str | None:
        """Why the job is to stop, as another host says."""
        return next((peer.says["stop"] for peer in self.peers.values() if peer.says.get("stop")), None)

    @property
    def verdict(self) -> str | None:
        """Why the job ends, as another host says."""
        return next((peer.says["verdict"] for peer in self.peers.values() if peer.says.get("verdict")), None)

    def fault(self, limit: float | None, grace: float) -> str | None:
        """Why the job cannot go on because of another host."""
        found = [fault for peer in self.peers.values() if (fault := peer.fault(limit, grace)) is not None]
        return f"{'; '.join(found)}; the job ends, the same command continues it" if found else None

    def all_waiting(self, own: list[dict]) -> list[dict] | None:
        """The ranks of all hosts, if all of them wait for others, or have ended; known on rank 0's host."""
        others = [peer for peer in self.peers.values() if not peer.ended]
        if self._own != 0 or not all(peer.says.get("waiting") for peer in others):
            return None
        return [*own, *(rank for peer in others for rank in peer.says["waiting"])]

    def _accept(self, seconds: float) -> None:
        with suppress(OSError):
            while len(self._hello) < 16 + len(self.peers):
                connection, _ = self._server.accept()
                self._hello.append(Wire(connection, self._token, b"hub", b"host", secrets.token_hex(16).encode()))
        for wire in list(self._hello):
            wire.age += seconds
            states = wire.receive()
            peer = self.peers.get(states[-1].get("host")) if states else None
            if peer is not None:
                if peer.wire is not None:
                    peer.wire.close()
                peer.wire, peer.says, peer.silent_for = wire, states[-1], 0.0
                wire.send(self._sent | {"host": self._own})
            if peer is not None or not wire.open or wire.age > HELLO_SECONDS:
                self._hello.remove(wire)
                if peer is None:
                    wire.close()

    def _connect(self) -> Wire | None:
        with suppress(OSError):
            if self._resolved is None:
                self._resolved = socket.getaddrinfo(*self._address, type=socket.SOCK_STREAM)[0]
            family, kind, protocol, _, address = self._resolved
            connection = socket.socket(family, kind, protocol)
            connection.setblocking(False)
            connection.connect_ex(address)
            return Wire(connection, self._token, b"host", b"hub")
        return None


def _listen() -> tuple[socket.socket, int]:
    """A server on every address of this host, and its port."""
    if socket.has_dualstack_ipv6():
        server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        server = socket.create_server(("", 0))
    server.setblocking(False)
    return server, server.getsockname()[1]
