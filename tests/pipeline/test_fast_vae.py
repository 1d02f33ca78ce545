"""The fast decoder of the Wan VAE: the numbers of the VAE's own, in pieces of any size."""

import pytest
import torch
from sparse_forcing_pack.sparse_attn.fast_vae import (
    FastDecoder,
    decoder_weights,
)
from sparse_forcing_pack.sparse_attn.vae import WanVAE

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    torch.manual_seed(0)
    vae = WanVAE(dim=8).eval().requires_grad_(False)
    for name, weight in vae.named_parameters():
        if name.endswith("gamma"):
            weight.copy_(torch.randn_like(weight) * 0.2 + 1)
    return vae.double()


def latents(frames: int, height: int = 4, width: int = 6, seed: int = 1) -> torch.Tensor:
    return torch.randn(1, 16, frames, height, width, generator=torch.Generator().manual_seed(seed)).double()


def whole(vae: WanVAE, raw: torch.Tensor) -> torch.Tensor:
    return vae.decoder(vae.conv2(raw))


def fast(vae: WanVAE, dtype=torch.float64, **options) -> FastDecoder:
    return FastDecoder(decoder_weights(vae), CPU, dtype, **options)


@pytest.mark.parametrize("upsampler", ["merged", "nearest"])
@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_push_equals_offline(vae, chunk, at_once, upsampler):
    raw, decoder = latents(6), fast(vae, at_once=at_once, upsampler=upsampler)
    pieces = [decoder.push(piece) for piece in raw.split(chunk, dim=2)]
    assert pieces[0].shape[2] == 1 + 4 * (chunk - 1)
    assert torch.allclose(
        torch.cat(pieces, dim=2), whole(vae, raw), rtol=0, atol=2e-6
    )  # its norms are float32
