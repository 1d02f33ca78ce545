"""Sparse Forcing Sampler: the SAMPLER for SamplerCustomAdvanced."""

from __future__ import annotations

from comfy_api.latest import io

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
            ],
            outputs=[
                io.Sampler.Output(
                    display_name="SAMPLER",
                    tooltip="For SamplerCustomAdvanced. Attention is as Apply Sparse Forcing says, dense without it.",
                )
            ],
        )

    @classmethod
    def execute(cls, chunk_frames: int) -> io.NodeOutput:
        return io.NodeOutput(StreamSampler(chunk_frames))
