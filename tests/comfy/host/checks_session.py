"""Sessions: a video that is stopped and goes on is the one that was never stopped; what does not fit is refused."""

from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management
import folder_paths
import torch
from checks_common import (
    apply,
    fails,
    noise,
    pack,
    prompt,
    stream_session,
    stream_video,
    tiny_model,
    tiny_vae,
)
from checks_live import page, stop_after, timeline

MODES = (
    {"mode": "dense"},
    {"mode": "window", "window_frames": 9},
    {"mode": "sparse", "block_tokens": 16},
    {"mode": "sparse", "block_tokens": 16, "positions": "rebased"},
)
LENGTH = {"seconds": 2.5}  # 12 latent frames, 4 chunks


def nodes():
    return pack("nodes.session_nodes")


def through_a_file(session, prefix="sessions/check"):
    """The session as Save Session writes it and Load Session reads it."""
    saved = nodes().SaveSparseForcingSession.execute(session, prefix)
    assert saved.args == (session,)
    name = nodes().list_sessions()[0]
    assert (
        name.startswith(prefix) and name in nodes().LoadSparseForcingSession.define_schema().inputs[0].options
    )
    return nodes().LoadSparseForcingSession.execute(name).args[0]


def stopped(model, vae, after=1, **changes):
    """A run that its viewer stopped: (session, path of its video)."""
    with page(stop_after(after)):
        *_, path, session = stream_session(model, vae, node="4", **LENGTH | changes)
    return session, path


def check_a_stopped_video_goes_on_bit_for_bit():
    vae = tiny_vae()
    for settings in MODES:
        model = apply(tiny_model(), **settings)
        images, latent, path = stream_video(model, vae, **LENGTH)
        session, _ = stopped(model, vae)
        loaded = through_a_file(session)
        assert loaded.frames == 6 and loaded.facts["video"]["frames"] == 21
        new_images, new_latent, new_path, _ = stream_session(
            model, vae, session=loaded, **LENGTH | {"seed": 99}
        )
        assert torch.equal(new_latent, latent), settings
        assert torch.equal(new_images, images) and Path(new_path).read_bytes() == Path(path).read_bytes()


def check_a_finished_video_grows():
    vae = tiny_vae()
    for settings in MODES[::2]:
        model = apply(tiny_model(), **settings)
        _, latent, path = stream_video(model, vae, **LENGTH)
        *_, session = stream_session(model, vae, seconds=1.0)
        _, longer, new_path = stream_video(model, vae, session=through_a_file(session), **LENGTH)
        assert torch.equal(longer, latent) and Path(new_path).read_bytes() == Path(path).read_bytes()
        fails("already has 1.31 seconds: set seconds", stream_video, model, vae, session=session)


def check_frames_one_at_a_time_guidance_and_a_start_image():
    vae, model = tiny_vae(), apply(tiny_model(), mode="window", window_frames=6)
    options = {"chunk_frames": 1, "seconds": 1.7}
    latent, path = stream_video(model, vae, **options)[1:]
    for after in (0, 1, 2):
        session, _ = stopped(model, vae, after, **options)
        _, new, new_path = stream_video(model, vae, session=session, **options)
        assert torch.equal(new, latent) and Path(new_path).read_bytes() == Path(path).read_bytes()
    options = {"cfg": 2.0, "negative": prompt(5)}
    latent = stream_video(model, vae, **LENGTH | options)[1]
    session, _ = stopped(model, vae, **options)
    assert set(session.memory) == {"positive.0", "negative.0"}
    assert torch.equal(stream_video(model, vae, session=session, **LENGTH | options)[1], latent)
    fails("made with cfg 2.0 (here 1.0)", stream_video, model, vae, session=session, **LENGTH)
    model.model_options["transformer_options"]["ar_config"] = {"initial_latent": noise(1, 4, 4)}
    latent = stream_video(model, vae, **LENGTH)[1]
    for after in (-1, 1):
        session, _ = stopped(model, vae, after)
        assert torch.equal(stream_video(model, vae, session=session, **LENGTH)[1], latent)
    other = apply(tiny_model(), mode="window", window_frames=6)
    assert torch.equal(stream_video(other, vae, session=session, **LENGTH)[1], latent), (
        "the session knows them"
    )


def check_prompts_go_on_as_they_were():
    model, vae = apply(tiny_model(), mode="sparse", block_tokens=16), tiny_vae()
    story = {"positive": timeline("0s: 1 / 1.0s: 2")}
    latent = stream_video(model, vae, **LENGTH | story)[1]
    for after in (0, 1, 2):
        session, _ = stopped(model, vae, after, **story)
        assert torch.equal(stream_video(model, vae, session=session, **LENGTH | story)[1], latent), after
    session, _ = stopped(model, vae)
    policies = {
        policy: stream_video(
            model, vae, session=session, positive=prompt(2), on_prompt_change=policy, **LENGTH
        )[1]
        for policy in ("keep", "re-cache", "flush")
    }
    assert torch.equal(policies["re-cache"], latent), "another prompt is a change of the prompt"
    assert not torch.equal(policies["keep"], latent) and not torch.equal(policies["flush"], latent)


def check_autosave_outlives_an_interrupt():
    module, model, vae = pack("nodes.stream_video"), apply(tiny_model(), mode="window"), tiny_vae()
    whole, path = stream_video(model, vae, seconds=4.0)[1:]
    real = module.VideoStream._on_chunk

    def interrupted(self, chunk):
        real(self, chunk)
        if chunk.index == 4:
            comfy.model_management.interrupt_current_processing()

    module.VideoStream._on_chunk = interrupted
    logging.disable(logging.WARNING)
    try:
        stream_video(model, vae, seconds=4.0, autosave_chunks=2, filename_prefix="long/auto")
        raise AssertionError("the interrupt was ignored")
    except comfy.model_management.InterruptProcessingException:
        pass
    finally:
        module.VideoStream._on_chunk = real
        logging.disable(logging.NOTSET)
    name = nodes().list_sessions()[0]
    assert name.startswith("long/auto_") and name.endswith("_.session.safetensors")
    session = nodes().LoadSparseForcingSession.execute(name).args[0]
    assert session.frames == 12, "after the fourth chunk of five"
    latents = pack("sparse_attn.session_files").latents_of(Path(folder_paths.get_output_directory(), name))
    assert latents.stat().st_size == 4 * session.latent.numel(), "each frame once"
    assert torch.equal(through_a_file(session, "sessions/apart").latent, session.latent)
    latents.rename(latents.with_name("elsewhere"))
    fails(
        f"its latent is in {latents.name}, which is not beside it",
        nodes().LoadSparseForcingSession.execute,
        name,
    )
    _, latent, new_path, kept = stream_session(model, vae, seconds=4.0, session=session, autosave_chunks=2)
    assert torch.equal(latent, whole) and Path(new_path).read_bytes() == Path(path).read_bytes()
    assert kept.frames == whole.shape[2] and pack("nodes.keeping").SUFFIX in nodes().list_sessions()[0]


def check_the_next_chunk_does_not_wait_for_the_disk():
    keeping, model, vae = pack("nodes.keeping"), apply(tiny_model(), mode="window"), tiny_vae()
    want = stream_video(model, vae, **LENGTH)[1]
    real, next_chunk, under_way, seen = keeping.save_session, threading.Event(), [], []

    def slow(session, *rest):
        under_way.append(session)
        assert len(under_way) == 1, "one at a time"
        seen.append((session.frames, next_chunk.wait(60)))
        real(session, *rest)
        under_way.clear()

    def made(run, chunk):
        if chunk.index == 2:
            next_chunk.set()

    keeping.save_session = slow
    try:
        with page(made):
            latent = stream_video(
                model, vae, node="4", autosave_chunks=2, filename_prefix="long/slow", **LENGTH
            )[1]
    finally:
        keeping.save_session = real
    assert torch.equal(latent, want)
    assert seen == [(6, True), (12, True)] and not under_way, "the run ends when the last one is written"
    name = nodes().list_sessions()[0]
    assert name.startswith("long/slow_")
    assert torch.equal(nodes().LoadSparseForcingSession.execute(name).args[0].latent, want)


def check_a_failing_autosave_stops_nothing():
    keeping, model, vae = pack("nodes.keeping"), apply(tiny_model()), tiny_vae()
    want = stream_video(model, vae)[1]
    real = keeping.save_session

    def full(*_):
        raise OSError(28, "No space left on device")

    keeping.save_session = full
    logging.disable(logging.WARNING)
    try:
        with page() as server:
            assert torch.equal(stream_video(model, vae, node="4", autosave_chunks=1)[1], want)
    finally:
        keeping.save_session = real
        logging.disable(logging.NOTSET)
    notes = [content["text"] for event, content in server.sent if event == "sparse_forcing.note"]
    assert notes == ["The session could not be saved: No space left on device"] * 2


def check_the_page_goes_on_counting():
    model, vae = apply(tiny_model()), tiny_vae()
    session, _ = stopped(model, vae)
    with page() as server:
        stream_video(model, vae, node="4", session=session, **LENGTH)
    chunks = [content for event, content in server.sent if event == "sparse_forcing.chunk"]
    assert [(c["done"], c["total"], c["first_frame"]) for c in chunks] == [(3, 4, 21), (4, 4, 33)]
    assert chunks[0]["seconds_left"] > 0 and chunks[0]["fps_made"] > 0


def check_a_lost_video_is_decoded_again():
    model, vae = apply(tiny_model()), tiny_vae()
    _, latent, path = stream_video(model, vae, **LENGTH)
    for loss in ("removed", "replaced"):
        session, old = stopped(model, vae)
        os.remove(old)
        if loss == "replaced":
            Path(old).write_bytes(b"another file" * 1000)
        logging.disable(logging.WARNING)
        try:
            _, new, new_path = stream_video(model, vae, session=session, **LENGTH)
        finally:
            logging.disable(logging.NOTSET)
        assert torch.equal(new, latent) and Path(new_path).read_bytes() == Path(path).read_bytes()


def check_a_session_is_kept_only_where_it_is_asked_for():
    module, model, vae = pack("nodes.stream_video"), apply(tiny_model()), tiny_vae()
    stream, save = module.SparseForcingStreamVideo, nodes().SaveSparseForcingSession

    def wanted(inputs):
        graph = {"4": {"inputs": {"seed": 1}}, "5": {"inputs": inputs}}
        return module._session_wanted(SimpleNamespace(unique_id="4", prompt=graph))

    assert wanted({"session": ["4", 2]}) and not wanted({"samples": ["4", 1], "text": "4"})
    assert module._session_wanted(SimpleNamespace(unique_id="4", prompt=None))
    real, module._session_wanted = module._session_wanted, lambda hidden: False
    try:
        *_, session = stream_session(model, vae)
    finally:
        module._session_wanted = real
    before = stream.fingerprint_inputs(seed=1)
    assert session is None
    fails("Queue the prompt again", save.execute, None, "sessions/none")
    assert stream.fingerprint_inputs(seed=1) != before, "the host would answer from its cache"


def check_sessions_that_do_not_fit_are_refused():
    model, vae = apply(tiny_model(), mode="window"), tiny_vae()
    session, _ = stopped(model, vae)
    video = pack("nodes.stream_video")
    real, video.VideoStream.run = video.VideoStream.run, lambda *_: 1 / 0  # before any work
    try:

        def refused(message, used=model, **changes):
            fails(message, stream_video, used, vae, session=session, **LENGTH | changes)

        refused("made with width 32 (here 48); fps 16 (here 8)", width=48, fps=8)
        refused("made with chunk_frames 3 (here 1)", chunk_frames=1)
        refused("made with sigmas [1.0, 0.9375", steps=2)
        refused("the snapshot has mode window, this stream sparse", apply(tiny_model(), mode="sparse"))
        refused(
            "the snapshot has window_frames 6, this stream 9", apply(model, mode="window", window_frames=9)
        )
        other = tiny_model()
        other.model.diffusion_model.head.modulation.data += 1
        refused("made with model ", apply(other, mode="window"))
        for facts in ({"seed": "3"}, {"seed": -1}, {"video": None}, {"prompt_key": 3}):
            kept, session.facts = session.facts, session.facts | facts
            refused("description is damaged")
            session.facts = kept
        session.facts["video"]["path"] = "../outside.mp4"
        refused("'../outside.mp4' lies outside ComfyUI's output folder")
        session.facts["video"]["path"] = "inside.mp4"
        session.memory["negative.0"] = session.memory["positive.0"]
        refused("remembers positive.0, negative.0, this run needs positive.0")
        session.memory = {"positive.0": session.memory["positive.0"] | {"slots": torch.tensor([99] * 6)}}
        refused("its tables point outside")
        session.latent = session.latent[:, :4]
        refused("is not whole chunks of this video")
    finally:
        video.VideoStream.run = real


def check_only_files_of_the_output_folder_are_loaded():
    load, output = nodes().LoadSparseForcingSession, Path(folder_paths.get_output_directory())
    outside = output.parent / "outside.session.safetensors"
    link = output / "link.session.safetensors"
    outside.write_bytes(b"secret")
    try:
        os.symlink(outside, link)
        for name in ("../outside.session.safetensors", str(outside), "a/../../x", link.name, "\0", "C:\\x\0"):
            fails("lies outside ComfyUI's output folder", load.execute, name)
            assert load.fingerprint_inputs(name) == ""
    finally:
        outside.unlink()
        link.unlink()
    fails("There is no session none", load.execute, "none.session.safetensors")
    fails("outside the output", nodes().SaveSparseForcingSession.execute, SimpleNamespace(), "../../evil")
    inside = output / "cut.session.safetensors"
    inside.write_bytes(b"\x10")
    fails("cannot be read as a session", load.execute, inside.name)
    assert load.fingerprint_inputs(inside.name).endswith(" 1")
    inside.unlink()


def check_what_is_said_of_a_session():
    model, vae = apply(tiny_model()), tiny_vae()
    *_, session = stream_session(model, vae, positive=timeline("0s: 1 / 90s: 2"))
    assert nodes().describe(session) == "6 latent frames, 1.31 s, seed 3\n1"
    json.dumps([session.identity, session.facts])
    session.identity, session.facts = {"fps": "x"}, {}
    assert nodes().describe(session) == "6 latent frames, seed None"
