"""docker/: what can be known of images and services without a container engine."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8"))
SERVICES = COMPOSE["services"]
EXAMPLE = (ROOT / "docker" / ".env.example").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SECRET = re.compile(r"(?:PASSWORD|SECRET_KEY|TOKEN)$")


def stages():
    """Instructions by stage: (word, arguments), with continued lines joined."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    found, name = {}, ""
    for line in filter(None, map(str.strip, text.splitlines())):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            source, _, name = rest.partition(" AS ")
            found[name] = [("FROM", source)]
        elif name:
            found[name].append((word, rest.strip()))
    return found


STAGES = stages()
LAST = ("cpu", "cuda", "tracking")


def ancestry(stage):
    """All instructions of a stage, those of the stages it is made from first."""
    source = STAGES[stage][0][1]
    return (ancestry(source) if source in STAGES else []) + STAGES[stage]


def test_the_services_are_those_the_documents_name():
    assert sorted(SERVICES) == ["demo", "migrate", "postgres", "tracking", "train-0", "train-1"]
    named = {name for text in ("DOCKER.md", "TRACKING.md") for name in SERVICES if f"`{name}`" in doc(text)}
    assert named == set(SERVICES)


@pytest.mark.parametrize("stage", LAST)
def test_an_image_runs_as_a_user_of_its_own_and_starts_its_program_without_a_shell(stage):
    instructions = ancestry(stage)
    (user,) = [rest for word, rest in instructions if word == "USER"]
    assert user == "10001:10001" and "--uid 10001" in DOCKERFILE and "--gid 10001" in DOCKERFILE
    commands = [rest for word, rest in instructions if word in ("CMD", "ENTRYPOINT")]
    assert commands and all(isinstance(yaml.safe_load(command), list) for command in commands), "signals reach it"
    after = instructions[[word for word, _ in instructions].index("USER") :]
    assert not any(word in ("RUN", "COPY", "ADD") for word, _ in after), "nothing is written after root is left"


def test_every_image_and_package_has_an_exact_version():
    assert re.search(r"^ARG PYTHON_IMAGE=python:3\.11\.\d+-slim-bookworm$", DOCKERFILE, re.MULTILINE)
    installed = re.findall(r"apt-get install [^&]*", DOCKERFILE.replace("\\\n", ""))
    packages = [word for line in installed for word in line.split()[2:] if not word.startswith("--")]
    assert packages and all("=" in package for package in packages)
    for name, service in SERVICES.items():
        assert "build" in service or re.fullmatch(r"[a-z]+:\d+\.\d+(\.\d+)?(-[a-z]+)?", service["image"]), name
    assert "latest" not in DOCKERFILE + str(COMPOSE)


def test_versions_of_python_packages_stand_in_pyproject_and_constraints_alone():
    """No `name==version` in docker/; what the tracking image installs is what pyproject.toml pins."""
    for path in (ROOT / "docker").rglob("*"):
        if path.is_file():
            assert not re.search(r"[A-Za-z]==\d", path.read_text(encoding="utf-8")), path
    script = ROOT / "docker" / "tracking" / "requirements.py"
    done = subprocess.run([sys.executable, script, ROOT / "pyproject.toml"], capture_output=True, text=True, check=True)
    wanted = done.stdout.split()
    assert wanted == [*(line for line in PROJECT["dependencies"] if line.startswith("mlflow==")), *server_extra()]
    assert len(wanted) == 3 and "torch" not in done.stdout
    constrained = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert "wtforms" in constrained
    assert "make venv" in DOCKERFILE and "--constraint" in DOCKERFILE


def server_extra():
    """The extra `server`, by hand: a driver and what MLflow's login needs."""
    extra = PROJECT["optional-dependencies"]["server"]
    assert [line.partition("==")[0] for line in extra] == ["psycopg2-binary", "Flask-WTF"]
    return extra


def test_the_python_of_the_image_is_one_that_the_project_takes():
    minor = re.search(r"PYTHON_IMAGE=python:3\.(\d+)", DOCKERFILE)[1]
    assert PROJECT["requires-python"] == ">=3.11" and int(minor) >= 11


def test_every_copied_file_exists_and_is_let_into_the_build():
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for instructions in STAGES.values():
        for word, rest in instructions:
            if word != "COPY":
                continue
            *sources, _ = [part for part in shlex.split(rest) if not part.startswith("--")]
            for source in sources:
                assert (ROOT / source).exists(), source
                assert source == "." or source.split("/")[0] in allowed, source
    assert all((ROOT / name).exists() for name in allowed)
    assert not {"demo", "runs", ".git", ".venv"} & set(allowed)


def test_files_that_a_run_line_or_a_service_names_exist():
    for path in re.findall(r"/etc/mlflow/([\w.]+)", str(COMPOSE)):
        assert (ROOT / "docker" / "tracking" / path).exists() and f"docker/tracking/{path}" in DOCKERFILE
    for name in ("demo", "train-0", "train-1"):
        for part in map(str, SERVICES[name]["command"]):
            found = re.search(r"jobs/[\w/]+\.(?:py|yaml)", part)
            assert found is None or (ROOT / found[0]).exists(), part
    targets = {service["build"]["target"] for service in SERVICES.values() if "build" in service}
    assert targets <= set(STAGES) and targets == {"cpu", "tracking"}


def test_dependencies_are_installed_before_the_source_is_copied_and_need_none_of_it():
    """So that a changed source file does not install everything again."""
    for stage in ("cpu", "cuda"):
        words = ancestry(stage)
        install = next(i for i, (_, rest) in enumerate(words) if "make venv" in rest)
        source = next(i for i, (word, rest) in enumerate(words) if word == "COPY" and rest.endswith(". ."))
        assert install < source
        early = [rest for word, rest in words[:install] if word == "COPY"]
        assert early == ["Makefile pyproject.toml constraints.txt README.md LICENSE ./"]


def test_no_secret_stands_in_a_file_and_compose_asks_for_each():
    """`${NAME:?...}`: compose ends with a message where one is missing, instead of starting with an empty password."""
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if SECRET.search(name) or name == "PGPASSWORD":
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), (name, value)
    asked = set(re.findall(r"\$\{(\w+):\?", str(COMPOSE)))
    listed = dict(re.findall(r"^(\w+)=(.*)$", EXAMPLE, re.MULTILINE))
    assert set(listed) == asked and set(listed.values()) == {""}
    assert not re.search(r"://[^/\s'\"]*:[^/\s'\"]*@", str(COMPOSE) + DOCKERFILE), "no password in an address"
    assert not re.search(r"^(?:ARG|ENV).*(?:PASSWORD|TOKEN|SECRET)", DOCKERFILE, re.MULTILINE)
    assert "/docker/.env" in (ROOT / ".gitignore").read_text().split()
    assert "**/.env" in (ROOT / ".dockerignore").read_text().split()


def test_the_server_waits_for_the_one_migration_and_jobs_for_a_healthy_server():
    assert SERVICES["migrate"]["restart"] == "no" and SERVICES["migrate"]["depends_on"] == {
        "postgres": {"condition": "service_healthy"}
    }
    assert SERVICES["tracking"]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
    for name in ("train-0", "train-1"):
        assert SERVICES[name]["depends_on"]["tracking"] == {"condition": "service_healthy"}
    assert "healthcheck" in SERVICES["postgres"]
    assert any(word == "HEALTHCHECK" for word, _ in ancestry("tracking"))


def test_ports_agree_between_image_command_health_and_jobs_and_are_open_on_this_machine_alone():
    assert ("EXPOSE", "5000") in STAGES["tracking"]
    assert "--port=5000" in SERVICES["tracking"]["command"]
    assert SERVICES["tracking"]["ports"] == ["127.0.0.1:5000:5000"]
    (hosts,) = [part for part in SERVICES["tracking"]["command"] if part.startswith("--allowed-hosts=")]
    for name in ("train-0", "train-1"):
        (uri,) = [part for part in SERVICES[name]["command"] if part.startswith("--set=tracking.uri=")]
        assert uri.removeprefix("--set=tracking.uri=http://") in hosts.partition("=")[2].split(",")
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["tracking"]


def test_the_two_hosts_differ_in_their_rank_and_name_alone():
    first, second = dict(SERVICES["train-0"]), dict(SERVICES["train-1"])
    assert (first.pop("hostname"), second.pop("hostname")) == ("train-0", "train-1")
    differing = [pair for pair in zip(first.pop("command"), second.pop("command"), strict=True) if pair[0] != pair[1]]
    assert differing == [("--node-rank=0", "--node-rank=1")] and first == second
    assert "--master-addr=train-0" in SERVICES["train-1"]["command"]
    assert first["init"] is True and first["restart"].startswith("on-failure") and first["stop_grace_period"] == "60s"


def test_telemetry_is_off_in_every_image():
    assert all(any("MLFLOW_DISABLE_TELEMETRY=true" in rest for _, rest in ancestry(stage)) for stage in LAST)


def test_every_named_volume_is_declared_and_used():
    used = {mount.partition(":")[0] for service in SERVICES.values() for mount in service.get("volumes", [])}
    assert used == set(COMPOSE["volumes"])


def doc(name):
    """A document's text."""
    return (ROOT / "docs" / name).read_text(encoding="utf-8")
