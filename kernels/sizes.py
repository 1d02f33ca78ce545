"""Sizes of launches. Triton's own functions of these names, made for constants of kernels, take ten times as long."""

from __future__ import annotations


def cdiv(count: int, size: int) -> int:
    """How many pieces of `size` hold `count`."""
    return -(-count // size)


def power_of_2(size: int) -> int:
    """The smallest power of two that is at least `size`, as `triton.next_power_of_2`: 0 for 0."""
    return 1 << (size - 1).bit_length() if size > 0 else 0
