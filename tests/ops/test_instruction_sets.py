"""Every build of the C++ kernels that this processor can run; for the others, the generic one."""

import instruction_sets
import native_tests
import pytest


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512bf16", "amx"])
def test_every_op(isa, run_python, expected_isa):
    code = "import instruction_sets; instruction_sets.main()"
    assert run_python(code, INR_KERNELS_ISA=isa, OMP_NUM_THREADS="1").strip() == expected_isa(isa)


def test_no_op_is_missing():
    assert {cases.__name__.removesuffix("_cases") for cases, *_ in instruction_sets.PROBLEMS} == {*native_tests.OPS}
