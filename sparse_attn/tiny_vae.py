"""A tiny decoder of Wan's latents, the shape and weight names of TAEHV's (madebyollin/taehv), decoded as a stream.

Every frame passes 2-D convolutions alone; the blocks named MemBlock also see their own input of the frame before. So a
stream needs one picture a block as memory, and pushing pieces of any size equals decoding at once.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .wan import Ops

WIDTHS = (256, 128, 64, 64)
GROWTH = (1, 2, 2)  # of time, stage by stage
SURPLUS = 3  # frames that the first latent frame gives beyond the one that it stands for


class Clamp(nn.Module):
    """Keeps latents within 3 either way, softly."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class MemBlock(nn.Module):
    """Residual block over a frame and what was this block's input for the frame before."""

    def __init__(self, width: int, ops: Ops):
        super().__init__()
        self.conv = nn.Sequential(
            ops.Conv2d(2 * width, width, 3, padding=1), nn.ReLU(),
            ops.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            ops.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        return F.relu(self.conv(torch.cat([x, past], 1)) + x)


class Grow(nn.Module):
    """Every frame becomes `times` frames."""

    def __init__(self, width: int, times: int, ops: Ops):
        super().__init__()
        self.conv = ops.Conv2d(width, width * times, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(-1, *x.shape[1:])


def run_as_stream(
    layers: Iterable[nn.Module], x_BFCHW: Tensor, past: dict[str, Tensor], remembers: type
) -> Tensor:
    """Frames [B, F, C, H, W] through `layers`, going on from `past`, which is changed: by a layer's place, the last
    input [B, 1, C, H, W] of each that is a `remembers`, called as layer(x, input before); no entry: black."""
    batch = x_BFCHW.shape[0]
    x = x_BFCHW.flatten(0, 1)
    for place, layer in enumerate(layers):
        if isinstance(layer, remembers):
            frames = x.unflatten(0, (batch, -1))
            before = past.get(str(place), torch.zeros_like(frames[:, :1]))
            past[str(place)] = frames[:, -1:].clone()
            x = layer(x, torch.cat([before, frames[:, :-1]], dim=1).flatten(0, 1))
        else:
            x = layer(x)
    return x.unflatten(0, (batch, -1))


class TinyDecoder(nn.Module):
    """Latents as the network was trained on them (published ones: normalised) -> video in about [-1, 1]."""

    def __init__(self, latent_channels: int = 16, ops: Ops = nn):
        super().__init__()
        layers: list[nn.Module] = [Clamp(), ops.Conv2d(latent_channels, WIDTHS[0], 3, padding=1), nn.ReLU()]
        for width, following, times in zip(WIDTHS, WIDTHS[1:], GROWTH):
            layers += [MemBlock(width, ops) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), Grow(width, times, ops)]
            layers.append(ops.Conv2d(width, following, 3, padding=1, bias=False))
        self.decoder = nn.Sequential(*layers, nn.ReLU(), ops.Conv2d(WIDTHS[-1], 3, 3, padding=1))

    def decode(self, latent_BCFHW: Tensor) -> Tensor:
        """Latents [B, 16, F, h, w] -> video [B, 3, 1 + 4(F-1), 8h, 8w], in one go."""
        return self.stream_decoder().push(latent_BCFHW)

    def stream_decoder(self) -> TinyStreamDecoder:
        """A decoder that takes latents as they are made."""
        return TinyStreamDecoder(self)


class TinyStreamDecoder:
    """As `vae.StreamDecoder`: push chunks of any size, get their frames, equal to decoding everything at once."""

    def __init__(self, network: TinyDecoder):
        self.network = network
        self.past: dict[str, Tensor] = {}

    def push(self, latent_BCFHW: Tensor) -> Tensor:
        """Latents [B, 16, F, h, w] -> the video frames [B, 3, n, 8h, 8w] they complete: 4F, the first time 4F-3."""
        skip = 0 if self.past else SURPLUS
        video = run_as_stream(self.network.decoder, latent_BCFHW.transpose(1, 2), self.past, MemBlock)
        return 2 * video[:, skip:].transpose(1, 2) - 1

    def reset(self) -> None:
        self.past.clear()
