"""What all ops share: dispatch, checks, registration, the native library, measured ceilings."""
