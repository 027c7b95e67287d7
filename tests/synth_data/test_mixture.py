"""What a set is made of: counted, guarded, and how diverse it is."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from audio_codec.errors import UserError
from synth_data.mixture import (
    INDEX,
    Count,
    GuardConfig,
    Index,
    Material,
    Shares,
    Summary,
    contrast,
    read_index,
    shares,
    summarize,
    write_index,
)
from synth_data.shards import Sample, write
from synth_data.tts import Word


def make(
    number: int, *, recorded: bool = False, human: bool = False, seconds: float = 2.0
) -> Sample:
    words = tuple(Word(text, 0.1 * i, 0.1 * i + 0.1) for i, text in enumerate(("one", "two")))
    return Sample(
        id=f"s{number}",
        text="one two",
        words=((), words),
        voices=("flite:rms", "ann/x" if recorded else "espeak:en-us+m3@rate=170"),
        source="people" if recorded else "quiz",
        licence="CC0",
        synthetic=not recorded,
        human_text=human,
        seconds=seconds,
        codes=np.full((2, 3, 25), number, np.uint16),
    )


def test_everything_is_counted_under_its_origin() -> None:
    summary = Summary.of([make(0), make(1), make(2, recorded=True, human=True, seconds=6)])
    assert summary.total == Count(samples=3, seconds=10, words=6, tokens=450)
    assert summary.count("speech", "recorded") == Count(samples=1, seconds=6, words=2, tokens=150)
    assert summary.count("text", "made").samples == 2
    assert summary.count("source", "quiz").seconds == 4
    # A channel each, without the settings of a voice; recordings have no engine.
    assert summary.by["engine"] == {
        "flite": Count(samples=2, seconds=4, words=0, tokens=150),
        "espeak": Count(samples=2, seconds=4, words=4, tokens=150),
    }
    assert set(summary.by["voice"]) == {"flite:rms", "espeak:en-us+m3", "ann/x"}
    assert summary.count("voice", "nobody") == Count()


def test_words_of_a_text_count_where_nobody_knows_their_times() -> None:
    sample = make(0).model_copy(update={"words": ((), ()), "text": "one two three"})
    assert Summary.of([sample]).total.words == 3


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.floats(0.1, 100)), max_size=8))
def test_summaries_add_up(kinds: list[tuple[bool, bool, float]]) -> None:
    samples = [
        make(i, recorded=recorded, human=human, seconds=seconds)
        for i, (recorded, human, seconds) in enumerate(kinds)
    ]
    half = len(samples) // 2
    both = Summary.of(samples[:half])
    both += Summary.of(samples[half:])
    whole = Summary.of(samples)
    assert both.total.samples == whole.total.samples
    assert both.total.seconds == pytest.approx(whole.total.seconds)
    assert {k: set(v) for k, v in both.by.items()} == {k: set(v) for k, v in whole.by.items()}
    assert Summary.model_validate_json(whole.model_dump_json()) == whole


# --- The guard ------------------------------------------------------------------------------------


def test_parts_count_by_their_weight() -> None:
    synthetic = Summary.of([make(i) for i in range(100)])
    recorded = Summary.of([make(0, recorded=True, human=True)])
    assert shares([(3, synthetic), (1, recorded)]) == Shares(0.25, 0.25)
    word = Count(words=1)
    text = Summary(total=word, by={"text": {"human": word}})
    # Text alone says nothing of speech.
    assert shares([(1, synthetic), (1, text)]) == Shares(0.0, 0.5)
    assert shares([(1, text)]) == Shares(None, 1.0)
    assert shares([]) == Shares(None, None)


def test_a_mixture_below_its_least_share_is_refused() -> None:
    guard = GuardConfig(recorded_speech=0.2, human_text=0.5)
    guard.check(Shares(0.2, 0.5), "it")
    guard.check(Shares(None, None), "it")
    with pytest.raises(UserError, match=r"it: recorded_speech is 10.0%, and guard.recorded_speech"):
        guard.check(Shares(0.1, 0.9), "it")
    with pytest.raises(UserError, match=r"human_text is 0.0%.*at least 50.0%"):
        guard.check(Shares(0.9, 0.0), "it")
    assert guard.asks and not GuardConfig().asks
    with pytest.raises(ValidationError):
        GuardConfig(human_text=1.5)


# --- Diversity ------------------------------------------------------------------------------------


def test_entropies_are_those_of_shannon() -> None:
    found = Material.of(["a b a b", "c d"]).diversity()
    assert found.words == 6
    assert found.unigrams == pytest.approx(2 / 3 * math.log2(3) + 1 / 3 * math.log2(6))
    # Of ab, ba, ab, cd: no pair crosses from one text to the next.
    assert found.bigrams == pytest.approx(1.5)
    assert found.trigrams == pytest.approx(1.0)
    assert (found.frames, found.codes) == (0, 0)
    alike = Material.of(["the same words"] * 20).diversity()
    assert alike.trigrams == 0 and alike.unigrams == pytest.approx(math.log2(3))


def test_codes_are_measured_on_the_first_codebook() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (2, 3, 4000)).astype(np.uint16)
    codes[:, 1:] = 7
    found = Material.of([make(0).model_copy(update={"codes": codes})]).diversity()
    assert found.frames == 8000
    assert found.codes == pytest.approx(4, abs=0.02) and found.code_pairs == pytest.approx(8, 0.02)


def test_equal_amounts_are_compared() -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdefghij"), 7)) for _ in range(300)]
    few, many = contrast(Material.of(texts[:30]), Material.of(texts))
    assert few.words == many.words == 210
    assert few == many  # The first 210 words are the same.
    dull, _ = contrast(Material.of(texts[:3] * 100), Material.of(texts))
    _, rich = contrast(Material.of(texts[:3] * 100), Material.of(texts))
    assert dull.words == rich.words == 2100 and dull.trigrams < rich.trigrams - 1


def test_only_a_beginning_is_read() -> None:
    read = []

    def texts():  # type: ignore[no-untyped-def]
        for number in range(10**9):
            read.append(number)
            yield "word " * 1000

    assert Material.of(texts()).words == 50_000
    assert len(read) == 50


# --- The index ------------------------------------------------------------------------------------


def test_an_index_is_believed_while_it_is_true(tmp_path: Path) -> None:
    write(tmp_path / "a-000000.tar", [make(0)])
    size = (tmp_path / "a-000000.tar").stat().st_size
    told = Summary.of([make(0), make(1)])  # Not what is in the shard.
    diversity = Material().diversity()
    assert read_index(tmp_path) == {}
    index = Index(shards={"a-000000.tar": size}, summary=told, diversity=diversity)
    write_index(tmp_path, "a", index)
    assert read_index(tmp_path) == {"a": index}
    assert summarize(tmp_path) == (told, 0)
    write(tmp_path / "b-000000.tar", [make(5)])
    summary, skipped = summarize(tmp_path)
    assert (summary.total.samples, skipped) == (2, 0)
    other = Index(shards={"b-000000.tar": size}, summary=told, diversity=diversity)
    write_index(tmp_path, "b", other)
    assert read_index(tmp_path) == {"a": index, "b": other}
    assert summarize(tmp_path)[0].total.samples == 4
    whole = (tmp_path / "a-000000.tar").read_bytes()
    (tmp_path / "a-000000.tar").write_bytes(whole[:1500])
    summary, skipped = summarize(tmp_path)
    assert (summary.total.samples, skipped) == (1, 1)
    (tmp_path / INDEX).write_text("{")
    assert read_index(tmp_path) == {}
    with pytest.raises(UserError, match="no shard"):
        summarize(tmp_path / "none")
