"""Prompt Timeline's rows on the real front end: what they show is the node's text, and what they change is, too."""

from __future__ import annotations

import pytest
from pages import PICTURES, WANTED, workflow
from sparse_forcing_pack.sparse_attn.timeline import TimelineError, parse_timeline

TEXTS = [
    "a red circle",
    "0s: a red circle / 3s: a blue star",
    "0s: a red circle\n\n  2.5s :a blue   star\n1m30s: dusk",
    "0s: a red circle\nover navy\n3s: x",
    "0s: red/blue, 2 cats: one / two",
    "0s: a\r\n3s: b\r\n",
    "0s: 3s: a",
    "0s: a/61.25s: b",
    "",
    "2s: a",
    "0s: a\n  3: b",
    "0s: a / 4s: b / 4s: c",
    "0s: a\n5s: b\n3s: c",
    "0s: a\n1:30: b",
]
READ = """async texts => {
    const path = (await (await fetch('/extensions')).json()).find((name) => name.endsWith('js/timeline_rows.js'));
    const { readTimeline, writeTimeline } = await import(path);
    return texts.map(readTimeline).map((read) => read && [read, readTimeline(writeTimeline(read))]);
}"""
FIRST, SECOND = "a large red circle over a navy plain background", "a small blue star orbiting"


def read_by_the_node(text: str) -> list[dict] | None:
    try:
        return [{"start": prompt.start, "text": prompt.text} for prompt in parse_timeline(text)]
    except TimelineError:
        return None


def test_rows_read_a_text_as_the_node_does_and_write_it_back(page):
    for text, found in zip(TEXTS, page.tab.evaluate(READ, TEXTS)):
        want = read_by_the_node(text)
        assert found == (want and [want, want]), text


@pytest.mark.parametrize("page", [(False, "dark"), (True, "light")], indirect=True, ids=["canvas", "vue"])
def test_rows_and_text_are_one(page):
    page.load(workflow(500, prompts=f"0s: {FIRST}\n90s: {SECOND}"))
    page.tab.evaluate("() => Object.assign(app.canvas.ds, { scale: 1, offset: [-300, 160] })")
    page.tab.wait_for_timeout(500)
    rows = page.tab.get_by_role("group", name="Prompts as rows")

    def text() -> str:
        return page.prompt()["2"]["inputs"]["text"]

    def box(name: str):
        return rows.get_by_label(name, exact=True)

    assert [box(f"Prompt {i}").input_value() for i in (1, 2)] == [FIRST, SECOND]
    assert box("Second of prompt 1").is_disabled() and box("Second of prompt 2").input_value() == "90"
    rows.get_by_role("button", name="Add a prompt").press("Enter")
    page.tab.keyboard.type("dusk ")
    assert text() == f"0s: {FIRST}\n1m30s: {SECOND}\n1m33s: dusk "
    box("Second of prompt 3").fill("2.5")
    box("Second of prompt 3").press("Enter")
    assert text() == f"0s: {FIRST}\n2.5s: dusk\n1m30s: {SECOND}"
    if WANTED:
        node = {"x": 50, "y": 160, "width": 400, "height": 290}
        page.tab.screenshot(path=str(PICTURES / "player_rows.png"), clip=node)
    for refused in ("90", "-1", ""):
        box("Second of prompt 2").fill(refused)
        box("Second of prompt 2").press("Enter")
        assert box("Second of prompt 2").input_value() == "2.5"
    saved = page.saved()
    assert next(node for node in saved["nodes"] if node["id"] == 2)["widgets_values"] == [text()]
    box("Remove prompt 1").click()
    assert text() == f"0s: dusk\n1m30s: {SECOND}" and rows.get_by_role("listitem").count() == 2
    page.load(saved)
    assert page.saved()["nodes"] == saved["nodes"]
    page.tab.wait_for_timeout(500)
    assert [box(f"Prompt {i}").input_value() for i in (1, 2, 3)] == [FIRST, "dusk", SECOND]
    (whole,) = [area for area in page.tab.locator("textarea").all() if area.input_value() == text()]
    whole.fill("0s: dawn / 3: noon")
    assert "cannot be read" in rows.get_by_role("status").inner_text()
    assert rows.get_by_role("listitem").count() == 0
    whole.fill("0s: dawn / 3s: noon")
    assert [box(f"Prompt {i}").input_value() for i in (1, 2)] == ["dawn", "noon"]
    assert rows.get_by_role("status").is_hidden()
