"""benchmarks/critic_fit.py on a toy: the loss falls, and every share starts from the same weights."""

import json
from types import SimpleNamespace

import pytest
import torch
from sparse_forcing_pack.sparse_attn.world.text import PAD


@pytest.fixture
def command(load_command):
    return load_command("critic_fit")


def test_critics_of_every_share_are_compared(command, monkeypatch, make_model, tmp_path, capsys):
    model = make_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    world = SimpleNamespace(dit=model, vae=None, text=lambda ids: torch.ones(len(ids), 512, 32))

    def clips(_vae, count, seed, _device):
        latents = torch.randn(count, 17, 3, 4, 6, generator=torch.Generator().manual_seed(seed))
        return SimpleNamespace(latents=latents, ids=torch.full((count, 4), PAD), filled=count)

    monkeypatch.setattr(command.world_model, "load_world_model", lambda device: world)
    monkeypatch.setattr(command, "clips", clips)
    monkeypatch.setattr(command.common, "channels_last", lambda vae: vae)
    numbers = {"--steps": 60, "--batch": 4, "--clips": 4, "--lr": 1e-3, "--block-tokens": 4}
    given = [str(part) for pair in numbers.items() for part in pair]
    command.main(["--topk", "1", "0.5", *given, "--device", "cpu", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "critic_fit.json").read_text())["found"]
    for share in ("1.0", "0.5"):
        assert sum(found[share]["loss"]) < 0.9 * sum(found[share]["untrained"])
    assert all(row == [0, 0, 0] for row in found["1.0"]["more_than_first"])
    assert any(row[0] != 0 for row in found["0.5"]["more_than_first"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert "topk 0.5  loss at noise 0.3" in capsys.readouterr().out
