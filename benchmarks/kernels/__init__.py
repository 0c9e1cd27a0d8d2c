"""Compiled artifacts against ONNX Runtime: paired times with intervals, kernels under the machine's ceilings."""
