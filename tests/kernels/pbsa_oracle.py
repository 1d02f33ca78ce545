"""Problems for PBSA, and the most literal attention over lists of pages to judge the answers by."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from sparse_forcing_pack.kernels import BlockLists, pbsa_attention
from torch import Tensor


@dataclass
class Problem:
    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    page_len: Tensor
    lists: BlockLists

    def run(self, backend: str, **options) -> tuple[Tensor, Tensor]:
        args = self.q, self.k_pages, self.v_pages, self.page_len, self.lists
        return pbsa_attention(*args, backend=backend, **options)

    def promising(self, padding: str) -> Problem:
        """The same with page tails that keep the promise `padding`; "any" is how problems are made."""
        if padding == "any":
            return self
        k, v = self.k_pages.nan_to_num(0), self.v_pages.nan_to_num(0)
        lens = torch.full_like(self.page_len, k.shape[2]) if padding == "none" else self.page_len
        return Problem(self.q, k, v, lens, self.lists)

    def gradients(self, backend: str, dtype: torch.dtype, **options) -> tuple[Tensor, ...]:
        """dq, dk and dv of one scalar, the same for every backend and dtype, of out and of the finite part of lse."""
        leaves = [x.detach().to(dtype).clone().requires_grad_() for x in (self.q, self.k_pages, self.v_pages)]
        out, lse = Problem(*leaves, self.page_len, self.lists).run(backend, **options)
        draw = torch.Generator().manual_seed(1)
        weights = [torch.randn(x.shape, generator=draw).to(x) for x in (out, lse)]
        loss = (out * weights[0]).sum() + (lse.masked_fill(lse.isinf(), 0) * weights[1]).sum()
        return torch.autograd.grad(loss, leaves)

    def to(self, where: torch.device | str | torch.dtype) -> Problem:
        if isinstance(where, torch.dtype):
            return Problem(
                *(x.to(where) for x in (self.q, self.k_pages, self.v_pages)), self.page_len, self.lists
            )
        lists = BlockLists(*(x.to(where) for x in self.lists))
        return Problem(
            *(x.to(where) for x in (self.q, self.k_pages, self.v_pages, self.page_len)), lists=lists
        )


def make_problem(
    *, groups=2, blocks=3, slots=7, tokens=16, dim=64, longest=5, shared=False, full=False, seed=0
) -> Problem:
    """Random float32 tensors; ragged pages whose tails hold NaN; lists of every length from none to `longest`."""
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(groups, blocks, tokens, dim, generator=draw)
    k, v = (torch.randn(groups, slots, tokens, dim, generator=draw) for _ in range(2))
    page_len = torch.randint(1, tokens + 1, (groups, slots), generator=draw, dtype=torch.int32)
    if slots > 1:
        page_len[0, 0] = 0
    tail = torch.arange(tokens) >= page_len[..., None]
    for pages in (k, v):
        pages[tail] = math.nan
    rows = 1 if shared else blocks
    longest = slots if full else longest
    picks = torch.rand(groups, rows, slots, generator=draw).argsort(-1)[..., :longest]
    cnt = torch.randint(0, longest + 1, (groups, rows), generator=draw, dtype=torch.int32)
    if full:
        cnt.fill_(longest)
    else:
        cnt[-1, -1] = 0
        cnt[0, 0] = longest
    return Problem(q, k, v, page_len, BlockLists(_ascending(picks, cnt), cnt))


def _ascending(picks: Tensor, cnt: Tensor) -> Tensor:
    """Sort the first cnt picks of each row; what follows stays as padding, in any order."""
    idx = picks.to(torch.int32).contiguous()
    for row, count in zip(idx.flatten(0, 1), cnt.flatten().tolist()):
        row[:count] = row[:count].sort().values
    return idx


def attend_literally(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Attention in `dtype` throughout, one query block at a time, over its listed tokens laid end to end.

    float64 is the truth; the low precision of the inputs is what an eager implementation would give.
    """
    q, k, v = (x.to(dtype) for x in (problem.q, problem.k_pages, problem.v_pages))
    out, lse = torch.zeros_like(q), torch.full_like(q[..., 0], -math.inf)
    groups, blocks = q.shape[:2]
    idx, cnt = problem.lists.idx.expand(-1, blocks, -1), problem.lists.cnt.expand(-1, blocks)
    for g in range(groups):
        for n in range(blocks):
            slots = idx[g, n, : int(cnt[g, n])].tolist()
            lens = [int(problem.page_len[g, slot]) for slot in slots]
            if sum(lens) == 0:
                continue
            keys, values = (
                torch.cat([pages[g, slot, :size] for slot, size in zip(slots, lens)]) for pages in (k, v)
            )
            scores = q[g, n] @ keys.T * q.shape[-1] ** -0.5
            out[g, n] = scores.softmax(-1) @ values
            lse[g, n] = scores.logsumexp(-1)
    return out, lse


def assert_within_eager_error(problem: Problem, backend: str, **options) -> None:
    """`backend` may be as far from float64 as eager attention in the inputs' precision, and a rounding further.

    The rounding: of the output to its dtype, and of float32 scores, whose relative error moves every weight (the order
    of summation alone makes float32 implementations differ by a few of these).
    """
    truth_out, truth_lse = attend_literally(problem, torch.float64)
    eager_out, _ = attend_literally(problem, problem.q.dtype)
    out, lse = problem.run(backend, **options)
    assert out.dtype == problem.q.dtype and lse.dtype == torch.float32
    rounding = torch.finfo(problem.q.dtype).eps * truth_out.abs().max()
    rounding += 4 * torch.finfo(torch.float32).eps * problem.v_pages.nan_to_num(0).abs().max()
    assert (out - truth_out).abs().max() <= (eager_out - truth_out).abs().max() + rounding
    assert torch.equal(lse.isinf(), truth_lse.isinf())
    # scores are accumulated in float32 whatever the inputs: a few roundings of a sum of D products
    assert torch.where(truth_lse.isinf(), 0, lse - truth_lse).abs().max() <= 2e-5


def assert_gradients_within_eager_error(problem: Problem, backend: str, **options) -> None:
    """As `assert_within_eager_error`, for gradients: the reference in float64 is the truth.

    On top, of the largest gradient, two roundings to the inputs' dtype, because kernels round the weights and their
    gradients before the products, and sixteen to float32: the weights are recomputed from an lse of about ten.
    """
    dtype = problem.q.dtype
    truth = problem.gradients("reference", torch.float64, **options)
    eager = problem.gradients("reference", dtype, **options)
    for found, want, budget in zip(problem.gradients(backend, dtype, **options), truth, eager):
        assert found.dtype == dtype and found.shape == want.shape
        rounding = (2 * torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps) * want.abs().max()
        assert (found - want).abs().max() <= (budget - want).abs().max() + rounding


def route_literally(scores: list[float], k: int) -> set[int]:
    """Positions of the k best scores; of equal ones the earlier wins."""
    return set(sorted(range(len(scores)), key=lambda position: (-scores[position], position))[:k])
