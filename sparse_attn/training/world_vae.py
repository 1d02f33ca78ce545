"""Train the world's VAE: Wan's architecture at base width 16, from rendered clips, in minutes.

A first run batch-normalises the latents, so that every channel is used; a second (--resume) keeps the statistics it
finds and lets the absolute level of a clip pass. In both a little noise is added before decoding, so that a small
error of the diffusion model stays a small error of the picture. A last one may train the decoder alone, under a
diffusion model that is already trained. At the end the measured statistics are folded into
the two 1x1x1 convolutions: raw latents have Wan's mean and deviation per channel.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..vae import WanVAE
from .common import (
    Budget,
    channels_last,
    log,
    lr_factor,
    mixed_precision,
    psnr,
    render_with_mask,
    save_weights,
    set_lr,
    training_scenes,
)


@dataclass(frozen=True)
class VaeTraining:
    """minutes: length of the run; batch: clips of `frames` (1 + 4n) video frames; latent_noise: largest deviation.

    pans: share of the clips that are chosen for a camera pan, whose motion is the fastest of the world. sprites: how
    much more than the background sprites weigh in the loss. decoder_only: the encoder stays, and so do all latents.
    """

    minutes: float = 5.0
    seed: int = 0
    dim: int = 16
    batch: int = 4
    frames: int = 17  # a last run wants 81: a decoder that never saw a long past fails beyond what it saw
    lr: float = 2e-3
    latent_noise: float = 0.2
    pans: float = 0.0
    spread_weight: float = 0.02
    sprites: float = 0.0
    decoder_only: bool = False
    compile: bool = True
    log_every: int = 50


class Autoencoder(nn.Module):
    """Encoder, normaliser, decoder as one module, so that it compiles as one graph.

    fixed: latents are scaled by the statistics in the weights (Wan's, after a fold) instead of the batch's own.
    """

    def __init__(self, vae: WanVAE, fixed: bool, decoder_only: bool = False):
        super().__init__()
        self.vae, self.fixed, self.decoder_only = vae, fixed, decoder_only
        if decoder_only:
            vae.encoder.requires_grad_(False)
            vae.conv1.requires_grad_(False)
        self.normalise = nn.BatchNorm3d(16, affine=False, momentum=0.02)
        if fixed:
            self._unfold()

    @torch.no_grad()
    def _unfold(self) -> None:
        """Let conv2 take normalised latents again, as during training."""
        mean, std = self.vae.latent_mean.flatten(), self.vae.latent_std.flatten()
        self.normalise.running_mean.copy_(mean)
        self.normalise.running_var.copy_(std.square())
        self.vae.conv2.bias += (self.vae.conv2.weight[..., 0, 0, 0] * mean).sum(1)
        self.vae.conv2.weight *= std.view(1, -1, 1, 1, 1)

    def forward(self, video: Tensor, noise_level: Tensor) -> tuple[Tensor, Tensor]:
        """Decoded video, and how far the channels' mean squares are from one."""
        mean = self.vae.conv1(self.vae.encoder(video)).chunk(2, dim=1)[0].float()
        z = self.normalise(mean)  # in the fixed phase this only keeps the running statistics
        if self.fixed:
            z = (mean - self.vae.latent_mean) / self.vae.latent_std
        spread = (z.square().mean(dim=(0, 2, 3, 4)) - 1).square().mean()
        z = z + noise_level * torch.randn_like(z)
        return self.vae.decoder(self.vae.conv2(z.to(video.dtype))), spread


def reconstruction_loss(out: Tensor, video: Tensor, weight: Tensor) -> Tensor:
    """L1 on pixels and on their spatial differences: flat areas stay flat, edges stay sharp.

    weight: of each pixel, [B, 1, F, H, W].
    """
    error = weight * (out.float() - video.float())
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 4 * error.square().mean() + 0.5 * edges


@torch.no_grad()
def fold_statistics(model: Autoencoder) -> WanVAE:
    """Fold the statistics into conv1 and conv2, so that raw latents have Wan's mean and deviation."""
    vae, norm = model.vae, model.normalise
    wan_mean, wan_std = vae.latent_mean.flatten(), vae.latent_std.flatten()
    mean, std = norm.running_mean, (norm.running_var + norm.eps).sqrt()
    if model.decoder_only:
        mean, std = wan_mean, wan_std
    gain = wan_std / std
    if not model.decoder_only:
        vae.conv1.weight[:16] *= gain.view(-1, 1, 1, 1, 1)
        vae.conv1.bias[:16] = (vae.conv1.bias[:16] - mean) * gain + wan_mean
    # conv2 was trained on z = (raw - scale_mean) / scale_std; new raw latents are (old - mean) * gain + wan_mean.
    scale_mean, scale_std = (wan_mean, wan_std) if model.fixed else (mean, std)
    slope, offset = 1 / (gain * scale_std), (mean - wan_mean / gain - scale_mean) / scale_std
    matrix = vae.conv2.weight[..., 0, 0, 0].clone()
    vae.conv2.bias += (matrix * offset).sum(1)
    vae.conv2.weight.copy_((matrix * slope)[..., None, None, None])
    return vae


def train_vae(cfg: VaeTraining, out: Path, device: str, resume: bool = False) -> None:
    """Run the training and write the weights to `out`; `resume` goes on from the weights already there.

    Raises ValueError where only the decoder is to be trained of nothing.
    """
    if cfg.decoder_only and not resume:
        raise ValueError("decoder_only: there is no encoder yet; train one first, then use --resume.")
    torch.manual_seed(cfg.seed)
    rng = random.Random(cfg.seed)
    vae = WanVAE.from_state_dict(load_file(out)).float() if resume else WanVAE(cfg.dim)
    model = channels_last(Autoencoder(vae, fixed=resume, decoder_only=cfg.decoder_only).to(device))
    step_fn = torch.compile(model) if cfg.compile else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=1e-4)
    budget, step, shown = Budget(cfg.minutes), 0, time.monotonic()
    while (progress := budget.progress) < 1:
        set_lr([optimizer], lr_factor(step, progress, decay_from=0.4))
        starts = [rng.randrange(0, 64) for _ in range(cfg.batch)]
        scenes = training_scenes(rng, cfg.batch, cfg.pans)
        video, mask = render_with_mask(scenes, cfg.frames, device, starts)
        video = video.contiguous(memory_format=torch.channels_last_3d)
        level = cfg.latent_noise * torch.rand(cfg.batch, 1, 1, 1, 1, device=device)
        with mixed_precision(device):
            decoded, spread = step_fn(video, level)
        loss = reconstruction_loss(decoded, video, 1 + cfg.sprites * mask)
        if not cfg.decoder_only:
            loss = loss + cfg.spread_weight * spread
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
