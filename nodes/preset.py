"""Sparse Forcing Preset: the patch of Apply Sparse Forcing with ready-made settings."""

from __future__ import annotations

from typing import Any

from ..sparse_attn.choices import CHOICES
from .hooks import patch_model
from .host import io


class SparseForcingPreset(io.ComfyNode):
    """Schema; the settings are in `sparse_attn.choices`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SparseForcingPreset",
            display_name="Sparse Forcing Preset",
            category="model/patch",
            description=(
                "Apply Sparse Forcing with ready-made settings: choose by what you want instead of by numbers. "
                "Takes the place of Apply Sparse Forcing."
            ),
            search_aliases=["PBSA", "low VRAM", "quality", "speed", "persistent memory", "KV cache"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="A Wan 2.1 text-to-video model, causal or plain; LoRAs keep working."
                ),
                io.Combo.Input(
                    "preset",
                    options=["paper", "quality", "speed", "low VRAM"],
                    default="paper",
                    tooltip=(
                        "Memory for Wan 1.3B at 832 x 480, and work a chunk against attending to all of 5 seconds. "
                        "paper: 2.7 GB, 55 %. quality: remembers 21 frames, 5.4 GB, 80 %. speed: reads half as much "
                        "of the recent window, 2.7 GB, 53 %. low VRAM: remembers 9 frames, 1.8 GB, 45 %."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL",
                    tooltip="The patched model. Samplers other than the Sparse Forcing Sampler find it unchanged.",
                )
            ],
        )

    @classmethod
    def execute(cls, model: Any, preset: str) -> io.NodeOutput:
        return io.NodeOutput(patch_model(model, CHOICES[preset]))
