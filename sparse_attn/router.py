"""The router's policy: which pages a chunk's query blocks read, and what each page was worth.

Persistent pages are read by everybody. Of the window, the current chunk included, each query block reads the share
`topk` with the best pooled scores, per layer and head. The softmax of the same scores says what each block gives every
page; summed over the blocks it is the pages' importance, by which the memory later decides what to keep (arXiv
2604.21221, local selection and memory update). The scoring itself is `kernels.route`, or of blocks in
parts `kernels.route_parts`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels import BlockLists, pool_pages, route, route_parts
from .config import QUARTERS


def kept_blocks(topk: float, blocks: int) -> int:
    """How many of `blocks` window blocks a query block reads: the share `topk`, rounded up, at least one."""
    return max(1, math.ceil(topk * blocks - 1e-9))  # 0.1 * 30 is 3.0000000000000004 in floating point


def choose_blocks(
    pooled_q: Tensor,
    pooled_k: Tensor,
    persistent: Tensor,
    window: Tensor,
    topk: float,
    backend: str,
    parts: tuple[Tensor, Tensor] | None = None,
) -> tuple[BlockLists, Tensor]:
    """Lists of one layer for the current chunk, and what its query blocks give each page.

    pooled_q [G, NQ, D] and pooled_k [G, S, D] float32, the latter by page slot; persistent [G, NP] and window [G, NW]
    int32 slots, the current chunk last. -> lists of NP + kept_blocks(topk, NW) pages a query block, shares
    [G, NQ, NP + NW] float32, each query block's softmax over persistent, then window.
    With `parts`, the valid tokens in each part of the query blocks [G, NQ, R] and of the pages [G, S, R], vectors are
    [G, NQ, R, D] and [G, S, R, D]: every part of the queries has a softmax over all parts of the keys.
    """
    kept = kept_blocks(topk, window.shape[1])
    if parts is None:
        return route(pooled_q, pooled_k, persistent, window, kept, backend=backend)
    return route_parts(pooled_q, pooled_k, *parts, persistent, window, kept, backend=backend)


def part_lens(lens: Tensor, block_tokens: int) -> Tensor:
    """Valid tokens in each quarter of blocks with `lens` [..., n] of them: [..., n, 4] int32."""
    rows = block_tokens // QUARTERS
    before = torch.arange(0, QUARTERS * rows, rows, dtype=torch.int32, device=lens.device)
    return (lens[..., None] - before).clamp(0, rows)


def part_means(blocks: Tensor, lens: Tensor) -> Tensor:
    """Means of the quarters of blocks [G, n, T, D] with `lens` [G, n] valid tokens: [G, n, 4, D] float32."""
    rows = blocks.unflatten(2, (QUARTERS, -1)).flatten(1, 2)
    means = pool_pages(rows, part_lens(lens, blocks.shape[2]).flatten(1))
    return means.float().unflatten(1, (-1, QUARTERS))
