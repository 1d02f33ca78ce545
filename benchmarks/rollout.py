"""How fast is a rollout, does its memory stay constant, does a chunk's latency stay flat?

    python benchmarks/rollout.py --model world --minutes 10      a long rollout of the embedded world model
    python benchmarks/rollout.py --model 1.3b                    Wan's size with random weights: where the time goes
    python benchmarks/rollout.py --model 14b --quick
    python benchmarks/rollout.py --model tiny --device cpu       tries the script without a GPU

`world`: latency per chunk (decoding left out), bytes of the memory after every chunk, and the ratio of the last tenth
of the chunks to the first tenth after the memory has filled.

`1.3b`, `14b`: 480x832, bfloat16, batch 1, chunks of 3 latent frames (12 video frames), 4 steps and a clean pass. Modes:
    reference   a plain eager loop with a growing cache, as Self-Forcing's inference is written; 21 frames at most
    dense       the fast pass over the same 21 frames
    window      the fast pass over 12 frames, 3 of them the sink
    sparse      the fast pass with persistent memory: 6 frames in full, 25 % of a window of 6
    sparse@128  the same in blocks of 128 tokens instead of 64
    sparse@128:fp8+router_once    with options of `FastOptions`, joined by +; dense: and window: take fp8
    sparse:offload        pages in the host's memory, a layer at a time on the device
    sparse:novelty+page_bits8+quarters    blocks kept by novelty, finished pages in 8 bits, chosen by their quarters
    sparse:composable, sparse:eager    without fused kernels; without graphs
Every mode runs a 5 s video from an empty memory and then goes on in the steady state, both after warm-up streams, for
20 s and 60 s too where --steady is long enough (72 chunks for 60 s); one steady chunk is profiled with graphs off, and
what kernels do not account for is called idle. Before that, the first pass is compared with the reference's: no
speed-up is given for a mode that is too far off. A mode that fails is reported and the others go on. Writes
rollout.json and rollout.png to --out.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
import traceback
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from _root import load_pack
from PIL import Image, ImageDraw
from torch import Tensor

PACK = load_pack().__name__
core = {
    name: import_module(f"{PACK}.sparse_attn.{name}")
    for name in ("config", "fast", "frame_queue", "pipeline", "rollout", "state", "tiny_vae", "vae", "wan")
}
AttentionConfig, SamplerConfig = core["config"].AttentionConfig, core["config"].SamplerConfig
fast, stream, wan = core["fast"], core["rollout"].stream, core["wan"]
Request, VideoPipeline, new_memory = (
    getattr(core["pipeline"], name) for name in ("Request", "VideoPipeline", "new_memory")
)

FPS = 16
LENGTHS = (5, 20, 60, 600)  # seconds of video
COLOURS = {
    "sparse": (214, 69, 65),
    "window": (52, 120, 200),
    "dense": (90, 90, 90),
    "reference": (200, 150, 40),
}
PROMPT = "a large red circle bouncing and a small white star standing still over a navy plain background"
IDEAL_FLOPS = 790e12  # a large bfloat16 product on one H200
AGREES = 0.05  # relative error of the first pass against the reference; bfloat16 alone is about 0.01
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace that keep the device busy
BESIDE = ("copies", "decode")  # parts that may run beside the others: copies over the bus, and decoding
PARTS = {
    "linear": (52, 120, 200),
    "attention": (214, 69, 65),
    "router": (150, 80, 170),
    "element-wise": (90, 170, 90),
    "other": (180, 180, 180),
    "idle": (230, 230, 230),
    "copies": (120, 190, 190),
    "decode": (220, 190, 120),
}


@dataclass(frozen=True)
class Size:
    """A backbone, and the video it makes: sides in pixels, a chunk in latent frames."""

    dim: int
    ffn: int
    heads: int
    layers: int
    height: int = 480
    width: int = 832
    chunk: int = 3

    @property
    def grid(self) -> tuple[int, int]:
        return self.height // 16, self.width // 16

    @property
    def frame_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def chunk_flop(self, keys: float, passes: int, text: int = 512) -> float:
        """Products of one chunk whose queries read `keys` keys in self-attention."""
        rows = self.chunk * self.frame_tokens
        linear = 2 * rows * (6 * self.dim**2 + 2 * self.dim * self.ffn)
        return self.layers * passes * (linear + 4 * rows * (keys + text) * self.dim)


SIZES = {
    "1.3b": Size(1536, 8960, 12, 30),
    "14b": Size(5120, 13824, 40, 40),
    "tiny": Size(128, 256, 2, 2, height=80, width=112),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=("world", *SIZES), default="world")
    add("--minutes", type=float, default=10.0, help="of video, for --model world")
    add("--modes", nargs="+", help="default: sparse for world, else reference dense window sparse sparse@128")
    add("--steady", type=int, default=12, help="chunks measured after the memory has filled")
    add("--quick", action="store_true", help="fewer chunks, no decoding, no profile")
    add("--pixels", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="of the video, multiples of 16")
    add("--batch", type=int, default=1)
    add("--decode", choices=("wan", "tiny", "none"), default="wan")
    add("--topk", type=float, default=0.25, help="of mode sparse")
    add("--words", type=int, default=128, help="rows of the 512 that the prompt fills; the rest is zero")
    add("--positions", choices=("absolute", "rebased"), default="absolute")
    add("--no-graphs", action="store_true")
    add("--device", default="auto")
    add("--threads", type=int, help="CPU threads; 1 is the steadiest")
    add("--out", type=Path, default=Path("build/rollout"))
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    device = core["pipeline"].pick_device(args.device)
    found = describe(device, args)
    if args.model == "world":
        pipeline = VideoPipeline.load(args.device)
        found["modes"] = {mode: measure(pipeline, mode, args.minutes) for mode in args.modes or ["sparse"]}
        plot(found["modes"], args.out / "rollout.png")
    else:
        FullSize(args, device, found).run()
    (args.out / "rollout.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {args.out / 'rollout.json'} and rollout.png")


def describe(device: torch.device, args: argparse.Namespace) -> dict:
    """What is run where; printed, and the head of the JSON."""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    try:
        versions["triton"] = import_module("triton").__version__
    except ImportError:
        versions["triton"] = "not installed"
    backends = import_module(f"{PACK}.kernels").backend_report()
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    facts = {"device": device_name(device), **versions, "cuda": torch.version.cuda, "backends": backends}
    facts |= {"settings": settings, "command": " ".join(sys.argv), "date": time.strftime("%Y-%m-%d %H:%M")}
    print(json.dumps(facts, indent=1), flush=True)
    return facts


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


# --- full size, random weights ----------------------------------------------------------------------------------------


class FullSize:
    """The modes of one model size, one after the other in one process; results go into `found` as they come."""

    def __init__(self, args: argparse.Namespace, device: torch.device, found: dict):
        self.args, self.device, self.found = args, device, found
        self.size, self.sampler = SIZES[args.model], SamplerConfig()
        if args.pixels:
            self.size = replace(self.size, height=args.pixels[0], width=args.pixels[1])
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.steady = 4 if args.quick else args.steady
        self.first_flow: Tensor | None = None  # the reference's, by which other modes are judged

    def run(self) -> None:
        found, modes = self.found, {}
        with torch.no_grad():
            self.model = random_model(self.size, self.device, self.dtype)
            text = torch.randn(1, 512, 4096, generator=torch.Generator().manual_seed(1))
            text[:, self.args.words :] = 0  # as the text encoder leaves what is behind a prompt's end
            self.cross_kv = self.model.cross_kv(text.expand(self.args.batch, -1, -1).to(self.device))
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        found |= {"weight_bytes": weights, "modes": modes}
        print(f"{self.args.model}: {weights / 2**30:.2f} GiB of weights", flush=True)
        for mode in self.args.modes or ["reference", "dense", "window", "sparse", "sparse@128"]:
            began = time.monotonic()
            try:
                modes[mode] = self.measure(mode)
            except Exception as error:  # one mode that does not fit or compile must not cost the others
                traceback.print_exc()
                modes[mode] = {"error": f"{type(error).__name__}: {str(error).strip()[:400]}"}
            modes[mode]["took_s"] = round(time.monotonic() - began, 1)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            say(mode, modes[mode])
            (self.args.out / "rollout.json").write_text(json.dumps(found, indent=1) + "\n")
        if not self.args.quick and self.args.decode != "none":
            self.measure_decode(modes)
        summary(modes)
        plot_split({mode: facts for mode, facts in modes.items() if "steady" in facts}, self.args.out)

    def measure(self, mode: str) -> dict:
        """One mode: agreement, 5 s from empty, steady state, memory, split of the time."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = memory_now(self.device)
        run, memory, keys = self.build(mode)
        facts: dict = {"cache_bytes": memory.nbytes}
        began = time.perf_counter()
        facts["error_to_reference"] = self.compare(mode, run, memory)
        facts["first_pass_s"] = time.perf_counter() - began  # kernels are compiled here, if nothing kept them
        fill = 21 // self.size.chunk + 2  # by then every mode's memory is full, and its graph captured
        self.roll(run, memory, 2 if mode == "reference" else fill)
        if mode != "reference":  # the second stream captures the graphs of what the first one met
            self.roll(run, memory, fill)
        times = self.roll(run, memory, fill + self.steady, keep=True)
        frames = 4 * self.size.chunk
        facts["mean_fps"] = {
            f"{seconds} s": (frames * chunks - 3) / sum(times[:chunks]) * 1000
            for seconds in LENGTHS
            if (chunks := round(seconds * FPS / frames)) <= len(times)
        }
        steady = times[fill:]
        p50 = statistics.median(steady)
        passes = len(self.sampler.sigmas) + 1
        flop = self.size.chunk_flop(keys, passes)
        facts["steady"] = {
            "p50_ms": p50, "p95_ms": statistics.quantiles(steady, n=20, method="inclusive")[-1],
            "fps": frames / p50 * 1000, "chunk_ms": times, "keys": keys,
            "ideal_ms": flop / IDEAL_FLOPS * 1000, "of_ideal": flop / IDEAL_FLOPS * 1000 / p50,
            "last_to_first": last_to_first(steady), "cache_bytes_at_end": memory.nbytes,
        }  # fmt: skip
        if self.device.type == "cuda":
            facts["peak_bytes"] = torch.cuda.max_memory_allocated()
            facts["peak_bytes_of_mode"] = facts["peak_bytes"] - before
        if isinstance(run, fast.FastPass):
            facts["graphs"] = {name: str(value) for name, value in run.describe().items()}
        if not self.args.quick and self.device.type == "cuda":
            facts["split_ms"], facts["top_kernels_ms"] = self.split(run, memory, p50)
        return facts

    def build(self, mode: str) -> tuple[Callable, object, float]:
        """(pass, its memory, keys that a query reads in the steady state)."""
        name, _, extras = mode.partition(":")
        name, _, block_tokens = name.partition("@")
        size, args = self.size, self.args
        if name == "reference":
            loop = EagerLoop(self.model, size, 21, args.batch, self.device, self.dtype)
            return loop, loop, 21 * size.frame_tokens
        attention = {
            "dense": AttentionConfig(mode="window", window_frames=21, sink_frames=0),
            "window": AttentionConfig(mode="window", window_frames=12, sink_frames=3),
            "sparse": AttentionConfig(topk=args.topk, block_tokens=int(block_tokens or 64)),
        }[name]
        attention = replace(attention, positions=args.positions)
        extras = {extra for extra in extras.split("+") if extra}
        if name == "sparse":
            keep = "novelty" if "novelty" in extras else "attention"
            bits, router = 8 if "page_bits8" in extras else 16, "quarters" if "quarters" in extras else "mean"
            away = "offload" in extras
            attention = replace(attention, keep=keep, page_bits=bits, router=router, offload_pages=away)
            extras -= {"novelty", "page_bits8", "quarters", "offload"}
        plain = {"composable", "eager"} & extras
        options = fast.FastOptions(
            graphs=not (args.no_graphs or plain), **dict.fromkeys(extras - plain, True)
        )
        memory = core["state"].StreamState(
            layers=size.layers, heads=size.heads, head_dim=size.dim // size.heads, grid=size.grid,
            chunk_frames=size.chunk, attention=attention, batch=args.batch, dtype=self.dtype, device=self.device,
            share_open=True,
        )  # fmt: skip
        if "composable" in extras:
            run, why = fast.ComposablePass(self.model, memory), "composable pass: asked for"
        else:
            run, why = fast.choose_pass(self.model, memory, options)
        print(f"{mode}: {why}", flush=True)
        keys = attention.window_frames * size.frame_tokens
        if name == "sparse":
            read = attention.persistent_frames + attention.topk * attention.window_frames
            keys = read * size.frame_tokens
        return run, memory, keys

    def compare(self, mode: str, run: Callable, memory) -> float | None:
        """Relative error of the first pass over an empty memory against the reference's."""
        size = self.size
        shape = (self.args.batch, 16, size.chunk, size.height // 8, size.width // 8)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(self.device)
        memory.begin_chunk(size.chunk)
        flow = run(x, 1.0, self.cross_kv).float()
        memory.reset()
        if mode == "reference":
            self.first_flow = flow
        wait(self.device)
        if self.first_flow is None:
            return None
        return float((flow - self.first_flow).norm() / self.first_flow.norm())

    def chunks(self, run: Callable, memory, count: int) -> Iterator:
        """The chunks of a stream from an empty memory."""
        size = self.size
        memory.reset()
        yield from stream(
            fast.denoiser(run, self.cross_kv), memory, self.sampler,
            shape=(self.args.batch, 16, size.height // 8, size.width // 8), total_frames=count * size.chunk,
            device=self.device,
        )  # fmt: skip

    def roll(self, run: Callable, memory, chunks: int, keep: bool = False) -> list[float]:
        """Milliseconds of each chunk of a stream from an empty memory; with `keep` the memory is left as it is."""
        times = [done.seconds * 1000 for done in self.chunks(run, memory, chunks)]
        if not keep:
            memory.reset()
        return times

    def split(self, run: Callable, memory, p50: float) -> tuple[dict[str, float], dict[str, float]]:
        """Milliseconds of a steady chunk by what the device does, and of its longest kernels; the memory stays full."""
        if isinstance(run, fast.FastPass):
            run = fast.FastPass(replace_graphs(run.prepared), memory)

        def chunk() -> None:
            memory.begin_chunk(self.size.chunk)
            x = torch.zeros(self.args.batch, 16, self.size.chunk, self.size.height // 8, self.size.width // 8)
            x = x.to(self.device)
            memory.noisy = True
            for sigma in self.sampler.sigmas:
                run(x, sigma, self.cross_kv)
            memory.noisy = False
            run.remember(x, self.cross_kv)
            memory.end_chunk()

        chunk()
        events = trace(chunk, self.device)
        times = attribute(events)
        busy = sum(ms for part, ms in times.items() if part not in BESIDE)
        return times | {"idle": max(0.0, p50 - busy)}, longest_kernels(events)

    def measure_decode(self, modes: dict) -> None:
        """Decoding one chunk after another by itself, and beside the making of the next one, with random weights."""
        size = self.size
        try:
            with torch.no_grad(), building(self.device, self.dtype):
                self.decoder = self.new_decoder()
            latent = torch.randn(self.args.batch, 16, size.chunk, size.height // 8, size.width // 8)
            times = [self.decode(latent.to(self.device, self.dtype)) for _ in range(4)]
        except Exception as error:
            traceback.print_exc()
            self.found["decode"] = {"error": f"{type(error).__name__}: {str(error).strip()[:400]}"}
            return
        per_chunk = statistics.median(times[1:])
        self.found["decode"] = {"decoder": self.args.decode, "chunk_ms": per_chunk}
        print(f"decode ({self.args.decode}): {per_chunk:.0f} ms a chunk by itself", flush=True)
        for mode, facts in modes.items():
            if "steady" not in facts:
                continue
            if "split_ms" in facts:
                facts["split_ms"]["decode"] = per_chunk
            facts["steady"]["fps_with_decode"] = (
                4 * size.chunk / (facts["steady"]["p50_ms"] + per_chunk) * 1000
            )
            if mode != "reference":
                facts["streamed"] = self.streamed(mode)
                print(f"{mode}, decoded beside: {facts['streamed']}", flush=True)

    def new_decoder(self):
        if self.args.decode == "tiny":
            return core["tiny_vae"].TinyDecoder().stream_decoder()
        return core["vae"].WanVAE(96 if self.args.model != "tiny" else 16).stream_decoder()

    @torch.no_grad()
    def decode(self, latent: Tensor) -> float:
        """Milliseconds until the frames of a chunk are bytes on the host."""
        began = time.perf_counter()
        video = self.decoder.push(latent)
        ((video.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
        return (time.perf_counter() - began) * 1000

    def streamed(self, mode: str) -> dict:
        """Frames on the host while the next chunk is made, as the product decodes: beside it."""
        size = self.size
        run, memory, _ = self.build(mode)
        fill = 21 // size.chunk + 2
        for _ in range(2):  # compiles and captures
            self.roll(run, memory, fill)
        self.decoder.reset()

        def decode(latent: Tensor) -> tuple[Tensor]:
            return (((self.decoder.push(latent).clamp(-1, 1) + 1) * 127.5).round().byte(),)

        shown, began = [], time.perf_counter()
        with torch.no_grad(), core["frame_queue"].FrameQueue(self.device) as queue:
            for chunk in self.chunks(run, memory, fill + self.steady):
                latent = chunk.latent.to(self.device, self.dtype)
                queue.submit(partial(decode, latent), lambda _frames: shown.append(time.perf_counter()))
                queue.wait_for_room()
            queue.settle()
        steady = [1000 * (b - a) for a, b in pairwise(shown[fill - 1 :])]
        p50 = statistics.median(steady)
        return {
            "chunk_ms": p50, "fps": 4 * size.chunk / p50 * 1000, "first_frame_s": shown[0] - began,
        }  # fmt: skip


def replace_graphs(prepared):
    """The same weights, for a pass without graphs: in a graph, a kernel cannot be told by who launched it."""
    other = object.__new__(type(prepared))
    vars(other).update(vars(prepared) | {"options": replace(prepared.options, graphs=False)})
    return other


class EagerLoop:
    """The backbone as Self-Forcing's inference runs it: pass, memory and all.

    Everything eager; RMSNorm and LayerNorm in float32 with casts; RoPE as products of float64 complex numbers built
    anew in every layer; one projection each for q, k and v; a cache that grows to `frames` and is then rolled by
    copying. Attention is PyTorch's, by cuDNN where it can, the fastest dense one there is here.
    """

    def __init__(self, model, size: Size, frames: int, batch: int, device: torch.device, dtype: torch.dtype):
        self.model, self.size = model, size
        shape = (batch, frames * size.frame_tokens, size.heads, size.dim // size.heads)
        self.k, self.v = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(size.layers)] for _ in "kv"
        )
        head = shape[3]
        sizes = (head - 4 * (head // 6), 2 * (head // 6), 2 * (head // 6))
        place = torch.arange(1024, dtype=torch.float64)
        self.freqs = [
            torch.polar(
                torch.ones(1024, n // 2, dtype=torch.float64),
                torch.outer(place, 1e4 ** -(torch.arange(0, n, 2, dtype=torch.float64) / n)),
            ).to(device)
            for n in sizes
        ]
        self.reset()

    def reset(self) -> None:
        self.frame = self.filled = self.new = 0

    def begin_chunk(self, frames: int) -> None:
        self.new = frames * self.size.frame_tokens
        room = self.k[0].shape[1]
        excess = self.filled + self.new - room
        if excess > 0:
            for pool in (*self.k, *self.v):
                pool[:, : room - self.new] = pool[:, excess : self.filled].clone()
            self.filled -= excess

    def end_chunk(self) -> None:
        self.frame += self.new // self.size.frame_tokens
        self.filled += self.new

    @property
    def nbytes(self) -> int:
        return sum(pool.numel() * pool.element_size() for pool in (*self.k, *self.v))

    def remember(self, x_BCFHW: Tensor, cross_kv) -> None:
        """The whole pass, as there."""
        self(x_BCFHW, 0.0, cross_kv)

    @torch.no_grad()
    def __call__(self, x_BCFHW: Tensor, sigma: float, cross_kv) -> Tensor:
        model, frames = self.model, x_BCFHW.shape[2]
        ranges = fast.named_range
        x = model.patch_embedding(x_BCFHW.to(model.dtype)).flatten(2).transpose(1, 2)
        t = wan.frame_timesteps(sigma, x.shape[0], frames, x.device)
        e = model.time_embedding(wan.timestep_embedding(t, model.freq_dim).to(model.dtype))
        e0 = model.time_projection(e).unflatten(2, (6, -1))
        for layer, block in enumerate(model.blocks):
            with ranges("element-wise"):
                m = (block.modulation[:, None] + e0).chunk(6, dim=2)
                y = self.modulated(x, block.norm1, m[0], m[1], frames)
            y = self.self_attention(layer, block.self_attn, y, frames)
            with ranges("element-wise"):
                x = x + (y.unflatten(1, (frames, -1)) * m[2]).flatten(1, 2)
                y = layer_norm(x, block.norm3)
            x = x + self.cross_attention(block.cross_attn, y, cross_kv[layer])
            with ranges("element-wise"):
                y = self.modulated(x, block.norm2, m[3], m[4], frames)
            with ranges("linear"):
                y = block.ffn(y)
            with ranges("element-wise"):
                x = x + (y.unflatten(1, (frames, -1)) * m[5]).flatten(1, 2)
        m = (model.head.modulation[:, None] + e[:, :, None]).chunk(2, dim=2)
        patches = model.head.head(self.modulated(x, model.head.norm, m[0], m[1], frames))
        height, width = self.size.grid
        grid = patches.view(x.shape[0], frames, height, width, 2, 2, -1)
        return torch.einsum("bfhwpqc->bcfhpwq", grid).reshape(x_BCFHW.shape).to(x_BCFHW.dtype)

    def self_attention(self, layer: int, own, x: Tensor, frames: int) -> Tensor:
        ranges = fast.named_range
        with ranges("linear"):
            q, k, v = own.q(x), own.k(x), own.v(x)
        with ranges("element-wise"):
            q, k = (
                self.rotate(rms_norm(y, n).unflatten(2, (own.heads, -1)), frames)
                for y, n in ((q, own.norm_q), (k, own.norm_k))
            )
            stop = self.filled + self.new
            self.k[layer][:, self.filled : stop] = k
            self.v[layer][:, self.filled : stop] = v.unflatten(2, (own.heads, -1))
        with ranges("attention"), fast.best_attention(x.device):
            y = core["state"].sdpa(q, self.k[layer][:, :stop], self.v[layer][:, :stop])
        with ranges("linear"):
            return own.o(y.flatten(2))

    def cross_attention(self, cross, x: Tensor, kv: tuple[Tensor, Tensor]) -> Tensor:
        ranges = fast.named_range
        with ranges("linear"):
            q = cross.q(x)
        with ranges("element-wise"):
            q = rms_norm(q, cross.norm_q).unflatten(2, (cross.heads, -1))
        with ranges("attention"), fast.best_attention(x.device):
            y = core["state"].sdpa(q, *kv)
        with ranges("linear"):
            return cross.o(y.flatten(2))

    def rotate(self, x: Tensor, frames: int) -> Tensor:
        height, width = self.size.grid
        parts = (
            self.freqs[0][self.frame : self.frame + frames].view(frames, 1, 1, -1),
            self.freqs[1][:height].view(1, height, 1, -1),
            self.freqs[2][:width].view(1, 1, width, -1),
        )
        freqs = torch.cat([p.expand(frames, height, width, -1) for p in parts], dim=-1).flatten(0, 2)
        turned = torch.view_as_complex(x.to(torch.float64).unflatten(3, (-1, 2))) * freqs[:, None]
        return torch.view_as_real(turned).flatten(3).type_as(x)

    @staticmethod
    def modulated(x: Tensor, norm, shift: Tensor, scale: Tensor, frames: int) -> Tensor:
        return (layer_norm(x, norm).unflatten(1, (frames, -1)) * (1 + scale) + shift).flatten(1, 2)


def layer_norm(x: Tensor, norm) -> Tensor:
    weight, bias = (None if p is None else p.float() for p in (norm.weight, norm.bias))
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, norm.eps).type_as(x)


def rms_norm(x: Tensor, norm) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)).type_as(x) * norm.weight


@contextmanager
def building(device: torch.device, dtype: torch.dtype):
    """New tensors are of this dtype, on this device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def random_model(size: Size, device: torch.device, dtype: torch.dtype):
    """A backbone of that size with random weights, drawn on the device and in its dtype: 14B fit only once."""
    torch.manual_seed(0)
    with building(device, dtype):
        model = wan.WanModel(dim=size.dim, ffn_dim=size.ffn, num_heads=size.heads, num_layers=size.layers)
    return model.requires_grad_(False)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_now(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


# --- where the time goes ----------------------------------------------------------------------------------------------


def trace(run: Callable[[], None], device: torch.device) -> list[dict]:
    """The complete events of a Chrome trace of `run`."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        wait(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


def longest_kernels(events: list[dict], count: int = 15) -> dict[str, float]:
    """Milliseconds by kernel, the longest in sum first; names are cut short."""
    times: dict[str, float] = {}
    for event in events:
        if event.get("cat") in KERNELS:
            name = event["name"][:80]
            times[name] = times.get(name, 0.0) + event["dur"] / 1000
    return dict(sorted(times.items(), key=lambda item: -item[1])[:count])


def attribute(events: list[dict]) -> dict[str, float]:
    """Milliseconds of kernels by the named range in which each was launched; trace times are microseconds."""
    ranges = sorted(
        (e["ts"], e["ts"] + e["dur"], e["name"])
        for e in events
        if e.get("cat") == "user_annotation" and e["name"] in PARTS
    )
    starts = [start for start, _, _ in ranges]
    launches = {
        e["args"]["correlation"]: e["ts"]
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }
    times = dict.fromkeys((part for part in PARTS if part not in ("idle", "decode")), 0.0)
    for event in events:
        if event.get("cat") not in KERNELS:
            continue
        if "HtoD" in event["name"] or "DtoH" in event["name"]:
            times["copies"] += event["dur"] / 1000
            continue
        launched = launches.get(event.get("args", {}).get("correlation"))
        at = -1 if launched is None else bisect_right(starts, launched) - 1
        inside = at >= 0 and launched <= ranges[at][1]
        times[ranges[at][2] if inside else "other"] += event["dur"] / 1000
    return times


# --- what is said -----------------------------------------------------------------------------------------------------


def say(mode: str, facts: dict) -> None:
    if "error" in facts:
        print(f"{mode}: FAILED, {facts['error']}", flush=True)
        return
    steady = facts["steady"]
    lengths = ", ".join(f"{length} at {fps:.1f} FPS" for length, fps in facts["mean_fps"].items())
    split = ", ".join(f"{part} {ms:.1f}" for part, ms in facts.get("split_ms", {}).items())
    print(
        f"{mode}: steady p50 {steady['p50_ms']:.1f} ms, p95 {steady['p95_ms']:.1f} ms, {steady['fps']:.1f} FPS, "
        f"{100 * steady['of_ideal']:.0f} % of ideal; last tenth {steady['last_to_first']:.3f}x the first; {lengths}; "
        f"cache {facts['cache_bytes'] / 1e9:.2f} GB, peak {facts.get('peak_bytes', 0) / 1e9:.2f} GB"
        + (f"; ms: {split}" if split else "")
        + f"; {facts['took_s']} s",
        flush=True,
    )


def summary(modes: dict[str, dict]) -> None:
    """Speed-ups, sparsity's own first: over our own fused dense modes, then over the reference."""
    for base in ("dense", "window", "reference"):
        if "steady" not in modes.get(base, {}):
            continue
        for mode, facts in modes.items():
            plain = mode == "reference" or (
                mode == "dense" and base == "window"
            )  # say nothing new as a numerator
            if mode == base or plain or "steady" not in facts:
                continue
            error = facts["error_to_reference"]
            if error is not None and not error <= AGREES:
                print(f"{mode} over {base}: not given, its first pass is {error:.3f} off the reference")
                continue
            steady = modes[base]["steady"]["p50_ms"] / facts["steady"]["p50_ms"]
            others = modes[base]["mean_fps"]
            over = {
                length: fps / others[length] for length, fps in facts["mean_fps"].items() if length in others
            }
            facts[f"over_{base}"] = {"steady": steady, **over}
            said = "".join(f", {length} {times:.2f}x" for length, times in over.items())
            print(f"{mode} over {base}: steady {steady:.2f}x{said}")


def plot_split(modes: dict[str, dict], out: Path, size: tuple[int, int] = (900, 420)) -> None:
    """One bar a mode: a steady chunk, by what the device does."""
    if not modes:
        return
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    left, top, bottom = 60, 40, size[1] - 90
    highest = 1.1 * max(
        facts["steady"]["p50_ms"] + sum(facts.get("split_ms", {}).get(part, 0) for part in BESIDE)
        for facts in modes.values()
    )
    step = (size[0] - left - 20) / len(modes)
    for mark in range(6):
        y = bottom - (bottom - top) * mark / 5
        draw.text((8, y - 6), f"{highest * mark / 5:.0f} ms", fill="black")
        draw.line((left, y, size[0] - 20, y), fill=(235, 235, 235))
    for place, (part, colour) in enumerate(PARTS.items()):
        draw.rectangle((left + 102 * place, 10, left + 102 * place + 12, 22), fill=colour)
        draw.text((left + 102 * place + 18, 10), part, fill="black")
    for place, (mode, facts) in enumerate(modes.items()):
        x, y = left + step * place + step * 0.2, float(bottom)
        parts = facts.get("split_ms") or {"other": facts["steady"]["p50_ms"]}
        for part, colour in PARTS.items():
            height = min(y - top, (bottom - top) * parts.get(part, 0.0) / highest)
            draw.rectangle((x, y - height, x + step * 0.6, y), fill=colour)
            y -= height
        name = mode.replace(":", ":\n").replace("+", "\n+")
        said = f"{facts['steady']['fps']:.1f} FPS, {facts['cache_bytes'] / 1e9:.1f} GB"
        draw.text((x, bottom + 6), f"{said}\n{name}", fill="black")
    image.save(out / "rollout.png")


# --- the world model --------------------------------------------------------------------------------------------------


def measure(pipeline: VideoPipeline, mode: str, minutes: float) -> dict:
    """One stream of at least `minutes` of video at 16 frames a second."""
    attention = AttentionConfig(mode=mode, positions=core["config"].positions_in(mode, "rebased"))
    chunk = Request("a").sampler.chunk_frames
    full = (attention.persistent_frames + attention.window_frames) // chunk + 1
    chunks = max(full + 2, -(-round(minutes * 60 * FPS / 4) // chunk))
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
    steady = seconds[full:]
    facts = {
        "chunks": chunks, "video_frames": request.video_frames,
        "last_to_first": last_to_first(steady),
        "p50_ms": 1000 * statistics.median(steady),
        "p95_ms": 1000 * statistics.quantiles(steady, n=20)[-1] if len(steady) > 1 else 1000 * steady[0],
        "bytes": sizes[-1], "bytes_constant": len(set(sizes)) == 1, "seconds": seconds,
    }  # fmt: skip
    print(mode, {k: v for k, v in facts.items() if k != "seconds"}, flush=True)
    return facts


def last_to_first(times: list[float]) -> float:
    """The median of the last tenth over the median of the first tenth."""
    tenth = max(1, len(times) // 10)
    return statistics.median(times[-tenth:]) / statistics.median(times[:tenth])


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
