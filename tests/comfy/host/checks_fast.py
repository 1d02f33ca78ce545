"""The fast pass inside the host: the numbers of the host's own layers, and those layers where it may not serve."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import comfy.patcher_extension
import torch
from checks_common import (
    MODES,
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
)


@contextmanager
def fast_on_the_cpu() -> Iterator[list[str]]:
    """Lets the fast pass serve where a GPU is not at hand; -> what the log says of the choice."""
    with log_said(logging.INFO) as texts, patch.object(pack("nodes.fast_pass"), "DEVICES", ("cpu",)):
        yield texts


def both(model, x: torch.Tensor, **how) -> list[str]:
    """Sample with the host's layers and with the fast pass, which must agree; -> what the log said."""
    want = sample(model, our_sampler(3), x, **how)
    with fast_on_the_cpu() as said:
        close(sample(model, our_sampler(3), x, **how), want, 1e-4)
    return said


def check_fast_pass_is_the_host_s_own_layers():
    for settings in ({"mode": "dense"}, *MODES.values()):
        for causal in (True, False):
            said = both(apply(tiny_model(causal), **settings), noise(15))
            assert said == ["Sparse Forcing runs its fast pass: the model is as it was loaded."], said


def check_fast_pass_with_guidance_batch_lora_and_a_short_chunk():
    model = tiny_model()
    for settings in (MODES["sparse"], {"mode": "dense"}):
        # of six seeds, the usual one has two blocks with nearly the same score, which rounding puts in another order
        x = noise(13 if settings["mode"] == "dense" else 12, batch=2, seed=1)
        assert "fast pass" in both(apply(add_lora(model), **settings), x, cfg=3.0)[0]
    with fast_on_the_cpu():
        plain, changed = (
            sample(apply(m, **MODES["sparse"]), our_sampler(3), noise(6)) for m in (model, add_lora(model))
        )
    assert (changed - plain).abs().max() > 1e-3


def check_fast_pass_uses_the_host_s_weights_and_leaves_them():
    model = apply(tiny_model(), **MODES["sparse"])
    before = {name: p.data_ptr() for name, p in model.model.diffusion_model.named_parameters()}
    made, real = [], pack("nodes.fast_pass").HostFastPass

    def spy(*args):
        made.append(real(*args))
        return made[-1]

    with fast_on_the_cpu(), patch.object(pack("nodes.fast_pass"), "HostFastPass", spy):
        sample(model, our_sampler(3), noise(6))
    (fast,) = made
    for name, p in fast.model.model.named_parameters():
        assert p.data_ptr() == before[name], f"{name} was copied"
    assert before == {name: p.data_ptr() for name, p in model.model.diffusion_model.named_parameters()}


def refused(model, reason: str) -> None:
    said = both(model, noise(6))
    assert len(said) == 1 and reason in said[0], said


def check_host_s_layers_run_where_another_node_is_at_work():
    def model():
        return apply(tiny_model(), **MODES["sparse"])

    wrapped = model()
    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    wrapped.add_wrapper_with_key(kind, "another", lambda executor, *args, **kwargs: executor(*args, **kwargs))
    refused(wrapped, "another node has wrapped the model")
    attention = model()
    attention.set_model_attn1_output_patch(lambda out, options: out)
    attention.set_model_patch(lambda args: args["x"], "attn1_patch")
    refused(attention, "another node has set patches")
    replaced = model()
    block = replaced.model.diffusion_model.blocks[0]
    replaced.add_object_patch("diffusion_model.blocks.0.ffn.forward", block.ffn.forward)
    refused(replaced, "blocks.0.ffn has its forward replaced")


def check_weights_that_move_away_are_prepared_again():
    """A host that needs the memory takes the weights; the rest of the video runs on what is there then."""
    model, fast_pass = apply(tiny_model(), **MODES["sparse"]), pack("nodes.fast_pass")
    x = noise(9)
    want, asked = sample(model, our_sampler(3), x), []

    def still_there(self) -> bool:
        asked.append(self)
        return len(asked) != 8  # in the second chunk

    with fast_on_the_cpu() as said, patch.object(fast_pass.HostFastPass, "still_there", still_there):
        close(sample(model, our_sampler(3), x), want, 1e-4)
    assert len(set(asked)) == 2 and ["fast pass" in text for text in said] == [True] * 3, said


def check_shortcuts_are_close_and_said():
    """Apply's `shortcuts`: near the exact video, and in the log; where none can be taken, refused, or said."""
    node = pack("nodes.apply").SparseForcingApply
    exact, x = apply(tiny_model(), **MODES["sparse"]), noise(15)
    want = sample(exact, our_sampler(3), x)
    for name, told in (("shared", "router_once, reuse"), ("shared + fp8", "fp8, router_once, reuse")):
        (model,) = node.execute(tiny_model(), **MODES["sparse"], shortcuts=name).args
        with fast_on_the_cpu() as said:
            found = sample(model, our_sampler(3), x)
        assert f"runs its fast pass, with shortcuts ({told}" in said[0], said
        off = (found[:, :, :3] - want[:, :, :3]).norm() / want[:, :, :3].norm()
        assert off < (1e-4 if name == "shared" else 0.2), "the first chunk has nothing persistent"
        off = (found - want).norm() / want.norm()
        assert 1e-5 < off < 0.5, off
        with log_said(logging.INFO) as said:
            close(sample(model, our_sampler(3), x), want, 1e-4)
        assert "takes no shortcuts" in said[1], said
    wrong = {"fast_pass": False, "shortcuts": "shared"}
    fails("switch fast_pass on", node.execute, tiny_model(), **MODES["sparse"], **wrong)


def check_the_fast_pass_can_be_switched_off():
    node = pack("nodes.apply").SparseForcingApply
    (model,) = node.execute(tiny_model(), mode="dense", fast_pass=False).args
    assert both(model, noise(6)) == []
    (model,) = node.execute(tiny_model(), mode="dense").args
    assert "fast pass" in both(model, noise(6))[0]


def check_without_a_gpu_the_host_s_layers_run():
    assert pack("nodes.fast_pass").DEVICES == ("cuda",)
