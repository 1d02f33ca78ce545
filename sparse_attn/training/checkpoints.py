"""Checkpoints of a run: a folder a step, safetensors and JSON, written whole or not at all.

    step_00000120/  student.safetensors  average.safetensors  critic.safetensors
                    student_optimizer.safetensors  critic_optimizer.safetensors  state.json
                    streams_<process>.safetensors, in a long tuning

In several processes all of them gather, the first one writes, and all of them read: the folder is on a disk that all
see.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from .common import log
from .parallel import Processes, wait_for_all

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
KEPT = 2  # checkpoints on disk: the newest, and the one before in case a disk fails in the middle of things


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights in one piece on the CPU; empty on all processes but the first."""
    return dict(get_model_state_dict(model, options=WHOLE))


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state in one piece on the CPU, as "weight's name|state's name"; empty as `weights_of` is."""
    found: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=WHOLE)
    return {f"{name}|{key}": value for name, s in found.get("state", {}).items() for key, value in s.items()}


def load_weights_of(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """The inverse of `weights_of`, in every process."""
    set_model_state_dict(model, weights, options=WHOLE)


def load_state_of(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    """The inverse of `state_of`, in every process. Rates and the like stay the optimizer's own, of one group."""
    by_weight: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        weight, key = name.split("|")
        by_weight.setdefault(weight, {})[key] = value
    (group,) = optimizer.param_groups
    names = {"params": [name for name, _ in model.named_parameters()]}
    whole: dict[str, Any] = {"state": by_weight, "param_groups": [group | names]}
    set_optimizer_state_dict(model, optimizer, whole, options=WHOLE)


def save_checkpoint(
    folder: Path,
    step: int,
    shared: dict[str, dict[str, Tensor]],
    streams: dict[str, Tensor],
    facts: dict[str, Any],
    processes: Processes,
) -> None:
    """Write the `shared` parts and `facts` once, and each process's own `streams`.

    A folder that does not yet have its name is not a checkpoint; older checkpoints but one are removed.
    """
    path, unfinished, first = folder / f"step_{step:08d}", folder / "unfinished", processes.rank == 0
    if first:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    wait_for_all(processes)
    if streams:
        save_file(streams, unfinished / f"streams_{processes.rank}.safetensors")
    if first:
        for name, part in shared.items():
            tensors = {key: tensor.contiguous() for key, tensor in part.items()}
            save_file(tensors, unfinished / f"{name}.safetensors")
        state = json.dumps(facts | {"step": step}, indent=1)
        (unfinished / "state.json").write_text(state, encoding="utf-8")
    wait_for_all(processes)
    if first:
        shutil.rmtree(path, ignore_errors=True)
        os.replace(unfinished, path)
        for old in sorted(folder.glob("step_*"))[:-KEPT]:
            shutil.rmtree(old)
        log.info("wrote %s", path)
    wait_for_all(processes)


def newest(folder: Path) -> Path | None:
    """The latest checkpoint in `folder`, if there is one."""
    return max(folder.glob("step_*"), default=None)


def read_checkpoint(
    path: Path, processes: Processes
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Any]]:
    """Shared parts, this process's streams, and facts, as they were given to `save_checkpoint`; facts hold `step`."""
    facts = json.loads((path / "state.json").read_text(encoding="utf-8"))
    files = {file.stem: load_file(file) for file in path.glob("*.safetensors") if "streams_" not in file.stem}
    streams = path / f"streams_{processes.rank}.safetensors"
    return files, load_file(streams) if streams.is_file() else {}, facts
