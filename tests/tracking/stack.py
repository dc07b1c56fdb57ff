"""The tracking server as docker/compose.yaml has it, without containers: PostgreSQL, migrations, MLflow's server.

Commands and environment are read from compose.yaml; what names a container becomes 127.0.0.1 and a free port. Each part
can be killed, stopped and started again. Its folder holds all it writes.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "docker" / "compose.yaml"
SECRETS = {
    "POSTGRES_PASSWORD": "canary-postgres-4711",
    "MLFLOW_TRACKING_USERNAME": "jobs",
    "MLFLOW_TRACKING_PASSWORD": "canary-tracking-4712",
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "canary-session-4713",
}
CANARIES = tuple(value for value in SECRETS.values() if value.startswith("canary"))


def lacking() -> str:
    """What this machine lacks for it; empty where it can run."""
    if not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")) and not shutil.which("initdb"):
        return "PostgreSQL's programs are not installed (Debian: postgresql)"
    for module in ("psycopg2", "flask_wtf"):
        try:
            __import__(module)
        except ImportError:
            return f"{module} is not installed (pip install '.[server]')"
    return ""


def resolve(value: object, variables: Mapping[str, str] = SECRETS) -> str:
    """A value of compose.yaml with `${NAME:?message}`, `${NAME:-default}` and `${NAME}` replaced."""
    return re.sub(r"\$\{(\w+)(?::[?-]([^}]*))?\}", lambda found: variables.get(found[1], found[2] or ""), str(value))


def service(name: str) -> dict:
    """One service of compose.yaml."""
    return yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"][name]


class Stack:
    """PostgreSQL and MLflow's server in one folder, on ports of their own."""

    def __init__(self, folder: Path, workers: int) -> None:
        self.folder, self.workers = folder, workers
        self.database_port, self.port = free_port(), free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.login = {name: SECRETS[name] for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")}
        self._programs = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)
        self._running: dict[str, subprocess.Popen] = {}
        self.database = Path(tempfile.mkdtemp(prefix="perennial-database-"))  # where PostgreSQL's user may enter

    def create(self) -> None:
        """Make the database, start it, and migrate it once, as service `migrate` does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.database.chmod(0o700)
        password = self.database / "password"
        password.write_text(SECRETS["POSTGRES_PASSWORD"])
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            for path in (self.database, password):
                shutil.chown(path, *self._user())
        data = self.database / "data"
        self._as_user("initdb", "-D", data, "-U", "mlflow", "-A", "scram-sha-256", f"--pwfile={password}", "-N")
        password.unlink()
        self.start_database()
        environment = {**os.environ, "PGPASSWORD": SECRETS["POSTGRES_PASSWORD"]}
        where = ["-h", "127.0.0.1", "-p", str(self.database_port), "-U", "mlflow"]
        subprocess.run([self._program("createdb"), *where, "mlflow"], env=environment, check=True)
        script = ROOT / "docker" / "tracking" / Path(service("migrate")["command"][0]).name
        with open(self.folder / "migrate.log", "wb") as log:
            subprocess.run(["sh", script], env=self._environment("migrate"), stdout=log, stderr=log, check=True)

    def start_database(self) -> None:
        """Start PostgreSQL and wait until it answers."""
        place = ["-D", str(self.database / "data"), "-k", "", "-h", "127.0.0.1", "-p", str(self.database_port)]
        arguments = [*place, "-c", "fsync=off"]
        self._start("database", [*self._setpriv(), self._program("postgres"), *arguments], {"PATH": os.environ["PATH"]})
        ready = [self._program("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.database_port)]
        self._wait("database", lambda: subprocess.run(ready).returncode == 0)

    def start_server(self) -> None:
        """Start MLflow's server and wait until it is healthy."""
        command = [self._here(part) for part in service("tracking")["command"]]
        command = [re.sub(r"^--workers=.*", f"--workers={self.workers}", part) for part in command]
        command[0] = str(Path(sys.executable).with_name("mlflow"))
        self._start("server", command, self._environment("tracking"))
        self._wait("server", lambda: self.status("/health", {}) == 200)

    def end(self, name: str, sent: signal.Signals = signal.SIGKILL) -> None:
        """End `server` with all its workers, or `database`, by a signal to its process group; wait for the end."""
        process = self._running.pop(name)
        receiver = os.killpg if sent is signal.SIGKILL or name == "server" else os.kill
        receiver(process.pid, sent)
        process.wait(60)
        with contextlib.suppress(ProcessLookupError):  # a worker may outlive its parent by a moment
            os.killpg(process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End all that runs."""
        for name in list(self._running):
            self.end(name)
        shutil.rmtree(self.database, ignore_errors=True)

    def status(self, path: str, headers: Mapping[str, str]) -> int:
        """The status of a GET; 0 where nobody answers."""
        try:
            with urllib.request.urlopen(urllib.request.Request(self.uri + path, headers=headers), timeout=10) as reply:
                return reply.status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def _environment(self, name: str) -> dict[str, str]:
        auth = self.folder / "auth.ini"
        auth.write_text(self._here((ROOT / "docker" / "tracking" / "auth.ini").read_text(encoding="utf-8")))
        kept = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR", "LANG") if key in os.environ}
        kept["PATH"] = f"{Path(sys.executable).parent}:{kept['PATH']}"
        ours = {key: self._here(resolve(value)) for key, value in service(name)["environment"].items()}
        return kept | ours

    def _here(self, text: str) -> str:
        replaced = {
            "@postgres:5432": f"@127.0.0.1:{self.database_port}",
            "--host=0.0.0.0": "--host=127.0.0.1",
            "--port=5000": f"--port={self.port}",
            "127.0.0.1:5000": f"127.0.0.1:{self.port}",
            "/var/lib/mlflow": str(self.folder),
            "/etc/mlflow/": f"{self.folder}/",
        }
        for old, new in replaced.items():
            text = text.replace(old, new)
        return text

    def _start(self, name: str, command: list[str], environment: Mapping[str, str]) -> None:
        with open(self.folder / f"{name}.log", "ab") as log:
            self._running[name] = subprocess.Popen(
                command, cwd=self.folder, env=dict(environment), stdout=log, stderr=log, start_new_session=True
            )

    def _wait(self, name: str, ready: Callable[[], bool], seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not ready():
            if self._running[name].poll() is not None or time.monotonic() > end:
                raise AssertionError(f"{name} did not start\n{(self.folder / f'{name}.log').read_text()}")
            time.sleep(0.1)

    def _program(self, name: str) -> str:
        return str(self._programs / name) if self._programs else str(shutil.which(name))

    def _user(self) -> tuple[str, str]:
        import grp
        import pwd

        names = {entry.pw_name: entry for entry in pwd.getpwall()}
        entry = names.get("postgres") or names["nobody"]
        return entry.pw_name, grp.getgrgid(entry.pw_gid).gr_name

    def _setpriv(self) -> list[str]:
        if os.geteuid() != 0:
            return []
        user, group = self._user()
        return ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups"]

    def _as_user(self, program: str, *arguments: object) -> None:
        command = [*self._setpriv(), self._program(program), *map(str, arguments)]
        subprocess.run(command, cwd="/", stdout=subprocess.DEVNULL, check=True)


@contextlib.contextmanager
def running_stack(folder: Path, workers: int) -> Iterator[Stack]:
    """The whole of it, started in the order of compose.yaml; gone afterwards."""
    stack = Stack(folder, workers)
    try:
        stack.create()
        stack.start_server()
        yield stack
    finally:
        stack.close()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]
