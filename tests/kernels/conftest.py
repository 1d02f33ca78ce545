"""Put this folder's helper module on the path and let every kernel test see the backends that run here."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _backends() -> list[tuple[str, str]]:
    if INTERPRETED:  # the reference runs in the process that started this one
        return [("triton", "cpu")]
    found = [("reference", "cpu")]
    if torch.cuda.is_available():
        found += [("reference", "cuda"), ("triton", "cuda")]
    return found


@pytest.fixture(params=_backends(), ids="-".join)
def backend(request) -> tuple[str, str]:
    """(backend, device), each that can run in this process."""
    return request.param
