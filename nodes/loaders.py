"""Loaders: checkpoints of the Self-Forcing family as their authors publish them, and the embedded world model."""

from __future__ import annotations

import os
from typing import Any

import comfy.sd
import folder_paths
import torch
from comfy_api.latest import io
from safetensors.torch import load_file

from ..sparse_attn.checkpoint import CAUSAL_AR, read_checkpoint, recognise_wan
from ..sparse_attn.world.model import DIT_FILE, FIRST_STEPS, TEXT_FILE, VAE_FILE
from . import session
from .world_clip import world_clip

FOLDER = "diffusion_models"
DTYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}
# Names that stored quantisation adds to a weight's own; the host reads them, they do not tell models apart.
QUANTISATION = (
    ".scale_weight",
    ".scale_input",
    ".weight_scale",
    ".input_scale",
    ".comfy_quant",
    "scaled_fp8",
)


class SparseForcingModelLoader(io.ComfyNode):
    """Schema of the checkpoint loader; reading and recognition are in `sparse_attn.checkpoint`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SparseForcingModelLoader",
            display_name="Load Sparse Forcing Model",
            category="model/loaders",
            description=(
                "Loads a Wan text-to-video checkpoint for autoregressive generation: the authors' .pt files of "
                "Self-Forcing, Causal-Forcing, LongLive and others, or safetensors. Refuses a file that does not fit."
            ),
            search_aliases=[
                "self forcing",
                "causal forcing",
                "longlive",
                "load pt",
                "EMA",
                "autoregressive wan",
            ],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A .safetensors, .pt, .pth or .ckpt file in models/diffusion_models, read as data only.",
                ),
                io.Combo.Input(
                    "weights",
                    options=["ema", "raw"],
                    default="ema",
                    tooltip=(
                        "Which weights of a training checkpoint that holds both: ema is the moving average, "
                        "raw the last step. Files with one set are unaffected."
                    ),
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(DTYPES),
                    default="default",
                    advanced=True,
                    tooltip="default keeps 16 bits; fp8 halves the memory of the weights at some loss of quality.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL",
                    tooltip="A causal Wan model with the shift-5 schedule of the Self-Forcing family.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str, **_: Any) -> float:
        return os.path.getmtime(folder_paths.get_full_path_or_raise(FOLDER, model_name))

    @classmethod
    def execute(cls, model_name: str, weights: str, weight_dtype: str) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise(FOLDER, model_name)
        return io.NodeOutput(load_causal_model(path, weights == "ema", DTYPES[weight_dtype]))


class SparseForcingWorldModel(io.ComfyNode):
    """Schema of the embedded model's loader; the weights are in `sparse_attn/world/weights`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SparseForcingWorldModel",
            display_name="Load World Model",
            category="model/loaders",
            description=(
                "Loads the small video model that comes with the pack: a world of moving shapes with Wan's "
                "architecture. It needs no download and runs on a CPU, to try everything the pack does."
            ),
            search_aliases=["sparse forcing demo", "embedded model", "toy model", "sprites"],
            inputs=[],
            outputs=[
                io.Model.Output(
                    display_name="MODEL", tooltip="The world's diffusion model, a very small causal Wan."
                ),
                io.Clip.Output(
                    display_name="CLIP",
                    tooltip="Its text encoder, for CLIP Text Encode. Knows the world's few words.",
                ),
                io.Vae.Output(display_name="VAE", tooltip="Its VAE: Wan 2.1's, with fewer channels."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        missing = [str(path) for path in (DIT_FILE, VAE_FILE, TEXT_FILE) if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"The world model's weights are missing: {', '.join(missing)}. Reinstall the pack."
            )
        model = load_causal_model(str(DIT_FILE), True, {})
        model.model_options["transformer_options"][session.FIRST_STEPS] = FIRST_STEPS
        return io.NodeOutput(model, world_clip(load_file(TEXT_FILE)), comfy.sd.VAE(sd=load_file(VAE_FILE)))


def load_causal_model(path: str, ema: bool, options: dict[str, Any], disable_dynamic: bool = False) -> Any:
    """The host's MODEL of a checkpoint file, marked autoregressive so that it gets the schedule with shift 5.

    options: the host's `model_options`. Raises CheckpointError, listing missing and unexpected names, for other files.
    """
    state_dict, metadata = read_checkpoint(path, ema=ema)
    recognise_wan({k: v for k, v in state_dict.items() if not k.endswith(QUANTISATION)}, path)
    model = comfy.sd.load_diffusion_model_state_dict(
        state_dict, model_options=options, metadata={**metadata, **CAUSAL_AR}, disable_dynamic=disable_dynamic
    )
    if model is None:
        raise ValueError(f"ComfyUI does not recognise {path} as a Wan model. Update ComfyUI.")
    model.cached_patcher_init = (load_causal_model, (path, ema, options))  # how the host loads it anew
    return model
