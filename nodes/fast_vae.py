"""The pack's decoder of Wan's VAE in place of ComfyUI's, where the VAE and the device allow it."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_management
import torch
from torch import nn

from ..kernels.pbsa.constraints import TRITON, Call
from ..sparse_attn.fast_vae import DECODER, FastDecoder, bytes_needed, decoder_weights, why_not
from .fast_pass import SPARE_BYTES, changed_by_hand
from .host import PUBLISHED_WIDTH
from .weights import host_weights

logger = logging.getLogger("sparse_forcing.nodes")


def fast_decoder(vae: Any, height: int, width: int) -> FastDecoder | None:
    """A decoder for a stream of `height` x `width` latents; None, with the reason in the log, where there is none.

    It speaks as ComfyUI's decoder does: raw latents in, frames of about -1 to 1 out. Its weights stay what they are
    when it is made.
    """
    if reason := why_not_fast(vae, height, width):
        logger.info("The VAE decodes with ComfyUI's own layers: %s", reason)
        return None
    return take_over(vae)


def take_over(vae: Any) -> FastDecoder:
    """The decoder, unchecked, with weights as ComfyUI's layers would use them now."""
    like = torch.empty(0, device=vae.device, dtype=vae.vae_dtype)
    weights = {
        f"{part}.{name}": weight
        for part in DECODER
        for name, weight in host_weights(getattr(vae.first_stage_model, part), like).items()
    }
    return FastDecoder(weights, vae.device, vae.vae_dtype)


def why_not_fast(vae: Any, height: int, width: int) -> str | None:
    """Why ComfyUI's own decoder has to run, or None."""
    network, device, dtype = vae.first_stage_model, torch.device(vae.device), vae.vae_dtype
    if device.type != "cuda":
        return f"on {device.type} it is as fast"
    if network.decoder.head[0].gamma.shape[0] < PUBLISHED_WIDTH:
        return "it is smaller than Wan's, for whose width alone the convolutions' speed was measured"
    return (
        TRITON.why_not(Call("norm_to_window", device, dtype))
        or why_not(network, device, dtype)
        or _changed(network)
        or _no_room(network, height, width, device, dtype)
    )


def _changed(network: nn.Module) -> str | None:
    """How another node has changed what the decoder's modules compute, or None."""
    for part in DECODER:
        for name, module in getattr(network, part).named_modules(prefix=part):
            if reason := changed_by_hand(module):
                return f"{name} {reason}"
    return None


def _no_room(
    network: nn.Module, height: int, width: int, device: torch.device, dtype: torch.dtype
) -> str | None:
    need = bytes_needed(decoder_weights(network), height, width, dtype)
    free = comfy.model_management.get_free_memory(device)
    if need + SPARE_BYTES <= free:
        return None
    return f"it needs {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
