"""Checkpoint files: what opens, what is refused, and that nothing in a file ever runs."""

import argparse
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from sparse_forcing_pack.sparse_attn.checkpoint import (
    CAUSAL_AR,
    CheckpointError,
    WanShape,
    describe_difference,
    is_causal_ar,
    is_wan_vae,
    read_checkpoint,
    recognise_wan,
    strip_prefixes,
    unwrap,
    wan_keys,
)
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
    with pytest.raises(CheckpointError, match=r"'\.gguf'.*\.safetensors, \.pt"):
        read_checkpoint(path)


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
