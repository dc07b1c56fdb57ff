"""`jobs/benchmark.py speed` on a tiny backbone: what it writes adds up. How fast anything is, is not asked."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPEATS = 2


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs/benchmark.py"), "speed", *arguments],
        env=environment | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture(scope="module")
def speed(tmp_path_factory, backbone_dir, data_root) -> tuple[dict, str]:
    """The report of one run without the trainer case, and what was printed."""
    out = tmp_path_factory.mktemp("speed") / "speed.json"
    sizes = {"repeats": REPEATS, "warmup": 1, "batch-size": 4, "max-tokens": 64, "rank": 3, "rows": 6}
    sizes |= {"answer-tokens": 3, "validation-rows": 400}
    given = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    done = run(
        *("--backbone", str(backbone_dir), "--data", str(data_root), "--out", str(out)),
        *("--cases", "step", "evaluation", "validation", "--tasks", "first", "--label-task", "second"),
        *("--dtype", "float32", *given),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert out.with_suffix(".png").is_file()
    return json.loads(out.read_text()), done.stdout


def test_every_case_is_in_the_report_with_its_contenders(speed):
    cases = speed[0]["cases"]
    assert {name: set(case["seconds"]) for name, case in cases.items() if name != "verdict"} == {
        "step": {"moe_cl", "sequential", "naive_dual", "gemm"},
        "evaluation": {"trie", "one_forward_per_label"},
        "generation": {"batched", "one_row_at_a_time"},
        "validation": {"vectorised", "row_by_row_pydantic"},
    }
    assert {"verdict", "duplicates", "leaks", "tokens"} <= set(cases["verdict"]["seconds"])


def test_medians_and_ratios_follow_from_the_samples(speed):
    checked = 0
    for case in speed[0]["cases"].values():
        for values in [*case["seconds"].values(), *case["ratios"].values()]:
            assert len(values["samples"]) == REPEATS and min(values["samples"]) > 0
            assert values["median"] == statistics.median(values["samples"])
        for name, values in case["ratios"].items():
            above, below = (case["seconds"][part]["samples"] for part in name.split(" / "))
            assert values["samples"] == [a / b for a, b in zip(above, below, strict=True)]
            checked += 1
    assert checked == 6


def test_rates_follow_from_the_batches(speed):
    step = speed[0]["cases"]["step"]
    for name in ("moe_cl", "sequential", "naive_dual"):
        seconds = step["seconds"][name]["samples"]
        figures = step["figures"][name]
        assert figures["rows_per_second"]["samples"] == [4 / second for second in seconds]
        expected = [tokens / second for tokens, second in zip(step["batch_tokens"], seconds, strict=True)]
        assert figures["tokens_per_second"]["samples"] == expected
    ours, gemm = step["figures"]["sequential"], step["figures"]["gemm"]["flop_per_second"]["samples"]
    shares = [own / machine for own, machine in zip(ours["flop_per_second"]["samples"], gemm, strict=True)]
    assert ours["share_of_gemm_rate"] == statistics.median(shares)


def test_bytes_held_are_those_of_the_tensors(speed, backbone_dir):
    held = {name: speed[0]["cases"]["step"]["figures"][name]["bytes_per_rank"] for name in ("sequential", "moe_cl")}
    # rank 3 on three maps of 48 x 92 in three layers, fp32; master values and two moments beside them
    lora = 3 * 3 * 3 * (48 + 92) * 4
    assert held["sequential"]["experts"] == lora
    assert 3 * lora <= held["sequential"]["optimizer"] <= 3.1 * lora
    gate_and_discriminator = 3 * (2 * 48 + 8 * 48 + 8) * 4
    assert held["moe_cl"]["experts"] == 2 * lora + gate_and_discriminator
    weights = (backbone_dir / "model.safetensors").stat().st_size
    assert 0 <= weights - held["moe_cl"]["backbone"] < 10_000  # a file has a header


def test_peers_give_the_answers_that_ours_give(speed):
    cases = speed[0]["cases"]
    assert cases["evaluation"]["agreement"]["labels"] == 3
    assert cases["evaluation"]["agreement"]["largest_score_difference"] < 1e-3
    assert cases["evaluation"]["agreement"]["same_answers"] == 1
    assert cases["generation"]["agreement"]["same_answers"] == 1
    rejected = {name: figures["rejected"] for name, figures in cases["validation"]["figures"].items()}
    assert rejected == {"vectorised": 20, "row_by_row_pydantic": 20}


def test_the_report_names_machine_and_versions_but_neither_host_nor_paths(speed, backbone_dir, data_root):
    report, printed = speed
    assert report["machine"]["cores"] == os.cpu_count() and report["software"]["torch"]
    assert report["settings"]["repeats"] == REPEATS and report["settings"]["tasks"] == ["first"]
    text = json.dumps(report)
    for private in (os.uname().nodename, str(backbone_dir), str(data_root), str(ROOT), str(Path.home())):
        assert private not in text
    for name, case in report["cases"].items():
        assert f"\n{name}\n" in printed
        assert all(f"\n  {ratio}" in printed for ratio in case["ratios"])


def test_a_mistake_is_one_message(tmp_path, backbone_dir, data_root):
    out = str(tmp_path / "speed.json")
    done = run("--backbone", str(backbone_dir), "--data", str(data_root), "--out", out, "--cases", "steps")
    assert done.returncode == 2 and "choose from" in done.stderr and "Traceback" not in done.stderr
    assert not Path(out).exists()
