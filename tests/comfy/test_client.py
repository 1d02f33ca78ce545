"""clients/stream_client.py against a real ComfyUI: what it receives while the run lasts, and how it steers it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from serving import ROOT, WORLD_DIT, Server, demo, frames_of, prepare, saved_video, serve, until

LONG = 600.0  # seconds of video: longer than any test waits

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(not WORLD_DIT.is_file(), reason="this checkout lacks the world model's weights"),
]


@pytest.fixture(scope="module")
def server(host, tmp_path_factory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("comfyui")
    prepare(base)
    with serve(host, base) as server:
        yield server


@pytest.fixture
def start(host, server, tmp_path):
    """start(workflow, *options) -> the client as a running process; its files are in tmp_path / "out"."""
    clients = []

    def run(workflow: dict[str, Any], *options: str, url: str = server.url) -> subprocess.Popen:
        file = tmp_path / "workflow.json"
        file.write_text(json.dumps(workflow))
        command = [host.python, str(ROOT / "clients" / "stream_client.py"), str(file), "--url", url]
        command += ["--out", str(tmp_path / "out"), *options]
        clients.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return clients[-1]

    yield run
    for client in clients:
        client.kill()
        client.communicate()
    server.post("/interrupt", {})


def end_of(client: subprocess.Popen, code: int = 0) -> list[str]:
    """The lines it printed (with code 1: its last words)."""
    said, complaints = client.communicate(timeout=120)
    assert client.returncode == code, complaints
    return (said if code == 0 else complaints).splitlines()


def pictures(folder: Path) -> set[bytes]:
    return {path.read_bytes() for path in folder.glob("frame_*.jpg")}


def test_frames_and_video_arrive_during_the_run(server, start, tmp_path):
    client = start(demo(n4_seconds=LONG), "--stop-after", "6")
    lines = [client.stdout.readline() for _ in range(3)]
    assert [line.split(",")[0] for line in lines] == [f"chunk {i}/801" for i in (1, 2, 3)]
    assert server.get("/queue")["queue_running"] and client.poll() is None
    assert len(pictures(tmp_path / "out")) >= 3 * 9
    count, size = frames_of(tmp_path / "out" / "video.mp4")  # plays while it grows
    assert count >= 33 and size == (64, 48)
    rest = end_of(client)
    made = int(rest[-1].removeprefix("stopped: ").removesuffix(" frames"))
    (file,) = (server.base / "output" / "video").glob("*.mp4")
    assert (tmp_path / "out" / "video.mp4").read_bytes() == file.read_bytes()
    assert frames_of(file) == (made, (64, 48)) and made % 12 == 9 and made >= 69
    numbers = sorted(int(path.stem[6:]) for path in (tmp_path / "out").glob("frame_*.jpg"))
    assert numbers == list(range(made))
    assert Image.open(tmp_path / "out" / "frame_000000.jpg").size == (64, 48)


def redness(path: Path) -> list[int]:
    """Of every frame of a video the median of red less blue: the background's, which is most of the picture."""
    with av.open(str(path)) as video:
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in video.decode(video=0)]
    return [int(np.median(frame[..., 0] - frame[..., 2])) for frame in frames]


def test_a_prompt_changes_while_it_runs(start, tmp_path):
    """Beside the same run without the change: how well the model keeps to a prompt is not asked here."""
    scene = "a small red circle standing still over a {} plain background"
    maroon, video = scene.format("maroon"), tmp_path / "out" / "video.mp4"
    options = ["--set", '4.clip=["1", 1]', "--set", f"2.text={scene.format('navy')}", "--stop-after", "5"]
    workflow = demo(n4_width=128, n4_height=96, n4_seconds=LONG)  # the model's words mean little at 64 x 64
    end_of(start(workflow, *options))
    unchanged = redness(video)
    client = start(workflow, *options, "--prompt-after", "2", maroon)
    prompts = [line.partition(": ")[2].strip() for line in end_of(client)[:-1]]
    changed = prompts.index(maroon)
    assert changed >= 2 and not any(prompts[:changed]), "the inputs' prompt is a conditioning without text"
    assert set(prompts[changed:]) == {maroon}
    pairs = list(zip(unchanged, redness(video)))
    before = 9 + 12 * (changed - 1)
    assert all(navy == same for navy, same in pairs[:before]), pairs
    assert all(turned - navy > 60 for navy, turned in pairs[-6:]), pairs


def test_a_single_frame_a_chunk_leaves_nothing_out(server, start, tmp_path):
    client = start(demo(n4_chunk_frames=1, n4_seconds=1.0, n3_window_frames=3, n3_sink_frames=1))
    lines = end_of(client)
    assert lines[-1] == "finished: 17 frames" and len(lines) == 6
    assert frames_of(tmp_path / "out" / "video.mp4")[0] == 17


def test_what_goes_wrong_is_said(server, start):
    assert "refuses the workflow" in end_of(start(demo(n4_width="x")), 1)[-1]
    assert "height 40 is not a multiple of 16" in end_of(start(demo(n4_height=40)), 1)[-1]
    assert (
        "no CLIP to read a prompt" in end_of(start(demo(n4_seconds=LONG), "--prompt-after", "1", "x"), 1)[-1]
    )
    server.post("/interrupt", {})
    assert "127.0.0.1:1" in end_of(start(demo(), url="http://127.0.0.1:1"), 1)[-1]
    client = start(demo(n4_seconds=LONG))
    client.stdout.readline()
    server.post("/interrupt", {})
    assert end_of(client, 1)[-1] == "The run was interrupted."


def test_a_run_outlives_its_client(server, start):
    client = start(demo(n4_seconds=LONG))
    client.stdout.readline()
    client.kill()
    queue = until(lambda: server.get("/queue")["queue_running"], 10)
    prompt_id = queue[0][1]
    file = max((server.base / "output" / "video").glob("*.mp4"), key=lambda path: path.stat().st_mtime_ns)
    size = file.stat().st_size
    until(lambda: file.stat().st_size > size, 60)
    assert server.post("/sparse_forcing/stop", {"prompt_id": prompt_id, "node": "4"}) == {"stopping": True}
    done = server.wait(prompt_id)
    assert done["status"]["status_str"] == "success"
    assert saved_video(server, done["outputs"]) == file
