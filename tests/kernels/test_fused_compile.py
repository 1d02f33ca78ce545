"""The fused kernels compile for every architecture, without a GPU, and read and write many bytes at a time."""

import importlib.util
import os
import re

import pytest

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's compiler", allow_module_level=True)

import triton
from sparse_forcing_pack.kernels.fused.triton import pages, place, rows
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

if "nvidia" not in triton.backends.backends:
    pytest.skip("this Triton has no NVIDIA compiler", allow_module_level=True)

TARGETS = (80, 90, 100, 120)
FLOATS = {
    "unit", "factors", "cos", "sin", "pooled_q", "pooled_k", "lse_a", "lse_b", "k_scale", "v_scale", "score", "sums",
}  # fmt: skip
INTEGERS = {"tokens", "slots", "table"}
REALS = {"eps", "largest", "smallest"}
NUMBERS = re.compile(
    r"(.*_)?(b|g|n|h|f|tokens|slots)$|count$|size$|eps$|largest$|smallest$|capacity$|persistent$|evicted$|pinned$|kept$"
)


def ptx(kernel, arch: int, constants: dict, warps: int, absent=(), bytes_out=False) -> str:
    """Compiled as a call has it: bfloat16, aligned pointers, strides that are multiples of 16, odd counts."""
    signature, aligned = {}, {}
    for at, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr or name in absent:
            signature[name] = "constexpr"
            continue
        pointer = "i32" if name in INTEGERS else "fp32" if name in FLOATS else "bf16"
        pointer = {"k8": "i8", "v8": "i8", "table": "i64"}.get(name, pointer)
        if bytes_out:
            pointer = {"out": "fp8e4nv", "normal": "fp8e4nv", "scale": "fp32"}.get(name, pointer)
        number = name not in INTEGERS | FLOATS | {"out_b"} and NUMBERS.fullmatch(name)
        signature[name] = ("fp32" if name in REALS else "i32") if number else f"*{pointer}"
        if name not in REALS and not parameter.do_not_specialize:
            aligned[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants | dict.fromkeys(absent), aligned)
    return triton.compile(source, GPUTarget("cuda", arch, 32), {"num_warps": warps}).asm["ptx"]


@pytest.mark.parametrize("arch", TARGETS)
def test_rows(arch):
    wide = {"C": 1536, "BLOCK": 2048}
    for text in (
        ptx(rows._residual_norm, arch, wide | {"PLUS_ONE": True}, rows.warps_for(1536), absent=("unit",)),
        ptx(rows._rms_norm, arch, wide, rows.warps_for(1536)),
        ptx(place._inverse_rms, arch, wide | {"ROWS": place.NORM_ROWS}, rows.warps_for(1536)),
        ptx(rows._merge, arch, {"D": 128, "ROWS": 32, "D_PAD": 128}, 4),
    ):
        assert re.search(r"ld\.global\S*\.v4\.b32", text), "16 bytes a load"


@pytest.mark.parametrize("arch", [90, 100, 120])  # 8-bit floats came with 8.9
def test_quantise(arch):
    wide = {"C": 8960, "HEAD": 8192, "TAIL": 1024, "GELU": True}
    heads = {"HEADS": 12, "D": 128, "HEADS_PAD": 16, "D_PAD": 128}
    norm = {"C": 1536, "BLOCK": 2048, "PLUS_ONE": True}
    for text in (
        ptx(rows._quantise_rows, arch, wide, rows.warps_for(8960), bytes_out=True),
        ptx(rows._residual_norm, arch, norm, rows.warps_for(1536), bytes_out=True),
        ptx(place._to_tokens_in_8_bits, arch, heads, 4, bytes_out=True),
    ):
        assert "e4m3x2" in text and re.search(r"st\.global\S*\.b(32|64)|st\.global\S*\.v\d\.b32", text)


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("paged", [True, False])
def test_place(arch, paged):
    tile = {"ROWS": 64, "D": 128, "ROWS_PAD": 64, "D_PAD": 128}
    absent = () if paged else ("tokens", "pooled_q", "pooled_k")
    for parts in (1, 4) if paged else (1,):
        piece = {"ROWS": 64, "HELD": 32 // parts, "D": 128, "D_PAD": 128, "PAGES": paged, "PARTS": parts}
        text = ptx(place._place, arch, piece, 4, absent)
        assert re.search(r"ld\.global\S*\.v4\.b32", text) and re.search(r"st\.global\S*\.v4\.b32", text)
    text = ptx(place._to_tokens, arch, tile, 4)
    assert re.search(r"st\.global\S*\.v4\.b32", text)


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("rows_of_page", [64, 128])
def test_pages(arch, rows_of_page):
    tile = {"ROWS": rows_of_page, "D": 128, "ROWS_PAD": rows_of_page, "D_PAD": 128}
    text = ptx(pages._pack, arch, tile | {"VALUES": True}, 4)
    assert re.search(r"ld\.global\S*\.v4\.b32", text) and re.search(r"st\.global\S*\.(b64|v\d\.b32)", text)
    text = ptx(pages._unpack, arch, tile, 4)
    assert re.search(r"st\.global\S*\.v4\.b32", text)
    text = ptx(pages._put, arch, {"SIZE": 128 * rows_of_page, "COPIED": pages.COPIED}, 4)
    assert re.search(r"ld\.global\S*\.v4\.b32", text) and re.search(r"st\.global\S*\.v4\.b32", text)


@pytest.mark.parametrize("arch", TARGETS)
def test_update(arch):
    assert "bar.sync" in ptx(pages._update, arch, {"SLOTS": 256, "OTHERS": 32}, 2)
