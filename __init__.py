"""Sparse Forcing for ComfyUI: minutes of autoregressive video, live, on one GPU.

ComfyUI loads this folder as a package under any name and calls `comfy_entrypoint`. Nothing of ComfyUI, CUDA or
Triton is touched before that call, so tests and the command line import the same package without a host.
"""

from __future__ import annotations

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Return the pack's extension; ComfyUI's V3 entry point."""
    from .nodes import SparseForcingExtension

    return SparseForcingExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
