"""Shrink a photograph, render it with the reference and with the kernels, and compare.

The photograph took no part in the training of the shipped model. Prints times, memory and PSNR, and
writes one picture that shows all side by side.
"""

import io
import math
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

from inr_kernels.models import LIIF
from inr_kernels.models.common.files import replace_file
from inr_kernels.models.data import images
from inr_kernels.models.data.photographs import HELD_OUT, photographs
from inr_kernels.models.evaluation.metrics import psnr

from .machine import processor
from .parsing import UsageError, positive

WIDTH, MARGIN, LINE = 450, 12, 26  # pixels: a panel, between panels, a line of text
CROP = 0.25  # of a photograph's sides; enlarged below it


class Run(NamedTuple):
    """What one backend gave: the picture in [0, 1], seconds (encoder, decoder), bytes."""

    picture: torch.Tensor
    encoder: float
    decoder: float
    memory: int


def add_arguments(parser):
    """The arguments of `inr-kernels demo`."""
    parser.add_argument("-o", "--output", type=Path, default=Path("demo.png"), help="default: %(default)s")
    parser.add_argument("--scale", type=positive(float), default=3.7, help="default: %(default)s")
    parser.add_argument("--repeat", type=positive(int), default=3, help="how often; the median counts")


def run(args):
    """Measures, prints, draws."""
    if args.output.suffix.lower() not in images.FORMATS:
        raise UsageError(f"output must end in {' '.join(images.FORMATS)}; got {args.output.name}")
    if not args.output.parent.is_dir():
        raise ValueError(f"{args.output.parent}: the folder of the output does not exist")
    try:
        (photo,) = photographs(HELD_OUT)
    except ImportError:
        raise ValueError("the photograph comes with scikit-image: pip install scikit-image") from None
    if not 1 <= args.scale <= min(photo.size) / 8:
        raise UsageError(f"argument --scale: must be 1 to {min(photo.size) / 8:g}; got {args.scale:g}")
    small, shown = images.shrink(photo, args.scale)
    size = shown.size[::-1]
    runs = {name: measured(backend, small, size, args.repeat) for name, backend in BACKENDS.items()}
    bicubic = small.resize(shown.size, Image.BICUBIC)
    report(args, small, shown, bicubic, runs)
    sheet = draw(small, shown, bicubic, runs, args.scale)
    kind = images.FORMATS[args.output.suffix.lower()]
    file = io.BytesIO()
    sheet.save(file, kind, **images.SAVE.get(kind, {}))
    replace_file(args.output, file.getvalue())
    print(f"\nSide by side: {args.output}")


BACKENDS = {"reference": "reference", "kernels": "cpu"}


def measured(backend, small, size, repeat):
    """One backend's Run, in a fresh process, so that no other's memory counts."""
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
        raise RuntimeError(f"the process of {backend} ended with {process.exitcode}") from None
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
    model.upscale(small[..., :9, :9], 2, backend=backend)  # loads libraries, starts threads
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
    """The process's memory now; where the system can, the peak is counted anew from here.

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


def report(args, small, shown, bicubic, runs):
    """The table."""
    model = LIIF.pretrained()
    weights = sum(p.numel() for p in model.parameters())
    reference, kernels = runs["reference"], runs["kernels"]
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(
        f"skimage.data.{HELD_OUT}: {small.width}x{small.height} -> {shown.width}x{shown.height}"
        f" (x{args.scale:g}); LIIF of {weights / 1e3:.0f} K parameters, float32,"
        f" hidden {'-'.join(map(str, model.config.hidden))}; its encoder takes"
        f" {kernels.encoder:.2f} s, the decoder:\n"
    )
    print(f"{'':12s}{'seconds':>9s}{'speed-up':>10s}{'extra memory':>15s}{'PSNR':>11s}")
    for name, done in runs.items():
        decibels = quality(images.to_image(done.picture), shown, args.scale)
        print(
            f"{name:12s}{done.decoder:9.3f}{reference.decoder / done.decoder:9.1f}x"
            f"{done.memory / 1e6:12.0f} MB{decibels:8.2f} dB"
        )
    print(f"{'bicubic':12s}{'':34s}{quality(bicubic, shown, args.scale):8.2f} dB")
    difference = (reference.picture - kernels.picture).abs().max()
    print(f"\nLargest difference between the two: {difference:.1e} (white is 1)")


def quality(image, shown, scale):
    """PSNR without the border, where no method sees enough."""
    return psnr(image, shown, math.ceil(scale))


def draw(small, shown, bicubic, runs, scale):
    """All pictures, and below each a part of it, enlarged."""
    reference, kernels = runs["reference"], runs["kernels"]
    difference = (reference.picture - kernels.picture).abs()
    power = math.ceil(-math.log10(max(difference.max().item(), 1e-12)))
    results = {name: images.to_image(done.picture) for name, done in runs.items()}

    def db(image):
        return f"{quality(image, shown, scale):.2f} dB"

    panels = [
        (f"Input, {small.width} x {small.height}", small.resize(shown.size, Image.NEAREST)),
        (f"Bicubic x{scale:g}: {db(bicubic)}", bicubic),
        ("Original", shown),
        (f"Reference: {db(results['reference'])}, {reference.decoder:.2f} s", results["reference"]),
        (f"Kernels: {db(results['kernels'])}, {kernels.decoder:.2f} s", results["kernels"]),
        (f"|Reference - kernels| x 10^{power}", images.to_image((difference * 10**power).clamp(0, 1))),
    ]
    height = round(WIDTH * shown.height / shown.width)
    cell = WIDTH + MARGIN, LINE + 2 * height + 2 * MARGIN
    sheet = Image.new("RGB", (3 * cell[0] + MARGIN, 2 * cell[1] + MARGIN), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=19)
    box = crop_box(shown.size)
    for i, (caption, image) in enumerate(panels):
        left, top = MARGIN + i % 3 * cell[0], MARGIN + i // 3 * cell[1]
        pen.text((left, top), caption, "black", font)
        whole = image.resize((WIDTH, height), Image.LANCZOS)
        part = image.resize((WIDTH, height), Image.NEAREST, box)
        sheet.paste(whole, (left, top + LINE))
        sheet.paste(part, (left, top + LINE + height + 4))
        frame = [n * WIDTH / shown.width for n in box]
        corners = [left + frame[0], top + LINE + frame[1], left + frame[2], top + LINE + frame[3]]
        pen.rectangle(corners, outline="yellow", width=2)
    return sheet


def crop_box(size):
    """The part that is enlarged: the spoon."""
    width, height = (round(n * CROP) for n in size)
    left, top = round(size[0] * 0.5), round(size[1] * 0.58)
    return left, top, left + width, top + height
