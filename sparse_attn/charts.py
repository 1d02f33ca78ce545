"""Small charts for the nodes: stacked bars and lines, drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

BACKGROUND, TEXT, GRID = (24, 24, 27), (228, 228, 231), (63, 63, 70)
# orange, blue, green, purple, yellow: told apart by colour-blind eyes as well
COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (204, 121, 167), (240, 228, 66))
WIDTH, LEFT, RIGHT, LINE, BAR = 720, 130, 90, 18, 22

Bar = Sequence[tuple[str, float]]  # parts by name


def bar_chart(
    title: str, bars: Mapping[str, Bar], spell: Callable[[float], str], limit: tuple[str, float] | None = None
) -> Image.Image:
    """One stacked bar a row, its sum behind it; `limit` (name, value) is a line across all of them."""
    longest = max([sum(size for _, size in bar) for bar in bars.values()] + ([limit[1]] if limit else []))
    scale = (WIDTH - LEFT - RIGHT) / (longest or 1)
    names = list(dict.fromkeys(name for bar in bars.values() for name, _ in bar))
    top, step = 2 * LINE, BAR + 8
    bottom = top + step * len(bars)
    image, draw, font = _canvas(bottom + 2 * LINE, title)
    for row, (label, bar) in enumerate(bars.items()):
        x, y = float(LEFT), top + row * step
        draw.text((8, y + 4), label, TEXT, font)
        for name, size in bar:
            draw.rectangle((x, y, x + scale * size, y + BAR), COLOURS[names.index(name) % len(COLOURS)])
            x += scale * size
        draw.text((x + 6, y + 4), spell(sum(size for _, size in bar)), TEXT, font)
    if limit is not None:
        x = LEFT + scale * limit[1]
        draw.line((x, top - 6, x, bottom), TEXT)
        draw.text((min(x - 60, WIDTH - 150), top - 20), f"{limit[0]} {spell(limit[1])}", TEXT, font)
    _legend(draw, font, names, bottom + 6)
    return image


def line_chart(title: str, lines: Mapping[str, Sequence[float]], x_name: str, y_name: str) -> Image.Image:
    """Lines over 1, 2, 3, ...; the vertical axis begins at 0."""
    highest = max((value for line in lines.values() for value in line), default=0.0) or 1.0
    count = max((len(line) for line in lines.values()), default=1)
    top, height, left = 2 * LINE + 6, 240, 70
    bottom, right = top + height, WIDTH - 30
    image, draw, font = _canvas(bottom + 4 * LINE, title)
    for value in ticks(highest):
        y = bottom - height * value / highest
        draw.line((left, y, right, y), GRID)
        draw.text((8, y - 6), f"{value:g}", TEXT, font)
    for place in range(count):
        if place % max(1, -(-count // 20)) == 0:
            draw.text((_x(place, count, left, right) - 3, bottom + 4), str(place + 1), TEXT, font)
    for colour, line in zip(COLOURS, lines.values()):
        points = [
            (_x(i, count, left, right), bottom - height * value / highest) for i, value in enumerate(line)
        ]
        draw.line(points, colour, 3, joint="curve")
        for x, y in points:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
    draw.text((8, top - 20), y_name, TEXT, font)
    draw.text((left, bottom + LINE), x_name, TEXT, font)
    _legend(draw, font, list(lines), bottom + 2 * LINE + 6)
    return image


def ticks(highest: float) -> list[float]:
    """Round numbers from 0 to `highest`, five at most."""
    power = 10 ** math.floor(math.log10(highest))
    step = next(s * power for s in (0.2, 0.25, 0.5, 1, 2) if highest / (s * power) < 5)
    return [round(i * step, 12) for i in range(int(highest / step) + 1)]


def _x(place: int, count: int, left: int, right: int) -> float:
    return left + (right - left) * (place + 0.5) / count


def _canvas(height: int, title: str) -> tuple[Image.Image, ImageDraw.ImageDraw, Font]:
    image = Image.new("RGB", (WIDTH, height), BACKGROUND)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default()
    draw.text((8, 4), title, TEXT, font)
    return image, draw, font


def _legend(draw: ImageDraw.ImageDraw, font: Font, names: Sequence[str], y: int) -> None:
    x = 8.0
    for colour, name in zip(COLOURS, names):
        draw.rectangle((x, y + 2, x + 12, y + 12), colour)
        draw.text((x + 18, y + 1), name, TEXT, font)
        x += 34 + draw.textlength(name, font)
