"""What `upscale` and `inpaint` have in common: the steps from a picture's file to the output."""

from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Sequence

import torch

from inr_kernels.models.common.progress import Progress

from . import pictures
from .names import Names
from .pictures import Job


class Task(ABC):
    """A command that makes one picture of another. `folders.run` calls its methods in this order, `open` once."""

    def __init__(self, args: Namespace):
        self.args = args

    def read(self, names: Names) -> Job:
        """Reads the files, without decoding them, and checks the sizes."""
        source = pictures.read("input", names.input, self.args)
        return Job(names, source, pictures.output_size(source, self.args))

    @abstractmethod
    def open(self) -> None:
        """Opens the network, and checks the options that depend on it."""

    @abstractmethod
    def check(self, job: Job) -> None:
        """Checks that the network takes the picture, and the memory that the work needs."""

    def decode(self, job: Job) -> None:
        """Decodes the picture."""
        job.picture = job.source.decode()
        pictures.check_transparency(job.picture, job.names.extension)

    @abstractmethod
    def compute(self, group: Sequence[Job], progress: Progress) -> torch.Tensor:
        """Returns the colours [n, 3, H, W] of n pictures of one size."""
