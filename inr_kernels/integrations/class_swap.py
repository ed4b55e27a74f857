"""Swaps the class of an object for a subclass that overrides one method, and back; the base of all adapters."""

import functools
import inspect
import logging
import types
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

LOG = logging.getLogger("inr_kernels")
UNSUPPORTED_CALL = "a call has arguments of an unsupported type, shape, dtype or device"
CANNOT_RUN = "it does not run alone, on random inputs on a CPU"

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
    names: Mapping[str, Collection[str]] = {}

    def lookalike(self, module: nn.Module) -> str:
        """Why a module whose class has an upstream name is no candidate, "" for other modules."""
        names = self.names.get(type(module).__name__, ())
        missing = next((name for name in names if not hasattr(module, name)), "")
        if not missing or type(module).__module__.startswith("inr_kernels."):
            return ""
        return f"its class has the name of one with {self.description}, but it has no {missing}"


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
        set_class(module, _subclass(type(module), match.mixin, verify, match))
    except Unsupported as reason:
        return str(reason)
    except Exception as error:  # upstream code may raise anything
        LOG.debug("%s could not be compared", type(module).__qualname__, exc_info=error)
        return CANNOT_RUN
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
    method = getattr(type(module), name)
    if not isinstance(method, types.FunctionType) and inspect.getattr_static(method, "__wrapped__", None) is None:
        raise Unsupported(f"its {name} is not a function, but of type {type(method).__name__}")
    parameters = _parameters(method)
    found = _signature(parameters)
    if found and not defaults:
        found = tuple(argument[:1] for argument in found)
    if found is None or found not in accepted:
        taken = f"{len(parameters)} argument{'s' * (len(parameters) != 1)} ({', '.join(map(_plain_text, parameters))})"
        raise Unsupported(f"its {name} takes {taken}, not {' or '.join(map(_format, accepted))}")
    if name in vars(module):
        raise Unsupported(f"{name} is patched on the object")
    return found


def match(module: nn.Module, mixin: type[AcceleratedModule], method: str, details: Any = None) -> Match:
    """The `Match` of a method, with the current values of the flags that the method reads."""
    attributes = read_attributes(module, method)
    return Match(mixin, method, getattr(type(module), method), tuple(attributes.items()), details)


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


def read_attributes(module: nn.Module, method: str) -> dict[str, Any]:
    """Those of `plain_attributes` that the method, or a function that it calls, may read: their names are in its code.

    A counter or a list of timings that only other methods use may change.
    """
    names = set(_names(module, method))
    plain = plain_attributes(module)
    return plain if names & _READ_ANY else {k: v for k, v in plain.items() if k in names}


# Code with one of these names may read attributes whose names it does not contain.
_READ_ANY = {"__dict__", "vars", "getattr"}
# These call no method of the module, or, as its layers, are not part of the method.
_OTHER_CALLABLES = type | types.BuiltinFunctionType | types.MethodDescriptorType | nn.Module


def _names(module: nn.Module, method: str) -> Iterator[str]:
    """All names and strings in the code of a method, and of the methods and functions of these names."""
    pending, seen = [getattr(type(module), method)], set()
    own = [vars(module), *(vars(base) for base in type(module).__mro__ if base not in nn.Module.__mro__)]
    while pending:
        function = pending.pop()
        if isinstance(function, property):
            pending.append(function.fget)
        elif isinstance(function, staticmethod | classmethod | types.MethodType):
            pending.append(function.__func__)
        elif isinstance(function, functools.partial | functools.partialmethod):
            pending += [function.func, *function.args, *function.keywords.values()]
        elif isinstance(function, types.FunctionType):
            if function in seen or (function.__module__ or "").split(".")[0] == "torch":
                continue
            seen.add(function)
            names = set(_names_in(function.__code__))
            yield from names
            pending += [scope[name] for scope in (*own, function.__globals__) for name in names if name in scope]
            pending += [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
            pending += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        elif (wrapped := inspect.getattr_static(function, "__wrapped__", None)) is not None:
            pending.append(wrapped)
        elif not isinstance(function, _OTHER_CALLABLES) and (callable(function) or hasattr(type(function), "__get__")):
            yield from _READ_ANY


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, types.CodeType):
            yield from _names_in(constant)


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


def _parameters(method: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a method after self."""
    return list(inspect.signature(method).parameters.values())[1:]


def _signature(parameters):
    """The arguments of a method, **kwargs by that name; None if others are not positional-or-keyword."""
    plain = all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.VAR_KEYWORD) for p in parameters)
    names = ("**" * (p.kind is p.VAR_KEYWORD) + p.name for p in parameters)
    defaults = ([] if p.default is p.empty else [p.default] for p in parameters)
    return tuple((name, *default) for name, default in zip(names, defaults, strict=True)) if plain else None


def _plain_text(parameter):
    """The parameter as in its definition, without its annotation."""
    return str(parameter.replace(annotation=parameter.empty))


def _format(signature):
    return f"({', '.join('='.join(map(str, argument)) for argument in signature)})"


def _remake(verify, make, args):
    """Rebuilds a pickled object. Pickles refer to this function by name: do not rename or move it."""
    module = make(*args)
    set_class(module, _subclass(type(module), AcceleratedModule, verify, None))  # until __setstate__ verifies it
    return module


# Weak: a class lives as long as its objects.
_subclasses: weakref.WeakValueDictionary[tuple[Any, ...], type] = weakref.WeakValueDictionary()


def _subclass(original, mixin, verify, match):
    """The class of an accelerated object, one for all objects that match alike."""
    key = original, mixin, verify, match
    if (found := _subclasses.get(key)) is None:
        copied = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
        ours = {"_inr_original": original, "_inr_verify": staticmethod(verify), "_inr_match": match}
        found = _subclasses[key] = type(original)(original.__name__, (mixin, original), copied | ours)
    return found
