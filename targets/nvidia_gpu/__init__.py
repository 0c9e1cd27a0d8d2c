"""NVIDIA graphics processors: tensor-core kernels from TVM, built without a device."""
