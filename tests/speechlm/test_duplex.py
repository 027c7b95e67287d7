"""The whole model as one streaming module, and its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small import small_duplex

from audio_codec import checkpoint
from audio_codec.errors import UserError
from audio_codec.spectral import SpectralCodec
from speechlm import convert
from speechlm.duplex import Duplex, DuplexState
from speechlm.generate import generate
from speechlm.model import SpeechLM
from speechlm.streams import PAD
from speechlm.text_tokenizer import TextTokenizer, train_text_tokenizer


@pytest.fixture(scope="module")
def duplex() -> Duplex:
    return small_duplex()


@pytest.fixture(scope="module")
def tokenizer(duplex: Duplex) -> TextTokenizer:
    return duplex.tokenizer


def sound(batch: int, ticks: int) -> torch.Tensor:
    return 0.1 * torch.randn(batch, 1, ticks * 1920)


def run(duplex: Duplex, pcm: torch.Tensor, state: DuplexState) -> tuple[torch.Tensor, torch.Tensor]:
    """Sound [B, 1, S] and text [B, T] of all ticks."""
    outputs = [duplex.step(chunk, state) for chunk in pcm.split(1920, dim=2)]
    return torch.cat([o.pcm for o in outputs], 2), torch.stack([o.text for o in outputs], 1)


def test_equals_its_parts_run_one_after_the_other(duplex: Duplex) -> None:
    pcm = sound(2, 10)
    state = duplex.new_state(2)
    for slot, seed in enumerate((3, 4)):
        duplex.configure(state, slot, seed=seed)
    voice, text = run(duplex, pcm, state)
    with torch.inference_mode():
        codes = duplex.codec.encode(pcm)
        drawn = generate(duplex.model, codes, torch.tensor([3, 4]))
        expected = duplex.codec.decode(drawn.codes)
    assert torch.equal(text, drawn.text)
    assert voice[:, :, :1920].abs().max() == 0
    assert torch.allclose(voice[:, :, 1920:], expected, atol=1e-4)


def test_a_snapshot_goes_on_identically_in_another_slot(duplex: Duplex) -> None:
    pcm = sound(1, 16)
    straight = duplex.new_state(1)
    duplex.configure(straight, 0, seed=11, text_temperature=1.2, audio_topk=5)
    expected, words = run(duplex, pcm, straight)

    state = duplex.new_state(2)
    duplex.configure(state, 1, seed=11, text_temperature=1.2, audio_topk=5)
    both = torch.cat((sound(1, 9), pcm[:, :, : 9 * 1920]), dim=0)
    run(duplex, both, state)
    session = state.extract(1)
    assert isinstance(session, DuplexState)
    other = duplex.new_state(3)
    run(duplex, sound(3, 4), other)
    other.insert(2, session)
    rest = torch.cat((sound(2, 7), pcm[:, :, 9 * 1920 :]), dim=0)
    voice, text = run(duplex, rest, other)
    assert torch.allclose(voice[2:], expected[:, :, 9 * 1920 :], atol=1e-5)
    assert torch.equal(text[2:], words[:, 9:])


def test_reset_forgets_one_conversation_and_its_settings(duplex: Duplex) -> None:
    pcm = sound(2, 6)
    fresh, _ = run(duplex, pcm, duplex.new_state(2))
    state = duplex.new_state(2)
    duplex.configure(state, 0, seed=5, audio_temperature=0)
    run(duplex, sound(2, 8), state)
    state.reset([0])
    voice, _ = run(duplex, pcm, state)
    assert torch.allclose(voice[0], fresh[0], atol=1e-5)
    assert not torch.allclose(voice[1], fresh[1], atol=1e-5)


def test_a_frozen_slot_is_silent_and_unchanged(duplex: Duplex) -> None:
    pcm = sound(2, 10)
    expected, _ = run(duplex, pcm, duplex.new_state(2))
    state = duplex.new_state(2)
    run(duplex, pcm[:, :, : 5 * 1920], state)
    state.active[0] = False
    paused, text = run(duplex, sound(2, 3), state)
    assert paused[0].abs().max() == 0 and (text[0] == PAD).all()
    assert state.active.tolist() == [False, True]
    state.active[0] = True
    voice, _ = run(duplex, pcm[:, :, 5 * 1920 :], state)
    assert torch.allclose(voice[0], expected[0, :, 5 * 1920 :], atol=1e-5)


def test_greedy_needs_no_seed(duplex: Duplex) -> None:
    pcm = sound(1, 8).expand(2, -1, -1)
    state = duplex.new_state(2)
    for slot in range(2):
        duplex.configure(state, slot, seed=slot, text_temperature=0, audio_temperature=0)
    voice, text = run(duplex, pcm, state)
    assert torch.equal(text[0], text[1]) and torch.allclose(voice[0], voice[1], atol=1e-5)
    duplex.configure(state, 0, text_temperature=0.9, audio_temperature=0.9)
    warm, _ = run(duplex, pcm, state)
    assert not torch.allclose(warm[0], warm[1], atol=1e-5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"text_temperature": 11.0}, "text_temperature is 11.0"),
        ({"audio_temperature": float("nan")}, "audio_temperature is nan"),
        ({"audio_topk": -2}, "audio_topk is -2"),
    ],
)
def test_settings_out_of_range_are_named(
    duplex: Duplex, setting: dict[str, float], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        duplex.configure(duplex.new_state(1), 0, **setting)  # type: ignore[arg-type]


def test_parts_of_different_models_are_refused(duplex: Duplex) -> None:
    other = train_text_tokenizer(["some quite different words entirely"] * 3, 90)
    assert other.size != duplex.tokenizer.size
    with pytest.raises(UserError, match="text.model"):
        Duplex(duplex.codec, duplex.model, other)


def test_pieces(duplex: Duplex) -> None:
    ids = duplex.tokenizer.encode("two four")
    assert "".join(duplex.piece(i) for i in ids) == " two four"
    assert duplex.piece(PAD) == ""


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_a_checkpoint_talks_like_what_was_saved(
    duplex: Duplex, tmp_path: Path, dtype: checkpoint.StoredType
) -> None:
    assert isinstance(duplex.codec, SpectralCodec)
    source = tmp_path / "source"
    checkpoint.save(source, duplex.codec.config, duplex.codec.state_dict(), dtype="fp32")
    model = SpeechLM(duplex.model.config.model_copy(update={"codec": str(source)}))
    model.load_state_dict(duplex.model.state_dict())
    where = convert.save(tmp_path / "lm", model, duplex.tokenizer, dtype=dtype, card={"steps": 1})
    assert json.loads((where / "card.json").read_text()) == {"steps": 1}
    assert json.loads((where / "config.json").read_text())["codec"] == "codec"
    loaded = convert.load(where)
    pcm = sound(1, 4)
    expected, _ = run(duplex, pcm, duplex.new_state(1))
    voice, _ = run(loaded, pcm, loaded.new_state(1))
    assert voice.shape == expected.shape
    if dtype == "fp32":
        assert torch.allclose(voice, expected, atol=1e-5)


def test_a_checkpoint_without_text_pieces_is_named(duplex: Duplex, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "lm", duplex.model.config, duplex.model.state_dict())
    with pytest.raises(UserError, match=r"has no text\.model"):
        convert.load(tmp_path / "lm")
    with pytest.raises(UserError, match="nowhere"):
        convert.load("nowhere")
