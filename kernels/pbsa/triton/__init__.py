"""PBSA in Triton. Importing this package imports Triton, so only `api` does it, once the constraints are met."""

from .forward import attention
from .router import route

__all__ = ["attention", "route"]
