"""Rotary positions against the complex formula, computed in double precision."""

import math

import pytest
import torch
from sparse_forcing_pack.sparse_attn.positions import apply_rope, axis_pairs, rope_table, shift_time

FAR = [0, 1, 7, 1023, 99_999]


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
