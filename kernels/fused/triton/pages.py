"""Pages in 8 bits: packed when a chunk has written them, unpacked before a layer reads them. A program a page."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import INT8_MAX, SMALLEST, Pages8


def pack_pages(k_pages: Tensor, v_pages: Tensor, slots: Tensor, into: Pages8, values: bool) -> None:
    """See `api.pack_pages`."""
    groups, count, rows, dim = k_pages.shape
    with torch.cuda.device_of(k_pages):
        _pack[(slots.shape[1], groups)](
            k_pages, v_pages, slots.contiguous(), *into, count, INT8_MAX, SMALLEST,
            ROWS=rows, D=dim, ROWS_PAD=triton.next_power_of_2(rows), D_PAD=triton.next_power_of_2(dim),
            VALUES=values, num_warps=4,
        )  # fmt: skip


def unpack_pages(packed: Pages8, k_pages: Tensor, v_pages: Tensor) -> None:
    """See `api.unpack_pages`."""
    groups, count, rows, dim = k_pages.shape
    with torch.cuda.device_of(k_pages):
        _unpack[(count, groups)](
            *packed, k_pages, v_pages,
            ROWS=rows, D=dim, ROWS_PAD=triton.next_power_of_2(rows), D_PAD=triton.next_power_of_2(dim),
            num_warps=4,
        )  # fmt: skip


@triton.jit
def _in_8_bits(tile, scale):
    """The nearest of 255 steps; halves go up, as the reference has it."""
    return tl.minimum(tl.maximum(tl.floor(tile / scale + 0.5), -127.0), 127.0).to(tl.int8)


@triton.jit(do_not_specialize=["size"])
def _pack(
    k_pages, v_pages, slots, k8, k_scale, v8, v_scale, size, largest, smallest,
    ROWS: tl.constexpr, D: tl.constexpr, ROWS_PAD: tl.constexpr, D_PAD: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    block, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    page = group * size + tl.load(slots + group * tl.num_programs(0) + block).to(tl.int64)
    rows, dims = tl.arange(0, ROWS_PAD), tl.arange(0, D_PAD)
    inside = (rows < ROWS)[:, None] & (dims < D)[None, :]
    at = (page * ROWS + rows)[:, None] * D + dims[None, :]
    tile = tl.load(k_pages + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(tile), axis=0), smallest) / largest
    tl.store(k8 + at, _in_8_bits(tile, scale[None, :]), mask=inside)
    tl.store(k_scale + page * D + dims, scale, mask=dims < D)
    if VALUES:
        tile = tl.load(v_pages + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(tile), axis=1), smallest) / largest
        tl.store(v8 + at, _in_8_bits(tile, scale[:, None]), mask=inside)
        tl.store(v_scale + page * ROWS + rows, scale, mask=rows < ROWS)


@triton.jit
def _unpack(
    k8, k_scale, v8, v_scale, k_pages, v_pages,
    ROWS: tl.constexpr, D: tl.constexpr, ROWS_PAD: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    page = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    rows, dims = tl.arange(0, ROWS_PAD), tl.arange(0, D_PAD)
    inside = (rows < ROWS)[:, None] & (dims < D)[None, :]
    at = (page * ROWS + rows)[:, None] * D + dims[None, :]
    scale = tl.load(k_scale + page * D + dims, mask=dims < D, other=0.0)
    tile = tl.load(k8 + at, mask=inside, other=0).to(tl.float32) * scale[None, :]
    tl.store(k_pages + at, tile.to(k_pages.dtype.element_ty), mask=inside)
    scale = tl.load(v_scale + page * ROWS + rows, mask=rows < ROWS, other=0.0)
    tile = tl.load(v8 + at, mask=inside, other=0).to(tl.float32) * scale[:, None]
    tl.store(v_pages + at, tile.to(v_pages.dtype.element_ty), mask=inside)
