"""`inr-kernels train` in several processes, and in bfloat16."""

import subprocess
import sys

import pytest
import torch
from training_cases import ADVERSARIAL, curve, photographs_in, words

from inr_kernels import cli
from inr_kernels.models import from_checkpoint

COMMAND = [sys.executable, "-m", "inr_kernels"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "inr_kernels"]
# Without batch norm and hint, whose statistics are each process's.
NORMS = "model.norm=none model.encoder=strided loss.hint=0 precision=32-true"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return photographs_in(tmp_path_factory.mktemp("photos"))


def run(command, arguments):
    """Runs a command line in processes of its own; returns its standard output."""
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def one(photos, tmp_path_factory):
    """The curve of one process."""
    out = tmp_path_factory.mktemp("one") / "run"
    run(COMMAND, words("in2", photos, out, ADVERSARIAL, NORMS))
    return curve(out)


@pytest.mark.alone
@pytest.mark.parametrize("command", [COMMAND, TORCHRUN], ids=["devices", "torchrun"])
def test_two_processes_give_the_curve_of_one(command, one, photos, tmp_path):
    """Over gloo, at the same batch."""
    out = tmp_path / "run"
    assert run(command, words("in2", photos, out, ADVERSARIAL, NORMS, "devices=2")) == f"{out / 'model.safetensors'}\n"
    two = curve(out)
    assert one.keys() == two.keys() and len(one["loss/l1"]) == 3
    for name, values in one.items():
        assert [value for _, value in two[name]] == pytest.approx([value for _, value in values], rel=1e-3), name


@pytest.mark.parametrize("name", ["in2", "dear", "liif"])
def test_bfloat16(name, photos, tmp_path):
    """Where the recipe uses autocast, but for the last steps; the parameters stay in float32."""
    curves = {}
    for case, more in {"float32": "32-true", "bf16": "bf16-mixed", "end": "bf16-mixed float32_end=1"}.items():
        cli.main(words(name, photos, tmp_path / case, "float32_end=0", f"precision={more}"))
        curves[case] = curve(tmp_path / case)
    term = "loss/l1" if "loss/l1" in curves["bf16"] else "loss/l2"
    exact, rounded, same = ([value for _, value in curves[case][term]] for case in ("float32", "bf16", "end"))
    assert same == exact and rounded != exact and rounded == pytest.approx(exact, rel=0.05)
    model = from_checkpoint(tmp_path / "bf16" / "model.safetensors")
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
