"""The compiled layers of a live stream give what torch's layers give."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from audio_codec import kernels, layers
from audio_codec.audio import LogMel
from audio_codec.layers import ConvNeXtBlock, ConvNeXtStack, Linear, Packing, lay_out
from audio_codec.quantize import ResidualVQ
from audio_codec.spectral import Analysis, Synthesis
from audio_codec.transformer import Transformer, TransformerConfig


def as_stored(module: nn.Module) -> nn.Module:
    """The module with its matrices as a checkpoint in int8 would bring them back."""
    for part in module.modules():
        if isinstance(part, Linear):
            scale = part.weight.detach().abs().amax(1, keepdim=True) / 127
            part.weight.data = (part.weight.detach() / scale).round() * scale
    return module.eval().requires_grad_(False)


def assert_same_both_ways(
    module: nn.Module, chunks: list[Tensor], active: list[Tensor] | None = None
) -> None:
    """A stream of chunks, compiled and by torch: the same numbers, and the same state after it."""
    lay_out(module)
    ways = []
    for few in (layers.FEW, 0):
        with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
            patch.setattr(layers, "FEW", few)
            most = max(chunk.shape[1] for chunk in chunks)
            sizes = (len(chunks[0]), most) if isinstance(module, Transformer) else (len(chunks[0]),)
            state = module.new_state(*sizes)  # type: ignore[operator]
            said = []
            for number, chunk in enumerate(chunks):
                if active is not None:
                    state.active.copy_(active[number])
                y = module(chunk, state)
                said.append(torch.where(state.active.view(-1, 1, 1), y, 0))
            ways.append((torch.cat(said, 1), [t.clone() for t in state.tensors()]))
    (mine, my_state), (theirs, their_state) = ways
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    for one, other in zip(my_state, their_state, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def called(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Grows by one whenever that kernel runs."""
    calls: list[int] = []
    real = getattr(kernels, name)

    def counting(*arguments: object) -> None:
        calls.append(1)
        real(*arguments)

    monkeypatch.setattr(kernels, name, counting)
    return calls


@given(rows=st.integers(1, 13), width=st.integers(1, 70), outputs=st.integers(1, 41))
@settings(max_examples=60, deadline=None)
def test_dense_is_the_product_with_the_stored_numbers(rows: int, width: int, outputs: int) -> None:
    rng = np.random.default_rng(rows * 10_000 + width * 100 + outputs)
    matrix = rng.integers(-127, 128, (outputs, width)).astype(np.int8)
    scale, bias = rng.random((2, outputs), dtype=np.float32)
    x = rng.standard_normal((rows, width), dtype=np.float32)
    y = np.full((rows, outputs), np.nan, np.float32)
    kernels.dense(x, matrix, scale, bias, y)
    exact = x.astype(np.float64) @ (matrix * scale[:, None].astype(np.float64)).T + bias
    np.testing.assert_allclose(y, exact, rtol=1e-4, atol=1e-3)


def test_gelu_is_torchs() -> None:
    x = np.linspace(-9, 9, 20_001, dtype=np.float32)
    found = x.copy()
    kernels._gelu(found)
    expected = F.gelu(torch.from_numpy(x).double()).numpy()
    assert np.abs(found - expected).max() < 2e-6
    beyond = np.array([np.nan, np.inf, -100.0, 100.0], np.float32)
    kernels._gelu(beyond)
    assert np.isnan(beyond[0]) and beyond[1] == np.inf
    np.testing.assert_allclose(beyond[2:], [0, 100], atol=1e-4)


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_convnext_is_torchs_for_any_chunks_and_frozen_rows(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    dim, kernel = data.draw(st.sampled_from([(8, 7), (12, 5), (5, 1)]))
    batch = data.draw(st.integers(1, 3))
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    chunks = [torch.randn(batch, size, dim) for size in sizes]
    active = [torch.rand(batch) < 0.7 for _ in sizes]
    assert_same_both_ways(as_stored(ConvNeXtStack(dim, 2, kernel)), chunks, active)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_block_is_torchs_past_every_wrap_of_its_ring(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    heads, groups = data.draw(st.sampled_from([(2, 2), (4, 2), (4, 1)]))
    config = TransformerConfig(
        dim=16,
        layers=2,
        heads=heads,
        kv_heads=groups,
        norm=data.draw(st.sampled_from(["rms", "layer"])),
        gated=data.draw(st.booleans()),
        rope=data.draw(st.booleans()),
        bias=data.draw(st.booleans()),
        block=data.draw(st.sampled_from([1, 3])),
        window=6,
    )
    batch = data.draw(st.integers(1, 3))
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=8))
    if config.block > 1:
        sizes = [config.block] * len(sizes)
    chunks = [torch.randn(batch, size, 16) for size in sizes]
    active = [torch.rand(batch) < 0.7 for _ in sizes]
    assert_same_both_ways(as_stored(Transformer(config)), chunks, active)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_residual_codes_are_torchs(levels: int, rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    quantizer = ResidualVQ(8, [32] * levels).eval()
    lay_out(quantizer)
    x = torch.randn(1, rows, 8)
    before = x.clone()
    with torch.inference_mode():
        assert quantizer.takes(x)
        mine = quantizer.encode(x)
        quantizer.packed = None
        assert torch.equal(mine, quantizer.encode(x))
    assert torch.equal(x, before)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_sums_of_residual_codes_are_torchs(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    levels, batch, time = (data.draw(st.integers(1, 4)) for _ in range(3))
    kept = data.draw(st.integers(1, levels))
    quantizer = ResidualVQ(8, [32] * levels).eval()
    lay_out(quantizer)
    codes = torch.randint(32, (batch, kept, time))
    with torch.inference_mode():
        mine = quantizer.decode(codes)
        for wrong in (-1, 32):
            spoiled = codes.clone()
            spoiled[-1, -1, -1] = wrong
            with pytest.raises(IndexError, match="codes lie between 0 and 31"):
                quantizer.decode(spoiled)
        assert quantizer.decode(codes[:0]).shape == (0, time, 8)
        quantizer.packed = None
        torch.testing.assert_close(mine, quantizer.decode(codes), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["log-mel", "analysis", "synthesis"])
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_windows_and_spectra_are_torchs_for_any_chunks_and_frozen_rows(
    kind: str, data: st.DataObject
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    batch = data.draw(st.integers(1, 3))
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))  # hops; a window has 4
    module = {"log-mel": LogMel, "analysis": Analysis, "synthesis": Synthesis}[kind]
    made: Any = module() if kind == "log-mel" else module(960)
    shapes = {
        "log-mel": lambda hops: (batch, 1, 240 * hops),
        "analysis": lambda hops: (batch, 240 * hops),
        "synthesis": lambda hops: (batch, hops, 962),
    }
    chunks = [torch.randn(shapes[kind](size)) for size in sizes]
    active = [torch.rand(batch) < 0.7 for _ in sizes]
    ways = []
    for few in (layers.FEW, 0):
        with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
            patch.setattr(layers, "FEW", few)
            state, said = made.new_state(batch), []
            for chunk, awake in zip(chunks, active, strict=True):
                state.active.copy_(awake)
                said.append(made(chunk, state)[awake].flatten())
            ways.append((torch.cat(said), state.tensors()))
    torch.testing.assert_close(ways[0][0], ways[1][0], rtol=1e-4, atol=1e-4)
    for one, other in zip(ways[0][1], ways[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_is_not_a_number_stays_in_its_row() -> None:
    stack = as_stored(ConvNeXtStack(8, 2))
    lay_out(stack)
    x = torch.randn(3, 2, 8)
    spoiled = x.clone()
    spoiled[1] = torch.nan
    with torch.inference_mode():
        clean = stack(x, stack.new_state(3))  # type: ignore[operator]
        y = stack(spoiled, stack.new_state(3))  # type: ignore[operator]
    assert torch.equal(y[[0, 2]], clean[[0, 2]]) and y[1].isnan().all()


class TestPacking:
    def test_lay_out_packs_what_was_stored_in_int8_alone(self) -> None:
        stored, plain = as_stored(ConvNeXtStack(8, 1)), ConvNeXtStack(8, 1)
        for module in (stored, plain):
            lay_out(module)
        packed = [m.packed is not None for m in stored.modules() if isinstance(m, Packing)]
        assert packed == [True] * 3
        assert not any(m.packed for m in plain.modules() if isinstance(m, Packing))

    def test_a_block_with_more_than_the_kernel_knows_stays_torchs(self) -> None:
        for options in ({"qk_norm": True}, {"layer_scale": 0.1}, {"memory": 8}):
            model = Transformer(TransformerConfig(dim=8, layers=1, heads=2, window=4, **options))  # type: ignore[arg-type]
            lay_out(as_stored(model))
            assert model.blocks[0].packed is None, options

    def test_a_kernel_runs_for_few_rows_of_float32_without_gradients(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        linear = as_stored(Linear(6, 4))
        lay_out(linear)
        calls = called(monkeypatch, "dense")
        x = torch.randn(2, 6)
        linear(x)  # gradients could be asked for
        with torch.inference_mode():
            linear(torch.randn(layers.FEW + 1, 6))
            copy.deepcopy(linear).double()(x.double())
            assert not calls
            expected = F.linear(x, linear.weight, linear.bias)  # type: ignore[arg-type]
            torch.testing.assert_close(linear(x), expected)
            torch.testing.assert_close(linear(x[:, None]), expected[:, None])
            assert len(calls) == 2
            twin = copy.deepcopy(linear)  # which nobody has packed yet
            torch.testing.assert_close(twin(x), expected)
            assert len(calls) == 2
            lay_out(twin)
            torch.testing.assert_close(twin(x), expected)
        assert len(calls) == 3

    def test_weights_that_changed_take_torchs_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        block = as_stored(ConvNeXtBlock(8))
        lay_out(block)
        calls = called(monkeypatch, "convnext")
        x = torch.randn(1, 1, 8)
        with torch.no_grad():
            before = block(x, block.new_state(1))  # type: ignore[operator]
            assert len(calls) == 1
            for parameter in block.parameters():
                parameter.mul_(1.5)  # as a training does
            after = block(x, block.new_state(1))  # type: ignore[operator]
            assert len(calls) == 1 and not torch.allclose(before, after)
            lay_out(as_stored(block))
            torch.testing.assert_close(
                block(x, block.new_state(1)),  # type: ignore[operator]
                after,
                rtol=0.1,
                atol=0.02,
            )
        assert len(calls) == 2

    @pytest.mark.parametrize("how", ["a step of training", "another type and back", "train"])
    def test_what_no_version_tells_of_unpacks(self, how: str) -> None:
        stack = as_stored(ConvNeXtStack(8, 1))
        lay_out(stack)
        block = stack.blocks[0]  # type: ignore[union-attr, index]
        assert block.packed is not None
        stack.to("cpu")  # where it is already
        assert block.packed is not None
        if how == "a step of training":
            stack.requires_grad_(True).train()
            x = torch.randn(1, 4, 8)
            stack(x).square().sum().backward()
            torch.optim.AdamW(stack.parameters(), lr=0.1, fused=True).step()
            stack.eval()
        elif how == "train":
            stack.train().eval()
        else:
            stack.double().float()
        assert not any(m.packed for m in stack.modules() if isinstance(m, Packing))

    def test_a_matrix_with_more_to_it_is_not_packed(self) -> None:
        class Adapted(Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) + 1

        block = as_stored(ConvNeXtBlock(8))
        block.up = Adapted(8, 24)
        lay_out(as_stored(block))
        assert block.packed is None
        x = torch.randn(1, 1, 8)
        with torch.inference_mode():
            live = block(x, block.new_state(1))  # type: ignore[operator]
            torch.testing.assert_close(live, block(x))

    def test_weights_that_are_put_in_place_of_others_are_used(self) -> None:
        stack, other = as_stored(ConvNeXtStack(8, 1)), as_stored(ConvNeXtStack(8, 1))
        lay_out(stack)
        x = torch.randn(1, 1, 8)
        stack.load_state_dict(other.state_dict(), assign=True)
        with torch.inference_mode():
            y = stack(x, stack.new_state(1))  # type: ignore[operator]
            torch.testing.assert_close(y, other(x))

    def test_wrong_shapes_are_refused_before_a_loop_runs_past_them(self) -> None:
        linear, stack = as_stored(Linear(6, 4)), as_stored(ConvNeXtStack(8, 1))
        config = TransformerConfig(dim=8, layers=1, heads=2, window=4)
        transformer = as_stored(Transformer(config))
        for module in (linear, stack, transformer):
            lay_out(module)
        with torch.inference_mode():
            with pytest.raises(AssertionError, match="12"):
                linear(torch.randn(1, 12))
            for module in (stack, transformer):
                with pytest.raises(AssertionError, match="2, 1, 8"):
                    module(torch.randn(2, 1, 8), module.new_state(1))  # type: ignore[operator]
            rows = {LogMel(): (2, 1, 240), Analysis(960): (2, 240), Synthesis(960): (2, 1, 962)}
            for module, shape in rows.items():
                with pytest.raises(AssertionError, match="2"):
                    module(torch.randn(shape), module.new_state(1))  # type: ignore[operator]
            narrow = Analysis(480).new_state(2)
            with pytest.raises(AssertionError, match="240"):
                Analysis(960)(torch.randn(2, 240), narrow)
            with pytest.raises(AssertionError, match="480"):
                Synthesis(960)(torch.randn(2, 1, 480), Synthesis(960).new_state(2))
