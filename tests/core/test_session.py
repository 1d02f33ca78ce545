"""Sessions: stopped, saved, loaded, gone on with, a video is bit for bit the one that never stopped."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest
import safetensors.torch
import torch
from sparse_forcing_pack.sparse_attn import session as module
from sparse_forcing_pack.sparse_attn.config import AttentionConfig, SamplerConfig
from sparse_forcing_pack.sparse_attn.pictures import to_uint8
from sparse_forcing_pack.sparse_attn.rollout import stream
from sparse_forcing_pack.sparse_attn.session import (
    SUFFIX,
    Session,
    SessionError,
    check_memory,
    decoder_snapshot,
    fingerprint,
    load_session,
    memory_snapshot,
    restore_decoder,
    restore_memory,
    save_session,
)
from sparse_forcing_pack.sparse_attn.session_files import LatentFile, claim, latents_of, part_of
from sparse_forcing_pack.sparse_attn.state import StreamState
from sparse_forcing_pack.sparse_attn.vae import StreamDecoder, WanVAE
from sparse_forcing_pack.sparse_attn.video import Mp4Writer
from sparse_forcing_pack.sparse_attn.wan import WanModel, frame_timesteps

ROOT = Path(__file__).resolve().parents[2]
SIDE, FRAMES, CHUNK, SEED = 4, 15, 3, 7  # latent pixels a side, latent frames
SAMPLER = SamplerConfig((1.0, 0.8), CHUNK)
MODES = {
    "dense": AttentionConfig(mode="dense"),
    "window": AttentionConfig(mode="window", window_frames=6, sink_frames=3),
    "window rebased": AttentionConfig(mode="window", window_frames=9, positions="rebased"),
    "sparse": AttentionConfig(block_tokens=4, topk=0.5),
    "sparse rebased": AttentionConfig(block_tokens=4, persistent_frames=3, positions="rebased"),
}


class Run:
    """A tiny random model on one prompt, its memory and its decoder: what a session is taken of."""

    def __init__(self, attention: AttentionConfig, total: int = FRAMES):
        torch.manual_seed(0)
        self.dit = WanModel(dim=128, ffn_dim=64, num_heads=2, num_layers=2, text_dim=8).eval()
        for weight in self.dit.parameters():
            weight.data += 0.02 * torch.randn_like(weight)
        self.vae = WanVAE(dim=4).eval()
        for part in (self.dit, self.vae):
            part.requires_grad_(False)
        self.cross_kv = self.dit.cross_kv(torch.randn(1, 512, 8))
        self.memory = StreamState(
            layers=2, heads=2, head_dim=64, grid=(SIDE // 2, SIDE // 2), chunk_frames=CHUNK,
            attention=attention, total_frames=total,
        )  # fmt: skip
        self.decoder, self.total = StreamDecoder(self.vae), total
        self.latents: list[torch.Tensor] = []
        self.identity = {"model": fingerprint(self.dit, ("patch_embedding.bias",)), "chunk_frames": CHUNK}

    def denoise(self, x, sigma):
        timesteps = frame_timesteps(sigma, 1, x.shape[2], x.device)
        flow = self.dit(x, timesteps, self.cross_kv, self.memory.attend, self.memory.t_start)
        return x - sigma * flow

    def chunks(self):
        """(latent, frames) of every chunk that is still to come."""
        made = self.memory.frame // CHUNK
        for chunk in stream(
            self.denoise, self.memory, SAMPLER, shape=(1, 16, SIDE, SIDE), total_frames=self.total, seed=SEED,
            start_chunk=made,
        ):  # fmt: skip
            self.latents.append(chunk.latent)
            yield chunk.latent, self.decoder.push(chunk.latent)

    def session(self) -> Session:
        latent = torch.cat(self.latents, dim=2)
        return Session(
            self.identity,
            latent.shape[2],
            latent,
            {"positive.0": memory_snapshot(self.memory)},
            decoder_snapshot(self.decoder),
            {"seed": SEED},
        )

    def go_on(self, session: Session) -> None:
        session.require(self.identity)
        restore_memory(self.memory, session.memory["positive.0"])
        restore_decoder(self.decoder, session.decoder)
        self.latents = [session.latent]


def rest_of(path: Path, attention: AttentionConfig, total: int = FRAMES):
    """(latents, frames) that a new run makes behind the session of `path`."""
    run = Run(attention, total)
    run.go_on(load_session(path))
    return zip(*run.chunks())


def save_after(chunks: int, attention: AttentionConfig, path: Path, total: int = FRAMES) -> Run:
    run = Run(attention, total)
    for _, _ in zip(range(chunks), run.chunks()):
        pass
    save_session(run.session(), path)
    return run


@cache
def never_stopped(mode: str):
    """(latents, frames) of the whole video."""
    return tuple(zip(*Run(MODES[mode]).chunks()))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("session") / f"a{SUFFIX}"
    save_after(2, MODES["sparse"], path)
    return path


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_loaded_session_goes_on_bit_for_bit(tmp_path, mode, stop):
    latents, frames = never_stopped(mode)
    save_after(stop, MODES[mode], tmp_path / "a folder" / f"a{SUFFIX}")
    new_latents, new_frames = rest_of(tmp_path / "a folder" / f"a{SUFFIX}", MODES[mode])
    assert len(new_latents) == len(latents) - stop
    assert all(torch.equal(a, b) for a, b in zip(new_latents, latents[stop:]))
    assert all(torch.equal(a, b) for a, b in zip(new_frames, frames[stop:]))


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_a_finished_video_grows_longer(tmp_path, mode):
    path = tmp_path / f"a{SUFFIX}"
    latents, _ = never_stopped(mode)
    save_after(9, MODES[mode], path, total=9)
    longer, _ = rest_of(path, MODES[mode], 15)
    assert torch.equal(torch.cat(longer, 2), torch.cat(latents[3:], 2))
    if mode == "dense":
        with pytest.raises(SessionError, match="holds 9 latent frames, but this video has 6: make it longer"):
            rest_of(path, MODES[mode], 6)


def test_autosaves_write_each_frame_once(tmp_path):
    path, run = tmp_path / f"a{SUFFIX}", Run(MODES["window"])
    beside, chunks = LatentFile(path), run.chunks()
    frame_bytes, sizes, film = 4 * 16 * SIDE * SIDE, [], b""
    for made in (3, 6, 9):
        next(chunks)
        save_session(run.session(), path, beside)
        sizes.append(path.stat().st_size)
        assert latents_of(path).read_bytes().startswith(film), "appended to"
        film = latents_of(path).read_bytes()
        assert len(film) == made * frame_bytes
        assert torch.equal(load_session(path).latent, torch.cat(run.latents, 2))
    assert sizes[1] == sizes[2], "the file of the memory does not grow"
    latents, frames = never_stopped("window")
    new_latents, new_frames = rest_of(path, MODES["window"])
    assert torch.equal(torch.cat(new_latents, 2), torch.cat(latents[3:], 2))
    assert torch.equal(torch.cat(new_frames, 2), torch.cat(frames[3:], 2))
    moved = tmp_path / "elsewhere" / f"b{SUFFIX}"
    save_session(load_session(path), moved)
    assert os.listdir(moved.parent) == [moved.name], "a saved session is one file"
    save_session(load_session(path), path)
    assert set(os.listdir(tmp_path)) == {path.name, moved.parent.name}
    assert torch.equal(load_session(moved).latent, load_session(path).latent)


def without_a_model(latent: torch.Tensor) -> Session:
    frames = latent.shape[2]
    return Session({}, frames, latent, {"x": {"frame": torch.tensor([frames])}})


def test_a_latent_of_several_videos_and_one_that_is_gone_meanwhile(tmp_path):
    path, latent = tmp_path / f"a{SUFFIX}", torch.randn(2, 3, 7, 4, 5)
    beside = LatentFile(path)
    for made in (2, 3, 7):
        if made == 7:
            latents_of(path).unlink()
        save_session(without_a_model(latent[:, :, :made]), path, beside)
        assert torch.equal(load_session(path).latent, latent[:, :, :made])


def test_a_loss_of_power_at_any_step_leaves_a_session(tmp_path, monkeypatch):
    """The folder is copied before and after every sync and move, what was not synced cut short in several places."""
    folder = tmp_path / "a"
    path, latents = folder / f"a{SUFFIX}", torch.randn(2, 1, 4, 12, 2, 3)  # two runs, of the same name
    saved, copies = [0], []  # frames of the sessions that were saved; (copy, frames it must have)
    synced: dict[int, int] = {}  # bytes by inode
    folder.mkdir()

    def look():
        for share in (0, 0.3, 1):
            copy = tmp_path / f"copy{len(copies)}"
            shutil.copytree(folder, copy)
            for file in copy.iterdir():
                kept = synced.get(folder.joinpath(file.name).stat().st_ino, 0)
                os.truncate(file, kept + int(share * (file.stat().st_size - kept)))
            copies.append((copy, saved[-1]))

    def fsync(handle, real=os.fsync):
        look()
        real(handle)
        synced[os.fstat(handle).st_ino] = os.fstat(handle).st_size
        look()

    def replace(source, target, real=os.replace):
        look()
        real(source, target)
        look()

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    for latent, lengths in zip(latents, ((3, 6), (9, 12))):
        beside = LatentFile(path)
        for frames in lengths:
            save_session(without_a_model(latent[:, :, :frames]), path, beside)
            saved.append(frames)
    monkeypatch.undo()
    assert len(copies) > 60
    for copy, frames in copies:
        target = copy / path.name
        if frames or target.exists():
            session = load_session(target)
            assert session.frames >= frames
            assert torch.equal(session.latent, latents[int(session.frames > 6)][:, :, : session.frames])
        beside = LatentFile(target)
        for made in (3, 6):  # another run of that name cleans up
            save_session(without_a_model(latent[:, :, :made]), target, beside)
        assert torch.equal(load_session(target).latent, latent[:, :, :6])
        assert set(os.listdir(copy)) == {path.name, latents_of(path).name}


def test_parts_of_dead_writers_are_removed(tmp_path):
    session = without_a_model(torch.zeros(1, 1, 1, 1, 1))
    for name in "ab":
        part_of(tmp_path / f"{name}{SUFFIX}").write_bytes(b"half a session")
        part_of(latents_of(tmp_path / f"{name}{SUFFIX}")).write_bytes(b"half a latent")
    others = {".a.part", ".part", f"a{SUFFIX}.part"}
    for name in others:
        (tmp_path / name).write_bytes(b"not ours")
    os.symlink(tmp_path / ".a.part", part_of(tmp_path / f"link{SUFFIX}"))
    with open(part_of(tmp_path / f"b{SUFFIX}"), "r+b") as alive:
        assert claim(alive)
        save_session(session, tmp_path / f"c{SUFFIX}")
        kept = {".b.session.latents.part", f".b{SUFFIX}.part"}
        assert set(os.listdir(tmp_path)) == others | kept | {f"c{SUFFIX}"}
    save_session(session, tmp_path / f"c{SUFFIX}")
    assert set(os.listdir(tmp_path)) == others | {f"c{SUFFIX}"}


def test_two_saves_at_once_leave_each_others_parts_alone(tmp_path, monkeypatch):
    paths, session = (
        [tmp_path / f"{name}{SUFFIX}" for name in "ab"],
        without_a_model(torch.randn(1, 1, 2, 2, 2)),
    )
    real = module._write

    def write(file, *rest):
        monkeypatch.setattr(module, "_write", real)
        save_session(session, paths[1], LatentFile(paths[1]))
        real(file, *rest)

    monkeypatch.setattr(module, "_write", write)
    save_session(session, paths[0], LatentFile(paths[0]))
    for path in paths:
        assert torch.equal(load_session(path).latent, session.latent)


def test_another_process_goes_on_bit_for_bit(tmp_path, saved):
    code = f"""
        import sys
        sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT / "tests" / "core")!r}]
        import conftest
        import importlib.util
        spec = importlib.util.spec_from_file_location("t", {__file__!r})
        t = importlib.util.module_from_spec(spec); spec.loader.exec_module(t)
        t.torch.set_num_threads(1)
        latents, frames = t.rest_of(t.Path({str(saved)!r}), t.MODES["sparse"])
        t.torch.save([t.torch.cat(latents, 2), t.torch.cat(frames, 2)], {str(tmp_path / "out.pt")!r})
    """
    subprocess.run([sys.executable, "-c", _left(code)], check=True, env=_environment())
    latents, frames = never_stopped("sparse")
    new = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(new[0], torch.cat(latents[2:], 2)) and torch.equal(new[1], torch.cat(frames[2:], 2))


def test_a_killed_run_leaves_its_session_and_a_video_that_plays(tmp_path):
    path, film = tmp_path / f"a{SUFFIX}", tmp_path / "a.mp4"
    code = f"""
        import sys
        sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT / "tests" / "core")!r}]
        import conftest
        import importlib.util
        spec = importlib.util.spec_from_file_location("t", {__file__!r})
        t = importlib.util.module_from_spec(spec); spec.loader.exec_module(t)
        t.torch.set_num_threads(1)
        t.endless({str(path)!r}, {str(film)!r})
    """
    process = subprocess.Popen([sys.executable, "-c", _left(code)], env=_environment())
    try:
        end = time.monotonic() + 60
        while (
            not path.exists() or load_session(path).frames < 6
        ):  # read while it is written: never half a file
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        os.kill(process.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
    finally:
        process.kill()
        process.wait()
    session = load_session(path)
    with av.open(str(film)) as container:
        found = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(found) >= session.facts["video_frames"] >= 21
    run = Run(MODES["window"], 600)
    run.go_on(session)
    with Mp4Writer(tmp_path / "b.mp4") as writer:
        facts = session.facts
        writer.resume(film, facts["video_bytes"], facts["video_frames"], 8 * SIDE, 8 * SIDE)
        latent, frames = next(run.chunks())
        writer.append(frames)
    whole = Run(MODES["window"], 600).chunks()
    for _ in range(session.frames // CHUNK + 1):
        expected = next(whole)
    assert torch.equal(latent, expected[0]) and torch.equal(frames, expected[1])
    with av.open(str(tmp_path / "b.mp4")) as container:
        grown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(grown) == facts["video_frames"] + 12
    assert np.array_equal(np.stack(grown[: facts["video_frames"]]), np.stack(found[: facts["video_frames"]]))


def endless(path: str, film: str) -> None:
    """Make a video, with a session after every chunk, until somebody kills the process."""
    run, beside = Run(MODES["window"], 600), LatentFile(path)
    with Mp4Writer(film) as writer:
        for _, frames in run.chunks():
            writer.append(to_uint8(frames))
            session = run.session()
            session.facts |= {"video_bytes": writer.bytes, "video_frames": writer.frames}
            writer.sync()
            save_session(session, path, beside)


@pytest.mark.parametrize("broken", ["replace", "fsync", "write"])
@pytest.mark.parametrize("apart", [False, True])
def test_a_write_that_dies_leaves_the_earlier_session(tmp_path, monkeypatch, broken, apart):
    path = tmp_path / f"a{SUFFIX}"
    run, beside = Run(MODES["window"]), LatentFile(path) if apart else None
    next(run.chunks())
    save_session(run.session(), path, beside)
    before, files = path.read_bytes(), sorted(os.listdir(tmp_path))
    next(run.chunks())

    def fail(*_):
        raise OSError(28, "No space left on device")

    if broken == "write":
        monkeypatch.setattr(module, "_contiguous_pieces", fail)
    else:
        monkeypatch.setattr(module.os, broken, fail)
    with pytest.raises(OSError, match="No space"):
        save_session(run.session(), path, beside)
    with pytest.raises(OSError, match="No space"):  # nor a first one
        save_session(run.session(), tmp_path / "b", LatentFile(tmp_path / "b") if apart else None)
    monkeypatch.undo()
    assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == files
    assert load_session(path).frames == 3
    if apart:
        os.truncate(latents_of(path), 3 * 4 * 16 * SIDE**2 + 5)  # and a piece of a frame
    save_session(run.session(), path, beside)
    assert torch.equal(load_session(path).latent, torch.cat(run.latents, 2))


@pytest.mark.parametrize("frames", [3, 9])  # the new file is shorter, longer
def test_a_session_saved_while_one_is_read_is_read_whole(tmp_path, monkeypatch, frames):
    path, real, opened = tmp_path / f"a{SUFFIX}", torch.UntypedStorage.from_file, []
    save_session(without_a_model(torch.randn(1, 16, 6, SIDE, SIDE)), path)
    new = torch.randn(1, 16, frames, SIDE, SIDE)

    def open_data(*args, **options):  # safetensors has read the header by now
        if not opened:
            save_session(without_a_model(new), path)
        opened.append(args)
        return real(*args, **options)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", staticmethod(open_data))
    session = load_session(path)
    assert len(opened) == 2, "safetensors opens the data another way: is it one file by now?"
    assert session.frames == frames and torch.equal(session.latent, new)


def test_what_is_written_is_safetensors_own_format(tmp_path):
    latent = torch.randn(1, 4, 8, 2, 3)
    half = torch.randn(3, 4).bfloat16().T
    session = Session({"a": 1}, 5, latent[:, :, :5], {"x": {"frame": torch.tensor([5]), "k": half}})
    save_session(session, tmp_path / "a")
    read = safetensors.torch.load_file(tmp_path / "a")
    assert torch.equal(read["latent"], latent[:, :, :5]) and torch.equal(read["memory/x/k"], half)
    assert read["memory/x/frame"].tolist() == [5]


def rewrite(path: Path, target: Path, tensors=None, **said) -> Path:
    """A copy of a session file with other contents; the description's values by name, None removes one."""
    with safetensors.safe_open(str(path), "pt") as file:
        text = json.loads(file.metadata()[module.HEADER]) | said
    text = {name: value for name, value in text.items() if value is not None}
    contents = safetensors.torch.load_file(path) | (tensors or {})
    safetensors.torch.save_file(contents, target, {module.HEADER: json.dumps(text)})
    return target


def test_files_that_are_no_session_are_refused(tmp_path, saved):
    with pytest.raises(SessionError, match=r"There is no session missing"):
        load_session(tmp_path / "missing")
    data, target = saved.read_bytes(), tmp_path / "b"
    for cut in (0, 4, 100, len(data) // 2, len(data) - 1):
        target.write_bytes(data[:cut])
        with pytest.raises(SessionError, match="cannot be read as a session .*: it was cut short"):
            load_session(target)
    for hostile in (
        struct.pack("<Q", 2**62) + data[8:],  # a header larger than the machine
        struct.pack("<Q", 8) + b"[" * 8,
        b"\x80\x04cos\nsystem\n(S'true'\ntR." + bytes(100),  # a pickle
        data + b"more",
    ):
        target.write_bytes(hostile)
        with pytest.raises(SessionError, match="cannot be read as a session"):
            load_session(target)
    safetensors.torch.save_file({"latent": torch.zeros(1)}, target)
    with pytest.raises(SessionError, match=r"b is not a session: choose a file that ends in \.session"):
        load_session(target)
    for text in ("[" * 100_000, "{", "[]", '{"version": "1"}'):
        safetensors.torch.save_file({}, target, {module.HEADER: text})
        with pytest.raises(SessionError, match="its description is not readable"):
            load_session(target)


def test_other_versions_and_damage_are_refused(tmp_path, saved):
    target = tmp_path / "b"
    for changes, message in (
        ({"version": 3}, "has session version 3, this pack reads 1 and 2: update the pack"),
        ({"version": 0}, "has session version 0, this pack reads 1 and 2: make it anew"),
        ({"version": 2}, "its description lacks latents"),
        ({"version": 2, "latents": ["x"]}, "its description lacks latents"),
        ({"version": 2, "latents": "x"}, "its latent is not one without frames"),
        ({"identity": None, "frames": "6"}, "its description lacks identity, frames"),
        ({"frames": 7}, "its latent is not one of 7 frames"),
        ({"memory": []}, "'memory/positive.0/frame' does not belong in it|does not belong in it"),
        ({"memory": [3]}, "its memories have no names"),
        ({"memory": ["positive.0", "other"]}, "its memory 'other' does not stand at frame 6"),
    ):
        with pytest.raises(SessionError, match=message):
            load_session(rewrite(saved, target, **changes))
    for tensors, message in (
        ({"latent": torch.zeros(3)}, "its latent is not one of 6 frames"),
        ({"../evil": torch.zeros(3)}, "'../evil' does not belong in it"),
        ({"memory/positive.0/frame": torch.tensor([9])}, "does not stand at frame 6"),
    ):
        with pytest.raises(SessionError, match=message):
            load_session(rewrite(saved, target, tensors))


def test_a_latent_that_is_not_the_sessions_is_refused(tmp_path):
    path = tmp_path / f"a{SUFFIX}"
    save_session(without_a_model(torch.randn(1, 16, 6, SIDE, SIDE)), path, LatentFile(path))
    beside, target = latents_of(path), tmp_path / f"b{SUFFIX}"
    data, outside = beside.read_bytes(), tmp_path / "outside"
    beside.write_bytes(data + b"of a later session that died")
    assert load_session(path).frames == 6
    for bytes_there, message in (
        (data[:-1], "a.session.latents holds 5 of its 6 latent frames: use an earlier session"),
        (b"", "a.session.latents holds 0 of its 6 latent frames"),
        (data[:-1] + b"x", "a.session.latents holds other latent frames than its own"),
        (b"x" + data, "a.session.latents holds other latent frames than its own"),
    ):
        beside.write_bytes(bytes_there)
        with pytest.raises(SessionError, match=message):
            load_session(path)
    lost = "its latent is in a.session.latents, which is not beside it: keep the two files together"
    outside.write_bytes(data)
    for put in (Path.unlink, Path.mkdir, lambda path: (path.rmdir(), path.symlink_to(outside))):
        put(beside)
        with pytest.raises(SessionError, match=lost):
            load_session(path)
    latents_of(target).write_bytes(data)
    load_session(rewrite(path, target))
    for changes in ({"frames": 2**62}, {"frames": 7}, {"frames": 0}, {"frames": -1}):
        with pytest.raises(SessionError, match=r"b\.session\.latents holds 6 of its .* latent frames"):
            load_session(rewrite(path, target, **changes))
    for latent in (
        torch.zeros(1, 16, 0, 2**20, 2**20),
        torch.zeros(1, 16, 0, 0, 4),
        torch.zeros(1, 16, 0, SIDE, SIDE, dtype=torch.int32),
        torch.zeros(1, 16, 1, SIDE, SIDE),
        torch.zeros(0),
    ):
        with pytest.raises(SessionError, match=r"holds 0 of its|holds .* of its 6 latent|is not one without"):
            load_session(rewrite(path, target, {"latent": latent}))


def test_fingerprint_of_weights_that_are_cast_and_moved():
    names = ("patch_embedding.weight", "blocks.0.modulation")
    dit = Run(MODES["sparse"]).dit
    with torch.no_grad():
        dit.blocks[0].modulation[0, 0, :2] = torch.tensor([-1e-9, 1e-9])  # which underflow
    found = fingerprint(dit, names)
    for dtype in (
        torch.bfloat16,
        torch.float8_e5m2,
        torch.float32,
        torch.float16,
        torch.float64,
        torch.float8_e4m3fn,
    ):
        assert fingerprint(dit.to(dtype), names) == found, dtype
    before = dit.float().patch_embedding.weight.detach().clone()
    dit.patch_embedding.weight.data = -before
    assert fingerprint(dit, names) != found
    assert fingerprint(dit, names, {"patch_embedding.weight": before}) == found
    assert fingerprint(dit, names, {"patch_embedding.weight": before}, "a LoRA") != found


def test_another_models_session_is_refused(saved):
    session = load_session(saved)
    said = r"made with chunk_frames 3 \(here 1\); seed None \(here 5\)\. Set this run alike"
    with pytest.raises(SessionError, match=said):
        session.require({"model": session.identity["model"], "chunk_frames": 1, "seed": 5})
    run = Run(MODES["sparse"])
    weights = run.dit.patch_embedding.bias.clone()
    assert fingerprint(run.dit, ("patch_embedding.bias",)) == session.identity["model"]
    run.dit.patch_embedding.bias.data = -weights
    assert fingerprint(run.dit, ("patch_embedding.bias",)) != session.identity["model"]
    for attention, message in (
        (MODES["dense"], "does not fit this run"),
        (AttentionConfig(window_frames=9, block_tokens=4), "the snapshot has window_frames 6, this stream 9"),
    ):
        other = Run(attention)
        before = other.memory.snapshot()
        with pytest.raises(SessionError, match=message):
            other.go_on(session)
        assert all(torch.equal(x, before[name]) for name, x in other.memory.snapshot().items())
    session.decoder["no such module"] = torch.zeros(1, 1, 1, 1, 1)
    with pytest.raises(SessionError, match="'no such module'.* use the VAE it was made with"):
        restore_decoder(run.decoder, session.decoder)


@pytest.mark.parametrize(
    ("mode", "name", "value"),
    [
        ("sparse", "table", lambda x: x.fill_(10**9)),
        ("sparse", "table", lambda x: x.zero_()),
        ("sparse", "page_len", lambda x: x.fill_(5)),
        ("sparse", "page_len", lambda x: x.fill_(-1)),
        ("sparse", "persistent", lambda x: x.fill_(10**6)),
        ("sparse", "pinned", lambda x: x.fill_(-1)),
        ("sparse", "time", lambda x: x.fill_(-1)),
        ("sparse", "window", lambda x: torch.tensor([3] * 9)),
        ("sparse", "window", lambda x: torch.tensor([4])),
        ("window", "slots", lambda x: x + 1),
        ("window", "slots", lambda x: x * 0),
        ("window", "slots", lambda x: x[:2]),
        ("window", "frames", lambda x: x.flip(0)),
        ("window", "frames", lambda x: x + 10),
        ("dense", "slots", lambda x: x - 1),
        ("dense", "slots", lambda x: x + 100),
    ],
)
def test_numbers_that_point_outside_are_refused(mode, name, value):
    run = Run(MODES[mode])
    for _, _ in zip(range(2), run.chunks()):
        pass
    saved = memory_snapshot(run.memory)
    check_memory(run.memory, saved)
    saved[name] = value(saved[name].clone())
    with pytest.raises(SessionError, match="its tables point outside"):
        check_memory(Run(MODES[mode]).memory, saved)


def test_shapes_that_lie_are_refused():
    run = Run(MODES["dense"])
    next(run.chunks())
    saved = memory_snapshot(run.memory)
    for name, value in (("k", torch.zeros(3)), ("k", saved["k"].half()), ("frame", torch.zeros(2))):
        with pytest.raises(SessionError, match="does not fit this run"):
            check_memory(run.memory, saved | {name: value})
    del saved["v"]
    with pytest.raises(SessionError, match="does not fit this run"):
        check_memory(run.memory, saved)


def _left(code: str) -> str:
    return "\n".join(line.strip() for line in code.splitlines())


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}
