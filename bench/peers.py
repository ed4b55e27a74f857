"""What a user could take instead of the kernels: torch.compile, ONNX Runtime and OpenVINO on plain PyTorch forms.

`pip install -e .[peers]` installs the runtimes. A benchmark of a runtime that is missing, or that cannot run the form,
is skipped with the reason.
"""

import functools
import importlib.util
import io
import logging
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from .conftest import DEVICE

RUNTIMES = ["ONNX Runtime", "OpenVINO"]
# The implementations to compare with on this machine: the runtimes here are those for a CPU.
PEERS = ["compile"] + (RUNTIMES if DEVICE == "cpu" else [])


class Form(nn.Module):
    """A function of tensors, and the parameters that it takes after them, as a module."""

    def __init__(self, run, *parameters):
        super().__init__()
        self.run = run
        self.parameters_ = nn.ParameterList(nn.Parameter(p, requires_grad=False) for p in parameters)

    def forward(self, *inputs):
        return self.run(*inputs, *self.parameters_)


def take(name, form, args, dtype=torch.float32, export=None):
    """Returns a function without arguments that computes form(*args) by the peer `name`.

    form: a module in evaluation mode. dtype: in which it computes; OpenVINO converts float32 to bfloat16 by itself.
    export: a function that returns the form as ONNX bytes, where torch's exporter alone does not export it.
    """
    if name == "compile":
        return functools.partial(torch.compile(form), *args)
    runtime = {"ONNX Runtime": ("onnxruntime", _onnx_runtime), "OpenVINO": ("openvino", _openvino)}
    package, start = runtime[name]
    if not importlib.util.find_spec(package):
        pytest.skip(f"{package} is not installed: pip install -e .[peers]")
    try:
        return start(form, args, export, dtype)
    except Exception as error:
        pytest.skip(f"{name} cannot run it: {type(error).__name__}: {' '.join(str(error).split())[-300:]}")


def _exported(form, args):
    """The form as ONNX bytes."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(form, args, dynamo=True, verbose=False)
    file = io.BytesIO()
    program.save(file)
    return file.getvalue()


def exported_network(model, size):
    """A network of this package as ONNX bytes; Fourier transforms are matrix products."""
    from inr_kernels.models import export_onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.onnx")
        export_onnx(model, path, dynamic=False, size=size)
        return path.read_bytes()


def _onnx_runtime(form, args, export, dtype):
    import onnxruntime

    if dtype != torch.float32:
        pytest.skip("ONNX Runtime has few kernels for bfloat16 on a CPU")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    model = export() if export else _exported(form, args)
    session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
    inputs = {i.name: t.numpy() for i, t in zip(session.get_inputs(), args, strict=True)}
    return lambda: [torch.from_numpy(out) for out in session.run(None, inputs)]


def _openvino(form, args, export, dtype):
    import openvino

    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    core, inputs = openvino.Core(), [t.numpy() for t in args]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = core.read_model(export()) if export else openvino.convert_model(torch.export.export(form, args))
    compiled = core.compile_model(model, "CPU", options | {"PERFORMANCE_HINT": "LATENCY"})
    return lambda: [torch.from_numpy(out) for out in compiled(inputs).values()]
