"""Prompts that change with time: how they are written, when each holds, and what a change does to the memory.

Written, one after the other: `0s: a red circle / 3s: a blue star`, or a line each. Minutes are `1m30s`.

When the prompt changes, keys and values in the memory still belong to frames seen under the old one. Three policies:
- `keep`: leave the memory alone. The smoothest change, and the slowest: the old prompt lingers.
- `re-cache`: run the frames of the recent window once more at sigma 0, under the new prompt; what was promoted to
  long-lived memory (the sink, persistent blocks) stays. LongLive's switch with its global sink.
- `flush`: the same, and everything older than the window is forgotten. LongLive's switch without one.

Modes `dense` and `window` run those frames in one pass, in which every frame sees all others, as LongLive does. Mode
`sparse` runs them chunk by chunk: its blocks, its router and the importance that promotes blocks belong to one chunk.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .config import pixel_frames
from .rollout import Denoise, Memory, prefill
from .state import StreamState

Policy = Literal["keep", "re-cache", "flush"]

_CODE = re.compile(r"\s*(?:(?P<minutes>\d+)m)?(?P<seconds>\d+(?:\.\d+)?)s\s*:")
_LIKE_A_TIME = r"\s*(?P<time>\d[\d.,]*m?[\d.,]*\s*(?:ms|s|secs?|seconds?|m|mins?|minutes?|h)?)\s*:"
_NEARLY = re.compile(_LIKE_A_TIME, re.IGNORECASE)
_BORDER = re.compile(rf"\n|/(?={_LIKE_A_TIME})", re.IGNORECASE)


class TimelineError(ValueError):
    """A time line that cannot be read; `line` and `column` (from 1) say where."""

    def __init__(self, line: int, column: int, problem: str):
        super().__init__(f"Prompt time line, line {line}, column {column}: {problem}")
        self.line, self.column = line, column


@dataclass(frozen=True)
class TimedPrompt:
    """A prompt and the second from which it holds."""

    start: float
    text: str


def parse_timeline(text: str) -> list[TimedPrompt]:
    """Read `0s: ... / 3s: ...` into prompts in the order of time, the first at 0.

    A new entry begins on a line, or behind a slash, that starts with a time. A line without a time goes on with the
    prompt above it, and text without any time is one prompt. Raises TimelineError.
    """
    prompts: list[TimedPrompt] = []
    places: list[tuple[int, int]] = []
    for begin, entry in _pieces(text):
        line, column = _place(text, begin + len(entry) - len(entry.lstrip()))
        code = _CODE.match(entry)
        if code is not None:
            start = 60 * int(code["minutes"] or 0) + float(code["seconds"])
            _check_order(prompts, start, line, column)
            prompts.append(TimedPrompt(start, entry[code.end() :]))
            places.append((line, column))
        elif (nearly := _NEARLY.match(entry)) is not None:
            raise TimelineError(
                line,
                column,
                f"{nearly['time']!r} is not a time: write seconds as 3s or 2.5s, minutes as 1m30s.",
            )
        elif prompts:
            prompts[-1] = TimedPrompt(prompts[-1].start, f"{prompts[-1].text} {entry}")
        else:
            prompts.append(TimedPrompt(0.0, entry))
            places.append((line, column))
    if not prompts:
        raise TimelineError(1, 1, "it is empty: write at least one prompt, for example 0s: a red circle.")
    for prompt, (line, column) in zip(prompts, places):
        if not prompt.text.strip():
            raise TimelineError(line, column, f"the prompt at {prompt.start:g}s is empty.")
    return [TimedPrompt(prompt.start, " ".join(prompt.text.split())) for prompt in prompts]


def prompt_at(prompts: Sequence[TimedPrompt], seconds: float) -> int:
    """Which of the prompts holds at a time; those of the same second as a chunk's start count for that chunk."""
    return max((i for i, prompt in enumerate(prompts) if prompt.start <= seconds + 1e-6), default=0)


def seconds_at(latent_frame: int, fps: float) -> float:
    """When a latent frame starts in the video: the first is one video frame, each later one four."""
    return pixel_frames(latent_frame) / fps if latent_frame else 0.0


def change_prompt(
    denoise: Denoise,
    run: Memory,
    states: Sequence[StreamState],
    recent: Callable[[int, int], Tensor],
    policy: Policy,
    chunk_frames: int,
) -> int:
    """Bring the memory in step with a prompt that has just changed; returns how many latent frames ran again.

    Call between chunks, with a `denoise` that already uses the new prompt. `states` are the memory behind `run`, all
    at its frame. recent(start, stop) gives finished latent frames [B, C, n, H, W] in the model's scale.
    """
    if policy == "keep" or not states:
        return 0
    if states[0].attention.mode == "sparse":
        return _chunk_by_chunk(denoise, run, states, recent, policy, chunk_frames)
    return _in_one_pass(denoise, run, states, recent, keep_sink=policy == "re-cache")


def _in_one_pass(
    denoise: Denoise,
    run: Memory,
    states: Sequence[StreamState],
    recent: Callable[[int, int], Tensor],
    keep_sink: bool,
) -> int:
    end, frames = run.frame, states[0].recent_frames(keep_sink)
    if not frames:
        return 0
    for state in states:
        state.begin_recache(keep_sink)
    run.frame = end - frames  # until the pass is through
    denoise(recent(end - frames, end).float(), 0.0)
    for state in states:
        state.end_chunk()
    run.frame = end
    return frames


def _chunk_by_chunk(
    denoise: Denoise,
    run: Memory,
    states: Sequence[StreamState],
    recent: Callable[[int, int], Tensor],
    policy: Policy,
    chunk_frames: int,
) -> int:
    end = run.frame
    frames = states[0].recent_frames()
    if policy == "flush":
        frames = max(frames, min(chunk_frames, end))  # a video goes on from something
    for state in states:
        if policy == "flush":
            state.reset()
            state.frame = end - frames
        else:
            state.rewind(frames)
    run.frame = end - frames
    prefill(denoise, run, recent(end - frames, end), chunk_frames)
    return frames


def _pieces(text: str) -> list[tuple[int, str]]:
    """(where it begins, text) of every entry or line that is not blank."""
    pieces, begin = [], 0
    for cut in [*_BORDER.finditer(text), None]:
        end = len(text) if cut is None else cut.start()
        if text[begin:end].strip():
            pieces.append((begin, text[begin:end]))
        begin = end if cut is None else cut.end()
    return pieces


def _place(text: str, index: int) -> tuple[int, int]:
    """Line and column, from 1."""
    return text.count("\n", 0, index) + 1, index - text.rfind("\n", 0, index)


def _check_order(prompts: list[TimedPrompt], start: float, line: int, column: int) -> None:
    if not prompts and start != 0:
        raise TimelineError(line, column, f"the first prompt starts at {start:g}s: begin with 0s.")
    if prompts and start <= prompts[-1].start:
        raise TimelineError(
            line,
            column,
            f"{start:g}s follows {prompts[-1].start:g}s: put the prompts in the order of time.",
        )
