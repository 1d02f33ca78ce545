"""What every word of a prompt should know: the sprite whose phrase it stands in.

A drawing's loss says little about which colour goes with which shape and motion: after half an hour of it the word that
names a motion told its sprite's shape in 55 of 100 held-out prompts. Asked for it directly, the encoder learns it in
minutes, and the transformer can read a whole sprite off any one of its words.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..world.scene import COLOURS, MOTIONS, SHAPES, SIZES
from ..world.text import WorldTextEncoder, tokenize

ATTRIBUTES = (tuple(COLOURS), tuple(SHAPES), tuple(SIZES), tuple(m.split()[-1] for m in MOTIONS.values()))
NOWHERE = -1  # label of a word that belongs to no sprite


@functools.cache
def _ids(names: tuple[str, ...], device: torch.device) -> Tensor:
    """Word ids of names, uploaded once: a step that is captured as a graph must not upload."""
    return torch.tensor([tokenize(name)[0] for name in names], device=device)


def attributes_of(ids_BN: Tensor) -> Tensor:
    """Word ids of prompts as `to_prompt` writes them -> indices into ATTRIBUTES [B, N, 4]; NOWHERE where a word belongs
    to no sprite, or its sprite does not say."""
    (conjunction,), (end,) = tokenize("and"), tokenize("over")
    phrase = (ids_BN == conjunction).cumsum(1)
    inside = ((ids_BN == end).cumsum(1) == 0) & (ids_BN != conjunction) & (ids_BN != 0)
    together = (phrase[:, :, None] == phrase[:, None, :]) & inside[:, :, None] & inside[:, None, :]
    found = []
    for names in ATTRIBUTES:
        number = torch.arange(1, len(names) + 1, device=ids_BN.device)
        # 0 where a word names no such attribute
        value = ((ids_BN[..., None] == _ids(names, ids_BN.device)) * number).sum(-1)
        found.append((together * value[:, None, :]).amax(2) - 1)
    return torch.stack(found, dim=-1)


class WordReader(nn.Module):
    """Linear readings of the four attributes, off the encoder's last features; only for training."""

    def __init__(self, dim: int):
        super().__init__()
        self.heads = nn.Linear(dim, sum(map(len, ATTRIBUTES)))

    def loss(self, text: WorldTextEncoder, ids_BN: Tensor) -> Tensor:
        """Mean cross-entropy over words and attributes, in nats; 0 where no word belongs to a sprite."""
        readings = self.heads(text.words(ids_BN)).float().split([len(names) for names in ATTRIBUTES], dim=-1)
        labels = attributes_of(ids_BN)
        told = (labels != NOWHERE).sum().clamp(min=1)
        total = sum(
            F.cross_entropy(reading.flatten(0, 1), label.flatten(), ignore_index=NOWHERE, reduction="sum")
            for reading, label in zip(readings, labels.unbind(-1), strict=True)
        )
        return total / told
