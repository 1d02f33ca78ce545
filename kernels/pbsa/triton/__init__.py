"""PBSA in Triton. Importing this package imports Triton, so only `api` does it, once the constraints are met."""

from .ops import attention, attention_mass, pool_pages, route, route_parts

__all__ = ["attention", "attention_mass", "pool_pages", "route", "route_parts"]
