"""One stream's whole memory: explicit, small, resumable.

A stream is generated chunk by chunk. `begin_chunk` makes room, every pass of the model calls `attend` once a layer, and
`end_chunk`, after the clean pass, keeps what that pass wrote. A chunk that is begun and never ended leaves nothing
behind: the next `begin_chunk` takes its place. So finished chunks survive an interruption at any moment; with
`share_open`, at any moment but within a clean pass, after which the memory says that it is torn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import pbsa_attention
from .config import AttentionConfig, Mode, Positions
from .frame_cache import FrameCache
from .memory import PagedKV
from .router import choose_blocks

DenseAttention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention of q [B, N, H, D] over k and v [B, M, H, D] -> [B, N, H, D], by PyTorch."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class _OpenPart(torch.autograd.Function):
    """What the memory holds, unchanged; the gradient of its open part flows to the tensor that was written there."""

    @staticmethod
    def forward(ctx, stored: Tensor, fresh: Tensor, open_part: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.open_part, ctx.dtype = open_part, fresh.dtype
        return stored.data  # its own version counter: later layers and passes write to the same pool

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[None, Tensor, None]:
        return None, ctx.open_part(grads[0]).to(ctx.dtype), None


def _differentiable(stored: Tensor, fresh: Tensor, open_part: Callable[[Tensor], Tensor]) -> Tensor:
    if not (torch.is_grad_enabled() and fresh.requires_grad):
        return stored
    return _OpenPart.apply(stored, fresh, open_part)


class StreamState:
    """The memory of one stream in all layers, as `attention` says.

    grid: tokens (height, width) of a latent frame. total_frames (latent): needed by mode "dense", which allocates for
    it. dense_attention: called as (q, k, v) -> out with q [B, N, H, D] and k, v [B, M, H, D] in modes "dense" and
    "window"; default: PyTorch's. On device "meta" nothing is allocated, and `nbytes` still tells what would be.
    share_open: mode "sparse" stores the open chunk once, not once a layer. For generating: no gradients, `noisy` set
    before every pass but a chunk's last, and `end_chunk` right after that one.
    Raises ValueError for settings that do not fit together.
    """

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        head_dim: int,
        grid: tuple[int, int],
        chunk_frames: int,
        attention: AttentionConfig,
        batch: int = 1,
        total_frames: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        dense_attention: DenseAttention | None = None,
        share_open: bool = False,
    ):
        attention.validate(chunk_frames)
        self.layers, self.heads, self.head_dim, self.grid, self.batch = layers, heads, head_dim, grid, batch
        self.chunk_frames, self.attention, self.dtype = chunk_frames, attention, dtype
        self.dense_attention = dense_attention or sdpa
        # normal tensors even where a host is in inference mode, so that any thread may restore a session into them
        with torch.inference_mode(False):
            self.cache = (
                self._paged(device, share_open)
                if attention.mode == "sparse"
                else self._frames(total_frames, device)
            )
        self.reset()

    def _paged(self, device: torch.device | str, share_open: bool) -> FrameCache | PagedKV:
        return PagedKV(
            layers=self.layers,
            groups=self.batch * self.heads,
            head_dim=self.head_dim,
            grid=self.grid,
            chunk_frames=self.chunk_frames,
            attention=self.attention,
            dtype=self.dtype,
            device=device,
            share_open=share_open,
        )

    def _frames(self, total_frames: int | None, device: torch.device | str) -> FrameCache | PagedKV:
        bounded = self.attention.mode == "window"
        capacity = self.attention.window_frames if bounded else total_frames
        if capacity is None:
            raise ValueError(
                "mode 'dense' keeps every frame: give total_frames, or use mode 'window' or 'sparse'."
            )
        return FrameCache(
            layers=self.layers,
            batch=self.batch,
            heads=self.heads,
            head_dim=self.head_dim,
            frame_tokens=self.grid[0] * self.grid[1],
            capacity=capacity,
            sink=self.attention.sink_frames if bounded else 0,
            bounded=bounded,
            rebased=self.attention.positions == "rebased",
            sink_ema=self.attention.sink_ema if bounded else 0.0,
            dtype=self.dtype,
            device=device,
        )

    def reset(self) -> None:
        """Forget the stream; the next chunk is its first. Nothing is allocated or freed."""
        self.cache.reset()
        self.frame = 0
        self.t_start = 0
        self._close()

    def begin_chunk(self, frames: int) -> None:
        """Open the next chunk, of 1 to chunk_frames latent frames, in place of one that was not ended.

        Sets `t_start`, the temporal RoPE index of its first frame. Raises ValueError when mode "dense" is full,
        RuntimeError when the memory is torn.
        """
        self._check_whole()
        if not 1 <= frames <= self.chunk_frames:
            raise ValueError(
                f"a chunk of {frames} frames: use 1 to {self.chunk_frames}, this stream's chunk_frames."
            )
        self._close()
        self.t_start = self.cache.begin_chunk(self.frame, frames)
        self.open_frames = frames

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Self-attention of the open chunk in one layer; also stores the chunk's keys and values.

        Rotated q and k, and v, all [B, N, H, D] -> [B, N, H, D] in q's dtype. To autograd the finished chunks are
        constants; gradients reach q and the open chunk's k and v. Go backward before the next pass writes its pages.
        """
        expected = (self.batch, self.open_frames * self.grid[0] * self.grid[1], self.heads, self.head_dim)
        if not self.open_frames or tuple(q.shape) != expected:
            raise ValueError(f"attend got q of shape {list(q.shape)}, the open chunk needs {list(expected)}.")
        self.check_pass([layer])
        q_stored = q.to(self.dtype)
        if isinstance(self.cache, PagedKV):
            out = self._attend_sparse(self.cache, layer, q_stored, k, v)
        else:
            out = self._attend_dense(self.cache, layer, q_stored, k, v)
        self.wrote([layer])
        return out.to(q.dtype)

    def end_chunk(self) -> None:
        """Keep the open chunk as the latest pass wrote it: call after the clean pass. Updates every layer's memory."""
        if len(self._attended) != self.layers:
            raise ValueError(
                f"end_chunk after {len(self._attended)} of {self.layers} layers attended: run the clean pass through "
                "the whole model first, between begin_chunk and end_chunk."
            )
        self.cache.end_chunk(self.frame)
        self.frame += self.open_frames
        self._close()

    def check_pass(self, layers: Iterable[int] | None = None) -> None:
        """Raise ValueError if a pass may not write these layers, or all: its chunk's last pass has."""
        finished = self._finished
        if finished & set(range(self.layers) if layers is None else layers):
            raise ValueError(
                f"the last pass over frames {self.frame} to {self.frame + self.open_frames - 1} has written layer "
                f"{min(finished)}: set `noisy` before every pass that another one follows, and call end_chunk "
                "after the last."
            )

    def wrote(self, layers: Iterable[int]) -> None:
        """Say that a pass wrote the open chunk's keys and values in these layers without `attend`."""
        (self._attended.update if self.stores else self._attended.difference_update)(layers)
        if self.stores and isinstance(self.cache, PagedKV) and self.cache.shared:
            self.cache.finished.update(layers)  # by a graph

    @property
    def stores(self) -> bool:
        """Whether a pass stores what it writes: not one whose pages another pass is about to write again, where they
        rest apart from where they are read."""
        return not (self.noisy and isinstance(self.cache, PagedKV) and self.cache.apart)

    def recent_frames(self, keep_sink: bool = True) -> int:
        """Latent frames of the recent window, which a change of the prompt reads again.

        Mode "sparse": the window's finished chunks; mode "dense": the last 12; mode "window": those behind the sink,
        or all of them: without keep_sink, and while nothing has left between the sink and them.
        """
        return self.cache.recent_frames(keep_sink)

    def rewind(self, frames: int) -> None:
        """Take the newest `frames` latent frames out of the memory, to be written again; older ones stay untouched.

        At most `recent_frames`; in mode "sparse" whole chunks.
        """
        self._check_whole()
        self._close()
        if isinstance(self.cache, PagedKV):
            self.cache.rewind(frames, self.frame)
        else:
            self.cache.rewind(frames)
        self.frame -= frames

    def begin_recache(self, keep_sink: bool) -> int:
        """Open the `recent_frames` once more, all as one chunk; returns how many, modes "dense" and "window" only.

        One pass over them follows, at sigma 0, then `end_chunk`: as LongLive reads its window again when the prompt
        changes. In that pass every frame sees all others, later ones too. Without keep_sink what is older is forgotten.
        A pass that does not come to its end leaves a memory without these frames.
        """
        assert isinstance(self.cache, FrameCache), "mode 'sparse' reads its window again chunk by chunk"
        self._close()
        frames, self.t_start = self.cache.begin_recache(self.frame, keep_sink)
        self.frame -= frames
        self.open_frames = frames
        return frames

    def _check_whole(self) -> None:
        """Raise RuntimeError if a clean pass was cut after it had begun to change what finished chunks left."""
        if self._finished:
            raise RuntimeError(
                f"The clean pass of the frames from {self.frame} on was cut short, and had begun to change the memory "
                "of those before: restore a snapshot, or reset the memory and write its frames again "
                "(rollout.prefill)."
            )

    @property
    def _finished(self) -> set[int]:
        """Layers in which the last pass of the open chunk has already changed what finished chunks left."""
        return self.cache.finished if isinstance(self.cache, PagedKV) else set()

    def _close(self) -> None:
        self.open_frames = 0  # latent frames of the open chunk, 0 between chunks
        # whoever makes the passes may say so before one that another one follows in this chunk; with share_open must
        self.noisy = False
        self._attended: set[int] = set()

    def _attend_dense(self, cache: FrameCache, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.write(layer, k.detach(), v.detach())
        seen = zip(cache.read(layer), (k, v))
        return self.dense_attention(q, *(_differentiable(x, fresh, cache.open_part) for x, fresh in seen))

    def _attend_sparse(self, cache: PagedKV, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_blocks, k_blocks, v_blocks = (cache.chunk.pack(x) for x in (q, k, v))
        if cache.apart and torch.is_grad_enabled() and k.requires_grad:
            raise ValueError(
                "page_bits 8, offload_pages and share_open are for generating: train with page_bits 16, without "
                "the others."
            )
        pages = cache.write(layer, k_blocks.detach(), v_blocks.detach())
        lists, cache.shares[layer] = choose_blocks(
            cache.pool(q_blocks.detach(), cache.chunk_lens),
            cache.pooled[layer],
            cache.persistent_slots[layer],
            cache.window_slots[layer],
            self.attention.topk_after(self.frame),
            self.attention.backend,
            cache.routed_parts(layer, cache.current[layer]),
        )
        k_pages, v_pages = (
            _differentiable(stored, fresh, partial(cache.open_part, layer))
            for stored, fresh in zip(pages.read, (k_blocks, v_blocks))
        )
        out, _ = pbsa_attention(
            q_blocks,
            k_pages,
            v_pages,
            cache.page_len[layer],
            lists,
            padding="finite",  # pages start as zeros, and blocks are packed with zeros
            least_tokens=cache.least_tokens,
            grad_pages=cache.current[layer].to(torch.int32) if k_pages.requires_grad else None,
            gap=pages.gap,
            backend=self.attention.backend,
        )
        if self.stores:
            cache.finish(layer, cache.current[layer], cache.shares[layer])
        return cache.chunk.unpack(out, self.batch)

    @property
    def nbytes(self) -> int:
        """Bytes of the memory on its device, the same from the first chunk to the last."""
        tensors = [*self.cache.tensors().values(), *self.cache.scratch]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors) - self.host_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes of the memory that rest with the host, with `offload_pages`."""
        return self.cache.host.nbytes if self.cache.host else 0

    def describe(self) -> dict[str, int | str]:
        """What is remembered now, in numbers for people: no tensor is read, so nothing waits for the device."""
        facts: dict[str, int | str] = {"mode": self.attention.mode, "frame": self.frame, "bytes": self.nbytes}
        if isinstance(self.cache, FrameCache):
            return facts | {"frames_kept": len(self.cache.frames), "frames_at_most": self.cache.capacity}
        return facts | {
            "window_frames_kept": sum(chunk.frames for chunk in self.cache.window),
            "persistent_blocks": self.cache.persistent,
            "persistent_blocks_at_most": self.cache.capacity,
            "sink_blocks": min(self.cache.pinned, self.cache.persistent),
        }

    def kept_frames(self) -> Tensor:
        """From which latent frames of the video the memory's long-lived part stems.

        Mode "sparse": [layers, batch, heads, blocks] int32, the frame in which each persistent block begins, in the
        order of time; every head keeps its own. Other modes: [frames] int32, the same for every head.
        """
        if isinstance(self.cache, FrameCache):
            return torch.tensor(self.cache.frames, dtype=torch.int32)
        return self.cache.kept_frames().unflatten(1, (self.batch, self.heads))

    def snapshot(self) -> dict[str, Tensor]:
        """Everything that finished chunks left, as CPU tensors by name, fit for safetensors; not an open chunk."""
        self._check_whole()
        if self.cache.host:
            self.cache.host.wait()
        copies = {name: _on_cpu(tensor) for name, tensor in self.cache.tensors().items()}
        counters = self.cache.counters() | {"frame": [self.frame]}
        facts = {f"config.{name}": [value] for name, value in self._identity().items()}
        return copies | {
            name: torch.tensor(values, dtype=torch.int64) for name, values in (counters | facts).items()
        }

    def restore(self, snapshot: dict[str, Tensor]) -> None:
        """Continue where `snapshot` was taken, bit for bit. Raises ValueError, and changes nothing, if it does not fit.

        `topk`, `dense_first_chunk`, `sink_ema`, `keep`, `offload_pages`, `backend` and `dense_attention` may differ
        from the saved stream's.
        """
        self.check_fit(snapshot)
        if self.cache.host:
            self.cache.host.wait()
        for name, tensor in self.cache.tensors().items():
            for here, saved in zip(tensor, snapshot[name]):
                here.copy_(saved)
        self.cache.load_counters({name: snapshot[name].tolist() for name in self.cache.counters()})
        self.frame = int(snapshot["frame"])
        self._close()

    def _identity(self) -> dict[str, int]:
        """What two streams must share for one to continue the other; names of choices by their place in the list."""
        attention = self.attention
        frames = {"dense": (), "window": ("window_frames", "sink_frames")}.get(
            attention.mode, ("window_frames", "sink_frames", "persistent_frames", "block_tokens")
        )
        return {
            "mode": get_args(Mode).index(attention.mode),
            "positions": get_args(Positions).index(attention.positions),
            "layers": self.layers,
            "heads": self.heads,
            "head_dim": self.head_dim,
            "grid_height": self.grid[0],
            "grid_width": self.grid[1],
            "batch": self.batch,
            "chunk_frames": self.chunk_frames,
            **{name: getattr(attention, name) for name in frames},
        }

    def check_fit(self, snapshot: dict[str, Tensor]) -> None:
        """Raise ValueError unless `snapshot` is complete and of a stream like this one."""
        identity, tensors = self._identity(), self.cache.tensors()
        wanted = {*tensors, *self.cache.counters(), "frame", *(f"config.{name}" for name in identity)}
        for name, value in identity.items():
            saved = snapshot.get(f"config.{name}")
            if saved is not None and int(saved) != value:
                have, want = (_spell(name, number) for number in (int(saved), value))
                raise ValueError(
                    f"the snapshot has {name} {have}, this stream {want}: restore it into a stream of equal settings."
                )
        if missing := sorted(wanted - snapshot.keys()):
            raise ValueError(
                f"the snapshot lacks {', '.join(missing)}: it is incomplete, or not of a stream."
            )
        for name, tensor in tensors.items():
            saved = snapshot[name]
            if saved.shape != tensor.shape or saved.dtype != tensor.dtype:
                raise ValueError(
                    f"the snapshot's {name} is {saved.dtype} {list(saved.shape)}, this stream's {tensor.dtype} "
                    f"{list(tensor.shape)}: restore it into a stream of equal settings and dtype."
                )


def _on_cpu(tensor: Tensor) -> Tensor:
    """A copy, contiguous, made a layer at a time: of what is not contiguous PyTorch makes one on the device first."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    for there, here in zip(copy, tensor.detach()):
        there.copy_(here)
    return copy


def _spell(name: str, value: int) -> str:
    """A value of `StreamState._identity` as its user wrote it."""
    choices = {"mode": get_args(Mode), "positions": get_args(Positions)}
    return choices[name][value] if name in choices else str(value)
