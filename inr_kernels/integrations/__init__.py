"""Drop-in for models of other projects: `accelerate` and `restore`."""

from torch import nn

from . import class_swap, fac, kernel_conv, lama, liif, natten, raft
from .class_swap import LOG

ADAPTERS = (liif, kernel_conv, fac, raft, lama, natten)

__all__ = ["accelerate", "restore"]


def accelerate(model):
    """Replaces, in place, what other projects' models compute slowly by this package's operators.

    | found by its structure, whatever its project                                   | runs on                     |
    | ------------------------------------------------------------------------------ | --------------------------- |
    | LIIF's decoder (yinboc/liif and copies, mmagic): `query_rgb(coord, cell)` that | `local_implicit_decode`     |
    | reads what `gen_feat` left, or `query_rgb(feature, coord, cell)`; the flags    |                             |
    | local_ensemble, feat_unfold, cell_decode; `imnet.layers`, Linear, ReLU, ...    |                             |
    | MISF's `KernelConv([K])`, also EfficientDeRain's, JPGNet's and KPN's:          | `elementwise_filter`        |
    | `forward(frames, core, white_level, rate)`, frames [B, N, (3,) H, W]           |                             |
    | STFAN's `KernelConv2D(K)`, also GLF-CR's: `forward(input, kernel)`. Who cannot | `elementwise_filter`        |
    | build its CUDA extension: see `inr_kernels.integrations.fac`                   |                             |
    | RAFT's `upsample_flow(flow, mask)` and its copies', by any factor              | `elementwise_filter`        |
    | NATTEN's `NeighborhoodAttention2D` of any version, NAT's and DiNAT's attention | `neighborhood_attention_2d` |
    | in transformers (of DiNAT up to 4.53: later versions mix up its axes)          |                             |

    Structure proves nothing, so the method must also agree with ours on random inputs and weights: output and
    gradients, on a CPU, without its `.cuda()`. All else is left alone, and the logger "inr_kernels" says why
    (replaced: INFO, left alone: WARNING): other layers in LIIF's MLP, hooks on it, separable cores, something added
    to the output, arguments changed in place. What changes later is seen at the next call: a hook, a layer, a flag of
    the object, another imnet, arguments that do not fit send it to the original method.

    Only the object's class changes, to a subclass of its own that overrides that method: parameters, state_dict,
    forward, isinstance, pickle (what reads it needs inr_kernels), deepcopy, DataParallel, train(), .to() and
    torch.compile work as before. It now runs on the model's device, a CPU too; a CUDA extension alone is trusted by
    its name, as no CPU can run it. The output has the dtype that the original gives it. In LIIF's decoder,
    coordinates are computed in float32 where the original rounds them to half precision, and without gradients,
    callers that go through a picture in chunks pay for the first layer once. A second derivative, torch.func and
    ONNX export need the original: `restore` first.

    NATTEN's functions run on few machines. Where they cannot, a module's forward is tried around stand-ins for them,
    and they are trusted by their names. Dropout of attention weights in training, a hook on it, and their output go
    to the original, as does a map on a GPU unless a backend is wished: NATTEN may have its kernels there.

    LaMa's FourierUnit, SpectralTransform, FFC and FFC_BN_ACT are found by their attributes, tried on random weights
    (outputs, gradients, running statistics) and get the forward of `inr_kernels.models.ffc`, in the same way: the
    blocks around them keep their class, every layer keeps isinstance, its parameters and its keys.

    Args:
        model: any nn.Module; itself or modules inside may be replaced. To call it again is harmless, and takes up
            flags that were changed on purpose.

    Returns:
        The same model.

    Raises:
        TypeError: model is no nn.Module.

    Example:
        >>> import torch
        >>> from inr_kernels import accelerate
        >>> model = accelerate(torch.nn.Sequential(torch.nn.Linear(2, 3)))  # warns: nothing known in Sequential
    """
    found = False
    for name, module in _modules(model):
        for adapter in ADAPTERS:
            if adapter.is_candidate(module):
                found = True
                what = type(module).__qualname__ + (f" at {name!r}" if name else "")
                if not (reason := adapter.replace(module)):
                    LOG.info("%s replaced: %s, fused", what, adapter.WHAT)
                    break
                LOG.warning("%s left alone: %s", what, reason)
    if not found:
        LOG.warning("nothing that accelerate knows in %s", type(model).__qualname__)
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
        class_swap.restore(module)
    return model


def _modules(model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    return list(model.named_modules())
