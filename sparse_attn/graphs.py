"""CUDA graph capture under torch's own allocator and under cudaMallocAsync.

What is captured has run before with the same shapes and an active `kernels.workspace`: kernels are compiled and tested,
libraries have chosen their plans, and every tensor that a kernel of ours reads or writes exists. So a capture makes
launches and little else. If it fails nevertheless, the process must survive: under cudaMallocAsync a tensor that was
allocated in a capture which failed cannot be freed (the allocator throws from a destructor, which ends the process), so
all of them are kept for good.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .frame_queue import side_stream

Result = TypeVar("Result")


@dataclass
class Graph:
    """A captured pass: the inputs it reads, its replay, the flow it writes, and what each page got in each layer."""

    inputs: Any
    replay: Callable[[], None]
    flow: Tensor | None
    shares: list[Tensor | None]


@dataclass
class Prompt:
    """Where graphs find a prompt's keys and values, and the list that they were copied from."""

    own: list[tuple[Tensor, Tensor, Tensor]]
    source: list[tuple[Tensor, Tensor, Tensor]]


@dataclass
class Graphs:
    """The graphs of a stream by key, which keys earlier chunks had, and why there are none, if there are none."""

    captured: dict[tuple, Graph] = field(default_factory=dict)
    met: dict[tuple, int] = field(default_factory=dict)  # key -> the chunk that had it first
    prompts: dict[tuple, Prompt] = field(default_factory=dict)  # by shape
    failure: str | None = None
    pool: Any = None


def new_pool() -> Any:
    """Return a memory pool that graphs replayed one after another can share."""
    return torch.cuda.graph_pool_handle()


def unusable() -> str | None:
    """Why no graph can be captured in this process any more, or None."""
    return _broken[0] if _broken else None


_broken: list[str] = []


def record(run: Callable[[], Result], pool: Any) -> tuple[Callable[[], None], Result]:
    """Capture `run` as a CUDA graph; return its replay and its result, which every replay writes anew.

    The result lies in memory that existed before. Raises what the capture raises; the device works on, but under
    cudaMallocAsync the process captures nothing more (`unusable`). Garbage is not collected meanwhile: that could free
    tensors of other streams.
    """
    if reason := unusable():
        raise RuntimeError(reason)
    graph, made, stream = torch.cuda.CUDAGraph(), _Made(), _capture_stream()
    torch.cuda.synchronize()
    # not torch.cuda.graph: where ending the capture fails, it leaves its own stream the current one
    with torch.cuda.stream(stream), _no_collection():
        # "thread_local": another thread may use the device, which would else end the capture
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            with made:
                result = run()
            made.tensors.clear()
        except BaseException as error:
            _give_up(graph, made.tensors, error)
            raise
        graph.capture_end()
    return graph.replay, result


def _capture_stream() -> torch.cuda.Stream:
    """One for all captures: PyTorch hands out few streams in turn, and a new one could be the decoder's."""
    return side_stream(torch.device("cuda", torch.cuda.current_device()), "capture")


def _give_up(graph: torch.cuda.CUDAGraph, tensors: list[Any], error: BaseException) -> None:
    with contextlib.suppress(RuntimeError):  # that the capture is invalid is known
        graph.capture_end()
    if torch.cuda.get_allocator_backend() == "cudaMallocAsync":
        _keep_for_good([graph, *tensors])
        _broken.append(f"an earlier capture failed: {type(error).__name__}")


def _keep_for_good(objects: list[Any]) -> None:
    """Take a reference that nothing gives back, not even the interpreter's end."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(objects))


class _Made(TorchDispatchMode):
    """Keeps what operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.tensors.append(result)
        return result


@contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
