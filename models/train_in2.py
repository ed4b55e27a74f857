"""Deprecated alias of `inr_kernels.models.training.in2`."""

import warnings

from .training.in2 import *  # noqa: F403
from .training.in2 import main

MESSAGE = "inr_kernels.models.train_in2 was moved to inr_kernels.models.training.in2"
warnings.warn(MESSAGE, DeprecationWarning, stacklevel=1 if __name__ == "__main__" else 2)

if __name__ == "__main__":
    main()
