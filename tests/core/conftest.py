"""A transformer just large enough to tell right attention from wrong, and helpers to drive a stream with it."""

import sys
from pathlib import Path

import pytest
import torch
from sparse_forcing_pack.sparse_attn.config import AttentionConfig
from sparse_forcing_pack.sparse_attn.positions import apply_rope, rope_table
from sparse_forcing_pack.sparse_attn.state import StreamState

sys.path.insert(0, str(Path(__file__).parent))  # this folder's helper module, allocated.py

CHANNELS = 4


class Toy:
    """Latents [B, C, F, H, W], every pixel a token, through layers of rotary self-attention with residuals -> x0."""

    def __init__(self, grid, layers=3, heads=2, head_dim=16, seed=0):
        self.grid, self.layers, self.heads, self.head_dim = grid, layers, heads, head_dim
        generator = torch.Generator().manual_seed(seed)
        dim = heads * head_dim

        def weight(rows, columns):
            return torch.randn(rows, columns, generator=generator) / rows**0.5

        self.w_in, self.w_out = weight(CHANNELS, dim), weight(dim, CHANNELS)
        self.w_qkvo = [[weight(dim, dim) for _ in range(4)] for _ in range(layers)]

    def __call__(self, x, sigma, attend, t_start):
        batch, channels, frames, height, width = x.shape
        rope = rope_table(t_start, frames, height, width, self.head_dim, "cpu")
        h = x.flatten(2).transpose(1, 2) @ self.w_in
        for layer, (w_q, w_k, w_v, w_o) in enumerate(self.w_qkvo):
            normal = torch.nn.functional.layer_norm(h, h.shape[-1:]) * (1 + sigma)
            q, k, v = ((normal @ w).unflatten(2, (self.heads, -1)) for w in (w_q, w_k, w_v))
            h = h + attend(layer, apply_rope(q, *rope), apply_rope(k, *rope), v).flatten(2) @ w_o
        return (h @ self.w_out).transpose(1, 2).reshape(batch, channels, frames, height, width)

    def state(self, attention: AttentionConfig, chunk_frames, batch=1, **options):
        return StreamState(
            layers=self.layers,
            heads=self.heads,
            head_dim=self.head_dim,
            grid=self.grid,
            chunk_frames=chunk_frames,
            attention=attention,
            batch=batch,
            **options,
        )

    def denoiser(self, state):
        """The toy as `stream` wants it, on the memory of `state`."""
        return lambda x, sigma: self(x, sigma, state.attend, state.t_start)

    def run(self, state, video, chunk_lengths):
        """One clean pass over given frames, chunk by chunk: the outputs of all chunks, joined."""
        outputs, start = [], 0
        for frames in chunk_lengths:
            state.begin_chunk(frames)
            outputs.append(self.denoiser(state)(video[:, :, start : start + frames], 0.0))
            state.end_chunk()
            start += frames
        assert start == video.shape[2]
        return torch.cat(outputs, dim=2)


@pytest.fixture(scope="session")
def make_toy():
    return Toy


@pytest.fixture(scope="session")
def make_video():
    def video(grid, frames, batch=1, seed=1):
        return torch.randn(batch, CHANNELS, frames, *grid, generator=torch.Generator().manual_seed(seed))

    return video
