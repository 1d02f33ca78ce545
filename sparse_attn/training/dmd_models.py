"""What a run does to its models: activation checkpointing, products in bfloat16, the moving average, and a copy of the
student for the passes that need no gradients."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..fast import FastPass
from ..fast_weights import FastModel, FastOptions
from ..state import StreamState
from ..wan import WanModel
from .dmd import Flow
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


class FusedStudent:
    """A copy of the student in the memory's dtype, run by the fused pass and as CUDA graphs.

    Most passes of a step are of the rollout and need no gradients; under autocast they spend more time on launches,
    casts and element-wise work than on products. plain: a model like the student that nothing has been done to yet.
    """

    def __init__(self, plain: WanModel, memory: StreamState):
        self.model = plain.to(memory.dtype).requires_grad_(False)
        self.prepared = FastModel(self.model, FastOptions())
        self.use_memory(memory)

    def use_memory(self, memory: StreamState) -> None:
        """Run on another memory."""
        self.run = FastPass(self.prepared, memory)

    @torch.no_grad()
    def follow(self, student: WanModel) -> None:
        """Take the student's weights as they are now, where the graphs read them."""
        torch._foreach_copy_(list(self.model.parameters()), list(student.parameters()))
        self.prepared.modulation.copy_(torch.cat([block.modulation for block in student.blocks]))

    def flow(self, rows: Tensor) -> Flow:
        """The pass under text rows [B, 512, C]."""
        with torch.no_grad():
            cross_kv = self.model.cross_kv(rows)
        return lambda x, sigma: self.run(x, sigma, cross_kv).float()
