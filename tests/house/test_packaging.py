"""The names, versions and lists that are written in more than one place say the same."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sparse_forcing_pack.sparse_attn import cli
from sparse_forcing_pack.sparse_attn.world.scene import parse_prompt

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("kernels", "sparse_attn", "nodes")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]


def lines(name: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def test_one_version():
    newest = re.search(
        r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert newest is not None
    assert newest[1] == PROJECT["version"] == cli.VERSION


def test_the_pack_never_moves_the_hosts_torch():
    names = {re.split(r"[<>=!~;\[ ]", line)[0].lower() for line in lines("requirements.txt")}
    assert not names & {"torch", "torchvision", "torchaudio", "triton", "triton-windows", "xformers"}
    assert [line for line in lines("requirements.txt") if line.startswith("numpy")] == ["numpy"]


def test_dependencies_are_the_requirements_and_the_front_ends_range():
    frontend = [line for line in PROJECT["dependencies"] if line.startswith("comfyui-frontend-package")]
    assert len(frontend) == 1
    assert ">=" in frontend[0]
    assert sorted(PROJECT["dependencies"]) == sorted([*lines("requirements.txt"), *frontend])


def test_what_the_node_registry_asks_for():
    comfy = PYPROJECT["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9-]{1,99}", PROJECT["name"])
    assert "comfy" not in PROJECT["name"]
    assert comfy["PublisherId"]
    assert comfy["DisplayName"] == "Sparse Forcing"
    assert comfy["Icon"].startswith("https://")
    assert comfy["requires-comfyui"] == ">=0.3.64"
    assert PROJECT["requires-python"] == ">=3.10"
    assert (ROOT / PROJECT["license"]["file"]).read_text(encoding="utf-8").count("Apache License") >= 2
    assert (ROOT / PROJECT["readme"]).is_file()


def test_the_installed_package_holds_every_room_below_one_name():
    setup = PYPROJECT["tool"]["setuptools"]
    assert setup["package-dir"] == {"sparse_forcing": "."}
    found = {
        ".".join(("sparse_forcing", *init.parent.relative_to(ROOT).parts))
        for room in ROOMS
        for init in (ROOT / room).rglob("__init__.py")
        if f"{init.parent.relative_to(ROOT).as_posix()}/" not in lines(".comfyignore")  # nor does the archive
    }
    assert set(setup["packages"]) == found | {"sparse_forcing"}


@pytest.mark.parametrize("name", [".comfyignore", ".gitignore"])
def test_ignore_files_name_folders_plainly(name):
    assert all(not line.startswith("/") for line in lines(name))


def test_the_archive_keeps_what_the_pack_needs():
    left_out = set(lines(".comfyignore"))
    assert not left_out & {f"{name}/" for name in (*ROOMS, "web", "workflows", "locales")}
    for name in left_out:
        assert list(ROOT.glob(name.strip("!/"))), f".comfyignore names {name}, which is not there"


def test_templates_are_the_only_folder_that_comfyui_serves_as_templates():
    """ComfyUI serves the first of these folders that a pack has, under one URL; a second one hides the templates."""
    served = ("example_workflows", "example", "examples", "workflow", "workflows")
    assert [name for name in served if (ROOT / name).exists()] == ["workflows"]


def test_the_demos_prompt_is_a_scene_of_the_world(run):
    assert len(parse_prompt(run.PROMPT).sprites) == 2


def test_links_between_the_documents_lead_somewhere():
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.relative_to(ROOT)} links to {target}"


@pytest.mark.skipif(
    shutil.which("git") is None, reason="git, which reads the ignore file here, is not installed"
)
def test_the_archive_holds_the_help_pages_and_not_the_documents(tmp_path):
    """The registry reads .comfyignore as git reads .gitignore, where `docs/` means a folder at any depth."""
    shutil.copy(ROOT / ".comfyignore", tmp_path / ".gitignore")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)

    def ignored(path: Path) -> bool:
        name = path.relative_to(ROOT).as_posix()
        return subprocess.run(["git", "check-ignore", "-q", name], cwd=tmp_path, check=False).returncode == 0

    shipped = [*ROOT.glob("web/**/*.md"), *ROOT.glob("web/**/*.js"), *ROOT.glob("workflows/**/*.json")]
    assert len(shipped) > 20 and not [path for path in shipped if ignored(path)]
    assert ignored(ROOT / "docs" / "speed.md") and ignored(ROOT / "tests" / "conftest.py")
