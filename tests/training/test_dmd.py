"""Self-Forcing DMD on toys: its gradients against a graph cut by hand, and its schedule against the definitions."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from sparse_forcing_pack.sparse_attn.config import AttentionConfig, SamplerConfig, shifted_sigmas
from sparse_forcing_pack.sparse_attn.rollout import draw_noise
from sparse_forcing_pack.sparse_attn.state import StreamState, sdpa
from sparse_forcing_pack.sparse_attn.training import dmd
from sparse_forcing_pack.sparse_attn.training.dmd_config import DmdTraining, LongTuning, seed_of
from sparse_forcing_pack.sparse_attn.wan import frame_timesteps

SHAPE = (16, 4, 6)
FRAMES = 9
EVERYTHING = AttentionConfig(block_tokens=4, topk=1.0, window_frames=6, persistent_frames=6)
LAYERS = 2


def memory_of(attention, batch=1):
    return StreamState(
        layers=LAYERS, heads=1, head_dim=128, grid=(2, 3), chunk_frames=3, attention=attention, batch=batch,
        total_frames=FRAMES,
    )  # fmt: skip


def rolled(model, attention, sampler, batch=1):
    memory = memory_of(attention, batch)
    rows = torch.randn(batch, 8, 32, generator=torch.Generator().manual_seed(3))
    made = dmd.roll(model, memory, rows, sampler, (batch, *SHAPE), 0, FRAMES, tuple(range(5, 5 + batch)))
    return memory, rows, made


class Listed:
    """Attention over Python lists: finished chunks' keys and values, detached or not, and the open chunk's."""

    def __init__(self, cut):
        self.cut, self.kept, self.open = cut, {}, {}

    def attend(self, layer, q, k, v):
        self.open[layer] = (k, v)
        seen = [*self.kept.get(layer, []), (k, v)]
        return sdpa(q, *(torch.cat(parts, dim=1) for parts in zip(*seen)))

    def end_chunk(self):
        for layer, kv in self.open.items():
            self.kept.setdefault(layer, []).append(tuple(t.detach() if self.cut else t for t in kv))


def gradients_by_hand(model, rows, made, gradient, cut):
    """One graph over the whole clip, whose history is cut off where it is read, or left whole."""
    listed, cross_kv, total = Listed(cut), model.cross_kv(rows), 0
    for i, (x, sigma, x0, g) in enumerate(zip(made.inputs, made.sigmas, made.outputs, gradient.split(3, 2))):

        def flow(x, sigma, i=i):
            return model(x, frame_timesteps(sigma, len(x), 3, "cpu"), cross_kv, listed.attend, 3 * i)

        total = total + ((x - sigma * flow(x, sigma)) * g).sum()
        with torch.set_grad_enabled(not cut):
            flow(x0, 0.0)
        listed.end_chunk()
    return torch.autograd.grad(total, list(model.parameters()))


@pytest.mark.parametrize("attention", [EVERYTHING, AttentionConfig(mode="dense")], ids=["sparse", "dense"])
def test_gradients_are_those_of_a_graph_cut_at_the_cache(make_model, attention):
    model = make_model()
    memory, rows, made = rolled(model, attention, SamplerConfig(sigmas=shifted_sigmas(4)[:2]))
    gradient = torch.randn_like(made.clip)
    cut, whole = (gradients_by_hand(model, rows, made, gradient, cut) for cut in (True, False))
    memory.reset()
    dmd.replay(model, memory, rows, made, gradient)
    for name, p, want in zip([n for n, _ in model.named_parameters()], model.parameters(), cut):
        torch.testing.assert_close(
            p.grad, want, atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
        )
    leak = max((a - b).abs().max() for a, b in zip(cut, whole))
    assert leak > 0.1, "the test must be able to tell a gradient that reaches the cache"


def test_no_tensor_of_the_memory_is_part_of_a_graph(make_model):
    model = make_model()
    attention = replace(EVERYTHING, topk=0.25, persistent_frames=3)
    memory, rows, made = rolled(model, attention, SamplerConfig())
    before = {name: t.clone() for name, t in memory.snapshot().items()}
    memory.reset()
    dmd.replay(model, memory, rows, made, torch.randn_like(made.clip), clean_weight=1.0)
    assert not any(t.requires_grad for t in memory.cache.tensors().values())
    after = memory.snapshot()
    for name, tensor in before.items():
        if name != "page_len":  # of pages that are free again
            assert torch.equal(tensor, after[name]), f"{name}: the replay must leave what the rollout left"


def test_the_replay_sees_what_the_rollout_saw(make_model):
    """Every exit pass gives the rollout's own estimate again, whose memory went through the same choices."""
    model, attention = make_model(), replace(EVERYTHING, topk=0.25, persistent_frames=3)
    memory, rows, made = rolled(model, attention, SamplerConfig(sigmas=(1.0, 0.9)), batch=2)
    seen = []
    memory.reset()
    flow = dmd.pass_of(model, memory, model.cross_kv(rows))
    for x, sigma, x0 in zip(made.inputs, made.sigmas, made.outputs):
        memory.begin_chunk(3)
        seen.append(x - sigma * flow(x, sigma).detach())
        flow(x0, 0.0)
        memory.end_chunk()
    assert torch.equal(torch.cat(seen, 2), made.clip)


def test_a_rollout_ends_at_its_exit_step(make_model):
    """Of two steps: x0 of the first pass, noised again with the noise of the family's rule, through a second pass."""
    model = make_model()
    _, rows, made = rolled(model, AttentionConfig(mode="dense"), SamplerConfig(sigmas=(1.0, 0.8)))
    assert made.sigmas == [0.8] * 3
    memory = memory_of(AttentionConfig(mode="dense"))
    memory.begin_chunk(3)
    flow = dmd.pass_of(model, memory, model.cross_kv(rows))
    noise = draw_noise((1, 16, 3, 4, 6), 5, 0, 999)
    x0 = noise - flow(noise, 1.0)
    torch.testing.assert_close(made.inputs[0], 0.2 * x0 + 0.8 * draw_noise((1, 16, 3, 4, 6), 5, 0, 0))


def test_one_video_of_a_batch_is_the_video_alone(make_model):
    model, rows = make_model(), torch.randn(2, 8, 32)
    both = dmd.roll(model, memory_of(EVERYTHING, 2), rows, SamplerConfig(), (2, *SHAPE), 0, 9, (5, 6))
    alone = dmd.roll(model, memory_of(EVERYTHING), rows[1:], SamplerConfig(), (1, *SHAPE), 0, 9, (6,))
    torch.testing.assert_close(both.clip[1:], alone.clip, atol=1e-5, rtol=1e-5)


def test_the_gradient_is_that_of_the_published_loss():
    """.5 MSE(x, (x - g) detached) in float64, mean over the clip."""
    torch.manual_seed(0)
    x, fake, real = (torch.randn(2, 16, 3, 4, 6) for _ in range(3))
    g = dmd.dmd_gradient(x, fake, real)
    for i in range(2):
        torch.testing.assert_close(g[i], (fake[i] - real[i]) / (x[i] - real[i]).abs().mean())
    leaf = x.double().requires_grad_()
    (0.5 * F.mse_loss(leaf, (leaf - g.double()).detach())).backward()
    torch.testing.assert_close(leaf.grad, g.double() / x.numel())


def test_levels_stay_in_the_published_range():
    levels = dmd.draw_level(torch.Generator().manual_seed(0), 4000)
    assert levels.min() == pytest.approx(0.02)
    assert levels.max() == pytest.approx(0.98)
    assert levels.median() == pytest.approx(5 / 6, abs=0.02), "half of the uniform numbers, warped by shift 5"
    assert dmd.guided(torch.tensor(2.0), torch.tensor(1.0), 3.0) == 5


def test_the_clean_pass_is_trained_where_it_is_asked_for(make_model):
    model = make_model()
    memory, rows, made = rolled(model, EVERYTHING, SamplerConfig())
    memory.reset()
    assert dmd.replay(model, memory, rows, made, torch.zeros_like(made.clip)) == 0
    assert all(p.grad.abs().max() == 0 for p in model.parameters())
    memory.reset()
    losses = []
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(6):
        memory.reset()
        losses.append(dmd.replay(model, memory, rows, made, torch.zeros_like(made.clip), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]


def test_the_ramp_reaches_its_target():
    cfg = DmdTraining(attention=AttentionConfig(topk=0.1), ramp_interval=100, ramp_rate=0.1)
    assert [cfg.topk_at(n) for n in (0, 50, 100, 800)] == pytest.approx([1, 0.95, 0.9, 0.2])
    assert cfg.topk_at(900) == cfg.topk_at(5000) == pytest.approx(0.1)
    assert cfg.attention_at(900).topk == pytest.approx(0.1)
    assert DmdTraining().topk_at(0) == 0.25, "no ramp unless it is asked for"


def test_every_exit_step_comes_and_all_processes_agree():
    cfg = DmdTraining()
    exits = [cfg.exit_step(n) for n in range(400)]
    assert {exits.count(i) > 60 for i in range(4)} == {True}
    assert exits == [DmdTraining(batch=8).exit_step(n) for n in range(400)]
    assert cfg.sampler_at(0).sigmas == cfg.sampler.sigmas[: cfg.exit_step(0) + 1]
    assert seed_of(0, 1, "a") != seed_of(0, 11, "a")
    assert 0 <= seed_of(0, 1, "a") < 2**62


def test_a_long_rollout_is_cut_into_pieces():
    cfg = LongTuning(rollout_frames=60, frames=21, new_frames=18)
    pieces = [cfg.piece(n) for n in range(5)]
    assert [tuple(p) for p in pieces] == [(0, 0, 21), (0, 21, 18), (0, 39, 18), (1, 0, 21), (1, 21, 18)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 6}, "batch 6 cannot be split into 4 processes of 1 clips at once: use a multiple of 4"),
        ({"frames": 20}, "20 latent frames .* not a whole number of chunks of 3: use 18"),
        ({"student_every": 0}, "student_every 0 must be 1 or more"),
        ({"ramp_rate": 0.0}, "ramp_interval 0 and ramp_rate 0.0"),
        ({"critic_topk": 1.5}, "critic_topk 1.5 must be above 0 and at most 1"),
        ({"attention": AttentionConfig(window_frames=7)}, "window_frames 7"),
    ],
)
def test_settings_that_do_not_fit_are_explained(changes, message):
    with pytest.raises(ValueError, match=message):
        DmdTraining(**changes).validate(4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"new_frames": 24}, "new_frames 24 do not fit into the window of 21"),
        ({"rollout_frames": 18}, "rollout_frames 18 is shorter than one window of 21"),
        ({"attention": AttentionConfig(mode="dense")}, "mode 'dense' keeps every frame of a long rollout"),
    ],
)
def test_long_settings_that_do_not_fit_are_explained(changes, message):
    with pytest.raises(ValueError, match=message):
        LongTuning(**changes).validate()
