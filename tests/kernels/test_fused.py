"""The fused element-wise operations: the reference against its parts in float64, every backend against the reference.

As for PBSA, a process of its own runs this file in Triton's interpreter. There float32 and float16 must come as close
to the float64 reference as the rounding of their results allows; bfloat16 is for a GPU.
"""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sparse_forcing_pack.kernels import fused, pool_pages
from sparse_forcing_pack.kernels.fused import reference
from sparse_forcing_pack.sparse_attn.geometry import BlockGeometry
from sparse_forcing_pack.sparse_attn.positions import apply_rope, rope_table

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PRECISIONS = {"cpu": (torch.float32, torch.float16), "cuda": (torch.float32, torch.float16, torch.bfloat16)}


@pytest.mark.interpret
@pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_in_the_interpreter():
    here = Path(__file__)
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(here)]
    done = subprocess.run(
        command, env=env, cwd=here.parents[2], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.fixture
def precisions(backend):
    """(backend, device, dtype) of everything that can run here."""
    name, device = backend
    return [(name, device, dtype) for dtype in PRECISIONS[device]]


def token_table(geometry: BlockGeometry) -> torch.Tensor:
    """[NB, T] int32: the token in each row of each block, -1 for none."""
    numbers = torch.arange(1, geometry.num_tokens + 1)[None, :, None, None]
    return geometry.pack(numbers)[0, ..., 0].to(torch.int32) - 1


def exact(x: torch.Tensor) -> torch.Tensor:
    """float64 that every precision holds exactly (8 bits of mantissa), so that all start from the same numbers."""
    return (x.double() * 32).round() / 32


def assert_rounded(found: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> None:
    """As close to the truth as one rounding to `dtype` and a few to float32 (sums of a row) allow."""
    limit = torch.finfo(dtype).eps * truth.abs() + 16 * torch.finfo(torch.float32).eps * truth.abs().max()
    assert found.shape == truth.shape and (found.double() - truth).abs().sub(limit).max() <= 0


class Chunk:
    """A chunk's projections (views of one fused product), weights, tables and a store half full of other pages."""

    def __init__(self, frames, height, width, *, heads, dim, batch=1, rows=16, seed=0):
        draw = torch.Generator().manual_seed(seed)
        self.geometry = BlockGeometry(frames, height, width, rows)
        count, channels, blocks = self.geometry.num_tokens, heads * dim, self.geometry.num_blocks
        self.qkv = exact(torch.randn(batch, count, 3 * channels, generator=draw))
        self.norms = exact(torch.randn(2, channels, generator=draw) * 0.3 + 1)
        self.rope = rope_table(2, frames, height, width, dim, "cpu")
        self.tokens = token_table(self.geometry)
        order = torch.rand(batch * heads, blocks + 3, generator=draw).argsort(-1)
        self.slots = order[:, :blocks].to(torch.int32)
        self.pages = exact(torch.randn(2, batch * heads, blocks + 3, rows, dim, generator=draw))
        self.frame_slots = torch.randperm(frames + 2, generator=draw)[:frames]
        shape = (2, batch, frames + 2, height * width, heads, dim)
        self.frames = exact(torch.randn(shape, generator=draw))
        self.heads, self.dim, self.batch = heads, dim, batch

    def to_pages(self, backend, device, dtype, parts=()):
        """-> q blocks, their means, k pages, v pages, pooled keys; parts: (R,) of a block that have a mean each."""
        q, k, v, *norms, k_pages, v_pages = self._floats(device, dtype, self.pages)
        wide = torch.promote_types(dtype, torch.float32)
        pooled = torch.zeros(*k_pages.shape[:2], *parts, self.dim, dtype=wide, device=device)
        tables = [x.to(device) for x in (*self.rope, self.tokens, self.slots)]
        found = fused.norm_rope_to_pages(q, k, v, *norms, *tables, k_pages, v_pages, pooled, backend=backend)
        return *found, k_pages, v_pages, pooled

    def to_frames(self, backend, device, dtype):
        """-> q, k frames, v frames."""
        q, k, v, *norms, k_frames, v_frames = self._floats(device, dtype, self.frames)
        tables = [x.to(device) for x in (*self.rope, self.frame_slots)]
        q = fused.norm_rope_to_frames(q, k, v, *norms, *tables, k_frames, v_frames, backend=backend)
        return q, k_frames, v_frames

    def _floats(self, device, dtype, stores):
        qkv, norms, stores = (x.to(device, dtype, copy=True) for x in (self.qkv, self.norms, stores))
        return *qkv.chunk(3, dim=-1), *norms, *stores


CHUNKS = [
    {"frames": 3, "height": 5, "width": 7, "heads": 3, "dim": 64, "batch": 2},
    {"frames": 1, "height": 5, "width": 7, "heads": 12, "dim": 64},
    {"frames": 2, "height": 3, "width": 4, "heads": 2, "dim": 128, "rows": 32},
    {"frames": 3, "height": 5, "width": 8, "heads": 1, "dim": 128, "rows": 64},
    {"frames": 1, "height": 1, "width": 1, "heads": 1, "dim": 96},
    {"frames": 1, "height": 9, "width": 15, "heads": 2, "dim": 64, "rows": 64},  # a frame of two pieces
]


def ids(settings):
    return "-".join(map(str, settings.values()))


@pytest.mark.parametrize("settings", CHUNKS, ids=ids)
def test_pages_are_wans_norm_and_rotation_packed(settings):
    chunk = Chunk(**settings)
    q_blocks, pooled_q, k_pages, v_pages, pooled_k = chunk.to_pages("reference", "cpu", torch.float64)
    projections = chunk.qkv.chunk(3, dim=-1)
    q, k = (
        F.rms_norm(x, x.shape[-1:], weight, 1e-6).unflatten(2, (chunk.heads, -1))
        for x, weight in zip(projections, chunk.norms)
    )
    packed = [chunk.geometry.pack(apply_rope(x, *chunk.rope)) for x in (q, k)]
    packed.append(chunk.geometry.pack(projections[2].unflatten(2, (chunk.heads, -1))))
    at = (torch.arange(len(chunk.slots))[:, None], chunk.slots.long())
    for found, expected in zip((q_blocks, k_pages[at], v_pages[at]), packed):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)  # apply_rope computes in float32
    lens = chunk.geometry.lens.expand(len(chunk.slots), -1)
    torch.testing.assert_close(pooled_q, pool_pages(q_blocks, lens))
    torch.testing.assert_close(pooled_k[at], pool_pages(k_pages[at], lens))


@pytest.mark.parametrize("settings", CHUNKS, ids=ids)
def test_pages(precisions, settings):
    chunk = Chunk(**settings)
    truth = chunk.to_pages("reference", "cpu", torch.float64)
    for backend, device, dtype in precisions:
        found = [x.cpu() for x in chunk.to_pages(backend, device, dtype)]
        for x, expected in zip((found[0], *found[2:4]), (truth[0], *truth[2:4])):
            assert x.dtype == dtype
            assert_rounded(x, expected, dtype)
        q_blocks, pooled_q, k_pages, _, pooled_k = found
        lens = chunk.geometry.lens.expand(len(chunk.slots), -1)
        torch.testing.assert_close(pooled_q, pool_pages(q_blocks, lens), atol=1e-5, rtol=1e-5)
        at = (torch.arange(len(chunk.slots))[:, None], chunk.slots.long())
        torch.testing.assert_close(pooled_k[at], pool_pages(k_pages[at], lens), atol=1e-5, rtol=1e-5)
        others = torch.ones(pooled_k.shape[:2], dtype=torch.bool).index_put(at, torch.tensor(False))
        assert torch.equal(k_pages[others].double(), chunk.pages[0][others]) and not pooled_k[others].any()
        assert not k_pages[at][:, chunk.tokens < 0].any(), "rows without a token are zero"


@pytest.mark.parametrize("settings", CHUNKS, ids=ids)
@pytest.mark.parametrize("parts", [1, 4])
def test_means_of_parts(precisions, settings, parts):
    """Of blocks and pages whose last parts are short or empty."""
    chunk = Chunk(**settings)
    groups = len(chunk.slots)
    rows = chunk.tokens.shape[1] // parts
    lens = (chunk.geometry.lens[:, None] - rows * torch.arange(parts, dtype=torch.int32)).clamp(0, rows)
    lens = lens.flatten().expand(groups, -1)
    at = (torch.arange(groups)[:, None], chunk.slots.long())
    for backend, device, dtype in [("reference", "cpu", torch.float64), *precisions]:
        found = [x.cpu() for x in chunk.to_pages(backend, device, dtype, (parts,))]
        q_blocks, pooled_q, k_pages, _, pooled_k = found
        for blocks, pooled in ((q_blocks, pooled_q), (k_pages[at], pooled_k[at])):
            expected = pool_pages(blocks.unflatten(2, (parts, -1)).flatten(1, 2), lens).unflatten(1, (-1, parts))
            torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", CHUNKS, ids=ids)
def test_frames(precisions, settings):
    chunk = Chunk(**settings)
    truth = chunk.to_frames("reference", "cpu", torch.float64)
    q_blocks = chunk.to_pages("reference", "cpu", torch.float64)[0]
    torch.testing.assert_close(chunk.geometry.unpack(q_blocks, chunk.batch), truth[0])
    for backend, device, dtype in precisions:
        for x, expected in zip(chunk.to_frames(backend, device, dtype), truth):
            assert x.dtype == dtype
            assert_rounded(x.cpu(), expected, dtype)


@pytest.mark.parametrize("settings", CHUNKS, ids=ids)
def test_blocks_to_tokens(precisions, settings):
    chunk = Chunk(**settings)
    for backend, device, dtype in precisions:
        blocks = torch.randn(len(chunk.slots), *chunk.tokens.shape, chunk.dim).to(device, dtype)
        found = fused.blocks_to_tokens(
            blocks, chunk.tokens.to(device), chunk.batch, chunk.geometry.num_tokens, backend=backend
        )
        expected = chunk.geometry.unpack(blocks.cpu(), chunk.batch).flatten(2)
        assert torch.equal(found.cpu(), expected)
        packed = fused.blocks_to_tokens(
            blocks, chunk.tokens.to(device), chunk.batch, chunk.geometry.num_tokens, eight_bits=True, backend=backend
        )
        for mine, theirs in zip(packed, fused.quantise_rows(expected.flatten(0, 1).to(device), backend=backend)):
            assert torch.equal(mine.flatten(0, 1).float(), theirs.float())


@pytest.mark.parametrize(("frames", "tokens", "width"), [(3, 12, 192), (1, 5, 1536), (3, 3, 64), (2, 4, 100)])
@pytest.mark.parametrize("batch", [1, 2])
def test_rows(precisions, frames, tokens, width, batch):
    draw = torch.Generator().manual_seed(0)
    x, y = exact(torch.randn(2, batch, tokens, width, generator=draw))
    x = exact((x + 2).clamp(-7, 7))  # a mean that must be taken out
    vectors = exact(torch.randn(batch, frames, 6, width, generator=draw))

    def run(backend, device, dtype):
        a, b = x.to(device, dtype), y.to(device, dtype)
        gate, scale, shift = vectors.to(device, dtype).unbind(2)[:3]  # strided, as the projection gives them
        some, weight = {"backend": backend}, vectors[0, 0, 3].to(device, dtype)
        one = weight.expand(batch, 1, -1)
        return [
            *fused.gated_residual_norm(a, b, gate, scale, shift, **some),
            *fused.gated_residual_norm(a, b, None, one, one, plus_one=False, **some),
            fused.gated_residual(a, b, gate, **some),
            fused.modulated_norm(a, scale, shift, **some),
            fused.rms_norm(a, weight, **some),
        ]

    truth = run("reference", "cpu", torch.float64)
    per_token = [t.repeat_interleave(tokens // frames, 1) for t in vectors.unbind(2)]
    total = x + per_token[0] * y
    normal = F.layer_norm(total, (width,), eps=1e-6) * (1 + per_token[1]) + per_token[2]
    weight = vectors[0, 0, 3]
    affine = F.layer_norm(x + y, (width,), weight, weight, 1e-6)
    plain = F.layer_norm(x, (width,), eps=1e-6) * (1 + per_token[1]) + per_token[2]
    literal = [total, normal, x + y, affine, total, plain, F.rms_norm(x, (width,), weight, 1e-6)]
    for found, expected in zip(truth, literal):
        torch.testing.assert_close(found, expected)
    for backend, device, dtype in precisions:
        eager = run("reference", device, dtype)
        for found, expected, same in zip(run(backend, device, dtype), truth, eager):
            assert found.dtype == dtype
            # a norm sees a sum that was rounded: the reference's own error in this precision is the budget
            budget = (same.cpu() - expected).abs().max() + 32 * torch.finfo(
                torch.float32
            ).eps * expected.abs().max()
            slack = torch.finfo(dtype).eps * expected.abs()
            assert ((found.cpu() - expected).abs() - slack).max() <= budget


@pytest.mark.parametrize("dim", [64, 96, 128])
def test_merged_attentions_are_one(precisions, dim):
    draw = torch.Generator().manual_seed(0)
    q, k, v = (exact(torch.randn(2, n, dim, generator=draw)) for n in (35, 20, 20))
    scores = q @ k.transpose(1, 2)
    parts = scores[..., :7], scores[..., 7:]
    outs = [part.softmax(-1) @ values for part, values in zip(parts, (v[:, :7], v[:, 7:]))]
    lses = [part.logsumexp(-1) for part in parts]
    lses[0][0, :5], outs[0][0, :5] = -torch.inf, 0  # some read nothing on one side, some on neither
    lses[1][0, :2], outs[1][0, :2] = -torch.inf, 0
    whole = scores.softmax(-1) @ v
    whole[0, :5] = outs[1][0, :5]
    whole[0, :2] = 0
    args = [x.view(2, 5, 7, *x.shape[2:]) for x in (outs[0], lses[0], outs[1], lses[1])]
    found = fused.merge_attention(*args, backend="reference")
    torch.testing.assert_close(found.flatten(1, 2), whole)
    for backend, device, dtype in precisions:
        a, lse_a, b, lse_b = (x.to(device) for x in args)
        narrow = [a.to(dtype), lse_a.float(), b.to(dtype), lse_b.float()]
        merged = fused.merge_attention(*narrow, backend=backend).cpu()
        assert merged.dtype == dtype
        assert (merged.double() - found).abs().max() <= (
            2 * torch.finfo(dtype).eps + 1e-5
        ) * whole.abs().max()


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("width", [64, 1536, 200, 8960])
def test_quantised_rows(precisions, gelu, width):
    x = torch.randn(6, width, generator=torch.Generator().manual_seed(0))
    x *= torch.tensor([1.0, 1e-3, 30.0, 0.0, 1.0, 5.0])[:, None]
    wanted = F.gelu(x, approximate="tanh") if gelu else x
    for backend, device, dtype in precisions:
        rows, scale = fused.quantise_rows(x.to(device, dtype), gelu=gelu, backend=backend)
        assert rows.dtype == torch.float8_e4m3fn and scale.shape == (6, 1) and scale.dtype == torch.float32
        found = (rows.float() * scale).cpu()
        largest = wanted.abs().amax(-1, keepdim=True)
        assert ((scale.cpu() * 448 - largest).abs() <= 0.01 * largest + 1e-11).all()
        # half a step of 3 bits of mantissa, a step of the smallest numbers, and the input's own rounding
        error = (found - wanted).abs() - 0.07 * wanted.abs() - largest * (2**-9 / 448 + 0.01)
        if not (
            INTERPRETED and backend == "triton"
        ):  # which forgets to carry where a mantissa rounds up to 2
            assert error.max() <= 0
        assert (error <= 0).float().mean() > 0.8


@pytest.mark.parametrize("residual", [False, True])
def test_norms_in_8_bits(precisions, residual):
    """A norm that is quantised on its way to memory, against the float32 norm: half a step of 3 bits of mantissa."""
    draw = torch.Generator().manual_seed(0)
    x, y = (exact(torch.randn(2, 6, 200, generator=draw)) for _ in "xy")
    gate, scale, shift = exact(torch.randn(2, 3, 3, 200, generator=draw)).unbind(2)
    wide = x + gate.repeat_interleave(2, 1) * y if residual else x
    wanted = F.layer_norm(wide, (200,), eps=1e-6) * (1 + scale.repeat_interleave(2, 1))
    wanted = wanted + shift.repeat_interleave(2, 1)
    for backend, device, dtype in precisions:
        a, b, *vectors = (t.to(device, dtype) for t in (x, y, gate, scale, shift))
        some = {"eight_bits": True, "backend": backend}
        if residual:
            total, found = fused.gated_residual_norm(a, b, *vectors, **some)
            assert total.dtype == dtype
        else:
            found = fused.modulated_norm(a, *vectors[1:], **some)
        rows, unit = found
        assert rows.dtype == torch.float8_e4m3fn and (rows.shape, unit.shape) == ((2, 6, 200), (2, 6, 1))
        error = ((rows.float() * unit).cpu() - wanted).abs()
        limit = 0.07 * wanted.abs() + wanted.abs().amax(-1, keepdim=True) * (2**-9 / 448 + 0.01)
        if not (INTERPRETED and backend == "triton"):  # see test_quantised_rows
            assert (error <= limit).all()
        assert (error <= limit).float().mean() > 0.8


@pytest.mark.parametrize(
    ("tokens", "rows", "distinct", "dim"), [(70, 512, (11,), 24), (130, 96, (40, 96), 64), (33, 20, (1, 20, 7), 16)]
)
def test_a_prompt_whose_end_is_one_row_repeated(precisions, tokens, rows, distinct, dim):
    """As attention over all rows, by prompts of several lengths; also where nothing, or everything, is repeated."""
    draw, batch, heads = torch.Generator().manual_seed(rows), len(distinct), 2
    q, k, v = (exact(torch.randn(batch, n, heads, dim, generator=draw)) for n in (tokens, rows, rows))
    for b, count in enumerate(distinct):
        k[b, count:], v[b, count:] = k[b, count - 1].clone(), v[b, count - 1].clone()
    truth = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(reference.prompt_attention(q, k, v, torch.tensor(distinct, dtype=torch.int32)), truth)
    for name, device, dtype in precisions:
        tensors = [x.to(device, dtype) for x in (q, k, v)]
        counted = fused.distinct_rows(*tensors[1:])
        assert counted.tolist() == list(distinct) and counted.dtype == torch.int32
        found = fused.prompt_attention(*tensors, counted, backend=name).cpu()
        # weights are rounded to the values' dtype before their product, as in PBSA
        limit = 4 * torch.finfo(dtype).eps if dtype != torch.float32 else 2e-6
        assert found.dtype == dtype and (found.double() - truth).abs().max() <= limit * truth.abs().max()


def test_rows_that_are_not_numbers_are_not_taken_for_repeated():
    k = torch.full((1, 5, 1, 8), float("nan"))
    assert fused.distinct_rows(k, k).tolist() == [5]
    k = torch.zeros(1, 5, 1, 8)
    v = k.clone()
    v[0, 2, 0, 3] = 1  # equal keys alone are not enough
    assert fused.distinct_rows(k, v).tolist() == [4]


def test_every_element_is_written(backend, monkeypatch):
    name, device = backend
    if name == "reference":
        pytest.skip("about kernels")
    monkeypatch.setattr(torch, "empty", lambda *size, **kw: torch.full(*size, float("nan"), **kw))
    chunk = Chunk(**CHUNKS[0])
    for x in (*chunk.to_pages(name, device, torch.float32), *chunk.to_frames(name, device, torch.float32)):
        assert x.isfinite().all()


def test_refusals_name_the_value():
    chunk = Chunk(**CHUNKS[2])
    q, k, v = chunk.qkv.chunk(3, dim=-1)
    args = [q, k, v, *chunk.norms, *chunk.rope, chunk.tokens, chunk.slots, *chunk.pages]
    pooled = torch.zeros(*chunk.pages.shape[1:3], chunk.dim, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"slots must have shape \[2, 1\]"):
        fused.norm_rope_to_pages(*args[:8], chunk.slots[:, :0], *chunk.pages, pooled)
    with pytest.raises(ValueError, match=r"pooled_k must have shape"):
        fused.norm_rope_to_pages(*args, pooled[:, :1])
    with pytest.raises(ValueError, match=r"does not divide the 32 rows of a block"):
        fused.norm_rope_to_pages(*args, pooled[:, :, None].expand(-1, -1, 3, -1))
    with pytest.raises(ValueError, match="2 frames, which do not divide 23 tokens"):
        fused.modulated_norm(q[:, :23], q[:, :2], q[:, :2])
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run"):
        fused.rms_norm(q, chunk.norms[0], backend="triton")


def test_the_reference_stays_in_float64():
    found = reference.rms_norm(torch.ones(1, 1, 4, dtype=torch.float64), torch.ones(4), 0.0)
    assert found.dtype == torch.float64


@pytest.mark.parametrize(("rows", "dim"), [(16, 64), (32, 96), (64, 128)])
def test_pages_in_8_bits(precisions, rows, dim):
    """Half a step of 127 to the largest of a channel (keys) or token (values); other pages stay as they were."""
    draw = torch.Generator().manual_seed(0)
    k, v = (exact(torch.randn(2, 5, rows, dim, generator=draw)) for _ in range(2))
    k[..., 3] *= 40  # keys have channels like that
    k[:, 2, rows // 2 :] = v[:, 2, rows // 2 :] = 0  # a ragged block
    k[:, 4] = v[:, 4] = 0
    slots = torch.tensor([[1, 2, 4], [4, 0, 2]], dtype=torch.int32)
    for backend, device, dtype in precisions:
        pages = [x.to(device, dtype) for x in (k, v)]
        packed = fused.Pages8(
            torch.full(k.shape, 7, dtype=torch.int8, device=device), torch.ones(2, 5, dim, device=device),
            torch.full(k.shape, 7, dtype=torch.int8, device=device), torch.ones(2, 5, rows, device=device),
        )  # fmt: skip
        expected = fused.Pages8(*(x.cpu().clone() for x in packed))
        fused.pack_pages(*pages, slots.to(device), packed, backend=backend)
        fused.pack_pages(*(x.cpu() for x in pages), slots, expected, backend="reference")
        for found, wanted in zip(packed, expected):
            assert (found.cpu().float() - wanted.float()).abs().max() <= (
                1 if found.dtype == torch.int8 else 1e-6 * wanted.abs().max()
            )
        back = [torch.empty_like(x) for x in pages]
        fused.unpack_pages(packed, *back, backend=backend)
        at = torch.arange(2)[:, None], slots.long()
        others = torch.ones(2, 5, dtype=torch.bool)
        others[at] = False
        for found, truth, axis in zip(back, (k, v), (2, 3)):
            found = found.cpu().double()
            step = truth.abs().amax(axis, keepdim=True) / 127
            slack = 2 * torch.finfo(dtype).eps * truth.abs() + 1e-6
            assert ((found - truth).abs() - 0.5 * step - slack)[at].max() <= 0
            assert (found[others] == 7).all()
        fused.pack_pages(*(2 * x for x in pages), slots.to(device), packed, values=False, backend=backend)
        again = [torch.empty_like(x) for x in pages]
        fused.unpack_pages(packed, *again, backend=backend)
        assert torch.equal(again[1], back[1]), "values were left alone"
        assert (again[0].cpu()[at].float() - 2 * back[0].cpu()[at].float()).abs().max() < 0.02 * k.abs().max()


def test_pages_in_8_bits_are_checked():
    k = torch.zeros(1, 2, 16, 64)
    packed = fused.Pages8(k.to(torch.int8), torch.ones(1, 2, 64), k.to(torch.int8), torch.ones(1, 2, 16))
    with pytest.raises(ValueError, match="packed v_scale must have shape"):
        fused.unpack_pages(packed._replace(v_scale=torch.ones(1, 2, 8)), k, k)
    with pytest.raises(ValueError, match="packed k must be torch.int8"):
        fused.unpack_pages(packed._replace(k=k), k, k)
    with pytest.raises(ValueError, match="k_pages of a group do not lie"):
        fused.unpack_pages(packed, torch.zeros(1, 2, 64, 16).mT, k)


def test_pages_are_put_where_they_belong(precisions):
    """From one part of a pool into another, as the open chunk's blocks go when it ends; other pages are left alone."""
    draw = torch.Generator().manual_seed(0)
    slots = torch.tensor([[1, 4, 0], [3, 2, 4]])
    for backend, device, dtype in precisions:
        pools = [torch.randn(2, 9, 16, 96, generator=draw).to(device, dtype) for _ in range(2)]
        truth = [pool.clone() for pool in pools]
        at = torch.arange(2)[:, None], slots
        for pool in truth:
            pool[at] = pool[:, 5:8].clone()
        fused.put_pages(*(pool[:, 5:8] for pool in pools), slots.to(device), *pools, backend=backend)
        for found, want in zip(pools, truth):
            assert torch.equal(found, want)
    pool, where = pools[0], torch.zeros(2, 9, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="v_pages of a group do not lie"):
        fused.put_pages(pool, pool, where, pool, pool.mT.contiguous().mT)


@pytest.mark.parametrize(
    ("slots", "capacity", "persistent", "evicted"),
    [(9, 4, 4, 2), (9, 4, 0, 3), (9, 4, 3, 3), (40, 33, 33, 7), (7, 0, 0, 2), (300, 150, 150, 75), (5, 5, 5, 0)],
)
def test_the_memory_update(precisions, slots, capacity, persistent, evicted):
    """The best stay, in the order of time, ties and NaN in theirs; nothing is lost. Written again, one by one."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.stack([torch.randperm(slots, generator=draw) for _ in range(6)])
    score = torch.randint(0, 5, (6, persistent + evicted), generator=draw).float()  # many are equal
    score[0, ::2], score[1, ::3], score[2, 1::2] = math.inf, math.nan, -math.inf
    pinned, wanted = min(2, persistent), []
    # given as the sum of three rows, in front of columns that do not compete
    parts = torch.stack([score, torch.full_like(score, 3.0), torch.full_like(score, -3.0)], dim=1)
    parts = F.pad(parts, (0, 5), value=100.0)
    score[:, :pinned] = math.inf
    for row, scores in zip(rows.tolist(), score.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).tolist()):
        candidates = row[:persistent] + row[capacity : capacity + evicted]
        best = sorted(range(len(candidates)), key=lambda i: -scores[i])[:capacity]
        stay = [candidates[i] for i in sorted(best)]
        free = row[persistent:capacity] + [slot for i, slot in enumerate(candidates) if i not in best]
        filled = stay + free[: capacity - len(stay)]
        wanted.append(filled + row[capacity + evicted :] + free[capacity - len(stay) :])
    for backend, device in {(backend, device) for backend, device, _ in precisions}:
        table = rows.to(device)
        given = table, parts.to(device), capacity, persistent, evicted, pinned
        fused.update_table(*given, backend=backend)
        assert table.tolist() == wanted
    with pytest.raises(ValueError, match="a table of"):
        fused.update_table(rows, torch.zeros(6, 1, slots + 2), 1, 1, slots + 1)
    with pytest.raises(ValueError, match="score has 1 columns for 2 candidates"):
        fused.update_table(rows, torch.zeros(6, 1, 1), 2, 2, 0)
