"""The public face of PBSA: checks what it is given, chooses a backend, hands over.

Letters: G groups (batch x heads, one page table each), NQ query blocks, T tokens a block, D head dim, S page slots of a
group, M longest list, NA and NL pages that a router row always reads and chooses from.
Nothing here reads a value on the device: checks are of shapes, dtypes and devices, so that no call waits for the GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .constraints import Call, backend_report, choose

__all__ = ["BlockLists", "backend_report", "pbsa_attention", "pool_pages", "route"]


class BlockLists(NamedTuple):
    """Which pages each query block reads.

    idx [G, NQ, M] int32: page slots, ascending, each at most once; entries from `cnt` on are padding (any valid slot).
    cnt [G, NQ] int32: how many of them count, 0 to M.
    With NQ = 1 the one list of a group serves all of its query blocks: dense and window attention.
    """

    idx: Tensor
    cnt: Tensor


def pbsa_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_len: Tensor,
    lists: BlockLists,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of query blocks over the pages that their lists name, in one softmax.

    q [G, NQ, T, D]; k_pages, v_pages [G, S, T, D] in q's dtype (float32, float16, bfloat16; float64 by the reference);
    page_len [G, S] int32, the valid tokens at the front of each page: what lies behind them is not read.
    scale: of the scores, default D ** -0.5. backend: auto, reference or triton.

    -> out [G, NQ, T, D] in q's dtype; lse [G, NQ, T] float32 (float64 for float64), natural log of the softmax's sum.
    A list without a valid token gives out 0 and lse -inf. Rows of q past a ragged block's end are computed like others.
    Raises ValueError for shapes, dtypes or devices that do not fit together, RuntimeError with the reason when the
    backend named cannot serve the call.
    """
    _check_attention(q, k_pages, v_pages, page_len, lists)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    idx, cnt = lists
    if idx.shape[2] == 0:  # nobody reads anything; one padding entry keeps every backend free of the case
        idx = idx.new_zeros(*idx.shape[:2], 1)
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_pages, v_pages))
    call = Call("attention", q.device, q.dtype, q.shape[3], block_tokens=q.shape[2], needs_grad=grad)
    match choose(call, backend):
        case "triton":
            from . import triton

            return triton.attention(q, k_pages, v_pages, page_len, idx, cnt, scale)
        case _:
            return reference.attention(q, k_pages, v_pages, page_len, idx, cnt, scale)


def pool_pages(pages: Tensor, page_len: Tensor) -> Tensor:
    """Mean of each page's valid tokens: pages [G, n, T, D], page_len [G, n] -> [G, n, D] float32 (0 if empty)."""
    _expect("pages", pages, "[G, n, T, D]", (None, None, None, None), pages.dtype, pages.device)
    _expect("page_len", page_len, "[G, n]", tuple(pages.shape[:2]), torch.int32, pages.device)
    return reference.pool_pages(pages, page_len)


def route(
    pooled_q: Tensor,
    pooled_k: Tensor,
    always: Tensor,
    local: Tensor,
    k: int,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[BlockLists, Tensor]:
    """Choose the pages of each query block by pooled scores, and weigh the pages (METHOD: local selection, importance).

    pooled_q [G, NQ, D], pooled_k [G, S, D] by slot, float32 (float64 by the reference); always [G, NA], local [G, NL]
    int32 slots, all distinct within a group; k: local pages kept a row, clamped to NL. scale: default D ** -0.5.

    -> lists of all `always` and the row's k best `local` pages, slots ascending (of equal scores the earlier in `local`
    wins), every cnt = NA + min(k, NL); importance [G, NA + NL] in the dtype of the pooled vectors: the sum over query
    blocks of each row's softmax over `always` then `local`. No gradient flows through the choice.
    Raises like `pbsa_attention`.
    """
    _check_route(pooled_q, pooled_k, always, local, k)
    scale = pooled_q.shape[-1] ** -0.5 if scale is None else float(scale)
    keep = min(k, local.shape[1])
    call = Call("route", pooled_q.device, pooled_q.dtype, pooled_q.shape[2], candidates=pooled_k.shape[1])
    with torch.no_grad():
        match choose(call, backend):
            case "triton":
                from . import triton

                idx, importance = triton.route(pooled_q, pooled_k, always, local, keep, scale)
            case _:
                idx, importance = reference.route(pooled_q, pooled_k, always, local, keep, scale)
    cnt = torch.full(idx.shape[:2], idx.shape[2], dtype=torch.int32, device=idx.device)
    return BlockLists(idx, cnt), importance


def _check_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_len: Tensor, lists: BlockLists
) -> None:
    _expect("q", q, "[G, NQ, T, D]", (None, None, None, None), q.dtype, q.device)
    groups, blocks, tokens, dim = q.shape
    _expect("k_pages", k_pages, "[G, S, T, D]", (groups, None, tokens, dim), q.dtype, q.device)
    _expect("v_pages", v_pages, "[G, S, T, D]", tuple(k_pages.shape), q.dtype, q.device)
    _expect("page_len", page_len, "[G, S]", tuple(k_pages.shape[:2]), torch.int32, q.device)
    idx, cnt = lists
    rows = 1 if idx.dim() == 3 and idx.shape[1] == 1 else blocks
    _expect("lists.idx", idx, "[G, NQ or 1, M]", (groups, rows, None), torch.int32, q.device)
    _expect("lists.cnt", cnt, "[G, NQ or 1]", (groups, rows), torch.int32, q.device)


def _check_route(pooled_q: Tensor, pooled_k: Tensor, always: Tensor, local: Tensor, k: int) -> None:
    if pooled_q.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"pooled_q must be float32, as pool_pages gives it, got {pooled_q.dtype}")
    _expect("pooled_q", pooled_q, "[G, NQ, D]", (None, None, None), pooled_q.dtype, pooled_q.device)
    groups, _, dim = pooled_q.shape
    _expect("pooled_k", pooled_k, "[G, S, D]", (groups, None, dim), pooled_q.dtype, pooled_q.device)
    _expect("always", always, "[G, NA]", (groups, None), torch.int32, pooled_q.device)
    _expect("local", local, "[G, NL]", (groups, None), torch.int32, pooled_q.device)
    if always.shape[1] + local.shape[1] == 0:
        raise ValueError("always and local are both empty: the router needs a page to score")
    if not isinstance(k, int) or k < 0:
        raise ValueError(f"k must be a whole number of pages, 0 or more, got {k!r}")


def _expect(
    name: str,
    x: Tensor,
    letters: str,
    shape: tuple[int | None, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raise ValueError unless x has this shape (None: any size), dtype and device."""
    if x.dim() != len(shape) or any(want not in (None, have) for want, have in zip(shape, x.shape)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must be {letters} = [{wanted}], got {list(x.shape)}")
    if x.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {x.dtype}; convert it with .to({dtype})")
    if x.device != device:
        raise ValueError(f"{name} must be on {device}, got {x.device}; move it with .to({str(device)!r})")
