"""Make a video on a running ComfyUI and receive it while it is made.

    python clients/stream_client.py workflows/api/world_model_demo.json --out received
    ... --set 4.seconds=20 --set '4.clip=["1", 1]' --prompt-after 2 "a large blue star orbiting"
    ... --stop-after 5

Into the folder come previews as frame_000012.jpg, and video.mp4, which grows with every chunk and plays at any time.
Needs aiohttp, which ComfyUI's own Python has. docs/api.md explains the messages.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

CHUNK, NOTE, END = "sparse_forcing.chunk", "sparse_forcing.note", "sparse_forcing.end"
LAST = ("execution_success", "execution_error", "execution_interrupted")  # the host's word on a prompt


class Client:
    """One websocket to a ComfyUI, and the requests that go with it."""

    def __init__(
        self, url: str, http: aiohttp.ClientSession, socket: aiohttp.ClientWebSocketResponse, name: str
    ):
        self.url, self.http, self.socket, self.name = url, http, socket, name

    async def queue(self, workflow: dict[str, Any]) -> str:
        """The id of the queued prompt; RuntimeError where the host refuses the workflow."""
        body = {"prompt": workflow, "client_id": self.name}
        async with self.http.post(f"{self.url}/prompt", json=body) as answer:
            said = await answer.json()
        if "prompt_id" not in said:
            raise RuntimeError(f"ComfyUI refuses the workflow: {json.dumps(said)}")
        return said["prompt_id"]

    async def events(self, prompt_id: str) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """(kind, content) of everything that is said about a prompt, up to the host's last word on it."""
        async for message in self.socket:
            if message.type != aiohttp.WSMsgType.TEXT:  # the host's own previews are binary
                continue
            said = json.loads(message.data)
            if said["data"].get("prompt_id") != prompt_id:
                continue
            yield said["type"], said["data"]
            if said["type"] in LAST:
                return
        raise RuntimeError("ComfyUI closed the connection before the end.")

    async def tell(self, what: str, chunk: dict[str, Any], **content: str) -> None:
        """POST /sparse_forcing/stop or prompt for the run that `chunk` comes from; RuntimeError with its answer."""
        body = {"prompt_id": chunk["prompt_id"], "node": chunk["node"], **content}
        async with self.http.post(f"{self.url}/sparse_forcing/{what}", json=body) as answer:
            if answer.status != 200:
                raise RuntimeError((await answer.json())["error"])

    async def fetch(self, video: dict[str, Any], start: int, whole: bool = False) -> bytes:
        """The bytes of a video from `start` to where its chunk ends, or of the `whole` file, which must be finished."""
        place = {name: video[name] for name in ("filename", "subfolder", "type")}
        headers = {"Range": f"bytes={start}-" if whole else f"bytes={start}-{video['bytes'] - 1}"}
        async with self.http.get(f"{self.url}/view", params=place, headers=headers) as answer:
            answer.raise_for_status()
            return await answer.read()


@contextlib.asynccontextmanager
async def connect(url: str) -> AsyncIterator[Client]:
    """A client under a name of its own. Events go to the client that queued the prompt, and to no other."""
    name = uuid.uuid4().hex
    async with (
        aiohttp.ClientSession() as http,
        http.ws_connect(f"{url}/ws", params={"clientId": name}) as socket,
    ):
        yield Client(url, http, socket, name)


class Receiver:
    """Writes what arrives into a folder, and says what the viewer asked for when its chunk has come."""

    def __init__(
        self, client: Client, out: Path, prompt_after: tuple[int, str] | None, stop_after: int | None
    ):
        self.client, self.out, self.prompt_after, self.stop_after = client, out, prompt_after, stop_after
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "video.mp4"
        self.path.write_bytes(b"")
        self.video: dict[str, Any] | None = None  # where the host has it

    async def chunk(self, content: dict[str, Any]) -> None:
        for number, picture in content["pictures"]:
            (self.out / f"frame_{number:06}.jpg").write_bytes(base64.b64decode(picture))
        self.video = content["video"]
        await self._grow()
        done = content["done"]
        print(
            f"chunk {done}/{content['total']}, {content['frame_count']} frames: {content['prompt']}",
            flush=True,
        )
        if self.prompt_after is not None and done == self.prompt_after[0]:
            await self.client.tell("prompt", content, text=self.prompt_after[1])
        if done == self.stop_after:
            await self.client.tell("stop", content)

    async def end(self, content: dict[str, Any]) -> None:
        print(f"{content['outcome']}: {content['frame_count']} frames", flush=True)
        if self.video is not None:
            await self._grow(whole=True)

    async def _grow(self, whole: bool = False) -> None:
        assert self.video is not None
        with self.path.open("ab") as file:
            if whole or file.tell() < self.video["bytes"]:  # a chunk's frames may all wait for the next one
                file.write(await self.client.fetch(self.video, file.tell(), whole))


async def receive(arguments: argparse.Namespace) -> None:
    """Queue the workflow and follow it to its end; RuntimeError where it fails."""
    workflow = json.loads(arguments.workflow.read_text(encoding="utf-8"))
    for node, name, value in arguments.set:
        workflow[node]["inputs"][name] = value
    async with connect(arguments.url.rstrip("/")) as client:
        receiver = Receiver(client, arguments.out, arguments.prompt_after, arguments.stop_after)
        async for kind, content in client.events(await client.queue(workflow)):
            if kind == CHUNK:
                await receiver.chunk(content)
            elif kind == NOTE:
                print(content["text"], flush=True)
            elif kind == END:
                await receiver.end(content)
            elif kind in LAST[1:]:
                raise RuntimeError(content.get("exception_message", "The run was interrupted.").strip())


def _change(text: str) -> tuple[str, str, Any]:
    place, _, value = text.partition("=")
    node, _, name = place.partition(".")
    if not (node and name):
        raise argparse.ArgumentTypeError(f"{text!r} is not NODE.INPUT=VALUE, such as 4.seconds=20")
    try:
        return node, name, json.loads(value)
    except ValueError:
        return node, name, value  # text needs no quotes


class _ChunkAndText(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        if not values[0].isdigit():
            parser.error(f"{option} {values[0]!r}: give the number of chunks first, then the prompt")
        setattr(namespace, self.dest, (int(values[0]), values[1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "workflow", type=Path, help="a workflow in API format, such as those of workflows/api"
    )
    parser.add_argument("--url", default="http://127.0.0.1:8188", help="where ComfyUI listens")
    parser.add_argument("--out", type=Path, default=Path("received"), help="folder for frames and video")
    parser.add_argument("--set", type=_change, action="append", default=[], metavar="NODE.INPUT=VALUE")
    parser.add_argument("--prompt-after", nargs=2, metavar=("CHUNKS", "TEXT"), action=_ChunkAndText)
    parser.add_argument(
        "--stop-after", type=int, metavar="CHUNKS", help="stop and keep after that many chunks"
    )
    try:
        asyncio.run(receive(parser.parse_args()))
    except (RuntimeError, OSError, aiohttp.ClientError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
