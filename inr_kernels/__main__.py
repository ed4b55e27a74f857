"""Runs the command inr-kernels: `python -m inr_kernels`."""

from .cli import main

if __name__ == "__main__":
    main()
