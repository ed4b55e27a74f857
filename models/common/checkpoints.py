"""Reads and writes checkpoints: one safetensors file with the parameters, the network's name, its config and notes.

The header (safetensors metadata) has the keys `format_version`, `network` ("DEAR"), `config` and `notes` (both JSON).
Files of older releases have `config` and `notes` only; they open as well.
"""

import dataclasses
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize

from .files import replace_file

VERSION = 1
# Raised by torch, safetensors and files of an unexpected structure.
UNREADABLE: tuple[type[Exception], ...] = (OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError)
UNREADABLE += (AttributeError, pickle.UnpicklingError, SafetensorError)

StateDict = dict[str, torch.Tensor]
FilePath = str | os.PathLike[str]


class Checkpoint(NamedTuple):
    """The content of a file; config is None if the file has none, as one that another library wrote."""

    config: dict[str, Any] | None
    state: StateDict
    notes: Any


def save(model: Any, path: FilePath, notes: Any, dtype: torch.dtype | None = None) -> None:
    """Writes a network with the attributes NETWORK and config (a dataclass), atomically.

    Args:
        notes: any JSON value.
        dtype: of the floating-point tensors in the file; None: unchanged.
    """
    metadata = {"format_version": str(VERSION), "network": model.NETWORK}
    metadata |= {"config": json.dumps(dataclasses.asdict(model.config)), "notes": json.dumps(notes)}
    state = {
        name: value.to(dtype if dtype and value.is_floating_point() else value.dtype).contiguous()
        for name, value in model.state_dict().items()
    }
    replace_file(path, serialize(state, metadata))


def is_safetensors(path: FilePath) -> bool:
    """Whether the file starts as a safetensors file does: eight bytes, then a JSON object."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def read(path: FilePath, network: str) -> Checkpoint:
    """Reads a safetensors file of `network`; lists in the config become tuples, as in the dataclasses.

    Raises:
        ValueError: the header names another network or a later format version.
    """
    if not is_safetensors(path):
        raise ValueError("it is not a safetensors file")
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        written = metadata.get("network", network)
        if written != network:
            raise ValueError(f"it contains {named(written)}")
        version = metadata.get("format_version", "1")
        if int(version) > VERSION:
            raise ValueError(f"its format version is {version}; this release reads up to {VERSION}")
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if "config" not in metadata:
        return Checkpoint(None, state, {})
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(metadata["config"]).items()}
    return Checkpoint(config, state, json.loads(metadata.get("notes", "{}")))


class _Placeholder:
    """Replaces every class that a pickle names and torch does not allow."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_torch(path: FilePath) -> Any:
    """Reads a file of torch.save. Objects of other classes than torch allows become placeholders: no code of the file
    runs.

    Raises:
        ValueError: it is not a file of torch.save, or one that only its own code could load.
    """
    zipped = zipfile.is_zipfile(path)
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
    placeholders: list[Any] = [(type("Placeholder", (_Placeholder,), {}), name) for name in names]
    try:
        with torch.serialization.safe_globals(placeholders):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (pickle.UnpicklingError, EOFError, LookupError) as error:
        # Not torch's message, which advises to load with weights_only=False: that runs code of the file.
        raise ValueError("it is neither a safetensors file nor one of torch.save that can be loaded safely") from error


def load(
    path: FilePath, network: str, read: Callable[[FilePath], Checkpoint], make: Callable[[dict[str, Any]], Any]
) -> Any:
    """Returns `make(config)` with the parameters and notes of a file, in eval mode.

    Args:
        network: its name, for errors.
        read: reads the file; raises what UNREADABLE lists.

    Raises:
        OSError: the file cannot be read.
        ValueError: "PATH is not a DEAR checkpoint: ...", with the reason.
    """
    with errors(path, network):
        config, state, notes = read(path)
        if config is None:
            raise ValueError("its metadata has no config")
        model = make(config)
        model.load_state_dict(state)
        model.notes = notes
        return model.eval()


def identify(path: FilePath, networks: Sequence[Any]) -> Any:
    """Returns the class in `networks` whose checkpoint the file is.

    The name in the file decides. A file without one (an older release's, or a bare state dict) is recognized by a
    state-dict key that only this network has, the class attribute KEY.

    Raises:
        OSError: the file cannot be read.
        ValueError: "PATH is not a DEAR, ... checkpoint: ...", with the reason.
    """
    with errors(path, *(network.NETWORK for network in networks)):
        name, keys = _contents(path)
        for network in networks:
            if network.KEY in keys if name is None else network.NETWORK.lower() == name.lower():
                return network
        raise ValueError("its tensors belong to none of them" if name is None else f"it contains {named(name)}")


def _contents(path: FilePath) -> tuple[str | None, set[str]]:
    """The network's name in a file, or None, and the keys of its state dict."""
    if is_safetensors(path):
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("network"), set(file.keys())
    content = read_torch(path)
    if not isinstance(content, dict):
        raise ValueError("it has no state dict")
    spec = content.get("model")
    if isinstance(spec, dict) and isinstance(spec.get("name"), str):  # as yinboc/liif writes it
        return spec["name"], set()
    return None, {str(key).removeprefix("generator.") for key in content.get("state_dict", content)}


@contextmanager
def errors(path: FilePath, *networks: str) -> Iterator[None]:
    """Turns what reading a file raises into a ValueError that names the file, but for the system's own OSError."""
    with open(path, "rb"):
        pass
    try:
        yield
    except UNREADABLE as error:
        *others, last = networks
        names = f"{', '.join(others)} or {last}" if others else last
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{os.fspath(path)} is not {named(names)} checkpoint: {reason[:300]}") from error


def named(network: str) -> str:
    """The name with its article."""
    return f"{'an' if network[0] in 'AEIOU' else 'a'} {network}"
