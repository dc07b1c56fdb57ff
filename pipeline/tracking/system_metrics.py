"""Processor, memory, disk, network and devices of every host as MLflow measures them, on the running increment's run.

One rank of each host samples with MLflow's own monitors, in a thread that nobody waits for: metrics are named
`system/<host>/<metric>`, their step is the second of the run. While MLflow is away samples are kept, the newest few
hundred, and delivered when it answers; what is left at the end of the process is lost.
"""

import os
import socket
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import StreamConfig
from pipeline.placement.distributed import World
from pipeline.tracking.courier import short, warn
from pipeline.tracking.delivery import KEY_TAG
from pipeline.tracking.mlflow_log import Tracker, shown
from pipeline.tracking.registry import default_uri, equals, open_client

if TYPE_CHECKING:
    from mlflow.entities import Run

MOST_SAMPLES = 400  # that wait for MLflow: over an hour of them
SAMPLE_SECONDS = 10.0  # unless MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL says otherwise
LAST_SECONDS = 1.0  # most that the last sample of an increment is waited for
_DATABASE = "sqlite:///"


class HostMetrics:
    """The sampling thread of one host."""

    def __init__(self, uri: str, experiment: str, node: str | None = None) -> None:
        self.uri, self.experiment = uri, experiment
        self.node = node or socket.gethostname()
        self._waiting: deque[tuple[str, float, dict[str, float]]] = deque(maxlen=MOST_SAMPLES)  # key, Unix time, values
        self._key, self._wake, self._sampled = "", threading.Event(), threading.Event()
        self._runs: dict[str, Run] = {}
        self._client: Any = None
        self._problem: Exception | None = None
        threading.Thread(target=self._work, name="system-metrics", daemon=True).start()

    def follow(self, key: str, seconds: float = 0.0) -> None:
        """Sample for the run with this key from now on ("": for none), after a last sample for the run before, which
        is waited for at most so many `seconds`.
        """
        self._sampled.clear()
        self._key = key
        self._wake.set()
        if seconds:
            self._sampled.wait(seconds)

    def _work(self) -> None:
        from mlflow.environment_variables import MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL

        seconds = MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or SAMPLE_SECONDS
        monitors = _monitors()
        while True:
            key = self._key
            if not key:
                self._sampled.set()
                self._wake.wait()
                self._wake.clear()
                continue
            self._wake.wait(seconds)
            self._wake.clear()
            values: dict[str, float] = {}
            for monitor in monitors:
                monitor.collect_metrics()
                values |= monitor.aggregate_metrics()
                monitor.clear_metrics()
            self._waiting.append((key, time.time(), values))
            self._deliver()

    def _deliver(self) -> None:
        """Hand MLflow what waits, the oldest first; what it does not take now, or has no run for, stays."""
        try:
            for sample in list(self._waiting):
                if self._log(*sample):
                    self._waiting.remove(sample)
            self._problem = None
        except Exception as error:  # a server, a database driver and MLflow each raise their own
            if self._problem is None:
                warn(f"system metrics: MLflow at {shown(self.uri)} takes nothing at present ({short(error)})")
            self._problem, self._client = error, None

    def _log(self, key: str, at: float, values: dict[str, float]) -> bool:
        """Whether the sample's run is there, which then has it."""
        from mlflow.entities import Metric

        run = self._run(key)
        if run is None:
            return False
        began, now = run.info.start_time, int(1000 * at)
        second = max(0, (now - began) // 1000)
        metrics = [Metric(f"system/{self.node}/{name}", float(v), now, second) for name, v in values.items()]
        self._client.log_batch(run.info.run_id, metrics=metrics)
        return True

    def _run(self, key: str) -> "Run | None":
        """The run with this key, which rank 0 has made or is about to make."""
        if self._client is None:
            path = Path(self.uri.removeprefix(_DATABASE))
            if self.uri.startswith(_DATABASE) and not path.is_file():
                raise FileNotFoundError(f"{path} is not there yet")
            self._client = open_client(self.uri)
        if key not in self._runs:
            experiment = self._client.get_experiment_by_name(self.experiment)
            ids = [experiment.experiment_id] if experiment else []
            found = self._client.search_runs(ids, equals(f"tags.`{KEY_TAG}`", key), max_results=1) if ids else []
            if not found:
                return None
            self._runs[key] = found[0]
        return self._runs[key]


def _monitors() -> list[Any]:
    """MLflow's, those of devices where their libraries are there."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    for device in (GPUMonitor, ROCMMonitor):
        try:
            return [*monitors, device()]
        except Exception:  # of whatever kind: no library, no driver, no device
            continue
    return monitors


_metrics: HostMetrics | None = None
_told = False  # that this host's are not logged


def follow(config: StreamConfig, world: World, tracker: Tracker | None) -> None:
    """Sample this host for the running increment, where the stream wants it. `tracker` is rank 0's. Collective."""
    global _metrics, _told
    if not config.tracking.system_metrics:
        return
    key = world.broadcast(tracker.run_key() if tracker is not None else "")
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    uri = config.tracking.uri or default_uri(config.work_path())
    if uri.startswith(_DATABASE) and not world.is_main:  # a file that other hosts must not write, if they see it at all
        if not _told:
            warn(f"the system metrics of {socket.gethostname()} are not logged: name a server in tracking.uri")
        _told = True
        return
    if _metrics is None:
        _metrics = HostMetrics(uri, config.tracking.experiment)
    _metrics.follow(key)


def rest() -> None:
    """The increment is published: a last sample, and no more until `follow`."""
    if _metrics is not None:
        _metrics.follow("", LAST_SECONDS)
