"""Every refusal names the value that is wrong and one that would be right."""

import math

import pytest
from sparse_forcing_pack.sparse_attn.config import (
    AttentionConfig,
    SamplerConfig,
    check_length,
    check_size,
    pixel_frames,
    shifted_sigmas,
)


@pytest.mark.parametrize(
    ("chunk_frames", "settings", "message"),
    [
        (3, {"window_frames": 8}, "window_frames 8 is not a whole number of chunks of 3 frames: use 6 or 9"),
        (3, {"window_frames": 2}, "window_frames 2 is not .* use 3"),
        (3, {"window_frames": 0}, "window_frames 0 is not .* use 3"),
        (3, {"sink_frames": 4}, "sink_frames 4 is not .* use 3 or 6"),
        (2, {"sink_frames": 2, "persistent_frames": 5}, "persistent_frames 5 is not .* use 4 or 6"),
        (3, {"sink_frames": 9}, "sink_frames 9 does not fit into persistent_frames 6.* at most 6"),
        (3, {"sink_frames": -1}, "sink_frames -1 must be a whole number, 0 or more"),
        (3, {"topk": 0.0}, "topk 0.0 .* more than 0 and at most 1"),
        (3, {"topk": 1.5}, "topk 1.5"),
        (3, {"block_tokens": 0}, "block_tokens 0 must be a whole number, 1 or more"),
        (0, {}, "chunk_frames 0 must be a whole number, 1 or more"),
        (3, {"mode": "full"}, "mode 'full' is unknown: use one of dense, window, sparse"),
        (3, {"positions": "relative"}, "positions 'relative' is unknown: use one of absolute, rebased"),
        (3, {"keep": "novel"}, "keep 'novel' is unknown: use one of attention, novelty"),
        (3, {"backend": "cuda"}, "backend 'cuda' is unknown: use one of auto, reference, triton"),
        (
            3,
            {"mode": "dense", "positions": "rebased"},
            "positions 'rebased' .* mode 'dense' .* Use positions 'absolute'",
        ),
        (
            3,
            {"mode": "window", "sink_frames": 4},
            "sink_frames 4 leaves no room .* window_frames 6: use .* at most 3",
        ),
        (3, {"mode": "window", "window_frames": 7}, "window_frames 7 is not .* use 6 or 9"),
        (
            3,
            {"sink_ema": 0.001},
            "sink_ema 0.001 moves the sink of mode 'window', .* 'sparse' with a sink of 3",
        ),
        (3, {"mode": "window", "sink_frames": 0, "sink_ema": 0.001}, "with a sink of 0: .* or sink_ema 0"),
        (3, {"mode": "window", "sink_ema": 1.0}, "sink_ema 1.0 is not a share"),
        (3, {"mode": "window", "sink_ema": math.nan}, "sink_ema nan is not a share"),
    ],
)
def test_attention_refuses(chunk_frames, settings, message):
    with pytest.raises(ValueError, match=message):
        AttentionConfig(**settings).validate(chunk_frames)


@pytest.mark.parametrize("chunk_frames", [1, 3])
@pytest.mark.parametrize("mode", ["dense", "window", "sparse"])
def test_defaults_fit_the_published_chunk_sizes(mode, chunk_frames):
    AttentionConfig(mode=mode).validate(chunk_frames)
    SamplerConfig(chunk_frames=chunk_frames).validate()


def test_settings_of_other_modes_are_not_looked_at():
    AttentionConfig(mode="dense", window_frames=8, topk=7.0).validate(3)
    AttentionConfig(mode="window", window_frames=9, sink_frames=1, persistent_frames=5, topk=7.0).validate(3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigmas": ()}, "sigmas is empty"),
        ({"sigmas": (1.0, 0.5, 0.5)}, "0.5 follows 0.5"),
        ({"sigmas": (0.5, 0.9)}, "sigmas must fall, but 0.9 follows 0.5"),
        ({"sigmas": (1.2, 0.9)}, "sigma 1.2 lies outside"),
        ({"sigmas": (1.0, 0.5, 0.0)}, "sigma 0.0 lies outside .* the final 0 is implied"),
        ({"first_sigmas": ()}, "first_sigmas is empty"),
        ({"first_sigmas": (1.0, 0.2, 0.4)}, "first_sigmas must fall, but 0.4 follows 0.2"),
        ({"first_sigmas": (0.9, 0.4)}, "first_sigmas starts at 0.9, but sigmas at 1.0"),
        ({"chunk_frames": 0}, "chunk_frames 0 must be a whole number, 1 or more"),
    ],
)
def test_sampler_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**settings).validate()


def test_four_shifted_steps_are_the_familys_schedule():
    assert shifted_sigmas(4) == pytest.approx(SamplerConfig().sigmas, abs=1e-7)
    assert shifted_sigmas(3, shift=1.0) == pytest.approx((1.0, 2 / 3, 1 / 3))


def test_lengths():
    assert [pixel_frames(n) for n in (1, 2, 21)] == [1, 5, 81]
    for frames in (3, 21):
        check_length(frames, 3)
    with pytest.raises(
        ValueError, match=r"20 latent frames \(77 video frames\) .* use 18 \(69 .*\) or 21 \(81 "
    ):
        check_length(20, 3)
    with pytest.raises(ValueError, match=r"1 latent frames .* use 3 \(9 video frames\)\."):
        check_length(1, 3)


def test_sizes():
    check_size(832, 480)
    with pytest.raises(ValueError, match="width 850 is not a multiple of 16 pixels: use 848 or 864"):
        check_size(850, 480)
    with pytest.raises(ValueError, match=r"height 8 is not a multiple of 16 pixels: use 16\."):
        check_size(832, 8)
