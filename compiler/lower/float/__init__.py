"""TensorIR kernels for what stays in float: matrix products, convolutions, rows of elements."""
