"""A queue between the device that decodes frames and the thread that encodes, writes and shows them.

The sampling thread launches the decoder and the copies of its frames into pinned memory on a CUDA stream of their own,
and never waits for the device. One worker thread waits for the copies and uses the frames; it launches nothing. So
decoding and encoding a chunk overlap with the passes of the next one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

THREAD = "sparse_forcing_frames"  # prefix of the worker's name
LIMIT = 2  # chunks that wait for the worker, or are with it
SLICE_SECONDS = 0.05  # between two calls of `on_wait`

Decode = Callable[[], tuple[Tensor, ...]]


class _Launched(NamedTuple):
    """Results on the CPU once `copied` has passed, and what must stay referenced until then."""

    results: tuple[Tensor, ...]
    copied: torch.cuda.Event | None
    references: Any


class FrameQueue:
    """Decodes on a side stream and hands the results to one worker thread, in order; a context that closes itself.

    device: where the decoder computes. On a CPU it computes in the caller's thread. `on_wait` is called in the caller's
    thread while a method waits, at least every `SLICE_SECONDS`; what it raises ends the wait, and loses nothing that
    was submitted. A failure in the worker drops what was submitted after it; every later call but `close` raises it.
    All methods belong to the caller's thread.
    """

    def __init__(
        self, device: torch.device | str, limit: int = LIMIT, on_wait: Callable[[], None] = lambda: None
    ):
        self.device, self.limit, self.on_wait = torch.device(device), limit, on_wait
        self._side = side_stream(self.device, THREAD) if self.device.type == "cuda" else None
        self._worker = ThreadPoolExecutor(1, THREAD)
        self._submitted: deque[tuple[Future[None], _Launched]] = deque()
        self._failure: BaseException | None = None
        self._raised = False

    def __enter__(self) -> FrameQueue:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, decode: Decode, use: Callable[..., object]) -> None:
        """Launch decode() -> tensors; use(*the same on the CPU) follows in the worker, in inference mode.

        decode sees all that the current stream was given before, and is kept until it has run on the device, with the
        tensors that it refers to. It launches work and does not wait. Raises what `decode` raises.
        """
        self.check()
        launched = self._launch(decode)
        self._submitted.append((self._worker.submit(self._use, launched, use), launched))

    def wait_for_room(self) -> None:
        """Wait until at most `limit` chunks are submitted and not used."""
        self._wait(self.limit)

    def settle(self) -> None:
        """Wait until all that was submitted is used."""
        self._wait(0)

    def check(self) -> None:
        """Raise what failed in the worker, if anything has. Does not wait."""
        while self._submitted and self._submitted[0][0].done():
            self._submitted.popleft()
        if self._failure is not None:
            self._raised = True
            raise self._failure

    def close(self) -> BaseException | None:
        """Use all that was submitted, end the thread, and return a failure that no call has raised yet.

        May be called again, also after an interrupt in the middle of it.
        """
        self._worker.shutdown()
        self._submitted.clear()
        failure = None if self._raised else self._failure
        self._raised = True
        return failure

    @contextmanager
    def aside(self) -> Iterator[None]:
        """On the side stream, after what the current stream was given: for the decoder's state, which belongs there."""
        if self._side is None:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            yield

    def _wait(self, limit: int) -> None:
        self.check()
        while len(self._submitted) > limit:
            wait([self._submitted[0][0]], timeout=SLICE_SECONDS)
            self.on_wait()
            self.check()

    def _launch(self, decode: Decode) -> _Launched:
        with self.aside():
            made = decode()
            if self._side is None:
                return _Launched(made, None, None)
            results = tuple(_copy_to_pinned(tensor) for tensor in made)
            copied = torch.cuda.Event(blocking=True)  # waiting for it leaves the CPU core to others
            copied.record(self._side)
            return _Launched(results, copied, (decode, made))

    def _use(self, launched: _Launched, use: Callable[..., object]) -> None:
        """In the worker."""
        if self._failure is not None:
            return
        try:
            if launched.copied is not None:
                launched.copied.synchronize()
            with torch.inference_mode():
                use(*launched.results)
        except BaseException as error:
            self._failure = error


def _copy_to_pinned(tensor: Tensor) -> Tensor:
    """A copy on the CPU that is complete when the current stream has come here. PyTorch reuses pinned memory."""
    if not tensor.is_cuda:
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


@cache
def side_stream(device: torch.device, use: str) -> torch.cuda.Stream:
    """One per device and use, for all runs: PyTorch caches memory per stream."""
    return torch.cuda.Stream(device)
