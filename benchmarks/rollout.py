"""A long rollout of the embedded world model: does the memory stay constant, does a chunk's latency stay flat?

    python benchmarks/rollout.py --minutes 10
    python benchmarks/rollout.py --minutes 1 --modes sparse window --out build/rollout

For every mode: latency per chunk (denoising passes and the clean pass; decoding is left out), bytes of the memory after
every chunk, and the ratio of the last tenth of the chunks to the first tenth after the memory has filled. Writes
rollout.json and rollout.png. Dense mode is left out by default: its memory grows with the video, by definition.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from _root import load_pack
from PIL import Image, ImageDraw

load_pack()
from sparse_forcing_pack.sparse_attn.config import AttentionConfig  # noqa: E402
from sparse_forcing_pack.sparse_attn.pipeline import Request, VideoPipeline, new_memory  # noqa: E402
from sparse_forcing_pack.sparse_attn.rollout import stream  # noqa: E402

FPS = 16
COLOURS = {"sparse": (214, 69, 65), "window": (52, 120, 200), "dense": (90, 90, 90)}
PROMPT = "a large red circle bouncing and a small white star standing still over a navy plain background"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of video")
    parser.add_argument("--modes", nargs="+", default=["sparse"], choices=tuple(COLOURS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads; 1 is the steadiest")
    parser.add_argument("--out", type=Path, default=Path("build/rollout"))
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    pipeline = VideoPipeline.load(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    found = {"torch": torch.__version__, "device": device_name(pipeline.device), "minutes": args.minutes}
    found["modes"] = {mode: measure(pipeline, mode, args.minutes) for mode in args.modes}
    (args.out / "rollout.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(found["modes"], args.out / "rollout.png")
    print(f"wrote {args.out / 'rollout.json'} and rollout.png")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def measure(pipeline: VideoPipeline, mode: str, minutes: float) -> dict:
    """One stream of at least `minutes` of video at 16 frames a second."""
    attention = AttentionConfig(mode=mode, positions="absolute" if mode == "dense" else "rebased")
    chunk = Request("a").sampler.chunk_frames
    chunks = max(4, -(-round(minutes * 60 * FPS / 4) // chunk))
    request = replace(Request(PROMPT), latent_frames=chunk * chunks, attention=attention)
    memory = new_memory(pipeline.widths, request, pipeline.dtype, pipeline.device)
    seconds, sizes, report = [], [], time.monotonic()
    for done in stream(
        pipeline._denoiser(request, memory), memory, request.sampler, shape=(1, 16, 32, 32),
        total_frames=request.latent_frames, device=pipeline.device,
    ):  # fmt: skip
        seconds.append(done.seconds)
        sizes.append(memory.nbytes)
        if not done.latent.isfinite().all():
            raise FloatingPointError(f"chunk {done.index} is not finite")
        if time.monotonic() - report > 20:
            report = time.monotonic()
            print(f"{mode}: chunk {done.index + 1} of {chunks}, {done.seconds * 1000:.0f} ms", flush=True)
    full = (attention.persistent_frames + attention.window_frames) // chunk + 1
    steady = seconds[full:]
    tenth = max(1, len(steady) // 10)
    first, last = statistics.median(steady[:tenth]), statistics.median(steady[-tenth:])
    facts = {
        "chunks": chunks, "video_frames": request.video_frames,
        "first_tenth_ms": 1000 * first, "last_tenth_ms": 1000 * last, "last_to_first": last / first,
        "p50_ms": 1000 * statistics.median(steady),
        "p95_ms": 1000 * statistics.quantiles(steady, n=20)[-1] if len(steady) > 1 else 1000 * steady[0],
        "bytes": sizes[-1], "bytes_constant": len(set(sizes)) == 1, "seconds": seconds,
    }  # fmt: skip
    print(mode, {k: v for k, v in facts.items() if k != "seconds"}, flush=True)
    return facts


def plot(modes: dict[str, dict], path: Path, size: tuple[int, int] = (900, 360)) -> None:
    """Latency of every chunk over the length of the video."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = 60, 20, size[0] - 20, size[1] - 40
    longest = max(len(m["seconds"]) for m in modes.values())
    highest = 1.5 * max(m["p95_ms"] for m in modes.values())
    draw.rectangle((left, top, right, bottom), outline=(200, 200, 200))
    for mark in range(5):
        y = bottom - (bottom - top) * mark / 4
        draw.text((8, y - 6), f"{highest * mark / 4:.0f} ms", fill="black")
    for mark in range(6):
        frames = longest * mark / 5 * 12
        draw.text((left + (right - left) * mark / 5 - 14, bottom + 6), f"{frames / FPS:.0f} s", fill="black")
    for place, (mode, facts) in enumerate(modes.items()):
        points = [
            (
                left + (right - left) * i / max(1, longest - 1),
                max(top, bottom - (bottom - top) * 1000 * s / highest),
            )
            for i, s in enumerate(facts["seconds"])
        ]
        for a, b in pairwise(points):
            draw.line((a, b), fill=COLOURS[mode])
        draw.text((left + 10 + 90 * place, top + 6), mode, fill=COLOURS[mode])
    image.save(path)


if __name__ == "__main__":
    main()
