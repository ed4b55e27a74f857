"""A network in one safetensors file: its parameters, its config, and notes on where they come from."""

import dataclasses
import json
import os
import pickle

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize

from .files import replace_file

# What torch, safetensors and a wrong structure raise.
UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError, AttributeError)
UNREADABLE += (pickle.UnpicklingError, SafetensorError)


def save(model, path, notes, dtype=None):
    """Writes `model` of a dataclass `model.config`, whole or not at all; notes: whatever JSON holds."""
    metadata = {"config": json.dumps(dataclasses.asdict(model.config)), "notes": json.dumps(notes)}
    state = {name: value.to(dtype or value.dtype).contiguous() for name, value in model.state_dict().items()}
    replace_file(path, serialize(state, metadata))


def read(path):
    """(config, state dict, notes) of what `save` wrote; tuples in config, as a dataclass's defaults are."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if "config" not in metadata:
        raise ValueError("its metadata has no config")
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(metadata["config"]).items()}
    return config, state, json.loads(metadata.get("notes", "{}"))


def load(path, network, make, read=read):
    """The network that `make(config)` gives, in eval mode, with what `read(path)` has: config, state dict, notes.

    network: "a LIIF", for errors.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or holds something else; the message says what.
    """
    with open(path, "rb"):  # the system's own error, before any library's
        pass
    try:
        config, state, notes = read(path)
        model = make(config)
        model.load_state_dict(state)
    except UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{os.fspath(path)} is not {network} checkpoint: {reason[:300]}") from error
    model.notes = notes
    return model.eval()
