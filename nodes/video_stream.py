"""One run of Stream Video: each chunk is sampled, decoded, written, shown and, where wanted, kept as a session."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import folder_paths
import torch
from torch import Tensor

from ..sparse_attn.config import pixel_frames
from ..sparse_attn.rollout import Chunk
from ..sparse_attn.session import Session, memory_snapshot
from ..sparse_attn.video import Mp4Writer
from .hooks import patch_model
from .host import inference_dtype
from .keeping import SessionKeeper, conditioning_key, in_output, memories_by_name, restore_run
from .live import LiveRun
from .output import Output
from .prompt_timeline import PromptSwitcher
from .report import show_text
from .session import ATTENTION, RUN, SamplingRun, attention_of
from .streaming import StreamSampler
from .vae_stream import constants_on, stream_decoder

logger = logging.getLogger("sparse_forcing.nodes")

IN_MEMORY_BYTES = 1 << 30  # a longer video's latent is kept in a file of the temp folder


class _StopEarly(Exception):
    """Leaves the sampler after a chunk, on the way that the host's own interrupt takes."""


class VideoStream:
    """One run of the node: samples, decodes and writes chunk after chunk.

    `shape` [1, 16, F, h, w] of the whole video's latent.
    """

    def __init__(self, model: Any, vae: Any, shape: tuple[int, ...], chunk_frames: int):
        if ATTENTION not in model.model_options["transformer_options"]:
            model = patch_model(model, attention_of(model))
        self.model, self.vae, self.chunk_frames = model.clone(), vae, chunk_frames
        # Loaded together and kept together: decoding in between must not push the model out.
        self.model.set_additional_models("sparse_forcing_vae", [vae.patcher])
        self.decoder = stream_decoder(vae, (shape[3], shape[4]))
        self.shape, self.latent = shape, _allocate(shape)
        self.made = 0  # latent frames that are finished
        self.session: Session | None = None  # to go on from
        self.keeper = SessionKeeper(False, 0, Path())
        self.identity: dict[str, Any] = {}

    def resume(self, session: Session) -> None:
        """Go on from a session that `check_session` let pass. Raises SessionError for one of another VAE."""
        self.decoder.check(session.decoder)
        self.session, self.made = session, session.frames
        self.latent[:, :, : self.made] = session.latent

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
        writer.check()
        self.writer = writer
        self.output = Output(
            self.decoder, self.chunk_frames, writer, live, comfy.utils.ProgressBar(1, node_id)
        )
        self.guider, self.live, self.switcher, self.seed = guider, live, switcher, seed
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
            on_open=self._on_open,
            clean_last=self.keeper.active,
            finished=self.finished,
            rereads=switcher.may_change or self.session is not None,
        )
        try:
            try:
                guider.sample(
                    chunk,
                    chunk,
                    sampler,
                    sigmas,
                    callback=lambda step, x0, x, total: self.output.after_pass(step + 1, total),
                    seed=seed,
                )
            except _StopEarly:
                comfy.sampler_helpers.cleanup_models(guider.conds, guider.loaded_models)
            self.output.end()
        except BaseException:  # the host's interrupt is one, too
            self.output.close()
            self._tell_what_is_kept(node_id)
            raise
        finally:
            self.output.close()
            del self.switcher  # it knows this object; a cycle would keep the decoder's memory, too
            if problem := self.keeper.finish():
                self.live.say(problem)
        return self.latent[:, :, : self.made]

    def finished(self, start: int, stop: int) -> Tensor:
        """Finished latent frames [1, 16, stop - start, h, w] in the model's scale."""
        self.output.settle()
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

    def _on_open(self, run: SamplingRun, base: Any, x: Tensor) -> None:
        """Before the first pass, with the models loaded: go on from the session, if there is one."""
        self._scale_out = constants_on(x.device, base.latent_format.process_out)
        if self.session is None:
            return
        self.output.restore(self.session.decoder)
        restore_run(self.session, self.guider, run, base.diffusion_model, x, inference_dtype(base))
        self._continue_video(self.session.facts["video"])
        self.live.start_behind(self.writer.frames, -(-self.made // self.chunk_frames))
        self.switcher.resume(self.made, self.session.facts["prompt_key"])

    def _continue_video(self, video: dict[str, Any]) -> None:
        """Begin the new file with the old one's frames: copied, or decoded again where the old file is gone."""
        height, width = 8 * self.shape[3], 8 * self.shape[4]
        try:
            self.writer.resume(in_output(video["path"]), video["bytes"], video["frames"], height, width)
        except ValueError as error:
            logger.warning("The video of the session is decoded again, as %s cannot be gone on with: %s",
                           video["path"], error)  # fmt: skip
            self.decoder = self.output.decoder = stream_decoder(self.vae, (self.shape[3], self.shape[4]))
            self.output.write(self.latent[:, :, : self.made])
            self.output.settle()

    def _take_session(self) -> Session:
        decoder = self.output.snapshot()  # memory, decoder and file then stand at the same chunk
        run = self.guider.model_options["transformer_options"][RUN]
        states = memories_by_name(self.guider, run)
        self.writer.sync()  # a session never knows of frames that the video could lose
        return Session(
            identity=self.identity,
            frames=self.made,
            latent=self.latent[:, :, : self.made],
            memory={name: memory_snapshot(state) for name, state in states.items()},
            decoder=decoder,
            facts={
                "seed": self.seed,
                "prompt": self.switcher.text,
                "prompt_key": conditioning_key(self.switcher.conditioning),
                "video": {
                    "path": self.output.path.as_posix(),
                    "bytes": self.writer.bytes,
                    "frames": self.writer.frames,
                },
            },
        )

    def _on_chunk(self, chunk: Chunk) -> None:
        start, self.made = chunk.start_frame, chunk.start_frame + chunk.latent.shape[2]
        place = self.latent[:, :, start : self.made]
        done = -(-self.made // self.chunk_frames)
        facts = {
            "done": done,
            "total": -(-self.latent.shape[2] // self.chunk_frames),
            "cache_bytes": self._cache_bytes(),
            "prompt": self.switcher.text,
        }
        self.output.add(lambda: self._scale_out(chunk.latent.float()), chunk.index < 0, place, facts)
        stopping = self.live.stopping
        last = stopping or self.made == self.latent.shape[2]
        if last:
            self.output.settle()
        if problem := self.keeper.after_chunk(done, last, self._take_session):
            self.live.say(problem)
        if self.made == self.latent.shape[2]:
            return
        if stopping:
            raise _StopEarly
        typed = self.live.take_prompt()
        if typed is not None:
            self.output.settle()  # where memory is short, the host moves the VAE away for the text encoder
        if self.switcher.next_chunk(self.made, typed) is None and typed is not None:
            self.live.say("The new prompt could not be read; the log says why.")

    def _cache_bytes(self) -> int:
        run = self.guider.model_options["transformer_options"][RUN]
        return sum(state.nbytes for state in run.states.values())

    def _tell_what_is_kept(self, node_id: str | None) -> None:
        """Name the file that holds the chunks finished before a stop or a failure, in the log and on the node."""
        self.writer.close()
        if self.writer.frames == 0:
            return
        text = f"Stopped early: {self.writer.frames} frames are kept in {self.writer.path}"
        logger.warning(text)
        show_text(text, node_id)


def _allocate(shape: tuple[int, ...]) -> Tensor:
    """A float32 tensor of `shape`; a large one is backed by a file in the host's temp folder."""
    latent = torch.Size(shape)
    if latent.numel() * 4 <= IN_MEMORY_BYTES:
        return torch.zeros(latent)
    folder, name, counter, _, _ = folder_paths.get_save_image_path(
        "sparse_forcing_latent", folder_paths.get_temp_directory()
    )
    path = os.path.join(folder, f"{name}_{counter:05}_.bin")
    _reserve(path, 4 * latent.numel())
    return torch.from_file(path, shared=True, size=latent.numel()).view(latent)


def _reserve(path: str, size: int) -> None:
    """Make a file that has `size` bytes on the disk. Were they not there, writing through the map would be fatal."""
    if not hasattr(os, "posix_fallocate"):  # Windows and macOS have no such call
        return
    try:
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        Path(path).unlink(missing_ok=True)
        raise OSError(
            f"The video's latent needs {size / 1e9:.1f} GB in {os.path.dirname(path)}: {error.strerror or error}. "
            "Make room there, or make a shorter video."
        ) from error
