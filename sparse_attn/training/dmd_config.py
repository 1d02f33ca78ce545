"""What can be chosen about Self-Forcing DMD with the sparse memory active: one dataclass a stage.

Stage 1 (`DmdTraining`): clips of 21 latent frames from an empty memory. Stage 2 (`LongTuning`): pieces of a long
rollout whose memory lives on from step to step. Defaults are the published ones (arXiv 2604.21221 and Self-Forcing's
configuration). Nothing here remembers a random generator: every draw of step n is a function of (seed, n, sample), so
a run that stops at any step goes on as if it had not, and the number of processes changes nothing.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..config import AttentionConfig, SamplerConfig, check_length


class Piece(NamedTuple):
    """Of which rollout, from which latent frame on, how many frames."""

    rollout: int
    start: int
    frames: int


@dataclass(frozen=True)
class DmdTraining:
    """Stage 1. Lengths in latent frames, rates for AdamW with betas (0, .999).

    steps: of the critic; the student learns in every `student_every`-th, the first included. batch: clips a step over
    all processes; micro_batch: clips that one process runs at once (the rest of the batch is accumulated).
    attention: the student's memory; its mode and budgets are active in training. ramp_interval, ramp_rate: the share of
    the window that is *not* read grows by ramp_rate every ramp_interval steps, up to 1 - attention.topk; interval 0
    starts there. guidance: g of cond + g (cond - uncond) of the teacher. clean_weight: of a loss that trains the clean
    pass (`dmd.clean_loss`); 0 leaves it out. ema_from: first step from which the average differs from the student.
    bf16: products in bfloat16, weights, gradients and averages in float32. recompute_*: activation checkpointing of
    that model's blocks; a student's chunk is short, the critic sees the whole clip at once. critic_topk: share of
    a clip's blocks that each block of the critic reads (`SparseClip`); 1 is dense, as published. compile: what stands
    before and after a block's attention, in all three models; one process only.
    """

    steps: int = 1200
    batch: int = 64
    micro_batch: int = 1
    frames: int = 21
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    student_every: int = 5
    guidance: float = 3.0
    student_lr: float = 2e-6
    critic_lr: float = 4e-7
    weight_decay: float = 0.01
    clip: float = 10.0
    ema: float = 0.99
    ema_from: int = 200
    ramp_interval: int = 0
    ramp_rate: float = 0.1
    clean_weight: float = 0.0
    bf16: bool = True
    recompute_student: bool = False
    recompute_critic: bool = True
    critic_topk: float = 1.0
    compile: bool = False
    seed: int = 0
    log_every: int = 10
    save_every: int = 100
    sheet_every: int = 100

    def piece(self, step: int) -> Piece:
        """What a step generates."""
        return Piece(step, 0, self.frames)

    def topk_at(self, step: int) -> float:
        """The share of the window read at `step`: falls from 1 to attention.topk and reaches it."""
        target = 1 - self.attention.topk
        if self.ramp_interval == 0:
            return self.attention.topk
        # not by floor division: .9 // .1 is 8, and such a ramp ends at .8
        return 1 - min(target, step / self.ramp_interval * self.ramp_rate)

    def attention_at(self, step: int) -> AttentionConfig:
        """The student's attention at `step`."""
        return replace(self.attention, topk=self.topk_at(step))

    def exit_step(self, step: int) -> int:
        """Which of the sampler's steps ends every chunk of this step, the same for all samples and processes."""
        return random.Random(seed_of(self.seed, step, "exit")).randrange(len(self.sampler.sigmas))

    def sampler_at(self, step: int) -> SamplerConfig:
        """The sampler up to the exit step; a first chunk with a schedule of its own runs it to its end."""
        return replace(self.sampler, sigmas=self.sampler.sigmas[: self.exit_step(step) + 1])

    def validate(self, processes: int = 1) -> None:
        """Raise ValueError, naming the value and the remedy."""
        self.sampler.validate()
        self.attention.validate(self.sampler.chunk_frames)
        for name in ("steps", "micro_batch", "student_every", "log_every", "save_every", "sheet_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be 1 or more.")
        unit = self.micro_batch * processes
        if self.batch < unit or self.batch % unit:
            raise ValueError(
                f"batch {self.batch} cannot be split into {processes} processes of {self.micro_batch} clips at once: "
                f"use a multiple of {unit}, or another micro_batch."
            )
        if self.compile and processes > 1:
            raise ValueError(
                f"compile does not go together with models split over {processes} processes: set it to false."
            )
        check_length(self.frames, self.sampler.chunk_frames)
        if not 0 < self.critic_topk <= 1:
            raise ValueError(
                f"critic_topk {self.critic_topk} must be above 0 and at most 1, which is dense attention."
            )
        if self.ramp_interval < 0 or not 0 < self.ramp_rate <= 1:
            raise ValueError(
                f"ramp_interval {self.ramp_interval} and ramp_rate {self.ramp_rate}: use 0 or more steps, and a rate "
                "above 0 and at most 1."
            )


@dataclass(frozen=True)
class LongTuning(DmdTraining):
    """Stage 2, after LongLive: each step generates the next `new_frames` of a rolling rollout of `rollout_frames`.

    Teacher and critic see the last `frames` frames: older ones as context, the new ones as what is trained. A rollout
    that has reached its length starts again with another prompt.
    """

    steps: int = 3000
    student_lr: float = 1e-5
    critic_lr: float = 2e-6
    rollout_frames: int = 240
    new_frames: int = 18

    def piece(self, step: int) -> Piece:
        """What a step generates; the first piece of a rollout is a whole window of `frames`."""
        rollout, number = divmod(step, 1 + (self.rollout_frames - self.frames) // self.new_frames)
        if number == 0:
            return Piece(rollout, 0, self.frames)
        return Piece(rollout, self.frames + (number - 1) * self.new_frames, self.new_frames)

    def validate(self, processes: int = 1) -> None:
        super().validate(processes)
        check_length(self.new_frames, self.sampler.chunk_frames)
        if self.new_frames > self.frames:
            raise ValueError(
                f"new_frames {self.new_frames} do not fit into the window of {self.frames} frames that the teacher "
                "sees: use fewer."
            )
        if self.rollout_frames < self.frames:
            raise ValueError(
                f"rollout_frames {self.rollout_frames} is shorter than one window of {self.frames}."
            )
        if self.attention.mode == "dense":
            raise ValueError(
                "mode 'dense' keeps every frame of a long rollout: use mode 'window' or 'sparse'."
            )


def seed_of(*parts: int | str) -> int:
    """A seed below 2**62 from whatever names a draw: the run's seed, step, sample, purpose."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2
