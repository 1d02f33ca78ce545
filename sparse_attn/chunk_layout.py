"""Where the blocks of a chunk lie, for those who draw them. Blocks may have any shape (`geometry`).

A stretch is a run of the chunk's frames that no block crosses: blocks that begin in the same frame lie in the same one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .geometry import BlockGeometry


class ChunkLayout(NamedTuple):
    """Blocks of a chunk by their numbers, frames counted from the chunk's first."""

    blocks: Tensor  # [frames, height, width] int64: the number of the block that each token belongs to
    spans: Tensor  # [NB, 2] int64: first and end frame of the stretch in which a block lies


@lru_cache(maxsize=64)
def chunk_layout(frames: int, grid: tuple[int, int], block_tokens: int) -> ChunkLayout:
    """Of a chunk of `frames` x `grid` (height, width) tokens."""
    geometry = BlockGeometry(frames, *grid, block_tokens)
    blocks = torch.empty(geometry.num_tokens, dtype=torch.int64)
    numbers = torch.arange(geometry.num_blocks)[:, None].expand_as(geometry.tokens)
    used = geometry.tokens >= 0
    blocks[geometry.tokens[used].long()] = numbers[used]
    starts, which = geometry.first_frame.long().unique(return_inverse=True)
    ends = torch.cat([starts[1:], torch.tensor([frames])])
    return ChunkLayout(blocks.view(frames, *grid), torch.stack([starts, ends], dim=-1)[which])
