"""bench/estimate.py: its formulas against counts by hand, the disassembly that it reads, and the committed page."""

import pytest
from test_compile_only import KERNELS

from bench import estimate, sass
from bench.launches import Launch, Native, launches


def launch(op, kernel, nth=0, case=""):
    return [one for one in launches() if (one.op, one.kernel) == (op, kernel) and case in one.case][nth]


def test_formulas_by_hand():
    decode = launch("local_implicit", "decode")
    # Four neighbours: four offsets and cells into 256 channels, three layers 256 x 256; then 256 to 3.
    assert decode.flops == 2 * 1024 * 1024 * (4 * (4 * 256 + 3 * 65_536) + 768) == 1_659_467_988_992
    assert decode.bytes == 256 * 256 * 256 * 2 + 1024 * 1024 * (3 * 2 + 2 * 4) == 48_234_496
    assert decode.programs == 4 * 1024 * 1024 // 128
    step = launch("local_implicit", "backpropagate")
    assert step.flops == 2 * 147_456 * 3 * 65_536 == 57_982_058_496
    assert step.bytes == 147_456 * (4 * 512 + 4 * 512 + 32 + 32 + 4)  # states, gradients, extras, last, pixels

    filtered = launch("elementwise_filter", "filter_pixels", case="float32")
    assert filtered.bytes == 11 * 16 * 256 * 64 * 64 * 4 == 738_197_504
    assert filtered.programs == 131_072

    attend = launch("unmask_attention", "attend")
    assert attend.flops == 16 * 2 * (2 * 64) * 2457 * 4096 == 41_221_619_712
    assert (attend.programs, attend.trips) == (16 * 39, 128)
    backward = launch("unmask_attention", "attend_backward")
    assert backward.flops == 16 * 2 * 64 * (5 * 2457**2 + 7 * 2457 * 1639)

    attend = launch("neighborhood_attention", "attend")
    assert attend.flops == 2 * 2 * 32 * 49 * 16 * 4096 * 8 == 3_288_334_336
    assert attend.bytes == 4 * 16 * 4096 * 256 * 2 + 16 * 4096 * 8 * 4 == 136_314_880
    assert attend.programs == 16 * 16 * 8 * 8

    multiply = launch("fourier_unit", "multiply")
    assert multiply.flops == 2 * 384 * 384 * 64 * 33
    assert multiply.bytes == 2 * 192 * 64 * 33 * 8 + 384 * 384 * 4
    assert (multiply.programs, multiply.trips) == (33 * 6, 12)


@pytest.mark.parametrize("op", KERNELS)
def test_every_kernel_has_a_launch(op):
    assert {one.kernel for one in launches() if one.op == op and not one.native} == KERNELS[op]


LISTING = """
	.section	.text.first,"ax",@progbits
.text.first:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   MUFU.EX2 R2, R3 ;
.L_x_0:
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0030*/              @!P0 FFMA R2, R3, R4, R5 ;
        /*0040*/                   MUFU.RCP R2, R3 ;
        /*0050*/              @P1  BRA `(.L_x_0) ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0070*/                   HMMA.1688.F32.TF32 R4, R8, R10, R4 ;
        /*0080*/                   EXIT ;
.L_x_1:
        /*0090*/                   BRA `(.L_x_1);
        /*00a0*/                   NOP;
	.section	.text.second,"ax",@progbits
.text.second:
        /*0000*/                   EXIT ;
"""


def test_counts_a_disassembly():
    (first, code), (second, other) = sass.sections(LISTING)
    assert (first, second) == ("first", "second")
    wgmma, mma, tf32 = 2 * 64 * 128 * 16 // 4, 2 * 16 * 8 * 16, 2 * 16 * 8 * 8
    expected = {"instructions": 11, "mma_flops": wgmma + mma + tf32, "fp32": 1, "mufu": 2}
    expected |= {"loop_instructions": 4, "loop_mma_flops": wgmma, "loop_fp32": 1, "loop_mufu": 1}
    expected |= {f"inner_{key}": expected[f"loop_{key}"] for key in ("instructions", "mma_flops", "fp32", "mufu")}
    assert sass.count(code) == expected
    assert sass.count(other)["instructions"] == 1
    assert sass.count(other)["loop_instructions"] == sass.count(other)["inner_instructions"] == 0


def test_counts_the_loop_of_the_products():
    """Of a loop that contains a loop of copies and one of products."""
    lines = [
        *(".L_x_0:", "MOV R0, R1", ".L_x_1:", "LDG R2, R3", "IADD3 R2, R2, R3", "BRA `(.L_x_1)"),
        *(".L_x_2:", "HMMA.16816.F32.BF16 R4, R8, R10, R4", "BRA `(.L_x_2)", "BRA `(.L_x_0)", "EXIT"),
    ]
    found = sass.count("\n".join(line if line.endswith(":") else f"/*0000*/  {line} ;" for line in lines))
    assert (found["instructions"], found["loop_instructions"], found["inner_instructions"]) == (8, 7, 2)
    assert found["inner_mma_flops"] == found["mma_flops"]
    row = found | {"warps": 4}
    copied = Launch("", "", "", "", "", 1, 3, 0, 0, native=Native("products", 4, 0, loop="inner"))
    assert estimate.issued(copied, row, "instructions") == 4 * (8 + 2 * 2)


def test_cuda_kernels_of_a_library(monkeypatch):
    """Names, registers and shared memory from cuobjdump, threads from the launch."""
    usage = "Function second:\n  REG:7 STACK:0 SHARED:0 LOCAL:0\nFunction first:\n  REG:64 STACK:8 SHARED:16 LOCAL:0\n"

    def tool(name, *arguments, folder=None):
        if "-xelf" in arguments:
            for arch in (80, 90):
                (sass.Path(folder) / f"_C.1.sm_{arch}.cubin").write_text("")
        return usage if "--dump-resource-usage" in arguments else LISTING

    monkeypatch.setattr(sass, "tool", tool)
    library = type("_C", (), {"__file__": "_C.so", "cuda_archs": "80,90"})
    monkeypatch.setattr(estimate.native, "load", lambda: (library, ""))
    rows = list(estimate.native_rows(90))
    assert [(row["kernel"], row["registers"], row["stack"], row["shared"]) for row in rows] == [
        ("second", 7, 0, 0),
        ("first", 64, 8, 16),
    ]
    native = Native("first", warps=8, shared=2048)
    mine = Launch("local_implicit", "irs", "", "", "a case", 10, 3, 0, 0, native=native)
    row = estimate.found(mine, rows)
    assert (row["kernel"], row["warps"], row["shared"]) == ("first", 8, 2048)
    assert estimate.issued(mine, row, "instructions") == 10 * 8 * (11 + 4 * 2)
    assert estimate.found(Launch("local_implicit", "irs", "", "", "", 1, 1, 0, 0), rows) is None


def test_occupancy_by_hand():
    a100, _, rtx4090, h200 = estimate.CHIPS
    assert a100.occupancy(255, 16 << 10, 8) == 8  # 8192 registers per warp: eight warps
    assert a100.occupancy(32, 0, 4) == 64
    assert a100.occupancy(40, 0, 4) == 48  # 1280 per warp: 51 warps, twelve blocks
    assert h200.occupancy(66, 16 << 10, 8) == 24  # 66 become 72 registers of 32 threads: 2304 per warp
    assert rtx4090.occupancy(32, 48 << 10, 4) == 8  # 49 KB twice
    assert rtx4090.occupancy(16, 0, 1) == 24  # at most 24 blocks


def test_bounds_by_hand():
    h200 = estimate.CHIPS[-1]
    row = {"instructions": 100, "mma_flops": 1000, "fp32": 10, "mufu": 5, "warps": 4}
    row |= {"loop_instructions": 40, "loop_mma_flops": 1000, "loop_fp32": 10, "loop_mufu": 5}
    one = Launch("", "", "", "", "", programs=1000, trips=11, bytes=4.8e6, flops=2e6)
    times = h200.seconds(one, row)
    assert times["m"] == pytest.approx(1e-6)
    assert times["t"] == pytest.approx(1000 * 4 * 11_000 / 989e12)
    assert times["i"] == pytest.approx(1000 * 4 * 500 / (4 * 132 * 1.98e9))
    assert times["f"] == pytest.approx(1000 * 4 * 110 * 64 / 67e12)
    assert times["e"] == pytest.approx(1000 * 4 * 55 * 32 / (16 * 132 * 1.98e9))
    assert h200.floor(one) == pytest.approx(1e-6)


def test_counts_a_compiled_kernel():
    rows = list(estimate.triton_rows(80, "fourier_unit"))
    product = launch("fourier_unit", "multiply")
    row = estimate.found(product, rows)
    assert row["tensor_cores"]
    assert product.flops <= estimate.issued(product, row, "mma_flops") <= 1.1 * product.flops


def test_the_page_has_every_launch():
    page = estimate.PAGE.read_text()
    assert page.startswith("# Estimated run times of the GPU kernels\n\n**Nothing here is measured")
    for one in launches():
        needed = f"{estimate.amount(one.bytes, 'B')}, {estimate.amount(one.flops, 'FLOP')}".strip(", ")
        assert f"| `{one.name}` | {one.case} | {needed} | " in page, "python -m bench.estimate writes it"
