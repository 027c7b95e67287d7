"""Shards read back what was written, and survive what happens to files."""

from __future__ import annotations

import gc
import io
import logging
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from audio_codec.errors import UserError
from synth_data.shards import (
    Event,
    Reader,
    Sample,
    ShardWriter,
    read,
    shard_paths,
    webdataset,
    write,
)
from synth_data.tts import Word


def make(number: int, channels: int = 1, audio: bool = True, codes: bool = True) -> Sample:
    rng = np.random.default_rng(number)
    return Sample(
        id=f"s-{number:04d}",
        text="two plus three?",
        words=tuple((Word("two", 0.1, 0.25), Word("plus", 0.25, 0.5)) for _ in range(channels)),
        voices=tuple(f"espeak:en-us+m{c + 1}" for c in range(channels)),
        source="quiz",
        licence="Apache-2.0",
        synthetic=True,
        seconds=0.2,
        wer=0.25,
        events=(Event(kind="turn", channel=0, start=0.1, end=0.5, meta={"answer": "five"}),),
        meta={"number": number},
        pcm=rng.uniform(-1, 1, (channels, 4800)).astype(np.float32) if audio else None,
        codes=rng.integers(0, 2**16, (channels, 8, 3), dtype=np.uint16) if codes else None,
    )


def same(a: Sample, b: Sample) -> bool:
    """Equal to the last bit, sound to half a step of its 16."""
    if a.model_dump() != b.model_dump():
        return False
    if (a.codes is None) != (b.codes is None) or (a.pcm is None) != (b.pcm is None):
        return False
    codes = a.codes is None or np.array_equal(a.codes, b.codes)
    # The top step of 16 bits is 1 - 2**-15.
    return codes and (a.pcm is None or bool(np.abs(a.pcm - b.pcm).max() <= 2**-15))


def corrupt(path: Path, member: str, data: bytes) -> None:
    """Replace one member's content."""
    with tarfile.open(path) as tar:
        members = [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            content = data if name == member else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@settings(max_examples=20, deadline=None)
@given(channels=st.integers(1, 3), audio=st.booleans(), codes=st.booleans(), n=st.integers(1, 4))
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, channels: int, audio: bool, codes: bool, n: int
) -> None:
    path = tmp_path_factory.mktemp("shards") / "a.tar"
    samples = [make(number, channels, audio, codes) for number in range(n)]
    assert write(path, samples) == n
    assert all(same(a, b) for a, b in zip(samples, read(path), strict=True))


def test_writer_rolls_over_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "part", max_samples=3) as writer:
        for number in range(7):
            writer.write(make(number, audio=False))
    names = ["part-000000.tar", "part-000001.tar", "part-000002.tar"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert [path.name for path in writer.paths] == names
    assert [sample.meta["number"] for sample in read(tmp_path)] == list(range(7))
    assert len(list(read(tmp_path / "part-00000[01].tar"))) == 6


def test_shards_are_deterministic(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write(tmp_path / name, [make(0), make(1)])
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_an_interrupted_write_leaves_what_stood_there(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write(path, [make(0)])
    before = path.read_bytes()

    def samples():  # type: ignore[no-untyped-def]
        yield make(1)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        write(path, samples())
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("member", "data"),
    [
        ("s-0001.json", b"{"),
        ("s-0001.json", b'{"version": 1}'),
        ("s-0001.json", make(1).model_dump_json().replace('"version":1', '"version":99').encode()),
        ("s-0001.flac", b"fLaC but no more"),
        ("s-0001.codes.npy", b"\x93NUMPY"),
        ("s-0001.codes.npy", b""),
    ],
)
def test_corrupt_members_are_skipped_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, member: str, data: bytes
) -> None:
    path = tmp_path / "a.tar"
    write(path, [make(0), make(1), make(2)])
    corrupt(path, member, data)
    reader = Reader(path)
    with caplog.at_level(logging.WARNING):
        assert [sample.id for sample in reader] == ["s-0000", "s-0002"]
    assert reader.skipped == 1
    assert "s-0001" in caplog.text and "a.tar" in caplog.text


def test_a_truncated_shard_gives_what_is_whole(tmp_path: Path) -> None:
    samples = [make(number) for number in range(2)]
    write(tmp_path / "a.tar", samples)
    write(tmp_path / "b.tar", [make(9)])
    data = (tmp_path / "a.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        ends = [info.offset_data + (info.size + 511) // 512 * 512 for info in tar]
    cuts = {0, 100, 512, *ends, *(end - 700 for end in ends), *(end + 300 for end in ends)}
    counts = []
    for cut in sorted(cuts):
        (tmp_path / "a.tar").write_bytes(data[:cut])
        reader = Reader(tmp_path)
        *got, following = reader
        assert following.id == "s-0009"  # The next shard is read all the same.
        assert reader.skipped == 1, cut
        assert all(same(a, b) for a, b in zip(samples, got, strict=False))
        counts.append(len(got))
    assert counts == sorted(counts) and set(counts) == {0, 1, 2}


def test_sound_can_be_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", [make(0)])
    (sample,) = read(tmp_path / "a.tar", audio=False)
    assert sample.pcm is None and sample.codes is not None


def test_channels_must_agree() -> None:
    fields = dict(make(0))
    with pytest.raises(ValidationError, match="words has 1 channels, voices 2"):
        Sample(**{**fields, "voices": ("a", "b")})
    with pytest.raises(ValidationError, match="pcm has shape"):
        Sample(**{**fields, "pcm": np.zeros((2, 10), np.float32)})
    with pytest.raises(ValidationError, match="id"):
        Sample(**{**fields, "id": "a.b"})  # A dot would split the key of the tar members.


def test_webdataset_reads_the_same(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "part", max_samples=2) as writer:
        for number in range(5):
            writer.write(make(number))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # The library leaves its tars open.
        got = list(webdataset(tmp_path))
        gc.collect()
    assert all(same(a, b) for a, b in zip(read(tmp_path), got, strict=True))


def test_no_shards_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no shard"):
        shard_paths(tmp_path)
    with pytest.raises(UserError, match="no shard"):
        read(tmp_path / "x-*.tar")
