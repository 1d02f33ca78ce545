"""Streaming decode and the Stream Video node."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import comfy.model_management
import folder_paths
import numpy as np
import torch
from checks_common import SIGMAS, apply, close, fails, noise, pack, prompt, stream_video, tiny_model, tiny_vae


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


def check_the_opening_chunk_takes_its_own_steps():
    config, module, vae = pack("sparse_attn.config"), pack("nodes.session"), tiny_vae()
    model = apply(tiny_model())
    usual = stream_video(model, vae)[1]
    three = stream_video(model, vae, first_steps=3)[1]
    assert not torch.equal(three[:, :, :3], usual[:, :, :3])
    alone = stream_video(model, vae, sigmas=torch.tensor([*config.shifted_sigmas(3), 0.0]))[1]
    assert torch.equal(three[:, :, :3], alone[:, :, :3]) and not torch.equal(three, alone)
    asking = model.clone()
    asking.model_options["transformer_options"][module.FIRST_STEPS] = 3
    assert torch.equal(stream_video(asking, vae)[1], three), "the loaded model's own wish"
    assert torch.equal(stream_video(asking, vae, first_steps=4)[1], usual), "the node's setting comes first"


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
    module = pack("nodes.video_stream")
    limit, module.IN_MEMORY_BYTES = module.IN_MEMORY_BYTES, 0
    try:
        with torch.inference_mode():
            latent = stream_video(tiny_model(), tiny_vae())[1]
        assert latent.abs().max() > 0
        (file,) = Path(folder_paths.get_temp_directory()).glob("sparse_forcing_latent_*.bin")
        assert file.stat().st_size == latent.numel() * 4
    finally:
        module.IN_MEMORY_BYTES = limit
