"""Convolutional blocks stream like they run offline, and their own backward is right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from streams import Streaming, Tick, assert_streams, chunkings, scripts, streaming_settings
from torch import Tensor, nn

from audio_codec import layers
from audio_codec.layers import (
    ConvNeXtBlock,
    ConvNeXtStack,
    DepthwiseConv,
    TailState,
    lay_out,
)

DIM = 6


def build(name: str) -> nn.Module:
    torch.manual_seed(1)
    module: nn.Module
    if name == "stack":
        module = ConvNeXtStack(DIM, blocks=2, kernel=3)
    elif name == "block":
        module = ConvNeXtBlock(DIM, kernel=5)
    elif name == "pointwise":
        module = DepthwiseConv(DIM, kernel=1)
    else:
        module = DepthwiseConv(DIM, kernel=7)
    return module


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["pointwise", "depthwise", "block", "stack"])
@streaming_settings
@given(chunks=chunkings(18), script=scripts())
def test_streaming(name: str, dtype: torch.dtype, chunks: list[int], script: list[Tick]) -> None:
    module = build(name).to(dtype)
    generator = torch.Generator().manual_seed(2)
    assert_streams(
        Streaming(
            module,
            lambda batch, most: module.new_state(batch),
            lambda n: torch.randn(1, n, DIM, generator=generator, dtype=dtype),
            tolerance=1e-12 if dtype == torch.float64 else 1e-5,
        ),
        chunks,
        script,
    )


def reference(x: Tensor, module: DepthwiseConv) -> Tensor:
    """The same as torch's own grouped convolution, channels first."""
    weight = module.weight.T.unsqueeze(1)  # [C, 1, K]
    padded = F.pad(x.transpose(1, 2), (module.kernel - 1, 0))
    return F.conv1d(padded, weight, module.bias, groups=len(weight)).transpose(1, 2)


@given(kernel=st.integers(1, 9), time=st.integers(1, 12), batch=st.integers(1, 3))
@streaming_settings
def test_depthwise_is_torchs_grouped_convolution(kernel: int, time: int, batch: int) -> None:
    module = DepthwiseConv(DIM, kernel).double()
    nn.init.normal_(module.bias)
    x = torch.randn(batch, time, DIM, dtype=torch.float64, requires_grad=True)
    out, weights = torch.randn(batch, time, DIM, dtype=torch.float64), (x, *module.parameters())
    found = torch.autograd.grad((module(x) * out).sum(), weights)
    expected = torch.autograd.grad((reference(x, module) * out).sum(), weights)
    torch.testing.assert_close(module(x), reference(x, module))
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.float64
        torch.testing.assert_close(mine, theirs)


def test_bfloat16_gradients_are_summed_in_float32() -> None:
    # 20000 equal terms: a bfloat16 sum would stop growing at 256.
    module = DepthwiseConv(2, 1).bfloat16()
    x = torch.ones(1, 20_000, 2, dtype=torch.bfloat16)
    module(x).sum().backward()
    assert module.weight.grad is not None and module.bias.grad is not None
    torch.testing.assert_close(
        module.weight.grad.float(), torch.full((1, 2), 2e4), rtol=1e-2, atol=0
    )
    torch.testing.assert_close(module.bias.grad.float(), torch.full((2,), 2e4), rtol=1e-2, atol=0)


def test_a_chunk_shorter_than_the_kernel_keeps_the_rest_of_the_past() -> None:
    module = DepthwiseConv(1, 7).double()
    state = module.new_state(1)
    for number in range(1, 10):
        module(torch.full((1, 1, 1), float(number), dtype=torch.float64), state)
    assert isinstance(state, TailState)
    assert state.tail.flatten().tolist() == [4, 5, 6, 7, 8, 9]


def test_an_empty_stack_is_the_identity() -> None:
    stack = ConvNeXtStack(DIM, 0)
    x = torch.randn(2, 3, DIM)
    assert torch.equal(stack(x, stack.new_state(2)), x)


def test_a_short_convolution_equals_a_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    module = DepthwiseConv(DIM, kernel=7).double()
    x = torch.randn(2, 9, DIM, dtype=torch.float64)
    with torch.no_grad():
        short = module(x)
        monkeypatch.setattr(layers, "_SHORT", 0)
        torch.testing.assert_close(short, module(x), rtol=0, atol=1e-12)


def test_laying_out_changes_neither_values_nor_shapes() -> None:
    module = nn.Sequential(
        nn.Linear(3, 5), nn.Linear(5, 3), nn.ParameterList([torch.randn(4, 2), torch.randn(4)])
    )
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    lay_out(module)
    after = module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    long_lines = [after[name].stride() for name in ("0.weight", "1.weight", "2.0")]
    assert long_lines == [(1, 5), (5, 1), (1, 4)]
