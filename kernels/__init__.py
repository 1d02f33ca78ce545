"""The kernels room: attention over lists of key/value pages, the router that writes the lists, and the element-wise
work of a transformer block, fused.

It imports torch alone; Triton is looked for when a call or a report first asks for it.
"""

from . import fused
from .pbsa import (
    NO_GAP,
    BlockLists,
    attention_mass,
    backend_report,
    failed_kernels,
    pbsa_attention,
    pool_pages,
    preferred_block_tokens,
    route,
    route_parts,
)

__all__ = [
    "NO_GAP",
    "BlockLists",
    "attention_mass",
    "backend_report",
    "failed_kernels",
    "fused",
    "pbsa_attention",
    "pool_pages",
    "preferred_block_tokens",
    "route",
    "route_parts",
]
