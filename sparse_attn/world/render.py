"""The renderer: the world's ground truth, exact at any frame and any length.

Everything is a closed-form function of (scene, frame), so a clip may start anywhere and be of any length. Sprites that
move along a line live on a torus a little larger than the view: they leave on one side and come back on the other.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .scene import (
    BACKGROUNDS,
    BOUNCE_SPEED,
    COLOURS,
    MOTIONS,
    ORBIT_PERIOD,
    ORBIT_RADIUS,
    PAN_DISTANCE,
    PAN_REST,
    PAN_SWING,
    SHAPES,
    SIZE_PX,
    SIZES,
    TEXTURE_PERIOD,
    TEXTURES,
    VELOCITY,
    Scene,
    Sprite,
    pan_cycle,
)

MARGIN = 44.0  # how far outside the view the torus reaches: more than the largest sprite
PAN_TORUS = 2 * (SIZE_PX + 2 * MARGIN)
DARK, LIGHT = 0.78, 1.34  # the two tones of a textured background
EDGE = 1.5  # pixels over which an edge fades: no aliasing, easy on the VAE


def camera_offset(scene: Scene, frames: Tensor) -> Tensor:
    """Camera x (pixels) at each frame: rest, swing away, hold, swing back, and again."""
    if not scene.pan:
        return torch.zeros_like(frames)
    t = (frames + scene.pan_start) % pan_cycle(scene)
    out = ((t - PAN_REST) / PAN_SWING).clamp(0, 1)
    back = ((t - PAN_REST - PAN_SWING - scene.hold) / PAN_SWING).clamp(0, 1)
    return (out - back) * PAN_DISTANCE * (1 if scene.pan == "right" else -1)


def triangle_wave(x: Tensor, low: float, high: float) -> Tensor:
    """Reflect x into [low, high]."""
    span = high - low
    return high - ((x - low) % (2 * span) - span).abs()


def sprite_centre(sprite: Sprite, frames: Tensor) -> tuple[Tensor, Tensor]:
    """World position of a sprite's centre at each frame (before the torus is applied)."""
    if sprite.motion == "bounce":
        r = SIZES[sprite.size]
        move = BOUNCE_SPEED * frames
        return (
            triangle_wave(_fold(sprite.x, sprite.sx, r) + move, r, SIZE_PX - r),
            triangle_wave(_fold(sprite.y, sprite.sy, r) + move, r, SIZE_PX - r),
        )
    if sprite.motion == "orbit":
        angle = sprite.phase + 2 * math.pi * frames / ORBIT_PERIOD
        return sprite.x + ORBIT_RADIUS * angle.cos(), sprite.y + ORBIT_RADIUS * angle.sin()
    vx, vy = VELOCITY.get(sprite.motion, (0.0, 0.0))
    return sprite.x + vx * frames, sprite.y + vy * frames


def _fold(start: float, sign: int, r: float) -> float:
    """Phase on the unfolded track at which a triangle wave stands at `start`, going up (+1) or down (-1)."""
    return start if sign > 0 else 2 * (SIZE_PX - r) - start


def shape_distance(shape: str, x: Tensor, y: Tensor, r: float) -> Tensor:
    """Signed distance (pixels, negative inside, near enough at the edge) to a shape of radius r centred at 0."""
    if shape == "circle":
        return torch.hypot(x, y) - 0.92 * r
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.84 * r
    if shape == "triangle":
        side = (x.abs() - 0.5 * (y + 0.95 * r)) / math.hypot(1.0, 0.5)
        return torch.maximum(side, y - 0.9 * r)
    if shape == "star":
        angle = torch.atan2(x, -y)
        sector = (angle + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5
        rho = torch.hypot(x, y)
        px, py = rho * sector.cos(), rho * sector.sin().abs()
        tip, dent = 1.08 * r, 0.46 * r
        ex, ey = dent * math.cos(math.pi / 5) - tip, dent * math.sin(math.pi / 5)
        length = math.hypot(ex, ey)
        return ((px - tip) * ey - py * ex) / length
    if shape == "cross":
        arm, wide = 0.98 * r, 0.34 * r
        ax, ay = x.abs(), y.abs()
        return torch.minimum(torch.maximum(ax - arm, ay - wide), torch.maximum(ax - wide, ay - arm))
    assert shape == "ring", shape
    return (torch.hypot(x, y) - 0.74 * r).abs() - 0.24 * r


def texture_value(texture: str, x: Tensor, y: Tensor) -> Tensor:
    """Tone in [0, 1] at world position (x, y), period TEXTURE_PERIOD along both axes."""
    k = 2 * math.pi / TEXTURE_PERIOD
    wave = {
        "plain": lambda: torch.zeros_like(x + y),
        "striped": lambda: torch.sin(k * x) + 0 * y,
        "banded": lambda: torch.sin(k * y) + 0 * x,
        "checkered": lambda: torch.sin(k * x) * torch.sin(k * y) * 1.6,
        "dotted": lambda: torch.cos(k * x) + torch.cos(k * y) - 0.7,
        "diagonal": lambda: torch.sin(k * (x + y)),
    }[texture]()
    return 0.5 + 0.5 * torch.tanh(3.0 * wave)


def render(
    scene: Scene, frames: int, start: int = 0, size: tuple[int, int] = (SIZE_PX, SIZE_PX), device="cpu"
) -> Tensor:
    """Video [3, frames, height, width] float32 in [-1, 1]; `size` is (height, width), the view's top left stays put."""
    t = torch.arange(start, start + frames, dtype=torch.float32, device=device)
    rows = torch.arange(size[0], dtype=torch.float32, device=device)[None, :, None]
    cols = torch.arange(size[1], dtype=torch.float32, device=device)[None, None, :]
    world_x = cols + camera_offset(scene, t)[:, None, None]
    tone = texture_value(scene.texture, world_x + scene.phase_x, rows + scene.phase_y)
    video = paint(BACKGROUNDS[scene.background], device) * (DARK + (LIGHT - DARK) * tone)
    video = video.expand(3, frames, *size).clone()
    for sprite in scene.sprites:
        alpha = sprite_alpha(sprite, scene, t, world_x, rows)
        video += alpha * (paint(COLOURS[sprite.colour], device) - video)
    return video.div_(127.5).sub_(1.0)


@functools.cache
def paint(rgb: tuple[int, int, int], device: torch.device | str) -> Tensor:
    """A colour [3, 1, 1, 1], uploaded once: an upload waits for whatever the device still computes."""
    return torch.tensor(rgb, dtype=torch.float32, device=device)[:, None, None, None]


def sprite_alpha(sprite: Sprite, scene: Scene, t: Tensor, world_x: Tensor, rows: Tensor) -> Tensor:
    """Coverage [frames, height, width] of one sprite."""
    cx, cy = (c[:, None, None] for c in sprite_centre(sprite, t))
    torus_x = PAN_TORUS if scene.pan else SIZE_PX + 2 * MARGIN
    torus_y = SIZE_PX + 2 * MARGIN
    dx = (world_x - cx + torus_x / 2) % torus_x - torus_x / 2
    dy = (rows - cy + torus_y / 2) % torus_y - torus_y / 2
    return (0.5 - shape_distance(sprite.shape, dx, dy, SIZES[sprite.size]) / EDGE).clamp_(0, 1)


assert set(MOTIONS) >= set(VELOCITY) and len(SHAPES) >= 6 and len(TEXTURES) >= 5
