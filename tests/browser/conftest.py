"""A real ComfyUI, as in tests/comfy, and a headless Chromium: CHROMIUM (default: the one on the PATH).

Skipped, with the reason, where ComfyUI, the browser or Playwright is missing.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMFY = ROOT / "tests" / "comfy"
sys.path.insert(0, str(Path(__file__).parent))  # this folder's helper module, pages.py
WORLD_DIT = ROOT / "sparse_attn" / "world" / "weights" / "world_dit.safetensors"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def _load(name: str):
    spec = importlib.util.spec_from_file_location(f"browser_uses_{name}", COMFY / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


host = _load("conftest").host  # puts serving.py on the path, too
server = _load("test_server").server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.browser)
            if not WORLD_DIT.is_file():
                item.add_marker(pytest.mark.skip(reason="this checkout lacks the world model's weights"))


@pytest.fixture(scope="session")
def browser() -> Iterator:
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        pytest.skip("no playwright: pip install playwright")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium: install it, or set CHROMIUM to its path")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(request, browser, server):
    """A tab with the front end in it; a test may ask for (Vue renderer, palette) by an indirect parameter."""
    from pages import VIEW, Page, settings

    settings(server, *getattr(request, "param", ()))
    tab = browser.new_page(viewport=VIEW)
    page = Page(tab, server)
    page.open()
    yield page
    server.post("/interrupt", {})
    tab.close()
    assert not page.errors
