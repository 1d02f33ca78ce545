"""Any recognised checkpoint -> a safetensors file that ComfyUI opens as an autoregressive model.

Weights go from file to file one at a time: the source is mapped, not loaded, so a model larger than the memory can be
converted. The result appears under its name when it is complete and not before.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import (
    CAUSAL_AR,
    QUANTISATION,
    SAFETENSORS,
    Checkpoint,
    CheckpointError,
    open_checkpoint,
    recognise_wan,
)
from .presets import FAMILY, propose

# torch's dtypes in the spelling of safetensors.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def convert(
    source: str | Path,
    target: str | Path,
    *,
    lora: str | Path | None = None,
    ema: bool | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> list[str]:
    """Write `source` (see `open_checkpoint`), `lora` merged in, as the safetensors file `target`; returns a report.

    The header carries CAUSAL_AR, and the preset where the source's name tells it. A source that holds nothing but a
    LoRA becomes a LoRA file by ComfyUI's names. ema: None takes what the model's authors take. dtype: of the weights,
    None as stored. force: replace an existing target.
    Raises FileNotFoundError, OSError, or CheckpointError, which says what does not fit; then nothing was written.
    """
    source, target = Path(source), Path(target)
    if target.suffix != SAFETENSORS:
        raise CheckpointError(f"{target} must end in {SAFETENSORS}")
    if target.exists() and not force:
        raise CheckpointError(f"{target} exists: choose another name, or force to replace it")
    if target.exists() and target.samefile(source):
        raise CheckpointError(f"{target} is the file to read: choose another name")
    proposal = propose(source)
    checkpoint = open_checkpoint(source, ema=proposal.preset.ema if ema is None else ema, lora=lora)
    proposal = propose(source, checkpoint.metadata)
    if not checkpoint.weights:
        tensors = _lora_tensors(checkpoint)
        _write(target, {name: (x.dtype, x.shape) for name, x in tensors.items()}, tensors.__getitem__, {})
        return [*checkpoint.describe(), f"written as a LoRA for ComfyUI: {target}"]

    shape = recognise_wan(checkpoint.weights, str(source))
    if dtype is not None and any(name.endswith(QUANTISATION) for name in checkpoint.weights):
        raise CheckpointError(f"{source} is quantised with scales: it can be converted as stored only")
    metadata = checkpoint.metadata | CAUSAL_AR
    if not proposal.warning:
        metadata |= {FAMILY: proposal.preset.name}
    layout = {name: (dtype or weight.dtype, weight.shape) for name, weight in checkpoint.weights.items()}
    _write(target, layout, lambda name: checkpoint.tensor(name).to(layout[name][0]), metadata)
    return [
        *checkpoint.describe(),
        f"Wan text-to-video, {shape.size}: {shape.num_layers} layers of width {shape.dim}",
        f"proposed ({proposal.reason}): {proposal.preset.describe()}",
        *([proposal.warning] if proposal.warning else []),
        f"written: {target}, {target.stat().st_size / 1e9:.2f} GB",
    ]


def _lora_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The pairs by the names that ComfyUI's LoRA loaders look for; kohya's are among them already."""
    tensors: dict[str, Tensor] = {}
    for layer, pair in checkpoint.lora.items():
        name = layer if layer.startswith("lora_unet_") else f"diffusion_model.{layer}"
        tensors |= {f"{name}.lora_A.weight": pair.down, f"{name}.lora_B.weight": pair.up}
        if pair.alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(pair.alpha)
    return tensors


def _write(
    target: Path,
    layout: dict[str, tuple[torch.dtype, torch.Size]],
    tensor: Callable[[str], Tensor],
    metadata: dict[str, str],
) -> None:
    """Write a safetensors file of `layout`, asking for one tensor after the other."""
    # wide dtypes first, as the format's own writer sorts: every tensor then lies at a multiple of its item size
    names = sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in names:
        dtype, shape = layout[name]
        if dtype not in DTYPES:
            raise CheckpointError(f"{name} is stored as {dtype}, which a safetensors file cannot hold")
        start, end = end, end + shape.numel() * dtype.itemsize
        entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)

    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if end + len(header) > free:
        raise CheckpointError(
            f"{target} needs {end / 1e9:.1f} GB on the disk, and {free / 1e9:.1f} GB are free"
        )
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for name in names:
                file.write(tensor(name).contiguous().flatten().view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
