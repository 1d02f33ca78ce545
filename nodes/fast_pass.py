"""The fast pass in place of the host's own layers, where nobody has changed what they compute.

Guidance, schedules and other nodes' wrappers stay the host's: only a network's forward over one chunk is run by
`sparse_attn.fast`, on the weights as the host would use them, LoRA included. Whatever it does not know (layers of
other packs, attention patches, quantised layers, weights that the host keeps off the device) runs on the host's layers,
and the log says which is used and why.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.ops
import torch
from torch import Tensor, nn

from ..sparse_attn.config import Mode
from ..sparse_attn.fast import CrossKV, FastPass, fp8_missing
from ..sparse_attn.fast_weights import FastModel, FastOptions
from ..sparse_attn.state import StreamState
from ..sparse_attn.wan import WanModel
from .host import known

logger = logging.getLogger("sparse_forcing.nodes")

DEVICES = ("cuda",)  # elsewhere launches cost nothing, and the host's layers are as fast
# where layers may come from
KNOWN = ("torch.nn.", "comfy.ops", "comfy.ldm.wan.model", "comfy.ldm.wan.ar_model", "comfy.ldm.flux.layers")
SPARE_BYTES = 2**30  # left free beside a copy of the weights


class HostFastPass:
    """The fast passes of one sampling run: one copy or view of the weights, a pass for every state."""

    def __init__(self, network: Any, x: Tensor, options: FastOptions):
        weights = host_weights(network, x)
        self.device = x.device
        self.borrowed = [p for p in network.parameters() if p.device == x.device]
        # the host's weights stay as they are: a joint product for q, k and v would hold them twice
        model = WanModel.from_state_dict(weights, share=True)
        self.model = FastModel(model, replace(options, fuse_qkv=False))
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
    shortcuts = ", ".join(wanted.approximate)
    if reason is not None:
        logger.info("Sparse Forcing runs on the host's own layers: %s.", reason)
        if shortcuts:
            logger.warning("Sparse Forcing takes no shortcuts (%s): they need its fast pass.", shortcuts)
        return None
    how = f", with shortcuts ({shortcuts})" if shortcuts else ""
    logger.info("Sparse Forcing runs its fast pass%s: the model is as it was loaded.", how)
    return HostFastPass(executor.class_obj, x, wanted)


def why_not_fast(
    executor: Any, x: Tensor, options: dict[str, Any], mode: Mode, wanted: FastOptions
) -> str | None:
    """Why the host's own layers have to run, or None."""
    network = executor.class_obj
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
    for name, module in network.named_modules():
        if reason := _foreign(module):
            return f"{name or 'the model'} {reason}"
    missing = sum(
        p.numel() * x.element_size()
        for p in network.parameters()
        if p.device != x.device or p.dtype != x.dtype
    )
    if wanted.fp8:  # a copy of the blocks in 8 bits
        missing += sum(p.numel() for p in network.blocks.parameters())
    free = host.get_free_memory(x.device)
    if missing and missing + SPARE_BYTES > free:
        need, have = f"{missing / 1e9:.1f} GB", f"{free / 1e9:.1f} GB"
        return f"{need} of weights are not ready on {x.device}, and {have} are free for them"
    return None


def _foreign(module: nn.Module) -> str | None:
    """How a module differs from the host's own Wan, or None."""
    kind = type(module)
    replaced = vars(module).get("forward")
    if replaced is not None and not hasattr(replaced, "sparse_forcing"):
        return "has its forward replaced"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has forward hooks"
    if not kind.__module__.startswith(KNOWN):
        return f"is a {kind.__module__}.{kind.__name__}, which computes in its own way"
    if any(type(p.data) is not Tensor for p in module.parameters(recurse=False)):
        return "has quantised weights"
    return None


def host_weights(network: Any, x: Tensor) -> dict[str, Tensor]:
    """The network's weights by name on x's device in x's dtype, as the host's layers would use them in this moment.

    What already is there is shared, not copied; weights in memory that the host reuses at will are copied.
    """
    found: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        own = {key: p.data for key, p in module.named_parameters(recurse=False)}
        cast = isinstance(module, comfy.ops.CastWeightBiasOp) and bool(own)
        used = _cast(module, x) if cast else {key: tensor.to(x) for key, tensor in own.items()}
        found |= {f"{name}.{key}".removeprefix("."): tensor for key, tensor in used.items()}
    return found


def _cast(layer: Any, x: Tensor) -> dict[str, Tensor]:
    """Weight and bias of one of the host's layers, patched and ready; its own tensors where they are so already."""
    kept = known(comfy.ops.cast_bias_weight, offloadable=True)
    weight, bias, *lent = comfy.ops.cast_bias_weight(layer, None, x.dtype, x.device, x.dtype, **kept)
    used = {}
    for key, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            used[key] = tensor.data if tensor.data_ptr() == getattr(layer, key).data_ptr() else tensor.clone()
    if lent:
        comfy.ops.uncast_bias_weight(layer, weight, bias, *lent)
    return used
