"""More than one process: `torchrun` starts them, FSDP2 splits the models, and the sums come out as in one process.

Within a node weights, gradients and optimizer states are split over the GPUs; between nodes they are repeated (hybrid
sharding), so only gradients cross the network. Without torchrun's environment there is one process and nothing is
split.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..wan import WanModel


@dataclass(frozen=True)
class Processes:
    """This process among all: rank, size, and the device it works on."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    mesh: Any = None


def join(device: str) -> Processes:
    """Join the processes that torchrun started; alone where it started none. device: "cuda" or "cpu"."""
    if "WORLD_SIZE" not in os.environ:
        return Processes(device=device)
    from torch.distributed.device_mesh import init_device_mesh

    size, local = (int(os.environ[name]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    shape, names = ((size,), ("shard",)) if local == size else ((size // local, local), ("nodes", "shard"))
    return Processes(dist.get_rank(), size, device, init_device_mesh(device, shape, mesh_dim_names=names))


def shard(model: WanModel, processes: Processes, bf16: bool) -> WanModel:
    """Split a model over the processes, block by block; one process keeps it as it is.

    The text's keys and values come from parts of each block outside of its forward, so these parts are units of their
    own. Everything is let go after a forward pass: a root that stayed whole would serve a later pass without gradients
    with weights from before the optimizer's step. Inputs keep their type, for bfloat16 cannot hold a timestep of 937.5.
    """
    if processes.size == 1:
        return model
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    options: dict[str, Any] = {
        "mesh": processes.mesh,
        "mp_policy": policy,
        "reshard_after_forward": True,
    }
    blocks: Any = model.blocks  # torch says Module of every part
    for block in blocks:
        cross = block.cross_attn
        fully_shard([cross.k, cross.v, cross.norm_k], **options)
        fully_shard(block, **options)
    fully_shard(model, **options)
    register_fsdp_forward_method(model, "cross_kv")
    return model


def whole(x: Tensor) -> Tensor:
    """A tensor that may be split over the processes, in one piece on each of them."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def own(x: Tensor) -> Tensor:
    """This process's part of a tensor that may be split over them."""
    return x.to_local() if hasattr(x, "to_local") else x


def wait_for_all(processes: Processes) -> None:
    """Return when all processes have come here."""
    if processes.size > 1:
        dist.barrier()


def mean_over(values: dict[str, float], processes: Processes) -> dict[str, float]:
    """Mean of each value over the processes."""
    if processes.size == 1:
        return values
    total = torch.tensor(list(values.values()), dtype=torch.float64, device=processes.device)
    dist.all_reduce(total)
    return dict(zip(values, (total / processes.size).tolist()))


def clip_gradients(model: nn.Module, limit: float) -> float:
    """Scale all gradients to a norm of at most `limit`; returns the norm before."""
    return float(whole(nn.utils.clip_grad_norm_(model.parameters(), limit)))
