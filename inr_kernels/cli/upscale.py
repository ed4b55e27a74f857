"""The command `inr-kernels upscale`."""

from argparse import Namespace
from collections.abc import Sequence

import torch

from inr_kernels.models import Network
from inr_kernels.models.common.progress import Progress
from inr_kernels.models.liif.upscaler import Upscaler

from . import folders, pictures
from .jobs import Task
from .pictures import Job


def run(args: Namespace) -> None:
    """Reads the images, renders them in bands of rows, and writes the results."""
    folders.run(Upscaling(args))


class Upscaling(Task):
    """See `jobs.Task`."""

    kind = Upscaler

    def use(self, network: Network) -> None:
        assert isinstance(network, Upscaler)
        self.model = network.to(self.args.device)

    def check(self, job: Job) -> None:
        job.need = pictures.check_work(job, self.args, 4 * (self.model.config.features + 6))

    def compute(self, group: Sequence[Job], progress: Progress) -> torch.Tensor:
        return self.model.upscale(
            torch.cat([pictures.network_input(job.picture) for job in group]).to(self.args.device),
            size=group[0].size,
            workspace=self.args.workspace,
            backend=self.args.backend,
            progress=progress,
        )
