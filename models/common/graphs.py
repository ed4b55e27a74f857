"""A network's forward for one shape as a CUDA graph: the GPU starts hundreds of kernels without asking the CPU."""

from typing import NamedTuple

import torch

from inr_kernels._core import dispatch
from inr_kernels._core.checks import require

DEVICE = "cuda"
WARM_UP = 3  # calls before the capture: libraries choose kernels, Triton compiles


class Graphed:
    """`model(*inputs)` without gradients for inputs of one shape, replayed from a CUDA graph: nothing is allocated but
    the result, a tensor of its own that no later call overwrites.

    The graph is captured by the first call that it can serve, and again by the first after the model got other
    parameters or submodules, moved, or should run in another way (`inr_kernels.backend`, autocast, the precision of
    float32 products). What changes in place (an optimizer's step, `load_state_dict`) the next replay sees; what is no
    tensor (an attribute, a hook) it does not. A call that it cannot serve is the model's own forward: of other shapes,
    with other dtypes than the capture's, elsewhere than on a GPU, in training mode, when gradients are wanted (so
    call it under `torch.no_grad()`), under torch.compile and torch.func, and within another graph's capture.

    One call at a time: a graph has one set of buffers. They hold the activations of one forward for as long as this
    object lives.

    Args:
        model: a network whose forward never waits for the GPU.
        shapes: of the inputs, one each.
        options: of the model's forward; the same in every call.

    Raises:
        ValueError: shapes that are no shapes.
        RuntimeError: by the capturing call, where something in the forward waits for the GPU.

    Example:
        >>> model = Graphed(torch.nn.Linear(4, 3).eval(), [(2, 4)])
        >>> model(torch.randn(2, 4)).shape  # a CPU has no graphs: the forward itself
        torch.Size([2, 3])
    """

    def __init__(self, model, shapes, **options):
        for shape in shapes:
            fits = len(shape) > 0 and all(isinstance(n, int) and n > 0 for n in shape)
            require(fits, "shape", "hold positive integers", tuple(shape))
        self.model, self.shapes, self.options = model, [tuple(shape) for shape in shapes], options
        self._captured = None

    def __call__(self, *inputs):
        if not self._serves(inputs):
            return self.model(*inputs, **self.options)
        device, dtypes, settings = inputs[0].device, [t.dtype for t in inputs], _settings()
        captured = self._captured
        if captured is None or captured.settings != settings or captured.device != device or captured.is_stale():
            captured = self._captured = None  # its memory is free for the next
            captured = self._captured = _Captured(self.model, inputs, self.options, settings)
        elif captured.dtypes != dtypes:
            return self.model(*inputs, **self.options)
        return captured.replay(inputs)

    def _serves(self, inputs):
        """Whether a graph may stand for this call."""
        if torch.compiler.is_compiling() or len(inputs) != len(self.shapes):
            return False
        if not all(isinstance(t, torch.Tensor) for t in inputs) or dispatch.is_transformed(*inputs):
            return False
        if any(t.device.type != DEVICE or t.shape != shape for t, shape in zip(inputs, self.shapes, strict=True)):
            return False
        modules = self._captured.modules if self._captured else list(self.model.modules())
        wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *self.model.parameters()))
        return not (wanted or any(module.training for module in modules) or _is_capturing())

    def __repr__(self):
        return f"Graphed({type(self.model).__name__}, {self.shapes})"

    def __reduce__(self):  # neither pickled nor copied with its graph
        return _remade, (self.model, self.shapes, self.options)


def graphed_pair(model, shape, **options):
    """A `Graphed` of a network that takes an image of `shape` [B, C, H, W] and its mask [B, 1, H, W]."""
    require(len(shape) == 4, "shape", "be [B, 3, H, W]", tuple(shape))
    batch, _, *sides = shape
    return Graphed(model, [shape, (batch, 1, *sides)], **options)


def _remade(model, shapes, options):
    return Graphed(model, shapes, **options)


class _Captured:
    """A graph with the tensors that it reads and writes."""

    def __init__(self, model, inputs, options, settings):
        self.settings, self.device, self.dtypes = settings, inputs[0].device, [t.dtype for t in inputs]
        self.modules = list(model.modules())
        self.slots = [
            (entries, name, value)
            for module in self.modules
            for entries in (module._parameters, module._buffers, module._modules)
            for name, value in entries.items()
        ]
        tensors = [value for *_, value in self.slots if isinstance(value, torch.Tensor)]
        self.places = [(t, t.data_ptr(), t.dtype) for t in tensors]
        # Autocast's copies of the weights may not be kept: they end with its block, and know no later weights.
        casts = torch.autocast(DEVICE, settings.casts, settings.casts is not None, cache_enabled=False)
        with torch.inference_mode(False), torch.no_grad(), casts:
            self.inputs = [torch.empty(t.shape, dtype=t.dtype, device=t.device).copy_(t) for t in inputs]
            self.out, self._replay = record(lambda: model(*self.inputs, **options), self.device)

    def is_stale(self):
        """Whether the model has other tensors or modules than were captured, or tensors elsewhere in memory."""
        return any(entries.get(name) is not value for entries, name, value in self.slots) or any(
            t.data_ptr() != address or t.dtype != dtype for t, address, dtype in self.places
        )

    def replay(self, inputs):
        """The result for these inputs."""
        with torch.inference_mode(False), torch.no_grad():
            for mine, given in zip(self.inputs, inputs, strict=True):
                mine.copy_(given)
            self._replay()
            return self.out.clone()


class _Settings(NamedTuple):
    """What decides how a forward runs, beside its inputs."""

    backend: str
    casts: torch.dtype | None
    precision: str


def _settings():
    casts = torch.get_autocast_dtype(DEVICE) if torch.is_autocast_enabled(DEVICE) else None
    return _Settings(dispatch.requested_backend(None), casts, torch.get_float32_matmul_precision())


def _is_capturing():
    return DEVICE == "cuda" and torch.cuda.is_current_stream_capturing()


def record(run, device):
    """(what `run()` returns, a function that fills it anew): its kernels as a CUDA graph, after calls to warm up."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):  # its own default is a stream of the first graph's device
            out = run()
    return out, graph.replay
