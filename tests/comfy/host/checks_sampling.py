"""Sampling: dense mode is the host's autoregressive sampler, every mode is the pack's own without a host."""

from __future__ import annotations

import comfy.samplers
import torch
from checks_common import (
    MODES,
    add_lora,
    apply,
    close,
    core_sampler,
    noise,
    our_sampler,
    prompt,
    rollout_without_host,
    sample,
    tiny_model,
)

CHUNKS = (1, 3)


def check_dense_equals_core_on_causal_and_plain_models():
    causal, plain = tiny_model(), tiny_model(causal=False)
    for chunk in CHUNKS:
        x = noise(7)  # 3 + 3 + 1: the last chunk is short
        want = sample(causal, core_sampler(chunk), x)
        assert want.abs().max() > 0.1
        for model in (apply(causal, mode="dense"), apply(plain, mode="dense"), causal, plain):
            close(sample(model, our_sampler(chunk), x), want)


def check_dense_equals_core_with_a_lora():
    base = tiny_model()
    model, x = add_lora(base), noise(6)
    want = sample(model, core_sampler(3), x)
    assert (want - sample(base, core_sampler(3), x)).abs().max() > 1e-3
    close(sample(apply(model, mode="dense"), our_sampler(3), x), want)
    close(sample(add_lora(apply(base, mode="dense")), our_sampler(3), x), want)


def check_start_image_equals_core():
    model = tiny_model()
    first = noise(1)[:, :, :1].clone()
    model.model_options["transformer_options"]["ar_config"] = {"initial_latent": first}
    x = noise(7)
    want = sample(model, core_sampler(3), x)
    close(sample(apply(model, mode="dense"), our_sampler(3), x), want)
    got = sample(apply(model, mode="sparse", topk=1.0, window_frames=6, block_tokens=16), our_sampler(3), x)
    close(got[:, :, :4], want[:, :, :4], 1e-4)


def check_idle_patch_is_bitwise_the_model():
    for causal, sampler in ((True, core_sampler(3)), (False, comfy.samplers.ksampler("euler"))):
        model, x = tiny_model(causal), noise(3)
        assert torch.equal(sample(apply(model), sampler, x), sample(model, sampler, x))


def check_model_is_left_as_it_was():
    model, x = tiny_model(causal=False), noise(3)
    euler = comfy.samplers.ksampler("euler")
    want = sample(model, euler, x)
    sample(model, our_sampler(3), x)
    sample(apply(model), our_sampler(3), x)
    assert torch.equal(sample(model, euler, x), want)


def check_global_random_state_is_untouched():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    model = tiny_model()
    torch.set_rng_state(before)
    sample(apply(model), our_sampler(3), noise(3))
    prompt(2)  # what `sample` itself draws last
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    prompt(2)
    assert torch.equal(torch.get_rng_state(), after)


def check_modes_equal_the_pack_without_a_host():
    model, x = tiny_model(), noise(15)
    dense = sample(model, our_sampler(3), x)
    for name, settings in MODES.items():
        got = sample(apply(model, **settings), our_sampler(3), x)
        close(got, rollout_without_host(x, 3, 1.0, **settings), 1e-4)
        assert (got - dense).abs().max() > 1e-3, f"{name} attended to everything"


def check_pages_in_8_bits_are_near_16():
    model, x = tiny_model(), noise(15)
    exact, near = (
        sample(apply(model, **MODES["sparse"], page_bits=bits), our_sampler(3), x) for bits in (16, 8)
    )
    assert torch.equal(near[:, :, :3], exact[:, :, :3]), "the first chunk reads nothing finished"
    close(near, exact, 0.02)
    assert not torch.equal(near, exact)


def check_pages_in_the_computers_memory_change_nothing():
    """With guidance two memories share the way to the device."""
    model, x = tiny_model(), noise(15)
    for cfg in (1.0, 3.0):
        here, away = (
            sample(apply(model, **MODES["sparse"], offload_pages=offload), our_sampler(3), x, cfg=cfg)
            for offload in (False, True)
        )
        assert torch.equal(here, away)


def check_cfg_keeps_two_caches_of_a_batch():
    model, x = tiny_model(), noise(9, batch=2)
    for mode in ("sparse", "window", "dense"):
        settings = {**MODES.get(mode, {}), "mode": mode}
        got = sample(apply(model, **settings), our_sampler(3), x, cfg=3.0)
        close(got, rollout_without_host(x, 3, 3.0, **settings), 1e-4)
        assert (got - sample(apply(model, **settings), our_sampler(3), x)).abs().max() > 1e-3
        other = torch.cat([x[:1], -x[1:]])
        close(sample(apply(model, **settings), our_sampler(3), other, cfg=3.0)[:1], got[:1])
