"""The window mode keeps exactly what Self-Forcing's cache keeps, where Self-Forcing's cache keeps it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_forcing_pack.sparse_attn.frame_cache import FrameCache
from sparse_forcing_pack.sparse_attn.positions import apply_rope, rope_table

HEAD_DIM = 16


def self_forcing_cells(window, sink, chunk_lengths):
    """What Self-Forcing's cache holds during each chunk, by its index arithmetic: frame indices, one a cell."""
    cells, local_end, frame = [-1] * window, 0, 0
    for new in chunk_lengths:
        if local_end + new > window:
            evicted = local_end + new - window
            rolled = local_end - evicted - sink
            cells[sink : sink + rolled] = cells[sink + evicted : sink + evicted + rolled]
            local_end -= evicted
        cells[local_end : local_end + new] = range(frame, frame + new)
        local_end, frame = local_end + new, frame + new
        yield cells[:local_end]


@st.composite
def windows(draw):
    """window, sink and the lengths of chunks: whole ones, the first perhaps shorter (a start image)."""
    chunk = draw(st.integers(1, 3))
    window = chunk * draw(st.integers(1, 5))
    sink = draw(st.integers(0, window - chunk))
    return window, sink, [draw(st.integers(1, chunk)), *[chunk] * draw(st.integers(0, 12))]


def window_cache(window, sink, rebased=False, **options):
    sizes = {"layers": 2, "batch": 1, "heads": 1, "head_dim": HEAD_DIM, "frame_tokens": 1}
    return FrameCache(**(sizes | options), capacity=window, sink=sink, bounded=True, rebased=rebased)


@settings(deadline=None, max_examples=80)
@given(windows())
def test_the_window_reads_the_frames_of_self_forcing(case):
    window, sink, lengths = case
    cache, frame = window_cache(window, sink), 0
    for frames, cells in zip(lengths, self_forcing_cells(window, sink, lengths)):
        assert cache.begin_chunk(frame, frames) == frame
        labels = (
            torch.arange(frame, frame + frames).view(1, frames, 1, 1).expand(1, frames, 1, HEAD_DIM).float()
        )
        for layer in range(2):
            cache.write(layer, labels, -labels)
            k, v = cache.read(layer)
            assert sorted(k[0, :, 0, 0].int().tolist()) == sorted(cells)
            assert torch.equal(v, -k)
        cache.end_chunk(frame)
        assert cache.frames == cells
        frame += frames


@settings(deadline=None, max_examples=40)
@given(windows())
def test_rebased_keys_stand_where_their_cell_is(case):
    window, sink, lengths = case
    cache, frame = window_cache(window, sink, rebased=True), 0
    plain = torch.randn(
        sum(lengths), HEAD_DIM, generator=torch.Generator().manual_seed(0)
    )  # before any rotation
    for frames, cells in zip(lengths, self_forcing_cells(window, sink, lengths)):
        time = cache.begin_chunk(frame, frames)
        assert time == len(cells) - frames, "the chunk's cell: constant once the window is full"
        chunk = plain[frame : frame + frames].view(1, frames, 1, HEAD_DIM)
        cache.write(1, apply_rope(chunk, *rope_table(time, frames, 1, 1, HEAD_DIM, "cpu")), chunk)
        cache.end_chunk(frame)
        frame += frames
        expected = apply_rope(plain[cells][None, :, None], *rope_table(0, len(cells), 1, 1, HEAD_DIM, "cpu"))
        stored = cache.k[1][:, cache.slots, 0]
        torch.testing.assert_close(stored, expected, atol=1e-5, rtol=0)


def moving_sink(plain, window, sink, chunk_lengths, share):
    """The keys in the cells, without rotation, as Reward Forcing keeps them: its sink is a moving average."""
    cells = []
    for new in chunk_lengths:
        excess = max(0, len(cells) + new - window)
        for i in range(min(excess, sink)):
            cells[i] = (1 - share) * cells[i] + share * cells[sink + i]
        del cells[sink : sink + excess]
        cells += plain[:new]
        plain = plain[new:]
        yield torch.stack(cells)


@pytest.mark.parametrize("rebased", [True, False])
@settings(deadline=None, max_examples=40)
@given(windows())
def test_a_moving_sink_is_the_average_of_what_left_at_its_own_places(rebased, case):
    window, sink, lengths = case
    cache, frame = window_cache(window, sink, rebased=rebased, sink_ema=0.25), 0
    plain = torch.randn(sum(lengths), HEAD_DIM, generator=torch.Generator().manual_seed(0))
    for frames, cells in zip(lengths, moving_sink(list(plain), window, sink, lengths, 0.25)):
        time = cache.begin_chunk(frame, frames)
        chunk = plain[frame : frame + frames].view(1, frames, 1, HEAD_DIM)
        cache.write(1, apply_rope(chunk, *rope_table(time, frames, 1, 1, HEAD_DIM, "cpu")), chunk)
        cache.end_chunk(frame)
        frame += frames
        for place, (index, cell) in enumerate(zip(cache.frames, cells)):
            at, slot = rope_table(place if rebased else index, 1, 1, 1, HEAD_DIM, "cpu"), cache.slots[place]
            key = apply_rope(cell.view(1, 1, 1, HEAD_DIM), *at)[0]
            torch.testing.assert_close(cache.k[1, :, slot, 0], key, atol=1e-5, rtol=0)
            torch.testing.assert_close(cache.v[1, :, slot, 0, 0], cell[None], atol=1e-5, rtol=0)


def test_the_steady_state_reads_the_pool_itself():
    cache = window_cache(6, 3)
    for frame in range(0, 30, 3):
        cache.begin_chunk(frame, 3)
        cache.write(0, torch.zeros(1, 3, 1, HEAD_DIM), torch.zeros(1, 3, 1, HEAD_DIM))
        k, v = cache.read(0)
        assert k.data_ptr() == cache.k.data_ptr()
        assert v.data_ptr() == cache.v.data_ptr()
        cache.end_chunk(frame)


def test_ten_thousand_chunks_do_not_blur_the_window():
    cache = window_cache(6, 2, rebased=True, layers=1)
    plain = torch.randn(1, 1, 1, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    turned = apply_rope(plain.expand(1, 6, 1, HEAD_DIM), *rope_table(0, 6, 1, 1, HEAD_DIM, "cpu"))
    times = set()
    for frame in range(10_000):
        time = cache.begin_chunk(frame, 1)
        cache.write(0, turned[:, time : time + 1], plain)
        cache.end_chunk(frame)
        if frame == 5:
            sink = cache.k[:, :, cache.slots[:2]].clone()
        if frame >= 5:
            times.add(time)
    assert times == {5}
    assert torch.equal(cache.k[:, :, cache.slots[:2]], sink), "the sink is never rotated again"
    torch.testing.assert_close(cache.k[0][:, cache.slots, 0], turned, atol=2e-6, rtol=0)


def test_an_unbounded_cache_says_when_it_is_full():
    cache = FrameCache(layers=1, batch=1, heads=1, head_dim=8, frame_tokens=1, capacity=5)
    cache.begin_chunk(0, 3)
    cache.end_chunk(0)
    with pytest.raises(
        ValueError, match=r"3 frames at frame 3 does not fit: .* 3 of at most 5 .* larger total_frames"
    ):
        cache.begin_chunk(3, 3)
    cache.begin_chunk(3, 2)
