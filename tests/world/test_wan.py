"""The backbone: Wan's weight names, and the stream's memory under the real model."""

import random

import pytest
import torch
import torch.nn.functional as F
from sparse_forcing_pack.sparse_attn.config import AttentionConfig
from sparse_forcing_pack.sparse_attn.state import StreamState, sdpa
from sparse_forcing_pack.sparse_attn.wan import WanModel, frame_timesteps, timestep_embedding
from sparse_forcing_pack.sparse_attn.world.render import render
from sparse_forcing_pack.sparse_attn.world.scene import sample_scene, to_prompt

BLOCK = [
    "modulation",
    "self_attn.q.weight",
    "self_attn.q.bias",
    "self_attn.k.weight",
    "self_attn.k.bias",
    "self_attn.v.weight",
    "self_attn.v.bias",
    "self_attn.o.weight",
    "self_attn.o.bias",
    "self_attn.norm_q.weight",
    "self_attn.norm_k.weight",
    "norm3.weight",
    "norm3.bias",
    "cross_attn.q.weight",
    "cross_attn.q.bias",
    "cross_attn.k.weight",
    "cross_attn.k.bias",
    "cross_attn.v.weight",
    "cross_attn.v.bias",
    "cross_attn.o.weight",
    "cross_attn.o.bias",
    "cross_attn.norm_q.weight",
    "cross_attn.norm_k.weight",
    "ffn.0.weight",
    "ffn.0.bias",
    "ffn.2.weight",
    "ffn.2.bias",
]
AROUND = [
    "patch_embedding.weight",
    "patch_embedding.bias",
    "text_embedding.0.weight",
    "text_embedding.0.bias",
    "text_embedding.2.weight",
    "text_embedding.2.bias",
    "time_embedding.0.weight",
    "time_embedding.0.bias",
    "time_embedding.2.weight",
    "time_embedding.2.bias",
    "time_projection.1.weight",
    "time_projection.1.bias",
    "head.modulation",
    "head.head.weight",
    "head.head.bias",
]

CHUNK = 3
GRID = (3, 5)  # tokens of a latent frame


@pytest.fixture(scope="module")
def wan():
    torch.manual_seed(0)
    model = WanModel(dim=128, ffn_dim=192, num_heads=1, num_layers=2, text_dim=32)
    return model.eval().requires_grad_(False)


def test_names_are_those_of_wan(wan):
    blocks = [f"blocks.{layer}.{name}" for layer in range(2) for name in BLOCK]
    assert sorted(wan.state_dict()) == sorted([*blocks, *AROUND])


def test_shapes_of_the_released_model():
    with torch.device("meta"):
        model = WanModel(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
    assert len(model.state_dict()) == 825
    assert sum(weight.numel() for weight in model.parameters()) == 1_418_996_800
    assert tuple(model.patch_embedding.weight.shape) == (1536, 16, 1, 2, 2)
    assert tuple(model.head.head.weight.shape) == (64, 1536)
    assert tuple(model.blocks[29].modulation.shape) == (1, 6, 1536)


def test_weights_build_their_model(wan):
    again = WanModel.from_state_dict(wan.state_dict())
    assert (again.num_layers, again.num_heads, again.head_dim) == (2, 1, 128)
    for name, weight in wan.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


def test_loading_is_strict(wan):
    weights = wan.state_dict()
    with pytest.raises(RuntimeError, match=r"blocks\.1\.norm3\.bias"):
        WanModel.from_state_dict({k: v for k, v in weights.items() if k != "blocks.1.norm3.bias"})
    with pytest.raises(RuntimeError, match="img_emb"):
        WanModel.from_state_dict(weights | {"img_emb": torch.zeros(1)})


def block_causal(lengths):
    """`attend` over a whole clip at once: every chunk reads itself and all chunks before it."""
    chunk = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths) * GRID[0] * GRID[1])
    mask = chunk[:, None] >= chunk

    def attend(_layer, q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    return attend


@pytest.mark.parametrize("lengths", [[3, 3, 3, 3], [1, 3, 2]])
def test_a_dense_stream_equals_one_block_causal_pass(wan, lengths):
    batch, frames = 2, sum(lengths)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batch, 16, frames, 2 * GRID[0], 2 * GRID[1], generator=generator)
    cross_kv = wan.cross_kv(torch.randn(batch, 512, 32, generator=generator))
    # a timestep of its own for every chunk, so that one given to the wrong frame would show
    timesteps = torch.cat([frame_timesteps(0.9 / (i + 1), batch, n, "cpu") for i, n in enumerate(lengths)], 1)
    expected = wan(x, timesteps, cross_kv, block_causal(lengths))
    state = StreamState(
        layers=2,
        heads=1,
        head_dim=128,
        grid=GRID,
        chunk_frames=CHUNK,
        attention=AttentionConfig(mode="dense"),
        batch=batch,
        total_frames=frames,
    )
    flows = []
    for piece, t in zip(x.split(lengths, dim=2), timesteps.split(lengths, dim=1)):
        state.begin_chunk(piece.shape[2])
        for draft in (piece + 1, piece):  # what an earlier pass wrote must not remain
            flow = wan(draft, t, cross_kv, state.attend, state.t_start)
        state.end_chunk()
        flows.append(flow)
    torch.testing.assert_close(torch.cat(flows, dim=2), expected, atol=1e-5, rtol=1e-5)


def test_initial_weights_predict_no_flow():
    model = WanModel(dim=128, ffn_dim=128, num_heads=1, num_layers=1, text_dim=8)
    model.init_weights()
    cross_kv = model.cross_kv(torch.ones(1, 512, 8))
    x, t = torch.ones(1, 16, 2, 4, 4), frame_timesteps(0.5, 1, 2, "cpu")
    assert not model(x, t, cross_kv, lambda _layer, q, k, v: v).any()


def test_the_embedded_backbone_denoises(world):
    """On a clip it never saw, at the last step's noise: well below the error of predicting no flow at all."""
    scene = sample_scene(random.Random(3), held_out=True)
    with torch.no_grad():
        x0 = world.vae.encode(render(scene, 9)[None])
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
        sigma = 0.625
        x, t = (1 - sigma) * x0 + sigma * noise, frame_timesteps(sigma, 1, 3, "cpu")
        cross_kv = world.dit.cross_kv(world.text.encode([to_prompt(scene)]))
        flow = world.dit(x, t, cross_kv, lambda _layer, q, k, v: sdpa(q, k, v))
    error, nothing = ((f - (noise - x0)).square().mean() for f in (flow, torch.zeros(())))
    assert error < 0.5 * nothing, f"flow error {error:.3f}, of a zero flow {nothing:.3f}"


def test_timesteps_of_the_schedule():
    assert frame_timesteps(0.9375, 2, 3, "cpu").tolist() == [[937.5] * 3] * 2
    embedding = timestep_embedding(torch.tensor([0.0, 937.5]), 8)
    angle = 937.5 * torch.tensor([1, 0.1, 0.01, 0.001], dtype=torch.float64)
    expected = torch.stack(
        [torch.tensor([1.0] * 4 + [0.0] * 4), torch.cat([angle.cos(), angle.sin()]).float()]
    )
    torch.testing.assert_close(embedding, expected)
