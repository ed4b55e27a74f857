"""Module paths and keywords of older releases still work, with a DeprecationWarning."""

import importlib
import sys

import pytest

from inr_kernels.models import DEAR, IN2, DEARConfig, ImplicitPyramidDecoder, ImplicitUpsample, IN2Config

MOVED = {"ffc": "lama.ffc"}
DEAR_CONFIG = DEARConfig(channels=8, features=4, blocks=1, filter_blocks=1, hidden=(8, 8))
WITH_EAGER = {
    "DEAR": lambda **options: DEAR(DEAR_CONFIG, **options),
    "IN2": lambda **options: IN2(IN2Config(channels=(16, 16), groups=1, blocks=1, hidden=(8, 8)), **options),
    "ImplicitUpsample": lambda **options: ImplicitUpsample(4, 4, (8,), **options),
    "ImplicitPyramidDecoder": lambda **options: ImplicitPyramidDecoder((4, 4), hidden=(8,), **options).layers[0],
}


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_import_of_a_moved_module(old, new):
    sys.modules.pop(f"inr_kernels.models.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"inr_kernels.models.{old} was moved to inr_kernels.models.{new}"):
        module = importlib.import_module(f"inr_kernels.models.{old}")
    assert module is importlib.import_module(f"inr_kernels.models.{new}")


@pytest.mark.parametrize("name", WITH_EAGER)
def test_reference_is_an_alias_of_eager(name):
    for value in (True, False):
        with pytest.warns(DeprecationWarning, match="reference= was renamed to eager="):
            assert WITH_EAGER[name](reference=value).eager is value
    assert WITH_EAGER[name](eager=True).eager
