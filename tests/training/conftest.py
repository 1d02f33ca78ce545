"""A model of 128 channels and two layers, latents of 4 x 6, a run of such models, and the benchmarks as modules."""

import importlib.util
from pathlib import Path

import pytest
import torch
from sparse_forcing_pack.sparse_attn.config import AttentionConfig
from sparse_forcing_pack.sparse_attn.training.dmd_config import DmdTraining
from sparse_forcing_pack.sparse_attn.training.dmd_prompts import Prompts
from sparse_forcing_pack.sparse_attn.training.dmd_run import DmdRun
from sparse_forcing_pack.sparse_attn.wan import WanModel

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SHAPE = (16, 4, 6)
ATTENTION = AttentionConfig(block_tokens=4, topk=0.25, window_frames=6, persistent_frames=3, sink_frames=3)
TOY = {
    "steps": 4, "batch": 2, "frames": 12, "attention": ATTENTION, "student_every": 2, "student_lr": 1e-3,
    "critic_lr": 1e-3, "ema": 0.5, "ema_from": 1, "bf16": False, "recompute_critic": False, "sheet_every": 100,
}  # fmt: skip
LONG = {"new_frames": 3, "rollout_frames": 12}


def toy_model(seed=0, heads=1, layers=2):
    torch.manual_seed(seed)
    model = WanModel(dim=128, ffn_dim=128, num_heads=heads, num_layers=layers, text_dim=32, freq_dim=32)
    model.init_weights()
    torch.nn.init.normal_(
        model.head.head.weight, std=0.05
    )  # zero at the start, which would stop all gradients
    return model


def toy_prompts():
    generator = torch.Generator().manual_seed(7)
    return Prompts([torch.randn(3 + i, 32, generator=generator) for i in range(3)], torch.zeros(1, 32))


def toy_run(folder, cls=DmdTraining, teacher=None, vae=None, processes=None, **changes):
    teacher = teacher or toy_model(2)
    cfg = cls(**(TOY | changes))
    models = (toy_model(0), toy_model(1), teacher)
    return DmdRun(cfg, *models, toy_prompts(), SHAPE, folder, processes, vae)


@pytest.fixture(scope="session")
def make_run():
    return toy_run


@pytest.fixture(scope="session")
def make_model():
    return toy_model


@pytest.fixture
def load_command(monkeypatch):
    """The program of this name in benchmarks/, as a module."""

    def load(name):
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        spec = importlib.util.spec_from_file_location(f"{name}_command", BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
