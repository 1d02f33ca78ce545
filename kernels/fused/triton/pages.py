"""Pages: in 8 bits, packed when a chunk has written them and unpacked before a layer reads them; copied to other slots;
and the tables that say which is which, rewritten when a chunk leaves the window."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...sizes import cdiv, power_of_2
from ...workspace import dense, empty
from ..reference import INT8_MAX, SMALLEST, Pages8

COPIED = 4096  # elements that a program of `put_pages` copies


def pack_pages(k_pages: Tensor, v_pages: Tensor, slots: Tensor, into: Pages8, values: bool) -> None:
    """See `api.pack_pages`."""
    groups, _, rows, dim = k_pages.shape
    with torch.cuda.device_of(k_pages):
        _pack[(slots.shape[1], groups)](
            k_pages, v_pages, dense("slots", slots), *into, *_apart(k_pages, v_pages), into.k.shape[1],
            INT8_MAX, SMALLEST,
            ROWS=rows, D=dim, ROWS_PAD=power_of_2(rows), D_PAD=power_of_2(dim),
            VALUES=values, num_warps=4,
        )  # fmt: skip


def unpack_pages(packed: Pages8, k_pages: Tensor, v_pages: Tensor) -> None:
    """See `api.unpack_pages`."""
    groups, count, rows, dim = k_pages.shape
    with torch.cuda.device_of(k_pages):
        _unpack[(count, groups)](
            *packed, k_pages, v_pages, *_apart(k_pages, v_pages),
            ROWS=rows, D=dim, ROWS_PAD=power_of_2(rows), D_PAD=power_of_2(dim),
            num_warps=4,
        )  # fmt: skip


def _apart(k_pages: Tensor, v_pages: Tensor) -> tuple[int, int]:
    """Elements from group to group."""
    return k_pages.stride(0), v_pages.stride(0)


def put_pages(k_blocks: Tensor, v_blocks: Tensor, slots: Tensor, k_pages: Tensor, v_pages: Tensor) -> None:
    """See `api.put_pages`."""
    groups, count, rows, dim = k_blocks.shape
    slots = slots if slots.stride(1) == 1 else dense("slots", slots)
    apart = (x.stride(0) for x in (k_blocks, v_blocks, slots, k_pages, v_pages))
    with torch.cuda.device_of(k_blocks):
        _put[(cdiv(rows * dim, COPIED), count, 2 * groups)](
            k_blocks, v_blocks, slots, k_pages, v_pages, *apart,
            SIZE=rows * dim, COPIED=COPIED, num_warps=4,
        )  # fmt: skip


def update_table(
    table: Tensor, score: Tensor, capacity: int, persistent: int, evicted: int, pinned: int
) -> None:
    """See `api.update_table`."""
    assert table.is_contiguous()
    rows, slots = table.shape
    slots_pad = max(32, power_of_2(slots))
    score = score if score.stride(2) == 1 else dense("update.score", score)
    kept = min(capacity, persistent + evicted)
    sums = empty("update.sums", (rows, persistent + evicted), torch.float32, table.device)
    with torch.cuda.device_of(table):
        _update[(rows,)](
            table, score, sums, *score.stride()[:2], score.shape[1], slots, capacity, persistent, evicted, pinned, kept,
            SLOTS=slots_pad, OTHERS=max(1, min(32, 8192 // slots_pad)), num_warps=4 if slots_pad < 1024 else 8,
        )  # fmt: skip


@triton.jit(do_not_specialize=["s_g"])
def _put(
    k_blocks, v_blocks, slots, k_pages, v_pages, kb_g, vb_g, s_g, kp_g, vp_g,
    SIZE: tl.constexpr, COPIED: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * COPIED + tl.arange(0, COPIED)
    block, group = tl.program_id(1), (tl.program_id(2) // 2).to(tl.int64)
    slot = tl.load(slots + group * s_g + block).to(tl.int64)
    if tl.program_id(2) % 2 == 0:
        here, there = k_blocks + group * kb_g, k_pages + group * kp_g
    else:
        here, there = v_blocks + group * vb_g, v_pages + group * vp_g
    found = tl.load(here + block.to(tl.int64) * SIZE + at, mask=at < SIZE)
    tl.store(there + slot * SIZE + at, found, mask=at < SIZE)


@triton.jit(
    do_not_specialize=[
        "s_g",
        "s_n",
        "count",
        "num_slots",
        "capacity",
        "persistent",
        "evicted",
        "pinned",
        "kept",
    ]
)
def _update(
    table, score, sums, s_g, s_n, count, num_slots, capacity, persistent, evicted, pinned, kept,
    SLOTS: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """One row: each entry finds out by itself where it goes. sums [R, candidates]: room for its scores' sums."""
    table += tl.program_id(0).to(tl.int64) * num_slots
    candidates = persistent + evicted
    score += tl.program_id(0).to(tl.int64) * s_g
    sums += tl.program_id(0).to(tl.int64) * candidates
    entry = tl.arange(0, SLOTS)
    slot = tl.load(table + entry, mask=entry < num_slots, other=0)
    in_window = entry - capacity  # place there
    competes = (entry < persistent) | ((in_window >= 0) & (in_window < evicted))
    place = tl.where(entry < persistent, entry, persistent + in_window)  # among those that compete
    own = tl.zeros((SLOTS,), tl.float32)
    for begin in range(0, count, OTHERS):
        rows = begin + tl.arange(0, OTHERS)
        mask = (rows < count)[:, None] & competes[None, :]
        own += tl.sum(tl.load(score + rows[:, None] * s_n + place[None, :], mask=mask, other=0.0), axis=0)
    own = tl.where(own == own, own, float("-inf"))
    own = tl.where(place < pinned, float("inf"), own)
    tl.store(sums + place, own, mask=competes)
    tl.debug_barrier()  # and every thread reads them all
    better = tl.zeros((SLOTS,), tl.int32)
    for begin in range(0, candidates, OTHERS):
        others = begin + tl.arange(0, OTHERS)
        other = tl.load(sums + others, mask=others < candidates, other=0.0)
        wins = (other[None, :] > own[:, None]) | (
            (other[None, :] == own[:, None]) & (others[None, :] < place[:, None])
        )
        better += tl.sum((wins & (others < candidates)[None, :]).to(tl.int32), axis=1)
    stays = competes & (better < kept)
    leaves = competes & (better >= kept)
    empty = (entry >= persistent) & (in_window < 0)
    free = tl.where(empty, entry - persistent, capacity - persistent + tl.cumsum(leaves.to(tl.int32), 0) - 1)
    unfilled = capacity - kept
    to = tl.where(free < unfilled, kept + free, num_slots - evicted + free - unfilled)
    to = tl.where(stays, tl.cumsum(stays.to(tl.int32), 0) - 1, to)
    to = tl.where(in_window >= evicted, entry - evicted, to)
    tl.debug_barrier()  # every thread has read its entries
    tl.store(table + to, slot, mask=entry < num_slots)


@triton.jit
def _in_8_bits(tile, scale):
    """The nearest of 255 steps; halves go up, as the reference has it."""
    return tl.minimum(tl.maximum(tl.floor(tile / scale + 0.5), -127.0), 127.0).to(tl.int8)


@triton.jit(do_not_specialize=["size"])
def _pack(
    k_pages, v_pages, slots, k8, k_scale, v8, v_scale, k_g, v_g, size, largest, smallest,
    ROWS: tl.constexpr, D: tl.constexpr, ROWS_PAD: tl.constexpr, D_PAD: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    block, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + group * tl.num_programs(0) + block).to(tl.int64)
    page = group * size + slot
    rows, dims = tl.arange(0, ROWS_PAD), tl.arange(0, D_PAD)
    inside = (rows < ROWS)[:, None] & (dims < D)[None, :]
    of_page = rows[:, None] * D + dims[None, :]
    at, there = page * (ROWS * D) + of_page, slot * (ROWS * D) + of_page
    tile = tl.load(k_pages + group * k_g + there, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(tile), axis=0), smallest) / largest
    tl.store(k8 + at, _in_8_bits(tile, scale[None, :]), mask=inside)
    tl.store(k_scale + page * D + dims, scale, mask=dims < D)
    if VALUES:
        tile = tl.load(v_pages + group * v_g + there, mask=inside, other=0.0).to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(tile), axis=1), smallest) / largest
        tl.store(v8 + at, _in_8_bits(tile, scale[:, None]), mask=inside)
        tl.store(v_scale + page * ROWS + rows, scale, mask=rows < ROWS)


@triton.jit
def _unpack(
    k8, k_scale, v8, v_scale, k_pages, v_pages, k_g, v_g,
    ROWS: tl.constexpr, D: tl.constexpr, ROWS_PAD: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    group, slot = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    page = group * tl.num_programs(0) + slot
    rows, dims = tl.arange(0, ROWS_PAD), tl.arange(0, D_PAD)
    inside = (rows < ROWS)[:, None] & (dims < D)[None, :]
    of_page = rows[:, None] * D + dims[None, :]
    at, there = page * (ROWS * D) + of_page, slot * (ROWS * D) + of_page
    scale = tl.load(k_scale + page * D + dims, mask=dims < D, other=0.0)
    tile = tl.load(k8 + at, mask=inside, other=0).to(tl.float32) * scale[None, :]
    tl.store(k_pages + group * k_g + there, tile.to(k_pages.dtype.element_ty), mask=inside)
    scale = tl.load(v_scale + page * ROWS + rows, mask=rows < ROWS, other=0.0)
    tile = tl.load(v8 + at, mask=inside, other=0).to(tl.float32) * scale[:, None]
    tl.store(v_pages + group * v_g + there, tile.to(v_pages.dtype.element_ty), mask=inside)
