"""Loaders: checkpoints of the Self-Forcing family as their authors publish them, and the embedded world model."""

from __future__ import annotations

import logging
import os
from typing import Any

import comfy.model_management
import comfy.sd
import folder_paths
import torch
from comfy_api.latest import ui
from safetensors.torch import load_file

from ..sparse_attn.checkpoint import CAUSAL_AR, Checkpoint, open_checkpoint, recognise_wan
from ..sparse_attn.presets import propose
from ..sparse_attn.world import ATTENTION
from ..sparse_attn.world.model import DIT_FILE, FIRST_STEPS, TEXT_FILE, VAE_FILE
from . import session
from .host import io, known, reads_comfy_quant, wan_vae
from .world_clip import world_clip

logger = logging.getLogger("sparse_forcing.nodes")

FOLDER, LORAS, NO_LORA = "diffusion_models", "loras", "none"
SHIFT = 5.0  # of the Self-Forcing family's schedule
DTYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}


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
                    options=["authors", "ema", "raw"],
                    default="authors",
                    tooltip=(
                        "Which weights of a training checkpoint that holds both: authors takes what the model's "
                        "authors use, ema the moving average, raw the last step. Files with one set are unaffected."
                    ),
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(DTYPES),
                    default="default",
                    advanced=True,
                    tooltip="default keeps 16 bits; fp8 halves the memory of the weights at some loss of quality.",
                ),
                io.Combo.Input(
                    "lora_name",
                    options=[NO_LORA, *folder_paths.get_filename_list(LORAS)],
                    optional=True,
                    default=NO_LORA,
                    advanced=True,
                    tooltip=(
                        "A LoRA that belongs to the checkpoint, such as LongLive's lora.pt, merged in while loading. "
                        "For styles use the host's own LoRA loaders behind this node."
                    ),
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
    def fingerprint_inputs(cls, model_name: str, lora_name: str = NO_LORA, **_: Any) -> tuple[float, ...]:
        files = [(FOLDER, model_name), *([] if lora_name == NO_LORA else [(LORAS, lora_name)])]
        return tuple(os.path.getmtime(folder_paths.get_full_path_or_raise(*file)) for file in files)

    @classmethod
    def execute(
        cls, model_name: str, weights: str, weight_dtype: str, lora_name: str = NO_LORA
    ) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise(FOLDER, model_name)
        lora = None if lora_name == NO_LORA else folder_paths.get_full_path_or_raise(LORAS, lora_name)
        ema = propose(model_name).preset.ema if weights == "authors" else weights == "ema"
        checkpoint = open_checkpoint(path, ema=ema, lora=lora, available=memory_of_this_machine())
        model = host_model(checkpoint, DTYPES[weight_dtype])
        model.cached_patcher_init = (load_causal_model, (path, ema, DTYPES[weight_dtype], lora))
        proposal = propose(model_name, checkpoint.metadata)
        preset = proposal.preset
        if preset.first_sigmas:
            model.model_options["transformer_options"][session.FIRST_STEPS] = len(preset.first_sigmas)
        settings = f"Settings of its authors ({proposal.reason}): {preset.describe()}"
        lines = (*checkpoint.describe(), settings, preset.note, proposal.warning)
        report = "\n".join(filter(None, lines))
        logger.info("%s", report)
        return io.NodeOutput(model, ui=ui.PreviewText(report))


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
        model.model_options["transformer_options"] |= {
            session.FIRST_STEPS: FIRST_STEPS,
            session.PROPOSED: ATTENTION,
        }
        return io.NodeOutput(model, world_clip(load_file(TEXT_FILE)), wan_vae(load_file(VAE_FILE)))


def load_causal_model(
    path: str, ema: bool, options: dict[str, Any], lora: str | None = None, disable_dynamic: bool = False
) -> Any:
    """The host's MODEL of a checkpoint file, marked autoregressive so that it gets the schedule with shift 5.

    options: the host's `model_options`. Raises CheckpointError, listing missing and unexpected names, for other files.
    """
    checkpoint = open_checkpoint(path, ema=ema, lora=lora, available=memory_of_this_machine())
    model = host_model(checkpoint, options, disable_dynamic)
    model.cached_patcher_init = (load_causal_model, (path, ema, options, lora))  # how the host loads it anew
    return model


def host_model(checkpoint: Checkpoint, options: dict[str, Any], disable_dynamic: bool = False) -> Any:
    """The host's MODEL of an open checkpoint. Raises CheckpointError where it is no Wan text-to-video model."""
    recognise_wan(checkpoint.weights, str(checkpoint.path))
    if any(name.endswith(".comfy_quant") for name in checkpoint.weights) and not reads_comfy_quant():
        raise ValueError(
            f"{checkpoint.path} is quantised in a way that is newer than this ComfyUI, which would make noise of it. "
            "Update ComfyUI, or use a file in 16 bits or in fp8 with scale_weight."
        )
    load = comfy.sd.load_diffusion_model_state_dict
    model = load(
        {name: checkpoint.tensor(name) for name in checkpoint.weights},
        model_options=options,
        **known(load, metadata={**checkpoint.metadata, **CAUSAL_AR}, disable_dynamic=disable_dynamic),
    )
    if model is None:
        raise ValueError(f"ComfyUI does not recognise {checkpoint.path} as a Wan model. Update ComfyUI.")
    model.model.model_sampling.set_parameters(shift=SHIFT)  # older hosts do not read the mark, and take 8
    return model


def memory_of_this_machine() -> int:
    """Bytes of the host's memory and of the device it computes on: a model may lie in both."""
    device = comfy.model_management.get_torch_device()
    gpu = 0 if device.type == "cpu" else comfy.model_management.get_total_memory(device)
    return int(comfy.model_management.total_ram * 2**20) + gpu
