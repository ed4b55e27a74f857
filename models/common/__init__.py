"""What the networks share: checkpoints, files, CUDA graphs, masking."""
