"""The documents of every stage: they hold all words and codes, and learn what the switches say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_codec.errors import UserError
from audio_codec.transformer import TransformerConfig
from speechlm import documents, sources
from speechlm.data import Mixture
from speechlm.documents import Document, Spoken, WeightConfig
from speechlm.model import Batch, LMConfig, LossConfig, SpeechLM
from speechlm.sources import AudioSource
from speechlm.streams import ABSENT, BOS, EOS, EPAD, PAD, SPEECH, TEXT, Streams
from speechlm.text_tokenizer import TextTokenizer, train_text_tokenizer
from synth_data import shards
from synth_data.dialogue import (
    ASSISTANT,
    UNTRANSCRIBED,
    USER,
    Dialogue,
    DialogueConfig,
    arrange,
    cut_events,
    cut_words,
    script,
    spoken,
)
from synth_data.text import tokenize
from synth_data.tts import Utterance, Word

TOKENIZER: TextTokenizer = train_text_tokenizer(
    ["one two three four zebra unhappy read aloud write down answer the question"] * 3, 120
)
BOOKS = ((3, 2), (5,), (5,))
SIZES = (6, 5, 5)
PLAIN = WeightConfig()


def streams_of(heard: bool = True, delay: int | tuple[int, ...] = 1) -> Streams:
    return Streams(text_size=TOKENIZER.size, codebooks=BOOKS, heard=heard, acoustic_delay=delay)


def codes_of(time: int, seed: int, books: int = 3) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, size, time) for size in SIZES[:books]]).astype(np.uint16)


def said(seed: int, time: int = 60, books: int = 3) -> Spoken:
    """Up to three words, far enough from each other and the ends to be whole."""
    rng = np.random.default_rng(seed)
    vocabulary = ["one", "two", "zebra", "unhappy"]
    words = tuple(
        Word(vocabulary[int(rng.integers(4))], 1.0 + n, 1.4 + n)
        for n in range(int(rng.integers(1, 4)))
    )
    return Spoken(codes_of(time, seed, books), words, tuple(word.text for word in words))


def sample_of(seed: int, time: int = 60) -> shards.Sample:
    """A question, a backchannel's “one”, an answer."""
    return shards.Sample(
        id=f"d{seed}",
        text="",
        words=(
            (Word("four", 2.0, 2.4), Word("zebra", 2.6, 3.0)),
            (Word("two", 0.5, 0.8), Word("one", 2.45, 2.55)),
        ),
        voices=("assistant", "user"),
        source="test",
        licence="Apache-2.0",
        synthetic=True,
        seconds=time / 12.5,
        events=(shards.Event(kind="backchannel", channel=1, start=2.45, end=2.55),),
        codes=np.stack([codes_of(time, seed), codes_of(time, seed + 1)]),
    )


RATE = 1000


def uttered(text: str, channel: int) -> Utterance:
    """A word is 0.25 s of sound and 0.05 s of silence."""
    words = [
        Word(token.text, 0.3 * place, 0.3 * place + 0.25)
        for place, token in enumerate(tokenize(text))
    ]
    pcm = np.full(round(0.3 * len(words) * RATE), 0.5, np.float32)
    return Utterance(pcm, RATE, tuple(words))


def talked(talk: Dialogue, start: float, end: float) -> shards.Sample:
    """Part of a conversation, as it is kept."""
    frames = round((end - start) * 12.5)
    words = [cut_words(w, start, end) for w in (talk.assistant_words, talk.user_words)]
    return sample_of(0).model_copy(
        update={
            "words": tuple(words),
            "seconds": end - start,
            "events": cut_events(talk.events, start, end),
            "codes": np.zeros((2, 3, frames), np.uint16),
            "meta": {"conversation": 0, "start": float(start)},
        }
    )


# ------------------------------------------------------------------------------- reading back


def words_in(row: np.ndarray[Any, Any]) -> str:
    return TOKENIZER.decode(int(i) for i in row if i >= 0)


def spans_in(document: Document, streams: Streams) -> list[str | dict[str, list[list[int]]]]:
    """A document between BOS and EOS as texts and codes by role: `span_document` undone."""
    columns = document.columns[:, 1:]
    row = columns[streams.text_index].tolist()
    assert row[0] == BOS and row[-1] == EOS
    found: list[str | dict[str, list[list[int]]]] = []
    at, pieces = 1, list[int]()

    def close() -> None:
        if pieces:
            found.append(TOKENIZER.decode(pieces))
            pieces.clear()

    while at < len(row) - 1:
        if row[at] != SPEECH:
            pieces.append(row[at])
            assert (np.delete(columns[:, at], streams.text_index) == ABSENT).all()
            at += 1
            continue
        close()
        end = row.index(TEXT, at)
        inside = columns[:, at + 1 : end]
        assert (inside[streams.text_index] == PAD).all()
        spoken: dict[str, list[list[int]]] = {}
        for role, side in (("own", streams.own), ("user", streams.user)):
            books = [
                [c for c in line.tolist() if 0 <= c < size]
                for line, size in zip(inside[side], streams.code_sizes, strict=True)
            ]
            if any(books):
                spoken[role] = [book for book in books if book]
        found.append(spoken)
        at = end + 1
    close()
    return found


delays = st.one_of(st.integers(0, 3), st.tuples(st.integers(0, 3), st.integers(0, 3)))
seeds = st.integers(0, 10_000)


class TestSpans:
    @given(seeds, st.integers(1, 3), delays)
    def test_tasks_hold_their_words_and_codes(
        self, seed: int, books: int, delay: int | tuple[int, ...]
    ) -> None:
        streams, one, other = streams_of(delay=delay), said(seed, 7, books), said(seed + 1, 5)
        text, codes = " ".join(one.text), one.codes.tolist()
        answer, spoken = " ".join(other.text), other.codes.tolist()
        asr = documents.asr_document(one, streams, TOKENIZER, PLAIN, "write down")
        assert spans_in(asr, streams) == ["write down", {"user": codes}, text]
        tts = documents.tts_document(one, streams, TOKENIZER, PLAIN, "")
        assert spans_in(tts, streams) == [text, {"own": codes}]

        def qa(*modalities: Any) -> list[Any]:
            document = documents.answer_document(
                one, other, modalities, streams, TOKENIZER, PLAIN, "answer"
            )
            return spans_in(document, streams)

        assert qa("speech", "text") == ["answer", {"user": codes}, answer]
        assert qa("speech", "speech") == ["answer", {"user": codes}, {"own": spoken}]
        assert qa("text", "speech") == [f"answer {text}", {"own": spoken}]
        assert qa("text", "text") == [f"answer {text} {answer}"]

    @given(seeds, st.lists(st.sampled_from(["own", "user"]), min_size=3, max_size=3), delays)
    def test_interleaved(
        self, seed: int, roles: list[documents.Role], delay: int | tuple[int, ...]
    ) -> None:
        streams, one, two = streams_of(delay=delay), codes_of(4, seed), codes_of(6, seed, books=1)
        spans = [one, list(TOKENIZER.word("zebra")), two]
        document = documents.interleaved_document(spans, streams, PLAIN, roles)
        assert spans_in(document, streams) == [
            {roles[0]: one.tolist()},
            "zebra",
            {roles[2]: two.tolist()},
        ]

    def test_what_is_given_is_not_learned(self) -> None:
        streams, one = streams_of(), said(3, 7)
        asr = documents.asr_document(one, streams, TOKENIZER, PLAIN, "write down")
        row, loss = asr.columns[0, 1:].tolist(), asr.weights[0]
        closed = row.index(TEXT)
        assert (loss[1 : closed + 1] == 0).all() and (loss[closed + 1 :] == 1).all()
        assert (asr.weights[1:] == 0).all()
        tts = documents.tts_document(one, streams, TOKENIZER, PLAIN, "read aloud")
        row, loss = tts.columns[0, 1:].tolist(), tts.weights[0]
        prompt, opened = len(TOKENIZER.encode("read aloud")), row.index(SPEECH)
        assert (loss[1 : 1 + prompt] == 0).all()
        assert (loss[1 + prompt : opened] == np.float32(PLAIN.question)).all()
        assert loss[opened] == 1 and loss[row.index(TEXT)] == 1, "where to begin and to stop"
        assert (tts.weights[1, opened + 1 : opened + 8] == PLAIN.semantic).all()

    @given(seeds)
    def test_switches_of_interleaved_speech_and_of_the_user(self, seed: int) -> None:
        streams, codes = streams_of(), codes_of(6, seed)
        silent = WeightConfig(speech=False)
        for role in ("own", "user"):
            off = documents.interleaved_document([codes], streams, silent, role)  # type: ignore[arg-type]
            assert (off.weights[1:] == 0).all() and (off.weights[0] > 0).all()
        theirs = documents.interleaved_document([codes], streams, WeightConfig(user=0.5), "user")
        assert (theirs.weights[streams.own] == 0).all()
        assert (theirs.weights[streams.user.start, 2:8] == 0.5 * PLAIN.semantic).all()
        assert (theirs.weights[streams.user.start + 1, 3:9] == 0.5).all()


class TestMonologue:
    @given(seeds, st.integers(1, 3), st.booleans(), delays)
    def test_words_stand_beside_their_codes(
        self, seed: int, books: int, heard: bool, delay: int | tuple[int, ...]
    ) -> None:
        streams, one = streams_of(heard, delay), said(seed, books=books)
        rng = np.random.default_rng(seed)
        for role in ("own", "user"):
            document = documents.monologue_document(one, streams, TOKENIZER, PLAIN, rng, role)  # type: ignore[arg-type]
            columns = document.columns[:, 1:]
            mine, other = streams.own, streams.user
            text, silent = columns[0], None
            if role == "user":
                mine, other = other, mine
                silent, text = text, columns[streams.heard_index] if heard else None
            if text is not None:
                assert words_in(text) == " ".join(one.text)
            if silent is not None:
                assert (silent == PAD).all() and (document.weights[0] == 0).all()
            assert (columns[other] == ABSENT).all() and (document.weights[other] == 0).all()
            for book, shift in enumerate(streams.code_delays):
                line = columns[mine][book]
                if book >= books:
                    assert (line == ABSENT).all()
                    continue
                assert (line[:shift] == SIZES[book]).all()
                assert line[shift:].tolist() == one.codes[book, : 60 - shift].tolist()
                learned = document.weights[mine][book]
                assert (learned[:shift] == 0).all()
                assert (learned[shift:] > 0).all() == (role == "own")

    def test_without_word_times_it_is_sound_alone(self) -> None:
        streams = streams_of()
        bare = Spoken(codes_of(20, 0), (), ("one",))
        rng = np.random.default_rng(0)
        document = documents.monologue_document(bare, streams, TOKENIZER, PLAIN, rng)
        assert (document.columns[0, 1:] == ABSENT).all() and (document.weights[0] == 0).all()
        assert (document.weights[1] > 0).all()

    @given(seeds)
    def test_jitter_moves_the_text_and_nothing_else(self, seed: int) -> None:
        streams, one = streams_of(), said(seed)
        moved = WeightConfig(jitter=0.6)

        def make(config: WeightConfig) -> Document:
            rng = np.random.default_rng(seed)
            return documents.monologue_document(one, streams, TOKENIZER, config, rng)

        before, after = make(PLAIN), make(moved)
        assert (before.columns[1:] == after.columns[1:]).all()
        assert words_in(after.columns[0, 1:]) == words_in(before.columns[0, 1:])

        def begins(document: Document) -> int:
            return int(np.flatnonzero(document.columns[0, 1:] > EPAD)[0])

        assert abs(begins(after) - begins(before)) <= 8  # 0.6 s are 7.5 frames


class TestConversations:
    def test_questions_are_cut_out_with_their_answers(self) -> None:
        streams = streams_of()
        ((question, answer),) = documents.exchanges(sample_of(0), streams)
        assert question.text == ("two",) and answer.text == ("four", "zebra")
        whole = sample_of(0).codes
        assert whole is not None
        # 0.4 to 0.9 s; a tenth of a second around the words.
        assert question.codes.tolist() == whole[1, :, 5:12].tolist()
        assert question.words == (Word("two", 0.5 - 5 / 12.5, 0.8 - 5 / 12.5),)

    def test_every_pair_is_a_question_of_the_script_with_its_whole_answer(self) -> None:
        streams = streams_of()
        asked, complete, pairs = 0, 0, 0
        for seed in range(6):
            lines = script(np.random.default_rng(seed), DialogueConfig(seconds=120.0))
            talk = arrange(lines, uttered, RATE)
            wanted = {
                tuple(t.text for t in tokenize(spoken(turn))): tuple(
                    t.text for t in tokenize(turn.question.answer)
                )
                for turn in lines.turns
            }
            parts = [talked(talk, start, min(start + 30.0, 120.0)) for start in range(0, 120, 30)]
            (whole,) = sources.join(parts)
            found = documents.exchanges(whole, streams)
            for question, answer in found:
                assert wanted[question.text] == answer.text
            told = [event for event in talk.events if event.kind == "answer"]
            asked += sum(event.kind == "turn_end" for event in talk.events)
            complete += sum(not event.meta["cut"] for event in told)
            pairs += len(found)
            # Of a part alone it is the same pairs, but for those that its ends cut.
            alone = [pair for part in parts for pair in documents.exchanges(part, streams)]
            assert all(wanted[question.text] == answer.text for question, answer in alone)
            assert {q.text for q, _ in alone} <= {q.text for q, _ in found}
        assert asked > 60 and pairs < asked  # some were interrupted
        assert pairs >= complete - 2 * 6  # a greeting is no answer; the last may not come

    def test_without_events_whoever_speaks_keeps_the_turn(self) -> None:
        sample = sample_of(0).model_copy(
            update={
                "events": (),
                "words": (
                    (Word("four", 1.2, 1.6), Word("zebra", 1.7, 2.1)),
                    (Word("two", 0.5, 0.8), Word("one", 0.9, 1.3), Word("zebra", 1.4, 1.8)),
                ),
            }
        )
        ((question, answer),) = documents.exchanges(sample, streams_of())
        assert question.text == ("two", "one", "zebra") and answer.text == ("four", "zebra")

    def test_of_an_untranscribed_voice_all_is_learned(self) -> None:
        streams = streams_of()
        config = WeightConfig(user=1.0, silence=0, margin=0, jitter=0.6)
        bare = sample_of(0).model_copy(update={"words": ((), sample_of(0).words[1])})
        for channels, own, row in (
            ([ASSISTANT], streams.own, streams.text_index),
            ([USER], streams.user, streams.heard_index),
        ):
            sample = bare.model_copy(update={"meta": {UNTRANSCRIBED: channels}})
            made = documents.encode_dialogue(sample, streams, TOKENIZER, config)
            rng = np.random.default_rng(1)
            document = documents.dialogue_document(made, streams, config, rng)
            assert (document.weights[own.start] > 0).all()
            assert (document.columns[row, 1:] == ABSENT).all() and not document.weights[row].any()

    @given(seeds)
    def test_speakers_exchange_their_roles(self, seed: int) -> None:
        streams, sample = streams_of(), sample_of(seed)
        turned = documents.exchanged(sample)
        assert documents.exchanged(turned).words == sample.words
        made = documents.encode_dialogue(turned, streams, TOKENIZER, PLAIN)
        assert words_in(made.text) == "two one" and words_in(made.heard) == "four zebra"
        assert sample.codes is not None and (made.codes[0] == sample.codes[1]).all()

    @given(seeds, st.floats(0.1, 2))
    def test_the_users_codes_are_learned_where_they_speak(self, seed: int, weight: float) -> None:
        streams = streams_of()
        config = WeightConfig(user=weight, silence=0, margin=0)
        made = documents.encode_dialogue(sample_of(seed), streams, TOKENIZER, config)
        rng = np.random.default_rng(seed)
        document = documents.dialogue_document(made, streams, config, rng)
        learned = document.weights[streams.user.start]
        near = np.zeros(60, bool)
        near[[6, 7, 8, 9, 30, 31]] = True  # 0.5–0.8 s and 2.45–2.55 s
        assert (learned > 0).tolist() == near.tolist()
        assert np.allclose(learned[near], weight * config.semantic)
        off = documents.dialogue_document(made, streams, PLAIN, np.random.default_rng(seed))
        assert (off.weights[streams.user] == 0).all()

    def test_codes_of_another_codec_are_named(self) -> None:
        streams = Streams(text_size=TOKENIZER.size, codebooks=((6,), (4,), (5,)))
        wrong = sample_of(0)
        assert wrong.codes is not None
        wrong.codes[0, 1, 3] = 4
        with pytest.raises(UserError, match="the code 4 in codebook 1, which has but 4"):
            documents.encode_dialogue(wrong, streams, TOKENIZER, PLAIN)
        narrow = Streams(text_size=TOKENIZER.size, codebooks=((6,), (5,)))
        with pytest.raises(UserError, match="3 codebooks, but the model has 2"):
            documents.spoken(wrong, narrow)
        ours = streams_of().model_copy(update={"coded_by": (1.0, 2.0)})
        for coded_by, fits in ((None, True), ((1.001, 2.0), True), ((2.0, 1.0), False)):
            sample = sample_of(0).model_copy(update={"coded_by": coded_by})
            if fits:
                documents.encode_dialogue(sample, ours, TOKENIZER, PLAIN)
                continue
            with pytest.raises(UserError, match="codes of another tokenizer or codec"):
                documents.encode_dialogue(sample, ours, TOKENIZER, PLAIN)


# ------------------------------------------------------------------------------------ sources


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stages")
    single = [
        shards.Sample(
            id=f"s{n}",
            text="zebra two",
            words=(said(n).words if n else (),),
            voices=("espeak:en",),
            source="test",
            licence="Apache-2.0",
            synthetic=True,
            seconds=4.8,
            codes=codes_of(60, n, books=3 if n % 2 else 1)[None],
        )
        for n in range(6)
    ]
    shards.write(path / "single" / "pairs-000000.tar", single)
    shards.write(path / "talk" / "dialogues-000000.tar", [sample_of(n) for n in range(3)])
    (path / "lines.txt").write_text("One two three.\nZebra.\nFour, the unhappy.\n")
    return path


def every_source(folder: Path) -> list[dict[str, Any]]:
    """A source of each kind that there is."""
    single, talk = folder / "single", folder / "talk"
    return [
        {"kind": "sentences", "path": folder / "lines.txt"},
        {"kind": "quiz", "turns": 1},
        {"kind": "interleaved", "path": talk},
        {"kind": "audio", "path": single, "listen": 0.5},
        {"kind": "dialogues", "path": talk, "exchange": 0.5},
        {"kind": "asr", "path": single},
        {"kind": "tts", "path": single},
        {"kind": "spoken_qa", "path": talk, "answer": "speech"},
    ]


def opened(source: dict[str, Any], streams: Streams) -> sources.Documents:
    from pydantic import TypeAdapter

    config: sources.Source = TypeAdapter(sources.Source).validate_python({**source, "rows": 1})
    return sources.open_source(config, streams, TOKENIZER, WeightConfig(user=0.5), seed=1)


def test_every_kind_has_a_source(folder: Path) -> None:
    from typing import get_args

    union, _ = get_args(sources.Source)
    kinds = {
        kind
        for model in get_args(union)
        for kind in get_args(model.model_fields["kind"].annotation)
    }
    assert kinds == {source["kind"] for source in every_source(folder)}


def test_codes_of_another_codec_are_refused_by_every_kind(tmp_path: Path) -> None:
    ours = streams_of().model_copy(update={"coded_by": (1.0, 2.0)})
    one, talk = (sample_of(n).model_copy(update={"coded_by": (2.0, 1.0)}) for n in range(2))
    assert one.codes is not None
    update = {"codes": one.codes[:1], "words": one.words[:1], "voices": one.voices[:1]}
    shards.write(tmp_path / "single" / "pairs-000000.tar", [one.model_copy(update=update)])
    shards.write(tmp_path / "talk" / "dialogues-000000.tar", [talk])
    for source in every_source(tmp_path)[2:]:
        with pytest.raises(UserError, match="codes of another tokenizer or codec"):
            opened(source, ours)


def test_nothing_is_heard_where_nothing_of_it_is_learned(folder: Path) -> None:
    source = AudioSource(kind="audio", path=folder / "single", rows=1, listen=0.5)
    for weights, heard in ((WeightConfig(user=0.5), False), (PLAIN, True)):
        sources.open_source(source, streams_of(heard), TOKENIZER, weights, seed=1)
    with pytest.raises(UserError, match=r"listen is 0\.5, but the model neither"):
        sources.open_source(source, streams_of(heard=False), TOKENIZER, PLAIN, seed=1)


def small(streams: Streams) -> SpeechLM:
    shape = TransformerConfig(dim=16, layers=2, heads=2, window=30)
    config = LMConfig(
        streams=streams,
        temporal=shape,
        depth=shape.model_copy(update={"layers": 1}),
        codec="none",
        predicts_user=True,
    )
    return SpeechLM(config).eval()


def batch_of(rows: list[list[Document]], length: int, count: int) -> Batch:
    """Documents one after the other in each row."""
    inputs = np.full((len(rows), count, length), ABSENT, np.int64)
    targets, weights = inputs.copy(), np.zeros(inputs.shape, np.float32)
    segments = np.zeros((len(rows), length), np.int64)
    for row, several in enumerate(rows):
        at = 0
        for number, document in enumerate(several):
            end = at + document.weights.shape[1]
            inputs[row, :, at:end] = document.columns[:, :-1]
            targets[row, :, at:end] = document.columns[:, 1:]
            weights[row, :, at:end] = document.weights
            segments[row, at:] = number
            at = end
    arrays = (torch.from_numpy(array) for array in (inputs, targets, weights, segments))
    return Batch(*arrays)


@pytest.mark.parametrize("index", range(8))
@pytest.mark.parametrize("heard", [True, False])
@torch.no_grad()
def test_packed_loss_equals_unpacked_loss(folder: Path, index: int, heard: bool) -> None:
    streams = streams_of(heard)
    documents = opened(every_source(folder)[index], streams)
    some = [documents.document(0, number) for number in range(3)]
    sizes = [document.weights.shape[1] for document in some]
    model = small(streams)
    packed = model.loss(batch_of([some], sum(sizes), streams.count))
    alone = model.loss(batch_of([[one] for one in some], max(sizes), streams.count))
    assert float(packed.total) > 0 and abs(float(packed.total - alone.total)) < 1e-5
    assert packed.parts.keys() == alone.parts.keys()
    for name, value in packed.parts.items():
        assert abs(float(value - alone.parts[name])) < 1e-5, name


def test_a_mixture_of_all_of_them_learns(folder: Path) -> None:
    from pydantic import TypeAdapter

    streams = streams_of()
    read: Callable[[Any], sources.Source] = TypeAdapter(sources.Source).validate_python
    every = [read({**source, "rows": 1}) for source in every_source(folder)]
    weights = WeightConfig(user=0.5)
    mixture = Mixture(every, streams, TOKENIZER, weights, length=120, seed=0)
    model = small(streams).train()
    batches = mixture.next()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    history = []
    for _ in range(8):
        losses = [model.loss(batch, LossConfig(z=1e-4)) for _, batch in batches]
        total = torch.stack([loss.total for loss in losses]).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(total.item())
    assert history[-1] < 0.9 * history[0]
    dialogues = losses[4].parts
    assert {"text", "heard", "semantic", "user_semantic", "user_acoustic"} <= dialogues.keys()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"kind": "asr", "path": "talk", "max_words": 1}, "no utterance with codes and 1 to 1 "),
        ({"kind": "spoken_qa", "path": "single"}, "no question and answer with codes and 1 to 60"),
        ({"kind": "asr", "path": "bare"}, "no utterance with codes"),
        ({"kind": "audio", "path": "bare"}, "no sample in '.*bare' has codes"),
        ({"kind": "dialogues", "path": "single"}, "expected 2 × 3"),
    ],
)
def test_data_that_does_not_fit_is_named(folder: Path, source: dict[str, Any], said: str) -> None:
    bare = sample_of(0).model_copy(update={"codes": None})
    shards.write(folder / "bare" / "x-000000.tar", [bare])
    config = {**source, "path": folder / source["path"]}
    with pytest.raises(UserError, match=said):
        opened(config, streams_of())


@given(st.data())
@settings(max_examples=20)
def test_every_document_is_within_its_vocabularies(folder: Path, drawn: st.DataObject) -> None:
    streams = streams_of(drawn.draw(st.booleans()), drawn.draw(delays))
    source = drawn.draw(st.sampled_from(every_source(folder)))
    document = opened(source, streams).document(drawn.draw(st.integers(0, 3)), 1)
    sizes = np.array(streams.sizes)[:, None]
    targets = document.columns[:, 1:]
    assert (document.columns[:, 0] == streams.sizes).all(), "every document begins alike"
    assert (document.columns <= sizes).all() and (document.columns >= ABSENT).all()
    learnable = (targets >= 0) & (targets < sizes)
    assert not (document.weights[~learnable] > 0).any(), "nothing absent is learned"
    assert document.weights.min() >= 0 and document.weights.sum() > 0
