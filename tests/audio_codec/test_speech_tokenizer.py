"""The tokenizer streams, has no look-ahead, and its greedy text collapses as CTC says."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from streams import Streaming, Tick, assert_streams, chunkings, scripts, streaming_settings
from torch import Tensor

from audio_codec import checkpoint as checkpoints
from audio_codec.audio import FRAME_SIZE, LogMel
from audio_codec.errors import UserError
from audio_codec.quantize import FSQ
from audio_codec.spectral import SpectralConfig
from audio_codec.speech_tokenizer import (
    ALPHABET,
    SILENCE,
    CTCText,
    SpeechTokenizer,
    TokenizerConfig,
    ctc_loss,
    greedy_text,
    load_tokenizer,
    spell,
)
from audio_codec.whisper import DecoderConfig, StemConfig

# A window of 0.32 s is 8 positions before the bottleneck and 4 after it: 10 frames wrap both.
CONFIG = TokenizerConfig(
    front_dim=8,
    front_blocks=2,
    dim=16,
    heads=2,
    layers_before=2,
    layers_after=2,
    window_seconds=0.32,
    levels=(5, 4, 3),
)

# Every choice that shapes the stream, at least once; positions of a Whisper begin anew within it.
CONFIGS: dict[str, dict[str, Any]] = {
    "late": {"lookahead_ms": 160},
    "blocks": {"block_ms": 240},
    "slow": {"rate": 6.25, "lookahead_ms": 160},
    "fast": {"rate": 50, "block_ms": 100},
    "pooled": {"rate": 25, "layers_pooled": 1, "bottleneck": "vq", "codes": 40, "code_dim": 4},
    "whisper": {
        "whisper": StemConfig(positions=14),
        "rate": 12.5,
        "layers_pooled": 1,
        "pooling": "avg",
        "block_ms": 160,
        "bottleneck": "vq",
        "codes": 40,
        "code_dim": None,
    },
    "late whisper": {"whisper": StemConfig(positions=11), "pooling": "max", "lookahead_ms": 80},
}


def build(config: TokenizerConfig = CONFIG) -> SpeechTokenizer:
    torch.manual_seed(1)
    model = SpeechTokenizer(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval().requires_grad_(False)
    # Let the random model's bottleneck use all of its codes on noise.
    numbers = model.features(model.mel(0.1 * noise(4, 1, 40 * FRAME_SIZE, seed=9)))
    if isinstance(model.quantizer, FSQ):
        model.quantizer.mean.copy_(numbers.mean((0, 1)))
        model.quantizer.variance.copy_(numbers.var((0, 1)))
    else:
        model.quantizer.codebook.copy_(numbers.flatten(0, 1)[: config.codes])
        model.quantizer.ready.fill_(True)
    return model


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# --- Streaming ------------------------------------------------------------------------------------


@streaming_settings
@given(chunks=chunkings(18), script=scripts())
def test_log_mel_streams(chunks: list[int], script: list[Tick]) -> None:
    mel, generator = LogMel(), torch.Generator().manual_seed(2)
    module = Streaming(
        mel,
        mel.new_state,
        lambda n: 0.1 * torch.randn(1, 1, n * mel.stride, generator=generator),
        axis=2,
        tolerance=1e-4,
    )
    assert_streams(module, chunks, script)


@streaming_settings
@given(chunks=chunkings(10), script=scripts(8))
def test_encoding_streams(chunks: list[int], script: list[Tick]) -> None:
    model, generator = build(), torch.Generator().manual_seed(3)
    module = Streaming(
        model.encode,
        model.new_state,
        lambda n: 0.1 * torch.randn(1, 1, n * FRAME_SIZE, generator=generator),
        axis=2,
    )
    assert_streams(module, chunks, script)


@streaming_settings
@given(chunks=chunkings(14), script=scripts())
def test_features_stream_in_float64(chunks: list[int], script: list[Tick]) -> None:
    model, generator = build().double(), torch.Generator().manual_seed(4)
    module = Streaming(
        model.features,
        model.new_state,
        lambda n: torch.randn(1, 8 * n, 80, generator=generator, dtype=torch.float64),
        tolerance=1e-9,
    )
    assert_streams(module, chunks, script)


@streaming_settings
@given(chunks=chunkings(14), script=scripts())
def test_characters_stream_in_float64(chunks: list[int], script: list[Tick]) -> None:
    model, generator = build().double(), torch.Generator().manual_seed(5)
    module = Streaming(
        model.characters,
        model.new_character_state,
        lambda n: torch.randn(1, n, 3, generator=generator, dtype=torch.float64),
        tolerance=1e-9,
    )
    assert_streams(module, chunks, script)


def variant(name: str) -> SpeechTokenizer:
    return build(CONFIG.model_copy(update=CONFIGS[name]))


@pytest.mark.parametrize("name", CONFIGS)
@streaming_settings
@given(chunks=chunkings(8), script=scripts(6))
def test_any_tokenizer_streams(name: str, chunks: list[int], script: list[Tick]) -> None:
    model, generator = variant(name).double(), torch.Generator().manual_seed(6)
    mels = model.frame_size // 240
    module = Streaming(
        model.features,
        model.new_state,
        lambda n: torch.randn(1, mels * n, 80, generator=generator, dtype=torch.float64),
        tolerance=1e-9,
    )
    assert_streams(module, chunks, script)


@pytest.mark.parametrize("name", ["blocks", "slow", "whisper"])
@streaming_settings
@given(chunks=chunkings(8), script=scripts(6))
def test_any_tokenizer_codes_and_reads_a_stream(
    name: str, chunks: list[int], script: list[Tick]
) -> None:
    model, generator = variant(name), torch.Generator().manual_seed(7)
    module = Streaming(
        model.encode,
        model.new_state,
        lambda n: 0.1 * torch.randn(1, 1, n * model.frame_size, generator=generator),
        axis=2,
    )
    assert_streams(module, chunks, script)
    model = model.double()
    codes = model.frame_size // model.config.code_size
    module = Streaming(
        model.characters,
        model.new_character_state,
        lambda n: torch.randn(
            1, codes * n, model.config.numbers, generator=generator, dtype=torch.float64
        ),
        tolerance=1e-9,
    )
    assert_streams(module, chunks, script)


# --- Delay ----------------------------------------------------------------------------------------


def test_a_frame_is_coded_from_its_own_sound_at_once() -> None:
    assert SpeechTokenizer.delay == 0
    model, frames = build(), 6
    pcm = 0.1 * noise(1, 1, frames * FRAME_SIZE)
    before = model.features(model.mel(pcm))
    for sample in (0, FRAME_SIZE - 1, 2 * FRAME_SIZE, 4 * FRAME_SIZE + 777):
        struck = pcm.clone()
        struck[..., sample] += 1.0
        after = model.features(model.mel(struck))
        frame = sample // FRAME_SIZE
        assert torch.equal(after[:, :frame], before[:, :frame])
        if sample < FRAME_SIZE - 1 or sample % FRAME_SIZE:
            continue
        assert not torch.equal(after[:, frame], before[:, frame])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_code_sees_as_far_ahead_as_it_says(name: str) -> None:
    model = variant(name)
    struck = noise(1, 97, 80).repeat(97, 1, 1)[:, :96]
    for row in range(96):  # from row · 10 ms on, all is another sound; the last row is untouched
        struck[row, row:] += 1
    numbers = model._narrow(model(struck).before)
    furthest = 0.0
    for row in range(96):
        heard = (numbers[row] != numbers[-1]).any(-1)
        if bool(heard.any()):  # the last of it may come too late for the last code
            end = (1 + int(heard.nonzero()[0])) * 1000 / model.rate
            furthest = max(furthest, 10 * (row + 1) - end)
    # Whisper's convolution to 50 Hz, made causal as published, ends 10 ms before its position does.
    unheard = 10 if model.config.whisper else 0
    assert furthest == model.lookahead_ms - unheard


@pytest.mark.parametrize("name", ["default", "late", "blocks", "pooled", "whisper"])
def test_what_lies_further_back_than_it_says_is_forgotten(name: str) -> None:
    model = build(CONFIG.model_copy(update=CONFIGS.get(name, {}))).double()
    config = model.config
    heard = (config.layers_before + config.layers_pooled) * config.window_seconds
    assert model.past_seconds == pytest.approx(heard + 1)
    mel = noise(1, 320, config.mels, dtype=torch.float64)
    expected = model.features(mel)[:, -1]
    for seconds, same in ((model.past_seconds, True), (0.6 * heard, False)):
        other = mel.clone()
        other[:, : -math.ceil(100 * seconds)] = noise(1, 1, config.mels, seed=5)
        gap = float((model.features(other)[:, -1] - expected).abs().max())
        assert (gap < 1e-12) == same, (seconds, gap)


def test_a_code_that_comes_late_is_that_of_an_earlier_frame() -> None:
    late, now = variant("late"), build()
    now.load_state_dict(late.state_dict())
    assert (late.delay, now.delay, late.lookahead_ms) == (2 * FRAME_SIZE, 0, 160)
    mel = noise(2, 8 * 6, 80)
    longer = torch.cat((mel, torch.full((2, 16, 80), SILENCE)), 1)
    expected, found = now(longer), late(mel, torch.tensor([6, 4]))
    assert torch.equal(found.codes, expected.codes[:, 2:])
    assert torch.equal(found.logits, expected.logits[:, 4:])
    assert torch.equal(found.before, expected.before[:, 4:])
    # A stream of it gives the codes as they come.
    assert torch.equal(late.discretize(late.features(longer)), expected.codes)


def test_an_impulse_within_a_frame_reaches_that_frame() -> None:
    model = build()
    silence = torch.zeros(1, 1, 3 * FRAME_SIZE)
    before = model.features(model.mel(silence))
    for place in (0, 900, FRAME_SIZE - 100):
        struck = silence.clone()
        struck[..., FRAME_SIZE + place] = 1.0
        after = model.features(model.mel(struck))
        changed = (after != before).any(-1)[0].tolist()
        assert changed == [False, True, True]


def test_sound_must_be_whole_frames() -> None:
    with pytest.raises(AssertionError, match="1919 samples"):
        build().encode(torch.zeros(1, 1, 1919))


def test_codes_fill_the_codebook_and_embed_into_it() -> None:
    model = build()
    codes = model.encode(0.1 * noise(4, 1, 40 * FRAME_SIZE))
    assert codes.shape == (4, 40) and codes.dtype == torch.int64
    assert int(codes.min()) >= 0 and int(codes.max()) < math.prod(model.codebook) == 60
    assert codes.unique().numel() > 30
    embedded = model.embed(codes)
    assert embedded.shape == (4, 40, 3) and bool(embedded.abs().lt(1).all())
    assert torch.equal(model.quantizer.codes(model.quantizer.digits(embedded)), codes)


@pytest.mark.parametrize(
    ("name", "rate", "lookahead", "codebook", "stride"),
    [
        ("late", 12.5, 160, (5, 4, 3), 1920),
        ("blocks", 12.5, 160, (5, 4, 3), 3 * 1920),
        ("slow", 6.25, 160, (5, 4, 3), 3840),
        ("fast", 50, 80, (5, 4, 3), 9600),
        ("pooled", 25, 0, (40,), 1920),
        ("whisper", 12.5, 80, (40,), 3840),
    ],
)
def test_what_a_tokenizer_says_of_itself(
    name: str, rate: float, lookahead: float, codebook: tuple[int, ...], stride: int
) -> None:
    model = variant(name)
    assert (model.rate, model.lookahead_ms, model.frame_size) == (rate, lookahead, stride)
    assert model.codebook == codebook and model.codebook_size == math.prod(codebook)
    assert model.bottleneck == ("fsq" if len(codebook) > 1 else "vq")
    pcm = 0.1 * noise(2, 1, 4 * stride)
    codes = model.encode(pcm)
    assert codes.shape[1] == round(pcm.shape[-1] / 24_000 * rate)
    assert int(codes.min()) >= 0 and int(codes.max()) < model.codebook_size
    assert codes.unique().numel() > 4
    embedded = model.embed(codes)
    assert embedded.shape == (*codes.shape, model.config.numbers)
    assert torch.equal(model.quantizer.decode(codes), embedded)
    if isinstance(model.quantizer, FSQ):
        assert torch.equal(model.quantizer.codes(model.quantizer.digits(embedded)), codes)
    else:
        assert torch.equal(model.discretize(embedded), codes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rate": 10}, "rate=10"),
        ({"lookahead_ms": 40}, "lookahead_ms=40 must be a multiple of a code's 80 ms"),
        ({"rate": 6.25, "block_ms": 80}, "block_ms=80 must be a multiple of a code's 160 ms"),
        ({"block_ms": 160, "lookahead_ms": 80}, "lookahead_ms=80 is for"),
        ({"block_ms": 160, "causal": False}, "block_ms=160 needs causal"),
        ({"layers_after": 0}, "layers_after=0"),
        ({"ctc": False}, "layers_after=4"),
        ({"decoder": DecoderConfig(heads=5)}, "decoder.heads=5"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        TokenizerConfig(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"rate": 25},
        {"block_ms": 160},
        {"lookahead_ms": 80},
        {"causal": False},
        {"whisper": {"causal": False}},
    ],
)
def test_a_codec_takes_a_tokenizer_of_a_code_a_frame_at_once(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="a code a frame at once"):
        SpectralConfig(tokenizer=TokenizerConfig(**changes))
    vq = SpectralConfig(tokenizer=TokenizerConfig(bottleneck="vq", codes=64))
    assert vq.tokenizer.codebook == (64,) and vq.tokenizer.numbers == 32


def test_the_shipped_shape_is_the_default() -> None:
    shipped = {"front_dim": 8, "front_blocks": 2, "dim": 16, "heads": 2, "levels": [5, 4, 3]}
    model = SpeechTokenizer(TokenizerConfig.model_validate(shipped))
    names = {name.split(".")[0] for name in model.state_dict()}
    assert names == {
        *("front_in", "front", "stack", "before", "to_bottleneck", "quantizer"),
        *("from_bottleneck", "after", "head"),
    }
    assert not any(
        "bias" in name for name, _ in model.before.named_parameters() if "norm" not in name
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_without_a_bottleneck_all_that_the_encoder_says_is_read(name: str, tmp_path: Path) -> None:
    shape = {**CONFIG.model_dump(), **CONFIGS[name], "bottleneck": "none"}
    torch.manual_seed(1)
    made = SpeechTokenizer(TokenizerConfig.model_validate(shape))
    assert not [n for n in made.state_dict() if n.startswith(("to_", "quantizer", "from_"))]
    checkpoints.save(tmp_path / "t", made.config, made.state_dict(), dtype="fp32")
    model = load_tokenizer(tmp_path / "t")
    # As many numbers pass as the network is wide, and none is bounded or rounded.
    numbers = model.features(100 * noise(1, 8 * 12, 80))
    assert numbers.shape[2] == model.config.dim == 16 and float(numbers.abs().max()) > 1
    mel, rows = noise(2, 8 * 12, 80), torch.tensor([True, False])
    output, free = model(mel, None, rows), model(mel, None, ~rows)
    assert output.codes is None and torch.equal(output.logits, free.logits)
    pcm = noise(1, 1, model.frame_size)
    for ask in (model.encode, lambda _: model.embed(torch.zeros(1, 1).long()), model.transcribe):
        with pytest.raises(UserError, match="bottleneck=none has no codes: choose"):
            ask(pcm)
    with pytest.raises(UserError, match="no codes"):
        assert model.codebook


def test_a_codec_needs_codes() -> None:
    with pytest.raises(ValidationError, match="bottleneck=none has no codes"):
        SpectralConfig(tokenizer=TokenizerConfig(bottleneck="none"))


@pytest.mark.parametrize("pooling", ["linear", "max"])
def test_a_codebook_of_the_encoder_s_own_numbers_takes_any_pooling(pooling: str) -> None:
    shape = {**CONFIG.model_dump(), "bottleneck": "vq", "code_dim": None, "pooling": pooling}
    model = SpeechTokenizer(TokenizerConfig.model_validate(shape)).eval()
    assert model.encode(noise(1, 1, 2 * FRAME_SIZE)).shape == (1, 2)


@pytest.mark.parametrize("name", ["pooled", "whisper", "late"])
def test_a_checkpoint_gives_the_same_codes(name: str, tmp_path: Path) -> None:
    model = variant(name)
    checkpoints.save(tmp_path / "t", model.config, model.state_dict(), dtype="fp32")
    pcm = 0.1 * noise(1, 1, 2 * model.frame_size)
    assert torch.equal(load_tokenizer(tmp_path / "t").encode(pcm), model.encode(pcm))


# --- Training -------------------------------------------------------------------------------------


def test_training_ignores_padding() -> None:
    x = noise(2, 8 * 6, 80)
    frames = torch.tensor([6, 3])
    spoilt = x.clone()
    spoilt[1, 8 * 3 :] = 50.0
    outputs, statistics = [], []
    for mel in (x, spoilt):
        model = build().train()
        outputs.append(model(mel, frames))
        statistics.append(model.quantizer.mean.clone())
    torch.testing.assert_close(*statistics)
    torch.testing.assert_close(outputs[0].logits[1, :6], outputs[1].logits[1, :6])
    torch.testing.assert_close(outputs[0].logits[0], outputs[1].logits[0])
    assert outputs[0].logits.shape == (2, 12, len(ALPHABET) + 1)


@pytest.mark.parametrize("name", ["pooled", "whisper", "late", "slow", "fast"])
def test_the_gradient_passes_any_bottleneck(name: str) -> None:
    config = CONFIG.model_copy(update={**CONFIGS[name], "decoder": DecoderConfig(heads=2)})
    model = build(config).train().requires_grad_(True)
    frames, pieces = torch.tensor([4, 2]), torch.tensor([[0, 3, 4], [0, 5, 0]])
    output = model(noise(2, 8 * 4, 80), frames, torch.tensor([True, False]), pieces)
    assert output.logits.shape[1] == max(8, round(4 * model.rate / 12.5))
    assert output.pieces.shape == (2, 3, len(ALPHABET) + 1)
    assert output.codes.shape[1] == round(4 * model.rate / 12.5)
    loss = output.logits.square().mean() + output.pieces.square().mean() + output.commitment
    loss.backward()
    assert bool(output.commitment > 0) == (model.bottleneck == "vq")
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.any()), f"{name} gets no gradient"


def test_a_vector_quantizer_learns_of_sound_alone_and_revives_its_dead() -> None:
    config = CONFIG.model_copy(update={"bottleneck": "vq", "codes": 16, "code_dim": 4})
    spoilt = noise(2, 8 * 6, 80)
    spoilt[1, 8 * 3 :] = 50.0
    outputs = []
    for mel in (noise(2, 8 * 6, 80), spoilt):
        model = build(config).train()
        torch.manual_seed(3)
        outputs.append(model(mel, torch.tensor([6, 3])))
        outputs.append(model.quantizer.codebook.clone())
    assert torch.equal(outputs[1], outputs[3])
    assert torch.equal(outputs[0].commitment, outputs[2].commitment)
    model.quantizer.codebook.fill_(1e6)
    model.quantizer.codebook[0] = 0
    model.quantizer.total.copy_(model.quantizer.codebook)
    model.quantizer.usage.fill_(0).add_(1e-9)
    model(noise(4, 8 * 40, 80))
    assert model(noise(4, 8 * 40, 80)).codes.unique().numel() > 4


def test_a_row_past_the_bottleneck_is_not_rounded() -> None:
    for name in ("pooled", "late"):
        model = variant(name).eval()
        mel = noise(2, 8 * 4, 80)
        free, rounded, mixed = (
            model(mel, None, torch.tensor(rows)).logits
            for rows in ([False, False], [True, True], [False, True])
        )
        assert torch.equal(mixed[0], free[0]) and torch.equal(mixed[1], rounded[1])
        assert not torch.equal(free, rounded)


def test_the_gradient_passes_the_bottleneck() -> None:
    model = build().train().requires_grad_(True)
    logits = model(noise(2, 8 * 4, 80)).logits
    loss = ctc_loss(logits, torch.tensor([4, 4]), torch.ones(2, 2).long(), torch.tensor([2, 2]))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.any()), f"{name} gets no gradient"


def test_inference_and_training_code_alike_once_the_statistics_settle() -> None:
    model = build().train()
    mel = noise(8, 8 * 50, 80)
    for _ in range(400):
        output = model(mel[:, : 8 * 8])
    model.eval()
    numbers = model.features(mel[:, : 8 * 8])
    codes = model.quantizer.codes(model.quantizer.digits(model.quantizer.bound(numbers)))
    assert float((codes == output.codes).float().mean()) > 0.9


# --- CTC ------------------------------------------------------------------------------------------


def brute_force_ctc(log_p: Tensor, target: list[int]) -> float:
    """Minus the log of the summed probability of every path [T, V] that collapses to `target`."""
    total, (time, classes) = 0.0, log_p.shape
    for number in range(classes**time):
        path = [number // classes**t % classes for t in range(time)]
        collapsed = [path[0], *(b for a, b in pairwise(path) if a != b)]
        if [label for label in collapsed if label] == target:
            total += math.exp(sum(float(log_p[t, label]) for t, label in enumerate(path)))
    return -math.log(total)


def test_ctc_loss_is_the_sum_over_all_paths_per_character() -> None:
    logits = noise(2, 6, 3)
    frames, lengths = torch.tensor([3, 2]), torch.tensor([2, 1])
    targets = torch.tensor([[1, 2], [2, 0]])
    log_p = torch.log_softmax(logits, -1)
    expected = brute_force_ctc(log_p[0], [1, 2]) + brute_force_ctc(log_p[1, :4], [2])
    found = ctc_loss(logits, frames, targets, lengths)
    assert float(found) == pytest.approx(expected / 3, rel=1e-5)


def test_a_text_too_long_for_its_sound_costs_nothing_and_breaks_nothing() -> None:
    logits = noise(2, 4, 5).requires_grad_()
    targets = torch.tensor([[1, 1, 1, 1, 1], [1, 2, 0, 0, 0]])
    loss = ctc_loss(logits, torch.tensor([2, 2]), targets, torch.tensor([5, 2]))
    loss.backward()
    assert logits.grad is not None and bool(logits.grad.isfinite().all())
    assert not logits.grad[0].any() and bool(logits.grad[1].any())


def test_spelling_drops_what_the_alphabet_lacks() -> None:
    assert spell("") == [] and spell("123 é!") == [ALPHABET.index(" ") + 1]
    assert [ALPHABET[c - 1] for c in spell("Don't Stop")] == list("don't stop")


labels = st.lists(st.integers(0, len(ALPHABET)), max_size=30)


@settings(deadline=None)
@given(classes=labels)
def test_greedy_text_merges_repeats_and_drops_blanks(classes: list[int]) -> None:
    merged = [c for i, c in enumerate(classes) if i == 0 or classes[i - 1] != c]
    expected = "".join(ALPHABET[c - 1] for c in merged if c)
    assert greedy_text(torch.tensor(classes, dtype=torch.int64)) == expected


@settings(deadline=None)
@given(classes=labels, cuts=st.lists(st.integers(0, 30), max_size=4))
def test_live_text_does_not_depend_on_the_chunks(classes: list[int], cuts: list[int]) -> None:
    text, edges = CTCText(), [0, *sorted(cuts), len(classes)]
    live = "".join(text.push(classes[a:b]) for a, b in pairwise(edges))
    # A cut beyond the end yields nothing; nothing is said twice.
    assert live == greedy_text(torch.tensor(classes, dtype=torch.int64))


@settings(deadline=None)
@given(st.text(ALPHABET, max_size=20))
def test_what_is_spelled_with_blanks_between_is_read_back(text: str) -> None:
    classes = [c for label in spell(text) for c in (label, label, 0)]
    assert greedy_text(torch.tensor(classes, dtype=torch.int64)) == text


def test_transcribe_reads_each_row() -> None:
    model = build()
    codes = model.encode(0.3 * noise(3, 1, 8 * FRAME_SIZE))
    together = model.transcribe(codes)
    assert together == [model.transcribe(codes[i : i + 1])[0] for i in range(3)]
    assert any(together)
