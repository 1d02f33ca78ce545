"""Apply Sparse Forcing: choose what a chunk may attend to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..sparse_attn.config import AttentionConfig, positions_in
from ..sparse_attn.fast_weights import SHORTCUTS
from .hooks import patch_model
from .host import io
from .session import default_block_tokens


class SparseForcingApply(io.ComfyNode):
    """Schema of the patch; the hooks are in `hooks.patch_model`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SparseForcingApply",
            display_name="Apply Sparse Forcing",
            category="model/patch",
            description=(
                "Gives a Wan text-to-video model a bounded memory of past frames, read sparsely, so that long videos "
                "cost the same time and memory per second as short ones. Takes effect with the Sparse Forcing Sampler."
            ),
            search_aliases=[
                "PBSA",
                "block sparse attention",
                "persistent memory",
                "KV cache",
                "sliding window",
                "sink",
            ],
            inputs=[
                io.Model.Input(
                    "model", tooltip="A Wan 2.1 text-to-video model, causal or plain; LoRAs keep working."
                ),
                io.Combo.Input(
                    "mode",
                    options=["sparse", "window", "dense"],
                    default="sparse",
                    tooltip=(
                        "sparse: persistent memory, plus the most relevant blocks of a recent window. "
                        "window: all of a recent window and the sink, like Self-Forcing and LongLive. "
                        "dense: every past frame; memory grows with length."
                    ),
                ),
                io.Int.Input(
                    "window_frames",
                    default=6,
                    min=1,
                    max=1024,
                    tooltip=(
                        "Latent frames of the recent window, the chunk being denoised included; whole chunks. "
                        "In mode window this is everything attended, the sink included. "
                        "More is smoother motion and more memory."
                    ),
                ),
                io.Int.Input(
                    "persistent_frames",
                    default=6,
                    min=0,
                    max=1024,
                    tooltip=(
                        "Mode sparse: room for this many latent frames of the past's most important blocks, "
                        "the sink included. More keeps the subject steadier over minutes; less is faster."
                    ),
                ),
                io.Float.Input(
                    "topk",
                    default=0.25,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Mode sparse: share of the window's blocks that each query block reads. "
                        "Lower is faster; 1 reads the whole window."
                    ),
                ),
                io.Int.Input(
                    "sink_frames",
                    default=3,
                    min=0,
                    max=1024,
                    advanced=True,
                    tooltip=(
                        "First latent frames of the video, never forgotten. "
                        "They hold the scene together; too many freeze motion."
                    ),
                ),
                io.Combo.Input(
                    "positions",
                    options=["absolute", "rebased"],
                    default="absolute",
                    advanced=True,
                    tooltip=(
                        "absolute: frames are counted from the start, as the checkpoints were trained; up to 1024 "
                        "latent frames (4 minutes). rebased: distances stay within the trained range, for any length; "
                        "Load World Model was trained so. Mode dense counts absolutely either way."
                    ),
                ),
                io.Int.Input(
                    "block_tokens",
                    default=0,
                    min=0,
                    max=128,
                    step=16,
                    advanced=True,
                    tooltip=(
                        "Tokens per memory block; 16, 32, 64 and 128 have fast kernels. 0: what the loaded model was "
                        "trained with (Load World Model: 64), else what is fastest on this GPU: 128 on Hopper (H100, "
                        "H200), 64 elsewhere. Set a number where different GPUs have to make the same video."
                    ),
                ),
                io.Combo.Input(
                    "backend",
                    options=["auto", "triton", "reference"],
                    default="auto",
                    advanced=True,
                    tooltip=(
                        "Attention kernel. auto takes the fastest that works here and logs which; "
                        "triton or reference run exactly that one or stop with the reason."
                    ),
                ),
                io.Boolean.Input(
                    "dense_first_chunk",
                    optional=True,
                    default=True,
                    advanced=True,
                    tooltip=(
                        "Mode sparse: the opening chunk reads all of itself. It costs nothing later, and everything "
                        "later builds on it. Off: topk there, too, as in the paper."
                    ),
                ),
                io.Float.Input(
                    "sink_ema",
                    optional=True,
                    default=0.0,
                    min=0.0,
                    max=0.5,
                    step=0.001,
                    round=0.0001,
                    advanced=True,
                    tooltip=(
                        "Mode window: how far the sink moves towards every chunk that leaves the window. "
                        "Reward Forcing is trained with 0.001; 0 lets it rest, as other models want it."
                    ),
                ),
                io.Boolean.Input(
                    "fast_pass",
                    optional=True,
                    default=True,
                    advanced=True,
                    tooltip=(
                        "Runs each pass by the pack's own fast kernels where nobody has changed the model; the same "
                        "numbers, faster. Off: always the host's own layers."
                    ),
                ),
                io.Combo.Input(
                    "keep",
                    optional=True,
                    options=["attention", "novelty"],
                    default="attention",
                    advanced=True,
                    tooltip=(
                        "Mode sparse: which blocks stay once they are older than the window. attention: those the "
                        "model looks at most, as in the paper. novelty: those least like anything newer or the "
                        "first frames; try it where things leave the picture and come back."
                    ),
                ),
                io.Combo.Input(
                    "page_bits",
                    optional=True,
                    options=["16", "8"],
                    default="16",
                    advanced=True,
                    tooltip=(
                        "Mode sparse: bits of a number in finished blocks. 8 halves the memory of past frames, at half "
                        "a percent of error; try it where the graphics card is too small."
                    ),
                ),
                io.Combo.Input(
                    "router",
                    optional=True,
                    options=["mean", "quarters"],
                    default="mean",
                    advanced=True,
                    tooltip=(
                        "Mode sparse: what the window's blocks are chosen by. mean: one vector a block, as in the "
                        "paper. quarters: four, which finds more of what the model wants to see, for some time."
                    ),
                ),
                io.Boolean.Input(
                    "offload_pages",
                    optional=True,
                    default=False,
                    advanced=True,
                    tooltip=(
                        "Mode sparse: the memory of past frames rests in the computer's memory and comes to the "
                        "graphics card layer by layer. The same video, slower; for cards that are too small."
                    ),
                ),
                io.Combo.Input(
                    "shortcuts",
                    optional=True,
                    options=["none", "shared", "shared + fp8"],
                    default="none",
                    advanced=True,
                    tooltip=(
                        "What the fast pass may leave out. shared: blocks are chosen once a chunk, and attention to "
                        "the persistent memory is computed once. shared + fp8: linear layers in 8 bits, too. Up to "
                        "half again as fast, at two to four percent of error."
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
    def execute(
        cls,
        model: Any,
        fast_pass: bool = True,
        page_bits: str = "16",
        shortcuts: str = "none",
        **settings: Any,
    ) -> io.NodeOutput:
        if settings.get("block_tokens") == 0:
            settings["block_tokens"] = default_block_tokens(model)
        attention = AttentionConfig(**settings, page_bits=8 if page_bits == "8" else 16)
        attention = replace(attention, positions=positions_in(attention.mode, attention.positions))
        if shortcuts != "none" and not fast_pass:
            raise ValueError(
                f"shortcuts {shortcuts!r} need the fast pass: switch fast_pass on, or use 'none'."
            )
        return io.NodeOutput(patch_model(model, attention, SHORTCUTS[shortcuts] if fast_pass else None))
