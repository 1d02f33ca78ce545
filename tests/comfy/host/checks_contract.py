"""What the host is told, and what is refused before any work."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.model_management
import comfy.samplers
import torch
from checks_common import (
    SIGMAS,
    Lacks,
    apply,
    fails,
    log_said,
    noise,
    our_sampler,
    pack,
    prompt,
    sample,
    tiny_model,
)


def check_memory_asked_for_is_a_chunk_and_the_caches():
    asked = []
    real = comfy.model_management.load_models_gpu

    def spy(models, memory_required=0, minimum_memory_required=None, **kwargs):
        asked.append(minimum_memory_required)
        return real(models, memory_required, minimum_memory_required=minimum_memory_required, **kwargs)

    model = apply(tiny_model(), mode="sparse")
    comfy.model_management.load_models_gpu = spy
    try:
        for cfg in (1.0, 2.0):
            sample(model, our_sampler(3), noise(12), cfg=cfg)
    finally:
        comfy.model_management.load_models_gpu = real
    run = our_sampler(3).open_run(model.model_options["transformer_options"], (1, 16, 12, 8, 12))
    state = run.new_state(model.model.diffusion_model, (8, 12), 1, torch.float32, "cpu")
    chunk = model.model.memory_required([1, 16, 3, 8, 12])
    for sides, bytes_asked in zip((1, 2), asked):
        assert chunk + sides * state.nbytes <= bytes_asked <= 2 * chunk + sides * state.nbytes, (
            asked,
            state.nbytes,
        )


def check_memory_asked_for_covers_what_passes_share():
    streaming, hooks = pack("nodes.streaming"), pack("nodes.hooks")
    exact, shared = (pack("sparse_attn.fast_weights").SHORTCUTS[name] for name in ("none", "shared"))
    model = apply(tiny_model(), mode="sparse")
    run = streaming.StreamSampler(3).open_run(model.model_options["transformer_options"], (1, 16, 30, 8, 12))
    asked = [
        model.model.memory_required(
            hooks._reserving_shape(run, model, (1, 16, 30, 8, 12), {"positive": [{}], "negative": []}, fast)
        )
        for fast in (exact, shared)
    ]
    state = run.new_state(model.model.diffusion_model, (8, 12), 1, torch.float32, "cpu")
    more = pack("sparse_attn.estimate").kept_bytes(state, shared)
    frame = model.model.memory_required([1, 16, 1, 8, 12])
    assert more > 0 and abs(asked[1] - asked[0] - more) <= frame, (asked, more)


def check_memory_asked_for_covers_frames_that_run_again():
    config, streaming = pack("sparse_attn.config"), pack("nodes.streaming")
    window = config.AttentionConfig(mode="window", window_frames=9)
    for attention, total, rereads, frames in (
        (window, 30, False, 3),
        (window, 30, True, 9),
        (window, 6, True, 6),
        (config.AttentionConfig(mode="dense"), 30, True, 12),
        (config.AttentionConfig(mode="dense"), 30, False, 3),
        (config.AttentionConfig(mode="sparse"), 30, True, 3),  # chunk by chunk
    ):
        model = apply(tiny_model())
        options = model.model_options["transformer_options"] | {"sparse_forcing_attention": attention}
        run = streaming.StreamSampler(3, rereads=rereads).open_run(options, (1, 16, total, 8, 12))
        assert run.longest_pass == frames, (attention.mode, total, rereads)
        run.guided = False
        positive = {"positive": [{}]}
        shape = pack("nodes.hooks")._reserving_shape(run, model, (1, 16, total, 8, 12), positive)
        state = run.new_state(model.model.diffusion_model, (8, 12), 1, torch.float32, "cpu")
        asked, whole = model.model.memory_required(shape), model.model.memory_required([1, 16, frames, 8, 12])
        assert whole + state.nbytes <= asked <= whole + state.nbytes + whole / frames


def check_progress_counts_every_pass():
    steps, shapes = [], []

    def report(step, x0, x, total):
        steps.append((step, total))
        shapes.append(x0.shape[2])

    sample(apply(tiny_model()), our_sampler(3), noise(6), report=report)
    assert steps[:-1] == [(i, 9) for i in range(9)], steps  # two chunks of 4 steps, one clean pass
    assert shapes == [3] * 9 + [6]  # the last call hands over the whole video


def check_interrupt_stops_between_passes():
    model, passes = apply(tiny_model()), []

    def report(step, *_):
        passes.append(step)
        if step == 1:
            comfy.model_management.interrupt_current_processing()

    try:
        sample(model, our_sampler(3), noise(6), report=report)
    except comfy.model_management.InterruptProcessingException:
        assert passes == [0, 1]
    else:
        raise AssertionError("the interrupt was ignored")


def check_positions_beyond_the_trained_range_are_warned_of():
    with log_said() as said:
        for positions in ("absolute", "rebased"):
            model = apply(tiny_model(), positions=positions)
            our_sampler(3).open_run(model.model_options["transformer_options"], (1, 16, 1026, 8, 12))
    assert len(said) == 1 and said[0].startswith("1026 latent frames with positions 'absolute'"), said


def check_mode_dense_counts_absolutely_whatever_positions_says():
    (model,) = pack("nodes.apply").SparseForcingApply.execute(tiny_model(), mode="dense", positions="rebased").args
    assert pack("nodes.session").attention_of(model).positions == "absolute"


def check_a_loader_proposes_the_memory_its_model_was_trained_with():
    attention_of, trained = pack("nodes.session").attention_of, pack("sparse_attn.world").ATTENTION
    world = pack("nodes.loaders").SparseForcingWorldModel.execute().args[0]
    plain = pack("sparse_attn.config").AttentionConfig()
    assert attention_of(world) == trained != plain == attention_of(tiny_model())
    assert attention_of(apply(world)) == plain  # who chooses is obeyed


def check_clones_on_new_weights_use_those_weights():
    model, other = apply(tiny_model(), mode="dense"), tiny_model()
    if not hasattr(other, "get_clone_model_override"):
        raise Lacks("clones of a MODEL on other weights")
    clone = model.clone(model_override=other.get_clone_model_override())
    for layer, block in enumerate(other.model.diffusion_model.blocks):
        patch = clone.object_patches[f"diffusion_model.blocks.{layer}.self_attn.forward"]
        assert patch.attn is block.self_attn


def check_refusals_come_before_any_work():
    model, sampler = tiny_model(), our_sampler(3)
    patched = apply(model)
    real = comfy.model_management.load_models_gpu
    comfy.model_management.load_models_gpu = None  # anything that loads would fail otherwise
    try:
        fails("use 6 (21 video frames) or 9 (33 video frames)", sample, patched, sampler, noise(7))
        fails("width 104 is not a multiple of 16", sample, patched, sampler, noise(6, width=13))
        fails("height 72 is not a multiple of 16", sample, patched, sampler, noise(6, height=9))
        fails("window_frames 7", sample, apply(model, window_frames=7), sampler, noise(6))
        fails(
            "sink_frames 6 does not fit",
            sample,
            apply(model, sink_frames=6, persistent_frames=3),
            sampler,
            noise(6),
        )
        fails("topk 0", sample, apply(model, topk=0.0), sampler, noise(6))
    finally:
        comfy.model_management.load_models_gpu = real
    fails("a schedule that ends at 0", sample, patched, sampler, noise(3), sigmas=SIGMAS[:3])


def check_other_models_are_refused():
    stranger = SimpleNamespace(get_model_object=lambda name: torch.nn.Identity())
    fails("needs a Wan 2.1 text-to-video MODEL, but this one is Identity", apply, stranger)
    model = tiny_model(causal=False)
    model.model.diffusion_model.model_type = "i2v"
    fails("of type i2v", apply, model)


def check_conditioning_that_comes_and_goes_is_refused():
    model = apply(tiny_model())
    late = prompt(1)
    late[0][1] = {"start_percent": 0.0, "end_percent": 0.5}
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": prompt(1) + late})
    x = noise(6)
    with torch.inference_mode():
        fails(
            "range of timesteps",
            guider.sample,
            x,
            torch.zeros_like(x),
            our_sampler(3),
            SIGMAS,
            disable_pbar=True,
        )
