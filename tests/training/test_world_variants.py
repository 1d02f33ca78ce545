"""The variants' training: same start, steps and clips for all, each on its own memory, finished ones left alone."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from sparse_forcing_pack.sparse_attn.training import world_dit, world_variants
from sparse_forcing_pack.sparse_attn.training.world_dit import Trainee, load_weights, save_trainee
from sparse_forcing_pack.sparse_attn.training.world_recall import FIRST_SEEN, absence
from sparse_forcing_pack.sparse_attn.training.world_variants import MODES, VariantTraining, train_variants
from sparse_forcing_pack.sparse_attn.world.scene import PAN_REST, is_held_out, pan_cycle, to_prompt

CFG = VariantTraining(
    steps=4, dim=128, ffn_dim=128, heads=1, layers=2, first_batch=2, stream_batch=1, clips=4, recalls=2, openings=32,
    late_share=0.1, recall_share=0.6, frames=33, stream_frames=21, recall_frames=93, longest_hold=12, compile=False,
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
    assert [clips[4 * i : 4 * i + 4] for i in range(len(MODES))] == len(MODES) * [clips[:4]], (
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
    assert facts["steps"] == 4
    assert facts["start"] == "start"
    assert set(facts["loss"]) <= set(world_variants.KINDS)


def test_every_kind_of_step_trains(start):
    """All four draw from their own clips; the given chunks of late ones and recalls are written and not learned."""
    banks = world_variants._banks(CFG, start, "cpu", start / "banks.safetensors")
    model, drawn = Trainee(CFG), []
    torch.nn.init.normal_(model.dit.head.head.weight, std=0.02)
    steps = world_dit.Steps(model, world_dit.optimizers(model, CFG), CFG, banks.clips, banks.openings, "cpu")
    draw_sigma = world_dit.draw_sigma
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world_dit, "draw_sigma", lambda *args: drawn.append(args) or draw_sigma(*args))
        for kind, learned in (("opening", 0), ("late", 2), ("recall", 1), ("stream", 2)):
            drawn.clear()
            before = model.dit.head.head.weight.clone()
            loss = world_variants._step(steps, kind, CFG, MODES["sparse-novelty"], banks)
            assert not torch.equal(model.dit.head.head.weight, before), kind
            assert loss.nanmean() > 0
            assert len(drawn) == learned, kind
    again = world_variants._banks(CFG, start, "cpu", start / "banks.safetensors")
    for mine, theirs in zip(again, banks):
        assert mine.filled == theirs.filled == mine.size
        assert torch.equal(mine.latents, theirs.latents)
        assert torch.equal(mine.ids, theirs.ids)


def test_kinds_come_as_often_as_they_should():
    dice = random.Random(0)
    kinds = [world_variants.draw_kind(VariantTraining(), dice.random()) for _ in range(4000)]
    for kind, share in zip(world_variants.KINDS, (0.1, 0.2, 0.5, 0.2)):
        assert abs(kinds.count(kind) / 4000 - share) < 0.03


def test_recalls_of_training_end_in_the_clip_and_are_not_held_out():
    cfg = VariantTraining()
    for scene in world_variants.recall_scenes(random.Random(1), 40):
        away, back = absence(scene)
        assert FIRST_SEEN < away < back
        assert back >= world_variants.RETURN
        assert 2 * pan_cycle(scene) - PAN_REST - scene.pan_start + 12 < cfg.recall_frames
        assert not is_held_out(to_prompt(scene))


def test_time_that_does_not_suffice_stops_before_a_variant(start, tmp_path):
    done = train_variants(CFG, ["sparse", "window-12"], start, tmp_path / "out", "cpu", minutes=0.0)
    assert done == ["sparse"]


def test_what_cannot_be_compared_is_refused(start, tmp_path):
    train_variants(CFG, [], start, tmp_path / "out", "cpu", None)
    with pytest.raises(ValueError, match="steps was 4, now 5. Variants are compared with the same ones"):
        train_variants(replace(CFG, steps=5), [], start, tmp_path / "out", "cpu", None)
    with pytest.raises(ValueError, match="no variant fast: use some of dense-21"):
        train_variants(CFG, ["fast"], start, tmp_path / "out", "cpu", None)
    with pytest.raises(ValueError, match="frames 89 are not whole chunks of latents: use 93"):
        replace(CFG, frames=89).validate()
    with pytest.raises(ValueError, match="stream_frames 45 are more than the 33"):
        replace(CFG, stream_frames=45).validate()
    with pytest.raises(ValueError, match="recall_frames 81: use more than 84"):
        replace(CFG, recall_frames=81).validate()
    with pytest.raises(ValueError, match="recall_share 0.9 are more than all steps"):
        replace(CFG, recall_share=0.9).validate()
    with pytest.raises(ValueError, match="recalls 0, openings 32: use at least 1"):
        replace(CFG, recalls=0).validate()


def test_banks_hold_long_pans():
    scenes = world_dit.training_scenes(random.Random(0), 40, pans=1.0, longest_hold=56)
    assert all(s.pan for s in scenes)
    assert {s.hold for s in scenes} <= set(range(8, 57))
    assert len({s.hold for s in scenes}) > 15
    late = world_dit.training_scenes(random.Random(0), 40, pans=1.0, longest_hold=56, late=0.5)
    assert 10 < sum(s.pan_start > 0 for s in late) < 30
