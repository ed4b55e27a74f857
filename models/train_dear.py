"""Deprecated: this module is now `inr_kernels.models.training.dear`."""

from .common.deprecated import moved

moved(__name__, "inr_kernels.models.train_dear", "inr_kernels.models.training.dear")
