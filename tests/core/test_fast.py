"""The fast pass against the composable one, in every mode; its options; its graphs, as far as a CPU can show them."""

import pytest
import torch
from sparse_forcing_pack.sparse_attn import fast
from sparse_forcing_pack.sparse_attn.config import AttentionConfig
from sparse_forcing_pack.sparse_attn.fast import (
    ComposablePass,
    FastModel,
    FastOptions,
    FastPass,
    choose_pass,
    fp8_missing,
    option_error,
    why_not_fast,
)
from sparse_forcing_pack.sparse_attn.fast_weights import Linear8
from sparse_forcing_pack.sparse_attn.memory import PagedKV
from sparse_forcing_pack.sparse_attn.state import StreamState
from sparse_forcing_pack.sparse_attn.wan import WanModel

GRID, CHUNK, SIGMAS = (5, 7), 3, (1.0, 0.7, 0.4)
SPARSE = {"window_frames": 6, "sink_frames": 3, "persistent_frames": 6, "block_tokens": 16}
MODES = {
    "dense": AttentionConfig(mode="dense"),
    "window": AttentionConfig(mode="window", window_frames=6, sink_frames=1),
    "window-rebased": AttentionConfig(mode="window", window_frames=6, sink_frames=1, positions="rebased"),
    "sparse": AttentionConfig(**SPARSE),
    "sparse-rebased": AttentionConfig(**SPARSE, positions="rebased"),
    "sparse-novelty": AttentionConfig(**SPARSE, keep="novelty"),
    "sparse-offloaded": AttentionConfig(**SPARSE, offload_pages=True),
}


def new_model(heads=2, dim=64, layers=3, ops=torch.nn, seed=0) -> WanModel:
    """A tiny Wan whose every weight is random, the zero-initialised ones too."""
    torch.manual_seed(seed)
    model = WanModel(
        dim=dim, ffn_dim=96, num_heads=heads, num_layers=layers, text_dim=24, freq_dim=16, ops=ops
    )
    for name, p in model.named_parameters():
        p.data = torch.randn_like(p) * (0.3 if p.ndim < 2 or "modulation" in name else p[0].numel() ** -0.5)
        if "norm" in name and name.endswith("weight"):
            p.data += 1
    return model.requires_grad_(False)


def new_memory(model, attention, batch=1, **options) -> StreamState:
    return StreamState(
        layers=model.num_layers,
        heads=model.num_heads,
        head_dim=model.head_dim,
        grid=GRID,
        chunk_frames=CHUNK,
        attention=attention,
        batch=batch,
        total_frames=18,
        share_open=True,
        **options,
    )


def prompt(model, seed=0, batch=1):
    rows = torch.randn(batch, 9, 24, generator=torch.Generator().manual_seed(seed))
    return model.cross_kv(rows)


def latents(lengths, batch=1, seed=3):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 16, n, GRID[0] * 2, GRID[1] * 2, generator=draw) for n in lengths]


def run_stream(run, memory, chunks, cross_kv, sigmas=(*SIGMAS, 0.0), remember=False):
    """The flows of all passes of all chunks; remember: whether one more pass only writes the memory."""
    flows = []
    for x in chunks:
        memory.begin_chunk(x.shape[2])
        for left, sigma in reversed(list(enumerate(reversed(sigmas)))):
            memory.noisy = left > 0 or remember
            flows.append(run(x * (1 - sigma / 2), sigma, cross_kv))
        if remember:
            memory.noisy = False
            run.remember(x, cross_kv)
        memory.end_chunk()
    return flows


def new_fast(model, options=None):
    return lambda memory: FastPass(FastModel(model, options or FastOptions()), memory)


def new_slow(model):
    return lambda memory: ComposablePass(model, memory)


def both(model, attention, chunks, options=None, batch=1, fast_memory=None):
    """(composable, fast): flows and memories of the same stream."""
    results = []
    for build in (new_slow(model), new_fast(model, options)):
        memory = new_memory(model, attention, batch)
        flows = run_stream(build(memory), memory, chunks, prompt(model, batch=batch))
        results.append((flows, memory))
    return results


def assert_close(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected):
        scale = b.abs().max()
        torch.testing.assert_close(a, b, atol=tolerance * float(scale), rtol=tolerance)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("heads", [1, 2])
def test_fast_equals_composable(mode, heads):
    model = new_model(heads, dim=32 * heads)
    (expected, _), (found, _) = both(model, MODES[mode], latents([3] * 6))
    assert_close(found, expected)


@pytest.mark.parametrize("mode", MODES)
def test_short_chunks_and_batches(mode):
    model = new_model()
    (expected, slow), (found, quick) = both(model, MODES[mode], latents([1, 3, 3, 3, 2], batch=2), batch=2)
    assert_close(found, expected)
    assert torch.equal(quick.kept_frames(), slow.kept_frames())
    wanted = slow.snapshot()
    for name, tensor in quick.snapshot().items():
        torch.testing.assert_close(tensor, wanted[name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("mode", MODES)
def test_a_pass_that_only_remembers_leaves_the_memory_of_a_clean_pass(mode):
    """The rest of a clean pass, from the last layer's attention on, makes a flow that nobody reads."""
    model, chunks = new_model(), latents([3] * 6)
    memories = [new_memory(model, MODES[mode]) for _ in range(3)]
    whole, fast, slow = (new(m) for new, m in zip((new_fast(model),) * 2 + (new_slow(model),), memories))
    for x in chunks:
        flows = []
        for run, memory in zip((whole, fast, slow), memories):
            memory.begin_chunk(3)
            memory.noisy = True
            flows.append(run(x, 0.5, prompt(model)))
            memory.noisy = False
            run(x, 0.0, prompt(model)) if run is whole else run.remember(x, prompt(model))
            memory.end_chunk()
        assert torch.equal(flows[0], flows[1])
        assert_close(flows[2:], flows[:1])
    wanted, found = memories[0].snapshot(), memories[1].snapshot()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("mode", ["window", "sparse"])
def test_passes_may_take_turns_on_one_stream(mode):
    model, chunks = new_model(), latents([3] * 4)
    (expected, _), _ = both(model, MODES[mode], chunks)
    memory = new_memory(model, MODES[mode])
    passes = FastPass(FastModel(model, FastOptions()), memory), ComposablePass(model, memory)
    turn = iter(range(1000))
    found = run_stream(lambda *args: passes[next(turn) % 2](*args), memory, chunks, prompt(model))
    assert_close(found, expected)


def test_float16_input_and_output():
    model = new_model()
    memory = new_memory(model, MODES["sparse"])
    run = FastPass(FastModel(model, FastOptions()), memory)
    memory.begin_chunk(3)
    flow = run(latents([3])[0].half(), 0.5, prompt(model))
    assert flow.dtype == torch.float16 and flow.shape == (1, 16, 3, 10, 14)


# --- which pass ---


def test_the_choice_is_said(caplog):
    model = new_model()
    with caplog.at_level("INFO", "sparse_forcing.fast"):
        run, why = choose_pass(model, new_memory(model, MODES["sparse"]))
    assert isinstance(run, FastPass) and "fast pass (exact)" in why and why in caplog.text
    assert run.describe()["no_graphs"] == "the model is on cpu"
    model.blocks[1].register_forward_hook(lambda *args: None)
    run, why = choose_pass(model, new_memory(model, MODES["sparse"]))
    assert isinstance(run, ComposablePass) and why == "composable pass: blocks.1 has forward hooks"
    with pytest.raises(ValueError, match=r"router_once needs the fast pass.*blocks\.1 has forward hooks"):
        choose_pass(model, new_memory(model, MODES["sparse"]), FastOptions(router_once=True))


class HostLinear(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class ForeignLinear(torch.nn.Module):
    def __init__(self, rows, columns):
        super().__init__()
        self.weight, self.bias = (torch.nn.Parameter(torch.zeros(s)) for s in ((columns, rows), (columns,)))

    def forward(self, x):
        return x @ self.weight.T


@pytest.mark.parametrize("layer", [HostLinear, ForeignLinear])
def test_layers_of_a_host_keep_the_composable_pass(layer):
    class Ops:
        Linear, Conv3d = layer, torch.nn.Conv3d
        LayerNorm, RMSNorm = torch.nn.LayerNorm, torch.nn.RMSNorm

    model = new_model(ops=Ops)
    assert f"{layer.__name__}, which computes in its own way" in why_not_fast(
        model, new_memory(model, MODES["sparse"])
    )


def test_other_reasons():
    model = new_model()
    memory = new_memory(model, MODES["sparse"])
    assert why_not_fast(model, memory) is None
    assert "other widths" in why_not_fast(new_model(layers=2), memory)
    assert "the memory keeps torch.float16" in why_not_fast(
        model, new_memory(model, MODES["sparse"], dtype=torch.float16)
    )
    model.blocks[0].self_attn.forward = lambda *args: None
    assert why_not_fast(model, memory) == "blocks.0.self_attn has its forward replaced"
    model = new_model()
    model.head.half()
    assert "several dtypes" in why_not_fast(model, memory)
    assert "no 8-bit product for mps" in fp8_missing(torch.device("mps"))


def test_a_pass_needs_its_chunk_open():
    model = new_model()
    memory = new_memory(model, MODES["window"])
    run = FastPass(FastModel(model, FastOptions()), memory)
    with pytest.raises(ValueError, match="the open chunk has 0 frames"):
        run(latents([3])[0], 1.0, prompt(model))
    memory.begin_chunk(2)
    with pytest.raises(ValueError, match="the open chunk has 2 frames of 5 x 7 tokens"):
        run(latents([3])[0], 1.0, prompt(model))


# --- weights ---


def test_joint_weights_are_not_held_twice():
    model = new_model()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    prepared = FastModel(model, FastOptions())
    own = model.blocks[0].self_attn
    assert own.q.weight.untyped_storage().data_ptr() == own.v.weight.untyped_storage().data_ptr()
    again = FastModel(model, FastOptions())
    x = torch.randn(1, 4, 64)
    for a, b in zip(prepared.blocks[0].qkv(x), again.blocks[0].qkv(x)):
        assert torch.equal(a, b)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    own.k.weight.mul_(2)  # whoever changes the model's weights changes the joint ones
    k = prepared.blocks[0].qkv(x)[1]
    torch.testing.assert_close(k, own.k(x))


def test_apart_is_the_same():
    model, chunks = new_model(), latents([3] * 3)
    apart = FastOptions(fuse_qkv=False)
    storage = model.blocks[0].self_attn.q.weight.untyped_storage().data_ptr()
    (expected, _), (found, _) = both(model, MODES["sparse"], chunks, apart)
    assert_close(found, expected)
    assert model.blocks[0].self_attn.q.weight.untyped_storage().data_ptr() == storage


# --- graphs, with a recorder that a CPU can run ---


def fake_record(run, pool):
    """Like `fast.record`: the result stays where it is, every replay computes it anew from the captured inputs."""
    with pytest.MonkeyPatch.context() as capturing:  # which only notes what is to be done
        capturing.setattr(PagedKV, "finish", lambda *args: None)
        flow, shares = run()

    def replay():
        new_flow, new_shares = run()
        if flow is not None:
            flow.copy_(new_flow)
        for mine, new in zip(shares, new_shares):
            if new is not None:
                mine.copy_(new)

    return replay, (flow, shares)


@pytest.fixture
def graphs(monkeypatch):
    monkeypatch.setattr(fast, "record", fake_record)
    monkeypatch.setattr(fast, "new_pool", lambda: "pool")
    monkeypatch.setattr(
        FastPass, "_why_no_graph", lambda self: None if self.options.graphs else "switched off"
    )


SHARING = [
    FastOptions(),
    FastOptions(router_once=True),
    FastOptions(reuse_persistent=True),
    FastOptions(router_once=True, reuse_persistent=True),
]


@pytest.mark.parametrize("options", SHARING, ids=lambda o: "+".join(o.approximate) or "exact")
@pytest.mark.parametrize("mode", ["dense", "window", "sparse", "sparse-rebased", "sparse-offloaded"])
def test_graphs_change_nothing(graphs, mode, options):
    model, chunks = new_model(), latents([3] * 6)
    results = []
    for chosen in (options, fast.replace(options, graphs=False)):
        memory = new_memory(model, MODES[mode])
        run = FastPass(FastModel(model, chosen), memory)
        flows = []
        for chunk, words in zip(chunks, [0, 0, 0, 0, 1, 1]):  # the prompt changes while graphs are in use
            flows += run_stream(run, memory, [chunk], prompt(model, seed=words), remember=True)
        results.append((flows, run, memory))
    (with_graphs, run, memory), (without, plain, _) = results
    assert all(torch.equal(a, b) for a, b in zip(with_graphs, without))
    assert not plain.graphs.captured
    kinds = {key[0] for key in run.graphs.captured}
    shares = mode.startswith("sparse") and (options.router_once or options.reuse_persistent)
    if mode == "dense":
        assert not kinds, "a memory that grows never meets the same extent in two chunks"
        memory.reset()
        again = run_stream(run, memory, chunks[:2], prompt(model), remember=True)
        assert all(torch.equal(a, b) for a, b in zip(again, with_graphs)) and run.graphs.captured
    else:
        assert kinds == ({"exact", "first", "later"} if shares else {"exact"})


def test_inference_mode_may_come_and_go(graphs):
    model, chunks = new_model(), latents([3] * 6)
    options = FastOptions(router_once=True, reuse_persistent=True)
    memory, other = (new_memory(model, MODES["sparse-rebased"]) for _ in range(2))
    expected = run_stream(FastPass(FastModel(model, options), other), other, chunks, prompt(model))
    with torch.inference_mode():
        run = FastPass(FastModel(model, options), memory)
    found = []
    for i, chunk in enumerate(chunks):
        with torch.inference_mode(i % 2 == 1):
            found += run_stream(run, memory, [chunk], prompt(model))
    assert run.graphs.captured and all(torch.equal(a, b) for a, b in zip(found, expected))
    assert model.blocks[0].self_attn.q.weight.requires_grad_().requires_grad


def test_a_failed_capture_is_said_and_survived(graphs, monkeypatch, caplog):
    def fail(run, pool):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model, chunks = new_model(), latents([3] * 5)
    (expected, _), _ = both(model, MODES["sparse"], chunks)
    monkeypatch.setattr(fast, "record", fail)
    memory = new_memory(model, MODES["sparse"])
    run = FastPass(FastModel(model, FastOptions()), memory)
    assert_close(run_stream(run, memory, chunks, prompt(model)), expected)
    assert run.graphs.failure == "capture failed: RuntimeError: operation not permitted when stream is capturing"
    assert "CUDA graphs are not used" in caplog.text


# --- options that trade error for time ---


def errors(options, mode="sparse", topk=0.25, count=5):
    model = new_model()
    attention = fast.replace(MODES[mode], topk=topk)
    chunks = latents([3] * count)
    return option_error(model, lambda: new_memory(model, attention), options, chunks, SIGMAS, prompt(model))


def test_no_option_no_error():
    assert errors(FastOptions()) == [0.0] * 5


@pytest.mark.parametrize("name", ["router_once", "reuse_persistent"])
def test_sharing_between_passes(name):
    found = errors(FastOptions(**{name: True}))
    assert found[4] < 0.5
    if name == "reuse_persistent":
        assert max(found[:2]) < 1e-6, "as long as nothing is persistent there is nothing to reuse"
        assert found[4] > 1e-6
    else:
        assert max(errors(FastOptions(router_once=True), topk=1.0)) < 1e-6, "there is nothing to choose"


@pytest.mark.parametrize("name", ["router_once", "reuse_persistent"])
def test_first_and_clean_passes_are_exact(name):
    model, chunks = new_model(), latents([3] * 5)
    memories = [new_memory(model, MODES["sparse"]) for _ in range(2)]
    runs = [
        FastPass(FastModel(model, options), memory)
        for options, memory in zip((FastOptions(), FastOptions(**{name: True})), memories)
    ]
    for run, memory in zip(runs, memories):
        run_stream(run, memory, chunks[:4], prompt(model), sigmas=(0.0,))
        memory.begin_chunk(3)
    for sigma, exact in ((1.0, True), (0.5, False), (0.0, True)):
        for memory in memories:
            memory.noisy = sigma > 0
        expected, found = (run(chunks[4] * (1 - sigma / 2), sigma, prompt(model)) for run in runs)
        assert (found - expected).abs().max() < 1e-5 or not exact
        assert exact or not torch.equal(found, expected)


def test_fp8_is_close():
    assert 1e-4 < max(errors(FastOptions(fp8=True), count=2)) < 0.1


def test_fp8_products():
    draw = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(32, 64, generator=draw), torch.randn(32, generator=draw)
    x = torch.randn(2, 5, 64, generator=draw) * torch.tensor([1e-3, 1, 1e3, 0, 1])[:, None]
    found, expected = Linear8(weight, bias, "linear")(x), torch.nn.functional.linear(x, weight, bias)
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < 0.05, "whatever a row's size"


# --- on a GPU ---


def full_width(dtype):
    """Two layers of Wan 1.3B."""
    torch.manual_seed(0)
    model = WanModel(dim=1536, ffn_dim=8960, num_heads=12, num_layers=2, text_dim=24, freq_dim=256)
    return model.requires_grad_(False).to("cuda", dtype)


def on_cuda(model, attention, options, grid, dtype):
    memory = StreamState(
        layers=model.num_layers, heads=12, head_dim=128, grid=grid, chunk_frames=3, attention=attention,
        total_frames=24, dtype=dtype, device="cuda", share_open=True,
    )  # fmt: skip
    return FastPass(FastModel(model, options), memory), memory


def cuda_inputs(model, grid, chunks=8):
    draw = torch.Generator().manual_seed(0)
    shape = (1, 16, 3, 2 * grid[0], 2 * grid[1])
    words = torch.randn(1, 512, 24, generator=draw).cuda()
    return [torch.randn(shape, generator=draw).cuda() for _ in range(chunks)], model.cross_kv(words)


GPU_MODES = {
    "dense": AttentionConfig(mode="dense"),
    "window": AttentionConfig(mode="window", window_frames=12, positions="rebased"),
    "sparse": AttentionConfig(positions="rebased"),
    "sparse-offloaded": AttentionConfig(positions="rebased", offload_pages=True),
    "sparse-novelty-8 bits-offloaded": AttentionConfig(keep="novelty", page_bits=8, offload_pages=True),
}


@pytest.mark.gpu
@pytest.mark.parametrize("options", [*SHARING, FastOptions(fp8=True)], ids=lambda o: "+".join(o.approximate))
@pytest.mark.parametrize("mode", GPU_MODES)
def test_cuda_graphs_change_no_bit(mode, options):
    if options.fp8 and fp8_missing(torch.device("cuda")):
        pytest.skip("no 8-bit products here")
    model, grid, dtype = full_width(torch.bfloat16), (30, 52), torch.bfloat16
    chunks, kv = cuda_inputs(model, grid)
    results = []
    for graphs_on in (True, False):
        run, memory = on_cuda(model, GPU_MODES[mode], fast.replace(options, graphs=graphs_on), grid, dtype)
        flows = run_stream(run, memory, chunks, kv, remember=True)
        memory.reset()
        flows += run_stream(run, memory, chunks, kv, remember=True)  # a second stream through the same graphs
        assert run.graphs.failure is None and bool(run.graphs.captured) == graphs_on
        results.append(flows)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.gpu
@pytest.mark.parametrize("graphs_on", [True, False])
@pytest.mark.parametrize("mode", ["window", "sparse", "sparse-offloaded"])
def test_the_host_never_waits_in_a_pass(mode, graphs_on):
    model, grid = full_width(torch.bfloat16), (30, 52)
    chunks, kv = cuda_inputs(model, grid)
    run, memory = on_cuda(model, GPU_MODES[mode], FastOptions(graphs=graphs_on), grid, torch.bfloat16)
    run_stream(run, memory, chunks[:7], kv)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_stream(run, memory, chunks[7:], kv)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", GPU_MODES)
def test_bfloat16_is_no_worse_than_the_composable_pass(mode):
    """Both against float64; every page is read, because which pages are best may hang on one rounding."""
    attention = fast.replace(GPU_MODES[mode], topk=1.0)
    grid, wide, narrow = (12, 20), full_width(torch.float64), full_width(torch.bfloat16)
    wide.load_state_dict(narrow.state_dict())
    chunks, _ = cuda_inputs(narrow, grid, 6)
    errors = []
    truth = None
    for build, model, dtype in (
        (ComposablePass, wide, torch.float64),
        (ComposablePass, narrow, torch.bfloat16),
        (lambda m, s: FastPass(FastModel(m, FastOptions()), s), narrow, torch.bfloat16),
    ):
        _, memory = on_cuda(model, attention, FastOptions(), grid, dtype)
        flows = run_stream(build(model, memory), memory, chunks, cuda_inputs(model, grid, 1)[1])
        truth = truth or flows
        errors.append(max(float((a - b).norm() / b.norm()) for a, b in zip(flows, truth)))
    assert errors[2] <= 1.1 * errors[1] < 0.05


@pytest.mark.gpu
def test_fp8_on_the_device_is_close():
    if reason := fp8_missing(torch.device("cuda")):
        pytest.skip(reason)
    draw = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(1536, 512).requires_grad_(False).to("cuda", torch.bfloat16)
    x = torch.randn(1, 300, 1536, generator=draw).to("cuda", torch.bfloat16)
    found, expected = Linear8(layer.weight, layer.bias, "linear")(x), layer(x)
    assert (found - expected).norm() / expected.norm() < 0.05
