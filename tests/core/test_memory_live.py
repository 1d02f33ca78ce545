"""The map that goes along with every chunk is the one that `read_memory_map` gives, with layers and heads together."""

import base64
import json

import pytest
import torch
from sparse_forcing_pack.sparse_attn import memory_live as module
from sparse_forcing_pack.sparse_attn.config import AttentionConfig
from sparse_forcing_pack.sparse_attn.geometry import BlockGeometry
from sparse_forcing_pack.sparse_attn.memory_live import gather_tables, summarise
from sparse_forcing_pack.sparse_attn.memory_map import PARTS, read_memory_map

GRIDS = [(4, 4), (5, 7), (3, 1)]  # the second and third divide into ragged tiles
LENGTHS = (
    [3] * 6,
    [1, 3, 3, 3, 3, 3],
    [3, 3, 3, 3, 2],
    [3],
)  # whole; behind a start image; a short end; not full


@pytest.fixture(scope="module")
def streamed(make_toy, make_video):
    """The state after chunks of some lengths."""

    def run(grid=(5, 7), lengths=LENGTHS[0], **changes):
        settings = {"block_tokens": 4, "persistent_frames": 6, "topk": 0.5} | changes
        toy = make_toy(grid)
        state = toy.state(AttentionConfig(**settings), 3)
        toy.run(state, make_video(grid, sum(lengths)), lengths)
        return state

    return run


def copy_tables(state):
    """What a page is handed, by way of the CPU."""
    gathered = gather_tables(state)
    return None if gathered is None else gathered[1](gathered[0].cpu())


def by_first_frame(state):
    """{first video frame: (frames, part, [height, width] shares)} of a state's MemoryMap, where anything is held."""
    found, tiles = read_memory_map(state), {}
    for span in found.spans.unique(dim=0).tolist():
        chosen = (found.spans == torch.tensor(span)).all(1)
        (start, frames), part = found.chunks[chosen][0].tolist(), PARTS[found.part[chosen][0]]
        tokens = BlockGeometry(frames, *state.grid, state.attention.block_tokens).tokens
        place = torch.zeros(frames * state.grid[0] * state.grid[1])
        for number, share in zip(found.numbers[chosen].tolist(), found.shares()[chosen].tolist()):
            place[tokens[number][tokens[number] >= 0].long()] = share
        if place.any():
            video = [f for latent in range(*span) for f in range(max(0, 4 * latent - 3), 4 * latent + 1)]
            shares = place.view(frames, *state.grid)[span[0] - start : span[1] - start].mean(0)
            tiles[video[0]] = (len(video), part, shares)
    return tiles


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("changes", [{}, {"block_tokens": 12}, {"sink_frames": 0}], ids=str)
def test_a_summary_is_the_map(streamed, grid, lengths, changes):
    state = streamed(grid, lengths, **changes)
    said = json.loads(json.dumps(summarise(copy_tables(state))))
    want = by_first_frame(state)
    assert said["grid"] == list(grid) and said["stretches"] == len(said["tiles"]) == len(want)
    peak = max((float(s.max()) for _, part, s in want.values() if part == "persistent"), default=0.0)
    assert said["peak"] == pytest.approx(peak, abs=1e-4)
    assert [tile["first"] for tile in said["tiles"]] == sorted(want)
    for tile in said["tiles"]:
        count, part, shares = want[tile["first"]]
        assert (tile["count"], tile["part"]) == (count, part)
        if part == "persistent":
            got = torch.tensor(list(base64.b64decode(tile["shares"]))).view(grid)
            assert (got - 255 * shares / peak).abs().max() < 0.51
        else:
            assert shares.eq(1).all() and "shares" not in tile


def test_a_large_grid_is_told_in_few_bytes(streamed, monkeypatch):
    state = streamed((5, 7))
    whole = summarise(copy_tables(state))
    monkeypatch.setattr(module, "MOST_CELLS", 3)
    said = summarise(copy_tables(state))
    assert said["grid"] == [3, 3] and said["peak"] == whole["peak"]
    for tile, all_of_it in zip(said["tiles"], whole["tiles"]):
        if tile["part"] == "persistent":
            cells = torch.tensor(list(base64.b64decode(all_of_it["shares"]))).view(5, 7)
            want = cells[[0, 1, 3]][:, [0, 2, 4]].flatten().tolist()
            assert list(base64.b64decode(tile["shares"])) == want


def test_of_many_stretches_those_held_most_are_told(streamed, monkeypatch):
    state = streamed((4, 4), block_tokens=12)
    whole = summarise(copy_tables(state))
    monkeypatch.setattr(module, "MOST_TILES", 2)
    said = summarise(copy_tables(state))
    assert said["stretches"] == whole["stretches"] > 2
    assert [tile["part"] for tile in said["tiles"]] == ["sink", "window"]


def test_the_copy_does_not_change_with_the_stream(streamed, make_toy, make_video):
    state = streamed()
    kept = copy_tables(state)
    before = summarise(kept)
    state.cache.k_pages = state.cache.v_pages = state.cache.pooled = None  # would be gigabytes on a device
    assert summarise(copy_tables(state)) == before
    state.reset()
    state.cache.page_frame.fill_(7)
    assert summarise(kept) == before and copy_tables(state) is None


def test_other_modes_have_no_map(make_toy):
    for mode in ("dense", "window"):
        assert copy_tables(make_toy((4, 4)).state(AttentionConfig(mode=mode), 3, total_frames=6)) is None


def test_an_open_chunk_is_not_in_it(streamed):
    state = streamed()
    before = summarise(copy_tables(state))
    with torch.inference_mode():
        state.begin_chunk(3)
    assert summarise(copy_tables(state)) == before
