"""Stream Video: prompt in, video file out, every chunk decoded and on disk as soon as it is finished."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import comfy.samplers
import folder_paths
import torch
from comfy_api.latest import InputImpl, ui
from torch import Tensor

from ..sparse_attn.config import check_size, shifted_sigmas
from ..sparse_attn.session import SUFFIX, Session
from ..sparse_attn.state import StreamState
from ..sparse_attn.timeline import Policy
from ..sparse_attn.video import Mp4Writer
from .checks import latent_frames_for, require_wan
from .host import io
from .keeping import SESSION, SessionKeeper, check_session, identity_of, memories_by_name
from .live import live_run
from .prompt_timeline import PromptSwitcher, timeline_of
from .session import RUN
from .start import Start
from .vae_stream import LATENT_CHANNELS, require_wan_vae
from .video_stream import VideoStream


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
                    "vae",
                    tooltip=(
                        "The Wan 2.1 VAE, or a tiny one for speed (taew2_1, lighttaew2_1). Each chunk is decoded as "
                        "soon as it is finished."
                    ),
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
                    tooltip="Length of the whole video, given frames included; rounded up to whole chunks.",
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
                SESSION.Input(
                    "session",
                    optional=True,
                    tooltip=(
                        "A session to go on from: seconds then counts from its beginning, and its seed replaces seed. "
                        "The other settings must be those it was made with."
                    ),
                ),
                io.Int.Input(
                    "autosave_chunks",
                    optional=True,
                    default=0,
                    min=0,
                    max=100000,
                    advanced=True,
                    tooltip=(
                        "Writes the session beside the video every so many chunks, and at the end, so that an "
                        "interrupted video can go on. 0: never. Each time the whole memory goes to disk."
                    ),
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip=(
                        "What the video begins with: one picture, or the frames of a clip to go on from. They are "
                        "scaled and cut to the video's size. Of a clip the last 1 + 4k frames are used."
                    ),
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip=(
                        "The same as a latent of the video's size, such as the LATENT of another Stream Video. "
                        "Connect one of image, latent and session."
                    ),
                ),
            ],
            outputs=[
                io.Video.Output(display_name="VIDEO", tooltip="The finished video, backed by the file."),
                io.Latent.Output(
                    display_name="LATENT",
                    tooltip="The video's latent, for VAE Decode or further work; kept on disk when it is large.",
                ),
                SESSION.Output(
                    display_name="SESSION",
                    tooltip="What it takes to go on with this video later: for Save Session, or another Stream Video.",
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
        session: Session | None = None,
        autosave_chunks: int = 0,
        image: Tensor | None = None,
        latent: dict | None = None,
    ) -> io.NodeOutput:
        check_size(width, height)
        require_wan(model)
        require_wan_vae(vae)
        if cfg != 1.0 and negative is None:
            raise ValueError(f"A CFG of {cfg:g} needs a negative prompt: connect one, or set CFG to 1.")
        start, wanted = Start(model, image, latent, session, width, height), max(1, round(seconds * fps))
        start.check_length(wanted, fps)
        frames = latent_frames_for(wanted, chunk_frames, start.frames)
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory(), width, height
        )
        file = Path(folder, f"{name}_{counter:05}_.mp4")
        job = VideoStream(model, vae, (1, LATENT_CHANNELS, frames, height // 8, width // 8), chunk_frames)
        sigmas = torch.tensor([*shifted_sigmas(steps), 0.0]) if sigmas is None else sigmas
        guider = _guider(job.model, positive, negative, cfg)
        job.keeper = SessionKeeper(_session_wanted(cls.hidden), autosave_chunks, file.with_suffix(SUFFIX))
        job.identity = identity_of(
            job.model, vae, job.shape, chunk_frames, start.frames, fps=fps, cfg=cfg, sigmas=sigmas.tolist()
        )
        if session is not None:
            check_session(session, job.identity, job.model, guider, job.shape)
            job.resume(session)
            seed = session.facts["seed"]
        start.put_before(job.model, vae)
        switcher = PromptSwitcher(
            timeline_of(positive), clip, guider, sigmas, seed, fps, on_prompt_change, job.finished
        )
        node_id = cls.hidden.unique_id
        with live_run(node_id) as live, Mp4Writer(file, fps) as writer:
            live.memory = partial(_first_memory, guider)
            samples = job.run(writer, guider, sigmas, first_steps, seed, node_id, live, switcher)
        SparseForcingStreamVideo.steered += live.steered
        saved = ui.SavedResult(file.name, subfolder, io.FolderType.output)
        return io.NodeOutput(
            InputImpl.VideoFromFile(str(writer.path)),
            {"samples": samples},
            job.keeper.session,
            ui=ui.PreviewVideo([saved]),
        )


def _session_wanted(hidden: Any) -> bool:
    """Whether the prompt uses this node's third output; a session costs as much host memory as the model's memory."""
    prompt, node = getattr(hidden, "prompt", None), str(hidden.unique_id)
    if not prompt or node not in prompt:
        return True  # nobody can say
    links = (value for other in prompt.values() for value in other.get("inputs", {}).values())
    return any(isinstance(link, list) and link == [node, 2] for link in links)


def _first_memory(guider: comfy.samplers.CFGGuider) -> StreamState | None:
    """What a running guider's first prompt remembers; of a guided run, the positive one."""
    memories = memories_by_name(guider, guider.model_options["transformer_options"][RUN])
    return next(iter(memories.values()), None)


def _guider(model: Any, positive: list, negative: list | None, cfg: float) -> comfy.samplers.CFGGuider:
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds(
        {"positive": positive} if negative is None else {"positive": positive, "negative": negative}
    )
    guider.set_cfg(cfg)
    return guider
