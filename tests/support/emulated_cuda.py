"""Builds the CUDA kernels for the host, and replaces `_C` by the result.

The sources are compiled by g++ with the headers of tests/support/cuda_on_host, whose machine.h describes what the
emulation reproduces and which errors it detects.
"""

import ctypes
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOST = ROOT / "tests" / "support" / "cuda_on_host"
Integer, Address = ctypes.c_int64, ctypes.c_void_p


def build(folder, *kernels, csrc=ROOT / "csrc"):
    """Compiles these files of csrc/cuda into a library in the folder, and loads it."""
    library = Path(folder) / "cuda_on_host.so"
    options = ["-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-U_FORTIFY_SOURCE"]
    options += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{HOST}", f"-I{csrc}", "-x", "c++"]
    sources = [*sorted(HOST.glob("*.cpp")), *(csrc / "cuda" / kernel for kernel in kernels)]
    subprocess.run(["g++", *options, *sources, "-o", library], check=True)
    loaded = ctypes.CDLL(library)
    loaded.local_implicit_workspace.restype = ctypes.c_size_t
    loaded.local_implicit_forward.restype = ctypes.c_char_p
    return loaded


class Plane(ctypes.Structure):
    """inr::Plane of csrc/inr.h."""

    _fields_ = [("data", Address), ("batch", Integer), ("row", Integer), ("col", Integer)]


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
    """Replaces `_C` in local_implicit/op.py, with the attributes that it uses."""

    cuda_archs, max_depth = "80", 64

    def __init__(self, library):
        self.library = library

    def LocalImplicit(self, **arguments):
        """Takes the keyword arguments of `_C.LocalImplicit`."""
        return LocalImplicit(self.library, **arguments)


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
        failure = self.library.local_implicit_forward(
            self.type, ctypes.byref(self.problem), ctypes.c_bool(wgmma), Address(out), Address(workspace)
        )
        if failure:
            raise RuntimeError(failure.decode())
