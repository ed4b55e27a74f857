"""Reads and writes checkpoints: one safetensors file with the parameters, the network's name, its config and notes.

The header (safetensors metadata) has the keys `format_version`, `network` ("DEAR"), `config` and `notes` (both JSON).
Files of older releases have `config` and `notes` only; they open as well. Files of other formats are read by
`torch_files`; what they hold becomes a `Checkpoint` in the network's `_read`.
"""

import dataclasses
import json
import math
import os
import pickle
import shutil
import tempfile
import typing
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize

from inr_kernels._core.files import check_path, replace_file
from inr_kernels._core.text import printable

from . import torch_files
from .torch_files import Contents, Placeholder, StateDict, Unreadable

VERSION = 1
# Raised by torch, safetensors and files of an unexpected structure; users do not see their texts.
UNREADABLE: tuple[type[Exception], ...] = (EOFError, RuntimeError, TypeError, ValueError, LookupError)
UNREADABLE += (AttributeError, ArithmeticError, pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError)

# What a config's entry of a type must be.
TYPES = {bool: "true or false", int: "an integer of at least 0", float: "a finite number", str: "a string"}

FilePath = str | os.PathLike[str]


class Checkpoint(NamedTuple):
    """What a file says about a network: its config, its parameters and the notes."""

    config: dict[str, Any]
    state: StateDict
    notes: Any


def save(model: Any, path: FilePath, notes: Any, dtype: torch.dtype | None = None) -> None:
    """Writes a network with the attributes NETWORK and config (a dataclass), atomically.

    Args:
        notes: any JSON value.
        dtype: of the floating-point tensors in the file; None: unchanged.

    Raises:
        TypeError: notes is no JSON value, or dtype no torch.dtype.
        ValueError: dtype is not a floating-point type.
    """
    if not isinstance(dtype, torch.dtype | None):
        raise TypeError(f"dtype must be a torch.dtype such as torch.bfloat16, or None; got {dtype!r}")
    if dtype and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type; got {dtype}")
    try:
        written = json.dumps(notes)
    except (TypeError, ValueError, RecursionError) as error:
        kinds = "a dict, list, string, number, bool or None, and dicts and lists of these"
        raise TypeError(f"notes must be a JSON value ({kinds}); {error}") from None
    metadata = {"format_version": str(VERSION), "network": model.NETWORK}
    metadata |= {"config": json.dumps(dataclasses.asdict(model.config)), "notes": written}
    state = {
        name: value.to(dtype if dtype and value.is_floating_point() else value.dtype).contiguous()
        for name, value in model.state_dict().items()
    }
    replace_file(path, serialize(state, metadata))


def read(path: FilePath, *, mapped: bool = True) -> Contents:
    """Reads a file of any format: safetensors (eight bytes, then a JSON object), or what `torch_files` reads.

    A pipe is opened and read once.

    Args:
        mapped: whether tensors may be memory-mapped. Such tensors become invalid when the file changes; copy them.

    Raises:
        OSError: it cannot be opened or read.
        Unreadable: it is damaged or of another format.
    """
    with open(path, "rb") as file:
        if not file.seekable():
            with tempfile.NamedTemporaryFile() as copy:
                shutil.copyfileobj(file, copy)
                copy.flush()
                return read(copy.name, mapped=False)
        size = os.path.getsize(path)
        if file.read(9)[8:] != b"{":
            file.seek(0)
            return torch_files.read(file, size, os.fsdecode(path) if mapped else None)
    try:
        with safe_open(os.fsdecode(path), "pt") as tensors:
            return Contents(tensors.metadata() or {}, {name: tensors.get_tensor(name) for name in tensors.keys()}, size)  # noqa: SIM118
    except SafetensorError as error:
        raise Unreadable("it is a damaged or truncated safetensors file") from error


def load_data(path: FilePath) -> Any:
    """Returns what torch.save was given, as `read` reads it: tensors and plain containers.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged or of another format; the message names it.
    """
    try:
        return read(path, mapped=False).data
    except Unreadable as error:
        raise ValueError(f"{os.fspath(path)} cannot be read: {error}") from error


def parse(contents: Contents, network: str) -> Checkpoint | None:
    """Returns the checkpoint of `network` in a file that `save` wrote, None if another library wrote it.

    Raises:
        Unreadable: the header names another network or a later format version, or is no JSON.
    """
    texts = contents.texts
    written = texts.get("network", network)
    if written != network:
        raise Unreadable(f"it contains the network {written}")
    version = texts.get("format_version", "1")
    if not version.isdecimal() or int(version) > VERSION:
        raise Unreadable(f"its format version is {version}; this release reads up to {VERSION}")
    if "config" not in texts:
        return None
    try:
        config, notes = json.loads(texts["config"]), json.loads(texts.get("notes", "{}"))
    except (ValueError, RecursionError) as error:
        raise Unreadable("the config or the notes in its header are not JSON") from error
    return Checkpoint(config, contents.data, notes)


def state_dict(contents: Contents, key: str) -> StateDict:
    """Returns the state dict with the tensor `key` in a file of another project, without a prefix of its names.

    It is the file's `state_dict` entry or the file itself. The prefix is what precedes `key`: "generator." of
    Lightning and mmagic, "model." or "module." of wrappers, or several. Of several state dicts with this key the
    generator's is taken, else the one with the shortest prefix. Other entries are ignored.

    Raises:
        Unreadable: there is none, or not of tensors.
    """
    state = _entries(contents.data)
    prefixes = [name.removesuffix(key) for name in state if isinstance(name, str) and ends_with(name, key)]
    if not prefixes:
        raise Unreadable(f"it has no tensor {key}")
    prefix = min(prefixes, key=lambda prefix: (not prefix.endswith("generator."), len(prefix)))
    state = {
        name.removeprefix(prefix): value
        for name, value in state.items()
        if isinstance(name, str) and name.startswith(prefix)
    }
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise Unreadable(f"its entry {prefix}{name} is of the type {type(value).__name__}, not a tensor")
    return state


def _entries(data: Any) -> dict[Any, Any]:
    """The state dict that torch.save was given, alone or as an entry of that name."""
    state = data.get("state_dict", data) if isinstance(data, dict) else data
    if isinstance(state, Placeholder):
        raise Unreadable(f"it holds a pickled object of the class {type(state).__name__} instead of a state dict")
    if not isinstance(state, dict):
        raise Unreadable(f"it has no state dict, but a value of the type {type(state).__name__}")
    return state


def ends_with(name: str, key: str) -> bool:
    """Whether a name of a state dict is `key`, with or without a prefix."""
    return f".{name}".endswith(f".{key}")


def build(checkpoint: Checkpoint, size: int, network: Any, make: Callable[[Any], Any]) -> Any:
    """Returns `make(config)` with the parameters and notes of a checkpoint, in eval mode, on the CPU.

    The config is compared with the tensors before memory is allocated: it may have no more layers than the file has
    tensors, the network is made on the meta device to compare names and shapes, and it may have no more elements than
    the file has bytes.

    Args:
        size: bytes of the file.
        network: the class, for the errors and the class of its config.

    Raises:
        Unreadable: the config is not one of the network, or the tensors are not the config's.
    """
    config, (_, state, notes) = _config(network, checkpoint.config), checkpoint
    if config.depth > len(state):
        raise Unreadable(f"its config has {config.depth} layers, but the file only {len(state)} tensors")
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # making the network will warn again
            expected = make(config).state_dict()
    except Exception as error:
        raise Unreadable(f"no {network.NETWORK} can be made of its config") from error
    # Files of torch before 0.4.1 have no such counters, and nothing reads them.
    state = {
        name: torch.zeros_like(value, device="cpu")
        for name, value in expected.items()
        if name.endswith("num_batches_tracked")
    } | state
    _compare(expected, state)
    if (elements := sum(value.numel() for value in expected.values())) > size:
        raise Unreadable(f"its tensors have {elements} elements, but the file only {size} bytes")
    with torch.device("cpu"):
        model = make(config)
    model.load_state_dict(state)
    model.notes = notes
    return model.eval()


def _config(network: Any, values: Any) -> Any:
    """The config of a network with these values, whose names and types are checked; lists become tuples."""
    if not isinstance(values, dict):
        raise Unreadable(f"its config is not a JSON object: {str(values)[:60]}")
    types = typing.get_type_hints(network.CONFIG)
    if unknown := [name for name in values if name not in types]:
        raise Unreadable(
            f"its config has the entry {str(unknown[0])[:60]!r}, which {named(network.NETWORK)} does not have"
        )
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    for name, value in values.items():
        if not _is(value, types[name]):
            kind = TYPES.get(types[name], "a list of integers")
            raise Unreadable(f"the {name} in its config must be {kind}; got {str(value)[:60]}")
    try:
        return network.CONFIG(**values)
    except ValueError as error:
        raise Unreadable(f"in its config {error}") from error


def _is(value: Any, kind: Any) -> bool:
    """Whether a value has a type of a config's fields: bool, int (not negative), float (finite), str, tuple."""
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is(item, typing.get_args(kind)[0]) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return type(value) is kind and (kind is not int or value >= 0)


def _compare(expected: Mapping[str, torch.Tensor], state: StateDict) -> None:
    """Raises unless the names and shapes are equal."""
    for name, value in expected.items():
        if name not in state:
            raise Unreadable(f"it has no tensor {name}, which its config needs")
        if state[name].shape != value.shape:
            shapes = f"{list(state[name].shape)}; its config needs {list(value.shape)}"
            raise Unreadable(f"its tensor {name} has the shape {shapes}")
    if unknown := [name for name in state if name not in expected]:
        raise Unreadable(f"it has a tensor {unknown[0]}, which its config does not need")


def identify(contents: Contents, networks: Sequence[Any]) -> Any:
    """Returns the class in `networks` whose checkpoint the file is.

    The name in the file decides. A file without one (an older release's, or a state dict) is recognized by a state-dict
    key that only this network has, the class attribute KEY.

    Raises:
        Unreadable: it is none of them.
    """
    data = contents.data if isinstance(contents.data, dict) else {}
    spec = data.get("model")
    name = contents.texts.get("network")
    if isinstance(spec, dict) and isinstance(spec.get("name"), str):  # as yinboc/liif writes it
        name = spec["name"]
    if name is not None:
        for network in networks:
            if network.NETWORK.lower() == name.lower():
                return network
        raise Unreadable(f"it contains the network {name}")
    names = [str(name) for name in _entries(contents.data)]
    for matches in (str.__eq__, ends_with):
        for network in networks:
            if any(matches(name, network.KEY) for name in names):
                return network
    raise Unreadable("its tensors belong to none of them")


@contextmanager
def errors(path: FilePath, *networks: Any) -> Iterator[None]:
    """Turns what reading a file raises into a ValueError of one sentence, but for an OSError of opening or reading it.

    It names the file, what was found in it, and what these networks read.
    """
    check_path(path)
    try:
        yield
    except OSError as error:
        if error.filename is None:  # of reading, after opening
            error.filename = os.fspath(path)
        raise
    except UNREADABLE as error:
        *others, last = (network.NETWORK for network in networks)
        names = f"{', '.join(others)} or {last}" if others else last
        reason = str(error) if isinstance(error, Unreadable) else "its contents are not structured as in one"
        formats = ["files that `save` wrote", *(network.READS for network in networks if network.READS)]
        file, reason = printable(os.fsdecode(path)), printable(reason[:300])
        raise ValueError(
            f"{file} is not {named(names)} checkpoint: {reason} (readable: {'; '.join(formats)})"
        ) from error


def named(network: str) -> str:
    """The name with its article."""
    return f"{'an' if network[0] in 'AEIOU' else 'a'} {network}"
