"""Streaming decode and the Stream Video node."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management
import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import numpy as np
import torch
from checks_common import (
    SIGMAS,
    Lacks,
    apply,
    close,
    core_sampler,
    fails,
    noise,
    our_sampler,
    pack,
    prompt,
    sample,
    stream_session,
    stream_video,
    tiny_model,
    tiny_vae,
)
from checks_live import page, stop_after, timeline


def check_streamed_decode_equals_vae_decode():
    vae, decoder = tiny_vae(), pack("nodes.vae_stream").stream_decoder
    with torch.inference_mode():
        for pieces in ([3, 3, 3], [3, 3, 1], [1, 1, 1, 1], [1, 1, 1], [2, 2], [1], [7], [1, 4, 1, 1]):
            latent = noise(sum(pieces), 2, 4)
            want, stream = vae.decode(latent)[0], decoder(vae, latent.shape[3:])
            parts = [stream.push(part) for part in latent.split(pieces, dim=2)]
            got = torch.cat([*parts, *[part for part in [stream.flush()] if len(part)]])
            close(got, want)
            if pieces[0] == 3:
                assert [len(part) for part in parts] == [9, 12, 12 if pieces[2] == 3 else 0]


def check_other_vaes_are_refused():
    vae = tiny_vae()
    vae.latent_channels = 48
    fails("needs the Wan 2.1 VAE", pack("nodes.vae_stream").stream_decoder, vae, (2, 4))
    stranger = SimpleNamespace(first_stage_model=torch.nn.Identity(), latent_channels=4)
    fails("this one is Identity with 4", pack("nodes.vae_stream").stream_decoder, stranger, (2, 4))


def taehv(dtype=torch.float32):
    """The host's VAE of a file of TAEHV's shape, with random weights."""
    if pack("nodes.host").tiny_vae is None:
        raise Lacks("the class of tiny video VAEs")
    torch.manual_seed(0)
    whole = pack("nodes.host").tiny_vae.TAEHV(16)
    for weight in whole.parameters():  # the host's layers begin with whatever the memory held
        torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    vae = comfy.sd.VAE(sd={name: weight.to(dtype) for name, weight in whole.state_dict().items()})
    if vae.first_stage_model is None:
        raise Lacks("a loader of tiny video VAEs")
    return vae


def check_a_tiny_vae_streams_as_vae_decode():
    """In full and in half precision, which the host gives other scales."""
    for dtype in (torch.float32, torch.float16):
        vae = taehv(dtype)
        latent, decoder = noise(7, 2, 4), pack("nodes.vae_stream").stream_decoder
        with torch.inference_mode():
            size = latent.shape[3:]
            want, stream, again = vae.decode(latent)[0], decoder(vae, size), decoder(vae, size)
            parts = [stream.push(part) for part in latent[:, :, :6].split(3, dim=2)]
            again.restore(stream.snapshot())
            parts.append(again.push(latent[:, :, 6:]))
            close(torch.cat(parts), want)
        assert [len(part) for part in parts] == [9, 12, 4] and len(again.flush()) == 0


@contextmanager
def frames_written():
    """The frames that runs inside append to their videos."""
    module, written = pack("nodes.stream_video"), []

    class Writer(module.Mp4Writer):
        def append(self, frames):
            written.append(frames)
            super().append(frames)

    real, module.Mp4Writer = module.Mp4Writer, Writer
    try:
        yield written
    finally:
        module.Mp4Writer = real


def shows(written, latent, vae) -> None:
    """The frames are what the host's VAE Decode makes of the whole latent at once, but for a rounding."""
    with torch.inference_mode():
        want = (vae.decode(latent)[0].clamp(0, 1) * 255).round().byte()
    frames = torch.from_numpy(np.concatenate(written))
    assert frames.shape == want.shape and (frames.int() - want.int()).abs().max() <= 1


def check_stream_video_writes_what_it_sampled():
    model, vae = apply(tiny_model(), mode="sparse", block_tokens=16), tiny_vae()
    with frames_written() as written:
        images, latent, _ = stream_video(model, vae)
    assert latent.shape == (1, 16, 6, 4, 4) and images.shape == (21, 32, 32, 3)
    shows(written, latent, vae)
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


def carrying(model, latent):
    """The model as ComfyUI's own AR Video I2V hands it on."""
    model = model.clone()
    model.model_options["transformer_options"]["ar_config"] = {"initial_latent": latent}
    return model


def pictures(frames, height=32, width=32):
    return torch.rand(frames, height, width, 3, generator=torch.Generator().manual_seed(4))


def check_stream_video_starts_from_an_image():
    vae = tiny_vae()
    for settings in ({"mode": "dense"}, {"mode": "window"}, {"mode": "sparse", "block_tokens": 16}):
        model, image = apply(tiny_model(), **settings), pictures(1, 40, 72)
        with torch.inference_mode():
            fitted = comfy.utils.common_upscale(image.movedim(-1, 1), 32, 32, "bilinear", "center")
            first = vae.encode(fitted.movedim(1, -1))
        with frames_written() as written:
            images, latent, _ = stream_video(model, vae, image=image)
        assert (latent.shape[2], len(images)) == (7, 25)
        close(latent[:, :, :1], first)
        shows(written, latent, vae)
        assert torch.equal(stream_video(carrying(model, first), vae)[1], latent), "AR Video I2V"
        assert torch.equal(stream_video(model, vae, latent={"samples": first})[1], latent)
        longer = stream_video(model, vae, image=image, seconds=2.5)[1]
        assert torch.equal(longer[:, :, :7], latent)
        assert (stream_video(model, vae)[1][:, :, :6] - latent[:, :, 1:7]).abs().max() > 1e-3
        assert "ar_config" not in model.model_options["transformer_options"]


def check_stream_video_goes_on_from_a_clip():
    model, vae = apply(tiny_model(), mode="sparse", block_tokens=16), tiny_vae()
    clip = pictures(31)  # 1 + 4 * 7 at its end: 8 latent frames, chunks of 2, 3 and 3
    with torch.inference_mode():
        given = vae.encode(clip[2:])
    with frames_written() as written:
        images, latent, _ = stream_video(model, vae, image=clip, seconds=2.0)
    assert (latent.shape[2], len(images)) == (11, 41)
    close(latent[:, :, :8], given)
    shows(written, latent, vae)
    assert max(map(len, written)) == 12, "a clip is decoded in pieces"
    guided, before = {"cfg": 2.0, "negative": prompt(2)}, {}
    with page(lambda run, chunk: before.update({chunk.index: run._before})) as server:
        other = stream_video(model, vae, node="4", image=clip, seconds=2.0, **guided)[1]
    assert not torch.equal(other, latent)
    assert before == {-1: (0, 0), 0: (29, 3)}, "given frames do not count as made"
    chunks = [content for event, content in server.sent if event == "sparse_forcing.chunk"]
    shown = [(c["done"], c["total"], c["first_frame"], c["frame_count"]) for c in chunks]
    assert shown == [(3, 4, 0, 29), (4, 4, 29, 12)]


def check_a_tiny_vae_reads_a_clip_as_wan_s_does():
    """A latent frame stands for the pictures that end with its own: what comes later does not change it."""
    vae, start = taehv(), pack("nodes.start").Start

    def latent(clip):
        model = tiny_model()
        start(model, clip, None, None, 32, 32).put_before(model, vae)
        return model.model_options["transformer_options"]["ar_config"]["initial_latent"]

    clip, other = pictures(9), pictures(9)
    other[5:] = 0
    with torch.inference_mode():
        seen, changed = latent(clip), latent(other)
        assert seen.shape == (1, 16, 3, 4, 4)
        close(changed[:, :, :2], seen[:, :, :2])
        assert (changed[:, :, 2] - seen[:, :, 2]).abs().max() > 1e-3
        close(latent(clip[:1]), seen[:, :, :1])


def check_stream_video_goes_on_with_a_tiny_vae():
    """Two runs with a session between them make the frames of one."""
    vae, model = taehv(), apply(tiny_model())
    whole, *_ = stream_session(model, vae, seconds=1.5)
    _, _, _, session = stream_session(model, vae, seconds=0.75)
    again, *_ = stream_session(model, vae, seconds=1.5, session=session)
    assert np.array_equal(again, whole)
    fails("The session was made with vae", stream_session, model, tiny_vae(), seconds=1.5, session=session)


def check_the_memory_behind_given_frames_is_that_of_the_run_that_made_them():
    vae = tiny_vae()
    for settings in ({"mode": "window", "window_frames": 9}, {"mode": "sparse", "block_tokens": 16}):
        model = apply(tiny_model(), **settings)
        *_, made, _, before = stream_session(model, vae, seconds=2.0)
        with page(stop_after(-1)):
            *_, again, _, after = stream_session(model, vae, node="4", latent={"samples": made}, seconds=3.0)
        assert after.frames == made.shape[2] == 9
        close(again, made)
        for name, tensor in before.memory["positive.0"].items():
            close(after.memory["positive.0"][name].float(), tensor.float())


def check_a_video_from_an_image_goes_on_in_another_session():
    vae, clip = tiny_vae(), pictures(13)
    for settings in ({"mode": "dense"}, {"mode": "sparse", "block_tokens": 16, "positions": "rebased"}):
        model = apply(tiny_model(), **settings)
        for start in ({"image": clip[:1]}, {"image": clip}):
            whole, path = stream_video(model, vae, seconds=2.5, **start)[1:]
            for after in (-1, 0):
                with page(stop_after(after)):
                    *_, session = stream_session(model, vae, node="4", seconds=2.5, **start)
                _, new, new_path = stream_video(model, vae, session=session, seconds=2.5)
                assert torch.equal(new, whole) and Path(new_path).read_bytes() == Path(path).read_bytes()
    fails("2 beginnings, image and session", stream_video, model, vae, session=session, image=clip)
    session.identity["start image frames"] = 99
    fails("description is damaged", stream_video, model, vae, session=session)


def check_prompts_over_time_count_given_frames():
    model, vae = apply(tiny_model(), mode="window", window_frames=6), tiny_vae()
    story, image = (
        timeline("0s: 1 / 1.0s: 2"),
        pictures(21),
    )  # 1.3 s: the second prompt holds from the first chunk on
    options = {"seconds": 2.0, "image": image}
    first, second = (stream_video(model, vae, positive=prompt(n), **options)[1] for n in (1, 2))
    kept, again = (
        stream_video(model, vae, positive=story, on_prompt_change=policy, **options)[1]
        for policy in ("keep", "re-cache")
    )
    distance = [(latent - second).abs().mean() for latent in (again, kept, first)]
    assert 0 < distance[0] < distance[1] < distance[2], distance


def check_starts_that_do_not_fit_are_refused():
    model, vae, image = tiny_model(), tiny_vae(), pictures(17)
    module = pack("nodes.stream_video")
    real, module.VideoStream = module.VideoStream, None  # before any work

    def refused(message, used=model, **changes):
        fails(message, stream_video, used, vae, **changes)

    try:
        refused("17 given frames already last 1.06 seconds at 16 FPS: seconds is", image=image)
        refused("2 beginnings, image and latent", image=image, latent={"samples": noise(1, 4, 4)})
        refused("2 beginnings, image and AR Video I2V", carrying(model, noise(1, 4, 4)), image=image)
        refused("is of 32x16 pixels, the video of 32x32: set width to 32", latent={"samples": noise(1, 2, 4)})
        refused("is of 32x16 pixels, the video of 32x32", carrying(model, noise(1, 2, 4)))
        refused("has shape [2, 16, 1, 4, 4]", latent={"samples": noise(1, 4, 4, batch=2)})
        refused("has shape [1, 4, 8, 8]", latent={"samples": torch.zeros(1, 4, 8, 8)})
        masked = {"samples": noise(1, 4, 4), "noise_mask": torch.ones(1, 1, 32, 32)}
        refused("cannot inpaint", latent=masked)
    finally:
        module.VideoStream = real


def check_a_clip_is_made_anew_from_its_noised_latent():
    """Video to video: the sampler takes a latent and a schedule that begins late, as the host's samplers do."""
    model, clip, x = tiny_model(), noise(6).flip(-1), noise(6)
    late, latest = SIGMAS[2:], torch.tensor([0.02, 0.0])
    whole = sample(apply(model, mode="sparse", block_tokens=16), our_sampler(3), x, latent=clip)
    little = sample(
        apply(model, mode="sparse", block_tokens=16), our_sampler(3), x, sigmas=latest, latent=clip
    )
    assert (little - clip).abs().max() < 0.3 < (whole - clip).abs().mean()
    got = sample(apply(model, mode="dense"), our_sampler(3), x, sigmas=late, latent=clip)
    close(got, sample(model, core_sampler(3), x, sigmas=late, latent=clip))


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
