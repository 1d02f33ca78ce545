"""Write locales/LANGUAGE/nodeDefs.json, which ComfyUI serves to its front end, from the nodes' own texts.

    python locales/generate.py

English is what the schemas in nodes/ say. texts.json holds its translations by the English text, so a text that changes
there has no translation any more, which this reports and a test notices. Names of inputs stay as they are in every
language: messages, documents and other texts speak of them.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).parent
LANGUAGES = ("en", "zh", "ja", "fr")


def schemas(folder: Path) -> Iterator[tuple[str, dict, list, list]]:
    """(node id, texts of the schema, its inputs, its outputs) of every node, read from the sources without a host.

    An input is (id, tooltip), an output (name, tooltip).
    """
    for path in sorted(folder.glob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "io.Schema":
                texts = _literals(call)
                parts = {k.arg: getattr(k.value, "elts", []) for k in call.keywords}
                inputs = [(ast.literal_eval(i.args[0]), _literals(i)["tooltip"]) for i in parts["inputs"]]
                outputs = [(o["display_name"], o["tooltip"]) for o in map(_literals, parts["outputs"])]
                yield texts["node_id"], texts, inputs, outputs


def definitions(folder: Path, say: Callable[[str], str]) -> dict:
    """The content of nodeDefs.json; `say` gives a text in the language."""
    return {
        node: {
            "display_name": say(texts["display_name"]),
            "description": say(texts["description"]),
            "inputs": {name: {"name": name, "tooltip": say(tooltip)} for name, tooltip in inputs},
            "outputs": {
                str(slot): {"name": name, "tooltip": say(tip)} for slot, (name, tip) in enumerate(outputs)
            },
        }
        for node, texts, inputs, outputs in schemas(folder)
    }


def render(language: str) -> str:
    """nodeDefs.json of a language; KeyError with the English text that has no translation."""
    texts = json.loads((HERE / "texts.json").read_text(encoding="utf-8"))
    content = definitions(
        HERE.parent / "nodes", lambda text: text if language == "en" else texts[text][language]
    )
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _literals(call: ast.Call) -> dict[str, str]:
    """The keyword arguments that are plain text."""
    found = {}
    for keyword in call.keywords:
        if isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, str) and keyword.arg:
            found[keyword.arg] = keyword.value.value
    return found


def main() -> None:
    for language in LANGUAGES:
        try:
            content = render(language)
        except KeyError as missing:
            sys.exit(f"No {language} text for {missing}: add it to locales/texts.json.")
        (HERE / language).mkdir(exist_ok=True)
        (HERE / language / "nodeDefs.json").write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
