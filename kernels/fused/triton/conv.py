"""Convolutions over [T, H, W, C] on Hopper as matmuls whose rows TMA gathers, written in Gluon.

A program computes `frames` neighbouring output frames of one box of pixels, so that each input box that it loads is
multiplied with up to three taps in time; boxes outside the image arrive as zeros. One warp issues loads, eight warps
multiply. Output channels are two pieces, as 96 = 64 + 32 and 192 = 128 + 64: tiles are powers of two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...sizes import cdiv

fetch = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name until Triton 3.6
put = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@dataclass(frozen=True)
class Plan:
    """Tile of a program: frames x pixels x (channels + more channels), input channels per step, steps in flight."""

    frames: int
    pixels: int
    channels: int
    more: int
    step: int
    stages: int


def plan_for(frames: int, cin: int, cout: int) -> Plan | None:
    """A plan whose tiles divide these channels, or None."""
    pair, step = 2 if frames % 2 == 0 else 1, 32 if cin % 32 == 0 else 16
    for channels, more, stages in ((128, 0, 4), (128, 64, 3), (64, 32, 4), (64, 0, 4), (32, 0, 4)):
        if cin % step == 0 and cout % (channels + more) == 0:
            return Plan(pair, 128, channels, more, step, stages * 32 // step)
    return None


def conv_frames(x: Tensor, weight: Tensor, out: Tensor, plan: Plan | None = None) -> None:
    """Write the convolution of x [T, H, W, I] into out [T', H', W', O], all contiguous, in 16 bits; no bias.

    weight [O, I, kt, kh, kh] or [O, I, kh, kh], channels last. Space is padded by kh // 2, time is not.
    """
    cout, cin, side = weight.shape[0], weight.shape[1], weight.shape[-1]
    times = weight.shape[2] if weight.dim() == 5 else 1
    plan = plan or plan_for(out.shape[0], cin, cout)
    if plan is None:
        raise ValueError(
            f"no tiles divide {cin} to {cout} channels; both must be multiples of 16, {cout} of 32"
        )
    if cin % plan.step or out.shape[0] % plan.frames or cout % (plan.channels + plan.more):
        raise ValueError(f"{plan} does not divide {out.shape[0]} frames of {cin} to {cout} channels")
    width = 16 if out.shape[2] % 16 < 2 else 8
    box = [1, plan.pixels // width, width]
    rows = weight.movedim(1, -1).reshape(cout, -1)  # a view: [O, taps * I]
    more = plan.more or plan.channels
    lines, columns = cdiv(out.shape[1], box[1]), cdiv(out.shape[2], width)
    tiles, pieces = lines * columns, cout // (plan.channels + plan.more)
    with torch.cuda.device_of(x):
        _conv_frames[(tiles * (out.shape[0] // plan.frames) * pieces,)](
            described(x, [*box, plan.step]),
            described(rows, [plan.channels, plan.step]), described(rows, [more, plan.step]),
            described(out, [*box, plan.channels]), described(out, [*box, more]),
            columns, out.shape[0] // plan.frames, pieces,
            CIN=cin, TIMES=times, SIDE=side, LINES=box[1], COLUMNS=width, N=plan.channels, MORE=plan.more,
            K=plan.step, F=plan.frames, STAGES=plan.stages, num_warps=8,
        )  # fmt: skip


def described(x: Tensor, block: list[int]) -> TensorDescriptor:
    """TMA's view of a contiguous tensor in blocks."""
    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[x.dtype]
    swizzle = min(128, 2 * block[-1])
    layout = gl.NVMMASharedLayout(swizzle, element.primitive_bitwidth, len(block))
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


@gluon.jit(do_not_specialize=["columns", "frames", "pieces"])
def _conv_frames(
    x, w, w_more, out, out_more, columns, frames, pieces,
    CIN: gl.constexpr, TIMES: gl.constexpr, SIDE: gl.constexpr, LINES: gl.constexpr, COLUMNS: gl.constexpr,
    N: gl.constexpr, MORE: gl.constexpr, K: gl.constexpr, F: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    BOXES: gl.constexpr = F + TIMES - 1
    SPARE: gl.constexpr = MORE if MORE > 0 else 16
    flat: gl.constexpr = gl.NVMMASharedLayout(2 * K, 16, 2)
    boxes = gl.allocate_shared_memory(x.dtype, [STAGES * BOXES, LINES * COLUMNS, K], flat)
    taps = gl.allocate_shared_memory(x.dtype, [STAGES * TIMES, N, K], flat)
    taps_more = gl.allocate_shared_memory(x.dtype, [STAGES * TIMES if MORE > 0 else 1, SPARE, K], flat)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    fence_async_shared()
    program = gl.program_id(0)
    channel = program % pieces * (N + MORE)
    frame = program // pieces % frames * F
    tile = program // pieces // frames
    place = frame, tile // columns * LINES, tile % columns * COLUMNS, channel
    ring = boxes, taps, taps_more, full, free
    gl.warp_specialize(
        [
            (
                _multiply,
                (out, out_more, ring, place, CIN, TIMES, SIDE, LINES, COLUMNS, N, MORE, K, F, STAGES),
            ),
            (_load, (x, w, w_more, ring, place, CIN, TIMES, SIDE, LINES, COLUMNS, MORE, K, F, STAGES)),
        ],
        [1],
        [24],
    )


@gluon.jit
def _load(
    x, w, w_more, ring, place, CIN: gl.constexpr, TIMES: gl.constexpr, SIDE: gl.constexpr, LINES: gl.constexpr,
    COLUMNS: gl.constexpr, MORE: gl.constexpr, K: gl.constexpr, F: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: for each tap in space and piece of input channels, boxes of F + TIMES - 1 frames and TIMES taps."""
    boxes, taps, taps_more, full, free = ring
    frame, line, column, channel = place
    BOXES: gl.constexpr = F + TIMES - 1
    STEPS: gl.constexpr = CIN // K
    NBYTES: gl.constexpr = BOXES * x.block_type.nbytes + TIMES * w.block_type.nbytes
    MORE_BYTES: gl.constexpr = TIMES * w_more.block_type.nbytes if MORE > 0 else 0
    for i in range(SIDE * SIDE * STEPS):
        stage, phase = i % STAGES, i // STAGES & 1
        tap, k = i // STEPS, i % STEPS * K
        h, v = line + tap // SIDE - SIDE // 2, column + tap % SIDE - SIDE // 2
        ready = full.index(stage)
        mbarrier.wait(free.index(stage), phase ^ 1)  # phase 1 of a new barrier counts as over
        mbarrier.expect(ready, NBYTES + MORE_BYTES)
        for f in gl.static_range(BOXES):
            box = boxes.index(stage * BOXES + f)._reinterpret(x.dtype, [1, LINES, COLUMNS, K], x.layout)
            fetch(x, [frame + f, h, v, k], ready, box)
        for t in gl.static_range(TIMES):
            at = (t * SIDE * SIDE + tap) * CIN + k
            fetch(w, [channel, at], ready, taps.index(stage * TIMES + t))
            if MORE > 0:
                fetch(w_more, [channel + w.block_shape[0], at], ready, taps_more.index(stage * TIMES + t))


@gluon.jit
def _multiply(
    out, out_more, ring, place, CIN: gl.constexpr, TIMES: gl.constexpr, SIDE: gl.constexpr, LINES: gl.constexpr,
    COLUMNS: gl.constexpr, N: gl.constexpr, MORE: gl.constexpr, K: gl.constexpr, F: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Eight warps. Sums a are of the first N channels, b of MORE; 0 and 1 of the first and the second frame."""
    boxes, taps, taps_more, full, free = ring
    frame, line, column, channel = place
    BOXES: gl.constexpr = F + TIMES - 1
    PIXELS: gl.constexpr = LINES * COLUMNS
    SPARE: gl.constexpr = MORE if MORE > 0 else 16
    COUNT: gl.constexpr = TIMES * F * (2 if MORE > 0 else 1)  # matmuls of a step
    a0 = gl.zeros([PIXELS, N], gl.float32, gl.NVMMADistributedLayout([3, 0], [8, 1], [16, N, 16]))
    b0 = gl.zeros([PIXELS, SPARE], gl.float32, gl.NVMMADistributedLayout([3, 0], [8, 1], [16, SPARE, 16]))
    a1, b1 = a0, b0
    for i in range(SIDE * SIDE * (CIN // K)):
        stage = i % STAGES
        mbarrier.wait(full.index(stage), i // STAGES & 1)
        for t in gl.static_range(TIMES):
            tap = taps.index(stage * TIMES + t).permute((1, 0))
            a0 = warpgroup_mma(boxes.index(stage * BOXES + t), tap, a0, is_async=True)
            if F == 2:
                a1 = warpgroup_mma(boxes.index(stage * BOXES + t + 1), tap, a1, is_async=True)
            if MORE > 0:
                tap = taps_more.index(stage * TIMES + t).permute((1, 0))
                b0 = warpgroup_mma(boxes.index(stage * BOXES + t), tap, b0, is_async=True)
                if F == 2:
                    b1 = warpgroup_mma(boxes.index(stage * BOXES + t + 1), tap, b1, is_async=True)
        a0, a1, b0, b1 = _wait(a0, a1, b0, b1, MORE, F, COUNT)  # the step before this one is done
        mbarrier.arrive(free.index((i + STAGES - 1) % STAGES), count=1, pred=i > 0)
    a0, a1, b0, b1 = _wait(a0, a1, b0, b1, MORE, F, 0)
    _store(out, a0, boxes, frame, line, column, channel, LINES, COLUMNS, N)
    if F == 2:
        _store(out, a1, boxes, frame + 1, line, column, channel, LINES, COLUMNS, N)
    if MORE > 0:
        _store(out_more, b0, boxes, frame, line, column, channel + N, LINES, COLUMNS, MORE)
        if F == 2:
            _store(out_more, b1, boxes, frame + 1, line, column, channel + N, LINES, COLUMNS, MORE)


@gluon.jit
def _wait(a0, a1, b0, b1, MORE: gl.constexpr, F: gl.constexpr, COUNT: gl.constexpr):
    """Wait until COUNT matmuls or fewer are in flight, for the sums that there are."""
    if MORE > 0:
        if F == 2:
            a0, a1, b0, b1 = warpgroup_mma_wait(COUNT, deps=(a0, a1, b0, b1))
        else:
            a0, b0 = warpgroup_mma_wait(COUNT, deps=(a0, b0))
    else:
        if F == 2:
            a0, a1 = warpgroup_mma_wait(COUNT, deps=(a0, a1))
        else:
            a0 = warpgroup_mma_wait(COUNT, deps=(a0,))
    return a0, a1, b0, b1


@gluon.jit
def _store(
    out,
    total,
    boxes,
    frame,
    line,
    column,
    channel,
    LINES: gl.constexpr,
    COLUMNS: gl.constexpr,
    N: gl.constexpr,
):
    """Through the first boxes, which nothing reads any more; TMA leaves out what is outside the image."""
    flat: gl.constexpr = gl.NVMMASharedLayout(128 if N >= 64 else 2 * N, 16, 2)
    room = boxes.index(0)._reinterpret(out.dtype, [LINES * COLUMNS, N], flat)
    room.store(total.to(out.dtype))
    fence_async_shared()
    put(out, [frame, line, column, channel], room._reinterpret(out.dtype, [1, LINES, COLUMNS, N], out.layout))
    tma.store_wait(0)
