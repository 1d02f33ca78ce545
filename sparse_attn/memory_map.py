"""What a stream in mode "sparse" remembers, block by block, and a picture of it.

Every layer and head chooses for itself which blocks stay in persistent memory. The map says, for each block that any of
them still holds, who does; the picture lays that over the video's frames.

Of a page, a memory's tables tell the latent frame in which its block begins (`page_frame`) and the block's number in
its chunk (`page_block`). The sink and the window are held whole.

Shapes: L layers, B batch, H heads, G = B*H, S page slots, P persistent entries, N blocks of the map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, get_args

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .chunk_layout import chunk_layout
from .config import AttentionConfig, Mode, Positions, pixel_frames
from .memory import PagedKV
from .session import SessionError, check_memory
from .state import StreamState

PARTS = ("sink", "persistent", "window")
COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115))  # of the parts; told apart by colour-blind eyes, too
BACKGROUND, TEXT, PLAIN = (24, 24, 24), (230, 230, 230), 128
DARKEST = 0.2  # what is left of a frame's light where nobody keeps it
COLUMNS, MOST_TILES, TILE_WIDTH, LINE, GAP = 4, 32, 256, 18, 6


@dataclass(frozen=True)
class MemoryMap:
    """The blocks that a memory holds after `frames` latent frames, in the order of time.

    grid: tokens (height, width) of a frame. block_tokens: at most in a block. chunks [N, 2] int64: a block's chunk, as
    its first latent frame and its frames; numbers [N] int64: the block's number in it; `chunk_layout` says where that
    lies. spans [N, 2] int64: first and end latent frame of the stretch in which a block lies. part [N] int64, into
    PARTS: blocks of the sink count as window until they have left it. held [L, B, H, N] float32: 1 where a layer's head
    holds the block, else 0.
    """

    grid: tuple[int, int]
    block_tokens: int
    frames: int
    chunks: Tensor
    numbers: Tensor
    spans: Tensor
    part: Tensor
    held: Tensor

    def shares(self, layer: int = -1, head: int = -1) -> Tensor:
        """[N] float32: the share of the chosen layers and heads (-1: all) that holds each block. ValueError."""
        chosen = self.held
        for name, dim, index in (("layer", 0, layer), ("head", 2, head)):
            count = self.held.shape[dim]
            if not -1 <= index < count:
                raise ValueError(
                    f"There is no {name} {index}: this memory has {name}s 0 to {count - 1}; "
                    f"-1 takes all of them together."
                )
            chosen = chosen if index < 0 else chosen.narrow(dim, index, 1)
        return chosen.mean(dim=(0, 1, 2))


def read_memory_map(source: StreamState | dict[str, Tensor]) -> MemoryMap:
    """The map of a stream between two chunks, or of its snapshot (`session.memory_snapshot`).

    Raises SessionError, a ValueError, for a mode other than "sparse", for a memory that is still empty, and for a
    snapshot that is damaged.
    """
    state, tables = (source, None) if isinstance(source, StreamState) else (_shell(source), source)
    cache = state.cache
    if not isinstance(cache, PagedKV):
        raise _wrong_mode(state.attention.mode)
    tables = cache.tensors() if tables is None else tables
    window = [chunk.frames for chunk in cache.window]
    behind = state.frame - sum(window)  # first latent frame of the window
    slots = tables["table"][..., : cache.persistent].cpu()
    frames, numbers = (tables[name].cpu().gather(2, slots).long() for name in ("page_frame", "page_block"))
    if behind < 0 or not bool(((frames >= 0) & (frames < behind)).all()):
        raise _damaged()
    older = {chunk_of(frame, behind, state.chunk_frames) for frame in frames.unique().tolist()}
    starts = [behind + sum(window[:i]) for i in range(len(window))]
    layout = _Layout.of([*sorted(older), *zip(starts, window)], state)
    sink = frames[..., : cache.pinned].unique()
    begins = layout.spans[:, 0]
    part = torch.where(torch.isin(begins, sink), 0, 1)
    part[begins >= behind] = 2
    held = _held(frames, numbers, layout)
    held[..., part != 1] = 1.0
    return MemoryMap(
        state.grid,
        state.attention.block_tokens,
        state.frame,
        layout.chunks,
        layout.numbers,
        layout.spans,
        part,
        held.unflatten(1, (state.batch, state.heads)),
    )


class _Layout(NamedTuple):
    """The blocks of some chunks, one after the other: as in MemoryMap, and start_of: latent frame -> its chunk's."""

    chunks: Tensor
    numbers: Tensor
    spans: Tensor
    start_of: dict[int, int]  # latent frame in which a block begins -> where its chunk's blocks begin

    @classmethod
    def of(cls, chunks: list[tuple[int, int]], state: StreamState) -> _Layout:
        """chunks: (first latent frame, frames) of each, in the order of time."""
        if not chunks:
            raise SessionError("The memory is still empty: finish a chunk first.")
        rows, count = [], 0
        start_of: dict[int, int] = {}
        for start, frames in chunks:
            span = start + chunk_layout(frames, state.grid, state.attention.block_tokens).spans
            start_of |= dict.fromkeys(span[:, 0].tolist(), count)
            chunk = torch.tensor([start, frames]).expand_as(span)
            rows.append((chunk, torch.arange(len(span)), span))
            count += len(span)
        of_chunk, numbers, spans = (torch.cat(parts) for parts in zip(*rows))
        return cls(of_chunk, numbers, spans, start_of)


def chunk_of(frame: int, behind: int, chunk_frames: int) -> tuple[int, int]:
    """(first latent frame, frames) of the chunk that a frame before the window belongs to.

    All are whole but the video's first, which is shorter where it continues given frames (`rollout.prefill`).
    """
    first = behind % chunk_frames
    if frame < first:
        return 0, first
    return frame - (frame - first) % chunk_frames, chunk_frames


def _held(frames_LGP: Tensor, numbers_LGP: Tensor, layout: _Layout) -> Tensor:
    """held [L, G, N] from each page's block number; the sink's and the window's blocks are the caller's."""
    distinct, which = frames_LGP.unique(return_inverse=True)
    starts = torch.tensor([_known(frame, layout) for frame in distinct.tolist()], dtype=torch.int64)
    held = torch.zeros(*frames_LGP.shape[:2], len(layout.spans))
    if not starts.numel():
        return held
    index = starts[which] + numbers_LGP
    inside = (numbers_LGP >= 0) & (index < len(layout.spans))
    if not bool((inside & (layout.spans[index * inside, 0] == frames_LGP)).all()):
        raise _damaged()
    return held.scatter_(2, index, 1.0)


def _known(frame: int, layout: _Layout) -> int:
    if frame not in layout.start_of:
        raise _damaged()
    return layout.start_of[frame]


def _shell(saved: dict[str, Tensor]) -> StreamState:
    """The stream that a snapshot is of, checked, with its counters and without its tensors."""
    try:
        fact = {name[7:]: int(value) for name, value in saved.items() if name.startswith("config.")}
        mode = get_args(Mode)[fact["mode"]]
        if mode != "sparse":
            raise _wrong_mode(mode)
        attention = AttentionConfig(
            mode=mode,
            window_frames=fact["window_frames"],
            sink_frames=fact["sink_frames"],
            persistent_frames=fact["persistent_frames"],
            block_tokens=fact["block_tokens"],
            positions=get_args(Positions)[fact["positions"]],
            page_bits=8 if saved["k_pages"].dtype == torch.int8 else 16,
            router="quarters" if saved["pooled"].dim() == 5 else "mean",
        )
        grid = (fact["grid_height"], fact["grid_width"])
        if fact["chunk_frames"] * grid[0] * grid[1] > saved["table"].shape[-1] * attention.block_tokens:
            raise _damaged()  # before anything of that size is made
        state = StreamState(
            layers=fact["layers"],
            heads=fact["heads"],
            head_dim=fact["head_dim"],
            grid=grid,
            chunk_frames=fact["chunk_frames"],
            attention=attention,
            batch=fact["batch"],
            dtype=saved["k_pages"].dtype,  # of pages in 8 bits nothing is kept in another one
            device="meta",
            share_open=saved["k_pages"].shape[2] < saved["page_len"].shape[2],
        )
    except SessionError:
        raise
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise _damaged() from error
    check_memory(state, saved)
    state.cache.load_counters({name: saved[name].tolist() for name in state.cache.counters()})
    state.frame = int(saved["frame"])
    return state


def _wrong_mode(mode: str) -> SessionError:
    return SessionError(
        f"This memory is of mode {mode!r}, in which all layers and heads keep the same whole frames, so there is no "
        "choice to draw. Set the mode to sparse in Apply Sparse Forcing and make the video again."
    )


def _damaged() -> SessionError:
    return SessionError(
        "The memory is damaged: its tables do not fit its frames. Use an earlier session, or make it anew."
    )


# --- the picture ------------------------------------------------------------------------------------------------------


def draw_memory_map(
    memory: MemoryMap, frames: Tensor | np.ndarray | None = None, layer: int = -1, head: int = -1
) -> Image.Image:
    """The held past as a sheet: a tile for each stretch of frames that one layer of blocks covers, if any is held.

    The more of the chosen layers and heads (-1: all) hold a block, the brighter it is; of persistent memory the block
    that most of them hold is brightest, and the legend says how many these are. Of more than MOST_TILES stretches those
    that are held most are drawn. frames: the video, from its first frame on, [F, H, W, 3] uint8 or floating point in
    [0, 1]; without it, plain grey. Raises ValueError for a layer or head that does not exist or too few frames.
    """
    shares = memory.shares(layer, head)
    _check_frames(frames, memory.frames)
    stretches, which = memory.spans.unique(dim=0, return_inverse=True)
    amount = torch.zeros(len(stretches)).index_add_(0, which, shares)
    some = int((amount > 0).sum())
    drawn = amount.argsort(descending=True, stable=True)[: min(some, MOST_TILES)].sort().values.tolist()
    persistent = shares[memory.part == 1]
    peak = float(persistent.max()) if persistent.numel() else 0.0
    height = max(8, round(TILE_WIDTH * memory.grid[0] / memory.grid[1]))
    tiles = [
        _tile(memory, which == i, shares, peak, _picture(frames, stretches[i].tolist(), height))
        for i in drawn
    ]
    lines = _legend(memory, peak, len(drawn), some)
    return _sheet(_title(memory, layer, head), tiles, lines)


def _check_frames(frames: Tensor | np.ndarray | None, latent_frames: int) -> None:
    if frames is None:
        return
    needed = pixel_frames(latent_frames)
    if frames.ndim != 4 or frames.shape[3] != 3 or len(frames) < needed:
        raise ValueError(
            f"Images of shape {list(frames.shape)} are not this memory's video of {needed} frames: "
            f"give all of them, [{needed}, height, width, 3], from the first on, or none."
        )


def _picture(frames: Tensor | np.ndarray | None, stretch: list[int], height: int) -> Image.Image:
    """The video frame in the middle of latent frames `stretch` (first, end), as large as a tile."""
    size = (TILE_WIDTH, height)
    if frames is None:
        return Image.new("RGB", size, (PLAIN,) * 3)
    middle = (stretch[0] + stretch[1] - 1) // 2
    frame = torch.as_tensor(
        frames[max(0, 4 * middle - 2)]
    )  # latent frame m > 0 stands for frames 4m - 3 to 4m
    if frame.is_floating_point():
        frame = (frame.clamp(0, 1) * 255).round().byte()
    return Image.fromarray(frame.cpu().numpy()).resize(size, Image.Resampling.LANCZOS)


class _Tile(NamedTuple):
    image: Image.Image
    text: str
    colour: tuple[int, int, int]


def _tile(memory: MemoryMap, chosen: Tensor, shares: Tensor, peak: float, picture: Image.Image) -> _Tile:
    """One stretch: its blocks as light on its frame, their borders, and its latent and video frames."""
    part = int(memory.part[chosen][0])  # a stretch lies in one chunk, a chunk in one part
    (start, frames), (first, end) = (x[chosen][0].tolist() for x in (memory.chunks, memory.spans))
    blocks = chunk_layout(frames, memory.grid, memory.block_tokens).blocks[first - start : end - start]
    of_block = torch.zeros(int(blocks.max()) + 1)
    of_block[memory.numbers[chosen]] = shares[chosen] / peak if part == 1 and peak else shares[chosen]
    light, number = of_block[blocks].mean(0).numpy(), blocks[0].numpy()
    rows, columns = (
        np.arange(pixels) * tokens // pixels for pixels, tokens in zip(picture.size[::-1], memory.grid)
    )
    light_HW, number_HW = light[rows][:, columns], number[rows][:, columns]
    frame = np.asarray(picture, np.float32)
    bright = 0.65 * frame + 0.35 * np.asarray(COLOURS[part], np.float32)
    seen = DARKEST * frame + light_HW[..., None] * (bright - DARKEST * frame)
    border = np.zeros(number_HW.shape, bool)
    border[:, 1:] |= number_HW[:, 1:] != number_HW[:, :-1]
    border[1:] |= number_HW[1:] != number_HW[:-1]
    seen[border] *= 0.75
    video = (max(0, 4 * first - 3), 4 * (end - 1))
    text = f"latent {_span(first, end - 1)}, video {_span(*video)}"
    return _Tile(Image.fromarray(seen.round().clip(0, 255).astype(np.uint8)), text, COLOURS[part])


def _span(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first}-{last}"


def _title(memory: MemoryMap, layer: int, head: int) -> str:
    layers, _, heads, _ = memory.held.shape
    who = [
        f"all {count} {name}s" if index < 0 else f"{name} {index} of {count}"
        for name, index, count in (("layer", layer, layers), ("head", head, heads))
    ]
    return f"Memory after {memory.frames} latent frames: {', '.join(who)}"


def _legend(memory: MemoryMap, peak: float, drawn: int, total: int) -> list[tuple[str, int | None]]:
    """Lines under the tiles: (text, part or None)."""
    lines: list[tuple[str, int | None]] = [("sink: the first frames, kept by all", 0)]
    lines.append((f"persistent: dark, kept by none; bright, by {peak:.0%} of those chosen", 1))
    lines.append(("window: the newest frames, held by all", 2))
    if drawn < total:
        lines.append((f"{drawn} of {total} stretches are drawn, those that are held most.", None))
    return [(text, part) for text, part in lines if part is None or bool((memory.part == part).any())]


def _sheet(title: str, tiles: list[_Tile], legend: list[tuple[str, int | None]]) -> Image.Image:
    columns = max(2, min(COLUMNS, len(tiles)))  # room for the legend
    width, height = TILE_WIDTH + GAP, tiles[0].image.height + LINE + GAP
    rows = -(-len(tiles) // columns)
    bottom = LINE + GAP + rows * height
    sheet = Image.new("RGB", (columns * width + GAP, bottom + len(legend) * LINE + GAP), BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    draw.text((GAP, 4), title, TEXT, font)
    for i, tile in enumerate(tiles):
        x, y = GAP + i % columns * width, LINE + GAP + i // columns * height
        sheet.paste(tile.image, (x, y))
        draw.text((x, y + tile.image.height + 2), tile.text, tile.colour, font)
    for i, (text, part) in enumerate(legend):
        y = bottom + i * LINE
        if part is not None:
            _swatch(sheet, (GAP, y + 2), part)
        draw.text((GAP if part is None else GAP + 70, y + 2), text, TEXT, font)
    return sheet


def _swatch(sheet: Image.Image, at: tuple[int, int], part: int) -> None:
    """A bar of a part's colour; of persistent memory, from dark to bright."""
    light = np.linspace(DARKEST if part == 1 else 1.0, 1.0, 60)[None, :, None]
    bar = np.broadcast_to(light * np.asarray(COLOURS[part]), (LINE - 6, 60, 3))
    sheet.paste(Image.fromarray(bar.astype(np.uint8)), at)
