"""Runs inside ComfyUI's Python, in a process of its own: checks of the nodes against the host's own code.

    python host_checks.py COMFYUI PACK_ROOT  ->  one JSON line {check: "ok" or what went wrong}

Every function named `check_*` is one check; `test_host.py` starts this file once and reports them one by one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # the tensors are tiny; threads only wait for each other
COMFYUI, ROOT = Path(sys.argv[1]), Path(sys.argv[2])
sys.path.insert(0, str(COMFYUI))
sys.argv = ["main.py", "--cpu"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.model_management  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import folder_paths  # noqa: E402
import numpy as np  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402

PACK = "sparse-forcing"  # any name, as ComfyUI gives it the folder's
CHUNKS = (1, 3)
SIGMAS = torch.tensor([1.0, 0.9375, 0.8333333, 0.625, 0.0])


def load_pack() -> None:
    spec = importlib.util.spec_from_file_location(
        PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    sys.modules[PACK] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[PACK])


def pack(name: str):
    return importlib.import_module(f"{PACK}.{name}")


# --- tiny models ----------------------------------------------------------------------------------------------------


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


# --- dense mode is the host's autoregressive sampler ----------------------------------------------------------------


def check_dense_equals_core_on_causal_and_plain_models():
    causal, plain = tiny_model(), tiny_model(causal=False)
    for chunk in CHUNKS:
        x = noise(7)  # 3 + 3 + 1: the last chunk is short
        want = sample(causal, core_sampler(chunk), x)
        assert want.abs().max() > 0.1
        for model in (apply(causal, mode="dense"), apply(plain, mode="dense"), causal, plain):
            close(sample(model, our_sampler(chunk), x), want)


def check_dense_equals_core_with_a_lora():
    base = tiny_model()
    model, x = add_lora(base), noise(6)
    want = sample(model, core_sampler(3), x)
    assert (want - sample(base, core_sampler(3), x)).abs().max() > 1e-3
    close(sample(apply(model, mode="dense"), our_sampler(3), x), want)
    close(sample(add_lora(apply(base, mode="dense")), our_sampler(3), x), want)


def check_start_image_equals_core():
    model = tiny_model()
    first = noise(1)[:, :, :1].clone()
    model.model_options["transformer_options"]["ar_config"] = {"initial_latent": first}
    x = noise(7)
    want = sample(model, core_sampler(3), x)
    close(sample(apply(model, mode="dense"), our_sampler(3), x), want)
    got = sample(apply(model, mode="sparse", topk=1.0, window_frames=6, block_tokens=16), our_sampler(3), x)
    close(got[:, :, :4], want[:, :, :4], 1e-4)


def check_idle_patch_is_bitwise_the_model():
    for causal, sampler in ((True, core_sampler(3)), (False, comfy.samplers.ksampler("euler"))):
        model, x = tiny_model(causal), noise(3)
        assert torch.equal(sample(apply(model), sampler, x), sample(model, sampler, x))


def check_model_is_left_as_it_was():
    model, x = tiny_model(causal=False), noise(3)
    euler = comfy.samplers.ksampler("euler")
    want = sample(model, euler, x)
    sample(model, our_sampler(3), x)
    sample(apply(model), our_sampler(3), x)
    assert torch.equal(sample(model, euler, x), want)


def check_global_random_state_is_untouched():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    model = tiny_model()
    torch.set_rng_state(before)
    sample(apply(model), our_sampler(3), noise(3))
    prompt(2)  # what `sample` itself draws last
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    prompt(2)
    assert torch.equal(torch.get_rng_state(), after)


# --- every mode is what the pack does without a host ----------------------------------------------------------------


def rollout_without_host(x: torch.Tensor, chunk: int, cfg: float, **settings) -> torch.Tensor:
    """The same video by the pack's own backbone: one state for the prompt, one for the negative prompt."""
    wan, state, rollout = (pack(f"sparse_attn.{name}") for name in ("wan", "state", "rollout"))
    config = pack("sparse_attn.config")
    model = wan.WanModel.from_state_dict(tiny_state_dict())
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

    schedule = config.SamplerConfig(sigmas=tuple(SIGMAS[:-1].tolist()), chunk_frames=chunk)
    with torch.inference_mode():
        chunks = rollout.stream(denoise, Both(), schedule, noise=x, seed=3)
        latent = torch.cat([chunk.latent for chunk in chunks], dim=2)
    return tiny_model().model.process_latent_out(latent)


MODES = {
    "window": {"mode": "window", "window_frames": 6, "sink_frames": 1},
    "window, rebased": {"mode": "window", "window_frames": 6, "sink_frames": 3, "positions": "rebased"},
    "sparse": {"mode": "sparse", "block_tokens": 16, "persistent_frames": 3},
    "sparse, rebased": {"mode": "sparse", "block_tokens": 16, "persistent_frames": 3, "positions": "rebased"},
}


def check_modes_equal_the_pack_without_a_host():
    model, x = tiny_model(), noise(15)
    dense = sample(model, our_sampler(3), x)
    for name, settings in MODES.items():
        got = sample(apply(model, **settings), our_sampler(3), x)
        close(got, rollout_without_host(x, 3, 1.0, **settings), 1e-4)
        assert (got - dense).abs().max() > 1e-3, f"{name} attended to everything"


def check_cfg_keeps_two_caches():
    model, x = tiny_model(), noise(9, batch=2)
    settings = {"mode": "sparse", "block_tokens": 16, "persistent_frames": 3}
    got = sample(apply(model, **settings), our_sampler(3), x, cfg=3.0)
    close(got, rollout_without_host(x, 3, 3.0, **settings), 1e-4)
    assert (got - sample(apply(model, **settings), our_sampler(3), x)).abs().max() > 1e-3


def check_attention_overrides_of_other_nodes_apply_to_dense():
    model, calls = apply(tiny_model(), mode="window"), []

    def override(function, *args, **kwargs):
        calls.append(args[1].shape[1])
        return function(*args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = override
    sample(model, our_sampler(3), noise(6))
    assert 6 * 4 * 6 in calls, sorted(set(calls))  # 6 frames of 4 x 6 tokens as keys of one call


# --- what the host is told ------------------------------------------------------------------------------------------


def check_memory_asked_for_is_a_chunk_and_the_caches():
    asked = []
    real = comfy.model_management.load_models_gpu

    def spy(models, memory_required=0, minimum_memory_required=None, **kwargs):
        asked.append(minimum_memory_required)
        return real(models, memory_required, minimum_memory_required=minimum_memory_required, **kwargs)

    model = apply(tiny_model(), mode="sparse")
    comfy.model_management.load_models_gpu = spy
    try:
        for cfg in (1.0, 2.0):
            sample(model, our_sampler(3), noise(30), cfg=cfg)
    finally:
        comfy.model_management.load_models_gpu = real
    run = our_sampler(3).open_run(model.model_options["transformer_options"], (1, 16, 30, 8, 12))
    state = run.new_state(model.model.diffusion_model, (8, 12), 1, torch.float32, "cpu")
    chunk = model.model.memory_required([1, 16, 3, 8, 12])
    for sides, bytes_asked in zip((1, 2), asked):
        assert chunk + sides * state.nbytes <= bytes_asked <= 2 * chunk + sides * state.nbytes, (
            asked,
            state.nbytes,
        )


def check_progress_counts_every_pass():
    steps, shapes = [], []

    def report(step, x0, x, total):
        steps.append((step, total))
        shapes.append(x0.shape[2])

    sample(apply(tiny_model()), our_sampler(3), noise(6), report=report)
    assert steps[:-1] == [(i, 9) for i in range(9)], steps  # two chunks of 4 steps, one clean pass
    assert shapes == [3] * 9 + [6]  # the last call hands over the whole video


def check_interrupt_stops_between_passes():
    model, passes = apply(tiny_model()), []

    def report(step, *_):
        passes.append(step)
        if step == 1:
            comfy.model_management.interrupt_current_processing()

    try:
        sample(model, our_sampler(3), noise(6), report=report)
    except comfy.model_management.InterruptProcessingException:
        assert passes == [0, 1]
    else:
        raise AssertionError("the interrupt was ignored")


def check_clones_on_new_weights_use_those_weights():
    model, other = apply(tiny_model(), mode="dense"), tiny_model()
    clone = model.clone(model_override=other.get_clone_model_override())
    for layer, block in enumerate(other.model.diffusion_model.blocks):
        patch = clone.object_patches[f"diffusion_model.blocks.{layer}.self_attn.forward"]
        assert patch.attn is block.self_attn


# --- refusals -------------------------------------------------------------------------------------------------------


def check_refusals_come_before_any_work():
    model, sampler = tiny_model(), our_sampler(3)
    patched = apply(model)
    real = comfy.model_management.load_models_gpu
    comfy.model_management.load_models_gpu = None  # anything that loads would fail otherwise
    try:
        fails("use 6 (21 video frames) or 9 (33 video frames)", sample, patched, sampler, noise(7))
        fails("width 104 is not a multiple of 16", sample, patched, sampler, noise(6, width=13))
        fails("height 72 is not a multiple of 16", sample, patched, sampler, noise(6, height=9))
        fails("window_frames 7", sample, apply(model, window_frames=7), sampler, noise(6))
        fails(
            "sink_frames 6 does not fit",
            sample,
            apply(model, sink_frames=6, persistent_frames=3),
            sampler,
            noise(6),
        )
        fails("topk 0", sample, apply(model, topk=0.0), sampler, noise(6))
    finally:
        comfy.model_management.load_models_gpu = real
    fails("a schedule that ends at 0", sample, patched, sampler, noise(3), sigmas=SIGMAS[:3])


def check_other_models_are_refused():
    stranger = SimpleNamespace(get_model_object=lambda name: torch.nn.Identity())
    fails("needs a Wan 2.1 text-to-video MODEL, but this one is Identity", apply, stranger)
    model = tiny_model(causal=False)
    model.model.diffusion_model.model_type = "i2v"
    fails("of type i2v", apply, model)


def check_conditioning_that_comes_and_goes_is_refused():
    model = apply(tiny_model())
    late = prompt(1)
    late[0][1] = {"start_percent": 0.0, "end_percent": 0.5}
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": prompt(1) + late})
    x = noise(6)
    with torch.inference_mode():
        fails(
            "range of timesteps",
            guider.sample,
            x,
            torch.zeros_like(x),
            our_sampler(3),
            SIGMAS,
            disable_pbar=True,
        )


# --- VAE and Stream Video -------------------------------------------------------------------------------------------


def tiny_vae():
    """A random Wan 2.1 VAE of width 4 as the host's VAE."""
    torch.manual_seed(2)
    return comfy.sd.VAE(sd=pack("sparse_attn.vae").WanVAE(dim=4).state_dict())


def check_streamed_decode_equals_vae_decode():
    vae, decoder = tiny_vae(), pack("nodes.vae_stream").StreamDecoder
    with torch.inference_mode():
        for pieces in ([3, 3, 3], [3, 3, 1], [1, 1, 1, 1], [1, 1, 1], [2, 2], [1], [7], [1, 4, 1, 1]):
            latent = noise(sum(pieces), 2, 4)
            want, stream = vae.decode(latent)[0], decoder(vae)
            parts = [stream.push(part) for part in latent.split(pieces, dim=2)]
            got = torch.cat([*parts, *[part for part in [stream.flush()] if len(part)]])
            close(got, want)
            if pieces[0] == 3:
                assert [len(part) for part in parts] == [9, 12, 12 if pieces[2] == 3 else 0]


def check_other_vaes_are_refused():
    vae = tiny_vae()
    vae.latent_channels = 48
    fails("needs the Wan 2.1 VAE", pack("nodes.vae_stream").StreamDecoder, vae)
    stranger = SimpleNamespace(first_stage_model=torch.nn.Identity(), latent_channels=4)
    fails("this one is Identity with 4", pack("nodes.vae_stream").StreamDecoder, stranger)


def stream_video(model, vae, **changes):
    """Run the Stream Video node as the host would; returns (frames [n, H, W, 3] of its VIDEO, its LATENT, its path)."""
    node = pack("nodes.stream_video").SparseForcingStreamVideo
    inputs = {
        "width": 32, "height": 32, "seconds": 1.0, "seed": 3, "steps": 4, "cfg": 1.0, "chunk_frames": 3,
        "fps": 16, "filename_prefix": "clip",
    } | changes  # fmt: skip
    schema = {i.id for i in node.define_schema().inputs}
    assert {*inputs, "model", "positive", "vae"} <= schema
    node.hidden = SimpleNamespace(unique_id=None)
    with torch.inference_mode():
        output = node.execute(model=model, positive=inputs.pop("positive", prompt(1)), vae=vae, **inputs)
    video, latent = output.args
    return video.get_components().images, latent["samples"], video.get_stream_source()


def check_stream_video_writes_what_it_sampled():
    module, written = pack("nodes.stream_video"), []
    model, vae = apply(tiny_model(), mode="sparse", block_tokens=16), tiny_vae()

    class Writer(module.Mp4Writer):
        def append(self, frames):
            written.append(frames)
            super().append(frames)

    real, module.Mp4Writer = module.Mp4Writer, Writer
    try:
        images, latent, _ = stream_video(model, vae)
    finally:
        module.Mp4Writer = real
    assert latent.shape == (1, 16, 6, 4, 4) and images.shape == (21, 32, 32, 3)
    with torch.inference_mode():
        want = (vae.decode(latent)[0].clamp(0, 1) * 255).round().byte()
    assert (torch.from_numpy(np.concatenate(written)).int() - want.int()).abs().max() <= 1
    longer = stream_video(model, vae, seconds=2.0)[1]
    assert longer.shape[2] == 9 and torch.equal(longer[:, :, :6], latent)
    assert not torch.equal(stream_video(model, vae, seed=4)[1], latent)
    plain = stream_video(tiny_model(), vae, sigmas=SIGMAS)[1]
    assert torch.equal(plain, stream_video(apply(tiny_model()), vae)[1])
    guided = stream_video(model, vae, cfg=2.0, negative=prompt(2))[1]
    assert (guided - latent).abs().max() > 1e-3


def check_stream_video_starts_from_an_image():
    model = tiny_model()
    model.model_options["transformer_options"]["ar_config"] = {"initial_latent": noise(1, 4, 4)}
    images, latent, _ = stream_video(model, tiny_vae())
    assert latent.shape[2] == 7 and len(images) == 25
    close(latent[:, :, :1], noise(1, 4, 4))


def check_stream_video_keeps_finished_chunks():
    module, model, vae = pack("nodes.stream_video"), apply(tiny_model()), tiny_vae()
    real = module.VideoStream._on_chunk

    def stop_at_second(self, chunk):
        real(self, chunk)
        if chunk.index == 1:
            comfy.model_management.interrupt_current_processing()

    module.VideoStream._on_chunk = stop_at_second
    try:
        stream_video(model, vae, seconds=3.0, filename_prefix="stopped")
    except comfy.model_management.InterruptProcessingException:
        pass
    else:
        raise AssertionError("the interrupt was ignored")
    finally:
        module.VideoStream._on_chunk = real
    path = sorted(Path(folder_paths.get_output_directory()).glob("stopped_*.mp4"))[-1]
    video = module.InputImpl.VideoFromFile(str(path))
    assert video.get_components().images.shape == (21, 32, 32, 3)


def check_stream_video_refusals():
    model, vae = tiny_model(), tiny_vae()
    fails("width 100 is not a multiple of 16", stream_video, model, vae, width=100)
    fails("A CFG of 2 needs a negative prompt", stream_video, model, vae, cfg=2.0)
    fails("needs the Wan 2.1 VAE", stream_video, model, SimpleNamespace())


def check_long_latents_lie_on_disk():
    module = pack("nodes.stream_video")
    limit, module.IN_MEMORY_BYTES = module.IN_MEMORY_BYTES, 0
    try:
        with torch.inference_mode():
            latent = stream_video(tiny_model(), tiny_vae())[1]
        assert latent.abs().max() > 0
        (file,) = Path(folder_paths.get_temp_directory()).glob("sparse_forcing_latent_*.bin")
        assert file.stat().st_size == latent.numel() * 4
    finally:
        module.IN_MEMORY_BYTES = limit


# --- loaders --------------------------------------------------------------------------------------------------------


def check_model_loader_reads_what_people_have():
    module = pack("nodes.loaders")
    sd, ema = tiny_state_dict(0), tiny_state_dict(1)
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.add_model_folder_path("diffusion_models", folder)
        training = {"generator": {f"model.{k}": v for k, v in sd.items()},
                    "generator_ema": {f"model._fsdp_wrapped_module.{k}": v for k, v in ema.items()}}  # fmt: skip
        torch.save(training, f"{folder}/tiny.pt")
        for weights, want in (("ema", ema), ("raw", sd)):
            model = load(module, "tiny.pt", weights)
            network = model.model.diffusion_model
            assert type(network).__name__ == "CausalWanModel" and model.model.model_sampling.shift == 5.0
            assert torch.equal(network.blocks[1].ffn[0].weight, want["blocks.1.ffn.0.weight"])
        again = model.cached_patcher_init[0](*model.cached_patcher_init[1], disable_dynamic=True)
        assert type(again.model.diffusion_model).__name__ == "CausalWanModel"

        safetensors.torch.save_file(sd, f"{folder}/short.safetensors")
        data = Path(folder, "short.safetensors").read_bytes()
        Path(folder, "short.safetensors").write_bytes(data[: len(data) // 2])
        fails("is cut short", load, module, "short.safetensors")
        Path(folder, "cut.pt").write_bytes(Path(folder, "tiny.pt").read_bytes()[:5000])
        fails("is cut short", load, module, "cut.pt")
        torch.save({"model": Hostile(Path(folder, "ran"))}, f"{folder}/hostile.pt")
        fails("is refused", load, module, "hostile.pt")
        assert not Path(folder, "ran").exists()
        sd["blocks.0.stranger"] = sd.pop("blocks.1.modulation")
        safetensors.torch.save_file(sd, f"{folder}/wrong.safetensors")
        fails(
            "1 missing: blocks.1.modulation. 1 unexpected: blocks.0.stranger",
            load,
            module,
            "wrong.safetensors",
        )


def load(module, name: str, weights: str = "ema"):
    assert module.SparseForcingModelLoader.fingerprint_inputs(model_name=name, weights=weights) > 0
    return module.SparseForcingModelLoader.execute(name, weights, "default").args[0]


class Hostile:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def check_world_model_works_with_core_nodes():
    model, clip, vae = pack("nodes.loaders").SparseForcingWorldModel.execute().args
    with torch.inference_mode():
        words = clip.encode_from_tokens_scheduled(clip.tokenize("a large red circle"))
        rows = words[0][0]
        assert rows.shape == (1, 512, 4096) and rows[0, 3].abs().max() > 0 and rows[0, 4:].abs().max() == 0
        want = pack("sparse_attn.world.model").load_world_model().text.encode(["a large red circle"])
        close(rows, want)
        assert clip.encode_from_tokens_scheduled(clip.tokenize(""))[0][0].shape == (1, 512, 4096)
        mine = pack("sparse_attn.world.model").load_world_model().vae
        x = noise(3, 2, 4)
        raw = model.model.process_latent_out(x)
        close(vae.decode(raw)[0], ((mine.decode(x)[0].movedim(0, -1) + 1) / 2).clamp(0, 1), 1e-3)
    assert model.model.model_sampling.shift == 5.0
    assert stream_video(apply(model), vae, positive=words)[0].shape[0] == 21


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.set_output_directory(folder)
        folder_paths.set_temp_directory(folder)
        run_checks()


def run_checks() -> None:
    load_pack()
    results = {}
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            began = time.perf_counter()
            try:
                check()
                results[name] = "ok"
            except Exception:
                results[name] = traceback.format_exc()
            sys.stderr.write(f"{time.perf_counter() - began:6.1f} s  {name}\n")
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
