"""Persistent block-sparse attention (PBSA), the operation of Sparse Forcing (arXiv 2604.21221, section 3).

Read `api` for the interface, `reference` for what the numbers mean, `constraints` for who may run where.
"""

from .api import NO_GAP, BlockLists, attention_mass, pbsa_attention, pool_pages, route, route_parts
from .constraints import backend_report, failed_kernels, preferred_block_tokens

__all__ = [
    "NO_GAP",
    "BlockLists",
    "attention_mass",
    "backend_report",
    "failed_kernels",
    "pbsa_attention",
    "pool_pages",
    "preferred_block_tokens",
    "route",
    "route_parts",
]
