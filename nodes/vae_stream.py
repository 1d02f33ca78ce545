"""Decode latents as they are made, through the decoder of ComfyUI's own Wan 2.1 VAE, or of a tiny one (TAEHV)."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import comfy.ldm.wan.vae
import torch
from torch import Tensor

from ..sparse_attn.fast_vae import FastDecoder
from ..sparse_attn.session import check_decoder
from ..sparse_attn.tiny_vae import SURPLUS, run_as_stream
from .fast_vae import fast_decoder
from .host import tiny_vae

logger = logging.getLogger("sparse_forcing.nodes")

LATENT_CHANNELS = 16
WAITING = "waiting"
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


def stream_decoder(vae: Any, size: tuple[int, int]) -> StreamDecoder | TinyStreamDecoder:
    """What decodes a stream of `size` (height, width) latents with this VAE; ValueError as `require_wan_vae`."""
    require_wan_vae(vae)
    return TinyStreamDecoder(vae) if is_tiny(vae) else StreamDecoder(vae, size)


def is_tiny(vae: Any) -> bool:
    """Whether a VAE that `require_wan_vae` lets pass is a tiny one."""
    return not isinstance(vae.first_stage_model, comfy.ldm.wan.vae.WanVAE)


class TinyStreamDecoder:
    """As `StreamDecoder`, with a tiny VAE: far less work, softer pictures. No frame waits in it."""

    def __init__(self, vae: Any):
        self.vae = vae
        self._past: dict[str, Tensor] = {}
        self._scale_in: Callable[[Tensor], Tensor] | None = None

    def push(self, latent: Tensor) -> Tensor:
        """Raw latents [1, 16, F, h, w] -> frames [n, 8h, 8w, 3] float32 in 0..1 on the VAE's device."""
        module = self.vae.first_stage_model
        if self._scale_in is None:
            self._scale_in = constants_on(self.vae.device, module.process_in)
        latent = self._scale_in(latent.to(device=self.vae.device, dtype=self.vae.vae_dtype))
        skip = 0 if self._past else SURPLUS
        video = run_as_stream(module.decoder, latent.transpose(1, 2), self._past, tiny_vae.MemBlock)
        return self.vae.process_output(video[0, skip:].float()).movedim(1, -1)

    def flush(self) -> Tensor:
        """Nothing is left at the end."""
        return torch.empty(0, 0, 0, 3)

    def mark(self) -> Any:
        """What is remembered now, for `back_to`."""
        return dict(self._past)

    def back_to(self, mark: Any) -> None:
        """Forget what was pushed since `mark`."""
        self._past = mark

    def snapshot(self) -> dict[str, Tensor]:
        """What is remembered between two pushes, by the layers' places."""
        return {name: value.detach().to("cpu", copy=True) for name, value in self._past.items()}

    def check(self, saved: dict[str, Tensor]) -> None:
        """Raise SessionError where a snapshot is not of such a VAE."""
        check_decoder(saved, {str(place) for place in range(len(self.vae.first_stage_model.decoder))})

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Go on where `snapshot`, which `check` let pass, was taken."""
        self._past = {name: value.to(self.vae.device, self.vae.vae_dtype) for name, value in saved.items()}


def constants_on(device: torch.device, scale: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A latent format's `process_in` or `process_out` that finds its constants on `device`.

    ComfyUI's copies them from the CPU in every call, which waits for all that the device still has to do.
    """
    owner = getattr(scale, "__self__", None)
    if owner is None:
        return scale
    placed = copy.copy(owner)
    for name, value in vars(owner).items():
        if isinstance(value, Tensor):
            setattr(placed, name, value.to(device))
    return getattr(placed, scale.__name__)


class StreamDecoder:
    """Push raw latents, get the video frames they complete; in sum equal to the host's VAE Decode.

    Where VAE and device allow it, the pack's own decoder computes them (`fast_vae`). Else the host's modules do: their
    convolutions remember two past frames, and fill that memory only from calls of two latent frames or more, the
    very first call excepted (one latent frame, one video frame); so a single frame waits for its successor, and `flush`
    decodes one that is left at the end, as the host does.
    """

    def __init__(self, vae: Any, size: tuple[int, int]):
        self.vae, self.size = vae, size
        # One cache slot for every causal convolution; a list longer than needed does no harm.
        self._cache: list[Any] = [None] * sum(1 for _ in vae.first_stage_model.decoder.modules())
        self._waiting: Tensor | None = None
        self._started = False
        self._fast: FastDecoder | None = None
        self._fast_video: Tensor | None = None  # what the pack's decoder gave since `mark`
        self._again = False  # whether it is asked for that again

    def push(self, latent: Tensor) -> Tensor:
        """Raw latents [1, 16, F, h, w] -> frames [n, 8h, 8w, 3] float32 in 0..1 on the VAE's device; n may be 0."""
        latent = latent.to(device=self.vae.device, dtype=self.vae.vae_dtype)
        if not self._started:
            self._started = True
            first = self._push_first(latent)
            if first is not None:
                return first
            parts = [self._decode(latent[:, :, :1])]
            latent = latent[:, :, 1:]
        elif self._fast is not None:
            return self._shown(self._push_fast(self._fast, latent))
        else:
            parts = []
        if self._waiting is not None:
            latent = torch.cat([self._waiting, latent], dim=2)
        if latent.shape[2] == 1:
            self._waiting = latent
        elif latent.shape[2]:
            self._waiting = None
            parts.append(self._decode(latent))
        return torch.cat(parts) if parts else self._no_frames(latent)

    def flush(self) -> Tensor:
        """Frames of a latent frame still waiting (4 or none)."""
        waiting, self._waiting = self._waiting, None
        return torch.empty(0, 0, 0, 3) if waiting is None else self._decode(waiting)

    def mark(self) -> Any:
        """What is remembered now, for `back_to`."""
        self._fast_video = None
        return self._started, self._waiting, list(self._cache), self._fast

    def back_to(self, mark: Any) -> None:
        """Forget what was pushed since `mark`: nothing, or one piece, which must be pushed again next.

        The pack's own decoder overwrites what it remembers, so frames that it has given are not computed again.
        """
        self._started, self._waiting, self._cache, self._fast = mark
        self._again = self._fast is not None and self._fast_video is not None

    def snapshot(self) -> dict[str, Tensor]:
        """What is remembered between two pushes, by the cache's places; the host's marks become a bool."""
        if self._fast is not None:
            return self._fast.snapshot()
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
        self._started = bool(saved)
        self._fast = fast_decoder(self.vae, *self.size) if saved else None
        if self._fast is not None:
            self._fast.restore(saved)
            return
        waiting = saved.get(WAITING)
        self._waiting = None if waiting is None else waiting.to(self.vae.device)
        self._cache = [None] * len(self._cache)
        for name in saved.keys() - {WAITING}:
            value = saved[name]
            self._cache[int(name)] = MARK if value.dtype == torch.bool else value.to(self.vae.device)

    def _push_first(self, latent: Tensor) -> Tensor | None:
        """A stream's first frames by the pack's own decoder; None where the host's modules have to make them."""
        self._fast = fast_decoder(self.vae, *self.size)
        if self._fast is None:
            return None
        try:
            return self._shown(self._fast.push(latent))
        except Exception as error:  # whatever a kernel or a library raises
            self._fast = None
            logger.warning("The VAE decodes with ComfyUI's own layers: %s: %s", type(error).__name__, error)
            return None

    def _push_fast(self, fast: FastDecoder, latent: Tensor) -> Tensor:
        video = self._fast_video if self._again else None
        self._again = False
        self._fast_video = fast.push(latent) if video is None else video
        return self._fast_video

    def _no_frames(self, latent: Tensor) -> Tensor:
        shape = 0, 8 * latent.shape[3], 8 * latent.shape[4], 3
        return torch.empty(shape, device=latent.device)

    def _decode(self, latent: Tensor) -> Tensor:
        module = self.vae.first_stage_model
        pieces = module.decoder(module.conv2(latent), feat_cache=self._cache, feat_idx=[0])
        if isinstance(pieces, Tensor):  # as ComfyUI 0.3.64 gives them
            pieces = [pieces]
        return torch.cat([self._shown(piece) for piece in pieces])

    def _shown(self, video: Tensor) -> Tensor:
        """[1, 3, n, H, W] of about -1 to 1 -> [n, H, W, 3] in 0..1."""
        video = video.to(torch.float32, copy=True)  # process_output may work in place
        return self.vae.process_output(video)[0].movedim(0, -1)
