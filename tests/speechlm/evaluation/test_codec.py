"""Codec and tokenizer are measured where the answers are known: by plain functions on made-up
sounds and codes, then on a codec that loses nothing and on a small untrained one.
"""

from __future__ import annotations

import functools
import gzip
import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pocketsphinx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import CODEC, small_codec
from torch import Tensor

from audio_codec import audio
from audio_codec import checkpoint as checkpoints
from audio_codec.audio import SAMPLE_RATE, Pcm
from audio_codec.encodec import random_encodec
from audio_codec.errors import UserError
from audio_codec.mimi import MimiCodec, MimiConfig
from speechlm.convert import load_codec_of, load_speech_tokenizer_of
from speechlm.evaluation import abx, fidelity
from speechlm.evaluation import codec as codec_evaluation
from speechlm.evaluation import tokenizer as tokenizer_evaluation
from speechlm.evaluation.report import Paragraph, Sound
from synth_data.tts import ASSISTANT, speak
from synth_data.verify import word_errors


def noise(seconds: float = 1.0, seed: int = 0, level: float = 0.1) -> Pcm:
    rng = np.random.default_rng(seed)
    return rng.normal(0, level, round(seconds * SAMPLE_RATE)).astype(np.float32)


@functools.cache
def sentence() -> Pcm:
    return speak("Two plus three is five.", ASSISTANT).pcm


# --- Plain functions of sounds --------------------------------------------------------------------


@given(st.floats(0.01, 100), st.sampled_from([-1, 1]), st.floats(-0.5, 0.5))
@settings(max_examples=20, deadline=None)
def test_si_sdr_of_a_scaled_copy_is_as_high_as_it_gets(
    scale: float, sign: int, offset: float
) -> None:
    original = noise()
    copy = (sign * scale * (original + offset)).astype(np.float32)
    assert (fidelity.si_sdr(original, copy) or 0) > 90


@given(st.floats(-40, 60))
@settings(max_examples=20, deadline=None)
def test_si_sdr_of_added_noise_is_its_level(decibel: float) -> None:
    original, other = (noise(seed=seed).astype(np.float64) for seed in (1, 2))
    original, other = original - original.mean(), other - other.mean()
    other -= (other @ original) / (original @ original) * original
    other *= np.linalg.norm(original) / np.linalg.norm(other) * 10 ** (-decibel / 20)
    decoded = (original + other).astype(np.float32)
    assert fidelity.si_sdr(original.astype(np.float32), decoded) == pytest.approx(decibel, abs=0.02)


def test_distances_of_a_sound_at_half_its_level() -> None:
    loud = noise(level=0.3)
    assert fidelity.mel_distance(loud, loud) == 0 == fidelity.stft_distance(loud, loud)
    assert fidelity.mel_distance(loud, loud / 2) == pytest.approx(math.log(2), abs=0.01)
    assert fidelity.stft_distance(loud, loud / 2) == pytest.approx(0.5 + math.log(2), abs=0.01)


def test_stoi_is_one_for_the_sound_itself_and_falls_with_noise() -> None:
    spoken = sentence()
    scores = [
        fidelity.stoi(spoken, spoken + noise(len(spoken) / SAMPLE_RATE, level=level))
        for level in (0.0, 0.02, 0.2)
    ]
    assert scores[0] == pytest.approx(1)
    assert scores == sorted(scores, key=lambda score: -(score or 0)) and scores[2] < 0.8


def test_pesq_is_best_for_the_sound_itself() -> None:
    pytest.importorskip("pesq", reason="needs the optional package pesq")
    spoken = sentence()
    best = fidelity.pesq(spoken, spoken)
    worse = fidelity.pesq(spoken, spoken + noise(len(spoken) / SAMPLE_RATE, level=0.05))
    assert best == pytest.approx(4.64, abs=0.01) and 1 < (worse or 0) < 2
    silence = np.zeros_like(spoken)
    assert fidelity.pesq(spoken, silence) is fidelity.pesq(silence, spoken) is None
    assert fidelity.pesq(spoken[:2400], spoken[:2400]) is None


def test_what_cannot_be_said_of_a_sound_is_none() -> None:
    spoken, silence = sentence(), np.zeros(SAMPLE_RATE, np.float32)
    assert fidelity.si_sdr(silence, silence) is fidelity.stft_distance(silence, silence) is None
    assert fidelity.stoi(silence, silence) is fidelity.voice_print(silence) is None
    click = np.pad(spoken[12_000:14_400], (0, 9_600))  # 100 ms of voice: no window of STOI
    assert fidelity.stoi(click, click) is None
    assert fidelity.stoi(spoken[:100], spoken[:100]) is fidelity.voice_print(spoken[:100]) is None
    assert fidelity.si_sdr(spoken, 0 * spoken) == pytest.approx(-fidelity.BEST_SI_SDR)


def test_a_voice_print_does_not_depend_on_the_level() -> None:
    spoken = sentence()
    one, softer, other = map(fidelity.voice_print, (spoken, spoken / 2, noise()))
    assert one is not None and softer is not None and other is not None and one.shape == (38,)
    assert np.linalg.norm(one - softer) < 0.1 * np.linalg.norm(one - other)


def prints(spread: float) -> tuple[np.ndarray, list[str]]:
    """Four speakers with five prints each around a place of their own."""
    rng = np.random.default_rng(3)
    places = np.repeat(rng.normal(size=(4, 12)), 5, axis=0)
    return places + spread * rng.normal(size=places.shape), [*"aaaaabbbbbcccccddddd"]


def test_speaker_similarity_has_the_scale_that_it_says() -> None:
    originals, speakers = prints(0.3)
    kept = fidelity.speaker_similarity(originals, originals, speakers)
    assert kept is not None
    assert kept[0].mean() == pytest.approx(1) and len(kept[0]) == 20 and kept[1] > 0.99
    swapped = fidelity.speaker_similarity(originals, np.roll(originals, 5, axis=0), speakers)
    assert swapped is not None and abs(swapped[0].mean()) < 0.3
    # Prints of nobody in particular: pairs are ordered by chance, if there is a scale at all.
    blind = fidelity.speaker_similarity(*[np.random.default_rng(8).normal(size=(20, 12))] * 2,
                                        speakers)  # fmt: skip
    assert blind is None or 0.4 < blind[1] < 0.65
    assert fidelity.speaker_similarity(originals, originals, ["a"] * 20) is None
    assert fidelity.speaker_similarity(originals, originals, [str(i) for i in range(20)]) is None


# --- ABX ------------------------------------------------------------------------------------------


def test_contrasts_differ_in_one_phone() -> None:
    path = Path(pocketsphinx.get_model_path("en-us/cmudict-en-us.dict"))
    phones = {word: said for word, *said in map(str.split, path.read_text().splitlines())}
    assert len(abx.contrasts()) == 66
    for pair in abx.contrasts():
        one, other = (phones[word] for word in pair)
        assert len(one) == len(other) == 3, pair
        assert sum(a != b for a, b in zip(one, other, strict=True)) == 1, pair


def slow_dtw(cost: np.ndarray) -> float:
    """The mean of the cheapest path, by trying them all; of equally cheap ones, the shortest."""

    def paths(n: int, m: int) -> list[tuple[float, int]]:
        here = float(cost[n, m])
        if n == m == 0:
            return [(here, 1)]
        before = [(i, j) for i, j in ((n - 1, m - 1), (n - 1, m), (n, m - 1)) if min(i, j) >= 0]
        return [(here + total, steps + 1) for i, j in before for total, steps in paths(i, j)]

    total, steps = min(paths(cost.shape[0] - 1, cost.shape[1] - 1))
    return total / steps


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_dtw_finds_the_cheapest_path(seed: int, height: int, width: int) -> None:
    # Random reals: no two paths cost the same, so which is taken among equals does not matter.
    costs = np.random.default_rng(seed).random((2, 5, 5))
    sizes = np.array([height, 5]), np.array([width, 5])
    found = abx.dtw(costs, *sizes)
    expected = [slow_dtw(cost[:h, :w]) for cost, h, w in zip(costs, *sizes, strict=True)]
    np.testing.assert_allclose(found, expected)


def test_a_drawled_word_is_at_no_distance() -> None:
    token = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    distance = abx.distances([token, token.repeat(3, axis=0), token[::-1]])
    assert distance[0, 1] == 0 and distance[0, 2] > 0.5
    np.testing.assert_array_equal(distance, distance.T)


def fake_sayings(voices: int = 3) -> list[abx.Saying]:
    silence = np.zeros(0, np.float32)
    return [
        abx.Saying(word, carrier, str(voice), silence, 0.0, 0.1)
        for voice, carrier, word in itertools.product(range(voices), abx.CARRIERS, abx.words())
    ]


def test_abx_knows_perfect_from_useless_codes() -> None:
    said, rng = fake_sayings(), np.random.default_rng(0)
    vector = {word: rng.normal(size=(2, 4)).astype(np.float32) for word in abx.words()}
    for tokens, expected in (
        ([vector[saying.word] for saying in said], 0.0),
        # What stands around a word, and who says it, must not help: A and B share both.
        (
            [
                np.full((2, 4), 2 * int(s.voice) + abx.CARRIERS.index(s.carrier), np.float32)
                for s in said
            ],
            0.5,
        ),
        ([rng.normal(size=(2, 4)).astype(np.float32) for _ in said], 0.5),
    ):
        found = abx.discrimination(tokens, said)
        for metric in found.values():
            assert metric.n == 66 and metric.value == pytest.approx(expected, abs=0.1)
    assert abx.discrimination([], [])["abx_within"].reason


def test_voices_tell_within_from_across() -> None:
    said, rng = fake_sayings(), np.random.default_rng(0)
    # Every voice has vectors of its own for the words.
    own: dict[tuple[str, str], np.ndarray] = {
        (s.voice, s.word): rng.normal(size=(2, 4)).astype(np.float32) for s in said
    }
    found = abx.discrimination([own[s.voice, s.word] for s in said], said)
    assert found["abx_within"].value == 0
    assert found["abx_across"].value == pytest.approx(0.5, abs=0.2)


@functools.cache
def sayings() -> tuple[abx.Saying, ...]:
    return tuple(abx.sayings(2, seed=0))


def test_sayings_hold_their_word() -> None:
    said = sayings()
    assert len(said) == 2 * 2 * len(abx.words()) and len({s.voice for s in said}) == 2
    for saying in said:
        first, last = (round(t * SAMPLE_RATE) for t in (saying.start, saying.end))
        assert 0.1 < saying.end - saying.start < 0.6 and last < len(saying.pcm)
        inside = np.square(saying.pcm[first:last]).mean()
        assert inside > 0.2 * np.square(saying.pcm).mean(), saying.word
    starts = [saying.start * 12.5 % 1 for saying in said]
    assert max(starts) - min(starts) > 0.7  # anywhere on the frame grid
    again = next(abx.sayings(2, seed=0))
    np.testing.assert_array_equal(again.pcm, said[0].pcm)


def test_a_token_is_the_frames_that_overlap_its_word() -> None:
    saying = abx.Saying("bit", "", "", np.zeros(0, np.float32), 0.1, 0.2)
    features = np.arange(10, dtype=np.float32)[:, None]
    assert saying.frames(features, 12.5).ravel().tolist() == [1, 2]
    assert saying.frames(features, 20).ravel().tolist() == [2, 3]


# --- Through a codec ------------------------------------------------------------------------------


class Wire:
    """A codec that keeps 16 bits of every sample and gives them back late; one sample a codebook.

    Left-out codebooks are silent, so that fewer sound worse.
    """

    frame_size = 8
    codebooks = ((256, 256),) * frame_size

    def __init__(self, sample_rate: int = SAMPLE_RATE, delay: int = 0) -> None:
        self.sample_rate, self.delay = sample_rate, delay

    def encode(self, pcm: Tensor, state: Any = None) -> Tensor:
        samples = ((pcm[:, 0] + 1) * 32767).round().long().clamp(0, 65535)
        return samples.unflatten(1, (-1, self.frame_size)).transpose(1, 2)

    def decode(self, codes: Tensor, state: Any = None) -> Tensor:
        pcm = torch.zeros(len(codes), codes.shape[2], self.frame_size)
        pcm[..., : codes.shape[1]] = codes.transpose(1, 2) / 32767 - 1
        whole = pcm.flatten(1)
        late = torch.nn.functional.pad(whole, (self.delay, 0))
        return late[:, None, : whole.shape[1]]

    def new_encoder_state(self, batch: int, max_chunk: int = 1) -> Any:
        raise NotImplementedError

    new_decoder_state = new_encoder_state


@pytest.mark.parametrize("rate", [16_000, 24_000, 48_000])
@given(st.integers(12_000, 13_000), st.integers(0, 50))
@settings(max_examples=8, deadline=None)
def test_a_codec_s_delay_and_rate_are_undone(rate: int, samples: int, delay: int) -> None:
    codec = Wire(rate, delay)
    original = audio.resample(noise(samples / SAMPLE_RATE / 4 + 0.01), 6000, SAMPLE_RATE)[:samples]
    decoded = codec_evaluation.decode(codec, codec_evaluation.encode(codec, original), samples)
    assert decoded.shape == original.shape
    assert (fidelity.si_sdr(original[99:-99], decoded[99:-99]) or 0) > 35


def test_bitrate_counts_frames_and_factors() -> None:
    assert codec_evaluation.bitrate(small_codec()) == pytest.approx(12.5 * (np.log2(9) + 8))
    assert codec_evaluation.bitrate(small_codec(), 2) == pytest.approx(12.5 * (np.log2(9) + 4))
    assert codec_evaluation.bitrate(Wire()) == 16 * SAMPLE_RATE


def test_levels() -> None:
    assert codec_evaluation.parse_levels(None, 8) == [1, 2, 4, 8]
    assert codec_evaluation.parse_levels(None, 3) == [1, 2, 3]
    assert codec_evaluation.parse_levels("all", 3) == [1, 2, 3]
    assert codec_evaluation.parse_levels("2,16", 8) == [2, 8]
    for wrong in ("", "0", "1,", "many", "-1", "1.5"):
        with pytest.raises(UserError, match="levels"):
            codec_evaluation.parse_levels(wrong, 8)


def test_usage_and_entropy_of_known_counts() -> None:
    even, one = torch.full((16,), 3), torch.tensor([0, 5, 0, 0])
    found = codec_evaluation.usage([even, one])
    assert found["codebook_usage_0"].value == 1 and found["codebook_usage_1"].value == 0.25
    assert found["codebook_entropy_0"].value == pytest.approx(1)
    assert found["codebook_entropy_1"].value == pytest.approx(0)
    assert (found["codebook_usage_0"].n, found["codebook_usage_1"].n) == (48, 5)


def test_slugs_are_short_and_distinct() -> None:
    names = ["tiny", "hf://kyutai/mimi", "runs/Mimi/", "mimi", "/"]
    assert codec_evaluation.slugs(names) == ["tiny", "mimi", "mimi_2", "mimi_3", "codec"]


# --- Recordings -----------------------------------------------------------------------------------


def test_recordings_come_with_what_is_known_of_them(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "voices"
    for index in range(3):
        audio.save(folder / f"{index}.wav", noise(seed=index))
    (folder / "0.txt").write_text("From the side.\n")
    (folder / "1.txt").write_text("Overruled.")
    (folder / "broken.flac").write_text("no sound")
    audio.save(folder / "short.wav", noise(0.2))
    with gzip.open(tmp_path / "manifest.tsv.gz", "wt") as file:
        file.write('path\tspeaker\ttext\ndeep/voices/1.wav\tann\tSay "it.\ndeep/none.wav\t\t\n')
    items = codec_evaluation.recordings(folder, 10, seed=0)
    found = {item.name: (item.text, item.speaker) for item in items}
    assert found == {
        "0.wav": ("From the side.", None),
        "1.wav": ('Say "it.', "ann"),
        "2.wav": (None, None),
    }
    assert [i.name for i in items] == [
        i.name for i in codec_evaluation.recordings(folder, 10, seed=0)
    ]
    assert len(codec_evaluation.recordings(folder, 2, seed=1)) == 2


def test_of_a_long_recording_the_beginning_is_measured_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = noise(codec_evaluation.LONGEST + 5)
    audio.save(tmp_path / "a.flac", long)
    (tmp_path / "a.txt").write_text("More than is said in half a minute.")
    (item,) = codec_evaluation.recordings(tmp_path, 9, seed=0)
    assert (item.name, item.text) == ("a.flac, first 30 s", None)
    np.testing.assert_allclose(item.pcm, long[: 30 * SAMPLE_RATE], atol=1e-4)
    assert caplog.messages == [f"only the first 30 s of {tmp_path / 'a.flac'} are measured on"]
    audio.save(tmp_path / "a.flac", long[: 30 * SAMPLE_RATE])
    (item,) = codec_evaluation.recordings(tmp_path, 9, seed=0)
    assert item.name == "a.flac" and item.text and len(item.pcm) == 30 * SAMPLE_RATE


def test_every_file_that_is_taken_for_sound_is_measured_on(tmp_path: Path) -> None:
    audio.save(tmp_path / "a.wav", noise())
    wav = (tmp_path / "a.wav").read_bytes()
    for suffix in audio.SUFFIXES:
        (tmp_path / f"a{suffix}").write_bytes(wav)
    items = codec_evaluation.recordings(tmp_path, 99, seed=0)
    assert {item.name for item in items} == {f"a{suffix}" for suffix in audio.SUFFIXES}


def test_a_folder_without_sounds_is_one_clear_sentence(tmp_path: Path) -> None:
    for folder, named in ((tmp_path / "none", "no folder"), (tmp_path, "no sound")):
        with pytest.raises(UserError, match=named):
            codec_evaluation.recordings(folder, 1, seed=0)
    audio.save(tmp_path / "a.wav", noise())
    (tmp_path / "manifest.tsv.gz").write_bytes(b"not gzip")
    with pytest.raises(UserError, match=r"manifest\.tsv\.gz"):
        codec_evaluation.recordings(tmp_path, 1, seed=0)


@pytest.mark.data
def test_the_validation_voices_are_known_by_text_and_speaker(data_dir: Path) -> None:
    items = codec_evaluation.recordings(data_dir / "audio" / "validation", 30, seed=0)
    assert len(items) == 30 and all(item.text for item in items)
    speakers = [item.speaker or "" for item in items]
    assert len(set(speakers)) >= 3 and "" not in speakers
    voices = [fidelity.voice_print(item.pcm) for item in items]
    known = np.stack([voice for voice in voices if voice is not None])
    measured = fidelity.speaker_similarity(known, known, speakers)
    assert measured is not None and measured[1] > 0.9  # recorded voices are told apart


# --- The whole ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("codec") / "codec"
    return checkpoints.save(path, CODEC, small_codec().state_dict(), dtype="fp32")


def test_codec_metrics_of_an_untrained_codec(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "pesq_installed", lambda: False)  # slow, and tested above
    found = codec_evaluation.evaluate(str(folder), utterances=4, levels="1", progress=False)
    assert {"stoi", "pesq", "wer_original", "wer_decoded", "bitrate_bps"} <= found.keys()
    assert found["bitrate_bps"].value == pytest.approx(12.5 * (np.log2(9) + 8))
    assert found["wer_decoded"].value is not None and found["wer_decoded"].value >= 0.9
    assert found["wer_original"].value is not None and found["wer_original"].value < 0.5
    assert found["stoi"].value is not None and found["stoi"].value < 0.6
    assert found["pesq"].value is None and "not installed" in (found["pesq"].reason or "")
    assert found["stoi_at_140bps"] == found["stoi"] and "wer_decoded_at_40bps" in found
    assert {f"codebook_{what}_{k}" for what in ("usage", "entropy") for k in range(3)} <= set(found)
    for name in ("abx_within", "abx_across"):
        of_codes, of_sound = found[name].value, found[f"{name}_mel"].value
        assert of_codes is not None and of_sound is not None and of_sound < of_codes
        assert 0.25 < of_codes < 0.6, "an untrained codec knows little of phones"


@pytest.fixture(scope="module")
def comparison() -> codec_evaluation.Comparison:
    """A wire beside a codec that is none, on two sounds by each of two speakers."""
    items = [
        codec_evaluation.Item(f"{speaker} {index}", noise(0.6, index, level), None, speaker)
        for index, (speaker, level) in enumerate(itertools.product("ab", (0.05, 0.1)))
    ]
    codecs = {"wire": Wire(delay=5), "small": small_codec()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "pesq_installed", lambda: False)
        return codec_evaluation.measure(
            codecs, items, [], source="noise", missing=["no 'mimi'."], levels="1,4"
        )


def test_a_codec_that_loses_nothing_scores_the_best(
    comparison: codec_evaluation.Comparison,
) -> None:
    found = comparison.metrics()
    assert found["stoi"].value == pytest.approx(1, abs=1e-3)
    assert found["si_sdr"].value is not None and found["si_sdr"].value > 60
    assert found["mel_distance"].value is not None and found["mel_distance"].value < 0.01
    assert found["wer_decoded"].reason and found["wer_original"].reason
    assert found["abx_within"].reason and "embed_semantic" in found["abx_within"].reason
    curve = [found[f"si_sdr_at_{rate}bps"].value or 0 for rate in (48_000, 192_000, 384_000)]
    assert curve == sorted(curve) and curve[2] == found["si_sdr"].value
    # The second codec's have its name.
    assert (found["small_si_sdr"].value or 0) < 0
    assert found["small_bitrate_bps"].value == pytest.approx(139.6, abs=0.1)
    assert "small_wer_original" not in found and "small_stoi_at_40bps" in found


def test_the_report_shows_and_plays_every_codec(comparison: codec_evaluation.Comparison) -> None:
    blocks = comparison.document()
    assert blocks[1] == Paragraph("Left out: no 'mimi'.")
    sounds = [block for block in blocks if isinstance(block, Sound)]
    # Of each of four sounds: the original, and from either codec the coarsest and the finest.
    assert len(sounds) == 4 * (1 + 2 + 2) and len({sound.name for sound in sounds}) == len(sounds)
    finest = next(sound for sound in sounds if sound.name == "example-0-wire-8")
    np.testing.assert_allclose(finest.pcm, comparison.items[0].pcm, atol=1e-4)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be fetched."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(fidelity, "pesq_installed", lambda: False)


@pytest.mark.usefixtures("offline")
def test_a_peer_that_cannot_be_fetched_is_left_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    handed: dict[str, Any] = {}
    monkeypatch.setattr(codec_evaluation, "abx", SimpleNamespace(sayings=lambda *_: ()))
    monkeypatch.setattr(
        codec_evaluation, "measure", lambda codecs, *_, **more: handed.update(more, codecs=codecs)
    )
    audio.save(tmp_path / "a.wav", noise())
    peers = ["encodec:1.5", str(folder), "hf://kyutai/mimi"]
    codec_evaluation.compare(str(folder), audio=tmp_path, codecs=peers)
    assert list(handed["codecs"]) == ["codec", "codec_2"]
    assert len(handed["missing"]) == 2
    for name, sentence in zip(("encodec", "mimi"), handed["missing"], strict=True):
        assert name in sentence and "no route to host" in sentence
    assert caplog.messages == [f"left out: {sentence}" for sentence in handed["missing"]]


@pytest.mark.usefixtures("offline")
def test_nothing_is_measured_of_a_codec_that_is_missing(folder: Path) -> None:
    for judged in ("nowhere", "encodec", "hf://kyutai/mimi"):
        for options in ({"model": None, "codecs": [judged]}, {"model": judged}):
            with pytest.raises(UserError, match=judged):
                codec_evaluation.evaluate(**options)
    with pytest.raises(UserError, match="nowhere"):  # a slip of the pen, not a hub out of reach
        codec_evaluation.evaluate(str(folder), codecs=["nowhere"])
    with pytest.raises(UserError, match="levels"):
        codec_evaluation.evaluate(None, codecs=["nowhere"], levels="most")


@torch.no_grad()
def small_mimi() -> MimiCodec:
    """Mimi in small with random weights, at the published rates; 16 kbit/s in four codebooks."""
    torch.manual_seed(0)
    shape = {"num_filters": 4, "num_hidden_layers": 1, "num_attention_heads": 2}
    width = {"hidden_size": 16, "upsample_groups": 16, "intermediate_size": 24}
    codes = {"num_quantizers": 4, "codebook_size": 16, "codebook_dim": 8}
    inner = {"num_key_value_heads": 2, "vector_quantization_hidden_dimension": 8}
    return MimiCodec(MimiConfig.model_validate({**shape, **width, **codes, **inner})).eval()


def test_public_architectures_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "pesq_installed", lambda: False)
    pair = abx.contrasts()[0]
    monkeypatch.setattr(abx, "contrasts", lambda: [pair])
    words = [
        abx.Saying(word, carrier, voice, noise(0.2, seed), 0.0, 0.2)
        for seed, (voice, carrier, word) in enumerate(itertools.product("ab", abx.CARRIERS, pair))
    ]
    codecs = {"encodec": random_encodec(1.5), "mimi": small_mimi()}
    items = [codec_evaluation.Item("noise", noise(0.6), None, None)]
    compared = codec_evaluation.measure(codecs, items, words, source="noise", levels="all")
    found = compared.metrics()
    assert found["bitrate_bps"].value == pytest.approx(1500)
    assert found["mimi_bitrate_bps"].value == pytest.approx(12.5 * 16)
    assert [list(result.rates) for result in compared.results] == [[1, 2], [1, 2, 3, 4]]
    for name in ("stoi", "si_sdr_at_750bps", "mimi_mel_distance_at_50bps", "mimi_abx_within"):
        assert found[name].value is not None, name
    # Of each frame of 320 samples, or of 1920, a code.
    assert (found["codebook_usage_1"].n, found["mimi_codebook_usage_3"].n) == (45, 8)


def test_recordings_are_measured_without_a_speech_engine(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_engine(*_: Any) -> Any:
        raise UserError("speech engine 'flite' is not installed")

    monkeypatch.setattr(
        codec_evaluation, "abx", SimpleNamespace(**vars(abx) | {"sayings": no_engine})
    )
    audio.save(tmp_path / "a.wav", noise())
    found = codec_evaluation.evaluate(str(folder), audio=tmp_path, levels="3", progress=False)
    assert found["stoi"].n == 1 and found["abx_across"].reason and "stoi_users" not in found


def test_tokenizer_metrics_of_an_untrained_tokenizer(folder: Path) -> None:
    found = tokenizer_evaluation.evaluate(str(folder), utterances=8)
    assert found["wer_quantized"].value is not None and found["wer_quantized"].value > 0.9
    usage = found["codebook_usage"]
    assert usage.value is not None and 0 < usage.value <= (usage.n or 0) / 9
    assert 0 <= (found["codebook_entropy"].value or 0) <= 1


def test_both_are_found_by_the_codec_s_own_folder(folder: Path) -> None:
    codec, tokenizer = load_codec_of(folder), load_speech_tokenizer_of(folder)
    pcm = torch.randn(1, 1, 5 * 1920)
    assert torch.equal(codec.encode(pcm)[:, 0], tokenizer.encode(pcm))
    assert torch.equal(codec.embed_semantic(codec.encode(pcm)[:, 0]), tokenizer.embed(
        tokenizer.encode(pcm)
    ))  # fmt: skip


def test_pooled_wer_weighs_utterances_by_their_words() -> None:
    errors = [word_errors("one two three four", "one two three four"), word_errors("five", "six")]
    assert tokenizer_evaluation.pooled_wer(errors).value == pytest.approx(1 / 5)
