"""TensorIR templates: one loop structure each, shared by every instruction set that fits it."""
