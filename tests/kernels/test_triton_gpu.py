"""The Triton kernels on a GPU, in the precisions that matter there, at sizes that fill it."""

import pytest
import torch
from pbsa_oracle import assert_within_eager_error, make_problem
from sparse_forcing_pack.kernels import backend_report, route
from sparse_forcing_pack.kernels.pbsa.constraints import TRITON, Call

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    call = Call("attention", torch.device("cuda"), torch.float16, head_dim=128, block_tokens=64)
    if reason := TRITON.why_not(call):
        pytest.skip(f"triton {reason}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [16, 32, 64, 128])
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_attention(dtype, tokens, dim):
    problem = make_problem(groups=3, blocks=9, slots=24, tokens=tokens, dim=dim, longest=17)
    assert_within_eager_error(problem.to(dtype).to("cuda"), "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared", [False, True])
def test_attention_of_a_chunk(dtype, shared):
    problem = make_problem(groups=12, blocks=20, slots=96, tokens=64, dim=128, longest=60, shared=shared)
    assert_within_eager_error(problem.to(dtype).to("cuda"), "triton")


@pytest.mark.parametrize("slots", [48, 600, 2048])
def test_router_at_full_size(slots):
    draw = torch.Generator().manual_seed(slots)
    fixed, free = slots // 4, slots // 2
    # whole numbers: scores are exact whatever the order of summation, and ties are many
    pooled_q, pooled_k = ((torch.randn(4, n, 128, generator=draw) * 0.7).round() for n in (30, slots))
    order = torch.rand(4, slots, generator=draw).argsort(-1).to(torch.int32)
    problem = (pooled_q, pooled_k, order[:, :fixed], order[:, fixed : fixed + free])
    expected, shares = route(*problem, free // 4, scale=2**-4, backend="reference")
    lists, importance = route(*(x.cuda() for x in problem), free // 4, scale=2**-4, backend="triton")
    assert torch.equal(lists.idx.cpu(), expected.idx)
    torch.testing.assert_close(importance.cpu(), shares, rtol=1e-5, atol=1e-5)


def test_auto_takes_triton_here():
    assert backend_report()["triton"] == "available"
    problem = make_problem().to(torch.bfloat16).to("cuda")
    for chosen, triton in zip(problem.run("auto"), problem.run("triton")):
        assert torch.equal(chosen, triton)
