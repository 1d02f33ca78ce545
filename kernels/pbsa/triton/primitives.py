"""Pieces that PBSA's Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(start, offsets, keep, D: tl.constexpr, D_PAD: tl.constexpr, MASK: tl.constexpr):
    """Rows of D elements, element [row, dim] at start + offsets[row] + dim -> [rows, D_PAD].

    With MASK, 0 where `keep` [rows] is false, and nothing is read there; without it, every row is read.
    """
    dims = tl.arange(0, D_PAD)
    at = start + (offsets[:, None] + dims[None, :])  # one loop-invariant tile of offsets, moved by a scalar
    if MASK:
        if D == D_PAD:
            return tl.load(at, mask=keep[:, None], other=0.0)
        else:
            return tl.load(at, mask=keep[:, None] & (dims < D)[None, :], other=0.0)
    else:
        if D == D_PAD:
            return tl.load(at)
        else:
            return tl.load(at, mask=(dims < D)[None, :], other=0.0)


@triton.jit
def described_rows(start, count, D: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr):
    """The copy engine's view of `count` rows of D elements: tiles [ROWS, DIMS]."""
    return tl.make_tensor_descriptor(start, shape=[count, D], strides=[D, 1], block_shape=[ROWS, DIMS])


@triton.jit
def store_rows(start, offsets, tile, keep, D: tl.constexpr, D_PAD: tl.constexpr):
    """Write the rows of `tile` [rows, D_PAD] that `keep` [rows] names, [row, dim] to start + offsets[row] + dim."""
    dims = tl.arange(0, D_PAD)
    at = start + (offsets[:, None] + dims[None, :])  # one loop-invariant tile of offsets, moved by a scalar
    if D == D_PAD:
        tl.store(at, tile.to(start.dtype.element_ty), mask=keep[:, None])
    else:
        tl.store(at, tile.to(start.dtype.element_ty), mask=keep[:, None] & (dims < D)[None, :])


@triton.jit
def softmax_step(scores, top, mass, scale_log2):
    """Take one tile of scores into a running base-2 softmax of scores * scale_log2; scale_log2 > 0.

    scores [rows, keys] unscaled, -inf where masked; top [rows] running maximum, scaled; mass [rows] running sum of
    2 ** (score - top). Scale and shift are one multiply-add an element.
    -> weights [rows, keys], factor [rows] by which what was summed so far shrinks, and the new top and mass.
    """
    new_top = tl.maximum(top, tl.max(scores, axis=1) * scale_log2)
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing kept yet: -inf - -inf would be NaN
    weights = tl.exp2(tl.fma(scores, scale_log2, -shift[:, None]))
    factor = tl.exp2(top - shift)
    return weights, factor, new_top, mass * factor + tl.sum(weights, axis=1)


@triton.jit
def order_key(scores):
    """int32 keys that compare as the float32 scores do, all above the least int32."""
    exact = tl.where(scores == 0.0, 0.0, scores)  # -0.0 and 0.0 are equal scores
    bits = exact.to(tl.int32, bitcast=True)
    return tl.maximum(bits ^ ((bits >> 31) & 0x7FFFFFFF), -2147483647)


@triton.jit
def kth_largest(keys, k):
    """The largest threshold that at least k of the int32 keys [n] reach, and how many reach it.

    Found without a sort, two bits a round: the three counts of a round do not wait for one another. A threshold that
    exactly k reach is enough, and ends the search.
    """
    threshold = tl.full((), -2147483648, tl.int32)
    reached = tl.full((), 2147483647, tl.int32)
    step = tl.full((), 1073741824, tl.int32)
    while (step > 0) & (reached != k):
        one = tl.sum((keys >= threshold + step).to(tl.int32), axis=0)
        two = tl.sum((keys >= threshold + 2 * step).to(tl.int32), axis=0)
        three = tl.sum((keys >= threshold + 3 * step).to(tl.int32), axis=0)
        steps = (one >= k).to(tl.int32) + (two >= k).to(tl.int32) + (three >= k).to(tl.int32)
        reached = tl.where(steps == 3, three, tl.where(steps == 2, two, tl.where(steps == 1, one, reached)))
        threshold += step * steps
        step = step // 4
    return threshold, reached


@triton.jit
def k_largest(scores, positions, candidates, k):
    """[n] bool: of the candidates [n] the k with the largest scores, and of equal scores the earlier positions."""
    keys = tl.where(candidates, order_key(scores), -2147483648)
    threshold, reached = kth_largest(keys, k)
    chosen = candidates & (keys >= threshold)
    if reached > k:
        above = keys > threshold
        equal = chosen & (keys == threshold)
        missing = k - tl.sum(above.to(tl.int32), axis=0)
        order = tl.where(equal, -positions, -2147483648)
        last, _ = kth_largest(order, missing)
        chosen = above | (equal & (order >= last))
    return chosen
