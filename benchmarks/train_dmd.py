"""Self-Forcing DMD with the sparse memory active: train, work out the cost, or time one step.

    python benchmarks/train_dmd.py cost --config benchmarks/dmd_wan_1.3b.json --teacher-size 14B --gpus 8
    python benchmarks/train_dmd.py step --size 1.3B
    torchrun --nproc-per-node=8 benchmarks/train_dmd.py train --config benchmarks/dmd_wan_1.3b.json \\
        --student ode_init.pt --critic wan_1.3b.safetensors --teacher wan_14b.safetensors --rows rows.safetensors \\
        --out runs/dmd

`--config` is a JSON file with a stage ("DmdTraining" or "LongTuning") and its fields; `--set name=value` changes one.
`rows` holds the text: a tensor [words, 4096] a prompt under any names, and one called "negative". `train` goes on from
the newest checkpoint in --out. `step` times sparse and dense attention with the same random models.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import importlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _root import load_pack
from safetensors.torch import load_file

PACK = load_pack().__name__


def module(name: str) -> Any:
    return importlib.import_module(f"{PACK}.sparse_attn.{name}")


config, dmd, runs, cost, parallel = (
    module(f"training.{name}") for name in ("dmd_config", "dmd", "dmd_run", "cost", "parallel")
)
AttentionConfig, WanModel, best_attention = (
    module("config").AttentionConfig, module("wan").WanModel, module("fast").best_attention
)  # fmt: skip

STAGES = {"DmdTraining": config.DmdTraining, "LongTuning": config.LongTuning}
TOY = {"dim": 128, "ffn_dim": 128, "num_heads": 1, "num_layers": 2}


def read_config(path: Path | None, changes: list[str]) -> Any:
    """The stage that a JSON file describes, with changes; without a file the published first stage."""
    fields = json.loads(path.read_text(encoding="utf-8")) if path else {"stage": "DmdTraining"}
    stage = fields.pop("stage", None)
    if stage not in STAGES:
        raise ValueError(f"stage {stage!r} is unknown: use one of {', '.join(STAGES)}.")
    fields |= {name: json.loads(value) for name, value in (item.split("=", 1) for item in changes)}
    if "attention" in fields:
        fields["attention"] = AttentionConfig(**fields["attention"])
    known = {f.name for f in STAGES[stage].__dataclass_fields__.values()} - {"sampler"}
    if unknown := sorted(fields.keys() - known):
        raise ValueError(f"{stage} has no {', '.join(unknown)}: its fields are {', '.join(sorted(known))}.")
    return STAGES[stage](**fields)


def read_prompts(path: Path) -> Any:
    """Text rows from a safetensors file."""
    tensors = load_file(path)
    if "negative" not in tensors or len(tensors) < 2:
        raise ValueError(
            f"{path} holds {', '.join(sorted(tensors)) or 'nothing'}: it needs one tensor [words, width] a prompt, "
            "and one called 'negative', of the prompt that guidance points away from."
        )
    negative = tensors.pop("negative")
    return module("training.dmd_prompts").Prompts([tensors[name] for name in sorted(tensors)], negative)


def read_model(path: Path) -> Any:
    return WanModel.from_state_dict(module("checkpoint").read_checkpoint(path)[0])


def train(args: argparse.Namespace) -> None:
    cfg = read_config(args.config, args.set)
    processes = parallel.join(args.device)
    cfg.validate(processes.size)
    prompts = read_prompts(args.rows)
    student, critic, teacher = (read_model(path) for path in (args.student, args.critic, args.teacher))
    vae = None
    if args.vae:
        weights = module("checkpoint").read_checkpoint(args.vae)[0]
        vae = module("vae").WanVAE.from_state_dict(weights).to(args.device).requires_grad_(False)
    shape = (16, *args.latent)
    run = runs.DmdRun(cfg, student, critic, teacher, prompts, shape, args.out, processes, vae)
    if run.resume():
        logging.info("going on from step %d", run.step_number)
    with best_attention(torch.device(args.device)):
        run.run(args.until)


def show_cost(args: argparse.Namespace) -> None:
    cfg = read_config(args.config, args.set)
    grid = args.latent[0] // 2, args.latent[1] // 2
    found = cost.cost_of(cfg, args.size, args.teacher_size, grid, args.gpus)
    print(
        f"student and critic {args.size}, teacher {args.teacher_size}, {args.gpus} GPUs, clips of {cfg.frames} frames"
    )
    for name, value in found.memory.items():
        print(f"  {name:16} {value / cost.GIB:8.1f} GiB a GPU")
    print(f"  {'in all':16} {sum(found.memory.values()) / cost.GIB:8.1f} GiB a GPU")
    for name, value in found.student_step.items():
        print(f"  {name:16} {value / 1e12:8.0f} TFLOP a clip")
    print(f"  {'in all':16} {sum(found.student_step.values()) / 1e12:8.0f} TFLOP a clip, student's step")
    hours = found.hours(cfg, args.gpus, args.tflops * 1e12)
    print(f"  {cfg.steps} steps of {cfg.batch} clips at {args.tflops:g} TFLOP/s a GPU: {hours:.1f} hours")


def timed(work: Callable[[], Any], device: str) -> float:
    """Seconds of `work`, the device's part included."""
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def make_run(args: argparse.Namespace, cfg: Any, latent: tuple[int, int]) -> Any:
    """Random models; the head is not zero, or nothing would have a gradient."""
    widths = TOY if args.size == "toy" else cost.WIDTHS[args.size]
    torch.manual_seed(0)
    with torch.device(args.device):
        student = WanModel(**widths)
        student.init_weights()
        torch.nn.init.normal_(student.head.head.weight, std=0.02)
        prompts = module("training.dmd_prompts").Prompts(
            [torch.randn(40, 4096).cpu()], torch.zeros(1, 4096).cpu()
        )
    critic, teacher = copy.deepcopy(student), copy.deepcopy(student)
    processes = parallel.Processes(device=args.device)
    return runs.DmdRun(cfg, student, critic, teacher, prompts, (16, *latent), args.out, processes)


def time_step(args: argparse.Namespace) -> None:
    """Sparse and dense in turn: whole steps in which the student learns, and the student's part of them alone. With
    `critic_topk` below 1 the sparse student is also timed beside such a critic.

    A step of each exit of the sampler is timed, after two of the last exit, in the second of which graphs are captured,
    and one of each other: a first step also asks the driver for its memory.
    """
    cfg, latent = read_config(args.config, args.set), tuple(args.latent)
    sparse = dataclasses.replace(cfg.attention, block_tokens=args.block_tokens)
    cfg = dataclasses.replace(cfg, attention=sparse, batch=1, student_every=1, ramp_interval=0)
    if args.size == "toy":
        cfg, latent = dataclasses.replace(cfg, bf16=False, frames=9), (4, 6)
    run = make_run(args, cfg, latent)
    exits = [run.cfg.exit_step(n) for n in range(60)]
    numbers = [exits.index(i) for i in args.exits or range(len(run.cfg.sampler.sigmas))]
    sparse, topk = run.cfg.attention, run.cfg.critic_topk
    modes = {"sparse": (sparse, 1.0), "dense": (AttentionConfig(mode="dense"), 1.0)}
    if topk < 1:
        modes["sparse, critic too"] = sparse, topk
    found = {}
    for name, chosen in modes.items():
        run.use_attention(*chosen)
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with best_attention(torch.device(args.device)):
            found[name] = measure_mode(run, numbers, args.device)
        print(name, "  ".join(f"{k} {v:.3f}" for k, v in found[name].items()), flush=True)
    ratios = {
        name: {k: found["dense"][k] / found[name][k] for k in ("step_s", "student_s")}
        for name in found
        if name != "dense"
    }
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    result = {"size": args.size, "frames": run.cfg.frames, "latent": latent, "device": device,
              "torch": torch.__version__, "set": args.set, "dense_over_sparse": ratios} | found  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "step.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, over in ratios.items():
        print("dense over", name, "  ".join(f"{k} {v:.2f}" for k, v in over.items()))


def measure_mode(run: Any, numbers: list[int], device: str) -> dict[str, float]:
    """Seconds of a whole step and of rollout and replay alone, means over the exits; GiB at most."""

    def step(n: int) -> None:
        run.step_number = n
        values = run.step()
        if not values["critic_loss"] >= 0 or not values["student_norm"] > 0:
            raise FloatingPointError(f"a step gave {values}: its time means nothing")

    def student(n: int) -> None:
        rows = run.prompts.batch([0], run.device)
        run.memory.reset()
        quick = run.quick(rows)
        made = dmd.roll(
            run.student,
            run.memory,
            rows,
            run.cfg.sampler_at(n),
            (1, *run.shape),
            0,
            run.cfg.frames,
            (n,),
            quick,
        )
        run.memory.reset()
        dmd.replay(run.student, run.memory, rows, made, made.clip / made.clip.numel(), quick=quick)
        run.student_optimizer.zero_grad()

    for n in (numbers[-1], numbers[-1], *numbers[:-1]):
        step(n)
    peak = module("training.metrics").peak_gib
    whole = sum(timed(lambda n=n: step(n), device) for n in numbers) / len(numbers)
    parts = sum(timed(lambda n=n: student(n), device) for n in numbers) / len(numbers)
    return {"step_s": whole, "student_s": parts, "peak_gib": peak(device)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("train", "cost", "step"))
    parser.add_argument("--config", type=Path, help="JSON file of a stage and its fields")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="any field of the stage")
    for name in ("student", "critic", "teacher", "vae"):
        parser.add_argument(f"--{name}", type=Path, help="of train: a Wan checkpoint")
    parser.add_argument("--rows", type=Path, help="of train: the prompts' text rows")
    parser.add_argument("--out", type=Path, default=Path("output/dmd"))
    parser.add_argument("--until", type=int, help="of train: stop at this step")
    parser.add_argument("--latent", type=int, nargs=2, default=[60, 104], help="latent height and width")
    parser.add_argument("--size", default="1.3B", choices=("toy", *cost.WIDTHS))
    parser.add_argument("--teacher-size", default="1.3B", choices=tuple(cost.WIDTHS))
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--tflops", type=float, default=350.0, help="of cost: sustained by one GPU")
    parser.add_argument("--block-tokens", type=int, default=128, help="of step: tokens of a page")
    parser.add_argument("--exits", type=int, nargs="+", help="of step: exit steps to time; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    missing = [n for n in ("student", "critic", "teacher", "rows") if getattr(args, n) is None]
    if args.what == "train" and missing:
        parser.error(f"train needs {', '.join('--' + name for name in missing)}")
    {"train": train, "cost": show_cost, "step": time_step}[args.what](args)


if __name__ == "__main__":
    main()
