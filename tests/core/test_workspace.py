"""The workspace: one buffer per name, and passes that show kernels no memory younger than their first pass."""

import gc
import importlib.util
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sparse_forcing_pack.kernels.workspace import Workspace, active, dense, empty, held
from sparse_forcing_pack.sparse_attn import fast
from sparse_forcing_pack.sparse_attn.config import AttentionConfig
from sparse_forcing_pack.sparse_attn.fast import FastModel, FastOptions, FastPass
from sparse_forcing_pack.sparse_attn.state import StreamState
from sparse_forcing_pack.sparse_attn.wan import WanModel

CPU = torch.device("cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def test_empty_by_name():
    with Workspace() as workspace:
        first = empty("a", (2, 3), torch.float32, CPU)
        again, half = empty("a", (3, 2), torch.float32, CPU), empty("a", (2,), torch.float16, CPU)
        other = empty("b", (2, 3), torch.float32, CPU)
        assert first.data_ptr() == again.data_ptr() == half.data_ptr() != other.data_ptr()
        assert again.shape == (3, 2) and half.dtype == torch.float16 and again.is_contiguous()
        assert workspace.nbytes == 2 * 24
    assert active() is None
    assert empty("a", (2, 3), torch.float32, CPU).data_ptr() != first.data_ptr()


def test_empty_larger_keeps_the_replaced_buffer():
    with Workspace() as workspace:
        small = empty("a", (4,), torch.float32, CPU).fill_(1)
        large = empty("a", (8,), torch.float32, CPU).fill_(2)
        assert small.data_ptr() != large.data_ptr() and small.eq(1).all()
        assert empty("a", (4,), torch.float32, CPU).data_ptr() == large.data_ptr()
        assert workspace.nbytes == 16 + 32, "captured graphs may use the replaced one"
        assert empty("none", (0, 4), torch.float32, CPU).shape == (0, 4)


def test_held_and_dense():
    x = torch.randn(3, 4)
    assert held("x", x) is x and dense("x", x) is x and dense("x", x.T).is_contiguous()
    with Workspace() as workspace:
        copy = held("x", x.T)
        assert copy.equal(x.T) and copy.is_contiguous() and copy.data_ptr() == dense("x", x.T).data_ptr()
        assert dense("y", x) is x and workspace.nbytes == 48


def test_active_is_per_thread_and_nests():
    seen = []
    with Workspace() as outer:
        thread = threading.Thread(target=lambda: seen.append(active()))
        thread.start()
        thread.join()
        with Workspace() as inner:
            assert active() is inner
        assert active() is outer
    assert seen == [None] and active() is None


# --- what a capture shows to kernels, in Triton's interpreter; under the allocator itself, on a GPU ---

GRID = (2, 3)
SPARSE = AttentionConfig(block_tokens=16, backend="triton", persistent_frames=3)
MEMORIES = {
    "shared": SPARSE,
    "page_bits8": replace(SPARSE, page_bits=8, positions="rebased", router="quarters", keep="novelty"),
    "window": AttentionConfig(mode="window", backend="triton"),
}
SHARED = FastOptions(router_once=True, reuse_persistent=True)


@pytest.mark.interpret
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
def test_capture_in_a_process():
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    here = Path(__file__)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(here)]
    done = subprocess.run(
        command, env=env, cwd=here.parents[2], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_graphs_under_cuda_malloc_async():
    """ComfyUI's default on NVIDIA. It can only be chosen before a process uses the device."""
    env = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}
    here = Path(__file__).parent
    files = [str(here / "test_fast.py"), str(here / "test_share_open.py"), str(here / "test_offload.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


FAILS = """
import sys
sys.path[:0] = {path!r}
import conftest  # loads the pack
import torch
from sparse_forcing_pack.sparse_attn.graphs import new_pool, record, unusable
assert torch.cuda.get_allocator_backend() == {backend!r}
x = torch.full((512, 512), 0.1, device="cuda")

def run(fails):
    y = (x @ x).relu()
    if fails == "raises":
        raise ValueError("planted")
    if fails == "waits":
        y.sum().item()
    x.copy_(y)
    return x

run("")
before = torch.cuda.current_stream()
try:
    record(lambda: run({fails!r}), new_pool())
    raise SystemExit("not raised")
except Exception as error:
    print("caught", type(error).__name__)
assert torch.cuda.current_stream() == before
x.fill_(0.01)
if not unusable():
    replay, result = record(lambda: run(""), new_pool())
    replay()
else:
    run("")
more = [torch.empty(2**28, device="cuda") for _ in range(4)]
del more
torch.cuda.empty_cache()
print("alive", round(float(x[0, 0]), 4), unusable())
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("fails", ["raises", "waits"])
@pytest.mark.parametrize("backend", ["native", "cudaMallocAsync"])
def test_record_failure_leaves_the_process_alive(backend, fails):
    env = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": f"backend:{backend}"}
    root = Path(__file__).parents[2]
    script = FAILS.format(path=[str(root / "tests")], backend=backend, fails=fails)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "caught" in done.stdout, done.stdout + done.stderr[-3000:]
    assert ("alive 0.0512 None" in done.stdout) == (backend == "native"), done.stdout
    assert "alive 0.0512" in done.stdout


@contextmanager
def only_known_memory():
    """Fail where a kernel is launched on a tensor whose storage did not exist before."""
    from triton.runtime.interpreter import GridExecutor

    known = {x.untyped_storage()._cdata for x in gc.get_objects() if issubclass(type(x), torch.Tensor)}
    launch = GridExecutor.__call__

    def checked(self, *args, **kwargs):
        for place, x in enumerate(args):
            if isinstance(x, torch.Tensor) and x.numel():
                assert x.untyped_storage()._cdata in known, f"argument {place} of {self.fn.__name__} is new"
        return launch(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", checked)
        yield


def recorder(memory):
    """As `graphs.record`: the pass as it is captured, each launch checked; the memory is left as it was."""

    def record(run, pool):
        before = {name: x.clone() for name, x in memory.cache.tensors().items()}
        with only_known_memory():
            result = run()
        for name, x in memory.cache.tensors().items():
            x.copy_(before[name])
        getattr(memory.cache, "finished", set()).clear()

        def replay():
            with only_known_memory():
                run()

        return replay, result

    return record


@pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_capture_in_a_process starts")
@pytest.mark.parametrize("name", MEMORIES)
def test_capture_shows_kernels_no_new_memory(monkeypatch, name):
    options = SHARED if name == "shared" else FastOptions()
    monkeypatch.setattr(fast, "new_pool", lambda: "pool")
    monkeypatch.setattr(FastPass, "_why_no_graph", lambda self: None if self.options.graphs else "off")
    model, flows, runs = two_layers(), [], []
    text = model.cross_kv(torch.randn(1, 6, 24, generator=torch.Generator().manual_seed(0)))
    for chosen in (options, replace(options, graphs=False)):
        memory = StreamState(
            layers=2,
            heads=1,
            head_dim=32,
            grid=GRID,
            chunk_frames=3,
            attention=MEMORIES[name],
            share_open=True,
        )
        monkeypatch.setattr(fast, "record", recorder(memory))
        run = FastPass(FastModel(model, chosen), memory)
        runs.append(run)
        flows.append(stream(run, memory, text, chunks=4))
    assert runs[0].graphs.captured and runs[0].graphs.failure is None
    assert all(torch.equal(a, b) for a, b in zip(*flows))


def two_layers():
    torch.manual_seed(0)
    model = WanModel(dim=32, ffn_dim=48, num_heads=1, num_layers=2, text_dim=24, freq_dim=16)
    for p in model.parameters():
        p.data = torch.randn_like(p) * 0.2
    return model.requires_grad_(False)


def stream(run, memory, text, chunks):
    draw, flows = torch.Generator().manual_seed(1), []
    for _ in range(chunks):
        memory.begin_chunk(3)
        for sigma in (1.0, 0.6):
            memory.noisy = True
            flows.append(run(torch.randn(1, 16, 3, 2 * GRID[0], 2 * GRID[1], generator=draw), sigma, text))
        memory.noisy = False
        run.remember(flows[-1], text)
        memory.end_chunk()
    return flows
