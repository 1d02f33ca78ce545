"""The renderer: a closed form of scene and frame."""

import random

import pytest
import torch
from sparse_forcing_pack.sparse_attn.world.render import camera_offset, render
from sparse_forcing_pack.sparse_attn.world.scene import (
    COLOURS,
    MOTIONS,
    PAN_DISTANCE,
    PAN_HOLD,
    PAN_REST,
    PAN_SWING,
    SIZE_PX,
    Scene,
    Sprite,
    sample_scene,
)

CYCLE = 2 * PAN_REST + 2 * PAN_SWING + PAN_HOLD  # frames from one start of a pan to the next
SMALL = (64, 96)


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_later_start_is_a_slice(motion):
    scene = Scene(
        (Sprite("star", "pink", "small", motion, 40.0, 30.0),), "forest", "diagonal", "", 8, 5.0, 9.0
    )
    whole = render(scene, 12, size=SMALL)
    assert torch.equal(render(scene, 5, start=7, size=SMALL), whole[:, 7:])


@pytest.mark.parametrize("pan", ["left", "right"])
@pytest.mark.parametrize("cycles", [1, 1000])
def test_a_pan_returns_to_where_it_was(pan, cycles):
    scene = Scene((Sprite("ring", "cyan", "large", "still"),), "plum", "checkered", pan)
    first, away, again = (
        render(scene, 1, start=start) for start in (0, PAN_REST + PAN_SWING, cycles * CYCLE)
    )
    assert torch.equal(again, first)
    assert shows(first, "cyan") and not shows(away, "cyan")


def test_the_camera_rests_swings_and_holds():
    offset = camera_offset(Scene((), "navy", "plain", "left"), torch.arange(2.0 * CYCLE))
    assert torch.equal(offset[:CYCLE], offset[CYCLE:])
    assert not offset[: PAN_REST + 1].any()
    assert (offset[PAN_REST + PAN_SWING :][: PAN_HOLD + 1] == -PAN_DISTANCE).all()
    assert offset.diff().abs().max() <= PAN_DISTANCE / PAN_SWING + 1e-3


def shows(video, colour):
    """Whether any pixel has exactly a sprite's colour."""
    rgb = torch.tensor(COLOURS[colour])[:, None, None, None] / 127.5 - 1
    return bool(((video - rgb).abs() < 1e-3).all(0).any())


def test_every_sprite_of_a_scene_shows_in_its_first_frame():
    rng = random.Random(5)
    for _ in range(10):
        scene = sample_scene(rng)
        image = render(scene, 1)
        assert image.shape == (3, 1, SIZE_PX, SIZE_PX)
        assert image.dtype == torch.float32
        assert image.abs().max() <= 1
        assert [s.colour for s in scene.sprites if shows(image, s.colour)] == [
            s.colour for s in scene.sprites
        ] or crowded(scene)


def crowded(scene):
    """Whether sprites may hide each other."""
    centres = [torch.tensor([s.x, s.y]) for s in scene.sprites]
    return any((a - b).norm() < 80 for i, a in enumerate(centres) for b in centres[:i])


def test_a_smaller_view_is_a_part_of_the_larger_one():
    scene = Scene((Sprite("cross", "white", "large", "diagonal", 60.0, 50.0),), "maroon", "banded")
    torch.testing.assert_close(render(scene, 2, size=SMALL), render(scene, 2)[:, :, : SMALL[0], : SMALL[1]])
