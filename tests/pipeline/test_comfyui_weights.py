"""benchmarks/comfyui_weights.py: the files are what their formats say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def weights(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import comfyui_weights

    yield comfyui_weights
    for name in ("comfyui_weights", "_root"):
        sys.modules.pop(name, None)


def test_write_all_bf16_is_marked_autoregressive(weights, tmp_path):
    weights.write_all(tmp_path, ["tiny"], ["bf16"])
    path = tmp_path / "models" / "diffusion_models" / "random_tiny.safetensors"
    assert {weight.dtype for weight in load_file(path).values()} == {torch.bfloat16}
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["config"])["transformer"]["causal_ar"] is True


def test_write_all_fp8_is_the_bf16_file_in_8_bits(weights, tmp_path):
    weights.write_all(tmp_path, ["tiny"], ["bf16", "fp8"])
    folder = tmp_path / "models" / "diffusion_models"
    exact, found = (
        load_file(folder / "random_tiny.safetensors"),
        load_file(folder / "random_tiny_fp8.safetensors"),
    )
    layers = [name.removesuffix(".comfy_quant") for name in found if name.endswith(".comfy_quant")]
    assert len(layers) == 2 * 10, "q, k, v, o twice and two feed-forward layers per block"
    for layer in layers:
        assert json.loads(bytes(found[f"{layer}.comfy_quant"].tolist())) == {"format": "float8_e4m3fn"}
        weight = found[f"{layer}.weight"]
        assert weight.dtype == torch.float8_e4m3fn and found[f"{layer}.weight_scale"].shape == ()
        expected = exact[f"{layer}.weight"].float()
        error = weight.float() * found[f"{layer}.weight_scale"] - expected
        assert error.norm() / expected.norm() < 0.04


def test_as_q8_keeps_values_to_half_a_step(weights):
    torch.manual_seed(0)
    weight = torch.randn(6, 64)
    blocks = weights.as_q8(weight).view(6, 2, 34)
    scale = blocks[..., :2].contiguous().view(torch.float16).float()
    values = blocks[..., 2:].contiguous().view(torch.int8).float()
    error = (scale * values).reshape(6, 64) - weight
    assert error.abs().max() <= 0.51 * scale.max()
    assert weights.as_q8(torch.zeros(1, 32)).count_nonzero() == 0


def test_write_all_vae_has_the_published_shapes(weights, tmp_path):
    weights.write_all(tmp_path, [], ["vae"])
    wan = load_file(tmp_path / "models" / "vae" / "random_wan_vae.safetensors")
    tiny = load_file(tmp_path / "models" / "vae" / "random_tiny_vae.safetensors")
    assert wan["decoder.head.0.gamma"].shape[0] == 96 and wan["conv2.weight"].shape[0] == 16
    assert tiny["decoder.1.weight"].shape == (256, 16, 3, 3) and tiny["decoder.22.bias"].shape == (3,)
