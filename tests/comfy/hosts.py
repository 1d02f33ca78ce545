"""Where the real hosts are.

The current one: COMFYUI_PATH (default ~/ComfyUI) and COMFYUI_PYTHON (default ~/comfy-venv's). An older one, which the
pack must run on as well: COMFYUI_OLDER_PATH (default ~/ComfyUI-0.3.64) and COMFYUI_OLDER_PYTHON (default
~/comfy-venv-0364's).

ComfyUI's code runs in processes of that Python only, never in the tests' own. Tests that need it are marked `comfy` and
say why they are skipped where it is missing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

# Which host -> the beginning of its two variables, its default folder and its default virtual environment.
HOSTS = {
    "current": ("COMFYUI", "ComfyUI", "comfy-venv"),
    "older": ("COMFYUI_OLDER", "ComfyUI-0.3.64", "comfy-venv-0364"),
}


class Host(NamedTuple):
    """A ComfyUI checkout and the Python that runs it."""

    path: Path
    python: str

    def environment(self, blocked: Path) -> dict[str, str]:
        """Environment without Triton: `blocked` gets a package of that name that cannot be imported.

        A PYTHONPATH that is set already stays, behind it: some machines keep ComfyUI's requirements there.
        """
        package = blocked / "triton"
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text(
            "raise ModuleNotFoundError('No module named triton', name='triton')\n"
        )
        paths = os.pathsep.join(filter(None, (str(blocked), os.environ.get("PYTHONPATH"))))
        return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

    def lacks(self, module: str) -> bool:
        """Whether that Python cannot import a module."""
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
        return subprocess.run([self.python, "-c", code], check=False).returncode != 0


def find_host(which: str = "current") -> Host | str:
    """One of HOSTS, or why it is not there."""
    variable, folder, environment = HOSTS[which]
    path = Path(os.environ.get(f"{variable}_PATH", Path.home() / folder))
    if not (path / "main.py").is_file():
        return f"no ComfyUI at {path}: set {variable}_PATH to a checkout"
    python = os.environ.get(f"{variable}_PYTHON")
    if python is None:
        venv = Path.home() / environment
        candidates = (venv / "bin" / "python", venv / "Scripts" / "python.exe", Path(sys.executable))
        python = str(next(p for p in candidates if p.is_file()))
    if not Path(python).is_file():
        return f"no Python at {python}: set {variable}_PYTHON to one with ComfyUI's requirements"
    return Host(path, python)


def host_or_skip(which: str) -> Host:
    found = find_host(which)
    if isinstance(found, str):
        pytest.skip(found)
    return found
