"""Every workflow of workflows/api/ on ComfyUI's own main.py, started as a user starts it: without flags.

Each runs twice, is interrupted in mid-run, and runs again. On a GPU the workflows run as they are; on a CPU they are
made small. `python -m pytest -m gpu tests/comfy/test_workflows_api.py` runs the GPU's part alone; hosts.py says how
ComfyUI and its Python are found.

One node is replaced: the text encoder UMT5-XXL, which cannot be made small, by the world model's.
"""

from __future__ import annotations

import contextlib
import json
import queue
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from serving import FOLDER, ROOT, WORLD_DIT, Server, frames_of, prepare, start, until

HERE = Path(__file__).parent
NAMES = sorted(path.stem for path in (ROOT / "workflows" / "api").glob("*.json"))
STREAM, BENCHMARK, LATENT = "SparseForcingStreamVideo", "SparseForcingBenchmark", "EmptyARVideoLatent"
WORLD_CLIP = 1  # the World Model's output that is its text encoder
SMALL = {"width": 64, "height": 48, "length": 21, "seconds": 1.0}
LONG = {"seconds": 240.0, "length": 1005, "chunks": 64}  # runs for longer than an interrupt takes
RUN_SECONDS = 300
MEMORY_SHARE = 0.05
CLIENT = "tests"
Messages = queue.SimpleQueue  # of ComfyUI's messages, as dictionaries

# Lines at WARNING or above that a clean run may log.
EXPECTED = (r"\[WARNING\] Stopped early: \d+ frames are kept in ",)

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(not WORLD_DIT.is_file(), reason="this checkout lacks the world model's weights"),
]


class Run(NamedTuple):
    """A device's way of running: ComfyUI's options, and whether workflows are made small."""

    options: tuple[str, ...]
    small: bool


RUNS = [
    pytest.param(Run(("--cpu",), small=True), id="cpu"),
    pytest.param(Run((), small=False), id="gpu", marks=pytest.mark.gpu),
]


@pytest.fixture(scope="module", params=RUNS)
def device(request) -> Run:
    return request.param


@pytest.fixture(scope="module")
def running(device, host, tmp_path_factory) -> Iterator[Callable[[], Server]]:
    """running() -> the server; started anew where a workflow before has ended its process."""
    from wan_files import write_models

    base = tmp_path_factory.mktemp("comfyui")
    prepare(base)
    write_models(base)
    with contextlib.ExitStack() as stack:
        servers: list[Server] = []

        def alive() -> Server:
            if not servers or servers[-1].process.poll() is not None:
                servers.append(stack.enter_context(start(host, base, device.options)))
            return servers[-1]

        yield alive


@pytest.fixture
def server(running) -> Iterator[Server]:
    server = running()
    yield server
    if server.process.poll() is None:  # a failed test may have left a run behind
        server.post("/queue", {"clear": True})
        server.post("/interrupt", {})


@pytest.fixture
def messages(host, server) -> Iterator[Messages]:
    """ComfyUI's messages to CLIENT while a test runs."""
    command = [host.python, str(HERE / "listen.py"), server.url, CLIENT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as listener:
        messages: Messages = queue.SimpleQueue()
        reader = threading.Thread(
            target=lambda: [messages.put(json.loads(line)) for line in listener.stdout], daemon=True
        )
        reader.start()
        assert messages.get(timeout=30)["type"] == "status", "what ComfyUI says first"
        yield messages
        listener.terminate()
    reader.join()


def workflow(name: str, seed: int, small: bool) -> dict[str, Any]:
    """An API workflow with seeds of its own, so that ComfyUI's cache does not answer for it."""
    graph = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    seconds = iter((1.0, 1.5))
    for node in graph.values():
        kind, inputs = node["class_type"], node["inputs"]
        inputs |= {key: seed for key in ("seed", "noise_seed") if key in inputs}
        if kind == BENCHMARK:
            inputs["chunks"] += seed  # it has no seed
        if small:
            inputs |= {key: value for key, value in SMALL.items() if key in inputs}
        if small and kind == STREAM:
            inputs["seconds"] = next(seconds)
    return on_the_world_models_text_encoder(graph)


def on_the_world_models_text_encoder(graph: dict[str, Any]) -> dict[str, Any]:
    loaders = {key for key, node in graph.items() if node["class_type"] == "CLIPLoader"}
    for node in graph.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in loaders:
                node["inputs"][name] = [value[0], WORLD_CLIP]
    return graph | {key: {"class_type": "SparseForcingWorldModel", "inputs": {}} for key in loaders}


def last_generator(graph: dict[str, Any]) -> str:
    """The node that makes the workflow's last video or measurement."""
    for kind in (STREAM, "SamplerCustomAdvanced", BENCHMARK):
        found = [key for key, node in graph.items() if node["class_type"] == kind]
        if found:
            return max(found, key=int)
    raise AssertionError("a workflow that generates nothing: how is it interrupted?")


def long(name: str, seed: int, small: bool) -> dict[str, Any]:
    """A workflow whose last generator runs until it is interrupted."""
    graph = workflow(name, seed, small)
    for node in (graph[last_generator(graph)], *(n for n in graph.values() if n["class_type"] == LATENT)):
        node["inputs"] |= {key: value for key, value in LONG.items() if key in node["inputs"]}
    return graph


def frames_asked(graph: dict[str, Any]) -> list[int]:
    """Frames of the videos that a workflow saves, in ascending order: whole chunks, each latent frame 4 frames."""
    counts = []
    for node in graph.values():
        inputs = node["inputs"]
        if node["class_type"] == LATENT:
            counts.append(inputs["length"])
        elif node["class_type"] == STREAM:
            latent = (
                1 if "image" in inputs else inputs["chunk_frames"]
            )  # a given image is the first latent frame
            while 4 * latent - 3 < round(inputs["seconds"] * inputs["fps"]):
                latent += inputs["chunk_frames"]
            counts.append(4 * latent - 3)
    return sorted(counts)


def ended(server: Server, prompt_id: str) -> dict[str, Any]:
    """A prompt's history entry once it has ended; fails with the log where the server has ended instead."""

    def entry() -> dict[str, Any] | None:
        assert server.process.poll() is None, (
            f"main.py exited with {server.process.returncode}:\n{tail(server)}"
        )
        return server.get(f"/history/{prompt_id}").get(prompt_id)

    return until(entry, RUN_SECONDS)


def enqueue(server: Server, graph: dict[str, Any]) -> str:
    answer = server.post("/prompt", {"prompt": graph, "client_id": CLIENT})
    assert answer.get("prompt_id") and not answer.get("node_errors"), answer
    return answer["prompt_id"]


def tail(server: Server) -> str:
    return server.log.read_text(encoding="utf-8", errors="replace")[-4000:]


def runs(server: Server, graph: dict[str, Any]) -> None:
    """The workflow ends well; its videos and images decode to as many frames as it asks for."""
    done = ended(server, enqueue(server, graph))
    kinds = [kind for kind, _ in done["status"]["messages"]]
    assert done["status"]["status_str"] == "success" and "execution_error" not in kinds, done["status"]
    files = [
        server.base / entry["type"] / entry["subfolder"] / entry["filename"]
        for output in done["outputs"].values()
        for entry in output.get("images", [])
    ]
    assert files
    videos = [path for path in files if path.suffix == ".mp4"]
    assert sorted(frames_of(path)[0] for path in videos) == frames_asked(graph)
    assert all(frames_of(path)[0] == 1 for path in set(files) - set(videos))


def is_interrupted_in_mid_run(server: Server, messages: Messages, graph: dict[str, Any]) -> None:
    """Interrupted after the first chunk of the last generator, or where it sends no chunks after its first passes."""
    node, prompt_id = last_generator(graph), enqueue(server, graph)
    kind = "sparse_forcing.chunk" if graph[node]["class_type"] == STREAM else "progress"
    begun = False
    while not begun:
        message = messages.get(timeout=RUN_SECONDS)
        content = message["data"]
        if content.get("prompt_id") == prompt_id:
            assert message["type"] not in ("execution_error", "execution_success"), content
            begun = message["type"] == kind and content["node"] == node and content.get("value", 6) > 5
    server.post("/interrupt", {})
    kinds = [kind for kind, _ in ended(server, prompt_id)["status"]["messages"]]
    assert "execution_interrupted" in kinds and "execution_error" not in kinds


def vram_free(server: Server) -> int:
    (device,) = server.get("/system_stats")["devices"]
    return device["vram_free"]


def returns_its_memory(server: Server, before: int) -> None:
    server.post("/free", {"unload_models": True, "free_memory": True})
    with contextlib.suppress(TimeoutError):  # then the assert says how much is missing
        until(lambda: vram_free(server) >= (1 - MEMORY_SHARE) * before, 30)
    assert vram_free(server) >= (1 - MEMORY_SHARE) * before


def complaints(log: str) -> list[str]:
    """Lines of a log at WARNING or above, and tracebacks, that no clean run has."""
    lines = re.sub(r"\x1b\[[\d;]*m", "", log).splitlines()
    loud = [line for line in lines if re.search(r"\[(WARNING|ERROR|CRITICAL)\]|Traceback", line)]
    return [line for line in loud if not any(re.search(known, line) for known in EXPECTED)]


def kept_files_play(log: str) -> None:
    """The video of an interrupted run has the frames that the log says."""
    for frames, path in re.findall(r"Stopped early: (\d+) frames are kept in (.*\.mp4)", log):
        assert frames_of(Path(path))[0] == int(frames)


@pytest.mark.parametrize("name", NAMES)
def test_workflow_runs_twice_is_interrupted_and_runs_again(device, server, messages, name):
    before, said = vram_free(server), server.log.stat().st_size
    for seed in (1, 2):
        runs(server, workflow(name, seed, device.small))
    is_interrupted_in_mid_run(server, messages, long(name, 3, device.small))
    runs(server, workflow(name, 4, device.small))
    log = server.log.read_bytes()[said:].decode(errors="replace")
    assert not complaints(log), log
    kept_files_play(log)
    if not device.small:
        returns_its_memory(server, before)


def test_pack_loads_without_a_complaint(server):
    log = server.log.read_text(encoding="utf-8", errors="replace")
    assert "IMPORT FAILED" not in log
    assert not [line for line in complaints(log) if "sparse" in line.lower() or FOLDER in line], log
