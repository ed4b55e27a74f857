"""Notices changes of a module's structure between calls, faster than an inspection of all its layers."""

import torch
from torch import nn

from .hooks import HOOKS, is_untouched

_TENSORS = ("_parameters", "_buffers")


class Snapshot:
    """The layers, options and tensors of a module without hooks, as they were when this was created.

    The values of the tensors are not part of it. It does not keep the module itself alive.
    """

    def __init__(self, module: nn.Module):
        modules = list(module.modules())
        self._attributes = [(vars(m), dict(vars(m))) for m in modules]
        self._layers = [(m._modules, dict(m._modules)) for m in modules]
        self._tensors = [(vars(m)[kind], _present(vars(m)[kind])) for m in modules for kind in _TENSORS]
        self._hooks = [vars(m)[name] for m in modules for name in HOOKS]

    def holds(self) -> bool:
        """Whether the module still has the same layers and options, and no hooks."""
        if any(self._hooks) or not is_untouched():
            return False
        return (
            all(now == then for now, then in self._attributes)
            and all(now == then for now, then in self._layers)
            and all(_present(now) == then for now, then in self._tensors)
        )

    def tensors(self) -> list[torch.Tensor]:
        """The current parameters and buffers, except those of integers, such as the number of batches."""
        present = (tensors[name] for tensors, names in self._tensors for name in names)
        return [tensor for tensor in present if tensor.is_floating_point()]


def _present(tensors):
    """The names of the tensors that are not None."""
    return [name for name, tensor in tensors.items() if tensor is not None]
