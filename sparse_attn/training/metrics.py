"""What a run tells while it runs: a CSV file always, TensorBoard's files where it is installed, and the log."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import torch

from .common import log


class Metrics:
    """Rows of numbers by step. A run that goes on from an earlier step drops the rows from there on."""

    def __init__(self, folder: Path, columns: tuple[str, ...], first_step: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.columns = folder / "metrics.csv", ("step", *columns)
        rows = self._kept(first_step)
        with self.path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)
        self.board = _tensorboard(folder)

    def _kept(self, first_step: int) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) < first_step]
        return [{name: row.get(name, "") for name in self.columns} for row in rows]

    def write(self, step: int, values: dict[str, float]) -> None:
        """One row; columns without a value stay empty."""
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns).writerow({"step": step, **values})
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()


def _tensorboard(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("tensorboard is not installed: metrics go to metrics.csv alone")
        return None
    return SummaryWriter(str(folder))


def peak_gib(device: str) -> float:
    """The most memory taken so far, GiB: by tensors on a GPU, by the process on a CPU (nan where that is hidden)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
