"""Blocks are a partition of the chunk's tokens, compact, few, and as even as the grid allows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_forcing_pack.sparse_attn.geometry import BlockGeometry, choose_counts

grids = st.tuples(st.integers(1, 5), st.integers(1, 20), st.integers(1, 20))


def token_coordinates(frames, height, width):
    """[1, N, 1, 3]: the (frame, row, column) of every token, in the order of the model."""
    axes = torch.meshgrid(*(torch.arange(n) for n in (frames, height, width)), indexing="ij")
    return torch.stack(axes, dim=-1).reshape(1, -1, 1, 3) + 1  # from 1, so that padding stands out


@settings(deadline=None, max_examples=60)
@given(grids, st.integers(1, 128))
def test_every_token_lies_in_exactly_one_block(grid, block_tokens):
    geometry = BlockGeometry(*grid, block_tokens)
    blocks = geometry.pack(token_coordinates(*grid))[0]  # [NB, T, 3]
    assert blocks.shape[:2] == (geometry.num_blocks, block_tokens)
    assert geometry.lens.dtype == torch.int32
    assert int(geometry.lens.sum()) == geometry.num_tokens == grid[0] * grid[1] * grid[2]
    assert 1 <= int(geometry.lens.min()) <= int(geometry.lens.max()) <= block_tokens
    valid = torch.arange(block_tokens) < geometry.lens[:, None]
    assert torch.equal(geometry.tokens >= 0, valid)
    flat = token_coordinates(*grid)[0, :, 0]
    assert torch.equal(flat[geometry.tokens[valid].long()], blocks[valid])
    assert (blocks[~valid] == 0).all()
    seen = {tuple(token) for token in blocks[valid].tolist()}
    assert len(seen) == geometry.num_tokens
    assert (0, 0, 0) not in seen


@settings(deadline=None, max_examples=60)
@given(grids, st.integers(1, 128))
def test_blocks_are_few_compact_and_as_even_as_they_can_be(grid, block_tokens):
    frames, height, width = grid
    geometry = BlockGeometry(*grid, block_tokens)
    blocks = geometry.pack(token_coordinates(*grid))[0]
    counts = choose_counts(grid, block_tokens)
    t, h, _ = (-(-size // count) for size, count in zip(grid, counts))
    shortest = (frames // counts[0]) * (height // counts[1]) * width  # tokens of a strip
    strips = 1 + -(-block_tokens // shortest)  # that a run may touch: two, or more where one is no whole run
    spans = {}  # first frame of a block -> lengths of the blocks there
    boxes = True
    for block, length, first in zip(blocks, geometry.lens.tolist(), geometry.first_frame.tolist()):
        tokens = block[:length] - 1
        sides = tokens.max(0).values - tokens.min(0).values + 1
        boxes &= int(sides.prod()) == length
        assert first == int(tokens[:, 0].min())
        assert int(sides[0]) <= t and int(sides[1]) <= strips * h, "a run turns into the next strip"
        spans.setdefault(first, []).append(length)
    for first, lengths in spans.items():
        span = min((f for f in spans if f > first), default=frames) - first
        assert sum(lengths) == span * height * width, "no block crosses a span of frames"
        if not boxes:
            assert len(lengths) == -(-sum(lengths) // block_tokens), "no block too many"
            assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(("grid", "tokens"), [((3, 30, 52), 128), ((3, 45, 80), 64), ((3, 52, 30), 128)])
def test_runs_are_about_as_compact_as_boxes(grid, tokens):
    """Mean squared distance of a block's tokens from its centre, in rows and columns."""
    geometry = BlockGeometry(*grid, tokens)
    blocks = geometry.pack(token_coordinates(*grid))[0].float()
    spread = [
        (block[:n, 1:] - block[:n, 1:].mean(0)).square().sum(1).mean()
        for block, n in zip(blocks, geometry.lens.tolist())
    ]
    _, h, w = (-(-size // count) for size, count in zip(grid, choose_counts(grid, tokens)))
    box = (h * h + w * w - 2) / 12
    assert sum(spread) / len(spread) < 1.35 * box


@settings(deadline=None, max_examples=30)
@given(st.tuples(st.integers(1, 4), st.integers(1, 8), st.integers(1, 8)), st.integers(1, 40))
def test_no_other_split_needs_fewer_blocks_or_is_more_compact(grid, block_tokens):
    best = None
    for nt in range(1, grid[0] + 1):
        for nh in range(1, grid[1] + 1):
            for nw in range(1, grid[2] + 1):
                t, h, w = (-(-size // count) for size, count in zip(grid, (nt, nh, nw)))
                if t * h * w <= block_tokens:
                    found = (nt * nh * nw, t * h + h * w + w * t)
                    best = found if best is None else min(best, found)
    counts = choose_counts(grid, block_tokens)
    t, h, w = (-(-size // count) for size, count in zip(grid, counts))
    assert (counts[0] * counts[1] * counts[2], t * h + h * w + w * t) == best


@settings(deadline=None, max_examples=30)
@given(grids, st.integers(1, 64), st.integers(1, 5))
def test_a_shorter_chunk_never_needs_more_blocks(grid, block_tokens, fewer):
    frames, height, width = grid
    short = BlockGeometry(min(frames, fewer), height, width, block_tokens)
    assert short.num_blocks <= BlockGeometry(*grid, block_tokens).num_blocks


@pytest.mark.parametrize(
    ("grid", "blocks", "lengths"),
    [
        ((3, 30, 52), 74, {63, 64}),  # 480 x 832, landscape: boxes would be 78 of 60
        ((3, 52, 30), 74, {63, 64}),  # portrait
        ((1, 30, 52), 25, {62, 63}),  # frame by frame
        ((3, 16, 16), 12, {64}),  # boxes of 8 x 8
        ((1, 1, 1), 1, {1}),
    ],
)
def test_known_grids(grid, blocks, lengths):
    geometry = BlockGeometry(*grid, 64)
    assert (geometry.num_blocks, set(geometry.lens.tolist())) == (blocks, lengths)


@settings(deadline=None, max_examples=30)
@given(grids, st.integers(1, 64), st.integers(1, 2), st.integers(1, 3))
def test_unpack_undoes_pack(grid, block_tokens, batch, heads):
    geometry = BlockGeometry(*grid, block_tokens)
    x = torch.randn(batch, geometry.num_tokens, heads, 4)
    blocks = geometry.pack(x)
    assert blocks.shape == (batch * heads, geometry.num_blocks, block_tokens, 4)
    assert torch.equal(geometry.unpack(blocks, batch), x)


def test_pack_lets_gradients_through():
    geometry = BlockGeometry(3, 5, 7, 16)
    x = torch.randn(1, geometry.num_tokens, 2, 4, requires_grad=True)
    geometry.unpack(geometry.pack(x) * 3, 1).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3))


def test_refuses_an_empty_grid():
    with pytest.raises(ValueError, match=r"3 x 0 x 4 tokens .* 1 or more"):
        BlockGeometry(3, 0, 4, 64)
