"""The graphs that comfyui.py queues, in ComfyUI's API format; node ids say what a node is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

WORLD, WORLD_CLIP, WORLD_VAE = "world", 1, 2
STREAM, SAMPLE, ESTIMATE = "stream", "sample", "estimate"
PROMPT = "a large red circle bouncing and a small white star standing still over a navy plain background. "
CHUNK_FRAMES = 3  # latent frames
FPS = 16

Graph = dict[str, dict[str, Any]]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


@dataclass(frozen=True)
class Graphs:
    """What all graphs of a measurement share: size, text encoder, VAEs, blocks.

    cond: "world" for the pack's own small text encoder, else a file for CLIPLoader. VAEs: files, or "world".
    """

    width: int
    height: int
    cond: str
    vae: str
    tiny_vae: str
    block_tokens: int

    def base(self, model: str, apply: dict[str, Any] | None) -> tuple[Graph, list]:
        """(loaders of a model and its conditioning, the link to the model); apply None: no node of ours."""
        graph: Graph = {WORLD: node("SparseForcingWorldModel")}
        clip = [WORLD, WORLD_CLIP]
        if self.cond != WORLD:
            graph["clip"], clip = (
                node("CLIPLoader", clip_name=self.cond, type="wan", device="default"),
                ["clip", 0],
            )
        graph["cond"] = node("CLIPTextEncode", text=PROMPT * 8, clip=clip)
        kind = "UnetLoaderGGUF" if model.endswith(".gguf") else "UNETLoader"
        graph["model"] = node(kind, unet_name=model)
        if kind == "UNETLoader":
            graph["model"]["inputs"]["weight_dtype"] = "default"
        if apply is None:
            return graph, ["model", 0]
        settings = {
            "mode": "sparse", "window_frames": 6, "persistent_frames": 6, "topk": 0.25, "sink_frames": 3,
            "positions": "absolute", "block_tokens": self.block_tokens, "backend": "auto",
        }  # fmt: skip
        graph["apply"] = node("SparseForcingApply", model=["model", 0], **(settings | apply))
        return graph, ["apply", 0]

    def _vae(self, graph: Graph, tiny: bool) -> list:
        name = self.tiny_vae if tiny else self.vae
        if name == WORLD:
            return [WORLD, WORLD_VAE]
        graph["vae"] = node("VAELoader", vae_name=name)
        return ["vae", 0]

    def sampler(self, model: str, frames: int, seed: int, apply: dict[str, Any] | None = None) -> Graph:
        """SamplerCustomAdvanced over `frames` latent frames: core's SamplerARVideo without `apply`, ours with it."""
        graph, link = self.base(model, apply)
        own = node("SparseForcingSampler", chunk_frames=CHUNK_FRAMES, first_steps=0)
        core = node("SamplerARVideo", num_frame_per_block=CHUNK_FRAMES)
        size = {"width": self.width, "height": self.height}
        return graph | {
            "guider": node("BasicGuider", model=link, conditioning=["cond", 0]),
            "sigmas": node("BasicScheduler", model=link, scheduler="simple", steps=4, denoise=1.0),
            "noise": node("RandomNoise", noise_seed=seed),
            "sampler": core if apply is None else own,
            "latent": node("EmptyARVideoLatent", **size, length=frames * 4 - 3, batch_size=1),
            SAMPLE: node(
                "SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], sampler=["sampler", 0],
                sigmas=["sigmas", 0], latent_image=["latent", 0],
            ),
            "save": node("SaveLatent", samples=[SAMPLE, 0], filename_prefix="benchmark/latent"),
        }  # fmt: skip

    def stream(
        self, model: str, seconds: float, seed: int, apply: dict[str, Any], tiny: bool = True, **more: Any
    ) -> Graph:
        """Stream Video, `seconds` long; `more`: further inputs of the node."""
        graph, link = self.base(model, apply)
        graph[STREAM] = node(
            "SparseForcingStreamVideo", model=link, positive=["cond", 0], vae=self._vae(graph, tiny),
            width=self.width, height=self.height, seconds=seconds, seed=seed, steps=4, cfg=1.0,
            chunk_frames=CHUNK_FRAMES, fps=FPS, filename_prefix="benchmark/video", **more,
        )  # fmt: skip
        return graph

    def estimate(self, model: str, seconds: float, apply: dict[str, Any], tiny: bool = True) -> Graph:
        """SparseForcingEstimate of what `stream` makes; the text is among its outputs."""
        graph, link = self.base(model, apply)
        graph[ESTIMATE] = node(
            "SparseForcingEstimate", model=link, vae=self._vae(graph, tiny), width=self.width, height=self.height,
            seconds=seconds, chunk_frames=CHUNK_FRAMES, steps=4, cfg=1.0, batch=1, budget_gb=0.0, measure=False,
        )  # fmt: skip
        return graph
