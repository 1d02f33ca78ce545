"""Pages and tables against plain Python: lists of block names, sorted by importance."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_forcing_pack.sparse_attn.config import AttentionConfig
from sparse_forcing_pack.sparse_attn.memory import PagedKV
from sparse_forcing_pack.sparse_attn.positions import apply_rope, rope_table

LAYERS, GROUPS, HEAD_DIM, GRID, TOKENS = 2, 3, 16, (3, 5), 8


def memory(chunk_frames, window=2, persistent=2, sink=1, positions="absolute", **options):
    """Budgets in chunks; tiles of 8 tokens at most are ragged on the 3 x 5 grid."""
    attention = AttentionConfig(
        window_frames=window * chunk_frames,
        persistent_frames=persistent * chunk_frames,
        sink_frames=sink * chunk_frames,
        block_tokens=TOKENS,
        positions=positions,
    )
    sizes = {"layers": LAYERS, "groups": GROUPS, "head_dim": HEAD_DIM, "grid": GRID} | options
    return PagedKV(**sizes, chunk_frames=chunk_frames, attention=attention)


class NamedBlocks:
    """The update rule for one layer and group, on block names and with Python's sort."""

    def __init__(self, capacity, window_chunks, sink_frames):
        self.capacity, self.window_chunks, self.sink_frames = capacity, window_chunks, sink_frames
        self.persistent, self.window = [], []

    def end_chunk(self, names, last_frame, importance):
        """names of the chunk's blocks; importance: name -> score of every block that was read."""
        self.window.append([(name, last_frame < self.sink_frames) for name in names])
        if len(self.window) < self.window_chunks:
            return
        candidates = self.persistent + self.window.pop(0)
        ranked = sorted(candidates, key=lambda block: -math.inf if block[1] else -importance[block[0]])
        winners = set(ranked[: self.capacity])
        self.persistent = [block for block in candidates if block in winners]

    def names(self):
        return [name for name, _ in self.persistent], [name for chunk in self.window for name, _ in chunk]


def write_names(pages, first_name):
    """Fill the open chunk's pages with the number of their block, the same in all layers and groups."""
    names = torch.arange(first_name, first_name + pages.chunk.num_blocks)
    blocks = names.view(1, -1, 1, 1).expand(GROUPS, -1, pages.attention.block_tokens, HEAD_DIM).float()
    for layer in range(LAYERS):
        pages.write(layer, blocks, -blocks)
    return names.tolist()


def stored_names(pages, layer, group):
    """(P, window) as names read from the pages themselves."""
    slots = pages.table[layer, group]
    window = sum(chunk.blocks for chunk in pages.window)
    parts = slots[: pages.persistent], slots[pages.capacity : pages.capacity + window]
    for part in parts:
        assert torch.equal(pages.v_pages[layer, group, part], -pages.k_pages[layer, group, part])
        assert torch.equal(pages.pooled[layer, group, part], pages.k_pages[layer, group, part, 0])
    return [pages.k_pages[layer, group, part, 0, 0].int().tolist() for part in parts]


@settings(deadline=None, max_examples=50)
@given(
    chunk_frames=st.integers(1, 3),
    window=st.integers(1, 3),
    persistent=st.integers(0, 3),
    sink=st.integers(0, 3),
    data=st.data(),
)
def test_update_is_top_c(chunk_frames, window, persistent, sink, data):
    pages = memory(chunk_frames, window, persistent, min(sink, persistent))
    size = pages.table.shape[-1]
    blocks = pages.geometry(chunk_frames).num_blocks
    assert pages.capacity == persistent * blocks
    assert size == (persistent + window) * blocks, "S = C + W"
    rules = {
        (layer, group): NamedBlocks(pages.capacity, window, pages.attention.sink_frames)
        for layer in range(LAYERS)
        for group in range(GROUPS)
    }
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    frame, name = 0, 1
    for frames in data.draw(st.lists(st.integers(1, chunk_frames), min_size=1, max_size=8)):
        pages.begin_chunk(frame, frames)
        names = write_names(pages, name)
        read = pages.persistent_slots.shape[-1] + pages.window_slots.shape[-1]
        # of two query blocks, with ties
        shares = torch.randint(0, 4, (LAYERS, GROUPS, 2, read), generator=generator).float()
        pages.shares = list(shares)
        for (layer, group), rule in rules.items():
            before = [*rule.names()[0], *rule.names()[1], *names]
            importance = dict(zip(before, shares[layer, group].sum(0).tolist(), strict=True))
            rule.end_chunk(names, frame + frames - 1, importance)
        pages.end_chunk(frame)
        frame, name = frame + frames, name + len(names)
        every_slot = torch.arange(size).expand(LAYERS, GROUPS, size)
        assert torch.equal(pages.table.sort(-1).values, every_slot), "no page is lost or listed twice"
        for (layer, group), rule in rules.items():
            assert tuple(stored_names(pages, layer, group)) == rule.names()


def run(pages, chunks, frames, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for chunk in range(chunks):
        pages.begin_chunk(chunk * frames, frames)
        write_names(pages, 1 + chunk * pages.chunk.num_blocks)
        read = pages.persistent_slots.shape[-1] + pages.window_slots.shape[-1]
        pages.shares = list(torch.rand(LAYERS, GROUPS, 1, read, generator=generator))
        pages.end_chunk(chunk * frames)


def test_the_sink_never_leaves_and_heads_choose_for_themselves():
    pages = memory(3, window=2, persistent=3, sink=1)
    run(pages, 20, 3)
    kept = pages.kept_frames()
    assert kept.shape == (LAYERS, GROUPS, pages.capacity)
    blocks = pages.geometry(3).num_blocks
    assert (kept[..., :blocks] < 3).all()
    assert (kept[..., blocks:] >= 3).all()
    assert (kept.diff(dim=-1) >= 0).all(), "the order of time"
    chosen = {
        tuple(stored_names(pages, layer, group)[0]) for layer in range(LAYERS) for group in range(GROUPS)
    }
    assert len(chosen) == LAYERS * GROUPS


def test_the_pool_is_allocated_once():
    pages = memory(3)
    addresses = {name: tensor.data_ptr() for name, tensor in pages.tensors().items()}
    run(pages, 10, 3)
    assert {name: tensor.data_ptr() for name, tensor in pages.tensors().items()} == addresses


def test_lengths_and_frames_of_pages_follow_their_blocks():
    pages = memory(3)
    pages.begin_chunk(12, 3)
    geometry = pages.chunk
    assert geometry.lens.unique().numel() > 1, "the test needs ragged blocks"
    current = pages.current
    assert (pages.page_len.gather(2, current) == geometry.lens).all()
    assert (pages.page_frame.gather(2, current) == geometry.first_frame + 12).all()


def rebased_stream(pages, chunk_lengths):
    """Write random keys, rotated at the time that the memory asks for; returns the keys before rotation, by chunk."""
    generator, plain, frame, times = torch.Generator().manual_seed(0), [], 0, []
    for frames in chunk_lengths:
        time = pages.begin_chunk(frame, frames)
        keys = torch.randn(1, frames * GRID[0] * GRID[1], GROUPS, HEAD_DIM, generator=generator)
        rotated = pages.chunk.pack(apply_rope(keys, *rope_table(time, frames, *GRID, HEAD_DIM, "cpu")))
        for layer in range(LAYERS):
            pages.write(layer, rotated, rotated)
        read = pages.persistent_slots.shape[-1] + pages.window_slots.shape[-1]
        pages.shares = list(torch.rand(LAYERS, GROUPS, 1, read, generator=generator))
        pages.end_chunk(frame)
        plain.append(keys)
        times.append(time)
        frame += frames
    return plain, times


@pytest.mark.parametrize(
    ("chunk_frames", "window", "first"), [(3, 2, 3), (3, 3, 1), (2, 3, 2), (1, 4, 1), (3, 1, 3)]
)
def test_rebased_pages_stand_in_the_window_or_just_before_it(chunk_frames, window, first):
    pages = memory(chunk_frames, window, persistent=2, positions="rebased")
    lengths = [first, *[chunk_frames] * 9]
    plain, times = rebased_stream(pages, lengths)
    assert times[: window - 1] == [sum(lengths[:i]) for i in range(window - 1)], (
        "absolute until the window is full"
    )
    assert set(times[window:]) == {(window - 1) * chunk_frames}, "then in one place"

    def blocks_at(chunk, time):  # [G, NB, T, D], rotated once, directly
        table = rope_table(time, lengths[chunk], *GRID, HEAD_DIM, "cpu")
        return pages.geometry(lengths[chunk]).pack(apply_rope(plain[chunk], *table))

    time, start = 0, pages.capacity
    for chunk in range(len(lengths) - len(pages.window), len(lengths)):
        expected = blocks_at(chunk, time)
        for layer in range(LAYERS):
            slots = pages.table[layer, :, start : start + expected.shape[1]]
            stored = pages.k_pages[layer][torch.arange(GROUPS)[:, None], slots]
            torch.testing.assert_close(stored, expected, atol=1e-5, rtol=0)
        time, start = time + lengths[chunk], start + expected.shape[1]

    before_window = torch.cat([blocks_at(chunk, -frames) for chunk, frames in enumerate(lengths)], dim=1)
    for layer in range(LAYERS):
        for group in range(GROUPS):
            slots = pages.table[layer, group, : pages.persistent]
            stored = pages.k_pages[layer, group, slots].flatten(1)
            expected = before_window[group].flatten(1)
            nearest = torch.cdist(stored, expected, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
            assert nearest.values.max() < 1e-4
            assert (nearest.indices.diff() > 0).all()
            mean = stored.view(-1, TOKENS, HEAD_DIM).sum(1) / pages.page_len[layer, group, slots, None]
            torch.testing.assert_close(pages.pooled[layer, group, slots], mean, atol=1e-5, rtol=0)


def test_ten_thousand_chunks_rotate_a_page_a_bounded_number_of_times():
    pages = memory(
        1, window=3, persistent=2, sink=1, positions="rebased", layers=1, groups=1, head_dim=8, grid=(1, 1)
    )
    plain = torch.randn(1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    pages.shares = [torch.zeros(1, 1, 5)]  # ties keep the older block: P is the first two frames
    turned = [pages.geometry(1).pack(apply_rope(plain, *rope_table(t, 1, 1, 1, 8, "cpu"))) for t in range(3)]
    for frame in range(10_000):
        time = pages.begin_chunk(frame, 1)
        assert time == min(frame, 2)
        pages.write(0, turned[time], turned[time])
        pages.end_chunk(frame)
        if frame == 4:
            promoted = pages.k_pages[0, 0, pages.table[0, 0, :2]].clone()
    assert torch.equal(pages.k_pages[0, 0, pages.table[0, 0, :2]], promoted), "never turned again"
    for place, time in ((0, -1), (1, -1), (2, 0), (3, 1)):
        expected = apply_rope(plain, *rope_table(time, 1, 1, 1, 8, "cpu")).flatten()
        torch.testing.assert_close(
            pages.k_pages[0, 0, pages.table[0, 0, place], 0], expected, atol=2e-6, rtol=0
        )
