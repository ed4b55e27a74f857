"""Helpers of the training tests: tiny runs and their curves, batches of photographs, the weights of a VGG-19."""

import numpy
import torch
from PIL import Image

from inr_kernels.models.common.classifiers import VGG19
from inr_kernels.models.data.photographs import photographs
from inr_kernels.models.data.sources import Pictures
from inr_kernels.models.training import config, samples

TINY = {
    "in2": "model.channels=[16,16] model.groups=1 model.blocks=1 model.heads=2 model.hidden=[16] area=1600",
    "lama": "model.features=8 model.blocks=1 area=1600",
    "dear": "model.channels=16 model.features=8 model.blocks=1 model.filter_blocks=1 model.hidden=[8] side=16"
    " queries=9",
    "liif": "model.blocks=1 model.features=8 model.hidden=[16] side=16 queries=9",
    "lte": "model.blocks=1 model.features=8 model.hidden=[16] model.hidden_dim=8 side=16 queries=9",
    "autoencoder": "model.latent=global model.channels=4 model.hidden=[8] model.side=16 side=16",
}
CONFIGS = {"autoencoder": "autoencoder"}
ADVERSARIAL = "loss.adversarial=1 loss.feature_matching=0.1 loss.r1=10"
QUIET = "validate_every=0 pictures_every=0 log_every=1"


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
    for layer in VGG19:
        if layer != "M":
            width = layer[0]
            state[f"features.{index}.weight"] = torch.randn(width, inputs, 3, 3) * (2 / (9 * inputs)) ** 0.5
            state[f"features.{index}.bias"] = torch.randn(width) * 0.1
            inputs = width
        index += 1 if layer == "M" else 2
    return state


def photographs_in(folder):
    """Writes five pictures of several formats and depths into a folder; returns it."""
    rng = numpy.random.default_rng(0)
    for i, suffix in enumerate((".png", ".jpg", ".webp", ".tiff")):
        Image.fromarray(rng.integers(0, 256, (48 + i, 40, 3), dtype=numpy.uint8)).save(folder / f"{i}{suffix}")
    Image.fromarray(rng.integers(0, 65536, (40, 50), dtype=numpy.uint16)).save(folder / "deep.png")
    return folder


def words(name, photos, out, *more):
    """The arguments of a tiny run of three steps."""
    tiny = [*TINY[name].split(), *QUIET.split()]
    common = [f"data={photos}", f"out={out}", "steps=3", "batch=2", "save_every=1", "min_side=8"]
    return [
        "train",
        CONFIGS.get(name, f"{name}_small"),
        *tiny,
        *common,
        *(word for text in more for word in text.split()),
    ]


def curve(out):
    """{name: [(step, value), ...]} of TensorBoard's scalars."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard")).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
