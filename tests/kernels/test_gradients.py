"""Gradients of PBSA for every backend that runs in this process (Triton's interpreter runs this file too)."""

import math

import pytest
import torch
from pbsa_oracle import assert_gradients_within_eager_error, make_problem
from sparse_forcing_pack.kernels import BlockLists

SMALL = {"groups": 1, "blocks": 2, "slots": 3, "tokens": 16, "dim": 24, "longest": 2}
PARTS = {
    "groups": 1,
    "blocks": 3,
    "slots": 4,
    "tokens": 64,
    "dim": 40,
    "longest": 3,
}  # float32 reads pages in parts


@pytest.mark.parametrize(
    ("shape", "dtype"), [(SMALL, torch.float32), (SMALL, torch.float16), (PARTS, torch.float32)], ids="abc"
)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("padding", ["any", "finite", "none"])
def test_of_everything(backend, shape, dtype, shared, padding):
    name, device = backend
    problem = make_problem(**shape, shared=shared).promising(padding).to(dtype).to(device)
    assert_gradients_within_eager_error(problem, name, padding=padding)


def test_of_pages_of_128_tokens(backend):
    name, device = backend
    problem = make_problem(groups=1, blocks=2, slots=3, tokens=128, dim=32, longest=2)
    assert_gradients_within_eager_error(problem.to(torch.float16).to(device), name)


def test_of_the_new_pages_only(backend):
    """Named pages get what they get without the argument; all others get zero. Targets are in no order."""
    name, device = backend
    problem = make_problem(blocks=5).to(device)
    targets = torch.tensor([[6, 1, 3], [0, 5, 2]], dtype=torch.int32, device=device)
    dtype = torch.float32
    dq, dk, dv = problem.gradients(name, dtype, grad_pages=targets)
    dq_all, dk_all, dv_all = problem.gradients(name, dtype)
    assert torch.equal(dq, dq_all)
    named = torch.zeros(2, 7, dtype=torch.bool, device=device).scatter_(1, targets.long(), True)
    for some, every in ((dk, dk_all), (dv, dv_all)):
        torch.testing.assert_close(some[named], every[named], rtol=1e-5, atol=1e-6)
        assert (some[~named] == 0).all() and (every[~named] != 0).any()


def test_of_the_queries_alone(backend):
    name, device = backend
    problem = make_problem().to(device)
    problem.q.requires_grad_()
    problem.run(name)[0].sum().backward()
    assert problem.q.grad is not None and problem.q.grad.isfinite().all() and (problem.q.grad != 0).any()


def test_of_empty_lists_and_unread_pages_are_zero(backend):
    name, device = backend
    problem = make_problem(groups=1, blocks=2, slots=3, longest=1)
    problem.page_len[0] = torch.tensor([0, 9, 16])
    problem.lists.cnt[:] = torch.tensor([[1, 0]])
    problem.lists.idx.zero_()  # the first list reads page 0, which holds no valid token; the second reads nothing
    for gradient in problem.to(device).gradients(name, torch.float32):
        assert (gradient == 0).all()


def test_without_room_in_the_lists_are_zero(backend):
    name, device = backend
    problem = make_problem().to(device)
    problem.lists = BlockLists(problem.lists.idx[..., :0], torch.zeros_like(problem.lists.cnt))
    for gradient in problem.gradients(name, torch.float32):
        assert (gradient == 0).all()


def test_are_reproducible(backend):
    name, device = backend
    if backend == ("reference", "cuda"):
        device = "cpu"  # PyTorch's index_add adds in any order on a GPU
    problem = make_problem(blocks=5).to(device)
    runs = [problem.gradients(name, torch.float32) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs))


def test_through_strided_views(backend):
    """Pages cut out of a pool get their gradient through the cut."""
    name, device = backend
    problem = make_problem().promising("finite").to(device)
    plain = problem.gradients(name, torch.float32)
    pool = torch.stack([problem.k_pages, problem.v_pages], dim=2).requires_grad_()  # [G, S, 2, T, D]
    problem.k_pages, problem.v_pages = pool[:, :, 0], pool[:, :, 1]
    out, lse = problem.run(name)
    draw = torch.Generator().manual_seed(1)  # the weights of `gradients`
    weights = [torch.randn(x.shape, generator=draw).to(x) for x in (out, lse)]
    loss = (out * weights[0]).sum() + (lse.masked_fill(lse == -math.inf, 0) * weights[1]).sum()
    (dpool,) = torch.autograd.grad(loss, pool)
    for part, whole in ((dpool[:, :, 0], plain[1]), (dpool[:, :, 1], plain[2])):
        torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(backend, scale):
    name, device = backend
    problem = make_problem().to(device)
    expected, lse = problem.run("reference", scale=scale)
    out, our_lse = problem.run(name, scale=scale)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(our_lse, lse, rtol=0, atol=1e-5)
    assert_gradients_within_eager_error(problem, name, scale=scale)
