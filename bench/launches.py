"""What each kernel's launch on its paper shape has to do: bytes, FLOPs, programs, and trips of the main loop.

`bytes` counts what a launch reads and writes once, `flops` what the matrix products need, whatever the kernel makes of
it. Formulas are those of the benchmarks where these have them.
"""

import math
from dataclasses import dataclass

from .bench_local_implicit import HIDDEN, macs
from .bench_unmask_attention import products


@dataclass(frozen=True)
class Launch:
    """One launch.

    Args:
        op, kernel, mode, dtype, nth: which of the ahead-of-time compilations it is (tests/support/compile_triton.py).
        case: in words.
        programs: that do something.
        trips: of the main loop, of a program on the average.
        bytes, flops: needed.
        unit: of the products: "bf16", "tf32" or "fp32".
        native: of a CUDA kernel, whose `kernel` is a part of its mangled name: {"label": its name, "warps": of a block,
            "shared": bytes}.
    """

    op: str
    kernel: str
    mode: str
    dtype: str
    case: str
    programs: int
    trips: float
    bytes: float
    flops: float
    unit: str = "bf16"
    nth: int = 0
    native: dict | None = None

    @property
    def name(self):
        """For people."""
        return (self.native or {}).get("label", self.kernel)


def local_implicit():
    """LIIF's decoder, 256 x 4: 1 M queries on 256² pixels; and its training step, all runs of queries together."""
    width, depth, block = HIDDEN[0], len(HIDDEN) - 1, 128

    def decoding(queries, pixels):
        rows = 4 * queries
        moved = 2 * (pixels * width + 3 * queries) + 8 * queries  # map, colours, coordinates
        return {"programs": math.ceil(rows / block), "trips": depth, "bytes": moved, "flops": 2 * macs(queries, 0)[0]}

    common = {"op": "local_implicit", "mode": "last", "dtype": "bfloat16"}
    case, whole = "1 M queries on 256²", decoding(1 << 20, 1 << 16)
    yield Launch(kernel="decode", case=case, **whole, **common)
    for tiles, shared in ((1, 48 << 10), (2, 160 << 10)):
        name = f"decodeILNS_4TypeE2ELi{width}ELb0ELi{tiles}E"
        cuda = common | whole | {"programs": whole["programs"] // tiles}
        cuda["native"] = {"label": f"decode, mma.sync, {tiles} x 16 rows a warp", "warps": 8, "shared": shared}
        yield Launch(kernel=name, case=case, **cuda)

    queries, pixels = 16 * 2304, 16 * 48 * 48
    rows, common["case"] = 4 * queries, "a step of 16 x 2304 queries on 48²"
    state, hidden = 2 * rows * width, 2 * rows * depth * width * width
    keeping = decoding(queries, pixels) | {"flops": hidden}
    keeping["bytes"] += (depth + 1) * state
    yield Launch(kernel="decode", nth=1, **keeping, **common)
    back = keeping | {"bytes": 2 * (depth + 1) * state + rows * (2 * 32 + 4)}
    yield Launch(kernel="backpropagate", **back, **common)
    tiles, splits, run = (width // 64) ** 2 * depth, 8, 15872  # rows of a run: what the workspace holds
    trips = run / splits / 32
    runs = math.ceil(rows / run)
    yield Launch(
        kernel="add_products",
        programs=tiles * splits * runs,
        trips=trips,
        bytes=2 * depth * state,
        flops=hidden,
        **common,
    )
    first = common | {"mode": "first", "programs": queries // 64, "bytes": (1 + 1 / 4) * state + 36 * rows}
    # Four neighbours, and for each a loop over 8 blocks of channels, two thirds of the instructions.
    yield Launch(kernel="blend_backward", trips=4 * (8 * 2 / 3 + 1 / 3), flops=0, **first)
    moved = state + 20 * rows + 2 * 4 * pixels * width
    yield Launch(kernel="add_segments", programs=pixels, trips=1, bytes=moved, flops=0, **common)


def elementwise_filter():
    """DEAR's filter on the latents of sixteen pictures of 256²; in planes of the image's size."""
    values, programs = 16 * 256 * 64 * 64, 16 * 256 * 64 * 64 // 128
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        common = {"op": "elementwise_filter", "mode": "DEAR", "dtype": dtype, "flops": 0, "trips": 1}
        common |= {"case": f"16 x 256 x 64², {dtype}", "programs": programs}
        plane, exact = values * size, values * 4  # the backward's own are float32
        yield Launch(kernel="filter_pixels", bytes=11 * plane, **common)
        common["case"] += ", backward"
        yield Launch(kernel="logsumexp", bytes=9 * plane + exact, **common | {"trips": 2})
        yield Launch(kernel="filter_pixels", nth=1, bytes=10 * plane + exact, **common)
        yield Launch(kernel="kernel_gradient", bytes=11 * plane + (2 + 9) * exact, **common)
        yield Launch(kernel="image_gradient", bytes=10 * plane + 3 * exact, **common | {"trips": 9})


def unmask_attention():
    """Sixteen latents' features of 64², 40 % of them hole; those that ask stand first."""
    batch, tokens, known, channels, columns = 16, 4096, 4096 * 6 // 10, 64, 32
    plane = 2 * batch * tokens * channels
    common = {"op": "unmask_attention", "mode": "64", "dtype": "bfloat16", "case": "16 x 64², 40 % hole"}
    forward = 2 * batch * channels * products(known, tokens)
    both = 2 * batch * channels * products(known, tokens, True)
    share = known / tokens
    yield Launch(
        kernel="attend",
        programs=batch * math.ceil(known / 64),
        trips=tokens / columns,
        bytes=(1 + share) * plane,
        flops=forward,
        **common,
    )
    common["case"] += ", backward"
    asking, blocks = math.ceil(known / 32), tokens // 32
    trips = (asking * tokens + (blocks - asking) * known) / blocks / columns
    moved = (1 + share + 2) * plane  # the result is float32
    yield Launch(
        kernel="attend_backward", programs=batch * blocks, trips=trips, bytes=moved, flops=both - forward, **common
    )


def neighborhood_attention():
    """IN²'s: sixteen maps of 64², 8 heads x 32, K 7; a tile of 4 x 8 sees 10 rows of 14 columns, one block of 16."""
    batch, pixels, heads, dim, kernel = 16, 64 * 64, 8, 32, 7
    pairs, plane = batch * pixels * heads * kernel**2, 2 * batch * pixels * heads * dim
    numbers = 4 * batch * pixels * heads  # lse and its like
    common = {"op": "neighborhood_attention", "mode": "dim 32", "dtype": "bfloat16", "case": "16 x 64², 8 x 32, K 7"}
    common |= {"programs": batch * pixels // 32 * heads}
    product = 2 * pairs * dim
    yield Launch(kernel="attend", trips=10, bytes=4 * plane + numbers, flops=2 * product, **common)
    common["case"] += ", backward"
    yield Launch(kernel="query_backward", trips=20, bytes=5 * plane + 3 * numbers, flops=3 * product, **common)
    yield Launch(kernel="key_value_backward", trips=10, bytes=6 * plane + 2 * numbers, flops=4 * product, **common)
    share = common | {"programs": batch * pixels // 4096 * heads * 13 * 13}
    yield Launch(kernel="bias_backward", trips=32, bytes=4 * plane + 2 * numbers, flops=0, **share)


def fourier_unit():
    """Big-LaMa's unit at 512²: 192 channels of 64 x 33 frequencies, the product and the columns' transform."""
    channels, height, half = 192, 64, 33
    spectrum = 8 * channels * height * half
    for dtype, unit in (("bfloat16", "tf32"), ("float32", "fp32")):
        common = {"op": "fourier_unit", "kernel": "multiply", "dtype": dtype, "unit": unit}
        common |= {"mode": "tf32" if unit == "tf32" else "ieee"}
        for nth, (side, columns, units) in enumerate(((2 * channels, height * half, 1), (2 * height, half, channels))):
            yield Launch(
                nth=nth,
                case=("the product, " if nth == 0 else "the columns, ") + common["mode"],
                programs=units * math.ceil(side / 64) * math.ceil(columns / 64),
                trips=side / 32,
                bytes=2 * spectrum + 4 * side * side,
                flops=2 * units * side * side * columns,
                **common,
            )


PAPER = [local_implicit, elementwise_filter, unmask_attention, neighborhood_attention, fourier_unit]
LAUNCHES = [launch for launches in PAPER for launch in launches()]
