"""Arguments that do not fit are named; a backend runs or says why not; only `auto` chooses, and says so once."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pbsa_oracle import make_problem
from sparse_forcing_pack.kernels import BlockLists, backend_report, pbsa_attention, pool_pages, route
from sparse_forcing_pack.kernels.pbsa import constraints
from sparse_forcing_pack.kernels.pbsa.constraints import TRITON, Call

ROOT = Path(__file__).resolve().parents[2]
on_cpu = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs on the CPU"
)


def _attention_args() -> dict:
    p = make_problem()
    return {"q": p.q, "k_pages": p.k_pages, "v_pages": p.v_pages, "page_len": p.page_len, "lists": p.lists}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda q: q[0], r"q must be \[G, NQ, T, D\]"),
        ("k_pages", lambda k: k[..., :32], r"k_pages must be \[G, S, T, D\] = \[2, any, 16, 64\], got"),
        ("v_pages", lambda v: v[:, :4], r"v_pages must be \[G, S, T, D\] = \[2, 7, 16, 64\], got"),
        ("v_pages", lambda v: v.half(), "v_pages must be torch.float32, got torch.float16; convert"),
        ("page_len", lambda n: n.long(), "page_len must be torch.int32, got torch.int64; convert"),
        ("page_len", lambda n: n[:1], r"page_len must be \[G, S\] = \[2, 7\], got \[1, 7\]"),
        ("page_len", lambda n: n.to("meta"), "page_len must be on cpu, got meta; move it"),
        (
            "lists",
            lambda x: BlockLists(x.idx[:, :2], x.cnt),
            r"lists.idx must be \[G, NR, M\] with NR a divisor of NQ = \[2, 3, any\]",
        ),
        ("lists", lambda x: BlockLists(x.idx, x.cnt[:, :1]), r"lists.cnt must be \[G, NR\] = \[2, 3\]"),
        ("lists", lambda x: BlockLists(x.idx, x.cnt.float()), "lists.cnt must be torch.int32"),
    ],
)
def test_attention_names_what_does_not_fit(name, change, message):
    args = _attention_args()
    args[name] = change(args[name])
    with pytest.raises(ValueError, match=message):
        pbsa_attention(**args)


def test_attention_names_a_wrong_promise_and_wrong_targets():
    args = _attention_args()
    with pytest.raises(ValueError, match="padding must be none, finite or any, got 'zero'"):
        pbsa_attention(**args, padding="zero")
    with pytest.raises(ValueError, match=r"grad_pages must be \[G, NC\] = \[2, any\], got \[1, 2\]"):
        pbsa_attention(**args, grad_pages=torch.zeros(1, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="grad_pages must be torch.int32"):
        pbsa_attention(**args, grad_pages=torch.zeros(2, 2, dtype=torch.int64))


def _route_args() -> dict:
    slots = torch.arange(6, dtype=torch.int32).expand(2, -1)
    pooled = {"pooled_q": torch.randn(2, 3, 8), "pooled_k": torch.randn(2, 6, 8)}
    return pooled | {"always": slots[:, :2], "local": slots[:, 2:], "k": 2}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "pooled_q",
            lambda q: q.half(),
            "pooled_q must be float32, as pool_pages gives it, got torch.float16",
        ),
        ("pooled_k", lambda k: k[..., :4], r"pooled_k must be \[G, S, D\] = \[2, any, 8\]"),
        ("pooled_k", lambda k: k.double(), "pooled_k must be torch.float32"),
        ("always", lambda a: a[0], r"always must be \[G, NA\]"),
        ("local", lambda a: a.long(), "local must be torch.int32"),
        ("k", lambda k: -1, "k must be a whole number of pages, 0 or more, got -1"),
        ("k", lambda k: 0.25, "k must be a whole number of pages, 0 or more, got 0.25"),
    ],
)
def test_route_names_what_does_not_fit(name, change, message):
    args = _route_args()
    args[name] = change(args[name])
    with pytest.raises(ValueError, match=message):
        route(**args)


def test_route_needs_a_page():
    args = _route_args()
    args["always"] = args["local"] = args["local"][:, :0]
    with pytest.raises(ValueError, match="both empty"):
        route(**args)


def test_pool_pages_names_what_does_not_fit():
    with pytest.raises(ValueError, match="page_len must be"):
        pool_pages(torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, dtype=torch.int32))


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend must be auto, reference or triton, got 'cuda'"):
        pbsa_attention(**_attention_args(), backend="cuda")


@on_cpu
def test_a_named_backend_raises_with_the_reason(monkeypatch):
    monkeypatch.setattr(constraints, "triton_missing", lambda: None)
    reason = "backend 'triton' cannot run: it needs a device of type cuda, got cpu"
    with pytest.raises(RuntimeError, match=f"PBSA attention: {reason}"):
        pbsa_attention(**_attention_args(), backend="triton")
    with pytest.raises(RuntimeError, match=f"PBSA route: {reason}"):
        route(**_route_args(), backend="triton")


@on_cpu
def test_auto_logs_each_choice_once(monkeypatch, caplog):
    monkeypatch.setattr(constraints, "triton_missing", lambda: "triton cannot be imported")
    constraints._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="sparse_forcing.kernels"):
        for _ in range(2):
            pbsa_attention(**_attention_args())
            route(**_route_args())
    assert [record.getMessage() for record in caplog.records] == [
        "PBSA attention: auto took backend reference: not triton, triton cannot be imported",
        "PBSA route: auto took backend reference: not triton, triton cannot be imported",
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"dtype": torch.float64}, "got torch.float64"),
        ({"head_dim": 256}, "it needs a head dim of 16 to 128, got 256"),
        ({"block_tokens": 48}, "it needs blocks of 16, 32, 64, 128 tokens, got 48"),
        ({"candidates": 5000}, "it scores at most 4096 page slots a row, got 5000"),
        ({"device": torch.device("mps")}, "it needs a device of type cuda, got mps"),
    ],
)
def test_triton_constraints(monkeypatch, change, reason):
    monkeypatch.setattr(constraints, "triton_missing", lambda: None)
    monkeypatch.setattr(constraints, "interpreter_on", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    facts = {"device": torch.device("cuda"), "dtype": torch.float16, "head_dim": 128, "block_tokens": 64}
    why = TRITON.why_not(Call("attention", **(facts | change)))
    assert why is None if reason is None else why is not None and reason in why


def test_old_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(constraints, "triton_missing", lambda: None)
    monkeypatch.setattr(constraints, "interpreter_on", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    why = TRITON.why_not(Call("attention", torch.device("cuda:0"), torch.float16, 128, 64))
    assert why == "it needs compute capability 8.0 or newer, cuda:0 has 7.5"


def test_report_names_every_backend():
    report = backend_report()
    assert set(report) == {"triton", "reference"} and report["reference"] == "available"


def test_a_missing_triton_is_a_reason_not_a_crash():
    """In a process where Triton cannot be imported the package loads, reports and computes."""
    script = (
        "import sys; sys.modules['triton'] = None\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r}); import conftest\n"
        "from sparse_forcing_pack.kernels import backend_report; print(backend_report()['triton'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.startswith("triton cannot be imported (ModuleNotFoundError: "), done.stderr


def test_serve_computes_by_the_reference_once_a_kernel_failed(monkeypatch, caplog):
    calls = []

    def by_triton():
        calls.append("triton")
        raise RuntimeError("Failed to find C compiler.\nPlease specify it")

    monkeypatch.setattr(constraints, "_failed", {})
    monkeypatch.setattr(constraints.TRITON.__class__, "why_not", lambda self, call: None)
    monkeypatch.setattr(constraints, "interpreter_on", lambda: False)
    facts = torch.device("cpu"), torch.float32
    found = [constraints.serve("auto", "some_operation", facts, by_triton, lambda: "right") for _ in range(3)]
    assert found == ["right"] * 3 and calls == ["triton"]
    said = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert len(said) == 1 and "RuntimeError: Failed to find C compiler" in said[0]
    with pytest.raises(RuntimeError, match="C compiler"):
        constraints.serve("triton", "some_operation", facts, by_triton, lambda: "right")


def test_serve_hands_out_of_memory_up(monkeypatch):
    def by_triton():
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(constraints, "_failed", {})
    monkeypatch.setattr(constraints.TRITON.__class__, "why_not", lambda self, call: None)
    monkeypatch.setattr(constraints, "interpreter_on", lambda: False)
    with pytest.raises(torch.OutOfMemoryError):
        constraints.serve("auto", "another", (torch.device("cpu"), torch.float32), by_triton, lambda: "right")
    assert not constraints._failed
