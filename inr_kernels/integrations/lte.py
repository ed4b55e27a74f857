"""LTE's decoder in other projects: jaewon-lee-b/lte (LTE, LTE+), its copies, and the ELTE and SLTE derived from it.

`_why_not` checks the structure and `_why_different` compares the numbers; then the object's class is replaced by a
subclass that overrides `query_rgb`. Every call runs `_why_not` again, because hooks and layers may change.
"""

import copy
from typing import Any, NamedTuple

import torch
from torch import nn

from inr_kernels._core.hooks import has_hooks
from inr_kernels.local_implicit import LocalTextureDecoder
from inr_kernels.local_implicit.functional import interpolate, local_texture_decode
from inr_kernels.local_implicit.op import centres as pixel_centres

from . import class_swap, probe
from .class_swap import AcceleratedModule, Adapter, Match, Unsupported, register
from .liif import SIZE, Stub, queries, randomize

SIGNATURE = (("coord",), ("cell",))


def is_candidate(module: nn.Module) -> bool:
    """Whether the module has a method query_rgb and convolutions coef and freq, and is not ours."""
    maps = all(isinstance(getattr(module, name, None), nn.Conv2d) for name in ("coef", "freq"))
    return maps and callable(getattr(type(module), "query_rgb", None)) and not isinstance(module, LocalTextureDecoder)


def verify(module: nn.Module) -> Match:
    """The match of one decoder; Unsupported if it is not LTE's."""
    class_swap.check_method(module, "query_rgb", [SIGNATURE], defaults=False)
    if reason := _why_not(module):
        raise Unsupported(reason)
    if reason := _why_different(module):
        raise Unsupported(f"query_rgb is not LTE's: {reason}")
    imnet = _mlp(module)
    return class_swap.match(module, _Decoder, "query_rgb", (type(imnet), type(imnet).forward))


def _is_plus(module: Any) -> bool:
    """Whether it is LTE+, which stores only the features and takes grids of queries."""
    return not hasattr(module, "imnet")


def _mlp(module: Any) -> nn.Module:
    return module.layers if _is_plus(module) else module.imnet


def _sequential(module: Any) -> Any:
    return module.layers if _is_plus(module) else getattr(module.imnet, "layers", None)


def _modules(module: Any) -> list[nn.Module]:
    """The modules that query_rgb uses."""
    own = [getattr(module, name, None) for name in ("coef", "freq", "phase", "coord_fc")]
    return [*filter(None, own), _mlp(module), _sequential(module), *_sequential(module)]


def _why_not(module):
    """Why the structure is not LTE's, "" if it is. Cheap: runs at every call."""
    layers = _sequential(module) if hasattr(module, "imnet") or hasattr(module, "layers") else None
    if type(layers) is not nn.Sequential:
        return "it has no MLP that is an nn.Sequential, imnet.layers or layers"
    kind = nn.Conv2d if _is_plus(module) else nn.Linear
    parts, expected = list(layers), [kind, nn.ReLU] * (len(layers) // 2) + [kind]
    if [type(part) for part in parts] != expected:
        return f"its MLP must be {kind.__name__}, ReLU, ...; got {', '.join(type(part).__name__ for part in parts)}"
    if has_hooks(*_modules(module)):
        return "its MLP or a layer that it uses has a hook or a patched forward"
    if any(layer.bias is None for layer in parts[::2]):
        return "a layer of its MLP has no bias"
    if kind is nn.Conv2d and any(layer.weight.shape[2:] != (1, 1) or layer.groups > 1 for layer in parts[::2]):
        return "a layer of its MLP is no 1 x 1 convolution"
    if reason := _why_not_shapes(module, parts[0].weight.shape[1]):
        return reason
    params = [p for used in _modules(module) for p in used.parameters()]
    if any(p.dtype != params[0].dtype or p.device != params[0].device for p in params):
        return "its layers differ in dtype or device"
    if not torch.compiler.is_compiling() and any(type(p) not in (torch.Tensor, nn.Parameter) for p in params):
        return "it has weights of a tensor subclass"
    return ""


def _why_not_shapes(module, inputs):
    coefficients, frequencies = module.coef.out_channels, module.freq.out_channels
    linears = [getattr(module, name, None) for name in ("phase", "coord_fc")]
    shapes = [None if linear is None else (type(linear), tuple(linear.weight.shape)) for linear in linears]
    half = nn.Linear, (coefficients // 2, 2)
    kinds = {  # shapes of phase and coord_fc, frequencies per coefficient, further inputs of the MLP
        (half, None, 2, 0): "LTE",
        (half, half, 1, 0): "ELTE",
        (None, None, 2, 2): "SLTE",
    }
    kind = kinds.get((*shapes, 2 * frequencies // max(1, coefficients), inputs - coefficients))
    if kind is None or coefficients % 2 or frequencies % (coefficients // 2) or (_is_plus(module) and kind != "LTE"):
        return "coef, freq, phase and the MLP do not have the shapes of LTE, LTE+, ELTE or SLTE"
    return "its phase has a bias" if any(linear is not None and linear.bias is not None for linear in linears) else ""


class _Texture(NamedTuple):
    """The arguments of local_texture_decode, but for coord and cell."""

    coef: torch.Tensor
    freq: torch.Tensor
    phase: torch.Tensor
    weights: list[torch.Tensor]
    biases: list[torch.Tensor]


def _texture(module: Any) -> _Texture:
    """What the module decodes, in LTE's form."""
    layers = list(_sequential(module))[::2]
    weights, biases = [layer.weight.flatten(1) for layer in layers], [layer.bias for layer in layers]
    if _is_plus(module):
        coef, freq = module.coef(module.feat), module.freq(module.feat)
        return _Texture(coef, _pairs(*freq.chunk(2, 1)), module.phase.weight, weights, biases)
    coef, freq = module.coeff, module.freqq
    if hasattr(module, "coord_fc"):  # ELTE: a frequency times a linear function of the offset
        along_y, along_x = (freq * column.view(-1, 1, 1) for column in module.coord_fc.weight.unbind(1))
        return _Texture(coef, _pairs(along_y, along_x), module.phase.weight, weights, biases)
    if hasattr(module, "phase"):
        return _Texture(coef, freq, module.phase.weight, weights, biases)
    # SLTE: no phase, and the MLP also reads the pixel's centre: two coefficients whose frequency is zero.
    half = coef.shape[1] // 2
    batch, _, height, width = coef.shape
    axes = (pixel_centres(n, coef.device).to(coef.dtype) for n in (height, width))
    centres = torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(batch, 2, height, width)
    coef = torch.cat((coef[:, :half], centres, coef[:, half:], torch.zeros_like(centres)), 1)
    freq = torch.cat((freq, *[torch.zeros_like(centres)] * 2), 1)
    cosines, sines, centre = weights[0].split((half, half, 2), 1)
    first = torch.cat((cosines, centre, sines, torch.zeros_like(centre)), 1)
    return _Texture(coef, freq, first.new_zeros(half + 2, 2), [first, *weights[1:]], biases)


def _pairs(along_y: torch.Tensor, along_x: torch.Tensor) -> torch.Tensor:
    """[B, 2 K, h, w] in LTE's order of two [B, K, h, w]."""
    return torch.stack((along_y, along_x), 2).flatten(1, 2)


def _decode(module: Any, coord: torch.Tensor, cell: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    texture = _texture(module)
    grid = coord if coord.dim() == 4 else coord.unsqueeze(1)
    out = local_texture_decode(texture.coef, texture.freq, coord.float(), cell.float(), *texture[2:], backend=backend)
    out = out + interpolate(module.inp, grid).view(out.shape)
    return out.permute(0, 3, 1, 2) if _is_plus(module) else out


def _why_not_this_call(module, coord, cell):
    if reason := class_swap.why_changed(module) or _why_not(module):
        return reason
    imnet = _mlp(module)
    if (type(imnet), type(imnet).forward) != module._inr_match.details:
        return "its MLP has another class or forward"
    if nn.modules.module._has_any_global_hook():
        return "a hook on all modules is registered"
    weight, plus = module.coef.weight, _is_plus(module)
    maps = [getattr(module, name, None) for name in (("feat",) if plus else ("coeff", "freqq"))]
    tensors = [*maps, getattr(module, "inp", None), coord, cell]
    channels = [weight.shape[1]] if plus else [module.coef.out_channels, module.freq.out_channels]
    fits = (
        all(isinstance(t, torch.Tensor) and t.dtype == weight.dtype and t.device == weight.device for t in tensors)
        and weight.dtype == torch.float32  # where the original rounds coordinates, it differs too much
        and weight.device.type in ("cpu", "cuda")
        and not torch.is_autocast_enabled(weight.device.type)
        and all(
            (t.dim(), t.shape[1:2]) == (4, (n,)) and min(t.shape[1:]) > 0 for t, n in zip(maps, channels, strict=True)
        )
        and all(t.shape[0] == len(coord) and t.shape[2:] == maps[0].shape[2:] for t in maps)
        and (module.inp.dim(), len(module.inp), coord.shape[-1]) == (4, len(coord), 2)
        and module.inp.shape[1] == len(_sequential(module)[-1].bias)
        and coord.dim() == (4 if plus else 3)
        and cell.shape == ((len(coord), 2) if plus else coord.shape)
    )
    return "" if fits else class_swap.UNSUPPORTED_CALL


class _Decoder(AcceleratedModule):
    def query_rgb(self, coord, cell=None):
        """Decodes the maps, or in LTE+ the features, that gen_feat stored."""
        if class_swap.falls_back(self, _why_not_this_call(self, coord, cell)):
            return super().query_rgb(coord, cell)
        return _decode(self, coord, cell)


def _why_different(module):
    """Why query_rgb differs from LTE's on random numbers, "" if it does not; see `liif._why_different`."""
    generator = torch.Generator().manual_seed(0)
    with probe.sandbox() as random:
        used = {name: part for name, part in module._modules.items() if part in _modules(module)}
        copies = {name: copy.deepcopy(part).to_empty(device="cpu").float() for name, part in used.items()}
        feat = random((2, module.coef.in_channels, *SIZE))
        model: Any = probe.without_weights(module, {name: Stub(feat) for name in module._modules} | copies)
        parameters = [p.requires_grad_() for part in copies.values() for p in part.parameters()]
        randomize(parameters, generator)
        channels = len(_sequential(module)[-1].bias)
        model.gen_feat(torch.rand(2, channels, *SIZE, dtype=torch.float32, device="cpu"))
        coord, cell = queries(generator)
        leaves = [feat, *parameters]
        if _is_plus(module):
            side = coord.shape[1] // 9
            coord, cell = coord.unflatten(1, (9, side)), cell[:, 0]
        else:
            model.coeff, model.freqq = (random(t.shape) for t in (model.coeff, model.freqq))
            convolutions = {id(p) for part in (model.coef, model.freq) for p in part.parameters()}
            leaves = [model.coeff, model.freqq, *(p for p in parameters if id(p) not in convolutions)]
        return probe.why_different(
            model,
            lambda grad: model.query_rgb(coord, cell),
            lambda grad: _decode(model, coord, cell, backend="reference"),
            leaves,
            random,
            gradients=1e-2,  # as in `liif`
        )


ADAPTER = register(Adapter("LTE's decoder", is_candidate, verify))
