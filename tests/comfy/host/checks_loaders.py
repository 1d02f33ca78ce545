"""The loaders: files that people have, files that are refused, and the embedded world model."""

from __future__ import annotations

import tempfile
from pathlib import Path

import folder_paths
import safetensors.torch
import torch
from checks_common import (
    apply,
    causal_class,
    close,
    fails,
    noise,
    our_sampler,
    pack,
    sample,
    stream_video,
    tiny_model,
    tiny_state_dict,
)


def check_model_loader_reads_what_people_have():
    module = pack("nodes.loaders")
    sd, ema = tiny_state_dict(0), tiny_state_dict(1)
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.add_model_folder_path("diffusion_models", folder)
        training = {"generator": {f"model.{k}": v for k, v in sd.items()},
                    "generator_ema": {f"model._fsdp_wrapped_module.{k}": v for k, v in ema.items()}}  # fmt: skip
        torch.save(training, f"{folder}/tiny.pt")
        for weights, want in (("authors", ema), ("ema", ema), ("raw", sd)):
            model = load(module, "tiny.pt", weights)
            network = model.model.diffusion_model
            assert type(network).__name__ == causal_class() and model.model.model_sampling.shift == 5.0
            assert torch.equal(network.blocks[1].ffn[0].weight, want["blocks.1.ffn.0.weight"])
        again = model.cached_patcher_init[0](*model.cached_patcher_init[1], disable_dynamic=True)
        assert type(again.model.diffusion_model).__name__ == causal_class()

        safetensors.torch.save_file(scaled_fp8(sd), f"{folder}/fp8.safetensors")
        x = noise(3)
        want = sample(tiny_model(), our_sampler(3), x)
        with torch.inference_mode():  # as the host runs every node
            got = sample(load(module, "fp8.safetensors"), our_sampler(3), x)
        assert 0 < (got - want).abs().mean() < 0.05 * want.abs().mean()

        safetensors.torch.save_file(sd, f"{folder}/short.safetensors")
        data = Path(folder, "short.safetensors").read_bytes()
        Path(folder, "short.safetensors").write_bytes(data[: len(data) // 2])
        fails("is cut short", load, module, "short.safetensors")
        Path(folder, "cut.pt").write_bytes(Path(folder, "tiny.pt").read_bytes()[:5000])
        fails("is cut short", load, module, "cut.pt")
        torch.save({"model": Hostile(Path(folder, "ran"))}, f"{folder}/hostile.pt")
        fails("is refused", load, module, "hostile.pt")
        assert not Path(folder, "ran").exists()
        lora = {
            "blocks.1.ffn.0.lora_A.weight": torch.ones(1, 256),
            "blocks.1.ffn.0.lora_B.weight": torch.ones(256, 1),
        }
        Path(folder, "loras").mkdir()
        folder_paths.add_model_folder_path("loras", f"{folder}/loras")
        torch.save({"generator_lora": lora}, f"{folder}/loras/lora.pt")
        node = module.SparseForcingModelLoader
        output = node.execute("tiny.pt", "raw", "default", "lora.pt")
        merged = output.args[0].model.diffusion_model.blocks[1].ffn[0].weight
        close(merged, sd["blocks.1.ffn.0.weight"] + 1.0)
        assert "LoRA on 1 layers" in output.ui.value and "Settings of its authors" in output.ui.value
        torch.save(sd, f"{folder}/causal-forcing-framewise-2step.pt")
        model = load(module, "causal-forcing-framewise-2step.pt")
        assert model.model_options["transformer_options"][pack("nodes.session").FIRST_STEPS] == 4
        module.memory_of_this_machine, real = (lambda: 1000), module.memory_of_this_machine
        fails("memory", load, module, "tiny.pt")
        module.memory_of_this_machine = real
        sd["blocks.0.stranger"] = sd.pop("blocks.1.modulation")
        safetensors.torch.save_file(sd, f"{folder}/wrong.safetensors")
        fails(
            "1 missing: blocks.1.modulation. 1 unexpected: blocks.0.stranger",
            load,
            module,
            "wrong.safetensors",
        )


def load(module, name: str, weights: str = "authors"):
    node = module.SparseForcingModelLoader
    assert node.fingerprint_inputs(model_name=name, weights=weights)[0] > 0
    return node.execute(name, weights, "default").args[0]


def scaled_fp8(sd: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The checkpoint with its blocks' matrices in scaled 8 bits, as repackaged files have them."""
    out = {"scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)}
    for key, value in sd.items():
        if key.startswith("blocks.") and value.ndim == 2:
            scale = value.abs().max() / 400
            out[key] = (value / scale).to(torch.float8_e4m3fn)
            out[key.removesuffix("weight") + "scale_weight"] = scale
        else:
            out[key] = value
    return out


class Hostile:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def check_world_model_works_with_core_nodes():
    model, clip, vae = pack("nodes.loaders").SparseForcingWorldModel.execute().args
    with torch.inference_mode():
        words = clip.encode_from_tokens_scheduled(clip.tokenize("a large red circle"))
        rows = words[0][0]
        assert rows.shape == (1, 512, 4096) and rows[0, 3].abs().max() > 0 and rows[0, 4:].abs().max() == 0
        want = pack("sparse_attn.world.model").load_world_model().text.encode(["a large red circle"])
        close(rows, want)
        assert clip.encode_from_tokens_scheduled(clip.tokenize(""))[0][0].shape == (1, 512, 4096)
        mine = pack("sparse_attn.world.model").load_world_model().vae
        x = noise(3, 2, 4)
        raw = model.model.process_latent_out(x)
        close(vae.decode(raw)[0], ((mine.decode(x)[0].movedim(0, -1) + 1) / 2).clamp(0, 1), 1e-3)
    assert model.model.model_sampling.shift == 5.0
    assert stream_video(apply(model), vae, positive=words)[0].shape[0] == 21
