"""Measured numbers as rows, a table with 95 % intervals, and curves."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .plots import curve_plot
from .world_metrics import ACCURACY, DRIFT

RESAMPLES = 2000


class Row(NamedTuple):
    """One number: of which variant, which metric, after how many seconds (or of absence), which prompt and seed."""

    name: str
    metric: str
    seconds: float
    prompt: int
    seed: int
    value: float


def read_rows(path: Path) -> list[Row]:
    """Rows of an earlier measurement; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row(
                r["name"],
                r["metric"],
                float(r["seconds"]),
                int(r["prompt"]),
                int(r["seed"]),
                float(r["value"]),
            )
            for r in csv.DictReader(file)
        ]


def write_rows(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(rows)


def by_prompt(rows: list[Row]) -> dict[tuple[str, str, float], dict[int, float]]:
    """(variant, metric, seconds) -> mean over the seeds of each prompt; what is not a number does not count."""
    values: dict[tuple[str, str, float], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if not math.isnan(row.value):
            values[row.name, row.metric, row.seconds][row.prompt].append(row.value)
    return {key: {p: sum(v) / len(v) for p, v in prompts.items()} for key, prompts in values.items()}


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % interval, by bootstrap over prompts: seeds of one prompt are not independent of each other."""
    if not len(values):
        return math.nan, math.nan, math.nan
    data = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(0).integers(0, len(data), (RESAMPLES, len(data)))
    low, high = np.percentile(data[picks].mean(1), (2.5, 97.5))
    return float(data.mean()), float(low), float(high)


def table(rows: list[Row], against: str) -> list[dict[str, float | str]]:
    """One line a variant, metric and second: mean and interval, and those of the difference to the variant `against`,
    prompt by prompt."""
    means, lines = by_prompt(rows), []
    for (name, metric, seconds), prompts in means.items():
        mean, low, high = interval(list(prompts.values()))
        line: dict[str, float | str] = {
            "name": name,
            "metric": metric,
            "seconds": seconds,
            "prompts": len(prompts),
        }
        line |= {"mean": mean, "low": low, "high": high}
        other = means.get((against, metric, seconds), {})
        both = [prompts[p] - other[p] for p in prompts if p in other]
        line |= dict(zip(("difference", "difference_low", "difference_high"), interval(both)))
        lines.append(line)
    return lines


def write_report(folder: Path, rows: list[Row], against: str) -> None:
    """table.csv, table.md (the judged horizons) and a curve a metric from everything measured so far."""
    lines = table(rows, against)
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    (folder / "table.md").write_text(markdown(lines), encoding="utf-8")
    for metric in dict.fromkeys(line["metric"] for line in lines):
        curves: dict[str, list] = defaultdict(list)
        for line in sorted((x for x in lines if x["metric"] == metric), key=lambda x: float(x["seconds"])):
            curves[str(line["name"])].append(tuple(line[k] for k in ("seconds", "mean", "low", "high")))
        x_name = "seconds out of view" if str(metric).startswith("recall") else "seconds"
        curve_plot(str(metric).replace("_", " "), curves, x_name).save(folder / f"{metric}.png")


def markdown(lines: list[dict[str, float | str]]) -> str:
    """Variants across, metrics and seconds down, mean [95 % interval]; drift at the judged horizons alone."""
    names = list(dict.fromkeys(str(line["name"]) for line in lines))
    cells = {(x["metric"], x["seconds"], x["name"]): x for x in lines}
    horizons = {x["seconds"] for x in lines if x["metric"] == ACCURACY[0]}
    out = ["| metric | seconds | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for metric, seconds in dict.fromkeys((x["metric"], x["seconds"]) for x in lines):
        if seconds in horizons or metric not in DRIFT:
            row = [cells.get((metric, seconds, name)) for name in names]
            shown = ["" if x is None else f"{x['mean']:.3f} [{x['low']:.3f}, {x['high']:.3f}]" for x in row]
            out.append(f"| {metric} | {seconds:g} | " + " | ".join(shown) + " |")
    return "\n".join(out) + "\n"
