"""Tensors of all layers that rest in the host's memory: the layer in use and the one after it are on the device.

A pass takes the layers in their order, so the next one can be copied while this one computes: the copies run on a
stream of their own, from and to memory that the device reads by itself (pinned). Without CUDA they are plain copies.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .frame_queue import side_stream

logger = logging.getLogger("sparse_forcing.offload")


class HostLayers:
    """`count` tensors [L, G, R, ...] of one dtype in the host's memory, zeros at first; two layers' room on `device`.

    room: a layer there is [G, room, ...], of which the first R entries are the host's; default R.
    take -> change in place -> keep, layer by layer; what is not kept is lost when the second layer after it is taken.
    Nothing waits: the device's current stream waits for copies, and they for it. On device "meta" nothing is allocated.
    """

    def __init__(
        self,
        count: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str,
        room: int | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.tensors = [_host_zeros(shape, dtype, self.device) for _ in range(count)]
        # [2, G, room, ...] each: of even and of odd layers
        sizes = 2, shape[1], room or shape[2], *shape[3:]
        self.room = [torch.zeros(sizes, dtype=dtype, device=device) for _ in range(count)]
        self._copies = side_stream(self.device, "offload") if self.device.type == "cuda" else None
        self._ahead: tuple[int, torch.cuda.Event | None] | None = None  # the layer that is on its way

    def take(self, layer: int) -> list[Tensor]:
        """The tensors of a layer on the device, as they were kept; the copy of the next one begins."""
        if self._ahead is None or self._ahead[0] != layer:
            self._load(layer)
        assert self._ahead is not None
        if self._ahead[1] is not None:
            torch.cuda.current_stream(self.device).wait_event(self._ahead[1])
        self._ahead = None
        if layer + 1 < len(self.tensors[0]):
            self._load(layer + 1)
        return self.at(layer)

    def at(self, layer: int) -> list[Tensor]:
        """Where `take` has put a layer."""
        return [both[layer % 2] for both in self.room]

    def keep(self, layer: int, first: int | None = None) -> None:
        """Copy a layer that was taken back to the host's memory, or only its `first` tensors."""
        with self._behind_the_device():
            for tensor, there in list(zip(self.tensors, self.at(layer)))[:first]:
                _copy(there, tensor[layer], to_room=False)
        if layer + 1 == len(self.tensors[0]):
            self.join()  # a pass ends with all of its copies

    def join(self) -> None:
        """Let what the device does next wait for all copies; a layer on its way is taken anew."""
        self._ahead = None
        if self._copies is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._copies)

    def wait(self) -> None:
        """Wait until all copies are done, so that the host may read and write."""
        self._ahead = None
        if self._copies is not None:
            self._copies.synchronize()

    @property
    def nbytes(self) -> int:
        """Bytes in the host's memory."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def _load(self, layer: int) -> None:
        """Begin to copy a layer to the device, behind what uses its room now."""
        with self._behind_the_device():
            for tensor, there in zip(self.tensors, self.at(layer)):
                _copy(there, tensor[layer], to_room=True)
        self._ahead = layer, None if self._copies is None else self._copies.record_event()

    def _behind_the_device(self) -> AbstractContextManager:
        """Where copies are made: on their own stream, once the device has done what it was given so far."""
        if self._copies is None:
            return nullcontext()
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._copies)


def _copy(room: Tensor, host: Tensor, to_room: bool) -> None:
    """Between room [G, room, ...] and host [G, R, ...], a group at a time where the room is longer: what is not
    contiguous would be copied twice."""
    pairs = [(room, host)] if room.shape == host.shape else [(a[: len(b)], b) for a, b in zip(room, host)]
    for there, here in pairs:
        (there if to_room else here).copy_(here if to_room else there, non_blocking=True)


def _host_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros in the host's memory, pinned where a CUDA device is to read them and as much can be pinned."""
    if device.type != "cuda":
        return torch.zeros(shape, dtype=dtype, device="meta" if device.type == "meta" else "cpu")
    try:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)
    except RuntimeError as error:
        logger.warning(
            "The memory of past frames cannot be pinned in the host's memory (%s): copying it will be slow.",
            str(error).strip().splitlines()[0],
        )
        return torch.zeros(shape, dtype=dtype)
