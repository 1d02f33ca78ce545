"""What happens twice at once: the pack under two names, two pages on one server."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import pytest
from serving import ROOT, WORLD_DIT, Server, demo, frames_of, prepare, running, saved_video, serve

LONG = 600.0  # seconds of video: longer than any test waits

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(not WORLD_DIT.is_file(), reason="this checkout lacks the world model's weights"),
]


@pytest.fixture(scope="module")
def server(host, tmp_path_factory) -> Iterator[Server]:
    """With the pack in it twice."""
    base = tmp_path_factory.mktemp("comfyui")
    prepare(base, ("one", "two"))
    with serve(host, base) as server:
        yield server


def test_a_second_copy_of_the_pack_is_named_and_does_no_harm(server):
    log = server.log.read_text(encoding="utf-8", errors="replace")
    assert "IMPORT FAILED" not in log and "Traceback" not in log
    assert log.count("Sparse Forcing is installed twice") == 1 and "remove one" in log
    prompt_id = server.queue(demo(n4_seconds=LONG))
    try:
        assert running(server, prompt_id, "stop") == {"stopping": True}
        done = server.wait(prompt_id)
    finally:
        server.post("/interrupt", {})
    assert done["status"]["status_str"] == "success", done["status"]
    assert frames_of(saved_video(server, done["outputs"]))[0] % 12 == 9


def test_each_page_hears_of_its_own_run_alone(host, server, tmp_path):
    clients = []
    for seed in (1, 2):
        folder = tmp_path / str(seed)
        folder.mkdir()
        file = folder / "workflow.json"
        file.write_text(json.dumps(demo(n4_seconds=LONG, n4_seed=seed, n4_width=32 * seed)))
        command = [host.python, str(ROOT / "clients" / "stream_client.py"), str(file), "--url", server.url]
        command += ["--out", str(folder), "--stop-after", "3"]
        clients.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    for seed, client in zip((1, 2), clients):
        said, complaints = client.communicate(timeout=120)
        assert client.returncode == 0, complaints
        lines = said.splitlines()
        assert [line.split("/")[0] for line in lines[:3]] == ["chunk 1", "chunk 2", "chunk 3"]
        assert lines[-1].startswith("stopped: ")
        assert frames_of(tmp_path / str(seed) / "video.mp4")[1] == (32 * seed, 48)
