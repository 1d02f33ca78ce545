"""The recall test: what left the view must come back as it was, and nothing but the memory can say how.

A standing sprite and a camera that swings to it, away from it, stays away and swings back. The clip begins while the
camera is away, so that the sprite is not in the sink, which every memory keeps. All that is *given*, as the renderer
shows it, to the last chunk before the sprite returns; from there the model goes on by itself, without a prompt: which
sprite it was is nowhere but in the memory. Only textures that show the swing are used (not plain, not bands along it),
and only shapes, colours and sizes that the last frames judge.
"""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from torch import Tensor

from ..world.render import PAN_TORUS, camera_offset, render
from ..world.scene import (
    BACKGROUNDS,
    COLOURS,
    FPS,
    PAN_REST,
    SHAPES,
    SIZE_PX,
    SIZES,
    TEXTURE_PERIOD,
    Scene,
    Sprite,
    pan_cycle,
)

TEXTURES = ("striped", "checkered", "dotted", "diagonal")
PLACE = 84.0  # distance of the sprite from the edge on whose side the camera leaves it behind
CHUNK_LATENTS = 3
FIRST_SEEN = 12  # frame in which the sprite first comes into view; the sink ends with the ninth
JUDGED = 12  # last frames, in which the camera rests again


def recall_scene(rng: random.Random, seconds: float) -> Scene:
    """A scene whose sprite is out of view for `seconds`, between two times in it."""
    pan = rng.choice(("left", "right"))
    x = PLACE if pan == "right" else SIZE_PX - PLACE
    sprite = Sprite(
        rng.choice(SHAPES),
        rng.choice(list(COLOURS)),
        rng.choice(list(SIZES)),
        "still",
        x,
        rng.uniform(60, 196),
    )
    phases = (rng.uniform(0, TEXTURE_PERIOD) for _ in range(2))
    scene = Scene((sprite,), rng.choice(list(BACKGROUNDS)), rng.choice(TEXTURES), pan, 0, *phases)
    away, back = absence(scene)
    hold = max(0, round(seconds * FPS) - (back - away))
    return replace(scene, hold=hold, pan_start=back + hold - FIRST_SEEN)


def absence(scene: Scene) -> tuple[int, int]:
    """The first frame without the sprite after it was seen, and the one in which it returns."""
    (sprite,) = scene.sprites
    frames = torch.arange(3 * pan_cycle(scene), dtype=torch.float32)
    x = (sprite.x - camera_offset(scene, frames) + PAN_TORUS / 2) % PAN_TORUS - PAN_TORUS / 2
    radius = 1.1 * SIZES[sprite.size]  # of the star's tips
    seen = (x >= -radius) & (x <= SIZE_PX - 1 + radius)
    changes = (seen[1:] != seen[:-1]).nonzero().flatten() + 1
    away, back = changes[0 if seen[0] else 1 :][:2].tolist()
    return away, back


def plan(scenes: list[Scene]) -> tuple[int, int]:
    """Latent frames that are given, whole chunks before any of the sprites returns, and those of the whole clip, which
    ends with the camera's rest."""
    returns = min(absence(scene)[1] for scene in scenes)
    given = (1 + (returns - 1) // 4) // CHUNK_LATENTS * CHUNK_LATENTS
    end = max(_rest(scene) for scene in scenes) + 2 * PAN_REST
    return given, -(-(1 + -(-(end - 1) // 4)) // CHUNK_LATENTS) * CHUNK_LATENTS


def given_video(scene: Scene, latents: int, device: str) -> Tensor:
    """The renderer's frames that `latents` latent ones hold, [3, n, 256, 256] in [-1, 1]."""
    return render(scene, 4 * (latents - 1) + 1, device=device)


def judged_span(scenes: list[Scene]) -> tuple[int, int]:
    """The video frames by which all are judged: from the end of the second swing back, while every camera rests."""
    rest = max(_rest(scene) for scene in scenes)
    return rest + 2, rest + 2 + JUDGED


def moments(scene: Scene) -> dict[str, int]:
    """Video frames to look at, by what they show; the first two are given."""
    (away, back), (judged, _) = absence(scene), judged_span([scene])
    return {
        "seen": (FIRST_SEEN + away) // 2,
        "away": (away + back) // 2,
        "coming back": back + 8,
        "back": judged,
    }


def _rest(scene: Scene) -> int:
    """The first frame of the rest after the absence."""
    return 2 * pan_cycle(scene) - PAN_REST - scene.pan_start
