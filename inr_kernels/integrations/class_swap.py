"""What every adapter does to a foreign object: its class becomes a subclass of its own that overrides one method.

An adapter is a file with `is_candidate(module)`, `replace(module)` and WHAT, which names what it replaces.
"""

import functools
import inspect
import logging
from typing import NamedTuple

import torch
from torch import nn

from inr_kernels._core.hooks import has_hooks as has_hooks  # for the adapters

LOG = logging.getLogger("inr_kernels")


class LeftAlone(Exception):
    """Why a module keeps its own method."""


class Accelerated(nn.Module):
    """The first base of a replaced class. An adapter's subclass overrides the method and names its `replace`."""

    _inr_replace = None

    def __init_subclass__(cls, **_):
        """The foreign classes' own, a registry's perhaps, shall not see ours."""

    def __reduce_ex__(self, protocol):
        make, args, *rest = super().__reduce_ex__(protocol)
        args = tuple(self._inr_original if arg is type(self) else arg for arg in args)
        return _remake, (self._inr_replace, make, args), *rest

    def __setstate__(self, state):
        """A copy, or what was pickled, is verified anew: there, the class may be another one."""
        again = self._inr_replace
        become(self, self._inr_original)
        self.__setstate__(state)
        if reason := again(self):
            LOG.warning("%s left alone: %s", type(self).__qualname__, reason)

    def _inr_forget(self):
        """Drops what is kept beside the object."""


class Verdict(NamedTuple):
    """What the probe saw, and what must still hold at every call; `found`: what the adapter learnt."""

    name: str
    method: object
    switches: tuple
    found: object = None


def attempt(module, verify):
    """Accelerates one module, in place. Returns why it was left alone, "" if it was not.

    verify: verify(module) -> (the adapter's subclass of Accelerated, its verdict, hashable), or raises LeftAlone.
    """
    restore(module)
    warn_once.cache_clear()
    try:
        become(module, _subclass(type(module), *verify(module)))
    except LeftAlone as reason:
        return str(reason)
    except Exception as error:  # whatever foreign code raises
        return f"trying it raised {type(error).__name__}: {error}".splitlines()[0]
    return ""


def restore(module):
    """Gives a module its own class back, if it has one of ours."""
    if isinstance(module, Accelerated):
        module._inr_forget()
        become(module, module._inr_original)


def verdict(module, name, found=None):
    """The verdict on a method, with the flags that the object has now."""
    return Verdict(name, getattr(type(module), name), tuple(switches(module).items()), found)


def why_changed(module):
    """Why the verdict no longer holds, "" if it does."""
    name, method, watched, _ = module._inr_verdict
    if getattr(module._inr_original, name) is not method:
        return f"its {name} has changed"
    if name in vars(module):
        return f"{name} is patched on the object"
    return why_switched(module, watched)


def why_switched(module, watched):
    """Why switches no longer stand as they stood."""
    if any(_plain(getattr(module, name, None)) != value for name, value in watched):
        return "a flag has changed; accelerate(model) takes it up"
    return ""


def switches(module):
    """Any plain value may change what a method computes; but not `training`: the probe runs in both modes."""
    plain = {name: _plain(value) for name, value in vars(module).items() if name[0] != "_" and name != "training"}
    return {name: value for name, value in plain.items() if value is not None}


def _plain(value):
    """A flag or a number, or a tuple of them in place of a list; None for what is neither."""
    if isinstance(value, (list, tuple)):
        return tuple(value) if all(isinstance(v, (bool, str, int, float)) for v in value) else None
    return value if isinstance(value, (bool, str, int, float)) else None


def signature(cls, name):
    """The names and defaults of a method's arguments, or None if it takes others than plain ones."""
    _, *parameters = inspect.signature(getattr(cls, name)).parameters.values()
    plain = all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)
    return tuple((p.name, *([] if p.default is p.empty else [p.default])) for p in parameters) if plain else None


def as_before(module, reason):
    """Warns, once for each class and reason, of a call that the original has to compute."""
    if not torch.compiler.is_compiling():
        warn_once(module._inr_original, reason)


@functools.cache
def warn_once(original, reason):
    """The log's line for it."""
    LOG.warning("%s computes some calls as before: %s", original.__qualname__, reason)


def become(module, cls):
    """Changes an object's class, whatever its __setattr__ does."""
    object.__setattr__(module, "__class__", cls)


def _remake(again, make, args):
    """Pickles name it: it must keep its name and place."""
    module = make(*args)
    become(module, _subclass(type(module), _unproven(again), None))  # until __setstate__
    return module


@functools.cache
def _unproven(again):
    return type("Accelerated", (Accelerated,), {"_inr_replace": staticmethod(again)})


@functools.cache
def _subclass(original, mixin, verdict):
    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    ours = {"_inr_original": original, "_inr_verdict": verdict}
    return type(original)(original.__name__, (mixin, original), names | ours)
