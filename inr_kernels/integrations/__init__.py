"""Accelerates models of other projects in place: `accelerate` and `restore`; NATTEN's names: `install_as_natten`.

An adapter covers one method of one upstream project. To add one, write a file in this folder that ends with

    ADAPTER = register(Adapter(description, is_candidate, verify, names))

and add its name to the import below. An adapter provides:

- `description`: what it accelerates, for the log, e.g. "LIIF's decoder".
- `is_candidate(module) -> bool`: whether a module looks like the upstream class, judged by the names of its attributes
  or methods. `accelerate` logs for each candidate that it was accelerated, or why not.
- `verify(module) -> Match`: checks the structure (`class_swap.check_method` and the adapter's own rules), then runs the
  original method and ours on random inputs (`probe.why_different`). Raises `Unsupported(reason)` if the module must
  keep its method, else returns `class_swap.match(module, mixin, method_name, details)`. A reason is a sentence about
  the module ("its query_rgb takes 5 arguments"); the text of an exception of other code is logged at the level DEBUG.
- `names`: of classes of the upstream project, each with attributes that `is_candidate` looks for. A module whose class
  has such a name but that is no candidate is logged too, with the first attribute that it lacks.
- the mixin: a subclass of `AcceleratedModule` that overrides the method. Each call checks that the match still holds
  (`class_swap.why_changed`) and that the arguments are supported; otherwise `class_swap.falls_back` logs the reason,
  and the method calls `super()`.

Its tests need the upstream code in plain PyTorch, and variants of it that must not be accelerated: see
tests/support/upstream_*.py.
"""

import logging
from collections import Counter
from typing import TypeVar

import torch
from torch import nn

from . import carafe, class_swap, fac, hdit, kernel_conv, lama, lama_generator, liif, lte, natten, raft, upsamplers  # noqa: F401  adapters register themselves
from .class_swap import ADAPTERS, LOG
from .natten_api import install_as_natten

__all__ = ["accelerate", "install_as_natten", "restore"]

Model = TypeVar("Model", bound=nn.Module)
SCRIPTED = "it is TorchScript, whose layers are compiled; call accelerate before torch.jit.trace or torch.jit.script"


def accelerate(model: Model) -> Model:
    """Replaces, in place, slow methods of models from other projects by the operators of this package.

    Modules are recognised by their structure, not by the name of their project:

    | module                                                                         | runs on                     |
    | ------------------------------------------------------------------------------ | --------------------------- |
    | LIIF's decoder (yinboc/liif and copies, mmagic): `query_rgb(coord, cell)` that | `local_implicit_decode`     |
    | reads what `gen_feat` stored, or `query_rgb(feature, coord, cell)`; the flags  |                             |
    | local_ensemble, feat_unfold, cell_decode; `imnet.layers`, Linear, ReLU, ...    |                             |
    | LTE's decoder (jaewon-lee-b/lte and copies: LTE, LTE+; ELTE, SLTE):             | `local_texture_decode`      |
    | `query_rgb(coord, cell)` that reads what `gen_feat` stored, in float32         |                             |
    | MISF's `KernelConv([K])`, also EfficientDeRain's, JPGNet's and KPN's:          | `elementwise_filter`        |
    | `forward(frames, core, white_level, rate)`, frames [B, N, (3,) H, W]           |                             |
    | STFAN's `KernelConv2D(K)`, also GLF-CR's: `forward(input, kernel)`. Without    | `elementwise_filter`        |
    | its CUDA extension, see `inr_kernels.integrations.fac`                         |                             |
    | RAFT's `upsample_flow(flow, mask)` and its copies', any integer factor to 16;  | `elementwise_filter`        |
    | torchvision's `raft_large`, whose forward calls a function of this name        |                             |
    | CARAFE of XiaLiPKU and its copies in detectors: `comp`, `enc`, `pix_shf`,      | `elementwise_filter`        |
    | `upsmp`, `unfold`                                                              |                             |
    | NATTEN's `NeighborhoodAttention2D` of any version, NAT's and DiNAT's attention | `neighborhood_attention_2d` |
    | in transformers (DiNAT up to 4.53: later versions swap its axes)               |                             |
    | HDiT's (k-diffusion's) NeighborhoodSelfAttentionBlock                          | `neighborhood_attention_2d` |
    | NAF's and AnyUp's (NATTENCrossAttention) attention to a map of lower           | `neighborhood_attention_2d` |
    | resolution, by integer ratios: nothing is enlarged                             |                             |
    | LaMa's FourierUnit, SpectralTransform, FFC and FFC_BN_ACT                      | `fourier_unit`, `conv3x3`,  |
    | and the nn.Sequential of its generator                                         | `conv2d`                    |

    A module is replaced only if its method also agrees with ours on random inputs and weights: outputs and gradients,
    on the CPU, with `.cuda()` disabled. Every other candidate keeps its own method, for example for other layers in
    LIIF's MLP, hooks on it, separable kernels, something added to the output, or arguments modified in place. The
    logger "inr_kernels" names each replaced module (INFO; without that level one line says what was replaced) and the
    reason for each that was not (WARNING). Later changes are detected at the next call: a new hook, layer, MLP or value
    of a flag that the method reads, or unsupported arguments make the call use the original method.

    Replacing changes only the object's class, to a subclass of its own class that overrides the method. Parameters,
    state_dict, forward, isinstance, pickle (reading it requires inr_kernels), deepcopy, DataParallel, train(), .to()
    and torch.compile work as before. The method then runs on the model's device, including the CPU. The output has the
    same dtype as the original's. Second derivatives, torch.func and ONNX export need the original: `restore` first.

    Notes on single projects:

    - LIIF: coordinates are computed in float32 where the original rounds them to half precision. Without gradients, a
      caller that decodes an image in chunks computes the first layer only once.
    - torchvision: the forward of `raft_large` then calls our function; inside torch.compile it calls its own.
    - STFAN: its CUDA extension cannot run on a CPU, so it is identified by its name; the code around it is compared.
    - NATTEN: where its functions have no kernel, the forward is compared with PyTorch code in their place, and the
      functions are identified by their names. Calls with dropout of attention weights in training, a hook on that
      dropout, or the attention weights as output use the original. So do calls on a GPU unless a backend was
      requested, because NATTEN may have its own kernels there.
    - LaMa: a layer gets the forward of the class of the same name in `inr_kernels.fourier_unit`; running statistics
      are compared too. The blocks around them keep their class, all layers their parameters and state-dict keys. The
      sequence of the whole generator gets the forward of `FusedSequential`.

    Args:
        model: any nn.Module; the module itself and all modules inside it are considered. Calling it again has no
            effect, except that flags changed since then are accepted.

    Returns:
        The same model.

    Raises:
        TypeError: model is not an nn.Module.

    Example:
        >>> import torch
        >>> from inr_kernels import accelerate
        >>> model = accelerate(torch.nn.Sequential(torch.nn.Linear(2, 3)))  # warns: no supported module in Sequential
    """
    found, scripted, replaced = False, None, Counter[str]()
    for name, module in _named_modules(model):
        is_script = isinstance(module, torch.jit.ScriptModule)
        kind = str(module.original_name) if is_script else type(module).__qualname__
        where = kind + (f" at {name!r}" if name else "")
        if is_script:
            if scripted is None or not f"{name}.".startswith(scripted):
                scripted, found = f"{name}." if name else "", True
                LOG.warning("%s not accelerated: %s", where, SCRIPTED)
            continue
        for adapter in ADAPTERS:
            if not adapter.is_candidate(module):
                if reason := adapter.lookalike(module):
                    found = True
                    LOG.warning("%s not accelerated: %s", where, reason)
                continue
            found = True
            if not (reason := class_swap.replace(module, adapter.verify)):
                LOG.info("%s accelerated: %s", where, adapter.description)
                replaced[adapter.description] += 1
                break
            LOG.warning("%s not accelerated: %s", where, reason)
    if replaced and not LOG.isEnabledFor(logging.INFO):  # the lines above are not shown
        parts = (f"{description} ({count})" for description, count in replaced.items())
        LOG.warning("accelerate replaced in %s: %s", type(model).__qualname__, ", ".join(parts))
    if not found:
        inner = getattr(model, "_orig_mod", model)  # of torch.compile
        if any(type(module).__module__.startswith("inr_kernels.") for module in model.modules()):
            LOG.warning("accelerate: %s already uses the operators of this package", type(inner).__qualname__)
        else:
            hint = "" if inner is model else "; call accelerate before torch.compile"
            LOG.warning("accelerate found no supported module in %s%s", type(inner).__qualname__, hint)
    return model


def restore(model: Model) -> Model:
    """Undoes `accelerate`: every object gets its original class back, and cached values are dropped.

    Args:
        model: any nn.Module, accelerated or not.

    Returns:
        The same model.

    Raises:
        TypeError: model is not an nn.Module.
    """
    for _, module in _named_modules(model):
        class_swap.restore_original(module)
    return model


def _named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    return list(model.named_modules())
