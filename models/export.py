"""Exports networks: as a program of torch.export in plain PyTorch, or as an ONNX file of standard operators."""

import contextlib
import copy
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx.experimental._config
from torch import nn

import inr_kernels
from inr_kernels._core.checks import is_positive_int, require
from inr_kernels._core.files import check_writable, replace_file
from inr_kernels.local_implicit.functional import check_size

from .common.network import Inpainter, Network
from .liif.upscaler import Upscaler

OPSET = 20


def export_program(
    network: Network, *, dynamic: bool = True, size: tuple[int, int] = (64, 96), batch: int = 1
) -> torch.export.ExportedProgram:
    """Exports a network by torch.export, in plain PyTorch: loading the program does not need this package.

    The program computes

        LIIF, LTE:        (image [B, 3, h, w], size [2] int64) -> [B, 3, H, W]     `upscale` to size = (H, W)
        others:           (image [B, 3, H, W], mask [B, 1, H, W]) -> [B, 3, H, W]  `inpaint` at the image's size

    with images in [0, 1] and masks of 1 = missing, in float32, with the parameters' values at the time of the export.
    It holds all pixels at once: the working memory grows with the image, and `workspace` is not an option.

    Args:
        network: a network of this package, in float32. It is copied, and exported in eval mode.
        dynamic: whether the image's height and width stay open. For IN2 and LaMa their smallest values are those of
            `encode`; for the others, 2. A global ImplicitAutoencoder has one size: pass False and that size.
        size: (height, width) of the image to trace with; the only ones if not dynamic.
        batch: B, which is fixed.

    Raises:
        TypeError: network is not a network of this package.
        ValueError: another dtype than float32, or a size that the network does not take.

    Example:
        >>> from inr_kernels.models import LaMa, LaMaConfig
        >>> program = export_program(LaMa(LaMaConfig(features=8, blocks=1)), dynamic=False, size=(24, 32))
        >>> program.module()(torch.rand(1, 3, 24, 32), torch.zeros(1, 1, 24, 32)).shape
        torch.Size([1, 3, 24, 32])
    """
    wrapper, inputs, shapes = _prepared(network, dynamic, size, batch)
    with _plain_pytorch():
        return torch.export.export(
            wrapper, inputs, dynamic_shapes=shapes, prefer_deferred_runtime_asserts_over_guards=True
        )


def export_onnx(
    network: Network,
    path: str | os.PathLike[str],
    *,
    dynamic: bool = True,
    size: tuple[int, int] = (64, 96),
    batch: int = 1,
) -> None:
    """Writes a network as an ONNX file of standard operators (opset 20), for ONNX Runtime and others.

    The inputs are `image` and `mask` (LIIF, LTE: `image` and `size`), the output is `output`; shapes, values and
    arguments: `export_program`. Fourier transforms become matrix products, whose time grows faster than that of an FFT.
    The export takes up to some minutes. It needs the extra `onnx`.

    Args:
        path: of the file; an existing one is replaced.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        OSError: the file cannot be written.
        TypeError, ValueError: as `export_program`.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("exporting to ONNX needs onnx and onnxscript: pip install 'inr-kernels[onnx]'") from error
    check_writable(path)
    wrapper, inputs, shapes = _prepared(network, dynamic, size, batch)
    names = ["image", "size" if isinstance(network, Upscaler) else "mask"]
    with _plain_pytorch(), _quiet():
        program = torch.onnx.export(
            wrapper,
            inputs,
            dynamo=True,
            dynamic_shapes=shapes,
            opset_version=OPSET,
            input_names=names,
            output_names=["output"],
            verbose=False,
            optimize=False,  # onnxscript's optimizer removes additions of LIIF's 1e-9, which gives 0 / 0
        )
    assert program is not None
    replace_file(path, program.model_proto.SerializeToString())


class _Upscale(nn.Module):
    """`Upscaler.upscale` to a size that is a tensor (H, W)."""

    def __init__(self, network: Upscaler):
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        """[B, 3, h, w], [2] -> [B, 3, H, W]."""
        height, width = size.tolist()
        for side in (height, width):
            torch._check(side > 0)
        inp = image * 2 - 1
        return self.network._decode(self.network.encoder(inp), inp, (height, width)).add(1).div(2).clamp(0, 1)


class _Inpaint(nn.Module):
    """`Inpainter.inpaint` without its checks of values."""

    def __init__(self, network: Inpainter):
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W], [B, 1, H, W] -> [B, 3, H, W]."""
        return self.network._blended(image, mask, self.network.predict(image, mask).clamp(0, 1))


def _prepared(network, dynamic, size, batch):
    """The module to export, in eval mode and plain PyTorch; its inputs; their dynamic shapes or None."""
    if not isinstance(network, (Upscaler, Inpainter)):
        names = "a DEAR, IN2, ImplicitAutoencoder, LaMa, LIIF or LTE"
        raise TypeError(f"network must be {names}; got {type(network).__name__}")
    parameter = next(network.parameters())
    require(parameter.dtype == torch.float32, "network", "be in float32: network.float()", parameter.dtype)
    require(is_positive_int(batch), "batch", "be a positive integer", repr(batch))
    height, width = check_size(size)
    if hasattr(network, "eager"):  # its twin in plain PyTorch
        twin = type(network)(network.config, eager=True)
        twin.load_state_dict(network.state_dict())
        twin.to(parameter.device)
    else:
        twin = copy.deepcopy(network)
    image = torch.zeros(batch, 3, height, width, dtype=torch.float32, device=parameter.device)
    min_side = max(1 + dynamic, getattr(network, "min_side", 1))  # torch.export cannot leave a size of 1 open
    require(min(height, width) >= min_side, "size", f"have sides of at least {min_side}", (height, width))
    names = ((2, "height"), (3, "width"))
    sides = {dim: torch.export.Dim(name, min=min_side) for dim, name in names} if dynamic else None
    if isinstance(network, Upscaler):
        size = torch.tensor([2 * height, 2 * width], dtype=torch.int64, device="cpu")
        return _Upscale(twin).eval(), (image, size), (sides, None)
    return _Inpaint(twin).eval(), (image, image[:, :1].clone()), (sides, sides)


@contextlib.contextmanager
def _plain_pytorch() -> Iterator[None]:
    """Exports without this package's ops, and without the assumption that an open size is not 1 or a multiple."""
    config: Any = torch.fx.experimental._config
    oblivious = config.patch(backed_size_oblivious=True)
    with torch.no_grad(), inr_kernels.backend("reference"), oblivious:
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides what torch's exporter reports about itself: that torchvision is missing, names of axes, deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
