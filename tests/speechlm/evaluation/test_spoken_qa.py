"""What is asked and how it is judged, with a puppet in the place of the model."""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_codec.audio import FRAME_SIZE, SAMPLE_RATE, Pcm, save
from audio_codec.errors import UserError
from audio_codec.speech_tokenizer import SpeechTokenizer, TokenizerConfig
from speechlm.evaluation import spoken_qa
from speechlm.evaluation.spoken_qa import (
    LANGUAGE_MODEL,
    asking,
    assign,
    chance_scores,
    draw_questions,
    panel,
    speech_of,
)
from synth_data import quiz
from synth_data.quiz import CATEGORIES, Question
from synth_data.tts import ASSISTANT, Utterance, Voice, Word, new_speakers, speak, user_voices
from synth_data.verify import Recognizer, arpa

HELDOUT = user_voices("heldout")


# --- What is asked --------------------------------------------------------------------------------


@settings(max_examples=5, deadline=None)
@given(st.integers(18, 320), st.integers(0, 2**32))
def test_questions_are_held_out_and_even(count, seed):
    questions = draw_questions(count, np.random.default_rng(seed))
    assert len(questions) == count
    assert {q.split for q in questions} == {"heldout"}
    shares = Counter(q.category for q in questions)
    assert set(shares) == set(CATEGORIES)
    assert max(shares.values()) - min(shares.values()) <= 1
    sums = [q for q in questions if q.category in ("plus", "minus", "times")]
    assert sum(q.fact_heldout for q in sums) == len(sums) // 2


def test_the_seed_decides_what_is_asked():
    one, same, other = (draw_questions(40, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one == same != other


def test_three_hundred_questions_are_nearly_all_different():
    questions = draw_questions(300, np.random.default_rng(0))
    assert len(set(questions)) > 280


def test_ten_voices_and_two_engine_voices_that_were_never_trained():
    asked = assign(draw_questions(300, np.random.default_rng(0)), HELDOUT, np.random.default_rng(0))
    voices = Counter(one.voice for one in asked)
    assert len(voices) >= 10
    assert max(voices.values()) - min(voices.values()) <= 1
    new = {voice.name for voice in new_speakers(list(voices))}
    assert {"kal", "kal16"} <= new
    assert new_speakers(user_voices("train")) == []
    trained_elsewhere = Voice.parse("espeak:en-us+m5@rate=165,pitch=33")
    assert new_speakers([trained_elsewhere, ASSISTANT]) == []


def test_the_panel_is_ten_known_voices_and_two_new_ones():
    asked_by = panel()
    assert len(asked_by) == len(set(asked_by)) == 12
    assert {(voice.engine, voice.name) for voice in new_speakers(asked_by)} == {
        ("flite", "kal16"),
        ("espeak", "en-gb-scotland+steph"),
    }
    known = [voice for voice in asked_by if voice in user_voices("train")]
    assert len(known) == 10 and {voice.engine for voice in known} == {"espeak", "flite"}
    assert {voice.engine for voice in panel(("espeak",))} == {"espeak"}


def test_who_asks_is_checked_before_anything_is_loaded():
    with pytest.raises(UserError, match="voices 'all' are unknown; choices: panel, heldout"):
        spoken_qa.evaluate("none", voices=["all"])
    with pytest.raises(UserError, match="category 'sums' is unknown; choices: plus, minus"):
        spoken_qa.evaluate("none", categories=["days", "sums"])


def test_voices_and_categories_are_chosen_by_name():
    named = ["espeak:en-us@rate=150", "espeak:en-gb-x-rp"]
    assert [str(voice) for voice in asking(named)] == named
    assert asking(["heldout"], ("espeak",)) == user_voices("heldout", ("espeak",))
    assert asking(["panel", named[0], "panel"]) == [*panel(), Voice.parse(named[0])]
    drawn = draw_questions(20, np.random.default_rng(0), ["days", "minus"])
    assert Counter(question.category for question in drawn) == {"days": 10, "minus": 10}
    assert sum(question.fact_heldout for question in drawn if question.category == "minus") == 5


# --- How it is judged -----------------------------------------------------------------------------


def question(category: str, text: str, answer: str, key: str, kind: quiz.Kind) -> Question:
    return Question(text, answer, (key,), category, "heldout", kind)


def test_chance_is_what_the_other_answers_of_a_category_score():
    questions = [
        question("colors", "What color is snow?", "Snow is white.", "white", "color"),
        question("colors", "What color is milk?", "Milk is white.", "white", "color"),
        question("colors", "What color is grass?", "Grass is green.", "green", "color"),
        question("capitals", "The capital of Peru?", "It is Lima.", "lima", "capital"),
    ]
    said = ["Snow is white.", "Milk is white.", "Grass is green.", "It is Lima."]
    # Two of three colours share their answer; a category of one cannot be shuffled.
    assert chance_scores(questions, said) == [0.5, 0.5, 0.0]


def test_only_speech_is_recognized():
    pcm = np.zeros(3 * SAMPLE_RATE, np.float32)
    assert len(speech_of(pcm)) == 0
    pcm[SAMPLE_RATE : 2 * SAMPLE_RATE] = 0.1
    assert len(speech_of(pcm)) == pytest.approx(1.4 * SAMPLE_RATE)
    assert np.count_nonzero(speech_of(pcm)) == SAMPLE_RATE


def test_the_language_model_is_that_of_all_answers():
    assert LANGUAGE_MODEL.stat().st_size <= 1_000_000
    assert LANGUAGE_MODEL.read_text() == arpa(quiz.all_answers()), (
        "run python -m speechlm.evaluation.spoken_qa"
    )


def test_the_recognizer_knows_answers_by_their_sound():
    recognizer = Recognizer(LANGUAGE_MODEL)
    for answer in ("Seven plus five is twelve.", "The capital of France is Paris."):
        try:
            spoken = speak(answer, ASSISTANT)
        except UserError as error:
            pytest.skip(str(error))
        assert recognizer.transcribe(spoken.pcm) == quiz.normalize(answer)


# --- Models whose scores are known ----------------------------------------------------------------


class World:
    """Speech that can be read without a recognizer.

    A text has a number; its sound is longer and louder by that many samples and millionths.
    """

    LENGTH, LEVEL, STEP = 7200, 0.1, 1e-6

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.answers: dict[str, str] = {}

    def speak(self, text: str, voice: Voice) -> Utterance:
        if text not in self.texts:
            self.texts.append(text)
        number = self.texts.index(text)
        pcm = np.full(self.LENGTH + number, self.LEVEL + number * self.STEP, np.float32)
        return Utterance(pcm, SAMPLE_RATE, (Word("text", 0.0, len(pcm) / SAMPLE_RATE),))

    def transcribe(self, pcm: Pcm) -> str:
        if not len(pcm):
            return ""
        return self.texts[round((float(pcm.max()) - self.LEVEL) / self.STEP)]

    def draw(self, *args, **options) -> Question:
        drawn = quiz_draw(*args, **options)
        self.answers[drawn.text] = drawn.answer
        return drawn


quiz_draw = quiz.draw


@pytest.fixture
def world(monkeypatch) -> World:
    made = World()
    monkeypatch.setattr(spoken_qa, "speak", made.speak)
    monkeypatch.setattr(spoken_qa, "Recognizer", lambda *_: made)
    monkeypatch.setattr(quiz, "draw", made.draw)
    monkeypatch.setattr(spoken_qa, "LONG_MINUTES", 3)
    return made


def attentive(world: World, reply: Callable[[str], str]):
    """A model that understands every question and says `reply` of it."""

    def make(seed):
        heard = 0  # samples of the question so far
        queue: list[Pcm] = []

        def behave(frame):
            nonlocal heard, queue
            said = asked = ""
            heard += np.count_nonzero(frame)
            if heard and not frame[-1]:
                asked = world.texts[heard - world.LENGTH]
                said = reply(asked)
                pcm = world.speak(said, ASSISTANT).pcm
                padded = np.pad(pcm, (0, -len(pcm) % FRAME_SIZE))
                queue = list(padded.reshape(-1, FRAME_SIZE))
                heard = 0
            return (queue.pop(0) if queue else np.zeros_like(frame)), said, asked

        return behave

    return make


def measure(model, seed=0, conversations=0):
    found = spoken_qa.measure(
        model,
        HELDOUT,
        seed=seed,
        questions=36,
        unknown=6,
        conversations=conversations,
        slots=5,
        progress=False,
    )
    assert found["heard_wer_ctc"].value is None  # a puppet has no tokenizer
    return found, {name: metric.value for name, metric in found.items() if metric.reason is None}


def test_who_knows_everything_is_right_everywhere(world, puppet):
    model = puppet(attentive(world, lambda text: world.answers[text]))
    metrics, values = measure(model, conversations=2)
    assert values.pop("s2s_chance_accuracy") < 0.5
    assert values.pop("heard_wer") == values.pop("false_refusal") == 0
    assert set(values.values()) == {1}
    assert {f"s2t_accuracy_{name}" for name in CATEGORIES} <= set(values)
    assert {"s2t_accuracy_first_minute", "s2t_accuracy_tenth_minute"} <= set(values)
    assert {"s2s_accuracy", "s2s_open_accuracy", "s2s_reference_accuracy"} <= set(values)
    assert metrics["s2t_accuracy"].n == 36 and metrics["unknown_accuracy"].n == 6
    assert metrics["s2t_accuracy_plus"].n == 2
    assert metrics["s2t_accuracy_new_operands"].n == 3
    # The two minutes hold about as many questions as each other: the same ones.
    first, last = (metrics[f"s2t_accuracy_{name}_minute"].n for name in ("first", "tenth"))
    assert first >= 20 and abs(first - last) <= 6


def test_who_refuses_everything(world, puppet):
    model = puppet(attentive(world, lambda text: "Sorry, I don't know that."))
    _, values = measure(model)
    assert values["unknown_accuracy"] == values["false_refusal"] == 1
    assert values["s2t_accuracy"] == values["s2s_accuracy"] == 0


def test_who_says_one_thing_and_writes_another(world, puppet):
    """The voice is judged by its sound, the text by its letters."""

    def make(seed):
        behave = attentive(world, lambda text: world.answers[text])(seed)
        return lambda frame: (behave(frame)[0], "", "")

    _, values = measure(puppet(make))
    assert values["s2s_accuracy"] == values["s2s_open_accuracy"] == 1
    assert values["s2t_accuracy"] == 0
    assert values["heard_wer"] == 1


def test_who_is_silent_knows_nothing(world, silent):
    _, values = measure(silent)
    reference = values.pop("s2s_reference_accuracy")
    assert reference == 1 and values.pop("heard_wer") == 1
    assert set(values.values()) == {0}


def test_who_forgets_is_found_out_in_the_last_minute(world, puppet):
    def make(seed):
        behave = attentive(world, lambda text: world.answers[text])(seed)
        ticks = iter(range(10**6))

        def forgetful(frame):
            pcm, said, heard = behave(frame)
            return pcm, said if next(ticks) < 100 * 12.5 else "", heard

        return forgetful

    _, values = measure(puppet(make), conversations=2)
    assert values["s2t_accuracy_first_minute"] == values["s2t_accuracy"] == 1
    assert values["s2t_accuracy_tenth_minute"] == 0


# --- Recorded people ------------------------------------------------------------------------------


@pytest.fixture
def digits(tmp_path) -> Path:
    """Two speakers, three digits, two takes each; the level of a recording tells its number."""
    rows = ["split\tset\tid\tspeaker\tpath\tseconds\trate\tbytes\ttext\tlicence_source"]
    for number, (speaker, digit, take) in enumerate(product("ab", range(3), range(2))):
        word = ("zero", "one", "two")[digit]
        name = f"{digit}_{speaker}_{take}.wav"
        save(tmp_path / name, np.full(2400 + number, 0.1, np.float32), SAMPLE_RATE)
        rows.append(f"train\tdigits\t{number}\t{speaker}\t{name}\t0.1\t24000\t1\t{word}\tCC0")
    rows.append("train\tpeople\tx\ta\tx.wav\t1\t24000\t1\tseven\tCC0")
    (tmp_path / "manifest.tsv.gz").write_bytes(gzip.compress("\n".join([*rows, ""]).encode()))
    return tmp_path


def test_recorded_digits_are_drawn_evenly(digits):
    drawn = spoken_qa.recorded_digits(digits, 6, np.random.default_rng(0))
    assert Counter(question.text for _, question in drawn) == {"Zero.": 2, "One.": 2, "Two.": 2}
    assert {question.keys for _, question in drawn} == {("one",), ("two",), ("three",)}
    assert len({len(pcm) for pcm, _ in drawn}) == 6  # no recording twice
    again = spoken_qa.recorded_digits(digits, 100, np.random.default_rng(0))
    assert len(again) == 12 and [q for _, q in again[:6]] == [q for _, q in drawn]


def test_a_folder_without_digits_is_refused(digits):
    text = gzip.decompress((digits / "manifest.tsv.gz").read_bytes()).decode()
    (digits / "manifest.tsv.gz").write_bytes(
        gzip.compress(text.replace("\tdigits\t", "\tx\t").encode())
    )
    with pytest.raises(UserError, match="no set 'digits'"):
        spoken_qa.recorded_digits(digits, 6, np.random.default_rng(0))


def test_recorded_digits_are_judged_by_the_next_number(digits, world, puppet):
    drawn = spoken_qa.recorded_digits(digits, 12, np.random.default_rng(0))
    # `attentive` knows a text by how many samples its sound has.
    names = {len(pcm): question for pcm, question in drawn}
    world.LENGTH, world.texts = 0, [names[n].text if n in names else "" for n in range(3000)]
    right = {q.text: q.answer for _, q in drawn} | {"Two.": "Two comes first."}
    model = puppet(attentive(world, lambda text: right[text]))
    metric = spoken_qa.judge_digits(model, drawn, seed=0, slots=4, progress=False)
    assert metric.n == 12 and metric.value == pytest.approx(2 / 3)


def test_no_model_no_measurement(world):
    with pytest.raises(UserError, match="nowhere"):
        spoken_qa.evaluate("nowhere", progress=False)


def test_the_tokenizers_transcripts_are_held_against_the_questions(monkeypatch):
    asked = assign(draw_questions(18, np.random.default_rng(0)), HELDOUT, np.random.default_rng(1))
    heard = []

    def read(tokenizer, pcm, frames):
        start = len(heard)
        heard.extend(pcm[:, 0])
        texts = [a.question.text for a in asked[start : len(heard)]]
        return [f"{text} too" for text in texts]  # one word too many each time

    monkeypatch.setattr(spoken_qa, "read", read)
    config = TokenizerConfig(front_dim=8, front_blocks=1, dim=16, heads=2)
    metric = spoken_qa.judge_listening(SpeechTokenizer(config), asked, batch=7)
    words = sum(len(a.question.text.split()) for a in asked)
    assert metric.value == pytest.approx(18 / words) and len(heard) == 18
    for question, sound in zip(asked, heard, strict=True):
        voiced = sound[sound != 0]
        level = 20 * np.log10(float(voiced.square().mean().sqrt()))
        assert level == pytest.approx(question.dbfs, abs=6)
