"""Deprecated: this module is now `inr_kernels.models.training.liif`."""

from .common.deprecated import moved

moved(__name__, "inr_kernels.models.train_liif", "inr_kernels.models.training.liif")
