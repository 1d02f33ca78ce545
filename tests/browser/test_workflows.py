"""Every workflow of the pack in the real front end: loaded, saved unchanged, run; two tabs; keys and names."""

from __future__ import annotations

import json

import pytest
from pages import LONG, PATIENCE, ROOT, SIZE, Page, newest_video, workflow
from PIL import Image

FILES = sorted((ROOT / "workflows").glob("*.json"))
GRAPHS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in FILES}
STREAM = "SparseForcingStreamVideo"


def kinds(graph: dict) -> list[str]:
    return [node["type"] for node in graph["nodes"]]


# Those that make a video with what comes with the pack; the others want checkpoints, and are loaded only.
RUNNABLE = [
    name for name, graph in GRAPHS.items() if {STREAM, "SparseForcingWorldModel"} <= set(kinds(graph))
]


def small(name: str, seed: int) -> tuple[dict, int]:
    """A workflow whose last Stream Video runs for long, in a small size, and the number of these nodes."""
    graph = json.loads(json.dumps(GRAPHS[name]))
    streams = [node for node in graph["nodes"] if node["type"] == STREAM]
    for node in streams:
        seconds = LONG if node is streams[-1] else 1.0
        node["widgets_values"][:4] = [*SIZE, seconds, seed]
    return graph, len(streams)


@pytest.mark.parametrize("name", list(GRAPHS))
def test_a_workflow_is_loaded_and_saved_unchanged(page, name):
    given = GRAPHS[name]
    page.tab.evaluate("workflow => app.loadGraphData(workflow)", given)
    page.tab.wait_for_timeout(500)
    first, prompt = page.saved(), page.prompt()
    assert sorted(kinds(first)) == sorted(kinds(given))
    known = page.server.get("/object_info")
    assert {node["class_type"] for node in prompt.values()} <= set(known), "a node that nobody knows"
    for node in prompt.values():
        wanted = known[node["class_type"]]["input"].get("required", {})
        assert not [key for key in wanted if key not in node["inputs"]], node
    page.tab.evaluate("workflow => app.loadGraphData(workflow)", first)
    page.tab.wait_for_timeout(500)
    assert page.saved()["nodes"] == first["nodes"] and page.saved()["links"] == first["links"]
    assert page.prompt() == prompt


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_workflow_streams_and_stops_with_a_playable_file(page, name):
    inputs = page.server.base / "input"
    inputs.mkdir(exist_ok=True)
    Image.new("RGB", SIZE, (0, 0, 128)).save(inputs / "example.png")
    graph, streams = small(name, 200 + RUNNABLE.index(name))
    page.load(graph)
    page.number = streams - 1
    page.queue()
    page.frames(21)
    seen = page.tab.evaluate(
        """async (number) => {
            const canvas = document.querySelectorAll('.sf-player canvas')[number];
            const seen = new Set();
            for (let i = 0; i < 600 && seen.size < 3; i++) {
                if (canvas.width > 1) seen.add(canvas.toDataURL());
                await new Promise((done) => setTimeout(done, 50));
            }
            return seen.size;
        }""",
        page.number,
    )
    assert seen >= 3 and page.player("dataset.state") == "running"
    # By script: the front end hides what lies outside of the visible part.
    stop = "querySelectorAll('button')].find((one) => one.textContent === 'Stop and keep').click()"
    page.tab.evaluate(f"() => [...{page.element}.{stop}")
    page.state("stopped")
    count, end = newest_video(page.server)
    assert count >= 21 and end == pytest.approx((count - 1) / 16, abs=0.01)


def test_a_second_tab_sees_its_own_runs_alone_and_closing_the_first_stops_nothing(browser, server, page):
    page.load(workflow(300))
    page.queue()
    page.frames(9)
    other = Page(browser.new_page(viewport={"width": 720, "height": 900}), server)
    try:
        other.open()
        other.load(workflow(301, seconds=1.0))
        other.queue()
        page.frames(21)
        assert other.player("dataset.frames") is None, "the other tab's run waits for its turn"
        page.button("Stop and keep").click()
        page.state("stopped")
        other.state("finished")
        assert int(other.player("dataset.frames")) == 21
        assert page.player("dataset.state") == "stopped"
    finally:
        other.tab.close()
    assert not other.errors


def test_everything_in_the_player_has_a_name_and_is_reached_by_keys(page):
    page.load(workflow(302, prompts="0s: a large red circle over a navy plain background"))
    page.queue()
    page.frames(9)
    for role in ("img", "slider", "textbox", "status"):
        assert page.root.get_by_role(role).count() == 1, role
    for role in ("button", "slider", "textbox", "img"):
        for place in range(page.root.get_by_role(role).count()):
            one = page.root.get_by_role(role).nth(place)
            assert one.get_attribute("aria-label") or one.inner_text().strip(), role
    page.root.focus()
    reached = []
    for _ in range(5):
        page.tab.keyboard.press("Tab")
        reached.append(
            page.tab.evaluate(
                "() => document.activeElement.ariaLabel || document.activeElement.textContent.trim()"
            )
        )
    assert reached == [
        "Pause", "Position in seconds", "Stop and keep", "New prompt, from the next chunk on", "Change prompt",
    ]  # fmt: skip
    page.button("Stop and keep").focus()
    page.tab.keyboard.press("Enter")
    page.state("stopped")


def test_a_typed_prompt_is_seen_in_the_pictures(page):
    page.load(workflow(303, prompts="0s: a large red circle bouncing over a navy plain background"))
    page.queue()
    page.frames(21)
    median = """() => {
        const canvas = document.querySelector('.sf-player canvas');
        const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
        const red = [];
        for (let i = 0; i < data.length; i += 4) red.push(data[i] - data[i + 2]);
        return red.sort((a, b) => a - b)[red.length >> 1];
    }"""
    assert page.tab.evaluate(median) < 0, "the navy background"
    box = page.root.get_by_role("textbox")
    box.fill("a large red circle bouncing over a maroon plain background")
    box.press("Enter")
    page.tab.wait_for_function(f"() => ({median})() > 30", timeout=PATIENCE)
    page.button("Stop and keep").click()
    page.state("stopped")
