"""Self-Forcing's distribution matching, without a graph over the whole clip.

A clip is generated on the real memory, chunk by chunk. Every chunk ends at the exit step: its estimate x0 there is what
the clip shows, and what the clean pass writes into the memory. The loss is .5 |x - (x - g)|^2 with g constant, so its
gradient in x is g itself, known from teacher and critic before any graph exists. So the clip is made first without
autograd (`roll`), then g is found, and then every chunk's exit pass is run once more on the same memory, with autograd,
and goes backward at once (`replay`). Only one chunk's activations ever live, whatever the length; the price is a second
clean pass a chunk, no more than recomputing a checkpointed graph would cost.

In the exit pass the memory's finished chunks are constants. Gradients flow to the queries and to the open chunk's keys
and values, and to nothing written before: `StreamState` sees to it, and the tests compare with a graph that is cut by
hand. Sources: arXiv 2604.21221 (training with the sparse memory), Self-Forcing (exit step, losses), DMD (gradient).

Shapes: clips [B, C, F, H, W] float32; levels sigma [B].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import SamplerConfig
from ..rollout import stream
from ..state import StreamState
from ..wan import Attend, WanModel, frame_timesteps
from .common import CrossKV, backward_prompt, prompt_leaves, shifted, whole_attention

# x [B, C, F, H, W], sigma -> flow float32 of the open chunk on the memory
Flow = Callable[[Tensor, float], Tensor]


@dataclass
class Rollout:
    """Generated chunks: what went into each exit pass, its noise level, and what came out."""

    inputs: list[Tensor]
    sigmas: list[float]
    outputs: list[Tensor]

    @property
    def clip(self) -> Tensor:
        """[B, C, F, H, W]."""
        return torch.cat(self.outputs, dim=2)


def pass_of(model: WanModel, memory: StreamState, cross_kv: CrossKV) -> Flow:
    """The model's own pass, to which autograd can look."""

    def flow(x: Tensor, sigma: float) -> Tensor:
        t = frame_timesteps(sigma, x.shape[0], x.shape[2], x.device)
        return model(x, t, cross_kv, memory.attend, memory.t_start).float()

    return flow


@torch.no_grad()
def roll(
    model: WanModel,
    memory: StreamState,
    rows: Tensor,
    sampler: SamplerConfig,
    shape: tuple[int, int, int, int],
    start: int,
    frames: int,
    seeds: tuple[int, ...],
    flow: Flow | None = None,
) -> Rollout:
    """Generate `frames` latent frames from frame `start` on, whose memory stands there.

    The sampler ends at the exit step. rows [B, 512, C] of text; shape (B, C, H, W); seeds: one a video. flow: a faster
    pass of the same weights under the same text.
    """
    flow, seen = flow or pass_of(model, memory, model.cross_kv(rows)), {}

    def denoise(x: Tensor, sigma: float) -> Tensor:
        if sigma > 0:
            seen["input"] = x
        return x - sigma * flow(x, sigma)

    made = Rollout([], [], [])
    first = start // sampler.chunk_frames
    chunks = stream(
        denoise, memory, sampler, shape=shape, total_frames=start + frames, seed=seeds, start_chunk=first,
        device=rows.device,
    )  # fmt: skip
    for chunk in chunks:
        made.inputs.append(seen["input"])
        made.sigmas.append(sampler.sigmas_of(chunk.index)[-1])
        made.outputs.append(chunk.latent)
    return made


def replay(
    model: WanModel,
    memory: StreamState,
    rows: Tensor,
    made: Rollout,
    gradient: Tensor,
    clean_weight: float = 0.0,
    quick: Flow | None = None,
) -> Tensor:
    """Add to the weights' gradients what `gradient` [B, C, F, H, W], of a loss in `made.clip`, asks of them.

    The memory stands where it stood before `roll`, and afterwards where it stood after it. quick: as `flow` of `roll`,
    for the clean passes that are not trained. Returns the loss of the clean passes (0 where it is left out).
    """
    cross_kv = model.cross_kv(rows)
    leaves = prompt_leaves(cross_kv)
    flow = pass_of(model, memory, leaves)
    total = torch.zeros((), device=rows.device)
    gradients = gradient.split([x.shape[2] for x in made.inputs], dim=2)
    for x, sigma, x0, g in zip(made.inputs, made.sigmas, made.outputs, gradients):
        memory.begin_chunk(x.shape[2])
        (x - sigma * flow(x, sigma)).backward(g)
        if clean_weight > 0:
            loss = clean_weight / len(made.inputs) * clean_loss(flow(x0, 0.0), x0)
            loss.backward()
            total += loss.detach()
        else:
            with torch.no_grad():
                (quick or flow)(x0, 0.0)
        memory.end_chunk()
    backward_prompt(cross_kv, leaves)
    return total


def clean_loss(flow: Tensor, x0: Tensor) -> Tensor:
    """Error of the clean pass's flow. At sigma 0 the input tells nothing of a noise, whose mean is 0, so the best flow
    is -x0. The passes that learn by `gradient` are all noisy; this keeps the one that writes the memory what it was."""
    return (flow + x0).square().mean()


def predict_clip(
    model: WanModel, cross_kv: CrossKV, x_t: Tensor, sigma: Tensor, attend: Attend = whole_attention
) -> tuple[Tensor, Tensor]:
    """Flow and x0 of a clip that teacher or critic sees at once, by default dense: float32, as x_t."""
    t = 1000 * sigma[:, None].expand(-1, x_t.shape[2])
    flow = model(x_t, t, cross_kv, attend).float()
    return flow, x_t - _wide(sigma) * flow


def draw_level(generator: torch.Generator, batch: int) -> Tensor:
    """Noise levels [B] of a score: uniform, warped by shift 5, within [.02, .98]."""
    return shifted(torch.rand(batch, generator=generator)).clamp(0.02, 0.98)


def add_noise(x: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma) x + sigma noise."""
    return (1 - _wide(sigma)) * x + _wide(sigma) * noise


def dmd_gradient(x: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    """DMD's gradient in x: (fake - real) over the mean of |x - real|, a clip at a time."""
    size = (x - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    return ((fake - real) / size).nan_to_num()


def guided(told: Tensor, untold: Tensor, guidance: float) -> Tensor:
    """cond + g (cond - uncond), as Self-Forcing counts it: 3 here is 4 elsewhere."""
    return told + guidance * (told - untold)


def critic_loss(flow: Tensor, x: Tensor, noise: Tensor) -> Tensor:
    """How far the critic's flow is from the one that leads to the student's clip."""
    return (flow - (noise - x)).square().mean()


def _wide(sigma: Tensor) -> Tensor:
    return sigma.view(-1, 1, 1, 1, 1)
