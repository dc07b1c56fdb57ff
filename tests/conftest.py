"""Fixtures that several test files share. Nothing heavy is imported before a test asks for it."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks of one machine share its cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: the sizes that the standard suite leaves out; run them with -m long")


def pytest_collection_modifyitems(config, items):
    """Tests marked `long` run only where `-m` asks for them, as the Makefile's proofs do."""
    if "long" not in (config.option.markexpr or ""):
        left_out = [item for item in items if item.get_closest_marker("long")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if not item.get_closest_marker("long")]
    items.sort(key=lambda item: HEAVY.index(group) if (group := group_of(item.nodeid)) in HEAVY else len(HEAVY))


HEAVY = ("jobs", "cluster", "moe", "distributed", "faults", "watch", "placement", "tracking", "store", "test_readme.py")


def group_of(nodeid: str) -> str:
    """What one process runs: the heavy folder that a test's file is in, else the file."""
    name = nodeid.partition("::")[0].removeprefix("tests/")
    return name.partition("/")[0] if name.partition("/")[0] in HEAVY else name


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`-n 2`: a process gets a whole folder, whose tests share launches, or a whole file; long folders come first."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFolder(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return group_of(nodeid)

    return ByFolder(config, log)


@pytest.fixture(scope="session")
def backbone_dir(tmp_path_factory) -> Path:
    """A tiny Llama backbone with its tokenizer, as a folder; not to be changed."""
    from tests.helpers import save_backbone

    return save_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="session")
def tokenizer():
    """The tokenizer of `backbone_dir`."""
    from tests.helpers import build_tokenizer

    return build_tokenizer()


@pytest.fixture
def tiny_model(backbone_dir):
    """The model of `backbone_dir`, fp32, a new object for every test."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(backbone_dir, attn_implementation="sdpa").eval()


@pytest.fixture(scope="session")
def data_root(tmp_path_factory) -> Path:
    """A data root with two contradicting classification tasks (`first`, `second`) and a generation task (`copying`)."""
    from tests.helpers import make_task

    root = tmp_path_factory.mktemp("data")
    make_task(root, "first")
    make_task(root, "second", turn=1, seed=1)
    make_task(root, "copying", kind="generation", seed=2)
    return root
