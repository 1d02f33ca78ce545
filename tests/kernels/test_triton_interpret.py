"""The Triton kernels without a GPU, in Triton's interpreter.

The interpreter must be on before Triton is imported, so from a plain run one test starts this file, and the semantics,
in a process of their own. bfloat16 is left out: the interpreter computes its products wrongly.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pbsa_oracle import assert_gradients_within_eager_error, assert_within_eager_error, make_problem
from sparse_forcing_pack.kernels import backend_report, pbsa_attention, route

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_in_a_process starts")


@pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
def test_in_a_process():
    here = Path(__file__).parent
    names = ("triton_interpret", "semantics", "gradients", "variants", "operators")
    files = [str(here / f"test_{name}.py") for name in names]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        command, env=env, cwd=here.parents[1], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@inside
def test_interpreter_is_reported():
    assert backend_report() == {"triton": "available", "reference": "available"}


@inside
@pytest.mark.parametrize("tokens", [16, 64])
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_float16(tokens, dim):
    problem = make_problem(groups=2, blocks=2, slots=5, tokens=tokens, dim=dim, longest=4)
    assert_within_eager_error(problem.to(torch.float16), "triton")


@inside
@settings(max_examples=10, deadline=None)
@given(
    groups=st.integers(1, 2),
    blocks=st.integers(1, 4),
    slots=st.integers(1, 6),
    tokens=st.sampled_from([16, 32]),
    dim=st.integers(16, 48),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    padding=st.sampled_from(["any", "finite", "none"]),
    data=st.data(),
)
def test_property_attention_and_gradients(groups, blocks, slots, tokens, dim, dtype, padding, data):
    longest, shared = data.draw(st.integers(1, slots)), data.draw(st.booleans())
    shape = {"groups": groups, "blocks": blocks, "slots": slots, "tokens": tokens, "dim": dim}
    problem = make_problem(**shape, longest=longest, shared=shared, seed=data.draw(st.integers(0, 999)))
    problem = problem.promising(padding).to(dtype)
    assert_within_eager_error(problem, "triton", padding=padding)
    assert_gradients_within_eager_error(problem, "triton", padding=padding)


@inside
@pytest.mark.parametrize("shared", [False, True])
def test_every_element_of_the_attention_is_written(poisoned_empty, shared):
    problem = make_problem(dim=24, shared=shared)
    out, lse = problem.run("triton")
    assert poisoned_empty and out.isfinite().all() and not lse.isnan().any()
    assert all(gradient.isfinite().all() for gradient in problem.gradients("triton", torch.float32))


@inside
def test_every_element_of_the_router_is_written(poisoned_empty):
    slots = torch.randperm(9, generator=torch.Generator().manual_seed(0)).to(torch.int32).expand(2, -1)
    pooled_q, pooled_k = torch.randn(2, 3, 64), torch.randn(2, 9, 64)
    lists, shares = route(pooled_q, pooled_k, slots[:, :3], slots[:, 3:], 4, backend="triton")
    assert poisoned_empty and shares.isfinite().all()
    assert (lists.idx >= 0).all() and (lists.idx < 9).all() and (lists.idx.diff(dim=-1) > 0).all()


@pytest.fixture
def poisoned_empty(monkeypatch) -> list[torch.Size]:
    """torch.empty gives NaN, or the largest integer, so that an element nobody writes shows; -> shapes made so."""
    made: list[torch.Size] = []

    def empty(*args, **kwargs):
        fresh = torch.zeros(*args, **kwargs)
        made.append(fresh.shape)
        poison = float("nan") if fresh.is_floating_point() else torch.iinfo(fresh.dtype).max
        return fresh.fill_(poison)

    monkeypatch.setattr(torch, "empty", empty)
    return made


@inside
def test_refusals_name_the_reason():
    problem = make_problem().to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="interpreter computes bfloat16 products wrongly"):
        problem.run("triton")


@inside
def test_auto_leaves_the_interpreter_to_tests():
    problem = make_problem()
    args = (problem.q, problem.k_pages, problem.v_pages, problem.page_len, problem.lists)
    for chosen, reference in zip(pbsa_attention(*args), pbsa_attention(*args, backend="reference")):
        assert torch.equal(chosen, reference)
