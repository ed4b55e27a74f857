"""Whether a foreign decoder computes what we believe: both run on random numbers, outputs and gradients compared."""

import contextlib
import copy
import warnings

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

SIZE = 5, 4


def differs(module, channels, feature_given, decode):
    """Why a decoder's query_rgb is not `decode`, "" if on random numbers it is.

    The module itself, the random generators and the global settings stay as they are: what runs is its class on a
    shell with random weights (its own may hide a term that is still zero), in float32 on the CPU.

    Args:
        module: the decoder: imnet, query_rgb, gen_feat.
        channels: of the features it reads.
        feature_given: query_rgb(feature, coord, cell); else query_rgb(coord, cell) after gen_feat.
        decode: decode(shell, feat, coord, cell), ours.
    """
    generator = torch.Generator().manual_seed(0)
    with _quiet_and_plain():
        feat = torch.randn(2, channels, *SIZE, generator=generator, dtype=torch.float32).requires_grad_()
        shell = _shell(module, feat, generator)
        coord, cell = _queries(generator)
        feat = _give_features(shell, feat, feature_given, coord, cell)
        leaves = [feat, *shell.imnet.parameters()]
        for training, grad, repeats in ((False, False, 5), (False, True, 1), (True, True, 1)):
            shell.training = training
            shell.imnet.train(training)
            before = dict(vars(shell))
            query = coord.repeat(1, repeats, 1), cell.repeat(1, repeats, 1)
            with torch.set_grad_enabled(grad):
                theirs = shell.query_rgb(*([feat] if feature_given else []), *query)
                ours = decode(shell, feat, *query)
            if vars(shell).keys() != before.keys() or any(vars(shell)[name] is not before[name] for name in before):
                return "query_rgb is not LIIF's: it sets attributes"
            if theirs.shape != ours.shape or theirs.dtype != ours.dtype or not _close(theirs, ours):
                return "query_rgb is not LIIF's: another output on random features"
        weight = torch.randn(ours.shape, generator=generator, dtype=torch.float32)
        grads = (torch.autograd.grad(out, leaves, weight, allow_unused=True) for out in (theirs, ours))
        if not all(map(_alike, *grads)):
            return "query_rgb is not LIIF's: other gradients on random features"
    return ""


def _shell(module, feat, generator):
    """An object of the module's class: its imnet copied, in float32 on the CPU; its other modules just return feat."""
    shell = object.__new__(type(module))
    # A container may be a cache that the decoder fills.
    values = {k: copy.copy(v) if isinstance(v, (dict, list, set)) else v for k, v in vars(module).items()}
    values.pop("feat", None)
    vars(shell).update(values)
    imnet = copy.deepcopy(module.imnet).to_empty(device="cpu").float().requires_grad_()
    vars(shell)["_modules"] = {name: _Stub(feat) for name in module._modules} | {"imnet": imnet}
    for kind in ("_parameters", "_buffers"):
        own = vars(module)[kind].items()
        vars(shell)[kind] = {name: None if t is None else torch.empty(t.shape, dtype=torch.float32) for name, t in own}
    with torch.no_grad():
        for tensor in (*shell._parameters.values(), *shell._buffers.values(), *imnet.parameters(), *imnet.buffers()):
            if tensor is not None:
                fan_in = tensor.shape[-1] if tensor.dim() > 1 else 9
                tensor.normal_(0, fan_in**-0.5, generator=generator)
    return shell


class _Stub(nn.Module):
    """An encoder, or a part of one, that has already done its work."""

    def __init__(self, feat):
        super().__init__()
        self.feat = feat

    def forward(self, *_, **__):
        return self.feat


def _give_features(shell, feat, feature_given, coord, cell):
    """Runs forward and gen_feat, which may set more than the features, and returns what query_rgb will read."""
    image = torch.rand(2, 3, *SIZE, dtype=torch.float32)
    with contextlib.suppress(Exception):  # it may ask more of its encoder than a stub has
        type(shell).forward(shell, image, coord, cell)
    if not feature_given:
        shell.gen_feat(image)
        return shell.feat
    with contextlib.suppress(Exception):  # it may ask more of its encoder than a stub has; query_rgb reads no self.feat
        shell.gen_feature(image)
    return feat


def _queries(generator):
    """coord and cell [2, Q, 2]: anywhere, outside too, and on pixel centres at x1 and x3, where rounding decides."""
    coord = []
    for n in SIZE:
        parts = [torch.rand(2, 24, generator=generator, dtype=torch.float32) * 5 - 2.5]
        for pixels in (n, 3 * n):
            # The last is at x3 the last pixel's centre, where both neighbours are one and areas vanish.
            centres = -1 + 1 / pixels + 2 / pixels * torch.arange(pixels, dtype=torch.float32)
            index = torch.randint(pixels, (2, 24), generator=generator)
            index[:, ::4] = (n - 1) * (pixels // n) + pixels // n // 2
            parts.append(centres[index])
        coord.append(torch.cat(parts, 1))
    coord = torch.stack(coord, -1)
    return coord, 0.8 * 0.01 ** torch.rand(
        coord.shape, generator=generator, dtype=torch.float32
    )  # scales from 0.5 to 50


def _close(a, b):
    scale = b.abs().max()
    return bool(scale > 0 and (a - b).abs().max() <= 1e-5 * scale)


def _alike(a, b):
    """Of gradients: a hidden unit that rounding takes over its ReLU's corner changes one summand of many."""
    if a is None or b is None:
        return a is b
    return bool((a - b).norm() <= 1e-2 * b.norm())


@contextlib.contextmanager
def _quiet_and_plain():
    """Gradients, no autocast, no warnings, everything on the CPU, and the random generator as before."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(_OnCpu())
        yield


class _OnCpu(TorchFunctionMode):
    """In this thread, what asks for a CUDA device gets the CPU: LIIF's code says `.cuda()`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cuda:
            return args[0]
        return function(*map(_here, args), **{k: _here(v) for k, v in (kwargs or {}).items()})


def _here(value):
    return "cpu" if isinstance(value, (str, torch.device)) and str(value).startswith("cuda") else value
