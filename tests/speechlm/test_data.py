"""Pieces on frames, documents, packing, resumption."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from upath import UPath

from audio_codec.errors import UserError
from speechlm import data, documents, sources
from speechlm.config import build
from speechlm.data import Mixture, Packer
from speechlm.documents import Document, WeightConfig
from speechlm.sources import DialogueSource, InterleavedSource, QuizSource, SentenceSource
from speechlm.streams import ABSENT, BOS, EOS, EPAD, PAD, SPEECH, TEXT, Streams
from speechlm.text_tokenizer import (
    SentencePieceTokenizer,
    TextTokenizer,
    train_text_tokenizer,
)
from speechlm.training.lm import TrainConfig
from synth_data import quiz, shards
from synth_data.dialogue import ASSISTANT, UNTRANSCRIBED, USER
from synth_data.tts import Word

WEIGHTS = WeightConfig()


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_text_tokenizer(quiz.sentences("train", 400, 0), 300)


@pytest.fixture(scope="module")
def streams(tokenizer: TextTokenizer) -> Streams:
    return Streams(text_size=tokenizer.size, codebooks=((3, 2), (5,), (5,)))


def dialogue(name: str, frames: int, seed: int = 0) -> shards.Sample:
    rng = np.random.default_rng(seed)
    codes = np.stack([rng.integers(0, size, (2, frames)) for size in (6, 5, 5)], axis=1)
    return shards.Sample(
        id=name,
        text="what is two plus two? four.",
        words=(
            (Word("four", 2.0, 2.4),),
            (Word("two", 0.5, 0.8), Word("plus", 0.8, 1.1), Word("two", 1.1, 1.3)),
        ),
        voices=("assistant", "user"),
        source="test",
        licence="Apache-2.0",
        synthetic=True,
        seconds=frames / 12.5,
        codes=codes.astype(np.uint16),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    shards.write(path / "dialogue-000000.tar", [dialogue(f"d{i}", 40 + 7 * i, i) for i in range(5)])
    return path


class TestTokenizer:
    def test_round_trip(self, tokenizer: TextTokenizer) -> None:
        text = "What is 3 plus four? Zebra's."
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == "what is three plus four zebra's"
        assert "".join(tokenizer.pieces()[i] for i in ids).strip() == tokenizer.decode(ids)

    @given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz'", min_size=1, max_size=12))
    def test_any_word_can_be_spelled(self, tokenizer: TextTokenizer, word: str) -> None:
        assert tokenizer.decode(tokenizer.word(word)) == word

    def test_special_pieces_have_their_ids_and_no_text(self, tokenizer: TextTokenizer) -> None:
        assert tokenizer.decode([PAD, EPAD, BOS, EOS, SPEECH, TEXT]) == ""
        assert tokenizer.pieces()[:7] == [""] * 7

    def test_the_same_texts_give_the_same_pieces(self, tokenizer: TextTokenizer) -> None:
        again = train_text_tokenizer(quiz.sentences("train", 400, 0), 300)
        assert again.model == tokenizer.model

    def test_mistakes_are_named(self) -> None:
        with pytest.raises(UserError, match="vocab is 10"):
            train_text_tokenizer(["a"], 10)
        with pytest.raises(UserError, match="not a SentencePiece model"):
            SentencePieceTokenizer(b"nothing")


class TestPlace:
    def test_start_epad_and_lead(self, tokenizer: TextTokenizer) -> None:
        two, four = tokenizer.word("two"), tokenizer.word("four")
        words = [Word("two", 0.41, 0.6), Word("four", 1.6, 1.9)]  # frames 5 and 20
        row = documents.place(words, 30, tokenizer, at="start", offset=-1)
        assert row[3] == EPAD and tuple(row[4 : 4 + len(two)]) == two
        assert row[18] == EPAD and tuple(row[19 : 19 + len(four)]) == four
        assert (row == PAD).sum() == 30 - 2 - len(two) - len(four)

    def test_end_without_epad(self, tokenizer: TextTokenizer) -> None:
        row = documents.place(
            [Word("two", 0.4, 0.81)], 30, tokenizer, at="end", offset=2, epad=False
        )
        assert row.nonzero()[0][0] == 11 + 2 and EPAD not in row

    @given(
        st.lists(st.tuples(st.floats(0, 3), st.sampled_from(["zebra", "two", "unhappy"]))),
        st.integers(-3, 3),
    )
    def test_words_queue_in_order_and_never_run_early(
        self, tokenizer: TextTokenizer, starts: list[tuple[float, str]], offset: int
    ) -> None:
        words = [Word(text, start, start + 0.2) for start, text in sorted(starts)]
        row = documents.place(words, 400, tokenizer, at="start", offset=offset)
        said = [int(i) for i in row if i not in (PAD, EPAD)]
        assert said == [p for word in words for p in tokenizer.word(word.text)]
        for at in np.flatnonzero(row == EPAD):
            assert row[at + 1] not in (PAD, EPAD)
        if words:
            first = next(i for i, piece in enumerate(row) if piece not in (PAD, EPAD))
            assert first >= int(words[0].start * 12.5 + 1e-6) + offset

    def test_what_lies_beyond_the_end_is_dropped(self, tokenizer: TextTokenizer) -> None:
        words = [Word("unhappy", 0.7, 0.9), Word("two", 5.0, 6.0)]
        assert len(documents.place(words, 10, tokenizer, at="start")) == 10


class TestDocuments:
    def test_dialogue(self, streams: Streams, tokenizer: TextTokenizer) -> None:
        sample = dialogue("d", 60)
        made = documents.encode_dialogue(sample, streams, tokenizer, WEIGHTS)
        document = documents.dialogue_document(made, streams, WEIGHTS, np.random.default_rng(0))
        columns, weights = document.columns, document.weights
        assert sample.codes is not None
        assert columns.shape == (streams.count, 61) and weights.shape == (streams.count, 60)
        assert (columns[:, 0] == streams.sizes).all()
        assert (columns[1, 1:] == sample.codes[0, 0]).all()  # semantic: not delayed
        assert (columns[2, 2:] == sample.codes[0, 1, :-1]).all()  # acoustic: one column later
        assert (columns[5, 2:] == sample.codes[1, 1, :-1]).all()
        # "four" is said at 2.0 s, frame 25; the user's last word ends at 1.3 s, frame 17.
        assert columns[0, 25] == EPAD and columns[0, 26] == tokenizer.word("four")[0]
        assert columns[streams.heard_index, 1 + 17 + 2] == tokenizer.word("two")[0]
        assert (weights[streams.user] == 0).all()
        assert weights[2, 0] == 0  # the delay gap
        assert (weights[1, 12:43] == WEIGHTS.semantic).all()  # 1 s around the answer
        assert 0 < (weights[1, 43:] == 0).sum() < 18  # some of the silence is left out
        assert weights[0, 25] == 1 and weights[0, 0] == WEIGHTS.pad

    def test_unfit_codes_are_named(self, streams: Streams, tokenizer: TextTokenizer) -> None:
        bare = dialogue("d", 60).model_copy(update={"codes": None})
        with pytest.raises(UserError, match="has no codes"):
            documents.encode_dialogue(bare, streams, tokenizer, WEIGHTS)
        two = Streams(text_size=300, codebooks=((6,), (5,)))
        with pytest.raises(UserError, match="expected 2 × 2"):
            documents.encode_dialogue(dialogue("d", 60), two, tokenizer, WEIGHTS)

    def test_question_is_heard_and_answer_said(
        self, streams: Streams, tokenizer: TextTokenizer
    ) -> None:
        turns = [("What is two plus two?", "Four."), ("And one more?", "Five.")]
        document = documents.question_document(turns, streams, tokenizer, WEIGHTS)
        text, heard = document.columns[0, 1:], document.columns[streams.heard_index, 1:]
        assert tokenizer.decode(heard) == "what is two plus two and one more"
        assert tokenizer.decode(text) == "four five"
        assert (document.columns[1:7, 1:] == ABSENT).all()
        answer = int(np.flatnonzero(text == tokenizer.word("four")[0])[0])
        assert text[answer - 1] == EPAD and document.weights[0, answer] == 1
        assert tokenizer.decode(heard[:answer]) == "what is two plus two"
        assert document.weights[streams.heard_index, 0] == np.float32(WEIGHTS.question)

    def test_pace_puts_pads_between(self, streams: Streams, tokenizer: TextTokenizer) -> None:
        turns = [("What is two plus two?", "Four.")]
        dense = documents.question_document(turns, streams, tokenizer, WEIGHTS)
        paced = documents.question_document(turns, streams, tokenizer, WEIGHTS, lambda n: n + 3)
        assert paced.columns.shape[1] == dense.columns.shape[1] + 3 * 6
        for row in (0, streams.heard_index):
            assert tokenizer.decode(paced.columns[row, 1:]) == tokenizer.decode(
                dense.columns[row, 1:]
            )

    def test_interleaved_spans(self, streams: Streams) -> None:
        codes = np.array([[1, 2, 3], [0, 1, 2], [4, 3, 2]])
        document = documents.interleaved_document([[9, 10], codes], streams, WEIGHTS)
        text = document.columns[0, 1:].tolist()
        assert text == [BOS, 9, 10, SPEECH, PAD, PAD, PAD, PAD, TEXT, EOS]
        assert document.columns[1, 5:9].tolist() == [1, 2, 3, ABSENT]
        assert document.columns[2, 5:9].tolist() == [5, 0, 1, 2]
        assert (document.columns[4:, 1:] == ABSENT).all()
        assert document.weights[2, 4:8].tolist() == [0, 1, 1, 1]
        heard = documents.interleaved_document([codes], streams, WEIGHTS, role="user")
        assert (heard.weights[1:] == 0).all() and heard.columns[4, 3] == 1

    def test_speech_of_semantic_codes_alone(self, streams: Streams) -> None:
        codes = np.array([[1, 2, 3]])
        document = documents.interleaved_document(
            [[9], codes, codes], streams, WEIGHTS, role=("own", "user", "own")
        )
        text = document.columns[0, 1:].tolist()
        span = [SPEECH, PAD, PAD, PAD, TEXT]
        assert text == [BOS, 9, *span, *span, EOS]
        assert document.columns[4, 4:7].tolist() == [1, 2, 3]
        assert document.columns[1, 9:12].tolist() == [1, 2, 3]
        others = [row for row in range(1, streams.count) if row not in (1, 4)]
        assert (document.columns[others, 1:] == ABSENT).all()
        learned = np.zeros_like(document.weights)
        learned[0] = np.where(document.columns[0, 1:] == PAD, WEIGHTS.pad, 1)
        learned[1, 8:11] = WEIGHTS.semantic
        assert (document.weights == learned).all()


def laid_out(rule: str, segments: list[dict[str, object]], frames: int) -> shards.Sample:
    return shards.Sample(
        id=f"i-{rule}",
        text="what is two four",
        words=((),),
        voices=("text-to-token",),
        source="test",
        licence="CC0",
        synthetic=True,
        seconds=frames / 12.5,
        meta={"rule": rule, "segments": segments},
        codes=np.arange(frames, dtype=np.uint16)[None, None] % 6,
    )


class TestLaidOut:
    QUESTION = (
        {"modality": "speech", "text": "What is 2?", "first": 0, "last": 4},
        {"modality": "speech", "text": "Four.", "utterance": 1, "first": 4, "last": 9},
    )
    SPANS = (
        {"modality": "text", "text": "What is"},
        {"modality": "speech", "text": "two four.", "first": 0, "last": 5},
    )

    def test_who_speaks_is_told_by_the_rule(
        self, streams: Streams, tokenizer: TextTokenizer
    ) -> None:
        sample = laid_out("question_speech_answer_speech", list(self.QUESTION), 9)
        found = sources.lay_out(sample, streams, tokenizer)
        assert found.roles == ["user", "own"]
        assert [np.asarray(span).tolist() for span in found.spans] == [
            [[0, 1, 2, 3]],
            [[4, 5, 0, 1, 2]],
        ]
        for rule, roles in (("asr", ["user"] * 2), ("tts", ["own"] * 2), ("speech_first", None)):
            made = sources.lay_out(laid_out(rule, list(self.SPANS), 5), streams, tokenizer)
            assert made.roles == roles
            assert made.spans[0] == tokenizer.encode("what is")

    def test_documents_keep_the_layout(
        self, streams: Streams, tokenizer: TextTokenizer, tmp_path: Path
    ) -> None:
        samples = [
            laid_out("text_first", list(self.SPANS), 5),
            laid_out("question_speech_answer_speech", list(self.QUESTION), 9),
        ]
        shards.write(tmp_path / "interleave-000000.tar", samples)
        source = InterleavedSource(kind="interleaved", path=tmp_path, rows=1)
        documents = sources.open_source(source, streams, tokenizer, WEIGHTS, 0)
        found = [documents.document(lane, n) for lane in range(8) for n in range(2)]
        spoken = {tuple(int((d.columns[row, 1:] != ABSENT).sum()) for row in (1, 4)) for d in found}
        # The spans are the model's or the user's by chance; question and answer are one each.
        assert spoken == {(5, 0), (0, 5), (5, 4)}
        mixture = Mixture([source], streams, tokenizer, WEIGHTS, length=60, seed=0)
        ((_, batch),) = mixture.next()
        assert batch.inputs.shape == (1, streams.count, 60)

    def test_codes_of_another_codec_are_refused(
        self, streams: Streams, tokenizer: TextTokenizer
    ) -> None:
        sample = laid_out("tts", list(self.SPANS), 5)
        beyond = sample.model_copy(update={"codes": np.full((1, 1, 5), 6, np.uint16)})
        with pytest.raises(UserError, match="code 6 in codebook 0"):
            sources.lay_out(beyond, streams, tokenizer)
        more = sample.model_copy(update={"codes": np.zeros((1, 4, 5), np.uint16)})
        with pytest.raises(UserError, match="4 codebooks, but the model has 3"):
            sources.lay_out(more, streams, tokenizer)
        with pytest.raises(ValueError, match="layout.unit"):
            InterleavedSource.model_validate(
                {"kind": "interleaved", "path": ".", "rows": 1, "layout": {"unit": "sentence"}}
            )


class TestJoin:
    def test_cut_conversations_are_whole_again(self) -> None:
        def part(number: int, conversation: int, start: float) -> shards.Sample:
            sample = dialogue(f"d{conversation}-{number}", 50, number)
            return sample.model_copy(
                update={"meta": {"conversation": conversation, "start": start}}
            )

        parts = [part(0, 0, 0.0), part(1, 0, 4.0), part(2, 1, 0.0), part(3, 1, 8.0)]
        first, second, gap = list(sources.join(parts))
        assert first.codes is not None and parts[1].codes is not None
        assert first.codes.shape == (2, 3, 100) and first.seconds == 8.0
        assert (first.codes[:, :, 50:] == parts[1].codes).all()
        assert [w.start for w in first.words[0]] == [2.0, 6.0]
        assert second.id == "d1-2" and gap.id == "d1-3"  # a part is missing between them

    def test_events_go_on_over_a_cut(self) -> None:
        def part(number: int, *events: shards.Event) -> shards.Sample:
            meta = {"conversation": 0, "start": 4.0 * number}
            update = {"meta": meta, "events": events}
            return dialogue(f"d-{number}", 50, number).model_copy(update=update)

        answer = {"kind": "answer", "channel": 0, "meta": {"text": "a", "cut": False}}
        turn = {"kind": "turn_end", "channel": 1}
        (whole,) = sources.join(
            [
                part(0, shards.Event(start=3.0, end=4.0, **answer)),
                part(
                    1,
                    shards.Event(start=0.0, end=1.0, **answer),
                    shards.Event(start=2.0, end=2.0, meta={"start": -0.5}, **turn),
                    shards.Event(start=3.0, end=3.5, **answer),
                ),
            ]
        )
        found = [(event.kind, event.start, event.end) for event in whole.events]
        assert found == [("answer", 3.0, 5.0), ("turn_end", 6.0, 6.0), ("answer", 7.0, 7.5)]
        assert whole.events[1].meta["start"] == 3.5

    def test_other_samples_are_left_alone(self) -> None:
        samples = [dialogue("a", 40), dialogue("b", 40)]
        assert list(sources.join(samples)) == samples


class TestSoundBelow:
    """Text and sentences among the codes of conversations."""

    def codes_of(self, folder: Path) -> list[Any]:
        return [s.codes for s in shards.read(folder, audio=False) if s.codes is not None]

    def test_text_lies_over_a_conversation(
        self, folder: Path, streams: Streams, tokenizer: TextTokenizer
    ) -> None:
        plain = QuizSource(kind="quiz", rows=1)
        under = QuizSource(kind="quiz", rows=1, under=folder)
        one, other = (
            sources.open_source(config, streams, tokenizer, WEIGHTS, 3) for config in (plain, under)
        )
        talks = [np.tile(codes, (1, 1, 20)) for codes in self.codes_of(folder)]
        for number in range(6):
            before, after = one.document(0, number), other.document(0, number)
            texts = [streams.text_index, streams.heard_index]
            assert (before.columns[texts, 1:] == after.columns[texts, 1:]).all()
            # It does not begin where conversations do, but in the middle of one.
            sides = np.r_[streams.own, streams.user]
            assert (after.columns[texts, 0] == PAD).all()
            assert (after.columns[sides] < np.array(streams.sizes)[sides, None]).all()
            text = streams.text_index
            pieces = ~np.isin(before.columns[text, 1:], (PAD, EPAD))
            assert (after.weights[text] == before.weights[text])[pieces].all() and pieces.any()
            assert not after.weights[1:].any()  # no code and no transcript is learned
            assert after.whole and (after.columns[streams.own][0, 1:] >= 0).all()
            semantic = after.columns[[streams.own.start, streams.user.start]]
            many = semantic.shape[1]
            assert any(
                (talk[:, 0, at : at + many] == semantic).all()
                for talk in talks
                for at in range(talk.shape[2] - many + 1)
            )

    def test_who_listens_is_silent(
        self, folder: Path, streams: Streams, tokenizer: TextTokenizer
    ) -> None:
        config = sources.AudioSource(kind="audio", path=folder, rows=1, listen=1.0, silence=folder)
        opened = sources.open_source(config, streams, tokenizer, WEIGHTS, 0)
        quiet = set()
        for codes in self.codes_of(folder):
            # The assistant speaks from 2.0 to 2.4 s, in every conversation.
            own = np.delete(codes[ASSISTANT], np.s_[20:35], axis=1)
            quiet |= set(map(tuple, own.T.tolist()))
        for number in range(10):
            made = opened.document(0, number)
            frames = streams.undelay(torch.from_numpy(made.columns[:, 1:])).numpy()
            said = set(map(tuple, frames[streams.own].T.tolist()))
            assert said <= quiet and not made.weights[streams.own].any()
            assert made.weights[streams.heard_index].any()

    def test_no_conversation_no_sound(
        self, folder: Path, tmp_path: Path, streams: Streams, tokenizer: TextTokenizer
    ) -> None:
        alone = dialogue("a", 20)
        assert alone.codes is not None
        alone = alone.model_copy(update={"codes": alone.codes[:1], "words": alone.words[:1]})
        shards.write(tmp_path / "speech-000000.tar", [alone.model_copy(update={"voices": ("a",)})])
        config = QuizSource(kind="quiz", rows=1, under=tmp_path)
        with pytest.raises(UserError, match="no conversation with 3 codebooks and silence in"):
            sources.open_source(config, streams, tokenizer, WEIGHTS, 0)


class TestUntranscribed:
    """Channels of which nobody wrote down the words."""

    def test_nothing_is_learned_of_their_text(
        self, streams: Streams, tokenizer: TextTokenizer
    ) -> None:
        sample = dialogue("d", 40).model_copy(update={"meta": {UNTRANSCRIBED: [USER]}})
        sample = sample.model_copy(update={"words": (sample.words[ASSISTANT], ())})
        swapped = documents.exchanged(sample)
        assert swapped.meta[UNTRANSCRIBED] == [ASSISTANT]
        for one, silent, learned in (
            (sample, streams.heard_index, streams.text_index),
            (swapped, streams.text_index, streams.heard_index),
        ):
            made = documents.encode_dialogue(one, streams, tokenizer, WEIGHTS)
            found = documents.dialogue_document(made, streams, WEIGHTS, np.random.default_rng(0))
            assert (found.columns[silent, 1:] == ABSENT).all()
            assert not found.weights[silent].any() and found.weights[learned].all()

    @given(frames=st.integers(1, 9), seed=st.integers(0, 50))
    @settings(max_examples=50)
    def test_text_moves_further_than_a_short_document_is_long(self, frames: int, seed: int) -> None:
        row = np.arange(10, 10 + frames).astype(np.int32)
        moved = documents._moved(row, WeightConfig(jitter=0.6), np.random.default_rng(seed))
        kept = moved[moved != PAD]
        assert len(moved) == frames and (np.diff(kept) == 1).all()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixture")
    for name, count in (("a", 4), ("b", 6)):
        samples = [
            dialogue(f"{name}{i}", 20, i).model_copy(update={"wer": i / 10 if i else None})
            for i in range(count)
        ]
        shards.write(path / name / "dialogue-000000.tar", samples)
    return path


class TestMixtures:
    """Weighted folders, their order, how often they are seen."""

    def names(
        self,
        folders: Path,
        streams: Streams,
        tokenizer: TextTokenizer,
        count: int,
        weights: tuple[float, float],
        lane: int = 0,
        **changes: object,
    ) -> list[str]:
        parts = [{"path": folders / n, "weight": w} for n, w in zip("ab", weights, strict=True)]
        source = DialogueSource.model_validate(
            {"kind": "dialogues", "path": parts, "rows": 1, **changes}
        )
        opened = sources.open_source(source, streams, tokenizer, WEIGHTS, 0)
        return [opened.document(lane, number).name for number in range(count)]

    def test_a_pass_holds_each_sample_as_often_as_its_folder_weighs(
        self, folders: Path, streams: Streams, tokenizer: TextTokenizer
    ) -> None:
        seen = self.names(folders, streams, tokenizer, 3 * 11, (2.0, 0.5))
        for begin in (0, 11, 22):
            part = seen[begin : begin + 11]
            assert sorted(n for n in part if n[0] == "a") == sorted(2 * ["a0", "a1", "a2", "a3"])
            assert len({n for n in part if n[0] == "b"}) == 3
        assert seen[:11] != seen[11:22]
        assert {n for n in seen if n[0] == "b"} > {n for n in seen[:11] if n[0] == "b"}
        alone = self.names(folders, streams, tokenizer, 8, (1.0, 0.0))
        assert {n[0] for n in alone} == {"a"}

    def test_one_folder_is_read_in_the_order_it_always_was(
        self, folders: Path, streams: Streams, tokenizer: TextTokenizer
    ) -> None:
        source = DialogueSource(kind="dialogues", path=folders / "b", rows=1)
        opened = sources.open_source(source, streams, tokenizer, WEIGHTS, 7)
        found = [opened.document(0, number).name for number in range(12)]
        orders = [np.random.default_rng((7, epoch)).permutation(6) for epoch in range(2)]
        assert found == [f"b{place}" for order in orders for place in order]

    def test_all_lanes_together_see_each_sample_once_in_a_pass(
        self, folders: Path, streams: Streams, tokenizer: TextTokenizer
    ) -> None:
        lines = folders / "ten.txt"
        lines.write_text("".join(f"line {word}.\n" for word in "abcdefghij"))
        for config, count in (
            (DialogueSource(kind="dialogues", path=folders / "b", rows=3), 6),
            (SentenceSource(kind="sentences", path=lines, rows=5), 10),
        ):
            opened = sources.open_source(config, streams, tokenizer, WEIGHTS, 7)
            for epoch in range(3):
                numbers = range(epoch * count // config.rows, (epoch + 1) * count // config.rows)
                seen = [
                    opened.document(lane, number).name
                    for lane in range(config.rows)
                    for number in numbers
                ]
                assert len(set(seen)) == len(seen) == count

    def test_a_little_of_a_small_folder_is_not_nothing(self, folders: Path) -> None:
        part = sources.Part(path=folders, weight=0.01)
        pool = sources.Pool([part], [[(10, None)] * 10], "shuffled", 0, 1)
        assert len(pool) == 1 and {pool.index(0, number) for number in range(60)} == set(range(10))

    def test_quality_comes_last(
        self, folders: Path, streams: Streams, tokenizer: TextTokenizer
    ) -> None:
        seen = self.names(folders, streams, tokenizer, 20, (1.0, 1.0), order="quality")
        assert seen[:2] == ["b5", "b4"] and set(seen[2:4]) == {"a3", "b3"}
        assert set(seen[4:6]) == {"a0", "b0"}  # never judged: in the middle
        assert set(seen[8:10]) == set(seen[-2:]) == {"a1", "b1"}
        assert set(seen[:10]) == set(seen[10:])
        many = [[(10, wer / 200) for wer in range(200)]]
        pool = sources.Pool([sources.Part(path=folders)], many, "quality", 0, 4)
        rows = [[pool.index(lane, number) for lane in range(4)] for number in range(50)]
        assert [place for row in rows for place in row] == list(range(200))[::-1]
        alike = sources.Pool([sources.Part(path=folders)], [[(10, 0.0)] * 50], "quality", 0, 1)
        passes = [[alike.index(0, 50 * epoch + n) for n in range(50)] for epoch in range(2)]
        assert passes[0] != passes[1] and sorted(passes[0]) == sorted(passes[1])

    def test_an_order_by_quality_needs_judged_samples(
        self, folder: Path, streams: Streams, tokenizer: TextTokenizer
    ) -> None:
        source = DialogueSource(kind="dialogues", path=folder, rows=1, order="quality")
        with pytest.raises(UserError, match="order is quality, but no recognizer has judged"):
            sources.open_source(source, streams, tokenizer, WEIGHTS, 0)

    def test_shards_may_lie_in_a_store(self, streams: Streams, tokenizer: TextTokenizer) -> None:
        store = UPath("memory://test-data/talks")
        shards.write(store / "dialogue-000000.tar", [dialogue("d", 20)])
        source = DialogueSource.model_validate(
            {"kind": "dialogues", "path": "memory://test-data/talks", "rows": 1}
        )
        assert DialogueSource.model_validate_json(source.model_dump_json()) == source
        opened = sources.open_source(source, streams, tokenizer, WEIGHTS, 0)
        assert opened.document(0, 0).name == "d"
        many = {"path": [{"path": "memory://test-data/talks"}, {"path": "memory://test-data/no"}]}
        source = DialogueSource.model_validate({"kind": "dialogues", "rows": 1, **many})
        with pytest.raises(UserError, match=r"no shard .* 'memory://test-data/no'"):
            sources.open_source(source, streams, tokenizer, WEIGHTS, 0)

    def test_a_mixture_of_nothing_is_refused(self, folders: Path) -> None:
        layout = {
            "run": {"dir": "nowhere", "steps": 1},
            "codec": "none",
            "sources": [
                {
                    "kind": "dialogues",
                    "rows": 1,
                    "path": [{"path": str(folders / "a"), "weight": 0}],
                }
            ],
        }
        with pytest.raises(UserError, match="the mixture sums to zero: give a weight above 0"):
            build(layout, TrainConfig, "lm.yaml")
        layout["sources"] = [{"kind": "podcasts", "rows": 1, "path": str(folders)}]
        with pytest.raises(UserError, match="podcasts.*'dialogues'"):
            build(layout, TrainConfig, "lm.yaml")

    def test_the_epochs_of_a_run_are_stated(
        self, folders: Path, streams: Streams, tokenizer: TextTokenizer
    ) -> None:
        parts = (
            sources.Part(path=folders / "a", weight=2),
            sources.Part(path=folders / "b", epochs=3),
        )
        source = DialogueSource(kind="dialogues", path=parts, rows=2)
        mixture = Mixture([source], streams, tokenizer, WEIGHTS, length=70, seed=0)
        # A pass is (2·4 + 6)·20 columns; ten steps are 2·70·10.
        with pytest.raises(
            UserError, match="would be seen 5 times in 10 steps; its epochs allow 3"
        ):
            mixture.exposures(10)
        assert [one.epochs for one in mixture.exposures(5)] == [5.0, 2.5]


def feeds(folder: Path) -> list[sources.Source]:
    lines = folder / "lines.txt"
    lines.write_text("One line.\nAnother line here.\nThe third of them.\n")
    return [
        DialogueSource(kind="dialogues", path=folder, rows=3),
        QuizSource(kind="quiz", rows=2),
        SentenceSource(kind="sentences", path=lines, rows=1),
        InterleavedSource(kind="interleaved", path=folder, rows=2),
    ]


class TestQuiz:
    def asked(self, tokenizer: TextTokenizer, streams: Streams, **options: Any) -> list[str]:
        config = QuizSource(kind="quiz", rows=1, turns=1, unknown=0, **options)
        opened = sources.open_source(config, streams, tokenizer, WEIGHTS, 0)
        return [opened.document(0, number).name for number in range(300)]

    def test_without_time_the_end_is_learned_and_no_pace(
        self, streams: Streams, tokenizer: TextTokenizer
    ) -> None:
        turns = [("what is one plus two", "one plus two is three"), ("", "two")]
        made = documents.question_document(
            turns, streams, tokenizer, WEIGHTS, lambda n: n + 2, timed=False
        )
        text = streams.text_index
        row, weights = made.columns[text, 1:], made.weights[text]
        silent = np.isin(row, (PAD, EPAD))
        assert (weights[~silent] == 1).all()
        # Two frames after "three" and the two of the pace after "two", with the one that ends all.
        starts = np.flatnonzero(row == EPAD)
        assert len(starts) == 2 and not weights[starts].any()
        learned = np.flatnonzero(silent & (weights > 0))
        assert (row[learned] == PAD).all()
        last = [np.flatnonzero(~silent[:end])[-1] for end in (starts[1], len(row))]
        expected = [at + n for at in last for n in range(1, 5) if at + n < len(row)]
        assert [at for at in expected if row[at] == PAD] == learned.tolist()

    def test_answers_stand_alone(self, streams: Streams, tokenizer: TextTokenizer) -> None:
        config = QuizSource(kind="quiz", rows=1, alone=0.5)
        opened = sources.open_source(config, streams, tokenizer, WEIGHTS, 0)
        alone = 0
        for number in range(40):
            made = opened.document(0, number)
            asked = (made.columns[streams.heard_index, 1:] != PAD).any()
            alone += not asked
            if not asked:
                assert re.search(r" (plus|minus|times|is|are|make|says|of) ", made.name)
        assert 10 < alone < 30
        with pytest.raises(ValidationError, match="alone is 1, but categories names none"):
            QuizSource(kind="quiz", rows=1, alone=1.0, categories={"repeat": 1})

    def test_a_category_of_more_weight_is_more_frequent(
        self, streams: Streams, tokenizer: TextTokenizer
    ) -> None:
        weights = {**dict.fromkeys(quiz.CATEGORIES, 1.0), "counting": 40}
        many = self.asked(tokenizer, streams, categories=weights)
        few = self.asked(tokenizer, streams)
        assert sum("ount" in text for text in many) > 180 > 40 > sum("ount" in t for t in few)

    def test_numbers_beyond_the_world_come_from_a_share(
        self, streams: Streams, tokenizer: TextTokenizer
    ) -> None:
        sums = {"plus": 1, "minus": 1}
        large = ("fifty", "sixty", "seventy", "eighty", "ninety")
        for share, least, most in ((0.0, 0, 0), (1.0, 150, 300)):
            asked = self.asked(tokenizer, streams, categories=sums, beyond=share)
            assert least <= sum(any(n in text.lower() for n in large) for text in asked) <= most

    def test_a_category_that_is_not_there_is_refused(self) -> None:
        with pytest.raises(ValueError, match="no category 'sums'; choices: plus, minus"):
            QuizSource(kind="quiz", rows=1, categories={"sums": 2})


class TestPacking:
    @given(
        st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=6),
        st.integers(3, 20),
        st.integers(1, 6),
    )
    @settings(max_examples=50)
    def test_nothing_is_lost_and_inputs_are_the_columns_before(
        self, sizes: list[tuple[int, bool]], length: int, rows: int
    ) -> None:
        streams = Streams(text_size=10_000, codebooks=((5,),))
        sizes = [(min(size, length) if whole else size, whole) for size, whole in sizes]

        class Numbered:
            def document(self, lane: int, number: int) -> Document:
                size, whole = sizes[number % len(sizes)]
                columns = 100 * number + np.arange(size + 1, dtype=np.int32)
                full = np.broadcast_to(columns, (streams.count, size + 1))
                return Document(full, np.ones((streams.count, size), np.float32), whole)

        packer = Packer(Numbered(), streams, 1, length)
        seen: list[int] = []
        for _ in range(rows):
            batch = packer.next()
            used = batch.weights[0, 0] > 0
            inputs, targets = batch.inputs[0, 0][used], batch.targets[0, 0][used]
            assert (inputs == targets - 1).all()
            seen += targets.tolist()
            if batch.segments is not None:
                assert (batch.segments[0][used] == targets // 100 - targets[0] // 100).all()
        wanted = [100 * n + 1 + i for n in range(200) for i in range(sizes[n % len(sizes)][0])]
        assert seen == wanted[: len(seen)] and len(seen) > 0

    def test_a_resumed_mixture_goes_on_the_same(
        self, folder: Path, streams: Streams, tokenizer: TextTokenizer
    ) -> None:
        def make() -> Mixture:
            return Mixture(feeds(folder), streams, tokenizer, WEIGHTS, length=50, seed=3)

        straight = make()
        for _ in range(4):
            straight.next()
        state = straight.state_dict()
        resumed = make()
        resumed.load_state_dict(state)
        for _ in range(4):
            for (share, one), (other_share, other) in zip(
                straight.next(), resumed.next(), strict=True
            ):
                assert share == other_share
                assert bool((one.inputs == other.inputs).all())
                assert bool((one.targets == other.targets).all())
                assert bool((one.weights == other.weights).all())

    def test_any_number_of_processes_reads_the_same_rows(
        self, folder: Path, streams: Streams, tokenizer: TextTokenizer
    ) -> None:
        def make(rank: int, world: int) -> Mixture:
            return Mixture(
                feeds(folder)[1:2], streams, tokenizer, WEIGHTS,
                length=50, seed=3, rank=rank, world=world,
            )  # fmt: skip

        whole, parts = make(0, 1), [make(rank, 2) for rank in range(2)]
        for _ in range(3):
            expected = whole.next()[0][1].inputs
            assert bool((torch.cat([part.next()[0][1].inputs for part in parts]) == expected).all())
        state = data.together([part.state_dict() for part in parts])
        assert state == whole.state_dict()
        expected, late = whole.next()[0][1].inputs, make(1, 2)
        late.load_state_dict(state)
        assert bool((late.next()[0][1].inputs == expected[1:]).all())
        with pytest.raises(UserError, match=r"sources\.0\.rows is 2; it must be a multiple .* 3"):
            make(0, 3)
        with pytest.raises(UserError, match=r"their rows are \[2\], but the run .* has \[1\]"):
            whole.load_state_dict({"places": [[[0, 0]]]})

    @given(
        st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=8),
        st.integers(0, 6),
    )
    @settings(max_examples=50)
    def test_who_looks_ahead_wastes_less_and_loses_nothing(
        self, sizes: list[tuple[int, bool]], lookahead: int
    ) -> None:
        streams, length, rows = Streams(text_size=10_000, codebooks=((5,),)), 40, 12

        class Numbered:
            def document(self, lane: int, number: int) -> Document:
                size, whole = sizes[number % len(sizes)]
                columns = np.full((streams.count, size + 1), number, np.int32)
                return Document(columns, np.ones((streams.count, size), np.float32), whole)

        def pack(lookahead: int) -> tuple[Packer, dict[int, int], int]:
            packer = Packer(Numbered(), streams, 1, length, lookahead=lookahead)
            used: dict[int, int] = {}
            for _ in range(rows):
                packer.next()
                assert all(p.columns > 0 for p in packer.placed)
                for p in packer.placed:
                    used[p.number] = used.get(p.number, 0) + p.columns
            return packer, used, sum(used.values())

        packer, used, filled = pack(lookahead)
        place = packer.places[0]
        assert len(place.held) <= lookahead
        begun = {place.number: place.used} if place.used else {}
        done = {n: sizes[n % len(sizes)][0] for n in range(place.number) if n not in place.held}
        assert used == done | begun
        if lookahead == 0:
            assert not place.held and list(used) == sorted(used)

    def test_looking_ahead_fills_rows(self) -> None:
        streams = Streams(text_size=10_000, codebooks=((5,),))

        class Awkward:
            def document(self, lane: int, number: int) -> Document:
                size = (30, 30, 10)[number % 3]
                columns = np.full((streams.count, size + 1), number, np.int32)
                return Document(columns, np.ones((streams.count, size), np.float32), True)

        def filled(lookahead: int) -> float:
            packer = Packer(Awkward(), streams, 1, 40, lookahead=lookahead)
            return sum(float((packer.next().weights[:, 0] > 0).sum()) for _ in range(10)) / 400

        assert filled(0) < 0.9 < filled(4)

    def test_what_is_longer_than_a_row_is_left_out_and_told(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        streams = Streams(text_size=10_000, codebooks=((5,),))

        class Long:
            def __init__(self, *sizes: int) -> None:
                self.sizes = sizes

            def document(self, lane: int, number: int) -> Document:
                size = self.sizes[number % len(self.sizes)]
                columns = np.full((streams.count, size + 1), number, np.int32)
                weights = np.ones((streams.count, size), np.float32)
                return Document(columns, weights, True, f"n{number}")

        for lookahead in (0, 3):
            caplog.clear()
            packer = Packer(Long(10, 41, 20), streams, 1, 40, lookahead=lookahead, name="sources.1")
            seen = []
            for _ in range(6):
                packer.next()
                seen += [placed.number for placed in packer.placed]
            assert {number % 3 for number in seen} == {0, 2} and len(seen) == len(set(seen))
            assert [record.getMessage() for record in caplog.records] == [
                "sources.1: 'n1' has 41 columns and a row 40: such long documents are left out"
            ]
        with pytest.raises(UserError, match=r"sources\.1: 1000 documents .* 40 columns"):
            Packer(Long(41, 50), streams, 1, 40, name="sources.1").next()

    def test_shares_and_shapes(
        self, folder: Path, streams: Streams, tokenizer: TextTokenizer
    ) -> None:
        mixture = Mixture(feeds(folder), streams, tokenizer, WEIGHTS, length=50, seed=0)
        batches = mixture.next()
        assert [share for share, _ in batches] == [3 / 8, 2 / 8, 1 / 8, 2 / 8]
        for (_, batch), rows in zip(batches, (3, 2, 1, 2), strict=True):
            assert batch.inputs.shape == (rows, streams.count, 50)
            assert float(batch.weights.sum()) > 0
        sizes = np.array(streams.sizes)[None, :, None]
        assert all((b.targets.numpy() <= sizes).all() for _, b in batches)

    def test_lanes_and_seeds_differ(
        self, folder: Path, streams: Streams, tokenizer: TextTokenizer
    ) -> None:
        def first(seed: int, rank: int) -> list[int]:
            quizzes = feeds(folder)[1:2]
            mixture = Mixture(
                quizzes, streams, tokenizer, WEIGHTS, length=50, seed=seed, rank=rank, world=2
            )
            return mixture.next()[0][1].targets[:, -1].flatten().tolist()

        assert first(0, 0) == first(0, 0)
        assert first(0, 0) != first(1, 0)
        assert first(0, 0) != first(0, 1)

    def test_an_empty_folder_is_named(
        self, tmp_path: Path, streams: Streams, tokenizer: TextTokenizer
    ) -> None:
        with pytest.raises(UserError, match="no shard"):
            Mixture(
                [DialogueSource(kind="dialogues", path=tmp_path, rows=1)],
                streams,
                tokenizer,
                WEIGHTS,
                length=50,
                seed=0,
            )
