"""The order of passes, the rule of noise, and that stopping anywhere changes nothing."""

from itertools import islice

import pytest
import torch
from sparse_forcing_pack.sparse_attn import rollout
from sparse_forcing_pack.sparse_attn.config import AttentionConfig, SamplerConfig
from sparse_forcing_pack.sparse_attn.rollout import prefill, stream

SHAPE = (1, 4, 5, 7)
SAMPLER = SamplerConfig(sigmas=(1.0, 0.75, 0.5))
MODES = [
    AttentionConfig(mode="dense"),
    AttentionConfig(mode="window", positions="rebased"),
    AttentionConfig(block_tokens=16),
    AttentionConfig(block_tokens=16, positions="rebased"),
]
IDS = [f"{attention.mode}-{attention.positions}" for attention in MODES]


class Recorder:
    """A memory and a model that only write down how they are used; x0 = x / 2."""

    def __init__(self):
        self.frame, self.events, self.inputs = 0, [], []

    def begin_chunk(self, frames):
        self.frames = frames
        self.events.append(f"begin {frames}")

    def end_chunk(self):
        self.frame += self.frames
        self.events.append("end")

    def __call__(self, x, sigma):
        self.events.append(sigma)
        self.inputs.append(x.clone())
        return x / 2


def latents(chunks):
    return torch.cat([chunk.latent for chunk in chunks], dim=2)


def collect(chunks, into):
    for chunk in chunks:
        into.append(chunk)


def host_noise(shape, seed):
    """The rule of ComfyUI's own autoregressive sampler: the global generator, seeded before every draw."""
    torch.manual_seed(seed)
    return torch.randn(shape)


def test_passes_of_a_chunk():
    model, seen = Recorder(), []
    chunks = list(
        stream(model, model, SAMPLER, shape=SHAPE, total_frames=5, on_pass=lambda *event: seen.append(event))
    )
    assert model.events == ["begin 3", 1.0, 0.75, 0.5, 0.0, "end", "begin 2", 1.0, 0.75, 0.5, 0.0, "end"]
    assert [event[:3] for event in seen] == [(chunk, step, 4) for chunk in range(2) for step in range(4)]
    assert torch.equal(seen[-1][3], chunks[-1].latent)
    assert [(chunk.index, chunk.start_frame, chunk.latent.shape[2]) for chunk in chunks] == [
        (0, 0, 3),
        (1, 3, 2),
    ]
    assert all(chunk.seconds > 0 and chunk.latent.dtype == torch.float32 for chunk in chunks)


def test_noise_rule():
    model = Recorder()
    list(stream(model, model, SAMPLER, shape=SHAPE, total_frames=6, seed=42))
    for chunk in range(2):
        shape, base = (1, 4, 3, 5, 7), 42 + 1000 * chunk
        x = host_noise(shape, base + 999)
        for step, following in enumerate((0.75, 0.5, 0.0)):
            assert torch.equal(model.inputs[4 * chunk + step], x)
            x = (1 - following) * (x / 2)
            if following:
                x = x + following * host_noise(shape, base + step)
        assert torch.equal(model.inputs[4 * chunk + 3], x), (
            "the clean pass gets the finished latent, without noise"
        )


def test_the_next_noise_is_drawn_before_the_wait(monkeypatch):
    """So the host draws while the device still computes; nothing is drawn past the end."""
    order, draw = [], rollout.draw_noise
    monkeypatch.setattr(rollout, "draw_noise", lambda *args: (order.append(args[2:]), draw(*args))[1])
    monkeypatch.setattr(rollout, "_waiting_for", lambda latent: lambda: order.append("wait"))
    model = Recorder()
    list(stream(model, model, SamplerConfig(sigmas=(1.0,)), shape=SHAPE, total_frames=5))
    assert order == [(0, 999), (1, 999), "wait", "wait"]


def test_no_noise_is_no_video():
    model = Recorder()
    assert list(stream(model, model, SAMPLER, noise=torch.zeros(1, 4, 0, 5, 7))) == []
    assert model.events == []


def test_given_noise_is_the_start_of_every_chunk():
    model = Recorder()
    noise = torch.randn(1, 4, 7, 5, 7)
    list(stream(model, model, SAMPLER, noise=noise))
    assert [torch.equal(model.inputs[4 * i], noise[:, :, 3 * i : 3 * i + 3]) for i in range(3)] == [True] * 3
    again = Recorder()
    list(stream(again, again, SAMPLER, noise=noise, start_chunk=2))
    assert torch.equal(again.inputs[0], noise[:, :, 6:])


def test_a_lower_first_sigma_scales_the_first_noise():
    model = Recorder()
    list(stream(model, model, SamplerConfig(sigmas=(0.5,)), shape=SHAPE, total_frames=3, seed=1))
    assert torch.equal(model.inputs[0], 0.5 * host_noise((1, 4, 3, 5, 7), 1 + 999))


def test_the_first_generated_chunk_may_have_its_own_schedule():
    sampler = SamplerConfig(sigmas=(1.0, 0.5), first_sigmas=(1.0, 0.8, 0.2))
    model, seen = Recorder(), []
    list(
        stream(model, model, sampler, shape=SHAPE, total_frames=6, on_pass=lambda *event: seen.append(event))
    )
    assert model.events == ["begin 3", 1.0, 0.8, 0.2, 0.0, "end", "begin 3", 1.0, 0.5, 0.0, "end"]
    assert [event[:3] for event in seen] == [(0, i, 4) for i in range(4)] + [(1, i, 3) for i in range(3)]
    later = Recorder()
    prefill(later, later, torch.zeros(1, 4, 3, 5, 7), 3)
    list(stream(later, later, sampler, shape=SHAPE, total_frames=3))
    assert later.events[3:] == ["begin 3", 1.0, 0.8, 0.2, 0.0, "end"], "also behind given frames"
    resumed = Recorder()
    list(stream(resumed, resumed, sampler, shape=SHAPE, total_frames=6, start_chunk=1))
    assert resumed.events == ["begin 3", 1.0, 0.5, 0.0, "end"]


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = Recorder()
    list(stream(model, model, SAMPLER, shape=SHAPE, total_frames=3))
    assert torch.equal(torch.rand(3), expected)


def test_seeds_wrap_at_64_bits():
    model = Recorder()
    list(stream(model, model, SAMPLER, shape=SHAPE, total_frames=6, seed=2**64 - 1))
    assert torch.equal(model.inputs[0], host_noise((1, 4, 3, 5, 7), 998))


def test_the_last_clean_pass_may_be_left_out():
    model = Recorder()
    seen = []
    list(
        stream(
            model,
            model,
            SAMPLER,
            shape=SHAPE,
            total_frames=6,
            clean_last=False,
            on_pass=lambda *event: seen.append(event[:3]),
        )
    )
    assert model.events == ["begin 3", 1.0, 0.75, 0.5, 0.0, "end", "begin 3", 1.0, 0.75, 0.5]
    assert seen[-1] == (1, 2, 3)
    endless = Recorder()
    list(islice(stream(endless, endless, SAMPLER, shape=SHAPE, clean_last=False), 2))
    assert endless.events.count("end") == 2, "an endless stream has no last chunk"


def test_endless():
    model = Recorder()
    chunks = list(islice(stream(model, model, SAMPLER, shape=SHAPE), 5))
    assert [chunk.start_frame for chunk in chunks] == [0, 3, 6, 9, 12]


@pytest.mark.parametrize("frames", [1, 3, 7])
def test_prefill_starts_with_the_shorter_chunk(frames):
    model, given = Recorder(), torch.randn(1, 4, frames, 5, 7)
    prefill(model, model, given, 3)
    first = frames % 3 or 3
    assert [x.shape[2] for x in model.inputs] == [first, *[3] * (frames // 3 - (frames % 3 == 0))]
    assert torch.equal(torch.cat(model.inputs, dim=2), given)
    assert {event for event in model.events if isinstance(event, float)} == {0.0}
    (chunk,) = stream(model, model, SAMPLER, shape=SHAPE, total_frames=3)
    assert (chunk.index, chunk.start_frame) == (0, frames)


def test_misuse_is_explained():
    model = Recorder()
    with pytest.raises(ValueError, match="neither shape nor noise: give shape"):
        next(stream(model, model, SAMPLER))
    with pytest.raises(ValueError, match="total_frames 6, but noise has 3 frames"):
        next(stream(model, model, SAMPLER, noise=torch.zeros(1, 4, 3, 5, 7), total_frames=6))
    with pytest.raises(ValueError, match="sigmas must fall"):
        next(stream(model, model, SamplerConfig(sigmas=(0.5, 1.0)), shape=SHAPE))


@pytest.fixture
def new_stream(make_toy):
    """A fresh state of the toy, and its model: the same in every call."""
    toy = make_toy((5, 7), layers=2)

    def make(attention):
        state = toy.state(attention, 3, total_frames=13)
        return toy.denoiser(state), state

    return make


@pytest.mark.parametrize("attention", MODES, ids=IDS)
def test_chunk_by_chunk_equals_one_call(new_stream, attention):
    options = {"shape": SHAPE, "total_frames": 12, "seed": 7}
    whole = latents(stream(*new_stream(attention), SAMPLER, **options))
    again = latents(stream(*new_stream(attention), SAMPLER, **options))
    assert torch.equal(whole, again), "same seed, same video"
    other = latents(stream(*new_stream(attention), SAMPLER, **(options | {"seed": 8})))
    assert not torch.equal(whole, other)
    model, state = new_stream(attention)
    pieces = [next(stream(model, state, SAMPLER, **options, start_chunk=chunk)) for chunk in range(4)]
    assert torch.equal(latents(pieces), whole)


@pytest.mark.parametrize("attention", MODES, ids=IDS)
def test_continuing_after_a_restart_equals_never_stopping(new_stream, attention):
    options = {"shape": SHAPE, "total_frames": 12, "seed": 7}
    given = torch.randn(1, 4, 1, 5, 7, generator=torch.Generator().manual_seed(0))
    model, state = new_stream(attention)
    prefill(model, state, given, 3)
    whole = latents(stream(model, state, SAMPLER, **options))

    model, state = new_stream(attention)
    prefill(model, state, given, 3)
    first = list(islice(stream(model, state, SAMPLER, **options), 2))
    saved = state.snapshot()
    model, state = new_stream(attention)
    state.restore(saved)
    rest = list(stream(model, state, SAMPLER, **options, start_chunk=2))
    assert torch.equal(latents(first + rest), whole)
    assert [chunk.start_frame for chunk in first + rest] == [1, 4, 7, 10]


@pytest.mark.parametrize("attention", MODES, ids=IDS)
@pytest.mark.parametrize("failing_pass", [0, 2, 3])
def test_an_interruption_costs_only_its_chunk(new_stream, attention, failing_pass):
    class Interrupted(Exception):
        pass

    def interrupt(chunk, step, passes, x0):
        if (chunk, step) == (2, failing_pass):
            raise Interrupted

    options = {"shape": SHAPE, "total_frames": 12, "seed": 7}
    whole = latents(stream(*new_stream(attention), SAMPLER, **options))
    model, state = new_stream(attention)
    done = []
    with pytest.raises(Interrupted):
        collect(stream(model, state, SAMPLER, **options, on_pass=interrupt), done)
    finished = 2 if failing_pass < 3 else 3  # behind its clean pass a chunk is finished, and handed out
    assert (len(done), state.frame) == (finished, 3 * finished)
    done += stream(model, state, SAMPLER, **options, start_chunk=finished)
    assert torch.equal(latents(done), whole)


def test_closing_the_iterator_keeps_what_was_handed_out(new_stream):
    model, state = new_stream(MODES[2])
    running = stream(model, state, SAMPLER, shape=SHAPE)
    first = next(running)
    running.close()
    assert (first.index, state.frame) == (0, 3)


def test_without_the_last_clean_pass_the_latents_are_the_same(new_stream):
    options = {"shape": SHAPE, "total_frames": 6, "seed": 7}
    model, state = new_stream(MODES[2])
    short = latents(stream(model, state, SAMPLER, **options, clean_last=False))
    assert torch.equal(short, latents(stream(*new_stream(MODES[2]), SAMPLER, **options)))
    assert state.frame == 3
