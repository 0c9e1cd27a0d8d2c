"""The driver: everything between an ONNX model and a verified artifact that is not a graph rewrite."""

from bitwright.compiler.deferred import defer_imports

# Before anything imports onnx_ir, and this package is imported before every module that does.
defer_imports()
