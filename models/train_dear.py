"""Deprecated alias of `inr_kernels.models.training.dear`."""

import warnings

from .training.dear import *  # noqa: F403
from .training.dear import main

MESSAGE = "inr_kernels.models.train_dear was moved to inr_kernels.models.training.dear"
warnings.warn(MESSAGE, DeprecationWarning, stacklevel=1 if __name__ == "__main__" else 2)

if __name__ == "__main__":
    main()
