"""Decode latents as they are made, through the decoder of ComfyUI's own Wan 2.1 VAE, or of a tiny one (TAEHV)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.ldm.wan.vae
import comfy.model_management
import torch
from torch import Tensor, nn

from ..sparse_attn.session import check_decoder
from ..sparse_attn.tiny_vae import SURPLUS, run_as_stream
from .fast_pass import SPARE_BYTES, host_weights
from .host import tiny_vae

LATENT_CHANNELS = 16
WAITING = "waiting"
PARTS = ("conv2", "decoder")  # of a VAE's network, those that decode; a tiny one has no conv2
MARK = "Rep"  # the host's, in its cache: an upsampler that has seen the first frame


def require_wan_vae(vae: Any) -> None:
    """Raise ValueError unless VAE is Wan 2.1's (a smaller one of the same shape will do)."""
    module = getattr(vae, "first_stage_model", None)
    kinds = (comfy.ldm.wan.vae.WanVAE, *([tiny_vae.TAEHV] if tiny_vae else []))
    known = isinstance(module, kinds) and vae.latent_channels == LATENT_CHANNELS
    if not known or getattr(vae, "conv_out_channels", 3) != 3:
        raise ValueError(
            f"Stream Video needs the Wan 2.1 VAE ({LATENT_CHANNELS} latent channels) or a tiny one of its latents, but "
            f"this one is {type(module).__name__} with {getattr(vae, 'latent_channels', '?')}. "
            "Connect Load World Model, or Load VAE with wan_2.1_vae.safetensors or a taew2_1 or lighttaew2_1 file."
        )


def stream_decoder(vae: Any, weights: dict[str, Tensor] | None = None) -> StreamDecoder | TinyStreamDecoder:
    """What decodes a stream with this VAE, or with `own_weights` of it; ValueError as `require_wan_vae`."""
    require_wan_vae(vae)
    decoder = TinyStreamDecoder(vae) if is_tiny(vae) else StreamDecoder(vae)
    decoder.weights = weights
    return decoder


def is_tiny(vae: Any) -> bool:
    """Whether a VAE that `require_wan_vae` lets pass is a tiny one."""
    return not isinstance(vae.first_stage_model, comfy.ldm.wan.vae.WanVAE)


# --- decoding beside other work -------------------------------------------------------------------------------------
# The host fetches weights that it keeps off the device while a network runs, and has ways of that for one thread. So
# one that decodes in a second thread gets weights that are ready, which the host's own may leave meanwhile.


def why_not_beside(vae: Any, network: nn.Module, device: torch.device) -> str | None:
    """Why this VAE cannot decode while `network` runs on `device`, or None."""
    if any(type(p.data) is not Tensor for part in _parts(vae).values() for p in part.parameters()):
        return "the VAE has quantised weights"
    missing = missing_bytes(network, device)
    missing += sum(missing_bytes(part, vae.device) for part in _parts(vae).values())
    if missing and missing + SPARE_BYTES > comfy.model_management.get_free_memory(device):
        return f"{missing / 1e9:.1f} GB of the model and the VAE are not on {device}, and there is no room for them"
    return None


def missing_bytes(network: nn.Module, device: torch.device) -> int:
    """Of the weights that lie elsewhere."""
    return sum(p.numel() * p.element_size() for p in network.parameters() if p.device.type != device.type)


def own_weights(vae: Any) -> dict[str, Tensor]:
    """What decoding reads of the VAE's weights, ready where it computes; shared with the host's where those are so."""
    like = torch.empty(0, device=vae.device, dtype=vae.vae_dtype)
    return {
        f"{part}.{name}": weight
        for part, network in _parts(vae).items()
        for name, weight in host_weights(network, like).items()
    }


def _parts(vae: Any) -> dict[str, nn.Module]:
    network = vae.first_stage_model
    return {part: getattr(network, part) for part in PARTS if hasattr(network, part)}


@contextmanager
def _computing_with(weights: dict[str, Tensor] | None, network: nn.Module) -> Iterator[None]:
    """Inside, `network` has these weights, by their names, in place of its own."""
    if weights is None:
        yield
        return
    modules, own = dict(network.named_modules()), []
    try:
        for name, weight in weights.items():
            module, _, key = name.rpartition(".")
            places: dict[str, Any] = modules[module]._parameters
            own.append((places, key, places[key]))
            places[key] = weight
        yield
    finally:
        for places, key, parameter in own:
            places[key] = parameter


# --- decoders -------------------------------------------------------------------------------------------------------


class TinyStreamDecoder:
    """As `StreamDecoder`, with a tiny VAE: far less work, softer pictures. Nothing waits in it."""

    def __init__(self, vae: Any):
        self.vae = vae
        self.weights: dict[str, Tensor] | None = None  # instead of those that the VAE has
        self._past: dict[str, Tensor] = {}

    def push(self, latent: Tensor) -> Tensor:
        """Raw latents [1, 16, F, h, w] -> frames [n, 8h, 8w, 3] float32 in 0..1 on the CPU."""
        module = self.vae.first_stage_model
        latent = module.process_in(latent.to(device=self.vae.device, dtype=self.vae.vae_dtype))
        skip = 0 if self._past else SURPLUS
        with _computing_with(self.weights, module):
            video = run_as_stream(module.decoder, latent.transpose(1, 2), self._past, tiny_vae.MemBlock)
        return self.vae.process_output(video[0, skip:].float().cpu()).movedim(1, -1)

    def flush(self) -> Tensor:
        """Nothing is left at the end."""
        return torch.empty(0, 0, 0, 3)

    def snapshot(self) -> dict[str, Tensor]:
        """What is remembered between two pushes, by the layers' places."""
        return {name: value.detach().to("cpu", copy=True) for name, value in self._past.items()}

    def check(self, saved: dict[str, Tensor]) -> None:
        """Raise SessionError where a snapshot is not of such a VAE."""
        check_decoder(saved, {str(place) for place in range(len(self.vae.first_stage_model.decoder))})

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Go on where `snapshot`, which `check` let pass, was taken."""
        self._past = {name: value.to(self.vae.device, self.vae.vae_dtype) for name, value in saved.items()}


class StreamDecoder:
    """Push raw latents, get the video frames they complete; in sum equal to the host's VAE Decode.

    The VAE's convolutions remember two past frames. The host's decoder fills that memory only from calls of two latent
    frames or more, the very first call excepted (one latent frame, one video frame); so a single frame waits for its
    successor, and `flush` decodes one that is left at the end, as the host does.
    """

    def __init__(self, vae: Any):
        self.vae = vae
        self.weights: dict[str, Tensor] | None = None  # instead of those that the VAE has
        # One cache slot for every causal convolution; a list longer than needed does no harm.
        self._cache: list[Any] = [None] * sum(1 for _ in vae.first_stage_model.decoder.modules())
        self._waiting: Tensor | None = None
        self._started = False

    def push(self, latent: Tensor) -> Tensor:
        """Raw latents [1, 16, F, h, w] -> frames [n, 8h, 8w, 3] float32 in 0..1 on the CPU; n may be 0."""
        latent = latent.to(device=self.vae.device, dtype=self.vae.vae_dtype)
        frames = []
        if not self._started:
            self._started = True
            frames.append(self._decode(latent[:, :, :1]))
            latent = latent[:, :, 1:]
        if self._waiting is not None:
            latent = torch.cat([self._waiting, latent], dim=2)
        if latent.shape[2] == 1:
            self._waiting = latent
        elif latent.shape[2]:
            self._waiting = None
            frames.append(self._decode(latent))
        return torch.cat(frames) if frames else self._no_frames(latent)

    def flush(self) -> Tensor:
        """Frames of a latent frame still waiting (4 or none)."""
        waiting, self._waiting = self._waiting, None
        return torch.empty(0, 0, 0, 3) if waiting is None else self._decode(waiting)

    def snapshot(self) -> dict[str, Tensor]:
        """What is remembered between two pushes, by the cache's places; the host's marks become a bool."""
        kept = {str(place): value for place, value in enumerate(self._cache) if value is not None}
        if self._waiting is not None:
            kept[WAITING] = self._waiting
        return {
            name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else torch.ones(1) > 0
            for name, value in kept.items()
        }

    def check(self, saved: dict[str, Tensor]) -> None:
        """Raise SessionError where a snapshot is not of such a VAE."""
        check_decoder(saved, {*map(str, range(len(self._cache))), WAITING})

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Go on where `snapshot`, which `check` let pass, was taken."""
        waiting = saved.get(WAITING)
        self._waiting = None if waiting is None else waiting.to(self.vae.device)
        self._started = bool(saved)
        self._cache = [None] * len(self._cache)
        for name in saved.keys() - {WAITING}:
            value = saved[name]
            self._cache[int(name)] = MARK if value.dtype == torch.bool else value.to(self.vae.device)

    def _no_frames(self, latent: Tensor) -> Tensor:
        return torch.empty(0, 8 * latent.shape[3], 8 * latent.shape[4], 3)

    def _decode(self, latent: Tensor) -> Tensor:
        module = self.vae.first_stage_model
        with _computing_with(self.weights, module):
            pieces = module.decoder(module.conv2(latent), feat_cache=self._cache, feat_idx=[0])
        if isinstance(pieces, Tensor):  # as ComfyUI 0.3.64 gives them
            pieces = [pieces]
        video = torch.cat([self.vae.process_output(piece.float().cpu()) for piece in pieces], dim=2)
        return video[0].movedim(0, -1)
