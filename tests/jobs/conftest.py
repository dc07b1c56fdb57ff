"""What the files of this folder look at: streams learned and commands run, launched side by side, once for all tests.

Much of a launch is importing, on one core. So launches wait in two queues that run at the same time: one of two ranks,
one of plain processes. Only what the collected files need is launched.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers import make_task
from tests.jobs import mistakes_in_models, mistakes_in_streams, mistakes_in_tasks  # noqa: F401 (each registers its own)
from tests.jobs.failures import Outcome
from tests.jobs.history import History, make_history
from tests.jobs.launch import Done, end_everything
from tests.jobs.life import Life, make_life
from tests.jobs.methods import learn_by_methods
from tests.jobs.mistakes import Made, make_mistakes
from tests.jobs.routed import Routed, learn_routed
from tests.jobs.streams import TASKS, Inputs, Learned, learn
from tests.jobs.two_ranks import Shared, Stopped, break_two, share_a_launch, stop_by_signal

# file -> the launches it looks at
NEEDS = {
    "test_adapters": {"methods"},
    "test_bank": {"life"},
    "test_bad_input": {"learned", "on_one_rank", "on_two_ranks"},
    "test_failures": {"learned", "broken", "on_two_ranks"},
    "test_predict": {"learned", "on_one_rank", "on_two_ranks"},
    "test_retention": {"learned", "on_two_ranks", "methods"},
    "test_routed": {"routed"},
    "test_stop": {"learned", "stopped", "on_two_ranks"},
    "test_stream": {"learned"},
    "test_tampering": {"learned"},
    "test_task_free": {"methods", "routed"},
    "test_versions": {"history"},
}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, backbone_dir) -> Inputs:
    """Three tasks whose labels contradict each other, and the tiny backbone."""
    root = tmp_path_factory.mktemp("jobs-data")
    for turn, task in enumerate(TASKS):
        make_task(root, task, turn=turn, seed=turn)
    return Inputs(root, backbone_dir)


@pytest.fixture(scope="session")
def launches(request, inputs, tmp_path_factory) -> Iterator[dict[str, Future]]:
    """The results to come, by name."""
    shared = [item for item in request.session.items if not item.get_closest_marker("long")]
    needed = set().union(*(NEEDS.get(item.path.stem, set()) for item in shared))
    folders = {name: tmp_path_factory.mktemp(name) for name in sorted(needed)}
    to_come: dict[str, Future] = {}
    works = {  # in the order of launching
        "learned": lambda folder: learn(inputs, folder),
        "stopped": lambda folder: stop_by_signal(to_come["learned"].result(), folder),
        "broken": lambda folder: break_two(to_come["learned"].result(), folder),
        "on_two_ranks": lambda folder: share_a_launch(
            inputs,
            to_come["learned"].result(),
            to_come["stopped"].result() if "stopped" in to_come else None,
            to_come["broken"].result() if "broken" in to_come else (),
            folder,
        ),
        "routed": lambda folder: learn_routed(inputs, folder),
        "history": lambda folder: make_history(inputs.backbone, folder),
        "methods": lambda folder: learn_by_methods(inputs, folder),
        "life": lambda folder: make_life(inputs.backbone, folder),
        "on_one_rank": lambda folder: make_mistakes(to_come["learned"].result(), folder),
    }
    two_ranks, plain = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
    for name, work in works.items():
        if name in needed:
            queue = two_ranks if name in ("learned", "stopped", "broken", "on_two_ranks", "routed") else plain
            to_come[name] = queue.submit(work, folders[name])
    yield to_come
    end_everything()
    for queue in (two_ranks, plain):
        queue.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def learned(launches) -> Learned:
    """Three tasks learned on two ranks, in two launches."""
    return launches["learned"].result()


@pytest.fixture(scope="session")
def stopped(launches) -> Stopped:
    """An increment on two ranks that got SIGTERM."""
    return launches["stopped"].result()


@pytest.fixture(scope="session")
def broken(launches) -> tuple[Outcome, ...]:
    """Increments on two ranks that were broken: one by a rank that stands still, one by killing `deepspeed`."""
    return launches["broken"].result()


@pytest.fixture(scope="session")
def on_two_ranks(launches) -> Shared:
    """Commands that share a launch of two ranks."""
    return launches["on_two_ranks"].result()


@pytest.fixture(scope="session")
def on_one_rank(launches) -> Made:
    """Mistakes, and one good command, in a plain process."""
    return launches["on_one_rank"].result()


@pytest.fixture(scope="session")
def methods(launches) -> dict[str, tuple[Path, Done]]:
    """The methods on two tasks in a plain process; {name: (work_dir, what became of it)}."""
    return launches["methods"].result()


@pytest.fixture(scope="session")
def history(launches) -> History:
    """New versions, new data and rejections in one work_dir."""
    return launches["history"].result()


@pytest.fixture(scope="session")
def life(launches) -> Life:
    """A champion restored and a task retired."""
    return launches["life"].result()


@pytest.fixture(scope="session")
def routed(launches) -> Routed:
    """Streams on backbones with routed experts, on two ranks and on four."""
    return launches["routed"].result()
