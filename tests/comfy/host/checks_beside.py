"""Stream Video decoding beside the next chunk: on a CPU, where it is not worth it, these checks ask for it."""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import checks_live
import checks_session
import comfy.model_management
import folder_paths
import numpy as np
import torch
from checks_common import (
    apply,
    fails,
    log_said,
    pack,
    prompt,
    stream_session,
    stream_video,
    tiny_model,
    tiny_vae,
)
from checks_live import Clip, page, stop_after, timeline
from checks_offload import little_room
from checks_video import frames_written, pictures, taehv

WAIT = 30  # seconds, for what should come at once


@contextmanager
def beside():
    """Runs inside decode beside the next chunk; none may leave a thread."""
    module = pack("sparse_attn.beside")
    with patch.object(module, "DEVICES", ("cuda", "cpu")):
        yield
    assert not [t for t in threading.enumerate() if t.name.startswith(module.THREAD)]


@contextmanager
def instead(owner, name, change):
    """owner.name is change(what it was) inside."""
    with patch.object(owner, name, change(getattr(owner, name))):
        yield


def told(server):
    """What the page hears of the chunks, but for the time they took."""
    timing = ("seconds", "fps_made", "seconds_left")
    chunks = [content for event, content in server.sent if event == "sparse_forcing.chunk"]
    return [
        {k: v for k, v in content.items() if k not in timing} | {"video": content["video"]["bytes"]}
        for content in chunks
    ]


def everything(model, vae, **changes):
    """(frames, latent, bytes of the file, session, what the page was told) of a run."""
    with page() as server, frames_written() as written:
        _, latent, path, session = stream_session(model, vae, node="4", **changes)
    return np.concatenate(written), latent, Path(path).read_bytes(), session, told(server)


def equal(got, want):
    assert np.array_equal(got[0], want[0]) and torch.equal(got[1], want[1]) and got[2] == want[2]
    for owner, memory in want[3].memory.items():
        assert all(torch.equal(tensor, got[3].memory[owner][name]) for name, tensor in memory.items())
    assert all(torch.equal(tensor, got[3].decoder[name]) for name, tensor in want[3].decoder.items())
    assert got[3].facts | {"video": 0} == want[3].facts | {"video": 0} and got[4] == want[4]


def check_beside_makes_the_same_video():
    vae, long = tiny_vae(), {"seconds": 2.5}
    for settings, changes in (
        ({"mode": "dense"}, {"cfg": 2.0, "negative": prompt(2)}),
        ({"mode": "window", "window_frames": 9}, {"chunk_frames": 1}),
        (
            {"mode": "sparse", "block_tokens": 1, "persistent_frames": 6},
            {"positive": timeline("0s: 1 / 1s: 2")},
        ),
        ({"mode": "sparse", "block_tokens": 16, "positions": "rebased"}, {"image": pictures(13)}),
    ):
        model = apply(tiny_model(), **settings)
        want = everything(model, vae, **long | changes)
        with beside():
            equal(everything(model, vae, **long | changes), want)


def check_beside_a_tiny_vae_makes_the_same_video():
    vae, model = taehv(), apply(tiny_model())
    want = everything(model, vae, seconds=1.7)
    with beside():
        equal(everything(model, vae, seconds=1.7), want)


def check_a_chunk_is_decoded_beside_the_next_one():
    """The decoder of each chunk waits until a pass of the next one was made."""
    session, decoding = pack("nodes.session"), pack("nodes.vae_stream").StreamDecoder
    model, vae, here, chunk, passed = apply(tiny_model()), tiny_vae(), threading.current_thread(), [0], []
    events = [threading.Event() for _ in range(4)]

    def began(real):
        def begin_chunk(self, frames):
            chunk[0] += 1
            real(self, frames)

        return begin_chunk

    def passes(real):
        def begin_pass(self):
            assert threading.current_thread() is here
            events[chunk[0] - 1].set()
            real(self)

        return begin_pass

    def waits(real):
        def push(self, latent):
            assert threading.current_thread() is not here
            passed.append(len(passed) == 3 or events[len(passed) + 1].wait(WAIT))
            return real(self, latent)

        return push

    with (
        instead(session.SamplingRun, "begin_chunk", began),
        instead(session.SamplingRun, "begin_pass", passes),
        instead(decoding, "push", waits),
        beside(),
    ):
        stream_video(model, vae, seconds=2.5)
    assert passed == [True] * 4


def check_beside_a_cancelled_run_keeps_what_was_finished():
    """The interrupt comes while a chunk is decoded beside a pass: the pass ends by it, the chunk is kept."""
    session, decoding = pack("nodes.session"), pack("nodes.vae_stream").StreamDecoder
    model, vae, cancelled, pushed = apply(tiny_model()), tiny_vae(), threading.Event(), []

    def cancels(real):
        def begin_pass(self):
            if len(pushed) == 2 and not cancelled.is_set():
                comfy.model_management.interrupt_current_processing()
                cancelled.set()
            real(self)

        return begin_pass

    def waits(real):
        def push(self, latent):
            pushed.append(latent)
            assert len(pushed) < 2 or cancelled.wait(WAIT)
            return real(self, latent)

        return push

    with (
        instead(session.SamplingRun, "begin_pass", cancels),
        instead(decoding, "push", waits),
        beside(),
        log_said() as texts,
    ):
        try:
            stream_video(model, vae, seconds=3.0, filename_prefix="cancelled")
            raise AssertionError("the interrupt was ignored")
        except comfy.model_management.InterruptProcessingException:
            pass
    assert len(texts) == 1 and texts[0].startswith("Stopped early: 21 frames are kept in "), texts
    assert not comfy.model_management.processing_interrupted()
    path = sorted(Path(folder_paths.get_output_directory()).glob("cancelled_*.mp4"))[-1]
    video = pack("nodes.stream_video").InputImpl.VideoFromFile(str(path))
    assert len(video.get_components().images) == 21


def check_beside_a_full_disk_ends_the_run():
    model, vae, module = apply(tiny_model()), tiny_vae(), pack("nodes.stream_video")

    def full(real):
        def append(self, frames):
            if self.frames:
                raise OSError("the disk is full")
            real(self, frames)

        return append

    with instead(module.Mp4Writer, "append", full), beside(), log_said() as texts:
        fails("the disk is full", stream_video, model, vae, seconds=3.0)
    *before, last = texts  # a chunk that was finished when the failure was noticed is tried, too
    assert last.startswith("Stopped early: 9 frames are kept in "), texts
    assert before in ([], ["The last chunk could not be kept."]), texts


def check_beside_sessions_are_what_they_were():
    """Every way to stop, to be stopped and to go on, bit for bit."""
    with beside():
        checks_session.check_a_stopped_video_goes_on_bit_for_bit()
        checks_session.check_autosave_outlives_an_interrupt()
        checks_session.check_the_next_chunk_does_not_wait_for_the_disk()
        checks_session.check_a_failing_autosave_stops_nothing()
        checks_session.check_a_lost_video_is_decoded_again()
        checks_session.check_the_page_goes_on_counting()


def check_beside_the_viewer_steers_as_before():
    with beside():
        checks_live.check_stopping_keeps_a_valid_video()
        checks_live.check_a_typed_prompt_holds_from_the_next_chunk()
        checks_live.check_the_page_is_told_what_the_memory_holds()
        checks_live.check_a_failing_preview_never_stops_sampling()
        checks_live.check_a_cancelled_run_gives_its_memory_back_at_once()


def check_beside_a_session_of_one_after_the_other_goes_on():
    model, vae, clip = apply(tiny_model(), mode="window"), tiny_vae(), {"clip": Clip(), "seconds": 2.5}
    want = everything(model, vae, **clip)
    with page(stop_after(1)):
        *_, session = stream_session(model, vae, node="4", **clip)
    with beside():
        _, latent, path, _ = stream_session(model, vae, session=session, **clip)
    assert torch.equal(latent, want[1]) and Path(path).read_bytes() == want[2]


def check_weights_that_the_host_keeps_away_are_fetched_for_one_network_at_a_time():
    """The thread's own are ready before it begins; without room for them, all is done in the host's thread."""
    module, decoding = pack("nodes.vae_stream"), pack("nodes.vae_stream").StreamDecoder
    want, here = stream_video(apply(tiny_model()), tiny_vae(), seconds=2.5)[1:], threading.current_thread()
    seen, missing = set(), [0]

    def notes(real):
        def push(self, latent):
            seen.add(threading.current_thread() is here)
            return real(self, latent)

        return push

    with (
        patch.object(module, "missing_bytes", lambda *_: missing[0]),
        instead(decoding, "push", notes),
        little_room() as away,
        beside(),
        log_said(logging.INFO) as texts,
    ):
        for missing[0] in (0, 1, 10**15):
            seen.clear()
            _, latent, path = stream_video(apply(tiny_model()), vae := tiny_vae(), seconds=2.5)
            assert torch.equal(latent, want[0]) and Path(path).read_bytes() == Path(want[1]).read_bytes()
            assert seen == {missing[0] == 10**15} and all(away)
            assert all(isinstance(p, torch.nn.Parameter) for p in vae.first_stage_model.parameters())
    said = [
        text for text in texts if text.startswith("Stream Video decodes between two chunks, not beside the")
    ]
    assert len(said) == 1 and "are not on cpu, and there is no room" in said[0]
