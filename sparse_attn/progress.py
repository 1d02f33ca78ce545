"""Where a run is, for a terminal and for a log."""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from .pipeline import VideoChunk

CELLS = 24  # of the bar


def size(count: int) -> str:
    """Bytes for people, in the decimal units the field reports memory in."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= step:
            return f"{count / step:.2f} {unit}"
    return f"{count} B"


class Progress:
    """Where the run is: a bar redrawn every pass on a terminal, one line a chunk elsewhere."""

    def __init__(self, chunks: int, output: TextIO):
        self.chunks, self.output, self.live = chunks, output, output.isatty()
        self.done, self.frames, self.seconds = 0, 0, 0.0
        self.tail, self.width = "", 0

    def on_pass(self, chunk: int, index: int, passes: int) -> None:
        done = self.done + (index + 1) / passes
        self._draw(f"chunk {chunk + 1}/{self.chunks}, pass {index + 1}/{passes}", done)

    def on_chunk(self, chunk: VideoChunk) -> None:
        self.done += 1
        self.frames += len(chunk.frames)
        self.seconds += chunk.seconds
        self.tail = f"{self.frames / self.seconds:.1f} FPS, cache {size(chunk.cache_bytes)}"
        text = f"chunk {self.done}/{self.chunks}"
        self._draw(text, self.done)
        if not self.live:
            self._write(f"{text}, {self.tail}\n")

    def finish(self) -> None:
        if self.live:
            self._write("\n")

    def _draw(self, text: str, done: float) -> None:
        if not self.live:
            return
        filled = round(CELLS * done / self.chunks)
        line = f"[{'#' * filled}{'.' * (CELLS - filled)}] {text}, {self.tail or 'warming up'}"
        self._write("\r" + line.ljust(self.width))
        self.width = len(line)

    def _write(self, text: str) -> None:
        self.output.write(text)
        self.output.flush()
