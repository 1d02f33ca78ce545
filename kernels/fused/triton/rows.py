"""Row kernels: one program holds one token's whole width, so that a norm reads it once.

`_residual_norm` is a branch's gate and residual and the next branch's adaLN in one pass; each part can be left out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...sizes import cdiv, power_of_2
from ...workspace import dense, empty
from ..reference import FP8_MAX, SMALLEST, Rows8

MERGED_ROWS = 32  # of two attentions, a program


def gated_residual_norm(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    plus_one: bool,
    eps: float,
    eight_bits: bool = False,
) -> tuple[Tensor, Tensor | Rows8]:
    """See `api.gated_residual_norm`: x, y [B, N, C]; gate, scale, shift [B, F, C] or None -> (x + gate * y, its norm).

    Without y the sum is x itself; without scale the norm is the sum itself. eight_bits: the norm in 8 bits. Each
    program reads a row before it writes it, so the sum may take x's place.
    """
    batch, tokens, width = x.shape
    x = dense("residual.x", x)
    y = None if y is None else dense("residual.y", y)
    total = x if y is None else empty("residual", x.shape, x.dtype, x.device)
    normal, unit = total, None
    if scale is not None:
        dtype = torch.float8_e4m3fn if eight_bits else x.dtype
        normal = empty("norm", x.shape, dtype, x.device)
    if eight_bits:
        unit = empty("norm.scale", (batch, tokens, 1), torch.float32, x.device)
    gate, scale, shift = (
        None if t is None else t if t.stride(2) == 1 else dense(f"norm.{name}", t)
        for name, t in (("gate", gate), ("factor", scale), ("shift", shift))
    )

    def per_frame(vector: Tensor | None) -> tuple[int, int, int]:
        """Tokens a frame, and how far apart batch items and frames lie; a frame of one stands still."""
        if vector is None:
            return 1, 0, 0
        return tokens // vector.shape[1], vector.stride(0), vector.stride(1)

    with torch.cuda.device_of(x):
        _residual_norm[(tokens, batch)](
            x, y, gate, scale, shift, total, normal, unit,
            *per_frame(gate), *per_frame(scale), *per_frame(shift), eps, FP8_MAX, SMALLEST,
            C=width, BLOCK=power_of_2(width), PLUS_ONE=plus_one,
            num_warps=warps_for(width),
        )  # fmt: skip
    return total, normal if unit is None else Rows8(normal, unit)


def modulated_norm(
    x: Tensor, scale: Tensor, shift: Tensor, plus_one: bool, eps: float, eight_bits: bool
) -> Tensor | Rows8:
    """See `api.modulated_norm`."""
    return gated_residual_norm(x, None, None, scale, shift, plus_one, eps, eight_bits)[1]


def gated_residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """See `api.gated_residual`."""
    return gated_residual_norm(x, y, gate, None, None, True, 0.0)[0]


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """x [B, N, C], weight [C] -> [B, N, C] in `dtype`, default x's; contiguous."""
    batch, tokens, width = x.shape
    x = x if x.stride(2) == 1 else dense("rms_norm.x", x)
    out = empty("rms_norm", x.shape, dtype or x.dtype, x.device)
    with torch.cuda.device_of(x):
        _rms_norm[(tokens, batch)](
            x, dense("rms_norm.weight", weight), out, *x.stride()[:2], eps,
            C=width, BLOCK=power_of_2(width), num_warps=warps_for(width),
        )  # fmt: skip
    return out


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensor:
    """See `api.merge_attention`."""
    out_a, lse_a, out_b, lse_b = (
        dense(f"merge.{place}", x) for place, x in enumerate((out_a, lse_a, out_b, lse_b))
    )
    out = empty("merge", out_a.shape, out_a.dtype, out_a.device)
    count, dim = lse_a.numel(), out_a.shape[-1]
    with torch.cuda.device_of(out_a):
        _merge[(cdiv(count, MERGED_ROWS),)](
            out_a, lse_a, out_b, lse_b, out, count,
            D=dim, ROWS=MERGED_ROWS, D_PAD=power_of_2(dim), num_warps=4,
        )  # fmt: skip
    return out


def quantise_rows(x: Tensor, gelu: bool) -> Rows8:
    """See `api.quantise_rows`."""
    count, width = x.shape
    x = x if x.stride(1) == 1 else dense("quantise.x", x)
    out = empty("quantise", x.shape, torch.float8_e4m3fn, x.device)
    scale = empty("quantise.scale", (count, 1), torch.float32, x.device)
    head = 1 << width.bit_length() - 1  # 8960 is 8192 and 768: as one piece, 16384, it would be half empty
    with torch.cuda.device_of(x):
        _quantise_rows[(count,)](
            x, out, scale, x.stride(0), FP8_MAX, SMALLEST,
            C=width, HEAD=head, TAIL=power_of_2(width - head), GELU=gelu, num_warps=warps_for(head),
        )  # fmt: skip
    return Rows8(out, scale)


def warps_for(width: int) -> int:
    """32 elements a thread, or more where a row is very wide."""
    return min(8, max(1, power_of_2(width) // 1024))


@triton.jit(do_not_specialize=["gate_tokens", "scale_tokens", "shift_tokens"])
def _residual_norm(
    x, y, gate, scale, shift, total, normal, unit,
    gate_tokens, gate_b, gate_f, scale_tokens, scale_b, scale_f, shift_tokens, shift_b, shift_f, eps,
    largest, smallest, C: tl.constexpr, BLOCK: tl.constexpr, PLUS_ONE: tl.constexpr,
):  # fmt: skip
    token, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    keep = cols < C
    row = (b * tl.num_programs(0) + token) * C + cols
    value = tl.load(x + row, mask=keep, other=0.0).to(tl.float32)
    if y is not None:
        branch = tl.load(y + row, mask=keep, other=0.0).to(tl.float32)
        if gate is not None:
            at = b * gate_b + (token // gate_tokens).to(tl.int64) * gate_f + cols
            branch *= tl.load(gate + at, mask=keep, other=0.0).to(tl.float32)
        stored = (value + branch).to(total.dtype.element_ty)
        tl.store(total + row, stored, mask=keep)
        value = stored.to(tl.float32)  # what later layers will read
    if scale is not None:
        centred = tl.where(keep, value - tl.sum(value, axis=0) / C, 0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / C + eps)
        at = b * scale_b + (token // scale_tokens).to(tl.int64) * scale_f + cols
        factor = tl.load(scale + at, mask=keep, other=0.0).to(tl.float32)
        if PLUS_ONE:
            factor += 1.0
        at = b * shift_b + (token // shift_tokens).to(tl.int64) * shift_f + cols
        offset = tl.load(shift + at, mask=keep, other=0.0).to(tl.float32)
        value = centred * inverse * factor + offset  # 0 behind the row's end
        if unit is not None:
            rounded, row_unit = _in_8_bits(value, largest, smallest)
            tl.store(normal + row, rounded, mask=keep)
            tl.store(unit + b * tl.num_programs(0) + token, row_unit)
        else:
            tl.store(normal + row, value.to(normal.dtype.element_ty), mask=keep)


@triton.jit
def _rms_norm(x, weight, out, x_b, x_n, eps, C: tl.constexpr, BLOCK: tl.constexpr):
    token, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    keep = cols < C
    value = tl.load(x + b * x_b + token * x_n + cols, mask=keep, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / C + eps)
    factor = tl.load(weight + cols, mask=keep, other=0.0).to(tl.float32)
    at = (b * tl.num_programs(0) + token) * C + cols
    tl.store(out + at, (value * inverse * factor).to(out.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["count"])
def _merge(out_a, lse_a, out_b, lse_b, out, count, D: tl.constexpr, ROWS: tl.constexpr, D_PAD: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, D_PAD)
    a = tl.load(lse_a + rows, mask=rows < count, other=float("-inf"))
    b = tl.load(lse_b + rows, mask=rows < count, other=float("-inf"))
    top = tl.maximum(a, b)
    top = tl.where(top == float("-inf"), 0.0, top)
    a, b = tl.exp(a - top), tl.exp(b - top)
    total = a + b
    total = tl.where(total == 0.0, 1.0, total)
    at = rows[:, None] * D + dims[None, :]
    keep = (rows < count)[:, None] & (dims < D)[None, :]
    tile_a = tl.load(out_a + at, mask=keep, other=0.0).to(tl.float32) * (a / total)[:, None]
    tile_b = tl.load(out_b + at, mask=keep, other=0.0).to(tl.float32) * (b / total)[:, None]
    tl.store(out + at, (tile_a + tile_b).to(out.dtype.element_ty), mask=keep)


@triton.jit
def _in_8_bits(value, largest, smallest):
    """A row as float8_e4m3fn, and its scale."""
    unit = tl.maximum(tl.max(tl.abs(value), axis=0), smallest) / largest
    return to_8_bits(value, unit, largest), unit


@triton.jit
def to_8_bits(value, unit, largest):
    """Numbers in float8_e4m3fn, as multiples of `unit`: one division for all of them."""
    return tl.minimum(tl.maximum(value * (1.0 / unit), -largest), largest).to(tl.float8e4nv)


@triton.jit
def _piece(start, cols, keep, GELU: tl.constexpr):
    value = tl.load(start + cols, mask=keep, other=0.0).to(tl.float32)
    if GELU:  # 0.5 v (1 + tanh(u)) is v * sigmoid(2 u)
        inner = 1.5957691216057308 * (value + 0.044715 * value * value * value)
        value = value / (1.0 + tl.exp(-inner))
    return value


@triton.jit
def _quantise_rows(
    x, out, scale, x_n, largest, smallest,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    """A row in two pieces, of HEAD elements and of at most TAIL, powers of 2; TAIL 0: in one."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, HEAD)
    value = _piece(x + row * x_n, cols, cols < C, GELU)
    most = tl.max(tl.abs(value), axis=0)
    if TAIL > 0:
        rest = HEAD + tl.arange(0, TAIL)
        value_of_rest = _piece(x + row * x_n, rest, rest < C, GELU)
        most = tl.maximum(most, tl.max(tl.abs(value_of_rest), axis=0))
    unit = tl.maximum(most, smallest) / largest
    tl.store(out + row * C + cols, to_8_bits(value, unit, largest))
    if TAIL > 0:
        tl.store(out + row * C + rest, to_8_bits(value_of_rest, unit, largest), mask=rest < C)
    tl.store(scale + row, unit)
