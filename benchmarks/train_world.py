"""Train the embedded world model. Two runs, each under ten minutes on one Hopper GPU:

    python benchmarks/train_world.py vae --minutes 5 --out build/world
    python benchmarks/train_world.py dit --minutes 9 --out build/world
    python benchmarks/train_world.py eval --out build/world
    python benchmarks/train_world.py variants --start build/world --out build/variants --minutes 9

`dit` needs the VAE's file in the same folder and, with --resume, continues from the weights it finds there. `variants`
trains what benchmarks/world_quality.py compares, one variant after another, each from the weights in --start; call it
again until all are finished.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
from pathlib import Path

import torch
from _root import load_pack


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("vae", "dit", "eval", "variants"))
    parser.add_argument("--out", type=Path, default=Path("build/world"))
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--parts", nargs="+", help="of eval: vae, dense, window, sparse")
    parser.add_argument(
        "--start", type=Path, help="of variants: folder of the three files that all start from"
    )
    parser.add_argument("--only", nargs="+", help="of variants: their names")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="any field of the config")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    pack = load_pack().__name__
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.enable_cudnn_sdp(
        False
    )  # suspected, not shown, of a NaN gradient in the first trial run
    overrides = {k: json.loads(v) for k, v in (item.split("=", 1) for item in args.set)}
    if args.minutes is not None and args.what != "variants":
        overrides["minutes"] = args.minutes
    overrides["seed"] = args.seed
    if args.what == "vae":
        m = importlib.import_module(f"{pack}.sparse_attn.training.world_vae")
        m.train_vae(m.VaeTraining(**overrides), args.out / "world_vae.safetensors", args.device, args.resume)
    elif args.what == "dit":
        m = importlib.import_module(f"{pack}.sparse_attn.training.world_dit")
        m.train_dit(m.DitTraining(**overrides), args.out, args.device, resume=args.resume)
    elif args.what == "variants":
        m = importlib.import_module(f"{pack}.sparse_attn.training.world_variants")
        if args.start is None:
            parser.error("variants: give --start, the folder of the three files that all variants start from")
        cfg = m.VariantTraining(**overrides)
        done = m.train_variants(cfg, args.only or m.MODES, args.start, args.out, args.device, args.minutes)
        print(f"finished in {args.out}: {', '.join(done) or 'none'}")
    else:
        m = importlib.import_module(f"{pack}.sparse_attn.training.world_eval")
        m.report(args.out, args.clips, args.device, args.seed, args.parts or m.PARTS)


if __name__ == "__main__":
    main()
