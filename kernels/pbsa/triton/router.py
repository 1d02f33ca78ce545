"""The router: pooled vectors, scores of every query block against every page slot, and a list for each query block.

It works in slot order, so that compacting the kept pages by a running count gives an ascending list without a sort;
`position_of` says which candidate a slot holds. Top-K is a threshold on distinct keys (score, then earlier position),
found two bits at a time.

Two small kernels instead of one: a program that scores 16 query blocks at once reads the pooled keys 16 times less
often, and a row of scores fits one warp, whose sums need no barrier. What each row's softmax gives a page is left for
its reader to add up, once a chunk instead of in every pass. Letters as in `api`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import kth_largest_key, load_rows, order_key

SCORE_TILE = {"ROWS": 16, "SLOTS": 64, "STEP": 32}


def route(
    pooled_q: Tensor, pooled_k: Tensor, always: Tensor, local: Tensor, keep: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `api.route`; `keep` <= NL. -> idx [G, NQ, NA + keep] int32 ascending, cnt, shares [G, NQ, NA + NL]."""
    groups, blocks, dim = pooled_q.shape
    slots, fixed, free = pooled_k.shape[1], always.shape[1], local.shape[1]
    device = pooled_q.device
    position_of = torch.empty((groups, slots), dtype=torch.int32, device=device)
    scores = torch.empty((groups, blocks, slots), dtype=torch.float32, device=device)
    idx = torch.empty((groups, blocks, fixed + keep), dtype=torch.int32, device=device)
    cnt = torch.empty((groups, blocks), dtype=torch.int32, device=device)
    shares = torch.empty((groups, blocks, fixed + free), dtype=torch.float32, device=device)
    slots_pad = max(32, triton.next_power_of_2(slots))
    with torch.cuda.device_of(pooled_q):
        score[(triton.cdiv(blocks, SCORE_TILE["ROWS"]), triton.cdiv(slots, SCORE_TILE["SLOTS"]), groups)](
            pooled_q.contiguous(), pooled_k.contiguous(), always.contiguous(), local.contiguous(),
            scores, position_of, blocks, slots, fixed, free, scale, D=dim, **SCORE_TILE, num_warps=4,
        )  # fmt: skip
        select[(blocks, groups)](
            scores, position_of, idx, cnt, shares, slots, fixed + free, fixed, keep,
            SLOTS=slots_pad, num_warps=warps_for(slots_pad),
        )  # fmt: skip
    return idx, cnt, shares


def pool_pages(pages: Tensor, page_len: Tensor) -> Tensor:
    """See `api.pool_pages`."""
    groups, count, tokens, dim = pages.shape
    pages = pages if pages.stride(-1) == 1 else pages.contiguous()
    pooled = torch.empty((groups, count, dim), dtype=torch.float32, device=pages.device)
    with torch.cuda.device_of(pages):
        pool[(count, groups)](
            pages, page_len.contiguous(), pooled, *pages.stride()[:3],
            T=tokens, D=dim, D_PAD=triton.next_power_of_2(dim), num_warps=4,
        )  # fmt: skip
    return pooled


def warps_for(slots: int) -> int:
    """A thread holds up to 32 slots."""
    return min(8, max(1, slots // 1024))


@triton.jit
def pool(
    pages, page_len, pooled, pages_g, pages_s, pages_t, T: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr
):
    """pooled [G, n, D]: the mean of a page's valid tokens, 0 if there is none."""
    g = tl.program_id(1).to(tl.int64)
    s = tl.program_id(0).to(tl.int64)
    page = g * tl.num_programs(0) + s
    size = tl.load(page_len + page)
    tokens = tl.arange(0, T)
    tile = load_rows(pages + g * pages_g + s * pages_s, tokens * pages_t, tokens < size, D, D_PAD, True)
    dims = tl.arange(0, D_PAD)
    mean = tl.sum(tile.to(tl.float32), axis=0) / tl.maximum(size, 1).to(tl.float32)
    tl.store(pooled + page * D + dims, mean, mask=dims < D)


@triton.jit
def _place(position, slots, candidates, count, first, STEP: tl.constexpr):
    """position [SLOTS], with first + the place in `candidates` (`count` of them) of each slot that is among them."""
    for begin in range(0, count, STEP):
        at = begin + tl.arange(0, STEP)
        candidate = tl.load(candidates + at, mask=at < count, other=-1)
        here = tl.where(slots[:, None] == candidate[None, :], first + at[None, :], -1)
        position = tl.maximum(position, tl.max(here, axis=1))
    return position


@triton.jit(do_not_specialize=["blocks", "num_slots", "fixed", "free"])
def score(
    pooled_q, pooled_k, always, local, scores, position_of, blocks, num_slots, fixed, free, scale,
    D: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """scores [G, NQ, S] = scale * q k^T in full float32; slots that are no candidate are scored and not looked at.

    position_of [G, S]: the place of a slot in `always` followed by `local`, -1 where it is in neither. The programs of
    the first query blocks write it: a kernel of its own would take longer to start than to run.
    """
    g = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slots = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    row = g * blocks + rows
    slot = g * num_slots + slots
    acc = tl.zeros((ROWS, SLOTS), tl.float32)
    for first in range(0, D, STEP):
        dims = first + tl.arange(0, STEP)
        inside = (dims < D)[None, :]
        q = tl.load(
            pooled_q + row[:, None] * D + dims[None, :], mask=(rows < blocks)[:, None] & inside, other=0.0
        )
        k = tl.load(
            pooled_k + slot[:, None] * D + dims[None, :],
            mask=(slots < num_slots)[:, None] & inside,
            other=0.0,
        )
        acc = tl.dot(q * scale, tl.trans(k), acc, input_precision="ieee")
    keep = (rows < blocks)[:, None] & (slots < num_slots)[None, :]
    tl.store(scores + row[:, None] * num_slots + slots[None, :], acc, mask=keep)
    if tl.program_id(0) == 0:
        position = tl.full((SLOTS,), -1, tl.int32)
        position = _place(position, slots, always + g * fixed, fixed, 0, STEP)
        position = _place(position, slots, local + g * free, free, fixed, STEP)
        tl.store(position_of + slot, position, mask=slots < num_slots)


@triton.jit(do_not_specialize=["num_slots", "num_candidates", "fixed", "keep"])
def select(
    scores, position_of, idx, cnt, shares, num_slots, num_candidates, fixed, keep, SLOTS: tl.constexpr
):
    """One row of scores -> its softmax over the candidates, and the slots it keeps."""
    g = tl.program_id(1).to(tl.int64)
    row = g * tl.num_programs(0) + tl.program_id(0)
    slots = tl.arange(0, SLOTS)
    inside = slots < num_slots
    position = tl.load(position_of + g * num_slots + slots, mask=inside, other=-1)
    listed = position >= 0
    free = position >= fixed  # a local page, to be chosen from

    found = tl.load(scores + row * num_slots + slots, mask=listed, other=float("-inf"))
    weights = tl.exp(found - tl.max(found, axis=0))
    tl.store(shares + row * num_candidates + position, weights / tl.sum(weights, axis=0), mask=listed)

    keys = tl.where(free, order_key(found, position), -1)
    chosen = free & (keys >= kth_largest_key(keys, keep))  # none for keep = 0: no key reaches 2 ** 48 - 1
    kept = chosen | (listed & (position < fixed))
    rank = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    tl.store(idx + row * (fixed + keep) + rank, slots, mask=kept)
    tl.store(cnt + row, fixed + keep)
