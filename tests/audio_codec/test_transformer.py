"""The transformer: streaming past every wrap, packing, grouped heads, rotary positions, kernels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from streams import (
    MAX_CHUNK,
    Streaming,
    Tick,
    assert_streams,
    chunkings,
    scripts,
    streaming_settings,
)
from torch import Tensor

from audio_codec import attention, transformer
from audio_codec.attention import _BLOCK, attend, by_products
from audio_codec.transformer import Transformer, TransformerConfig, rotary, rotate

DIM = 16
WINDOW = 5

CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "grouped": {"heads": 4, "kv_heads": 2},
    "multi_query": {"heads": 4, "kv_heads": 1},
    "plain": {"norm": "layer", "gated": False, "rope": False, "layer_scale": 0.5},
    "bare": {"final_norm": False},
    "window_of_one": {"window": 1},
}


def build(dtype: torch.dtype = torch.float64, **changes: Any) -> Transformer:
    torch.manual_seed(3)
    fields: dict[str, Any] = {"dim": DIM, "layers": 2, "heads": 2, "window": WINDOW, **changes}
    module = Transformer(TransformerConfig(**fields))
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:  # larger than the usual start, so that attention matters
            torch.nn.init.normal_(parameter, std=0.4)
        elif "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return module.to(dtype).eval()


def noise(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# --- Streaming ------------------------------------------------------------------------------------


def streaming(module: Transformer, dtype: torch.dtype, tolerance: float) -> Streaming:
    generator = torch.Generator().manual_seed(4)
    return Streaming(
        module,
        module.new_state,
        lambda n: torch.randn(1, n, DIM, generator=generator, dtype=dtype),
        tolerance=tolerance,
    )


@pytest.mark.parametrize("name", CONFIGS)
@streaming_settings
@given(chunks=chunkings(16), script=scripts())
def test_streaming(name: str, chunks: list[int], script: list[Tick]) -> None:
    assert_streams(streaming(build(**CONFIGS[name]), torch.float64, 1e-9), chunks, script)


@streaming_settings
@given(chunks=chunkings(16), script=scripts())
def test_streaming_in_float32(chunks: list[int], script: list[Tick]) -> None:
    assert_streams(streaming(build(torch.float32), torch.float32, 1e-4), chunks, script)


@pytest.mark.parametrize("chunk", [2, 3, 4, 7])
@torch.no_grad()
def test_long_chunks_after_the_ring_has_wrapped(chunk: int) -> None:
    # A ring of exactly `window` entries would lose keys here that the chunk's first queries see.
    module = build()
    x = noise(2, 8 * chunk, DIM)
    state = module.new_state(2, chunk)
    assert state.layers[0].key.shape[2] == WINDOW + chunk - 1 < x.shape[1] / 2
    parts = [module(part, state) for part in x.split(chunk, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), module(x), rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_chunk_longer_than_the_state_was_made_for_is_refused() -> None:
    module = build()
    with pytest.raises(AssertionError, match="chunk of 3"):
        module(noise(1, 3, DIM), module.new_state(1, 2))


def test_only_a_causal_transformer_with_a_window_streams() -> None:
    with pytest.raises(AssertionError, match="window"):
        build(window=None).new_state(1)
    with pytest.raises(AssertionError, match="causal"):
        build(causal=False).new_state(1)


@torch.no_grad()
def test_the_window_is_as_long_as_it_says() -> None:
    module = build(layers=1)
    x = noise(1, 12, DIM)
    other = x.clone()
    other[:, 3] += 1
    changed = (module(x) != module(other)).any(-1)[0].nonzero().flatten().tolist()
    assert changed == list(range(3, 3 + WINDOW))


@torch.no_grad()
def test_without_causality_the_window_reaches_both_ways() -> None:
    module = build(layers=1, causal=False)
    x = noise(1, 16, DIM)
    other = x.clone()
    other[:, 8] += 1
    changed = (module(x) != module(other)).any(-1)[0].nonzero().flatten().tolist()
    assert changed == list(range(8 - WINDOW + 1, 8 + WINDOW))


@torch.no_grad()
def test_a_long_window_or_none_is_plain_causal_attention() -> None:
    x = noise(2, 9, DIM)
    torch.testing.assert_close(build(window=9)(x), build(window=None)(x))
    torch.testing.assert_close(build(window=100)(x), build(window=None)(x))
    assert not torch.allclose(build(window=8)(x), build(window=None)(x))


# --- Packing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"window": None}, {"causal": False}, {"rope": False}])
@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5))
@example(lengths=[1, 1, 1])
@torch.no_grad()
def test_packed_documents_are_what_they_are_alone(
    changes: dict[str, Any], lengths: list[int]
) -> None:
    module = build(**changes)
    documents = [noise(1, length, DIM, seed=i) for i, length in enumerate(lengths)]
    # Numbers need not rise; the second row packs the same documents in reverse.
    numbers = [7 * (i + 1) % 11 for i in range(len(lengths))]
    order = list(range(len(lengths)))
    rows = [torch.cat([documents[i] for i in way], 1) for way in (order, order[::-1])]
    segments = [
        torch.cat([torch.full((1, lengths[i]), numbers[i]) for i in way], 1)
        for way in (order, order[::-1])
    ]
    packed = module(torch.cat(rows), segments=torch.cat(segments))
    for row, way in zip(packed, (order, order[::-1]), strict=True):
        parts = row.split([lengths[i] for i in way])
        for index, part in zip(way, parts, strict=True):
            torch.testing.assert_close(part, module(documents[index])[0], rtol=0, atol=1e-10)


# --- Heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2])
@torch.no_grad()
def test_grouped_heads_are_expanded_heads(kv_heads: int) -> None:
    grouped, expanded = build(heads=4, kv_heads=kv_heads), build(heads=4)
    size = DIM // 4
    weights = grouped.state_dict()
    for name in [name for name in weights if name.endswith("qkv.weight")]:
        q, k, v = weights[name].split((DIM, kv_heads * size, kv_heads * size))
        k, v = (
            part.view(kv_heads, size, DIM).repeat_interleave(4 // kv_heads, 0).reshape(DIM, DIM)
            for part in (k, v)
        )
        weights[name] = torch.cat((q, k, v))
    expanded.load_state_dict(weights)
    x = noise(2, 11, DIM)
    torch.testing.assert_close(grouped(x), expanded(x))
    ring = grouped.new_state(3).layers[0].key
    assert ring.shape == (3, kv_heads, WINDOW, size)  # the ring is not expanded


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("masking", ["none", "causal", "mask"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_both_kernels_agree(kv_heads: int, masking: str, dtype: torch.dtype) -> None:
    time = 7
    query, key, value = (
        noise(2, heads, time, 8, seed=seed).to(dtype).requires_grad_()
        for seed, heads in enumerate((4, kv_heads, kv_heads))
    )
    mask = None
    if masking == "mask":
        mask = (torch.rand(2, 1, time, time) < 0.5) | torch.eye(time, dtype=torch.bool)
    out = noise(2, 4, time, 8, seed=9).to(dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-2}[dtype]
    results = []
    for kernel in (torch.nn.functional.scaled_dot_product_attention, by_products, attend):
        if kernel in (by_products, attend):
            y = kernel(query, key, value, mask, masking == "causal")
        else:
            y = kernel(
                query, key, value, mask, is_causal=masking == "causal", enable_gqa=kv_heads != 4
            )
        assert y.dtype == dtype
        results.append((y, *torch.autograd.grad((y * out).sum(), (query, key, value))))
    for mine in results[1:]:
        for a, b in zip(mine, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_of_queries_ask_all_that_came_before(kv_heads: int, masked: bool) -> None:
    time = 2 * _BLOCK + 3  # two whole blocks and a short one
    query, key, value = (
        noise(2, heads, time, 4, seed=seed).double().requires_grad_()
        for seed, heads in enumerate((4, kv_heads, kv_heads))
    )
    seen = torch.ones(time, time, dtype=torch.bool).tril()
    if masked:  # of two documents, the second begins inside a block
        late = torch.arange(time) >= _BLOCK + 5
        seen = (seen & (late[:, None] == late)).expand(2, 1, time, time)
    plain = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, enable_gqa=kv_heads != 4
    )
    mine = by_products(query, key, value, seen if masked else None, causal=True)
    out = noise(*plain.shape, seed=9).double()
    for y, expected in zip(
        (mine, *torch.autograd.grad((mine * out).sum(), (query, key, value))),
        (plain, *torch.autograd.grad((plain * out).sum(), (query, key, value))),
        strict=True,
    ):
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize(
    ("dtype", "lower", "tolerance"),
    [
        (torch.float64, False, 1e-11),
        (torch.float32, False, 1e-4),
        (torch.float32, True, 0.2),
    ],
)
def test_what_is_done_by_hand_is_what_autograd_does(
    monkeypatch: pytest.MonkeyPatch,
    norm: str,
    rope: bool,
    dtype: torch.dtype,
    lower: bool,
    tolerance: float,
) -> None:
    module = build(window=50, kv_heads=2, norm=norm, rope=rope).to(dtype)
    x = noise(2, 11, DIM).to(dtype).requires_grad_()
    segments = torch.tensor([[0] * 4 + [1] * 7, [0] * 11])
    found = []
    for by_hand in (True, False):
        if not by_hand:
            monkeypatch.setattr(transformer, "_by_hand", lambda x: False)
            monkeypatch.setattr(attention, "_KEPT", 0)
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            y = module(x, segments=segments)
        loss = (y * noise(*y.shape, seed=3).to(dtype)).sum()
        found.append((y, *torch.autograd.grad(loss, (x, *module.parameters()))))
    for mine, plain in zip(*found, strict=True):
        assert (mine - plain).norm() <= tolerance * plain.norm()


@torch.no_grad()
def test_a_stream_of_known_length_needs_no_window_of_keys() -> None:
    module = build(window=50)
    x = noise(2, 12, DIM)
    state = module.new_state(2, length=12)
    assert state.layers[0].key.shape[2] == 12
    parts = [module(part, state) for part in x.split((7, 1, 4), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), module(x))
    # Rows may be set back behind what was read too far: it is written over before it is seen.
    state.offset.copy_(torch.tensor([3, 5]))
    again = module(x[:, :2], state)
    for row, (past, out) in enumerate(zip((3, 5), again, strict=True)):
        whole = torch.cat((x[row : row + 1, :past], x[row : row + 1, :2]), 1)
        torch.testing.assert_close(out, module(whole)[0, past:])


@torch.no_grad()
def test_a_clock_of_its_own_turns_positions_and_hides_none() -> None:
    module = build(window=50)
    x = noise(2, 9, DIM)
    count = torch.arange(9.0).expand(2, 9)
    torch.testing.assert_close(module(x, clock=count), module(x))
    # Only differences count; another tempo is heard.
    torch.testing.assert_close(module(x, clock=count + 17.5), module(x), rtol=1e-4, atol=1e-5)
    slow = module(x, clock=count * 0.3)
    assert not torch.allclose(slow, module(x), atol=1e-3)
    state = module.new_state(2, length=9)
    parts = [module(x[:, at], state, clock=count[:, at] * 0.3) for at in (slice(4), slice(4, 9))]
    torch.testing.assert_close(torch.cat(parts, 1), slow)


# --- Rotary positions -----------------------------------------------------------------------------


def test_rotation_keeps_lengths_and_only_differences_count() -> None:
    q, k = noise(1, 1, 1, 64), noise(1, 1, 1, 64, seed=1)

    def score(at: int, back: int) -> Tensor:
        rotations = (rotary(torch.tensor([[p]]), 64, 1e4).unsqueeze(2) for p in (at, at - back))
        turned_q, turned_k = (rotate(x, r) for x, r in zip((q, k), rotations, strict=True))
        torch.testing.assert_close(turned_q.norm(), q.norm())
        return (turned_q * turned_k).sum()

    for back in (0, 1, 17, 749):
        torch.testing.assert_close(score(1_000_000, back), score(back, back), rtol=0, atol=1e-9)
    assert not torch.allclose(score(749, 749), score(749, 0))


def test_a_float32_model_does_not_drift_at_position_a_million() -> None:
    # In float32 all the way, position 10⁶ would be off by up to 0.06 rad; float64 angles leave
    # the rounding of the final sine and cosine.
    q, k = noise(1, 1, 1, 64).float(), noise(1, 1, 1, 64, seed=1).float()
    exact = (rotate(q.double(), rotary(torch.tensor([[5]]), 64, 1e4).unsqueeze(2)) * k).sum()
    far = [rotary(torch.tensor([[p]]), 64, 1e4).unsqueeze(2) for p in (1_000_005, 1_000_000)]
    found = (rotate(q, far[0]) * rotate(k, far[1])).sum()
    assert found.dtype == torch.float32
    assert abs(float(found - exact)) < 1e-5


@torch.no_grad()
def test_a_stream_sounds_the_same_after_a_million_positions() -> None:
    module = build(torch.float32)
    x = noise(1, 8 * WINDOW, DIM, dtype=torch.float32)
    early, late = module.new_state(1, MAX_CHUNK), module.new_state(1, MAX_CHUNK)
    late.offset += 1_000_000
    outs = [
        torch.cat([module(part, state) for part in x.split(MAX_CHUNK, 1)], 1)
        for state in (early, late)
    ]
    # By now no layer sees back to the start, where one stream had a past of silence.
    settled = [out[:, 2 * WINDOW :] for out in outs]
    torch.testing.assert_close(settled[1], settled[0], rtol=0, atol=1e-4)


@torch.no_grad()
def test_positions_matter_with_rope_and_not_without() -> None:
    x = noise(1, 4, DIM)
    swapped = x[:, [1, 0, 2, 3]]
    last = [build(rope=rope, layers=1)(x)[:, 3] for rope in (True, False)]
    other = [build(rope=rope, layers=1)(swapped)[:, 3] for rope in (True, False)]
    assert not torch.allclose(last[0], other[0])
    torch.testing.assert_close(last[1], other[1])


# --- Config ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"heads": 3}, "dim=16"),
        ({"heads": 16}, "dim=16"),  # a head of one number cannot be rotated
        ({"heads": 4, "kv_heads": 3}, "kv_heads=3"),
        ({"heads": 2, "kv_heads": 4}, "kv_heads=4"),
        ({"window": 0}, "window"),
        ({"layers": 0}, "layers"),
        ({"windw": 3}, "windw"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        TransformerConfig(**{"dim": 16, "layers": 1, "heads": 2, **changes})


def test_the_final_norm_may_be_left_away() -> None:
    normed, bare = build(), build(final_norm=False)
    weights = normed.state_dict()
    assert weights.keys() - bare.state_dict().keys() == {"norm.weight"}
    bare.load_state_dict({name: weights[name] for name in bare.state_dict()})
    x = noise(1, 6, DIM)
    torch.testing.assert_close(normed.norm(bare(x)), normed(x))


def test_widths_and_first_scales() -> None:
    assert TransformerConfig(dim=96, layers=1, heads=2).mlp_hidden == 256
    assert TransformerConfig(dim=100, layers=1, heads=2, gated=False).mlp_hidden == 400
    assert TransformerConfig(dim=100, layers=1, heads=2, hidden=7).mlp_hidden == 7
    deep = Transformer(TransformerConfig(dim=64, layers=8, heads=4))
    x = noise(1, 20, 64, dtype=torch.float32)
    rms = float(deep.norm(x).detach().square().mean().sqrt())
    assert math.isclose(rms, 1.0, rel_tol=1e-2)
    residual = deep.blocks[0].attention.out.weight.detach().std()
    assert math.isclose(float(residual), 0.02 / 4, rel_tol=0.1)


def test_dropout_sleeps_in_inference() -> None:
    module = build(dropout=0.5)
    x = noise(1, 6, DIM)
    torch.testing.assert_close(module(x), build()(x))
    assert not torch.allclose(module.train()(x), module(x))
