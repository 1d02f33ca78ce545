"""The ComfyUI room: node schemas with thin `execute` methods, and the hooks that give a Wan model its memory.

Only this room imports ComfyUI, and only once ComfyUI calls the pack's entry point; the node modules themselves load
inside `get_node_list`, so a start of the host costs next to nothing.
"""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io


class SparseForcingExtension(ComfyExtension):
    """Everything the pack registers."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        from .apply import SparseForcingApply
        from .benchmark import SparseForcingBenchmark
        from .estimate import SparseForcingEstimate
        from .live import add_routes
        from .loaders import SparseForcingModelLoader, SparseForcingWorldModel
        from .memory_map import SparseForcingMemoryMap
        from .preset import SparseForcingPreset
        from .prompt_timeline import SparseForcingPromptTimeline
        from .sampler import SparseForcingSampler
        from .session_nodes import LoadSparseForcingSession, SaveSparseForcingSession
        from .stream_video import SparseForcingStreamVideo

        add_routes()
        return [
            SparseForcingModelLoader,
            SparseForcingWorldModel,
            SparseForcingApply,
            SparseForcingPreset,
            SparseForcingSampler,
            SparseForcingStreamVideo,
            SparseForcingPromptTimeline,
            SaveSparseForcingSession,
            LoadSparseForcingSession,
            SparseForcingMemoryMap,
            SparseForcingEstimate,
            SparseForcingBenchmark,
        ]
