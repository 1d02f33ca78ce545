"""What no file of the project may hold: code that a registry refuses, and text that is not about the project."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = {".git", ".venv", "output", "__pycache__", "build", "dist"}
SKIPPED |= {".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis"}
SHIPPED = ("kernels", "sparse_attn", "nodes")


def files_of_the_project() -> list[Path]:
    """Tracked files and new ones that git does not ignore; without git, everything but caches."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if done.returncode == 0 and done.stdout:
        listed = [ROOT / name.decode() for name in done.stdout.split(b"\0") if name]
        return [path for path in listed if path.is_file()]
    found = (path for path in ROOT.rglob("*") if path.is_file())
    return [path for path in found if not SKIPPED & set(path.relative_to(ROOT).parts)]


def ignored_by_the_archive(path: Path) -> bool:
    """True for what .comfyignore keeps out of the published archive."""
    lines = [line.strip() for line in (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()]
    name = path.relative_to(ROOT).as_posix()
    return any(name.startswith(line) for line in lines if line.endswith("/"))


FILES = files_of_the_project()
PYTHON = [path for path in FILES if path.suffix == ".py"]
SOURCES = [path for path in PYTHON if path.relative_to(ROOT).parts[0] in SHIPPED]
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".json", ".js", ".mjs", ".yaml", ""}
TEXT = [path for path in FILES if path.suffix in TEXT_SUFFIXES]

# Each pattern with the reason. Split in the middle so that this file does not hold what it looks for.
REFUSED_BY_THE_REGISTRY = {
    r"\.cu" + r"da\(": "moves to a fixed device; use .to(device)",
    r"\.to\(['\"]cu" + "da": "moves to a fixed device; use .to(device)",
    r"torch\.auto" + "cast": "the caller chooses dtypes",
    r"(?<!ops\.)\bnn\.(Linear|Conv\dd|LayerNorm|RMSNorm|Embedding)" + r"\(": "take an `ops` namespace",
    r"\b(ev" + r"al|ex" + r"ec)\((?!\))": "runs text as code",
    r"^\s*(import|from) subprocess\b|\bos\.sys" + "tem": "starts programs",
    r"^\s*(import|from) (requests|urllib|socket|http|httpx|huggingface_hub)\b": "uses the network",
}
WRONG_ANYWHERE = {
    r"weights_only=Fal" + "se": "runs code of a file",
    r"load_state_dict\([^)]*strict=Fal" + "se": "hides keys that do not fit",
    r"from \S+ import \*": "star import",
    r"except\s*:": "bare except",
}
NOT_ABOUT_THE_PROJECT = {
    r"/ro" + r"ot/|/wo" + r"rk/|/ho" + "me/[a-z]": "a path of one machine",
    r"(?i)\bco-?auth" + r"ored|\bas an a[i] |language mod" + "el that": "about how the project is written",
    r"<{7} |>{7} |^={7}$": "an unresolved merge",
}


def hits(path: Path, patterns: dict[str, str]) -> list[str]:
    name, text = path.relative_to(ROOT), path.read_text(encoding="utf-8")
    if path.suffix == ".py":  # prose may name what code may not do
        text = re.sub(r"#.*", "", text)
    return [
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}, {why}"
        for pattern, why in patterns.items()
        for match in re.finditer(pattern, text, re.MULTILINE)
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_published_sources_hold_nothing_a_registry_refuses(path):
    if ignored_by_the_archive(path):
        return
    assert not hits(path, REFUSED_BY_THE_REGISTRY)
    text = path.read_text(encoding="utf-8")
    assert text.encode("cp1252", "ignore").decode("cp1252") == text, "characters outside cp1252"


def test_no_source_is_careless():
    assert not [hit for path in PYTHON for hit in hits(path, WRONG_ANYWHERE)]


def test_all_text_is_about_the_project_alone():
    assert not [hit for path in TEXT for hit in hits(path, NOT_ABOUT_THE_PROJECT)]


def test_the_repository_stays_small():
    sizes = {path: path.stat().st_size for path in FILES}
    largest = sorted(sizes, key=sizes.__getitem__)[-3:]
    total = sum(sizes.values())
    assert total < 40 * 2**20, f"{total / 2**20:.1f} MiB, the largest files are {[str(p) for p in largest]}"


def test_text_files_end_lines_alike():
    wrong = [path for path in TEXT if b"\r\n" in path.read_bytes()]
    assert not wrong
