"""Imitates a small graphics card: a second process holds memory so that only so much of it stays free."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

GB = 1e9
START_S = 60.0


def hold(free_gb: float) -> None:
    """Take memory of the CUDA device until `free_gb` are free, hold it until killed, and print how low that fell."""
    import torch

    torch.zeros(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    take = int(free - free_gb * GB)
    if take < 0:
        sys.exit(
            f"{free / GB:.1f} of {total / GB:.1f} GB are free, less than {free_gb:g} GB: use a smaller --free-gb"
        )
    ballast = torch.empty(take, dtype=torch.uint8, device="cuda")
    lowest = before = torch.cuda.mem_get_info()[0]
    print(json.dumps({"holds": ballast.numel(), "free": before}), flush=True)
    while True:
        time.sleep(0.01)
        free = torch.cuda.mem_get_info()[0]
        if free < lowest:
            lowest = free
            print(json.dumps({"lowest": lowest}), flush=True)


class Ballast:
    """`async with Ballast(16) as ballast`: the process above; afterwards `peak_gb` is what others took of the rest."""

    def __init__(self, free_gb: float):
        self.free_gb, self.peak_gb = free_gb, 0.0

    async def __aenter__(self) -> Ballast:
        script = Path(__file__).with_name("comfyui.py")
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, str(script), "ballast", "--free-gb", str(self.free_gb),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None
        try:
            line = await asyncio.wait_for(self.process.stdout.readline(), START_S)
        except asyncio.TimeoutError:
            self.process.kill()
            raise RuntimeError(f"no ballast: the process held nothing after {START_S:.0f} s") from None
        if not line:
            said = (await self.process.communicate())[1].decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"no ballast: {said[-1] if said else 'the process ended'}")
        self.start = json.loads(line)["free"]
        self.reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.process.kill()
        await self.process.wait()
        await self.reading

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.peak_gb = (self.start - json.loads(line)["lowest"]) / GB
