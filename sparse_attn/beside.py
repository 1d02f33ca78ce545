"""Work beside the caller's own: handed over in order to one thread, which has a CUDA stream of its own.

So a chunk can be decoded while the next one is denoised. Callers ask `pays_on` first: on a CPU both want the same cores
and little is won, and on CUDA it is off until a host has run it there (docs/speed.md).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

THREAD = "sparse_forcing_beside"  # how the names of the threads begin
# where it is on; "cuda" once a host has run it there, as tests/core/test_gpu.py has
DEVICES: tuple[str, ...] = ()


def pays_on(device: torch.device | str) -> bool:
    """Whether two works at once are faster there than one after the other."""
    return torch.device(device).type in DEVICES


class Beside:
    """One thread that does what is handed over, one work after another; a context that closes itself.

    On a CUDA `device` the thread has a stream of its own. A work sees what the caller's stream had been given when it
    was handed over, and the caller's stream waits for a result that is taken; tensors may cross among a work's
    arguments, and as its result or in a tuple of it. Other tensors may be used in the thread alone, or must outlive
    `close`. The caller's inference and gradient modes hold in the work as well.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self._stream = side_stream(self.device, THREAD) if self.device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, THREAD)
        self._handed: deque[Future[tuple[Any, Any]]] = deque()

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def put(self, work: Callable[..., Any], *given: Any) -> None:
        """Hand over work(*given); it begins when all that was handed over before is done, or has failed."""
        ready = None
        if self._stream is not None:
            ready = torch.cuda.current_stream(self.device).record_event()
            _lend(given, self._stream)
        modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        self._handed.append(self._thread.submit(self._do, work, given, ready, *modes))

    def __len__(self) -> int:
        """Works whose results were not taken yet."""
        return len(self._handed)

    @property
    def ready(self) -> bool:
        """Whether there is a result, or a failure, that `take` need not wait for."""
        return bool(self._handed) and self._handed[0].done()

    def take(self) -> Any:
        """The result of the first work whose result was not taken yet. Waits for it; raises what the work raised."""
        result, done = self._handed.popleft().result()
        if done is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(done)
            _lend(result if isinstance(result, tuple) else (result,), here)
        return result

    def close(self) -> None:
        """Wait for the work under way and drop what has not begun, and all results."""
        self._thread.shutdown(cancel_futures=True)
        self._handed.clear()
        if self._stream is not None:
            self._stream.synchronize()

    def _do(
        self, work: Callable[..., Any], given: tuple, ready: Any, inference: bool, grad: bool
    ) -> tuple[Any, Any]:
        """(result, the event that says when it is there)."""
        aside = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with torch.inference_mode(inference), torch.set_grad_enabled(grad), aside:
            if self._stream is None:
                return work(*given), None
            self._stream.wait_event(ready)
            return work(*given), self._stream.record_event()


@cache
def side_stream(device: torch.device, use: str) -> torch.cuda.Stream:
    """One a device and use, for all runs: memory that PyTorch keeps for a stream's next work serves no other stream."""
    return torch.cuda.Stream(device)


def _lend(values: Iterable[Any], stream: torch.cuda.Stream) -> None:
    """See that the memory of the tensors among `values`, once given back, waits for what `stream` does with it."""
    for value in values:
        if isinstance(value, Tensor) and value.is_cuda:
            value.record_stream(stream)
