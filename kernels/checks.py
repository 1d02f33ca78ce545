"""What both kernel packages ask of a tensor before they take it."""

from __future__ import annotations

import torch
from torch import Tensor


def expect(
    name: str,
    x: Tensor,
    shape: tuple[int | None, ...],
    device: torch.device,
    dtype: torch.dtype | None = None,
    letters: str | None = None,
) -> None:
    """Raise ValueError unless x has this shape (None: any size), device and dtype (None: any).

    letters: what the sizes are called, for the message, as "[G, NQ, D]".
    """
    if not _fits(x.shape, shape):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        called = f"be {letters} =" if letters else "have shape"
        raise ValueError(f"{name} must {called} [{wanted}], got {list(x.shape)}")
    if dtype is not None and x.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {x.dtype}; convert it with .to({dtype})")
    if x.device != device:
        raise ValueError(f"{name} must be on {device}, got {x.device}; move it with .to({str(device)!r})")


def _fits(sizes: torch.Size, shape: tuple[int | None, ...]) -> bool:
    if len(sizes) != len(shape):
        return False
    for have, want in zip(sizes, shape):  # noqa: SIM110 - `all` takes twice as long, and a pass asks a thousand times
        if want is not None and want != have:
            return False
    return True
