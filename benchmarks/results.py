"""Write docs/results.md from docs/results/*.json: one table per file.

python benchmarks/results.py            writes the page
python benchmarks/results.py --check    exits 1 where the page is not what the files say
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).resolve().parent.parent / "docs"
FOLDER, PAGE = DOCS / "results", DOCS / "results.md"
HEAD = """# Results

Written by `benchmarks/results.py` from the JSON files in `docs/results`; do not edit. Figures in bold miss their goal.
`python benchmarks/comfyui.py --help` says how a running ComfyUI is timed: its own `main.py`, graphs queued over HTTP,
times taken at a websocket client, random weights of published shapes, 832x480, 4 steps and a clean pass per chunk of 3
latent frames (12 video frames).
"""


MEMORY = ("free_gb", "peak_gb", "estimate_gb")  # of a record on an imitated smaller card


class Goal(NamedTuple):
    """What a figure says, and the bound it should keep."""

    text: str
    sign: str  # "<=" or ">="
    bound: float

    def met(self, value: float) -> bool:
        return value <= self.bound if self.sign == "<=" else value >= self.bound


# Names of a `summary` in the order of the table.
GOALS = {
    "sampler_over_engine": Goal("Sampler, sparse: steady chunk time over the engine's", "<=", 1.03),
    "stream_tiny_fps": Goal("Stream Video, tiny VAE: FPS", ">=", 55),
    "stream_tiny_shared_fp8_fps": Goal("Stream Video, tiny VAE, `shared + fp8`: FPS", ">=", 85),
    "stream_wan_fps": Goal("Stream Video, Wan VAE: FPS", ">=", 40),
    "dense_over_core": Goal("5 s, dense: core's SamplerARVideo time over ours", ">=", 1.8),
    "sparse_over_core": Goal("5 s, sparse: core's SamplerARVideo time over ours", ">=", 2.2),
    "slow_path_over_core": Goal("5 s, `fast_pass` off: our time over core's", "<=", 1.0),
    "fp8_checkpoint_over_bf16": Goal("fp8-scaled checkpoint: speed over bf16's", ">=", 0.85),
    "gguf_over_bf16": Goal("GGUF Q8_0 checkpoint: speed over bf16's", ">=", 0.85),
    "first_picture_s": Goal("First chunk in the player after the node starts, warm: s", "<=", 0.4),
    "first_run_s": Goal("First chunk of a fresh install, cold Triton cache: s", "<=", 20),
    "autosave_slowdown": Goal("Time with `autosave_chunks` 4 over without", "<=", 1.05),
    "fps_14b": Goal("14B shape, tiny VAE: FPS", ">=", 8.9),
    "fps_14b_fp8": Goal("14B shape, tiny VAE, `shared + fp8`: FPS", ">=", 12),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check, text = parser.parse_args().check, page()
    if not check:
        PAGE.write_text(text, encoding="utf-8")
        print(f"wrote {PAGE}")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print(f"{PAGE} is not what {FOLDER} says: run python benchmarks/results.py")
    return 1


def page(folder: Path = FOLDER) -> str:
    """The whole page."""
    files = sorted(folder.glob("*.json"))
    tables = [table(path.stem, json.loads(path.read_text(encoding="utf-8"))) for path in files]
    return "\n".join([HEAD, *(tables or ["No results yet.\n"])])


def table(title: str, found: dict[str, Any]) -> str:
    """One file's section: a column per run; first the figures with goals, then the others by name."""
    runs = {label: run.get("summary", {}) for label, run in found.get("runs", {}).items()}
    runs = runs or {"value": found.get("summary", {})}
    names = [name for name in GOALS if any(name in run for run in runs.values())]
    names += sorted({name for run in runs.values() for name in run} - set(GOALS))
    lines = [f"## {title}", "", f"{found.get('machine', 'machine not recorded')}.", ""]
    lines += [f"| | goal | {' | '.join(runs)} |", f"|---|---|{'---|' * len(runs)}"]
    for name in names:
        goal = GOALS.get(name)
        what = f"{goal.text} (`{name}`)" if goal else f"`{name}`"
        bound = f"{goal.sign} {goal.bound:g}" if goal else ""
        cells = (cell(run.get(name), goal) for run in runs.values())
        lines.append(f"| {what} | {bound} | {' | '.join(cells)} |")
    lines.append("")
    for label, run in (found.get("runs") or {"": found}).items():
        commands = ", ".join(f"`{command}`" for command in run.get("commands", [run.get("command", "")]))
        facts = [label, run.get("date", ""), versions(run.get("versions", {})), commands]
        lines.append("- " + "; ".join(filter(None, facts)))
    for label, run in found.get("runs", {}).items():
        lines += records(label, run.get("records", []))
    return "\n".join(lines) + "\n"


def records(label: str, found: list[dict[str, Any]]) -> list[str]:
    """A table of one run's jobs; workflows that ran well are only counted."""
    shown = [one for one in found if one["error"] or one["chunk_s"]]
    lines = [
        "",
        f"### {label}",
        "",
        "| job | ms per chunk | FPS | first chunk, s | |",
        "|---|---|---|---|---|",
    ]
    for one in shown:
        chunk = None if one["chunk_s"] is None else 1000 * one["chunk_s"]
        cells = [f"{value:.3g}" if value else "" for value in (chunk, one["fps"], one["first_chunk_s"])]
        notes = [f"failed: {one['error'].splitlines()[0][:120]}"] if one["error"] else []
        notes += [f"{key.removesuffix('_gb')} {one[f'{key}']:.1f} GB" for key in MEMORY if one.get(key)]
        lines.append(f"| {one['name']} | {' | '.join(cells)} | {', '.join(notes).replace('|', '/')} |")
    if more := len(found) - len(shown):
        lines += ["", f"{more} further checks ran without an error."]
    return lines


def cell(value: float | None, goal: Goal | None) -> str:
    """A figure; in bold where it misses its goal."""
    if value is None:
        return "not measured"
    return f"**{value:.3g}**" if goal and not goal.met(value) else f"{value:.3g}"


def versions(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())


if __name__ == "__main__":
    raise SystemExit(main())
