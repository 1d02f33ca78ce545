"""The memory map: what it says is what the memory's own tables say, and the picture shows it."""

import numpy as np
import pytest
import torch
from sparse_forcing_pack.sparse_attn import memory_map as module
from sparse_forcing_pack.sparse_attn.chunk_layout import chunk_layout
from sparse_forcing_pack.sparse_attn.config import AttentionConfig
from sparse_forcing_pack.sparse_attn.geometry import BlockGeometry
from sparse_forcing_pack.sparse_attn.memory_map import PARTS, draw_memory_map, read_memory_map
from sparse_forcing_pack.sparse_attn.session import SessionError, memory_snapshot

GRIDS = [(4, 4), (5, 7), (3, 1)]  # the second and third divide into ragged tiles
LENGTHS = (
    [3] * 6,
    [1, 3, 3, 3, 3, 3],
    [3, 3, 3, 3, 2],
    [3, 3],
)  # whole; behind a start image; a short end; not full


def sparse(**changes) -> AttentionConfig:
    return AttentionConfig(**{"block_tokens": 4, "persistent_frames": 6, "topk": 0.5} | changes)


class Recorder:
    """Notes at every chunk which block each page gets, as the memory's own table `page_block` should."""

    def __init__(self, state):
        self.cache, self.begin = state.cache, state.begin_chunk
        self.page_block = torch.full_like(state.cache.page_frame, -1)
        state.begin_chunk = self.note

    def note(self, frames):
        self.begin(frames)
        slots = self.cache.current
        numbers = torch.arange(slots.shape[-1], dtype=torch.int32)
        self.page_block.scatter_(2, slots, numbers.expand(slots.shape))


@pytest.fixture(scope="module")
def streamed(make_toy, make_video):
    """(state, its snapshot) after chunks of some lengths."""

    def run(grid=(5, 7), lengths=LENGTHS[0], batch=1, attention=None):
        toy = make_toy(grid)
        state = toy.state(attention or sparse(), 3, batch)
        recorder = Recorder(state)
        toy.run(state, make_video(grid, sum(lengths), batch), lengths)
        written = state.cache.page_frame >= 0
        assert torch.equal(state.cache.page_block[written], recorder.page_block[written])
        return state, memory_snapshot(state)

    return run


def expected(state, saved, lengths):
    """{(layer, batch, head): {part: set of (chunk's first frame, block number)}} from the tables, one at a time."""
    chunk = {}  # latent frame -> first frame of its chunk
    for i, frames in enumerate(lengths):
        chunk |= dict.fromkeys(range(sum(lengths[:i]), sum(lengths[:i]) + frames), sum(lengths[:i]))
    found = {}
    for layer, tables in enumerate(saved["table"].tolist()):
        for group, slots in enumerate(tables):
            window = sum(state.cache.geometry(n).num_blocks for n in saved["window"].tolist())
            filled, room = int(saved["persistent"]), state.cache.capacity
            parts = {name: set() for name in PARTS}
            entries = [*enumerate(slots[:filled]), *((None, s) for s in slots[room : room + window])]
            for place, slot in entries:
                frame, number = (int(saved[n][layer, group, slot]) for n in ("page_frame", "page_block"))
                kind = "window" if place is None else "sink" if place < int(saved["pinned"]) else "persistent"
                parts[kind].add((chunk[frame], number))
            found[layer, group // state.heads, group % state.heads] = parts
    return found


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_kept_blocks_are_the_tables(streamed, grid, lengths):
    state, saved = streamed(grid, lengths, batch=2)
    found = read_memory_map(saved)
    assert found.frames == sum(lengths) and found.held.shape[:3] == (3, 2, 2)
    want = expected(state, saved, lengths)
    for at, parts in want.items():
        for i, name in enumerate(PARTS):
            chosen = (found.held[at] == 1) & (found.part == i)
            got = list(zip(found.chunks[chosen, 0].tolist(), found.numbers[chosen].tolist()))
            assert len(got) == len(parts[name]) and set(got) == parts[name], (at, name)
    assert set(found.held.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("grid", [*GRIDS, (9, 13)])
@pytest.mark.parametrize("tokens", [1, 2, 4, 7, 64])
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_a_layout_is_the_geometry(grid, tokens, frames):
    geometry, layout = BlockGeometry(frames, *grid, tokens), chunk_layout(frames, grid, tokens)
    for number, (rows, length) in enumerate(zip(geometry.tokens, geometry.lens.tolist())):
        assert (layout.blocks.flatten() == number).nonzero().flatten().tolist() == sorted(
            rows[:length].tolist()
        )
        first, end = layout.spans[number].tolist()
        assert first == geometry.first_frame[number]
        seen = (layout.blocks == number).flatten(1).any(1).nonzero().flatten()
        assert first <= seen.min() and seen.max() < end, "no block crosses a stretch"
    spans = sorted({tuple(span) for span in layout.spans.tolist()})
    assert [f for span in spans for f in range(*span)] == list(range(frames)), "every frame is in one stretch"


@pytest.mark.parametrize("grid", GRIDS)
def test_shares_sum_up(streamed, grid):
    state, saved = streamed(grid)
    window = sum(chunk.blocks for chunk in state.cache.window)
    for source in (saved, state):
        found = read_memory_map(source)
        every = found.held.sum(-1)
        assert torch.allclose(every, torch.full_like(every, state.cache.persistent + window))
        assert found.shares().sum().item() == pytest.approx(state.cache.persistent + window, rel=1e-5)
        alone = torch.stack([found.shares(i, j) for i in range(3) for j in range(2)])
        assert torch.allclose(alone.mean(0), found.shares())
        assert torch.equal(found.shares(2, 1), found.held[2, 0, 1])
        assert torch.allclose(found.shares(1), found.held[1].mean((0, 1)))
        assert torch.allclose(found.shares(head=1), found.held[:, :, 1].mean((0, 1)))
    assert found.shares()[found.part != 1].eq(1).all()


def test_a_stream_that_was_flushed_or_holds_no_sink(streamed):
    state, saved = streamed(attention=sparse(sink_frames=0))
    found = read_memory_map(saved)
    assert not (found.part == 0).any() and (found.part == 1).any()
    state.reset()
    with pytest.raises(SessionError, match="still empty: finish a chunk first"):
        read_memory_map(state)
    state.frame = 18  # what a flush leaves
    state.begin_chunk(3)
    state.wrote(range(state.layers))
    state.end_chunk()
    found = read_memory_map(state)
    assert found.chunks.unique(dim=0).tolist() == [[18, 3]] and (found.part == 2).all()


def test_a_map_of_a_live_stream_reads_no_pages(streamed):
    state, saved = streamed()
    state.cache.k_pages = state.cache.v_pages = state.cache.pooled = None  # would be gigabytes on a device
    found = read_memory_map(state)
    assert found.frames == 18 and torch.equal(found.numbers, read_memory_map(saved).numbers)


# --- the picture ------------------------------------------------------------------------------------------------------


def light(tile, found, block):
    """Mean light where a tile, drawn on plain grey, shows a block alone in all its frames; None without such a place.

    The middle of that token's pixels, so that no border of a block is met.
    """
    (start, frames), (first, end) = found.chunks[block].tolist(), found.spans[block].tolist()
    mine = chunk_layout(frames, found.grid, found.block_tokens).blocks[first - start : end - start]
    alone = (mine == found.numbers[block]).all(0).nonzero().tolist()
    if not alone:
        return None
    pixels = np.asarray(tile.image, np.float32)
    y, x = (int((at + 0.5) * size / tokens) for at, size, tokens in zip(alone[0], pixels.shape, found.grid))
    return pixels[y, x].mean()


def tiles_of(monkeypatch, *arguments, **options):
    """The tiles that a picture is put together from, and the picture."""
    seen = []
    sheet = module._sheet
    monkeypatch.setattr(module, "_sheet", lambda *a: seen.append(a) or sheet(*a))
    image = draw_memory_map(*arguments, **options)
    return seen[-1], image


@pytest.mark.parametrize("grid", GRIDS)
def test_brightness_is_the_share(streamed, monkeypatch, grid):
    found = read_memory_map(streamed(grid)[1])
    for layer, head in ((-1, -1), (1, -1), (2, 0)):
        (title, tiles, legend), image = tiles_of(monkeypatch, found, layer=layer, head=head)
        shares = found.shares(layer, head)
        peak = shares[found.part == 1].max().item()
        assert f"by {peak:.0%} of those chosen" in " ".join(text for text, _ in legend)
        assert ("all 3 layers" if layer < 0 else f"layer {layer} of 3") in title
        assert image.mode == "RGB" and image.width > 4 * len(grid)
        stretches = (
            found.spans[shares > 0].unique(dim=0).tolist()
        )  # what none of the chosen holds is left out
        assert len(tiles) == len(stretches)
        compared = 0
        for stretch, tile in zip(stretches, tiles):
            for i in (found.spans == torch.tensor(stretch)).all(1).nonzero().flatten().tolist():
                part = int(found.part[i])
                share = shares[i].item() / (peak if part == 1 else 1.0)
                dark = module.DARKEST * module.PLAIN
                bright = 0.65 * module.PLAIN + 0.35 * np.mean(module.COLOURS[part])
                near = dark + share * (bright - dark)
                if (seen := light(tile, found, i)) is not None:
                    assert seen == pytest.approx(near, abs=1.0)
                    compared += 1
        assert compared > len(found.spans) / 2


def test_tiles_show_their_own_frames(streamed, monkeypatch):
    whole = sparse(block_tokens=12)  # blocks of all three frames
    found = read_memory_map(streamed((4, 4), attention=whole)[1])
    video = torch.arange(69).repeat(2, 1).T.reshape(69, 2, 1, 1).expand(69, 2, 2, 3) / 100.0
    for frames in (video, (video * 255).round().byte().numpy(), (video * 255).round().byte()):
        (_, tiles, _), _ = tiles_of(monkeypatch, found, frames)
        assert tiles[0].text == "latent 0-2, video 0-8" and tiles[-1].text == "latent 15-17, video 57-68"
        shown = np.asarray(tiles[-1].image, np.float32)[5, 5]
        want = 0.65 * round(62 * 2.55) + 0.35 * np.asarray(
            module.COLOURS[2]
        )  # latent frame 16: video 61 to 64
        assert np.abs(shown - want).max() <= 1.5
    one = read_memory_map(streamed((4, 4), [1, 3, 3], attention=whole)[1])
    (_, tiles, _), _ = tiles_of(monkeypatch, one, video)
    assert tiles[0].text == "latent 0, video 0"


def test_of_many_stretches_those_held_most_are_drawn(streamed, monkeypatch):
    found = read_memory_map(streamed((4, 4), attention=sparse(block_tokens=12))[1])
    assert len(found.spans.unique(dim=0)) > 3
    monkeypatch.setattr(module, "MOST_TILES", 2)
    (_, tiles, legend), _ = tiles_of(monkeypatch, found)
    assert (
        len(tiles) == 2 and tiles[0].text.startswith("latent 0-2") and tiles[-1].text.startswith("latent 15")
    )
    total = len(found.spans.unique(dim=0))
    assert legend[-1][0] == f"2 of {total} stretches are drawn, those that are held most."


def test_legend_names_only_what_is_there(streamed, monkeypatch):
    saved = streamed((4, 4), [3], attention=sparse(block_tokens=12))[1]
    (_, tiles, legend), _ = tiles_of(monkeypatch, read_memory_map(saved))
    assert [part for _, part in legend] == [2] and len(tiles) == 1
    (_, _, legend), _ = tiles_of(monkeypatch, read_memory_map(streamed()[1]))
    assert [part for _, part in legend] == [0, 1, 2]


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_layers_and_heads_out_of_range_are_named(streamed):
    found = read_memory_map(streamed()[1])
    for options, message in (
        ({"layer": 3}, "There is no layer 3: this memory has layers 0 to 2; -1 takes all"),
        ({"head": 2}, "There is no head 2: this memory has heads 0 to 1; -1 takes all"),
        ({"layer": -2}, "There is no layer -2"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_memory_map(found, **options)


def test_other_modes_are_refused_with_the_remedy(make_toy, make_video):
    for mode in ("dense", "window"):
        toy = make_toy((4, 4))
        state = toy.state(AttentionConfig(mode=mode), 3, total_frames=6)
        toy.run(state, make_video((4, 4), 6), [3, 3])
        for source in (state, memory_snapshot(state)):
            with pytest.raises(SessionError, match=f"of mode '{mode}'.*Set the mode to sparse in Apply"):
                read_memory_map(source)


def test_frames_of_another_video_are_refused(streamed):
    found = read_memory_map(streamed()[1])
    for shape in ((68, 4, 4, 3), (69, 4, 4, 4), (69, 4, 4)):
        with pytest.raises(ValueError, match=r"are not this memory's video of 69 frames: give all of them"):
            draw_memory_map(found, torch.zeros(shape))
    draw_memory_map(found, torch.zeros(80, 4, 4, 3))  # a longer video begins with this one


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("table", lambda x: x.fill_(10**9)),
        ("table", None),
        ("page_frame", lambda x: x.fill_(-1)),
        ("page_frame", lambda x: x + 1),
        ("page_frame", lambda x: x + 100),
        ("page_block", lambda x: x.fill_(-1)),
        ("page_block", lambda x: x + 1000),
        ("page_block", lambda x: x[:1]),
        ("config.grid_height", lambda x: x * 10**6),
        ("config.mode", lambda x: x + 9),
        ("config.layers", lambda x: x + 1),
        ("config.block_tokens", lambda x: x * 0),
        ("config.batch", lambda x: x.expand(2)),
        ("persistent", lambda x: x + 1000),
        ("window", lambda x: x + 1),
        ("frame", lambda x: x * 0),
    ],
)
def test_damaged_snapshots_are_refused(streamed, name, value):
    saved = streamed()[1]
    if value is None:
        del saved[name]
    else:
        saved[name] = value(saved[name].clone())
    with pytest.raises(SessionError, match="damaged|does not fit this run"):
        read_memory_map(saved)
