"""Rotary positions of Wan, and how they move when a stream outlives its window.

Wan splits the D/2 rotary pairs of a head over time, height and width ([22, 21, 21] for D = 128); pair i is
(x[2i], x[2i+1]) and turns by position * theta ** (-i / pairs of its axis).

Two policies place the keys in time:
- `absolute`: a key is rotated once, at its latent frame index, as Self-Forcing does.
- `rebased`: equal to `absolute` until the window is full. From then on the current chunk keeps one place at the end of
  the window; whenever the window moves on by n frames, the keys that stay in it are turned back by n (`shift_time`), as
  often as a chunk stays in the window and no more. Blocks promoted to persistent memory, the sink among them, come to
  rest just before the window, at their frame's offset in their chunk, and are never turned again. (Mode "window" counts
  its sink inside the window: it rests at its true place, the front.) So both the temporal distances and the number of
  roundings of a stored key are bounded, whatever the length of the stream.

Angles are computed in float64 on the host and only cosines and sines are rounded to float32: at frame 100,000 a float32
product of position and frequency would already be wrong by 4e-3 rad, this stays below 1e-7.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .rollout import upload


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Rotary pairs of a head for (time, height, width); head_dim 128 -> (22, 21, 21)."""
    if head_dim % 2:
        raise ValueError(f"head_dim {head_dim} is odd: rotary pairs need an even one.")
    pairs = head_dim // 2
    return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3


def rope_table(
    t_start: int, frames: int, height: int, width: int, head_dim: int, device, theta: float = 1e4
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of a chunk's tokens whose first frame stands at `t_start` (latent frames, any integer).

    -> (cos, sin), each float32 [frames * height * width, head_dim / 2], tokens in frame, height, width order.
    """
    starts, sizes = (t_start, 0, 0), (frames, height, width)
    parts = []
    for axis, (start, size, pairs) in enumerate(zip(starts, sizes, axis_pairs(head_dim))):
        shape = [1, 1, 1, pairs]
        shape[axis] = size
        table = _axis_table(start, size, pairs, theta, torch.device(device))
        parts.append(table.view(2, *shape).expand(2, *sizes, pairs))
    cos, sin = torch.cat(parts, dim=-1).flatten(1, 3)
    return cos, sin


def apply_rope(x_BNHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the interleaved pairs of [B, N, H, D] by a table [N, D/2]; computed in float32, returned in x's dtype."""
    return _rotate(x_BNHD, cos[:, None], sin[:, None])


def shift_time(k: Tensor, delta_frames: int, head_dim: int, theta: float = 1e4) -> Tensor:
    """Move rotated keys [..., head_dim] by `delta_frames` in time; same shape and dtype, spatial pairs bit for bit.

    Rotations commute with means over tokens, so pooled keys move the same way.
    """
    pairs = axis_pairs(head_dim)[0]
    cos, sin = _axis_table(delta_frames, 1, pairs, theta, k.device)[:, 0]
    return torch.cat([_rotate(k[..., : 2 * pairs], cos, sin), k[..., 2 * pairs :]], dim=-1)


@lru_cache(maxsize=32)
def _axis_table(start: int, size: int, pairs: int, theta: float, device: torch.device) -> Tensor:
    """[2, size, pairs] float32: cosines and sines along one axis; the exponent 2i / axis_dim is i / pairs.

    Kept: a chunk's passes and layers ask for the same ones.
    """
    with torch.inference_mode(False):  # what is kept must serve training too
        frequencies = theta ** -(torch.arange(pairs, dtype=torch.float64) / max(pairs, 1))
        angles = torch.outer(torch.arange(start, start + size, dtype=torch.float64), frequencies)
        return upload(torch.stack([angles.cos(), angles.sin()]).float(), device)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)
