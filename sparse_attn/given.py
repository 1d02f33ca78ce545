"""The frames that a video begins with: a start image, or a clip to go on from.

The VAE makes one latent frame of the first video frame and one of every four that follow, so of a clip the last 1 + 4k
frames count. What is left out, three at most, lies at its front: the new frames follow its very last one.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps


def usable_frames(frames: int) -> int:
    """How many of the last `frames` video frames make whole latent frames: 1 + 4k of them."""
    return frames - (frames - 1) % 4


def latent_frames_of(frames: int) -> int:
    """Latent frames that a clip of `frames` video frames gives."""
    return (frames + 3) // 4


def read_image(path: Path, width: int, height: int) -> np.ndarray:
    """A picture as uint8 [1, height, width, 3], scaled and cut at its longer sides to that size. Raises ValueError."""
    try:
        with Image.open(path) as image:
            return _fit(ImageOps.exif_transpose(image), width, height)[None]
    except OSError as error:
        raise _unreadable(path, "picture", error) from error


def read_clip(path: Path, width: int, height: int, fps: int) -> np.ndarray:
    """A clip as uint8 [1 + 4k, height, width, 3] at `fps`: its frames fitted as a picture is, and taken, or repeated,
    as they would be on the screen at those times. Up to three frames at the front are left out. Raises ValueError.
    """
    frames: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            rate = container.streams.video[0].average_rate or Fraction(fps)
            for index, frame in enumerate(container.decode(video=0)):
                while len(frames) * rate < (index + 1) * fps:
                    frames.append(_fit(frame.to_image(), width, height))
    except (OSError, IndexError, av.FFmpegError) as error:
        raise _unreadable(path, "video", error) from error
    if not frames:
        raise ValueError(f"{path} holds no frame: give a video of at least one")
    return np.stack(frames[-usable_frames(len(frames)) :])


def _fit(image: Image.Image, width: int, height: int) -> np.ndarray:
    return np.array(ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS))


def _unreadable(path: Path, kind: str, error: Exception) -> ValueError:
    reason = getattr(error, "strerror", None) or "no such format"
    return ValueError(f"{path} cannot be read as a {kind} ({reason}): give another file")
