"""The router: pooled vectors, scores of every query block against every page slot, and a list for each query block.

It works in slot order, so that compacting the kept pages by a running count gives an ascending list without a sort;
`position_of` says which candidate a slot holds. Top-K is a threshold, found two bits at a time; of equal scores the
earlier candidate wins.

Two small kernels, `score` and `select`: a program that scores 16 query blocks at once reads the pooled keys 16 times
less often, and a row of scores fits one warp, whose sums need no barrier. Parts of blocks are scored like blocks, and
`select_by_parts` takes the rows of a block together. What each row's softmax gives a page is left for its reader to add
up, once a chunk instead of in every pass. Letters as in `api`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...sizes import cdiv, power_of_2
from ...workspace import dense, empty
from .primitives import k_largest, load_rows

SCORE_TILE = {"ROWS": 16, "SLOTS": 64, "PLACES": 256}


def route(
    pooled_q: Tensor, pooled_k: Tensor, always: Tensor, local: Tensor, keep: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `api.route`; `keep` <= NL. -> idx [G, NQ, NA + keep] int32 ascending, cnt, shares [G, NQ, NA + NL]."""
    groups, blocks, _ = pooled_q.shape
    slots, fixed, free = pooled_k.shape[1], always.shape[1], local.shape[1]
    idx, cnt, shares = _results((groups, blocks), fixed, free, keep, pooled_q.device)
    slots_pad = max(32, power_of_2(slots))
    with torch.cuda.device_of(pooled_q):
        scores, position_of = _score(pooled_q, pooled_k, always, local, slots, scale)
        select[(blocks, groups)](
            scores, position_of, idx, cnt, shares, slots, fixed + free, fixed, keep,
            SLOTS=slots_pad, num_warps=warps_for(slots_pad),
        )  # fmt: skip
    return idx, cnt, shares


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
    groups, blocks, parts, _ = pooled_q.shape
    slots, fixed, free = pooled_k.shape[1], always.shape[1], local.shape[1]
    idx, cnt, shares = _results((groups, blocks), fixed, free, keep, pooled_q.device)
    slots_pad = max(32, power_of_2(slots))
    with torch.cuda.device_of(pooled_q):
        rows, columns = pooled_q.flatten(1, 2), pooled_k.flatten(1, 2)
        scores, position_of = _score(rows, columns, always, local, slots, scale)
        select_by_parts[(blocks, groups)](
            scores, position_of, dense("route.q_parts", q_parts), dense("route.k_parts", k_parts), idx, cnt, shares,
            slots, fixed + free, fixed, keep, PARTS=parts, SLOTS=slots_pad, num_warps=parts_warps(slots_pad),
        )  # fmt: skip
    return idx, cnt, shares


def _score(
    rows: Tensor,
    columns: Tensor,
    always: Tensor,
    local: Tensor,
    pages: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`score` of rows [G, n, D] and columns [G, m, D]: the vectors of blocks and of `pages` page slots, or of their
    parts -> scores [G, n, m] float32, and position_of [G, pages] int32."""
    groups, count, dim = rows.shape
    width = columns.shape[1]
    scores = empty("route.scores", (groups, count, width), torch.float32, rows.device)
    position_of = empty("route.places", (groups, pages), torch.int32, rows.device)
    grid = cdiv(count, SCORE_TILE["ROWS"]) + 1, cdiv(width, SCORE_TILE["SLOTS"]), groups
    score[grid](
        dense("route.rows", rows), dense("route.columns", columns), dense("route.always", always),
        dense("route.local", local), scores, position_of,
        count, width, pages, always.shape[1], local.shape[1], scale, D=dim, D_PAD=power_of_2(dim),
        **SCORE_TILE, num_warps=4,
    )  # fmt: skip
    return scores, position_of


def _results(
    rows: tuple[int, int], fixed: int, free: int, keep: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for idx, cnt and shares of rows [G, NQ]."""
    idx = empty("route.idx", (*rows, fixed + keep), torch.int32, device)
    cnt = empty("route.cnt", rows, torch.int32, device)
    return idx, cnt, empty("route.shares", (*rows, fixed + free), torch.float32, device)


def parts_warps(slots: int) -> int:
    """A thread holds up to 4 slots of each part."""
    return min(16, max(1, slots // 128))


def pool_pages(pages: Tensor, page_len: Tensor) -> Tensor:
    """See `api.pool_pages`."""
    groups, count, tokens, dim = pages.shape
    pages = pages if pages.stride(-1) == 1 else dense("pool.pages", pages)
    pooled = empty("pool", (groups, count, dim), torch.float32, pages.device)
    with torch.cuda.device_of(pages):
        pool[(count, groups)](
            pages, dense("pool.page_len", page_len), pooled, *pages.stride()[:3],
            T=tokens, D=dim, D_PAD=power_of_2(dim), num_warps=4,
        )  # fmt: skip
    return pooled


def warps_for(slots: int) -> int:
    """A thread holds 8 slots, or more where there are very many."""
    return min(8, max(1, slots // 256))


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
def _write_places(position_of, num_pages, candidates, count, first, PLACES: tl.constexpr):
    """position_of[slot] = first + the place of each slot in `candidates`, `count` of them."""
    for begin in range(0, count, PLACES):
        at = begin + tl.arange(0, PLACES)
        slot = tl.load(candidates + at, mask=at < count, other=0)
        tl.store(position_of + slot, first + at, mask=(at < count) & (slot >= 0) & (slot < num_pages))


@triton.jit(do_not_specialize=["blocks", "num_slots", "num_pages", "fixed", "free"])
def score(
    pooled_q, pooled_k, always, local, scores, position_of, blocks, num_slots, num_pages, fixed, free, scale,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """scores [G, NQ, S] = scale * q k^T, three products of tf32 for one of float32; slots that are no candidate are
    scored and not looked at.

    position_of [G, num_pages]: the place of a page's slot in `always` followed by `local`, -1 where it is in neither.
    A program beside those of the query blocks writes it: a kernel of its own would take longer to start than to run.
    num_pages is S, or less where a page has several vectors.
    """
    g = tl.program_id(2).to(tl.int64)
    if tl.program_id(0) == 0:
        if tl.program_id(1) == 0:
            own = position_of + g * num_pages
            for begin in range(0, num_pages, PLACES):
                at = begin + tl.arange(0, PLACES)
                tl.store(own + at, tl.full((PLACES,), -1, tl.int32), mask=at < num_pages)
            tl.debug_barrier()  # another thread may write a slot's place
            _write_places(own, num_pages, always + g * fixed, fixed, 0, PLACES)
            _write_places(own, num_pages, local + g * free, free, fixed, PLACES)
        return
    rows = (tl.program_id(0) - 1) * ROWS + tl.arange(0, ROWS)
    slots = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    dims = tl.arange(0, D_PAD)
    row, slot = g * blocks + rows, g * num_slots + slots
    mask = (rows < blocks)[:, None] & (dims < D)[None, :]
    q = tl.load(pooled_q + row[:, None] * D + dims[None, :], mask=mask, other=0.0)
    mask = (slots < num_slots)[:, None] & (dims < D)[None, :]
    k = tl.load(pooled_k + slot[:, None] * D + dims[None, :], mask=mask, other=0.0)
    found = tl.dot(k, tl.trans(q * scale), input_precision="tf32x3")  # [SLOTS, ROWS]
    mask = (slots < num_slots)[:, None] & (rows < blocks)[None, :]
    tl.store(scores + row[None, :] * num_slots + slots[:, None], found, mask=mask)


@triton.jit
def _keep(order, weights, position, row, idx, cnt, shares, num_candidates, fixed, keep, SLOTS: tl.constexpr):
    """Write a row of `weights` as shares, and the slots that are to be kept by `order`, both [SLOTS].

    position [SLOTS] as `score` writes it; row: its place in the results.
    """
    there, free = position >= 0, position >= fixed  # a local page, to be chosen from
    tl.store(shares + row * num_candidates + position, weights, mask=there)
    kept = k_largest(order, position, free, keep) | (there & (position < fixed))
    rank = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    tl.store(idx + row * (fixed + keep) + rank, tl.arange(0, SLOTS), mask=kept)
    tl.store(cnt + row, fixed + keep)


@triton.jit(do_not_specialize=["num_slots", "num_candidates", "fixed", "keep"])
def select(
    scores, position_of, idx, cnt, shares, num_slots, num_candidates, fixed, keep, SLOTS: tl.constexpr
):
    """One row of scores -> its softmax over the candidates, and the slots it keeps."""
    g = tl.program_id(1).to(tl.int64)
    row = g * tl.num_programs(0) + tl.program_id(0)
    slots = tl.arange(0, SLOTS)
    position = tl.load(position_of + g * num_slots + slots, mask=slots < num_slots, other=-1)
    found = tl.load(scores + row * num_slots + slots, mask=slots < num_slots, other=0.0)
    found = tl.where(position >= 0, found, float("-inf"))
    weights = tl.exp(found - tl.max(found, axis=0))
    weights *= 1.0 / tl.sum(weights, axis=0)
    _keep(found, weights, position, row, idx, cnt, shares, num_candidates, fixed, keep, SLOTS)


@triton.jit(do_not_specialize=["num_slots", "num_candidates", "fixed", "keep"])
def select_by_parts(
    scores, position_of, q_parts, k_parts, idx, cnt, shares, num_slots, num_candidates, fixed, keep,
    PARTS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The rows of scores of a query block's PARTS parts: each has a softmax over all parts of the keys; by their mean,
    weighted by the parts' tokens, the block keeps its slots."""
    g = tl.program_id(1).to(tl.int64)
    row = g * tl.num_programs(0) + tl.program_id(0)
    slots, parts = tl.arange(0, SLOTS), tl.arange(0, PARTS)
    position = tl.load(position_of + g * num_slots + slots, mask=slots < num_slots, other=-1)
    at = slots[:, None] * PARTS + parts[None, :]
    size = tl.load(k_parts + g * num_slots * PARTS + at, mask=(slots < num_slots)[:, None], other=0)
    there = (size > 0) & (position >= 0)[:, None]
    gain = tl.log(tl.maximum(size, 1).to(tl.float32))  # as if each of a part's tokens had its mean
    weights = tl.zeros((SLOTS,), tl.float32)
    total = 0.0
    for part in tl.static_range(PARTS):
        found = tl.load(scores + (row * PARTS + part) * num_slots * PARTS + at, mask=there, other=0.0)
        found = tl.where(there, found + gain, float("-inf"))
        top = tl.max(tl.max(found, axis=1), axis=0)
        mass = tl.sum(tl.exp(found - top), axis=1)
        held = tl.load(q_parts + row * PARTS + part).to(tl.float32)
        weights += mass * (held / tl.sum(mass, axis=0))
        total += held
    weights = weights / total
    _keep(weights, weights, position, row, idx, cnt, shares, num_candidates, fixed, keep, SLOTS)
