"""Decoding with the Wan VAE, in one process on one GPU; random weights of the published width, 480x832:

    python benchmarks/vae.py --out vae.json       about a minute
    python benchmarks/vae.py --only ops           where the time goes, by operation
    python benchmarks/vae.py --only decoders errors --dtypes bfloat16

Times are of a chunk of 3 latent frames (12 video frames) in the middle of a stream: medians of CUDA events in ms.
Errors are in root mean square against the VAE's own offline decode in float32, relative to it, at 240x416.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from _root import load_pack
from torch import Tensor

PACK = load_pack().__name__
WanVAE = import_module(f"{PACK}.sparse_attn.vae").WanVAE
fast_vae = import_module(f"{PACK}.sparse_attn.fast_vae")
norm_to_window = import_module(f"{PACK}.kernels.fused").norm_to_window

HEIGHT, WIDTH, CHUNK = 60, 104, 3  # latents of 480x832
# Of one chunk, in the decoder's order: times it occurs, video frames, height, width over the latent's, channels in,
# out, kernel.
CONVS = [
    ("stem", 1, 1, 1, 16, 384, (3, 3, 3)),
    ("384 at 1/8", 10, 1, 1, 384, 384, (3, 3, 3)),
    ("time_conv at 1/8", 1, 1, 1, 384, 768, (3, 1, 1)),
    ("merged upsampling to 1/4", 1, 2, 1, 384, 768, (2, 2)),
    ("192 to 384 at 1/4", 1, 2, 2, 192, 384, (3, 3, 3)),
    ("384 at 1/4", 5, 2, 2, 384, 384, (3, 3, 3)),
    ("time_conv at 1/4", 1, 2, 2, 384, 768, (3, 1, 1)),
    ("merged upsampling to 1/2", 1, 4, 2, 384, 768, (2, 2)),
    ("192 at 1/2", 6, 4, 4, 192, 192, (3, 3, 3)),
    ("merged upsampling to 1/1", 1, 4, 4, 192, 384, (2, 2)),
    ("96 at 1/1", 6, 4, 8, 96, 96, (3, 3, 3)),
    ("head", 1, 4, 8, 96, 8, (3, 3, 3)),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="+", default=["errors", "decoders", "ops"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"])
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    result: dict = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "cudnn": torch.backends.cudnn.version(),
    }  # fmt: skip
    started = time.time()
    for name in args.dtypes:
        dtype, part = getattr(torch, name), result.setdefault(name, {})
        for what in args.only:
            measure = partial({"errors": errors, "decoders": decoders, "ops": operations}[what], dtype)
            part[what] = attempt(measure, f"{name} {what}")
            print(f"{name} {what} done after {time.time() - started:.0f} s", flush=True)
            if args.out:
                args.out.write_text(json.dumps(result, indent=1))


# --- measuring ------------------------------------------------------------------------------------------------------


def median_ms(run: Callable[[], object], repeats: int = 10, warm: int = 3) -> float:
    """GPU time of one call, with the launches queued behind a pause."""
    for _ in range(warm):
        run()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def attempt(run: Callable[[], object], label: str) -> object:
    """The result, or the error in words: one alternative that fails leaves the others."""
    try:
        found = run()
    except Exception as error:
        found = f"{type(error).__name__}: {str(error)[:300]}"
    torch.cuda.empty_cache()
    print(f"  {label}: {found if not isinstance(found, dict) or len(found) < 4 else 'done'}", flush=True)
    return found


def published(dtype: torch.dtype) -> torch.nn.Module:
    """A VAE of the published width whose activations keep their size through the layers."""
    torch.manual_seed(0)
    return WanVAE().eval().requires_grad_(False).to("cuda", dtype)


def in_channels_last(vae: torch.nn.Module) -> torch.nn.Module:
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            layout = torch.channels_last_3d if module.weight.dim() == 5 else torch.channels_last
            module.weight.data = module.weight.data.contiguous(memory_format=layout)
    return vae


def noise(frames: int, dtype: torch.dtype, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    draw = torch.Generator("cuda").manual_seed(1)
    return torch.randn(1, 16, frames, height, width, generator=draw, device="cuda").to(dtype)


# --- decoders -------------------------------------------------------------------------------------------------------


def variants(vae: torch.nn.Module, dtype: torch.dtype) -> dict[str, Callable]:
    """Label -> what makes that FastDecoder."""
    weights = fast_vae.decoder_weights(vae)

    make = partial(fast_vae.FastDecoder, weights, "cuda", dtype)
    return {"fast": partial(make, graphs=False), "fast, graphs": make}


def decoders(dtype: torch.dtype) -> dict:
    """ms per chunk of every way to decode."""
    vae, found = published(dtype), {}
    found["WanVAE"] = attempt(lambda: stream_ms(lambda: vae.stream_decoder().push, dtype), "WanVAE")

    def channels_last() -> Callable:
        push = in_channels_last(published(dtype)).stream_decoder().push
        return lambda x: push(x.contiguous(memory_format=torch.channels_last_3d))

    label = "WanVAE, channels_last_3d"
    found[label] = attempt(lambda: stream_ms(channels_last, dtype), label)
    for label, make in variants(vae, dtype).items():
        found[label] = attempt(lambda make=make: stream_ms(lambda: make().push, dtype), label)
        found[f"{label}, host"] = attempt(lambda make=make: host_ms(make(), dtype), f"{label}, host")
    return found


def stream_ms(opened: Callable[[], Callable], dtype: torch.dtype) -> float:
    push = opened()
    push(noise(CHUNK, dtype))
    return round(median_ms(lambda: push(noise(CHUNK, dtype)), repeats=5), 3)


def host_ms(decoder, dtype: torch.dtype) -> dict:
    """Time of the host to enqueue a chunk, and bytes that the decoder keeps."""
    chunk = noise(CHUNK, dtype)
    for _ in range(3):
        decoder.push(chunk)
    torch.cuda.synchronize()
    start = time.perf_counter()
    decoder.push(chunk)
    enqueued = time.perf_counter() - start
    torch.cuda.synchronize()
    return {"ms": round(enqueued * 1e3, 2), "GB": round(decoder.nbytes / 1e9, 2)}


def errors(dtype: torch.dtype) -> dict:
    """Relative error of each decoder against float32, over 5 latent frames of 240x416."""
    truth = published(torch.float32)
    raw = noise(5, dtype, HEIGHT // 2, WIDTH // 2)
    expected = truth.decoder(truth.conv2(raw.float()))
    vae = published(dtype)

    def relative(frames: Tensor) -> float:
        return ((frames.float() - expected).square().mean() / expected.square().mean()).sqrt().item()

    found = {"WanVAE": attempt(lambda: relative(vae.decoder(vae.conv2(raw))), "WanVAE")}
    for label, make in variants(vae, dtype).items():
        found[label] = attempt(lambda make=make: relative(decode_in_pieces(make(), raw)), f"error of {label}")
    return found


def decode_in_pieces(decoder, raw: Tensor) -> Tensor:
    return torch.cat([decoder.push(raw[:, :, :3]), decoder.push(raw[:, :, 3:])], dim=2)


# --- operations -----------------------------------------------------------------------------------------------------


def operations(dtype: torch.dtype) -> dict:
    """Of a piece of one latent frame, by operation: ms, how often a chunk has it, TFLOP/s or GB/s."""
    return {
        "convolutions": {case[0]: attempt(lambda case=case: convolution(case, dtype), case[0]) for case in CONVS},
        "norms": {label: attempt(lambda shape=shape: norm(shape, dtype), label) for label, shape in (
            ("384 at 1/8", (1, HEIGHT, WIDTH, 384)),
            ("384 at 1/4", (2, 2 * HEIGHT, 2 * WIDTH, 384)),
            ("192 at 1/2", (4, 4 * HEIGHT, 4 * WIDTH, 192)),
            ("96 at 1/1", (4, 8 * HEIGHT, 8 * WIDTH, 96)),
        )},
        "attention": attempt(lambda: attention(dtype), "attention"),
    }  # fmt: skip


def convolution(case: tuple, dtype: torch.dtype) -> dict:
    label, count, frames, scale, cin, cout, kernel = case
    height, width = HEIGHT * scale, WIDTH * scale
    even = kernel[-1] == 2
    past = kernel[0] - 1 if len(kernel) == 3 else 0
    weight = torch.randn(cout, cin, *kernel, device="cuda", dtype=dtype) * (cin * 9) ** -0.5
    layout = torch.channels_last_3d if len(kernel) == 3 else torch.channels_last
    weight = weight.contiguous(memory_format=layout)
    x = torch.randn(frames + past, height, width, cin, device="cuda", dtype=dtype)
    out = torch.empty(frames, height + even, width + even, cout, device="cuda", dtype=dtype)
    flop = 2 * weight.numel() * frames * out.shape[1] * out.shape[2]
    fast_vae.convolve(x, weight, out)
    expected = out.float()

    def timed(run: Callable) -> Callable:
        def result() -> dict:
            out.zero_()
            found = run()
            found = (
                out if found is None else found.movedim(-4 if found.dim() == 5 else 1, -1).reshape(out.shape)
            ).float() - expected
            error = (found.square().mean() / expected.square().mean()).sqrt().item()
            ms = median_ms(run, repeats=5, warm=2)
            return {
                "ms": round(ms, 4),
                "TFLOP/s": round(flop / ms / 1e9),
                "unlike cudnn": float(f"{error:.1e}"),
            }

        return result

    found: dict = {"pieces_per_chunk": CHUNK, "per_piece": count}
    for name, run in alternatives(x, weight, out).items():
        found[name] = attempt(timed(run), f"conv {label}, {name}")
    return found


def alternatives(x: Tensor, weight: Tensor, out: Tensor) -> dict[str, Callable]:
    """Ways to convolve x [T, H, W, I] into out [T', H', W', O]."""
    side = weight.shape[-1] // 2
    found: dict[str, Callable] = {"cudnn": lambda: fast_vae.convolve(x, weight, out)}
    if weight.dim() == 5:
        source = fast_vae._channels_first(x[None])
        padding = (0, side, side)
        found["cudnn, its heuristic"] = lambda: F.conv3d(source, weight, padding=padding)
        if weight.shape[2] == 3 and weight.shape[-1] == 3:
            wide, flat = frames_as_channels(x, weight)
            found["conv2d of 3 frames' channels"] = lambda: fast_vae.convolve(wide, flat, out)
    return found


def frames_as_channels(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same convolution over space alone: x [T, H, W, 3 I], weight [O, 3 I, 3, 3]."""
    wide = torch.cat([x[:-2], x[1:-1], x[2:]], dim=-1)
    flat = weight.transpose(1, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)
    return wide, flat


def norm(shape: tuple[int, ...], dtype: torch.dtype) -> dict:
    def made(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda", dtype=dtype)

    frames, height, width, channels = shape
    y, x, bias, gamma = made(*shape), made(*shape), made(channels), made(channels)
    window, past = made(frames + 2, height, width, channels), made(2, height, width, channels)
    piece = y.numel() * y.element_size()
    kept = 3 * past.numel() * past.element_size()

    def gigabytes(moved: int, **options) -> Callable:
        def result() -> dict:
            ms = median_ms(
                lambda: norm_to_window(y, window, bias=bias, gamma=gamma, silu=True, past=past, **options)
            )
            return {"ms": round(ms, 4), "GB/s": round(moved / ms / 1e6)}

        return result

    return {
        "norm": attempt(gigabytes(2 * piece + kept), f"norm {list(shape)}"),
        "residual and norm": attempt(
            gigabytes(4 * piece + kept, residual=x, total=x), f"residual and norm {list(shape)}"
        ),
    }


def attention(dtype: torch.dtype) -> dict:
    """One frame, head dim 384: PyTorch's choice, and written out with logits in 16 bits."""
    parts = torch.randn(1, HEIGHT * WIDTH, 3, 384, device="cuda", dtype=dtype)
    q, k, v = (part[:, None] for part in parts.unbind(2))

    def written_out() -> Tensor:
        return ((q @ k.transpose(2, 3)) * 384**-0.5).softmax(-1) @ v

    return {
        "sdpa": round(median_ms(lambda: F.scaled_dot_product_attention(q, k, v)), 4),
        "written out": round(median_ms(written_out), 4),
    }


if __name__ == "__main__":
    main()
