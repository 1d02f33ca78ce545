"""Attention over a prompt's rows, of which those behind its end are one row repeated."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...pbsa.triton.forward import precision, unit_rows
from ...pbsa.triton.primitives import load_rows, softmax_step, store_rows
from ...sizes import cdiv, power_of_2
from ...workspace import empty

TILE = {"ROWS": 64, "KEYS": 32, "num_warps": 4, "num_stages": 3}
TILE32 = {"ROWS": 32, "KEYS": 32, "num_warps": 4, "num_stages": 1}  # of float32


def prompt_attention(q: Tensor, k: Tensor, v: Tensor, distinct: Tensor) -> Tensor:
    """See `api.prompt_attention`."""
    batch, count, heads, dim = q.shape
    q, k, v = unit_rows(q, "prompt.q"), unit_rows(k, "prompt.k"), unit_rows(v, "prompt.v")
    out = empty("prompt", (batch, count, heads, dim), q.dtype, q.device)
    tile = TILE32 if q.dtype == torch.float32 else TILE
    with torch.cuda.device_of(q):
        attend_prompt[(cdiv(count, tile["ROWS"]), heads, batch)](
            q, k, v, distinct, out, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            count, k.shape[1], dim**-0.5 * math.log2(math.e),
            D=dim, D_PAD=power_of_2(dim), PRECISION=precision(q.dtype), **tile,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["count", "num_keys"])
def attend_prompt(
    q, k, v, distinct, out,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, o_b, o_n, o_h, count, num_keys, scale_log2,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of one head's queries. The last distinct key stands for all that follow it: its score is their number's
    logarithm higher."""
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    keep = rows < count
    q_tile = load_rows(q + b * q_b + head * q_h, rows * q_n, keep, D, D_PAD, True)  # [ROWS, D_PAD]
    k += b * k_b + head * k_h
    v += b * v_b + head * v_h
    end = tl.load(distinct + b)
    repeated = tl.log2((num_keys - end + 1).to(tl.float32)) / scale_log2
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, D_PAD), tl.float32)
    for first in range(0, end, KEYS):
        key = first + tl.arange(0, KEYS)
        inside = key < end
        k_tile = load_rows(k, key * k_n, inside, D, D_PAD, True)  # [KEYS, D_PAD]
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        more = tl.where(key == end - 1, repeated, 0.0)
        scores = tl.where(inside[None, :], scores + more[None, :], float("-inf"))
        weights, factor, top, mass = softmax_step(scores, top, mass, scale_log2)
        v_tile = load_rows(v, key * v_n, inside, D, D_PAD, True)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * factor[:, None], input_precision=PRECISION)
    store_rows(out + b * o_b + head * o_h, rows * o_n, acc / mass[:, None], keep, D, D_PAD)
