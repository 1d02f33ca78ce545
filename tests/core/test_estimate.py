"""Estimates against what is really allocated, counted and tried."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from allocated import Allocated
from sparse_forcing_pack.sparse_attn import speed, state
from sparse_forcing_pack.sparse_attn.choices import CHOICES
from sparse_forcing_pack.sparse_attn.config import AttentionConfig
from sparse_forcing_pack.sparse_attn.estimate import (
    TEXT_TOKENS,
    WAN_1_3B,
    Need,
    Plan,
    WanShape,
    activation_bytes,
    fit_budget,
    frames_read,
    gigabytes,
    kept_bytes,
    memory_bytes,
    pass_flops,
)
from sparse_forcing_pack.sparse_attn.fast import FastModel, FastOptions, FastPass
from sparse_forcing_pack.sparse_attn.speed import chunk_seconds, layer_seconds
from sparse_forcing_pack.sparse_attn.wan import WanModel, frame_timesteps
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

SMALL = WanShape(layers=2, heads=2, head_dim=128, ffn_dim=1024)
MODES = {
    "dense": AttentionConfig(mode="dense"),
    "window": AttentionConfig(mode="window", window_frames=9, sink_frames=1),
    "rebased": AttentionConfig(mode="window", window_frames=6, positions="rebased"),
    "sparse": AttentionConfig(),
    "sparse, ragged blocks": AttentionConfig(window_frames=9, persistent_frames=3, block_tokens=48, topk=0.5),
}
CPU = torch.device("cpu")


def network(shape, dtype=torch.bfloat16, device="cpu"):
    with torch.device(device):
        model = WanModel(dim=shape.dim, ffn_dim=shape.ffn_dim, num_heads=shape.heads, num_layers=shape.layers)
    return model.to(dtype)


def one_pass(model, plan, memory):
    """Inputs are made first, so that what the pass itself makes can be told."""
    height, width = plan.height // 8, plan.width // 8
    x = torch.randn(plan.batch, 16, plan.chunk_frames, height, width, dtype=plan.dtype)
    text = torch.randn(plan.batch, TEXT_TOKENS, 4096, dtype=plan.dtype)
    time = frame_timesteps(0.5, plan.batch, plan.chunk_frames, "cpu")

    def run():
        return model(x, time, model.cross_kv(text), memory.attend, memory.t_start)

    return run


def test_the_shape_is_read_from_the_model():
    assert WanShape.of(network(WAN_1_3B, device="meta")) == WAN_1_3B
    assert WAN_1_3B.dim == 1536


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "plan",
    [
        Plan(SMALL, 64, 96, 12, dtype=torch.float32),
        Plan(SMALL, 112, 48, 21, batch=2, sides=2),
        Plan(replace(SMALL, layers=1, heads=5), 160, 80, 15, sides=2, dtype=torch.float16),
    ],
    ids=["float32", "batch", "heads"],
)
def test_the_memory_is_what_the_stream_allocates(plan, mode):
    plan = replace(plan, attention=MODES[mode])
    with Allocated() as allocated:
        memory = plan.state("cpu")
    assert memory_bytes(plan) == plan.sides * memory.nbytes
    small = 64 * plan.chunk_tokens + 4096  # which token is in which block, and which row is whose
    assert memory.nbytes <= allocated.now <= memory.nbytes + small


def test_what_passes_share_is_counted():
    """Attention over P of the first pass is held once, however many chunks it took until P was full."""
    plan = Plan(SMALL, 64, 48, 21, dtype=torch.float32, options=FastOptions(reuse_persistent=True))
    memory, model = plan.state("cpu"), network(SMALL, torch.float32).requires_grad_(False)
    run = FastPass(FastModel(model, plan.options), memory)
    cross_kv, shape = model.cross_kv(torch.randn(1, 4, 4096)), (1, 16, 3, 6, 8)
    for _ in range(7):
        memory.begin_chunk(3)
        for sigma in (1.0, 0.5, 0.0):
            memory.noisy = sigma > 0
            run(torch.randn(shape), sigma, cross_kv)
        memory.end_chunk()
    held = {x.data_ptr(): x.nbytes for kept in run._kept.values() for xs in filter(None, kept.persistent) for x in xs}
    assert len(run._kept) > 2 and sum(held.values()) == kept_bytes(memory, plan.options) > 0
    assert memory_bytes(plan) == memory.nbytes + kept_bytes(memory, plan.options)


def test_the_memory_of_wan_is_the_papers():
    """arXiv 2604.21221: 6.04 GB for 21 frames, and 42 % less for 12."""
    dense = memory_bytes(Plan(WAN_1_3B, attention=AttentionConfig(mode="dense")))
    assert dense == 21 * 1560 * 184_320
    window = memory_bytes(Plan(WAN_1_3B, attention=AttentionConfig(mode="window", window_frames=12)))
    assert window / dense == pytest.approx(1 - 0.42, abs=0.01)
    sparse = memory_bytes(Plan(WAN_1_3B))
    # the open chunk is stored once, not in every layer; blocks of 64 hold 60 tokens
    assert 0.75 < sparse / window < 0.82


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("width", "height", "batch"), [(128, 96, 1), (112, 80, 2)])
def test_a_pass_stays_below_its_bound(mode, width, height, batch, monkeypatch):
    def kernel(q, k_pages, *_args, **_options):  # what a fused kernel allocates: its results
        return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)

    monkeypatch.setattr(state, "pbsa_attention", kernel)
    plan = Plan(SMALL, width, height, 13, attention=MODES[mode], batch=batch)
    model, memory, peaks = network(SMALL), plan.state("cpu"), []
    with torch.no_grad():
        for frames in (1, 3, 3, 3):
            memory.begin_chunk(frames)
            run = one_pass(model, replace(plan, chunk_frames=frames), memory)
            with Allocated() as allocated:
                run()
            memory.end_chunk()
            peaks.append(allocated.peak)
    assert max(peaks) <= activation_bytes(plan) <= 2.5 * max(peaks)


@pytest.mark.parametrize("frames", [3, 6, 12])
@pytest.mark.parametrize("mode", ["dense", "window", "rebased"])
def test_the_work_is_what_torch_counts(mode, frames):
    plan = Plan(SMALL, 128, 128, frames, attention=MODES[mode], dtype=torch.float32)
    model, memory = network(SMALL, torch.float32), plan.state("cpu")
    with torch.no_grad():
        for _ in range(frames // 3):
            memory.begin_chunk(3)
            run = one_pass(model, plan, memory)
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                run()
            memory.end_chunk()
    total = counter.get_total_flops()
    outside = 2 * TEXT_TOKENS * SMALL.dim * (4096 + SMALL.dim * (1 + 2 * SMALL.layers))  # the prompt's own
    assert total - outside == pytest.approx(pass_flops(plan), rel=0.02)


@pytest.mark.parametrize("page", ["docs/estimate.md", "web/docs/SparseForcingPreset/en.md"])
def test_the_pages_say_what_presets_cost(page):
    root = Path(__file__).parents[2]
    lines = (root / page).read_text(encoding="utf-8").splitlines()
    dense = Plan(WAN_1_3B, attention=AttentionConfig(mode="dense"))
    tooltip = (root / "nodes" / "preset.py").read_text(encoding="utf-8")
    for name, attention in CHOICES.items():
        plan = Plan(WAN_1_3B, attention=attention)
        (line,) = [line for line in lines if line.startswith(f"| {name} |")]
        assert f"| {attention.window_frames} | {attention.persistent_frames} | " in line
        assert f"{attention.topk:g}".lstrip("0") in line
        memory, work = memory_bytes(plan), pass_flops(plan) / pass_flops(dense)
        assert f"| {gigabytes(memory)} | {100 * work:.0f} % |" in line, (line, gigabytes(memory), work)
        assert f"{memory / 1e9:.1f} GB, {100 * work:.0f} %" in tooltip


def test_frames_read():
    plan = Plan(SMALL)
    assert frames_read(plan) == 6 + 0.25 * 6
    assert frames_read(replace(plan, latent_frames=3)) == 3  # the opening chunk reads all of itself
    assert frames_read(replace(plan, latent_frames=9)) == 3 + 0.25 * 6
    assert frames_read(replace(plan, attention=MODES["dense"], latent_frames=240)) == 240
    assert frames_read(replace(plan, attention=MODES["window"])) == 9


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("share", [0.4, 0.6, 0.8, 0.95, 1.0, 1.5])
def test_a_budget_is_used_as_far_as_it_goes(mode, share):
    plan, weights, decode = Plan(SMALL, 128, 96, 21, attention=MODES[mode]), 10**6, 10**5

    def need(choice):
        return Need(weights, memory_bytes(choice), activation_bytes(choice), decode)

    budget = int(share * need(plan).total)
    base = plan.attention if mode != "dense" else AttentionConfig()
    rivals = []
    for window, persistent in itertools.product(range(3, 13, 3), range(0, 13, 3)):
        attention = replace(base, window_frames=window, persistent_frames=persistent)
        least = 6 + (base.sink_frames if base.mode == "window" else 0)
        allowed = least <= window <= base.window_frames and (
            persistent == base.persistent_frames
            if base.mode == "window"
            else base.sink_frames <= persistent <= base.persistent_frames
        )
        rival = replace(plan, attention=attention)
        if base.mode == "sparse" and not (
            mode == "dense" and attention == base and need(rival).total <= budget
        ):
            rival = replace(rival, attention=replace(attention, page_bits=8))
        if allowed and need(rival).total <= budget:
            rivals.append(memory_bytes(rival))
    if share < 1 and not rivals:
        with pytest.raises(ValueError, match=f"Nothing fits into .* than {plan.width} x {plan.height}"):
            fit_budget(plan, budget, need)
        return
    found = fit_budget(plan, budget, need)
    found.validate()
    assert need(found).total <= budget
    assert found == plan if share >= 1 else memory_bytes(found) == max(rivals)


def test_what_cannot_be_estimated_is_refused():
    with pytest.raises(ValueError, match="width 100 is not a multiple of 16"):
        Plan(SMALL, width=100).validate()
    with pytest.raises(ValueError, match="sides 0 must be 1 or more"):
        Plan(SMALL, sides=0).validate()
    with pytest.raises(ValueError, match="window_frames 7"):
        fit_budget(Plan(SMALL, attention=AttentionConfig(window_frames=7)), 1, lambda plan: Need(1, 1, 1))


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_is_tried_on_the_memory_of_the_last_chunk(mode, monkeypatch):
    plan = Plan(SMALL, 64, 64, 21, attention=MODES[mode], sides=2, dtype=torch.float32)
    states, real = [], speed._layer_pass
    monkeypatch.setattr(
        speed, "_layer_pass", lambda one, memory, device: states.append(memory) or real(one, memory, device)
    )
    seconds = layer_seconds(plan, CPU)
    (memory,) = states
    memory.noisy = False
    keys = torch.zeros(1, memory.open_frames * 16, memory.heads, memory.head_dim)
    memory.attend(0, keys, keys, keys)
    memory.end_chunk()
    full = plan.state("cpu").describe() | memory.describe()
    assert memory.layers == 1 and seconds > 0
    if mode.startswith("sparse"):
        assert full["persistent_blocks"] == full["persistent_blocks_at_most"]
    else:
        assert full["frames_kept"] == full["frames_at_most"]
    assert chunk_seconds(plan, seconds) == 5 * 2 * 2 * seconds


def test_what_would_take_too_long_is_not_tried():
    assert layer_seconds(Plan(WAN_1_3B, dtype=torch.float32), CPU, limit_s=0.001) is None
