"""Which refusals of a backend the tests on a GPU accept."""

import contextlib
import re

LIMIT = re.compile(r"cannot run \w+: (it takes (?!CUDA tensors)|NATTEN )")


@contextlib.contextmanager
def unless_refused():
    """Ends the block where a backend refuses the arguments for a documented limit, e.g. of its dtypes or shapes.

    Any other refusal, e.g. by a backend that was not built, or not for this GPU, is raised.
    """
    try:
        yield
    except RuntimeError as error:
        if not LIMIT.search(str(error)):
            raise
