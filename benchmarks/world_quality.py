"""What training with the sparse memory buys, on the world model: accuracy, drift, motion, flicker and recall over time.

    python benchmarks/train_world.py variants --start build/world --out build/variants --minutes 9
    python benchmarks/world_quality.py --variants build/variants --out output/quality
    python benchmarks/world_quality.py --entry mine=build/world:sparse renderer --prompts 8 --seeds 1 --horizons 5 20

Entries are NAME=FOLDER:MODE, or NAME=FOLDER:MODE@128 for blocks of as many tokens; the folder holds world_dit and
world_text (and world_vae, or --vae names the folder that does). `renderer` and `vae` are the renderer's own frames, as
they are and through the VAE: the best that can be scored.
--variants names the folder of `train_world.py variants` and measures what is there. Measured numbers are kept in
OUT/clips.csv; an entry that is there is not measured again. With --show N nothing is measured: OUT/recall_frames.jpg
then shows the first N scenes of the recall test, away for five seconds, as the entries bring them back.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import logging
from pathlib import Path

import torch
from _root import load_pack

PACK = load_pack().__name__
quality, report, variants, clips = (
    importlib.import_module(f"{PACK}.sparse_attn.training.{name}")
    for name in ("world_quality", "quality_report", "world_variants", "world_clips")
)
WEIGHTS = importlib.import_module(f"{PACK}.sparse_attn.world.model").WEIGHTS


def parse_entry(text: str) -> tuple[str, Path | None, str]:
    """Name, folder and mode of an entry; the renderer's have neither folder nor mode."""
    if text in ("renderer", "vae"):
        return text, None, ""
    name, found, rest = text.partition("=")
    folder, colon, mode = rest.rpartition(":")
    if not (found and colon and name and folder) or mode.partition("@")[0] not in variants.MODES:
        raise ValueError(
            f"entry {text!r} is not NAME=FOLDER:MODE with one of the modes {', '.join(variants.MODES)}, "
            "nor renderer, nor vae."
        )
    return name, Path(folder), mode


def entries_of(args: argparse.Namespace) -> list[tuple[str, Path | None, str]]:
    entries = [parse_entry(text) for text in args.entry]
    if args.variants:
        trained = ((name, mode, args.variants / weights) for name, mode, weights in variants.ENTRIES)
        entries += [
            (name, folder, mode) for name, mode, folder in trained if (folder / "done.json").is_file()
        ]
    if not entries:
        raise ValueError(
            "nothing to measure: give --entry NAME=FOLDER:MODE, or --variants with finished ones."
        )
    return entries


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entry", nargs="*", default=[])
    parser.add_argument("--variants", type=Path)
    parser.add_argument("--vae", type=Path, help="folder of world_vae; default: the pack's own weights")
    parser.add_argument("--out", type=Path, default=Path("output/quality"))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--horizons", type=int, nargs="+", default=[5, 20, 60])
    parser.add_argument("--absences", type=int, nargs="+", default=[2, 5, 15])
    parser.add_argument("--recalls", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--show", type=int, metavar="N", help="draw N scenes of the recall test instead")
    parser.add_argument("--against", default="dense-21", help="the variant that differences are taken to")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    plan = quality.Measuring(
        args.prompts, args.seeds, tuple(args.horizons), tuple(args.absences), args.recalls, args.batch
    )
    plan.validate()
    entries = entries_of(args)
    torch.backends.cudnn.benchmark = True  # a clip's pieces all have the same few shapes
    vae = clips.load_vae(args.vae or WEIGHTS, args.device)
    if args.device == "cuda":
        importlib.import_module(f"{PACK}.sparse_attn.training.common").channels_last(vae)

    def source_of(name: str, folder: Path | None, mode: str):
        if folder is None:
            return quality.RenderedSource(args.device, vae if name == "vae" else None)
        model = clips.load_folder(folder, args.device, vae)
        name, _, tokens = mode.partition("@")
        attention = variants.MODES[name]
        if tokens:
            attention = dataclasses.replace(attention, block_tokens=int(tokens))
        return quality.ModelSource(model, attention, args.device)

    if args.show:
        sources = {name: source_of(name, folder, mode) for name, folder, mode in entries}
        args.out.mkdir(parents=True, exist_ok=True)
        quality.show_recall(sources, 5, args.show).save(args.out / "recall_frames.jpg", quality=90)
        print(f"wrote {args.out / 'recall_frames.jpg'}")
        return
    rows = report.read_rows(args.out / "clips.csv")
    for name, folder, mode in entries:
        if any(row.name == name for row in rows):
            print(f"{name}: measured before")
            continue
        rows += quality.measure(name, source_of(name, folder, mode), plan)
        report.write_rows(args.out / "clips.csv", rows)
    report.write_report(args.out, rows, args.against)
    print((args.out / "table.md").read_text())


if __name__ == "__main__":
    main()
