"""The command `inr-kernels demo`."""

import argparse
import contextlib
import ctypes
import io
import math
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw

from inr_kernels import backend as requested_backend
from inr_kernels import release_memory
from inr_kernels._core.devices import processor
from inr_kernels._core.files import replace_file
from inr_kernels.models import DEAR, LIIF
from inr_kernels.models.common.masking import known
from inr_kernels.models.common.smooth import smooth_fill
from inr_kernels.models.data import images
from inr_kernels.models.data.photographs import HELD_OUT, PART, photographs
from inr_kernels.models.evaluation.metrics import psnr

from .parsing import UsageError
from .sheet import Block, Panel, draw

FILL_SCALE = 2
BACKENDS = {"plain PyTorch": "reference", "fused kernels": "cpu"}
SCRATCHES = [[(0, 24), (70, 40), (191, 12)], [(30, 127), (58, 70), (52, 0)], [(110, 90), (191, 118)]]
# The details that are shown enlarged: left, top, right, bottom, relative to the picture's sides.
SPOON_BOX = (0.5, 0.58, 0.75, 0.83)
HOLE_BOX = (0.55, 0.37, 0.97, 0.79)
HOLE = (146, 52, 170, 76)  # of the fill's input, as the scratches: (x, y) in pixels


class Run(NamedTuple):
    """The result of one backend: the picture in [0, 1], seconds, bytes of memory in addition to the output, and seconds
    of an encoder that the others leave out."""

    picture: torch.Tensor
    seconds: float
    memory: int
    encoder: float


class Job(NamedTuple):
    """What the demo does with a photograph.

    Attributes:
        title: of the job.
        image: the network's input, without missing pixels.
        mask: [1, 1, h, w], 1 = missing; None: nothing is missing.
        original: the photograph, of the output's size.
        scale: of the output.
        baseline, classical: the name of a method without a network, and its output.
    """

    title: str
    image: Image.Image
    mask: torch.Tensor | None
    original: Image.Image
    scale: float
    baseline: str
    classical: Image.Image


def run(args: argparse.Namespace) -> None:
    """Measures both backends, prints a table for each job and writes the picture."""
    try:
        (photo,) = photographs(HELD_OUT)
    except ImportError:
        raise ValueError("the photograph is part of scikit-image: pip install scikit-image") from None
    if not 1 <= args.scale <= min(photo.size) / 8:
        raise UsageError(f"argument --scale: must be 1 to {min(photo.size) / 8:g}; got {args.scale:g}")
    jobs = [fill_job(photo), upscale_job(photo, args.scale)]
    inputs = [(images.to_tensor(job.image), job.mask, job.original.size[::-1]) for job in jobs]
    runs = {name: measured(backend, inputs, args.repeat) for name, backend in BACKENDS.items()}
    threads = torch.get_num_threads()
    print(f"{processor()}, {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}")
    blocks = []
    for i, job in enumerate(jobs):
        of_job = {name: done[i] for name, done in runs.items()}
        report(job, of_job)
        blocks.append(block(job, of_job))
    file, kind = io.BytesIO(), images.FORMATS[args.extension]
    draw(blocks).save(file, kind, **images.SAVE.get(kind, {}))
    replace_file(args.output, file.getvalue())
    print(f"\nAll pictures side by side: {args.output}")


def fill_job(photo: Image.Image) -> Job:
    """The middle of the photograph, shrunk, with scratches and a hole: filled and enlarged in one pass."""
    small, shown = images.shrink(photo.crop(PART), FILL_SCALE)
    drawn = Image.new("L", small.size)
    pen = ImageDraw.Draw(drawn)
    for scratch in SCRATCHES:
        pen.line(scratch, 255, 3)
    pen.ellipse(HOLE, 255)
    mask = images.to_tensor(drawn.convert("RGB"))[:, :1]
    smooth = images.to_image(smooth_fill(known(images.to_tensor(small), mask), mask).clamp(0, 1))
    classical = smooth.resize(shown.size, Image.Resampling.BICUBIC)
    title = f"Fill scratches and a hole, and enlarge x{FILL_SCALE}, in one pass: DEAR"
    return Job(title, small, mask, shown, FILL_SCALE, "smooth fill, bicubic", classical)


def upscale_job(photo: Image.Image, scale: float) -> Job:
    """The whole photograph, shrunk: enlarged."""
    small, shown = images.shrink(photo, scale)
    bicubic = small.resize(shown.size, Image.Resampling.BICUBIC)
    return Job(
        f"Enlarge x{scale:g}: LIIF, time and memory of its decoder", small, None, shown, scale, "bicubic", bicubic
    )


def measured(backend: str, inputs: list[tuple[Any, ...]], repeat: int) -> list[Run]:
    """Runs one backend in a new process, so that only its own memory is measured.

    inputs: of each job, the image [1, 3, h, w], the mask or None, and (height, width) of the output.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    arrays = [(image.numpy(), None if mask is None else mask.numpy(), size) for image, mask, size in inputs]
    job = (there, backend, arrays, repeat, torch.get_num_threads())
    process = context.Process(target=_measure, args=job, daemon=True)
    process.start()
    there.close()
    try:
        result = here.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process that ran backend {backend!r} exited with {process.exitcode}") from None
    process.join()
    if isinstance(result, Exception):
        raise result
    return [Run(torch.from_numpy(picture), *numbers) for picture, *numbers in result]


def _measure(pipe, backend, inputs, repeat, threads):
    try:
        torch.set_num_threads(threads)
        pipe.send([(_fill if job[1] is not None else _upscale)(backend, *job, repeat) for job in inputs])
    except Exception as error:
        pipe.send(error)


@torch.no_grad()
def _upscale(backend, small, mask, size, repeat):
    """The decoder's time and memory, as the encoder is the same."""
    model, small = LIIF.pretrained(), torch.from_numpy(small)
    model.upscale(small[..., :9, :9], 2, backend=backend)  # warm-up: loads libraries and starts threads
    start = time.perf_counter()
    feat = model.gen_feat(small * 2 - 1)
    encoder = time.perf_counter() - start
    picture, *numbers = _timed(lambda: model.render(feat, size, backend=backend), size, repeat)
    return ((picture + 1) / 2).clamp(0, 1).numpy(), *numbers, encoder


def _fill(backend, small, mask, size, repeat):
    """The time and memory of all of the network."""
    model = DEAR.pretrained(eager=backend == "reference")
    small, mask = torch.from_numpy(small), torch.from_numpy(mask)
    with requested_backend(backend):
        model.inpaint(small[..., :9, :9], mask[..., :9, :9])  # warm-up
        picture, *numbers = _timed(lambda: model.inpaint(small, mask, size), size, repeat)
    return picture.numpy(), *numbers, 0.0


def _timed(call, size, repeat):
    """The output of `size`, the median of its seconds, and the memory that it took in addition."""
    before = _reset_peak()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        picture = call()
        times.append(time.perf_counter() - start)
        if len(times) == 1:  # later the peak has a second output
            memory = _peak() - before - math.prod(size) * 3 * 4
    return picture, statistics.median(times), memory


def _reset_peak():
    """Resets the process's peak memory where the system supports it; returns the memory in use.

    Elsewhere the peak of the start (a few hundred MB of libraries) may hide a smaller one.
    """
    release_memory()
    with contextlib.suppress(OSError, AttributeError):  # of glibc: what an earlier job freed would hide new memory
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return _peak()


def _peak():
    try:
        return _status("VmHWM")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) << 10


def report(job: Job, runs: dict[str, Run]) -> None:
    """Prints the table of a job."""
    model = (DEAR if job.mask is not None else LIIF).pretrained()
    weights = sum(p.numel() for p in model.parameters())
    reference, kernels = (runs[name] for name in BACKENDS)
    shown = job.original
    print(
        f"\n{job.title}, {weights / 1e3:.0f} K parameters, float32\n"
        f"Photograph skimage.data.{HELD_OUT}, from {job.image.width}x{job.image.height}"
        f" to {shown.width}x{shown.height}."
    )
    if job.mask is None:
        print(f"The encoder takes {kernels.encoder:.2f} s, the decoder:")
    else:
        print(f"{100 * job.mask.mean():.0f} % of the pixels are missing.")
    print(f"\n{'':22s}{'seconds':>9s}{'speed-up':>10s}{'extra memory':>15s}{'PSNR':>11s}")
    for name, done in runs.items():
        print(
            f"{name:22s}{done.seconds:9.3f}{reference.seconds / done.seconds:9.1f}x"
            f"{done.memory / 1e6:12.0f} MB{quality(images.to_image(done.picture), job):8.2f} dB"
        )
    print(f"{job.baseline:22s}{'':34s}{quality(job.classical, job):8.2f} dB")
    print(f"Largest difference between the outputs of PyTorch and the kernels: {difference(runs):.1e} (white is 1)")


def difference(runs: dict[str, Run]) -> float:
    """The largest difference between the outputs of both backends."""
    reference, kernels = (runs[name] for name in BACKENDS)
    return (reference.picture - kernels.picture).abs().max().item()


def quality(image: Image.Image, job: Job) -> float:
    """PSNR in dB without the border, where every method lacks context."""
    return psnr(image, job.original, math.ceil(job.scale))


def block(job: Job, runs: dict[str, Run]) -> Block:
    """The pictures of a job, with captions."""

    def panel(caption: str, image: Image.Image, more: str = "") -> Panel:
        return Panel(f"{caption}: {quality(image, job):.2f} dB{more}", image)

    results = [
        panel(
            name[0].upper() + name[1:],
            images.to_image(done.picture),
            f", {done.seconds:.2f} s, {done.memory / 1e6:.0f} MB",
        )
        for name, done in runs.items()
    ]
    most = difference(runs)
    title = f"{job.title}. Largest difference: {most:.1e} (white is 1)"
    caption, seen = f"Input, {job.image.width} x {job.image.height} pixels", images.to_tensor(job.image)
    if job.mask is not None:
        seen = torch.where(job.mask > 0, 1, seen)
        enlarged = images.to_image(seen).resize(job.original.size, Image.Resampling.NEAREST)
        return Block(title, [Panel(f"{caption}, white is missing", enlarged), *results], HOLE_BOX)
    enlarged = job.image.resize(job.original.size, Image.Resampling.NEAREST)
    reference, kernels = (runs[name] for name in BACKENDS)
    power = math.ceil(-math.log10(max(most, 1e-12)))
    amplified = ((reference.picture - kernels.picture).abs() * 10**power).clamp(0, 1)
    panels = [
        Panel(caption, enlarged),
        panel(job.baseline.capitalize(), job.classical),
        Panel("Original", job.original),
        *results,
        Panel(f"Their difference, amplified 10^{power} times", images.to_image(amplified)),
    ]
    return Block(title, panels, SPOON_BOX)
