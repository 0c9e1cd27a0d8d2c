"""Running, auditing and timing models in ONNX Runtime."""
