"""A stream's memory map in some kilobytes, for a page that shows it while the stream goes on.

`read_memory_map` tells all layers and heads apart, and grows with what they hold. Here they are taken together, in two
steps: `gather_tables` is all that the sampling thread has to do between two chunks, and `summarise` makes of it what
a page can draw, on any thread.

Shapes: L layers, G groups (a head of a batch item each), P filled entries of persistent memory.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .chunk_layout import ChunkLayout, chunk_layout
from .config import pixel_frames
from .memory import PagedKV
from .memory_map import MOST_TILES, chunk_of
from .state import StreamState

MOST_CELLS = 64  # of a tile, in height and in width: tokens, of many a choice


class KeptBlocks(NamedTuple):
    """What a stream's tables say of its memory between two chunks, on the host."""

    frames: np.ndarray  # [L, G, P] int32: latent frame in which each block of persistent memory begins
    numbers: np.ndarray  # [L, G, P] int32: the block's number in its chunk
    sink: int  # so many of the P are the sink's: the first ones
    window: list[tuple[int, int]]  # first latent frame of each of its chunks, and the chunk's frames
    end: int  # latent frames that the stream has read
    chunk_frames: int
    grid: tuple[int, int]  # tokens (height, width) of a frame
    block_tokens: int

    @property
    def behind(self) -> int:
        """The latent frame where the window begins."""
        return self.window[0][0] if self.window else self.end

    def layout(self, frames: int) -> ChunkLayout:
        return chunk_layout(frames, self.grid, self.block_tokens)


def gather_tables(state: StreamState) -> tuple[Tensor, Callable[[Tensor], KeptBlocks]] | None:
    """The tables of a stream between two chunks, where they are, and what makes KeptBlocks of their copy on the CPU.

    8 bytes per block. None in modes without tables, and while nothing is remembered. Does not wait for the device.
    """
    cache = state.cache
    if not isinstance(cache, PagedKV) or not (cache.persistent or cache.window):
        return None
    slots = cache.table[..., : cache.persistent]
    tables = torch.stack([table.gather(2, slots) for table in (cache.page_frame, cache.page_block)])
    lengths = [chunk.frames for chunk in cache.window]
    starts = [state.frame - sum(lengths[i:]) for i in range(len(lengths))]
    rest = (
        cache.pinned,
        list(zip(starts, lengths)),
        state.frame,
        state.chunk_frames,
        state.grid,
        state.attention.block_tokens,
    )
    return tables, lambda copied: KeptBlocks(copied[0].numpy(), copied[1].numpy(), *rest)


def summarise(kept: KeptBlocks) -> dict[str, Any]:
    """The map as JSON, layers and heads together: a tile for each stretch of frames that no block crosses.

    stretches: how many are held; of more than MOST_TILES, those of which most blocks are held are in `tiles`, in the
    order of time. A tile: `first` and `count` of its video frames, `part` (sink, persistent or window) and, in a
    persistent one, `shares`: what share of layers and heads holds each place of the picture, as `grid` [rows, columns]
    bytes in base64, row by row. 255 stands for `peak`, the largest share in these tiles, 0 without any.
    """
    groups = kept.frames.shape[0] * kept.frames.shape[1]
    blocks = np.bincount(kept.frames.ravel(), minlength=kept.end) / groups
    for start, frames in kept.window:
        blocks += np.bincount(start + kept.layout(frames).spans[:, 0].numpy(), minlength=kept.end)
    held = blocks.nonzero()[0]  # the latent frames in which stretches begin
    chosen = np.sort(held[np.argsort(-blocks[held], kind="stable")[:MOST_TILES]]).tolist()
    sink = set(kept.frames[0, 0, : kept.sink].tolist())
    tiles: list[dict[str, Any]] = []
    places: list[tuple[dict[str, Any], np.ndarray]] = []
    for first in chosen:
        end, where = _stretch(kept, first)
        video = max(0, pixel_frames(first))
        part = "window" if first >= kept.behind else "sink" if first in sink else "persistent"
        tiles.append({"first": video, "count": pixel_frames(end) - video, "part": part})
        if part == "persistent":
            numbers = kept.numbers[kept.frames == first]
            shares = np.bincount(numbers, minlength=int(where.max()) + 1) / groups
            places.append((tiles[-1], shares[where].mean(0)))
    peak = max((float(shares.max()) for _, shares in places), default=0.0)
    rows, columns = (np.arange(n) * size // n for size in kept.grid for n in [min(size, MOST_CELLS)])
    for tile, shares in places:
        cells = (255 / peak * shares[rows][:, columns]).round().astype(np.uint8)
        tile["shares"] = base64.b64encode(cells.tobytes()).decode("ascii")
    grid = [len(rows), len(columns)]
    return {"stretches": len(held), "peak": round(peak, 4), "grid": grid, "tiles": tiles}


def _stretch(kept: KeptBlocks, first: int) -> tuple[int, np.ndarray]:
    """Of the stretch that begins at latent frame `first`: its end, and each token's block [frames, height, width]."""
    if first < kept.behind:
        start, frames = chunk_of(first, kept.behind, kept.chunk_frames)
    else:
        start, frames = next(chunk for chunk in kept.window if first < sum(chunk))
    layout = kept.layout(frames)
    end = start + int(layout.spans[layout.spans[:, 0] == first - start][0, 1])
    return end, layout.blocks[first - start : end - start].numpy()
