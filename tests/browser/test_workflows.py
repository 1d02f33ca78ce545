"""Every workflow of the pack in the real front end: loaded, saved unchanged, run; two tabs; keys and names."""

from __future__ import annotations

import json
import re

import pytest
from pages import LONG, PATIENCE, ROOT, SIZE, VIEW, Page, newest_video, workflow
from PIL import Image

FILES = sorted((ROOT / "workflows").glob("*.json"))
GRAPHS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in FILES}
STREAM, WORLD, ENCODE = "SparseForcingStreamVideo", "SparseForcingWorldModel", "CLIPTextEncode"
LOOKS = [(False, "dark"), (True, "dark"), (False, "light"), (True, "light")]  # Vue renderer, palette
LIGHTNESS = """players => players.map((player) =>
    Number(getComputedStyle(player).backgroundColor.match(/[\\d.]+/)[0]))"""
NAVY = "a large red circle bouncing over a navy plain background"
MAROON = NAVY.replace("navy", "maroon")
FROM_DISK = {"UNETLoader", "CLIPLoader", "VAELoader"}  # what they load does not come with the pack


def kinds(graph: dict) -> list[str]:
    return [node["type"] for node in graph["nodes"]]


STREAMS = [name for name, graph in GRAPHS.items() if STREAM in kinds(graph)]


def copy(name: str) -> dict:
    return json.loads(json.dumps(GRAPHS[name]))


def on_the_world_model(graph: dict) -> None:
    """What comes from disk comes from the world model, and no LoRA is used."""
    for node in graph["nodes"]:
        if node["type"] in FROM_DISK:
            (output,) = node["outputs"]
            slot = ("MODEL", "CLIP", "VAE").index(output["type"])
            names = enumerate(("MODEL", "CLIP", "VAE"))
            node["outputs"] = [
                {"name": n, "type": n, "links": output["links"] if i == slot else None} for i, n in names
            ]
            node |= {"type": WORLD, "inputs": [], "properties": {"Node name for S&R": WORLD}}
            del node["widgets_values"]
            for link in graph["links"]:
                link[2] = slot if link[1] == node["id"] else link[2]
        elif node["type"] == "LoraLoaderModelOnly":
            node["mode"] = 4  # bypassed


def small(name: str, seed: int) -> tuple[dict, int]:
    """A workflow on the world model whose last Stream Video runs for long, and the number of these nodes."""
    graph = copy(name)
    on_the_world_model(graph)
    streams = [node for node in graph["nodes"] if node["type"] == STREAM]
    for node in streams:
        seconds = LONG if node is streams[-1] else 1.0
        node["widgets_values"][:4] = [*SIZE, seconds, seed]
        node["widgets_values"][7] = 3  # frames a chunk, as the world model wants them
    for node in graph["nodes"]:
        if node["type"] == ENCODE:
            node["widgets_values"] = [NAVY]
    x, y = streams[-1]["pos"]
    graph["extra"]["ds"] = {"scale": 0.9, "offset": [80 - x, 60 - y]}  # its player in the window
    return graph, len(streams)


@pytest.mark.parametrize("name", list(GRAPHS))
def test_a_workflow_is_loaded_and_saved_unchanged_and_drawn_in_every_look(page, name):
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
    page.tab.evaluate("() => Object.assign(app.canvas.ds, { scale: 0.3, offset: [250, 250] })")  # all of it
    for vue, palette in LOOKS:
        page.look(vue, palette)
        drawn = page.tab.locator("[data-node-id]").count()
        assert drawn == (len(given["nodes"]) if vue else 0)
        players = page.tab.locator(".sf-player").evaluate_all(LIGHTNESS)
        assert [light > 128 for light in players] == [palette == "light"] * kinds(given).count(STREAM)
        assert page.prompt() == prompt


@pytest.mark.parametrize(
    ("page", "name"),
    [(LOOKS[place % len(LOOKS)], name) for place, name in enumerate(STREAMS)],
    indirect=["page"],
    ids=STREAMS,
)
def test_a_workflow_streams_obeys_a_typed_prompt_and_stops_with_a_playable_file(page, name):
    inputs = page.server.base / "input"
    inputs.mkdir(exist_ok=True)
    Image.new("RGB", SIZE, (0, 0, 128)).save(inputs / "example.png")
    graph, streams = small(name, 200 + STREAMS.index(name))
    page.load(graph)
    page.number = streams - 1
    page.queue()
    page.frames(9)
    assert page.distinct() == 3 and page.player("dataset.state") == "running"
    assert page.redness() < 0, "the navy background"
    box = page.root.get_by_role("textbox")
    box.fill(MAROON)
    box.press("Enter")
    page.reddens()
    page.reload(graph)
    page.frames(3)
    assert page.player("dataset.state") == "running"
    page.button("Stop and keep").click()
    page.state("stopped")
    count, end = newest_video(page.server)
    assert count >= 21 and end == pytest.approx((count - 1) / 16, abs=0.01)


@pytest.mark.parametrize("name", sorted(set(GRAPHS) - set(STREAMS)))
def test_a_workflow_of_other_nodes_runs_to_its_end(page, name):
    graph = copy(name)
    sizes = {
        "EmptyARVideoLatent": [64, 48, 21, 1],
        "SparseForcingEstimate": [64, 48],
        "SparseForcingBenchmark": [64, 48, 7],
    }
    for node in graph["nodes"]:
        few = sizes.get(node["type"], [])
        node.get("widgets_values", [])[: len(few)] = few
    page.tab.evaluate("workflow => app.loadGraphData(workflow)", graph)
    page.tab.evaluate(
        """async () => {
            const { api } = await import('/scripts/api.js');
            window.shown = new Set();
            for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
                api.addEventListener(kind, () => (window.ended = kind));
            api.addEventListener('b_preview', async ({ detail }) => {
                if (!window.ended) window.shown.add(String(new Uint8Array(await detail.arrayBuffer())));
            });
        }"""
    )
    page.queue()
    page.tab.wait_for_function("() => window.ended", timeout=PATIENCE)
    assert page.tab.evaluate("() => window.ended") == "execution_success"
    if "SparseForcingSampler" in kinds(graph):
        assert page.tab.evaluate("() => window.shown.size") >= 3, "previews during the run"
        count, _ = newest_video(page.server)
        assert count == 21


def test_a_second_tab_sees_its_own_runs_alone_and_closing_the_first_stops_nothing(browser, server, page):
    page.load(workflow(300))
    page.queue()
    page.frames(9)
    other = Page(browser.new_page(viewport=VIEW), server)
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
    """As the browser's accessibility tree has it, which is what a screen reader reads."""
    page.load(workflow(302, prompts=f"0s: {NAVY}\n300s: {MAROON}"))
    page.queue()
    page.frames(9)
    tree = page.root.aria_snapshot()
    for part in (
        'img "Preview of the video"',
        'button "Pause"',
        'slider "Position in seconds"',
        'button "Stop and keep"',
        'list "Prompts over time"',
        f"'listitem \"0 s: {NAVY}\"'",
        f"'listitem \"300 s: {MAROON}\"'",
        'textbox "New prompt, from the next chunk on"',
        'button "Change prompt"',
        "status",
    ):
        assert tree.count(f"- {part}") == 1, f"{part} in\n{tree}"
    assert not re.findall(r"- (?:button|slider|textbox|img|list)\b(?! \")", tree), f"without a name:\n{tree}"
    for box in page.tab.get_by_role("textbox").all():  # the Prompt Timeline's text, too
        assert box.get_attribute("aria-label") or box.get_attribute("placeholder"), box.evaluate(
            "box => box.outerHTML"
        )
    page.root.focus()
    reached = []
    while not reached or (reached[-1] and len(reached) < 12):
        page.tab.keyboard.press("Tab")
        reached.append(
            page.tab.evaluate(
                f"""() => {page.element}.contains(document.activeElement)
                    && (document.activeElement.ariaLabel || document.activeElement.textContent.trim())"""
            )
        )
    wanted = [
        "Pause",
        "Position in seconds",
        "Stop and keep",
        "New prompt, from the next chunk on",
        "Change prompt",
    ]
    assert [name for name in reached if name in wanted] == wanted, reached
    page.button("Stop and keep").focus()
    page.tab.keyboard.press("Enter")
    page.state("stopped")
