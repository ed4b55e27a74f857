"""The command line and the training loop that the recipes share; a run can be resumed."""

import io
import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from tqdm import tqdm

from inr_kernels._core.checks import require
from inr_kernels._core.files import replace_file

from ..common.checkpoints import load_data
from ..data.photographs import HELD_OUT, TRAINED_ON


def parser(about: str, *, out: Path, steps: int, lr: float) -> ArgumentParser:
    """Returns the command line of a recipe with these defaults."""
    parser = ArgumentParser(description=about)
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=lr, help="the peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--bf16", action="store_true", help="encode in bfloat16 in the first 80 %% of the steps: faster"
    )
    parser.add_argument("--resume", action="store_true", help="continue from OUT's .training.pt")
    return parser


def notes(args: Namespace, per_crop: str, options: str, metric: str, values: Any) -> dict[str, Any]:
    """Returns the notes of a checkpoint: data, recipe and metrics.

    Args:
        per_crop: samples per crop, such as "384 queries".
        options: further options of the command line.
        metric: the key of `values`.
    """
    recipe = (
        f"{args.steps} steps of {args.batch} crops, {per_crop} each, peak learning rate {args.lr:g},"
        f" seed {args.seed}{', --bf16' if args.bf16 else ''}{options}"
    )
    return {
        "trained_on": [f"skimage.data.{name}" for name in TRAINED_ON],
        "held_out": f"skimage.data.{HELD_OUT}",
        "recipe": recipe,
        metric: values,
    }


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A linear warm-up of 200 steps, then half a cosine to zero."""
    return peak * min(1, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))


def optimize(
    model: Any,
    args: Namespace,
    loss: Callable[[numpy.random.Generator, bool], torch.Tensor],
    measured: Callable[[Any], Any],
    save_every: int,
    *,
    extra_state: dict[str, Any] | None = None,
    eps: float = 1e-8,
) -> Any:
    """Trains the network with Adam and returns it in eval mode.

    Args:
        model: the network.
        args: of `parser`. The state is saved in OUT's .training.pt, from which --resume continues.
        loss: loss(rng, use_bfloat16) -> the loss of a step on crops drawn with rng.
        measured: measured(model) -> metrics, printed every 1000 steps.
        save_every: steps between two saves of the state.
        extra_state: further objects with a state_dict that `loss` trains, by name, saved and loaded with the rest; an
            optimizer gets the same learning rate.
        eps: Adam's.

    Raises:
        ValueError: --resume of a run that trained other objects, or whose state cannot be read.
    """
    optimizer = torch.optim.Adam(model.parameters(), eps=eps)
    state, start = args.out.with_suffix(".training.pt"), 0
    parts = {"model": model, "optimizer": optimizer, **(extra_state or {})}
    if args.resume:
        saved = load_data(state)
        start = saved.pop("step")
        require(saved.keys() == parts.keys(), "--resume", f"find {', '.join(parts)} in {state}", ", ".join(saved))
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, mininterval=5)
    average = 0
    for step in bar:
        torch.manual_seed(args.seed + step)  # a resumed run draws the same numbers
        rng = numpy.random.default_rng([args.seed, step])
        for group in (group for part in parts.values() for group in getattr(part, "param_groups", ())):
            group["lr"] = learning_rate(step, args.steps, args.lr)
        # The last fifth in float32 removes the errors that bfloat16 left in the weights.
        value = loss(rng, args.bf16 and step < 0.8 * args.steps)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1)
        optimizer.step()
        average += (value.item() - average) * max(0.01, 1 / (step - start + 1))
        bar.set_postfix(loss=f"{average:.4f}", refresh=False)
        if (step + 1) % save_every == 0 or step + 1 == args.steps:
            saved = {name: part.state_dict() for name, part in parts.items()}
            file = io.BytesIO()
            torch.save({**saved, "step": step + 1}, file)
            replace_file(state, file.getvalue())
        if (step + 1) % 1000 == 0:
            bar.write(f"step {step + 1}: PSNR and baselines: {measured(model.eval())}")
            model.train()
    return model.eval()
