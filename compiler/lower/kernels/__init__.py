"""Target-neutral TensorIR kernels: plain loops that LLVM vectorises, exact to ``program.ops``."""
