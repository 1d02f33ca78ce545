"""Questions asked before any work starts; each failure names the value that is wrong and what would be right."""

from __future__ import annotations

from typing import Any

import comfy.ldm.wan.model

from ..sparse_attn.config import check_size


def latent_frames_for(frames: int, chunk_frames: int, given: int = 0) -> int:
    """Latent frames of the shortest video that has at least `frames` video frames: `given` ones and whole chunks."""
    latent = -(-(frames + 3) // 4)
    chunks = max(1, -(-(latent - given) // chunk_frames))
    return given + chunks * chunk_frames


def require_wan(model: Any) -> Any:
    """Return the diffusion model of a MODEL that is Wan text-to-video; raise ValueError for any other.

    Wan's image-to-video, VACE, camera and audio variants feed whole-clip conditions into the network, which a
    chunk at a time cannot be given, so they are refused too.
    """
    network = model.get_model_object("diffusion_model")
    base = comfy.ldm.wan.model.WanModel
    if not isinstance(network, base):
        raise ValueError(
            f"Sparse Forcing needs a Wan 2.1 text-to-video MODEL, but this one is {type(network).__name__}. "
            "Connect Load Sparse Forcing Model, Load World Model, or Load Diffusion Model with a Wan T2V file."
        )
    channels = network.patch_embedding.weight.shape[1]
    stock = type(network).forward_orig is base.forward_orig
    if not stock or network.model_type != "t2v" or channels != network.out_dim:
        raise ValueError(
            f"Sparse Forcing needs a Wan 2.1 text-to-video MODEL, but this one is a {type(network).__name__} of type "
            f"{network.model_type} with {channels} input channels. Use a T2V checkpoint (16 channels)."
        )
    return network


def check_latent(shape: tuple[int, ...]) -> None:
    """Refuse a latent that is not a video's, [B, C, F, H, W], or not of whole tokens."""
    if len(shape) != 5:
        raise ValueError(
            f"Sparse Forcing needs a video latent of five dimensions, but got shape {list(shape)}. "
            "Use Empty AR Video Latent or Empty HunyuanVideo 1.0 Latent."
        )
    check_size(8 * shape[4], 8 * shape[3])
