"""A change of the prompt reads the window again in one pass: beside full attention in plain torch."""

import pytest
import torch
from sparse_forcing_pack.sparse_attn.config import AttentionConfig
from sparse_forcing_pack.sparse_attn.fast import FastPass, choose_pass
from sparse_forcing_pack.sparse_attn.rollout import prefill
from sparse_forcing_pack.sparse_attn.state import StreamState
from sparse_forcing_pack.sparse_attn.timeline import change_prompt
from sparse_forcing_pack.sparse_attn.wan import WanModel, frame_timesteps

LAYERS, CHUNK, GRID, TOKENS = 2, 3, (2, 3), 6
WINDOW = {"mode": "window", "window_frames": 9, "sink_frames": 3}
SETTINGS = {
    "dense": {"mode": "dense"},
    "window": WINDOW,
    "rebased window": {**WINDOW, "positions": "rebased"},
    "window without a sink": {**WINDOW, "sink_frames": 0},
    "window with a ragged sink": {**WINDOW, "sink_frames": 2},
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    made = WanModel(dim=32, ffn_dim=48, num_heads=2, num_layers=LAYERS, text_dim=8, freq_dim=16)
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def video():
    return torch.randn(1, 16, 18, 2 * GRID[0], 2 * GRID[1], generator=torch.Generator().manual_seed(4))


class Stream:
    """A stream under one prompt after another; fast: through the fast pass."""

    def __init__(self, model, fast=False, **attention):
        self.model = model
        self.memory = StreamState(
            layers=LAYERS, heads=2, head_dim=16, grid=GRID, chunk_frames=CHUNK,
            attention=AttentionConfig(**attention), total_frames=21,
        )  # fmt: skip
        self.run = choose_pass(model, self.memory)[0]
        assert isinstance(self.run, FastPass)
        self.fast = fast
        self.prompt(1)

    def prompt(self, seed):
        text = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(seed))
        self.cross_kv = self.model.cross_kv(text)

    def denoise(self, x, sigma):
        if self.fast:
            return x - sigma * self.run(x, sigma, self.cross_kv)
        steps = frame_timesteps(sigma, 1, x.shape[2], "cpu")
        return x - sigma * self.model(x, steps, self.cross_kv, self.memory.attend, self.memory.t_start)

    def change(self, video, policy):
        self.prompt(2)
        return change_prompt(
            self.denoise, self.memory, [self.memory], lambda a, b: video[:, :, a:b], policy, CHUNK
        )

    def stored(self):
        """Keys and values of all layers, [2, L, frames, tokens, H, D], in the order of time."""
        cache = self.memory.cache
        return torch.stack([pool[:, 0, cache.slots] for pool in (cache.k, cache.v)])


def one_full_pass(model, x, cross_kv, before, t_start):
    """Keys and values of x [1, C, F, H, W] at sigma 0 where every token attends to `before` and to all of x."""
    found = []

    def attend(layer, q, k, v):
        found.append(torch.stack([k[0], v[0]]))
        keys, values = torch.cat([before[:, layer].flatten(1, 2), found[-1]], dim=1)
        weights = (torch.einsum("nhd,mhd->hnm", q[0], keys) / 16**0.5).softmax(-1)
        return torch.einsum("hnm,mhd->nhd", weights, values)[None]

    model(x, torch.zeros(1, x.shape[2]), cross_kv, attend, t_start)
    return torch.stack(found, dim=1).unflatten(2, (x.shape[2], TOKENS))


@pytest.mark.parametrize("fast", [False, True], ids=["composable", "fast"])
@pytest.mark.parametrize("policy", ["re-cache", "flush"])
@pytest.mark.parametrize("frames", [3, 8, 9, 15])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_frame_of_the_window_sees_all_others(model, video, name, frames, policy, fast):
    mine = Stream(model, fast, **SETTINGS[name])
    prefill(mine.denoise, mine.memory, video[:, :, :frames], CHUNK)
    before, sizes = mine.stored(), mine.memory.nbytes
    dense, held = name == "dense", before.shape[2]
    kept = held - 12 if dense else mine.memory.attention.sink_frames
    if policy == "flush" or (dense and frames <= 12) or (not dense and frames <= 9):
        kept = 0  # forgotten, or nothing has left yet
    again = min(12, frames) if dense else held - kept
    assert mine.change(video, policy) == again
    rebased = SETTINGS[name].get("positions") == "rebased"
    want = one_full_pass(
        model,
        video[:, :, frames - again : frames],
        mine.cross_kv,
        before[:, :, :kept],
        kept if rebased else frames - again,
    )
    now = mine.stored()
    assert torch.equal(now[:, :, :kept], before[:, :, :kept]), "what is kept is not touched"
    torch.testing.assert_close(now[:, :, kept:], want, rtol=0, atol=1e-5)
    assert mine.memory.frame == frames and mine.memory.nbytes == sizes
    assert mine.memory.cache.frames[kept:] == list(range(frames - again, frames))
    prefill(mine.denoise, mine.memory, video[:, :, frames : frames + CHUNK], CHUNK)  # and it goes on


def test_a_change_before_the_first_chunk_reads_nothing(model, video):
    mine = Stream(model, **WINDOW)
    assert mine.change(video, "re-cache") == 0 and mine.memory.frame == 0


def test_a_pass_that_fails_leaves_a_memory_without_the_window(model, video):
    mine = Stream(model, **WINDOW)
    prefill(mine.denoise, mine.memory, video[:, :, :15], CHUNK)
    sink = mine.stored()[:, :, :3]
    with pytest.raises(AttributeError):
        change_prompt(mine.denoise, mine.memory, [mine.memory], lambda a, b: None, "re-cache", CHUNK)
    assert mine.memory.frame == 9 and mine.memory.cache.frames == [0, 1, 2]
    assert torch.equal(mine.stored(), sink)
