"""Training recipes, one per network; each runs as `python -m inr_kernels.models.training.NAME`."""
