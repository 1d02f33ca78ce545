"""What only a GPU can show: that the host never waits while a chunk is generated, and that numbers are the CPU's."""

from contextlib import contextmanager, nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from sparse_forcing_pack.sparse_attn.config import AttentionConfig
from sparse_forcing_pack.sparse_attn.fast import ComposablePass, FastModel, FastOptions, FastPass
from sparse_forcing_pack.sparse_attn.frame_queue import FrameQueue
from sparse_forcing_pack.sparse_attn.pictures import to_bytes
from sparse_forcing_pack.sparse_attn.pipeline import Request, VideoPipeline
from sparse_forcing_pack.sparse_attn.positions import apply_rope, rope_table
from sparse_forcing_pack.sparse_attn.state import StreamState
from sparse_forcing_pack.sparse_attn.vae import WanVAE
from sparse_forcing_pack.sparse_attn.wan import WanModel
from sparse_forcing_pack.sparse_attn.world.model import WorldModel
from sparse_forcing_pack.sparse_attn.world.text import WorldTextEncoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LAYERS, HEADS, HEAD_DIM, GRID = 3, 2, 128, (30, 52)
MODES = [
    AttentionConfig(mode="dense"),
    AttentionConfig(mode="window", positions="rebased"),
    AttentionConfig(),
    AttentionConfig(positions="rebased"),
    AttentionConfig(keep="novelty"),
    AttentionConfig(positions="rebased", page_bits=8),
    AttentionConfig(positions="rebased", router="quarters"),
    AttentionConfig(positions="rebased", offload_pages=True),
    AttentionConfig(keep="novelty", page_bits=8, offload_pages=True),
]
IDS = [f"{a.mode}-{a.positions}-{a.keep}-{a.page_bits}-{a.router}-{a.offload_pages}" for a in MODES]


@contextmanager
def no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def new_state(attention, device, dtype, grid=GRID, share_open=True):
    return StreamState(
        layers=LAYERS,
        heads=HEADS,
        head_dim=HEAD_DIM,
        grid=grid,
        chunk_frames=3,
        attention=attention,
        total_frames=18,
        dtype=dtype,
        device=device,
        share_open=share_open,
    )


def run_chunk(state, qkv, table):
    """Two passes over all layers, as the rollout makes them."""
    state.begin_chunk(3)
    for noisy in (True, False):
        state.noisy = noisy
        for layer in range(LAYERS):
            q, k, v = qkv
            out = state.attend(layer, apply_rope(q, *table), apply_rope(k, *table), v)
    state.end_chunk()
    return out


@pytest.mark.parametrize("attention", MODES, ids=IDS)
def test_the_host_never_waits(attention):
    state = new_state(attention, "cuda", torch.bfloat16)
    qkv = torch.randn(3, 1, 3 * GRID[0] * GRID[1], HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    table = rope_table(0, 3, *GRID, HEAD_DIM, "cuda")
    for _ in range(4):  # fills window and memory, compiles kernels
        run_chunk(state, qkv, table)
    with no_waiting():
        for _ in range(2):
            run_chunk(state, qkv, table)


@pytest.mark.parametrize("attention", MODES, ids=IDS)
def test_memory_allocated_is_constant(attention):
    state = new_state(attention, "cuda", torch.bfloat16)
    qkv = torch.randn(3, 1, 3 * GRID[0] * GRID[1], HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    table = rope_table(0, 3, *GRID, HEAD_DIM, "cuda")
    allocated = []
    for _ in range(6):
        run_chunk(state, qkv, table)
        allocated.append(torch.cuda.memory_allocated())
    assert max(allocated[3:]) - min(allocated[3:]) <= 2**20, (
        "once the memory is full, only tables come and go"
    )


@pytest.mark.parametrize("share_open", [False, True])
@pytest.mark.parametrize("attention", MODES, ids=IDS)
def test_cuda_equals_cpu(attention, share_open):
    generator, grid = torch.Generator().manual_seed(0), (12, 20)
    states = {
        device: new_state(attention, device, torch.float32, grid, share_open) for device in ("cpu", "cuda")
    }
    for _ in range(6):
        qkv = torch.randn(3, 1, 3 * grid[0] * grid[1], HEADS, HEAD_DIM, generator=generator)
        outputs = []
        for device, state in states.items():
            table = rope_table(3, 3, *grid, HEAD_DIM, device)
            outputs.append(run_chunk(state, qkv.to(device), table).cpu())
        torch.testing.assert_close(*outputs, atol=5e-3, rtol=5e-3)


def test_fast_and_composable_pass_keep_what_is_new():
    """Every page is read; a few blocks may differ, as rounding may decide between two that are equally new."""
    torch.manual_seed(0)
    model = WanModel(
        dim=HEADS * HEAD_DIM, ffn_dim=512, num_heads=HEADS, num_layers=LAYERS, text_dim=24, freq_dim=256
    )
    for parameter in model.requires_grad_(False).parameters():
        parameter += 0.02 * torch.randn_like(parameter)  # those that start as zeros, too
    cross_kv = model.cuda().cross_kv(torch.randn(1, 16, 24, device="cuda"))
    chunks = torch.randn(8, 1, 16, 3, 24, 40, device="cuda")
    flows, kept = [], []
    for fast in (False, True):
        attention = AttentionConfig(keep="novelty", topk=1.0, positions="rebased")
        state = new_state(attention, "cuda", torch.float32, (12, 20))
        run = FastPass(FastModel(model, FastOptions()), state) if fast else ComposablePass(model, state)
        for index, x in enumerate(chunks):
            with no_waiting() if fast and index == 7 else nullcontext():
                state.begin_chunk(3)
                flow = run(x, 0.0, cross_kv)
                state.end_chunk()
        flows.append(flow)
        kept.append(state.kept_frames())
    assert (kept[0] == kept[1]).float().mean() > 0.9
    assert (flows[0] - flows[1]).norm() < 0.05 * flows[0].norm()


def test_frame_queue_launches_without_waiting():
    long = 2_000_000_000  # cycles, about a second
    seen = []

    def decode(x, cycles):
        torch.cuda._sleep(cycles)
        return (2 * x,)

    with FrameQueue("cuda") as queue:
        for cycles in (
            1,
            long,
        ):  # first kernels are loaded and memory is allocated, which may wait for the device
            x = torch.zeros(1 << 20, device="cuda")
            with no_waiting() if cycles == long else nullcontext():
                torch.cuda._sleep(cycles)
                x += 1
                queue.submit(partial(decode, x, cycles), lambda copied: seen.append(copied.clone()))
                del x
                torch.full((1 << 20,), 7.0, device="cuda")  # may not be where x is still to be read
                busy = not torch.cuda.current_stream().query()
            queue.settle()
    assert busy, "the decoder was launched while x was still being made"
    assert len(seen) == 2 and all((copied == 2).all() for copied in seen)


def test_generate_decodes_as_one_chunk_after_the_other():
    torch.manual_seed(0)
    world = WorldModel(
        WanModel(dim=128, ffn_dim=128, num_heads=1, num_layers=2), WanVAE(dim=8), WorldTextEncoder(dim=32)
    )
    for part in (world.dit, world.vae, world.text):
        part.eval().requires_grad_(False)
    pipeline = VideoPipeline(world, "cuda")
    request = Request("a red circle over a navy background", latent_frames=24, width=64, height=48)
    latents, decoder = [], pipeline.vae.stream_decoder
    videos = []
    for _ in range(2):
        videos.append(np.concatenate([chunk.frames for chunk in pipeline.generate(request)]))
    assert np.array_equal(*videos)
    pipeline.vae.stream_decoder = lambda: recorded(decoder(), latents)
    again = np.concatenate([chunk.frames for chunk in pipeline.generate(request)])
    torch.cuda.synchronize()
    alone = decoder()
    inline = np.concatenate([to_bytes(alone.push(latent)).cpu().numpy() for latent in latents])
    assert np.array_equal(again, videos[0]) and np.array_equal(inline, videos[0])


def recorded(decoder, latents):
    push = decoder.push

    def noted(latent):
        latents.append(latent)
        return push(latent)

    decoder.push = noted
    return decoder
