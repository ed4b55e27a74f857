"""`python -m inr_kernels` is the command inr-kernels."""

from .cli import main

main()
