"""The command prove."""

import re

import made_up
import pytest
import torch
from command_line import assert_refused, run
from made_up.functional import OP

from inr_kernels._core import backends, devices, dispatch, proof, verdicts
from inr_kernels._core.proof import processes
from inr_kernels._core.verdicts import Verdict
from inr_kernels.cli import arguments

WRONG = "wrong: output 0 has an error of 1.0e-03"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Runs each test in an empty folder, without verdicts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verdicts, "file", lambda: tmp_path / "verdicts.json")
    yield
    verdicts.reread()


def result(job):
    """What a proof finds: all backends but "right" are wrong."""
    name = job.op, job.backend, job.dtype, job.form
    return Verdict(*name, "", (1e-3, 4e-3), (2e-3, 3e-3)) if job.backend in ("right", "cpu") else Verdict(*name, WRONG)


def test_the_help_names_what_can_be_proven():
    assert {*arguments.OPERATORS} == {*dispatch.OPS}
    assert tuple(proof.DTYPES) == arguments.DTYPES


def test_the_table(capsys, monkeypatch):
    monkeypatch.setattr(processes, "run", result)
    monkeypatch.setattr(OP, "backends", {name: OP.backends[name] for name in ("reference", "right", "wrong")})
    with made_up.installed():
        assert run("prove", "--device", "cpu", "--dtype", "float32", "tf32") == 0
        lines = [line.rstrip().split("  ") for line in capsys.readouterr().out.splitlines()]
        rows = [[word.strip() for word in line if word] for line in lines]
        assert rows[0] == ["operator", "kernel", "dtype", "form", "forward", "backward"]
        times = ["1 ms 2.0×", "4 ms 0.8×"]
        assert rows[1] == ["made_up", "right", "float32", "any", *times, "forward on; backward off: not faster"]
        assert rows[4] == ["made_up", "wrong", "tf32", "any", f"off: {WRONG}"]
        assert rows[6][0] == "2 of 4 on. File: verdicts.json".replace("verdicts.json", str(verdicts.file()))


def test_list_and_forget(capsys, monkeypatch):
    monkeypatch.setattr(processes, "run", result)
    assert run("prove", "--list") == 0
    assert capsys.readouterr().out == "no verdicts are stored\n"
    assert run("prove", "--device", "cpu", "--quick", "--op", "conv3x3", "elementwise_filter") == 0
    capsys.readouterr()
    assert run("prove", "--list", "--op", "conv3x3") == 0
    out = capsys.readouterr().out
    key = devices.find(torch.device("cpu")).key
    assert out.startswith(f"{key}\n\noperator") and "elementwise" not in out
    assert out.count("\nconv3x3") == len(backends.FLOAT_DTYPES)
    assert run("prove", "--forget", "--op", "conv3x3", "--dtype", "float64") == 0
    assert capsys.readouterr().out == "1 verdicts deleted\n"
    assert run("prove", "--forget") == 0
    assert capsys.readouterr().out == f"{len(backends.FLOAT_DTYPES) - 1 + 4} verdicts deleted\n"  # 4 of the filter


def test_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(devices, "gpus", lambda: [])
    assert_refused(capsys, 2, "no GPU; --device cpu proves the kernels of this processor", "prove")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--device", "99"), "argument --device must be 'cpu' or a GPU that torch sees.*; got 99"),
        (("--device", "-1"), "--device: must be a GPU's number, such as 0, or cpu; got -1"),
        (("--device", "foo"), "--device: must be a GPU's number, such as 0, or cpu; got foo"),
        (("--op", "foo"), "--op: invalid choice: 'foo'"),
        (("--list", "--forget"), "--forget: not allowed with argument --list"),
    ],
)
def test_mistakes(capsys, words, message):
    assert_refused(capsys, 2, message, "prove", *words)


def test_what_cannot_be_saved_is_said(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "run", result)
    monkeypatch.setattr(verdicts, "_unsaved", {})
    (tmp_path / "occupied").write_text("")
    monkeypatch.setattr(verdicts, "file", lambda: tmp_path / "occupied" / "verdicts.json")
    assert run("prove", "--device", "cpu", "--quick", "--op", "conv3x3", "--dtype", "float32") == 0
    shown = capsys.readouterr()
    assert "conv3x3" in shown.out and "inr-kernels: verdicts cannot be saved and hold for this process" in shown.err


def test_a_proof_on_this_processor(capsys):
    assert run("prove", "--device", "cpu", "--quick", "--op", "conv3x3", "--dtype", "float32") == 0
    ((verdict,),) = verdicts.stored().values()
    assert verdict.call == ("conv3x3", "float32", "any") and not verdict.reason and verdict.speedups
    run("info")
    # Whether a small backward is faster, too, is decided by the load of the machine.
    proved = r"  cpu        runs; proof: (on in 1 of 1 forms|forward on in [01] of 1 forms, backward in [01])"
    assert re.search(proved, capsys.readouterr().out)
