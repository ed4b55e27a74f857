"""Deprecated: this module is now `inr_kernels.models.lama.ffc`."""

from .common.deprecated import moved

moved(__name__, "inr_kernels.models.ffc", "inr_kernels.models.lama.ffc")
