"""One tiny random Wan in every format that people have: each loads through the node and makes the same video."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import folder_paths
import safetensors.torch
import torch
from checks_common import (
    Lacks,
    apply,
    causal_class,
    close,
    core_sampler,
    fails,
    has_ar_sampler,
    noise,
    our_sampler,
    pack,
    rollout_without_host,
    sample,
    tiny_model,
    tiny_state_dict,
)

import nodes as host_nodes

Weights = dict[str, torch.Tensor]
SPARSE = {"mode": "sparse", "block_tokens": 16, "persistent_frames": 3}
TWO_STEPS = torch.tensor([1.0, 0.8333333, 0.0])
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@contextmanager
def models_folder():
    """A folder in which the host finds models and LoRAs."""
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("diffusion_models", "loras"):
            folder_paths.add_model_folder_path(kind, folder)
        yield Path(folder)


def load(name: str, weights: str = "authors", dtype: str = "default", lora: str = "none"):
    """The loader node's MODEL, as the host runs it."""
    with torch.inference_mode():
        model = pack("nodes.loaders").SparseForcingModelLoader.execute(name, weights, dtype, lora).args[0]
    network = model.model.diffusion_model
    assert type(network).__name__ == causal_class() and model.model.model_sampling.shift == 5.0
    return model


def generated(model) -> torch.Tensor:
    """Three latent frames in chunks of one, each of which reads those before it."""
    return sample(model, our_sampler(1), noise(3), sigmas=TWO_STEPS)


def expected(sd: Weights) -> torch.Tensor:
    """The same by the pack alone."""
    return rollout_without_host(noise(3), 1, 1.0, sd, TWO_STEPS, mode="dense")


@functools.cache
def tiny(seed: int = 0) -> tuple[Weights, torch.Tensor]:
    """Weights, and what they make."""
    sd = tiny_state_dict(seed)
    return sd, expected(sd)


def makes(video: torch.Tensor, name: str, **choices) -> None:
    """The file makes this video."""
    close(generated(load(name, **choices)), video)


def prefixed(sd: Weights, *prefixes: str) -> Weights:
    return {"".join(prefixes) + key: value for key, value in sd.items()}


# --- torch files ---


def check_torch_files_of_both_formats_and_every_ending():
    sd, video = tiny()
    with models_folder() as folder:
        for ending, zipped in (("pt", True), ("pt", False), ("pth", True), ("ckpt", False)):
            name = f"{ending}{zipped}.{ending}"
            torch.save({"generator": sd}, folder / name, _use_new_zipfile_serialization=zipped)
            makes(video, name)


def check_wrappers_and_the_choice_of_the_average():
    (raw, raw_video), (average, average_video) = tiny(0), tiny(1)
    with models_folder() as folder:
        for wrapper in ("generator", "model", "module", "state_dict"):
            torch.save({wrapper: raw, "step": 7}, folder / f"{wrapper}.pt")
            makes(raw_video, f"{wrapper}.pt")
        torch.save({"state_dict": {"model": raw}}, folder / "nested.pt")
        makes(raw_video, "nested.pt")
        for ema, plain in (("generator_ema", "generator"), ("model_ema", "model")):
            torch.save({ema: average, plain: raw}, folder / f"{ema}.pt")
            makes(average_video, f"{ema}.pt", weights="ema")
            makes(raw_video, f"{ema}.pt", weights="raw")
            makes(average_video, f"{ema}.pt", weights="authors")
        torch.save({"generator_ema": average, "generator": raw}, folder / "longlive_base.pt")
        makes(raw_video, "longlive_base.pt", weights="authors")  # whose authors take the raw weights


def check_prefixes_of_training_code():
    sd, video = tiny()
    fronts = (
        ("model.",), ("module.",), ("_orig_mod.",), ("model._fsdp_wrapped_module.",), ("base_model.model.",),
        ("model.diffusion_model.",), ("transformer.",), ("module.", "model.", "_orig_mod."),
    )  # fmt: skip
    with models_folder() as folder:
        for i, front in enumerate(fronts):
            torch.save({"generator": prefixed(sd, *front)}, folder / f"{i}.pt")
            makes(video, f"{i}.pt")
        inside = {
            key.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): v for key, v in sd.items()
        }
        torch.save({"generator": inside}, folder / "inside.pt")
        makes(video, "inside.pt")


# --- safetensors ---


def check_safetensors_in_every_precision():
    sd, video = tiny()
    with models_folder() as folder:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            stored = {key: value.to(dtype) for key, value in sd.items()}
            safetensors.torch.save_file(stored, folder / "x.safetensors")
            model = load("x.safetensors")
            if dtype == torch.float32:
                close(generated(model), video)
            else:  # the host computes in 16 bits where it can
                want = expected({key: value.float() for key, value in stored.items()})
                assert error(generated(model), want) < 0.02


def check_shards_open_by_any_one_of_them_or_their_index():
    sd, video = tiny()
    with models_folder() as folder:
        names = [f"wan-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
        keys = sorted(sd)
        parts = {name: {key: sd[key] for key in keys[i::3]} for i, name in enumerate(names)}
        for name, part in parts.items():
            safetensors.torch.save_file(part, folder / name)
        index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
        (folder / "wan.safetensors.index.json").write_text(json.dumps(index))
        makes(video, names[1])
        makes(video, "wan.safetensors.index.json")
        (folder / names[2]).unlink()
        fails("of 3 shards, 1 are missing: wan-00003-of-00003.safetensors", load, names[0])


DIFFUSERS = {
    "self_attn.": "attn1.", "cross_attn.": "attn2.", ".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.",
    ".o.": ".to_out.0.", "ffn.0.": "ffn.net.0.proj.", "ffn.2.": "ffn.net.2.", "norm3.": "norm2.",
    "modulation": "scale_shift_table", "head.scale_shift_table": "scale_shift_table", "head.head.": "proj_out.",
    "time_embedding.0.": "condition_embedder.time_embedder.linear_1.",
    "time_embedding.2.": "condition_embedder.time_embedder.linear_2.",
    "text_embedding.0.": "condition_embedder.text_embedder.linear_1.",
    "text_embedding.2.": "condition_embedder.text_embedder.linear_2.",
    "time_projection.1.": "condition_embedder.time_proj.",
}  # fmt: skip


def check_the_names_of_diffusers():
    (sd, video), renamed = tiny(), {}
    for key, value in sd.items():
        name = key
        for ours, theirs in DIFFUSERS.items():
            name = name.replace(ours, theirs)
        renamed[name] = value
    assert "blocks.1.attn2.to_out.0.weight" in renamed and "scale_shift_table" in renamed
    with models_folder() as folder:
        safetensors.torch.save_file(renamed, folder / "x.safetensors")
        makes(video, "x.safetensors")


def check_a_converted_file_is_the_hosts_own_autoregressive_model():
    sd, video = tiny()
    with models_folder() as folder:
        torch.save({"generator_ema": prefixed(sd, "model.")}, folder / "self_forcing_dmd.pt")
        pack("sparse_attn.convert").convert(folder / "self_forcing_dmd.pt", folder / "x.safetensors")
        makes(video, "x.safetensors")
        (model,) = host_nodes.UNETLoader().load_unet("x.safetensors", "default")
        assert type(model.model.diffusion_model).__name__ == causal_class()
        if has_ar_sampler():
            close(sample(model, core_sampler(1), noise(3), sigmas=TWO_STEPS), video)
        for patched in (model, apply(model, mode="dense")):
            close(generated(patched), video)


# --- LoRA files that belong to a checkpoint ---

LAYER = "blocks.1.self_attn.q"


def check_a_lora_of_its_own_beside_the_base_or_inside_it():
    sd = tiny_state_dict()
    generator = torch.Generator().manual_seed(3)
    down, up = torch.randn(4, 256, generator=generator), 0.1 * torch.randn(256, 4, generator=generator)
    video = expected({**sd, f"{LAYER}.weight": sd[f"{LAYER}.weight"] + up @ down})
    inside = {key.replace(f"{LAYER}.", f"{LAYER}.base_layer."): value for key, value in sd.items()}
    inside |= {f"{LAYER}.lora_A.default.weight": down, f"{LAYER}.lora_B.default.weight": up}
    with models_folder() as folder:
        torch.save({"generator": sd}, folder / "base.pt")
        torch.save({"generator": prefixed(inside, "base_model.model.")}, folder / "both.pt")
        for kind, front, names in (
            ("peft", "base_model.model.", ("lora_A.weight", "lora_B.weight")),
            ("kohya", "lora_unet_", ("lora_down.weight", "lora_up.weight")),
            ("comfy", "diffusion_model.", ("lora_A.weight", "lora_B.weight")),
        ):
            layer = LAYER.replace(".", "_") if kind == "kohya" else LAYER
            halves = {f"{front}{layer}.{name}": half for name, half in zip(names, (down, up), strict=True)}
            torch.save({"generator_lora": halves}, folder / f"{kind}.pt")
            makes(video, "base.pt", lora=f"{kind}.pt")
        makes(video, "both.pt")
        fails("is a LoRA, which needs its base model", load, "peft.pt")


# --- 8 bits ---


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Mean difference over mean size."""
    return ((got - want).abs().mean() / want.abs().mean()).item()


def report(what: str, value: float) -> None:
    sys.stderr.write(f"         {what}: {value:.2e}\n")


def matrices(sd: Weights) -> list[str]:
    return [key for key, value in sd.items() if key.startswith("blocks.") and value.ndim == 2]


def scaled(sd: Weights, newer: bool) -> tuple[Weights, Weights]:
    """Matrices in 8 bits with a scale each, by the older or the newer names -> (the file's tensors, what they mean).

    Where a file has the older names, an older host keeps all its linear layers in 8 bits, biases too.
    """
    file, meant = dict(sd), dict(sd)
    if not newer and not pack("nodes.host").reads_comfy_quant():
        linear = {key.removesuffix("weight") for key, value in sd.items() if value.ndim == 2}
        meant |= {
            key: value.to(E4M3).float() for key, value in sd.items() if f"{key.rpartition('.')[0]}." in linear
        }
    for key in matrices(sd):
        layer, scale = key.removesuffix("weight"), sd[key].abs().max() / 400
        file[key] = (sd[key] / scale).to(E4M3)
        meant[key] = file[key].float() * scale
        file[layer + ("weight_scale" if newer else "scale_weight")] = scale
        if newer:
            conf = json.dumps({"format": "float8_e4m3fn"}).encode()
            file[layer + "comfy_quant"] = torch.tensor(list(conf), dtype=torch.uint8)
    return file if newer else file | {"scaled_fp8": torch.zeros(0).to(E4M3)}, meant


def check_eight_bits_with_scales():
    sd, video = tiny()
    with models_folder() as folder:
        for newer in (False, True):
            file, meant = scaled(sd, newer)
            safetensors.torch.save_file(prefixed(file, "model.diffusion_model."), folder / "x.safetensors")
            if newer and not pack("nodes.host").reads_comfy_quant():
                fails("newer than this ComfyUI", load, "x.safetensors")
                continue
            got = generated(load("x.safetensors"))
            report(f"scaled fp8, newer={newer}, against float32", error(got, video))
            close(got, expected(meant))
            assert 0 < error(got, video) < 0.05


def check_eight_bits_as_storage():
    sd, plain = tiny()
    with models_folder() as folder:
        safetensors.torch.save_file(sd, folder / "x.safetensors")
        for dtype, kind, bound in (("fp8_e4m3fn", E4M3, 0.1), ("fp8_e5m2", E5M2, 0.2)):
            model = load("x.safetensors", dtype=dtype)
            layer = model.model.diffusion_model.blocks[0].ffn[0]
            assert layer.weight.dtype == kind
            ours = generated(model)
            (other,) = host_nodes.UNETLoader().load_unet("x.safetensors", dtype)
            assert torch.equal(generated(other), ours)
            report(f"{dtype} storage against float32", error(ours, plain))
            assert 0 < error(ours, plain) < bound
            sparse = sample(apply(model, **SPARSE), our_sampler(3), noise(6))
            want = rollout_without_host(noise(6), 3, 1.0, sd, **SPARSE)
            report(f"{dtype} storage, mode sparse", error(sparse, want))
            assert 0 < error(sparse, want) < 2 * bound  # a block may be chosen that would not have been


# --- plain models, and GGUF ---


def check_a_plain_model_without_the_mark():
    """What GGUF loaders and older files give: the host's ordinary Wan, with its shift of 8."""
    model = tiny_model(causal=False)
    for patched in (model, apply(model, mode="dense")):
        close(generated(patched), tiny()[1])
    sparse = sample(apply(model, **SPARSE), our_sampler(3), noise(9), cfg=3.0)
    close(sparse, rollout_without_host(noise(9), 3, 3.0, **SPARSE), 1e-4)


def gguf_pack():
    """The GGUF loader pack, at COMFYUI_GGUF_PATH (default ~/ComfyUI-GGUF), loaded as the host loads packs."""
    path = Path(os.environ.get("COMFYUI_GGUF_PATH", Path.home() / "ComfyUI-GGUF"))
    if not (path / "__init__.py").is_file():
        raise Lacks(f"a GGUF loader pack at {path}: set COMFYUI_GGUF_PATH to a checkout of one")
    if importlib.util.find_spec("gguf") is None:
        raise Lacks("the Python package gguf, which the GGUF loader pack needs")
    if "gguf_pack" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "gguf_pack", path / "__init__.py", submodule_search_locations=[str(path)]
        )
        sys.modules["gguf_pack"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["gguf_pack"])
    return sys.modules["gguf_pack"]


def write_gguf(path: Path, sd: Weights, kind: str, stored: Callable[[str], bool]) -> Weights:
    """Write a GGUF file with the chosen matrices as `kind`, the rest in float32; returns what its numbers mean."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    writer, meant = gguf.GGUFWriter(path, arch="wan"), {}
    for key, value in sd.items():
        target = kinds[kind] if stored(key) else kinds.F32
        if value.ndim > 4:  # more than the format has
            writer.add_array(f"comfy.gguf.orig_shape.{key}", [*value.shape])
            value = value.flatten(0, value.ndim - 4)
        data = gguf.quants.quantize(value.numpy(), target)
        writer.add_tensor(key, data, raw_dtype=target)
        meant[key] = torch.from_numpy(gguf.quants.dequantize(data, target)).view(sd[key].shape)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return meant


def check_gguf_files_through_a_gguf_loader():
    loader = gguf_pack().NODE_CLASS_MAPPINGS["UnetLoaderGGUFAdvanced"]
    sd, video = tiny()
    with models_folder() as folder:
        for kind in ("Q8_0", "F16", "Q4_0"):
            meant = write_gguf(folder / f"{kind}.gguf", sd, kind, set(matrices(sd)).__contains__)
            with torch.inference_mode():
                (model,) = loader().load_unet(f"{kind}.gguf", dequant_dtype="float32")
            assert type(model.model.diffusion_model).__name__ == "WanModel"
            for patched in (model, apply(model, mode="dense")):
                close(generated(patched), expected(meant))
            report(f"GGUF {kind} against float32", error(generated(model), video))
            sparse = sample(apply(model, **SPARSE), our_sampler(3), noise(9), cfg=3.0)
            close(sparse, rollout_without_host(noise(9), 3, 3.0, meant, **SPARSE), 1e-4)
            with torch.inference_mode():  # only now: the loader keeps its precision for all models at once
                (usual,) = loader().load_unet(f"{kind}.gguf")
            report(f"GGUF {kind}, made 16 bits by its loader", error(generated(usual), expected(meant)))
            assert error(generated(usual), expected(meant)) < 2e-3
        fails("A GGUF file opens in a GGUF loader", load, "Q8_0.gguf")


# --- refusals ---


def check_a_large_model_is_refused_before_it_is_read():
    """A header of Wan 14B over a file of holes: 28.6 GB in bfloat16, for a machine of 16."""
    shapes = pack("sparse_attn.checkpoint").wan_shapes(5120, 13824, 40)
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    module = pack("nodes.loaders")
    real, module.memory_of_this_machine = module.memory_of_this_machine, lambda: 16_000_000_000
    try:
        with models_folder() as folder:
            with open(folder / "wan14b.safetensors", "wb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
                file.truncate(8 + len(header) + end)
            fails(
                "needs 28.6 GB of memory for its weights alone, and 16.0 GB are free",
                load,
                "wan14b.safetensors",
            )
    finally:
        module.memory_of_this_machine = real
    assert real() > 0


class Hostile:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def check_a_hostile_pickle_is_refused_and_does_not_run():
    import pickle

    with models_folder() as folder:
        ran = folder / "ran"
        torch.save({"generator": tiny_state_dict(), "extra": Hostile(ran)}, folder / "zip.pt")
        torch.save(Hostile(ran), folder / "old.pth", _use_new_zipfile_serialization=False)
        (folder / "bare.ckpt").write_bytes(pickle.dumps({"generator": Hostile(ran)}, protocol=2))
        for name in ("zip.pt", "old.pth", "bare.ckpt"):
            fails("is refused: it is a pickle that asks for more than tensors and plain data", load, name)
            fails("Nothing in it was run. Use a safetensors file", load, name)
            assert not ran.exists()
        torch.save({"generator": tiny_state_dict()}, folder / "good.pt")
        torch.save({"generator_lora": Hostile(ran)}, folder / "lora.pt")
        fails("lora.pt is refused", load, "good.pt", lora="lora.pt")
        assert not ran.exists()
