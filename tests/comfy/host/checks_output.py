"""What becomes of a chunk: decoded on the sampling thread, written by a worker beside the next chunk."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import comfy.model_management
import folder_paths
import torch
from checks_common import apply, fails, log_said, pack, stream_video, tiny_model, tiny_vae
from checks_video import taehv

WAIT = 30  # seconds, for what should come at once


@contextmanager
def instead(owner, name, change):
    """owner.name is change(what it was) inside; no thread may be left behind."""
    with patch.object(owner, name, change(getattr(owner, name))):
        yield
    queue = pack("sparse_attn.frame_queue")
    assert not [t for t in threading.enumerate() if t.name.startswith(queue.THREAD)]


def check_output_writes_a_chunk_beside_the_next_one():
    """The writer waits, for each chunk, until a pass of the next one was made; decoders stay on the sampling thread."""
    session, streams = pack("nodes.session"), pack("nodes.vae_stream")
    writer = pack("nodes.stream_video").Mp4Writer
    model, vae, here, chunk, passed = apply(tiny_model()), tiny_vae(), threading.current_thread(), [0], []
    events = [threading.Event() for _ in range(5)]

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
        def append(self, frames):
            assert threading.current_thread() is not here
            passed.append(len(passed) == 3 or events[len(passed) + 1].wait(WAIT))
            real(self, frames)

        return append

    def stays(real):
        def push(self, latent):
            assert threading.current_thread() is here
            return real(self, latent)

        return push

    with (
        instead(session.SamplingRun, "begin_chunk", began),
        instead(session.SamplingRun, "begin_pass", passes),
        instead(streams.StreamDecoder, "push", stays),
        instead(writer, "append", waits),
    ):
        stream_video(model, vae, seconds=2.5)
    assert passed == [True] * 4


def check_output_keeps_what_was_finished_before_a_cancel():
    """The interrupt comes while the second chunk waits to be written: it is in the file."""
    session, writer = pack("nodes.session"), pack("nodes.stream_video").Mp4Writer
    model, vae, cancelled, written = apply(tiny_model()), tiny_vae(), threading.Event(), []

    def cancels(real):
        def begin_pass(self):
            if self.frame == 6 and not cancelled.is_set():
                comfy.model_management.interrupt_current_processing()
                cancelled.set()
            real(self)

        return begin_pass

    def waits(real):
        def append(self, frames):
            written.append(len(frames))
            assert len(written) < 2 or cancelled.wait(WAIT)
            real(self, frames)

        return append

    with (
        instead(session.SamplingRun, "begin_pass", cancels),
        instead(writer, "append", waits),
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


def check_output_keeps_the_chunk_whose_decoding_is_interrupted():
    """The host's layers raise its interrupt anywhere; here it is between two chunks' worth of them."""
    for vae, name in ((tiny_vae(), "StreamDecoder"), (taehv(), "TinyStreamDecoder")):
        model, pushes = apply(tiny_model()), []

        def interrupted(real, pushes=pushes):
            def push(self, latent):
                frames = real(self, latent)
                pushes.append(latent)
                if len(pushes) == 2:
                    comfy.model_management.interrupt_current_processing()
                comfy.model_management.throw_exception_if_processing_interrupted()
                return frames

            return push

        with (
            instead(getattr(pack("nodes.vae_stream"), name), "push", interrupted),
            log_said() as texts,
        ):
            try:
                stream_video(model, vae, seconds=3.0)
                raise AssertionError("the interrupt was ignored")
            except comfy.model_management.InterruptProcessingException:
                pass
        assert len(texts) == 1 and texts[0].startswith("Stopped early: 21 frames are kept in "), texts
        assert len(pushes) == 3 and not comfy.model_management.processing_interrupted()


def check_output_ends_the_run_when_the_disk_is_full():
    model, vae, module = apply(tiny_model()), tiny_vae(), pack("nodes.stream_video")

    def full(real):
        def append(self, frames):
            if self.frames:
                raise OSError("the disk is full")
            real(self, frames)

        return append

    with instead(module.Mp4Writer, "append", full), log_said() as texts:
        fails("the disk is full", stream_video, model, vae, seconds=3.0)
    assert len(texts) == 1 and texts[0].startswith("Stopped early: 9 frames are kept in "), texts


def check_output_decodes_once_more_after_running_out_of_memory():
    """The decoder fails in the middle of a chunk, after it has changed its memory: the video is the same."""
    for vae, name in ((tiny_vae(), "StreamDecoder"), (taehv(), "TinyStreamDecoder")):
        decoder = getattr(pack("nodes.vae_stream"), name)
        model, pushes = apply(tiny_model()), []
        *_, latent, path = stream_video(model, vae, seconds=2.5)

        def short_of_memory(real, pushes=pushes):
            def push(self, piece):
                frames = real(self, piece)
                pushes.append(piece)
                if len(pushes) in (1, 3):
                    raise torch.OutOfMemoryError("no room")
                return frames

            return push

        with instead(decoder, "push", short_of_memory), log_said() as texts:
            *_, again, other = stream_video(model, vae, seconds=2.5)
        assert (
            len(pushes) == 6
            and [text.split(":")[0] for text in texts]
            == ["Out of memory while decoding; trying once more"] * 2
        )
        assert torch.equal(latent, again) and Path(path).read_bytes() == Path(other).read_bytes()


def check_output_that_has_no_memory_twice_keeps_what_is_finished():
    model, vae, decoder = apply(tiny_model()), tiny_vae(), pack("nodes.vae_stream").StreamDecoder
    pushes = []

    def short_of_memory(real):
        def push(self, latent):
            pushes.append(latent)
            if len(pushes) > 1:
                raise torch.OutOfMemoryError("no room")
            return real(self, latent)

        return push

    with instead(decoder, "push", short_of_memory), log_said() as texts:
        fails("no room", stream_video, model, vae, seconds=3.0)
    assert texts[-1].startswith("Stopped early: 9 frames are kept in "), texts
