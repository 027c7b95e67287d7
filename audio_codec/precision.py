"""What a model's products are taken in: bf16 where the device has units for it, else float32.

A processor without such units widens every number and rounds it again: a bf16 product on AVX2 alone
takes forty times as long as the same one in float32. So `auto` is what recipes say, and here is the
one place where it is decided.
"""

from __future__ import annotations

import functools
import logging
import platform
from typing import Literal

import torch

log = logging.getLogger(__name__)

Precision = Literal["auto", "bf16", "fp32"]
Settled = Literal["bf16", "fp32"]


def has_bf16(device: torch.device | str) -> bool:
    """Whether a device has units for products of bfloat16.

    Torch's `_is_mkldnn_bf16_supported` tells so on ARM; on x86 it means AVX-512 of any kind, on
    which oneDNN can do them at all. Fast they are from AVX512-BF16 on, which what has AMX has too.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if platform.machine().lower() in ("arm64", "aarch64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.cpu._is_avx512_bf16_supported()


def settle(asked: Precision, device: torch.device | str) -> Settled:
    """What `auto` is on a device; anything else is obeyed, with a warning where it will be slow."""
    if asked == "auto":
        return "bf16" if has_bf16(device) else "fp32"
    if asked == "bf16" and not has_bf16(device):
        _warn(torch.device(device).type)
    return asked


@functools.cache
def _warn(kind: str) -> None:
    log.warning(
        "precision is bf16, for which this %s has no units: expect it to be many times slower than "
        "float32.",
        kind,
    )


def lowered(asked: Precision, device: torch.device) -> torch.autocast:
    """The autocast to run a model on a device in, to that precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=settle(asked, device) == "bf16")
