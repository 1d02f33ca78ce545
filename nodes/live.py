"""What a running Stream Video node and the page say to each other.

Out: events `sparse_forcing.chunk` and `sparse_forcing.end` over the host's websocket, to the page that queued the
prompt. In: POST /sparse_forcing/stop and /sparse_forcing/prompt, which leave word for the sampling thread; it looks
between two chunks. The page is optional: nothing that goes wrong here may stop a video.
"""

from __future__ import annotations

import base64
import io as bytes_io
import json
import logging
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..sparse_attn.memory_live import KeptBlocks, gather_tables, summarise
from ..sparse_attn.pictures import spread
from ..sparse_attn.state import StreamState

logger = logging.getLogger("sparse_forcing.nodes")

PREVIEW_SIDE = 384  # pixels of a preview's longer side
PREVIEW_FRAMES = 16  # at most, of a chunk
PREVIEW_QUALITY = 80  # of the JPEGs; about 15 kB each
WAITING_MESSAGES = 200  # when the host has more to send than this, the page gets numbers alone
WAITING_CHUNKS = 2  # the same, when that many chunks' pictures are still being made

MAX_BODY = 16 * 1024
MAX_PROMPT = 8 * 1024  # characters
PROMPT_ID = re.compile(r"[0-9A-Za-z_-]{1,64}")
NODE_ID = re.compile(r"[0-9A-Za-z_.:-]{1,64}")
STOP, PROMPT = "/sparse_forcing/stop", "/sparse_forcing/prompt"


class LiveRun:
    """One run of the node as the page sees it. `facts` go along with every chunk: what stays the same all the time.

    `memory` gives the stream whose memory is shown, or None. Pictures and the map of that memory are made, and
    everything is sent, by a thread of its own: 12 frames of 832 x 480 take a CPU up to 0.2 s, the map of Wan 1.3B 3 ms.
    Requests are left by the server's thread and read by the sampling thread, each in one step, so there is no lock.
    Chunks are shown by whoever decodes them, one thread at a time.
    """

    def __init__(self, prompt_id: str, node_id: str, client_id: str | None, server: Any):
        self.prompt_id, self.node_id, self.client_id, self.server = prompt_id, node_id, client_id, server
        self.facts: dict[str, Any] = {}
        self.memory: Callable[[], StreamState | None] = lambda: None
        self.takes_prompts = False
        self.stopping = False
        self._new_prompt: deque[str] = deque(maxlen=1)
        self._typed = False
        self._off: set[str] = set()  # parts of the view that failed
        self._began = self._last = time.perf_counter()
        self._frames = 0
        self._before = (0, 0)  # frames and chunks that an earlier run made
        self._sender = ThreadPoolExecutor(1, "sparse_forcing_live")
        self._sending: list[Future] = []

    def start_behind(self, frames: int, chunks: int) -> None:
        """This run goes on behind `frames` video frames, `chunks` chunks, of an earlier one."""
        self._frames, self._before = frames, (frames, chunks)

    def leave_prompt(self, text: str) -> None:
        """A prompt for the next chunk; a later one takes its place."""
        self._new_prompt.append(text)

    def take_prompt(self) -> str | None:
        """The prompt left since the last call, if any."""
        if not self._new_prompt:
            return None
        self._typed = True
        return self._new_prompt.pop()

    @property
    def steered(self) -> bool:
        """Whether the page made this run another one than its inputs say."""
        return self.stopping or self._typed

    def show_chunk(self, frames: np.ndarray, kept: KeptBlocks | None = None, **facts: Any) -> None:
        """Send a chunk's frames [n, H, W, 3] uint8, smaller and fewer, what the memory kept, and its numbers.

        facts: `done` and `total` chunks, `cache_bytes`, and what else the page or another client wants to know.
        """
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        first, self._frames = self._frames, self._frames + len(frames)
        spent = now - self._began
        done, total = facts["done"], facts["total"]
        made = done - self._before[1]  # by this run
        self._send(
            "chunk",
            frames,
            kept,
            first_frame=first,
            frame_count=len(frames),
            seconds=round(seconds, 3),
            fps_made=round((self._frames - self._before[0]) / spent, 2),
            seconds_left=round((total - done) * spent / made, 1) if made else None,
            takes_prompts=self.takes_prompts,
            **self.facts,
            **facts,
        )

    def gather_memory(self) -> tuple[Tensor, Callable[[Tensor], KeptBlocks]] | None:
        """`gather_tables` of the memory, for `show_chunk`; None without a page or a map. On the sampling thread."""

        def tables() -> tuple[Tensor, Callable[[Tensor], KeptBlocks]] | None:
            state = None if self.client_id is None else self.memory()
            return None if state is None else gather_tables(state)

        return self._attempt("memory map", tables, None)

    @property
    def has_player(self) -> bool:
        """Whether the page is the host's own front end, which loads the player; other clients do not say this."""
        try:
            flags = self.server.sockets_metadata[self.client_id]["feature_flags"]
            return bool(flags.get("supports_preview_metadata"))
        except (AttributeError, KeyError, TypeError):
            return False

    def say(self, text: str) -> None:
        """A line for the page to show under the numbers."""
        self._send("note", text=text)

    def end(self, outcome: str) -> None:
        """Say how it ended and wait until that is sent: finished, stopped (on request) or failed (error, interrupt)."""
        self._send("end", outcome=outcome, frame_count=self._frames)
        self._sender.shutdown()

    def _send(
        self, event: str, frames: np.ndarray | None = None, kept: KeptBlocks | None = None, **content: Any
    ) -> None:
        """Hand an event, and the frames and the memory to show with it, to the sending thread."""
        if self.client_id is None:
            return
        self._sending = [task for task in self._sending if not task.done()]
        if frames is not None and len(self._sending) >= WAITING_CHUNKS:
            frames, kept = frames[:0], None
        self._sending.append(self._sender.submit(self._send_now, event, frames, kept, content))

    def _send_now(
        self, event: str, frames: np.ndarray | None, kept: KeptBlocks | None, content: dict[str, Any]
    ) -> None:
        try:
            content = {"prompt_id": self.prompt_id, "node": self.node_id, **content}
            if frames is not None:
                shown = partial(self._pictures, frames, content["first_frame"])
                content["pictures"] = self._attempt("preview", shown, [])
                content["memory"] = self._attempt("memory map", partial(self._summary, kept), None)
            self.server.send_sync(f"sparse_forcing.{event}", content, self.client_id)
        except Exception:
            self.client_id = None
            logger.warning(
                "The page could not be told about this run and hears no more of it.", exc_info=True
            )

    def _attempt(self, part: str, make: Callable[[], Any], otherwise: Any) -> Any:
        """What `make` gives. Where it fails, `otherwise`, and this part of the view is off for the run."""
        if part in self._off:
            return otherwise
        try:
            return make()
        except Exception:
            self._off.add(part)
            logger.warning("The live %s failed and is off for this run.", part, exc_info=True)
            return otherwise

    def _summary(self, kept: KeptBlocks | None) -> dict[str, Any] | None:
        return None if kept is None or self._lags() else summarise(kept)

    def _pictures(self, frames: np.ndarray, first: int) -> list[list[Any]]:
        """[frame number, JPEG in base64] of the frames to show."""
        if self._lags():
            return []
        return [[first + i, jpeg(frames[i])] for i in spread(len(frames), PREVIEW_FRAMES)]

    def _lags(self) -> bool:
        """Whether the host has so much to send already that only numbers go along."""
        return self.server.messages.qsize() > WAITING_MESSAGES


# Those in progress, by prompt and node. In a server, `add_routes` makes it one table for all copies of the pack.
RUNS: dict[tuple[str, str], LiveRun] = {}


@contextmanager
def live_run(node_id: str | None) -> Iterator[LiveRun]:
    """A run of the node in the prompt that the host executes now; while it lasts, the routes find it."""
    prompt_id, server = _executing()
    client_id = None if server is None or node_id is None else server.client_id
    run = LiveRun(prompt_id, node_id or "", client_id, server)
    key = (run.prompt_id, run.node_id)
    RUNS[key] = run
    outcome = "failed"
    try:
        yield run
        outcome = "stopped" if run.stopping else "finished"
    finally:
        RUNS.pop(key, None)
        run.end(outcome)


def jpeg(frame: np.ndarray) -> str:
    """A frame [H, W, 3] uint8 as a JPEG of at most PREVIEW_SIDE pixels a side, in base64."""
    image = Image.fromarray(frame)
    image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    out = bytes_io.BytesIO()
    image.save(out, "JPEG", quality=PREVIEW_QUALITY)
    return base64.b64encode(out.getvalue()).decode("ascii")


def _executing() -> tuple[str, Any]:
    """(id of the prompt being executed, the host's server), "" and None outside a server."""
    from comfy_execution.utils import get_executing_context
    from server import PromptServer

    context = get_executing_context()
    return (context.prompt_id if context else ""), getattr(PromptServer, "instance", None)


# --- routes -----------------------------------------------------------------------------------------------------------


class Refused(Exception):
    """A request that is answered with an error; status is HTTP's."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


def add_routes() -> None:
    """Register the routes with the host's server, if there is one.

    A second copy of the pack, whose nodes take the place of the first's, leaves the first's routes, which find its
    runs as well.
    """
    global RUNS
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is None:
        return
    RUNS = vars(server).setdefault("sparse_forcing_runs", RUNS)
    if any(getattr(route, "path", None) == STOP for route in server.routes):
        logger.warning(
            "Sparse Forcing is installed twice, and only one copy's nodes are used: remove one of the folders."
        )
        return
    server.routes.post(STOP)(_answering(stop))
    server.routes.post(PROMPT)(_answering(set_prompt))


def stop(content: dict[str, Any]) -> dict[str, Any]:
    """{prompt_id, node}: end that run after its current chunk, and keep the video."""
    _find(content).stopping = True
    return {"stopping": True}


def set_prompt(content: dict[str, Any]) -> dict[str, Any]:
    """{prompt_id, node, text}: the prompt from the next chunk on."""
    run, text = _find(content), content.get("text")
    if not isinstance(text, str) or not text.strip():
        raise Refused(400, "text is missing: send the new prompt.")
    if len(text) > MAX_PROMPT:
        raise Refused(400, f"text has {len(text)} characters: send at most {MAX_PROMPT}.")
    if not run.takes_prompts:
        raise Refused(
            409, "This run has no CLIP to read a prompt with: connect clip, or a Prompt Timeline node."
        )
    run.leave_prompt(text.strip())
    return {"from_next_chunk": True}


def _find(content: dict[str, Any]) -> LiveRun:
    prompt_id, node_id = content.get("prompt_id"), content.get("node")
    for name, value, form in (("prompt_id", prompt_id, PROMPT_ID), ("node", node_id, NODE_ID)):
        if not isinstance(value, str) or form.fullmatch(value) is None:
            raise Refused(400, f"{name} is missing or is no id.")
    run = RUNS.get((str(prompt_id), str(node_id)))
    if run is None:
        raise Refused(404, "This run is not in progress.")
    return run


def _answering(action: Any) -> Any:
    """The action as a request handler: reads and checks the request, answers in JSON."""
    from aiohttp import web

    async def handler(request: web.Request) -> web.Response:
        try:
            return web.json_response(action(await _read(request)))
        except Refused as error:
            return web.json_response({"error": str(error)}, status=error.status)

    return handler


async def _read(request: Any) -> dict[str, Any]:
    """The request's JSON object. Refuses what another site's page could send, and bodies that are too large."""
    if not same_origin(request.headers, request.host):
        raise Refused(403, "Requests from other sites are refused.")
    if (
        request.content_type != "application/json"
    ):  # a form, which browsers post anywhere, never has this type
        raise Refused(415, "Send application/json.")
    body = b""
    while len(body) <= MAX_BODY:
        piece = await request.content.read(MAX_BODY + 1 - len(body))
        if not piece:
            break
        body += piece
    if len(body) > MAX_BODY:
        raise Refused(413, f"The body is larger than {MAX_BODY} bytes.")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "The body is not JSON.") from None
    if not isinstance(content, dict):
        raise Refused(400, "The body is not a JSON object.")
    return content


def same_origin(headers: Any, host: str) -> bool:
    """Whether a request comes from the host's own page, or from a program that is no browser (it sends neither)."""
    site = headers.get("Sec-Fetch-Site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = headers.get("Origin")
    return origin is None or origin.partition("://")[2] == host
