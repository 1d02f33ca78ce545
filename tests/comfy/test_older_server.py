"""The oldest ComfyUI that the pack supports, as a server: it starts quietly, knows every node, and makes a video."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

import pytest
from serving import FOLDER, WORLD_DIT, Server, demo, frames_of, prepare, saved_video, serve
from test_static import FROZEN

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(not WORLD_DIT.is_file(), reason="this checkout lacks the world model's weights"),
]


@pytest.fixture(scope="module")
def server(older_host, tmp_path_factory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("older")
    shutil.copy(WORLD_DIT, prepare(base))
    with serve(older_host, base) as server:
        yield server


def test_the_pack_loads(server):
    log = re.sub(r"\x1b\[\d+m", "", server.log.read_text(encoding="utf-8", errors="replace"))
    loaded = re.search(rf"[\d.]+ seconds( \(IMPORT FAILED\))?: .*{FOLDER}", log)
    assert loaded is not None and loaded[1] is None, log


def test_every_node_and_input_is_there(server):
    known = server.get("/object_info")
    for name, parts in FROZEN.items():
        inputs = known[name]["input"]
        assert [*inputs.get("required", {}), *inputs.get("optional", {})] == parts["inputs"]
        assert known[name]["output_name"] == parts["outputs"]


def test_world_model_demo_streams_a_video(server):
    done = server.run(demo())
    assert done["status"]["status_str"] == "success", done["status"]
    assert frames_of(saved_video(server, done["outputs"])) == (9, (64, 48))


def test_loader_and_apply_work_together(server):
    loader = {"model_name": WORLD_DIT.name, "weights": "ema", "weight_dtype": "default"}
    workflow = demo() | {"9": {"class_type": "SparseForcingModelLoader", "inputs": loader}}
    workflow["3"]["inputs"]["model"] = ["9", 0]
    assert server.run(workflow)["status"]["status_str"] == "success"
