"""The launches of the Triton kernels, without a GPU: through Triton's own launcher, over a stand-in for the driver."""

import json
import os
import subprocess
import sys

import launch_triton
import pytest
from compile_triton import TRITON_OPS
from test_compile_only import ARCHS, KERNELS, OLDEST, ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def launch(built_once, tmp_path_factory):
    """launch(arch, *options, triton=None) -> the rows that `launch_triton.py` prints; triton: a folder with another."""
    folder = built_once("stub_driver", launch_triton.build)

    def run(arch, *options, triton=None):
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


def assert_all_arrive(rows):
    assert not [error for row in rows for error in row["errors"]]
    assert {row["op"] for row in rows} == {*TRITON_OPS, "local_texture"}
    for row in rows:
        launched = {name for name, count in row["launches"].items() if count}
        assert row["cases"] and launched <= KERNELS.get(row["op"], KERNELS["local_implicit"])


@pytest.mark.parametrize("version", [OLDEST, "installed"])
def test_every_problem_of_the_gpu_tests_reaches_the_driver(version, launch, request):
    """With the compiler's front end; with the oldest Triton, each launcher of which is compiled, in one dtype."""
    old = version == OLDEST
    triton = request.getfixturevalue("oldest_triton") if old else None
    rows = launch(89, *["--dtypes", "bfloat16"] * old, triton=triton)
    assert_all_arrive(rows)
    launched = {row["op"]: set(row["launches"]) for row in rows}
    launched["local_implicit"] |= launched.pop("local_texture")
    assert launched == KERNELS


def test_every_kernel_of_every_problem_compiles(launch, request):
    """With `pytest --whole-launches` for every chip and version of Triton; else one operator, which is quick."""
    if request.config.getoption("whole_launches"):
        for triton in (None, request.getfixturevalue("oldest_triton")):
            for arch in ARCHS:
                assert_all_arrive(launch(arch, "--whole", triton=triton))
    rows = launch(90, "--whole", "--ops", "fourier_unit")
    assert rows[0]["launches"]["multiply"] and not rows[0]["errors"]


def test_unmask_attentions_backward_compiles_with_the_oldest_triton(launch, oldest_triton):
    """Its compiler fails for sm_90 where a program of the backward in half precision takes 64 rows."""
    (row,) = launch(90, "--whole", "--ops", "unmask_attention", "--dtypes", "bfloat16", triton=oldest_triton)
    assert not row["errors"]
    assert row["launches"]["attend_backward"] == row["cases"] > 5


def test_more_images_than_the_second_axis_of_a_grid_takes(launch):
    rows = launch(90, "--large")
    assert_all_arrive(rows)
    assert all(row["cases"] == 3 for row in rows)


def test_what_a_driver_refuses(launch):
    (errors,) = launch(89, "--refused")
    assert "too large a grid" in errors["(1, 70000)"] and "too large a grid" in errors["(1, 1, 70000)"]
    assert "did not arrive" in errors["(65536, 65535)"]  # Triton's launcher multiplies in 32 bits: this one is left out
    assert "out of resource: shared memory" in errors["shared memory"]
