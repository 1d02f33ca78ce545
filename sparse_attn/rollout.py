"""The rollout: chunk after chunk, each denoised in a few steps and then written into the memory by a clean pass.

The sampler of the Self-Forcing family. A chunk starts from noise; after every step but the last, the estimate x0 is
noised again with fresh noise to the next level; at last the finished chunk runs once more at sigma 0, so that the
memory holds clean keys and values. The model is seen through one function, denoise(x, sigma) -> x0, and the memory
through three names (`Memory`), so both may be anything that fits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Protocol

import torch
from torch import Tensor

from .config import SamplerConfig

Denoise = Callable[[Tensor, float], Tensor]  # x [B, C, F, H, W] float32, sigma -> x0 float32
OnPass = Callable[[int, int, int, Tensor], None]

FIRST_NOISE = 999  # step number that seeds a chunk's first noise; re-noising counts from 0


class Memory(Protocol):
    """What the rollout needs of a memory: `StreamState`, or several kept in step."""

    frame: int  # latent frame at which the next chunk starts
    noisy: bool  # set before a pass: whether another one follows, and writes the open chunk again

    def begin_chunk(self, frames: int) -> None: ...

    def end_chunk(self) -> None: ...  # right after the pass that was not noisy


@dataclass
class Chunk:
    """A finished chunk: its number, its first latent frame in the video (given frames count), latent [B, C, F, H, W]
    float32, and the seconds until it was there: on CUDA with the clean pass of the chunk before, not its own."""

    index: int
    start_frame: int
    latent: Tensor
    seconds: float


def stream(
    denoise: Denoise,
    memory: Memory,
    sampler: SamplerConfig,
    *,
    shape: tuple[int, int, int, int] | None = None,
    total_frames: int | None = None,
    seed: int | tuple[int, ...] = 0,
    noise: Tensor | None = None,
    start_chunk: int = 0,
    on_pass: OnPass | None = None,
    clean_last: bool = True,
    device: torch.device | str = "cpu",
) -> Iterator[Chunk]:
    """Generate chunks until `total_frames`, or for ever.

    shape: (B, C, H, W) of the latents, needed without `noise`. noise [B, C, total_frames, H, W]: the whole stream at
    the first sigma; without it every chunk starts from its own noise, on `device`. total_frames: latent frames of the
    whole stream from chunk 0 on, those given to `prefill` not counted; the last chunk may be shorter; None: the length
    of `noise`, or endless. start_chunk: the first chunk to make; with the memory of the chunks before it, the rest
    comes out bit for bit as in one call. on_pass(chunk number, pass, passes a chunk, x0) follows every pass.
    clean_last False leaves out the clean pass of the very last chunk, which then does not enter the memory.

    Noise is drawn on the CPU, seeded seed + 1000 i + 999 for the start of chunk i, seed + 1000 i + k after its step k.
    A tuple gives each of the B videos a seed of its own, and so the noise that it would have alone.
    Closing the iterator, or an exception in it, leaves the memory at the last chunk that was finished. What `on_pass`
    raises after a clean pass comes behind the chunk, which is finished by then.
    Raises ValueError for settings that do not fit together.
    """
    sampler.validate()
    total, first_x = _plan(sampler, shape, total_frames, seed, noise, device)
    x = first_x(start_chunk)
    for index in count(start_chunk):
        if x is None:
            return
        frames = x.shape[2]
        clean = clean_last or total is None or index * sampler.chunk_frames + frames < total
        began, start_frame = time.perf_counter(), memory.frame
        memory.begin_chunk(frames)
        latent, wait_for, stopped = _denoise_chunk(
            denoise, memory, sampler.sigmas_of(index), x, seed, index, on_pass, clean
        )
        x = first_x(index + 1)  # the host draws while the device still computes
        wait_for()
        yield Chunk(index, start_frame, latent, time.perf_counter() - began)
        if stopped is not None:
            raise stopped


def prefill(denoise: Denoise, memory: Memory, latent: Tensor, chunk_frames: int) -> None:
    """Write given frames [B, C, F, H, W] into the memory by clean passes: a start image, or a clip to go on from.

    If F is not a whole number of chunks, the first chunk is the shorter one. Continue with `stream`.
    """
    total, start = latent.shape[2], 0
    while start < total:
        frames = (total - start) % chunk_frames or chunk_frames
        memory.begin_chunk(frames)
        denoise(latent[:, :, start : start + frames].float(), 0.0)
        memory.end_chunk()
        start += frames


def draw_noise(shape: tuple[int, ...], seed: int | tuple[int, ...], chunk: int, step: int) -> Tensor:
    """Unit normal float32 noise of a chunk's step on the CPU, the same on every machine; seeds wrap at 64 bits."""
    if isinstance(seed, tuple):
        if len(seed) < 8:
            return torch.cat([draw_noise((1, *shape[1:]), own, chunk, step) for own in seed])
        with ThreadPoolExecutor(8) as pool:  # many videos: the device would wait for the host's dice
            return torch.cat(list(pool.map(lambda own: draw_noise((1, *shape[1:]), own, chunk, step), seed)))
    generator = torch.Generator().manual_seed((seed + 1000 * chunk + step) % 2**64)
    return torch.randn(shape, generator=generator)


def _plan(
    sampler: SamplerConfig,
    shape: tuple[int, int, int, int] | None,
    total_frames: int | None,
    seed: int | tuple[int, ...],
    noise: Tensor | None,
    device: torch.device | str,
) -> tuple[int | None, Callable[[int], Tensor | None]]:
    """The stream's length, None if endless, and how to get chunk number -> x at the first sigma, None past the end."""
    if noise is not None:
        if total_frames not in (None, noise.shape[2]):
            raise ValueError(
                f"total_frames {total_frames}, but noise has {noise.shape[2]} frames: leave total_frames out."
            )
        pieces = noise.float().split(sampler.chunk_frames, dim=2)
        return noise.shape[2], dict(enumerate(pieces if noise.shape[2] else ())).get
    if shape is None:
        raise ValueError("neither shape nor noise: give shape (B, C, H, W), or noise [B, C, F, H, W].")
    batch, channels, height, width = shape

    def drawn(index: int) -> Tensor | None:
        frames = sampler.chunk_frames
        if total_frames is not None:
            frames = min(frames, total_frames - index * frames)
        if frames <= 0:
            return None
        unit = draw_noise((batch, channels, frames, height, width), seed, index, FIRST_NOISE)
        return sampler.sigmas[0] * upload(unit, device)

    return total_frames, drawn


def _denoise_chunk(
    denoise: Denoise,
    memory: Memory,
    sigmas: tuple[float, ...],
    x: Tensor,
    seed: int | tuple[int, ...],
    index: int,
    on_pass: OnPass | None,
    clean: bool,
) -> tuple[Tensor, Callable[[], None], BaseException | None]:
    """All passes of one chunk from x at the first sigma, and its end in the memory if one is `clean` -> the finished
    latent, float32, what waits for it, and what `on_pass` raised behind the clean pass."""
    passes = len(sigmas) + clean
    x0, memory.noisy = x, True
    for step, sigma in enumerate(sigmas):
        if step > 0:
            fresh = upload(draw_noise(x0.shape, seed, index, step - 1), x0.device)
            x = (1 - sigma) * x0 + sigma * fresh
        x0 = denoise(x, sigma).float()
        if on_pass is not None:
            on_pass(index, step, passes, x0)
    wait_for = _waiting_for(x0)
    if clean:
        memory.noisy = False
        denoise(x0, 0.0)
        memory.end_chunk()
        try:
            if on_pass is not None:
                on_pass(index, passes - 1, passes, x0)
        except BaseException as stopped:
            return x0, wait_for, stopped
    return x0, wait_for, None


def upload(x: Tensor, device: torch.device | str) -> Tensor:
    """Copy to the device without waiting for what it still computes."""
    if torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def _waiting_for(latent: Tensor) -> Callable[[], None]:
    """What lets the device finish what it has been given so far: one wait a chunk, so that `seconds` are true.

    What it is given later goes on meanwhile, so that the device writes one chunk into the memory while the host opens
    the next, and so do other streams: one may be decoding the chunk before.
    """
    if not latent.is_cuda:
        return lambda: None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(latent.device))
    return event.synchronize
