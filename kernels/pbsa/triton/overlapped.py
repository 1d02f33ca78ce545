"""Forward PBSA for Hopper, written down to its warps: products of one page run under the softmax of the next.

What `forward.forward_descriptors` leaves to Triton's compiler is said here in Gluon, Triton's lower language. One warp
lets the copy engine fetch pages; two warp groups have half of the tile's rows each. A warp group starts the scores of
a page and, before it waits for them, the product of the previous page's weights and values. So the tensor cores have
work while the softmax is computed, which Triton's compiler does not bring about: it waits for each product before the
next line that needs it.

`variants` says when it is used; numbers, lists and the split of the last wave are `forward`'s. Letters as in `api`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .forward import RUN_TIME

fetch = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name until Triton 3.6
HALF = gl.constexpr(64)  # query rows of a warp group


@gluon.constexpr_function
def product(columns):
    """How a warp group holds a product of 64 rows."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def in_rows(dim):
    """How a warp group holds rows that it stores, 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // dim, dim // 8], [4, 1], [1, 0])


def described(x: Tensor, rows: int) -> TensorDescriptor:
    """The copy engine's view of x [G, n, T, D], whose groups lie apart by whole rows: all rows, in tiles [rows, D].

    Row r of group g is row g * x.stride(0) // D + r. Made by the host, as a program that makes its own loses time.
    """
    groups, dim = x.shape[0], x.shape[-1]
    count = (groups - 1) * (x.stride(0) // dim) + x.shape[1] * x.shape[2]
    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[x.dtype]
    layout = gl.NVMMASharedLayout.get_default_for([rows, dim], element)
    return TensorDescriptor(x, [count, dim], [dim, 1], [rows, dim], layout)


@gluon.jit(do_not_specialize=[*RUN_TIME, "programs"])
def forward_overlapped(
    q_rows, k_rows, v_rows, page_len, idx, cnt, out, lse,
    q_g, k_g, v_g,
    whole, parts, num_rows, tiles, list_rows, num_lists, longest, num_slots, first, behind, scale_log2,
    programs,
    T: gl.constexpr, D: gl.constexpr, PADDING: gl.constexpr, FLOOR: gl.constexpr, SHARED: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """q_rows in tiles of 64, k_rows and v_rows in pages, as `described`; q_g, k_g, v_g: rows from group to group.

    SHARED: a program is a tile of 128 query rows that share a list. Else it is two of `programs` tiles of 64, and each
    warp group has a list and pages of its own. STAGES: pages of k, and of v, that are there or on their way, of a list.
    D is a power of two; the rest as for `forward.forward_descriptors`.
    """
    tables = page_len, idx, cnt
    sizes = whole, parts, programs, num_rows, tiles, list_rows, num_lists, longest, num_slots
    rows = q_rows, k_rows, v_rows
    apart = q_g, k_g, v_g
    gap = first, behind
    results = out, lse, scale_log2
    if SHARED:
        own = _locate(gl.program_id(0), tables, sizes, apart, 2 * HALF)
        ring = ring_of(k_rows, v_rows, T, D, 2, STAGES)
        q_tiles, q_full = _queries(q_rows, 2, D)
        fence_async_shared()
        _fetch_queries(q_rows, own, q_tiles, q_full, 2)
        gl.warp_specialize(
            [
                (_attend, (0, own, q_tiles.index(0), q_full, ring, results, T, D, PADDING, FLOOR, STAGES)),
                (_attend, (HALF, own, q_tiles.index(1), q_full, ring, results, T, D, PADDING, FLOOR, STAGES)),
                (_fetch_pages, (rows, own, ring, gap, T, STAGES)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        own = _locate(2 * gl.program_id(0), tables, sizes, apart, HALF)
        other = _locate(2 * gl.program_id(0) + 1, tables, sizes, apart, HALF)
        ring, other_ring = ring_of(k_rows, v_rows, T, D, 1, STAGES), ring_of(k_rows, v_rows, T, D, 1, STAGES)
        q_tiles, q_full = _queries(q_rows, 1, D)
        other_q_tiles, other_q_full = _queries(q_rows, 1, D)
        fence_async_shared()
        _fetch_queries(q_rows, own, q_tiles, q_full, 1)
        _fetch_queries(q_rows, other, other_q_tiles, other_q_full, 1)
        gl.warp_specialize(
            [
                (_attend, (0, own, q_tiles.index(0), q_full, ring, results, T, D, PADDING, FLOOR, STAGES)),
                (_attend, (0, other, other_q_tiles.index(0), other_q_full, other_ring, results, T, D, PADDING, FLOOR,
                           STAGES)),
                (_fetch_pages, (rows, own, ring, gap, T, STAGES)),
                (_fetch_pages, (rows, other, other_ring, gap, T, STAGES)),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )  # fmt: skip


@gluon.jit
def _locate(program, tables, sizes, apart, TILE: gl.constexpr):
    """Of one tile, as `forward._locate`, `_own_pages` and `_own_rows` have it: the group's first row of k and of v, the
    tile's first row of q, first row to be written, how many of them, where its pages' slots are and the lengths of the
    group's pages, how many it reads."""
    page_len, idx, cnt = tables
    whole, parts, programs, num_rows, tiles, list_rows, num_lists, longest, num_slots = sizes
    there = program < programs  # the last program may have one tile instead of two
    program = gl.minimum(program, programs - 1)
    after = gl.maximum(program - whole, 0)
    alone = program < whole
    tile = gl.where(alone, program, whole + after // parts)
    part = gl.where(alone, 0, after % parts)
    share = gl.where(alone, 1, parts)
    g = (tile // (num_lists * tiles)).to(gl.int64)
    which = tile // tiles % num_lists
    in_list = tile % tiles * TILE
    row_of_lists = g * num_lists + which
    listed = gl.load(cnt + row_of_lists)
    begin = listed * part // share
    count = gl.where(there, listed * (part + 1) // share - begin, 0)
    behind = num_rows + ((tile - whole).to(gl.int64) * (parts - 1) + part - 1) * TILE
    row = gl.where(part > 0, behind, row_of_lists * list_rows + in_list)
    keep = gl.where(there, list_rows - in_list, 0)
    q_g, k_g, v_g = apart
    k_row, v_row, q_row = (g * k_g).to(gl.int32), (g * v_g).to(gl.int32), (g * q_g).to(gl.int32)
    q_row += which * list_rows + in_list
    pages, lens = idx + row_of_lists * longest + begin, page_len + g * num_slots
    return k_row, v_row, q_row, row, keep, pages, lens, count


@gluon.jit
def barriers(count: gl.constexpr, arrivals: gl.constexpr):
    """Barriers [count, 1], each for that many arrivals a phase."""
    bars = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(count):
        mbarrier.init(bars.index(i), count=arrivals)
    return bars


@gluon.jit
def ring_of(
    a_rows, b_rows, rows: gl.constexpr, dim: gl.constexpr, readers: gl.constexpr, stages: gl.constexpr
):
    """Room for `stages` tiles [rows, dim] of two tensors, and for each: it is there; its readers have read it."""
    a_tiles = gl.allocate_shared_memory(a_rows.dtype, [stages, rows, dim], a_rows.layout)
    b_tiles = gl.allocate_shared_memory(b_rows.dtype, [stages, rows, dim], b_rows.layout)
    a_full, b_full = barriers(stages, 1), barriers(stages, 1)
    a_free, b_free = barriers(stages, readers), barriers(stages, readers)
    return a_tiles, b_tiles, a_full, a_free, b_full, b_free


@gluon.jit
def fetch_step(i, a_rows, b_rows, a_row, b_row, ring, stages: gl.constexpr):
    """Step i's tiles of two tensors, from these rows on, each once its stage is free. A stage's first use waits for
    nobody: phase 1 of a new barrier counts as over."""
    a_tiles, b_tiles, a_full, a_free, b_full, b_free = ring
    at, phase = i % stages, i // stages & 1
    mbarrier.wait(a_free.index(at), phase ^ 1)
    mbarrier.expect(a_full.index(at), a_rows.block_type.nbytes)
    fetch(a_rows, [a_row, 0], a_full.index(at), a_tiles.index(at))
    mbarrier.wait(b_free.index(at), phase ^ 1)
    mbarrier.expect(b_full.index(at), b_rows.block_type.nbytes)
    fetch(b_rows, [b_row, 0], b_full.index(at), b_tiles.index(at))


@gluon.jit
def _queries(q_rows, halves: gl.constexpr, D: gl.constexpr):
    return gl.allocate_shared_memory(q_rows.dtype, [halves, HALF, D], q_rows.layout), barriers(1, 1)


@gluon.jit
def _fetch_queries(q_rows, own, q_tiles, q_full, halves: gl.constexpr):
    mbarrier.expect(q_full.index(0), halves * q_rows.block_type.nbytes)
    for half in gl.static_range(halves):
        fetch(q_rows, [own[2] + half * HALF, 0], q_full.index(0), q_tiles.index(half))


@gluon.jit
def _fetch_pages(rows, own, ring, gap, T: gl.constexpr, STAGES: gl.constexpr):
    """A loading warp."""
    k_row, v_row, pages, count = own[0], own[1], own[5], own[7]
    first, behind = gap
    for i in range(count):
        slot = gl.load(pages + i)
        row = (slot + gl.where(slot >= first, behind, 0)) * T
        fetch_step(i, rows[1], rows[2], k_row + row, v_row + row, ring, STAGES)


@gluon.jit
def _attend(
    begin, own, q_tile, q_full, ring, results, T: gl.constexpr, D: gl.constexpr, PADDING: gl.constexpr,
    FLOOR: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp group's 64 rows, from `begin` on within the tile."""
    row, keep, pages, lens, count = own[3], own[4], own[5], own[6], own[7]
    k_tiles, v_tiles, k_full, k_free, v_full, v_free = ring
    out, lse, scale_log2 = results
    dtype: gl.constexpr = q_tile.dtype
    scored: gl.constexpr = product(T)
    summed: gl.constexpr = product(D)
    weighed: gl.constexpr = gl.DotOperandLayout(0, summed, 2)
    in_scored: gl.constexpr = gl.SliceLayout(1, scored)
    in_summed: gl.constexpr = gl.SliceLayout(1, summed)
    tokens = gl.arange(0, T, layout=gl.SliceLayout(0, scored))
    top = gl.full([HALF], float("-inf"), gl.float32, in_scored)
    mass = gl.zeros([HALF], gl.float32, in_scored)
    acc = gl.zeros([HALF, D], gl.float32, summed)
    nothing = gl.zeros([HALF, T], gl.float32, scored)
    mbarrier.wait(q_full.index(0), 0)
    if count > 0:
        length = gl.load(lens + gl.load(pages))
        slot = gl.load(pages + gl.minimum(1, count - 1))  # the next page's: its length is read a step before
        mbarrier.wait(k_full.index(0), 0)
        scores = warpgroup_mma(
            q_tile, k_tiles.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        scores = warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(k_free.index(0), count=1)
        scores = _mask(scores, tokens, length, PADDING, FLOOR)
        weights, factor, top, mass = _softmax(scores, top, mass, scale_log2)
        weights = gl.convert_layout(weights.to(dtype), weighed)
        length = gl.load(lens + slot)
        slot = gl.load(pages + gl.minimum(2, count - 1))
        mbarrier.wait(v_full.index(0), 0)
        for i in range(1, count):
            at, before = i % STAGES, (i - 1) % STAGES
            mbarrier.wait(k_full.index(at), i // STAGES & 1)
            scores = warpgroup_mma(
                q_tile, k_tiles.index(at).permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            acc = warpgroup_mma(weights, v_tiles.index(before), acc, is_async=True)
            next_length = gl.load(lens + slot)
            slot = gl.load(pages + gl.minimum(i + 2, count - 1))
            scores = warpgroup_mma_wait(1, deps=(scores,))
            mbarrier.arrive(k_free.index(at), count=1)
            scores = _mask(scores, tokens, length, PADDING, FLOOR)
            length = next_length
            new_weights, factor, top, mass = _softmax(scores, top, mass, scale_log2)
            # The assembler moves the wait below up to the first line that does not depend on it, before the softmax,
            # but not over a branch: the wait for the next values stands here to be one.
            mbarrier.wait(v_full.index(at), i // STAGES & 1)
            acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))
            mbarrier.arrive(v_free.index(before), count=1)
            acc = acc * gl.convert_layout(factor, in_summed)[:, None]
            weights = gl.convert_layout(new_weights.to(dtype), weighed)
        acc = warpgroup_mma(weights, v_tiles.index((count - 1) % STAGES), acc, is_async=True)
        acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))

    safe_mass = gl.where(mass == 0.0, 1.0, mass)
    row_lse = gl.where(mass == 0.0, float("-inf"), (top + gl.log2(safe_mass)) * 0.6931471805599453)  # ln 2
    rows = begin + gl.arange(0, HALF, layout=in_scored)
    gl.store(lse + (row + rows), row_lse, mask=rows < keep)
    stored: gl.constexpr = in_rows(D)
    result = acc / gl.convert_layout(safe_mass, in_summed)[:, None]
    q_tile.store(result.to(dtype))  # to be read in another order; the queries are not needed any more
    tile = q_tile.load(stored)
    rows = begin + gl.arange(0, HALF, layout=gl.SliceLayout(1, stored))
    dims = gl.arange(0, D, layout=gl.SliceLayout(0, stored))
    gl.store(out + ((row + rows)[:, None] * D + dims[None, :]), tile, mask=(rows < keep)[:, None])


@gluon.jit
def _mask(scores, tokens, length, PADDING: gl.constexpr, FLOOR: gl.constexpr):
    """-inf behind a page's end; of tokens below FLOOR the compiler knows that they are before it."""
    if PADDING > 0:
        valid = tokens < length
        if FLOOR > 0:
            valid = valid | (tokens < FLOOR)
        scores = gl.where(valid[None, :], scores, float("-inf"))
    return scores


@gluon.jit
def _softmax(scores, top, mass, scale_log2):
    """`primitives.softmax_step`."""
    new_top = gl.maximum(top, gl.max(scores, axis=1) * scale_log2)
    shift = gl.where(new_top == float("-inf"), 0.0, new_top)
    weights = gl.exp2(gl.fma(scores, scale_log2, -shift[:, None]))
    factor = gl.exp2(top - shift)
    return weights, factor, new_top, mass * factor + gl.sum(weights, axis=1)
