"""The public face of the fused element-wise operations: checks what it is given, chooses a backend, hands over.

All are for inference: no gradient is defined. Nothing here reads a value on the device. `backend` is auto, reference
or triton, chosen as for PBSA (`pbsa.constraints`): ValueError for shapes, dtypes or devices that do not fit together,
RuntimeError with the reason when the backend named cannot serve the call.

Letters: B batch, N tokens of a chunk, H heads, D head dim, C = H * D, F frames of a chunk, NB blocks of a chunk, T rows
of a block, G = B * H groups, S page slots of a group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import expect
from ..pbsa.constraints import serve
from . import reference
from .reference import Pages8, Rows8

EPS = 1e-6  # Wan's


def norm_rope_to_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm_q: Tensor,
    norm_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    tokens: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    pooled_k: Tensor,
    *,
    eps: float = EPS,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """From the projections of a chunk to what block-sparse attention and its router read.

    q, k, v [B, N, C], rows may be strided (views of one fused projection); norm_q, norm_k [C], weights of the RMSNorm
    over all heads; cos, sin [N, D/2] float32, for interleaved pairs; tokens [NB, T] int32: the chunk's token in each
    row of each block, -1 behind a ragged block's end; slots [G, NB] int32 or int64: the page of each block, distinct
    within a group.
    Written in place: k_pages, v_pages [G, S, T, D] at `slots` (rows without a token become zero) and pooled_k
    [G, S, D] float32, the mean of each page's keys as stored; or [G, S, R, D], that of each R-th of a page's rows (0
    where it holds no token).

    -> q blocks [G, NB, T, D] in the pages' dtype, and their means [G, NB, D] or [G, NB, R, D] in pooled_k's dtype.
    """
    heads, dim = _check_projections(q, k, v, norm_q, norm_k, cos, sin)
    blocks, rows = tokens.shape
    groups = q.shape[0] * heads
    expect("k_pages", k_pages, (groups, None, rows, dim), q.device)
    expect("v_pages", v_pages, tuple(k_pages.shape), q.device)
    expect("slots", slots, (groups, blocks), q.device)
    expect("pooled_k", pooled_k, (groups, k_pages.shape[1], *pooled_k.shape[2:-1], dim), q.device)
    if pooled_k.dim() > 4 or rows % reference.parts_of(pooled_k):
        raise ValueError(
            f"pooled_k of shape {list(pooled_k.shape)} does not divide the {rows} rows of a block"
        )
    args = q, k, v, norm_q, norm_k, cos, sin, tokens, slots, k_pages, v_pages, pooled_k, eps
    return _serve("norm_rope_to_pages", args, backend, q, dim, rows)


def norm_rope_to_frames(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm_q: Tensor,
    norm_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    frame_slots: Tensor,
    k_frames: Tensor,
    v_frames: Tensor,
    *,
    eps: float = EPS,
    backend: str = "auto",
) -> Tensor:
    """The same for attention that reads whole frames: normalised, rotated keys and the values enter a frame cache.

    As `norm_rope_to_pages`, but k_frames, v_frames [B, S, tokens of a frame, H, D] are written at frame_slots [F]
    int32 or int64, distinct. -> q [B, N, H, D] in their dtype.
    """
    heads, dim = _check_projections(q, k, v, norm_q, norm_k, cos, sin)
    frames = frame_slots.shape[0]
    if q.shape[1] % frames:
        raise ValueError(f"{q.shape[1]} tokens are not {frames} whole frames")
    expect("k_frames", k_frames, (q.shape[0], None, q.shape[1] // frames, heads, dim), q.device)
    expect("v_frames", v_frames, tuple(k_frames.shape), q.device)
    args = q, k, v, norm_q, norm_k, cos, sin, frame_slots, k_frames, v_frames, eps
    return _serve("norm_rope_to_frames", args, backend, q, dim)


def blocks_to_tokens(
    blocks: Tensor, tokens: Tensor, batch: int, count: int, *, eight_bits: bool = False, backend: str = "auto"
) -> Tensor | Rows8:
    """Blocks [G, NB, T, D] back to [B, N, C], heads side by side as the output projection wants them.

    tokens [NB, T] int32 as for `norm_rope_to_pages`: each of the chunk's `count` tokens (N) stands in it once.
    eight_bits: as `quantise_rows` would give them, rows [B, N, C] and scale [B, N, 1].
    """
    expect("tokens", tokens, tuple(blocks.shape[1:3]), blocks.device)
    if blocks.shape[0] % batch:
        raise ValueError(f"{blocks.shape[0]} groups do not belong to a batch of {batch}")
    return _serve(
        "blocks_to_tokens",
        (blocks, tokens, batch, count, eight_bits),
        backend,
        blocks,
        blocks.shape[3],
        blocks.shape[2],
        eight_bits=eight_bits,
    )


def pack_pages(
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    into: Pages8,
    *,
    values: bool = True,
    backend: str = "auto",
) -> None:
    """Write the pages [G, S, T, D] at `slots` [G, n] (int32 or int64, distinct within a group) in 8 bits `into` the
    same places, of which there may be fewer, a scale a channel of a page's keys and a token of its values. Without
    `values` keys alone.
    """
    _check_pages(k_pages, v_pages, into, fewer=True)
    expect("slots", slots, (k_pages.shape[0], None), k_pages.device)
    return _serve(
        "pack_pages",
        (k_pages, v_pages, slots, into, values),
        backend,
        k_pages,
        k_pages.shape[3],
        k_pages.shape[2],
    )


def unpack_pages(packed: Pages8, k_pages: Tensor, v_pages: Tensor, *, backend: str = "auto") -> None:
    """Write all of a layer's pages from 8 bits into k_pages and v_pages [G, S, T, D]."""
    _check_pages(k_pages, v_pages, packed)
    return _serve(
        "unpack_pages", (packed, k_pages, v_pages), backend, k_pages, k_pages.shape[3], k_pages.shape[2]
    )


def put_pages(
    k_blocks: Tensor,
    v_blocks: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Copy blocks [G, n, T, D] of keys and values to the pages at `slots` [G, n] (int32 or int64, distinct within a
    group) of k_pages and v_pages [G, S, T, D], of one dtype. Blocks and pages of one memory may not overlap.
    """
    groups, count, rows, dim = k_blocks.shape
    dtype, device = k_blocks.dtype, k_blocks.device
    expect("v_blocks", v_blocks, tuple(k_blocks.shape), device, dtype)
    expect("slots", slots, (groups, count), device)
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        expect(name, pages, (groups, None, rows, dim), device, dtype)
    _check_strides(k_blocks=k_blocks, v_blocks=v_blocks, k_pages=k_pages, v_pages=v_pages)
    return _serve("put_pages", (k_blocks, v_blocks, slots, k_pages, v_pages), backend, k_blocks)


def update_table(
    table: Tensor,
    score: Tensor,
    capacity: int,
    persistent: int,
    evicted: int,
    pinned: int = 0,
    *,
    backend: str = "auto",
) -> None:
    """The memory update in a stream's tables, in place: P = TopC(P u E; score).

    table [R, S] int64, each row a permutation of S slots: P in the first `capacity` entries, of which `persistent` are
    filled, then the window, whose first `evicted` entries E leave, then free ones. score [R, N, C] float32, of which
    the first persistent + evicted columns count, P and E in this order, with the sum of their N rows: of equal ones the
    earlier wins, NaN counts as -inf. The first `pinned` stay, whatever their score.
    After it P holds the best, as many as fit, in their old order; the rest of the window follows, then what is free.
    """
    expect("table", table, (None, None), table.device, torch.int64)
    expect("score", score, (table.shape[0], None, None), table.device, torch.float32)
    if not 0 <= persistent <= capacity <= capacity + evicted <= table.shape[1]:
        raise ValueError(
            f"a table of {table.shape[1]} slots has no {persistent} of {capacity} pages, and {evicted} that leave"
        )
    if score.shape[2] < persistent + evicted:
        raise ValueError(f"score has {score.shape[2]} columns for {persistent + evicted} candidates")
    return _serve("update_table", (table, score, capacity, persistent, evicted, pinned), backend, score)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    dtype: torch.dtype | None = None,
    eps: float = EPS,
    backend: str = "auto",
) -> Tensor:
    """x [B, N, C] / sqrt(mean of squares + eps) * weight [C], in `dtype`, default x's."""
    expect("x", x, (None, None, None), x.device)
    expect("weight", weight, (x.shape[2],), x.device)
    return _serve("rms_norm", (x, weight, eps, dtype), backend, x)


def modulated_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    plus_one: bool = True,
    eight_bits: bool = False,
    eps: float = EPS,
    backend: str = "auto",
) -> Tensor | Rows8:
    """adaLN: LayerNorm(x) * (1 + scale) + shift, x [B, N, C], scale and shift [B, F, C], one vector a frame.

    With plus_one False the factor is `scale` itself: weight and bias of an ordinary LayerNorm, expanded. eight_bits:
    the norm as `quantise_rows` would give it, before it is rounded to x's dtype: rows [B, N, C], scale [B, N, 1].
    """
    _check_rows(x, scale=scale, shift=shift)
    return _serve(
        "modulated_norm", (x, scale, shift, plus_one, eps, eight_bits), backend, x, eight_bits=eight_bits
    )


def gated_residual(x: Tensor, y: Tensor, gate: Tensor | None, *, backend: str = "auto") -> Tensor:
    """x + gate * y: the residual stream x and a branch's output y [B, N, C], gate [B, F, C] or None for 1."""
    _check_rows(x, y=y, gate=gate)
    return _serve("gated_residual", (x, y, gate), backend, x)


def gated_residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    plus_one: bool = True,
    eight_bits: bool = False,
    eps: float = EPS,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | Rows8]:
    """`gated_residual`, then `modulated_norm` of the sum for the next branch: (sum, norm), in one pass over memory."""
    _check_rows(x, y=y, gate=gate, scale=scale, shift=shift)
    return _serve(
        "gated_residual_norm",
        (x, y, gate, scale, shift, plus_one, eps, eight_bits),
        backend,
        x,
        eight_bits=eight_bits,
    )


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, backend: str = "auto"
) -> Tensor:
    """One attention from two over different keys: out_a, out_b [G, NB, T, D] with the natural log of each softmax's
    sum, lse_a, lse_b [G, NB, T] float32. What read nothing (lse -inf) has no share; where both did, 0.
    """
    expect("out_b", out_b, tuple(out_a.shape), out_a.device)
    expect("lse_a", lse_a, tuple(out_a.shape[:3]), out_a.device)
    expect("lse_b", lse_b, tuple(out_a.shape[:3]), out_a.device)
    return _serve("merge_attention", (out_a, lse_a, out_b, lse_b), backend, out_a, out_a.shape[3])


def distinct_rows(k: Tensor, v: Tensor) -> Tensor:
    """How many rows of k and v [B, M, H, D] say something: from the last of them on, all are one row repeated, as those
    behind a prompt's end are. -> [B] int32, 1 to M, for `prompt_attention`."""
    expect("k", k, (None, None, None, None), k.device)
    expect("v", v, tuple(k.shape), k.device, k.dtype)
    return reference.distinct_rows(k, v)


def prompt_attention(q: Tensor, k: Tensor, v: Tensor, distinct: Tensor, *, backend: str = "auto") -> Tensor:
    """Attention of q [B, N, H, D] over all M rows of k and v [B, M, H, D], all of one dtype -> [B, N, H, D].

    distinct [B] int32: of `distinct_rows`. Repeated rows are read once and weigh as many as they are.
    """
    expect("q", q, (None, None, None, None), q.device)
    expect("k", k, (q.shape[0], None, *q.shape[2:]), q.device, q.dtype)
    expect("v", v, tuple(k.shape), q.device, q.dtype)
    expect("distinct", distinct, (q.shape[0],), q.device, torch.int32)
    return _serve("prompt_attention", (q, k, v, distinct), backend, q, q.shape[3])


def quantise_rows(x: Tensor, *, gelu: bool = False, backend: str = "auto") -> Rows8:
    """Rows in 8 bits for a product: x [R, C] -> (float8_e4m3fn [R, C], scale [R, 1] float32), x = float8 * scale.

    The largest element of a row becomes 448. gelu: of GELU(x) (tanh form) instead, so that a feed-forward's widest
    tensor is read once and written in 8 bits.
    """
    expect("x", x, (None, None), x.device)
    return _serve("quantise_rows", (x, gelu), backend, x, eight_bits=True)


def norm_to_window(
    y: Tensor,
    window: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    total: Tensor | None = None,
    past: Tensor | None = None,
    silu: bool = False,
    shuffled: bool = False,
    backend: str = "auto",
) -> None:
    """What stands between two convolutions of the video VAE, written where the next one reads it.

    x = y + bias + residual, stored in `total` if given; then, with gamma, x / sqrt(mean of squares) * gamma and SiLU
    if `silu`. y and residual [T, H, W, C], bias and gamma [C], total [T, H, W, C] (may be residual), all contiguous.
    shuffled: y is instead [T, H/2 + 1, W/2 + 1, 4C], a 2x2 convolution's output with one bank of C channels per
    position in a 2x2 cell; x has twice its height and width.
    Written in place: the last T frames of window [T, H, W, C]. With past [2, H, W, C], the inputs before this chunk,
    window is [T + 2, H, W, C]: its first two frames become `past`, and `past` becomes its last two.
    """
    past_frames = 0 if past is None else 2
    shape = (window.shape[0] - past_frames, *window.shape[1:])
    height, width, channels = window.shape[1:]
    stored = (shape[0], height // 2 + 1, width // 2 + 1, 4 * channels) if shuffled else shape
    if shuffled and (height % 2 or width % 2):
        raise ValueError(
            f"a window of {height}x{width} is not twice as high and wide as a 2x2 convolution's input"
        )
    expect("y", y, stored, window.device)
    for name, vector in (("bias", bias), ("gamma", gamma)):
        if vector is not None:
            expect(name, vector, (channels,), window.device)
    for name, frames, wanted in (
        ("residual", residual, shape), ("total", total, shape), ("past", past, (2, *shape[1:])),
    ):  # fmt: skip
        if frames is not None:
            expect(name, frames, wanted, window.device)
    for name, x in (("y", y), ("residual", residual), ("total", total), ("past", past), ("window", window)):
        if x is not None and not x.is_contiguous():
            raise ValueError(f"{name} is not contiguous: its strides are {x.stride()}; use .contiguous()")
    args = y, window, bias, residual, gamma, total, past, silu, shuffled
    return _serve("norm_to_window", args, backend, y)


def _serve(
    name: str,
    args: tuple,
    backend: str,
    x: Tensor,
    dim: int | None = None,
    rows: int | None = None,
    eight_bits: bool = False,
) -> Any:
    """Call the operation, which both backends have under this name, by the one that may serve inputs like x.

    eight_bits: it writes 8-bit floats, which Triton has not on older devices.
    """
    older = eight_bits and x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9)
    if older and backend == "auto":
        backend = "reference"
    facts = x.device, x.dtype, dim, rows
    return serve(
        backend, name, facts, lambda: _by_triton(name, args), lambda: getattr(reference, name)(*args)
    )


def _by_triton(name: str, args: tuple) -> Any:
    from . import triton

    return getattr(triton, name)(*args)


def _check_projections(q, k, v, norm_q, norm_k, cos, sin) -> tuple[int, int]:
    """-> (H, D) of projections that fit their tables."""
    expect("q", q, (None, None, None), q.device)
    _, count, width = q.shape
    dim = 2 * cos.shape[-1]
    if dim == 0 or width % dim:
        raise ValueError(f"cos is for a head dim of {dim}, which does not divide q's width {width}")
    for name, x in (("k", k), ("v", v)):
        expect(name, x, tuple(q.shape), q.device)
    for name, x in (("norm_q", norm_q), ("norm_k", norm_k)):
        expect(name, x, (width,), q.device)
    for name, x in (("cos", cos), ("sin", sin)):
        expect(name, x, (count, dim // 2), q.device)
    return width // dim, dim


def _check_pages(k_pages: Tensor, v_pages: Tensor, packed: Pages8, fewer: bool = False) -> None:
    """fewer: the packed pages may be."""
    expect("k_pages", k_pages, (None, None, None, None), k_pages.device)
    expect("v_pages", v_pages, tuple(k_pages.shape), k_pages.device, k_pages.dtype)
    groups, count, rows, dim = k_pages.shape
    shape = groups, min(count, packed.k.shape[1]) if fewer else count, rows, dim
    for name, part, wanted in (("k", packed.k, shape), ("v", packed.v, shape)):
        expect(f"packed {name}", part, wanted, k_pages.device, torch.int8)
    expect("packed k_scale", packed.k_scale, (*shape[:2], shape[3]), k_pages.device, torch.float32)
    expect("packed v_scale", packed.v_scale, shape[:3], k_pages.device, torch.float32)
    for name, part in zip(packed._fields, packed):
        if not part.is_contiguous():
            raise ValueError(f"packed {name} is not contiguous: pages lie one behind the other")
    _check_strides(k_pages=k_pages, v_pages=v_pages)


def _check_strides(**pages: Tensor) -> None:
    for name, x in pages.items():
        rows, dim = x.shape[2:]
        if x.stride()[1:] != (rows * dim, dim, 1):
            raise ValueError(
                f"{name} of a group do not lie one behind the other: its strides are {x.stride()}; use .contiguous()"
            )


def _check_rows(x: Tensor, *, y: Tensor | None = None, **per_frame: Tensor | None) -> None:
    expect("x", x, (None, None, None), x.device)
    if y is not None:
        expect("y", y, tuple(x.shape), x.device)
    for name, vector in per_frame.items():
        if vector is None:
            continue
        expect(name, vector, (x.shape[0], None, x.shape[2]), x.device)
        if x.shape[1] % vector.shape[1]:
            raise ValueError(f"{name} has {vector.shape[1]} frames, which do not divide {x.shape[1]} tokens")
