"""Together with what else changes a model: LoRAs, attention functions, and the patches of other packs."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from types import MethodType

import comfy.ldm.modules.attention
import comfy.samplers
import folder_paths
import safetensors.torch
import torch
from checks_common import (
    ROWS,
    apply,
    close,
    core_sampler,
    has_ar_sampler,
    log_said,
    noise,
    our_sampler,
    pack,
    rollout_without_host,
    sample,
    tiny_model,
    tiny_state_dict,
)

import nodes as host_nodes

STRENGTH = 0.7
LAYERS = ("blocks.0.self_attn.q", "blocks.1.self_attn.v", "blocks.1.cross_attn.k", "blocks.1.ffn.2")
SPARSE = {"mode": "sparse", "block_tokens": 16, "persistent_frames": 3}
FORWARD = "diffusion_model.blocks.{}.self_attn.forward"


# --- LoRA ---


def pairs() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Layer -> (down, up) of rank 4."""
    generator = torch.Generator().manual_seed(11)
    return {
        layer: (
            torch.randn(4, 256, generator=generator),
            0.05 * torch.randn(256, 4, generator=generator),
        )
        for layer in LAYERS
    }


def merged(alpha: float = 4.0) -> dict[str, torch.Tensor]:
    """The weights that the LoRA at STRENGTH makes."""
    sd = tiny_state_dict()
    for layer, (down, up) in pairs().items():
        sd[f"{layer}.weight"] = sd[f"{layer}.weight"] + STRENGTH * alpha / 4 * up @ down
    return sd


@contextmanager
def lora_files():
    """The LoRA as ComfyUI's trainers write it, as kohya's do, and as `sparse-forcing convert` does from PEFT's."""
    with tempfile.TemporaryDirectory() as folder:
        halves = {
            f"{prefix}{layer.replace('.', dot)}.{name}": tensor
            for prefix, dot, names in (
                ("comfy:diffusion_model.", ".", ("lora_A.weight", "lora_B.weight")),
                ("kohya:lora_unet_", "_", ("lora_down.weight", "lora_up.weight")),
                ("peft:base_model.model.", ".", ("lora_A.default.weight", "lora_B.default.weight")),
            )
            for layer, pair in pairs().items()
            for name, tensor in zip(names, pair, strict=True)
        }
        for kind in ("comfy", "kohya", "peft"):
            start = f"{kind}:"
            tensors = {k.removeprefix(start): v for k, v in halves.items() if k.startswith(start)}
            if kind == "peft":
                torch.save({"generator_lora": tensors}, f"{folder}/{kind}.pt")
                pack("sparse_attn.convert").convert(f"{folder}/{kind}.pt", f"{folder}/{kind}.safetensors")
            else:
                safetensors.torch.save_file(tensors, f"{folder}/{kind}.safetensors")
        folder_paths.add_model_folder_path("loras", folder)
        yield


def with_lora(model, kind: str):
    """LoraLoaderModelOnly, as the host runs it."""
    with torch.inference_mode():
        return host_nodes.LoraLoaderModelOnly().load_lora_model_only(model, f"{kind}.safetensors", STRENGTH)[
            0
        ]


def check_a_lora_before_and_after_apply_is_the_merged_model():
    base, x = tiny_model(), noise(6)
    plain = sample(apply(base, mode="dense"), our_sampler(3), x)
    want = rollout_without_host(x, 3, 1.0, merged(), mode="dense")
    assert (want - plain).abs().max() > 1e-2
    with lora_files():
        for kind in ("comfy", "kohya", "peft"):
            behind = sample(with_lora(apply(base, mode="dense"), kind), our_sampler(3), x)
            before = sample(apply(with_lora(base, kind), mode="dense"), our_sampler(3), x)
            assert torch.equal(behind, before), "the order of the two nodes must not matter"
            close(behind, want)
        if has_ar_sampler():
            close(behind, sample(with_lora(base, "comfy"), core_sampler(3), x))
        sparse = sample(with_lora(apply(base, **SPARSE), "comfy"), our_sampler(3), x)
        close(sparse, rollout_without_host(x, 3, 1.0, merged(), **SPARSE), 1e-4)
        unapplied = sample(with_lora(base, "comfy"), our_sampler(3), x)
        close(unapplied, want)
    assert torch.equal(sample(apply(base, mode="dense"), our_sampler(3), x), plain), "the LoRA stayed"


# --- the host's attention, and other nodes' ---


def counting(calls: list[int]):
    """An attention override that notes how many keys each call has."""

    def override(function, *args, **kwargs):
        calls.append(args[1].shape[1])
        return function(*args, **kwargs)

    return override


def check_attention_overrides_of_other_nodes_apply_to_dense():
    base, calls = tiny_model(), []
    for mode in ("window", "dense"):
        model = apply(base, mode=mode)
        want = sample(model, our_sampler(3), noise(6))
        model.model_options["transformer_options"]["optimized_attention_override"] = counting(calls)
        with log_said() as said:
            assert torch.equal(sample(model, our_sampler(3), noise(6)), want)
        assert 6 * 4 * 6 in calls, sorted(set(calls))  # 6 frames of 4 x 6 tokens as keys of one call
        assert not said
        calls.clear()


def check_attention_overrides_in_mode_sparse_are_for_the_prompt_and_said_to_be():
    model, calls = apply(tiny_model(), **SPARSE), []
    want = sample(model, our_sampler(3), noise(6))
    model.model_options["transformer_options"]["optimized_attention_override"] = counting(calls)
    with log_said() as said:
        assert torch.equal(sample(model, our_sampler(3), noise(6)), want)
    assert set(calls) == {ROWS}, sorted(set(calls))  # the rows of the prompt
    assert len(said) == 1 and "used for the prompt only" in said[0], said


def check_dense_goes_through_the_hosts_attention():
    """Whichever the host was started with; `test_host.py` starts it with others than its default."""
    used, chosen = [], comfy.ldm.modules.attention.optimized_attention
    session = pack("nodes.session")
    assert session.optimized_attention is chosen

    def spy(*args, **kwargs):
        used.append(args[1].shape[1])
        return chosen(*args, **kwargs)

    session.optimized_attention = spy
    try:
        got = sample(apply(tiny_model(), mode="dense"), our_sampler(3), noise(6))
    finally:
        session.optimized_attention = chosen
    assert 6 * 4 * 6 in used
    close(got, rollout_without_host(noise(6), 3, 1.0, mode="dense"), 1e-4)


# --- other packs' patches ---


def check_another_packs_attention_before_apply_gives_way_with_a_warning():
    base, x = tiny_model(), noise(6)
    want = sample(apply(base, mode="dense"), our_sampler(3), x)
    other = base.clone()
    other.add_object_patch(FORWARD.format(1), lambda x, *args, **kwargs: 0 * x)
    with log_said() as said:
        model = apply(other, mode="dense")
    assert len(said) == 1 and "blocks.1.self_attn.forward" in said[0], said
    assert torch.equal(sample(model, our_sampler(3), x), want)


def gives_way(base, x: torch.Tensor, settings: dict):
    """-> a model that another pack patched behind Apply, which made the video that it makes unpatched."""
    want = sample(apply(base, **settings), our_sampler(3), x)
    model = apply(base, **settings)
    model.add_object_patch(FORWARD.format(1), lambda x, *args, **kwargs: 0 * x)
    with log_said() as said:
        got = sample(model, our_sampler(3), x)
    assert torch.equal(got, want)
    assert len(said) == 1 and "self-attention of 1 layers behind Apply" in said[0], said
    return model


def check_another_packs_attention_behind_apply_gives_way_for_the_run():
    base, x = tiny_model(), noise(6)
    for settings in ({"mode": "dense"}, SPARSE):
        model = gives_way(base, x, settings)
        euler, first = comfy.samplers.ksampler("euler"), noise(3)
        idle = sample(model, euler, first)  # theirs is there for other samplers
        assert not torch.equal(idle, sample(base, euler, first))


def check_another_packs_attention_gives_way_where_the_first_pass_is_a_clean_one():
    """A start image is read by a chunk's last pass, which changes the memory and cannot be done again."""
    base, x = tiny_model(), noise(7)
    base.model_options["transformer_options"]["ar_config"] = {"initial_latent": noise(1)[:, :, :1].clone()}
    gives_way(base, x, SPARSE)


def check_a_guidance_that_evaluates_again_leaves_the_memory_alone():
    """As skip-layer and perturbed-attention guidance do, in every pass: what a clean pass wrote first stays."""

    def again(args):
        options = {**args["model_options"], "transformer_options": dict(args["model_options"]["transformer_options"])}
        conds = args["cond"], None
        inputs = args["model"], list(conds), args["input"] + 0.1, args["sigma"], options
        other, _ = comfy.samplers.calc_cond_batch(*inputs)
        passes.append(float(other.abs().max()))
        return args["denoised"]

    base, x = tiny_model(), noise(12)
    for settings in ({"mode": "dense"}, {"mode": "window", "window_frames": 6}, SPARSE, SPARSE | {"page_bits": 8}):
        passes: list[float] = []
        want = sample(apply(base, **settings), our_sampler(3), x)
        guided = apply(base, **settings)
        guided.set_model_sampler_post_cfg_function(again)
        assert torch.equal(sample(guided, our_sampler(3), x), want), settings
        assert len(passes) >= 4 * 5 - 1, "it was asked in every pass"


def check_another_packs_attention_without_apply_gives_way_for_the_run():
    base, x = tiny_model(), noise(6)
    want = sample(base, our_sampler(3), x)
    other = base.clone()
    other.add_object_patch(FORWARD.format(0), lambda x, *args, **kwargs: 0 * x)
    with log_said() as said:
        assert torch.equal(sample(other, our_sampler(3), x), want)
    assert len(said) == 1 and "self-attention of 1 layers" in said[0], said


def check_a_patch_around_ours_stays():
    base, x = tiny_model(), noise(6)
    model = apply(base, mode="dense")
    ours = model.object_patches[FORWARD.format(1)]
    model.add_object_patch(FORWARD.format(1), lambda *args, **kwargs: 2 * ours(*args, **kwargs))
    with log_said() as said:
        got = sample(model, our_sampler(3), x)
    assert not said, said
    assert (got - sample(apply(base, mode="dense"), our_sampler(3), x)).abs().max() > 1e-3


def check_other_object_patches_stay():
    base, x = tiny_model(), noise(6)
    calls = []
    for order in ("before", "behind"):
        model = base.clone() if order == "before" else apply(base, mode="dense")
        feed_forward = base.model.diffusion_model.blocks[0].ffn
        stock = type(feed_forward).forward

        def counted(self, x, order=order, stock=stock):
            calls.append(order)
            return stock(self, x)

        model.add_object_patch("diffusion_model.blocks.0.ffn.forward", MethodType(counted, feed_forward))
        model = apply(model, mode="dense") if order == "before" else model
        with log_said() as said:
            got = sample(model, our_sampler(3), x)
        assert torch.equal(got, sample(apply(base, mode="dense"), our_sampler(3), x)) and not said
    assert calls.count("before") == calls.count("behind") == 9  # two chunks of 4 steps, one clean pass


def check_patches_of_the_output_of_attention_apply():
    model, x = apply(tiny_model(), mode="dense"), noise(6)
    want = sample(model, our_sampler(3), x)
    model.set_model_attn1_patch(lambda args, *_: 0 * (args["x"] if isinstance(args, dict) else args))
    assert (sample(model, our_sampler(3), x) - want).abs().max() > 1e-3


# --- taken away again ---


def check_the_patch_taken_away_is_bitwise_the_model():
    for causal in (True, False):
        base, x = tiny_model(causal), noise(3)
        euler = comfy.samplers.ksampler("euler")
        want = sample(base, euler, x)
        patched = apply(base, **SPARSE)
        sample(patched, our_sampler(3), x)
        assert torch.equal(sample(patched, euler, x), want), "idle"
        assert torch.equal(sample(base, euler, x), want), "without"
        twice = apply(apply(base, mode="window"), **SPARSE)
        assert torch.equal(sample(twice, euler, x), want), "applied twice"
        assert torch.equal(sample(twice, our_sampler(3), x), sample(patched, our_sampler(3), x))
        if has_ar_sampler() and causal:
            core = sample(base, core_sampler(3), x)
            assert torch.equal(sample(patched, core_sampler(3), x), core)
