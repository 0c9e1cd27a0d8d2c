"""Decoders of the llama family in ONNX graphs: found by structure, never by names, and what GGUF calls their parts."""
