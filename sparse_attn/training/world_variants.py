"""The variants that are compared: trained in turn from one start, with the same steps, data and seeds.

Every variant sees clips chunk by chunk as at generation (`stream_step`), with the memory that it will generate with;
all count positions the rebased way, so that a minute looks to them like the clips of training. A variant that is
finished is not trained again.
"""

from __future__ import annotations

import functools
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config import AttentionConfig
from ..world.scene import PAN_REST, PAN_SWING, Scene, is_held_out, to_prompt
from .common import channels_last, compile_blocks, log, lr_factor, set_lr, training_scenes
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
from .world_recall import FIRST_SEEN, recall_scene

# Cache in latent frames: dense-21 holds 21, all others 12. A window counts its sink.
MODES = {
    "dense-21": AttentionConfig(mode="window", window_frames=21, sink_frames=3, positions="rebased"),
    "window-12": AttentionConfig(mode="window", window_frames=12, sink_frames=3, positions="rebased"),
    "sparse": AttentionConfig(positions="rebased"),
    "sparse-novelty": AttentionConfig(positions="rebased", keep="novelty"),
    "sparse-quarters": AttentionConfig(positions="rebased", keep="novelty", router="quarters"),
    "no-persistent": AttentionConfig(
        window_frames=12, sink_frames=0, persistent_frames=0, positions="rebased"
    ),
    "no-local-sparsity": AttentionConfig(topk=1.0, positions="rebased", keep="novelty"),
}
KINDS = ("opening", "late", "recall", "stream")  # of steps
PARTS = ("latents", "ids")  # of a bank
RETURN = FIRST_SEEN + 2 * (
    PAN_REST + PAN_SWING
)  # the first frame in which a sprite of a training recall may be back
# Name, mode to generate with, whose weights.
ENTRIES = (
    *((name, name, name) for name in MODES),
    ("sparse-training-free", "sparse", "dense-21"),
    ("novelty-training-free", "sparse-novelty", "dense-21"),
)


@dataclass(frozen=True)
class VariantTraining(DitTraining):
    """What all variants share.

    steps: of each variant. Shares of them: `first_share` openings; `late_share` the second half of clips of `frames`
    video frames, in which sprites leave the view and come back; `recall_share` the returns of the recall test, on clips
    of `recall_frames`, `recall_drop` of them without a prompt; the rest streams of `stream_frames` from the opening on.
    All lengths 12 n - 3. clips, recalls, openings: how many are drawn from. pans: share of the clips with a camera pan,
    which stays away for up to `longest_hold` frames; a share `late` of these begins anywhere on the camera's way. Of
    the other fields those of the model, the openings, the optimizer and the average count; those of windows and of the
    clock do not.
    """

    steps: int = 1800
    first_share: float = 0.1
    late_share: float = 0.2
    recall_share: float = 0.5
    frames: int = 225
    stream_frames: int = 153
    recall_frames: int = 153
    clips: int = 448
    recalls: int = 448
    openings: int = 2048
    pans: float = 0.3
    longest_hold: int = 56
    late: float = 0.5
    recall_drop: float = 0.6
    first_batch: int = 32
    stream_batch: int = 12
    drop_prompt: float = 0.1
    guidance: float = 0.3
    words: float = 0.05
    sprites: float = 4.0
    decay_from: float = 0.5
    muon_lr: float = 1.5e-3
    adam_lr: float = 7.5e-4

    def validate(self) -> None:
        """Raise ValueError, naming the value and the remedy."""
        for name in ("frames", "stream_frames", "recall_frames"):
            frames = getattr(self, name)
            if frames % 4 != 1 or (frames // 4 + 1) % CHUNK:
                near = 12 * round((frames + 3) / 12) - 3
                raise ValueError(f"{name} {frames} are not whole chunks of latents: use {near}.")
        if self.stream_frames > self.frames:
            raise ValueError(f"stream_frames {self.stream_frames} are more than the {self.frames} of a clip.")
        if self.recall_frames <= RETURN:
            raise ValueError(
                f"recall_frames {self.recall_frames}: use more than {RETURN}, or nothing returns."
            )
        if min(self.steps, self.clips, self.recalls, self.openings) < 1:
            raise ValueError(
                f"steps {self.steps}, clips {self.clips}, recalls {self.recalls}, openings {self.openings}: use at "
                "least 1 of each."
            )
        if self.first_share + self.late_share + self.recall_share > 1:
            raise ValueError(
                f"first_share {self.first_share}, late_share {self.late_share} and recall_share {self.recall_share} "
                "are more than all steps together."
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
        banks = _banks(cfg, start, device, out / "banks.safetensors")
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


class Banks(NamedTuple):
    """Clips, those of the recall test, and openings: encoded once for all variants."""

    clips: LatentBank
    recalls: LatentBank
    openings: LatentBank


def _banks(cfg: VariantTraining, start: Path, device: str, kept: Path) -> Banks:
    """The banks, from the file `kept` where an earlier call wrote it."""
    vae = load_vae(start, device).requires_grad_(False)
    channels_last(vae.to(torch.bfloat16 if device != "cpu" else torch.float32))
    scenes = functools.partial(training_scenes, pans=cfg.pans, longest_hold=cfg.longest_hold, late=cfg.late)
    banks = Banks(
        LatentBank(vae, cfg.clips, device, cfg.seed, cfg.frames, scenes),
        LatentBank(vae, cfg.recalls, device, cfg.seed + 2, cfg.recall_frames, recall_scenes),
        LatentBank(vae, cfg.openings, device, cfg.seed + 1, frames=1 + 4 * (CHUNK - 1)),
    )
    if kept.is_file():
        tensors = load_file(kept)
        for number, bank in enumerate(banks):
            bank.latents, bank.ids = tensors[f"{number}.latents"].to(device), tensors[f"{number}.ids"]
            bank.filled = len(bank.ids)
        return banks
    for bank, at_once in zip(banks, (8, 8, 64)):
        while bank.filled < bank.size:
            bank.add(min(at_once, bank.size - bank.filled))
    tensors = {f"{i}.{part}": getattr(bank, part).cpu() for i, bank in enumerate(banks) for part in PARTS}
    save_file(tensors, kept)
    log.info("clips, recalls, openings: %s", ", ".join(str(bank.filled) for bank in banks))
    return banks


def recall_scenes(rng: random.Random, count: int) -> list[Scene]:
    """Scenes of the recall test whose sprite is back and at rest before a training clip ends; none held out."""
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = recall_scene(rng, rng.uniform(2.1, 4.5))
        if not is_held_out(to_prompt(scene)):
            scenes.append(scene)
    return scenes


def _train(cfg: VariantTraining, name: str, model: Trainee, start: Path, folder: Path, banks: Banks) -> None:
    began = time.monotonic()
    torch.manual_seed(cfg.seed)
    for bank in banks:
        bank.rng = random.Random(cfg.seed)  # the same clips in the same order for every variant
    dice = random.Random(cfg.seed + 2)
    load_weights(model, start)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    averaged, current = list(average.values()), list(model.state_dict().values())
    optims = optimizers(model, cfg)
    steps = Steps(model, optims, cfg, banks.clips, banks.openings, banks.clips.device)
    losses: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for step in range(cfg.steps):
        set_lr(optims, lr_factor(step, step / cfg.steps, min(150, 1 + cfg.steps // 10), cfg.decay_from))
        kind = draw_kind(cfg, dice.random())
        losses[kind].append(_step(steps, kind, cfg, MODES[name], banks))
        torch._foreach_lerp_(averaged, current, 1 - min(cfg.ema, (1 + step) / (10 + step)))
        if (step + 1) % cfg.log_every == 0 or step + 1 == cfg.steps:
            means = {k: torch.stack(v).nanmean(0).tolist() for k, v in losses.items() if v}
            log.info("%s step %d  flow loss %s", name, step + 1, shorten(means))
            losses = {kind: [] for kind in KINDS}
    if not model.dit.head.head.bias.isfinite().all():
        raise FloatingPointError(f"the weights of {name} are not finite: lower muon_lr or adam_lr")
    save_trainee(average, folder)
    facts = {"steps": cfg.steps, "seconds": time.monotonic() - began, "loss": means, "start": start.name}
    (folder / "done.json").write_text(json.dumps(facts, indent=1) + "\n")
    log.info("%s: %d steps in %.0f s", name, cfg.steps, facts["seconds"])


def draw_kind(cfg: VariantTraining, dice: float) -> str:
    """Which of KINDS the next step is; dice in [0, 1)."""
    for kind, share in zip(KINDS, (cfg.first_share, cfg.late_share, cfg.recall_share)):
        if dice < share:
            return kind
        dice -= share
    return KINDS[-1]


def _step(steps: Steps, kind: str, cfg: VariantTraining, attention: AttentionConfig, banks: Banks) -> Tensor:
    clips, recalls = banks.clips, banks.recalls
    match kind:
        case "opening":
            return steps.opening()
        case "late":
            return steps.stream_on(attention, clips, clips.chunks // 2, clips.chunks, cfg.drop_prompt)
        case "recall":
            return steps.stream_on(attention, recalls, _chunks(RETURN), recalls.chunks, cfg.recall_drop)
    return steps.stream_on(attention, clips, 0, _chunks(cfg.stream_frames), cfg.drop_prompt)


def _chunks(frames: int) -> int:
    """Whole chunks that `frames` video frames hold."""
    return (1 + (frames - 1) // 4) // CHUNK
