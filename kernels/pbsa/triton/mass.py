"""Exact attention mass a page: what the forward pass's softmax gave each listed page, told from its log-sum-exp.

The scores are computed once more, the values are not touched: two fifths of an attention's products. The online softmax
of the forward pass cannot tell, because what it summed for a page shrinks with every later maximum.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...sizes import power_of_2
from .forward import precision, unit_rows
from .primitives import load_rows


def page_mass(
    q: Tensor,
    k_pages: Tensor,
    page_len: Tensor,
    idx: Tensor,
    cnt: Tensor,
    q_len: Tensor,
    lse: Tensor,
    scale: float,
) -> Tensor:
    """See `api.attention_mass`; idx [G, NR, M], cnt [G, NR]."""
    groups, blocks, tokens, dim = q.shape
    q, k_pages = unit_rows(q), unit_rows(k_pages)
    mass = torch.zeros((groups, blocks, idx.shape[2]), dtype=torch.float32, device=q.device)
    tables = [x.contiguous() for x in (page_len, idx, cnt, q_len, lse)]
    with torch.cuda.device_of(q):
        weigh_pages[(blocks, groups)](
            q, k_pages, *tables, mass, *q.stride()[:3], *k_pages.stride()[:3],
            blocks // cnt.shape[1], cnt.shape[1], idx.shape[2], k_pages.shape[1], scale * math.log2(math.e),
            T=tokens, D=dim, D_PAD=power_of_2(dim), PRECISION=precision(q.dtype),
            num_warps=8 if tokens == 128 else 4, num_stages=3,
        )  # fmt: skip
    return mass


@triton.jit(do_not_specialize=["sharing", "num_lists", "longest", "num_slots"])
def weigh_pages(
    q, k, page_len, idx, cnt, q_len, lse, mass, q_g, q_n, q_t, k_g, k_s, k_t,
    sharing, num_lists, longest, num_slots, scale_log2,
    T: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One query block: a product with each listed page, and the mean of what its queries' softmax gives that page."""
    g = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0)
    block = g * tl.num_programs(0) + n
    tokens = tl.arange(0, T)
    size = tl.load(q_len + block)
    asked = tokens < size
    q_tile = load_rows(q + g * q_g + n.to(tl.int64) * q_n, tokens * q_t, asked, D, D_PAD, True)
    row_lse = tl.load(lse + block * T + tokens, mask=asked, other=0.0) * 1.4426950408889634  # log2(e)
    row_of_lists = g * num_lists + n // sharing
    pages = idx + row_of_lists * longest
    lens = page_len + g * num_slots
    for i in range(tl.load(cnt + row_of_lists)):
        slot = tl.load(pages + i).to(tl.int64)
        valid = tokens < tl.load(lens + slot)
        k_tile = load_rows(k + g * k_g + slot * k_s, tokens * k_t, valid, D, D_PAD, True)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        weights = tl.exp2(scores * scale_log2 - row_lse[:, None])
        weights = tl.where(asked[:, None] & valid[None, :], weights, 0.0)
        total = tl.sum(tl.sum(weights, axis=1), axis=0)
        tl.store(mass + block * longest + i, total / tl.maximum(size, 1).to(tl.float32))
