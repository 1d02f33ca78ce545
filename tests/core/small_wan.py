"""A Wan of three layers and two heads that says something, for streams that a CPU makes in a second."""

import torch
from sparse_forcing_pack.sparse_attn.wan import WanModel

LAYERS = 3


def small_wan() -> WanModel:
    torch.manual_seed(0)
    model = WanModel(dim=64, ffn_dim=96, num_heads=2, num_layers=LAYERS, text_dim=24, freq_dim=32)
    model.init_weights()
    torch.nn.init.normal_(model.head.head.weight, std=0.05)
    return model.requires_grad_(False)
