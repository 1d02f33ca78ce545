"""Video files that grow while a stream runs.

An MP4 is written in fragments: each fragment is complete in itself, so a run that is stopped, or that dies, leaves a
file that plays up to its last fragment. Every append starts a new fragment; `close` writes the last one.

Shapes: F frames, H W pixels, B batch (one video a file, so 1).
"""

from __future__ import annotations

import logging
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.frame import PictureType
from torch import Tensor

from .pictures import to_uint8

logger = logging.getLogger("sparse_forcing.video")

# zerolatency: no frame waits inside the encoder, so what was appended reaches the file with the next fragment.
CODECS: dict[str, dict[str, str]] = {
    "libx264": {"crf": "18", "preset": "veryfast", "tune": "zerolatency"},
    "mpeg4": {"qmin": "2", "qmax": "4"},
}
FRAGMENTED = "frag_keyframe+empty_moov+default_base_moof"
KEYFRAME_SECONDS = 2  # longest distance between keyframes when one append is long


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
