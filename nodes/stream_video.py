"""Stream Video: prompt in, video file out, every chunk decoded and on disk as soon as it is finished."""

from __future__ import annotations

import logging
import os
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import folder_paths
import latent_preview
import numpy as np
import torch
from comfy_api.latest import InputImpl, io, ui
from PIL import Image
from torch import Tensor

from ..sparse_attn.config import AttentionConfig, check_size, pixel_frames, shifted_sigmas
from ..sparse_attn.rollout import Chunk
from ..sparse_attn.timeline import Policy
from ..sparse_attn.video import Mp4Writer
from .checks import latent_frames_for, require_wan
from .hooks import patch_model
from .live import LiveRun, live_run
from .prompt_timeline import PromptSwitcher, timeline_of
from .session import ATTENTION, RUN
from .streaming import StreamSampler, given_frames
from .vae_stream import LATENT_CHANNELS, StreamDecoder, require_wan_vae

logger = logging.getLogger("sparse_forcing.nodes")

IN_MEMORY_BYTES = 1 << 30  # a longer video's latent is kept in a file of the temp folder


class SparseForcingStreamVideo(io.ComfyNode):
    """Schema; the work is in `VideoStream`."""

    steered = 0  # runs that somebody stopped early or gave another prompt

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> int:
        # The host would answer the same inputs from its cache, but a steered run is not what they ask for.
        return SparseForcingStreamVideo.steered

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SparseForcingStreamVideo",
            display_name="Stream Video (Sparse Forcing)",
            category="video",
            description=(
                "Generates a video of any length chunk by chunk and writes it to the output folder while it grows. "
                "Memory does not grow with length; when stopped, the finished chunks are already in the file. "
                "The player on the node shows the video while it is made."
            ),
            search_aliases=[
                "long video",
                "autoregressive video",
                "streaming decode",
                "live preview",
                "self forcing",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A Wan 2.1 text-to-video model. Without Apply Sparse Forcing, its default settings apply.",
                ),
                io.Conditioning.Input("positive", tooltip="What the video shows."),
                io.Vae.Input(
                    "vae", tooltip="The Wan 2.1 VAE. Each chunk is decoded as soon as it is finished."
                ),
                io.Int.Input(
                    "width",
                    default=832,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="Width in pixels, a multiple of 16.",
                ),
                io.Int.Input(
                    "height",
                    default=480,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="Height in pixels, a multiple of 16.",
                ),
                io.Float.Input(
                    "seconds",
                    default=5.0,
                    min=0.1,
                    max=86400.0,
                    step=0.1,
                    tooltip="Length of the video; rounded up to whole chunks.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Same seed, same video, on every device; a longer one starts the same.",
                ),
                io.Int.Input(
                    "steps",
                    default=4,
                    min=1,
                    max=100,
                    tooltip="Denoising steps a chunk. Distilled models want the 4 they were trained with.",
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip=(
                        "Guidance. 1 for distilled models; "
                        "any other value needs a negative prompt and twice the time and cache."
                    ),
                ),
                io.Int.Input(
                    "chunk_frames",
                    default=3,
                    min=1,
                    max=64,
                    tooltip="Latent frames denoised together, as the checkpoint was trained: 3 or 1.",
                ),
                io.Int.Input(
                    "fps",
                    default=16,
                    min=1,
                    max=120,
                    tooltip="Frames a second of the video; Wan is trained at 16.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="video/SparseForcing",
                    tooltip="Where in the output folder the MP4 goes.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What the video should not show; used when CFG is not 1.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    advanced=True,
                    tooltip="A schedule of your own, ending at 0. Replaces steps.",
                ),
                io.Int.Input(
                    "first_steps",
                    optional=True,
                    default=0,
                    min=0,
                    max=100,
                    advanced=True,
                    tooltip=(
                        "Denoising steps of the opening chunk, which decides where everything is. 0: what the loaded "
                        "model asks for (Load World Model: 16), else as many as the other chunks."
                    ),
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip=(
                        "Reads prompts typed into the player while the video is made. "
                        "Not needed with Prompt Timeline, which brings its own."
                    ),
                ),
                io.Combo.Input(
                    "on_prompt_change",
                    options=["keep", "re-cache", "flush"],
                    default="re-cache",
                    optional=True,
                    tooltip=(
                        "What a new prompt does to the memory. keep: nothing, the old prompt lingers longest. "
                        "re-cache: the recent window is read again under the new prompt, the long-lived part stays. "
                        "flush: the same, and everything older is forgotten."
                    ),
                ),
            ],
            outputs=[
                io.Video.Output(display_name="VIDEO", tooltip="The finished video, backed by the file."),
                io.Latent.Output(
                    display_name="LATENT",
                    tooltip="The video's latent, for VAE Decode or further work; kept on disk when it is large.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: list,
        vae: Any,
        width: int,
        height: int,
        seconds: float,
        seed: int,
        steps: int,
        cfg: float,
        chunk_frames: int,
        fps: int,
        filename_prefix: str,
        negative: list | None = None,
        sigmas: Tensor | None = None,
        first_steps: int = 0,
        clip: Any = None,
        on_prompt_change: Policy = "re-cache",
    ) -> io.NodeOutput:
        check_size(width, height)
        require_wan(model)
        require_wan_vae(vae)
        if cfg != 1.0 and negative is None:
            raise ValueError(f"A CFG of {cfg:g} needs a negative prompt: connect one, or set CFG to 1.")
        given = given_frames(model.model_options["transformer_options"])
        frames = latent_frames_for(max(1, round(seconds * fps)), chunk_frames, given)
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory(), width, height
        )
        file = f"{name}_{counter:05}_.mp4"
        job = VideoStream(model, vae, (1, LATENT_CHANNELS, frames, height // 8, width // 8), chunk_frames)
        sigmas = torch.tensor([*shifted_sigmas(steps), 0.0]) if sigmas is None else sigmas
        guider = _guider(job.model, positive, negative, cfg)
        switcher = PromptSwitcher(
            timeline_of(positive), clip, guider, sigmas, seed, fps, on_prompt_change, job.finished
        )
        node_id = cls.hidden.unique_id
        with live_run(node_id) as live, Mp4Writer(os.path.join(folder, file), fps) as writer:
            latent = job.run(writer, guider, sigmas, first_steps, seed, node_id, live, switcher)
        SparseForcingStreamVideo.steered += live.steered
        saved = ui.SavedResult(file, subfolder, io.FolderType.output)
        return io.NodeOutput(
            InputImpl.VideoFromFile(str(writer.path)), {"samples": latent}, ui=ui.PreviewVideo([saved])
        )


def _guider(model: Any, positive: list, negative: list | None, cfg: float) -> comfy.samplers.CFGGuider:
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds(
        {"positive": positive} if negative is None else {"positive": positive, "negative": negative}
    )
    guider.set_cfg(cfg)
    return guider


class _StopEarly(Exception):
    """Leaves the sampler after a chunk, on the way that the host's own interrupt takes."""


class VideoStream:
    """One run of the node: samples, decodes and writes chunk after chunk.

    `shape` [1, 16, F, h, w] of the whole video's latent.
    """

    def __init__(self, model: Any, vae: Any, shape: tuple[int, ...], chunk_frames: int):
        if ATTENTION not in model.model_options["transformer_options"]:
            model = patch_model(model, AttentionConfig())
        self.model, self.vae, self.chunk_frames = model.clone(), vae, chunk_frames
        # Loaded together and kept together: decoding in between must not push the model out.
        self.model.set_additional_models("sparse_forcing_vae", [vae.patcher])
        self.decoder = StreamDecoder(vae)
        self.latent = _allocate(shape)
        self.made = 0  # latent frames that are finished

    def run(
        self,
        writer: Mp4Writer,
        guider: comfy.samplers.CFGGuider,
        sigmas: Tensor,
        first_steps: int,
        seed: int,
        node_id: str | None,
        live: LiveRun,
        switcher: PromptSwitcher,
    ) -> Tensor:
        """Generate into `writer`; returns the raw latent [1, 16, F, h, w] float32, shorter if `live` stopped it."""
        self.writer, self.progress = writer, comfy.utils.ProgressBar(1, node_id)
        self.guider, self.live, self.switcher = guider, live, switcher
        live.takes_prompts = switcher.clip is not None
        live.facts = self._facts()
        batch, channels, frames, height, width = self.latent.shape
        chunk = torch.zeros(batch, channels, self.chunk_frames, height, width)
        sampler = StreamSampler(
            self.chunk_frames,
            total_frames=frames,
            on_chunk=self._on_chunk,
            reserve_bytes=self.vae.memory_used_decode(chunk.shape, self.vae.vae_dtype),
            first_steps=first_steps,
        )
        try:
            try:
                guider.sample(
                    chunk,
                    chunk,
                    sampler,
                    sigmas,
                    callback=lambda step, x0, x, total: self.progress.update_absolute(step + 1, total),
                    seed=seed,
                )
            except _StopEarly:
                comfy.sampler_helpers.cleanup_models(guider.conds, guider.loaded_models)
            self._write(self.decoder.flush())
        except BaseException:  # the host's interrupt is one, too
            self._tell_what_is_kept(node_id)
            raise
        return self.latent[:, :, : self.made]

    def finished(self, start: int, stop: int) -> Tensor:
        """Finished latent frames [1, 16, stop - start, h, w] in the model's scale."""
        return self.model.model.process_latent_in(self.latent[:, :, start:stop])

    def _facts(self) -> dict[str, Any]:
        """What the page is told with every chunk, so that one that was loaded in the middle knows it, too."""
        prompts = self.switcher.timeline.prompts
        frames = self.latent.shape[2]
        return {
            "fps": self.writer.fps,
            "total_frames": pixel_frames(frames),
            "timeline": [[prompt.start, prompt.text] for prompt in prompts] if len(prompts) > 1 else [],
        }

    def _on_chunk(self, chunk: Chunk) -> None:
        raw = self.model.model.process_latent_out(chunk.latent.float())
        self.latent[:, :, chunk.start_frame : chunk.start_frame + raw.shape[2]] = raw.cpu()
        self.made = chunk.start_frame + raw.shape[2]
        frames = self._write(self.decoder.push(raw))
        self.live.show_chunk(
            frames,
            done=-(-self.made // self.chunk_frames),
            total=-(-self.latent.shape[2] // self.chunk_frames),
            cache_bytes=self._cache_bytes(),
            prompt=self.switcher.text,
        )
        if self.made == self.latent.shape[2]:
            return
        if self.live.stopping:
            raise _StopEarly
        typed = self.live.take_prompt()
        if self.switcher.next_chunk(self.made, typed) is None and typed is not None:
            self.live.say("The new prompt could not be read; the log says why.")

    def _cache_bytes(self) -> int:
        run = self.guider.model_options["transformer_options"][RUN]
        return sum(state.nbytes for state in run.states.values())

    def _write(self, frames: Tensor) -> np.ndarray:
        """Append frames [n, H, W, 3] in 0..1 to the file; returns them as uint8.

        Where no player shows them all, the last one is the host's ordinary preview.
        """
        images = (frames * 255).round().to(torch.uint8).numpy()
        if len(images) == 0:
            return images
        self.writer.append(images)
        if not self.live.has_player:
            preview = ("JPEG", Image.fromarray(images[-1]), latent_preview.MAX_PREVIEW_RESOLUTION)
            self.progress.update_absolute(self.progress.current, preview=preview)
        return images

    def _tell_what_is_kept(self, node_id: str | None) -> None:
        """Name the file that holds the chunks finished before a stop or a failure, in the log and on the node."""
        self.writer.close()
        if self.writer.frames == 0:
            return
        text = f"Stopped early: {self.writer.frames} frames are kept in {self.writer.path}"
        logger.warning(text)
        from server import PromptServer

        server = getattr(PromptServer, "instance", None)
        if server is not None and node_id is not None:
            server.send_progress_text(text, node_id)


def _allocate(shape: tuple[int, ...]) -> Tensor:
    """A float32 tensor of `shape`; a large one is backed by a file in the host's temp folder."""
    latent = torch.Size(shape)
    if latent.numel() * 4 <= IN_MEMORY_BYTES:
        return torch.zeros(latent)
    folder, name, counter, _, _ = folder_paths.get_save_image_path(
        "sparse_forcing_latent", folder_paths.get_temp_directory()
    )
    path = os.path.join(folder, f"{name}_{counter:05}_.bin")
    return torch.from_file(path, shared=True, size=latent.numel()).view(latent)
