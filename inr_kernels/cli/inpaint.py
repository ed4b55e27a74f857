"""The command `inr-kernels inpaint`."""

import contextlib
import math
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch

from inr_kernels._core import dispatch
from inr_kernels.models import DEAR, FeatureRefiner, Inpainter, Network
from inr_kernels.models.common.progress import Progress
from inr_kernels.models.common.surroundings import fill_surroundings, surroundings
from inr_kernels.models.data.masks import from_picture, opacity

from . import folders, pictures
from .arguments import CROP_MARGIN, CROP_TRIGGER_SIZE
from .jobs import Task
from .names import Names
from .parsing import UsageError
from .pictures import Job

TILE = 32  # that is proposed where a whole picture takes long in DEAR
SLOW = 10  # times as long as in tiles
MAX_GREY = 1 / 3  # share of grey pixels that the soft edges of strokes hardly reach


def run(args: Namespace) -> None:
    """Reads the images and their masks, fills and renders in bands of rows, and writes the results."""
    folders.run(Inpainting(args))


class Inpainting(Task):
    """See `jobs.Task`."""

    kind = Inpainter

    def read(self, names: Names) -> Job:
        source = pictures.read("input", names.input, self.args)
        drawn = pictures.read("mask", names.mask, self.args)
        if drawn.size != source.size:
            expected, found = pictures.shown(source.size), pictures.shown(drawn.size)
            raise ValueError(f"{drawn.label}: must have the input's size {expected}; got {found}")
        job = Job(names, source, pictures.output_size(source, self.args))
        job.drawn = drawn
        return job

    def use(self, network: Network) -> None:
        assert isinstance(network, Inpainter)
        args, self.model = self.args, network
        self.options = check_options(args, network)
        self.refiner = FeatureRefiner(network, workspace=args.workspace) if args.refine else None
        self.has_warned = False
        network.to(args.device)

    def check(self, job: Job) -> None:
        check_sizes(self.args, self.model, job)
        crops = self._crops(job)
        job.need = pictures.check_work(job, self.args, *((0, 0) if crops else self._bytes()))
        if not crops:
            self._warn(job.source.name, job.source.size)

    def decode(self, job: Job) -> None:
        super().decode(job)
        job.mask = read_mask(job.drawn)
        if self._crops(job):
            parts = surroundings(job.mask, self._margin, self.model.min_side)
            sizes = [tuple(side.stop - side.start for side in part) for part in parts]
            largest = max(sizes, key=math.prod, default=(0, 0))
            job.need = pictures.check_work(job, self.args, *self._bytes(), pixels=math.prod(largest))
            self._warn(job.source.name, largest)

    def compute(self, group: Sequence[Job], progress: Progress) -> torch.Tensor:
        args, job = self.args, group[0]
        image = torch.cat([pictures.network_input(job.picture) for job in group]).to(args.device)
        mask = torch.cat([job.mask for job in group]).to(args.device)
        with dispatch.backend(args.backend) if args.backend else contextlib.nullcontext():
            if not self._crops(job):
                return self._fill(image, mask, progress, job.need, job.size)

            def fill(part: torch.Tensor, holes: torch.Tensor, progress: Progress) -> torch.Tensor:
                return self._fill(part, holes, progress, job.need)

            return fill_surroundings(fill, image, mask, self._margin, self.model.min_side, progress)

    def _fill(
        self,
        image: torch.Tensor,
        mask: torch.Tensor,
        progress: Progress,
        need: float,
        size: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """The filled images. need: bytes of all that is needed."""
        if self.refiner is None:
            workspace = self.args.workspace
            return self.model.inpaint(image, mask, size, workspace=workspace, progress=progress, **self.options)
        # What the workspace, the images and the files leave for the network.
        other = need - math.prod(image.shape[2:]) * self.model.bytes_per_refined_pixel()
        self.refiner.max_memory = math.floor(self.args.max_memory - other)
        return self.refiner(image, mask, progress=progress)

    def _crops(self, job: Job) -> bool:
        """Whether only the surroundings of the holes are computed."""
        largest = self.args.hd_strategy_crop_trigger_size
        largest = CROP_TRIGGER_SIZE if largest is None else largest
        return self.args.hd_strategy == "crop" and max(job.source.size) > largest

    @property
    def _margin(self) -> int:
        """Width of these surroundings, in pixels."""
        return self.args.hd_strategy_crop_margin or CROP_MARGIN

    def _bytes(self) -> tuple[int, int]:
        """Bytes that the network needs for a pixel of the input, and of the output."""
        if self.refiner is not None:
            return self.refiner.bytes_per_pixel(), 0
        return self.model.bytes_per_pixel(**self.options), self.model.bytes_per_output_pixel

    def _warn(self, name: str, size: tuple[int, int]) -> None:
        """Says that a picture, or the largest part that is computed of it, is too small to refine, or takes long."""
        if self.refiner is not None and self.refiner.scales(*size) == 1:
            side = math.ceil(math.sqrt(2) * self.refiner.min_side)
            pictures.say(name, f"too small to refine, which needs sides of about {side}: filled without")
        if not (isinstance(self.model, DEAR) and self.model.can_tile) or self.refiner is not None or self.has_warned:
            return
        image = torch.empty(1, 1, *size, dtype=torch.float32, device="meta")
        whole, tiled = (sum(self.model._work(image, size, tile)) for tile in (self.options["tile"], TILE))
        if whole > SLOW * tiled:
            self.has_warned = True
            pictures.say(
                name,
                f"takes about {whole / tiled:.0f} times as long as with --tile {TILE}, because every pixel attends to"
                " every other; --hd-strategy crop computes the surroundings of holes only",
            )


def check_options(args: Namespace, model: Inpainter) -> dict[str, Any]:
    """Checks the options that depend on the network; returns those of its `inpaint` that only it has."""
    if args.refine and args.tile is not None:
        raise UsageError(f"argument --tile: does not apply with --refine; got {args.tile}")
    if args.batch_size > 1 and (args.refine or args.hd_strategy == "crop"):
        option = "--refine" if args.refine else "--hd-strategy crop"
        raise UsageError(f"argument --batch-size: must be 1 with {option}; got {args.batch_size}")
    if args.hd_strategy != "crop":
        for name in ("margin", "trigger_size"):
            if (value := getattr(args, f"hd_strategy_crop_{name}")) is not None:
                option = f"--hd-strategy-crop-{name.replace('_', '-')}"
                raise UsageError(f"argument {option}: applies with --hd-strategy crop; got {value}")
    if args.scale is not None and args.scale != 1:  # of --size it depends on the picture
        check_enlarging(args, model)
    if isinstance(model, DEAR):
        if args.tile and not model.can_tile:
            raise UsageError(f"argument --tile: must be 0 for a DEAR with instance norm; got {args.tile}")
        return {"tile": args.tile or None}
    if args.tile is not None:
        raise UsageError(f"argument --tile: applies to DEAR only, not to {model.NETWORK}; got {args.tile}")
    return {}


def check_sizes(args: Namespace, model: Inpainter, job: Job) -> None:
    """Checks that the network takes a picture of this size, and renders the output's."""
    source, own = job.source, pictures.shown(job.source.size)
    if min(source.size) < model.min_side:
        raise ValueError(f"{source.label}: {model.NETWORK} needs sides of at least {model.min_side} pixels; got {own}")
    if job.size != source.size:
        check_enlarging(args, model)


def check_enlarging(args: Namespace, model: Inpainter) -> None:
    """Checks that network and options allow another size than the input's."""
    only = f"at the input's size only; got {pictures.requested(args)}"
    if not model.any_size:
        raise UsageError(f"{model.NETWORK} fills {only}")
    for option, is_given in (("--refine", args.refine), ("--hd-strategy crop", args.hd_strategy == "crop")):
        if is_given:
            raise UsageError(f"argument {option}: works {only}")


def read_mask(source: pictures.Source) -> torch.Tensor:
    """Decodes the mask, brightness times opacity, as [1, 1, h, w], float32, of zeros and ones."""
    drawn = source.decode()
    mask = opacity(drawn)
    holes = from_picture(drawn)
    top = 2**drawn.depth - 1
    smallest, largest = (f"{value * top:.0f} of {top}" for value in (mask.min(), mask.max()))
    grey = ((mask > 0.1) & (mask < 0.9)).float().mean().item()
    rule = f"pixels are filled from {top // 2 + 1} on"
    if not holes.any():
        times = " (brightness times opacity)" if drawn.colour.shape[1] > 1 or drawn.alpha is not None else ""
        pictures.say(source.name, f"the mask has no hole: its largest value is {largest}{times}; {rule}")
    elif holes.all():
        pictures.say(source.name, f"the mask covers the whole image: its smallest value is {smallest}")
    elif grey > MAX_GREY:
        pictures.say(source.name, f"{100 * grey:.0f} % of the mask is grey, as of a photograph; {rule}")
    return holes
