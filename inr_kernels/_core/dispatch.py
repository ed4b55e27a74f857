"""The choice of the backend that runs an op.

Precedence: the `backend=` argument, then `with inr_kernels.backend(...)`, then the environment variable
INR_KERNELS_BACKEND, then the default: the first backend of the op's table that can run; on a GPU the fastest of those
that `inr-kernels prove` found right there and faster than the reference, else one that runs a kernel of torch's, else
the reference. A requested backend that cannot run raises an error with the reason; falling back to the plain PyTorch
reference by default warns once.
"""

import contextlib
import contextvars
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from . import devices, verdicts
from .checks import result_dtype

_in_context: contextvars.ContextVar[str] = contextvars.ContextVar("inr_kernels_backend", default="")
_warned: set[str] = set()
_ADVICE = "prove"  # in _warned: that a GPU's kernels are not proven
OPS: dict[str, "Op"] = {}
VARIABLE = "INR_KERNELS_BACKEND"
_MAX_CHOICES = 4096  # defaults that an op remembers
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Facts:
    """What decides whether a backend can run a call; an op may add fields."""

    device: torch.device
    dtype: torch.dtype

    @property
    def form(self) -> str:
        """What specialises the kernels that run the call, the unit of a proof; "" if the call is not known as a whole.

        Kernels of one form differ at most in details, so that one proof covers them.
        """
        return "any"

    def __str__(self) -> str:
        return f"{self.device}, {str(self.dtype).removeprefix('torch.')}"


def up_to(value: int, *limits: int) -> str:
    """The range that a size is in, for `Facts.form`: "to 64" or "above 256"."""
    return next((f"to {limit}" for limit in limits if value <= limit), f"above {limits[-1]}")


def call_facts(x: torch.Tensor, *args: Any, **kwargs: Any) -> Facts:
    """The facts of a call of a public function whose first argument x decides on device and dtype."""
    return Facts(x.device, result_dtype(x))


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    why_not: takes the call's `Facts`, returns why the backend cannot run, "" if it can.
    forward: takes the op's `Arguments`, returns the op's outputs.
    backward: takes the gradients of the outputs, the saved outputs (as the op's backward schema orders them), the
        `Arguments`, and keywords that say which gradients are needed; returns them, None for those that are not. None:
        the op's autograd formula consists of differentiable ops.
    is_proven: whether `inr-kernels prove` proves it, so that it may become a default; False if it is for comparison.
    is_vendors: whether it runs a kernel of torch's: on a GPU it is the default where no verdict says otherwise.
    """

    why_not: Callable[[Any], str]
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    is_proven: bool = True
    is_vendors: bool = False


def always(facts: Facts) -> str:
    """The predicate of a backend that can run every call."""
    return ""


class Op:
    """An op's table of backends, in order of preference, and the public function that calls the op.

    On a GPU verdicts replace that order, see `default`.

    Args:
        name: the op's name in `torch.ops.inr_kernels`.
        arguments: the NamedTuple of the op's arguments before `backend`, in the order of its schema; its `check()`
            raises unless they are valid, its `facts()` returns their `Facts`.
        backends: name -> Backend.
        warns: whether a fall-back to "reference" warns; False where the reference is not slow.
    """

    function: Callable[..., Any]  # the public function
    facts: Callable[..., Facts]  # the facts of a call of that function

    def __init__(self, name: str, arguments: Callable[..., Any], backends: dict[str, Backend], *, warns: bool = True):
        self.name, self.arguments, self.backends, self.warns = name, arguments, backends, warns
        self._chosen: dict[
            tuple[Facts, bool, str, int], str
        ] = {}  # defaults on GPUs: to look for one takes microseconds

    def public(self, facts: Callable[..., Facts] = call_facts) -> Callable[[Function], Function]:
        """Decorates the op's public function, and registers the op in `OPS`.

        facts: takes the arguments of the function, returns the facts that `explain` reports on.
        """

        def register(function: Function) -> Function:
            self.function, self.facts = function, facts
            OPS[self.name] = self
            return function

        return register

    def forward(self, *values: Any) -> Any:
        """The op's implementation, which takes the values of its schema."""
        arguments, backend = self.select(*values)
        return backend.forward(arguments)

    def select(self, *values: Any, backward: bool = False) -> tuple[Any, Backend]:
        """The checked arguments, and the backend that runs them, from the values of the schema up to `backend`.

        backward: whether the op's backward runs, for which another backend may be the default.
        """
        *fields, backend = values
        arguments = self.arguments(*fields)
        arguments.check()
        return arguments, self.choose(backend, arguments.facts(), backward)

    def fake(self, outputs: Callable[[Any], Any]) -> Callable[..., Any]:
        """The op's fake implementation: checks the arguments, and returns their `outputs`, without values."""

        def run(*values: Any) -> Any:
            *fields, _ = values
            arguments = self.arguments(*fields)
            arguments.check()
            return outputs(arguments)

        return run

    def choose(self, argument: str | None, facts: Facts, backward: bool = False) -> Backend:
        """The backend to run: the requested one or an error, else `default`.

        argument: the call's `backend=`. The context and the environment are read here, when the op runs: a compiled
            graph stores only the argument.
        backward: see `select`.
        """
        requested, _ = _request(argument)
        if requested:
            # Layers resolve the request before the op runs, so that the op cannot know where it comes from.
            source = f" (as in the environment variable {VARIABLE})" if os.environ.get(VARIABLE) == requested else ""
            if requested not in self.backends:
                names = ", ".join(self.backends)
                raise ValueError(f"backend must be one of {names} for {self.name}; got {requested!r}{source}")
            if reason := self.backends[requested].why_not(facts):
                raise RuntimeError(f"backend {requested!r}{source} cannot run {self.name}: {reason}")
            return self.backends[requested]
        if not devices.decide(facts.device):
            return self.backends[self._default_or_warn(facts, backward)]
        key = facts, backward, devices.float32_precision(), verdicts.generation()
        name = self._chosen.get(key)
        if name is None:
            name = self._default_or_warn(facts, backward)
            device = devices.find(facts.device)
            if device and not device.is_capturing():  # when verdicts may not have been read, nor a warning given
                if len(self._chosen) >= _MAX_CHOICES:
                    self._chosen.clear()
                self._chosen[key] = name
        return self.backends[name]

    def _default_or_warn(self, facts, backward):
        name = self.default(facts, backward)
        if self.warns and (name == "reference" or self.backends[name].is_vendors):
            self._warn_slow(facts)
        return name

    def default(self, facts: Facts, backward: bool = False) -> str:
        """The backend that runs a call without a request: the first of the table that can.

        On a GPU: the fastest with a verdict that it is right and faster than the reference; else a kernel of torch's
        without a verdict; else the reference.
        """
        names: Iterable[str] = self.backends
        if devices.decide(facts.device):
            proven = verdicts.fastest(self.name, facts, backward)
            tried = {verdict.backend for verdict in verdicts.of_call(self.name, facts)}
            vendors = (name for name, backend in self.backends.items() if backend.is_vendors and name not in tried)
            names = [*(name for name in proven if name in self.backends), *vendors, "reference"]
        found = next((name for name in names if not self.backends[name].why_not(facts)), None)
        if found is None:
            reasons = {name: backend.why_not(facts) for name, backend in self.backends.items()}
            raise RuntimeError(f"no backend can run {self.name}: {reasons}")
        return found

    def is_provable(self, name: str) -> bool:
        """Whether a proof can make a backend the default: not plain PyTorch under another name, or for comparisons."""
        backend = self.backends[name]
        return backend.is_proven and backend.forward is not self.backends["reference"].forward

    def _warn_slow(self, facts):
        able = (name for name, backend in self.backends.items() if not backend.why_not(facts))
        if devices.decide(facts.device) and any(map(self.is_provable, able)):
            self._advise(facts)
        elif self.name not in _warned:
            _warned.add(self.name)
            why_not = {name: backend.why_not(facts) for name, backend in self.backends.items() if name != "reference"}
            hints = [f"{name}: {why}" if why else f"backend={name!r} can run it" for name, why in why_not.items()]
            warnings.warn(f"{self.name} runs on its slow PyTorch reference ({'; '.join(hints)})", stacklevel=2)

    def _advise(self, facts):
        """Tells once per process how to turn the kernels on; not where verdicts have turned them off."""
        if _ADVICE in _warned or not facts.form or verdicts.of_call(self.name, facts):
            return
        device = devices.find(facts.device)
        if device is None or device.is_capturing():
            return
        _warned.add(_ADVICE)
        from . import proof  # it imports this module

        warnings.warn(proof.advice(self.name, device), stacklevel=2)


def requested_backend(argument: str | None) -> str:
    """The requested backend: the argument, else the context's, else the environment's, else "".

    While torch.compile traces, only the argument is read: the op reads the rest when it runs. torch.export in its
    default mode reads all of them, so that a graph exported under `backend("reference")` has no op of this package.
    """
    return _request(argument)[0]


def _request(argument: str | None) -> tuple[str, bool]:
    """`requested_backend`, and whether it comes from the environment."""
    if argument is not None and not isinstance(argument, str):
        raise TypeError(f"backend must be a name or None; got {argument!r}")
    if torch.compiler.is_dynamo_compiling() or (torch.compiler.is_compiling() and not torch.compiler.is_exporting()):
        return argument or "", False
    if requested := argument or _in_context.get():
        return requested, False
    return os.environ.get(VARIABLE, ""), True


def is_transformed(*tensors: torch.Tensor) -> bool:
    """Whether torch.func or forward-mode differentiation is active, for which the kernels have no rules."""
    if torch.compiler.is_compiling():
        return False
    forward = torch.autograd.forward_ad
    return torch._C._are_functorch_transforms_active() or (
        forward._current_level >= 0 and any(forward.unpack_dual(t).tangent is not None for t in tensors)
    )


def reference_if_transformed(requested: str, *tensors: torch.Tensor) -> str:
    """The requested backend, or "reference" where `is_transformed`; there, a request for a kernel raises."""
    if not is_transformed(*tensors):
        return requested
    if requested not in ("", "reference"):
        reason = "does not support forward-mode AD or torch.func; use backend='reference'"
        raise RuntimeError(f"backend {requested!r} {reason}")
    return "reference"


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs every op in the block on one backend, e.g. "reference", "cpu", "triton" or "cuda".

    An op that does not have the backend, or cannot run on it, raises. The `backend=` argument of a single call has
    precedence.

    Example:
        >>> import torch, inr_kernels
        >>> with inr_kernels.backend("reference"):
        ...     out = inr_kernels.unmask_attention(torch.randn(1, 8, 5, 7), torch.zeros(1, 1, 5, 7))
    """
    known = sorted({known for op in OPS.values() for known in op.backends})
    if name not in known:
        raise ValueError(f"name must be one of {', '.join(known)}; got {name!r}")
    token = _in_context.set(name)
    try:
        yield
    finally:
        _in_context.reset(token)


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Prints, and returns, for each backend of an op whether it would run on these arguments, and if not, why.

    A mark shows which one does: the backend that the call, the context or the environment requests, else the
    default. A backend that `inr-kernels prove` has tried on this device has its verdict beside it.

    Args:
        op: the op's function or its name, e.g. `local_implicit_decode` or `"local_implicit"`.
        args, kwargs: the call's arguments; without any: float32 on the CPU.

    Returns:
        The printed text.

    Raises:
        TypeError: args are not those of the function.
        ValueError: op is neither a function nor a name of an op of this package.

    Example:
        >>> from inr_kernels import explain
        >>> text = explain("local_implicit")  # doctest: +ELLIPSIS
        local_implicit on cpu, float32
          cpu        runs  <- default
        ...
    """
    known = next((o for o in OPS.values() if op in (o.name, o.function)), None)
    if known is None:
        got = f"a module, {type(op).__name__}" if isinstance(op, torch.nn.Module) else repr(op)
        raise ValueError(f"op must be one of {', '.join(OPS)}, or its function; got {got}")
    if not (args or kwargs):
        args = (torch.empty(1, 1, 1, 1, dtype=torch.float32, device="cpu"),)
    try:
        facts = known.facts(*args, **kwargs)
    except (AttributeError, TypeError) as error:
        got = ", ".join(type(value).__name__ for value in (*args, *kwargs.values()))
        raise TypeError(f"args must be those of {known.function.__name__}, first a torch.Tensor; got {got}") from error
    form = facts.form if len(args) + len(kwargs) > 1 else ""  # of the tensor alone it would be another call's
    reasons = {name: candidate.why_not(facts) for name, candidate in known.backends.items()}
    used, is_from_environment = _request(kwargs.get("backend"))
    mark = f"requested by {VARIABLE}" if is_from_environment else "requested"
    if not used and (form or not devices.decide(facts.device)):  # else it depends on the call
        used, mark = known.default(facts), "default"
    if used and used not in reasons:
        reasons[used] = f"{known.name} has no such backend"
    marks = {used: f"  <- {mark}"}
    notes = {
        name: reason or f"runs{verdicts.note(known.name, name, facts, form) if known.is_provable(name) else ''}"
        for name, reason in reasons.items()
    }
    lines = [f"  {name:10s} {note}{marks.get(name, '')}" for name, note in notes.items()]
    text = "\n".join([f"{known.name} on {facts}", *lines])
    print(text)
    return text
