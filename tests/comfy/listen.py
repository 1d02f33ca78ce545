"""Print every JSON message of a running ComfyUI's websocket as one line: listen.py URL CLIENT_ID.

Run by ComfyUI's own Python, which has aiohttp.
"""

from __future__ import annotations

import asyncio
import json
import sys

import aiohttp


async def listen(url: str, client_id: str) -> None:
    async with (
        aiohttp.ClientSession() as http,
        http.ws_connect(f"{url}/ws", params={"clientId": client_id}, max_msg_size=0) as socket,
    ):
        async for message in socket:
            if message.type == aiohttp.WSMsgType.TEXT:  # previews are binary
                sys.stdout.write(json.dumps(json.loads(message.data)) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(listen(*sys.argv[1:]))
