"""Opens the network that --model names."""

from typing import TypeVar

from inr_kernels.models import DEAR, IN2, LIIF, Network, from_checkpoint

N = TypeVar("N", bound=Network)

NETWORKS: dict[str, type[Network]] = {"liif": LIIF, "dear": DEAR, "in2": IN2}


def open_network(name: str, kind: type[N]) -> N:
    """Opens the shipped network of that name, or the checkpoint at that path.

    Args:
        name: the value of --model.
        kind: what the command takes: LIIF, Inpainter, or any Network.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a checkpoint, or one of a network of another kind.
    """
    network = NETWORKS[name].pretrained() if name in NETWORKS else from_checkpoint(name)
    if isinstance(network, kind):
        return network
    does, other = ("upscale", "inpaint") if kind is LIIF else ("inpaint", "upscale")
    raise ValueError(f"{name} is a {network.NETWORK} checkpoint, which does not {does}; use inr-kernels {other}")
