"""Say that kernels are compiled, where that takes long enough to be noticed: in the first passes on a machine."""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from .report import show_text

logger = logging.getLogger("sparse_forcing.nodes")

NOTICED = 2.0  # seconds
_ready: set[Hashable] = set()  # kinds of passes that this process has run


@contextmanager
def said_while_compiling(kind: Hashable) -> Iterator[None]:
    """Around a pass on a GPU: the first of its kind in a process says on the node and in the log that it may compile.

    Launches are asynchronous and compilation is not, so the time inside tells which it was.
    """
    if kind in _ready:
        yield
        return
    first = not _ready
    if first:
        show_text("Preparing kernels. Compiling them takes up to 20 s, once per machine.", _node_id())
        logger.info("Sparse Forcing prepares its kernels; compiling them takes up to 20 s, once per machine.")
    began = time.monotonic()
    yield
    _ready.add(kind)
    took = time.monotonic() - began
    if first:
        show_text(f"Kernels were ready after {took:.1f} s.", _node_id())
    if took > NOTICED:
        logger.info("Kernels were compiled in %.1f s; Triton's cache keeps them for the next start.", took)


def _node_id() -> str | None:
    """The node that is being executed, where the host tells."""
    try:
        from comfy_execution.utils import get_executing_context
    except ImportError:
        return None
    context = get_executing_context()
    return None if context is None else context.node_id
