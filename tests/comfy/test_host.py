"""The nodes against ComfyUI's own code: each check in `host/` is one test here, run in ComfyUI's process."""

from __future__ import annotations

import ast
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CHECKS = [
    node.name
    for path in sorted((HERE / "host").glob("checks_*.py"))
    for node in ast.parse(path.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]
WORLD_DIT = ROOT / "sparse_attn" / "world" / "weights" / "world_dit.safetensors"

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def results(host, tmp_path_factory) -> dict[str, Any]:
    """Check -> "ok" or its traceback, from one process."""
    done = subprocess.run(
        [host.python, str(HERE / "host" / "run_checks.py"), str(host.path), str(ROOT)],
        env=host.environment(tmp_path_factory.mktemp("blocked")),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("check", CHECKS)
def test_host(check, results):
    if "world_model" in check and not WORLD_DIT.is_file():
        pytest.skip("this checkout lacks the world model's weights")
    assert results[check] == "ok", results[check]


def test_loading_the_pack_brings_no_library_of_its_own_along(results):
    assert results["new_libraries"] == []  # what a start of the host would have to wait for
