"""The command line: `generate` makes a video file, `convert` a checkpoint for ComfyUI, `info` says what there is.

Everything the user typed is checked before torch is even imported. A run that is stopped, or that runs out of memory,
leaves a file that plays what was finished.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, get_args

from .config import (
    AttentionConfig,
    Backend,
    Keep,
    Mode,
    PageBits,
    Positions,
    Router,
    SamplerConfig,
    check_size,
    pixel_frames,
    positions_in,
)
from .progress import Progress, size
from .world import ATTENTION
from .world.scene import FPS, SIZE_PX

if TYPE_CHECKING:
    import numpy as np

    from .pipeline import Request, VideoPipeline

VERSION = "0.1.0"
SHEET_FRAMES = 12
LATENT_FPS = FPS // 4  # a latent frame stands for four video frames
WEIGHTS = {"authors": None, "ema": True, "raw": False}  # which set of a training file: its authors', ...
SUCCESS, FAILED, MISUSED, STOPPED = 0, 1, 2, 130  # exit codes


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(MISUSED, f"{self.prog}: {message} (--help lists the options)\n")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C."""
    for output in (sys.stdout, sys.stderr):  # a prompt may hold what an old console cannot show
        if hasattr(output, "reconfigure"):
            output.reconfigure(errors="replace")
    arguments = parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO if arguments.verbose else logging.WARNING)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        return say("Stopped before the first chunk was finished; nothing was written.", STOPPED)


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="sparse-forcing", description="Autoregressive video with persistent sparse memory.")
    top.add_argument("--version", action="version", version=VERSION)
    commands = top.add_subparsers(required=True, metavar="command", parser_class=Parser)
    info = commands.add_parser("info", help="versions, devices, backends, memory for each mode")
    info.set_defaults(run=show_info)
    defaults = argparse.ArgumentDefaultsHelpFormatter
    make = commands.add_parser("generate", help="make a video file", formatter_class=defaults)
    make.set_defaults(run=generate)
    add_video_options(make)
    add_attention_options(make)
    change = commands.add_parser(
        "convert", help="write a checkpoint as a file that ComfyUI opens", formatter_class=defaults
    )
    change.set_defaults(run=convert_file)
    add_convert_options(change)
    for command in (info, make, change):
        command.add_argument("--verbose", action="store_true", help="log what is done")
    return top


def add_video_options(make: argparse.ArgumentParser) -> None:
    add = make.add_argument
    add("--prompt", required=True, help="what the video shows")
    length = make.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, default=5.0, help="length, rounded up to whole chunks")
    length.add_argument(
        "--frames", type=int, help="exact length in video frames, 4 x (latent frames - 1) + 1"
    )
    start = make.add_mutually_exclusive_group()
    start.add_argument("--image", type=Path, help="a picture that the video begins with, fitted to its size")
    start.add_argument(
        "--extend", type=Path, help="a video to go on from; --seconds then counts its frames, too"
    )
    add("--out", type=Path, default=Path("output/video.mp4"), help="the MP4 to write")
    add("--sheet", type=Path, help="also write a contact sheet: a PNG of frames from the whole video")
    add("--seed", type=int, default=0, help="same seed and settings, same video")
    add("--width", type=int, default=SIZE_PX, help="pixels, a multiple of 16")
    add("--height", type=int, default=SIZE_PX, help="pixels, a multiple of 16")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def add_attention_options(make: argparse.ArgumentParser) -> None:
    base, add = ATTENTION, make.add_argument
    add("--mode", choices=get_args(Mode), default=base.mode, help="what self-attention reads")
    add("--window", type=int, default=base.window_frames, help="newest latent frames, the chunk included")
    add("--sink", type=int, default=base.sink_frames, help="first latent frames, never dropped")
    help_text = "latent frames' worth of blocks kept from before the window, sink included"
    add("--persistent", type=int, default=base.persistent_frames, help=help_text)
    add("--topk", type=float, default=base.topk, help="share of the window's blocks that is read")
    add(
        "--dense-first-chunk",
        action=argparse.BooleanOptionalAction,
        default=base.dense_first_chunk,
        help="whether the opening chunk reads all of itself",
    )
    help_text = "what blocks are chosen by: mean as in the paper, or quarters, which finds more for more work"
    add("--router", choices=get_args(Router), default=base.router, help=help_text)
    help_text = "of finished blocks: 8 halves the memory of past frames, at half a percent of error"
    add("--page-bits", type=int, choices=get_args(PageBits), default=base.page_bits, help=help_text)
    help_text = "finished blocks rest in the host's memory: less on the device, slower"
    add("--offload-pages", action="store_true", default=base.offload_pages, help=help_text)
    help_text = "which old blocks stay: those attended to most, or those least like what is newer"
    add("--keep", choices=get_args(Keep), default=base.keep, help=help_text)
    add("--chunk", type=int, default=SamplerConfig().chunk_frames, help="latent frames made at a time")
    help_text = f"rebased: any length; default: {base.positions}, in mode dense absolute"
    add("--positions", choices=get_args(Positions), help=help_text)
    add("--backend", choices=get_args(Backend), default=base.backend, help="attention kernels")


def add_convert_options(change: argparse.ArgumentParser) -> None:
    add = change.add_argument
    add("source", type=Path, help="a .safetensors, .index.json, .pt, .pth or .ckpt file")
    add("target", type=Path, help="the .safetensors file to write")
    add("--lora", type=Path, help="a LoRA of this model, to be merged in")
    add("--weights", choices=tuple(WEIGHTS), default="authors", help="which, of a training file with both")
    add("--dtype", choices=("stored", "bf16", "fp16"), default="stored", help="of the weights")
    add("--force", action="store_true", help="replace an existing file")


# --- generate ---------------------------------------------------------------------------------------------------------


def generate(arguments: argparse.Namespace) -> int:
    """Check, load, then write the video as it is made."""
    try:
        attention, sampler = configs(arguments)
        check_outputs(arguments.out, arguments.sheet)
        given = given_frames(arguments)
        latent_frames = length_of(arguments, sampler.chunk_frames, 0 if given is None else len(given))
    except ValueError as error:
        return say(str(error), MISUSED)

    from .pipeline import Request, VideoPipeline

    request = Request(
        arguments.prompt,
        latent_frames,
        arguments.width,
        arguments.height,
        arguments.seed,
        attention,
        sampler,
        given,
    )
    try:
        request.validate()
        pipeline = VideoPipeline.load(arguments.device)
        pipeline.check(request)
    except ValueError as error:
        return say(str(error), MISUSED)
    except OSError as error:
        return say(str(error), FAILED)
    say(announcement(arguments, pipeline, request))
    return write_video(pipeline, request, arguments.out, arguments.sheet)


def announcement(arguments: argparse.Namespace, pipeline: VideoPipeline, request: Request) -> str:
    """What is about to be made and what it needs; says so when --seconds was rounded up."""
    frames, need, chunks = request.video_frames, pipeline.memory_need(request), request.chunks
    rounded = arguments.frames is None and request.latent_frames != arguments.seconds * LATENT_FPS
    start = f"{arguments.seconds:g} s is rounded up to " if rounded else ""
    if request.given is not None:
        start += f"{len(request.given)} given frame{'s' * (len(request.given) > 1)} and "
    host = f" and {size(need.host)} in the host's memory" if need.host else ""
    pieces = f"{chunks} chunk{'s' * (chunks > 1)} of {request.sampler.chunk_frames} latent frames"
    return (
        f"{start}{pieces}: {frames} video frames, {frames / FPS:.2f} s, {request.width}x{request.height}\n"
        f"mode {request.attention.mode} on {pipeline.device}: {size(need.weights)} of weights, "
        f"{size(need.cache)} of cache{host}, and the activations of one chunk"
    )


def configs(arguments: argparse.Namespace) -> tuple[AttentionConfig, SamplerConfig]:
    attention = AttentionConfig(
        mode=arguments.mode,
        window_frames=arguments.window,
        sink_frames=arguments.sink,
        persistent_frames=arguments.persistent,
        topk=arguments.topk,
        dense_first_chunk=arguments.dense_first_chunk,
        keep=arguments.keep,
        page_bits=arguments.page_bits,
        router=arguments.router,
        offload_pages=arguments.offload_pages,
        positions=arguments.positions or positions_in(arguments.mode, ATTENTION.positions),
        backend=arguments.backend,
    )
    sampler = SamplerConfig(chunk_frames=arguments.chunk)
    sampler.validate()
    attention.validate(sampler.chunk_frames)
    check_size(arguments.width, arguments.height)
    return attention, sampler


def given_frames(arguments: argparse.Namespace) -> np.ndarray | None:
    """What --image or --extend shows, uint8 [1 + 4k, H, W, 3]. Raises ValueError."""
    if arguments.image is None and arguments.extend is None:
        return None
    from .given import read_clip, read_image

    width, height = arguments.width, arguments.height
    if arguments.image is not None:
        return read_image(arguments.image, width, height)
    return read_clip(arguments.extend, width, height, FPS)


def length_of(arguments: argparse.Namespace, chunk_frames: int, given: int = 0) -> int:
    """Latent frames: exactly --frames, or as many whole chunks as --seconds needs behind `given` video frames."""
    if arguments.frames is not None:
        return exact_length(arguments.frames, chunk_frames, given)
    if not (math.isfinite(arguments.seconds) and arguments.seconds > 0):
        raise ValueError(f"--seconds {arguments.seconds} is no length: give more than 0")
    if given >= arguments.seconds * FPS:
        raise ValueError(
            f"--seconds {arguments.seconds:g} counts the whole video, and {given / FPS:.2f} s are given: give more"
        )
    before = (given + 3) // 4
    chunks = math.ceil((arguments.seconds * LATENT_FPS - before) / chunk_frames - 1e-9)
    return before + max(1, chunks) * chunk_frames


def exact_length(frames: int, chunk_frames: int, given: int = 0) -> int:
    """Latent frames of exactly `frames` video frames, `given` of them not made. Raises ValueError naming the nearest
    counts that work."""
    before = (given + 3) // 4
    chunks = (1 + (frames - 1) / 4 - before) / chunk_frames
    below = max(1, math.floor(chunks))
    near = [pixel_frames(before + n * chunk_frames) for n in sorted({below, max(below, math.ceil(chunks))})]
    if frames not in near:
        what = f"is not a whole number of chunks of {chunk_frames} latent frames"
        behind = f" behind the {given} given" if given else ""
        raise ValueError(f"--frames {frames} {what}{behind}: use {' or '.join(map(str, near))}")
    return before + below * chunk_frames


def check_outputs(out: Path, sheet: Path | None) -> None:
    """Refuse names that cannot be written later. An existing video is replaced once the first chunk is ready."""
    for option, path, suffix in (("--out", out, ".mp4"), ("--sheet", sheet, ".png")):
        if path is None:
            continue
        if path.suffix.lower() != suffix:
            raise ValueError(f"{option} {path} must end in {suffix}")
        if path.is_dir():
            raise ValueError(f"{option} {path} is a folder: name a file in it")
        blocked = next(
            (folder for folder in path.absolute().parents if folder.exists() and not folder.is_dir()), None
        )
        if blocked is not None:
            raise ValueError(f"{option} {path} cannot be written: {blocked} is a file, not a folder")


def write_video(pipeline: VideoPipeline, request: Request, out: Path, sheet: Path | None) -> int:
    """Append chunks to the file as they come; whatever ends the run, the file is closed and plays."""
    from .pictures import spread
    from .video import Mp4Writer

    progress = Progress(request.chunks, sys.stderr)
    shown = set(spread(request.video_frames, SHEET_FRAMES)) if sheet else set()
    kept: list = []
    code, why = SUCCESS, ""
    started = time.perf_counter()
    with Mp4Writer(out, FPS) as writer:
        try:
            for chunk in pipeline.generate(request, on_pass=progress.on_pass):
                kept += [frame for i, frame in enumerate(chunk.frames, writer.frames) if i in shown]
                writer.append(chunk.frames)
                if chunk.index >= 0:
                    progress.on_chunk(chunk)
        except KeyboardInterrupt:
            code, why = STOPPED, "Stopped"
        except OSError as error:
            code, why = FAILED, f"Writing failed ({error})"
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            code, why = (
                FAILED,
                "Out of memory: use a smaller size, --window or --persistent, or --mode window. Stopped",
            )
    progress.finish()
    if not writer.frames:
        return say(f"{why} before the first chunk was finished; nothing was written.", code)
    if why:
        say(f"{why} after {progress.done} of {request.chunks} chunks; what was finished is kept.")
    if sheet:
        write_sheet(kept, sheet)
    took = time.perf_counter() - started
    print(f"{out}: {writer.frames} frames, {writer.frames / FPS:.1f} s, made in {took:.1f} s")
    return code


def write_sheet(frames: list, path: Path) -> None:
    import numpy as np

    from .pictures import contact_sheet

    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(np.stack(frames), count=SHEET_FRAMES).save(path)
    print(f"{path}: contact sheet")


def out_of_memory(error: BaseException) -> bool:
    """True for torch's out-of-memory errors, of the GPU and of the CPU's allocator."""
    words = str(error).lower()
    signs = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(sign in words for sign in signs)


# --- convert ----------------------------------------------------------------------------------------------------------


def convert_file(arguments: argparse.Namespace) -> int:
    import torch

    from .checkpoint_error import CheckpointError
    from .convert import convert

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(arguments.dtype)
    try:
        report = convert(
            arguments.source,
            arguments.target,
            lora=arguments.lora,
            ema=WEIGHTS[arguments.weights],
            dtype=dtype,
            force=arguments.force,
        )
    except CheckpointError as error:
        return say(str(error), MISUSED)
    except OSError as error:
        return say(str(error), FAILED)
    for line in report:
        print(line)
    return SUCCESS


# --- info -------------------------------------------------------------------------------------------------------------


def show_info(arguments: argparse.Namespace) -> int:
    """Versions, devices, backends with reasons, the world model, and the cache of each mode."""
    from .report import lines

    for line in lines(VERSION):
        print(line)
    return SUCCESS


def say(message: str, code: int = SUCCESS) -> int:
    print(message, file=sys.stderr, flush=True)
    return code
