"""A whole run on a toy: it learns, it resumes bit for bit, and how the batch is split changes nothing."""

import csv
import functools
from types import SimpleNamespace

import pytest
import torch
from sparse_forcing_pack.sparse_attn.training import dmd, dmd_run
from sparse_forcing_pack.sparse_attn.training.checkpoints import newest
from sparse_forcing_pack.sparse_attn.training.dmd_config import DmdTraining, LongTuning, seed_of
from sparse_forcing_pack.sparse_attn.training.dmd_prompts import prompt_of

LONG = {"frames": 6, "new_frames": 3, "rollout_frames": 12}


class Point(torch.nn.Module):
    """A teacher that knows one video: its score leads there from everywhere."""

    def __init__(self, target):
        super().__init__()
        self.target = target

    def cross_kv(self, rows):
        return []

    def forward(self, x, timestep, cross_kv, attend):
        return (x - self.target) / (timestep[:, None, :, None, None] / 1000)


def distance(run, target):
    """How far one of the student's clips is from the target."""
    rows = run.prompts.batch([0], "cpu")
    run.memory.reset()
    made = dmd.roll(run.student, run.memory, rows, run.cfg.sampler, (1, *run.shape), 0, run.cfg.frames, (9,))
    return (made.clip - target).square().mean().item()


def test_the_student_moves_to_the_teacher_and_the_critic_to_the_student(make_run, tmp_path):
    target = 0.5 * torch.ones(1, 16, 6, 4, 6)
    run = make_run(
        tmp_path, teacher=Point(target), steps=24, frames=6, student_every=1, batch=1, student_lr=3e-3,
        critic_lr=3e-3,
    )  # fmt: skip
    before = distance(run, target)
    run.run()
    assert distance(run, target) < 0.75 * before
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    critic = [float(row["critic_loss"]) for row in rows]
    assert sum(critic[-6:]) / 6 < 0.85 * sum(critic[:3]) / 3, critic  # each step draws its own noise
    assert [int(row["step"]) for row in rows] == list(range(24))
    assert all(float(row["clips_per_second"]) > 0 and float(row["peak_gib"]) > 0 for row in rows)


def everything(run):
    states = {}
    for name in ("student", "average", "critic"):
        states |= {f"{name}.{k}": v for k, v in getattr(run, name).state_dict().items()}
    for name in ("student_optimizer", "critic_optimizer"):
        for i, state in getattr(run, name).state_dict()["state"].items():
            states |= {f"{name}.{i}.{k}": v for k, v in state.items()}
    for micro, stream in run.streams.items():
        # pages that are free hold what another stream left
        states |= {
            f"stream.{micro}.{k}": v for k, v in stream.memory.items() if "page" not in k and k != "pooled"
        }
        states |= {f"latents.{micro}": stream.window}
    return states


@pytest.mark.parametrize(("cls", "changes"), [(DmdTraining, {"ramp_interval": 3}), (LongTuning, LONG)])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_resumes_bit_for_bit(make_run, tmp_path, cls, changes, stop):
    whole = make_run(tmp_path / "whole", cls, **changes)
    whole.run()
    make_run(tmp_path / "cut", cls, save_every=stop, **changes).run(until=stop)
    again = make_run(tmp_path / "cut", cls, **changes)
    torch.manual_seed(99)  # nothing may hang on the global generator
    assert again.resume()
    assert again.step_number == stop
    again.run()
    expected, found = everything(whole), everything(again)
    assert expected.keys() == found.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]
    assert not different
    steps = [row["step"] for row in csv.DictReader((tmp_path / "cut" / "metrics.csv").open())]
    assert steps == ["0", "1", "2", "3"]


def test_another_runs_checkpoint_is_refused(make_run, tmp_path):
    make_run(tmp_path, save_every=1).run(until=1)
    with pytest.raises(ValueError, match="student_every was 2, now 3. Use its settings, or another folder"):
        make_run(tmp_path, student_every=3).resume()
    assert not make_run(tmp_path / "empty").resume()


def test_a_checkpoint_that_was_cut_short_is_none(make_run, tmp_path):
    run = make_run(tmp_path, save_every=1, steps=3)
    (tmp_path / "unfinished").mkdir(parents=True)
    assert newest(tmp_path) is None
    run.run()
    assert [path.name for path in sorted(tmp_path.glob("step_*"))] == ["step_00000002", "step_00000003"]
    assert not (tmp_path / "unfinished").exists()


@pytest.mark.parametrize("cls", [DmdTraining, LongTuning])
def test_accumulated_clips_train_as_one_batch(make_run, tmp_path, cls):
    changes = {"steps": 3, "clean_weight": 0.1} | (LONG if cls is LongTuning else {"frames": 6})
    apart, together = (
        make_run(tmp_path / str(size), cls, batch=4, micro_batch=size, **changes) for size in (1, 4)
    )
    apart.run()
    together.run()
    for name in ("student", "critic", "average"):
        pairs = zip(getattr(apart, name).parameters(), getattr(together, name).parameters())
        for a, b in pairs:
            torch.testing.assert_close(a, b, atol=2e-4, rtol=0)


def test_the_average_is_the_students(make_run, tmp_path):
    run = make_run(tmp_path, student_every=1, ema=0.75, ema_from=2)
    history = []
    for _ in range(4):
        run.step()
        history.append([p.detach().clone() for p in run.student.parameters()])
    expected = [b.clone() for b in history[1]]
    for weights in history[2:]:
        expected = [0.75 * a + 0.25 * b for a, b in zip(expected, weights)]
    for a, b in zip(run.average.parameters(), expected):
        torch.testing.assert_close(a, b)
    assert not any(p.requires_grad for p in run.average.parameters())


def test_the_teacher_does_not_change(make_run, tmp_path):
    run = make_run(tmp_path, steps=2, student_every=1)
    before = {k: v.clone() for k, v in run.teacher.state_dict().items()}
    run.run()
    assert all(torch.equal(v, before[k]) for k, v in run.teacher.state_dict().items())


@pytest.mark.parametrize("name", ["recompute_student", "recompute_critic"])
def test_recomputed_activations_train_the_same(make_run, tmp_path, name):
    runs = [make_run(tmp_path / str(on), frames=6, student_every=1, **{name: on}) for on in (False, True)]
    for run in runs:
        run.step()
    for part in ("student", "critic"):
        a, b = (getattr(run, part).state_dict() for run in runs)
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_bfloat16_products_train_float32_weights(make_run, tmp_path):
    run = make_run(tmp_path, frames=6, student_every=1, bf16=True, recompute_critic=True)
    seen = set()
    run.student.blocks[0].ffn[0].register_forward_hook(lambda m, i, out: seen.add(out.dtype))
    before = {k: v.clone() for k, v in run.student.state_dict().items()}
    values = run.step()
    assert seen == {torch.bfloat16}
    assert run.memory.cache.k_pages.dtype == torch.bfloat16
    assert values["critic_loss"] > 0
    changed = [k for k, v in run.student.state_dict().items() if not torch.equal(v, before[k])]
    assert changed == list(before), "every weight learns, also those a pass without gradients cast before"
    assert all(v.dtype == torch.float32 for v in run.student.state_dict().values())


def test_prompts_come_in_turn():
    order = [prompt_of(0, clip, 3) for clip in range(60)]
    assert all(sorted(order[i : i + 3]) == [0, 1, 2] for i in range(0, 60, 3))
    assert len({tuple(order[i : i + 3]) for i in range(0, 60, 3)}) > 3
    assert prompt_of(1, 0, 1000) != prompt_of(0, 0, 1000)


def test_sheets_show_the_averages_clips(make_run, tmp_path):
    """Every sheet_every steps, a row a prompt, of the averaged weights at the full schedule."""
    seen = []

    def decode(z):
        seen.append(z)
        return z.mean(1, keepdim=True).expand(-1, 3, -1, -1, -1)

    vae = SimpleNamespace(decode=decode, parameters=lambda: iter([torch.zeros(1)]))
    run = make_run(tmp_path, steps=3, frames=6, sheet_every=2, vae=vae)
    run.run(until=2)
    assert [path.name for path in tmp_path.glob("sheet_*")] == ["sheet_00000002.png"]
    assert [z.shape for z in seen] == 3 * [(1, 16, 6, 4, 6)]
    run.memory.reset()
    rows = run.prompts.batch([1], "cpu")
    seeds = (seed_of(run.cfg.seed, "sheet", 1),)
    made = dmd.roll(run.average, run.memory, rows, run.cfg.sampler, (1, *run.shape), 0, 6, seeds)
    torch.testing.assert_close(seen[1], made.clip)


def test_the_long_window_begins_with_an_image(make_run, tmp_path):
    """A window that goes on shows the frames before the new ones; with a VAE its first latent is an image's."""
    vae = SimpleNamespace(
        decode=lambda z: z.mean(1, keepdim=True).expand(-1, 3, -1, -1, -1),
        encode=lambda v: 100 + v.mean(1, keepdim=True).expand(-1, 16, -1, -1, -1),
        parameters=lambda: iter([torch.zeros(1)]),
    )
    plain, seen = make_run(tmp_path / "a", LongTuning, batch=1, **LONG), []
    imaged = make_run(tmp_path / "b", LongTuning, batch=1, vae=vae, **LONG)
    for run in (plain, imaged):
        run.step()
        before = run.streams[0]
        new = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(1))
        seen.append((before.window, run._window(new, before)))
    (window, view), (_, image_view) = seen
    assert torch.equal(view, torch.cat([window[:, :, 3:], seen[0][1][:, :, 3:]], 2))
    assert torch.equal(image_view[:, :, 1:], view[:, :, 1:])
    torch.testing.assert_close(
        image_view[:, :, 0], 100 + window[:, :, 3].mean(1, keepdim=True).expand(-1, 16, -1, -1)
    )


def assert_same_run(one, other, atol=2e-4):
    for name in ("student", "critic", "average"):
        pairs = zip(getattr(one, name).named_parameters(), getattr(other, name).parameters())
        for (key, mine), theirs in pairs:
            torch.testing.assert_close(
                mine, theirs, atol=atol, rtol=1e-3, msg=lambda m, key=key: f"{key}: {m}"
            )


def test_compiled_blocks_make_the_same_run(make_run, tmp_path, monkeypatch):
    changes = {"recompute_critic": True, "steps": 2}
    plain = make_run(tmp_path / "plain", **changes)
    plain.run()
    backend = functools.partial(dmd_run.compile_blocks, backend="aot_eager")  # a CPU may lack a compiler
    monkeypatch.setattr(dmd_run, "compile_blocks", backend)
    torch._dynamo.reset()
    compiled = make_run(tmp_path / "compiled", compile=True, **changes)
    compiled.run()
    assert_same_run(compiled, plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 4


@pytest.mark.parametrize(("cls", "changes"), [(DmdTraining, {"micro_batch": 2}), (LongTuning, LONG)])
def test_the_fused_student_makes_the_same_run(make_run, tmp_path, monkeypatch, cls, changes):
    """Passes without gradients may run fused; a CPU does so here, where both are exact but for rounding."""
    plain = make_run(tmp_path / "plain", cls, **changes)
    plain.run()
    monkeypatch.setattr(type(plain), "_fuses", lambda self: True)
    fused = make_run(tmp_path / "fused", cls, **changes)
    calls = []
    run = fused.fused.run
    fused.fused.run = lambda *args: calls.append(args[1]) or run(*args)
    fused.run()
    assert 0.0 in calls and max(calls) == 1, "the rollout's passes and the clean ones"
    assert_same_run(fused, plain)
    moved = next(fused.student.parameters()) - next(
        make_run(tmp_path / "new", cls, **changes).student.parameters()
    )
    assert moved.abs().max() > 1e-3, "the student has learned, and its copy followed it"
