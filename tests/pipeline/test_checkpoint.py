"""Checkpoint files: what opens, what is refused, and that nothing in a file ever runs."""

import argparse
import json
import os
import pickle
import random

import pytest
import torch
from safetensors.torch import save, save_file
from sparse_forcing_pack.sparse_attn.checkpoint import (
    CAUSAL_AR,
    CheckpointError,
    Header,
    WanShape,
    check_memory,
    describe_difference,
    is_causal_ar,
    is_diffusers,
    is_wan_vae,
    memory_need,
    open_checkpoint,
    read_checkpoint,
    read_header,
    recognise_wan,
    strip_prefixes,
    unwrap,
    wan_keys,
    wan_name,
    wan_shapes,
)
from sparse_forcing_pack.sparse_attn.convert import convert
from sparse_forcing_pack.sparse_attn.presets import CAUSAL_FORCING_2, FAMILY
from sparse_forcing_pack.sparse_attn.vae import WanVAE
from sparse_forcing_pack.sparse_attn.wan import WanModel

ONE, TWO = torch.ones(2), torch.full((2,), 2.0)


class Hostile:
    """Unpickling it writes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def wan() -> dict[str, torch.Tensor]:
    return WanModel(dim=256, ffn_dim=192, num_heads=2, num_layers=3).state_dict()


def merged(checkpoint):
    return {name: checkpoint.tensor(name) for name in checkpoint.weights}


# --- reading ---


def test_safetensors_with_its_metadata(tmp_path):
    save_file({"model.diffusion_model.a": ONE}, tmp_path / "x.safetensors", metadata=CAUSAL_AR)
    tensors, metadata = read_checkpoint(tmp_path / "x.safetensors")
    assert list(tensors) == ["a"]
    assert torch.equal(tensors["a"], ONE)
    assert is_causal_ar(metadata)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt"])
def test_torch_files_of_both_formats(tmp_path, suffix, zipped):
    path = tmp_path / f"x{suffix}"
    torch.save({"generator": {"model.a": ONE}}, path, _use_new_zipfile_serialization=zipped)
    tensors, metadata = read_checkpoint(path)
    assert torch.equal(tensors["a"], ONE)
    assert metadata == {}


def test_the_moving_average_is_an_option(tmp_path):
    torch.save({"generator": {"a": ONE}, "generator_ema": {"a": TWO}, "step": 7}, tmp_path / "x.pt")
    assert torch.equal(read_checkpoint(tmp_path / "x.pt")[0]["a"], TWO)
    assert torch.equal(read_checkpoint(tmp_path / "x.pt", ema=False)[0]["a"], ONE)


@pytest.mark.parametrize("by", ["torch", "pickle"])
def test_a_hostile_pickle_is_refused_and_does_not_run(tmp_path, by):
    mark, path = tmp_path / "it_ran", tmp_path / "evil.pt"
    content = {"generator": {"a": ONE}, "extra": Hostile(mark)}
    if by == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps({"extra": Hostile(mark)}, protocol=2))
    with pytest.raises(CheckpointError, match=r"evil\.pt is refused: .*mkdir.*Nothing in it was run"):
        read_checkpoint(path)
    assert not mark.exists()


def test_objects_of_training_code_are_refused_by_name(tmp_path):
    torch.save({"generator": {"a": ONE}, "args": argparse.Namespace(lr=1)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"argparse\.Namespace.*safetensors"):
        read_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.99])
def test_truncated_files(tmp_path, suffix, keep):
    path = tmp_path / f"half{suffix}"
    tensors = {name: torch.randn(50, 10) for name in "abcd"}
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(CheckpointError, match=rf"half{suffix} is cut short .*download it again"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_files_that_hold_something_else(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(FileNotFoundError, match=name):
        read_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{name} is empty"):
        read_checkpoint(path)
    path.write_bytes(b"<html>404 not found, please log in</html>")
    with pytest.raises(CheckpointError, match=rf"{name} is cut short or is no"):
        read_checkpoint(path)


def test_an_unknown_ending_is_refused(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"'\.gguf'.*\.safetensors, \.pt.*GGUF loader"):
        read_checkpoint(path)


def test_an_average_without_raw_weights_is_not_taken_for_them(tmp_path):
    torch.save({"generator_ema": {"a": TWO}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="moving average.*choose ema"):
        read_checkpoint(tmp_path / "x.pt", ema=False)


# --- shards ---


def shard(tmp_path, tensors, index=True):
    """Two files of one model, as diffusers' save_pretrained names them; returns their names."""
    names = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    parts = dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])
    for name, part in zip(names, parts):
        save_file(part, tmp_path / name)
    if index:
        weight_map = {key: name for name, part in zip(names, parts) for key in part}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return names


@pytest.mark.parametrize("opened", ["model.safetensors.index.json", "model-00002-of-00002.safetensors"])
def test_shards_are_read_together(tmp_path, wan, opened):
    shard(tmp_path, wan, index=opened.endswith("json"))
    checkpoint = open_checkpoint(tmp_path / opened)
    assert checkpoint.files == 2
    assert checkpoint.weights.keys() == wan.keys()
    assert all(torch.equal(weight, wan[key]) for key, weight in merged(checkpoint).items())


def test_a_missing_shard_and_a_bad_index(tmp_path):
    names = shard(tmp_path, {"a": ONE, "b": TWO})
    (tmp_path / names[0]).unlink()
    for opened in (names[1], "model.safetensors.index.json"):
        with pytest.raises(CheckpointError, match=f"of 2 shards, 1 are missing: {names[0]}|1 are missing"):
            read_checkpoint(tmp_path / opened)
    index = tmp_path / "model.safetensors.index.json"
    for text in ("[" * 100_000, "{}", '{"weight_map": 3}', "no json"):
        index.write_text(text)
        with pytest.raises(CheckpointError, match="no index"):
            read_checkpoint(index)
    for names in ({}, {"a": "../secret.safetensors"}, {"a": "/etc/passwd"}):
        index.write_text(json.dumps({"weight_map": names}))
        with pytest.raises(CheckpointError, match="is refused"):
            read_checkpoint(index)


# --- headers and memory ---


def test_a_14b_model_is_refused_with_its_need_before_it_is_read():
    shapes = wan_shapes(5120, 13824, 40)
    need = memory_need(Header(shapes, dict.fromkeys(shapes, "BF16")))
    assert need == 2 * 14_288_491_584
    check_memory("wan.safetensors", need, None)
    check_memory("wan.safetensors", need, need)
    with pytest.raises(CheckpointError, match=r"wan\.safetensors needs 28\.6 GB .* and 8\.0 GB are free"):
        check_memory("wan.safetensors", need, 8_000_000_000)
    assert memory_need(Header(shapes, dict.fromkeys(shapes, "F8_E4M3"))) == need // 2


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", "-old.pt"])
def test_memory_is_asked_before_weights_are_read(tmp_path, suffix):
    path, tensors = tmp_path / f"x{suffix}", {"a": torch.zeros(1000)}
    if suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"generator": tensors}, path, _use_new_zipfile_serialization=suffix == ".pt")
    assert read_checkpoint(path, available=10_000)[0].keys() == {"a"}
    with pytest.raises(CheckpointError, match=r"needs 0\.0 GB"):
        read_checkpoint(path, available=3999)


def test_a_header_tells_shapes_without_the_weights(tmp_path, wan):
    save_file(wan, tmp_path / "x.safetensors", metadata=CAUSAL_AR)
    header = read_header(tmp_path / "x.safetensors")
    assert header.shapes == {key: tuple(value.shape) for key, value in wan.items()}
    assert memory_need(header) == sum(value.nbytes for value in wan.values())
    assert header.metadata == CAUSAL_AR


def mutate_bytes(rng, raw: bytes, header_bytes: int) -> bytes:
    """Change, cut out or put in up to four times a few bytes of the header or its length."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(8 + header_bytes)
        what = rng.choice(
            [rng.randbytes(1), rng.choice(b"0123456789[]{}:,-eE").to_bytes(1, "big"), b"9" * 5, b""]
        )
        data[at : at + rng.choice([0, 1, 1, 12])] = what
    return bytes(data)


def mutate_content(rng, raw: bytes, header_bytes: int) -> bytes:
    """A well-formed header that says something else about the same data."""
    entries = json.loads(raw[8 : 8 + header_bytes])
    strange = [None, -1, 2**70, 1.5, "F4", "BF16", [], {}, [0, 2**40], [[]], True, "\ud800", "x" * 1000]
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(list(entries))
        match rng.randrange(4):
            case 0:
                entries[name] = rng.choice(strange)
            case 1 if isinstance(entries[name], dict) and entries[name]:
                entries[name][rng.choice(list(entries[name]))] = rng.choice(strange)
            case 2:
                entries[rng.choice(["", "blocks.1e9.x", "__metadata__", "model.model.", name * 50])] = (
                    entries[name]
                )
            case _:
                del entries[name]
                entries.setdefault("left", {"dtype": "I8", "shape": [2, 0], "data_offsets": [0, 0]})
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + header_bytes :]


def test_mutated_torch_files_are_refused_and_nothing_worse(tmp_path):
    path, rng = tmp_path / "x.pt", random.Random(7)
    torch.save({"generator": {"model.a": torch.arange(4.0)}}, path)
    raw = path.read_bytes()
    for _ in range(200):
        data = bytearray(raw)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            recognise_wan(read_checkpoint(path)[0], "mutated")
            pytest.fail("four numbers are no model")
        except CheckpointError:
            pass


def test_a_thousand_mutated_headers_are_refused_and_nothing_worse(tmp_path):
    wan = WanModel(dim=128, ffn_dim=8, num_heads=1, num_layers=1, text_dim=4, freq_dim=2).state_dict()
    small = {key: value.half() for key, value in wan.items() if value.numel() < 2000}
    raw = save(small, metadata=CAUSAL_AR)
    header_bytes, rng, refused = int.from_bytes(raw[:8], "little"), random.Random(7), 0
    path = tmp_path / "mutated.safetensors"
    for i in range(1000):
        path.write_bytes((mutate_bytes, mutate_content)[i % 2](rng, raw, header_bytes))
        try:
            sd, metadata = read_checkpoint(path)
            is_causal_ar(metadata)
            recognise_wan(sd, "mutated")
        except CheckpointError:
            refused += 1
    assert refused == 1000  # weights are left out, so that even an untouched file would be refused in the end


# --- unwrapping ---


def test_nested_wrappers_and_prefixes():
    content = {
        "state_dict": {"model": {"model._fsdp_wrapped_module.blocks.0._checkpoint_wrapped_module.q": ONE}}
    }
    assert list(strip_prefixes(unwrap(content, "x"), "x")) == ["blocks.0.q"]
    assert list(strip_prefixes({"_orig_mod.base_model.model.diffusion_model.a": ONE}, "x")) == ["a"]


@pytest.mark.parametrize(
    "content", [[ONE], ONE, {}, {"a": 1}, {"generator": {"a": ONE, "b": "text"}}, {3: ONE}]
)
def test_content_that_is_no_state_dict(content):
    with pytest.raises(CheckpointError, match=r"x\.pt holds"):
        unwrap(content, "x.pt")


def test_two_names_must_not_become_one():
    with pytest.raises(CheckpointError, match="holds a twice"):
        strip_prefixes({"a": ONE, "model.a": TWO}, "x")


# --- recognising ---


def test_the_names_are_those_of_the_backbone(wan):
    assert wan_keys(3) == wan.keys()
    assert recognise_wan(wan, "x") == WanShape(dim=256, ffn_dim=192, num_heads=2, num_layers=3)


def test_a_wrong_model_is_refused_with_lists(wan):
    wrong = {key: value for key, value in wan.items() if not key.startswith("blocks.1.cross_attn.")}
    wrong["img_emb.proj.0.weight"] = ONE
    with pytest.raises(CheckpointError) as caught:
        recognise_wan(wrong, "mine.pt")
    message = str(caught.value)
    assert message.startswith("mine.pt is not a Wan2.1 text-to-video model")
    assert "10 missing: blocks.1.cross_attn.k.bias" in message
    assert "and 2 more" in message
    assert "1 unexpected: img_emb.proj.0.weight." in message


def test_weights_of_shapes_that_do_not_fit_are_listed(wan):
    wrong = wan | {"blocks.1.ffn.0.bias": ONE, "head.head.weight": torch.zeros(48, 256)}
    with pytest.raises(CheckpointError, match=r"2 weights whose shapes.*blocks\.1\.ffn\.0\.bias \[2\]"):
        recognise_wan(wrong, "x")


def test_packed_weights_have_other_shapes(wan):
    packed = wan | {"blocks.0.self_attn.q.weight": torch.zeros(256, 128, dtype=torch.uint8)}
    assert recognise_wan(packed, "x").dim == 256


def test_models_that_are_not_text_to_video_are_named(wan):
    image = wan | {"patch_embedding.weight": torch.zeros(256, 36, 1, 2, 2), "img_emb.proj.0.weight": ONE}
    with pytest.raises(
        CheckpointError, match=r"image-to-video model \(36 input channels\).*as the first frame"
    ):
        recognise_wan(image, "x")
    five = wan | {"patch_embedding.weight": torch.zeros(256, 48, 1, 2, 2)}
    with pytest.raises(CheckpointError, match=r"is Wan2\.2 5B \(48 input channels\)"):
        recognise_wan(five, "x")


@pytest.mark.parametrize(
    ("widths", "size"),
    [((1536, 8960, 30), "1.3B"), ((5120, 13824, 40), "14B"), ((256, 768, 6), "the embedded world model")],
)
def test_sizes(widths, size):
    with torch.device("meta"):
        sd = {key: torch.empty(shape) for key, shape in wan_shapes(*widths).items()}
    shape = recognise_wan(sd, "x")
    assert shape.size == size
    assert WanShape(256, 192, 2, 3).size == "of another size"


def test_stored_quantisation_is_passed_over(wan, tmp_path):
    stored = {key: value.to(torch.float8_e4m3fn) if value.ndim == 2 else value for key, value in wan.items()}
    scales = {
        key.replace(".weight", ".scale_weight"): torch.ones(1) for key in wan if key.endswith("q.weight")
    }
    save_file(
        {f"model.diffusion_model.{k}": v for k, v in (stored | scales).items()}, tmp_path / "x.safetensors"
    )
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    assert recognise_wan(checkpoint.weights, "x").dim == 256
    assert scales.keys() <= checkpoint.weights.keys()
    assert "float8_e4m3fn, scaled, Wan names" in checkpoint.describe()[0]


@pytest.mark.parametrize(
    "sd", [{}, {"blocks.x.a": ONE}, {"blocks.99999999999.a": ONE}, {"down_blocks.0.conv": ONE}]
)
def test_far_away_models_are_refused_at_once(sd):
    with pytest.raises(CheckpointError, match="missing"):
        recognise_wan(sd, "x")


def test_the_vae_is_known_and_is_no_backbone(wan):
    vae = WanVAE(dim=8).state_dict()
    assert is_wan_vae(vae)
    assert not is_wan_vae(wan)
    with pytest.raises(CheckpointError, match="is a Wan VAE"):
        recognise_wan(vae, "vae.safetensors")


# --- names of diffusers ---

# One of each kind, as diffusers 0.42's WanTransformer3DModel has them.
DIFFUSERS = {
    "condition_embedder.time_embedder.linear_2.bias": "time_embedding.2.bias",
    "condition_embedder.text_embedder.linear_1.weight": "text_embedding.0.weight",
    "condition_embedder.time_proj.weight": "time_projection.1.weight",
    "patch_embedding.weight": "patch_embedding.weight",
    "proj_out.weight": "head.head.weight",
    "scale_shift_table": "head.modulation",
    "blocks.11.scale_shift_table": "blocks.11.modulation",
    "blocks.11.attn1.to_q.weight": "blocks.11.self_attn.q.weight",
    "blocks.11.attn1.to_out.0.bias": "blocks.11.self_attn.o.bias",
    "blocks.11.attn2.norm_k.weight": "blocks.11.cross_attn.norm_k.weight",
    "blocks.11.norm2.weight": "blocks.11.norm3.weight",
    "blocks.11.ffn.net.0.proj.weight": "blocks.11.ffn.0.weight",
    "blocks.11.ffn.net.2.bias": "blocks.11.ffn.2.bias",
    "blocks.11.attn1.to_q.lora_A.weight": "blocks.11.self_attn.q.lora_A.weight",
    "blocks.11.attn1.to_q.scale_weight": "blocks.11.self_attn.q.scale_weight",
    "something.else": "something.else",
}


def to_diffusers(sd):
    """The same weights by diffusers' names, from the examples above."""
    kinds = {ours.replace("11", "0"): theirs.replace("11", "0") for theirs, ours in DIFFUSERS.items()}
    parts = {key.rsplit(".", 1)[0]: name.rsplit(".", 1)[0] for key, name in kinds.items()}
    for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        parts |= {f"blocks.0.{ours}.{part}": f"blocks.0.{theirs}.to_{part}" for part in "qkv"}
        parts[f"blocks.0.{ours}.o"] = f"blocks.0.{theirs}.to_out.0"
        parts |= {f"blocks.0.{ours}.norm_{part}": f"blocks.0.{theirs}.norm_{part}" for part in "qk"}
    parts["time_embedding.0"] = "condition_embedder.time_embedder.linear_1"
    parts["text_embedding.2"] = "condition_embedder.text_embedder.linear_2"
    named = {}
    for key, value in sd.items():
        block = ".".join(key.split(".")[:2]) if key.startswith("blocks.") else ""
        here = key.replace(block, "blocks.0", 1) if block else key
        layer, last = here.rsplit(".", 1)
        there = kinds.get(here) or f"{parts[layer]}.{last}"
        named[there.replace("blocks.0", block, 1) if block else there] = value
    return named


def test_names_of_diffusers_become_wans(wan, tmp_path):
    assert {name: wan_name(name) for name in DIFFUSERS} == DIFFUSERS
    theirs = to_diffusers(wan)
    assert len(theirs) == len(wan)
    assert is_diffusers(theirs)
    assert not is_diffusers(wan)
    save_file(theirs, tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    assert checkpoint.names == "diffusers"
    assert recognise_wan(checkpoint.weights, "x").num_layers == 3
    assert all(torch.equal(weight, wan[key]) for key, weight in merged(checkpoint).items())


# --- LoRA ---


def test_names_of_both_kinds_at_once_do_not_hide_each_other(tmp_path):
    both = {"blocks.0.attn1.to_q.weight": ONE.clone(), "blocks.0.norm2.bias": ONE, "blocks.0.norm3.bias": TWO}
    save_file(both, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"blocks\.0\.norm3\.bias twice"):
        open_checkpoint(tmp_path / "x.safetensors")


LAYER = "blocks.1.self_attn.q"
LORA_NAMES = {
    "LongLive": ("generator_lora", "base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    "PEFT with adapter name": (None, "base_model.model.{}.lora_A.default.weight", "{}.lora_B.default.weight"),
    "ComfyUI": (None, "diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight"),
    "kohya": (None, "lora_unet_{_}.lora_down.weight", "lora_unet_{_}.lora_up.weight"),
    "diffusers": (None, "transformer.{d}.lora_A.weight", "transformer.{d}.lora_B.weight"),
}


def spell(pattern):
    return pattern.replace("{_}", LAYER.replace(".", "_")).replace("{d}", "blocks.1.attn1.to_q").format(LAYER)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4, 256, generator=generator), torch.randn(256, 4, generator=generator)


@pytest.mark.parametrize("names", LORA_NAMES)
def test_a_lora_is_merged_into_its_base(tmp_path, wan, pair, names):
    wrapper, *halves = LORA_NAMES[names]
    lora = dict(zip(map(spell, halves), pair))
    torch.save({"generator": {f"model.{key}": value for key, value in wan.items()}}, tmp_path / "base.pt")
    torch.save({wrapper: lora} if wrapper else lora, tmp_path / "lora.pt")
    checkpoint = open_checkpoint(tmp_path / "base.pt", lora=tmp_path / "lora.pt")
    sd = merged(checkpoint)
    expected = wan[f"{LAYER}.weight"] + pair[1] @ pair[0]  # alpha = rank where none is given
    assert torch.allclose(sd.pop(f"{LAYER}.weight"), expected, atol=1e-6)
    assert all(torch.equal(value, wan[key]) for key, value in sd.items())
    assert checkpoint.describe()[-1] == "LoRA on 1 layers, rank 4"


def test_alpha_from_the_pair_or_from_beside_the_file(tmp_path, wan, pair):
    save_file(wan, tmp_path / "base.safetensors")
    folder = tmp_path / "adapter"
    folder.mkdir()
    lora = {f"{LAYER}.lora_A.weight": pair[0], f"{LAYER}.lora_B.weight": pair[1]}
    save_file(lora, folder / "lora.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "use_dora": False}))

    def change():
        sd, _ = read_checkpoint(tmp_path / "base.safetensors", lora=folder / "lora.safetensors")
        return sd[f"{LAYER}.weight"] - wan[f"{LAYER}.weight"]

    assert torch.allclose(change(), 2 * pair[1] @ pair[0], atol=1e-5)
    save_file(lora | {f"{LAYER}.alpha": torch.tensor(1.0)}, folder / "lora.safetensors")
    assert torch.allclose(change(), pair[1] @ pair[0] / 4, atol=1e-5)
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "use_rslora": True}))
    with pytest.raises(CheckpointError, match="use_rslora"):
        change()


def test_base_and_lora_in_one_file(tmp_path, wan, pair):
    sd = {}
    for key, value in wan.items():
        in_layer = key.startswith(LAYER + ".")
        sd["base_model.model." + (key.replace(LAYER, LAYER + ".base_layer") if in_layer else key)] = value
    sd |= {f"base_model.model.{LAYER}.lora_{x}.default.weight": t for x, t in zip("AB", pair)}
    torch.save({"generator": sd}, tmp_path / "x.pt")
    sd, _ = read_checkpoint(tmp_path / "x.pt")
    assert recognise_wan(sd, "x").num_layers == 3
    assert torch.allclose(sd[f"{LAYER}.weight"], wan[f"{LAYER}.weight"] + pair[1] @ pair[0], atol=1e-6)


def test_loras_that_do_not_fit_are_refused(tmp_path, wan, pair):
    base, lora = tmp_path / "base.safetensors", tmp_path / "lora.safetensors"
    save_file(wan, base)

    def merge(tensors, base=base):
        save_file(tensors, lora)
        return read_checkpoint(base, lora=lora)

    down, up = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
    with pytest.raises(CheckpointError, match="no whole LoRA pair of blocks.1.self_attn.q"):
        merge({down: pair[0]})
    with pytest.raises(CheckpointError, match="no whole LoRA pair of blocks.1.self_attn.q"):
        merge({down: ONE, up: pair[1]})
    with pytest.raises(CheckpointError, match="layers that the model lacks: blocks.9.x"):
        merge({"blocks.9.x.lora_A.weight": pair[0], "blocks.9.x.lora_B.weight": pair[1]})
    with pytest.raises(CheckpointError, match="belongs to another model"):
        merge({down: pair[0][:, :9].contiguous(), up: pair[1]})
    with pytest.raises(
        CheckpointError, match=r"more than a LoRA of weights: blocks\.1\.self_attn\.q\.diff_b"
    ):
        merge({down: pair[0], up: pair[1], f"{LAYER}.diff_b": ONE})
    with pytest.raises(CheckpointError, match="holds no LoRA"):
        merge(wan)
    eight = tmp_path / "eight.safetensors"
    save_file({key: value.to(torch.float8_e4m3fn) for key, value in wan.items()}, eight)
    with pytest.raises(CheckpointError, match="16 or 32 bits only"):
        merge({down: pair[0], up: pair[1]}, eight)
    with pytest.raises(CheckpointError, match="is a LoRA, which needs its base model"):
        recognise_wan(open_checkpoint(lora).weights, "x")


def test_the_report_says_what_was_met(tmp_path):
    torch.save({"generator_ema": {"model.a": ONE.bfloat16()}, "generator": {}}, tmp_path / "x.pt")
    assert open_checkpoint(tmp_path / "x.pt").describe() == [
        "x.pt: 0.00 GB, most of it bfloat16, Wan names",
        "unwrapped generator_ema: a moving average",
    ]


# --- converting ---


def test_a_training_checkpoint_becomes_a_file_for_comfyui(tmp_path, wan):
    folder = tmp_path / "causal-forcing++"
    folder.mkdir()
    average = {f"model._fsdp_wrapped_module.{key}": value for key, value in wan.items()}
    torch.save({"generator": {"a": ONE}, "generator_ema": average}, folder / "framewise-2step.pt")
    target = tmp_path / "new folder" / "x.safetensors"
    report = convert(folder / "framewise-2step.pt", target)
    sd, metadata = read_checkpoint(target)
    assert is_causal_ar(metadata) and metadata[FAMILY] == CAUSAL_FORCING_2.name
    assert sd.keys() == wan.keys() and all(torch.equal(sd[key], wan[key]) for key in wan)
    assert any("3 layers of width 256" in line for line in report)
    assert any("chunks of 1" in line for line in report)
    assert [path.name for path in target.parent.iterdir()] == ["x.safetensors"]


def test_authors_who_take_the_raw_weights_are_followed(tmp_path, wan):
    torch.save({"generator": wan, "generator_ema": {"a": ONE}}, tmp_path / "longlive_base.pt")
    convert(tmp_path / "longlive_base.pt", tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="missing"):
        convert(tmp_path / "longlive_base.pt", tmp_path / "y.safetensors", ema=True)


def test_converting_casts_and_merges(tmp_path, wan, pair):
    save_file(wan, tmp_path / "base.safetensors", metadata={"about": "mine"})
    save_file(
        {f"{LAYER}.lora_A.weight": pair[0], f"{LAYER}.lora_B.weight": pair[1]}, tmp_path / "l.safetensors"
    )
    target = tmp_path / "x.safetensors"
    convert(tmp_path / "base.safetensors", target, lora=tmp_path / "l.safetensors", dtype=torch.bfloat16)
    sd, metadata = read_checkpoint(target)
    assert metadata == {"about": "mine", **CAUSAL_AR}  # a name that says nothing writes no preset
    assert {value.dtype for value in sd.values()} == {torch.bfloat16}
    expected = wan[f"{LAYER}.weight"] + pair[1] @ pair[0]
    assert torch.allclose(sd[f"{LAYER}.weight"].float(), expected, rtol=2**-8, atol=1e-6)


def test_stored_quantisation_is_kept_as_it_is(tmp_path, wan):
    stored = {key: value.to(torch.float8_e4m3fn) if value.ndim == 2 else value for key, value in wan.items()}
    stored |= {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    stored |= {f"{LAYER}.scale_weight": torch.tensor(0.5)}
    save_file(
        {f"model.diffusion_model.{key}": value for key, value in stored.items()}, tmp_path / "in.safetensors"
    )
    convert(tmp_path / "in.safetensors", tmp_path / "x.safetensors")
    sd, _ = read_checkpoint(tmp_path / "x.safetensors")
    assert sd.keys() == stored.keys()
    assert all(
        sd[key].dtype == stored[key].dtype and torch.equal(sd[key].float(), stored[key].float()) for key in sd
    )
    with pytest.raises(CheckpointError, match="quantised"):
        convert(tmp_path / "in.safetensors", tmp_path / "y.safetensors", dtype=torch.bfloat16)


def test_a_lora_alone_becomes_a_lora_for_comfyui(tmp_path, pair):
    lora = {f"base_model.model.{LAYER}.lora_{x}.weight": t for x, t in zip("AB", pair)}
    torch.save({"generator_lora": lora, "step": 3}, tmp_path / "lora.pt")
    convert(tmp_path / "lora.pt", tmp_path / "x.safetensors")
    assert read_header(tmp_path / "x.safetensors").shapes == {
        f"diffusion_model.{LAYER}.lora_A.weight": (4, 256),
        f"diffusion_model.{LAYER}.lora_B.weight": (256, 4),
    }


def test_nothing_is_overwritten_or_left_half_done(tmp_path, wan, pair, monkeypatch):
    source, target = tmp_path / "in.safetensors", tmp_path / "x.safetensors"
    save_file(wan, source)
    target.write_bytes(b"precious")
    with pytest.raises(CheckpointError, match="exists"):
        convert(source, target)
    with pytest.raises(CheckpointError, match="the file to read"):
        convert(source, source, force=True)
    with pytest.raises(CheckpointError, match="must end in .safetensors"):
        convert(source, tmp_path / "x.pt")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            convert(source, target, force=True)
    assert target.read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.safetensors", "x.safetensors"]
    convert(source, target, force=True)
    assert read_checkpoint(target)[0].keys() == wan.keys()
    save_file(WanVAE(dim=8).state_dict(), source)
    with pytest.raises(CheckpointError, match="is a Wan VAE"):
        convert(source, tmp_path / "y.safetensors")


def test_difference_counts_and_shortens():
    expected, found = [f"k{i:02}" for i in range(20)], ["k00", "z"]
    text = describe_difference(expected, found)
    assert text == ("19 missing: k01, k02, k03, k04, k05, k06, k07, k08 and 11 more. 1 unexpected: z.")


@pytest.mark.parametrize(
    "metadata",
    [{}, {"config": "{}"}, {"config": "no json"}, {"config": "[]"}, {"config": '{"transformer": 1}'}],
)
def test_other_metadata_is_not_causal(metadata):
    assert not is_causal_ar(metadata)
