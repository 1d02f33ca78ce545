"""What PBSA means, for every backend that runs in this process (Triton's interpreter runs this file too)."""

import itertools
import math

import pytest
import torch
from pbsa_oracle import assert_within_eager_error, make_problem
from sparse_forcing_pack.kernels import (
    BlockLists,
    attention_mass,
    pbsa_attention,
    pool_pages,
    route,
    route_parts,
)

SHAPES = [
    {"groups": 1, "blocks": 1, "slots": 1, "tokens": 16, "dim": 64, "longest": 1},
    {"groups": 12, "blocks": 2, "slots": 3, "tokens": 16, "dim": 64, "longest": 2},
    {"groups": 2, "blocks": 5, "slots": 11, "tokens": 32, "dim": 96, "longest": 7},
    {"groups": 3, "blocks": 7, "slots": 4, "tokens": 16, "dim": 128, "longest": 4},  # more queries than keys
    {"groups": 2, "blocks": 2, "slots": 6, "tokens": 64, "dim": 128, "longest": 3},
    {"groups": 1, "blocks": 2, "slots": 3, "tokens": 128, "dim": 64, "longest": 3},
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape.values())))
@pytest.mark.parametrize("kind", ["listed", "shared", "full"])
def test_ragged_pages_and_uneven_lists(backend, shape, kind):
    name, device = backend
    problem = make_problem(**shape, shared=kind == "shared", full=kind == "full")
    assert_within_eager_error(problem.to(device), name)


def test_empty_lists_and_empty_pages(backend):
    name, device = backend
    problem = make_problem(groups=1, blocks=2, slots=2, longest=1)
    problem.lists.cnt[:] = torch.tensor([[1, 0]])
    problem.lists.idx.zero_()  # the first list reads page 0, which holds no valid token; the second reads nothing
    out, lse = problem.to(device).run(name)
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("tokens", [16, 128])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("padding", ["any", "finite"])
def test_a_gap_between_pages(backend, tokens, shared, padding):
    """Pages of a larger pool, the last of which lie further on: what lies in between is not read."""
    name, device = backend
    problem = make_problem(tokens=tokens, shared=shared).promising(padding).to(device)
    truth = problem.run(name, padding=padding)
    first, behind = 4, 6
    pools = []
    for pages in (problem.k_pages, problem.v_pages):
        pool = torch.full((2, 1 + 7 + behind, *pages.shape[2:]), math.nan, device=device)
        pool[:, 1 : 1 + first], pool[:, 1 + first + behind :] = pages[:, :first], pages[:, first:]
        pools.append(pool[:, 1:])
    problem.k_pages, problem.v_pages = pools
    for found, want in zip(problem.run(name, padding=padding, gap=(first, behind)), truth, strict=True):
        assert torch.equal(found, want)


def test_a_gap_has_bounds_and_no_gradient():
    problem = make_problem()
    for gap in ((3, 5), (-1, 2), (8, 0), (0, -1)):
        with pytest.raises(ValueError, match="gap|page_len"):
            problem.run("reference", gap=gap)
    problem.page_len = problem.page_len[:, :5].contiguous()
    problem.lists.idx.clamp_(max=4)
    problem.q.requires_grad_()
    with pytest.raises(ValueError, match="no gradient"):
        problem.run("reference", gap=(2, 2))
    with torch.no_grad():
        problem.run("reference", gap=(2, 2))


def test_lists_without_room(backend):
    name, device = backend
    problem = make_problem().to(device)
    problem.lists = BlockLists(problem.lists.idx[..., :0], torch.zeros_like(problem.lists.cnt))
    out, lse = problem.run(name)
    assert (out == 0).all() and (lse == -math.inf).all()


def test_padding_entries_do_not_matter(backend):
    name, device = backend
    problem = make_problem().to(device)
    before = problem.run(name)
    padding = torch.arange(5, device=device) >= problem.lists.cnt[..., None]
    problem.lists.idx[padding] = 3
    for one, other in zip(problem.run(name), before):
        assert torch.equal(one, other)


def test_the_same_list_in_every_row_equals_the_shared_list(backend):
    name, device = backend
    shared = make_problem(blocks=4, shared=True).to(device)
    spread = make_problem(blocks=4, shared=True).to(device)
    spread.lists = BlockLists(
        shared.lists.idx.expand(-1, 4, -1).contiguous(), shared.lists.cnt.expand(-1, 4).contiguous()
    )
    for one, other in zip(spread.run(name), shared.run(name)):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_lists_of_pairs_of_blocks(backend):
    """A list for every two query blocks equals the same list given to both, gradients included."""
    name, device = backend
    problem = (
        make_problem(groups=1, blocks=4, slots=5, tokens=32, dim=32, longest=3).promising("finite").to(device)
    )
    idx, cnt = (x[:, ::2].contiguous() for x in problem.lists)
    spread = BlockLists(idx.repeat_interleave(2, 1), cnt.repeat_interleave(2, 1))
    results = []
    for problem.lists in (BlockLists(idx, cnt), spread):
        results.append([*problem.run(name), *problem.gradients(name, torch.float32)])
    for paired, apart in zip(*results):
        torch.testing.assert_close(paired, apart, rtol=1e-5, atol=2e-6)


def test_lists_of_a_split_merge_by_their_lse(backend):
    """lse is the exact weight of a part: attention over two halves of a list adds up to the whole."""
    name, device = backend
    problem = make_problem(full=True).to(device)
    whole, _ = problem.run(name)
    idx, cnt = problem.lists
    halves = []
    for part in (idx[..., :3], idx[..., 3:]):
        problem.lists = BlockLists(part.contiguous(), torch.full_like(cnt, part.shape[2]))
        halves.append(problem.run(name))
    lse = torch.stack([lse for _, lse in halves])
    weights = lse.softmax(0)[..., None]
    merged = sum(weight * out for weight, (out, _) in zip(weights, halves))
    torch.testing.assert_close(merged, whole, rtol=0, atol=2e-6)


def test_strided_views_are_read_as_they_are(backend):
    """Pages cut out of a pool of several layers, and queries that are a transposed view."""
    name, device = backend
    problem = make_problem().to(device)
    expected = problem.run(name)
    pool = torch.stack([problem.k_pages, problem.v_pages], dim=2)  # [G, S, 2, T, D]
    q = problem.q.transpose(1, 2).contiguous().transpose(1, 2)
    lists = BlockLists(*(x.repeat_interleave(2, -1)[..., ::2] for x in problem.lists))
    actual = pbsa_attention(q, pool[:, :, 0], pool[:, :, 1], problem.page_len, lists, backend=name)
    for one, other in zip(actual, expected):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_mass_is_what_the_softmax_gave_each_page(backend, shared, dtype):
    """Ragged and empty pages with NaN behind them, ragged query blocks, lists of every length."""
    name, device = backend
    problem = make_problem(dim=24, shared=shared).to(dtype).to(device)
    _, lse = problem.run(name)
    q_len = torch.tensor([[16, 5, 1], [16, 9, 16]], dtype=torch.int32, device=device)
    facts = problem.page_len, problem.lists, lse
    found = attention_mass(problem.q, problem.k_pages, *facts, q_len=q_len, backend=name).cpu()
    idx, cnt = (x.expand(2, 3, *x.shape[2:]) for x in problem.to("cpu").lists)
    for g, n in itertools.product(range(2), range(3)):
        slots = idx[g, n, : cnt[g, n]].tolist()
        keys = [problem.k_pages[g, s, : problem.page_len[g, s]].double().cpu() for s in slots]
        assert (found[g, n, len(slots) :] == 0).all()
        if sum(map(len, keys)) == 0:
            assert (found[g, n] == 0).all()
            continue
        rows = problem.q[g, n, : q_len[g, n]].double().cpu()
        weights = (rows @ torch.cat(keys).T * 24**-0.5).softmax(-1).mean(0)
        want = torch.stack([part.sum() for part in weights.split([len(part) for part in keys])])
        torch.testing.assert_close(found[g, n, : len(slots)].double(), want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("slots", "fixed", "free"), [(5, 0, 4), (9, 3, 5), (70, 20, 33), (4, 3, 0)])
@pytest.mark.parametrize("whole_numbers", [True, False])
def test_router_chooses_what_the_reference_chooses(backend, slots, fixed, free, whole_numbers):
    name, device = backend
    draw = torch.Generator().manual_seed(slots)
    pooled_q, pooled_k = (torch.randn(2, n, 96, generator=draw) for n in (3, slots))
    if whole_numbers:  # exact in float32, with many ties
        pooled_q, pooled_k = ((x * 0.4).round() for x in (pooled_q, pooled_k))
    order = torch.rand(2, slots, generator=draw).argsort(-1).to(torch.int32)
    always, local = order[:, :fixed], order[:, fixed : fixed + free]
    problem = (pooled_q, pooled_k, always, local)
    for k in (0, free // 2, free + 3):
        expected, want = route(*problem, k, scale=0.25, backend="reference")
        lists, shares = route(*(x.to(device) for x in problem), k, scale=0.25, backend=name)
        assert torch.equal(lists.idx.cpu(), expected.idx) and torch.equal(lists.cnt.cpu(), expected.cnt)
        torch.testing.assert_close(shares.cpu(), want, rtol=0, atol=2e-6)
        assert lists.idx.dtype == lists.cnt.dtype == torch.int32


@pytest.mark.parametrize(("slots", "fixed", "free"), [(5, 0, 4), (9, 3, 5), (70, 20, 33), (4, 3, 0)])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_router_by_parts_chooses_what_the_reference_chooses(backend, slots, fixed, free, parts):
    """Full blocks, ragged ones, and some whose last parts are empty."""
    name, device = backend
    draw = torch.Generator().manual_seed(slots)
    pooled_q, pooled_k = (torch.randn(2, n, parts, 24, generator=draw) for n in (3, slots))
    before = torch.arange(0, 16, 16 // parts)
    q_parts, k_parts = (
        (torch.randint(1, 17, (2, n, 1), generator=draw) - before).clamp(0, 16 // parts).to(torch.int32)
        for n in (3, slots)
    )
    for vectors, held in ((pooled_q, q_parts), (pooled_k, k_parts)):
        vectors[held == 0] = 0
    order = torch.rand(2, slots, generator=draw).argsort(-1).to(torch.int32)
    problem = (pooled_q, pooled_k, q_parts, k_parts, order[:, :fixed], order[:, fixed : fixed + free])
    for k in (0, free // 2, free + 3):
        expected, want = route_parts(*problem, k, backend="reference")
        lists, shares = route_parts(*(x.to(device) for x in problem), k, backend=name)
        assert torch.equal(lists.idx.cpu(), expected.idx) and torch.equal(lists.cnt.cpu(), expected.cnt)
        torch.testing.assert_close(shares.cpu(), want, rtol=0, atol=2e-6)
        torch.testing.assert_close(shares.sum(-1).cpu(), torch.ones(2, 3))


def test_one_part_is_the_mean(backend):
    """Blocks in one part with equally many tokens are scored as `route` does."""
    name, device = backend
    draw = torch.Generator().manual_seed(0)
    pooled_q, pooled_k = (torch.randn(2, n, 1, 32, generator=draw).to(device) for n in (5, 12))
    held = [torch.full((2, n, 1), 16, dtype=torch.int32, device=device) for n in (5, 12)]
    slots = torch.arange(12, dtype=torch.int32, device=device).expand(2, -1)
    tables = slots[:, :4], slots[:, 4:], 3
    lists, shares = route_parts(pooled_q, pooled_k, *held, *tables, backend=name)
    plain, want = route(pooled_q[:, :, 0], pooled_k[:, :, 0], *tables, backend=name)
    assert torch.equal(lists.idx, plain.idx)
    torch.testing.assert_close(shares, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pooling_equals_the_reference(backend, dtype):
    """Ragged and empty pages with NaN behind them, cut out of a pool; gradients reach valid tokens alone."""
    name, device = backend
    problem = make_problem(dim=24).to(dtype).to(device)
    pool = torch.stack([problem.v_pages, problem.k_pages], dim=2)[:, :, 1].requires_grad_()
    expected = pool_pages(pool, problem.page_len, backend="reference")
    pooled = pool_pages(pool, problem.page_len, backend=name)
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-6)
    assert pooled.dtype == torch.float32
    weights = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(0)).to(device)
    want, found = (torch.autograd.grad(x, pool, weights)[0] for x in (expected, pooled))
    torch.testing.assert_close(found, want)


def test_router_is_reproducible(backend):
    name, device = backend
    draw = torch.Generator().manual_seed(0)
    pooled_q, pooled_k = (torch.randn(2, n, 64, generator=draw).to(device) for n in (5, 12))
    slots = torch.arange(12, dtype=torch.int32, device=device).expand(2, -1)
    first, second = (route(pooled_q, pooled_k, slots[:, :4], slots[:, 4:], 3, backend=name) for _ in "12")
    assert torch.equal(first[0].idx, second[0].idx) and torch.equal(first[1], second[1])
