"""The spectral distance: nothing for the same sound, finite everywhere, fair to quiet sounds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from audio_codec.losses import MultiScaleMel


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
