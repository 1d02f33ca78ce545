"""The names that others give to the weights of Wan's backbone."""

from __future__ import annotations

import re
from collections.abc import Iterable

# diffusers' WanTransformer3DModel -> Wan, as its converter (scripts/convert_wan_to_diffusers.py) has it the other way.
DIFFUSERS_OUTER = {
    "condition_embedder.time_embedder.linear_1.": "time_embedding.0.",
    "condition_embedder.time_embedder.linear_2.": "time_embedding.2.",
    "condition_embedder.text_embedder.linear_1.": "text_embedding.0.",
    "condition_embedder.text_embedder.linear_2.": "text_embedding.2.",
    "condition_embedder.time_proj.": "time_projection.1.",
    "condition_embedder.image_embedder.norm1.": "img_emb.proj.0.",
    "condition_embedder.image_embedder.ff.net.0.proj.": "img_emb.proj.1.",
    "condition_embedder.image_embedder.ff.net.2.": "img_emb.proj.3.",
    "condition_embedder.image_embedder.norm2.": "img_emb.proj.4.",
    "proj_out.": "head.head.",
    "scale_shift_table": "head.modulation",
}
DIFFUSERS_BLOCK = {
    **{
        f"{theirs}.{a}.": f"{ours}.{b}."
        for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for a, b in (
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "o"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        )
    },
    "attn2.add_k_proj.": "cross_attn.k_img.",
    "attn2.add_v_proj.": "cross_attn.v_img.",
    "attn2.norm_added_k.": "cross_attn.norm_k_img.",
    "ffn.net.0.proj.": "ffn.0.",
    "ffn.net.2.": "ffn.2.",
    "norm2.": "norm3.",  # diffusers numbers the norms in the order of use, Wan does not
    "scale_shift_table": "modulation",
}


def is_diffusers(names: Iterable[str]) -> bool:
    """True where names (bare, of weights or of LoRA pairs) are those of diffusers' WanTransformer3DModel."""
    return any(".attn1.to_" in name or name.startswith("condition_embedder.") for name in names)


def wan_name(name: str) -> str:
    """Wan's name of a weight that diffusers calls `name`; a name that both share, or neither has, stays."""
    block = re.match(r"blocks\.\d+\.", name)
    front, table = (block[0], DIFFUSERS_BLOCK) if block else ("", DIFFUSERS_OUTER)
    rest = name[len(front) :]
    part = next((part for part in table if rest.startswith(part)), None)
    return name if part is None else front + table[part] + rest[len(part) :]
