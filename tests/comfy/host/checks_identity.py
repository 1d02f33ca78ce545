"""A session's identity: what the host does to weights leaves it, other weights and LoRAs change it."""

from __future__ import annotations

import copy

import comfy.model_management
import torch
from checks_common import (
    add_lora,
    apply,
    noise,
    our_sampler,
    pack,
    sample,
    tiny_model,
    tiny_state_dict,
    tiny_vae,
)


def identity(model, vae) -> tuple[str, str]:
    """The identities of model and VAE."""
    found = pack("nodes.keeping").identity_of(model, vae, (1, 16, 9, 4, 4), 3, 0)
    return found["model"], found["vae"]


def check_identity_outlives_a_run_casts_and_moves():
    model, vae = apply(tiny_model(), mode="window"), tiny_vae()
    before = identity(model, vae)
    sample(model, our_sampler(3), noise(6))
    assert identity(model, vae) == before
    comfy.model_management.unload_all_models()
    assert identity(model, vae) == before
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        model.model.diffusion_model.to(dtype)
        vae.first_stage_model.to(dtype)
        assert identity(model, vae) == before, dtype


def check_identity_knows_loras_patched_or_not():
    plain, vae = apply(tiny_model(), mode="window"), tiny_vae()
    network = plain.model.diffusion_model
    with_lora = plain.clone()
    change = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    changes = {"diffusion_model.blocks.0.self_attn.q.weight": ("diff", (change,))}
    with_lora.add_patches(changes, 0.7)
    before = identity(plain, vae), identity(with_lora, vae)
    weights = network.blocks[0].self_attn.q.weight.clone()
    sample(with_lora, our_sampler(3), noise(3))
    assert not torch.equal(network.blocks[0].self_attn.q.weight, weights), "nothing was patched in place"
    assert (identity(plain, vae), identity(with_lora, vae)) == before
    weaker = plain.clone()
    weaker.add_patches(changes, 0.6)
    other = plain.clone()
    other.add_patches(dict.fromkeys(changes, ("diff", (-change,))), 0.7)
    again = plain.clone()
    again.add_patches(copy.deepcopy(changes), 0.7)
    found = [identity(m, vae)[0] for m in (plain, with_lora, weaker, other, add_lora(plain))]
    assert len(set(found)) == len(found), found
    assert identity(again, vae)[0] == found[1]


def check_identity_of_other_weights_and_of_another_vae():
    vae, checkpoint = tiny_vae(), pack("sparse_attn.checkpoint").Checkpoint

    def model(sd):
        return apply(pack("nodes.loaders").host_model(checkpoint("tiny", sd), {}), mode="window")

    first, vae_mark = identity(model(tiny_state_dict()), vae)
    assert identity(model(tiny_state_dict()), vae)[0] == first
    assert identity(model(tiny_state_dict(1)), vae)[0] != first
    other = tiny_vae()
    for weight in other.first_stage_model.parameters():
        weight.data = weight + 0.05 * torch.randn_like(weight)
    assert identity(model(tiny_state_dict()), other)[1] != vae_mark
