"""Backward PBSA: query gradients over the forward lists, page gradients over the transposed lists; no atomics.

With w = exp(s - lse) the softmax's weights, as the forward saved them in lse:

    ds = w * (dO v^T - delta),  delta = rowsum(O * dO) - dlse
    dQ = scale * ds K           a program owns a tile of query rows and walks its list, like the forward
    dK = scale * ds^T Q         a program owns a tile of one page and walks the query blocks that read the page
    dV = w^T dO

Every sum is taken by one program in a fixed order: equal inputs give equal bits. The transposed lists are built on the
device. Products as in `forward`; ds and w are rounded to the inputs' dtype before their products. Letters as in `api`,
and NC: pages that want a gradient.

On Hopper `overlapped_backward` computes the same for blocks of 128 with a list each, where it passes a self-test.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...sizes import cdiv, power_of_2
from .. import reference
from .forward import PADDING, precision, unit_rows
from .primitives import load_rows, store_rows
from .variants import OVERLAPPED_128, Shape, logger, shape_of, small_problem


@dataclass(frozen=True)
class Tile:
    """Query rows and keys of one step, both dividing T; warps and stages of the launch."""

    rows: int
    keys: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        return {"ROWS": self.rows, "KEYS": self.keys, "num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Overlapped:
    """Instead of tiles: the kernels of `overlapped_backward`, and how many steps' tiles each holds."""

    query_stages: int
    page_stages: int


def tiles_for(capability: tuple[int, int], dtype: torch.dtype, tokens: int) -> tuple[Tile, Tile]:
    """The tiles of the query and of the page kernel: they compile without spills of note, and fit shared memory.

    Hopper and the large Blackwell have 227 KiB of it a program, Ampere's A100 163, everything else 99.
    """
    if dtype == torch.float32:
        small = Tile(min(tokens, 32), min(tokens, 32), 4, 1)
        return small, small
    side = min(tokens, 64)
    if side == 64 and capability[0] in (9, 10):
        return Tile(64, 64, 4, 3), Tile(64, 64, 4, 2)
    return Tile(side, side, 4, 3), Tile(side, side, 8 if side == 64 else 4, 2)


OVERLAPPED = Overlapped(query_stages=4, page_stages=4)
READERS_TILE = {"LISTS": 64, "STEP": 32, "num_warps": 4}
_overlaps: dict[tuple[Shape, torch.device], bool] = {}


def backward(
    grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, q: Tensor, k_pages: Tensor, v_pages: Tensor,
    page_len: Tensor, idx: Tensor, cnt: Tensor, targets: Tensor | None, scale: float, padding: str,
):  # fmt: skip
    """`launch` with what suits the device."""
    shape = shape_of(q, k_pages, v_pages, cnt, padding)
    how = OVERLAPPED if overlaps(shape, q.device) else tiles_for(shape.capability, q.dtype, q.shape[2])
    rest = q, k_pages, v_pages, page_len, idx, cnt, targets, scale, padding
    return launch(how, grad_out, grad_lse, out, lse, *rest)


def overlaps(shape: Shape, device: torch.device) -> bool:
    """Whether the kernels of `overlapped_backward` serve a call. The first of a kind tests them, which waits for the
    device; while a CUDA graph is captured, what was not tested is not used."""
    if shape.shared or not OVERLAPPED_128.wants(shape):
        return False
    if (shape, device) not in _overlaps:
        if torch.cuda.is_current_stream_capturing():
            return False
        _overlaps[shape, device] = passes_self_test(shape, device)
    return _overlaps[shape, device]


def passes_self_test(shape: Shape, device: torch.device) -> bool:
    """Whether they compile here and agree with the pointer kernels on a small problem; logs when they do not."""
    q, k, v, page_len, idx, cnt = small_problem(shape, device)
    scale = shape.dim**-0.5
    out, lse = reference.attention(q.float(), k.float(), v.float(), page_len, idx, cnt, scale)
    grad_out, rounded = 1 - out.to(q.dtype), out.to(q.dtype)
    targets = torch.arange(k.shape[1], dtype=torch.int32, device=device).flip(0).expand(len(q), -1)

    def gradients(how: tuple[Tile, Tile] | Overlapped) -> tuple[Tensor, Tensor, Tensor]:
        grads = grad_out, torch.ones_like(lse), rounded, lse
        return launch(how, *grads, q, k, v, page_len, idx, cnt, targets, scale, shape.padding)

    try:
        pairs = zip(
            gradients(OVERLAPPED),
            gradients(tiles_for(shape.capability, shape.dtype, shape.tokens)),
            strict=True,
        )
        error = max(float((a.float() - b.float()).abs().max() / b.float().std()) for a, b in pairs)
    except Exception as failure:  # whatever a compiler or a launch raises: the pointer kernels work
        logger.warning("PBSA backward: overlapped is not used: %s: %s", type(failure).__name__, failure)
        return False
    if not error <= 0.1:  # NaN fails too; roundings are below .03, and a wrong tile is off by far more
        logger.warning("PBSA backward: overlapped is not used: its self-test is off by %.3g", error)
        return False
    logger.info("PBSA backward: overlapped for %s", shape)
    return True


def launch(
    how: tuple[Tile, Tile] | Overlapped,
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_len: Tensor,
    idx: Tensor,
    cnt: Tensor,
    targets: Tensor | None,
    scale: float,
    padding: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `api.pbsa_attention`; idx [G, NR, M], cnt [G, NR], targets [G, NC] int32 slots or None.

    -> dq like q; dk, dv [G, NC, T, D] of the target pages (empty without targets).
    """
    groups, blocks, tokens, dim = q.shape
    slots, lists = k_pages.shape[1], cnt.shape[1]
    count = 0 if targets is None else targets.shape[1]
    k_pages, v_pages = unit_rows(k_pages), unit_rows(v_pages)
    page_len, idx, cnt, grad_out = (x.contiguous() for x in (page_len, idx, cnt, grad_out))
    scales = scale, scale * math.log2(math.e)
    dim_pad = power_of_2(dim)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty((groups, count, tokens, dim), dtype=q.dtype, device=q.device) for _ in range(2))
    delta, row_lse = (torch.empty(lse.shape, dtype=lse.dtype, device=lse.device) for _ in range(2))
    constants: dict[str, int | str] = {"D": dim, "PADDING": PADDING[padding]}
    if isinstance(how, Overlapped):
        from . import overlapped_backward
        from .overlapped import described

        tensors = q.contiguous(), k_pages, v_pages
        inputs, grads = [described(x, 64) for x in tensors], described(grad_out, 64)
        apart = [x.stride(0) // dim for x in tensors]
        unit, tiles = 1 / scale, []
        on_queries = partial(
            overlapped_backward.queries[(lists, groups)], STAGES=how.query_stages, num_warps=4
        )
        on_pages = partial(overlapped_backward.pages[(count, groups)], STAGES=how.page_stages, num_warps=4)
    else:
        query_tile, page_tile = how
        inputs, grads = [unit_rows(q), k_pages, v_pages], grad_out
        apart = [stride for x in inputs for stride in x.stride()[:3]]
        unit = math.log2(math.e)
        list_rows = blocks // lists * tokens  # query rows that one list serves
        tiles = [cdiv(list_rows, query_tile.rows), list_rows]
        constants |= {"T": tokens, "D_PAD": dim_pad, "PRECISION": precision(q.dtype)}
        on_queries = partial(backward_queries[(lists * tiles[0], groups)], **query_tile.options())
        on_pages = partial(
            backward_pages[(count * (tokens // page_tile.keys), groups)], **page_tile.options()
        )
    with torch.cuda.device_of(q):
        _delta[(cdiv(lse.numel(), 32),)](
            out.contiguous(), grad_out, lse.contiguous(), grad_lse.contiguous(), delta, row_lse, lse.numel(), unit,
            D=dim, D_PAD=dim_pad, ROWS=32, num_warps=4,
        )  # fmt: skip
        with _forked(q.device, count > 0) as aside:
            with aside:
                on_queries(
                    *inputs, page_len, idx, cnt, grads, row_lse, delta, dq, *apart, *tiles, lists, idx.shape[2], slots,
                    *scales, **constants,
                )  # fmt: skip
            if targets is not None and count > 0:
                targets = targets.contiguous()
                readers = transpose_lists(idx, cnt, targets, blocks)
                on_pages(
                    *inputs, page_len, targets, *readers, grads, row_lse, delta, dk, dv, *apart, count, blocks, slots,
                    *scales, **constants,
                )  # fmt: skip
    return dq, dk, dv


@contextmanager
def _forked(device: torch.device, wanted: bool) -> Iterator[AbstractContextManager]:
    """Yields a context whose launches run beside those that follow it; at the end both are waited for, on the device.

    The query kernel's last programs leave multiprocessors idle; the page kernel's need nothing of it, and fill them.
    """
    if not wanted or device.type != "cuda":
        yield nullcontext()
        return
    here, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(here)
    yield torch.cuda.stream(side)
    here.wait_stream(side)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def transpose_lists(idx: Tensor, cnt: Tensor, targets: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """For each target page the query blocks that read it, ascending: readers [G, NC, NQ], their number [G, NC], int32.

    idx [G, NR, M], cnt [G, NR], targets [G, NC] slots, all contiguous. What follows a page's readers is not written.
    """
    groups, lists, longest = idx.shape
    count = targets.shape[1]
    readers = torch.empty((groups, count, blocks), dtype=torch.int32, device=idx.device)
    reader_cnt = torch.empty((groups, count), dtype=torch.int32, device=idx.device)
    with torch.cuda.device_of(idx):
        find_readers[(count, groups)](
            idx, cnt, targets, readers, reader_cnt, lists, longest, blocks // lists, **READERS_TILE,
        )  # fmt: skip
    return readers, reader_cnt


@triton.jit(do_not_specialize=["num_lists", "longest", "shared_by"])
def find_readers(
    idx,
    cnt,
    targets,
    readers,
    reader_cnt,
    num_lists,
    longest,
    shared_by,
    LISTS: tl.constexpr,
    STEP: tl.constexpr,
):
    """One target page: LISTS lists at a time are searched for it, STEP entries at a time."""
    g = tl.program_id(1).to(tl.int64)
    target = g * tl.num_programs(0) + tl.program_id(0)
    slot = tl.load(targets + target)
    own = readers + target * num_lists * shared_by
    count = 0
    for first in range(0, num_lists, LISTS):
        which = first + tl.arange(0, LISTS)
        row = g * num_lists + which
        listed = tl.load(cnt + row, mask=which < num_lists, other=0)
        reads = tl.zeros((LISTS,), tl.int32)
        for begin in range(0, tl.max(listed, axis=0), STEP):
            entry = begin + tl.arange(0, STEP)
            inside = entry[None, :] < listed[:, None]
            found = tl.load(idx + row[:, None] * longest + entry[None, :], mask=inside, other=-1)
            reads = tl.maximum(reads, tl.max((found == slot).to(tl.int32), axis=1))
        rank = count + tl.cumsum(reads, axis=0) - 1
        for block in range(shared_by):  # a list is every block's that it serves
            tl.store(own + rank * shared_by + block, which * shared_by + block, mask=reads > 0)
        count += tl.sum(reads, axis=0)
    tl.store(reader_cnt + target, count * shared_by)


@triton.jit(do_not_specialize=["num_rows"])
def _delta(
    out, grad_out, lse, grad_lse, delta, lse_in_units, num_rows, unit,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(out * grad_out) - grad_lse, and lse * unit: +inf where nothing is kept, so that w is 0."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    keep = row < num_rows
    o = load_rows(out, row * D, keep, D, D_PAD, True).to(tl.float32)
    do = load_rows(grad_out, row * D, keep, D, D_PAD, True).to(tl.float32)
    row_lse = tl.load(lse + row, mask=keep, other=0.0)
    some = row_lse != float("-inf")
    row_delta = tl.sum(o * do, axis=1) - tl.load(grad_lse + row, mask=keep, other=0.0)
    tl.store(delta + row, tl.where(some, row_delta, 0.0), mask=keep)
    tl.store(lse_in_units + row, tl.where(some, row_lse * unit, float("inf")), mask=keep)


@triton.jit(do_not_specialize=["tiles", "list_rows", "num_lists", "longest", "num_slots"])
def backward_queries(
    q, k, v, page_len, idx, cnt, grad_out, lse_log2, delta, dq,
    q_g, q_n, q_t, k_g, k_s, k_t, v_g, v_s, v_t,
    tiles, list_rows, num_lists, longest, num_slots, scale, scale_log2,
    T: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PADDING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles of ROWS query rows, ROWS and KEYS dividing T."""
    g = tl.program_id(1).to(tl.int64)
    which = tl.program_id(0) // tiles
    rows = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    keep = rows < list_rows
    row = which * list_rows + rows
    q_at = (row // T).to(tl.int64) * q_n + (row % T).to(tl.int64) * q_t
    row = g * num_lists * list_rows + row  # over all groups
    q_tile = load_rows(q + g * q_g, q_at, keep, D, D_PAD, False)  # [ROWS, D_PAD]
    do_tile = load_rows(grad_out, row * D, keep, D, D_PAD, False)
    row_lse = tl.load(lse_log2 + row)
    row_delta = tl.load(delta + row)

    acc = tl.zeros((ROWS, D_PAD), tl.float32)
    row_of_lists = g * num_lists + which
    pages = idx + row_of_lists * longest
    lens = page_len + g * num_slots
    k += g * k_g
    v += g * v_g
    PARTS: tl.constexpr = T // KEYS
    for i in range(tl.load(cnt + row_of_lists) * PARTS):
        slot = tl.load(pages + i // PARTS).to(tl.int64)
        tokens = (i % PARTS) * KEYS + tl.arange(0, KEYS)
        valid = tokens < T
        if PADDING > 0:
            valid = tokens < tl.load(lens + slot)
        k_tile = load_rows(k + slot * k_s, tokens * k_t, valid, D, D_PAD, PADDING == 2)  # [KEYS, D_PAD]
        v_tile = load_rows(v + slot * v_s, tokens * v_t, valid, D, D_PAD, PADDING == 2)
        acc = _add_keys(
            q_tile, do_tile, k_tile, v_tile, row_lse, row_delta, valid, acc, scale_log2, PADDING > 0, PRECISION
        )  # fmt: skip
    store_rows(dq, row * D, acc * scale, keep, D, D_PAD)


@triton.jit
def _add_keys(
    q_tile, do_tile, k_tile, v_tile, row_lse, row_delta, valid, acc, scale_log2,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [ROWS, D_PAD] with what the keys of these tiles [KEYS, D_PAD] add to dQ / scale."""
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    weights = tl.exp2(scores * scale_log2 - row_lse[:, None])
    if MASK:
        weights = tl.where(valid[None, :], weights, 0.0)
    ds = weights * (tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION) - row_delta[:, None])
    return tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["num_targets", "blocks", "num_slots"])
def backward_pages(
    q, k, v, page_len, targets, readers, reader_cnt, grad_out, lse_log2, delta, dk, dv,
    q_g, q_n, q_t, k_g, k_s, k_t, v_g, v_s, v_t,
    num_targets, blocks, num_slots, scale, scale_log2,
    T: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PADDING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles of KEYS tokens of one target page, ROWS and KEYS dividing T. Scores stand transposed: [KEYS, ROWS]."""
    g = tl.program_id(1).to(tl.int64)
    PARTS: tl.constexpr = T // KEYS
    target = g * num_targets + tl.program_id(0) // PARTS
    tokens = (tl.program_id(0) % PARTS) * KEYS + tl.arange(0, KEYS)
    slot = tl.load(targets + target).to(tl.int64)
    valid = tokens < T
    if PADDING > 0:
        valid = tokens < tl.load(page_len + g * num_slots + slot)
    k_tile = load_rows(k + g * k_g + slot * k_s, tokens * k_t, valid, D, D_PAD, PADDING == 2)  # [KEYS, D_PAD]
    v_tile = load_rows(v + g * v_g + slot * v_s, tokens * v_t, valid, D, D_PAD, PADDING == 2)

    dk_acc = tl.zeros((KEYS, D_PAD), tl.float32)
    dv_acc = tl.zeros((KEYS, D_PAD), tl.float32)
    q += g * q_g
    STEPS: tl.constexpr = T // ROWS  # a query block is read in pieces of ROWS rows
    in_piece = tl.arange(0, ROWS)
    for i in range(tl.load(reader_cnt + target) * STEPS):
        n = tl.load(readers + target * blocks + i // STEPS).to(tl.int64)
        rows = (i % STEPS) * ROWS + in_piece
        first = (g * blocks + n) * T  # the block's first row, over all groups
        q_tile = load_rows(q + n * q_n, rows * q_t, rows < T, D, D_PAD, False)  # [ROWS, D_PAD]
        do_tile = load_rows(grad_out + first * D, rows * D, rows < T, D, D_PAD, False)
        dk_acc, dv_acc = _add_queries(
            q_tile, do_tile, k_tile, v_tile, lse_log2 + first + rows, delta + first + rows, valid, dk_acc, dv_acc,
            scale_log2, PADDING > 0, PRECISION,
        )  # fmt: skip
    at = (target * T + tokens) * D
    keep = tokens < T
    store_rows(dk, at, dk_acc * scale, keep, D, D_PAD)
    store_rows(dv, at, dv_acc, keep, D, D_PAD)


@triton.jit
def _add_queries(
    q_tile, do_tile, k_tile, v_tile, lse_log2, delta, valid, dk_acc, dv_acc, scale_log2,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK / scale and dV [KEYS, D_PAD] with what the query rows of these tiles [ROWS, D_PAD] add to them.

    lse_log2, delta: where the rows' are [ROWS], read where they are used.
    """
    scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
    weights = tl.exp2(scores * scale_log2 - tl.load(lse_log2)[None, :])
    if MASK:
        weights = tl.where(valid[:, None], weights, 0.0)
    dv_acc = tl.dot(weights.to(do_tile.dtype), do_tile, dv_acc, input_precision=PRECISION)
    dw = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)
    ds = weights * (dw - tl.load(delta)[None, :])
    return tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision=PRECISION), dv_acc
