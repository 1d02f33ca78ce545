"""The method: block geometry, paged persistent memory, positions, backbone, rollout. Needs torch, never ComfyUI."""
