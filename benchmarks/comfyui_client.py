"""A websocket client of a running ComfyUI that times what a user sees of a graph. Needs aiohttp and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import aiohttp

SILENCE_S = 280.0  # longest wait for the next message of a prompt
FRONT_END = {
    "type": "feature_flags",
    "data": {"supports_preview_metadata": True},
}  # as ComfyUI's front end says
TEXT_EVENT = 3  # of ComfyUI's binary messages: progress text of a node
LAST = ("execution_success", "execution_error", "execution_interrupted")


class ServerGone(RuntimeError):
    """ComfyUI does not answer any more."""


@dataclass
class Run:
    """One prompt as a client sees it; times are seconds after it was queued."""

    began: dict[str, float] = field(default_factory=dict)  # node id -> when it started
    ended: dict[str, float] = field(default_factory=dict)
    chunks: list[tuple[float, dict[str, Any]]] = field(default_factory=list)  # sparse_forcing.chunk messages
    ticks: list[float] = field(default_factory=list)  # progress messages
    texts: list[str] = field(default_factory=list)  # notes and progress texts
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    total_s: float = 0.0
    outcome: str = ""
    error: str | None = None

    def node_s(self, node: str) -> float:
        """Seconds from a node's start to the next node's."""
        return self.ended[node] - self.began[node]

    def first_chunk_s(self, node: str) -> float:
        return self.chunks[0][0] - self.began[node]

    def chunk_s(self) -> float:
        """Steady seconds per chunk: the median of the second half of the gaps between chunk messages."""
        return steady([at for at, _ in self.chunks])


def steady(times: list[float]) -> float:
    """The median of the second half of the gaps between times. Raises ValueError for fewer than three times."""
    gaps = [later - earlier for earlier, later in pairwise(times)]
    if len(gaps) < 2:
        raise ValueError(f"{len(times)} chunks are too few for a steady time; make the video longer")
    return statistics.median(gaps[len(gaps) // 2 :])


class Client:
    """One connection to a ComfyUI and the requests that go with it."""

    def __init__(
        self, url: str, http: aiohttp.ClientSession, socket: aiohttp.ClientWebSocketResponse, name: str
    ):
        self.url, self.http, self.socket, self.name = url.rstrip("/"), http, socket, name

    async def get(self, path: str) -> Any:
        async with gone_as_error(), self.http.get(self.url + path) as answer:
            return await answer.json()

    async def post(self, path: str, content: dict) -> Any:
        async with gone_as_error(), self.http.post(self.url + path, json=content) as answer:
            body = await answer.read()
        return json.loads(body) if body.startswith(b"{") else None

    async def free(self) -> None:
        """Have ComfyUI unload every model and empty its caches."""
        await self.post("/free", {"unload_models": True, "free_memory": True})
        await asyncio.sleep(2.0)  # its worker does so at its next turn

    async def run(self, graph: dict[str, Any], cancel_when: Callable[[Run], bool] | None = None) -> Run:
        """Queue a graph and listen until it has ended; interrupts it as soon as `cancel_when(run)` is true."""
        run, began = Run(), time.perf_counter()
        answer = await self.post("/prompt", {"prompt": graph, "client_id": self.name})
        if "prompt_id" not in (answer or {}):
            run.error = f"refused: {json.dumps(answer)[:1500]}"
            return run
        node, cancelled = None, False
        while not run.outcome:
            message = await self._receive()
            now = time.perf_counter() - began
            if message is None:
                continue
            if isinstance(message, str):
                run.texts.append(message)
                continue
            kind, data = message["type"], message.get("data") or {}
            if data.get("prompt_id", answer["prompt_id"]) != answer["prompt_id"]:
                continue
            if kind in ("executing", *LAST) and node is not None:
                run.ended[node], node = now, None
            if kind == "executing" and data.get("node"):
                node = data["node"]
                run.began[node] = now
            self._note(run, kind, data, now)
            if cancel_when is not None and not cancelled and cancel_when(run):
                cancelled = True
                await self.post("/interrupt", {})
        run.total_s = now
        return run

    @staticmethod
    def _note(run: Run, kind: str, data: dict[str, Any], now: float) -> None:
        if kind == "progress":
            run.ticks.append(now)
        elif kind == "sparse_forcing.chunk":
            run.chunks.append((now, data))
        elif kind == "sparse_forcing.note":
            run.texts.append(data.get("text", ""))
        elif kind == "executed":
            run.outputs[data["node"]] = data.get("output") or {}
        elif kind == "execution_error":
            where = "".join(data.get("traceback", [])[-2:]).strip()
            run.error = (
                f"{data.get('exception_type', '')}: {data.get('exception_message', '').strip()} {where}"[
                    -2000:
                ]
            )
        if kind in LAST:
            run.outcome = kind

    async def _receive(self) -> dict[str, Any] | str | None:
        """The next message; a node's progress text as str; None for a preview."""
        try:
            message = await self.socket.receive(timeout=SILENCE_S)
        except asyncio.TimeoutError:
            with contextlib.suppress(ServerGone):
                await self.post("/interrupt", {})
            raise TimeoutError(f"no message in {SILENCE_S:.0f} s; the prompt was interrupted") from None
        if message.type == aiohttp.WSMsgType.TEXT:
            return json.loads(message.data)
        if message.type == aiohttp.WSMsgType.BINARY:
            body = message.data
            return (
                body[4:].decode(errors="replace") if int.from_bytes(body[:4], "big") == TEXT_EVENT else None
            )
        raise ServerGone(f"ComfyUI closed the connection ({message.type.name})")


@contextlib.asynccontextmanager
async def gone_as_error() -> AsyncIterator[None]:
    """Turn a refused or broken connection into ServerGone."""
    try:
        yield
    except (aiohttp.ClientConnectionError, asyncio.TimeoutError, ConnectionError) as error:
        raise ServerGone(f"ComfyUI does not answer: {error!r}") from error


@contextlib.asynccontextmanager
async def connect(url: str, wait_s: float = 120.0) -> AsyncIterator[Client]:
    """A connected client; waits up to `wait_s` for a server that is starting."""
    name = uuid.uuid4().hex
    async with aiohttp.ClientSession() as http:
        end = time.monotonic() + wait_s
        while True:
            try:
                socket = await http.ws_connect(f"{url.rstrip('/')}/ws?clientId={name}", max_msg_size=0)
                break
            except (aiohttp.ClientError, OSError) as error:
                if time.monotonic() > end:
                    raise ServerGone(f"no ComfyUI at {url}: {error!r}") from error
                await asyncio.sleep(0.5)
        async with socket:
            await socket.send_json(FRONT_END)
            yield Client(url, http, socket, name)
