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
    if x.dim() != len(shape) or any(want not in (None, have) for want, have in zip(shape, x.shape)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        called = f"be {letters} =" if letters else "have shape"
        raise ValueError(f"{name} must {called} [{wanted}], got {list(x.shape)}")
    if dtype is not None and x.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {x.dtype}; convert it with .to({dtype})")
    if x.device != device:
        raise ValueError(f"{name} must be on {device}, got {x.device}; move it with .to({str(device)!r})")
