"""Named device buffers for what kernels write, so that a CUDA graph captures no allocation that a kernel sees.

ComfyUI's default allocator on NVIDIA is cudaMallocAsync. Under it, memory that is allocated while a graph is captured
is unknown to the driver's pointer query that Triton makes for every tensor argument: the launch raises ValueError,
and the capture is lost (`sparse_attn.graphs`). So a pass runs once eagerly with a workspace active, which makes every
buffer; a capture of the same pass then finds all of them and allocates nothing that a kernel reads or writes.

    workspace = Workspace()
    with workspace:
        run()          # makes the buffers
        run()          # uses them again: what the first call returned is overwritten

Launchers take their outputs from `empty`, and tensors that other operators computed pass through `held` or `dense`.
Without an active workspace these are `torch.empty`, the tensor itself and `Tensor.contiguous`.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

_thread = threading.local()


class Workspace:
    """Buffers by name; a context in which `empty`, `held` and `dense` of this thread take them.

    A name has one buffer, as large as its largest request. A larger request replaces it; the replaced buffer stays
    allocated, because captured graphs may use it. Results are valid until the same name is requested again.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device], Tensor] = {}
        self._views: dict[tuple, Tensor] = {}  # of buffers, by request: a pass makes hundreds of them
        self._replaced: list[Tensor] = []
        self._outer: Workspace | None = None

    def __enter__(self) -> Workspace:
        self._outer, _thread.active = active(), self
        return self

    def __exit__(self, *_: object) -> None:
        _thread.active, self._outer = self._outer, None

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.numel() for buffer in (*self._buffers.values(), *self._replaced))

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised [*shape] in the buffer of this name."""
        key = name, shape, dtype, device
        view = self._views.get(key)
        if view is None:
            view = self._views[key] = self._view(*key)
        return view

    def _view(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = max(1, math.prod(shape)) * dtype.itemsize
        buffer = self._buffers.get((name, device))
        if buffer is None or buffer.numel() < size:
            if buffer is not None:
                self._replaced.append(buffer)
                self._views = {key: view for key, view in self._views.items() if key[0] != name}
            buffer = torch.empty(size, dtype=torch.uint8, device=device)
            self._buffers[name, device] = buffer
        return buffer[:size].view(dtype)[: math.prod(shape)].view(shape)


def active() -> Workspace | None:
    """The workspace of this thread, if one is active."""
    return getattr(_thread, "active", None)


def empty(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised [*shape]: the active workspace's buffer of this name, or new."""
    workspace = active()
    if workspace is None:
        return torch.empty(shape, dtype=dtype, device=device)
    return workspace.empty(name, shape, dtype, device)


def held(name: str, x: Tensor) -> Tensor:
    """x for a kernel: copied into the active workspace's buffer of this name, contiguous; without one, x itself."""
    workspace = active()
    if workspace is None:
        return x
    return workspace.empty(name, x.shape, x.dtype, x.device).copy_(x)


def dense(name: str, x: Tensor) -> Tensor:
    """x, contiguous: itself where it is, else a copy, in the active workspace's buffer of this name if there is one."""
    if x.is_contiguous():
        return x
    return x.contiguous() if active() is None else held(name, x)
