"""Networks: LIIF upscales; DEAR, IN2, ImplicitAutoencoder and LaMa inpaint. `from_checkpoint` opens any of them."""

import os
from typing import Any

from .autoencoder import AutoencoderConfig, ImplicitAutoencoder
from .common import checkpoints
from .common.network import Inpainter, Network
from .dear import DEAR, DEARConfig
from .export import export_onnx, export_program
from .in2 import IN2, ImplicitPyramidDecoder, ImplicitUpsample, IN2Config
from .lama import LaMa, LaMaConfig
from .liif import EDSR, LIIF, RDN, LIIFConfig
from .refinement import FeatureRefiner

__all__ = [
    "DEAR",
    "EDSR",
    "IN2",
    "LIIF",
    "RDN",
    "AutoencoderConfig",
    "DEARConfig",
    "FeatureRefiner",
    "IN2Config",
    "ImplicitAutoencoder",
    "ImplicitPyramidDecoder",
    "ImplicitUpsample",
    "Inpainter",
    "LIIFConfig",
    "LaMa",
    "LaMaConfig",
    "Network",
    "export_onnx",
    "export_program",
    "from_checkpoint",
]

NETWORKS = (DEAR, IN2, ImplicitAutoencoder, LaMa, LIIF)


def from_checkpoint(path: str | os.PathLike[str], **options: Any) -> Network:
    """Opens a checkpoint of any network of this package, in eval mode.

    The name in the file says which network it is. Files without a name are recognized by their state-dict keys: those
    of older releases, and published files of LaMa and LIIF. `LaMa` and `LIIF` list the formats. No code of a file
    is run.

    Args:
        path: of the file.
        options: DEAR, IN2 and ImplicitAutoencoder: `eager=True`, the network in plain PyTorch. LaMa: `activation`, the
            activation on the output where the file does not name it ("sigmoid" by default). LIIF: none.

    Raises:
        OSError: the file cannot be read.
        TypeError: the network in the file does not have this option, or path is no path.
        ValueError: it is damaged, or not a checkpoint of these networks; the message gives the reason.

    Example:
        >>> model = from_checkpoint(DEAR.PRETRAINED)
        >>> type(model).__name__, isinstance(model, Inpainter)
        ('DEAR', True)
    """
    with checkpoints.errors(path, *NETWORKS):
        contents = checkpoints.read(path)
        network: type[Network] = checkpoints.identify(contents, NETWORKS)
    return network._from_contents(path, contents, options)
