"""The router's policy: which pages a chunk's query blocks read, and what each page was worth.

Persistent pages are read by everybody. Of the window, the current chunk included, each query block reads the share
`topk` with the best pooled scores, per layer and head. The softmax of the same scores says what each block gives every
page; summed over the blocks it is the pages' importance, by which the memory later decides what to keep (arXiv
2604.21221, local selection and memory update). The scoring itself is `kernels.route`.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..kernels import BlockLists, route


def kept_blocks(topk: float, blocks: int) -> int:
    """How many of `blocks` window blocks a query block reads: the share `topk`, rounded up, at least one."""
    return max(1, math.ceil(topk * blocks - 1e-9))  # 0.1 * 30 is 3.0000000000000004 in floating point


def choose_blocks(
    pooled_q: Tensor, pooled_k: Tensor, persistent: Tensor, window: Tensor, topk: float, backend: str
) -> tuple[BlockLists, Tensor]:
    """Lists of one layer for the current chunk, and what its query blocks give each page.

    pooled_q [G, NQ, D] and pooled_k [G, S, D] float32, the latter by page slot; persistent [G, NP] and window [G, NW]
    int32 slots, the current chunk last. -> lists of NP + kept_blocks(topk, NW) pages a query block, shares
    [G, NQ, NP + NW] float32, each query block's softmax over persistent, then window.
    """
    return route(pooled_q, pooled_k, persistent, window, kept_blocks(topk, window.shape[1]), backend=backend)
