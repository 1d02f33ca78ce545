"""Time what a user of a running ComfyUI sees, beside ComfyUI's own autoregressive sampler in the same run.

    python benchmarks/comfyui.py make-weights --comfy DIR      random weights of full size into a ComfyUI's folders
    python benchmarks/comfyui.py --url http://127.0.0.1:8188 --engine auto --out results.json --plot results.png
    python benchmarks/comfyui.py --model-14b random_14b.safetensors --only "stream_14b*" --merge results.json
    python benchmarks/comfyui.py --only first_run --merge results.json      on a server with an empty TRITON_CACHE_DIR
    python benchmarks/comfyui.py --only "ballast*" --merge results.json     on the server's machine
    python benchmarks/comfyui.py ballast --free-gb 16          holds GPU memory until killed

The server needs the pack and the files that are named, nothing else; this side needs aiohttp (and Pillow for --plot,
torch for `make-weights`, `ballast` and the engine). Jobs, chosen by --only (names or patterns):
    sampler        5 s through SamplerCustomAdvanced: core, dense, sparse and sparse with fast_pass off, interleaved,
                   and 63 latent frames sparse; the engine (benchmarks/rollout.py) after them
    stream_tiny, stream_shared_fp8, stream_wan, stream_fp8_checkpoint, stream_gguf, stream_autosave     Stream Video
    stream_14b, stream_14b_fp8         where --model-14b is given
    workflows      each of workflows/api/ twice, cancelled, and again; errors, the log, and memory before and after
    first_run, ballast, ballast_14b    only where --only names them
Every measured graph runs once before it is measured. Steady seconds per chunk are the median of the second half of the
gaps between chunk messages; of a sampler, which sends none, the difference of a long and a short run. A job that fails
is recorded with its error. Exit code: 0, 2 where a job failed, 1 where the server died.
--merge FILE keeps what FILE has of other jobs, and of servers with other flags under `runs`.
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import sys
from pathlib import Path

from comfyui_ballast import hold


def main() -> int:
    arguments = sys.argv[1:]
    if arguments[:1] == ["ballast"]:
        hold(ballast_parser().parse_args(arguments[1:]).free_gb)
    if arguments[:1] == ["make-weights"]:
        args = weights_parser().parse_args(arguments[1:])
        from comfyui_weights import write_all  # it imports torch

        write_all(args.comfy, args.sizes, args.kinds)
        return 0
    args = parser().parse_args(arguments)
    from comfyui_jobs import measure  # it imports aiohttp

    return asyncio.run(measure(args, " ".join(["python", *map(quoted, sys.argv)]), platform.node()))


def quoted(argument: str) -> str:
    return f'"{argument}"' if set(argument) & set(" *?") else argument


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--url", default="http://127.0.0.1:8188")
    add("--model", default="random_13b.safetensors", help="in diffusion_models, bfloat16")
    add("--model-14b", metavar="FILE")
    add("--fp8", metavar="FILE", default="random_13b_fp8.safetensors", help="the same model, fp8-scaled")
    add("--fp8-14b", metavar="FILE", default="random_14b_fp8.safetensors", help="for ballast_14b")
    add(
        "--gguf",
        metavar="FILE",
        default="random_13b_q8.gguf",
        help="the same model for ComfyUI-GGUF's loader",
    )
    add("--vae", metavar="FILE", default="random_wan_vae.safetensors", help='Wan 2.1\'s, or "world"')
    add("--tiny-vae", metavar="FILE", default="random_tiny_vae.safetensors", help='TAEHV\'s, or "world"')
    add(
        "--cond",
        metavar="SPEC",
        default="world",
        help='a file for CLIPLoader, or "world", the pack\'s own encoder',
    )
    add("--only", nargs="+", metavar="NAME", help="jobs by name or pattern")
    add("--out", type=Path, default=None, help="default: --merge's file, else build/comfyui.json")
    add("--merge", type=Path, metavar="FILE", help="results to add these to")
    add("--plot", type=Path, metavar="PNG")
    add("--engine", metavar="FILE", default="none", help='rollout.json, "auto" to run it here, or "none"')
    add("--log", type=Path, metavar="FILE", help="the server's log, searched for errors by `workflows`")
    add("--size", default="832x480", help="of the video")
    add("--time", type=float, default=1.0, help="factor of all lengths; below 1 only to try the script")
    add("--rounds", type=int, default=2, help="measured rounds of the interleaved sampler runs")
    add("--block-tokens", type=int, default=128)
    add("--machine", help="name for the results; default: the GPU's")
    return made


def ballast_parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Hold GPU memory so that only so much stays free.")
    made.add_argument("--free-gb", type=float, required=True, help="1 GB is 1e9 bytes")
    return made


def weights_parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Write random weights of published shapes for a ComfyUI.")
    made.add_argument("--comfy", type=Path, required=True, help="the folder that has models/")
    made.add_argument("--sizes", nargs="+", default=["1.3b"], choices=("1.3b", "14b", "tiny"))
    made.add_argument(
        "--kinds",
        nargs="+",
        default=["bf16", "fp8", "vae", "lora"],
        choices=("bf16", "fp8", "gguf", "vae", "lora"),
    )
    return made


if __name__ == "__main__":
    raise SystemExit(main())
