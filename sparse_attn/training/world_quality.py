"""How good clips stay over time, variant by variant: sampling and judging; `quality_report` makes tables and curves.

One rollout serves every horizon: at second h the last five seconds before it are judged, and the background is compared
at their first and last frame. The recall test (`world_recall`) is a sample of its own. Every number is a row
(`quality_report.Row`).
"""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from ..config import AttentionConfig
from ..pictures import to_uint8
from ..vae import WanVAE
from ..world.checker import label_pixels
from ..world.model import WorldModel
from ..world.render import render
from ..world.scene import FPS, Scene, to_prompt
from . import plots, world_clips, world_metrics, world_recall
from .common import log
from .dmd_config import seed_of
from .quality_report import Row
from .world_eval import held_out_scenes

Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Measuring:
    """What is measured: `prompts` held-out prompts x `seeds`, judged at `horizons` (seconds), and `recalls` scenes for
    each absence in `absences` (seconds). batch: clips at once."""

    prompts: int = 64
    seeds: int = 3
    horizons: tuple[int, ...] = (5, 20, 60)
    absences: tuple[int, ...] = (2, 5, 15)
    recalls: int = 64
    batch: int = 32

    def validate(self) -> None:
        """Raise ValueError, naming the value and the remedy."""
        if not self.horizons or min(self.horizons) < 5:
            raise ValueError(
                f"horizons {self.horizons}: five seconds are judged at a time, so use 5 or more."
            )
        if min(self.prompts, self.seeds, self.batch) < 1:
            raise ValueError(
                f"prompts {self.prompts}, seeds {self.seeds} and batch {self.batch} must be 1 or more."
            )


class Source(Protocol):
    """Where clips come from: a model, or the renderer for the best that can be scored."""

    device: str

    def clips(self, scenes: list[Scene], seeds: list[int], spans: Spans) -> list[list[Tensor]]:
        """uint8 frames of each span of each clip."""
        ...

    def recalled(self, scenes: list[Scene], spans: Spans) -> list[list[Tensor]]:
        """The same of clips that go on from the renderer's frames, without a prompt."""
        ...


@dataclass
class ModelSource:
    """A model in one mode."""

    model: WorldModel
    attention: AttentionConfig
    device: str

    def clips(self, scenes: list[Scene], seeds: list[int], spans: Spans) -> list[list[Tensor]]:
        rows = self.model.text.encode([to_prompt(s) for s in scenes])
        latents = world_clips.sample(
            self.model.dit, rows, self.attention, _latents(spans), tuple(seed_of("quality", s) for s in seeds)
        )
        return world_clips.decode_spans(self.model.vae, latents, spans, self.device)

    def recalled(self, scenes: list[Scene], spans: Spans) -> list[list[Tensor]]:
        given, total = world_recall.plan(scenes)
        latents = world_clips.sample(
            self.model.dit,
            self.model.text.encode([""] * len(scenes)),
            self.attention,
            total,
            tuple(seed_of("recall", i) for i in range(len(scenes))),
            _given(self.model.vae, tuple(scenes), given, self.device),
        )
        return world_clips.decode_spans(self.model.vae, latents, spans, self.device)


@functools.lru_cache(maxsize=64)
def _given(vae: WanVAE, scenes: tuple[Scene, ...], latents: int, device: str) -> Tensor:
    """What a recall is told, encoded once for all models."""
    videos = torch.stack([world_recall.given_video(s, latents, device) for s in scenes])
    return world_clips.encode(vae, videos, device)


@dataclass
class RenderedSource:
    """The renderer's own frames: what a perfect model shows. With a VAE they go through it: what one can show at best.

    change: what is done to each span's frames and scene, to see that the metrics notice.
    """

    device: str
    vae: WanVAE | None = None
    change: Callable[[Tensor, int], Tensor] | None = None

    def clips(self, scenes: list[Scene], seeds: list[int], spans: Spans) -> list[list[Tensor]]:
        if self.vae is not None:
            frames = 4 * (_latents(spans) - 1) + 1
            videos = torch.stack([render(s, frames, device=self.device) for s in scenes])
            latents = world_clips.encode(self.vae, videos, self.device)
            return world_clips.decode_spans(self.vae, latents, spans, self.device)
        return [[self._shown(scene, *span) for span in spans] for scene in scenes]

    def recalled(self, scenes: list[Scene], spans: Spans) -> list[list[Tensor]]:
        return self.clips(scenes, [], spans)

    def _shown(self, scene: Scene, start: int, stop: int) -> Tensor:
        frames = torch.from_numpy(to_uint8(render(scene, stop - start, start, device=self.device)[None]))
        return self.change(frames, start) if self.change else frames


def _latents(spans: Spans) -> int:
    """Latent frames that hold all spans, whole chunks of 3."""
    return -(-(-(-(max(stop for _, stop in spans) - 1) // 4) + 1) // 3) * 3


def measure(name: str, source: Source, plan: Measuring) -> list[Row]:
    """All numbers of one variant: over time, on held-out prompts, then recall."""
    rows, scenes = [], held_out_scenes(plan.prompts)
    jobs = [(p, s) for p in range(plan.prompts) for s in range(plan.seeds)]
    with ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting = []
        for first in range(0, len(jobs), plan.batch):
            part = jobs[first : first + plan.batch]
            spans = spans_of(plan)
            clips = source.clips([scenes[p] for p, _ in part], [seed_of(*job) for job in part], spans)
            for job, clip in zip(part, clips):  # judged while the next batch is made
                labels = labelled(clip, source.device)
                waiting.append((job, pool.submit(judged, clip, labels, scenes[job[0]], plan)))
            log.info("%s: %d of %d clips", name, first + len(part), len(jobs))
        for (prompt, seed), future in waiting:
            rows += [Row(name, *key, prompt, seed, value) for key, value in future.result().items()]
        for seconds in plan.absences if plan.recalls else ():
            rows += _recall_rows(name, source, seconds, plan, pool)
    return rows


def spans_of(plan: Measuring) -> Spans:
    """The judged windows, then the single frames at their ends."""
    windows = [(h * FPS + 1 - world_metrics.WINDOW, h * FPS + 1) for h in plan.horizons]
    return windows + [(s * FPS, s * FPS + 1) for s in moments_of(plan)]


def moments_of(plan: Measuring) -> list[int]:
    """The seconds at which the background is compared."""
    return sorted({second for horizon in plan.horizons for second in (horizon - 5, horizon)})


def labelled(clip: list[Tensor], device: str) -> list[Tensor]:
    """Labels of each span's pixels, on the CPU; found on `device`, for they are most of the work of judging."""
    return [label_pixels(span.to(device)).cpu() for span in clip]


def judged(
    clip: list[Tensor], labels: list[Tensor], scene: Scene, plan: Measuring
) -> dict[tuple[str, float], float]:
    """(metric, second) -> value of one clip, given as `spans_of` cut it."""
    found: dict[tuple[str, float], float] = {}
    for seconds, window, named in zip(plan.horizons, clip, labels):
        start = seconds * FPS + 1 - world_metrics.WINDOW
        values = world_metrics.accuracy(window, named, scene)
        values |= world_metrics.motion(window, named, scene, start)
        found |= {(metric, seconds): value for metric, value in values.items()}
    frames, named = (torch.cat(spans[len(plan.horizons) :]) for spans in (clip, labels))
    drift = world_metrics.drift(frames, named, scene, [second * FPS for second in moments_of(plan)])
    for metric, line in zip(world_metrics.DRIFT, drift):
        found |= {(metric, second): value for second, value in zip(moments_of(plan), line)}
    return found


def show_recall(sources: dict[str, Source], seconds: float, count: int) -> Image.Image:
    """The first `count` scenes of the recall test after an absence of `seconds`, a row for each source."""
    rows, titles = [], []
    for scene in _recall_scenes(seconds, count):
        looked_at = world_recall.moments(scene)
        titles, spans = list(looked_at), [(at, at + 1) for at in looked_at.values()]
        for name, source in sources.items():
            rows.append((name, [frames[0].cpu().numpy() for frames in source.recalled([scene], spans)[0]]))
            log.info("%s: shown", name)
    return plots.frame_rows(titles, rows)


def _recall_scenes(seconds: float, count: int) -> list[Scene]:
    rng = random.Random(seed_of("recall", int(seconds)))
    return [world_recall.recall_scene(rng, seconds) for _ in range(count)]


def _recall_rows(
    name: str, source: Source, seconds: float, plan: Measuring, pool: ThreadPoolExecutor
) -> list[Row]:
    scenes = _recall_scenes(seconds, plan.recalls)
    span, rows = world_recall.judged_span(scenes), []
    for first in range(0, len(scenes), plan.batch):
        part = scenes[first : first + plan.batch]
        windows = [clip[0] for clip in source.recalled(part, [span])]
        labels = labelled(windows, source.device)
        for i, values in enumerate(pool.map(world_metrics.recall, windows, labels, part)):
            rows += [Row(name, metric, seconds, first + i, 0, value) for metric, value in values.items()]
    log.info("%s: recall after %s s", name, seconds)
    return rows
