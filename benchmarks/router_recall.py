"""How much of the true attention the router's choice holds, on clips of the world model. Runs on a CPU in minutes.

    python benchmarks/router_recall.py --clips 4 --map docs/images/router_recall.png

Prints a table and writes a heat map: rows are layers and heads, columns the router and the best possible choice at each
Top-K share.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import numpy as np
import torch
from _root import load_pack

PACK = load_pack().__name__
recall, plots, evaluation, clips, variants = (
    importlib.import_module(f"{PACK}.sparse_attn.training.{name}")
    for name in ("router_recall", "plots", "world_eval", "world_clips", "world_variants")
)
to_prompt = importlib.import_module(f"{PACK}.sparse_attn.world.scene").to_prompt
WEIGHTS = importlib.import_module(f"{PACK}.sparse_attn.world.model").WEIGHTS


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of world_dit and world_text")
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--frames", type=int, default=21, help="latent frames of a clip")
    parser.add_argument("--map", type=Path, default=Path("output/router_recall.png"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    model = clips.load_folder(args.weights, args.device, clips.load_vae(args.weights, args.device))
    prompts = [to_prompt(s) for s in evaluation.held_out_scenes(args.clips)]
    found = recall.probe(model.dit, model.text, prompts, args.frames, variants.MODES["sparse"])
    columns = [(ratio, who) for who in ("router", "oracle") for ratio in recall.RATIOS]
    layers, heads = found["rank"].shape
    cells = np.stack([found[column].flatten().numpy() for column in columns], axis=1)
    image = plots.heat_map(
        "share of the window's attention kept: router, then best",
        cells,
        [f"layer {i} head {h}" for i in range(layers) for h in range(heads)],
        [f"{100 * ratio:g} %" for ratio, _ in columns],
    )
    args.map.parent.mkdir(parents=True, exist_ok=True)
    image.save(args.map)
    print(recall.as_table(found))


if __name__ == "__main__":
    main()
