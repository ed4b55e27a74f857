"""Puts this package's versions of NATTEN's functions under the name `natten`, for code that cannot be edited."""

import importlib.machinery
import importlib.metadata
import sys
import types
from collections.abc import Callable
from email.message import Message
from typing import Any

import torch

from inr_kernels._core.checks import require

from . import fused, modules, unfused

VERSIONS = {"0.14": "0.14.6", "0.15": "0.15.1", "0.17": "0.17.5", "0.20": "0.20.1", "0.21": "0.21.7"}
# Functions that set or read how NATTEN computes, and what the latter return: there is nothing to choose here.
SETTERS = [
    *("use_deterministic_algorithms", "use_kv_parallelism_in_fused_na", "set_memory_usage_preference"),
    *("allow_flex_compile", "allow_flex_compile_backprop", "disable_flex_compile", "disable_flex_compile_backprop"),
    *("use_fna", "use_fused_na", "use_autotuner", "disable_autotuner", "use_gemm_na", "use_tiled_na"),
    *("use_tf32_in_gemm_na", "use_flex_attention", "force_flex_attention", "enable_tf32", "disable_tf32"),
    *("enable_gemm_na", "disable_gemm_na", "enable_tiled_na", "disable_tiled_na"),
]
GETTERS = {
    **dict.fromkeys(("has_half", "has_bfloat", "has_gemm", "has_fna", "has_fused_na"), True),
    **dict.fromkeys(("has_tf32_gemm", "has_fp32_gemm", "has_fp64_gemm", "is_fna_enabled", "is_fused_na_enabled"), True),
    **dict.fromkeys(("are_deterministic_algorithms_enabled", "is_memory_usage_default"), True),
    **dict.fromkeys(("is_kv_parallelism_in_fused_na_enabled", "is_memory_usage_strict"), False),
    **dict.fromkeys(("is_memory_usage_unrestricted", "is_flex_compile_allowed", "is_autotuner_enabled"), False),
    "is_flex_compile_backprop_allowed": False,
    "get_memory_usage_preference": "default",
}
SUBMODULES = "functional", "modules", "natten1d", "natten2d", "natten3d"


def install_as_natten(version: str = "0.21") -> types.ModuleType:
    """Makes `import natten` return this package's versions of its functions and modules, in this process.

    Call it before anything imports natten. `natten.functional`, `natten.modules`, `natten.natten1d` to `natten3d` and,
    from 0.17 on, `natten.context` exist too, and `importlib.metadata` finds a distribution `natten`, as transformers
    requires.

    Args:
        version: of NATTEN whose signatures the code expects. They differ in positional arguments and defaults:

            - "0.14", "0.15": modules take (dim, num_heads, kernel_size, dilation, bias=True, ...), have a relative
              position bias by default, and pad small inputs.
            - "0.17": `na1d`, `na2d`, `na3d` take (query, key, value, kernel_size, dilation, is_causal, rpb, scale);
              modules take (dim, num_heads, kernel_size, dilation, is_causal, rel_pos_bias=False, ...).
            - "0.20", "0.21": both take kernel_size, stride, dilation, is_causal, in this order.

            The functions that store the attention weights (`na2d_qk`, `natten2dqkrpb`, ...) exist in each.

    Returns:
        The module `natten`.

    Raises:
        ValueError: version is none of these.
        RuntimeError: the real NATTEN is imported already.

    Example:
        >>> from inr_kernels.integrations import install_as_natten
        >>> install_as_natten().__version__
        '0.21.7'
    """
    require(version in VERSIONS, "version", f"be one of {', '.join(VERSIONS)}", repr(version))
    present = sys.modules.get("natten")
    if present is not None and not getattr(present, "IS_INR_KERNELS", False):
        path = getattr(present, "__file__", None)
        raise RuntimeError(f"natten is imported already, from {path}; call install_as_natten before that import")
    for name in [name for name in sys.modules if name.startswith("natten.")]:  # of another version
        del sys.modules[name]
    natten = _module("natten", _names(version) | {"__version__": VERSIONS[version], "__path__": []})
    # NAT and DiNAT take a module without `context` for a version before 0.17.
    for name in (*SUBMODULES, *(["context"] if _minor(version) >= 17 else [])):
        submodule = _module(f"natten.{name}", _names(version))
        if not hasattr(natten, name):
            setattr(natten, name, submodule)
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    sys.meta_path.insert(0, _Finder(VERSIONS[version]))
    return natten


def _module(name, names):
    module = types.ModuleType(name, "NATTEN's names on inr_kernels.")
    vars(module).update(names)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=name == "natten")
    sys.modules[name] = module
    return module


def _minor(version):
    return int(version.split(".")[1])


def _names(version):
    """What every module of this version contains."""
    minor = _minor(version)
    names = {
        name: value for name, value in vars(unfused).items() if name.startswith(("na1d", "na2d", "na3d", "natten"))
    }
    names |= dict.fromkeys(SETTERS, _ignore)
    names |= {name: _constant(value) for name, value in GETTERS.items()}
    names |= {"has_cuda": torch.cuda.is_available, "HAS_LIBNATTEN": True, "IS_INR_KERNELS": True}
    suffix = "14" if minor < 17 else "17" if minor < 20 else ""
    names |= {f"NeighborhoodAttention{n}D": getattr(modules, f"NeighborhoodAttention{n}D{suffix}") for n in (1, 2, 3)}
    functions = {name: getattr(fused, name) for name in ("na1d", "na2d", "na3d")}
    if minor < 20:
        return names | ({name: _before_stride(function) for name, function in functions.items()} if minor == 17 else {})
    others = "neighborhood_attention_generic", "attention", "merge_attentions"
    return names | functions | {name: getattr(fused, name) for name in others}


def _before_stride(function: Callable[..., Any]) -> Callable[..., Any]:
    """na1d, na2d or na3d by the signature of version 0.17."""

    def call(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kernel_size: fused.Sizes,
        dilation: fused.Sizes = 1,
        is_causal: fused.Flags = False,
        rpb: torch.Tensor | None = None,
        scale: float | None = None,
        additional_keys: torch.Tensor | None = None,
        additional_values: torch.Tensor | None = None,
        xformers_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        options: dict[str, Any] = {"dilation": dilation, "is_causal": is_causal, "rpb": rpb, "scale": scale}
        more = {"additional_keys": additional_keys, "additional_values": additional_values}
        return function(query, key, value, kernel_size, **options, **more)

    call.__name__ = call.__qualname__ = function.__name__
    return call


def _ignore(*args: Any, **options: Any) -> None:
    """Replaces a function that chooses how NATTEN computes."""


def _constant(value):
    return lambda *args: value


class _Finder(importlib.metadata.DistributionFinder):
    """Finds a distribution `natten` without files."""

    def __init__(self, version: str) -> None:
        self.version = version

    def find_spec(self, *args: Any, **options: Any) -> None:
        """Finds no modules: they are in sys.modules."""

    def find_distributions(self, context: Any = None) -> Any:
        """The distribution, if it is asked for, or all are."""
        return [_Distribution(self.version)] if getattr(context, "name", None) in (None, "natten") else []


class _Distribution(importlib.metadata.Distribution):
    def __init__(self, version: str) -> None:
        self._version = version

    @property
    def metadata(self) -> Any:
        """Name and version."""
        message = Message()
        message["Name"], message["Version"] = "natten", self._version
        return message

    def read_text(self, filename: str) -> None:
        """There are no files."""

    def locate_file(self, path: Any) -> Any:
        """There are no files."""
        raise FileNotFoundError(path)
