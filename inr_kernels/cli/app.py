"""The command `inr-kernels app`: its page reads, computes and writes pictures as `inpaint` and `upscale` do."""

import contextlib
import math
import os
import shlex
import shutil
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image

from inr_kernels._core import dispatch, native
from inr_kernels._core.text import one_line
from inr_kernels.app.studio import Choice, Loaded, Made, Request, Studio
from inr_kernels.models import DEAR, Inpainter, Network
from inr_kernels.models.data import images
from inr_kernels.models.liif.upscaler import Upscaler

from . import names, pictures
from .arguments import NETWORKS, make_parser
from .folders import FAILURES
from .inpaint import TILE, Inpainting
from .jobs import Task
from .networks import open_network
from .upscale import Upscaling

TASKS: dict[str, type[Task]] = {"inpaint": Inpainting, "upscale": Upscaling}
EDITED, COMPARED = 2e6, 8e6  # pixels of the picture to paint on, and of those to compare, in the browser


def run(args: Namespace) -> None:
    """Opens the networks, and serves the page until it is interrupted."""
    pictures.prepare_computation(args)
    with tempfile.TemporaryDirectory(prefix="inr-kernels-") as folder:
        # Gradio reads these when it is imported.
        os.environ |= {"GRADIO_TEMP_DIR": os.path.join(folder, "page"), "GRADIO_ANALYTICS_ENABLED": "False"}
        try:
            from inr_kernels.app.page import LOOK, make_page
            from inr_kernels.app.server import LOOPBACK, listen, serve
        except ImportError as error:
            raise ImportError(f"app needs {error.name}: pip install 'inr-kernels[app]'") from error
        with listen(args.host, args.port) as server:
            page = make_page(CommandStudio(args, Path(folder)))
            host = f"[{args.host}]" if ":" in args.host else args.host
            if args.host not in LOOPBACK:
                pictures.say(args.host, "everyone who reaches this address can use the page and this machine's time")
            print(f"http://{host}:{server.getsockname()[1]}/ is the page; Ctrl+C ends it", flush=True)
            serve(page, server, args.host, args.max_upload, **LOOK)


class CommandStudio(Studio):
    """Runs the commands' tasks on the page's pictures.

    Args:
        args: of `inr-kernels app`.
        folder: for the pictures' folders.
    """

    def __init__(self, args: Namespace, folder: Path):
        self.args, self.folder = args, folder
        chosen = dict.fromkeys([*args.model, *NETWORKS["app"]])
        self.networks = {name: open_network(name, Network) for name in chosen}
        self.choices = [_choice(name, network) for name, network in self.networks.items()]
        self.reading = threading.Lock()  # reading changes settings of Pillow

    def load(self, file: Path) -> Loaded:
        """See `Studio`."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            with _without_folder(folder), self.reading, pictures.collected_notes() as notes:
                copy = Path(shutil.copy(file, folder))
                source = pictures.read("input", str(copy), self.args)
                preview = _show(source.decode(), folder / "preview", _fitting(source.size, EDITED))
            return Loaded(folder, copy, preview, source.size, _named(notes, folder))
        except BaseException:
            shutil.rmtree(folder)
            raise

    def make(self, picture: Loaded, request: Request, progress: Callable[[float, float], object]) -> Made:
        """See `Studio`."""
        file, stem = picture.file, picture.file.with_suffix("")
        network = self.networks[request.model]
        command = "inpaint" if isinstance(network, Inpainter) else "upscale"
        output = f"{stem}_{'filled' if command == 'inpaint' else 'large'}{names.kept_suffix(file.name)}"
        mask = Path(f"{stem}_mask.png") if request.mask is not None else None
        words = [command, str(file), *(("--mask", str(mask)) if mask else ()), "--model", request.model]
        enlarges = request.scale > 1 or command == "upscale"
        words += ["--scale", f"{request.scale:g}"] if enlarges else []
        words += ["--refine"] if request.refine else []
        if request.fast and not enlarges:
            words += ["--hd-strategy", "crop", "--hd-strategy-crop-trigger-size", "0"]
        if request.fast and not request.refine and isinstance(network, DEAR) and network.can_tile:
            words += ["--tile", str(TILE)]
        words += ["--backend", self.args.backend] if self.args.backend else []
        words += ["--device", self.args.device] if self.args.device != "cpu" else []
        words += ["-o", output]
        args = make_parser().parse_args(words)
        limits = ("workspace", "max_memory", "max_megapixels", "threads")
        vars(args).update({name: getattr(self.args, name) for name in limits})
        with _without_folder(picture.folder), pictures.collected_notes() as notes:
            if mask and request.mask is not None:
                sides = picture.size[::-1]
                holes = request.mask.astype(numpy.uint8) * 255
                Image.fromarray(holes).resize(sides, Image.Resampling.NEAREST).save(mask)
            names.check(args)
            task = TASKS[command](args)
            task.use(network)
            with self.reading:
                job = task.load(args.names)
            began = time.perf_counter()
            with pictures.memory_options(args):
                colour = task.compute([job], progress)
            seconds = time.perf_counter() - began
            pictures.write(job, colour)
            with self.reading:
                shown = _fitting(job.size, COMPARED)
                before = _show(job.picture, picture.folder / "before", shown)
                after = _show(images.read(output, math.inf), picture.folder / "after", shown)
        notes = [note for note in _named(notes, picture.folder) if note not in picture.notes]
        line = _named([shlex.join(["inr-kernels", *words])], picture.folder)[0]
        return Made(Path(output), mask, before, after, seconds, self._backend(), line, notes)

    def _backend(self) -> str:
        """What the fused ops run on."""
        device = torch.device(self.args.device)
        op = dispatch.OPS["local_implicit"]
        facts = op.facts(torch.empty(1, 1, 1, 1, dtype=torch.float32, device=device))
        name = dispatch.requested_backend(self.args.backend) or op.default(facts)
        library, _ = native.load()
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else library and library.isa()
        return f"backend {name} ({where})" if where and name != "reference" else f"backend {name}"


def _choice(name: str, network: Network) -> Choice:
    """How the page offers a network."""
    fills = isinstance(network, Inpainter)
    any_size = network.any_size if isinstance(network, Inpainter) else isinstance(network, Upscaler)
    does = " and ".join(["fills"] * fills + ["enlarges"] * any_size)
    label = name.upper() if name in NETWORKS["app"] else f"{Path(name).name}, {network.NETWORK}"
    return Choice(name, f"{label}: {does}", fills, any_size)


def _fitting(size: tuple[int, int], most: float) -> tuple[int, int]:
    """(width, height) with the aspect ratio of (height, width), and at most so many pixels."""
    ratio = min(1, math.sqrt(most / math.prod(size)))
    return max(1, math.floor(size[1] * ratio)), max(1, math.floor(size[0] * ratio))


def _show(picture: images.Picture, file: Path, size: tuple[int, int]) -> Path:
    """Writes the picture at the size (width, height) for a browser; returns the file with its suffix."""
    image = images.to_image(picture.colour.expand(-1, 3, -1, -1))
    if picture.alpha is not None:
        image.putalpha(images.to_image(picture.alpha.expand(-1, 3, -1, -1)).convert("L"))
    file = file.with_suffix(".jpg" if picture.alpha is None else ".png")
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if picture.alpha is None else {"compress_level": 1}
    image.resize(size, Image.Resampling.BICUBIC).save(
        file, icc_profile=picture.metadata.get("colour profile"), **options
    )
    return file


def _named(texts: list[str], folder: Path) -> list[str]:
    """The texts with the files' names only."""
    return [text.replace(f"{folder}{os.sep}", "") for text in texts]


@contextlib.contextmanager
def _without_folder(folder: Path) -> Iterator[None]:
    """Errors in the block become ValueErrors that name the files only."""
    try:
        yield
    except FAILURES as error:
        raise ValueError(_named([one_line(error)], folder)[0]) from error
