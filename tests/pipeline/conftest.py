"""A world model of the right interface and no size: random weights, made in a moment."""

import pytest
import torch
from sparse_forcing_pack.sparse_attn.pipeline import VideoPipeline
from sparse_forcing_pack.sparse_attn.vae import WanVAE
from sparse_forcing_pack.sparse_attn.wan import WanModel
from sparse_forcing_pack.sparse_attn.world.model import WorldModel
from sparse_forcing_pack.sparse_attn.world.text import WorldTextEncoder


@pytest.fixture(scope="session")
def pipeline() -> VideoPipeline:
    torch.manual_seed(0)
    dit = WanModel(dim=128, ffn_dim=128, num_heads=1, num_layers=2)
    world = WorldModel(dit, WanVAE(dim=8), WorldTextEncoder(dim=32))
    for part in (world.dit, world.vae, world.text):
        part.eval().requires_grad_(False)
    return VideoPipeline(world)
