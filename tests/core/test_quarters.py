"""Choosing blocks by their quarters: the scores by hand, what they find, and that both passes agree."""

import math
from dataclasses import replace

import pytest
import torch
from sparse_forcing_pack.kernels import pool_pages
from sparse_forcing_pack.sparse_attn.config import AttentionConfig
from sparse_forcing_pack.sparse_attn.fast import FastPass
from sparse_forcing_pack.sparse_attn.fast_weights import FastModel, FastOptions
from sparse_forcing_pack.sparse_attn.memory import PagedKV
from sparse_forcing_pack.sparse_attn.router import choose_blocks, kept_blocks, part_lens

from .test_page_bits import EIGHT, new_model, run

QUARTERS = replace(EIGHT, page_bits=16, router="quarters")
GROUPS, BLOCKS, TOKENS, DIM = 2, 9, 16, 32


def problem(seed=0):
    """Queries and pages with a ragged one each, and everything that the router is given of them."""
    draw = torch.Generator().manual_seed(seed)
    pages = PagedKV(
        layers=1, groups=GROUPS, head_dim=DIM, grid=(4, 4), chunk_frames=1,
        attention=AttentionConfig(
            window_frames=2, persistent_frames=1, sink_frames=1, block_tokens=TOKENS, router="quarters"
        ),
    )  # fmt: skip
    q, k = (torch.randn(GROUPS, BLOCKS, TOKENS, DIM, generator=draw) for _ in range(2))
    lens = torch.full((GROUPS, BLOCKS), TOKENS, dtype=torch.int32)
    lens[:, -1] = 6  # a part of 4, one of 2, two of none
    for x in (q, k):
        x[:, -1, 6:] = 0
    persistent, window = (
        torch.tensor(s, dtype=torch.int32).expand(GROUPS, -1) for s in ([4, 1], [0, 8, 2, 7, 5])
    )
    return pages, q, k, lens, persistent.contiguous(), window.contiguous()


def by_hand(q, k, q_len, k_len):
    """What the parts of one query block give one of the candidates, unnormalised: [parts of q]."""
    rows = TOKENS // 4
    found = []
    for part in range(-(-q_len // rows)):
        query = q[part * rows : min(q_len, (part + 1) * rows)].mean(0)
        total = 0.0
        for other in range(-(-k_len // rows)):
            keys = k[other * rows : min(k_len, (other + 1) * rows)]
            total += len(keys) * math.exp(float(query @ keys.mean(0)) / math.sqrt(DIM))
        found.append(total)
    return found


def test_scores_are_those_of_the_quarters():
    pages, q, k, lens, persistent, window = problem()
    parts = part_lens(lens, TOKENS), part_lens(lens, TOKENS)
    assert parts[0][:, 0].tolist() == [[4, 4, 4, 4]] * GROUPS
    assert parts[0][:, -1].tolist() == [[4, 2, 0, 0]] * GROUPS
    for x in (q, k):
        means = pages.pool(x, lens)
        torch.testing.assert_close(means[:, :-1], x[:, :-1].unflatten(2, (4, 4)).mean(3))
        torch.testing.assert_close(
            means[:, -1],
            torch.stack([x[:, -1, :4].mean(1), x[:, -1, 4:6].mean(1)] + 2 * [torch.zeros(GROUPS, DIM)], 1),
        )
    lists, shares = choose_blocks(
        pages.pool(q, lens), pages.pool(k, lens), persistent, window, 0.4, "reference", parts
    )
    slots = torch.cat([persistent, window], dim=1).tolist()
    for g in range(GROUPS):
        for block in range(BLOCKS):
            table = torch.tensor(
                [by_hand(q[g, block], k[g, s], int(lens[g, block]), int(lens[g, s])) for s in slots[g]]
            )
            share = table / table.sum(0)  # [M, parts]
            sizes = torch.tensor([n for n in parts[0][g, block].tolist() if n], dtype=torch.float32)
            expected = (share * sizes).sum(1) / sizes.sum()
            torch.testing.assert_close(shares[g, block], expected, atol=1e-5, rtol=1e-4)
            best = sorted(range(2, 7), key=lambda i: -float(expected[i]))[:2]
            assert lists.idx[g, block].tolist() == sorted([*slots[g][:2], *(slots[g][i] for i in best)])
    assert lists.cnt.unique().tolist() == [2 + kept_blocks(0.4, 5)]


def test_a_quarter_finds_what_a_mean_hides():
    """A page whose halves cancel out, and a query block of two kinds of queries: their means tell nothing."""
    pages, q, k, lens, persistent, window = problem()
    lens.fill_(TOKENS)
    q.mul_(0.1)
    k.mul_(0.1)
    likes = torch.zeros(DIM)
    likes[3] = 12.0
    q[:, 0, :8], q[:, 0, 8:] = likes, -likes
    k[:, 7, :8], k[:, 7, 8:] = likes, -likes
    plain, _ = choose_blocks(pool_pages(q, lens), pool_pages(k, lens), persistent, window, 0.2, "reference")
    parts = part_lens(lens, TOKENS), part_lens(lens, TOKENS)
    fine, _ = choose_blocks(
        pages.pool(q, lens), pages.pool(k, lens), persistent, window, 0.2, "reference", parts
    )
    assert (fine.idx[:, 0] == 7).any(-1).all()
    assert not (plain.idx[:, 0] == 7).any(-1).all()


@pytest.mark.parametrize("positions", ["absolute", "rebased"])
@pytest.mark.parametrize("topk", [0.3, 1.0])
def test_fast_equals_composable(positions, topk):
    model, attention = new_model(), replace(QUARTERS, positions=positions, topk=topk)
    expected, slow = run(model, attention)
    found, quick = run(model, attention, lambda m, s: FastPass(FastModel(m, FastOptions()), s))
    for mine, other in zip(found, expected):
        for a, b in zip(mine, other):
            torch.testing.assert_close(a, b, atol=1e-5 * float(b.abs().max()), rtol=1e-4)
    assert torch.equal(quick.kept_frames(), slow.kept_frames())
    torch.testing.assert_close(quick.cache.pooled, slow.cache.pooled, atol=1e-5, rtol=1e-5)


def test_reading_everything_is_the_same_by_either_router():
    model = new_model()
    by_mean, by_quarter = (
        run(model, replace(QUARTERS, router=r, topk=1.0, persistent_frames=12))[0]
        for r in ("mean", "quarters")
    )
    for mine, other in zip(by_quarter, by_mean):
        for a, b in zip(mine, other):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match="router 'halves' is unknown"):
        replace(QUARTERS, router="halves").validate(3)
    with pytest.raises(ValueError, match="block_tokens 6 have no quarters"):
        replace(QUARTERS, block_tokens=6).validate(3)
    saved = run(new_model(), QUARTERS, chunks=2)[1].snapshot()
    with pytest.raises(ValueError, match="the snapshot's pooled"):
        run(new_model(), replace(QUARTERS, router="mean"), chunks=1)[1].restore(saved)


def test_the_fast_pass_reads_a_chunk_s_lengths_where_graphs_find_them():
    """What a chunk makes anew, a CUDA graph of an earlier chunk does not know: without it nothing changes."""

    class Blind(FastPass):
        def at(self, *args):
            lens, self.memory.cache.chunk_lens = self.memory.cache.chunk_lens, None
            flow = super().at(*args)
            self.memory.cache.chunk_lens = lens
            return flow

    model = new_model()
    expected, _ = run(model, QUARTERS, lambda m, s: FastPass(FastModel(m, FastOptions()), s))
    found, _ = run(model, QUARTERS, lambda m, s: Blind(FastModel(m, FastOptions()), s))
    assert all(torch.equal(a, b) for mine, other in zip(found, expected) for a, b in zip(mine, other))
