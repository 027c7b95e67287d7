"""SEANet: its matrix products are the convolutions they stand for, and everything streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import (
    Streaming,
    Tick,
    assert_causal,
    assert_streams,
    chunkings,
    scripts,
    streaming_settings,
)
from torch import Tensor, nn

from audio_codec.seanet import (
    CausalConv,
    CausalConvTranspose,
    ResidualBlock,
    SEANetDecoder,
    SEANetEncoder,
    SEANetShape,
)

SHAPE = SEANetShape(dim=6, filters=4, ratios=(3, 2), kernel=5, residual_layers=2)
HOP = 6


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


# --- Convolutions ---------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    taps=st.integers(1, 4),
    stride=st.integers(1, 4),
    dilation=st.integers(1, 3),
    widths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    bias=st.booleans(),
    outputs=st.integers(1, 6),
)
def test_a_causal_convolution_is_conv1d_padded_on_the_left(
    taps: int, stride: int, dilation: int, widths: tuple[int, int], bias: bool, outputs: int
) -> None:
    dilation = dilation if stride == 1 else 1
    kernel = taps * stride
    conv = CausalConv(*widths, kernel, stride, dilation, bias).double()
    x = noise(2, outputs * stride, widths[0])
    # Tap m, position j of its block: kernel index m · stride + j.
    weight = conv.weight.unflatten(1, (stride, widths[0])).flatten(0, 1).permute(2, 1, 0)
    assert weight.shape == (widths[1], widths[0], kernel)
    padded = F.pad(x.transpose(1, 2), ((kernel - 1) * dilation + 1 - stride, 0))
    expected = F.conv1d(padded, weight, conv.bias, stride, dilation=dilation)
    torch.testing.assert_close(conv(x), expected.transpose(1, 2))


@settings(max_examples=25, deadline=None)
@given(
    taps=st.integers(1, 4),
    stride=st.integers(1, 4),
    widths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    inputs=st.integers(1, 6),
)
def test_a_transposed_convolution_is_torchs_cut_on_the_right(
    taps: int, stride: int, widths: tuple[int, int], inputs: int
) -> None:
    conv = CausalConvTranspose(*widths, taps * stride, stride).double()
    x = noise(2, inputs, widths[0])
    weight = conv.weight.unflatten(2, (stride, widths[1])).flip(0)  # [taps, C, stride, D]
    weight = weight.permute(1, 3, 0, 2).flatten(2)
    assert weight.shape == (widths[0], widths[1], taps * stride)
    whole = F.conv_transpose1d(x.transpose(1, 2), weight, conv.bias, stride)
    expected = whole[..., : inputs * stride].transpose(1, 2)
    torch.testing.assert_close(conv(x), expected)


def test_what_cannot_be_blocks_is_refused() -> None:
    with pytest.raises(AssertionError, match="multiple of stride"):
        CausalConv(2, 2, kernel=5, stride=2)
    with pytest.raises(AssertionError, match="multiple of stride"):
        CausalConvTranspose(2, 2, kernel=3, stride=2)
    with pytest.raises(AssertionError, match="dilation"):
        CausalConv(2, 2, kernel=4, stride=2, dilation=2)
    with pytest.raises(AssertionError, match="no multiple of 2"):
        CausalConv(2, 2, kernel=4, stride=2)(torch.zeros(1, 3, 2))


# --- Streaming ------------------------------------------------------------------------------------

# module, positions in a stride of input, input width
LAYERS: dict[str, tuple[Any, int, int]] = {
    "plain": (lambda: CausalConv(3, 4, 7), 1, 3),
    "dilated": (lambda: CausalConv(3, 4, 3, dilation=4), 1, 3),
    "strided": (lambda: CausalConv(3, 4, 6, stride=2), 2, 3),
    "transposed": (lambda: CausalConvTranspose(3, 4, 6, stride=2), 1, 3),
    "residual": (lambda: ResidualBlock(4, 3, 2, compress=2), 1, 4),
    "encoder": (lambda: SEANetEncoder(SHAPE), HOP, 1),
    "decoder": (lambda: SEANetDecoder(SHAPE), 1, 6),
}


def streaming(name: str) -> Streaming:
    make, stride, width = LAYERS[name]
    module: nn.Module = make().double()
    generator = torch.Generator().manual_seed(1)
    return Streaming(
        module,
        lambda batch, most: module.new_state(batch),  # type: ignore[operator]
        lambda n: torch.randn(1, n * stride, width, dtype=torch.float64, generator=generator),
    )


@pytest.mark.parametrize("name", LAYERS)
@settings(streaming_settings, max_examples=4)
@given(chunks=chunkings(9), script=scripts(8))
def test_layers_stream(name: str, chunks: list[int], script: list[Tick]) -> None:
    assert_streams(streaming(name), chunks, script)


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_looks_ahead(name: str) -> None:
    for change in range(1, 6):
        assert_causal(streaming(name), 7, change)


# --- Shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "hop"), [(SHAPE, 6), (SEANetShape(), 960), (SEANetShape(residual_layers=0), 960)]
)
@torch.no_grad()
def test_the_halves_undo_each_others_shape(shape: SEANetShape, hop: int) -> None:
    with torch.device("meta"):
        encoder, decoder = SEANetEncoder(shape), SEANetDecoder(shape)
        latent = encoder(torch.empty(2, 3 * hop, 1))
        assert latent.shape == (2, 3, shape.dim)
        assert decoder(latent).shape == (2, 3 * hop, 1)


def test_mimis_halves_have_their_published_size() -> None:
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in half(SEANetShape()).parameters())
            for half in (SEANetEncoder, SEANetDecoder)
        ]
    assert [round(size / 1e6, 1) for size in sizes] == [12.6, 14.7]


def test_every_parameter_learns() -> None:
    for name in LAYERS:
        module: Any = streaming(name).forward
        _, stride, width = LAYERS[name]
        module(noise(2, 14 * stride, width)).square().sum().backward()
        for parameter, value in module.named_parameters():
            assert value.grad is not None and bool(value.grad.any()), f"{name}: {parameter}"
