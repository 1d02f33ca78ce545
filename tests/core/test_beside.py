"""One thread beside the caller: order, failures, modes, and nothing left when it is closed."""

import threading
import time

import pytest
import torch
from sparse_forcing_pack.sparse_attn import beside
from sparse_forcing_pack.sparse_attn.beside import THREAD, Beside, pays_on


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(THREAD)]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    assert not threads()
    yield
    assert not threads()


def test_results_come_in_order_from_one_thread():
    done = []

    def work(x, wait):
        time.sleep(wait)
        done.append(threading.current_thread().name)
        return x + 1, "beside"

    with Beside("cpu") as beside:
        assert not beside.ready and not len(beside)
        for i, wait in enumerate((0.05, 0.0, 0.01)):
            beside.put(work, torch.tensor(i), wait)
        assert len(beside) == 3
        assert [beside.take() for _ in range(3)] == [(1, "beside"), (2, "beside"), (3, "beside")]
        assert not len(beside)
    assert len(set(done)) == 1 and done[0].startswith(THREAD)


def test_the_caller_goes_on_meanwhile():
    gate = threading.Event()
    with Beside("cpu") as beside:
        beside.put(gate.wait, 30)
        assert not beside.ready
        gate.set()
        assert beside.take() is True


def test_a_failure_is_raised_where_its_result_is_asked_for():
    with Beside("cpu") as beside:
        beside.put(lambda: 1)
        beside.put(lambda: 1 / 0)
        beside.put(lambda: 3)
        assert beside.take() == 1
        with pytest.raises(ZeroDivisionError):
            beside.take()
        assert beside.take() == 3


def test_closing_waits_for_what_is_under_way_and_drops_the_rest():
    begun, gate, done = threading.Event(), threading.Event(), []

    def slow():
        begun.set()
        gate.wait(30)
        done.append("slow")

    beside = Beside("cpu")
    beside.put(slow)
    beside.put(done.append, "dropped")
    begun.wait(30)
    threading.Timer(0.05, gate.set).start()
    beside.close()
    assert done == ["slow"] and not len(beside)
    beside.close()  # a second time does no harm


def test_leaving_by_an_exception_closes():
    def leave():
        with Beside("cpu") as beside:
            beside.put(time.sleep, 0.01)
            raise KeyError

    with pytest.raises(KeyError):
        leave()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_callers_modes_hold(mode):
    def modes():
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    with Beside("cpu") as beside, mode():
        beside.put(modes)
        assert beside.take() == modes()


def test_it_is_on_where_it_pays(monkeypatch):
    assert not pays_on("cpu") and not pays_on("cuda")
    monkeypatch.setattr(beside, "DEVICES", ("cuda",))
    assert pays_on("cuda:0") and not pays_on("cpu") and not pays_on(torch.device("meta"))
