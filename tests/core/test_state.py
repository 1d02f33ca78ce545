"""A stream's attention against attention without any memory machinery: masks, plain lists, direct rotations."""

import math

import pytest
import safetensors.torch
import torch
from sparse_forcing_pack.sparse_attn.config import AttentionConfig
from sparse_forcing_pack.sparse_attn.geometry import BlockGeometry
from sparse_forcing_pack.sparse_attn.router import kept_blocks
from sparse_forcing_pack.sparse_attn.state import sdpa

DENSE = AttentionConfig(mode="dense")


def masked_attention(q, k, v, mask):
    """[B, N, H, D] with mask [N, N], True where q may read k, in float64."""
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).float()


def chunk_mask(lengths, frame_tokens, window=None, sink=0):
    """[N, N]: block-causal over chunks; with a window, of `window` frames, the first `sink` and the newest."""
    frame_chunk = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    end = torch.tensor(lengths).cumsum(0)[frame_chunk]  # behind the last frame that a query's chunk may read
    frame = torch.arange(len(frame_chunk))
    mask = frame < end[:, None]
    if window is not None:
        mask &= (frame < sink) | (frame >= end[:, None] - (window - sink)) | (end <= window)[:, None]
    return mask.repeat_interleave(frame_tokens, 0).repeat_interleave(frame_tokens, 1)


GRIDS = [(5, 7), (7, 5), (1, 1), (6, 4)]
CHUNKINGS = [(1, [1, 1, 1, 1]), (2, [2, 2, 2]), (3, [3, 3, 3]), (3, [1, 3, 3, 2])]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("chunk", "lengths"), CHUNKINGS)
def test_dense_stream_equals_one_masked_pass(make_toy, make_video, grid, chunk, lengths):
    toy, video = make_toy(grid), make_video(grid, sum(lengths), batch=2)
    mask = chunk_mask(lengths, grid[0] * grid[1])
    expected = toy(video, 0.0, lambda layer, q, k, v: masked_attention(q, k, v, mask), 0)
    state = toy.state(DENSE, chunk, batch=2, total_frames=sum(lengths))
    torch.testing.assert_close(toy.run(state, video, lengths), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("chunk", "window", "sink", "count"), [(3, 6, 3, 5), (3, 9, 1, 6), (2, 4, 0, 5), (1, 3, 1, 7)]
)
def test_window_stream_equals_one_masked_pass(make_toy, make_video, chunk, window, sink, count):
    toy, lengths = make_toy((5, 7)), [chunk] * count
    video = make_video((5, 7), sum(lengths))
    mask = chunk_mask(lengths, 35, window, sink)
    expected = toy(video, 0.0, lambda layer, q, k, v: masked_attention(q, k, v, mask), 0)
    attention = AttentionConfig(mode="window", window_frames=window, sink_frames=sink)
    actual = toy.run(toy.state(attention, chunk), video, lengths)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("chunk", "lengths"), CHUNKINGS)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_sparse_with_room_for_everything_equals_dense(make_toy, make_video, grid, chunk, lengths, head_dim):
    toy, video = make_toy(grid, layers=2, head_dim=head_dim), make_video(grid, sum(lengths), batch=2)
    everything = AttentionConfig(
        window_frames=2 * chunk, persistent_frames=3 * chunk, sink_frames=chunk, topk=1.0, block_tokens=16
    )
    dense = toy.run(toy.state(DENSE, chunk, batch=2, total_frames=sum(lengths)), video, lengths)
    sparse = toy.run(toy.state(everything, chunk, batch=2), video, lengths)
    torch.testing.assert_close(sparse, dense, atol=1e-5, rtol=1e-5)


def test_a_given_dense_attention_is_used(make_toy, make_video):
    calls = []

    def attention(q, k, v):
        calls.append((q.shape, k.shape, v.shape))
        return masked_attention(q, k, v, torch.ones(q.shape[1], k.shape[1], dtype=torch.bool))

    toy, video = make_toy((5, 7), layers=1), make_video((5, 7), 6)
    expected = toy.run(toy.state(DENSE, 3, total_frames=6), video, [3, 3])
    actual = toy.run(toy.state(DENSE, 3, total_frames=6, dense_attention=attention), video, [3, 3])
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert calls[1] == ((1, 105, 2, 16), (1, 210, 2, 16), (1, 210, 2, 16))


class ListedAttention:
    """Mode "sparse" without pages: per head, Python lists of blocks with their own keys and values."""

    def __init__(self, grid, chunk, attention):
        self.grid, self.chunk, self.attention = grid, chunk, attention
        self.persistent, self.window, self.current, self.frame = {}, {}, {}, 0
        self.capacity = attention.persistent_frames // chunk * self.blocks(chunk).num_blocks

    def blocks(self, frames):
        return BlockGeometry(frames, *self.grid, self.attention.block_tokens)

    def attend(self, layer, q, k, v):
        self.geometry = self.blocks(q.shape[1] // (self.grid[0] * self.grid[1]))
        packed = [self.geometry.pack(x) for x in (q, k, v)]
        out = torch.zeros_like(packed[0])
        for group in range(out.shape[0]):
            q_blocks, k_blocks, v_blocks = (
                [block[:length] for block, length in zip(x[group], self.geometry.lens.tolist())]
                for x in packed
            )
            out[group] = self._attend_head((layer, group), q_blocks, k_blocks, v_blocks, out.shape[2])
        return self.geometry.unpack(out, q.shape[0])

    def _attend_head(self, head, q_blocks, k_blocks, v_blocks, rows):
        self.current[head] = current = [{"k": k, "v": v} for k, v in zip(k_blocks, v_blocks)]
        persistent = self.persistent.setdefault(head, [])
        window = [*[block for chunk in self.window.setdefault(head, []) for block in chunk], *current]
        for block in [*persistent, *window]:
            block["score"] = 0.0
        outputs = []
        for q in q_blocks:
            pooled = torch.stack([block["k"].mean(0) for block in [*persistent, *window]])
            scores = pooled @ q.mean(0) / math.sqrt(q.shape[1])
            for block, share in zip([*persistent, *window], scores.softmax(0).tolist()):
                block["score"] += share
            everything = self.attention.dense_first_chunk and self.frame == 0
            keep = len(window) if everything else max(1, math.ceil(self.attention.topk * len(window)))
            best = scores[len(persistent) :].argsort(descending=True)[:keep].tolist()
            read = [*persistent, *(window[i] for i in best)]
            k, v = (torch.cat([block[name] for block in read]) for name in "kv")
            out = (q @ k.T / math.sqrt(q.shape[1])).softmax(-1) @ v
            outputs.append(torch.nn.functional.pad(out, (0, 0, 0, rows - len(out))))
        return torch.stack(outputs)

    def end_chunk(self):
        frames = self.geometry.grid[0]
        for head, window in self.window.items():
            for block in self.current[head]:
                block["sink"] = self.frame + frames <= self.attention.sink_frames
            window.append(self.current[head])
            if len(window) == self.attention.window_frames // self.chunk:
                candidates = self.persistent[head] + window.pop(0)
                if self.attention.keep == "novelty":
                    self._score_by_novelty([*candidates, *(block for chunk in window for block in chunk)])
                ranked = sorted(candidates, key=lambda block: (not block["sink"], -block["score"]))
                winners = {id(block) for block in ranked[: self.capacity]}
                self.persistent[head] = [block for block in candidates if id(block) in winners]
        self.frame += frames

    @staticmethod
    def _score_by_novelty(blocks):
        """1 - the largest cosine to a newer block or to the sink; blocks in the order of time."""
        means = [block["v"].double().mean(0) for block in blocks]
        for i, block in enumerate(blocks):
            others = [mean for j, mean in enumerate(means) if j > i or (blocks[j]["sink"] and j != i)]
            cosines = [float(means[i] @ mean / means[i].norm() / mean.norm()) for mean in others]
            block["score"] = 1 - max(cosines, default=-1)


@pytest.mark.parametrize(
    ("chunk", "lengths", "settings"),
    [
        (3, [3] * 6, {}),
        (3, [3] * 3, {"dense_first_chunk": False}),
        (3, [1, 3, 3, 3, 3, 2], {"window_frames": 9}),
        (2, [2] * 6, {"window_frames": 4, "sink_frames": 0, "persistent_frames": 2, "topk": 0.1}),
        (1, [1] * 8, {"topk": 0.5}),
        (3, [3] * 7, {"keep": "novelty"}),
        (3, [1, 3, 3, 3, 3, 2], {"keep": "novelty", "window_frames": 9, "sink_frames": 6}),
        (2, [2] * 6, {"keep": "novelty", "window_frames": 2, "sink_frames": 0, "persistent_frames": 2}),
        (3, [3] * 4, {"window_frames": 3, "sink_frames": 0, "persistent_frames": 0}),
    ],
)
def test_sparse_stream_equals_lists_of_blocks(make_toy, make_video, chunk, lengths, settings):
    attention = AttentionConfig(**({"block_tokens": 16} | settings))
    toy, video = make_toy((5, 7), layers=2), make_video((5, 7), sum(lengths), batch=2)
    listed, expected, frame = ListedAttention((5, 7), chunk, attention), [], 0
    for frames in lengths:
        expected.append(toy(video[:, :, frame : frame + frames], 0.0, listed.attend, frame))
        listed.end_chunk()
        frame += frames
    actual = toy.run(toy.state(attention, chunk, batch=2), video, lengths)
    torch.testing.assert_close(actual, torch.cat(expected, dim=2), atol=1e-4, rtol=1e-4)


def test_kept_blocks():
    assert [kept_blocks(0.25, n) for n in (1, 4, 5, 156)] == [1, 1, 2, 39]
    assert kept_blocks(0.1, 30) == 3, "not 4: floating point must not add a block"
    assert kept_blocks(1.0, 7) == 7


MODES = [
    AttentionConfig(mode="dense"),
    AttentionConfig(mode="window", sink_frames=1),
    AttentionConfig(mode="window", positions="rebased"),
    AttentionConfig(block_tokens=16),
    AttentionConfig(block_tokens=16, positions="rebased"),
    AttentionConfig(mode="window", positions="rebased", sink_ema=0.1),
    AttentionConfig(block_tokens=16, keep="novelty"),
    AttentionConfig(block_tokens=16, positions="rebased", page_bits=8),
    AttentionConfig(block_tokens=16, positions="rebased", router="quarters"),
    AttentionConfig(block_tokens=16, positions="rebased", offload_pages=True),
]
NAMES = [
    f"{attention.mode}-{attention.positions}{'-moving sink' if attention.sink_ema else ''}"
    f"{'-novelty' if attention.keep == 'novelty' else ''}{'-8 bits' if attention.page_bits == 8 else ''}"
    f"{'-quarters' if attention.router == 'quarters' else ''}{'-offloaded' if attention.offload_pages else ''}"
    for attention in MODES
]


@pytest.mark.parametrize("attention", MODES, ids=NAMES)
@pytest.mark.parametrize("stopped_after", [1, 4])
def test_restore_continues_bit_for_bit(make_toy, make_video, attention, stopped_after):
    toy, video = make_toy((5, 7)), make_video((5, 7), 19)
    lengths = [1, *[3] * 6]
    whole = toy.state(attention, 3, total_frames=19)
    expected = toy.run(whole, video, lengths)

    first = toy.state(attention, 3, total_frames=19)
    done = sum(lengths[:stopped_after])
    toy.run(first, video[:, :, :done], lengths[:stopped_after])
    first.begin_chunk(3)  # an open chunk is not part of a snapshot
    saved = safetensors.torch.load(safetensors.torch.save(first.snapshot()))
    second = toy.state(attention, 3, total_frames=19)
    toy.run(second, make_video((5, 7), 9, seed=2), [3, 3, 3])  # something to be overwritten
    second.restore(saved)
    assert second.frame == done
    assert torch.equal(toy.run(second, video[:, :, done:], lengths[stopped_after:]), expected[:, :, done:])
    after = second.snapshot()
    assert all(
        torch.equal(tensor, after[name]) for name, tensor in whole.snapshot().items() if "page" not in name
    )


@pytest.mark.parametrize("attention", MODES, ids=NAMES)
def test_reset_starts_again_bit_for_bit(make_toy, make_video, attention):
    toy, video = make_toy((5, 7)), make_video((5, 7), 12)
    state = toy.state(attention, 3, total_frames=12)
    nbytes = state.nbytes
    first = toy.run(state, video, [3] * 4)
    state.reset()
    assert state.frame == state.t_start == 0
    assert torch.equal(toy.run(state, video, [3] * 4), first)
    assert state.nbytes == nbytes


@pytest.mark.parametrize("attention", MODES, ids=NAMES)
def test_an_abandoned_chunk_leaves_nothing_behind(make_toy, make_video, attention):
    toy, video = make_toy((5, 7)), make_video((5, 7), 15)
    expected = toy.run(toy.state(attention, 3, total_frames=15), video, [3] * 5)
    state, outputs = toy.state(attention, 3, total_frames=15), []
    for chunk in video.split(3, dim=2):
        state.begin_chunk(3)
        toy.denoiser(state)(make_video((5, 7), 3, seed=9), 0.7)
        outputs.append(toy.run(state, chunk, [3]))
    assert torch.equal(torch.cat(outputs, dim=2), expected)


def test_rewriting_a_chunk_replaces_it(make_toy, make_video):
    toy, video = make_toy((5, 7)), make_video((5, 7), 6)
    attention = AttentionConfig(block_tokens=16)
    expected = toy.run(toy.state(attention, 3), video, [3, 3])
    state, outputs = toy.state(attention, 3), []
    for chunk in video.split(3, dim=2):
        state.begin_chunk(3)
        for sigma in (1.0, 0.5, 0.0):
            out = toy.denoiser(state)(chunk + sigma, sigma)
        outputs.append(out)
        state.end_chunk()
    assert torch.equal(torch.cat(outputs, dim=2), expected)


@pytest.mark.parametrize("attention", [MODES[2], MODES[4]], ids=[NAMES[2], NAMES[4]])
def test_rebased_equals_absolute_until_frames_leave(make_toy, make_video, attention):
    toy, video = make_toy((5, 7)), make_video((5, 7), 12)
    absolute = AttentionConfig(mode=attention.mode, block_tokens=16)
    before, after = (toy.run(toy.state(a, 3), video, [3] * 4) for a in (absolute, attention))
    assert torch.equal(before[:, :, :6], after[:, :, :6])


def test_rebased_window_equals_absolute_where_the_sink_is_empty(make_toy, make_video):
    toy, video = make_toy((5, 7)), make_video((5, 7), 30)
    settings = {"mode": "window", "window_frames": 9, "sink_frames": 0}
    outputs = [
        toy.run(toy.state(AttentionConfig(**settings, positions=positions), 3), video, [3] * 10)
        for positions in ("absolute", "rebased")
    ]
    torch.testing.assert_close(*outputs, atol=2e-5, rtol=2e-5)


def test_bytes_are_known_without_allocating(make_toy):
    toy = make_toy((5, 7))
    for attention in MODES:
        real, planned = (toy.state(attention, 3, total_frames=21, device=d) for d in ("cpu", "meta"))
        assert real.nbytes == planned.nbytes > 0
    wan = make_toy((1, 1), layers=0)
    wan.layers, wan.heads, wan.head_dim, wan.grid = 30, 12, 128, (30, 52)
    dense = wan.state(DENSE, 3, total_frames=21, dtype=torch.bfloat16, device="meta")
    sparse = wan.state(AttentionConfig(), 3, dtype=torch.bfloat16, device="meta")
    assert dense.nbytes == 184_320 * 1560 * 21
    assert 0.55 < sparse.nbytes / dense.nbytes < 0.65, "12 frames of 21, and the padding of ragged blocks"


def test_half_precision_memory_keeps_the_type_of_queries(make_toy, make_video):
    toy, video = make_toy((5, 7)), make_video((5, 7), 12)
    for attention in MODES:
        exact, half = (
            toy.run(toy.state(attention, 3, total_frames=12, dtype=dtype), video, [3] * 4)
            for dtype in (torch.float32, torch.bfloat16)
        )
        assert half.dtype == torch.float32
        if attention.mode != "sparse":  # where rounding cannot change which blocks are read
            torch.testing.assert_close(half, exact, atol=0.1, rtol=0.1)


EVERYTHING = [
    AttentionConfig(mode="dense"),
    AttentionConfig(mode="window", window_frames=9, sink_frames=0),
    AttentionConfig(block_tokens=16, topk=1.0, window_frames=6, persistent_frames=6),
    AttentionConfig(block_tokens=16, topk=1.0, window_frames=6, persistent_frames=6, keep="novelty"),
]


@pytest.mark.parametrize("attention", EVERYTHING, ids=["dense", "window", "sparse", "sparse-novelty"])
def test_gradients_reach_the_open_chunk_and_stop_at_the_memory(make_toy, attention):
    """Where everything is read, gradients are those of plain attention over constants and the open chunk."""
    torch.manual_seed(0)
    state = make_toy((2, 5), layers=2).state(attention, 3, total_frames=9)
    chunks = [torch.randn(2, 3, 1, 30, 2, 16, requires_grad=True) for _ in range(3)]  # layers, (q, k, v)
    for index, chunk in enumerate(chunks):
        state.begin_chunk(3)
        outs = [state.attend(layer, *chunk[layer]) for layer in range(2)]
        weights = [torch.randn_like(out) for out in outs]
        sum((out * w).sum() for out, w in zip(outs, weights)).backward()
        state.attend(0, *chunk[0].detach())  # the clean pass may overwrite the pages then
        state.end_chunk()
        plain = [x.detach().clone().requires_grad_(x is chunk) for x in chunks[: index + 1]]
        want = 0
        for layer in range(2):
            k, v = (torch.cat([x[layer, i] for x in plain], dim=1) for i in (1, 2))
            want = want + (sdpa(plain[-1][layer, 0], k, v) * weights[layer]).sum()
        want.backward()
        torch.testing.assert_close(chunk.grad, plain[-1].grad, atol=1e-5, rtol=1e-4)
    assert all(chunk.grad is not None for chunk in chunks)


@pytest.mark.parametrize("attention", MODES, ids=NAMES)
def test_a_memory_made_in_inference_mode_serves_outside_of_it(make_toy, make_video, attention):
    toy, video = make_toy((5, 7)), make_video((5, 7), 12)
    with torch.inference_mode():
        state = toy.state(attention, 3, total_frames=12)
        expected = toy.run(state, video, [3] * 4)
        state.reset()
        toy.run(state, video[:, :, :6], [3, 3])
        saved = state.snapshot()
    state.restore(saved)
    assert torch.equal(toy.run(state, video[:, :, 6:], [3, 3]), expected[:, :, 6:])


def test_describe_and_memory_map(make_toy, make_video):
    toy, video = make_toy((5, 7)), make_video((5, 7), 15, batch=2)
    sparse = toy.state(MODES[3], 3, batch=2)
    assert sparse.kept_frames().shape == (3, 2, 2, 0)
    toy.run(sparse, video, [3] * 5)
    blocks = BlockGeometry(3, 5, 7, 16).num_blocks
    assert sparse.describe() == {
        "mode": "sparse",
        "frame": 15,
        "bytes": sparse.nbytes,
        "window_frames_kept": 3,
        "persistent_blocks": 2 * blocks,
        "persistent_blocks_at_most": 2 * blocks,
        "sink_blocks": blocks,
    }
    kept = sparse.kept_frames()
    assert kept.shape == (3, 2, 2, 2 * blocks)
    assert kept.dtype == torch.int32
    assert 0 <= int(kept.min()) <= int(kept.max()) < 12
    window = toy.state(MODES[1], 3, batch=2)
    toy.run(window, video, [3] * 5)
    assert window.describe() == {
        "mode": "window",
        "frame": 15,
        "bytes": window.nbytes,
        "frames_kept": 6,
        "frames_at_most": 6,
    }
    assert window.kept_frames().tolist() == [0, 10, 11, 12, 13, 14]


def test_misuse_is_explained(make_toy):
    toy = make_toy((5, 7))
    with pytest.raises(ValueError, match="window_frames 8"):
        toy.state(AttentionConfig(window_frames=8), 3)
    with pytest.raises(ValueError, match="mode 'dense' keeps every frame: give total_frames"):
        toy.state(DENSE, 3)
    state = toy.state(AttentionConfig(), 3)
    x = torch.zeros(1, 105, 2, 16)
    with pytest.raises(ValueError, match="a chunk of 4 frames: use 1 to 3"):
        state.begin_chunk(4)
    with pytest.raises(ValueError, match=r"attend got q of shape \[1, 105, 2, 16\]"):
        state.attend(0, x, x, x)
    state.begin_chunk(2)
    with pytest.raises(ValueError, match=r"the open chunk needs \[1, 70, 2, 16\]"):
        state.attend(0, x, x, x)
    with pytest.raises(ValueError, match="end_chunk after 0 of 3 layers"):
        state.end_chunk()


def test_a_snapshot_of_another_stream_is_refused(make_toy):
    toy = make_toy((5, 7))
    state = toy.state(AttentionConfig(), 3)
    others = [
        (toy.state(AttentionConfig(window_frames=9), 3), "the snapshot has window_frames 9, this stream 6"),
        (toy.state(AttentionConfig(mode="window"), 3), "the snapshot has mode window, this stream sparse"),
        (toy.state(AttentionConfig(positions="rebased"), 3), "has positions rebased, this stream absolute"),
        (toy.state(AttentionConfig(), 3, batch=2), "the snapshot has batch 2, this stream 1"),
        (make_toy((7, 5)).state(AttentionConfig(), 3), "the snapshot has grid_height 7, this stream 5"),
        (
            toy.state(AttentionConfig(), 3, dtype=torch.bfloat16),
            "k_pages is torch.bfloat16 .* this stream's torch.float32",
        ),
    ]
    for other, message in others:
        with pytest.raises(ValueError, match=message):
            state.restore(other.snapshot())
    incomplete = state.snapshot()
    del incomplete["table"]
    with pytest.raises(ValueError, match="the snapshot lacks table: it is incomplete"):
        state.restore(incomplete)
    longer = toy.state(DENSE, 3, total_frames=21)
    with pytest.raises(
        ValueError, match=r"snapshot's k is .* \[3, 1, 9, 35, 2, 16\], this stream's .* \[3, 1, 21,"
    ):
        longer.restore(toy.state(DENSE, 3, total_frames=9).snapshot())
    state.restore(toy.state(AttentionConfig(topk=0.5), 3).snapshot())  # how much is read may change
    state.restore(toy.state(AttentionConfig(keep="novelty"), 3).snapshot())  # and what will stay
