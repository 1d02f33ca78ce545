"""From projections to rotated, stored keys and values; and from blocks of output back to tokens.

Two launches. The RMSNorm of q and k runs over all heads, so its factor is found first, one program a token. Then one
program takes one head of one block: it scales, rotates and stores the tile, and, because it holds the whole block,
pools it. The second launch finds most of what it reads in L2, where the first one left it.

The same kernel serves pages and frames; they differ in where a block's rows come from and go to.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import FP8_MAX, SMALLEST, Rows8, parts_of
from .rows import to_8_bits

FRAME_ROWS = 64  # tokens of a frame that one program takes


def norm_rope_to_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm_q: Tensor,
    norm_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    tokens: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    pooled_k: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See `api.norm_rope_to_pages`."""
    groups, slot_count, rows, dim = k_pages.shape
    blocks, batch = tokens.shape[0], q.shape[0]
    q_blocks = torch.empty((groups, blocks, rows, dim), dtype=k_pages.dtype, device=q.device)
    pooled_q = torch.empty((groups, blocks, *pooled_k.shape[2:]), dtype=torch.float32, device=q.device)
    k_store, v_store, q_store = (_by_head(x, batch) for x in (k_pages, v_pages, q_blocks))
    assert pooled_k.is_contiguous() and pooled_k.dtype == torch.float32
    _launch(
        q, k, v, norm_q, norm_k, cos, sin, tokens.contiguous(), slots.contiguous(),
        q_store, k_store, v_store, pooled_q, pooled_k, blocks, rows, slot_count, eps,
    )  # fmt: skip
    return q_blocks, pooled_q


def norm_rope_to_frames(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm_q: Tensor,
    norm_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    frame_slots: Tensor,
    k_frames: Tensor,
    v_frames: Tensor,
    eps: float,
) -> Tensor:
    """See `api.norm_rope_to_frames`. A frame is cut into pieces of `FRAME_ROWS` tokens, the last one shorter."""
    batch, count, _ = q.shape
    size, heads, dim = k_frames.shape[2:]
    q_out = torch.empty((batch, count, heads, dim), dtype=k_frames.dtype, device=q.device)
    k_rows, v_rows = k_frames.flatten(1, 2), v_frames.flatten(1, 2)
    assert k_rows.data_ptr() == k_frames.data_ptr() and v_rows.data_ptr() == v_frames.data_ptr(), "a view"
    q_store, k_store, v_store = (x.transpose(1, 2) for x in (q_out, k_rows, v_rows))
    pieces = triton.cdiv(size, FRAME_ROWS)
    _launch(
        q, k, v, norm_q, norm_k, cos, sin, None, frame_slots.contiguous(),
        q_store, k_store, v_store, None, None, pieces * frame_slots.shape[0], FRAME_ROWS, size, eps,
    )  # fmt: skip
    return q_out


def blocks_to_tokens(
    blocks: Tensor, tokens: Tensor, batch: int, count: int, eight_bits: bool = False
) -> Tensor | Rows8:
    """See `api.blocks_to_tokens`."""
    groups, block_count, rows, dim = blocks.shape
    heads, blocks = groups // batch, blocks.contiguous()
    if eight_bits:
        out = torch.empty((batch, count, heads * dim), dtype=torch.float8_e4m3fn, device=blocks.device)
        scale = torch.empty((batch, count, 1), dtype=torch.float32, device=blocks.device)
        with torch.cuda.device_of(blocks):
            _to_tokens_in_8_bits[(block_count * rows, batch)](
                blocks, tokens.contiguous(), out, scale, count, FP8_MAX, SMALLEST, HEADS=heads, D=dim,
                HEADS_PAD=triton.next_power_of_2(heads), D_PAD=triton.next_power_of_2(dim), num_warps=4,
            )  # fmt: skip
        return Rows8(out, scale)
    out = torch.empty((batch, count, heads * dim), dtype=blocks.dtype, device=blocks.device)
    with torch.cuda.device_of(blocks):
        _to_tokens[(heads, block_count, batch)](
            blocks, tokens.contiguous(), out, count, ROWS=rows, D=dim,
            ROWS_PAD=triton.next_power_of_2(rows), D_PAD=triton.next_power_of_2(dim), num_warps=4,
        )  # fmt: skip
    return out


def _by_head(pages: Tensor, batch: int) -> Tensor:
    """Pages [G, S, T, D], a group's pages one behind the other -> [B, H, S * T, D], the same memory."""
    groups, slots, rows, dim = pages.shape
    assert pages.stride()[1:] == (rows * dim, dim, 1)
    return pages.view(batch, groups // batch, slots * rows, dim)


def _launch(
    q, k, v, norm_q, norm_k, cos, sin, tokens, slots,
    q_store, k_store, v_store, pooled_q, pooled_k, blocks, rows, size, eps,
):  # fmt: skip
    """Both kernels. q_store, k_store, v_store [B, H, rows of the store, D], strided; size: tokens of a frame, or the
    page slots of a group."""
    batch, count, width = q.shape
    dim = k_store.shape[3]
    parts = 1 if pooled_k is None else parts_of(pooled_k)
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    factors = torch.empty((2, batch, count), dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        _inverse_rms[(count, batch, 2)](
            q, k, factors, *q.stride()[:2], *k.stride()[:2], eps,
            C=width, BLOCK=triton.next_power_of_2(width), num_warps=4,
        )  # fmt: skip
        _place[(width // dim, blocks, batch)](
            q, k, v, norm_q.contiguous(), norm_k.contiguous(), cos.contiguous(), sin.contiguous(), factors,
            tokens, slots, q_store, k_store, v_store, pooled_q, pooled_k, count, size,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            *q_store.stride()[:3], *k_store.stride()[:3], *v_store.stride()[:3],
            ROWS=rows, D=dim, ROWS_PAD=triton.next_power_of_2(rows), D_PAD=triton.next_power_of_2(dim),
            PAGES=tokens is not None, PARTS=parts, num_warps=4,
        )  # fmt: skip


@triton.jit
def _inverse_rms(q, k, factors, q_b, q_n, k_b, k_n, eps, C: tl.constexpr, BLOCK: tl.constexpr):
    """factors [2, B, N]: 1 / sqrt(mean of squares + eps) of each token's q, then of its k."""
    token, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    if tl.program_id(2) == 0:  # noqa: SIM108 - two pointers, which a conditional expression would evaluate both
        row = q + b * q_b + token * q_n
    else:
        row = k + b * k_b + token * k_n
    x = tl.load(row + cols, mask=cols < C, other=0.0).to(tl.float32)
    at = (tl.program_id(2) * tl.num_programs(1) + b) * tl.num_programs(0) + token
    tl.store(factors + at, 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / C + eps))


@triton.jit
def _load_tile(start, token, keep, stride, D: tl.constexpr, D_PAD: tl.constexpr):
    """Rows `token` of one head, [ROWS_PAD, D_PAD] float32; 0 where not kept."""
    dims = tl.arange(0, D_PAD)
    at = start + token[:, None].to(tl.int64) * stride + dims[None, :]
    return tl.load(at, mask=keep[:, None] & (dims < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _rotate(x, cos, sin, ROWS_PAD: tl.constexpr, D_PAD: tl.constexpr):
    """Turn the interleaved pairs of [ROWS_PAD, D_PAD] by [ROWS_PAD, D_PAD / 2]."""
    even, odd = tl.split(tl.reshape(x, (ROWS_PAD, D_PAD // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (ROWS_PAD, D_PAD))


@triton.jit
def _store_tile(start, row, keep, stride, tile, D: tl.constexpr, D_PAD: tl.constexpr):
    dims = tl.arange(0, D_PAD)
    at = start + row[:, None].to(tl.int64) * stride + dims[None, :]
    tl.store(at, tile, mask=keep[:, None] & (dims < D)[None, :])


@triton.jit
def _store_means(
    pooled, block, stored, keep,
    ROWS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, ROWS_PAD: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """The means of the parts of a block's rows as stored, of which those without a token are zero."""
    dims = tl.arange(0, D_PAD)
    values = stored.to(tl.float32)
    for part in tl.static_range(PARTS):
        mine, tile = keep, values
        if PARTS > 1:
            mine = keep & (tl.arange(0, ROWS_PAD) // (ROWS // PARTS) == part)
            tile = tl.where(mine[:, None], values, 0.0)
        length = tl.maximum(tl.sum(mine.to(tl.int32), axis=0), 1)
        tl.store(pooled + (block * PARTS + part) * D + dims, tl.sum(tile, axis=0) / length, mask=dims < D)


@triton.jit(do_not_specialize=["count", "size"])
def _place(
    q, k, v, norm_q, norm_k, cos, sin, factors, tokens, slots,
    q_store, k_store, v_store, pooled_q, pooled_k, count, size,
    q_b, q_n, k_b, k_n, v_b, v_n, qs_b, qs_h, qs_n, ks_b, ks_h, ks_n, vs_b, vs_h, vs_n,
    ROWS: tl.constexpr, D: tl.constexpr, ROWS_PAD: tl.constexpr, D_PAD: tl.constexpr, PAGES: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    h, block, b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    group, blocks = b * tl.num_programs(0) + h, tl.num_programs(1)
    rows, dims = tl.arange(0, ROWS_PAD), tl.arange(0, D_PAD)
    if PAGES:  # the table says which token stands in which row; all rows of the page are written
        token = tl.load(tokens + block * ROWS + rows, mask=rows < ROWS, other=-1)
        keep, written = token >= 0, rows < ROWS
        slot = tl.load(slots + group * blocks + block).to(tl.int64)
        q_row, kv_row = block * ROWS + rows, slot * ROWS + rows
    else:  # tokens stand as they are, `size` a frame; only rows of this frame are written
        pieces = (size + ROWS - 1) // ROWS
        row = (block % pieces) * ROWS + rows
        token = (block // pieces) * size + row
        keep = row < size
        written = keep
        slot = tl.load(slots + block // pieces).to(tl.int64)
        q_row, kv_row = token, slot * size + row

    pairs = tl.arange(0, D_PAD // 2)
    at = token[:, None].to(tl.int64) * (D // 2) + pairs[None, :]
    inside = keep[:, None] & (pairs < D // 2)[None, :]
    turn_cos, turn_sin = tl.load(cos + at, mask=inside, other=0.0), tl.load(sin + at, mask=inside, other=0.0)

    tile = _load_tile(q + b * q_b + h * D, token, keep, q_n, D, D_PAD)
    tile *= tl.load(factors + b * count + token, mask=keep, other=0.0)[:, None]
    tile *= tl.load(norm_q + h * D + dims, mask=dims < D, other=0.0).to(tl.float32)[None, :]
    stored = _rotate(tile, turn_cos, turn_sin, ROWS_PAD, D_PAD).to(q_store.dtype.element_ty)
    _store_tile(q_store + b * qs_b + h * qs_h, q_row, written, qs_n, stored, D, D_PAD)
    if PAGES:
        _store_means(pooled_q, group * blocks + block, stored, keep, ROWS, PARTS, D, ROWS_PAD, D_PAD)

    tile = _load_tile(k + b * k_b + h * D, token, keep, k_n, D, D_PAD)
    at = (tl.num_programs(2) + b) * count + token
    tile *= tl.load(factors + at, mask=keep, other=0.0)[:, None]
    tile *= tl.load(norm_k + h * D + dims, mask=dims < D, other=0.0).to(tl.float32)[None, :]
    stored = _rotate(tile, turn_cos, turn_sin, ROWS_PAD, D_PAD).to(k_store.dtype.element_ty)
    _store_tile(k_store + b * ks_b + h * ks_h, kv_row, written, ks_n, stored, D, D_PAD)
    if PAGES:
        _store_means(pooled_k, group * size + slot, stored, keep, ROWS, PARTS, D, ROWS_PAD, D_PAD)

    tile = _load_tile(v + b * v_b + h * D, token, keep, v_n, D, D_PAD).to(v_store.dtype.element_ty)
    _store_tile(v_store + b * vs_b + h * vs_h, kv_row, written, vs_n, tile, D, D_PAD)


@triton.jit(do_not_specialize=["count"])
def _to_tokens(
    blocks, tokens, out, count,
    ROWS: tl.constexpr, D: tl.constexpr, ROWS_PAD: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    h, block, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(0)
    rows, dims = tl.arange(0, ROWS_PAD), tl.arange(0, D_PAD)
    token = tl.load(tokens + block * ROWS + rows, mask=rows < ROWS, other=-1)
    mask = (token >= 0)[:, None] & (dims < D)[None, :]
    first = ((b * heads + h) * tl.num_programs(1) + block) * ROWS
    tile = tl.load(blocks + (first + rows)[:, None] * D + dims[None, :], mask=mask, other=0.0)
    to = (b * count + token.to(tl.int64))[:, None] * (heads * D) + h * D + dims[None, :]
    tl.store(out + to, tile, mask=mask)


@triton.jit(do_not_specialize=["count"])
def _to_tokens_in_8_bits(
    blocks, tokens, out, scale, count, largest, smallest,
    HEADS: tl.constexpr, D: tl.constexpr, HEADS_PAD: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """One row of the blocks with all its heads, because they share a scale."""
    row, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    token = tl.load(tokens + row)
    if token >= 0:
        heads, dims = tl.arange(0, HEADS_PAD), tl.arange(0, D_PAD)
        mask = (heads < HEADS)[:, None] & (dims < D)[None, :]
        first = (b * HEADS + heads) * tl.num_programs(0) + row
        tile = tl.load(blocks + first[:, None] * D + dims[None, :], mask=mask, other=0.0).to(tl.float32)
        unit = tl.maximum(tl.max(tl.max(tl.abs(tile), axis=1), axis=0), smallest) / largest
        to = b * count + token
        at = to * (HEADS * D) + heads[:, None] * D + dims[None, :]
        tl.store(out + at, to_8_bits(tile, unit, largest), mask=mask)
        tl.store(scale + to, unit)
