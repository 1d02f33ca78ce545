"""A real ComfyUI server with the pack in it: start, what it tells the front end, workflows, refusals, stopping."""

from __future__ import annotations

import json
import re
import shutil
import time
import urllib.request
from collections.abc import Iterator

import pytest
from serving import (
    FOLDER,
    ROOT,
    RUN_SECONDS,
    WORLD_DIT,
    Server,
    demo,
    frames_of,
    patch,
    prepare,
    running,
    saved_video,
    say,
    serve,
    until,
)

NODES = 12

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(not WORLD_DIT.is_file(), reason="this checkout lacks the world model's weights"),
]


@pytest.fixture(scope="module")
def server(host, tmp_path_factory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("comfyui")
    models = prepare(base)
    shutil.copy(WORLD_DIT, models)
    (models / "cut.safetensors").write_bytes(WORLD_DIT.read_bytes()[:10_000])
    with serve(host, base) as server:
        yield server


def test_pack_loads_quietly(server):
    log = re.sub(r"\x1b\[\d+m", "", server.log.read_text(encoding="utf-8", errors="replace"))
    loaded = re.search(rf"[\d.]+ seconds( \(IMPORT FAILED\))?: .*{FOLDER}", log)
    assert loaded is not None, log
    assert loaded[1] is None, log
    assert "Traceback" not in log
    complaints = [line for line in log.splitlines() if re.match(r"\[(WARNING|ERROR|CRITICAL)\]", line)]
    assert not [line for line in complaints if "sparse" in line.lower() or FOLDER in line]


def test_every_input_and_output_is_explained(server):
    nodes = {k: v for k, v in server.get("/object_info").items() if "SparseForcing" in k}
    assert len(nodes) == NODES
    for name, node in nodes.items():
        assert node["display_name"] and node["description"] and node["search_aliases"]
        for group in ("required", "optional"):
            for key, spec in node["input"].get(group, {}).items():
                assert spec[1]["tooltip"], (name, key)
        assert len(node["output_tooltips"]) == len(node["output"]) and all(node["output_tooltips"])


def test_front_end_gets_help_and_templates(server):
    address = f"/extensions/{urllib.request.quote(FOLDER)}/docs"
    for page in (ROOT / "web" / "docs").glob("*/en.md"):
        assert server.get(f"{address}/{page.parent.name}/en.md") == page.read_text(encoding="utf-8")
    templates = server.get("/workflow_templates")[FOLDER]
    assert sorted(templates) == sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
    for path in (path for path in (ROOT / "workflows").iterdir() if path.is_file()):
        served = f"/api/workflow_templates/{urllib.request.quote(f'{FOLDER}/{path.name}')}"
        assert server.fetch(served) == path.read_bytes()
    languages = server.get("/i18n")
    for path in (ROOT / "locales").glob("*/nodeDefs.json"):
        ours = json.loads(path.read_text(encoding="utf-8"))
        assert ours.items() <= languages[path.parent.name]["nodeDefs"].items()


def test_world_model_demo_streams_a_video(server):
    done = server.run(demo())
    assert done["status"]["status_str"] == "success", done["status"]
    assert frames_of(saved_video(server, done["outputs"])) == (9, (64, 48))


def test_a_session_is_saved_loaded_and_gone_on_with(server):
    save = {"session": ["4", 2], "filename_prefix": "sessions/test"}
    short = demo(n4_autosave_chunks=1) | {
        "9": {"class_type": "SaveSparseForcingSession", "inputs": save},
    }
    done = server.run(short)
    assert done["status"]["status_str"] == "success", done["status"]
    assert "3 latent frames, 0.56 s, seed 0" in done["outputs"]["9"]["text"][0]
    node = server.get("/object_info/LoadSparseForcingSession")["LoadSparseForcingSession"]
    names = node["input"]["required"]["session_name"][1]["options"]
    assert names[0].startswith("sessions/test_") and names[1].startswith("video/SparseForcing_")
    whole = saved_video(server, server.run(demo(n4_seconds=1.0))["outputs"])
    for name in names[:2]:
        load = {"class_type": "LoadSparseForcingSession", "inputs": {"session_name": name}}
        done = server.run(demo(n4_seconds=1.0, n4_session=["9", 0], n4_seed=5) | {"9": load})
        assert done["status"]["status_str"] == "success", done["status"]
        assert saved_video(server, {"4": done["outputs"]["4"]}).read_bytes() == whole.read_bytes()
    load["inputs"]["session_name"] = "../../etc/passwd"
    refused = server.post("/prompt", {"prompt": demo(n4_session=["9", 0]) | {"9": load}})
    assert "not in list" in json.dumps(refused["node_errors"])


def test_patched_wan_model_samples_with_core_nodes(server):
    done = server.run(patch())
    assert done["status"]["status_str"] == "success", done["status"]
    assert frames_of(saved_video(server, done["outputs"])) == (21, (64, 48))


def test_loader_reads_the_same_model(server):
    workflow = patch(n10_length=9)
    workflow["1"] = {
        "class_type": "SparseForcingModelLoader",
        "inputs": {"model_name": "world_dit.safetensors", "weights": "ema", "weight_dtype": "default"},
    }
    workflow["5"]["inputs"]["model"] = ["1", 0]  # shift 5 without ModelSamplingSD3
    workflow["10"]["class_type"] = "EmptyHunyuanLatentVideo"
    del workflow["4"]
    assert server.run(workflow)["status"]["status_str"] == "success"


def test_sampler_works_on_a_model_nobody_patched(server):
    workflow = patch(n6_model=["4", 0], n7_model=["4", 0], n10_length=25)  # 7 latent frames: 3 + 3 + 1
    del workflow["5"]
    done = server.run(workflow)
    assert frames_of(saved_video(server, done["outputs"]))[0] == 25


@pytest.mark.parametrize(
    ("workflow", "message"),
    [
        (lambda: patch(n10_length=25), "use 6 (21 video frames) or 9 (33 video frames)"),
        (lambda: patch(n5_window_frames=7), "window_frames 7 is not a whole number of chunks of 3"),
        (lambda: patch(n5_persistent_frames=0), "sink_frames 3 does not fit into persistent_frames 0"),
        (lambda: patch(n10_width=104), "width 104 is not a multiple of 16"),
        (lambda: patch(n7_denoise=0.5, n11_sigmas=["15", 0]) | split_sigmas(), "a schedule that ends at 0"),
        (lambda: demo(n4_height=40), "height 40 is not a multiple of 16"),
        (lambda: demo(n4_cfg=2.0), "A CFG of 2 needs a negative prompt"),
        (lambda: demo(n3_backend="triton"), "triton cannot be imported"),
        (lambda: load("cut.safetensors"), "is cut short"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_mistakes_are_answered_clearly(server, workflow, message):
    assert message in server.error(workflow())


def split_sigmas() -> dict:
    return {"15": {"class_type": "SplitSigmas", "inputs": {"sigmas": ["7", 0], "step": 2}}}


def load(name: str) -> dict:
    workflow = demo()
    inputs = {"model_name": name, "weights": "ema", "weight_dtype": "default"}
    workflow["9"] = {"class_type": "SparseForcingModelLoader", "inputs": inputs}
    workflow["3"]["inputs"]["model"] = ["9", 0]
    return workflow


def test_stopping_keeps_what_is_finished(server):
    prompt_id = server.queue(demo(n4_seconds=600.0, n4_seed=1, n4_filename_prefix="video/stopped"))
    folder = server.base / "output" / "video"
    until(
        lambda: [path for path in folder.glob("stopped_*.mp4") if path.stat().st_size > 10_000], RUN_SECONDS
    )
    server.post("/interrupt", {})
    status = server.wait(prompt_id)["status"]
    assert "execution_interrupted" in [kind for kind, _ in status["messages"]]
    count, size = frames_of(next(folder.glob("stopped_*.mp4")))
    assert size == (64, 48) and count >= 9 and count % 12 == 9  # whole chunks: 9, then 12 each
    assert f"{count} frames are kept in" in server.log.read_text(encoding="utf-8", errors="replace")
    assert server.run(demo(n4_seed=2))["status"]["status_str"] == "success"


def test_stop_and_keep_ends_with_a_valid_video_and_latent(server):
    workflow = demo(n4_seconds=600.0, n4_seed=3) | {
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 1], "vae": ["1", 2]}},
        "9": {
            "class_type": "SaveImage",
            "inputs": {"images": ["8", 0], "filename_prefix": "kept"},
        },
    }
    prompt_id = server.queue(workflow)
    assert running(server, prompt_id, "stop") == {"stopping": True}
    done = server.wait(prompt_id)
    assert done["status"]["status_str"] == "success", done["status"]
    count, size = frames_of(saved_video(server, {"4": done["outputs"]["4"]}))
    assert size == (64, 48) and count % 12 == 9
    assert len(done["outputs"]["9"]["images"]) == count
    assert say(server, "stop", {"prompt_id": prompt_id, "node": "4"})[0] == 404
    again = server.queue(workflow)  # runs anew: the short video is not what these inputs ask for
    running(server, again, "stop")
    assert server.wait(again)["status"]["status_str"] == "success"


def test_a_time_line_and_a_typed_prompt_steer_the_video(server):
    workflow = demo(n4_seconds=600.0, n4_seed=4, n4_positive=["10", 0])
    text = "0s: a large red circle bouncing over a navy plain background\n1s: a small blue star orbiting"
    workflow["10"] = {
        "class_type": "SparseForcingPromptTimeline",
        "inputs": {"clip": ["1", 1], "text": text},
    }
    prompt_id = server.queue(workflow)
    assert running(server, prompt_id, "prompt", text="a large green square") == {"from_next_chunk": True}
    body = {"prompt_id": prompt_id, "node": "4"}
    for content, message in (({}, "text is missing"), ({"text": "x" * 9000}, "9000 characters")):
        code, answer = say(server, "prompt", body | content)
        assert code == 400 and message in answer["error"]
    time.sleep(3)
    running(server, prompt_id, "stop")
    assert server.wait(prompt_id)["status"]["status_str"] == "success"
    workflow["10"]["inputs"]["text"] = "0s: a\n1: b"
    said = json.dumps(server.post("/prompt", {"prompt": workflow}))
    assert "line 2, column 1" in said


def test_the_routes_refuse_what_is_not_theirs(server):
    prompt_id = server.queue(demo(n4_seconds=600.0, n4_seed=5))
    here = server.url.removeprefix("http://")
    good = {"prompt_id": prompt_id, "node": "4"}
    try:
        until(
            lambda: say(server, "prompt", good | {"text": "x"})[0] == 409, 60
        )  # it has begun, without a CLIP
        refusals = [
            (403, good, {"Origin": "http://elsewhere.example"}),
            (403, good, {"Origin": "null"}),
            (403, good, {"Origin": "http://127.0.0.1:1"}),
            (403, good, {"Sec_Fetch_Site": "cross-site"}),
            (403, good, {"Sec_Fetch_Site": "same-site"}),
            (415, good, {"Content_Type": "text/plain"}),
            (415, good, {"Content_Type": "application/x-www-form-urlencoded"}),
            (413, b"[" + b"1," * 20_000 + b"1]", {}),
            (400, b"{", {}),
            (400, b"[" * 9_000, {}),
            (400, b"\xff\xfe", {}),
            (400, b"[]", {}),
            (400, {}, {}),
            (400, good | {"node": 4}, {}),
            (400, good | {"node": "../4"}, {}),
            (400, good | {"prompt_id": "x" * 65}, {}),
            (400, good | {"prompt_id": ["x"]}, {}),
            (404, good | {"node": "5"}, {}),
            (404, good | {"prompt_id": "another"}, {}),
        ]
        for code, body, headers in refusals:
            for path in ("stop", "prompt"):
                assert say(server, path, body, **headers)[0] == code, (path, body, headers)
        assert server.get("/queue")["queue_running"], "a refused request ended the run"
        assert say(server, "stop", good, Origin=f"http://{here}", Sec_Fetch_Site="same-origin")[0] == 200
        assert server.wait(prompt_id)["status"]["status_str"] == "success"
    finally:
        server.post("/interrupt", {})


def test_two_queued_prompts_are_told_apart(server):
    first, second = (server.queue(demo(n4_seconds=600.0, n4_seed=seed)) for seed in (6, 7))
    assert running(server, first, "stop") == {"stopping": True}
    server.wait(first)
    running(server, second, "stop")
    assert server.wait(second)["status"]["status_str"] == "success"
