"""Launches that tests of mixture-of-experts backbones share."""

import pytest


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
