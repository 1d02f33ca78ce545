"""What can be chosen about a stream, and the checks that turn a bad choice into a sentence.

Lengths are counted in latent frames. One latent frame after the first stands for four video frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Mode = Literal["dense", "window", "sparse"]
Positions = Literal["absolute", "rebased"]
Backend = Literal["auto", "reference", "triton"]
Keep = Literal["attention", "novelty"]
PageBits = Literal[16, 8]
Router = Literal["mean", "quarters"]

QUARTERS = 4  # parts of a block that the router may tell apart
PIXELS_PER_TOKEN = 16  # 8 pixels a latent value, 2 latent values a token, in height and in width


@dataclass(frozen=True)
class AttentionConfig:
    """What self-attention remembers and reads. Frames are latent frames; the window includes the current chunk.

    mode "dense": every frame, up to the stream's total_frames.
    mode "window": the first `sink_frames` and the newest frames, `window_frames` in all, the current chunk included
        (Self-Forcing's local_attn_size). With `sink_ema` the sink moves by that share towards every chunk that leaves,
        as in Reward Forcing (0.001); 0: it rests.
    mode "sparse": a persistent memory of `persistent_frames`' worth of blocks (the sink included) read in full, and
        `topk` of the blocks of a window of `window_frames`. With `dense_first_chunk` a chunk without any history reads
        all of itself: it costs nothing later, and everything later builds on it. `keep` says which blocks stay:
        "attention", those that the latest chunk attends to most, as in the paper; "novelty", those whose values are
        least like those of newer blocks and of the sink, so that the memory holds what cannot be seen any more.
        `router` says by what blocks are chosen: "mean", one mean key and one mean query a block, as in the paper;
        "quarters", those of each quarter of a block, which finds more of the attention for more work. `page_bits` 8:
        finished pages rest in 8 bits, half of the memory; the open chunk is exact. With `offload_pages` they rest in
        the host's memory and come to the device layer by layer. `block_tokens` and `backend`, too, belong to this mode.
    positions "absolute": keys keep the rotation of their frame index. "rebased": temporal distances stay inside the
        window for any length (see `positions`).
    """

    mode: Mode = "sparse"
    window_frames: int = 6
    sink_frames: int = 3
    persistent_frames: int = 6
    topk: float = 0.25
    block_tokens: int = 64
    positions: Positions = "absolute"
    backend: Backend = "auto"
    dense_first_chunk: bool = True
    sink_ema: float = 0.0
    keep: Keep = "attention"
    page_bits: PageBits = 16
    router: Router = "mean"
    offload_pages: bool = False

    def topk_after(self, frames: int) -> float:
        """The share of the window that a chunk with `frames` latent frames of history reads."""
        return 1.0 if self.dense_first_chunk and frames == 0 else self.topk

    def validate(self, chunk_frames: int) -> None:
        """Raise ValueError, naming the value and the remedy, unless this works with chunks of `chunk_frames`."""
        _one_of("mode", self.mode, Mode)
        _one_of("positions", self.positions, Positions)
        _one_of("backend", self.backend, Backend)
        _one_of("keep", self.keep, Keep)
        _one_of("page_bits", self.page_bits, PageBits)
        _one_of("router", self.router, Router)
        self._validate_sink_ema()
        _at_least("chunk_frames", chunk_frames, 1)
        if self.mode == "dense":
            self._validate_dense()
            return
        _at_least("sink_frames", self.sink_frames, 0)
        _whole_chunks("window_frames", self.window_frames, chunk_frames, least=1)
        if self.mode == "window":
            self._validate_window(chunk_frames)
        else:
            self._validate_sparse(chunk_frames)

    def _validate_sink_ema(self) -> None:
        if not 0 <= self.sink_ema < 1:
            raise ValueError(
                f"sink_ema {self.sink_ema} is not a share: use 0 (the sink rests) or a little more, such as 0.001."
            )
        if self.sink_ema and (self.mode != "window" or not self.sink_frames):
            raise ValueError(
                f"sink_ema {self.sink_ema} moves the sink of mode 'window', and here mode is {self.mode!r} with a sink "
                f"of {self.sink_frames}: use mode 'window' with a sink, or sink_ema 0."
            )

    def _validate_dense(self) -> None:
        if self.positions == "rebased":
            raise ValueError(
                "positions 'rebased' keeps distances inside a window, and mode 'dense' has none: it reads every frame "
                "at its own distance. Use positions 'absolute', or mode 'window' or 'sparse'."
            )

    def _validate_window(self, chunk_frames: int) -> None:
        if self.sink_frames + chunk_frames > self.window_frames:
            raise ValueError(
                f"sink_frames {self.sink_frames} leaves no room for a chunk of {chunk_frames} frames in window_frames "
                f"{self.window_frames}: use a sink of at most {self.window_frames - chunk_frames} or a longer window."
            )

    def _validate_sparse(self, chunk_frames: int) -> None:
        _whole_chunks("sink_frames", self.sink_frames, chunk_frames, least=0)
        _whole_chunks("persistent_frames", self.persistent_frames, chunk_frames, least=0)
        if self.sink_frames > self.persistent_frames:
            raise ValueError(
                f"sink_frames {self.sink_frames} does not fit into persistent_frames {self.persistent_frames}, which "
                f"includes it: use a sink of at most {self.persistent_frames} or a larger persistent memory."
            )
        if not 0 < self.topk <= 1:
            raise ValueError(
                f"topk {self.topk} is not a share of the window: use more than 0 and at most 1 (0.25 reads a quarter)."
            )
        _at_least("block_tokens", self.block_tokens, 1)
        if self.router == "quarters" and self.block_tokens % QUARTERS:
            raise ValueError(
                f"block_tokens {self.block_tokens} have no quarters: use a multiple of {QUARTERS}, or router 'mean'."
            )


def shifted_sigmas(steps: int, shift: float = 5.0) -> tuple[float, ...]:
    """`steps` noise levels falling from 1: evenly spaced times under the warp of the Self-Forcing family."""
    times = (1 - step / steps for step in range(steps))
    return tuple(shift * t / (1 + (shift - 1) * t) for t in times)


@dataclass(frozen=True)
class SamplerConfig:
    """The denoising schedule of every chunk. `sigmas` falls from at most 1; a trailing 0 is implied, never written.

    The default is the 4-step schedule of the Self-Forcing family (shift 5): timesteps 1000, 937.5, 833.3, 625.
    """

    sigmas: tuple[float, ...] = shifted_sigmas(4)
    chunk_frames: int = 3
    first_sigmas: tuple[float, ...] | None = None  # of the first generated chunk; None: as the others

    def validate(self) -> None:
        """Raise ValueError, naming the value and the remedy."""
        _at_least("chunk_frames", self.chunk_frames, 1)
        _check_sigmas("sigmas", self.sigmas)
        if self.first_sigmas is None:
            return
        _check_sigmas("first_sigmas", self.first_sigmas)
        if self.first_sigmas[0] != self.sigmas[0]:
            raise ValueError(
                f"first_sigmas starts at {self.first_sigmas[0]}, but sigmas at {self.sigmas[0]}: all chunks start from "
                "the same level of noise, so make the first numbers equal."
            )

    def sigmas_of(self, chunk: int) -> tuple[float, ...]:
        """The schedule of generated chunk number `chunk`."""
        return self.first_sigmas if self.first_sigmas and chunk == 0 else self.sigmas


def pixel_frames(latent_frames: int) -> int:
    """Video frames that `latent_frames` decode to: 1 for the first, 4 for each later one."""
    return 4 * (latent_frames - 1) + 1


def check_length(latent_frames: int, chunk_frames: int) -> None:
    """Raise ValueError, naming the nearest valid lengths, unless `latent_frames` is one or more whole chunks."""
    below, above = _multiples_around(latent_frames, chunk_frames, least=1)
    if latent_frames in (below, above):
        return
    near = " or ".join(f"{n} ({pixel_frames(n)} video frames)" for n in sorted({below, above}))
    raise ValueError(
        f"{latent_frames} latent frames ({pixel_frames(latent_frames)} video frames) are not a whole number of chunks "
        f"of {chunk_frames}: use {near}."
    )


def check_size(width: int, height: int) -> None:
    """Raise ValueError, naming the nearest sizes that work, unless both sides (pixels) are whole tokens."""
    for name, side in (("width", width), ("height", height)):
        below, above = _multiples_around(side, PIXELS_PER_TOKEN, least=1)
        if side not in (below, above):
            near = " or ".join(str(n) for n in sorted({below, above}))
            raise ValueError(f"{name} {side} is not a multiple of {PIXELS_PER_TOKEN} pixels: use {near}.")


def _check_sigmas(name: str, sigmas: tuple[float, ...]) -> None:
    if not sigmas:
        raise ValueError(f"{name} is empty: give at least one, for example (1.0,).")
    outside = [sigma for sigma in sigmas if not 0 < sigma <= 1]
    if outside:
        raise ValueError(
            f"sigma {outside[0]} lies outside (0, 1]: list the noise levels above 0, the final 0 is implied."
        )
    for high, low in zip(sigmas, sigmas[1:]):
        if low >= high:
            raise ValueError(f"{name} must fall, but {low} follows {high}: sort them from high to low.")


def positions_in(mode: Mode, positions: Positions) -> Positions:
    """What a mode counts by where nobody insists: "dense" has no window for `rebased` to stay inside."""
    return "absolute" if mode == "dense" else positions


def _one_of(name: str, value: str | int, choices: object) -> None:
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name} {value!r} is unknown: use one of {', '.join(map(str, allowed))}.")


def _at_least(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} {value!r} must be a whole number, {least} or more.")


def _whole_chunks(name: str, frames: int, chunk_frames: int, least: int) -> None:
    below, above = _multiples_around(frames, chunk_frames, least)
    if frames not in (below, above):
        near = " or ".join(str(n) for n in sorted({below, above}))
        raise ValueError(
            f"{name} {frames} is not a whole number of chunks of {chunk_frames} frames: use {near}"
        )


def _multiples_around(value: int, unit: int, least: int) -> tuple[int, int]:
    """The multiples of `unit` around `value`, `least` units or more; both are `value` if it is one itself."""
    below = max(least, value // unit) * unit
    return below, max(below, -(-value // unit) * unit)
