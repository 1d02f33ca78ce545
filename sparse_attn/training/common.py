"""What the trainings share: clock, learning-rate shape, steps as graphs, compiled blocks, optimizer, random scenes."""

from __future__ import annotations

import functools
import logging
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..graphs import new_pool, record
from ..state import sdpa
from ..wan import Block, WanModel, modulate
from ..world.render import render
from ..world.scene import PAN_HOLD, Scene, pan_cycle, sample_scene

log = logging.getLogger("sparse_forcing.training")


class Budget:
    """A run measured in minutes: progress goes from 0 to 1 with the clock, so a run ends when it said it would."""

    def __init__(self, minutes: float, done: float = 0.0):
        self.seconds = minutes * 60
        self.start = time.monotonic() - done * self.seconds

    @property
    def progress(self) -> float:
        return min(1.0, (time.monotonic() - self.start) / self.seconds)


def lr_factor(step: int, progress: float, warmup: int = 150, decay_from: float = 0.6) -> float:
    """Warm up over steps, hold, then fall linearly to zero over the last part of the budget."""
    return min(1.0, (step + 1) / warmup) * min(1.0, max(0.0, (1 - progress) / (1 - decay_from)))


def set_lr(optimizers, factor: float) -> None:
    """Scale the learning rates the optimizers began with; one that is a tensor, as a CUDA graph reads it, in place."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            lr = group.setdefault("base_lr", float(group["lr"])) * factor
            group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else lr


class GraphedStep:
    """A training step on CUDA tensors of fixed shapes as one CUDA graph, captured here and replayed by every call.

    A step of the world model is two thousand small kernels, whose launches take longer than the kernels. `step` must
    not read the device, upload, or decide anything by the host's dice: what it did once is what it does for ever.
    """

    def __init__(self, step: Callable[..., Tensor], *inputs: Tensor):
        self.inputs = [t.clone() for t in inputs]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # compiles, fills caches and makes the optimizers' state
            for _ in range(3):
                step(*self.inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self.replay, self.loss = record(lambda: step(*self.inputs), new_pool())

    def __call__(self, *inputs: Tensor) -> Tensor:
        for ours, given in zip(self.inputs, inputs, strict=True):
            ours.copy_(given)
        self.replay()
        return self.loss.clone()


class BatchedMuon(torch.optim.Optimizer):
    """torch.optim.Muon (Nesterov, adjust_lr_fn="match_rms_adamw") with matrices of one shape orthogonalised together.

    Seventy small matrices one by one cost 49 ms of launches on an H100, half of a training step of the world model.
    """

    def __init__(self, params, lr: float | Tensor, weight_decay: float = 0.01, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]  # no closure is ever given
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), params in shapes.items():
                grads = [p.grad for p in params]
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                history = [self.state[p]["momentum_buffer"] for p in params]
                torch._foreach_lerp_(history, grads, 1 - group["momentum"])
                updates = torch._foreach_lerp(grads, history, group["momentum"])
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                size = 0.2 * max(rows, columns) ** 0.5 * group["lr"]
                steps = orthogonalise(torch.stack(updates)).to(params[0]) * size
                torch._foreach_sub_(params, list(steps))


def orthogonalise(matrices: Tensor) -> Tensor:
    """[n, rows, columns] -> bfloat16 with singular values near 1: five Newton-Schulz steps, Muon's coefficients."""
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


def shifted(u: Tensor) -> Tensor:
    """Uniform numbers to noise levels, warped towards noise by Wan's shift of 5."""
    return 5 * u / (1 + 4 * u)


def whole_attention(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` of frames that all see each other and nothing else."""
    return sdpa(q, k, v)


def compile_blocks(dit: WanModel, backend: str = "inductor") -> None:
    """Compile what stands before and after a block's attention, once for all blocks.

    Attention stays as it is: on a memory it reads lists and changes pages, elsewhere it is one call anyway.
    """

    def before_attention(
        block: Block, x: Tensor, e0: Tensor, rope
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        e = block.adaln(e0)
        return e, block.self_attn.project(modulate(block.norm1(x), e[0], e[1]), rope)

    def after_attention(block: Block, x: Tensor, out: Tensor, e: tuple[Tensor, ...], cross_kv) -> Tensor:
        return block.after_attention(x, block.self_attn.o(out), e, cross_kv)

    enter = torch.compile(before_attention, dynamic=False, backend=backend)
    leave = torch.compile(after_attention, dynamic=False, backend=backend)

    def forward(block: Block, x, e0, rope, cross_kv, layer: int, attend) -> Tensor:
        x = x.contiguous()  # the first block's comes transposed, which would be compiled once more
        e, qkv = enter(block, x, e0, rope)
        return leave(block, x, attend(layer, *qkv).flatten(2), e, cross_kv)

    for block in dit.blocks:
        block.forward = functools.partial(forward, block)


CrossKV = list[tuple[Tensor, Tensor]]


def prompt_leaves(cross_kv: CrossKV) -> CrossKV:
    """Copies of a prompt's keys and values at which the backward of a chunk ends; theirs follows once, after the last
    chunk, by `backward_prompt`."""
    return [(k.detach().requires_grad_(), v.detach().requires_grad_()) for k, v in cross_kv]


def backward_prompt(cross_kv: CrossKV, leaves: CrossKV) -> None:
    """Send on to the weights what all chunks left in the `leaves`."""
    torch.autograd.backward([t for kv in cross_kv for t in kv], [t.grad for kv in leaves for t in kv])


def channels_last(model: nn.Module) -> nn.Module:
    """Lay the 3-D convolutions' weights out as cuDNN's 16-bit ones want them; give them inputs of that layout too."""
    for weight in model.parameters():
        if weight.ndim == 5:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last_3d)
    return model


def mixed_precision(device):
    """bfloat16 arithmetic on a GPU; a CPU stays in float32, where its bfloat16 convolutions would crawl."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")


def training_scenes(
    rng: random.Random, count: int, pans: float = 0.0, longest_hold: int = PAN_HOLD, late: float = 0.0
) -> list[Scene]:
    """Scenes whose prompts are not held out; a share `pans` of them is drawn from those with a camera pan.

    A pan's camera stays away for PAN_HOLD to `longest_hold` frames; a share `late` of these clips begins anywhere on
    its way, so that sprites come into view after the opening.
    """
    scenes = []
    for _ in range(count):
        wanted = rng.random() < pans
        scene = sample_scene(rng, held_out=False)
        while wanted and not scene.pan:
            scene = sample_scene(rng, held_out=False)
        hold = rng.randint(PAN_HOLD, longest_hold) if longest_hold > PAN_HOLD else PAN_HOLD
        scene = replace(scene, hold=hold)
        if late and scene.pan and rng.random() < late:
            scene = replace(scene, pan_start=rng.randrange(pan_cycle(scene)))
        scenes.append(scene)
    return scenes


def render_batch(scenes: list[Scene], frames: int, device, starts: list[int] | None = None) -> Tensor:
    """[B, 3, frames, 256, 256] float32 in [-1, 1]."""
    starts = starts or [0] * len(scenes)
    return torch.stack(
        [render(s, frames, start, device=device) for s, start in zip(scenes, starts, strict=True)]
    )


def render_with_mask(
    scenes: list[Scene], frames: int, device, starts: list[int] | None = None
) -> tuple[Tensor, Tensor]:
    """`render_batch`, and where a sprite shows: [B, 1, frames, 256, 256], 0 or 1."""
    video, empty = (
        render_batch(part, frames, device, starts)
        for part in (scenes, [replace(scene, sprites=()) for scene in scenes])
    )
    return video, ((video - empty).abs().amax(1, keepdim=True) > 0.1).float()


def save_weights(path: Path, weights: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write 16-bit weights (half keeps three more bits than bfloat16, and all values here are small)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = {k: v.detach().to("cpu", torch.float16).contiguous() for k, v in weights.items()}
    save_file(half, path, metadata=metadata)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal to noise ratio in dB of videos in [-1, 1]."""
    error = (a.clamp(-1, 1) - b.clamp(-1, 1)).float().square().mean().item() / 4
    return -10 * torch.tensor(error).clamp(min=1e-12).log10().item()
