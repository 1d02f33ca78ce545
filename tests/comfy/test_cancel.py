"""Fifty cancelled runs at random moments: the server's memory returns to what it was, and the next run is sound."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import RUN_SECONDS, WORLD_DIT, Server, demo, prepare, saved_video, serve, until

CANCELS, WARM_UP = 50, 5
PERSISTENT_FRAMES = 150  # makes a run's memory 48 MB without making it slower
TOLERANCE = 24e6  # bytes of the resident set: half of one run's memory
# Large blocks of their own, given back when they are freed: else the C library keeps up to 300 MB of them for later.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(not WORLD_DIT.is_file(), reason="this checkout lacks the world model's weights"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc"),
]


@pytest.fixture(scope="module")
def server(host, tmp_path_factory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("comfyui")
    prepare(base)
    with serve(host, base, **EXACT) as server:
        yield server


def resident(server: Server) -> float:
    """Bytes of the server's process that lie in memory."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return 1024 * float(line.split()[1])


def settled(server: Server) -> float:
    """The same once the host has collected its garbage, which it does when it has been idle for some seconds."""
    server.post("/free", {"unload_models": True, "free_memory": True})
    seen = [resident(server)]
    for _ in range(5):
        time.sleep(1)
        seen.append(resident(server))
    return min(seen)


def long(seed: int) -> dict:
    changes = {"n4_seconds": 600.0, "n4_seed": seed, "n3_persistent_frames": PERSISTENT_FRAMES}
    return demo(**changes, n4_filename_prefix="video/cancelled")


def cancel(server: Server, seed: int, delay: float) -> list[str]:
    """Queue a run, interrupt it after a while; the kinds of messages that the host sent about it."""
    prompt_id = server.queue(long(seed))
    until(lambda: server.get("/queue")["queue_running"], 30)
    time.sleep(delay)
    server.post("/interrupt", {})
    # An interrupt between two nodes or before the first is forgotten by the host, so it is said again.
    end = time.monotonic() + RUN_SECONDS
    while not (done := server.get(f"/history/{prompt_id}")) and time.monotonic() < end:
        time.sleep(0.3)
        server.post("/interrupt", {})
    return [kind for kind, _ in done[prompt_id]["status"]["messages"]]


def test_fifty_cancelled_runs_leave_nothing_behind(server):
    first = saved_video(server, server.run(demo(n4_seed=1, n4_seconds=1.0))["outputs"]).read_bytes()
    moments = random.Random(7)
    for seed in range(WARM_UP):
        cancel(server, seed, 0.5 + moments.random())
    before = settled(server)
    for seed in range(CANCELS):
        said = cancel(server, WARM_UP + seed, moments.uniform(0, 1.5))
        assert "execution_interrupted" in said, said
    grown = settled(server) - before
    assert grown < TOLERANCE, f"{grown / 1e6:.1f} MB more than before"
    again = server.run(demo(n4_seed=1, n4_seconds=1.0, n4_filename_prefix="video/after"))
    assert again["status"]["status_str"] == "success"
    assert saved_video(server, again["outputs"]).read_bytes() == first
    log = server.log.read_text(encoding="utf-8", errors="replace")
    assert "Traceback" not in log.replace("InterruptProcessingException", ""), "cancelling is no error"
