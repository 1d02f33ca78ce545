"""Two processes train what one does: torchrun, gloo, FSDP2, on the CPU."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("worker.py")
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this torch has no gloo: two processes on a CPU cannot talk",
)


def start(folder, stage, until, launch=((),)):
    """Train to step `until`, in a plain process or under one torchrun a node, each with the arguments given."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [str(WORKER), str(folder), stage, str(until)]
    nodes = [
        subprocess.Popen(
            [sys.executable, *node, *arguments], stderr=subprocess.PIPE, text=True, env=environment
        )
        for node in launch
    ]
    for node in nodes:
        _, errors = node.communicate(timeout=300)
        assert node.returncode == 0, errors[-4000:]


def torchrun(nodes, processes):
    """Arguments of each node's torchrun; all nodes are this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = ["-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={processes}"]
    shared += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    return [[*shared, f"--node-rank={node}"] for node in range(nodes)]


def assert_same(a, b):
    for name in ("student", "critic", "average", "student_optimizer", "critic_optimizer"):
        one, two = (load_file(folder / "step_00000003" / f"{name}.safetensors") for folder in (a, b))
        assert one.keys() == two.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(
                tensor, two[key], atol=2e-4, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}"
            )


@pytest.mark.parametrize(("stage", "nodes", "processes"), [("DmdTraining", 2, 1), ("LongTuning", 1, 2)])
def test_two_processes_train_what_one_does(tmp_path, stage, nodes, processes):
    start(tmp_path / "one", stage, 3)
    start(tmp_path / "two", stage, 2, torchrun(nodes, processes))
    start(tmp_path / "two", stage, 3, torchrun(nodes, processes))  # from the checkpoint of the step before
    assert_same(tmp_path / "one", tmp_path / "two")
    first = load_file(tmp_path / "one" / "step_00000002" / "student.safetensors")
    last = load_file(tmp_path / "one" / "step_00000003" / "student.safetensors")
    assert any((last[k] - first[k]).abs().max() > 5e-4 for k in first), (
        "a step moves weights by more than is allowed"
    )
