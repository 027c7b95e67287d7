"""A causal language model of Hugging Face becomes the temporal transformer, and says the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf import FAMILIES, write
from torch import nn

from audio_codec.errors import UserError
from audio_codec.transformer import TransformerConfig
from speechlm import convert
from speechlm.generate import new_state, step
from speechlm.model import LMConfig, SpeechLM
from speechlm.streams import ABSENT, BOS, EOS, Streams
from speechlm.text_tokenizer import SPECIAL, HFTokenizer, load_text_tokenizer


def exact(model: Any) -> Any:
    """The model in float64 throughout: `transformers` takes norms and angles in float32."""

    class Norm(nn.Module):
        def __init__(self, of: Any) -> None:
            super().__init__()
            self.weight, self.eps = of.weight, of.variance_epsilon

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    class Rotary(nn.Module):
        def __init__(self, of: Any) -> None:
            super().__init__()
            turns = of.config.rope_parameters["rope_theta"] ** -(
                torch.arange(0, 2 * len(of.inv_freq), 2).double() / (2 * len(of.inv_freq))
            )
            same = of.config.rope_parameters["rope_type"] == "default"
            self.turns = turns if same else of.inv_freq.double()

        def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
            angle = position_ids[..., None] * self.turns
            angle = torch.cat((angle, angle), dim=-1)
            return angle.cos(), angle.sin()

    model.model.rotary_emb = Rotary(model.model.rotary_emb)
    model = model.double()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, Norm(child))
    return model


def start(path: Path, window: int = 20) -> SpeechLM:
    tokenizer = load_text_tokenizer(path)
    config = LMConfig(
        streams=Streams(text_size=tokenizer.size, codebooks=((3, 2), (5,))),
        temporal=convert.hf_transformer(path, window),
        depth=TransformerConfig(dim=16, layers=1, heads=2),
        codec="none",
    )
    model = SpeechLM(config)
    convert.fill_from_hf(model, path)
    return model.eval()


def text_columns(model: SpeechLM, ids: torch.Tensor) -> torch.Tensor:
    columns = torch.full((len(ids), model.streams.count, ids.shape[1]), ABSENT)
    columns[:, model.streams.text_index] = ids + SPECIAL
    return columns


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_on_text_are_those_of_the_model_before_training(family: str, tmp_path: Path) -> None:
    theirs = write(tmp_path, family)
    model = start(tmp_path).double()
    pieces = model.streams.text_size - SPECIAL
    ids = torch.randint(pieces, (2, 18))
    columns = text_columns(model, ids)
    with torch.no_grad():
        public = exact(theirs)(ids, attention_mask=torch.ones_like(ids)).logits[..., :pieces]
        hidden = model(columns)
        assert torch.allclose(model.text_head(hidden)[..., SPECIAL:], public, rtol=0, atol=1e-9)
        assert model.heard_head is not None
        assert torch.allclose(model.heard_head(hidden)[..., SPECIAL:], public, rtol=0, atol=1e-9)
        state = model.new_state(2)
        streamed = [model(columns[:, :, t : t + 1], state) for t in range(18)]
    assert torch.allclose(torch.cat(streamed, dim=1), hidden, rtol=0, atol=1e-9)


def test_new_pieces_begin_as_average_ones(tmp_path: Path) -> None:
    theirs = write(tmp_path, "qwen3")
    model = start(tmp_path)
    embedding = theirs.model.embed_tokens.weight
    assert torch.equal(model.text.weight[BOS], embedding[1])
    assert torch.equal(model.text_head.weight[EOS], theirs.lm_head.weight[2])
    assert torch.allclose(model.text_head.weight[4], theirs.lm_head.weight.mean(0), atol=1e-6)
    assert model.text.weight[model.text.absent_row].abs().max() == 0
    assert model.codes.weight[model.codes.absent_row].abs().max() == 0
    ratio = model.codes.weight.detach().std() / embedding.detach().std()
    assert 0.9 < float(ratio) < 1.1


def test_it_converses_and_its_checkpoint_loads(tmp_path: Path) -> None:
    write(tmp_path / "hf", "llama-3")
    model = start(tmp_path / "hf", window=4)
    state = new_state(model, 1)
    drawn = [step(model, torch.zeros(1, 2, dtype=torch.long), state) for _ in range(9)]
    assert bool(drawn[-1].ready.all())
    tokenizer = load_text_tokenizer(tmp_path / "hf")
    saved = convert.save(tmp_path / "lm", model, tokenizer, dtype="fp32", bundle=False)
    again, same = convert.load_lm(saved)
    assert isinstance(same, HFTokenizer) and same.model == tokenizer.model
    assert again.config == model.config
    weights = zip(again.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)
    assert not convert.names_hf(saved) and convert.names_hf(tmp_path / "hf")


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; choices: 'silu'"),
        ("llama", {"attention_bias": True}, "attention_bias is True"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type is 'dynamic'; choices: 'default', 'linear', 'llama3'",
        ),
        (
            "qwen2",
            {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4},
            "its layers differ in attention",
        ),
    ],
)
def test_a_model_of_another_make_is_refused(
    family: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    write(tmp_path, family, **changes)
    with pytest.raises(UserError, match=said):
        convert.hf_transformer(tmp_path, 20)


def test_a_model_of_another_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match="model_type is 'gpt2'; choices: 'llama'"):
        convert.hf_transformer(tmp_path, 20)


def test_too_many_pieces_are_named(tmp_path: Path) -> None:
    write(tmp_path, "llama", padding=-5)
    with pytest.raises(UserError, match="vocabulary of .* tokenizer.json has .* ids"):
        start(tmp_path)


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    write(tmp_path, "qwen3")
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_type"] = "llama"  # says nothing of norms in attention
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="k_norm.weight' has no place"):
        start(tmp_path)
