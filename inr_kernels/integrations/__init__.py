"""Drop-in for models of other projects: `accelerate` and `restore`."""

import logging

from torch import nn

from . import lama, liif

LOG = logging.getLogger("inr_kernels")
# Whether a module is a project's, what replaces it, and what that does.
PROJECTS = (
    (liif.is_decoder, liif.replace, "LIIF's decoding"),
    (lama.is_layer, lama.replace, "LaMa's Fourier convolution"),
)

__all__ = ["accelerate", "restore"]


def accelerate(model):
    """Replaces, in place, the decoding of every LIIF decoder inside a model, and LaMa's Fourier convolutions.

        out = sum_t w_t imnet([unfold3x3(feat)[t]; rel_t; rel_cell])      (`local_implicit_decode` has the details)

    A decoder is found by its structure, whatever its project: `query_rgb(coord, cell)` that reads the features
    which `gen_feat` left in `self.feat` (yinboc/liif and its copies), or `query_rgb(feature, coord, cell)` (mmagic);
    the flags `local_ensemble`, `feat_unfold`, `cell_decode`; and `imnet.layers`, an nn.Sequential of Linear, ReLU,
    ..., Linear. Structure proves nothing, so its `query_rgb` must also agree with ours on random features,
    coordinates and weights: output and gradients, on a CPU, without its `.cuda()`.

    All else is left alone, and the logger "inr_kernels" says why (replaced: INFO, left alone: WARNING): other
    layers in the MLP (dropout, normalisation, another activation, no bias, parametrized or quantised weights),
    hooks on it, another ensemble, something added to the output. What changes later is seen at the next call:
    a hook, a layer, a flag, another imnet, arguments that LIIF does not take send it to the original `query_rgb`.

    Only the object's class changes, to a subclass of its own that overrides `query_rgb`: parameters, state_dict,
    gen_feat, forward, isinstance, pickle (what reads it needs inr_kernels), deepcopy, DataParallel, train(), .to()
    and torch.compile work as before. It now runs on the model's device, a CPU too. Coordinates are computed in
    float32 where the original rounds them to half precision; the output has the dtype that the original gives it.
    Without gradients, callers that go through a picture in chunks pay for the first layer once. A second
    derivative, torch.func and ONNX export need the original: `restore` first.

    LaMa's FourierUnit, FFC and FFC_BN_ACT are found by their attributes, tried on random weights (outputs, gradients,
    running statistics) and get the forward of `inr_kernels.models.ffc`, in the same way: the blocks around them keep
    their class, every layer keeps isinstance, its parameters and its keys.

    Args:
        model: any nn.Module; itself or a module inside may be a decoder. To call it again is harmless, and takes
            up flags that were changed on purpose.

    Returns:
        The same model.

    Raises:
        TypeError: model is no nn.Module.

    Example:
        >>> import torch
        >>> from inr_kernels import accelerate
        >>> model = accelerate(torch.nn.Sequential(torch.nn.Linear(2, 3)))  # warns: there is nothing to replace
    """
    found = False
    for name, module in _modules(model):
        for known, replace, does in PROJECTS:
            if known(module):
                found = True
                what = type(module).__qualname__ + (f" at {name!r}" if name else "")
                if reason := replace(module):
                    LOG.warning("%s left alone: %s", what, reason)
                else:
                    LOG.info("%s replaced: %s, fused", what, does)
    if not found:
        LOG.warning("no LIIF decoder and no LaMa layer in %s", type(model).__qualname__)
    return model


def restore(model):
    """Undoes `accelerate`: every object has its own class again, and nothing of ours stays behind.

    Args:
        model: any nn.Module, accelerated or not.

    Returns:
        The same model.

    Raises:
        TypeError: model is no nn.Module.
    """
    for _, module in _modules(model):
        liif.restore(module)
        lama.restore(module)
    return model


def _modules(model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    return list(model.named_modules())
