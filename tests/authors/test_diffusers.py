"""diffusers' WanTransformer3DModel beside our backbone: the same weights by other names, written and read as shards.

Skips where diffusers is not installed. It is bidirectional, so ours attends to its one chunk and no memory.
"""

import pytest
import torch
from sparse_forcing_pack.sparse_attn.checkpoint import open_checkpoint, recognise_wan
from sparse_forcing_pack.sparse_attn.state import sdpa
from sparse_forcing_pack.sparse_attn.wan import WanModel, frame_timesteps

diffusers = pytest.importorskip("diffusers")


def test_a_sharded_diffusers_model_computes_the_same(tmp_path, agree):
    torch.manual_seed(0)
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=128, num_layers=2, ffn_dim=192, text_dim=4096
    ).eval()
    with torch.no_grad():
        for weight in theirs.parameters():  # norms of exactly one and biases of zero would hide a mix-up
            weight.add_(0.02 * torch.randn_like(weight))
    theirs.save_pretrained(tmp_path, max_shard_size="3MB")
    checkpoint = open_checkpoint(tmp_path / "diffusion_pytorch_model.safetensors.index.json")
    assert checkpoint.names == "diffusers" and checkpoint.files > 1
    assert recognise_wan(checkpoint.weights, "x").num_layers == 2

    mine = WanModel.from_state_dict({name: checkpoint.tensor(name) for name in checkpoint.weights}).eval()
    x, text = torch.randn(1, 16, 3, 8, 12), torch.randn(1, 512, 4096)
    with torch.no_grad():
        other = theirs(x, torch.tensor([625.0]), text, return_dict=False)[0]
        cross_kv = mine.cross_kv(text)
        flow = mine(x, frame_timesteps(0.625, 1, 3, "cpu"), cross_kv, lambda layer, q, k, v: sdpa(q, k, v))
    agree(flow, other)
