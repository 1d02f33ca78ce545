"""The queue between decoder and encoder: order, backpressure, failures, interrupts, and what a close keeps."""

import threading

import pytest
import torch
from sparse_forcing_pack.sparse_attn.frame_queue import THREAD, FrameQueue


class Stop(BaseException):
    """As ComfyUI's interrupt."""


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(THREAD)]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    assert not threads()
    yield
    assert not threads()


def frames(number: int):
    return lambda: (torch.tensor([number]),)


def test_submit_uses_results_in_order_in_one_thread():
    seen = []
    with FrameQueue("cpu") as queue:
        for number in range(5):
            queue.submit(frames(number), lambda x: seen.append((int(x), threading.current_thread().name)))
        queue.settle()
        assert [number for number, _ in seen] == [0, 1, 2, 3, 4]
    (name,) = {name for _, name in seen}
    assert name.startswith(THREAD)


def test_submit_decodes_in_the_callers_thread():
    where = []

    def decode():
        where.append(threading.current_thread())
        return (torch.zeros(1),)

    with FrameQueue("cpu") as queue:
        queue.submit(decode, lambda x: None)
        queue.settle()
    assert where == [threading.current_thread()]


def test_wait_for_room_bounds_what_is_submitted():
    gate, begun, waits = threading.Event(), threading.Event(), []

    def use(_x):
        begun.set()
        gate.wait(30)

    def on_wait():
        waits.append(len(queue._submitted))
        gate.set()

    with FrameQueue("cpu", limit=1, on_wait=on_wait) as queue:
        for number in range(2):
            queue.submit(frames(number), use)
        begun.wait(30)
        queue.wait_for_room()
        assert waits and waits[0] == 2 and len(queue._submitted) <= 1


def test_a_failure_in_the_worker_is_raised_by_the_next_calls_and_drops_what_follows():
    used = []

    def fails(_x):
        raise OSError("the disk is full")

    queue = FrameQueue("cpu")
    queue.submit(frames(0), used.append)
    queue.submit(frames(1), fails)
    queue.submit(frames(2), used.append)
    with pytest.raises(OSError, match="disk is full"):
        queue.settle()
    with pytest.raises(OSError, match="disk is full"):
        queue.check()
    with pytest.raises(OSError, match="disk is full"):
        queue.submit(frames(3), used.append)
    assert queue.close() is None, "it was raised already"
    assert [int(x) for x in used] == [0]


def test_close_returns_a_failure_that_nobody_saw():
    def fails(_x):
        raise OSError("the disk is full")

    queue = FrameQueue("cpu")
    queue.submit(frames(1), fails)
    assert isinstance(queue.close(), OSError)
    assert queue.close() is None


def test_an_interrupt_while_waiting_loses_nothing():
    gate, used = threading.Event(), []

    def use(x):
        gate.wait(30)
        used.append(int(x))

    def on_wait():
        gate.set()
        raise Stop

    queue = FrameQueue("cpu", on_wait=on_wait)
    for number in range(3):
        queue.submit(frames(number), use)
    with pytest.raises(Stop):
        queue.settle()
    queue.close()
    assert used == [0, 1, 2]


def test_what_decode_raises_is_the_callers():
    def decode():
        raise torch.OutOfMemoryError("no room")

    used = []
    with FrameQueue("cpu") as queue:
        queue.submit(frames(0), used.append)
        with pytest.raises(torch.OutOfMemoryError):
            queue.submit(decode, used.append)
        queue.submit(frames(1), used.append)
    assert [int(x) for x in used] == [0, 1]


def test_leaving_by_an_exception_closes():
    used = []

    def leave():
        with FrameQueue("cpu") as queue:
            queue.submit(frames(7), used.append)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        leave()
    assert [int(x) for x in used] == [7] and not threads()
