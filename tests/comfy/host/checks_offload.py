"""Weights that the host keeps away from the device: what it calls low VRAM, as far as a CPU can play it.

Layers then fetch their weights, LoRA included, for every product. A CPU is device and storage at once, so what is shown
is the arithmetic; how long moving takes, and that it fits, is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import comfy.model_patcher
import torch
from checks_common import MODES, add_lora, apply, close, noise, our_sampler, pack, sample, tiny_model

ROOM = 400_000  # bytes that the device has for weights; the tiny model has more than ten times as many


@contextmanager
def little_room() -> Iterator[list[bool]]:
    """Every load finds only ROOM; -> whether each of them left weights away."""
    away: list[bool] = []
    real = comfy.model_patcher.ModelPatcher.load

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        real(self, device_to, lowvram_model_memory=ROOM, force_patch_weights=False, full_load=False)
        away.append(self.model.model_lowvram)

    with patch.object(comfy.model_patcher.ModelPatcher, "load", load):
        yield away


def offloaded(model, x: torch.Tensor, **how) -> torch.Tensor:
    with little_room() as away:
        video = sample(model, our_sampler(3), x, **how)
    assert away and all(away), "the model was loaded whole"
    return video


def check_offloaded_weights_make_the_same_video():
    x = noise(9)
    for settings in ({"mode": "dense"}, MODES["window"], MODES["sparse"]):
        for dressed in (lambda model: model, add_lora):
            want = sample(apply(dressed(tiny_model()), **settings), our_sampler(3), x, cfg=3.0)
            close(offloaded(apply(dressed(tiny_model()), **settings), x, cfg=3.0), want, 1e-4)


def check_a_model_nobody_patched_is_offloaded_alike():
    close(
        offloaded(add_lora(tiny_model()), noise(6)),
        sample(add_lora(tiny_model()), our_sampler(3), noise(6)),
        1e-4,
    )


def check_the_fast_pass_takes_offloaded_weights_with_their_lora():
    """Where there is room for a copy, it is made of what the host's layers would fetch."""
    x = noise(9)
    want = sample(apply(add_lora(tiny_model()), **MODES["sparse"]), our_sampler(3), x)
    with patch.object(pack("nodes.fast_pass"), "DEVICES", ("cpu",)):
        close(offloaded(apply(add_lora(tiny_model()), **MODES["sparse"]), x), want, 1e-4)
