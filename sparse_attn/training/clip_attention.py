"""Block-sparse attention of a whole clip, all of whose tokens may see each other: for a critic that need not be dense.

The paper's student is sparse, its critic is not, and at 21 frames the critic's attention is most of what its part of a
step costs. Here every query block reads the share `topk` of the clip's blocks, chosen as the student's router chooses
in its window. Nothing is remembered, so the blocks are the pages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import pbsa_attention, pool_pages
from ..geometry import BlockGeometry
from ..router import choose_blocks
from ..wan import Attend
from .common import whole_attention


class SparseClip:
    """`attend` of clips that `geometry` cuts into blocks, of which each reads the share `topk`.

    dtype: of the products, whatever comes in (autocast does not reach kernels). q, k, v [B, N, H, D] -> [B, N, H, D]
    in q's dtype; gradients flow to all three. With topk 1 it is dense attention.
    """

    def __init__(self, geometry: BlockGeometry, topk: float, dtype: torch.dtype, backend: str = "auto"):
        self.geometry, self.topk, self.dtype, self.backend = geometry, topk, dtype, backend
        self.pages = torch.arange(geometry.num_blocks, dtype=torch.int32, device=geometry.lens.device)
        self.least_tokens = int(geometry.lens.min())  # read once: passes do not wait for the device

    def __call__(self, _layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads = q.shape[0], q.shape[2]
        lens, pages = (x.expand(batch * heads, -1).contiguous() for x in (self.geometry.lens, self.pages))
        blocks = [self.geometry.pack(x.to(self.dtype)) for x in (q, k, v)]
        with torch.no_grad():
            pooled_q, pooled_k = (pool_pages(x, lens, backend=self.backend).float() for x in blocks[:2])
            lists, _ = choose_blocks(pooled_q, pooled_k, pages[:, :0], pages, self.topk, self.backend)
        out, _ = pbsa_attention(
            *blocks, lens, lists, padding="finite", least_tokens=self.least_tokens, backend=self.backend
        )
        return self.geometry.unpack(out, batch).to(q.dtype)


def clip_attention(
    frames: int,
    grid: tuple[int, int],
    topk: float,
    block_tokens: int,
    dtype: torch.dtype,
    device: torch.device | str,
    backend: str = "auto",
) -> Attend:
    """A critic's `attend` for clips of `frames` x `grid` tokens: dense where `topk` is all of a clip, as published,
    else a `SparseClip` in blocks of `block_tokens`."""
    if topk == 1:
        return whole_attention
    return SparseClip(BlockGeometry(frames, *grid, block_tokens, device), topk, dtype, backend)
