"""The criteria: nothing for the same sound, finite everywhere, fair to each other and the quiet."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from audio_codec.discriminators import DiscriminatorConfig, Discriminators, Verdict
from audio_codec.losses import (
    AdversarialLoss,
    Balancer,
    Distillation,
    MultiScaleMel,
    discriminator_loss,
    feature_matching,
    generator_loss,
    pool_frames,
)


@pytest.fixture(scope="module")
def criterion() -> MultiScaleMel:
    return MultiScaleMel()


def sound(rows: int = 2, samples: int = 7200, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(rows, samples, generator=torch.Generator().manual_seed(seed))


def test_the_same_sound_is_at_no_distance(criterion: MultiScaleMel) -> None:
    assert float(criterion(sound(), sound())) == 0
    silence = torch.zeros(1, 7200)
    assert float(criterion(silence, silence)) == 0


def test_distance_is_symmetric_positive_and_grows(criterion: MultiScaleMel) -> None:
    a, b = sound(), sound(seed=1)
    assert float(criterion(a, b)) == pytest.approx(float(criterion(b, a)), rel=1e-6)
    distances = [float(criterion(a + share * b, a)) for share in (0.0, 0.01, 0.1, 1.0)]
    assert distances == sorted(distances) and distances[1] > 0


def test_a_gain_costs_its_logarithm_at_any_level(criterion: MultiScaleMel) -> None:
    # Well above the floor the distance of x and 2x is log 2, loud or quiet.
    for level in (1.0, 10.0):
        x = level * sound()
        assert float(criterion(2 * x, x)) == pytest.approx(0.693, abs=0.02)


@pytest.mark.parametrize("original", ["silence", "sound"])
@pytest.mark.parametrize("decoded", [0.0, 1e-30, 1e-4, 1.0, 1e4])
def test_the_gradient_is_finite_on_silence_and_extremes(
    criterion: MultiScaleMel, original: str, decoded: float
) -> None:
    target = sound() if original == "sound" else torch.zeros(2, 7200)
    guess = (decoded * sound(seed=1)).requires_grad_()
    criterion(guess, target).backward()
    assert guess.grad is not None and bool(guess.grad.isfinite().all())


def test_a_step_against_the_gradient_comes_closer(criterion: MultiScaleMel) -> None:
    target, guess = sound(), sound(seed=1).requires_grad_()
    before = criterion(guess, target)
    (grad,) = torch.autograd.grad(before, guess)
    after = criterion(guess - 1e-3 * grad / grad.norm(), target)
    assert float(after.detach()) < float(before.detach())


def test_the_gradient_is_that_of_the_loss() -> None:
    criterion = MultiScaleMel(((64, 8), (128, 16)))
    guess, target = sound(1, 300).requires_grad_(), sound(1, 300, 1)
    (grad,) = torch.autograd.grad(criterion(guess, target), guess)
    step = grad / grad.norm()
    up, down = (criterion((guess + e * step).detach(), target) for e in (1e-3, -1e-3))
    assert float(grad.norm()) == pytest.approx(float((up - down) / 2e-3), rel=0.02)


def test_envelopes_are_judged_by_their_loud_parts(criterion: MultiScaleMel) -> None:
    both = MultiScaleMel(envelopes=1.0)
    original = sound(2, 24_000)
    original[:, 12_000:] *= 0.05  # the second half is 26 dB softer
    for loud in (True, False):
        part = slice(0, 12_000) if loud else slice(12_000, None)
        spoiled = original.clone()
        spoiled[:, part] *= 0.5
        by_logarithm = criterion(spoiled, original)
        by_envelope = both(spoiled, original) - by_logarithm
        assert float(by_logarithm) == pytest.approx(math.log(2) / 2, rel=0.15)  # above the floor
        assert float(by_envelope) == pytest.approx(0.5 if loud else 0.025, rel=0.1)
    assert float(both(original, original)) < 1e-3
    quiet = both(1e-6 * original, torch.zeros_like(original))  # no band has anything in it
    assert float(quiet) < 0.1


@pytest.mark.parametrize("samples", [1, 63, 255, 1920])
def test_sound_shorter_than_a_window_will_do(criterion: MultiScaleMel, samples: int) -> None:
    a, b = sound(1, samples), sound(1, samples, 1)
    assert float(criterion(a, b)) > 0


def test_every_scale_has_its_bands_and_a_hop_of_a_quarter(criterion: MultiScaleMel) -> None:
    shapes = [tuple(x.shape) for x in criterion.spectra(sound())]
    assert shapes == [(2, 113, 20), (2, 57, 40), (2, 29, 80), (2, 15, 160)]
    assert not criterion.state_dict()  # nothing to store


def test_it_hears_a_change_of_one_row_only(criterion: MultiScaleMel) -> None:
    a, b = sound(), sound()
    b[1] = sound(seed=2)[1]
    guess = a.clone().requires_grad_()
    criterion(guess, b).backward()
    assert guess.grad is not None
    assert bool((guess.grad[0] == 0).all()) and bool((guess.grad[1] != 0).any())


# --- Adversarial ----------------------------------------------------------------------------------


def verdicts(*values: float, rows: int = 2) -> list[Verdict]:
    """Discriminators that say the same everywhere."""
    return [
        Verdict(torch.full((rows, 3, 4), value), [torch.full((rows, 2, 3, 4), value + 0.5)])
        for value in values
    ]


@pytest.mark.parametrize(("kind", "no"), [("hinge", -1.0), ("lsgan", 0.0)])
def test_discriminators_that_tell_the_two_apart_have_no_loss(
    kind: AdversarialLoss, no: float
) -> None:
    yes, wrong = verdicts(1.0, 1.0), verdicts(no, no)
    assert float(discriminator_loss(yes, wrong, kind)) == 0
    assert float(generator_loss(yes, kind)) == 0
    losses = [float(generator_loss(verdicts(v, v), kind)) for v in (0.9, 0.5, 0.0, -1.0)]
    assert losses == sorted(losses) and losses[0] > 0
    assert float(discriminator_loss(wrong, yes, kind)) > 1
    # Half the discriminators fooled: half the loss.
    half = float(generator_loss(verdicts(1.0, 0.0), kind))
    assert half == pytest.approx(float(generator_loss(verdicts(0.0), kind)) / 2)


def test_features_match_relative_to_their_size_on_real_sound() -> None:
    def of(*scales: float) -> list[Verdict]:
        layers = [scale * sound(2, 12, i).view(2, 2, 3, 2) for i, scale in enumerate(scales)]
        return [Verdict(torch.zeros(2, 3, 2), layers)]

    assert float(feature_matching(of(1, 1), of(1, 1))) == 0
    assert float(feature_matching(of(1, 1), of(2, 2))) == pytest.approx(1, rel=1e-5)
    assert float(feature_matching(of(1, 1), of(2, 1))) == pytest.approx(0.5, rel=1e-5)
    assert float(feature_matching(of(9, 70), of(18, 140))) == pytest.approx(1, rel=1e-5)
    dead = [Verdict(torch.zeros(2, 3, 2), [torch.zeros(2, 2, 3, 2)])]
    assert float(feature_matching(dead, dead)) == 0


def test_matching_features_moves_the_decoded_side_alone() -> None:
    real, decoded = sound(2, 8).requires_grad_(), sound(2, 8, 1).requires_grad_()
    one, other = ([Verdict(x, [x * 2])] for x in (real, decoded))
    feature_matching(one, other).backward()
    assert real.grad is None and decoded.grad is not None and bool(decoded.grad.any())


def test_listening_to_discriminators_makes_sound_more_real() -> None:
    """A free waveform against fixed judges: both criteria fall."""
    torch.manual_seed(1)
    judges = Discriminators(DiscriminatorConfig(windows=(128, 64), channels=8))
    target, guess = sound(1, 1920), sound(1, 1920, 1).requires_grad_()
    real = judges(target)
    balancer = Balancer({"features": 2.0, "adversarial": 1.0}, "features", 1.0)
    optimizer = torch.optim.Adam([guess], lr=5e-3)
    history = []
    for _ in range(25):
        made = judges(guess)
        losses = {
            "features": feature_matching(real, made),
            "adversarial": generator_loss(made, "hinge"),
        }
        guess.grad = balancer(losses, guess)
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    assert history[-1]["features"] < 0.8 * history[0]["features"]
    assert history[-1]["adversarial"] < history[0]["adversarial"]


# --- Balancer -------------------------------------------------------------------------------------

WEIGHTS = {"mel": 2.0, "adversarial": 1.0, "features": 5.0}


def pulls(scales: Mapping[str, float], strength: float = 1.0, steps: int = 3) -> list[Tensor]:
    """What a balancer makes of three losses of fixed shapes and the given scales."""
    balancer, found = Balancer(WEIGHTS, "mel", strength), []
    for step in range(steps):
        output = sound(3, 50, step).requires_grad_()
        raw = {
            "mel": (output - 1).abs().mean(),
            "adversarial": output.square().sum(),
            "features": (3 * output).cos().mean(),
        }
        losses = {name: scales[name] * raw[name] for name in scales}
        found.append(balancer(losses, output))
    return found


scale = st.floats(1e-3, 1e3)


@settings(max_examples=20, deadline=None)
@given(adversarial=scale, features=scale, mel=scale)
def test_the_scale_of_a_loss_does_not_matter(
    adversarial: float, features: float, mel: float
) -> None:
    plain = pulls({"mel": 1.0, "adversarial": 1.0, "features": 1.0})
    scaled = pulls({"mel": 1.0, "adversarial": adversarial, "features": features})
    louder = pulls({"mel": mel, "adversarial": adversarial, "features": features})
    for a, b, c in zip(plain, scaled, louder, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(a.abs().max()))
        torch.testing.assert_close(mel * a, c, rtol=1e-3, atol=1e-5 * mel * float(a.abs().max()))


def test_each_loss_pulls_with_its_share_and_all_as_hard_as_the_reference_would() -> None:
    balancer = Balancer(WEIGHTS, "mel", 15.0)
    output = torch.zeros(2, 3).requires_grad_()
    # Gradients along three axes, so that each loss's part can be read off.
    losses = {
        name: factor * output[:, axis].sum()
        for axis, (name, factor) in enumerate(
            [("mel", 0.5), ("adversarial", 300.0), ("features", 1e-4)]
        )
    }
    pulled = balancer(losses, output)
    expected = 15 * 0.5 * torch.tensor([2.0, 1.0, 5.0]) / 8
    torch.testing.assert_close(pulled, expected.expand(2, 3))
    # Those that are absent leave their share to the others: alone, mel has its old weight.
    alone = balancer({"mel": losses["mel"]}, output)
    torch.testing.assert_close(alone, torch.tensor([7.5, 0.0, 0.0]).expand(2, 3))
    assert output.grad is None


def test_a_sudden_gradient_is_measured_by_the_average() -> None:
    balancer = Balancer({"mel": 1.0, "adversarial": 1.0}, "mel", decay=0.9)
    output = torch.zeros(1, 2).requires_grad_()

    def pull(adversarial: float) -> float:
        losses = {"mel": output[:, 0].sum(), "adversarial": adversarial * output[:, 1].sum()}
        return float(balancer(losses, output)[0, 1])

    assert [pull(1.0) for _ in range(30)] == pytest.approx([0.5] * 30)
    assert pull(10.0) > 2  # it is as loud as it is; only what lasts is evened out
    settled = [pull(10.0) for _ in range(80)][-1]
    assert settled == pytest.approx(0.5, rel=0.01)


def test_a_balancer_goes_on_from_its_state() -> None:
    one, other = Balancer(WEIGHTS, "mel"), Balancer(WEIGHTS, "mel")
    output = sound(2, 9).requires_grad_()
    losses = {"mel": output.abs().sum(), "features": output.square().sum()}
    for _ in range(3):
        one(losses, output)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(losses, output), other(losses, output))


def test_a_gradient_that_is_no_number_does_not_stay_in_the_average() -> None:
    one, other = (Balancer({"mel": 1.0, "adversarial": 1.0}, "mel") for _ in range(2))
    output = sound(2, 9).requires_grad_()
    mel, adversarial = output.abs().sum(), output.square().sum()
    for balancer in (one, other):
        balancer({"mel": mel, "adversarial": adversarial}, output)
    spoilt = one({"mel": mel, "adversarial": float("inf") * adversarial}, output)
    other({"mel": mel}, output)
    assert not bool(spoilt.isfinite().all())  # such a gradient is its user's affair
    again = [b({"mel": mel, "adversarial": adversarial}, output) for b in (one, other)]
    assert bool(again[0].isfinite().all()) and torch.equal(*again)


def test_a_loss_without_a_gradient_is_no_trouble() -> None:
    balancer = Balancer({"mel": 1.0, "adversarial": 1.0}, "mel")
    output = torch.zeros(1, 4).requires_grad_()
    pulled = balancer({"mel": output.sum(), "adversarial": 0 * output.sum()}, output)
    assert bool(pulled.isfinite().all()) and bool((pulled > 0).all())


# --- Distillation ---------------------------------------------------------------------------------


def test_pooling_centres_each_frame_on_its_own_time() -> None:
    ramp = torch.arange(40.0).view(1, 40, 1).expand(2, 40, 3)  # 50 Hz for 0.8 s
    pooled = pool_frames(ramp, 10)
    assert pooled.shape == (2, 10, 3)
    # The mean of eight from two before a frame's four to two after: the middle of the frame.
    torch.testing.assert_close(pooled[0, 1:-1, 0], 4 * torch.arange(1.0, 9) + 1.5)
    torch.testing.assert_close(pool_frames(torch.ones(1, 40, 2), 10), torch.ones(1, 10, 2))


@pytest.mark.parametrize("frames", [10, 20, 39, 41, 100])
def test_pooling_takes_teachers_of_any_rate(frames: int) -> None:
    time = (torch.arange(frames) + 0.5) / frames
    pooled = pool_frames(time.view(1, frames, 1), 10)
    torch.testing.assert_close(
        pooled[0, 1:-1, 0], (torch.arange(1, 9) + 0.5) / 10, rtol=0, atol=2e-3
    )


def test_distillation_is_nothing_when_student_and_teacher_point_alike() -> None:
    distillation = Distillation(6, 4)
    steady = sound(2, 6).view(2, 1, 6).expand(-1, 10, -1)
    with torch.no_grad():
        taught = 7 * distillation.project(steady).repeat_interleave(4, 1)
        assert float(distillation(steady, taught)) == pytest.approx(0, abs=1e-5)
        assert float(distillation(steady, -taught)) == pytest.approx(2, abs=1e-5)


def test_distillation_teaches_the_student() -> None:
    distillation = Distillation(6, 4)
    semantic = sound(2, 60).view(2, 10, 6).requires_grad_()
    taught = sound(2, 160, 1).view(2, 40, 4)
    before = distillation(semantic, taught)
    (grad,) = torch.autograd.grad(before, semantic)
    after = distillation(semantic - 0.02 * grad / grad.norm(), taught)
    assert float(after.detach()) < float(before.detach())
