"""Notices changes of a module's structure between calls, faster than an inspection of all its layers."""

import itertools

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
        self._hooks = [vars(m)[name] for m in self._modules for name in HOOKS]
        self._names = [_options(m) for m in self._modules]
        self._structure = self._current()
        self._layers = list(map(dict, self._structure.pop()))

    def holds(self) -> bool:
        """Whether the module still has the same layers and options, and neither hooks nor another forward."""
        if any(self._hooks) or not is_untouched() or any("forward" in vars(m) for m in self._modules):
            return False
        *structure, layers = self._current()
        return structure == self._structure and layers == self._layers

    def _current(self):
        """Types, options, names of tensors, which of them are None, and the layers, of all modules."""
        attributes = list(map(vars, self._modules))
        options = [list(map(a.get, names)) for a, names in zip(attributes, self._names, strict=True)]
        tensors = [tensors for m in self._modules for tensors in (m._parameters, m._buffers)]
        absent = [tensor is None for tensor in itertools.chain.from_iterable(map(dict.values, tensors))]
        layers = [m._modules for m in self._modules]
        return [list(map(type, self._modules)), options, list(map(list, tensors)), absent, layers]

    def tensors(self) -> list[torch.Tensor]:
        """The current parameters and buffers, except those of integers, such as the number of batches."""
        dicts = [tensors for m in self._modules for tensors in (m._parameters, m._buffers)]
        present = [tensor for tensors in dicts for tensor in tensors.values() if tensor is not None]
        return [tensor for tensor in present if tensor.is_floating_point()]


def _options(module):
    """The names of a module's options."""
    return [name for name, value in vars(module).items() if isinstance(value, _OPTIONS)]
