"""A run of seconds: it learns, it resumes to the same numbers, its checkpoint loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kills import Killed
from lm_runs import config_of, make_data, numbers

from audio_codec import checkpoint
from audio_codec.errors import UserError
from audio_codec.spectral import SpectralCodec, SpectralConfig
from speechlm import convert
from speechlm.config import load_config
from speechlm.model import Batch
from speechlm.sources import shares_of
from speechlm.streams import ABSENT, Streams
from speechlm.training.lm import (
    SPAN,
    TrainConfig,
    mask_heard,
    mask_user,
    mask_user_spans,
    resolve_shape,
    thin_audio,
    train,
)
from speechlm.training.run import Average
from synth_data.mixture import Shares


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a codec and shards of its codes."""
    return make_data(tmp_path_factory.mktemp("lm"))


def test_only_what_can_be_heard_is_hidden() -> None:
    streams = Streams(text_size=20, codebooks=((5,), (5,)))
    inputs = torch.ones(2, streams.count, 50, dtype=torch.long)
    inputs[1, streams.user] = ABSENT
    batch = Batch(inputs, inputs, torch.ones(inputs.shape), None)
    masked = mask_heard(batch, streams, 0.5, np.random.default_rng(0)).inputs
    share = (masked[0, streams.heard_index] == ABSENT).float().mean()
    assert 0.2 < share < 0.8
    assert torch.equal(masked[1], inputs[1]) and torch.equal(masked[:, :5], inputs[:, :5])
    assert (inputs[0] == 1).all()


def test_whole_rows_lose_the_users_acoustic_codes_alone() -> None:
    streams = Streams(text_size=20, codebooks=((5,), (5,), (5,)))
    inputs = torch.ones(40, streams.count, 7, dtype=torch.long)
    batch = Batch(inputs, inputs, torch.ones(inputs.shape), None)
    masked = mask_user(batch, streams, 0.5, np.random.default_rng(0)).inputs
    lost = masked == ABSENT
    rows = lost.any(2).any(1)
    assert 10 < int(rows.sum()) < 30
    expected = torch.zeros_like(lost)
    expected[rows, streams.user.start + 1 : streams.user.stop] = True
    assert torch.equal(lost, expected) and (inputs == 1).all()
    assert mask_user(batch, streams, 0.0, np.random.default_rng(0)) is batch


def test_stretches_of_the_users_frames_are_hidden() -> None:
    streams = Streams(text_size=20, codebooks=((5,), (5,)))
    inputs = torch.ones(40, streams.count, 500, dtype=torch.long)
    batch = Batch(inputs, inputs, torch.ones(inputs.shape), None)
    masked = mask_user_spans(batch, streams, 0.1, np.random.default_rng(0)).inputs
    lost = masked == ABSENT
    frames = lost[:, streams.user.start]
    assert 0.08 < frames.float().mean() < 0.11
    assert torch.equal(lost[:, streams.user], frames[:, None].expand_as(lost[:, streams.user]))
    assert int(lost.sum()) == int(lost[:, streams.user].sum())
    # A stretch is as long as any but where two meet.
    stretches = [
        len(run) for run in "".join("01"[int(x)] for x in frames.flatten()).split("0") if run
    ]
    share = [stretches.count(n) / len(stretches) for n in range(1, SPAN + 1)]
    assert min(share) > 0.15 and sum(share) > 0.85
    assert (inputs == 1).all()
    assert mask_user_spans(batch, streams, 0.0, np.random.default_rng(0)) is batch


def test_the_codes_of_a_random_share_of_the_columns_are_learned() -> None:
    streams = Streams(text_size=20, codebooks=((5,), (5,)))
    inputs = torch.ones(8, streams.count, 500, dtype=torch.long)
    batch = Batch(inputs, inputs, torch.ones(inputs.shape), None)
    weights = thin_audio(batch, streams, 0.25, np.random.default_rng(0)).weights
    codes = slice(streams.own.start, streams.user.stop)
    kept = weights[:, streams.own.start] > 0
    assert 0.22 < kept.float().mean() < 0.28
    assert torch.equal(weights[:, codes] > 0, kept[:, None].expand_as(weights[:, codes]))
    assert (weights[:, streams.text_index] == 1).all() and (batch.weights == 1).all()
    assert thin_audio(batch, streams, 1.0, np.random.default_rng(0)) is batch


def test_a_mixture_of_too_little_that_people_made_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sources: recorded_speech is 0.0%, and guard"):
        train(config_of(made, tmp_path / "run", guard={"recorded_speech": 0.1}))
    assert not (tmp_path / "run").exists()
    sentences = {"kind": "sentences", "path": tmp_path / "none.txt", "rows": 1}
    mixture = [*config_of(made, tmp_path / "run").sources]
    mixture += config_of(made, tmp_path / "run", sources=[sentences]).sources
    # By rows: four of dialogues and two of the quiz were made, one of sentences people wrote.
    assert shares_of(mixture) == Shares(recorded_speech=0.0, human_text=1 / 7)
    mixture[-1] = mixture[-1].model_copy(update={"human": False})
    assert shares_of(mixture).human_text == 0


def test_it_learns_and_resumes_to_the_same_numbers(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A line of the log is of three steps, and the checkpoint lies between two lines.
    changes: dict[str, Any] = {"ema": 0.9, "run": {"log_every": 3}}
    whole = train(config_of(made, tmp_path / "whole", **changes))
    logged = numbers(tmp_path / "whole")
    losses = [line["dialogues/text"] for line in logged if "dialogues/text" in line]
    assert losses[-1] < losses[0]
    assert any("validation/dialogues/text_accuracy" in line for line in logged)

    # The same run, killed in step 7: two steps after the checkpoint at 4.
    update = Average.update

    def dies(self: Average, model: torch.nn.Module, step: int) -> None:
        if step == 7:
            raise Killed
        update(self, model, step)

    monkeypatch.setattr(Average, "update", dies)
    with pytest.raises(Killed):
        train(config_of(made, tmp_path / "parts", **changes))
    monkeypatch.setattr(Average, "update", update)
    parts = train(config_of(made, tmp_path / "parts", **changes), resume=True)
    assert numbers(tmp_path / "parts") == logged
    one, other = checkpoint.load(whole), checkpoint.load(parts)
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def test_a_shape_that_could_not_talk_is_refused(made: Path, tmp_path: Path) -> None:
    temporal = {"dim": 16, "layers": 2, "heads": 2}

    def shaped(**more: object) -> TrainConfig:
        depth = {"dim": 16, "layers": 1, "heads": 2}
        return config_of(made, tmp_path, model={"temporal": {**temporal, **more}, "depth": depth})

    for more, wrong in (
        ({"window": None}, r"temporal\.window is null"),
        ({"causal": False}, "temporal must be causal"),
        ({"block": 2}, "temporal must be causal and have block=1"),
        ({"memory": 8}, r"temporal\.memory is 8"),
    ):
        with pytest.raises(ValueError, match=wrong):
            shaped(**more)
    resolved = resolve_shape(shaped())
    assert resolved.model.temporal.window == 750  # named in part, the rest is the usual
    assert "window" not in resolved.model.temporal.model_fields_set


def test_a_stage_starts_from_the_one_before_and_talks(made: Path, tmp_path: Path) -> None:
    one_step = {"steps": 1, "save_every": 1, "eval_every": 1}
    first = train(
        config_of(
            made,
            tmp_path / "text",
            run={"dir": tmp_path / "text", **one_step},
            sources=[{"kind": "quiz", "rows": 1, "turns": 1}],
            validation=[],
            dtype="fp32",
        )
    )
    second = train(
        config_of(
            made,
            tmp_path / "duplex",
            run={"dir": tmp_path / "duplex", **one_step},
            init_from=str(first),
            optimizer={"lr": 0.0},
            dtype="fp32",
            ema=0.0,
        )
    )
    before, after = checkpoint.load(first), checkpoint.load(second)
    assert all(torch.equal(before.tensors[n], after.tensors[n]) for n in before.tensors)
    assert (first / "text.model").read_bytes() == (second / "text.model").read_bytes()
    assert json.loads((second / "card.json").read_text())["init_from"] == str(first)
    duplex = convert.load(second)
    assert duplex.step(torch.zeros(1, 1, 1920), duplex.new_state(1)).pcm.shape == (1, 1, 1920)


def test_a_codec_of_other_codes_is_refused(made: Path, tmp_path: Path) -> None:
    config = config_of(made, tmp_path / "run")
    first = train(config.model_copy(update={"run": config.run.model_copy(update={"steps": 1})}))
    other = SpectralConfig.model_validate(
        {**checkpoint.load(made / "codec").config, "codebooks": (8, 8)}
    )
    checkpoint.save(tmp_path / "codec", other, SpectralCodec(other).state_dict())
    with pytest.raises(UserError, match="codebooks"):
        train(
            config_of(made, tmp_path / "next", codec=str(tmp_path / "codec"), init_from=str(first))
        )


@pytest.mark.parametrize("name", ["shipped", "tiny"])
def test_recipes_are_valid(root: Path, name: str) -> None:
    config = load_config(root / "configs" / "lm" / f"{name}.yaml", [], TrainConfig)
    assert config.run.steps > 0 and config.sources
