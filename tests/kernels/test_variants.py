"""Forward variants: each computes the same, and only one that is allowed, and right on this device, is chosen."""

import importlib.util
import logging
import os
from dataclasses import replace
from functools import partial

import pytest
import torch
from pbsa_oracle import attend_literally, make_problem

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]
inside = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs in the process of test_in_a_process"
)
if importlib.util.find_spec("triton") is not None:
    from sparse_forcing_pack.kernels.pbsa.triton import backward, forward, variants
    from sparse_forcing_pack.kernels.pbsa.triton.variants import VARIANTS, Shape, Variant

HOPPER = (9, 0)
TILES = [  # kind, rows, keys, tokens a page, one list a group
    ("pointers", 16, 32, 16, False),
    ("pointers", 64, 64, 64, False),
    ("pointers", 64, 128, 64, False),
    ("pointers", 64, 32, 64, False),
    ("pointers", 128, 64, 64, True),  # 128 rows and three blocks of 64: the last tile is half empty
    ("descriptors", 64, 64, 64, False),
    ("descriptors", 128, 64, 128, False),
    ("descriptors", 128, 64, 64, True),
    ("specialised", 128, 128, 128, False),
]


@inside
@pytest.mark.parametrize(
    ("kind", "rows", "keys", "tokens", "shared"), TILES, ids=lambda x: str(getattr(x, "value", x))
)
@pytest.mark.parametrize("padding", ["any", "finite", "none"])
def test_every_kernel_computes_the_same(kind, rows, keys, tokens, shared, padding):
    if padding == "any" and kind != "pointers":
        pytest.skip("the copy engine reads whole tiles: tails must hold numbers")
    problem = make_problem(blocks=3, slots=4, tokens=tokens, dim=24, longest=3, shared=shared, groups=2)
    problem = problem.promising(padding).to(torch.float16)
    variant = Variant(kind, rows, keys, warps=4, stages=2)
    tables = problem.page_len, *problem.lists
    found = forward.launch(variant, problem.q, problem.k_pages, problem.v_pages, *tables, 24**-0.5, padding)
    truth_out, truth_lse = attend_literally(problem, torch.float64)
    torch.testing.assert_close(found[0].double(), truth_out, rtol=0, atol=2e-3)
    torch.testing.assert_close(found[1].double(), truth_lse, rtol=0, atol=2e-5)


@inside
@pytest.mark.parametrize(("kind", "rows", "keys", "tokens", "shared"), TILES)
def test_rows_that_are_never_masked(kind, rows, keys, tokens, shared):
    """Pages of at least that many tokens: the promise changes no number."""
    problem = make_problem(blocks=3, slots=4, tokens=tokens, dim=24, longest=3, shared=shared, groups=2)
    problem.page_len.clamp_(min=tokens - 7)
    problem = problem.promising("finite").to(torch.float16)
    variant = Variant(kind, rows, keys, warps=4, stages=2)
    args = variant, problem.q, problem.k_pages, problem.v_pages, problem.page_len, *problem.lists, 0.2
    floor = forward.floor_of(tokens - 7, "finite")
    assert floor == tokens - 8 and forward.floor_of(tokens - 7, "any") == 0
    for mine, plain in zip(
        forward.launch(*args, "finite", floor), forward.launch(*args, "finite"), strict=True
    ):
        torch.testing.assert_close(mine, plain, rtol=0, atol=0)


@inside
@pytest.mark.parametrize(("kind", "rows", "keys", "tokens", "shared"), TILES[1:6] + TILES[-3:])
def test_a_split_of_the_last_wave_adds_up(kind, rows, keys, tokens, shared):
    """Parts of no page, empty lists and half-empty tiles among them."""
    problem = make_problem(blocks=3, slots=6, tokens=tokens, dim=24, longest=5, shared=shared, groups=2)
    problem = problem.promising("finite")
    variant = Variant(kind, rows, keys, warps=4, stages=2)
    args = (
        variant,
        problem.q,
        problem.k_pages,
        problem.v_pages,
        problem.page_len,
        *problem.lists,
        0.2,
        "finite",
    )
    out, lse = forward.launch(*args)
    for split in (forward.Split(0, 2), forward.Split(1, 4)):
        split_out, split_lse = forward.launch(*args, split=split)
        torch.testing.assert_close(split_out, out, rtol=0, atol=2e-6)
        torch.testing.assert_close(split_lse, lse, rtol=0, atol=2e-6)


@inside
@pytest.mark.parametrize("dim", [96, 128])
def test_v_in_two_halves(dim):
    """64 keys a step and rows of more than 64: the second half of v has its own product."""
    problem = make_problem(blocks=3, slots=4, tokens=64, dim=dim, longest=3, shared=True, groups=1)
    problem = problem.promising("finite").to(torch.float16)
    tables = problem.page_len, *problem.lists
    tensors = problem.q, problem.k_pages, problem.v_pages
    variant = Variant("specialised", 128, 64, warps=4, stages=3)
    for split in (None, forward.Split(0, 2)):
        out, lse = forward.launch(variant, *tensors, *tables, dim**-0.5, "finite", split=split)
        truth_out, truth_lse = attend_literally(problem, torch.float64)
        torch.testing.assert_close(out.double(), truth_out, rtol=0, atol=2e-3)
        torch.testing.assert_close(lse.double(), truth_lse, rtol=0, atol=2e-5)


@inside
@pytest.mark.parametrize(("lists", "shared_by", "longest"), [(5, 1, 7), (70, 1, 40), (130, 3, 33), (3, 2, 1)])
def test_readers_of_a_page(lists, shared_by, longest):
    """More lists and entries than a program looks at at once; empty lists; pages without readers; targets unsorted."""
    draw = torch.Generator().manual_seed(lists)
    slots = longest + 5
    idx = torch.rand(2, lists, slots, generator=draw).argsort(-1)[..., :longest].to(torch.int32).contiguous()
    cnt = torch.randint(0, longest + 1, (2, lists), generator=draw, dtype=torch.int32)
    targets = torch.rand(2, slots, generator=draw).argsort(-1)[:, : slots - 2].to(torch.int32).contiguous()
    readers, count = backward.transpose_lists(idx, cnt, targets, lists * shared_by)
    for g in range(2):
        for at, slot in enumerate(targets[g]):
            wanted = [
                n * shared_by + block
                for n in range(lists)
                if slot in idx[g, n, : cnt[g, n]]
                for block in range(shared_by)
            ]
            assert readers[g, at, : count[g, at]].tolist() == wanted


@pytest.mark.parametrize(
    ("tiles", "resident", "longest", "split"),
    [
        (444, 132, 51, (396, 2)),  # 3.36 waves: the last 48 tiles by two programs each
        (444, 132, 15, (444, 1)),  # lists too short to divide
        (528, 132, 51, (528, 1)),  # no last wave
        (520, 132, 51, (520, 1)),  # an almost full one
        (12, 132, 51, (0, 5)),
        (4440, 132, 51, (4440, 1)),  # too many waves for the last to matter
        (444, 0, 51, (444, 1)),
    ],
)
def test_how_the_last_wave_is_split(tiles, resident, longest, split):
    assert forward.plan_split(tiles, resident, longest) == split


def shape(
    capability=HOPPER, dtype=torch.bfloat16, tokens=128, dim=128, padding="finite", whole=True, shared=False
):
    return Shape(capability, dtype, tokens, dim, padding, whole, shared)


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (shape(), "overlapped"),
        (shape(padding="any"), "pointers"),  # the copy engine would bring NaN along
        (shape(whole=False), "pointers"),
        (shape(capability=(8, 0)), "pointers"),
        (shape(capability=(12, 0)), "pointers"),
        (shape(tokens=64), "overlapped"),
        (shape(tokens=64, padding="any"), "pointers"),
        (shape(tokens=64, shared=True), "overlapped"),
        (shape(tokens=64, shared=True, padding="any"), "pointers"),
        (shape(dim=64), "overlapped"),
        (shape(dim=96), "specialised"),  # whole powers of two alone
        (shape(dtype=torch.float32), "pointers"),
    ],
)
def test_first_choice(call, kind):
    assert next(variant for variant in VARIANTS if variant.wants(call)).kind == kind


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (shape(), "specialised"),
        (shape(tokens=64), "descriptors"),  # specialised tiles of 64 rows or keys gave NaN
        (shape(tokens=64, shared=True), "descriptors"),
        (shape(dim=64), "descriptors"),
    ],
)
def test_first_choice_where_triton_lacks_gluon(call, kind, monkeypatch):
    monkeypatch.setattr(variants, "gluon_there", lambda: False)
    assert next(variant for variant in VARIANTS if variant.wants(call)).kind == kind
    assert not backward.overlaps(call, torch.device("cuda"))


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [16, 32, 64, 128])
def test_every_call_ends_with_pointers_that_fit_everywhere(capability, dtype, tokens):
    for shared in (False, True):
        call = shape(capability, dtype, tokens, padding="any", whole=False, shared=shared)
        last = [variant for variant in VARIANTS if variant.wants(call)][-1]
        assert last.kind == "pointers" and last.capabilities is None


def test_names_are_unique():
    facts = [(v.name, v.tokens, v.dtypes, v.shared) for v in VARIANTS]
    assert len(set(facts)) == len(facts)


@pytest.fixture
def on_a_device(monkeypatch):
    """Choose as on a GPU, without one: nothing is interpreted, nothing is captured."""
    monkeypatch.setattr(variants, "_chosen", {})
    monkeypatch.setattr(variants, "interpreter_on", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(variants, "shape_of", lambda *args: shape())
    problem = variants.small_problem
    tiny = {"tokens": 16, "dim": 16}
    monkeypatch.setattr(
        variants, "small_problem", lambda call, device: problem(replace(call, **tiny), device)
    )


def choose():
    p = make_problem(tokens=16)
    return variants.choose_variant(p.q, p.k_pages, p.v_pages, p.page_len, *p.lists, "finite")


def test_a_variant_that_gives_nan_or_wrong_numbers_or_fails_is_not_chosen(on_a_device, monkeypatch, caplog):
    from sparse_forcing_pack.kernels.pbsa import reference

    def launch(variant, q, k, v, page_len, idx, cnt, scale, padding, floor, split):
        if variant not in asked:
            asked.append(variant)
        if variant.kind == "overlapped":
            return torch.full_like(q, float("nan")), torch.zeros(q.shape[:3])
        if variant.kind == "descriptors":
            raise RuntimeError("out of resources")
        out, lse = reference.attention(q.float(), k.float(), v.float(), page_len, idx, cnt, scale)
        wrong = variant is VARIANTS[1]
        return (out + 0.5 * wrong).to(q.dtype), lse

    asked = []
    monkeypatch.setattr(forward, "launch", launch)
    with caplog.at_level(logging.WARNING, logger="sparse_forcing.kernels"):
        chosen = choose()
    assert chosen.kind == "pointers" and asked[:3] == list(VARIANTS[:3]) and chosen is asked[3]
    reasons = [record.getMessage().split("is not used: ")[1] for record in caplog.records]
    assert reasons[::2] == ["its self-test is off by nan", "RuntimeError: out of resources"]
    assert len(reasons) == 3 and reasons[1].startswith("its self-test is off by 1.0")
    tests = len(asked)
    assert choose() is chosen and len(asked) == tests  # once a process


def test_no_variant_left_is_an_error(on_a_device, monkeypatch):
    monkeypatch.setattr(variants, "passes_self_test", lambda *args: False)
    with pytest.raises(RuntimeError, match="no Triton variant gives right numbers on cpu"):
        choose()


def test_while_a_graph_is_captured_nothing_is_tested(on_a_device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(variants, "passes_self_test", lambda *args: pytest.fail("tested"))
    assert choose().kind == "pointers" and not variants._chosen


@pytest.fixture
def small(monkeypatch):
    """Self-tests of the backward pass on problems that a CPU computes at once."""
    problem = variants.small_problem
    tiny = {"tokens": 16, "dim": 16}
    monkeypatch.setattr(
        backward, "small_problem", lambda call, device: problem(replace(call, **tiny), device, groups=2)
    )


@pytest.mark.parametrize(
    ("off", "used"), [(0.0, True), (0.3, False), (float("nan"), False), (RuntimeError("no room"), False)]
)
def test_overlapped_gradients_are_trusted_after_a_test_and_tested_once(small, monkeypatch, caplog, off, used):
    def launch(how, grad_out, grad_lse, out, lse, q, k, v, *rest):
        asked.append(how)
        if isinstance(how, backward.Overlapped) and isinstance(off, Exception):
            raise off
        draw = torch.Generator().manual_seed(0)
        gradients = [torch.randn(x.shape, generator=draw) for x in (q, k, v)]
        return [x + off * isinstance(how, backward.Overlapped) for x in gradients] if off else gradients

    asked: list = []
    monkeypatch.setattr(backward, "launch", launch)
    monkeypatch.setattr(backward, "_overlaps", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with caplog.at_level(logging.INFO, logger="sparse_forcing.kernels"):
        assert backward.overlaps(shape(), torch.device("cpu")) == used
    assert asked and ("is not used" in caplog.text) != used
    tests = len(asked)
    assert backward.overlaps(shape(), torch.device("cpu")) == used and len(asked) == tests


def test_overlapped_gradients_are_not_tested_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(backward, "_overlaps", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(backward, "passes_self_test", lambda *args: pytest.fail("tested"))
    assert not backward.overlaps(shape(), torch.device("cpu")) and not backward._overlaps


@pytest.mark.parametrize(
    "call",
    [
        *(shape(capability=other) for other in ((8, 0), (10, 0), (12, 0))),
        *(shape(tokens=64), shape(dim=96), shape(padding="any"), shape(whole=False), shape(shared=True)),
        shape(dtype=torch.float32),
    ],
)
def test_what_overlapped_gradients_are_not_for(call, monkeypatch):
    monkeypatch.setattr(backward, "passes_self_test", lambda *args: pytest.fail("tested"))
    assert not backward.overlaps(call, torch.device("cuda"))


@inside
def test_the_self_test_passes_where_the_kernel_is_right(monkeypatch):
    monkeypatch.setattr(variants, "small_problem", partial(variants.small_problem, groups=1))
    call = shape((0, 0), torch.float16, tokens=16, dim=16, padding="any")
    assert variants.passes_self_test(Variant("pointers", 16, 32, 4, 1), call, torch.device("cpu"))
