"""Swaps the class of an object for a subclass that overrides one method, and back; the base of all adapters."""

import functools
import inspect
import logging
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import nn

LOG = logging.getLogger("inr_kernels")
UNSUPPORTED_CALL = "a call has arguments of an unsupported type, shape, dtype or device"

# The arguments of a method, each (name,) or (name, default).
Signature = tuple[tuple[Any, ...], ...]


class Unsupported(Exception):
    """The reason why a module keeps its original method."""


class AcceleratedModule(nn.Module):
    """First base class of every accelerated object. An adapter's subclass of it overrides the method."""

    # Set on the class of each object: its own class, the adapter's function, and what that function returned.
    _inr_original: type[nn.Module]
    _inr_verify: "Callable[[nn.Module], Match]"
    _inr_match: "Match"

    def __init_subclass__(cls, **_: Any) -> None:
        """Skips the original class's `__init_subclass__`, which may register every subclass somewhere."""

    def __reduce_ex__(self, protocol):
        make, args, *rest = super().__reduce_ex__(protocol)
        args = tuple(self._inr_original if arg is type(self) else arg for arg in args)
        return _remake, (self._inr_verify, make, args), *rest

    def __setstate__(self, state: Any) -> None:
        """Verifies a copied or unpickled object again: its original class may have changed since."""
        verify = self._inr_verify
        set_class(self, self._inr_original)
        self.__setstate__(state)
        if reason := replace(self, verify):
            LOG.warning("%s not accelerated: %s", type(self).__qualname__, reason)

    def _inr_drop_cache(self) -> None:
        """Drops what the adapter caches for this object."""


class Match(NamedTuple):
    """The result of a successful verification: the new base class, and what must still hold at every call.

    original: the function of the original method. attributes: the object's flags and numbers. details: hashable, for
    the adapter's own use.
    """

    mixin: type[AcceleratedModule]
    method: str
    original: Callable
    attributes: tuple[tuple[str, Any], ...]
    details: Any = None


class Adapter(NamedTuple):
    """One upstream method that `accelerate` replaces. For the fields, see the docstring of inr_kernels.integrations."""

    description: str
    is_candidate: Callable[[nn.Module], bool]
    verify: Callable[[nn.Module], Match]


ADAPTERS: list[Adapter] = []


def register(adapter: Adapter) -> Adapter:
    """Adds an adapter to those that `accelerate` tries."""
    ADAPTERS.append(adapter)
    return adapter


def replace(module: nn.Module, verify: Callable[[nn.Module], Match]) -> str:
    """Accelerates one module in place. Returns the reason why it keeps its own method, "" if it was accelerated."""
    restore_original(module)
    _warn_once.cache_clear()
    try:
        match = verify(module)
        set_class(module, _subclass(type(module), match.mixin, verify, match))  # type: ignore[arg-type]
    except Unsupported as reason:
        return str(reason)
    except Exception as error:  # upstream code may raise anything
        return f"running it raised {type(error).__name__}: {error}".splitlines()[0]
    return ""


def restore_original(module: nn.Module) -> None:
    """Gives an accelerated module its original class back; does nothing to other modules."""
    if isinstance(module, AcceleratedModule):
        module._inr_drop_cache()
        set_class(module, module._inr_original)


def check_method(module: nn.Module, name: str, accepted: Collection[Signature], *, defaults: bool = True) -> Signature:
    """Returns which of the accepted signatures a method has; Unsupported if none, or if the object overrides it.

    defaults: whether default values must agree too; without, accepted contains names only.
    """
    found = _signature(type(module), name)
    if found and not defaults:
        found = tuple(argument[:1] for argument in found)
    if found is None or found not in accepted:
        raise Unsupported(f"{name} does not take {' or '.join(map(_format, accepted))}")
    if name in vars(module):
        raise Unsupported(f"{name} is patched on the object")
    return found


def match(module: nn.Module, mixin: type[AcceleratedModule], method: str, details: Any = None) -> Match:
    """The `Match` of a method, with the object's current flags."""
    return Match(mixin, method, getattr(type(module), method), tuple(plain_attributes(module).items()), details)


def why_changed(module: AcceleratedModule) -> str:
    """Why an accelerated module's match no longer holds, "" if it does."""
    _, name, original, attributes, _ = module._inr_match
    if getattr(module._inr_original, name) is not original:
        return f"the class has another {name} now"
    if name in vars(module):
        return f"{name} is patched on the object"
    return why_attributes_changed(module, attributes)


def why_attributes_changed(module: nn.Module, attributes: Collection[tuple[str, Any]]) -> str:
    """Why these attributes no longer have these values, "" if they do."""
    if any(_plain(getattr(module, name, None)) != value for name, value in attributes):
        return "a flag has changed; call accelerate(model) again to accept it"
    return ""


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """The object's flags and numbers, any of which may change what a method computes.

    Without `training`: the probe runs in both modes.
    """
    plain = {name: _plain(value) for name, value in vars(module).items() if name[0] != "_" and name != "training"}
    return {name: value for name, value in plain.items() if value is not None}


def falls_back(module: AcceleratedModule, reason: str) -> bool:
    """Whether there is a reason to call the original method. Logs it once for each class and reason."""
    if reason and not torch.compiler.is_compiling():
        _warn_once(module._inr_original, reason)  # type: ignore[arg-type]
    return bool(reason)


def set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Changes an object's class, even if it overrides __setattr__."""
    object.__setattr__(module, "__class__", cls)


@functools.cache
def _warn_once(original, reason):
    LOG.warning("%s uses its original method for some calls: %s", original.__qualname__, reason)


def _plain(value):
    """A flag, a number or a string, or a tuple of them (also for a list); None for anything else."""
    if isinstance(value, (list, tuple)):
        return tuple(value) if all(isinstance(v, (bool, str, int, float)) for v in value) else None
    return value if isinstance(value, (bool, str, int, float)) else None


def _signature(cls, name):
    """The arguments of a method, or None if some are not positional-or-keyword."""
    _, *parameters = inspect.signature(getattr(cls, name)).parameters.values()
    plain = all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)
    return tuple((p.name, *([] if p.default is p.empty else [p.default])) for p in parameters) if plain else None


def _format(signature):
    return f"({', '.join('='.join(map(str, argument)) for argument in signature)})"


def _remake(verify, make, args):
    """Rebuilds a pickled object. Pickles refer to this function by name: do not rename or move it."""
    module = make(*args)
    set_class(module, _subclass(type(module), AcceleratedModule, verify, None))  # until __setstate__ verifies it
    return module


@functools.cache
def _subclass(original, mixin, verify, match):
    copied = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    ours = {"_inr_original": original, "_inr_verify": staticmethod(verify), "_inr_match": match}
    return type(original)(original.__name__, (mixin, original), copied | ours)
