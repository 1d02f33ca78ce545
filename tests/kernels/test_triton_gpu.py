"""The Triton kernels on a GPU, in the precisions that matter there, at sizes that fill it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pbsa_oracle import assert_gradients_within_eager_error, assert_within_eager_error, make_problem
from sparse_forcing_pack.kernels import attention_mass, backend_report, pool_pages, route
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


@pytest.mark.parametrize("padding", ["finite", "none"])
@pytest.mark.parametrize("tokens", [64, 128])
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_attention_with_a_promise(padding, tokens, dim):
    """Where a promise lets the copy engine in; lists of no page are among them."""
    problem = make_problem(groups=12, blocks=9, slots=24, tokens=tokens, dim=dim, longest=17)
    problem = problem.promising(padding).to(torch.bfloat16).to("cuda")
    assert_within_eager_error(problem, "triton", padding=padding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [16, 32, 64, 128])
@pytest.mark.parametrize("shared", [False, True])
def test_gradients(dtype, tokens, shared):
    problem = make_problem(groups=3, blocks=6, slots=12, tokens=tokens, dim=128, longest=9, shared=shared)
    targets = torch.tensor([[11, 2, 5], [0, 1, 2], [7, 6, 4]], dtype=torch.int32, device="cuda")
    problem = problem.to(dtype).to("cuda")
    assert_gradients_within_eager_error(problem, "triton")
    assert_gradients_within_eager_error(problem, "triton", grad_pages=targets)


@settings(max_examples=200, deadline=None)
@given(
    groups=st.integers(1, 5),
    blocks=st.integers(1, 9),
    slots=st.integers(1, 20),
    tokens=st.sampled_from([16, 32, 64, 128]),
    dim=st.sampled_from([64, 96, 128]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    padding=st.sampled_from(["any", "finite", "none"]),
    data=st.data(),
)
def test_property_attention_and_gradients(groups, blocks, slots, tokens, dim, dtype, padding, data):
    longest, shared = data.draw(st.integers(1, slots)), data.draw(st.booleans())
    shape = {"groups": groups, "blocks": blocks, "slots": slots, "tokens": tokens, "dim": dim}
    problem = make_problem(**shape, longest=longest, shared=shared, seed=data.draw(st.integers(0, 999)))
    problem = problem.promising(padding).to(dtype).to("cuda")
    assert_within_eager_error(problem, "triton", padding=padding)
    assert_gradients_within_eager_error(problem, "triton", padding=padding)


@pytest.mark.parametrize("padding", ["finite", "any"])
def test_a_captured_chunk_never_waits_and_replays(padding):
    """Pooling, router, attention and gradients, warmed up, in a CUDA graph: then nothing may wait for the device."""
    problem = make_problem(groups=4, blocks=6, slots=16, tokens=64, dim=128, full=True).promising(padding)
    problem = problem.to(torch.bfloat16).to("cuda")
    slots = torch.arange(16, dtype=torch.int32, device="cuda").expand(4, -1)
    pooled_k = pool_pages(problem.promising("finite").k_pages, problem.page_len)
    leaves = [x.requires_grad_() for x in (problem.q, problem.k_pages, problem.v_pages)]
    q_len = torch.full((4, 6), 64, dtype=torch.int32, device="cuda")

    def chunk():
        pooled_q = pool_pages(problem.q.detach(), q_len)
        problem.lists, _ = route(pooled_q, pooled_k, slots[:, :4], slots[:, 4:], 5, backend="triton")
        out, _ = problem.run("triton", padding=padding, grad_pages=slots[:, 10:].contiguous())
        return out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))

    chunk()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = chunk()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        chunk()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chunk()
    for x in captured:
        x.fill_(float("nan"))
    graph.replay()
    for found, want in zip(captured, expected):
        assert torch.equal(found, want)


@pytest.mark.parametrize("tokens", [16, 32, 64, 128])
@pytest.mark.parametrize("padding", ["any", "finite", "none"])
@pytest.mark.parametrize("shared", [False, True])
def test_the_first_choice_is_right_here(tokens, padding, shared):
    """No variant has to be passed over on this device."""
    from sparse_forcing_pack.kernels.pbsa.triton import variants

    p = make_problem(blocks=4, tokens=tokens, dim=128, shared=shared).promising(padding)
    p = p.to(torch.bfloat16).to("cuda")
    args = (p.q, p.k_pages, p.v_pages, p.page_len, *p.lists, padding)
    shape = variants.shape_of(p.q, p.k_pages, p.v_pages, p.lists.cnt, padding)
    wanted = [variant for variant in variants.VARIANTS if variant.wants(shape)]
    assert variants.choose_variant(*args) == wanted[0]


@pytest.mark.parametrize("tokens", [64, 128])
@pytest.mark.parametrize("shared", [False, True])
def test_every_variant_leaps_over_a_gap(tokens, shared):
    """Pages that lie apart, in a pool that other layers share: the same bits."""
    from sparse_forcing_pack.kernels.pbsa.triton import forward, variants

    p = make_problem(blocks=6, slots=20, tokens=tokens, dim=128, longest=12, shared=shared).promising("finite")
    p = p.to(torch.bfloat16).to("cuda")
    first, behind = 13, 30
    pools = [torch.full((2, 2 + 20 + behind, tokens, 128), 7.0).to(p.q) for _ in range(2)]
    for pool, pages in zip(pools, (p.k_pages, p.v_pages)):
        pool[:, 2 : 2 + first], pool[:, 2 + first + behind :] = pages[:, :first], pages[:, first:]
    apart = [pool[:, 2:] for pool in pools]
    tables = p.page_len, *p.lists, 128**-0.5, "finite"
    shape = variants.shape_of(p.q, *apart, p.lists.cnt, "finite")
    wanted = [variant for variant in variants.VARIANTS if variant.wants(shape)]
    assert wanted[0].kind == "overlapped" or shape.capability != (9, 0)
    for variant in wanted:
        truth = forward.launch(variant, p.q, p.k_pages, p.v_pages, *tables)
        found = forward.launch(variant, p.q, *apart, *tables, gap=(first, behind))
        for a, b in zip(found, truth, strict=True):
            assert torch.equal(a, b), variant.name


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="for Hopper's tensor cores",
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("padding", ["finite", "none"])
def test_overlapped_gradients(padding, dim, dtype):
    """Long ragged lists, some empty; pages that nobody reads: as by pointers, and the same bits twice."""
    from sparse_forcing_pack.kernels.pbsa.triton import backward, forward, variants

    p = make_problem(blocks=11, slots=40, tokens=128, dim=dim, longest=33, groups=3).promising(padding)
    p = p.to(dtype).to("cuda")
    shape = variants.shape_of(p.q, p.k_pages, p.v_pages, p.lists.cnt, padding)
    assert backward.overlaps(shape, p.q.device)
    tables, scale = (p.page_len, *p.lists), dim**-0.5
    variant = next(variant for variant in variants.VARIANTS if variant.wants(shape))
    out, lse = forward.launch(variant, p.q, p.k_pages, p.v_pages, *tables, scale, padding)
    targets = torch.arange(40, dtype=torch.int32, device="cuda").flip(0)[:37].expand(3, -1)
    draw = torch.Generator().manual_seed(0)
    grads = [torch.randn(x.shape, generator=draw).to(x) for x in (out, lse)]

    def gradients(how):
        return backward.launch(
            how, *grads, out, lse, p.q, p.k_pages, p.v_pages, *tables, targets, scale, padding
        )

    found, again = gradients(backward.OVERLAPPED), gradients(backward.OVERLAPPED)
    for ours, twice, theirs in zip(found, again, gradients(backward.tiles_for((9, 0), dtype, 128))):
        assert torch.equal(ours, twice)
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.04 * float(theirs.std()))


def test_growing_lengths_do_not_compile_anew():
    from sparse_forcing_pack.kernels.pbsa.triton import forward, variants

    def compiled() -> int:
        kernels = [forward.forward_pointers, forward.forward_descriptors]
        if variants.gluon_there():
            from sparse_forcing_pack.kernels.pbsa.triton import overlapped

            kernels.append(overlapped.forward_overlapped)
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    for blocks, slots in ((4, 9), (6, 10)):  # warms up lists a block, for lengths that are and are not round
        make_problem(blocks=blocks, slots=slots, tokens=64, dim=128).to(torch.bfloat16).to("cuda").run(
            "triton"
        )
    before = compiled()
    for blocks, slots in ((5, 17), (8, 32), (11, 161), (16, 48)):
        make_problem(blocks=blocks, slots=slots, tokens=64, dim=128).to(torch.bfloat16).to("cuda").run(
            "triton"
        )
    assert compiled() == before


@pytest.mark.parametrize("slots", [48, 600, 2048])
def test_router_at_full_size(slots):
    draw = torch.Generator().manual_seed(slots)
    fixed, free = slots // 4, slots // 2
    # whole numbers: scores are exact whatever the order of summation, and ties are many
    pooled_q, pooled_k = ((torch.randn(4, n, 128, generator=draw) * 0.7).round() for n in (30, slots))
    order = torch.rand(4, slots, generator=draw).argsort(-1).to(torch.int32)
    problem = (pooled_q, pooled_k, order[:, :fixed], order[:, fixed : fixed + free])
    expected, want = route(*problem, free // 4, scale=2**-4, backend="reference")
    lists, shares = route(*(x.cuda() for x in problem), free // 4, scale=2**-4, backend="triton")
    assert torch.equal(lists.idx.cpu(), expected.idx)
    torch.testing.assert_close(shares.cpu(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [64, 128])
def test_mass_in_bfloat16(tokens):
    problem = make_problem(blocks=6, slots=20, tokens=tokens, dim=128, longest=12).to(torch.bfloat16).to("cuda")
    _, lse = problem.run("triton")
    facts = problem.q, problem.k_pages, problem.page_len, problem.lists, lse
    found, expected = (attention_mass(*facts, backend=name) for name in ("triton", "reference"))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_auto_takes_triton_here():
    assert backend_report()["triton"] == "available"
    problem = make_problem().to(torch.bfloat16).to("cuda")
    for chosen, triton in zip(problem.run("auto"), problem.run("triton")):
        assert torch.equal(chosen, triton)
