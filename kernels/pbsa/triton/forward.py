"""Forward PBSA: one program takes a tile of query rows that share a list, and walks that list of pages.

One program a tile, the tiles of one group following one another, so that the programs running together read one group's
pages from L2. Products take the inputs' dtype (float32 in full precision, no TF32) and accumulate in float32, like the
base-2 online softmax; the weights are rounded to v's dtype before their product with v.

Three kernels compute the same. `forward_pointers` runs everywhere: masked rows, any strides, pages smaller than a step.
`forward_descriptors` lets Hopper's copy engine fetch whole tiles, and can keep loading warps apart from computing
ones. `overlapped.forward_overlapped` also computes products under the softmax. `variants` says which is used, with
which tile.

The last wave of programs seldom fills the device: 444 tiles on 132 multiprocessors take as long as 528. So the tiles
of that wave divide their lists among several programs each, and `merge` adds up what these found. Letters as in `api`.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...sizes import cdiv, power_of_2
from ...workspace import dense, empty
from ..reference import NO_GAP
from .primitives import described_rows, load_rows, softmax_step, store_rows
from .variants import Variant

PADDING = {"none": 0, "finite": 1, "any": 2}  # the kernels' PADDING; see `api.pbsa_attention`


class Split(NamedTuple):
    """Tiles from `whole` on divide their lists among `parts` programs each."""

    whole: int
    parts: int


@functools.cache
def plan_split(tiles: int, resident: int, longest: int) -> Split:
    """How to spread the last wave when `resident` programs run at a time and no list is longer than `longest` pages.

    Costs are in units of a tile's time. A part reads 8 pages or more, and costs about 0.04 beyond its share.
    """
    tail = tiles % resident if resident else 0
    if tail == 0 or tiles > 8 * resident:  # nothing to win, or little
        return Split(tiles, 1)
    most = min(8, longest // 8)
    cost = {parts: math.ceil(tail * parts / resident) / parts + 0.04 * parts for parts in range(2, most + 1)}
    best = min(cost, key=cost.__getitem__, default=1)
    return Split(tiles - tail, best) if cost.get(best, 1.0) < 0.9 else Split(tiles, 1)


def launch(
    variant: Variant,
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_len: Tensor,
    idx: Tensor,
    cnt: Tensor,
    scale: float,
    padding: str,
    floor: int = 0,
    split: Split | None = None,
    gap: tuple[int, int] = NO_GAP,
) -> tuple[Tensor, Tensor]:
    """`api.pbsa_attention` by one variant, which must fit the call; idx [G, NR, M], cnt [G, NR].

    floor: of `floor_of`. split: of the last wave; None lets the device decide.
    """
    groups, blocks, tokens, dim = q.shape
    if scale <= 0:  # the kernels take the maximum before they scale
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    described = variant.kind != "pointers"
    q = dense("attention.q", q) if described else unit_rows(q, "attention.q")
    k_pages, v_pages = unit_rows(k_pages, "attention.k"), unit_rows(v_pages, "attention.v")
    page_len, idx, cnt = (
        dense(f"attention.{name}", x) for name, x in (("page_len", page_len), ("idx", idx), ("cnt", cnt))
    )
    lists = cnt.shape[1]
    list_rows = blocks // lists * tokens  # query rows that one list serves
    tiles = cdiv(list_rows, variant.rows)  # of one list
    every_tile = groups * lists * tiles
    if split is None:
        resident = multiprocessors(q.device) * variant.residents
        split = plan_split(every_tile, resident, idx.shape[2])
    split_tiles = every_tile - split.whole
    rows = groups * blocks * tokens
    # parts after the first leave what they found behind the last row
    rows_and_parts = rows + split_tiles * (split.parts - 1) * variant.rows
    out = empty("attention", (rows_and_parts, dim), q.dtype, q.device)
    lse = empty("attention.lse", (rows_and_parts,), torch.float32, q.device)
    programs = split.whole + split_tiles * split.parts
    counts = *split, rows, tiles, list_rows, lists, idx.shape[2], page_len.shape[1], *gap
    sizes = *counts, scale * math.log2(math.e)
    constants = {
        "T": tokens,
        "D": dim,
        "PADDING": PADDING[padding],
        "FLOOR": floor,
        "num_warps": variant.warps,
    }
    with torch.cuda.device_of(q):
        if variant.kind == "overlapped":
            _launch_overlapped(
                variant, programs, (q, k_pages, v_pages), (page_len, idx, cnt, out, lse), sizes, constants
            )
        else:
            kernel = forward_pointers
            if described:
                triton.set_allocator(scratch)
                kernel, constants["SPECIALISE"] = forward_descriptors, variant.kind == "specialised"
            kernel[(programs,)](
                q, k_pages, v_pages, page_len, idx, cnt, out, lse,
                *q.stride()[:3], *k_pages.stride()[:3], *v_pages.stride()[:3], *sizes,
                D_PAD=power_of_2(dim), ROWS=variant.rows, KEYS=variant.keys,
                PRECISION=precision(q.dtype), num_stages=variant.stages, **constants,
            )  # fmt: skip
        if split_tiles and split.parts > 1:
            merge[(split_tiles,)](
                out, lse, *split, rows, tiles, list_rows, lists,
                D=dim, D_PAD=power_of_2(dim), ROWS=variant.rows, num_warps=8,
            )  # fmt: skip
    return out[:rows].view(q.shape), lse[:rows].view(q.shape[:3])


def _launch_overlapped(
    variant: Variant,
    programs: int,
    tensors: tuple[Tensor, Tensor, Tensor],
    others: tuple[Tensor, ...],
    sizes: tuple,
    constants: dict[str, Any],
) -> None:
    """Programs for that many tiles and parts of tiles; tensors: q, k and v."""
    from .overlapped import described, forward_overlapped

    shared = variant.rows == 128  # a list for both warp groups
    views = (described(x, rows) for x, rows in zip(tensors, (64, variant.keys, variant.keys), strict=True))
    forward_overlapped[(programs if shared else cdiv(programs, 2),)](
        *views, *others, *(x.stride(0) // x.shape[-1] for x in tensors), *sizes, programs,
        SHARED=shared, STAGES=variant.stages, **constants,
    )  # fmt: skip


def floor_of(least_tokens: int, padding: str) -> int:
    """Rows of a page that need no mask, by `api.pbsa_attention`'s promise; whole eights, as threads hold columns."""
    return least_tokens // 8 * 8 if padding == "finite" else 0


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many the device has; 0 where programs do not run side by side."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def unit_rows(x: Tensor, name: str = "rows") -> Tensor:
    """x with the elements of a row side by side; copied only if they are not, to the workspace's buffer `name`."""
    return x if x.stride(-1) == 1 else dense(name, x)


def precision(dtype: torch.dtype) -> str:
    """How a product of float32 tiles is computed; without a meaning for shorter types."""
    return "ieee" if dtype == torch.float32 else "tf32"


def scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the descriptors that a launch writes."""
    return empty("descriptors", (size,), torch.int8, torch.device("cuda", torch.cuda.current_device()))


# Counts follow a call's lengths: specialising on them would compile anew as a video grows. Strides stay specialised:
# that they are multiples of 16 must be known, or no load is wider than an element and none runs ahead of its use.
RUN_TIME = [
    "whole", "parts", "num_rows", "tiles", "list_rows", "num_lists", "longest", "num_slots", "first", "behind",
]  # fmt: skip


@triton.jit
def _locate(whole, parts, tiles, num_lists):
    """Of this program: tile over all groups, group, list, tile of the list, part, and number of parts."""
    program = tl.program_id(0)
    after = tl.maximum(program - whole, 0)
    alone = program < whole
    tile = tl.where(alone, program, whole + after // parts)
    part = tl.where(alone, 0, after % parts)
    share = tl.where(alone, 1, parts)
    return tile, tile // (num_lists * tiles), tile // tiles % num_lists, tile % tiles, part, share


@triton.jit
def _own_pages(idx, cnt, row_of_lists, longest, part, share):
    """Where a program's part of a list begins, and how many pages it has."""
    listed = tl.load(cnt + row_of_lists)
    begin = listed * part // share
    return idx + row_of_lists * longest + begin, listed * (part + 1) // share - begin


@triton.jit
def _own_rows(tile, part, parts, whole, num_rows, row, ROWS: tl.constexpr):
    """Where a program leaves its rows: at `row`, or behind the last row for the parts after a tile's first."""
    behind = num_rows + ((tile - whole).to(tl.int64) * (parts - 1) + part - 1) * ROWS + tl.arange(0, ROWS)
    return tl.where(part > 0, behind, row)


@triton.jit
def _page(slot, first, behind):
    """Where a slot's page lies: see `gap` of `api.pbsa_attention`."""
    return slot + tl.where(slot >= first, behind, 0)


@triton.jit
def _valid(tokens, length, FLOOR: tl.constexpr):
    """Which of these tokens a page holds. Of those below FLOOR the compiler knows, and drops their masks."""
    valid = tokens < tl.load(length)
    if FLOOR > 0:
        valid |= tokens < FLOOR
    return valid


@triton.jit
def _attend_keys(
    q_tile, k, k_at, v, v_at, valid, acc, top, mass, scale_log2,
    D: tl.constexpr, D_PAD: tl.constexpr, MASK: tl.constexpr, MASK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take the rows of k and v at these offsets [KEYS] into a running attention -> its new acc, top and mass.

    MASK: only those that `valid` [KEYS] names; MASK_V: and the others' values are not even read.
    """
    k_tile = load_rows(k, k_at, valid, D, D_PAD, False)  # [KEYS, D_PAD]
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    if MASK:
        scores = tl.where(valid[None, :], scores, float("-inf"))
    weights, factor, top, mass = softmax_step(scores, top, mass, scale_log2)
    v_tile = load_rows(v, v_at, valid, D, D_PAD, MASK_V)
    acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * factor[:, None], input_precision=PRECISION)
    return acc, top, mass


@triton.jit(do_not_specialize=RUN_TIME)
def forward_pointers(
    q, k, v, page_len, idx, cnt, out, lse,
    q_g, q_n, q_t, k_g, k_s, k_t, v_g, v_s, v_t,
    whole, parts, num_rows, tiles, list_rows, num_lists, longest, num_slots, first, behind, scale_log2,
    T: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PADDING: tl.constexpr, FLOOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, g, which, in_list, part, share = _locate(whole, parts, tiles, num_lists)
    g = g.to(tl.int64)
    rows = in_list * ROWS + tl.arange(0, ROWS)  # within the list's rows
    keep = rows < list_rows
    row = which * list_rows + rows  # within the group
    q_at = (row // T).to(tl.int64) * q_n + (row % T).to(tl.int64) * q_t
    q_tile = load_rows(q + g * q_g, q_at, keep, D, D_PAD, True)  # [ROWS, D_PAD]

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, D_PAD), tl.float32)
    pages, count = _own_pages(idx, cnt, g * num_lists + which, longest, part, share)
    lens = page_len + g * num_slots
    k += g * k_g
    v += g * v_g
    keys = tl.arange(0, KEYS)
    if KEYS <= T:
        PARTS: tl.constexpr = T // KEYS  # a page is read in pieces of KEYS tokens
        for i in range(count * PARTS):
            if PARTS == 1:
                slot = tl.load(pages + i).to(tl.int64)
                tokens = keys
            else:
                slot = tl.load(pages + i // PARTS).to(tl.int64)
                tokens = (i % PARTS) * KEYS + keys
            valid = tokens < T
            if PADDING > 0:
                valid = _valid(tokens, lens + slot, FLOOR if PARTS == 1 else 0)
            page = _page(slot, first, behind)
            acc, top, mass = _attend_keys(
                q_tile, k + page * k_s, tokens * k_t, v + page * v_s, tokens * v_t, valid, acc, top, mass, scale_log2,
                D, D_PAD, PADDING > 0, PADDING == 2, PRECISION,
            )  # fmt: skip
    else:
        STEP: tl.constexpr = KEYS // T  # pages read at once; the last step may repeat the last page, masked
        tokens = keys % T
        for i in range(tl.cdiv(count, STEP)):
            entry = i * STEP + keys // T
            slot = tl.load(pages + tl.minimum(entry, count - 1)).to(tl.int64)  # [KEYS]
            valid = entry < count
            if PADDING > 0:
                valid &= tokens < tl.load(lens + slot)
            page = _page(slot, first, behind)
            acc, top, mass = _attend_keys(
                q_tile, k, page * k_s + tokens * k_t, v, page * v_s + tokens * v_t, valid, acc, top, mass, scale_log2,
                D, D_PAD, True, PADDING == 2, PRECISION,
            )  # fmt: skip
    row = _own_rows(tile, part, parts, whole, num_rows, g * num_lists * list_rows + row, ROWS)
    _finish(out, lse, acc, top, mass, row, keep, D, D_PAD)


@triton.jit(do_not_specialize=RUN_TIME)
def forward_descriptors(
    q, k, v, page_len, idx, cnt, out, lse,
    q_g, q_n, q_t, k_g, k_s, k_t, v_g, v_s, v_t,
    whole, parts, num_rows, tiles, list_rows, num_lists, longest, num_slots, first, behind, scale_log2,
    T: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PADDING: tl.constexpr, FLOOR: tl.constexpr, PRECISION: tl.constexpr, SPECIALISE: tl.constexpr,
):  # fmt: skip
    """Needs q and a group's pages contiguous, D a multiple of 8, KEYS <= T, and numbers behind every page_len."""
    tile, g, which, in_list, part, share = _locate(whole, parts, tiles, num_lists)
    g = g.to(tl.int64)
    begin = in_list * ROWS  # within the list's rows
    q_rows = described_rows(q + g * q_g, num_lists * list_rows, D, D_PAD, ROWS)
    k_rows = described_rows(k + g * k_g, (num_slots + behind) * T, D, D_PAD, KEYS)
    # With warps apart, both products of a step are cut alike: where it has 64 keys and a row 128 dims, v in two halves.
    HALVES: tl.constexpr = SPECIALISE and KEYS < D_PAD
    V_DIMS: tl.constexpr = KEYS if HALVES else D_PAD
    v_rows = described_rows(v + g * v_g, (num_slots + behind) * T, D, V_DIMS, KEYS)
    q_tile = q_rows.load([which * list_rows + begin, 0])  # may run into the next list's rows: not stored

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, V_DIMS), tl.float32)
    if HALVES:
        high = tl.zeros((ROWS, V_DIMS), tl.float32)
    pages, count = _own_pages(idx, cnt, g * num_lists + which, longest, part, share)
    lens = page_len + g * num_slots
    keys = tl.arange(0, KEYS)
    PARTS: tl.constexpr = T // KEYS
    for i in tl.range(0, count * PARTS, warp_specialize=SPECIALISE):
        if PARTS == 1:
            slot = tl.load(pages + i)
            token = 0
        else:
            slot = tl.load(pages + i // PARTS)
            token = (i % PARTS) * KEYS
        at = _page(slot, first, behind) * T + token
        k_tile = k_rows.load([at, 0])  # [KEYS, D_PAD]
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        if PADDING > 0:
            valid = _valid(token + keys, lens + slot, FLOOR if PARTS == 1 else 0)
            scores = tl.where(valid[None, :], scores, float("-inf"))
        weights, factor, top, mass = softmax_step(scores, top, mass, scale_log2)
        v_tile = v_rows.load([at, 0])
        weights = weights.to(v_tile.dtype)
        acc = tl.dot(weights, v_tile, acc * factor[:, None], input_precision=PRECISION)
        if HALVES:
            v_high = v_rows.load([at, V_DIMS])
            high = tl.dot(weights, v_high, high * factor[:, None], input_precision=PRECISION)
    rows = begin + tl.arange(0, ROWS)
    row = g * num_lists * list_rows + which * list_rows + rows
    row = _own_rows(tile, part, parts, whole, num_rows, row, ROWS)
    _finish(out, lse, acc, top, mass, row, rows < list_rows, D, V_DIMS)
    if HALVES:
        share_of_one = 1.0 / tl.where(mass == 0.0, 1.0, mass)
        store_rows(out + V_DIMS, row * D, high * share_of_one[:, None], rows < list_rows, D - V_DIMS, V_DIMS)


@triton.jit
def _finish(out, lse, acc, top, mass, row, keep, D: tl.constexpr, D_PAD: tl.constexpr):
    """Divide by the softmax's sum and store; row [ROWS] int64 counts over all groups."""
    safe_mass = tl.where(mass == 0.0, 1.0, mass)
    row_lse = tl.where(mass == 0.0, float("-inf"), (top + tl.log2(safe_mass)) * 0.6931471805599453)  # ln 2
    tl.store(lse + row, row_lse, mask=keep)
    store_rows(out, row * D, acc / safe_mass[:, None], keep, D, D_PAD)


@triton.jit(do_not_specialize=RUN_TIME)
def merge(
    out, lse, whole, parts, num_rows, tiles, list_rows, num_lists,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add up the parts of one tile: each weighs as much as the sum of its softmax, which its lse tells."""
    tile = whole + tl.program_id(0)
    rows = tile % tiles * ROWS + tl.arange(0, ROWS)
    keep = rows < list_rows
    row = (tile // tiles).to(tl.int64) * list_rows + rows
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    for part in range(parts):
        at = _own_rows(tile, part, parts, whole, num_rows, row, ROWS)
        top = tl.maximum(top, tl.load(lse + at, mask=keep, other=float("-inf")))
    top = tl.where(top == float("-inf"), 0.0, top)
    mass = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, D_PAD), tl.float32)
    for part in range(parts):
        at = _own_rows(tile, part, parts, whole, num_rows, row, ROWS)
        weight = tl.exp(tl.load(lse + at, mask=keep, other=float("-inf")) - top)
        mass += weight
        acc += load_rows(out, at * D, keep, D, D_PAD, True).to(tl.float32) * weight[:, None]
    safe_mass = tl.where(mass == 0.0, 1.0, mass)
    tl.store(lse + row, tl.where(mass == 0.0, float("-inf"), top + tl.log(safe_mass)), mask=keep)
    store_rows(out, row * D, acc / safe_mass[:, None], keep, D, D_PAD)
