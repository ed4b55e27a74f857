"""Whether a module must be called as a module, because it has hooks or an overridden forward."""

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(*modules: nn.Module) -> bool:
    """Whether a module has hooks, or an instance attribute `forward` that overrides its class's."""
    return any("forward" in vars(module) or any(getattr(module, hooks) for hooks in HOOKS) for module in modules)


def is_untouched(*modules: nn.Module) -> bool:
    """Whether the modules' results may be computed without calling them: no hooks, not even global ones."""
    return not (nn.modules.module._has_any_global_hook() or has_hooks(*modules))
