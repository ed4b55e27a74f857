"""Code that the networks share: their interface, checkpoints, files, CUDA graphs, masks and tiles."""
