"""What `upscale` and `inpaint` have in common: the steps from a picture's file to the output."""

from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch

from inr_kernels.models import Network
from inr_kernels.models.common.progress import Progress

from . import pictures
from .names import Names
from .networks import open_network
from .pictures import Job


class Task(ABC):
    """A command that makes one picture of another. `folders.run` calls its methods in this order, `open` once.

    Attributes:
        kind: the class of networks that the command takes.
    """

    kind: type[Any]

    def __init__(self, args: Namespace):
        self.args = args

    def read(self, names: Names) -> Job:
        """Reads the files, without decoding them, and checks the sizes."""
        source = pictures.read("input", names.input, self.args)
        return Job(names, source, pictures.output_size(source, self.args))

    def open(self) -> None:
        """Opens the network, and checks the options that depend on it."""
        self.use(open_network(self.args.model, self.kind))

    @abstractmethod
    def use(self, network: Network) -> None:
        """Takes the network, which is of the class `kind`, and checks the options that depend on it."""

    @abstractmethod
    def check(self, job: Job) -> None:
        """Checks that the network takes the picture, and the memory that the work needs."""

    def decode(self, job: Job) -> None:
        """Decodes the picture."""
        job.picture = job.source.decode()
        pictures.check_transparency(job.picture, job.names.extension)

    def load(self, names: Names) -> Job:
        """Reads, checks and decodes a picture, once the network is open."""
        job = self.read(names)
        self.check(job)
        self.decode(job)
        return job

    @abstractmethod
    def compute(self, group: Sequence[Job], progress: Progress) -> torch.Tensor:
        """Returns the colours [n, 3, H, W] of n pictures of one size."""
