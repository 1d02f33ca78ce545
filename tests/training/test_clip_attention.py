"""Block-sparse attention of a whole clip: dense where everything is read, and its lists' attention where it is not."""

import pytest
import torch
from sparse_forcing_pack.kernels import pool_pages
from sparse_forcing_pack.sparse_attn.geometry import BlockGeometry
from sparse_forcing_pack.sparse_attn.router import choose_blocks
from sparse_forcing_pack.sparse_attn.state import sdpa
from sparse_forcing_pack.sparse_attn.training.clip_attention import SparseClip
from sparse_forcing_pack.sparse_attn.training.cost import cost_of
from sparse_forcing_pack.sparse_attn.training.dmd_config import DmdTraining

FRAMES, GRID, TOKENS = 5, (3, 5), 8  # 75 tokens, ragged blocks


def drawn(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shape = (2, FRAMES * GRID[0] * GRID[1], 3, 16)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]


def results(attend, q, k, v):
    out = attend(q, k, v)
    return out, *torch.autograd.grad((out * torch.linspace(-1, 1, 16).to(out)).sum(), (q, k, v))


def masked_by_the_lists(clip, q, k, v):
    """Dense attention in which a query sees the tokens of its block's pages alone."""
    blocks = [clip.geometry.pack(x.detach()) for x in (q, k)]
    groups, lens = len(blocks[0]), clip.geometry.lens
    lens = lens.expand(groups, -1).contiguous()
    pooled = [pool_pages(x, lens).float() for x in blocks]
    pages = clip.pages.expand(groups, -1).contiguous()
    lists, _ = choose_blocks(*pooled, pages[:, :0], pages, clip.topk, "reference")
    reads = torch.zeros(groups, len(clip.pages), len(clip.pages)).scatter_(2, lists.idx.long(), 1.0).bool()
    block_of_token = torch.empty(q.shape[1], dtype=torch.int64)
    for block, tokens in enumerate(clip.geometry.tokens):
        block_of_token[tokens[tokens >= 0].long()] = block
    mask = reads[:, block_of_token][:, :, block_of_token].unflatten(0, (q.shape[0], q.shape[2]))
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize("topk", [1.0, 0.3])
def test_a_clip_reads_what_its_lists_say(topk):
    clip = SparseClip(BlockGeometry(FRAMES, *GRID, TOKENS), topk, torch.float64)
    q, k, v = drawn()
    found = results(lambda *x: clip(0, *x), q, k, v)
    dense = results(sdpa, q, k, v)
    expected = dense if topk == 1 else results(lambda *x: masked_by_the_lists(clip, *x), q, k, v)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)
    assert torch.allclose(found[0], dense[0]) == (topk == 1)


def test_products_are_in_the_dtype_that_was_asked_for():
    clip = SparseClip(BlockGeometry(FRAMES, *GRID, TOKENS), 0.5, torch.bfloat16)
    q, k, v = drawn(torch.float32)
    out = clip(0, q, k, v)
    assert out.dtype == torch.float32 and torch.equal(out, out.bfloat16().float())


def test_a_critic_that_reads_all_trains_as_a_dense_one(make_run, tmp_path):
    dense, whole, half = (make_run(tmp_path / name, student_every=1) for name in ("dense", "whole", "half"))
    for run, topk in ((whole, 1.0), (half, 0.5)):
        run.critic_attention = SparseClip(BlockGeometry(12, 2, 3, 4), topk, torch.float32)
    first, second, third = (run.step() for run in (dense, whole, half))
    assert first["critic_loss"] == pytest.approx(second["critic_loss"], rel=1e-4)
    assert first["critic_loss"] != pytest.approx(third["critic_loss"], rel=1e-4)
    for part in ("student", "critic"):
        a, b = (getattr(run, part).state_dict() for run in (dense, whole))
        for name in a:
            torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=1e-3)


def test_the_setting_reaches_the_critic_alone(make_run, tmp_path):
    run = make_run(tmp_path, critic_topk=0.5, student_every=1, recompute_critic=True)
    assert isinstance(run.critic_attention, SparseClip)
    values = run.step()
    assert values["critic_loss"] > 0 and values["student_norm"] > 0
    run.use_attention(run.cfg.attention, 1.0)
    assert not isinstance(run.critic_attention, SparseClip)


def test_its_saving_is_counted():
    parts = [cost_of(DmdTraining(critic_topk=k), "1.3B", "1.3B", (30, 52)).student_step for k in (1.0, 0.25)]
    assert parts[1]["critic"] < 0.6 * parts[0]["critic"]
    assert parts[1]["score"] < parts[0]["score"] and parts[1]["replay"] == parts[0]["replay"]
