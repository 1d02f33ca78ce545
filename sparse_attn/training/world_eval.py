"""Measure the world model: the checker on the renderer and on the VAE, then the model's clips on held-out prompts."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ..config import AttentionConfig
from ..pictures import contact_sheet, to_uint8
from ..vae import WanVAE
from ..wan import WanModel
from ..world import ATTENTION
from ..world.checker import judge, summarise
from ..world.scene import Scene, sample_scene, to_prompt
from .common import log, psnr, render_batch
from .world_clips import load_folder, load_vae, sample

LATENT_FRAMES = 21
MODES = {
    "dense": AttentionConfig(mode="dense"),
    "window": AttentionConfig(mode="window", window_frames=12),
    "sparse": ATTENTION,
}
PARTS = ("vae", *MODES)


def held_out_scenes(count: int, seed: int = 0) -> list[Scene]:
    """Scenes whose prompts training never saw, all prompts different."""
    rng = random.Random(seed + 1000)
    scenes: dict[str, Scene] = {}
    while len(scenes) < count:
        scene = sample_scene(rng, held_out=True)
        scenes.setdefault(to_prompt(scene), scene)
    return list(scenes.values())


def as_seen(video_BCFHW: Tensor) -> Tensor:
    """One video [1, 3, F, H, W] as the checker wants it: uint8 [F, H, W, 3] on the CPU."""
    return torch.from_numpy(to_uint8(video_BCFHW))


def verdicts(videos: list[Tensor], scenes: list[Scene], device: str) -> dict[str, float]:
    """Rates of the checker over clips."""
    with ThreadPoolExecutor(8) as pool:
        return summarise(list(pool.map(judge, (v.to(device) for v in videos), scenes)))


@torch.no_grad()
def generate(dit: WanModel, vae: WanVAE, rows: Tensor, attention: AttentionConfig, seed: int) -> list[Tensor]:
    """One clip per row of text, sampled in one batch: uint8 [F, H, W, 3] each."""
    latents = sample(dit, rows, attention, LATENT_FRAMES, seed)
    return [as_seen(vae.decode(z[None].to(rows.device))) for z in latents]


@torch.no_grad()
def report(folder: Path, clips: int, device: str, seed: int, parts: Sequence[str] = PARTS) -> dict:
    """Measure the weights in `folder`: the VAE with the checker, and what the model makes in each mode.

    Writes report.json, in which parts not measured now stay as they were, and sheet_<mode>.png beside the weights.
    """
    path = folder / "report.json"
    found: dict = json.loads(path.read_text()) if path.is_file() else {}
    found |= {"clips": clips, "seed": seed, "torch": torch.__version__, "device": device}
    if device != "cpu":
        found["device"] = torch.cuda.get_device_name()
    vae = load_vae(folder, device).eval()
    scenes = held_out_scenes(clips, seed)
    for part in parts:
        if part == "vae":
            found |= _report_vae(vae, scenes, device)
        else:
            found[part] = _report_mode(part, folder, vae, scenes, device, seed)
        log.info("%s %s", part, json.dumps(found.get(part, found), indent=1))
        path.write_text(json.dumps(found, indent=1) + "\n")
    return found


def _report_vae(vae: WanVAE, scenes: list[Scene], device: str) -> dict:
    rendered, through, scores = [], [], []
    for scene in scenes:
        video = render_batch([scene], 81, device)
        decoded = vae.decode(vae.encode(video))
        scores.append(psnr(decoded, video))
        rendered.append(as_seen(video))
        through.append(as_seen(decoded))
    return {
        "vae_psnr": {"mean": sum(scores) / len(scores), "min": min(scores)},
        "checker_on_renderer": verdicts(rendered, scenes, device),
        "checker_through_vae": verdicts(through, scenes, device),
        "checker_on_shuffled_prompts": verdicts(rendered, scenes[1:] + scenes[:1], device),
    }


def _report_mode(
    mode: str, folder: Path, vae: WanVAE, scenes: list[Scene], device: str, seed: int
) -> dict[str, float]:
    model = load_folder(folder, device, vae)
    rows = model.text.encode([to_prompt(s) for s in scenes])
    videos: list[Tensor] = []
    for i, part in enumerate(rows.split(16)):
        videos += generate(model.dit, vae, part, MODES[mode], seed + i)
    sheet = torch.cat([v[torch.linspace(0, len(v) - 1, 6).long()] for v in videos[:16]])
    contact_sheet(sheet.numpy(), count=len(sheet), columns=6, width=128).save(folder / f"sheet_{mode}.png")
    return verdicts(videos, scenes, device)
