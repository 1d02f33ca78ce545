"""What follows when the fast pass fails: the video continues on ComfyUI's own layers.

A failure between chunks or in a noisy pass costs only that pass, which is made again (`hooks`): it has not touched what
finished chunks left in the memory. A clean pass that updates shared pages layer by layer cannot be made again on top of
itself: it raises `MemoryTornError`, and `recovering` first rewrites the memory from the finished latents.
"""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import comfy.model_management
import torch
from torch import Tensor

from ..sparse_attn.rollout import Denoise

if TYPE_CHECKING:
    from .session import SamplingRun

logger = logging.getLogger("sparse_forcing.nodes")

# Finished latent frames [start, stop) in the model's scale, on any device.
Finished = Callable[[int, int], Tensor]

SAID_AT_MOST = 400  # characters of an error, of which a compiler's can be pages


class MemoryTornError(Exception):
    """The fast pass failed in a clean pass that had begun to change what finished chunks left in the memory."""


def recovering(run: SamplingRun, evaluate: Denoise, device: torch.device) -> Denoise:
    """`evaluate` as the rollout calls it; a pass that tore the memory is made again on a memory written anew."""

    def once(latent: Tensor, sigma: float) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        run.begin_pass()
        return evaluate(latent, sigma)

    def denoise(latent: Tensor, sigma: float) -> Tensor:
        try:
            return once(latent, sigma)
        except MemoryTornError:
            pass  # outside the handler the failed pass's frames, and what they hold, are gone
        rewrite(run, once, device)
        return once(latent, sigma)

    return denoise


def rewrite(run: SamplingRun, denoise: Denoise, device: torch.device) -> None:
    """Write the finished latents into an emptied memory by clean passes, and reopen the chunk that was open.

    All of them pass under the present prompt. RuntimeError where the finished latents are not available.
    """
    frame, frames, finished = run.frame, run.open_frames, run.finished
    if finished is None and frame > run.first_frame:
        raise RuntimeError(
            "The fast pass failed in a clean pass, and the finished latents to write the memory anew from are not "
            "available: switch fast_pass off in Apply Sparse Forcing."
        )
    logger.warning(
        "Sparse Forcing writes %d finished latent frames into its memory again%s.",
        frame - run.first_frame,
        ", those of earlier prompts under the present one" if run.rereads else "",
    )
    run.rewind_all()
    for start, stop in _spans(run.first_frame, run.given, frame, run.chunk_frames):
        assert finished is not None
        run.begin_chunk(stop - start)
        denoise(finished(start, stop).to(device).float(), 0.0)
        run.end_chunk()
    run.begin_chunk(frames)


def _spans(first: int, given: int, end: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Chunks as they were first written: of the given frames and of the others, the first may be shorter."""
    for start, stop in ((first, min(given, end)), (max(first, given), end)):
        while start < stop:
            frames = (stop - start) % chunk or chunk
            yield start, start + frames
            start += frames


def reason_of(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:SAID_AT_MOST].removesuffix(": ")


def free_device_memory() -> None:
    """Free what is not referenced any more, such as a failed pass's graphs."""
    gc.collect()
    comfy.model_management.soft_empty_cache()


def keep_on_device(sides: dict[str, list[dict[str, Any]]], device: torch.device) -> None:
    """Put the conditioning of a running guider (`guider.conds`) on `device`.

    ComfyUI would copy it there in every model call, out of pageable memory, which waits for all queued work. The
    guider's entries are the run's own copies; tensors and condition objects of others are left as they are.
    """
    for entries in sides.values():
        for entry in entries:
            conds = entry.get("model_conds", {})
            entry["model_conds"] = {name: _on_device(cond, device) for name, cond in conds.items()}


def _on_device(cond: Any, device: torch.device) -> Any:
    value = getattr(cond, "cond", None)
    moved: Any
    if isinstance(value, Tensor):
        moved = value.to(device)
    elif isinstance(value, list) and all(isinstance(part, Tensor) for part in value):
        moved = [part.to(device) for part in value]
    else:
        return cond
    placed = copy.copy(cond)
    placed.cond = moved
    return placed
