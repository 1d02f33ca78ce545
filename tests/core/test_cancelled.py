"""A rollout that is cancelled at any pass gives its memory back."""

import gc
import random
import weakref

import pytest
import torch
from sparse_forcing_pack.sparse_attn.config import AttentionConfig, SamplerConfig
from sparse_forcing_pack.sparse_attn.rollout import stream
from sparse_forcing_pack.sparse_attn.state import StreamState

LAYERS, HEADS, HEAD_DIM, GRID, CHUNKS = 2, 2, 16, (4, 4), 5
MODES = [
    AttentionConfig(mode="dense"),
    AttentionConfig(mode="window"),
    AttentionConfig(),
    AttentionConfig(positions="rebased"),
]
IDS = [f"{attention.mode}-{attention.positions}" for attention in MODES]


class Cancelled(Exception):
    pass


def cancelled(attention, after, device) -> list[weakref.ref]:
    """A rollout that is cancelled after so many passes; weak references to what its memory consists of."""
    state = StreamState(
        layers=LAYERS,
        heads=HEADS,
        head_dim=HEAD_DIM,
        grid=GRID,
        chunk_frames=3,
        attention=attention,
        total_frames=3 * CHUNKS,
        device=device,
    )
    passes = 0

    def denoise(x, sigma):
        nonlocal passes
        if passes == after:
            raise Cancelled
        passes += 1
        tokens = x.shape[2] * GRID[0] * GRID[1]
        for layer in range(LAYERS):
            qkv = torch.randn(3, 1, tokens, HEADS, HEAD_DIM, device=device)
            state.attend(layer, *qkv)
        return x

    shape = (1, 4, *GRID)
    with pytest.raises(Cancelled):
        list(stream(denoise, state, SamplerConfig(), shape=shape, total_frames=3 * CHUNKS, device=device))
    return [weakref.ref(state), *(weakref.ref(tensor) for tensor in state.cache.tensors().values())]


def moments(count: int) -> list[int]:
    chance = random.Random(4)
    return [chance.randrange(5 * CHUNKS) for _ in range(count)]


@pytest.mark.parametrize("attention", MODES, ids=IDS)
def test_cancelled_rollouts_leave_no_tensor_behind(attention):
    for after in moments(10):
        left = cancelled(attention, after, "cpu")
        gc.collect()
        assert len(left) > 2 and not [reference for reference in left if reference() is not None], after


@pytest.mark.gpu
@pytest.mark.parametrize("attention", MODES, ids=IDS)
def test_fifty_cancelled_rollouts_leave_no_bytes_on_the_gpu(attention):
    # what every pass makes once stays: kernels, handles, their workspaces, tables kept for all runs
    cancelled(attention, 5 * CHUNKS - 1, "cuda")
    gc.collect()
    before = torch.cuda.memory_allocated()
    for after in moments(50):
        cancelled(attention, after, "cuda")
    gc.collect()
    assert torch.cuda.memory_allocated() == before
