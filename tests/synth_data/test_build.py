"""The executor: whole shards or none, resumed by shard, the same bytes always."""

from __future__ import annotations

import errno
import functools
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from kills import die_at_random_moments
from upath import UPath

from audio_codec.errors import UserError
from synth_data import shards
from synth_data.build import BuildReport, Dropped, run_shards
from synth_data.mixture import INDEX, GuardConfig, read_index, summarize
from synth_data.shards import Reader, Sample, read, shard_paths


def make_part(part: list[int]) -> Iterator[Sample | Dropped]:
    """Samples that drop multiples of three, and die at 100."""
    for number in part:
        if number == 100:
            raise RuntimeError("died")
        if number % 3 == 0:
            yield Dropped(f"n{number}", "a multiple of three")
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
        )


def test_reasons_are_counted_without_their_details() -> None:
    said = [
        "word error rate 0.61 of 'a b'",
        "word error rate 1.20 of 'c'",
        "no JSON: x",
        "binary",
        "could not be said (fault 7)",
        "recording '/a/1.wav' has 1 channel; expected 2.",
        "recording '/a/2.wav' has 3 channels; expected 2.",
        "file 'a.json': no such word in it.",
    ]
    report = BuildReport(dropped=[Dropped(str(i), reason) for i, reason in enumerate(said)])
    assert report.reasons == {
        "word error rate … of …": 2,
        "no JSON": 1,
        "binary": 1,
        "could not be said": 1,
        "recording … has … channel; expected …": 1,
        "recording … has … channels; expected …": 1,
        "file …: no such word in it": 1,
    }


def test_run_shards_counts_and_leaves_whole_shards_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RuntimeError, match="died"):
        run_shards(tmp_path, "n", [[1, 2, 3], [4, 100], [5]], make_part, fingerprint="a")
    assert [path.name for path in shard_paths(tmp_path)] == ["n-000000.tar"]
    with caplog.at_level(logging.INFO):
        report = run_shards(tmp_path, "n", [[1, 2, 3], [4, 6], [5]], make_part, fingerprint="a")
    assert report.dropped == [Dropped("n6", "a multiple of three")]
    assert "dropped n6: a multiple of three" in caplog.text
    assert (report.samples, report.seconds, report.written, report.kept) == (2, 3.0, 2, 1)
    assert [sample.id for sample in read(tmp_path)] == ["n1", "n2", "n4", "n5"]
    with pytest.raises(UserError, match="another plan"):
        run_shards(tmp_path, "n", [[1]], make_part, fingerprint="b")
    assert BuildReport().speed == 0


def contents(folder: Path | UPath) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


PARTS = [list(range(start, start + 5)) for start in range(1, 51, 5)]


def coded(part: list[int], pause: float = 0.0) -> Iterator[Sample | Dropped]:
    """Samples with codes, drawn from their number, slowly if need be."""
    for made in make_part(part):
        time.sleep(pause)
        if isinstance(made, Dropped):
            yield made
            continue
        rng = np.random.default_rng(int(made.id[1:]))
        codes = rng.integers(0, 99, (1, 4, 500)).astype(np.uint16)
        yield made.model_copy(update={"codes": codes, "text": f"number {made.id}"})


def threads(part: list[int]) -> Iterator[Sample | Dropped]:
    """Samples that say on how many threads they were made."""
    for made in make_part(part):
        if isinstance(made, Sample):
            yield made.model_copy(update={"text": str(torch.get_num_threads())})


def test_a_shard_is_made_on_one_thread_wherever_it_is(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run_shards(tmp_path, "n", PARTS[:2], threads)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert {sample.text for sample in read(tmp_path)} == {"1"}


# --- The index ------------------------------------------------------------------------------------


def test_an_index_stands_beside_the_shards(tmp_path: Path) -> None:
    source = ["number one", "number two"]
    report = run_shards(tmp_path, "n", PARTS, coded, fingerprint="a", source=source)
    index = read_index(tmp_path)["n"]
    assert index.summary == report.summary == summarize(tmp_path)[0]
    assert index.summary.total.samples == report.samples == 34
    assert index.summary.total.tokens == 34 * 2000
    assert index.shards == {p.name: p.stat().st_size for p in shard_paths(tmp_path)}
    assert index.source is not None and index.diversity.words == index.source.words == 4
    assert index.diversity.frames == 34 * 500 and 6 < index.diversity.codes < 6.7
    before = contents(tmp_path)
    again = run_shards(tmp_path, "n", PARTS, coded, fingerprint="a", source=source)
    assert (again.kept, again.written, again.samples) == (10, 0, 0)
    assert again.summary == report.summary and contents(tmp_path) == before


def test_a_set_below_its_guard_gets_no_index(tmp_path: Path) -> None:
    guard = GuardConfig(recorded_speech=0.1)
    for _ in range(2):
        with pytest.raises(UserError, match=r"recorded_speech is 0.0%"):
            run_shards(tmp_path, "n", PARTS, coded, guard=guard)
    assert not (tmp_path / INDEX).exists()


# --- What happens to folders and processes --------------------------------------------------------


def test_a_broken_shard_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_shards(tmp_path, "n", PARTS, coded)
    whole = contents(tmp_path)
    shard = tmp_path / "n-000003.tar"
    shard.write_bytes(whole["n-000003.tar"][:12_000])
    broken = Reader(shard)
    assert [sample.id for sample in broken] == ["n16"] and broken.skipped == 1
    report = run_shards(tmp_path, "n", PARTS, coded)
    assert (report.kept, report.written) == (9, 1) and "n-000003.tar is broken" in caplog.text
    assert contents(tmp_path) == whole


def test_a_store_is_as_good_as_a_disk(tmp_path: Path) -> None:
    run_shards(tmp_path, "n", PARTS, coded, fingerprint="a")
    store = UPath("memory://test-build/set")
    report = run_shards(str(store), "n", PARTS, coded, fingerprint="a")
    assert contents(store) == contents(tmp_path)
    assert [s.id for s in read(store)] == [s.id for s in read(tmp_path)]
    (store / "n-000002.tar").unlink()
    (store / ".n-000002.tar.0123abcd.tmp").write_bytes(b"half")  # Of a killed worker.
    report = run_shards(store, "n", PARTS, coded, fingerprint="a")
    assert (report.kept, report.written) == (9, 1)
    assert contents(store) == contents(tmp_path)
    with pytest.raises(UserError, match="another plan"):
        run_shards(store, "n", PARTS, coded, fingerprint="b")


def test_a_store_never_shows_half_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    store = UPath("memory://test-build/lost")

    def lost(self: object, local: str, remote: str, **options: object) -> None:
        UPath(f"memory:/{remote}").write_bytes(Path(local).read_bytes()[:1000])
        raise ConnectionError("the line is dead")

    monkeypatch.setattr(type(store.fs), "put_file", lost)
    with pytest.raises(UserError, match="Cannot write memory://test-build/lost.*the line is dead"):
        shards.write(store / "a.tar", coded([1, 2]))
    assert not (store / "a.tar").exists()
    with pytest.raises(UserError, match="no shard"):
        shard_paths(store)


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullDisk:
        """A file on a disk that has room for two blocks."""

        def __init__(self, path: Path, mode: str) -> None:
            self.file, self.room = path.open(mode), 2 * 512

        def write(self, data: bytes) -> int:
            self.room -= len(data)
            if self.room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

    monkeypatch.setattr(shards.tarfile, "bltn_open", FullDisk)
    with pytest.raises(UserError, match=r"Cannot write .*n-000000\.tar: No space left on device"):
        run_shards(tmp_path, "n", PARTS, coded)
    assert list(contents(tmp_path)) == ["n.json"]
    monkeypatch.undo()
    assert run_shards(tmp_path, "n", PARTS, coded).samples == 34


def test_a_folder_that_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is no folder"):
        run_shards(tmp_path / "file" / "out", "n", PARTS, coded)
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_one_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="may not be written"):
        run_shards(tmp_path / "out", "n", PARTS, coded)


def test_killed_at_random_moments_it_ends_in_the_same_bytes(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    make = functools.partial(coded, pause=0.005)

    def build(folder: Path) -> None:
        run_shards(folder, "n", PARTS, make, fingerprint="a", source=["a b", "c"])

    started = time.monotonic()
    build(whole)
    duration = time.monotonic() - started
    seen = set()

    def look() -> None:
        present = sorted(killed.glob("*.tar"))
        seen.add(len(present))
        for path in present:  # What is there is whole.
            assert path.read_bytes() == (whole / path.name).read_bytes()

    die_at_random_moments(lambda: build(killed), 0.25 * duration, look)
    assert len(seen) > 3  # It was stopped at many places, and went on.
    build(killed)
    assert contents(killed) == contents(whole)


@pytest.mark.slow
def test_no_worker_outlives_a_killed_build(tmp_path: Path) -> None:
    # A program of its own, for workers are spawned from what the main program is.
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from synth_data.build import run_shards\n"
        "def make(part):\n"
        "    Path(sys.argv[1], f'worker-{os.getpid()}').touch()\n"
        "    time.sleep(0.2)\n"
        "    return ()\n"
        "if __name__ == '__main__':\n"
        "    run_shards(sys.argv[1], 'n', range(1000), make, workers=2)\n"
    )
    out = tmp_path / "out"
    out.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path(shards.__file__).parents[1])}
    child = subprocess.Popen(
        [sys.executable, program, out], stdout=subprocess.DEVNULL, env=environment
    )
    try:
        deadline = time.monotonic() + 200
        while len(list(out.glob("worker-*"))) < 2 and time.monotonic() < deadline:
            assert child.poll() is None
            time.sleep(0.2)
    finally:
        child.kill()
        child.wait()
    workers = [int(path.name.partition("-")[2]) for path in out.glob("worker-*")]
    assert len(workers) == 2
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)
