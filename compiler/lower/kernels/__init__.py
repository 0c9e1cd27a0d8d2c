"""Target-neutral TensorIR kernels: plain loops that LLVM vectorises, exact to the formulas in ``program.ops``."""
