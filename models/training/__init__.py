"""Training recipes, one per network."""
