"""The same shards from a cluster: two nodes on this machine, workers and a node that die."""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray_cluster

from audio_codec.errors import UserError
from synth_data.build import Dropped, run_shards
from synth_data.shards import Sample

ray = pytest.importorskip("ray", reason="ray is not installed")
pytestmark = ray_cluster.MARKS

PARTS = [list(range(start, start + 5)) for start in range(0, 60, 5)]


class Make:
    """Samples that a number decides; the first to come to ``deadly`` kills its own process."""

    def __init__(self, traces: Path, deadly: int | None = None, pause: float = 0.0) -> None:
        self.traces, self.deadly, self.pause = traces, deadly, pause

    def __call__(self, part: list[int]) -> Iterator[Sample | Dropped]:
        for number in part:
            time.sleep(self.pause)
            (self.traces / f"{number}-{os.getpid()}").touch()
            if number == self.deadly and len(list(self.traces.glob(f"{number}-*"))) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if number == 13:
                yield Dropped(f"n{number}", "unlucky")
                continue
            yield Sample(
                id=f"n{number}",
                text="",
                words=((),),
                voices=("x",),
                source="",
                licence="",
                synthetic=True,
                seconds=1.5,
                codes=np.random.default_rng(number).integers(0, 9, (1, 2, 20)).astype(np.uint16),
            )


def refuse(part: list[int]) -> Iterator[Sample]:
    raise UserError("this part is not to be made")
    yield


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with ray_cluster.two_nodes(sys.modules[__name__]) as made:
        yield made


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What this machine makes by itself."""
    folder = tmp_path_factory.mktemp("local")
    traces = tmp_path_factory.mktemp("traces")
    run_shards(folder, "n", PARTS, Make(traces), fingerprint="a")
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """A folder for the shards and one for the traces of who made them."""
    (tmp_path / "traces").mkdir()
    return tmp_path / "out", tmp_path / "traces"


def test_a_cluster_makes_the_same_bytes(
    cluster: Any, local: dict[str, bytes], places: tuple[Path, Path]
) -> None:
    out, traces = places
    report = run_shards(
        out, "n", PARTS, Make(traces, pause=0.05), fingerprint="a", ray=cluster.address
    )
    assert contents(out) == local
    assert (report.samples, report.written, len(report.dropped)) == (59, 12, 1)
    makers = {path.name.partition("-")[2] for path in traces.iterdir()}
    assert len(makers) > 1 and str(os.getpid()) not in makers
    again = run_shards(out, "n", PARTS, Make(traces), fingerprint="a", ray=cluster.address)
    assert (again.kept, again.written) == (12, 0)
    assert not ray.is_initialized()


def test_a_killed_worker_loses_nothing(
    cluster: Any, local: dict[str, bytes], places: tuple[Path, Path]
) -> None:
    out, traces = places
    report = run_shards(
        out, "n", PARTS, Make(traces, deadly=32), fingerprint="a", ray=cluster.address
    )
    assert len(list(traces.glob("32-*"))) == 2  # It did die, and somebody else went on.
    assert contents(out) == local and report.samples == 59


def test_a_mistake_of_a_worker_is_one_sentence(cluster: Any, places: tuple[Path, Path]) -> None:
    with pytest.raises(UserError) as caught:
        run_shards(places[0], "n", PARTS, refuse, ray=cluster.address)
    assert str(caught.value) == "this part is not to be made"
    assert not list(places[0].glob("*.tar"))


def test_a_lost_node_loses_nothing(
    cluster: Any, local: dict[str, bytes], places: tuple[Path, Path]
) -> None:
    out, traces = places
    lost = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="WARNING")
    try:
        make = Make(traces, pause=0.2)
        build = functools.partial(run_shards, out, "n", PARTS, make, fingerprint="a")
        thread = ThreadPoolExecutor(1).submit(build, ray=cluster.address)
        while len(list(traces.iterdir())) < 10:
            time.sleep(0.1)
        cluster.remove_node(lost, allow_graceful=False)
        report = thread.result(timeout=300)
    finally:
        ray.shutdown()
    assert contents(out) == local
    # A shard whose maker died before it could report is found there: kept, not made.
    assert report.summary.total.samples == 59 and report.kept + report.written == 12


def test_no_cluster_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no cluster at 'nonsense'"):
        run_shards(tmp_path, "n", PARTS, refuse, ray="nonsense")
