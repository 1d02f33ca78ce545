"""Save Session and Load Session: a video that goes on tomorrow."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import ui

from ..sparse_attn.session import SUFFIX, Session, load_session, save_session
from .host import io
from .keeping import SESSION, in_output, list_sessions
from .stream_video import SparseForcingStreamVideo


class SaveSparseForcingSession(io.ComfyNode):
    """Schema; the file is written by `sparse_attn.session`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveSparseForcingSession",
            display_name="Save Session (Sparse Forcing)",
            category="video",
            description=(
                "Saves the session of a Stream Video run to the output folder, so that the video can go on later, "
                "bit for bit. The file is as large as the memory and the latent."
            ),
            search_aliases=["continue video", "resume", "checkpoint", "extend video", "save state"],
            inputs=[
                SESSION.Input("session", tooltip="The SESSION of Stream Video."),
                io.String.Input(
                    "filename_prefix",
                    default="sessions/SparseForcing",
                    tooltip="Where in the output folder the session goes.",
                ),
            ],
            outputs=[
                SESSION.Output(display_name="SESSION", tooltip="The same session, now also in a file."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, session: Session | None, filename_prefix: str) -> io.NodeOutput:
        if session is None:
            SparseForcingStreamVideo.steered += 1  # makes the host run it again
            raise ValueError(
                "The video was made when nothing asked for its session, so none was kept. "
                "Queue the prompt again: it is made anew, with its session."
            )
        folder, name, counter, _, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        path = Path(folder, f"{name}_{counter:05}_{SUFFIX}")
        try:
            save_session(session, path)
        except OSError as error:
            raise OSError(
                f"The session could not be saved to {path}: {error.strerror or error}. "
                "Make room, or choose another filename_prefix, and queue again: the video is not made anew."
            ) from error
        return io.NodeOutput(session, ui=ui.PreviewText(f"{path}\n{describe(session)}"))


class LoadSparseForcingSession(io.ComfyNode):
    """Schema; the file is read by `sparse_attn.session`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadSparseForcingSession",
            display_name="Load Session (Sparse Forcing)",
            category="video",
            description=(
                "Reads a session from the output folder, for Stream Video to go on with: one that Save Session wrote, "
                "or the last one that a run saved by itself before it was interrupted."
            ),
            search_aliases=["continue video", "resume", "checkpoint", "extend video", "after a crash"],
            inputs=[
                io.Combo.Input(
                    "session_name",
                    options=list_sessions(),
                    tooltip="A session file in ComfyUI's output folder, newest first. Press R after adding one.",
                ),
            ],
            outputs=[
                SESSION.Output(display_name="SESSION", tooltip="For the session input of Stream Video."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, session_name: str, **_: Any) -> str:
        try:
            status = os.stat(in_output(session_name))
        except (OSError, ValueError):
            return ""
        return f"{status.st_mtime_ns} {status.st_size}"

    @classmethod
    def execute(cls, session_name: str) -> io.NodeOutput:
        session = load_session(in_output(session_name))
        return io.NodeOutput(session, ui=ui.PreviewText(describe(session)))


def describe(session: Session) -> str:
    """A session in a line for people; nothing in a file is taken for granted."""
    facts, fps = session.facts, session.identity.get("fps")
    seconds = f", {(4 * session.frames - 3) / fps:.2f} s" if isinstance(fps, int) and fps > 0 else ""
    prompt = str(facts.get("prompt", ""))[:200]
    return f"{session.frames} latent frames{seconds}, seed {facts.get('seed')}" + (
        f"\n{prompt}" if prompt else ""
    )
