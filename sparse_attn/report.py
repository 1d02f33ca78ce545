"""What `info` prints: versions, devices, kernel backends with reasons, the world model, the cache of each mode."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata

import av
import torch

from ..kernels import backend_report
from .config import AttentionConfig, Mode
from .estimate import WAN_1_3B, Plan, WanShape, memory_bytes
from .pipeline import VideoPipeline, compute_dtype, pick_device
from .video import CODECS

LENGTHS = {"5 s": 21, "60 s": 240}  # latent frames, whole chunks of three


def lines(version: str) -> Iterator[str]:
    """The report, line by line."""
    yield f"sparse-forcing {version}"
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "numpy", "einops", "av"))
    yield f"Python {platform.python_version()} on {platform.system()} {platform.machine()}: {packages}"
    yield f"Video encoder: {next((name for name in CODECS if name in av.codecs_available), 'none')}"
    yield "Devices (* taken by auto):"
    yield from (f"  {line}" for line in device_lines())
    yield "Kernels:"
    yield from (f"  {name}: {state}" for name, state in backend_report().items())
    yield from world_lines()
    yield "Cache of Wan2.1 1.3B at 832x480 in bfloat16:"
    yield from cache_lines(WAN_1_3B, 832, 480, torch.bfloat16)


def device_lines() -> Iterator[str]:
    auto = pick_device().type
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        mark = "*" if index == 0 else " "
        yield f"{mark} cuda:{index} {facts.name}, {facts.total_memory / 1e9:.0f} GB, sm_{facts.major}{facts.minor}"
    yield f"{'*' if auto == 'cpu' else ' '} cpu, {torch.get_num_threads()} threads"


def world_lines() -> Iterator[str]:
    """The embedded model's size and what its stream remembers, or that its weights are missing."""
    try:
        pipeline = VideoPipeline.load("cpu")
    except FileNotFoundError as error:
        yield f"World model: {error}"
        return
    shape = WanShape.of(pipeline.dit)
    parts = {"backbone": pipeline.dit, "VAE": pipeline.vae, "text encoder": pipeline.text}
    millions = ", ".join(
        f"{name} {sum(p.numel() for p in m.parameters()) / 1e6:.1f} M" for name, m in parts.items()
    )
    yield f"World model: {shape.layers} layers, {shape.heads} heads x {shape.head_dim}; parameters: {millions}"
    dtype = compute_dtype(pick_device())
    yield f"Cache of the world model at 256x256 in {str(dtype).removeprefix('torch.')}:"
    yield from cache_lines(shape, 256, 256, dtype)


def cache_lines(shape: WanShape, width: int, height: int, dtype: torch.dtype) -> Iterator[str]:
    """One line a mode, at default settings, for a short and a long video."""
    modes: tuple[Mode, ...] = ("dense", "window", "sparse")
    for mode in modes:
        needs = []
        for name, frames in LENGTHS.items():
            plan = Plan(shape, width, height, frames, attention=AttentionConfig(mode=mode), dtype=dtype)
            needs.append(f"{name}: {memory_bytes(plan) / 1e6:,.1f} MB")
        yield f"  {mode}  {', '.join(needs)}"
