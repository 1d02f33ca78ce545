"""What a window of a clip is worth against the scene that it should show. The renderer's own frames score perfectly.

A scene does not say everything: where sprites start and the phase of the texture are the model's to choose. So nothing
is compared pixel by pixel, but by what must hold wherever things are. Windows are uint8 [F, 256, 256, 3], 16 frames a
second; where nothing else is said F is 81, five seconds. Labels are what the checker's `label_pixels` says of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..world.checker import FASTEST, MIN_AREA, judge, observe
from ..world.render import render
from ..world.scene import (
    BACKGROUNDS,
    BOUNCE_SPEED,
    COLOURS,
    ORBIT_PERIOD,
    ORBIT_RADIUS,
    SIZE_PX,
    TEXTURE_PERIOD,
    VELOCITY,
    Scene,
    Sprite,
)

WINDOW = 81  # frames of a judged window
STEP = 4  # frames between which a sprite's way is measured: one latent frame, over which pixel noise is small
CHUNK = 12  # video frames of a chunk of 3 latent ones; the first chunk has 9
ACCURACY = ("colour", "shape", "size", "motion", "background")
DRIFT = ("colour_error", "texture_error")
MOTION = ("speed_error", "dynamic_degree", "flicker")
RECALL = ("recall", "recall_colour", "recall_shape", "recall_size")


def accuracy(window: Tensor, labels: Tensor, scene: Scene) -> dict[str, float]:
    """The checker's rates, each in [0, 1]: of sprites for colour, shape, size and motion."""
    verdict = judge(window, scene, labels)
    rates = {name: getattr(verdict, name) / verdict.sprites for name in ACCURACY[:-1]}
    return rates | {"background": float(verdict.background and verdict.texture)}


def drift(frames: Tensor, labels: Tensor, scene: Scene, at: Sequence[int]) -> tuple[list[float], list[float]]:
    """Errors of the background of each frame; `frames` are those numbered `at` of the clip.

    Colour: distance of mean colours in 0..255; texture: distance of its energies at the texture's period, relative to a
    full texture's. Sprites and their edges are left out of both sides, whatever they are.
    """
    free = F.max_pool2d((labels >= 0).float()[:, None], 7, 1, 3)[:, 0] == 0
    empty = replace(scene, sprites=())
    wanted = torch.cat([render(empty, 1, number) for number in at], dim=1)
    truth = ((wanted + 1) * 127.5).permute(1, 2, 3, 0)
    colours, textures = [], []
    for seen, meant, mask in zip(frames.cpu().float(), truth, free):
        means = [x[mask].mean(0) for x in (seen, meant)]
        colours.append((means[0] - means[1]).norm().item() if mask.any() else math.nan)
        energies = [_energies(x, mask, scene.background) for x in (seen, meant)]
        textures.append((energies[0] - energies[1]).norm().item() / FULL_ENERGY)
    return colours, textures


FULL_ENERGY = 0.169  # of stripes


def _energies(frame_HWC: Tensor, mask: Tensor, background: str) -> Tensor:
    """Energies along x, y and both diagonals at the texture's period [4]: they do not depend on its phase."""
    base = torch.tensor(BACKGROUNDS[background], dtype=torch.float32)
    tone = frame_HWC @ (base / base.square().sum())
    tone = torch.where(mask, tone, tone[mask].mean() if mask.any() else 0.0)
    spectrum = torch.fft.fft2(tone - tone.mean()).abs() / tone.numel()
    ky, kx = (side // TEXTURE_PERIOD for side in tone.shape)
    return torch.stack([spectrum[0, kx], spectrum[ky, 0], spectrum[ky, kx], spectrum[-ky, kx]])


def motion(window: Tensor, labels: Tensor, scene: Scene, start: int = 0) -> dict[str, float]:
    """Speed error (pixels a frame, mean over sprites found), dynamic degree (the share of the sprites that should move
    and do, by at least half of their speed), and flicker. A camera pan moves everything: such scenes have none (nan).

    window: frames of the clip from frame `start` on.
    """
    found = dict.fromkeys(MOTION, math.nan)
    if scene.pan:
        return found
    found["flicker"] = flicker(window, start)
    pairs = [(true_speed(s), _speed(labels == list(COLOURS).index(s.colour))) for s in scene.sprites]
    errors = [abs(seen - meant) for meant, seen in pairs if not math.isnan(seen)]
    if errors:
        found["speed_error"] = sum(errors) / len(errors)
    movers = [seen >= 0.5 * meant for meant, seen in pairs if meant]  # what is not found does not move
    if movers:
        found["dynamic_degree"] = sum(movers) / len(movers)
    return found


def true_speed(sprite: Sprite) -> float:
    """Pixels a frame."""
    if sprite.motion == "bounce":
        return BOUNCE_SPEED * math.sqrt(2)
    if sprite.motion == "orbit":
        return 2 * math.pi * ORBIT_RADIUS / ORBIT_PERIOD
    return math.hypot(*VELOCITY.get(sprite.motion, (0.0, 0.0)))


def _speed(mask_FHW: Tensor) -> float:
    """Median speed of a blob while it is wholly in view; nan where it hardly ever is."""
    area = mask_FHW.sum((1, 2)).float()
    xs = torch.arange(SIZE_PX, dtype=torch.float32)
    cx, cy = ((mask_FHW.sum(axis) * xs).sum(1) / area.clamp(min=1) for axis in (1, 2))
    edge = torch.cat([mask_FHW[:, [0, -1]].flatten(1), mask_FHW[:, :, [0, -1]].flatten(1)], 1).any(1)
    whole = (area > MIN_AREA) & ~edge
    way = torch.hypot(cx[STEP:] - cx[:-STEP], cy[STEP:] - cy[:-STEP]) / STEP
    # Around a corner the way is shorter than the path, and behind another sprite the blob is not all there.
    steady = (area[STEP:] / area[:-STEP].clamp(min=1) - 1).abs() < 0.15
    way = way[whole[STEP:] & whole[:-STEP] & steady & (way < FASTEST)]
    return way.median().item() if len(way) >= STEP else math.nan


def flicker(window: Tensor, start: int = 0) -> float:
    """How much more the picture changes into a chunk's first frame than into the frames around it, 0..255.

    window: frames of the clip from frame `start` on.
    """
    change = (window[1:].float() - window[:-1].float()).abs().mean((1, 2, 3))  # into frame start + 1 + i
    places = [i for i in range(1, len(change) - 1) if (start + 1 + i - 9) % CHUNK == 0 and start + 1 + i >= 9]
    jumps = [change[i] - (change[i - 1] + change[i + 1]) / 2 for i in places]
    return torch.stack(jumps).mean().item() if jumps else math.nan


def recall(window: Tensor, labels: Tensor, scene: Scene) -> dict[str, float]:
    """Whether the scene's one sprite is there again as it was: colour, shape, size, and all three. Any length."""
    (sprite,) = scene.sprites
    seen = {s.colour: s for s in observe(window, labels).sprites}.get(sprite.colour)
    right = {
        "recall_colour": seen is not None,
        "recall_shape": seen is not None and seen.shape == sprite.shape,
        "recall_size": seen is not None and seen.size == sprite.size,
    }
    return {name: float(value) for name, value in ({"recall": all(right.values())} | right).items()}
