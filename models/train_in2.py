"""Deprecated: this module is now `inr_kernels.models.training.in2`."""

from .common.deprecated import moved

moved(__name__, "inr_kernels.models.train_in2", "inr_kernels.models.training.in2")
