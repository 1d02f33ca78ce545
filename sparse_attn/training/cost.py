"""What a training step needs, worked out from the models' shapes before any GPU is asked: memory and operations.

Nothing is measured here. Activations are counted by running one and two blocks on torch's "meta" device, where tensors
have shapes but no contents, and adding up what autograd keeps; products are counted the same way. The cache is what
`StreamState` says it is. Attention is counted by its pairs of query and key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..state import StreamState
from ..wan import WanModel
from .dmd_config import DmdTraining

WIDTHS = {
    "1.3B": {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30},
    "14B": {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40},
}
GIB = 2**30


@dataclass(frozen=True)
class Cost:
    """Of one clip of a step. Memory in bytes for one process, by what holds it; operations of a step in which the
    student learns, by part, and of one in which it does not."""

    memory: dict[str, float]
    student_step: dict[str, float]
    critic_step: dict[str, float]

    def hours(self, cfg: DmdTraining, gpus: int, flops_per_second: float) -> float:
        """Of the whole run, at a sustained speed of each GPU."""
        student = -(-cfg.steps // cfg.student_every)
        total = student * sum(self.student_step.values())
        total += (cfg.steps - student) * sum(self.critic_step.values())
        return total * cfg.batch / gpus / flops_per_second / 3600


class _Attended(torch.autograd.Function):
    """What any fused attention keeps for its backward: q, k, v, the output and a log-sum-exp a query and head."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return grad, grad, grad


def _kept_and_flops(widths: dict[str, Any], layers: int, tokens: tuple[int, int, int]) -> tuple[float, float]:
    """Bytes that autograd keeps, and operations of all products, of a forward over frames x height x width tokens."""
    frames, height, width = tokens
    with torch.device("meta"):
        model = WanModel(**(widths | {"num_layers": layers})).bfloat16()
        x = torch.empty(1, 16, frames, 2 * height, 2 * width, dtype=torch.bfloat16)
        rope = tuple(torch.empty(frames * height * width, model.head_dim // 2) for _ in range(2))
        cross_kv = model.cross_kv(torch.empty(1, 512, 4096))
        time = torch.empty(1, frames)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)  # or its number could serve another storage
        return tensor

    alive: list[Tensor] = []
    from torch.utils.flop_counter import FlopCounterMode  # imports triton where there is one

    counter = FlopCounterMode(display=False)
    with saved_tensors_hooks(keep, lambda tensor: tensor), counter:
        model(x, time, cross_kv, lambda _layer, q, k, v: _Attended.apply(q, k, v), rope=rope)
    return float(sum(kept.values())), float(counter.get_total_flops())


def _pass(widths: dict[str, Any], tokens: tuple[int, int, int]) -> tuple[float, float, float]:
    """Of one forward: bytes kept by a block, bytes kept outside of the blocks, operations of all products."""
    (one, f1), (two, f2) = (_kept_and_flops(widths, n, tokens) for n in (1, 2))
    block, flops = two - one, f2 - f1
    return block, one - block, f1 - flops + flops * widths["num_layers"]


def attention_flops(widths: dict[str, Any], pairs: float) -> float:
    """Operations of all layers' attention over `pairs` of query and key tokens (each head has all of them)."""
    return 4 * pairs * widths["dim"] * widths["num_layers"]


def chunk_pairs(cfg: DmdTraining, frame_tokens: int) -> float:
    """Mean pairs of query and key of a pass over a chunk, over the chunks of a clip."""
    a, chunk = cfg.attention, cfg.sampler.chunk_frames
    read = []
    for start in range(0, cfg.frames, chunk):
        if a.mode != "sparse":
            limit = a.window_frames if a.mode == "window" else cfg.frames
            read.append(min(start + chunk, limit))
            continue
        window = min(start + chunk, a.window_frames)
        persistent = min(start + chunk - window, a.persistent_frames)
        read.append(persistent + a.topk_after(start) * window)
    return chunk * sum(read) / len(read) * frame_tokens**2


def cost_of(cfg: DmdTraining, student: str, teacher: str, grid: tuple[int, int], gpus: int = 1) -> Cost:
    """What `cfg` needs with models named in WIDTHS (the critic is as large as the student), for tokens of `grid` a
    frame, split over `gpus` of a node."""
    small, large, chunk = WIDTHS[student], WIDTHS[teacher], cfg.sampler.chunk_frames
    frame_tokens, chunks = grid[0] * grid[1], cfg.frames // chunk
    chunk_block, chunk_rest, chunk_flops = _pass(small, (chunk, *grid))
    clip_block, clip_rest, clip_flops = _pass(small, (cfg.frames, *grid))
    teacher_flops = _pass(large, (cfg.frames, *grid))[2]
    pairs = (cfg.frames * frame_tokens) ** 2
    one_pass = chunk_flops + attention_flops(small, chunk_pairs(cfg, frame_tokens))
    critic = clip_flops + attention_flops(small, pairs * cfg.critic_topk)
    noisy = (len(cfg.sampler.sigmas) + 1) / 2  # passes before the exit, on average
    backward = {False: 3, True: 4}  # in forwards, the forward included
    rollout = {"rollout": chunks * (noisy + 1) * one_pass}
    critic_part = {"critic": backward[cfg.recompute_critic] * critic}
    cleaned = backward[cfg.recompute_student] if cfg.clean_weight else 1
    learning = {
        "score": critic + 2 * (teacher_flops + attention_flops(large, pairs)),
        "replay": chunks * (backward[cfg.recompute_student] + cleaned) * one_pass,
    }
    layers = small["num_layers"]
    activations = [
        _activations(
            chunk_block, chunk_rest, layers, small["dim"] * chunk * frame_tokens, cfg.recompute_student
        ),
        _activations(
            clip_block, clip_rest, layers, small["dim"] * cfg.frames * frame_tokens, cfg.recompute_critic
        ),
    ]
    memory = _weights(small, large, cfg.bf16, gpus) | {
        "cache": cfg.micro_batch * _cache_bytes(cfg, small, grid),
        "activations": cfg.micro_batch * max(activations),  # student and critic take turns
    }
    return Cost(memory, rollout | critic_part | learning, rollout | critic_part)


def _activations(block: float, rest: float, layers: int, width: int, recompute: bool) -> float:
    """Bytes kept by a forward: of all blocks, or of one and every block's input."""
    return rest + (block + layers * 2 * width if recompute else layers * block)


def _weights(small: dict[str, Any], large: dict[str, Any], bf16: bool, gpus: int) -> dict[str, float]:
    with torch.device("meta"):
        counts = [sum(p.numel() for p in WanModel(**w).parameters()) for w in (small, large)]
    return {
        "student, critic": 2 * 16 * counts[0] / gpus,  # weights, gradients and two moments in float32
        "average": 4 * counts[0] / gpus,
        "teacher": (2 if bf16 else 4) * counts[1] / gpus,
        "fused student": (2 if bf16 else 4) * counts[0] if gpus == 1 else 0.0,
    }


def _cache_bytes(cfg: DmdTraining, widths: dict[str, Any], grid: tuple[int, int]) -> float:
    heads = widths["num_heads"]
    state = StreamState(
        layers=widths["num_layers"], heads=heads, head_dim=widths["dim"] // heads, grid=grid, device="meta",
        chunk_frames=cfg.sampler.chunk_frames, attention=cfg.attention, total_frames=cfg.frames,
        dtype=torch.bfloat16 if cfg.bf16 else torch.float32,
    )  # fmt: skip
    return state.nbytes
