"""The router in one kernel: one program scores one query block against its group's pages and writes its list.

It works in slot order, so that compacting the kept pages by a running count gives an ascending list without a sort;
`position_of` says which candidate a slot holds. Top-K is a threshold on distinct keys (score, then earlier position),
found bit by bit. Each row's softmax goes to memory and is summed there: without float atomics the sum is reproducible.
Letters as in `api`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import kth_largest_key, order_key

_TILE = 16384  # elements of pooled keys held at a time: 64 registers a thread with 8 warps


def route(
    pooled_q: Tensor, pooled_k: Tensor, always: Tensor, local: Tensor, keep: int, scale: float
) -> tuple[Tensor, Tensor]:
    """See `api.route`; `keep` <= NL. -> idx [G, NQ, NA + keep] int32 ascending, importance [G, NA + NL]."""
    groups, blocks, dim = pooled_q.shape
    slots, fixed = pooled_k.shape[1], always.shape[1]
    candidates = torch.cat([always, local], dim=1).long()
    count = candidates.shape[1]
    positions = torch.arange(count, dtype=torch.int32, device=candidates.device).expand(groups, -1)
    position_of = torch.full((groups, slots), -1, dtype=torch.int32, device=candidates.device)
    position_of.scatter_(1, candidates, positions)
    idx = torch.empty((groups, blocks, fixed + keep), dtype=torch.int32, device=candidates.device)
    shares = torch.empty((groups, blocks, count), dtype=torch.float32, device=candidates.device)
    slots_pad = max(16, triton.next_power_of_2(slots))
    dim_step = min(triton.next_power_of_2(dim), max(1, _TILE // slots_pad))
    with torch.cuda.device_of(pooled_q):
        _route[(blocks, groups)](
            pooled_q.contiguous(), pooled_k.contiguous(), position_of, idx, shares,
            slots, count, fixed, keep, scale,
            D=dim, D_STEP=dim_step, SLOTS=slots_pad, num_warps=8,
        )  # fmt: skip
    return idx, shares.sum(1)


@triton.jit(do_not_specialize=["num_slots", "num_candidates", "fixed", "keep"])
def _route(
    pooled_q, pooled_k, position_of, idx, shares,
    num_slots, num_candidates, fixed, keep, scale,
    D: tl.constexpr, D_STEP: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(1).to(tl.int64)
    row = g * tl.num_programs(0) + tl.program_id(0)
    slots = tl.arange(0, SLOTS)
    position = tl.load(position_of + g * num_slots + slots, mask=slots < num_slots, other=-1)
    listed = position >= 0
    free = position >= fixed  # a local page, to be chosen from

    scores = tl.zeros((SLOTS,), tl.float32)
    for first in range(0, D, D_STEP):
        dims = first + tl.arange(0, D_STEP)
        q = tl.load(pooled_q + row * D + dims, mask=dims < D, other=0.0) * scale
        at = (g * num_slots + slots)[:, None] * D + dims[None, :]
        keys = tl.load(
            pooled_k + at, mask=listed[:, None] & (dims < D)[None, :], other=0.0
        )  # [SLOTS, D_STEP]
        scores += tl.sum(keys * q[None, :], axis=1)

    scores = tl.where(listed, scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, axis=0))
    tl.store(shares + row * num_candidates + position, weights / tl.sum(weights, axis=0), mask=listed)

    keys = tl.where(free, order_key(scores, position), -1)
    chosen = free & (keys >= kth_largest_key(keys, keep))  # none for keep = 0: no key reaches 2 ** 48 - 1
    kept = chosen | (listed & (position < fixed))
    rank = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    tl.store(idx + row * (fixed + keep) + rank, slots, mask=kept)
