"""x86-64 processors: kernels, profiles, detection of the host."""
