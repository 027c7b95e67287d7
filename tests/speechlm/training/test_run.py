"""A run that was killed goes on as if nothing had happened, to the last bit."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st
from kills import Killed, rows, train_until
from pydantic import BaseModel, ValidationError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from audio_codec import checkpoint as checkpoints
from audio_codec import precision
from audio_codec.audio import FRAME_RATE, FRAME_SIZE, SAMPLE_RATE, LogMel
from audio_codec.codec import load_codec
from audio_codec.errors import UserError
from audio_codec.quantize import ResidualVQ
from audio_codec.speech_tokenizer import load_tokenizer, spell
from speechlm.training import codec as codec_training
from speechlm.training import run as runs
from speechlm.training import tokenizer as tokenizer_training
from speechlm.training.run import OptimizerConfig, Run, RunConfig
from synth_data import shards

STEPS = 8


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


# --- A toy trainee --------------------------------------------------------------------------------


class ToyConfig(BaseModel):
    run: RunConfig
    width: int = 3


def toy(
    directory: Path, resume: bool = False, *, die_in: int | None = None, **changes: Any
) -> dict[str, Tensor]:
    """Trains on noise of both kinds of generators; dies in the middle of step `die_in`."""
    width = changes.pop("width", 3)
    layout = {"steps": 9, "log_every": 1, "save_every": 3, "eval_every": 4, "precision": "no"}
    config = ToyConfig(
        run=RunConfig.model_validate({"dir": directory, **layout, **changes}), width=width
    )
    run = Run("toy", config.run, config, resume)
    model = nn.Linear(width, width)  # draws from torch's generator, as every model does
    optimizer = OptimizerConfig(lr=0.1, warmup=1).build(model)
    run.restore(model, optimizer)

    def state() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    for step in run.steps(state, lambda step: {"evaluated": float(step)}):
        x = torch.randn(2, width) + torch.from_numpy(run.rng(step).random(width)).float()
        loss = model(x).square().mean()
        loss.backward()
        if step == die_in:
            raise Killed
        optimizer.step()
        optimizer.zero_grad()
        run.log(step, {"loss": loss.item()})
    return model.state_dict()


@settings(max_examples=5, deadline=None)
@given(deaths=st.lists(st.integers(0, 8), min_size=1, max_size=3))
def test_any_chain_of_deaths_gives_the_numbers_of_one_never_killed(
    tmp_path_factory: pytest.TempPathFactory, deaths: list[int]
) -> None:
    path = tmp_path_factory.mktemp("run")
    whole = toy(path / "whole")
    for death in sorted(deaths):
        with pytest.raises(Killed):
            toy(path / "parts", resume=True, die_in=death)
    parts = toy(path / "parts", resume=True)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert (path / "parts" / "metrics.jsonl").read_bytes() == (
        path / "whole" / "metrics.jsonl"
    ).read_bytes()


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        toy(tmp_path, die_in=5)
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2, 3, 3, 4]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # the line being written at the time
    with pytest.raises(Killed):
        toy(tmp_path, resume=True, die_in=3)
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2]


def test_curves_show_every_step_once(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        toy(tmp_path, die_in=5)
    toy(tmp_path, resume=True)
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in curves.Scalars("loss")] == list(range(9))


def test_no_precision_may_be_written_as_yaml_reads_it(tmp_path: Path) -> None:
    read = yaml.safe_load(f"{{dir: {tmp_path}, steps: 1, precision: no}}")
    assert RunConfig.model_validate(read).precision == "no"
    with pytest.raises(ValidationError, match="precision"):
        RunConfig.model_validate({**read, "precision": True})


@pytest.mark.parametrize(("units", "other"), [(True, False), (False, True)])
def test_a_run_keeps_the_precision_that_it_was_begun_with(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    units: bool,
    other: bool,
) -> None:
    def on_a_machine(has_units: bool) -> None:
        AcceleratorState._reset_state(True)
        precision._warn.cache_clear()
        for room in (precision, runs):
            monkeypatch.setattr(room, "has_bf16", lambda device: has_units)

    def written() -> str:
        return str(json.loads((tmp_path / "config.json").read_text())["run"]["precision"])

    choice = "bf16" if units else "no"
    on_a_machine(units)
    with pytest.raises(Killed):
        toy(tmp_path, precision="auto", die_in=5)
    assert written() == choice and not caplog.messages
    on_a_machine(other)
    with pytest.raises(Killed):
        toy(tmp_path, resume=True, precision="auto", die_in=7)
    assert written() == choice
    assert [("bf16" in said) for said in caplog.messages] == ([True] if units else [])
    on_a_machine(other)
    toy(tmp_path, resume=True, precision="no")  # said outright, it is another
    assert written() == "no"


def test_a_run_is_not_overwritten_without_resume(tmp_path: Path) -> None:
    toy(tmp_path / "run")
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"--resume"):
        toy(tmp_path / "run", steps=1)
    assert files(tmp_path) == before


def test_a_finished_run_resumed_does_nothing_more(tmp_path: Path) -> None:
    done = toy(tmp_path)
    kept = (tmp_path / "checkpoint.pt").read_bytes()
    again = toy(tmp_path, resume=True)
    assert all(torch.equal(done[name], again[name]) for name in done)
    assert (tmp_path / "checkpoint.pt").read_bytes() == kept
    assert len(rows(tmp_path)) == 9 + 3


def test_a_longer_run_goes_on_from_a_finished_one(tmp_path: Path) -> None:
    whole = toy(tmp_path / "whole", steps=12)
    toy(tmp_path / "parts", steps=6)
    parts = toy(tmp_path / "parts", resume=True, steps=12)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_run_killed_before_its_first_save_starts_anew_either_way(tmp_path: Path) -> None:
    whole = toy(tmp_path / "whole")
    for resume in (False, True):
        path = tmp_path / str(resume)
        with pytest.raises(Killed):
            toy(path, die_in=2)
        found = toy(path, resume=resume)
        assert all(torch.equal(whole[name], found[name]) for name in whole)
        assert len(rows(path)) == 12


def test_a_death_while_saving_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = toy(tmp_path / "whole")
    saves = itertools.count(1)
    real = torch.save

    def half(content: Any, path: Path) -> None:
        real(content, path)
        if next(saves) == 2:
            path.write_bytes(path.read_bytes()[:500])
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(Killed):
            toy(tmp_path / "parts")
    assert torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["step"] == 3
    parts = toy(tmp_path / "parts", resume=True)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_broken_checkpoint_is_a_user_error(tmp_path: Path) -> None:
    toy(tmp_path, steps=1)
    content = (tmp_path / "checkpoint.pt").read_bytes()
    for length in (0, 1, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "checkpoint.pt").write_bytes(content[:length])
        with pytest.raises(UserError, match=r"checkpoint\.pt cannot be read"):
            toy(tmp_path, resume=True)


def test_a_run_of_another_model_is_a_user_error(tmp_path: Path) -> None:
    toy(tmp_path, steps=1)
    with pytest.raises(UserError, match="another model"):
        toy(tmp_path, resume=True, width=5)


def test_a_file_in_the_place_of_the_run_directory_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match=r"run\.dir .* is a file"):
        toy(tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_time_is_up_counts_as_the_last_step(tmp_path: Path) -> None:
    toy(tmp_path, minutes=0.0)
    assert rows(tmp_path)[-1] == {"step": 0, "evaluated": 0.0}
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 1
    toy(tmp_path, resume=True, minutes=0.0)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2


def test_the_run_directory_says_how_to_repeat_it(tmp_path: Path) -> None:
    toy(tmp_path, steps=2, seed=7)
    config = ToyConfig.model_validate_json((tmp_path / "config.json").read_text())
    assert config.run.steps == 2 and config.run.seed == 7 and config.width == 3
    assert any((tmp_path / "tensorboard").iterdir())


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    a, b, again = (toy(tmp_path / name, seed=s) for name, s in (("a", 1), ("b", 2), ("c", 1)))
    assert not torch.equal(a["weight"], b["weight"])
    assert torch.equal(a["weight"], again["weight"])


# --- Optimizer ------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    steps=st.integers(1, 2000),
    warmup=st.integers(0, 500),
    decay=st.floats(0, 1),
    final=st.floats(0, 1),
)
def test_the_rate_warms_up_holds_and_falls(
    steps: int, warmup: int, decay: float, final: float
) -> None:
    config = OptimizerConfig(lr=2.0, warmup=warmup, decay=decay, final=final)
    rates = [config.rate(step, steps) for step in range(steps)]
    begin = int(steps * (1 - decay))
    assert all(0 <= rate <= 2.0 for rate in rates)
    held = rates[min(warmup, begin) : begin]
    assert all(rate == 2.0 for rate in held) or warmup >= begin
    falling = rates[max(begin + 1, warmup) :]
    assert all(b <= a for a, b in itertools.pairwise(falling))
    if warmup <= steps:
        assert rates[-1] >= 2.0 * final * min(1.0, steps / max(1, warmup)) - 1e-12


def test_only_trained_matrices_decay() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))
    model[2].requires_grad_(False)
    optimizer = OptimizerConfig(weight_decay=0.3).build(model)
    found = {
        group["weight_decay"]: [tuple(p.shape) for p in group["params"]]
        for group in optimizer.param_groups
    }
    assert found == {0.3: [(2, 2)], 0.0: [(2,), (2,), (2,)]}


# --- The trainees ---------------------------------------------------------------------------------

TINY_TOKENIZER = {
    "front_dim": 8,
    "front_blocks": 1,
    "dim": 16,
    "heads": 2,
    "layers_before": 1,
    "layers_after": 1,
    "window_seconds": 0.32,
    "levels": [3, 3],
    "dropout": 0.1,  # draws from torch's generator at every step
}
TINY_CODEC = {
    "encoder_dim": 8,
    "encoder_blocks": 1,
    "encoder_latent_dim": 16,
    "encoder_latent_blocks": 1,
    "latent": 4,
    "codebooks": [32, 32],
    "decoder_latent_dim": 16,
    "decoder_latent_blocks": 1,
    "decoder_dim": 8,
    "decoder_blocks": 1,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a few seconds of sound, made without a speech engine, and a tiny tokenizer."""
    path = tmp_path_factory.mktemp("training")
    rng = np.random.default_rng(0)
    for folder, count in (("train", 12), ("validation", 2), ("noise", 2)):
        samples = []
        for number in range(count):
            seconds = 0.5 + 0.1 * (number % 4) + (folder == "validation")
            time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
            tone = np.sin(2 * np.pi * rng.uniform(100, 900) * time) * rng.uniform(0.1, 0.4)
            pcm = tone + 0.05 * rng.standard_normal(len(time))
            samples.append(
                shards.Sample(
                    id=f"{folder}-{number}",
                    text="" if folder == "noise" else ("one two", "three", "yes I am")[number % 3],
                    words=((),),
                    voices=("tone",),
                    source="test",
                    licence="Apache-2.0",
                    synthetic=True,
                    seconds=len(time) / SAMPLE_RATE,
                    pcm=pcm.astype(np.float32)[None],
                )
            )
        shards.write(path / folder / shards.shard_name(folder, 0), samples)
    config = tokenizer_training.TokenizerConfig.model_validate(TINY_TOKENIZER)
    checkpoints.save(
        path / "tokenizer", config, tokenizer_training.SpeechTokenizer(config).state_dict()
    )
    return path


def tokenizer_config(made: Path, run_dir: Path, **changes: Any) -> tokenizer_training.TrainConfig:
    run = {"steps": STEPS, "log_every": 1, "save_every": 2, "eval_every": 3}
    layout = {
        "run": {"dir": run_dir, **run, **changes.pop("run", {})},
        "model": TINY_TOKENIZER,
        "data": {
            "train": [made / "train"],
            "validation": [made / "validation"],
            "noise": [made / "noise"],
            "batch_seconds": 3.0,
        },
        "augment": {"speed_share": 0.5, "warp": [0.9, 1.1]},
        "phones": 0.4,
        "optimizer": {"lr": 3e-3, "warmup": 2},
    }
    return tokenizer_training.TrainConfig.model_validate({**layout, **changes})


def codec_config(made: Path, run_dir: Path, **changes: Any) -> codec_training.TrainConfig:
    run = {"steps": STEPS, "log_every": 1, "save_every": 2, "eval_every": 3}
    layout = {
        "run": {"dir": run_dir, **run, **changes.pop("run", {})},
        "tokenizer": str(made / "tokenizer"),
        "model": TINY_CODEC,
        "sources": [
            {"path": made / "train", "weight": 3},
            {"path": made / "noise", "weight": 1},
        ],
        "validation": made / "validation",
        "validation_utterances": 1,
        "batch": 2,
        "crop_frames": 3,
        "optimizer": {"lr": 3e-3, "warmup": 2},
    }
    return codec_training.TrainConfig.model_validate({**layout, **changes})


TRAINEES: dict[str, tuple[Any, Callable[..., Any]]] = {
    "tokenizer": (tokenizer_training, tokenizer_config),
    "codec": (codec_training, codec_config),
}


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("trainee", list(TRAINEES))
def test_a_trainee_killed_anywhere_ends_with_the_same_bits(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trainee: str,
    precision: str,
) -> None:
    # Codes die quickly, so that restarts at random vectors happen within these few steps.
    monkeypatch.setattr(ResidualVQ.__init__, "__defaults__", (0.3,))
    module, make = TRAINEES[trainee]

    def config(name: str) -> Any:
        return make(made, tmp_path / name, run={"precision": precision})

    whole = train_until(module, config("whole"))
    assert whole is not None
    expected = checkpoints.load(whole).tensors
    log = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert [row["step"] for row in rows(tmp_path / "whole")] == [0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 7]
    # Deaths before the first save (after step 2), right after it, in its first step again, and
    # one step after the saves of 4 and 6.
    for updates in (1, 2, 0, 3, 3):
        assert train_until(module, config("parts"), resume=True, clips=updates) is None
    assert not (tmp_path / "parts" / trainee).exists()
    parts = train_until(module, config("parts"), resume=True)
    assert parts is not None
    found = checkpoints.load(parts).tensors
    assert not [key for key in expected if not torch.equal(expected[key], found[key])]
    assert (tmp_path / "parts" / "metrics.jsonl").read_bytes() == log


@pytest.mark.parametrize("trainee", list(TRAINEES))
def test_a_trainee_learns_and_its_checkpoint_loads(
    made: Path, tmp_path: Path, trainee: str
) -> None:
    module, make = TRAINEES[trainee]
    key = {"tokenizer": "loss", "codec": "mel"}[trainee]
    path = module.train(
        make(made, tmp_path / "run", run={"steps": 20, "eval_every": 20, "save_every": 20})
    )
    losses = [row[key] for row in rows(tmp_path / "run") if key in row]
    assert len(losses) == 20 and sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert checkpoints.load(path).card["steps"] == 20
    with pytest.raises(UserError, match=r"--resume"):
        module.train(make(made, tmp_path / "run"))
    model = {"tokenizer": load_tokenizer, "codec": load_codec}[trainee](path)
    codes = model.encode(torch.zeros(1, 1, 2 * FRAME_SIZE))
    assert codes.shape[-1] == 2


@pytest.mark.parametrize("trainee", list(TRAINEES))
def test_a_card_counts_the_steps_that_were_done(made: Path, tmp_path: Path, trainee: str) -> None:
    module, make = TRAINEES[trainee]
    path = module.train(make(made, tmp_path / "run", run={"minutes": 0.0}))
    assert checkpoints.load(path).card["steps"] == 1


@pytest.mark.parametrize("trainee", list(TRAINEES))
def test_a_result_that_may_not_be_written_is_refused_before_the_run(
    made: Path, tmp_path: Path, trainee: str
) -> None:
    module, make = TRAINEES[trainee]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="home"):
        module.train(make(made, tmp_path / "run", output=tmp_path / "home"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("trainee", list(TRAINEES))
def test_resuming_another_shape_is_a_user_error(made: Path, tmp_path: Path, trainee: str) -> None:
    module, make = TRAINEES[trainee]
    module.train(make(made, tmp_path / "run", run={"steps": 1}))
    model = {"tokenizer": {**TINY_TOKENIZER, "dim": 32}, "codec": {**TINY_CODEC, "latent": 6}}
    with pytest.raises(UserError, match="another model"):
        module.train(make(made, tmp_path / "run", model=model[trainee]), resume=True)


def test_starting_from_another_checkpoint(made: Path, tmp_path: Path) -> None:
    one = {"steps": 1}
    path = codec_training.train(codec_config(made, tmp_path / "a", run=one))
    again = codec_training.train(
        codec_config(made, tmp_path / "b", run=one, init_from=str(path), optimizer={"lr": 0.0})
    )
    first, second = checkpoints.load(path).tensors, checkpoints.load(again).tensors
    assert torch.equal(first["up.weight"], second["up.weight"])
    wrong = {**TINY_CODEC, "latent": 6}
    for start in (str(path), str(made / "tokenizer"), "nowhere"):
        with pytest.raises(UserError):
            codec_training.train(codec_config(made, tmp_path / "c", model=wrong, init_from=start))


def test_missing_data_is_a_user_error(made: Path, tmp_path: Path) -> None:
    data = {"train": [made / "noise"], "validation": [made / "validation"]}  # without text
    with pytest.raises(UserError, match="no utterance"):
        tokenizer_training.train(tokenizer_config(made, tmp_path / "a", data=data))
    data = {"train": [made / "train"], "validation": [made / "nothing"]}
    with pytest.raises(UserError, match="no shard"):
        tokenizer_training.train(tokenizer_config(made, tmp_path / "b", data=data))
    with pytest.raises(UserError, match="nowhere"):
        codec_training.train(codec_config(made, tmp_path / "c", tokenizer="nowhere"))
    with pytest.raises(ValidationError, match="sources"):
        codec_config(made, tmp_path / "d", sources=[])


# --- What a step sees -----------------------------------------------------------------------------


def utterances(lengths: list[float]) -> list[tokenizer_training.Utterance]:
    return [
        tokenizer_training.Utterance(np.ones((round(s * 100), 80), np.float16), "a", "v")
        for s in lengths
    ]


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.floats(0.1, 3.0), min_size=1, max_size=30),
    limit=st.floats(0.5, 20),
    seed=st.integers(0, 9),
)
def test_an_epoch_sees_every_utterance_once(lengths: list[float], limit: float, seed: int) -> None:
    found = utterances(lengths)
    batches = tokenizer_training.epoch_batches(found, limit, np.random.default_rng(seed))
    assert sorted(itertools.chain(*batches)) == list(range(len(found)))
    for batch in batches:
        padded = max(found[i].frames for i in batch) * len(batch) / FRAME_RATE
        assert padded <= limit or len(batch) == 1


def test_collating_pads_to_whole_frames_and_keeps_the_sound() -> None:
    pair = utterances([0.1, 0.25])
    batch = tokenizer_training.collate(pair, (), None, np.random.default_rng(0))
    assert batch.mel.shape == (2, 4 * 8, 80) and batch.frames.tolist() == [2, 4]  # four frames
    assert (batch.mel == 1).all(-1).sum(1).tolist() == [10, 25]
    assert batch.characters.classes.tolist() == [
        spell("a")
    ] * 2 and batch.characters.lengths.tolist() == [1, 1]


def test_phones_share_the_loss_where_they_are_known() -> None:
    config = tokenizer_training.TokenizerConfig.model_validate({**TINY_TOKENIZER, "dropout": 0.0})
    torch.manual_seed(0)
    trainee = tokenizer_training.Trainee(tokenizer_training.SpeechTokenizer(config), 0.25)
    mel = np.random.default_rng(0).standard_normal((320, 80)).astype(np.float16)
    known, unknown = (
        tokenizer_training.Utterance(mel, text, "v", tokenizer_training.phones(text))
        for text in ("the cat", "the qxzzt")
    )
    assert known.phones and not unknown.phones

    def losses(*chosen: tokenizer_training.Utterance) -> dict[str, float]:
        batch = tokenizer_training.collate(chosen, (), None, np.random.default_rng(0))
        found, _ = trainee(batch, torch.ones(len(chosen), dtype=torch.bool))
        return {name: loss.item() for name, loss in found.items()}

    alone, both = losses(known), losses(known, unknown)
    for found in (alone, both):
        heads = (found["phones_before"] + found["phones_after"]) / 2
        assert found["loss"] == pytest.approx(0.75 * found["characters"] + 0.25 * heads, rel=1e-5)
    assert both["phones_before"] == pytest.approx(alone["phones_before"], rel=1e-5)
    assert both["characters"] != pytest.approx(alone["characters"], rel=1e-3)
    assert set(losses(unknown)) == {"loss"}


def test_warping_moves_frequencies_and_leaves_the_tempo() -> None:
    time = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    power = tokenizer_training.mel_power(features(np.sin(2 * np.pi * 1000 * time)))
    moved = tokenizer_training._stretch(power, 1.0, 1.2)
    centers = tokenizer_training._centers()
    assert len(moved) == len(power)
    assert centers[power.mean(0).argmax()] == pytest.approx(1000, rel=0.04)
    assert centers[moved.mean(0).argmax()] == pytest.approx(1200, rel=0.04)


def features(pcm: np.ndarray) -> tokenizer_training.Mel:
    return tokenizer_training.log_mel(pcm.astype(np.float32))


def hiss(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(int(SAMPLE_RATE * seconds)) * 0.1


STILL = tokenizer_training.AugmentConfig(
    gain_db=(0, 0), noise_share=0.0, band_share=0.0, speed_share=0.0
)


def test_features_are_those_that_the_tokenizer_hears() -> None:
    pcm = hiss(0.4).astype(np.float32)
    heard = LogMel()(torch.from_numpy(pcm)[None, None])[0].numpy()
    assert np.abs(features(pcm)[: len(heard)] - heard).max() < 2e-3  # float16
    silence = features(np.zeros(480))
    assert silence == pytest.approx(tokenizer_training._SILENCE, abs=1e-3)


def test_undisturbed_features_come_back() -> None:
    mel = features(hiss(0.5))
    same = tokenizer_training.disturb(mel, (), STILL, np.random.default_rng(0))
    assert same.dtype == np.float32 and np.abs(same - mel).max() < 1e-3


def test_a_gain_on_features_is_that_of_the_sound() -> None:
    config = STILL.model_copy(update={"gain_db": (-12.0, -12.0)})
    quiet = tokenizer_training.disturb(features(hiss(0.5)), (), config, np.random.default_rng(0))
    assert np.abs(quiet - features(hiss(0.5) * 10 ** (-12 / 20))).max() < 5e-3


@pytest.mark.parametrize("recorded", [False, True])
def test_noise_has_its_ratio(recorded: bool) -> None:
    time = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    mel = features(0.1 * np.sin(2 * np.pi * 300 * time))
    noises = [tokenizer_training.mel_power(features(hiss(0.3)))] if recorded else []
    config = STILL.model_copy(update={"noise_share": 1.0, "noise_db": (10.0, 10.0)})
    for seed in range(4):
        noisy = tokenizer_training.disturb(mel, noises, config, np.random.default_rng(seed))
        clean, both = (tokenizer_training.mel_power(x) for x in (mel, noisy))
        assert noisy.shape == mel.shape
        assert 10 * np.log10(clean.mean() / (both - clean).mean()) == pytest.approx(10, abs=0.1)


def test_a_band_limit_silences_what_lies_above() -> None:
    config = STILL.model_copy(update={"band_share": 1.0, "band_hz": (4000.0, 4000.0)})
    mel = features(hiss(0.5))
    narrow = tokenizer_training.disturb(mel, (), config, np.random.default_rng(0))
    above = tokenizer_training._centers() > 4000
    assert 10 < above.sum() < 40
    assert narrow[:, above] == pytest.approx(tokenizer_training._SILENCE, abs=1e-3)
    assert np.abs(narrow[:, ~above] - mel[:, ~above]).max() < 1e-3


@pytest.mark.parametrize("speed", [0.8, 1.25])
def test_speed_moves_pitch_and_length_together(speed: float) -> None:
    config = STILL.model_copy(update={"speed_share": 1.0, "speed": (speed, speed)})
    time = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    pcm = 0.1 * np.sin(2 * np.pi * 1000 * time)
    moved = tokenizer_training.disturb(features(pcm), (), config, np.random.default_rng(0))
    truly = features(0.1 * np.sin(2 * np.pi * 1000 * speed * time))
    assert len(moved) == pytest.approx(len(features(pcm)) / speed, abs=1)
    assert abs(int(moved[20].argmax()) - int(truly[20].argmax())) <= 1


def test_silence_can_be_disturbed() -> None:
    config = tokenizer_training.AugmentConfig(noise_share=1.0, band_share=1.0, speed_share=1.0)
    silence = [tokenizer_training.mel_power(features(np.zeros(4800)))]
    for noise in ([], silence):
        mel = tokenizer_training.disturb(
            features(np.zeros(1000)), noise, config, np.random.default_rng(0)
        )
        assert np.isfinite(mel).all()


def test_crops_keep_their_weights_and_put_silence_around_short_sounds(
    made: Path, tmp_path: Path
) -> None:
    config = codec_config(made, tmp_path, batch=400, gain_db=(0.0, 0.0))
    size = config.crop_frames * FRAME_SIZE
    long, short = np.full(10 * size, 8192, np.int16), np.full(100, 16384, np.int16)
    crops = codec_training.draw_crops(
        [(3.0, [long]), (1.0, [short])], config, np.random.default_rng(0)
    )
    assert crops.shape == (400, 1, size) and crops.dtype == torch.float32
    assert set(crops.unique().tolist()) == {0.0, 0.25, 0.5}
    from_short = (crops == 0.5).sum(-1)[:, 0]
    assert set(from_short.unique().tolist()) == {0, 100}  # whole, wherever it lies
    assert 0.18 < float((from_short > 0).float().mean()) < 0.32
    filled = (crops == 0.25).float().mean(-1)[from_short == 0]
    assert 0.74 < float(filled.min()) < 1 and float(filled.max()) == 1


def test_the_same_step_sees_the_same_crops(made: Path, tmp_path: Path) -> None:
    config = codec_config(made, tmp_path)
    sources = [(1.0, codec_training.load_waveforms(made / "train"))]
    a, b, c = (
        codec_training.draw_crops(sources, config, np.random.default_rng((0, step)))
        for step in (4, 4, 5)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_masks_hide_some_of_the_features_and_no_more_than_they_say() -> None:
    config = tokenizer_training.AugmentConfig(time_masks=2, time_width=10, mel_masks=1, mel_width=8)
    hidden = []
    for seed in range(40):
        mel = torch.ones(1, 200, 80)
        tokenizer_training.mask_mel(mel, config, np.random.default_rng(seed))
        lost = mel[0] == 0
        hidden.append(float(lost.float().mean()))
        assert int(lost.all(1).sum()) <= 20 and int(lost.all(0).sum()) <= 8
    assert min(hidden) < 0.05 < max(hidden)


def test_the_bottleneck_warms_up(made: Path, tmp_path: Path) -> None:
    config = tokenizer_config(
        made, tmp_path, run={"steps": 100}, quantize_from=0.2, quantize_full=0.4
    )
    shares = [tokenizer_training._share(config, step) for step in range(100)]
    assert shares[:21] == [0.0] * 21 and shares[40:] == [1.0] * 60
    assert shares[30] == pytest.approx(0.5) and shares == sorted(shares)
