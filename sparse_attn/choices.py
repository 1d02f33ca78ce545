"""Ready-made settings of the memory, for people who do not want to choose numbers.

What each costs is told by `estimate`; docs/estimate.md has the figures for Wan 1.3B at 832 x 480.
"""

from __future__ import annotations

from .config import AttentionConfig

CHOICES: dict[str, AttentionConfig] = {
    # arXiv 2604.21221: 6 + 6 frames, a quarter of the window, in the opening chunk, too
    "paper": AttentionConfig(dense_first_chunk=False),
    # as many frames as the models are trained on (21), half of the window read
    "quality": AttentionConfig(window_frames=12, persistent_frames=9, topk=0.5),
    # the paper's faster setting, half as much of the window, in blocks that GPUs like better
    "speed": AttentionConfig(topk=0.125, block_tokens=128),
    # of what left the window, the opening chunk alone
    "low VRAM": AttentionConfig(persistent_frames=3),
}
