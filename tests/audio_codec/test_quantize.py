"""Quantizers: codes are what they decode to, every code is reached, no codebook collapses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from audio_codec.quantize import EMAVQ, FSQ, ResidualVQ, SplitResidualVQ, entropy_bits

LEVELS = (7, 5, 5, 5, 5)

many_levels = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- FSQ ------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(levels=many_levels)
def test_every_code_goes_to_digits_and_back(levels: list[int]) -> None:
    fsq = FSQ(levels).eval()
    codes = torch.arange(fsq.size)
    values = fsq.decode(codes)
    assert values.shape == (math.prod(levels), len(levels)) and values.abs().lt(1).all()
    digits = fsq.digits(values)
    assert torch.equal(fsq.codes(digits), codes)
    assert torch.equal(fsq.values(digits), values)
    assert len(digits.unique(dim=0)) == fsq.size
    for place, size in enumerate(levels):
        assert digits[:, place].unique().tolist() == list(range(size))


def test_the_first_digit_varies_fastest() -> None:
    fsq = FSQ((7, 5, 3))
    assert fsq.codes(torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [6, 4, 2]])).tolist() == [
        1,
        7,
        35,
        104,
    ]


@settings(max_examples=30, deadline=None)
@given(levels=many_levels, scale=st.floats(0, 1e6), seed=st.integers(0, 9))
def test_any_input_gets_a_code_that_decodes_to_its_value(
    levels: list[int], scale: float, seed: int
) -> None:
    fsq = FSQ(levels).eval()
    values, codes = fsq(scale * noise(4, 6, len(levels), seed=seed))
    assert codes.min() >= 0 and codes.max() < fsq.size
    torch.testing.assert_close(values, fsq.decode(codes))
    # A value is the middle of its level, so coding it again changes nothing.
    assert torch.equal(fsq.codes(fsq.digits(values)), codes)


def test_the_far_ends_are_the_outer_levels() -> None:
    fsq = FSQ((7, 4)).eval()
    ends = torch.tensor([[-math.inf, -1e30], [math.inf, 1e30]])
    assert fsq.digits(fsq.bound(ends)).tolist() == [[0, 0], [6, 3]]


@pytest.mark.parametrize("mean", [-3.0, 0.0, 2.0])
@pytest.mark.parametrize("deviation", [0.05, 1.0, 50.0])
def test_gaussian_input_uses_the_codebook_evenly(mean: float, deviation: float) -> None:
    fsq = FSQ(LEVELS, momentum=0.1)
    x = noise(60_000, 5) * deviation + mean
    for part in x.split(300):
        fsq(part)
    for mode in (fsq.train(), fsq.eval()):
        _, codes = mode(x)
        counts = torch.bincount(codes, minlength=fsq.size)
        assert bool((counts > 0).all())
        assert entropy_bits(counts) > math.log2(fsq.size) - 0.15
    digits = fsq.digits(fsq.bound(x))
    for place, size in enumerate(LEVELS):
        share = torch.bincount(digits[:, place], minlength=size) / len(x)
        torch.testing.assert_close(share, torch.full((size,), 1 / size), rtol=0.1, atol=0)


def test_rounding_lets_the_gradient_through() -> None:
    fsq = FSQ(LEVELS).eval()
    x = noise(50, 5).requires_grad_()
    weights = noise(50, 5, seed=1)
    (rounded,) = torch.autograd.grad((fsq(x)[0] * weights).sum(), x)
    (bounded,) = torch.autograd.grad((fsq.bound(x) * weights).sum(), x)
    assert torch.equal(rounded, bounded)
    assert bool((rounded != 0).all())


def test_rows_that_are_not_quantized_pass_the_bound_alone() -> None:
    fsq = FSQ(LEVELS).eval()
    x = noise(2, 6, 5)
    values, codes = fsq(x, quantized=torch.tensor([True, False]))
    assert torch.equal(values[1], fsq.bound(x)[1])
    assert not torch.equal(values[0], fsq.bound(x)[0])
    torch.testing.assert_close(values[0], fsq.decode(codes[0]))
    assert torch.equal(codes, fsq(x)[1])  # codes do not depend on what is passed on


def test_padding_is_neither_counted_nor_learned_from() -> None:
    valid = torch.arange(8).expand(3, 8) < torch.tensor([[8], [3], [1]])
    x = noise(3, 8, 5)
    dirty = torch.where(valid.unsqueeze(-1), x, 1e4)
    results = []
    for given_x in (x, dirty):
        fsq = FSQ(LEVELS, momentum=0.5)
        results.append((fsq(given_x, valid)[1][valid], fsq.mean.clone(), fsq.variance.clone()))
    for clean, other in zip(*results, strict=True):
        torch.testing.assert_close(other, clean)


def test_statistics_learn_only_in_training_and_survive_one_vector() -> None:
    fsq = FSQ(LEVELS, momentum=0.5)
    fsq(noise(1, 5))  # one vector has no variance
    assert fsq.mean.eq(0).all() and fsq.variance.eq(1).all()
    fsq.eval()(noise(100, 5) + 3)
    assert fsq.mean.eq(0).all()
    fsq.train()(noise(100, 5) + 3)
    assert fsq.mean.gt(1).all()
    assert set(fsq.state_dict()) == {"mean", "variance"}


def test_a_constant_input_has_a_finite_gradient() -> None:
    fsq = FSQ(LEVELS)
    x = torch.full((10, 5), 2.0, requires_grad=True)
    fsq(x)[0].sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


# --- EMA-VQ ---------------------------------------------------------------------------------------


def clusters(count: int, each: int, dim: int = 4) -> tuple[Tensor, Tensor]:
    centres = 10 * noise(count, dim, seed=5)
    return centres, (centres.repeat(each, 1) + 0.01 * noise(count * each, dim, seed=6))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def test_nearest_is_the_nearest() -> None:
    vq = EMAVQ(4, 32).eval()
    x = noise(5, 6, 4)
    brute = (x.unsqueeze(-2) - vq.codebook).square().sum(-1).argmin(-1)
    vectors, codes, loss = vq(x)
    assert torch.equal(codes, brute) and torch.equal(vectors, vq.codebook[brute])
    assert float(loss) == 0
    assert torch.equal(vq.nearest(vq.codebook), torch.arange(32))


def test_nearest_follows_a_codebook_that_changes() -> None:
    vq = EMAVQ(4, 32).eval()
    x = noise(50, 4)

    def assert_nearest(found: EMAVQ) -> None:
        brute = torch.cdist(x, found.codebook).argmin(1)
        assert torch.equal(found.nearest(x), brute)

    assert_nearest(vq)
    vq.codebook[3:9] *= 3  # in place
    assert_nearest(vq)
    twin = copy.deepcopy(vq)
    twin.codebook.neg_().add_(1)
    assert_nearest(twin)
    assert_nearest(vq)
    vq.load_state_dict({**vq.state_dict(), "codebook": 2 * noise(32, 4, seed=8)})
    assert_nearest(vq)
    vq.codebook = 5 * noise(32, 4, seed=9)  # another tensor
    assert_nearest(vq)
    with torch.inference_mode():
        assert_nearest(vq)
        vq.codebook = vq.codebook / 2  # counts no versions
        assert_nearest(vq)
        vq.codebook[:16] *= 3
        assert_nearest(vq)


def test_the_first_training_batch_places_the_codes_by_kmeans() -> None:
    _, x = clusters(8, each=50)
    vq = EMAVQ(4, 16)
    far = (vq.eval()(x)[0] - x).square().mean()
    vq.train()
    assert not vq.ready
    _, codes, loss = vq(x, generator())
    assert vq.ready
    random_pick = x[torch.randint(len(x), (16,), generator=generator())]
    drawn = torch.cdist(x, random_pick).min(1).values.square().mean() / 4
    assert float(loss) <= float(drawn) < float(far)
    placed = vq.codebook.clone()
    vq.eval()(x)
    assert torch.equal(vq.codebook, placed)


def test_kmeans_happens_once() -> None:
    _, x = clusters(8, each=50)
    vq = EMAVQ(4, 8, decay=0.999)
    vq(x, generator())
    before = vq.codebook.clone()
    vq(x + 5, generator())
    assert float((vq.codebook - before).abs().max()) < 0.1


def test_codes_move_to_the_mean_of_what_they_catch() -> None:
    vq = EMAVQ(2, 2, decay=0.5, dead=0.0)
    vq.ready.fill_(True)
    vq.codebook.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    vq.total.copy_(vq.codebook)
    x = torch.tensor([[-3.0, 1.0], [-5.0, 1.0], [3.0, -1.0], [5.0, -1.0]])
    for _ in range(30):
        vq(x)
    torch.testing.assert_close(vq.codebook, torch.tensor([[-4.0, 1.0], [4.0, -1.0]]))


def test_dead_codes_are_revived_and_used() -> None:
    centres, x = clusters(16, each=20)
    vq = EMAVQ(4, 16, decay=0.8)
    vq.ready.fill_(True)
    # A collapsed codebook: all but one code lie where no vector is.
    vq.codebook.copy_(torch.full((16, 4), 1e3) * torch.arange(1, 17).unsqueeze(1))
    vq.codebook[0] = x.mean(0)
    vq.total.copy_(vq.codebook)
    assert vq.nearest(x).unique().numel() == 1
    draws = generator()
    for _ in range(150):
        _, codes, loss = vq(x, draws)
    assert codes.unique().numel() >= 12
    assert float(loss) < float((x - x.mean(0)).square().mean()) / 5
    assert vq.codebook.abs().max() <= x.abs().max() + 1
    assert bool(vq.codebook.isfinite().all())
    assert torch.cdist(centres, vq.codebook).min(1).values.median() < 1


def test_a_busy_codebook_is_not_restarted() -> None:
    _, x = clusters(4, each=50)
    vq = EMAVQ(4, 4)
    vq.ready.fill_(True)
    vq.codebook.copy_(x[:4])
    vq.total.copy_(vq.codebook)
    order = vq.nearest(x)
    for _ in range(50):
        vq(x, generator())
    assert torch.equal(vq.nearest(x), order)


def test_fewer_vectors_than_codes_will_do() -> None:
    vq = EMAVQ(4, 64)
    vectors, codes, loss = vq(noise(3, 4), generator())
    assert bool(vectors.isfinite().all()) and codes.max() < 64 and float(loss) < 1e-6


def test_the_commitment_pulls_the_input_and_nothing_else() -> None:
    vq = EMAVQ(4, 8)
    x = noise(40, 4).requires_grad_()
    vectors, _, loss = vq(x, generator())
    assert not vectors.requires_grad
    (grad,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(grad, 2 * (x - vectors).detach() / x.numel())
    assert not list(vq.parameters())


def test_the_same_generator_gives_the_same_codebook() -> None:
    books = []
    for _ in range(2):
        torch.manual_seed(3)
        vq = EMAVQ(4, 32, decay=0.5)
        draws = generator()
        for seed in range(5):
            vq(noise(40, 4, seed=seed), draws)
        books.append(vq.codebook)
    assert torch.equal(*books)


# --- Residual -------------------------------------------------------------------------------------


def trained(levels: int = 4) -> tuple[ResidualVQ, Tensor]:
    x = noise(8, 64, 6) @ noise(6, 6, seed=1)
    quantizer = ResidualVQ(6, (16,) * levels, decay=0.9)
    draws = generator()
    for _ in range(20):
        quantizer(x, generator=draws)
    return quantizer.eval(), x


def test_more_levels_leave_less_error() -> None:
    quantizer, x = trained()
    codes = quantizer.encode(x)
    assert codes.shape == (8, 4, 64)
    errors = [
        float((quantizer.decode(codes[:, :kept]) - x).square().mean()) for kept in range(1, 5)
    ]
    assert errors[0] < float(x.var())
    assert all(later < 0.9 * earlier for earlier, later in zip(errors, errors[1:], strict=False))


def test_forward_encode_and_decode_agree() -> None:
    quantizer, x = trained()
    straight, codes, loss = quantizer(x)
    assert torch.equal(codes, quantizer.encode(x))
    torch.testing.assert_close(straight, quantizer.decode(codes))
    assert float(loss) == 0


def test_depth_drops_levels_row_by_row() -> None:
    quantizer, x = trained()
    depth = torch.tensor([0, 1, 2, 3, 4, 4, 1, 2])
    straight, codes, _ = quantizer(x, depth)
    assert torch.equal(codes, quantizer.encode(x))
    for row, kept in enumerate(depth.tolist()):
        expected = (
            quantizer.decode(codes[row : row + 1, :kept])[0] if kept else torch.zeros_like(x[row])
        )
        torch.testing.assert_close(straight[row], expected, rtol=0, atol=1e-5)


def test_the_straight_through_gradient_is_one() -> None:
    quantizer, x = trained()
    x = x.clone().requires_grad_()
    weights = noise(*x.shape, seed=2)
    (grad,) = torch.autograd.grad((quantizer(x)[0] * weights).sum(), x)
    assert torch.equal(grad, weights)


def test_levels_can_be_left_away() -> None:
    quantizer, x = trained()
    codes = quantizer.encode(x)
    for count in (4, 2, 0):
        quantizer.keep(count)
        assert torch.equal(quantizer.encode(x), codes[:, :count])
    with pytest.raises(AssertionError, match="cannot keep 1 of 0"):
        quantizer.keep(1)


# --- Split ----------------------------------------------------------------------------------------


def trained_split() -> tuple[SplitResidualVQ, Tensor]:
    x = noise(8, 64, 12) @ noise(12, 12, seed=1)
    torch.manual_seed(2)
    quantizer = SplitResidualVQ(12, 6, (16,) * 4).requires_grad_(False)
    for side in (quantizer.semantic, quantizer.acoustic):
        side.quantizer(side.down(x), generator=generator())  # places the codes
    return quantizer.eval(), x


def test_both_sides_code_the_same_input_and_are_summed() -> None:
    quantizer, x = trained_split()
    codes = quantizer.encode(x)
    assert codes.shape == (8, 4, 64)
    assert all(book.unique().numel() > 8 for book in codes.unbind(1))
    assert torch.equal(
        codes[:, :1], quantizer.semantic.quantizer.encode(quantizer.semantic.down(x))
    )
    rest = quantizer.acoustic.quantizer.encode(quantizer.acoustic.down(x))
    assert torch.equal(codes[:, 1:], rest)  # not of what the semantic code left over
    parts = [quantizer.semantic.decode(codes[:, :1]), quantizer.acoustic.decode(codes[:, 1:])]
    torch.testing.assert_close(quantizer.decode(codes), parts[0] + parts[1])
    torch.testing.assert_close(quantizer.decode(codes[:, :1]), parts[0])
    # Neither side looks at the other's codebooks.
    quantizer.semantic.quantizer.levels[0].codebook.neg_()
    assert torch.equal(quantizer.encode(x)[:, 1:], codes[:, 1:])


def test_a_split_quantizer_keeps_its_first_codebooks() -> None:
    quantizer, x = trained_split()
    codes = quantizer.encode(x)
    for count in (4, 3, 1):
        quantizer.keep(count)
        assert torch.equal(quantizer.encode(x), codes[:, :count])
        quantizer.decode(codes[:, :count])
    with pytest.raises(AssertionError, match="4 codebooks"):
        quantizer.decode(codes)
    with pytest.raises(AssertionError, match="cannot keep 1 of 0"):
        quantizer.keep(2)


# --- Entropy --------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 64))
def test_entropy_of_even_counts_is_the_logarithm(size: int) -> None:
    assert entropy_bits(torch.full((size,), 3)) == pytest.approx(math.log2(size), abs=1e-9)


def test_entropy_of_one_code_or_none_is_nothing() -> None:
    assert entropy_bits(torch.tensor([0, 9, 0])) == pytest.approx(0)
    assert entropy_bits(torch.zeros(4)) == pytest.approx(0)
