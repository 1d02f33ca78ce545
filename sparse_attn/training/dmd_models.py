"""What a run does to its models: activation checkpointing, products in bfloat16, the moving average."""

from __future__ import annotations

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from ..wan import WanModel
from .parallel import own


def recompute_blocks(model: WanModel) -> None:
    """Activation checkpointing: a block keeps its input alone and runs again in the backward pass.

    On a memory the second run writes the same pages again, of a chunk that is still open.
    """
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def halve_products(model: WanModel, device: str) -> None:
    """Run a model's passes under bfloat16 autocast, one context a pass: a longer one would keep the copies of weights
    that a pass without gradients made, and a later pass with gradients would train those."""
    cast = torch.autocast(torch.device(device).type, torch.bfloat16)
    for name in ("forward", "cross_kv"):
        setattr(model, name, cast(getattr(model, name)))


@torch.no_grad()
def update_average(average: WanModel, model: WanModel, decay: float) -> None:
    """average = decay * average + (1 - decay) * model."""
    for old, new in zip(average.parameters(), model.parameters()):
        own(old).lerp_(own(new), 1 - decay)
