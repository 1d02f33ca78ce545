"""Memory Map: a picture of what the model still remembers of a video."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..sparse_attn.memory_map import draw_memory_map, read_memory_map
from ..sparse_attn.session import Session
from .host import io
from .keeping import SESSION
from .stream_video import SparseForcingStreamVideo


class SparseForcingMemoryMap(io.ComfyNode):
    """Schema; the map is made by `sparse_attn.memory_map`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SparseForcingMemoryMap",
            display_name="Memory Map (Sparse Forcing)",
            category="video",
            description=(
                "Draws what the model remembers of a video: which blocks of which frames its layers and heads keep in "
                "persistent memory, beside the sink and the window. Only for mode sparse."
            ),
            search_aliases=["kv cache", "attention map", "what the model remembers", "persistent memory"],
            inputs=[
                SESSION.Input(
                    "session", tooltip="The SESSION of Stream Video or Load Session, of mode sparse."
                ),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip=(
                        "All frames of the session's video, to draw the map over: from Get Video Components or VAE "
                        "Decode. Without them the map is drawn on grey."
                    ),
                ),
                io.Int.Input(
                    "layer",
                    default=-1,
                    min=-1,
                    max=1000,
                    optional=True,
                    tooltip="Only this layer's memory, counted from 0. -1: all together, brighter where more agree.",
                ),
                io.Int.Input(
                    "head",
                    default=-1,
                    min=-1,
                    max=1000,
                    optional=True,
                    tooltip="Only this head's memory, counted from 0. -1: all together, brighter where more agree.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="IMAGE",
                    tooltip="The map as one picture, for Preview Image or Save Image.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, session: Session | None, images: Tensor | None = None, layer: int = -1, head: int = -1
    ) -> io.NodeOutput:
        if session is None:
            SparseForcingStreamVideo.steered += 1  # makes the host run it again
            raise ValueError(
                "The video was made when nothing asked for its session, so none was kept. "
                "Queue the prompt again: it is made anew, with its session."
            )
        snapshot = next(
            iter(session.memory.values()), {}
        )  # the first prompt's; of a guided run, the positive one
        picture = draw_memory_map(read_memory_map(snapshot), images, layer, head)
        return io.NodeOutput(torch.from_numpy(np.asarray(picture, np.float32) / 255)[None])
