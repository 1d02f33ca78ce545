"""Small random files of the kinds that `workflows/` loads from disk, each under the name that its workflow gives."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from serving import WORLD_DIT
from sparse_forcing_pack.sparse_attn.checkpoint import CAUSAL_AR
from sparse_forcing_pack.sparse_attn.vae import WanVAE
from sparse_forcing_pack.sparse_attn.wan import WanModel

DIM, LAYERS = 256, 2


def write_models(base: Path) -> None:
    """Fill `base`/models and `base`/input with what the workflows name, but for UMT5-XXL.

    Its size is fixed in ComfyUI, 5.7 billion weights.
    """
    models = base / "models"
    for folder in ("diffusion_models", "loras", "vae"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    (base / "input").mkdir(exist_ok=True)
    shutil.copy(WORLD_DIT, models / "diffusion_models")
    save_file(wan(), models / "diffusion_models" / "causal_forcing-framewise.safetensors", metadata=CAUSAL_AR)
    save_file(lora(), models / "loras" / "your_wan_lora.safetensors")
    save_file(vae(), models / "vae" / "wan_2.1_vae.safetensors")
    Image.linear_gradient("L").convert("RGB").save(base / "input" / "example.png")


def wan() -> dict[str, torch.Tensor]:
    """Weights of a Wan of two layers, its output not zero."""
    torch.manual_seed(0)
    model = WanModel(dim=DIM, ffn_dim=DIM, num_heads=2, num_layers=LAYERS)
    return {name: weight + 0.02 * torch.randn_like(weight) for name, weight in model.state_dict().items()}


def lora(rank: int = 4) -> dict[str, torch.Tensor]:
    """Pairs for q and v of every layer's self-attention."""
    torch.manual_seed(1)
    pairs = {}
    for layer in range(LAYERS):
        for part in ("q", "v"):
            name = f"diffusion_model.blocks.{layer}.self_attn.{part}"
            pairs[f"{name}.lora_A.weight"] = 0.1 * torch.randn(rank, DIM)
            pairs[f"{name}.lora_B.weight"] = 0.1 * torch.randn(DIM, rank)
    return pairs


def vae() -> dict[str, torch.Tensor]:
    """Weights of a Wan 2.1 VAE of width 4."""
    torch.manual_seed(2)
    return WanVAE(dim=4).state_dict()
