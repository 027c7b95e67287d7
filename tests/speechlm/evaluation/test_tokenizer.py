"""The tokenizer's measures, each where its value is known by hand, then on small untrained ones."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf import save_whisper
from hypothesis import given, settings
from hypothesis import strategies as st
from small import TOKENIZER
from torch import Tensor
from typer.testing import CliRunner

from audio_codec import audio
from audio_codec import checkpoint as checkpoints
from audio_codec.audio import FRAME_SIZE, SAMPLE_RATE, Pcm
from audio_codec.errors import UserError
from audio_codec.speech_tokenizer import SpeechTokenizer, TokenizerConfig, load_tokenizer
from audio_codec.token_decoder import TokenDecoder, TokenDecoderConfig
from audio_codec.whisper import StemConfig, TextDecoder
from speechlm.cli import app
from speechlm.evaluation import abx, report, twins
from speechlm.evaluation import tokenizer as evaluation
from speechlm.evaluation.report import Metric, bootstrap_ratio, distinct
from speechlm.evaluation.tokenizer import Candidate, Comparison, Result, Shape, Tally
from speechlm.training.tokenizer import TrainConfig, WhisperPieces, transcribe
from synth_data import shards
from synth_data.augment import active_power
from synth_data.text import normalize
from synth_data.tts import Voice

WITHOUT = TOKENIZER.model_copy(update={"bottleneck": "none"})
"""The shape of a twin."""


def noise(seconds: float, seed: int = 0) -> Pcm:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 0.1, round(seconds * SAMPLE_RATE)).astype(np.float32)


@torch.no_grad()
def small_tokenizer(seed: int = 0) -> SpeechTokenizer:
    """Untrained, but for the statistics of its bottleneck: else all sounds would have one code."""
    torch.manual_seed(seed)
    tokenizer = SpeechTokenizer(TOKENIZER).eval().requires_grad_(False)
    numbers = tokenizer.features(tokenizer.mel(0.1 * torch.randn(4, 1, 10 * FRAME_SIZE)))
    tokenizer.quantizer.mean.copy_(numbers.mean((0, 1)))
    tokenizer.quantizer.variance.copy_(numbers.var((0, 1)))
    return tokenizer


# --- Plain functions ------------------------------------------------------------------------------


def test_a_ratio_is_of_the_sums_and_its_interval_holds_it() -> None:
    metric = bootstrap_ratio([1, 0, 2], [4, 2, 4])
    assert metric.value == pytest.approx(0.3) and metric.n == 3
    assert metric.low == pytest.approx(0) and metric.high == pytest.approx(0.5)
    # Where every pair has one ratio, so has every resample.
    same = bootstrap_ratio([1, 2, 4], [2, 4, 8], "×")
    assert (same.value, same.low, same.high, same.unit) == (0.5, 0.5, 0.5, "×")


def test_a_ratio_to_nothing_has_no_value_and_resamples_of_nothing_do_not_count() -> None:
    assert bootstrap_ratio([1, 2], [0, 0]).reason and bootstrap_ratio([], []).reason
    # A quarter of the resamples draw the second pair alone.
    metric = bootstrap_ratio([1, 1], [1, 0])
    assert (metric.value, metric.low, metric.high) == (2, 1, 2)


def test_repeated_names_get_numbers() -> None:
    assert distinct(["a", "b", "a", "a_2", "a"]) == ["a", "b", "a_2", "a_2_2", "a_3"]


def test_errors_in_words_and_in_characters() -> None:
    tally = Tally()
    tally.add("Two plus 2.", "two plus two")
    tally.add("The cat sat", "the hat")
    # Of six words one is another and one is missing; of 23 characters c is h and " sat" missing.
    assert tally.wer().value == pytest.approx(2 / 6)
    assert tally.cer().value == pytest.approx(5 / 23)
    assert tally.wer().n == tally.cer().n == 2


def test_codes_used() -> None:
    share, entropy = evaluation.codes_used(torch.tensor([2, 2, 0, 0]))
    assert (share.value, share.n, entropy.n) == (0.5, 4, 4)
    assert entropy.value == pytest.approx(0.5)  # one bit of two


def test_edit_distances_by_hand() -> None:
    found = evaluation.edit_distances([[1, 2, 3, 4], [1, 2, 3, 5], [2, 3, 4], [9]])
    quarters = np.array([[0, 1, 1, 4], [1, 0, 2, 4], [1, 2, 0, 4], [4, 4, 4, 0]])
    np.testing.assert_allclose(found, quarters / 4)


def test_speaker_invariance_by_hand() -> None:
    sayings = {
        "one": {"ann": [1, 2, 3, 4], "bob": [1, 2, 3, 5]},
        "two": {"ann": [6, 7, 8, 9], "bob": [6, 7, 8, 9, 9]},
        "alone": {"ann": [1]},
    }
    # Between speakers 1/4 and 1/5; between the sentences of either speaker everything differs.
    metric = evaluation.speaker_invariance(sayings, evaluation.edit_distances)
    assert metric.value == pytest.approx((1 / 4 + 1 / 5) / 2) and metric.n == 2
    assert metric.low == pytest.approx(1 / 5) and metric.high == pytest.approx(1 / 4)
    for lacking in ({"alone": {"ann": [1]}}, {"one": {"ann": [1], "bob": [1]}}, {}):
        assert evaluation.speaker_invariance(lacking, evaluation.edit_distances).reason


def test_warped_speaker_invariance_by_hand() -> None:
    sayings = {
        str(place): {who: np.full((2 + place, 1), place + at) for who, at in (("a", 0), ("b", 1))}
        for place in (0, 4)
    }
    # Speakers are 1 apart in either sentence, sentences 4 of either speaker, whatever the tempo.
    metric = evaluation.speaker_invariance(sayings, abx.distances)
    assert metric.value == pytest.approx(1 / 4)


def test_codes_of_the_speaker_and_codes_of_the_text() -> None:
    by_speaker = {str(i): {"ann": [1] * 5, "bob": [2] * 4 + [1]} for i in range(20)}
    metric = evaluation.speaker_invariance(by_speaker, evaluation.edit_distances)
    assert metric.reason and "differ" in metric.reason
    by_text = {str(i): {"ann": [i] * 3, "bob": [i] * 3} for i in range(20)}
    metric = evaluation.speaker_invariance(by_text, evaluation.edit_distances)
    assert metric.value == 0 and metric.n == 20


@given(st.integers(2, 25), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_codes_by_chance_are_about_as_far_apart_either_way(sentences: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sayings = {
        str(i): {who: rng.integers(1000, size=12).tolist() for who in "abc"}
        for i in range(sentences)
    }
    metric = evaluation.speaker_invariance(sayings, evaluation.edit_distances)
    assert metric.value == pytest.approx(1, abs=0.1)
    # Ten are compared with each other: an eleventh alone has nobody.
    assert metric.n == sentences - (sentences % 10 == 1)


def test_a_shape_is_a_valid_name() -> None:
    assert Shape(12.5, 4375, "fsq", 0).key == "12_5hz_4375_fsq"
    assert Shape(6.25, 1024, "vq", 160).key == "6_25hz_1024_vq_160ms"
    assert f"wer_{Shape(50, 625, 'fsq', 2.5).key}".isidentifier()
    assert f"wer_{Shape(50, 4096, 'vq', math.inf).key}".isidentifier()
    assert Shape(12.5, 16384, "vq", 0).bits == 175  # of the published table


def test_a_tokenizer_says_its_shape() -> None:
    assert evaluation.shape_of(small_tokenizer()) == Shape(12.5, 9, "fsq", 0)


def test_noise_is_as_loud_as_it_says() -> None:
    speech, rng = noise(1.0), np.random.default_rng(0)
    for decibel in evaluation.NOISE_DB:
        added = evaluation.noisy(speech, decibel, rng) - speech
        power = float(np.square(added, dtype=np.float64).mean())
        found = 10 * math.log10(active_power(speech) / power)
        assert found == pytest.approx(decibel, abs=0.01)


# --- Through a tokenizer --------------------------------------------------------------------------


@torch.inference_mode()
def test_codes_do_not_depend_on_the_neighbours_padding() -> None:
    tokenizer, sounds = small_tokenizer(), [noise(0.5, 1), noise(1.3, 2), noise(0.08, 3)]
    together = evaluation.encode(tokenizer, *evaluation.pad(tokenizer, sounds))
    # 20 ms more than the sound, in whole frames.
    assert [len(row) for row in together] == [7, 17, 2]
    for sound, row in zip(sounds, together, strict=True):
        (alone,) = evaluation.encode(tokenizer, *evaluation.pad(tokenizer, [sound]))
        assert torch.equal(row, alone)


class Late:
    """Codes are how loud so many milliseconds are, rounded, and come two codes late."""

    def __init__(self, rate: float, sample_rate: int = SAMPLE_RATE) -> None:
        self.rate, self.sample_rate = rate, sample_rate
        self.size = round(sample_rate / rate)
        self.delay = 2 * self.size

    def encode(self, pcm: Tensor) -> Tensor:
        loudest = pcm[:, 0].unflatten(1, (-1, self.size)).amax(2).round().long()
        return torch.nn.functional.pad(loudest, (2, 0))[:, :-2]


@pytest.mark.parametrize(("rate", "codes"), [(6.25, 4), (12.5, 7), (25.0, 14), (50.0, 28)])
def test_codes_are_put_back_in_step_at_every_rate(rate: float, codes: int) -> None:
    tokenizer: Any = Late(rate)
    sounds = [np.full(SAMPLE_RATE // 2, 3, np.float32), np.full(SAMPLE_RATE * 2, 5, np.float32)]
    short, long = evaluation.encode(tokenizer, *evaluation.pad(tokenizer, sounds))
    # Half a second and 20 ms are seven frames of 80 ms, two seconds and as much 26.
    assert len(short) == codes and len(long) == 26 * rate / 12.5
    spoken = math.ceil(0.5 * rate)
    assert short.tolist() == [3] * spoken + [0] * (codes - spoken)


def test_a_tokenizer_of_another_sample_rate_hears_the_same_sounds() -> None:
    time = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    sounds = [np.where(time < 0.5, 2.6, 5.4).astype(np.float32), 4 * np.ones(9000, np.float32)]
    high, low = (
        evaluation.encode(tokenizer, *evaluation.pad(tokenizer, sounds))
        for tokenizer in (Late(12.5), Late(12.5, 16_000))
    )
    for one, other in zip(high, low, strict=True):
        # A filter rings at a jump: the frames that hold one are not compared.
        same = [a == b for a, b in zip(one.tolist(), other.tolist(), strict=True)]
        assert len(one) == len(other) and sum(same) >= len(same) - 2
    assert low[0][2] == 3 and low[0][10] == 5 and low[1][2] == 4


@torch.inference_mode()
def test_what_is_read_are_the_codes() -> None:
    tokenizer = small_tokenizer()
    padded = evaluation.pad(tokenizer, [noise(0.5), noise(0.9)])
    codes = tokenizer.encode(padded[0])
    assert evaluation.read(tokenizer, *padded)[1] == tokenizer.transcribe(codes)[1]


def test_the_real_time_factor_is_of_the_stream_s_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=0.004)  # every look at it takes 4 ms
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    threads = torch.get_num_threads()
    metric = evaluation.realtime_factor(small_tokenizer())
    assert metric.value == pytest.approx(0.004 / 0.08) and metric.n == 200
    assert torch.get_num_threads() == threads


def test_what_sees_the_whole_sound_does_not_stream(
    monkeypatch: pytest.MonkeyPatch, scripted: Candidate
) -> None:
    monkeypatch.setattr(evaluation, "shape_of", lambda _: Shape(12.5, 9, "fsq", math.inf))
    monkeypatch.setattr(SpeechTokenizer, "streams", False)
    measured = evaluation.measure(scripted, utterances=1, seed=0, stream_hours=1)
    for name in ("lookahead_ms", "realtime_factor", "streaming_agreement"):
        assert measured.metrics[name].reason, name
    # It has no place on the curve.
    curve = Comparison((measured,), False, "")._lines(
        "wer_quantized", {"small": "a"}, "lookahead_ms"
    )
    assert curve == {}


def test_speech_is_made_as_it_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    spoken: list[str] = []

    def speak(text: str, voice: Any) -> Any:
        spoken.append(str(voice))
        return type("Utterance", (), {"pcm": noise(0.1)})

    monkeypatch.setattr(evaluation, "speak", speak)
    found = evaluation.heldout_speech(1000, seed=0)
    _, _, voice = next(found)
    assert len(spoken) == 1 and str(voice) == "flite:kal16"
    texts = [[text for _, text, _ in evaluation.heldout_speech(20, 0, who)] for who in
             ("heldout", "train")]  # fmt: skip
    assert texts[0] == texts[1] and len(texts[0]) == 20
    endless = evaluation.endless_speech(0)
    assert len(list(itertools.islice(endless, 600))) == 600


# --- A stream and one pass ------------------------------------------------------------------------

AGREEING: dict[str, dict[str, Any]] = {
    "causal": {},
    "late": {"lookahead_ms": 160},
    "blocks": {"block_ms": 240},
    "whisper": {"whisper": {"positions": 110}, "pooling": "avg"},  # a table of 2.2 s
}


class Drifting(SpeechTokenizer):
    """Hears a stream wrongly once it has gone on for four seconds."""

    def features(self, mel: Tensor, state: Any = None) -> Tensor:
        late = state is not None and int(state.before.offset) >= 100
        return super().features(mel + 0.5 * late, state)


def agreement(tokenizer: SpeechTokenizer, seconds: float) -> dict[str, Metric]:
    sounds = (noise(0.7, seed) for seed in itertools.count())
    with evaluation.progress_bar(False) as bar:
        return evaluation.streaming_agreement(tokenizer, sounds, seconds, bar)


@torch.no_grad()
def agreeing(kind: type[SpeechTokenizer], name: str) -> SpeechTokenizer:
    fields = {**TOKENIZER.model_dump(), "levels": (5, 5, 5), **AGREEING[name]}
    torch.manual_seed(4)
    tokenizer = kind(TokenizerConfig.model_validate(fields)).eval().requires_grad_(False)
    numbers = tokenizer.features(tokenizer.mel(0.1 * torch.randn(4, 1, 36 * FRAME_SIZE)))
    tokenizer.quantizer.mean.copy_(numbers.mean((0, 1)))
    tokenizer.quantizer.variance.copy_(numbers.var((0, 1)))
    return tokenizer


@pytest.mark.parametrize("name", AGREEING)
def test_a_stream_agrees_with_passes_over_its_minutes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "_PASS_SECONDS", 2)
    found = agreement(agreeing(SpeechTokenizer, name), 9)
    assert found["streaming_agreement_float64"].value == 1
    assert (found["streaming_agreement"].value or 0) >= 0.99
    assert all(metric.n in (125, 135) for metric in found.values())  # whole passes, whole blocks


def test_a_stream_that_drifts_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_PASS_SECONDS", 2)
    for metric in agreement(agreeing(Drifting, "causal"), 8).values():
        assert metric.value is not None and 0.4 < metric.value < 0.9 and metric.n == 100


# --- One tokenizer --------------------------------------------------------------------------------

SENTENCES = ("one two", "three four five")
SPEAKERS = tuple(map(Voice.parse, ("flite:kal16@rate=1.2", "flite:slt@pitch=170")))
"""A new one, and a trained one at a pitch that is not."""


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Candidate:
    """A tokenizer and a twin that read as they are told; speech without a speech engine.

    Both sentences are heard from either group of voices. Through its codes the tokenizer loses the
    last word, past the rounding it hears all, and with noise added nothing; the twin adds a word to
    the first sentence.
    """

    def speech(count: int, seed: int, voices: str = "heldout") -> Iterator[tuple[Pcm, str, Voice]]:
        for index in range(count):
            yield noise(0.5 + index), SENTENCES[index % 2], SPEAKERS[index % 2]

    tokenizer, twin = small_tokenizer(0), small_tokenizer(1)

    def transcribe(
        model: SpeechTokenizer, mel: Tensor, frames: Tensor, *, quantized: bool, vocabulary: None
    ) -> list[str]:
        assert mel.shape == (len(frames), 8 * int(frames.max()), 80)
        texts = [SENTENCES[index % 2] for index in range(len(frames))]
        if model is twin:
            assert not quantized
            return [f"{text} more" if text == SENTENCES[0] else text for text in texts]
        if not quantized:
            return texts
        if torch.allclose(mel[0], clean[len(frames), mel.shape[1]][0]):
            return [text.rpartition(" ")[0] for text in texts]
        return [""] * len(frames)

    clean: dict[tuple[int, int], Tensor] = {}

    def pad(model: SpeechTokenizer, sounds: Sequence[Pcm]) -> tuple[Tensor, Tensor]:
        pcm, frames = original(model, sounds)
        if model.sample_rate == SAMPLE_RATE:
            clean.setdefault((len(sounds), int(frames.max()) * 8), tokenizer.mel(pcm))
        return pcm, frames

    original: Callable[..., tuple[Tensor, Tensor]] = evaluation.pad
    monkeypatch.setattr(evaluation, "heldout_speech", speech)
    monkeypatch.setattr(evaluation, "transcribe", transcribe)
    monkeypatch.setattr(evaluation, "pad", pad)
    monkeypatch.setattr(evaluation, "TIMED_SECONDS", 1)
    return Candidate("small", tokenizer, twin)


def test_every_metric_of_a_tokenizer_that_reads_as_it_is_told(scripted: Candidate) -> None:
    found = evaluation.measure(scripted, utterances=2, seed=0).metrics
    for group in ("", "_known"):
        assert found[f"wer_quantized{group}"].value == pytest.approx(2 / 5)
        assert found[f"wer_unquantized{group}"].value == 0
        assert found[f"wer_twin{group}"].value == pytest.approx(1 / 5)
        assert found[f"wer_ratio{group}"].value == pytest.approx(2)
        # " two" of 7 characters, " five" of 15; "one two more" has five too many.
        assert found[f"cer_quantized{group}"].value == pytest.approx(9 / 22)
        assert found[f"cer_twin{group}"].value == pytest.approx(5 / 22)
    # The first sentence alone: its last word of two is lost, and the twin's is one too many.
    for name, value in (("quantized", 1 / 2), ("unquantized", 0), ("twin", 1 / 2), ("ratio", 1)):
        metric = found[f"wer_{name}_new_speakers"]
        assert metric.value == pytest.approx(value) and metric.n == 1, name
    assert found["cer_quantized_new_speakers"].value == pytest.approx(4 / 7)
    assert not [name for name in found if "noise" in name and "new_speakers" in name]
    for db in (0, 5, 10, 20):
        assert found[f"wer_noise_{db}db"].value == 1 == found[f"cer_noise_{db}db"].value
        assert f"wer_noise_{db}db_known" not in found
    assert found["codebook_usage"].n == 2 * (7 + 19)  # half a second, one and a half
    assert found["codebook_entropy_ratio"] == found["codebook_entropy"]
    assert found["lookahead_ms"] == Metric(0, unit="ms")
    assert (found["realtime_factor"].value or 0) > 0
    assert "speaker_invariance" not in found
    for name in ("wer_quantized", "cer_quantized", "wer_ratio", "realtime_factor"):
        metric = found[name]
        assert metric.value is not None and metric.low is not None and metric.high is not None
        assert metric.low <= metric.value <= metric.high, name


def test_usage_is_judged_by_as_many_codes_as_are_asked_for(scripted: Candidate) -> None:
    few = evaluation.measure(scripted, utterances=1, seed=0).metrics["codebook_usage"]
    many = evaluation.measure(scripted, utterances=1, seed=0, codes=500).metrics["codebook_usage"]
    assert few.n == 2 * 7
    # The last batch may go beyond.
    assert many.n is not None and many.n >= 500 and (many.value or 0) >= (few.value or 0)


def shard_folder(folder: Path, seconds: float) -> Path:
    """Two shards of noise, the second one's sample of two channels."""
    for index, channels in enumerate((1, 2)):
        sample = shards.Sample(
            id=f"s-{index}",
            text="",
            words=((),) * channels,
            voices=("noise",) * channels,
            source="test",
            licence="Apache-2.0",
            synthetic=True,
            seconds=seconds,
            pcm=np.stack([noise(seconds, index) for _ in range(channels)]),
        )
        shards.write(folder / shards.shard_name("noise", index), [sample])
    return folder


def test_codes_are_counted_in_shards(
    scripted: Candidate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shard_folder(tmp_path / "shards", 8.0)
    with caplog.at_level(logging.WARNING):
        found = evaluation.measure(scripted, 1, 0, codes=100, codes_from=[folder]).metrics
        assert not caplog.messages
        short = evaluation.measure(scripted, 1, 0, codes=1000, codes_from=[folder]).metrics
    # Three channels of 8 s and 20 ms of silence; what was heard before counts too.
    assert found["codebook_usage"].n == short["codebook_entropy_ratio"].n == 2 * 7 + 3 * 101
    assert any("no more than 317 codes" in message for message in caplog.messages)


def test_shards_to_count_in_need_a_number_and_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="codes_from needs a number"):
        evaluation.compare("x", codes_from=[tmp_path])
    with pytest.raises(UserError, match="no shard"):
        evaluation.compare("x", codes=10, codes_from=[tmp_path])


def public_tokenizer() -> SpeechTokenizer:
    """Of the make of GLM-4-Voice's: sound at 16 kHz, public features, codes and no head."""
    torch.manual_seed(2)
    config = TokenizerConfig(
        dim=16,
        heads=2,
        layers_before=1,
        layers_pooled=1,
        layers_after=0,
        whisper=StemConfig(positions=200, public_features=True),
        pooling="avg",
        block_ms=160,
        bottleneck="vq",
        codes=12,
        code_dim=None,
        ctc=False,
    )
    return SpeechTokenizer(config).eval().requires_grad_(False)


def test_a_published_tokenizer_is_measured_in_all_but_its_errors(
    scripted: Candidate, recordings: Path, tmp_path: Path
) -> None:
    candidate = Candidate("glm", public_tokenizer())
    measured = evaluation.measure(candidate, 2, 0, recorded=recordings, stream_hours=1)
    found = measured.metrics
    assert found["codebook_usage"].n == 2 * (7 + 19) + 4 * 7
    assert found["lookahead_ms"] == Metric(80, unit="ms")
    for name in (
        "wer_quantized",
        "cer_unquantized_known",
        "wer_noise_5db",
        "wer_quantized_recorded",
    ):
        assert found[name].value is None and "no characters" in (found[name].reason or ""), name
    for name in ("realtime_factor", "streaming_agreement", "streaming_agreement_float64"):
        assert found[name].reason == "it does not stream", name
    assert found["speaker_invariance_warped"].n is not None
    document = Comparison((measured,), True, "Sounds.").document()
    report.write_report(tmp_path / "report", "T", document)
    assert "it reads no characters" in (tmp_path / "report" / "report.md").read_text()


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """A data folder in which two people read two sentences, as if both had one voice."""
    lines = ["split\tset\tid\tspeaker\tpath\tseconds\ttext\tlicence_source"]
    for index, (text, speaker) in enumerate(itertools.product(SENTENCES, ("ann", "bob"))):
        audio.save(tmp_path / f"{index}.wav", noise(0.5, index // 2))
        lines.append(f"validation\tarctic\t{index}\t{speaker}\t{index}.wav\t0.5\t{text}.\tfree")
    lines += ["validation\tnoise\t9\t-\tnone.wav\t1\t\tfree", "train\ta\t9\tb\tno.wav\t1\tHi.\tx"]
    with gzip.open(tmp_path / "manifest.tsv.gz", "wt") as file:
        file.write("\n".join(lines) + "\n")
    return tmp_path


def test_recorded_people_are_heard_and_compared(recordings: Path, scripted: Candidate) -> None:
    rows = list(evaluation.recorded_speech(recordings))
    assert [(text, who) for _, text, who in rows] == [
        (f"{text}.", who) for text in SENTENCES for who in ("ann", "bob")
    ]
    found = evaluation.measure(scripted, utterances=1, seed=0, recorded=recordings).metrics
    assert found["wer_unquantized_recorded"].n == 4
    # The same sound in either name: the codes do not tell them apart.
    for name in ("speaker_invariance", "speaker_invariance_warped"):
        assert found[name].value == 0 and found[name].n == 2, name


def test_a_data_folder_without_sentences_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="manifest"):
        evaluation.measure(Candidate("a", small_tokenizer()), 1, 0, recorded=tmp_path)
    with gzip.open(tmp_path / "manifest.tsv.gz", "wt") as file:
        file.write("split\tspeaker\tpath\ttext\ntrain\tann\ta.wav\tHello.\n")
    with pytest.raises(UserError, match="validation"):
        evaluation.measure(Candidate("a", small_tokenizer()), 1, 0, recorded=tmp_path)


@pytest.mark.data
def test_three_people_read_each_validation_prompt(data_dir: Path) -> None:
    people: dict[str, set[str]] = {}
    for _, text, who in evaluation.recorded_speech(data_dir):
        people.setdefault(normalize(text), set()).add(who)
    assert sum(who == {"bdl", "slt", "kathleen"} for who in people.values()) == 30


def test_without_a_bottleneck_all_is_measured_that_needs_no_codes(
    scripted: Candidate, recordings: Path
) -> None:
    alone = Candidate("alone", SpeechTokenizer(WITHOUT).eval().requires_grad_(False))
    measured = evaluation.measure(alone, 2, 0, recorded=recordings, codes=99, stream_hours=1)
    assert measured.shape == Shape(12.5, 0, "none", 0) and measured.shape.key == "12_5hz_none"
    found = measured.metrics
    for group in ("", "_known"):
        assert found[f"wer_unquantized{group}"].value == found[f"cer_unquantized{group}"].value == 0
    assert found["wer_unquantized_recorded"].n == 4
    coded = {name for name in found if "unquantized" not in name and name != "lookahead_ms"}
    assert {"wer_quantized", "cer_noise_5db", "codebook_usage", "codebook_entropy"} < coded
    assert {"realtime_factor", "streaming_agreement", "speaker_invariance"} < coded
    assert [name for name in coded if "no codes" not in (found[name].reason or "")] == []
    comparison = Comparison((measured, result("fast", Shape(25, 1024, "vq", 0), 0.25)), False, "S.")
    assert "it has no codes" in str(comparison._table(evaluation._OVERVIEW, shapes=True).rows[0])
    line = comparison._lines("wer_unquantized", {"alone": "a", "fast": "b"}, "bits")
    assert list(line) == ["b"], "no number of bits"


def test_what_reads_text_pieces_is_read_with_those_of_its_checkpoint(
    scripted: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_whisper(tmp_path / "whisper")
    pieces = WhisperPieces(tmp_path / "whisper", 40)
    shape = TokenizerConfig.model_validate(
        {
            **TOKENIZER.model_dump(),
            "ctc": False,
            "decoder": {"layers": 1, "heads": 2, "vocabulary": 40, "positions": 12},
        }
    )
    for name, files in (("t", pieces.files), ("bare", {})):
        weights = SpeechTokenizer(shape).state_dict()
        checkpoints.save(tmp_path / name, shape, weights, files=files)
    monkeypatch.setattr(evaluation, "transcribe", transcribe)
    monkeypatch.setattr(TextDecoder, "greedy", lambda _, memory, *__: [said] * len(memory))
    said = pieces.encode("one two")
    found = evaluation.measure(Candidate.named("t", tmp_path / "t"), 2, 0).metrics
    # Of two words and three, one and two of them wrong, or missing: "three four five".
    for name in ("wer_quantized", "wer_unquantized_known", "wer_noise_0db"):
        assert found[name].value == pytest.approx(3 / 5), name
    assert Candidate.named("bare", tmp_path / "bare").mute == "it reads no characters"


def test_an_untrained_tokenizer_reads_nothing(tmp_path: Path) -> None:
    folder = checkpoints.save(tmp_path / "t", TOKENIZER, small_tokenizer().state_dict())
    torch.manual_seed(1)
    other = SpeechTokenizer(WITHOUT)
    twin = checkpoints.save(tmp_path / "twin", WITHOUT, other.state_dict())
    found = evaluation.evaluate(str(folder), utterances=2, twin=str(twin), progress=False)
    for name in ("wer_quantized", "wer_unquantized_known", "wer_noise_0db", "cer_twin"):
        assert (found[name].value or 0) > 0.7, name
    assert found["wer_12_5hz_9_fsq"] == found["wer_quantized"]
    assert 0 < (found["codebook_usage"].value or 0) <= 1


def test_a_twin_is_of_a_model_and_without_a_bottleneck(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="twin 'x' is of no"):
        evaluation.compare(None, twin="x", sweep=Path("y"))
    folders = {
        name: str(checkpoints.save(tmp_path / name, shape, SpeechTokenizer(shape).state_dict()))
        for name, shape in {
            "model": TOKENIZER,
            "twin": WITHOUT,
            "fast": WITHOUT.model_copy(update={"rate": 25}),
        }.items()
    }
    for model, twin, said in (
        ("model", "model", r"has a bottleneck \(fsq\): train it with unquantized=true"),
        ("twin", "twin", "tells nothing of it"),
        ("model", "fast", "was not trained as .*: its rate is 25.0, not 12.5"),
    ):
        with pytest.raises(UserError, match=said):
            evaluation.compare(folders[model], twin=folders[twin])


def test_a_twin_was_trained_as_its_model_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def check(model: Path, twin: Path) -> None:
        loaded = [load_tokenizer(folder / "tokenizer") for folder in (model, twin)]
        names = [str(folder / "tokenizer") for folder in (model, twin)]
        twins.check_twin(names[0], loaded[0], names[1], loaded[1])

    model = finish(tmp_path / "model", done=4)
    like: dict[str, Any] = {"unquantized": True, "done": 4}
    check(model, finish(tmp_path / "twin", commitment_weight=9, run={"minutes": 7}, **like))
    assert not caplog.messages
    for changes, said in (
        ({"done": 5}, "steps done is 5, not 4"),
        ({"seed": 1}, "run.seed is 1, not 0"),
        ({"data": {"train": ["c"], "validation": ["b"]}}, r"data.train is \['c'\], not \['a'\]"),
        ({"optimizer": {"lr": 0.5}}, "optimizer.lr is 0.5"),
        ({"model": TOKENIZER.model_copy(update={"dropout": 0.1})}, "model.dropout is 0.1, not 0"),
        ({"init_from": "x"}, "init_from is x, not None"),
    ):
        with pytest.raises(UserError, match=said):
            check(model, finish(tmp_path / said, **{**like, **changes}))
    # A card that says nothing, as of a codec around a tokenizer, is believed with a notice.
    (model / "tokenizer" / "card.json").unlink()
    check(model, tmp_path / "twin")
    assert "no card says" in caplog.text


# --- A sweep --------------------------------------------------------------------------------------


def finish(
    folder: Path,
    *,
    seed: int = 0,
    finished: bool = True,
    done: int = 5,
    shape: TokenizerConfig | None = None,
    **changes: Any,
) -> Path:
    """A run's folder as `speechlm train tokenizer` leaves it after so many steps."""
    model = changes.pop("model", TOKENIZER)
    config = TrainConfig.model_validate(
        {
            "run": {"dir": "elsewhere", "steps": 5, "seed": seed, **changes.pop("run", {})},
            "data": {"train": ["a"], "validation": ["b"]},
            "model": model,
            **changes,
        }
    )
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.model_dump_json())
    if finished:
        torch.manual_seed(seed)
        shape = config.shape if shape is None else shape
        weights = SpeechTokenizer(shape).state_dict()
        card = {"steps": done, "config": config.model_dump(mode="json")}
        checkpoints.save(folder / "tokenizer", shape, weights, dtype="fp32", card=card)
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two sizes of codebook, one twin of both, and what is none of it.

    Of that, `squeezed` is a twin as they were: past the rounding of a bottleneck that it has.
    """
    root = tmp_path / "sweep"
    finish(root / "small")
    finish(root / "deep" / "large", model=TOKENIZER.model_copy(update={"levels": (5, 3)}))
    finish(root / "twin", unquantized=True, quantize_from=0.5)
    finish(root / "stranger", seed=1, unquantized=True)
    finish(root / "running", finished=False)
    finish(root / "squeezed", unquantized=True, shape=TOKENIZER)
    late = {"seed": 2, "model": TOKENIZER.model_copy(update={"levels": (5, 5)})}
    finish(root / "late", run={"minutes": 3}, **late)
    finish(root / "late_twin", unquantized=True, run={"minutes": 3}, done=4, **late)
    (root / "codec").mkdir()
    (root / "codec" / "config.json").write_text('{"run": {"dir": "x"}, "tokenizer": "y"}')
    return root


def test_a_sweep_is_the_finished_runs_with_their_twins(
    sweep: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        small, large, late = evaluation.candidates_of(sweep)
    assert (small.name, large.name, late.name) == ("small", "deep/large", "late")
    assert small.twin is not None and small.twin is large.twin
    assert late.twin is None, "its twin did a step less"
    for named in ("codec", "running", "stranger", "squeezed", "late_twin"):
        assert sum(named in message for message in caplog.messages) == 1, named
    # One run by itself is a sweep too, without a twin.
    (alone,) = evaluation.candidates_of(sweep / "small")
    assert alone.name == "small" and alone.twin is None


def test_one_twin_serves_every_bottleneck(sweep: Path) -> None:
    vq = TOKENIZER.model_copy(update={"bottleneck": "vq", "codes": 12, "code_dim": 8})
    finish(sweep / "vq", model=vq, commitment_weight=0.5)
    runs = {run.name: run for run in twins.finished_runs(sweep)}
    for name in ("vq", "deep/large", "small"):
        twin = twins.twin_of(runs[name], list(runs.values()))
        assert twin is not None and twin.name == "twin"


def test_a_folder_without_a_finished_run_is_refused(sweep: Path, tmp_path: Path) -> None:
    for folder, named in (
        (tmp_path / "none", "no folder"),
        (sweep / "running", "no finished run"),
        (sweep / "twin", "no quantized"),
    ):
        with pytest.raises(UserError, match=named):
            evaluation.candidates_of(folder)


def result(name: str, shape: Shape, wer: float) -> Result:
    """Made-up measurements."""
    metrics = {
        f"{kind}_{way}": Metric(wer, wer - 0.1, wer + 0.1, 10)
        for kind in ("wer", "cer")
        for way in ("quantized", "unquantized", *(f"noise_{db}db" for db in evaluation.NOISE_DB))
    }
    metrics |= {"codebook_usage": Metric(0.75), "codebook_entropy_ratio": Metric(0.5)}
    return Result(name, shape, metrics)


def test_a_comparison_names_each_metric_after_its_tokenizer() -> None:
    shapes = [Shape(12.5, 4375, "fsq", 0), Shape(12.5, 4375, "fsq", 160), Shape(25, 1024, "vq", 0)]
    results = tuple(result(str(i), shape, i / 10) for i, shape in enumerate([*shapes, shapes[0]]))
    found = Comparison(results, False, "").metrics()
    assert [found[f"wer_{key}"].value for key in (
        "12_5hz_4375_fsq", "12_5hz_4375_fsq_160ms", "25hz_1024_vq", "12_5hz_4375_fsq_2"
    )] == [0, 0.1, 0.2, 0.3]  # fmt: skip
    assert found["wer_noise_10db_25hz_1024_vq"].value == 0.2
    assert all(name.isidentifier() for name in found) and "codebook_usage" not in found
    # A tokenizer named by itself keeps the plain names.
    plain = Comparison(results[1:3], True, "").metrics()
    assert plain["wer_quantized"].value == plain["wer_12_5hz_4375_fsq_160ms"].value == 0.1
    assert "codebook_usage" in plain and "codebook_usage_12_5hz_4375_fsq_160ms" not in plain
    assert "codebook_usage_25hz_1024_vq" in plain


def test_the_table_and_the_curves_show_every_tokenizer(tmp_path: Path) -> None:
    results = (
        result("fast", Shape(25, 1024, "vq", 0), 0.25),
        result("late", Shape(12.5, 4375, "fsq", 160), 0.125),
    )
    report.write_report(tmp_path, "T", Comparison(results, False, "Sounds.").document())
    text = (tmp_path / "report.md").read_text()
    header = next(line for line in text.splitlines() if line.startswith("| tokenizer | Hz"))
    cells = [cell.strip() for cell in header.split("|")[1:-1]]
    row = next(line for line in text.splitlines() if line.startswith("| late | 12.5"))
    shown = dict(zip(cells, (cell.strip() for cell in row.split("|")[1:-1]), strict=True))
    assert shown["bit/s"] == "151" and shown["codes"] == "4375" and shown["bottleneck"] == "fsq"
    assert shown["look-ahead, ms"] == "160" and shown["WER quantized ↓"] == "0.125 (0.025 – 0.225)"
    assert shown["share of codes seen ↑"] == "0.75"
    # Nobody has a twin or was heard in another group of voices.
    assert "twin ↓" not in header and "recorded voices:" not in text
    for picture in ("bitrates", "lookahead", "noise"):
        assert (tmp_path / "media" / f"{picture}.svg").read_bytes().startswith(b"<?xml")


def test_a_report_without_codes_has_no_picture_of_bitrates(tmp_path: Path) -> None:
    bare = (result("bare", Shape(12.5, 0, "none", 0.0), 0.25),)
    report.write_report(tmp_path, "T", Comparison(bare, True, "Sounds.").document())
    assert "no bitrate" in (tmp_path / "report.md").read_text()


def test_a_sweep_is_measured_run_by_run(
    sweep: Path, scripted: Candidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        evaluation, "transcribe", lambda _, __, frames, **___: ["one"] * len(frames)
    )
    monkeypatch.setattr(evaluation, "TIMED_SECONDS", 1)
    found = evaluation.evaluate(None, sweep=sweep, utterances=2, progress=False)
    for size in (9, 15):
        assert found[f"wer_12_5hz_{size}_fsq"].value == pytest.approx(4 / 5)
        assert found[f"wer_ratio_12_5hz_{size}_fsq"].value == 1
    assert "wer_quantized" not in found


def test_the_command_hands_its_options_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[dict[str, Any]] = []

    def compare(model: str | None, **options: Any) -> Comparison:
        calls.append({"model": model, **options})
        return Comparison((result("a", Shape(12.5, 9, "fsq", 0), 0.5),), model is not None, "S.")

    monkeypatch.setattr(evaluation, "compare", compare)

    def run(*arguments: object) -> str:
        done = CliRunner().invoke(app, ["eval", "tokenizer", *map(str, arguments)])
        assert done.exit_code == 0, done.output
        return done.output

    assert "wer_quantized" in run()
    written = tmp_path / "measured.json"
    run("--sweep", tmp_path, "--report", tmp_path / "report", "--recorded", tmp_path, "--codes", 9,
        "--json", written)  # fmt: skip
    assert json.loads(written.read_text())["options"] == {"sweep": str(tmp_path)}
    run("--model", "m", "--twin", "t", "--seed", 3, "--utterances", 5)
    where = [tmp_path / "a", tmp_path / "b"]
    run("--codes", 9, "--codes-from", where[0], "--codes-from", where[1], "--stream-hours", 0.5,
        "--json", written)  # fmt: skip
    told = json.loads(written.read_text())
    assert told["codes_from"] == [str(folder) for folder in where] and "options" not in told
    plain: dict[str, Any] = {"model": None, "twin": None, "sweep": None, "recorded": None}
    plain |= {"codes": 0, "codes_from": (), "stream_hours": 0, "seed": 0, "utterances": 300}
    plain |= {"decoder": None}
    assert calls == [
        {**plain, "model": "tiny"},
        {**plain, "sweep": tmp_path, "recorded": tmp_path, "codes": 9},
        {**plain, "model": "m", "twin": "t", "seed": 3, "utterances": 5},
        {**plain, "model": "tiny", "codes": 9, "codes_from": where, "stream_hours": 0.5},
    ]
    assert "wer" in (tmp_path / "report" / "report.html").read_text()


def test_a_decoder_speaks_the_model_s_codes_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tokenizer = small_tokenizer()
    checkpoints.save(tmp_path / "t", TOKENIZER, tokenizer.state_dict(), dtype="fp32")
    shape = TokenDecoderConfig(
        codebook=(3, 3), voices=("flite:rms",), dim=16, heads=2, encoder_layers=1, flow_layers=1,
        flow_blocks=0, voice_blocks=0, vocoder_dim=8, vocoder_blocks=0,
    )  # fmt: skip
    for name, changes in {
        "d": {"fingerprint": tokenizer.fingerprint()},
        "weights": {"fingerprint": small_tokenizer(1).fingerprint()},
        "rate": {"rate": 25.0},
        "voice": {"voices": ("nobody",)},
    }.items():
        other = shape.model_copy(update=changes)
        checkpoints.save(tmp_path / name, other, TokenDecoder(other).state_dict())
    spoken: list[TokenDecoderConfig] = []

    def again(_: SpeechTokenizer, decoder: TokenDecoder, seed: int) -> dict[str, Metric]:
        spoken.append(decoder.config)
        return {"resynthesis_wer": Metric(0.375, 0.25, 0.5, 8)}

    measured: list[str] = []

    def measure(candidate: Candidate, *_: object) -> Result:
        measured.append(candidate.name)
        return result("t", Shape(12.5, 9, "fsq", 0), 0.5)

    monkeypatch.setattr(evaluation, "measure", measure)
    monkeypatch.setattr(report, "curves", lambda *_, **__: b"<svg/>")
    model = ("--model", tmp_path / "t")

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["eval", "tokenizer", *map(str, arguments)])

    for name, said in (
        ("weights", "other weights"),
        ("rate", "at 25 Hz"),
        ("voice", "'nobody' must be written"),
        ("typo", "neither a directory"),
    ):
        failed = run(*model, "--decoder", tmp_path / name)
        assert isinstance(failed.exception, UserError) and said in str(failed.exception)
    failed = run("--sweep", tmp_path, "--decoder", tmp_path / "d")
    assert "name it (--model)" in str(failed.exception)
    assert not measured, "all of it shows before anything is measured"
    monkeypatch.setattr(evaluation.resynthesis, "resynthesis_wer", again)
    where = tmp_path / "report", tmp_path / "a.json"
    done = run(*model, "--decoder", tmp_path / "d", "--report", where[0], "--json", where[1])
    assert done.exit_code == 0 and len(measured) == 1, done.output
    assert [config.fingerprint for config in spoken] == [tokenizer.fingerprint()]
    found = json.loads(where[1].read_text())["metrics"]
    assert found["resynthesis_wer"]["value"] == 0.375
    assert "| WER spoken again ↓ |" in (text := (where[0] / "report.md").read_text())
    assert "0.375 (0.25 – 0.5)" in text
