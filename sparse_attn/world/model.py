"""The embedded world model: where its weights are and how they load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..config import SamplerConfig, shifted_sigmas
from ..vae import WanVAE
from ..wan import WanModel
from .text import WorldTextEncoder

WEIGHTS = Path(__file__).parent / "weights"
DIT_FILE, VAE_FILE, TEXT_FILE = (WEIGHTS / f"world_{part}.safetensors" for part in ("dit", "vae", "text"))

# The opening chunk decides where everything is, out of nothing; four steps would end in the mean of all layouts.
FIRST_STEPS = 16
SAMPLER = SamplerConfig(first_sigmas=shifted_sigmas(FIRST_STEPS))


@dataclass
class WorldModel:
    """Backbone, VAE and text encoder, in evaluation mode."""

    dit: WanModel
    vae: WanVAE
    text: WorldTextEncoder


def load_world_model(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> WorldModel:
    """Load the embedded weights (stored in 16 bits) onto `device` in `dtype`.

    Raises FileNotFoundError naming the file where the checkout lacks the weights.
    """
    for path in (DIT_FILE, VAE_FILE, TEXT_FILE):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: the world model's weights belong to the repository")
    dit = WanModel.from_state_dict(load_file(DIT_FILE))
    vae = WanVAE.from_state_dict(load_file(VAE_FILE))
    text = WorldTextEncoder.from_state_dict(load_file(TEXT_FILE))
    parts = (m.to(device=device, dtype=dtype).eval().requires_grad_(False) for m in (dit, vae, text))
    return WorldModel(*parts)
