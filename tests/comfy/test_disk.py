"""A disk that fills up or turns read-only under a running video: a clear error, and nothing finished is lost.

The output folder is a small file system in memory, which takes root to mount. Elsewhere these are skipped;
tests/pipeline/test_video.py shows the same of the writer alone, by a limit on the size of files.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import RUN_SECONDS, WORLD_DIT, Server, demo, frames_of, prepare, saved_video, serve, until

ROOM = "64m"

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(not WORLD_DIT.is_file(), reason="this checkout lacks the world model's weights"),
]


@pytest.fixture(scope="module")
def server(host, tmp_path_factory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("comfyui")
    prepare(base)
    output = base / "output"
    output.mkdir()
    try:
        mounted = mount("-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", output)
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("no file system can be mounted here: that takes root on Linux")
    try:
        with serve(host, base) as server:
            yield server
    finally:
        subprocess.run(["umount", str(output)], check=True)


def mount(*arguments: str | Path) -> bool:
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True, check=False).returncode == 0


def fill(server: Server) -> Path:
    """A file that takes all the room that is left."""
    filler = server.base / "output" / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return filler


def newest_session(server: Server) -> str:
    node = server.get("/object_info/LoadSparseForcingSession")["LoadSparseForcingSession"]
    return node["input"]["required"]["session_name"][1]["options"][0]


def message(done: dict) -> str:
    (said,) = [content for kind, content in done["status"]["messages"] if kind == "execution_error"]
    return said["exception_message"]


def test_a_disk_that_fills_up_in_the_middle(server):
    long = demo(n4_seconds=600.0, n4_seed=21, n4_autosave_chunks=1, n4_filename_prefix="video/full")
    prompt_id = server.queue(long)
    folder = server.base / "output" / "video"
    until(lambda: list(folder.glob("full_*.session.safetensors")), RUN_SECONDS)
    filler = fill(server)
    try:
        said = message(server.wait(prompt_id))
        assert "cannot be written: No space left on device." in said
        assert "frames before are kept. Make room, or choose another folder." in said
        (video,) = folder.glob("full_*.mp4")
        count, size = frames_of(video)
        assert size == (64, 48) and count % 12 == 9 and f"The {count} frames" in said
        assert not list(folder.glob(".*.part"))
        assert "cannot be written: No space left" in server.error(
            demo(n4_seed=22)
        )  # nor does another one begin
    finally:
        filler.unlink()
    session = newest_session(server)
    assert session.startswith("video/full_")
    seconds = (count + 12) / 16
    load = {"9": {"class_type": "LoadSparseForcingSession", "inputs": {"session_name": session}}}
    done = server.run(demo(n4_seconds=seconds, n4_session=["9", 0]) | load)
    assert done["status"]["status_str"] == "success", done["status"]
    resumed = saved_video(server, {"4": done["outputs"]["4"]})
    whole = saved_video(server, server.run(demo(n4_seconds=seconds, n4_seed=21))["outputs"])
    assert resumed.read_bytes() == whole.read_bytes() and frames_of(whole)[0] == count + 12


def test_a_full_disk_costs_no_session(server):
    save = {
        "class_type": "SaveSparseForcingSession",
        "inputs": {"session": ["4", 2], "filename_prefix": "kept"},
    }
    workflow = demo(n4_seed=23) | {"9": save}
    assert server.run(workflow)["status"]["status_str"] == "success"
    (kept,) = (server.base / "output").glob("kept_*")
    before = kept.read_bytes()
    videos = len(list((server.base / "output" / "video").glob("SparseForcing_*.mp4")))
    workflow["9"]["inputs"]["filename_prefix"] = "another"
    filler = fill(server)
    try:
        said = message(server.run(workflow))
        assert "The session could not be saved to " in said and "No space left on device" in said
        assert kept.read_bytes() == before and not list((server.base / "output").glob("*another*"))
        assert not list((server.base / "output").glob(".*.part"))
    finally:
        filler.unlink()
    assert server.run(workflow)["status"]["status_str"] == "success"
    (another,) = (server.base / "output").glob("another_*")
    assert another.read_bytes() == before
    assert len(list((server.base / "output" / "video").glob("SparseForcing_*.mp4"))) == videos, "made anew"


def test_a_read_only_folder_is_refused_before_any_work(server):
    output = server.base / "output"
    (output / "video").mkdir(exist_ok=True)
    sessions = sorted(path.name for path in output.rglob("*.session.safetensors"))
    assert mount("-o", "remount,ro", output)
    try:
        said = server.error(demo(n4_seconds=600.0, n4_seed=24))
        assert "No video can be written to" in said and "Read-only file system" in said
        assert sorted(path.name for path in output.rglob("*.session.safetensors")) == sessions
        assert "Read-only file system" in server.error(demo(n4_seed=25, n4_filename_prefix="new folder/x"))
    finally:
        assert mount("-o", "remount,rw", output)
    assert server.run(demo(n4_seed=24))["status"]["status_str"] == "success"
