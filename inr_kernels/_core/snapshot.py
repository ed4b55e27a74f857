"""Notices changes of a module's structure between calls, faster than an inspection of all its layers."""

import torch
from torch import nn

from .hooks import HOOKS, is_untouched

_OPTIONS = (bool, int, float, str, tuple, type(None))


class Snapshot:
    """The layers, options and tensors of a module without hooks, as they were when this was created.

    Options are attributes that are numbers, texts or tuples. The values of the tensors are not part of it.
    """

    def __init__(self, module: nn.Module):
        self._modules = list(module.modules())
        self._types = list(map(type, self._modules))
        self._layers = [dict(m._modules) for m in self._modules]
        self._options = [_options(m) for m in self._modules]
        self._tensors = [_present(tensors) for m in self._modules for tensors in (m._parameters, m._buffers)]
        self._hooks = [vars(m)[name] for m in self._modules for name in HOOKS]

    def holds(self) -> bool:
        """Whether the module still has the same layers and options, and no hooks."""
        if any(self._hooks) or not is_untouched() or list(map(type, self._modules)) != self._types:
            return False
        for m, layers, (names, values) in zip(self._modules, self._layers, self._options, strict=True):
            attributes = vars(m)
            if m._modules != layers or "forward" in attributes or list(map(attributes.get, names)) != values:
                return False
        dicts = (tensors for m in self._modules for tensors in (m._parameters, m._buffers))
        return all(_present(now) == then for now, then in zip(dicts, self._tensors, strict=True))

    def tensors(self) -> list[torch.Tensor]:
        """The current parameters and buffers, except those of integers, such as the number of batches."""
        dicts = (tensors for m in self._modules for tensors in (m._parameters, m._buffers))
        present = (tensor for tensors in dicts for tensor in tensors.values() if tensor is not None)
        return [tensor for tensor in present if tensor.is_floating_point()]


def _options(module):
    """The names and the values of a module's options."""
    options = {name: value for name, value in vars(module).items() if isinstance(value, _OPTIONS)}
    return list(options), list(options.values())


def _present(tensors):
    """The names of the tensors that are not None."""
    return [name for name, tensor in tensors.items() if tensor is not None]
