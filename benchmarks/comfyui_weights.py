"""Random weights of published shapes, written into the folders of a ComfyUI: what benchmarks/comfyui.py times.

bf16: models/diffusion_models/random_{13b,14b}.safetensors, marked autoregressive
fp8:  ..._fp8.safetensors, linear layers of the blocks in float8_e4m3fn with a scale per tensor (`comfy_quant`)
gguf: ..._q8.gguf, Q8_0, of 1.3B only; needs the package gguf, as ComfyUI-GGUF does
vae:  models/vae/random_wan_vae.safetensors (Wan 2.1's) and random_tiny_vae.safetensors (TAEHV's decoder)
lora: models/loras/random_lora.safetensors, rank 16, for 1.3B
"""

from __future__ import annotations

import json
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from _root import load_pack
from torch import Tensor

# size -> (file name, width, width of the feed-forward layers, heads, layers)
SIZES = {
    "1.3b": ("random_13b", 1536, 8960, 12, 30),
    "14b": ("random_14b", 5120, 13824, 40, 40),
    "tiny": ("random_tiny", 256, 512, 2, 2),
}
KINDS = ("bf16", "fp8", "gguf", "vae", "lora")
AUTOREGRESSIVE = {"config": json.dumps({"transformer": {"causal_ar": True}})}
FP8, FP8_MAX = torch.float8_e4m3fn, 448.0
Q8_BLOCK = 32
DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.uint8: "U8", FP8: "F8_E4M3"}


def write_all(comfy: Path, sizes: list[str], kinds: list[str]) -> None:
    """Write every kind of every size into `comfy`/models. On the GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folders = {name: comfy / "models" / name for name in ("diffusion_models", "vae", "loras")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    for size in sizes:
        if {"bf16", "fp8", "gguf"} & set(kinds):
            write_backbone(folders["diffusion_models"], size, kinds, device)
    if "vae" in kinds:
        write_vaes(folders["vae"])
    if "lora" in kinds:
        write_lora(folders["loras"] / "random_lora.safetensors", "tiny" if sizes == ["tiny"] else "1.3b")


def write_backbone(folder: Path, size: str, kinds: list[str], device: torch.device) -> None:
    name = SIZES[size][0]
    weights = random_wan(size, device)
    if "bf16" in kinds:
        save(weights, folder / f"{name}.safetensors", AUTOREGRESSIVE)
    if "fp8" in kinds:
        save(as_scaled_fp8(weights), folder / f"{name}_fp8.safetensors", AUTOREGRESSIVE)
    if "gguf" in kinds and size != "14b":
        write_gguf(weights, folder / f"{name}_q8.gguf")


def pack(module: str) -> Any:
    """A module of the pack, by its place before or after the move into folders."""
    root = load_pack().__name__
    for folder in ("sparse_attn", "sparse_attn.model"):
        try:
            return import_module(f"{root}.{folder}.{module}")
        except ModuleNotFoundError as error:
            missing = error
    raise missing


def random_wan(size: str, device: torch.device) -> dict[str, Tensor]:
    """State dict of a Wan 2.1 text-to-video backbone, bfloat16 on `device`."""
    _, dim, ffn, heads, layers = SIZES[size]
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = pack("wan").WanModel(dim=dim, ffn_dim=ffn, num_heads=heads, num_layers=layers)
    finally:
        torch.set_default_dtype(before)
    return {name: weight.detach() for name, weight in model.state_dict().items()}


def is_linear(name: str, weight: Tensor) -> bool:
    """Whether a weight is of a linear layer inside a block: what fp8 checkpoints quantise."""
    return name.startswith("blocks.") and name.endswith(".weight") and weight.ndim == 2


def as_scaled_fp8(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with `weight` in float8_e4m3fn, `weight_scale` float32 [] and `comfy_quant` for linear layers."""
    found = {}
    form = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    for name, weight in weights.items():
        if not is_linear(name, weight):
            found[name] = weight
            continue
        layer = name.removesuffix(".weight")
        scale = weight.abs().max().float() / FP8_MAX
        found[name] = (weight / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)
        found[f"{layer}.weight_scale"], found[f"{layer}.comfy_quant"] = scale, form.clone()
    return found


def write_gguf(weights: dict[str, Tensor], path: Path) -> None:
    """Q8_0 as ComfyUI-GGUF's converter writes it: vectors, small tensors and modulation in float32."""
    try:
        import gguf
    except ImportError as error:
        raise RuntimeError(
            "a GGUF file needs the package gguf, which is missing: pip install gguf"
        ) from error
    began, kinds = time.monotonic(), gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path=None, arch="wan")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    for name, weight in weights.items():
        if weight.ndim == 1 or weight.numel() <= 1024 or name.endswith(".modulation"):
            writer.add_tensor(name, weight.float().cpu().numpy(), raw_dtype=kinds.F32)
        elif weight.shape[-1] % Q8_BLOCK:
            writer.add_tensor(name, weight.half().cpu().numpy(), raw_dtype=kinds.F16)
        else:
            writer.add_tensor(name, as_q8(weight).cpu().numpy(), raw_dtype=kinds.Q8_0)
    writer.write_header_to_file(path=path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    told(path, began)


def as_q8(weight: Tensor) -> Tensor:
    """[R, C] -> uint8 [R, C / 32 * 34]: per 32 values a float16 scale and 32 int8."""
    blocks = weight.float().reshape(weight.shape[0], -1, Q8_BLOCK)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    values = torch.where(scale > 0, blocks / scale, 0).round().to(torch.int8)
    return torch.cat([scale.half().view(torch.uint8), values.view(torch.uint8)], -1).flatten(1)


def write_vaes(folder: Path) -> None:
    torch.manual_seed(1)
    vae = pack("vae").WanVAE(dim=96).state_dict()
    save(
        {name: weight.to(torch.bfloat16) for name, weight in vae.items()},
        folder / "random_wan_vae.safetensors",
    )
    tiny = pack("tiny_vae").TinyDecoder().state_dict()
    save(
        {name: weight.to(torch.bfloat16) for name, weight in tiny.items()},
        folder / "random_tiny_vae.safetensors",
    )


def write_lora(path: Path, size: str, rank: int = 16) -> None:
    """Pairs for the self-attention's four linear layers; small, so that the model stays what it is."""
    _, dim, _, _, layers = SIZES[size]
    pairs = {}
    for layer in range(layers):
        for part in "qkvo":
            name = f"diffusion_model.blocks.{layer}.self_attn.{part}"
            pairs[f"{name}.lora_down.weight"] = torch.randn(rank, dim, dtype=torch.bfloat16) / dim
            pairs[f"{name}.lora_up.weight"] = torch.randn(dim, rank, dtype=torch.bfloat16) / dim
    save(pairs, path)


def save(weights: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, written tensor by tensor: 14B are never in host memory as a whole."""
    began, header, offset = time.monotonic(), {}, 0
    if metadata:
        header["__metadata__"] = metadata
    for name, weight in weights.items():
        size = weight.numel() * weight.element_size()
        form = {"dtype": DTYPES[weight.dtype], "shape": list(weight.shape)}
        header[name] = form | {"data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight in weights.values():
            file.write(weight.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
    told(path, began)


def told(path: Path, began: float) -> None:
    print(f"{path}: {path.stat().st_size / 1e9:.2f} GB in {time.monotonic() - began:.1f} s", flush=True)
