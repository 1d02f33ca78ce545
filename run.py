#!/usr/bin/env python3
"""One command for newcomers: sets up what is missing, then runs.

    python run.py demo            make a 5 s video with the embedded world model
    python run.py test            check the code, then run the tests (further arguments go to pytest)
    python run.py lint            check the code only: ruff and mypy
    python run.py generate ...    the command line (generate --help lists its options)
    python run.py convert ...     a checkpoint as a file that ComfyUI opens (convert --help lists its options)
    python run.py info            what this machine offers

Needs Python 3.10 or newer and nothing else. Everything is installed into `.venv` beside this file, and only when
something changed since the last time. A torch that the Python you start this with already has is reused as it is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

MIN_PYTHON = (3, 10)
TORCH = "torch==2.13.0"  # installed only where the starting Python has no torch
ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "sparse_forcing.json"
ROOMS = ("kernels", "sparse_attn", "nodes")

PROMPT = "a large red circle bouncing and a small yellow star orbiting over a navy checkered background"
DEMO = "output", "demo.mp4"
STOPPED = 130  # the shell's exit code for Ctrl-C
PATIENCE = 20  # seconds a stopped command may take to save what it has

NETWORK_SIGNS = (
    "NewConnectionError",
    "Failed to establish",
    "NameResolutionError",
    "name resolution",
    "ConnectTimeout",
)


class SetupError(Exception):
    """The environment cannot be made; the message says why and what to do."""


def main(arguments: list[str]) -> int:
    if sys.version_info < MIN_PYTHON:
        return fail(f"Python {version_text()} is too old: start this with Python 3.10 or newer.")
    command, rest = (arguments[0], arguments[1:]) if arguments else ("help", [])
    if command in ("-h", "--help", "help"):
        print((__doc__ or "").strip())
        return 0
    if command == "--inside":
        return command_line(rest)
    if command not in ("demo", "test", "lint", "generate", "convert", "info"):
        return fail(f"There is no command {command!r}: use demo, test, lint, generate, convert or info.", 2)
    try:
        prepare("test" if command in ("test", "lint") else "runtime")
        return start(command, rest)
    except SetupError as error:
        return fail(str(error))
    except KeyboardInterrupt:
        return fail("Stopped.", STOPPED)


def start(command: str, rest: list[str]) -> int:
    """Run one command in the environment, which is ready."""
    if command == "lint":
        return lint()
    if command == "test":
        return test(rest)
    if command == "demo":
        video = ROOT.joinpath(*DEMO)
        fixed = ["--prompt", PROMPT, "--seconds", "5", "--seed", "7", "--mode", "sparse"]
        rest = [*fixed, "--out", str(video), "--sheet", str(video.with_suffix(".png")), *rest]
        command = "generate"
    return call([python(), str(Path(__file__).resolve()), "--inside", command, *rest])


def command_line(arguments: list[str]) -> int:
    """The child's side: import this folder as a package, whatever it is called, and hand over to its CLI."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    name = "sparse_forcing"
    spec = importlib.util.spec_from_file_location(
        name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    spec.loader.exec_module(package)
    return importlib.import_module(f"{name}.sparse_attn.cli").main(arguments)


# --- checks -----------------------------------------------------------------------------------------------------------


def lint() -> int:
    """Ruff and mypy; the exit code of the first that complains."""
    print("ruff check", flush=True)
    ruff = call([python(), "-m", "ruff", "check", "."], cwd=ROOT)
    print("mypy", flush=True)
    types = mypy()
    return ruff or types


def mypy() -> int:
    """Type-check a copy under a name that is an identifier, since this folder may be called anything."""
    with tempfile.TemporaryDirectory() as place:
        package = Path(place) / "sparse_forcing"
        for source in [
            ROOT / "__init__.py",
            *(path for room in ROOMS for path in (ROOT / room).rglob("*.py")),
        ]:
            copy = package / source.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)
        config, cache = str(ROOT / "pyproject.toml"), str(ROOT / ".mypy_cache")
        return call(
            [python(), "-m", "mypy", "--config-file", config, "--cache-dir", cache, "-p", package.name],
            cwd=place,
        )


def test(rest: list[str]) -> int:
    """The linters, then pytest. Its exit code counts; a clean pytest does not hide a linter's complaint."""
    linted = lint()
    print("pytest", flush=True)
    # Two files at a time: most tests keep one core busy, and the servers of some wait more than they work.
    code = call([python(), "-m", "pytest", "-ra", "-n", "2", "--dist", "loadfile", *rest], cwd=ROOT)
    if linted:
        print("The linters complained: see the lines above pytest's.", file=sys.stderr)
    return code or linted


# --- the environment --------------------------------------------------------------------------------------------------


def prepare(group: str) -> None:
    """Make `.venv` ready for a group (runtime, or test which holds more); does nothing when nothing changed."""
    stamp, source = read_stamp(), torch_here()
    if not inside_already():
        reason = why_new(stamp, source)
        if reason:
            stamp = make(reason, source)
    wanted = signature(group)
    if stamp["installed"].get(group) != wanted:
        install(group)
        stamp["installed"] |= {"runtime": signature("runtime"), group: wanted}  # a group holds the runtime
        write_stamp(stamp)


def why_new(stamp: dict, source: dict | None) -> str | None:
    """Why the environment must be made (again), or None when the one that is there will do.

    A working `.venv` that something else made is used as it is: only what is missing gets added to it.
    """
    if not VENV.exists() and not VENV.is_symlink():
        return "there is none yet"
    if stamp["state"] == "unfinished":
        return "the last attempt was cut short"
    code = "import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in sys.argv[1:]))"
    if not runs([python(), "-c", code, "pip", *(["torch"] if stamp["installed"] else [])]):
        return "the old one no longer works"
    if stamp["state"] == "ours" and source is not None and source != stamp["torch"]:
        return f"this Python has torch {source['version']}, which the old one does not use"
    return None


def make(reason: str, source: dict | None) -> dict:
    """Create `.venv` anew and return its stamp. With `source`, the torch of the starting Python shows through."""
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            raise SetupError(missing_venv(module))
    what = f"reusing its torch {source['version']}" if source else f"{TORCH} will be installed"
    print(f"Making .venv with Python {version_text()}, {what} ({reason}).", flush=True)
    remove(VENV)
    VENV.mkdir()
    write_stamp({"state": "unfinished", "torch": None, "installed": {}})
    nested = sys.prefix != sys.base_prefix
    options = ["--system-site-packages"] if source and not nested else []
    if call([sys.executable, "-m", "venv", *options, str(VENV)]) != 0:
        raise SetupError("Python could not make a virtual environment; its message is above.")
    if source and nested:
        link_packages()
    stamp = {"state": "ours", "torch": source, "installed": {}}
    write_stamp(stamp)
    return stamp


def link_packages() -> None:
    """Let `.venv` see the packages of the virtual environment this runs in.

    --system-site-packages would show those of the Python below both. A .pth line that starts with `import` is run;
    ascii() keeps it free of any question of encoding.
    """
    folders = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    lines = "".join(f"import site; site.addsitedir({folder!a})\n" for folder in folders)
    code = "import pathlib, sys, sysconfig; place = pathlib.Path(sysconfig.get_path('purelib'));"
    code += "place.joinpath('reused_packages.pth').write_text(sys.argv[1])"
    subprocess.run([python(), "-c", code, lines], check=True)


def install(group: str) -> None:
    """Install a group's packages. The torch that the environment has, its own or a reused one, is never moved."""
    constraints = VENV / "constraints.txt"
    code = "from importlib import metadata as m; print(*{m.version(d.name) for d in m.distributions(name='torch')})"
    found = subprocess.run([python(), "-c", code], capture_output=True, text=True, check=True).stdout.split()
    constraints.write_text(f"torch=={found[0]}\n" if found else f"{TORCH}\n", encoding="utf-8")
    if not found:
        pip([TORCH], constraints)
    pip(["-r", str(ROOT / "requirements.txt")], constraints)
    if group == "test":
        pip(test_requirements(), constraints)
        if has_triton_wheels() and not runs([python(), "-c", "import triton"]):
            try:
                pip(["triton"], constraints)
            except SetupError as error:
                print(f"Going on without triton, so its tests will be skipped. {error}", file=sys.stderr)


def pip(packages: list[str], constraints: Path) -> None:
    """pip install, showing what it does; a failure becomes a SetupError that says when the network is the cause."""
    command = [
        python(),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "-c",
        str(constraints),
        *packages,
    ]
    print("Installing", " ".join(packages), flush=True)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace")
    assert process.stderr is not None
    offline = False
    for line in process.stderr:
        sys.stderr.write(line)
        offline = offline or any(sign in line for sign in NETWORK_SIGNS)
    if process.wait() != 0:
        raise SetupError(failed_install(packages, offline))


def failed_install(packages: list[str], offline: bool) -> str:
    what = f"Installing {' '.join(packages)} failed"
    if offline:
        return (
            f"{what}: the package index cannot be reached. Connect to the network and run this once more; later runs "
            "need none. Behind a proxy set HTTPS_PROXY; with wheels in a folder set PIP_FIND_LINKS to it."
        )
    return f"{what}; pip's message above says why."


def missing_venv(module: str) -> str:
    major, minor = sys.version_info[:2]
    return (
        f"This Python has no {module!r} module, so no virtual environment can be made. On Debian and Ubuntu: "
        f"sudo apt install python{major}.{minor}-venv. Elsewhere start this with a full Python from python.org."
    )


def torch_here() -> dict | None:
    """Version and file of the torch that the running Python can import, or None (also inside `.venv` itself)."""
    from importlib import metadata

    spec = None if inside_already() else importlib.util.find_spec("torch")
    try:
        return {"version": metadata.version("torch"), "where": spec.origin} if spec and spec.origin else None
    except metadata.PackageNotFoundError:
        return None


def inside_already() -> bool:
    return Path(sys.prefix).resolve() == VENV.resolve()


def read_stamp() -> dict:
    """What is known of `.venv`: who made it (ours, unfinished, foreign), whose torch it reuses, what it holds."""
    foreign = {"state": "foreign", "torch": None, "installed": {}}
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return foreign
    return stamp if isinstance(stamp, dict) and stamp.keys() == foreign.keys() else foreign


def write_stamp(stamp: dict) -> None:
    STAMP.write_text(json.dumps(stamp), encoding="utf-8")


def signature(group: str) -> str:
    """What a group's installation depends on, as a digest."""
    parts = [TORCH, ROOT.joinpath("requirements.txt").read_text(encoding="utf-8")]
    parts += test_requirements() if group == "test" else []
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def test_requirements() -> list[str]:
    """The `test` extra of pyproject.toml. Python 3.10 has no TOML reader, and one plain list needs none."""
    pyproject = ROOT.joinpath("pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^test = \[(.*?)^\]", pyproject, re.MULTILINE | re.DOTALL)
    if block is None:
        raise SetupError("pyproject.toml has no `test = [...]` under [project.optional-dependencies].")
    return re.findall(r'"([^"]+)"', block[1])


def has_triton_wheels() -> bool:
    return sys.platform == "linux" and platform.machine() == "x86_64"


# --- small things -----------------------------------------------------------------------------------------------------


def python() -> str:
    """The environment's interpreter."""
    return str(VENV / "Scripts" / "python.exe" if os.name == "nt" else VENV / "bin" / "python")


def call(command: list[str], cwd: str | Path | None = None) -> int:
    """Run a command in view of the user. Ctrl-C reaches it too: it may finish what it saves before this returns."""
    process = subprocess.Popen(command, cwd=cwd)
    try:
        return process.wait()
    except KeyboardInterrupt:
        try:
            return process.wait(PATIENCE) or STOPPED
        except (KeyboardInterrupt, subprocess.TimeoutExpired):
            process.kill()
            return STOPPED


def runs(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def remove(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def version_text() -> str:
    return ".".join(str(part) for part in sys.version_info[:3])


def fail(message: str, code: int = 1) -> int:
    print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
