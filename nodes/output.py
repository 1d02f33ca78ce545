"""What becomes of a chunk whose passes are done: it is decoded, written into the video and shown on the page.

Where it pays, a thread does that beside the passes of the next chunk. Passes, the host's memory management, its
interrupts and its progress bar stay on the host's own thread.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

import comfy.utils
import folder_paths
import latent_preview
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..sparse_attn.beside import THREAD, Beside
from ..sparse_attn.memory_live import KeptBlocks
from ..sparse_attn.video import Mp4Writer
from .host import prepare_threads
from .live import LiveRun
from .vae_stream import StreamDecoder, TinyStreamDecoder

logger = logging.getLogger("sparse_forcing.nodes")


class Output:
    """The decoder, the file and the page of one run; chunks go through them in order.

    at_once: latent frames that are decoded together. After `work_beside`, `add` only hands over, and until `settle`
    nobody else may touch decoder and writer.
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
        self._beside: Beside | None = None
        self._preview: np.ndarray | None = None  # a frame that the host was not shown yet

    def work_beside(self, device: torch.device) -> None:
        """Let a thread do all that follows, for latents on `device`."""
        prepare_threads(THREAD)
        self._beside = Beside(device)

    @property
    def beside(self) -> bool:
        """Whether a thread does the work."""
        return self._beside is not None

    def restore(self, snapshot: dict[str, Tensor]) -> None:
        """Go on with a decoder's `snapshot`."""
        self._do(self.decoder.restore, snapshot)
        self.settle()

    def write(self, raw: Tensor) -> None:
        """Decode a raw latent [1, 16, F, h, w] into the file."""
        self._do(self._write, raw)
        self.settle()

    def add(self, raw: Tensor, given: bool, kept: KeptBlocks | None, facts: dict[str, Any]) -> None:
        """Decode, write and show a chunk's raw latent: with its `facts`, and what the memory `kept` behind it.

        given: it was not made, and may be a long clip.
        """
        self._do(self._finish, raw, given, kept, facts)

    def end(self) -> None:
        """Write what waits in the decoder: nothing follows."""
        self._do(self._flush)
        self.settle()

    def settle(self) -> None:
        """Wait until all that was added is in the file; raises what went wrong there. On the host's thread."""
        while self._beside is not None and len(self._beside):
            self._beside.take()
        frame, self._preview = self._preview, None
        if frame is not None and not self.live.has_player:
            preview = ("JPEG", Image.fromarray(frame), latent_preview.MAX_PREVIEW_RESOLUTION)
            self.progress.update_absolute(self.progress.current, preview=preview)

    def after_pass(self, passes: int, total: int) -> None:
        """Progress; what the thread has finished meanwhile, or why it could not."""
        self.progress.update_absolute(passes, total)
        if self._beside is not None and self._beside.ready:
            self.settle()

    def close(self) -> None:
        """Keep what was added, whatever ended the run, and end the thread."""
        if self._beside is None:
            return
        try:
            while len(self._beside):
                self._beside.take()
        except Exception:  # another one is on its way already
            logger.warning("The last chunk could not be kept.", exc_info=True)
        finally:
            self._beside.close()
            self._beside = None

    @property
    def path(self) -> PurePath:
        """The file, in the host's output folder."""
        return PurePath(os.path.relpath(self.writer.path, folder_paths.get_output_directory()))

    # --- on the thread, where there is one ---

    def _do(self, work: Callable[..., Any], *given: Any) -> None:
        if self._beside is None:
            work(*given)
        else:
            self._beside.put(work, *given)

    def _finish(self, raw: Tensor, given: bool, kept: KeptBlocks | None, facts: dict[str, Any]) -> None:
        frames = np.concatenate([self._write(piece) for piece in raw.split(self.at_once, dim=2)])
        self.live.show_chunk(frames, kept, video=self._growing_file(), **facts)
        if given:  # it does not count in what the page says of speed
            self.live.start_behind(self.writer.frames, facts["done"])

    def _write(self, raw: Tensor) -> np.ndarray:
        return self._append(self.decoder.push(raw))

    def _flush(self) -> None:
        self._append(self.decoder.flush())

    def _append(self, frames: Tensor) -> np.ndarray:
        """Append frames [n, H, W, 3] in 0..1 to the file; returns them as uint8.

        Where no player shows them all, the last one is the host's ordinary preview.
        """
        images = (frames * 255).round().to(torch.uint8).numpy()
        if len(images):
            self.writer.append(images)
            self._preview = images[-1]
        return images

    def _growing_file(self) -> dict[str, Any]:
        """How the host's /view names the file, and the bytes of it that are a complete video."""
        path = self.path
        subfolder = path.parent.as_posix() if path.parent.parts else ""
        return {"filename": path.name, "subfolder": subfolder, "type": "output", "bytes": self.writer.bytes}
