"""Compares a method of another project with ours on random numbers: outputs and gradients."""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Outputs = torch.Tensor | tuple[torch.Tensor, ...]
Random = Callable[..., torch.Tensor]  # random(shape, scale=1), see sandbox


def why_different(
    module: nn.Module,
    original: Callable[[bool], Outputs],
    ours: Callable[[bool], Outputs],
    leaves: Sequence[torch.Tensor],
    random: Random,
    *,
    gradients: float = 1e-5,
) -> str:
    """Why two computations differ, "" if they agree; in evaluation without and with gradients, and in training.

    Args:
        module: the object that `original` uses; it must set none of its attributes.
        original, ours: called with whether gradients are enabled.
        leaves: tensors that gradients are compared for, and that `original` must not modify. Empty: only outputs are
            compared.
        random: from `sandbox`, for the gradients of the outputs.
        gradients: tolerance of gradients, in relative norm.
    """
    for training, grad in ((False, False), (False, True), (True, True)):
        nn.Module.train(module, training)
        before, versions = dict(vars(module)), [leaf._version for leaf in leaves]
        with torch.set_grad_enabled(grad):
            their, our = (out if isinstance(out, tuple) else (out,) for out in (original(grad), ours(grad)))
        if vars(module).keys() != before.keys() or any(vars(module)[name] is not before[name] for name in before):
            return "it sets attributes"
        if versions != [leaf._version for leaf in leaves]:
            return "it modifies its arguments in place"
        if len(their) != len(our) or not all(map(_close, their, our)):
            return "its output differs on random inputs"
    if not leaves:
        return ""
    weights = [random(out.shape).detach() for out in our]
    grads = (torch.autograd.grad(outs, leaves, weights, allow_unused=True) for outs in (their, our))
    same = all(_close_gradients(a, b, gradients) for a, b in zip(*grads, strict=True))
    return "" if same else "its gradients differ on random inputs"


def first_reason(reasons: Iterable[str]) -> str:
    """The first reason that is not empty, "" if all are."""
    return next(filter(None, reasons), "")


def without_weights(module: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    """An object of the module's class with its plain attributes, but with these submodules and no parameters."""
    bare = object.__new__(type(module))
    # A container may be a cache that the method fills, so it is copied.
    values = {k: copy.copy(v) if isinstance(v, (dict, list, set)) else v for k, v in vars(module).items()}
    vars(bare).update(values | {"_parameters": {}, "_buffers": {}, "_modules": modules})
    return bare


def _close(a, b):
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    scale = b.abs().max()
    return bool(scale > 0 and (a - b).abs().max() <= 1e-5 * scale)


def _close_gradients(a: torch.Tensor | None, b: torch.Tensor | None, tolerance: float) -> bool:
    if a is None or b is None:
        return a is b
    return bool((a - b).norm() <= tolerance * b.norm())


@contextlib.contextmanager
def sandbox() -> Iterator[Random]:
    """Runs the block with gradients, without autocast and warnings, on the CPU, and restores the random generator.

    Yields random(shape, scale=1): float32 leaves, the same in every run.
    """
    generator = torch.Generator().manual_seed(0)

    def random(shape, scale=1):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")).requires_grad_()

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(_CudaToCpu())
        yield random


class _CudaToCpu(TorchFunctionMode):
    """Uses the CPU wherever this thread asks for a CUDA device, as LIIF's `.cuda()` does."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cuda:
            return args[0]
        return function(*map(_on_cpu, args), **{k: _on_cpu(v) for k, v in (kwargs or {}).items()})


def _on_cpu(value: Any) -> Any:
    return "cpu" if isinstance(value, (str, torch.device)) and str(value).startswith("cuda") else value
