"""The driver: everything between an ONNX model and a verified artifact that is not a graph rewrite."""
