"""How the tokens of a chunk are cut into blocks.

A block is a compact tile in space and time, so that one pooled vector can stand for it. Where boxes fill the blocks, it
is a box. Grids rarely divide so (30x52 tokens by 128): boxes would leave rows of every block empty, which a kernel
computes all the same. There, blocks are runs of tokens along strips of the boxes' height, back and forth as a plough
goes: about as compact, and as few as the tokens allow. Unused rows of a block are padding that no kernel reads.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


class BlockGeometry:
    """Blocks of one chunk of `frames` x `height` x `width` tokens, each of at most `block_tokens` (T).

    num_blocks NB; num_tokens N; lens [NB] int32: the tokens in each block, which differ by as little as they can within
    the frames that a block spans; first_frame [NB] int32: the chunk's frame in which the block begins; tokens [NB, T]
    int32: the chunk's token in each row of each block, -1 for none. Blocks run over time, then height, then width.
    `device` is where these tensors are, and where `pack` and `unpack` work.
    """

    def __init__(
        self, frames: int, height: int, width: int, block_tokens: int, device: torch.device | str = "cpu"
    ):
        if min(frames, height, width, block_tokens) < 1:
            raise ValueError(
                f"a chunk of {frames} x {height} x {width} tokens in blocks of {block_tokens}: all must be 1 or more."
            )
        self.grid, self.block_tokens = (frames, height, width), block_tokens
        self.num_tokens = frames * height * width
        block_of_token = _block_of_token(self.grid, block_tokens)
        lens = torch.bincount(block_of_token)
        self.num_blocks = len(lens)
        frame_of_token = torch.arange(frames).repeat_interleave(height * width)
        first_frame = torch.full((self.num_blocks,), frames)
        first_frame.scatter_reduce_(0, block_of_token, frame_of_token, "amin")
        self.lens, self.first_frame = (x.to(device, torch.int32) for x in (lens, first_frame))
        rows = _padded_rows(block_of_token, lens, block_tokens)
        tokens = torch.full((self.num_blocks * block_tokens,), -1, dtype=torch.int32)
        tokens[rows] = torch.arange(self.num_tokens, dtype=torch.int32)
        self.tokens = tokens.view(self.num_blocks, block_tokens).to(device)
        self._rows = rows.to(device)

    def pack(self, x_BNHD: Tensor) -> Tensor:
        """Tokens [B, N, H, D] in frame, height, width order -> blocks [B*H, NB, T, D]; padding rows are zero."""
        batch, tokens, heads, dim = x_BNHD.shape
        assert tokens == self.num_tokens, f"{tokens} tokens, geometry of {self.num_tokens}"
        blocks = x_BNHD.new_zeros(batch, heads, self.num_blocks * self.block_tokens, dim)
        blocks.index_copy_(2, self._rows, x_BNHD.transpose(1, 2))
        return blocks.view(batch * heads, self.num_blocks, self.block_tokens, dim)

    def unpack(self, x_GNTD: Tensor, batch: int) -> Tensor:
        """Blocks [B*H, NB, T, D] -> tokens [B, N, H, D]; the inverse of `pack`."""
        groups, blocks, rows, dim = x_GNTD.shape
        assert (blocks, rows) == (self.num_blocks, self.block_tokens) and groups % batch == 0
        flat = x_GNTD.reshape(batch, groups // batch, blocks * rows, dim)
        return flat.index_select(2, self._rows).transpose(1, 2)


@lru_cache(maxsize=64)
def least_tokens(chunk_frames: int, grid: tuple[int, int], block_tokens: int) -> int:
    """Tokens of the shortest block in any chunk of at most `chunk_frames`: a stream's last may be a short one, and a
    given first. Kept, because estimates try many memories of one grid."""
    lengths = range(1, chunk_frames + 1)
    return min(int(BlockGeometry(frames, *grid, block_tokens).lens.min()) for frames in lengths)


@lru_cache(maxsize=64)
def choose_counts(grid: tuple[int, int, int], block_tokens: int) -> tuple[int, int, int]:
    """Into how many parts to split frames, height and width: fewest blocks first, then the most compact tile.

    Compact means the smallest surface of the largest tile. 3 x 30 x 52 tokens in blocks of 64 -> (1, 6, 13): 78 tiles
    of 3 x 5 x 4.
    """
    best: tuple[int, int, tuple[int, int, int]] | None = None
    frames, height, width = grid
    for nt in range(1, frames + 1):
        t = -(-frames // nt)
        for nh in range(1, height + 1):
            h = -(-height // nh)
            if t * h > block_tokens:
                continue
            nw = -(-width // (block_tokens // (t * h)))  # fewest columns that fit
            w = -(-width // nw)
            found = (nt * nh * nw, t * h + h * w + w * t, (nt, nh, nw))
            best = found if best is None else min(best, found)
    assert best is not None
    return best[2]


def _axis_starts(size: int, count: int) -> Tensor:
    """[count] int64: where each of `count` parts of 0..size-1 begins; parts differ by at most one."""
    return torch.arange(count) * size // count


def _block_of_token(grid: tuple[int, int, int], block_tokens: int) -> Tensor:
    """[N] int64: the block that each token belongs to, tokens in frame, height, width order."""
    _, height, width = grid
    counts = choose_counts(grid, block_tokens)
    t, h, w = (
        torch.bucketize(torch.arange(size), _axis_starts(size, count), right=True) - 1
        for size, count in zip(grid, counts)
    )
    spans = t.bincount().tolist()  # of frames, which blocks do not cross
    runs = [-(-span * height * width // block_tokens) for span in spans]
    if sum(runs) == counts[0] * counts[1] * counts[2]:
        return ((t[:, None, None] * counts[1] + h[:, None]) * counts[2] + w).flatten()
    column = torch.arange(width)
    along = torch.where(h[:, None] % 2 == 0, column, width - 1 - column)  # every other strip runs back
    plough = (h[:, None] * width + along) * height + torch.arange(height)[:, None]  # strip, column, row
    parts, first = [], 0
    for span, count in zip(spans, runs):
        frame = torch.arange(span)[:, None, None]
        place = (plough * span + frame).flatten().argsort().argsort()
        parts.append(first + place * count // len(place))
        first += count
    return torch.cat(parts)


def _padded_rows(block_of_token: Tensor, lens: Tensor, block_tokens: int) -> Tensor:
    """[N] int64: block * T + position in the block; tokens of a block keep their order."""
    order = block_of_token.argsort(stable=True)
    first_in_block = (lens.cumsum(0) - lens).repeat_interleave(lens)
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order)) - first_in_block
    return block_of_token * block_tokens + position
