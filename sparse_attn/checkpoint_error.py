"""How a checkpoint is refused."""

from __future__ import annotations

from collections.abc import Iterable

SHOWN = 8  # keys listed by a refusal, of each kind


class CheckpointError(ValueError):
    """A file that cannot be used; the message names it and says why and what to do."""


def some_names(names: Iterable[str]) -> str:
    names = list(names)
    rest = len(names) - SHOWN
    return (", ".join(names[:SHOWN]) or "none") + (f" and {rest} more" if rest > 0 else "")
