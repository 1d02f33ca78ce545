"""Sparse Forcing Sampler: the SAMPLER for SamplerCustomAdvanced."""

from __future__ import annotations

from .host import io
from .streaming import StreamSampler


class SparseForcingSampler(io.ComfyNode):
    """Schema of the sampler; the loop is in `streaming.StreamSampler`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SparseForcingSampler",
            display_name="Sparse Forcing Sampler",
            category="model/sampling/samplers",
            description=(
                "Denoises a video chunk by chunk, each chunk attending to the memory of those before it. Takes the "
                "place of Sampler AR Video in SamplerCustomAdvanced; for any Wan text-to-video model and any CFG."
            ),
            search_aliases=[
                "autoregressive video",
                "self forcing",
                "causal forcing",
                "AR sampler",
                "longlive",
            ],
            inputs=[
                io.Int.Input(
                    "chunk_frames",
                    default=3,
                    min=1,
                    max=64,
                    tooltip=(
                        "Latent frames denoised together. Use what the checkpoint was trained with: 3 for chunk-wise "
                        "models (Self-Forcing, LongLive), 1 for frame-wise ones. One latent frame is 4 video frames."
                    ),
                ),
                io.Int.Input(
                    "first_steps",
                    optional=True,
                    default=0,
                    min=0,
                    max=100,
                    advanced=True,
                    tooltip=(
                        "Denoising steps of the opening chunk, which decides where everything is. 0: what the loaded "
                        "model asks for (Load World Model: 16), else as many as the other chunks."
                    ),
                ),
            ],
            outputs=[
                io.Sampler.Output(
                    display_name="SAMPLER",
                    tooltip="For SamplerCustomAdvanced. Attention is as Apply Sparse Forcing says, dense without it.",
                )
            ],
        )

    @classmethod
    def execute(cls, chunk_frames: int, first_steps: int = 0) -> io.NodeOutput:
        return io.NodeOutput(StreamSampler(chunk_frames, first_steps=first_steps))
