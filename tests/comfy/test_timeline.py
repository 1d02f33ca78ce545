"""Prompts over time without ComfyUI: how they are read, and what a change does to the memory."""

from __future__ import annotations

import pytest
import torch
from sparse_forcing_pack.sparse_attn.config import AttentionConfig
from sparse_forcing_pack.sparse_attn.rollout import prefill
from sparse_forcing_pack.sparse_attn.state import StreamState
from sparse_forcing_pack.sparse_attn.timeline import (
    TimedPrompt,
    TimelineError,
    change_prompt,
    parse_timeline,
    prompt_at,
    seconds_at,
)

CHUNK, LAYERS, HEADS, DIM, GRID = 3, 2, 2, 16, (4, 4)


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("a red circle", [(0, "a red circle")]),
        ("0s: a red circle / 3s: a blue star", [(0, "a red circle"), (3, "a blue star")]),
        (
            "0s: a red circle\n\n  2.5s :a blue   star\n1m30s: dusk",
            [(0, "a red circle"), (2.5, "a blue star"), (90, "dusk")],
        ),
        ("0s: a red circle\nover navy\n3s: x", [(0, "a red circle over navy"), (3, "x")]),
        ("0s: red/blue, 2 cats: one / two", [(0, "red/blue, 2 cats: one / two")]),
        ("0s: a\r\n3s: b\r\n", [(0, "a"), (3, "b")]),
    ],
)
def test_time_lines_are_read(text, prompts):
    assert parse_timeline(text) == [TimedPrompt(float(start), words) for start, words in prompts]


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("", (1, 1), "it is empty"),
        ("  \n ", (1, 1), "it is empty"),
        ("2s: a", (1, 1), "starts at 2s: begin with 0s"),
        ("0s: a\n  3: b", (2, 3), "'3' is not a time"),
        ("0s: a\n3 sec: b", (2, 1), "'3 sec' is not a time"),
        ("0s: a / 4s: b / 4s: c", (1, 17), "4s follows 4s"),
        ("0s: a / 3: b", (1, 9), "'3' is not a time"),
        ("0s: a\n1:30: b", (2, 1), "'1' is not a time"),
        ("0s: a\n5s: b\n3s: c", (3, 1), "3s follows 5s"),
        ("0s: a / 2s:   ", (1, 9), "the prompt at 2s is empty"),
    ],
)
def test_mistakes_are_located(text, place, message):
    with pytest.raises(TimelineError, match=message) as caught:
        parse_timeline(text)
    assert (caught.value.line, caught.value.column) == place
    assert f"line {place[0]}, column {place[1]}" in str(caught.value)


def test_the_prompt_of_a_chunk_is_the_latest_that_has_begun():
    prompts = parse_timeline("0s: a / 0.5625s: b / 2s: c")
    assert [seconds_at(frame, 16) for frame in (0, 3, 6)] == [0, 9 / 16, 21 / 16]
    assert [prompt_at(prompts, seconds_at(frame, 16)) for frame in (0, 3, 6, 9)] == [0, 1, 1, 2]


class Run:
    """The memory and a model of it: every layer's keys and values depend on the prompt and on what was attended."""

    def __init__(self, **attention):
        config = AttentionConfig(block_tokens=16, **attention)
        self.state = StreamState(
            layers=LAYERS, heads=HEADS, head_dim=DIM, grid=GRID, chunk_frames=CHUNK, attention=config,
            total_frames=30,
        )  # fmt: skip
        self.prompt, self.frame = 1.0, 0

    def begin_chunk(self, frames):
        self.state.begin_chunk(frames)

    def end_chunk(self):
        self.state.end_chunk()
        self.frame = self.state.frame

    def denoise(self, x, sigma):
        h = x.permute(0, 2, 3, 4, 1).reshape(1, -1, HEADS, DIM) * self.prompt + self.state.t_start / 100
        for layer in range(LAYERS):
            h = h + self.state.attend(layer, h, h.roll(1, -1), h.roll(2, -1))
        return x


VIDEO = torch.randn(1, HEADS * DIM, 18, *GRID, generator=torch.Generator().manual_seed(4))
ROOMY = [
    {"mode": "dense"},
    {"mode": "window", "window_frames": 18, "sink_frames": 3},
    {"mode": "window", "window_frames": 18, "sink_frames": 0, "positions": "rebased"},
    {"mode": "sparse", "window_frames": 9, "persistent_frames": 18, "topk": 1.0},
    {"mode": "sparse", "window_frames": 18, "persistent_frames": 3, "topk": 0.5},
    {"mode": "sparse", "window_frames": 18, "persistent_frames": 3, "sink_frames": 0, "positions": "rebased"},
]
TIGHT = [
    {"mode": "window", "window_frames": 9, "sink_frames": 3},
    {"mode": "window", "window_frames": 9, "sink_frames": 3, "positions": "rebased"},
    {"mode": "sparse", "window_frames": 9, "persistent_frames": 6},
    {"mode": "sparse", "window_frames": 6, "persistent_frames": 3, "positions": "rebased"},
]


def name(settings):
    return " ".join(str(value) for value in settings.values())


def switch(run, policy, chunk_frames=CHUNK):
    frames = change_prompt(run.denoise, run, [run.state], lambda a, b: VIDEO[:, :, a:b], policy, chunk_frames)
    assert run.frame == run.state.frame
    return frames


def filled(frames, **settings):
    run = Run(**settings)
    prefill(run.denoise, run, VIDEO[:, :, :frames], CHUNK)
    return run


def same(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(
            a[key], b[key], rtol=tolerance, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}"
        )


SPARSE = [settings for settings in ROOMY + TIGHT if settings["mode"] == "sparse"]


@pytest.mark.parametrize("settings", [s for s in SPARSE if s in ROOMY], ids=name)
@pytest.mark.parametrize("frames", [3, 13, 15])
def test_running_again_under_the_same_prompt_changes_nothing(settings, frames):
    """Nothing has been forgotten yet, so a second reading, chunk by chunk, sees what the first one saw.

    For the other modes, which read in one pass, see tests/core/test_recache.py.
    """
    run = filled(frames, **settings)
    before = run.state.snapshot()
    assert 0 < run.state.recent_frames() <= frames
    switch(run, "re-cache")
    same(run.state.snapshot(), before, 1e-5)


@pytest.mark.parametrize("settings", TIGHT, ids=name)
@pytest.mark.parametrize("frames", [3, 6, 15, 18])
def test_re_caching_leaves_the_long_lived_part_alone(settings, frames):
    run = filled(frames, **settings)
    before, recent = run.state.snapshot(), run.state.recent_frames()
    run.prompt = 2.0
    assert switch(run, "re-cache") == recent
    after = run.state.snapshot()
    for key in before.keys() - {
        "k",
        "v",
        "slots",
        "k_pages",
        "v_pages",
        "pooled",
    }:  # whose frames, where, how many
        assert torch.equal(after[key], before[key]), key
    if settings["mode"] == "window":
        kept = (
            3 if frames > 9 else 0
        )  # before that nothing has left the window, and the sink is read again with it
        now, then = (s["k"].index_select(2, s["slots"]) for s in (after, before))  # in the order of time
        assert torch.equal(now[:, :, :kept], then[:, :, :kept])
        assert not torch.equal(now[:, :, kept:], then[:, :, kept:])
    else:
        count = int(before["persistent"])
        table = before["table"][..., :count, None, None]
        kept = [s["v_pages"].gather(2, table.expand(-1, -1, -1, 16, DIM)) for s in (before, after)]
        assert torch.equal(*kept)
        assert recent == 0 or not torch.equal(before["v_pages"], after["v_pages"])


@pytest.mark.parametrize("settings", SPARSE, ids=name)
def test_flushing_leaves_the_recent_window_alone_under_the_new_prompt(settings):
    run = filled(15, **settings)
    run.prompt = 2.0
    recent = switch(run, "flush")
    assert 3 <= recent <= 15
    fresh = Run(**settings)
    fresh.prompt, fresh.frame, fresh.state.frame = 2.0, 15 - recent, 15 - recent
    prefill(fresh.denoise, fresh, VIDEO[:, :, 15 - recent : 15], CHUNK)
    now, then = run.state.snapshot(), fresh.state.snapshot()
    for key in ("frames", "slots", "persistent", "window", "time", "frame"):
        assert key not in then or torch.equal(now[key], then[key]), key
    x = VIDEO[:, :, 15:18]
    outs = []
    for each in (run, fresh):
        each.begin_chunk(3)
        each.state.attend(0, *(x.permute(0, 2, 3, 4, 1).reshape(1, -1, HEADS, DIM),) * 3)
        outs.append(each.state.attend(1, *(x.permute(0, 2, 3, 4, 1).reshape(1, -1, HEADS, DIM),) * 3))
    assert torch.equal(*outs)


@pytest.mark.parametrize("settings", [ROOMY[0], TIGHT[0], TIGHT[2]], ids=name)
def test_keeping_touches_nothing(settings):
    run = filled(15, **settings)
    before = run.state.snapshot()
    run.prompt = 2.0
    assert switch(run, "keep") == 0
    same(run.state.snapshot(), before)
