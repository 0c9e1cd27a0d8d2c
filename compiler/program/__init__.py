"""The integer program between a Q/DQ model and its kernels: records (ops) and their extraction."""
