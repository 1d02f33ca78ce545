"""run.py: what it decides, without installing anything."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "run.py"
TORCH = {"version": "2.9.1", "where": "/some/place/torch/__init__.py"}


def stamped(run, state="ours", torch=None, installed=None) -> dict:
    run.VENV.mkdir(exist_ok=True)
    run.write_stamp({"state": state, "torch": torch, "installed": installed or {}})
    return run.read_stamp()


@pytest.fixture
def works(run, monkeypatch):
    """Pretend that the environment's interpreter answers."""
    monkeypatch.setattr(run, "runs", lambda command: True)
    return run


def test_standard_library_only():
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {
        alias.name.split(".")[0] for node in imports if isinstance(node, ast.Import) for alias in node.names
    }
    names |= {(node.module or "").split(".")[0] for node in imports if isinstance(node, ast.ImportFrom)}
    assert names <= sys.stdlib_module_names


def test_an_old_python_is_told_so(run, monkeypatch, capsys):
    monkeypatch.setattr(run.sys, "version_info", (3, 9, 18))
    assert run.main(["demo"]) == 1
    assert capsys.readouterr().err == "Python 3.9.18 is too old: start this with Python 3.10 or newer.\n"


def test_help_and_unknown_commands(run, capsys):
    assert run.main([]) == run.main(["--help"]) == 0
    assert "python run.py demo" in capsys.readouterr().out
    assert run.main(["dmo"]) == 2
    assert "There is no command 'dmo'" in capsys.readouterr().err


def test_ctrl_c_is_no_traceback(run, monkeypatch, capsys):
    def interrupted(group):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "prepare", interrupted)
    assert run.main(["demo"]) == 130
    assert capsys.readouterr().err == "Stopped.\n"


# --- commands ---


def commands(run, monkeypatch, *arguments, codes=()) -> list[list[str]]:
    """The programs that run.py would start."""
    started, left = [], list(codes)
    monkeypatch.setattr(run, "prepare", lambda group: started.append([group]))
    monkeypatch.setattr(
        run, "call", lambda command, cwd=None: started.append(command) or (left.pop(0) if left else 0)
    )
    assert run.main(list(arguments)) == max(codes, default=0)
    return started


def test_generate_passes_its_arguments_on(run, monkeypatch):
    prepared, command = commands(run, monkeypatch, "generate", "--prompt", "a b", "--out", "x y.mp4")
    assert prepared == ["runtime"]
    assert command == [
        run.python(),
        str(SOURCE),
        "--inside",
        "generate",
        "--prompt",
        "a b",
        "--out",
        "x y.mp4",
    ]


def test_demo_is_a_fixed_generate_that_may_be_changed(run, monkeypatch):
    _, command = commands(run, monkeypatch, "demo", "--device", "cpu")
    assert command[3] == "generate"
    assert command[-2:] == ["--device", "cpu"]
    options = dict(zip(command[4::2], command[5::2]))
    assert (options["--seconds"], options["--mode"], options["--prompt"]) == ("5", "sparse", run.PROMPT)
    assert options["--out"] == str(run.ROOT / "output" / "demo.mp4")
    assert options["--sheet"] == str(run.ROOT / "output" / "demo.png")


def test_test_runs_the_linters_and_pytest_with_reasons(run, monkeypatch):
    prepared, *started = commands(run, monkeypatch, "test", "-k", "video")
    assert prepared == ["test"]
    assert [command[2] for command in started] == ["ruff", "mypy", "pytest"]
    assert started[-1] == [run.python(), "-m", "pytest", "-ra", "-n", "2", "--dist", "loadfile", "-k", "video"]


@pytest.mark.parametrize("codes", [(0, 0, 5), (1, 0, 5), (1, 0, 0), (0, 1, 0)])
def test_tests_exit_code(run, monkeypatch, codes):
    """pytest's own; a linter's where pytest is content."""
    commands(run, monkeypatch, "test", codes=codes)


# --- the environment ---


def test_a_new_environment_is_made_when_there_is_none(run):
    assert run.why_new(run.read_stamp(), None) == "there is none yet"


def test_a_half_made_one_is_made_again(works):
    assert works.why_new(stamped(works, "unfinished"), None) == "the last attempt was cut short"


def test_a_broken_one_is_made_again(run):
    assert run.why_new(stamped(run), None) == "the old one no longer works"
    run.STAMP.write_text("{")
    assert run.why_new(run.read_stamp(), None) == "the old one no longer works"


def test_a_working_one_is_kept(works):
    assert works.why_new(stamped(works), None) is None
    assert works.why_new(stamped(works, torch=TORCH), TORCH) is None
    assert works.why_new(stamped(works, torch=TORCH), None) is None


def test_a_working_one_of_somebody_else_is_used_and_not_removed(works):
    works.VENV.mkdir()
    assert works.read_stamp()["state"] == "foreign"
    assert works.why_new(works.read_stamp(), TORCH) is None


def test_another_torch_means_another_environment(works):
    newer = {**TORCH, "version": "2.13.0"}
    assert "torch 2.13.0" in works.why_new(stamped(works, torch=TORCH), newer)
    assert "torch 2.9.1" in works.why_new(stamped(works), TORCH)


def test_installation_happens_once_and_again_after_a_change(works, monkeypatch):
    done = []
    monkeypatch.setattr(works, "install", done.append)
    monkeypatch.setattr(works, "torch_here", lambda: None)
    stamped(works)
    for group in ("runtime", "runtime", "test", "test", "runtime"):
        works.prepare(group)
    assert done == ["runtime", "test"]
    requirements = works.ROOT / "requirements.txt"
    requirements.write_text(requirements.read_text() + "another-package\n")
    works.prepare("runtime")
    assert done == ["runtime", "test", "runtime"]


def test_a_failed_installation_is_tried_again(works, monkeypatch):
    def fails(group):
        raise works.SetupError("no network")

    monkeypatch.setattr(works, "install", fails)
    monkeypatch.setattr(works, "torch_here", lambda: None)
    stamped(works)
    assert works.main(["info"]) == 1
    assert json.loads(works.STAMP.read_text())["installed"] == {}


def test_the_test_extra_is_read_without_a_toml_parser(run):
    packaging = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    pyproject = packaging.loads((run.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert run.test_requirements() == pyproject["project"]["optional-dependencies"]["test"]


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_a_python_without_venv_is_told_what_to_install(run, monkeypatch, capsys, module):
    find = importlib.util.find_spec
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None if name == module else find(name))
    assert run.main(["demo"]) == 1
    message = capsys.readouterr().err
    assert f"no {module!r} module" in message
    assert f"sudo apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv" in message
    assert not run.VENV.exists()


def fake_pip(run, monkeypatch, tmp_path, stderr: str, code: int) -> None:
    """An interpreter that answers every call with this on stderr and this exit code."""
    script = tmp_path / "fake_python.py"
    script.write_text(f"import sys; sys.stderr.write({stderr!r}); sys.exit({code})")
    popen = subprocess.Popen
    monkeypatch.setattr(
        run.subprocess, "Popen", lambda command, **options: popen([sys.executable, str(script)], **options)
    )


def test_a_machine_without_network_is_told_so(run, monkeypatch, tmp_path, capsys):
    fake_pip(
        run,
        monkeypatch,
        tmp_path,
        "WARNING: Retrying after NewConnectionError('...')\nERROR: none found\n",
        1,
    )
    with pytest.raises(run.SetupError, match="the package index cannot be reached"):
        run.pip(["einops"], tmp_path / "constraints.txt")
    assert "ERROR: none found" in capsys.readouterr().err


def test_another_failure_points_at_pips_message(run, monkeypatch, tmp_path):
    fake_pip(run, monkeypatch, tmp_path, "ERROR: no space left\n", 1)
    with pytest.raises(run.SetupError, match="Installing einops failed; pip's message above"):
        run.pip(["einops"], tmp_path / "constraints.txt")


def test_a_stopped_child_may_save_what_it_has(run):
    code = (
        "import os, signal, sys, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(0.3); sys.exit(130)"
    )
    if sys.platform == "win32":
        pytest.skip("os.kill sends no Ctrl-C on Windows")
    assert run.call([sys.executable, "-c", code]) == 130


def test_a_real_environment_reuses_the_packages_of_this_one(run, monkeypatch, capsys):
    """In a folder with spaces; pip comes with it, and torch is seen, not installed."""
    source = run.torch_here()
    run.make("there is none yet", source)
    assert "reusing its torch" in capsys.readouterr().out
    show = [run.python(), "-c", "import importlib.util as u; print(u.find_spec('torch').origin)"]
    assert subprocess.check_output(show, text=True).strip() == source["where"]
    assert run.why_new(run.read_stamp(), source) is None
    monkeypatch.setattr(
        run, "pip", lambda packages, constraints: seen.append((packages, constraints.read_text()))
    )
    seen: list = []
    run.install("runtime")
    (packages, constraints) = seen[-1]
    assert packages == ["-r", str(run.ROOT / "requirements.txt")]
    assert constraints == f"torch=={source['version']}\n"
    assert len(seen) == 1
