"""Between two convolutions of the video VAE: bias, residual, RMSNorm and SiLU in one pass over memory, channels last.

A program holds whole rows of channels, one per pixel, and writes them where the next convolution reads them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...sizes import cdiv, power_of_2
from ..reference import SMALLEST_SQUARE

ELEMENTS = 4096  # per program of 4 warps


def norm_to_window(
    y: Tensor,
    window: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gamma: Tensor | None,
    total: Tensor | None,
    past: Tensor | None,
    silu: bool,
    shuffled: bool,
) -> None:
    """See `api.norm_to_window`. Allocates nothing."""
    height, width, channels = window.shape[1:]
    frames, pixels = y.shape[0], height * width
    padded = power_of_2(channels)
    rows = max(1, ELEMENTS // padded)
    with torch.cuda.device_of(y):
        _norm_to_window[(cdiv(pixels, rows), frames)](
            y, bias, residual, gamma, total, past, window, frames, pixels, width, SMALLEST_SQUARE,
            C=channels, C_PAD=padded, ROWS=rows, SILU=silu, SHUFFLED=shuffled, num_warps=4,
        )  # fmt: skip


@triton.jit(do_not_specialize=["frames", "pixels", "width"])
def _norm_to_window(
    y, bias, residual, gamma, total, past, window, frames, pixels, width, smallest,
    C: tl.constexpr, C_PAD: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr, SHUFFLED: tl.constexpr,
):  # fmt: skip
    frame = tl.program_id(1)
    pixel, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, C_PAD)
    keep = (pixel < pixels)[:, None] & (cols < C)[None, :]
    in_frame = pixel.to(tl.int64)[:, None] * C + cols[None, :]
    size = pixels.to(tl.int64) * C
    at = frame * size + in_frame
    source = at
    if SHUFFLED:
        source = _shuffled(frame, pixel, pixels // width, width)[:, None] * C + cols[None, :]
    value = tl.load(y + source, mask=keep, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        value += tl.load(residual + at, mask=keep, other=0.0).to(tl.float32)
    if total is not None:
        stored = value.to(total.dtype.element_ty)
        tl.store(total + at, stored, mask=keep)
        value = stored.to(tl.float32)  # what later layers will read
    if gamma is not None:
        inverse = 1.0 / tl.sqrt(tl.maximum(tl.sum(value * value, axis=1) / C, smallest))
        value *= inverse[:, None] * tl.load(gamma + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
        if SILU:
            value = value / (1.0 + tl.exp(-value))
    result = value.to(window.dtype.element_ty)
    if past is None:
        tl.store(window + at, result, mask=keep)
    else:
        tl.store(window + 2 * size + at, result, mask=keep)
        # One program reads the past of its pixels and then replaces it, so no other one is in its way.
        if frames == 1:
            first = tl.load(past + in_frame, mask=keep)
            second = tl.load(past + size + in_frame, mask=keep)
            tl.store(window + in_frame, first, mask=keep)
            tl.store(window + size + in_frame, second, mask=keep)
            tl.store(past + in_frame, second, mask=keep)
            tl.store(past + size + in_frame, result, mask=keep)
        elif frame >= frames - 2:
            slot = (frame - frames + 2) * size + in_frame
            tl.store(window + slot, tl.load(past + slot, mask=keep), mask=keep)
            tl.store(past + slot, result, mask=keep)


@triton.jit
def _shuffled(frame, pixel, height, width):
    """Where an upsampled pixel lies, in rows of C, in a 2x2 convolution's output [T, H/2 + 1, W/2 + 1, 2, 2, C]."""
    line, column = pixel // width, pixel % width
    odd_line, odd_column = line % 2, column % 2
    row = frame.to(tl.int64) * (height // 2 + 1) + (line // 2 + odd_line)
    place = row * (width // 2 + 1) + (column // 2 + odd_column)
    return place * 4 + (2 * odd_line + odd_column)
