"""The kernels room: attention over lists of key/value pages, and the router that writes the lists.

It imports torch alone; Triton is looked for when a call or a report first asks for it.
"""

from .pbsa import BlockLists, backend_report, pbsa_attention, pool_pages, route

__all__ = ["BlockLists", "backend_report", "pbsa_attention", "pool_pages", "route"]
