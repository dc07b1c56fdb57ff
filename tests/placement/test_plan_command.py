"""jobs/plan.py as a platform engineer uses it, before there are weights or devices."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.placement.architecture import PRESETS

COMMAND = Path(__file__).resolve().parents[2] / "jobs" / "plan.py"
SPEC = importlib.util.spec_from_file_location("plan_command", COMMAND)
command = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(command)
A13B = ["--backbone", "hunyuan-a13b", "--nodes", "4", "--gpus-per-node", "8", "--expert-parallel", "8"]


def run(capsys, *arguments):
    """(exit code, standard output, standard error)."""
    code = command.main([*arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_table_says_what_a_rank_holds_and_whether_it_fits(capsys):
    code, out, err = run(capsys, *A13B)
    assert (code, err) == (0, "")
    lines = {line.split("  ")[1].strip(): line for line in out.splitlines() if line.startswith("  ")}
    assert "80.39B, of which a token passes 13.27B" in lines["backbone"]
    assert "8 of 64 a layer, 8 a token" in lines["routed experts on a rank"]
    # 77.31 billion elements of routed experts and 3.08 of all else, two bytes each, over 32 ranks
    assert "5.03 GB" in lines["frozen weights"]
    for name in ("trained weights", "gradients", "optimizer", "activations (estimate)", "smallest world that fits"):
        assert name in lines
    assert "fits" in lines["this world"]
    assert len({line.rstrip() for line in out.splitlines()}) > 30


def test_json_holds_the_same_numbers_and_what_they_were_made_for(capsys, tmp_path):
    file = tmp_path / "plan.json"
    _, table, _ = run(capsys, *A13B, "--json", str(file))
    code, out, _ = run(capsys, *A13B, "--json", "-")
    found = json.loads(out)
    assert code == 0 and found == json.loads(file.read_text())
    memory = found["memory"]
    parts = ("weights", "gradients", "optimizer", "gathered", "buffers", "activations")
    assert memory["total"] == sum(memory[part] for part in parts)
    assert f"{memory['total'] / 1e9:.2f} GB" in table
    assert found["placement"]["expert_parallel"] == 8 and found["method"]["rank"] == 8
    assert found["smallest_world"]["world"] <= 32 and found["fits"]


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.json")))
def test_every_preset_is_planned_with_every_method_and_stage(capsys, preset):
    for method, stage in (("moe_cl", "3"), ("sequential", "2"), ("zero_shot", "3")):
        code, out, err = run(capsys, "--backbone", preset, "--method", method, "--zero-stage", stage, "--nodes", "16")
        assert code == 0 and "Verdict" in out, err


def test_a_run_that_does_not_fit_is_told_so_and_what_would_help(capsys):
    code, out, _ = run(capsys, "--backbone", "hunyuan-large", "--nodes", "1", "--tokens", "100000")
    assert code == 0
    assert "does NOT fit" in out and "none of up to" in out and "--tokens" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backbone", "no-such-model"], "hy3-preview"),
        (["--backbone", "hunyuan-large", "--nodes", "4", "--expert-parallel", "3"], "rests 2 and 1"),
        (["--backbone", "hunyuan-large", "--targets", "c_fc"], "c_fc matches no projection"),
        (["--backbone", "hunyuan-large", "--method", "magic"], "sequential"),
        (["--backbone", "hunyuan-large", "--nodes", "0"], "nodes"),
        ([*A13B, "--json", "no/such/folder/plan.json"], "--json"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_2(capsys, arguments, said):
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert said in err and len(err.strip().splitlines()) == 1 and "Traceback" not in err


def test_a_plan_loads_neither_torch_nor_transformers_nor_deepspeed():
    script = (
        f"import runpy, sys; sys.argv = ['plan.py', *{A13B!r}]\n"
        f"try: runpy.run_path({str(COMMAND)!r}, run_name='__main__')\n"
        "except SystemExit as done: code = done.code\n"
        "print('CODE', code, [m for m in ('torch', 'transformers', 'deepspeed') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "CODE 0 []"


def test_the_sizing_table_of_the_cluster_guide_is_what_its_commands_print(capsys):
    text = (COMMAND.parents[1] / "docs" / "CLUSTER.md").read_text().partition("## Sizing")[2].partition("\n## ")[0]
    commands = [line.split()[2:] for line in text.splitlines() if line.startswith("    python jobs/plan.py ")]
    assert [arguments[1] for arguments in commands] == ["hunyuan-a13b", "hunyuan-large", "hy3-preview"]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) > 12
    for column, arguments in enumerate(commands, start=1):
        _, out, _ = run(capsys, *arguments)
        printed = out.replace(", of which a token passes ", " / ")
        assert "this world                            fits" in out
        for row in rows[1:]:
            assert f" {row[column]}" in printed, row
