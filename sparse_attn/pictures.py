"""Frames as pictures: uint8 arrays, evenly spread picks, contact sheets.

Shapes: F frames, H W pixels.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image
from torch import Tensor


def to_uint8(frames: Tensor | np.ndarray) -> np.ndarray:
    """Frames as uint8 [F, H, W, 3]: taken as they are, or from a decoder's [1, 3, F, H, W] in about [-1, 1].

    Raises ValueError for any other shape or dtype.
    """
    if isinstance(frames, Tensor):
        if frames.ndim == 5 and frames.shape[:2] == (1, 3) and frames.is_floating_point():
            frames = to_bytes(frames)
        frames = frames.cpu().numpy()
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
        raise ValueError(
            f"frames of shape {list(frames.shape)} and type {frames.dtype} are no video: give uint8 [F, H, W, 3], "
            "or a floating-point tensor [1, 3, F, H, W] in [-1, 1]"
        )
    return frames


def to_bytes(video: Tensor) -> Tensor:
    """Convert a decoder's [1, 3, F, H, W] in about [-1, 1] to uint8 [F, H, W, 3], where it is."""
    frames = video.detach()[0].permute(1, 2, 3, 0).float()
    return ((frames.clamp(-1, 1) + 1) * 127.5).round().byte().contiguous()


def spread(total: int, count: int) -> list[int]:
    """`count` indices spread evenly over `total` frames, first and last included (fewer when there are fewer)."""
    if total <= count:
        return list(range(total))
    return [round(i * (total - 1) / max(1, count - 1)) for i in range(count)]


def contact_sheet(
    frames: Tensor | np.ndarray, count: int = 12, columns: int = 4, width: int = 256
) -> Image.Image:
    """One picture of `count` frames spread over a video, row by row, each `width` pixels wide.

    frames: as for `Mp4Writer.append`. Raises ValueError without a frame.
    """
    video = to_uint8(frames)
    if len(video) == 0:
        raise ValueError("no frames, so no contact sheet")
    chosen = [Image.fromarray(video[i]) for i in spread(len(video), count)]
    height = max(1, round(width * chosen[0].height / chosen[0].width))
    columns, gap = min(columns, len(chosen)), 4
    rows = math.ceil(len(chosen) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), (24, 24, 24))
    for i, image in enumerate(chosen):
        place = (i % columns * (width + gap), i // columns * (height + gap))
        sheet.paste(image.resize((width, height), Image.Resampling.LANCZOS), place)
    return sheet
