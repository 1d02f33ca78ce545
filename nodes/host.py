"""What the versions of ComfyUI that the pack runs on do not share, in one place.

A current host gives `io` as it is. An older one (from 0.3.64 on) lacks a few arguments of node schemas, all of which
only explain or tidy a node: they are left out there. Node modules take `io` from here instead of from the host.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import comfy.ldm.wan.vae
import comfy.model_patcher
import comfy.ops
import comfy.sd
import torch
from comfy_api.latest import io
from torch import Tensor

tiny_vae: Any = sys.modules.get("comfy.taesd.taehv")  # of TAEHV's shape; an older host has no loader for it

PUBLISHED_WIDTH = 96  # of Wan 2.1's own VAE


def known(function: Callable, **arguments: Any) -> dict[str, Any]:
    """Those of the arguments that this host's `function` takes."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}


def inference_dtype(base: Any) -> torch.dtype:
    """What the host's base model computes in, whatever its weights are stored as."""
    if hasattr(base, "get_dtype_inference"):
        return base.get_dtype_inference()
    return base.manual_cast_dtype or base.get_dtype()


def reads_comfy_quant() -> bool:
    """Whether the host reads weights in the 8 and 4 bits that ComfyUI itself writes (`comfy_quant`)."""
    return hasattr(comfy.ops, "mixed_precision_ops")


def wan_vae(sd: dict[str, Tensor]) -> Any:
    """The host's VAE of Wan 2.1 weights of any width.

    Older hosts make one of the published width whatever the weights are. There its network is made without memory
    for weights, and one of the right width takes its place.
    """
    network = comfy.ldm.wan.vae.WanVAE
    if known(network, conv_out_channels=3):  # this host reads the width from the weights
        return comfy.sd.VAE(sd=sd)
    shape = {"z_dim": 16, "dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True]}
    with torch.device("meta"):
        vae = comfy.sd.VAE(sd=network(dim=PUBLISHED_WIDTH, **shape).state_dict())
    vae.first_stage_model = network(dim=sd["decoder.head.0.gamma"].shape[0], **shape).eval()
    vae.first_stage_model.load_state_dict(sd)
    vae.first_stage_model.to(vae.vae_dtype)
    offload = vae.patcher.offload_device
    vae.patcher = comfy.model_patcher.ModelPatcher(vae.first_stage_model, vae.device, offload)
    return vae


class OlderIo:
    """The host's `io`, whose schemas and inputs are made without the arguments that it does not know.

    `host` is the namespace or type behind it: `io` itself, then `io.Int`, say, whose `Input` is made.
    """

    def __init__(self, host: Any):
        self._host = host

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._host, name)
        if name in ("Schema", "Input"):
            return lambda *args, **kwargs: found(*args, **known(found, **kwargs))
        if name == "Custom":
            return lambda *args: OlderIo(found(*args))
        return OlderIo(found) if hasattr(found, "Input") else found


if not known(io.Schema, search_aliases=()) or not known(io.Int.Input, advanced=True):
    io = OlderIo(io)
