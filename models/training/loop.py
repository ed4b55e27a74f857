"""What the recipes of the shipped checkpoints share: the command line, and a loop that is saved and resumed."""

import argparse
import io
import math
from pathlib import Path

import numpy
import torch
from tqdm import tqdm

from inr_kernels._core.checks import require

from ..common.files import replace_file


def parser(about, *, out, steps, lr):
    """The command line of a recipe with these defaults."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=lr, help="its peak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="encode in bfloat16 at first: faster")
    parser.add_argument("--resume", action="store_true", help="go on from OUT's .training.pt")
    return parser


def recipe(args, each):
    """The command line in words, for a checkpoint's notes; each: what is taken of a crop."""
    return (
        f"{args.steps} steps of {args.batch} crops, {each} each, peak learning rate {args.lr:g},"
        f" seed {args.seed}{', --bf16' if args.bf16 else ''}"
    )


def learning_rate(step, steps, peak):
    """A short warm-up, then half a cosine to zero."""
    return peak * min(1, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))


def optimize(model, args, loss, measured, save_every, *, beside=None, eps=1e-8):
    """Trains the model with Adam and returns it in eval mode.

    Args:
        args: of `parser`; the state goes to OUT's .training.pt, from which --resume goes on.
        loss: loss(rng, fast) -> the loss of a step on crops that the generator draws; fast: in bfloat16.
        measured: measured(model) -> what is printed every 1000 steps.
        save_every: steps.
        beside: what else `loss` trains, by name: whatever has a state_dict, saved and loaded with the rest; an
            optimizer gets the same learning rate.
        eps: Adam's.

    Raises:
        ValueError: --resume of a run that trained something else.
    """
    optimizer = torch.optim.Adam(model.parameters(), eps=eps)
    state, start = args.out.with_suffix(".training.pt"), 0
    parts = {"model": model, "optimizer": optimizer, **(beside or {})}
    if args.resume:
        saved = torch.load(state, weights_only=True)
        start = saved.pop("step")
        require(saved.keys() == parts.keys(), "--resume", f"find {', '.join(parts)} in {state}", ", ".join(saved))
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, mininterval=5)
    average = 0
    for step in bar:
        torch.manual_seed(args.seed + step)  # so that a resumed run sees the same
        rng = numpy.random.default_rng([args.seed, step])
        for group in (group for part in parts.values() for group in getattr(part, "param_groups", ())):
            group["lr"] = learning_rate(step, args.steps, args.lr)
        # The last fifth is exact: it takes out what bfloat16 left in the weights.
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
            bar.write(f"step {step + 1}: PSNR, rivals: {measured(model.eval())}")
            model.train()
    return model.eval()
