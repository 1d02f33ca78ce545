"""The quality metrics: perfect on the renderer's own frames, and each notices the damage that it is there for."""

import csv
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sparse_forcing_pack.sparse_attn.config import AttentionConfig
from sparse_forcing_pack.sparse_attn.pictures import to_uint8
from sparse_forcing_pack.sparse_attn.training import quality_report, world_metrics, world_recall
from sparse_forcing_pack.sparse_attn.training.plots import curve_plot, heat_map
from sparse_forcing_pack.sparse_attn.training.quality_report import Row
from sparse_forcing_pack.sparse_attn.training.world_clips import decode_spans, sample, stretches
from sparse_forcing_pack.sparse_attn.training.world_eval import held_out_scenes
from sparse_forcing_pack.sparse_attn.training.world_quality import (
    Measuring,
    RenderedSource,
    judged,
    labelled,
    measure,
    spans_of,
)
from sparse_forcing_pack.sparse_attn.training.world_variants import ENTRIES, MODES
from sparse_forcing_pack.sparse_attn.world.checker import label_pixels
from sparse_forcing_pack.sparse_attn.world.render import render
from sparse_forcing_pack.sparse_attn.world.scene import Scene, Sprite

CIRCLE = Sprite("circle", "red", "large", "right", 60.0, 128.0)
SCENE = Scene((CIRCLE,), "navy", "striped")
PLAN = Measuring(prompts=2, seeds=1, horizons=(5, 20), absences=(2,), recalls=2, batch=2)


def shown(scene, frames=81, start=0):
    return torch.from_numpy(to_uint8(render(scene, frames, start)[None]))


def values(window, scene=SCENE, start=0, names=None):
    """All metrics of a window, or those families that the `names` are of."""
    found, labels = {}, label_pixels(window)
    if names is None or set(names) & set(world_metrics.DRIFT):
        moments = window[::16], labels[::16]
        worst = map(max, world_metrics.drift(*moments, scene, range(start, start + 81, 16)))
        found |= dict(zip(world_metrics.DRIFT, worst))
    if names is None or set(names) & set(world_metrics.ACCURACY):
        found |= world_metrics.accuracy(window, labels, scene)
    if names is None or set(names) & set(world_metrics.MOTION):
        found |= world_metrics.motion(window, labels, scene, start)
    return found


@pytest.fixture(scope="module")
def truth():
    return values(shown(SCENE))


PERFECT = {
    "colour": 1, "shape": 1, "size": 1, "motion": 1, "background": 1, "speed_error": 0, "dynamic_degree": 1,
    "flicker": 0, "colour_error": 0, "texture_error": 0,
}  # fmt: skip
ROUNDING = {"speed_error": 0.1, "flicker": 0.1, "colour_error": 0.7, "texture_error": 0.01}


def test_the_renderer_is_perfect_at_any_time(truth):
    late = values(shown(SCENE, start=240), start=240)
    for name, best in PERFECT.items():
        assert truth[name] == pytest.approx(best, abs=ROUNDING.get(name, 0)), name
        assert late[name] == pytest.approx(best, abs=ROUNDING.get(name, 0)), name


def flickering(window):
    """Every second chunk, of 12 frames behind the first 9, a little brighter."""
    frames = torch.arange(len(window))
    brighter = ((frames + 3) // 12 % 2 * 12)[:, None, None, None]
    return (window.int() + brighter).clamp(max=255).byte()


DAMAGE = {
    "another sprite": (lambda: shown(replace(SCENE, sprites=(replace(CIRCLE, shape="cross"),))), ["shape"]),
    "another colour": (lambda: shown(replace(SCENE, sprites=(replace(CIRCLE, colour="cyan"),))), ["colour"]),
    "another size": (lambda: shown(replace(SCENE, sprites=(replace(CIRCLE, size="small"),))), ["size"]),
    "frozen": (lambda: shown(SCENE, 1).expand(81, -1, -1, -1), ["motion", "dynamic_degree", "speed_error"]),
    "half as fast": (lambda: shown(SCENE, 41).repeat_interleave(2, 0)[:81], ["speed_error"]),
    "another background": (
        lambda: shown(replace(SCENE, background="forest")),
        ["background", "colour_error"],
    ),
    "another texture": (lambda: shown(replace(SCENE, texture="plain")), ["background", "texture_error"]),
    "flickering": (lambda: flickering(shown(SCENE)), ["flicker"]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_metric_notices_its_damage(truth, damage):
    make, names = DAMAGE[damage]
    found = values(make(), names=names)
    for name in names:
        worse = abs(found[name] - truth[name])
        assert worse > 5 * ROUNDING.get(name, 0.1), f"{name}: {truth[name]} became {found[name]}"


def test_a_drift_is_seen_when_it_happens():
    frames = torch.cat([shown(SCENE, 1, 16 * i) for i in range(4)])
    frames[2:] = (frames[2:].int() + torch.tensor([40, 0, 0])).clamp(max=255).byte()
    colour, _ = world_metrics.drift(frames, label_pixels(frames), SCENE, [0, 16, 32, 48])
    assert max(colour[:2]) < 1
    assert min(colour[2:]) == pytest.approx(40, abs=1)


def test_what_the_scene_leaves_open_is_no_error():
    """Another start of the sprite and another phase of the texture are as good."""
    other = replace(SCENE, sprites=(replace(CIRCLE, x=90.0, y=60.0),), phase_x=20.0)
    found = values(shown(other))
    for name, best in PERFECT.items():
        assert found[name] == pytest.approx(
            best, abs={"colour_error": 3, "texture_error": 0.05}.get(name, 0.1)
        ), name


def test_a_pan_has_no_speed():
    scene = replace(SCENE, pan="left")
    found = world_metrics.motion(shown(scene), label_pixels(shown(scene)), scene)
    assert all(math.isnan(value) for value in found.values())


def recalled(window, scene):
    return world_metrics.recall(window, label_pixels(window), scene)


@pytest.mark.parametrize("seconds", [2, 5, 15])
def test_a_recall_scene_hides_its_sprite_that_long(seconds):
    rng = random.Random(seconds)
    scenes = [world_recall.recall_scene(rng, seconds) for _ in range(8)]
    given, total = world_recall.plan(scenes)
    start, stop = world_recall.judged_span(scenes)
    assert given % 3 == total % 3 == 0
    assert stop <= 4 * (total - 1) + 1
    for scene in scenes[:2]:
        away, back = world_recall.absence(scene)
        assert back - away == pytest.approx(16 * seconds, abs=4)
        assert not (label_pixels(shown(scene, 9)) >= 0).any(), "not in the sink"
        swing_back = 8 + 28 + scene.hold + world_recall.pan_cycle(scene) - scene.pan_start
        assert swing_back < 4 * (given - 1) + 1 <= back, "the swing is seen, the return is not"
        seen = label_pixels(shown(scene, 3, away - 2)) >= 0
        assert seen[0].any() and not seen[2].any(), "out of view from the frame that is said"
        assert not (label_pixels(shown(scene, 1, back - 1)) >= 0).any()
        assert recalled(shown(scene, stop - start, start), scene)["recall"] == 1
        (sprite,) = scene.sprites
        for change in ({"shape": "ring" if sprite.shape != "ring" else "star"}, {"colour": "blue"}):
            if getattr(sprite, next(iter(change))) != next(iter(change.values())):
                wrong = replace(scene, sprites=(replace(sprite, **change),))
                assert recalled(shown(wrong, stop - start, start), scene)["recall"] == 0
        empty = replace(scene, sprites=())
        assert sum(recalled(shown(empty, stop - start, start), scene).values()) == 0


def test_measuring_the_renderer_gives_perfect_rows():
    rows = measure("renderer", RenderedSource("cpu"), replace(PLAN, prompts=1, recalls=1, horizons=(5,)))
    found = {(r.metric, r.seconds): r.value for r in rows}
    assert all(found[name, 5] == 1 for name in world_metrics.ACCURACY)
    assert [seconds for metric, seconds in found if metric == "colour_error"] == [0, 5]
    assert all(v < 1 for (metric, _), v in found.items() if metric == "colour_error")
    assert found["recall", 2] == 1
    gray = RenderedSource("cpu", change=lambda frames, start: frames // 4 + 90)
    (clip,) = gray.clips(held_out_scenes(1), [0], spans_of(replace(PLAN, horizons=(5,))))
    damaged = judged(clip, labelled(clip, "cpu"), held_out_scenes(1)[0], replace(PLAN, horizons=(5,)))
    assert damaged["colour", 5] == 0
    assert damaged["colour_error", 5] > 20


class Steps(torch.nn.Module):
    """A VAE that shows each latent frame's first number; 1 frame for the first, 4 for later ones."""

    class Decoder:
        first = True

        def push(self, z):
            counts = torch.full((z.shape[2],), 4)
            counts[0] = 1 if self.first else 4
            self.first = False
            frames = z[:, :1].repeat_interleave(counts, 2)
            return frames.expand(-1, 3, -1, -1, -1) / 127.5 - 1

    def stream_decoder(self):
        return self.Decoder()


def test_spans_are_cut_where_they_lie():
    latents = torch.arange(31.0).view(1, 1, 31, 1, 1).expand(2, 16, 31, 4, 4).clone()
    latents[1] += 100
    spans = [(0, 1), (1, 9), (100, 111), (16, 17)]
    first, second = decode_spans(Steps(), latents, spans, "cpu")
    numbers = [[int(frame[0, 0, 0]) for frame in span] for span in first]
    assert numbers == [[-(-f // 4) for f in range(*span)] for span in spans]
    assert [[int(f[0, 0, 0]) - 100 for f in span] for span in second] == numbers
    assert stretches(spans) == [(0, 5), (19, 29)], "only what is needed is decoded"


def test_clips_go_on_from_given_latents(make_model):
    """The given chunks come first and change what follows; a clip alone is the clip in the batch."""
    model, rows = make_model(), torch.randn(2, 4, 32)
    given = torch.randn(2, 16, 3, 32, 32)
    attention = AttentionConfig(positions="rebased")
    both = sample(model, rows, attention, 6, (1, 2), given)
    assert both.shape == (2, 16, 6, 32, 32)
    assert torch.equal(both[:, :, :3], given)
    alone = sample(model, rows[1:], attention, 6, (2,), given[1:])
    torch.testing.assert_close(alone, both[1:], atol=1e-3, rtol=1e-3)
    other = sample(model, rows[1:], attention, 6, (2,), given[:1])
    assert (other - alone)[:, :, 3:].abs().max() > 0.01


def test_intervals_cover_the_mean_they_should():
    """95 % of the intervals of samples of 40 hold the true mean, give or take what 200 samples can tell."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        _, low, high = quality_report.interval(rng.normal(3.0, 1.0, 40))
        hits += low <= 3.0 <= high
    assert 0.88 < hits / 200 < 0.99
    assert all(math.isnan(x) for x in quality_report.interval([]))


def rows_of(name, shift, prompts=6):
    spread = [0.1, 0.5, 0.9, 0.3, 0.7, 0.2]
    return [
        Row(name, metric, seconds, p, s, spread[p] + shift * seconds)
        for metric in ("colour", "colour_error") for seconds in (5, 20) for p in range(prompts) for s in range(3)
    ]  # fmt: skip


def test_differences_are_taken_prompt_by_prompt(tmp_path):
    """A small difference that every prompt shows is certain, however far the prompts lie apart."""
    rows = rows_of("dense-21", 0.0) + rows_of("sparse", 0.01)
    rows.append(Row("sparse", "colour", 5, 0, 3, math.nan))  # not measurable there: left out
    lines = {(x["name"], x["metric"], x["seconds"]): x for x in quality_report.table(rows, "dense-21")}
    line = lines["sparse", "colour", 20]
    assert line["mean"] == pytest.approx(0.45 + 0.2)
    assert line["high"] - line["low"] > 0.2
    assert line["difference_low"] == pytest.approx(0.2)
    assert line["difference_high"] == pytest.approx(0.2)
    quality_report.write_rows(tmp_path / "clips.csv", rows)
    again = quality_report.read_rows(tmp_path / "clips.csv")
    assert again[:-1] == rows[:-1]
    quality_report.write_report(tmp_path, again, "dense-21")
    assert (tmp_path / "colour.png").stat().st_size > 1000
    assert len(list(csv.DictReader((tmp_path / "table.csv").open()))) == 8
    assert "| colour | 20 | 0.450 [" in (tmp_path / "table.md").read_text()


def test_pictures_hold_what_they_are_given():
    image = curve_plot(
        "title", {"a": [(5, 0.5, 0.4, 0.6), (60, -0.2, -0.3, 0.1)], "b": [(5, math.nan, 0, 1)]}, "s"
    )
    assert image.size == (760, 400)
    cells = heat_map("title", np.array([[0.0, 1.0]]), ["layer"], ["a", "b"])
    pixels = np.asarray(cells).reshape(-1, 3)
    assert (pixels == [250, 220, 60]).all(1).any() and (pixels == [30, 20, 70]).all(1).any()


def test_the_compared_variants_fit_a_chunk_of_three_and_a_cache_of_twelve():
    for name, mode in MODES.items():
        mode.validate(3)
        frames = mode.window_frames + (mode.persistent_frames if mode.mode == "sparse" else 0)
        assert frames == (21 if name == "dense-21" else 12)
    assert {mode for _, mode, _ in ENTRIES} == set(MODES)
    assert ("sparse-training-free", "sparse", "dense-21") in ENTRIES


def test_settings_that_cannot_be_measured_are_explained():
    with pytest.raises(ValueError, match=r"horizons \(3,\): five seconds are judged at a time"):
        replace(PLAN, horizons=(3,)).validate()
    with pytest.raises(ValueError, match="prompts 0, seeds 1 and batch 2 must be 1 or more"):
        replace(PLAN, prompts=0).validate()


@pytest.fixture
def command(load_command):
    return load_command("world_quality")


def test_the_command_measures_what_is_named_once(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command.clips, "load_vae", lambda folder, device: None)
    arguments = ["--entry", "renderer", "--prompts", "1", "--seeds", "1", "--horizons", "5", "--recalls", "0",
                 "--device", "cpu", "--out", str(tmp_path)]  # fmt: skip
    command.main(arguments)
    assert "| colour | 5 | 1.000 [1.000, 1.000] |" in capsys.readouterr().out
    command.main(arguments)
    assert "renderer: measured before" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match="entry 'a=b:fast' is not NAME=FOLDER:MODE with one of the modes dense-21"
    ):
        command.parse_entry("a=b:fast")
    assert command.parse_entry("mine=build/world:sparse") == ("mine", Path("build/world"), "sparse")
    with pytest.raises(ValueError, match="nothing to measure"):
        command.main(["--out", str(tmp_path)])


def test_the_command_shows_what_comes_back(command, tmp_path, monkeypatch):
    monkeypatch.setattr(command.clips, "load_vae", lambda folder, device: None)
    command.main(["--entry", "renderer", "--show", "2", "--device", "cpu", "--out", str(tmp_path)])
    with Image.open(tmp_path / "recall_frames.jpg") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert pixels.shape[0] == 20 + 2 * 115 - 3, "a row a scene"
    left = pixels.shape[1] - (4 * 115 - 3)
    seen, away, back = (pixels[20:132, left + 115 * i : left + 115 * i + 112] for i in (0, 1, 3))
    assert abs(seen - back).max() < 60 < 100 < abs(seen - away).max(), "it is back where it was"
