"""The tokenizer streams, has no look-ahead, and its greedy text collapses as CTC says."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import Streaming, Tick, assert_streams, chunkings, scripts, streaming_settings
from torch import Tensor

from audio_codec.audio import FRAME_SIZE, LogMel
from audio_codec.speech_tokenizer import (
    ALPHABET,
    CTCText,
    SpeechTokenizer,
    TokenizerConfig,
    ctc_loss,
    greedy_text,
    spell,
)

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


def build(config: TokenizerConfig = CONFIG) -> SpeechTokenizer:
    torch.manual_seed(1)
    model = SpeechTokenizer(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval().requires_grad_(False)
    # Let the random model's bottleneck use all of its codes on noise.
    numbers = model.features(model.mel(0.1 * noise(4, 1, 40 * FRAME_SIZE, seed=9)))
    model.quantizer.mean.copy_(numbers.mean((0, 1)))
    model.quantizer.variance.copy_(numbers.var((0, 1)))
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
