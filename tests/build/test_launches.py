"""The launches of the Triton kernels, without a GPU: through Triton's own launcher, over a stand-in for the driver.

Those of an op run again where its files have changed, see `if_changed`.
"""

import itertools
import json
import os
import subprocess
import sys

import launch_triton
import pytest
import triton
from compile_triton import TRITON_OPS
from test_compile_only import ARCHS, KERNELS, OLDEST, ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def launch(built_once, tmp_path_factory):
    """launch(arch, *options, triton=None) -> the rows that `launch_triton.py` prints; triton: a folder with another."""

    def run(arch, *options, triton=None):
        folder = built_once("stub_driver", launch_triton.build)
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        path = [str(triton)] if triton else []
        environment["PYTHONPATH"] = os.pathsep.join([*path, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment["LD_LIBRARY_PATH"] = str(folder)
        # Not the user's: kernels are compiled in part, and each run is to compile what it launches.
        environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
        command = [sys.executable, ROOT / "tests/support/launch_triton.py", str(arch), folder, *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        print(done.stdout)
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def with_parts(ops):
    """The ops, and local_texture after local_implicit, whose kernels it uses."""
    return [name for op in ops for name in ([op, "local_texture"] if op == "local_implicit" else [op])]


def files(op):
    """Patterns of the files that an op's launches depend on."""
    ours = [f"inr_kernels/{op}/**/*.py", "inr_kernels/_core/backends.py", "inr_kernels/_core/registration.py"]
    cases = [f"{name}_cases.py" for name in with_parts([op])]
    support = [f"tests/support/{name}" for name in ("launch_triton.py", "compile_triton.py", "stub_driver/*", *cases)]
    return [*ours, *support, "tests/ops/test_on_gpu.py", "tests/build/test_launches.py"]


PARTS = {op: files(op) for op in TRITON_OPS}


def assert_all_arrive(rows, ops):
    assert not [error for row in rows for error in row["errors"]]
    assert {row["op"] for row in rows} == {*with_parts(ops)}
    for row in rows:
        launched = {name for name, count in row["launches"].items() if count}
        assert row["cases"] and launched <= KERNELS.get(row["op"], KERNELS["local_implicit"])


@pytest.mark.parametrize("version", [OLDEST, "installed"])
def test_every_problem_of_the_gpu_tests_reaches_the_driver(version, launch, if_changed, request):
    """With the compiler's front end; with the oldest Triton, each launcher of which is compiled, in one dtype."""
    old = version == OLDEST

    def run(ops):
        folder = request.getfixturevalue("oldest_triton") if old else None
        rows = launch(89, "--ops", *with_parts(ops), *["--dtypes", "bfloat16"] * old, triton=folder)
        assert_all_arrive(rows, ops)
        launched = {row["op"]: set(row["launches"]) for row in rows}
        if "local_texture" in launched:
            launched["local_implicit"] |= launched.pop("local_texture")
        assert launched == {op: KERNELS[op] for op in ops}

    if_changed(run, PARTS, OLDEST if old else triton.__version__)


def pytest_generate_tests(metafunc):
    """`chip` and `op`: with --whole-launches, of every version of Triton, to be selected by -k; else a quick one."""
    if "chip" in metafunc.fixturenames:
        every = [*itertools.product([OLDEST, "installed"], ARCHS, TRITON_OPS)]
        whole = metafunc.config.getoption("whole_launches")
        metafunc.parametrize(("version", "chip", "op"), every if whole else [("installed", 90, "fourier_unit")])


def test_every_kernel_of_every_problem_compiles(version, chip, op, launch, if_changed, request):
    def run(ops):
        folder = request.getfixturevalue("oldest_triton") if version == OLDEST else None
        assert_all_arrive(launch(chip, "--whole", "--ops", *with_parts(ops), triton=folder), ops)

    if request.config.getoption("whole_launches"):
        run([op])
    else:
        if_changed(run, {op: PARTS[op]}, triton.__version__)


def test_unmask_attentions_backward_compiles_with_the_oldest_triton(launch, if_changed, request):
    """Its compiler fails for sm_90 where a program of the backward in half precision takes 64 rows."""

    def run(ops):
        oldest = request.getfixturevalue("oldest_triton")
        (row,) = launch(90, "--whole", "--ops", *ops, "--dtypes", "bfloat16", triton=oldest)
        assert not row["errors"]
        assert row["launches"]["attend_backward"] == row["cases"] > 5

    if_changed(run, {"unmask_attention": PARTS["unmask_attention"]}, OLDEST)


def test_more_images_than_the_second_axis_of_a_grid_takes(launch, if_changed):
    def run(ops):
        rows = launch(90, "--large", "--ops", *with_parts(ops))
        assert_all_arrive(rows, ops)
        assert all(row["cases"] == 3 for row in rows)

    if_changed(run, PARTS, triton.__version__)


def test_what_a_driver_refuses(launch):
    (errors,) = launch(89, "--refused")
    assert "too large a grid" in errors["(1, 70000)"] and "too large a grid" in errors["(1, 1, 70000)"]
    assert "did not arrive" in errors["(65536, 65535)"]  # Triton's launcher multiplies in 32 bits: this one is left out
    assert "out of resource: shared memory" in errors["shared memory"]
