"""Reading checkpoint files, and knowing what is in them before anything is built.

Files are data here, never programs: safetensors, or torch files read with weights_only=True. What a file holds is told
from its keys and shapes, and a file that does not fit exactly is refused with the list of what differs.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

StateDict = dict[str, Tensor]

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt")
# Wrappers that training code leaves around a name, in any order and number.
PREFIXES = (
    "model.",
    "_fsdp_wrapped_module.",
    "_orig_mod.",
    "_checkpoint_wrapped_module.",
    "diffusion_model.",
    "base_model.model.",
)
HEAD_DIM = 128  # of every Wan backbone
SHOWN = 8  # keys listed by a refusal, of each kind
# Where a host's loader looks for the mark of an autoregressive (causal) checkpoint.
CAUSAL_AR = {"config": json.dumps({"transformer": {"causal_ar": True}})}


class CheckpointError(ValueError):
    """A file that cannot be used; the message names it and says why and what to do."""


# --- reading ----------------------------------------------------------------------------------------------------------


def read_checkpoint(path: str | Path, *, ema: bool = True) -> tuple[StateDict, dict[str, str]]:
    """Read a .safetensors, .pt, .pth or .ckpt file -> (tensors by bare name, metadata of the safetensors header).

    ema: where a training checkpoint holds both the generator and its moving average, take the average.
    Raises FileNotFoundError, or CheckpointError for a file that is cut short, is no checkpoint, or is a pickle with
    anything but plain data in it: that one is refused, and nothing in it has run.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty: download it again")
    metadata: dict[str, str] = {}
    if path.suffix == ".safetensors":
        content, metadata = _read_safetensors(path)
    elif path.suffix in TORCH_SUFFIXES:
        content = _read_torch(path)
    else:
        known = ", ".join((".safetensors", *TORCH_SUFFIXES))
        raise CheckpointError(
            f"{path} ends in {path.suffix or 'nothing'!r}: files that can be read are {known}"
        )
    return strip_prefixes(unwrap(content, str(path), ema=ema), str(path)), metadata


def _read_safetensors(path: Path) -> tuple[StateDict, dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is cut short or is no safetensors file ({error}): download it again"
        ) from error


def _read_torch(path: Path) -> Any:
    with open(path, "rb") as file:
        if not file.read(2).startswith((b"PK", b"\x80")):  # neither a zip nor a pickle: a saved web page, say
            raise CheckpointError(f"{path} is cut short or is no torch checkpoint: download it again")
    try:
        # Only the zip format can be mapped into memory; the old one is read as a whole.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch's unpickler meets strange bytes with nearly any exception there is
        refused = re.search(r"unsupported (?:global: )?(GLOBAL \S+|\w+ \d+)", str(error), re.IGNORECASE)
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise CheckpointError(
                f"{path} is refused: it is a pickle that asks for more than tensors and plain data ({refused[1]}) and "
                "might run code. Nothing in it was run. Use a safetensors file of the same model."
            ) from error
        what = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{path} is cut short or is no torch checkpoint ({what[0][:120]}): download it again"
        ) from error


# --- unwrapping -------------------------------------------------------------------------------------------------------


def unwrap(content: Any, name: str, *, ema: bool = True) -> StateDict:
    """The state dict inside what training code saved around it: generator_ema, generator, model, state_dict.

    Raises CheckpointError where no dict of tensors is found.
    """
    keys = ["generator_ema"] * ema + ["generator", "model", "state_dict"]
    while isinstance(content, dict):
        inner = next((content[key] for key in keys if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{name} holds a {type(content).__name__}, not the weights of a model")
    strange = [
        key for key, value in content.items() if not isinstance(key, str) or not isinstance(value, Tensor)
    ]
    if strange:
        raise CheckpointError(f"{name} holds more than weights. Not a tensor: {_some(map(str, strange))}")
    return content


def strip_prefixes(sd: StateDict, name: str) -> StateDict:
    """Remove the wrappers' parts from every name. Raises CheckpointError where two names become one."""
    bare: StateDict = {}
    for key, value in sd.items():
        short = _strip(key)
        if short in bare:
            raise CheckpointError(f"{name} holds {short} twice under different prefixes, e.g. as {key}")
        bare[short] = value
    return bare


def _strip(key: str) -> str:
    for middle in ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module."):
        key = key.replace(middle, "")
    while (prefix := next((p for p in PREFIXES if key.startswith(p)), None)) is not None:
        key = key[len(prefix) :]
    return key


# --- recognising ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WanShape:
    """What a Wan text-to-video backbone's weights say about it."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int


def wan_keys(num_layers: int) -> set[str]:
    """Every weight name of a Wan2.1 text-to-video backbone."""
    both = ("weight", "bias")
    attention = [f"{part}.{kind}" for part in "qkvo" for kind in both] + ["norm_q.weight", "norm_k.weight"]
    block = [f"{name}.{key}" for name in ("self_attn", "cross_attn") for key in attention]
    block += ["norm3.weight", "norm3.bias", "modulation"]
    block += [f"ffn.{i}.{kind}" for i in (0, 2) for kind in both]
    layers = ["patch_embedding", "time_projection.1", "head.head"]
    layers += [f"{name}.{i}" for name in ("text_embedding", "time_embedding") for i in (0, 2)]
    outer = [f"{name}.{kind}" for name in layers for kind in both] + ["head.modulation"]
    return {*outer, *(f"blocks.{i}.{key}" for i in range(num_layers) for key in block)}


def recognise_wan(sd: StateDict, name: str) -> WanShape:
    """Tell the shape of a Wan2.1 text-to-video backbone from bare-named weights (see `read_checkpoint`).

    Raises CheckpointError, listing missing and unexpected names, for anything that is not exactly one.
    """
    numbers = {int(part) for key in sd if key.startswith("blocks.") and (part := key.split(".")[1]).isdigit()}
    expected = wan_keys(max(1, len(numbers)))
    if sd.keys() != expected:
        what = "is a Wan VAE" if is_wan_vae(sd) else "is not a Wan2.1 text-to-video model"
        differences = describe_difference(expected, sd.keys())
        raise CheckpointError(f"{name} {what}, so it cannot be the backbone. {differences}")
    dim, ffn_dim = sd["head.modulation"].shape[-1], sd["blocks.0.ffn.0.weight"].shape[0]
    if dim % HEAD_DIM:
        raise CheckpointError(
            f"{name} has width {dim}; a Wan backbone's is a multiple of its head dim {HEAD_DIM}"
        )
    return WanShape(dim, ffn_dim, dim // HEAD_DIM, len(numbers))


def is_wan_vae(sd: StateDict) -> bool:
    """True for the weights of Wan2.1's VAE (16 latent channels)."""
    parts = (
        "encoder.conv1.weight",
        "decoder.conv1.weight",
        "decoder.head.2.weight",
        "conv1.weight",
        "conv2.weight",
    )
    return all(part in sd for part in parts) and sd["conv2.weight"].shape[0] == 16


def describe_difference(expected: Iterable[str], found: Iterable[str]) -> str:
    """'2 missing: a, b. 1 unexpected: c.', at most SHOWN names of each kind."""
    expected, found = set(expected), set(found)
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    return f"{len(missing)} missing: {_some(missing)}. {len(unexpected)} unexpected: {_some(unexpected)}."


def is_causal_ar(metadata: dict[str, str]) -> bool:
    """True where a safetensors header marks its model as autoregressive (see CAUSAL_AR)."""
    try:
        config = json.loads(metadata.get("config", "{}"))
    except ValueError:
        return False
    transformer = config.get("transformer") if isinstance(config, dict) else None
    return isinstance(transformer, dict) and transformer.get("causal_ar") is True


def _some(names: Iterable[str]) -> str:
    names = list(names)
    rest = len(names) - SHOWN
    return (", ".join(names[:SHOWN]) or "none") + (f" and {rest} more" if rest > 0 else "")
