"""What the rooms may import, and that loading the package touches nothing it should not."""

import ast
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("kernels", "sparse_attn", "nodes")
ALLOWED = {"kernels": {"kernels"}, "sparse_attn": {"sparse_attn", "kernels"}, "nodes": set(ROOMS)}
HOST = {
    "comfy",
    "comfy_api",
    "comfy_extras",
    "comfy_execution",
    "folder_paths",
    "server",
    "execution",
    "latent_preview",
}
SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imported(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every import in a file; relative ones resolved to the room they reach, as 'room.module'."""
    package = path.relative_to(ROOT).parent.parts
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            full = [*base, *(node.module or "").split(".")]
            found.append((node.lineno, "." + ".".join(part for part in full if part)))
        elif isinstance(node, ast.ImportFrom):
            found.append((node.lineno, node.module or ""))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_and_are_relative(path):
    room = path.relative_to(ROOT).parts[0]
    for line, module in imported(path):
        where = f"{path.relative_to(ROOT)}:{line} imports {module}"
        top = module.lstrip(".").split(".")[0]
        if module.startswith("."):
            assert top in ALLOWED[room], f"{where}: imports go nodes -> sparse_attn -> kernels"
        else:
            assert top not in ROOMS, f"{where}: write a relative import, the root has no fixed name"
            assert top not in HOST or room == "nodes", f"{where}: only nodes/ knows ComfyUI"
            in_triton = "triton" in path.relative_to(ROOT).parts[:-1]
            assert top != "triton" or in_triton, f"{where}: Triton is imported below kernels/pbsa/triton only"


def load_elsewhere(root: Path, body: str) -> None:
    """Load the package at `root` in a fresh interpreter as ComfyUI does, under a name that is no identifier."""
    code = f"""
        import asyncio, importlib, importlib.util, pathlib, sys
        root = pathlib.Path({str(root)!r})
        name = str(root).replace(".", "_x_")
        spec = importlib.util.spec_from_file_location(name, root / "__init__.py")
        pack = importlib.util.module_from_spec(spec)
        sys.modules[name] = pack
        spec.loader.exec_module(pack)
    """
    script = textwrap.dedent(code) + textwrap.dedent(body)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_entry_point_loads_nothing_heavy():
    load_elsewhere(
        ROOT,
        """
        assert asyncio.iscoroutinefunction(pack.comfy_entrypoint)
        assert not hasattr(pack, "NODE_CLASS_MAPPINGS")
        heavy = {"torch", "numpy", "av", "einops", "triton"} & set(sys.modules)
        assert not heavy, heavy
        """,
    )


def test_every_module_loads_under_another_folder_name_without_a_gpu_or_triton(tmp_path):
    copy = tmp_path / "Sparse Forcing-main (2)"
    for room in ROOMS:
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "__init__.py", copy)
    load_elsewhere(
        copy,
        """
        for room in ("kernels", "sparse_attn"):
            for path in sorted((root / room).rglob("*.py")):
                parts = path.relative_to(root).with_suffix("").parts
                if "triton" not in parts[:-1]:
                    importlib.import_module(".".join((name, *parts)).removesuffix(".__init__"))
        import torch
        assert not torch.cuda.is_initialized()
        wrong = {"triton", "nodes", "kernels", "sparse_attn", "comfy"} & set(sys.modules)
        assert not wrong, wrong
        """,
    )
