"""Prompt Timeline: prompts with times, and their change in the middle of a run."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ..sparse_attn.timeline import Policy, TimedPrompt, change_prompt, parse_timeline, prompt_at, seconds_at
from .host import io
from .keeping import conditioning_key
from .recovery import keep_on_device, recovering
from .session import RUN

logger = logging.getLogger("sparse_forcing.nodes")

TIMELINE = "sparse_forcing_timeline"  # where the first prompt's conditioning carries the others


class SparseForcingPromptTimeline(io.ComfyNode):
    """Schema; the text is read by `sparse_attn.timeline`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SparseForcingPromptTimeline",
            display_name="Prompt Timeline (Sparse Forcing)",
            category="model/conditioning/autoregressive",
            description=(
                "Prompts that take turns: each holds from its time on. For the positive input of Stream Video; "
                "any other node sees the first prompt alone."
            ),
            search_aliases=[
                "prompt schedule",
                "prompt travel",
                "timed prompts",
                "prompt switch",
                "story",
                "interactive prompt",
            ],
            inputs=[
                io.Clip.Input(
                    "clip", tooltip="The text encoder. It also reads prompts typed while the video is made."
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="0s: a large red circle bouncing over a navy plain background\n"
                    "3s: a large blue star bouncing over a navy plain background",
                    tooltip=(
                        "One prompt a line with the time from which it holds, such as 0s:, 2.5s: or 1m30s:. "
                        "On one line, put a slash between them. A change takes effect at the next chunk."
                    ),
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="CONDITIONING",
                    tooltip="The first prompt, with the later ones and their times along with it, for Stream Video.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, text: str | None = None) -> bool | str:
        try:
            if text is not None:  # None where it comes from another node, and is not known yet
                parse_timeline(text)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, clip: Any, text: str) -> io.NodeOutput:
        prompts = parse_timeline(text)
        conditionings = [encode(clip, prompt.text) for prompt in prompts]
        timeline = Timeline(prompts, conditionings, clip)
        first = [[rows, {**options, TIMELINE: timeline}] for rows, options in conditionings[0]]
        return io.NodeOutput(first)


class Timeline:
    """Prompts by time, each with its conditioning, and the CLIP that read them."""

    def __init__(self, prompts: list[TimedPrompt], conditionings: list[list], clip: Any = None):
        self.prompts, self.conditionings, self.clip = prompts, conditionings, clip


def encode(clip: Any, text: str) -> list:
    """A prompt's conditioning, as CLIP Text Encode gives it."""
    if clip is None:
        raise ValueError("clip is empty: the checkpoint may hold no text encoder. Connect Load CLIP.")
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def timeline_of(positive: list) -> Timeline:
    """The time line that a conditioning carries; for any other, one of that conditioning alone."""
    found = positive[0][1].get(TIMELINE) if positive else None
    return found or Timeline([TimedPrompt(0.0, "")], [positive])


class PromptSwitcher:
    """Changes the positive prompt of a run between two chunks.

    A later prompt takes over the place of the first one in the host's list of conditions, and with it its memory.
    recent(start, stop): finished latent frames in the model's scale, on any device.
    """

    def __init__(
        self,
        timeline: Timeline,
        clip: Any,
        guider: comfy.samplers.CFGGuider,
        sigmas: Tensor,
        seed: int,
        fps: float,
        policy: Policy,
        recent: Any,
    ):
        self.timeline, self.clip = timeline, clip or timeline.clip
        self.guider, self.sigmas, self.seed, self.fps = guider, sigmas, seed, fps
        self.policy, self.recent = policy, recent
        self.now, self.text = 0, timeline.prompts[0].text
        self.conditioning = timeline.conditionings[0]  # in force

    @property
    def may_change(self) -> bool:
        """Whether recent frames may run again under another prompt."""
        return self.policy != "keep" and (self.clip is not None or len(self.timeline.prompts) > 1)

    def resume(self, latent_frame: int, key: str) -> None:
        """Go on at `latent_frame` with a memory that was written under the conditioning of that `key`."""
        self.now = prompt_at(self.timeline.prompts, seconds_at(latent_frame, self.fps))
        self.text, conditioning = self.timeline.prompts[self.now].text, self.timeline.conditionings[self.now]
        if conditioning_key(conditioning) != key:
            self._change(conditioning, self.policy)
        elif self.now:
            self._change(conditioning, "keep")

    def next_chunk(self, latent_frame: int, typed: str | None) -> str | None:
        """Make ready for the chunk that starts at `latent_frame`; returns the new prompt if it is another one now.

        A `typed` prompt holds until the time line's next change.
        """
        due = prompt_at(self.timeline.prompts, seconds_at(latent_frame, self.fps))
        if typed is not None:
            conditioning = self._encode(typed)
            if conditioning is None:
                return None
            self.now, self.text = due, typed
        elif due != self.now:
            self.now, self.text = due, self.timeline.prompts[due].text
            conditioning = self.timeline.conditionings[due]
        else:
            return None
        self._change(conditioning, self.policy)
        return self.text

    def _encode(self, text: str) -> list | None:
        """The conditioning of a typed prompt; None, with a warning, where the text encoder fails."""
        try:
            return encode(self.clip, text)
        except Exception:
            logger.warning("The new prompt could not be read; the old one stays.", exc_info=True)
            return None
        finally:
            # Where memory is short, the text encoder has pushed the model out.
            models = [self.guider.model_patcher, *self.guider.loaded_models]
            comfy.model_management.load_models_gpu(models)

    def _change(self, conditioning: list, policy: Policy) -> None:
        guider, device = self.guider, self.guider.model_patcher.load_device
        run = guider.model_options["transformer_options"][RUN]
        before = guider.conds["positive"]
        if len(conditioning) != len(before):
            raise ValueError(
                f"A prompt of {len(conditioning)} conditionings cannot follow one of {len(before)}: "
                "every prompt of a time line needs as many."
            )
        shape = self.recent(0, 1).shape
        chunk = torch.zeros(*shape[:2], run.chunk_frames, *shape[3:], device=device)
        positive = comfy.sampler_helpers.convert_cond(conditioning)
        positive = comfy.samplers.process_conds(
            guider.inner_model, chunk, {"positive": positive}, device, chunk, seed=self.seed
        )["positive"]
        for old, new in zip(before, positive, strict=True):
            new["uuid"] = old["uuid"]  # the key of its memory
        keep_on_device({"positive": positive}, torch.device(device))
        guider.conds["positive"], self.conditioning = positive, conditioning
        run.forget_prompts()
        states = list(run.states.values())
        denoise = recovering(run, self._evaluate(run, flushes=policy == "flush"), torch.device(device))
        change_prompt(
            denoise, run, states, lambda *span: self.recent(*span).to(device), policy, run.chunk_frames
        )

    def _evaluate(self, run: Any, flushes: bool) -> Any:
        """The model for passes between two chunks; a prompt that `flushes` lets the memory begin with their first."""
        options = comfy.model_patcher.create_model_options_clone(self.guider.model_options)
        options["transformer_options"]["sample_sigmas"] = self.sigmas
        first: list[int] = []

        def evaluate(x: Tensor, sigma: float) -> Tensor:
            if flushes and not first:
                first.append(run.frame)
                run.first_frame = run.frame
            return self.guider(x, sigma * x.new_ones([x.shape[0]]), options, self.seed)

        return evaluate
