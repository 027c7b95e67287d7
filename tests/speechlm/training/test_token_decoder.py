"""The token decoder's training: it learns, resumes exactly, draws every row; resynthesis."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from kills import rows, spoil, train_until
from small import TOKENIZER
from torch import Tensor

from audio_codec import checkpoint as checkpoints
from audio_codec.audio import FRAME_SIZE, SAMPLE_RATE, Pcm
from audio_codec.errors import UserError
from audio_codec.speech_tokenizer import SpeechTokenizer, load_tokenizer
from audio_codec.token_decoder import AHEAD, TokenDecoder, TokenDecoderConfig, load_token_decoder
from speechlm.config import build
from speechlm.evaluation import resynthesis
from speechlm.training import token_decoder as training
from speechlm.training.token_decoder import (
    Source,
    TrainConfig,
    draw_batch,
    load_voiced,
    tokenize,
    train,
    voice_names,
)
from synth_data import shards
from synth_data.verify import word_errors

SHAPE = {
    "block": 3,
    "dim": 32,
    "heads": 2,
    "encoder_layers": 1,
    "voice_blocks": 1,
    "flow_blocks": 1,
    "flow_layers": 1,
    "window_seconds": 0.5,
    "steps": 2,
    "vocoder_dim": 16,
    "vocoder_blocks": 1,
}
ADVERSARIAL = {
    "begin": 2,
    "alone": 1,
    "discriminators": {"windows": [256, 64], "channels": 4},
    "optimizer": {"lr": 3e-3, "warmup": 1},
}


def glide(seconds: float, rng: np.random.Generator, low: float) -> Pcm:
    """A gliding tone in a little noise, at `low` Hz or up to an octave above."""
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    pitch = low * rng.uniform(1, 1.7) * (1 + 0.3 * time)
    pcm = 0.3 * np.sin(2 * np.pi * pitch * time) + 0.02 * rng.standard_normal(len(time))
    return pcm.astype(np.float32)


VOICES = {"low": 120.0, "low@rate=2": 130.0, "high": 900.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of gliding tones in two voices, and a tokenizer that nobody trained."""
    path, rng = tmp_path_factory.mktemp("decoder"), np.random.default_rng(0)
    for folder, voices, seconds in (
        ("train", ["low", "low@rate=2", "high", "low"], 0.8),
        ("more", ["high"], 0.8),
        ("validation", ["low", "nobody"], 1.0),
    ):
        samples = [
            shards.Sample(
                id=f"{folder}-{number}",
                text="one",
                words=((),),
                voices=(voice,),
                source="test",
                licence="Apache-2.0",
                synthetic=True,
                seconds=seconds,
                pcm=glide(seconds, rng, VOICES.get(voice, 300.0))[None],
            )
            for number, voice in enumerate(voices)
        ]
        shards.write(path / folder / shards.shard_name(folder, 0), samples)
    torch.manual_seed(0)
    tokenizer = SpeechTokenizer(TOKENIZER).eval()
    # Its codes tell one sound from another, though nobody trained it.
    pcm = torch.from_numpy(np.stack([glide(2.4, rng, low) for low in VOICES.values()]))[:, None]
    with torch.no_grad():
        numbers = tokenizer.features(tokenizer.mel(pcm))
    tokenizer.quantizer.mean.copy_(numbers.mean((0, 1)))
    tokenizer.quantizer.variance.copy_(numbers.var((0, 1)))
    checkpoints.save(path / "tokenizer", TOKENIZER, tokenizer.state_dict(), dtype="fp32")
    return path


def layout(made: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    run = {"steps": 6, "log_every": 1, "save_every": 2, "eval_every": 6, "precision": "no"}
    return {
        "run": {"dir": run_dir, **run, **changes.pop("run", {})},
        "tokenizer": str(made / "tokenizer"),
        "model": SHAPE,
        "sources": [{"path": made / "train"}, {"path": made / "more", "weight": 0.2}],
        "validation": made / "validation",
        "validation_utterances": 2,
        "samples": 0,
        "batch": 3,
        "crop_tokens": 6,
        "vocoder_tokens": 4,
        "prompt_tokens": 3,
        "ema": 0.9,
        "optimizer": {"lr": 3e-3, "warmup": 2},
        **changes,
    }


def config_of(made: Path, run_dir: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate(layout(made, run_dir, **changes))


# --- Runs -----------------------------------------------------------------------------------------


def test_it_learns_a_few_seconds_by_heart(made: Path, tmp_path: Path) -> None:
    """All losses fall: the flow's to less than 0.6 of what it was, the others' to 0.8."""
    config = config_of(
        made,
        tmp_path / "run",
        run={"steps": 150, "eval_every": 150, "save_every": 150},
        optimizer={"lr": 8e-3, "warmup": 10, "decay": 0.5},
        batch=6,
        drop_share=0.0,
    )
    path = train(config)
    logged = [row for row in rows(tmp_path / "run") if "flow" in row]
    assert len(logged) == 150
    for name, falls_to in (("flow", 0.6), ("mean", 0.8), ("mel", 0.8)):
        loss = [row[name] for row in logged]
        assert np.isfinite(loss).all()
        assert np.mean(loss[-10:]) < falls_to * np.mean(loss[:3]), name
    (measured,) = [row for row in rows(tmp_path / "run") if "mel_tokens_validation" in row]
    assert {"mel_vocoder_validation", "stoi_vocoder_validation", "stoi_tokens_validation"} <= set(
        measured
    )
    # What it learned streams: the loaded decoder says the same in blocks as whole.
    decoder, tokenizer = load_token_decoder(path), load_tokenizer(made / "tokenizer")
    assert decoder.config.voices == ("low", "high")
    assert decoder.config.codebook == tokenizer.codebook
    assert decoder.config.fingerprint == tokenizer.fingerprint()
    sound = torch.from_numpy(glide(2.4, np.random.default_rng(1), 120.0))[None, None]
    codes = tokenize(tokenizer, sound)
    voice = decoder.voice("high")
    whole = decoder.decode(codes, voice=voice[None], seed=torch.tensor([7]))
    state = decoder.new_state(1)
    decoder.configure(state, 0, voice=voice, seed=7)
    parts = [decoder.decode(part, state) for part in codes.split(SHAPE["block"], 1)]
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=0, atol=1e-4)
    assert float(whole.abs().max()) > 0.01


def test_a_run_killed_anywhere_ends_with_the_same_bits(made: Path, tmp_path: Path) -> None:
    def config(name: str) -> TrainConfig:
        run = {"precision": "bf16", "steps": 5}
        return config_of(made, tmp_path / name, run=run, prompt_share=0.5)

    whole = train_until(training, config("whole"))
    assert train_until(training, config("parts"), resume=True, clips=1) is None
    assert train_until(training, config("parts"), resume=True, clips=3) is None
    parts = train_until(training, config("parts"), resume=True)
    assert whole is not None and parts is not None
    one, other = checkpoints.load(whole).tensors, checkpoints.load(parts).tensors
    assert not [key for key in one if not torch.equal(one[key], other[key])]
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


def test_a_gradient_that_is_no_number_changes_nothing_and_is_counted(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, training, {1})
    path = train(config_of(made, tmp_path, run={"steps": 3, "eval_every": 3}))
    logged = [row["bad_gradients"] for row in rows(tmp_path) if "bad_gradients" in row]
    assert logged == [0] + [1] * (len(logged) - 1) and len(logged) > 2
    tensors = checkpoints.load(path).tensors
    assert all(bool(t.isfinite().all()) for t in tensors.values() if t.is_floating_point())


def test_the_vocoder_may_have_discriminators(made: Path, tmp_path: Path) -> None:
    path = train(config_of(made, tmp_path / "run", adversarial=ADVERSARIAL))
    logged = [row for row in rows(tmp_path / "run") if "flow" in row]
    assert ["discriminator" in row for row in logged] == [False] * 2 + [True] * 4
    assert ["features" in row for row in logged] == [False] * 3 + [True] * 3
    assert all(np.isfinite(list(row.values())).all() for row in logged)
    assert checkpoints.load(path).card["adversarial_steps"] == 4


def test_a_run_can_start_from_another_ones_weights(made: Path, tmp_path: Path) -> None:
    first = train(config_of(made, tmp_path / "one", run={"steps": 1}, ema=0.0))
    AcceleratorState._reset_state(True)
    still = {"lr": 0.0, "weight_decay": 0.0}
    changes = {"init_from": str(first), "optimizer": still, "run": {"steps": 1}}
    second = train(config_of(made, tmp_path / "two", **changes))
    one, two = checkpoints.load(first).tensors, checkpoints.load(second).tensors
    assert not [key for key in one if not torch.equal(one[key], two[key])]


def test_a_voice_keeps_its_row_whatever_its_place_and_heads_must_agree(tmp_path: Path) -> None:
    def shaped(*voices: str, **more: Any) -> TokenDecoder:
        return TokenDecoder(TokenDecoderConfig.model_validate({**SHAPE, "voices": voices, **more}))

    before, after = shaped("ann", "bob"), shaped("carl", "bob", "ann")
    fresh = after.voice("carl").clone()
    checkpoints.save(tmp_path / "one", before.config, before.state_dict(), dtype="fp32")
    training.start_from(after, str(tmp_path / "one"))
    assert torch.equal(after.voice("ann"), before.voice("ann"))
    assert torch.equal(after.voice("bob"), before.voice("bob"))
    assert torch.equal(after.voice("carl"), fresh)
    with pytest.raises(UserError, match=r"model\.heads=4, but the attention in .* has 2 heads"):
        training.start_from(shaped("ann", "bob", heads=4), str(tmp_path / "one"))


# --- What a step sees -----------------------------------------------------------------------------


def drawn(made: Path, tmp_path: Path, **changes: Any) -> training.Batch:
    config = config_of(made, tmp_path, batch=600, **changes)
    sources = [Source(s.weight, load_voiced(s.path)) for s in config.sources]
    fields = {**config.model.model_dump(), "voices": voice_names(sources)}
    shape = TokenDecoderConfig.model_validate(fields)
    return draw_batch(sources, config, shape, np.random.default_rng(0))


def test_rows_are_drawn_in_their_shares(made: Path, tmp_path: Path) -> None:
    batch = drawn(made, tmp_path, drop_share=0.2, prompt_share=0.3)
    tokens = (batch.pcm.shape[-1] - AHEAD) / FRAME_SIZE
    assert tokens in (4, 5, 6), "the longest crop, or up to a block less"
    assert batch.prompt.shape == (600, 1, 3 * FRAME_SIZE)
    assert batch.noise.shape == (600, 4 * tokens, 160)
    assert batch.noise.mean().item() == pytest.approx(0, abs=0.01)
    assert batch.noise.var().item() == pytest.approx(1, abs=0.02)
    for mask, share in ((batch.heard, 0.8), (batch.named, 0.6), (batch.prompted, 0.3)):
        assert float(mask.float().mean()) == pytest.approx(share, abs=0.06)
    assert not bool((batch.named & ~batch.heard).any()), "no voice speaks without tokens"
    assert float(batch.time.min()) >= 0 and float(batch.time.max()) <= 1
    # Three of four sounds of the first folder are the low voice's, none of the second's.
    assert float((batch.voice == 0).float().mean()) == pytest.approx(0.75 / 1.2, abs=0.06)


def test_a_prompt_is_in_the_voice_of_its_crop(made: Path, tmp_path: Path) -> None:
    batch = drawn(made, tmp_path)

    def pitch(pcm: Tensor) -> Tensor:
        return torch.fft.rfft(pcm[:, 0]).abs().argmax(1) * SAMPLE_RATE / pcm.shape[-1]

    for sounds in (batch.pcm, batch.prompt):
        assert bool(((pitch(sounds) > 600) == (batch.voice == 1)).all())
    assert not torch.equal(batch.pcm[:, :, : batch.prompt.shape[-1]], batch.prompt)


def test_voices_are_named_without_the_speed_of_the_day_most_heard_first(made: Path) -> None:
    sources = [Source(1.0, load_voiced(made / name)) for name in ("train", "more")]
    assert voice_names(sources) == ("high", "low")
    assert voice_names(sources[:1]) == ("low", "high")


def test_a_tokenizer_hears_at_its_own_rate(made: Path) -> None:
    tokenizer = load_tokenizer(made / "tokenizer")
    pcm = torch.from_numpy(glide(0.8, np.random.default_rng(0), 200.0))[None, None]
    assert torch.equal(tokenize(tokenizer, pcm), tokenizer.encode(pcm))
    slow: Any = SimpleNamespace(
        sample_rate=16_000, rate=12.5, delay=0, encode=lambda heard: heard[:, 0]
    )
    heard = tokenize(slow, pcm)
    assert heard.shape == (1, 12_800) and heard.dtype == torch.float32
    assert float(heard.square().mean()) == pytest.approx(float(pcm.square().mean()), rel=0.05)


def test_tokens_that_come_late_are_those_of_the_sound(made: Path) -> None:
    now = load_tokenizer(made / "tokenizer")
    late = SpeechTokenizer(now.config.model_copy(update={"lookahead_ms": 160})).eval()
    late.load_state_dict(now.state_dict())
    pcm = torch.from_numpy(glide(0.8, np.random.default_rng(0), 200.0))[None, None]
    # What it would say of the sound and of 160 ms of silence after it, but for its first two.
    said = now.encode(torch.nn.functional.pad(pcm, (0, 2 * FRAME_SIZE)))
    assert torch.equal(tokenize(late, pcm), said[:, 2:])
    decoder = small_decoder()
    heard: list[Tensor] = []
    decoder.decode = lambda codes, **_: heard.append(codes) or torch.zeros(1, 1, 19_200)
    made_again = resynthesis.resynthesize(late, decoder, pcm[0, 0].numpy(), "low")
    assert len(made_again) == pcm.shape[2] and torch.equal(heard[0], said[:, 2:])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"crop_tokens": 2}, "crop_tokens=2 must be at least model.block=3"),
        ({"adversarial": {"begin": 6}}, "adversarial.begin is step 6, but run.steps ends at 6"),
        ({"drop_share": 0.6}, "drop_share is 0.6"),
        ({"model": {**SHAPE, "rate": 15}}, "rate=15 must be 50 over a whole number"),
        ({"model": {**SHAPE, "layers": 2}}, "unknown key 'model.layers'"),
        ({"sources": []}, "sources is"),
    ],
)
def test_a_mistake_in_the_recipe_is_one_clear_sentence(
    made: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said) as caught:
        build(layout(made, tmp_path, **changes), TrainConfig, "decoder.yaml")
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_a_folder_without_sound_is_named(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no shard"):
        train(config_of(made, tmp_path / "run", sources=[{"path": tmp_path / "nothing"}]))


# --- Resynthesis ----------------------------------------------------------------------------------


class Scripted:
    """Hears what it is told to, one sound after the other."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.heard = list(texts), []

    def transcribe(self, pcm: Pcm) -> str:
        self.heard.append(pcm)
        return self.texts.pop(0)


def small_decoder(**changes: Any) -> TokenDecoder:
    torch.manual_seed(0)
    fields = {**SHAPE, "codebook": TOKENIZER.levels, "voices": ("low",), **changes}
    decoder = TokenDecoder(TokenDecoderConfig.model_validate(fields))
    return decoder.eval().requires_grad_(False)


def test_both_sounds_are_heard_and_their_errors_pooled(made: Path) -> None:
    tokenizer, decoder = load_tokenizer(made / "tokenizer"), small_decoder()
    rng = np.random.default_rng(0)
    said = [(glide(seconds, rng, 200.0), "one two three four") for seconds in (0.5, 0.73)]
    listener = Scripted("one two three four", "one three four", "one two tree four", "five")
    pairs = resynthesis.pairs_of_errors(tokenizer, decoder, said, "low", listener)
    assert [len(pcm) for pcm in listener.heard] == [12_000, 12_000, 17_520, 17_520]
    assert listener.heard[0] is said[0][0] and not np.array_equal(*listener.heard[:2])
    assert [(a.errors, b.errors) for a, b in pairs] == [(0, 1), (1, 4)]
    metrics = resynthesis.pooled(pairs)
    assert metrics["resynthesis_wer"].value == pytest.approx(5 / 8)
    assert metrics["resynthesis_wer_original"].value == pytest.approx(1 / 8)
    added = metrics["resynthesis_wer_added"]
    assert added.value == pytest.approx(50) and (added.low, added.high) == pytest.approx((25, 75))
    assert all(metric.n == 2 for metric in metrics.values())


def test_pairs_know_the_difference_better_than_the_rates_do() -> None:
    bad, worse = (word_errors("a b c d", text) for text in ("x y z d", "w x y z"))
    good, fair = (word_errors("a b c d", text) for text in ("a b c d", "a b c x"))
    added = resynthesis.pooled([(bad, worse), (good, fair)] * 5)["resynthesis_wer_added"]
    assert (added.value, added.low, added.high) == pytest.approx((25, 25, 25))


def test_a_decoder_of_other_tokens_is_refused(made: Path) -> None:
    tokenizer = load_tokenizer(made / "tokenizer")
    resynthesis.check_match(tokenizer, small_decoder())
    for changes in ({"codebook": (9,)}, {"rate": 25.0}):
        with pytest.raises(UserError, match=r"but the tokenizer's are of \(3, 3\) at 12.5 Hz"):
            resynthesis.resynthesis_wer(tokenizer, small_decoder(**changes))
    with pytest.raises(UserError, match="voice 'low' must be written engine:name"):
        resynthesis.resynthesis_wer(tokenizer, small_decoder(), utterances=1)


def test_resynthesis_of_held_out_sentences_is_measured(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoken = "espeak:en-us+f2"
    pytest.importorskip("espeakng_loader", reason="needs the extra tts")
    listener = Scripted("", "", "", "")
    monkeypatch.setattr(resynthesis, "default_recognizer", lambda: listener)
    tokenizer, decoder = load_tokenizer(made / "tokenizer"), small_decoder(voices=(spoken,))
    metrics = resynthesis.resynthesis_wer(tokenizer, decoder, utterances=2)
    assert metrics["resynthesis_wer"].value == metrics["resynthesis_wer_original"].value == 1
    assert metrics["resynthesis_wer_added"].value == 0 and not listener.texts


# --- GPU ------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_gpu_trains_goes_on_and_speaks(made: Path, tmp_path: Path) -> None:
    def config(steps: int) -> TrainConfig:
        run = {"steps": steps, "precision": "bf16"}
        return config_of(made, tmp_path / "run", run=run, adversarial=ADVERSARIAL, samples=1)

    train(config(4))
    AcceleratorState._reset_state(True)
    path = train(config(6), resume=True)
    logged = [row for row in rows(tmp_path / "run") if "flow" in row]
    assert [row["step"] for row in logged] == list(range(6))
    assert all(np.isfinite(list(row.values())).all() for row in logged)
    decoder, codes = load_token_decoder(path), torch.arange(6)[None]
    expected = decoder.generate(codes)
    found = decoder.to("cuda").generate(codes.cuda()).cpu()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-2)
