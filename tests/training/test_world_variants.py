"""The variants' training: same start, steps and clips for all, each on its own memory, finished ones left alone."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from sparse_forcing_pack.sparse_attn.training import world_dit, world_variants
from sparse_forcing_pack.sparse_attn.training.world_dit import Trainee, load_weights, save_trainee
from sparse_forcing_pack.sparse_attn.training.world_variants import MODES, VariantTraining, train_variants

CFG = VariantTraining(
    steps=3, dim=128, ffn_dim=128, heads=1, layers=2, first_batch=2, stream_batch=1, clips=4, openings=32,
    first_share=0.4, frames=33, longest_hold=12, compile=False,
)  # fmt: skip


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A folder of starting weights, and clips of noise instead of rendered ones."""

    def render_with_mask(scenes, frames, device):
        return torch.zeros(len(scenes), 3, frames, 1, 1), torch.zeros(len(scenes), 1, frames, 32, 48)

    def encode_whole(videos):
        generator = torch.Generator().manual_seed(len(videos))
        return torch.randn(len(videos), 16, videos.shape[2] // 4 + 1, 4, 6, generator=generator)

    vae = SimpleNamespace(encode_whole=encode_whole, to=lambda dtype: None, parameters=list)
    vae.requires_grad_ = lambda on: vae
    monkeypatch.setattr(world_dit, "render_with_mask", render_with_mask)
    monkeypatch.setattr(world_variants, "load_vae", lambda folder, device: vae)
    monkeypatch.setattr(world_variants, "channels_last", lambda model: model)
    torch.manual_seed(0)
    model = Trainee(CFG)
    torch.nn.init.normal_(model.dit.head.head.weight, std=0.02)
    save_trainee(model.state_dict(), tmp_path / "start")
    return tmp_path / "start"


def weights(folder):
    model = Trainee(CFG)
    load_weights(model, folder)
    return model.state_dict()


def test_variants_are_trained_in_turn_and_once(start, tmp_path, monkeypatch):
    out, clips = tmp_path / "variants", []
    draw = world_dit.LatentBank.draw

    def recorded(self, *args):
        drawn = draw(self, *args)
        clips.append((drawn[0].sum().item(), drawn[1].sum().item()))
        return drawn

    monkeypatch.setattr(world_dit.LatentBank, "draw", recorded)
    assert train_variants(CFG, ["window-12"], start, out, "cpu", None) == ["window-12"]
    first = (out / "window-12" / "world_dit.safetensors").read_bytes()
    assert train_variants(CFG, list(MODES), start, out, "cpu", None) == list(MODES)
    assert (out / "window-12" / "world_dit.safetensors").read_bytes() == first
    assert [clips[3 * i : 3 * i + 3] for i in range(6)] == 6 * [clips[:3]], (
        "every variant sees the same clips"
    )
    trained = {name: weights(out / name) for name in MODES}
    begun = weights(start)
    for name, mine in trained.items():
        assert any(not torch.equal(mine[k], begun[k]) for k in begun), f"{name} did not learn"
    keys = [k for k in begun if "self_attn" in k]
    for a, b in [("sparse", "no-local-sparsity"), ("sparse", "no-persistent"), ("dense-21", "sparse")]:
        assert any(not torch.equal(trained[a][k], trained[b][k]) for k in keys), f"{a} is {b}"
    facts = json.loads((out / "sparse" / "done.json").read_text())
    assert facts["steps"] == 3
    assert facts["start"] == "start"


def test_time_that_does_not_suffice_stops_before_a_variant(start, tmp_path):
    done = train_variants(CFG, ["sparse", "window-12"], start, tmp_path / "out", "cpu", minutes=0.0)
    assert done == ["sparse"]


def test_what_cannot_be_compared_is_refused(start, tmp_path):
    train_variants(CFG, [], start, tmp_path / "out", "cpu", None)
    with pytest.raises(ValueError, match="steps was 3, now 4. Variants are compared with the same ones"):
        train_variants(replace(CFG, steps=4), [], start, tmp_path / "out", "cpu", None)
    with pytest.raises(ValueError, match="no variant fast: use some of dense-21"):
        train_variants(CFG, ["fast"], start, tmp_path / "out", "cpu", None)
    with pytest.raises(ValueError, match="frames 89 are not whole chunks of latents: use 93"):
        replace(CFG, frames=89).validate()


def test_banks_hold_long_pans():
    scenes = world_dit.training_scenes(random.Random(0), 40, pans=1.0, longest_hold=56)
    assert all(s.pan for s in scenes)
    assert {s.hold for s in scenes} <= set(range(8, 57))
    assert len({s.hold for s in scenes}) > 15
    late = world_dit.training_scenes(random.Random(0), 40, pans=1.0, longest_hold=56, late=0.5)
    assert 10 < sum(s.pan_start > 0 for s in late) < 30
