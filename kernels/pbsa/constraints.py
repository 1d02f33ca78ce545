"""What each backend of PBSA needs, and which one a call gets.

A backend declares its needs as data (`BackendConstraints`); `why_not` answers with the first need that a call does not
meet. A backend that was asked for by name runs or raises with that reason; only `auto` chooses, and it logs each
distinct choice once. An operation whose kernel fails under `auto` (no C compiler, a compilation error) is computed by
the reference from then on.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

logger = logging.getLogger("sparse_forcing.kernels")

Result = TypeVar("Result")

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Call:
    """The facts of one call that decide who can serve it; all are host metadata, reading them never syncs."""

    operation: str  # "attention", "route", "pool_pages", or a fused operation
    device: torch.device
    dtype: torch.dtype
    head_dim: int | None = None  # None for the fused operations on whole rows, which have no heads
    block_tokens: int | None = None  # T; None for the router, which sees pooled vectors only
    candidates: int | None = None  # slots a router row scores; None for attention


@dataclass(frozen=True)
class BackendConstraints:
    """What one backend can do. `None` means "any"."""

    dtypes: tuple[torch.dtype, ...]
    device_types: tuple[str, ...] | None = None
    head_dim: tuple[int, int] | None = None  # inclusive range
    block_tokens: tuple[int, ...] | None = None
    max_candidates: int | None = None
    needs_triton: bool = False
    min_capability: tuple[int, int] | None = None

    def why_not(self, call: Call) -> str | None:
        """The first unmet need in words, or None when the backend can serve `call`."""
        if self.needs_triton and (reason := triton_missing()):
            return reason
        return self._why_not_device(call) or self._why_not_shape(call)

    def _why_not_device(self, call: Call) -> str | None:
        interpreted = self.needs_triton and interpreter_on()
        if interpreted:
            if call.device.type != "cpu":
                return f"TRITON_INTERPRET=1 runs kernels on CPU tensors only, got a tensor on {call.device}"
            if call.dtype == torch.bfloat16:
                return "Triton's interpreter computes bfloat16 products wrongly; use float32 or float16"
            return None
        if self.device_types is not None and call.device.type not in self.device_types:
            return f"it needs a device of type {' or '.join(self.device_types)}, got {call.device}"
        if self.min_capability is not None:
            have = torch.cuda.get_device_capability(call.device)
            if have < self.min_capability:
                need = ".".join(map(str, self.min_capability))
                return f"it needs compute capability {need} or newer, {call.device} has {have[0]}.{have[1]}"
        return None

    def _why_not_shape(self, call: Call) -> str | None:
        if call.dtype not in self.dtypes:
            return f"it needs one of {', '.join(map(str, self.dtypes))}, got {call.dtype}"
        dim = call.head_dim
        if self.head_dim is not None and dim is not None and not self.head_dim[0] <= dim <= self.head_dim[1]:
            return f"it needs a head dim of {self.head_dim[0]} to {self.head_dim[1]}, got {dim}"
        tokens = call.block_tokens
        if self.block_tokens is not None and tokens is not None and tokens not in self.block_tokens:
            return f"it needs blocks of {', '.join(map(str, self.block_tokens))} tokens, got {tokens}"
        count = call.candidates
        if self.max_candidates is not None and count is not None and count > self.max_candidates:
            return f"it scores at most {self.max_candidates} page slots a row, got {count}"
        return None


REFERENCE = BackendConstraints(dtypes=(*FLOATS, torch.float64))
TRITON = BackendConstraints(
    dtypes=FLOATS,
    device_types=("cuda",),
    head_dim=(16, 128),
    block_tokens=(16, 32, 64, 128),
    max_candidates=4096,
    needs_triton=True,
    min_capability=(8, 0),
)
BACKENDS: dict[str, BackendConstraints] = {"triton": TRITON, "reference": REFERENCE}  # in `auto`'s order


@functools.cache
def triton_missing() -> str | None:
    """Why Triton cannot be imported here, or None. Looked up once, when first asked for."""
    try:
        importlib.import_module("triton")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # a broken install too is a reason
        return f"triton cannot be imported ({type(error).__name__}: {error})"
    return None


def interpreter_on() -> bool:
    """Whether Triton kernels run in Triton's interpreter (set the variable before the first kernel is used)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def choose(call: Call, backend: str) -> str:
    """The backend that serves `call`. Raises ValueError for an unknown name, RuntimeError with the unmet need."""
    if backend == "auto":
        return _auto(call)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be auto, {' or '.join(sorted(BACKENDS))}, got {backend!r}")
    if reason := BACKENDS[backend].why_not(call):
        raise RuntimeError(f"PBSA {call.operation}: backend {backend!r} cannot run: {reason}")
    return backend


def backend_for(
    backend: str,
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int | None = None,
    block_tokens: int | None = None,
    candidates: int | None = None,
) -> str:
    """`choose` for the fields of a Call: what torch.compile can hand over as constants."""
    facts = operation, device, dtype, head_dim, block_tokens, candidates
    return _on_cuda(backend, *facts) if device.type == "cuda" else choose(Call(*facts), backend)


@functools.cache
def _on_cuda(backend: str, *facts: Any) -> str:
    """`choose`, remembered: a pass asks some hundred times, and nothing that the answer depends on changes."""
    return choose(Call(*facts), backend)


# torch.compile takes the answer as a constant instead of tracing the search for Triton and the log. This is all that
# torch.compiler.assume_constant_result does, without importing the compiler for everybody who never compiles.
backend_for._dynamo_marked_constant = True  # type: ignore[attr-defined]


def serve(
    backend: str,
    operation: str,
    facts: tuple,
    by_triton: Callable[[], Result],
    by_reference: Callable[[], Result],
) -> Result:
    """Compute an operation by the backend that `backend_for(backend, operation, *facts)` names.

    Under "auto" a kernel that fails is logged once, and the reference computes the operation now and later. Raises
    torch.OutOfMemoryError, of either; what a backend raises that was asked for by name.
    """
    if backend_for(backend, operation, *facts) != "triton":
        return by_reference()
    if backend != "auto" or torch.compiler.is_compiling():
        return by_triton()
    try:
        return by_triton()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler or a launch raises
        _on_cuda.cache_clear()
        _failed[operation] = f"its kernel failed here ({type(error).__name__}: {first_line(error)})"
        logger.warning("PBSA %s is slower now: not triton, %s", operation, _failed[operation])
        return by_reference()


_failed: dict[str, str] = {}  # operation -> why its kernel is not used any more


def failed_kernels() -> list[str]:
    """Return the operations that the reference computes because their kernels failed here."""
    return sorted(_failed)


def first_line(error: Exception) -> str:
    """An error's text for a log line."""
    return (str(error).strip().splitlines() or [""])[0][:300]


def _auto(call: Call) -> str:
    reason = TRITON.why_not(call) or _failed.get(call.operation)
    if reason is None and interpreter_on():
        reason = "it would run in Triton's interpreter, which is for tests"
    chosen = "triton" if reason is None else "reference"
    why = f"not triton, {reason}" if reason else "its needs are met"
    _log_choice(call.operation, chosen, why)
    return chosen


@functools.cache
def _log_choice(operation: str, chosen: str, why: str) -> None:
    logger.info("PBSA %s: auto took backend %s: %s", operation, chosen, why)


def preferred_block_tokens(device: torch.device | str) -> int:
    """Tokens per block that the kernels for this device run fastest: 128 on Hopper, where it was measured, else 64."""
    device = torch.device(device)
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return 128 if hopper and triton_missing() is None else 64


def backend_report() -> dict[str, str]:
    """For each backend "available", or the reason why it is not, on this machine's default device."""
    device = torch.device("cuda" if torch.cuda.is_available() and not interpreter_on() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    call = Call("attention", device, dtype, head_dim=128, block_tokens=64)
    return {name: needs.why_not(call) or "available" for name, needs in BACKENDS.items()}
