"""The world model's text encoder as a ComfyUI CLIP, so that CLIP Text Encode works with it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.sd
import torch
from torch import Tensor

from ..sparse_attn.world.text import WorldTextEncoder

TOKENS = "sparse_forcing_world"


class WorldTokenizer:
    """Passes the prompt on as text; words are looked up by the encoder. Emphasis syntax has no meaning here."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict | None = None):
        pass

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, **kwargs: Any
    ) -> dict[str, list]:
        return {TOKENS: [[(text, 1.0)]]}

    def state_dict(self) -> dict:
        return {}


class WorldTextModel(torch.nn.Module):
    """What the host expects of a text model, around `WorldTextEncoder`."""

    disable_offload = True  # it has bare parameters, which the host's paging does not move; it is small

    def __init__(self, state_dict: dict[str, Tensor], device: Any):
        super().__init__()
        self.encoder = WorldTextEncoder.from_state_dict(state_dict, ops=comfy.ops.manual_cast)
        self.encoder.to(device=device, dtype=torch.float32).requires_grad_(False)
        self.dtypes = {torch.float32}

    def encode_token_weights(self, tokens: dict[str, list]) -> tuple[Tensor, None]:
        """Tokens of one prompt -> rows [1, 512, 4096] float32, zero after the prompt, and no pooled vector."""
        rows = self.encoder.encode([text for row in tokens[TOKENS] for text, _ in row])
        return rows.to(comfy.model_management.intermediate_device(), torch.float32), None

    def set_clip_options(self, options: dict) -> None:
        """Layer choice and the like have no meaning for this encoder."""

    def reset_clip_options(self) -> None:
        """See set_clip_options."""


def world_clip(state_dict: dict[str, Tensor]) -> comfy.sd.CLIP:
    """A CLIP over the world model's text weights."""

    def text_model(device: Any, **_: Any) -> WorldTextModel:
        return WorldTextModel(state_dict, device)

    target = SimpleNamespace(params={}, clip=text_model, tokenizer=WorldTokenizer)
    return comfy.sd.CLIP(target, parameters=sum(t.numel() for t in state_dict.values()))
