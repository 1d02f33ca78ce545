"""What becomes of a chunk whose passes are done: it is decoded, written into the video and shown on the page.

The sampling thread launches the decoder on a CUDA stream of its own and continues with the next chunk. A worker waits
for the frames, encodes and writes them and makes the page's messages (`sparse_attn.frame_queue`). No module of the host
runs in the worker; its interrupts and its progress bar stay on the sampling thread.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import PurePath
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import latent_preview
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..sparse_attn.frame_queue import FrameQueue
from ..sparse_attn.video import Mp4Writer
from .live import LiveRun
from .recovery import reason_of
from .vae_stream import StreamDecoder, TinyStreamDecoder

logger = logging.getLogger("sparse_forcing.nodes")


class Output:
    """The decoder, the file and the page of one run; chunks go through them in order.

    at_once: latent frames that are decoded together. Until `settle`, decoder and writer belong to what was added.
    """

    def __init__(
        self,
        decoder: StreamDecoder | TinyStreamDecoder,
        at_once: int,
        writer: Mp4Writer,
        live: LiveRun,
        progress: comfy.utils.ProgressBar,
    ):
        self.decoder, self.at_once = decoder, at_once
        self.writer, self.live, self.progress = writer, live, progress
        stop_if_asked = comfy.model_management.throw_exception_if_processing_interrupted
        self._queue = FrameQueue(decoder.vae.device, on_wait=stop_if_asked)
        self._preview: np.ndarray | None = None  # a frame that the host was not shown yet

    def restore(self, snapshot: dict[str, Tensor]) -> None:
        """Go on with a decoder's `snapshot`."""
        with self._queue.aside():
            self.decoder.restore(snapshot)

    def snapshot(self) -> dict[str, Tensor]:
        """The decoder's, once all that was added is in the file."""
        self.settle()
        with self._queue.aside():
            return self.decoder.snapshot()

    def write(self, raw: Tensor) -> None:
        """Decode a raw latent [1, 16, F, h, w] into the file."""
        for piece in raw.split(self.at_once, dim=2):
            self._submit(partial(self._decode, piece), self._append)

    def add(self, raw: Callable[[], Tensor], given: bool, place: Tensor, facts: dict[str, Any]) -> None:
        """Decode, write and show a chunk: with its `facts`, and what the memory holds now.

        raw() -> its raw latent [1, 16, F, h, w] float32 on the device, which is copied to `place` before its frames are
        written. given: it was not made, and may be a long clip, which is decoded in pieces.
        """
        tables, read = self.live.gather_memory() or (torch.empty(0), None)
        latents: list[Tensor] = []
        written: list[np.ndarray] = []
        places = place.split(self.at_once, dim=2)

        def decode(index: int) -> tuple[Tensor, ...]:
            if not latents:
                latents.extend(raw().split(self.at_once, dim=2))
            return *self._decode(latents[index]), latents[index], tables

        def use(index: int, frames: Tensor, latent: Tensor, copied: Tensor) -> None:
            places[index].copy_(latent)
            written.append(self._append(frames))
            if index + 1 < len(places):
                return
            memory = None if read is None else read(copied)
            shown = np.concatenate(written) if len(written) > 1 else written[0]
            self.live.show_chunk(shown, memory, video=self._growing_file(), **facts)
            if given:  # it does not count in what the page says of speed
                self.live.start_behind(self.writer.frames, facts["done"])

        for index in range(len(places)):
            self._submit(partial(decode, index), partial(use, index))

    def end(self) -> None:
        """Write what waits in the decoder: nothing follows."""
        self._queue.submit(lambda: (_bytes(self.decoder.flush()),), self._append)
        self.settle()

    def settle(self) -> None:
        """Wait until all that was added is in the file; raises what went wrong there. On the host's thread."""
        self._queue.settle()
        self._show_preview()

    def after_pass(self, passes: int, total: int) -> None:
        """Progress; what the worker has finished meanwhile, or why it could not."""
        self.progress.update_absolute(passes, total)
        self._queue.check()
        self._show_preview()

    def close(self) -> None:
        """Keep what was added, whatever ended the run, and end the worker."""
        failure = self._queue.close()
        if failure is not None:  # another one is on its way already
            logger.warning("The last chunk could not be kept.", exc_info=failure)

    @property
    def path(self) -> PurePath:
        """The file, in the host's output folder."""
        return PurePath(os.path.relpath(self.writer.path, folder_paths.get_output_directory()))

    def _show_preview(self) -> None:
        frame, self._preview = self._preview, None
        if frame is not None and not self.live.has_player:
            preview = ("JPEG", Image.fromarray(frame), latent_preview.MAX_PREVIEW_RESOLUTION)
            self.progress.update_absolute(self.progress.current, preview=preview)

    def _submit(self, decode: Callable[[], tuple[Tensor, ...]], use: Callable[..., object]) -> None:
        """Submit; once more where memory runs out, when all that was added before is in the file and its memory free.

        An interrupt that the host's layers raise in the middle of decoding is raised after the chunk is submitted.
        """
        mark, again, stopped = self.decoder.mark(), True, None
        try:
            self._queue.submit(decode, use)
            again = False
        except torch.OutOfMemoryError as error:
            logger.warning("Out of memory while decoding; trying once more: %s", reason_of(error))
        except comfy.model_management.InterruptProcessingException as error:  # which lowers the host's flag
            stopped = error.with_traceback(None)
        if again:  # outside the handler, whose error keeps the failed call's tensors
            self.decoder.back_to(mark)
            if stopped is None:
                self.settle()
                comfy.model_management.soft_empty_cache()
            self._queue.submit(decode, use)
        if stopped is not None:
            raise stopped
        self._queue.wait_for_room()

    def _decode(self, raw: Tensor) -> tuple[Tensor]:
        return (_bytes(self.decoder.push(raw)),)

    # --- in the worker ---

    def _append(self, frames: Tensor) -> np.ndarray:
        """Append frames [n, H, W, 3] uint8 to the file; where no player shows them all, the last is the preview."""
        images = frames.numpy()
        if len(images):
            self.writer.append(images)
            self._preview = images[-1]
        return images

    def _growing_file(self) -> dict[str, Any]:
        """How the host's /view names the file, and the bytes of it that are a complete video."""
        path = self.path
        subfolder = path.parent.as_posix() if path.parent.parts else ""
        return {"filename": path.name, "subfolder": subfolder, "type": "output", "bytes": self.writer.bytes}


def _bytes(frames: Tensor) -> Tensor:
    """Frames in 0..1 as uint8, where they are."""
    return (frames * 255).round().to(torch.uint8)
