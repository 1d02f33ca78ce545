"""A fast pass of `WanModel` over one chunk: the same numbers, fewer trips through memory, one launch.

    fast, why = choose_pass(model, memory)         # FastPass, or ComposablePass and the reason
    memory.begin_chunk(frames)
    memory.noisy = True                            # until the clean pass
    flow = fast(x, sigma, cross_kv)                # as often as the sampler wants
    memory.noisy = False
    fast.remember(x0, cross_kv)                    # the clean pass
    memory.end_chunk()

The composable pass, `WanModel.forward` with `StreamState.attend`, stays the definition, and serves models that somebody
has patched. This one holds the block's products apart from what lies between them, which `kernels.fused` does in four
stages a block: norm + RoPE + cache write + pooling, and three times gate + residual + the next branch's norm. On a GPU
the whole pass is captured as a CUDA graph when a kind of chunk is met for the second time: page tables, time and
positions are data that are copied in, so one graph serves every later chunk. What kernels write goes into the buffers
of a workspace, which the first pass of a kind makes (`kernels.workspace`, `graphs`).

For inference: no gradients. Shapes as in `wan` and `state`; L layers, NP persistent and NW window pages of a group.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor

from ..kernels import failed_kernels, fused
from ..kernels.pbsa.constraints import first_line
from ..kernels.workspace import Workspace, active, held
from .fast_weights import FastBlock, FastModel, FastOptions, linear
from .frame_cache import FrameCache
from .fused_attention import (
    ALONE,
    FIRST,
    LATER,
    FusedAttention,
    Kept,
    Projections,
    Reuse,
    best_attention,
    named_range,
)
from .graphs import Graph, Graphs, Prompt, new_pool, record, unusable
from .memory import PagedKV
from .rollout import Denoise
from .state import StreamState
from .wan import (
    PATCH,
    Block,
    CrossAttention,
    Head,
    SelfAttention,
    WanModel,
    frame_timesteps,
    timestep_embedding,
)

logger = logging.getLogger("sparse_forcing.fast")

CrossKV = list[tuple[Tensor, Tensor]]  # of `WanModel.cross_kv`
Text = list[tuple[Tensor, Tensor, Tensor]]  # the same with `fused.distinct_rows`
KNOWN = (
    WanModel, Block, SelfAttention, CrossAttention, Head, torch.nn.Linear, torch.nn.LayerNorm, torch.nn.RMSNorm,
    torch.nn.Conv3d, torch.nn.GELU, torch.nn.SiLU, torch.nn.Sequential, torch.nn.ModuleList,
)  # fmt: skip


class Pass(Protocol):
    """One pass over the chunk that the memory has open: x [B, C, F, H, W], sigma -> flow in x's dtype."""

    def __call__(self, x_BCFHW: Tensor, sigma: float, cross_kv: CrossKV) -> Tensor: ...

    def remember(self, x_BCFHW: Tensor, cross_kv: CrossKV) -> None:
        """The clean pass, for what it writes into the memory."""


@dataclass
class ComposablePass:
    """`WanModel.forward` with `StreamState.attend`, whatever either of them is made of."""

    model: WanModel
    memory: StreamState

    @torch.no_grad()
    def __call__(self, x_BCFHW: Tensor, sigma: float, cross_kv: CrossKV) -> Tensor:
        timesteps = frame_timesteps(sigma, x_BCFHW.shape[0], x_BCFHW.shape[2], x_BCFHW.device)
        return self.model(x_BCFHW, timesteps, cross_kv, self.memory.attend, self.memory.t_start)

    def remember(self, x_BCFHW: Tensor, cross_kv: CrossKV) -> None:
        self(x_BCFHW, 0.0, cross_kv)


def denoiser(run: Pass, cross_kv: CrossKV) -> Denoise:
    """What `rollout.stream` asks for: denoise(x, sigma) -> x0 float32; at sigma 0 that is x, whatever the flow."""

    def denoise(x_BCFHW: Tensor, sigma: float) -> Tensor:
        if sigma == 0:
            run.remember(x_BCFHW, cross_kv)
            return x_BCFHW.float()
        return x_BCFHW.float() - sigma * run(x_BCFHW, sigma, cross_kv).float()

    return denoise


def choose_pass(model: WanModel, memory: StreamState, options: FastOptions | None = None) -> tuple[Pass, str]:
    """The pass for this model and stream, and in words which one it is and why; also logged.

    Raises ValueError where approximate options are asked for and the fast pass cannot serve: they cannot be ignored.
    """
    options = options or FastOptions()
    reason = why_not_fast(model, memory, options)
    if reason is None:
        extras = ", ".join(options.approximate) or "exact"
        said = f"fast pass ({extras}): the model is a plain WanModel"
        chosen: Pass = FastPass(FastModel(model, options), memory)
    elif options.approximate:
        raise ValueError(
            f"{', '.join(options.approximate)} needs the fast pass, which cannot serve: {reason}"
        )
    else:
        said = f"composable pass: {reason}"
        chosen = ComposablePass(model, memory)
    logger.info(said)
    return chosen, said


def why_not_fast(model: WanModel, memory: StreamState, options: FastOptions | None = None) -> str | None:
    """Why the fast pass cannot serve this model and stream, or None."""
    options = options or FastOptions()
    for name, module in model.named_modules():
        if reason := _patched(module):
            return f"{name or 'the model'} {reason}"
    dtypes = {p.dtype for p in model.parameters()}
    if len(dtypes) != 1:
        return f"its weights are of several dtypes: {', '.join(sorted(map(str, dtypes)))}"
    if memory.dtype not in dtypes:
        return f"the memory keeps {memory.dtype}, the model computes in {dtypes.pop()}"
    if (memory.layers, memory.heads, memory.head_dim) != (model.num_layers, model.num_heads, model.head_dim):
        return "the memory was made for a model of other widths"
    return fp8_missing(model.head.head.weight.device) if options.fp8 else None


def fp8_missing(device: torch.device) -> str | None:
    """Why linear layers in 8 bits cannot run on `device`, or None. A CPU computes them in float32, for reference."""
    if device.type == "cpu":
        return None
    if device.type != "cuda" or not hasattr(torch, "_scaled_mm"):
        return f"this PyTorch has no 8-bit product for {device}"
    have = torch.cuda.get_device_capability(device)
    if have < (8, 9):
        return f"8-bit products need compute capability 8.9 or newer, {device} has {have[0]}.{have[1]}"
    return None


def _patched(module: torch.nn.Module) -> str | None:
    """How a module differs from the classes whose arithmetic is known here, or None."""
    if "forward" in vars(module):
        return "has its forward replaced"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has forward hooks"
    if not any(isinstance(module, kind) and type(module).forward is kind.forward for kind in KNOWN):
        return f"is a {type(module).__module__}.{type(module).__name__}, which computes in its own way"
    return None


# --- one stream -------------------------------------------------------------------------------------------------------


@dataclass
class Inputs:
    """All that changes from pass to pass. A CUDA graph has a copy of its own, into which these are written.

    x [B, C, F, H, W]; timestep [B, F] float32; cos, sin [N, D/2] float32; tables: of mode "sparse" current, persistent
    and window slots [L, G, ...], of the other modes the frame slots [F].
    """

    x: Tensor
    timestep: Tensor
    cos: Tensor
    sin: Tensor
    tables: tuple[Tensor, ...]

    def tensors(self) -> list[Tensor]:
        return [self.x, self.timestep, self.cos, self.sin, *self.tables]

    def clone(self) -> Inputs:
        x, timestep, cos, sin, *tables = (tensor.clone() for tensor in self.tensors())
        return Inputs(x, timestep, cos, sin, tuple(tables))

    def copy_(self, other: Inputs) -> None:
        for mine, theirs in zip(self.tensors(), other.tensors()):
            mine.copy_(theirs)


class FastPass:
    """The fast pass of one stream. `x` must have the frames of the chunk that `memory` has open.

    Nothing in a pass waits for the device. Raises ValueError as `StreamState.attend` does.
    """

    def __init__(self, prepared: FastModel, memory: StreamState):
        self.prepared, self.memory = prepared, memory
        self.model, self.options = prepared.model, prepared.options
        self.backend = memory.attention.backend
        self.attention = FusedAttention(memory, self.options)
        self.graphs = Graphs()
        self.workspace = Workspace()
        self._chunk = 0
        self._opened: object = None  # the open chunk's table object: a new one means a new chunk
        self._tables: tuple[Tensor, ...] = ()
        self._rope: tuple[Tensor, Tensor] | None = None
        self._text: tuple[CrossKV, Text] | None = None
        self._kept: dict[tuple, Kept] = {}
        self._over_persistent: dict[int, list[tuple[Tensor, ...] | None]] = {}  # by a chunk's blocks
        self._kept_in_chunk = -1

    def describe(self) -> dict[str, Any]:
        """What is in use, for people."""
        facts: dict[str, Any] = {"options": self.options, "graphs": len(self.graphs.captured)}
        reason = self._why_no_graph()
        return facts | ({"no_graphs": reason} if reason else {})

    @torch.inference_mode(False)  # what is kept for later passes must be writable in any mode
    @torch.no_grad()
    def __call__(self, x_BCFHW: Tensor, sigma: float, cross_kv: CrossKV) -> Tensor:
        return self.at(x_BCFHW, _timestep(x_BCFHW, sigma), cross_kv, sigma == 0)

    @torch.inference_mode(False)
    @torch.no_grad()
    def remember(self, x_BCFHW: Tensor, cross_kv: CrossKV) -> None:
        """The clean pass, which ends where its last layer has written and weighed its pages: the rest makes a flow."""
        self._run(x_BCFHW, _timestep(x_BCFHW, 0.0), cross_kv, clean=True, wanted=False)

    @torch.inference_mode(False)
    @torch.no_grad()
    def at(self, x_BCFHW: Tensor, timestep_BF: Tensor, cross_kv: CrossKV, clean: bool) -> Tensor:
        """The pass at timesteps [B, F] float32 that the device already has; clean: whether they are 0."""
        flow = self._run(x_BCFHW, timestep_BF, cross_kv, clean, wanted=True)
        assert flow is not None
        return flow

    def _run(
        self, x_BCFHW: Tensor, timestep_BF: Tensor, cross_kv: CrossKV, clean: bool, wanted: bool
    ) -> Tensor | None:
        """The flow, or None where it is not wanted."""
        _, _, frames, height, width = x_BCFHW.shape
        self._open(x_BCFHW)
        self.memory.check_pass()
        cos, sin = self._rope_of(frames, height, width, x_BCFHW.device)
        inputs = Inputs(x_BCFHW, timestep_BF, cos, sin, self._tables)
        plan = self._plan()
        reuse = self._reuse(clean or plan is not None, self._tables)
        text = self._text_of(cross_kv)
        shapes = tuple(tuple(t.shape) for t in (*inputs.tensors(), text[0][0]))
        key = (reuse.kind, wanted, shapes, x_BCFHW.dtype, self.attention.extent(), self.memory.stores, plan)
        with nullcontext() if self._why_no_graph() else self.workspace:
            if graph := self._graph_for(key, inputs, text, reuse):
                self._replay(graph, inputs, text)
                flow, shares = graph.flow, graph.shares
            else:
                flow, shares = self._forward(inputs, text, reuse, wanted)
            if flow is not None and active() is not None:
                flow = flow.clone()  # the next pass writes into the same buffer
        if reuse.kind == FIRST:
            self._kept_in_chunk = self._chunk
        if isinstance(self.memory.cache, PagedKV):
            self.memory.cache.shares = list(shares)
        self.memory.wrote(range(self.memory.layers))
        return flow

    # what changes from chunk to chunk

    def _open(self, x: Tensor) -> None:
        memory, cache = self.memory, self.memory.cache
        frames, grid = memory.open_frames, tuple(side // PATCH for side in x.shape[3:])
        if not frames or (x.shape[0], x.shape[2], grid) != (memory.batch, frames, tuple(memory.grid)):
            raise ValueError(
                f"a pass over x of shape {list(x.shape)}, but the open chunk has {frames} frames of "
                f"{memory.grid[0]} x {memory.grid[1]} tokens in a batch of {memory.batch}."
            )
        if cache.current is self._opened:
            return
        self._opened, self._chunk = cache.current, self._chunk + 1
        self._tables = self.attention.tables(x.device)
        self._rope = None

    def _text_of(self, cross_kv: CrossKV) -> Text:
        """The prompt, and how many of its rows differ: counted once for each list that is given, on the device."""
        if self._text is None or self._text[0] is not cross_kv:
            self._text = cross_kv, [(k, v, fused.distinct_rows(k, v)) for k, v in cross_kv]
        return self._text[1]

    def _rope_of(self, frames: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._rope is None:
            self._rope = self.model.rope(self.memory.t_start, frames, height, width, device)
        return self._rope

    def _plan(self) -> tuple | None:
        """What else the last pass of a chunk depends on where it also updates the memory, None in others."""
        cache, memory = self.memory.cache, self.memory
        return cache.plan() if isinstance(cache, PagedKV) and cache.shared and memory.stores else None

    def _reuse(self, clean: bool, tables: tuple[Tensor, ...]) -> Reuse:
        """What the pass shares with others of its chunk; a clean pass, and every pass without such options, nothing."""
        shares = self.options.router_once or self.options.reuse_persistent
        if not shares or clean or not isinstance(self.memory.cache, PagedKV):
            return ALONE
        layers = self.model.num_layers
        key = (self.attention.extent(), *(table.shape for table in tables))
        outputs = self._over_persistent.setdefault(tables[0].shape[-1], [None] * layers)
        kept = self._kept.setdefault(key, Kept([None] * layers, outputs))
        return Reuse(LATER if self._kept_in_chunk == self._chunk else FIRST, kept)

    # the pass

    def _forward(
        self, inputs: Inputs, text: Text, reuse: Reuse, wanted: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """-> flow [B, C, F, H, W] in x's dtype, None unless `wanted`, and each layer's shares (see `PagedKV`)."""
        model, blocks, backend = self.model, self.prepared.blocks, self.backend
        eight = self.options.fp8  # every norm but the head's goes straight into a product
        shares: list[Tensor | None] = [None] * len(blocks)
        with named_range("linear"):
            x = self._embed(inputs.x)
            e = model.time_embedding(timestep_embedding(inputs.timestep, model.freq_dim).to(model.dtype))
            e0 = model.time_projection(e).unflatten(2, (1, 6, -1)).float()
        with named_range("element-wise"):
            mod = held("modulation", self.prepared.modulation + e0).unbind(2)  # L times [B, F, 6, C], float32
            ending = held("modulation.head", model.head.modulation.float() + e[:, :, None].float())
            head_shift, head_scale = ending.unbind(2)
            ends = [(m[:, :, 1], m[:, :, 0]) for m in mod] + [(head_scale, head_shift)]  # scale, shift
            normal = fused.modulated_norm(x, *ends[0], eight_bits=eight, backend=backend)
        for layer, block in enumerate(blocks):
            gates, last = mod[layer], layer + 1 == len(blocks)
            with named_range("linear"):
                q, k, v = block.qkv(normal)
            given = Projections(q, k, v, block.norm_q, block.norm_k, inputs.cos, inputs.sin)
            y, shares[layer] = self.attention(layer, given, inputs.tables, reuse, wanted or not last)
            if y is None:
                return None, shares
            with named_range("linear"):
                y = block.o(y)
            with named_range("element-wise"):
                affine = (p.expand(x.shape[0], 1, -1) for p in block.cross_norm)
                x, normal = fused.gated_residual_norm(
                    x, y, gates[:, :, 2], *affine, plus_one=False, eight_bits=eight, backend=backend
                )
            y = self._cross(block, normal, text[layer])
            with named_range("element-wise"):
                x, normal = fused.gated_residual_norm(
                    x, y, None, gates[:, :, 4], gates[:, :, 3], eight_bits=eight, backend=backend
                )
            with named_range("linear"):
                y = block.ffn(normal)
            with named_range("element-wise"):
                x, normal = fused.gated_residual_norm(
                    x, y, gates[:, :, 5], *ends[layer + 1], eight_bits=eight and not last, backend=backend
                )
        with named_range("linear"):
            patches = model.head.head(normal)
        frames, height, width = (size // p for size, p in zip(inputs.x.shape[2:], (1, PATCH, PATCH)))
        flow = rearrange(
            patches, "b (f h w) (p q c) -> b c f (h p) (w q)", f=frames, h=height, w=width, p=PATCH, q=PATCH
        )
        return held("flow", flow.to(inputs.x.dtype)), shares

    def _embed(self, x_BCFHW: Tensor) -> Tensor:
        """The patch embedding as a product: a convolution without overlap is one."""
        layer = self.model.patch_embedding
        x = rearrange(
            x_BCFHW.to(self.model.dtype), "b c f (h p) (w q) -> b (f h w) (c p q)", p=PATCH, q=PATCH
        )
        return linear(x, layer.weight.flatten(1), layer.bias, "embedding")

    def _cross(
        self, block: FastBlock, normal: Tensor | fused.Rows8, text: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        with named_range("linear"):
            q = block.cross_q(normal)
        with named_range("element-wise"):
            q = fused.rms_norm(q, block.cross_norm_q, dtype=text[0].dtype, backend=self.backend)
        with named_range("attention"), best_attention(q.device):
            y = fused.prompt_attention(
                q.unflatten(2, (self.model.num_heads, -1)), *text, backend=self.backend
            )
        with named_range("linear"):
            return block.cross_o(y.flatten(2))

    # CUDA graphs

    def _why_no_graph(self) -> str | None:
        if not self.options.graphs:
            return "switched off"
        device = self.model.head.head.weight.device
        if device.type != "cuda":
            return f"the model is on {device}"
        if failed := failed_kernels():
            return f"{', '.join(failed)} run without kernels"
        return self.graphs.failure or unusable()

    def _graph_for(self, key: tuple, inputs: Inputs, text: Text, reuse: Reuse) -> Graph | None:
        """The graph for a pass of this key, captured if an earlier chunk had the key; None: run it eagerly.

        The first chunk of a kind is the warm-up: kernels are compiled and tested, libraries choose their plans. A
        growing memory, which never has the same extent twice, so never pays for a capture.
        """
        if self._why_no_graph():
            return None
        cache = self.memory.cache
        if isinstance(cache, FrameCache) and cache.scattered:
            return None  # frames in use are scattered: the host makes their table, only while a memory fills
        if key not in self.graphs.captured:
            if self.graphs.met.setdefault(key, self._chunk) == self._chunk:
                return None
            try:
                self.graphs.captured[key] = self._capture(inputs, text, reuse, wanted=key[1])
            except Exception as error:  # whatever cannot be captured can still be run
                self.graphs.failure = f"capture failed: {type(error).__name__}: {first_line(error)}"
                logger.warning("CUDA graphs are not used: %s", self.graphs.failure)
                return None
        return self.graphs.captured[key]

    def _capture(self, inputs: Inputs, text: Text, reuse: Reuse, wanted: bool) -> Graph:
        own, own_text = inputs.clone(), self._own_prompt(text)
        if self.graphs.pool is None:
            self.graphs.pool = new_pool()
        replay, (flow, shares) = record(lambda: self._forward(own, own_text, reuse, wanted), self.graphs.pool)
        return Graph(own, replay, flow, shares)

    def _replay(self, graph: Graph, inputs: Inputs, text: Text) -> None:
        self._own_prompt(text)
        graph.inputs.copy_(inputs)
        graph.replay()

    def _own_prompt(self, text: Text) -> Text:
        """Where graphs find the prompt's keys and values; copied there when another list is given than last time."""
        shape = tuple(text[0][0].shape)
        held = self.graphs.prompts.get(shape)
        if held is None:
            held = Prompt([(k.clone(), v.clone(), distinct.clone()) for k, v, distinct in text], text)
            self.graphs.prompts[shape] = held
        elif held.source is not text:
            for mine, theirs in zip(held.own, text):
                for a, b in zip(mine, theirs):
                    a.copy_(b)
            held.source = text
        return held.own


def _timestep(x_BCFHW: Tensor, sigma: float) -> Tensor:
    """[B, F] float32."""
    shape = x_BCFHW.shape[0], x_BCFHW.shape[2]
    return torch.full(shape, 1000.0 * sigma, dtype=torch.float32, device=x_BCFHW.device)


# --- what the options cost --------------------------------------------------------------------------------------------


@torch.no_grad()
def option_error(
    model: WanModel,
    new_memory: Callable[[], StreamState],
    options: FastOptions,
    chunks: list[Tensor],
    sigmas: tuple[float, ...],
    cross_kv: CrossKV,
    exact_memory: Callable[[], StreamState] | None = None,
) -> list[float]:
    """How far a stream with `options` is from the exact one: for each chunk, the error of its flows over all passes.

    chunks: given latents [B, C, F, H, W], noised the same for both; sigmas are followed by the clean pass at 0, which
    counts too. exact_memory: of the exact stream, where the memory itself is to be judged, too. -> relative error a
    chunk, norm of the difference over norm of the exact flow. Waits for the device.
    """
    exact = replace(options, fp8=False, router_once=False, reuse_persistent=False)
    streams = []
    for chosen, make in ((exact, exact_memory or new_memory), (options, new_memory)):
        memory = make()
        streams.append((memory, FastPass(FastModel(model, chosen), memory)))
    errors = []
    for x in chunks:
        for memory, _ in streams:
            memory.begin_chunk(x.shape[2])
        off = size = torch.zeros((), device=x.device)
        for sigma in (*sigmas, 0.0):
            for memory, _ in streams:
                memory.noisy = sigma > 0
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
            noised = (1 - sigma) * x + sigma * noise
            truth, found = (run(noised, sigma, cross_kv).float() for _, run in streams)
            off, size = off + (found - truth).square().sum(), size + truth.square().sum()
        for memory, _ in streams:
            memory.end_chunk()
        errors.append(float((off / size).sqrt()))
    return errors
