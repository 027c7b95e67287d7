"""Interleaved shards: every word once, codes where they belong, the same bytes after any death."""

from __future__ import annotations

import itertools
import json
import lzma
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kills import Killed, die_at_random_moments
from small import TOKENIZER, small_text_to_token

from audio_codec import checkpoint
from audio_codec.errors import UserError
from audio_codec.speech_tokenizer import SpeechTokenizer
from synth_data.corpus import TextConfig, build_text
from synth_data.interleave import SPAN_RULES, read_segments
from synth_data.mixture import read_index
from synth_data.recipes import interleave as room
from synth_data.recipes.interleave import (
    InterleaveRecipe,
    build_interleaved,
    cut,
    documents,
    plan,
    sentence_ends,
)
from synth_data.shards import Sample, read
from synth_data.text import normalize, tokenize
from synth_data.text_to_token import Line, Spoken

SENTENCES = [
    f"The {animal} {verb} the {thing}." for animal, verb, thing in itertools.product(
        ("cat", "old dog", "horse"), ("sees", "does not see"), ("tree", "blue house", "river")
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = small_text_to_token()
    folder = tmp_path_factory.mktemp("model") / "text_to_token"
    return checkpoint.save(folder, made.config, made.float().state_dict(), dtype="fp32")


@pytest.fixture
def corpus(tmp_path: Path) -> list[dict[str, Any]]:
    (tmp_path / "plain.txt").write_text("\n\n".join(SENTENCES) + "\n")
    lines = [
        json.dumps({"text": "Numbers like 21 are spelled. " * 3, "licence": "CC0", "source": "me"}),
        json.dumps({"question": "What is 2 plus 2?", "answer": "It is 4."}),
        "no JSON",
        json.dumps({"title": "no text"}),
        json.dumps({"text": "..."}),
        json.dumps({"text": "PK\3\4 half a zip \0"}),
        json.dumps(["a list"]),
        "[" * 99_999,
        json.dumps({"text": "x" * 10 * 2**20}),
        json.dumps({"text": "The last one."}),
    ]
    with lzma.open(tmp_path / "found.jsonl.xz", "wb") as file:
        file.write("\n".join(lines).encode() + b"\n\xff\xfe\n")
    return [
        {"kind": "text", "path": tmp_path / "plain.txt", "licence": "CC0", "lines": 3},
        {"kind": "documents", "path": tmp_path / "found.jsonl.xz", "licence": "unknown"},
        {"kind": "quiz", "documents": 12},
    ]


def config_of(
    output: Path, model: Path, sources: list[dict[str, Any]], **changes: object
) -> InterleaveRecipe:
    layout = {
        "output": output,
        "model": str(model),
        "sources": sources,
        "spans": {"mean_words": 3, "speech_ratio": 0.4},
        "max_words": 12,
        "line_words": 5,
        "generation": {"batch": 8, "shortest": 0, "longest": 4, "stuck": 999},
        "precision": "fp32",
        "shard_size": 4,
    }
    return InterleaveRecipe.model_validate({**layout, **changes})


def built(config: InterleaveRecipe) -> list[Sample]:
    build_interleaved(config)
    return list(read(config.output))


def test_every_word_is_said_or_written_and_codes_are_where_they_belong(
    model: Path, corpus: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = config_of(tmp_path / "out", model, corpus)
    report = build_interleaved(config)
    samples = list(read(config.output))
    assert report.samples == len(samples) and len({s.id for s in samples}) == len(samples)
    reasons = sorted(dropped.reason.split(":")[0] for dropped in report.dropped)
    faulty = [reason for reason in reasons if reason.startswith("could not be said")]
    assert len(faulty) < len(samples) / 4
    assert [reason for reason in reasons if reason not in faulty] == [
        "binary",
        "it has no word to say",
        "its line is longer than 1048576 bytes",
        "neither a text nor a question and an answer in it",
        "neither a text nor a question and an answer in it",
        "no JSON",
        "no JSON",
        "no JSON",
    ]
    rules = set()
    for sample in samples:
        assert sample.codes is not None
        segments = read_segments(sample.meta)
        rules.add(sample.meta["rule"])
        frames = 0
        for segment in segments:
            assert (segment.first, segment.text != "") == (frames, True)
            assert (segment.last > frames) == (segment.modality == "speech")
            frames = segment.last
        assert sample.codes.shape == (1, 1, frames) and sample.codes.max(initial=0) < 12
        assert sample.seconds == frames / 12.5
        once = segments[:1] if sample.meta["rule"] in ("asr", "tts") else segments
        assert " ".join(s.text for s in once) == sample.text
        if sample.meta["rule"] in ("asr", "tts"):
            assert segments[0].text == segments[1].text
        assert len(sample.text.split()) <= 12 or sample.source == "quiz"
    assert {"speech_first", "text_first", "question_speech_answer_text"} <= rules
    plain = [s for s in samples if s.source == "plain.txt"]
    if not any("-0-" in dropped.id for dropped in report.dropped):
        said = " ".join(s.text for s in sorted(plain, key=lambda s: s.id))
        assert normalize(said) == normalize(" ".join(SENTENCES))
    mine = [s for s in samples if s.source == "me"]
    assert mine and all(s.licence == "CC0" and "twenty one" in s.text for s in mine)
    assert all(s.synthetic and s.voices == ("text-to-token",) for s in samples)
    assert all(s.human_text == (s.source != "quiz") for s in samples)
    spans = config.spans.model_dump()
    assert spans["unit"] == "word" and spans["order"] == "random" and spans["min_gap"] == 1
    laid = {True: spans, False: None}
    for sample in samples:
        assert sample.meta.get("spans") == laid[sample.meta["rule"] in SPAN_RULES]


def test_a_build_killed_anywhere_goes_on_to_the_same_bytes(
    model: Path,
    corpus: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = config_of(tmp_path / "whole", model, corpus)
    build_interleaved(whole)
    parts = whole.model_copy(update={"output": tmp_path / "parts"})
    generate, left = room.generate, 0

    def dies(*arguments: Any) -> list[Spoken]:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return generate(*arguments)

    monkeypatch.setattr(room, "generate", dies)
    for lives in range(3):
        left = lives
        with pytest.raises(Killed):
            build_interleaved(parts)
    monkeypatch.setattr(room, "generate", generate)
    report = build_interleaved(parts)
    shards = sorted(path.name for path in whole.output.glob("*.tar"))
    assert report.kept == 3 and report.written == len(shards) - 3
    assert sorted(path.name for path in parts.output.glob("*")) == sorted(
        path.name for path in whole.output.glob("*")
    )
    for name in shards:
        assert (whole.output / name).read_bytes() == (parts.output / name).read_bytes()


# From Python 3.12 on, a fork beside torch's threads warns; the child works on one thread.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_at_twenty_random_moments_it_ends_in_the_same_bytes(
    model: Path, corpus: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)  # Of a pool of threads a fork would keep the locks.
    sources = [*corpus[:2], {**corpus[2], "documents": 60}]
    whole = config_of(tmp_path / "whole", model, sources)
    killed = whole.model_copy(update={"output": tmp_path / "killed"})
    started = time.monotonic()
    build_interleaved(whole)
    duration = time.monotonic() - started
    seen = set()

    def look() -> None:
        seen.add(len(list((tmp_path / "killed").glob("*.tar"))))

    die_at_random_moments(lambda: build_interleaved(killed), 0.3 * duration, look)
    assert len(seen) > 3
    build_interleaved(killed)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_memory_does_not_grow_with_the_corpus(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(model: object, lines: Sequence[Line], config: object) -> list[Spoken]:
        return [Spoken(np.zeros(5, np.uint16), None) for _ in lines]

    monkeypatch.setattr(room, "generate", said)
    peaks = []
    for documents_ in (40, 400):
        path = tmp_path / f"{documents_}.txt"
        path.write_text("\n".join(itertools.islice(itertools.cycle(SENTENCES), documents_)))
        source = {"kind": "text", "path": path, "licence": "CC0", "lines": 1}
        config = config_of(tmp_path / f"out{documents_}", model, [source], shard_size=20)
        tracemalloc.start()
        assert build_interleaved(config).samples == documents_
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Ten times the documents: what grows is the index's measure of diversity, up to its bound.
    assert peaks[1] < 2 * peaks[0] + 2_000_000


@pytest.mark.slow
def test_the_number_of_workers_changes_no_byte(
    model: Path, corpus: list[dict[str, Any]], tmp_path: Path
) -> None:
    one = config_of(tmp_path / "one", model, corpus, precision="bf16")
    two = one.model_copy(update={"output": tmp_path / "two", "workers": 2})
    build_interleaved(one)
    build_interleaved(two)
    for shard in one.output.glob("*.tar"):
        assert shard.read_bytes() == (two.output / shard.name).read_bytes()


def test_changed_texts_are_another_plan(
    model: Path, corpus: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = config_of(tmp_path / "out", model, corpus)
    build_interleaved(config)
    assert build_interleaved(config).written == 0
    text = tmp_path / "plain.txt"
    text.write_text(text.read_text().replace("cat", "cow"))
    with pytest.raises(UserError, match="another plan"):
        build_interleaved(config)


def test_a_shard_reads_its_own_lines_alone(
    model: Path, corpus: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = config_of(tmp_path / "out", model, corpus)
    parts, _ = plan(config)
    assert [(p.source, p.first, p.count) for p in parts] == [
        (0, 0, 4), (0, 4, 2), (1, 0, 4), (1, 4, 4), (1, 8, 3), (2, 0, 4), (2, 4, 4), (2, 8, 4),
    ]  # fmt: skip
    large = config.model_copy(update={"shard_size": 1000})
    whole, _ = plan(large)
    for source in range(3):
        in_parts = [d for p in parts if p.source == source for d in documents(p, config)]
        assert in_parts == [d for p in whole if p.source == source for d in documents(p, large)]


def test_what_is_said_is_read_back(
    model: Path, corpus: list[dict[str, Any]], tmp_path: Path
) -> None:
    tokenizer = tmp_path / "tokenizer"
    checkpoint.save(tokenizer, TOKENIZER, SpeechTokenizer(TOKENIZER).state_dict(), dtype="fp32")
    check = {"tokenizer": str(tokenizer), "drop_above": 99.0}
    other = small_text_to_token(codebook=(3, 3))
    folder = tmp_path / "other"
    checkpoint.save(folder, other.config, other.float().state_dict(), dtype="fp32")
    quiz = corpus[2:]
    lenient = built(config_of(tmp_path / "all", folder, quiz, check=check))
    assert lenient and all((s.wer is not None) == bool(s.seconds) for s in lenient)
    strict = config_of(tmp_path / "none", folder, quiz, check={**check, "drop_above": 1e-6})
    report = build_interleaved(strict)
    assert report.samples == sum(s.wer is None for s in lenient)
    assert any(dropped.reason.startswith("word error rate") for dropped in report.dropped)


def test_clean_text_is_a_source(model: Path, tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("\n".join(SENTENCES))
    clean = {
        "output": tmp_path / "clean",
        "sources": [{"path": str(tmp_path / "some.txt"), "licence": "CC0", "name": "some"}],
        "dedup": None,
        "shard_characters": 900,
    }
    build_text(TextConfig.model_validate(clean))
    files = sorted((tmp_path / "clean").glob("text-*.jsonl"))
    source = {"kind": "documents", "path": tmp_path / "clean", "licence": "?", "human": False}
    config = config_of(tmp_path / "out", model, [source])
    parts, contents = plan(config)
    assert len(files) > 1 and len(contents) == len(files) == 1 + max(p.file for p in parts)
    assert [p.first for p in parts[1:]] == list(itertools.accumulate(p.count for p in parts))[:-1]
    found = [d for part in parts for d in documents(part, config)]
    assert [d.utterances for d in found if isinstance(d, room.Document)] == [
        (s,) for s in SENTENCES
    ]
    samples = built(config)
    assert samples and {(s.source, s.licence, s.human_text) for s in samples} == {
        ("some", "CC0", False)
    }
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no text-"):
        plan(config_of(tmp_path / "o", model, [{**source, "path": tmp_path / "none"}]))


def test_too_little_of_people_is_refused(
    model: Path, corpus: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = config_of(tmp_path / "out", model, corpus, guard={"human_text": 0.99})
    with pytest.raises(UserError, match="human_text is"):
        build_interleaved(config)
    assert read_index(tmp_path / "out") == {}
    hopeless = config_of(tmp_path / "none", model, corpus[2:], guard={"human_text": 0.01})
    with pytest.raises(UserError, match="planned documents: human_text is 0.0%"):
        build_interleaved(hopeless)
    assert not (tmp_path / "none").exists()
    build_interleaved(
        config.model_copy(update={"guard": config.guard.model_copy(update={"human_text": 0.1})})
    )
    index = read_index(tmp_path / "out")["interleave"]
    assert index.source is not None and index.source.words > 50
    assert index.diversity.frames > 50 and index.diversity.codes > 1


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"kind": "text", "path": "nowhere.txt", "licence": "x"}, "nowhere.txt"),
        ({"kind": "documents", "path": __file__, "licence": "x"}, "must end in .jsonl"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(
    model: Path, tmp_path: Path, source: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        build_interleaved(config_of(tmp_path / "out", model, [source]))


def test_an_empty_or_broken_file_is_named(model: Path, tmp_path: Path) -> None:
    empty, broken = tmp_path / "empty.txt", tmp_path / "broken.txt.xz"
    empty.write_text("\n \n")
    broken.write_bytes(lzma.compress(b"one\n" * 9999)[:50])
    for path, said in ((empty, "holds no document"), (broken, "cannot be read")):
        source = {"kind": "text", "path": path, "licence": "x"}
        with pytest.raises(UserError, match=said):
            build_interleaved(config_of(tmp_path / "out", model, [source]))


def test_a_mixture_without_a_rule_that_fits_drops_and_counts(
    model: Path, corpus: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = config_of(tmp_path / "out", model, corpus[2:], mixture={"asr": 1.0})
    report = build_interleaved(config)
    assert report.samples == 0
    assert {d.reason for d in report.dropped} == {"the mixture has no rule for questions"}
    with pytest.raises(ValueError, match="one of them positive"):
        config_of(tmp_path / "out", model, corpus, mixture={"asr": 0.0})


@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(1, 40))
def test_pieces_are_short_and_whole_where_they_can_be(sizes: list[int], longest: int) -> None:
    ends = list(itertools.accumulate(sizes))
    cuts = [0, *cut(ends, longest)]
    assert cuts[-1] == ends[-1]
    assert all(0 < b - a <= longest for a, b in itertools.pairwise(cuts))
    # Where no sentence is too long, no sentence is cut.
    if max(sizes) <= longest:
        assert set(cuts[1:]) <= set(ends)
    # No two neighbours that are whole sentences would fit into one piece.
    assert len(cuts) - 1 <= 2 * -(-ends[-1] // longest) + len(sizes)


def test_sentences_end_at_their_marks() -> None:
    text = "One two. Three! four"
    assert sentence_ends(text, tokenize(text)) == [2, 3, 4]
    assert sentence_ends("one, two", tokenize("one, two")) == [2]


def test_numbers_do_not_depend_on_the_shard(
    model: Path, corpus: list[dict[str, Any]], tmp_path: Path
) -> None:
    small = built(config_of(tmp_path / "small", model, corpus[:1], shard_size=2))
    large = built(config_of(tmp_path / "large", model, corpus[:1], shard_size=100))
    assert [s.meta["segments"] for s in small] == [s.meta["segments"] for s in large]
    assert all(np.array_equal(a.codes, b.codes) for a, b in zip(small, large, strict=True))
