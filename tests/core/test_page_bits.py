"""Pages in 8 bits: how far from 16, what stays exact, and what it saves."""

from dataclasses import replace

import pytest
import torch
from sparse_forcing_pack.sparse_attn.config import AttentionConfig
from sparse_forcing_pack.sparse_attn.fast import ComposablePass, FastPass
from sparse_forcing_pack.sparse_attn.fast_weights import FastModel, FastOptions
from sparse_forcing_pack.sparse_attn.state import StreamState
from sparse_forcing_pack.sparse_attn.wan import WanModel

GRID = (6, 8)
EIGHT = AttentionConfig(block_tokens=16, persistent_frames=3, sink_frames=3, topk=0.5, page_bits=8)


def new_model():
    torch.manual_seed(0)
    model = WanModel(dim=64, ffn_dim=96, num_heads=2, num_layers=2, text_dim=24, freq_dim=32)
    model.init_weights()
    torch.nn.init.normal_(model.head.head.weight, std=0.05)
    return model.requires_grad_(False)


def run(model, attention, build=ComposablePass, chunks=6):
    """The flows of a stream, chunk by chunk, and its memory."""
    memory = StreamState(layers=2, heads=2, head_dim=32, grid=GRID, chunk_frames=3, attention=attention)
    draw = torch.Generator().manual_seed(1)
    cross_kv, flows = model.cross_kv(torch.randn(1, 5, 24, generator=draw)), []
    step = build(model, memory)
    for _ in range(chunks):
        x = torch.randn(1, 16, 3, 2 * GRID[0], 2 * GRID[1], generator=draw)
        memory.begin_chunk(3)
        flows.append([step(x, sigma, cross_kv) for sigma in (1.0, 0.6, 0.0)])
        memory.end_chunk()
    return flows, memory


@pytest.mark.parametrize("positions", ["absolute", "rebased"])
@pytest.mark.parametrize("keep", ["attention", "novelty"])
def test_8_bits_are_near_16(positions, keep):
    """Half a percent of the flow; the first chunk, which reads nothing finished, is the same to the bit."""
    attention, model = replace(EIGHT, positions=positions, keep=keep, topk=1.0), new_model()
    found, expected = (run(model, replace(attention, page_bits=bits))[0] for bits in (8, 16))
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0]))
    errors = [
        ((a - b).norm() / b.norm()).item() for mine, other in zip(found[1:], expected[1:])
        for a, b in zip(mine, other)
    ]  # fmt: skip
    assert 0 < max(errors) < 5e-3


def test_fast_equals_composable():
    model = new_model()
    expected, slow = run(model, EIGHT)
    found, quick = run(model, EIGHT, lambda m, s: FastPass(FastModel(m, FastOptions()), s))
    for mine, other in zip(found, expected):
        for a, b in zip(mine, other):
            torch.testing.assert_close(a, b, atol=2e-3 * float(b.abs().max()), rtol=0)
    assert torch.equal(quick.kept_frames(), slow.kept_frames())


def test_half_of_the_memory_is_saved():
    """Of Wan 1.3B at 480x832: 12 frames in 8 bits, their scales, and one layer's pages in 16."""
    sizes = {
        "layers": 30,
        "heads": 12,
        "head_dim": 128,
        "grid": (30, 52),
        "chunk_frames": 3,
        "device": "meta",
    }
    paper = AttentionConfig(block_tokens=128)
    sixteen, eight = (
        StreamState(**sizes, attention=a, dtype=torch.bfloat16).nbytes
        for a in (paper, replace(paper, page_bits=8))
    )
    assert eight < 2.2e9 < sixteen
    assert eight < 0.58 * sixteen


def test_sessions_of_the_other_kind_are_refused():
    model = new_model()
    saved = run(model, EIGHT, chunks=3)[1].snapshot()
    assert saved["k_pages"].dtype == torch.int8
    assert {"k_scale", "v_scale"} <= saved.keys()
    other = run(model, replace(EIGHT, page_bits=16), chunks=1)[1]
    with pytest.raises(ValueError, match="k_pages is torch.int8"):
        other.restore(saved)
    with pytest.raises(ValueError, match="lacks k_scale, v_scale"):
        run(model, EIGHT, chunks=1)[1].restore(other.snapshot())


def test_training_in_8_bits_is_refused():
    model = new_model().requires_grad_(True)
    memory = StreamState(layers=2, heads=2, head_dim=32, grid=GRID, chunk_frames=3, attention=EIGHT)
    memory.begin_chunk(3)
    x, cross_kv = torch.randn(1, 16, 3, 2 * GRID[0], 2 * GRID[1]), model.cross_kv(torch.randn(1, 5, 24))
    with pytest.raises(ValueError, match="train with page_bits 16"):
        model(x, torch.zeros(1, 3), cross_kv, memory.attend)


def test_another_number_of_bits_is_refused():
    with pytest.raises(ValueError, match="page_bits"):
        replace(EIGHT, page_bits=4).validate(3)
