"""How well a critic with block-sparse attention follows the data that it must know: on the world model's clips.

    python benchmarks/critic_fit.py --topk 1 0.5 0.25 0.125 --steps 400

A critic of DMD sees a whole clip at once and learns its distribution by flow matching. Here the embedded transformer
becomes such a critic for rendered clips of 21 latent frames, once for each share of blocks (`DmdTraining.critic_topk`),
with the same start, clips, noise and rates. Printed is the loss on clips that none has seen, by level of noise, with
95 % intervals of the difference to the first share, clip by clip. Writes critic_fit.json.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import time
from pathlib import Path

import torch
from _root import load_pack
from torch import Tensor

PACK = load_pack().__name__

clip_attention, common, dit, dmd, report, world_model = (
    importlib.import_module(f"{PACK}.sparse_attn.{name}")
    for name in (
        *(f"training.{part}" for part in ("clip_attention", "common", "world_dit", "dmd", "quality_report")),
        "world.model",
    )
)
LEVELS = (0.3, 0.6, 0.85, 0.97)  # of noise, of the held-out loss
HELD_OUT = 48


def attention(topk: float, bank, args: argparse.Namespace):
    """`attend` of a critic of the bank's clips."""
    frames, height, width = bank.latents.shape[2:]
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    return clip_attention.clip_attention(
        frames, (height // 2, width // 2), topk, args.block_tokens, dtype, args.device
    )


def clips(vae, count: int, seed: int, device: str):
    bank = dit.LatentBank(vae, count, device, seed)
    for first in range(0, count, 8):
        bank.add(min(8, count - first))
    return bank


def train(world, bank, attend, args: argparse.Namespace):
    """A copy of the world's transformer after `steps` of flow matching on whole clips."""
    critic = copy.deepcopy(world.dit).float().train().requires_grad_(True)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=args.lr, betas=(0.0, 0.999), weight_decay=0.01)
    generator = torch.Generator().manual_seed(1)
    for step in range(args.steps):
        common.set_lr([optimizer], common.lr_factor(step, step / args.steps, warmup=50))
        picks = torch.randint(bank.filled, (args.batch,), generator=generator)
        x = bank.latents[picks.to(args.device), :16].float()
        noise = torch.randn(x.shape, generator=generator).to(args.device)
        sigma = dmd.draw_level(generator, args.batch).to(args.device)
        with torch.no_grad():
            rows = world.text(bank.ids[picks].to(args.device))
        loss = dmd.critic_loss(predict(critic, rows, x, noise, sigma, attend, args.device), x, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return critic.eval()


def predict(critic, rows: Tensor, x: Tensor, noise: Tensor, sigma: Tensor, attend, device: str) -> Tensor:
    """The critic's flow of noised clips."""
    with common.mixed_precision(device):
        x_t = dmd.add_noise(x, noise, sigma)
        return dmd.predict_clip(critic, critic.cross_kv(rows), x_t, sigma, attend)[0]


@torch.no_grad()
def held_out_loss(world, critic, bank, attend, args: argparse.Namespace) -> Tensor:
    """[clips, levels] on the CPU."""
    losses = torch.empty(bank.filled, len(LEVELS))
    for clip in range(bank.filled):
        x, ids = bank.latents[clip : clip + 1, :16].float(), bank.ids[clip : clip + 1].to(args.device)
        rows = world.text(ids)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(clip)).to(args.device)
        for place, level in enumerate(LEVELS):
            flow = predict(critic, rows, x, noise, x.new_full((1,), level), attend, args.device)
            losses[clip, place] = dmd.critic_loss(flow, x, noise).cpu()
    return losses


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topk", type=float, nargs="+", default=[1.0, 0.5, 0.25, 0.125])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--clips", type=int, default=512)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--block-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("output/critic_fit"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    world = world_model.load_world_model(args.device)
    vae = common.channels_last(world.vae)
    seen, unseen = (
        clips(vae, args.clips, 1, args.device),
        clips(vae, min(HELD_OUT, args.clips), 2, args.device),
    )
    found: dict[str, dict] = {}
    first: Tensor | None = None
    for topk in args.topk:
        attend, began = attention(topk, seen, args), time.perf_counter()
        before = held_out_loss(world, world.dit, unseen, attend, args)
        critic = train(world, seen, attend, args)
        losses = held_out_loss(world, critic, unseen, attend, args)
        first = losses if first is None else first
        found[str(topk)] = {
            "untrained": before.mean(0).tolist(),
            "loss": losses.mean(0).tolist(),
            "more_than_first": [report.interval((losses - first)[:, i].tolist()) for i in range(len(LEVELS))],
            "seconds": time.perf_counter() - began,
        }
        shown = "  ".join(
            f"{level:g}: {now:.4f} ({early:.4f} untrained; {mean:+.4f} [{low:+.4f}, {high:+.4f}])"
            for level, now, early, (mean, low, high) in zip(
                LEVELS, losses.mean(0), before.mean(0), found[str(topk)]["more_than_first"]
            )
        )
        print(f"topk {topk:g}  loss at noise {shown}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {"levels": LEVELS, "torch": torch.__version__, **{k: str(v) for k, v in vars(args).items()}}
    (args.out / "critic_fit.json").write_text(
        json.dumps({"settings": facts, "found": found}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
