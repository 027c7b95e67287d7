"""Two nodes of a Ray cluster on this machine, for tests that want one."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

MARKS = [
    # Starting a cluster takes half a minute; ray's own processes leave sockets to the collector.
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@contextmanager
def two_nodes(*modules: ModuleType) -> Iterator[Any]:
    """Two nodes of one core each; their workers find `modules` of tests by their content."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    utils = pytest.importorskip("ray.cluster_utils")
    environment = os.environ.copy()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    made = utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        made.add_node(num_cpus=1)
        made.wait_for_nodes()
        for module in modules:
            ray.cloudpickle.register_pickle_by_value(module)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()
        os.environ.clear()
        os.environ.update(environment)


def kill_a_worker(folder: Path, shards: int, within: float = 120) -> int:
    """Kill a process that makes shards once some are in the folder; how many those were."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        done = len(list(folder.glob("*.tar")))
        for process in Path("/proc").glob("[0-9]*") if done >= shards else ():
            try:
                name = (process / "cmdline").read_bytes()
            except OSError:
                continue  # It has ended meanwhile.
            if name.startswith(b"ray::_make_shard"):
                os.kill(int(process.name), signal.SIGKILL)
                return done
        time.sleep(0.02)
    raise TimeoutError(f"no worker was at work on {folder} within {within} s")
