"""The fast pass in place of the host's own layers, where nobody has changed what they compute.

Guidance, schedules and other nodes' wrappers stay the host's: only a network's forward over one chunk is run by
`sparse_attn.fast`, on the weights as the host would use them, LoRA included (`weights`). Where their 16-bit copies do
not fit into memory, or a layer is another pack's, the linear layers are the host's own, without CUDA graphs. What
changes the arithmetic elsewhere (attention patches, wrappers, hooks) runs on the host's layers altogether. The log says
which is used and why.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import torch
from torch import Tensor, nn

from ..sparse_attn.config import Mode
from ..sparse_attn.fast import CrossKV, FastPass, fp8_missing
from ..sparse_attn.fast_weights import FastModel, FastOptions
from ..sparse_attn.state import StreamState
from .weights import LINEAR, build_model, host_weights, linear_layers, outside, readable, unready_bytes

logger = logging.getLogger("sparse_forcing.nodes")

DEVICES = ("cuda",)  # elsewhere launches cost nothing, and the host's layers are as fast
# where layers may come from
KNOWN = ("torch.nn.", "comfy.ops", "comfy.ldm.wan.model", "comfy.ldm.wan.ar_model", "comfy.ldm.flux.layers")
SPARE_BYTES = 2**30  # left free beside a copy of the weights


@dataclass(frozen=True)
class Source:
    """Where a fast pass takes its weights: `layers`, by name, stay the host's own; `why` in words."""

    options: FastOptions
    layers: dict[str, Any]
    why: str


class HostFastPass:
    """The fast passes of one sampling run: one copy or view of the weights, a pass for every state."""

    def __init__(self, network: Any, x: Tensor, source: Source):
        weights = host_weights(network, x, source.layers)
        taken = {tensor.data_ptr() for tensor in weights.values()}
        self.device = x.device
        self.borrowed = [p for p in network.parameters() if type(p.data) is Tensor and p.data_ptr() in taken]
        model = build_model(network, weights, source.layers, x)
        # the host's weights stay as they are: a joint product for q, k and v would hold them twice
        self.model = FastModel(model, replace(source.options, fuse_qkv=False))
        self.passes: dict[Hashable, FastPass] = {}  # by conditioning, as the run's states are
        self.prompts: dict[Hashable, CrossKV] = {}

    def forget_prompts(self) -> None:
        """The conditioning behind a key has changed."""
        self.prompts.clear()

    def still_there(self) -> bool:
        """Whether the host has left the weights where they were: it moves them when others need the memory."""
        return all(p.device == self.device for p in self.borrowed)

    def __call__(
        self, states: list[StreamState], keys: list[Hashable], x: Tensor, timestep: Tensor, context: Tensor
    ) -> Tensor:
        """Flow of the open chunk, like the network's forward: x [rows, C, F, H, W], timestep [rows] or [rows, F],
        context [rows, T, 4096]; the rows of states[i], whose conditioning is keys[i], follow one another."""
        rows = x.shape[0] // len(states)
        timestep = timestep.reshape(x.shape[0], -1).expand(-1, x.shape[2]).float()
        parts = zip(states, keys, x.split(rows), timestep.split(rows), context.split(rows), strict=True)
        return torch.cat([self._flow(*part) for part in parts])

    def _flow(
        self, state: StreamState, key: Hashable, x: Tensor, timestep: Tensor, context: Tensor
    ) -> Tensor:
        if key not in self.prompts:
            with torch.inference_mode(False), torch.no_grad():
                self.prompts[key] = self.model.model.cross_kv(context.clone())
        if key not in self.passes:
            self.passes[key] = FastPass(self.model, state)
        if not state.noisy:  # at sigma 0, where nobody reads a flow
            self.passes[key].remember(x, self.prompts[key])
            return torch.zeros_like(x)
        return self.passes[key].at(x, timestep, self.prompts[key], clean=False)


def fast_pass_for(
    executor: Any, x: Tensor, options: dict[str, Any], mode: Mode, wanted: FastOptions
) -> HostFastPass | None:
    """The fast pass for the network behind `executor`, or None where the host's layers have to do it; logged."""
    reason = why_not_fast(executor, x, options, mode, wanted)
    if reason is not None:
        logger.info("Sparse Forcing runs on the host's own layers: %s.", reason)
        _say_lost(wanted.approximate, "they need its fast pass")
        return None
    source = choose_source(executor.class_obj, x, wanted)
    shortcuts = ", ".join(source.options.approximate)
    how = f", with shortcuts ({shortcuts})" if shortcuts else ""
    logger.info("Sparse Forcing runs its fast pass%s: %s.", how, source.why)
    lost = [name for name in wanted.approximate if name not in source.options.approximate]
    _say_lost(lost, "they need room for 8-bit copies of the weights")
    return HostFastPass(executor.class_obj, x, source)


def _say_lost(shortcuts: list[str], why: str) -> None:
    if shortcuts:
        logger.warning("Sparse Forcing takes no shortcuts (%s): %s.", ", ".join(shortcuts), why)


def why_not_fast(
    executor: Any, x: Tensor, options: dict[str, Any], mode: Mode, wanted: FastOptions
) -> str | None:
    """Why the host's own layers have to run, or None."""
    if x.device.type not in DEVICES:
        return f"on {x.device.type} they are as fast"
    if wanted.fp8 and (reason := fp8_missing(x.device)):
        return reason
    if executor.idx + 1 < len(executor.wrappers):
        return "another node has wrapped the model"
    host = comfy.model_management
    if mode != "sparse" and (host.sage_attention_enabled() or host.flash_attention_enabled()):
        return f"mode {mode} attends with the attention that ComfyUI was started with"
    for patch in ("patches", "patches_replace", "optimized_attention_override", "rope_options"):
        if options.get(patch):
            return f"another node has set {patch}"
    network = executor.class_obj
    for name, module in outside(network, _opaque_layers(network)):
        if reason := _foreign(module):
            return f"{name or 'the model'} {reason}"
    return None


def choose_source(network: Any, x: Tensor, wanted: FastOptions) -> Source:
    """Weights in 16 bits on x's device if memory allows, else the host's own linear layers for those without room."""
    opaque = _opaque_layers(network)
    missing = sum(unready_bytes(module, x) for _, module in outside(network, opaque))
    free = comfy.model_management.get_free_memory(x.device)
    if wanted.fp8:  # a copy of the blocks in 8 bits
        eight = sum(math.prod(p.shape) for p in network.blocks.parameters())
        if opaque or missing + eight + SPARE_BYTES > free:
            return choose_source(network, x, replace(wanted, fp8=False))
    need, have = f"{missing / 1e9:.1f} GB", f"{free / 1e9:.1f} GB"
    called = replace(wanted, graphs=False)
    layers = "ComfyUI's own linear layers, without CUDA graphs"
    if missing and missing + SPARE_BYTES > free:
        why = f"{layers}, as {need} of weights are not ready on {x.device}, and {have} are free for them"
        return Source(called, linear_layers(network), why)
    if opaque:
        name, layer = next(iter(opaque.items()))
        why = f"{layers} for {len(opaque)} of them, as {name} {_kind_of(layer)}"
        return Source(called, opaque, why)
    if missing:
        return Source(wanted, {}, f"{need} of weights were made ready on {x.device}")
    return Source(wanted, {}, "the model is as it was loaded")


def _opaque_layers(network: Any) -> dict[str, Any]:
    """Linear layers that compute in a way of their own, and so are called as they are."""
    return {
        name: module
        for name, module in network.named_modules()
        if LINEAR.search(name) and not changed_by_hand(module) and (not _known(module) or _smooths(module))
    }


def _smooths(module: nn.Module) -> bool:
    """Whether a quantised layer of the host scales its input as well."""
    return getattr(module, "pre_quant_scale", None) is not None


def _known(module: nn.Module) -> bool:
    return type(module).__module__.startswith(KNOWN) or readable(module)


def _kind_of(module: nn.Module) -> str:
    return f"is a {type(module).__module__}.{type(module).__name__}, which computes in its own way"


def _foreign(module: nn.Module) -> str | None:
    """How a module differs from the host's own Wan, or None."""
    return changed_by_hand(module) or (None if _known(module) else _kind_of(module))


def changed_by_hand(module: nn.Module) -> str | None:
    """How another node has changed what a module computes, or None."""
    replaced = vars(module).get("forward")
    if replaced is not None and not hasattr(replaced, "sparse_forcing"):
        return "has its forward replaced"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has forward hooks"
    return None
