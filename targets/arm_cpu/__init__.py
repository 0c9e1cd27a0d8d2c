"""64-bit ARM processors: kernels, profiles, emulation."""
