"""Pages in the host's memory: the same numbers to the bit, less on the device, and only what must be copied back."""

from dataclasses import replace

import pytest
import torch
from small_wan import LAYERS, small_wan
from sparse_forcing_pack.sparse_attn.config import AttentionConfig, SamplerConfig
from sparse_forcing_pack.sparse_attn.fast import ComposablePass, FastPass
from sparse_forcing_pack.sparse_attn.fast_weights import FastModel, FastOptions
from sparse_forcing_pack.sparse_attn.offload import HostLayers
from sparse_forcing_pack.sparse_attn.rollout import stream
from sparse_forcing_pack.sparse_attn.state import StreamState
from sparse_forcing_pack.sparse_attn.wan import WanModel

GRID = (6, 8)
HERE = AttentionConfig(block_tokens=16, persistent_frames=3, sink_frames=3, topk=0.5)
KINDS = [
    HERE,
    replace(HERE, positions="rebased"),
    replace(HERE, positions="rebased", page_bits=8),
    replace(HERE, keep="novelty", router="quarters", page_bits=8),
]
IDS = ["absolute", "rebased", "rebased-8 bits", "novelty-quarters-8 bits"]
BUILD = {"composable": ComposablePass, "fast": lambda m, s: FastPass(FastModel(m, FastOptions()), s)}


@pytest.fixture(scope="module")
def model():
    return small_wan()


def new_state(attention, **changes):
    sizes = {"layers": LAYERS, "heads": 2, "head_dim": 32, "grid": GRID, "chunk_frames": 3, "share_open": True}
    return StreamState(**sizes | changes, attention=attention)


def rollout(model, memory, build, frames, start=0):
    """The chunks of a video from one noise."""
    cross_kv = model.cross_kv(torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(1)))
    step = build(model, memory)
    chunks = stream(
        lambda x, sigma: x - sigma * step(x, sigma, cross_kv), memory, SamplerConfig((1.0, 0.6)),
        shape=(1, 16, 2 * GRID[0], 2 * GRID[1]), total_frames=frames, start_chunk=start,
    )  # fmt: skip
    return torch.cat([chunk.latent for chunk in chunks], dim=2)


@pytest.mark.parametrize("attention", KINDS, ids=IDS)
@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
def test_the_same_video_to_the_bit(model, attention, build):
    here, away = new_state(attention), new_state(replace(attention, offload_pages=True))
    expected = rollout(model, here, build, 18)
    assert torch.equal(rollout(model, away, build, 18), expected)
    saved, other = here.snapshot(), away.snapshot()
    for name in saved.keys() - {
        "k_pages",
        "v_pages",
        "k_scale",
        "v_scale",
    }:  # there abandoned passes leave traces
        assert torch.equal(saved[name], other[name]), name


@pytest.mark.parametrize("attention", KINDS, ids=IDS)
def test_sessions_go_on_either_way(model, attention):
    away = replace(attention, offload_pages=True)
    expected = rollout(model, new_state(attention), ComposablePass, 18)
    for first, then in ((attention, away), (away, attention)):
        before, after = new_state(first), new_state(then)
        rollout(model, before, ComposablePass, 9)
        after.restore(before.snapshot())
        assert torch.equal(rollout(model, after, ComposablePass, 18, start=3), expected[:, :, 9:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("attention", KINDS, ids=IDS)
@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
@pytest.mark.parametrize("share_open", [True, False])
def test_the_same_video_to_the_bit_on_a_gpu(attention, build, share_open):
    """Copies that overtake a pass, or are overtaken by one, would show: pages are large here, and passes short."""
    torch.manual_seed(0)
    model = WanModel(dim=256, ffn_dim=512, num_heads=2, num_layers=6, text_dim=24, freq_dim=32)
    model = model.requires_grad_(False).to("cuda", torch.bfloat16)
    torch.nn.init.normal_(model.head.head.weight, std=0.05)
    sizes = {"layers": 6, "head_dim": 128, "grid": (30, 52), "dtype": torch.bfloat16, "device": "cuda"}
    sizes["share_open"] = share_open
    videos, cross_kv = [], model.cross_kv(torch.randn(1, 5, 24, device="cuda"))
    for offload in (False, True):
        memory = new_state(replace(attention, block_tokens=64, offload_pages=offload), **sizes)
        step = build(model, memory)
        for _ in range(2):
            chunks = stream(
                lambda x, sigma, step=step: x - sigma * step(x, sigma, cross_kv).float(), memory,
                SamplerConfig((1.0, 0.6)), shape=(1, 16, 60, 104), total_frames=24, device="cuda",
            )  # fmt: skip
            videos.append(torch.cat([chunk.latent for chunk in chunks], dim=2))
            memory.reset()
    assert all(torch.equal(video, videos[0]) for video in videos[1:])


def test_only_the_clean_pass_copies_back(model, monkeypatch):
    kept = []
    monkeypatch.setattr(HostLayers, "keep", lambda self, layer, first=None: kept.append(layer))
    for build in BUILD.values():
        kept.clear()
        rollout(model, new_state(replace(HERE, offload_pages=True)), build, 6)
        assert kept == [0, 1, 2] * 2, "two chunks, three passes each"


@pytest.mark.parametrize("apart", [{"offload_pages": True}, {"page_bits": 8}])
@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
def test_a_chunk_cannot_end_with_a_noisy_pass(model, build, apart):
    memory = new_state(replace(HERE, **apart), share_open=False)
    step, x = build(model, memory), torch.randn(1, 16, 3, 2 * GRID[0], 2 * GRID[1])
    cross_kv = model.cross_kv(torch.randn(1, 5, 24))
    memory.begin_chunk(3)
    step(x, 0.0, cross_kv)
    memory.noisy = True
    step(x, 0.6, cross_kv)
    with pytest.raises(ValueError, match="run the clean pass"):
        memory.end_chunk()
    memory.noisy = False
    step(x, 0.0, cross_kv)
    memory.end_chunk()
    assert not memory.noisy and memory.frame == 3


def test_a_layer_that_was_skipped_or_taken_twice():
    layers = HostLayers(2, (5, 2, 3), torch.float32, "cpu")
    for tensor in layers.tensors:
        tensor.copy_(torch.arange(5.0)[:, None, None].expand(5, 2, 3))
    for layer in (0, 1, 1, 3, 2, 4, 0):
        assert all(part.eq(layer).all() for part in layers.take(layer))
    first, second = layers.take(3)
    first += 10
    second += 10
    layers.keep(3, 1)
    assert layers.tensors[0][3].eq(13).all() and layers.tensors[1][3].eq(3).all()
    layers.join()
    layers.take(1)  # layer 2 is on its way
    layers.wait()
    layers.tensors[0][2] = 7
    assert layers.take(2)[0].eq(7).all(), "not the one that was on its way"


def test_what_stays_on_the_device():
    """Of Wan 1.3B at 480x832: two layers' pages of thirty, pooled keys and tables, and in 8 bits the scales."""
    sizes = {"layers": 30, "heads": 12, "head_dim": 128, "grid": (30, 52), "device": "meta"}
    paper = AttentionConfig(block_tokens=128)
    for bits, most, rests in ((16, 0.3e9, 2.5e9), (8, 0.4e9, 1.25e9)):
        here = new_state(replace(paper, page_bits=bits), **sizes, dtype=torch.bfloat16)
        away = new_state(replace(paper, page_bits=bits, offload_pages=True), **sizes, dtype=torch.bfloat16)
        assert away.nbytes < most
        assert rests < away.host_bytes < here.nbytes
        assert here.host_bytes == 0


def test_training_is_refused(model):
    memory = new_state(replace(HERE, offload_pages=True))
    memory.begin_chunk(3)
    x, cross_kv = torch.randn(1, 16, 3, 2 * GRID[0], 2 * GRID[1]), model.cross_kv(torch.randn(1, 5, 24))
    x.requires_grad_(True)
    with pytest.raises(ValueError, match="are for generating"):
        model(x, torch.zeros(1, 3), cross_kv, memory.attend)
