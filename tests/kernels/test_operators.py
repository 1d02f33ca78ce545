"""The kernels as torch operators: registered whole, traced whole, and once for each copy of the package."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pbsa_oracle import make_problem
from sparse_forcing_pack.kernels import BlockLists, pbsa_attention, route

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_in_a_process")


def small_problem():
    return make_problem(groups=1, blocks=2, slots=3, dim=16, longest=2).promising("finite")


@inside
@pytest.mark.parametrize("targets", [None, torch.tensor([[2, 0]], dtype=torch.int32)])
def test_opcheck_attention(targets):
    from sparse_forcing_pack.kernels.pbsa.triton import ops

    p = small_problem()
    p.lists.cnt.fill_(2)  # opcheck compares lse with itself, and -inf - -inf is NaN
    args = (p.q, p.k_pages, p.v_pages, p.page_len, *p.lists, targets, 0.25, "finite")
    promise = (0, 0, 0)  # least_tokens and the gap, which gradients need not know
    out, lse = ops.attention(*args, *promise)
    torch.library.opcheck(ops.attention_backward, (out, lse, out, lse, *args))
    for x in args[:3]:
        x.requires_grad_()
    torch.library.opcheck(ops.attention, args + promise)


@inside
def test_opcheck_pool_pages():
    from sparse_forcing_pack.kernels.pbsa.triton import ops

    p = small_problem()
    torch.library.opcheck(ops.pool_pages, (p.k_pages.requires_grad_(), p.page_len))


@inside
def test_opcheck_routes_and_masses():
    from sparse_forcing_pack.kernels.pbsa.triton import ops

    slots = torch.arange(5, dtype=torch.int32)[None]
    always, local = slots[:, :2].contiguous(), slots[:, 2:].contiguous()
    torch.library.opcheck(ops.route, (torch.randn(1, 3, 16), torch.randn(1, 5, 16), always, local, 2, 0.25))
    parts = [torch.full((1, n, 4), 4, dtype=torch.int32) for n in (3, 5)]
    vectors = torch.randn(1, 3, 4, 16), torch.randn(1, 5, 4, 16)
    p, lse = small_problem(), torch.randn(small_problem().q.shape[:3])
    q_len = torch.full(p.q.shape[:2], 16, dtype=torch.int32)
    torch.library.opcheck(ops.attention_mass, (p.q, p.k_pages, p.page_len, *p.lists, q_len, lse, 0.25))
    torch.library.opcheck(ops.route_parts, (*vectors, *parts, always, local, 2, 0.25))


def test_compiles_in_one_graph(backend):
    """Router, attention and gradients, with nothing left to Python between them."""
    name, device = backend
    if device != "cpu":
        pytest.skip("compiled on the CPU")

    def chunk(q, k_pages, v_pages, pooled_k, page_len, slots):
        lists, shares = route(q.detach().mean(2), pooled_k, slots[:, :1], slots[:, 1:], 1, backend=name)
        out, lse = pbsa_attention(q, k_pages, v_pages, page_len, lists, backend=name, padding="finite")
        return (out.sum() + lse.sum()) * shares.sum()

    p = small_problem()
    p.page_len.fill_(16)
    slots = torch.arange(3, dtype=torch.int32)[None]
    leaves = [x.requires_grad_() for x in (p.q, p.k_pages, p.v_pages)]
    rest = p.k_pages.detach().mean(2), p.page_len, slots
    torch._dynamo.reset()
    compiled = torch.compile(chunk, fullgraph=True, backend="aot_eager")
    ours, plain = compiled(*leaves, *rest), chunk(*leaves, *rest)
    torch.testing.assert_close(ours, plain)
    for one, other in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(plain, leaves)):
        torch.testing.assert_close(one, other)


@inside
def test_lists_are_outside_the_graph_of_gradients():
    p = small_problem()
    p.q.requires_grad_()
    out, lse = pbsa_attention(p.q, p.k_pages, p.v_pages, p.page_len, BlockLists(*p.lists), backend="triton")
    assert out.requires_grad and lse.requires_grad


@pytest.mark.skipif(INTERPRETED, reason="starts its own process")
def test_two_copies_of_the_package_live_in_one_process(tmp_path):
    """As when a pack is installed twice under two folder names: each copy runs its own operators."""
    copy = tmp_path / "another name"
    shutil.copytree(ROOT / "kernels", copy / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "__init__.py").touch()
    script = f"""
import importlib, importlib.util, sys, torch
def load(name, root):
    spec = importlib.util.spec_from_file_location(name, root + "/__init__.py", submodule_search_locations=[root])
    sys.modules[name] = importlib.util.module_from_spec(spec)
    return importlib.import_module(name + ".kernels"), importlib.import_module(name + ".kernels.pbsa.triton.ops")
copies = [load("one", {str(copy)!r}), load("another name", {str(copy)!r})]
slots = torch.zeros(1, 1, 1, dtype=torch.int32)
x, count = torch.ones(1, 1, 16, 16), torch.ones(1, 1, dtype=torch.int32)
for kernels, ops in copies:
    out, _ = kernels.pbsa_attention(x, x, x, count * 16, kernels.BlockLists(slots, count), backend="triton")
    assert torch.equal(out, x)
print(*(ops.attention.name() for _, ops in copies))
"""
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False, env=env
    )
    assert done.stdout.split() == ["sparse_forcing::pbsa_attention", "sparse_forcing::pbsa_attention_"], (
        done.stderr
    )
