"""Chunks made by a thread while the one before is decoded and used; on a CPU only where a test asks for it."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from sparse_forcing_pack.sparse_attn import beside
from sparse_forcing_pack.sparse_attn.config import AttentionConfig, SamplerConfig
from sparse_forcing_pack.sparse_attn.pipeline import Request

SMALL = Request("a red circle over a navy plain background", latent_frames=9, width=64, height=48, seed=5)


@pytest.fixture
def ahead(monkeypatch):
    """Overlap on this CPU; no thread may be left behind."""
    monkeypatch.setattr(beside, "DEVICES", ("cpu",))
    yield
    assert not [t for t in threading.enumerate() if t.name.startswith(beside.THREAD)]


@pytest.fixture
def gate(pipeline, monkeypatch):
    """Passes that count themselves and wait for `gate.open` from the opening chunk's last one on."""

    class Gate:
        passes, open, fails_at = 0, threading.Event(), None

    real = pipeline._denoiser

    def denoiser(*given):
        denoise = real(*given)

        def counted(x, sigma):
            Gate.passes += 1
            assert Gate.passes != Gate.fails_at, "this pass fails"
            assert Gate.passes <= 17 or Gate.open.wait(30), "nobody wants the second chunk"
            return denoise(x, sigma)

        return counted

    monkeypatch.setattr(pipeline, "_denoiser", denoiser)
    return Gate


def all_of(pipeline, request):
    passes = []
    chunks = list(pipeline.generate(request, on_pass=lambda *where: passes.append(where)))
    return [chunk.index for chunk in chunks], np.concatenate([chunk.frames for chunk in chunks]), passes


REQUESTS = {
    "sparse": SMALL,
    "dense": replace(SMALL, attention=AttentionConfig(mode="dense")),
    "one frame": replace(
        SMALL,
        latent_frames=4,
        attention=AttentionConfig(window_frames=3, sink_frames=1, persistent_frames=2),
        sampler=SamplerConfig(chunk_frames=1),
    ),
    "given": replace(SMALL, latent_frames=10, given=np.full((13, 48, 64, 3), 99, np.uint8)),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_frames_and_passes_are_those_of_one_after_the_other(pipeline, monkeypatch, name):
    want = all_of(pipeline, REQUESTS[name])
    monkeypatch.setattr(beside, "DEVICES", ("cpu",))
    for _ in range(2):
        got = all_of(pipeline, REQUESTS[name])
        assert got[0] == want[0] and got[2] == want[2] and np.array_equal(got[1], want[1])


def test_the_first_chunk_does_not_wait_for_the_second(pipeline, ahead, gate):
    here, threads = threading.current_thread(), set()
    chunks = pipeline.generate(SMALL, on_pass=lambda *_: threads.add(threading.current_thread()))
    first = next(chunks)
    assert len(first.frames) == 9 and first.seconds > 0
    gate.open.set()
    assert [chunk.index for chunk in chunks] == [1, 2] and threads == {here}


def test_who_stops_early_leaves_no_pass_running(pipeline, ahead, gate):
    chunks = pipeline.generate(SMALL)
    next(chunks)
    threading.Timer(0.1, gate.open.set).start()
    chunks.close()
    assert gate.passes <= 18, "the pass under way was the last"


def test_a_failing_pass_is_raised_behind_the_chunks_before_it(pipeline, ahead, gate):
    gate.open.set()
    gate.fails_at = 25  # the opening chunk has 17, the second one 5
    chunks = pipeline.generate(SMALL)
    assert [next(chunks).index, next(chunks).index] == [0, 1]
    with pytest.raises(AssertionError, match="this pass fails"):
        next(chunks)


def test_a_failing_decoder_and_a_failing_caller_end_the_thread(pipeline, ahead, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(pipeline.generate(SMALL, on_pass=broken))
    with pytest.raises(ZeroDivisionError):
        list(map(broken, pipeline.generate(SMALL)))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.vae, "stream_decoder", lambda: type("Decoder", (), {"push": broken})())
        with pytest.raises(ZeroDivisionError):
            list(pipeline.generate(SMALL))
    assert np.array_equal(all_of(pipeline, SMALL)[1], all_of(pipeline, SMALL)[1])
