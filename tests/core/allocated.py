"""How much memory tensors take while something runs, counted tensor by tensor on any device."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors_in(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Allocated(TorchDispatchMode):
    """Bytes of the tensors made in it: those that live now, and the most that ever did at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tensors_in((args, kwargs)):
            self.add(tensor.untyped_storage(), made=False)
        out = function(*args, **(kwargs or {}))
        for tensor in tensors_in(out):
            self.add(tensor.untyped_storage(), made=True)
        return out

    def add(self, storage, made):
        key, size = storage._cdata, storage.nbytes() if made else 0
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key, size):
        self.known.discard(key)
        self.now -= size
