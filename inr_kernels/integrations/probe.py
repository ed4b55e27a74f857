"""Whether a foreign method computes what we believe: both run on random numbers, outputs and gradients compared."""

import contextlib
import copy
import warnings

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


def differs(shell, theirs, ours, leaves, random, *, gradients=1e-5):
    """Why two ways to compute are not one, "" if on these numbers they are.

    Args:
        shell: the object that theirs runs on; in both modes.
        theirs, ours: theirs(grad), ours(grad) -> a tensor or a tuple of them.
        leaves: what gradients reach, and no way may change; of none, outputs alone are compared.
        random: quiet_and_plain's, for the outputs' gradient.
        gradients: how far gradients may lie apart, in relative norm.
    """
    for training, grad in ((False, False), (False, True), (True, True)):
        nn.Module.train(shell, training)
        before, versions = dict(vars(shell)), [leaf._version for leaf in leaves]
        with torch.set_grad_enabled(grad):
            their, our = (out if isinstance(out, tuple) else (out,) for out in (theirs(grad), ours(grad)))
        if vars(shell).keys() != before.keys() or any(vars(shell)[name] is not before[name] for name in before):
            return "it sets attributes"
        if versions != [leaf._version for leaf in leaves]:
            return "it changes its arguments"
        if len(their) != len(our) or not all(map(_close, their, our)):
            return "another output on random numbers"
    if not leaves:
        return ""
    weights = [random(out.shape).detach() for out in our]
    grads = (torch.autograd.grad(outs, leaves, weights, allow_unused=True) for outs in (their, our))
    alike = all(_alike(*pair, gradients) for pair in zip(*grads, strict=True))
    return "" if alike else "other gradients on random numbers"


def first(reasons):
    """The first reason of several, "" if there is none."""
    return next(filter(None, reasons), "")


def shell(module, modules):
    """An object of the module's class with its plain values but without its weights.

    modules: what stands in for its submodules.
    """
    shell = object.__new__(type(module))
    # A container may be a cache that the method fills.
    values = {k: copy.copy(v) if isinstance(v, (dict, list, set)) else v for k, v in vars(module).items()}
    vars(shell).update(values | {"_parameters": {}, "_buffers": {}, "_modules": modules})
    return shell


def _close(a, b):
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    scale = b.abs().max()
    return bool(scale > 0 and (a - b).abs().max() <= 1e-5 * scale)


def _alike(a, b, tolerance):
    if a is None or b is None:
        return a is b
    return bool((a - b).norm() <= tolerance * b.norm())


@contextlib.contextmanager
def quiet_and_plain():
    """Gradients, no autocast, no warnings, everything on the CPU, and the random generator as before.

    Yields random(shape, scale=1), leaves in float32, the same in every run.
    """
    generator = torch.Generator().manual_seed(0)

    def random(shape, scale=1):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float32)).requires_grad_()

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(_OnCpu())
        yield random


class _OnCpu(TorchFunctionMode):
    """In this thread, what asks for a CUDA device gets the CPU: LIIF's code says `.cuda()`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cuda:
            return args[0]
        return function(*map(_here, args), **{k: _here(v) for k, v in (kwargs or {}).items()})


def _here(value):
    return "cpu" if isinstance(value, (str, torch.device)) and str(value).startswith("cuda") else value
