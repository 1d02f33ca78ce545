"""How good the router is: which share of the true attention its choice of blocks holds, layer by layer, head by head.

While a model generates on the sparse memory, each pass of each layer is also computed in full: the exact softmax over
all tokens of persistent memory and window. A query block's *mass* on a block is the mean, over its queries, of the
probability that falls on the block's tokens. The router sees pooled vectors only; its recall at a share r is the mass
of the blocks that it keeps over the mass of the whole window. The best choice of as many blocks, by the masses
themselves, is the oracle. (arXiv 2604.21221 reports .65 +- .11 at 25 %.)
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

from ...kernels import BlockLists, attention_mass, pbsa_attention, route_parts
from ..config import AttentionConfig
from ..memory import PagedKV
from ..rollout import stream
from ..router import kept_blocks, part_lens, part_means
from ..state import StreamState
from ..wan import WanModel
from ..world.model import SAMPLER
from ..world.text import WorldTextEncoder
from .dmd import pass_of
from .world_clips import LATENT

RATIOS = (0.125, 0.25, 0.5)


class ProbedState(StreamState):
    """A memory that also computes what exact attention would give, wherever the window holds more than one chunk.

    found: (name, layer) -> for each pass, [H] means over clips and query blocks. Names: "persistent", the mass on the
    persistent memory; "rank", Spearman's correlation of pooled scores and masses; (ratio, "router", "quarters" or
    "oracle").
    """

    found: dict[tuple, list[Tensor]]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = super().attend(layer, q, k, v)
        if isinstance(self.cache, PagedKV) and len(self.cache.window) + 1 == self.cache.window_chunks:
            self._probe(self.cache, layer, q)
        return out

    def _probe(self, cache: PagedKV, layer: int, q: Tensor) -> None:
        slots = torch.cat([cache.persistent_slots[layer], cache.window_slots[layer]], dim=1).long()  # [G, M]
        q_blocks = cache.chunk.pack(q.float())
        pages = _pages(cache, layer, slots)
        mass = exact_mass(q_blocks, cache.chunk_lens, *pages)
        persistent = cache.persistent_slots.shape[-1]
        local = mass[..., persistent:]
        pooled_q = q_blocks.sum(2) / cache.chunk_lens[..., None]
        window = slots[:, persistent:, None].expand(-1, -1, self.head_dim)
        pooled_k = cache.pooled[layer].gather(1, window)
        scores = pooled_q @ pooled_k.mT / math.sqrt(self.head_dim)
        sides = (q_blocks, cache.chunk_lens), pages
        q_means, k_means = (part_means(*side) for side in sides)
        q_parts, k_parts = (part_lens(n, x.shape[2]) for x, n in sides)
        every = torch.arange(slots.shape[1], dtype=torch.int32, device=q.device).expand(len(slots), -1)
        by_quarters = route_parts(q_means, k_means, q_parts, k_parts, every[:, :0], every, 0)[1]
        self._note("persistent", layer, mass[..., :persistent].sum(-1))
        self._note("rank", layer, rank_correlation(scores, local))
        for ratio in RATIOS:
            self._note((ratio, "router"), layer, recall(local, scores, ratio))
            self._note((ratio, "quarters"), layer, recall(local, by_quarters[..., persistent:], ratio))
            self._note((ratio, "oracle"), layer, recall(local, local, ratio))

    def _note(self, name, layer: int, value_GN: Tensor) -> None:
        by_head = value_GN.mean(1).unflatten(0, (self.batch, self.heads)).mean(0)
        self.found.setdefault((name, layer), []).append(by_head.cpu())


def _pages(cache: PagedKV, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [G, M, T, D] float32 of the pages in `slots` [G, M], and how many tokens of each are valid [G, M]."""
    groups = torch.arange(len(slots), device=slots.device)[:, None]
    return cache.pages(layer).read[0][groups, slots].float(), cache.page_len[layer].gather(1, slots)


def exact_mass(q: Tensor, q_len: Tensor, k: Tensor, k_len: Tensor) -> Tensor:
    """Mean probability of a query block's valid queries on each key block: q [G, NQ, T, D], k [G, M, T, D], lengths
    [G, NQ] and [G, M] int32 -> [G, NQ, M] float32, each row with sum 1."""
    every = torch.arange(k.shape[1], dtype=torch.int32, device=k.device).expand(len(k), 1, -1)
    lists = BlockLists(every, torch.full_like(every[..., 0], k.shape[1]))
    _, lse = pbsa_attention(q, k, k, k_len, lists)
    return attention_mass(q, k, k_len, lists, lse, q_len=q_len)


def recall(mass: Tensor, scores: Tensor, ratio: float) -> Tensor:
    """Mass of the best `ratio` of the blocks by `scores`, over the mass of all: both [..., M] -> [...]."""
    best = scores.topk(kept_blocks(ratio, mass.shape[-1])).indices
    return mass.gather(-1, best).sum(-1) / mass.sum(-1)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's, along the last axis: [..., M] -> [...]."""
    ranks = (x.argsort(-1).argsort(-1).double() for x in (a, b))
    a, b = (r - r.mean(-1, keepdim=True) for r in ranks)
    return ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).float()


@torch.no_grad()
def probe(
    dit: WanModel,
    text: WorldTextEncoder,
    prompts: list[str],
    frames: int,
    attention: AttentionConfig,
    seed: int = 0,
) -> dict:
    """Generate a clip a prompt on the probed memory. -> name (see `ProbedState`) to [layers, heads], means."""
    device = dit.head.head.weight.device
    memory = ProbedState(
        layers=dit.num_layers, heads=dit.num_heads, head_dim=dit.head_dim, grid=(16, 16), batch=len(prompts),
        chunk_frames=SAMPLER.chunk_frames, attention=attention, dtype=dit.dtype, device=device,
    )  # fmt: skip
    memory.found = {}
    flow = pass_of(dit, memory, dit.cross_kv(text.encode(prompts)))
    shape = (len(prompts), *LATENT)
    for _ in stream(
        lambda x, sigma: x - sigma * flow(x, sigma), memory, SAMPLER, shape=shape, total_frames=frames, seed=seed,
        device=device,
    ):  # fmt: skip
        pass
    by_name: dict = defaultdict(dict)
    for (name, layer), passes in memory.found.items():
        by_name[name][layer] = torch.stack(passes).mean(0)
    return {name: torch.stack([layers[i] for i in sorted(layers)]) for name, layers in by_name.items()}


def as_table(found: dict) -> str:
    """Means over layers and heads with their spread, as a table."""
    lines = ["| Top-K | router | router by quarters | oracle |", "|---|---|---|---|"]
    for ratio in RATIOS:
        cells = [
            f"{found[ratio, who].mean():.2f} +- {found[ratio, who].std():.2f}"
            for who in ("router", "quarters", "oracle")
        ]
        lines.append(f"| {100 * ratio:g} % | " + " | ".join(cells) + " |")
    rank, kept = found["rank"], found["persistent"]
    lines += [
        "",
        f"Rank correlation of pooled scores with exact masses {rank.mean():.2f} +- {rank.std():.2f}; "
        f"mass on the persistent memory {kept.mean():.2f} +- {kept.std():.2f}.",
    ]
    return "\n".join(lines)
