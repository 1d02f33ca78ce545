"""From a prompt to video, chunk by chunk, without a host.

    pipeline = VideoPipeline.load()
    for chunk in pipeline.generate("a large red circle bouncing over a navy plain background", latent_frames=21):
        writer.append(chunk.frames)

A `Request` says what is wanted and checks it before any weight is read; the pipeline holds the models and can serve
one request after another. Nothing about a video is kept between requests.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels.pbsa.constraints import Call, choose
from .config import PIXELS_PER_TOKEN, AttentionConfig, SamplerConfig, check_length, check_size, pixel_frames
from .fast import ComposablePass, choose_pass, denoiser
from .frame_queue import FrameQueue
from .given import latent_frames_of, usable_frames
from .pictures import to_bytes
from .rollout import Denoise, prefill, stream
from .state import StreamState
from .world import ATTENTION
from .world.model import SAMPLER, WorldModel, load_world_model
from .world.scene import SIZE_PX

logger = logging.getLogger("sparse_forcing.pipeline")

LATENT_CHANNELS = 16
PIXELS_PER_LATENT = 8

OnPass = Callable[[int, int, int], None]  # chunk, pass, passes a chunk


@dataclass(frozen=True)
class Request:
    """One video. Lengths in latent frames (`pixel_frames` of them in video frames), sides in pixels.

    given: what the video begins with, uint8 [1 + 4k, height, width, 3]: one picture, or a clip to go on from. It counts
    in `latent_frames`, enters the memory by clean passes, and comes back as the VAE decodes it, so that nothing jumps
    where the new frames begin.
    """

    prompt: str
    latent_frames: int = 21
    width: int = SIZE_PX  # what the world model was trained at
    height: int = SIZE_PX
    seed: int = 0
    attention: AttentionConfig = ATTENTION
    sampler: SamplerConfig = SAMPLER
    given: np.ndarray | None = field(default=None, compare=False, repr=False)

    def validate(self) -> None:
        """Raise ValueError, naming the value and the remedy."""
        if not self.prompt.strip():
            raise ValueError("the prompt is empty: say what the video should show")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} is outside 0 .. 2**63 - 1")
        check_size(self.width, self.height)
        self.sampler.validate()
        self._check_given()
        check_length(self.latent_frames - self.given_frames, self.sampler.chunk_frames)
        self.attention.validate(self.sampler.chunk_frames)

    def _check_given(self) -> None:
        if self.given is None:
            return
        frames = len(self.given)
        if self.given.shape[1:] != (self.height, self.width, 3) or self.given.dtype != np.uint8:
            raise ValueError(
                f"given frames of shape {list(self.given.shape)} and type {self.given.dtype} do not fit a "
                f"{self.width}x{self.height} video: give uint8 [F, {self.height}, {self.width}, 3]"
            )
        if frames % 4 != 1:
            raise ValueError(
                f"{frames} given frames make no whole latent frames: give 1, 5, 9, ... (the last "
                f"{usable_frames(frames)})"
            )
        if self.given_frames >= self.latent_frames:
            raise ValueError(
                f"the {frames} given frames are already all {self.video_frames} of the video: make it longer"
            )

    @property
    def given_frames(self) -> int:
        """Latent frames that are given."""
        return 0 if self.given is None else latent_frames_of(len(self.given))

    @property
    def chunks(self) -> int:
        """Chunks to be made."""
        return (self.latent_frames - self.given_frames) // self.sampler.chunk_frames

    @property
    def video_frames(self) -> int:
        return pixel_frames(self.latent_frames)


@dataclass(frozen=True)
class VideoChunk:
    """A finished piece of the video, and what it took.

    frames uint8 [F, H, W, 3]; seconds that passes and decoding take for one chunk, counted once where they run beside
    each other, and not what the caller does with the frames; cache_bytes of the stream's memory at that moment.
    index -1: frames that were given.
    """

    index: int
    frames: np.ndarray
    seconds: float
    cache_bytes: int

    @property
    def fps(self) -> float:
        """Video frames a second of work, decoding included."""
        return len(self.frames) / self.seconds


class Made(NamedTuple):
    """A piece of the video before it is decoded: latent [1, C, F, h, w], and the seconds that its passes took."""

    number: int
    latent: Tensor
    seconds: float


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a request needs for certain; activations of one chunk come on top. host: of the cache, off the
    device."""

    weights: int
    cache: int
    host: int = 0


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; auto: the first CUDA device, else the CPU. Raises ValueError where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here ({reason}): use auto or cpu") from error
    return device


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA, where it is what Wan runs in; float32 elsewhere. The VAE always decodes in float32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@dataclass(frozen=True)
class Widths:
    """What a backbone's size means to a stream's memory."""

    layers: int
    heads: int
    head_dim: int


def new_memory(
    widths: Widths, request: Request, dtype: torch.dtype, device: torch.device | str = "meta"
) -> StreamState:
    """The memory of a stream that serves `request`. On the meta device nothing is allocated, `nbytes` still counts."""
    return StreamState(
        layers=widths.layers,
        heads=widths.heads,
        head_dim=widths.head_dim,
        grid=(request.height // PIXELS_PER_TOKEN, request.width // PIXELS_PER_TOKEN),
        chunk_frames=request.sampler.chunk_frames,
        attention=request.attention,
        total_frames=request.latent_frames,
        dtype=dtype,
        device=device,
        share_open=True,
    )


class VideoPipeline:
    """The embedded world model behind one call. `world` is moved to `device`."""

    def __init__(self, world: WorldModel, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.dtype = compute_dtype(self.device)
        self.dit = world.dit.to(self.device, self.dtype)
        self.text = world.text.to(self.device, self.dtype)
        self.vae = world.vae.to(self.device, torch.float32)

    @property
    def widths(self) -> Widths:
        return Widths(self.dit.num_layers, self.dit.num_heads, self.dit.head_dim)

    @classmethod
    def load(cls, device: str = "auto") -> VideoPipeline:
        """Read the embedded weights. Raises FileNotFoundError without them, ValueError for an unknown device."""
        target = pick_device(device)
        return cls(load_world_model("cpu"), target)

    def check(self, request: Request) -> None:
        """Raise ValueError for a request that cannot be served here: its own values, or a backend that cannot run."""
        request.validate()
        attention = request.attention
        if attention.mode != "sparse":
            return
        call = Call(
            "attention", self.device, self.dtype, self.dit.head_dim, block_tokens=attention.block_tokens
        )
        try:
            choose(call, attention.backend)
        except RuntimeError as error:
            raise ValueError(f"{error}; backend 'auto' takes one that can") from error

    def memory_need(self, request: Request) -> MemoryNeed:
        """What a request needs, before it starts."""
        weights = sum(
            p.numel() * p.element_size() for m in (self.dit, self.text, self.vae) for p in m.parameters()
        )
        memory = new_memory(self.widths, request, self.dtype)
        return MemoryNeed(weights, memory.nbytes, memory.host_bytes)

    def generate(self, request: Request, on_pass: OnPass | None = None) -> Iterator[VideoChunk]:
        """Decoded chunks as they are finished. Raises ValueError at once, as `check` does.

        on_pass(chunk, pass, passes per chunk) after every pass of the backbone. To stop early, stop iterating. On CUDA
        a chunk is decoded on a stream of its own beside the passes of the next one, and comes when those are launched.
        """
        self.check(request)
        return self._generate(request, on_pass)

    def _generate(self, request: Request, on_pass: OnPass | None) -> Iterator[VideoChunk]:
        memory = new_memory(self.widths, request, self.dtype, self.device)
        logger.info(
            "%d chunks of %dx%d, cache %d bytes", request.chunks, request.width, request.height, memory.nbytes
        )
        denoise, decoder = self._denoiser(request, memory), self.vae.stream_decoder()
        decoded: SimpleQueue[tuple[Made, np.ndarray]] = SimpleQueue()

        def decode(made: Made) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (to_bytes(decoder.push(made.latent)),)

        started = time.perf_counter()
        pieces = self._pieces(request, memory, denoise, on_pass)
        with FrameQueue(self.device, limit=1) as queue, closing(pieces) as all_made:
            for made in chain(all_made, [None]):
                if made is not None:
                    queue.submit(partial(decode, made), partial(_hand_over, decoded, made))
                if made is None or made.number < 1 or self.device.type != "cuda":
                    queue.settle()  # the last, the first, and where nothing runs beside anything
                else:
                    queue.wait_for_room()
                while not decoded.empty():
                    done, frames = decoded.get()
                    waited = time.perf_counter() - started
                    # a caller that took its time finds passes done, which took no less for that
                    yield VideoChunk(done.number, frames, max(waited, done.seconds), memory.nbytes)
                    started = (
                        time.perf_counter()
                    )  # what the caller did with the frames is not the model's time

    def _pieces(
        self, request: Request, memory: StreamState, denoise: Denoise, on_pass: OnPass | None
    ) -> Generator[Made, None, None]:
        """What is to be decoded: the given frames in pieces of a chunk, then the chunks."""

        def after_pass(chunk: int, index: int, passes: int, _x0: Tensor) -> None:
            if on_pass is not None:
                on_pass(chunk, index, passes)

        yield from self._given(request, memory, denoise)
        yield from self._chunks(request, memory, denoise, after_pass)

    def _given(self, request: Request, memory: StreamState, denoise: Denoise) -> Iterator[Made]:
        """The given frames, once the memory holds them all."""
        if request.given is None:
            return
        video = torch.from_numpy(request.given).to(self.device).permute(3, 0, 1, 2)[None]
        with torch.no_grad():
            latent = self.vae.encode(video / 127.5 - 1)
        prefill(denoise, memory, latent, request.sampler.chunk_frames)
        for piece in latent.split(request.sampler.chunk_frames, dim=2):
            yield Made(-1, piece, 0.0)

    def _chunks(
        self, request: Request, memory: StreamState, denoise: Denoise, on_pass: Callable
    ) -> Iterator[Made]:
        chunks = stream(
            denoise,
            memory,
            request.sampler,
            shape=(
                1,
                LATENT_CHANNELS,
                request.height // PIXELS_PER_LATENT,
                request.width // PIXELS_PER_LATENT,
            ),
            total_frames=request.latent_frames - request.given_frames,
            seed=request.seed,
            on_pass=on_pass,
            clean_last=False,  # nothing follows the last chunk
            device=self.device,
        )
        for chunk in chunks:
            yield Made(chunk.index, chunk.latent.to(self.device), chunk.seconds)

    def _denoiser(self, request: Request, memory: StreamState) -> Denoise:
        """denoise(x float32, sigma) -> x0 float32 for the chunk that `memory` has open, under the request's prompt."""
        with torch.no_grad():
            cross_kv = self.dit.cross_kv(self.text.encode([request.prompt]))

        # On a GPU launches are what a small pass waits for; elsewhere the plain pass is as fast and is the definition.
        fast = self.device.type == "cuda"
        run = choose_pass(self.dit, memory)[0] if fast else ComposablePass(self.dit, memory)
        return denoiser(run, cross_kv)


def _hand_over(decoded: SimpleQueue, made: Made, frames: Tensor) -> None:
    decoded.put((made, frames.numpy()))
