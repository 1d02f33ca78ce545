"""The embedded weights, where the checkout has them."""

import pytest
import torch
from sparse_forcing_pack.sparse_attn.world import model as world_model


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def world():
    """The embedded world model in float32 on the CPU."""
    missing = [
        path.name
        for path in (world_model.DIT_FILE, world_model.VAE_FILE, world_model.TEXT_FILE)
        if not path.is_file()
    ]
    if missing:
        pytest.skip(f"sparse_attn/world/weights lacks {', '.join(missing)}")
    return world_model.load_world_model()
