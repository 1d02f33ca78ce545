"""Every template of the pack, opened from the template browser as a user opens it, and run."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import pytest
from pages import PATIENCE, ROOT
from PIL import Image, ImageStat
from serving import FOLDER, Server, prepare, serve
from wan_files import write_models

FILES = sorted((ROOT / "workflows").glob("*.json"))
GRAPHS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in FILES}
TYPES = {name: sorted(node["type"] for node in graph["nodes"]) for name, graph in GRAPHS.items()}
UMT5 = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"  # 5.7 billion weights: too many for a test
VIEW = {"width": 1400, "height": 900}
SMALL = {"width": 64, "height": 48, "length": 21}

OPEN_TEMPLATES = "() => app.extensionManager.command.execute('Comfy.BrowseTemplates')"
GRAPH = """() => app.graph.nodes.map((node) => ({
    type: node.type, known: node.type in LiteGraph.registered_node_types, failed: Boolean(node.has_errors) }))"""
MAKE_SMALL = """small => {
    let seconds = 0.5;  // a session is continued to more seconds than it has
    for (const node of app.graph.nodes) for (const widget of node.widgets ?? []) {
        if (widget.name in small) widget.value = small[widget.name];
        if (widget.name === 'seconds') widget.value = (seconds += 0.5);
    }
}"""
LISTEN = """async () => {
    const { api } = await import('/scripts/api.js');
    for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
        api.addEventListener(kind, () => (window.ended = kind));
}"""


@pytest.fixture(scope="module")
def server(host, tmp_path_factory) -> Iterator[Server]:
    """With the files that the templates name, so that the front end has nothing to complain of."""
    base = tmp_path_factory.mktemp("comfyui")
    prepare(base)
    write_models(base)
    (base / "models" / "text_encoders").mkdir()
    (base / "models" / "text_encoders" / UMT5).touch()
    with serve(host, base) as server:
        yield server


def open_template(page, name: str) -> bytes:
    """Open the template browser, the pack's part of it, and click a card; returns its thumbnail as PNG."""
    page.tab.evaluate(OPEN_TEMPLATES)
    dialog = page.tab.get_by_role("dialog")
    dialog.get_by_role("button", name=FOLDER).click()
    thumbnail = dialog.get_by_role("img", name=name, exact=True)
    thumbnail.scroll_into_view_if_needed(timeout=PATIENCE)
    page.tab.wait_for_function("image => image.complete", arg=thumbnail.element_handle(), timeout=PATIENCE)
    assert thumbnail.evaluate("image => image.naturalWidth") == 512
    shown = thumbnail.screenshot()
    dialog.get_by_role("heading", name=name, exact=True).click()
    dialog.wait_for(state="detached", timeout=PATIENCE)
    return shown


@pytest.mark.parametrize(
    ("page", "name"),
    [
        ((place % 2 == 1, "dark"), name) for place, name in enumerate(GRAPHS)
    ],  # canvas and Vue renderer in turn
    indirect=["page"],
    ids=list(GRAPHS),
)
def test_template_opens_from_the_browser_and_runs(page, name):
    page.tab.set_viewport_size(VIEW)
    answers: dict[str, int] = {}
    page.tab.on("response", lambda answer: answers.update({answer.url.rpartition("/")[2]: answer.status}))
    shown = Image.open(io.BytesIO(open_template(page, name))).convert("L")
    assert answers[f"{name}.jpg"] == answers[f"{name}.json"] == 200
    assert ImageStat.Stat(shown).stddev[0] > 8, "a blank thumbnail"
    page.tab.wait_for_function(
        "count => app.graph.nodes.length === count", arg=len(TYPES[name]), timeout=PATIENCE
    )
    no_complaint(page, name)
    if "CLIPLoader" in TYPES[name]:  # the text encoder does not come with the pack
        return
    page.tab.evaluate(MAKE_SMALL, SMALL)
    page.tab.evaluate(LISTEN)
    page.tab.get_by_role("button", name="Run", exact=True).first.click()  # the second is its menu
    page.tab.wait_for_function("() => window.ended", timeout=PATIENCE)
    assert page.tab.evaluate("() => window.ended") == "execution_success"
    no_complaint(page, name)


def no_complaint(page, name: str) -> None:
    """All of the template's nodes are there, and the front end shows no dialog and no error."""
    nodes = page.tab.evaluate(GRAPH)
    assert sorted(node["type"] for node in nodes) == TYPES[name]
    assert all(node["known"] and not node["failed"] for node in nodes), nodes
    page.tab.wait_for_timeout(500)  # an error box would come late
    assert page.tab.get_by_role("dialog").count() == 0
    assert page.tab.get_by_role("button", name="View details").count() == 0, "the box of errors"
