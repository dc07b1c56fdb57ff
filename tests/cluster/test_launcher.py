"""What `srun` sets, mapped to what torch reads; ranks that do not come; what hosts refuse; where copies lie."""

import socket

import pytest

from data_contracts.errors import UserError
from pipeline.cache import cache_disk, cache_folder
from pipeline.config import override_config
from pipeline.hosts.alike import refuse_differences, settings
from pipeline.hosts.joining import wait_for_all_ranks
from pipeline.hosts.launcher import expand_nodes, map_slurm, several_hosts
from pipeline.hosts.meeting import Hosts
from pipeline.hosts.storage import copies_removed, find_storage, new_copies
from pipeline.placement.distributed import World
from tests.helpers import stream_dict

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "7",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "gpu[08-11]",
    "SLURM_JOB_NODELIST": "gpu[01-11]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.254",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "3",
}


def test_srun_gives_rank_size_and_a_rendezvous_on_the_steps_first_node():
    environment = dict(SLURM)
    map_slurm(environment)
    assert {name: environment[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE")} == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "7",
        "LOCAL_SIZE": "2",
    }
    assert environment["MASTER_ADDR"] == "gpu08"
    assert 1024 < int(environment["MASTER_PORT"]) < 32768  # below what the kernel hands out


def test_all_tasks_of_a_step_agree_on_the_port_and_two_steps_of_a_job_do_not_share_one():
    def port(**changes):
        environment = SLURM | changes
        map_slurm(environment)
        return environment["MASTER_PORT"]

    assert port() == port(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0")
    assert port() != port(SLURM_STEP_ID="4")


def test_another_launcher_inside_an_allocation_is_left_alone():
    environment = SLURM | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "other"}
    map_slurm(environment)
    assert environment["WORLD_SIZE"] == "2" and environment["MASTER_ADDR"] == "other"
    assert "LOCAL_RANK" not in environment


def test_without_a_node_list_the_launching_node_is_taken():
    environment = {name: value for name, value in SLURM.items() if "NODELIST" not in name}
    map_slurm(environment)
    assert environment["MASTER_ADDR"] == "10.0.0.254"


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("login", ["login"]),
        ("gpu[9-11]", ["gpu9", "gpu10", "gpu11"]),
        ("gpu[01,07-08],cpu3", ["gpu01", "gpu07", "gpu08", "cpu3"]),
        ("r[1-2]n[3-4]", ["r1n3", "r1n4", "r2n3", "r2n4"]),
        ("", []),
    ],
)
def test_node_lists_are_expanded(nodes, names):
    assert list(expand_nodes(nodes)) == names


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_SIZE": "4"}, False),  # deepspeed on one host
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_SIZE": "2"}, True),
        ({"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, False),  # torchrun on one host
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),  # nobody says how many are here
        (dict(SLURM), True),
    ],
)
def test_several_hosts_are_known_before_the_ranks_meet(environment, several):
    assert several_hosts(environment) is several


def test_a_rank_whose_peers_do_not_come_says_so_after_a_while(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=rf"not all 2 ranks came to 127.0.0.1:{port} within 1 s"):
        wait_for_all_ranks(1.0)
    monkeypatch.setenv("LOCAL_SIZE", "2")
    assert wait_for_all_ranks(1.0) is None  # all on this host: its launcher sees to them


def test_what_hosts_refuse_is_one_sentence_and_the_same_mistake_of_all_is_told_once():
    hosts = Hosts(World(rank=0, size=3, device=None), (0, 0, 1), ("one", "two"))
    with pytest.raises(UserError, match=r"^host two: no backbone$"):
        hosts.refuse([None, None, "no backbone"])
    with pytest.raises(UserError, match=r"^no backbone$"):
        hosts.refuse(["no backbone", "no backbone", "no backbone"])
    with pytest.raises(UserError, match=r"^host one: no disk; host two: no backbone$"):
        hosts.refuse(["no disk", None, "no backbone"])
    hosts.refuse([None, None, None])


def test_a_difference_names_the_host_and_what_it_is_in_each_host_against_the_first():
    facts = [
        {"torch version": "2.13.0", "data file a": "0" * 64},
        {"torch version": "2.13.0", "data file a": "0" * 64},
        {"torch version": "2.12.0"},
    ]
    with pytest.raises(UserError) as raised:
        refuse_differences(facts, ("one", "two", "three"))
    assert str(raised.value) == (
        "host three differs from host one in torch version (2.12.0, there 2.13.0), data file a (none, there sha256 "
        "000000000000...); make all hosts alike, then run the same command again"
    )
    refuse_differences(facts[:2], ("one", "two"))


def test_a_single_host_is_asked_nothing_and_reads_the_work_dir_itself(tmp_path):
    hosts = Hosts(World(rank=0, size=1, device=None), (0,), ("here",))
    storage = find_storage(hosts, tmp_path)
    assert storage.everywhere and storage.root == tmp_path and list(tmp_path.iterdir()) == []
    assert storage.read(tmp_path / "file") == tmp_path / "file"


def test_a_running_jobs_copies_stay_and_those_of_a_job_that_is_gone_are_removed(tmp_path):
    left = tmp_path / "copies-left"
    left.mkdir()
    (left / "lock").touch()
    with copies_removed():
        first = new_copies(tmp_path)
        assert not left.exists() and first.is_dir()
        second = new_copies(tmp_path)  # another job's start
        assert first.is_dir() and second.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_the_cache_is_below_xdg_cache_home_and_where_that_cannot_be_written_below_tmpdir(tmp_path, monkeypatch):
    monkeypatch.delenv("PERENNIAL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_disk() == tmp_path and not (tmp_path / "cache").exists()  # where it will be; nothing is made
    assert cache_folder() == cache_disk() == tmp_path / "cache" / "perennial"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cache_folder().is_relative_to(tmp_path) and cache_folder().name == "perennial"
    monkeypatch.setenv("PERENNIAL_CACHE", str(tmp_path / "named"))
    assert cache_folder() == cache_disk() == tmp_path / "named"
    monkeypatch.setenv("PERENNIAL_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="file: cannot be written; set PERENNIAL_CACHE"):
        cache_folder()


@pytest.mark.parametrize("section", [{"spans": {"enabled": False}}, {"tracking": {"system_metrics": True}}])
def test_what_decides_which_collectives_run_is_compared_between_hosts(tmp_path, section):
    plain, other = (
        override_config(stream_dict(tmp_path, tmp_path, tmp_path, ["a"], **s), [], "s") for s in ({}, section)
    )
    with pytest.raises(UserError, match="host b differs from host a in stream: "):
        refuse_differences([settings(plain), settings(other)], ("a", "b"))
