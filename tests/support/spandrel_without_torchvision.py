"""Imports spandrel where torchvision is not installed: two of its architectures import names that are not called here.

Only while it is imported is there a stand-in for torchvision, so that other packages do not find it.
"""

import sys
from types import ModuleType

NAMES = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")

try:
    import torchvision  # noqa: F401
except ImportError:
    stand_ins = {name: ModuleType(name) for name in NAMES}
    for name in ("InterpolationMode", "normalize", "rotate"):
        setattr(stand_ins[NAMES[-1]], name, None)
    sys.modules.update(stand_ins)
    try:
        import spandrel  # noqa: F401
    finally:
        for name in NAMES:
            del sys.modules[name]
