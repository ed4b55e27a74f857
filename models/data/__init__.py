"""Images and training data."""
