"""The launches that multi-process tests share."""

import pytest


@pytest.fixture(scope="session")
def worlds(tmp_path_factory):
    """See `worlds.Worlds`."""
    from tests.distributed.worlds import worlds_of_session

    return worlds_of_session(tmp_path_factory.mktemp("worlds"))
