"""The world model's training: its own optimiser against torch's, and the teacher-forcing attention against a mask."""

import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sparse_forcing_pack.sparse_attn.config import AttentionConfig
from sparse_forcing_pack.sparse_attn.training import world_dit
from sparse_forcing_pack.sparse_attn.training.common import (
    BatchedMuon,
    compile_blocks,
    render_with_mask,
    save_weights,
)
from sparse_forcing_pack.sparse_attn.training.world_dit import (
    DitTraining,
    Trainee,
    clip_step,
    opening_step,
    stream_step,
    teacher_forcing_attention,
)
from sparse_forcing_pack.sparse_attn.training.world_vae import VaeTraining, train_vae
from sparse_forcing_pack.sparse_attn.training.world_words import NOWHERE, WordReader, attributes_of
from sparse_forcing_pack.sparse_attn.vae import WanVAE
from sparse_forcing_pack.sparse_attn.world.render import render
from sparse_forcing_pack.sparse_attn.world.scene import (
    COLOURS,
    MOTIONS,
    SHAPES,
    SIZES,
    Scene,
    Sprite,
    sample_scene,
    to_prompt,
)
from sparse_forcing_pack.sparse_attn.world.text import WorldTextEncoder, tokenize


def test_batched_muon_is_torchs_muon():
    torch.manual_seed(0)
    shapes = [(24, 16), (16, 24), (24, 16), (16, 16)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(s)) for s in shapes] for _ in range(2))
    a = BatchedMuon(ours, lr=0.01)
    b = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        # bfloat16 iterations, rounded in another order
        torch.testing.assert_close(p, q, rtol=0, atol=2e-3)
        assert (p - 1).abs().max() > 0.01


def test_teacher_forcing_attention_is_the_masked_attention():
    torch.manual_seed(0)
    chunks, size = 3, 4
    q, k, v = torch.randn(3, 2, 2 * chunks * size, 2, 8)
    index = torch.arange(2 * chunks * size) // size
    noised, chunk = index >= chunks, index % chunks
    sees_past = ~noised[None] & (chunk[None] < chunk[:, None])
    own = (noised[None] == noised[:, None]) & (chunk[None] == chunk[:, None])
    want = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=sees_past | own
    ).transpose(1, 2)
    torch.testing.assert_close(teacher_forcing_attention(chunks)(0, q, k, v), want)


@pytest.mark.parametrize(
    "step", ["opening", "guided opening", "told opening", "window", "whole clip", "own context", "stream"]
)
def test_every_kind_of_step_trains_every_weight(step, monkeypatch):
    torch.manual_seed(0)
    cfg = DitTraining(
        dim=128, ffn_dim=128, heads=1, layers=2, first_batch=3, batch=2, long_batch=2, stream_batch=2
    )
    model = Trainee(cfg)
    torch.nn.init.normal_(
        model.dit.head.head.weight, std=0.02
    )  # zero at the start, which would stop all gradients
    bank = bank_of_noise(monkeypatch)
    loss = {
        "opening": lambda: opening_step(model, *bank.draw(3, 1, 0.5)[:2], cfg),
        "guided opening": lambda: opening_step(model, *bank.draw(3, 1, 0.5)[:2], replace(cfg, guidance=0.5)),
        "told opening": lambda: opening_step(model, *bank.draw(3, 1, 0.5)[:2], replace(cfg, words=0.1)),
        "window": lambda: clip_step(model, bank, cfg, False, False, "cpu"),
        "whole clip": lambda: clip_step(model, bank, cfg, True, False, "cpu"),
        "own context": lambda: clip_step(model, bank, cfg, True, True, "cpu"),
        "stream": lambda: stream_step(model, *bank.draw(2, 7, 0.0)[:2], AttentionConfig(), cfg),
    }[step]()
    assert loss.shape == (() if "opening" in step else (5,) if step == "stream" else (4,))
    assert torch.nanmean(loss) > 0
    used = [
        (name, p) for name, p in model.named_parameters() if step == "told opening" or "reader" not in name
    ]
    lazy = [name for name, p in used if p.grad is None or not p.grad.abs().sum() > 0]
    assert lazy == []
    assert all(p.grad.isfinite().all() for _, p in used)


def test_words_are_asked_for_their_own_sprite():
    scenes = [sample_scene(random.Random(seed)) for seed in range(20)]
    prompts = [to_prompt(scene) for scene in scenes]
    ids = torch.stack([world_dit.padded(tokenize(prompt)) for prompt in prompts])
    every = [list(names) for names in (COLOURS, SHAPES, SIZES, MOTIONS)]
    for labels, scene, prompt in zip(attributes_of(ids), scenes, prompts, strict=True):
        sprites = iter(scene.sprites)
        want, current = [], next(sprites)
        for word in prompt.replace(",", "").split():
            if word == "over" or current is None:
                current = None  # neither the background nor the camera is a sprite's
            told = current and (current.colour, current.shape, current.size, current.motion)
            if word == "and" and current:
                told, current = None, next(sprites)
            want.append([n.index(v) for n, v in zip(every, told, strict=True)] if told else [NOWHERE] * 4)
        assert labels[: len(want)].tolist() == want
        assert (labels[len(want) :] == NOWHERE).all()


def test_words_learn_their_sprite():
    torch.manual_seed(0)
    text, reader = WorldTextEncoder(dim=32), WordReader(32)
    ids = torch.stack(
        [world_dit.padded(tokenize(to_prompt(sample_scene(random.Random(s))))) for s in range(8)]
    )
    optimizer = torch.optim.Adam([*text.parameters(), *reader.parameters()], 3e-3)
    losses = []
    for _ in range(40):
        losses.append(reader.loss(text, ids))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]
    assert reader.loss(text, torch.stack([world_dit.padded(tokenize("the camera"))])) == 0


def test_sprites_are_found_in_the_latents():
    scene = Scene((Sprite("circle", "red", "small", "right", x=60.0, y=100.0),), "navy", "checkered")
    video, pixels = render_with_mask([scene], 9, "cpu")
    torch.testing.assert_close(video[0], render(scene, 9))
    assert abs(pixels[0, 0, 0].sum() / (math.pi * 20.24**2) - 1) < 0.1  # 0.92 of a small sprite's 22 pixels
    mask = world_dit.latent_mask(pixels)
    assert mask.shape == (1, 1, 3, 32, 32)
    first = torch.zeros(32, 32)
    first[10:16, 4:11] = 1  # rows 80 to 120, columns 39 to 80 in latents of 8 pixels
    assert (mask[0, 0, 0] <= first).all() and mask[0, 0, 0].sum() >= 28
    assert mask[0, 0, 2].any(0).nonzero().max() >= 10, "it moves right"


def test_a_decoder_trained_alone_leaves_the_latents(tmp_path):
    path, cfg = (
        tmp_path / "vae.safetensors",
        VaeTraining(minutes=0.001, dim=8, frames=5, batch=1, compile=False),
    )
    alone = replace(cfg, decoder_only=True, sprites=2.0)
    with pytest.raises(ValueError, match="--resume"):
        train_vae(alone, path, "cpu")
    save_weights(path, WanVAE(8).state_dict())
    before = load_file(path)
    train_vae(alone, path, "cpu", resume=True)
    after = load_file(path)
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert any(name.startswith("decoder.") for name in moved)
    assert not any(name.startswith(("encoder.", "conv1.")) for name in moved)


@pytest.mark.parametrize("step", ["opening", "stream"])
def test_sprites_weigh_more(step):
    """With sprites everywhere a stream's gradient grows by that weight; without any it stays."""
    cfg = DitTraining(dim=128, ffn_dim=128, heads=1, layers=1, sprites=3.0)
    model = Trainee(cfg)
    torch.nn.init.normal_(model.dit.head.head.weight, std=0.02)
    latents, ids = torch.randn(2, 16, 6, 4, 6), torch.stack([world_dit.padded([3, 4])] * 2)

    def gradient(mask: float, cfg: DitTraining) -> torch.Tensor:
        torch.manual_seed(1)
        model.zero_grad()
        clip = torch.cat([latents, torch.full((2, 1, 6, 4, 6), mask)], dim=1)
        if step == "opening":
            opening_step(model, clip[:, :, :3], ids, cfg)
        else:
            stream_step(model, clip, ids, AttentionConfig(), cfg)
        return model.dit.head.head.weight.grad.clone()

    plain = gradient(1.0, replace(cfg, sprites=0.0))
    torch.testing.assert_close(gradient(0.0, cfg), plain)
    more = gradient(1.0, cfg).norm() / plain.norm()
    assert abs(more - 4) < 1e-3 if step == "stream" else 1.05 < more < 4  # openings at all levels of noise


def test_compiled_blocks_train_alike():
    """Five graphs for all layers and kinds of steps: none for a layer, a memory or a pass of its own."""
    torch.manual_seed(0)
    cfg = DitTraining(dim=128, ffn_dim=128, heads=1, layers=3, guidance=0.5, topk=0.5, words=0.1, sprites=2.0)
    model = Trainee(cfg)
    torch.nn.init.normal_(model.dit.head.head.weight, std=0.02)
    clip = torch.cat([torch.randn(2, 16, 9, 4, 6), torch.randint(0, 2, (2, 1, 9, 4, 6)).float()], dim=1)
    ids = torch.stack([world_dit.padded([3, 4, 5]), world_dit.padded([6, 7])])

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(1)
        model.zero_grad()
        opening_step(model, clip[:, :, :3], ids, cfg)
        for positions in world_dit.POSITIONS:
            stream_step(model, clip, ids, AttentionConfig(topk=cfg.topk, positions=positions), cfg)
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_blocks(model.dit, backend="aot_eager")
    for mine, expected in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 5


def bank_of_noise(monkeypatch):
    """A bank of prompts whose clips are noise, 21 frames of 4 x 6 latent pixels."""
    monkeypatch.setattr(
        world_dit, "render_with_mask", lambda scenes, *_: torch.rand(2, len(scenes), 1, 81, 32, 48).round()
    )
    vae = SimpleNamespace(encode_whole=lambda videos: torch.randn(len(videos), 16, 21, 4, 6))
    bank = world_dit.LatentBank(vae, size=4, device="cpu", seed=0)
    bank.add(4)
    return bank
