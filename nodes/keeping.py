"""Sessions of a Stream Video run: what one is made of, when it is taken, and how a run goes on from it."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import folder_paths
import torch
from torch import Tensor

from ..sparse_attn.session import (
    SUFFIX,
    Session,
    SessionError,
    check_memory,
    fingerprint,
    restore_memory,
    save_session,
    sign_bytes,
)
from ..sparse_attn.session_files import LatentFile
from .host import inference_dtype, io
from .session import ATTENTION, SamplingRun
from .vae_stream import is_tiny

logger = logging.getLogger("sparse_forcing.nodes")

SESSION = io.Custom("SPARSE_FORCING_SESSION")

# Parameters whose signs tell models apart; a matrix among them, as biases of two finetunes may have equal signs.
MODEL_MARKS = (
    "patch_embedding.weight",
    "blocks.0.modulation",
    "blocks.0.self_attn.q.weight",
    "head.modulation",
    "head.head.weight",
)
VAE_MARKS = ("conv2.weight", "decoder.conv1.weight", "decoder.head.2.weight")
TINY_VAE_MARKS = ("decoder.1.weight", "decoder.3.conv.0.weight", "decoder.22.weight")
PATCH_VALUES = 256  # of each tensor of a LoRA that count


def in_output(name: str) -> Path:
    """The file `name` of the host's output folder; SessionError for one outside it, links followed."""
    root = os.path.realpath(folder_paths.get_output_directory())
    try:
        path = os.path.realpath(os.path.join(root, name))
        inside = os.path.commonpath([root, path]) == root
    except (ValueError, TypeError):  # a null byte, another drive, no text
        inside = False
    if not inside:
        raise SessionError(
            f"{name!r} lies outside ComfyUI's output folder: move the file there and choose it."
        )
    return Path(path)


def list_sessions() -> list[str]:
    """Session files of the output folder, newest first, as names that `in_output` takes."""
    root = Path(folder_paths.get_output_directory())
    found = [path for path in root.rglob(f"*{SUFFIX}") if path.is_file() and not path.name.startswith(".")]
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return [path.relative_to(root).as_posix() for path in found]


def conditioning_key(conditioning: list) -> str:
    """Tells conditionings apart: a hash of their tensors."""
    digest = hashlib.sha256()
    for rows, _ in conditioning:
        digest.update(str(list(rows.shape)).encode())
        digest.update(rows.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def identity_of(
    model: Any, vae: Any, shape: tuple[int, ...], chunk_frames: int, given: int, **settings: Any
) -> dict[str, Any]:
    """What two runs must share for one to continue the other. The memory's own settings are in its snapshots."""
    network = model.get_model_object("diffusion_model")
    return {
        "model": fingerprint(network, MODEL_MARKS, _originals(model), _patches_key(model)),
        "vae": fingerprint(
            vae.first_stage_model,
            TINY_VAE_MARKS if is_tiny(vae) else VAE_MARKS,
            _originals(vae.patcher),
            _patches_key(vae.patcher),
        ),
        "width": shape[4] * 8,
        "height": shape[3] * 8,
        "chunk_frames": chunk_frames,
        "start image frames": given,
        **settings,
    }


def _originals(patcher: Any) -> dict[str, Tensor]:
    """The parameters that the host has patched or cast in place, as they were before, by their name in the network."""
    prefix = "diffusion_model."
    return {key.removeprefix(prefix): kept.weight for key, kept in patcher.backup.items()}


def _patches_key(patcher: Any) -> str:
    """Tells a model's LoRAs apart, the same in every process: by their keys, strengths, shapes and signs."""
    digest = hashlib.sha256()
    for key in sorted(patcher.patches, key=str):
        for strength, values, strength_model, offset, _function in patcher.patches[key]:
            digest.update(f"{key}{strength}{strength_model}{offset}".encode())
            for value in _leaves(values):
                sample = isinstance(value, Tensor)
                digest.update(f"{list(value.shape)}".encode() if sample else f"{value}".encode())
                digest.update(sign_bytes(value.flatten()[:PATCH_VALUES]) if sample else b"")
    return digest.hexdigest() if patcher.patches else ""


def _leaves(values: Any) -> Iterator[Any]:
    """Tensors and numbers of a patch: the host's adapters, and tuples in tuples."""
    values = getattr(values, "weights", values)
    if isinstance(values, tuple | list):
        for value in values:
            yield from _leaves(value)
    elif values is None or isinstance(values, Tensor | str | int | float | bool):
        yield values


def check_session(
    session: Session, identity: dict[str, Any], model: Any, guider: Any, shape: tuple[int, ...]
) -> None:
    """Refuse, before anything is loaded, a session that a run over `shape` [1, 16, F, h, w] cannot continue."""
    session.require(identity)
    total, given, chunk = shape[2], identity["start image frames"], identity["chunk_frames"]
    if session.frames >= total:
        seconds = (4 * session.frames - 3) / identity["fps"]
        raise SessionError(
            f"The session already has {seconds:.2f} seconds: set seconds, the length of the whole video, to more."
        )
    if (session.frames - given) % chunk or session.latent.shape != (*shape[:2], session.frames, *shape[3:]):
        raise SessionError(
            f"The session's latent {list(session.latent.shape)} is not whole chunks of this video: "
            "use an earlier session."
        )
    _check_facts(session.facts)
    wanted = {name for name, _ in _entries(guider, guided=identity["cfg"] != 1)}
    if set(session.memory) != wanted:
        raise SessionError(
            f"The session remembers {', '.join(session.memory) or 'nothing'}, this run needs "
            f"{', '.join(sorted(wanted))}: use as many prompts as it was made with."
        )
    run = SamplingRun(model.model_options["transformer_options"][ATTENTION], chunk, total)
    network, dtype = model.get_model_object("diffusion_model"), inference_dtype(model.model)
    state = run.new_state(network, torch.Size(shape), shape[0], dtype, "meta")
    for saved in session.memory.values():
        check_memory(state, saved)


def _check_facts(facts: dict[str, Any]) -> None:
    video, seed = facts.get("video"), facts.get("seed")
    sound = (
        isinstance(seed, int)
        and 0 <= seed < 2**64
        and isinstance(facts.get("prompt_key"), str)
        and isinstance(video, dict)
        and isinstance(video.get("path"), str)
        and all(isinstance(video.get(name), int) and video[name] > 0 for name in ("bytes", "frames"))
    )
    if not sound or video is None:
        raise SessionError("The session's description is damaged: use an earlier session.")
    in_output(video["path"])


def _entries(guider: Any, guided: bool = True) -> list[tuple[str, Any]]:
    """(a name that the next run can give it, key of its memory) of every conditioning entry."""
    sides = getattr(guider, "conds", None) or guider.original_conds
    return [
        (f"{side}.{place}", cond["uuid"])
        for side, conds in sides.items()
        if guided or side == "positive"
        for place, cond in enumerate(conds)
    ]


def memories_by_name(guider: Any, run: SamplingRun) -> dict[str, Any]:
    """The run's states under the names of their conditioning entries."""
    return {name: run.states[key] for name, key in _entries(guider) if key in run.states}


def restore_run(session: Session, guider: Any, run: SamplingRun, network: Any, x: Tensor, dtype: Any) -> None:
    """Fill a run that has just been opened with the session's memory."""
    for name, key in _entries(guider):
        if name in session.memory:
            state = run.new_state(network, x.shape, x.shape[0], dtype, x.device)
            restore_memory(state, session.memory[name])
            run.states[key] = state
    run.frame = session.frames


class SessionKeeper:
    """Takes a run's session when it ends, where somebody wants it, and saves one every `autosave` chunks (0: never).

    `path` of the file that autosave writes. A thread writes it while the next chunk is made; the next session is not
    taken before that is done, so that host memory holds the run's memory once.
    """

    def __init__(self, wanted: bool, autosave: int, path: Path):
        self.wanted, self.autosave, self.path = wanted, autosave, path
        self.session: Session | None = None
        self._latents = LatentFile(path)
        self._writer = ThreadPoolExecutor(1, "sparse_forcing_session")
        self._writing: Future[str | None] | None = None

    @property
    def active(self) -> bool:
        return self.wanted or self.autosave > 0

    def after_chunk(self, chunks: int, last: bool, take: Callable[[], Session]) -> str | None:
        """`chunks` are done; returns what to tell the viewer where the session before could not be written."""
        saving = self.autosave > 0 and (last or chunks % self.autosave == 0)
        problem = self._written(wait=saving)
        if saving or (last and self.wanted):
            session = take()
            if last and self.wanted:
                self.session = session
            if saving:
                self._writing = self._writer.submit(self._save, session, chunks)
        return problem

    def finish(self) -> str | None:
        """The run is over: wait for the last session; returns as `after_chunk` does."""
        self._writer.shutdown()
        return self._written(wait=True)

    def _written(self, wait: bool) -> str | None:
        if self._writing is None or not (wait or self._writing.done()):
            return None
        writing, self._writing = self._writing, None
        return writing.result()

    def _save(self, session: Session, chunks: int) -> str | None:
        try:
            save_session(session, self.path, self._latents)
        except OSError as error:
            logger.warning(
                "The session could not be saved to %s; the video goes on.", self.path, exc_info=True
            )
            return f"The session could not be saved: {error.strerror or error}"
        logger.info("session saved to %s after %d chunks", self.path, chunks)
        return None
