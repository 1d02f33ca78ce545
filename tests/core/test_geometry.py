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
def test_blocks_are_boxes_that_differ_by_at_most_one(grid, block_tokens):
    geometry = BlockGeometry(*grid, block_tokens)
    blocks = geometry.pack(token_coordinates(*grid))[0]
    for axis in range(3):
        sides = set()
        for block, length, first in zip(blocks, geometry.lens.tolist(), geometry.first_frame.tolist()):
            tokens = block[:length]
            box = tokens.max(0).values - tokens.min(0).values + 1
            assert int(box.prod()) == length, "a block is a full box"
            assert first == int(tokens[0, 0]) - 1
            sides.add(int(box[axis]))
        assert max(sides) - min(sides) <= 1
        assert max(sides) == geometry.tile[axis]


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
    ("grid", "blocks", "tile"),
    [
        ((3, 30, 52), 78, (3, 5, 4)),  # 480 x 832, landscape
        ((3, 52, 30), 78, (3, 4, 5)),  # portrait
        ((1, 30, 52), 26, (1, 15, 4)),  # frame by frame
        ((3, 16, 16), 12, (1, 8, 8)),
        ((1, 1, 1), 1, (1, 1, 1)),
    ],
)
def test_known_grids(grid, blocks, tile):
    geometry = BlockGeometry(*grid, 64)
    assert (geometry.num_blocks, geometry.tile) == (blocks, tile)


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
