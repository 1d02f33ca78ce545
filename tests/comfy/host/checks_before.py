"""Before the start: the estimate, the presets and the benchmark."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management
import comfy.samplers
import torch
from checks_common import SIGMAS, apply, fails, pack, prompt, tiny_model, tiny_vae

sys.path.append(str(Path(__file__).parents[2] / "core"))

from allocated import Allocated

MODES = {
    "dense": {"mode": "dense"},
    "window": {"mode": "window", "window_frames": 9},
    "sparse": {"mode": "sparse", "block_tokens": 16},
}


def estimate(model, **changes):
    """The node's outputs (MODEL, text, IMAGE), without measuring unless asked to."""
    node = pack("nodes.estimate").SparseForcingEstimate
    inputs = {
        "width": 64, "height": 96, "seconds": 1.5, "chunk_frames": 3, "steps": 4, "cfg": 1.0, "batch": 1,
        "measure": False,
    } | changes  # fmt: skip
    assert {*inputs, "model"} <= {i.id for i in node.define_schema().inputs}
    node.hidden = SimpleNamespace(unique_id=None)
    return node.execute(model=model, **inputs).args


def plan_of(model, **changes):
    module = pack("sparse_attn.estimate")
    attention = model.model_options["transformer_options"][pack("nodes.session").ATTENTION]
    shape = module.WanShape.of(model.model.diffusion_model)
    return module.Plan(shape, 64, 96, 9, attention=attention, dtype=torch.float32, **changes)


def made(model, cfg, on_open=None):
    """Bytes of all memories of a run of three chunks."""
    runs, sizes = [], []
    sampler = pack("nodes.streaming").StreamSampler(
        3, 9, lambda _: sizes.append(sum(s.nbytes for s in runs[0].states.values())),
        on_open=lambda run, *_: runs.append(run),
    )  # fmt: skip
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(prompt(1), prompt(2))
    guider.set_cfg(cfg)
    latent = torch.zeros(1, 16, 3, 12, 8)
    with torch.inference_mode():
        guider.sample(latent, latent, sampler, SIGMAS, disable_pbar=True, seed=1)
    return sizes


def check_the_estimate_is_what_a_run_remembers():
    module = pack("nodes.estimate")
    for settings in MODES.values():
        model = apply(tiny_model(), **settings)
        for cfg, sides in ((1.0, 1), (3.0, 2)):
            plan = plan_of(model, sides=sides)
            need = module.Estimate(model, None, plan).need(plan)
            assert made(model, cfg) == [need.memory] * 3
            weights = sum(p.numel() * p.element_size() for p in model.model.parameters())
            assert weights <= need.weights <= weights + 100_000  # the sampling's tables
            text = estimate(model, cfg=cfg)[1]
            assert f"memory of past frames {pack('sparse_attn.estimate').gigabytes(need.memory)}" in text, (
                text
            )


def check_a_pass_of_the_host_stays_below_the_estimate():
    module, hooks = pack("sparse_attn.estimate"), pack("nodes.hooks")
    real, peaks = hooks.diffusion_model_wrapper, []

    def traced(*args, **kwargs):
        with Allocated() as allocated:
            out = real(*args, **kwargs)
        peaks.append(allocated.peak)
        return out

    for mode in (
        "dense",
        "window",
    ):  # mode sparse: its reference kernel gathers pages, which the fused one does not
        hooks.diffusion_model_wrapper = traced
        try:
            model = apply(tiny_model(), **MODES[mode])
        finally:
            hooks.diffusion_model_wrapper = real
        for cfg, sides in ((1.0, 1), (3.0, 2)):
            peaks.clear()
            made(model, cfg)
            plan = plan_of(model, sides=sides)
            caches = plan.sides * plan.state().nbytes  # made in the first pass
            assert max(peaks) - caches <= module.activation_bytes(plan), (mode, cfg, peaks)


def check_an_estimate_loads_nothing():
    model, vae = apply(tiny_model(), mode="sparse", block_tokens=16), tiny_vae()
    real = comfy.model_management.load_models_gpu
    comfy.model_management.load_models_gpu = None  # anything that loads would fail
    try:
        same, text, picture = estimate(model, vae=vae, measure=True)
    finally:
        comfy.model_management.load_models_gpu = real
    assert same is model and picture.shape[0] == 1 and picture.shape[3] == 3
    assert "Decoding is not counted" not in text and "Speed: " in text and " frames a second" in text, text
    assert "Decoding is not counted" in estimate(model)[1]
    fails("width 100 is not a multiple of 16", estimate, model, width=100)
    fails("window_frames 6 is not a whole number of chunks of 4", estimate, model, chunk_frames=4)


def check_an_estimate_tells_what_rests_with_the_computer():
    model = tiny_model()
    _, here, _ = estimate(apply(model, **MODES["sparse"]))
    _, away, _ = estimate(apply(model, **MODES["sparse"], offload_pages=True))
    assert "computer's memory" not in here
    assert "pages in 16 bits in the computer's memory" in away and "of past frames, copied once a pass" in away


def check_a_budget_gives_settings_that_fit_or_says_why_not():
    model, key = apply(tiny_model(), window_frames=12, persistent_frames=9), pack("nodes.session").ATTENTION
    module, big = pack("nodes.estimate"), {"width": 512, "height": 512, "seconds": 5.0}
    network = pack("sparse_attn.estimate").WanShape.of(model.model.diffusion_model)
    plan = pack("sparse_attn.estimate").Plan(
        network, 512, 512, 21, attention=model.model_options["transformer_options"][key], dtype=torch.float32
    )
    need = module.Estimate(model, None, plan).need(plan)
    same, text, _ = estimate(model, budget_gb=need.total / 1e9 + 0.01, **big)
    assert same is model and "Settings that fit" not in text
    smaller, text, _ = estimate(model, budget_gb=(need.total - need.memory / 3) / 1e9, **big)
    found = smaller.model_options["transformer_options"][key]
    # pages in 8 bits, which save little of two layers (one is unpacked at a time), and then fewer frames
    assert found.page_bits == 8 and 12 <= found.window_frames + found.persistent_frames < 21
    assert "Settings that fit: mode sparse" in text and "pages in 8 bits" in text
    assert model.model_options["transformer_options"][key].window_frames == 12
    fails("Nothing fits into 1.00 MB: the least is", estimate, model, budget_gb=0.001, **big)


def check_presets_are_the_patch_with_their_settings():
    node, key = pack("nodes.preset").SparseForcingPreset, pack("nodes.session").ATTENTION
    choices = pack("sparse_attn.choices").CHOICES
    (combo,) = [i for i in node.define_schema().inputs if i.id == "preset"]
    assert list(combo.options) == list(choices)
    for name, attention in choices.items():
        (model,) = node.execute(tiny_model(), name).args
        assert model.model_options["transformer_options"][key] == attention


def benchmark(model, **changes):
    node = pack("nodes.benchmark").SparseForcingBenchmark
    inputs = {"width": 64, "height": 96, "chunks": 4, "chunk_frames": 3, "steps": 2} | changes
    assert {*inputs, "model"} <= {i.id for i in node.define_schema().inputs}
    node.hidden = SimpleNamespace(unique_id=None)
    with torch.inference_mode():
        return node.execute(model=model, **inputs).args


def check_the_benchmark_compares_three_memories():
    module, steps = pack("nodes.benchmark"), []
    real = comfy.utils.ProgressBar.update_absolute

    def update(bar, value, total=None, preview=None):
        steps.append((value, bar.total))
        return real(bar, value, total, preview)

    comfy.utils.ProgressBar.update_absolute = update
    try:
        text, picture = benchmark(apply(tiny_model(), mode="sparse", block_tokens=16))
    finally:
        comfy.utils.ProgressBar.update_absolute = real
    assert steps[-1] == (3 * 4 * 3, 3 * 4 * 3), steps[-1]
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")][2:]
    assert [row[0].strip() for row in rows] == ["dense", "window", "sparse"]
    assert all(len(row) == 6 and float(row[1]) > 0 and row[5].strip().endswith(" x") for row in rows), text
    gigabytes = pack("sparse_attn.estimate").gigabytes
    for row, settings in zip(
        rows, module.settings_to_compare(apply(tiny_model(), **MODES["sparse"])).values()
    ):
        plan = pack("sparse_attn.estimate").Plan(
            pack("sparse_attn.estimate").WanShape(2, 2, 128, 256),
            64,
            96,
            12,
            attention=settings,
            dtype=torch.float32,
        )
        assert row[4].strip() == gigabytes(plan.state().nbytes), (row, settings)
    assert picture.shape[0] == 1 and picture.shape[3] == 3
    given = benchmark(tiny_model(), chunks=3, positive=prompt(1))[0]
    assert given.count(" x |") == 3, "without Apply Sparse Forcing its default settings count"


def check_a_mode_that_computes_something_else_gets_no_speed_up():
    module = pack("nodes.benchmark")
    first = torch.ones(1, 16, 3, 4, 4)
    tried = {
        "dense": module.Tried([4.0, 2.0, 4.0], 10**9, first),
        "window": module.Tried([4.0, 1.0, 2.0], 10**8, 1.01 * first),
        "sparse": module.Tried([4.0, 1.0, 1.0], 10**8, 1.2 * first),
    }
    lines = module.table(tried, 3).splitlines()
    assert lines[3] == "| window | 1500 | 2000 | 8 | 0.10 GB | 2.00 x |", lines
    assert lines[4].endswith("| not comparable: 20% off |"), lines


def check_a_benchmark_can_be_stopped():
    model, passes = tiny_model(), []
    real = comfy.utils.ProgressBar.update

    def update(bar, value):
        passes.append(value)
        if len(passes) == 4:
            comfy.model_management.interrupt_current_processing()

    comfy.utils.ProgressBar.update = update
    try:
        benchmark(model)
    except comfy.model_management.InterruptProcessingException:
        assert len(passes) == 4
    else:
        raise AssertionError("the interrupt was ignored")
    finally:
        comfy.utils.ProgressBar.update = real
    benchmark(model, chunks=3)  # the next run works
