"""Estimate Memory and Speed: what a video will need, before anything is loaded or made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
from comfy_api.latest import ui

from ..sparse_attn.charts import bar_chart
from ..sparse_attn.choices import CHOICES
from ..sparse_attn.config import AttentionConfig, pixel_frames
from ..sparse_attn.estimate import (
    Need,
    Plan,
    WanShape,
    activation_bytes,
    fit_budget,
    gigabytes,
    host_bytes,
    memory_bytes,
    parts,
    pass_flops,
)
from ..sparse_attn.speed import chunk_seconds, layer_seconds
from .checks import latent_frames_for, require_wan
from .hooks import fast_options, patch_model
from .host import inference_dtype, io
from .report import as_image, show_text
from .session import attention_of
from .vae_stream import LATENT_CHANNELS, require_wan_vae

FPS = 16  # of Wan's videos


class SparseForcingEstimate(io.ComfyNode):
    """Schema; the figures come from `sparse_attn.estimate` and `sparse_attn.speed`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SparseForcingEstimate",
            display_name="Estimate Memory and Speed",
            category="video",
            description=(
                "Tells before the start what a video will need: memory of the weights, of past frames and of one pass, "
                "against what the device has, and how long a chunk takes. The model is not loaded for it."
            ),
            search_aliases=["VRAM", "out of memory", "how much memory", "how fast", "sparse forcing budget"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A Wan model with its settings. Without Apply Sparse Forcing, the default settings count.",
                ),
                io.Int.Input(
                    "width", default=832, min=16, max=8192, step=16, tooltip="Width of the video in pixels."
                ),
                io.Int.Input(
                    "height", default=480, min=16, max=8192, step=16, tooltip="Height of the video in pixels."
                ),
                io.Float.Input(
                    "seconds",
                    default=5.0,
                    min=0.1,
                    max=86400.0,
                    step=0.1,
                    tooltip="Length of the video at 16 frames a second. Only mode dense needs more for longer ones.",
                ),
                io.Int.Input(
                    "chunk_frames",
                    default=3,
                    min=1,
                    max=64,
                    tooltip="Latent frames denoised together, as the checkpoint was trained: 3 or 1.",
                ),
                io.Int.Input(
                    "steps",
                    default=4,
                    min=1,
                    max=100,
                    tooltip="Denoising steps a chunk; the pass that writes the memory is added.",
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance. Any value but 1 takes twice the time and the memory of past frames.",
                ),
                io.Int.Input("batch", default=1, min=1, max=64, tooltip="Videos made at the same time."),
                io.Float.Input(
                    "budget_gb",
                    optional=True,
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.5,
                    tooltip=(
                        "Memory that the run may take, in GB. Where the settings need more, MODEL gets smaller ones "
                        "that fit, or the node stops and says what is missing. 0: only estimate."
                    ),
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="The VAE that will decode. Its weights and its work are then counted, too.",
                ),
                io.Boolean.Input(
                    "measure",
                    optional=True,
                    default=True,
                    tooltip=(
                        "Tries one layer with random weights on the device, for less than a few seconds, to tell the "
                        "speed. Off: memory only."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL",
                    tooltip="The model as it came, or with smaller settings where budget_gb asks for them.",
                ),
                io.String.Output(
                    display_name="text", tooltip="The estimate in words, as it stands on the node."
                ),
                io.Image.Output(
                    display_name="IMAGE",
                    tooltip="The memory as bars, beside that of the presets and of mode dense.",
                ),
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
        seconds: float,
        chunk_frames: int,
        steps: int,
        cfg: float,
        batch: int,
        budget_gb: float = 0.0,
        vae: Any = None,
        measure: bool = True,
    ) -> io.NodeOutput:
        network = require_wan(model)
        plan = Plan(
            shape=WanShape.of(network),
            width=width,
            height=height,
            latent_frames=latent_frames_for(max(1, round(seconds * FPS)), chunk_frames),
            chunk_frames=chunk_frames,
            attention=attention_of(model),
            batch=batch,
            sides=1 if cfg == 1.0 else 2,
            passes=steps + 1,
            dtype=inference_dtype(model.model),
            options=fast_options(model.model_options["transformer_options"]),
        )
        plan.validate()
        estimate = Estimate(model, vae, plan)
        fitting = plan
        if budget_gb > 0:
            fitting = fit_budget(plan, int(budget_gb * 1e9), estimate.need)
            if fitting != plan:
                fast = fast_options(model.model_options["transformer_options"])
                model = patch_model(model, fitting.attention, fast)
            estimate = replace(estimate, plan=fitting)
        text = "\n".join(
            [*estimate.lines(changed=fitting != plan), estimate.speed() if measure else ""]
        ).strip()
        show_text(text, cls.hidden.unique_id)
        return io.NodeOutput(model, text, as_image(estimate.chart()), ui=ui.PreviewText(text))


@dataclass(frozen=True)
class Estimate:
    """The figures of one plan for the host's MODEL and VAE, as lines and as bars."""

    model: Any
    vae: Any
    plan: Plan

    @property
    def weights(self) -> int:
        """Bytes of the weights that stay on the device during the run."""
        return self.model.model_size() + (self.vae.patcher.model_size() if self.vae is not None else 0)

    @property
    def decode(self) -> int:
        """Bytes that the host expects to need for decoding a chunk."""
        if self.vae is None:
            return 0
        require_wan_vae(self.vae)
        return int(self.vae.memory_used_decode(self._latent(), self.vae.vae_dtype))

    def need(self, plan: Plan) -> Need:
        """The larger of our bound and the host's own estimate of a pass counts."""
        host = plan.sides * self.model.model.memory_required(self._latent())
        return Need(self.weights, memory_bytes(plan), max(activation_bytes(plan), int(host)), self.decode)

    def _latent(self) -> list[int]:
        plan = self.plan
        return [plan.batch, LATENT_CHANNELS, plan.chunk_frames, plan.height // 8, plan.width // 8]

    def lines(self, changed: bool) -> Iterator[str]:
        plan, need = self.plan, self.need(self.plan)
        shape = plan.shape
        yield (
            f"{plan.width} x {plan.height}, {pixel_frames(plan.latent_frames)} frames in "
            f"{-(-plan.latent_frames // plan.chunk_frames)} chunks; {shape.layers} layers of width {shape.dim}, "
            f"{str(plan.dtype).removeprefix('torch.')}"
        )
        yield f"{'Settings that fit: ' if changed else ''}{describe(plan.attention)}"
        yield (
            ", ".join(f"{name} {gigabytes(size)}" for name, size in parts(need))
            + f": {gigabytes(need.total)}"
        )
        if away := host_bytes(plan):
            yield f"In the computer's memory: {gigabytes(away)} of past frames, copied once a pass."
        yield _against_the_device(need.total, self.model.load_device)
        if self.vae is None:
            yield "Decoding is not counted: connect a VAE."

    def speed(self) -> str:
        """The expected time of a chunk, from one layer that is tried."""
        plan = self.plan
        seconds = layer_seconds(plan, self.model.load_device)
        if seconds is None:
            return "Speed: not tried, one layer alone would take too long or too much memory. See Benchmark."
        chunk = chunk_seconds(plan, seconds)
        return (
            f"Speed: {chunk:.3g} s a chunk, {plan.batch * 4 * plan.chunk_frames / chunk:.3g} frames a second, from one "
            "layer with random weights; without decoding and without moving weights."
        )

    def chart(self) -> Any:
        """Bars of these settings, of the presets and of mode dense."""
        plans = {"these settings": self.plan}
        for name, attention in {**CHOICES, "dense": AttentionConfig(mode="dense")}.items():
            plans[name] = replace(self.plan, attention=attention)
        bars = {}
        for name, plan in plans.items():
            try:
                plan.validate()
            except ValueError:
                continue  # a preset in chunks of another length
            work = pass_flops(plan) / pass_flops(plans["dense"])
            bars[f"{name}, {work:.0%}"] = parts(self.need(plan))
        total = comfy.model_management.get_total_memory(self.model.load_device)
        device = ("device", float(total))
        longest = max(sum(size for _, size in bar) for bar in bars.values())
        title = (
            "Memory at most; behind each name its work a chunk against mode dense, at the end of the video"
        )
        return bar_chart(title, bars, gigabytes, device if total < 4 * longest else None)


def describe(attention: AttentionConfig) -> str:
    """The settings that matter to memory, for people."""
    if attention.mode == "dense":
        return "mode dense, every frame"
    if attention.mode == "window":
        return f"mode window, window_frames {attention.window_frames}, sink_frames {attention.sink_frames}"
    return (
        f"mode sparse, window_frames {attention.window_frames}, persistent_frames {attention.persistent_frames}, "
        f"topk {attention.topk:g}, pages in {attention.page_bits} bits"
        + (" in the computer's memory" if attention.offload_pages else "")
    )


def _against_the_device(total: int, device: Any) -> str:
    have = comfy.model_management.get_total_memory(device)
    free = comfy.model_management.get_free_memory(device)
    if total <= free:
        verdict = "fits into what is free now"
    elif total <= 0.9 * have:
        verdict = "fits once ComfyUI has unloaded other models"
    else:
        verdict = "does not fit as a whole: ComfyUI will offload weights, which is slow. Set budget_gb"
    return f"{device}: {gigabytes(have)}, {gigabytes(free)} free: {verdict}."
