"""Runs inside ComfyUI's Python, in a process of its own: the nodes against the host's own code.

    python run_checks.py COMFYUI PACK_ROOT  ->  one JSON line {check: "ok" or what went wrong, "new_libraries": [...]}

Every function `check_*` of the files `checks_*.py` is one check; `test_host.py` starts this once and reports each.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
import tempfile
import time
import traceback
import unittest.mock
from pathlib import Path

PACK = "sparse-forcing"  # any name, as ComfyUI gives it the folder's
GROUPS = ("sampling", "contract", "video", "live", "session", "loaders")


def start_host(comfyui: str, folder: str) -> None:
    """Make ComfyUI importable, on the CPU, with its outputs in `folder`."""
    sys.path.insert(0, comfyui)
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import folder_paths

    folder_paths.set_output_directory(folder)
    folder_paths.set_temp_directory(folder)


def load_pack(root: str) -> None:
    spec = importlib.util.spec_from_file_location(
        PACK, Path(root, "__init__.py"), submodule_search_locations=[root]
    )
    sys.modules[PACK] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[PACK])


def new_libraries(root: str) -> list[str]:
    """Modules that loading the pack brings into a host that has loaded its own nodes; our own are not counted."""
    import comfy_extras.nodes_video  # noqa: F401
    import server  # noqa: F401

    before = set(sys.modules)
    load_pack(root)
    extension = asyncio.run(sys.modules[PACK].comfy_entrypoint())
    live = importlib.import_module(f"{PACK}.nodes.live")
    with unittest.mock.patch.object(live, "add_routes"):  # no server runs here
        asyncio.run(extension.get_node_list())
    return sorted(name for name in set(sys.modules) - before if name.partition(".")[0] != PACK)


def run(group: str) -> dict[str, str]:
    results = {}
    for name, check in vars(importlib.import_module(f"checks_{group}")).items():
        if name.startswith("check_"):
            began = time.perf_counter()
            try:
                check()
                results[name] = "ok"
            except Exception:
                results[name] = traceback.format_exc()
            sys.stderr.write(f"{time.perf_counter() - began:6.1f} s  {name}\n")
    return results


def main() -> None:
    comfyui, root = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        start_host(comfyui, folder)
        results = {"new_libraries": new_libraries(root)}
        results |= {name: said for group in GROUPS for name, said in run(group).items()}
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
