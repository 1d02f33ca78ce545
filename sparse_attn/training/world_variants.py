"""The variants that are compared: trained in turn from one start, with the same steps, data and seeds.

Every variant sees clips chunk by chunk as at generation (`stream_step`), with the memory that it will generate with;
all count positions the rebased way, so that a minute looks to them like the clips of training. A variant that is
finished is not trained again.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..config import AttentionConfig
from .common import channels_last, compile_blocks, log, lr_factor, set_lr
from .world_clips import load_vae
from .world_dit import (
    CHUNK,
    DitTraining,
    LatentBank,
    Steps,
    Trainee,
    load_weights,
    optimizers,
    save_trainee,
    shorten,
)

# Cache in latent frames: dense-21 holds 21, all others 12. A window counts its sink.
MODES = {
    "dense-21": AttentionConfig(mode="window", window_frames=21, sink_frames=3, positions="rebased"),
    "window-12": AttentionConfig(mode="window", window_frames=12, sink_frames=3, positions="rebased"),
    "sparse": AttentionConfig(positions="rebased"),
    "sparse-novelty": AttentionConfig(positions="rebased", keep="novelty"),
    "no-persistent": AttentionConfig(
        window_frames=12, sink_frames=0, persistent_frames=0, positions="rebased"
    ),
    "no-local-sparsity": AttentionConfig(topk=1.0, positions="rebased"),
}
# Name, mode to generate with, whose weights.
ENTRIES = (
    *((name, name, name) for name in MODES),
    ("sparse-training-free", "sparse", "dense-21"),
    ("novelty-training-free", "sparse-novelty", "dense-21"),
)


@dataclass(frozen=True)
class VariantTraining(DitTraining):
    """What all variants share.

    steps: of each variant, a share `first_share` of them openings. frames: video frames of a clip, 12 n - 3. clips,
    openings: how many are drawn from. pans: share of the clips with a camera pan, which stays away for up to
    `longest_hold` frames; a share `late` of these begins anywhere on the camera's way. Of the other fields those of the
    model, the openings, the optimizer and the average count; those of windows and of the clock do not.
    """

    steps: int = 500
    first_share: float = 0.2
    frames: int = 153
    clips: int = 768
    openings: int = 2048
    pans: float = 0.5
    longest_hold: int = 56
    late: float = 0.6
    first_batch: int = 32
    stream_batch: int = 12
    drop_prompt: float = 0.25
    guidance: float = 0.3
    words: float = 0.05
    sprites: float = 4.0
    decay_from: float = 0.5
    muon_lr: float = 2e-3
    adam_lr: float = 1e-3

    def validate(self) -> None:
        """Raise ValueError, naming the value and the remedy."""
        if self.frames % 4 != 1 or (self.frames // 4 + 1) % CHUNK:
            near = 12 * round((self.frames + 3) / 12) - 3
            raise ValueError(f"frames {self.frames} are not whole chunks of latents: use {near}.")
        if self.steps < 1 or self.clips < 4 or self.openings < 32:
            raise ValueError(
                f"steps {self.steps}, clips {self.clips}, openings {self.openings}: use at least 1, 4 and 32."
            )


def train_variants(
    cfg: VariantTraining, names: Sequence[str], start: Path, out: Path, device: str, minutes: float | None
) -> list[str]:
    """Train the variants that `out` lacks, each into a folder of its name, from the weights in `start`.

    Stops before a variant that would not end within `minutes`. Returns the names of those that are finished. Raises
    ValueError for unknown names, or where `out` holds variants that were trained otherwise.
    """
    cfg.validate()
    if unknown := [name for name in names if name not in MODES]:
        raise ValueError(f"no variant {', '.join(unknown)}: use some of {', '.join(MODES)}.")
    _same_settings(cfg, out)
    began, longest = time.monotonic(), 0.0
    missing = [name for name in names if not (out / name / "done.json").is_file()]
    if missing:
        banks = _banks(cfg, start, device)
        model = Trainee(cfg).to(device)  # one for all: its blocks are compiled once
        if cfg.compile:
            compile_blocks(model.dit)
    for name in missing:
        since = time.monotonic()
        if minutes is not None and longest and since - began + 1.1 * longest > 60 * minutes:
            log.info("stopping before %s: it would take about %.0f s", name, longest)
            break
        _train(cfg, name, model, start, out / name, banks)
        longest = max(longest, time.monotonic() - since)
    return [name for name in names if (out / name / "done.json").is_file()]


def _same_settings(cfg: VariantTraining, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    path, ours = out / "settings.json", json.loads(json.dumps(asdict(cfg)))
    if path.is_file():
        theirs = json.loads(path.read_text())
        if changed := [name for name in ours if theirs.get(name) != ours[name]]:
            differ = "; ".join(f"{name} was {theirs.get(name)}, now {ours[name]}" for name in changed)
            raise ValueError(
                f"{out} holds variants of other settings: {differ}. Variants are compared with the same ones: use "
                "them, or another folder."
            )
    path.write_text(json.dumps(ours, indent=1) + "\n")


def _banks(cfg: VariantTraining, start: Path, device: str) -> tuple[LatentBank, LatentBank]:
    """Clips and openings, encoded once for all variants."""
    vae = load_vae(start, device).requires_grad_(False)
    channels_last(vae.to(torch.bfloat16 if device != "cpu" else torch.float32))
    clips = LatentBank(vae, cfg.clips, device, cfg.seed, cfg.frames, cfg.pans, cfg.longest_hold, cfg.late)
    openings = LatentBank(vae, cfg.openings, device, cfg.seed + 1, frames=1 + 4 * (CHUNK - 1))
    while clips.filled < cfg.clips:
        clips.add(4)
    while openings.filled < cfg.openings:
        openings.add(32)
    log.info("%d clips of %d frames, %d openings", clips.filled, cfg.frames, openings.filled)
    return clips, openings


def _train(
    cfg: VariantTraining,
    name: str,
    model: Trainee,
    start: Path,
    folder: Path,
    banks: tuple[LatentBank, LatentBank],
) -> None:
    began = time.monotonic()
    torch.manual_seed(cfg.seed)
    for bank in banks:
        bank.rng = random.Random(cfg.seed)  # the same clips in the same order for every variant
    dice = random.Random(cfg.seed + 2)
    load_weights(model, start)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    averaged, current = list(average.values()), list(model.state_dict().values())
    optims = optimizers(model, cfg)
    steps = Steps(model, optims, cfg, *banks, banks[0].device)
    losses: dict[str, list[Tensor]] = {"opening": [], "stream": []}
    for step in range(cfg.steps):
        set_lr(optims, lr_factor(step, step / cfg.steps, min(150, 1 + cfg.steps // 10), cfg.decay_from))
        kind = "opening" if dice.random() < cfg.first_share else "stream"
        losses[kind].append(steps.opening() if kind == "opening" else steps.stream(MODES[name]))
        torch._foreach_lerp_(averaged, current, 1 - min(cfg.ema, (1 + step) / (10 + step)))
        if (step + 1) % cfg.log_every == 0 or step + 1 == cfg.steps:
            means = {k: torch.stack(v).nanmean(0).tolist() for k, v in losses.items() if v}
            log.info("%s step %d  flow loss %s", name, step + 1, shorten(means))
            losses = {k: [] for k in losses}
    if not model.dit.head.head.bias.isfinite().all():
        raise FloatingPointError(f"the weights of {name} are not finite: lower muon_lr or adam_lr")
    save_trainee(average, folder)
    facts = {"steps": cfg.steps, "seconds": time.monotonic() - began, "loss": means, "start": start.name}
    (folder / "done.json").write_text(json.dumps(facts, indent=1) + "\n")
    log.info("%s: %d steps in %.0f s", name, cfg.steps, facts["seconds"])
