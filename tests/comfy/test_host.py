"""The nodes against ComfyUI's own code: each check in `host/` is one test here, run in ComfyUI's process.

The current host runs all of them, the older one those that stand near the host: OLDER_GROUPS. The player, sessions
and prompts over time are the pack's own code above the same sampler, and `test_older_server.py` has one video of them.
"""

from __future__ import annotations

import ast
import functools
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hosts import host_or_skip

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GROUPS = {
    path.stem.removeprefix("checks_"): [
        node.name
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
    ]
    for path in sorted((HERE / "host").glob("checks_*.py"))
}
OLDER_GROUPS = ("sampling", "contract", "loaders", "formats", "patches", "offload", "video", "output")
ON_A_GPU = GROUPS.pop("cuda")
CASES = [("current", check) for checks in GROUPS.values() for check in checks]
CASES += [("older", check) for group in OLDER_GROUPS for check in GROUPS[group]]
# Attention functions of the host that a CPU can run, beside its default.
ATTENTIONS = ("--use-split-cross-attention", "--use-quad-cross-attention")
LACKS = "this ComfyUI lacks "  # how run_checks.py begins the answer of a check that cannot be run
WORLD_DIT = ROOT / "sparse_attn" / "world" / "weights" / "world_dit.safetensors"

pytestmark = pytest.mark.comfy


def run_checks(which: str, blocked: Path, *wanted: str) -> dict[str, Any]:
    """Check -> "ok" or its traceback, from one process of a host; `wanted` is handed to `run_checks.py`."""
    host = host_or_skip(which)
    done = subprocess.run(
        [host.python, str(HERE / "host" / "run_checks.py"), str(host.path), str(ROOT), *wanted],
        env=host.environment(blocked),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """Which host -> the answers of the checks that this run of pytest asks for."""
    asked: dict[str, list[str]] = {"current": [], "older": []}
    for item in request.session.items:
        if item.path == request.path and item.originalname == "test_host":
            which, check = item.callspec.params["which"], item.callspec.params["check"]
            asked[which].append(check.removeprefix("check_"))
    return functools.cache(
        lambda which: run_checks(which, tmp_path_factory.mktemp("blocked"), *(asked[which] or ["none"]))
    )


@pytest.mark.parametrize(("which", "check"), CASES)
def test_host(which, check, results):
    if "world_model" in check and not WORLD_DIT.is_file():
        pytest.skip("this checkout lacks the world model's weights")
    said = results(which)[check]
    if said.startswith(LACKS):
        pytest.skip(said)
    assert said == "ok", said


@pytest.mark.parametrize("which", ["current", "older"])
def test_loading_the_pack_brings_no_library_of_its_own_along(which, results):
    assert results(which)["new_libraries"] == []  # what a start of the host would have to wait for


@pytest.mark.parametrize("option", ATTENTIONS)
def test_dense_goes_through_the_hosts_chosen_attention(option, tmp_path):
    wanted = "dense_goes_through_the_hosts_attention", "dense_equals_core_on_causal_and_plain_models"
    said = run_checks("current", tmp_path, option, *wanted)
    assert [said[f"check_{check}"] for check in wanted] == ["ok", "ok"], said


@pytest.mark.gpu
@pytest.mark.parametrize("option", ["--gpu", "--dynamic-vram"])
def test_on_a_gpu(option, tmp_path):
    said = run_checks("current", tmp_path, option, "cuda")
    assert {check: said[check] for check in ON_A_GPU} == dict.fromkeys(ON_A_GPU, "ok")
