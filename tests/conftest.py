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
    """Tests marked `long` run only where `-m` asks for them: `make proof-moe`, `make proof-plan`."""
    if "long" in (config.option.markexpr or ""):
        return
    left_out = [item for item in items if item.get_closest_marker("long")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("long")]


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
