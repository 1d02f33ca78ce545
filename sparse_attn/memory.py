"""Memory of the sparse mode: pages in a fixed pool, and the tables that say what each page is.

Every layer and every group (one head of one batch item) owns S page slots and a permutation of them, its table:

    | persistent memory P: `capacity` slots, the first `persistent` filled | window: chunks, oldest first | free |

A chunk writes its blocks into free slots. When it is finished and the window is full, the oldest chunk E leaves:
P = TopC(P u E; importance), and the slots of what was dropped become free. TopC always fills up, so all counts are
known on the host; which blocks win is known to the device alone, where the table is rewritten. No page is copied, the
host never waits, and little but tables is allocated. Entries of P and of the window keep the order of time.
With `keep` "novelty", what a block shows that no newer one does takes the place of importance.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import pool_pages
from ..kernels.fused import Pages8, pack_pages, unpack_pages
from .config import QUARTERS, AttentionConfig
from .geometry import BlockGeometry, least_tokens
from .offload import HostLayers
from .positions import shift_time
from .router import part_lens, part_means


class WindowChunk(NamedTuple):
    """A finished chunk in the window: its latent frames and its blocks."""

    frames: int
    blocks: int


class PagedKV:
    """Pages and tables of all layers, for mode "sparse".

    k_pages, v_pages [L, G, S, T, D]; page_len [L, G, S] int32, valid tokens at the front of a page; page_frame
    [L, G, S] int32, the latent frame in which the page's block begins (-1: never written); page_block [L, G, S] int32,
    the block's number in its chunk, for the memory map; pooled [L, G, S, D] float32, mean of the page's keys (with
    `router` "quarters" [L, G, S, 4, D]); table
    [L, G, S] int64, the permutation of slots described above. least_tokens: what every page in use holds at least.
    With `page_bits` 8 pages are int8, beside `scales`: of keys [L, G, S, D] and values [L, G, S, T], float32; they
    are `unpacked` into keys and values [G, S, T, D] of one layer after another. With `offload_pages` pages are in the
    memory of the `host`, which has room for two layers' on the device.
    S = (persistent_frames + window_frames) / chunk_frames * blocks a chunk.
    """

    def __init__(
        self,
        *,
        layers: int,
        groups: int,
        head_dim: int,
        grid: tuple[int, int],
        chunk_frames: int,
        attention: AttentionConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.grid, self.chunk_frames, self.attention = grid, chunk_frames, attention
        self._geometries: dict[int, BlockGeometry] = {}
        self._device = torch.device(device)
        blocks = self.geometry(chunk_frames).num_blocks
        self.least_tokens = least_tokens(chunk_frames, tuple(grid), attention.block_tokens)
        self.window_chunks = attention.window_frames // chunk_frames
        self.capacity = attention.persistent_frames // chunk_frames * blocks
        table_shape = (layers, groups, self.capacity + self.window_chunks * blocks)
        page_shape = (*table_shape, attention.block_tokens, head_dim)
        eight = attention.page_bits == 8
        stored = torch.int8 if eight else dtype
        self.scales: list[Tensor] = []
        self.unpacked: list[Tensor] = []
        self.host: HostLayers | None = None
        if attention.offload_pages:
            self.host = HostLayers(2, page_shape, stored, device)
            self.k_pages, self.v_pages = self.host.tensors
        else:
            self.k_pages, self.v_pages = (
                torch.zeros(page_shape, dtype=stored, device=device) for _ in range(2)
            )
        if eight:
            sides = (head_dim, attention.block_tokens)
            self.scales = [torch.zeros(*table_shape, side, device=device) for side in sides]
            self.unpacked = [torch.zeros(page_shape[1:], dtype=dtype, device=device) for _ in range(2)]
        self.quarters = attention.router == "quarters"
        seen = (QUARTERS, head_dim) if self.quarters else (head_dim,)
        self.pooled = torch.zeros(*table_shape, *seen, device=device)
        self.page_len, self.page_frame, self.page_block = (
            torch.zeros(table_shape, dtype=torch.int32, device=device) for _ in range(3)
        )
        self.table = torch.zeros(table_shape, dtype=torch.int64, device=device)
        # what the open chunk's blocks gave each page, each layer's latest: what the clean pass found decides
        self.shares: list[Tensor | None] = [None] * layers
        self._groups = torch.arange(groups, device=device)[:, None]
        self.reset()

    def reset(self) -> None:
        """Forget everything; the pool stays."""
        self.persistent = 0  # filled entries of P
        self.pinned = 0  # finished blocks of the sink; they enter P first and stay its first entries
        self.window: list[WindowChunk] = []
        self.time = 0  # temporal index at which the next chunk starts
        self.page_frame.fill_(-1)
        self.table.copy_(torch.arange(self.table.shape[-1], device=self._device).expand_as(self.table))

    def geometry(self, frames: int) -> BlockGeometry:
        """The blocks of a chunk of `frames`, which may be shorter than a whole one."""
        if frames not in self._geometries:
            tokens = self.attention.block_tokens
            self._geometries[frames] = BlockGeometry(frames, *self.grid, tokens, self._device)
        return self._geometries[frames]

    def begin_chunk(self, frame: int, frames: int) -> int:
        """Take free slots for the chunk that starts at latent frame `frame`; returns its temporal index.

        Makes the tables that `write` and the router use: current [L, G, NB] int64, persistent_slots [L, G, NP] and
        window_slots [L, G, NW] int32, the latter with the current chunk at its end.
        """
        if self.host:
            self.host.join()
        self.chunk = self.geometry(frames)
        start = self.capacity + sum(chunk.blocks for chunk in self.window)
        stop = start + self.chunk.num_blocks
        assert stop <= self.table.shape[-1], "the window keeps room for a whole chunk"
        self.current = self.table[..., start:stop].contiguous()
        self.persistent_slots = self.table[..., : self.persistent].to(torch.int32)
        self.window_slots = self.table[..., self.capacity : stop].to(torch.int32)
        shape = self.current.shape
        self.chunk_lens = self.chunk.lens.expand(shape[1:]).contiguous()  # [G, NB]
        self.page_len.scatter_(2, self.current, self.chunk_lens.expand(shape))
        self.page_frame.scatter_(2, self.current, (self.chunk.first_frame + frame).expand(shape))
        numbers = torch.arange(shape[-1], dtype=torch.int32, device=self._device)
        self.page_block.scatter_(2, self.current, numbers.expand(shape))
        return self.time if self.attention.positions == "rebased" else frame

    @property
    def scratch(self) -> list[Tensor]:
        """What is on the device beside `tensors`."""
        return [*self.unpacked, *(self.host.room if self.host else [])]

    @property
    def apart(self) -> bool:
        """Whether pages rest elsewhere than where they are read, so that what is written must be stored."""
        return bool(self.scales) or self.host is not None

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values [G, S, T, D], to read, and to write the open chunk's into. Where they rest `apart`
        they are a copy, good until another layer's are asked for, and what is written is kept by `store`."""
        if self.host:
            self.host.take(layer)
        if not self.scales:
            return self._resting(layer)
        k, v = self.unpacked
        unpack_pages(self._packed(layer), k, v, backend=self.attention.backend)
        return k, v

    def store(self, layer: int, slots: Tensor, values: bool = True) -> None:
        """Keep what was written at `slots` [G, n] of the layer's `pages`; without `values` the keys."""
        if self.scales:
            k, v = self.unpacked
            pack_pages(k, v, slots, self._packed(layer), values=values, backend=self.attention.backend)
        if self.host:
            self.host.keep(layer, None if values else 1)

    def _resting(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values as they rest, on the device: of an offloaded layer, once it was taken."""
        k, v = self.host.at(layer) if self.host else (self.k_pages[layer], self.v_pages[layer])
        return k, v

    def _packed(self, layer: int) -> Pages8:
        (k, v), (k_scale, v_scale) = self._resting(layer), self.scales
        return Pages8(k, k_scale[layer], v, v_scale[layer])

    def write(
        self, layer: int, k_blocks: Tensor, v_blocks: Tensor, store: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Write the open chunk's blocks [G, NB, T, D] and pool their keys; returns the layer's `pages`. Without `store`
        what rests `apart` is not changed: good for this pass alone."""
        at = (self._groups, self.current[layer])
        k_pages, v_pages = self.pages(layer)
        k_pages[at] = k_blocks.to(k_pages.dtype)
        v_pages[at] = v_blocks.to(v_pages.dtype)
        self.pooled[layer][at] = self.pool(k_blocks, self.chunk_lens)
        if store:
            self.store(layer, self.current[layer])
        return k_pages, v_pages

    def pool(self, blocks: Tensor, lens: Tensor) -> Tensor:
        """What the router sees of blocks [G, n, T, D] with `lens` [G, n] valid tokens: their mean [G, n, D] float32, or
        with `router` "quarters" those of their quarters [G, n, 4, D]."""
        return part_means(blocks, lens) if self.quarters else pool_pages(blocks, lens).float()

    def routed_parts(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor] | None:
        """`parts` of the router: of the open chunk's blocks, which are at `slots`, and of all of a layer's pages."""
        if not self.quarters:
            return None
        parts = part_lens(self.page_len[layer], self.attention.block_tokens)
        return parts[self._groups, slots.long()], parts

    def open_part(self, layer: int, pages: Tensor) -> Tensor:
        """The open chunk's blocks [G, NB, T, D] of a layer's pages, or of their gradient [G, S, T, D]."""
        return pages[self._groups, self.current[layer]]

    def end_chunk(self, frame: int) -> None:
        """Keep the open chunk, which starts at latent frame `frame`; if the window is now full, update P.

        Reads `shares`: for each layer [G, NB, NP + NW] float32, in the order persistent, window.
        """
        frames, blocks = self.chunk.grid[0], self.chunk.num_blocks
        self.window.append(WindowChunk(frames, blocks))
        self.time += frames
        if frame + frames <= self.attention.sink_frames:
            self.pinned += blocks
        if len(self.window) == self.window_chunks:
            self._evict_oldest()

    def recent_frames(self, keep_sink: bool = True) -> int:
        """Latent frames of the window: what is not yet long-lived memory, whatever becomes of the sink."""
        return sum(chunk.frames for chunk in self.window)

    def rewind(self, frames: int, end: int) -> None:
        """Take the newest `frames`, whole chunks of the window, out again; `end`: the next chunk's latent frame."""
        while frames > 0:
            chunk = self.window.pop()
            if end <= self.attention.sink_frames:
                self.pinned -= chunk.blocks  # counted again when it is finished again
            self.time -= chunk.frames
            end, frames = end - chunk.frames, frames - chunk.frames

    def tensors(self) -> dict[str, Tensor]:
        """The pool and its tables, by name: all tensors that live between chunks."""
        names = ("k_pages", "v_pages", "pooled", "page_len", "page_frame", "page_block", "table")
        scales = dict(zip(("k_scale", "v_scale"), self.scales))
        return {name: getattr(self, name) for name in names} | scales

    def counters(self) -> dict[str, list[int]]:
        """All that lives on the host between chunks."""
        return {
            "persistent": [self.persistent],
            "pinned": [self.pinned],
            "time": [self.time],
            "window": [chunk.frames for chunk in self.window],
        }

    def load_counters(self, counters: dict[str, list[int]]) -> None:
        """The inverse of `counters`."""
        (self.persistent,), (self.pinned,), (self.time,) = (
            counters[name] for name in ("persistent", "pinned", "time")
        )
        self.window = [WindowChunk(frames, self.geometry(frames).num_blocks) for frames in counters["window"]]

    def kept_frames(self) -> Tensor:
        """[L, G, NP] int32: the latent frame from which each block of P stems, the memory map of a stream."""
        return self.page_frame.gather(2, self.table[..., : self.persistent])

    def _evict_oldest(self) -> None:
        if self.attention.positions == "rebased":
            self._turn_back(self.window[0].frames)
        evicted = self.window.pop(0).blocks
        candidates = self.persistent + evicted
        kept = min(self.capacity, candidates)
        P, window = self.table.tensor_split([self.capacity], dim=-1)
        slots = torch.cat([P[..., : self.persistent], window[..., :evicted]], dim=-1)
        if self.attention.keep == "novelty":
            stop = evicted + sum(chunk.blocks for chunk in self.window)
            score = self._novelty(slots, window[..., evicted:stop])
        else:
            shares = [layer[..., :candidates] for layer in self.shares if layer is not None]
            score = torch.stack(shares).sum(2)
        score[..., : self.pinned] = torch.inf
        ranking = score.sort(dim=-1, descending=True, stable=True).indices
        in_time_order = (part.sort(dim=-1).values for part in ranking.tensor_split([kept], dim=-1))
        winners, losers = (slots.gather(-1, places) for places in in_time_order)
        free = torch.cat([P[..., self.persistent :], losers], dim=-1)
        unfilled = self.capacity - kept
        parts = [winners, free[..., :unfilled], window[..., evicted:], free[..., unfilled:]]
        self.table.copy_(torch.cat(parts, dim=-1))
        self.persistent = kept

    def _novelty(self, candidates: Tensor, newer: Tensor) -> Tensor:
        """[L, G, C]: 1 - the largest cosine between a candidate's mean value and that of a newer block or of the sink.

        candidates [L, G, C] and newer [L, G, W]: slots, both in the order of time.
        """
        slots, count = torch.cat([candidates, newer], dim=-1), candidates.shape[-1]
        place = torch.arange(slots.shape[-1], device=self._device)
        compared = (place > place[:count, None]) | (place < self.pinned)
        scores = []
        for layer, used in enumerate(slots):  # one at a time: what lies in between stays small
            means = pool_pages(self.pages(layer)[1], self.page_len[layer])[self._groups, used]
            directions = F.normalize(means.float(), dim=-1)
            likeness = directions[:, :count] @ directions.mT
            scores.append(1 - likeness.masked_fill(~compared, -1).amax(dim=-1))
        return torch.stack(scores)

    def _turn_back(self, frames: int) -> None:
        """Turn the keys of the whole window, E included, back by `frames`: E then lies just before the window."""
        self.time -= frames
        stop = self.capacity + sum(chunk.blocks for chunk in self.window)
        for layer, slots in enumerate(self.table[..., self.capacity : stop]):
            at = (self._groups, slots)
            # a layer at a time, so that the copies stay small
            for keys in (self.pages(layer)[0], self.pooled[layer]):
                keys[at] = shift_time(keys[at], -frames, keys.shape[-1])
            self.store(layer, slots, values=False)
