"""The weights of a WanModel as the fast pass wants them: joint q, k and v, GELU in the product's epilogue, 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import fused
from .wan import Block, WanModel

Product = Callable[[Any], Tensor]  # x [B, N, in], a Tensor or with fp8 Rows8 -> [B, N, out]


@dataclass(frozen=True)
class FastOptions:
    """How a fast pass is computed. The defaults are exact; every other choice trades error for time.

    fuse_qkv: one product for q, k and v. The model's own weights become views of the joint one, so none is held twice.
    graphs: capture CUDA graphs.
    fp8: linear layers of the blocks in 8 bits, a scale a row of weights and a scale a token.
    persistent_in_topk: persistent pages take part in Top-K, which then keeps the share `topk` of all pages.
    router_once: the first pass of a chunk chooses the pages for the later ones; the clean pass chooses anew.
    reuse_persistent: attention over the persistent pages is computed in the first pass of a chunk and reused, as
        (output, log-sum-exp), by the later ones; the clean pass is exact.
    The last three belong to mode "sparse".
    """

    fuse_qkv: bool = True
    graphs: bool = True
    fp8: bool = False
    persistent_in_topk: bool = False
    router_once: bool = False
    reuse_persistent: bool = False

    def validate(self) -> None:
        """Raise ValueError for choices that exclude each other."""
        if self.persistent_in_topk and self.reuse_persistent:
            raise ValueError(
                "persistent_in_topk reads some persistent pages a query block, reuse_persistent all of them at once: "
                "use one of the two."
            )

    @property
    def approximate(self) -> list[str]:
        """Names of the options in use that change the result."""
        names = ("fp8", "persistent_in_topk", "router_once", "reuse_persistent")
        return [name for name in names if getattr(self, name)]


# What people choose from, by name: shortcuts through the passes of a chunk. docs/speed.md has what each costs.
SHORTCUTS = {
    "none": FastOptions(),
    "shared": FastOptions(router_once=True, reuse_persistent=True),
    "shared + fp8": FastOptions(fp8=True, router_once=True, reuse_persistent=True),
}


class Linear8:
    """x [B, N, in] @ weight.T + bias with both in float8_e4m3fn: a scale a row of the weight, a scale a token.

    gelu: of GELU(x). On a CPU the same numbers are multiplied in float32.
    """

    def __init__(self, weight: Tensor, bias: Tensor, gelu: bool = False):
        self.weight, self.scale = fused.quantise_rows(weight)
        self.bias, self.gelu = bias, gelu

    def __call__(self, x: Tensor | fused.Rows8) -> Tensor:
        """x [B, N, in], in 8 bits already where a norm wrote it. In x's dtype, of Rows8 in the bias'."""
        if isinstance(x, fused.Rows8):
            shape, dtype = x.rows.shape, self.bias.dtype
            rows, scale = (part.flatten(0, 1) for part in x)
        else:
            shape, dtype = x.shape, x.dtype
            rows, scale = fused.quantise_rows(x.flatten(0, 1), gelu=self.gelu)
        if rows.is_cuda:
            out = torch._scaled_mm(
                rows, self.weight.T, scale_a=scale, scale_b=self.scale.T, bias=self.bias.to(torch.bfloat16),
                out_dtype=torch.bfloat16, use_fast_accum=True,
            )  # fmt: skip
        else:
            out = (rows.float() @ self.weight.float().T) * scale * self.scale.T + self.bias.float()
        return out.to(dtype).unflatten(0, shape[:2])


@dataclass
class FastBlock:
    """One block's products and the weights of its norms; `qkv` gives views of q, k and v, each [B, N, C]."""

    qkv: Callable[[Any], tuple[Tensor, ...]]
    o: Product
    cross_q: Product
    cross_o: Product
    ffn: Product
    norm_q: Tensor
    norm_k: Tensor
    cross_norm: tuple[Tensor, Tensor]  # weight, bias
    cross_norm_q: Tensor


class FastModel:
    """A WanModel's weights as the fast pass wants them. One serves any number of streams."""

    def __init__(self, model: WanModel, options: FastOptions):
        self.model, self.options = model, options
        with torch.inference_mode(False), torch.no_grad():  # normal tensors, whatever mode a host is in
            blocks: Any = model.blocks  # torch says Module of every part
            self.blocks = [_fast_block(block, options) for block in blocks]
            self.modulation = torch.cat([block.modulation for block in blocks]).detach().float()


def _fast_block(block: Block, options: FastOptions) -> FastBlock:
    linear = _linear8 if options.fp8 else _linear
    own, cross = block.self_attn, block.cross_attn
    ffn: Any = block.ffn
    ffn_in, _, ffn_out = ffn
    grow: Product
    shrink: Product
    if options.fp8:
        grow, shrink = _linear8(ffn_in), Linear8(ffn_out.weight.detach(), ffn_out.bias.detach(), gelu=True)
    else:
        grow, shrink = _linear_gelu(ffn_in), _linear(ffn_out)

    return FastBlock(
        qkv=_qkv(block, options),
        o=linear(own.o),
        cross_q=linear(cross.q),
        cross_o=linear(cross.o),
        ffn=lambda x: shrink(grow(x)),
        norm_q=own.norm_q.weight,
        norm_k=own.norm_k.weight,
        cross_norm=(block.norm3.weight, block.norm3.bias),
        cross_norm_q=cross.norm_q.weight,
    )


def _linear(layer: torch.nn.Linear) -> Product:
    return lambda x: F.linear(x, layer.weight, layer.bias)


def _linear_gelu(layer: torch.nn.Linear) -> Product:
    """GELU(layer(x)); on CUDA in the product's own epilogue: the widest tensor is not read and written once more."""

    def run(x: Tensor) -> Tensor:
        if not x.is_cuda:
            return F.gelu(F.linear(x, layer.weight, layer.bias), approximate="tanh")
        rows = torch._addmm_activation(layer.bias, x.flatten(0, 1), layer.weight.T, use_gelu=True)
        return rows.unflatten(0, x.shape[:2])

    return run


def _linear8(layer: torch.nn.Linear) -> Product:
    return Linear8(layer.weight.detach(), layer.bias.detach())


def _qkv(block: Block, options: FastOptions) -> Callable[[Any], tuple[Tensor, ...]]:
    layers = (block.self_attn.q, block.self_attn.k, block.self_attn.v)
    if options.fp8:
        weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
        joint = Linear8(weight, bias)
        return lambda x: joint(x).chunk(3, dim=-1)
    if not options.fuse_qkv:
        return lambda x: tuple(F.linear(x, layer.weight, layer.bias) for layer in layers)
    weight, bias = (_join([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
    return lambda x: F.linear(x, weight, bias).chunk(3, dim=-1)


def _join(parameters: list[torch.nn.Parameter]) -> Tensor:
    """The parameters one behind the other. They become views of it; those of an earlier call already are."""
    first, size = parameters[0].data, parameters[0].shape[0]
    joint = first.as_strided((3 * size, *first.shape[1:]), first.stride()) if _joined(parameters) else None
    if joint is None:
        joint = torch.cat([p.data for p in parameters])
        for parameter, part in zip(parameters, joint.split(size)):
            parameter.data = part
    return joint


def _joined(parameters: list[torch.nn.Parameter]) -> bool:
    first = parameters[0]
    step = first.numel() * first.element_size()
    same = {p.untyped_storage().data_ptr() for p in parameters}
    return len(same) == 1 and all(
        p.data_ptr() == first.data_ptr() + i * step and p.is_contiguous() for i, p in enumerate(parameters)
    )
