"""Video files that grow while a stream runs.

An MP4 is written in fragments: each fragment is complete in itself, so a run that is stopped, or that dies, leaves a
file that plays. Every append is encoded on its own, from a keyframe to the last frame, and is in the file when `append`
returns; nothing of it stays in memory. So a file can also be cut behind any append, and gone on with (`resume`).

Shapes: F frames, H W pixels, B batch (one video a file, so 1).
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import struct
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from av.video.frame import PictureType
from torch import Tensor

from .pictures import to_uint8

logger = logging.getLogger("sparse_forcing.video")

# zerolatency: no frames are reordered, so time stamps can be moved by adding to them.
CODECS: dict[str, dict[str, str]] = {
    "libx264": {"crf": "18", "preset": "veryfast", "tune": "zerolatency"},
    "mpeg4": {"qmin": "2", "qmax": "4"},
}
FRAGMENTED = "frag_keyframe+empty_moov+default_base_moof"
COPY_BYTES = 1 << 20  # at once
KEYFRAME_SECONDS = 2  # longest distance between keyframes when one append is long


class Mp4Writer:
    """Append frames, get an MP4 (H.264, else MPEG-4 part 2). A context manager; `close` may be called twice.

    path: file to write, its folder is made. fps: frames a second. The first append fixes the size. Players need even
    sides in the usual 4:2:0 colour, so an odd side is extended by one repeated row or column.
    Raises ValueError when a later append has another size, or after `close`; OSError, with a sentence, where the disk
    takes no more: the file is then what it was before that append.
    """

    def __init__(self, path: str | Path, fps: int = 16):
        self.path, self.fps = Path(path), fps
        self.frames = 0
        self.bytes = 0  # of all that was appended, a complete video
        self.closed = False
        self._size = (0, 0)  # height, width; fixed by the first append
        self._fragments: list[tuple[int, int]] = []  # time stamp and offset of each, for the index at the end
        self._file: io.FileIO | None = None

    def __enter__(self) -> Mp4Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self) -> None:
        """Raise OSError, before any work, where no file can be made in the folder."""
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise OSError(
                f"No video can be written to {folder}: {error.strerror or error}. "
                "Make it writable, or choose another folder."
            ) from error

    def resume(self, source: str | Path, size: int, frames: int, height: int, width: int) -> None:
        """Begin with a copy of another writer's file, as it was when its `bytes` was `size` and `frames` were in it.

        Raises ValueError, and writes nothing, where the file is not there or is no such video.
        """
        assert self._file is None, "before the first append"
        header, _ = self._encode(np.zeros((1, height, width, 3), np.uint8))
        try:
            old = open(source, "rb")  # noqa: SIM115 - `with` follows, apart from the errors that are named here
        except OSError as error:
            raise ValueError(f"{source} cannot be read: {error.strerror or error}") from error
        with old:
            fragments = _fragment_places(old, size, header)
            old.seek(0)
            for begin in range(0, size, COPY_BYTES):
                self._write(old.read(min(COPY_BYTES, size - begin)))
        self._size, self._fragments = (height, width), fragments
        self.frames, self.bytes = frames, size

    def append(self, frames: Tensor | np.ndarray) -> None:
        """Encode frames ([F, H, W, 3] uint8 or [1, 3, F, H, W] in [-1, 1]) behind those that are there."""
        if self.closed:
            raise ValueError(f"{self.path} is closed: no frames can be appended")
        video = to_uint8(frames)
        height, width = video.shape[1:3]
        if self._size not in ((0, 0), (height, width)):
            old_height, old_width = self._size
            raise ValueError(
                f"{width}x{height} frames cannot follow {old_width}x{old_height} ones in {self.path}"
            )
        if len(video) == 0:
            return
        header, fragments = self._encode(video)
        begin = b"" if self.bytes else header
        fragments, places = self._placed(fragments, self.bytes + len(begin), _ticks_a_second(header))
        self._write(begin + fragments)
        self._size = (height, width)
        self._fragments += places
        self.bytes += len(begin) + len(fragments)
        self.frames += len(video)

    def sync(self) -> None:
        """Wait until all that was appended would survive a loss of power."""
        if self._file is not None and not self.closed:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Finish the file. Nothing is left when nothing was appended."""
        if self.closed:
            return
        self.closed = True
        if self._file is None:
            return
        with self._file:
            if self.bytes:
                try:
                    self._write(_index(self._fragments))
                except OSError as error:  # it plays without, only seeking is slower
                    logger.warning("The index of the video is missing: %s", error)
        if not self.bytes:
            self.path.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        """Put `data` at the end of the file; where that fails, cut the file back to `bytes`. OSError."""
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self.path, "wb", buffering=0)  # noqa: SIM115 - `close` does
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            if self._file is not None:
                with contextlib.suppress(OSError):
                    self._file.truncate(self._file.seek(self.bytes))
            raise OSError(
                f"{self.path} cannot be written: {error.strerror or error}. "
                f"The {self.frames} frames before are kept. Make room, or choose another folder."
            ) from error

    def _encode(self, video: np.ndarray) -> tuple[bytes, bytes]:
        """Frames [F, H, W, 3] as (header, fragments) of a video of their own."""
        codec = next((name for name in CODECS if name in av.codecs_available), None)
        if codec is None:
            raise ValueError(
                f"this PyAV build has none of the encoders {', '.join(CODECS)}: reinstall PyAV (pip: av)"
            )
        height, width = video.shape[1:3]
        if self._file is None:
            logger.info("writing %s, %dx%d at %d fps with %s", self.path, width, height, self.fps, codec)
        if height % 2 or width % 2:
            video = np.pad(video, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        out = io.BytesIO()
        with av.open(out, "w", format="mp4", options={"movflags": FRAGMENTED}) as container:
            stream: Any = container.add_stream(codec, rate=self.fps, options=CODECS[codec])
            stream.width, stream.height = width + width % 2, height + height % 2
            stream.pix_fmt = "yuv420p"
            stream.gop_size = KEYFRAME_SECONDS * self.fps
            for index, image in enumerate(video):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, self.fps)
                if index == 0:  # a fragment begins at a keyframe
                    frame.pict_type = PictureType.I
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        data = out.getvalue()
        parts: dict[bytes, list[bytes]] = {}
        for kind, at, size in _boxes(io.BytesIO(data), len(data)):
            group = b"fragments" if kind in (b"moof", b"mdat") else kind
            parts.setdefault(group, []).append(data[at : at + size])
        return b"".join(parts[b"ftyp"] + parts[b"moov"]), b"".join(parts[b"fragments"])

    def _placed(
        self, fragments: bytes, offset: int, ticks_a_second: int
    ) -> tuple[bytes, list[tuple[int, int]]]:
        """The same fragments, numbered and timed to follow those in the file, at `offset`; and their index entries."""
        placed, places = bytearray(fragments), []
        ticks = self.frames * ticks_a_second // self.fps
        for kind, at, size in _boxes(io.BytesIO(fragments), len(fragments)):
            if kind == b"moof":
                number, time = _moof_fields(fragments, at, size)
                (began,) = struct.unpack_from(">Q", placed, time)
                places.append((began + ticks, offset + at))
                struct.pack_into(">I", placed, number, len(self._fragments) + len(places))
                struct.pack_into(">Q", placed, time, began + ticks)
        return bytes(placed), places


# --- MP4 boxes: four bytes of length, four of name (ISO/IEC 14496-12) -----------------------------------------------


def _boxes(file: BinaryIO, stop: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, offset, size) of every box at the top; ValueError where they do not end at `stop`."""
    at = 0
    while at < stop:
        file.seek(at)
        head = file.read(8)
        size, kind = struct.unpack(">I4s", head) if len(head) == 8 else (0, b"")
        if size < 8 or at + size > stop:
            raise ValueError("its parts do not end where the video should be cut")
        yield kind, at, size
        at += size


def _moof_fields(data: bytes, at: int, size: int) -> tuple[int, int]:
    """Where the number and the (64-bit) time stamp of a fragment stand."""
    number, time = (data.find(name, at, at + size) for name in (b"mfhd", b"tfdt"))
    if number < 0 or time < 0 or data[time + 4] != 1:
        raise ValueError("its fragments have no time stamps")
    return number + 8, time + 8


def _ticks_a_second(header: bytes) -> int:
    at = header.index(b"mdhd")
    assert header[at + 4] == 0, "32-bit times: the header's are all 0"
    return struct.unpack_from(">I", header, at + 16)[0]


def _fragment_places(file: BinaryIO, size: int, header: bytes) -> list[tuple[int, int]]:
    """Time stamp and offset of each fragment in the first `size` bytes of a video with that header."""
    if file.read(len(header)) != header:
        raise ValueError("it was written with other settings, or by another encoder")
    if file.seek(0, os.SEEK_END) < size:
        raise ValueError(f"it has {file.tell()} bytes of {size}")
    places = []
    for kind, at, length in _boxes(file, size):
        if kind == b"moof":
            file.seek(at)
            data = file.read(length)
            _, time = _moof_fields(data, 0, length)
            places.append((struct.unpack_from(">Q", data, time)[0], at))
    return places


def _index(fragments: list[tuple[int, int]]) -> bytes:
    """The box at the end by which players find a fragment: movie fragment random access."""
    entries = b"".join(struct.pack(">QQBBB", time, at, 1, 1, 1) for time, at in fragments)
    table = struct.pack(">I4sIIII", 24 + len(entries), b"tfra", 0x01000000, 1, 0, len(fragments)) + entries
    size = 8 + len(table) + 16
    return struct.pack(">I4s", size, b"mfra") + table + struct.pack(">I4sII", 16, b"mfro", 0, size)
