"""The integer program between a Q/DQ model and its kernels: records (ops) and how they are read from a model."""
