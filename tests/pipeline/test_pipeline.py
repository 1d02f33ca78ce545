"""From a request to decoded chunks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sparse_forcing_pack.sparse_attn.config import AttentionConfig, SamplerConfig
from sparse_forcing_pack.sparse_attn.pipeline import Request, VideoPipeline, compute_dtype, pick_device

SMALL = Request(
    "a red circle moving right over a navy plain background", latent_frames=9, width=64, height=48, seed=5
)


def video(pipeline: VideoPipeline, request: Request) -> np.ndarray:
    return np.concatenate([chunk.frames for chunk in pipeline.generate(request)])


@pytest.mark.parametrize("mode", ["dense", "window", "sparse"])
def test_chunks_add_up_to_the_video(pipeline, mode):
    request, passes = replace(SMALL, attention=AttentionConfig(mode=mode)), []
    chunks = list(pipeline.generate(request, on_pass=lambda *where: passes.append(where)))
    assert [chunk.index for chunk in chunks] == [0, 1, 2]
    assert [chunk.frames.shape for chunk in chunks] == [(n, 48, 64, 3) for n in (9, 12, 12)]
    assert sum(len(chunk.frames) for chunk in chunks) == request.video_frames == 33
    assert all(chunk.frames.dtype == np.uint8 and chunk.seconds > 0 and chunk.fps > 0 for chunk in chunks)
    # Four denoising passes, sixteen in the opening chunk, and a clean one, but none where nothing follows.
    assert passes == [(c, p, n) for c, n in ((0, 17), (1, 5), (2, 4)) for p in range(n)]


def test_same_seed_same_video(pipeline):
    first = video(pipeline, SMALL)
    assert np.array_equal(first, video(pipeline, SMALL))
    assert not np.array_equal(first, video(pipeline, replace(SMALL, seed=6)))
    assert not np.array_equal(
        first, video(pipeline, replace(SMALL, prompt="a blue star over a plum background"))
    )


def test_while_all_fits_into_the_window_the_modes_agree(pipeline):
    """Two chunks: window and sparse (reading the whole window) see exactly what dense sees."""
    request = replace(SMALL, latent_frames=6)
    dense = video(pipeline, replace(request, attention=AttentionConfig(mode="dense"))).astype(int)
    for attention in (AttentionConfig(mode="window"), AttentionConfig(mode="sparse", topk=1.0)):
        other = video(pipeline, replace(request, attention=attention)).astype(int)
        assert np.abs(other - dense).max() <= 1, attention.mode


def test_decoding_as_a_stream_equals_decoding_at_once(pipeline):
    latents = []
    push = pipeline.vae.stream_decoder
    pipeline.vae.stream_decoder = lambda: recorded(push(), latents)
    try:
        streamed = video(pipeline, SMALL)
    finally:
        del pipeline.vae.stream_decoder
    with torch.no_grad():
        whole = pipeline.vae.decode(torch.cat(latents, dim=2))[0].permute(1, 2, 3, 0)
    assert np.abs(streamed / 127.5 - 1 - whole.clamp(-1, 1).numpy()).max() < 2 / 127.5


def recorded(decoder, latents):
    push = decoder.push
    decoder.push = lambda latent: (latents.append(latent), push(latent))[1]
    return decoder


@pytest.mark.parametrize(("width", "height"), [(48, 80), (64, 64), (112, 32)])
def test_portrait_and_other_sizes(pipeline, width, height):
    request = replace(SMALL, latent_frames=3, width=width, height=height)
    assert video(pipeline, request).shape == (9, height, width, 3)


def test_one_frame_chunks(pipeline):
    attention = AttentionConfig(window_frames=3, sink_frames=1, persistent_frames=2)
    request = replace(SMALL, latent_frames=4, attention=attention, sampler=SamplerConfig(chunk_frames=1))
    assert [len(chunk.frames) for chunk in pipeline.generate(request)] == [1, 4, 4, 4]


def test_the_stated_memory_is_the_memory_used(pipeline):
    for mode in ("dense", "window", "sparse"):
        request = replace(SMALL, attention=AttentionConfig(mode=mode))
        need = pipeline.memory_need(request)
        assert {chunk.cache_bytes for chunk in pipeline.generate(request)} == {need.cache}
    dense = replace(SMALL, attention=AttentionConfig(mode="dense"))
    frame_bytes = pipeline.memory_need(dense).cache // 9
    assert frame_bytes == 2 * 4 * 12 * 128 * 2  # K and V, float32, 3 x 4 tokens, one head of 128, two layers
    assert pipeline.memory_need(replace(dense, latent_frames=90)).cache == 90 * frame_bytes
    sparse = replace(SMALL, latent_frames=90)
    assert pipeline.memory_need(sparse).cache == pipeline.memory_need(SMALL).cache


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"latent_frames": 10}, "10 latent frames"),
        ({"width": 100}, "width 100"),
        ({"height": 0}, "height 0"),
        ({"seed": -1}, "seed -1"),
        ({"attention": AttentionConfig(window_frames=4)}, "window_frames 4"),
        ({"sampler": SamplerConfig(sigmas=())}, "sigmas is empty"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_before_any_work(pipeline, change, words):
    with pytest.raises(ValueError, match=words):
        pipeline.generate(replace(SMALL, **change))


def test_a_stopped_request_leaves_nothing_behind(pipeline):
    expected = video(pipeline, SMALL)
    next(pipeline.generate(replace(SMALL, seed=1))).frames.fill(0)
    assert np.array_equal(video(pipeline, SMALL), expected)


def test_devices():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match=f"device '{name}' cannot be used here"):
            pick_device(name)
    assert compute_dtype(torch.device("cuda")) == torch.bfloat16
    assert compute_dtype(torch.device("cpu")) == torch.float32
