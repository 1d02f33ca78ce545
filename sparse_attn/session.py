"""A stream on disk: everything that a run needs to go on tomorrow, bit for bit.

A session is one safetensors file: the memory's snapshots, the decoder's, the latent made so far, and a JSON text in the
file's metadata that says what it belongs to. One that is written again and again leaves its latent in a file beside it,
which only grows (session_files.py). Nothing in it is code. It is written beside its final name and moved there when it
is complete, so a write that dies leaves the earlier file as it was. It is read with distrust: whatever does not fit is
refused with a sentence, before any work.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor, nn

from .frame_cache import FrameCache
from .memory import PagedKV
from .session_files import (
    SUFFIX,
    LatentFile,
    claim,
    discard_abandoned_parts,
    discard_parts,
    latents_of,
    part_of,
    read_latent,
    sync_folder,
)
from .state import StreamState
from .vae import StreamDecoder

VERSION = 1
VERSION_APART = 2  # the latent lies in a file beside it
HEADER = "sparse_forcing_session"  # the metadata entry that holds the JSON text

# Names of safetensors' format for what a memory, a decoder or a latent may consist of.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}


class SessionError(ValueError):
    """A session that cannot be used; the text says why and what to do."""


@dataclass
class Session:
    """One stream between two chunks.

    identity: what a run must share to continue it, by name; facts: the rest that it wants to find again. Both JSON.
    frames: finished latent frames; latent [B, C, frames, h, w]. memory: `memory_snapshot` of each state, by a name that
    the next run can give it; decoder: the streaming decoder's tensors.
    """

    identity: dict[str, Any]
    frames: int
    latent: Tensor
    memory: dict[str, dict[str, Tensor]]
    decoder: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def require(self, identity: dict[str, Any]) -> None:
        """Raise SessionError, naming every difference, unless a run of that `identity` may continue this."""
        wanted = json.loads(json.dumps(identity))
        names = [name for name in {**wanted, **self.identity} if wanted.get(name) != self.identity.get(name)]
        if names:
            said = "; ".join(f"{n} {self.identity.get(n)} (here {wanted.get(n)})" for n in names)
            raise SessionError(
                f"The session was made with {said}. Set this run alike, or start without the session."
            )


def fingerprint(
    module: nn.Module, names: Sequence[str], originals: Mapping[str, Tensor] | None = None, salt: str = ""
) -> str:
    """Tell models apart by a hash of the shapes and signs of the parameters `names`.

    Signs survive what a host does to weights: moves and casts to any float dtype (a negative value that underflows
    becomes -0). originals: parameters as they were before they were patched in place. salt: hashed as well.
    """
    digest = hashlib.sha256(salt.encode())
    for name in names:
        weight = (originals or {}).get(name)
        weight = (module.get_parameter(name) if weight is None else weight).detach()
        digest.update(f"{name}{list(weight.shape)}".encode())
        digest.update(sign_bytes(weight))
    return digest.hexdigest()[:16]


def sign_bytes(values: Tensor) -> bytes:
    """Signs of a tensor of any float dtype, quantised or not; of packed integers, which have none, the bytes."""
    if type(values).dequantize is not Tensor.dequantize:  # a host's own 8 or 4 bits
        values = values.dequantize()
    values = values.to("cpu")
    if values.is_floating_point():
        values = torch.signbit(values.float())
    return values.contiguous().view(torch.uint8).numpy().tobytes()


# --- memory and decoder ---------------------------------------------------------------------------------------------


def memory_snapshot(state: StreamState) -> dict[str, Tensor]:
    """`StreamState.snapshot`, in mode "dense" without the room that is still empty."""
    saved = state.snapshot()
    if isinstance(state.cache, FrameCache) and not state.cache.bounded:
        used = max(state.cache.slots, default=-1) + 1
        saved |= {name: saved[name][:, :, :used].clone() for name in ("k", "v")}
    return saved


def restore_memory(state: StreamState, saved: dict[str, Tensor]) -> None:
    """Continue from a `memory_snapshot`; in mode "dense" the total length may have grown. Raises SessionError."""
    check_memory(state, saved)
    if isinstance(state.cache, FrameCache):
        padded = {name: torch.zeros_like(pool, device="cpu") for name, pool in state.cache.tensors().items()}
        for name, pool in padded.items():
            pool[:, :, : saved[name].shape[2]] = saved[name]
        saved = saved | padded
    state.restore(saved)


def check_memory(state: StreamState, saved: dict[str, Tensor]) -> None:
    """Raise SessionError unless `saved` fits `state` (which may be on the meta device) and is sound in itself.

    The numbers in it become indices on the device, where a wrong one would read beyond the memory.
    """
    cache = state.cache
    try:
        if isinstance(cache, FrameCache):
            state.check_fit(saved | {name: _grown(saved.get(name), cache) for name in ("k", "v")})
            sound = _sound_frames(cache, saved)
        else:
            state.check_fit(saved)
            sound = _sound_pages(state, cache, saved)
    except (ValueError, RuntimeError, IndexError) as error:
        raise SessionError(
            f"The session's memory does not fit this run: {error} Use the settings it was made with."
        ) from error
    if not sound:
        raise SessionError(
            "The session's memory is damaged: its tables point outside. Use an earlier session."
        )


def _grown(pool: Tensor | None, cache: FrameCache) -> Tensor:
    """Stands for `pool` in a check: an unbounded cache's may have fewer frames than there is room for."""
    if pool is None or pool.ndim != 6:
        raise ValueError("keys and values are missing or of another shape.")
    if not cache.bounded and pool.shape[2] > cache.capacity:
        raise ValueError(
            f"it holds {pool.shape[2]} latent frames, but this video has {cache.capacity}: make it longer."
        )
    shape = list(pool.shape)
    if not cache.bounded:
        shape[2] = cache.capacity
    return torch.empty(shape, dtype=pool.dtype, device="meta")


def _sound_frames(cache: FrameCache, saved: dict[str, Tensor]) -> bool:
    frames, slots = (saved[name].tolist() for name in ("frames", "slots"))
    room = saved["k"].shape[2]
    return (
        len(frames) == len(slots) == len(set(slots))
        and all(0 <= slot < room for slot in slots)
        and frames == sorted(set(frames))
        and (not frames or (frames[0] >= 0 and frames[-1] < int(saved["frame"])))
        and saved["k"].shape == saved["v"].shape
    )


def _sound_pages(state: StreamState, cache: PagedKV, saved: dict[str, Tensor]) -> bool:
    table, lengths, window = saved["table"], saved["page_len"], saved["window"].tolist()
    counts = {name: int(saved[name]) for name in ("persistent", "pinned", "time", "frame")}
    return (
        torch.equal(table.sort(dim=-1).values, torch.arange(table.shape[-1]).expand_as(table))
        and bool(((lengths >= 0) & (lengths <= state.attention.block_tokens)).all())
        and 0 <= counts["persistent"] <= cache.capacity
        and 0 <= counts["pinned"] <= cache.capacity
        and min(counts["time"], counts["frame"]) >= 0
        and len(window) < cache.window_chunks
        and all(1 <= frames <= state.chunk_frames for frames in window)
    )


def decoder_snapshot(decoder: StreamDecoder) -> dict[str, Tensor]:
    """What the streaming decoder remembers, by the names of the VAE's modules."""
    names = {module: name for name, module in decoder.vae.named_modules()}
    return {
        names[module]: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else torch.ones(1) > 0
        for module, value in decoder.cache.items()
    }


def restore_decoder(decoder: StreamDecoder, saved: dict[str, Tensor]) -> None:
    """The inverse, for a decoder on the same VAE. Raises SessionError for names that the VAE has not."""
    modules = dict(decoder.vae.named_modules())
    check_decoder(saved, set(modules))
    weight = next(decoder.vae.parameters())
    decoder.cache.clear()
    for name, value in saved.items():
        decoder.cache[modules[name]] = True if value.dtype == torch.bool else value.to(weight)


def check_decoder(saved: dict[str, Tensor], names: set[str]) -> None:
    """Raise SessionError unless every entry has one of `names` and is a mark (bool) or frames [B, C, F, H, W]."""
    for name, value in saved.items():
        if name not in names or (value.dtype != torch.bool and value.ndim != 5):
            raise SessionError(
                f"The session's decoder state {name!r}, {list(value.shape)}, is not this VAE's: "
                "use the VAE it was made with."
            )


# --- files ----------------------------------------------------------------------------------------------------------


def save_session(session: Session, path: str | Path, latents: LatentFile | None = None) -> None:
    """Write `session` to `path`; whatever happens, the file is then the old one or the new one, whole. OSError.

    latents: made for `path`, and given again with every later session of a run; it takes the latent's new frames.
    """
    path = Path(path)
    apart = latents if latents is not None and not latents.taken else None
    tensors = {"latent": session.latent if apart is None else session.latent[:, :, :0]}
    tensors |= {f"decoder/{name}": tensor for name, tensor in session.decoder.items()}
    for owner, snapshot in session.memory.items():
        tensors |= {f"memory/{owner}/{name}": tensor for name, tensor in snapshot.items()}
    said = {
        "version": VERSION if apart is None else VERSION_APART,
        "identity": session.identity,
        "facts": session.facts,
        "frames": session.frames,
        "memory": list(session.memory),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    discard_abandoned_parts(path.parent)
    try:
        with open(part_of(path), "wb") as file:
            claim(file)
            if apart is not None:
                said["latents"] = apart.append(session.latent)
            _write(file, tensors, {HEADER: json.dumps(said)})
            file.flush()
            os.fsync(file.fileno())
        if apart is not None:
            apart.publish()
        os.replace(part_of(path), path)
    except BaseException:
        discard_parts(path)
        raise
    sync_folder(path.parent)
    if apart is None:
        latents_of(path).unlink(missing_ok=True)  # belonged to the session that was here


def load_session(path: str | Path) -> Session:
    """Read and check a session. Raises SessionError for anything but a whole session of this version."""
    path = Path(path)
    if not path.is_file():
        raise SessionError(f"There is no session {path.name}: choose one that exists.")
    try:
        said, tensors = _whole(path)
        if said["version"] == VERSION_APART:
            tensors["latent"] = _latent_beside(path, said, tensors.get("latent"))
    except (safetensors.SafetensorError, OSError) as error:
        raise SessionError(
            f"{path.name} cannot be read as a session ({error}): it was cut short, or is another kind of file. "
            "Use an earlier session."
        ) from error
    return _assemble(path, said, tensors)


def _whole(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of one file, also while a run saves its next session under this name.

    safetensors opens a file twice, by its name: for the header, and for the data. Those may then be two files', so what
    was read counts only if the name has meant the same file all the time.
    """
    while True:
        before = _stamp(path)
        try:
            with safetensors.safe_open(str(path), "pt") as file:
                said = _said(path, (file.metadata() or {}).get(HEADER))
                # cloned: a tensor that is still a view of the file would keep it from being replaced on Windows
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, RuntimeError):
            if _stamp(path) == before:
                raise
        else:
            if _stamp(path) == before:
                return said, tensors


def _stamp(path: Path) -> tuple[int, int, int]:
    """Tells the file that has this name now from those that had it before. OSError."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


def _latent_beside(path: Path, said: dict[str, Any], like: Tensor | None) -> Tensor:
    """The latent of a session that leaves it to the file beside it; `like` [B, C, 0, h, w] is its own."""
    if like is None or like.ndim != 5 or like.shape[2] or like.dtype != torch.float32:
        raise _damaged(path, "its latent is not one without frames")
    try:
        return read_latent(latents_of(path), like, said["frames"], said["latents"])
    except ValueError as error:
        raise SessionError(f"{path.name} cannot be gone on with: {error}.") from error


def _said(path: Path, text: str | None) -> dict[str, Any]:
    """The JSON text of a session file, checked."""
    if text is None:
        raise SessionError(f"{path.name} is not a session: choose a file that ends in {SUFFIX}.")
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict) or not isinstance(said.get("version"), int):
        raise _damaged(path, "its description is not readable")
    if said["version"] not in (VERSION, VERSION_APART):
        remedy = "update the pack" if said["version"] > VERSION_APART else "make it anew"
        raise SessionError(
            f"{path.name} has session version {said['version']}, "
            f"this pack reads {VERSION} and {VERSION_APART}: {remedy}."
        )
    kinds = {"identity": dict, "facts": dict, "frames": int, "memory": list}
    kinds |= {"latents": str} if said["version"] == VERSION_APART else {}
    if wrong := [name for name, kind in kinds.items() if not isinstance(said.get(name), kind)]:
        raise _damaged(path, f"its description lacks {', '.join(wrong)}")
    if not all(isinstance(name, str) for name in said["memory"]):
        raise _damaged(path, "its memories have no names")
    return said


def _assemble(path: Path, said: dict[str, Any], tensors: dict[str, Tensor]) -> Session:
    memory: dict[str, dict[str, Tensor]] = {name: {} for name in said["memory"]}
    decoder: dict[str, Tensor] = {}
    latent = tensors.pop("latent", None)
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        owner, _, entry = rest.partition("/")
        if kind == "decoder":
            decoder[rest] = tensor
        elif kind == "memory" and owner in memory:
            memory[owner][entry] = tensor
        else:
            raise _damaged(path, f"{name!r} does not belong in it")
    frames = said["frames"]
    if latent is None or latent.ndim != 5 or latent.shape[2] != frames or frames < 1:
        raise _damaged(path, f"its latent is not one of {frames} frames")
    for name, snapshot in memory.items():
        if "frame" not in snapshot or snapshot["frame"].tolist() != [frames]:
            raise _damaged(path, f"its memory {name!r} does not stand at frame {frames}")
    return Session(said["identity"], frames, latent, memory, decoder, said["facts"])


def _damaged(path: Path, why: str) -> SessionError:
    return SessionError(f"{path.name} is damaged, {why}: use an earlier session.")


def _write(file: BinaryIO, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """safetensors' format, written piece by piece: its own writer would hold a second copy of everything."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
        for piece in _contiguous_pieces(tensor.detach()):
            file.write(piece.cpu().reshape(-1).view(torch.uint8).numpy().data)


def _contiguous_pieces(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's values in order, without copying it as a whole: the latent of a long video lies on disk itself."""
    if tensor.is_contiguous():
        yield tensor
        return
    for part in tensor:
        yield from _contiguous_pieces(part)
