"""The tiny decoder: streaming equals decoding at once, and what it computes is what its layers say."""

import torch
import torch.nn.functional as F
from sparse_forcing_pack.sparse_attn.tiny_vae import SURPLUS, MemBlock, TinyDecoder


def decoder() -> TinyDecoder:
    torch.manual_seed(0)
    return TinyDecoder().eval().requires_grad_(False)


def test_pieces_of_any_size_equal_the_whole():
    network = decoder()
    latent = torch.randn(2, 16, 7, 4, 6)
    whole = network.decode(latent)
    assert whole.shape == (2, 3, 25, 32, 48)
    for sizes in ([1] * 7, [3, 3, 1], [2, 5]):
        stream = network.stream_decoder()
        torch.testing.assert_close(torch.cat([stream.push(x) for x in latent.split(sizes, 2)], 2), whole)
        stream.reset()
        torch.testing.assert_close(stream.push(latent), whole)


def test_a_frame_sees_itself_and_the_past_alone():
    """Frame by frame in plain terms: each memory block gets its own input of the frame before, black at first."""
    network = decoder()
    latent = torch.randn(1, 16, 3, 2, 2)
    before: dict[int, torch.Tensor] = {}

    def through(frames: list[torch.Tensor], place: int) -> list[torch.Tensor]:
        if place == len(network.decoder):
            return frames
        layer, out = network.decoder[place], []
        for x in frames:
            if isinstance(layer, MemBlock):
                past = before.get(place, torch.zeros_like(x))
                before[place] = x
                out.append(F.relu(layer.conv(torch.cat([x, past], 1)) + x))
            else:
                out += layer(x).split(1)
        return through(out, place + 1)

    frames = through(list(latent[0].transpose(0, 1).split(1)), 0)
    expected = 2 * torch.cat(frames)[SURPLUS:].transpose(0, 1)[None] - 1
    torch.testing.assert_close(network.decode(latent), expected)


def test_weight_names_are_the_published_ones():
    names = decoder().state_dict()
    assert names["decoder.1.weight"].shape == (256, 16, 3, 3)
    assert names["decoder.3.conv.4.bias"].shape == (256,)
    assert names["decoder.13.conv.weight"].shape == (256, 128, 1, 1)
    assert names["decoder.22.bias"].shape == (3,)
    assert "decoder.8.bias" not in names and len(names) == 64
