"""The embedded weights, where the checkout has them."""

import pytest
from sparse_forcing_pack.sparse_attn.world import model as world_model


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
