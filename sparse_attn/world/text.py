"""The world model's text encoder: words to 512 rows of 4096, the interface Wan's umt5-xxl has.

Rows after the prompt are zero. The vocabulary is the world's own (scene.VOCABULARY); any other word becomes one shared
"unknown" token, so free text never fails.
"""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..wan import Ops
from .scene import VOCABULARY

ROWS, WIDTH = 512, 4096
PAD, UNKNOWN = 0, 1
_INDEX = {word: i + 2 for i, word in enumerate(VOCABULARY)}


def tokenize(prompt: str) -> list[int]:
    """Word ids of a prompt, at most 512; longer prompts are cut there, as Wan cuts them."""
    return [_INDEX.get(word, UNKNOWN) for word in re.findall(r"[a-z]+", prompt.lower())][:ROWS]


class TextBlock(nn.Module):
    """Pre-norm transformer layer over the prompt's words."""

    def __init__(self, dim: int, heads: int, ops: Ops):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = ops.LayerNorm(dim), ops.LayerNorm(dim)
        self.qkv, self.out = ops.Linear(dim, 3 * dim), ops.Linear(dim, dim)
        self.ffn = nn.Sequential(ops.Linear(dim, 4 * dim), nn.GELU(), ops.Linear(4 * dim, dim))

    def forward(self, x: Tensor, mask_BN: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b n (s h d) -> s b h n d", s=3, h=self.heads)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_BN[:, None, None])
        x = x + self.out(rearrange(y, "b h n d -> b n (h d)"))
        return x + self.ffn(self.norm2(x))


class WorldTextEncoder(nn.Module):
    """Word ids -> [B, 512, 4096]; two small layers let a colour know its shape."""

    def __init__(self, dim: int = 96, heads: int = 4, layers: int = 2, ops: Ops = nn):
        super().__init__()
        self.dim = dim
        self.embedding = nn.Parameter(torch.randn(len(VOCABULARY) + 2, dim))
        self.blocks = nn.ModuleList([TextBlock(dim, heads, ops) for _ in range(layers)])
        self.norm = ops.LayerNorm(dim)
        self.proj = ops.Linear(dim, WIDTH)

    @classmethod
    def from_state_dict(cls, sd: dict[str, Tensor], ops: Ops = nn) -> WorldTextEncoder:
        """Build and strictly load the encoder the weights belong to."""
        layers = 1 + max(int(k.split(".")[1]) for k in sd if k.startswith("blocks."))
        model = cls(dim=sd["embedding"].shape[1], layers=layers, ops=ops)
        model.load_state_dict(sd)
        return model

    def encode(self, prompts: list[str]) -> Tensor:
        """Rows [B, 512, 4096] in the weights' dtype; zero after each prompt."""
        return self(torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(tokenize(p) or [UNKNOWN]) for p in prompts], batch_first=True, padding_value=PAD
        ).to(self.embedding.device))  # fmt: skip

    def forward(self, ids_BN: Tensor) -> Tensor:
        """Word ids [B, n <= 512] (0 pads) -> rows [B, 512, 4096]."""
        rows = self.proj(self.words(ids_BN)) * (ids_BN != PAD)[..., None]
        return F.pad(rows, (0, 0, 0, ROWS - rows.shape[1]))

    def words(self, ids_BN: Tensor) -> Tensor:
        """Word ids [B, n] -> what each word knows of its prompt [B, n, dim]."""
        mask = ids_BN != PAD
        x = self.embedding[ids_BN] + word_positions(ids_BN.shape[1], self.dim, ids_BN.device).to(
            self.embedding
        )
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


def word_positions(count: int, dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Sinusoidal positions [count, dim]."""
    rate = torch.exp(torch.arange(0, dim, 2, device=device) * (-math.log(1000.0) / dim))
    angle = torch.arange(count, device=device)[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1)
