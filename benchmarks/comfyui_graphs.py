"""The graphs that comfyui.py queues, in ComfyUI's API format; node ids say what a node is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORLD, WORLD_CLIP, WORLD_VAE = "world", 1, 2
STREAM, SAMPLE, ESTIMATE = "stream", "sample", "estimate"
PROMPT = "a large red circle bouncing and a small white star standing still over a navy plain background. "
CHUNK_FRAMES = 3  # latent frames
FPS = 16
WORKFLOWS = Path(__file__).resolve().parent.parent / "workflows" / "api"
# Loader -> (input, what replaces a file that the server lacks).
LOADERS = {
    "UNETLoader": "unet_name",
    "VAELoader": "vae_name",
    "CLIPLoader": "clip_name",
    "LoraLoaderModelOnly": "lora_name",
}

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


@dataclass(frozen=True)
class Workflow:
    """A workflow of workflows/api/ and what had to be replaced in it to run on this server."""

    name: str
    graph: Graph
    replaced: list[str]

    def seeded(self, seed: int, small: dict[str, Any]) -> Graph:
        """A copy that ComfyUI's cache does not answer for; `small`: inputs that replace existing ones."""
        graph = json.loads(json.dumps(self.graph))
        longer = 0.0
        for one in graph.values():
            inputs = one["inputs"]
            inputs |= {key: seed for key in ("seed", "noise_seed") if key in inputs}
            inputs |= {key: value for key, value in small.items() if key in inputs}
            if small and one["class_type"] == "SparseForcingStreamVideo":
                inputs["seconds"] += longer  # a continued video is longer than the one before it
                longer += 1.0
            if one["class_type"] == "SparseForcingBenchmark":
                inputs["chunks"] += seed % 3
        return graph


def read_workflows(listed: dict[str, list[str]], fallback: dict[str, str]) -> list[Workflow]:
    """Every API workflow of the pack.

    listed: loader node -> files that the server has. fallback: loader -> file instead; a text encoder is replaced by
    the world model's, and a LoRA loader without a file is left out.
    """
    found = []
    for path in sorted(WORKFLOWS.glob("*.json")):
        graph, replaced = json.loads(path.read_text(encoding="utf-8")), []
        for key, one in list(graph.items()):
            kind, name = one["class_type"], LOADERS.get(one["class_type"])
            if name is None or one["inputs"][name] in listed.get(kind, []):
                continue
            instead = fallback.get(kind, "")
            replaced.append(f"{one['inputs'][name]} -> {instead or 'none'}")
            if kind == "CLIPLoader":
                graph[key] = node("SparseForcingWorldModel")
                relink(graph, [key, 0], [key, WORLD_CLIP])
            elif instead == WORLD:
                graph[key] = node("SparseForcingWorldModel")
                relink(graph, [key, 0], [key, WORLD_VAE])
            elif instead:
                one["inputs"][name] = instead
            elif kind == "LoraLoaderModelOnly":
                relink(graph, [key, 0], one["inputs"]["model"])
                del graph[key]
        found.append(Workflow(path.stem, graph, replaced))
    return found


def relink(graph: Graph, old: list, new: list) -> None:
    """Make every input that reads `old` read `new`."""
    for one in graph.values():
        one["inputs"] = {key: new if value == old else value for key, value in one["inputs"].items()}
