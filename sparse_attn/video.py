"""Video files that grow while a stream runs, and contact sheets.

An MP4 is written in fragments: each fragment is complete in itself, so a run that is stopped, or that dies, leaves a
file that plays up to its last fragment. Every append starts a new fragment; `close` writes the last one.

Shapes: F frames, H W pixels, B batch (one video a file, so 1).
"""

from __future__ import annotations

import logging
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.frame import PictureType
from PIL import Image
from torch import Tensor

logger = logging.getLogger("sparse_forcing.video")

# zerolatency: no frame waits inside the encoder, so what was appended reaches the file with the next fragment.
CODECS: dict[str, dict[str, str]] = {
    "libx264": {"crf": "18", "preset": "veryfast", "tune": "zerolatency"},
    "mpeg4": {"qmin": "2", "qmax": "4"},
}
FRAGMENTED = "frag_keyframe+empty_moov+default_base_moof"
KEYFRAME_SECONDS = 2  # longest distance between keyframes when one append is long


def to_uint8(frames: Tensor | np.ndarray) -> np.ndarray:
    """Frames as uint8 [F, H, W, 3]: taken as they are, or from a decoder's [1, 3, F, H, W] in about [-1, 1].

    Raises ValueError for any other shape or dtype.
    """
    if isinstance(frames, Tensor):
        if frames.ndim == 5 and frames.shape[:2] == (1, 3) and frames.is_floating_point():
            video = frames.detach()[0].permute(1, 2, 3, 0).float()
            frames = ((video.clamp(-1, 1) + 1) * 127.5).round().byte()
        frames = frames.cpu().numpy()
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
        raise ValueError(
            f"frames of shape {list(frames.shape)} and type {frames.dtype} are no video: give uint8 [F, H, W, 3], "
            "or a floating-point tensor [1, 3, F, H, W] in [-1, 1]"
        )
    return frames


class Mp4Writer:
    """Append frames, get an MP4 (H.264, else MPEG-4 part 2). A context manager; `close` may be called twice.

    path: file to write, its folder is made. fps: frames a second. The first append fixes the size. Players need even
    sides in the usual 4:2:0 colour, so an odd side is extended by one repeated row or column.
    Raises ValueError when a later append has another size, or after `close`.
    """

    def __init__(self, path: str | Path, fps: int = 16):
        self.path, self.fps = Path(path), fps
        self.frames = 0
        self.closed = False
        self._size = (0, 0)  # height, width; fixed by the first append
        self._container: Any = None
        self._stream: Any = None

    def __enter__(self) -> Mp4Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, frames: Tensor | np.ndarray) -> None:
        """Encode frames ([F, H, W, 3] uint8 or [1, 3, F, H, W] in [-1, 1]) behind those that are there."""
        if self.closed:
            raise ValueError(f"{self.path} is closed: no frames can be appended")
        video = to_uint8(frames)
        height, width = video.shape[1:3]
        if self._container is None:
            self._open(height, width)
        if (height, width) != self._size:
            old_height, old_width = self._size
            raise ValueError(
                f"{width}x{height} frames cannot follow {old_width}x{old_height} ones in {self.path}"
            )
        video = np.pad(video, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        for index, image in enumerate(video):
            self._encode(np.ascontiguousarray(image), key=index == 0)

    def close(self) -> None:
        """Finish the file. Nothing is written when nothing was appended."""
        if self.closed:
            return
        self.closed = True
        if self._container is None:
            return
        try:
            self._container.mux(self._stream.encode(None))
        finally:
            self._container.close()

    def _open(self, height: int, width: int) -> None:
        codec = next((name for name in CODECS if name in av.codecs_available), None)
        if codec is None:
            raise ValueError(
                f"this PyAV build has none of the encoders {', '.join(CODECS)}: reinstall PyAV (pip: av)"
            )
        logger.info("writing %s, %dx%d at %d fps with %s", self.path, width, height, self.fps, codec)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        options = {"movflags": FRAGMENTED, "flush_packets": "1"}
        self._container = av.open(str(self.path), "w", format="mp4", options=options)
        self._stream = self._container.add_stream(codec, rate=self.fps, options=CODECS[codec])
        self._stream.width, self._stream.height = width + width % 2, height + height % 2
        self._stream.pix_fmt = "yuv420p"
        self._stream.gop_size = KEYFRAME_SECONDS * self.fps
        self._size = height, width

    def _encode(self, image: np.ndarray, key: bool) -> None:
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        frame.pts, frame.time_base = self.frames, Fraction(1, self.fps)
        if key:  # a fragment begins at a keyframe
            frame.pict_type = PictureType.I
        self._container.mux(self._stream.encode(frame))
        self.frames += 1


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
