"""Schedules against the published numbers, and which settings a file name gets."""

import pytest
from sparse_forcing_pack.sparse_attn import presets
from sparse_forcing_pack.sparse_attn.config import SamplerConfig
from sparse_forcing_pack.sparse_attn.presets import FAMILY, PRESETS, propose

FOUR = (1000, 937.5, 833.3333, 625)
PUBLISHED = {  # timesteps as the authors print them
    presets.SELF_FORCING: FOUR,
    presets.CAUSAL_FORCING: FOUR,
    presets.CAUSAL_FORCING_FRAMES: FOUR,
    presets.CAUSAL_FORCING_2: (1000, 833.3333),
    presets.CAUSAL_FORCING_1: (1000,),
    presets.LONGLIVE: FOUR,
    presets.REWARD_FORCING: FOUR,
    presets.KREA: (1000, 937, 833, 625),
}


def timesteps(sigmas):
    return tuple(round(1000 * sigma, 4) for sigma in sigmas)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_schedules_are_the_published_ones(preset):
    assert timesteps(preset.sigmas) == PUBLISHED[preset]


def test_the_exact_levels_of_the_shift_5_warp():
    assert presets.SELF_FORCING.sigmas == (1.0, 15 / 16, 5 / 6, 5 / 8)
    for sigma, exact in zip(presets.ROLLING_SIGMAS, (1, 20 / 21, 15 / 17, 10 / 13, 5 / 9)):
        assert sigma == pytest.approx(exact, abs=1e-15)
    assert tuple(round(1000 * s, 3) for s in presets.ROLLING_SIGMAS) == (
        1000,
        952.381,
        882.353,
        769.231,
        555.556,
    )
    assert SamplerConfig().sigmas == pytest.approx(presets.SELF_FORCING.sigmas, abs=5e-8)


def test_the_first_chunk_of_the_short_schedules_has_four_steps():
    for preset in (presets.CAUSAL_FORCING_2, presets.CAUSAL_FORCING_1):
        assert timesteps(preset.first_sigmas) == FOUR
        assert timesteps(preset.sampler.first_sigmas) == FOUR
    assert presets.CAUSAL_FORCING_FRAMES.first_sigmas is None


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_settings_work_together(preset):
    preset.sampler.validate()
    for attention in (preset.attention, preset.sparse):
        attention.validate(preset.chunk_frames)
    assert preset.sparse.mode == "sparse"
    assert preset.sparse.sink_frames >= max(1, preset.sink_frames)
    assert preset.name in preset.describe()
    assert preset.source.count("/") and ":" in preset.source


def test_the_windows_are_the_authors():
    assert presets.SELF_FORCING.attention.mode == "dense"
    long = presets.LONGLIVE.attention
    assert (long.mode, long.window_frames, long.sink_frames, long.positions) == ("window", 12, 3, "absolute")
    reward = presets.REWARD_FORCING.attention
    assert (reward.mode, reward.window_frames, reward.sink_frames, reward.positions) == (
        "window",
        9,
        3,
        "rebased",
    )
    assert reward.sink_ema == 0.001 and presets.REWARD_FORCING.sparse.sink_ema == 0
    assert "sink 3 (sink_ema 0.001)" in presets.REWARD_FORCING.describe()
    assert not any(preset.sink_ema for preset in presets.PRESETS if preset is not presets.REWARD_FORCING)


def test_the_paper_s_budgets_on_top():
    sparse = presets.SELF_FORCING.sparse
    assert (sparse.window_frames, sparse.persistent_frames, sparse.sink_frames, sparse.topk) == (
        6,
        6,
        3,
        0.25,
    )
    assert presets.CAUSAL_FORCING_FRAMES.sparse.sink_frames == 1


@pytest.mark.parametrize(
    ("path", "preset"),
    [
        ("self_forcing_dmd.pt", presets.SELF_FORCING),
        ("checkpoints/self_forcing_sid.pt", presets.SELF_FORCING),
        ("Wan2.1-T2V-1.3B-Self-Forcing-DMD-FP16.safetensors", presets.SELF_FORCING),
        ("chunkwise/causal_forcing.pt", presets.CAUSAL_FORCING),
        ("framewise/causal_forcing.pt", presets.CAUSAL_FORCING_FRAMES),
        ("framewise\\causal_forcing.pt", presets.CAUSAL_FORCING_FRAMES),
        ("causal_forcing-framewise.safetensors", presets.CAUSAL_FORCING_FRAMES),
        ("causal-forcing++/framewise-2step.pt", presets.CAUSAL_FORCING_2),
        ("framewise-1step.pt", presets.CAUSAL_FORCING_1),
        ("longlive_base.pt", presets.LONGLIVE),
        ("Reward-Forcing-T2V-1.3B/rewardforcing.pt", presets.REWARD_FORCING),
        ("krea-realtime-video-14b.safetensors", presets.KREA),
        ("self_forcing/longlive_merged.safetensors", presets.LONGLIVE),  # its own name before the folder's
    ],
)
def test_files_get_their_authors_settings(path, preset):
    proposal = propose(path)
    assert proposal.preset is preset
    assert proposal.warning == ""
    assert "from its name" in proposal.reason


@pytest.mark.parametrize("path", ["rolling_forcing_dmd.pt", "chunkwise/longvideo.pt"])
def test_rolling_forcing_is_said_not_to_fit(path):
    proposal = propose(path)
    assert proposal.preset is presets.SELF_FORCING
    assert "each at its own noise level" in proposal.warning


@pytest.mark.parametrize("path", ["", "model.safetensors", "wan2.1_t2v_1.3B_fp16.safetensors"])
def test_a_name_that_says_nothing_is_admitted(path):
    proposal = propose(path)
    assert proposal.preset is presets.SELF_FORCING
    assert "says nothing" in proposal.reason and "chunks of 1" in proposal.warning


def test_a_converted_file_keeps_its_preset_under_any_name():
    proposal = propose("a.safetensors", {FAMILY: presets.CAUSAL_FORCING_2.name})
    assert proposal.preset is presets.CAUSAL_FORCING_2
    assert propose("longlive.safetensors", {FAMILY: "unheard of"}).preset is presets.LONGLIVE
    assert len({preset.name for preset in PRESETS}) == len(PRESETS)
