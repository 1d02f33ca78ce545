"""ComfyUI's weights for the fast pass: as they lie, as 16-bit copies made once, or behind ComfyUI's own linear layers.

ComfyUI and ComfyUI-GGUF know how a stored weight becomes the one that a layer computes with: scales, dequantisation,
LoRAs that are applied on the fly, memory of the CPU. `host_weights` asks them for it. Where there is no room for
copies, `build_model` leaves the linear layers to the host's own modules, called as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import comfy.ops
import torch
from torch import Tensor, nn

from ..sparse_attn.wan import WanModel
from .host import known

# Where Wan has its linear layers.
LINEAR = re.compile(
    r"(^|\.)(q|k|v|o|ffn\.[02]|text_embedding\.[02]|time_embedding\.[02]|time_projection\.1|head\.head)$"
)
READABLE = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Conv3d)


class HostLinear(nn.Module):
    """One of the host's linear layers in a WanModel: x [B, N, in] -> [B, N, out], however it gets its weights.

    `weight` is empty and tells dtype and device alone, which `WanModel.dtype` asks for. The layer is no submodule, so
    that its parameters stay the host's. inference: whether it was made in inference mode, and is called there.
    """

    def __init__(self, layer: Any, like: Tensor):
        super().__init__()
        self._call = layer.__call__
        self.inference = torch.is_inference_mode_enabled()
        self.weight = torch.empty(0, dtype=like.dtype, device=like.device)

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode(self.inference), torch.no_grad():
            return self._call(x)


def linear_layers(network: Any) -> dict[str, Any]:
    """The network's linear layers by name."""
    return {name: module for name, module in network.named_modules() if LINEAR.search(name)}


def readable(module: nn.Module) -> bool:
    """Whether another pack's layer gives its weights on request, as those of ComfyUI-GGUF do."""
    asks = (getattr(module, name, None) for name in ("cast_bias_weight", "get_weight"))
    return isinstance(module, READABLE) and all(map(callable, asks))


def outside(network: Any, layers: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The network's modules by name, without `layers` and what they consist of."""
    below = tuple(f"{name}." for name in layers)
    for name, module in network.named_modules():
        if name not in layers and not (below and name.startswith(below)):
            yield name, module


def unready_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes that a module's weights take once they are copied to x's device in x's dtype; 0 for what lies ready."""
    return sum(
        math.prod(p.shape) * x.element_size()
        for key, p in module.named_parameters(recurse=False)
        if type(p.data) is not Tensor or p.device != x.device or p.dtype != x.dtype or _changed(module, key)
    )


def _changed(module: nn.Module, key: str) -> bool:
    """Whether the host changes a weight whenever it is used, as for a LoRA where memory is short."""
    return bool(getattr(module, f"{key}_function", None) or getattr(module, f"{key}_lowvram_function", None))


def host_weights(network: Any, x: Tensor, layers: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """The network's weights by name on x's device in x's dtype, as the host's layers would use them in this moment.

    What already is there is shared, not copied; weights in memory that the host reuses at will are copied. layers:
    those whose weights are not asked for.
    """
    found: dict[str, Tensor] = {}
    for name, module in outside(network, layers or {}):
        found |= {f"{name}.{key}".removeprefix("."): tensor for key, tensor in _weights_of(module, x).items()}
    return found


def _weights_of(module: Any, x: Tensor) -> dict[str, Tensor]:
    own = {key: p.data for key, p in module.named_parameters(recurse=False)}
    if not own:
        return {}
    if readable(module):
        said = module.cast_bias_weight(None, dtype=x.dtype, device=x.device, bias_dtype=x.dtype)
        return {key: _plain(tensor, x) for key, tensor in zip(("weight", "bias"), said) if tensor is not None}
    if isinstance(module, comfy.ops.CastWeightBiasOp):
        return _cast(module, own, x)
    return {key: _plain(tensor, x) for key, tensor in own.items()}


def _cast(layer: Any, own: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Weight and bias of one of the host's layers, patched and ready; its own tensors where they are so already."""
    kept = known(comfy.ops.cast_bias_weight, offloadable=True)
    weight, bias, *lent = comfy.ops.cast_bias_weight(layer, None, x.dtype, x.device, x.dtype, **kept)
    used = {}
    for key, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            ready = _plain(tensor, x)
            lasts = _quantised(tensor) or ready.data_ptr() != tensor.data_ptr() or _same(ready, own[key])
            used[key] = ready.data if lasts else ready.clone()
    if lent:
        comfy.ops.uncast_bias_weight(layer, weight, bias, *lent)
    return used


def _plain(tensor: Tensor, x: Tensor) -> Tensor:
    """A tensor of the host's as an ordinary one like x; itself where it is one."""
    if _quantised(tensor):
        tensor = tensor.dequantize()
    if type(tensor) not in (Tensor, nn.Parameter):
        tensor = tensor.as_subclass(Tensor)
    return tensor.to(x)


def _quantised(tensor: Tensor) -> bool:
    return type(tensor).dequantize is not Tensor.dequantize


def _same(tensor: Tensor, own: Tensor) -> bool:
    return not _quantised(own) and tensor.data_ptr() == own.data_ptr()


def build_model(network: Any, weights: dict[str, Tensor], layers: Mapping[str, Any], x: Tensor) -> WanModel:
    """Our backbone of the host's widths over `weights` themselves, with `layers` in place of its linear layers."""
    model = WanModel.without_weights(
        dim=network.dim,
        ffn_dim=network.ffn_dim,
        num_heads=network.num_heads,
        num_layers=len(network.blocks),
        in_dim=weights["patch_embedding.weight"].shape[1],
        out_dim=network.out_dim,
        text_dim=network.text_dim,
        freq_dim=network.freq_dim,
    )
    for name, layer in layers.items():
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, HostLinear(layer, x))
    model.load_state_dict(weights, assign=True)
    return model
