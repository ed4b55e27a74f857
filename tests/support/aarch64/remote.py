"""A pytest plugin: inr_kernels calls the C++ kernels of the aarch64 build, in qemu, instead of this processor's."""

import ctypes
import functools
import pickle
import subprocess
from collections import Counter
from types import SimpleNamespace

import pytest
from tree import ROOT

from . import Call, Pointer, replace

BUILD = ROOT / "build" / "aarch64"
HERE = {"Memory", "release_memory", "has_openmp"}  # what inr_kernels needs in this process
CALLS = Counter()


class Address(int):
    """The address of a tensor, with the memory of its storage: (address, bytes)."""

    storage: tuple[int, int]


@functools.cache
def server():
    """The process that runs the kernels."""
    environment = {"PYTHONPATH": f"{ROOT / 'tests' / 'support'}:{BUILD / 'native'}"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([BUILD / "python", "-m", "aarch64.serve"], env=environment, **pipes)


def send(name, arguments, method=None, positional=(), keywords=None):
    """Runs a call on aarch64: copies the memory there and back; returns its result, or raises its exception."""
    storages = []

    def pointer(value):
        if not isinstance(value, Address) or not value:
            return value if isinstance(value, (bool, float)) else int(value)
        if value.storage not in storages:
            storages.append(value.storage)
        return Pointer(storages.index(value.storage), value - value.storage[0])

    arguments, method_arguments = replace((arguments, (positional, keywords or {})), pointer)
    memory = [(start, ctypes.string_at(start, size)) for start, size in storages]
    pickle.dump(Call(name, arguments, method, method_arguments, memory), server().stdin)
    server().stdin.flush()
    result, changed = pickle.load(server().stdout)
    for i, contents in changed.items():
        ctypes.memmove(storages[i][0], contents, len(contents))
    CALLS[f"{name}.{method}" if method else name] += 1
    if isinstance(result, Exception):
        raise result
    return result


class RemoteObject:
    """Stands for an object of a class of _C; it is made for each call of a method."""

    def __init__(self, name, **arguments):
        self._name, self._arguments = name, arguments

    def __getattr__(self, method):
        return lambda *positional, **keywords: send(self._name, self._arguments, method, positional, keywords)


def remote_module(module):
    """A module like _C, whose kernels run on aarch64."""

    def remote(name, value):
        if name in HERE or not callable(value):
            return value
        return functools.partial(RemoteObject if isinstance(value, type) else send_function, name)

    def send_function(name, **arguments):
        return send(name, arguments)

    return SimpleNamespace(**{name: remote(name, value) for name, value in vars(module).items()} | {"cuda_archs": ""})


@pytest.fixture(scope="session", autouse=True)
def kernels_on_aarch64():
    import torch  # after conftest.py has set the environment

    from inr_kernels._core import native

    original, module = torch.Tensor.data_ptr, remote_module(native.load()[0])

    def data_ptr(tensor):
        address = Address(original(tensor))
        if tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            address.storage = storage.data_ptr(), storage.nbytes()
        return address

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "load", lambda: (module, ""))
        patch.setattr(torch.Tensor, "data_ptr", data_ptr)
        yield
    assert CALLS, "no kernel was called on aarch64"
    with server() as process:  # waits for its end
        process.stdin.close()


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("calls on aarch64")
    for name, count in sorted(CALLS.items()):
        terminalreporter.write_line(f"{count:6} {name}")
