"""PBSA in plain PyTorch: this file defines what is correct.

For a query block (g, n) the list names pages of group g; their valid tokens are laid end to end and one softmax runs
over them all, persistent, current and selected alike:

    s = scale * q k^T,   out = softmax(s) v,   lse = log(sum(exp(s)))        natural log

Precision. Every input is widened to float32 first and everything is computed and accumulated there (float64 inputs stay
float64: the yardstick that tests measure with). `out` is rounded once, to q's dtype; `lse` keeps the computing dtype.
Tokens past a page's length are never read: they may hold NaN. A list without a valid token gives out 0, lse -inf and
zero gradients. Gradients are plain autograd's, for q, k and v, through `out` and `lse`.

Letters: G groups (batch x heads), NQ query blocks, T tokens a block, D head dim, S page slots, M longest list,
NR lists of a group,
R rows = G * NR.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NO_GAP = (0, 0)  # see `gap` of `api.pbsa_attention`
WORKSPACE_BYTES = 256 * 2**20  # most that one gather of keys, or one block of scores, may take


def attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_len: Tensor, idx: Tensor, cnt: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See `api.pbsa_attention`; idx [G, NR, M], cnt [G, NR]. Query blocks that share a list gather it only once."""
    groups, blocks, tokens, dim = q.shape
    slots, longest = k_pages.shape[1], idx.shape[2]
    wide = computing_dtype(q)
    valid = torch.arange(tokens, device=q.device) < page_len[..., None]  # [G,S,T]
    keys, values = (
        pages.to(wide).masked_fill(~valid[..., None], 0).flatten(0, 1) for pages in (k_pages, v_pages)
    )
    first_slot = torch.arange(groups, device=q.device)[:, None, None] * slots
    pages_RM = (idx.long() + first_slot).flatten(0, 1)
    listed = torch.arange(longest, device=q.device) < cnt.reshape(-1, 1)
    keep = (valid.flatten(0, 1)[pages_RM] & listed[..., None]).flatten(1)  # [R,M*T]
    rows_q = (q.to(wide) * scale).reshape(pages_RM.shape[0], -1, dim)  # [R,NQ/NR*T,D]

    step = max(1, WORKSPACE_BYTES // (longest * tokens * dim * keys.element_size()))
    pieces = [
        _attend_rows(rows, keys, values, pages, kept)
        for rows, pages, kept in zip(rows_q.split(step), pages_RM.split(step), keep.split(step))
    ]
    out, lse = (torch.cat(parts) for parts in zip(*pieces))
    return out.reshape(q.shape).to(q.dtype), lse.reshape(groups, blocks, tokens)


def _attend_rows(
    rows_q: Tensor, keys: Tensor, values: Tensor, pages: Tensor, keep: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows [R,Tq,D] over their gathered pages [R,M] -> out [R,Tq,D], lse [R,Tq]; queries in pieces that fit."""
    rows, _, dim = rows_q.shape
    k = keys.index_select(0, pages.flatten()).view(rows, -1, dim)
    v = values.index_select(0, pages.flatten()).view(rows, -1, dim)
    bias = torch.zeros_like(keep, dtype=keys.dtype).masked_fill_(~keep, -math.inf)[:, None]
    step = max(1, WORKSPACE_BYTES // (rows * k.shape[1] * k.element_size()))
    pieces = [_softmax_attention(piece, k, v, bias) for piece in rows_q.split(step, dim=1)]
    out, lse = (torch.cat(parts, dim=1) for parts in zip(*pieces))
    return out, lse


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled q [R,Tq,D], k and v [R,K,D], bias [R,1,K] of 0 or -inf. Safe, also in backward, where a row keeps none."""
    scores = torch.baddbmm(bias, q, k.transpose(1, 2))
    top = scores.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0)
    weights = scores.sub_(top).exp_()  # in place: neither baddbmm nor sub_ saves what is overwritten
    mass = weights.sum(-1, keepdim=True)
    empty = mass == 0
    safe_mass = mass.masked_fill(empty, 1)
    out = torch.bmm(weights, v) / safe_mass
    lse = (top + safe_mass.log()).masked_fill(empty, -math.inf)
    return out, lse.squeeze(-1)


def attention_mass(
    q: Tensor,
    k_pages: Tensor,
    page_len: Tensor,
    idx: Tensor,
    cnt: Tensor,
    q_len: Tensor,
    lse: Tensor,
    scale: float,
) -> Tensor:
    """See `api.attention_mass`; idx [G, NR, M], cnt [G, NR]."""
    groups, blocks, tokens, _ = q.shape
    wide, each = computing_dtype(q), torch.arange(tokens, device=q.device)
    group = torch.arange(groups, device=q.device)[:, None]
    asked = each < q_len[..., None]  # [G,NQ,T]
    rows = (q.to(wide) * scale).masked_fill(~asked[..., None], 0)
    level = lse.masked_fill(lse == -math.inf, 0)[..., None]
    list_of = torch.arange(blocks, device=q.device) // (blocks // idx.shape[1])  # of each query block
    mass = lse.new_zeros(groups, blocks, idx.shape[2])
    for i in range(idx.shape[2]):
        slot = idx[:, list_of, i].long()
        read = (each < page_len[group, slot][..., None]) & (i < cnt[:, list_of])[..., None]  # [G,NQ,T]
        keys = k_pages[group, slot].to(wide).masked_fill(~read[..., None], 0)
        weights = (rows @ keys.mT - level).exp()
        mass[..., i] = (weights * asked[..., None] * read[:, :, None]).sum((2, 3)) / q_len
    return mass


def only_pages(pages: Tensor, wanted: Tensor) -> Tensor:
    """pages [G, S, T, D] as they are, with a gradient only where wanted [G, NC] names the slot."""
    chosen = torch.zeros(pages.shape[:2], dtype=torch.bool, device=pages.device).scatter_(
        1, wanted.long(), True
    )
    return torch.where(chosen[..., None, None], pages, pages.detach())


def without_gap(pages: Tensor, gap: tuple[int, int]) -> Tensor:
    """Pages [G, S + gap, T, D] -> [G, S, T, D], in the order of their slots."""
    first, behind = gap
    return torch.cat([pages[:, :first], pages[:, first + behind :]], dim=1) if behind else pages


def pool_pages(pages: Tensor, page_len: Tensor) -> Tensor:
    """See `api.pool_pages`."""
    valid = torch.arange(pages.shape[2], device=pages.device) < page_len[..., None]
    total = pages.to(computing_dtype(pages)).masked_fill(~valid[..., None], 0).sum(2)
    return total / page_len.clamp(min=1)[..., None]


def route(
    pooled_q: Tensor, pooled_k: Tensor, always: Tensor, local: Tensor, keep: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `api.route`; `keep` <= NL. -> idx [G, NQ, NA + keep] int32 ascending, cnt, shares [G, NQ, NA + NL]."""
    candidates = torch.cat([always, local], dim=1).long()
    keys = pooled_k.gather(1, candidates[..., None].expand(-1, -1, pooled_k.shape[2]))
    scores = torch.bmm(pooled_q * scale, keys.transpose(1, 2))  # [G,NQ,NC]
    return *_keep_best(scores, candidates, always.shape[1], keep), scores.softmax(-1)


def route_parts(
    pooled_q: Tensor,
    pooled_k: Tensor,
    q_parts: Tensor,
    k_parts: Tensor,
    always: Tensor,
    local: Tensor,
    keep: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `api.route_parts`; `keep` <= NL. Results as of `route`."""
    candidates = torch.cat([always, local], dim=1).long()
    groups = torch.arange(len(candidates), device=candidates.device)[:, None]
    chosen = pooled_k[groups, candidates], k_parts[groups, candidates]
    shares = _shares_of_parts(pooled_q, chosen[0], q_parts, chosen[1], scale)
    return *_keep_best(shares, candidates, always.shape[1], keep), shares


def _shares_of_parts(
    pooled_q: Tensor, pooled_k: Tensor, q_parts: Tensor, k_parts: Tensor, scale: float
) -> Tensor:
    """What query blocks give key blocks, [G, NQ, M]: the softmax of each part of the queries, averaged.

    pooled_q [G, NQ, R, D] and pooled_k [G, M, R, D], means of parts that hold q_parts [G, NQ, R] and k_parts [G, M, R]
    tokens.
    """
    q_parts, k_parts = q_parts.to(pooled_q.dtype), k_parts.to(pooled_q.dtype)
    scores = pooled_q.flatten(1, 2) @ pooled_k.flatten(1, 2).mT * scale
    scores = scores + k_parts.log().flatten(1)[:, None]  # a part without tokens: -inf
    by_part = scores.unflatten(2, k_parts.shape[1:]).logsumexp(-1).softmax(-1)  # [G, NQ * R, M]
    return (by_part.unflatten(1, q_parts.shape[1:]) * q_parts[..., None]).sum(2) / q_parts.sum(-1)[..., None]


def _keep_best(scores: Tensor, candidates: Tensor, fixed: int, keep: int) -> tuple[Tensor, Tensor]:
    """Lists of the first `fixed` candidates [G, NC] and the `keep` best others by scores [G, NQ, NC] -> idx, cnt."""
    # a stable sort, because topk leaves the order of equal scores open
    best = scores[..., fixed:].sort(dim=-1, descending=True, stable=True).indices[..., :keep]
    slots = candidates[:, None].expand(-1, scores.shape[1], -1)
    kept = torch.cat([slots[..., :fixed], slots.gather(2, best + fixed)], dim=2)
    idx = kept.sort(-1).values.to(torch.int32)
    return idx, torch.full(idx.shape[:2], idx.shape[2], dtype=torch.int32, device=idx.device)


def computing_dtype(x: Tensor) -> torch.dtype:
    """What everything about inputs like x is computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
