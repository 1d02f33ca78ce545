"""Translations are complete, in step with the nodes' texts, and fit for the front end."""

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import pytest

LOCALES = Path(__file__).resolve().parents[2] / "locales"


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate_locales", LOCALES / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("language", ["en", "zh", "ja", "fr"])
def test_files_are_what_the_generator_writes(generate, language):
    written = (LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8")
    assert written == generate.render(language), "run python locales/generate.py"


def test_no_translation_is_left_behind(generate):
    english = json.loads(generate.render("en"))
    used = set()
    for node in english.values():
        used |= {node["display_name"], node["description"]}
        used |= {part["tooltip"] for group in ("inputs", "outputs") for part in node[group].values()}
    texts = json.loads((LOCALES / "texts.json").read_text(encoding="utf-8"))
    assert set(texts) == used
    for text, translations in texts.items():
        assert set(translations) == {"zh", "ja", "fr"} and text not in translations.values()
        for translated in (text, *translations.values()):
            assert translated.strip()
            assert not re.search(r"[{}|@$]", translated), (
                "the front end's translator would read these as syntax"
            )
            lost = numbers(text) - numbers(
                translated
            )  # some languages write "one" and "half" as numbers, too
            assert not lost, f"{translated!r} lacks {dict(lost)}"


def numbers(text: str) -> Counter[str]:
    """All numbers, decimal commas read as points."""
    return Counter(re.findall(r"\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d)", ".", text)))
