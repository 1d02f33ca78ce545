"""Mp4Writer: what is appended is in the file, also when the run does not live to close it."""

import contextlib
import subprocess
import sys
import textwrap
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from sparse_forcing_pack.sparse_attn import video
from sparse_forcing_pack.sparse_attn.pictures import contact_sheet, spread, to_uint8
from sparse_forcing_pack.sparse_attn.video import Mp4Writer

ROOT = Path(__file__).resolve().parents[2]


def clip(frames: int, height: int = 48, width: int = 64, start: int = 0) -> np.ndarray:
    """Frames that differ: a bright bar that moves by 4 pixels a frame."""
    video = np.full((frames, height, width, 3), 30, np.uint8)
    for i in range(frames):
        at = (start + i) * 4 % width
        video[i, :, at : at + 8] = (250, 200, 40)
    return video


def read(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def assert_alike(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    # 4:2:0 colour is coarser than the bar's edge; the picture as a whole is the same.
    assert np.abs(found.astype(int) - expected.astype(int)).mean() < 6


@pytest.mark.parametrize("codec", list(video.CODECS))
def test_appended_pieces_become_one_video(tmp_path, monkeypatch, codec):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    monkeypatch.setattr(video, "CODECS", {codec: video.CODECS[codec]})
    path = tmp_path / "a folder" / "video.mp4"
    with Mp4Writer(path, fps=16) as writer:
        writer.append(clip(9))
        writer.append(clip(12, start=9))
    assert writer.frames == 21
    assert_alike(read(path), clip(21))
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 16


def test_a_decoders_tensor_is_the_same_video(tmp_path):
    frames = clip(5)
    tensor = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    assert np.array_equal(to_uint8(tensor), frames)
    assert np.array_equal(to_uint8(tensor * 1.5), to_uint8((tensor * 1.5).clamp(-1, 1)))
    assert to_uint8(tensor.bfloat16()).dtype == np.uint8
    with Mp4Writer(tmp_path / "a.mp4") as writer:
        writer.append(tensor)
    assert_alike(read(tmp_path / "a.mp4"), frames)


def test_odd_sides_are_extended(tmp_path):
    with Mp4Writer(tmp_path / "odd.mp4") as writer:
        writer.append(clip(3, height=33, width=47))
    assert read(tmp_path / "odd.mp4").shape == (3, 34, 48, 3)


def test_a_killed_run_leaves_a_video_of_all_that_was_appended(tmp_path):
    path = tmp_path / "killed.mp4"
    code = f"""
        import os, sys
        sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT / "tests" / "pipeline")!r}]
        import conftest
        from test_video import Mp4Writer, clip
        writer = Mp4Writer({str(path)!r})
        for i in range(3):
            writer.append(clip(12, start=12 * i))
        os._exit(9)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == 9
    assert_alike(read(path), clip(36))


def test_every_append_is_in_the_file_at_once(tmp_path):
    path = tmp_path / "a.mp4"
    with Mp4Writer(path) as writer:
        for i in range(3):
            writer.append(clip(12, start=12 * i))
            writer.sync()
            assert path.stat().st_size == writer.bytes
            assert_alike(read(path), clip(12 * i + 12))
    with av.open(str(path)) as container:
        assert container.duration == 36 * av.time_base / 16
        pts = [float(frame.pts * frame.time_base * 16) for frame in container.decode(video=0)]
        assert pts == list(range(36))
        container.seek(int(1.6 * av.time_base))
        assert next(container.decode(video=0)).time == 24 / 16, "the keyframe before 1.6 s"


@pytest.mark.parametrize("codec", list(video.CODECS))
def test_a_video_goes_on_in_a_new_file(tmp_path, monkeypatch, codec):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    monkeypatch.setattr(video, "CODECS", {codec: video.CODECS[codec]})
    with Mp4Writer(tmp_path / "a.mp4") as whole:
        whole.append(clip(9))
        whole.append(clip(12, start=9))
        cut, frames = whole.bytes, whole.frames
        whole.append(clip(40, start=21))
    with Mp4Writer(tmp_path / "b.mp4") as writer:
        writer.resume(tmp_path / "a.mp4", cut, frames, 48, 64)
        assert_alike(read(tmp_path / "b.mp4"), clip(21))
        writer.append(clip(40, start=21))
        with pytest.raises(ValueError, match="64x32 frames cannot follow 64x48"):
            writer.append(clip(1, height=32))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_going_on_with_something_else_is_refused(tmp_path):
    path, new = tmp_path / "a.mp4", tmp_path / "b.mp4"
    with Mp4Writer(path) as writer:
        writer.append(clip(9))
        size = writer.bytes
    (tmp_path / "short.mp4").write_bytes(path.read_bytes()[: size - 1])
    (tmp_path / "junk.mp4").write_bytes(bytes(5000))
    for source, cut, side, message in (
        (tmp_path / "none.mp4", size, 48, "cannot be read: No such file"),
        (tmp_path / "junk.mp4", size, 48, "written with other settings"),
        (path, size, 32, "written with other settings"),
        (tmp_path / "short.mp4", size, 48, f"it has {size - 1} bytes of {size}"),
        (path, size - 10, 48, "do not end where"),
        (path, size + 3, 48, "do not end where"),
    ):
        writer = Mp4Writer(new)
        with pytest.raises(ValueError, match=message):
            writer.resume(source, cut, 9, side, 64)
        writer.close()
        assert not new.exists()


def test_close_twice_and_nothing_after(tmp_path):
    writer = Mp4Writer(tmp_path / "a.mp4")
    writer.append(clip(2))
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.append(clip(1))
    assert len(read(tmp_path / "a.mp4")) == 2


def test_nothing_appended_writes_nothing(tmp_path):
    with Mp4Writer(tmp_path / "none.mp4"):
        pass
    assert not list(tmp_path.iterdir())


def test_an_exception_keeps_what_was_appended(tmp_path):
    with contextlib.suppress(RuntimeError), Mp4Writer(tmp_path / "a.mp4") as writer:
        writer.append(clip(7))
        raise RuntimeError
    assert len(read(tmp_path / "a.mp4")) == 7


def test_wrong_frames_are_refused_with_a_sentence(tmp_path):
    with Mp4Writer(tmp_path / "a.mp4") as writer:
        writer.append(clip(1))
        with pytest.raises(ValueError, match="64x32 frames cannot follow 64x48"):
            writer.append(clip(1, height=32))
        with pytest.raises(ValueError, match=r"shape \[2, 3, 1, 8, 8\]"):
            writer.append(torch.zeros(2, 3, 1, 8, 8))
        with pytest.raises(ValueError, match="float64"):
            writer.append(np.zeros((1, 48, 64, 3)))


def test_no_encoder_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "CODECS", {"no_such_codec": {}})
    with Mp4Writer(tmp_path / "a.mp4") as writer, pytest.raises(ValueError, match="reinstall PyAV"):
        writer.append(clip(1))


@pytest.mark.parametrize(
    ("total", "count", "expected"), [(3, 12, [0, 1, 2]), (9, 3, [0, 4, 8]), (5, 1, [0]), (0, 4, [])]
)
def test_spread(total, count, expected):
    assert spread(total, count) == expected


def test_contact_sheet_shows_first_to_last_frame():
    frames = np.stack([np.full((20, 40, 3), 10 * i, np.uint8) for i in range(21)])
    sheet = contact_sheet(frames, count=6, columns=3, width=40)
    assert sheet.size == (3 * 44 - 4, 2 * 24 - 4)
    seen = [sheet.getpixel((x * 44 + 20, y * 24 + 10))[0] for y in range(2) for x in range(3)]
    assert seen == [10 * i for i in spread(21, 6)]
    with pytest.raises(ValueError, match="no frames"):
        contact_sheet(frames[:0])


@contextlib.contextmanager
def no_file_beyond(size: int):
    """Writes that would make a file larger fail, the last one after a part of it: as on a full disk."""
    resource = pytest.importorskip("resource", reason="only POSIX limits the size of files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_the_piece_that_does_not_fit_and_no_more(tmp_path):
    path = tmp_path / "a.mp4"
    with Mp4Writer(path) as writer:
        writer.append(clip(12))
        writer.append(clip(12, start=12))
        with no_file_beyond(writer.bytes + 100):
            with pytest.raises(
                OSError, match=r"a\.mp4 cannot be written: File too large\. The 24 frames before"
            ):
                writer.append(clip(12, start=24))
            assert path.stat().st_size == writer.bytes
            assert_alike(read(path), clip(24))
        writer.append(clip(12, start=24))  # there is room again
    assert_alike(read(path), clip(36))
    with Mp4Writer(tmp_path / "b.mp4") as whole:
        for i in range(3):
            whole.append(clip(12, start=12 * i))
    assert path.read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_disk_without_room_for_the_first_piece_or_the_index(tmp_path):
    with no_file_beyond(100), Mp4Writer(tmp_path / "a.mp4") as writer:
        with pytest.raises(OSError, match="The 0 frames before are kept"):
            writer.append(clip(12))
        with pytest.raises(OSError, match="The 0 frames before are kept"):
            writer.append(clip(12))
    assert not list(tmp_path.iterdir())
    with Mp4Writer(tmp_path / "a.mp4") as writer:
        writer.append(clip(12))
        with no_file_beyond(writer.bytes + 10):
            writer.close()  # a warning: it plays without
    assert (tmp_path / "a.mp4").stat().st_size == writer.bytes
    assert_alike(read(tmp_path / "a.mp4"), clip(12))
    copy = Mp4Writer(tmp_path / "b.mp4")
    with no_file_beyond(writer.bytes - 10), pytest.raises(OSError, match="The 0 frames before are kept"):
        copy.resume(tmp_path / "a.mp4", writer.bytes, 12, 48, 64)
    copy.close()
    assert not (tmp_path / "b.mp4").exists()


def test_a_folder_that_takes_no_files_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file" / "a.mp4", tmp_path / "file" / "b" / "a.mp4"):
        with pytest.raises(OSError, match=r"No video can be written to .*: .* choose another folder"):
            Mp4Writer(path).check()
    Mp4Writer(tmp_path / "new" / "a.mp4").check()
    assert not list((tmp_path / "new").iterdir())
