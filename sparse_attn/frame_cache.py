"""Memory of the dense and the window mode: one slot for each latent frame, read in full.

`dense` keeps every frame up to a fixed number. `window` follows Self-Forcing's cache exactly: when a chunk does not
fit, the oldest frames behind the sink leave; the chunk itself counts. Attention does not care in which order keys lie,
so frames stay where they are written and freed slots are used again: nothing is moved, and in the steady state the keys
of a layer are one contiguous view of the pool. Which frame lies where is the same for every layer and head, known to
the host, and decided before the first layer runs.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from .positions import shift_time

RECENT_FRAMES = 12  # the recent part of an unbounded cache: as many as LongLive reads again


class FrameCache:
    """Keys and values of `capacity` latent frames for every layer: k, v [L, B, capacity, tokens a frame, H, D].

    `sink` frames at the front are never dropped; a `bounded` cache drops the oldest others, an unbounded one raises
    when it is full. With `rebased`, a frame's time is its place in the cache instead of its index in the video. With
    `sink_ema`, the first sink frame moves by that share towards the first frame that a chunk pushes out, the second
    towards the second, and so on, each at the sink frame's own time (Reward Forcing's moving sink).
    """

    scratch: tuple[Tensor, ...] = ()  # it needs no tensor but those that it keeps
    host: None = None  # and keeps none with the host

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        heads: int,
        head_dim: int,
        frame_tokens: int,
        capacity: int,
        sink: int = 0,
        bounded: bool = False,
        rebased: bool = False,
        sink_ema: float = 0.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        shape = (layers, batch, capacity, frame_tokens, heads, head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.capacity, self.sink, self.bounded, self.rebased = capacity, sink, bounded, rebased
        self.sink_ema = sink_ema
        self.reset()

    def reset(self) -> None:
        self.frames: list[int] = []  # indices of the latent frames kept, oldest first
        self.slots: list[int] = []  # where each of them lies
        self.current: list[int] = []  # slots of the open chunk
        self._gather: Tensor | None = None

    @property
    def scattered(self) -> bool:
        """Whether `read` gathers frames by a table that the host made, instead of giving a view of the pool."""
        return self._gather is not None

    def begin_chunk(self, frame: int, frames: int) -> int:
        """Make room for the chunk that starts at latent frame `frame`; returns its temporal index."""
        excess = len(self.slots) + frames - self.capacity
        if excess > 0:
            self._drop(excess, frame, frames)
        free = sorted(set(range(self.capacity)) - set(self.slots))
        self.current = free[:frames]
        resident = sorted(self.slots + self.current)
        contiguous = resident == list(range(len(resident)))
        self._gather = None if contiguous else torch.tensor(resident, device=self.k.device)
        at = [resident.index(slot) for slot in self.current]
        # one slice where it can be: a list would be uploaded, which a CUDA graph cannot record
        self._open_at = slice(at[0], at[-1] + 1) if at == list(range(at[0], at[-1] + 1)) else at
        return len(self.slots) if self.rebased else frame

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store the open chunk's rotated keys and its values [B, N, H, D]."""
        for pool, x in ((self.k, k), (self.v, v)):
            x = x.unflatten(1, (len(self.current), -1))
            for first, slot, count in _runs(self.current):
                pool[layer, :, slot : slot + count] = x[:, first : first + count]

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, M, H, D] of everything kept and the open chunk, in no particular order of frames."""
        pools = self.k[layer], self.v[layer]
        if self._gather is None:
            count = len(self.slots) + len(self.current)
            k, v = (pool[:, :count] for pool in pools)
        else:
            k, v = (pool.index_select(1, self._gather) for pool in pools)
        return k.flatten(1, 2), v.flatten(1, 2)

    def open_part(self, seen: Tensor) -> Tensor:
        """The open chunk's tokens [B, N, H, D] of what `read` gives [B, M, H, D], or of its gradient."""
        frames = seen.unflatten(1, (len(self.slots) + len(self.current), -1))
        return frames[:, self._open_at].flatten(1, 2)

    def end_chunk(self, frame: int) -> None:
        """Keep the open chunk, which starts at latent frame `frame`."""
        self.frames += range(frame, frame + len(self.current))
        self.slots += self.current
        self.current = []

    def recent_frames(self, keep_sink: bool = True) -> int:
        """How many of the newest frames are read again when the prompt changes.

        An unbounded cache: the last RECENT_FRAMES. A bounded one: the frames behind the sink; all of them without
        keep_sink, or while no frame has left between the sink and the others, as in LongLive.
        """
        kept = len(self.frames)
        if not self.bounded:
            return min(kept, RECENT_FRAMES)
        gap = kept > 0 and self.frames[-1] - self.frames[0] >= kept
        return kept - self.sink if keep_sink and gap else kept

    def rewind(self, frames: int) -> None:
        """Take out the newest `frames`, to be written again."""
        keep = len(self.frames) - frames
        assert keep >= 0, f"{frames} frames taken from {len(self.frames)}"
        del self.frames[keep:], self.slots[keep:]

    def begin_recache(self, frame: int, keep_sink: bool) -> tuple[int, int]:
        """Open `recent_frames` of what is kept once more, as one chunk that ends before latent frame `frame`.

        Without keep_sink all older frames are forgotten, so the first of those read again become the sink. Go on as
        with any chunk: write, read, end_chunk at its first frame. -> (how many frames, their temporal index).
        """
        frames = self.recent_frames(keep_sink)
        self.rewind(frames)
        if not keep_sink:
            self.rewind(len(self.frames))
        return frames, self.begin_chunk(frame - frames, frames)

    def tensors(self) -> dict[str, Tensor]:
        """The pool, by name: all that lives on the device between chunks."""
        return {"k": self.k, "v": self.v}

    def counters(self) -> dict[str, list[int]]:
        """All that lives on the host between chunks."""
        return {"frames": self.frames, "slots": self.slots}

    def load_counters(self, counters: dict[str, list[int]]) -> None:
        """The inverse of `counters`."""
        self.reset()
        self.frames, self.slots = list(counters["frames"]), list(counters["slots"])

    def _drop(self, excess: int, frame: int, frames: int) -> None:
        droppable = len(self.slots) - self.sink if self.bounded else 0
        if excess > droppable:
            raise ValueError(
                f"a chunk of {frames} frames at frame {frame} does not fit: the memory holds {len(self.slots)} of at "
                f"most {self.capacity} frames. Start with a larger total_frames, or use mode 'window' or 'sparse'."
            )
        if self.sink_ema:
            self._move_sink(excess)
        gone = slice(self.sink, self.sink + excess)
        del self.slots[gone], self.frames[gone]
        if self.rebased:
            self._turn_back(excess)

    def _move_sink(self, leaving: int) -> None:
        """Move the sink towards the `leaving` frames behind it, which are still there."""
        for kept in range(min(leaving, self.sink)):
            gone = self.sink + kept
            delta = -self.sink if self.rebased else self.frames[kept] - self.frames[gone]
            for k, v in zip(self.k, self.v):  # a layer at a time, as below
                keys, values = (pool[:, self.slots[gone]] for pool in (k, v))
                k[:, self.slots[kept]].lerp_(shift_time(keys, delta, keys.shape[-1]), self.sink_ema)
                v[:, self.slots[kept]].lerp_(values, self.sink_ema)

    def _turn_back(self, frames: int) -> None:
        """The frames behind the sink moved forward by `frames` places: turn their keys back by as many."""
        for _, slot, count in _runs(self.slots[self.sink :]):
            for layer_k in self.k:  # a layer at a time, so that the float32 copy in between stays small
                keys = layer_k[:, slot : slot + count]
                keys.copy_(shift_time(keys, -frames, keys.shape[-1]))


def _runs(slots: list[int]) -> list[tuple[int, int, int]]:
    """Consecutive slots together: (position in the list, first slot, how many)."""
    runs = []
    for _, group in groupby(enumerate(slots), key=lambda item: item[1] - item[0]):
        run = list(group)
        runs.append((run[0][0], run[0][1], len(run)))
    return runs
