"""From projections to rotated, stored keys and values; and from blocks of output back to tokens.

Two launches. The RMSNorm of q and k runs over all heads, so its factor is found first. Then a program takes one head of
one block of q, k or v: it scales, rotates, stores and pools it, a few rows at a time. The second launch finds most of
what it reads in L2, where the first one left it.

The same kernel serves pages and frames; they differ in where a block's rows come from and go to.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...sizes import cdiv, power_of_2
from ...workspace import dense, empty
from ..reference import FP8_MAX, SMALLEST, Rows8, parts_of
from .rows import to_8_bits, warps_for

FRAME_ROWS = 64  # tokens of a frame that one program takes
NORM_ROWS = 2  # tokens whose norm's factor one program finds
HELD_ROWS = 32  # of a block, by a program at once: all 128 took 255 registers a thread, and spilled


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
    q_blocks = empty("q_blocks", (groups, blocks, rows, dim), k_pages.dtype, q.device)
    pooled_q = empty("pooled_q", (groups, blocks, *pooled_k.shape[2:]), torch.float32, q.device)
    k_store, v_store, q_store = (_by_head(x, batch) for x in (k_pages, v_pages, q_blocks))
    assert pooled_k.is_contiguous() and pooled_k.dtype == torch.float32
    _launch(
        q, k, v, norm_q, norm_k, cos, sin, dense("tokens", tokens), dense("slots", slots),
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
    q_out = empty("q_frames", (batch, count, heads, dim), k_frames.dtype, q.device)
    k_rows, v_rows = k_frames.flatten(1, 2), v_frames.flatten(1, 2)
    assert k_rows.data_ptr() == k_frames.data_ptr() and v_rows.data_ptr() == v_frames.data_ptr(), "a view"
    q_store, k_store, v_store = (x.transpose(1, 2) for x in (q_out, k_rows, v_rows))
    pieces = cdiv(size, FRAME_ROWS)
    _launch(
        q, k, v, norm_q, norm_k, cos, sin, None, dense("slots", frame_slots),
        q_store, k_store, v_store, None, None, pieces * frame_slots.shape[0], FRAME_ROWS, size, eps,
    )  # fmt: skip
    return q_out


def blocks_to_tokens(
    blocks: Tensor, tokens: Tensor, batch: int, count: int, eight_bits: bool = False
) -> Tensor | Rows8:
    """See `api.blocks_to_tokens`."""
    groups, block_count, rows, dim = blocks.shape
    heads, blocks, tokens = groups // batch, dense("blocks", blocks), dense("tokens", tokens)
    if eight_bits:
        out = empty("attended", (batch, count, heads * dim), torch.float8_e4m3fn, blocks.device)
        scale = empty("attended.scale", (batch, count, 1), torch.float32, blocks.device)
        with torch.cuda.device_of(blocks):
            _to_tokens_in_8_bits[(block_count * rows, batch)](
                blocks, tokens, out, scale, count, FP8_MAX, SMALLEST, HEADS=heads, D=dim,
                HEADS_PAD=power_of_2(heads), D_PAD=power_of_2(dim), num_warps=4,
            )  # fmt: skip
        return Rows8(out, scale)
    out = empty("attended", (batch, count, heads * dim), blocks.dtype, blocks.device)
    with torch.cuda.device_of(blocks):
        _to_tokens[(heads, block_count, batch)](
            blocks, tokens, out, count, ROWS=rows, D=dim,
            ROWS_PAD=power_of_2(rows), D_PAD=power_of_2(dim), num_warps=4,
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
    q, k, v = (
        x if x.stride(2) == 1 else dense(f"place.{name}", x) for name, x in (("q", q), ("k", k), ("v", v))
    )
    norm_q, norm_k = dense("place.norm_q", norm_q), dense("place.norm_k", norm_k)
    cos, sin = dense("place.cos", cos), dense("place.sin", sin)
    factors = empty("place.factors", (2, batch, count), torch.float32, q.device)
    with torch.cuda.device_of(q):
        _inverse_rms[(cdiv(count, NORM_ROWS), batch, 2)](
            q, k, factors, *q.stride()[:2], *k.stride()[:2], count, eps,
            C=width, BLOCK=power_of_2(width), ROWS=NORM_ROWS, num_warps=warps_for(width),
        )  # fmt: skip
        _place[(3 * (width // dim), blocks, batch)](
            q, k, v, norm_q, norm_k, cos, sin, factors,
            tokens, slots, q_store, k_store, v_store, pooled_q, pooled_k, count, size,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            *q_store.stride()[:3], *k_store.stride()[:3], *v_store.stride()[:3],
            ROWS=rows, HELD=min(HELD_ROWS, power_of_2(rows // parts)),
            D=dim, D_PAD=power_of_2(dim), PAGES=tokens is not None, PARTS=parts, num_warps=4,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def _inverse_rms(
    q, k, factors, q_b, q_n, k_b, k_n, count, eps, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """factors [2, B, N]: 1 / sqrt(mean of squares + eps) of each token's q, then of its k."""
    token, b = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    if tl.program_id(2) == 0:
        rows = q + b * q_b + token[:, None].to(tl.int64) * q_n
    else:
        rows = k + b * k_b + token[:, None].to(tl.int64) * k_n
    mask = (token < count)[:, None] & (cols < C)[None, :]
    x = tl.load(rows + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    at = (tl.program_id(2) * tl.num_programs(1) + b) * count + token
    tl.store(factors + at, 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / C + eps), mask=token < count)


@triton.jit
def _rotate(x, cos, sin, ROWS: tl.constexpr, D_PAD: tl.constexpr):
    """Turn the interleaved pairs of [ROWS, D_PAD] by [ROWS, D_PAD / 2]."""
    even, odd = tl.split(tl.reshape(x, (ROWS, D_PAD // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (ROWS, D_PAD))


@triton.jit
def _place_rows(
    x, x_n, norm, factors, cos, sin, tokens, first_token, inside, store, store_n, means,
    ROWS: tl.constexpr, HELD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PAGES: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """One head's rows of a block, from x [N, D] to store [ROWS, D]: of q and k scaled, rotated and pooled; of v, which
    has no `norm`, as they are. inside: how many rows of a frame are left; a page is written whole."""
    dims, pairs = tl.arange(0, D_PAD), tl.arange(0, D_PAD // 2)
    PART: tl.constexpr = ROWS // PARTS
    for part in range(PARTS):
        total = tl.zeros((HELD, D_PAD), tl.float32)
        count = 0
        for first in range(0, PART, HELD):
            in_part = first + tl.arange(0, HELD)
            row = part * PART + in_part
            if PAGES:  # the table says which token stands in which row
                written = in_part < PART
                token = tl.load(tokens + row, mask=written, other=-1)
                keep = token >= 0
            else:
                written = row < inside
                token = first_token + row
                keep = written
            far = token[:, None].to(tl.int64)
            mask = keep[:, None] & (dims < D)[None, :]
            tile = tl.load(x + far * x_n + dims[None, :], mask=mask, other=0.0)
            if norm is not None:
                mask = keep[:, None] & (pairs < D // 2)[None, :]
                turn_cos = tl.load(cos + far * (D // 2) + pairs[None, :], mask=mask, other=0.0)
                turn_sin = tl.load(sin + far * (D // 2) + pairs[None, :], mask=mask, other=0.0)
                scaled = tile.to(tl.float32) * tl.load(factors + token, mask=keep, other=0.0)[:, None]
                scaled *= tl.load(norm + dims, mask=dims < D, other=0.0).to(tl.float32)[None, :]
                tile = _rotate(scaled, turn_cos, turn_sin, HELD, D_PAD)
            stored = tile.to(store.dtype.element_ty)
            to = store + row[:, None].to(tl.int64) * store_n + dims[None, :]
            tl.store(to, stored, mask=written[:, None] & (dims < D)[None, :])
            if means is not None:  # of the rows as stored, of which those without a token are zero
                total += stored.to(tl.float32)
                count += tl.sum(keep.to(tl.int32), axis=0)
        if means is not None:
            mean = tl.sum(total, axis=0) / tl.maximum(count, 1)
            tl.store(means + part * D + dims, mean, mask=dims < D)


@triton.jit(do_not_specialize=["count", "size"])
def _place(
    q, k, v, norm_q, norm_k, cos, sin, factors, tokens, slots, q_store, k_store, v_store, pooled_q, pooled_k,
    count, size, q_b, q_n, k_b, k_n, v_b, v_n, qs_b, qs_h, qs_n, ks_b, ks_h, ks_n, vs_b, vs_h, vs_n,
    ROWS: tl.constexpr, HELD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PAGES: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    heads = tl.num_programs(0) // 3  # a program each for q, k and v
    h, which = (tl.program_id(0) % heads).to(tl.int64), tl.program_id(0) // heads
    block, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group, blocks = b * heads + h, tl.num_programs(1)
    if PAGES:
        slot = tl.load(slots + group * blocks + block).to(tl.int64)
        q_row, kv_row = block.to(tl.int64) * ROWS, slot * ROWS
        first, inside = 0, ROWS
        tokens += block * ROWS
        pooled_q += (group * blocks + block) * PARTS * D
        pooled_k += (group * size + slot) * PARTS * D
    else:  # tokens stand as they are, `size` a frame, of which a block is a piece
        pieces = (size + ROWS - 1) // ROWS
        row = (block % pieces) * ROWS
        slot = tl.load(slots + block // pieces).to(tl.int64)
        first, inside = (block // pieces) * size + row, size - row
        q_row, kv_row = first.to(tl.int64), slot * size + row
    if which == 0:
        x, store = q + b * q_b + h * D, q_store + b * qs_b + h * qs_h + q_row * qs_n
        _place_rows(
            x, q_n, norm_q + h * D, factors + b * count, cos, sin, tokens, first, inside, store, qs_n, pooled_q,
            ROWS, HELD, D, D_PAD, PAGES, PARTS,
        )  # fmt: skip
    elif which == 1:
        x, store = k + b * k_b + h * D, k_store + b * ks_b + h * ks_h + kv_row * ks_n
        of_k = factors + (tl.num_programs(2) + b) * count
        _place_rows(
            x, k_n, norm_k + h * D, of_k, cos, sin, tokens, first, inside, store, ks_n, pooled_k,
            ROWS, HELD, D, D_PAD, PAGES, PARTS,
        )  # fmt: skip
    else:
        x, store = v + b * v_b + h * D, v_store + b * vs_b + h * vs_h + kv_row * vs_n
        _place_rows(
            x, v_n, None, factors, cos, sin, tokens, first, inside, store, vs_n, None,
            ROWS, HELD, D, D_PAD, PAGES, PARTS,
        )  # fmt: skip


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
