"""Typed questions about an onnx_ir model."""
