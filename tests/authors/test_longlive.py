"""LongLive's model and loops, beside our backbone, memory and rollout: window with sink, and its prompt switch.

LONGLIVE_PATH names a checkout of github.com/NVlabs/LongLive, branch v1.0. See conftest.py for what makes it fair.

At a switch LongLive empties the cross-attention cache and runs the last frames of its window once more, all in one pass
at t = 0 under the new prompt; attention in it is not causal (the block mask that it builds is never used). Our
`change_prompt` gives the authors' latents: "re-cache" is their global sink, "flush" their renewed one.
"""

import logging
from itertools import combinations

import pytest
import torch
from sparse_forcing_pack.sparse_attn.config import AttentionConfig, SamplerConfig
from sparse_forcing_pack.sparse_attn.presets import LONGLIVE
from sparse_forcing_pack.sparse_attn.timeline import change_prompt

logger = logging.getLogger("sparse_forcing.authors")

SEED = 11
WINDOW = LONGLIVE.attention  # 12 frames, the sink of 3 among them


@pytest.fixture(scope="module")
def long_noise():
    """First noise of 18 latent frames, [B, C, F, H, W]: a switch, and two thirds of the window after it remain."""
    return torch.randn(1, 16, 18, 8, 12, generator=torch.Generator().manual_seed(2))


def draws(chunks):
    return [(SEED, chunk, 3, 3) for chunk in range(chunks)]


@pytest.mark.parametrize("window", ["full cache", "window and sink"])
def test_text_to_video(longlive, weights, context, noise, ours, run_theirs, agree, window):
    attention = AttentionConfig(mode="dense") if window == "full cache" else WINDOW
    size, sink = (-1, 0) if window == "full cache" else (12, 3)
    pipeline = longlive.pipeline(weights, context, window=size, sink=sink)
    other = run_theirs(pipeline, noise, draws(5), text_prompts=["first"])
    agree(ours(attention, LONGLIVE.sampler).run(noise), other)


def switch_prompt(mine, latents, *, keep_sink: bool) -> None:
    """The pack's prompt switch after `latents` [B, C, F, H, W]; keep_sink is their global_sink."""
    mine.prompt("second")
    policy = "re-cache" if keep_sink else "flush"
    change_prompt(mine.denoise, mine.memory, [mine.memory], lambda a, b: latents[:, :, a:b], policy, 3)


@pytest.mark.parametrize("switch", [12, 15])
@pytest.mark.parametrize("global_sink", [True, False])
def test_a_prompt_switch(
    longlive, weights, context, long_noise, ours, run_theirs, agree, global_sink, switch
):
    """At frame 12 the window is just full, at 15 frames have left it; afterwards frames leave in both."""
    pipeline = longlive.pipeline(
        weights,
        context,
        window=12,
        sink=3,
        module="pipeline.interactive_causal_inference",
        global_sink=global_sink,
    )
    prompts = [["first"], ["second"]]
    other = run_theirs(
        pipeline, long_noise, draws(6), text_prompts_list=prompts, switch_frame_indices=[switch]
    )
    mine = ours(WINDOW, LONGLIVE.sampler)
    before = mine.run(long_noise[:, :, :switch])
    switch_prompt(mine, before, keep_sink=global_sink)
    after = mine.run(long_noise, start_chunk=switch // 3)
    agree(torch.cat([before, after], dim=2), other)


def test_the_comparison_would_see_another_switch(longlive, long_noise, ours):
    """No new pass, a kept sink, a renewed sink, chunk after chunk instead of one pass: each gives its own latents."""

    def after_the_switch(policy):
        mine = ours(WINDOW, SamplerConfig((1.0,)))
        before = mine.run(long_noise[:, :, :15])
        mine.prompt("second")
        if policy in ("kept", "renewed"):
            switch_prompt(mine, before, keep_sink=policy == "kept")
        if policy == "chunks":
            mine.memory.rewind(9)
            mine.prefill(before[:, :, 6:15])
        return mine.run(long_noise, start_chunk=5)

    latents = {policy: after_the_switch(policy) for policy in ("none", "kept", "renewed", "chunks")}
    for one, other in combinations(latents, 2):
        difference = (latents[one] - latents[other]).abs().max().item()
        logger.info("%s and %s differ by %.1e", one, other, difference)
        assert difference > 1e-3
