"""The executor: whole shards or none, resumed by shard, the same bytes always."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from audio_codec.errors import UserError
from synth_data.build import BuildReport, Dropped, run_shards
from synth_data.shards import Sample, read, shard_paths


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
