"""The command line: parsing and printing only."""

from bitwright.compiler.deferred import defer_imports

# Before anything imports onnx_ir. Only in our own process: a program that uses bitwright keeps its own import system.
defer_imports()
