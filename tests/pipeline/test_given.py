"""Videos that begin with a picture or a clip: what is read, what the memory holds, what comes out."""

import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from sparse_forcing_pack.sparse_attn import cli
from sparse_forcing_pack.sparse_attn.config import AttentionConfig, SamplerConfig, pixel_frames
from sparse_forcing_pack.sparse_attn.fast import ComposablePass
from sparse_forcing_pack.sparse_attn.given import latent_frames_of, read_clip, read_image, usable_frames
from sparse_forcing_pack.sparse_attn.pipeline import Request, VideoPipeline, new_memory
from sparse_forcing_pack.sparse_attn.rollout import prefill, stream
from sparse_forcing_pack.sparse_attn.video import Mp4Writer

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a red circle over a navy plain background"
SMALL = ["generate", "--prompt", PROMPT, "--width", "64", "--height", "48"]
MODES = [
    AttentionConfig(mode="dense"),
    AttentionConfig(mode="window", positions="rebased"),
    AttentionConfig(block_tokens=16),
]


def pictures(frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def written(path: Path, frames: np.ndarray, fps: int = 16) -> Path:
    with Mp4Writer(path, fps) as writer:
        writer.append(frames)
    return path


def steps(count: int) -> np.ndarray:
    """Plain frames, each brighter than the one before."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None] * 8 + 16, (count, 48, 64, 3))


# --- reading ---


def test_of_a_clip_whole_latent_frames_are_used():
    for frames in range(1, 30):
        used = usable_frames(frames)
        assert frames - 3 <= used <= frames and used == pixel_frames(latent_frames_of(frames))


def test_a_picture_is_scaled_and_cut_to_the_size(tmp_path):
    image = Image.new("RGBA", (200, 50), (10, 200, 30, 255))
    image.paste((250, 0, 0, 255), (0, 0, 40, 50))  # outside the middle, so cut away
    image.save(tmp_path / "wide.png")
    seen = read_image(tmp_path / "wide.png", 64, 48)
    assert seen.shape == (1, 48, 64, 3) and seen.dtype == np.uint8
    assert np.abs(seen.astype(int) - (10, 200, 30)).max() <= 1
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright: what is stored as left is shown on top
    image.convert("RGB").save(tmp_path / "turned.png", exif=exif)
    turned = read_image(tmp_path / "turned.png", 48, 192)
    assert turned[0, 5, 24, 0] > 200 and turned[0, 180, 24, 1] > 150


@pytest.mark.parametrize(
    ("fps", "shown"),
    [(16, range(2, 11)), (8, [i // 2 for i in range(1, 22)]), (32, [2, 4, 6, 8, 10]), (24, [1, 3, 4, 6, 7])],
)
def test_a_clip_keeps_its_speed_and_its_end(tmp_path, fps, shown):
    """11 frames at 16, 8, 32 and 24 a second, read at 16: the last 1 + 4k of what would be on the screen."""
    frames = steps(11 if fps != 24 else 8)
    seen = read_clip(written(tmp_path / "clip.mp4", frames, fps), 64, 48, 16)
    assert np.round((seen.mean((1, 2, 3)) - 16) / 8).astype(int).tolist() == list(shown)
    assert np.abs(np.diff(seen.mean((1, 2, 3)))).max() < 24


def test_what_cannot_be_read_is_said(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "text.png").write_text("no picture")
    for read, name, words in (
        (read_image, "text.png", "cannot be read as a picture"),
        (read_image, "none.png", r"none.png cannot be read as a picture \(No such file"),
        (lambda *size: read_clip(*size, 16), "text.mp4", "cannot be read as a video"),
        (lambda *size: read_clip(*size, 16), "none.mp4", "cannot be read as a video"),
    ):
        with pytest.raises(ValueError, match=words):
            read(tmp_path / name, 64, 48)


# --- generating ---


def by_hand(pipeline: VideoPipeline, request: Request) -> np.ndarray:
    """The same video in one piece: given latents into the memory, chunks behind them, all decoded at once."""
    memory = new_memory(pipeline.widths, request, torch.float32, "cpu")
    cross_kv = pipeline.dit.cross_kv(pipeline.text.encode([request.prompt]))
    run = ComposablePass(pipeline.dit, memory)

    def denoise(x, sigma):
        return x - sigma * run(x, sigma, cross_kv)

    given = pipeline.vae.encode(torch.from_numpy(request.given).permute(3, 0, 1, 2)[None] / 127.5 - 1)
    prefill(denoise, memory, given, request.sampler.chunk_frames)
    made = stream(
        denoise,
        memory,
        request.sampler,
        shape=(1, *given.shape[1:2], *given.shape[3:]),
        total_frames=request.latent_frames - given.shape[2],
        seed=request.seed,
    )
    with torch.no_grad():
        frames = pipeline.vae.decode(torch.cat([given, *(chunk.latent for chunk in made)], dim=2))
    return ((frames[0].permute(1, 2, 3, 0).clamp(-1, 1) + 1) * 127.5).round().numpy()


@pytest.mark.parametrize("attention", MODES, ids=[attention.mode for attention in MODES])
@pytest.mark.parametrize("given", [1, 17])
def test_the_video_goes_on_from_what_is_given(pipeline, attention, given):
    request = Request(
        PROMPT,
        latent_frames=latent_frames_of(given) + 6,
        width=64,
        height=48,
        seed=5,
        attention=attention,
        given=pictures(given),
    )
    chunks = list(pipeline.generate(request))
    assert [chunk.index for chunk in chunks if chunk.index >= 0] == [0, 1] == list(range(request.chunks))
    assert max(len(chunk.frames) for chunk in chunks) == 12, "a clip is decoded in pieces"
    video = np.concatenate([chunk.frames for chunk in chunks])
    assert len(video) == request.video_frames == given + 24
    assert np.abs(video - by_hand(pipeline, request)).max() <= 1
    longer = replace(request, latent_frames=request.latent_frames + 3)
    if attention.mode != "dense":
        begins = np.concatenate([chunk.frames for chunk in pipeline.generate(longer)])[: len(video)]
        assert np.array_equal(begins, video)
    other = replace(request, given=255 - pictures(given))
    assert not np.array_equal(
        np.concatenate([c.frames for c in pipeline.generate(other)])[given:], video[given:]
    )


def test_one_frame_at_a_time_from_a_picture(pipeline):
    attention = AttentionConfig(window_frames=3, sink_frames=1, persistent_frames=2)
    request = Request(
        PROMPT, 4, 64, 48, attention=attention, sampler=SamplerConfig(chunk_frames=1), given=pictures(1)
    )
    assert [len(chunk.frames) for chunk in pipeline.generate(request)] == [1, 4, 4, 4]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"given": pictures(3)}, r"3 given frames make no whole latent frames: .*the last 1\)"),
        ({"given": pictures(5, width=48)}, r"shape \[5, 48, 48, 3\] and type uint8 do not fit a 64x48 video"),
        ({"given": pictures(1) / 255}, "type float64 do not fit"),
        ({"given": pictures(37)}, "37 given frames are already all 37 of the video"),
        ({"given": pictures(5)}, "8 latent frames .* not a whole number of chunks"),
    ],
)
def test_given_frames_that_do_not_fit_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(Request(PROMPT, latent_frames=10, width=64, height=48), **change).validate()


# --- the command line ---


@pytest.fixture
def tiny(monkeypatch, pipeline):
    monkeypatch.setattr(VideoPipeline, "load", classmethod(lambda cls, device: pipeline))
    return pipeline


def run(*arguments: object) -> int:
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as done:
        return int(done.code or 0)


def test_a_picture_and_a_clip_on_the_command_line(tiny, tmp_path, capsys):
    image, out, longer = tmp_path / "a.png", tmp_path / "a.mp4", tmp_path / "b.mp4"
    Image.fromarray(pictures(1, 90, 90)[0]).save(image)
    assert run(*SMALL, "--image", image, "--seconds", "1.5", "--out", out) == 0
    shown = capsys.readouterr()
    assert "1 given frame and 2 chunks of 3 latent frames: 25 video frames" in shown.err
    assert "chunk 2/2" in shown.err and f"{out}: 25 frames" in shown.out
    assert run(*SMALL, "--extend", out, "--frames", "37", "--out", longer) == 0
    shown = capsys.readouterr()
    assert "25 given frames and 1 chunk of 3 latent frames: 37 video frames" in shown.err
    with av.open(str(longer)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 37


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "none.png"], "none.png cannot be read as a picture (No such file or directory)"),
        (["--extend", "none.mp4"], "none.mp4 cannot be read as a video (No such file or directory)"),
        (["--image", "a.png", "--extend", "a.mp4"], "not allowed with"),
        (
            ["--extend", "a.mp4", "--seconds", "0.5"],
            "--seconds 0.5 counts the whole video, and 0.56 s are given",
        ),
        (["--extend", "a.mp4", "--frames", "22"], "3 latent frames behind the 9 given: use 21 or 33"),
        (["--extend", "a.mp4", "--frames", "9"], "behind the 9 given: use 21"),
    ],
)
def test_starts_that_cannot_be_are_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "a.mp4", pictures(9))
    Image.fromarray(pictures(1)[0]).save("a.png")
    assert run(*SMALL, *arguments) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1


def test_starts_are_checked_before_torch_is_imported(tmp_path):
    code = f"""
        import sys
        sys.path[:0] = [{str(ROOT / "tests")!r}]
        import conftest
        from sparse_forcing_pack.sparse_attn.cli import main
        assert main({[*SMALL, "--image", str(tmp_path / "none.png")]!r}) == 2
        assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, stderr=subprocess.PIPE)


@pytest.mark.parametrize(
    ("seconds", "given", "latent"),
    [(5, 0, 21), (5, 1, 22), (0.5, 1, 4), (0.75, 1, 4), (1.01, 1, 7), (5, 17, 20), (2, 31, 11), (5, 77, 23)],
)
def test_seconds_count_the_given_frames(seconds, given, latent):
    arguments = cli.parser().parse_args([*SMALL, "--seconds", str(seconds)])
    assert cli.length_of(arguments, 3, given) == latent
