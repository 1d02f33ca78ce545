"""A tab of the real front end with the player in it, and what the tests ask of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import av

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "docs" / "images"  # written anew with PLAYER_PICTURES=1
WANTED = bool(os.environ.get("PLAYER_PICTURES"))
SIZE = (256, 256) if WANTED else (128, 96)  # the model's own size is slow on a CPU
PATIENCE = 300_000 if WANTED else 120_000  # milliseconds
VIEW = {"width": 720, "height": 1000}  # the host's tool bar, at the lower edge, hides nothing of a player
LONG = 600.0  # seconds of video: longer than any test waits

READY = "window.app?.graph && window.app.extensionManager"

REDNESS = """number => {  // the median of red less blue, of what a player shows
    const canvas = document.querySelectorAll('.sf-player canvas')[number];
    const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
    const red = [];
    for (let i = 0; i < data.length; i += 4) red.push(data[i] - data[i + 2]);
    return red.sort((a, b) => a - b)[red.length >> 1];
}"""
DIFFERENT = """async number => {  // how many different pictures a player has shown; three are enough
    const canvas = document.querySelectorAll('.sf-player canvas')[number];
    const seen = new Set();
    for (let i = 0; i < 600 && seen.size < 3; i++) {
        if (canvas.width > 1) seen.add(canvas.toDataURL());
        await new Promise((done) => setTimeout(done, 50));
    }
    return seen.size;
}"""


class Page:
    """A tab; `player` chooses among the players in it, in the order of their nodes."""

    def __init__(self, tab: Any, server: Any, player: int = 0):
        self.tab, self.server, self.number = tab, server, player
        self.errors: list[str] = []
        tab.on("pageerror", lambda error: self.errors.append(str(error)))

    @property
    def element(self) -> str:
        return f"document.querySelectorAll('.sf-player')[{self.number}]"

    @property
    def root(self) -> Any:
        return self.tab.locator(".sf-player").nth(self.number)

    def open(self) -> None:
        self.tab.goto(self.server.url)
        self.tab.wait_for_function(READY, timeout=PATIENCE)
        self.tab.wait_for_timeout(1000)

    def load(self, workflow: dict) -> None:
        self.tab.evaluate("workflow => app.loadGraphData(workflow)", workflow)
        self.tab.wait_for_selector(".sf-player", timeout=PATIENCE)

    def reload(self, workflow: dict) -> None:
        """The page anew, in the middle of a run; `workflow` where the front end has not kept it."""
        self.tab.evaluate(
            "() => app.extensionManager.workflow?.activeWorkflow?.changeTracker?.checkState?.()"
        )
        self.tab.reload()
        self.tab.wait_for_function(READY, timeout=PATIENCE)
        self.tab.wait_for_timeout(1000)
        if not self.root.count():
            self.load(workflow)

    def look(self, vue: bool, palette: str) -> None:
        """Another renderer and palette, without loading anew."""
        self.tab.evaluate(
            """async ([vue, palette]) => {
                await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue);
                await app.extensionManager.setting.set('Comfy.ColorPalette', palette);
            }""",
            [vue, palette],
        )
        self.tab.wait_for_timeout(500)

    def queue(self) -> None:
        self.tab.evaluate("() => app.queuePrompt(0, 1)")

    def saved(self) -> dict:
        return self.tab.evaluate("() => app.graph.serialize()")

    def prompt(self) -> dict:
        return self.tab.evaluate("async () => (await app.graphToPrompt()).output")

    def player(self, what: str) -> Any:
        return self.tab.evaluate(f"() => {self.element}.{what}")

    def wait(self, condition: str) -> None:
        self.tab.wait_for_function(
            f"() => {{ const p = {self.element}; return p && {condition}; }}", timeout=PATIENCE
        )

    def state(self, name: str) -> None:
        self.wait(f"p.dataset.state === '{name}'")

    def frames(self, count: int) -> None:
        self.wait(f"Number(p.dataset.frames) >= {count}")

    def distinct(self) -> int:
        return self.tab.evaluate(DIFFERENT, self.number)

    def redness(self) -> int:
        return self.tab.evaluate(REDNESS, self.number)

    def reddens(self) -> None:
        """Wait for a picture that is more red than blue."""
        self.tab.wait_for_function(f"number => ({REDNESS})(number) > 30", arg=self.number, timeout=PATIENCE)

    def button(self, name: str) -> Any:
        return self.root.get_by_role("button", name=name)

    def press(self, key: str) -> None:
        self.root.press(key)


def workflow(seed: int, seconds: float = LONG, prompts: str = "") -> dict:
    """The demo, small; with `prompts` a Prompt Timeline of them in place of its prompt."""
    graph = json.loads((ROOT / "workflows" / "world_model_demo.json").read_text(encoding="utf-8"))
    nodes = {node["type"]: node for node in graph["nodes"]}
    nodes["SparseForcingStreamVideo"]["widgets_values"][:4] = [*SIZE, seconds, seed]
    if prompts:
        nodes["CLIPTextEncode"]["type"] = "SparseForcingPromptTimeline"
        nodes["CLIPTextEncode"]["properties"] = {"Node name for S&R": "SparseForcingPromptTimeline"}
        nodes["CLIPTextEncode"]["widgets_values"] = [prompts]
    graph["extra"]["ds"] = {"scale": 1, "offset": [-720, 0]}
    return graph


def settings(server: Any, vue: bool = False, palette: str = "dark") -> None:
    chosen = {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": vue, "Comfy.ColorPalette": palette}
    server.post("/api/settings", chosen)


def newest_video(server: Any) -> tuple[int, float]:
    """(frames, seconds) of the newest file, decoded to its end."""
    path = max((server.base / "output" / "video").glob("*.mp4"), key=lambda path: path.stat().st_mtime_ns)
    with av.open(str(path)) as video:
        times = [frame.time for frame in video.decode(video=0)]
    return len(times), times[-1]


def picture(page: Page, name: str) -> None:
    """A small picture of the node for the documentation, where asked for."""
    if WANTED:
        page.root.screenshot(path=str(PICTURES / f"{name}.png"))
