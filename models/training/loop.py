"""The training loop that all recipes share, on Lightning Fabric.

A step depends on the seed, its number, the data, the parameters and the optimizers' state only: a run that continues
from a checkpoint computes what an uninterrupted one computes, bit for bit on the same machine.
"""

import dataclasses
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from inr_kernels._core.checks import require
from inr_kernels._core.files import check_run
from inr_kernels._core.text import printable

from ..data.photographs import HELD_OUT, TRAINED_ON
from . import state
from .config import duration, recipe, to_yaml
from .samples import Batches, held_out, loader, training_pictures

PACKAGES = {"lightning_fabric": "lightning-fabric", "tensorboard": "tensorboard"}
POSITIVE = ("timeout", "repeat", "batch", "accumulate", "devices", "nodes", "log_every", "save_every")
NOT_NEGATIVE = ("workers", "cache", "clip", "warmup_lr", "pictures_every", "validate_every", "seed", "min_side")
CHOICES = {
    "schedule": ("cosine", "halve", "constant"),
    "strategy": ("auto", "ddp"),
    "precision": ("32-true", "bf16-mixed"),
    "accelerator": ("cpu", "cuda", "auto"),
}
ADVICE = "try a lower lr, or clip=1, and --resume"


def check(options: Any) -> None:
    """Checks what can be known before the work: values, packages, files.

    Raises:
        ImportError: a package is missing; the message says which.
        OSError: a file is missing.
        ValueError: options do not fit together.
    """
    module = recipe(options.network)
    for name in POSITIVE:
        require(getattr(options, name) > 0, name, "be positive", getattr(options, name))
    for name in NOT_NEGATIVE:
        require(getattr(options, name) >= 0, name, "not be negative", getattr(options, name))
    fits = len(options.betas) == 2 and all(0 <= beta < 1 for beta in options.betas)
    require(fits, "betas", "be two numbers from 0 to below 1", options.betas)
    require(getattr(options, "zoom", 1) >= 1, "zoom", "be at least 1", getattr(options, "zoom", 1))
    require(0 <= options.ema < 1, "ema", "be from 0 to below 1", options.ema)
    for name, values in CHOICES.items():
        value = getattr(options, name)
        require(value in values, name, f"be one of {', '.join(values)}", repr(value))
    parts = options.accumulate * options.devices * options.nodes
    require(options.batch % parts == 0, "batch", "be a multiple of accumulate * devices * nodes", options.batch)
    require(bool(options.out), "out", "name the folder of the run", "none: add out=FOLDER")
    module.check(options)
    needed = dict(PACKAGES)
    if options.validate_every:
        needed |= module.EXTRAS
    if not options.data or (options.validate_every and not options.validate):
        needed["skimage"] = "scikit-image"
    if missing := [package for name, package in needed.items() if find_spec(name) is None]:
        raise ImportError(f"the run needs {', '.join(missing)}: pip install 'inr-kernels[train]'")


def learning_rate(step: int, steps: int, warmup: int, options: Any, halve_every: int = 0) -> float:
    """Returns the learning rate of a step: a linear warm-up, then the schedule.

    Args:
        step, steps: number of the step, from 0, and of all steps.
        warmup, halve_every: in steps.
        options: with lr, warmup_lr and schedule.
    """
    if step < warmup:
        return options.warmup_lr + (options.lr - options.warmup_lr) * (step + 1) / warmup
    if options.schedule == "cosine":
        return options.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
    return options.lr * 0.5 ** (step // halve_every) if options.schedule == "halve" and halve_every else options.lr


def train(options: Any, resume: bool = False) -> Path | None:
    """Trains a network and returns the path of its checkpoint, `model.safetensors` in the run's folder; None in all
    processes but the first.

    Args:
        options: of `config.load`.
        resume: continue the run in the folder `out`, from its newest checkpoint.

    Raises:
        ImportError, OSError, ValueError: see `check`; the folder holds a run, or none if it is resumed.
        RuntimeError: the loss is not finite.
    """
    check(options)
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy

    strategy: Any = options.strategy
    if strategy == "ddp" or options.devices * options.nodes > 1:
        # The others wait for the first process in their next exchange of gradients, while it validates.
        strategy = DDPStrategy(timeout=timedelta(minutes=options.timeout))
    fabric = Fabric(
        accelerator=options.accelerator,
        devices=options.devices,
        num_nodes=options.nodes,
        strategy=strategy,
        precision=options.precision,
    )
    fabric.launch()
    run = Run(fabric, options, resume)
    return run.train()


class Run:
    """A run: the network, what is trained beside it, their optimizers, the data and the folder."""

    def __init__(self, fabric: Any, options: Any, resume: bool):
        self.fabric, self.options, self.recipe = fabric, options, recipe(options.network)
        self.folder = Path(options.out)
        check_run(self.folder, resume)
        if resume:
            state.check_options(self.folder, options)
        pictures = training_pictures(options)
        self.held_out = held_out(options) if options.validate_every else []
        self.batches = Batches(self.recipe, options, pictures, fabric.global_rank, fabric.world_size)
        epoch = max(1, len(pictures) * options.repeat // options.batch)
        names = ("steps", "warmup", "halve_every")
        self.steps, self.warmup, self.halve_every = (duration(n, getattr(options, n), epoch) for n in names)
        require(self.steps > 0, "steps", "be positive", self.steps)

        torch.manual_seed(options.seed)
        network = self.recipe.NETWORK
        self.model: Any = network(state.network_config(network, options.model))
        if options.start and not resume:
            start = network.from_checkpoint(options.start)
            begin = getattr(self.recipe, "begin", lambda model, start: model.load_state_dict(start.state_dict()))
            begin(self.model, start)
        self.model = synchronized(self.model, fabric.world_size, fabric.device, say=fabric.is_global_zero)
        self.model.train().to(fabric.device)
        self.objective = self.recipe.Objective(options, fabric.device)
        self.parts: dict[str, nn.Module] = {"network": self.model, **self.objective.parts}
        settings = {"lr": options.lr, "betas": tuple(options.betas), "eps": options.eps}
        self.optimizers = {name: torch.optim.Adam(part.parameters(), **settings) for name, part in self.parts.items()}
        if (groups := getattr(self.recipe, "groups", None)) is not None:
            self.optimizers["network"] = torch.optim.Adam(groups(self.model, options), **settings)
        self.average: AveragedModel | None = None
        if options.ema:
            self.average = AveragedModel(self.model, multi_avg_fn=moving_average(options.ema), use_buffers=True)
        self.step = state.load(self.folder, self) if resume else 0
        self.metrics: dict[str, float] = {}
        fabric.barrier()  # no process writes before all have checked the folder
        if fabric.is_global_zero:
            state.write_text(self.folder / "config.yaml", to_yaml(options))

    @property
    def result(self) -> Any:
        """The network that the run is for: the average, if there is one."""
        return self.model if self.average is None else self.average.module

    def train(self) -> Path | None:
        """Trains to the last step; see `train`."""
        from torch.utils.tensorboard import SummaryWriter

        options, fabric = self.options, self.fabric
        first = fabric.is_global_zero
        self.writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step + 1) if first else None
        last = self.steps * options.accumulate
        parts = loader(self.batches, self.step * options.accumulate, last, options.workers)
        bar = tqdm(total=self.steps, initial=self.step, desc=options.network, disable=None if first else True)
        reported = set[str]()
        for step in range(self.step, self.steps):
            batches = []
            for _ in range(options.accumulate):
                batch, problems = next(parts)
                batches.append(tuple(tensor.to(fabric.device) for tensor in batch))
                for problem in dict.fromkeys(problems):
                    if problem not in reported:
                        reported.add(problem)
                        of_process = f"process {fabric.global_rank}: " * (fabric.world_size > 1)
                        bar.write(f"inr-kernels: {of_process}{printable(problem)}", file=sys.stderr)
            terms = self._update(step, batches)
            self.step = step + 1
            self._report(terms, batches[0], bar)
            if self.step % options.save_every == 0 or self.step == self.steps:
                self._check_parameters()
                if self.writer:
                    self.writer.flush()
                    state.save(self.folder, self)
            bar.update()
        bar.close()
        if self.writer:
            self.writer.close()
        fabric.barrier()
        return self.folder / state.RESULT if first else None

    def _update(self, step: int, batches: list[tuple[torch.Tensor, ...]]) -> dict[str, torch.Tensor]:
        """Makes a step of all optimizers; returns the mean terms of the loss on this process."""
        options = self.options
        seeds = numpy.random.SeedSequence([options.seed, step, self.fabric.global_rank])
        torch.manual_seed(int(seeds.generate_state(1)[0]))
        lr = learning_rate(step, self.steps, self.warmup, options, self.halve_every)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("factor", 1)
        float32 = step >= (1 - options.float32_end) * self.steps
        totals: dict[str, torch.Tensor] = {}
        for batch in batches:
            terms = self.objective(self.model, batch, nullcontext if float32 else self.fabric.autocast)
            (
                sum(terms.values(), torch.zeros((), dtype=torch.float32, device=self.fabric.device)) / len(batches)
            ).backward()
            for name, value in terms.items():
                totals[name] = totals.get(name, 0) + value.detach() / len(batches)
        for name, part in self.parts.items():
            average_gradients(self.fabric, part)
            if options.clip:
                nn.utils.clip_grad_norm_(part.parameters(), options.clip)
            self.optimizers[name].step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return totals

    def _check_parameters(self) -> None:
        """Raises RuntimeError before parameters that are not finite replace the last checkpoint."""
        for name, part in self.parts.items():
            if not all(parameter.isfinite().all() for parameter in part.parameters()):
                raise RuntimeError(f"step {self.step}: the parameters of the {name} are not finite; {ADVICE}")

    def _report(self, terms: dict[str, torch.Tensor], batch: tuple[torch.Tensor, ...], bar: Any) -> None:
        """Writes losses, pictures and metrics where they are due after a step."""
        options, step, last = self.options, self.step, self.step == self.steps
        if step % options.log_every == 0 or last:
            values = self.fabric.all_reduce(torch.stack(list(terms.values())), reduce_op="mean").tolist()
            require_finite(dict(zip(terms, values, strict=True)), step)
            if self.writer:
                for name, value in zip(terms, values, strict=True):
                    self.writer.add_scalar(f"loss/{name}", value, step)
                self.writer.add_scalar("learning_rate", self.optimizers["network"].param_groups[0]["lr"], step)
                bar.set_postfix(
                    {name: f"{value:.4f}" for name, value in zip(terms, values, strict=True)}, refresh=False
                )
        if not self.writer:
            return
        pictures = options.pictures_every and (step % options.pictures_every == 0 or last)
        validation = options.validate_every and (step % options.validate_every == 0 or last)
        if not pictures and not validation:
            return
        model = self.result
        training = model.training
        model.eval()
        with torch.no_grad():
            if pictures:
                for i, picture in enumerate(self.recipe.show(model, batch)):
                    self.writer.add_image(f"sample/{i}", picture.float().clamp(0, 1).cpu(), step)
            if validation:
                self.metrics = self.recipe.validate(model, self.held_out, options)
                for name, value in self.metrics.items():
                    self.writer.add_scalar(f"validation/{name}", value, step)
                text = ", ".join(f"{name} {value:.2f}" for name, value in self.metrics.items())
                bar.write(f"step {step}: {text}", file=sys.stderr)
        model.train(training)

    def notes(self) -> dict[str, Any]:
        """Returns the notes of the checkpoint: data, options and metrics."""
        options = dataclasses.asdict(self.options)
        data = options.pop("data") or [f"skimage.data.{name}" for name in TRAINED_ON]
        held = options.pop("validate") or f"skimage.data.{HELD_OUT}"
        del options["out"]
        return {"trained_on": data, "held_out": held, "recipe": options, "step": self.step, **self.metrics}


def average_gradients(fabric: Any, module: nn.Module) -> None:
    """Replaces a module's gradients by their means over all processes."""
    grads = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    if fabric.world_size == 1 or not grads:
        return
    means = fabric.all_reduce(torch.cat([grad.flatten() for grad in grads]), reduce_op="mean")
    for grad, mean in zip(grads, means.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


def moving_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """Returns the update of an exponential moving average, for AveragedModel.

    The decay of step n is at most n / (n + 9), so that the average of a short run does not hold the random parameters
    at its start.
    """

    def update(averages: Any, values: Any, count: Any) -> None:
        get_ema_multi_avg_fn(min(decay, float(count) / (float(count) + 9)))(averages, values, count)

    return update


def synchronized(model: nn.Module, world: int, device: torch.device, say: bool = True) -> nn.Module:
    """Returns the network with batch norms whose statistics are those of all processes, if there are several on GPUs.

    PyTorch has no such layer for CPUs: there every process has its own statistics, which is said on stderr.
    """
    norms = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    if world == 1 or not norms:
        return model
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if say:
        print("inr-kernels: on CPUs each process has its own statistics in batch norms", file=sys.stderr)
    return model


def require_finite(terms: dict[str, float], step: int) -> None:
    """Raises RuntimeError if a term of the loss is infinite or NaN."""
    if wrong := [f"{name} is {value}" for name, value in terms.items() if not math.isfinite(value)]:
        raise RuntimeError(f"step {step}: the loss must be finite; {', '.join(wrong)}; {ADVICE}")
