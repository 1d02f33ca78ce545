"""What a video of Stream Video begins with: given frames, as pictures or as a latent, that the new ones follow.

They enter the memory by clean passes, and the decoder by being decoded, so the video begins with them and nothing jumps
where the new frames begin. They are handed on as ComfyUI's own AR Video I2V hands on its picture.
"""

from __future__ import annotations

import logging
from typing import Any

import comfy.ldm.wan.vae
import comfy.utils
import torch
from torch import Tensor

from ..sparse_attn.config import pixel_frames
from ..sparse_attn.given import latent_frames_of, usable_frames
from ..sparse_attn.session import Session, SessionError
from ..sparse_attn.tiny_vae import SURPLUS
from .streaming import given_frames
from .vae_stream import LATENT_CHANNELS

logger = logging.getLogger("sparse_forcing.nodes")


class Start:
    """The one start of a video, if it has any. `frames`: how many latent frames are given, 0 without a start.

    Raises ValueError, before any work, where two starts are connected or one does not fit a width x height video.
    """

    def __init__(
        self,
        model: Any,
        image: Tensor | None,
        latent: dict | None,
        session: Session | None,
        width: int,
        height: int,
    ):
        self.image, self.session, self.size = image, session, (width, height)
        self.latent: Tensor | None = None if latent is None else latent["samples"]
        options = model.model_options["transformer_options"]
        self.carried = given_frames(options)
        starts = {
            "image": image, "latent": latent, "session": session, "AR Video I2V": self.carried or None
        }  # fmt: skip
        names = [name for name, start in starts.items() if start is not None]
        if len(names) > 1 and names != ["session", "AR Video I2V"]:
            raise ValueError(
                f"The video has {len(names)} beginnings, {' and '.join(names)}: it can go on from one. Disconnect the "
                "others; a session already holds the frames that its video began with."
            )
        if latent is not None and latent.get("noise_mask") is not None:
            raise ValueError("Stream Video cannot inpaint: remove the noise mask from the latent.")
        if self.latent is not None or self.carried:
            self._check_latent(options["ar_config"]["initial_latent"] if self.latent is None else self.latent)
        self.frames = self.carried or self._count()

    def check_length(self, frames: int, fps: int) -> None:
        """Raise ValueError unless a video of `frames` video frames goes on behind what is given."""
        given = pixel_frames(self.frames) if self.frames else 0
        if given >= frames and self.session is None:
            raise ValueError(
                f"The {given} given frames already last {given / fps:.2f} seconds at {fps} FPS: seconds is the length "
                "of the whole video, so set it to more."
            )

    def put_before(self, model: Any, vae: Any) -> None:
        """Give the frames to the model's next run, pictures encoded by `vae`. `model` is this run's own clone."""
        if self.frames and not self.carried:
            options = model.model_options["transformer_options"]
            options["ar_config"] = {**options.get("ar_config", {}), "initial_latent": self._encoded(vae)}

    def _count(self) -> int:
        if self.image is not None:
            return latent_frames_of(len(self.image))
        if self.latent is not None:
            return self.latent.shape[2]
        if self.session is None:
            return 0
        given = self.session.identity.get("start image frames")
        if not isinstance(given, int) or not 0 <= given <= self.session.frames:
            raise SessionError("The session's description is damaged: use an earlier session.")
        return given

    def _check_latent(self, latent: Tensor) -> None:
        (width, height), shape = self.size, tuple(latent.shape)
        if len(shape) != 5 or shape[:2] != (1, LATENT_CHANNELS):
            raise ValueError(
                f"The latent to go on from has shape {list(shape)}, and one Wan 2.1 video's is [1, {LATENT_CHANNELS}, "
                "frames, height / 8, width / 8]: connect such a one, or pictures to image."
            )
        if shape[3:] != (height // 8, width // 8):
            raise ValueError(
                f"The latent to go on from is of {8 * shape[4]}x{8 * shape[3]} pixels, the video of {width}x{height}: "
                f"set width to {8 * shape[4]} and height to {8 * shape[3]}, or connect its pictures to image, which "
                "are fitted."
            )

    def _encoded(self, vae: Any) -> Tensor:
        if self.latent is not None:
            return self.latent
        if self.session is not None:  # its memory is restored, so only the number of frames counts
            return self.session.latent[:, :, : self.frames]
        assert self.image is not None
        used = usable_frames(len(self.image))
        if used < len(self.image):
            logger.info(
                "Of %d given frames the last %d are used: the VAE takes 1 + 4k.", len(self.image), used
            )
        pictures = self.image[-used:, :, :, :3].movedim(-1, 1)
        pictures = comfy.utils.common_upscale(pictures, *self.size, "bilinear", "center").movedim(1, -1)
        if not isinstance(vae.first_stage_model, comfy.ldm.wan.vae.WanVAE):
            # a tiny VAE takes four pictures a latent frame, and would pad at the end, where the new frames follow
            pictures = torch.cat([pictures[:1].expand(SURPLUS, -1, -1, -1), pictures])
        return vae.encode(pictures)
