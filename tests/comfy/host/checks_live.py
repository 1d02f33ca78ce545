"""Stop and keep, prompts over time, typed prompts, and what the page is told."""

from __future__ import annotations

import base64
import gc
import io
import logging
import random
import weakref
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import comfy.model_management
import torch
from checks_common import (
    apply,
    close,
    fails,
    log_said,
    noise,
    pack,
    prompt,
    stream_video,
    tiny_model,
    tiny_vae,
)
from PIL import Image


class Clip:
    """Reads a prompt that is a number: that of `prompt`."""

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, tokens):
        return prompt(int(tokens))


class Server:
    """The host's server as far as a run sees it; `broken` breaks one of its parts."""

    def __init__(self, broken=None, waiting=0):
        self.client_id, self.sent, self.broken, self.waiting = "page", [], broken, waiting
        self.messages, self.sockets_metadata = self, {}

    def qsize(self):
        if self.broken == "queue":
            raise RuntimeError("no queue")
        return self.waiting

    def send_sync(self, event, content, client):
        if self.broken == "socket":
            raise RuntimeError("no socket")
        assert client == "page"
        self.sent.append((event, content))

    def send_progress_text(self, *_):
        pass


@contextmanager
def page(on_chunk=None, server=None):
    """Runs inside are heard by `server`; on_chunk(live, chunk) acts as the viewer does, before a chunk is shown."""
    live, video = pack("nodes.live"), pack("nodes.stream_video")
    executing, real, server = live._executing, video.VideoStream._on_chunk, server or Server()

    def watched(self, chunk):
        if on_chunk is not None:
            (run,) = live.RUNS.values()
            on_chunk(run, chunk)
        real(self, chunk)

    live._executing, video.VideoStream._on_chunk = lambda: ("prompt", server), watched
    try:
        yield server
    finally:
        live._executing, video.VideoStream._on_chunk = executing, real
        assert not live.RUNS


def with_page(model, vae, on_chunk=None, server=None, **changes):
    with page(on_chunk, server) as heard:
        return *stream_video(model, vae, node="4", **changes)[:2], heard.sent


def timeline(text):
    return pack("nodes.prompt_timeline").SparseForcingPromptTimeline.execute(Clip(), text).args[0]


def stop_after(index):
    def act(run, chunk):
        if chunk.index == index:
            run.stopping = True

    return act


def check_stopping_keeps_a_valid_video():
    model, vae = apply(tiny_model()), tiny_vae()
    node = pack("nodes.stream_video").SparseForcingStreamVideo
    whole = stream_video(model, vae, seconds=3.0)[1]
    before = node.fingerprint_inputs(seed=1)
    images, latent, sent = with_page(model, vae, stop_after(1), seconds=3.0)
    assert latent.shape[2] == 6 and torch.equal(latent, whole[:, :, :6]) and len(images) == 21
    assert sent[-1] == (
        "sparse_forcing.end",
        {"prompt_id": "prompt", "node": "4", "outcome": "stopped", "frame_count": 21},
    )
    assert node.fingerprint_inputs(seed=1) != before, "the shorter video would be served from the cache"
    images, latent, _ = with_page(model, vae, stop_after(0), seconds=3.0, chunk_frames=1)
    assert latent.shape[2] == 1 and len(images) == 1
    images, latent, sent = with_page(model, vae, stop_after(4), seconds=3.0)
    assert torch.equal(latent, whole), "too late to stop"
    again = stream_video(model, vae, seconds=3.0)[1]
    assert torch.equal(again, whole), "a stopped run left something behind"


def check_a_cancelled_run_gives_its_memory_back_at_once():
    session, video = pack("nodes.session"), pack("nodes.video_stream")
    left, passes, cancelled = [], 0, random.Random(3)
    real_state, real_pass, real_run = (
        session.SamplingRun.new_state,
        session.SamplingRun.begin_pass,
        video.VideoStream.__init__,
    )

    def seen_state(self, *args):
        left.append(weakref.ref(state := real_state(self, *args)))
        return state

    def seen_run(self, *args):
        real_run(self, *args)
        left.append(weakref.ref(self))

    def counted_pass(self):
        nonlocal passes
        if passes == 0:
            comfy.model_management.interrupt_current_processing()
        passes -= 1
        real_pass(self)

    vae = tiny_vae()
    logging.disable(logging.WARNING)
    gc.disable()  # nothing may wait for the garbage collector: a GPU would run out of memory before it comes
    session.SamplingRun.new_state, session.SamplingRun.begin_pass = seen_state, counted_pass
    video.VideoStream.__init__ = seen_run
    try:
        for settings in ({"mode": "dense"}, {"mode": "window"}, {"mode": "sparse", "block_tokens": 16}):
            model = apply(tiny_model(), **settings)
            for _ in range(17):
                passes = cancelled.randrange(12)
                try:
                    stream_video(model, vae, seconds=4.0, cfg=2.0, negative=prompt(2))
                    raise AssertionError("the interrupt was ignored")
                except comfy.model_management.InterruptProcessingException:
                    pass
                assert not [one for one in left if one() is not None], (settings, passes)
    finally:
        session.SamplingRun.new_state, session.SamplingRun.begin_pass = real_state, real_pass
        video.VideoStream.__init__ = real_run
        gc.enable()
        logging.disable(logging.NOTSET)
    assert len(left) > 100


def check_the_page_is_told_of_every_chunk():
    *_, sent = with_page(apply(tiny_model()), tiny_vae(), seconds=1.7)
    chunks = [content for event, content in sent if event == "sparse_forcing.chunk"]
    assert [(c["done"], c["total"], c["first_frame"], c["frame_count"]) for c in chunks] == [
        (1, 3, 0, 9),
        (2, 3, 9, 12),
        (3, 3, 21, 12),
    ]
    assert [number for c in chunks for number, _ in c["pictures"]] == list(range(33))
    for content in chunks:
        assert content["fps"] == 16 and content["total_frames"] == 33 and content["cache_bytes"] > 0
        assert content["seconds"] > 0 and content["fps_made"] > 0 and not content["takes_prompts"]
        picture = Image.open(io.BytesIO(base64.b64decode(content["pictures"][0][1])))
        assert picture.format == "JPEG" and picture.size == (32, 32)
    assert chunks[0]["seconds_left"] > 0 == chunks[-1]["seconds_left"]
    assert sent[-1][1]["outcome"] == "finished"


def check_the_page_is_told_what_the_memory_holds():
    module, vae, maps = pack("sparse_attn.memory_map"), tiny_vae(), []

    def note(run, chunk):
        maps.append(module.read_memory_map(run.memory()) if chunk.index >= 0 else None)

    for guided in ({}, {"cfg": 2.0, "negative": prompt(2)}):
        maps.clear()
        model = apply(tiny_model(), mode="sparse", block_tokens=1, persistent_frames=6)
        *_, sent = with_page(model, vae, note, seconds=3.0, **guided)
        told = [content["memory"] for event, content in sent if event == "sparse_forcing.chunk"]
        assert len(told) == len(maps) == 5
        for said, found in zip(told, maps):
            shares, firsts = found.shares(), (4 * found.spans[:, 0] - 3).clamp(min=0)
            assert [tile["first"] for tile in said["tiles"]] == firsts[shares > 0].unique().tolist()
            persistent = shares[found.part == 1].tolist()
            assert said["peak"] == round(max(persistent, default=0.0), 4)
            for tile in said["tiles"]:
                (part,) = found.part[firsts == tile["first"]].unique().tolist()
                assert module.PARTS[part] == tile["part"] and ("shares" in tile) == (part == 1)
                if part == 1:
                    # a token is a block here, so what is told of the places are the blocks' shares in their order
                    got = torch.tensor(list(base64.b64decode(tile["shares"]))) / 255
                    close(got, shares[firsts == tile["first"]] / said["peak"], 0.01)
        assert {"sink", "persistent", "window"} == {tile["part"] for tile in told[-1]["tiles"]}
    for settings in ({"mode": "dense"}, {"mode": "window", "window_frames": 9}):
        *_, sent = with_page(apply(tiny_model(), **settings), vae)
        assert [c["memory"] for e, c in sent if e.endswith("chunk")] == [None, None]
    *_, sent = with_page(model, vae, server=Server(waiting=10_000))
    assert {(*c["pictures"], c["memory"]) for e, c in sent if e.endswith("chunk")} == {(None,)}


def check_a_failing_map_never_stops_sampling():
    model, vae, live = apply(tiny_model(), mode="sparse", block_tokens=4), tiny_vae(), pack("nodes.live")
    want = stream_video(model, vae)[1]
    for name in ("gather_tables", "summarise"):
        with patch.object(live, name, side_effect=RuntimeError("broken")), log_said() as texts:
            _, latent, sent = with_page(model, vae)
        assert torch.equal(latent, want) and texts == ["The live memory map failed and is off for this run."]
        chunks = [content for event, content in sent if event == "sparse_forcing.chunk"]
        assert [c["memory"] for c in chunks] == [None, None] and all(c["pictures"] for c in chunks)


def check_previews_are_small_and_few():
    live = pack("nodes.live")
    run = live.LiveRun("p", "4", "page", Server())
    frames = torch.zeros(40, 480, 832, 3, dtype=torch.uint8).numpy()
    run.show_chunk(frames, done=1, total=2, cache_bytes=0)
    run.end("finished")
    (_, content), _ = run.server.sent
    assert [n for n, _ in content["pictures"]][::15] == [0, 39] and len(content["pictures"]) == 16
    assert Image.open(io.BytesIO(base64.b64decode(content["pictures"][3][1]))).size == (384, 222)
    slow = live.LiveRun("p", "4", "page", Server(waiting=10_000))
    slow.show_chunk(frames, done=1, total=2, cache_bytes=0)
    slow.end("finished")
    assert slow.server.sent[0][1]["pictures"] == [] and slow.server.sent[0][1]["done"] == 1


def check_a_failing_preview_never_stops_sampling():
    model, vae = apply(tiny_model()), tiny_vae()
    want = stream_video(model, vae)[1]
    logging.disable(logging.WARNING)
    try:
        for server in (Server("queue"), Server("socket"), SimpleNamespace(client_id="page")):
            with page(None, server):
                assert torch.equal(stream_video(model, vae, node="4")[1], want)
        live = pack("nodes.live")
        real, live.jpeg = live.jpeg, lambda frame: 1 / 0
        try:
            _, latent, sent = with_page(model, vae)
        finally:
            live.jpeg = real
    finally:
        logging.disable(logging.NOTSET)
    assert torch.equal(latent, want)
    assert [c["pictures"] for e, c in sent if e.endswith("chunk")] == [[], []]


def check_prompts_change_at_their_chunk():
    vae = tiny_vae()
    for settings in (
        {"mode": "dense"},
        {"mode": "window", "window_frames": 9},
        {"mode": "sparse", "block_tokens": 16},
    ):
        model = apply(tiny_model(), **settings)
        plain = stream_video(model, vae, seconds=2.5)[1]
        last = {}
        for policy in ("keep", "re-cache", "flush"):
            options = {"seconds": 2.5, "on_prompt_change": policy}
            got = stream_video(model, vae, positive=timeline("0s: 1 / 1.0s: 2"), **options)[1]
            assert torch.equal(got[:, :, :6], plain[:, :, :6]), "the first prompt holds for chunks before 1 s"
            assert (got[:, :, 6:9] - plain[:, :, 6:9]).abs().max() > 1e-3
            last[policy] = got
        assert not torch.equal(last["keep"], last["re-cache"])
        same = stream_video(
            model, vae, positive=timeline("0s: 1\n1s: 1"), seconds=2.5, on_prompt_change="keep"
        )
        assert torch.equal(same[1], plain), "a change to the same prompt under keep"


def check_prompts_change_with_guidance_and_a_start_image():
    vae, model = tiny_vae(), apply(tiny_model(), mode="sparse", block_tokens=16)
    options = {"cfg": 2.0, "negative": prompt(5), "seconds": 1.7}
    plain = stream_video(model, vae, **options)[1]
    got = stream_video(model, vae, positive=timeline("0s: 1 / 1s: 2"), **options)[1]
    assert torch.equal(got[:, :, :6], plain[:, :, :6]) and not torch.equal(got, plain)
    model.model_options["transformer_options"]["ar_config"] = {"initial_latent": noise(1, 4, 4)}
    for policy in ("keep", "re-cache", "flush"):
        images, latent, _ = with_page(
            model, vae, positive=timeline("0s: 1 / 1s: 2"), seconds=1.7, on_prompt_change=policy
        )
        assert latent.shape[2] == 10 and len(images) == 37 and latent.isfinite().all()


def check_a_typed_prompt_holds_from_the_next_chunk():
    model, vae = apply(tiny_model(), mode="sparse", block_tokens=16), tiny_vae()
    options = {"seconds": 2.5, "on_prompt_change": "re-cache"}
    want = stream_video(model, vae, positive=timeline("0s: 1 / 1.0s: 2"), **options)[1]

    def type_it(run, chunk):
        if chunk.index == 1:
            assert run.takes_prompts
            run.leave_prompt("2")

    _, got, sent = with_page(model, vae, type_it, clip=Clip(), **options)
    assert torch.equal(got, want)
    assert [c["prompt"] for e, c in sent if e.endswith("chunk")] == ["", "", "2", "2"]

    def type_nonsense(run, chunk):
        if chunk.index == 1:
            run.leave_prompt("nonsense")

    logging.disable(logging.WARNING)
    try:
        _, got, sent = with_page(model, vae, type_nonsense, positive=timeline("1"), **options)
    finally:
        logging.disable(logging.NOTSET)
    assert torch.equal(got, stream_video(model, vae, **options)[1]), (
        "a prompt that cannot be read ends nothing"
    )
    assert any(event == "sparse_forcing.note" for event, _ in sent)


def check_other_nodes_see_the_first_prompt_alone():
    (entry,) = timeline("0s: 1 / 3s: 2")
    assert torch.equal(entry[0], prompt(1)[0][0])
    node = pack("nodes.prompt_timeline").SparseForcingPromptTimeline
    assert node.validate_inputs(text="0s: a / 3s: b") is True and node.validate_inputs() is True
    assert "line 1, column 9" in node.validate_inputs(text="0s: a / 3: b")
    fails("clip is empty", node.execute, None, "a")


def check_the_world_model_obeys_a_new_prompt():
    model, clip, vae = pack("nodes.loaders").SparseForcingWorldModel.execute().args
    scene = "a large red circle bouncing over a {} plain background"

    def type_it(run, chunk):
        if chunk.index == 1:
            run.leave_prompt(scene.format("maroon"))

    node = pack("nodes.prompt_timeline").SparseForcingPromptTimeline
    positive = node.execute(clip, scene.format("navy")).args[0]
    images, *_ = with_page(model, vae, type_it, positive=positive, width=64, height=64, seconds=3.3)
    redness = (
        (images[..., 0] - images[..., 2]).flatten(1).median(1).values
    )  # the background is most of the picture
    assert redness[:21].max() < 0 and redness[-6:].min() > 0.15, redness


def check_a_second_copy_of_the_pack_leaves_the_routes_alone():
    from aiohttp import web
    from server import PromptServer

    live = pack("nodes.live")
    had = getattr(PromptServer, "instance", None)
    PromptServer.instance = SimpleNamespace(routes=web.RouteTableDef())
    logging.disable(logging.WARNING)
    try:
        live.add_routes()
        live.add_routes()
        assert [route.path for route in PromptServer.instance.routes] == [live.STOP, live.PROMPT]
        assert live.RUNS is PromptServer.instance.sparse_forcing_runs, "one table for the runs of both"
    finally:
        logging.disable(logging.NOTSET)
        if had is None:
            del PromptServer.instance
        else:
            PromptServer.instance = had
