"""The fast pass and the streaming sampler in a host on a GPU; `--gpu` or `--dynamic-vram` chooses how it is started."""

from __future__ import annotations

import gc
import logging
from unittest.mock import patch

import comfy.model_management
import comfy.sd
import torch
from checks_common import (
    MODES,
    Lacks,
    add_lora,
    apply,
    close,
    fails,
    log_said,
    noise,
    our_sampler,
    pack,
    sample,
    tiny_model,
    tiny_state_dict,
)

ON_GPU = "a GPU: these checks are for --gpu"
MAX_ERROR = 0.05  # of 16-bit arithmetic, over four steps of every chunk


class Cancelled(Exception):
    """Stands for the host's own interruption, which `fails` would let through."""


def on_gpu() -> None:
    if comfy.model_management.get_torch_device().type != "cuda":
        raise Lacks(ON_GPU)


def said_of(model, x: torch.Tensor, **how) -> tuple[torch.Tensor, list[str]]:
    """Sample; -> the latents, and what the log says of the choice of the pass."""
    with log_said(logging.INFO) as texts:
        return sample(model, our_sampler(3), x, **how), texts


def on_its_own_layers(model, x: torch.Tensor, **how) -> torch.Tensor:
    with patch.object(pack("nodes.fast_pass"), "DEVICES", ()):
        video, texts = said_of(model, x, **how)
    assert "host's own layers" in texts[0], texts
    return video


def check_cuda_fast_pass_is_the_host_s_own_layers():
    on_gpu()
    for name, settings in {"dense": {"mode": "dense"}, **MODES}.items():
        for dressed in (lambda model: model, add_lora):
            x = noise(18)
            want = on_its_own_layers(apply(dressed(tiny_model()), **settings), x)
            got, texts = said_of(apply(dressed(tiny_model()), **settings), x)
            assert len(texts) == 1 and "runs its fast pass: " in texts[0], (name, texts)
            assert "own linear layers" not in texts[0], (name, texts)
            close(got, want, MAX_ERROR)


def check_cuda_fast_pass_with_guidance_and_batch():
    on_gpu()
    x = noise(12, batch=2)
    model = apply(tiny_model(), **MODES["sparse"])
    got, texts = said_of(model, x, cfg=3.0)
    assert "fast pass" in texts[0], texts
    close(got, on_its_own_layers(apply(tiny_model(), **MODES["sparse"]), x, cfg=3.0), MAX_ERROR)


def check_cuda_same_seed_same_video():
    on_gpu()
    model = apply(tiny_model(), **MODES["sparse"])
    first, second = (sample(model, our_sampler(3), noise(15)) for _ in range(2))
    assert torch.equal(first, second)


def check_cuda_nothing_waits_once_graphs_are_captured():
    """From the third chunk on: a wait in a pass or between chunks is an error."""
    on_gpu()
    for name in ("sparse", "window"):
        x = noise(24)
        model = apply(tiny_model(), **MODES[name])
        want = sample(model, our_sampler(3), x)

        def watch(step, x0, x, steps):
            torch.cuda.set_sync_debug_mode("error" if 3 * 5 <= step < steps - 1 else "default")

        try:
            with log_said() as texts:
                got = sample(model, our_sampler(3), x, report=watch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert texts == [], texts  # the fast pass has not been given up
        close(got, want, MAX_ERROR)


def check_cuda_fast_pass_calls_the_host_s_linear_layers():
    """Where there is no room for copies of weights in 8 bits, and where there is."""
    on_gpu()
    options = {"dtype": torch.float8_e4m3fn}
    x = noise(12)
    loaded = apply(
        comfy.sd.load_diffusion_model_state_dict(tiny_state_dict(), model_options=options), mode="dense"
    )
    want = on_its_own_layers(loaded, x)
    for spare, why in ((10**15, "own linear layers"), (0, "were made ready")):
        with patch.object(pack("nodes.fast_pass"), "SPARE_BYTES", spare):
            got, texts = said_of(loaded, x)
        assert why in texts[0], texts
        close(got, want, MAX_ERROR)


def check_cuda_fifty_cancelled_runs_leave_no_bytes():
    on_gpu()
    model, x = apply(tiny_model(), **MODES["sparse"]), noise(15)
    sample(model, our_sampler(3), x)

    def cancel_after(passes: int):
        seen = 0

        def report(*_args) -> None:
            nonlocal seen
            seen += 1
            if seen == passes:
                raise Cancelled("cancelled")

        return report

    held = []
    for turn in range(51):
        fails("cancelled", sample, model, our_sampler(3), x, report=cancel_after(1 + turn % 18))
        gc.collect()
        held.append(torch.cuda.memory_allocated())
    assert held[-1] <= held[0], held
    assert torch.equal(sample(model, our_sampler(3), x), sample(model, our_sampler(3), x))
