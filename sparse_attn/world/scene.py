"""What a scene is, how it is sampled, and how it reads as a prompt.

A scene is a textured background and one to three sprites of different colours, each with a shape, a size and a motion.
In a pan scene the sprites stand still while the camera swings away from them and back. Prompts are plain English from a
closed vocabulary; `parse_prompt` is the inverse of `to_prompt` and accepts other words around the same ones.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from dataclasses import dataclass, field

SIZE_PX = 256
FPS = 16

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 22.0, "large": 38.0}  # radius in pixels
COLOURS = {
    "red": (235, 45, 40),
    "orange": (250, 150, 35),
    "yellow": (250, 235, 60),
    "green": (60, 215, 70),
    "cyan": (70, 225, 235),
    "blue": (50, 110, 255),
    "pink": (245, 85, 205),
    "white": (248, 248, 248),
}
BACKGROUNDS = {
    "navy": (40, 48, 105),
    "maroon": (110, 38, 48),
    "forest": (38, 92, 52),
    "brown": (112, 78, 44),
    "slate": (92, 98, 106),
    "plum": (92, 46, 106),
}
TEXTURES = ("plain", "striped", "banded", "checkered", "dotted", "diagonal")
MOTIONS = {
    "right": "moving right",
    "left": "moving left",
    "up": "moving up",
    "down": "moving down",
    "diagonal": "moving diagonally",
    "bounce": "bouncing",
    "orbit": "orbiting",
    "still": "standing still",
}
# Pixels a frame along (x, y); y grows downwards. A diagonal goes right and down.
VELOCITY = {
    "right": (2.0, 0.0),
    "left": (-2.0, 0.0),
    "up": (0.0, -2.0),
    "down": (0.0, 2.0),
    "diagonal": (1.5, 1.5),
}
BOUNCE_SPEED = 3.0  # along each axis; in 5 s every bouncing sprite meets an edge
ORBIT_RADIUS, ORBIT_PERIOD = 56.0, 96  # pixels, frames
PAN_DISTANCE = 300.0  # more than the view: everything leaves it
PAN_REST, PAN_SWING, PAN_HOLD = 8, 28, 8  # frames: rest, out, away, (out again) back, rest
TEXTURE_PERIOD = 64


@dataclass(frozen=True)
class Sprite:
    """One sprite. x, y: centre at frame 0, pixels; sx, sy: signs of a bouncing velocity; phase of an orbit, radians."""

    shape: str
    colour: str
    size: str
    motion: str
    x: float = 128.0
    y: float = 128.0
    sx: int = 1
    sy: int = 1
    phase: float = 0.0


@dataclass(frozen=True)
class Scene:
    """A whole scene.

    pan: "", "left" or "right"; hold: frames the camera stays away; phase_x, phase_y: of the texture, pixels; pan_start:
    frame of the camera's way at which the clip begins.
    """

    sprites: tuple[Sprite, ...]
    background: str
    texture: str
    pan: str = ""
    hold: int = PAN_HOLD
    phase_x: float = 0.0
    phase_y: float = 0.0
    pan_start: int = 0


def pan_cycle(scene: Scene) -> int:
    """Frames after which the camera begins its way again."""
    return 2 * PAN_REST + 2 * PAN_SWING + scene.hold


def to_prompt(scene: Scene) -> str:
    """The scene as English: what is seen and how it moves, not where it starts."""
    parts = [f"a {s.size} {s.colour} {s.shape} {MOTIONS[s.motion]}" for s in scene.sprites]
    text = " and ".join(parts) + f" over a {scene.background} {scene.texture} background"
    return text + (f", the camera pans {scene.pan} and back" if scene.pan else "")


@dataclass
class _Words:
    """Adjectives collected until a shape closes a sprite."""

    size: str = "large"
    colour: str = ""
    sprites: list[dict] = field(default_factory=list)


def parse_prompt(prompt: str) -> Scene:
    """Read a prompt back into a scene (positions at their defaults).

    Raises ValueError naming what is missing: no sprite with a known colour and shape, or no known background.
    """
    words = re.findall(r"[a-z]+", prompt.lower())
    state, background, texture, pan, camera = _Words(), "", "plain", "", False
    for word in words:
        camera = camera or word == "camera"
        if word in SIZES:
            state.size = word
        elif word in COLOURS:
            state.colour = word
        elif word in SHAPES and state.colour:
            state.sprites.append(
                {"shape": word, "colour": state.colour, "size": state.size, "motion": "still"}
            )
            state.size, state.colour = "large", ""
        elif camera and word in ("left", "right"):
            pan = pan or word
        elif word in _MOTION_OF and state.sprites:
            state.sprites[-1]["motion"] = _MOTION_OF[word]
        elif word in BACKGROUNDS:
            background = word
        elif word in TEXTURES:
            texture = word
    if not state.sprites:
        raise ValueError(f"no sprite in {prompt!r}: name a colour {tuple(COLOURS)} and a shape {SHAPES}")
    if not background:
        raise ValueError(f"no background in {prompt!r}: name one of {tuple(BACKGROUNDS)}")
    return Scene(tuple(Sprite(**s) for s in state.sprites[:3]), background, texture, pan)


_MOTION_OF = {"right": "right", "left": "left", "up": "up", "down": "down", "diagonally": "diagonal"}
_MOTION_OF |= {"bouncing": "bounce", "orbiting": "orbit", "still": "still"}

VOCABULARY = tuple(
    sorted(
        {"a", "and", "over", "background", "the", "camera", "pans", "back", "moving", "standing", *_MOTION_OF}
        | {*SHAPES, *SIZES, *COLOURS, *BACKGROUNDS, *TEXTURES}
    )
)


def is_held_out(prompt: str) -> bool:
    """True for the 1 prompt in 16 that training never sees; a fixed function of the text."""
    return hashlib.sha256(prompt.encode()).digest()[0] % 16 == 0


def sample_scene(rng: random.Random, held_out: bool | None = None) -> Scene:
    """Draw a scene; `held_out` True or False restricts it to that side of the prompt split."""
    while True:
        scene = _draw(rng)
        if held_out is None or is_held_out(to_prompt(scene)) == held_out:
            return scene


def _draw(rng: random.Random) -> Scene:
    count = rng.choices((1, 2, 3), (0.45, 0.4, 0.15))[0]
    pan = rng.choice(("left", "right")) if rng.random() < 0.12 else ""
    colours = rng.sample(list(COLOURS), count)
    sprites: list[Sprite] = []
    for colour in colours:
        tries = [_draw_sprite(rng, colour, bool(pan))]
        tries += [place(rng, tries[0]) for _ in range(7)]
        # Of eight starting places keep the one farthest from the sprites already there.
        sprites.append(
            max(tries, key=lambda s: min((math.dist((s.x, s.y), (o.x, o.y)) for o in sprites), default=0))
        )
    return Scene(
        tuple(sprites),
        rng.choice(list(BACKGROUNDS)),
        rng.choice(TEXTURES),
        pan,
        PAN_HOLD,
        rng.uniform(0, TEXTURE_PERIOD),
        rng.uniform(0, TEXTURE_PERIOD),
    )


def _draw_sprite(rng: random.Random, colour: str, still: bool) -> Sprite:
    motion = "still" if still else rng.choice(list(MOTIONS))
    return place(rng, Sprite(rng.choice(SHAPES), colour, rng.choice(list(SIZES)), motion))


def place(rng: random.Random, s: Sprite) -> Sprite:
    """Give a sprite a start from which it stays in view for the first 5 s."""
    r = SIZES[s.size]
    free = (r + 4, SIZE_PX - r - 4)
    start = {-1: (202.0, 212.0), 0: free, 1: (44.0, 54.0)}  # by the sign of the velocity along the axis
    vx, vy = VELOCITY.get(s.motion, (0.0, 0.0))
    x, y = rng.uniform(*start[(vx > 0) - (vx < 0)]), rng.uniform(*start[(vy > 0) - (vy < 0)])
    if s.motion == "diagonal":
        x, y = rng.uniform(44, 84), rng.uniform(44, 84)
    if s.motion == "orbit":
        reach = ORBIT_RADIUS + r
        x, y = rng.uniform(reach, SIZE_PX - reach), rng.uniform(reach, SIZE_PX - reach)
    phase = rng.uniform(0, 2 * math.pi)
    return Sprite(s.shape, s.colour, s.size, s.motion, x, y, rng.choice((-1, 1)), rng.choice((-1, 1)), phase)
