"""Low-rank updates (LoRA) in checkpoint files: told apart from weights, fitted to layers, merged."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .checkpoint_error import CheckpointError, some_names

StateDict = dict[str, Tensor]

LORA_PART = re.compile(
    r"(?P<layer>.+?)\.(?:(?P<down>lora_A|lora_down)|(?P<up>lora_B|lora_up))(?:\.default)?(?:\.weight)?"
)


@dataclass(frozen=True)
class LoraPair:
    """A low-rank update of one layer's weight: + alpha / rank * up @ down.

    down [rank, in, ...], up [out, rank, ...], alpha None: equal to the rank, as LongLive's.
    """

    down: Tensor
    up: Tensor
    alpha: float | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def merge(self, name: str, weight: Tensor) -> Tensor:
        """The updated weight, computed in float32, in the dtype and shape of `weight`.

        Raises CheckpointError where shapes do not fit or the weight is stored in 8 bits.
        """
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise CheckpointError(
                f"{name} is stored as {weight.dtype}: a LoRA can be merged into weights of 16 or 32 bits only. Merge "
                "it into the original model, or load it with the host's LoRA loader."
            )
        down, up = self.down.float().flatten(1), self.up.float().flatten(1)
        fits = weight.ndim > 1 and weight.shape[0] == up.shape[0] and weight[0].numel() == down.shape[1]
        if not fits or up.shape[1] != self.rank:
            raise CheckpointError(
                f"the LoRA of {name} is {list(self.up.shape)} x {list(self.down.shape)}, its weight "
                f"{list(weight.shape)}: it belongs to another model"
            )
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        return (weight.float() + scale * (up @ down).view(weight.shape)).to(weight.dtype)


def split_lora(sd: StateDict, name: str, alpha: float | None = None) -> tuple[StateDict, dict[str, LoraPair]]:
    """Bare-named tensors -> (weights without PEFT's `base_layer`, {layer: its LoRA pair}).

    alpha: of pairs without one of their own. Raises CheckpointError for a pair that lacks a half.
    """
    if not any(LORA_PART.fullmatch(key) for key in sd):
        return sd, {}
    weights: StateDict = {}
    halves: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key, value in sd.items():
        if part := LORA_PART.fullmatch(key):
            halves.setdefault(part["layer"], {})["down" if part["down"] else "up"] = value
        elif key.endswith(".alpha") and value.numel() == 1:
            alphas[key.removesuffix(".alpha")] = float(value)
        else:
            weights[key.replace(".base_layer.", ".")] = value
    broken = [
        layer for layer, pair in halves.items() if len(pair) < 2 or any(t.ndim < 2 for t in pair.values())
    ]
    if broken:
        raise CheckpointError(
            f"{name} holds no whole LoRA pair of {some_names(sorted(broken))}: download it again"
        )
    pairs = {layer: LoraPair(**pair, alpha=alphas.get(layer, alpha)) for layer, pair in halves.items()}
    return weights, pairs


def fit_lora(weights: StateDict, pairs: dict[str, LoraPair], name: str) -> dict[str, LoraPair]:
    """The pairs by the layers' names. Raises CheckpointError for a layer that the model lacks."""
    layers = {key.removesuffix(".weight") for key in weights if key.endswith(".weight")}
    # kohya's tools write a layer's name without dots
    flat = {"lora_unet_" + layer.replace(".", "_"): layer for layer in layers}
    fitted = {flat.get(layer, layer): pair for layer, pair in pairs.items()}
    if strange := sorted(fitted.keys() - layers):
        raise CheckpointError(
            f"{name} has LoRA weights for layers that the model lacks: {some_names(strange)}"
        )
    return fitted


def adapter_alpha(path: Path) -> float | None:
    """PEFT writes alpha beside the weights, not with them. Raises CheckpointError for kinds that are no plain LoRA."""
    config = path.parent / "adapter_config.json"
    if not config.is_file():
        return None
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        unusual = [key for key in ("use_rslora", "use_dora") if content.get(key)]
        alpha = None if content.get("lora_alpha") is None else float(content["lora_alpha"])
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{config} cannot be read ({error}): download it again") from error
    if unusual:
        raise CheckpointError(
            f"{config} asks for {unusual[0]}, which is not supported: merge it where it was trained"
        )
    return alpha
