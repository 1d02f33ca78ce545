"""benchmarks/results.py and what comfyui.py's records sum up to; neither needs ComfyUI or torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FACTS = {
    "machine": "NVIDIA H200",
    "command": "python comfyui.py",
    "date": "2026-01-01",
    "versions": {"torch": "2"},
}


@pytest.fixture
def scripts(monkeypatch):
    """(results, comfyui_results) as modules."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import comfyui_results
    import results

    yield results, comfyui_results
    for name in ("results", "comfyui_results", "comfyui_graphs"):
        sys.modules.pop(name, None)


def record(name: str, fps: float | None = 10.0, error: str | None = None, **facts) -> dict:
    return {
        "name": name,
        "chunk_s": 0.2,
        "fps": fps,
        "first_chunk_s": 0.3,
        "node_s": 2.0,
        **facts,
        "error": error,
    }


def test_results_page_is_up_to_date(scripts):
    results, _ = scripts
    assert results.PAGE.read_text(encoding="utf-8") == results.page(), "run python benchmarks/results.py"


def test_results_goals_are_the_summary_names(scripts):
    results, comfyui = scripts
    assert list(results.GOALS) == list(comfyui.FIGURES)


def test_results_page_of_runs(scripts, tmp_path):
    results, comfyui = scripts
    records = [
        record("stream_tiny"),
        record("stream_gguf", None, "out of | memory\nmore"),
        record("ok", chunk_s=None),
    ]
    found = comfyui.merged(
        None, FACTS | {"flags": "no flags"}, records, {"stream_tiny_fps": 10.0, "fps_14b": 9.5}
    )
    (tmp_path / "comfyui_h200.json").write_text(json.dumps(found))
    page = results.page(tmp_path)
    assert "## comfyui_h200" in page and "NVIDIA H200" in page and "`python comfyui.py`" in page
    assert ">= 55 | **10** |" in page and ">= 8.9 | 9.5 |" in page
    assert "failed: out of / memory |" in page and "1 further checks" in page


def test_summary_of_all_jobs(scripts):
    _, comfyui = scripts
    needed = {name for _, *of in comfyui.FIGURES.values() for name in of}
    assert set(comfyui.summary_of([record(name) for name in needed])) == set(comfyui.FIGURES)


def test_summary_of_leaves_out_what_did_not_run(scripts):
    _, comfyui = scripts
    records = [
        record("core_5s"),
        record("dense_5s", node_s=1.0),
        record("stream_tiny", error="out of memory"),
    ]
    assert comfyui.summary_of(records) == {"dense_over_core": 2.0}


def test_merged_keeps_other_jobs_and_other_flags(scripts, tmp_path):
    _, comfyui = scripts
    path, facts = tmp_path / "comfyui.json", FACTS | {"flags": "no flags"}
    first = [record("stream_tiny"), record("first_run")]
    path.write_text(json.dumps(comfyui.merged(None, facts, first, comfyui.summary_of(first))))
    other = comfyui.merged(
        path, facts | {"flags": "--disable-cuda-malloc"}, [record("stream_tiny", 99.0)], {}
    )
    path.write_text(json.dumps(other))
    again = [record("stream_tiny", error="the server died")]
    found = comfyui.merged(path, facts, again, comfyui.summary_of(again))
    assert found["summary"] == {"first_run_s": 0.3}, "a figure whose job now failed does not stay"
    assert [one["name"] for one in found["runs"]["no flags"]["records"]] == ["first_run", "stream_tiny"]
    assert found["runs"]["--disable-cuda-malloc"]["records"][0]["fps"] == 99.0


def test_merged_summary_is_that_of_the_server_without_flags(scripts):
    _, comfyui = scripts
    found = comfyui.merged(
        None, FACTS | {"flags": "--cpu"}, [record("stream_tiny")], {"stream_tiny_fps": 10.0}
    )
    assert found["summary"] == {} and found["runs"]["--cpu"]["summary"] == {"stream_tiny_fps": 10.0}


@pytest.mark.parametrize(
    ("argv", "flags"),
    [
        ("main.py --listen 127.0.0.1 --port 8188 --disable-auto-launch", "no flags"),
        (
            "main.py --disable-cuda-malloc --port 8188 --reserve-vram 2",
            "--disable-cuda-malloc --reserve-vram 2",
        ),
    ],
)
def test_flags_of_leaves_out_where_the_server_is(scripts, argv, flags):
    _, comfyui = scripts
    assert comfyui.flags_of(argv.split()) == flags


def test_log_errors_of_the_part_since_the_start(scripts, tmp_path):
    _, comfyui = scripts
    log = tmp_path / "log"
    log.write_text("[ERROR] before\n")
    start = log.stat().st_size
    log.write_text("[ERROR] before\ngot prompt\nTraceback (most recent call last):\nProcessing interrupted\n")
    assert comfyui.log_errors(log, start) == ["log: Traceback (most recent call last):"]


def test_plot_of_a_summary(scripts, tmp_path):
    pytest.importorskip("PIL")
    _, comfyui = scripts
    comfyui.plot({"stream_tiny_fps": 60.0, "first_picture_s": 0.8}, tmp_path / "made" / "plot.png")
    assert (tmp_path / "made" / "plot.png").stat().st_size
