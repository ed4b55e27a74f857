"""Helpers of the training tests: a run that is interrupted and resumed, the weights of a VGG-19."""

import pytest
import torch

from inr_kernels.models.in2.losses import VGG19


def same(a, b):
    """Whether two networks have equal parameters and buffers."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def resumed(recipe, network, folder, monkeypatch, *words):
    """Runs a recipe whose fourth step fails, resumes it after the second, compares with an uninterrupted run, and
    returns the network.

    Args:
        recipe: the module, with `main`, `NAME_batch`, `measured` and SAVE_EVERY.
        network: the class.
        folder: for the files.
        words: of the command line.
    """
    draw = recipe.__name__.split(".")[-1] + "_batch"

    def run(name, *more):
        out = folder / f"{name}.safetensors"
        common = ["train", "--out", str(out), "--steps", "4", "--batch", "1"]
        monkeypatch.setattr("sys.argv", [*common, *words, *more])
        recipe.main()
        return network.from_checkpoint(out)

    monkeypatch.setattr(recipe, "SAVE_EVERY", 2)
    monkeypatch.setattr(recipe, "measured", lambda model: {})
    whole, batch, left = run("whole"), getattr(recipe, draw), [1, 1, 1]

    def failing(*args):
        left.pop()
        return batch(*args)

    monkeypatch.setattr(recipe, draw, failing)
    with pytest.raises(IndexError):
        run("parts")
    monkeypatch.setattr(recipe, draw, batch)
    parts = run("parts", "--resume")
    assert same(parts, whole)
    assert not same(whole, run("fresh", "--steps", "0"))
    assert whole.notes["trained_on"][0] == "skimage.data.astronaut"
    return parts


def vgg19_state():
    """A random state dict in torchvision's layout, with an entry of the classifier."""
    state, inputs, index = {"classifier.0.weight": torch.zeros(1)}, 3, 0
    for width in VGG19:
        if width != "M":
            state[f"features.{index}.weight"] = torch.randn(width, inputs, 3, 3) * (2 / (9 * inputs)) ** 0.5
            state[f"features.{index}.bias"] = torch.randn(width) * 0.1
            inputs = width
        index += 1 if width == "M" else 2
    return state
