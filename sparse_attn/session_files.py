"""The files of a session: parts that become whole files in one step, and the latent beside a session.

A session that is written again and again need not hold the latent, which grows with the video. Its frames lie in a file
beside it, each written once: float32, one [B, C, h, w] behind the other. The session says how many of them are its own
and what their hash is; what stands behind those was meant for a later session that never came to be.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

SUFFIX = ".session.safetensors"
FLOAT_BYTES = 4


def latents_of(session: str | Path) -> Path:
    """The file that holds the latent of the session file `session`, where that does not hold it itself."""
    return Path(os.path.splitext(session)[0] + ".latents")


# --- parts ----------------------------------------------------------------------------------------------------------


def part_of(path: Path) -> Path:
    """What `path` is called until it is complete; in the same folder, where a move is one step."""
    return path.with_name(f".{path.name}.part")


def claim(part: BinaryIO) -> bool:
    """Lock an open part for as long as it is open; False where somebody else holds it, or nothing can be locked."""
    if sys.platform == "win32":  # a file that is open cannot be removed there
        return True
    import fcntl

    try:
        fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def discard_parts(session: Path) -> None:
    """Remove the parts of a session file and of its latent."""
    part_of(session).unlink(missing_ok=True)
    part_of(latents_of(session)).unlink(missing_ok=True)


def discard_abandoned_parts(folder: Path) -> None:
    """Remove the parts of sessions whose writers died, as large as they had become; nobody holds those any more."""
    for part in folder.glob(f".*{SUFFIX}.part"):
        with contextlib.suppress(OSError):  # no file, or another's
            with open(part, "r+b") as file:
                abandoned = claim(file)
            if abandoned:
                discard_parts(part.with_name(part.name.removeprefix(".").removesuffix(".part")))


def sync_folder(folder: Path) -> None:
    """Make a move in `folder` survive a loss of power, where the system lets folders be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- the latent beside a session ------------------------------------------------------------------------------------


class LatentFile:
    """Writes the latent beside the session file `session` while a run makes it. `frames`: those that are written."""

    def __init__(self, session: str | Path):
        self.path = latents_of(session)
        self.frames, self._hash = 0, hashlib.sha256()

    @property
    def taken(self) -> bool:
        """Whether an earlier run's file has this name; the session beside it may count on that one."""
        return self.frames == 0 and self.path.exists()

    def append(self, latent: Tensor) -> str:
        """Write the frames of `latent` [B, C, F, h, w] float32 that are new; returns the hash of all F. OSError.

        They are on the disk when it returns. The first ones lie in a part until `publish`.
        """
        assert latent.dtype == torch.float32 and latent.shape[2] >= self.frames
        size = self.frames * _frame_bytes(latent)
        if size and not (self.path.is_file() and self.path.stat().st_size >= size):  # somebody took it away
            size, self.frames, self._hash = 0, 0, hashlib.sha256()
        digest = self._hash.copy()
        with open(self.path, "r+b") if self.frames else open(part_of(self.path), "wb") as file:
            file.seek(size)
            file.truncate()  # what a save that failed left behind
            # numpy copies: torch would wake all its threads for each frame, beside a model that needs them
            for frame in latent[:, :, self.frames :].detach().cpu().unbind(2):
                data = frame.numpy().tobytes()
                file.write(data)
                digest.update(data)
            file.flush()
            os.fsync(file.fileno())
        self.frames, self._hash = latent.shape[2], digest
        return digest.hexdigest()

    def publish(self) -> None:
        """Give the file its name, before the session that counts on it gets its own. OSError."""
        if part_of(self.path).exists():
            os.replace(part_of(self.path), self.path)
            sync_folder(self.path.parent)


def read_latent(path: Path, like: Tensor, frames: int, digest: str) -> Tensor:
    """The first `frames` frames of a LatentFile at `path`: [B, C, frames, h, w] float32, `like` [B, C, 0, h, w].

    ValueError for a file that does not begin with those whose hash is `digest`. OSError.
    """
    if path.is_symlink() or not path.is_file():
        raise ValueError(
            f"its latent is in {path.name}, which is not beside it: keep the two files together, under these names"
        )
    size = _frame_bytes(like)
    there = path.stat().st_size // size if size else 0
    if not 0 < frames <= there:
        raise ValueError(f"{path.name} holds {there} of its {frames} latent frames: use an earlier session")
    latent = like.new_empty((*like.shape[:2], frames, *like.shape[3:]))
    found = hashlib.sha256()
    with open(path, "rb") as file:
        for frame in np.moveaxis(latent.numpy(), 2, 0):
            data = file.read(size)
            found.update(data)
            frame[...] = np.frombuffer(data, np.float32).reshape(frame.shape)
    if found.hexdigest() != digest:
        raise ValueError(f"{path.name} holds other latent frames than its own: use an earlier session")
    return latent


def _frame_bytes(latent: Tensor) -> int:
    return FLOAT_BYTES * math.prod((*latent.shape[:2], *latent.shape[3:]))
