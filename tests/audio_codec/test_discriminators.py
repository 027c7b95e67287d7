"""Discriminators: they learn to tell noise from a voice, and judge each sound by itself."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from audio_codec.audio import SAMPLE_RATE
from audio_codec.discriminators import DiscriminatorConfig, Discriminators, Verdict
from audio_codec.losses import discriminator_loss, generator_loss

CONFIG = DiscriminatorConfig(windows=(256, 128), channels=8)
SAMPLES = 3840


def build(config: DiscriminatorConfig = CONFIG) -> Discriminators:
    torch.manual_seed(3)
    return Discriminators(config)


def voice(rows: int, seed: int) -> Tensor:
    """Harmonics of a gliding pitch: as far from noise as speech is. [B, S]."""
    generator = torch.Generator().manual_seed(seed)
    begin, end = (80 + 150 * torch.rand(rows, 1, generator=generator) for _ in range(2))
    time = torch.linspace(0, 1, SAMPLES)
    phase = 2 * math.pi / SAMPLE_RATE * (begin + (end - begin) * time).cumsum(1)
    return 0.1 * torch.stack([(k * phase).sin() / k for k in range(1, 12)]).sum(0)


def hiss(rows: int, seed: int) -> Tensor:
    """Noise of the same level. [B, S]."""
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(rows, SAMPLES, generator=generator)


def logits(verdicts: list[Verdict]) -> Tensor:
    return torch.stack([verdict.logits.mean() for verdict in verdicts])


def test_each_gives_a_logit_a_patch_and_a_feature_a_layer() -> None:
    verdicts = build()(voice(2, 0))
    assert len(verdicts) == 2
    for verdict, window in zip(verdicts, CONFIG.windows, strict=True):
        frames, bins = SAMPLES // (window // 4) + 1, window // 2 + 1
        for feature in verdict.features:
            bins = -(-bins // 2)
            assert feature.shape == (2, 8, frames, bins)
        assert len(verdict.features) == 4
        assert verdict.logits.shape == (2, frames, bins)


def test_they_learn_to_tell_noise_from_a_voice() -> None:
    judges = build()
    optimizer = torch.optim.AdamW(judges.parameters(), lr=3e-3, betas=(0.8, 0.99))
    losses = []
    for step in range(25):
        real, decoded = judges(voice(4, step)), judges(hiss(4, step))
        loss = discriminator_loss(real, decoded, "hinge")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.5 and losses[-1] < 0.5
    with torch.no_grad():
        unseen, noise = judges(voice(4, 1000)), judges(hiss(4, 1000))
    assert bool((logits(unseen) > logits(noise) + 1).all())
    assert float(generator_loss(unseen, "hinge")) < 0.5 * float(generator_loss(noise, "hinge"))


def test_a_sound_is_judged_by_itself() -> None:
    judges, rows = build(), voice(3, 1)
    together, alone = judges(rows), judges(rows[1:2])
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.logits[1:2], b.logits, rtol=0, atol=1e-5)
        for x, y in zip(a.features, b.features, strict=True):
            torch.testing.assert_close(x[1:2], y, rtol=0, atol=1e-5)


def test_they_hear_phase_and_quiet_sounds() -> None:
    judges, pcm = build(), voice(1, 2)
    assert not torch.allclose(judges(pcm)[0].logits, judges(-pcm)[0].logits, atol=1e-3)
    # Compressed magnitudes: 40 dB down, a sound still makes a sixteenth of the impression.
    for judge in judges.judges:
        loud, quiet = judge.spectrogram(pcm), judge.spectrogram(0.01 * pcm)
        assert 0.2 < float(quiet.abs().max() / loud.abs().max()) < 0.3


@pytest.mark.parametrize("pcm", [torch.zeros(2, 1920), 1e4 * torch.ones(1, 1920), torch.ones(1, 1)])
def test_any_sound_gives_finite_gradients(pcm: Tensor) -> None:
    judges, decoded = build(), pcm.clone().requires_grad_()
    loss = generator_loss(judges(decoded), "lsgan") + discriminator_loss(
        judges(pcm), judges(decoded), "lsgan"
    )
    loss.backward()
    assert decoded.grad is not None and bool(decoded.grad.isfinite().all())
    for name, parameter in judges.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name


def test_half_precision_judges_alike() -> None:
    judges, pcm = build(), voice(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        half = judges(pcm)
    for a, b in zip(half, judges(pcm), strict=True):
        assert a.logits.dtype == torch.float32 and a.features[0].dtype == torch.bfloat16
        torch.testing.assert_close(a.logits, b.logits, rtol=0.1, atol=0.02)


def test_the_default_is_as_large_as_it_says() -> None:
    size = sum(p.numel() for p in build(DiscriminatorConfig()).parameters())
    assert size == pytest.approx(0.25e6, rel=0.05)


@pytest.mark.parametrize("windows", [(), (100, 66), (32,), (-512,)])
def test_windows_that_cannot_be_are_refused(windows: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match="windows"):
        DiscriminatorConfig(windows=windows)


@pytest.mark.gpu
def test_a_gpu_judges_as_the_cpu_does() -> None:
    judges, pcm = build(), voice(2, 5)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        there = judges.cuda()(pcm.cuda())
    for a, b in zip(there, build()(pcm), strict=True):
        torch.testing.assert_close(a.logits.cpu(), b.logits, rtol=1e-3, atol=1e-3)
        for x, y in zip(a.features, b.features, strict=True):
            torch.testing.assert_close(x.cpu(), y, rtol=1e-3, atol=1e-3)
