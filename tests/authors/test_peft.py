"""PEFT's own files and its own merge, beside how they are read here. Skips where peft is not installed."""

import pytest
import torch
from sparse_forcing_pack.sparse_attn.checkpoint import open_checkpoint, recognise_wan
from sparse_forcing_pack.sparse_attn.wan import WanModel

peft = pytest.importorskip("peft")


def test_loras_merge_as_peft_merges_them(tmp_path):
    """The adapter as PEFT saves it, as LongLive's trainer wraps it, and the whole wrapped model in one file."""
    torch.manual_seed(0)
    model = WanModel(dim=256, ffn_dim=192, num_heads=2, num_layers=2)
    base, adapter = tmp_path / "base.pt", tmp_path / "adapter"
    torch.save(
        {"generator": {f"model.{key}": value.clone() for key, value in model.state_dict().items()}}, base
    )
    layers = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    targets = [
        name for name in layers if name.startswith("blocks.")
    ]  # as LongLive's utils/lora_utils.py chooses
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:  # PEFT starts it at zero
                weight.normal_()
    wrapped.save_pretrained(adapter)
    torch.save({"generator_lora": peft.get_peft_model_state_dict(wrapped)}, adapter / "lora.pt")
    torch.save({"generator": wrapped.state_dict()}, adapter / "full.pt")
    expected = wrapped.merge_and_unload().state_dict()

    pairs = (
        (base, adapter / "adapter_model.safetensors"),
        (base, adapter / "lora.pt"),
        (adapter / "full.pt", None),
    )
    for path, lora in pairs:
        checkpoint = open_checkpoint(path, lora=lora)
        assert recognise_wan(checkpoint.weights, "x").num_layers == 2
        assert checkpoint.weights.keys() == expected.keys() and len(checkpoint.lora) == len(targets)
        for name, weight in expected.items():
            torch.testing.assert_close(checkpoint.tensor(name), weight, rtol=0, atol=1e-6)
