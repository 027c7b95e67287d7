"""The peer is the same model; the numbers are there."""

from __future__ import annotations

import json
from pathlib import Path

import lm_runs
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from audio_codec.errors import UserError
from audio_codec.transformer import TransformerConfig
from speechlm import bench
from speechlm.cli import app
from speechlm.data import Packer
from speechlm.model import LMConfig, LossConfig, SpeechLM
from speechlm.streams import Streams
from speechlm.training import lm

LENGTH = 150
CONFIG = LMConfig(
    streams=Streams(text_size=40, codebooks=((3, 2), (9,), (9,))),
    temporal=TransformerConfig(dim=16, layers=2, heads=2, kv_heads=1, window=150),
    depth=TransformerConfig(dim=16, layers=2, heads=2, hidden=24),
    codec="none",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lm_runs.make_data(tmp_path_factory.mktemp("bench"))


def halves(weight: Tensor, head: int) -> Tensor:
    """Rows of a projection for positions that turn halves, from ones that turn neighbours."""
    return weight.unflatten(0, (-1, head // 2, 2)).transpose(1, 2).flatten(0, 2)


def copy_blocks(ours: nn.Module, theirs: nn.Module, config: TransformerConfig, rope: bool) -> None:
    head = config.dim // config.heads
    kv = (config.kv_heads or config.heads) * head
    for block, layer in zip(ours.blocks, theirs, strict=True):
        q, k, v = block.attention.qkv.weight.split((config.dim, kv, kv))
        if rope:
            q, k = halves(q, head), halves(k, head)
        attention = layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        for module, weight in zip(projections, (q, k, v, block.attention.out.weight), strict=True):
            module.linear.weight.copy_(weight)
        layer.mlp.fc1.weight.copy_(block.mlp.up.weight)
        layer.mlp.fc2.weight.copy_(block.mlp.down.weight)


@torch.no_grad()
def same(ours: SpeechLM, gathered: bool) -> bench.MoshiPeer:
    peer = bench.MoshiPeer(ours.config, LENGTH, gathered)
    copy_blocks(ours.temporal, peer.body.layers, CONFIG.temporal, rope=True)
    copy_blocks(ours.depth.transformer, peer.layers, CONFIG.depth, rope=False)
    peer.load_state_dict(ours.state_dict(), strict=False)
    return peer


@pytest.mark.parametrize("frames", [LENGTH, 40])  # one document a row, or several
@pytest.mark.parametrize("gathered", [False, True])
def test_the_peer_has_our_loss_gradients_and_size(gathered: bool, frames: int) -> None:
    ours = SpeechLM(CONFIG)
    peer = same(ours, gathered)
    batch = Packer(bench.Talks(CONFIG.streams, frames), CONFIG.streams, 2, LENGTH).next()
    assert (batch.segments is None) == (frames == LENGTH)
    assert 0.3 < float((batch.weights[:, CONFIG.streams.own] > 0).any(1).float().mean()) < 0.9
    expected = ours.loss(batch, LossConfig()).total
    found = peer.objective(batch, LossConfig())
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    expected.backward()
    found.backward()
    shared = dict(ours.named_parameters())
    compared = 0
    for name, parameter in peer.named_parameters():
        if name in shared:
            grad, other = parameter.grad, shared[name].grad
            assert grad is not None and other is not None
            assert torch.allclose(grad, other, rtol=1e-3, atol=1e-6), name
            compared += 1
    assert compared >= 10
    size = sum(p.numel() for p in peer.parameters())
    assert size == pytest.approx(sum(p.numel() for p in ours.parameters()), rel=0.02)


def test_all_the_numbers_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "tune_allocator", lambda: None)
    found = bench.measure(CONFIG, ["transformers"], rows=1, length=40, steps=2)
    assert {
        "train_speedup",
        "train_speedup_gathered",
        "loader_busy",
        "mfu",
        "tokens_per_second",
        "tokens_per_second_transformers",
    } <= found.keys()
    assert abs((found["parameters_ratio"].value or 0) - 1) < 0.02
    assert all((metric.value or 0) > 0 for name, metric in found.items() if name != "mfu")
    mfu = found["mfu"]
    assert torch.cuda.is_available() or (mfu.value is None and "no maker" in (mfu.reason or ""))
    alone = bench.measure(CONFIG, rows=1, length=40, steps=1, precision="no")
    assert "train_speedup" not in alone and alone["precision"].value == 32
    with pytest.raises(UserError, match="peer 'nanogpt' is unknown; choices: transformers"):
        bench.measure(CONFIG, ["nanogpt"])
    with pytest.raises(UserError, match="precision 'fp8' is unknown; choices: auto, bf16, no"):
        bench.measure(CONFIG, precision="fp8")
    with pytest.raises(UserError, match=r"length is 151, .* at most temporal\.window, 150"):
        bench.measure(CONFIG, ["transformers"], length=151)


def test_the_command_takes_another_shape(tmp_path: Path) -> None:
    small = ["temporal.dim=16", "temporal.layers=1", "temporal.heads=2", "temporal.hidden=24"]
    small += ["depth.dim=16", "depth.layers=1", "depth.heads=2", "depth.hidden=24"]
    sizes = ["--rows", "1", "--length", "60", "--steps", "2", "--json", str(tmp_path / "m.json")]
    done = CliRunner().invoke(app, ["bench", "train", *sizes, *small])
    assert done.exit_code == 0, done.output
    measured = json.loads((tmp_path / "m.json").read_text())["metrics"]
    assert measured["parameters"]["value"] < 600_000 and measured["mfu"]["n"] == 2
    wrong = CliRunner().invoke(app, ["bench", "train", "temporal.dims=16"])
    assert wrong.exit_code != 0 and "did you mean 'dim'" in str(wrong.exception)


def test_it_may_train_on_what_a_recipe_trains_on(made: Path, tmp_path: Path) -> None:
    recipe = {
        "run": {"dir": str(tmp_path / "run"), "steps": 1},
        "codec": str(made / "codec"),
        "length": 60,
        "sources": [
            {"kind": "dialogues", "path": str(made / "shards"), "rows": 2},
            {"kind": "quiz", "rows": 1, "turns": 2},
        ],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    trained = lm_runs.config_of(made, tmp_path / "lm", run={"steps": 1}, validation=[])
    lm.train(trained.model_copy(update={"length": 60}))
    options = ["--model", str(tmp_path / "lm" / "lm"), "--recipe", str(tmp_path / "recipe.yaml")]
    options += ["--steps", "2", "--json", str(tmp_path / "m.json"), "sources.0.rows=3"]
    done = CliRunner().invoke(app, ["bench", "train", *options])
    assert done.exit_code == 0, done.output
    measured = json.loads((tmp_path / "m.json").read_text())["metrics"]
    assert 0 < measured["learned_frames"]["value"] < 0.75  # a row of four is text
    assert 0 < measured["loader_busy"]["value"] <= 1
