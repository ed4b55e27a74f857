"""Which backend runs an op: `backend=`, then `with backend(...)`, then INR_KERNELS_BACKEND, then the default.

A wish that cannot be met raises and says why. Without a wish the first backend of the op's list that can run
is taken; falling back to the plain PyTorch reference warns once.
"""

import contextlib
import contextvars
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

_wish: contextvars.ContextVar[str] = contextvars.ContextVar("inr_kernels_backend", default="")
_warned: set[str] = set()
OPS: dict[str, "Op"] = {}


@dataclass(frozen=True)
class Op:
    """An op's backends in order of preference.

    Each maps to a predicate on `facts(*args, **kwargs)` that returns why it cannot run, "" if it can.
    """

    name: str
    function: Callable
    facts: Callable[..., Any]
    backends: Mapping[str, Callable[[Any], str]]

    def choose(self, wish: str, facts: Any) -> str:
        """The backend to run: the wish or an error, else the first that can."""
        if wish:
            if wish not in self.backends:
                names = ", ".join(self.backends)
                raise ValueError(f"backend must be one of {names} for {self.name}; got {wish!r}")
            if reason := self.backends[wish](facts):
                raise RuntimeError(f"backend {wish!r} cannot run {self.name}: {reason}")
            return wish
        reasons = {}
        for name, why_not in self.backends.items():
            if not (reason := why_not(facts)):
                if name == "reference":
                    self._warn_slow(reasons, facts)
                return name
            reasons[name] = reason
        raise RuntimeError(f"no backend can run {self.name}: {reasons}")

    def _warn_slow(self, reasons, facts):
        if self.name not in _warned:
            _warned.add(self.name)
            others = [name for name in self.backends if name not in (*reasons, "reference")]
            hints = [f"backend={name!r} can run it" for name in others if not self.backends[name](facts)]
            why = "; ".join([*(f"{name}: {reason}" for name, reason in reasons.items()), *hints])
            warnings.warn(f"{self.name} runs on its slow PyTorch reference ({why})", stacklevel=2)


def register(op: Op) -> Op:
    """Makes the op known to `explain`."""
    OPS[op.name] = op
    return op


def wished(argument: str | None) -> str:
    """The caller's wish: the argument, else the context's, else the environment's, else "".

    A compiled graph holds the argument alone: the op reads the rest again when it runs.
    """
    if argument is not None and not isinstance(argument, str):
        raise TypeError(f"backend must be the name of one or None; got {argument!r}")
    if torch.compiler.is_compiling():
        return argument or ""
    return argument or _wish.get() or os.environ.get("INR_KERNELS_BACKEND", "")


def is_transformed(*tensors) -> bool:
    """Whether torch.func or forward-mode differentiation is at work, for which the kernels have no rules."""
    if torch.compiler.is_compiling():
        return False
    forward = torch.autograd.forward_ad
    return torch._C._are_functorch_transforms_active() or (
        forward._current_level >= 0 and any(forward.unpack_dual(t).tangent is not None for t in tensors)
    )


def settle_wish(wish: str, *tensors) -> str:
    """The wish, or "reference" where `is_transformed`; a wish for a kernel raises there."""
    if not is_transformed(*tensors):
        return wish
    if wish not in ("", "reference"):
        raise RuntimeError(f"backend {wish!r} has no forward derivative and no torch.func; the reference has")
    return "reference"


@contextlib.contextmanager
def backend(name: str):
    """Runs every op of the block on one backend: "reference", "cpu", "triton" or "cuda".

    An op that has no such backend, or cannot run on it, raises. `backend=` of a single call goes before.
    """
    known = sorted({known for op in OPS.values() for known in op.backends})
    if name not in known:
        raise ValueError(f"name must be one of {', '.join(known)}; got {name!r}")
    token = _wish.set(name)
    try:
        yield
    finally:
        _wish.reset(token)


def explain(op, *args, **kwargs) -> str:
    """Prints, and returns, for each backend of an op whether it would run on these arguments, and why not.

    Args:
        op: the op's function or its name, e.g. `local_implicit_decode` or `"local_implicit"`.
        args, kwargs: the call's arguments; without any: float32 on the CPU.

    Example:
        >>> from inr_kernels import explain
        >>> text = explain("local_implicit")  # doctest: +ELLIPSIS
        local_implicit on cpu, float32
          cpu        runs  <- default
        ...
    """
    known = next((o for o in OPS.values() if op in (o.name, o.function)), None)
    if known is None:
        raise ValueError(f"op must be one of {', '.join(OPS)}; got {op!r}")
    facts = known.facts(*args, **kwargs)
    lines = [f"{known.name} on {facts}"]
    chosen = False
    for name, why_not in known.backends.items():
        reason = why_not(facts)
        lines.append(f"  {name:10s} {reason or ('runs' if chosen else 'runs  <- default')}")
        chosen = chosen or not reason
    text = "\n".join(lines)
    print(text)
    return text
