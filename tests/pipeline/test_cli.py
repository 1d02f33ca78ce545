"""The command line: wrong usage is told at once, a stopped run keeps what it has."""

import io
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch
from PIL import Image
from sparse_forcing_pack.sparse_attn import cli
from sparse_forcing_pack.sparse_attn.checkpoint import is_causal_ar, read_checkpoint
from sparse_forcing_pack.sparse_attn.pipeline import VideoPipeline
from sparse_forcing_pack.sparse_attn.progress import Progress, size
from sparse_forcing_pack.sparse_attn.wan import WanModel
from sparse_forcing_pack.sparse_attn.world import ATTENTION
from sparse_forcing_pack.sparse_attn.world.model import DIT_FILE

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "generate",
    "--prompt",
    "a red circle over a navy plain background",
    "--width",
    "64",
    "--height",
    "48",
]


def run(*arguments: object) -> int:
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as done:  # argparse's own way out
        return int(done.code or 0)


def frames_in(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.fixture
def tiny(monkeypatch, pipeline):
    """The CLI with the tiny pipeline in place of the embedded model."""
    monkeypatch.setattr(VideoPipeline, "load", classmethod(lambda cls, device: pipeline))
    return pipeline


# --- wrong usage ---


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--frames", "80"], "--frames 80 is not a whole number of chunks of 3 latent frames: use 69 or 81"),
        (["--frames", "5"], "--frames 5 is not a whole number of chunks of 3 latent frames: use 9"),
        (["--frames", "0"], "--frames 0"),
        (["--frames", "-3"], "--frames -3"),
        (["--seconds", "0"], "--seconds 0"),
        (["--seconds", "-1"], "--seconds -1"),
        (["--seconds", "nan"], "--seconds nan"),
        (["--seconds", "5", "--frames", "81"], "not allowed with"),
        (["--width", "100"], "width 100 is not a multiple of 16 pixels: use 96 or 112"),
        (["--window", "4"], "window_frames 4"),
        (["--persistent", "3", "--sink", "6"], "sink_frames 6"),
        (["--topk", "0"], "topk 0"),
        (["--topk", "nan"], "topk nan"),
        (["--chunk", "0"], "chunk_frames 0"),
        (["--mode", "dens"], "invalid choice: 'dens'"),
        (["--mode", "dense", "--positions", "rebased"], "'rebased'"),
        (["--seed", "x"], "invalid int value: 'x'"),
        (["--seed", "-1"], "seed -1"),
        (["--prompt", " "], "prompt is empty"),
        (["--device", "tpu"], "device 'tpu' cannot be used here"),
        (["--out", "video.avi"], "must end in .mp4"),
        (["--out", "."], "must end in .mp4"),
        (["--sheet", "sheet.jpg"], "must end in .png"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sparse_forcing_pack.sparse_attn.pipeline.load_world_model", lambda *_: pytest.fail("loaded")
    )
    assert run(*SMALL, *arguments) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_outputs_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").write_text("")
    assert run(*SMALL, "--out", tmp_path / "folder.mp4") == 2
    assert "is a folder" in capsys.readouterr().err
    assert run(*SMALL, "--out", tmp_path / "file" / "deep" / "x.mp4") == 2
    assert "is a file, not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["paint"], ["generate"]])
def test_no_such_command(arguments, capsys):
    assert run(*arguments) == 2
    assert "--help" in capsys.readouterr().err


def test_usage_is_checked_before_torch_is_imported():
    code = f"""
        import sys
        sys.path[:0] = [{str(ROOT / "tests")!r}]
        import conftest
        from sparse_forcing_pack.sparse_attn.cli import main
        assert main({[*SMALL, "--frames", "80"]!r}) == 2
        assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, stderr=subprocess.PIPE)


# --- lengths ---


@pytest.mark.parametrize(
    ("seconds", "chunk", "latent"),
    [(5, 3, 21), (0.1, 3, 3), (0.75, 3, 3), (0.76, 3, 6), (5, 1, 20), (60, 3, 240)],
)
def test_seconds_become_whole_chunks(seconds, chunk, latent):
    arguments = cli.parser().parse_args([*SMALL, "--seconds", str(seconds), "--chunk", str(chunk)])
    assert cli.length_of(arguments, chunk) == latent


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--seconds", "5"],
            "5 s is rounded up to 7 chunks of 3 latent frames: 81 video frames, 5.06 s, 64x48\n",
        ),
        (["--seconds", "0.75"], "1 chunk of 3 latent frames: 9 video frames, 0.56 s, 64x48\n"),
        (["--frames", "81"], "7 chunks of 3 latent frames: 81 video frames, 5.06 s, 64x48\n"),
    ],
)
def test_length_and_memory_are_said_before_the_start(tiny, monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(cli, "write_video", lambda *_: 0)
    assert run(*SMALL, *arguments) == 0
    text = capsys.readouterr().err
    assert text.startswith(words)
    assert (
        "mode sparse on cpu: 8.50 MB of weights, 462.99 kB of cache, and the activations of one chunk" in text
    )


@pytest.mark.parametrize(("frames", "chunk", "latent"), [(81, 3, 21), (9, 3, 3), (1, 1, 1), (77, 1, 20)])
def test_exact_lengths(frames, chunk, latent):
    assert cli.exact_length(frames, chunk) == latent


# --- generating ---


def test_generate_writes_the_video_and_the_sheet(tiny, tmp_path, capsys):
    out, sheet = tmp_path / "new folder" / "a.mp4", tmp_path / "other" / "a.png"
    assert run(*SMALL, "--frames", "33", "--out", out, "--sheet", sheet, "--seed", "3") == 0
    assert frames_in(out) == 33
    with Image.open(sheet) as image:
        assert image.size == (4 * 260 - 4, 3 * 196 - 4)  # twelve frames, four in a row
    shown = capsys.readouterr()
    assert f"{out}: 33 frames, 2.1 s" in shown.out
    assert "chunk 3/3" in shown.err
    assert "FPS, cache" in shown.err


def test_the_options_reach_the_request(tiny, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "write_video", lambda pipeline, request, out, sheet: seen.append(request) or 0)
    options = (
        "--mode window --window 9 --sink 2 --persistent 3 --topk 0.5 --positions absolute --backend reference "
        "--no-dense-first-chunk --keep attention --page-bits 8 --router quarters "
        "--offload-pages"
    )
    assert run(*SMALL, *options.split(), "--chunk", "3", "--seed", "9", "--frames", "21") == 0
    (request,) = seen
    attention = request.attention
    assert (attention.mode, attention.window_frames, attention.sink_frames) == ("window", 9, 2)
    assert (attention.persistent_frames, attention.topk, attention.positions) == (3, 0.5, "absolute")
    assert (attention.dense_first_chunk, attention.keep) == (False, "attention")
    assert (attention.page_bits, attention.router, attention.offload_pages) == (8, "quarters", True)
    assert (attention.backend, request.seed, request.latent_frames) == ("reference", 9, 6)
    assert (request.width, request.height, request.prompt) == (64, 48, SMALL[2])


@pytest.mark.parametrize("mode", ["sparse", "window", "dense"])
def test_the_model_gets_the_memory_it_was_trained_with(mode):
    attention, _ = cli.configs(cli.parser().parse_args([*SMALL, "--mode", mode]))
    positions = "absolute" if mode == "dense" else "rebased"
    assert attention == replace(ATTENTION, mode=mode, positions=positions)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "Stopped after 1 of 3 chunks; what was finished is kept."),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), 1, "Out of memory"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), 1, "Out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "Out of memory"),
        (MemoryError(), 1, "Out of memory"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
    ],
)
def test_what_is_finished_is_kept(tiny, tmp_path, monkeypatch, capsys, error, code, words):
    out, generate = tmp_path / "a.mp4", tiny.generate

    def broken(request, on_pass):
        yield next(generate(request, on_pass))
        raise error

    monkeypatch.setattr(tiny, "generate", broken)
    assert run(*SMALL, "--frames", "33", "--out", out, "--sheet", tmp_path / "a.png") == code
    assert frames_in(out) == 9
    assert (tmp_path / "a.png").exists()
    shown = capsys.readouterr()
    assert words in shown.err
    assert f"{out}: 9 frames" in shown.out


def test_stopped_before_anything_is_finished(tiny, tmp_path, monkeypatch, capsys):
    old = tmp_path / "a.mp4"
    old.write_bytes(b"the video of yesterday")

    def broken(request, on_pass):
        on_pass(0, 0, 5)
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(tiny, "generate", broken)
    assert run(*SMALL, "--out", old) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert old.read_bytes() == b"the video of yesterday"


def test_other_errors_are_not_hidden(tiny, tmp_path, monkeypatch):
    def broken(request, on_pass):
        raise RuntimeError("shapes do not match")
        yield

    monkeypatch.setattr(tiny, "generate", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        run(*SMALL, "--out", tmp_path / "a.mp4")


def test_a_backend_that_cannot_run_says_why(tiny, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("here Triton may run")
    assert run(*SMALL, "--backend", "triton", "--out", tmp_path / "a.mp4") == 2
    assert "backend 'triton' cannot run" in capsys.readouterr().err


def test_missing_weights_are_one_line(tmp_path, monkeypatch, capsys):
    def missing(*_):
        raise FileNotFoundError("world_dit.safetensors is missing")

    monkeypatch.setattr("sparse_forcing_pack.sparse_attn.pipeline.load_world_model", missing)
    assert run(*SMALL, "--out", tmp_path / "a.mp4") == 1
    assert capsys.readouterr().err == "world_dit.safetensors is missing\n"


@pytest.mark.skipif(not DIT_FILE.exists(), reason="the world model's weights are not in this checkout")
def test_one_chunk_of_the_embedded_world_model(tmp_path):
    assert run(*SMALL, "--frames", "9", "--out", tmp_path / "a.mp4") == 0
    assert frames_in(tmp_path / "a.mp4") == 9


# --- progress and info ---


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("output", [io.StringIO(), Terminal()])
def test_progress_on_a_terminal_and_in_a_log(pipeline, output):
    from sparse_forcing_pack.sparse_attn.pipeline import Request

    progress = Progress(2, output)
    for chunk in pipeline.generate(Request("a", 6, 32, 32), on_pass=progress.on_pass):
        progress.on_chunk(chunk)
    progress.finish()
    text = output.getvalue()
    if output.isatty():
        assert "chunk 1/2, pass 1/17, warming up" in text
        assert text.split("\r")[-1].startswith("[########################] chunk 2/2, ")
    else:
        assert [line.split(",")[0] for line in text.splitlines()] == ["chunk 1/2", "chunk 2/2"]
        assert "\r" not in text
    assert "FPS, cache" in text


def test_sizes_for_people():
    assert [size(n) for n in (12, 1500, 2_000_000, 6_040_000_000)] == [
        "12 B",
        "1.50 kB",
        "2.00 MB",
        "6.04 GB",
    ]


def test_info_says_what_there_is(tiny, capsys):
    assert run("info") == 0
    text = capsys.readouterr().out
    for words in (
        cli.VERSION,
        f"torch {torch.__version__.split('+')[0]}",
        "cpu, ",
        "reference: available",
        "triton: ",
    ):
        assert words in text
    assert "World model: 2 layers, 1 heads x 128" in text
    # METHOD: 287.5 MB a latent frame of Wan 1.3B at 480x832.
    assert "dense  5 s: 6,038.3 MB, 60 s: 69,009.4 MB" in text


def test_info_without_weights(monkeypatch, capsys):
    def missing(*_):
        raise FileNotFoundError("world_dit.safetensors is missing")

    monkeypatch.setattr("sparse_forcing_pack.sparse_attn.pipeline.load_world_model", missing)
    assert run("info") == 0
    assert "World model: world_dit.safetensors is missing" in capsys.readouterr().out


def test_convert_writes_what_comfyui_opens(tmp_path, capsys):
    source, target = tmp_path / "self_forcing.pt", tmp_path / "out.safetensors"
    weights = WanModel(dim=256, ffn_dim=256, num_heads=2, num_layers=1).state_dict()
    torch.save({"generator_ema": {f"model.{name}": tensor for name, tensor in weights.items()}}, source)
    assert run("convert", str(source), str(target), "--dtype", "bf16") == 0
    shown = capsys.readouterr().out
    assert "unwrapped generator_ema" in shown and "Self-Forcing" in shown
    found, metadata = read_checkpoint(target)
    assert is_causal_ar(metadata) and found.keys() == weights.keys()
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert run("convert", str(source), str(target)) == 2
    assert "exists: choose another name, or force" in capsys.readouterr().err
    assert run("convert", str(tmp_path / "nothing.pt"), str(target), "--force") == 1
