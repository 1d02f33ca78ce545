"""The pack's decoder of Wan's VAE against ComfyUI's."""

from __future__ import annotations

from unittest.mock import patch

import torch
from checks_common import close, noise, pack, tiny_vae


def check_fast_vae_decodes_what_the_host_does():
    vae = tiny_vae()
    latent = noise(7, 2, 4)
    with torch.inference_mode():
        want = vae.first_stage_model.decode(latent)
        decoder = pack("nodes.fast_vae").take_over(vae)
        for pieces in ([3, 3, 1], [1] * 7, [2, 5]):
            got = torch.cat([decoder.push(part) for part in latent.split(pieces, dim=2)], dim=2)
            close(got, want)
            decoder.reset()


def check_fast_vae_and_host_continue_each_other():
    """Snapshots of one are taken by the other."""
    vae, streams = tiny_vae(), pack("nodes.vae_stream")
    latent = noise(7, 2, 4)
    with torch.inference_mode():
        want = vae.process_output(vae.first_stage_model.decode(latent))[0].movedim(0, -1)
        for pieces in (3, 1):
            stream, decoder = (
                streams.StreamDecoder(vae, latent.shape[3:]),
                pack("nodes.fast_vae").take_over(vae),
            )
            stream.push(latent[:, :, :pieces])
            decoder.restore(stream.snapshot())
            frames = vae.process_output(decoder.push(latent[:, :, pieces:]))[0].movedim(0, -1)
            close(frames, want[4 * pieces - 3 :])
            other = streams.StreamDecoder(vae, latent.shape[3:])
            decoder.reset()
            decoder.push(latent[:, :, :pieces])
            saved = decoder.snapshot()
            other.check(saved)
            other.restore(saved)
            close(other.push(latent[:, :, pieces:]), want[4 * pieces - 3 :])


def check_fast_vae_gives_a_piece_again():
    """Its memory is overwritten, so a push that is called back gives the frames that were made."""
    vae, latent = tiny_vae(), noise(9, 2, 4)
    with torch.inference_mode():
        fast, stream = (
            pack("nodes.fast_vae").take_over(vae),
            pack("nodes.vae_stream").StreamDecoder(vae, (2, 4)),
        )
        with patch.object(pack("nodes.vae_stream"), "fast_decoder", lambda *_: fast):
            parts = []
            for piece in latent.split(3, dim=2):
                mark = stream.mark()
                before = stream.push(piece).clone()
                if parts:
                    stream.back_to(mark)
                    assert torch.equal(stream.push(piece), before)
                parts.append(before)
        close(torch.cat(parts), vae.decode(latent)[0])


def check_fast_vae_says_why_not():
    vae, fast = tiny_vae(), pack("nodes.fast_vae")
    assert fast.fast_decoder(vae, 2, 4) is None
    assert fast.why_not_fast(vae, 2, 4) == f"on {torch.device(vae.device).type} it is as fast"
    network = vae.first_stage_model
    assert fast._changed(network) is None
    handle = network.decoder.conv1.register_forward_hook(lambda *_: None)
    assert fast._changed(network) == "decoder.conv1 has forward hooks"
    handle.remove()
    assert pack("sparse_attn.fast_vae").why_not(network, torch.device("cpu"), torch.float32) is None
