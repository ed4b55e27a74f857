"""Folders of the Hugging Face Hub: writes, uploads and fetches them with huggingface_hub, the extra `hub`.

huggingface_hub is imported when it is needed: its import takes as long as a small picture.
"""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inr_kernels._core.files import check_path
from inr_kernels._core.text import one_line

FILE = "model.safetensors"  # huggingface_hub's name
CARD = """\
---
{{ card_data }}
---

# {{ network }}

A checkpoint of inr_kernels with {{ parameters }} parameters. `{{ network }}.from_pretrained` opens it, by this
repository's name or the path of a copy; `from_checkpoint` opens the file model.safetensors.

Notes in the file:

```json
{{ notes }}
```
"""


def save(network: Any, folder: str | os.PathLike[str], options: dict[str, Any]) -> str | None:
    """`Network.save_pretrained`."""
    check_path(folder)
    pushes = options.get("push_to_hub", False)
    model = _mixin()(network)
    with _errors(f"{os.fspath(folder)} cannot be uploaded") if pushes else contextlib.nullcontext():
        return model.save_pretrained(folder, **options)


def push(network: Any, repo_id: str, options: dict[str, Any]) -> str:
    """`Network.push_to_hub`."""
    model = _mixin()(network)
    with _errors(f"{repo_id} cannot be uploaded"):
        return model.push_to_hub(repo_id, **options)


def fetch(name: str | os.PathLike[str], filename: str, options: dict[str, Any]) -> str:
    """Returns the path of a file in the folder `name`, or of a copy of that of the repository `name`.

    Args:
        options: of `huggingface_hub.hf_hub_download`.

    Raises:
        ImportError: huggingface_hub is not installed.
        OSError: there is neither, or the Hub cannot be reached.
        TypeError: name is no path.
    """
    check_path(name)
    name = os.fsdecode(name)
    _require()
    if os.path.isdir(name):
        return os.path.join(name, filename)
    if os.path.exists(name):
        raise NotADirectoryError(f"{name} must be a folder or a repository's name; from_checkpoint opens a file")
    from huggingface_hub import hf_hub_download

    with _errors(f"{name} is no folder, and its {filename} cannot be fetched from the Hugging Face Hub"):
        return hf_hub_download(name, filename, **options)


def _require() -> None:
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        names = "save_pretrained, push_to_hub and from_pretrained"
        raise ImportError(f"{names} need huggingface_hub: pip install 'inr-kernels[hub]'") from error


@contextlib.contextmanager
def _errors(sentence: str) -> Iterator[None]:
    """Turns any error into an OSError of one line; errors of HTTP clients are not all OSErrors."""
    try:
        yield
    except Exception as error:
        raise OSError(f"{sentence}: {one_line(error)}") from error


@functools.cache
def _mixin() -> Any:
    """A class of huggingface_hub's models that holds one of our networks."""
    _require()
    from huggingface_hub import ModelCard, PyTorchModelHubMixin

    class Folder(PyTorchModelHubMixin, library_name="inr-kernels", pipeline_tag="image-to-image"):
        def __init__(self, network: Any):
            self.network = network

        def _save_pretrained(self, save_directory: Path) -> None:
            """Our file, and for people and the Hub's count of downloads the config, which nothing here reads."""
            self.network.save(save_directory / FILE)
            config = {"network": self.network.NETWORK, **dataclasses.asdict(self.network.config)}
            (save_directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")

        def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
            facts = {
                "network": self.network.NETWORK,
                "parameters": f"{sum(parameter.numel() for parameter in self.network.parameters()):,}",
                "notes": json.dumps(self.network.notes, indent=2),
            }
            data = self._hub_mixin_info.model_card_data
            return ModelCard.from_template(data, template_str=CARD, **facts, **kwargs)

    return Folder
