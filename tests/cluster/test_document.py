"""The ten commands of docs/CLUSTER.md, as they stand, on two hosts: `make proof-hosts`."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster import cluster as hosts_of
from tests.cluster.cluster import ROOT
from tests.helpers import make_task, save_backbone
from tests.test_readme import DEMO_TASKS

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(hosts_of.missing()), reason=hosts_of.missing() or "can be made"),
]
INSTEAD = {  # what a test cannot do as a user does it: the registry is not reached from the hosts, nor asked for a key
    "make venv && . .venv/bin/activate": f'ln -s {sys.prefix} .venv && PATH="{sys.prefix}/bin:$PATH"',
    "python jobs/demo.py": "cp -r {demo} demo",
    'ssh-keygen -q -t ed25519 -N "" -f ~/.ssh/id_ed25519 && ssh-copy-id node1 && ssh-copy-id node2': "ssh node2 true",
}


def commands() -> list[str]:
    """The first block of indented lines."""
    text = (ROOT / "docs" / "CLUSTER.md").read_text(encoding="utf-8")
    return re.findall(r"^    (.+)$", re.search(r"(?:^    .+\n)+", text, flags=re.MULTILINE)[0], flags=re.MULTILINE)


def test_ten_commands_lead_from_zero_to_a_verified_run_on_two_hosts(tmp_path: Path):
    lines = commands()
    assert len(lines) == 10 and INSTEAD.keys() <= set(lines)
    with hosts_of.cluster(tmp_path / "cluster", 2) as made:
        demo = made.shared / "demo"
        save_backbone(demo / "backbone")
        for task in DEMO_TASKS:
            make_task(demo / "data", task, rows={"train": 60, "validation": 24, "test": 24})
        source = made.shared / "repository"  # the checkout as it is, committed or not
        shutil.copytree(
            ROOT, source, ignore=shutil.ignore_patterns(".git", "demo", "runs", "__pycache__"), symlinks=True
        )
        for contract in (source / "data_contracts" / "tasks").glob("*.yaml"):  # the tiny tokenizer cuts words finer
            contract.write_text(contract.read_text().replace("max_answer_tokens: 4", "max_answer_tokens: 12"))
        git = ["git", "-C", str(source), "-c", "user.name=test", "-c", "user.email=test@example.com"]
        for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
            subprocess.run([*git, *arguments], check=True)
        script = "set -e\ncd /tmp\n" + "\n".join(INSTEAD.get(line, line) for line in lines) + "\n"
        script = script.replace("<this repository>", str(source)).replace("{demo}", str(demo))
        (made.shared / "script").write_text(script)
        done = made[0].run("bash", made.shared / "script", timeout=800)
        told = f"{script}\n{done.stdout}\n{done.stderr}"
        assert done.returncode == 0, told
        assert "node1: ACC" in done.stdout and "node2: the work_dir is not seen there" in done.stdout, told
        work_dir = Path("tmp/perennial/runs/quickstart")
        assert len(list((made[0].disk / work_dir / "increments").iterdir())) == len(DEMO_TASKS)
        assert not (made[1].disk / work_dir).exists()
