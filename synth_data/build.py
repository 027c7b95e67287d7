"""Builds shards with many workers: what to say is planned once, each shard is made by one process.

The plan is a pure function of the configuration, a shard is a pure function of its part of the
plan, and a shard appears in its folder only when whole. So the bytes do not depend on the number
of workers nor on where they run, and an interrupted build, started again, makes the missing shards
alone::

    plan ─> parts ─┬─> a process ─> speech-000000.tar ─┐
                   ├─> a process ─> speech-000001.tar ─┼─> index.json
                   └─> ...                            ─┘

A worker is a process of this machine, or a task on a Ray cluster; the folder is one that all of
them see: a local or shared disk, or a store such as ``s3://…``.

    speechlm synth speech configs/synth/speech_users.yaml workers=2
    speechlm synth speech configs/synth/speech_users.yaml output=s3://data/users --ray auto
"""

from __future__ import annotations

import importlib
import json
import logging
import multiprocessing
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from upath import UPath

from audio_codec.errors import UserError
from audio_codec.files import replacing, temporary_pattern
from synth_data.mixture import (
    GuardConfig,
    Index,
    Material,
    Summary,
    contrast,
    read_index,
    shares,
    unchanged,
    write_index,
)
from synth_data.shards import Location, Reader, Sample, shard_name, write

log = logging.getLogger(__name__)

_TOLD = 3  # Dropped samples that are named for each reason, without being asked.


@dataclass(frozen=True)
class Dropped:
    """A planned sample that could not be made or was not good enough."""

    id: str
    reason: str


@dataclass
class BuildReport:
    """What a build did."""

    samples: int = 0
    """Made now."""
    seconds: float = 0.0
    """Of sound, in the shards written now."""
    written: int = 0
    """Shards."""
    kept: int = 0
    """Shards that an earlier run had finished."""
    compute_seconds: float = 0.0
    """Spent in workers, summed over them."""
    dropped: list[Dropped] = field(default_factory=list)
    """Left out now."""
    summary: Summary = field(default_factory=Summary)
    """Of all shards, those of earlier runs too."""

    @property
    def speed(self) -> float:
        """Seconds of sound made in one second of one worker (0 when nothing was made)."""
        return self.seconds / self.compute_seconds if self.compute_seconds else 0.0

    @property
    def reasons(self) -> Counter[str]:
        """Why samples were dropped: how often, without the details that differ."""
        return Counter(_kind(dropped.reason) for dropped in self.dropped)


def _kind(reason: str) -> str:
    """A reason without what differs: names in quotes, numbers, and what a colon goes on to tell."""
    plain = re.sub(r"'[^']*'|\"[^\"]*\"|\d+([.,]\d+)*", "…", reason)
    head, *rest = re.split(r": | \(", plain)
    if rest and not re.search(r"\w+ \w+", head):  # "file …: …" says nothing yet
        head = f"{head}: {rest[0]}"
    return head.rstrip(".")


Part = TypeVar("Part")
Make = Callable[[Part], Iterable[Sample | Dropped]]


def run_shards(
    directory: Location,
    prefix: str,
    parts: Sequence[Part],
    make: Make[Part],
    *,
    workers: int = 1,
    fingerprint: str = "",
    ray: str | None = None,
    guard: GuardConfig | None = None,
    source: Iterable[str] = (),
) -> BuildReport:
    """Make one shard a part, skip what is there, show progress with the time left, write an index.

    A shard that is there but broken is made again. One build at a time may use a folder.

    Args:
        directory: where the shards go; a local folder or an fsspec URL.
        prefix: of their names.
        parts: what ``make`` turns into the samples of a shard; must pickle.
        make: a pure function (picklable, so of a module or a partial of one).
        workers: processes; 1 works in this one. Void on a cluster.
        fingerprint: names the plan; a folder that holds shards of another plan is refused.
        ray: address of a Ray cluster ("auto" finds the one at hand) that makes the shards.
        guard: what the finished set must not lack.
        source: texts that the set was made from; its diversity is reported beside theirs.

    Raises:
        UserError: the folder holds shards of another plan, cannot be written or is full; a worker
            died; the cluster cannot be reached; the set lacks what ``guard`` asks for.
    """
    folder = UPath(directory)
    _claim(folder / f"{prefix}.json", fingerprint, len(parts))
    paths = [folder / shard_name(prefix, index) for index in range(len(parts))]
    done = read_index(folder).get(prefix)
    finished = done is not None and len(done.shards) == len(paths) and unchanged(paths, done.shards)
    if done is not None and finished:
        report = BuildReport(kept=len(paths), summary=done.summary)
    else:
        tasks = list(zip(paths, parts, strict=True))
        made_by = _locally(tasks, make, workers) if ray is None else _on_ray(tasks, make, ray)
        report = _watch(prefix, len(tasks), made_by)
    if guard is not None:
        guard.check(shares([(1.0, report.summary)]), str(folder))
    if not finished:
        for left in folder.glob(temporary_pattern(f"{prefix}-*")):
            left.unlink(missing_ok=True)  # A killed worker's.
        write_index(folder, prefix, _index(paths, report.summary, source))
    return report


def _watch(prefix: str, total: int, made_by: Iterator[tuple[int, BuildReport]]) -> BuildReport:
    """Show progress and add up what was done, in the order of shards whoever finished first."""
    report, summaries = BuildReport(), dict[int, Summary]()
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
        bar = progress.add_task(prefix, total=total, hours=0.0)
        for index, made in made_by:
            report.samples += made.samples
            report.seconds += made.seconds
            report.written += made.written
            report.kept += made.kept
            report.compute_seconds += made.compute_seconds
            report.dropped += made.dropped
            summaries[index] = made.summary
            progress.update(bar, advance=1, hours=report.seconds / 3600)
    for index in sorted(summaries):
        report.summary += summaries[index]
    report.dropped.sort(key=lambda dropped: dropped.id)
    told = dict.fromkeys(report.reasons, 0)
    for dropped in report.dropped:
        told[_kind(dropped.reason)] += 1
        level = logging.WARNING if told[_kind(dropped.reason)] <= _TOLD else logging.INFO
        log.log(level, "dropped %s: %s", dropped.id, dropped.reason)
    return report


def _claim(marker: UPath, fingerprint: str, shards: int) -> None:
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


def _index(paths: Sequence[UPath], summary: Summary, source: Iterable[str]) -> Index:
    for path in paths:
        if not path.exists():
            raise UserError(
                f"output {str(path.parent)!r}: {path.name} was made but is not here; on a cluster "
                "the folder must be on a shared disk or in a store that every machine sees."
            )
    samples = chain.from_iterable(Reader(path, audio=False) for path in paths)
    built, origin = Material.of(samples), Material.of(source)
    diversity, beside = contrast(built, origin)
    return Index(
        shards={path.name: path.stat().st_size for path in paths},
        summary=summary,
        diversity=diversity,
        source=beside if origin.words else None,
    )


# --- Workers --------------------------------------------------------------------------------------


def _make_shard(path: UPath, make: Make[Part], part: Part) -> BuildReport:
    """Make a shard, or count what is in it when it is there and whole.

    On one thread, wherever it is: how a matrix product is shared out shows in its last bits, and
    they may decide a code.
    """
    if path.exists():
        reader = Reader(path, audio=False)
        summary = Summary.of(reader)
        if not reader.skipped:
            return BuildReport(kept=1, summary=summary)
        log.warning("%s is broken; it is made again", path)
    report = BuildReport(written=1)
    started = time.perf_counter()

    def kept() -> Iterator[Sample]:
        for result in make(part):
            if isinstance(result, Dropped):
                report.dropped.append(result)
            else:
                report.samples += 1
                report.seconds += result.seconds
                report.summary.add(result)
                yield result

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        write(path, kept())
    finally:
        torch.set_num_threads(threads)
    report.compute_seconds = time.perf_counter() - started
    return report


def _locally(
    tasks: Sequence[tuple[UPath, Part]], make: Make[Part], workers: int
) -> Iterator[tuple[int, BuildReport]]:
    if workers == 1 or len(tasks) <= 1:
        for index, (path, part) in enumerate(tasks):
            yield index, _make_shard(path, make, part)
        return
    # Spawned, not forked: torch's thread pool and the speech engines do not survive a fork.
    pool = ProcessPoolExecutor(
        min(workers, len(tasks)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_worker,
    )
    try:
        futures = {
            pool.submit(_make_shard, path, make, part): index
            for index, (path, part) in enumerate(tasks)
        }
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed (was there too little memory for so many?); the finished "
            "shards stand, and the same command goes on from there."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker() -> None:
    """What a spawned worker begins with: it ends when its parent does, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        # Where the main process is killed, a worker would wait for its next shard for good.
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _on_ray(
    tasks: Sequence[tuple[UPath, Part]], make: Make[Part], address: str
) -> Iterator[tuple[int, BuildReport]]:
    """Each shard a task of one core. Ray runs a task again whose worker or machine died.

    This package must be installed on every machine of the cluster.
    """
    try:
        # Typed here alike whether it is installed or not.
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise UserError(
            "ray is not installed; it comes with the extra 'cluster' (pip install "
            "'speechlm[cluster]')."
        ) from error
    joined = ray.is_initialized()
    if not joined:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"ray: no cluster at {address!r}: {reason}") from error
    task = ray.remote(num_cpus=1)(_make_shard)
    shared = ray.put(make)
    queue = iter(enumerate(tasks))
    running: dict[object, int] = {}
    try:
        while True:
            # Some wait in line, so that a cluster that can grow sees a reason to; not all, for the
            # plan need not travel before its time.
            room = 2 * max(1, int(ray.cluster_resources().get("CPU", 1))) - len(running)
            for _, (index, (path, part)) in zip(range(room), queue, strict=False):
                running[task.remote(path, shared, part)] = index
            if not running:
                return
            for reference in ray.wait(list(running), num_returns=1)[0]:
                yield running.pop(reference), ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        # The worker's own mistake, as it would be without a cluster.
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise UserError(
            f"ray: a shard was given up: {str(error).splitlines()[0]} The finished shards stand, "
            "and the same command goes on from there."
        ) from error
    finally:
        for reference in running:
            ray.cancel(reference)
        if not joined:
            ray.shutdown()
