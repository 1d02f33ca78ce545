"""What a run will need, before it starts: bytes, work, and the settings that fit into a budget.

Nothing is allocated: the memory is built on the meta device and counted, as the run itself would build it. How fast a
device is can only be tried: see `speed`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .config import PIXELS_PER_TOKEN, AttentionConfig, check_size
from .fast_weights import FastOptions
from .memory import PagedKV
from .state import StreamState

TEXT_TOKENS = 512  # rows of a prompt, which cross-attention reads


@dataclass(frozen=True)
class WanShape:
    """The sizes of a Wan backbone on which memory and work depend."""

    layers: int
    heads: int
    head_dim: int
    ffn_dim: int

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @classmethod
    def of(cls, network: Any) -> WanShape:
        """Of a Wan model, ours or a host's."""
        heads = network.num_heads
        ffn = network.blocks[0].ffn[0].out_features
        return cls(len(network.blocks), heads, network.dim // heads, ffn)


WAN_1_3B = WanShape(layers=30, heads=12, head_dim=128, ffn_dim=8960)


@dataclass(frozen=True)
class Plan:
    """A run to be estimated. Sides in pixels, lengths in latent frames.

    passes: of the model a chunk, the clean pass included. sides: 2 where guidance also evaluates a negative prompt,
    which has a memory of its own. dtype: what the model computes in and remembers. options: of the fast pass;
    None without one.
    """

    shape: WanShape
    width: int = 832
    height: int = 480
    latent_frames: int = 21
    chunk_frames: int = 3
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    batch: int = 1
    sides: int = 1
    passes: int = 5
    dtype: torch.dtype = torch.bfloat16
    options: FastOptions | None = None

    def validate(self) -> None:
        """Raise ValueError, naming the value and the remedy."""
        check_size(self.width, self.height)
        self.attention.validate(self.chunk_frames)
        for name in ("latent_frames", "batch", "sides", "passes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be 1 or more.")

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens (height, width) of a latent frame."""
        return self.height // PIXELS_PER_TOKEN, self.width // PIXELS_PER_TOKEN

    @property
    def chunk_tokens(self) -> int:
        return self.chunk_frames * self.grid[0] * self.grid[1]

    def state(self, device: torch.device | str = "meta") -> StreamState:
        """The memory of one side of this run."""
        return StreamState(
            layers=self.shape.layers,
            heads=self.shape.heads,
            head_dim=self.shape.head_dim,
            grid=self.grid,
            chunk_frames=self.chunk_frames,
            attention=self.attention,
            batch=self.batch,
            total_frames=self.latent_frames,
            dtype=self.dtype,
            device=device,
            share_open=True,
        )


@dataclass(frozen=True)
class Need:
    """Bytes on the device. `activations` is what one pass holds at its worst, `decode` the same for one chunk's frames
    in the VAE; the two never meet, so the larger one counts."""

    weights: int
    memory: int
    activations: int
    decode: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.memory + max(self.activations, self.decode)


def memory_bytes(plan: Plan) -> int:
    """Bytes on the device of the memory of all sides: exactly what the run will allocate, from first chunk to last."""
    state = plan.state()
    return plan.sides * (state.nbytes + kept_bytes(state, plan.options))


def kept_bytes(state: StreamState, options: FastOptions | None) -> int:
    """Bytes that a chunk's passes keep for one another: with `reuse_persistent` each layer's attention over P, that is
    an output and a float32 log-sum-exp a row."""
    cache = state.cache
    if options is None or not options.reuse_persistent or not isinstance(cache, PagedKV):
        return 0
    layers, groups = cache.table.shape[:2]
    rows = layers * groups * cache.geometry(cache.chunk_frames).num_blocks * cache.attention.block_tokens
    return rows * (cache.k_pages.shape[-1] * state.dtype.itemsize + 4)


def host_bytes(plan: Plan) -> int:
    """Bytes of the memory of all sides that rest with the host, with `offload_pages`."""
    return plan.sides * plan.state().host_bytes


def activation_bytes(plan: Plan) -> int:
    """An upper bound of what one pass over a chunk allocates besides weights and memory, without gradients.

    Counted for the composable pass: self-attention holds up to 16 tensors as wide as the model (the input, q, k and v
    before and after the rotation in float32, in blocks, and the output); the feed-forward holds two hidden ones and six
    of the model's width. Cross-attention's keys and values are those of all layers, as if they were kept. Mode window
    may gather the frames of one layer. tests/core/test_estimate.py holds it against what a pass really allocates.
    """
    shape, rows = plan.shape, plan.batch * plan.sides
    widest = max(16 * shape.dim, 6 * shape.dim + 2 * shape.ffn_dim)
    values = rows * plan.chunk_tokens * widest
    values += rows * TEXT_TOKENS * shape.dim * (2 * shape.layers + 4)
    if plan.attention.mode == "window":
        frame_tokens = plan.chunk_tokens // plan.chunk_frames
        values += rows * 2 * plan.attention.window_frames * frame_tokens * shape.dim
    return values * plan.dtype.itemsize


def frames_read(plan: Plan) -> float:
    """How many latent frames' worth of keys a query of the last chunk reads."""
    attention, frames = plan.attention, plan.latent_frames
    if attention.mode == "dense":
        return frames
    if attention.mode == "window":
        return min(attention.window_frames, frames)
    window = min(attention.window_frames, frames)
    persistent = min(attention.persistent_frames, frames - window)
    return persistent + window * attention.topk_after(frames - plan.chunk_frames)


def pass_flops(plan: Plan) -> float:
    """Floating-point operations of one pass over the last chunk, multiply and add counted apart; the router's are not.

    The blocks' products and both attentions; everything else of the model is less than a hundredth of it.
    """
    dim, tokens = plan.shape.dim, plan.chunk_tokens
    products = 2 * tokens * (6 * dim**2 + 2 * dim * plan.shape.ffn_dim)
    read = frames_read(plan) * tokens / plan.chunk_frames
    attention = 4 * tokens * dim * (read + TEXT_TOKENS)
    return plan.batch * plan.sides * plan.shape.layers * (products + attention)


def fit_budget(plan: Plan, budget: int, need: Callable[[Plan], Need]) -> Plan:
    """The plan with the largest memory, not above its own settings, that needs `budget` bytes or less in all.

    Mode dense gives way to mode sparse with its default settings in whole chunks. Mode sparse first keeps its pages in
    8 bits, then fewer frames; of equally many the more equal halves win, then the longer window. Raises ValueError,
    with numbers, where nothing fits.
    """
    plan.validate()
    choices = [plan, *(replace(plan, attention=attention) for attention in _smaller(plan))]
    for choice in choices:
        if need(choice).total <= budget:
            return choice
    sizes = need(choices[-1])
    raise ValueError(
        f"Nothing fits into {gigabytes(budget)}: the least is {gigabytes(sizes.total)}, of which "
        f"{', '.join(f'{name} {gigabytes(size)}' for name, size in parts(sizes))}. "
        f"Use a larger budget, a smaller picture than {plan.width} x {plan.height}, weights in fp8 or GGUF, or mode "
        "sparse with offload_pages."
    )


def _smaller(plan: Plan) -> Iterator[AttentionConfig]:
    """Settings with less memory, largest first; a window of at least two chunks, or nothing recent is remembered."""
    chunk, attention = plan.chunk_frames, plan.attention
    if attention.mode == "dense":
        whole = -(-6 // chunk) * chunk
        sink = -(-3 // chunk) * chunk
        attention = replace(
            attention, mode="sparse", window_frames=max(whole, 2 * chunk), sink_frames=sink,
            persistent_frames=max(whole, sink),
        )  # fmt: skip
        yield attention
    if attention.mode == "window":
        least = -(-(attention.sink_frames + 2 * chunk) // chunk) * chunk
        for frames in range(attention.window_frames - chunk, least - 1, -chunk):
            yield replace(attention, window_frames=frames)
        return
    if attention.page_bits == 16:
        attention = replace(attention, page_bits=8)
        yield attention
    pairs = [
        (window, persistent)
        for window in range(attention.window_frames, 2 * chunk - 1, -chunk)
        for persistent in range(attention.persistent_frames, attention.sink_frames - 1, -chunk)
        if (window, persistent) != (attention.window_frames, attention.persistent_frames)
    ]
    for window, persistent in sorted(pairs, key=lambda p: (-sum(p), abs(p[0] - p[1]), -p[0])):
        yield replace(attention, window_frames=window, persistent_frames=persistent)


def parts(need: Need) -> list[tuple[str, int]]:
    """The parts of a need with their names, those that are not empty."""
    named = [
        ("weights", need.weights),
        ("memory of past frames", need.memory),
        ("one pass" if need.activations >= need.decode else "decoding", max(need.activations, need.decode)),
    ]
    return [(name, size) for name, size in named if size]


def gigabytes(size: float) -> str:
    """Bytes for people; 1 GB is 1e9 bytes, and less than a hundredth of it is told in MB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
