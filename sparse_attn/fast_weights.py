"""The weights of a WanModel as the fast pass wants them: joint q, k and v, GELU in the product's epilogue, 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import fused
from ..kernels.workspace import active, empty, held
from .wan import Block, WanModel

Product = Callable[[Any], Tensor]  # x [B, N, in], a Tensor or with fp8 Rows8 -> [B, N, out]


@dataclass(frozen=True)
class FastOptions:
    """How a fast pass is computed. The defaults are exact; every other choice trades error for time.

    fuse_qkv: one product for q, k and v. The model's own weights become views of the joint one, so none is held twice.
    graphs: capture CUDA graphs.
    fp8: linear layers of the blocks in 8 bits, a scale a row of weights and a scale a token.
    router_once: the first pass of a chunk chooses the pages for the later ones; the clean pass chooses anew.
    reuse_persistent: attention over the persistent pages is computed in the first pass of a chunk and reused, as
        (output, log-sum-exp), by the later ones; the clean pass is exact.
    The last two belong to mode "sparse". fp8 needs the weights themselves: layers of a host's own classes have none.
    """

    fuse_qkv: bool = True
    graphs: bool = True
    fp8: bool = False
    router_once: bool = False
    reuse_persistent: bool = False

    @property
    def approximate(self) -> list[str]:
        """Names of the options in use that change the result."""
        names = ("fp8", "router_once", "reuse_persistent")
        return [name for name in names if getattr(self, name)]


# What people choose from, by name: shortcuts through the passes of a chunk. docs/speed.md has what each costs.
SHORTCUTS = {
    "none": FastOptions(),
    "shared": FastOptions(router_once=True, reuse_persistent=True),
    "shared + fp8": FastOptions(fp8=True, router_once=True, reuse_persistent=True),
}


class Linear8:
    """x [B, N, in] @ weight.T + bias with both in float8_e4m3fn: a scale a row of the weight, a scale a token.

    name: of its output in a workspace. gelu: of GELU(x). On CUDA the result is bfloat16, the only type that row scales
    give everywhere; what follows converts it while reading. On a CPU the same numbers are multiplied in float32, and
    the result has the bias' dtype.
    """

    def __init__(self, weight: Tensor, bias: Tensor, name: str, gelu: bool = False):
        self.weight, self.scale = fused.quantise_rows(weight)
        self.bias, self.name, self.gelu = bias, name, gelu
        if weight.is_cuda:
            self.bias = bias.to(torch.bfloat16)

    def __call__(self, x: Tensor | fused.Rows8) -> Tensor:
        """x [B, N, in], in 8 bits already where a norm wrote it."""
        shape = x.rows.shape if isinstance(x, fused.Rows8) else x.shape
        if not isinstance(x, fused.Rows8):
            x = fused.quantise_rows(x.flatten(0, 1), gelu=self.gelu)
        rows, scale = x.rows.view(-1, shape[-1]), x.scale.view(-1, 1)
        if rows.is_cuda:
            out = empty(self.name, (len(rows), len(self.weight)), torch.bfloat16, rows.device)
            torch._scaled_mm(
                rows, self.weight.T, scale_a=scale, scale_b=self.scale.T, bias=self.bias,
                out_dtype=torch.bfloat16, use_fast_accum=True, out=out,
            )  # fmt: skip
        else:
            wide = (rows.float() @ self.weight.float().T) * scale * self.scale.T + self.bias.float()
            out = wide.to(self.bias.dtype)
        return out.unflatten(0, shape[:2])


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
        grow, shrink = _linear8(ffn_in, "ffn.in"), _linear8(ffn_out, "ffn", gelu=True)
    else:
        grow, shrink = _linear_gelu(ffn_in, "ffn.in"), _linear(ffn_out, "ffn")

    return FastBlock(
        qkv=_qkv(block, options),
        o=linear(own.o, "o"),
        cross_q=linear(cross.q, "cross_q"),
        cross_o=linear(cross.o, "cross_o"),
        ffn=lambda x: shrink(grow(x)),
        norm_q=own.norm_q.weight,
        norm_k=own.norm_k.weight,
        cross_norm=(block.norm3.weight, block.norm3.bias),
        cross_norm_q=cross.norm_q.weight,
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor, name: str) -> Tensor:
    """x [B, N, in] @ weight.T + bias -> [B, N, out], where a workspace is active in its buffer `name`."""
    if active() is None:
        return F.linear(x, weight, bias)
    out = empty(name, (x.shape[0] * x.shape[1], len(weight)), x.dtype, x.device)
    return torch.addmm(bias, x.flatten(0, 1), weight.T, out=out).unflatten(0, x.shape[:2])


def _linear(layer: torch.nn.Module, name: str) -> Product:
    """The layer as a product. One that is not exactly torch's own is called as it is, for a kernel to read."""
    if not _plain(layer):
        return lambda x: held(name, layer(x))
    return lambda x: linear(x, layer.weight, layer.bias, name)


def _linear_gelu(layer: torch.nn.Module, name: str) -> Product:
    """GELU(layer(x)); on CUDA in the product's own epilogue: the widest tensor is not read and written once more."""

    def run(x: Tensor) -> Tensor:
        if not (_plain(layer) and x.is_cuda):
            return F.gelu(layer(x), approximate="tanh")
        out = empty(name, (x.shape[0] * x.shape[1], len(layer.weight)), x.dtype, x.device)
        torch._addmm_activation(layer.bias, x.flatten(0, 1), layer.weight.T, use_gelu=True, out=out)
        return out.unflatten(0, x.shape[:2])

    return run


def _linear8(layer: torch.nn.Module, name: str, gelu: bool = False) -> Product:
    if not _plain(layer):
        raise ValueError(f"fp8 needs the weights themselves, but a layer is a {type(layer).__name__}")
    return Linear8(layer.weight.detach(), layer.bias.detach(), name, gelu)


def _plain(layer: torch.nn.Module) -> TypeGuard[torch.nn.Linear]:
    return type(layer) is torch.nn.Linear


def _qkv(block: Block, options: FastOptions) -> Callable[[Any], tuple[Tensor, ...]]:
    own = block.self_attn
    layers = {"q": own.q, "k": own.k, "v": own.v}
    if options.fp8:
        weight, bias = (
            torch.cat([getattr(layer, part) for layer in layers.values()]) for part in ("weight", "bias")
        )
        joint = Linear8(weight, bias, "qkv")
        return lambda x: joint(x).chunk(3, dim=-1)
    if not options.fuse_qkv or not all(map(_plain, layers.values())):
        products = [_linear(layer, name) for name, layer in layers.items()]
        return lambda x: tuple(product(x) for product in products)
    weight, bias = (_join([getattr(layer, part) for layer in layers.values()]) for part in ("weight", "bias"))
    return lambda x: linear(x, weight, bias, "qkv").chunk(3, dim=-1)


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
