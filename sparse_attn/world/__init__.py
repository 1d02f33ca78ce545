"""A small world of moving sprites with a known ground truth: prompts, renderer, checker, and a model trained on it.

No Wan weights travel with the pack, so this model is the default of the demo, the tests and every quality measurement.
"""

from ..config import AttentionConfig

# How its memory was trained: any length looks like a clip of training, and what no newer block shows stays.
ATTENTION = AttentionConfig(positions="rebased", keep="novelty")
