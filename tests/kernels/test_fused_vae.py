"""`norm_to_window`: the reference against its parts, every backend against the reference, and the compiled kernel.

As for the other fused operations, a process of its own runs this file in Triton's interpreter.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sparse_forcing_pack.kernels.fused import norm_to_window

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
PRECISIONS = {"cpu": (torch.float32, torch.float16), "cuda": (torch.float32, torch.float16, torch.bfloat16)}


@pytest.mark.interpret
@pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_in_the_interpreter():
    here = Path(__file__)
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(here)]
    done = subprocess.run(
        command, env=env, cwd=here.parents[2], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def problem(
    frames: int, height: int, width: int, channels: int, shuffled: bool = False, seed: int = 0
) -> dict:
    """float64 inputs that every precision holds exactly."""
    draw = torch.Generator().manual_seed(seed)

    def made(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=draw).double() * 32).round() / 32

    stored = (frames, height // 2 + 1, width // 2 + 1, 4 * channels)
    shape = (frames, height, width, channels)
    return {
        "y": made(*(stored if shuffled else shape)),
        "bias": made(channels),
        "residual": made(*shape),
        "gamma": made(channels),
        "past": made(2, height, width, channels),
        "total": torch.zeros(shape).double(),
        "window": torch.full((frames + 2, *shape[1:]), torch.nan).double(),
    }


def run(given: dict, dtype: torch.dtype, device: str, backend: str, without=(), **options) -> dict:
    """Copies of the tensors after the call."""
    found = {name: x.to(device, dtype, copy=True) for name, x in given.items() if name not in without}
    if "past" in without:
        found["window"] = found["window"][2:].clone()
    arguments = dict(found)
    norm_to_window(arguments.pop("y"), arguments.pop("window"), backend=backend, **arguments, **options)
    return found


def assert_as_reference(given: dict, backend: tuple[str, str], **options) -> None:
    name, device = backend
    for dtype in PRECISIONS[device]:
        found = run(given, dtype, device, name, **options)
        exact = given if "total" in options.get("without", ()) else {}
        truth = run(exact or given, torch.float64, "cpu", "reference", **options)
        for key in ("window", "past", "total"):
            if key in found:
                # the norm reads the sum as stored, so its error is one rounding more
                limit = 3 * torch.finfo(dtype).eps * truth[key].abs().clamp_min(1)
                assert (found[key].cpu().double() - truth[key]).abs().sub(limit).max() <= 0, (dtype, key)


def test_norm_to_window_is_its_parts():
    given = problem(3, 4, 5, 6)
    found = run(given, torch.float64, "cpu", "reference", silu=True)
    total = given["y"] + given["bias"] + given["residual"]
    inputs = F.silu(F.normalize(total, dim=-1) * 6**0.5 * given["gamma"])
    window = torch.cat([given["past"], inputs])
    assert torch.allclose(found["total"], total) and torch.allclose(found["window"], window)
    assert torch.equal(found["past"], found["window"][-2:])


def test_norm_to_window_unshuffles_a_merged_upsampling():
    given = problem(1, 4, 6, 2, shuffled=True)
    window = run(
        given, torch.float64, "cpu", "reference", without=("bias", "residual", "gamma", "past"), shuffled=True
    )["window"]
    for line in range(4):
        for column in range(6):
            bank = 2 * (line % 2) + column % 2
            cell = given["y"][0, line // 2 + line % 2, column // 2 + column % 2].view(4, 2)[bank]
            assert torch.equal(window[0, line, column], cell)


@pytest.mark.parametrize("frames", [1, 2, 3])
@pytest.mark.parametrize("channels", [3, 16, 96])
def test_norm_to_window_with_everything(backend, frames, channels):
    assert_as_reference(problem(frames, 5, 7, channels), backend, silu=True)


@pytest.mark.parametrize(
    "without",
    [("bias",), ("residual", "total"), ("gamma",), ("past",), ("bias", "residual", "gamma", "total", "past")],
)
def test_norm_to_window_without(backend, without):
    assert_as_reference(problem(2, 3, 5, 24), backend, without=without, silu="gamma" not in without)


@pytest.mark.parametrize("frames", [1, 2])
def test_norm_to_window_shuffled(backend, frames):
    given = problem(frames, 6, 10, 12, shuffled=True)
    assert_as_reference(given, backend, without=("residual",), shuffled=True, silu=True)


def test_norm_to_window_total_over_residual(backend):
    name, device = backend
    given = problem(2, 3, 4, 8)
    apart = run(given, torch.float32, device, name)
    found = {key: x.to(device, torch.float32, copy=True) for key, x in given.items()}
    found["total"] = found["residual"]
    arguments = dict(found)
    norm_to_window(arguments.pop("y"), arguments.pop("window"), backend=name, **arguments)
    for key in ("window", "total", "past"):
        assert torch.equal(found[key], apart[key])


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("y", (2, 3, 4, 9), r"y must have shape \[2, 3, 4, 8\]"),
        ("past", (1, 3, 4, 8), r"past must have shape \[2, 3, 4, 8\]"),
        ("gamma", (9,), r"gamma must have shape \[8\]"),
        ("total", (3, 3, 4, 8), r"total must have shape"),
    ],
)
def test_norm_to_window_says_what_does_not_fit(name, shape, message):
    given = problem(2, 3, 4, 8) | {name: torch.zeros(shape).double()}
    with pytest.raises(ValueError, match=message):
        run(given, torch.float32, "cpu", "reference")


def test_norm_to_window_wants_contiguous_tensors():
    given = problem(2, 4, 4, 8)
    with pytest.raises(ValueError, match=r"y is not contiguous"):
        norm_to_window(given["y"].transpose(1, 2), given["window"][2:])


@pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="needs Triton's compiler")
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("channels", [96, 384])
def test_norm_to_window_compiles_to_wide_accesses(arch, channels):
    import triton
    from sparse_forcing_pack.kernels.fused.triton import frames
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    padded = triton.next_power_of_2(channels)
    constants = {
        "C": channels,
        "C_PAD": padded,
        "ROWS": frames.ELEMENTS // padded,
        "SILU": True,
        "SHUFFLED": True,
    }
    kinds = {"frames": "i32", "pixels": "i32", "width": "i32", "smallest": "fp32"}
    signature, aligned = {}, {}
    for at, parameter in enumerate(frames._norm_to_window.params):
        signature[parameter.name] = (
            "constexpr" if parameter.is_constexpr else kinds.get(parameter.name, "*bf16")
        )
        if signature[parameter.name] == "*bf16":
            aligned[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(frames._norm_to_window, signature, constants, aligned)
    ptx = triton.compile(source, GPUTarget("cuda", arch, 32), {"num_warps": 4}).asm["ptx"]
    assert re.search(r"ld\.global\S*\.v4\.b32", ptx) and re.search(r"st\.global\S*\.v4\.b32", ptx)
