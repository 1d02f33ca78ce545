"""What people load: 8-bit files, LoRAs, GGUF and foreign layers, with room for 16-bit copies and without."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import comfy.model_patcher
import comfy.ops
import comfy.sd
import torch
from checks_common import (
    MODES,
    Lacks,
    add_lora,
    apply,
    close,
    log_said,
    noise,
    our_sampler,
    pack,
    sample,
    tiny_model,
    tiny_state_dict,
)
from checks_formats import scaled

GB = 10**9
ROOM, NO_ROOM = 100 * GB, GB // 2
MODE = {"mode": "window", "window_frames": 6, "sink_frames": 1}  # no choice that a rounding could turn


@contextmanager
def fast_with(free: int) -> Iterator[list[str]]:
    """The fast pass on a CPU with that many bytes of memory free; -> what the log says."""
    fast_pass = pack("nodes.fast_pass")
    memory = patch.object(fast_pass.comfy.model_management, "get_free_memory", lambda *_, **__: free)
    with log_said(logging.INFO) as said, patch.object(fast_pass, "DEVICES", ("cpu",)), memory:
        yield said


def served(model, ready: str, called: str = "ComfyUI's own linear layers", tolerance: float = 1e-4) -> None:
    """Both ways make the video of the host's own layers, and say which it is."""
    x = noise(9)
    for settings in (MODE, {"mode": "dense"}):
        want = sample(apply(model, **settings), our_sampler(3), x)
        for free, why in ((ROOM, ready), (NO_ROOM, called)):
            with fast_with(free) as said:
                got = sample(apply(model, **settings), our_sampler(3), x)
            assert len(said) == 1 and f"runs its fast pass: {why}" in said[0].replace("0.0 GB", "copies"), (
                said
            )
            close(got, want, tolerance)


def replace_linear(model, make) -> None:
    """Put make(layer) in the place of every linear layer."""
    network = model.model.diffusion_model
    for name, layer in pack("nodes.weights").linear_layers(network).items():
        owner, _, own = name.rpartition(".")
        setattr(network.get_submodule(owner), own, make(layer))


def check_weights_in_eight_bits_with_scales():
    if not pack("nodes.host").reads_comfy_quant():
        raise Lacks("files with comfy_quant")
    for newer in (True, False):
        file, _ = scaled(tiny_state_dict(), newer)
        with torch.inference_mode():  # as ComfyUI runs its loaders
            model = comfy.sd.load_diffusion_model_state_dict(file)
        served(model, "copies of weights were made ready on cpu")


def check_weights_stored_in_eight_bits():
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        model = comfy.sd.load_diffusion_model_state_dict(tiny_state_dict(), model_options={"dtype": dtype})
        assert model.model.diffusion_model.blocks[0].ffn[0].weight.dtype == dtype
        served(model, "copies of weights were made ready on cpu")


def check_weights_with_a_lora():
    """Merged by the host, and applied on the fly, as where memory is short."""
    served(add_lora(tiny_model()), "the model is as it was loaded", "the model is as it was loaded")
    model, x = tiny_model(), noise(6)
    want = sample(apply(add_lora(tiny_model()), **MODE), our_sampler(3), x)
    patched, on_the_fly = add_lora(model), model.clone()
    for key, patches in patched.patches.items():
        on_the_fly.add_weight_wrapper(key, comfy.model_patcher.LowVramPatch(key, {key: patches}))
    served(on_the_fly, "copies of weights were made ready on cpu")
    with fast_with(ROOM):
        close(sample(apply(on_the_fly, **MODE), our_sampler(3), x), want, 1e-4)


class Packed(torch.Tensor):
    """Imitates a tensor of ComfyUI-GGUF: bytes, and the shape that they mean."""

    tensor_shape: torch.Size

    @property
    def shape(self):
        return getattr(self, "tensor_shape", None) or self.size()


class GgufLinear(comfy.ops.manual_cast.Linear):
    """Imitates ComfyUI-GGUF's layer: its own way to ask for a weight, and bytes that no other layer could read."""

    def __init__(self, layer):
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        packed = layer.weight.detach().clone().view(torch.uint8).as_subclass(Packed)
        packed.tensor_shape = layer.weight.shape
        self.weight = torch.nn.Parameter(packed, requires_grad=False)
        self.bias = torch.nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        self.weight.tensor_shape = layer.weight.shape

    def get_weight(self, tensor, dtype):
        return tensor.as_subclass(torch.Tensor).view(torch.float32).to(dtype)

    def cast_bias_weight(self, input=None, dtype=None, device=None, bias_dtype=None):
        dtype = input.dtype if input is not None else dtype
        return self.get_weight(self.weight, dtype), self.bias.to(dtype)

    def forward(self, x):
        return torch.nn.functional.linear(x, *self.cast_bias_weight(x))


GgufLinear.__module__ = "custom_nodes.ComfyUI-GGUF.ops"


class Foreign(torch.nn.Module):
    """A linear layer of an unknown class, which computes in two halves."""

    def __init__(self, layer):
        super().__init__()
        self.halves = torch.nn.ModuleList([layer])
        self.weight = torch.nn.Parameter(torch.zeros(3), requires_grad=False)

    def forward(self, x):
        (layer,) = self.halves
        half = x.shape[-1] // 2
        w = layer.weight
        return x[..., :half] @ w[:, :half].T + x[..., half:] @ w[:, half:].T + layer.bias


Foreign.__module__ = "custom_nodes.another.layers"


def check_weights_of_gguf_layers():
    model = tiny_model()
    replace_linear(model, GgufLinear)
    served(model, "copies of weights were made ready on cpu")


def check_weights_of_layers_that_nobody_knows():
    model = tiny_model()
    replace_linear(model, Foreign)
    why = "ComfyUI's own linear layers, without CUDA graphs for"
    served(model, why, why)


def check_weights_without_room_leave_shortcuts_out():
    """8-bit copies need room, what passes share does not."""
    node = pack("nodes.apply").SparseForcingApply
    model = comfy.sd.load_diffusion_model_state_dict(
        tiny_state_dict(), model_options={"dtype": torch.float8_e4m3fn}
    )
    (model,) = node.execute(model, **MODES["sparse"], shortcuts="shared + fp8").args
    with fast_with(NO_ROOM) as said:
        sample(model, our_sampler(3), noise(9))
    assert "with shortcuts (router_once, reuse_persistent): ComfyUI's own" in said[0], said
    assert "takes no shortcuts (fp8)" in said[1], said
