"""Launches that tests of mixture-of-experts backbones share; tests marked `long` run only where `-m` asks for them."""

import pytest


def pytest_configure(config):
    config.addinivalue_line("markers", "long: the sizes that the standard suite leaves out; run them with -m long")


def pytest_collection_modifyitems(config, items):
    if "long" in (config.option.markexpr or ""):
        return
    left_out = [item for item in items if item.get_closest_marker("long")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("long")]


@pytest.fixture(scope="session")
def moe_worlds(tmp_path_factory):
    """See `worlds.MoeWorlds`."""
    from tests.moe.worlds import MoeWorlds

    return MoeWorlds(tmp_path_factory.mktemp("moe-worlds"))


@pytest.fixture(scope="session")
def naive(moe_worlds):
    """See `naive.Naive`."""
    from tests.moe.naive import Naive

    return Naive(moe_worlds)
