"""Module paths of older releases still work, with a DeprecationWarning."""

import importlib
import runpy
import sys

import pytest

from inr_kernels.models.lama.ffc import FFC

MOVED = {f"train_{name}": f"training.{name}" for name in ("liif", "dear", "in2")} | {"ffc": "lama.ffc"}


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_import(old, new):
    sys.modules.pop(f"inr_kernels.models.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"inr_kernels.models.{old} was moved to inr_kernels.models.{new}"):
        module = importlib.import_module(f"inr_kernels.models.{old}")
    current = importlib.import_module(f"inr_kernels.models.{new}")
    assert (module.FFC is FFC) if old == "ffc" else (module.main is current.main and module.train is current.train)


@pytest.mark.parametrize("name", ["liif", "dear", "in2"])
def test_run(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "--help"])
    sys.modules.pop(f"inr_kernels.models.train_{name}", None)
    with pytest.warns(DeprecationWarning, match="was moved to"), pytest.raises(SystemExit, match="0"):
        runpy.run_module(f"inr_kernels.models.train_{name}", run_name="__main__")
    assert "--resume" in capsys.readouterr().out
