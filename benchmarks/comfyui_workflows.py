"""The workflows of workflows/api/ on a running ComfyUI: twice, cancelled in mid-run, and again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfyui_graphs import WORLD, WORLD_CLIP, WORLD_VAE, Graph, node
from comfyui_results import GB, log_errors

if TYPE_CHECKING:
    from comfyui_client import Run
    from comfyui_jobs import Jobs

LEAK_BYTES = 512 * 2**20  # what a second round of the same workflows may leave behind
SMALL = {"seconds": 1.0, "length": 21}
LONG = {"seconds": 120.0, "length": 801, "chunks": 60}  # not finished before the interrupt comes
WORKFLOWS = Path(__file__).resolve().parent.parent / "workflows" / "api"
# Loader -> (input, what replaces a file that the server lacks).
LOADERS = {
    "UNETLoader": "unet_name",
    "VAELoader": "vae_name",
    "CLIPLoader": "clip_name",
    "LoraLoaderModelOnly": "lora_name",
}


async def run_workflows(jobs: Jobs) -> None:
    """Each workflow twice, and then each cancelled and run again; adds a record per run and one of what they left."""
    args, listed = jobs.args, jobs.listed
    loras = [name for name in listed.get("LoraLoaderModelOnly", []) if "random" in name]
    fallback = {"UNETLoader": args.model, "VAELoader": args.vae, "CLIPLoader": WORLD}
    fallback["LoraLoaderModelOnly"] = loras[0] if loras else ""
    start = args.log.stat().st_size if args.log else 0
    found = read_workflows(listed, fallback)
    await jobs.client.free()
    before, after = await jobs.free_bytes(), []
    for attempts in (("first", "second"), ("cancelled", "after a cancel")):
        for workflow in found:
            for attempt in attempts:
                await run_workflow(jobs, workflow, attempt)
        await jobs.client.free()
        after.append(await jobs.free_bytes())
    lost = after[0] - after[1]
    problems = log_errors(args.log, start) if args.log else []
    if lost > LEAK_BYTES:
        problems.append(f"the second round left {lost / GB:.2f} GB less free than the first")
    jobs.add(
        "workflows", error="; ".join(problems) or None, free_before_gb=before / GB, lost_gb=lost / GB,
        free_after_gb=[free / GB for free in after],
    )  # fmt: skip


async def run_workflow(jobs: Jobs, workflow: Workflow, attempt: str) -> None:
    """Run one, interrupted where `attempt` is "cancelled", and add its record."""
    cancelled, changes = attempt == "cancelled", {}
    if jobs.args.time < 1:
        changes = SMALL | {"width": jobs.graphs.width, "height": jobs.graphs.height}
    graph = workflow.seeded(jobs.next_seed(), changes | (LONG if cancelled else {}))
    run = await jobs.client.run(graph, in_mid_run if cancelled else None)
    error = run.error
    if cancelled and not error and run.outcome != "execution_interrupted":
        error = f"it was interrupted in mid-run and ended with {run.outcome}"
    jobs.add(
        f"workflow {workflow.name}, {attempt}", error=error, total_s=run.total_s, outcome=run.outcome,
        replaced=workflow.replaced,
    )  # fmt: skip


def in_mid_run(run: Run) -> bool:
    return len(run.chunks) >= 2 or len(run.ticks) >= 6


@dataclass(frozen=True)
class Workflow:
    """A workflow of workflows/api/ and what had to be replaced in it to run on this server."""

    name: str
    graph: Graph
    replaced: list[str]

    def seeded(self, seed: int, changes: dict[str, Any]) -> Graph:
        """A copy that ComfyUI's cache does not answer for; `changes` replace inputs that are there."""
        graph = json.loads(json.dumps(self.graph))
        longer = 0.0
        for one in graph.values():
            inputs = one["inputs"]
            inputs |= {key: seed for key in ("seed", "noise_seed") if key in inputs}
            inputs |= {key: value for key, value in changes.items() if key in inputs}
            if changes and one["class_type"] == "SparseForcingStreamVideo":
                inputs["seconds"] += longer  # a continued video is longer than the one before it
                longer += 1.0
            if one["class_type"] == "SparseForcingBenchmark":
                inputs["chunks"] += seed % 4  # it has no seed
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
