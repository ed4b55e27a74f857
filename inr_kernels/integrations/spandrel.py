"""Lets programs that load models by spandrel, such as chaiNNer, open this package's checkpoints: `install`.

Unlike the other modules of this folder, which replace layers of other projects, this one brings our networks there: it
stands above `inr_kernels.models`, and `accelerate` does not import it.
"""

import functools
import os
from typing import Any

import torch
from safetensors import safe_open

from inr_kernels._core.checks import is_positive_int, require
from inr_kernels.models import NETWORKS, Inpainter, LaMa, Network
from inr_kernels.models.common import checkpoints
from inr_kernels.models.liif.upscaler import Upscaler

try:
    from spandrel import (
        MAIN_REGISTRY,
        Architecture,
        ArchRegistry,
        ArchSupport,
        ImageModelDescriptor,
        MaskedImageModelDescriptor,
        ModelLoader,
        ModelTiling,
        SizeRequirements,
        UnsupportedModelError,
    )
except ImportError as error:
    raise ImportError("this needs spandrel: pip install 'inr-kernels[spandrel]'") from error

HEADER = "inr_kernels.header."  # begins the keys by which a state dict carries its file's header


def install(registry: ArchRegistry = MAIN_REGISTRY, *, scale: int = 4) -> None:
    """Registers the networks of this package as architectures of spandrel, after spandrel's own.

    `ModelLoader().load_from_file(path)` then opens every file that `inr_kernels.models.from_checkpoint` opens and
    spandrel does not know: what `save` writes, and published files of LIIF, LTE and LaMa. Files of LaMa whose keys
    begin with "generator." or "model." are still opened by spandrel's own LaMa. The ids are "inr_kernels.LIIF" and so
    on.

    spandrel's loader drops the header of a file, in which the config is. `install` therefore replaces
    `ModelLoader.load_state_dict_from_file` by a method that adds the header of our files to the state dict, under keys
    that begin with "inr_kernels.header.". A bare state dict of DEAR, IN2 or ImplicitAutoencoder, without these keys, is
    refused.

    A descriptor computes what the network's `upscale` or `inpaint` does, bit for bit. Its mask is 1 where pixels are
    missing, as everywhere.

    Args:
        registry: the main one, which every ModelLoader has by default, or an own one. Copies of a registry share its
            architectures, and with them the scale.
        scale: the factor by which LIIF and LTE enlarge, which spandrel fixes for a loaded model. A further call of
            `install` changes it for models that are loaded afterwards.

    Raises:
        ValueError: scale is not a positive integer.

    Example:
        >>> from spandrel import ModelLoader
        >>> from inr_kernels.models import LIIF
        >>> install(scale=2)
        >>> model = ModelLoader().load_from_file(LIIF.PRETRAINED)
        >>> model(torch.rand(1, 3, 20, 30)).shape
        torch.Size([1, 3, 40, 60])
    """
    require(is_positive_int(scale), "scale", "be a positive integer", repr(scale))
    _keep_headers()
    for network in NETWORKS:
        if found := registry.get(_id(network)):
            assert isinstance(found.architecture, _OurArchitecture)
            found.architecture.scale = scale
        else:
            registry.add(ArchSupport.from_architecture(_OurArchitecture(network, scale)))


def _id(network: type[Network]) -> str:
    return f"inr_kernels.{network.NETWORK}"


@functools.cache
def _keep_headers() -> None:
    """Makes spandrel's loader add the header of our files to the state dict; once."""
    original = ModelLoader.load_state_dict_from_file

    @functools.wraps(original)
    def load_state_dict_from_file(self: Any, path: str | os.PathLike[str]) -> dict[str, Any]:
        return original(self, path) | _header(path)

    ModelLoader.load_state_dict_from_file = load_state_dict_from_file


def _header(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The header of a safetensors file that `save` wrote, as tensors; {} of other files."""
    if not os.fspath(path).lower().endswith(".safetensors"):
        return {}
    with safe_open(os.fspath(path), "pt") as file:
        texts = file.metadata() or {}
    if "network" not in texts or "config" not in texts:
        return {}
    return {
        HEADER + name: torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")
        for name, text in texts.items()
    }


def _contents(state: dict[str, Any]) -> checkpoints.Contents:
    """A state dict of spandrel as the contents of a file."""
    texts = {name: bytes(value.tolist()).decode() for name, value in state.items() if name.startswith(HEADER)}
    texts = {name.removeprefix(HEADER): text for name, text in texts.items()}
    data = {name: value for name, value in state.items() if not name.startswith(HEADER)}
    tensors = data["sd"] if isinstance(data.get("sd"), dict) else data
    if tensors is not data:
        data = {"model": data}  # yinboc/liif's, of which spandrel leaves the entry "model"
    return checkpoints.Contents(texts, data, sum(t.nbytes for t in tensors.values() if isinstance(t, torch.Tensor)))


class _OurArchitecture(Architecture[Any]):
    """A network of this package as spandrel sees it."""

    def __init__(self, network: type[Network], scale: int):
        super().__init__(id=_id(network), name=network.NETWORK, detect=self._is_ours)
        self.network, self.scale = network, scale

    def _is_ours(self, state: dict[str, Any]) -> bool:
        try:
            return checkpoints.identify(_contents(state), NETWORKS) is self.network
        except checkpoints.UNREADABLE:
            return False

    def load(self, state_dict: dict[str, Any]) -> Any:
        """Returns the descriptor of a state dict, in eval mode."""
        try:
            model: Any = self.network._from_contents("this state dict", _contents(state_dict), {})
        except ValueError as error:
            raise UnsupportedModelError(str(error)) from error
        common: dict[str, Any] = {
            "model": model,
            "state_dict": model.state_dict(),
            "architecture": self,
            "tags": [],
            "supports_half": not isinstance(model, LaMa),  # as spandrel's own LaMa
            "supports_bfloat16": True,
            "input_channels": model.config.inputs - 1 if isinstance(model, LaMa) else 3,
            "output_channels": model.config.outputs if isinstance(model, LaMa) else 3,
        }
        if isinstance(model, Upscaler):
            scale = self.scale
            return ImageModelDescriptor(
                **common,
                purpose="SR",
                scale=scale,
                tiling=ModelTiling.INTERNAL,
                call_fn=lambda network, image: network.upscale(image, scale),
            )
        assert isinstance(model, Inpainter)
        return MaskedImageModelDescriptor(
            **common,
            purpose="Inpainting",
            size_requirements=SizeRequirements(minimum=model.min_side),
            tiling=ModelTiling.DISCOURAGED,
            call_fn=lambda network, image, mask: network.inpaint(image, mask),
        )
