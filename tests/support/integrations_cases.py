"""What the tests of accelerate's adapters share."""

from torch import nn

from inr_kernels import accelerate


def assert_left_alone(model, reason, log):
    """accelerate changes nothing of the model and gives the reason in one warning."""
    cls, names = type(model), list(vars(model))
    accelerate(nn.Sequential(model))
    assert type(model) is cls
    assert list(vars(model)) == names
    (record,) = log.records
    assert record.levelname == "WARNING"
    assert reason in record.getMessage()
    assert "at '0' left alone: " in record.getMessage()
