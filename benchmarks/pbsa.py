"""PBSA against dense attention and FlexAttention, in one process on one GPU:

    python benchmarks/pbsa.py                  everything, a few minutes; writes build/pbsa/{pbsa.json,pbsa.png}
    python benchmarks/pbsa.py --quick          fewer shapes and repetitions
    python benchmarks/pbsa.py --sweep          every tile shape of the kernels, sorted by time
    python benchmarks/pbsa.py --only forward backward

One chunk of Wan 1.3B at 480x832: about 4,680 query tokens, 12 heads x 128, batch 1, bfloat16, random inputs. Times
are medians of CUDA events with the L2 flushed before each run and the launches queued behind a pause, so that Python's
time does not count. TFLOP/s count attended blocks only. Errors are against float64 on two heads, in root mean square,
and may be 1.2 times those of cuDNN's attention on the same keys; a speed-up is printed only where they are not larger.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from _root import load_pack
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

PACK = load_pack().__name__
kernels = import_module(f"{PACK}.kernels")
BlockLists, attention_mass, pbsa_attention, pool_pages, route, route_parts = (
    getattr(kernels, name)
    for name in ("BlockLists", "attention_mass", "pbsa_attention", "pool_pages", "route", "route_parts")
)

HEADS, DIM, QUERIES = 12, 128, 4680
LAYERS, PASSES = 30, 5
ERROR_LIMIT = 1.2  # times cuDNN's own error


@dataclass
class Case:
    """Full pages, random lists of `count` pages a row; `pair` query blocks share a list."""

    tokens: int
    keys: int
    density: float
    pair: int = 1

    @property
    def label(self) -> str:
        pairs = ", lists of pairs" if self.pair == 2 else ""
        return f"{self.keys} keys, density {self.density:g}, blocks of {self.tokens}{pairs}"

    def build(self, device: torch.device) -> Case:
        draw = torch.Generator(device).manual_seed(0)
        self.blocks = -(-QUERIES // (self.tokens * self.pair)) * self.pair
        self.slots = self.keys // self.tokens
        self.count = max(1, round(self.density * self.slots))
        size = (self.tokens, DIM)

        def normal(n: int) -> Tensor:
            return torch.randn(HEADS, n, *size, generator=draw, device=device).bfloat16()

        self.q, self.k, self.v = normal(self.blocks), normal(self.slots), normal(self.slots)
        self.page_len = torch.full((HEADS, self.slots), self.tokens, dtype=torch.int32, device=device)
        lists = self.blocks // self.pair
        order = torch.rand(HEADS, lists, self.slots, generator=draw, device=device).argsort(-1)
        idx = order[..., : self.count].sort(-1).values.to(torch.int32).contiguous()
        cnt = torch.full((HEADS, lists), self.count, dtype=torch.int32, device=device)
        self.lists = BlockLists(idx, cnt)
        return self

    @property
    def flop(self) -> float:
        """Of the forward pass, attended blocks only."""
        return 4.0 * HEADS * self.blocks * self.count * self.tokens**2 * DIM

    def attend(self, **options) -> tuple[Tensor, Tensor]:
        return pbsa_attention(self.q, self.k, self.v, self.page_len, self.lists, **options)


# ---------------------------------------------------------------------------------------------- measuring


class Clock:
    def __init__(self, device: torch.device, repetitions: int):
        self.flush = torch.empty(2**28, dtype=torch.int8, device=device)  # 256 MiB, five times a Hopper's L2
        self.repetitions = repetitions

    def ms(self, run: Callable[[], object]) -> float:
        """Median time of `run` on the device."""
        for _ in range(3):
            run()
        events = [[torch.cuda.Event(enable_timing=True) for _ in "se"] for _ in range(self.repetitions)]
        for start, end in events:
            self.flush.zero_()
            torch.cuda._sleep(3_000_000)  # almost two milliseconds, in which the host queues what follows
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events)


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


class Report:
    """Rows of one run: printed as they come, written as JSON and as a plot."""

    def __init__(self, folder: Path, device: torch.device):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.rows = folder, []
        self.facts = {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__}
        try:
            self.facts["triton"] = __import__("triton").__version__
        except ImportError:
            self.facts["triton"] = "missing"
        self.facts |= {"python": platform.python_version(), "command": " ".join(sys.argv)}
        print(json.dumps(self.facts), flush=True)

    def add(self, section: str, case: str, what: str, ms: float, flop: float | None = None, **more) -> None:
        row = {"section": section, "case": case, "what": what, "ms": round(ms, 4)}
        if flop is not None:
            row["tflops"] = round(flop / ms / 1e9, 1)
        self.rows.append(row | more)
        rate = f"{row['tflops']:7.1f} TFLOP/s" if flop is not None else " " * 15
        notes = "  ".join(f"{name} {value}" for name, value in more.items())
        print(f"{section:9} {case:52} {what:44} {ms:8.3f} ms {rate}  {notes}", flush=True)
        self.write()

    def write(self) -> None:
        (self.folder / "pbsa.json").write_text(json.dumps(self.facts | {"rows": self.rows}, indent=1) + "\n")

    def plot(self) -> None:
        """A bar for each row that has a rate."""
        from PIL import Image, ImageDraw

        rows = [row for row in self.rows if "tflops" in row]
        if not rows:
            return
        line, left, width = 16, 560, 1000
        image = Image.new("RGB", (width, line * (len(rows) + 2)), "white")
        draw = ImageDraw.Draw(image)
        draw.text((8, 2), f"TFLOP/s on attended blocks, {self.facts['gpu']}", fill="black")
        most = max(row["tflops"] for row in rows)
        for at, row in enumerate(rows, start=1):
            top = at * line + 4
            draw.text((8, top), f"{row['section']}: {row['case']}: {row['what']}", fill="black")
            bar = left + (width - left - 60) * row["tflops"] / most
            draw.rectangle(
                (left, top, bar, top + line - 4), fill="#d2691e" if "pbsa" in row["what"] else "#9aa5b1"
            )
            draw.text((bar + 4, top), f"{row['tflops']:.0f}", fill="black")
        image.save(self.folder / "pbsa.png")


def attempt(what: str, run: Callable[[], object]) -> object:
    """The result of `run`, or None: one part that fails is named, and the rest goes on."""
    try:
        return run()
    except Exception as failure:
        text = str(failure).strip().splitlines()
        print(f"FAILED {what}: {type(failure).__name__}: {text[0] if text else ''}"[:300], flush=True)
        return None


# ---------------------------------------------------------------------------------------------- opponents


def as_sdpa(x: Tensor) -> Tensor:
    """Pages [G, n, T, D] as one sequence [1, G, n * T, D]."""
    return x.flatten(1, 2)[None]


def dense(case: Case, backend: SDPBackend) -> Callable[[], Tensor]:
    q, k, v = (as_sdpa(x) for x in (case.q, case.k, case.v))

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return run


def flex(case: Case, grad: bool = False) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Compiled FlexAttention over the same lists, as whole blocks: no mask function runs. Blocks of 128."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    idx, cnt = case.lists
    padded = torch.zeros(1, HEADS, case.blocks, case.slots, dtype=torch.int32, device=idx.device)
    padded[..., : idx.shape[2]] = idx
    none = torch.zeros_like(cnt)[None]
    mask = BlockMask.from_kv_blocks(
        none, torch.zeros_like(padded), cnt[None], padded, BLOCK_SIZE=case.tokens,
        seq_lengths=(case.blocks * case.tokens, case.keys),
    )  # fmt: skip
    compiled = torch.compile(flex_attention, dynamic=False)
    leaves = [as_sdpa(x).detach().requires_grad_(grad) for x in (case.q, case.k, case.v)]
    return lambda: compiled(*leaves, block_mask=mask), leaves


def sample(x: Tensor) -> Tensor:
    """The first and the last head, which the last wave of programs computes: what errors are measured on."""
    return x[:: HEADS - 1]


def sampled_leaves(case: Case, dtype: torch.dtype, grad: bool = False) -> list[Tensor]:
    return [sample(x).to(dtype).detach().requires_grad_(grad) for x in (case.q, case.k, case.v)]


def true_attention(case: Case, leaves: list[Tensor]) -> Tensor:
    lists = BlockLists(*(sample(x) for x in case.lists))
    return pbsa_attention(*leaves, sample(case.page_len), lists, backend="reference")[0]


def cudnn_attention(case: Case, leaves: list[Tensor]) -> Tensor:
    """The same by cuDNN, over exactly the listed keys. Lists are equally long."""
    heads = []
    for q, k, v, idx in zip(*leaves, sample(case.lists.idx).long()):
        # gathered in float32: with gradients, the sums over what several lists read are then not rounded to bfloat16
        keys, values = (x.float()[idx].flatten(1, 2).to(q.dtype)[:, None] for x in (k, v))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(q.reshape(idx.shape[0], 1, -1, DIM), keys, values)
        heads.append(out.reshape(q.shape))
    return torch.stack(heads)


def truth_and_budget(case: Case) -> tuple[Tensor, float]:
    """Attention in float64, and how far cuDNN is from it."""
    truth = true_attention(case, sampled_leaves(case, torch.float64))
    return truth, rms(cudnn_attention(case, sampled_leaves(case, torch.bfloat16)) - truth)


# ---------------------------------------------------------------------------------------------- sections


def verdict(error: float, cudnn: float) -> dict[str, object]:
    return {"error": f"{error / cudnn:.2f}x cuDNN's", "right": error <= ERROR_LIMIT * cudnn}


def speedup(fast: float, slow: float | None, right: bool) -> str:
    if slow is None:
        return "not measured"
    return f"{slow / fast:.2f}x" if right else "refused: the error test failed"


def bench_forward(case: Case, clock: Clock, report: Report, with_flex: bool) -> None:
    case.build(clock.flush.device)
    truth, cudnn = truth_and_budget(case)
    times = {}
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("FA2", SDPBackend.FLASH_ATTENTION)):
        times[name] = attempt(f"dense {name}", lambda backend=backend: clock.ms(dense(case, backend)))
        if times[name] is not None:
            flop = 4.0 * HEADS * case.blocks * case.tokens * case.keys * DIM
            report.add("forward", case.label, f"dense {name}", times[name], flop)
    if with_flex and case.tokens == 128:
        found = attempt("flex", lambda: clock.ms(flex(case)[0]))
        if found is not None:
            report.add("forward", case.label, "flex", found, case.flop)
    for padding in ("none", "finite", "any"):
        out = attempt(
            f"pbsa {padding}", lambda padding=padding: case.attend(backend="triton", padding=padding)[0]
        )
        if out is None:
            continue
        error = rms(sample(out) - truth) if bool(out.isfinite().all()) else float("nan")
        ms = clock.ms(lambda padding=padding: case.attend(backend="triton", padding=padding))
        notes = verdict(error, cudnn)
        for name, dense_ms in times.items():
            notes[f"over {name}"] = speedup(ms, dense_ms, bool(notes["right"]))
        report.add("forward", case.label, f"pbsa, padding {padding}", ms, case.flop, **notes)


def bench_backward(case: Case, clock: Clock, report: Report, with_flex: bool) -> None:
    """Gradients of everything (FLOP: 2.5 forwards) and of one chunk's pages alone (dQ 1.5, dK and dV their share)."""
    case.build(clock.flush.device)
    draw = torch.Generator(clock.flush.device).manual_seed(1)
    grad_out = torch.randn(case.q.shape, generator=draw, device=case.q.device).bfloat16()

    def gradients(attention: Callable[[Case, list[Tensor]], Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = sampled_leaves(case, dtype, grad=True)
        return list(torch.autograd.grad(attention(case, leaves), leaves, sample(grad_out).to(dtype)))

    truth = gradients(true_attention, torch.float64)
    cudnn = [rms(g - t) for g, t in zip(gradients(cudnn_attention, torch.bfloat16), truth)]
    leaves = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
    if with_flex and case.tokens == 128:

        def flex_backward() -> float:
            run, flex_leaves = flex(case, grad=True)
            out = run()
            return clock.ms(
                lambda: torch.autograd.grad(out, flex_leaves, as_sdpa(grad_out), retain_graph=True)
            )

        ms = attempt("flex backward", flex_backward)
        if ms is not None:
            report.add("backward", case.label, "flex", ms, 2.5 * case.flop)
    chunk = torch.arange(min(case.blocks, case.slots), dtype=torch.int32, device=case.q.device).expand(
        HEADS, -1
    )
    for what, targets, share in (
        ("all pages", None, 1.0),
        ("one chunk's pages", chunk, chunk.shape[1] / case.slots),
    ):

        def backward(targets=targets) -> tuple[float, list[Tensor]]:
            out, _ = pbsa_attention(
                *leaves, case.page_len, case.lists, backend="triton", padding="none", grad_pages=targets
            )
            found = torch.autograd.grad(out, leaves, grad_out, retain_graph=True)
            ms = clock.ms(lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True))
            return ms, [sample(x) for x in found]

        result = attempt(f"pbsa backward, {what}", backward)
        if result is None:
            continue
        ms, found = result
        part = slice(None) if targets is None else slice(0, chunk.shape[1])
        errors = [
            rms(found[0] - truth[0]),
            *(rms(f[:, part] - t[:, part]) for f, t in zip(found[1:], truth[1:])),
        ]
        worst = max(error / budget for error, budget in zip(errors, cudnn))
        report.add(
            "backward", case.label, f"pbsa, {what}", ms, (1.5 + share) * case.flop, **verdict(worst, 1.0)
        )


def bench_router(tokens: int, keys: int, clock: Clock, report: Report) -> None:
    device = clock.flush.device
    draw = torch.Generator(device).manual_seed(0)
    slots, blocks = keys // tokens, -(-QUERIES // tokens)
    q = torch.randn(HEADS, blocks, tokens, DIM, generator=draw, device=device).bfloat16()
    lens = torch.full((HEADS, blocks), tokens, dtype=torch.int32, device=device)
    pooled_k = torch.randn(HEADS, slots, DIM, generator=draw, device=device)
    always, local = split_slots(slots, 4096 // tokens, device)

    def run(pooled_q: Tensor):
        return route(pooled_q, pooled_k, always, local, local.shape[1] // 4, backend="triton")

    label = f"{keys} keys, {blocks} x {slots} blocks of {tokens}"
    pooled_q = pool_pages(q, lens)
    report.add("router", label, "pooling the queries", clock.ms(lambda: pool_pages(q, lens)))
    report.add("router", label, "scores, top-k, lists", clock.ms(lambda: run(pooled_q)))
    report.add("router", label, "pooling, scores, top-k, lists", clock.ms(lambda: run(pool_pages(q, lens))))
    parts = [torch.randn(HEADS, n, 4, DIM, generator=draw, device=device) for n in (blocks, slots)]
    held = [torch.full((HEADS, n, 4), tokens // 4, dtype=torch.int32, device=device) for n in (blocks, slots)]
    by_parts = lambda: route_parts(*parts, *held, always, local, local.shape[1] // 4)  # noqa: E731
    report.add("router", label, "by quarters: scores, softmax, top-k, lists", clock.ms(by_parts))
    every = torch.arange(slots, dtype=torch.int32, device=device).expand(HEADS, blocks, -1)
    lists = BlockLists(every[..., : slots // 5].contiguous(), torch.full_like(every[..., 0], slots // 5))
    k = torch.randn(HEADS, slots, tokens, DIM, generator=draw, device=device).bfloat16()
    full = torch.full((HEADS, slots), tokens, dtype=torch.int32, device=device)
    _, lse = pbsa_attention(q, k, k, full, lists, padding="none", backend="triton")
    ms = clock.ms(lambda: attention_mass(q, k, full, lists, lse))
    report.add("router", label, "exact mass of a fifth of the pages", ms)


def split_slots(slots: int, fixed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    order = torch.randperm(slots, generator=torch.Generator().manual_seed(0)).to(torch.int32).to(device)
    order = order.expand(HEADS, -1)
    return order[:, :fixed].contiguous(), order[:, fixed:].contiguous()


def bench_update(report: Report, device: torch.device) -> float:
    """The memory update of all layers, once a chunk; -> ms."""
    memory, config = (import_module(f"{PACK}.sparse_attn.{name}") for name in ("memory", "config"))
    facts = {"layers": LAYERS, "groups": HEADS, "head_dim": DIM, "grid": (30, 52), "chunk_frames": 3}
    cache = memory.PagedKV(**facts, attention=config.AttentionConfig(), dtype=torch.bfloat16, device=device)
    times, frame = [], 0
    for _ in range(12):
        cache.begin_chunk(frame, 3)
        blocks = cache.chunk.num_blocks
        pages = cache.persistent_slots.shape[-1] + cache.window_slots.shape[-1]
        cache.shares = [torch.rand(HEADS, blocks, pages, device=device) for _ in range(LAYERS)]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
        torch.cuda._sleep(2_000_000)
        start.record()
        cache.end_chunk(frame)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
        frame += 3
    ms = statistics.median(times[5:])
    report.add("update", f"{LAYERS} layers, 12 frames kept", "memory update", ms)
    return ms


def bench_profile(tokens: int, share: float, update_ms: float, clock: Clock, report: Report) -> None:
    """The paper's profile: 65,536 keys, 4,096 of them persistent, a share of the rest; router and update included."""
    case = Case(tokens, 65536, share).build(clock.flush.device)
    always, local = split_slots(case.slots, 4096 // tokens, clock.flush.device)
    lens = torch.full(case.q.shape[:2], tokens, dtype=torch.int32, device=case.q.device)
    pooled_k = pool_pages(case.k, case.page_len)
    keep = max(1, round(share * local.shape[1]))

    def choose() -> BlockLists:
        return route(pool_pages(case.q, lens), pooled_k, always, local, keep, backend="triton")[0]

    def step() -> Tensor:
        return pbsa_attention(
            case.q, case.k, case.v, case.page_len, choose(), backend="triton", padding="none"
        )[0]

    case.lists = choose()
    case.count = always.shape[1] + keep
    truth, cudnn = truth_and_budget(case)
    notes = verdict(rms(sample(step()) - truth), cudnn)
    fa2 = clock.ms(dense(case, SDPBackend.FLASH_ATTENTION))
    router, whole = clock.ms(choose), clock.ms(step)
    total = whole + update_ms / LAYERS / PASSES
    notes["router"] = f"{router / whole:.1%}"
    notes["over FA2"] = speedup(total, fa2, bool(notes["right"]))
    label = f"65536 keys, 4096 persistent, top-k {share:.2%}, blocks of {tokens}"
    report.add("profile", label, "pbsa, router and update", total, **notes)


# ---------------------------------------------------------------------------------------------- sweep


def forward_variants(tokens: int, shared: bool) -> Iterator[tuple]:
    """(kind, rows, keys, warps, stages), the promising ones first, those known for NaN last."""
    rows = (128, 64) if tokens == 128 or shared else (64,)
    keys = (128, 64) if tokens == 128 else (64,)
    for stages in (2, 3) if tokens == 128 or not shared else (3, 4, 6):
        yield "overlapped", rows[0], tokens, 4, stages
    for r, k in itertools.product(rows, keys):
        if r == 128:
            yield from (("specialised", r, k, 4, stages) for stages in (2, 3))
    for r, k, warps, stages in itertools.product(rows, keys, (8, 4), (2, 3)):
        if not (r == 64 and warps == 8):
            yield "descriptors", r, k, warps, stages
    for r, k, warps, stages in itertools.product(rows, (64, 128, 32), (4, 8), (3, 2, 4)):
        if not (r == 64 and warps == 8) and not (k == 128 and stages == 4):
            yield "pointers", r, k, warps, stages
    for r, k in itertools.product(rows, keys):
        if r == 64:
            yield from (("specialised", r, k, 4, stages) for stages in (2, 3))


def sweep_forward(case: Case, padding: str, clock: Clock, report: Report, deadline: float) -> None:
    triton_room = f"{PACK}.kernels.pbsa.triton"
    forward, variants = (import_module(f"{triton_room}.{name}") for name in ("forward", "variants"))
    case.build(clock.flush.device)
    truth, cudnn = truth_and_budget(case)
    shape = variants.shape_of(case.q, case.k, case.v, case.lists.cnt, padding)
    args = (case.q, case.k, case.v, case.page_len, *case.lists, DIM**-0.5, padding)

    def once(variant) -> dict:
        out, lse = forward.launch(variant, *args)
        finite = bool(out.isfinite().all()) and not bool(lse.isnan().any())
        notes = verdict(rms(sample(out) - truth) if finite else float("nan"), cudnn)
        ms = clock.ms(lambda: forward.launch(variant, *args))
        name = variant.name + (f", split for {variant.residents}" if variant.residents else "")
        print(f"  {name:56} {ms:.3f} ms  {notes['error']}", flush=True)
        return {"variant": variant, "name": name, "ms": ms, **notes}

    def try_all(variants_to_try) -> list[dict]:
        rows = []
        for variant in variants_to_try:
            if time.monotonic() > deadline:
                print("the time for the sweep is over", flush=True)
                break
            rows.append(attempt(variant.name, lambda variant=variant: once(variant)))
        return [row for row in rows if row is not None]

    def order(row: dict) -> tuple:
        return not row["right"], row["ms"]

    every = (variants.Variant(*facts) for facts in forward_variants(case.tokens, case.pair > 1))
    found = try_all(variant for variant in every if variant.can(shape))
    best = [row["variant"] for row in sorted(found, key=order)[:3]]
    found += try_all(replace(variant, residents=n) for variant in best for n in (1, 2))
    print(f"sweep, {case.label}, padding {padding}", flush=True)
    for row in sorted(found, key=order):
        notes = {"error": row["error"], "right": row["right"]}
        report.add("sweep", f"{case.label}, {padding}", row["name"], row["ms"], case.flop, **notes)


def backward_tiles(make: Callable, tokens: int) -> Iterator:
    """Tiles of the query or the page kernel."""
    sides = (64, 128) if tokens == 128 else (64,)
    for facts in itertools.product(sides, sides, (8, 4), (2, 3, 1)):
        yield make(*facts)
    if tokens == 64:
        yield from (make(32, 64, 4, stages) for stages in (2, 3))


def sweep_backward(case: Case, clock: Clock, report: Report, deadline: float) -> None:
    """Tiles of the query and of the page kernel, one at a time; `right` where they give what the chosen ones give."""
    backward = import_module(f"{PACK}.kernels.pbsa.triton.backward")
    case.build(clock.flush.device)
    out, lse = case.attend(backend="triton", padding="none")
    every = torch.arange(case.slots, dtype=torch.int32, device=case.q.device).expand(HEADS, -1).contiguous()
    grads = torch.randn_like(out), torch.zeros_like(lse)
    rest = *grads, out, lse, case.q, case.k, case.v, case.page_len, *case.lists
    chosen = backward.tiles_for((9, 0), torch.bfloat16, case.tokens)
    shape = import_module(f"{PACK}.kernels.pbsa.triton.variants").shape_of(
        case.q, case.k, case.v, case.lists.cnt, "none"
    )
    overlapped = backward.overlaps(shape, case.q.device)
    truth = backward.launch(chosen, *rest, every, DIM**-0.5, "none")
    sizes = [rms(x) for x in truth]
    found = []
    for which, targets in (("queries", None), ("pages", every)):
        ways = {}
        if overlapped:
            for held in itertools.product((4,) if which == "queries" else (4, 3, 2), (2, 3, 4)):
                ways[f"{which} overlapped, stages {held}"] = backward.Overlapped(*held)
        for tile in backward_tiles(backward.Tile, case.tokens):
            name = f"{which} {tile.rows}x{tile.keys} warps {tile.warps} stages {tile.stages}"
            ways[name] = (tile, chosen[1]) if which == "queries" else (chosen[0], tile)
        for name, how in ways.items():
            if time.monotonic() > deadline:
                break

            def once(how=how, targets=targets) -> tuple[float, bool]:
                results = backward.launch(how, *rest, targets, DIM**-0.5, "none")
                same = [rms(x - y) / size for x, y, size in zip(results, truth, sizes) if x.numel()]
                run = lambda: backward.launch(how, *rest, targets, DIM**-0.5, "none")  # noqa: E731
                return clock.ms(run), all(off < 0.01 for off in same)

            if (done := attempt(name, once)) is not None:
                found.append((which, *done, name))
    for which, ms, right, name in sorted(found):
        note = "dQ alone" if which == "queries" else "dQ as chosen, and dK, dV"
        flop = (1.5 if which == "queries" else 2.5) * case.flop
        report.add("sweep", f"backward, {case.label}", name, ms, flop, of=note, right=right)


def sweep_router(tokens: int, keys: int, clock: Clock, report: Report, deadline: float) -> None:
    """Tiles of the router's first kernel and warps of its second, each beside what is chosen."""
    router = import_module(f"{PACK}.kernels.pbsa.triton.router")
    device = clock.flush.device
    draw = torch.Generator(device).manual_seed(0)
    slots, blocks = keys // tokens, -(-QUERIES // tokens)
    pooled_q, pooled_k = (torch.randn(HEADS, n, DIM, generator=draw, device=device) for n in (blocks, slots))
    always, local = split_slots(slots, 4096 // tokens, device)

    def run():
        return route(pooled_q, pooled_k, always, local, local.shape[1] // 4, backend="triton")

    kept, expected = (router.SCORE_TILE, router.warps_for), run()[0].idx
    found = [(clock.ms(run), "as chosen", True)]
    tiles = [
        {"ROWS": rows, "SLOTS": wide, "PLACES": places}
        for rows, wide, places in itertools.product((16, 32, 64), (32, 64, 128), (64, 128, 256))
    ]
    plan = [(tile, router.warps_for) for tile in tiles] + [
        (kept[0], lambda _, warps=warps: warps) for warps in (1, 2, 4, 8)
    ]
    for tile, warps in plan:
        if time.monotonic() > deadline:
            break
        router.SCORE_TILE, router.warps_for = tile, warps
        name = " ".join(f"{key} {value}" for key, value in tile.items()) + f", {warps(slots)} warps select"
        same = attempt(name, lambda: (run()[0].idx == expected).float().mean().item())
        if same is not None:
            found.append((clock.ms(run), name, same > 0.999))  # of nearly equal scores either may win
    router.SCORE_TILE, router.warps_for = kept
    for ms, name, right in sorted(found):
        report.add("sweep", f"router, {blocks} x {slots} blocks of {tokens}", name, ms, right=right)


# ---------------------------------------------------------------------------------------------- main


def measure(args: argparse.Namespace, clock: Clock, report: Report) -> None:
    only = set(args.only)
    forward = [Case(128, 32768, 0.2), Case(64, 32768, 0.2)]
    backward = [Case(128, 32768, 0.2)]
    profile = [(128, 0.125)]
    if not args.quick:
        forward += [Case(64, 32768, 0.2, pair=2), Case(128, 32768, 0.1), Case(64, 32768, 0.1)]
        forward += [Case(128, 131072, 0.1), Case(128, 4736, 0.5)]
        backward += [Case(64, 32768, 0.2)]
        profile = list(itertools.product((128, 64), (0.0625, 0.125, 0.25)))
    if "forward" in only:
        for case in forward:
            attempt(case.label, lambda case=case: bench_forward(case, clock, report, not args.no_flex))
    if "backward" in only:
        for case in backward:
            attempt(case.label, lambda case=case: bench_backward(case, clock, report, not args.no_flex))
    if "router" in only:
        for tokens, keys in ((64, 32768), (128, 32768), (64, 131072)):
            attempt("router", lambda tokens=tokens, keys=keys: bench_router(tokens, keys, clock, report))
    update_ms = (
        attempt("update", lambda: bench_update(report, clock.flush.device)) if "update" in only else None
    )
    if "profile" in only:
        for tokens, share in profile:
            run = lambda t=tokens, s=share: bench_profile(t, s, update_ms or 0.0, clock, report)  # noqa: E731
            attempt(f"profile {tokens} {share}", run)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sections = ("forward", "backward", "router", "update", "profile")
    parser.add_argument("--only", nargs="+", choices=sections, default=sections)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repetitions")
    parser.add_argument("--sweep", action="store_true", help="every tile shape instead of the comparison")
    parser.add_argument("--minutes", type=float, default=4.0, help="after which a sweep stops")
    parser.add_argument(
        "--no-flex", action="store_true", help="leave FlexAttention out: it compiles for long"
    )
    parser.add_argument("--out", type=Path, default=Path("build/pbsa"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: this benchmark measures a GPU")
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    device = torch.device("cuda", torch.cuda.current_device())
    report = Report(args.out, device)
    clock = Clock(device, 10 if args.quick else 30)
    if args.sweep:
        deadline = time.monotonic() + 60 * args.minutes
        plan = [(Case(128, 32768, 0.2), "none"), (Case(64, 32768, 0.2), "finite")]
        if not args.quick:
            plan += [(Case(64, 32768, 0.2, pair=2), "finite"), (Case(128, 32768, 0.2), "finite")]
        if "forward" in args.only:
            for case, padding in plan:
                attempt(case.label, lambda c=case, p=padding: sweep_forward(c, p, clock, report, deadline))
        if "backward" in args.only:
            for tokens in (128, 64):
                case = Case(tokens, 32768, 0.2)
                attempt("sweep", lambda case=case: sweep_backward(case, clock, report, deadline))
        if "router" in args.only:
            for tokens in (128, 64):
                attempt("sweep", lambda tokens=tokens: sweep_router(tokens, 32768, clock, report, deadline))
    else:
        measure(args, clock, report)
    attempt("plot", report.plot)
    print(f"wrote {report.folder / 'pbsa.json'}", flush=True)


if __name__ == "__main__":
    main()
