"""The fast decoder of the Wan VAE: the numbers of the VAE's own, in pieces of any size."""

import copy

import pytest
import torch
from sparse_forcing_pack.sparse_attn import fast_vae
from sparse_forcing_pack.sparse_attn.fast_vae import FastDecoder, bytes_needed, decoder_weights, why_not
from sparse_forcing_pack.sparse_attn.vae import WanVAE
from torch import nn

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    torch.manual_seed(0)
    vae = WanVAE(dim=4).eval().requires_grad_(False)
    for name, weight in vae.named_parameters():
        if name.endswith("gamma"):
            weight.copy_(torch.randn_like(weight) * 0.2 + 1)
    return vae.double()


def latents(frames: int, height: int = 3, width: int = 4, seed: int = 1) -> torch.Tensor:
    return torch.randn(1, 16, frames, height, width, generator=torch.Generator().manual_seed(seed)).double()


@pytest.fixture(scope="module")
def offline(vae):
    """The VAE's own decode of six latent frames."""
    return whole(vae, latents(6))


def whole(vae: WanVAE, raw: torch.Tensor) -> torch.Tensor:
    return vae.decoder(vae.conv2(raw))


def fast(vae: nn.Module, dtype=torch.float64, **options) -> FastDecoder:
    return FastDecoder(decoder_weights(vae), CPU, dtype, **options)


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    assert torch.allclose(found, wanted, rtol=0, atol=2e-6)  # WanVAE's norms are float32


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_push_equals_offline(vae, offline, chunk):
    decoder = fast(vae)
    pieces = [decoder.push(piece) for piece in latents(6).split(chunk, dim=2)]
    assert pieces[0].shape[2] == 1 + 4 * (chunk - 1)
    assert_same(torch.cat(pieces, dim=2), offline)


@pytest.mark.parametrize("size", [(1, 1), (5, 2)])
def test_push_of_odd_sizes(vae, size):
    raw = latents(2, *size)
    assert_same(fast(vae).push(raw), whole(vae, raw))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_push_rounds_no_more_than_the_modules(vae, dtype):
    """Error against float64 at most 1.2 times that of the VAE's own modules in the same dtype."""
    raw = latents(4, 6, 8).to(dtype)
    rounded = copy.deepcopy(vae).to(dtype)
    truth = whole(copy.deepcopy(rounded).double(), raw.double())

    def error(frames: torch.Tensor) -> float:
        return (frames.double() - truth).square().mean().sqrt().item()

    modules = error(whole(rounded, raw))
    assert error(fast(rounded, dtype).push(raw)) <= 1.2 * modules


def test_reset_starts_a_new_stream(vae, offline):
    decoder = fast(vae)
    decoder.push(latents(3, seed=5))
    decoder.reset()
    assert decoder.snapshot() == {}
    assert_same(decoder.push(latents(6)), offline)


def test_push_of_no_frames(vae):
    assert fast(vae).push(latents(0)).shape == (1, 3, 0, 24, 32)


def test_push_rejects_another_size_in_a_stream(vae):
    decoder = fast(vae)
    decoder.push(latents(1))
    with pytest.raises(ValueError, match=r"latents of \[3, 4\], these are \[4, 4\]; call reset"):
        decoder.push(latents(1, 4, 4))
    decoder.reset()
    decoder.push(latents(1, 4, 4))


@pytest.mark.parametrize("before", [1, 2, 4])
def test_restore_resumes_a_snapshot(vae, offline, before):
    first, then = fast(vae), fast(vae)
    first.push(latents(6)[:, :, :before])
    saved = first.snapshot()
    assert sum(value.dtype == torch.bool for value in saved.values()) == (2 if before == 1 else 0)
    then.push(latents(3, seed=9))
    then.reset()
    then.restore(saved)
    assert_same(then.push(latents(6)[:, :, before:]), offline[:, :, 1 + 4 * (before - 1) :])


def test_restore_decodes_a_frame_that_waits(vae, offline):
    first, then = fast(vae), fast(vae)
    first.push(latents(6)[:, :, :3])
    then.restore(first.snapshot() | {"waiting": latents(6)[:, :, 3:4]})
    assert then.snapshot().keys() == first.snapshot().keys() | {"waiting"}
    assert_same(then.push(latents(6)[:, :, 4:]), offline[:, :, 9:])


def test_restore_takes_a_single_past_frame(vae, offline):
    """ComfyUI's cache has one frame after a stream's first."""
    first, then = fast(vae), fast(vae)
    first.push(latents(6)[:, :, :1])
    saved = {name: x if x.dtype == torch.bool else x[:, :, 1:] for name, x in first.snapshot().items()}
    then.restore(saved)
    assert_same(then.push(latents(6)[:, :, 1:]), offline[:, :, 1:])


def test_buffers_stay_where_they_are(vae):
    """A captured graph finds every buffer again."""
    decoder = fast(vae)
    decoder.push(latents(3))
    size, places = decoder.nbytes, {key: x.data_ptr() for key, x in decoder._work._buffers.items()}
    decoder.push(latents(5))
    assert decoder.nbytes == size
    assert places == {key: x.data_ptr() for key, x in decoder._work._buffers.items()}


def test_why_not_lets_wan_pass(vae):
    assert why_not(vae, CPU, torch.float32) is None
    assert why_not(WanVAE(dim=16), torch.device("cuda"), torch.bfloat16) is None


def test_why_not_says_the_reason(vae):
    def reason(change, device=CPU, dtype=torch.float32) -> str | None:
        other = copy.deepcopy(vae)
        change(other)
        return why_not(other, device, dtype)

    def attached(vae, **names):
        for name, value in names.items():
            setattr(vae.decoder.conv1, name, value)

    assert (
        reason(lambda vae: setattr(vae, "decoder", nn.Identity()))
        == "its decoder is a Identity, not Wan 2.1's"
    )
    assert "patched" in reason(lambda vae: attached(vae, weight_function=[print]))
    assert "decoder.conv1.weight" in reason(
        lambda vae: attached(vae, weight=nn.Parameter(torch.zeros(16, 16, 3, 3, 1)))
    )
    assert "is not part of" in reason(lambda vae: attached(vae, extra=nn.Parameter(torch.zeros(1))))
    assert "is missing" in reason(lambda vae: vae.decoder.middle.__delitem__(2))
    assert "has no conv2.weight" in reason(lambda vae: setattr(vae, "conv2", nn.Identity()))
    small = nn.Parameter(torch.zeros(16, 16, 3, 3, 3).to(torch.float8_e4m3fn), requires_grad=False)
    assert "quantised weights" in reason(lambda vae: attached(vae, weight=small))
    assert "base width is 4" in reason(lambda vae: None, torch.device("cuda"), torch.float16)


def test_decoder_rejects_other_weights(vae):
    weights = decoder_weights(vae)
    del weights["decoder.head.2.bias"]
    with pytest.raises(ValueError, match=r"decoder\.head\.2\.bias is missing"):
        FastDecoder(weights, CPU, torch.float32)


def test_later_frames_are_replays(vae, offline, monkeypatch):
    """With a capture that only runs what it is given: the first later frame is run, every other one replayed."""
    replays = []

    def record(run, pool):
        return lambda: (replays.append(1), run()), None

    monkeypatch.setattr(fast_vae, "record", record)
    monkeypatch.setattr(fast_vae, "new_pool", lambda: None)
    decoder = fast(vae)
    decoder.graphs = True
    assert_same(decoder.push(latents(6)), offline)
    assert len(replays) == 4
    decoder.reset()
    assert_same(decoder.push(latents(6)), offline)
    assert len(replays) == 9


def test_a_capture_that_fails_is_done_without(vae, offline, monkeypatch, caplog):
    def record(run, pool):
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(fast_vae, "record", record)
    monkeypatch.setattr(fast_vae, "new_pool", lambda: None)
    decoder = fast(vae)
    decoder.graphs = True
    assert_same(decoder.push(latents(6)), offline)
    assert (
        caplog.text.count("The VAE decodes without CUDA graphs: RuntimeError: operation not permitted") == 1
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_graphs_change_nothing(dtype):
    torch.manual_seed(0)
    vae = WanVAE(dim=16).eval().requires_grad_(False).to("cuda", dtype)
    raw = latents(7, 10, 12).to("cuda", dtype)
    plain, graphed = (
        FastDecoder(decoder_weights(vae), "cuda", dtype, graphs=graphs) for graphs in (False, True)
    )
    for piece in raw.split(3, dim=2):
        assert torch.equal(plain.push(piece), graphed.push(piece))
    assert graphed.graphs and graphed._replay is not None
    graphed.reset()
    again = torch.cat([graphed.push(piece) for piece in raw.split(2, dim=2)], dim=2)
    plain.reset()
    assert torch.equal(again, plain.push(raw))


def test_bytes_needed_is_about_what_is_kept(vae):
    decoder = fast(vae, torch.float32)
    decoder.push(latents(3, 8, 8))
    assert 0.8 * decoder.nbytes <= bytes_needed(decoder_weights(vae), 8, 8, torch.float32) <= decoder.nbytes
