"""Failures of the fast pass, injected wherever one can happen: the video is whole, and the log says so once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import comfy.model_management
import torch
from checks_common import MODES, apply, close, fails, log_said, noise, our_sampler, pack, sample, tiny_model

GIVES_UP = "gives its fast pass up and continues with ComfyUI's own layers: "
NO_COMPILER = "Failed to find C compiler. Please specify via CC environment variable."
STEPS = 4


@contextmanager
def failing(owner: str, name: str, at: int = 1, error: BaseException | None = None) -> Iterator[list[str]]:
    """Let the `at`-th call of a function of the pack fail, with the fast pass serving on a CPU; -> the warnings."""
    place, _, kind = owner.partition(":")
    holder = getattr(pack(place), kind) if kind else pack(place)
    real, calls = getattr(holder, name), []

    def fail(*args, **kwargs):
        calls.append(name)
        if len(calls) == at:
            raise error or RuntimeError(NO_COMPILER)
        return real(*args, **kwargs)

    cpu = patch.object(pack("nodes.fast_pass"), "DEVICES", ("cpu",))
    with log_said() as said, cpu, patch.object(holder, name, fail):
        yield said
    assert len(calls) >= at, f"{name} was called {len(calls)} times"


@contextmanager
def torn(chunk: int) -> Iterator[list[str]]:
    """Let the clean pass of that chunk fail in its last layer, where the first one has changed the memory."""
    fast, pages = pack("sparse_attn.fast").FastPass, pack("sparse_attn.memory").PagedKV
    remember, finish, cleaned = fast.remember, pages.finish, []

    def count(*args):
        cleaned.append(len(cleaned))
        try:
            remember(*args)
        finally:
            cleaned.append(len(cleaned))

    def fail(self, layer, *args):
        if len(cleaned) == 2 * chunk + 1 and layer:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        finish(self, layer, *args)

    cpu = patch.object(pack("nodes.fast_pass"), "DEVICES", ("cpu",))
    replaced = patch.object(fast, "remember", count), patch.object(pages, "finish", fail)
    with log_said() as said, cpu, replaced[0], replaced[1]:
        yield said
    assert len(cleaned) == 2 * chunk + 2, "the fast pass went on"


def said_once(texts: list[str], reason: str) -> None:
    assert [GIVES_UP in text for text in texts].count(True) == 1, texts
    assert any(GIVES_UP in text and reason in text for text in texts), texts


def check_fallback_wherever_the_fast_pass_fails():
    fast, x = "sparse_attn.fast:FastPass", noise(12)
    memory = torch.OutOfMemoryError("CUDA out of memory.")
    for settings in (MODES["sparse"], {"mode": "dense"}, MODES["window"]):
        want = sample(apply(tiny_model(), **settings), our_sampler(3), x)
        for owner, name, at, error in (
            ("nodes.fast_pass", "host_weights", 1, memory),
            ("sparse_attn.wan:WanModel", "cross_kv", 1, None),
            (fast, "__init__", 1, ValueError("self-test: wrong numbers")),
            (fast, "at", 1, None),
            (fast, "at", 2 * STEPS + 3, memory),
            (fast, "remember", 1, None),
            (fast, "remember", 3, None),
        ):
            with failing(owner, name, at, error) as said:
                close(sample(apply(tiny_model(), **settings), our_sampler(3), x), want, 1e-4)
            said_once(said, str(error or NO_COMPILER))


def check_fallback_in_the_middle_of_a_clean_pass():
    for name, cfg, batch, clean_pass in (
        ("sparse", 1.0, 1, 0),
        ("sparse, rebased", 1.0, 1, 3),
        ("sparse, novelty", 3.0, 2, 5),  # the third chunk's second entry
    ):
        x, settings = noise(15, batch=batch), MODES[name]
        want = sample(apply(tiny_model(), **settings), our_sampler(3), x, cfg=cfg)
        with torn(clean_pass) as said:
            close(sample(apply(tiny_model(), **settings), our_sampler(3), x, cfg=cfg), want, 1e-4)
        said_once(said, "OutOfMemoryError")
        frames = 3 * (clean_pass if cfg == 1 else clean_pass // 2)
        assert f"writes {frames} finished latent frames into its memory again" in said[1], said


def whole() -> torch.Tensor:
    return sample(apply(tiny_model(), **MODES["sparse"]), our_sampler(3), noise(15))


def with_start(frames: int):
    """A model with that many latent frames in front of the video."""
    model = apply(tiny_model(), **MODES["sparse"])
    model.model_options["transformer_options"]["ar_config"] = {"initial_latent": noise(frames, seed=4)}
    return model


def check_fallback_writes_given_frames_again():
    x = noise(16)
    want = sample(with_start(4), our_sampler(3), x)
    for chunk in (0, 1, 3):  # the given frames are two chunks, of 1 and 3 frames
        with torn(chunk) as said:
            close(sample(with_start(4), our_sampler(3), x), want, 1e-4)
        said_once(said, "OutOfMemoryError")


def streamed(finished: bool = True) -> torch.Tensor:
    """A video whose chunks are handed on, as Stream Video has them."""
    made: list[torch.Tensor] = []
    sampler = pack("nodes.streaming").StreamSampler(
        3, 15, lambda chunk: made.append(chunk.latent),
        finished=(lambda start, stop: torch.cat(made, dim=2)[:, :, start:stop]) if finished else None,
    )  # fmt: skip
    sample(apply(tiny_model(), **MODES["sparse"]), sampler, torch.zeros(1, 16, 3, 8, 12))
    return torch.cat(made, dim=2)


def check_fallback_where_chunks_are_handed_on():
    want = streamed()
    with torn(2) as said:
        close(streamed(), want, 1e-4)
    said_once(said, "OutOfMemoryError")
    with torn(2):
        fails("switch fast_pass off", streamed, finished=False)


def check_fallback_serves_a_stop_and_the_layers_own_errors_as_ever():
    """Neither the host's interrupt nor an error of ComfyUI's own layers is swallowed."""
    stop = comfy.model_management.InterruptProcessingException()
    with failing("sparse_attn.fast:FastPass", "at", 3, stop) as said:
        try:
            whole()
            raise AssertionError("the interrupt was swallowed")
        except comfy.model_management.InterruptProcessingException:
            pass
    assert not said
    with failing("sparse_attn.fast:FastPass", "at", 3):
        own = patch.object(pack("nodes.hooks"), "_through_memory", side_effect=RuntimeError("their own"))
        with own:
            fails("their own", whole)


def check_fallback_frees_what_the_fast_pass_held():
    import gc
    import weakref

    kind, held = pack("nodes.fast_pass").HostFastPass, []
    init = kind.__init__

    def spy(self, *args):
        init(self, *args)
        held.append(weakref.ref(self))

    seen = []
    free = pack("nodes.recovery").free_device_memory

    def freed():
        seen.append(held[0]() is None)
        free()

    session = patch.object(pack("nodes.session"), "free_device_memory", freed)
    gc.disable()
    try:
        with failing("sparse_attn.fast:FastPass", "at", 6), patch.object(kind, "__init__", spy), session:
            whole()
    finally:
        gc.enable()
    assert seen == [True]
