"""The options of a training run: dataclasses with a help text for each, filled from YAML and the command line."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from inr_kernels._core.checks import require

CONFIGS = Path(__file__).parent / "configs"
UNITS = {"step": False, "steps": False, "epoch": True, "epochs": True}


def option(default: Any, text: str) -> Any:
    """A field of a dataclass with a default and a help text."""
    metadata = {"help": text}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Options:
    """What every recipe takes. A duration is a number of steps, or a text such as "15 epochs"."""

    network: str = option("", "which network to train: the name of a recipe")
    model: dict[str, Any] = option({}, "its structure: fields of the network's config that differ from the defaults")
    start: str = option("", "checkpoint of such a network whose parameters to start from; empty: random ones")
    out: str = option("", "folder of the run, the only place where it writes")

    data: Any = option(
        "",
        "folders, pictures, or .txt files with a path in each line; one or a list; empty: scikit-image's photographs",
    )
    repeat: int = option(1, "how often an epoch shows each picture")
    min_side: int = option(32, "pictures with a shorter side are skipped, in pixels")
    max_megapixels: float = option(100.0, "larger pictures are skipped")
    cache: int = option(1024, "memory for decoded pictures, in MB, divided among the workers")
    workers: int = option(0, "processes that prepare batches; 0: the training process does")

    steps: Any = option(1000, "duration of the training")
    batch: int = option(8, "samples of a step, on all devices together")
    accumulate: int = option(1, "parts of a batch that are computed one after the other, to save memory")
    seed: int = option(0, "of the initial parameters, the order of the data and all other random numbers")
    lr: float = option(1e-3, "the highest learning rate of Adam")
    betas: list[float] = option([0.9, 0.999], "of Adam")
    eps: float = option(1e-8, "of Adam")
    warmup: Any = option(0, "duration of a linear rise of the learning rate, from warmup_lr")
    warmup_lr: float = option(0.0, "learning rate before the first step of the warm-up")
    schedule: str = option("cosine", "learning rate after the warm-up: cosine (half a period, to 0), halve or constant")
    halve_every: Any = option(0, "duration between two halvings of the learning rate, with schedule=halve")
    clip: float = option(0.0, "largest norm of the gradient; 0: no limit")
    ema: float = option(0.0, "decay of the averaged parameters that the result then has; 0: no average")

    accelerator: str = option("cpu", "of Lightning Fabric: cpu, cuda, auto")
    timeout: float = option(
        120.0, "minutes that a process waits for another, as while the first one validates or saves"
    )
    devices: int = option(1, "devices or, on a CPU, processes; with torchrun: of each node")
    nodes: int = option(1, "machines, with torchrun")
    strategy: str = option("auto", "auto or ddp: every process has all parameters, and the gradients are averaged")
    precision: str = option("32-true", "32-true, or bf16-mixed: bfloat16 where the recipe uses autocast")
    float32_end: float = option(0.0, "share of the last steps that run in float32 whatever precision says")

    log_every: int = option(10, "steps between two entries of the losses in TensorBoard's file")
    pictures_every: int = option(500, "steps between two pictures there; 0: none")
    validate: Any = option("", "held-out pictures, as data; empty: the middle of scikit-image's coffee")
    validate_every: int = option(1000, "steps between two validations; one follows the last step; 0: none")
    save_every: int = option(250, "steps between two saves, from which --resume continues")


def require_range(options: Any, name: str, rule: str, fits: Callable[[float], bool]) -> None:
    """Raises ValueError unless an option is two numbers, the lower one first, of which each fits.

    rule: completes "must be two numbers", such as "of at least 1".
    """
    values = getattr(options, name)
    is_range = len(values) == 2 and values[0] <= values[1] and all(map(fits, values))
    require(is_range, name, f"be two numbers {rule}, the lower one first", values)


def recipes() -> list[str]:
    """Returns the names of the recipes: the modules of this folder that define NETWORK."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return [file.stem for file in files if "\nNETWORK = " in file.read_text()]


def recipe(name: str) -> Any:
    """Returns the module of a recipe.

    Raises:
        ValueError: there is none of that name.
    """
    require(name in recipes(), "network", f"be one of {', '.join(recipes())}", repr(name))
    return import_module(f".{name}", __package__)


def load(name: str, changes: Sequence[str] = ()) -> Any:
    """Returns the options of a shipped config or of a YAML file, an instance of the recipe's class `Options`.

    Args:
        name: of a file in configs/, without the suffix, or the path of a YAML file.
        changes: such as "steps=20" and "loss.perceptual=0".

    Raises:
        ImportError: OmegaConf is not installed.
        OSError: the file cannot be read.
        ValueError: an option is unknown or of another type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    shipped = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    path = CONFIGS / f"{name}.yaml" if name in shipped else Path(name)
    names = f"be {', '.join(shipped)}, or the path of a YAML file"
    require(name in shipped or path.suffix in (".yaml", ".yml"), "CONFIG", names, name)
    for change in changes:
        require("=" in change, "an option", "be written as key=value", change)
    try:
        given: Any = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(changes)))
        require(OmegaConf.is_dict(given), "CONFIG", "hold options and their values", name)
        merged = OmegaConf.merge(OmegaConf.structured(recipe(str(given.get("network"))).Options), given)
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(str(error).split("\n")[0]) from error
    except YAMLError as error:
        raise ValueError(f"{name}: {error}") from error


def to_yaml(options: Any) -> str:
    """Returns a YAML text with every option, its value and, in a comment, its help."""
    return "\n".join(_lines(options, "")) + "\n"


def _lines(options: Any, indent: str) -> Iterator[str]:
    import yaml

    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        yield f"{indent}# {field.metadata['help']}"
        if dataclasses.is_dataclass(value):
            yield f"{indent}{field.name}:"
            yield from _lines(value, indent + "  ")
        else:
            text = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
            yield f"{indent}{field.name}: {text}"


def duration(name: str, value: Any, per_epoch: int) -> int:
    """Returns a duration in steps.

    Args:
        name: of the option, for the error.
        value: a number of steps, or a text: "15 epochs", "200 steps".
        per_epoch: steps of an epoch.

    Raises:
        ValueError: it is neither.
    """
    number, _, unit = str(value).partition(" ")
    rule = 'be a number of steps or a text such as "15 epochs"'
    require(number.isdecimal() and (unit or "steps") in UNITS, name, rule, repr(value))
    return int(number) * (per_epoch if unit and UNITS[unit] else 1)
