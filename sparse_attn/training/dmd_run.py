"""A training run of Self-Forcing DMD: student, critic and teacher, step after step, from a checkpoint to a checkpoint.

A step generates one rollout a clip with the student on its memory. The critic learns from it; in every
`student_every`-th step the student does too, from the same rollout. Both losses are taken with the weights as the step
found them, so their order does not matter. Clips are accumulated one micro batch at a time, and a clip's noise depends
on (seed, step, place in the batch) alone: how the batch is split, over time or over processes, changes nothing but
rounding.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import AttentionConfig
from ..pictures import contact_sheet, spread, to_uint8
from ..rollout import upload
from ..state import StreamState
from ..vae import WanVAE
from ..wan import Attend, WanModel
from . import dmd
from .checkpoints import (
    load_state_of,
    load_weights_of,
    newest,
    read_checkpoint,
    save_checkpoint,
    state_of,
    weights_of,
)
from .clip_attention import clip_attention
from .common import compile_blocks, log
from .dmd_config import DmdTraining, LongTuning, Piece, seed_of
from .dmd_models import FusedStudent, halve_products, recompute_blocks, update_average
from .dmd_prompts import Prompts, padded_rows, prompt_of
from .metrics import Metrics, peak_gib
from .parallel import Processes, clip_gradients, mean_over, shard

COLUMNS = (
    "critic_loss", "student_loss", "clean_loss", "critic_norm", "student_norm", "topk", "exit_step",
    "clips_per_second", "peak_gib",
)  # fmt: skip
SHEET_ROWS, SHEET_COLUMNS = 4, 6


@dataclass
class Stream:
    """A rolling rollout between two steps: the memory, and the last window of latents."""

    memory: dict[str, Tensor]
    window: Tensor


class DmdRun:
    """One run. Models are taken over: student and critic in float32, the teacher frozen.

    shape: (C, H, W) of the latents. vae: decodes the sample sheets, and gives a piece of a long rollout the first
    latent that a clip of its own would have; without it there are no sheets and the window is taken as it is.
    Raises ValueError for settings that do not fit together.
    """

    def __init__(
        self,
        cfg: DmdTraining,
        student: WanModel,
        critic: WanModel,
        teacher: WanModel,
        prompts: Prompts,
        shape: tuple[int, int, int],
        folder: Path,
        processes: Processes | None = None,
        vae: WanVAE | None = None,
    ):
        self.processes = processes or Processes()
        cfg.validate(self.processes.size)
        self.cfg, self.prompts, self.shape, self.folder, self.vae = cfg, prompts, shape, folder, vae
        self.device = self.processes.device
        self.average = self._placed(copy.deepcopy(student), recompute=False).requires_grad_(False)
        plain = copy.deepcopy(student) if self._fuses() else None
        self.student = self._placed(student, cfg.recompute_student)
        self.critic = self._placed(critic, cfg.recompute_critic)
        frozen = torch.bfloat16 if cfg.bf16 else torch.float32
        if cfg.compile:
            compile_blocks(teacher)
        self.teacher = shard(teacher.to(self.device, frozen).requires_grad_(False), self.processes, cfg.bf16)
        self.negative = upload(padded_rows(prompts.negative)[None], self.device)
        # on a GPU the other kinds make copies as large as the weights
        fused = torch.device(self.device).type == "cuda"
        options = {"betas": (0.0, 0.999), "weight_decay": cfg.weight_decay, "fused": fused}
        self.student_optimizer = torch.optim.AdamW(self.student.parameters(), lr=cfg.student_lr, **options)
        self.critic_optimizer = torch.optim.AdamW(self.critic.parameters(), lr=cfg.critic_lr, **options)
        self.memory = self._memory()
        self.critic_attention = self._critic_attention()
        self.fused = FusedStudent(plain.to(self.device), self.memory) if plain else None
        self.streams: dict[int, Stream] = {}  # by micro batch, of `LongTuning`
        self.step_number = 0

    def _placed(self, model: WanModel, recompute: bool) -> WanModel:
        model.to(self.device, torch.float32)
        if self.cfg.compile:
            compile_blocks(model)
        if recompute:
            recompute_blocks(model)
        if self.cfg.bf16:
            halve_products(model, self.device)
        return shard(model, self.processes, self.cfg.bf16)

    def _fuses(self) -> bool:
        """Whether passes without gradients run fused: where launches cost, and all weights are in one place."""
        return torch.device(self.device).type == "cuda" and self.processes.size == 1

    def quick(self, rows: Tensor) -> dmd.Flow | None:
        """The student's fused pass under text rows, where there is one."""
        return self.fused.flow(rows) if self.fused else None

    def use_attention(self, attention: AttentionConfig, critic_topk: float) -> None:
        """Go on with other attention in student and critic: to compare kinds with the same models."""
        self.cfg = dataclasses.replace(self.cfg, attention=attention, critic_topk=critic_topk)
        self.critic_attention = self._critic_attention()
        self.memory = self._memory()
        if self.fused:
            self.fused.use_memory(self.memory)

    def _memory(self) -> StreamState:
        _, height, width = self.shape
        return StreamState(
            layers=self.student.num_layers, heads=self.student.num_heads, head_dim=self.student.head_dim,
            grid=(height // 2, width // 2), chunk_frames=self.cfg.sampler.chunk_frames, batch=self.cfg.micro_batch,
            attention=self.cfg.attention, total_frames=self.cfg.frames, device=self.device,
            dtype=torch.bfloat16 if self.cfg.bf16 else torch.float32,
        )  # fmt: skip

    def _critic_attention(self) -> Attend:
        _, height, width = self.shape
        return clip_attention(
            self.cfg.frames, (height // 2, width // 2), self.cfg.critic_topk, self.cfg.attention.block_tokens,
            self.memory.dtype, self.device, self.cfg.attention.backend,
        )  # fmt: skip

    def run(self, until: int | None = None) -> None:
        """Train to step `until` (default: the last), with log, metrics, sheets and checkpoints on the way."""
        cfg, first = self.cfg, self.processes.rank == 0
        metrics = Metrics(self.folder, COLUMNS, self.step_number) if first else None
        while self.step_number < min(cfg.steps, cfg.steps if until is None else until):
            began = time.perf_counter()
            values = self.step()
            values["clips_per_second"] = cfg.batch / (time.perf_counter() - began)
            values["peak_gib"] = peak_gib(self.device)
            if not np.isfinite(values["critic_loss"]):
                raise FloatingPointError(
                    f"the critic's loss is {values['critic_loss']} at step {self.step_number - 1}: lower critic_lr or "
                    "student_lr, and go on from the last checkpoint."
                )
            if metrics:
                metrics.write(self.step_number - 1, values)
                if (self.step_number - 1) % cfg.log_every == 0:
                    shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
                    log.info("step %d  %s", self.step_number - 1, shown)
            if self.step_number % cfg.sheet_every == 0:
                self.sheet()
            if self.step_number % cfg.save_every == 0 or self.step_number == cfg.steps:
                self.save()

    def step(self) -> dict[str, float]:
        """One step of the whole batch: critic, and student where it is its turn. Returns means over the batch."""
        cfg, n = self.cfg, self.step_number
        updates = n % cfg.student_every == 0
        micros = cfg.batch // (cfg.micro_batch * self.processes.size)
        self.memory.attention = cfg.attention_at(n)
        if self.fused:
            self.fused.follow(self.student)
        losses = {"critic_loss": 0.0, "student_loss": 0.0, "clean_loss": 0.0}
        for micro in range(micros):
            for name, value in self._micro_step(n, micro, micros, updates).items():
                losses[name] += value / micros
        values = mean_over(losses, self.processes)
        values["critic_norm"] = clip_gradients(self.critic, cfg.clip)
        self.critic_optimizer.step()
        self.critic_optimizer.zero_grad()
        if updates:
            values["student_norm"] = clip_gradients(self.student, cfg.clip)
            self.student_optimizer.step()
            self.student_optimizer.zero_grad()
            decay = cfg.ema if n >= cfg.ema_from else 0.0
            update_average(self.average, self.student, decay)
        else:
            del values["student_loss"], values["clean_loss"]
        self.step_number += 1
        return values | {"topk": self.memory.attention.topk, "exit_step": cfg.exit_step(n)}

    def _micro_step(self, n: int, micro: int, micros: int, updates: bool) -> dict[str, float]:
        """Add one micro batch's part to the gradients."""
        cfg, piece = self.cfg, self.cfg.piece(n)
        places = self._places(micro)
        first, count = piece.rollout * cfg.batch, len(self.prompts.rows)
        picks = [prompt_of(cfg.seed, first + place, count) for place in places]
        rows = self.prompts.batch(picks, self.device)
        before = self._enter(piece, micro)
        quick = self.quick(rows)
        made = dmd.roll(
            self.student, self.memory, rows, cfg.sampler_at(n), (len(places), *self.shape), piece.start,
            piece.frames, tuple(seed_of(cfg.seed, "rollout", piece.rollout, place) for place in places), quick,
        )  # fmt: skip
        clip = self._window(made.clip, before)
        losses = {"student_loss": 0.0, "clean_loss": 0.0}
        if updates:
            g = self._score_gradient(clip, rows, self._noise(n, places, "score", clip.shape))
            trained = g[:, :, -piece.frames :]
            losses["student_loss"] = 0.5 * trained.square().mean().item()
            self._rewind(before)
            scaled = trained / (trained[0].numel() * len(places) * micros)
            clean = dmd.replay(
                self.student, self.memory, rows, made, scaled, cfg.clean_weight / micros, quick
            )
            losses["clean_loss"] = clean.item() * micros
        losses["critic_loss"] = self._critic_backward(
            clip, rows, self._noise(n, places, "critic", clip.shape), micros
        )
        if isinstance(cfg, LongTuning):
            window = torch.cat([before.window, made.clip], 2) if before else made.clip
            self.streams[micro] = Stream(self.memory.snapshot(), window[:, :, -cfg.frames :])
        return losses

    def _places(self, micro: int) -> list[int]:
        """Which clips of the whole batch this process runs now."""
        first = (micro * self.processes.size + self.processes.rank) * self.cfg.micro_batch
        return list(range(first, first + self.cfg.micro_batch))

    def _noise(self, n: int, places: list[int], purpose: str, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Noise like a clip and its level [B], each clip's from a seed of its own."""
        drawn = []
        for place in places:
            generator = torch.Generator().manual_seed(seed_of(self.cfg.seed, purpose, n, place))
            level = dmd.draw_level(generator, 1)
            drawn.append((torch.randn((1, *shape[1:]), generator=generator), level))
        noise, level = (torch.cat(parts) for parts in zip(*drawn))
        return upload(noise, self.device), upload(level, self.device)

    def _enter(self, piece: Piece, micro: int) -> Stream | None:
        """Put the memory where the piece begins; what it held, for a rollout that goes on."""
        before = self.streams[micro] if piece.start else None
        self._rewind(before)
        return before

    def _rewind(self, before: Stream | None) -> None:
        self.memory.reset() if before is None else self.memory.restore(before.memory)

    @torch.no_grad()
    def _window(self, made: Tensor, before: Stream | None) -> Tensor:
        """What teacher and critic see: the new frames and, in a rollout that goes on, older ones before them.

        The first latent of a Wan clip is a single image. With a VAE, the window's first frame becomes one: decoded with
        what stood before it, its last image encoded again.
        """
        if before is None:
            return made
        older = self.cfg.frames - made.shape[2]
        if older == 0:
            return made
        tail = before.window[:, :, -older:].clone()
        if self.vae is not None:
            seen = before.window[:, :, : before.window.shape[2] - older + 1]
            image = self.vae.decode(seen.to(self.vae_dtype))[:, :, -1:]
            tail[:, :, :1] = self.vae.encode(image).to(tail)
        return torch.cat([tail, made], dim=2)

    @property
    def vae_dtype(self) -> torch.dtype:
        assert self.vae is not None
        return next(self.vae.parameters()).dtype

    @torch.no_grad()
    def _score_gradient(self, clip: Tensor, rows: Tensor, noise: tuple[Tensor, Tensor]) -> Tensor:
        x_t = dmd.add_noise(clip, *noise)
        _, fake = self._criticise(x_t, rows, noise[1])
        negative = self.negative.expand_as(rows)
        told, untold = (
            dmd.predict_clip(self.teacher, self.teacher.cross_kv(r), x_t, noise[1])[1]
            for r in (rows, negative)
        )
        return dmd.dmd_gradient(clip, fake, dmd.guided(told, untold, self.cfg.guidance))

    def _criticise(self, x_t: Tensor, rows: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """The critic's flow and x0."""
        return dmd.predict_clip(self.critic, self.critic.cross_kv(rows), x_t, level, self.critic_attention)

    def _critic_backward(
        self, clip: Tensor, rows: Tensor, noise: tuple[Tensor, Tensor], micros: int
    ) -> float:
        x_t = dmd.add_noise(clip, *noise)
        flow, _ = self._criticise(x_t, rows, noise[1])
        loss = dmd.critic_loss(flow, clip, noise[0])
        (loss / micros).backward()
        return loss.item()

    def sheet(self) -> None:
        """Videos of the averaged weights for the first prompts, a row each, as sheet_<step>.png; needs a VAE."""
        if self.vae is None:
            return
        cfg = self.cfg
        self.memory.attention = cfg.attention_at(self.step_number)
        shown = []
        for first in range(0, min(SHEET_ROWS, len(self.prompts.rows)), cfg.micro_batch):
            picks = [(first + i) % len(self.prompts.rows) for i in range(cfg.micro_batch)]
            self.memory.reset()
            made = dmd.roll(
                self.average, self.memory, self.prompts.batch(picks, self.device), cfg.sampler,
                (len(picks), *self.shape), 0, cfg.frames, tuple(seed_of(cfg.seed, "sheet", i) for i in picks),
            )  # fmt: skip
            if self.processes.rank == 0:
                shown += [self._frames(latent[None]) for latent in made.clip]
        if self.processes.rank == 0:
            sheet = contact_sheet(np.concatenate(shown), sum(map(len, shown)), SHEET_COLUMNS, width=128)
            sheet.save(self.folder / f"sheet_{self.step_number:08d}.png")

    @torch.no_grad()
    def _frames(self, latent: Tensor) -> np.ndarray:
        assert self.vae is not None
        frames = to_uint8(self.vae.decode(latent.to(self.vae_dtype)))
        return frames[spread(len(frames), SHEET_COLUMNS)]

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on."""
        shared = {
            "student": weights_of(self.student),
            "average": weights_of(self.average),
            "critic": weights_of(self.critic),
            "student_optimizer": state_of(self.student, self.student_optimizer),
            "critic_optimizer": state_of(self.critic, self.critic_optimizer),
        }
        streams = {
            f"{micro}.{name}": tensor
            for micro, stream in self.streams.items()
            for name, tensor in {**stream.memory, "latents": stream.window.cpu().contiguous()}.items()
        }
        save_checkpoint(self.folder, self.step_number, shared, streams, self._identity(), self.processes)

    def resume(self) -> bool:
        """Go on from the newest checkpoint in the folder; False where there is none.

        Raises ValueError where it is of a run with other settings.
        """
        path = newest(self.folder)
        if path is None:
            return False
        shared, streams, facts = read_checkpoint(path, self.processes)
        ours = self._identity()
        if changed := [name for name in ours if facts.get(name) != ours[name]]:
            differ = "; ".join(f"{name} was {facts.get(name)}, now {ours[name]}" for name in changed)
            raise ValueError(f"{path} is of another run: {differ}. Use its settings, or another folder.")
        for name in ("student", "average", "critic"):
            load_weights_of(getattr(self, name), shared[name])
        load_state_of(self.student, self.student_optimizer, shared["student_optimizer"])
        load_state_of(self.critic, self.critic_optimizer, shared["critic_optimizer"])
        for micro in sorted({int(name.split(".", 1)[0]) for name in streams}):
            parts = {k.split(".", 1)[1]: v for k, v in streams.items() if k.startswith(f"{micro}.")}
            self.streams[micro] = Stream(window=parts.pop("latents").to(self.device), memory=parts)
        self.step_number = facts["step"]
        return True

    def _identity(self) -> dict[str, Any]:
        """What two runs must share for one to continue the other, as JSON keeps it."""
        settings = dataclasses.asdict(self.cfg)
        for name in ("steps", "log_every", "save_every", "sheet_every"):
            del settings[name]
        processes = {"processes": self.processes.size} if isinstance(self.cfg, LongTuning) else {}
        return json.loads(json.dumps(settings | processes | {"shape": self.shape}))
