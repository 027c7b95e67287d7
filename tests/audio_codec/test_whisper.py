"""Whisper's parts equal the public ones, and public checkpoints give the public tokens.

`golden_whisper_vq.json` holds what the public code of GLM-4-Voice's tokenizer made of small random
weights: config, names and shapes of the tensors, the seed they were drawn from, tokens, and some of
the numbers that were quantized.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from safetensors.torch import save_file
from streams import Streaming, Tick, assert_streams, chunkings, scripts, streaming_settings
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperModel

from audio_codec import checkpoint as checkpoints
from audio_codec.audio import LogMel, resample
from audio_codec.errors import UserError
from audio_codec.speech_tokenizer import (
    SpeechTokenizer,
    TokenizerConfig,
    initialize,
    load_tokenizer,
)
from audio_codec.whisper import (
    _LOG_MEL_TO_PUBLIC,
    DecoderConfig,
    PublicMel,
    StemConfig,
    TextDecoder,
    sinusoids,
)

GOLDEN = json.loads((Path(__file__).parent / "golden_whisper_vq.json").read_text())


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- GLM-4-Voice ----------------------------------------------------------------------------------


def weights(case: dict[str, Any], rng: np.random.Generator) -> dict[str, Tensor]:
    """Drawn in the order of their names, as large as makes the tokens differ."""
    drawn = {}
    for name, shape in case["tensors"].items():
        x = rng.standard_normal(shape)
        if "layer_norm" in name:
            x = name.endswith("weight") + 0.1 * x
        elif "codebook" in name:
            x = 6.0 * x / np.linalg.norm(x, axis=1, keepdims=True)
        elif "embed_positions" in name:
            x = 2.0 * x
        elif "ema_count" in name:
            x = np.abs(x) + 0.5
        else:
            large = 4.0 if "conv" in name else 1.5
            x = x * (large * np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1)
        drawn[name] = torch.tensor(x, dtype=torch.float32)
    return drawn


def save_public(folder: Path, case: dict[str, Any], prefix: str = "") -> np.random.Generator:
    """A checkpoint directory as published; what is drawn next is the sound."""
    rng = np.random.default_rng(case["seed"])
    tensors = {prefix + name: tensor for name, tensor in weights(case, rng).items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(case["config"]))
    save_file(tensors, folder / "model.safetensors")
    return rng


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("prefix", ["", "model.encoder."])
def test_the_public_tokens_come_out(name: str, prefix: str, tmp_path: Path) -> None:
    case = GOLDEN[name]
    rng = save_public(tmp_path / "public", case, prefix)
    model = load_tokenizer(tmp_path / "public")
    assert model.sample_rate == 16_000 and model.bottleneck == "vq"
    assert model.codebook == (case["config"]["quantize_vocab_size"],)
    if name == "published":  # sound, longer than the 30 s that are heard at once
        time = np.arange(390 * 1280)
        pcm = (0.1 * rng.standard_normal(len(time)) * np.sin(time / 3000) ** 2).astype(np.float32)
        heard = torch.from_numpy(pcm)[None, None]
        assert (model.rate, model.lookahead_ms, model.frame_size) == (12.5, 3920, 64_000)
        codes = model.encode(heard)
        cut = heard.split(30 * 16_000, -1)
        numbers = torch.cat([model.features(model.mel(piece)) for piece in cut], 1)
    else:
        mel = torch.tensor(rng.standard_normal((1, 128, 8)), dtype=torch.float32)
        numbers = model.features(mel)
        codes = model.discretize(numbers)
    assert codes[0].tolist() == case["tokens"]
    some = numbers[0, :: max(1, len(case["tokens"]) // 8)]
    expected = torch.tensor(case["numbers"])
    torch.testing.assert_close(some, expected, rtol=1e-4, atol=2e-3)
    assert torch.equal(model.embed(codes), model.quantizer.codebook[codes])


@pytest.mark.parametrize("name", ["max", "causal"])
@streaming_settings
@given(chunks=chunkings(9), script=scripts(6))
def test_public_weights_stream_from_the_features(
    name: str, chunks: list[int], script: list[Tick], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("public") / name
    save_public(folder, GOLDEN[name])
    model, generator = load_tokenizer(folder).double(), torch.Generator().manual_seed(8)
    mels = model.frame_size // 160
    module = Streaming(  # eighteen strides are 144 positions or 72; the table holds 64
        model.features,
        lambda batch, most: model.new_state(batch, 2 * most),
        lambda n: torch.randn(1, n * 2 * mels, 8, generator=generator, dtype=torch.float64),
    )
    assert_streams(module, chunks, script)


def test_a_stream_hears_other_features_on_the_same_scale(tmp_path: Path) -> None:
    case = json.loads(json.dumps(GOLDEN["published"]))
    save_public(tmp_path / "public", case)
    model = load_tokenizer(tmp_path / "public", streaming=True)
    assert (model.sample_rate, model.frame_size) == (24_000, 96_000)
    sound = 0.1 * noise(1, 1, 4 * 96_000).numpy() * np.sin(np.arange(4 * 96_000) / 5000)
    pcm = torch.tensor(sound, dtype=torch.float32)
    codes, state = model.encode(pcm), model.new_state(1)
    parts = [model.encode(part, state) for part in pcm.split(96_000, -1)]
    assert torch.equal(torch.cat(parts, 1), codes) and codes.shape == (1, 200)
    public = load_tokenizer(tmp_path / "public")
    lower = torch.from_numpy(resample(pcm[0].numpy(), 24_000, 16_000))[None]
    with pytest.raises(AssertionError, match="stream `features`"):
        public.encode(lower, public.new_state(1))
    # Not the public tokens, but far from chance: most are the same.
    assert float((public.encode(lower) == codes).float().mean()) > 0.5


@pytest.mark.parametrize("mels", [80, 128])
def test_log_mel_becomes_whispers_features(mels: int) -> None:
    pcm = 0.1 * noise(1, 1, 48_000)
    ours = LogMel(n_mels=mels)(pcm)[0]
    scale, shift = _LOG_MEL_TO_PUBLIC
    lower = torch.from_numpy(resample(pcm[0].numpy(), 24_000, 16_000))[None]
    theirs = PublicMel(mels)(lower)[0]
    assert ours.shape == theirs.shape == (200, mels)
    # One unit is four decades of power: 0.03 is about one decibel.
    gap = (ours * scale + shift - theirs)[5:-5].mean(0)[:-3]
    assert float(gap.abs().mean()) < 0.03 and float(gap.abs().max()) < 0.2


# --- Whisper --------------------------------------------------------------------------------------

SHAPE: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 40,
    "vocab_size": 30,
    "num_mel_bins": 80,
    "max_source_positions": 20,
    "max_target_positions": 12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}

OURS = TokenizerConfig(
    dim=16,
    heads=2,
    hidden=24,
    layers_before=2,
    layers_after=1,
    window_seconds=0.4,
    whisper=StemConfig(positions=20),
    rate=50,
    bottleneck="vq",
    codes=8,
    code_dim=None,
    decoder=DecoderConfig(layers=2, heads=4, hidden=40, vocabulary=30, positions=12),
)


def save_whisper(folder: Path, kind: Any = WhisperForConditionalGeneration) -> Any:
    torch.manual_seed(4)
    theirs = kind(WhisperConfig(**SHAPE)).eval()
    for parameter in theirs.parameters():
        if parameter.dim() > 1:  # larger than the usual start, so that every layer matters
            torch.nn.init.normal_(parameter, std=0.3)
        else:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("kind", [WhisperModel, WhisperForConditionalGeneration])
@torch.no_grad()
def test_a_public_whisper_moves_in(kind: Any, tmp_path: Path) -> None:
    theirs = save_whisper(tmp_path / "w", kind)
    whole = OURS.model_copy(
        update={
            "causal": False,
            "whisper": StemConfig(positions=20, causal=False, public_features=True),
        }
    )
    ours = SpeechTokenizer(whole).eval()
    initialize(ours, checkpoints.load(tmp_path / "w"))
    ours.after_positions.zero_()  # Whisper has no bottleneck after which to say them again
    mel, pieces = noise(2, 40, 80), torch.tensor([[1, 5, 9, 3], [1, 7, 7, 20]])
    said = theirs(input_features=mel.transpose(1, 2), decoder_input_ids=pieces)
    last = ours.read(ours.features(mel))
    expected = said.encoder_last_hidden_state
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-4)
    assert float(expected.std()) > 0.1
    assert ours.decoder is not None
    scores = ours.decoder(pieces, last)
    if kind is WhisperForConditionalGeneration:
        torch.testing.assert_close(scores, said.logits, rtol=1e-4, atol=1e-4)
    embed = ours.decoder.embed.weight
    through = said.logits if kind is not WhisperModel else said.last_hidden_state @ embed.T
    torch.testing.assert_close(scores, through, rtol=1e-4, atol=1e-4)


def test_causal_convolutions_and_another_scale_take_the_same_weights(tmp_path: Path) -> None:
    save_whisper(tmp_path / "w")
    found = checkpoints.load(tmp_path / "w")
    ours = SpeechTokenizer(OURS).eval()
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    initialize(ours, found)
    after = ours.state_dict()
    same = {name.split(".")[0] for name in after if torch.equal(before[name], after[name])}
    assert same == {"head", "quantizer", "after_positions"}
    raw = SpeechTokenizer(
        OURS.model_copy(update={"whisper": StemConfig(positions=20, public_features=True)})
    ).eval()
    initialize(raw, found)
    scale, shift = _LOG_MEL_TO_PUBLIC
    mel = noise(1, 40, 80)
    # All but what is heard together with the silence before the beginning, which is 0 in both.
    torch.testing.assert_close(
        ours.stem(mel)[:, 2:], raw.stem(mel * scale + shift)[:, 2:], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers_after": 2}, "encoder.layers.3"),
        ({"hidden": 32}, "before.blocks.0.mlp.up.weight"),
        ({"whisper": StemConfig(positions=30)}, "stem.positions"),
        ({"whisper": None}, "set model.whisper"),
        ({"heads": 4}, "model.heads=4, .* 2 heads: set model.heads=2"),
        ({"decoder": OURS.decoder.model_copy(update={"heads": 2})}, "model.decoder.heads=2, .* 4"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    save_whisper(tmp_path / "w")
    model = SpeechTokenizer(OURS.model_copy(update=changes))
    with pytest.raises(UserError, match=said):
        initialize(model, checkpoints.load(tmp_path / "w"))


def test_a_plain_whisper_is_no_tokenizer_yet(tmp_path: Path) -> None:
    save_whisper(tmp_path / "w", WhisperModel)
    with pytest.raises(UserError, match="init_from"):
        load_tokenizer(tmp_path / "w")
    (tmp_path / "w" / "config.json").write_text('{"hidden_size": 3}')
    with pytest.raises(UserError, match="no speech tokenizer"):
        load_tokenizer(tmp_path / "w")


def test_positions_are_whispers() -> None:
    theirs = WhisperModel(WhisperConfig(**SHAPE)).encoder.embed_positions.weight
    torch.testing.assert_close(sinusoids(20, 16), theirs.detach(), rtol=0, atol=1e-5)


# --- The decoder ----------------------------------------------------------------------------------


def test_greedy_text_is_the_likeliest_piece_after_piece() -> None:
    torch.manual_seed(2)
    decoder = TextDecoder(DecoderConfig(layers=2, heads=2, positions=9), 16, 12, 0.0).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    memory, mask = noise(5, 6, 16), torch.arange(6) < torch.tensor([[6], [3], [1], [5], [2]])
    found = decoder.greedy(memory, mask, (3, 4), end=0)
    assert len({tuple(row) for row in found}) > 2
    for row, pieces in enumerate(found):
        read = [3, 4]
        while len(read) < 9:
            scores = decoder(torch.tensor([read]), memory[row : row + 1], mask[row : row + 1])
            read.append(int(scores[0, -1].argmax()))
            if read[-1] == 0:
                break
        assert [piece for piece in read[2:] if piece] == [piece for piece in pieces if piece]
        assert len(pieces) == len(read) - 2 - (read[-1] == 0)


def test_what_is_masked_is_not_read() -> None:
    decoder = TextDecoder(DecoderConfig(layers=1, heads=2), 16, 12, 0.0).eval()
    memory, mask = noise(1, 6, 16), torch.arange(6)[None] < 4
    spoilt = memory.clone()
    spoilt[:, 4:] = 9.0
    pieces = torch.tensor([[0, 3, 5]])
    assert torch.equal(decoder(pieces, memory, mask), decoder(pieces, spoilt, mask))
    assert not torch.equal(decoder(pieces, memory), decoder(pieces, spoilt))
