"""The player on the real front end: frames during the run, stop and keep, a typed prompt, reload, save and load."""

from __future__ import annotations

import json

import pytest
from pages import PATIENCE, VIEW, Page, newest_video, picture, settings, workflow


def test_frames_play_during_the_run_and_stop_keeps_a_playable_file(page):
    page.load(workflow(1))
    page.tab.evaluate(
        """() => { window.seen = new Set(); setInterval(() => {
            const canvas = document.querySelector('.sf-player canvas');
            if (canvas.width > 1) window.seen.add(canvas.toDataURL());
        }, 30); }"""
    )
    page.queue()
    page.frames(21)
    page.tab.wait_for_function("() => window.seen.size >= 4", timeout=PATIENCE)
    assert page.player("dataset.state") == "running"
    numbers = page.player("querySelector('.sf-numbers').textContent")
    for part in ("chunk ", " FPS", " s a chunk", "cache ", " left"):
        assert part in numbers
    picture(page, "player_dark")
    page.button("Stop and keep").click()
    page.state("stopped")
    count, end = newest_video(page.server)
    assert count >= 21 and count % 12 == 9 and end == pytest.approx((count - 1) / 16, abs=0.01)
    assert page.button("Stop and keep").is_disabled()
    assert "complete" in page.player("querySelector('.sf-note').textContent")
    queue = page.server.get("/queue")
    assert not queue["queue_running"] or not queue["queue_pending"]


COLOURS = """() => {  // of 3 x 3 points of the picture
    const canvas = document.querySelector('.sf-player canvas');
    const at = (i, size) => Math.floor((i + 0.5) / 3 * size);
    const fields = [0, 1, 2].flatMap((y) => [0, 1, 2].map((x) => [at(x, canvas.width), at(y, canvas.height)]));
    return fields.map((field) => [...canvas.getContext('2d').getImageData(...field, 1, 1).data].slice(0, 3));
}"""


def test_the_memory_is_shown_over_the_video(page):
    page.load(workflow(6, seconds=3.3))
    button, strip = page.button("Memory"), page.root.get_by_role("list", name="Moments in memory")
    assert button.get_attribute("aria-pressed") == "false" and strip.count() == 0
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    legend = page.root.get_by_role("group", name="Legend of the memory")
    assert "Only runs in mode sparse" in legend.inner_text()
    page.queue()
    page.frames(33)
    items = strip.get_by_role("listitem")
    assert items.count() >= 2, "live, while the run goes on"
    assert page.player("dataset.state") == "running"
    page.state("finished")
    page.button("Play").wait_for(timeout=PATIENCE)
    parts = [items.nth(i).get_attribute("data-part") for i in range(items.count())]
    assert parts[0] == "sink" and parts[-1] == "window" and "persistent" in parts[1:-1]
    assert all(
        word in legend.inner_text() for word in ("sink", "persistent, brightest: ", "window", "forgotten")
    )
    assert "This moment: newer than the memory" in legend.inner_text()
    items.nth(parts.index("persistent")).click()
    page.tab.wait_for_function(
        f"() => {page.element}.innerText.includes('This moment: persistent, kept by up to')"
    )
    picture(page, "memory_live")
    items.last.click()
    page.wait("Number(p.dataset.shown) >= 33 && Number(p.dataset.shown) < 45")
    assert "This moment: window, kept by all" in legend.inner_text()
    page.press("Home")
    page.wait("p.dataset.shown === '0'")
    assert "This moment: sink, kept by all" in legend.inner_text()
    tinted = page.tab.evaluate(COLOURS)
    button.focus()
    page.tab.keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "false" and strip.count() == 0 and legend.count() == 0
    page.tab.wait_for_function(f"before => JSON.stringify(({COLOURS})()) !== before", arg=json.dumps(tinted))
    plain = page.tab.evaluate(COLOURS)
    for before, after in zip(plain, tinted):
        want = [0.65 * channel + 0.35 * orange for channel, orange in zip(before, (230, 159, 0))]
        assert after == pytest.approx(want, abs=3)


def test_keys_and_scrub_bar_move_through_what_exists(page):
    page.load(workflow(2, seconds=1.7))
    page.queue()
    page.state("finished")
    page.button("Play").wait_for(timeout=PATIENCE)  # it has come to its end
    page.press("Home")
    page.wait("p.dataset.shown === '0'")
    page.press("End")
    page.wait("p.dataset.shown === '32'")
    page.press("ArrowLeft")
    page.wait("p.dataset.shown === '17'")
    page.press("Home")
    page.press(" ")
    page.button("Pause").wait_for(timeout=PATIENCE)
    page.wait("Number(p.dataset.shown) >= 5")
    page.press(" ")
    page.button("Play").wait_for(timeout=PATIENCE)
    bar = page.tab.locator(".sf-player").get_by_role("slider", name="Position in seconds")
    bar.fill("1")
    page.wait("p.dataset.shown === '16'")
    assert page.prompt().keys() == {"1", "2", "3", "4"}  # space and arrows did nothing to the graph


def test_the_settings_say_how_a_player_begins(page):
    def choose(autoplay: bool, memory: bool) -> None:
        page.tab.evaluate(
            """async (chosen) => { for (const [name, value] of Object.entries(chosen))
                await app.extensionManager.setting.set(`SparseForcing.Player.${name}`, value); }""",
            {"Autoplay": autoplay, "Memory": memory},
        )

    choose(autoplay=False, memory=True)
    try:
        page.load(workflow(7, seconds=1.0))
        assert page.button("Memory").get_attribute("aria-pressed") == "true"
        page.queue()
        page.state("finished")
        page.wait("p.dataset.shown === '0'")
        assert page.root.get_by_role("list", name="Moments in memory").get_by_role("listitem").count() >= 1
        page.button("Play").click()
        page.wait("Number(p.dataset.shown) >= 5")
    finally:
        choose(autoplay=True, memory=False)


def test_prompts_over_time_and_a_typed_one(page):
    page.load(
        workflow(3, prompts="0s: a large red circle over a navy plain background\n300s: a small blue star")
    )
    page.queue()
    page.frames(9)
    bar = page.tab.get_by_role("list", name="Prompts over time").get_by_role("listitem")
    assert [bar.nth(i).get_attribute("aria-current") for i in range(bar.count())] == ["true", "false"]
    box = page.tab.get_by_role("textbox", name="New prompt, from the next chunk on")
    box.fill("a large yellow square over a white plain background")
    box.press("Enter")
    page.wait("p.querySelector('.sf-note').textContent.startsWith('From the next chunk on')")
    before = int(page.player("dataset.frames"))
    page.frames(before + 24)
    picture(page, "player_prompt")
    assert [bar.nth(i).get_attribute("aria-current") for i in range(bar.count())] == ["false", "false"]
    page.button("Stop and keep").click()
    page.state("stopped")


def test_a_page_that_is_reloaded_in_the_middle_goes_on(page):
    graph = workflow(4)
    page.load(graph)
    page.queue()
    page.frames(9)
    page.reload(graph)
    page.frames(12)
    assert page.player("dataset.state") == "running"
    page.button("Stop and keep").click()
    page.state("stopped")


def test_the_workflow_is_saved_and_loaded_unchanged(page):
    given = workflow(5)
    page.load(given)
    first, prompt = page.saved(), page.prompt()
    stream = next(node for node in first["nodes"] if node["id"] == 4)
    values = next(node for node in given["nodes"] if node["id"] == 4)["widgets_values"]
    assert stream["widgets_values"] == [*values, "re-cache", 0][: len(stream["widgets_values"])]
    assert (
        set(prompt["4"]["inputs"]) >= {"width", "on_prompt_change"} and "player" not in prompt["4"]["inputs"]
    )
    page.load(first)
    assert page.saved()["nodes"] == first["nodes"] and page.prompt() == prompt


@pytest.mark.parametrize(("vue", "palette"), [(False, "light"), (True, "dark"), (True, "light")])
def test_renderers_and_themes(browser, server, vue, palette):
    settings(server, vue, palette)
    page = Page(browser.new_page(viewport=VIEW), server)
    try:
        page.open()
        page.load(workflow(60 + 2 * vue + (palette == "light"), seconds=1.0))  # else the host has it cached
        page.queue()
        page.state("finished")
        page.tab.wait_for_timeout(500)
        picture(page, f"player_{'vue_' if vue else ''}{palette}")
        box = page.tab.locator(".sf-player canvas").bounding_box()
        assert box["width"] > 150 and box["height"] > 80
        light = page.tab.evaluate(
            f"() => getComputedStyle({page.element}).backgroundColor.match(/[\\d.]+/g).map(Number)[0]"
        )
        assert (light > 128) == (palette == "light")
        page.button("Memory").press("Enter")
        legend, root = page.root.locator(".sf-legend").bounding_box(), page.root.bounding_box()
        assert legend["height"] > 20 and legend["y"] + legend["height"] < root["y"] + root["height"]
        assert page.root.get_by_role("listitem").count() >= 1
        assert page.root.locator("canvas").bounding_box()["height"] > 80
    finally:
        page.tab.close()
        settings(server)
    assert not page.errors


def test_an_hour_of_frames_stays_bounded_and_thins_out_evenly(page):
    numbers = page.tab.evaluate(
        """async () => {
            const path = (await (await fetch('/extensions')).json()).find((name) => name.endsWith('js/player.js'));
            const { FrameStore } = await import(path);
            const store = new FrameStore();
            for (let i = 0; i < 57600; i++) store.add(i, null);
            return { kept: store.frames.map((f) => f.number), at: store.at(57000).number, early: store.at(-1).number };
        }"""
    )
    kept = numbers["kept"]
    assert len(kept) <= 1200 and kept[0] == 0 and kept[-300:] == list(range(57300, 57600))
    gaps = [b - a for a, b in zip(kept, kept[1:])]
    assert set(gaps[:850]) == {64}  # 4 seconds, over nearly the whole hour
    assert numbers["at"] == 890 * 64 and numbers["early"] == 0
