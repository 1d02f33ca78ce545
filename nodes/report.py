"""What nodes that report share: text that is seen on the node, and a picture as an IMAGE."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def show_text(text: str, node_id: str | None) -> None:
    """Write `text` on the node of that id, where a server is running."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)


def as_image(picture: Image.Image) -> Tensor:
    """The host's IMAGE of one picture: [1, H, W, 3] float32 in 0..1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32) / 255)[None]
