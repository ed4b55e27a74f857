"""Deprecated alias of `inr_kernels.models.lama.ffc`."""

import warnings

from .lama.ffc import *  # noqa: F403

MESSAGE = "inr_kernels.models.ffc was moved to inr_kernels.models.lama.ffc"
warnings.warn(MESSAGE, DeprecationWarning, stacklevel=2)
