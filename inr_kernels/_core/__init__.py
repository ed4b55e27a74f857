"""What all ops share: dispatch, argument checks, registration with torch, the native library, hooks of modules."""
