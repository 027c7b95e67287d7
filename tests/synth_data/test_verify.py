"""The independent judge: error counts, the language model's arithmetic, and what it hears."""

from __future__ import annotations

import ctypes.util
import itertools
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import TOKENIZER

from audio_codec import checkpoint
from audio_codec.errors import UserError
from audio_codec.speech_tokenizer import SpeechTokenizer
from synth_data.text import normalize
from synth_data.tts import ASSISTANT, Utterance, Word, speak
from synth_data.verify import (
    Recognizer,
    TokenizerRecognizer,
    Whisper,
    WordErrors,
    arpa,
    default_recognizer,
    get_recognizer,
    missing_words,
    save_language_model,
    verify,
    wer,
    word_errors,
)

flite = pytest.mark.skipif(ctypes.util.find_library("flite") is None, reason="needs flite")
ANSWERS = [
    "The answer is five.",
    "The answer is 25.",
    "The opposite of hot is cold.",
    "The capital of France is Paris.",
    "Say zorblax.",
    "I'm sorry, I don't know that.",
    "Say quuxify.",
]


# --- Word errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "hypothesis", "counts"),
    [
        ("two plus three", "two plus three", (0, 0, 0, 3)),
        ("two plus three", "two plus tree", (1, 0, 0, 3)),
        ("two plus three", "two three", (0, 1, 0, 3)),
        ("two plus three", "two and plus three", (0, 0, 1, 3)),
        ("Two plus 3!", "two plus three", (0, 0, 0, 3)),
        ("a b c d", "", (0, 4, 0, 4)),
        ("", "a b", (0, 0, 2, 0)),
        ("", "", (0, 0, 0, 0)),
        ("a b", "b a", (2, 0, 0, 2)),
        ("a b c d e", "x b c e f", (3, 0, 0, 5)),
        ("a b c d e f", "b c d e f g", (0, 1, 1, 6)),
    ],
)
def test_word_errors(reference: str, hypothesis: str, counts: tuple[int, int, int, int]) -> None:
    assert word_errors(reference, hypothesis) == WordErrors(*counts)


words = st.lists(st.sampled_from("abcd"), max_size=7).map(" ".join)


def slow_distance(a: list[str], b: list[str]) -> int:
    """Levenshtein distance by its definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(
        slow_distance(a[1:], b[1:]) + (a[0] != b[0]),
        slow_distance(a[1:], b) + 1,
        slow_distance(a, b[1:]) + 1,
    )


@given(words.filter(lambda w: len(w) < 10), words.filter(lambda w: len(w) < 10))
def test_errors_are_the_levenshtein_distance(a: str, b: str) -> None:
    found = word_errors(a, b)
    assert found.errors == slow_distance(a.split(), b.split())
    assert len(a.split()) - found.deletions + found.insertions == len(b.split())
    mirrored = word_errors(b, a)
    assert (found.substitutions, found.deletions) == (mirrored.substitutions, mirrored.insertions)


def test_rates() -> None:
    assert wer("a b c d", "a x c d") == 0.25
    assert wer("a", "b c d") == 3
    assert (wer("", ""), wer("", "a")) == (0, 1)
    assert (word_errors("a b", "a") + word_errors("c d", "c d")).rate == 0.25


# --- The language model ---------------------------------------------------------------------------


def read_arpa(text: str) -> tuple[dict[tuple[str, ...], float], dict[tuple[str, ...], float]]:
    probability, backoff = {}, {}
    for line in text.splitlines():
        fields = line.split("\t")
        if len(fields) > 1:
            gram = tuple(fields[1].split())
            probability[gram] = 10 ** float(fields[0])
            if len(fields) > 2:
                backoff[gram] = 10 ** float(fields[2])
    return probability, backoff


@given(
    st.lists(words.filter(bool), min_size=1, max_size=6),
    st.integers(2, 4),
    st.floats(0.1, 0.9),
)
def test_every_history_shares_out_exactly_one(
    texts: list[str], order: int, discount: float
) -> None:
    probability, backoff = read_arpa(arpa(texts, order=order, discount=discount))
    vocabulary = [gram[0] for gram in probability if len(gram) == 1 and gram != ("<s>",)]

    def chance(history: tuple[str, ...], word: str) -> float:
        """Katz back-off, by its definition."""
        if (*history, word) in probability:
            return probability[(*history, word)]
        return backoff.get(history, 1.0) * chance(history[1:], word)

    histories = {gram[:-1] for gram in probability} | {gram for gram in probability}
    for history in (h for h in histories if len(h) < order and h[-1:] != ("</s>",)):
        assert sum(chance(history, word) for word in vocabulary) == pytest.approx(1, abs=1e-3)


def test_arpa_counts_and_form() -> None:
    text = arpa(["Two plus 3.", "two plus four"], order=2)
    header = list(itertools.takewhile(bool, text.splitlines()))
    assert header == ["\\data\\", "ngram 1=6", "ngram 2=6"]
    assert text.rstrip().endswith("\\end\\") and "\\2-grams:" in text
    probability, _ = read_arpa(text)
    assert probability[("two", "plus")] == pytest.approx((2 - 0.5) / 2, rel=1e-3)
    assert probability[("two",)] == pytest.approx(2 / 8, rel=1e-3)  # </s> counts, <s> does not.
    assert ("three",) in probability
    with pytest.raises(UserError, match="at least one"):
        arpa(["?!"])


def test_words_without_a_pronunciation_are_reported(
    judge: tuple[Recognizer, list[str]],
) -> None:
    assert missing_words(["The zorblax is blue.", "Say quuxify 3 times"]) == ["quuxify", "zorblax"]
    _, warnings = judge
    assert len(warnings) == 1 and "quuxify" in warnings[0] and "zorblax" not in warnings[0]


# --- The recognizer -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge() -> tuple[Recognizer, list[str]]:
    """A recognizer over the answers, and what was logged while it was made."""
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("synth_data.verify")
    logger.addHandler(handler)
    made = Recognizer.over(ANSWERS, {"zorblax": "Z AO R B L AE K S"}, order=2)
    logger.removeHandler(handler)
    return made, warnings


@flite
def test_it_hears_which_answer_was_said(judge: tuple[Recognizer, list[str]]) -> None:
    recognizer, _ = judge
    heard = [verify(speak(text, ASSISTANT), recognizer) for text in ANSWERS[:5]]
    assert [found.errors.errors for found in heard] == [0] * 5
    assert heard[1].hypothesis == "the answer is twenty five"
    assert heard[4].hypothesis == "say zorblax"  # By the pronunciation given for it.
    # A transcript does not depend on what was heard before.
    assert verify(speak(ANSWERS[1], ASSISTANT), recognizer) == heard[1]


@flite
def test_errors_are_against_the_words_that_should_have_been_said(
    judge: tuple[Recognizer, list[str]],
) -> None:
    said = speak("the answer is five", ASSISTANT)
    claimed = tuple(Word(text, 0, 1) for text in ("the", "opposite", "of", "hot", "is", "cold"))
    found = verify(Utterance(said.pcm, said.sample_rate, claimed), judge[0])
    assert found.errors.rate > 0.5


@flite
def test_a_grammar(tmp_path: Path) -> None:
    (tmp_path / "answers.jsgf").write_text(
        "#JSGF V1.0;\ngrammar answers;\n"
        "public <answer> = the capital of france is paris | the answer is (five | nine);\n"
    )
    spoken = speak("The answer is five.", ASSISTANT).pcm
    assert Recognizer(tmp_path / "answers.jsgf").transcribe(spoken) == "the answer is five"


def test_a_language_model_is_saved_whole(tmp_path: Path) -> None:
    save_language_model(tmp_path / "answers.arpa", ANSWERS)
    assert (tmp_path / "answers.arpa").read_text() == arpa(ANSWERS)
    assert len(list(tmp_path.iterdir())) == 1


def test_silence_is_no_words(judge: tuple[Recognizer, list[str]]) -> None:
    assert judge[0].transcribe(np.zeros(0, np.float32)) == ""
    assert judge[0].transcribe(np.zeros(12_000, np.float32)) == ""


def test_bad_language_models_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.jsgf").write_text("not a grammar")
    (tmp_path / "words.txt").write_text("five")
    for name, reason in (
        ("missing.arpa", "not a file"),
        ("words.txt", "suffix"),
        ("bad.jsgf", "bad.jsgf"),
    ):
        with pytest.raises(UserError, match=reason):
            Recognizer(tmp_path / name)


# --- Recognizers by name --------------------------------------------------------------------------


def test_the_tokenizer_reads_its_own_codes(tmp_path: Path) -> None:
    """An untrained one: what counts is that its transcript is that of its codes."""
    torch.manual_seed(3)
    tokenizer = SpeechTokenizer(TOKENIZER).eval()
    torch.nn.init.normal_(tokenizer.head.weight, std=3.0)
    path = checkpoint.save(
        tmp_path / "tokenizer", tokenizer.config, tokenizer.state_dict(), dtype="fp32"
    )
    listener = get_recognizer(f"tokenizer:{path}")
    assert isinstance(listener, TokenizerRecognizer)
    pcm = np.random.default_rng(0).normal(0, 0.1, 4 * 1920 - 7).astype(np.float32)
    whole = torch.from_numpy(np.append(pcm, np.zeros(7, np.float32)))[None, None]
    expected = tokenizer.transcribe(tokenizer.encode(whole))[0]
    assert listener.transcribe(pcm) == normalize(expected) != ""
    assert listener.transcribe(np.zeros(0, np.float32)) == ""


def test_whisper_listens(tmp_path: Path) -> None:
    """A random checkpoint of the true architecture: it hears the same in the same sound."""
    from transformers import (
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizer,
    )

    letters = "abcdefghijklmnopqrstuvwxyz\u0120"
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    vocabulary |= {name: len(vocabulary) + i for i, name in enumerate(special)}
    WhisperTokenizer(vocab=vocabulary, merges=[]).save_pretrained(tmp_path)
    WhisperFeatureExtractor(feature_size=8).save_pretrained(tmp_path)
    end, start = vocabulary[special[0]], vocabulary[special[1]]
    config = WhisperConfig(
        vocab_size=len(vocabulary), num_mel_bins=8, d_model=8, encoder_layers=1,
        encoder_attention_heads=2, decoder_layers=1, decoder_attention_heads=2, encoder_ffn_dim=8,
        decoder_ffn_dim=8, max_target_positions=12, decoder_start_token_id=start,
        eos_token_id=end, bos_token_id=end, pad_token_id=end, begin_suppress_tokens=None,
        init_std=0.5,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    model.generation_config.max_length = 10
    model.generation_config.no_timestamps_token_id = vocabulary[special[2]]
    model.save_pretrained(tmp_path)
    listener = get_recognizer(f"whisper:{tmp_path}")
    assert isinstance(listener, Whisper)
    pcm = np.random.default_rng(0).normal(0, 0.1, 24_000).astype(np.float32)
    heard = listener.transcribe(pcm)
    assert heard and heard == listener.transcribe(pcm) == normalize(heard)
    assert listener.transcribe(np.zeros(24_000, np.float32)) == ""
    # Longer than the encoder hears at once: in pieces, as if said one after the other.
    quiet = np.zeros(29 * 24_000, np.float32)
    assert listener.transcribe(np.concatenate([pcm, quiet, pcm])) == " ".join([heard, heard])


def test_recognizers_by_name(tmp_path: Path) -> None:
    assert get_recognizer("pocketsphinx") is default_recognizer()
    for name in ("kaldi", "whisper:", "tokenizer"):
        with pytest.raises(UserError, match="choose pocketsphinx, tokenizer:PATH or whisper:PATH"):
            get_recognizer(name)
    for name in (f"whisper:{tmp_path}", f"tokenizer:{tmp_path}"):
        with pytest.raises(UserError, match=tmp_path.name):
            get_recognizer(name)
