"""Reading checkpoint files, and knowing what is in them before anything is built.

Files are data here, never programs: safetensors, or torch files read with weights_only=True. What a file holds is told
from its keys and shapes, and a file that does not fit exactly is refused with the list of what differs.

`open_checkpoint` goes from a file to weights by Wan's own names in five steps: read (one file or all shards), unwrap
(generator_ema, model, ...), strip the prefixes that training code leaves, give diffusers' names back as Wan's, and set
LoRA pairs apart. `recognise_wan` then says which backbone it is. Weights stay on disk, mapped, until they are used.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .checkpoint_error import CheckpointError, some_names
from .lora import LORA_PART, LoraPair, StateDict, adapter_alpha, fit_lora, split_lora
from .wan_names import is_diffusers, wan_name

SAFETENSORS, INDEX = ".safetensors", ".safetensors.index.json"
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt")
# What training code saves around the weights, in the order in which it is looked for.
WRAPPERS = ("generator", "generator_lora", "model", "module", "state_dict")
EMA_WRAPPERS = ("generator_ema", "model_ema")
# What training code leaves in front of a name, in any order and number.
PREFIXES = (
    "model.",
    "module.",
    "generator.",
    "transformer.",
    "_fsdp_wrapped_module.",
    "_orig_mod.",
    "_checkpoint_wrapped_module.",
    "diffusion_model.",
    "base_model.model.",
)
# Names that stored quantisation adds beside a weight; a host reads them, they do not tell models apart.
QUANTISATION = (
    ".scale_weight",
    ".scale_input",
    ".weight_scale",
    ".input_scale",
    ".comfy_quant",
    "scaled_fp8",
)
HEAD_DIM = 128  # of every Wan backbone
# Where a host's loader looks for the mark of an autoregressive (causal) checkpoint.
CAUSAL_AR = {"config": json.dumps({"transformer": {"causal_ar": True}})}
# Input channels of Wan models that are no text-to-video model of Wan2.1, which has 16.
OTHER_CHANNELS = {
    36: "is an image-to-video model (36 input channels): it is conditioned on a whole clip at once and cannot make "
    "video chunk by chunk. To start from an image, use a text-to-video model and give the image as the first frame.",
    48: "is Wan2.2 5B (48 input channels), made for another VAE: use a Wan2.1 text-to-video model.",
}
# Known by (dim, ffn_dim); the number of layers may differ in pruned or trained-anew models.
SIZES = {(1536, 8960): "1.3B", (5120, 13824): "14B", (256, 768): "the embedded world model"}
# Bytes of one number, by the dtype names of safetensors.
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format


@dataclass(frozen=True)
class Checkpoint:
    """Weights by Wan's names, and what was met on the way to them.

    weights: as stored, LoRA not applied. lora: low-rank updates that `tensor` adds. metadata: of the safetensors
    header. wrappers: dicts that were opened. names: whose names the file used. files: how many shards.
    """

    path: Path
    weights: StateDict
    metadata: dict[str, str] = field(default_factory=dict)
    lora: dict[str, LoraPair] = field(default_factory=dict)
    wrappers: tuple[str, ...] = ()
    names: str = "Wan"
    files: int = 1

    def tensor(self, name: str) -> Tensor:
        """One weight, its LoRA merged in."""
        weight = self.weights[name]
        pair = self.lora.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        return weight if pair is None else pair.merge(name, weight)

    def describe(self) -> list[str]:
        """What was recognised, a sentence a line."""
        tensors = [
            *self.weights.values(),
            *(half for pair in self.lora.values() for half in (pair.down, pair.up)),
        ]
        stored = Counter[str]()
        for tensor in tensors:
            stored[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
        scaled = ", scaled" * any(name.endswith(QUANTISATION) for name in self.weights)
        shards = f" in {self.files} shards" * (self.files > 1)
        size = (
            f"{sum(stored.values()) / 1e9:.2f} GB, most of it {max(stored, key=stored.__getitem__)}{scaled}"
        )
        lines = [f"{self.path.name}: {size}{shards}, {self.names} names"]
        if self.wrappers:
            averaged = "a moving average" if set(self.wrappers) & set(EMA_WRAPPERS) else "not averaged"
            lines.append(f"unwrapped {' / '.join(self.wrappers)}: {averaged}")
        if self.lora:
            ranks = sorted({pair.rank for pair in self.lora.values()})
            lines.append(f"LoRA on {len(self.lora)} layers, rank {', '.join(map(str, ranks))}")
        return lines


# --- reading ----------------------------------------------------------------------------------------------------------


def read_checkpoint(
    path: str | Path, *, ema: bool = True, lora: str | Path | None = None, available: int | None = None
) -> tuple[StateDict, dict[str, str]]:
    """`open_checkpoint`, LoRA merged -> (tensors by Wan's bare names, metadata of the safetensors header)."""
    checkpoint = open_checkpoint(path, ema=ema, lora=lora, available=available)
    return {name: checkpoint.tensor(name) for name in checkpoint.weights}, checkpoint.metadata


def open_checkpoint(
    path: str | Path, *, ema: bool = True, lora: str | Path | None = None, available: int | None = None
) -> Checkpoint:
    """Open a .safetensors (or a shard of one, or its .index.json), .pt, .pth or .ckpt file; bring names to Wan's.

    ema: where a training checkpoint holds both the generator and its moving average, take the average.
    lora: a second file with a LoRA of this model (PEFT's or kohya's names), merged when weights are used.
    available: bytes of memory that the weights may take; None: do not ask.
    Raises FileNotFoundError, or CheckpointError for a file that is cut short, is no checkpoint, needs more memory than
    there is, or is a pickle with anything but plain data in it: that one is refused, and nothing in it has run.
    """
    checkpoint = _open(Path(path), ema, available)
    weights, pairs = checkpoint.weights, checkpoint.lora
    if lora is not None:
        if pairs:
            raise CheckpointError(f"{path} holds a LoRA already: give the base model and one LoRA file")
        second = _open(Path(lora), ema, available)
        pairs = second.lora
        if not pairs:
            raise CheckpointError(f"{lora} holds no LoRA: name the file with lora_A and lora_B weights")
        if second.weights:
            raise CheckpointError(f"{lora} holds more than a LoRA of weights: {some_names(second.weights)}")
    check_memory(str(path), sum(weight.nbytes for weight in weights.values()), available)
    return replace(checkpoint, lora=fit_lora(weights, pairs, str(lora or path)) if weights else pairs)


def _open(path: Path, ema: bool, available: int | None) -> Checkpoint:
    """One file, its LoRA pairs set apart."""
    content, metadata, files = _read(path, available)
    sd, wrappers = _unwrap(content, str(path), ema)
    sd = strip_prefixes(sd, str(path))
    names = "diffusers" if is_diffusers(sd) else "Wan"
    if names == "diffusers":
        sd = _rename(sd, wan_name, str(path))
    alpha = adapter_alpha(path) if any(LORA_PART.fullmatch(key) for key in sd) else None
    weights, pairs = split_lora(sd, str(path), alpha)
    return Checkpoint(path, weights, metadata, pairs, wrappers, names, files)


def _read(path: Path, available: int | None) -> tuple[Any, dict[str, str], int]:
    """(content, metadata, number of files)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty: download it again")
    if path.name.endswith((SAFETENSORS, INDEX)):
        shards = _shards(path)
        headers = [read_header(shard) for shard in shards]
        check_memory(str(path), sum(memory_need(header) for header in headers), available)
        content: StateDict = {}
        for shard, header in zip(shards, headers):
            if twice := sorted(content.keys() & header.shapes.keys()):
                raise CheckpointError(f"{path} has weights in two shards: {some_names(twice)}")
            content |= _read_safetensors(shard)
        return content, headers[0].metadata, len(shards)
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path, available), {}, 1
    known = ", ".join((SAFETENSORS, *TORCH_SUFFIXES))
    if path.suffix == ".gguf":
        known += ". A GGUF file opens in a GGUF loader, whose model works here too"
    raise CheckpointError(f"{path} ends in {path.suffix or 'nothing'!r}: files that can be read are {known}")


def _shards(path: Path) -> list[Path]:
    """All files that belong together with a .safetensors file or an index."""
    if path.name.endswith(INDEX):
        try:
            names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} is no index of a sharded checkpoint: download it again") from error
        if not names or any(
            not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name) for name in names
        ):
            raise CheckpointError(f"{path} names shards outside its folder, or none: it is refused")
    elif numbers := re.fullmatch(r"(.*-)\d{5}-of-(\d{5})\.safetensors", path.name):
        stem, total = numbers[1], numbers[2]
        names = [f"{stem}{i:05}-of-{total}.safetensors" for i in range(1, int(total) + 1)]
    else:
        return [path]
    shards = [path.parent / name for name in names]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise CheckpointError(
            f"{path}: of {len(shards)} shards, {len(missing)} are missing: {some_names(missing)}"
        )
    return shards


def _read_safetensors(path: Path) -> StateDict:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except Exception as error:  # its header was checked; what is left is a dtype that this torch lacks, say
        raise CheckpointError(f"{path} is no safetensors file that can be read ({error})") from error


def _read_torch(path: Path, available: int | None = None) -> Any:
    with open(path, "rb") as file:
        start = file.read(2)
    if not start.startswith((b"PK", b"\x80")):  # neither a zip nor a pickle: a saved web page, say
        raise CheckpointError(f"{path} is cut short or is no torch checkpoint: download it again")
    mapped = start == b"PK"  # only the zip format can be mapped; the old one is read as a whole
    if not mapped:
        check_memory(str(path), path.stat().st_size, available)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
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


# --- headers and memory -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """The front of a safetensors file: shape and dtype (its spelling: BF16, F8_E4M3 ...) of every tensor."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str] = field(default_factory=dict)


def read_header(path: str | Path) -> Header:
    """Read and check a safetensors header without touching the weights.

    Raises CheckpointError where it is no header or does not describe the rest of the file exactly.
    """
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise CheckpointError(f"{path} is cut short or is no safetensors file: download it again")
        raw = file.read(length)
    try:
        return _parse_header(json.loads(raw), size - 8 - length)
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is cut short or is no safetensors file ({str(error)[:120]}): download it again"
        ) from error


def _parse_header(entries: dict[str, Any], data_bytes: int) -> Header:
    """Raises LookupError, ValueError, TypeError or AttributeError for what is no header of that much data."""
    metadata = entries.pop("__metadata__", {})
    if not all(isinstance(text, str) for item in metadata.items() for text in item):
        raise ValueError("its metadata is not text")
    shapes, dtypes, spans = {}, {}, []
    for name, entry in entries.items():
        shape, dtype, (start, end) = tuple(entry.pop("shape")), entry.pop("dtype"), entry.pop("data_offsets")
        if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
            raise ValueError(f"{name} has a shape or place that is no whole number")
        if dtype not in ITEM_BYTES:
            raise ValueError(f"{name} is stored as {dtype!r}, which is not known here")
        if end - start != math.prod(shape) * ITEM_BYTES[dtype]:
            raise ValueError(f"{name} does not have the size of its shape")
        shapes[name], dtypes[name] = shape, dtype
        spans.append((start, end))
    ends = [0, *(end for _, end in sorted(spans))]
    if [start for start, _ in sorted(spans)] != ends[:-1] or ends[-1] != data_bytes:
        raise ValueError("its tensors do not fill the file")
    return Header(shapes, dtypes, metadata)


def memory_need(header: Header) -> int:
    """Bytes that a file's weights take as they are stored; computing with them comes on top."""
    return sum(math.prod(shape) * ITEM_BYTES[header.dtypes[name]] for name, shape in header.shapes.items())


def check_memory(name: str, need: int, available: int | None) -> None:
    """Raise CheckpointError, naming both numbers, where weights of `need` bytes do not fit into `available`."""
    if available is not None and need > available:
        raise CheckpointError(
            f"{name} needs {need / 1e9:.1f} GB of memory for its weights alone, and {max(0, available) / 1e9:.1f} GB "
            "are free: close other programs, or use a smaller model or one stored in fp8."
        )


# --- unwrapping -------------------------------------------------------------------------------------------------------


def unwrap(content: Any, name: str, *, ema: bool = True) -> StateDict:
    """The state dict inside what training code saved around it (EMA_WRAPPERS, if `ema`, then WRAPPERS).

    Raises CheckpointError where no dict of tensors is found.
    """
    return _unwrap(content, name, ema)[0]


def _unwrap(content: Any, name: str, ema: bool) -> tuple[StateDict, tuple[str, ...]]:
    keys = [*(EMA_WRAPPERS if ema else ()), *WRAPPERS]
    opened: list[str] = []
    while isinstance(content, dict):
        key = next((key for key in keys if isinstance(content.get(key), dict)), None)
        if key is None:
            break
        content = content[key]
        opened.append(key)
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{name} holds a {type(content).__name__}, not the weights of a model")
    if averages := [key for key in EMA_WRAPPERS if isinstance(content.get(key), dict)]:
        raise CheckpointError(f"{name} holds a moving average ({averages[0]}) and no raw weights: choose ema")
    strange = [
        key for key, value in content.items() if not isinstance(key, str) or not isinstance(value, Tensor)
    ]
    if strange:
        raise CheckpointError(
            f"{name} holds more than weights. Not a tensor: {some_names(map(str, strange))}"
        )
    return content, tuple(opened)


def strip_prefixes(sd: StateDict, name: str) -> StateDict:
    """Remove the wrappers' parts from every name. Raises CheckpointError where two names become one."""
    return _rename(sd, _strip, name)


def _rename(sd: StateDict, rename: Callable[[str], str], name: str) -> StateDict:
    renamed: StateDict = {}
    for key, value in sd.items():
        if (new := rename(key)) in renamed:
            raise CheckpointError(f"{name} holds {new} twice under different names, e.g. as {key}")
        renamed[new] = value
    return renamed


def _strip(key: str) -> str:
    for middle in ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module."):
        key = key.replace(middle, "")
    while (prefix := next((p for p in PREFIXES if key.startswith(p)), None)) is not None:
        key = key[len(prefix) :]
    return key


# --- recognising ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WanShape:
    """What a Wan backbone's weights say about it."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int

    @property
    def size(self) -> str:
        """'1.3B', '14B', 'the embedded world model', or 'of another size'."""
        return SIZES.get((self.dim, self.ffn_dim), "of another size")


def wan_shapes(
    dim: int, ffn_dim: int, num_layers: int, *, text_dim: int = 4096, freq_dim: int = 256
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of a Wan2.1 text-to-video backbone."""
    linears: dict[str, tuple[int, ...]] = {
        "text_embedding.0": (dim, text_dim),
        "text_embedding.2": (dim, dim),
        "time_embedding.0": (dim, freq_dim),
        "time_embedding.2": (dim, dim),
        "time_projection.1": (6 * dim, dim),
        "head.head": (4 * 16, dim),
        "patch_embedding": (dim, 16, 1, 2, 2),
    }
    vectors: dict[str, tuple[int, ...]] = {"head.modulation": (1, 2, dim)}
    for i in range(num_layers):
        block = f"blocks.{i}."
        for attention in (f"{block}self_attn.", f"{block}cross_attn."):
            linears |= {attention + part: (dim, dim) for part in "qkvo"}
            vectors |= {f"{attention}norm_{part}.weight": (dim,) for part in "qk"}
        linears |= {f"{block}ffn.0": (ffn_dim, dim), f"{block}ffn.2": (dim, ffn_dim)}
        vectors |= {f"{block}norm3.weight": (dim,), f"{block}norm3.bias": (dim,)}
        vectors[f"{block}modulation"] = (1, 6, dim)
    weights = {f"{layer}.weight": shape for layer, shape in linears.items()}
    return weights | {f"{layer}.bias": shape[:1] for layer, shape in linears.items()} | vectors


def wan_keys(num_layers: int) -> set[str]:
    """Every weight name of a Wan2.1 text-to-video backbone."""
    return set(wan_shapes(1, 1, num_layers))


def recognise_wan(sd: StateDict, name: str) -> WanShape:
    """Tell the shape of a Wan2.1 text-to-video backbone from bare-named weights (see `open_checkpoint`).

    Names that belong to stored quantisation are passed over. Raises CheckpointError, listing what is missing,
    unexpected or of a wrong shape, for anything that is not exactly one; image-to-video models are named as such.
    """
    sd = {key: value for key, value in sd.items() if not key.endswith(QUANTISATION)}
    numbers = {
        int(part) for key in sd if key.startswith("blocks.") and (part := key.split(".")[1]).isdecimal()
    }
    expected = wan_keys(max(1, len(numbers)))
    patches = sd.get("patch_embedding.weight")
    in_dim = patches.shape[1] if patches is not None and patches.ndim == 5 else 16
    if in_dim in OTHER_CHANNELS and not expected - sd.keys():
        raise CheckpointError(f"{name} {OTHER_CHANNELS[in_dim]}")
    if sd.keys() != expected:
        what = next((text for known, text in _OTHERS if known(sd)), "is not a Wan2.1 text-to-video model")
        differences = describe_difference(expected, sd.keys())
        raise CheckpointError(f"{name} {what}, so it cannot be the backbone. {differences}")
    return _shape_of(sd, name, len(numbers))


def _shape_of(sd: StateDict, name: str, num_layers: int) -> WanShape:
    """The shape of weights whose names are right. Raises CheckpointError where one weight does not fit the others."""
    dim = sd["head.modulation"].shape[-1] if sd["head.modulation"].ndim else 0
    rows = [
        sd[key].shape
        for key in ("blocks.0.ffn.0.weight", "text_embedding.0.weight", "time_embedding.0.weight")
    ]
    if not all(len(shape) == 2 for shape in rows):
        raise CheckpointError(f"{name} has weights of shapes that no Wan model has, e.g. {list(rows[0])}")
    if not dim or dim % HEAD_DIM:
        raise CheckpointError(
            f"{name} has width {dim}; a Wan backbone's is a multiple of its head dim {HEAD_DIM}"
        )
    ffn_dim, text_dim, freq_dim = rows[0][0], rows[1][1], rows[2][1]
    shapes = wan_shapes(dim, ffn_dim, num_layers, text_dim=text_dim, freq_dim=freq_dim)
    wrong = [
        f"{key} {list(sd[key].shape)}"
        for key, shape in shapes.items()
        if tuple(sd[key].shape) != shape
        and sd[key].is_floating_point()  # whole numbers: 4-bit weights, packed
    ]
    if wrong:
        raise CheckpointError(
            f"{name} has {len(wrong)} weights whose shapes do not fit the others: {some_names(wrong)}"
        )
    return WanShape(dim, ffn_dim, dim // HEAD_DIM, num_layers)


def is_wan_vae(sd: StateDict) -> bool:
    """True for the weights of Wan2.1's VAE (16 latent channels)."""
    parts = (
        "encoder.conv1.weight",
        "decoder.conv1.weight",
        "decoder.head.2.weight",
        "conv1.weight",
        "conv2.weight",
    )
    return all(part in sd for part in parts) and sd["conv2.weight"].shape[:1] == (16,)


# Files that are mistaken for a backbone, with what to say about them.
_OTHERS = (
    (is_wan_vae, "is a Wan VAE"),
    (lambda sd: not sd, "is a LoRA, which needs its base model"),
)


def describe_difference(expected: Iterable[str], found: Iterable[str]) -> str:
    """'2 missing: a, b. 1 unexpected: c.', at most SHOWN names of each kind."""
    expected, found = set(expected), set(found)
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    return f"{len(missing)} missing: {some_names(missing)}. {len(unexpected)} unexpected: {some_names(unexpected)}."


def is_causal_ar(metadata: dict[str, str]) -> bool:
    """True where a safetensors header marks its model as autoregressive (see CAUSAL_AR)."""
    try:
        config = json.loads(metadata.get("config", "{}"))
    except (ValueError, RecursionError):
        return False
    transformer = config.get("transformer") if isinstance(config, dict) else None
    return isinstance(transformer, dict) and transformer.get("causal_ar") is True
