"""bench/gpu_record.sh and the modules it uses, as far as they run without a GPU."""

import ast
import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_limits import unless_refused
from test_compile_only import KERNELS
from triton.runtime.interpreter import InterpretedFunction

from bench import one_call, op_modules, report, timing
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


def test_the_script_runs_to_its_end(tmp_path):
    out = tmp_path / "out"
    done = record("--smoke", out)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, header, line = done.stdout.splitlines()
    assert header.split() == ["op", "shape", "dtype", "ours", "eager", "compile", "peer", "of", "ceiling"]
    assert line.split()[:2] == ["fourier_unit", "Fourier"]
    logs = re.findall(r"^==> (.*)\.log <==$", (out / "record.log").read_text(), re.MULTILINE)
    assert logs == ["bench", "check-elementwise_filter", "first-elementwise_filter", "tests"]
    assert len(list(out.glob("[!.]*"))) == 3
    assert json.loads(next(out.glob("*.json")).read_text())["rows"]
    assert (out / "table.txt").read_text().splitlines() == [header, line]


def test_a_failing_part_does_not_stop_the_others(tmp_path):
    done = record("--smoke", tmp_path, PYTHON="false")
    assert done.returncode == 1
    parts = ["first-elementwise_filter", "tests", "check-elementwise_filter", "bench"]
    failed = [line.split()[:3] for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert failed == [["FAILED", part, "(1),"] for part in parts]
    assert done.stdout.splitlines()[-1] == "failed parts: " + " ".join(sorted(parts)) + " "


def test_commands_on_a_machine_with_a_gpu(tmp_path):
    """PYTHON is a script that only records its arguments, and succeeds, also when asked whether there is a GPU."""
    fake, calls = tmp_path / "python", tmp_path / "calls"
    fake.write_text(f'#!/bin/sh\necho "$@" >>{calls}\n')
    fake.chmod(0o755)
    (tmp_path / "compute-sanitizer").write_text('#!/bin/sh\nshift 4\nexec "$@"\n')
    (tmp_path / "compute-sanitizer").chmod(0o755)
    done = record(tmp_path / "out", PYTHON=str(fake), PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stdout + done.stderr
    asked = calls.read_text().splitlines()
    assert sum("-m pip install --no-index --no-build-isolation --no-deps -e ." in call for call in asked) == 1
    for op in op_modules():
        assert asked.count(f"-m bench.one_call {op}") == 1
        assert asked.count(f"-m bench.one_call {op} --small") == 2
        assert sum("tests/ops/test_on_gpu.py" in call and op in call for call in asked) == 3
    for path in ROOT.glob("bench/bench_*.py"):
        calls = [call for call in asked if f"bench/{path.name}" in call]
        assert len(calls) == 2 or (len(calls) == 1 and "compile" not in path.read_text())
    assert not [path for path in ON_A_GPU if not any(str(path.relative_to(ROOT)) in call for call in asked)]
    assert not [call for call in asked if "--results" in call]  # the results would contain its path


def test_error_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = record(tmp_path / "out")
    assert done.returncode == 2
    assert "torch.cuda sees no GPU" in done.stderr
    assert not (tmp_path / "out").exists()
    assert record().returncode == 2


@pytest.mark.parametrize("arguments", [["--help"], ["--smoke", "--out"], ["a", "b"]])
def test_usage(arguments):
    done = record(*arguments)
    assert done.returncode == 2
    assert "gpu_record.sh --smoke OUT" in done.stderr
    assert "unrecognized" not in done.stderr + done.stdout


ROW = {"op": "an_op", "case": "8 x 8", "dtype": "float32", "seconds": 2e-3, "of_gemm": 0.25, "run": "r"}
RESULT = {
    "machine": {"name": "some GPU", "driver": "1"},
    "rows": [
        ROW | {"implementation": "eager"},
        ROW | {"implementation": "ours", "seconds": 1e-3, "of_gemm": 0.5, "graph_seconds": 4e-6, "cold_seconds": 9e-4},
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
an_op  8 x 8  bfloat16  2 ms (graph 4 µs, cold 0.9 ms)  out of memory           3.00 s  25%
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
