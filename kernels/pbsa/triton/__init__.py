"""PBSA in Triton. Importing this package imports Triton, so only `api` does it, once the constraints are met."""

from .ops import attention_mass
from .ops import run_attention as attention
from .ops import run_pool_pages as pool_pages
from .ops import run_route as route
from .ops import run_route_parts as route_parts

__all__ = ["attention", "attention_mass", "pool_pages", "route", "route_parts"]
