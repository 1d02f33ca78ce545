"""The checker: right about the renderer's clips, which are the truth, and not kind to the wrong prompt."""

import random

import pytest
import torch
from sparse_forcing_pack.sparse_attn.world import checker
from sparse_forcing_pack.sparse_attn.world.render import render
from sparse_forcing_pack.sparse_attn.world.scene import Scene, Sprite, sample_scene, to_prompt

FRAMES = 81  # five seconds
RATES = ("colour", "shape", "size", "motion", "present")


def as_bytes(video_CFHW):
    """[-1, 1] -> uint8 [F, H, W, 3]."""
    return ((video_CFHW + 1) * 127.5).round().byte().permute(1, 2, 3, 0)


@pytest.fixture(scope="module")
def seen():
    """Scenes with held-out prompts, one of them with a pan, and what the checker observes in their clips."""
    rng = random.Random(7)
    scenes = [sample_scene(rng, held_out=True) for _ in range(5)]
    assert any(scene.pan for scene in scenes)
    assert len({to_prompt(scene) for scene in scenes}) == len(scenes)
    return [(scene, checker.observe(as_bytes(render(scene, FRAMES)))) for scene in scenes]


def rates(monkeypatch, pairs):
    """Rates over (scene, observation) pairs."""
    verdicts = []
    for scene, observation in pairs:
        monkeypatch.setattr(checker, "observe", lambda *_, seen=observation: seen)
        verdicts.append(checker.judge(torch.empty(0), scene))
    return checker.summarise(verdicts)


def test_rendered_clips_are_read_without_a_mistake(seen, monkeypatch):
    found = rates(monkeypatch, seen)
    assert found == dict.fromkeys((*RATES, "background"), 1.0) | {"extra": 0.0}


def test_the_wrong_prompts_score_like_chance(seen, monkeypatch):
    """Colours, three of eight in some scenes, may meet by chance; a sprite's shape and motion hardly ever do."""
    scenes, observations = zip(*seen)
    found = rates(monkeypatch, zip(scenes[1:] + scenes[:1], observations))
    assert found["colour"] < 0.6
    assert max(found["shape"], found["motion"], found["background"]) < 0.4
    assert found["extra"] > 0


def test_an_empty_scene_shows_no_sprite():
    clip = as_bytes(render(Scene((), "slate", "dotted"), 8))
    assert checker.observe(clip) == checker.Observation((), "slate", "dotted")


def test_what_is_missing_counts_as_wrong_and_what_is_too_much_as_extra():
    shown = Scene((Sprite("square", "green", "large", "still"),), "navy", "plain")
    wanted = Scene((Sprite("square", "red", "large", "still"),), "navy", "striped")
    verdict = checker.judge(as_bytes(render(shown, 12)), wanted)
    assert verdict == checker.Verdict(1, 0, 0, 0, 0, 0, extra=1, background=True, texture=False)


def test_a_sprite_that_vanishes_is_not_present_at_the_end():
    scene = Scene((Sprite("circle", "yellow", "large", "still"),), "brown", "plain")
    empty = Scene((), "brown", "plain")
    clip = torch.cat([as_bytes(render(scene, 12)), as_bytes(render(empty, 12))])
    verdict = checker.judge(clip, scene)
    assert (verdict.colour, verdict.shape, verdict.present) == (1, 1, 0)


def test_a_pan_whose_colours_smear_is_still_read_right_and_the_wrong_shape_is_not():
    scene = Scene((Sprite("star", "white", "large", "still"),), "navy", "plain", pan="left")
    clip = as_bytes(render(scene, FRAMES)).float()
    # Compression leaves the rests sharp and bleaches or blurs what moves 11 pixels a frame.
    swing = slice(9, 73)
    clip[swing] += 25 * torch.randn(clip[swing].shape, generator=torch.Generator().manual_seed(0))
    clip[swing][::2] -= torch.tensor([0.0, 110.0, 0.0])
    clip = clip.clamp(0, 255).byte()
    assert checker.judge(clip, scene) == checker.Verdict(1, 1, 1, 1, 1, 1, 0, True, True)
    wrong = checker.judge(clip, Scene((Sprite("ring", "white", "large", "right"),), "navy", "plain"))
    assert (wrong.shape, wrong.motion) == (0, 0)


def test_rates_of_no_clips():
    assert set(checker.summarise([]).values()) == {0.0}
