"""`python -m aarch64 [pytest arguments]` runs the numeric tests of the C++ kernels on aarch64."""

import os
import sys

import native_tests

# A new process, in which conftest.py is imported before inr_kernels.
command = [sys.executable, "-m", "pytest", "-p", "aarch64.remote", *native_tests.arguments(), *sys.argv[1:]]
os.execv(sys.executable, command)
