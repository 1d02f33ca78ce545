"""Train the world's VAE: Wan's architecture at base width 16, from rendered clips, in minutes.

The latents are batch-normalised and a little noise is added before they are decoded: every channel is used, and a small
error of the diffusion model stays a small error of the picture. At the end the normalisation is folded into the two 1x1x1
convolutions, so that raw latents have exactly Wan's mean and deviation per channel.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..vae import WanVAE
from .common import Budget, log, lr_factor, mixed_precision, psnr, render_batch, save_weights, set_lr, training_scenes


@dataclass(frozen=True)
class VaeTraining:
    """minutes: length of the run; batch clips of `frames` video frames (1 + 4n); latent_noise: largest deviation added."""

    minutes: float = 5.0
    seed: int = 0
    dim: int = 16
    batch: int = 4
    frames: int = 17
    lr: float = 2e-3
    latent_noise: float = 0.25
    compile: bool = True
    log_every: int = 50


class Autoencoder(nn.Module):
    """Encoder, normaliser, decoder as one module, so that it compiles as one graph."""

    def __init__(self, vae: WanVAE):
        super().__init__()
        self.vae = vae
        self.normalise = nn.BatchNorm3d(16, affine=False, momentum=0.02)

    def forward(self, video: Tensor, noise_level: Tensor) -> Tensor:
        mean = self.vae.conv1(self.vae.encoder(video)).chunk(2, dim=1)[0]
        z = self.normalise(mean.float())
        z = z + noise_level * torch.randn_like(z)
        return self.vae.decoder(self.vae.conv2(z.to(mean)))


def reconstruction_loss(out: Tensor, video: Tensor) -> Tensor:
    """L1 on pixels and on their spatial differences: flat areas stay flat, edges stay sharp."""
    error = out.float() - video.float()
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges


@torch.no_grad()
def fold_statistics(model: Autoencoder) -> WanVAE:
    """Move the normaliser into conv1 and conv2, with Wan's statistics in between."""
    vae, norm = model.vae, model.normalise
    std = (norm.running_var + norm.eps).sqrt()
    mean, wan_mean, wan_std = norm.running_mean, vae.latent_mean.flatten(), vae.latent_std.flatten()
    gain = wan_std / std
    vae.conv1.weight[:16] *= gain.view(-1, 1, 1, 1, 1)
    vae.conv1.bias[:16] = (vae.conv1.bias[:16] - mean) * gain + wan_mean
    weight = vae.conv2.weight / wan_std.view(1, -1, 1, 1, 1)
    vae.conv2.bias -= (weight[..., 0, 0, 0] * wan_mean).sum(1)
    vae.conv2.weight.copy_(weight)
    return vae


def train_vae(cfg: VaeTraining, out: Path, device: str) -> None:
    """Run the training and write the weights to `out`."""
    torch.manual_seed(cfg.seed)
    rng = random.Random(cfg.seed)
    model = Autoencoder(WanVAE(cfg.dim)).to(device)
    for weight in model.parameters():
        if weight.ndim == 5:  # the layout cuDNN's 16-bit 3-D convolutions want
            weight.data = weight.data.contiguous(memory_format=torch.channels_last_3d)
    step_fn = torch.compile(model) if cfg.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=1e-4)
    budget, step, shown = Budget(cfg.minutes), 0, time.monotonic()
    while (progress := budget.progress) < 1:
        set_lr([optimizer], lr_factor(step, progress, decay_from=0.4))
        starts = [rng.randrange(0, 64) for _ in range(cfg.batch)]
        video = render_batch(training_scenes(rng, cfg.batch), cfg.frames, device, starts)
        video = video.contiguous(memory_format=torch.channels_last_3d)
        level = cfg.latent_noise * torch.rand(cfg.batch, 1, 1, 1, 1, device=device)
        with mixed_precision(device):
            decoded = step_fn(video, level)
        loss = reconstruction_loss(decoded, video)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % cfg.log_every == 0:
            now = time.monotonic()
            rate, shown = cfg.log_every / (now - shown), now
            log.info(
                "vae step %d  %.0f%%  loss %.4f  psnr %.2f dB  %.1f steps/s",
                step, 100 * progress, loss.item(), psnr(decoded, video), rate,
            )  # fmt: skip
    save_weights(out, fold_statistics(model.eval()).state_dict())
    log.info("wrote %s after %d steps", out, step)


@torch.no_grad()
def measure_vae(vae: WanVAE, clips: int, device: str, seed: int = 1) -> dict[str, float]:
    """PSNR of held-out-length clips (81 frames) through the 16-bit weights, and the statistics of their latents."""
    rng = random.Random(seed)
    scores, latents = [], []
    for scene in training_scenes(rng, clips):
        video = render_batch([scene], 81, device)
        latent = vae.encode(video)
        scores.append(psnr(vae.decode(latent), video))
        latents.append(latent)
    z = torch.cat(latents)
    std = z.std(dim=(0, 2, 3, 4))
    return {
        "psnr_mean": sum(scores) / clips,
        "psnr_min": min(scores),
        "latent_mean": z.mean().item(),
        "latent_std_min": std.min().item(),
        "latent_std_max": std.max().item(),
        "finite": float(math.isfinite(z.sum().item())),
    }


