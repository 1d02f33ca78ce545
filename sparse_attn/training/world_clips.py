"""Clips of a world model in any mode: sampled in batches, decoded as they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..config import AttentionConfig
from ..fast import choose_pass, denoiser
from ..rollout import prefill, stream
from ..state import StreamState
from ..vae import WanVAE
from ..wan import WanModel
from ..world.model import SAMPLER, WorldModel
from ..world.text import WorldTextEncoder
from .common import mixed_precision

CONTEXT = 6  # latents before a span that a decoder must have seen
LATENTS_AT_ONCE = 6  # that a clip is decoded or encoded by
LATENT = (16, 32, 32)  # channels, height and width of the world's latents


def load_folder(folder: Path, device: str, vae: WanVAE) -> WorldModel:
    """Transformer and text encoder of a training folder, in bfloat16 on a GPU, beside a VAE.

    Raises FileNotFoundError naming the file that is missing.
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for path in (folder / f"world_{part}.safetensors" for part in ("dit", "text")):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: train it, or name the folder that holds it")
    dit = WanModel.from_state_dict(load_file(folder / "world_dit.safetensors")).to(device, dtype)
    text = WorldTextEncoder.from_state_dict(load_file(folder / "world_text.safetensors")).to(device, dtype)
    return WorldModel(*(m.eval().requires_grad_(False) for m in (dit, vae, text)))


def load_vae(folder: Path, device: str) -> WanVAE:
    """The VAE of a training folder, float32."""
    return WanVAE.from_state_dict(load_file(folder / "world_vae.safetensors")).to(device).float()


@torch.no_grad()
def sample(
    dit: WanModel,
    rows: Tensor,
    attention: AttentionConfig,
    frames: int,
    seed: int | tuple[int, ...],
    given: Tensor | None = None,
) -> Tensor:
    """Latents [B, 16, frames, 32, 32] float32 on the CPU of one clip a row of text [B, 512, 4096], in one batch.

    seed: of the batch, or one a clip. given: latents [B, 16, G, 32, 32], whole chunks that the clips begin with.
    """
    batch, device = len(rows), rows.device
    memory = StreamState(
        layers=dit.num_layers, heads=dit.num_heads, head_dim=dit.head_dim, grid=(16, 16), batch=batch,
        chunk_frames=SAMPLER.chunk_frames, attention=attention, total_frames=frames, dtype=dit.dtype,
        device=device, share_open=True,
    )  # fmt: skip
    denoise = denoiser(choose_pass(dit, memory)[0], dit.cross_kv(rows))
    parts = []
    if given is not None:
        prefill(denoise, memory, given.to(device), SAMPLER.chunk_frames)
        parts.append(given.cpu())
    chunks = stream(
        denoise, memory, SAMPLER, shape=(batch, *LATENT), total_frames=frames, seed=seed, device=device,
        start_chunk=memory.frame // SAMPLER.chunk_frames,
    )  # fmt: skip
    return torch.cat([*parts, *(chunk.latent.cpu() for chunk in chunks)], dim=2)


@torch.no_grad()
def decode(vae: WanVAE, latents: Tensor, device: str) -> Iterator[Tensor]:
    """Video pieces of a batch of clips [B, 16, F, 32, 32], one after another: uint8 [B, n, 256, 256, 3] on `device`."""
    decoder = vae.stream_decoder()
    for piece in latents.split(LATENTS_AT_ONCE, dim=2):
        piece = piece.to(device)
        if piece.is_cuda:  # as `channels_last` lays out the weights
            piece = piece.contiguous(memory_format=torch.channels_last_3d)
        with mixed_precision(device):
            video = decoder.push(piece)
        yield ((video.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1)


def decode_spans(
    vae: WanVAE, latents: Tensor, spans: list[tuple[int, int]], device: str
) -> list[list[Tensor]]:
    """For each clip of the batch, the video frames [start, stop) of each span: uint8 [n, 256, 256, 3] on the CPU.

    The VAE looks back, but not far: CONTEXT latents before a span are decoded with it, which leaves a difference of
    less than one of 255 levels on average.
    """
    kept: list[list[list[Tensor]]] = [[[] for _ in spans] for _ in latents]
    for begin, end in stretches(spans):
        at = 4 * begin  # a decoder's first latent gives one frame
        for piece in decode(vae, latents[:, :, begin:end], device):
            for number, (start, stop) in enumerate(spans):
                first, last = max(0, start - at), min(piece.shape[1], stop - at)
                for clip, frames in enumerate(piece[:, first:last].cpu() if first < last else ()):
                    kept[clip][number].append(frames)
            at += piece.shape[1]
    return [[torch.cat(parts) for parts in clip] for clip in kept]


def stretches(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The latents [begin, end) to decode, in order of time and apart, for video frames of `spans` and their CONTEXT."""
    needed = sorted((max(0, (start + 3) // 4 - CONTEXT), -(-(stop - 1) // 4) + 1) for start, stop in spans)
    joined = [needed[0]]
    for begin, end in needed[1:]:
        if begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return joined


@torch.no_grad()
def encode(vae: WanVAE, videos: Tensor, device: str) -> Tensor:
    """Latents [B, 16, 1 + n, 32, 32] float32 on the CPU of videos [B, 3, 1 + 4n, 256, 256] in [-1, 1]."""
    with mixed_precision(device):
        return vae.encode(videos.to(device)).float().cpu()
