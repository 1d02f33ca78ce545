"""Forward PBSA for Hopper, written down to its warps: products of one page run under the softmax of the next.

What `forward.forward_descriptors` leaves to Triton's compiler is said here in Gluon, Triton's lower language. One warp
lets the copy engine fetch pages; two warp groups have half of the tile's rows each. A warp group starts the scores of
a page and, before it waits for them, the product of the previous page's weights and values. So the tensor cores have
work while the softmax is computed, which Triton's compiler does not bring about: it waits for each product before the
next line that needs it.

`variants` says when it is used; numbers, lists and the split of the last wave are `forward`'s. Letters as in `api`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

fetch = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name until Triton 3.6
RUN_TIME = ["whole", "parts", "num_rows", "tiles", "list_rows", "num_lists", "longest", "num_slots"]


@gluon.jit(do_not_specialize=RUN_TIME)
def forward_overlapped(
    q, k, v, page_len, idx, cnt, out, lse,
    q_g, q_n, q_t, k_g, k_s, k_t, v_g, v_s, v_t,
    whole, parts, num_rows, tiles, list_rows, num_lists, longest, num_slots, scale_log2,
    T: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr, PADDING: gl.constexpr, FLOOR: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Needs what `forward_descriptors` needs, a list of 2 * ROWS query rows or more, and D a power of two.

    ROWS: of a warp group, half of the tile's. STAGES: pages of k, and of v, that are there or on their way.
    """
    dtype: gl.constexpr = q.dtype.element_ty
    # as in forward._locate and _own_pages, for whole tiles of 2 * ROWS rows
    program = gl.program_id(0)
    after = gl.maximum(program - whole, 0)
    alone = program < whole
    tile = gl.where(alone, program, whole + after // parts)
    part = gl.where(alone, 0, after % parts)
    share = gl.where(alone, 1, parts)
    g = (tile // (num_lists * tiles)).to(gl.int64)
    which = tile // tiles % num_lists
    first = tile % tiles * (2 * ROWS)
    listed = gl.load(cnt + g * num_lists + which)
    begin = listed * part // share
    pages = idx + (g * num_lists + which) * longest + begin
    count = listed * (part + 1) // share - begin

    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype)
    page_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([T, D], dtype)
    q_rows = tma.make_tensor_descriptor(q + g * q_g, [num_lists * list_rows, D], [D, 1], [ROWS, D], q_layout)
    k_rows = tma.make_tensor_descriptor(k + g * k_g, [num_slots * T, D], [D, 1], [T, D], page_layout)
    v_rows = tma.make_tensor_descriptor(v + g * v_g, [num_slots * T, D], [D, 1], [T, D], page_layout)
    q_halves = gl.allocate_shared_memory(dtype, [2, ROWS, D], q_layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, T, D], page_layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, T, D], page_layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)  # both warp groups have read it
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_free.index(i), count=2)
    fence_async_shared()
    mbarrier.expect(q_full, 2 * q_rows.block_type.nbytes)
    fetch(q_rows, [which * list_rows + first, 0], q_full, q_halves.index(0))
    fetch(q_rows, [which * list_rows + first + ROWS, 0], q_full, q_halves.index(1))

    row = g * num_lists * list_rows + which * list_rows + first
    behind = num_rows + ((tile - whole).to(gl.int64) * (parts - 1) + part - 1) * (2 * ROWS)
    row = gl.where(part > 0, behind, row)
    keep = list_rows - first
    lens = page_len + g * num_slots
    gl.warp_specialize(
        [
            (_attend, (q_halves.index(0), k_tiles, v_tiles, q_full, k_full, k_free, v_full, v_free, pages, lens, count,
                       scale_log2, out, lse, row, keep, T, D, ROWS, STAGES, PADDING, FLOOR)),
            (_attend, (q_halves.index(1), k_tiles, v_tiles, q_full, k_full, k_free, v_full, v_free, pages, lens, count,
                       scale_log2, out, lse, row + ROWS, keep - ROWS, T, D, ROWS, STAGES, PADDING, FLOOR)),
            (_fetch_pages, (k_rows, v_rows, k_tiles, v_tiles, k_full, k_free, v_full, v_free, pages, count, T, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _fetch_pages(
    k_rows, v_rows, k_tiles, v_tiles, k_full, k_free, v_full, v_free, pages, count,
    T: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp. A stage's first use waits for nobody: phase 1 of a new barrier counts as over."""
    for i in range(count):
        at, phase = i % STAGES, i // STAGES & 1
        row = gl.load(pages + i) * T
        mbarrier.wait(k_free.index(at), phase ^ 1)
        mbarrier.expect(k_full.index(at), k_rows.block_type.nbytes)
        fetch(k_rows, [row, 0], k_full.index(at), k_tiles.index(at))
        mbarrier.wait(v_free.index(at), phase ^ 1)
        mbarrier.expect(v_full.index(at), v_rows.block_type.nbytes)
        fetch(v_rows, [row, 0], v_full.index(at), v_tiles.index(at))


@gluon.jit
def _attend(
    q_tile, k_tiles, v_tiles, q_full, k_full, k_free, v_full, v_free, pages, lens, count,
    scale_log2, out, lse, first, keep, T: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr,
    PADDING: gl.constexpr, FLOOR: gl.constexpr,
):  # fmt: skip
    """One warp group's rows, from `first` on, `keep` of them to be stored."""
    dtype: gl.constexpr = q_tile.dtype
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, T, 16])
    summed: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    weighed: gl.constexpr = gl.DotOperandLayout(0, summed, 2)
    in_scored: gl.constexpr = gl.SliceLayout(1, scored)
    in_summed: gl.constexpr = gl.SliceLayout(1, summed)
    tokens = gl.arange(0, T, layout=gl.SliceLayout(0, scored))
    top = gl.full([ROWS], float("-inf"), gl.float32, in_scored)
    mass = gl.zeros([ROWS], gl.float32, in_scored)
    acc = gl.zeros([ROWS, D], gl.float32, summed)
    nothing = gl.zeros([ROWS, T], gl.float32, scored)
    mbarrier.wait(q_full, 0)
    if count > 0:
        length = gl.load(lens + gl.load(pages))
        slot = gl.load(pages + gl.minimum(1, count - 1))  # of the next page; its length is read in the step before
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
    rows = gl.arange(0, ROWS, layout=in_scored)
    gl.store(lse + (first + rows), row_lse, mask=rows < keep)
    stored: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])  # 16 bytes a thread
    tile = gl.convert_layout((acc / gl.convert_layout(safe_mass, in_summed)[:, None]).to(dtype), stored)
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, stored))
    dims = gl.arange(0, D, layout=gl.SliceLayout(0, stored))
    gl.store(out + ((first + rows)[:, None] * D + dims[None, :]), tile, mask=(rows < keep)[:, None])


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
