"""What the checks share: tiny random models in the host's own objects, and ways to run and compare them."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import comfy.samplers
import comfy.sd
import torch
from run_checks import PACK

SIGMAS = torch.tensor([1.0, 0.9375, 0.8333333, 0.625, 0.0])


def pack(name: str):
    """A module of the pack, which `run_checks.py` has loaded as ComfyUI would."""
    return importlib.import_module(f"{PACK}.{name}")


def tiny_state_dict(seed: int = 0) -> dict[str, torch.Tensor]:
    """A random Wan of 2 layers and 2 heads whose output is not zero."""
    torch.manual_seed(seed)
    model = pack("sparse_attn.wan").WanModel(dim=256, ffn_dim=256, num_heads=2, num_layers=2)
    return {k: v + 0.02 * torch.randn_like(v) for k, v in model.state_dict().items()}


def tiny_model(causal: bool = True):
    metadata = pack("sparse_attn.checkpoint").CAUSAL_AR if causal else None
    model = comfy.sd.load_diffusion_model_state_dict(tiny_state_dict(), metadata=metadata)
    network = model.model.diffusion_model
    assert type(network).__name__ == ("CausalWanModel" if causal else "WanModel")
    return model


def add_lora(model):
    """The model with a random low-rank change of two attention weights."""
    torch.manual_seed(5)
    changes = {}
    for part in ("q", "v"):
        changes[f"diffusion_model.blocks.1.self_attn.{part}.weight"] = (
            "diff",
            (0.1 * torch.randn(256, 4) @ torch.randn(4, 256),),
        )
    patched = model.clone()
    assert len(patched.add_patches(changes, 0.7)) == 2
    return patched


def prompt(seed: int):
    torch.manual_seed(seed)
    rows = torch.zeros(1, 512, 4096)
    rows[:, :7] = torch.randn(1, 7, 4096)
    return [[rows, {}]]


def noise(frames: int, height: int = 8, width: int = 12, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 16, frames, height, width, generator=torch.Generator().manual_seed(9))


def sample(model, sampler, x, cfg: float = 1.0, seed: int = 3, sigmas=SIGMAS, report=None, latent=None):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(prompt(1), prompt(2))
    guider.set_cfg(cfg)
    with torch.inference_mode():
        latent = torch.zeros_like(x) if latent is None else latent
        return guider.sample(x, latent, sampler, sigmas, callback=report, disable_pbar=True, seed=seed)


def core_sampler(chunk: int):
    return comfy.samplers.ksampler("ar_video", {"num_frame_per_block": chunk})


def our_sampler(chunk: int):
    return pack("nodes.streaming").StreamSampler(chunk)


def apply(model, **settings):
    config = pack("sparse_attn.config").AttentionConfig(**settings)
    return pack("nodes.hooks").patch_model(model, config)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape, f"{a.shape} against {b.shape}"
    difference = (a - b).abs().max().item()
    assert difference <= tolerance * max(1.0, b.abs().max().item()), f"differs by {difference}"


def fails(message: str, function, *args, **kwargs) -> None:
    said = None
    try:
        function(*args, **kwargs)
    except Exception as error:
        said = str(error)
    assert said is not None, f"nothing was raised; expected {message!r}"
    assert message in said, f"{message!r} is not in {said}"


def tiny_vae():
    """A random Wan 2.1 VAE of width 4 as the host's VAE."""
    torch.manual_seed(2)
    return comfy.sd.VAE(sd=pack("sparse_attn.vae").WanVAE(dim=4).state_dict())


def stream_video(model, vae, node=None, **changes):
    """Run the Stream Video node as the host would, under the id `node`; returns (frames [n, H, W, 3] of its VIDEO, its
    LATENT, its path)."""
    return stream_session(model, vae, node, **changes)[:3]


def stream_session(model, vae, node=None, **changes):
    """The same, with its SESSION."""
    stream = pack("nodes.stream_video").SparseForcingStreamVideo
    inputs = {
        "width": 32, "height": 32, "seconds": 1.0, "seed": 3, "steps": 4, "cfg": 1.0, "chunk_frames": 3,
        "fps": 16, "filename_prefix": "clip",
    } | changes  # fmt: skip
    schema = {i.id for i in stream.define_schema().inputs}
    assert {*inputs, "model", "positive", "vae"} <= schema
    stream.hidden = SimpleNamespace(unique_id=node)
    with torch.inference_mode():
        output = stream.execute(model=model, positive=inputs.pop("positive", prompt(1)), vae=vae, **inputs)
    video, latent, session = output.args
    return video.get_components().images, latent["samples"], video.get_stream_source(), session
