"""Rotary positions against the complex formula, computed in double precision."""

import math

import pytest
import torch
from sparse_forcing_pack.sparse_attn.config import AttentionConfig
from sparse_forcing_pack.sparse_attn.frame_cache import FrameCache
from sparse_forcing_pack.sparse_attn.positions import apply_rope, axis_pairs, rope_table, shift_time
from sparse_forcing_pack.sparse_attn.state import StreamState

FAR = [0, 1, 7, 1023, 99_999]
HALF_AN_HOUR = 7200  # latent frames: four a second
ULP = {torch.float32: 2**-23, torch.bfloat16: 2**-7}  # of numbers from 1 to 2


def angles(t_start, frames, height, width, head_dim, theta=1e4):
    """[N, D/2] float64 in plain Python."""
    pairs = axis_pairs(head_dim)
    rows = []
    for t in range(t_start, t_start + frames):
        for y in range(height):
            for x in range(width):
                row = []
                for position, count in zip((t, y, x), pairs):
                    row += [position * theta ** (-2 * i / (2 * count)) for i in range(count)]
                rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def rotated(x, turn):
    """[B, N, H, D] by [N, D/2], as complex numbers in double precision."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(turn), turn)[:, None]).flatten(-2)


@pytest.mark.parametrize(
    ("head_dim", "pairs"), [(128, (22, 21, 21)), (64, (12, 10, 10)), (16, (4, 2, 2)), (2, (1, 0, 0))]
)
def test_pairs(head_dim, pairs):
    assert axis_pairs(head_dim) == pairs


def test_odd_head_dim_is_refused():
    with pytest.raises(ValueError, match="head_dim 65 is odd"):
        axis_pairs(65)


@pytest.mark.parametrize("t_start", FAR)
@pytest.mark.parametrize("head_dim", [2, 64, 128])
def test_table_and_rotation_equal_the_complex_formula(head_dim, t_start):
    turn = angles(t_start, 2, 3, 5, head_dim)
    cos, sin = rope_table(t_start, 2, 3, 5, head_dim, "cpu")
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (30, head_dim // 2)
    difference = torch.atan2(sin.double(), cos.double()) - turn
    error = (difference + math.pi).remainder(2 * math.pi) - math.pi
    assert error.abs().max() < 3e-7, "radians, at any distance from the start"
    x = torch.randn(2, 30, 3, head_dim)
    torch.testing.assert_close(apply_rope(x, cos, sin).double(), rotated(x, turn), atol=3e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype):
    x = torch.randn(1, 30, 2, 64).to(dtype)
    table = rope_table(500, 2, 3, 5, 64, "cpu")
    assert apply_rope(x, *table).dtype == dtype
    assert torch.equal(apply_rope(x, *table), apply_rope(x.float(), *table).to(dtype))


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize(("start", "delta"), [(0, 3), (6, -3), (99_990, 9), (3, -6)])
def test_shift_equals_rotation_at_the_shifted_time(head_dim, start, delta):
    x = torch.randn(1, 30, 2, head_dim)
    moved = shift_time(apply_rope(x, *rope_table(start, 2, 3, 5, head_dim, "cpu")), delta, head_dim)
    expected = apply_rope(x, *rope_table(start + delta, 2, 3, 5, head_dim, "cpu"))
    torch.testing.assert_close(moved, expected, atol=2e-6, rtol=0)


def test_shifts_compose_and_leave_space_alone():
    k = torch.randn(4, 7, 128)
    twice = shift_time(shift_time(k, -3, 128), 5, 128)
    torch.testing.assert_close(twice, shift_time(k, 2, 128), atol=2e-6, rtol=0)
    assert torch.equal(twice[..., 44:], k[..., 44:])
    assert torch.equal(shift_time(k, 0, 128), k)
    assert shift_time(k.bfloat16(), 1, 128).dtype == torch.bfloat16


def test_scores_depend_on_distance_alone():
    q, k = torch.randn(2, 1, 30, 1, 64).unbind()

    def scores(q_time, k_time):
        turned = (apply_rope(x, *rope_table(t, 2, 3, 5, 64, "cpu")) for x, t in ((q, q_time), (k, k_time)))
        return torch.einsum("bnhd,bmhd->bhnm", *turned)

    torch.testing.assert_close(scores(90_007, 90_001), scores(6, 0), atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", ULP)
def test_half_an_hour_of_absolute_positions_is_as_exact_as_the_beginning(dtype):
    """Wan's own table ends at frame 1024. Keys and scores beyond it are within the same bounds as those before it."""
    x = torch.randn(2, 1, 30, 1, 128, dtype=torch.float64).to(dtype)
    k_error, score_error = {}, {}
    for start in (0, 1000, 1024, HALF_AN_HOUR - 8):
        turned, exact = [], []
        for values, t in zip(x, (start, start + 6)):
            turned.append(apply_rope(values, *rope_table(t, 2, 3, 5, 128, "cpu")).double())
            exact.append(rotated(values, angles(t, 2, 3, 5, 128)))
        k_error[start] = (turned[0] - exact[0]).abs().max().item()
        scores = [torch.einsum("bnhd,bmhd->nm", *pair) / 128**0.5 for pair in (turned, exact)]
        score_error[start] = (scores[0] - scores[1]).abs().max().item()
    assert max(k_error.values()) <= 4 * ULP[dtype], k_error  # values reach 4 to 8, rounded once
    assert max(score_error.values()) <= 4 * ULP[dtype], score_error


def resting_times(cache, chunk):
    """Temporal place at which every kept frame's key should stand in the steady state of "rebased", by slot."""
    if isinstance(cache, FrameCache):
        return dict(zip(cache.slots, range(len(cache.slots)))), dict(zip(cache.slots, cache.frames))
    window = cache.time - sum(part.frames for part in cache.window)  # where the window begins
    slots = cache.table[0, 0].tolist()
    kept, behind = slots[: cache.persistent], slots[cache.capacity :][: chunk * len(cache.window)]
    frames = {slot: int(cache.page_frame[0, 0, slot]) for slot in kept + behind}
    times = {slot: window - chunk + frames[slot] % chunk for slot in kept}
    return times | {slot: window + place for place, slot in enumerate(behind)}, frames


@pytest.mark.parametrize("dtype", ULP)
@pytest.mark.parametrize(
    "attention",
    [
        AttentionConfig(mode="window", window_frames=12, positions="rebased"),
        AttentionConfig(block_tokens=1, window_frames=9, positions="rebased", backend="reference"),
    ],
    ids=["window", "sparse"],
)
def test_half_an_hour_of_rebased_positions_does_not_add_up_roundings(attention, dtype):
    """Keys are turned as often as their chunk moves in the window and no more: each turn rounds once."""
    state = StreamState(
        layers=1, heads=1, head_dim=128, grid=(1, 1), chunk_frames=3, attention=attention, dtype=dtype
    )
    plain = torch.randn(HALF_AN_HOUR, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    for frame in range(0, HALF_AN_HOUR, 3):
        state.begin_chunk(3)
        x = plain[frame : frame + 3].view(1, 3, 1, 128)
        k = apply_rope(x, *rope_table(state.t_start, 3, 1, 1, 128, "cpu"))
        state.attend(0, k, k, x)
        state.end_chunk()
    assert state.t_start <= attention.window_frames
    times, frames = resting_times(state.cache, 3)
    keys = state.cache.k[0, 0] if attention.mode == "window" else state.cache.k_pages[0, 0]
    error = 0.0
    for slot, time in times.items():
        exact = rotated(plain[frames[slot]].view(1, 1, 1, 128), angles(time, 1, 1, 1, 128)).flatten()
        error = max(error, (keys[slot].flatten().double() - exact).abs().max().item())
    assert len(times) >= 9 and max(frames.values()) == HALF_AN_HOUR - 1
    turns = attention.window_frames // 3
    assert error <= turns * 2 * ULP[dtype], error  # a rounding is half an ulp, of values below 4
