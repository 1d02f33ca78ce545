"""benchmarks/train_dmd.py: its settings, what it says a run costs, and each of its commands on a toy."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sparse_forcing_pack.sparse_attn.config import AttentionConfig
from sparse_forcing_pack.sparse_attn.training import cost
from sparse_forcing_pack.sparse_attn.training.dmd_config import DmdTraining, LongTuning
from sparse_forcing_pack.sparse_attn.wan import WanModel

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def command(load_command):
    return load_command("train_dmd")


def test_the_ready_configurations_are_valid(command):
    first = command.read_config(BENCHMARKS / "dmd_wan_1.3b.json", ["batch=8"])
    assert isinstance(first, DmdTraining)
    first.validate(8)
    assert (first.batch, first.topk_at(0), first.topk_at(200)) == (8, 1.0, 0.25)
    second = command.read_config(BENCHMARKS / "dmd_wan_1.3b_long.json", [])
    assert isinstance(second, LongTuning)
    second.validate(64)
    assert second.attention.positions == "rebased"
    with pytest.raises(ValueError, match="DmdTraining has no bach: its fields are attention, batch"):
        command.read_config(None, ["bach=8"])


def test_a_file_of_rows_needs_the_negative_prompt(command, tmp_path):
    save_file({"a": torch.ones(3, 8)}, tmp_path / "rows.safetensors")
    with pytest.raises(ValueError, match="holds a: it needs one tensor .* 'negative'"):
        command.read_prompts(tmp_path / "rows.safetensors")


def test_a_run_from_files_goes_on_where_it_stopped(command, tmp_path, make_model):
    for name in ("student", "critic", "teacher"):
        model = make_model(len(name), layers=1)
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    rows = {"a": torch.randn(3, 32), "b": torch.randn(5, 32), "negative": torch.zeros(1, 32)}
    save_file(rows, tmp_path / "rows.safetensors")
    files = [f"--{name}={tmp_path / name}.safetensors" for name in ("student", "critic", "teacher", "rows")]
    settings = ["batch=2", "steps=3", "frames=6", "bf16=false", "save_every=2"]
    arguments = ["train", *files, "--out", str(tmp_path / "run"), "--device", "cpu", "--latent", "4", "6"]
    command.main([*arguments, "--until", "2", "--set", *settings])
    command.main([*arguments, "--set", *settings])
    assert [p.name for p in sorted((tmp_path / "run").glob("step_*"))] == ["step_00000002", "step_00000003"]
    with pytest.raises(SystemExit):
        command.main(["train", *files[:3]])


def test_the_step_benchmark_runs_on_a_toy(command, tmp_path):
    settings = ["--device", "cpu", "--block-tokens", "4", "--set", "critic_topk=0.5", "--exits", "1"]
    command.main(["step", "--size", "toy", *settings, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "step.json").read_text())
    assert found["dense_over_sparse"].keys() == {"sparse", "sparse, critic too"}
    for mode in ("sparse", "dense", "sparse, critic too"):
        assert found[mode]["step_s"] > 0 and found[mode]["student_s"] > 0
        assert found[mode]["peak_gib"] > 0


def test_cost_is_printed(command, capsys):
    command.main(["cost", "--gpus", "8", "--latent", "60", "104"])
    assert "TFLOP a clip, student's step" in capsys.readouterr().out


WIDTHS = {"dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 2}


def test_products_are_counted_as_by_hand():
    """A token costs two operations a weight of the linear layers it goes through."""
    tokens = (3, 4, 5)
    _, _, flops = cost._pass(WIDTHS, tokens)
    model = WanModel(**WIDTHS)
    through = 0
    for name, p in model.named_parameters():
        linear = p.ndim == 2 or name == "patch_embedding.weight"
        if (
            linear
            and "text" not in name
            and "time" not in name
            and "cross_attn.k" not in name
            and "cross_attn.v" not in name
        ):
            through += p.numel()
    cross = 4 * 60 * 512 * WIDTHS["dim"] * WIDTHS["num_layers"]
    per_frame = sum(p.numel() for n, p in model.named_parameters() if "time_" in n and p.ndim == 2)
    assert flops == pytest.approx(2 * through * 60 + cross + 2 * 3 * per_frame, rel=0.01)


def test_pairs_are_those_that_a_rollout_reads():
    """In frames: dense reads 3, 6, .. 21; sparse at most 6 persistent and a quarter of 6, the first chunk itself."""
    dense = cost.chunk_pairs(DmdTraining(attention=AttentionConfig(mode="dense")), 1)
    assert dense == 3 * sum(range(3, 22, 3)) / 7
    sparse = cost.chunk_pairs(DmdTraining(), 1)
    assert sparse == 3 * (3 + 1.5 + 4.5 + 4 * 7.5) / 7
    window = cost.chunk_pairs(DmdTraining(attention=AttentionConfig(mode="window", window_frames=12)), 1)
    assert window == 3 * (3 + 6 + 9 + 4 * 12) / 7


def test_cost_follows_the_settings():
    grid = (30, 52)
    base = cost.cost_of(DmdTraining(), "1.3B", "1.3B", grid)
    split = cost.cost_of(DmdTraining(), "1.3B", "14B", grid, gpus=8)
    kept = cost.cost_of(DmdTraining(recompute_student=True), "1.3B", "1.3B", grid)
    dense = cost.cost_of(DmdTraining(attention=AttentionConfig(mode="dense")), "1.3B", "1.3B", grid)
    assert base.memory["student, critic"] == pytest.approx(2 * 16 * 1.42e9, rel=0.01)
    assert split.memory["student, critic"] == pytest.approx(base.memory["student, critic"] / 8)
    assert split.memory["teacher"] == pytest.approx(2 * 14.3e9 / 8, rel=0.01)
    assert kept.memory["activations"] < base.memory["activations"]
    assert kept.student_step["replay"] > base.student_step["replay"]
    assert dense.memory["cache"] == 184_320 * 1560 * 21
    assert sum(dense.student_step.values()) > 1.1 * sum(base.student_step.values())
    assert base.hours(DmdTraining(), 8, 1e14) == pytest.approx(2 * base.hours(DmdTraining(), 16, 1e14))
