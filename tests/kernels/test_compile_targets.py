"""Every kernel compiles for every architecture, without a GPU, within its registers and shared memory.

Triton's compiler takes an explicit target; run with -s to see registers, spills and shared memory. What is compiled is
what `variants` and `backward` choose for bfloat16 with a head dim of 128.
"""

import importlib.util
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's compiler", allow_module_level=True)

import triton
from sparse_forcing_pack.kernels.fused.triton import prompt
from sparse_forcing_pack.kernels.pbsa.triton import backward, forward, mass, router
from sparse_forcing_pack.kernels.pbsa.triton.variants import VARIANTS, Shape, Variant, gluon_there
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

if "nvidia" not in triton.backends.backends:
    pytest.skip("this Triton has no NVIDIA compiler", allow_module_level=True)

TARGETS = (80, 86, 89, 90, 100, 120)
KIB = 1024
SHARED = {
    80: 163 * KIB,
    86: 99 * KIB,
    89: 99 * KIB,
    90: 227 * KIB,
    100: 227 * KIB,
    120: 99 * KIB,
}  # a program's most
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
SPILLED = 0 if VERSION >= (3, 9) else 24  # bytes a thread; Triton 3.6 puts some aside in gradients of pages
BOTH = {"T": 64, "D": 128, "D_PAD": 128, "PADDING": 1, "PRECISION": "tf32"}
INTEGERS = {"page_len", "idx", "cnt", "targets", "readers", "reader_cnt", "position_of", "always", "local"}
INTEGERS |= {"q_parts", "k_parts", "q_len", "distinct"}
FLOATS = {"mass", "lse", "lse_log2", "lse_in_units", "delta", "grad_lse", "pooled_q", "pooled_k", "shares", "scores"}
FLOATS |= {"pooled"}
HALVES = {"q", "k", "v", "out", "grad_out", "dq", "dk", "dv", "pages"}
DESCRIBED = {"q_rows", "k_rows", "v_rows", "grad_rows"}  # what the overlapped kernels get descriptors of


def described_as(rows: int, dim: int) -> str:
    """The type of a descriptor of tiles [rows, dim]."""
    from triton.experimental.gluon import language as gl

    layout = gl.NVMMASharedLayout.get_default_for([rows, dim], gl.bfloat16)
    return f"tensordesc<bf16[{rows}, {dim}],{layout!r}>"


def compiled(kernel, arch: int, constants: dict, warps: int, stages: int, source=ASTSource):
    """Compile with arguments as a call has them: aligned pointers, strides that are multiples of 16, odd lengths."""
    signature, aligned = {}, {}
    for at, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
            continue
        if name in DESCRIBED:
            rows = constants.get("T", 64) if name in ("k_rows", "v_rows") else 64
            signature[name] = described_as(rows, constants["D"])
            continue
        scale = name in ("scale", "scale_log2", "unit")
        pointer = {"i32": name in INTEGERS, "fp32": name in FLOATS, "bf16": name in HALVES}
        of = next((element for element, matches in pointer.items() if matches), None)
        signature[name] = "fp32" if scale else f"*{of}" if of else "i32"
        if of or not (scale or parameter.do_not_specialize):
            aligned[(at,)] = [["tt.divisibility", 16]]
    options = {"num_warps": warps, "num_stages": stages}
    code = source(kernel, signature, constants, aligned)
    return triton.compile(code, target=GPUTarget("cuda", arch, 32), options=options)


def dumped(binary, what: str) -> str:
    """What the disassembler that Triton brings along says of a kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton has no cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def usage(binary) -> tuple[int, int]:
    """Registers and bytes of stack a thread (spills)."""
    said = dumped(binary, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None, said
    return int(found[1]), int(found[2])


def check(kernel, arch: int, constants: dict, warps: int, stages: int, label: str = "", source=ASTSource):
    binary = compiled(kernel, arch, constants, warps, stages, source)
    registers, stack = usage(binary)
    shared = binary.metadata.shared
    figures = f"{registers} registers, {stack} B stack, {shared / KIB:.0f} KiB shared"
    sys.stdout.write(f"sm_{arch} {label or kernel.__name__}: {figures}\n")
    assert shared <= SHARED[arch] and stack <= SPILLED
    return binary


def chosen(arch: int, tokens: int, padding: str) -> Variant:
    """Of those that Triton's compiler puts in order: the first choice but for `overlapped`."""
    call = Shape(
        (arch // 10, arch % 10), torch.bfloat16, tokens, 128, padding, whole_pages=True, shared=False
    )
    return next(variant for variant in VARIANTS if variant.wants(call) and variant.kind != "overlapped")


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize(("tokens", "padding"), [(128, "finite"), (64, "finite"), (64, "any")])
def test_forward(arch, tokens, padding):
    variant = chosen(arch, tokens, padding)
    constants = BOTH | {
        "T": tokens,
        "PADDING": forward.PADDING[padding],
        "FLOOR": forward.floor_of(tokens - 2, padding),
        "ROWS": variant.rows,
        "KEYS": variant.keys,
    }
    kernel = forward.forward_pointers
    if variant.kind != "pointers":
        kernel = forward.forward_descriptors
        constants["SPECIALISE"] = variant.kind == "specialised"
    binary = check(
        kernel, arch, constants, variant.warps, variant.stages, f"{variant.name}, {tokens} {padding}"
    )
    ir = binary.asm["ttgir"]
    if (
        variant.kind == "pointers"
    ):  # k and v are copied ahead of their use; unaligned or unknown strides would stop it
        assert len(re.findall("ttg.async_copy_global_to_local", ir)) >= 4
    else:
        assert "async_tma_copy_global_to_local" in ir
        assert ("warp_specialize" in ir) == (variant.kind == "specialised")


def test_two_halves_of_v_on_hopper():
    """The layouts of both products are one: where they differed, an earlier trial gave NaN."""
    halves = {"FLOOR": 0, "ROWS": 128, "KEYS": 64, "SPECIALISE": True}
    binary = check(forward.forward_descriptors, 90, BOTH | halves, 4, 3, "specialised 128x64")
    assert binary.asm["ttgir"].count("#ttg.nvidia_mma<") == 1


@pytest.fixture
def gluon():
    """What Triton's compiler takes a Gluon kernel as, for Hopper."""
    if not gluon_there():
        pytest.skip("this Triton has no Gluon as the kernels need it")
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def tensor_core_order(binary) -> list[str]:
    """Of the assembler's program: products, waits for them, and exponentials, runs of one kind as one."""
    kinds = re.findall(r"HGMMA|WARPGROUP\.DEPBAR|MUFU\.EX2", dumped(binary, "--dump-sass"))
    return [kind for kind, _ in itertools.groupby(kinds)]


@pytest.mark.parametrize(
    ("tokens", "dim", "floor", "shared"),
    [
        (128, 128, 120, False),
        (128, 64, 0, False),
        (64, 128, 56, True),
        (64, 128, 56, False),
        (64, 64, 0, False),
    ],
)
def test_overlapped_forward(gluon, tokens, dim, floor, shared):
    from sparse_forcing_pack.kernels.pbsa.triton import overlapped

    call = Shape((9, 0), torch.bfloat16, tokens, dim, "finite", whole_pages=True, shared=shared)
    variant = next(variant for variant in VARIANTS if variant.wants(call))
    assert variant.kind == "overlapped"
    constants = {"T": tokens, "D": dim, "PADDING": 1, "FLOOR": floor, "STAGES": variant.stages}
    constants["SHARED"] = variant.rows == 128
    label = f"{variant.name}, {tokens} tokens of {dim}"
    binary = check(overlapped.forward_overlapped, 90, constants, 4, 1, label, gluon)
    # The loop: the next scores and the last weights' product started, then a wait, then exponentials, then a wait.
    # What the assembler must not do is wait for the product before the exponentials.
    order = tensor_core_order(binary)
    loop = ["HGMMA", "WARPGROUP.DEPBAR", "MUFU.EX2", "WARPGROUP.DEPBAR", "HGMMA"]
    assert any(order[at : at + len(loop)] == loop for at in range(len(order))), order


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("dim", [64, 128])
def test_overlapped_backward(gluon, dim, padding):
    from sparse_forcing_pack.kernels.pbsa.triton import overlapped_backward

    stages = backward.OVERLAPPED.query_stages, backward.OVERLAPPED.page_stages
    kernels = overlapped_backward.queries, overlapped_backward.pages
    for kernel, held in zip(kernels, stages):
        constants = {"D": dim, "PADDING": padding, "STAGES": held}
        check(kernel, 90, constants, 4, 1, f"overlapped gradients of {kernel.__name__}, {dim}", gluon)


@pytest.mark.parametrize("arch", TARGETS)
def test_merge(arch):
    check(forward.merge, arch, {"D": 128, "D_PAD": 128, "ROWS": 128}, 8, 3)


@pytest.mark.parametrize(("arch", "tokens"), [(arch, 64) for arch in TARGETS] + [(90, 128), (100, 128)])
def test_backward(arch, tokens):
    tiles = backward.tiles_for((arch // 10, arch % 10), torch.bfloat16, tokens)
    for kernel, tile in zip((backward.backward_queries, backward.backward_pages), tiles):
        constants = BOTH | {"T": tokens, "ROWS": tile.rows, "KEYS": tile.keys}
        check(kernel, arch, constants, tile.warps, tile.stages, f"{kernel.__name__}, {tokens} tokens")


@pytest.mark.parametrize("arch", TARGETS)
def test_readers(arch):
    tile = dict(backward.READERS_TILE)
    check(backward.find_readers, arch, tile, tile.pop("num_warps"), 3)


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize(("tokens", "warps"), [(64, 4), (128, 8)])
def test_mass(arch, tokens, warps):
    constants = {"T": tokens, "D": 128, "D_PAD": 128, "PRECISION": "tf32"}
    check(mass.weigh_pages, arch, constants, warps, 3, f"mass, {tokens} tokens")


@pytest.mark.parametrize("arch", TARGETS)
def test_prompt_attention(arch):
    tile = dict(prompt.TILE)
    warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
    check(prompt.attend_prompt, arch, {"D": 128, "D_PAD": 128, "PRECISION": "tf32", **tile}, warps, stages)


@pytest.mark.parametrize("arch", TARGETS)
def test_router(arch):
    check(router.pool, arch, {"T": 64, "D": 128, "D_PAD": 128}, 4, 3)
    check(router.score, arch, {"D": 128, "D_PAD": 128} | router.SCORE_TILE, 4, 3)
    check(router.select, arch, {"SLOTS": 512}, router.warps_for(512), 3)
    for slots in (256, 512):
        tile = {"PARTS": 4, "SLOTS": slots}
        check(router.select_by_parts, arch, tile, router.parts_warps(slots), 3, f"by parts among {slots}")
