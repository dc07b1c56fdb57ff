"""Hosts on one machine: network, process, mount and name spaces of their own, with an sshd each. Linux, root.

    python -m tests.cluster.cluster up FOLDER [--hosts 2]      make node1, node2, ...; they stay
    python -m tests.cluster.cluster exec FOLDER node1 COMMAND  run a command there, as a login would
    python -m tests.cluster.cluster down FOLDER                end all that runs there, remove them

A host has the address 10.77.0.<number>, a name, `eth0`, and its own processes, `/tmp`, home folder, `/dev/shm` and
`/run`; the rest of the disk, the checkout and FOLDER/shared among it, is the machine's. Root logs in from host to host
with keys that are thrown away. The hosts hang on a bridge that no other network knows, so that two clusters have the
same addresses and never meet. All lives in processes: when they are gone nothing is left but FOLDER.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).resolve().parents[2]
INIT = Path(__file__).with_name("init.sh")
TOOLS = ("ip", "unshare", "nsenter", "setpriv", "mount", "ssh", "ssh-keygen", "sshd", "pdsh")
NETWORK = "10.77.0"
ENTER = ("--net", "--mount", "--pid", "--uts", "--ipc")


def missing() -> str:
    """Why hosts cannot be made here; "" where they can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "needs root on Linux, for namespaces"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    if absent := [tool for tool in TOOLS if shutil.which(tool, path=path) is None]:
        return f"needs {', '.join(absent)} (Debian: iproute2 util-linux openssh-server openssh-client pdsh)"
    tried = subprocess.run(
        ["unshare", *ENTER, "--fork", "--mount-proc", "ip", "link", "add", "br0", "type", "bridge"], capture_output=True
    )
    return "" if tried.returncode == 0 else f"no namespaces here: {tried.stderr.decode().strip()}"


@dataclass(frozen=True)
class Host:
    """One host. `init` is its first process, as the machine numbers it."""

    name: str
    address: str
    init: int
    disk: Path  # what is its own: `tmp` and `home`

    def command(self, *arguments: object, cwd: Path = ROOT) -> list[str]:
        """A command line of the machine that runs `arguments` on this host."""
        return ["nsenter", f"--target={self.init}", *ENTER, "--", "env", f"--chdir={cwd}", *map(str, arguments)]

    def environment(self, more: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
        """What a login has, with the interpreter of this process in front."""
        path = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return {"HOME": str(self.disk / "home"), "PATH": path, "USER": "root", "SHELL": "/bin/bash", **more}

    def start(
        self, *arguments: object, environment: Mapping[str, str] = MappingProxyType({}), **options
    ) -> subprocess.Popen:
        """Start a command on this host, in the checkout, in a session of its own."""
        options = {"start_new_session": True, "stdin": subprocess.DEVNULL, **options}
        return subprocess.Popen(self.command(*arguments), env=self.environment(environment), **options)

    def run(self, *arguments: object, timeout: float = 60, **options) -> subprocess.CompletedProcess:
        """Run a command on this host to its end; what it wrote as text."""
        with self.start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except BaseException:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def processes(self) -> dict[int, list[str]]:
        """Command lines of what runs on this host, by the machine's process number; its first process left out."""
        space = os.readlink(f"/proc/{self.init}/ns/pid")
        found = {}
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{name}/cmdline").read_bytes()  # empty: ended and not yet reaped
                if int(name) != self.init and line and os.readlink(f"/proc/{name}/ns/pid") == space:
                    found[int(name)] = [part.decode(errors="replace") for part in line.split(b"\0")[:-1]]
        return found

    def pids(self, *words: str) -> list[int]:
        """Processes of this host with all of `words` in their command line, lowest number first."""
        lines = {pid: " ".join(line) for pid, line in self.processes().items()}
        return sorted(pid for pid, line in lines.items() if all(word in line for word in words))

    def kill(self) -> None:
        """End the host: all its processes at once, as when its power fails; nothing of it can be used again."""
        os.kill(self.init, signal.SIGKILL)


@dataclass(frozen=True)
class Cluster:
    """Hosts on a bridge. `switch` is the process that holds the bridge."""

    folder: Path
    hosts: tuple[Host, ...]
    switch: int

    @property
    def shared(self) -> Path:
        """A folder that all hosts see."""
        return self.folder / "shared"

    def __getitem__(self, number: int) -> Host:
        return self.hosts[number]

    def link(self, number: int, up: bool) -> None:
        """Plug a host's cable in or pull it."""
        _switch(self.switch, "ip", "link", "set", f"port{number + 1}", "up" if up else "down")

    def hostfile(self, slots: int = 1, hosts: Sequence[Host] | None = None) -> Path:
        """A hostfile of DeepSpeed's for these hosts (default: all), in the shared folder."""
        named = self.hosts if hosts is None else hosts
        path = self.shared / f"hosts-{'-'.join(host.name for host in named)}-{slots}"
        path.write_text("".join(f"{host.name} slots={slots}\n" for host in named))
        return path


def up(folder: Path, hosts: int = 2, *, stay: bool = False) -> Cluster:
    """Make hosts. They end with this process unless they are to `stay`; `down` ends them in any case.

    Raises RuntimeError with what the system said where it refuses.
    """
    folder = folder.resolve()
    down(folder)
    names = [f"node{number}" for number in range(1, hosts + 1)]
    _write_common(folder, names)
    switch = _start(["unshare", "--net", "sleep", "infinity"], stay, folder)
    made = []
    try:
        _wait(lambda: os.readlink(f"/proc/{switch.pid}/ns/net") != os.readlink("/proc/self/ns/net"), "the switch")
        _switch(switch.pid, "ip", "link", "add", "br0", "type", "bridge")
        _switch(switch.pid, "ip", "link", "set", "br0", "up")
        for number, name in enumerate(names, start=1):
            made.append(_make_host(folder, number, name, switch.pid, stay))
        cluster = Cluster(folder, tuple(made), switch.pid)
        record = {"switch": switch.pid, "hosts": [[h.name, h.address, h.init, str(h.disk)] for h in made]}
        (folder / "cluster.json").write_text(json.dumps(record))
        for host in made:
            _wait(lambda host=host: host.run("ssh", host.name, "true").returncode == 0, f"sshd of {host.name}")
    except BaseException:
        down(folder)
        raise
    return cluster


def read(folder: Path) -> Cluster:
    """The hosts that `up` made in a folder."""
    record = json.loads((folder / "cluster.json").read_text())
    hosts = tuple(Host(name, address, init, Path(disk)) for name, address, init, disk in record["hosts"])
    return Cluster(folder.resolve(), hosts, record["switch"])


def down(folder: Path) -> None:
    """End whatever was started for hosts of this folder, by this process or one that was killed; remove the folder."""
    entry = f"PERENNIAL_CLUSTER={folder.resolve()}".encode()
    end = time.monotonic() + 10
    while time.monotonic() < end:
        ours = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if entry in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                    ours.append(int(name))
        for pid in ours:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0] and not ours:
                pass
        if not ours:
            break
        time.sleep(0.05)
    if folder.exists():
        shutil.rmtree(folder)


@contextlib.contextmanager
def cluster(folder: Path, hosts: int = 2) -> Iterator[Cluster]:
    """Hosts for the time of a block; nothing of them is left, also where this process is killed in it."""
    made = up(folder, hosts)
    try:
        yield made
    finally:
        down(folder)


def _write_common(folder: Path, names: Sequence[str]) -> None:
    """Keys, and what all hosts have in /etc."""
    for below in ("etc", "shared", "disks"):
        (folder / below).mkdir(parents=True)
    folder.chmod(0o711)
    for key in ("user", "host"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", key, "-f", folder / "etc" / key)
    known = (folder / "etc" / "host.pub").read_text().split()
    addresses = [f"{NETWORK}.{number}" for number in range(1, len(names) + 1)]
    pairs = list(zip(names, addresses, strict=True))
    (folder / "etc" / "known_hosts").write_text(
        "".join(f"{name},{address} {known[0]} {known[1]}\n" for name, address in pairs)
    )
    (folder / "etc" / "hosts").write_text(
        "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in pairs)
    )
    (folder / "etc" / "resolv.conf").write_text("")


def _make_host(folder: Path, number: int, name: str, switch: int, stay: bool) -> Host:
    """Start a host's first process and plug it in."""
    disk = folder / "disks" / name
    for below in ("tmp", "home/.ssh"):
        (disk / below).mkdir(parents=True)
    (disk / "tmp").chmod(0o1777)
    (disk / "home" / ".ssh").chmod(0o700)
    (disk / "home" / ".ssh" / "config").write_text(
        f"IdentityFile {folder}/etc/user\nUserKnownHostsFile {folder}/etc/known_hosts\nLogLevel ERROR\n"
    )
    (disk / "passwd").write_text(
        "".join(
            line if not line.startswith("root:") else f"root:x:0:0:root:{disk}/home:/bin/bash\n"
            for line in Path("/etc/passwd").read_text().splitlines(keepends=True)
        )
    )
    address = f"{NETWORK}.{number}"
    (disk / "sshd_config").write_text(
        f"ListenAddress {address}\nHostKey {folder}/etc/host\nAuthorizedKeysFile {folder}/etc/user.pub\n"
        "StrictModes no\nPermitRootLogin yes\nPasswordAuthentication no\nUsePAM no\nPidFile /run/sshd.pid\n"
    )
    # what must be seen below the host's own /tmp
    kept = {path.resolve() for path in (ROOT, folder, Path(sys.prefix), Path(sys.base_prefix))}
    kept = [str(path) for path in sorted(kept) if path.is_relative_to("/tmp")]
    outer = _start(
        ["unshare", *ENTER, "--fork", "--kill-child", "--mount-proc", "sh", str(INIT), name, str(folder), *kept],
        stay,
        folder,
    )
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    _wait(lambda: children.read_text().split(), f"the first process of {name}")
    host = Host(name, address, int(children.read_text().split()[0]), disk)
    _switch(switch, "ip", "link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", outer.pid)
    _switch(switch, "ip", "link", "set", f"port{number}", "master", "br0", "up")
    enter = ["nsenter", f"--target={outer.pid}", "--net", "--"]
    _run(*enter, "ip", "address", "add", f"{address}/24", "dev", "eth0")
    _run(*enter, "ip", "link", "set", "eth0", "up")
    _run(*enter, "ip", "link", "set", "lo", "up")
    (disk / "plugged").touch()
    return host


def _start(command: Sequence[str], stay: bool, folder: Path) -> subprocess.Popen:
    """Start a process that ends with this one unless it is to stay; it can be found by its environment."""
    tied = [] if stay else ["setpriv", "--pdeathsig", "KILL"]
    marked = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    marked["PERENNIAL_CLUSTER"] = str(folder)
    return subprocess.Popen([*tied, *command], env=marked, stdin=subprocess.DEVNULL, start_new_session=True)


def _switch(switch: int, *command: object) -> None:
    _run("nsenter", f"--target={switch}", "--net", "--", *command)


def _run(*command: object) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")


def _wait(condition, what: str, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(f"{what} did not come within {seconds:g} s")
        time.sleep(0.02)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Hosts on one machine, for tests.")
    parser.add_argument("do", choices=("up", "exec", "down"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="for exec: the host, and what it is to run")
    options = parser.parse_args()
    if reason := missing():
        print(f"cluster: {reason}", file=sys.stderr)
        return 2
    if options.do == "up":
        print(", ".join(f"{host.name} {host.address}" for host in up(options.folder, options.hosts, stay=True).hosts))
    elif options.do == "down":
        down(options.folder)
    else:
        name, *command = options.command
        host = next(host for host in read(options.folder).hosts if host.name == name)
        inner = host.command(*(command or ["bash"]))
        os.execvpe(inner[0], inner, host.environment({"TERM": os.environ.get("TERM", "dumb")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
