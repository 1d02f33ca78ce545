"""The fused element-wise operations in plain PyTorch: this file defines what is correct.

Precision. Inputs are widened to float32 (float64 stays float64, the yardstick of tests) and every result is rounded
once, when it is stored in its tensor. Two things are computed from values that were rounded before: pooled vectors are
means of keys and queries as stored, and the norm behind a residual sees the sum as stored. So a stage gives the same
numbers whether it runs alone or fused with the one before it.

Letters: B batch, N tokens of a chunk, H heads, D head dim, C = H * D, F frames, NB blocks of a chunk, T rows of a
block, G = B * H groups, S page slots of a group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FP8_MAX = 448.0  # largest float8_e4m3fn
INT8_MAX = 127.0
SMALLEST = 1e-12  # a row of zeros has a scale too
SMALLEST_SQUARE = 1e-24  # mean square of a pixel in the VAE's norms


class Rows8(NamedTuple):
    """Rows in 8 bits, each with a scale: x = rows * scale."""

    rows: Tensor  # [..., C] float8_e4m3fn
    scale: Tensor  # [..., 1] float32


class Pages8(NamedTuple):
    """A layer's pages in 8 bits: k = k * k_scale by channel, v = v * v_scale by token."""

    k: Tensor  # [G, S, T, D] int8
    k_scale: Tensor  # [G, S, D] float32
    v: Tensor  # [G, S, T, D] int8
    v_scale: Tensor  # [G, S, T] float32


def parts_of(pooled: Tensor) -> int:
    """R of pooled vectors [G, n, R, D], 1 of [G, n, D]."""
    return pooled.shape[2] if pooled.dim() == 4 else 1


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
    dtype = k_pages.dtype
    q_blocks, k_blocks = (
        _pack(_norm_rope(x, weight, cos, sin, eps).to(dtype), tokens)
        for x, weight in ((q, norm_q), (k, norm_k))
    )
    v_blocks = _pack(v.unflatten(2, (-1, 2 * cos.shape[1])).to(dtype), tokens)
    at = (torch.arange(slots.shape[0], device=slots.device)[:, None], slots.long())
    k_pages[at], v_pages[at] = k_blocks, v_blocks
    parts = parts_of(pooled_k)
    held = (tokens >= 0).view(len(tokens), parts, -1).sum(-1).clamp(min=1)[..., None]  # [NB, R, 1]
    pooled_q, new_pooled_k = (
        (x.to(pooled_k.dtype).unflatten(2, (parts, -1)).sum(3) / held).view(*x.shape[:2], *pooled_k.shape[2:])
        for x in (q_blocks, k_blocks)
    )
    pooled_k[at] = new_pooled_k
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
    """See `api.norm_rope_to_frames`."""
    dtype, frames = k_frames.dtype, len(frame_slots)
    q, k = (_norm_rope(x, w, cos, sin, eps).to(dtype) for x, w in ((q, norm_q), (k, norm_k)))
    v = v.unflatten(2, (-1, 2 * cos.shape[1])).to(dtype)
    k_frames[:, frame_slots.long()] = k.unflatten(1, (frames, -1))
    v_frames[:, frame_slots.long()] = v.unflatten(1, (frames, -1))
    return q


def blocks_to_tokens(
    blocks: Tensor, tokens: Tensor, batch: int, count: int, eight_bits: bool = False
) -> Tensor | Rows8:
    """See `api.blocks_to_tokens`."""
    rows = blocks.unflatten(0, (batch, -1)).flatten(2, 3).transpose(1, 2)  # [B,NB*T,H,D]
    out = rows.new_empty(
        batch, count + 1, *rows.shape[2:]
    )  # the last row takes what stands behind ragged ends
    out.index_copy_(1, tokens.flatten().long().remainder(count + 1), rows)  # -1 is the last
    found = out[:, :count].flatten(2)
    return quantise_rows(found, gelu=False) if eight_bits else found


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """See `api.rms_norm`."""
    return _rms_norm(x, weight, eps).to(dtype or x.dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """See `api.gated_residual`."""
    wide = _wide(y)
    if gate is not None:
        wide = wide * _per_token(gate, y)
    return (_wide(x) + wide).to(x.dtype)


def gated_residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    plus_one: bool,
    eps: float,
    eight_bits: bool,
) -> tuple[Tensor, Tensor | Rows8]:
    """See `api.gated_residual_norm`."""
    x = gated_residual(x, y, gate)
    return x, modulated_norm(x, scale, shift, plus_one, eps, eight_bits)


def modulated_norm(
    x: Tensor, scale: Tensor, shift: Tensor, plus_one: bool, eps: float, eight_bits: bool = False
) -> Tensor | Rows8:
    """See `api.modulated_norm`."""
    wide = _wide(x)
    centred = wide - wide.mean(-1, keepdim=True)
    normal = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normal = normal * (_per_token(scale, x) + int(plus_one)) + _per_token(shift, x)
    return quantise_rows(normal, gelu=False) if eight_bits else normal.to(x.dtype)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensor:
    """See `api.merge_attention`."""
    total = torch.logaddexp(lse_a, lse_b)
    share_a, share_b = ((lse - total).exp().nan_to_num(0)[..., None] for lse in (lse_a, lse_b))
    return (_wide(out_a) * share_a + _wide(out_b) * share_b).to(out_a.dtype)


def distinct_rows(k: Tensor, v: Tensor) -> Tensor:
    """See `api.distinct_rows`."""
    as_last = ((k == k[:, -1:]) & (v == v[:, -1:])).flatten(2).all(2)  # [B, M]
    repeated = as_last.flip(1).to(torch.int32).cumprod(1).sum(1).clamp(min=1)  # NaN is not even like itself
    return (k.shape[1] - repeated + 1).to(torch.int32)


def prompt_attention(q: Tensor, k: Tensor, v: Tensor, distinct: Tensor) -> Tensor:
    """See `api.prompt_attention`. On a CPU, where reading `distinct` costs nothing, without the repeated rows."""
    if q.device.type == "cpu" and (most := int(distinct.max())) < k.shape[1]:
        # a logarithm in bfloat16 would be off by a hundredth
        wide = torch.promote_types(q.dtype, torch.float32)
        row, last = torch.arange(most), distinct[:, None] - 1
        times = torch.where(row == last, k.shape[1] - last, 1) * (row <= last)  # [B, most]
        bias = times.to(wide).log()[:, None, None]  # -inf behind the last
        dtype, (q, k, v) = q.dtype, (x.to(wide).transpose(1, 2) for x in (q, k[:, :most], v[:, :most]))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).to(dtype)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def quantise_rows(x: Tensor, gelu: bool) -> Rows8:
    """See `api.quantise_rows`."""
    wide = x.float()
    if gelu:
        wide = F.gelu(wide, approximate="tanh")
    scale = wide.abs().amax(-1, keepdim=True).clamp_min(SMALLEST) / FP8_MAX
    return Rows8((wide / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale)


def pack_pages(k_pages: Tensor, v_pages: Tensor, slots: Tensor, into: Pages8, values: bool) -> None:
    """See `api.pack_pages`."""
    at = (torch.arange(len(slots), device=slots.device)[:, None], slots.long())
    k = k_pages[at].float()
    scale = k.abs().amax(2, keepdim=True).clamp_min(SMALLEST) / INT8_MAX
    into.k[at], into.k_scale[at] = _in_8_bits(k, scale), scale[:, :, 0]
    if values:
        v = v_pages[at].float()
        scale = v.abs().amax(3, keepdim=True).clamp_min(SMALLEST) / INT8_MAX
        into.v[at], into.v_scale[at] = _in_8_bits(v, scale), scale[..., 0]


def unpack_pages(packed: Pages8, k_pages: Tensor, v_pages: Tensor) -> None:
    """See `api.unpack_pages`."""
    k_pages.copy_(packed.k.float() * packed.k_scale[:, :, None])
    v_pages.copy_(packed.v.float() * packed.v_scale[..., None])


def put_pages(k_blocks: Tensor, v_blocks: Tensor, slots: Tensor, k_pages: Tensor, v_pages: Tensor) -> None:
    """See `api.put_pages`."""
    at = (torch.arange(len(slots), device=slots.device)[:, None], slots.long())
    k_pages[at], v_pages[at] = k_blocks.clone(), v_blocks.clone()  # PyTorch may not see that they lie apart


def update_table(
    table: Tensor, score: Tensor, capacity: int, persistent: int, evicted: int, pinned: int
) -> None:
    """See `api.update_table`."""
    kept = min(capacity, persistent + evicted)
    P, window = table.tensor_split([capacity], dim=-1)
    slots = torch.cat([P[:, :persistent], window[:, :evicted]], dim=-1)
    ranked = score[..., : slots.shape[1]].sum(1)
    ranked = ranked.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    ranked[:, :pinned] = torch.inf
    ranking = ranked.sort(dim=-1, descending=True, stable=True).indices
    in_time_order = (part.sort(dim=-1).values for part in ranking.tensor_split([kept], dim=-1))
    winners, losers = (slots.gather(-1, places) for places in in_time_order)
    free = torch.cat([P[:, persistent:], losers], dim=-1)
    unfilled = capacity - kept
    parts = [winners, free[:, :unfilled], window[:, evicted:], free[:, unfilled:]]
    table.copy_(torch.cat(parts, dim=-1))


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
    """See `api.norm_to_window`."""
    value = _wide(_upsampled(y) if shuffled else y)
    for term in (bias, residual):
        if term is not None:
            value = value + term.to(value.dtype)
    if total is not None:
        total.copy_(value)
        value = total.to(value.dtype)
    if gamma is not None:
        mean_square = value.square().mean(-1, keepdim=True)
        value = value * mean_square.clamp_min(SMALLEST_SQUARE).rsqrt() * gamma.to(value.dtype)
        value = F.silu(value) if silu else value
    window[-y.shape[0] :] = value
    if past is not None:
        window[:2] = past
        past.copy_(window[-2:])


def _upsampled(y: Tensor) -> Tensor:
    """[T, h + 1, w + 1, 4C], of a 2x2 convolution over all edges, -> [T, 2h, 2w, C]."""
    y = y.unflatten(3, (2, 2, -1))
    height, width = y.shape[1] - 1, y.shape[2] - 1
    rows = [[y[:, a : a + height, b : b + width, a, b] for b in (0, 1)] for a in (0, 1)]
    return torch.stack([torch.stack(row, 3) for row in rows], 2).flatten(3, 4).flatten(1, 2)


def _in_8_bits(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale + 0.5).floor().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)


def _norm_rope(x_BNC: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """[B, N, C] -> normalised over C, then rotated per head [B, N, H, D]; wide."""
    pairs = _rms_norm(x_BNC, weight, eps).unflatten(2, (-1, cos.shape[1], 2))
    even, odd = pairs.unbind(-1)
    cos, sin = (table[:, None].to(pairs.dtype) for table in (cos, sin))
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(3)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = _wide(x)
    return wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(wide.dtype)


def _pack(x_BNHD: Tensor, tokens: Tensor) -> Tensor:
    """[B, N, H, D] -> [G, NB, T, D] by the table `tokens` [NB, T]; rows of -1 are zero."""
    blocks = x_BNHD.transpose(1, 2).flatten(0, 1)[:, tokens.clamp(min=0).long()]
    return blocks.masked_fill((tokens < 0)[..., None], 0)


def _per_token(x_BFC: Tensor, like_BNC: Tensor) -> Tensor:
    """One vector a frame -> one a token, wide."""
    wide = _wide(x_BFC) if like_BNC.dtype != torch.float64 else x_BFC.double()
    return wide.repeat_interleave(like_BNC.shape[1] // x_BFC.shape[1], dim=1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
