"""Pieces that PBSA's Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(start, row_stride, rows, keep_rows, D: tl.constexpr, D_PAD: tl.constexpr):
    """Rows of D elements, element [row, dim] at start + row * row_stride + dim -> [rows, D_PAD], 0 where not kept."""
    dims = tl.arange(0, D_PAD)
    keep = keep_rows[:, None] & (dims < D)[None, :]
    return tl.load(start + rows[:, None] * row_stride + dims[None, :], mask=keep, other=0.0)


@triton.jit
def softmax_step(scores, top, mass):
    """Take one tile of base-2 scores into a running softmax.

    scores [rows, keys], -inf where masked; top [rows] running maximum; mass [rows] running sum of 2 ** (score - top).
    -> weights [rows, keys], factor [rows] by which what was summed so far shrinks, and the new top and mass.
    """
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing kept yet: -inf - -inf would be NaN
    weights = tl.exp2(scores - shift[:, None])
    factor = tl.exp2(top - shift)
    return weights, factor, new_top, mass * factor + tl.sum(weights, axis=1)


@triton.jit
def order_key(scores, positions):
    """Distinct int64 keys in [0, 2 ** 48): larger for a larger score, and of equal scores for the earlier position."""
    exact = tl.where(scores == 0.0, 0.0, scores)  # -0.0 and 0.0 are equal scores
    bits = exact.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers, floats then compare as floats do
    return (ordered.to(tl.int64) + 2147483648) * 65536 + (65535 - positions)


@triton.jit
def kth_largest_key(keys, k):
    """The largest threshold that at least k of the keys (each below 2 ** 48) reach, found bit by bit: no sort."""
    threshold = tl.zeros((), tl.int64)
    step = threshold + 140737488355328  # 2 ** 47
    for _ in range(48):
        enough = tl.sum((keys >= threshold + step).to(tl.int32), axis=0) >= k
        threshold = tl.where(enough, threshold + step, threshold)
        step = step // 2
    return threshold
