"""Phase by phase from an ONNX decoder to a GGUF file, and from a GGUF file's weights back."""
