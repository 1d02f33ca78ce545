"""The Wan2.1 causal video VAE (8x8 space, 4x time, 16 channels) in plain torch, offline and as a stream.

Weight names are Wan's. Every convolution is causal in time, so a decoder that remembers the last two input frames of
each convolution gives the same video whether latents arrive at once or in chunks of any size. A video of 1 + 4n frames
has 1 + n latent frames; the first stands for one frame, each later one for four.

`encode` and `decode` speak *normalised* latents (what a diffusion model sees); the weights' own latents have Wan's mean
and deviation per channel, which hosts remove themselves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .wan import Ops

# Wan2.1's per-channel statistics of raw latents (constants of its release).
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

DIM_MULT = (1, 2, 4, 4)
RES_BLOCKS = 2


class StreamCache(dict):
    """What a stream remembers between chunks, by module: tails of inputs, and who has seen a first frame."""


def causal_conv(conv: nn.Module, x: Tensor, cache: StreamCache | None) -> Tensor:
    """3-D convolution padded in the past only: zeros at the start of a stream, else the remembered frames."""
    pad = conv.kernel_size[0] - 1
    if pad == 0:
        return conv(x)
    past = None if cache is None else cache.get(conv)
    x = F.pad(x, (0, 0, 0, 0, pad, 0)) if past is None else torch.cat([past, x], dim=2)
    if cache is not None:
        cache[conv] = x[:, :, -pad:].clone()
    return conv(x)


def conv3(ops: Ops, cin: int, cout: int, kernel: int = 3) -> nn.Module:
    """Kernel^3 convolution; time is padded by `causal_conv`."""
    return ops.Conv3d(cin, cout, kernel, padding=(0, kernel // 2, kernel // 2))


class ChannelNorm(nn.Module):
    """L2-normalise each position's channels, times sqrt(channels) and a learned gain."""

    def __init__(self, dim: int, spatial_dims: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * spatial_dims))

    def forward(self, x: Tensor) -> Tensor:
        # Written out: a norm over a strided dimension is several times slower on a CPU.
        square = (x * x).sum(dim=1, keepdim=True, dtype=torch.float32)
        return x * (square / x.shape[1]).clamp_min(1e-24).rsqrt().to(x.dtype) * self.gamma.to(x)


class ResidualBlock(nn.Module):
    def __init__(self, cin: int, cout: int, ops: Ops):
        super().__init__()
        # Index 5 is Wan's dropout; the names residual.0/2/3/6 must stay.
        self.residual = nn.Sequential(
            ChannelNorm(cin, 3), nn.SiLU(), conv3(ops, cin, cout),
            ChannelNorm(cout, 3), nn.SiLU(), nn.Identity(), conv3(ops, cout, cout),
        )  # fmt: skip
        self.shortcut = conv3(ops, cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x: Tensor, cache: StreamCache | None) -> Tensor:
        norm1, act1, conv1, norm2, act2, _, conv2 = self.residual
        y = causal_conv(conv1, act1(norm1(x)), cache)
        y = causal_conv(conv2, act2(norm2(y)), cache)
        return y + self.shortcut(x)


class FrameAttention(nn.Module):
    """Single-head self-attention inside each frame."""

    def __init__(self, dim: int, ops: Ops):
        super().__init__()
        self.norm = ChannelNorm(dim, 2)
        self.to_qkv = ops.Conv2d(dim, dim * 3, 1)
        self.proj = ops.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, cache: StreamCache | None) -> Tensor:
        b, _, _, h, _ = x.shape
        y = self.norm(rearrange(x, "b c t h w -> (b t) c h w"))
        q, k, v = rearrange(self.to_qkv(y), "n (s c) h w -> s n 1 (h w) c", s=3)
        y = rearrange(F.scaled_dot_product_attention(q, k, v), "n 1 (h w) c -> n c h w", h=h)
        return x + rearrange(self.proj(y), "(b t) c h w -> b c t h w", b=b)


def per_frame(module: nn.Module, x: Tensor) -> Tensor:
    y = module(rearrange(x, "b c t h w -> (b t) c h w"))
    return rearrange(y, "(b t) c h w -> b c t h w", b=x.shape[0])


class Downsample(nn.Module):
    """Halve height and width; with `time`, also halve time: the first frame passes, then each pair becomes one."""

    def __init__(self, dim: int, time: bool, ops: Ops):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), ops.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = ops.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x: Tensor, cache: StreamCache | None) -> Tensor:
        x = per_frame(self.resample, x)
        if self.time_conv is None:
            return x
        last = None if cache is None else cache.get(self)
        if cache is not None:
            cache[self] = x[:, :, -1:].clone()
        if last is not None:
            return self.time_conv(torch.cat([last, x], dim=2))
        return x if x.shape[2] == 1 else torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)


class Upsample(nn.Module):
    """Double height and width; with `time`, also double time: the first frame of a stream stays single."""

    def __init__(self, dim: int, time: bool, ops: Ops):
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact"),
            ops.Conv2d(dim, dim // 2, 3, padding=1),
        )
        self.time_conv = ops.Conv3d(dim, dim * 2, (3, 1, 1)) if time else None

    def forward(self, x: Tensor, cache: StreamCache | None) -> Tensor:
        if self.time_conv is not None:
            started = cache is not None and self in cache
            first, rest = (x[:, :, :0], x) if started else (x[:, :, :1], x[:, :, 1:])
            if cache is not None:
                cache[self] = True
            if rest.shape[2]:
                rest = causal_conv(self.time_conv, rest, cache)
                rest = rearrange(rest, "b (s c) t h w -> b c (t s) h w", s=2)
            x = torch.cat([first, rest], dim=2)
        return per_frame(self.resample, x)


class Stack(nn.Module):
    """Common shape of encoder and decoder: conv1, layers, middle, head (in the order each needs)."""

    def middle_blocks(self, dim: int, ops: Ops) -> nn.Sequential:
        return nn.Sequential(
            ResidualBlock(dim, dim, ops), FrameAttention(dim, ops), ResidualBlock(dim, dim, ops)
        )

    def head_block(self, dim: int, cout: int, ops: Ops) -> nn.Sequential:
        return nn.Sequential(ChannelNorm(dim, 3), nn.SiLU(), conv3(ops, dim, cout))

    def run(self, x: Tensor, layers, cache: StreamCache | None) -> Tensor:
        x = causal_conv(self.conv1, x, cache)
        for layer in layers:
            x = layer(x, cache)
        norm, act, conv = self.head
        return causal_conv(conv, act(norm(x)), cache)


class Encoder(Stack):
    def __init__(self, dim: int, z_dim: int, ops: Ops):
        super().__init__()
        widths = [dim * m for m in (1, *DIM_MULT)]
        self.conv1 = conv3(ops, 3, widths[0])
        layers: list[nn.Module] = []
        for i, (cin, cout) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            for j in range(RES_BLOCKS):
                layers.append(ResidualBlock(cin if j == 0 else cout, cout, ops))
            if i < len(DIM_MULT) - 1:
                layers.append(Downsample(cout, time=i > 0, ops=ops))
        self.downsamples = nn.Sequential(*layers)
        self.middle = self.middle_blocks(widths[-1], ops)
        self.head = self.head_block(widths[-1], z_dim, ops)

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        return self.run(x, [*self.downsamples, *self.middle], cache)


class Decoder(Stack):
    def __init__(self, dim: int, z_dim: int, ops: Ops):
        super().__init__()
        widths = [dim * m for m in (DIM_MULT[-1], *DIM_MULT[::-1])]
        self.conv1 = conv3(ops, z_dim, widths[0])
        self.middle = self.middle_blocks(widths[0], ops)
        layers: list[nn.Module] = []
        for i, (cin, cout) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            cin = cin if i == 0 else cin // 2  # the upsampler before halved the channels
            for j in range(RES_BLOCKS + 1):
                layers.append(ResidualBlock(cin if j == 0 else cout, cout, ops))
            if i < len(DIM_MULT) - 1:
                layers.append(Upsample(cout, time=i < 2, ops=ops))
        self.upsamples = nn.Sequential(*layers)
        self.head = self.head_block(widths[-1], 3, ops)

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        return self.run(x, [*self.middle, *self.upsamples], cache)


class WanVAE(nn.Module):
    """Wan2.1's VAE at base width `dim` (96 in the release, 16 in the embedded world model)."""

    def __init__(self, dim: int = 96, z_dim: int = 16, ops: Ops = nn):
        super().__init__()
        self.encoder = Encoder(dim, 2 * z_dim, ops)
        self.conv1 = ops.Conv3d(2 * z_dim, 2 * z_dim, 1)
        self.conv2 = ops.Conv3d(z_dim, z_dim, 1)
        self.decoder = Decoder(dim, z_dim, ops)
        shape = (1, z_dim, 1, 1, 1)
        self.register_buffer("latent_mean", torch.tensor(LATENT_MEAN[:z_dim]).view(shape), persistent=False)
        self.register_buffer("latent_std", torch.tensor(LATENT_STD[:z_dim]).view(shape), persistent=False)

    @classmethod
    def from_state_dict(cls, sd: dict[str, Tensor], ops: Ops = nn) -> WanVAE:
        """Build the VAE whose width the weights have, and load them strictly."""
        vae = cls(dim=sd["decoder.head.0.gamma"].shape[0], z_dim=sd["conv2.weight"].shape[0], ops=ops)
        vae.load_state_dict(sd)
        return vae

    def encode(self, video_BCFHW: Tensor, frames_at_once: int = 16) -> Tensor:
        """Video [B, 3, 1 + 4n, H, W] in [-1, 1] -> normalised latents [B, 16, 1 + n, H/8, W/8].

        Works through the clip in pieces of `frames_at_once` (a multiple of 4) so that memory does not grow with length.
        Raises ValueError where the frame count is not 1 + 4n or a side is not a multiple of 8.
        """
        frames, height, width = video_BCFHW.shape[2:]
        if frames % 4 != 1:
            raise ValueError(
                f"{frames} frames cannot be encoded: the causal VAE takes 1 + 4n frames (1, 5, 9, ...)"
            )
        if height % 8 or width % 8:
            raise ValueError(f"a {width}x{height} video cannot be encoded: both sides must be multiples of 8")
        cache = StreamCache()
        pieces = [video_BCFHW[:, :, :1], *video_BCFHW[:, :, 1:].split(frames_at_once, dim=2)]
        return self._to_latent(
            torch.cat([self.encoder(piece, cache) for piece in pieces if piece.shape[2]], dim=2)
        )

    def encode_whole(self, video_BCFHW: Tensor) -> Tensor:
        """`encode` in one piece and without its checks: what training compiles."""
        return self._to_latent(self.encoder(video_BCFHW))

    def _to_latent(self, encoded: Tensor) -> Tensor:
        mean = self.conv1(encoded).chunk(2, dim=1)[0]
        return (mean - self.latent_mean.to(mean)) / self.latent_std.to(mean)

    def decode(self, latent_BCFHW: Tensor) -> Tensor:
        """Normalised latents [B, 16, F, h, w] -> video [B, 3, 1 + 4(F-1), 8h, 8w], about [-1, 1], in one go."""
        return self.decode_piece(latent_BCFHW, None)

    def decode_piece(self, latent: Tensor, cache: StreamCache | None) -> Tensor:
        raw = latent * self.latent_std.to(latent) + self.latent_mean.to(latent)
        return self.decoder(self.conv2(raw), cache)

    def stream_decoder(self) -> StreamDecoder:
        """A decoder that takes latents as they are made."""
        return StreamDecoder(self)


class StreamDecoder:
    """Push latent chunks of any size, get their frames; equal to decoding everything at once.

    The first latent frame of a stream gives one video frame, each later one four. `reset` starts a new stream.
    """

    def __init__(self, vae: WanVAE):
        self.vae = vae
        self.cache = StreamCache()

    def push(self, latent_BCFHW: Tensor) -> Tensor:
        """Normalised latents [B, 16, F, h, w] -> the video frames [B, 3, n, 8h, 8w] they complete."""
        return self.vae.decode_piece(latent_BCFHW, self.cache)

    def reset(self) -> None:
        self.cache.clear()
