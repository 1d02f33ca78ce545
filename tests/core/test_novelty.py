"""What `keep` "novelty" leaves in the memory, by hand: blocks are letters, and equal letters look the same."""

from string import ascii_letters

import pytest
import torch
from sparse_forcing_pack.sparse_attn.config import AttentionConfig
from sparse_forcing_pack.sparse_attn.memory import PagedKV

LAYERS, GROUPS, HEAD_DIM = 2, 3, 64
VALUES = torch.eye(HEAD_DIM)  # of each letter; no two are alike


def memory(keep="novelty", grid=(1, 3), block_tokens=1, persistent=2, sink=0, chunk_frames=1):
    """Chunks of one frame unless told otherwise, a window of two; on the 1 x 3 grid a chunk is three blocks."""
    attention = AttentionConfig(
        window_frames=2 * chunk_frames,
        persistent_frames=persistent * chunk_frames,
        sink_frames=sink * chunk_frames,
        block_tokens=block_tokens,
        keep=keep,
    )
    sizes = {"layers": LAYERS, "groups": GROUPS, "head_dim": HEAD_DIM, "grid": grid}
    return PagedKV(**sizes, chunk_frames=chunk_frames, attention=attention)


def values_of(words, pages):
    """[G, NB, T, D]: the words' letters as values, a word a group; one word is that of all groups."""
    letters = torch.stack([VALUES[[ascii_letters.index(x) for x in word]] for word in words])
    return letters[:, :, None].expand(GROUPS, -1, pages.attention.block_tokens, -1)


def stream(pages, chunks, loved=""):
    """Every chunk a word, or a word a group; the chunk attends to `loved` letters alone. Returns `pages`."""
    frame = 0
    for words in chunks:
        pages.begin_chunk(frame, pages.chunk_frames)
        blocks = values_of([words] if isinstance(words, str) else words, pages)
        for layer in range(LAYERS):
            pages.write(layer, blocks, blocks)
            read = torch.cat([pages.persistent_slots[layer], pages.window_slots[layer]], dim=-1).long()
            found = pages.v_pages[layer, :, :, 0].argmax(-1).gather(1, read)
            wanted = torch.tensor([ascii_letters.index(x) for x in loved])
            pages.shares[layer] = torch.isin(found, wanted).float()[:, None]
        pages.end_chunk(frame)
        frame += pages.chunk_frames
    return pages


def kept(pages, group=0):
    """Letter and frame of each persistent block, in the table's order; the same in all layers."""
    slots = pages.table[:, group, : pages.persistent]
    letters = pages.v_pages[:, group, :, 0].argmax(-1).gather(1, slots)
    frames = pages.page_frame[:, group].gather(1, slots)
    assert (letters == letters[0]).all() and (frames == frames[0]).all()
    return " ".join(f"{ascii_letters[x]}{frame}" for x, frame in zip(letters[0].tolist(), frames[0].tolist()))


def test_the_odd_block_stays_that_nobody_looks_at():
    """X leaves the picture after frame 1, while the sky, the grass and the dog are in every frame."""
    seen = ["sgd", "sXd", "sgd", "dgs", "sdg", "gds"]
    assert "X1" in kept(stream(memory(sink=1), seen, loved="sgd")).split()
    assert "X1" not in kept(stream(memory("attention", sink=1), seen, loved="sgd")).split()


def test_what_has_left_stays_while_there_is_room_for_it():
    seen = ["abc", "Xbc", "aYc", *["abc"] * 20, "abZ", "abc", "abc"]
    assert kept(stream(memory(sink=1), seen)) == "a0 b0 c0 X1 Y2 Z23"


@pytest.mark.parametrize(("sink", "left"), [(1, "a0 b0 c0 X1 Y1 Z2"), (0, "b0 c0 a1 X1 Y1 Z2")])
def test_the_sink_counts_as_seen(sink, left):
    """Without a sink the newer a is the one to keep; with one it shows nothing new, though no newer block does."""
    assert kept(stream(memory(sink=sink), ["abc", "aXY", "Zde", "fgh"])) == left


def test_of_two_that_are_equal_the_newer_stays():
    assert kept(stream(memory(persistent=1), ["Xab", "bXa", "cde"])) == "b1 X1 a1"
    assert kept(stream(memory(persistent=1), ["Xab", "cXX", "def"])) == "a0 b0 c1", "else the older one"


def test_groups_choose_for_themselves():
    """Heads of batch items are groups: what one of them holds or sees is nothing to the others."""
    chunks = [("Xab", "abc", "abc"), ("abc", "aXc", "abc"), *[("abc", "abc", "Xbc")] * 4]
    pages = stream(memory(persistent=1), chunks)
    assert [kept(pages, group) for group in range(GROUPS)] == ["X0 a0 b0", "a0 b0 X1", "a0 b0 a1"]


def test_items_of_a_batch_are_streams_of_their_own(make_toy, make_video):
    toy, attention = make_toy((5, 7)), AttentionConfig(block_tokens=16, keep="novelty")
    video, other = (make_video((5, 7), 18, seed=seed) for seed in (1, 2))
    alone = toy.state(attention, 3)
    expected = toy.run(alone, video, [3] * 6)
    for second in (video, other):
        both = toy.state(attention, 3, batch=2)
        outputs = toy.run(both, torch.cat([video, second]), [3] * 6)
        torch.testing.assert_close(outputs[:1], expected, atol=1e-5, rtol=1e-5)
        first, last = both.kept_frames().split(1, dim=1)
        assert torch.equal(first, alone.kept_frames())
        assert torch.equal(last, first) == (second is video)


def test_only_the_tokens_of_a_page_count():
    """Ragged blocks: by what stands behind their tokens, the second chunk's would look like the first's."""
    pages = memory(grid=(3, 5), block_tokens=8, persistent=1, chunk_frames=3)
    lens = pages.geometry(3).lens
    blocks = len(lens)
    assert (lens < 8).sum() > 1, "the test needs ragged blocks"
    first, second, *_ = VALUES.split(blocks)
    behind = torch.arange(8)[:, None] >= lens[:, None, None]
    for frame, looks in ((0, first), (3, second), (6, first[1].expand(blocks, -1))):
        pages.begin_chunk(frame, 3)
        page = torch.where(behind, 50 * first[:, None], looks[:, None]).expand(GROUPS, -1, -1, -1)
        for layer in range(LAYERS):
            pages.write(layer, page, page)
        pages.end_chunk(frame)
    numbers = pages.page_block.gather(2, pages.table[..., :blocks])
    assert (numbers == torch.tensor([0, *range(2, blocks), 0])).all(), "all but the one that is seen again"


@pytest.mark.parametrize("lengths", [[3] * 6, [1, 3, 3, 3, 2], [2, 3, 1]], ids=str)
def test_counts_are_those_of_attention(make_toy, make_video, lengths):
    toy, states = make_toy((5, 7)), []
    for keep in ("attention", "novelty"):
        states.append(toy.state(AttentionConfig(block_tokens=16, keep=keep), 3))
        toy.run(states[-1], make_video((5, 7), sum(lengths)), lengths)
    attention, novelty = states
    assert novelty.cache.counters() == attention.cache.counters()
    assert novelty.describe() == attention.describe()
    assert (novelty.kept_frames().diff(dim=-1) >= 0).all(), "the order of time"
    table = novelty.cache.table
    assert torch.equal(table.sort(-1).values, torch.arange(table.shape[-1]).expand_as(table)), (
        "no page is lost"
    )
