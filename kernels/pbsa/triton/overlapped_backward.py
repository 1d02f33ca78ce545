"""Backward PBSA for Hopper in Gluon: what `overlapped` is to `forward`, this is to `backward`, for blocks of 128.

Two warp groups share a tile of 128 query rows (or of a page's 128 tokens) and step over keys (or query rows) by 64,
which one warp fetches. In each step the products that lead to the next softmax are started before the previous step's
last one, so that the tensor cores work while weights are computed. Sums run in a fixed order, as in `backward`, whose
formulas, lists and letters these are.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# HALF: rows of a warp group, and here of a step, too
from .overlapped import HALF, barriers, fetch, fetch_step, in_rows, product, ring_of


@gluon.jit
def _fetch_own(a_rows, b_rows, a_first, b_first, D: gl.constexpr):
    """The program's own 128 rows of two tensors, in halves, on their way; and the barrier that says when."""
    a_halves = gl.allocate_shared_memory(a_rows.dtype, [2, HALF, D], a_rows.layout)
    b_halves = gl.allocate_shared_memory(a_rows.dtype, [2, HALF, D], a_rows.layout)
    full = barriers(1, 1)
    fence_async_shared()
    mbarrier.expect(full.index(0), 4 * a_rows.block_type.nbytes)
    for half in gl.static_range(2):
        fetch(a_rows, [a_first + half * HALF, 0], full.index(0), a_halves.index(half))
        fetch(b_rows, [b_first + half * HALF, 0], full.index(0), b_halves.index(half))
    return a_halves, b_halves, full


@gluon.jit
def _fetch_steps(a_rows, b_rows, a_first, b_first, ring, listed, count, STAGES: gl.constexpr):
    """The loading warp: of each of `count` blocks or pages that are listed, both halves, one step each. a_first,
    b_first: the group's first rows."""
    for i in range(2 * count):
        row = gl.load(listed + i // 2) * (2 * HALF) + i % 2 * HALF
        fetch_step(i, a_rows, b_rows, a_first + row, b_first + row, ring, STAGES)


@gluon.jit
def _start(a_tile, b_tile, nothing):
    """a_tile b_tile^T, started."""
    return warpgroup_mma(a_tile, b_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def _start_from(columns, a_tile, b_tile, layout: gl.constexpr):
    """a_tile b_tile^T, started, with these numbers added to its columns."""
    first = gl.zeros([HALF, HALF], gl.float32, layout) + columns[None, :]
    return warpgroup_mma(a_tile, b_tile.permute((1, 0)), first, is_async=True)


@gluon.jit
def _store(target, first, tile, D: gl.constexpr):
    """Rows of a warp group, float32, to rows of `target` from `first` on."""
    layout: gl.constexpr = in_rows(D)
    rows = (first + gl.arange(0, HALF, layout=gl.SliceLayout(1, layout))).to(gl.int64)
    dims = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    gl.store(
        target + (rows[:, None] * D + dims[None, :]),
        gl.convert_layout(tile.to(target.dtype.element_ty), layout),
    )


# ---------------------------------------------------------------------------------------------- queries


@gluon.jit(do_not_specialize=["num_lists", "longest", "num_slots"])
def queries(
    q_rows, k_rows, v_rows, page_len, idx, cnt, grad_rows, lse, delta, dq,
    q_g, k_g, v_g,
    num_lists, longest, num_slots, scale, scale_log2,
    D: gl.constexpr, PADDING: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dQ: a program for each query block of 128 with a list of its own.

    q_rows, k_rows, v_rows, grad_rows: as `described`, in tiles of 64; q_g, k_g, v_g: rows from group to group. lse over
    scale, so that it can be taken from scores.
    """
    g = gl.program_id(1)
    block = gl.program_id(0)
    row_of_lists = g.to(gl.int64) * num_lists + block
    ring = ring_of(k_rows, v_rows, HALF, D, 2, STAGES)
    grad_row = (g * num_lists + block) * (2 * HALF)
    q_halves, grad_halves, own_full = _fetch_own(q_rows, grad_rows, g * q_g + block * (2 * HALF), grad_row, D)
    listed = idx + row_of_lists * longest, page_len + g.to(gl.int64) * num_slots, gl.load(cnt + row_of_lists)
    facts = lse, delta, dq, scale, scale_log2
    first = row_of_lists * (2 * HALF)
    gl.warp_specialize(
        [
            (_query_rows, (q_halves.index(0), grad_halves.index(0), own_full, ring, listed, facts, first, D, PADDING,
                           STAGES)),
            (_query_rows, (q_halves.index(1), grad_halves.index(1), own_full, ring, listed, facts, first + HALF, D,
                           PADDING, STAGES)),
            (_fetch_steps, (k_rows, v_rows, g * k_g, g * v_g, ring, listed[0], listed[2], STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _query_rows(
    q_tile, grad_tile, own_full, ring, listed, facts, first,
    D: gl.constexpr, PADDING: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp group's rows, from `first` on, over all groups."""
    k_tiles, v_tiles, k_full, k_free, v_full, v_free = ring
    pages, lens, count = listed
    lse, delta, dq, scale, scale_log2 = facts
    dtype: gl.constexpr = q_tile.dtype
    scored: gl.constexpr = product(HALF)
    summed: gl.constexpr = product(D)
    weighed: gl.constexpr = gl.DotOperandLayout(0, summed, 2)
    rows = first + gl.arange(0, HALF, layout=gl.SliceLayout(1, scored))
    row_lse, row_delta = gl.load(lse + rows) * scale_log2, gl.load(delta + rows)
    keys = gl.arange(0, HALF, layout=gl.SliceLayout(0, scored))
    nothing = gl.zeros([HALF, HALF], gl.float32, scored)
    acc = gl.zeros([HALF, D], gl.float32, summed)
    mbarrier.wait(own_full.index(0), 0)
    steps = 2 * count
    if steps > 0:
        mbarrier.wait(k_full.index(0), 0)
        scores = _start(q_tile, k_tiles.index(0), nothing)
        mbarrier.wait(v_full.index(0), 0)
        grads = _start(grad_tile, v_tiles.index(0), nothing)
        scores, grads = warpgroup_mma_wait(0, deps=(scores, grads))
        mbarrier.arrive(v_free.index(0), count=1)
        weights = _weights(scores, row_lse, keys, _left(pages, lens, 0, PADDING), scale_log2, PADDING)
        ds = gl.convert_layout((weights * (grads - row_delta[:, None])).to(dtype), weighed)
        for i in range(1, steps):
            at, before = i % STAGES, (i - 1) % STAGES
            phase = i // STAGES & 1
            left = _left(pages, lens, i, PADDING)
            mbarrier.wait(k_full.index(at), phase)
            scores = _start(q_tile, k_tiles.index(at), nothing)
            mbarrier.wait(v_full.index(at), phase)
            grads = _start(grad_tile, v_tiles.index(at), nothing)
            acc = warpgroup_mma(ds, k_tiles.index(before), acc, is_async=True)
            scores = warpgroup_mma_wait(2, deps=(scores,))
            weights = _weights(scores, row_lse, keys, left, scale_log2, PADDING)
            mbarrier.wait(own_full.index(0), 0)  # a branch: see overlapped._attend
            grads = warpgroup_mma_wait(1, deps=(grads,))
            mbarrier.arrive(v_free.index(at), count=1)
            new_ds = weights * (grads - row_delta[:, None])
            mbarrier.wait(own_full.index(0), 0)
            acc, ds = warpgroup_mma_wait(0, deps=(acc, ds))
            mbarrier.arrive(k_free.index(before), count=1)
            ds = gl.convert_layout(new_ds.to(dtype), weighed)
        acc = warpgroup_mma(ds, k_tiles.index((steps - 1) % STAGES), acc, is_async=True)
        acc, ds = warpgroup_mma_wait(0, deps=(acc, ds))
    _store(dq, first, acc * scale, D)


@gluon.jit
def _left(pages, lens, i, PADDING: gl.constexpr):
    """How many tokens the page of step i still holds there; read early, so that nothing waits for it."""
    left = HALF + 0
    if PADDING > 0:
        left = gl.load(lens + gl.load(pages + i // 2)) - i % 2 * HALF
    return left


@gluon.jit
def _weights(scores, row_lse, keys, left, scale_log2, PADDING: gl.constexpr):
    """The softmax's weights of a step, 0 behind the page's end."""
    weights = gl.exp2(gl.fma(scores, scale_log2, -row_lse[:, None]))
    if PADDING > 0:
        weights = gl.where((keys < left)[None, :], weights, 0.0)
    return weights


# ---------------------------------------------------------------------------------------------- pages


@gluon.jit(do_not_specialize=["num_targets", "blocks", "num_slots"])
def pages(
    q_rows, k_rows, v_rows, page_len, targets, readers, reader_cnt, grad_rows, lse, delta, dk, dv,
    q_g, k_g, v_g,
    num_targets, blocks, num_slots, scale, scale_log2,
    D: gl.constexpr, PADDING: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dK and dV: a program for each target page of 128 tokens; the rest as for `queries`."""
    g = gl.program_id(1)
    target = g.to(gl.int64) * num_targets + gl.program_id(0)
    slot = gl.load(targets + target)
    rows = g.to(gl.int64) * blocks * (2 * HALF)
    ring = ring_of(q_rows, grad_rows, HALF, D, 2, STAGES)
    own_row = slot * (2 * HALF)
    k_halves, v_halves, own_full = _fetch_own(k_rows, v_rows, g * k_g + own_row, g * v_g + own_row, D)
    read_by = readers + target * blocks, gl.load(reader_cnt + target)
    length = 2 * HALF
    if PADDING > 0:
        length = gl.load(page_len + g.to(gl.int64) * num_slots + slot)
    facts = lse + rows, delta + rows, dk, dv, scale, scale_log2
    first = target.to(gl.int32) * (2 * HALF)  # a register less than 64 bits take
    gl.warp_specialize(
        [
            (_page_keys, (k_halves.index(0), v_halves.index(0), own_full, ring, read_by, length, facts, first, D,
                          PADDING, STAGES)),
            (_page_keys, (k_halves.index(1), v_halves.index(1), own_full, ring, read_by, length - HALF, facts,
                          first + HALF, D, PADDING, STAGES)),
            (_fetch_steps, (q_rows, grad_rows, g * q_g, g * blocks * (2 * HALF), ring, read_by[0], read_by[1], STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _page_keys(
    k_tile, v_tile, own_full, ring, readers, length, facts, first,
    D: gl.constexpr, PADDING: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp group's tokens, `length` of them held; scores stand transposed: [tokens, query rows]."""
    q_tiles, grad_tiles, q_full, q_free, grad_full, grad_free = ring
    read_by, count = readers
    lse, delta, dk, dv, scale, scale_log2 = facts
    dtype: gl.constexpr = k_tile.dtype
    scored: gl.constexpr = product(HALF)
    summed: gl.constexpr = product(D)
    weighed: gl.constexpr = gl.DotOperandLayout(0, summed, 2)
    in_step = gl.arange(0, HALF, layout=gl.SliceLayout(0, scored))
    valid = gl.arange(0, HALF, layout=gl.SliceLayout(1, scored)) < length
    dk_acc = gl.zeros([HALF, D], gl.float32, summed)
    dv_acc = gl.zeros([HALF, D], gl.float32, summed)
    mbarrier.wait(own_full.index(0), 0)
    steps = 2 * count
    if steps > 0:
        block = gl.load(read_by)
        row = block * (2 * HALF)
        mbarrier.wait(q_full.index(0), 0)
        scores = _start_from(-gl.load(lse + row + in_step), k_tile, q_tiles.index(0), scored)
        mbarrier.wait(grad_full.index(0), 0)
        grads = _start_from(-gl.load(delta + row + in_step), v_tile, grad_tiles.index(0), scored)
        scores, grads = warpgroup_mma_wait(0, deps=(scores, grads))
        weights = _weights_of(scores, valid, scale_log2, PADDING)
        rounded = gl.convert_layout(weights.to(dtype), weighed)
        dv_acc = warpgroup_mma(rounded, grad_tiles.index(0), dv_acc, is_async=True)
        ds = gl.convert_layout((weights * grads).to(dtype), weighed)
        dv_acc, rounded = warpgroup_mma_wait(0, deps=(dv_acc, rounded))
        mbarrier.arrive(grad_free.index(0), count=1)
        for i in range(1, steps):
            at, before = i % STAGES, (i - 1) % STAGES
            phase = i // STAGES & 1
            row = block * (2 * HALF) + i % 2 * HALF
            block = gl.load(
                read_by + gl.minimum((i + 1) // 2, count - 1)
            )  # the next step's: nothing waits for it
            mbarrier.wait(q_full.index(at), phase)
            scores = _start_from(-gl.load(lse + row + in_step), k_tile, q_tiles.index(at), scored)
            mbarrier.wait(grad_full.index(at), phase)
            grads = _start_from(-gl.load(delta + row + in_step), v_tile, grad_tiles.index(at), scored)
            dk_acc = warpgroup_mma(ds, q_tiles.index(before), dk_acc, is_async=True)
            scores = warpgroup_mma_wait(2, deps=(scores,))
            weights = _weights_of(scores, valid, scale_log2, PADDING)
            mbarrier.wait(own_full.index(0), 0)  # a branch: see overlapped._attend
            grads, dk_acc, ds = warpgroup_mma_wait(0, deps=(grads, dk_acc, ds))
            mbarrier.arrive(q_free.index(before), count=1)
            rounded = gl.convert_layout(weights.to(dtype), weighed)
            dv_acc = warpgroup_mma(rounded, grad_tiles.index(at), dv_acc, is_async=True)
            ds = gl.convert_layout((weights * grads).to(dtype), weighed)
            mbarrier.wait(own_full.index(0), 0)
            dv_acc, rounded = warpgroup_mma_wait(0, deps=(dv_acc, rounded))
            mbarrier.arrive(grad_free.index(at), count=1)
        dk_acc = warpgroup_mma(ds, q_tiles.index((steps - 1) % STAGES), dk_acc, is_async=True)
        dk_acc, ds = warpgroup_mma_wait(0, deps=(dk_acc, ds))
    _store(dk, first, dk_acc * scale, D)
    _store(dv, first, dv_acc, D)


@gluon.jit
def _weights_of(scores, valid, scale_log2, PADDING: gl.constexpr):
    """Transposed: the weights that query rows give this page's tokens."""
    weights = gl.exp2(scores * scale_log2)
    if PADDING > 0:
        weights = gl.where(valid[:, None], weights, 0.0)
    return weights
