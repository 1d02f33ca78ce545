"""Runs inside ComfyUI's Python, in a process of its own: the nodes against the host's own code.

    python run_checks.py COMFYUI PACK_ROOT [GROUP, CHECK or --option ...]
        -> one JSON line {check: "ok", LACKS + why it cannot be run here, or what went wrong, "new_libraries": [...]}

Every function `check_*` of the files `checks_*.py` is one check; `test_host.py` starts this once a host and reports
each. GROUP is a file's name without `checks_`, CHECK a function's without `check_`; none means all.
--option is one of ComfyUI's own, or --gpu: on the GPU instead of the CPU; or --dynamic-vram: the same with the host's
dynamic handling of its memory switched on, as its main.py does.
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
LACKS = "this ComfyUI lacks "
GPU_OPTIONS = ("--gpu", "--dynamic-vram")
GROUPS = sorted(path.stem.removeprefix("checks_") for path in Path(__file__).parent.glob("checks_*.py"))


def start_host(comfyui: str, folder: str, options: list[str]) -> None:
    """Make ComfyUI importable, on the CPU unless `options` want the GPU, with its outputs in `folder`."""
    sys.path.insert(0, comfyui)
    gpu = [word for word in options if word in GPU_OPTIONS]
    sys.argv = ["main.py", *([] if gpu else ["--cpu"]), *(word for word in options if word not in gpu)]
    import comfy.options

    comfy.options.enable_args_parsing()
    if "--dynamic-vram" in gpu:
        import comfy_aimdo.control

        comfy_aimdo.control.init()
    import folder_paths
    import utils.extra_config  # noqa: F401 - as main.py does, before comfy/ and its utils.py stand on sys.path

    folder_paths.set_output_directory(folder)
    folder_paths.set_temp_directory(folder)
    if "--dynamic-vram" in gpu:
        switch_dynamic_vram_on()


def switch_dynamic_vram_on() -> None:
    """What main.py does at its start, so far as the models are concerned."""
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher
    import comfy_aimdo.control

    devices = comfy.model_management.get_all_torch_devices()
    assert comfy_aimdo.control.init_devices((d.index, 0) for d in devices), "comfy-aimdo does not work here"
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True


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


def run(group: str, wanted: set[str]) -> dict[str, str]:
    from checks_common import Lacks

    results = {}
    for name, check in vars(importlib.import_module(f"checks_{group}")).items():
        if name.startswith("check_") and (not wanted or {group, name.removeprefix("check_")} & wanted):
            began = time.perf_counter()
            try:
                check()
                results[name] = "ok"
            except Lacks as lacks:
                results[name] = f"{LACKS}{lacks}"
            except Exception:
                results[name] = traceback.format_exc()
            sys.stderr.write(f"{time.perf_counter() - began:6.1f} s  {name}\n")
    return results


def main() -> None:
    comfyui, root, *wanted = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        start_host(comfyui, folder, [word for word in wanted if word.startswith("--")])
        results = {"new_libraries": new_libraries(root)}
        results |= {name: said for group in GROUPS for name, said in run(group, set(wanted)).items()}
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
