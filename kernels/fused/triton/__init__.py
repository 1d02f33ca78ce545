"""The fused operations in Triton. Importing this package imports Triton, so only `api` does it."""

from .frames import norm_to_window
from .pages import pack_pages, put_pages, unpack_pages, update_table
from .place import blocks_to_tokens, norm_rope_to_frames, norm_rope_to_pages
from .prompt import prompt_attention
from .rows import (
    gated_residual,
    gated_residual_norm,
    merge_attention,
    modulated_norm,
    quantise_rows,
    rms_norm,
)

__all__ = [
    "blocks_to_tokens",
    "gated_residual",
    "gated_residual_norm",
    "merge_attention",
    "modulated_norm",
    "norm_rope_to_frames",
    "norm_rope_to_pages",
    "norm_to_window",
    "pack_pages",
    "prompt_attention",
    "put_pages",
    "quantise_rows",
    "rms_norm",
    "unpack_pages",
    "update_table",
]
