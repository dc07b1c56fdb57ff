"""The files in jobs/launch/ fit the code they start."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from jobs.continual import parse
from pipeline.config import WatchConfig, load_stream

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "jobs" / "launch" / "slurm.sh"
KUBERNETES = ROOT / "jobs" / "launch" / "kubernetes.yaml"


@pytest.fixture(scope="module")
def manifest():
    service, job = yaml.safe_load_all(KUBERNETES.read_text(encoding="utf-8"))
    return service, job, job["spec"]["template"]["spec"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_slurm_script_is_a_script():
    assert subprocess.run(["bash", "-n", str(SLURM)], check=False).returncode == 0


def test_the_slurm_script_starts_the_job_with_arguments_it_takes_and_requeues_on_its_stop_code():
    text = SLURM.read_text(encoding="utf-8")
    (line,) = re.findall(r"^srun .*?python (.+)$", text, flags=re.MULTILINE)
    script, *arguments = shlex.split(
        line.replace('"$STREAM"', "jobs/streams/quickstart.yaml").replace('"${@:2}"', "--break-lock --set seed=3")
    )
    options = parse(arguments)
    assert script == "jobs/continual.py" and options.break_lock and load_stream(options.stream, options.set).seed == 3
    assert '"$code" -eq 75' in text


def test_the_slurm_script_leaves_time_for_a_stop():
    (seconds,) = re.findall(r"--signal=TERM@(\d+)", SLURM.read_text(encoding="utf-8"))
    assert int(seconds) > 2 * WatchConfig().grace_seconds


def test_the_kubernetes_job_starts_as_many_hosts_as_torchrun_expects_and_meets_at_the_first(manifest):
    service, job, pod = manifest
    (command,) = pod["containers"][0]["args"]
    words = shlex.split(command)
    options = dict(word.removeprefix("--").split("=", 1) for word in words[2 : words.index("jobs/continual.py")])
    assert words[:2] == ["exec", "torchrun"]
    assert int(options["nnodes"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert job["spec"]["completionMode"] == "Indexed" and options["node_rank"] == "$JOB_COMPLETION_INDEX"
    assert options["master_addr"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    limits = pod["containers"][0]["resources"]["limits"]
    assert int(options["nproc_per_node"]) == limits["nvidia.com/gpu"]


def test_the_kubernetes_job_gives_the_job_arguments_it_takes_and_time_for_a_stop(manifest):
    _, _, pod = manifest
    words = shlex.split(pod["containers"][0]["args"][0])
    options = parse(words[words.index("jobs/continual.py") + 1 :])
    config = load_stream(options.stream, options.set)
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    assert config.work_dir.startswith(mounts["work"])
    assert config.backbone.path.startswith(mounts["demo"].removeprefix(pod["containers"][0]["workingDir"] + "/"))
    assert pod["terminationGracePeriodSeconds"] > config.watch.grace_seconds
    names = {variable["name"]: variable["value"] for variable in pod["containers"][0]["env"]}
    assert names["PERENNIAL_CACHE"] == mounts["cache"]


def test_the_kubernetes_jobs_pods_run_as_the_images_user_and_never_two_of_an_index(manifest):
    _, job, pod = manifest
    (uid,) = re.findall(
        r"^USER (\d+):\d+$", (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE
    )[:1]
    security = pod["securityContext"]
    assert security["runAsUser"] == security["runAsGroup"] == security["fsGroup"] == int(uid)
    assert job["spec"]["podReplacementPolicy"] == "Failed" and pod["restartPolicy"] == "Never"
