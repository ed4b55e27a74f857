"""What all ops share: dispatch, checks, registration, the native library, ceilings, images, files."""
