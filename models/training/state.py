"""The folder of a run: what is written there, and how a run continues from it.

    config.yaml                     all options
    model.safetensors               the result so far: the network, or the average of its parameters
    checkpoints/00000250.safetensors    the network after 250 steps
    checkpoints/00000250.pt             the rest: optimizers, discriminator, average
    tensorboard/                    losses, pictures, metrics

The .pt file is written last and removed first, so that a checkpoint with one is complete.
"""

import dataclasses
import io
from pathlib import Path
from typing import Any

import torch

from inr_kernels._core.checks import require
from inr_kernels._core.files import CONFIG, TEMPORARY, replace_file

from ..common.checkpoints import load_data

RESULT, CHECKPOINTS = "model.safetensors", "checkpoints"


def network_config(network: Any, values: dict[str, Any]) -> Any:
    """Returns a network's config with these values; lists become tuples.

    Raises:
        ValueError: it has no such field, or does not take the value.
    """
    names = [field.name for field in dataclasses.fields(network.CONFIG)]
    for name in values:
        require(name in names, "model", f"have fields of {network.NETWORK}'s config: {', '.join(names)}", name)
    return network.CONFIG(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


# Options that may change when a run is continued: they do not change its numbers, or only how long it goes on.
MAY_CHANGE = {"timeout", "out", "steps", "workers", "cache", "accelerator", "devices", "nodes", "strategy", "start"}
MAY_CHANGE |= {"log_every", "pictures_every", "validate", "validate_every", "save_every"}


def check_options(folder: Path, options: Any) -> None:
    """Raises ValueError if a run in a folder had another option that changes its numbers."""
    from omegaconf import OmegaConf

    before: Any = OmegaConf.to_container(OmegaConf.load(folder / CONFIG))
    for name, value in dataclasses.asdict(options).items():
        if name not in MAY_CHANGE and name in before:
            rule = f"be {before[name]!r}, as in the run in {folder}, to resume it"
            require(before[name] == value, name, rule, repr(value))


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.encode())


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / CHECKPOINTS).glob("*.pt"))


def save(folder: Path, run: Any) -> None:
    """Writes the run's state and its result, then removes the state before."""
    (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    before = _checkpoints(folder)
    for place in (folder, folder / CHECKPOINTS):  # of a run that was killed while it wrote
        for unfinished in place.glob(f"{TEMPORARY}*"):
            unfinished.unlink()
    path = folder / CHECKPOINTS / f"{run.step:08}.pt"
    run.model.save(path.with_suffix(".safetensors"))
    run.result.save(folder / RESULT, run.notes())
    rest: dict[str, Any] = {"step": run.step, "metrics": run.metrics}
    rest["parts"] = {name: part.state_dict() for name, part in run.objective.parts.items()}
    rest["optimizers"] = {name: optimizer.state_dict() for name, optimizer in run.optimizers.items()}
    rest["average"] = run.average.state_dict() if run.average is not None else None
    file = io.BytesIO()
    torch.save(rest, file)
    replace_file(path, file.getvalue())
    for old in before:
        if old != path:
            old.unlink()
    for old in (folder / CHECKPOINTS).glob("*.safetensors"):
        if old.stem != path.stem:
            old.unlink()


def load(folder: Path, run: Any) -> int:
    """Loads the newest complete checkpoint of a folder into the run; returns its step, 0 if there is none.

    Raises:
        ValueError: the run was of another network, or trained other parts.
    """
    paths = _checkpoints(folder)
    if not paths:
        return 0
    rest: Any = load_data(paths[-1])
    network = type(run.model).from_checkpoint(paths[-1].with_suffix(".safetensors"))
    require(network.config == run.model.config, "model", f"be the one of the run in {folder}", "another")
    for name, found, wanted in (
        ("loss", rest["parts"].keys(), run.objective.parts.keys()),
        ("ema", rest["average"] is not None, run.average is not None),
    ):
        require(found == wanted, name, f"train what the run in {folder} trained", "another setting")
    run.model.load_state_dict(network.state_dict())
    for name, part in run.objective.parts.items():
        part.load_state_dict(rest["parts"][name])
    for name, optimizer in run.optimizers.items():
        optimizer.load_state_dict(rest["optimizers"][name])
    if run.average is not None:
        run.average.load_state_dict(rest["average"])
    run.metrics = rest["metrics"]
    return int(rest["step"])
