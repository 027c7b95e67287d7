"""Builds shards with many workers: what to say is planned once, each shard is made by one process.

The plan is a pure function of the configuration, a shard is a pure function of its part of the
plan, and a shard appears on disk only when whole. So the bytes do not depend on the number of
workers, and an interrupted build, started again, makes the missing shards alone.

    speechlm synth speech configs/synth/shipped_users.yaml workers=2
"""

import json
import logging
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from audio_codec.errors import UserError
from audio_codec.files import replacing
from synth_data.shards import Sample, shard_name, write

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dropped:
    """A planned sample that could not be made or was not good enough."""

    id: str
    reason: str


@dataclass
class BuildReport:
    """What a build did."""

    samples: int = 0
    seconds: float = 0.0
    """Of sound, in the shards written now."""
    written: int = 0
    """Shards."""
    kept: int = 0
    """Shards that an earlier run had finished."""
    compute_seconds: float = 0.0
    """Spent in workers, summed over them."""
    dropped: list[Dropped] = field(default_factory=list)

    @property
    def speed(self) -> float:
        """Seconds of sound made in one second of one worker (0 when nothing was made)."""
        return self.seconds / self.compute_seconds if self.compute_seconds else 0.0


Part = TypeVar("Part")


def run_shards(
    directory: Path,
    prefix: str,
    parts: Sequence[Part],
    make: Callable[[Part], Iterable[Sample | Dropped]],
    *,
    workers: int = 1,
    fingerprint: str = "",
) -> BuildReport:
    """Make one shard a part, skip what is there, show progress with the time left.

    Args:
        directory: where the shards go.
        prefix: of their names.
        parts: what ``make`` turns into the samples of a shard; must pickle.
        make: a pure function (picklable, so of a module or a partial of one).
        workers: processes; 1 works in this one.
        fingerprint: names the plan; a folder that holds shards of another plan is refused.

    Raises:
        UserError: the folder holds shards of another plan.
    """
    _claim(directory / f"{prefix}.json", fingerprint, len(parts))
    report = BuildReport()
    todo = []
    for index, part in enumerate(parts):
        path = directory / shard_name(prefix, index)
        if path.exists():
            report.kept += 1
        else:
            todo.append((path, part))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("shards, {task.fields[hours]:.2f} h"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(prefix, total=len(parts), completed=report.kept, hours=0.0)
        for made in _run(todo, make, workers):
            report.samples += made.samples
            report.seconds += made.seconds
            report.written += made.written
            report.compute_seconds += made.compute_seconds
            report.dropped += made.dropped
            progress.update(task, advance=1, hours=report.seconds / 3600)
    report.dropped.sort(key=lambda dropped: dropped.id)
    for dropped in report.dropped:
        log.info("dropped %s: %s", dropped.id, dropped.reason)
    return report


def _claim(marker: Path, fingerprint: str, shards: int) -> None:
    plan = {"fingerprint": fingerprint, "shards": shards}
    if marker.exists():
        if json.loads(marker.read_text()) != plan:
            raise UserError(
                f"output {str(marker.parent)!r} holds shards of another plan (its configuration or "
                "its texts have changed); choose another folder or delete it"
            )
        return
    with replacing(marker) as temporary:
        temporary.write_text(json.dumps(plan))


def _run(
    todo: Sequence[tuple[Path, Part]],
    make: Callable[[Part], Iterable[Sample | Dropped]],
    workers: int,
) -> Iterator[BuildReport]:
    if workers == 1 or len(todo) <= 1:
        for path, part in todo:
            yield _make_shard(path, make, part)
        return
    # Spawned, not forked: torch's thread pool and the speech engines do not survive a fork.
    pool = ProcessPoolExecutor(
        min(workers, len(todo)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    )
    try:
        futures = [pool.submit(_make_shard, path, make, part) for path, part in todo]
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _make_shard(
    path: Path, make: Callable[[Part], Iterable[Sample | Dropped]], part: Part
) -> BuildReport:
    report = BuildReport(written=1)
    started = time.perf_counter()

    def kept() -> Iterator[Sample]:
        for result in make(part):
            if isinstance(result, Dropped):
                report.dropped.append(result)
            else:
                report.samples += 1
                report.seconds += result.seconds
                yield result

    write(path, kept())
    report.compute_seconds = time.perf_counter() - started
    return report
