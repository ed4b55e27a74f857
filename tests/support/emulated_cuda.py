"""Builds the CUDA kernels for the host, and replaces `_C` by the result.

The sources are compiled by g++ with the headers of tests/support/cuda_on_host, whose machine.h describes what the
emulation reproduces and which errors it detects. The environment variable INR_EMULATION_SANITIZE builds it with
sanitizers, and INR_EMULATION_ORDER runs warps and blocks in random orders of that seed. Without sanitizers a kernel
gets copies of its tensors, each before a page that cannot be accessed, see `guard_memory`.
"""

import ctypes
import mmap
import os
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
HOST = ROOT / "tests" / "support" / "cuda_on_host"
SOURCES = ["launch.cu", "local_implicit.cu", "local_implicit_sm90.cu", "local_implicit_weights.cu"]
SOURCES += [f"{op}{part}.cu" for op in ("elementwise_filter", "neighborhood_attention") for part in ("", "_backward")]
LIBRARY = "cuda_on_host.so"
# The tests of each op in the emulation.
TESTS = {op: [f"tests/ops/test_{op}_cuda.py"] for op in ("elementwise_filter", "neighborhood_attention")}
TESTS["local_implicit"] = [f"tests/ops/test_local_implicit_{name}.py" for name in ("cuda", "wgmma")]
Integer, Address = ctypes.c_int64, ctypes.c_void_p


def files(op):
    """Patterns of the files on which an op's tests of the emulation itself depend, for `if_changed`."""
    kernels = [f"csrc/cuda/{name}" for name in (f"{op}*", "launch*", "ptx.cuh", "hopper.cuh")]
    support = [f"tests/support/{name}" for name in ("cuda_on_host/**/*", "emulated_cuda.py", f"{op}_cases.py")]
    public = "functional/*.py" if (ROOT / "inr_kernels" / op / "functional").is_dir() else "functional.py"
    op_files = "op/*.py" if (ROOT / "inr_kernels" / op / "op").is_dir() else "op.py"
    ours = [f"inr_kernels/{op}/{name}" for name in (op_files, "arguments.py", public)]
    return ["csrc/inr.h", *kernels, *support, *ours, *TESTS[op]]


def build(folder, csrc=ROOT / "csrc", unchanged=None):
    """Compiles the kernels into a library in the folder, and loads it.

    unchanged: the folder of an earlier build, whose objects are used for sources of the same content; None if a header
    is not the same.
    """
    options = ["-std=c++17", "-O2", "-fPIC", "-ffp-contract=off", "-U_FORTIFY_SOURCE"]
    options += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{HOST}", f"-I{csrc}"]
    options += ["-include", "cuda_runtime.h", "-x", "c++"]  # as nvcc does
    if sanitizers := os.environ.get("INR_EMULATION_SANITIZE"):
        options += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-g", "-O1"]
    objects = []
    for source in [*sorted(HOST.glob("*.cpp")), *(csrc / "cuda" / kernel for kernel in SOURCES)]:
        earlier = unchanged and unchanged / f"{source.name}.o"
        same = source.is_relative_to(HOST) or source.read_text() == (ROOT / "csrc" / "cuda" / source.name).read_text()
        objects.append(earlier if earlier and same else Path(folder) / f"{source.name}.o")
        if objects[-1] != earlier:
            subprocess.run(["g++", *options, "-c", source, "-o", objects[-1]], check=True)
    linked = [f"-fsanitize={sanitizers}"] if sanitizers else []
    subprocess.run(["g++", "-shared", *linked, *objects, "-o", Path(folder) / LIBRARY], check=True)
    return load(folder)


def copy_with_fault(folder, file, old, new):
    """Copies csrc into the folder, with one text of a file in csrc/cuda replaced; returns that file."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    faulty = folder / "csrc" / "cuda" / file
    assert old in faulty.read_text()
    faulty.write_text(faulty.read_text().replace(old, new))
    return faulty


def build_with_fault(folder, built, *fault):
    """`build` in the folder, with a fault, see `copy_with_fault`; built: the folder of the build without."""
    faulty = copy_with_fault(folder, *fault)
    return build(folder, folder / "csrc", built if faulty.suffix == ".cu" else None)


def load(folder):
    """Loads the library that `build` wrote."""
    loaded = ctypes.CDLL(Path(folder) / LIBRARY)
    loaded.local_implicit_workspace.restype = ctypes.c_size_t
    loaded.local_implicit_forward.restype = ctypes.c_char_p
    loaded.neighborhood_attention_forward.restype = ctypes.c_char_p
    loaded.neighborhood_attention_backward.restype = ctypes.c_char_p
    loaded.neighborhood_attention_tiles.restype = Integer
    loaded.elementwise_filter_forward.restype = ctypes.c_char_p
    loaded.elementwise_filter_backward.restype = ctypes.c_char_p
    loaded.launch.restype = ctypes.POINTER(Launch)
    loaded.set_order(int(os.environ.get("INR_EMULATION_ORDER", 0)))
    return loaded


class Launch(ctypes.Structure):
    """machine::Launch of machine.h: what a kernel was launched with."""

    _fields_ = [(name, ctypes.c_uint) for name in ("blocks", "threads", "shared", "cluster")]
    _fields_ += [("stream", Address), ("sizes", ctypes.c_uint * 8)]


def launches(library):
    """The launches since the last call."""
    found = []
    while at := library.launch(ctypes.c_size_t(len(found))):
        found.append(Launch.from_buffer_copy(at.contents))
    library.clear_launches()
    return found


class Plane(ctypes.Structure):
    """inr::Plane of csrc/inr.h."""

    _fields_ = [("data", Address), ("batch", Integer), ("row", Integer), ("col", Integer)]


class Axis(ctypes.Structure):
    """inr::Axis of csrc/inr.h."""

    _fields_ = [(name, Integer) for name in ("queries", "length", "kernel", "dilation", "stride")]
    _fields_ += [("causal", ctypes.c_bool)]


class Tokens(ctypes.Structure):
    """inr::Tokens of csrc/inr.h."""

    _fields_ = [("data", Address), ("strides", Integer * 5)]

    @classmethod
    def of(cls, address, strides):
        """From what Python passes to `_C`."""
        return cls(address, (Integer * 5)(*strides))


class Attention(ctypes.Structure):
    """inr::NeighborhoodAttention of csrc/inr.h."""

    _fields_ = [(name, Integer) for name in ("batch", "heads", "key_heads", "value_heads", "dim", "value_dim")]
    _fields_ += [*[(name, Axis) for name in "zyx"], ("scale", ctypes.c_double), ("mean_heads", ctypes.c_bool)]
    _fields_ += [*[(name, Tokens) for name in ("query", "key", "value")], ("bias", Address), ("threads", ctypes.c_int)]


class AttentionGradients(ctypes.Structure):
    """inr::NeighborhoodAttentionGradients of csrc/inr.h."""

    _fields_ = [*[(name, Tokens) for name in ("query", "key", "value")], ("bias", Address)]


class Filter(ctypes.Structure):
    """inr::ElementwiseFilter of csrc/inr.h."""

    _fields_ = [(name, Integer) for name in ("batch", "channels", "height", "width", "groups")]
    _fields_ += [(name, Integer) for name in ("out_height", "out_width", "kernel_height", "kernel_width")]
    _fields_ += [("dilations", ctypes.POINTER(Integer))]
    _fields_ += [(name, Integer) for name in ("dilation_count", "stride", "upscale")]
    _fields_ += [(name, ctypes.c_int) for name in ("padding", "normalize")]
    _fields_ += [(name, ctypes.c_double) for name in ("alpha", "beta", "gamma")]
    _fields_ += [("x", Address), ("kernel", Address), ("kernel_strides", Integer * 4), ("log_window", Address)]
    _fields_ += [("threads", ctypes.c_int)]


class Problem(ctypes.Structure):
    """inr::LocalImplicit of csrc/inr.h."""

    _fields_ = [
        *[(name, Integer) for name in ["batch", "rows", "cols", "height", "width", "band_start", "band_rows"]],
        ("local_ensemble", ctypes.c_bool),
        ("ensemble_first", ctypes.c_bool),
        ("depth", Integer),
        ("widths", ctypes.POINTER(Integer)),
        *[(name, Plane) for name in ["y", "x", "cell_y", "cell_x"]],
        *[(name, Address) for name in ["centre_y", "centre_x", "hoisted", "position_weight"]],
        ("weights", ctypes.POINTER(Address)),
        ("biases", ctypes.POINTER(Address)),
        ("threads", ctypes.c_int),
    ]


class Native:
    """Replaces `_C` in the ops' op.py, with the attributes that they use."""

    cuda_archs, max_depth = "80", 64

    def __init__(self, library):
        self.library = library

    def LocalImplicit(self, **arguments):
        """Takes the keyword arguments of `_C.LocalImplicit`."""
        return LocalImplicit(self.library, **arguments)

    def NeighborhoodAttention(self, **arguments):
        """Takes the keyword arguments of `_C.NeighborhoodAttention`."""
        return NeighborhoodAttention(self.library, **arguments)

    def ElementwiseFilter(self, **arguments):
        """Takes the keyword arguments of `_C.ElementwiseFilter`."""
        return ElementwiseFilter(self.library, **arguments)


_guarded = []  # (tensor, its copy) of what the next kernel gets


def guard_memory(monkeypatch):
    """Makes `data_ptr` return the address of a copy before a page that cannot be accessed, until the next kernel ends.

    An access beyond the end, but for less than 16 bytes that keep the alignment, ends the process. Not under
    sanitizers, which watch the tensors' own memory.
    """
    if os.environ.get("INR_EMULATION_SANITIZE"):
        return
    real = torch.Tensor.data_ptr

    def data_ptr(tensor):
        address, tensor = real(tensor), tensor.data
        if tensor.device.type != "cpu" or not tensor.numel():
            return address
        for axis, stride in enumerate(tensor.stride()):
            tensor = tensor.narrow(axis, 0, 1) if stride == 0 else tensor
        _guarded.append((tensor, _before_a_guard_page(tensor, address % 16)))
        return real(_guarded[-1][1])

    monkeypatch.setattr(torch.Tensor, "data_ptr", data_ptr)


def _before_a_guard_page(tensor, alignment):
    """A copy of the tensor with the same strides, at an address that is `alignment` modulo 16."""
    count = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = -(-(count * tensor.itemsize + 15) // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, size + mmap.PAGESIZE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    assert ctypes.CDLL(None).mprotect(Address(begin + size), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    offset = size - count * tensor.itemsize
    offset -= (offset - alignment) % 16
    memory = torch.frombuffer(pages, dtype=tensor.dtype, count=count, offset=offset)
    return memory.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def check(failure):
    """Copies back what a kernel wrote (`guard_memory`), and raises its error, if there is one."""
    copies = [*_guarded]
    _guarded.clear()
    for tensor, copy in copies:
        whole = [t.clone(memory_format=torch.contiguous_format).view(-1, 1) for t in (tensor, copy)]
        if not torch.equal(*(t.view(torch.uint8) for t in whole)):
            tensor.copy_(copy)
    if failure:
        raise RuntimeError(failure.decode())


class LocalImplicit:
    """`_C.LocalImplicit` with only its CUDA methods."""

    def __init__(self, library, *, type, queries, size, band, widths, y, x, cell, weights, biases, **rest):
        self.library, self.type = library, type
        address, (batch, row, col, last) = cell
        planes = {"y": Plane(y[0], *y[1]), "x": Plane(x[0], *x[1])}
        if address:
            planes |= {"cell_y": Plane(address, batch, row, col), "cell_x": Plane(address + 4 * last, batch, row, col)}
        sizes = dict(
            zip(
                ["batch", "rows", "cols", "height", "width", "band_start", "band_rows"],
                (*queries, *size, *band),
                strict=False,
            )
        )
        self.problem = Problem(
            **sizes,
            **planes,
            **rest,
            depth=len(weights),
            widths=(Integer * len(widths))(*widths),
            weights=(Address * len(weights))(*weights),
            biases=(Address * len(biases))(*biases),
        )

    def workspace_cuda(self):
        return self.library.local_implicit_workspace(ctypes.byref(self.problem))

    def forward_cuda(self, wgmma, out, workspace, stream):
        check(
            self.library.local_implicit_forward(
                self.type,
                ctypes.byref(self.problem),
                ctypes.c_bool(wgmma),
                *map(Address, (out, workspace, stream)),
            )
        )


class NeighborhoodAttention:
    """`_C.NeighborhoodAttention` with only its CUDA methods."""

    def __init__(self, library, *, type, heads, dims, z, y, x, query, key, value, **rest):
        self.library, self.type = library, type
        names = ["heads", "key_heads", "value_heads", "dim", "value_dim"]
        sizes = dict(zip(names, (*heads, *dims), strict=True))
        axes = {name: Axis(*axis) for name, axis in zip("zyx", (z, y, x), strict=True)}
        tokens = {name: Tokens.of(*t) for name, t in {"query": query, "key": key, "value": value}.items()}
        self.problem = Attention(**sizes, **axes, **tokens, **rest)

    def forward_cuda(self, *, out, lse, stream):
        given = ctypes.byref(self.problem), ctypes.byref(Tokens.of(*out)), *map(Address, (lse, stream))
        check(self.library.neighborhood_attention_forward(self.type, *given))

    def tiles_cuda(self):
        return self.library.neighborhood_attention_tiles(ctypes.byref(self.problem))

    def backward_cuda(self, *, lse, grad_out, grad_lse, gradients, delta, stream):
        *tokens, bias = gradients
        gradients = AttentionGradients(*(Tokens.of(*t) for t in tokens), bias)
        grad_out = ctypes.byref(Tokens.of(*grad_out))
        given = Address(lse), grad_out, Address(grad_lse), ctypes.byref(gradients), Address(delta), Address(stream)
        check(self.library.neighborhood_attention_backward(self.type, ctypes.byref(self.problem), *given))


class ElementwiseFilter:
    """`_C.ElementwiseFilter` with only its CUDA methods."""

    def __init__(self, library, *, type, size, out_size, kernel_size, dilations, coefficients, kernel, **rest):
        self.library, self.type = library, type
        names = ["batch", "channels", "height", "width", "out_height", "out_width", "kernel_height", "kernel_width"]
        names += ["alpha", "beta", "gamma"]
        sizes = dict(zip(names, (*size, *out_size, *kernel_size, *coefficients), strict=True))
        given = {"dilations": (Integer * len(dilations))(*dilations), "dilation_count": len(dilations)}
        address, strides = kernel
        self.problem = Filter(**sizes, **given, kernel=address, kernel_strides=(Integer * 4)(*strides), **rest)

    def forward_cuda(self, *, log_window, out, stream):
        given = ctypes.byref(self.problem), *map(Address, (log_window, out, stream))
        check(self.library.elementwise_filter_forward(self.type, *given))

    def backward_cuda(self, *, log_window, grad_out, x, kernel, stream):
        given = ctypes.byref(self.problem), *map(Address, (log_window, grad_out, x, kernel, stream))
        check(self.library.elementwise_filter_backward(self.type, *given))
