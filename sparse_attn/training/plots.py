"""Curves with intervals, heat maps and rows of frames, drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..charts import BACKGROUND, GRID, TEXT, ticks

# told apart by colour-blind eyes as well (Okabe and Ito's, without black)
COLOURS = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (204, 121, 167), (213, 94, 0), (120, 150, 255),
    (200, 200, 200),
)  # fmt: skip
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM, LINE = 760, 400, 60, 200, 40, 50, 16

Curve = Sequence[tuple[float, float, float, float]]  # x, value, low, high


def curve_plot(title: str, curves: Mapping[str, Curve], x_name: str) -> Image.Image:
    """Curves by name, each with a band from low to high; the vertical axis holds 0 and everything finite."""
    image = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    draw, font = ImageDraw.Draw(image, "RGBA"), ImageFont.load_default()
    points = [p for curve in curves.values() for p in curve if all(map(math.isfinite, p))]
    right = max((p[0] for p in points), default=1.0) or 1.0
    top, bottom = max([0.0, *(p[3] for p in points)]), min([0.0, *(p[2] for p in points)])
    top = top if top > bottom else bottom + 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * x / right,
            HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - bottom) / (top - bottom),
        )

    draw.text((8, 8), title, TEXT, font)
    for value in ticks(max(top, -bottom)):
        for y in {value, -value} if bottom <= -value else {value}:
            if y <= top:
                draw.line((*at(0, y), *at(right, y)), GRID)
                draw.text((8, at(0, y)[1] - 6), f"{y:g}", TEXT, font)
    for x in sorted({p[0] for p in points})[:: max(1, len({p[0] for p in points}) // 10)]:
        draw.text((at(x, bottom)[0] - 6, HEIGHT - BOTTOM + 6), f"{x:g}", TEXT, font)
    draw.text((LEFT, HEIGHT - BOTTOM + 24), x_name, TEXT, font)
    for i, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        finite = [p for p in curve if all(map(math.isfinite, p))]
        band = [at(p[0], p[3]) for p in finite] + [at(p[0], p[2]) for p in reversed(finite)]
        if len(finite) > 1:
            draw.polygon(band, (*colour, 40))
            draw.line([at(p[0], p[1]) for p in finite], colour, 2)
        for p in finite if len(finite) < 10 else ():
            x, y = at(p[0], p[1])
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
        draw.rectangle(
            (WIDTH - RIGHT + 12, TOP + LINE * i + 3, WIDTH - RIGHT + 24, TOP + LINE * i + 11), colour
        )
        draw.text((WIDTH - RIGHT + 30, TOP + LINE * i), name, TEXT, font)
    return image


def heat_map(title: str, values: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> Image.Image:
    """Numbers in [0, 1], [rows, columns], as cells from dark to bright with the number in them."""
    cell, left, top = (50, 22), 110, 48
    image = Image.new("RGB", (left + cell[0] * len(columns) + 8, top + cell[1] * len(rows) + 8), BACKGROUND)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default()
    draw.text((8, 6), title, TEXT, font)
    for c, name in enumerate(columns):
        draw.text((left + cell[0] * c + 4, top - 16), name, TEXT, font)
    for r, name in enumerate(rows):
        draw.text((8, top + cell[1] * r + 5), name, TEXT, font)
        for c, value in enumerate(values[r]):
            x, y = left + cell[0] * c, top + cell[1] * r
            colour = tuple(round(a + (b - a) * value) for a, b in zip((30, 20, 70), (250, 220, 60)))
            draw.rectangle((x, y, x + cell[0] - 2, y + cell[1] - 2), colour)
            draw.text((x + 10, y + 5), f"{value:.2f}", (0, 0, 0) if value > 0.55 else TEXT, font)
    return image


def frame_rows(
    columns: Sequence[str], rows: Sequence[tuple[str, Sequence[np.ndarray]]], width: int = 112
) -> Image.Image:
    """Frames uint8 [H, W, 3] in rows with a name each, under the names of the columns."""
    font, gap = ImageFont.load_default(), 3
    left = 16 + max(round(font.getlength(name)) for name, _ in rows)
    height = max(1, round(width * rows[0][1][0].shape[0] / rows[0][1][0].shape[1]))
    size = left + len(columns) * (width + gap) - gap, TOP // 2 + len(rows) * (height + gap) - gap
    image = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(image)
    for i, name in enumerate(columns):
        draw.text((left + i * (width + gap) + 2, 4), name, TEXT, font)
    for j, (name, frames) in enumerate(rows):
        y = TOP // 2 + j * (height + gap)
        draw.text((8, y + height // 2 - 6), name, TEXT, font)
        for i, frame in enumerate(frames):
            picture = Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS)
            image.paste(picture, (left + i * (width + gap), y))
    return image
