"""Self-attention of the open chunk from a layer's projections: norms, RoPE, memory, router and PBSA in fused kernels.

    attention = FusedAttention(memory)
    out, shares = attention(layer, Projections(q, k, v, norm_q, norm_k, cos, sin), attention.tables(device))

`StreamState.attend` defines the numbers; this reads and writes the same memory with a tenth of the launches. For
inference: no gradients. Letters as in `state`; L layers, NP persistent and NW window pages of a group.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from typing import NamedTuple

import torch
import torch.nn.attention
from torch import Tensor

from ..kernels import BlockLists, fused, pbsa_attention
from ..kernels.workspace import held
from .fast_weights import FastOptions
from .frame_cache import FrameCache
from .memory import LayerPages, PagedKV
from .rollout import upload
from .router import choose_blocks
from .state import StreamState

EXACT, FIRST, LATER = "exact", "first", "later"  # kinds of pass


class Projections(NamedTuple):
    """q, k, v [B, N, C] before norm and RoPE; norm_q, norm_k [C]; cos, sin [N, D/2] float32."""

    q: Tensor
    k: Tensor
    v: Tensor
    norm_q: Tensor
    norm_k: Tensor
    cos: Tensor
    sin: Tensor


@dataclass
class Kept:
    """What the first pass of a chunk leaves for the later ones, per layer: which pages, and P's attention."""

    lists: list[BlockLists | None]
    persistent: list[tuple[Tensor, ...] | None]  # output, log-sum-exp; chunks of as many blocks have one list


class Reuse(NamedTuple):
    """The kind of a pass. exact: computed on its own. first: also keeps what later passes share. later: uses it."""

    kind: str = EXACT
    kept: Kept | None = None


ALONE = Reuse()


class FusedAttention:
    """The fused attention of one stream. `options` say what passes of a chunk share, and whether outputs are fp8."""

    def __init__(self, memory: StreamState, options: FastOptions | None = None):
        self.memory, self.options = memory, options or FastOptions()
        self.backend = memory.attention.backend

    def tables(self, device: torch.device) -> tuple[Tensor, ...]:
        """Tables of the open chunk. Mode "sparse": current, persistent and window slots [L, G, n]; else slots [F]."""
        cache = self.memory.cache
        if isinstance(cache, PagedKV):
            return cache.current, cache.persistent_slots, cache.window_slots
        return (upload(torch.tensor(cache.current, dtype=torch.int32), device),)

    def extent(self) -> float:
        """How many frames of the cache are read, or which share of the window."""
        cache = self.memory.cache
        if isinstance(cache, FrameCache):
            return len(cache.slots) + len(cache.current)
        return self.memory.attention.topk_after(self.memory.frame)

    def attend(self, layer: int, given: Projections, tables: tuple[Tensor, ...]) -> Tensor:
        """`StreamState.attend` from a layer's projections: out [B, N, C]. Raises as it does."""
        self.memory.check_pass([layer])
        out, shares = self(layer, given, tables)
        if isinstance(self.memory.cache, PagedKV):
            self.memory.cache.shares[layer] = shares
        self.memory.wrote([layer])
        assert isinstance(out, Tensor)
        return out

    def __call__(
        self,
        layer: int,
        given: Projections,
        tables: tuple[Tensor, ...],
        reuse: Reuse = ALONE,
        wanted: bool = True,
    ) -> tuple[Tensor | fused.Rows8 | None, Tensor | None]:
        """-> out [B, N, C] for the output projection, None unless `wanted`, and each page's shares (see `PagedKV`)."""
        if isinstance(self.memory.cache, FrameCache):
            return self._frames(self.memory.cache, layer, given, tables[0], wanted), None
        return self._pages(self.memory.cache, layer, given, tables, reuse, wanted)

    def _frames(
        self, cache: FrameCache, layer: int, given: Projections, slots: Tensor, wanted: bool
    ) -> Tensor | None:
        with named_range("element-wise"):
            q = fused.norm_rope_to_frames(*given, slots, cache.k[layer], cache.v[layer], backend=self.backend)
        if not wanted:
            return None
        with named_range("attention"), best_attention(q.device):
            out = self.memory.dense_attention(q, *cache.read(layer)).flatten(2)
        return held("attended", out) if self.options.fp8 else out

    def _pages(
        self,
        cache: PagedKV,
        layer: int,
        given: Projections,
        tables: tuple[Tensor, ...],
        reuse: Reuse,
        wanted: bool,
    ) -> tuple[Tensor | fused.Rows8 | None, Tensor | None]:
        current, persistent, window = (table[layer] for table in tables)
        rows = cache.chunk.tokens
        with named_range("element-wise"):
            pages = cache.pages(layer)
            queries = fused.norm_rope_to_pages(
                *given, rows, current, *pages.write, cache.pooled[layer], backend=self.backend
            )
        out, shares = self._attend(cache, layer, queries, pages, (persistent, window), reuse, wanted)
        if not cache.shared and shares is not None:  # `end_chunk` reads those of all layers
            shares = held(f"shares.{layer}", shares)
        if self.memory.stores:
            with named_range("element-wise"):
                cache.finish(layer, current, shares)
        if out is None:
            return None, shares
        with named_range("element-wise"):
            tokens = fused.blocks_to_tokens(
                out, rows, *given.q.shape[:2], eight_bits=self.options.fp8, backend=self.backend
            )
        return tokens, shares

    def _attend(
        self,
        cache: PagedKV,
        layer: int,
        queries: tuple[Tensor, Tensor],
        pages: LayerPages,
        slots: tuple[Tensor, Tensor],
        reuse: Reuse,
        wanted: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """q blocks [G, NB, T, D] and their means over the pages that the router names -> out like q blocks, shares."""
        (q_blocks, pooled_q), (persistent, window), (kind, kept) = queries, slots, reuse
        split = kind != EXACT and self.options.reuse_persistent and persistent.shape[1] > 0
        always, local = (persistent[:, :0], window) if split else (persistent, window)
        lists, shares = None, None
        if kind == LATER and self.options.router_once:
            assert kept is not None
            lists = kept.lists[layer]
        if lists is None:
            with named_range("router"):
                lists, shares = choose_blocks(
                    pooled_q, cache.pooled[layer], always, local, self.extent(), self.backend,
                    cache.routed_parts(layer, window[:, -q_blocks.shape[1] :]),
                )  # fmt: skip
            if kind == FIRST and self.options.router_once:
                assert kept is not None
                kept.lists[layer] = BlockLists(*_keep(kept.lists[layer], lists))
        if not wanted:
            return None, shares
        with named_range("attention"):
            if not split:
                return self._pbsa(cache, layer, pages, q_blocks, lists)[0], shares if kind == EXACT else None
            assert kept is not None
            if kind == FIRST:
                count = held("persistent.count", torch.full_like(persistent[:, :1], persistent.shape[1]))
                ascending = held("persistent.slots", persistent.sort(-1).values[:, None])
                found = self._pbsa(cache, layer, pages, q_blocks, BlockLists(ascending, count))
                kept.persistent[layer] = _keep(kept.persistent[layer], found)
            over_persistent = kept.persistent[layer]
            assert over_persistent is not None
            over_window = self._pbsa(cache, layer, pages, q_blocks, lists)
            return fused.merge_attention(*over_window, *over_persistent, backend=self.backend), None

    def _pbsa(
        self, cache: PagedKV, layer: int, pages: LayerPages, q_blocks: Tensor, lists: BlockLists
    ) -> tuple[Tensor, Tensor]:
        # rows after a page's end were written as zeros, here and by `BlockGeometry.pack`
        return pbsa_attention(
            q_blocks, *pages.read, cache.page_len[layer], lists, padding="finite", least_tokens=cache.least_tokens,
            gap=pages.gap, backend=self.backend,
        )  # fmt: skip


def _keep(mine_: tuple[Tensor, ...] | None, found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`found`, copied to where `mine_` is, so that a captured pass finds it there."""
    if mine_ is None:
        return tuple(x.clone() for x in found)
    for mine, new in zip(mine_, found):
        mine.copy_(new)
    return tuple(mine_)


def best_attention(device: torch.device) -> AbstractContextManager:
    """On CUDA, PyTorch's attention by cuDNN where it can: on Hopper 1.7 times as fast as PyTorch's first choice."""
    if device.type != "cuda" or not _attention_order():
        return nullcontext()
    return torch.nn.attention.sdpa_kernel(_attention_order(), set_priority=True)


@lru_cache(maxsize=1)
def _attention_order() -> list:
    """PyTorch's attention backends, cuDNN's first; empty where this PyTorch cannot be told an order."""
    if "set_priority" not in signature(torch.nn.attention.sdpa_kernel).parameters:
        return []
    kinds = torch.nn.attention.SDPBackend
    return [kinds.CUDNN_ATTENTION, kinds.FLASH_ATTENTION, kinds.EFFICIENT_ATTENTION, kinds.MATH]


def named_range(name: str) -> AbstractContextManager:
    """A named range where a profiler is on."""
    return torch.profiler.record_function(name) if torch.autograd._profiler_enabled() else nullcontext()
