"""Images in files, photographs to train on, crops of them, and masks."""
