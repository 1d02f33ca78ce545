"""Two relatives of Self-Forcing, each with one thing of its own.

CAUSAL_FORCING_PATH names a checkout of github.com/thu-ml/Causal-Forcing: its ++ models give the first chunk a longer
schedule. REWARD_FORCING_PATH names one of github.com/JaydenLyh/Reward-Forcing: its cache holds keys without rotation
and places them by their order in the cache, which is what positions "rebased" means here; and its sink is a moving
average, which is `sink_ema` here.
"""

import logging
from dataclasses import replace

import pytest
import torch
from sparse_forcing_pack.sparse_attn.config import AttentionConfig
from sparse_forcing_pack.sparse_attn.presets import (
    CAUSAL_FORCING,
    CAUSAL_FORCING_1,
    CAUSAL_FORCING_2,
    REWARD_FORCING,
)

logger = logging.getLogger("sparse_forcing.authors")

SEED = 11


def test_chunk_wise(causal_forcing, weights, context, noise, ours, run_theirs, agree):
    pipeline = causal_forcing.pipeline(weights, context)
    draws = [(SEED, chunk, 3, 3) for chunk in range(4)]
    other = run_theirs(pipeline, noise[:, :, :12], draws, text_prompts=["first"])
    agree(ours(AttentionConfig(mode="dense"), CAUSAL_FORCING.sampler).run(noise[:, :, :12]), other)


@pytest.mark.parametrize("preset", [CAUSAL_FORCING_2, CAUSAL_FORCING_1], ids=["2 steps", "1 step"])
def test_the_first_chunk_has_its_own_schedule(
    causal_forcing, weights, context, noise, ours, run_theirs, agree, preset
):
    steps = {2: [1000, 500], 1: [1000]}[len(preset.sigmas)]
    pipeline = causal_forcing.pipeline(
        weights,
        context,
        num_frame_per_block=1,
        denoising_step_list=steps,
        denoising_step_list_first_chunk=[1000, 750, 500, 250],
    )
    draws = [(SEED, chunk, 1, len(steps) - 1 if chunk else 3) for chunk in range(6)]
    other = run_theirs(pipeline, noise[:, :, :6], draws, text_prompts=["first"])
    agree(ours(AttentionConfig(mode="dense"), preset.sampler).run(noise[:, :, :6]), other)


def test_from_an_image_the_first_generated_frame_has_the_long_schedule_too(
    causal_forcing, weights, context, noise, ours, run_theirs, agree
):
    pipeline = causal_forcing.pipeline(
        weights,
        context,
        num_frame_per_block=1,
        denoising_step_list=[1000, 500],
        denoising_step_list_first_chunk=[1000, 750, 500, 250],
    )
    given, first = noise[:, :, :1] / 2, noise[:, :, 1:5]
    draws = [(SEED, chunk, 1, 1 if chunk else 3) for chunk in range(4)]
    other = run_theirs(pipeline, first, draws, text_prompts=["first"], initial_latent=given.transpose(1, 2))
    mine = ours(AttentionConfig(mode="dense"), CAUSAL_FORCING_2.sampler)
    mine.prefill(given)
    agree(torch.cat([given, mine.run(first)], dim=2), other)


WINDOW = AttentionConfig(mode="window", window_frames=6, sink_frames=3, positions="rebased")


@pytest.mark.parametrize("moved", [0.0, 0.001, 0.25])
def test_places_in_the_cache_and_a_moving_sink(
    reward_forcing, weights, context, noise, ours, run_theirs, agree, moved
):
    """Their average is 0.001; 0 lets the sink rest, 0.25 would show what a thousandth may hide."""
    pipeline = reward_forcing.pipeline(weights, context, window=6, sink=3)
    averages = [part for part in pipeline.generator.modules() if hasattr(part, "compression_alpha")]
    assert {part.compression_alpha for part in averages} == {1 - REWARD_FORCING.sink_ema}
    for part in averages:
        part.compression_alpha = 1 - moved
    other = run_theirs(pipeline, noise, [(SEED, chunk, 3, 3) for chunk in range(5)], text_prompts=["first"])
    mine = ours(replace(WINDOW, sink_ema=moved), REWARD_FORCING.sampler)
    agree(mine.run(noise), other)


def test_the_comparison_would_see_a_resting_sink(noise, ours):
    resting, moving = (
        ours(replace(WINDOW, sink_ema=moved), REWARD_FORCING.sampler).run(noise)
        for moved in (0.0, REWARD_FORCING.sink_ema)
    )
    difference = (resting - moving).abs().max().item()
    logger.info("a resting sink differs by %.2e", difference)
    assert difference > 1e-4
