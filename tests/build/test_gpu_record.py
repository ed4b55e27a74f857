"""bench/gpu_record.sh and the modules it uses, as far as they run without a GPU."""

import ast
import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_limits import unless_refused
from test_compile_only import KERNELS
from triton.runtime.interpreter import InterpretedFunction

from bench import one_call, op_modules, preflight, report, timing
from inr_kernels.cli import ceilings

ROOT = Path(__file__).parents[2]
MARK = re.compile(r"^(@|pytestmark = )pytest\.mark\.gpu", re.MULTILINE)
ON_A_GPU = [path for path in ROOT.glob("tests/*/test_*.py") if MARK.search(path.read_text())]


def record(*arguments, PYTHON=sys.executable, **environment):
    command = ["bash", ROOT / "bench" / "gpu_record.sh", *arguments]
    # Without pytest-xdist's variables, from which pytest-benchmark would conclude that it runs in parallel.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = inherited | {"PYTHON": PYTHON, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


STEPS = ["bench", "check-elementwise_filter", "first-elementwise_filter", "prove", "tests"]


def test_the_script_runs_to_its_end(tmp_path):
    """And a second call on the same folder repeats nothing."""
    out = tmp_path / "out"
    done = record("--smoke", out, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    *_, header, line = done.stdout.splitlines()
    assert header.split() == ["op", "shape", "dtype", "ours", "eager", "compile", "peer", "of", "ceiling"]
    assert line.split()[:2] == ["fourier_unit", "Fourier"]
    assert sorted(path.stem for path in (out / "logs").iterdir()) == STEPS
    results = {path.name for path in out.iterdir()} - {"logs", "table.txt", "verdicts.json"}
    assert len(results) == 1 and json.loads((out / results.pop()).read_text())["rows"]
    assert json.loads((out / "verdicts.json").read_text())["verdicts"]
    assert (out / "table.txt").read_text().splitlines() == [header, line]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    again = record("--smoke", out, TMPDIR=str(tmp_path))
    assert again.returncode == 0
    assert sorted(again.stdout.split()) == sorted([*STEPS, *["kept"] * len(STEPS)])


def test_a_failing_step_does_not_stop_the_others(tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\ncase $1 in */preflight.py) exit 0;; esac\nexit 1\n")
    fake.chmod(0o755)
    done = record("--smoke", tmp_path / "out", PYTHON=str(fake))
    assert done.returncode == 1
    failed = [line.split()[1:3] for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert sorted(failed) == [[step, "(1),"] for step in STEPS]
    assert sorted(done.stdout.splitlines()[-1].removeprefix("failed steps: ").split()) == STEPS


@pytest.fixture
def gpu_machine(tmp_path):
    """gpu_machine(*arguments) -> the process, and the commands that it ran.

    PYTHON, cmake and compute-sanitizer are scripts that only record their arguments, and succeed, also when asked
    whether there is a GPU.
    """
    calls = tmp_path / "calls"
    tools = {
        "python": f'echo "$@" >>{calls}',
        "cmake": f'echo "cmake $@" >>{calls}; [ "$1" = --build ] && : >"$2/_C.fake.so" || mkdir -p "$4"',
        "compute-sanitizer": 'shift 4; exec "$@"',
    }
    for name, text in tools.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def run(*arguments):
        calls.write_text("")
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
        return record(*arguments, PYTHON=str(tmp_path / "python"), **environment), calls.read_text().splitlines()

    return run


def test_commands_on_a_machine_with_a_gpu(tmp_path, gpu_machine):
    done, asked = gpu_machine(tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(call.startswith("cmake --build") for call in asked) == 1
    order = [
        next(i for i, call in enumerate(asked) if text in call) for text in ("cmake", "prove --missing", "-m pytest")
    ]
    assert order == sorted(order)
    for op in op_modules():
        assert asked.count(f"-m bench.one_call {op}") == 1
        assert asked.count(f"-m bench.one_call {op} --small") == 2
        assert sum("tests/ops/test_on_gpu.py" in call and op in call for call in asked) == 3
    for path in ROOT.glob("bench/bench_*.py"):
        calls = [call for call in asked if f"bench/{path.name}" in call]
        assert len(calls) == 2 or (len(calls) == 1 and "compile" not in path.read_text())
    assert not [path for path in ON_A_GPU if not any(str(path.relative_to(ROOT)) in call for call in asked)]
    assert not [call for call in asked if "--results" in call]  # the results would contain its path
    # Calls on a machine that has forgotten everything but OUT repeat the build alone.
    (tree,) = tmp_path.glob("inr_kernels_record_*")
    shutil.rmtree(tree)
    done, asked = gpu_machine(tmp_path / "out")
    assert done.returncode == 0
    assert sum(call.startswith("cmake --build") for call in asked) == 1
    assert not [call for call in asked if "-m pytest" in call or "prove --missing" in call or "bench.one_call" in call]


def test_chosen_parts(tmp_path, gpu_machine):
    """A part builds the package first if this machine has no build of it."""
    done, asked = gpu_machine("--only", "prove", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[1].rstrip(",") for line in done.stdout.splitlines()] == ["build", "prove"]
    done, asked = gpu_machine("--only", "tests,prove", "--limit", "0", tmp_path / "out")
    assert "cmake" not in " ".join(asked) and "-m pytest" not in " ".join(asked)
    steps = [line.split()[:2] for line in done.stdout.splitlines() if line.split()[0] in ("kept", "STOPPED")]
    assert steps[0] == ["kept", "prove"] and ["STOPPED", "tests-models"] in steps[1:]
    assert done.returncode == 1  # what was stopped is not done


def test_races_are_reported_and_do_not_count(tmp_path, gpu_machine):
    (tmp_path / "compute-sanitizer").write_text('#!/bin/sh\n[ "$2" = memcheck ]\n')
    done, _ = gpu_machine("--only", "tests", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("FAILED  racecheck-") == done.stdout.count("(reported, not counted)") == len(op_modules())


def test_what_is_missing_is_named_at_once(monkeypatch, capsys):
    there = {"torch", "triton", "cmake", "c++", "pillow", "safetensors", "tqdm", "platformdirs", "filelock", "pytest"}
    monkeypatch.setattr(preflight, "is_there", lambda need: need.name in there)
    assert preflight.main(list(preflight.PARTS)) == 2
    *missing, command = capsys.readouterr().out.splitlines()
    names = [re.match(r"MISSING (\S+).*, (needed|optional): ", line).groups() for line in missing]
    assert names == [
        ("numpy", "needed"), ("pytest-benchmark", "needed"), ("nvcc", "optional"), ("compute-sanitizer", "optional"),
        ("matplotlib", "optional"),
    ]  # fmt: skip
    assert command == "to install what is needed: pip install 'numpy' 'pytest-benchmark'"
    there |= {"numpy"}
    assert preflight.main(["build", "prove"]) == 0  # goes on without nvcc


def test_preflight_knows_the_packages_requirements():
    text = (ROOT / "pyproject.toml").read_text()
    required = re.findall(r'"([a-z]+)', re.search(r"^dependencies = \[(.*?)^\]", text, re.S | re.M)[1])
    prove = {need.name for need in preflight.NEEDS if "prove" in need.parts}
    assert prove == {name for name in required if name != "sys"}


def test_versions_and_tools(monkeypatch):
    assert preflight.is_there(preflight.Need("pytest", (), at_least=8))
    assert not preflight.is_there(preflight.Need("pytest", (), at_least=1000))
    assert not preflight.is_there(preflight.Need("no-such-package", ()))
    assert preflight.is_there(preflight.Need("sh", (), tool=True))
    assert not preflight.is_there(preflight.Need("no-such-tool", (), tool=True))


def test_where_pybind11_is(monkeypatch):
    """Without the package, torch's copy of its headers."""
    installed = preflight.pybind11()
    assert Path(installed.removeprefix("-Dpybind11_DIR="), "pybind11Config.cmake").exists()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pybind11" else find(name))
    headers = preflight.pybind11().removeprefix("-DINR_PYBIND11_INCLUDE=")
    assert Path(headers, "pybind11/pybind11.h").exists()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert preflight.pybind11() == ""


def test_error_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = record(tmp_path / "out")
    assert done.returncode == 2
    assert "torch.cuda sees no GPU" in done.stderr
    assert not (tmp_path / "out").exists()
    assert record().returncode == 2


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--smoke", "--out"], ["a", "b"], ["--only", "all", "a"], ["--limit", "1h", "a"]]
)
def test_usage(arguments):
    done = record(*arguments)
    assert done.returncode == 2
    assert "gpu_record.sh --smoke OUT" in done.stderr
    assert "unrecognized" not in done.stderr + done.stdout


ROW = {"op": "an_op", "case": "8 x 8", "dtype": "float32", "seconds": 2e-3, "of_peak": 0.25, "run": "r"}
RESULT = {
    "machine": {"name": "some GPU", "driver": "1"},
    "rows": [
        ROW | {"implementation": "eager"},
        ROW | {"implementation": "ours", "seconds": 1e-3, "of_peak": 0.5, "graph_seconds": 4e-6, "cold_seconds": 9e-4},
        ROW | {"implementation": "ours graphed", "seconds": 5e-4, "of_copy": 0.99},
        ROW | {"implementation": "compile", "seconds": None, "error": "RuntimeError: no"},
        ROW | {"implementation": "eager bf16", "dtype": "bfloat16", "seconds": None},
        ROW | {"implementation": "natten bf16", "dtype": "bfloat16", "seconds": 3.0},
        ROW | {"implementation": "ours bf16", "dtype": "bfloat16", "graph_seconds": 4e-6, "cold_seconds": 9e-4},
        ROW | {"implementation": "ours", "case": "9 x 9", "seconds": None},
    ],
}
TABLE = """\
op     shape  dtype     ours                             eager          compile  peer    of ceiling
an_op  8 x 8  float32   0.5 ms graphed                   2 ms           failed           99%
an_op  8 x 8  bfloat16  2 ms (graph 4 µs, cold 0.9 ms)  out of memory           3.00 s natten  25%
an_op  9 x 9  float32   out of memory"""


def test_the_table(tmp_path, capsys, monkeypatch):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(RESULT))
    monkeypatch.setattr(sys, "argv", ["report", str(path)])
    report.main()
    shown = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    expected = [line.split("  ") for line in TABLE.splitlines()]
    assert [[cell.strip() for cell in line if cell.strip()] for line in shown] == [
        [cell.strip() for cell in line if cell.strip()] for line in expected
    ]


@pytest.mark.parametrize("op", op_modules())
def test_a_small_call_runs_every_kernel(op, monkeypatch, capsys):
    """So that compute-sanitizer checks all of them."""
    launched = set()

    def record_launch(self, grid):
        launched.add(self.fn.__name__)
        return launch(self, grid)

    launch = InterpretedFunction.__getitem__
    monkeypatch.setattr(InterpretedFunction, "__getitem__", record_launch)
    monkeypatch.setattr(sys, "argv", ["one_call", op, "--small", "--backend", "triton"])
    one_call.main()
    assert launched == KERNELS[op]
    assert capsys.readouterr().out.startswith(f"{op} (triton on cpu): import ")


def test_a_small_call_is_wide_enough_for_hopper():
    """Of the CUDA kernels it runs those with mma and those with wgmma, with the ensemble first and last."""
    weights = [leaves[1::2] for _, leaves in op_modules()["local_implicit"].first_calls(small=True)]
    halves = [of_layers for of_layers in weights if of_layers[0].dtype == torch.float16]
    wgmma = [max(map(len, of_layers[:-1])) > 128 for of_layers in halves]
    assert sorted(wgmma) == [False, False, True, True]


@pytest.mark.parametrize("file", ON_A_GPU, ids=lambda path: path.stem)
def test_gpu_tests_need_few_packages(file):
    """The package's own requirements and pytest: a GPU machine may have no network."""
    tree = ast.walk(ast.parse(file.read_text()))
    names = [alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    ours = {path.stem for path in ROOT.glob("tests/*/*.py")} | {"inr_kernels", "bench"}
    others = {name.split(".")[0] for name in names} - sys.stdlib_module_names - ours
    assert others <= {"torch", "triton", "numpy", "pytest"}


class Event:
    """Replaces torch.cuda.Event: a clock that `tick` advances by a millisecond."""

    clock = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.clock

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return float(end.at - self.at)


@pytest.fixture
def fake_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    flushed = torch.zeros(1)
    monkeypatch.setattr(timing, "_flush_buffer", lambda: flushed)


def tick():
    Event.clock += 1


def test_times_on_a_gpu(fake_cuda, monkeypatch):
    assert timing.figures(tick) == {"seconds": 1e-3, "spread": 0.0, "rounds": 200}
    monkeypatch.setattr(timing, "record", lambda run: tick)
    assert timing.figures(tick, small=True).keys() >= {"cold_seconds", "graph_seconds"}

    def refuse(run):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(timing, "record", refuse)
    assert "graph_seconds" not in timing.figures(tick, small=True)
    assert ceilings.best_seconds(tick, "cuda") == 1e-3


def test_the_rates_of_arithmetic():
    """The peak is that of the faster of the multiply-add units and the matrix product."""
    units = ceilings.multiply_add_flops(torch.float32, steps=1000)
    assert units > 0 and ceilings.multiply_add_flops(torch.float16) == 0
    assert ceilings.peak_flops("cpu", torch.float32, 64) > 0


def test_slow_calls_are_timed_a_few_times(fake_cuda):
    def slow():
        Event.clock += 500

    assert timing.figures(slow)["rounds"] == 5


def test_only_a_documented_limit_may_be_refused():
    refused = "backend 'cuda' cannot run local_implicit: "
    with unless_refused():
        raise RuntimeError(refused + "it takes bfloat16 and float16; got float32")
    for reason in ("inr_kernels._C was built without CUDA", "it was compiled for sm_80; this GPU has 9.0"):
        with pytest.raises(RuntimeError, match=reason[:20]), unless_refused():
            raise RuntimeError(refused + reason)
