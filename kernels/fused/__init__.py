"""The element-wise work between a Wan block's products, in as few passes over memory as it allows.

Written eagerly, RMSNorm, RoPE, cache write, adaLN and gates cost more time than the linear layers that they stand
between: each reads and writes the whole chunk several times. Read `api` for the interface, `reference` for what the
numbers mean.
"""

from .api import (
    Pages8,
    Rows8,
    blocks_to_tokens,
    distinct_rows,
    gated_residual,
    gated_residual_norm,
    merge_attention,
    modulated_norm,
    norm_rope_to_frames,
    norm_rope_to_pages,
    norm_to_window,
    pack_pages,
    prompt_attention,
    put_pages,
    quantise_rows,
    rms_norm,
    unpack_pages,
    update_table,
)

__all__ = [
    "Pages8",
    "Rows8",
    "blocks_to_tokens",
    "distinct_rows",
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
