"""The bench compares like with like, in turns, and counts what could not be said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from small import TOKENIZER, small_text_to_token

from audio_codec import checkpoint
from audio_codec.errors import UserError
from audio_codec.speech_tokenizer import SpeechTokenizer
from audio_codec.token_decoder import TokenDecoder, TokenDecoderConfig
from synth_data import bench
from synth_data.bench import Route, best_route, codes_of, errors, figures, in_turns, speed
from synth_data.tts import Voice

pytest.importorskip("espeakng_loader", reason="speech engine espeak is not installed")

TEXTS = ["The cat sat on the mat.", "one two three", "where are you going", "yes"] * 5


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A text-to-token model and its tokenizer."""
    path = tmp_path_factory.mktemp("bench")
    model = small_text_to_token(codebook=(3, 3))
    checkpoint.save(path / "model", model.config, model.float().state_dict(), dtype="fp32")
    tokenizer = SpeechTokenizer(TOKENIZER).state_dict()
    checkpoint.save(path / "tokenizer", TOKENIZER, tokenizer, dtype="fp32")
    return str(path / "model"), str(path / "tokenizer")


def test_figures_are_ratios_within_a_round() -> None:
    found = figures({"text_to_token": [100.0, 50.0, 120.0], "tts_path": [10.0, 5.0, 10.0]}, 12.5)
    assert found["text_to_token_speedup"].value == 10.0
    assert found["tokens_per_second"].value == 100.0
    assert found["text_to_token_rate"].value == 8.0 and found["tts_path_rate"].value == 0.8
    assert found["text_to_token_speedup"].n == 3


def test_turns_are_taken_in_both_orders() -> None:
    seen: list[str] = []

    def take(route: Route, texts: Sequence[str]) -> tuple[int, float]:
        seen.append(route.voice)
        return 10 * len(texts), 2.0

    routes = {"a": Route("t", voice="a"), "b": Route("t", voice="b")}
    assert in_turns(routes, ["x"], take, 3) == {"a": [5.0] * 3, "b": [5.0] * 3}
    assert seen == ["b", "a", "a", "b", "b", "a"]


def test_the_fastest_setting_counts() -> None:
    def take(route: Route, texts: Sequence[str]) -> tuple[int, float]:
        fast = (route.voice == "b") + (route.batch == 4) + (route.precision == "fp32")
        return 100 * (1 + fast), 1.0

    assert best_route("t", ["a", "b"], ["x"], take) == Route(
        "t", precision="fp32", batch=4, voice="b"
    )


def test_either_way_gives_codes(made: tuple[str, str]) -> None:
    model, tokenizer = made
    ours = codes_of(Route(tokenizer, model, "fp32"), TEXTS)
    theirs = codes_of(Route(tokenizer, voice="espeak:en-us", batch=3, precision="fp32"), TEXTS)
    assert len(ours) == len(theirs) == len(TEXTS)
    assert all(row.max(initial=0) < 9 for row in [*ours, *theirs])
    assert all(len(row) > 3 for row in theirs) and any(len(row) for row in ours)


def test_errors_of_both_ways(made: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = made
    heard = iter(TEXTS * 2)

    class Listener:
        def transcribe(self, pcm: np.ndarray) -> str:
            return next(heard) if len(pcm) else ""

    monkeypatch.setattr(bench, "default_recognizer", Listener)
    monkeypatch.setattr(
        bench, "codes_of", lambda route, texts: [np.ones(3, np.uint16)] * len(texts)
    )
    found = errors(
        model,
        tokenizer,
        TEXTS,
        voices=[Voice.parse("espeak:en-us")],
        decode=lambda codes: np.zeros(1920 * len(codes), np.float32),
    )
    assert found["text_to_token_decoded_wer"].value == found["tts_path_decoded_wer"].value == 0
    assert found["text_to_token_wer"].value > 0.5 and found["tts_path_wer"].value > 0.5
    assert found["text_to_token_faults"].value == 0 and found["tts_path_wer"].n == len(TEXTS)


def test_a_decoder_speaks_the_codes_of_its_tokenizer(made: tuple[str, str], tmp_path: Path) -> None:
    model, tokenizer = made
    voices = {"codebook": (3, 3), "voices": ("ann", "bob"), "dim": 16, "heads": 2}
    layers = {"encoder_layers": 1, "flow_layers": 1, "flow_blocks": 1, "voice_blocks": 1}
    small = {"vocoder_dim": 16, "vocoder_blocks": 1, "steps": 1}
    config = TokenDecoderConfig.model_validate({**voices, **layers, **small})
    weights = TokenDecoder(config).state_dict()
    checkpoint.save(tmp_path / "decoder", config, weights, dtype="fp32")
    decode = bench.speaker(str(tmp_path / "decoder"), tokenizer)
    assert decode(np.array([1, 2, 8], np.uint16)).shape == (3 * 1920,)
    other = config.model_copy(update={"codebook": (9,)})
    checkpoint.save(tmp_path / "other", other, TokenDecoder(other).state_dict(), dtype="fp32")
    with pytest.raises(UserError, match="but the tokenizer's are of"):
        bench.speaker(str(tmp_path / "other"), tokenizer)
    with pytest.raises(UserError, match="does not say whose codes"):
        bench.tokenizer_of(model)


@pytest.mark.slow
def test_speed_is_measured_in_processes(made: tuple[str, str]) -> None:
    model, tokenizer = made
    found = speed(model, tokenizer, TEXTS, workers=2, rounds=2, voices=("espeak:en-us",))
    assert all(figure.value > 0 for figure in found.values())
    assert Path(model).is_dir() and found["text_to_token_speedup"].n == 2
