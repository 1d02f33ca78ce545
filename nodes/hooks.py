"""The hooks on a cloned MODEL that put chunk memory behind its self-attention.

Weights are touched only through the host's own layers (`attn.q/k/v/o/norm_q/norm_k`), so LoRA, offloading, fp8 storage
and GGUF keep working. Without a run of the Sparse Forcing Sampler every hook steps aside: the model is bitwise itself.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import comfy.model_management
import torch
from comfy.ldm.flux.math import apply_rope1
from comfy.patcher_extension import CallbacksMP, WrappersMP, add_wrapper_with_key
from torch import Tensor

from ..sparse_attn.config import AttentionConfig
from ..sparse_attn.estimate import kept_bytes
from ..sparse_attn.fast_weights import FastOptions
from .checks import require_wan
from .compiling import said_while_compiling
from .fast_pass import HostFastPass, fast_pass_for
from .host import inference_dtype, known
from .recovery import MemoryTornError, reason_of
from .session import ATTENTION, FAST, PASS, RUN, UNDECIDED, ForwardPass, SamplingRun

logger = logging.getLogger("sparse_forcing.nodes")

EXACT = FastOptions()
NORM_EPS = 1e-6  # Wan's
OVERRIDE = "optimized_attention_override"  # where other nodes put an attention function of theirs


class StreamAttention:
    """Replaces `self_attn.forward` of one block: projects, rotates, and lets the run's memory attend."""

    sparse_forcing = True  # by which the fast pass knows that nobody else has taken this place

    def __init__(self, attn: Any, layer: int):
        self.attn, self.layer = attn, layer

    def __call__(
        self,
        x: Tensor,
        freqs: Tensor,
        *args: Any,
        transformer_options: dict = {},  # noqa: B006 - the host's own signature
        **kwargs: Any,
    ) -> Tensor:
        attn, current = self.attn, transformer_options.get(PASS)
        if current is None:
            stock = type(attn).forward
            return stock(attn, x, freqs, *args, transformer_options=transformer_options, **kwargs)
        patches = transformer_options.get("patches", {}).get("attn1_patch", ())
        q, k, v = attn.q(x), attn.k(x), attn.v(x)
        if not patches and _ready(attn.norm_q, x) and _ready(attn.norm_k, x):
            norms = attn.norm_q.weight.data, attn.norm_k.weight.data
            return attn.o(current.attend_projections(self.layer, (q, k, v), norms))
        heads = (*x.shape[:2], attn.num_heads, attn.head_dim)
        q = apply_rope1(attn.norm_q(q).view(heads), current.freqs)
        k = apply_rope1(attn.norm_k(k).view(heads), current.freqs)
        y = current.attend(self.layer, q, k, v.view(heads)).flatten(2)
        for patch in patches:
            y = patch({"x": y, "q": q, "k": k, "transformer_options": transformer_options})
        return attn.o(y)


def _ready(norm: Any, x: Tensor) -> bool:
    """Whether a norm is ComfyUI's RMSNorm over all heads, with a weight that a fused kernel may read as it lies."""
    weight = getattr(norm, "weight", None)
    return (
        isinstance(norm, torch.nn.RMSNorm)
        and norm.eps == NORM_EPS
        and isinstance(weight, Tensor)
        and (weight.device, weight.dtype) == (x.device, x.dtype)
        and not getattr(norm, "weight_function", None)
        and "forward" not in vars(norm)
        and not (norm._forward_hooks or norm._forward_pre_hooks)
    )


def diffusion_model_wrapper(
    executor: Any,
    x: Tensor,
    timestep: Tensor,
    context: Tensor,
    clip_fea: Tensor | None = None,
    time_dim_concat: Tensor | None = None,
    transformer_options: dict = {},  # noqa: B006 - the host's own signature
    **kwargs: Any,
) -> Tensor:
    """Hand the forward its states and positions.

    Positions are float32 whatever the model's type: bfloat16 cannot count frames beyond 256.
    """
    run: SamplingRun | None = transformer_options.get(RUN)
    if run is not None:
        _refuse_extra_tokens(time_dim_concat, kwargs)
        network = executor.class_obj
        keys = transformer_options["uuids"]
        if run.has_done(keys):  # the memory keeps what came first, and a flow at sigma 0 counts for nothing
            return torch.zeros_like(x)
        states = run.states_for(keys, network, x)
        flow = _try_fast(run, executor, transformer_options, (states, keys, x, timestep, context))
        if flow is not None:
            return flow
        freqs = network.rope_encode(
            *x.shape[2:],
            t_start=run.t_start,
            device=x.device,
            dtype=torch.float32,
            **known(network.rope_encode, transformer_options=transformer_options),
        )
        current = ForwardPass(states, freqs, transformer_options, run.workspace)
        transformer_options = {**transformer_options, PASS: current}
    forward = partial(
        executor, x, timestep, context, clip_fea, time_dim_concat, transformer_options, **kwargs
    )
    return forward() if run is None else _through_memory(network, run, current, forward)


def _through_memory(network: Any, run: SamplingRun, current: ForwardPass, forward: Callable) -> Tensor:
    """One forward in which every layer reads the memory.

    A layer whose attention another pack replaced behind Apply Sparse Forcing would see its own chunk alone: it gets
    ours for the length of this run, and the forward is done again. A replacement that calls ours in turn may stay, and
    so may one that skips a layer. A chunk's last pass changes the memory and cannot be done again: where a run begins
    with one, to read given frames, it is tried as if another one followed.
    """
    trying = run.attention.mode == "sparse" and not run.tried and not run.noisy
    run.tried = True
    if trying:
        run.noisy = True
    with _replaced_attention(network, run.retaken):
        output = forward()
    if trying:
        run.noisy = False
    lost = [
        layer
        for layer, block in enumerate(network.blocks)
        if layer not in current.layers | run.retaken
        and not isinstance(block.self_attn.forward, StreamAttention)
    ]
    if not lost:
        return _through_memory(network, run, current, forward) if trying else output
    logger.warning(
        "Another node replaced the self-attention of %d layers behind Apply Sparse Forcing, which would leave them "
        "without memory; Sparse Forcing takes its place for this run.",
        len(lost),
    )
    run.retaken.update(lost)
    return _through_memory(network, run, current, forward)


def _try_fast(
    run: SamplingRun, executor: Any, options: dict[str, Any], forward: tuple[Any, ...]
) -> Tensor | None:
    """The flow by the run's fast pass; None where ComfyUI's own layers have to make it, as after any failure.

    forward: the arguments of HostFastPass. Raises MemoryTornError where the memory has to be written anew first.
    """
    begun = False
    try:
        fast = _fast_pass(run, executor, forward[2], options)
        if fast is None:
            return None
        begun = True
        with said_while_compiling((run.attention.mode, run.noisy, run.frame > 0)):
            return fast(*forward)
    except comfy.model_management.InterruptProcessingException:
        raise
    except Exception as error:
        logger.debug("The fast pass failed.", exc_info=True)
        reason = reason_of(error)
    fast = None
    run.give_up_fast(reason)
    if begun and run.tears:
        raise MemoryTornError(reason)
    return None


def _fast_pass(run: SamplingRun, executor: Any, x: Tensor, options: dict[str, Any]) -> HostFastPass | None:
    """The run's fast pass, chosen at its first forward, and anew where the host has taken weights away."""
    if isinstance(run.fast, HostFastPass) and not run.fast.still_there():
        logger.info("ComfyUI has moved weights away; Sparse Forcing prepares its fast pass again.")
        run.fast = UNDECIDED
    if run.fast is UNDECIDED:
        wanted = fast_options(options)
        run.fast = wanted and fast_pass_for(executor, x, options, run.attention.mode, wanted)
    return run.fast


def _refuse_extra_tokens(time_dim_concat: Tensor | None, conditions: dict[str, Any]) -> None:
    given = {"time_dim_concat": time_dim_concat, **conditions}
    extra = [
        k for k in ("time_dim_concat", "reference_latent", "context_latents") if given.get(k) is not None
    ]
    if extra:
        raise ValueError(
            f"The conditioning carries {', '.join(extra)}, which adds tokens of its own to every chunk. "
            "Sparse Forcing generates from text; remove the node that adds a reference."
        )


def outer_sample_wrapper(
    executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, *args: Any, **kwargs: Any
):
    """Check shapes and open the run before anything is loaded; warn where another sampler would leave us idle."""
    guider = executor.class_obj
    options = guider.model_options["transformer_options"]
    if hasattr(sampler, "open_run"):
        options[RUN] = run = sampler.open_run(options, tuple(noise.shape))
        run.guided = not math.isclose(getattr(guider, "cfg", 1.0), 1.0)
        if run.attention.mode == "sparse" and OVERRIDE in options:
            logger.warning(
                "Another node's attention is used for the prompt only: mode sparse reads its memory with a kernel of "
                "its own. Modes window and dense use that node's for everything."
            )
    else:
        logger.warning(
            "Sparse Forcing is applied, but only the Sparse Forcing Sampler uses it: idle in this run."
        )
    return executor(noise, latent_image, sampler, *args, **kwargs)


def prepare_sampling_wrapper(
    executor: Any, model: Any, noise_shape: Any, conds: dict, *args: Any, **kwargs: Any
):
    """Ask the host for the memory of the longest pass and the caches; the whole video's would offload everything."""
    model_options = kwargs.get("model_options") or (args[0] if args else None) or {}
    run = model_options.get("transformer_options", {}).get(RUN)
    if run is not None:
        fast = fast_options(model_options["transformer_options"])
        noise_shape = _reserving_shape(run, model, noise_shape, conds, fast)
    return executor(model, noise_shape, conds, *args, **kwargs)


def _reserving_shape(
    run: SamplingRun, model: Any, noise_shape: Any, conds: dict, fast: FastOptions | None = None
) -> list[int]:
    """The longest pass's shape with frames added until the host's linear estimate covers the caches as well.

    The host loads as many weights as its estimate leaves room for, so the caches have to be part of the estimate;
    memory freed beforehand would be filled with weights again.
    """
    batch, channels, _, height, width = noise_shape
    sides = conds.values() if run.guided else [conds["positive"]]
    entries = sum(len(side) for side in sides)
    state = run.new_state(
        model.get_model_object("diffusion_model"),
        noise_shape,
        batch,
        inference_dtype(model.model),
        "meta",
    )
    frame_bytes = max(1.0, model.model.memory_required([batch, channels, 1, height, width]))
    cache_bytes = (state.nbytes + kept_bytes(state, fast)) * entries
    cache_frames = -(-(cache_bytes + run.reserve_bytes) // frame_bytes)
    return [batch, channels, run.longest_pass + int(cache_frames), height, width]


def patch_model(model: Any, attention: AttentionConfig, fast: FastOptions | None = EXACT) -> Any:
    """A clone of MODEL whose self-attention remembers chunks as `attention` says. ValueError unless it is Wan T2V.

    fast: how `fast_pass` computes where it takes the place of the host's layers; None: it may not.
    """
    network = require_wan(model)
    patched = model.clone()
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, outer_sample_wrapper),
        (WrappersMP.PREPARE_SAMPLING, prepare_sampling_wrapper),
        (WrappersMP.DIFFUSION_MODEL, diffusion_model_wrapper),
    ):
        patched.remove_wrappers_with_key(kind, RUN)
        patched.add_wrapper_with_key(kind, RUN, wrapper)
    patched.remove_callbacks_with_key(CallbacksMP.ON_CLONE, RUN)
    patched.add_callback_with_key(CallbacksMP.ON_CLONE, RUN, _on_clone)
    for path in _replace_attention(patched, network):
        logger.warning("Another node had replaced %s; Sparse Forcing takes its place.", path)
    patched.model_options["transformer_options"] |= {ATTENTION: attention, FAST: fast}
    return patched


def fast_options(options: dict[str, Any]) -> FastOptions | None:
    """What a MODEL's transformer options say of the fast pass, as `patch_model` takes it."""
    return options.get(FAST, EXACT)


def _replace_attention(model: Any, network: Any) -> list[str]:
    """Object patches for every block; returns the paths where another node's patch was overwritten."""
    foreign = []
    for layer, block in enumerate(network.blocks):
        path = f"diffusion_model.blocks.{layer}.self_attn.forward"
        if not isinstance(model.object_patches.get(path), StreamAttention | None):
            foreign.append(path)
        model.add_object_patch(path, StreamAttention(block.self_attn, layer))
    return foreign


def _on_clone(old: Any, new: Any) -> None:
    """The host sometimes clones onto freshly loaded weights; the patches must then speak of those."""
    if new.model is not old.model:
        _replace_attention(new, new.model.diffusion_model)


@contextmanager
def patched_for_this_run(network: Any, model_options: dict[str, Any]) -> Iterator[None]:
    """The same hooks on a model that no Apply node patched, for the length of one run."""
    if foreign := sum("forward" in block.self_attn.__dict__ for block in network.blocks):
        logger.warning(
            "Another node had replaced the self-attention of %d layers; Sparse Forcing takes its place for this run.",
            foreign,
        )
    add_wrapper_with_key(
        WrappersMP.DIFFUSION_MODEL, RUN, diffusion_model_wrapper, model_options, is_model_options=True
    )
    with _replaced_attention(network, range(len(network.blocks))):
        yield


@contextmanager
def _replaced_attention(network: Any, layers: Iterable[int]) -> Iterator[None]:
    """Ours in place of whatever is the self-attention of `layers`, which returns afterwards."""
    attentions = {layer: network.blocks[layer].self_attn for layer in layers}
    before = {layer: attn.__dict__.get("forward") for layer, attn in attentions.items()}
    try:
        for layer, attn in attentions.items():
            attn.forward = StreamAttention(attn, layer)
        yield
    finally:
        for layer, attn in attentions.items():
            if before[layer] is None:
                attn.__dict__.pop("forward", None)
            else:
                attn.forward = before[layer]
