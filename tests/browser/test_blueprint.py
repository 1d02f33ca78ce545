"""The pack's subgraph blueprints in the real front end: listed, put into a graph, saved unchanged, run."""

from __future__ import annotations

import json

import pytest
from pages import LONG, PATIENCE, PICTURES, ROOT, SIZE, WANTED, newest_video

FILES = sorted((ROOT / "subgraphs").glob("*.json"))
PROMPT = "a large red circle bouncing over a maroon plain background"
CONNECT_WORLD_MODEL = """() => {  // to the sockets of the graph's one node
    const [node] = app.graph.nodes;
    const world = LiteGraph.createNode('SparseForcingWorldModel');
    world.pos = [node.pos[0] - 320, node.pos[1]];
    app.graph.add(world);
    node.inputs.forEach((input, i) => {
        const slot = world.outputs.findIndex((output) => output.type === input.type);
        if (slot >= 0) world.connect(slot, node, i);
    });
}"""


def put_into_the_graph(page, name: str) -> None:
    """As a user does: the search box, the name's beginning, Enter, and a click where it shall be."""
    for command in ("Comfy.NewBlankWorkflow", "Workspace.SearchBox.Toggle"):
        page.tab.evaluate("command => app.extensionManager.command.execute(command)", command)
        page.tab.wait_for_timeout(500)
    box = page.tab.get_by_role("combobox", name="Add a node")
    box.fill(name[:24])  # the search finds nothing for more than 32 letters
    page.tab.get_by_role("option", name=name).first.wait_for(timeout=PATIENCE)
    page.tab.keyboard.press("Enter")
    page.tab.wait_for_function("() => app.graph.nodes[0]?.flags.ghost", timeout=PATIENCE)
    page.tab.wait_for_timeout(1000)
    page.tab.mouse.click(300, 200)
    page.tab.wait_for_function("() => !app.graph.nodes[0].flags.ghost", timeout=PATIENCE)


def test_the_host_lists_them(server):
    listed = server.get("/global_subgraphs")
    ours = {key: one for key, one in listed.items() if one["source"] == "custom_node"}
    assert sorted(one["name"] for one in ours.values()) == [path.stem for path in FILES]
    for key, one in ours.items():
        path = ROOT / "subgraphs" / f"{one['name']}.json"
        assert server.get(f"/global_subgraphs/{key}")["data"] == path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("page", "path"),
    [((True, "dark"), path) for path in FILES],
    indirect=["page"],
    ids=[path.stem.replace(" ", "_") for path in FILES],
)
def test_it_is_put_into_a_graph_and_runs(page, path):
    put_into_the_graph(page, path.stem)
    blueprint = json.loads(path.read_text(encoding="utf-8"))
    (host,) = page.saved()["nodes"]
    (given,) = blueprint["nodes"]
    assert page.tab.evaluate("() => app.graph.nodes[0].title") == path.stem
    assert [slot["name"] for slot in host["inputs"]] == [slot["name"] for slot in given["inputs"]]
    if any("widget" not in slot for slot in given["inputs"]):
        page.tab.evaluate(CONNECT_WORLD_MODEL)
    values = {"width": SIZE[0], "height": SIZE[1], "seconds": LONG, "seed": 400 + FILES.index(path)}
    values |= {"text": PROMPT, "mode": "window"}
    page.tab.evaluate(
        """values => app.graph.nodes.at(0).widgets.forEach((widget) => {
            if (widget.name in values) widget.value = values[widget.name];
        })""",
        values,
    )
    prompt = page.prompt()
    used = {key: value for node in prompt.values() for key, value in node["inputs"].items() if key in values}
    assert used == values
    page.tab.evaluate("workflow => app.loadGraphData(workflow)", page.saved())
    page.tab.wait_for_timeout(500)
    assert page.prompt() == prompt
    page.queue()
    page.tab.get_by_role("button", name="Enter subgraph").click()
    page.frames(9)
    if path.stem.startswith("Prompt Timeline"):  # its text is the subgraph's, so it has no rows
        assert "comes from another node" in page.tab.locator(".sf-rows").text_content()
    assert page.distinct() == 3 and page.player("dataset.state") == "running"
    assert page.redness() > 30, "the maroon background"
    if WANTED and path.stem.startswith("Text"):
        nodes = {"x": 60, "y": 240, "width": 660, "height": 420}
        page.tab.screenshot(path=str(PICTURES / "blueprint.png"), clip=nodes)
    page.button("Stop and keep").click()
    page.state("stopped")
    count, end = newest_video(page.server)
    assert count >= 21 and end == pytest.approx((count - 1) / 16, abs=0.01)
