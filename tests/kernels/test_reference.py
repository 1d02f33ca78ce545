"""The reference against literal float64 attention, and its gradients: everything else is judged by the reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pbsa_oracle import assert_within_eager_error, attend_literally, make_problem, route_literally
from sparse_forcing_pack.kernels import BlockLists, pbsa_attention, pool_pages, route
from sparse_forcing_pack.kernels.pbsa import reference


@pytest.mark.parametrize("shared", [False, True])
def test_float64_equals_literal_attention(shared):
    problem = make_problem(shared=shared).to(torch.float64)
    out, lse = problem.run("reference")
    truth_out, truth_lse = attend_literally(problem, torch.float64)
    torch.testing.assert_close(out, truth_out, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, truth_lse, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_precision_is_within_the_eager_error(dtype):
    assert_within_eager_error(make_problem(tokens=32, slots=9).to(dtype), "reference")


def test_scale_is_a_parameter():
    problem = make_problem().to(torch.float64)
    args = (problem.k_pages, problem.v_pages, problem.page_len, problem.lists)
    out, _ = pbsa_attention(problem.q * 8, *args, scale=1 / 64, backend="reference")
    torch.testing.assert_close(out, problem.run("reference")[0])  # 64 ** -0.5 = 8 / 64


@pytest.mark.parametrize("shared", [False, True])
def test_small_workspace_gives_the_same(monkeypatch, shared):
    problem = make_problem(groups=3, blocks=4, shared=shared)
    whole = problem.run("reference")
    monkeypatch.setattr(reference, "WORKSPACE_BYTES", 5 * 16 * 64 * 4 * 2)  # two rows of five pages
    for piecewise, at_once in zip(problem.run("reference"), whole):
        torch.testing.assert_close(piecewise, at_once, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_gradients(shared):
    """Through out and lse, for q, k and v, with ragged and empty lists in the same call."""
    problem = make_problem(
        groups=1, blocks=2, slots=3, tokens=2, dim=4, longest=2, shared=shared, full=shared
    )
    problem = problem.to(torch.float64)
    leaves = [x.requires_grad_() for x in (problem.q, problem.k_pages.nan_to_num(0), problem.v_pages)]
    counts = problem.lists.cnt.flatten().tolist()
    assert shared or 0 in counts

    def scores(q, k, v):
        out, lse = pbsa_attention(q, k, v, problem.page_len, problem.lists)
        return out, lse.masked_fill(lse == -math.inf, 0)

    leaves[2] = leaves[2].detach().nan_to_num(0).requires_grad_()
    leaves[1] = leaves[1].detach().requires_grad_()
    assert torch.autograd.gradcheck(scores, leaves)


def test_unread_tokens_get_no_gradient():
    problem = make_problem()
    for x in (problem.q, problem.k_pages, problem.v_pages):
        x.requires_grad_()
    problem.run("reference")[0].sum().backward()
    tail = torch.arange(16) >= problem.page_len[..., None]
    for pages in (problem.k_pages, problem.v_pages):
        assert pages.grad is not None and pages.grad.isfinite().all()
        assert (pages.grad[tail] == 0).all() and (pages.grad != 0).any()
    assert problem.q.grad is not None and problem.q.grad.isfinite().all()


def test_pool_pages_is_the_mean_of_valid_tokens():
    problem = make_problem()
    pooled = pool_pages(problem.k_pages.to(torch.float16), problem.page_len)
    assert pooled.dtype == torch.float32 and (pooled[0, 0] == 0).all()  # page (0, 0) is empty
    size = int(problem.page_len[1, 2])
    expected = problem.k_pages[1, 2, :size].to(torch.float16).float().mean(0)
    torch.testing.assert_close(pooled[1, 2], expected)


@settings(max_examples=30, deadline=None)
@given(
    groups=st.integers(1, 3),
    blocks=st.integers(1, 4),
    slots=st.integers(1, 6),
    tokens=st.integers(1, 9),
    data=st.data(),
)
def test_property_attention(groups, blocks, slots, tokens, data):
    longest = data.draw(st.integers(1, slots))
    shared, seed = data.draw(st.booleans()), data.draw(st.integers(0, 999))
    shape = {"groups": groups, "blocks": blocks, "slots": slots, "tokens": tokens, "dim": 6}
    problem = make_problem(**shape, longest=longest, shared=shared, seed=seed).to(torch.float64)
    for ours, truth in zip(problem.run("reference"), attend_literally(problem, torch.float64)):
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(fixed=st.integers(0, 4), free=st.integers(1, 8), spare=st.integers(0, 3), data=st.data())
def test_property_router(fixed, free, spare, data):
    """Small whole numbers make many ties, which must fall to the earlier local page."""
    slots = data.draw(st.permutations(range(fixed + free + spare)))
    values = data.draw(st.lists(st.integers(-2, 2), min_size=len(slots), max_size=len(slots)))
    k = data.draw(st.integers(0, free + 2))
    always, local = slots[:fixed], slots[fixed : fixed + free]
    keys = torch.tensor(values, dtype=torch.float32)[None, :, None]
    lists, shares = route(
        torch.ones(1, 1, 1),
        keys,
        torch.tensor([always], dtype=torch.int32),
        torch.tensor([local], dtype=torch.int32),
        k,
    )
    best = {local[position] for position in route_literally([values[slot] for slot in local], k)}
    assert lists.idx[0, 0].tolist() == sorted(best | set(always))
    assert int(lists.cnt) == fixed + min(k, free)
    weights = torch.tensor([values[slot] for slot in always + local], dtype=torch.float32).softmax(0)
    torch.testing.assert_close(shares[0, 0], weights)


def test_lists_of_the_router_feed_the_attention():
    """All of `always` and all of `local` kept is dense attention over those pages."""
    problem = make_problem(slots=6, full=True)
    slots = torch.arange(6, dtype=torch.int32).expand(2, -1)
    pooled_q = pool_pages(problem.q, torch.full((2, 3), 16, dtype=torch.int32))
    pooled_k = pool_pages(problem.k_pages, problem.page_len)
    lists, shares = route(pooled_q, pooled_k, slots[:, :2], slots[:, 2:], k=4)
    torch.testing.assert_close(shares.sum(2), torch.ones(2, 3))  # each query block spends one
    routed = pbsa_attention(problem.q, problem.k_pages, problem.v_pages, problem.page_len, lists)
    shared = BlockLists(slots[:, None].contiguous(), torch.full((2, 1), 6, dtype=torch.int32))
    dense = pbsa_attention(problem.q, problem.k_pages, problem.v_pages, problem.page_len, shared)
    for one, other in zip(routed, dense):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
