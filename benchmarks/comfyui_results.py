"""Records of comfyui.py's jobs, what they sum up to, and the file that they go into."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfyui_graphs import CHUNK_FRAMES, ESTIMATE, STREAM
from results import GOALS

if TYPE_CHECKING:
    from comfyui_client import Run  # it imports aiohttp

Record = dict[str, Any]
GB = 1e9
LOG_ERROR = re.compile(r"\bERROR\b|Traceback")
NO_FLAGS = "no flags"
# Flags that say where a server listens and keeps its files, with the number of their values.
PLACES = {
    "--listen": 1, "--port": 1, "--front-end-root": 1, "--base-directory": 1, "--output-directory": 1,
    "--input-directory": 1, "--temp-directory": 1, "--user-directory": 1, "--database-url": 1,
    "--disable-auto-launch": 0, "--disable-api-nodes": 0,
}  # fmt: skip
# Summary name -> (field, record), or (field, record over the other record).
FIGURES: dict[str, tuple[str, str] | tuple[str, str, str]] = {
    "sampler_over_engine": ("chunk_s", "sparse_15s", "engine"),
    "stream_tiny_fps": ("fps", "stream_tiny"),
    "stream_tiny_shared_fp8_fps": ("fps", "stream_shared_fp8"),
    "stream_wan_fps": ("fps", "stream_wan"),
    "dense_over_core": ("node_s", "core_5s", "dense_5s"),
    "sparse_over_core": ("node_s", "core_5s", "sparse_5s"),
    "slow_path_over_core": ("node_s", "slow_5s", "core_5s"),
    "fp8_checkpoint_over_bf16": ("fps", "stream_fp8_checkpoint", "stream_tiny"),
    "gguf_over_bf16": ("fps", "stream_gguf", "stream_tiny"),
    "first_picture_s": ("first_chunk_s", "stream_tiny"),
    "first_run_s": ("first_chunk_s", "first_run"),
    "autosave_slowdown": ("node_s", "stream_autosave", "stream_tiny"),
    "fps_14b": ("fps", "stream_14b"),
    "fps_14b_fp8": ("fps", "stream_14b_fp8"),
}


def of_stream(run: Run) -> dict[str, Any]:
    """Fields of a record of Stream Video."""
    if run.error or not run.chunks:
        return {"error": run.error or f"no chunk came ({run.outcome})"}
    chunk_s = run.chunk_s()
    return {
        "chunk_s": chunk_s, "fps": 4 * CHUNK_FRAMES / chunk_s, "first_chunk_s": run.first_chunk_s(STREAM),
        "node_s": run.node_s(STREAM), "chunks": len(run.chunks),
        "cache_gb": run.chunks[-1][1].get("cache_bytes", 0) / GB,
    }  # fmt: skip


def estimated_gb(run: Run) -> float | None:
    """The total of Estimate's text: "weights 2.8 GB, ...: 7.1 GB"."""
    text = "\n".join(str(line) for line in run.outputs.get(ESTIMATE, {}).get("text", []))
    totals = re.findall(r"^weights .*: ([\d.]+) (GB|MB)", text, re.MULTILINE)
    return float(totals[0][0]) * (1 if totals[0][1] == "GB" else 1e-3) if totals else None


def log_errors(log: Path, start: int) -> list[str]:
    """Lines of the log after byte `start` that tell of an error."""
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    return [f"log: {line[:200]}" for line in lines if LOG_ERROR.search(line)][:10]


def summary_of(records: list[Record]) -> dict[str, float]:
    """The figures whose records are all there and without error."""
    good = {record["name"]: record for record in records if not record["error"]}
    found = {}
    for name, (field, *of) in FIGURES.items():
        values = [good.get(record, {}).get(field) for record in of]
        if all(values):
            found[name] = round(values[0] / values[1] if len(values) == 2 else values[0], 4)
    return found


def where_it_ran(stats: dict[str, Any], machine: str) -> dict[str, Any]:
    """Machine, flags and versions of a server, from its /system_stats."""
    system, device = stats["system"], stats["devices"][0]
    versions = {"ComfyUI": "comfyui_version", "torch": "pytorch_version", "Python": "python_version"}
    return {
        "machine": machine or gpu_name(device["name"]),
        "flags": flags_of(system.get("argv", [])),
        "argv": system.get("argv", []),
        "versions": {name: str(system.get(key, "?")).split(" ")[0] for name, key in versions.items()},
        "device": device["name"],
    }


def gpu_name(device: str) -> str:
    """ComfyUI's "cuda:0 NVIDIA H200 : cudaMallocAsync" without the index and the allocator."""
    return device.split(" : ")[0].removeprefix("cuda:0 ")


def flags_of(argv: list[str]) -> str:
    """A server's flags without those that say where it is: what a run is called."""
    rest, left = list(argv[1:]), []
    while rest:
        flag = rest.pop(0)
        if flag in PLACES:
            del rest[: PLACES[flag]]
        else:
            left.append(flag)
    return " ".join(left) or NO_FLAGS


def merged(
    path: Path | None, facts: dict[str, Any], records: list[Record], summary: dict[str, float]
) -> dict[str, Any]:
    """The file's content with this run in it; its `summary` is that of the server without flags.

    Records of the same flags and other names stay, and so do summary figures that this run has not measured.
    """
    old = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else {}
    runs = old.get("runs", {})
    label = facts["flags"]
    before = runs.get(label, {})
    made = {record["name"] for record in records}
    kept = [record for record in before.get("records", []) if record["name"] not in made]
    command = facts["command"]
    commands = [*(one for one in before.get("commands", []) if one != command), command]
    figures = {
        name: value
        for name, value in before.get("summary", {}).items()
        if name in FIGURES and not made & set(FIGURES[name][1:])
    }
    runs[label] = facts | {"commands": commands, "summary": figures | summary, "records": kept + records}
    plain = runs.get(NO_FLAGS, {})
    return {
        "machine": facts["machine"],
        "date": plain.get("date"),
        "command": "; ".join(plain.get("commands", [])),
        "summary": plain.get("summary", {}),
        "runs": runs,
    }


def plot(summary: dict[str, float], path: Path) -> None:
    """Bars of each figure against its goal, which is the line; longer is better."""
    from PIL import Image, ImageDraw

    rows = [name for name in GOALS if name in summary]
    left, scale, step = 330, 260, 26
    image = Image.new("RGB", (left + 2 * scale + 90, step * (len(rows) + 1) + 10), "white")
    draw = ImageDraw.Draw(image)
    for row, name in enumerate(rows):
        goal, value, top = GOALS[name], summary[name], 8 + row * step
        reached = value / goal.bound if goal.sign == ">=" else goal.bound / value
        colour = (90, 170, 90) if goal.met(value) else (214, 69, 65)
        draw.text((8, top), f"{name} {goal.sign} {goal.bound:g}", fill="black")
        draw.rectangle((left, top, left + min(2.0, reached) * scale, top + 14), fill=colour)
        draw.text((left + min(2.0, reached) * scale + 6, top), f"{value:.3g}", fill="black")
    draw.line((left + scale, 4, left + scale, 4 + step * len(rows)), fill="black", width=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
