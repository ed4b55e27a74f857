"""A small call of every op, public function, module, network and adapter, for tests that sweep over all of them.

`CASES` has the problems of every op in `dispatch.OPS`. `CALLS` has one entry per public name, adapter or part of the
data: it builds the inputs and returns a function without arguments that computes with them.
"""

import importlib
from unittest import mock

import local_texture_cases
import mlp_cases
import numpy
import torch
import upstream_natten
from fourier_unit_cases import Conv2dCase, ConvolutionCase
from torch import nn
from training_cases import batch
from upstream_carafe import CARAFE
from upstream_decoders import StoresFeatures
from upstream_filters import KernelConv, Ported, Raft
from upstream_hdit import NeighborhoodSelfAttentionBlock
from upstream_lama import Generator, whole_generator
from upstream_lte import Texture
from upstream_natten import Version15, Version21
from upstream_upsamplers import CrossAttention

import inr_kernels
from inr_kernels import models
from inr_kernels._core.dispatch import OPS
from inr_kernels.fourier_unit import FFC, FFC_BN_ACT, FFCResnetBlock, FusedSequential, SpectralTransform, frozen
from inr_kernels.integrations import lama, natten
from inr_kernels.models.data import images, masks, photographs
from inr_kernels.models.dear import losses as dear_losses
from inr_kernels.models.evaluation import baselines, metrics
from inr_kernels.models.in2 import losses as in2_losses


def case_of(op):
    """The class of an op's problems, whose `run(dtype, backend)` returns the outputs and the gradients."""
    folder = OPS[op].function.__module__.split(".")[1]
    others = {"conv2d": Conv2dCase, "conv3x3": ConvolutionCase, "local_texture": local_texture_cases.Case}
    others["mlp"] = mlp_cases.Case
    return others.get(op) or importlib.import_module(f"{folder}_cases").Case


CASES = {op: case_of(op) for op in OPS}
SMALL = {  # for Triton's interpreter, which is slow
    "elementwise_filter": {"batch": 1, "channels": 2, "groups": 2, "kernel_size": (1, 3), "size": (3, 4)},
    "fourier_unit": {"batch": 1, "channels": 2, "outputs": 2, "size": (3, 4)},
    "local_implicit": {"batch": 1, "queries": 5, "hidden": (9,)},
    "local_texture": {"batch": 1, "queries": 5, "hidden": (9,)},
    "neighborhood_attention": {"batch": 1, "size": (3, 4), "heads": 1, "dim": 4},
    "unmask_attention": {"shape": (1, 4, 3, 4)},
}


def call(function, *args, **kwargs):
    """A function without arguments that calls this one without gradients."""

    def run():
        with torch.no_grad():
            return function(*args, **kwargs)

    return run


def qkv():
    return [torch.randn(1, 5, 6, 2, 4) for _ in range(3)]


def parts():
    return torch.randn(1, 2, 6, 6), torch.randn(1, 6, 6, 6)


def ffc(cls, *args, **options):
    layer = cls(*args, ratio_gin=0.75, ratio_gout=0.75, enable_lfu=False, **options)
    return call(layer.eval(), parts())


def picture():
    return torch.rand(1, 3, 21, 26), torch.zeros(1, 1, 21, 26).index_fill(3, torch.arange(5, 12), 1)


def inpainter(model, **options):
    model = model.eval()
    return lambda: [f() for f in (call(model, *example), call(model.inpaint, *example, **options))]


example = picture()


def dear(fill):
    config = models.DEARConfig(channels=8, features=4, blocks=1, filter_blocks=1, hidden=(8, 8), fill=fill)
    return inpainter(models.DEAR(config), scale=1.5)


def in2(mode):
    config = models.IN2Config(channels=(16, 16), groups=1, blocks=1, hidden=(8, 8), upsample=mode, any_size=True)
    return inpainter(models.IN2(config), scale=1.5)


def autoencoder(latent):
    model = models.ImplicitAutoencoder(latent=latent, channels=8, hidden=(8, 8), side=9)
    if latent == "local":
        return inpainter(model)
    return call(model.eval().inpaint, *(x[..., :9, :9] for x in example))


def refined():
    model = models.LaMa(models.LaMaConfig(features=8, blocks=1)).eval()
    return call(models.FeatureRefiner(model, min_side=13, max_scales=2, iterations=2), *example)


def exported():
    model = models.LaMa(models.LaMaConfig(features=8, blocks=1, downsamplings=1)).eval()
    return lambda: call(models.export_program(model, dynamic=False, size=(21, 26)).module(), *example)()


def liif():
    model, coord = models.LIIF(models.LIIFConfig(blocks=1, features=8, hidden=(16, 12))), torch.rand(1, 9, 2)
    image = example[0][..., :7, :8]
    return lambda: [call(model, image, coord, coord)(), model.upscale(image, 2), model.upscale(image, size=(9, 30))]


def lte():
    model, coord = models.LTE(models.LTEConfig(blocks=1, features=8, hidden=(16,), hidden_dim=8)), torch.rand(1, 9, 2)
    image = example[0][..., :7, :8]
    return lambda: [call(model, image, coord, coord)(), model.upscale(image, 2), model.upscale(image, size=(9, 40))]


def pyramid():
    decoder = models.ImplicitPyramidDecoder((8, 6, 4), hidden=(16, 16))
    return call(decoder, torch.randn(1, 8, 5, 7), [(10, 13), (20, 26)])


def decoder():
    layer, feat, coord = (
        inr_kernels.LocalImplicitDecoder(8, hidden=(16, 16)),
        torch.randn(1, 8, 5, 6),
        torch.rand(1, 9, 2),
    )
    return lambda: [call(layer.render, feat, (9, 11))(), call(layer, feat, coord, coord)()]


def texture_decoder():
    layer, feat, coord = (
        inr_kernels.LocalTextureDecoder(8, hidden=(16, 16), hidden_dim=16),
        torch.randn(1, 8, 5, 6),
        torch.rand(1, 9, 2),
    )
    image = torch.rand(1, 3, 5, 6)
    return lambda: [
        call(layer.render, feat, (9, 11), image=image)(),
        call(layer, feat, coord, coord, image)(),
        call(inr_kernels.LocalTextureDecoder.from_state_dict(layer.state_dict()), feat, coord, coord)(),
    ]


def upsample(mode, eager):
    return call(models.ImplicitUpsample(8, 6, (16, 16), mode, eager=eager), torch.randn(1, 8, 5, 7), (9, 13))


def drawn(name):
    """A recipe's batch."""
    return lambda: batch(name)


def accelerated(build, *shapes):
    """An adapter, from the verification on."""
    model, inputs = build(), [torch.rand(shape) for shape in shapes]

    def run():
        lama._REASONS.clear()  # results of earlier verifications
        natten._VERIFIED.clear()
        inr_kernels.accelerate(model)
        changed = [type(module).__name__ for module in model.modules() if hasattr(module, "_inr_original")]
        assert changed, f"{type(model).__name__} was not accelerated"
        with torch.no_grad():
            out = model(*inputs)
        inr_kernels.integrations.restore(model)
        return out

    return run


def without_natten(run):
    """The call on a machine without NATTEN's kernels, where its functions are replaced to verify the module."""

    def patched():
        with mock.patch.object(upstream_natten, "RUNS", False):
            return run()

    return patched


CALLS = {
    "neighborhood_attention_2d_packed": lambda: call(
        inr_kernels.neighborhood_attention_2d_packed, torch.stack(qkv(), 3), 3, return_lse=True
    ),
    "neighborhood_attention_3d": lambda: call(
        inr_kernels.neighborhood_attention_3d, *torch.randn(3, 1, 3, 4, 5, 2, 4), (2, 3, 3), return_lse=True
    ),
    "neighborhood_attention_1d": lambda: call(
        inr_kernels.neighborhood_attention_1d, *torch.randn(3, 1, 9, 2, 4), 3, return_lse=True
    ),
    "merge_attentions": lambda: call(
        inr_kernels.merge_attentions, list(torch.randn(2, 1, 5, 2, 4)), list(torch.randn(2, 1, 5, 2))
    ),
    "pixelwise_reconstruct": lambda: call(
        inr_kernels.pixelwise_reconstruct, torch.rand(1, 3, 5, 6), torch.rand(1, 9, 5, 6)
    ),
    "ElementwiseFilter": lambda: call(
        inr_kernels.ElementwiseFilter(3, normalize="taps"), torch.rand(1, 4, 5, 6), torch.rand(1, 36, 5, 6)
    ),
    "UnmaskAttention": lambda: call(inr_kernels.UnmaskAttention(), torch.randn(1, 4, 5, 6), torch.rand(1, 1, 5, 6)),
    "NeighborhoodAttention2D": lambda: call(
        inr_kernels.NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True), torch.randn(1, 5, 6, 8)
    ),
    "NeighborhoodAttention3D": lambda: call(
        inr_kernels.NeighborhoodAttention3D(8, 2, (2, 3, 3), rel_pos_bias=True), torch.randn(1, 3, 4, 5, 8)
    ),
    "NeighborhoodAttention1D": lambda: call(
        inr_kernels.NeighborhoodAttention1D(8, 2, 3, rel_pos_bias=True), torch.randn(1, 9, 8)
    ),
    "LocalImplicitDecoder": decoder,
    "LocalTextureDecoder": texture_decoder,
    "FourierUnit": lambda: call(inr_kernels.FourierUnit(4, 6).eval(), torch.randn(1, 4, 5, 6)),
    "SpectralTransform": lambda: call(SpectralTransform(4, 8).eval(), torch.randn(1, 4, 6, 6)),
    "FusedSequential": lambda: call(
        FusedSequential(nn.ReflectionPad2d(1), nn.Conv2d(4, 3, 3), nn.ReLU()).eval(), torch.randn(1, 4, 5, 6)
    ),
    "FFC": lambda: ffc(FFC, 8, 8, 3, padding=1),
    "FFC_BN_ACT": lambda: ffc(FFC_BN_ACT, 8, 8, 3, padding=1, activation_layer=nn.ReLU),
    "FFCResnetBlock": lambda: ffc(FFCResnetBlock, 8, "reflect", nn.BatchNorm2d),
    "frozen": lambda: call(
        frozen(FFC_BN_ACT(8, 8, 3, 0.75, 0.75, padding=1, activation_layer=nn.ReLU, enable_lfu=False).eval()), parts()
    ),
    "DEAR": lambda: dear("zeros"),
    "DEAR, smooth": lambda: dear("smooth"),
    **{f"IN2, {mode}": lambda mode=mode: in2(mode) for mode in ("split", "liif")},
    **{f"ImplicitAutoencoder, {kind}": lambda kind=kind: autoencoder(kind) for kind in ("global", "local")},
    "LaMa": lambda: inpainter(models.LaMa(models.LaMaConfig(features=8, blocks=1))),
    "LIIF": liif,
    "LTE": lte,
    "FeatureRefiner": refined,
    "export_program": exported,
    "EDSR": lambda: call(models.EDSR(1, 8), torch.rand(1, 3, 9, 8)),
    "RDN": lambda: call(models.RDN(1, 8, 8, 2), torch.rand(1, 3, 9, 8)),
    "ImplicitPyramidDecoder": pyramid,
    "ImplicitUpsample": lambda: upsample("bilinear", False),
    "ImplicitUpsample, eager": lambda: upsample("liif", True),
    "free_form_mask": lambda: lambda: masks.free_form_mask((20, 30), numpy.random.default_rng(0)),
    "masks.draw": lambda: lambda: torch.from_numpy(masks.draw("strokes", 20, 30, numpy.random.default_rng(0))),
    "levels": lambda: call(metrics.levels, example[0], "round"),
    "to_tensor": lambda: lambda: images.to_tensor(photographs.photographs("astronaut")[0].resize((9, 8))),
    **{f"batches of {name}": lambda name=name: drawn(name) for name in ("liif", "dear", "in2")},
    "sample_queries": lambda: call(dear_losses.sample_queries, example[0], 7),
    "Discriminator": lambda: call(in2_losses.Discriminator((8, 8)).eval(), torch.rand(1, 3, 32, 32)),
    "mean_fill": lambda: call(baselines.mean_fill, *example),
    "LIIF's decoder": lambda: accelerated(StoresFeatures, (2, 3, 6, 5), (2, 9, 2), (2, 9, 2)),
    "LTE's decoder": lambda: accelerated(Texture, (2, 3, 6, 5), (2, 9, 2), (2, 9, 2)),
    "MISF's KernelConv": lambda: accelerated(KernelConv, (2, 3, 5, 4), (2, 27, 5, 4)),
    "HDiT's neighborhood attention": lambda: accelerated(
        NeighborhoodSelfAttentionBlock, (2, 7, 9, 16), (7, 9, 2), (2, 6)
    ),
    "cross-scale attention": lambda: accelerated(
        lambda: CrossAttention(8, 2), (1, 8, 10, 12), (1, 8, 5, 6), (1, 12, 5, 6)
    ),
    "CARAFE": lambda: accelerated(lambda: CARAFE(3).eval(), (2, 3, 5, 4)),
    "STFAN's KernelConv2D": lambda: accelerated(lambda: Ported(3), (2, 3, 5, 4), (2, 27, 5, 4)),
    "RAFT's upsample_flow": lambda: accelerated(Raft, (2, 2, 5, 4), (2, 576, 5, 4)),
    "neighborhood attention": lambda: accelerated(lambda: Version21(8, 2, 3), (2, 6, 7, 8)),
    "neighborhood attention, by shims": lambda: without_natten(
        accelerated(lambda: Version15(8, 2, 3), (2, 6, 7, 8)),
    ),
    "LaMa's Fourier convolution": lambda: accelerated(lambda: Generator().eval(), (1, 4, 12, 18)),
    "LaMa's generator": lambda: accelerated(lambda: whole_generator().eval(), (1, 4, 8, 12)),
}
