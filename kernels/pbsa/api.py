"""The public face of PBSA: checks what it is given, chooses a backend, hands over.

Letters: G groups (batch x heads, one page table each), NQ query blocks, T tokens a block, D head dim, S page slots of a
group, NR lists of a group, M longest list, NC pages that want a gradient, NA and NL pages that a router row always
reads and chooses from.
Nothing here reads a value on the device: checks are of shapes, dtypes and devices, so that no call waits for the GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import expect
from . import reference
from .constraints import serve
from .reference import NO_GAP

PADDINGS = ("none", "finite", "any")


class BlockLists(NamedTuple):
    """Which pages each query block reads.

    idx [G, NR, M] int32: page slots, ascending, each at most once; entries from `cnt` on are padding (any valid slot).
    cnt [G, NR] int32: how many of them count, 0 to M.
    NR divides NQ: each list serves NQ / NR query blocks that follow one another. NR = NQ is a list a block; NR = NQ / 2
    lets pairs of blocks of 64 fill a tile of 128 rows; NR = 1 is dense and window attention.
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
    padding: str = "any",
    least_tokens: int = 0,
    grad_pages: Tensor | None = None,
    gap: tuple[int, int] = NO_GAP,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of query blocks over the pages that their lists name, in one softmax.

    q [G, NQ, T, D]; k_pages, v_pages [G, S, T, D] in q's dtype (float32, float16, bfloat16; float64 by the reference);
    page_len [G, S] int32, the valid tokens at the front of each page: what lies behind them is not read.
    scale: of the scores, default D ** -0.5. backend: auto, reference or triton.
    padding: a promise about the tokens behind page_len in k_pages and v_pages, which lets faster kernels run.
        "any": they may hold anything, NaN too; "finite": they hold numbers, as zeros are; "none": there are none, every
        listed page is full. A broken promise gives wrong numbers.
    least_tokens: another promise, that every listed page holds at least so many tokens, whose rows then need no mask.
    grad_pages [G, NC] int32, slots distinct within a group: only these pages get a gradient in k_pages and v_pages, for
        all others it is zero and costs nothing. None: every page. Training names the new chunk's pages.
    gap (first, pages): the slots from `first` on lie `pages` pages further on in k_pages and v_pages, which then are
        [G, S + pages, T, D]. So layers can share the pages of the chunk that is open. Without gradients.

    -> out [G, NQ, T, D] in q's dtype; lse [G, NQ, T] float32 (float64 for float64), natural log of the softmax's sum.
    A list without a valid token gives out 0 and lse -inf. Rows of q past a ragged block's end are computed like others.
    Gradients flow to q, k_pages and v_pages, through out and lse; the same inputs give the same bits.
    Raises ValueError for shapes, dtypes or devices that do not fit together, RuntimeError with the reason when the
    backend named cannot serve the call.
    """
    _check_attention(q, k_pages, v_pages, page_len, lists, gap)
    if padding not in PADDINGS:
        raise ValueError(f"padding must be {', '.join(PADDINGS[:-1])} or {PADDINGS[-1]}, got {padding!r}")
    if not 0 <= least_tokens <= q.shape[2]:
        raise ValueError(f"least_tokens must be 0 to {q.shape[2]}, the tokens of a page, got {least_tokens}")
    if grad_pages is not None:
        expect("grad_pages", grad_pages, (q.shape[0], None), q.device, torch.int32, "[G, NC]")
    if gap[1] and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_pages, v_pages)):
        raise ValueError("pages with a gap have no gradient: use torch.no_grad(), or pages without one")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    idx, cnt = lists
    if idx.shape[2] == 0:  # nobody reads anything; one padding entry keeps every backend free of the case
        idx = idx.new_zeros(*idx.shape[:2], 1)
    rest = page_len, idx, cnt

    def by_triton() -> tuple[Tensor, Tensor]:
        from . import triton

        return triton.attention(q, k_pages, v_pages, *rest, grad_pages, scale, padding, least_tokens, *gap)

    def by_reference() -> tuple[Tensor, Tensor]:
        keys, values = (reference.without_gap(x, gap) for x in (k_pages, v_pages))
        if grad_pages is not None:
            keys, values = (reference.only_pages(x, grad_pages) for x in (keys, values))
        return reference.attention(q, keys, values, *rest, scale)

    facts = q.device, q.dtype, q.shape[3], q.shape[2]
    return serve(backend, "attention", facts, by_triton, by_reference)


def attention_mass(
    q: Tensor,
    k_pages: Tensor,
    page_len: Tensor,
    lists: BlockLists,
    lse: Tensor,
    *,
    q_len: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """How much of its attention each query block gave each listed page in `pbsa_attention`, which returned `lse`.

    q, k_pages, page_len, lists and scale as they were there; lse [G, NQ, T]. q_len [G, NQ] int32: valid rows of each
    query block, at least one; default: all. -> [G, NQ, M] in lse's dtype, in the order of the lists: the mean over a
    block's valid rows, which sums to 1 where a list has a valid token; 0 from `cnt` on. Exact, at two fifths of an
    attention's products; the router's shares estimate the same. No gradient flows. Raises like `pbsa_attention`.
    """
    _check_attention(q, k_pages, k_pages, page_len, lists)
    expect("lse", lse, tuple(q.shape[:3]), q.device, reference.computing_dtype(q), "[G, NQ, T]")
    if q_len is None:
        q_len = torch.full(q.shape[:2], q.shape[2], dtype=torch.int32, device=q.device)
    expect("q_len", q_len, tuple(q.shape[:2]), q.device, torch.int32, "[G, NQ]")
    inputs = q, k_pages, page_len, *lists, q_len, lse, q.shape[-1] ** -0.5 if scale is None else float(scale)
    with torch.no_grad():
        return _serve("attention_mass", backend, (q.device, q.dtype, q.shape[3], q.shape[2]), *inputs)


def pool_pages(pages: Tensor, page_len: Tensor, *, backend: str = "auto") -> Tensor:
    """Mean of each page's valid tokens: pages [G, n, T, D], page_len [G, n] int32 -> [G, n, D] float32 (0 if empty).

    float64 by the reference, for float64. Gradients flow to pages. Raises like `pbsa_attention`.
    """
    expect("pages", pages, (None, None, None, None), pages.device, pages.dtype, "[G, n, T, D]")
    expect("page_len", page_len, tuple(pages.shape[:2]), pages.device, torch.int32, "[G, n]")
    facts = pages.device, pages.dtype, pages.shape[3], pages.shape[2]
    return _serve("pool_pages", backend, facts, pages, page_len)


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
    wins), every cnt = NA + min(k, NL); shares [G, NQ, NA + NL] in the dtype of the pooled vectors: each row's softmax
    over `always` then `local`, whose sum over query blocks is a page's importance. No gradient flows through either.
    Raises like `pbsa_attention`.
    """
    _check_route(pooled_q, pooled_k, always, local, k)
    scale = pooled_q.shape[-1] ** -0.5 if scale is None else float(scale)
    inputs = pooled_q, pooled_k, always, local, min(k, local.shape[1]), scale
    facts = pooled_q.device, pooled_q.dtype, pooled_q.shape[2], None, pooled_k.shape[1]
    with torch.no_grad():
        idx, cnt, shares = _serve("route", backend, facts, *inputs)
    return BlockLists(idx, cnt), shares


def route_parts(
    pooled_q: Tensor,
    pooled_k: Tensor,
    q_parts: Tensor,
    k_parts: Tensor,
    always: Tensor,
    local: Tensor,
    k: int,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[BlockLists, Tensor]:
    """`route` by vectors of the parts of blocks: pooled_q [G, NQ, R, D] and pooled_k [G, S, R, D], means of parts that
    hold q_parts [G, NQ, R] and k_parts [G, S, R] int32 tokens (0: an empty part; every block has one that is not).

    Each part of the queries has a softmax over the parts of all candidates' keys, as if each of a part's tokens had its
    mean; a page's share is the mean over the queries. -> as `route`; pages are kept by their shares. R is a power of 2.
    """
    expect("pooled_q", pooled_q, (None,) * 4, pooled_q.device, pooled_q.dtype, "[G, NQ, R, D]")
    _check_route(pooled_q.flatten(2), pooled_k.flatten(2), always, local, k)
    groups, blocks, parts, dim = pooled_q.shape
    expect("pooled_k", pooled_k, (groups, None, parts, dim), pooled_q.device, pooled_q.dtype, "[G, S, R, D]")
    expect("q_parts", q_parts, (groups, blocks, parts), pooled_q.device, torch.int32, "[G, NQ, R]")
    expect("k_parts", k_parts, tuple(pooled_k.shape[:3]), pooled_q.device, torch.int32, "[G, S, R]")
    scale = dim**-0.5 if scale is None else float(scale)
    inputs = pooled_q, pooled_k, q_parts, k_parts, always, local, min(k, local.shape[1]), scale
    facts = pooled_q.device, pooled_q.dtype, dim, None, parts * pooled_k.shape[1]
    with torch.no_grad():
        idx, cnt, shares = _serve("route_parts", backend, facts, *inputs)
    return BlockLists(idx, cnt), shares


def _serve(operation: str, backend: str, facts: tuple, *inputs: Any) -> Any:
    """The operation, which both backends have under this name, by the one that may serve a call of these facts."""
    return serve(
        backend,
        operation,
        facts,
        lambda: _by_triton(operation, inputs),
        lambda: getattr(reference, operation)(*inputs),
    )


def _by_triton(operation: str, inputs: tuple) -> Any:
    from . import triton

    return getattr(triton, operation)(*inputs)


def _check_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_len: Tensor,
    lists: BlockLists,
    gap: tuple[int, int] = NO_GAP,
) -> None:
    expect("q", q, (None, None, None, None), q.device, q.dtype, "[G, NQ, T, D]")
    groups, blocks, tokens, dim = q.shape
    expect("k_pages", k_pages, (groups, None, tokens, dim), q.device, q.dtype, "[G, S, T, D]")
    expect("v_pages", v_pages, tuple(k_pages.shape), q.device, q.dtype, "[G, S, T, D]")
    first, behind = gap
    if not 0 <= first <= k_pages.shape[1] - behind <= k_pages.shape[1]:
        raise ValueError(f"gap {gap} does not lie within the {k_pages.shape[1]} pages of a group")
    expect("page_len", page_len, (groups, k_pages.shape[1] - behind), q.device, torch.int32, "[G, S]")
    idx, cnt = lists
    rows = blocks
    if idx.dim() == 3 and idx.shape[1] > 0 and blocks % idx.shape[1] == 0:
        rows = idx.shape[1]
    expect(
        "lists.idx", idx, (groups, rows, None), q.device, torch.int32, "[G, NR, M] with NR a divisor of NQ"
    )
    expect("lists.cnt", cnt, (groups, rows), q.device, torch.int32, "[G, NR]")


def _check_route(pooled_q: Tensor, pooled_k: Tensor, always: Tensor, local: Tensor, k: int) -> None:
    if pooled_q.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"pooled_q must be float32, as pool_pages gives it, got {pooled_q.dtype}")
    expect("pooled_q", pooled_q, (None, None, None), pooled_q.device, pooled_q.dtype, "[G, NQ, D]")
    groups, _, dim = pooled_q.shape
    expect("pooled_k", pooled_k, (groups, None, dim), pooled_q.device, pooled_q.dtype, "[G, S, D]")
    expect("always", always, (groups, None), pooled_q.device, torch.int32, "[G, NA]")
    expect("local", local, (groups, None), pooled_q.device, torch.int32, "[G, NL]")
    if always.shape[1] + local.shape[1] == 0:
        raise ValueError("always and local are both empty: the router needs a page to score")
    if not isinstance(k, int) or k < 0:
        raise ValueError(f"k must be a whole number of pages, 0 or more, got {k!r}")
