"""Shared by the tests of checkpoints in the forms in which others publish them."""

import numpy
import torch


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def holds(model, state):
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], value) for name, value in state.items())


class Callback:
    """Of a class that the reader may not know."""

    def __init__(self):
        self.best = numpy.float64(0.5)
