"""What one sampling run remembers, and how a forward pass finds it.

`transformer_options` dicts are copied and merged on every model call, so state in a dict would be lost; instances of
the classes here are carried along by reference. A run holds one `StreamState` for every conditioning entry: with CFG
above 1, prompt and negative prompt each keep their own keys and values.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable
from functools import partial
from typing import Any

import comfy.model_management
import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from ..kernels import preferred_block_tokens
from ..kernels.workspace import Workspace
from ..sparse_attn.config import AttentionConfig
from ..sparse_attn.frame_cache import RECENT_FRAMES
from ..sparse_attn.fused_attention import FusedAttention, Projections
from ..sparse_attn.memory import PagedKV
from ..sparse_attn.state import StreamState
from .fast_pass import HostFastPass
from .recovery import Finished, free_device_memory

logger = logging.getLogger("sparse_forcing.nodes")

RUN = "sparse_forcing"
PASS = "sparse_forcing_pass"
ATTENTION = "sparse_forcing_attention"
FAST = "sparse_forcing_fast_pass"  # FastOptions of the fast pass, None where it may not serve; missing: the defaults
FIRST_STEPS = "sparse_forcing_first_steps"  # what the loaded model wants for the opening chunk
PROPOSED = "sparse_forcing_proposed"  # the memory that the loaded model was trained with, where it is not the default
UNDECIDED = object()
PATCH_TOKENS = 2  # latent values a token spans, in height and in width


def attention_of(model: Any) -> AttentionConfig:
    """The memory that a MODEL was patched with, else the one that its loader proposes, else the default."""
    options = model.model_options["transformer_options"]
    return (
        options.get(ATTENTION)
        or options.get(PROPOSED)
        or AttentionConfig(block_tokens=default_block_tokens(model))
    )


def default_block_tokens(model: Any) -> int:
    """Return the block size that a MODEL's loader proposes, else the one that is fastest on this device."""
    proposed = model.model_options["transformer_options"].get(PROPOSED)
    if proposed is not None:
        return proposed.block_tokens
    return preferred_block_tokens(comfy.model_management.get_torch_device())


class SamplingRun:
    """The memory of one sampling run, grown as the host's first forward reveals batch, grid and conditioning.

    `total_frames` (latent) is what mode "dense" allocates for. `reserve_bytes`: device memory needed beside the model.
    `rereads`: the prompt may change, and the recent frames run again. Implements the memory side of `rollout.stream`:
    `begin_chunk(frames)`, `noisy` and `end_chunk()`.

    To write the memory anew (`recovery.rewrite`) it takes `finished`, the finished latents from `first_frame` on, of
    which the first `given` were not generated.
    """

    def __init__(
        self,
        attention: AttentionConfig,
        chunk_frames: int,
        total_frames: int,
        reserve_bytes: int = 0,
        rereads: bool = False,
    ):
        attention.validate(chunk_frames)
        self.attention, self.chunk_frames, self.total_frames = attention, chunk_frames, total_frames
        self.reserve_bytes, self.rereads = reserve_bytes, rereads
        self.workspace = Workspace()  # for attention on the host's own layers
        self.retaken: set[int] = set()  # layers that another pack took and this run took back
        self.tried = False  # whether a forward has shown which layers those are
        self.guided = True  # whether the negative side is evaluated, too
        self.fast: Any = UNDECIDED  # this run's HostFastPass; None: the host's own layers
        self.states: dict[Hashable, StreamState] = {}
        self.frame = 0
        self.first_frame = 0  # later than 0 after a prompt that flushed the memory
        self.given = 0
        self.finished: Finished | None = None
        self._frames = 0
        self._noisy = False
        self._seen: set[Hashable] = set()

    @property
    def t_start(self) -> int:
        """Temporal RoPE index of the current chunk's first frame, the same for every conditioning entry."""
        for state in self.states.values():
            return state.t_start
        return self.frame

    @property
    def longest_pass(self) -> int:
        """Latent frames of the longest pass: a chunk, or what a change of the prompt reads again at once."""
        if not self.rereads or self.attention.mode == "sparse":
            return self.chunk_frames
        recent = RECENT_FRAMES if self.attention.mode == "dense" else self.attention.window_frames
        return max(self.chunk_frames, min(recent, self.total_frames))

    @property
    def open_frames(self) -> int:
        """Latent frames of the open chunk."""
        return self._frames

    @property
    def noisy(self) -> bool:
        """Whether another pass over the open chunk follows the next one."""
        return self._noisy

    @noisy.setter
    def noisy(self, value: bool) -> None:
        self._noisy = value
        for state in self.states.values():
            state.noisy = value

    def begin_chunk(self, frames: int) -> None:
        self._frames, self._noisy = frames, False
        for state in self.states.values():
            state.begin_chunk(frames)

    def begin_pass(self) -> None:
        """Forget which entries have been seen; call before every model call."""
        self._seen.clear()

    def has_done(self, keys: list[Hashable]) -> bool:
        """Whether the clean pass has written all these entries: a guidance evaluates some of them again."""
        return not self._noisy and self._seen.issuperset(keys)

    def forget_prompts(self) -> None:
        """Say that a conditioning has changed behind its key."""
        if isinstance(self.fast, HostFastPass):
            self.fast.forget_prompts()

    def end_chunk(self) -> None:
        """Keep the chunk just written. The clean pass must have covered every entry, or a cache would hold noise."""
        if self._seen != set(self.states):
            raise ValueError(
                "A conditioning entry was left out of the clean pass at sigma 0. Sparse Forcing keeps one cache for "
                "every entry, so conditioning may not be limited to a range of timesteps; remove that limit."
            )
        for state in self.states.values():
            state.end_chunk()
        self.frame += self._frames

    def close(self) -> None:
        """Give the memory back; the run could start anew."""
        self.states.clear()
        self.workspace = Workspace()
        self.fast = UNDECIDED
        self.finished = None
        self.tried = False
        self.frame = self.first_frame = 0

    def rewind_all(self) -> None:
        """Empty the memory, for the finished latents to be written again from `first_frame` on."""
        for state in self.states.values():
            state.reset()
            state.frame = self.first_frame
        self.frame = self.first_frame

    def give_up_fast(self, reason: str) -> None:
        """Continue with ComfyUI's own layers, and free what the fast pass holds."""
        logger.warning(
            "Sparse Forcing gives its fast pass up and continues with ComfyUI's own layers: %s", reason
        )
        self.fast = None
        free_device_memory()

    @property
    def tears(self) -> bool:
        """Whether a clean pass that is cut short leaves the memory of finished chunks torn."""
        caches = (state.cache for state in self.states.values())
        return not self._noisy and any(isinstance(cache, PagedKV) and cache.shared for cache in caches)

    def states_for(self, keys: list[Hashable], network: Any, x: Tensor) -> list[StreamState]:
        """The states of one forward, in batch order; `x` [len(keys) * B, C, F, H, W] is its input.

        keys: the host's id of each conditioning entry in the batch, constant during a run.
        """
        self._seen.update(keys)
        return [self.states.get(key) or self._open(key, network, x, x.shape[0] // len(keys)) for key in keys]

    def _open(self, key: Hashable, network: Any, x: Tensor, batch: int) -> StreamState:
        if self.frame:
            raise ValueError(
                "A conditioning entry appeared in the middle of a run. Sparse Forcing keeps one cache for every entry "
                "from the first frame on, so conditioning may not be limited to a range of timesteps."
            )
        state = self.new_state(network, x.shape, batch, x.dtype, x.device)
        state.begin_chunk(self._frames)
        state.noisy = self.noisy
        self.states[key] = state
        return state

    def new_state(
        self, network: Any, shape: torch.Size, batch: int, dtype: torch.dtype, device: torch.device | str
    ) -> StreamState:
        """An empty state for latents of `shape` [.., H, W] passing through `network`."""
        return StreamState(
            layers=len(network.blocks),
            heads=network.num_heads,
            head_dim=network.dim // network.num_heads,
            grid=(-(-shape[-2] // PATCH_TOKENS), -(-shape[-1] // PATCH_TOKENS)),
            chunk_frames=self.chunk_frames,
            attention=self.attention,
            batch=batch,
            total_frames=self.total_frames,
            dtype=dtype,
            device=device,
            share_open=True,
        )


class ForwardPass:
    """One forward's view of the run: the states of its batch rows and its rotary table (float32).

    Dense and window attention go through the host's own attention function, where other nodes may have taken its place.
    """

    def __init__(
        self,
        states: list[StreamState],
        freqs: Tensor,
        transformer_options: dict[str, Any],
        workspace: Workspace,
    ):
        self.workspace = workspace
        self.states, self.freqs, self.transformer_options = states, freqs, transformer_options
        self.layers: set[int] = set()  # that have attended
        self._fused: list[tuple[FusedAttention, tuple[Tensor, ...]]] = []
        for state in states:
            # not a method of this object: a cycle would keep the memory until the garbage is collected
            state.dense_attention = partial(_host_attention, transformer_options)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rotated q, k and v [rows, N, H, D] -> attention output of the same shape; writes the chunk's pages."""
        self.layers.add(layer)
        if len(self.states) == 1:
            return self.states[0].attend(layer, q, k, v)
        rows = zip(*(t.chunk(len(self.states)) for t in (q, k, v)), strict=True)
        return torch.cat([state.attend(layer, *row) for state, row in zip(self.states, rows, strict=True)])

    def attend_projections(
        self, layer: int, qkv: tuple[Tensor, Tensor, Tensor], norms: tuple[Tensor, Tensor]
    ) -> Tensor:
        """`attend` in fused kernels, of projections [rows, N, C] and the norm weights [C] of q and k: [rows, N, C]."""
        self.layers.add(layer)
        if not self._fused:
            cos, sin = (self.freqs[0, :, 0, :, row, 0].contiguous() for row in (0, 1))
            self._rope = cos, sin
            for state in self.states:
                attention = FusedAttention(state)
                self._fused.append((attention, attention.tables(qkv[0].device)))
        rows = zip(*(t.chunk(len(self.states)) for t in qkv), strict=True)
        parts = []
        with self.workspace:
            for (attention, tables), (q, k, v) in zip(self._fused, rows, strict=True):
                out = attention.attend(layer, Projections(q, k, v, *norms, *self._rope), tables)
                parts.append(out if len(self.states) == 1 else out.clone())  # the next one's takes its place
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _host_attention(transformer_options: dict[str, Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = q.shape[2]
    flat = (t.flatten(2) for t in (q, k, v))
    out = optimized_attention(*flat, heads=heads, transformer_options=transformer_options)
    return out.unflatten(2, (heads, -1))
