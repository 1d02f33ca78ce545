"""Memory of the sparse mode: pages in a fixed pool, and the tables that say what each page is.

Every layer and every group (one head of one batch item) owns S page slots and a permutation of them, its table:

    | persistent memory P: `capacity` slots, the first `persistent` filled | window: chunks, oldest first | free |

A chunk writes its blocks into free slots. When it is finished and the window is full, the oldest chunk E leaves:
P = TopC(P u E; importance), and the slots of what was dropped become free. TopC always fills up, so all counts are
known on the host; which blocks win is known to the device alone, where the table is rewritten. No page is copied, the
host never waits, and little but tables is allocated. Entries of P and of the window keep the order of time.
With `keep` "novelty", what a block shows that no newer one does takes the place of importance.

With `share_open` the layers share the pages of the open chunk: while it is denoised, what one layer wrote is not needed
once the next one attends. The table then permutes the R slots in which pages rest, and the last S - R are the open
chunk's. In the clean pass each layer is updated as soon as it has attended, and its new pages are copied to where E's
losers were: a quarter less memory with the default settings. A clean pass that is cut short leaves the memory torn.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import NO_GAP, pool_pages
from ..kernels.fused import Pages8, pack_pages, put_pages, unpack_pages, update_table
from ..kernels.workspace import held
from .config import QUARTERS, AttentionConfig
from .geometry import BlockGeometry, least_tokens
from .offload import HostLayers
from .positions import shift_time
from .router import part_lens, part_means


class WindowChunk(NamedTuple):
    """A finished chunk in the window: its latent frames and its blocks."""

    frames: int
    blocks: int


class LayerPages(NamedTuple):
    """Where a layer's keys and values are: good until another layer's are asked for."""

    read: tuple[Tensor, Tensor]  # [G, S + gap, T, D]
    gap: tuple[int, int]  # of `kernels.pbsa_attention`
    write: tuple[Tensor, Tensor]  # [G, S, T, D], of which the open chunk's slots are to be written


class PagedKV:
    """Pages and tables of all layers, for mode "sparse".

    k_pages, v_pages [L, G, R, T, D], R = S unless `shared`; page_len [L, G, S] int32, valid tokens at the front of a
    page; page_frame [L, G, S] int32, the latent frame in which the page's block begins (-1: never written); page_block
    [L, G, S] int32, the block's number in its chunk, for the memory map; pooled [L, G, S, D] float32, mean of the
    page's keys (with `router` "quarters" [L, G, S, 4, D]); table [L, G, R] int64, the permutation of slots described
    above. least_tokens: what every page in use holds at least.
    With `page_bits` 8 pages are int8, beside `scales`: of keys [L, G, R, D] and values [L, G, R, T], float32; they
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
        share_open: bool = False,
    ):
        self.grid, self.chunk_frames, self.attention = grid, chunk_frames, attention
        self._geometries: dict[int, BlockGeometry] = {}
        self._device = torch.device(device)
        blocks = self.geometry(chunk_frames).num_blocks
        self.least_tokens = least_tokens(chunk_frames, tuple(grid), attention.block_tokens)
        self.window_chunks = attention.window_frames // chunk_frames
        self.capacity = attention.persistent_frames // chunk_frames * blocks
        self.shared = (
            share_open and self.window_chunks > 1
        )  # a window of the open chunk alone has nowhere else to rest
        slots = self.capacity + self.window_chunks * blocks
        self.resting = slots - blocks if self.shared else slots  # R
        table_shape = (layers, groups, slots)
        self._make_pages(table_shape, (attention.block_tokens, head_dim), dtype, device)
        self.quarters = attention.router == "quarters"
        seen = (QUARTERS, head_dim) if self.quarters else (head_dim,)
        self.pooled = torch.zeros(*table_shape, *seen, device=device)
        self.page_len, self.page_frame, self.page_block = (
            torch.zeros(table_shape, dtype=torch.int32, device=device) for _ in range(3)
        )
        self.table = torch.zeros((*table_shape[:2], self.resting), dtype=torch.int64, device=device)
        open_slots = torch.arange(self.resting, slots, device=device)
        self._open_slots = open_slots.expand(
            *table_shape[:2], -1
        ).contiguous()  # CUDA graphs know where it is
        # what the open chunk's blocks gave each page, each layer's latest: what the clean pass found decides
        self.shares: list[Tensor | None] = [None] * layers
        self.finished: set[int] = (
            set()
        )  # layers that hold the open chunk where the others hold what was before it
        self._groups = torch.arange(groups, device=device)[:, None]
        self.reset()

    def _make_pages(
        self,
        slots: tuple[int, int, int],
        page: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """All that holds pages, as the attention says: slots (L, G, S), page (T, D)."""
        layers, groups, count = slots
        eight, offload = self.attention.page_bits == 8, self.attention.offload_pages
        rest_shape = (layers, groups, self.resting, *page)
        stored = torch.int8 if eight else dtype
        self.scales: list[Tensor] = []
        self.unpacked: list[Tensor] = []
        self.host: HostLayers | None = None
        # of all layers, and behind them the open chunk's: [G, L * R + S - R, T, D], where nothing else holds those
        self._pool: list[Tensor] = []
        if offload:
            self.host = HostLayers(2, rest_shape, stored, device, room=self.resting if eight else count)
            self.k_pages, self.v_pages = self.host.tensors
        elif self.shared and not eight:
            pages = layers * self.resting
            self._pool = [
                torch.zeros(groups, pages + count - self.resting, *page, dtype=dtype, device=device)
                for _ in range(2)
            ]
            self.k_pages, self.v_pages = (
                x[:, :pages].unflatten(1, (layers, self.resting)).transpose(0, 1) for x in self._pool
            )
        else:
            self.k_pages, self.v_pages = (
                torch.zeros(rest_shape, dtype=stored, device=device) for _ in range(2)
            )
        if eight:
            self.scales = [torch.zeros(*rest_shape[:3], side, device=device) for side in reversed(page)]
            self.unpacked = [torch.zeros(groups, count, *page, dtype=dtype, device=device) for _ in range(2)]

    def reset(self) -> None:
        """Forget everything; the pool stays."""
        self.persistent = 0  # filled entries of P
        self.pinned = 0  # finished blocks of the sink; they enter P first and stay its first entries
        self.window: list[WindowChunk] = []
        self.time = 0  # temporal index at which the next chunk starts
        self.finished.clear()
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
        self._begins, blocks, start = frame, self.chunk.num_blocks, self._filled
        if self.shared:
            self.current = self._open_slots[..., :blocks]
        else:
            assert start + blocks <= self.table.shape[-1], "the window keeps room for a whole chunk"
            self.current = self.table[..., start : start + blocks].contiguous()
        self.persistent_slots = self.table[..., : self.persistent].to(torch.int32)
        finished = self.table[..., self.capacity : start]
        self.window_slots = torch.cat([finished, self.current], dim=-1).to(torch.int32)
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
        open_part = (x[:, self.k_pages.shape[0] * self.resting :] for x in self._pool)
        return [*open_part, *self.unpacked, *(self.host.room if self.host else [])]

    @property
    def apart(self) -> bool:
        """Whether pages rest elsewhere than where they are written, so that a chunk's last pass must `finish` them."""
        return self.shared or bool(self.scales) or self.host is not None

    def pages(self, layer: int) -> LayerPages:
        """A layer's keys and values, to read, and to write the open chunk's into. Where they rest `apart` that is good
        for one pass, and what is to be kept is kept by `finish`."""
        if self.host:
            self.host.take(layer)
        if self.scales:
            rest = (x[:, : self.resting] for x in self.unpacked)
            unpack_pages(self._packed(layer), *rest, backend=self.attention.backend)
        return self._views(layer)

    def _views(self, layer: int) -> LayerPages:
        """What `pages` returned."""
        if self._pool:
            last = self.k_pages.shape[0] - 1  # behind whose pages the open chunk's lie
            k, v = (x[:, layer * self.resting :] for x in self._pool)
            k_last, v_last = (x[:, last * self.resting :] for x in self._pool)
            return LayerPages((k, v), (self.resting, (last - layer) * self.resting), (k_last, v_last))
        k, v = self.unpacked or self._resting(layer)
        return LayerPages((k, v), NO_GAP, (k, v))

    def finish(self, layer: int, slots: Tensor, shares: Tensor | None) -> None:
        """Keep what a chunk's last pass wrote in a layer, which has attended: once a chunk where it is `shared`.

        slots: `current` of the layer, where the pass found it; shares: of `end_chunk`. A CUDA graph does the same again
        where `plan` is the same.
        """
        if not self.apart:
            return
        if self.shared:
            self.finished.add(layer)
            self._update(range(layer, layer + 1), [shares])
            slots, (read, _, write) = self._new_slots()[layer], self._views(layer)
            k, v = (x[:, self.resting : self.resting + self.chunk.num_blocks] for x in write)
            put_pages(k, v, slots, *read, backend=self.attention.backend)
        self._pack(layer, slots)
        if self.host:
            self.host.keep(layer)

    def plan(self) -> tuple:
        """What `finish` depends on, apart from tensors that stay where they are."""
        return self.persistent, self._pinned_after(), tuple(self.window), self.chunk.num_blocks

    def _pack(self, layer: int, slots: Tensor, values: bool = True) -> None:
        """Keep what was written at `slots` [G, n], if pages rest in 8 bits; without `values` the keys."""
        if self.scales:
            k, v = self.unpacked
            pack_pages(k, v, slots, self._packed(layer), values=values, backend=self.attention.backend)

    def _resting(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values as they rest, on the device: of an offloaded layer, once it was taken."""
        k, v = self.host.at(layer) if self.host else (self.k_pages[layer], self.v_pages[layer])
        return k, v

    def _packed(self, layer: int) -> Pages8:
        (k, v), (k_scale, v_scale) = self._resting(layer), self.scales
        return Pages8(k, k_scale[layer], v, v_scale[layer])

    def write(self, layer: int, k_blocks: Tensor, v_blocks: Tensor) -> LayerPages:
        """Write the open chunk's blocks [G, NB, T, D] and pool their keys; returns the layer's `pages`."""
        at = (self._groups, self.current[layer])
        pages = self.pages(layer)
        for stored, blocks in zip(pages.write, (k_blocks, v_blocks)):
            stored[at] = blocks.to(stored.dtype)
        self.pooled[layer][at] = self.pool(k_blocks, self.chunk_lens)
        return pages

    def pool(self, blocks: Tensor, lens: Tensor) -> Tensor:
        """What the router sees of blocks [G, n, T, D] with `lens` [G, n] valid tokens: their mean [G, n, D] float32, or
        with `router` "quarters" those of their quarters [G, n, 4, D]."""
        return part_means(blocks, lens) if self.quarters else pool_pages(blocks, lens).float()

    def routed_parts(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor] | None:
        """`parts` of the router: of the open chunk's blocks, which are at `slots`, and of all of a layer's pages."""
        if not self.quarters:
            return None
        parts = part_lens(self.page_len[layer], self.attention.block_tokens)
        return held("parts.queries", parts[self._groups, slots.long()]), held("parts.pages", parts)

    def open_part(self, layer: int, pages: Tensor) -> Tensor:
        """The open chunk's blocks [G, NB, T, D] of a layer's pages, or of their gradient [G, S, T, D]."""
        return pages[self._groups, self.current[layer]]

    def end_chunk(self, frame: int) -> None:
        """Keep the open chunk, which starts at latent frame `frame`; if the window is now full, update P.

        Reads `shares`: for each layer [G, NB, NP + NW] float32, in the order persistent, window.
        """
        if self.shared:
            self._keep_tables()
            self.finished.clear()
        else:
            self._update(range(self.table.shape[0]), self.shares)
        leaving, self.pinned = self._leaving(), self._pinned_after()
        self.window.append(self._open_chunk())
        self.time += self.window[-1].frames
        if leaving is not None:
            self.window.pop(0)
            self.persistent = min(self.capacity, self.persistent + leaving.blocks)
            self.time -= leaving.frames if self.attention.positions == "rebased" else 0

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
        self.finished.clear()

    def kept_frames(self) -> Tensor:
        """[L, G, NP] int32: the latent frame from which each block of P stems, the memory map of a stream."""
        return self.page_frame.gather(2, self.table[..., : self.persistent])

    @property
    def _filled(self) -> int:
        """Where the window's finished chunks end in the table."""
        return self.capacity + sum(chunk.blocks for chunk in self.window)

    def _open_chunk(self) -> WindowChunk:
        return WindowChunk(self.chunk.grid[0], self.chunk.num_blocks)

    def _leaving(self) -> WindowChunk | None:
        """The chunk E that leaves the window when the open one ends, if one does."""
        chunks = [*self.window, self._open_chunk()]
        return chunks[0] if len(chunks) == self.window_chunks else None

    def _pinned_after(self) -> int:
        """`pinned`, once the open chunk has ended."""
        frames, blocks = self._open_chunk()
        return self.pinned + (blocks if self._begins + frames <= self.attention.sink_frames else 0)

    def _new_slots(self) -> Tensor:
        """[L, G, NB]: where the open chunk's blocks rest, of layers that are updated."""
        leaving = self._leaving()
        start = self._filled - (leaving.blocks if leaving else 0)
        return self.table[..., start : start + self.chunk.num_blocks]

    def _keep_tables(self) -> None:
        """The open chunk's facts go where `finish` has put its pages."""
        slots = self._new_slots()
        open_part = slice(self.resting, self.resting + slots.shape[-1])
        for facts in (self.page_len, self.page_frame, self.page_block):
            facts.scatter_(2, slots, facts[..., open_part].clone())
        seen = self.pooled.flatten(3) if self.quarters else self.pooled
        seen.scatter_(2, slots[..., None].expand(*slots.shape, seen.shape[-1]), seen[:, :, open_part].clone())

    def _update(self, layers: range, shares: list[Tensor | None]) -> None:
        """E leaves the window of some layers, whose `shares` are given. Changes nothing on the host."""
        leaving = self._leaving()
        if leaving is None:
            return
        if self.attention.positions == "rebased":
            for layer in layers:
                self._turn_back(layer, leaving.frames)
        if self.attention.keep == "novelty":
            scores = [self._novelty(layer, self.persistent + leaving.blocks)[:, None] for layer in layers]
        else:
            scores = [part for part in shares if part is not None]
        score = scores[0] if len(scores) == 1 else torch.cat(scores)
        update_table(
            self.table[layers.start : layers.stop].flatten(0, 1),
            held("update.score", score.float()),  # under autocast the reference's shares are not
            self.capacity,
            self.persistent,
            leaving.blocks,
            self._pinned_after(),
            backend=self.attention.backend,
        )

    def _window_of(self, layer: int) -> tuple[Tensor, Tensor]:
        """[G, n]: the slots of the window's finished chunks, and of the open one."""
        return self.table[layer, :, self.capacity : self._filled], self.current[layer]

    def _novelty(self, layer: int, count: int) -> Tensor:
        """[G, count]: 1 - the largest cosine between a candidate's mean value and that of a newer block or of the sink.

        The candidates are the first `count` of P, then the window, in the order of time.
        """
        finished, current = self._window_of(layer)
        (_, read), _, (_, write) = self._views(layer) if self.shared else self.pages(layer)
        slots, lens = (
            torch.cat([self.table[layer, :, : self.persistent], finished], dim=-1),
            self.page_len[layer],
        )
        rest = slice(0, self.resting)
        if self.shared:
            new = slice(self.resting, None)
            parts = [(read, rest, slots), (write, new, current)]
        else:
            parts = [(read, rest, torch.cat([slots, current], dim=-1))]
        means = [
            pool_pages(pages[:, part], lens[:, part])[self._groups, used - part.start]
            for pages, part, used in parts
        ]
        directions = F.normalize(torch.cat(means, dim=1).float(), dim=-1)
        place = torch.arange(directions.shape[1], device=self._device)
        compared = (place > place[:count, None]) | (place < self._pinned_after())
        likeness = directions[:, :count] @ directions.mT
        return 1 - likeness.masked_fill(~compared, -1).amax(dim=-1)

    def _turn_back(self, layer: int, frames: int) -> None:
        """Turn a layer's keys of the whole window, E included, back by `frames`: E then lies just before the window."""
        finished, current = self._window_of(layer)
        (read, _), _, (write, _) = self._views(layer) if self.shared else self.pages(layer)
        for slots, pages in ((finished, read), (current, write)):
            at = (self._groups, slots)
            for keys in (pages, self.pooled[layer]):
                keys[at] = shift_time(keys[at], -frames, keys.shape[-1])
        self._pack(layer, finished, values=False)
        if not self.shared:  # `finish` packs and keeps the rest
            self._pack(layer, current, values=False)
            if self.host:
                self.host.keep(layer, 1)
