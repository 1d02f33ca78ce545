"""kill -9 in the middle of a minute of video: nothing that was finished is lost, and it goes on bit for bit."""

from __future__ import annotations

import json
import random
import subprocess
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from serving import ROOT, WORLD_DIT, Server, demo, frames_of, prepare, saved_video, serve

SECONDS = 60.0  # 243 latent frames, 81 chunks
TOTAL, SIZE = 81, (32, 32)
KILLED_AFTER = (23, 55)  # chunks

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(not WORLD_DIT.is_file(), reason="this checkout lacks the world model's weights"),
]


def minute(name: str, session: str | None = None) -> dict:
    """A minute of video called `name`, saved as a session every other chunk; with `session`, going on from that."""
    changes = {"n4_width": SIZE[0], "n4_height": SIZE[1], "n4_seconds": SECONDS, "n4_seed": 11, "n4_steps": 2}
    workflow = demo(**changes, n4_filename_prefix=f"video/{name}", n4_autosave_chunks=2)
    inputs = {"samples": ["4", 1], "filename_prefix": f"latents/{name}"}
    workflow["9"] = {"class_type": "SaveLatent", "inputs": inputs}
    if session is not None:
        inputs = {"session_name": session}
        workflow["10"] = {"class_type": "LoadSparseForcingSession", "inputs": inputs}
        workflow["4"]["inputs"]["session"] = ["10", 0]
    return workflow


def killed(host, server: Server, workflow: dict, chunks: int, folder: Path) -> tuple[int, Path]:
    """Kill the server a random while after that many chunks: (chunks that a client had heard of, the video)."""
    file = folder / "workflow.json"
    file.write_text(json.dumps(workflow))
    command = [host.python, str(ROOT / "clients" / "stream_client.py"), str(file), "--url", server.url]
    client = subprocess.Popen(
        [*command, "--out", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    heard = 0
    while heard < chunks:
        line = client.stdout.readline()
        assert line.startswith("chunk "), (line, server.log.read_text(errors="replace")[-2000:])
        heard = int(line.split("/")[0].removeprefix("chunk "))
    time.sleep(random.Random(chunks).uniform(0, 0.5))
    server.process.kill()
    server.process.wait(30)
    rest, _ = client.communicate(timeout=60)
    assert client.returncode == 1, "the client says that the connection is gone"
    heard += sum(line.startswith("chunk ") for line in rest.splitlines())
    video = max((server.base / "output" / "video").glob("*.mp4"), key=lambda path: path.stat().st_mtime_ns)
    return heard, video


def newest_session(server: Server) -> str:
    node = server.get("/object_info/LoadSparseForcingSession")["LoadSparseForcingSession"]
    return node["input"]["required"]["session_name"][1]["options"][0]


def latent_of(server: Server, name: str) -> torch.Tensor:
    (path,) = (server.base / "output" / "latents").glob(f"{name}_*.latent")
    return safetensors.torch.load_file(path)["latent_tensor"]


def test_a_minute_that_is_killed_twice_is_the_minute_that_was_not(host, tmp_path):
    base = tmp_path / "comfyui"
    prepare(base)
    session = None
    for chunks in KILLED_AFTER:
        folder = tmp_path / f"received{chunks}"
        folder.mkdir()
        with serve(host, base) as server:
            if session is not None:
                session = newest_session(server)
            heard, video = killed(host, server, minute(f"killed{chunks}", session), chunks, folder)
        count, size = frames_of(video)
        assert heard >= chunks and size == SIZE
        assert count >= 12 * heard - 3 and (count + 3) % 12 == 0, "every finished chunk is in the file"
        assert (folder / "video.mp4").read_bytes() == video.read_bytes()[
            : (folder / "video.mp4").stat().st_size
        ]
        session = video.with_suffix(".session.safetensors").name
        assert (video.parent / session).is_file()
        assert video.with_suffix(".session.latents").is_file()
        (video.parent / f".{session}.part").write_bytes(b"killed in the middle of a save")
    with serve(host, base) as server:
        session = newest_session(server)
        assert session.startswith(f"video/killed{KILLED_AFTER[-1]}_")
        done = server.run(minute("resumed", session))
        assert done["status"]["status_str"] == "success", done["status"]
        resumed = saved_video(server, {"4": done["outputs"]["4"]})
        done = server.run(minute("whole"))
        whole = saved_video(server, {"4": done["outputs"]["4"]})
        latent = latent_of(server, "resumed")
        assert latent.shape[2] == 3 * TOTAL
        assert torch.equal(latent, latent_of(server, "whole"))
        assert resumed.read_bytes() == whole.read_bytes()
        assert not list(resumed.parent.glob(".*")), "what a killed writer left is gone"
        assert frames_of(whole) == (12 * TOTAL - 3, SIZE)
