"""Helpers of the training tests: equal networks, batches of photographs, the weights of a VGG-19."""

import torch

from inr_kernels.models.data.photographs import photographs
from inr_kernels.models.data.sources import Pictures
from inr_kernels.models.in2.losses import VGG19
from inr_kernels.models.training import config, samples


def batch(name, step=0, *changes, photos=("astronaut",)):
    """The tensors of a step of a recipe, drawn from photographs of scikit-image."""
    options = config.load(f"{name}_small", ["batch=2", *changes])
    return samples.Batches(config.recipe(name), options, Pictures(photographs(*photos)))[step][0]


def same(a, b):
    """Whether two networks have equal parameters and buffers."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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
