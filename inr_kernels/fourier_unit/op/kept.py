"""What is made of the weights of convolutions, kept as long as they live and their values stay the same.

Modules in evaluation mark the weights that they call the ops with; the ops then keep what the C++ kernels make of them.
Values are compared by a fingerprint at every call, since edits through `.data` or numpy do not change a tensor's
version. Reading the weights takes a small part of the time of transforming them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from inr_kernels._core import dispatch, native

# weight -> {name of what was made: (state of the values that it was made of, it)}
_KEPT: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_CONSTANT = "constant"


def can_keep(*tensors: torch.Tensor | None) -> bool:
    """Whether something that is made of these tensors may be used again: plain ones, outside of tracers."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    given = [t for t in tensors if t is not None]
    plain = {*map(type, given)} <= {torch.Tensor, torch.nn.Parameter} and all(t.is_cpu for t in given)
    return plain and native.load()[0] is not None and not dispatch.is_transformed(*given)


def keep(weight: torch.Tensor, constant: bool = False) -> torch.Tensor:
    """Marks the weight: what is made of it is kept. constant: nobody else has it, so its values need no comparison."""
    if can_keep(weight):
        entry = _KEPT.setdefault(weight, {})
        if constant:
            entry[_CONSTANT] = True
    return weight


def forget(weight: torch.Tensor) -> None:
    """Takes the mark from the weight, and frees what was made of it."""
    _KEPT.pop(weight, None)


def once(owner: torch.Tensor, name: str, sources: Sequence[torch.Tensor], make: Callable[[], Any]) -> Any:
    """Returns make(), or what it returned before if the values of `sources` have not changed.

    Args:
        owner: the weight that the result is kept with; if it was not marked, nothing is kept.
        name: tells several results of one owner apart.
        sources: the tensors that make() reads.
    """
    entry = _KEPT.get(owner)
    if entry is None:
        return make()
    state = () if entry.get(_CONSTANT) else state_of(sources)
    before, made = entry.get(name, (None, None))
    if made is None or before != state:
        with torch.inference_mode(False), torch.no_grad():  # else autograd could not save it later
            made = make()
        entry[name] = state, made
    return made  # not entry[name], which another thread may have replaced


def is_kept(weight: torch.Tensor) -> bool:
    """Whether the weight is marked."""
    return weight in _KEPT


def state_of(tensors: Sequence[torch.Tensor]) -> Any:
    """What tells, compared with an earlier one, whether the values of the tensors have changed."""
    tensors = [t if t.is_contiguous() else t.detach().contiguous() for t in tensors]
    sizes = [t.nbytes for t in tensors]
    words = [(t.data_ptr(), size // 4) for t, size in zip(tensors, sizes, strict=True)]
    number = native.load()[0].fingerprint(tensors=words, threads=torch.get_num_threads())
    odd = [t.detach().flatten()[-1].item() for t, size in zip(tensors, sizes, strict=True) if size % 4]  # the last half
    return number, odd, [t.shape for t in tensors], [t.dtype for t in tensors]
