"""Judge a clip from its pixels alone: which sprites, how they move, over what background.

`observe` knows nothing of the prompt. `judge` compares what was observed with a scene. The steps: label each pixel with
the nearest palette colour; follow each sprite colour's blob; name its shape by overlap with area-normalised templates,
sharp and blurred ones, its size by area, its motion by its track; name the background by its mean colour and the energy
of a few spatial frequencies.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .render import DARK, LIGHT, shape_distance, texture_value
from .scene import BACKGROUNDS, COLOURS, SHAPES, SIZES, TEXTURE_PERIOD, TEXTURES, Scene

MIN_AREA = 150  # pixels of a blob that counts as seen; the smallest sprite covers about 500
MIN_SEEN = 0.2  # share of frames in which a colour must be seen to be called a sprite
MIN_STEADY = 0.15  # and in which its blob must be steady; the rests of a camera pan are a fifth of 81 frames
FASTEST = 6.0  # pixels a frame; the fastest sprite makes 4.3, a camera pan 11
TEMPLATE = 40  # side of a normalised shape template
SOFT = 0.136  # deviation of the blur of a soft template, in radii: 3 pixels of a small sprite
REACH = 1.9  # half side of a template in units of sqrt(area / pi)


@dataclass(frozen=True)
class SeenSprite:
    """One sprite as observed. presence: share of frames in view, in the whole clip and in its last eighth."""

    colour: str
    shape: str
    size: str
    motion: str
    presence: float
    late_presence: float


@dataclass(frozen=True)
class Observation:
    sprites: tuple[SeenSprite, ...]
    background: str
    texture: str


@dataclass(frozen=True)
class Verdict:
    """Counts of one clip against its scene; `sprites` is how many there should be."""

    sprites: int
    colour: int
    shape: int
    size: int
    motion: int
    present: int
    extra: int
    background: bool
    texture: bool


@functools.cache
def palette() -> Tensor:
    """RGB [n, 3]: the sprite colours in order, then three tones of each background."""
    tones = (DARK, (DARK + LIGHT) / 2, LIGHT)
    backgrounds = [tuple(c * tone for c in base) for base in BACKGROUNDS.values() for tone in tones]
    return torch.tensor([*COLOURS.values(), *backgrounds], dtype=torch.float32)


def label_pixels(video_FHWC: Tensor) -> Tensor:
    """Index of the nearest palette colour, by a 3x3 majority of each sprite colour: [F, H, W] int8 (-1: background)."""
    rgb = palette().to(video_FHWC.device)
    offset = rgb.square().sum(1) / 2
    labels = []
    for piece in video_FHWC.split(8):
        # |v - c|^2 is smallest where v.c - |c|^2/2 is largest.
        nearest = (piece.float() @ rgb.T - offset).argmax(-1)
        count = len(COLOURS)
        one_hot = F.one_hot(nearest.clamp(max=count), count + 1)[..., :count].permute(0, 3, 1, 2).float()
        share, label = F.avg_pool2d(one_hot, 3, 1, 1).max(1)
        labels.append(torch.where(share > 0.5, label, -1).to(torch.int8))
    return torch.cat(labels)


def observe(video_FHWC: Tensor, labels: Tensor | None = None) -> Observation:
    """Name everything in a clip. video: [F, H, W, 3] uint8 or float in 0..255, at 16 frames a second.

    Most of the time goes into labelling, which runs where the video is unless `labels` brings what `label_pixels` said
    of it; the rest runs on the CPU.
    """
    labels, video_FHWC = (label_pixels(video_FHWC) if labels is None else labels).cpu(), video_FHWC.cpu()
    sprites = [s for i, name in enumerate(COLOURS) if (s := _observe_colour(labels == i, name)) is not None]
    return Observation(tuple(sprites), *_observe_background(video_FHWC.float(), labels))


def _without_edges(mask_FHW: Tensor) -> Tensor:
    """The mask near its solid parts: where two other colours meet, their blend can be a thin line of this one."""
    solid = F.avg_pool2d(mask_FHW[:, None].float(), 7, 4, 3) > 0.8  # a quarter of the resolution is enough
    near = F.max_pool2d(solid.float(), 7, 1, 3)
    return mask_FHW & (F.interpolate(near, size=mask_FHW.shape[1:])[:, 0] > 0)


def _observe_colour(mask_FHW: Tensor, name: str) -> SeenSprite | None:
    if (mask_FHW.sum((1, 2)) > MIN_AREA).float().mean() < MIN_SEEN:
        return None
    mask_FHW = _without_edges(mask_FHW)
    area = mask_FHW.sum((1, 2)).float()
    seen = area > MIN_AREA
    if seen.float().mean() < MIN_SEEN:
        return None
    xs, ys = (torch.arange(n, dtype=torch.float32) for n in (mask_FHW.shape[2], mask_FHW.shape[1]))
    cx = (mask_FHW.sum(1) * xs).sum(1) / area.clamp(min=1)
    cy = (mask_FHW.sum(2) * ys).sum(1) / area.clamp(min=1)
    border = (
        mask_FHW[:, 0].any(1) | mask_FHW[:, -1].any(1) | mask_FHW[:, :, 0].any(1) | mask_FHW[:, :, -1].any(1)
    )
    # Hidden behind another sprite the blob is smaller than usual: such frames say little about shape or place.
    # So does one that a fast pan smeared: compression changes its colours, and with them its area and place.
    steady = _steady(cx, cy, area, seen)
    if steady.float().mean() < MIN_STEADY:
        return None
    whole = seen & ~border & (area > 0.8 * area[steady].quantile(0.8))
    for better in (whole & steady, whole, seen):
        if better.sum() >= 4:
            whole = better
            break
    shape, radius = _name_shape(mask_FHW[whole], cx[whole], cy[whole], area[whole])
    size = min(SIZES, key=lambda s: abs(math.log(SIZES[s] / radius)))
    late = seen[-max(1, len(seen) // 8) :]
    return SeenSprite(
        name,
        shape,
        size,
        _name_motion(cx, cy, whole, seen),
        seen.float().mean().item(),
        late.float().mean().item(),
    )


def _steady(cx: Tensor, cy: Tensor, area: Tensor, seen: Tensor) -> Tensor:
    """Frames whose blob differs little, in place and area, from that of the frame before or after."""
    moved = torch.hypot(cx.diff(), cy.diff())
    grown = (area[1:].clamp(min=1) / area[:-1].clamp(min=1)).log().abs()
    alike = seen[1:] & seen[:-1] & (moved < FASTEST) & (grown < 0.3)
    return F.pad(alike, (0, 1)) | F.pad(alike, (1, 0))


@functools.cache
def templates() -> tuple[Tensor, tuple[float, ...]]:
    """Masks [2, shapes, T, T] of equal area, centred on their centroids, and each shape's area at radius 1.

    Sharp ones, and as compression leaves a small sprite: blurred, so that arms and points are shorter.
    """
    fine = torch.linspace(-1.3, 1.3, 521)
    y, x = torch.meshgrid(fine, fine, indexing="ij")
    inside = torch.stack([(shape_distance(s, x * 100, y * 100, 100.0) < 0).float() for s in SHAPES])
    bell = torch.exp(-(torch.linspace(-3, 3, 2 * round(3 * SOFT * 200) + 1).square()) / 2)
    kernel = (bell / bell.sum())[None, None]
    soft = F.conv2d(inside[:, None], kernel[..., None], padding="same")
    soft = (F.conv2d(soft, kernel[:, :, None], padding="same")[:, 0] > 0.5).float()
    masks = []
    for mask in (*inside, *soft):
        area = mask.mean().item() * 2.6**2
        cx, cy = (mask * x).sum() / mask.sum(), (mask * y).sum() / mask.sum()
        line = torch.linspace(-1, 1, TEMPLATE) * REACH * math.sqrt(area / math.pi)
        gy, gx = torch.meshgrid(line + cy, line + cx, indexing="ij")
        grid = torch.stack([gx, gy], dim=-1)[None] / 1.3
        masks.append(F.grid_sample(mask[None, None], grid, align_corners=True)[0, 0] > 0.5)
    areas = tuple(mask.mean().item() * 2.6**2 for mask in inside)
    return torch.stack(masks).unflatten(0, (2, -1)), areas


def _name_shape(mask_FHW: Tensor, cx: Tensor, cy: Tensor, area: Tensor) -> tuple[str, float]:
    """Shape with the best mean overlap, and the radius its area implies."""
    masks, areas = templates()
    _, h, w = mask_FHW.shape
    half = REACH * (area / math.pi).sqrt()
    line = torch.linspace(-1, 1, TEMPLATE)
    gx = (cx[:, None] + half[:, None] * line) / (w - 1) * 2 - 1
    gy = (cy[:, None] + half[:, None] * line) / (h - 1) * 2 - 1
    grid = torch.stack(torch.broadcast_tensors(gx[:, None, :], gy[:, :, None]), dim=-1)
    crop = F.grid_sample(mask_FHW[:, None].float(), grid, align_corners=True)[:, 0] > 0.5
    both = (crop[:, None, None] & masks).sum((3, 4)).float()
    either = (crop[:, None, None] | masks).sum((3, 4)).float()
    overlap = (both / either.clamp(min=1)).amax(1)  # of the sharp and the soft template
    # The frames in which some shape fits best are the ones to trust.
    trusted = overlap.max(1).values >= overlap.max(1).values.median()
    best = int(overlap[trusted].mean(0).argmax())
    return SHAPES[best], math.sqrt(area.median().item() / areas[best])


def _name_motion(cx: Tensor, cy: Tensor, whole: Tensor, seen: Tensor) -> str:
    """Motion from the track of a centroid; steps of four frames (one latent frame) keep pixel noise small."""
    step = 4
    if _is_pan(cx, cy, whole, seen):
        return "still"
    pair = whole[step:] & whole[:-step]
    v = torch.stack([cx[step:] - cx[:-step], cy[step:] - cy[:-step]], dim=1) / step
    v = v[pair & (v.norm(dim=1) < 12)]  # faster is a jump across the torus
    if len(v) < 3:
        return "still"
    speed, mean = v.norm(dim=1).mean(), v.mean(0)
    if speed < 0.5:
        return "still"
    if mean.norm() / speed > 0.85:
        angle = math.degrees(math.atan2(mean[1], mean[0]))
        named = {"right": 0, "down": 90, "left": 180, "up": -90, "diagonal": 45}
        off = {name: abs((angle - a + 180) % 360 - 180) for name, a in named.items()}
        best = min(off, key=off.__getitem__)
        return best if off[best] < 22.5 else "bounce"
    return "orbit" if _turns(cx, cy, whole) else "bounce"


def _is_pan(cx: Tensor, cy: Tensor, whole: Tensor, seen: Tensor) -> bool:
    """A standing sprite under a camera pan: it rests, is out of view, and rests again where it was, always level. (No
    moving sprite rests. While the camera swings, a compressed blob says too little to be followed.)"""
    at = seen.nonzero().flatten()
    if not (at.diff() > 8).any():
        return False
    away = int(at.diff().argmax())
    rests = whole[1:] & whole[:-1] & (torch.hypot(cx.diff(), cy.diff()) < 1.8)
    index = rests.nonzero().flatten()
    before, after = index[index < at[away]], index[index > at[away]]
    if min(len(before), len(after)) < 2:
        return False
    x0, x1 = cx[before].median(), cx[after].median()
    y0, y1 = cy[before].median(), cy[after].median()
    level = ((cy[whole] - y0).abs() < 8).float().mean() > 0.8
    return bool(level and (x0 - x1).abs() < 6 and (y0 - y1).abs() < 6)


def _turns(cx: Tensor, cy: Tensor, whole: Tensor) -> bool:
    """True where the path keeps turning one way, and evenly (an orbit); a bounce is straight between its corners."""
    step = 8
    p = torch.stack([cx, cy], dim=1)
    a, b = p[step:-step] - p[: -2 * step], p[2 * step :] - p[step:-step]
    ok = whole[step:-step] & whole[: -2 * step] & whole[2 * step :]
    angle = torch.atan2(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0], (a * b).sum(1))[ok]
    if len(angle) == 0:
        return False
    middle = angle.median()
    least = (angle * middle.sign()).quantile(0.25)
    return bool(middle.abs() > math.radians(12) and least > 0.4 * middle.abs())


def _bands(tone_HW: Tensor) -> Tensor:
    """Energy of a tone image at the texture period along x, y and both diagonals: [4]."""
    h, w = tone_HW.shape
    spectrum = torch.fft.fft2(tone_HW - tone_HW.mean()).abs() / (h * w)
    ky, kx = round(h / TEXTURE_PERIOD), round(w / TEXTURE_PERIOD)
    return torch.stack([spectrum[0, kx], spectrum[ky, 0], spectrum[ky, kx], spectrum[-ky, kx]])


@functools.cache
def texture_bands() -> dict[str, Tensor]:
    y, x = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    found = {t: _bands(texture_value(t, x, y)) for t in TEXTURES if t != "plain"}
    return {t: band / band.norm() for t, band in found.items()}


def _observe_background(video_FHWC: Tensor, labels: Tensor) -> tuple[str, str]:
    """Background colour and texture from eight frames, sprites (and their soft edges) left out."""
    pick = torch.linspace(0, len(video_FHWC) - 1, 8).long()
    frames, sprite = video_FHWC[pick], (labels[pick] >= 0).float()
    free = F.max_pool2d(sprite[:, None], 7, 1, 3)[:, 0] == 0
    mean = (frames * free[..., None]).sum((0, 1, 2)) / free.sum().clamp(min=1)
    names, bases = list(BACKGROUNDS), torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32)
    # Compare direction and size apart: a texture's mean tone depends on its fill.
    unit = F.normalize(mean, dim=0)
    background = names[int((F.normalize(bases, dim=1) @ unit).argmax())]
    base = bases[names.index(background)]
    tone = (frames @ (base / base.square().sum()) - DARK) / (LIGHT - DARK)
    tone = torch.where(free, tone, (tone * free).sum() / free.sum().clamp(min=1))
    bands = torch.stack([_bands(t) for t in tone]).mean(0)
    if bands.norm() < 0.06:
        return background, "plain"
    likeness = {t: float(bands / bands.norm() @ b) for t, b in texture_bands().items()}
    return background, max(likeness, key=likeness.__getitem__)


def judge(video_FHWC: Tensor, scene: Scene, labels: Tensor | None = None) -> Verdict:
    """Compare a clip with the scene it should show. A sprite that was not found counts as wrong in everything.
    labels: as `observe` takes them."""
    seen = observe(video_FHWC, labels)
    by_colour = {s.colour: s for s in seen.sprites}
    found = [(want, by_colour[want.colour]) for want in scene.sprites if want.colour in by_colour]
    return Verdict(
        sprites=len(scene.sprites),
        colour=len(found),
        shape=sum(w.shape == s.shape for w, s in found),
        size=sum(w.size == s.size for w, s in found),
        motion=sum(w.motion == s.motion for w, s in found),
        present=sum(s.late_presence > 0.5 for _, s in found),
        extra=len(seen.sprites) - len(found),
        background=seen.background == scene.background,
        texture=seen.texture == scene.texture,
    )


def summarise(verdicts: list[Verdict]) -> dict[str, float]:
    """Rates over clips: per sprite for colour, shape, size, motion, present; per clip for background and extras."""
    total = max(1, sum(v.sprites for v in verdicts))
    rates = {
        k: sum(getattr(v, k) for v in verdicts) / total
        for k in ("colour", "shape", "size", "motion", "present")
    }
    clips = max(1, len(verdicts))
    rates["background"] = sum(v.background and v.texture for v in verdicts) / clips
    rates["extra"] = sum(v.extra for v in verdicts) / clips
    return rates
