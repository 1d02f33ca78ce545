"""Self-Forcing's CausalWanModel and its inference loop, beside our backbone, memory and rollout.

SELF_FORCING_PATH names a checkout of github.com/guandeh17/Self-Forcing. See conftest.py for what makes it fair.
"""

import logging

import pytest
import torch
from sparse_forcing_pack.sparse_attn.config import AttentionConfig, SamplerConfig
from sparse_forcing_pack.sparse_attn.positions import apply_rope, rope_table
from sparse_forcing_pack.sparse_attn.presets import ROLLING_SIGMAS, SELF_FORCING

logger = logging.getLogger("sparse_forcing.authors")

SEED = 11
FULL = AttentionConfig(mode="dense")
ROLLING = AttentionConfig(mode="window", window_frames=6, sink_frames=0)
SINK = AttentionConfig(mode="window", window_frames=9, sink_frames=3)
WINDOWS = {"full cache": (FULL, -1, 0), "rolling window": (ROLLING, 6, 0), "window and sink": (SINK, 9, 3)}


def draws(chunks, frames=3, seed=SEED, steps=3):
    return [(seed, chunk, frames, steps) for chunk in range(chunks)]


def test_the_sigma_tables_are_theirs(self_forcing, weights, context):
    pipeline = self_forcing.pipeline(weights, context)
    scheduler = pipeline.scheduler
    for steps, ours in (
        ([1000, 750, 500, 250], SELF_FORCING.sigmas),
        ([1000, 800, 600, 400, 200], ROLLING_SIGMAS),
    ):
        timesteps = scheduler.timesteps[1000 - torch.tensor(steps)]
        sigmas = scheduler.sigmas[1000 - torch.tensor(steps)]
        mine = torch.tensor(ours)  # in float32, as theirs
        assert (mine - sigmas).abs().max() <= 2**-24  # one rounding
        assert (1000 * mine - timesteps).abs().max() <= 2**-14
    assert torch.equal(
        pipeline.denoising_step_list, scheduler.timesteps[1000 - torch.tensor([1000, 750, 500, 250])]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_are_theirs_up_to_frame_1024(self_forcing, dtype):
    """Every chunk of their table. They turn keys in float64, ours in float32: both then round to the keys' type."""
    theirs = self_forcing["wan.modules.causal_model"]
    table = torch.cat([theirs.rope_params(1024, n) for n in (44, 42, 42)], dim=1)
    x = torch.randn(1, 3 * 2 * 3, 2, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    largest, other_roundings, seen = 0.0, 0, 0
    for start in range(0, 1022, 3):
        other = theirs.causal_rope_apply(x, torch.tensor([[3, 2, 3]]), table, start_frame=start)
        mine = apply_rope(x, *rope_table(start, 3, 2, 3, 128, "cpu"))
        difference = (mine.double() - other.double()).abs()
        largest = max(largest, difference.max().item())
        other_roundings, seen = other_roundings + int((difference > 0).sum()), seen + difference.numel()
    logger.info("%s: largest %.1e, %.2g of all values differ", dtype, largest, other_roundings / seen)
    ulp = 4 * torch.finfo(dtype).eps  # of the largest values, 4 to 8
    assert largest <= ulp
    if dtype == torch.bfloat16:
        assert other_roundings / seen < 1e-3, "only where float32 lies on the border between two"


@pytest.mark.parametrize("window", WINDOWS)
def test_text_to_video(self_forcing, weights, context, noise, ours, run_theirs, agree, window):
    attention, size, sink = WINDOWS[window]
    pipeline = self_forcing.pipeline(weights, context, window=size, sink=sink)
    other = run_theirs(pipeline, noise, draws(5), text_prompts=["first"])
    agree(ours(attention, SELF_FORCING.sampler).run(noise), other)


@pytest.mark.parametrize("window", WINDOWS)
def test_a_clip_is_extended(self_forcing, weights, context, noise, ours, run_theirs, agree, window):
    attention, size, sink = WINDOWS[window]
    given, first = noise[:, :, :6] / 2, noise[:, :, 6:]
    pipeline = self_forcing.pipeline(weights, context, window=size, sink=sink)
    initial = given.transpose(1, 2)
    other = run_theirs(pipeline, first, draws(3), text_prompts=["first"], initial_latent=initial)
    mine = ours(attention, SELF_FORCING.sampler)
    mine.prefill(given)
    agree(torch.cat([given, mine.run(first)], dim=2), other)


@pytest.mark.parametrize("window", ["full cache", "rolling window"])
def test_from_an_image_with_chunks_of_three(
    self_forcing, weights, context, noise, ours, run_theirs, agree, window
):
    """Their independent_first_frame with a given image: a chunk of one frame, then chunks of three."""
    attention, size, sink = WINDOWS[window]
    given, first = noise[:, :, :1] / 2, noise[:, :, 1:10]
    pipeline = self_forcing.pipeline(weights, context, window=size, sink=sink, independent_first_frame=True)
    initial = given.transpose(1, 2)
    other = run_theirs(pipeline, first, draws(3), text_prompts=["first"], initial_latent=initial)
    mine = ours(attention, SELF_FORCING.sampler)
    mine.prefill(given)
    agree(torch.cat([given, mine.run(first)], dim=2), other)


def test_a_generated_first_frame_is_a_chunk_of_its_own(
    self_forcing, weights, context, noise, ours, run_theirs, agree
):
    """Their independent_first_frame without an image: here two streams over one memory, the first of one frame."""
    pipeline = self_forcing.pipeline(weights, context, independent_first_frame=True)
    other = run_theirs(
        pipeline, noise[:, :, :7], [*draws(1, frames=1), *draws(2, seed=SEED + 5)], text_prompts=["first"]
    )
    mine = ours(FULL, SELF_FORCING.sampler)
    head = mine.run(noise[:, :, :1])
    agree(torch.cat([head, mine.run(noise[:, :, 1:7], seed=SEED + 5)], dim=2), other)


def test_frame_by_frame_from_an_image(self_forcing, weights, context, noise, ours, run_theirs, agree):
    """Chunks of one frame, as the frame-wise models of the family run, in a window with a sink."""
    attention = AttentionConfig(mode="window", window_frames=4, sink_frames=1)
    given, first = noise[:, :, :1] / 2, noise[:, :, 1:8]
    pipeline = self_forcing.pipeline(weights, context, window=4, sink=1, num_frame_per_block=1)
    initial = given.transpose(1, 2)
    other = run_theirs(pipeline, first, draws(7, frames=1), text_prompts=["first"], initial_latent=initial)
    mine = ours(attention, SamplerConfig(SELF_FORCING.sigmas, chunk_frames=1))
    mine.prefill(given)
    agree(torch.cat([given, mine.run(first)], dim=2), other)


def test_the_comparison_would_see_another_window(self_forcing, noise, ours):
    """What is compared above differs between windows by far more than the tolerance, once frames have left."""
    full, rolling, sink = (
        ours(attention, SamplerConfig((1.0,))).run(noise)[:, :, 9:] for attention in (FULL, ROLLING, SINK)
    )
    for one, other in ((full, rolling), (full, sink), (rolling, sink)):
        assert (one - other).abs().max() > 1e-3
