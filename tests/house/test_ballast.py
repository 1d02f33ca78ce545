"""benchmarks/comfyui_ballast.py over a torch that only counts memory."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# 140 GB, 100 of them free; what is held counts, and 5 GB more are taken by others some looks later.
TORCH = """
held, looks, uint8 = 0, 0, None
class Held:
    def numel(self):
        return held
def zeros(*_, **__): pass
def empty(size, **__):
    global held
    held = size
    return Held()
class cuda:
    @staticmethod
    def mem_get_info():
        global looks
        looks += 1
        return int(100e9) - held - (int(5e9) if looks > 3 else 0), int(140e9)
"""


@pytest.fixture
def ballast(monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text(TORCH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import comfyui_ballast

    yield comfyui_ballast.Ballast
    sys.modules.pop("comfyui_ballast", None)


def test_ballast_tells_what_others_took(ballast):
    async def run() -> tuple[float, int]:
        async with ballast(16) as held:
            while not held.peak_gb:
                await asyncio.sleep(0.01)
        return held.peak_gb, held.process.returncode

    peak, code = asyncio.run(asyncio.wait_for(run(), 60))
    assert peak == pytest.approx(5) and code != 0, "the process was killed"


def test_ballast_larger_than_what_is_free(ballast):
    async def run() -> None:
        async with ballast(120):
            pass

    with pytest.raises(RuntimeError, match=r"100.0 of 140.0 GB are free, less than 120 GB: use a smaller"):
        asyncio.run(run())
