"""The Wan2.1 text-to-video backbone in plain torch, with the self-attention left open.

Weight names and arithmetic are Wan's (blocks.i.self_attn.q ..., adaLN modulation with one timestep per latent frame),
so real checkpoints load by name. What a token may look at is not decided here: every block hands its rotated q, k and v
to `attend(layer, q, k, v)`, which is where memory and sparsity live (see state.py).

Shapes: B batch, C latent channels, F latent frames, H W latent height and width, N tokens = F * (H/2) * (W/2),
D head dim, dim = heads * D.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .positions import apply_rope, rope_table

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
Ops = ModuleType | SimpleNamespace | Any

PATCH = 2  # spatial patch; Wan's patch size is (1, 2, 2)
EPS = 1e-6


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of `t` (any shape, 0..1000) -> [*t.shape, dim] float32, cosines first; angles in float64 as in Wan."""
    half = dim // 2
    rate = torch.pow(10000, -torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angle = t.double()[..., None] * rate
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


class SelfAttention(nn.Module):
    """Projections and full-width q/k RMSNorm of one block; `attend` does the rest."""

    def __init__(self, dim: int, heads: int, ops: Ops):
        super().__init__()
        self.heads = heads
        self.q, self.k = ops.Linear(dim, dim), ops.Linear(dim, dim)
        self.v, self.o = ops.Linear(dim, dim), ops.Linear(dim, dim)
        self.norm_q, self.norm_k = ops.RMSNorm(dim, eps=EPS), ops.RMSNorm(dim, eps=EPS)

    def split(self, x_BNC: Tensor) -> Tensor:
        return rearrange(x_BNC, "b n (h d) -> b n h d", h=self.heads)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q and k, and v, [B, N, H, D]."""
        q = apply_rope(self.split(self.norm_q(self.q(x))), *rope)
        k = apply_rope(self.split(self.norm_k(self.k(x))), *rope)
        return q, k, self.split(self.v(x))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], layer: int, attend: Attend) -> Tensor:
        return self.o(attend(layer, *self.project(x, rope)).flatten(2))


class CrossAttention(SelfAttention):
    """Attention over the 512 text rows; their k and v are computed once a prompt (`kv`)."""

    def kv(self, context_BTC: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(self.norm_k(self.k(context_BTC))), self.split(self.v(context_BTC))

    def forward(self, x: Tensor, kv: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        q = self.split(self.norm_q(self.q(x)))
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, *kv)))
        return self.o(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One Wan block: self-attention, cross-attention, feed-forward; adaLN with six vectors per latent frame."""

    def __init__(self, dim: int, ffn_dim: int, heads: int, ops: Ops):
        super().__init__()
        self.norm1 = ops.LayerNorm(dim, eps=EPS, elementwise_affine=False)
        self.self_attn = SelfAttention(dim, heads, ops)
        self.norm3 = ops.LayerNorm(dim, eps=EPS, elementwise_affine=True)
        self.cross_attn = CrossAttention(dim, heads, ops)
        self.norm2 = ops.LayerNorm(dim, eps=EPS, elementwise_affine=False)
        self.ffn = nn.Sequential(
            ops.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), ops.Linear(ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, x, e0_BF6C, rope, cross_kv, layer: int, attend: Attend) -> Tensor:
        e = self.adaln(e0_BF6C)
        y = self.self_attn(modulate(self.norm1(x), e[0], e[1]), rope, layer, attend)
        return self.after_attention(x, y, e, cross_kv)

    def adaln(self, e0_BF6C: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of the self-attention, then of the feed-forward, [B, F, C] each."""
        return (self.modulation.to(e0_BF6C) + e0_BF6C).unbind(2)

    def after_attention(self, x: Tensor, y: Tensor, e: tuple[Tensor, ...], cross_kv) -> Tensor:
        """The block's rest: x [B, N, C] its input, y what the self-attention adds, e of `adaln`."""
        x = x + gate(y, e[2])
        x = x + self.cross_attn(self.norm3(x), cross_kv)
        y = self.ffn(modulate(self.norm2(x), e[3], e[4]))
        return x + gate(y, e[5])


def modulate(x_BNC: Tensor, shift_BFC: Tensor, scale_BFC: Tensor) -> Tensor:
    """x * (1 + scale) + shift, where every frame's tokens share one vector."""
    x = rearrange(x_BNC, "b (f n) c -> b f n c", f=shift_BFC.shape[1])
    x = torch.addcmul(shift_BFC[:, :, None].to(x), x, 1 + scale_BFC[:, :, None].to(x))
    return x.flatten(1, 2)


def gate(x_BNC: Tensor, gate_BFC: Tensor) -> Tensor:
    x = rearrange(x_BNC, "b (f n) c -> b f n c", f=gate_BFC.shape[1])
    return (x * gate_BFC[:, :, None].to(x)).flatten(1, 2)


class Head(nn.Module):
    """Final adaLN and projection to patches."""

    def __init__(self, dim: int, out_dim: int, ops: Ops):
        super().__init__()
        self.norm = ops.LayerNorm(dim, eps=EPS, elementwise_affine=False)
        self.head = ops.Linear(dim, PATCH * PATCH * out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: Tensor, e_BFC: Tensor) -> Tensor:
        shift, scale = (self.modulation.to(e_BFC) + e_BFC[:, :, None]).unbind(2)
        return self.head(modulate(self.norm(x), shift, scale))


class WanModel(nn.Module):
    """Wan2.1 T2V. Predicts flow = noise - x0 for a chunk of latent frames.

    Args: widths as in Wan's config (dim 1536, ffn 8960, 12 heads, 30 layers for 1.3B); `ops` supplies Linear, Conv3d,
    LayerNorm and RMSNorm (torch.nn, or a host's own layer classes).
    """

    def __init__(
        self,
        *,
        dim: int,
        ffn_dim: int,
        num_heads: int,
        num_layers: int,
        in_dim: int = 16,
        out_dim: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ops: Ops = nn,
    ):
        super().__init__()
        self.dim, self.num_heads, self.num_layers = dim, num_heads, num_layers
        self.head_dim, self.freq_dim, self.out_dim = dim // num_heads, freq_dim, out_dim
        self.patch_embedding = ops.Conv3d(
            in_dim, dim, kernel_size=(1, PATCH, PATCH), stride=(1, PATCH, PATCH)
        )
        self.text_embedding = nn.Sequential(
            ops.Linear(text_dim, dim), nn.GELU(approximate="tanh"), ops.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(ops.Linear(freq_dim, dim), nn.SiLU(), ops.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), ops.Linear(dim, dim * 6))
        self.blocks = nn.ModuleList([Block(dim, ffn_dim, num_heads, ops) for _ in range(num_layers)])
        self.head = Head(dim, out_dim, ops)

    @classmethod
    def from_state_dict(cls, sd: dict[str, Tensor], ops: Ops = nn, share: bool = False) -> WanModel:
        """Build the backbone a state dict belongs to (widths read from its shapes; head dim is Wan's 128) and load it.

        share: the parameters are the given tensors themselves, for inference, instead of copies of them.
        Raises KeyError or RuntimeError where keys are missing or unexpected: loading is strict.
        """
        layers = 1 + max(int(k.split(".")[1]) for k in sd if k.startswith("blocks."))
        dim = sd["head.modulation"].shape[-1]
        model = (cls.without_weights if share else cls)(
            dim=dim,
            ffn_dim=sd["blocks.0.ffn.0.weight"].shape[0],
            num_heads=dim // 128,
            num_layers=layers,
            in_dim=sd["patch_embedding.weight"].shape[1],
            out_dim=sd["head.head.weight"].shape[0] // PATCH**2,
            text_dim=sd["text_embedding.0.weight"].shape[1],
            freq_dim=sd["time_embedding.0.weight"].shape[1],
            ops=ops,
        )
        model.load_state_dict(sd, assign=share)
        return model

    @classmethod
    def without_weights(cls, **widths: Any) -> WanModel:
        """The backbone on device "meta", for weights that are assigned to it; for inference. widths: of __init__."""
        with torch.device("meta"), _Uninitialised():
            return cls(**widths).requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        return self.head.head.weight.dtype

    def cross_kv(self, context_BTC: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per layer (k, v) [B, 512, heads, D] of the text rows [B, 512, 4096]: constant for a prompt."""
        context = self.text_embedding(context_BTC.to(self.dtype))
        return [block.cross_attn.kv(context) for block in self.blocks]

    def rope(self, t_start: int, frames: int, height: int, width: int, device) -> tuple[Tensor, Tensor]:
        """RoPE table of `frames` latent frames of height x width latent pixels, first frame at index t_start."""
        return rope_table(t_start, frames, height // PATCH, width // PATCH, self.head_dim, device)

    def forward(
        self,
        x_BCFHW: Tensor,
        timestep_BF: Tensor,
        cross_kv: list[tuple[Tensor, Tensor]],
        attend: Attend,
        t_start: int = 0,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Flow of a chunk.

        x [B, C, F, H, W] noisy latent (H, W even); timestep [B, F] in 0..1000; cross_kv from `cross_kv()`;
        attend(layer, q, k, v) with rotated q, k [B, N, heads, D] -> [B, N, heads, D]; `rope` replaces the table of
        consecutive frames from t_start. Returns flow [B, out_dim, F, H, W] in x's dtype.
        """
        _, _, frames, height, width = x_BCFHW.shape
        if rope is None:
            rope = self.rope(t_start, frames, height, width, x_BCFHW.device)
        x = self.patch_embedding(x_BCFHW.to(self.dtype)).flatten(2).transpose(1, 2)
        e_BFC = self.time_embedding(timestep_embedding(timestep_BF, self.freq_dim).to(self.dtype))
        e0_BF6C = rearrange(self.time_projection(e_BFC), "b f (s c) -> b f s c", s=6)
        for layer, block in enumerate(self.blocks):
            x = block(x, e0_BF6C, rope, cross_kv[layer], layer, attend)
        patches = self.head(x, e_BFC)
        return rearrange(
            patches,
            "b (f h w) (p q c) -> b c f (h p) (w q)",
            f=frames,
            h=height // PATCH,
            w=width // PATCH,
            p=PATCH,
            q=PATCH,
        ).to(x_BCFHW.dtype)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Wan's initialisation: Xavier linears, small embeddings, zero head."""
        for m in self.modules():
            weight = getattr(m, "weight", None)
            if weight is not None and weight.ndim == 2:
                nn.init.xavier_uniform_(weight)
            if weight is not None and weight.ndim >= 2 and getattr(m, "bias", None) is not None:
                nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for m in (*self.text_embedding, *self.time_embedding):
            if getattr(m, "weight", None) is not None:
                nn.init.normal_(m.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)


class _Uninitialised(TorchFunctionMode):
    """Constructors leave parameters as they are: PyTorch takes 0.1 s for random values, even on device "meta"."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return args[0] if func in (Tensor.uniform_, Tensor.normal_) else func(*args, **kwargs)


def frame_timesteps(sigma: float, batch: int, frames: int, device) -> Tensor:
    """[B, F] float32 timesteps 1000 * sigma, one per latent frame."""
    return repeat(torch.tensor([1000.0 * sigma], device=device), "1 -> b f", b=batch, f=frames)
