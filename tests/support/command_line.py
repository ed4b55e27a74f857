"""Runs the command inr-kernels in this process."""

import os
import re

from inr_kernels import cli


def run(*words):
    """Runs a command line and returns its exit status."""
    try:
        cli.main([str(word) for word in words])
    except SystemExit as end:
        return end.code
    return 0


def assert_refused(capsys, status, message, *words):
    """The command ends with this status and one line on stderr, and leaves no temporary file."""
    assert run(*words) == status
    out, err = capsys.readouterr()
    assert re.fullmatch(rf"inr-kernels: .*{message}.*\n", err) and not out
    assert not any(path.name.startswith(".") for path in os.scandir("."))
