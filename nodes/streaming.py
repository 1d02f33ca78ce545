"""The chunk-by-chunk sampler behind both sampling nodes, in the shape of a ComfyUI SAMPLER."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, count
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ..sparse_attn.config import AttentionConfig, SamplerConfig, check_length, shifted_sigmas
from ..sparse_attn.rollout import Chunk, prefill, stream
from .checks import check_latent
from .hooks import patched_for_this_run
from .recovery import Finished, keep_on_device, recovering
from .session import ATTENTION, FIRST_STEPS, RUN, SamplingRun

logger = logging.getLogger("sparse_forcing.nodes")

TRAINED_FRAMES = 1024  # where Wan's own table of positions ends, 4 minutes and 16 seconds


class StreamSampler(comfy.samplers.KSAMPLER):
    """A SAMPLER that denoises a video chunk by chunk over the model's chunk memory.

    As an ordinary SAMPLER it fills the latent it is given, starting from the given noise. With `total_frames` it works
    from a latent of one chunk instead and generates that many latent frames, each chunk handed to `on_chunk` and
    dropped, so that no tensor grows with the video. `reserve_bytes` is extra device memory the caller will need.
    `first_steps` > 0 gives the first generated chunk that many steps of the shift-5 schedule. on_open(run, base model,
    x) is called before the first pass, and may restore a session into the run. With `clean_last` the last chunk enters
    the memory, too, so that a later run can go on from there. `rereads`: recent frames may run again, as where the
    prompt changes. finished(start, stop) gives finished latent frames in the model's scale, from which the memory is
    written anew if the fast pass fails in a clean pass; without `on_chunk` the sampler has them itself.
    """

    def __init__(
        self,
        chunk_frames: int,
        total_frames: int | None = None,
        on_chunk: Callable[[Chunk], None] | None = None,
        reserve_bytes: int = 0,
        first_steps: int = 0,
        on_open: Callable[[SamplingRun, Any, Tensor], None] | None = None,
        clean_last: bool = False,
        rereads: bool = False,
        finished: Finished | None = None,
    ):
        super().__init__(sample_stream)
        self.finished = finished
        self.on_open, self.clean_last = on_open, clean_last
        self.chunk_frames, self.total_frames, self.on_chunk = chunk_frames, total_frames, on_chunk
        self.reserve_bytes, self.first_steps, self.rereads = reserve_bytes, first_steps, rereads

    def schedule(self, sigmas: Tensor, transformer_options: dict[str, Any]) -> SamplerConfig:
        """The host's `sigmas` [steps + 1], and the opening chunk's: its own steps, else those the loader asks for.

        Where the schedule starts below full noise, the first chunk is not made out of nothing and has no own steps.
        """
        values = _schedule(sigmas)
        steps = (self.first_steps or transformer_options.get(FIRST_STEPS, 0)) if values[0] == 1 else 0
        first = (
            tuple(torch.tensor(shifted_sigmas(steps)).tolist()) if steps else None
        )  # float32, as the host's
        config = SamplerConfig(values, self.chunk_frames, first)
        config.validate()
        return config

    def open_run(self, transformer_options: dict[str, Any], shape: tuple[int, ...]) -> SamplingRun:
        """Check the latent's shape [B, C, F, H, W] and make the run's memory; ValueError where it cannot work."""
        attention = transformer_options.get(ATTENTION, AttentionConfig(mode="dense"))
        total = self.total_frames or shape[2]
        check_latent((*shape[:2], total, *shape[3:]))
        if attention.mode != "dense":
            check_length(total - given_frames(transformer_options), self.chunk_frames)
        if total > TRAINED_FRAMES and attention.positions == "absolute":
            logger.warning(
                "%d latent frames with positions 'absolute': Wan knows %d. Use positions 'rebased' for long videos.",
                total,
                TRAINED_FRAMES,
            )
        return SamplingRun(attention, self.chunk_frames, total, self.reserve_bytes, self.rereads)

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable | None,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        # The host's own callback counts sigmas; ours counts every pass of every chunk, so it is handed past.
        if denoise_mask is not None:
            raise ValueError("Sparse Forcing cannot inpaint: remove the noise mask from the latent.")
        inner = comfy.samplers.KSAMPLER(partial(sample_stream, sampler=self, report=callback))
        return inner.sample(model_wrap, sigmas, extra_args, None, noise, latent_image, None, disable_pbar)


def given_frames(transformer_options: dict[str, Any]) -> int:
    """Latent frames that ARVideoI2V put in front of the video."""
    initial = transformer_options.get("ar_config", {}).get("initial_latent")
    return 0 if initial is None else initial.shape[2]


def sample_stream(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any],
    callback: Callable | None,
    disable: bool,
    *,
    sampler: StreamSampler,
    report: Callable | None,
) -> Tensor:
    """Denoise `x` [B, C, F, H, W] (noise scaled to the first sigma) chunk by chunk; returns the clean latent.

    `report(step, x0, x, steps)` is the host's progress and preview callback, called once a pass.
    """
    options = extra_args["model_options"]["transformer_options"]
    schedule = sampler.schedule(sigmas, options)
    base = model.inner_model.inner_model
    s_in = x.new_ones([x.shape[0]])
    keep_on_device(getattr(model.inner_model, "conds", {}), x.device)
    with _open(sampler, base.diffusion_model, extra_args["model_options"], tuple(x.shape)) as run:

        def evaluate(latent: Tensor, sigma: float) -> Tensor:
            return model(latent, sigma * s_in, **extra_args)

        denoise = recovering(run, evaluate, x.device)
        run.finished = sampler.finished
        if sampler.on_open is not None:
            sampler.on_open(run, base, x)
        start, resumed = _start_frames(base, options, x), run.frame > 0
        made: list[Tensor] = []
        if start is not None:
            run.given = start.shape[2]
            if not resumed:
                run.finished = lambda first, stop: start[:, :, first:stop]
                prefill(denoise, run, start, run.chunk_frames)
        run.finished = sampler.finished or _frames_of(made, sampler)
        chunks = _chunks(denoise, run, schedule, x, run.given, extra_args.get("seed") or 0, sampler, report)
        if start is not None and not resumed:
            chunks = chain([Chunk(-1, 0, start, 0.0)], chunks)
        if sampler.on_chunk is not None:
            for chunk in chunks:
                sampler.on_chunk(chunk)
            return x
        for chunk in chunks:
            made.append(chunk.latent)
        video = torch.cat(made, dim=2)
    if report is not None:
        report(
            0, video, video, 1
        )  # the host keeps the last x0 as "denoised output": the whole video, not a chunk
    return video


def _frames_of(made: list[Tensor], sampler: StreamSampler) -> Finished | None:
    """The frames of the chunks `made`; None where they are handed on instead of kept."""
    if sampler.on_chunk is not None:
        return None
    return lambda start, stop: torch.cat(made, dim=2)[:, :, start:stop]


def _schedule(sigmas: Tensor) -> tuple[float, ...]:
    values = tuple(float(s) for s in sigmas)
    if len(values) < 2 or values[-1] != 0 or 0 in values[:-1]:
        raise ValueError(
            f"Sparse Forcing needs a schedule that ends at 0, but got {[round(v, 4) for v in values]}. "
            "Connect the whole output of a scheduler, not a part of it."
        )
    return values[:-1]


@contextlib.contextmanager
def _open(
    sampler: StreamSampler, network: Any, model_options: dict[str, Any], shape: tuple[int, ...]
) -> Iterator[SamplingRun]:
    """The run that the Apply node's hooks opened, or one of our own in mode dense on a model nobody patched."""
    options = model_options["transformer_options"]
    run: SamplingRun | None = options.get(RUN)
    with contextlib.ExitStack() as stack:
        if run is None:
            options[RUN] = run = sampler.open_run(options, shape)
            stack.enter_context(patched_for_this_run(network, model_options))
        try:
            yield run
        finally:
            run.close()


def _start_frames(base: Any, options: dict[str, Any], x: Tensor) -> Tensor | None:
    """The latent that ARVideoI2V put in front of the video, in the model's scale."""
    initial = options.get("ar_config", {}).get("initial_latent")
    return None if initial is None else base.process_latent_in(initial).to(x)


def _chunks(
    denoise: Callable,
    run: SamplingRun,
    schedule: SamplerConfig,
    x: Tensor,
    given: int,
    seed: int,
    sampler: StreamSampler,
    report: Callable | None,
) -> Iterator[Chunk]:
    """The chunks that follow what `run` remembers, of which `given` frames were not generated."""
    total = run.total_frames - given
    first, chunks = (run.frame - given) // schedule.chunk_frames, -(-total // schedule.chunk_frames)
    steps = sum(len(schedule.sigmas_of(chunk)) + 1 for chunk in range(first, chunks))
    steps -= not sampler.clean_last
    passes = count()

    def on_pass(_chunk: int, _index: int, _passes: int, x0: Tensor) -> None:
        if report is not None:
            report(next(passes), x0, x0, steps)

    yield from stream(
        denoise,
        run,
        schedule,
        shape=(x.shape[0], x.shape[1], x.shape[3], x.shape[4]),
        total_frames=total,
        seed=seed,
        noise=None if sampler.total_frames else x[:, :, given:],
        on_pass=on_pass,
        start_chunk=first,
        clean_last=sampler.clean_last,
        device=x.device,
    )
