"""Where the real host is: COMFYUI_PATH (default ~/ComfyUI) and COMFYUI_PYTHON (default ~/comfy-venv's).

ComfyUI's code runs in processes of that Python only, never in the tests' own. Tests that need it are marked `comfy` and
say why they are skipped where it is missing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Host(NamedTuple):
    """A ComfyUI checkout and the Python that runs it."""

    path: Path
    python: str

    def environment(self, blocked: Path) -> dict[str, str]:
        """Environment without Triton: `blocked` gets a package of that name that cannot be imported."""
        package = blocked / "triton"
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text(
            "raise ModuleNotFoundError('No module named triton', name='triton')\n"
        )
        return {**os.environ, "PYTHONPATH": str(blocked), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def find_host() -> Host | str:
    """The host, or why there is none."""
    path = Path(os.environ.get("COMFYUI_PATH", Path.home() / "ComfyUI"))
    if not (path / "main.py").is_file():
        return f"no ComfyUI at {path}: set COMFYUI_PATH to a checkout"
    python = os.environ.get("COMFYUI_PYTHON")
    if python is None:
        venv = Path.home() / "comfy-venv"
        candidates = (venv / "bin" / "python", venv / "Scripts" / "python.exe", Path(sys.executable))
        python = str(next(p for p in candidates if p.is_file()))
    if not Path(python).is_file():
        return f"no Python at {python}: set COMFYUI_PYTHON to one with ComfyUI's requirements"
    return Host(path, python)


@pytest.fixture(scope="session")
def host() -> Host:
    found = find_host()
    if isinstance(found, str):
        pytest.skip(found)
    return found
