"""The kernels as torch operators in the namespace `sparse_forcing`: autograd, and shapes for compilers, attached.

As operators they pass through `torch.compile(fullgraph=True)` whole. This module registers them when it is first
imported, which only a call that takes the Triton backend does. A second copy of the package in the same process
registers its own operators under longer names: each copy runs its own code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backward as _backward
from . import forward, mass, router
from .variants import choose_variant

_library = torch.library.Library("sparse_forcing", "FRAGMENT")  # registrations end with this object


def _register(name: str, schema: str, run: Callable, shapes: Callable) -> str:
    """Define the operator for every device; -> its name, with a "_" for each copy of the package before this."""
    while hasattr(torch.ops.sparse_forcing, name):
        name += "_"
    _library.define(name + schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparse_forcing::{name}", shapes, lib=_library)
    return name


def _attention(
    q, k_pages, v_pages, page_len, idx, cnt, grad_pages, scale, padding, least_tokens, first, behind
):
    floor = forward.floor_of(least_tokens, padding)
    variant = choose_variant(q, k_pages, v_pages, page_len, idx, cnt, padding, floor)
    return forward.launch(
        variant, q, k_pages, v_pages, page_len, idx, cnt, scale, padding, floor, gap=(first, behind)
    )


def _attention_shapes(
    q, k_pages, v_pages, page_len, idx, cnt, grad_pages, scale, padding, least_tokens, first, behind
):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(q.shape[:3], dtype=torch.float32)


def _attention_backward_shapes(
    grad_out, grad_lse, out, lse, q, k_pages, v_pages, page_len, idx, cnt, targets, scale, padding
):
    count = 0 if targets is None else targets.shape[1]
    pages = (q.shape[0], count, *q.shape[2:])
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return dq, q.new_empty(pages), q.new_empty(pages)


def _mass_shapes(q, k_pages, page_len, idx, cnt, q_len, lse, scale):
    return lse.new_empty((*q.shape[:2], idx.shape[2]))


def _route_shapes(pooled_q, pooled_k, always, local, keep, scale):
    groups, blocks, _ = pooled_q.shape
    idx = always.new_empty((groups, blocks, always.shape[1] + keep))
    shares = pooled_q.new_empty((groups, blocks, always.shape[1] + local.shape[1]))
    return idx, always.new_empty((groups, blocks)), shares


def _route_parts_shapes(pooled_q, pooled_k, q_parts, k_parts, always, local, keep, scale):
    return _route_shapes(pooled_q[:, :, 0], pooled_k[:, :, 0], always, local, keep, scale)


def _pool_shapes(pages, page_len):
    return pages.new_empty((*pages.shape[:2], pages.shape[3]), dtype=torch.float32)


_TABLES = "Tensor page_len, Tensor idx, Tensor cnt"
_ATTENTION = _register(
    "pbsa_attention",
    f"(Tensor q, Tensor k_pages, Tensor v_pages, {_TABLES}, Tensor? grad_pages, float scale, str padding, "
    "int least_tokens, int first, int behind) -> (Tensor, Tensor)",
    _attention,
    _attention_shapes,
)
_ATTENTION_BACKWARD = _register(
    "pbsa_attention_backward",
    "(Tensor grad_out, Tensor grad_lse, Tensor out, Tensor lse, Tensor q, Tensor k_pages, Tensor v_pages, "
    f"{_TABLES}, Tensor? targets, float scale, str padding) -> (Tensor, Tensor, Tensor)",
    _backward.backward,
    _attention_backward_shapes,
)
_MASS = _register(
    "pbsa_attention_mass",
    f"(Tensor q, Tensor k_pages, {_TABLES}, Tensor q_len, Tensor lse, float scale) -> Tensor",
    mass.page_mass,
    _mass_shapes,
)
_ROUTE = _register(
    "pbsa_route",
    "(Tensor pooled_q, Tensor pooled_k, Tensor always, Tensor local, int keep, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    router.route,
    _route_shapes,
)

_ROUTE_PARTS = _register(
    "pbsa_route_parts",
    "(Tensor pooled_q, Tensor pooled_k, Tensor q_parts, Tensor k_parts, Tensor always, Tensor local, int keep, "
    "float scale) -> (Tensor, Tensor, Tensor)",
    router.route_parts,
    _route_parts_shapes,
)
_POOL = _register(
    "pbsa_pool_pages", "(Tensor pages, Tensor page_len) -> Tensor", router.pool_pages, _pool_shapes
)


attention = getattr(torch.ops.sparse_forcing, _ATTENTION).default
attention_backward = getattr(torch.ops.sparse_forcing, _ATTENTION_BACKWARD).default
attention_mass = getattr(torch.ops.sparse_forcing, _MASS).default
route = getattr(torch.ops.sparse_forcing, _ROUTE).default
route_parts = getattr(torch.ops.sparse_forcing, _ROUTE_PARTS).default
pool_pages = getattr(torch.ops.sparse_forcing, _POOL).default


def direct(operator: Callable, run: Callable) -> Callable:
    """The operator; where nothing differentiates or compiles, its code itself: torch's dispatch costs 30 us a call."""

    def call(*args: Any) -> Any:
        wanted = torch.is_grad_enabled() or torch.compiler.is_compiling()
        return operator(*args) if wanted else run(*args)

    return call


run_attention = direct(attention, _attention)
run_route = direct(route, router.route)
run_route_parts = direct(route_parts, router.route_parts)
run_pool_pages = direct(pool_pages, router.pool_pages)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.padding, _, _, _ = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k_pages, v_pages, page_len, idx, cnt, grad_pages, out, lse = ctx.saved_tensors
    groups, slots = page_len.shape
    targets = None
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        targets = grad_pages
        if targets is None:
            targets = torch.arange(slots, dtype=torch.int32, device=q.device).expand(groups, slots)
    dq, dk, dv = attention_backward(
        grad_out, grad_lse, out, lse, q, k_pages, v_pages, page_len, idx, cnt, targets, ctx.scale, ctx.padding
    )
    if targets is None:
        return dq, *[None] * 11
    if grad_pages is not None:
        at = torch.arange(groups, device=q.device)[:, None], grad_pages.long()
        dk, dv = (
            torch.zeros(k_pages.shape, dtype=x.dtype, device=x.device).index_put(at, x) for x in (dk, dv)
        )
    return dq, dk, dv, *[None] * 9


torch.library.register_autograd(
    f"sparse_forcing::{_ATTENTION}", _differentiate, setup_context=_save, lib=_library
)


def _save_pool(ctx, inputs, output) -> None:
    pages, page_len = inputs
    ctx.tokens, ctx.dtype = pages.shape[2], pages.dtype
    ctx.save_for_backward(page_len)


def _differentiate_pool(ctx, grad: Tensor) -> tuple[Tensor, None]:
    (page_len,) = ctx.saved_tensors
    valid = torch.arange(ctx.tokens, device=grad.device) < page_len[..., None]
    each = grad / page_len.clamp(min=1)[..., None]  # every valid token's share
    return torch.where(valid[..., None], each[:, :, None], 0).to(ctx.dtype), None


torch.library.register_autograd(
    f"sparse_forcing::{_POOL}", _differentiate_pool, setup_context=_save_pool, lib=_library
)
