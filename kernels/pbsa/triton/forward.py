"""Forward PBSA: one program takes one query block of one group and walks that block's list of pages.

Grid (NQ, G), the query block fastest, so that the programs running together read one group's pages from L2. Products
take the inputs' dtype (float32 in full precision, no TF32) and accumulate in float32, like the base-2 online softmax;
the weights are rounded to v's dtype before their product with v. Letters as in `api`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import load_rows, softmax_step


def attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_len: Tensor, idx: Tensor, cnt: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See `api.pbsa_attention`; idx [G, NQ or 1, M], cnt [G, NQ or 1]."""
    groups, blocks, tokens, dim = q.shape
    q, k_pages, v_pages = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k_pages, v_pages))
    page_len = page_len.contiguous()
    idx = idx.contiguous().expand(groups, blocks, -1)  # stride 0 where one list serves the group
    cnt = cnt.contiguous().expand(groups, blocks)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        _forward[(blocks, groups)](
            q, k_pages, v_pages, page_len, idx, cnt, out, lse,
            *q.stride()[:3], *k_pages.stride()[:3], *v_pages.stride()[:3], *idx.stride()[:2], *cnt.stride(),
            k_pages.shape[1], scale * math.log2(math.e),
            T=tokens, D=dim, D_PAD=triton.next_power_of_2(dim), **_launch(q.dtype, tokens),
        )  # fmt: skip
    return out, lse


def _launch(dtype: torch.dtype, tokens: int) -> dict[str, int | str]:
    """How the kernel is cut: tiles small enough for the 99 KiB of shared memory that sm_86 and sm_89 give a program."""
    if dtype == torch.float32:
        return {"KEYS": min(tokens, 32), "PRECISION": "ieee", "num_warps": 8, "num_stages": 1}
    warps = 8 if tokens == 128 else 4
    return {"KEYS": min(tokens, 64), "PRECISION": "tf32", "num_warps": warps, "num_stages": 2}


_RUN_TIME = [
    "idx_g",
    "idx_n",
    "cnt_g",
    "cnt_n",
    "num_slots",
    "k_g",
    "v_g",
    "q_g",
]  # they follow a call's lengths


@triton.jit(do_not_specialize=_RUN_TIME)
def _forward(
    q, k, v, page_len, idx, cnt, out, lse,
    q_g, q_n, q_t, k_g, k_s, k_t, v_g, v_s, v_t, idx_g, idx_n, cnt_g, cnt_n,
    num_slots, scale_log2,
    T: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, T)
    every_row = rows < T
    q_tile = load_rows(q + g * q_g + n * q_n, q_t, rows, every_row, D, D_PAD)  # [T, D_PAD]

    top = tl.full((T,), float("-inf"), tl.float32)
    mass = tl.zeros((T,), tl.float32)
    acc = tl.zeros((T, D_PAD), tl.float32)
    count = tl.load(cnt + g * cnt_g + n * cnt_n)
    pages = idx + g * idx_g + n * idx_n
    PARTS: tl.constexpr = T // KEYS  # a page is read in pieces of KEYS tokens
    for i in range(count * PARTS):
        slot = tl.load(pages + i // PARTS).to(tl.int64)
        tokens = (i % PARTS) * KEYS + tl.arange(0, KEYS)
        valid = tokens < tl.load(page_len + g * num_slots + slot)
        k_tile = load_rows(k + g * k_g + slot * k_s, k_t, tokens, valid, D, D_PAD)  # [KEYS, D_PAD]
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale_log2
        scores = tl.where(valid[None, :], scores, float("-inf"))
        weights, factor, top, mass = softmax_step(scores, top, mass)
        v_tile = load_rows(v + g * v_g + slot * v_s, v_t, tokens, valid, D, D_PAD)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * factor[:, None], input_precision=PRECISION)

    block = g * tl.num_programs(0) + n
    safe_mass = tl.where(mass == 0.0, 1.0, mass)
    row_lse = tl.where(mass == 0.0, float("-inf"), (top + tl.log2(safe_mass)) * 0.6931471805599453)  # ln 2
    tl.store(lse + block * T + rows, row_lse)
    dims = tl.arange(0, D_PAD)
    tile = (acc / safe_mass[:, None]).to(out.dtype.element_ty)
    tl.store(out + block * T * D + rows[:, None] * D + dims[None, :], tile, mask=(dims < D)[None, :])
