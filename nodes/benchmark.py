"""Benchmark: dense, window and sparse memory beside each other, on the user's own model and device."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
from comfy_api.latest import ui
from torch import Tensor

from ..sparse_attn.charts import line_chart
from ..sparse_attn.config import AttentionConfig, check_size, shifted_sigmas
from ..sparse_attn.estimate import TEXT_TOKENS, gigabytes
from ..sparse_attn.rollout import Chunk
from .checks import require_wan
from .hooks import patch_model
from .host import io
from .report import as_image, show_text
from .session import SamplingRun, attention_of
from .streaming import StreamSampler
from .vae_stream import LATENT_CHANNELS

SAME = 0.05  # relative difference of the first chunk, up to which two modes compute the same thing


class SparseForcingBenchmark(io.ComfyNode):
    """Schema; a mode is tried by `try_mode`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SparseForcingBenchmark",
            display_name="Benchmark (Sparse Forcing)",
            category="video",
            description=(
                "Makes a few chunks with each kind of memory (dense, window, sparse) on your own device and model, and "
                "tells how long they take and how much memory of past frames they hold. Nothing is decoded or saved."
            ),
            search_aliases=["speed test", "how fast", "FPS", "compare attention", "sparse forcing"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A Wan model. Settings of Apply Sparse Forcing in mode sparse are those that are compared.",
                ),
                io.Int.Input(
                    "width", default=832, min=16, max=8192, step=16, tooltip="Width of the video in pixels."
                ),
                io.Int.Input(
                    "height", default=480, min=16, max=8192, step=16, tooltip="Height of the video in pixels."
                ),
                io.Int.Input(
                    "chunks",
                    default=7,
                    min=3,
                    max=1000,
                    tooltip="Chunks to make with each memory; 7 of 3 frames are 5 seconds. The first is warm-up.",
                ),
                io.Int.Input(
                    "chunk_frames",
                    default=3,
                    min=1,
                    max=64,
                    tooltip="Latent frames denoised together, as the checkpoint was trained: 3 or 1.",
                ),
                io.Int.Input("steps", default=4, min=1, max=100, tooltip="Denoising steps a chunk."),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="A prompt. Without one the model is given random text, which takes the same time.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="text", tooltip="A table in Markdown, as it stands on the node."
                ),
                io.Image.Output(display_name="IMAGE", tooltip="The time of each chunk as lines."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        width: int,
        height: int,
        chunks: int,
        chunk_frames: int,
        steps: int,
        positive: list | None = None,
    ) -> io.NodeOutput:
        check_size(width, height)
        network = require_wan(model)
        compared = settings_to_compare(model)
        for attention in compared.values():
            attention.validate(chunk_frames)
        if positive is None:
            positive = random_text(network)
        latent = torch.zeros(1, LATENT_CHANNELS, chunk_frames, height // 8, width // 8)
        progress = comfy.utils.ProgressBar(len(compared) * chunks * (steps + 1), cls.hidden.unique_id)
        tried = {
            mode: try_mode(patch_model(model, attention), positive, latent, chunks, steps, progress)
            for mode, attention in compared.items()
        }
        device = comfy.model_management.get_torch_device_name(model.load_device)
        title = f"{width} x {height}, {steps} steps, chunks of {chunk_frames}, {device}"
        text = f"{title}\n\n{table(tried, chunk_frames)}"
        picture = line_chart(
            title, {mode: [1000 * s for s in t.seconds] for mode, t in tried.items()}, "chunk", "ms a chunk"
        )
        show_text(text, cls.hidden.unique_id)
        return io.NodeOutput(text, as_image(picture), ui=ui.PreviewText(text))


@dataclass
class Tried:
    """What one mode took: seconds of every chunk, bytes of its memory, and the first chunk [1, 16, F, h, w]."""

    seconds: list[float] = field(default_factory=list)
    memory: int = 0
    first: Tensor = field(default_factory=lambda: torch.empty(0))


def settings_to_compare(model: Any) -> dict[str, AttentionConfig]:
    """Dense, the model's own settings (the default ones unless they are sparse), and a window of equal memory."""
    own = attention_of(model)
    sparse = own if own.mode == "sparse" else AttentionConfig()
    frames = sparse.window_frames + sparse.persistent_frames
    return {
        "dense": AttentionConfig(mode="dense"),
        "window": replace(sparse, mode="window", window_frames=frames),
        "sparse": replace(sparse, dense_first_chunk=True),  # the first chunk is then the same in all of them
    }


def random_text(network: Any) -> list:
    """A conditioning of random rows, as long as any prompt's."""
    rows = torch.randn(
        1, TEXT_TOKENS, network.text_embedding[0].in_features, generator=torch.Generator().manual_seed(0)
    )
    return [[rows, {}]]


def try_mode(
    model: Any, positive: list, latent: Tensor, chunks: int, steps: int, progress: comfy.utils.ProgressBar
) -> Tried:
    """Make `chunks` chunks like `latent` with a patched MODEL. The host's interrupt ends it between two passes."""
    tried, runs = Tried(), []

    def on_open(run: SamplingRun, *_: Any) -> None:
        runs.append(run)

    def on_chunk(chunk: Chunk) -> None:
        if not tried.seconds:
            tried.first = chunk.latent.float().cpu()
        tried.seconds.append(chunk.seconds)
        tried.memory = sum(state.nbytes for state in runs[0].states.values())

    total = chunks * latent.shape[2]
    sampler = StreamSampler(
        latent.shape[2], total, on_chunk, first_steps=steps, on_open=on_open, clean_last=True
    )
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive})
    guider.set_cfg(1.0)
    sigmas = torch.tensor([*shifted_sigmas(steps), 0.0])
    guider.sample(latent, latent, sampler, sigmas, callback=lambda *_: progress.update(1), seed=0)
    return tried


def table(tried: dict[str, Tried], chunk_frames: int) -> str:
    """A Markdown table. A mode whose first chunk is not that of mode dense gets no speed-up."""
    dense = tried["dense"]
    lines = [
        "| memory | ms a chunk (median after the first) | last chunk | frames a second | memory of past frames "
        "| last chunk against dense |",
        "|---|---|---|---|---|---|",
    ]
    for mode, one in tried.items():
        usual, last = median(one.seconds[1:]), one.seconds[-1]
        off = (one.first - dense.first).norm() / dense.first.norm()
        faster = f"{dense.seconds[-1] / last:.2f} x" if off <= SAME else f"not comparable: {off:.0%} off"
        lines.append(
            f"| {mode} | {1000 * usual:.4g} | {1000 * last:.4g} | {4 * chunk_frames / usual:.3g} "
            f"| {gigabytes(one.memory)} | {faster} |"
        )
    return "\n".join(lines)
