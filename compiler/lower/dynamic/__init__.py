"""Functions for any number of elements: kernels of fixed size put into loops over the outermost dimension."""
