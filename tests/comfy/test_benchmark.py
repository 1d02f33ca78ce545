"""benchmarks/comfyui.py on a real ComfyUI: random weights it wrote, a few jobs, and a server that dies under it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import ROOT, Server, prepare, serve, until

SCRIPT = ROOT / "benchmarks" / "comfyui.py"
SMALL = ("--size", "64x48", "--time", "0.1", "--rounds", "1", "--model", "random_tiny.safetensors")
pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def server(host, tmp_path_factory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("comfyui")
    prepare(base)
    kinds = ("--kinds", "bf16", "fp8", "vae")
    command = [host.python, SCRIPT, "make-weights", "--comfy", base, "--sizes", "tiny", *kinds]
    subprocess.run(list(map(str, command)), check=True, env=host.environment(base / "blocked"))
    with serve(host, base) as running:
        yield running


def start(host, server: Server, out: Path, *options: str) -> subprocess.Popen:
    command = [host.python, str(SCRIPT), "--url", server.url, *SMALL, "--out", str(out), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_comfyui_measures_its_jobs(host, server, tmp_path):
    jobs = ("--only", "first_run", "sampler", "stream_tiny", "stream_fp8_checkpoint")
    files = ("--fp8", "random_tiny_fp8.safetensors", "--plot", str(tmp_path / "plot.png"))
    process = start(host, server, tmp_path / "made" / "results.json", *jobs, *files)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    (run,) = json.loads((tmp_path / "made" / "results.json").read_text())["runs"].values()
    assert {record["name"]: record["error"] for record in run["records"]} == dict.fromkeys(
        (
            "first_run", "core_5s", "dense_5s", "sparse_5s", "slow_5s", "sparse_15s", "stream_tiny",
            "stream_fp8_checkpoint",
        )
    )  # fmt: skip
    assert set(run["summary"]) == {
        "stream_tiny_fps", "dense_over_core", "sparse_over_core", "slow_path_over_core", "fp8_checkpoint_over_bf16",
        "first_picture_s", "first_run_s",
    }  # fmt: skip
    assert run["flags"].startswith("--cpu") and run["versions"]["ComfyUI"] and run["date"] and run["command"]
    assert (tmp_path / "plot.png").stat().st_size


def test_comfyui_records_a_job_that_fails_and_goes_on(host, server, tmp_path):
    options = ("--tiny-vae", "missing.safetensors", "--only", "stream_tiny", "stream_wan", "--vae", "world")
    process = start(host, server, tmp_path / "results.json", *options)
    said = process.communicate()[0]
    assert process.returncode == 2, said
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"].values()
    errors = {record["name"]: record["error"] for record in run["records"]}
    assert "missing.safetensors" in errors["stream_tiny"] and errors["stream_wan"] is None


def test_comfyui_writes_what_it_has_when_the_server_dies(host, server, tmp_path):
    """The last test of the file: it ends the server."""
    out, before = tmp_path / "results.json", server.log.stat().st_size
    process = start(host, server, out, "--only", "stream_tiny", "stream_autosave", "--time", "100")
    until(lambda: b"writing" in server.log.read_bytes()[before:], 60)
    server.process.kill()
    said = process.communicate()[0]
    assert process.returncode == 1 and "The server is gone" in said, said
    (run,) = json.loads(out.read_text())["runs"].values()
    assert [record["name"] for record in run["records"]] == ["stream_tiny"]
    assert run["died"] and run["records"][0]["error"] and run["summary"] == {}
