"""Which forward kernel a call gets, with which tile: declared as data, chosen by constraints, trusted after a test.

A variant is one kernel with one tile shape. `VARIANTS` lists them from the fastest to the one that always works; the
first whose constraints a call meets and that passes the self-test on this device is taken. The self-test runs once a
process for each variant, device and kind of call, on a small problem: a compiler that miscompiles a variant (warp
specialisation returned NaN for some tile shapes) then costs speed, never correctness. Lengths play no part.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import reference
from ..constraints import interpreter_on

logger = logging.getLogger("sparse_forcing.kernels")

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Shape:
    """The facts of a call that decide about its variant. All are host metadata, and none is a length."""

    capability: tuple[int, int]
    dtype: torch.dtype
    tokens: int  # T
    dim: int  # D
    padding: str
    whole_pages: bool  # a group's pages lie one behind the other, groups by whole rows, all aligned for the copy engine
    shared: bool  # a list serves more than one query block
    floor: int = 0  # rows of a page that are never masked; the geometry's, not a call's


@dataclass(frozen=True)
class Variant:
    """kind: pointers, descriptors (the copy engine), specialised (and loading warps apart from computing ones) or
    overlapped (and products under the softmax).

    rows and keys: the tile; more rows than T only where a list serves several query blocks, more keys than T reads
    several pages a step. warps, stages: of the launch. residents: programs a multiprocessor runs at a time, by which
    the last wave is split; 0 leaves it as it is. The rest says where the variant is used; None means anywhere.
    """

    kind: str
    rows: int
    keys: int
    warps: int
    stages: int
    capabilities: tuple[tuple[int, int], ...] | None = None
    tokens: tuple[int, ...] | None = None
    dtypes: tuple[torch.dtype, ...] = HALVES
    residents: int = 0
    shared: bool | None = None  # only where a list serves several query blocks, only where not, or both

    @property
    def name(self) -> str:
        return f"{self.kind} {self.rows}x{self.keys} warps {self.warps} stages {self.stages}"

    def can(self, shape: Shape) -> bool:
        """Whether the kernel is right for a call like this, whatever its speed."""
        if self.rows > shape.tokens and not shape.shared:
            return False
        if self.kind == "pointers":
            return True
        fits = shape.dtype in HALVES and shape.dim % 8 == 0 and self.keys <= shape.tokens
        if self.kind == "overlapped":  # steps of whole pages, a list for 128 rows or for 64
            fits = fits and shape.dim in (64, 128) and self.keys == shape.tokens and shape.capability[0] == 9
            fits = fits and gluon_there()
        if self.kind == "specialised":  # both products are cut alike, v in one piece or two
            padded = 1 << (shape.dim - 1).bit_length()
            fits = fits and padded in (self.keys, 2 * self.keys)
        return fits and shape.whole_pages and shape.padding != "any" and shape.capability >= (9, 0)

    def wants(self, shape: Shape) -> bool:
        """Whether this is meant for such a call."""
        return (
            self.can(shape)
            and shape.dtype in self.dtypes
            and (self.capabilities is None or shape.capability in self.capabilities)
            and (self.tokens is None or shape.tokens in self.tokens)
            and (self.shared is None or self.shared == shape.shared)
        )


@functools.cache
def gluon_there() -> bool:
    """Whether this Triton has the language that `overlapped` is written in."""
    try:
        from . import overlapped  # noqa: F401
    except (ImportError, AttributeError):  # before Triton 3.5, or when Gluon, which is experimental, changes
        return False
    return True


HOPPER = ((9, 0),)
LARGE_BLACKWELL = ((10, 0), (10, 3))
BIG_MEMORY = ((8, 0), *HOPPER, *LARGE_BLACKWELL)  # 160 KiB of shared memory or more; others have 100
FLOAT32 = (torch.float32,)

OVERLAPPED_128 = Variant("overlapped", 128, 128, 4, 2, HOPPER, tokens=(128,), residents=1)
VARIANTS = (
    OVERLAPPED_128,
    Variant("specialised", 128, 128, 4, 2, HOPPER, tokens=(128,), residents=1),
    Variant("descriptors", 128, 128, 8, 2, HOPPER, tokens=(128,), residents=1),
    Variant("pointers", 128, 64, 4, 3, HOPPER, tokens=(128,), residents=2),
    Variant("overlapped", 128, 64, 4, 4, HOPPER, tokens=(64,), shared=True, residents=1),
    Variant("descriptors", 128, 64, 4, 3, HOPPER, tokens=(64,), shared=True, residents=1),
    Variant("pointers", 128, 64, 4, 3, HOPPER, shared=True, residents=2),
    Variant("pointers", 128, 64, 8, 3, BIG_MEMORY, tokens=(128,), residents=1),
    Variant("pointers", 128, 64, 8, 3, BIG_MEMORY, shared=True, residents=1),
    Variant("overlapped", 64, 64, 4, 2, HOPPER, tokens=(64,), shared=False, residents=2),
    Variant("descriptors", 64, 64, 4, 3, HOPPER, tokens=(64,), shared=False, residents=2),
    Variant("pointers", 64, 64, 4, 3, (*HOPPER, *LARGE_BLACKWELL), tokens=(64,), residents=2),
    Variant("pointers", 128, 64, 8, 2, tokens=(128,)),
    Variant("pointers", 64, 32, 4, 3, tokens=(64, 128)),  # with 64 keys a thread's registers do not suffice
    Variant("pointers", 32, 32, 4, 3, tokens=(32,)),
    Variant("pointers", 16, 32, 4, 3, tokens=(16,)),
    Variant("pointers", 64, 32, 8, 1, tokens=(64, 128), dtypes=FLOAT32),
    Variant("pointers", 32, 32, 8, 1, tokens=(32,), dtypes=FLOAT32),
    Variant("pointers", 16, 16, 8, 1, tokens=(16,), dtypes=FLOAT32),
)

_chosen: dict[tuple[Shape, torch.device], Variant] = {}


def choose_variant(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_len: Tensor,
    idx: Tensor,
    cnt: Tensor,
    padding: str,
    floor: int = 0,
) -> Variant:
    """The variant for a call. The first call of a kind tests variants, which waits for the device: warm up first.

    While a CUDA graph is captured nothing can be tested: an untested kind of call then gets the last of its variants.
    Raises RuntimeError if none passes.
    """
    shape = shape_of(q, k_pages, v_pages, cnt, padding, floor)
    key = (shape, q.device)
    if key not in _chosen:
        wanted = [variant for variant in VARIANTS if variant.wants(shape)]
        if interpreter_on() or torch.cuda.is_current_stream_capturing():
            return wanted[-1]
        passed = next((variant for variant in wanted if passes_self_test(variant, shape, q.device)), None)
        if passed is None:
            names = ", ".join(variant.name for variant in wanted)
            raise RuntimeError(f"PBSA forward: no Triton variant gives right numbers on {q.device}: {names}")
        logger.info("PBSA forward: %s for %s", passed.name, shape)
        _chosen[key] = passed
    return _chosen[key]


def shape_of(q: Tensor, k_pages: Tensor, v_pages: Tensor, cnt: Tensor, padding: str, floor: int = 0) -> Shape:
    """What of a call decides about its variant."""
    tokens, dim = q.shape[2:]
    whole = q.data_ptr() % 16 == 0 and all(
        pages.stride()[1:] == (tokens * dim, dim, 1)
        and pages.stride(0) % dim == 0
        and pages.data_ptr() % 16 == 0
        for pages in (k_pages, v_pages)
    )
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (0, 0)
    shared = cnt.shape[1] < q.shape[1]
    return Shape(capability, q.dtype, tokens, dim, padding, whole, shared, floor)


def passes_self_test(variant: Variant, shape: Shape, device: torch.device) -> bool:
    """Whether the variant compiles here and agrees with the reference on a small problem; logs when it does not."""
    from .forward import Split, launch

    problem = small_problem(shape, device)
    try:
        error = 0.0
        for split in (None, Split(5, 3)):
            found = launch(variant, *problem, shape.dim**-0.5, shape.padding, shape.floor, split)
            error += _error(found, problem, shape)
    except Exception as failure:  # whatever a compiler or a launch raises: the next variant may work
        logger.warning("PBSA forward: %s is not used: %s: %s", variant.name, type(failure).__name__, failure)
        return False
    limit = 0.02 + 8 * torch.finfo(shape.dtype).eps  # values are about 1; a wrong tile is off by far more
    if not error <= limit:  # NaN fails too
        logger.warning("PBSA forward: %s is not used: its self-test is off by %.3g", variant.name, error)
        return False
    return True


Problem = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # q, k_pages, v_pages, page_len, idx, cnt


def small_problem(shape: Shape, device: torch.device, groups: int = 8) -> Problem:
    """What self-tests compute: lists of no page to all pages, an odd number of query blocks, ragged pages where the
    call may have some."""
    blocks, slots = 9, 9
    tokens, dim = shape.tokens, shape.dim
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(groups, n, tokens, dim, generator=draw) for n in (blocks, slots, slots))
    page_len = torch.randint(shape.floor, tokens + 1, (groups, slots), generator=draw, dtype=torch.int32)
    if shape.padding == "none":
        page_len.fill_(tokens)
    tail = torch.arange(tokens) >= page_len[..., None]
    for pages in (k, v):
        pages[tail] = float("nan") if shape.padding == "any" else 0.0
    lists = 1 if shape.shared else blocks
    idx = torch.rand(groups, lists, slots, generator=draw).argsort(-1)
    cnt = (torch.arange(groups)[:, None] + torch.arange(lists)) % (slots + 1)
    q, k, v = (x.to(device, shape.dtype) for x in (q, k, v))
    page_len, idx, cnt = (x.to(device, torch.int32) for x in (page_len, idx, cnt))
    return q, k, v, page_len, idx, cnt


def _error(found: tuple[Tensor, Tensor], problem: Problem, shape: Shape) -> float:
    """Largest difference from the reference in float32, of out and of lse where it is finite."""
    q, k, v, page_len, idx, cnt = problem
    out, lse = reference.attention(q.float(), k.float(), v.float(), page_len, idx, cnt, shape.dim**-0.5)
    both_empty = (lse == found[1]) & lse.isinf()
    lse_error = (found[1] - lse).abs().masked_fill(both_empty, 0).max()
    return float(torch.maximum((found[0] - out).abs().max(), lse_error))
