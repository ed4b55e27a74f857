"""Whether a module's own call is more than its class's forward, and so must happen."""

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(*modules):
    """Whether a call of these is more than their classes' forward."""
    return any("forward" in vars(module) or any(getattr(module, hooks) for hooks in HOOKS) for module in modules)


def is_untouched(*modules):
    """Whether what they compute may be computed without calling them: hooks on all modules count too."""
    return not (nn.modules.module._has_any_global_hook() or has_hooks(*modules))
