"""The token decoder streams in blocks, keeps its streams apart, and speaks in a chosen voice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from pydantic import ValidationError
from small import CODEC, TOKENIZER
from streams import Streaming, Tick, assert_streams, chunkings, scripts, streaming_settings
from torch import Tensor

from audio_codec import checkpoint as checkpoints
from audio_codec.audio import SAMPLE_RATE, LogMel
from audio_codec.codec import load_tokenizer_of
from audio_codec.errors import UserError
from audio_codec.spectral import HOP, SpectralCodec
from audio_codec.speech_tokenizer import SpeechTokenizer, TokenizerConfig, load_tokenizer
from audio_codec.token_decoder import (
    AHEAD,
    TokenDecoder,
    TokenDecoderConfig,
    check_match,
    load_token_decoder,
    pack,
    path_time,
    unpack,
)

CONFIG = TokenDecoderConfig(
    codebook=(3, 4),
    block=2,
    voices=("one", "two"),
    dim=12,
    heads=2,
    encoder_layers=1,
    voice_blocks=1,
    flow_blocks=1,
    flow_layers=2,
    window_seconds=0.3,  # 4 tokens, 15 positions: neither a number of blocks
    steps=2,
    vocoder_dim=8,
    vocoder_blocks=1,
)
CODES = math.prod(CONFIG.codebook)


def build(config: TokenDecoderConfig = CONFIG) -> TokenDecoder:
    """A decoder in float64 whose weights are large enough for everything to matter."""
    torch.manual_seed(1)
    decoder = TokenDecoder(config)
    for name, parameter in decoder.named_parameters():
        if parameter.dim() == 2 and not name.startswith("vocoder.head"):
            torch.nn.init.normal_(parameter, std=0.3)
    return decoder.double().eval().requires_grad_(False)


def tokens(batch: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(CODES, (batch, count), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def off(found: Tensor, expected: Tensor) -> float:
    """Largest difference between two sounds of the same length."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


SHAPES: dict[str, dict[str, Any]] = {
    "default": {},
    "without_guidance": {"guidance": 0.0},
    "slow_vq": {"codebook": (12,), "rate": 6.25, "block": 1},
    "fast": {"rate": 50.0, "block": 3, "window_seconds": 0.1},
}


# --- Streaming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@streaming_settings
@given(chunks=chunkings(10), script=scripts(8))
def test_speech_streams(shape: str, chunks: list[int], script: list[Tick]) -> None:
    decoder = build(CONFIG.model_copy(update=SHAPES[shape]))
    block, generator = decoder.config.block, torch.Generator().manual_seed(2)
    module = Streaming(
        decoder.decode,
        decoder.new_state,
        lambda n: torch.randint(CODES, (1, n * block), generator=generator),
        out_axis=2,
        tolerance=1e-5,  # the inverse STFT is in float32
    )
    assert_streams(module, chunks, script)


def test_spectra_of_a_long_stream_are_those_of_one_pass_in_float64() -> None:
    decoder, codes = build(), tokens(2, 60)
    voice, seed = decoder.table.weight, torch.tensor([5, 2**60])
    whole = decoder.generate(codes, voice=voice, seed=seed)
    state = decoder.new_state(2)
    for slot in range(2):
        decoder.configure(state, slot, voice=voice[slot], seed=int(seed[slot]))
    ring = state.guided[0].transformer.layers[0].key.shape[2]
    assert ring < 60 * CONFIG.ratio / 10, "the ring of the past wraps many times"
    parts = [decoder.generate(part, state) for part in codes.split(CONFIG.block, 1)]
    assert off(torch.cat(parts, 1), whole) < 1e-9


def test_every_step_and_pass_keeps_its_own_past() -> None:
    decoder = build()
    state = decoder.new_state(1)
    decoder.decode(tokens(1, CONFIG.block), state)
    passes = [*state.guided, *state.free]
    keys = [one.transformer.layers[0].key for one in passes]
    assert len(keys) == 2 * CONFIG.steps
    assert all(bool(key.any()) for key in keys)
    assert not any(torch.equal(a, b) for i, a in enumerate(keys) for b in keys[:i])
    assert build(CONFIG.model_copy(update={"guidance": 0.0})).new_state(1).free == []


@pytest.mark.parametrize("rest", [1, 2])
def test_a_stream_ends_anywhere_in_a_block_and_its_slot_begins_anew(rest: int) -> None:
    decoder, codes = build(), tokens(2, 4 + rest)
    whole = decoder.decode(codes, voice=decoder.table.weight, seed=torch.tensor([3, 4]))
    state = decoder.new_state(2, max_chunk=2)
    for slot in range(2):
        decoder.configure(state, slot, voice=decoder.table.weight[slot], seed=3 + slot)
    first = decoder.decode(codes[:, :4], state)
    state.active[1] = False
    last = decoder.flush(codes[:, 4:], state)
    assert state.active.tolist() == [True, False]
    assert not any(bool(tensor[0].any()) for tensor in state.tensors())
    assert int(state.seed[1]) == 4, "a frozen stream goes on"
    assert off(torch.cat((first, last), 2)[:1], whole[:1]) < 1e-5
    state.active.copy_(torch.tensor([False, True]))
    later = decoder.flush(codes[:, 4:], state)
    assert off(torch.cat((first, later), 2)[1:], whole[1:]) < 1e-5
    assert not any(bool(tensor.any()) for tensor in state.tensors())


def test_a_part_of_a_block_is_refused_before_the_end() -> None:
    decoder = build()
    with pytest.raises(AssertionError, match="3 tokens are no whole blocks of 2"):
        decoder.decode(tokens(1, 3), decoder.new_state(1, 2))
    with pytest.raises(AssertionError, match="3 tokens are not the rest"):
        decoder.flush(tokens(1, 3), decoder.new_state(1, 2))
    with pytest.raises(AssertionError, match="see configure"):
        decoder.decode(tokens(1, 2), decoder.new_state(1), seed=torch.tensor([1]))


def test_a_block_hears_its_own_tokens_alone_and_all_of_them() -> None:
    decoder, codes = build(), tokens(1, 3 * CONFIG.block)
    spoken = decoder.decode(codes)
    size = CONFIG.block * CONFIG.token_size
    for place in range(CONFIG.block, 2 * CONFIG.block):
        other = codes.clone()
        other[0, place] = (other[0, place] + 1) % CODES
        changed = (decoder.decode(other) != spoken)[0, 0].nonzero()
        # From the block's first hop on, whichever token it was; Hann's first sample is nothing.
        assert size <= int(changed.min()) <= size + 2


# --- What is said, and how ------------------------------------------------------------------------


def test_a_code_is_the_sum_of_its_digits() -> None:
    embed = build().embed
    x = embed(torch.arange(CODES)[None])[0]
    assert len({tuple(row.tolist()) for row in x}) == CODES
    digits = torch.arange(CODES)
    expected = embed.tables[0][digits % 3] + embed.tables[1][digits // 3]
    assert torch.equal(x, expected)


@pytest.mark.parametrize("rate", [50.0, 25.0, 12.5, 6.25])
def test_a_token_lasts_as_long_as_its_rate_says(rate: float) -> None:
    config = CONFIG.model_copy(update={"rate": rate})
    decoder, samples = build(config), round(SAMPLE_RATE / rate)
    assert config.token_size == samples
    assert decoder.decode(tokens(1, 5)).shape == (1, 1, 5 * samples)
    assert decoder.generate(tokens(1, 5)).shape == (1, 5 * samples // HOP, 80)


def test_guidance_goes_past_what_is_said_without_tokens_and_voice() -> None:
    codes = tokens(1, 6)
    one_step = {"steps": 1}
    spectra = {
        guidance: build(CONFIG.model_copy(update={**one_step, "guidance": guidance})).generate(
            codes
        )
        for guidance in (0.0, 1.0, 2.0)
    }
    assert off(spectra[1.0], spectra[0.0]) > 1e-3
    # In one step the way is straight, so twice the strength goes twice as far.
    assert off(spectra[2.0] - spectra[0.0], 2 * (spectra[1.0] - spectra[0.0])) < 1e-9


def test_temperature_is_the_spread_of_the_ways_to_say_it() -> None:
    codes = tokens(1, 6)
    ways = {}
    for temperature in (0.0, 0.3, 1.0):
        decoder = build(CONFIG.model_copy(update={"temperature": temperature}))
        spectra = [decoder.generate(codes, seed=torch.tensor([seed])) for seed in range(8)]
        ways[temperature] = float(torch.stack(spectra).std(0).mean())
    assert ways[0.0] < 1e-12
    assert 0 < 2 * ways[0.3] < ways[1.0]


def test_voice_and_seed_are_heard() -> None:
    decoder, codes = build(), tokens(1, 6)
    sounds = [
        decoder.decode(codes),
        decoder.decode(codes, voice=decoder.voice("one")[None]),
        decoder.decode(codes, voice=decoder.voice("two")[None]),
        decoder.decode(codes, seed=torch.tensor([1])),
    ]
    assert all(off(a, b) > 1e-4 for i, a in enumerate(sounds) for b in sounds[:i])
    assert off(decoder.decode(codes, seed=torch.tensor([0])), sounds[0]) == 0


def test_a_voice_is_told_from_a_prompt_of_any_length() -> None:
    decoder = build()
    size = CONFIG.token_size
    codes = tokens(2, 5)
    prompt = noise(2, 1, 5 * size)
    voices = decoder.imitate(prompt, codes)
    assert voices.shape == (2, CONFIG.dim)
    assert off(voices[:1], voices[1:]) > 1e-3
    assert off(voices, decoder.imitate(prompt, tokens(2, 5, seed=1))) > 1e-3, "what it says counts"
    longer = decoder.imitate(prompt.repeat(1, 1, 2), codes.repeat(1, 2))
    assert longer.shape == voices.shape and bool(longer.isfinite().all())
    assert off(*(decoder.decode(codes[:1], voice=one[None]) for one in voices)) > 1e-4
    with pytest.raises(AssertionError):
        decoder.imitate(prompt, codes[:, :4])


def test_the_spectrum_of_a_hop_reaches_20_ms_past_it() -> None:
    decoder = build()
    size = 3 * CONFIG.token_size
    pcm = noise(1, 1, size + AHEAD)
    mel = decoder.spectrum(pcm)
    assert mel.shape == (1, size // HOP, 80)
    assert torch.equal(mel, LogMel()(pcm)[:, 2:])
    for sample, frames in ((10 * HOP + 100, [8, 9]), (10 * HOP + 140, [8, 9, 10])):
        struck = pcm.clone()
        struck[..., sample] += 1
        changed = (decoder.spectrum(struck) != mel).any(-1)[0].nonzero().flatten().tolist()
        assert changed == frames


def test_positions_are_pairs_of_mel_frames() -> None:
    mel = noise(2, 8, 80)
    assert torch.equal(unpack(pack(mel)), mel)
    assert torch.equal(pack(mel)[1, 2], mel[1, 4:6].flatten())


def test_a_network_that_knows_nothing_follows_the_best_linear_velocity() -> None:
    """It takes data for unit noise: s falls from 1 to √½ and rises to 1 again, and x with it."""
    decoder = build()
    decoder.flow.velocity.weight.zero_()
    decoder.flow.velocity.bias.zero_()
    noises = torch.randn(1, 1, 160, dtype=torch.float64)
    condition = torch.zeros(1, 1, CONFIG.dim, dtype=torch.float64)
    times = path_time(torch.linspace(0, 1, 201, dtype=torch.float64))
    assert float(times[0]) == 0 and float(times[-1]) == pytest.approx(1)
    assert bool((times.diff().diff() > 0).all()), "steps grow"
    x, sizes = noises, []
    for now, then in zip(times, times[1:], strict=False):
        x = x + (then - now) * decoder.flow(x, now[None], condition)
        sizes.append(float((x / noises).mean()))
    assert min(sizes) == pytest.approx(0.5**0.5, abs=0.02)
    assert sizes[-1] == pytest.approx(1, abs=0.02)


# --- Checkpoints and mistakes ---------------------------------------------------------------------


def test_a_checkpoint_speaks_as_its_model_did(tmp_path: Path) -> None:
    decoder = build().float()
    checkpoints.save(tmp_path / "d", decoder.config, decoder.state_dict(), dtype="fp32")
    loaded = load_token_decoder(tmp_path / "d")
    assert loaded.config == CONFIG and not loaded.training
    codes = tokens(1, 5)
    assert torch.equal(loaded.decode(codes), decoder.decode(codes))
    quick = load_token_decoder(tmp_path / "d", steps=1, guidance=0.0, temperature=0.5)
    shape = quick.config
    assert (shape.steps, shape.guidance, shape.temperature) == (1, 0.0, 0.5)
    assert off(quick.decode(codes), loaded.decode(codes)) > 1e-4


def test_a_broken_checkpoint_or_setting_is_one_sentence(tmp_path: Path) -> None:
    decoder = build().float()
    path = checkpoints.save(tmp_path / "d", decoder.config, decoder.state_dict())
    with pytest.raises(UserError, match="voice 'three' is unknown; choices: one, two."):
        decoder.voice("three")
    with pytest.raises(UserError, match="seed is -1; it must be from 0"):
        decoder.configure(decoder.new_state(1), 0, seed=-1)
    with pytest.raises(UserError, match="field 'steps'"):
        load_token_decoder(path, steps=0)
    with pytest.raises(UserError, match="field 'guidance'"):
        load_token_decoder(path, guidance=-1.0)
    with pytest.raises(UserError, match="neither a directory"):
        load_token_decoder(tmp_path / "none")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "kind": "spectral"}))
    with pytest.raises(UserError, match="field 'kind'"):
        load_token_decoder(path)
    (path / "config.json").write_text(json.dumps({**config, "dim": 16}))
    with pytest.raises(UserError, match="expected"):
        load_token_decoder(path)


def stored(model: SpeechTokenizer, dtype: checkpoints.StoredType, folder: Path) -> SpeechTokenizer:
    checkpoints.save(folder, model.config, model.state_dict(), dtype=dtype)
    return load_tokenizer(folder)


@pytest.mark.parametrize("bottleneck", [{"levels": (3, 3)}, {"bottleneck": "vq", "codes": 9}])
def test_a_decoder_speaks_the_tokens_of_the_weights_it_was_trained_on(
    bottleneck: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shape = TokenizerConfig.model_validate({**TOKENIZER.model_dump(), **bottleneck})
    torch.manual_seed(0)
    tokenizer = SpeechTokenizer(shape).eval()
    codec = SpectralCodec(CODEC.model_copy(update={"tokenizer": shape})).eval()
    assert codec.tokenizer is not None
    codec.tokenizer.load_state_dict(tokenizer.state_dict())
    checkpoints.save(tmp_path / "codec", codec.config, codec.state_dict(), dtype="int8")
    changes = {"codebook": tokenizer.codebook, "fingerprint": tokenizer.fingerprint()}
    decoder = build(CONFIG.model_copy(update=changes))
    checkpoints.save(tmp_path / "d", decoder.config, decoder.state_dict())
    decoder = load_token_decoder(tmp_path / "d")
    once = stored(tokenizer, "int8", tmp_path / "once")
    for same in (
        tokenizer,
        once,
        stored(once, "int8", tmp_path / "twice"),
        stored(tokenizer, "bf16", tmp_path / "half"),
        load_tokenizer_of(tmp_path / "codec"),
    ):
        check_match(same, decoder)
    # What it writes its characters with says nothing of its codes; what it codes with does.
    torch.nn.init.normal_(tokenizer.after.blocks[0].mlp.up.weight)
    if tokenizer.bottleneck == "vq":
        tokenizer.quantizer.usage.copy_(torch.rand(9))
    check_match(tokenizer, decoder)
    assert not caplog.messages
    torch.manual_seed(1)
    for part in ("", "to_bottleneck.", "before.blocks.0.mlp.up."):
        state, other = tokenizer.state_dict(), SpeechTokenizer(shape).state_dict()
        changed = SpeechTokenizer(shape)
        state |= {name: other[name] for name in other if name.startswith(part)}
        changed.load_state_dict(state)
        with pytest.raises(UserError, match="tokens of a tokenizer with other weights"):
            check_match(changed, decoder)
    # One of before there were fingerprints.
    old = build(CONFIG.model_copy(update={"codebook": tokenizer.codebook}))
    check_match(changed, old)
    assert "does not say whose tokens" in caplog.text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rate": 20.0}, "rate=20 must be 50 over a whole number"),
        ({"rate": 100.0}, "rate"),
        ({"dim": 10, "heads": 4}, "dim=10 must give an even size to each of 4 heads"),
        ({"voices": ["a", "b", "a"]}, "voices has 'a' more than once"),
        ({"voices": []}, "voices"),
        ({"codebook": []}, "codebook"),
        ({"blocks": 3}, "blocks"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        TokenDecoderConfig.model_validate(changes)


def test_the_shipped_shape_is_small() -> None:
    decoder = TokenDecoder(TokenDecoderConfig())
    assert 6e6 < sum(parameter.numel() for parameter in decoder.parameters()) < 1e7
