"""The probe against attention over tokens, written out with loops."""

import math

import pytest
import torch
from sparse_forcing_pack.sparse_attn.config import AttentionConfig
from sparse_forcing_pack.sparse_attn.state import StreamState
from sparse_forcing_pack.sparse_attn.training import router_recall
from sparse_forcing_pack.sparse_attn.training.router_recall import (
    ProbedState,
    exact_mass,
    rank_correlation,
    recall,
)


def test_exact_mass_is_the_probability_on_a_blocks_tokens():
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 5, 4, 8)
    q_len, k_len = torch.tensor([[4, 2, 4], [1, 4, 3]]), torch.tensor([[4, 4, 1, 2, 4], [3, 4, 4, 4, 1]])
    q_len, k_len = q_len.int(), k_len.int()
    q[0, 1, 2:] = math.nan  # what lies past the length is never read
    mass = exact_mass(q.nan_to_num(), q_len, k, k_len)
    for g in range(2):
        keys = torch.cat([k[g, m, : k_len[g, m]] for m in range(5)])
        owner = torch.cat([torch.full((int(k_len[g, m]),), m) for m in range(5)])
        for n in range(3):
            p = (q[g, n, : q_len[g, n]] @ keys.T / math.sqrt(8)).softmax(-1).mean(0)
            want = torch.stack([p[owner == m].sum() for m in range(5)])
            torch.testing.assert_close(mass[g, n], want)


def test_recall_and_rank_on_numbers():
    mass = torch.tensor([0.4, 0.1, 0.3, 0.0])
    assert recall(mass, torch.tensor([1.0, 4.0, 3.0, 2.0]), 0.5) == pytest.approx(0.5)
    assert recall(mass, mass, 0.5) == pytest.approx(0.7 / 0.8)
    assert recall(mass, mass, 1.0) == pytest.approx(1)
    assert rank_correlation(mass, mass * 3 + 1) == pytest.approx(1)
    assert rank_correlation(mass, -mass) == pytest.approx(-1)


def test_the_probe_leaves_the_stream_as_it_is_and_sees_its_masses():
    torch.manual_seed(0)
    settings = {
        "layers": 1, "heads": 2, "head_dim": 16, "grid": (4, 4), "chunk_frames": 3, "batch": 2,
        "attention": AttentionConfig(block_tokens=16, topk=0.5),
    }  # fmt: skip
    probed = ProbedState(**settings)
    probed.found = {}
    plain = StreamState(**settings)
    for chunk in range(4):
        q, k, v = torch.randn(3, 2, 48, 2, 16)
        outs = []
        for state in (probed, plain):
            state.begin_chunk(3)
            outs.append(state.attend(0, q, k, v))
            state.end_chunk()
        assert torch.equal(*outs)
        assert len(probed.found.get(("rank", 0), [])) == chunk, "the first chunk has no window yet"
    for ratio in router_recall.RATIOS:
        router, oracle = (torch.stack(probed.found[(ratio, who), 0]) for who in ("router", "oracle"))
        assert router.shape == (3, 2)
        assert (router <= oracle + 1e-6).all()
        assert (router > 0).all() and (oracle <= 1).all()
    kept = torch.stack(probed.found["persistent", 0])
    assert (kept[0] == 0).all() and (kept[-1] > 0).all(), "the sink enters with the third chunk"
