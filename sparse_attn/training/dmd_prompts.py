"""The text of a run's clips."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rollout import upload
from .dmd_config import seed_of

TEXT_ROWS = 512


@dataclass
class Prompts:
    """Text of the clips: one tensor of rows [words, C] a prompt, and the rows of the prompt that guidance points away
    from. Rows after the words are zero, as Wan's are."""

    rows: Sequence[Tensor]
    negative: Tensor

    def batch(self, picks: list[int], device: str) -> Tensor:
        """Rows [B, 512, C] float32 of prompts by number."""
        return upload(torch.stack([padded_rows(self.rows[i]) for i in picks]), device)


def padded_rows(rows: Tensor) -> Tensor:
    """[words, C] -> [512, C] float32, zero after the words; cut there if there are more."""
    return F.pad(rows.float()[:TEXT_ROWS], (0, 0, 0, max(0, TEXT_ROWS - len(rows))))


def prompt_of(seed: int, clip: int, count: int) -> int:
    """The number of a run's clip's prompt: all `count` prompts once in an order of their own, then in another."""
    epoch, at = divmod(clip, count)
    return random.Random(seed_of(seed, "order", epoch)).sample(range(count), count)[at]
