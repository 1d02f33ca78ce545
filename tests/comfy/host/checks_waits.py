"""Nothing in a pass or between chunks waits for the device; checks_cuda.py has the same with CUDA's own watch."""

from __future__ import annotations

import traceback

import comfy.conds
import torch
from checks_common import MODES, apply, noise, our_sampler, pack, sample, tiny_model
from checks_fast import fast_on_the_cpu
from torch.utils._python_dispatch import TorchDispatchMode

STEPS = 4
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")


def _reader() -> str | None:
    """The line of the pack or of ComfyUI that reads; None for the CPU's kernels, which a GPU does not run."""
    frames = [
        f for f in traceback.extract_stack() if "site-packages" not in f.filename and __file__ != f.filename
    ]
    last = frames[-1]
    return None if last.filename.endswith("reference.py") else f"{last.filename}:{last.lineno}"


class Reads(TorchDispatchMode):
    """Counts what hands a tensor's values to the host, while it is `counting`."""

    def __init__(self):
        super().__init__()
        self.counting, self.found = False, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.counting and func._schema.name in READS and (reader := _reader()):
            self.found.append(f"{func._schema.name} at {reader}")
        return func(*args, **(kwargs or {}))


def check_waits_not_for_a_value_once_the_first_chunk_is_made():
    for name in ("sparse", "sparse, novelty", "window"):
        reads, model = Reads(), apply(tiny_model(), **MODES[name])

        def after_pass(step, x0, x, steps, reads=reads):
            reads.counting = STEPS < step < steps - 1

        with fast_on_the_cpu() as said, reads:
            sample(model, our_sampler(3), noise(15), report=after_pass)
        assert "runs its fast pass" in said[0], said
        assert not reads.found, (name, reads.found)


def check_waits_not_for_conditioning():
    """It is put on the device once, and what belongs to others stays where it was."""
    rows, several = torch.zeros(1, 8, 4096), [torch.zeros(2), torch.zeros(3)]
    shared = {
        "c_crossattn": comfy.conds.CONDRegular(rows),
        "several": comfy.conds.CONDList(several),
        "number": comfy.conds.CONDConstant(3),
    }
    entry = {"model_conds": shared, "uuid": 1}
    pack("nodes.recovery").keep_on_device({"positive": [entry, {"uuid": 2}]}, torch.device("meta"))
    placed = entry["model_conds"]
    assert placed["c_crossattn"].cond.is_meta and type(placed["c_crossattn"]) is comfy.conds.CONDRegular
    assert all(part.is_meta for part in placed["several"].cond)
    assert placed["number"].cond == 3
    assert shared["c_crossattn"].cond is rows and shared["several"].cond is several
