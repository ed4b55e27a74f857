"""The command `inr-kernels demo`."""

import argparse
import io
import math
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

from inr_kernels._core.files import replace_file
from inr_kernels.models import LIIF
from inr_kernels.models.data import images
from inr_kernels.models.data.photographs import HELD_OUT, photographs
from inr_kernels.models.evaluation.metrics import psnr

from .machine import processor
from .parsing import UsageError

WIDTH, MARGIN, LINE = 450, 12, 26  # in pixels: width of a panel, distance of panels, height of a line of text
CROP = 0.25  # the side of the detail that is shown enlarged, relative to the photograph's
BACKENDS = {"plain PyTorch": "reference", "fused kernels": "cpu"}


class Run(NamedTuple):
    """The result of one backend: the picture in [0, 1], seconds of encoder and decoder, bytes of the decoder."""

    picture: torch.Tensor
    encoder: float
    decoder: float
    memory: int


def run(args: argparse.Namespace) -> None:
    """Measures both backends, prints a table and writes the picture."""
    try:
        (photo,) = photographs(HELD_OUT)
    except ImportError:
        raise ValueError("the photograph is part of scikit-image: pip install scikit-image") from None
    if not 1 <= args.scale <= min(photo.size) / 8:
        raise UsageError(f"argument --scale: must be 1 to {min(photo.size) / 8:g}; got {args.scale:g}")
    small, shown = images.shrink(photo, args.scale)
    size = shown.size[::-1]
    runs = {name: measured(backend, small, size, args.repeat) for name, backend in BACKENDS.items()}
    bicubic = small.resize(shown.size, Image.Resampling.BICUBIC)
    report(args, small, shown, bicubic, runs)
    sheet = draw(small, shown, bicubic, runs, args.scale)
    kind = images.FORMATS[args.extension]
    file = io.BytesIO()
    sheet.save(file, kind, **images.SAVE.get(kind, {}))
    replace_file(args.output, file.getvalue())
    print(f"\nAll pictures side by side: {args.output}")


def measured(backend: str, small: Image.Image, size: tuple[int, int], repeat: int) -> Run:
    """Runs one backend in a new process, so that only its own memory is measured."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    job = (there, backend, images.to_tensor(small).numpy(), size, repeat, torch.get_num_threads())
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
    return Run(torch.from_numpy(result[0]), *result[1:])


def _measure(pipe, backend, small, size, repeat, threads):
    try:
        torch.set_num_threads(threads)
        pipe.send(_run(backend, torch.from_numpy(small), size, repeat))
    except Exception as error:
        pipe.send(error)


@torch.no_grad()
def _run(backend, small, size, repeat):
    model = LIIF.pretrained()
    model.upscale(small[..., :9, :9], 2, backend=backend)  # warm-up: loads libraries and starts threads
    start = time.perf_counter()
    feat = model.gen_feat(small * 2 - 1)
    encoder = time.perf_counter() - start
    before = _reset_peak()
    model.render(feat, size, backend=backend)
    memory = _peak() - before - math.prod(size) * 3 * 4
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        picture = model.render(feat, size, backend=backend)
        times.append(time.perf_counter() - start)
    picture = ((picture + 1) / 2).clamp(0, 1)
    return picture.numpy(), encoder, statistics.median(times), memory


def _reset_peak():
    """Resets the process's peak memory where the system supports it; returns the memory in use.

    Elsewhere the peak of the start (a few hundred MB of libraries) may hide a smaller one.
    """
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


def report(
    args: argparse.Namespace, small: Image.Image, shown: Image.Image, bicubic: Image.Image, runs: dict[str, Run]
) -> None:
    """Prints the table."""
    model = LIIF.pretrained()
    threads = torch.get_num_threads()
    weights = sum(p.numel() for p in model.parameters())
    reference, kernels = (runs[name] for name in BACKENDS)
    print(f"{processor()}, {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}")
    print(
        f"Photograph skimage.data.{HELD_OUT}, enlarged from {small.width}x{small.height} to"
        f" {shown.width}x{shown.height} (x{args.scale:g}).\n"
        f"LIIF with {weights / 1e3:.0f} K parameters, float32, hidden layers"
        f" {'-'.join(map(str, model.config.hidden))}. Its encoder takes {kernels.encoder:.2f} s, its decoder:\n"
    )
    print(f"{'':14s}{'seconds':>9s}{'speed-up':>10s}{'extra memory':>15s}{'PSNR':>11s}")
    for name, done in runs.items():
        decibels = quality(images.to_image(done.picture), shown, args.scale)
        print(
            f"{name:14s}{done.decoder:9.3f}{reference.decoder / done.decoder:9.1f}x"
            f"{done.memory / 1e6:12.0f} MB{decibels:8.2f} dB"
        )
    print(f"{'bicubic':14s}{'':34s}{quality(bicubic, shown, args.scale):8.2f} dB")
    difference = (reference.picture - kernels.picture).abs().max()
    print(f"\nLargest difference between the outputs of PyTorch and the kernels: {difference:.1e} (white is 1)")


def quality(image: Image.Image, shown: Image.Image, scale: float) -> float:
    """PSNR in dB without the border, where every method lacks context."""
    return psnr(image, shown, math.ceil(scale))


def draw(
    small: Image.Image, shown: Image.Image, bicubic: Image.Image, runs: dict[str, Run], scale: float
) -> Image.Image:
    """All pictures side by side, each with a detail of it below, enlarged."""
    reference, kernels = (runs[name] for name in BACKENDS)
    difference = (reference.picture - kernels.picture).abs()
    power = math.ceil(-math.log10(max(difference.max().item(), 1e-12)))

    def result(caption, done):
        image = images.to_image(done.picture)
        return f"{caption}: {quality(image, shown, scale):.2f} dB, {done.decoder:.2f} s", image

    panels = [
        (f"Input, {small.width} x {small.height} pixels", small.resize(shown.size, Image.Resampling.NEAREST)),
        (f"Bicubic, x{scale:g}: {quality(bicubic, shown, scale):.2f} dB", bicubic),
        ("Original", shown),
        result("LIIF in plain PyTorch", reference),
        result("LIIF with fused kernels", kernels),
        (f"Their difference, amplified 10^{power} times", images.to_image((difference * 10**power).clamp(0, 1))),
    ]
    height = round(WIDTH * shown.height / shown.width)
    cell = WIDTH + MARGIN, LINE + 2 * height + 2 * MARGIN
    sheet = Image.new("RGB", (3 * cell[0] + MARGIN, 2 * cell[1] + MARGIN), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=19)
    box = crop_box(shown.size)
    for i, (caption, image) in enumerate(panels):
        left, top = MARGIN + i % 3 * cell[0], MARGIN + i // 3 * cell[1]
        pen.text((left, top), caption, "black", font)
        whole = image.resize((WIDTH, height), Image.Resampling.LANCZOS)
        part = image.resize((WIDTH, height), Image.Resampling.NEAREST, box)
        sheet.paste(whole, (left, top + LINE))
        sheet.paste(part, (left, top + LINE + height + 4))
        frame = [n * WIDTH / shown.width for n in box]
        corners = [left + frame[0], top + LINE + frame[1], left + frame[2], top + LINE + frame[3]]
        pen.rectangle(corners, outline="yellow", width=2)
    return sheet


def crop_box(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The detail that is shown enlarged, the spoon: left, top, right, bottom."""
    width, height = (round(n * CROP) for n in size)
    left, top = round(size[0] * 0.5), round(size[1] * 0.58)
    return left, top, left + width, top + height
