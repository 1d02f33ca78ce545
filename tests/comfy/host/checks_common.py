"""What the checks share: tiny random models in the host's own objects, and ways to run and compare them."""

from __future__ import annotations

import importlib
import logging
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import comfy.k_diffusion.sampling
import comfy.samplers
import comfy.sd
import torch
from run_checks import PACK

SIGMAS = torch.tensor([1.0, 0.9375, 0.8333333, 0.625, 0.0])


MODES = {
    "window": {"mode": "window", "window_frames": 6, "sink_frames": 1},
    "window, rebased": {"mode": "window", "window_frames": 6, "sink_frames": 3, "positions": "rebased"},
    "window, moving sink": {"mode": "window", "window_frames": 6, "sink_frames": 3, "sink_ema": 0.5},
    "sparse": {"mode": "sparse", "block_tokens": 16, "persistent_frames": 3},
    "sparse, rebased": {"mode": "sparse", "block_tokens": 16, "persistent_frames": 3, "positions": "rebased"},
    "sparse, novelty": {"mode": "sparse", "block_tokens": 16, "keep": "novelty"},
}


class Lacks(Exception):
    """Raised by a check that asks for what this host does not have, or what is not on this machine."""


def pack(name: str):
    """A module of the pack, which `run_checks.py` has loaded as ComfyUI would."""
    return importlib.import_module(f"{PACK}.{name}")


def tiny_state_dict(seed: int = 0) -> dict[str, torch.Tensor]:
    """A random Wan of 2 layers and 2 heads whose output is not zero."""
    torch.manual_seed(seed)
    model = pack("sparse_attn.wan").WanModel(dim=256, ffn_dim=256, num_heads=2, num_layers=2)
    return {k: v + 0.02 * torch.randn_like(v) for k, v in model.state_dict().items()}


def tiny_model(causal: bool = True):
    """The host's MODEL of a random Wan: its autoregressive class where it has one, or plain."""
    if not causal:
        model = comfy.sd.load_diffusion_model_state_dict(tiny_state_dict())
        assert type(model.model.diffusion_model).__name__ == "WanModel"
        return model
    checkpoint = pack("sparse_attn.checkpoint").Checkpoint(Path("tiny"), tiny_state_dict())
    return pack("nodes.loaders").host_model(checkpoint, {})


def causal_class() -> str:
    """The class of the networks that our loader makes in this host."""
    return "CausalWanModel" if has_ar_sampler() else "WanModel"


def has_ar_sampler() -> bool:
    return hasattr(comfy.k_diffusion.sampling, "sample_ar_video")


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


ROWS = 64  # of a prompt; Wan's have 512, which would be most of a tiny model's time


def prompt(seed: int):
    torch.manual_seed(seed)
    rows = torch.zeros(1, ROWS, 4096)
    rows[:, :7] = torch.randn(1, 7, 4096)
    return [[rows, {}]]


def noise(frames: int, height: int = 8, width: int = 12, batch: int = 1, seed: int = 9) -> torch.Tensor:
    return torch.randn(batch, 16, frames, height, width, generator=torch.Generator().manual_seed(seed))


def sample(model, sampler, x, cfg: float = 1.0, seed: int = 3, sigmas=SIGMAS, report=None, latent=None):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(prompt(1), prompt(2))
    guider.set_cfg(cfg)
    with torch.inference_mode():
        latent = torch.zeros_like(x) if latent is None else latent
        return guider.sample(x, latent, sampler, sigmas, callback=report, disable_pbar=True, seed=seed)


def core_sampler(chunk: int):
    """The host's own autoregressive sampler."""
    if not has_ar_sampler():
        raise Lacks("ComfyUI's own autoregressive sampler, which came with 0.21")
    return comfy.samplers.ksampler("ar_video", {"num_frame_per_block": chunk})


def our_sampler(chunk: int):
    return pack("nodes.streaming").StreamSampler(chunk)


def apply(model, **settings):
    config = pack("sparse_attn.config").AttentionConfig(**settings)
    return pack("nodes.hooks").patch_model(model, config)


def rollout_without_host(
    x: torch.Tensor, chunk: int, cfg: float, sd=None, sigmas=SIGMAS, **settings
) -> torch.Tensor:
    """The same video by the pack's own backbone: one state for the prompt, one for the negative prompt.

    sd: the weights, instead of `tiny_state_dict`'s.
    """
    wan, state, rollout = (pack(f"sparse_attn.{name}") for name in ("wan", "state", "rollout"))
    config = pack("sparse_attn.config")
    model = wan.WanModel.from_state_dict(tiny_state_dict() if sd is None else sd)
    batch, _, frames, height, width = x.shape
    sides = []
    for seed in (1, 2) if cfg != 1 else (1,):
        memory = state.StreamState(
            layers=2,
            heads=2,
            head_dim=128,
            grid=(height // 2, width // 2),
            chunk_frames=chunk,
            attention=config.AttentionConfig(**settings),
            batch=batch,
            total_frames=frames,
        )
        sides.append((memory, model.cross_kv(prompt(seed)[0][0].expand(batch, -1, -1))))

    class Both:
        frame = property(lambda self: sides[0][0].frame)

        def begin_chunk(self, n):
            [memory.begin_chunk(n) for memory, _ in sides]

        def end_chunk(self):
            [memory.end_chunk() for memory, _ in sides]

    def denoise(latent, sigma):
        t = wan.frame_timesteps(sigma, batch, latent.shape[2], "cpu")
        x0 = [latent - sigma * model(latent, t, kv, memory.attend, memory.t_start) for memory, kv in sides]
        return x0[0] if cfg == 1 else x0[1] + cfg * (x0[0] - x0[1])

    schedule = config.SamplerConfig(sigmas=tuple(sigmas[:-1].tolist()), chunk_frames=chunk)
    with torch.inference_mode():
        chunks = rollout.stream(denoise, Both(), schedule, noise=x, seed=3)
        latent = torch.cat([chunk.latent for chunk in chunks], dim=2)
    return tiny_model().model.process_latent_out(latent)


@contextmanager
def log_said(level: int = logging.WARNING):
    """What the pack's nodes log meanwhile at `level` or above, as a list of texts."""
    texts, handler = [], logging.Handler(level)
    handler.emit = lambda record: texts.append(record.getMessage())
    logger = logging.getLogger("sparse_forcing.nodes")
    before = logger.level
    logger.setLevel(min(level, logger.getEffectiveLevel()))
    logger.addHandler(handler)
    try:
        yield texts
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


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
    return pack("nodes.host").wan_vae(pack("sparse_attn.vae").WanVAE(dim=4).state_dict())


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
