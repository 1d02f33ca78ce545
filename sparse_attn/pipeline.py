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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..kernels.pbsa.constraints import Call, choose
from .config import PIXELS_PER_TOKEN, AttentionConfig, SamplerConfig, check_length, check_size, pixel_frames
from .fast import ComposablePass, choose_pass
from .pictures import to_uint8
from .rollout import stream
from .state import StreamState
from .world.model import SAMPLER, WorldModel, load_world_model
from .world.scene import SIZE_PX

logger = logging.getLogger("sparse_forcing.pipeline")

LATENT_CHANNELS = 16
PIXELS_PER_LATENT = 8

OnPass = Callable[[int, int, int], None]  # chunk, pass, passes a chunk


@dataclass(frozen=True)
class Request:
    """One video. Lengths in latent frames (`pixel_frames` of them in video frames), sides in pixels."""

    prompt: str
    latent_frames: int = 21
    width: int = SIZE_PX  # what the world model was trained at
    height: int = SIZE_PX
    seed: int = 0
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    sampler: SamplerConfig = SAMPLER

    def validate(self) -> None:
        """Raise ValueError, naming the value and the remedy."""
        if not self.prompt.strip():
            raise ValueError("the prompt is empty: say what the video should show")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} is outside 0 .. 2**63 - 1")
        check_size(self.width, self.height)
        self.sampler.validate()
        check_length(self.latent_frames, self.sampler.chunk_frames)
        self.attention.validate(self.sampler.chunk_frames)

    @property
    def chunks(self) -> int:
        return self.latent_frames // self.sampler.chunk_frames

    @property
    def video_frames(self) -> int:
        return pixel_frames(self.latent_frames)


@dataclass(frozen=True)
class VideoChunk:
    """A finished piece of the video, and what it took.

    frames uint8 [F, H, W, 3]; seconds from the first pass to the decoded pixels on the host; cache_bytes of the
    stream's memory at that moment.
    """

    index: int
    frames: np.ndarray
    seconds: float
    cache_bytes: int

    @property
    def fps(self) -> float:
        """Video frames a second of work, decoding included."""
        return len(self.frames) / self.seconds


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a request needs for certain; activations of one chunk come on top."""

    weights: int
    cache: int


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
        return MemoryNeed(weights, new_memory(self.widths, request, self.dtype).nbytes)

    def generate(self, request: Request, on_pass: OnPass | None = None) -> Iterator[VideoChunk]:
        """Decoded chunks as they are finished. Raises ValueError at once, as `check` does.

        on_pass(chunk, pass, passes a chunk) after every pass of the backbone. To stop early, stop iterating.
        """
        self.check(request)
        return self._generate(request, on_pass)

    def _generate(self, request: Request, on_pass: OnPass | None) -> Iterator[VideoChunk]:
        memory = new_memory(self.widths, request, self.dtype, self.device)
        height, width = request.height // PIXELS_PER_LATENT, request.width // PIXELS_PER_LATENT
        logger.info(
            "%d chunks of latents %dx%d, cache %d bytes", request.chunks, width, height, memory.nbytes
        )

        def after_pass(chunk: int, index: int, passes: int, x0: Tensor) -> None:
            if on_pass is not None:
                on_pass(chunk, index, passes)

        chunks = stream(
            self._denoiser(request, memory),
            memory,
            request.sampler,
            shape=(1, LATENT_CHANNELS, height, width),
            total_frames=request.latent_frames,
            seed=request.seed,
            on_pass=after_pass,
            clean_last=False,  # nothing follows the last chunk
            device=self.device,
        )
        decoder = self.vae.stream_decoder()
        started = time.perf_counter()
        for chunk in chunks:
            with torch.no_grad():
                frames = to_uint8(decoder.push(chunk.latent.to(self.device)))
            now = time.perf_counter()
            yield VideoChunk(chunk.index, frames, now - started, memory.nbytes)
            started = time.perf_counter()  # what the caller did with the frames is not the model's time

    def _denoiser(self, request: Request, memory: StreamState) -> Callable[[Tensor, float], Tensor]:
        """denoise(x float32, sigma) -> x0 float32 for the chunk that `memory` has open, under the request's prompt."""
        with torch.no_grad():
            cross_kv = self.dit.cross_kv(self.text.encode([request.prompt]))

        # On a GPU launches are what a small pass waits for; elsewhere the plain pass is as fast and is the definition.
        fast = self.device.type == "cuda"
        run = choose_pass(self.dit, memory)[0] if fast else ComposablePass(self.dit, memory)

        def denoise(x_BCFHW: Tensor, sigma: float) -> Tensor:
            return x_BCFHW.float() - sigma * run(x_BCFHW, sigma, cross_kv).float()

        return denoise
