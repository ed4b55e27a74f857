"""Shared by the tests of accelerate's adapters."""

from torch import nn

from inr_kernels import accelerate


def assert_not_accelerated(model, reason, log):
    """accelerate does not change the model and logs the reason in one warning."""
    cls, names = type(model), list(vars(model))
    accelerate(nn.Sequential(model))
    assert type(model) is cls
    assert list(vars(model)) == names
    (record,) = log.records
    assert record.levelname == "WARNING"
    assert reason in record.getMessage()
    assert "at '0' not accelerated: " in record.getMessage()
