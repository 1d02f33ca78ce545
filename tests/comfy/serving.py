"""A real ComfyUI server with the pack in it, and ways to talk to it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av

ROOT = Path(__file__).resolve().parents[2]
WORLD_DIT = ROOT / "sparse_attn" / "world" / "weights" / "world_dit.safetensors"
FOLDER = "any-name.for_it"  # ComfyUI takes the pack under whatever name its folder has
START_SECONDS, RUN_SECONDS = 120, 120


class Server:
    """A running ComfyUI: its address, its folder, its log."""

    def __init__(self, url: str, base: Path, log: Path, process: subprocess.Popen):
        self.url, self.base, self.log, self.process = url, base, log, process

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            body = answer.read()
            return json.loads(body) if "json" in answer.headers["Content-Type"] else body.decode()

    def fetch(self, path: str) -> bytes:
        """The body of an answer as it is; urllib.error.HTTPError where it is not found."""
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read()

    def post(self, path: str, content: dict) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                body = answer.read()
        except urllib.error.HTTPError as error:
            body = error.read()
        return json.loads(body) if body else None

    def queue(self, workflow: dict) -> str:
        answer = self.post("/prompt", {"prompt": workflow})
        assert "prompt_id" in answer, answer
        return answer["prompt_id"]

    def wait(self, prompt_id: str) -> dict:
        return until(lambda: self.get(f"/history/{prompt_id}").get(prompt_id), RUN_SECONDS)

    def run(self, workflow: dict) -> dict:
        """The finished prompt's history entry."""
        return self.wait(self.queue(workflow))

    def error(self, workflow: dict) -> str:
        """The message with which a prompt failed."""
        status = self.run(workflow)["status"]
        (said,) = [content for kind, content in status["messages"] if kind == "execution_error"]
        return said["exception_message"]


def until(question: Callable[[], Any], seconds: float) -> Any:
    """The first true answer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answer = question()
        if answer:
            return answer
        time.sleep(0.2)
    raise TimeoutError(f"nothing happened in {seconds} s")


def prepare(base: Path, names: tuple[str, ...] = (FOLDER,)) -> Path:
    """A base directory for the host with the pack under each of `names`; returns its folder of models."""
    models = base / "models" / "diffusion_models"
    models.mkdir(parents=True)
    (base / "custom_nodes").mkdir()
    for name in names:
        os.symlink(ROOT, base / "custom_nodes" / name, target_is_directory=True)
    return models


@contextlib.contextmanager
def serve(host: Any, base: Path, *options: str, **environment: str) -> Iterator[Server]:
    """ComfyUI on a CPU, without Triton; a second time on the same `base`, it resumes with the same folders."""
    options = (*options, "--cpu", "--preview-method", "latent2rgb")
    with start(host, base, options, host.environment(base / "blocked") | environment) as server:
        yield server


@contextlib.contextmanager
def start(
    host: Any, base: Path, options: tuple[str, ...] = (), environment: dict[str, str] | None = None
) -> Iterator[Server]:
    """ComfyUI's main.py on a prepared `base` until the block ends.

    Without `options` it gets only flags that say where it listens, where its files are and that it opens no browser and
    asks no paid service: it runs as it does for a user who starts it without any.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = (*options, "--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(base))
    options += ("--disable-auto-launch", "--disable-api-nodes", "--database-url", "sqlite:///:memory:")
    log = base / "log.txt"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [host.python, str(host.path / "main.py"), *options, *front_end(host, base)],
            cwd=host.path,
            env=environment or {**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    server = Server(f"http://127.0.0.1:{port}", base, log, process)
    try:
        until(lambda: answers(server, process), START_SECONDS)
        yield server
    finally:
        process.terminate()
        process.wait(30)


def front_end(host: Any, base: Path) -> tuple[str, ...]:
    """Options that start a ComfyUI whose Python lacks the front end's package: main.py exits without one."""
    if not host.lacks("comfyui_frontend_package"):
        return ()
    folder = base / "front_end"
    folder.mkdir(exist_ok=True)
    (folder / "index.html").write_text("<html></html>")
    return ("--front-end-root", str(folder))


def answers(server: Server, process: subprocess.Popen) -> bool:
    assert process.poll() is None, server.log.read_text(encoding="utf-8", errors="replace")[-4000:]
    try:
        return bool(server.get("/system_stats"))
    except (urllib.error.URLError, ConnectionError):
        return False


def api(name: str, **changes: Any) -> dict:
    """An API workflow with inputs replaced: small(demo, n4_seconds=1) sets node 4's `seconds`; None removes one."""
    workflow = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    for key, value in changes.items():
        node, _, name = key[1:].partition("_")
        workflow[node]["inputs"][name] = value
    return workflow


def demo(**changes: Any) -> dict:
    return api("world_model_demo", **{"n4_width": 64, "n4_height": 48, "n4_seconds": 0.5} | changes)


def patch(**changes: Any) -> dict:
    return api("patch_a_wan_model", **{"n10_width": 64, "n10_height": 48, "n10_length": 21} | changes)


def saved_video(server: Server, outputs: dict) -> Path:
    """The one video file that a prompt's outputs name."""
    (saved,) = [entry for output in outputs.values() for entry in output.get("images", [])]
    return server.base / saved["type"] / saved["subfolder"] / saved["filename"]


def frames_of(path: Path) -> tuple[int, tuple[int, int]]:
    with av.open(str(path)) as video:
        sizes = [(frame.width, frame.height) for frame in video.decode(video=0)]
    return len(sizes), sizes[0]


def say(server: Server, path: str, body: bytes | dict, **headers: str) -> tuple[int, dict]:
    """(status, answer) of a POST to one of the pack's routes."""
    if isinstance(body, dict):
        body = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
    request = urllib.request.Request(f"{server.url}/sparse_forcing/{path}", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        text = error.read()
        return error.code, json.loads(text) if text else {}


def running(server: Server, prompt_id: str, path: str, **content: Any) -> dict:
    """Post until the prompt's node 4 has begun; returns the answer."""
    body = {"prompt_id": prompt_id, "node": "4", **content}
    return until(lambda: (lambda code, said: said if code == 200 else None)(*say(server, path, body)), 60)
