"""How fast a device would be: one layer of the model's shape, with random weights, tried for a moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .estimate import TEXT_TOKENS, Plan, pass_flops
from .positions import rope_table
from .state import StreamState
from .wan import Block

SIDE = 1024  # of the product that tells a device's rate
LIMIT_S = 3.0


def layer_seconds(plan: Plan, device: torch.device, limit_s: float = LIMIT_S) -> float | None:
    """Seconds of one layer's pass over the last chunk; None where trying would take longer than `limit_s`.

    A block of our composable pass over one layer's memory, filled as it is at the end of the run. The weights are
    random and in the plan's dtype: quantised or offloaded ones take longer. None also where the device lacks memory.
    """
    one = replace(plan, shape=replace(plan.shape, layers=1), sides=1)
    if _seconds_to_try(one, device) > limit_s:
        return None
    try:
        with torch.inference_mode():
            state = _filled(one, device)
            return _timed(_layer_pass(one, state, device), device)
    except torch.cuda.OutOfMemoryError:
        return None


def chunk_seconds(plan: Plan, seconds: float) -> float:
    """Seconds of a chunk, not decoded, of which one layer's pass takes `seconds` on one side."""
    return plan.passes * plan.sides * plan.shape.layers * seconds


def _seconds_to_try(one: Plan, device: torch.device) -> float:
    x = torch.randn(SIDE, SIDE, device=device, dtype=one.dtype)
    rate = 2 * SIDE**3 / _timed(lambda: x @ x, device)
    return (
        pass_flops(one) * (_chunks_to_fill(one) + 4) / rate
    )  # filling runs the attention alone, which is less


def _chunks_to_fill(plan: Plan) -> int:
    attention, before = plan.attention, -(-plan.latent_frames // plan.chunk_frames) - 1
    if attention.mode == "dense":
        return before
    held = attention.window_frames + (attention.persistent_frames if attention.mode == "sparse" else 0)
    return min(before, held // plan.chunk_frames)


def _filled(one: Plan, device: torch.device) -> StreamState:
    """The memory before the last chunk, which is open."""
    state = one.state(device)
    keys = _heads(one, device)
    for _ in range(_chunks_to_fill(one)):
        state.begin_chunk(one.chunk_frames)
        state.attend(0, keys, keys, keys)
        state.end_chunk()
    state.begin_chunk(min(one.chunk_frames, one.latent_frames))
    state.noisy = True  # every pass that is timed is followed by another one
    return state


def _heads(plan: Plan, device: torch.device) -> Tensor:
    shape = (plan.batch, plan.chunk_tokens, plan.shape.heads, plan.shape.head_dim)
    return torch.randn(shape, device=device, dtype=plan.dtype)


def _layer_pass(one: Plan, state: StreamState, device: torch.device) -> Callable[[], Tensor]:
    shape, frames = one.shape, one.chunk_frames
    options: Any = {"device": device, "dtype": one.dtype}
    block = Block(shape.dim, shape.ffn_dim, shape.heads, nn).to(**options)
    x = torch.randn(one.batch, one.chunk_tokens, shape.dim, **options)
    e0 = torch.randn(one.batch, frames, 6, shape.dim, **options)
    cross = torch.randn(2, one.batch, TEXT_TOKENS, shape.heads, shape.head_dim, **options).unbind()
    rope = rope_table(state.t_start, frames, *one.grid, shape.head_dim, device)
    return lambda: block(x, e0, rope, cross, 0, state.attend)


def _timed(run: Callable[[], Tensor], device: torch.device, times: int = 3) -> float:
    """The shortest of a few runs, after one that does not count."""

    def once() -> float:
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    once()
    return min(once() for _ in range(times))
