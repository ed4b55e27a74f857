"""Deprecated alias of `inr_kernels.models.training.liif`."""

import warnings

from .training.liif import *  # noqa: F403
from .training.liif import main

MESSAGE = "inr_kernels.models.train_liif was moved to inr_kernels.models.training.liif"
warnings.warn(MESSAGE, DeprecationWarning, stacklevel=1 if __name__ == "__main__" else 2)

if __name__ == "__main__":
    main()
