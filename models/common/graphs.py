"""A network's forward for one shape as a CUDA graph: one launch by the CPU starts hundreds of kernels.

Not run on a GPU; the tests replace CUDA's part.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from inr_kernels._core import devices, dispatch, verdicts
from inr_kernels._core.backends import is_capturing
from inr_kernels._core.checks import is_positive_int, require

DEVICE = "cuda"
WARM_UP = 3  # calls before the capture: libraries choose kernels, Triton compiles


class Graphed:
    """Replays `model(*inputs)`, without gradients and for inputs of one shape, from a CUDA graph.

    A replay allocates only the result, a new tensor that later calls do not overwrite.

    The graph is captured by the first suitable call. It is captured again after the model's parameters or submodules
    were replaced or moved, or when a global setting has changed: `inr_kernels.backend`, autocast, the float32 matmul
    precision, or the verdicts of `inr_kernels.prove`. In-place changes (an optimizer's step, `load_state_dict`) are
    seen by the next replay; changes of anything else (an attribute, a hook) are not. The model's own forward runs
    instead for other shapes, for other dtypes than those captured, on other devices than a GPU, in training mode, when
    gradients are required (so call it under `torch.no_grad()`), under torch.compile and torch.func, and during the
    capture of another graph.

    Not for concurrent calls: a graph has one set of buffers. They hold the activations of one forward as long as this
    object exists.

    Args:
        model: a network whose forward does not synchronize with the GPU.
        shapes: one per input.
        options: keyword arguments of the model's forward, the same in every call.

    Raises:
        ValueError: a shape without positive integers.
        RuntimeError: by the capturing call, if the forward synchronizes with the GPU.

    Example:
        >>> model = Graphed(torch.nn.Linear(4, 3).eval(), [(2, 4)])
        >>> model(torch.randn(2, 4)).shape  # a CPU has no graphs: the forward itself
        torch.Size([2, 3])
    """

    def __init__(self, model: torch.nn.Module, shapes: Sequence[Sequence[int]], **options: Any):
        self.model, self.shapes, self.options = model, [check_shape(shape) for shape in shapes], options
        self._captured: _Captured | None = None

    def __call__(self, *inputs: Any) -> Any:
        if not self._can_replay(inputs):
            return self.model(*inputs, **self.options)
        device, dtypes, settings = inputs[0].device, [t.dtype for t in inputs], _settings()
        captured = self._captured
        if captured is None or captured.settings != settings or captured.device != device or captured.is_stale():
            captured = self._captured = None  # frees its memory before the next capture
            captured = self._captured = _Captured(self.model, inputs, self.options, settings)
        elif captured.dtypes != dtypes:
            return self.model(*inputs, **self.options)
        return captured.replay(inputs)

    def _can_replay(self, inputs: tuple[Any, ...]) -> bool:
        """Whether a graph can replay this call."""
        if torch.compiler.is_compiling() or len(inputs) != len(self.shapes):
            return False
        if not all(isinstance(t, torch.Tensor) for t in inputs) or dispatch.is_transformed(*inputs):
            return False
        if any(t.device.type != DEVICE or t.shape != shape for t, shape in zip(inputs, self.shapes, strict=True)):
            return False
        modules = self._captured.modules if self._captured else list(self.model.modules())
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *self.model.parameters()))
        return not (needs_grad or any(module.training for module in modules) or is_capturing(inputs[0].device))

    def __repr__(self) -> str:
        return f"Graphed({type(self.model).__name__}, {self.shapes})"

    def __reduce__(self) -> tuple[Any, ...]:  # pickles and copies do not contain the graph
        return _rebuild, (self.model, self.shapes, self.options)


def graphed_pair(model: torch.nn.Module, shape: Sequence[int], **options: Any) -> Graphed:
    """Returns a `Graphed` of a network that takes an image of `shape` [B, C, H, W] and a mask [B, 1, H, W]."""
    shape = check_shape(shape)
    require(len(shape) == 4, "shape", "be [B, 3, H, W]", shape)
    batch, _, *sides = shape
    return Graphed(model, [shape, (batch, 1, *sides)], **options)


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of an input as a tuple; ValueError unless it consists of positive integers."""
    fits = isinstance(shape, Sequence) and len(shape) > 0 and all(map(is_positive_int, shape))
    require(fits, "shape", "be a sequence of positive integers", repr(shape))
    return tuple(shape)


def _rebuild(model: torch.nn.Module, shapes: Sequence[Sequence[int]], options: dict[str, Any]) -> Graphed:
    return Graphed(model, shapes, **options)


class _Captured:
    """A graph with the tensors that it reads and writes."""

    def __init__(
        self, model: torch.nn.Module, inputs: Sequence[torch.Tensor], options: dict[str, Any], settings: "_Settings"
    ):
        self.settings, self.device, self.dtypes = settings, inputs[0].device, [t.dtype for t in inputs]
        self.modules = list(model.modules())
        self.registered = [
            (entries, name, value)
            for module in self.modules
            for entries in (module._parameters, module._buffers, module._modules)
            for name, value in entries.items()
        ]
        tensors = [value for *_, value in self.registered if isinstance(value, torch.Tensor)]
        self.addresses = [(t, t.data_ptr(), t.dtype) for t in tensors]
        # Autocast must not cache copies of the weights: they are freed at its end, and would miss later weights.
        casts = torch.autocast(DEVICE, settings.casts, settings.casts is not None, cache_enabled=False)
        with torch.inference_mode(False), torch.no_grad(), casts:
            self.inputs = [torch.empty(t.shape, dtype=t.dtype, device=t.device).copy_(t) for t in inputs]
            self.out, self._replay = record(lambda: model(*self.inputs, **options), self.device)

    def is_stale(self) -> bool:
        """Whether the model's tensors or modules were replaced, or its tensors moved, after the capture."""
        return any(entries.get(name) is not value for entries, name, value in self.registered) or any(
            t.data_ptr() != address or t.dtype != dtype for t, address, dtype in self.addresses
        )

    def replay(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns the result for these inputs."""
        with torch.inference_mode(False), torch.no_grad():
            for buffer, value in zip(self.inputs, inputs, strict=True):
                buffer.copy_(value)
            self._replay()
            return self.out.clone()


class _Settings(NamedTuple):
    """Global state on which a forward depends."""

    backend: str
    casts: torch.dtype | None
    precision: str
    verdicts: int


def _settings() -> _Settings:
    casts = torch.get_autocast_dtype(DEVICE) if torch.is_autocast_enabled(DEVICE) else None
    return _Settings(dispatch.requested_backend(None), casts, devices.float32_precision(), verdicts.generation())


def record(run: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.Tensor, Callable[[], None]]:
    """Captures `run` as a CUDA graph after some warm-up calls.

    Returns:
        The result of `run`, and a function that replays the graph into the same output.
    """
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # torch's default is a stream on the first graph's device, and that no thread allocates memory meanwhile.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            out = run()
    return out, graph.replay
